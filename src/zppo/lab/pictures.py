"""The lab's pictures, coloured shapes on a grid of three by three or three bars, and the kinds of questions about them [zppo].

Pictures are drawn without a library, so that their bytes never change. A kind of questions says what is asked, and what is read off a
picture under each meaning that a word could have: every question has one word that carries its meaning ("red" in "count red ?"). The words
of a kind are also its meanings: meaning number i is what word number i truly says. A student that takes a word for another one's meaning
reads the picture well and answers another question.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from random import Random

import numpy as np
from numpy.typing import NDArray

COLOURS = {"red": (214, 39, 40), "green": (44, 160, 44), "blue": (31, 90, 200), "yellow": (240, 200, 20), "purple": (150, 60, 190)}
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
class BarChart:
    """Bars from left to right: colour by index, and height in steps. No colour and no height occurs twice."""

    bars: tuple[tuple[int, int], ...]


Picture = Scene | BarChart


def draw_scene(rng: Random) -> Scene:
    """Five to eight different things, each anywhere."""
    kinds = rng.sample(range(len(COLOURS) * len(SHAPES)), rng.randint(5, 8))
    cells: list[Thing | None] = [None] * len(CELLS)
    for cell, kind in zip(rng.sample(range(len(CELLS)), len(kinds)), kinds, strict=True):
        shift = (rng.randint(1, SHIFTS - 1), rng.randint(1, SHIFTS - 1))
        cells[cell] = Thing(kind // len(SHAPES), kind % len(SHAPES), shift)
    return Scene(tuple(cells))


def draw_chart(rng: Random) -> BarChart:
    """Three bars of different colours and heights."""
    colours = rng.sample(range(len(COLOURS)), SIDE)
    heights = rng.sample(range(1, TALLEST + 1), SIDE)
    return BarChart(tuple(zip(colours, heights, strict=True)))


def pixels(picture: Picture) -> NDArray[np.uint8]:
    """The picture as indices into `PALETTE`, (SIZE, SIZE), row by row from the top."""
    canvas = np.zeros((SIZE, SIZE), dtype=np.uint8)
    if isinstance(picture, BarChart):
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
    """The picture as a PNG file with a palette, the same bytes everywhere: nothing is compressed, so zlib's version has no influence."""
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


NOTHING = "nothing"
COLOUR_WORDS = tuple(COLOURS)


@dataclass(frozen=True, slots=True)
class PictureReading:
    """What is thought and what is answered, both as words. The thought says first what the question is taken to mean, and then one thing
    after the other, each to be found from those before it."""

    thought: tuple[str, ...]
    answer: str


Draw = Callable[[Random], tuple[Picture, tuple[int, ...]]]
"""A picture, and what a question about it names in addition to its word, by index."""
Read = Callable[[Picture, tuple[int, ...], int], PictureReading]


@dataclass(frozen=True, slots=True)
class QuestionKind:
    """A kind of questions.

    Attributes:
        words: the words that carry the meaning.
        draw: a picture and the other things that a question names.
        text: the question, from word and things.
        read: thought and answer, from picture, things and meaning.
    """

    words: tuple[str, ...]
    draw: Draw
    text: Callable[[str, tuple[int, ...]], str]
    read: Read


def _things(picture: Picture) -> tuple[Thing | None, ...]:
    assert isinstance(picture, Scene)
    return picture.cells


def _bars(picture: Picture) -> tuple[tuple[int, int], ...]:
    assert isinstance(picture, BarChart)
    return picture.bars


def _any_scene(rng: Random) -> tuple[Picture, tuple[int, ...]]:
    return draw_scene(rng), ()


def _any_chart(rng: Random) -> tuple[Picture, tuple[int, ...]]:
    return draw_chart(rng), ()


def _scene_and_cell(rng: Random) -> tuple[Picture, tuple[int, ...]]:
    return draw_scene(rng), (rng.randrange(len(CELLS)),)


def _chart_and_pair(rng: Random) -> tuple[Picture, tuple[int, ...]]:
    """A chart and the colours of two of its bars."""
    chart = draw_chart(rng)
    return chart, tuple(colour for colour, _ in rng.sample(chart.bars, 2))


def _colour_at(picture: Picture, about: tuple[int, ...], cell: int) -> PictureReading:
    thing = _things(picture)[cell]
    seen = NOTHING if thing is None else COLOUR_WORDS[thing.colour]
    return PictureReading((CELLS[cell], seen), seen)


def _shape_at(picture: Picture, about: tuple[int, ...], cell: int) -> PictureReading:
    thing = _things(picture)[cell]
    seen = NOTHING if thing is None else SHAPES[thing.shape]
    return PictureReading((CELLS[cell], seen), seen)


def _count(picture: Picture, about: tuple[int, ...], colour: int) -> PictureReading:
    """Cell by cell with how many there have been so far."""
    thought, count = [COLOUR_WORDS[colour]], 0
    for cell, thing in zip(CELLS, _things(picture), strict=True):
        count += thing is not None and thing.colour == colour
        thought += [cell, str(count)]
    return PictureReading(tuple(thought), str(count))


DIRECTIONS: Mapping[str, tuple[int, int]] = {"left": (-1, 0), "right": (1, 0), "above": (0, -1), "below": (0, 1)}
"""Words and their steps on the grid (x, y)."""


