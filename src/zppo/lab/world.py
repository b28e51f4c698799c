"""A lab world of text: operations on a few named values, what a student wrongly believes about them, and questions [zppo].

A question is a chain of two operations on a start value; its answer names every operation and every value on the way. A world is
data: one settings file in `worlds/` (`unreachable.yaml` has comments), or one of your own. For studies there are questions outside the
training distribution: operations that training leaves out, and longer chains.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from random import Random
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from zppo.config.recipe import parse_yaml
from zppo.core.draws import keyed_random
from zppo.core.types import Message, Question
from zppo.errors import SettingsError
from zppo.names import check_file


class WorldSection(BaseModel):
    """A section of a world file: frozen, and nothing in it that is not known."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Affine(WorldSection):
    """value -> times * value + plus, modulo the number of values."""

    times: int = 1
    plus: int = 0


class BeliefSettings(WorldSection):
    """How the corpus answers the entries of a tier: `right` is a range of probabilities, `mistakes` are shares of the rest."""

    right: tuple[float, float]
    mistakes: tuple[float, ...] = Field(min_length=2)

    @model_validator(mode="after")
    def _probabilities(self) -> BeliefSettings:
        low, high = self.right
        if not 0 <= low <= high <= 1:
            raise ValueError(f"right is {list(self.right)}: write a range of probabilities, the lower one first")
        if min(self.mistakes) < 0 or sum(self.mistakes) > 1 + 1e-9:
            raise ValueError(f"mistakes are {list(self.mistakes)}: their shares must not be negative nor add up to more than 1")
        return self


class LevelSettings(WorldSection):
    """Chains of one operation of each tier, in either order.

    `entries`: how many entries (operation, value) of the first tier are asked about, all by default; drawn at random, or the ones whose
    right result the pretrained student finds unlikeliest.
    """

    name: str
    tiers: tuple[str, str]
    train: int = Field(ge=1)
    test: int = Field(ge=1)
    entries: int | None = Field(None, ge=1)
    unlikeliest: bool = False


class CorpusSettings(WorldSection):
    """What the student's pretraining corpus is made of: shares of document kinds, weights of levels.

    `flatten`: how far the choice among mistakes moves to an even one in candidate documents; `stray`: share of other wrong values there
    (never the right one); `slip`: share of candidates with one wrong easy step; `longer`: share of plain documents with one more easy
    operation behind the chain; `heed`: share of NCQ documents whose target is none of the listed wrong answers, where a mistake is left.
    """

    plain: float = Field(ge=0)
    bcq: float = Field(ge=0)
    ncq: float = Field(ge=0)
    flatten: float = Field(ge=0, le=1)
    stray: float = Field(0.0, ge=0, le=1)
    slip: float = Field(ge=0, le=1)
    heed: float = Field(ge=0, le=1)
    longer: float = Field(0.0, ge=0, le=1)
    levels: dict[str, float]


class ModelShape(WorldSection):
    """Size of student and teacher, or of their vision tower."""

    layers: int = Field(ge=1)
    width: int = Field(ge=8)
    heads: int = Field(ge=1)
    feed_forward: int = Field(ge=8)


class Pretraining(WorldSection):
    """Length of a pretraining run; `batch` is in documents. `compression`: share of compression documents (teacher only)."""

    steps: int = Field(ge=1)
    batch: int = Field(ge=1)
    learning_rate: float = Field(gt=0)
    compression: float = Field(0.0, ge=0, le=1)


class AnyWorldSettings(WorldSection):
    """What the file of every world holds.

    `misconceptions`: seed of what the student wrongly believes, the world's `seed` by default; two worlds that differ in it alone hold the
    same truth, so one teacher serves both. `beliefs`: what the corpus says about a tier; a tier without beliefs is known.
    """

    name: str
    seed: int
    misconceptions: int | None = None
    beliefs: dict[str, BeliefSettings]
    corpus: CorpusSettings
    model: ModelShape
    pretraining: Pretraining
    teacher: Pretraining

    @property
    def misconception_seed(self) -> int:
        return self.seed if self.misconceptions is None else self.misconceptions


