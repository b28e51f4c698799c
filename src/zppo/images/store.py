"""Image files: checked by their digest, decoded the same way everywhere, kept under it, and brought into pixel limits.

Files of images are hostile input: only common formats are decoded, no size is believed before it is checked, and what is broken is a
`DataError` that names the file. For a server a picture becomes a `data:` URL.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
import io
import math
import os
import secrets
import stat
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote_to_bytes

from PIL import ExifTags, Image, ImageFile, ImageOps

from zppo.core.types import ImageRef
from zppo.errors import DataError, StorageError, one_line
from zppo.names import POINTER, is_pointer

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
"""What is decoded; others of PIL's start programs of their own, or are rarely used."""
MOST_PIXELS = 1 << 26
"""A larger picture is refused: 8,192 by 8,192, 200 MB when decoded, 51 times what a model is shown at most."""
MOST_BYTES = 1 << 28
"""A larger file is refused unread."""
MOST_STRETCHED = 200
"""The longer side by the shorter; image processors of the Qwen family refuse more."""

_SHOWN = 40  # characters of a URL that an error repeats
_PNG_END = b"IEND\xaeB`\x82"
_JPEG_END = b"\xff\xd9"
_16_BIT = ("I;16", "I;16L", "I;16B", "I;16N", "I")


class Header(NamedTuple):
    """What the first bytes of an image say: PIL's name of the format, and the size in pixels as stored."""

    format: str
    width: int
    height: int
    media_type: str


def cache_folder() -> Path:
    """Where images are kept that came without a file: `ZPPO_CACHE`/images, or zppo/images in the user's cache folder."""
    own = os.environ.get("ZPPO_CACHE")
    if own:
        return Path(own).expanduser() / "images"
    users = os.environ.get("XDG_CACHE_HOME")
    return (Path(users) if users else Path.home() / ".cache") / "zppo" / "images"


def reference(path: Path) -> tuple[ImageRef, bytes]:
    """How to refer to a file as it is now, and its bytes. DataError where it cannot be read."""
    data = _read(path)
    return ImageRef(str(path), hashlib.sha256(data).hexdigest()), data


def read_bytes(ref: ImageRef) -> bytes:
    """The bytes behind a reference.

    Raises:
        DataError: the file is gone, cannot be read, or is not the one that was referred to.
    """
    data = _read(Path(ref.uri))
    if hashlib.sha256(data).hexdigest() != ref.sha256:
        raise DataError(
            f"the image {ref.uri} is not the one that the questions were read with (SHA-256 {ref.sha256[:12]}... then): put the old file "
            "back, or start a new run"
        )
    return data


def open_image(ref: ImageRef) -> Image.Image:
    """The picture as every model sees it: RGB, transparency on white, turned as its EXIF data says, the first frame of several.

    Raises:
        DataError: see `read_bytes` and `decode`.
    """
    return decode(read_bytes(ref), ref.uri)


def open_file(path: Path) -> Image.Image:
    """The picture in a file as it is now, where no digest of it is known. DataError as in `open_image`."""
    return decode(_read(path), str(path))


def as_url(data: bytes, media_type: str) -> str:
    """Bytes as a `data:` URL."""
    return f"data:{media_type};base64,{base64.b64encode(data).decode('ascii')}"


def data_of(url: str) -> bytes:
    """The bytes in a `data:` URL. DataError where it is none."""
    head, comma, body = url.partition(",")
    try:
        if not comma:
            raise ValueError("it has no comma")
        if not head.lower().endswith(";base64"):
            return unquote_to_bytes(body)
        return base64.b64decode("".join(body.split()), validate=True)
    except (ValueError, binascii.Error) as error:
        raise DataError(
            f"the image {url[:_SHOWN]!r}... is no data: URL that can be read ({error}); write data:image/png;base64,..."
        ) from error


def header_of(data: bytes, name: str) -> Header:
    """What an image's header says, without decoding it.

    Args:
        data: the whole file.
        name: for messages.

    Raises:
        DataError: it is no image of a format that is read, or its size is out of bounds.
    """
    with _opened(data, name) as image:
        return _header(image, name)


