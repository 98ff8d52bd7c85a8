"""Find where an image shows the part of a reference image, and move pixels between the image and the reference.

Both images are shrunk to 256 pixels, and each pixel is divided by the local contrast, so that light has no influence.
The part of the reference is compared with every position of the image (and every 4 degrees) by the normalized
cross-correlation of the pixels under it alone; the best positions are refined by the enhanced correlation coefficient
(Evangelidis and Psarakis 2008). So pixels outside of the part have no influence unless they resemble it more than the
part does. `Limits` can refuse an image in which another rotation (or another position, without rotations) fits almost
as well: a wrong place is worse than none.
"""

from __future__ import annotations

import base64
import binascii
import io
import math
from collections.abc import Iterable, Sequence
from functools import lru_cache
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from normweave.errors import ConfigError, ImageError, MissingError

SIDE = 256
"""Longer side of the shrunk images in pixels."""
COARSE_SIDE = 64
"""Longer side of the images in which every position is compared."""
MOST_SHIFT = 0.25
"""Share of the longer side by which the part may be moved."""
MOST_DEGREES = 30
"""Rotation in either direction."""
DEGREES = 4
"""Between two rotations that are compared."""
BEST = 2
"""Positions that are refined."""
LOCAL = 12 / SIDE
"""Standard deviation of the neighbourhood whose contrast is removed, as share of the longer side."""
NOISE = 4.0
"""Grey levels that are added to the local contrast, so that noise in a flat area stays small."""
REFINED = ((9, 30), (5, 60))
"""Side of the blur in pixels, and number of steps, of each refinement."""
LONGEST = 32_766
"""Longest side of an image that OpenCV can move."""
LEAST_CORRELATION = 0.2
"""Below it, no position was found."""
LEAST_OVERLAP = 0.5
"""Share of the region that must lie in the image."""
SHARE_OF_LOWEST = 0.5
"""The limit of the correlation, as share of the lowest one of held-out normal images."""
LESS_OVERLAP = 0.05
"""The limit of the overlap is this much below the lowest one of held-out normal images."""
KEY = "alignment"
"""What the record of a detector holds of the limits of each region that follows the part, by category."""
ANOTHER_PLACE = 1 / 8
"""Shift from which on a position is another one, as share of the longer side."""
ANOTHER_ROTATION = 3 * DEGREES
"""Degrees from which on a rotation is another one."""
MOST_RIVAL = 0.8
"""Share of the highest correlation that another place may reach; round parts of any rotation reach 0.83 and more."""
CLEAR_RIVAL = 0.6
"""If no held-out normal image has more, the part has one place in each image, and images are not compared with it."""
SURE_CORRELATION = 0.4
"""Without rotations, another position counts below this correlation: repeated print may be like the part."""
LEAST_SELF = 0.9
"""Correlation of a reference with itself, below which it has too little structure."""

Matrix = NDArray[np.float64]


class Placement(NamedTuple):
    """Where an image shows the part of the reference image."""

    shift_x: float
    """Pixels of the image by which the centre of the reference is moved to the right."""
    shift_y: float
    """The same downwards."""
    rotation: float
    """Degrees by which it is turned clockwise, around the moved centre."""
    correlation: float
    """Of the part with the reference, -1 to 1, after removing the local contrast."""
    overlap: float
    """Share of the region that lies in the image."""
    rival: float = 0.0
    """Share of the highest correlation that another rotation reaches, or another position without rotations."""

    def matrix(self, height: int, width: int) -> Matrix:
        """Return the transform (2, 3) of points (x, y) of the reference to points of an image of this size."""
        cos, sin = math.cos(math.radians(self.rotation)), math.sin(math.radians(self.rotation))
        x, y = (width - 1) / 2, (height - 1) / 2
        return np.array(
            [
                [cos, -sin, x - cos * x + sin * y + self.shift_x],
                [sin, cos, y - sin * x - cos * y + self.shift_y],
            ]
        )

    def as_outcome(self) -> dict[str, Any]:
        """Return the fields of an outcome that hold it."""
        return {name: value for name, value in self._asdict().items() if name not in ("overlap", "rival")}

    def resized(self, old: tuple[int, int], new: tuple[int, int]) -> Placement:
        """Return the placement in the image after it was resized from one (height, width) to another."""
        return self._replace(shift_x=self.shift_x * new[1] / old[1], shift_y=self.shift_y * new[0] / old[0])

    def to_reference(self, x: float, y: float, size: tuple[int, int]) -> tuple[float, float]:
        """Return the point of the reference that lies at a point of an image of this (height, width)."""
        matrix = self.matrix(*size)
        return tuple((matrix[:, :2].T @ (np.array([x, y]) - matrix[:, 2])).tolist())


