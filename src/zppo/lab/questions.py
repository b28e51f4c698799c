"""Where the bundled checkpoints are, and the questions of the worlds, by split; those about pictures with their pictures as files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from zppo.core.draws import keyed_random
from zppo.core.types import Message, Question
from zppo.errors import ModelError, SettingsError
from zppo.images.store import cache_folder, keep
from zppo.lab.families import family_questions
from zppo.lab.picture_world import PICTURE_SPLITS, Ask, PictureWorld, is_picture_world, load_picture_world, png
from zppo.lab.world import World, load_world, seen, study
from zppo.names import check_file

ASSETS, TEMPLATES = (Path(__file__).with_name(name) for name in ("assets", "prompts"))
SCHEME = "lab:"
ROLES = ("student", "teacher")


def bundled_model(name: str) -> Path:
    """The folder of a bundled checkpoint, `lab:<world>/<student|teacher>` (the scheme may be left out).

    Raises:
        ModelError: no such checkpoint.
    """
    world, _, role = name.removeprefix(SCHEME).partition("/")
    folder = ASSETS / world / role
    if role not in ROLES or not (folder / "config.json").is_file():
        known = ", ".join(f"{SCHEME}{p.parent.parent.name}/{p.parent.name}" for p in sorted(ASSETS.glob("*/*/config.json"))) or "none"
        raise ModelError(
            f"there is no bundled model {name!r} (known: {known}); name one of them, or build your own with "
            "`zppo lab build WORLD --out DIR` and name its folder"
        )
    return folder


def bundled_template(name: str) -> Path:
    """The file of one of the lab's short prompt templates, `lab:<template>`.

    Raises:
        SettingsError: there is no such template.
    """
    template = name.removeprefix(SCHEME)
    known = {path.stem: path for path in sorted(TEMPLATES.glob("*.jinja"))}
    if template not in known:
        raise SettingsError(f"the lab has no prompt template {name!r}; it has {', '.join(SCHEME + each for each in known)}")
    return known[template]


def picture_questions(world: str, split: str, folder: Path | None = None) -> list[Question]:
    """The questions of `lab:<world>/<split>`; their pictures are drawn into `folder`, by default the user's cache for images.

    Raises:
        SettingsError: no such world or split.
        StorageError: a picture cannot be written.
    """
    if split not in PICTURE_SPLITS:
        raise SettingsError(f"a world of pictures has the splits {', '.join(PICTURE_SPLITS)}, not {split!r}; write lab:{world}/train")
    made = load_picture_world(world)
    return with_pictures(made, split, made.asks()[split], folder or cache_folder())


def with_pictures(world: PictureWorld, split: str, asks: Sequence[Ask], folder: Path) -> list[Question]:
    """Questions about pictures, numbered by kind; the pictures are in `folder`, by digest."""
    counts: dict[str, int] = {}
    made = []
    for ask in asks:
        number = counts[ask.kind] = counts.get(ask.kind, 0) + 1
        made.append(world.question(ask, f"{world.name}-{split}-{ask.kind}-{number:03d}", (keep(png(ask.picture), folder),)))
    return made


SPLITS = ("train", "test", "seen", "study")


def bundled_questions(name: str) -> list[Question]:
    """The questions of `lab:<world>/<split>`. Raises SettingsError, as `lab_questions`, or where no split is named."""
    world, slash, split = name.removeprefix(SCHEME).partition("/")
    if not slash:
        raise SettingsError(f"{name!r} names no split; write {name}/train or {name}/test")
    return lab_questions(world, split)


def lab_questions(world: str, split: str) -> list[Question]:
    """The questions of `lab:<world>/<split>`; the build wrote those of train and test next to the models.

    Those of a world of pictures are drawn when they are asked for. For studies of the others: `seen` is train without the world's unseen
    operations, `study` is test with more levels (`zppo.lab.world.study`, `zppo.lab.families`).

    Raises:
        SettingsError: no such world or split.
    """
    if is_picture_world(world):
        return picture_questions(world, split)
    if split not in SPLITS:
        raise SettingsError(f"a lab world has the splits {', '.join(SPLITS)}, not {split!r}; write lab:{world}/train or lab:{world}/test")
    if split in ("seen", "study"):
        made = load_world(world)
        if split == "seen":
            return seen(made, lab_questions(world, "train"))
        return [*study(made, lab_questions(world, "test")), *family_questions(made)]
    path = ASSETS / world / f"{split}.jsonl"
    if not path.is_file():
        known = ", ".join(sorted({p.parent.parent.name for p in ASSETS.glob("*/student/config.json")})) or "none"
        raise SettingsError(
            f"there are no bundled questions of a world {world!r} (known: {known}); name one of these, or a file of questions"
        )
    check_file(path, SettingsError)
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [Question(row["id"], (Message("user", row["prompt"]),), row["answer"], level=row["level"]) for row in rows]


def write_questions(path: Path, questions: Sequence[Question]) -> None:
    """Questions as JSON lines, as a recipe's `data` reads them; pictures are named by their place relative to the file."""
    lines = []
    for q in questions:
        row: dict[str, object] = {"id": q.id, "prompt": q.messages[-1].content, "answer": q.gold, "level": q.level}
        if q.images:
            row["images"] = [str(Path(ref.uri).relative_to(path.parent.absolute())) for ref in q.images]
        lines.append(json.dumps(row, ensure_ascii=bool(q.images)) + "\n")
    path.write_text("".join(lines), encoding="utf-8")


def any_world(name: str) -> World | PictureWorld:
    """A world of text or of pictures. Raises SettingsError where there is none, or its file is wrong."""
    return load_picture_world(name) if is_picture_world(name) else load_world(name)


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
    made = any_world(world)
    name = None if level is None else level_name(made, level)
    pool = [question for question in lab_questions(world, split) if name in (None, question.level)]
    for question in keyed_random("lab", "show", seed, made.name, level or "").sample(pool, min(n, len(pool))):
        shown = "".join(f"  {ref.uri}" for ref in question.images)
        print(f"{question.level:8} {question.messages[-1].content:32} {question.gold}{shown}")


def level_name(world: World | PictureWorld, level: str) -> str:
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
