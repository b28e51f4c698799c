"""How a source of questions is read, and where a row of it stands."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple


class Place(NamedTuple):
    """Where a row stands.

    Attributes:
        source: the file or set, as messages name it.
        name: the same as ids name it: a row without an id is called `<name>:<row>`.
        row: line of a JSON-lines file, line of a table (the header is 1), else number of the record from 1.
        folder: what paths of images in the row are relative to.
    """

    source: str
    name: str
    row: int
    folder: Path

    def __str__(self) -> str:
        return f"{self.source}, row {self.row}"


Rows = Iterator[tuple[Place, object]]


@dataclass(frozen=True, slots=True)
class Reading:
    """What a recipe says about a source beside its name.

    Attributes:
        held_out: the questions are for evaluation; generated ones then differ from those of training.
        config, split, revision: of a set of the hub, or of a folder laid out like one.
        streaming: rows of a hub set come one by one, without a copy on the disk.
        answer_after: the right answer is what follows the last occurrence of this text in the answer column.
        image_cache: where images without a file of their own are kept; None for the user's cache folder.
    """

    held_out: bool = False
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    streaming: bool = False
    answer_after: str | None = None
    image_cache: Path | None = None

    @property
    def split_setting(self) -> str:
        """The setting that names the split, for messages."""
        return "data.eval_split" if self.held_out else "data.split"
