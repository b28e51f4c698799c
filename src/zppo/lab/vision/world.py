"""A world of pictures: what its words mean, what a student wrongly takes them for, and its questions [zppo].

As in the worlds of text (`zppo.lab.world`) everything is a function of a settings file. What the student is wrong about are words: it takes
one for another of its kind ("red" for "blue", "left" for "right") and reads the picture accordingly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from random import Random

from pydantic import ValidationError

from zppo.config.recipe import parse_yaml
from zppo.core.draws import keyed_random
from zppo.core.types import ImageRef, Message, Question
from zppo.errors import SettingsError
from zppo.lab.vision.kinds import KINDS, NOTHING, Reading
from zppo.lab.vision.pictures import Chart, Picture
from zppo.lab.vision.settings import VisionSettings

WORLDS = Path(__file__).with_name("worlds")
PICTURE_SPLITS = ("train", "test")
Word = tuple[str, int]
"""A word of a kind: the kind's name, and the word by index."""
TRIES = 1000


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

    def read(self, meaning: int) -> Reading:
        """What is read off the picture under a meaning of the word."""
        return KINDS[self.kind].read(self.picture, self.about, meaning)

    @property
    def truth(self) -> Reading:
        return self.read(self.word)

    @property
    def layout(self) -> tuple[object, ...]:
        """What is asked about what, wherever in its cell a shape is."""
        if isinstance(self.picture, Chart):
            return self.text, self.picture.bars
        return self.text, tuple(thing and (thing.colour, thing.shape) for thing in self.picture.cells)


class VisionWorld:
    """A world made from its settings; everything in it is a function of them."""

    def __init__(self, settings: VisionSettings) -> None:
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
        mind = self.settings.seed if self.settings.misconceptions is None else self.settings.misconceptions
        for kind, sight in self.settings.kinds.items():
            if (belief := self.settings.beliefs.get(sight.tier)) is None:
                continue
            size = len(KINDS[kind].words)
            circle = list(range(size))
            rng = keyed_random("lab", mind, "mistakes", kind)
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
        return answer not in ("0", NOTHING) and all(
            ask.read(wrong).answer != answer for wrong in self.mistakes[ask.kind, ask.word]
        )

    def asks(self) -> dict[str, list[Ask]]:
        """The questions of both splits, kind by kind, the words of a kind in turn; no question is in both."""
        made: dict[str, list[Ask]] = {split: [] for split in PICTURE_SPLITS}
        for kind, sight in self.settings.kinds.items():
            seen: set[tuple[object, ...]] = set()
            for split, count in (
                ("test", sight.test),
                ("train", sight.train),
            ):  # what is held out does not hang on how much is not
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


def completion_text(reading: Reading) -> str:
    """What a student or the teacher writes."""
    return " ".join(["<think>", *reading.thought, "</think>", "\\boxed{", reading.answer, "}"])


def sees(name: str) -> bool:
    """Whether the name, or the settings file, is that of a world of pictures."""
    if not name.endswith((".yaml", ".yml")):
        return (WORLDS / f"{name}.yaml").is_file()
    try:
        written = parse_yaml(Path(name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False  # the worlds of text say what is wrong with it
    return isinstance(written, dict) and "kinds" in written


@lru_cache(maxsize=8)
def load_vision_world(name: str) -> VisionWorld:
    """A bundled world of pictures by name, or one of your own by the path of its settings file.

    Raises:
        SettingsError: no such world, or its file is wrong.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else WORLDS / f"{name}.yaml"
    try:
        written = parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        known = ", ".join(sorted(p.stem for p in WORLDS.glob("*.yaml")))
        raise SettingsError(f"there is no world of pictures {name!r} ({path}); use one of {known}") from error
    except ValueError as error:
        raise SettingsError(f"{path}: {error}") from error
    try:
        return VisionWorld(VisionSettings.model_validate(written))
    except ValidationError as error:
        raise SettingsError(f"{path}: {error}") from error
