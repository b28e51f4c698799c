"""The images of a question on a page: small copies as data URIs."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from zppo.core.types import ImageRef
from zppo.errors import DataError
from zppo.images.store import as_url, open_file, open_image

SIDES = (640, 320, 160)
"""Pixels of the longer side; the smaller ones where there is little room."""
_LOSSLESS = 4096  # bytes; drawings and tiny pictures are small as PNG, and blurred as JPEG


def with_images(story: Mapping[str, Any], most_bytes: int | None = None) -> dict[str, Any]:
    """The story with its images as data URIs, small enough for a page; one that cannot be read, or that is not the file that the
    model saw, is named instead. Runs from before there were digests are shown what is there now.

    Args:
        most_bytes: that all of them may take together, as far as smaller copies help; None for no limit.
    """
    pictures = [_read(path, digest) for path, digest in zip(story["images"], _digests(story), strict=True)]
    for side in SIDES:
        shown = [_shown(path, found, side) for path, found in zip(story["images"], pictures, strict=True)]
        if most_bytes is None or sum(len(image.get("data", "")) for image in shown) <= most_bytes:
            break
    return {name: value for name, value in story.items() if name != "image_sha256"} | {"images": shown}


def _digests(story: Mapping[str, Any]) -> list[str]:
    """SHA-256 of every image, "" where it is not known."""
    known = list(story.get("image_sha256") or ())
    return known if len(known) == len(story["images"]) else [""] * len(story["images"])


def _read(path: str, digest: str) -> Image.Image | str:
    """The picture, or why there is none."""
    try:
        picture = open_image(ImageRef(path, digest)) if digest else open_file(Path(path))
    except DataError as error:
        cause = str(error).removeprefix(f"the image {path} ")
        return re.split(r"[:;] (?:put|replace|convert|crop|make) ", cause)[0]
    picture.thumbnail((SIDES[0], SIDES[0]))
    return picture


def _shown(path: str, found: Image.Image | str, side: int) -> dict[str, str]:
    if isinstance(found, str):
        return {"path": path, "missing": found}
    picture = found.copy()
    picture.thumbnail((side, side))
    return {"path": path, "data": as_url(*_smallest(picture))}


def _smallest(picture: Image.Image) -> tuple[bytes, str]:
    """Bytes and media type."""
    out = io.BytesIO()
    picture.save(out, "PNG")
    if out.tell() <= _LOSSLESS:
        return out.getvalue(), "image/png"
    out = io.BytesIO()
    picture.save(out, "JPEG", quality=80)
    return out.getvalue(), "image/jpeg"
