"""The lab's pictures: coloured shapes on a grid of three by three, or three bars [zppo].

They are drawn without a library, so that their bytes never change.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from functools import lru_cache
from random import Random

import numpy as np
from numpy.typing import NDArray

COLOURS = {
    "red": (214, 39, 40),
    "green": (44, 160, 44),
    "blue": (31, 90, 200),
    "yellow": (240, 200, 20),
    "purple": (150, 60, 190),
}
SHAPES = ("circle", "square", "triangle", "cross")
SIDE = 3  # cells of the grid on a side
CELLS = tuple(f"{column}{row}" for row in (1, 2, 3) for column in "abc")
"""Names of the cells, row by row from the top."""
CELL = 16  # pixels of a cell on a side
SIZE = SIDE * CELL
"""Pixels of a picture on a side."""
SHAPE = 10  # pixels of a shape on a side
SHIFTS = CELL - SHAPE  # a shape may begin this far into its cell, less one, from either edge
TALLEST = 5  # steps of the tallest bar
STEP = SIZE // TALLEST
BAR = 10  # pixels of a bar's width
PAPER = (250, 250, 250)
PALETTE = np.array([PAPER, *COLOURS.values()], dtype=np.uint8)  # (K, 3)


@dataclass(frozen=True, slots=True)
class Thing:
    """A coloured shape by index, and how far from its cell's corner it begins, in pixels (x, y)."""

    colour: int
    shape: int
    shift: tuple[int, int]

    @property
    def words(self) -> str:
        return f"{tuple(COLOURS)[self.colour]} {SHAPES[self.shape]}"


@dataclass(frozen=True, slots=True)
class Scene:
    """Shapes on the grid, cell by cell in the order of `CELLS`; no two are alike."""

    cells: tuple[Thing | None, ...]


@dataclass(frozen=True, slots=True)
class Chart:
    """Bars from left to right: colour by index, and height in steps. No colour and no height occurs twice."""

    bars: tuple[tuple[int, int], ...]


Picture = Scene | Chart


def draw_scene(rng: Random) -> Scene:
    """Five to eight different things, each anywhere."""
    kinds = rng.sample(range(len(COLOURS) * len(SHAPES)), rng.randint(5, 8))
    cells: list[Thing | None] = [None] * len(CELLS)
    for cell, kind in zip(rng.sample(range(len(CELLS)), len(kinds)), kinds, strict=True):
        shift = (rng.randint(1, SHIFTS - 1), rng.randint(1, SHIFTS - 1))
        cells[cell] = Thing(kind // len(SHAPES), kind % len(SHAPES), shift)
    return Scene(tuple(cells))


def draw_chart(rng: Random) -> Chart:
    """Three bars of different colours and heights."""
    colours = rng.sample(range(len(COLOURS)), SIDE)
    heights = rng.sample(range(1, TALLEST + 1), SIDE)
    return Chart(tuple(zip(colours, heights, strict=True)))


def pixels(picture: Picture) -> NDArray[np.uint8]:
    """The picture as indices into `PALETTE`, (SIZE, SIZE), row by row from the top."""
    canvas = np.zeros((SIZE, SIZE), dtype=np.uint8)
    if isinstance(picture, Chart):
        for column, (colour, height) in enumerate(picture.bars):
            left = column * CELL + (CELL - BAR) // 2
            canvas[SIZE - height * STEP :, left : left + BAR] = colour + 1
        return canvas
    for cell, thing in enumerate(picture.cells):
        if thing is not None:
            x, y = cell % SIDE * CELL + thing.shift[0], cell // SIDE * CELL + thing.shift[1]
            canvas[y : y + SHAPE, x : x + SHAPE][_mask(thing.shape)] = thing.colour + 1
    return canvas


def rgb(picture: Picture) -> NDArray[np.uint8]:
    """The picture as colours, (SIZE, SIZE, 3)."""
    shown: NDArray[np.uint8] = PALETTE[pixels(picture)]
    return shown


@lru_cache(maxsize=len(SHAPES))
def _mask(shape: int) -> NDArray[np.bool_]:
    """Which pixels of its square a shape covers, (SHAPE, SHAPE)."""
    y, x = np.mgrid[0:SHAPE, 0:SHAPE] * 2 - (SHAPE - 1)  # odd numbers around the middle
    masks: dict[str, NDArray[np.bool_]] = {
        "circle": x * x + y * y <= SHAPE * SHAPE,
        "square": np.ones((SHAPE, SHAPE), dtype=bool),
        "triangle": 2 * abs(x) <= y + SHAPE + 1,
        "cross": (abs(x) <= 2) | (abs(y) <= 2),
    }
    return masks[SHAPES[shape]]


def png(picture: Picture) -> bytes:
    """The picture as a PNG file with a palette, the same bytes everywhere: nothing is compressed, so no version of zlib has a say."""
    indices = pixels(picture)
    packed = indices[:, 0::2] << 4 | indices[:, 1::2]  # two pixels a byte
    lines = b"".join(b"\x00" + line.tobytes() for line in packed)  # no filter
    stored = b"\x01" + struct.pack("<HH", len(lines), len(lines) ^ 0xFFFF) + lines  # one block, the last
    data = b"\x78\x01" + stored + struct.pack(">I", zlib.adler32(lines))
    header = struct.pack(">IIBBBBB", SIZE, SIZE, 4, 3, 0, 0, 0)
    parts = ((b"IHDR", header), (b"PLTE", PALETTE.tobytes()), (b"IDAT", data), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(name, body) for name, body in parts)


def _chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
