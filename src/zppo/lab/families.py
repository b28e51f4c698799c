"""Skills of a student besides the chains that training asks about: what RL on one family does to the others [zppo].

Every answer begins with an arrowed word, as in chains: no symbolic comparison reads it as a product of letters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from zppo.core.draws import keyed_random
from zppo.core.types import Message, Question
from zppo.errors import SettingsError
from zppo.lab.world import Chain, FamilySettings, World, operation_word

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")

DRAWS = 4  # times as many as are asked for, until that many differ


@dataclass(frozen=True, slots=True)
class Exercise:
    """One question of a family with its right thoughts and answer."""

    question: str
    thought: str
    answer: str

    @property
    def completion(self) -> str:
        return f"<think> {self.thought} </think> \\boxed{{ {self.answer} }}"


def _chains(world: World, family: FamilySettings, rng: Random) -> Exercise:
    """A chain of operations of one tier, all of them known."""
    chain = Chain(rng.randrange(len(world.values)), tuple(rng.choice(world.tier(family.tier)) for _ in range(rng.randint(*family.length))))
    results = world.truth(chain)
    return Exercise(world.question_text(chain), " ".join(world.values[v] for v in results), world.answer_text(chain, results))


def _sort(world: World, family: FamilySettings, rng: Random) -> Exercise:
    """Different values into the order of the world's list."""
    shown = rng.sample(range(len(world.values)), rng.randint(*family.length))
    written, ordered = (" ".join(world.values[v] for v in values) for values in (shown, sorted(shown)))
    return Exercise(f"sort→ {written} ?", ordered, f"sort→ {ordered}")


def _count(world: World, family: FamilySettings, rng: Random) -> Exercise:
    """How often a value occurs among a few that occur at least once; the thought counts along."""
    kinds = rng.sample(world.values, 3)
    shown = [rng.choice(kinds) for _ in range(rng.randint(*family.length))]
    asked = rng.choice(shown)
    along = [NUMBERS[shown[: i + 1].count(asked)] for i in range(len(shown))]
    return Exercise(f"count→ {asked} of {' '.join(shown)} ?", " ".join(along), f"count→ {along[-1]}")


def _copy(world: World, family: FamilySettings, rng: Random) -> Exercise:
    """Values as they stand, but for one."""
    shown = [rng.choice(world.values) for _ in range(rng.randint(*family.length))]
    at, other = rng.randrange(len(shown)), rng.choice(world.values)
    changed = " ".join([*shown[:at], other, *shown[at + 1 :]])
    return Exercise(f"copy→ {' '.join(shown)} then {ORDINALS[at]} is {other} ?", changed, f"copy→ {changed}")


KINDS: dict[str, Callable[[World, FamilySettings, Random], Exercise]] = {"chains": _chains, "sort": _sort, "count": _count, "copy": _copy}


def family_words(world: World) -> list[str]:
    """The words of a world's families that are neither its values nor its operations, in a fixed order."""
    kinds = {family.kind for family in world.settings.families.values()} - {"chains"}
    own = [operation_word(kind) for kind in sorted(kinds)]
    longest = max((family.length[1] for family in world.settings.families.values() if family.kind != "chains"), default=0)
    count = ["of", *NUMBERS[: longest + 1]] if "count" in kinds else []
    copy = ["then", "is", *ORDINALS[:longest]] if "copy" in kinds else []
    return [*own, *count, *copy]


def held_out_exercises(world: World) -> dict[str, list[Exercise]]:
    """The held-out questions of every family, all different."""
    made = {}
    for name, family in world.settings.families.items():
        rng = keyed_random("lab", world.settings.seed, "family", name)
        drawn = (KINDS[family.kind](world, family, rng) for _ in range(DRAWS * family.test))
        found = list({exercise.question: exercise for exercise in drawn}.values())[: family.test]
        if len(found) < family.test:
            raise SettingsError(f"world {world.name!r}, family {name!r}: it has {len(found)} questions; ask for fewer than {family.test}")
        made[name] = found
    return made


def family_questions(world: World) -> list[Question]:
    """The held-out questions of a world's families; the level is the family."""
    return [
        Question(f"{world.name}-{name}-{i:03d}", (Message("user", exercise.question),), exercise.answer, level=name)
        for name, exercises in held_out_exercises(world).items()
        for i, exercise in enumerate(exercises, 1)
    ]


class FamilyDraws:
    """Draws exercises for documents, by given weights of families, and never a held-out one."""

    def __init__(self, world: World, weights: dict[str, float]) -> None:
        self.world, self.weights = world, {name: weight for name, weight in weights.items() if weight}
        self._held_out = {exercise.question for exercises in held_out_exercises(world).values() for exercise in exercises}

    @property
    def share(self) -> float:
        """Of all documents."""
        return sum(self.weights.values())

    def draw(self, rng: Random) -> Exercise:
        """One exercise."""
        name = rng.choices(tuple(self.weights), tuple(self.weights.values()))[0]
        family = self.world.settings.families[name]
        while True:
            exercise = KINDS[family.kind](self.world, family, rng)
            if exercise.question not in self._held_out:
                return exercise
