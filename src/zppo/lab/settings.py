"""What a world file says [zppo]. `worlds/unreachable.yaml` is one to read beside this."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Part(BaseModel):
    """A section of a world file: frozen, and nothing in it that is not known."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Affine(Part):
    """value -> times * value + plus, modulo the number of values."""

    times: int = 1
    plus: int = 0


class BeliefSettings(Part):
    """How the corpus answers the entries of a tier: `right` is a range of probabilities, `mistakes` are shares of the rest."""

    right: tuple[float, float]
    mistakes: tuple[float, ...] = Field(min_length=2)

    @model_validator(mode="after")
    def _probabilities(self) -> BeliefSettings:
        low, high = self.right
        if not 0 <= low <= high <= 1:
            raise ValueError(f"right is {list(self.right)}: write a range of probabilities, the lower one first")
        if min(self.mistakes) < 0 or sum(self.mistakes) > 1 + 1e-9:
            raise ValueError(
                f"mistakes are {list(self.mistakes)}: their shares must not be negative nor add up to more than 1"
            )
        return self


class LevelSettings(Part):
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


class CorpusSettings(Part):
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


class ModelShape(Part):
    """Size of student and teacher."""

    layers: int = Field(ge=1)
    width: int = Field(ge=8)
    heads: int = Field(ge=1)
    feed_forward: int = Field(ge=8)


class Pretraining(Part):
    """Length of a pretraining run; `batch` is in documents. `compression`: share of compression documents (teacher only)."""

    steps: int = Field(ge=1)
    batch: int = Field(ge=1)
    learning_rate: float = Field(gt=0)
    compression: float = Field(0.0, ge=0, le=1)


class WorldSettings(Part):
    """A world file.

    `like`, in a file: another bundled world that everything left out, also within a section, is taken from. `misconceptions`: seed of
    what the student wrongly believes, the world's `seed` by default; two worlds that differ in it alone hold the same truth, so one
    teacher serves both. `unseen`: operations that the split `seen` leaves out, and that the split `study` asks about all the same.
    """

    name: str
    seed: int
    misconceptions: int | None = None
    values: tuple[str, ...]
    operations: dict[str, dict[str, Affine | Literal["permutation"]]]
    beliefs: dict[str, BeliefSettings]
    levels: tuple[LevelSettings, ...]
    corpus: CorpusSettings
    model: ModelShape
    pretraining: Pretraining
    teacher: Pretraining
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
                    raise ValueError(
                        f"level {level.name!r} names tier {tier!r}; operations has {', '.join(self.operations)}"
                    )
            if level.unlikeliest and level.tiers[0] not in self.beliefs:
                raise ValueError(
                    f"level {level.name!r} asks for the unlikeliest entries of tier {level.tiers[0]!r}, which has no beliefs"
                )
        if missing := set(self.unseen) - set(names):
            raise ValueError(f"unseen names {', '.join(sorted(missing))}; operations has {', '.join(names)}")
        levels = {level.name for level in self.levels}
        if set(self.corpus.levels) != levels:
            raise ValueError(f"corpus.levels must weigh exactly the levels {', '.join(sorted(levels))}")
        if unknown := set(self.beliefs) - set(self.operations):
            raise ValueError(f"beliefs about {', '.join(sorted(unknown))}; operations has {', '.join(self.operations)}")
        return self
