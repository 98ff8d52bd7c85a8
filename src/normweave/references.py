"""References: the good images that stored patches come from, to show what a model expected at a defect box.

A bundle holds them in references.json: the name and size of each good image, small pictures of some of them, and the
image and position of each stored patch. It is JSON because the base install cannot read safetensors.
"""

from __future__ import annotations

import base64
import io
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from normweave import bundle
from normweave.data.alignment import Placement
from normweave.data.images import decode
from normweave.data.rows import Rows
from normweave.errors import BundleError
from normweave.maps.overlay import outlined_crop
from normweave.types import DefectBox, Tile

FILE = "references.json"
MAX_PICTURES = 200
"""Pictures in a bundle: of the good images that most stored patches come from."""
MAX_BYTES = 10 * 2**20
"""Bytes of all pictures of a bundle together."""
SIDE = 256
"""Longer side of a picture in pixels, as the default input of the network."""
QUALITY = 85
"""Of the JPEG files."""


class GoodImage(NamedTuple):
    """A good image that stored patches come from. Sizes are in pixels of the image on disk."""

    name: str  # path below the common folder of the fit images, with slashes
    size: tuple[int, int]  # (height, width)
    tile_size: tuple[int, int]  # (height, width)
    picture: Path | bytes | None  # the image on disk or its small picture as JPEG; None: the bundle holds none