class WorldSettings(AnyWorldSettings):
    """The file of a world of text.

    `like`, in a file: another bundled world that everything left out, also within a section, is taken from. `unseen`: operations that the
    split `seen` leaves out, and that the split `study` asks about all the same.
    """

    values: tuple[str, ...]
    operations: dict[str, dict[str, Affine | Literal["permutation"]]]
    levels: tuple[LevelSettings, ...]
    unseen: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _consistent(self) -> WorldSettings:
        names = [name for tier in self.operations.values() for name in tier]
        for what, words in (("values", self.values), ("operations", tuple(names))):
            if len(set(words)) < len(words) or any(len(word.split()) != 1 for word in words):
                raise ValueError(f"{what} must be different single words: {', '.join(words)}")
        for level in self.levels:
            for tier in level.tiers:
                if tier not in self.operations:
                    raise ValueError(f"level {level.name!r} names tier {tier!r}; operations has {', '.join(self.operations)}")
            if level.unlikeliest and level.tiers[0] not in self.beliefs:
                raise ValueError(f"level {level.name!r} asks for the unlikeliest entries of tier {level.tiers[0]!r}, which has no beliefs")
        if missing := set(self.unseen) - set(names):
            raise ValueError(f"unseen names {', '.join(sorted(missing))}; operations has {', '.join(names)}")
        levels = {level.name for level in self.levels}
        if set(self.corpus.levels) != levels:
            raise ValueError(f"corpus.levels must weigh exactly the levels {', '.join(sorted(levels))}")
        if unknown := set(self.beliefs) - set(self.operations):
            raise ValueError(f"beliefs about {', '.join(sorted(unknown))}; operations has {', '.join(self.operations)}")
        return self


WorldLike = TypeVar("WorldLike")
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
        self.settings, self.name = settings, settings.name
        self.values = settings.values
        self.operations = tuple(
            Operation(operation_word(name), tier, self._table(name, rule))
            for tier, rules in settings.operations.items()
            for name, rule in rules.items()
        )
        self.levels = {level.name: level for level in settings.levels}

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
                rng = keyed_random("lab", self.settings.misconception_seed, "mistakes", operation.word, value)
                made[index, value] = tuple(rng.sample(wrong, len(belief.mistakes)))
        return made

    @cached_property
    def beliefs(self) -> dict[Entry, tuple[float, ...]]:
        """What the corpus says about every entry: a probability for each value as the result; sums to 1."""
        return {(index, value): self._belief(index, value) for index in range(len(self.operations)) for value in range(len(self.values))}

    def _belief(self, index: int, value: int) -> tuple[float, ...]:
        operation = self.operations[index]
        belief = self.settings.beliefs.get(operation.tier)
        if belief is None:
            return tuple(float(v == operation.table[value]) for v in range(len(self.values)))
        rng = keyed_random("lab", self.settings.misconception_seed, "right", operation.word, value)
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

    def draw(self, level: str, rng: Random) -> Chain:
        """A chain of a level, any entries, either order."""
        tiers = list(self.levels[level].tiers)
        rng.shuffle(tiers)
        return Chain(rng.randrange(len(self.values)), tuple(rng.choice(self.tier(tier)) for tier in tiers))

    def lengthened(self, chain: Chain, rng: Random) -> Chain:
        """The chain with one more operation behind it, drawn from those without misconceptions."""
        easy = [i for i, operation in enumerate(self.operations) if operation.tier not in self.settings.beliefs]
        return Chain(chain.start, (*chain.operations, rng.choice(easy)))

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

    def question(self, chain: Chain, level: str = "") -> Question:
        """The question that asks for a chain; its id is its text."""
        text = " ".join([self.values[chain.start], *(self.operations[i].word for i in chain.operations), "?"])
        name = "-".join([self.name, level, *text.replace("→", "").split()[:-1]])
        return Question(name, (Message("user", text),), self.answer_text(chain, self.truth(chain)), level=level)

    def questions(self, split: Literal["train", "test"], chosen: Mapping[str, Sequence[Entry]] | None = None) -> list[Question]:
        """The questions of a split, level by level; `chosen` names the entries of levels that do not draw their own."""
        return [self.question(chain, name) for name in self.levels for chain in self.chains(name, (chosen or {}).get(name))[split]]

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
        before = [(v, other) for other in others for v in range(len(self.values)) if self.operations[other].table[v] == value]
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


