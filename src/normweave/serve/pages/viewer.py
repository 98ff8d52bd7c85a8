"""The image of an inspection with its anomaly map and its boxes."""

from __future__ import annotations

from nicegui.element import Element

from normweave.serve.records import Inspection

MAX_SIDE = 1600
"""Longer side of the requested images in pixels."""


class Viewer(Element, component="viewer.js"):
    """Shows one inspection. Opacity, boxes and zoom run in the browser and send no request."""

    def __init__(self) -> None:
        super().__init__()
        self.show(None)

    def show(self, inspection: Inspection | None) -> None:
        """Show the image of an inspection, or the reason why there is none."""
        props = self._props
        props["inspection"] = 0 if inspection is None else inspection.id
        props["image"] = props["heat"] = props["label"] = props["missing"] = ""
        props["boxes"] = []
        props["height"] = props["width"] = 0
        if inspection is None:
            props["missing"] = "No image yet."
        elif inspection.image is None:
            unreadable = inspection.outcome.error is not None
            props["missing"] = "The image could not be read." if unreadable else "The image is no longer stored."
        else:
            outcome = inspection.outcome
            address = f"/v1/inspections/{inspection.id}"
            props["image"] = f"{address}/image?format=png&max_side={MAX_SIDE}"
            props["heat"] = f"{address}/map?format=png&max_side={MAX_SIDE}"
            props["label"] = inspection.name or "no name"
            props["boxes"] = [list(box[:4]) for box in outcome.boxes]
            props["height"], props["width"] = outcome.height or 0, outcome.width or 0
        self.update()