class Limits(NamedTuple):
    """What an image of a region must reach; it is refused otherwise."""

    correlation: float
    overlap: float
    images: int = 0
    """Held-out normal images from which the limits were computed."""
    rival: float = 1.0
    """The highest `rival`; 1: any."""

    @classmethod
    def of(cls, placements: Iterable[Placement]) -> Limits:
        """Return the limits from the placements of held-out normal images."""
        found = list(placements)
        lowest = min(each.correlation for each in found)
        overlap = min(each.overlap for each in found) - LESS_OVERLAP
        rival = MOST_RIVAL if max(each.rival for each in found) > CLEAR_RIVAL else 1.0
        return cls(max(LEAST_CORRELATION, SHARE_OF_LOWEST * lowest), max(LEAST_OVERLAP, overlap), len(found), rival)

    def check(self, placement: Placement) -> None:
        """Check that an image fits.

        Raises:
            ImageError: it does not.
        """
        based = f", from {self.images} held-out normal images" if self.images else ""
        if placement.correlation < self.correlation:
            raise ImageError(
                f"does not fit the reference image of its region: correlation {placement.correlation:.2f}, at least "
                f"{self.correlation:.2f} is needed{based}. Check that the camera shows this product. A part is found "
                f"if it is moved by up to {MOST_SHIFT:.0%} of the longer side of the image, and turned by up to "
                f"{MOST_DEGREES} degrees with align=rigid."
            )
        if placement.rival > self.rival:
            raise ImageError(
                f"shows the part of the reference image of its region almost as well in another place ("
                f"{placement.rival:.0%} of the correlation of {placement.correlation:.2f}, at most {self.rival:.0%} is "
                "allowed), so that its place is not known. Check that the camera shows this product. A part without "
                "edges or print that all good parts have, or a round part of any rotation, needs align=none."
            )
        if placement.overlap < self.overlap:
            raise ImageError(
                f"shows {placement.overlap:.0%} of its region of interest, at least {self.overlap:.0%} is needed"
                f"{based}. Move the part into the image."
            )


FEWEST = Limits(LEAST_CORRELATION, LEAST_OVERLAP, rival=MOST_RIVAL)
"""The limits until some were computed."""


def library() -> ModuleType:
    """Import OpenCV.

    Raises:
        MissingError: it is not installed.
    """
    try:
        import cv2
    except ImportError as error:
        raise MissingError(
            "A region that follows the part (align) needs OpenCV, which is not installed: pip install "
            '"normweave[align]". Or train with a region that has align=none.'
        ) from error
    return cv2


def encode_reference(pixels: NDArray[np.uint8]) -> str:
    """Return an image (H, W, 3) as grey PNG of at most 256 pixels a side, as base64 text."""
    height, width = _shrunk(*pixels.shape[:2])
    grey = Image.fromarray(pixels).convert("L").resize((width, height), Image.Resampling.BOX)
    content = io.BytesIO()
    grey.save(content, "PNG", optimize=True)
    return base64.b64encode(content.getvalue()).decode()


def decode_reference(text: str) -> NDArray[np.uint8]:
    """Return the grey image (h, w) of such a text.

    Raises:
        ConfigError: it is not such a text.
    """
    try:
        with Image.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=["PNG"]) as image:
            if max(image.size) > SIDE:
                raise ValueError(f"{image.width} x {image.height} pixels, of {SIDE} a side at most")
            return np.asarray(image.convert("L"))
    except (binascii.Error, OSError, SyntaxError, UnidentifiedImageError, ValueError) as error:
        raise ConfigError(
            f"The reference of a region must be a PNG image as base64 text, got {text[:40]!r}…: {error}. "
            "Write it with: normweave data roi IMAGE -o regions.json --align rigid"
        ) from error


class _Found(NamedTuple):
    """Where the part of the reference was found in a shrunk image."""

    correlation: float
    matrix: Matrix
    """Transform (2, 3) of the reference to the image."""
    rival: float
    """As `Placement.rival`."""


class _Peak(NamedTuple):
    """The best position of a template in a coarse image."""

    correlation: float
    degrees: int
    matrix: Matrix
    """Transform (3, 3) of the coarse reference to the coarse image."""
    rival: float
    """Highest correlation at another position."""


class _Template(NamedTuple):
    """The part of the coarse reference at one rotation."""

    degrees: int
    pixels: NDArray[np.float32]
    inside: NDArray[np.float32]
    matrix: Matrix
    """Points of the coarse reference to points of the template."""


