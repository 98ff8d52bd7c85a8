"""Region: draw over an image which part of it is to be inspected, and download the file to train with."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import numpy as np
from nicegui import ui
from nicegui.element import Element
from nicegui.events import GenericEventArguments

from normweave import settings
from normweave.config import RegionConfig, ShapesConfig
from normweave.config.regions import EVERY
from normweave.data import regions
from normweave.data.alignment import encode_reference
from normweave.errors import NormweaveError
from normweave.serve.pages.frame import EMIT_ID, Page, Serving, notify_error
from normweave.serve.pages.inspect import ENDINGS
from normweave.serve.pages.inspect import TEMPLATE as DROP_TEMPLATE
from normweave.serve.records import Filter, Inspection
from normweave.serve.templating import render_macro

TEMPLATE = "region.html"
LISTED = 24
"""Number of images to choose from."""
MAX_SIDE = 1600
"""Longer side of the image that is drawn on, in pixels."""
FILE = "regions.json"
FOLLOW = {
    "none": "no, it stays in its place",
    "translation": "where it is moved",
    "rigid": "where it is moved and turned",
}
"""Whether the region follows the part, in words."""


class Drawing(Element, component="region.js"):
    """Shows an image with the shapes of a region over it, and sends the shapes as `drawn` after each change."""

    def __init__(self) -> None:
        super().__init__()
        self._props |= {"image": "", "label": "", "region": {}, "version": 0}

    def show(self, inspection: Inspection) -> None:
        """Show the image of an inspection; the shapes stay."""
        self._props["image"] = f"/v1/inspections/{inspection.id}/image?format=png&max_side={MAX_SIDE}"
        self._props["label"] = f"Region over {inspection.name or inspection.id}"
        self.update()

    def draw(self, region: RegionConfig | None) -> None:
        """Show the shapes of a region; the steps that led to the shown ones are forgotten."""
        empty = ShapesConfig()
        parts = (
            {"include": empty, "ignore": empty}
            if region is None
            else {"include": region.include, "ignore": region.ignore}
        )
        self._props["region"] = {
            name: {"polygons": part.polygons, "rectangles": part.rectangles, "mask": part.mask}
            for name, part in parts.items()
        }
        self._props["version"] += 1
        self.update()


class RegionPage(Page):
    """The region of each category, over an inspected image."""

    path = "/region"
    title = "Region"
    purpose = "Draw which part of the image to inspect. What lies outside never matters."
    position = 9.5
    engineers_only = True

    def __init__(self, serving: Serving) -> None:
        super().__init__(serving)
        # The running model keeps its regions; these are changed and downloaded.
        self._regions = {each.category: each for each in self._service.detector.config.regions}
        self._listed: list[Inspection] = []
        self._shown: Inspection | None = None
        self._problems: dict[str, str] = {}  # of drawings that are not kept, by category
        self._follow = {each.category: each.align for each in self._regions.values()}
        self._over: dict[str, Inspection] = {}  # the image over which the region of a category was drawn

    async def content(self) -> None:
        """Build the images to draw on, the drawing, and the file."""
        self.heading()
        with ui.element("section").classes("sheet"):
            ui.html("<h2>Image</h2>")
            ui.html(
                render_macro(DROP_TEMPLATE, "drop_zone", endings=ENDINGS, most=self._service.config.max_image_bytes)
            )
            ui.on("inspected", self._dropped)
            ui.on("not_inspected", lambda event: notify_error(event.args))
            self._images = ui.html().classes("taught one-row")
            self._images.on("click", self._choose, js_handler=EMIT_ID)
        with ui.element("section").classes("sheet") as self._sheet:
            with ui.element("div").classes("choices"):
                names = [EVERY, *self._service.detector.record["categories"]]
                options = {name: "all that have no region of their own" if name == EVERY else name for name in names}
                self._category = ui.select(options, value=EVERY, label="Category", on_change=self._draw)
                self._category.props("outlined dense options-dense").classes("choice wide")
                self._align = ui.select(FOLLOW, value="none", label="Follow the part", on_change=self._set_follow)
                self._align.props("outlined dense options-dense").classes("choice wide")
            self._drawing = Drawing()
            self._drawing.on("drawn", self._changed)
            with ui.element("div").classes("pager"):
                self._download = ui.button(f"Download {FILE}", color=None, on_click=self._send)
                self._download.props("unelevated no-caps").classes("main-button")
            self._state = ui.html().props('aria-live="polite"')
        ui.html(render_macro(TEMPLATE, "next_step")).classes("sheet")
        await self._list()
        self._draw()

    async def _list(self) -> None:
        found = await asyncio.to_thread(self._service.store.inspections, Filter(unreadable=False), limit=LISTED)
        self._listed = [one for one in found if one.image is not None]
        if self._shown is None and self._listed:
            self._shown = self._listed[0]
        self._show()

    async def _dropped(self, event: GenericEventArguments) -> None:
        one = await asyncio.to_thread(self._service.store.inspection, int(event.args))
        if one is not None and one.image is not None:
            self._shown = one
            await self._list()
        elif one is not None:
            notify_error(f"{one.name or one.id} is not an image.")

    def _choose(self, event: GenericEventArguments) -> None:
        self._shown = next((one for one in self._listed if one.id == int(event.args)), self._shown)
        self._show()

    def _show(self) -> None:
        self._sheet.set_visibility(self._shown is not None)
        self._images.set_content(
            render_macro(TEMPLATE, "images", rows=self._listed, chosen=self._shown and self._shown.id)
        )
        if self._shown is not None:
            self._drawing.show(self._shown)

    def _draw(self) -> None:
        """Show the region of the chosen category: its own, or that of all."""
        self._problems.pop(self._category.value, None)  # what was drawn is not kept, so it is not shown again
        self._drawing.draw(self._regions.get(self._category.value, self._regions.get(EVERY)))
        self._align.set_value(self._follow.get(str(self._category.value), "none"))
        self._show_state()

    def _set_follow(self) -> None:
        self._follow[str(self._category.value)] = self._align.value

    def _changed(self, event: GenericEventArguments) -> None:
        """Check what was drawn, and keep it for the chosen category."""
        category = str(self._category.value)
        self._problems.pop(category, None)
        try:
            region = read(category, event.args)
        except NormweaveError as error:
            self._problems[category] = str(error)
        else:
            if region is None:
                self._regions.pop(category, None)
            else:
                self._regions[category] = region
                if self._shown is not None:
                    self._over[category] = self._shown
        self._show_state()

    def _show_state(self) -> None:
        category = str(self._category.value)
        region = self._regions.get(category, self._regions.get(EVERY))
        share = None
        if region is not None:
            inside = regions.mask(regions.Region(region.include, region.ignore), regions.RASTER, regions.RASTER)
            share = float(np.mean(inside))
        others = ", ".join(f"{'all' if name == EVERY else name}" for name in self._problems if name != category)
        self._state.set_content(
            render_macro(
                TEMPLATE,
                "state",
                share=share,
                problem=self._problems.get(category),
                of_all=category != EVERY and category not in self._regions,
                others=others,
            )
        )
        self._download.set_enabled(bool(self._regions) and not self._problems)

    async def _send(self) -> None:
        if self.is_open_to(self._token) and self._regions and not self._problems:
            try:
                found = [await self._following(each) for each in self._regions.values()]
                await asyncio.to_thread(regions.check, found)
            except NormweaveError as error:
                notify_error(str(error))
                return
            ui.download.content(settings.regions_text(found), FILE, "application/json")

    async def _following(self, region: RegionConfig) -> RegionConfig:
        """Return a region that follows the part as chosen, with the image over which it was drawn as reference."""
        follow = self._follow.get(region.category, "none")
        if follow == region.align:
            return region
        over = self._over.get(region.category, self._shown)
        reference = ""
        if follow != "none" and over is not None and over.image is not None:
            reference = await self._service.render(over.image, lambda reader: encode_reference(reader.image()))
        return replace(region, align=follow, reference=reference)


def read(category: str, drawn: Any) -> RegionConfig | None:
    """Return the region that a browser sent; None without shapes.

    Raises:
        ConfigError: it is not a region, or it is very small.
    """
    if not isinstance(drawn, dict):
        drawn = {}
    given = {}
    for name, part in drawn.items():
        shapes = {key: value for key, value in part.items() if value} if isinstance(part, dict) else part
        if isinstance(shapes, dict) and isinstance(mask := shapes.get("mask"), str):
            shapes["mask"] = regions.encode_mask(regions.decode_mask(mask))
        if shapes:
            given[name] = shapes
    if not given:
        return None
    found = settings.from_dict({"regions": [{**given, "category": category}]}, source="The drawing").regions
    regions.check(found)
    return found[0]
