"""A lab world of pictures: what its words mean, what a student wrongly takes them for, and its questions [zppo].

As in the worlds of text (`zppo.lab.world`) everything is a function of a settings file (`picture_worlds/vision.yaml` has comments). The
student is wrong about words: it takes one for another of its kind ("red" for "blue", "left" for "right") and reads the picture
accordingly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from random import Random

from pydantic import Field, model_validator

from zppo.config.recipe import parse_yaml
from zppo.core.draws import keyed_random
from zppo.core.types import ImageRef, Message, Question
from zppo.errors import SettingsError
from zppo.lab.pictures import KINDS, NOTHING, BarChart, Picture, PictureReading
from zppo.lab.world import AnyWorldSettings, ModelShape, Pretraining, WorldSection, read_world


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
    """A world made from its settings; everything in it is a function of them."""

    def __init__(self, settings: PictureWorldSettings) -> None:
        self.settings = settings

    @property
    def name(self) -> str:
        return self.settings.name

    @property
    def levels(self) -> tuple[str, ...]:
        """The kinds that there are questions of."""
        return tuple(name for name, kind in self.settings.kinds.items() if kind.asked)

    @cached_property
    def words(self) -> tuple[Word, ...]:
        """Every word of every kind."""
        return tuple((kind, word) for kind in self.settings.kinds for word in range(len(KINDS[kind].words)))

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
            picture, about = KINDS[kind].draw(rng)
            ask = Ask(kind, index, about, picture)
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
