"""The questions of the bundled worlds, by split."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from zppo.core.types import Message, Question
from zppo.errors import SettingsError
from zppo.lab.assets import ASSETS
from zppo.lab.outside import seen, study
from zppo.lab.vision.questions import vision_questions
from zppo.lab.vision.world import sees
from zppo.lab.world import load_world

SPLITS = ("train", "test", "seen", "study")


def lab_questions(world: str, split: str) -> list[Question]:
    """The questions of `lab:<world>/<split>`; the build wrote those of train and test beside the models.

    Those of a world of pictures are drawn when they are asked for. For studies of the others: `seen` is train without the world's unseen
    operations, `study` is test with more levels (`zppo.lab.outside`).

    Raises:
        SettingsError: no such world or split.
    """
    if sees(world):
        return vision_questions(world, split)
    if split not in SPLITS:
        raise SettingsError(
            f"a lab world has the splits {', '.join(SPLITS)}, not {split!r}; write lab:{world}/train or lab:{world}/test"
        )
    if split in ("seen", "study"):
        made = load_world(world)
        return (
            seen(made, lab_questions(world, "train")) if split == "seen" else study(made, lab_questions(world, "test"))
        )
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
