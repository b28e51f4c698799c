"""Small images for tests, as files have them."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image


def picture(size: tuple[int, int] = (8, 6), colour: object = (255, 0, 0), mode: str = "RGB", kind: str = "PNG", **more: object) -> bytes:
    """A picture of one colour as a file's bytes."""
    out = io.BytesIO()
    Image.new(mode, size, colour).save(out, kind, **more)  # type: ignore[arg-type]
    return out.getvalue()


def noise(size: tuple[int, int], seed: int = 0, kind: str = "PNG") -> bytes:
    """A picture that does not compress."""
    out = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(out, kind)
    return out.getvalue()


def save(path: Path, colour: object = (255, 0, 0), size: tuple[int, int] = (8, 6)) -> Path:
    """A picture of one colour in a PNG file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(picture(size, colour))
    return path


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that claims a size."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")
