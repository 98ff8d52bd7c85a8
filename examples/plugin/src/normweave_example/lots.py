"""The layout: LOT-NUMBER/IMAGE.png holds good images of a lot, and rejects/IMAGE.png defective ones."""

from pathlib import Path

from normweave.data.layouts import Layout
from normweave.types import Sample


def read_lots(root: Path) -> list[Sample]:
    """Read good images of all lots for the training, and the rejects for the test; a lot is a group."""
    good = [
        Sample(image_path=image, category="part", group=image.parent.name, split="train")
        for image in sorted(root.glob("LOT-*/*.png"))
    ]
    bad = [
        Sample(image_path=image, category="part", group="rejects", split="test", label="anomalous")
        for image in sorted(root.glob("rejects/*.png"))
    ]
    return good + bad


LOTS = Layout(read_lots, lambda root: any(root.glob("LOT-*")))
