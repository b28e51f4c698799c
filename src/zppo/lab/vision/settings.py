"""What the file of a world of pictures says [zppo]; `worlds/vision.yaml` is one to read beside this."""

from __future__ import annotations

from pydantic import Field, model_validator

from zppo.lab.settings import BeliefSettings, CorpusSettings, ModelShape, Part, Pretraining
from zppo.lab.vision.kinds import KINDS


class VisionShape(Part):
    """Size of the part of student and teacher that sees."""

    layers: int = Field(ge=1)
    width: int = Field(ge=8)
    heads: int = Field(ge=1)
    feed_forward: int = Field(ge=8)


class SightSettings(Part):
    """One kind of questions: the tier of beliefs that its words are of, and how many questions each split has."""

    tier: str
    train: int = Field(ge=0)
    test: int = Field(ge=0)

    @property
    def asked(self) -> bool:
        """Whether there are questions of the kind; where not, it is in the corpora alone."""
        return self.train + self.test > 0


class VisionSettings(Part):
    """A world of pictures.

    `beliefs`: what the corpus says about words of a tier; a tier without beliefs is known. `kinds`: the levels of the world.
    `seeing`, `describing`: how long the part that sees is trained, and the
    rest on descriptions, before student and teacher go on from there.
    """

    name: str
    seed: int
    misconceptions: int | None = None
    kinds: dict[str, SightSettings]
    beliefs: dict[str, BeliefSettings]
    corpus: CorpusSettings
    model: ModelShape
    vision: VisionShape
    seeing: Pretraining
    describing: Pretraining
    pretraining: Pretraining
    teacher: Pretraining

    @model_validator(mode="after")
    def _consistent(self) -> VisionSettings:
        if unknown := set(self.kinds) - set(KINDS):
            raise ValueError(f"kinds names {', '.join(sorted(unknown))}; known: {', '.join(KINDS)}")
        if set(self.corpus.levels) != set(self.kinds):
            raise ValueError(f"corpus.levels must weigh exactly the kinds {', '.join(sorted(self.kinds))}")
        if all(kind.asked for kind in self.kinds.values()):
            raise ValueError(
                "no kind is in the corpora alone (train: 0, test: 0): descriptions of pictures are learnt from one"
            )
        if missing := {kind.tier for kind in self.kinds.values()} - set(self.beliefs) - {"easy"}:
            raise ValueError(
                f"kinds name the tiers {', '.join(sorted(missing))}; beliefs has {', '.join(self.beliefs)}"
            )
        for name, kind in self.kinds.items():
            belief = self.beliefs.get(kind.tier)
            if belief is not None and len(belief.mistakes) >= len(KINDS[name].words):
                raise ValueError(
                    f"tier {kind.tier!r} has {len(belief.mistakes)} mistakes, and kind {name!r} only {len(KINDS[name].words)} words"
                )
        return self