@dataclass(frozen=True, eq=False)
class References:
    """The good images of a memory bank."""

    images: tuple[GoodImage, ...]
    patches: NDArray[np.int64]
    """(M, 3) image, y and x of the centre of each stored patch; y and x are pixels of this image."""

    @classmethod
    def collect(
        cls, origins: NDArray[np.int64], *, grid: tuple[int, int], images: Rows, fit: NDArray[np.int64]
    ) -> References:
        """Return the references of a head that was just fitted. No image is read.

        Args:
            origins: (M, 3) as `Head.origins`.
            grid: (h, w) of the features.
            fit: rows of the fit data.
        """
        rows = fit[origins[:, 0]]
        used, image = np.unique(images.owner[rows], return_inverse=True)  # (m,), (M,)
        tiles = np.array(images.tiles).reshape(-1, 4)[rows]  # (M, 4) top, left, height, width
        centres = tiles[:, :2] + (origins[:, 1:] + 0.5) * tiles[:, 2:] / np.array(grid)
        for number, owner in enumerate(used):
            if (placement := images.placements[owner]) is not None:  # to pixels of the image as it was taken
                matrix, own = placement.matrix(*images.sizes[owner]), image == number
                moved = centres[own][:, ::-1] @ matrix[:, :2].T + matrix[:, 2]
                centres[own] = np.clip(moved[:, ::-1], 0, np.array(images.sizes[owner]) - 1)
        tile_size = dict(
            zip(image.tolist(), map(tuple, tiles[:, 2:].tolist()), strict=True)
        )  # the same for all tiles of an image
        path_of = {owner: Path(os.path.abspath(images.samples[owner].image_path)) for owner in images.owner[fit]}
        levels = zip(*(path.parent.parts for path in path_of.values()), strict=False)
        shared = sum(1 for _ in takewhile(lambda names: len(set(names)) == 1, levels))
        found = []
        for number, owner in enumerate(used):
            name = "/".join(path_of[owner].parts[shared:])
            found.append(GoodImage(name, images.sizes[owner], tile_size[number], path_of[owner]))
        return cls(tuple(found), np.concatenate([image[:, None], centres.astype(np.int64)], axis=1))

    def joined(self, others: References, *, prefix: str) -> References:
        """Return these references followed by others, whose names get a prefix."""
        named = tuple(image._replace(name=f"{prefix}/{image.name}") for image in others.images)
        moved = others.patches + np.array([len(self.images), 0, 0])
        return References(self.images + named, np.concatenate([self.patches, moved]))

    def kept(self, patches: NDArray[np.bool_]) -> References:
        """Return the references of some of the stored patches (M,), and their images."""
        chosen = self.patches[patches]
        used, image = np.unique(chosen[:, 0], return_inverse=True)
        return References(
            tuple(self.images[number] for number in used), np.concatenate([image[:, None], chosen[:, 1:]], axis=1)
        )

    def mark(
        self,
        boxes: Sequence[DefectBox],
        anomaly_map: NDArray[np.float32],
        nearest: NDArray[np.int64],
        tiles: Sequence[Tile],
        *,
        placement: Placement | None = None,
    ) -> tuple[DefectBox, ...]:
        """Return the boxes with the region of a good image that the model compared each with.

        It is the region around the stored patch that is nearest to the patch at the peak of the box. It has the size of
        the box, scaled as the two images are when they are prepared, and lies inside its image.

        Args:
            anomaly_map: (H, W), in which the boxes were found.
            nearest: (n, h, w) of the tiles, as `RawOutput.nearest`.
            placement: where the image shows the part of the reference, of which the tiles are.

        Raises:
            BundleError: `nearest` refers to a patch that is not listed.
        """
        return tuple(self._marked(box, anomaly_map, nearest, tiles, placement) for box in boxes)

    def _marked(
        self,
        box: DefectBox,
        anomaly_map: NDArray[np.float32],
        nearest: NDArray[np.int64],
        tiles: Sequence[Tile],
        placement: Placement | None,
    ) -> DefectBox:
        inside = anomaly_map[box.y : box.y + box.height, box.x : box.x + box.width]
        down, right = divmod(int((inside == box.peak).argmax()), box.width)  # of the peak in the box
        y, x = box.y + down, box.x + right
        if placement is not None:
            x, y = (round(each) for each in placement.to_reference(x, y, anomaly_map.shape))

        def distance(number: int) -> float:
            top, left, height, width = tiles[number]
            return max(abs(y + 0.5 - top - height / 2) / height, abs(x + 0.5 - left - width / 2) / width)

        number = min(range(len(tiles)), key=distance)  # where tiles overlap, the one whose centre is nearest
        tile, (h, w) = tiles[number], nearest.shape[1:]
        y = min(max(y, tile.top), tile.top + tile.height - 1)  # of a moved part, it may be beyond by a pixel
        x = min(max(x, tile.left), tile.left + tile.width - 1)
        patch = int(nearest[number, (y - tile.top) * h // tile.height, (x - tile.left) * w // tile.width])
        if not 0 <= patch < len(self.patches):
            raise BundleError(
                f"The model refers to stored patch {patch}, but {FILE} lists {len(self.patches)}. Train it again."
            )
        image, centre_y, centre_x = self.patches[patch].tolist()
        good = self.images[image]
        scale_y, scale_x = good.tile_size[0] / tile.height, good.tile_size[1] / tile.width
        height = min(good.size[0], max(1, round(box.height * scale_y)))
        width = min(good.size[1], max(1, round(box.width * scale_x)))
        return box._replace(
            reference=good.name,
            # The stored patch lies in the reference where the peak lies in the box.
            reference_x=min(max(0, centre_x - round(right * scale_x)), good.size[1] - width),
            reference_y=min(max(0, centre_y - round(down * scale_y)), good.size[0] - height),
            reference_width=width,
            reference_height=height,
        )

    @cached_property
    def _with_picture(self) -> dict[str, GoodImage]:
        return {image.name: image for image in self.images if image.picture is not None}

    def shows(self, box: DefectBox) -> bool:
        """Return whether there is a picture of the reference of a box."""
        return box.reference in self._with_picture

    def expected(self, box: DefectBox) -> NDArray[np.uint8]:
        """Return the surroundings of the reference of a box, (h, w, 3), if `shows`.

        Raises:
            ImageError: the picture cannot be read.
        """
        good = self._with_picture[str(box.reference)]
        region = (box.reference_x or 0, box.reference_y or 0, box.reference_width or 1, box.reference_height or 1)
        assert good.picture is not None
        return outlined_crop(shrunk(decode(good.picture)), region, size=good.size)

    def to_bytes(self) -> bytes:
        """Return references.json with pictures up to `MAX_PICTURES` and `MAX_BYTES`."""
        pictures: dict[int, str] = {}
        left = MAX_BYTES
        most_used = np.lexsort((-np.bincount(self.patches[:, 0], minlength=len(self.images)),))  # stable
        for number in most_used[:MAX_PICTURES].tolist():
            source = self.images[number].picture
            if source is None:
                continue
            content = source if isinstance(source, bytes) else jpeg(shrunk(decode(source)))
            left -= len(content)
            if left < 0:
                break
            pictures[number] = base64.b64encode(content).decode()
        images = [
            image._replace(picture=None)._asdict() | {"picture": pictures.get(number)}
            for number, image in enumerate(self.images)
        ]
        return json.dumps({"images": images, "patches": self.patches.tolist()}, separators=(",", ":")).encode()

    @classmethod
    def from_bytes(cls, content: bytes, *, where: str) -> References:
        """Read what `to_bytes` returned.

        Raises:
            BundleError: it is not that.
        """
        try:
            record = json.loads(content)
            images = tuple(
                GoodImage(
                    name=str(each["name"]),
                    size=(int(each["size"][0]), int(each["size"][1])),
                    tile_size=(int(each["tile_size"][0]), int(each["tile_size"][1])),
                    picture=None if each["picture"] is None else base64.b64decode(each["picture"], validate=True),
                )
                for each in record["images"]
            )
            patches = np.array(record["patches"], dtype=np.int64).reshape(-1, 3)
            if (
                not all(min(each.size + each.tile_size) >= 1 for each in images)
                or not np.isin(patches[:, 0], range(len(images))).all()
            ):
                raise ValueError("a size below 1, or a patch of an image that is not listed")
        except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
            raise BundleError(
                f"{where} does not list good images and patches: {error}. Copy the bundle again, or train it again."
            ) from error
        return cls(images, patches)


def bundle_files(references: References | None) -> dict[str, bytes]:
    """Return the file of a bundle that holds the references, by name; none without references."""
    return {} if references is None else {FILE: references.to_bytes()}


def read(folder: Path) -> References | None:
    """Return the references of a bundle, or None if it has none.

    Raises:
        BundleError: the file is damaged.
    """
    if not bundle.lists(folder, FILE):
        return None
    return References.from_bytes(bundle.read_file(folder, FILE), where=f"{folder}/{FILE}")


def seen(image: NDArray[np.uint8], box: DefectBox) -> NDArray[np.uint8]:
    """Return the surroundings of a box in its image (H, W, 3), drawn as `References.expected` draws the reference."""
    return outlined_crop(image, box[:4], size=image.shape[:2])


def shrunk(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the image (H, W, 3) with a longer side of at most `SIDE` pixels."""
    small = Image.fromarray(image)
    small.thumbnail((SIDE, SIDE))
    return np.asarray(small)


def jpeg(image: NDArray[np.uint8]) -> bytes:
    """Return the image (H, W, 3) as a JPEG file."""
    content = io.BytesIO()
    Image.fromarray(image).save(content, "JPEG", quality=QUALITY)
    return content.getvalue()
