"""Kinds of questions about pictures: what is asked, and what is read off a picture under each meaning that a word could have [zppo].

Every question has one word that carries its meaning ("red" in "count red ?"). The words of a kind are also its meanings: meaning number i
is what word number i truly says. A student that takes a word for another one's meaning reads the picture well and answers another question.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random

from zppo.lab.vision.pictures import (
    CELLS,
    COLOURS,
    SHAPES,
    SIDE,
    TALLEST,
    Chart,
    Picture,
    Scene,
    Thing,
    draw_chart,
    draw_scene,
)

NOTHING = "nothing"
COLOUR_WORDS = tuple(COLOURS)


@dataclass(frozen=True, slots=True)
class Reading:
    """What is thought and what is answered, both as words. The thought says first what the question is taken to mean, and then one thing
    after the other, each to be found from those before it."""

    thought: tuple[str, ...]
    answer: str


Draw = Callable[[Random], tuple[Picture, tuple[int, ...]]]
"""A picture, and what a question about it names besides its word, by index."""
Read = Callable[[Picture, tuple[int, ...], int], Reading]


@dataclass(frozen=True, slots=True)
class Kind:
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
    assert isinstance(picture, Chart)
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


def _colour_at(picture: Picture, about: tuple[int, ...], cell: int) -> Reading:
    thing = _things(picture)[cell]
    seen = NOTHING if thing is None else COLOUR_WORDS[thing.colour]
    return Reading((CELLS[cell], seen), seen)


def _shape_at(picture: Picture, about: tuple[int, ...], cell: int) -> Reading:
    thing = _things(picture)[cell]
    seen = NOTHING if thing is None else SHAPES[thing.shape]
    return Reading((CELLS[cell], seen), seen)


def _count(picture: Picture, about: tuple[int, ...], colour: int) -> Reading:
    """Cell by cell with how many there have been so far."""
    thought, count = [COLOUR_WORDS[colour]], 0
    for cell, thing in zip(CELLS, _things(picture), strict=True):
        count += thing is not None and thing.colour == colour
        thought += [cell, str(count)]
    return Reading(tuple(thought), str(count))


DIRECTIONS: Mapping[str, tuple[int, int]] = {"left": (-1, 0), "right": (1, 0), "above": (0, -1), "below": (0, 1)}
"""Words and their steps on the grid (x, y)."""


def _neighbour(cell: int, step: tuple[int, int]) -> int | None:
    """The cell that is a step away, None outside of the picture."""
    x, y = cell % SIDE + step[0], cell // SIDE + step[1]
    return y * SIDE + x if 0 <= x < SIDE and 0 <= y < SIDE else None


def _beside(picture: Picture, about: tuple[int, ...], direction: int) -> Reading:
    (at,) = about
    word, step = tuple(DIRECTIONS.items())[direction]
    there = _neighbour(at, step)
    if there is None:
        return Reading((word, CELLS[at], NOTHING), NOTHING)
    thing = _things(picture)[there]
    seen = NOTHING if thing is None else thing.words
    return Reading((word, CELLS[at], CELLS[there], *seen.split()), seen)


def _height(picture: Picture, about: tuple[int, ...], colour: int) -> Reading:
    heights = dict(_bars(picture))
    seen = str(heights[colour]) if colour in heights else NOTHING
    return Reading((COLOUR_WORDS[colour], seen), seen)


RANKS = ("tallest", "middle", "shortest")


def _rank(picture: Picture, about: tuple[int, ...], rank: int) -> Reading:
    colour, height = sorted(_bars(picture), key=lambda bar: -bar[1])[rank]
    return Reading((RANKS[rank], str(height), COLOUR_WORDS[colour]), COLOUR_WORDS[colour])


PAIRINGS: Mapping[str, Callable[[int, int], int]] = {
    "sum": lambda a, b: a + b,
    "difference": lambda a, b: abs(a - b),
    "larger": max,
    "smaller": min,
}


def _pair(picture: Picture, about: tuple[int, ...], how: int) -> Reading:
    heights = dict(_bars(picture))
    word, result = tuple(PAIRINGS.items())[how]
    bars = [part for colour in about for part in (COLOUR_WORDS[colour], str(heights[colour]))]
    return Reading((word, *bars), str(result(*(heights[colour] for colour in about))))


def _describe(picture: Picture, about: tuple[int, ...], word: int) -> Reading:
    """All that there is, cell by cell; how many things that are is the answer."""
    things = _things(picture)
    seen = [(cell, NOTHING if thing is None else thing.words) for cell, thing in zip(CELLS, things, strict=True)]
    thought = [part for cell, words in seen for part in (cell, *words.split())]
    return Reading(tuple(thought), str(sum(thing is not None for thing in things)))


def _describe_bars(picture: Picture, about: tuple[int, ...], word: int) -> Reading:
    bars = _bars(picture)
    parts = [part for colour, height in bars for part in (COLOUR_WORDS[colour], str(height))]
    return Reading(("bars", *parts), str(len(bars)))


KINDS: Mapping[str, Kind] = {
    "colour": Kind(CELLS, _any_scene, lambda word, _: f"colour at {word} ?", _colour_at),
    "shape": Kind(CELLS, _any_scene, lambda word, _: f"shape at {word} ?", _shape_at),
    "height": Kind(COLOUR_WORDS, _any_chart, lambda word, _: f"height of {word} ?", _height),
    "rank": Kind(RANKS, _any_chart, lambda word, _: f"{word} bar ?", _rank),
    "count": Kind(COLOUR_WORDS, _any_scene, lambda word, _: f"count {word} ?", _count),
    "beside": Kind(tuple(DIRECTIONS), _scene_and_cell, lambda word, about: f"{word} of {CELLS[about[0]]} ?", _beside),
    "pair": Kind(
        tuple(PAIRINGS),
        _chart_and_pair,
        lambda word, about: f"{word} of {COLOUR_WORDS[about[0]]} {COLOUR_WORDS[about[1]]} ?",
        _pair,
    ),
    "describe": Kind(("all",), _any_scene, lambda word, _: f"describe {word} ?", _describe),
    "those": Kind(COLOUR_WORDS, _any_scene, lambda word, _: f"describe {word} ?", _count),
    "bars": Kind(("bars",), _any_chart, lambda word, _: f"describe {word} ?", _describe_bars),
}
"""All kinds by name."""


def cell_words(picture: Picture) -> list[tuple[str, str, str]]:
    """What lies in every cell, in three words: its name, and colour and shape of its thing; of a chart colour and height of its bar."""
    if isinstance(picture, Chart):
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
