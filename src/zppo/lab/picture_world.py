"""A lab world of pictures: coloured shapes on a grid of three by three or three bars, and questions about them [zppo].

Pictures are drawn without a library, so that their bytes never change. A kind of questions says what is asked, and what is read off a
picture under each meaning that a word could have: every question has one word that carries its meaning ("red" in "count red ?"). The words
of a kind are also its meanings: meaning number i is what word number i truly says.

As in the worlds of text (`zppo.lab.world`) everything else is a function of a settings file (`picture_worlds/vision.yaml` has comments). A
student takes one word for another of its kind ("red" for "blue", "left" for "right"): it reads the picture well, for
another question.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from random import Random

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from zppo.config.recipe import parse_yaml
from zppo.core.draws import keyed_random
from zppo.core.types import ImageRef, Message, Question
from zppo.errors import SettingsError
from zppo.lab.world import AnyWorldSettings, ModelShape, Pretraining, WorldSection, read_world

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


@dataclass(frozen=True, slots=True)
class QuestionKind:
    """A kind of questions.

    Attributes:
        words: the words that carry the meaning.
        draw: a picture.
        text: the question, from its word and the other things that it names, by index.
        read: thought and answer, from picture, named things and meaning.
        named: draws the other things that a question about a picture names.
    """

    words: tuple[str, ...]
    draw: Callable[[Random], Picture]
    text: Callable[[str, tuple[int, ...]], str]
    read: Callable[[Picture, tuple[int, ...], int], PictureReading]
    named: Callable[[Picture, Random], tuple[int, ...]] = lambda picture, rng: ()


def _things(picture: Picture) -> tuple[Thing | None, ...]:
    assert isinstance(picture, Scene)
    return picture.cells


def _bars(picture: Picture) -> tuple[tuple[int, int], ...]:
    assert isinstance(picture, BarChart)
    return picture.bars


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


def _beside(picture: Picture, about: tuple[int, ...], direction: int) -> PictureReading:
    (at,) = about
    word, (right, down) = tuple(DIRECTIONS.items())[direction]
    x, y = at % SIDE + right, at // SIDE + down
    if not (0 <= x < SIDE and 0 <= y < SIDE):  # outside of the picture
        return PictureReading((word, CELLS[at], NOTHING), NOTHING)
    there = y * SIDE + x
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
    "colour": QuestionKind(CELLS, draw_scene, lambda word, _: f"colour at {word} ?", _colour_at),
    "shape": QuestionKind(CELLS, draw_scene, lambda word, _: f"shape at {word} ?", _shape_at),
    "height": QuestionKind(COLOUR_WORDS, draw_chart, lambda word, _: f"height of {word} ?", _height),
    "rank": QuestionKind(RANKS, draw_chart, lambda word, _: f"{word} bar ?", _rank),
    "count": QuestionKind(COLOUR_WORDS, draw_scene, lambda word, _: f"count {word} ?", _count),
    "beside": QuestionKind(
        tuple(DIRECTIONS),
        draw_scene,
        lambda word, about: f"{word} of {CELLS[about[0]]} ?",
        _beside,
        lambda picture, rng: (rng.randrange(len(CELLS)),),
    ),
    "pair": QuestionKind(
        tuple(PAIRINGS),
        draw_chart,
        lambda word, about: f"{word} of {COLOUR_WORDS[about[0]]} {COLOUR_WORDS[about[1]]} ?",
        _pair,
        lambda picture, rng: tuple(colour for colour, _ in rng.sample(_bars(picture), 2)),
    ),
    "describe": QuestionKind(("all",), draw_scene, lambda word, _: f"describe {word} ?", _describe),
    "those": QuestionKind(COLOUR_WORDS, draw_scene, lambda word, _: f"describe {word} ?", _count),
    "bars": QuestionKind(("bars",), draw_chart, lambda word, _: f"describe {word} ?", _describe_bars),
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


class QuestionKindSettings(WorldSection):
    """One kind of questions: the tier of beliefs that its words are of, and how many questions each split has."""

    tier: str
    train: int = Field(ge=0)
    test: int = Field(ge=0)

    @property
    def asked(self) -> bool:
        """Whether there are questions of the kind; where not, it is in the corpora alone."""
        return self.train + self.test > 0


class PictureWorldSettings(AnyWorldSettings):
    """The file of a world of pictures.

    `kinds`: the levels of the world. `seeing`, `describing`: how long the vision tower is trained, and the rest on descriptions, before
    student and teacher go on from there.
    """

    kinds: dict[str, QuestionKindSettings]
    vision: ModelShape
    seeing: Pretraining
    describing: Pretraining

    @model_validator(mode="after")
    def _consistent(self) -> PictureWorldSettings:
        if unknown := set(self.kinds) - set(KINDS):
            raise ValueError(f"kinds names {', '.join(sorted(unknown))}; known: {', '.join(KINDS)}")
        if set(self.corpus.levels) != set(self.kinds):
            raise ValueError(f"corpus.levels must weigh exactly the kinds {', '.join(sorted(self.kinds))}")
        if all(kind.asked for kind in self.kinds.values()):
            raise ValueError("no kind is in the corpora alone (train: 0, test: 0): descriptions of pictures are learnt from one")
        if missing := {kind.tier for kind in self.kinds.values()} - set(self.beliefs) - {"easy"}:
            raise ValueError(f"kinds name the tiers {', '.join(sorted(missing))}; beliefs has {', '.join(self.beliefs)}")
        for name, kind in self.kinds.items():
            belief = self.beliefs.get(kind.tier)
            if belief is not None and len(belief.mistakes) >= len(KINDS[name].words):
                raise ValueError(
                    f"tier {kind.tier!r} has {len(belief.mistakes)} mistakes, and kind {name!r} only {len(KINDS[name].words)} words"
                )
        return self


WORLDS = Path(__file__).with_name("picture_worlds")
PICTURE_SPLITS = ("train", "test")
Word = tuple[str, int]
"""A word of a kind: the kind's name, and the word by index."""
TRIES = 1000
MOST_THOUGHT = 6  # words of the thought that a compressed response keeps


