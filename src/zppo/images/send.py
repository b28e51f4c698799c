"""An image on its way to a server: within the pixel limits, as a `data:` URL."""

from __future__ import annotations

import io

from PIL import ExifTags, Image

from zppo.core.types import ImageRef
from zppo.images.pixels import PixelLimits, fit, fitted_size
from zppo.images.store import as_url, decode, header_of, read_bytes

_SENT_AS_IT_IS = {"PNG": ("RGB", "L"), "JPEG": ("RGB", "L")}
_QUALITY = 95


def request_url(ref: ImageRef, limits: PixelLimits) -> str:
    """The picture as every model of the run sees it, as a `data:` URL.

    A JPEG or PNG file that is within the limits goes as it is. Everything else is decoded (`images.store.decode`) and brought into the
    limits; it goes as a JPEG of quality 95 where it was one, else as a PNG.

    Raises:
        DataError: see `images.store.open_image`.
    """
    data = read_bytes(ref)
    header = header_of(data, ref.uri)
    size = header.width, header.height
    if fitted_size(*size, limits) == size and _plain(data):
        return as_url(data, header.media_type)
    picture = fit(decode(data, ref.uri), limits)
    kind = "JPEG" if header.format in ("JPEG", "MPO") else "PNG"
    out = io.BytesIO()
    picture.save(out, kind, **({"quality": _QUALITY} if kind == "JPEG" else {}))
    return as_url(out.getvalue(), f"image/{kind.lower()}")


def _plain(data: bytes) -> bool:
    """Whether every reader shows a file in the same way: one frame, upright, without transparency."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return (
                image.mode in _SENT_AS_IT_IS.get(str(image.format), ())
                and "transparency" not in image.info
                and getattr(image, "n_frames", 1) == 1
                and image.getexif().get(ExifTags.Base.Orientation, 1) == 1
            )
    except Exception:  # broken EXIF data
        return False