def check_whole(data: bytes, name: str) -> None:
    """Looks at an image's header and at its end, and decodes it only where the end is not as it should be (0.1 ms, not 10).

    Raises:
        DataError: see `decode`; damage in the middle is not seen.
    """
    header = header_of(data, name)
    whole = {
        "PNG": data.endswith(_PNG_END),
        "JPEG": data.endswith(_JPEG_END),
        "GIF": data.endswith(b";"),
        "WEBP": len(data) >= 8 + int.from_bytes(data[4:8], "little"),
    }
    if not whole.get(header.format, False):
        decode(data, name)


def decode(data: bytes, name: str) -> Image.Image:
    """The picture in a file's bytes: RGB, transparency on white, EXIF orientation applied, the first frame of several.

    16-bit grey values keep their upper 8 bits; CMYK and palettes become RGB.

    Raises:
        DataError: it is no image of a format that is read, it is too large, or it is broken.
    """
    with _opened(data, name) as image:
        _header(image, name)
        try:
            image.load()
            return rgb(image)
        except Exception as error:  # decoders fail in many ways
            raise DataError(f"the image {name} is broken: {one_line(error)}; replace it, or leave it out") from error


def rgb(image: Image.Image) -> Image.Image:
    """A decoded picture in RGB: transparency on white, EXIF orientation applied. ValueError where its values are no colours."""
    with contextlib.suppress(Exception):  # one whose EXIF data is broken stays as it is, as viewers show it
        image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ValueError("its values are floating-point numbers, with no brightness that they stand for")
    if image.mode in _16_BIT:
        image = image.convert("I").point(lambda value: value * (1 / 256) + 0).convert("L")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        paper = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(paper, image).convert("RGB")
    return image.convert("RGB")


def keep(data: bytes, folder: Path) -> ImageRef:
    """Writes an image under the name of its digest, unless it is there, and refers to it; several processes may do so at once.

    Raises:
        DataError: it is no usable image by its header.
        StorageError: it cannot be written.
    """
    digest = hashlib.sha256(data).hexdigest()
    header = header_of(data, f"with the SHA-256 {digest[:12]}...")
    path = (folder / digest[:2] / f"{digest}.{header.media_type.rpartition('/')[2]}").absolute()
    try:
        if not path.is_file() or path.stat().st_size != len(data):
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f"{path.name}.{secrets.token_hex(8)}.partial")
            try:
                partial.write_bytes(data)
                partial.replace(path)
            finally:
                partial.unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(
            f"{path} cannot be written ({error.strerror or error}): images without a file are kept there; make space, or name another "
            "folder with ZPPO_CACHE"
        ) from error
    return ImageRef(str(path), digest)


def _read(path: Path) -> bytes:
    try:
        facts = path.stat()
        if not stat.S_ISREG(facts.st_mode):  # a device or a pipe may never end
            raise ValueError("it is no file")
        if facts.st_size > MOST_BYTES:
            raise DataError(f"the image {path} has more than {MOST_BYTES >> 20} MiB; make it smaller")
        return path.read_bytes()
    except (OSError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"the image {path} cannot be read ({reason}): put the file back, or leave it out") from error


def _opened(data: bytes, name: str) -> ImageFile.ImageFile:
    if not data:
        raise DataError(f"the image {name} is empty (0 bytes); replace it, or leave it out")
    if is_pointer(data):
        raise DataError(f"the image {name} {POINTER}")
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise _too_large(name, one_line(error)) from error
    except Exception as error:  # plug-ins fail in many ways on broken headers; a bomb may be a warning that is an error
        raise DataError(
            f"the image {name} is no image that can be read ({', '.join(FORMATS)} are), or its header is broken; "
            "convert it, or leave it out"
        ) from error


def _header(image: ImageFile.ImageFile, name: str) -> Header:
    width, height = image.size
    if width * height > MOST_PIXELS:
        raise _too_large(name, f"it has {width:,} x {height:,} pixels")
    if min(width, height) < 1 or max(width, height) > MOST_STRETCHED * min(width, height):
        raise DataError(
            f"the image {name} has {width:,} x {height:,} pixels, and its longer side may be {MOST_STRETCHED} times the shorter one; "
            "crop it, or leave it out"
        )
    return Header(str(image.format), width, height, str(image.get_format_mimetype()))


def _too_large(name: str, why: str) -> DataError:
    return DataError(f"the image {name} is too large ({why}; {MOST_PIXELS:,} pixels at most); make it smaller")


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
