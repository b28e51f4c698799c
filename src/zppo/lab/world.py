"""A lab world of text: operations on a few named values, what a student wrongly believes about them, and questions [zppo].

A question is a chain of two operations on a start value; its answer names every operation and every value on the way. A world is
data: one settings file in `worlds/` (`unreachable.yaml` has comments), or one of your own. For studies there are questions outside the
training distribution: operations that training leaves out, longer chains, the same questions in other words, and other skills
(`zppo.lab.families`).
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
    """How the corpus answers the entries of a tier: `right` is a range of probabilities, `mistakes` are shares of the rest. `share`: of the
    tier's entries; the others are known (a teacher's beliefs alone)."""

    right: tuple[float, float]
    mistakes: tuple[float, ...] = Field(min_length=2)
    share: float = Field(1.0, ge=0, le=1)

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


class TextCorpusSettings(CorpusSettings):
    """Of a world of text. `dialect`: share of plain documents that are in the world's dialect; `hint`: share of all documents that show a
    hint."""

    dialect: float = Field(0.0, ge=0, le=1)
    hint: float = Field(0.0, ge=0, le=1)


class ModelShape(WorldSection):
    """Size of student and teacher, or of their vision tower."""

    layers: int = Field(ge=1)
    width: int = Field(ge=8)
    heads: int = Field(ge=1)
    feed_forward: int = Field(ge=8)


class Pretraining(WorldSection):
    """Length of a pretraining run; `batch` is in documents. `compression`: share of compression documents (teacher only); `tokens`: padded
    tokens of one forward and backward, documents of like length share one."""

    steps: int = Field(ge=1)
    batch: int = Field(ge=1)
    learning_rate: float = Field(gt=0)
    compression: float = Field(0.0, ge=0, le=1)
    tokens: int = Field(2048, ge=1)


class Writing(WorldSection):
    """How a question is worded and thoughts are written; by default as tersely as can be.

    `question` holds {start} and {operations}; `join` stands between operations, the last one comes first where `reversed`. Thoughts are
    `opening` ({start}), then `step` for every operation ({operation}, {value} before it, {result}), of which the result is the last word.
    """

    question: str = "{start} {operations} ?"
    join: str = ""
    reversed: bool = False
    opening: str = ""
    step: str = "{result}"

    @property
    def words(self) -> tuple[str, ...]:
        """Its own words."""
        texts = (self.question, self.join, self.opening, self.step)
        return tuple(word for text in texts for word in text.split() if not word.startswith("{"))

    @property
    def mark(self) -> str | None:
        """The word before every result; None where thoughts are results alone."""
        before = self.step.split("{result}")[0].split()
        return before[-1] if before else None


TERSE = Writing()


class FamilySettings(WorldSection):
    """A family of skills that no training question asks for; `kind`: `zppo.lab.families.KINDS`.

    `length`: of its questions, in values or operations, from and to. `tier`: of the operations, for chains. `share`: of the student's
    documents; `teacher`: of the teacher's. `test`: how many held-out questions; they stand in no document.
    """

    kind: Literal["chains", "sort", "count", "copy"]
    length: tuple[int, int]
    tier: str = ""
    share: float = Field(ge=0, le=1)
    teacher: float = Field(0.0, ge=0, le=1)
    test: int = Field(ge=1)


class ChainTeacherSettings(Pretraining):
    """A teacher of a world of text: its pretraining, and how it differs from the student.

    `model`: its size, the student's by default; `writing`: of its thoughts; `beliefs`: what it errs about, by tier; `hints`: share of
    documents that turn a response into a hint.
    """

    model: ModelShape | None = None
    writing: Writing | None = None
    beliefs: dict[str, BeliefSettings] = {}
    hints: float = Field(0.0, ge=0, le=1)


class AnyWorldSettings(WorldSection):
    """What the file of every world holds.

    `misconceptions`: seed of what student and teacher wrongly believe, the world's `seed` by default; two worlds that differ in it alone
    hold the same truth, so the teacher of one serves the other. `beliefs`: what the corpus says about a tier; a tier without beliefs is
    known.
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
    split `seen` leaves out, and that the split `study` asks about all the same. `dialect`: a second writing of the student's; `families`:
    what else it can do.
    """

    values: tuple[str, ...]
    operations: dict[str, dict[str, Affine | Literal["permutation"]]]
    levels: tuple[LevelSettings, ...]
    unseen: tuple[str, ...] = ()
    dialect: Writing | None = None
    families: dict[str, FamilySettings] = {}
    corpus: TextCorpusSettings
    teacher: ChainTeacherSettings

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
        if unknown := {*self.beliefs, *self.teacher.beliefs} - set(self.operations):
            raise ValueError(f"beliefs about {', '.join(sorted(unknown))}; operations has {', '.join(self.operations)}")
        for name, family in self.families.items():
            if (family.kind == "chains") != (family.tier in self.operations):
                raise ValueError(f"family {name!r} names tier {family.tier!r}: one of {', '.join(self.operations)} for chains, else none")
        if self.corpus.dialect and self.dialect is None:
            raise ValueError("corpus.dialect asks for a dialect; write how it is worded under `dialect`")
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
        return self._mistakes(self.settings.beliefs, self.settings.misconception_seed)

    def _mistakes(self, beliefs: Mapping[str, BeliefSettings], seed: int, whose: str = "") -> dict[Entry, tuple[int, ...]]:
        made: dict[Entry, tuple[int, ...]] = {}
        for index, operation in enumerate(self.operations):
            belief = beliefs.get(operation.tier)
            if belief is None:
                continue
            for value in range(len(self.values)):
                if belief.share < 1 and keyed_random("lab", seed, f"{whose}share", operation.word, value).random() >= belief.share:
                    continue
                wrong = [v for v in range(len(self.values)) if v != operation.table[value]]
                rng = keyed_random("lab", seed, f"{whose}mistakes", operation.word, value)
                made[index, value] = tuple(rng.sample(wrong, len(belief.mistakes)))
        return made

    @cached_property
    def beliefs(self) -> dict[Entry, tuple[float, ...]]:
        """What the corpus says about every entry: a probability for each value as the result; sums to 1."""
        return self._beliefs(self.settings.beliefs, self.mistakes, self.settings.misconception_seed)

    @cached_property
    def teacher_beliefs(self) -> dict[Entry, tuple[float, ...]]:
        """What the teacher's corpus says about every entry."""
        beliefs, seed, whose = self.settings.teacher.beliefs, self.settings.misconception_seed, "teacher "
        return self._beliefs(beliefs, self._mistakes(beliefs, seed, whose), seed, whose)

    def _beliefs(
        self, beliefs: Mapping[str, BeliefSettings], mistakes: Mapping[Entry, tuple[int, ...]], seed: int, whose: str = ""
    ) -> dict[Entry, tuple[float, ...]]:
        made: dict[Entry, tuple[float, ...]] = {}
        for index, operation in enumerate(self.operations):
            for value in range(len(self.values)):
                wrong = mistakes.get((index, value))
                if wrong is None:
                    made[index, value] = tuple(float(v == operation.table[value]) for v in range(len(self.values)))
                    continue
                belief = beliefs[operation.tier]
                right = keyed_random("lab", seed, f"{whose}right", operation.word, value).uniform(*belief.right)
                rest = (1 - right) * (1 - sum(belief.mistakes)) / (len(self.values) - 1 - len(wrong))
                weights = [rest] * len(self.values)
                for mistake, share in zip(wrong, belief.mistakes, strict=True):
                    weights[mistake] = (1 - right) * share
                weights[operation.table[value]] = right
                made[index, value] = tuple(weights)
        return made

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
        """The chain with one more operation behind it, drawn from those of the levels without misconceptions."""
        asked = {tier for level in self.settings.levels for tier in level.tiers} - set(self.settings.beliefs)
        easy = [i for i, operation in enumerate(self.operations) if operation.tier in asked]
        return Chain(chain.start, (*chain.operations, rng.choice(easy)))

    def answer_text(self, chain: Chain, results: tuple[int, ...]) -> str:
        """Every operation with the value that it leads to: naming only values would let a chain of other operations be rewarded."""
        steps = zip(chain.operations, results, strict=True)
        return " ".join(f"{self.operations[i].word} {self.values[v]}" for i, v in steps)

    def summary_text(self, chain: Chain, results: tuple[int, ...]) -> str:
        """Steps and box, as the teacher writes a compressed candidate."""
        return f"{' '.join(self.values[v] for v in results)} \\boxed{{ {self.answer_text(chain, results)} }}"

    def completion_text(self, chain: Chain, results: tuple[int, ...], writing: Writing = TERSE) -> str:
        """What a student or the teacher writes."""
        words = [self.operations[i].word for i in chain.operations]
        before = [self.values[v] for v in (chain.start, *results)]
        steps = [
            writing.step.format(operation=word, value=value, result=self.values[result])
            for word, value, result in zip(words, before, results, strict=False)
        ]
        opening = [writing.opening.format(start=before[0])] if writing.opening else []
        return f"<think> {' '.join([*opening, *steps])} </think> \\boxed{{ {self.answer_text(chain, results)} }}"

    def question_text(self, chain: Chain, writing: Writing = TERSE) -> str:
        """The words that ask for a chain."""
        words = [self.operations[i].word for i in chain.operations]
        join = f" {writing.join} " if writing.join else " "
        return writing.question.format(start=self.values[chain.start], operations=join.join(words[::-1] if writing.reversed else words))

    def question(self, chain: Chain, level: str = "", writing: Writing = TERSE) -> Question:
        """The question that asks for a chain; its id is its tersest text."""
        text = self.question_text(chain, writing)
        name = "-".join([self.name, level, *self.question_text(chain).replace("→", "").split()[:-1]])
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