def read_world(name: str, folder: Path, make: Callable[[Any], WorldLike]) -> WorldLike:
    """What `make` makes of a settings file: the one of this name in a folder, or one of your own by its path.

    Raises:
        SettingsError: no such world, or its file is wrong.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else folder / f"{name}.yaml"
    check_file(path, SettingsError)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        known = ", ".join(sorted(p.stem for p in folder.glob("*.yaml")))
        raise SettingsError(
            f"there is no lab world {name!r} ({path}); use one of {known}, or the path of a settings file (.yaml)"
        ) from error
    try:
        written = parse_yaml(text)
    except ValueError as error:
        raise SettingsError(f"{path}: {error}") from error
    try:
        return make(written)
    except ValidationError as error:
        raise SettingsError(f"{path}: {error}") from error


@lru_cache(maxsize=8)
def load_world(name: str) -> World:
    """A bundled world of text by name, or one of your own by the path of its settings file. Raises SettingsError, as `read_world`."""

    def make(written: Any) -> World:
        if isinstance(written, dict) and "like" in written:
            base = load_world(str(written.pop("like"))).settings.model_dump()
            written = base | {
                key: base[key] | value if isinstance(value, dict) and isinstance(base.get(key), dict) else value
                for key, value in written.items()
            }
        return World(WorldSettings.model_validate(written))

    return read_world(name, WORLDS, make)


UNSEEN, LONGER = "unseen", "longer"


def seen(world: World, questions: Iterable[Question]) -> list[Question]:
    """The questions in which no operation of the world's `unseen` occurs."""
    return [q for q in questions if not _asks_unseen(world, q)]


def study(world: World, questions: Sequence[Question]) -> list[Question]:
    """Held-out questions by what a run on `seen` could know about them.

    The levels of the world hold questions about operations that training asks about. Level `unseen` holds the others: the student met
    their operations in pretraining, with its misconceptions, and in no training question. Level `longer` holds every second question
    that is not easy, with one more easy operation behind it: chains of three, where training has chains of two. A student whose corpus
    has no chains of three either (`corpus.longer: 0`) answers every one with two steps.
    """
    inside = seen(world, questions)
    outside = [replace(q, level=UNSEEN) for q in questions if _asks_unseen(world, q)]
    hard = [chain for q in inside if not set(world.settings.beliefs).isdisjoint(world.tiers(chain := chain_of(world, q)))]
    longer = []
    for chain in hard[::2]:
        rng = keyed_random("lab", world.settings.seed, LONGER, chain.start, *chain.operations)
        longer.append(world.question(world.lengthened(chain, rng), LONGER))
    return [*inside, *outside, *longer]


def chain_of(world: World, question: Question) -> Chain:
    """The chain that a question of the world asks for, from its text."""
    start, *operations, _ = question.messages[-1].content.split()
    words = [operation.word for operation in world.operations]
    return Chain(world.values.index(start), tuple(words.index(word) for word in operations))


def _asks_unseen(world: World, question: Question) -> bool:
    left_out = {operation_word(name) for name in world.settings.unseen}
    return not left_out.isdisjoint(question.messages[-1].content.split())