class Aligner:
    """Finds the part of a reference image in other images.

    Args:
        reference: (h, w) grey.
        inside: (h, w) the part of it that is compared.
        rigid: also rotations; else shifts alone.

    Raises:
        MissingError: OpenCV is not installed.
    """

    def __init__(self, reference: NDArray[np.uint8], inside: NDArray[np.bool_], *, rigid: bool) -> None:
        self._cv = cv = library()
        self._rigid = rigid
        self._size = height, width = reference.shape
        self._inside = inside.astype(np.uint8)
        self._reference = self._structure(reference)
        self._part = self._structure(reference, self._inside)
        scale = min(1.0, COARSE_SIDE / max(height, width))
        self._coarse_size = max(8, round(height * scale)), max(8, round(width * scale))
        coarse = cv.resize(self._reference, self._coarse_size[::-1], interpolation=cv.INTER_AREA)
        share = cv.resize(inside.astype(np.float32), self._coarse_size[::-1], interpolation=cv.INTER_AREA)
        marked = np.asarray(share > (0.5 if (share > 0.5).any() else 0.0), dtype=np.float32)
        angles = range(-MOST_DEGREES // DEGREES * DEGREES, MOST_DEGREES + DEGREES, DEGREES) if rigid else (0,)
        self._templates = [self._turned(coarse, marked, degrees) for degrees in angles]

    @classmethod
    def checked(cls, reference: NDArray[np.uint8], inside: NDArray[np.bool_], *, rigid: bool) -> Aligner:
        """Return an aligner that finds the part in the reference itself.

        Raises:
            ConfigError: it does not.
        """
        found = cls(reference, inside, rigid=rigid)
        place = found._find(reference)
        at_home = place is not None and np.abs(place.matrix - np.eye(2, 3)).max() <= 1
        if place is None or not at_home or place.rival > MOST_RIVAL or place.correlation < LEAST_SELF:
            raise ConfigError(
                "The region shows too little structure in its reference image to be found in other images. Draw it "
                "around edges or print in two directions over a sharp image, or use align=none."
            )
        return found

    def place(self, image: NDArray[np.uint8]) -> Placement:
        """Return where an image (H, W, 3) shows the part.

        Raises:
            ImageError: the image has other proportions than the reference, is too long, or no position was found.
        """
        height, width = image.shape[:2]
        if not same_proportions((height, width), self._size):
            raise ImageError(
                f"has other proportions than the reference image of its region: {height} x {width} pixels (height x "
                f"width), and the reference has {self._size[0]} x {self._size[1]}. Give images of the same camera "
                "setting, or draw the region over such an image and train again."
            )
        if max(height, width) > LONGEST:
            raise ImageError(
                f"is too long to be aligned: {height} x {width} pixels (height x width), of {LONGEST:,} a side at "
                "most. Shrink it, or use a region with align=none."
            )
        cv = self._cv
        grey = cv.resize(cv.cvtColor(image, cv.COLOR_RGB2GRAY), self._size[::-1], interpolation=cv.INTER_AREA)
        found = self._find(grey)
        if found is None:
            raise ImageError(
                "does not show the part of the reference image of its region: no position was found. Check that the "
                "camera shows this product, in focus and not too dark."
            )
        correlation, matrix, rival = found
        centre = np.array([(self._size[1] - 1) / 2, (self._size[0] - 1) / 2, 1.0])
        shift = (matrix @ centre - centre[:2]) * [width / self._size[1], height / self._size[0]]
        degrees = _degrees(matrix) if self._rigid else 0.0
        placement = Placement(float(shift[0]), float(shift[1]), degrees, correlation, 1.0, rival)
        return placement._replace(overlap=self._overlap(matrix))

    def _structure(self, grey: NDArray[np.uint8], inside: NDArray[np.uint8] | None = None) -> NDArray[np.float32]:
        """Return the image (h, w) without its local brightness and contrast.

        Args:
            inside: (h, w) the pixels that count, 1 or 0; the others become 0. None: all.
        """
        sigma = LOCAL * max(grey.shape)
        weights = np.ones(grey.shape, dtype=np.float32) if inside is None else inside.astype(np.float32)
        total = self._cv.GaussianBlur(weights, (0, 0), sigma) + np.float32(1e-6)

        def around(values: NDArray[np.float32]) -> NDArray[np.float32]:
            return np.asarray(self._cv.GaussianBlur(values * weights, (0, 0), sigma) / total)

        values = grey.astype(np.float32)
        values = values - around(values)
        contrast = np.sqrt(around(values * values))
        return np.asarray(weights * values / (contrast + np.float32(NOISE)), dtype=np.float32)

    def _turned(self, coarse: NDArray[np.float32], inside: NDArray[np.float32], degrees: int) -> _Template:
        cv, (height, width) = self._cv, coarse.shape
        side = math.ceil(math.hypot(height, width)) + 2
        matrix = Placement((side - width) / 2, (side - height) / 2, degrees, 1, 1).matrix(height, width)
        turned = cv.warpAffine(inside, matrix, (side, side), flags=cv.INTER_NEAREST)
        rows, columns = (np.flatnonzero(turned.any(axis=axis)) for axis in (1, 0))
        box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
        pixels = cv.warpAffine(coarse, matrix, (side, side), flags=cv.INTER_LINEAR)
        matrix[:, 2] -= [columns[0], rows[0]]
        return _Template(degrees, np.ascontiguousarray(pixels[box]), np.ascontiguousarray(turned[box]), matrix)

    def _peaks(self, image: NDArray[np.float32]) -> list[_Peak]:
        """Return the best position of each template in the image (h, w), the best template first."""
        cv = self._cv
        coarse = cv.resize(image, self._coarse_size[::-1], interpolation=cv.INTER_AREA)
        margin = math.ceil(MOST_SHIFT * max(self._coarse_size))
        found: list[_Peak] = []
        for template in self._templates:
            down, right = (
                margin + max(0, own - side) for own, side in zip(template.pixels.shape, coarse.shape, strict=True)
            )
            padded = cv.copyMakeBorder(coarse, down, down, right, right, cv.BORDER_REPLICATE)
            match = cv.matchTemplate(padded, template.pixels, cv.TM_CCOEFF_NORMED, mask=template.inside)
            match = np.where(np.isfinite(match) & (np.abs(match) <= 1.001), match, -1.0)  # flat areas give others
            row, column = np.unravel_index(int(match.argmax()), match.shape)
            matrix = np.vstack([template.matrix, [0, 0, 1]])
            matrix[:2, 2] += [column - right, row - down]
            rows, columns = np.ogrid[: match.shape[0], : match.shape[1]]
            away = np.hypot(rows - row, columns - column) >= ANOTHER_PLACE * max(self._coarse_size)
            rival = float(match.max(initial=-1.0, where=away))
            found.append(_Peak(float(match[row, column]), template.degrees, matrix, rival))
        return sorted(found, key=lambda each: -each.correlation)  # stable

    def _candidates(self, peaks: Sequence[_Peak]) -> list[Matrix]:
        """Return the best transforms (3, 3) of the reference to an image (h, w); rotations that differ enough."""
        chosen: list[_Peak] = []
        for each in peaks:
            if all(abs(each.degrees - other.degrees) >= ANOTHER_ROTATION for other in chosen):
                chosen.append(each)
        scale = [own / side for own, side in zip(self._size, self._coarse_size, strict=True)]
        to_fine = np.array([[scale[1], 0, (scale[1] - 1) / 2], [0, scale[0], (scale[0] - 1) / 2], [0, 0, 1]])
        return [to_fine @ each.matrix @ np.linalg.inv(to_fine) for each in chosen[:BEST]]

    def _rival(self, peaks: Sequence[_Peak], correlation: float, degrees: float) -> float:
        """Return `Placement.rival`; `correlation` and `degrees` are those that were found."""
        best = peaks[0].correlation
        if best <= 0:
            return 1.0
        if not self._rigid:
            return 0.0 if correlation >= SURE_CORRELATION else max(0.0, peaks[0].rival / best)
        others = (each.correlation for each in peaks if abs(each.degrees - degrees) >= ANOTHER_ROTATION)
        return max(0.0, max(others, default=0.0) / best)

    def _find(self, grey: NDArray[np.uint8]) -> _Found | None:
        """Return where the part is in an image (h, w); None: no position."""
        image = self._structure(grey)
        peaks = self._peaks(image)
        found = [self._refined(image, self._reference, each) for each in self._candidates(peaks)]
        best = max((each for each in found if each is not None), key=lambda each: each[0], default=None)
        if best is None:
            return None
        # Once more with the pixels under the part alone, so that its surroundings do not move it.
        size = (grey.shape[1], grey.shape[0])
        under = self._cv.warpAffine(self._inside, best[1][:2], size, flags=self._cv.INTER_NEAREST)
        own = self._refined(self._structure(grey, under), self._part, best[1])
        if own is None or not self._near(own[1]):
            return None
        correlation, matrix = own
        return _Found(correlation, matrix[:2], self._rival(peaks, correlation, _degrees(matrix)))

    def _refined(
        self, image: NDArray[np.float32], reference: NDArray[np.float32], start: Matrix
    ) -> tuple[float, Matrix] | None:
        """Return the correlation and the transform (3, 3) that is refined from `start`; None: it does not converge."""
        cv = self._cv
        motion = cv.MOTION_EUCLIDEAN if self._rigid else cv.MOTION_TRANSLATION
        # OpenCV transforms its second image and the mask: the reference, so that the pixels under the part count.
        warp, correlation = self._rigid_inverse(start), math.nan
        try:
            for blur, steps in REFINED:
                criteria = (cv.TERM_CRITERIA_COUNT | cv.TERM_CRITERIA_EPS, steps, 1e-5)
                correlation, warp = cv.findTransformECC(image, reference, warp, motion, criteria, self._inside, blur)
        except cv.error:  # other pixels than those of the part
            return None
        if not math.isfinite(correlation):
            return None
        return float(correlation), np.linalg.inv(np.vstack([warp, [0, 0, 1]]).astype(np.float64))

    def _rigid_inverse(self, matrix: Matrix) -> NDArray[np.float32]:
        """Return the inverse of a transform (3, 3) as rotation and shift alone, (2, 3)."""
        inverse = np.linalg.inv(matrix)
        x, y = (self._size[1] - 1) / 2, (self._size[0] - 1) / 2
        centre = inverse @ [x, y, 1]
        angle = math.atan2(inverse[1, 0], inverse[0, 0]) if self._rigid else 0.0
        cos, sin = math.cos(angle), math.sin(angle)
        return np.array(
            [[cos, -sin, centre[0] - cos * x + sin * y], [sin, cos, centre[1] - sin * x - cos * y]], dtype=np.float32
        )

    def _near(self, matrix: Matrix) -> bool:
        """Return whether a transform (3, 3) moves and turns by what is allowed, and a little more."""
        centre = np.array([(self._size[1] - 1) / 2, (self._size[0] - 1) / 2, 1.0])
        moved = np.abs(matrix @ centre - centre).max()
        turned = abs(_degrees(matrix))
        # The rotation is around the centre of the image, so that the part itself may be moved by less than its shift.
        return bool(moved <= 2 * MOST_SHIFT * max(self._size) and turned <= MOST_DEGREES + DEGREES)

    def _overlap(self, matrix: Matrix) -> float:
        rows, columns = np.nonzero(self._inside)
        x, y = matrix @ np.stack([columns, rows, np.ones(len(rows))])
        height, width = self._size
        within = (x >= -0.5) & (x < width - 0.5) & (y >= -0.5) & (y < height - 0.5)
        return float(within.mean())


def to_reference(image: NDArray[np.uint8], placement: Placement | None) -> NDArray[np.uint8]:
    """Return an image (H, W, 3) as if it had been taken as the reference was; what lies beyond its edge is repeated."""
    if placement is None:
        return image
    cv, (height, width) = library(), image.shape[:2]
    moved: NDArray[np.uint8] = cv.warpAffine(
        image,
        placement.matrix(height, width),
        (width, height),
        flags=cv.INTER_LINEAR | cv.WARP_INVERSE_MAP,
        borderMode=cv.BORDER_REPLICATE,
    )
    return moved


def to_image(values: NDArray[Any], placement: Placement | None) -> NDArray[Any]:
    """Return values (H, W) in the frame of the reference as they lie in the image; booleans stay booleans.

    Beyond the edge of the reference, booleans are False and numbers are those of the edge.
    """
    if placement is None:
        return values
    cv, (height, width) = library(), values.shape
    boolean = values.dtype == np.bool_
    moved = cv.warpAffine(
        values.astype(np.uint8) if boolean else values,
        placement.matrix(height, width),
        (width, height),
        flags=cv.INTER_NEAREST if boolean else cv.INTER_LINEAR,
        borderMode=cv.BORDER_CONSTANT if boolean else cv.BORDER_REPLICATE,
    )
    return np.asarray(moved > 0 if boolean else moved)


def _degrees(matrix: Matrix) -> float:
    return math.degrees(math.atan2(matrix[1, 0], matrix[0, 0]))


def same_proportions(one: tuple[int, int], other: tuple[int, int]) -> bool:
    """Return whether images of two sizes (height, width) have the same proportions, as regions that follow need it."""
    return max(abs(a - b) for a, b in zip(_shrunk(*one), _shrunk(*other), strict=True)) <= 1


@lru_cache(maxsize=32)
def _shrunk(height: int, width: int) -> tuple[int, int]:
    """Return (height, width) with a longer side of at most `SIDE`."""
    scale = min(1.0, SIDE / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))
