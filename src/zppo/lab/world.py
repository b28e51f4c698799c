"""A lab world: operations on a few named values, what a student wrongly believes about them, and questions [zppo].

A question is a chain of two operations on a start value; its answer names every operation and every value on the way. A world is
data: one settings file in `worlds/`, or one of your own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from random import Random
from typing import Literal

from pydantic import ValidationError

from zppo.config.recipe import parse_yaml
from zppo.core.draws import keyed_random
from zppo.core.types import Message, Question
from zppo.errors import SettingsError
from zppo.lab.settings import Affine, WorldSettings

WORLDS = Path(__file__).with_name("worlds")
Entry = tuple[int, int]
"""An operation and the value that it is applied to, by index."""


@dataclass(frozen=True, slots=True)
class Chain:
    """A start value and the operations that follow it, by index."""

    start: int
    operations: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation: `word` is how it is written, `table[value]` its right result."""

    word: str
    tier: str
    table: tuple[int, ...]


class World:
    """A world made from its settings; everything in it is a function of them."""

    def __init__(self, settings: WorldSettings) -> None:
        self.settings = settings
        self.values = settings.values
        self.operations = tuple(
            Operation(operation_word(name), tier, self._table(name, rule))
            for tier, rules in settings.operations.items()
            for name, rule in rules.items()
        )
        self.levels = {level.name: level for level in settings.levels}

    @property
    def name(self) -> str:
        return self.settings.name

    @property
    def _mind(self) -> int:
        """Seed of the student's misconceptions."""
        return self.settings.seed if self.settings.misconceptions is None else self.settings.misconceptions

    def _table(self, name: str, rule: Affine | Literal["permutation"]) -> tuple[int, ...]:
        size = len(self.settings.values)
        if isinstance(rule, Affine):
            return tuple((rule.times * value + rule.plus) % size for value in range(size))
        table = list(range(size))
        keyed_random("lab", self.settings.seed, "table", name).shuffle(table)
        return tuple(table)

    @cached_property
    def mistakes(self) -> dict[Entry, tuple[int, ...]]:
        """The fixed mistakes of every entry (operation, value) of a tier that has beliefs."""
        made: dict[Entry, tuple[int, ...]] = {}
        for index, operation in enumerate(self.operations):
            belief = self.settings.beliefs.get(operation.tier)
            if belief is None:
                continue
            for value in range(len(self.values)):
                wrong = [v for v in range(len(self.values)) if v != operation.table[value]]
                rng = keyed_random("lab", self._mind, "mistakes", operation.word, value)
                made[index, value] = tuple(rng.sample(wrong, len(belief.mistakes)))
        return made

    @cached_property
    def beliefs(self) -> dict[Entry, tuple[float, ...]]:
        """What the corpus says about every entry: a probability for each value as the result; sums to 1."""
        return {
            (index, value): self._belief(index, value)
            for index in range(len(self.operations))
            for value in range(len(self.values))
        }

    def _belief(self, index: int, value: int) -> tuple[float, ...]:
        operation = self.operations[index]
        belief = self.settings.beliefs.get(operation.tier)
        if belief is None:
            return tuple(float(v == operation.table[value]) for v in range(len(self.values)))
        rng = keyed_random("lab", self._mind, "right", operation.word, value)
        right = rng.uniform(*belief.right)
        wrong = self.mistakes[index, value]
        rest = (1 - right) * (1 - sum(belief.mistakes)) / (len(self.values) - 1 - len(wrong))
        weights = [rest] * len(self.values)
        for mistake, share in zip(wrong, belief.mistakes, strict=True):
            weights[mistake] = (1 - right) * share
        weights[operation.table[value]] = right
        return tuple(weights)

    def truth(self, chain: Chain) -> tuple[int, ...]:
        """The right value after each operation."""
        results: list[int] = []
        value = chain.start
        for index in chain.operations:
            value = self.operations[index].table[value]
            results.append(value)
        return tuple(results)

    def tier(self, name: str) -> tuple[int, ...]:
        """Indices of the operations of a tier."""
        return tuple(i for i, operation in enumerate(self.operations) if operation.tier == name)

    def tiers(self, chain: Chain) -> tuple[str, ...]:
        """The tier of each operation of a chain."""
        return tuple(self.operations[i].tier for i in chain.operations)

    def draw_chain(self, level: str, rng: Random) -> Chain:
        """A chain of a level, any entries, either order."""
        tiers = list(self.levels[level].tiers)
        rng.shuffle(tiers)
        return Chain(rng.randrange(len(self.values)), tuple(rng.choice(self.tier(tier)) for tier in tiers))

    def lengthened(self, chain: Chain, rng: Random) -> Chain:
        """The chain with one more operation behind it, drawn from those that nobody holds misconceptions about."""
        easy = [i for i, operation in enumerate(self.operations) if operation.tier not in self.settings.beliefs]
        return Chain(chain.start, (*chain.operations, rng.choice(easy)))

    def question_text(self, chain: Chain) -> str:
        return " ".join([self.values[chain.start], *(self.operations[i].word for i in chain.operations), "?"])

    def answer_text(self, chain: Chain, results: tuple[int, ...]) -> str:
        """Every operation with the value that it leads to: naming only values would let a chain of other operations be rewarded."""
        steps = zip(chain.operations, results, strict=True)
        return " ".join(f"{self.operations[i].word} {self.values[v]}" for i, v in steps)

    def summary_text(self, chain: Chain, results: tuple[int, ...]) -> str:
        """Steps and box, as the teacher writes a compressed candidate."""
        return f"{' '.join(self.values[v] for v in results)} \\boxed{{ {self.answer_text(chain, results)} }}"

    def completion_text(self, chain: Chain, results: tuple[int, ...]) -> str:
        """What a student or the teacher writes."""
        steps = " ".join(self.values[v] for v in results)
        return f"<think> {steps} </think> \\boxed{{ {self.answer_text(chain, results)} }}"

    def question(self, chain: Chain, level: str) -> Question:
        """The question that asks for a chain; its id is its text."""
        text = self.question_text(chain)
        name = "-".join([self.name, level, *text.replace("→", "").split()[:-1]])
        return Question(name, (Message("user", text),), self.answer_text(chain, self.truth(chain)), level=level)

    def questions(
        self, split: Literal["train", "test"], chosen: Mapping[str, Sequence[Entry]] | None = None
    ) -> list[Question]:
        """The questions of a split, level by level; `chosen` names the entries of levels that do not draw their own."""
        return [
            self.question(chain, name)
            for name in self.levels
            for chain in self.chains(name, (chosen or {}).get(name))[split]
        ]

    def entries(self, name: str) -> list[Entry]:
        """All entries of a level's first tier."""
        return [(index, value) for index in self.tier(self.levels[name].tiers[0]) for value in range(len(self.values))]

    def chains(self, name: str, chosen: Sequence[Entry] | None = None) -> dict[str, list[Chain]]:
        """Chains of a level by split: splits share entries and no chain.

        Every entry comes up in turn, its operation first and second in turn, so training sees either order of every entry.

        Args:
            chosen: the entries to ask about; by default as many as the level asks for are drawn.

        Raises:
            SettingsError: there are too few chains.
        """
        level = self.levels[name]
        rng = keyed_random("lab", self.settings.seed, "questions", name)
        about = {entry: self.chains_about(name, entry, rng) for entry in self.entries(name)}
        entries = chosen or rng.sample(sorted(about), min(level.entries or len(about), len(about)))
        chains = list(dict.fromkeys(_in_turn([about[entry] for entry in entries])))
        if len(chains) < level.train + level.test:
            raise SettingsError(
                f"world {self.name!r}, level {name!r}: {len(chains)} chains are too few for {level.train} training and "
                f"{level.test} test questions; raise `entries` or ask for fewer"
            )
        return {"train": chains[: level.train], "test": chains[level.train : level.train + level.test]}

    def chains_about(self, name: str, entry: Entry, rng: Random) -> list[Chain]:
        """Every chain of a level in which an entry of its first tier occurs, the entry's operation first and second in turn."""
        index, value = entry
        others = self.tier(self.levels[name].tiers[1])
        first = [Chain(value, (index, other)) for other in others]
        before = [
            (v, other) for other in others for v in range(len(self.values)) if self.operations[other].table[v] == value
        ]
        second = [Chain(v, (other, index)) for v, other in before]
        rng.shuffle(first)
        rng.shuffle(second)
        return _in_turn([first, second])


