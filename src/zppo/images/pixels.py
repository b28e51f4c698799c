"""How large a picture is, and how large it is shown to a model."""

from __future__ import annotations

import io
import math
from typing import NamedTuple

from PIL import ExifTags, Image

from zppo.core.types import ImageRef
from zppo.images.store import header_of, read_bytes

_TURNED = (5, 6, 7, 8)  # values of EXIF's orientation that exchange width and height


class PixelLimits(NamedTuple):
    """Fewest and most pixels of a picture as a model sees it; the defaults are the paper's (method.md section 10)."""

    min_pixels: int = 256 * 32 * 32
    max_pixels: int = 1280 * 32 * 32


def shown_size(ref: ImageRef) -> tuple[int, int]:
    """Width and height of the picture that `open_image` gives, from the file's header alone: nothing is decoded.

    Raises:
        DataError: see `read_bytes` and `header_of`.
    """
    data = read_bytes(ref)
    header = header_of(data, ref.uri)
    try:
        with Image.open(io.BytesIO(data)) as image:
            turned = image.getexif().get(ExifTags.Base.Orientation) in _TURNED
    except Exception:  # broken EXIF data turns nothing
        turned = False
    return (header.height, header.width) if turned else (header.width, header.height)


def fitted_size(width: int, height: int, limits: PixelLimits) -> tuple[int, int]:
    """Width and height within the limits, the aspect kept as well as whole pixels can; unchanged where they are within already."""
    pixels = width * height
    if pixels > limits.max_pixels:
        scale = math.sqrt(limits.max_pixels / pixels)
        return max(1, math.floor(width * scale)), max(1, math.floor(height * scale))
    if pixels < limits.min_pixels:
        scale = math.sqrt(limits.min_pixels / pixels)
        return math.ceil(width * scale), math.ceil(height * scale)
    return width, height


def fit(image: Image.Image, limits: PixelLimits) -> Image.Image:
    """The picture scaled into the limits, both sides alike, bicubic; itself where nothing is to be done."""
    size = fitted_size(*image.size, limits)
    return image if size == image.size else image.resize(size, Image.Resampling.BICUBIC)
