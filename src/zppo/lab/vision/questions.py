"""The questions of the worlds of pictures, with their pictures as files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from zppo.core.types import Question
from zppo.errors import SettingsError
from zppo.images.store import cache_folder, keep
from zppo.lab.vision.pictures import png
from zppo.lab.vision.world import PICTURE_SPLITS, Ask, VisionWorld, load_vision_world


def vision_questions(world: str, split: str, folder: Path | None = None) -> list[Question]:
    """The questions of `lab:<world>/<split>`; their pictures are drawn into `folder`, by default the user's cache for images.

    Raises:
        SettingsError: no such world or split.
        StorageError: a picture cannot be written.
    """
    if split not in PICTURE_SPLITS:
        raise SettingsError(
            f"a world of pictures has the splits {', '.join(PICTURE_SPLITS)}, not {split!r}; write lab:{world}/train"
        )
    made = load_vision_world(world)
    return with_pictures(made, split, made.asks()[split], folder or cache_folder())


def with_pictures(world: VisionWorld, split: str, asks: Sequence[Ask], folder: Path) -> list[Question]:
    """Questions about pictures, numbered by kind; the pictures are in `folder`, by digest."""
    counts: dict[str, int] = {}
    made = []
    for ask in asks:
        number = counts[ask.kind] = counts.get(ask.kind, 0) + 1
        made.append(
            world.question(ask, f"{world.name}-{split}-{ask.kind}-{number:03d}", (keep(png(ask.picture), folder),))
        )
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
