"""What `zppo lab ...` does; the command line calls these."""

from __future__ import annotations

from pathlib import Path

from transformers.utils import logging

from zppo.core.draws import keyed_random
from zppo.errors import SettingsError
from zppo.lab.build import Built, build
from zppo.lab.picture_build import build_vision
from zppo.lab.picture_world import VisionWorld, load_vision_world, sees
from zppo.lab.questions import lab_questions
from zppo.lab.world import World, load_world


def build_command(world: str, out: Path | None = None, seed: int = 0, steps: int | None = None, *, with_teacher: bool = True) -> None:
    """`zppo lab build WORLD [--out DIR --seed N --steps N --no-teacher]`: remakes student and teacher, prints what they can do.

    Args:
        world: a bundled world's name or the path of a settings file.
        out: gets the folders `student` and `teacher`; runs/lab/<world> by default.
        steps: pretraining steps of either model instead of the world's own.

    Raises:
        SettingsError: no such world; steps or seed out of range.
    """
    if steps is not None and steps < 1:
        raise SettingsError(f"--steps is {steps}: a model takes at least one step; leave it out for the world's own number")
    logging.disable_progress_bar()
    made = load_vision_world(world) if sees(world) else load_world(world)
    folder = out or Path("runs") / "lab" / made.name
    built = (
        build_vision(made, folder, seed, steps, _say, with_teacher=with_teacher)
        if isinstance(made, VisionWorld)
        else build(made, folder, seed, steps, _say, with_teacher=with_teacher)
    )
    for role, shares in (("student", built.student), ("teacher", built.teacher)) if with_teacher else (("student", built.student),):
        print(f"{role}: " + ", ".join(f"{level} {share:.1%}" for level, share in shares.items()) + " of the held-out questions")
    for level, hidden in (built.hidden if isinstance(built, Built) else {}).items():
        print(f"student, level {level}: probability of the right results mean {hidden.mean:.2g}, largest {hidden.largest:.2g}")
    if built.fidelity is not None:
        print(f"teacher: {built.fidelity:.1%} of answers survive its compression")
    print(f"written to {folder} in {built.seconds:.0f} s")


def questions_command(world: str, level: str | None = None, n: int = 5, split: str = "train", seed: int = 0) -> None:
    """`zppo lab questions --world W --level L --n N`: prints questions with their right answers.

    Args:
        level: name of a level, or its number from 1; None for all levels.
        split: train, test, seen or study; a world of pictures has the first two.
        seed: draws which ones.

    Raises:
        SettingsError: no such world, level or split; n below 1.
    """
    if n < 1:
        raise SettingsError(f"--n is {n}: ask for at least one question")
    made = load_vision_world(world) if sees(world) else load_world(world)
    name = None if level is None else level_name(made, level)
    pool = [question for question in lab_questions(world, split) if name in (None, question.level)]
    for question in keyed_random("lab", "show", seed, made.name, level or "").sample(pool, min(n, len(pool))):
        shown = "".join(f"  {ref.uri}" for ref in question.images)
        print(f"{question.level:8} {question.messages[-1].content:32} {question.gold}{shown}")


def _say(line: str) -> None:
    print(line, flush=True)


def level_name(world: World | VisionWorld, level: str) -> str:
    """The level that was asked for by name or by its number from 1.

    Raises:
        SettingsError: there is none.
    """
    names = list(world.levels)
    if level in names:
        return level
    if level.isdecimal() and 1 <= int(level) <= len(names):
        return names[int(level) - 1]
    known = ", ".join(f"{i} ({name})" for i, name in enumerate(names, 1))
    raise SettingsError(f"world {world.name!r} has no level {level!r}; its levels are {known}")
