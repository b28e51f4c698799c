"""The images of a row, in whatever form it has them -> references."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import unquote, urlsplit

from PIL import Image

from zppo.core.types import ImageRef
from zppo.errors import DataError, one_line
from zppo.images.store import cache_folder, check_whole, data_of, decode, keep, reference, rgb

FULLY_CHECKED = 256
"""So many images of a source are decoded when it is read, seconds at most; of the others header and end are looked at [zppo]."""

_KEYS = ("bytes", "path", "image", "url", "image_url")
_SHOWN = 60


class RowImages:
    """Makes references of the images of one source's rows.

    A file is referred to where it lies. What comes without one (bytes, `data:` URLs, PIL images) is written into the cache, so that
    questions, buffer, checkpoints and logs hold references alone.

    Args:
        cache: where images without a file are kept; `images.store.cache_folder()` for none.
    """

    def __init__(self, cache: Path | None = None) -> None:
        self._cache = cache
        self._known: dict[Path, ImageRef] = {}
        self._decoded: set[str] = set()

    def refer(self, value: object, folder: Path) -> tuple[ImageRef, ...]:
        """The images in a value: one or a list of paths, `file:` or `data:` URLs, bytes, `{"bytes", "path"}`, or PIL images.

        Args:
            value: of the images column; None and "" for no images.
            folder: what paths are relative to.

        Raises:
            DataError: it is none of these, or an image is missing or broken; the text goes behind the name of the row.
            StorageError: the cache cannot be written.
        """
        if value is None or value == "" or value == []:
            return ()
        if isinstance(value, str) and value.lstrip().startswith("["):
            value = _listed(value)
        items = value if isinstance(value, list | tuple) else [value]
        return tuple(self._one(item, folder) for item in items)

    def _one(self, item: object, folder: Path) -> ImageRef:
        if isinstance(item, Mapping):
            return self._one(_inner(item), folder)
        if isinstance(item, bytes | bytearray):
            return self._kept(bytes(item))
        if isinstance(item, Image.Image):
            return self._kept(_as_png(item))
        if not isinstance(item, str) or not item.strip():
            raise DataError(f"holds {_a(item)}; expected a path, bytes, a data: URL or an image, or a list of them")
        scheme = item.partition(":")[0].lower()
        if scheme in ("http", "https"):
            raise DataError(
                f"the image {_short(item)!r} is a web address, and nothing is downloaded while questions are read: download it first, and "
                "write its path"
            )
        if scheme == "data":
            return self._kept(data_of(item))
        return self._file(unquote(urlsplit(item).path) if item.startswith("file://") else item, folder)

    def _file(self, name: str, folder: Path) -> ImageRef:
        path = (folder / Path(name).expanduser()).absolute()
        if path not in self._known:
            try:
                ref, data = reference(path)
                self._check(data, ref)
            except DataError as error:
                if path.exists():
                    raise
                raise DataError(f"{error} (written {_short(name)!r}; paths are relative to the data file)") from error
            self._known[path] = ref
        return self._known[path]

    def _kept(self, data: bytes) -> ImageRef:
        ref = keep(data, self._cache or cache_folder())
        self._check(data, ref)
        return ref

    def _check(self, data: bytes, ref: ImageRef) -> None:
        if len(self._decoded) < FULLY_CHECKED and ref.sha256 not in self._decoded:
            decode(data, ref.uri)
            self._decoded.add(ref.sha256)
        else:
            check_whole(data, ref.uri)


def _listed(text: str) -> object:
    """A cell of a table that holds a JSON list; the text itself where it holds none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _inner(item: Mapping[object, object]) -> object:
    """What an object holds: the first of bytes, path, image, url and image_url that is not null."""
    found = next((item[key] for key in _KEYS if item.get(key) is not None), None)
    if found is None:
        raise DataError(f"holds an object without an image; expected one of the keys {', '.join(_KEYS)}")
    if isinstance(found, str) and item.get("bytes") is found:
        return f"data:;base64,{found}"  # JSON has no bytes
    return found


def _as_png(image: Image.Image) -> bytes:
    out = io.BytesIO()
    try:
        rgb(image).save(out, "PNG", compress_level=1)
    except Exception as error:  # it may be read from a broken file only now
        raise DataError(f"holds an image that is broken: {one_line(error)}; replace it, or leave it out") from error
    return out.getvalue()


def _short(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _a(value: object) -> str:
    return "null" if value is None else f"{type(value).__name__} {_short(repr(value))}"