def _in_turn(lists: list[list[Chain]]) -> list[Chain]:
    """The first of every list, then the second of every list, and so on."""
    longest = max(map(len, lists), default=0)
    return [items[turn] for turn in range(longest) for items in lists if turn < len(items)]


def operation_word(name: str) -> str:
    """How an operation is written. The arrow keeps answers from being read as products of letters by a symbolic comparison."""
    return f"{name}→"


@lru_cache(maxsize=8)
def load_world(name: str) -> World:
    """A bundled world by name, or one of your own by the path of its settings file.

    Raises:
        SettingsError: no such world, or its file is wrong.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else WORLDS / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in WORLDS.glob("*.yaml")))
        raise SettingsError(
            f"there is no lab world {name!r} ({path}); use one of {known}, or the path of a settings file (.yaml)"
        )
    try:
        written = parse_yaml(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SettingsError(f"{path}: {error}") from error
    try:
        if isinstance(written, dict) and "like" in written:
            base = load_world(str(written.pop("like"))).settings.model_dump()
            written = base | {
                key: base[key] | value if isinstance(value, dict) and isinstance(base.get(key), dict) else value
                for key, value in written.items()
            }
        return World(WorldSettings.model_validate(written))
    except ValidationError as error:
        raise SettingsError(f"{path}: {error}") from error
