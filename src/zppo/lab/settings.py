"""What a world file says (ours). `worlds/unreachable.yaml` is one to read beside this."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

EASY = "easy"


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Affine(_Part):
    """value -> times * value + plus, modulo the number of values."""

    times: int = 1
    plus: int = 0


class BeliefSettings(_Part):
    """How the corpus answers the entries of a tier: `right` is a range of probabilities, `mistakes` are shares of the rest."""

    right: tuple[float, float]
    mistakes: tuple[float, ...]


class LevelSettings(_Part):
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


class CorpusSettings(_Part):
    """What the student's pretraining corpus is made of: shares of document kinds, weights of levels.

    `flatten`: how far the choice among mistakes moves to an even one in candidate documents; `stray`: share of other wrong values there
    (never the right one); `slip`: share of candidates with one
    wrong easy step; `heed`: share of NCQ documents whose target is none of the listed wrong answers, where a mistake is left.
    """

    plain: float = Field(ge=0)
    bcq: float = Field(ge=0)
    ncq: float = Field(ge=0)
    flatten: float = Field(ge=0, le=1)
    stray: float = Field(0.0, ge=0, le=1)
    slip: float = Field(ge=0, le=1)
    heed: float = Field(ge=0, le=1)
    levels: dict[str, float]


class ModelShape(_Part):
    """Size of student and teacher."""

    layers: int = Field(ge=1)
    width: int = Field(ge=8)
    heads: int = Field(ge=1)
    feed_forward: int = Field(ge=8)


class Pretraining(_Part):
    """Length of a pretraining run; `batch` is in documents. `compression`: share of compression documents (teacher only)."""

    steps: int = Field(ge=1)
    batch: int = Field(ge=1)
    learning_rate: float = Field(gt=0)
    compression: float = Field(0.0, ge=0, le=1)


class WorldSettings(_Part):
    """A world file."""

    name: str
    seed: int
    values: tuple[str, ...]
    operations: dict[str, dict[str, Affine | Literal["permutation"]]]
    beliefs: dict[str, BeliefSettings]
    levels: tuple[LevelSettings, ...]
    corpus: CorpusSettings
    model: ModelShape
    pretraining: Pretraining
    teacher: Pretraining

    @model_validator(mode="after")
    def _consistent(self) -> WorldSettings:
        for level in self.levels:
            for tier in level.tiers:
                if tier not in self.operations:
                    raise ValueError(
                        f"level {level.name!r} names tier {tier!r}; operations has {', '.join(self.operations)}"
                    )
        names = {level.name for level in self.levels}
        if set(self.corpus.levels) != names:
            raise ValueError(f"corpus.levels must weigh exactly the levels {', '.join(sorted(names))}")
        if EASY in self.beliefs:
            raise ValueError("beliefs about tier 'easy': easy operations are known, leave the row out")
        return self