UNSEEN, LONGER, DIALECT, REWORDED = "unseen", "longer", "dialect", "reworded"


def seen(world: World, questions: Iterable[Question]) -> list[Question]:
    """The questions in which no operation of the world's `unseen` occurs."""
    return [q for q in questions if not _asks_unseen(world, q)]


def study(world: World, questions: Sequence[Question]) -> list[Question]:
    """Held-out questions by what a run on `seen` could know about them.

    The levels of the world hold questions about operations that training asks about. Level `unseen` holds the others: the student met
    their operations in pretraining, with its misconceptions, and in no training question. Level `longer` holds every second question
    that is not easy, with one more easy operation behind it: chains of three, where training has chains of two. A student whose corpus
    has no chains of three either (`corpus.longer: 0`) answers every one with two steps. Where the world has a dialect, `dialect` holds the
    easy questions in its words, `reworded` every other one of those that are not easy.
    """
    inside = seen(world, questions)
    outside = [replace(q, level=UNSEEN) for q in questions if _asks_unseen(world, q)]
    chains = [chain_of(world, q) for q in inside]
    hard = [chain for chain in chains if not set(world.settings.beliefs).isdisjoint(world.tiers(chain))]
    longer = []
    for chain in hard[::2]:
        rng = keyed_random("lab", world.settings.seed, LONGER, chain.start, *chain.operations)
        longer.append(world.question(world.lengthened(chain, rng), LONGER))
    dialect = []
    if (writing := world.settings.dialect) is not None:
        dialect = [world.question(chain, DIALECT, writing) for chain in chains if chain not in hard]
        dialect += [world.question(chain, REWORDED, writing) for chain in hard[1::2]]
    return [*inside, *outside, *longer, *dialect]


def chain_of(world: World, question: Question, writing: Writing = TERSE) -> Chain:
    """The chain that a question of the world asks for, from its text in a writing."""
    said = set(writing.words)
    start, *operations = [word for word in question.messages[-1].content.split() if word not in said]
    if writing.question.find("{start}") > writing.question.find("{operations}"):
        start, operations = operations[-1], [start, *operations[:-1]]
    words = [operation.word for operation in world.operations]
    in_order = operations[::-1] if writing.reversed else operations
    return Chain(world.values.index(start), tuple(words.index(word) for word in in_order))


def _asks_unseen(world: World, question: Question) -> bool:
    left_out = {operation_word(name) for name in world.settings.unseen}
    return not left_out.isdisjoint(question.messages[-1].content.split())