def _neighbour(cell: int, step: tuple[int, int]) -> int | None:
    """The cell that is a step away, None outside of the picture."""
    x, y = cell % SIDE + step[0], cell // SIDE + step[1]
    return y * SIDE + x if 0 <= x < SIDE and 0 <= y < SIDE else None


def _beside(picture: Picture, about: tuple[int, ...], direction: int) -> PictureReading:
    (at,) = about
    word, step = tuple(DIRECTIONS.items())[direction]
    there = _neighbour(at, step)
    if there is None:
        return PictureReading((word, CELLS[at], NOTHING), NOTHING)
    thing = _things(picture)[there]
    seen = NOTHING if thing is None else thing.words
    return PictureReading((word, CELLS[at], CELLS[there], *seen.split()), seen)


def _height(picture: Picture, about: tuple[int, ...], colour: int) -> PictureReading:
    heights = dict(_bars(picture))
    seen = str(heights[colour]) if colour in heights else NOTHING
    return PictureReading((COLOUR_WORDS[colour], seen), seen)


RANKS = ("tallest", "middle", "shortest")


def _rank(picture: Picture, about: tuple[int, ...], rank: int) -> PictureReading:
    colour, height = sorted(_bars(picture), key=lambda bar: -bar[1])[rank]
    return PictureReading((RANKS[rank], str(height), COLOUR_WORDS[colour]), COLOUR_WORDS[colour])


PAIRINGS: Mapping[str, Callable[[int, int], int]] = {
    "sum": lambda a, b: a + b,
    "difference": lambda a, b: abs(a - b),
    "larger": max,
    "smaller": min,
}


def _pair(picture: Picture, about: tuple[int, ...], how: int) -> PictureReading:
    heights = dict(_bars(picture))
    word, result = tuple(PAIRINGS.items())[how]
    bars = [part for colour in about for part in (COLOUR_WORDS[colour], str(heights[colour]))]
    return PictureReading((word, *bars), str(result(*(heights[colour] for colour in about))))


def _describe(picture: Picture, about: tuple[int, ...], word: int) -> PictureReading:
    """All that there is, cell by cell; how many things that are is the answer."""
    things = _things(picture)
    seen = [(cell, NOTHING if thing is None else thing.words) for cell, thing in zip(CELLS, things, strict=True)]
    thought = [part for cell, words in seen for part in (cell, *words.split())]
    return PictureReading(tuple(thought), str(sum(thing is not None for thing in things)))


def _describe_bars(picture: Picture, about: tuple[int, ...], word: int) -> PictureReading:
    bars = _bars(picture)
    parts = [part for colour, height in bars for part in (COLOUR_WORDS[colour], str(height))]
    return PictureReading(("bars", *parts), str(len(bars)))


KINDS: Mapping[str, QuestionKind] = {
    "colour": QuestionKind(CELLS, _any_scene, lambda word, _: f"colour at {word} ?", _colour_at),
    "shape": QuestionKind(CELLS, _any_scene, lambda word, _: f"shape at {word} ?", _shape_at),
    "height": QuestionKind(COLOUR_WORDS, _any_chart, lambda word, _: f"height of {word} ?", _height),
    "rank": QuestionKind(RANKS, _any_chart, lambda word, _: f"{word} bar ?", _rank),
    "count": QuestionKind(COLOUR_WORDS, _any_scene, lambda word, _: f"count {word} ?", _count),
    "beside": QuestionKind(tuple(DIRECTIONS), _scene_and_cell, lambda word, about: f"{word} of {CELLS[about[0]]} ?", _beside),
    "pair": QuestionKind(
        tuple(PAIRINGS), _chart_and_pair, lambda word, about: f"{word} of {COLOUR_WORDS[about[0]]} {COLOUR_WORDS[about[1]]} ?", _pair
    ),
    "describe": QuestionKind(("all",), _any_scene, lambda word, _: f"describe {word} ?", _describe),
    "those": QuestionKind(COLOUR_WORDS, _any_scene, lambda word, _: f"describe {word} ?", _count),
    "bars": QuestionKind(("bars",), _any_chart, lambda word, _: f"describe {word} ?", _describe_bars),
}
"""All kinds by name."""


def cell_words(picture: Picture) -> list[tuple[str, str, str]]:
    """What lies in every cell, in three words: its name, and colour and shape of its thing; of a chart colour and height of its bar."""
    if isinstance(picture, BarChart):
        bars = [(COLOUR_WORDS[colour], str(height)) for colour, height in picture.bars]
        return [(name, *bars[cell % SIDE]) for cell, name in enumerate(CELLS)]
    things = [(COLOUR_WORDS[t.colour], SHAPES[t.shape]) if t else (NOTHING, NOTHING) for t in picture.cells]
    return [(name, *thing) for name, thing in zip(CELLS, things, strict=True)]


WORDS: tuple[str, ...] = tuple(
    dict.fromkeys(
        (
            *CELLS,
            *COLOUR_WORDS,
            *SHAPES,
            *(str(n) for n in range(2 * TALLEST + 1)),
            NOTHING,
            *(part for kind in KINDS.values() for word in kind.words for part in kind.text(word, (0, 0)).split()),
        )
    )
)
"""Every word of questions, thoughts and answers."""