@dataclass(frozen=True, slots=True)
class Ask:
    """A question before its words: a kind, its word, the other things it names (by index), and the picture."""

    kind: str
    word: int
    about: tuple[int, ...]
    picture: Picture

    @property
    def text(self) -> str:
        kind = KINDS[self.kind]
        return kind.text(kind.words[self.word], self.about)

    def read(self, meaning: int) -> PictureReading:
        """What is read off the picture under a meaning of the word."""
        return KINDS[self.kind].read(self.picture, self.about, meaning)

    @property
    def truth(self) -> PictureReading:
        return self.read(self.word)

    @property
    def layout(self) -> tuple[object, ...]:
        """What is asked about what, wherever in its cell a shape is."""
        if isinstance(self.picture, BarChart):
            return self.text, self.picture.bars
        return self.text, tuple(thing and (thing.colour, thing.shape) for thing in self.picture.cells)


class PictureWorld:
    """A world made from its settings; everything in it is a function of them.

    Attributes:
        levels: the kinds that there are questions of.
        words: every word of every kind.
    """

    def __init__(self, settings: PictureWorldSettings) -> None:
        self.settings, self.name = settings, settings.name
        self.levels = tuple(name for name, kind in settings.kinds.items() if kind.asked)
        self.words = tuple((kind, word) for kind in settings.kinds for word in range(len(KINDS[kind].words)))

    def known(self, kind: str) -> bool:
        """Whether the student knows what the words of a kind mean."""
        return self.settings.kinds[kind].tier not in self.settings.beliefs

    @cached_property
    def mistakes(self) -> Mapping[Word, tuple[int, ...]]:
        """The fixed wrong meanings of every word that the student is wrong about.

        Within a kind mistake number n of the words is a permutation of its meanings: every meaning is some word's for the student, so it
        knows how to read each one off a picture, and not that this is what the right word asks for.
        """
        made: dict[Word, tuple[int, ...]] = {}
        for kind, about in self.settings.kinds.items():
            if (belief := self.settings.beliefs.get(about.tier)) is None:
                continue
            size = len(KINDS[kind].words)
            circle = list(range(size))
            rng = keyed_random("lab", self.settings.misconception_seed, "mistakes", kind)
            rng.shuffle(circle)
            steps = rng.sample(range(1, size), len(belief.mistakes))
            for place, word in enumerate(circle):
                made[kind, word] = tuple(circle[(place + step) % size] for step in steps)
        return made

    def beliefs(self, word: Word) -> tuple[float, ...]:
        """What the corpus says about a word: a probability for each meaning; sums to 1."""
        kind, index = word
        size = len(KINDS[kind].words)
        belief = self.settings.beliefs.get(self.settings.kinds[kind].tier)
        if belief is None:
            return tuple(float(meaning == index) for meaning in range(size))
        wrong = self.mistakes[word]
        right = keyed_random("lab", self.settings.seed, "right", kind, index).uniform(*belief.right)
        others = size - 1 - len(wrong)
        rest = (1 - right) * (1 - sum(belief.mistakes)) / others if others else 0.0
        weights = [rest] * size
        for mistake, share in zip(wrong, belief.mistakes, strict=True):
            weights[mistake] = (1 - right) * share / (1.0 if others else sum(belief.mistakes))
        weights[index] = right
        return tuple(weights)

    def draw(self, kind: str, rng: Random, word: int | None = None) -> Ask:
        """A question of a kind. About a word that the student is wrong about: one that its mistakes do not answer rightly by luck,
        and whose answer is something."""
        index = rng.randrange(len(KINDS[kind].words)) if word is None else word
        for _ in range(TRIES):
            picture = KINDS[kind].draw(rng)
            ask = Ask(kind, index, KINDS[kind].named(picture, rng), picture)
            if self._telling(ask):
                return ask
        raise SettingsError(f"kind {kind!r}: no picture tells {KINDS[kind].words[index]!r} from its mistakes")

    def _telling(self, ask: Ask) -> bool:
        if self.known(ask.kind):
            return True
        answer = ask.truth.answer
        return answer not in ("0", NOTHING) and all(ask.read(wrong).answer != answer for wrong in self.mistakes[ask.kind, ask.word])

    def asks(self) -> dict[str, list[Ask]]:
        """The questions of both splits, kind by kind, the words of a kind in turn; no question is in both."""
        made: dict[str, list[Ask]] = {split: [] for split in PICTURE_SPLITS}
        for kind, about in self.settings.kinds.items():
            seen: set[tuple[object, ...]] = set()
            for split, count in (("test", about.test), ("train", about.train)):  # what is held out does not hang on how much is not
                rng, wanted = keyed_random("lab", self.settings.seed, "pictures", kind, split), len(made[split]) + count
                for turn in range(TRIES * count):
                    if len(made[split]) == wanted:
                        break
                    ask = self.draw(kind, rng, turn % len(KINDS[kind].words))
                    if ask.layout not in seen:
                        seen.add(ask.layout)
                        made[split].append(ask)
        return made

    def question(self, ask: Ask, name: str = "", images: tuple[ImageRef, ...] = ()) -> Question:
        """The question with its right answer; its kind is its level."""
        return Question(name, (Message("user", ask.text),), ask.truth.answer, images, level=ask.kind)

    # What is written about a picture depends on the reading alone; the corpora ask every world in the same way, with the question.
    def truth(self, ask: Ask) -> PictureReading:
        """What is read off the picture under the right meaning."""
        return ask.truth

    def answer_text(self, _: Ask, reading: PictureReading) -> str:
        return reading.answer

    def summary_text(self, _: Ask, reading: PictureReading) -> str:
        """The beginning of the thought and the box, as the teacher writes a compressed candidate."""
        return " ".join([*reading.thought[:MOST_THOUGHT], "\\boxed{", reading.answer, "}"])

    def completion_text(self, _: Ask, reading: PictureReading) -> str:
        """What a student or the teacher writes."""
        return " ".join(["<think>", *reading.thought, "</think>", "\\boxed{", reading.answer, "}"])


def is_picture_world(name: str) -> bool:
    """Whether the name, or the settings file, is that of a world of pictures."""
    if not name.endswith((".yaml", ".yml")):
        return (WORLDS / f"{name}.yaml").is_file()
    try:
        written = parse_yaml(Path(name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False  # `load_world` says what is wrong with it
    return isinstance(written, dict) and "kinds" in written


@lru_cache(maxsize=8)
def load_picture_world(name: str) -> PictureWorld:
    """A bundled world of pictures by name, or one of your own by the path of its settings file. Raises SettingsError, as `read_world`."""
    return read_world(name, WORLDS, lambda written: PictureWorld(PictureWorldSettings.model_validate(written)))
