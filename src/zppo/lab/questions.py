"""Where the bundled checkpoints are.

The questions of the worlds of pictures, with their pictures as files.

The questions of the bundled worlds, by split.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from zppo.core.types import Message, Question
from zppo.errors import ModelError, SettingsError
from zppo.images.store import cache_folder, keep
from zppo.lab.picture_world import PICTURE_SPLITS, Ask, VisionWorld, load_vision_world, sees
from zppo.lab.pictures import png
from zppo.lab.world import load_world, seen, study

ASSETS = Path(__file__).with_name("assets")
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


def vision_questions(world: str, split: str, folder: Path | None = None) -> list[Question]:
    """The questions of `lab:<world>/<split>`; their pictures are drawn into `folder`, by default the user's cache for images.

    Raises:
        SettingsError: no such world or split.
        StorageError: a picture cannot be written.
    """
    if split not in PICTURE_SPLITS:
        raise SettingsError(f"a world of pictures has the splits {', '.join(PICTURE_SPLITS)}, not {split!r}; write lab:{world}/train")
    made = load_vision_world(world)
    return with_pictures(made, split, made.asks()[split], folder or cache_folder())


def with_pictures(world: VisionWorld, split: str, asks: Sequence[Ask], folder: Path) -> list[Question]:
    """Questions about pictures, numbered by kind; the pictures are in `folder`, by digest."""
    counts: dict[str, int] = {}
    made = []
    for ask in asks:
        number = counts[ask.kind] = counts.get(ask.kind, 0) + 1
        made.append(world.question(ask, f"{world.name}-{split}-{ask.kind}-{number:03d}", (keep(png(ask.picture), folder),)))
    return made


def write_vision_questions(path: Path, questions: Sequence[Question]) -> None:
    """Questions as JSON lines, as a recipe's `data` reads them; pictures are named by their place beside the file."""
    rows = [
        {
            "id": q.id,
            "prompt": q.messages[-1].content,
            "answer": q.gold,
            "level": q.level,
            "images": [str(Path(ref.uri).relative_to(path.parent.absolute())) for ref in q.images],
        }
        for q in questions
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


SPLITS = ("train", "test", "seen", "study")


def bundled_questions(name: str) -> list[Question]:
    """The questions of `lab:<world>/<split>`. Raises SettingsError, as `lab_questions`, or where no split is named."""
    world, slash, split = name.removeprefix(SCHEME).partition("/")
    if not slash:
        raise SettingsError(f"{name!r} names no split; write {name}/train or {name}/test")
    return lab_questions(world, split)


def lab_questions(world: str, split: str) -> list[Question]:
    """The questions of `lab:<world>/<split>`; the build wrote those of train and test beside the models.

    Those of a world of pictures are drawn when they are asked for. For studies of the others: `seen` is train without the world's unseen
    operations, `study` is test with more levels (`zppo.lab.world`).

    Raises:
        SettingsError: no such world or split.
    """
    if sees(world):
        return vision_questions(world, split)
    if split not in SPLITS:
        raise SettingsError(f"a lab world has the splits {', '.join(SPLITS)}, not {split!r}; write lab:{world}/train or lab:{world}/test")
    if split in ("seen", "study"):
        made = load_world(world)
        return seen(made, lab_questions(world, "train")) if split == "seen" else study(made, lab_questions(world, "test"))
    path = ASSETS / world / f"{split}.jsonl"
    if not path.is_file():
        known = ", ".join(sorted({p.parent.parent.name for p in ASSETS.glob("*/student/config.json")})) or "none"
        raise SettingsError(
            f"there are no bundled questions of a world {world!r} (known: {known}); name one of these, or a file of questions"
        )
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [Question(row["id"], (Message("user", row["prompt"]),), row["answer"], level=row["level"]) for row in rows]


def write_questions(path: Path, questions: Sequence[Question]) -> None:
    """Questions as JSON lines, as a recipe's `data` reads them."""
    rows = [{"id": q.id, "prompt": q.messages[-1].content, "answer": q.gold, "level": q.level} for q in questions]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
