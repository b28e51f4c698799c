"""The mapping file of a corpus: which columns, sub-sets, caps and filters make it out of its sources."""

from __future__ import annotations

import re
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from zppo.errors import DataError, one_line

_MOST_BYTES = 1 << 20


_BETWEEN_WORDS = re.compile(r"[\s_-]+")


def _folded(name: str) -> str:
    """A name without case, `-`, `_` and spaces: VQA-RAD, vqa_rad and vqarad are one set, and sets are copied under all of these."""
    return _BETWEEN_WORDS.sub("", name.casefold())


def _listed(value: object) -> object:
    return (value,) if isinstance(value, str) else value


Names = Annotated[tuple[str, ...], BeforeValidator(_listed)]
"""One name, or several in the order of preference."""

Kind = Literal["judge", "any", "ordered", "drop"]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class CorpusColumns(_Part):
    """Where a source's rows have what; `a.b` is the value under b of the object in column a."""

    subset: Names
    question: Names
    answer: Names
    images: Names
    id: Names = ()
    kind: Names = ()
    pass_rate: Names = ()


class Subset(_Part):
    """One canonical sub-set of a source: its tier, and what the source calls it."""

    tier: int
    names: Names = Field(min_length=1)


class CorpusFilters(_Part):
    """What a row must be."""

    max_answer_characters: int = Field(512, ge=1)
    min_image_side: int = Field(100, ge=1)
    max_pass_rate: float = Field(0.5, ge=0, le=1)
    max_prompt_tokens: int = Field(4096, ge=1)


class PaperCounts(_Part):
    """What the paper counts, to compare with."""

    subsets: int
    ceiling: int
    rows: int


class CorpusSource(_Part):
    """One public set: where it is, and how its rows are read."""

    repository: str
    revision: str = "main"
    leave_out: Names = ()
    columns: CorpusColumns
    kinds: dict[str, Kind] = {}
    prefixes: Names = ()
    subsets: dict[str, Subset] = Field(min_length=1)

    def canonical(self, name: str) -> str | None:
        """The canonical sub-set that a name of this source stands for; None for one that is not listed."""
        folded = _folded(name)
        for prefix in self.prefixes:
            folded = folded.removeprefix(_folded(prefix))
        if (exact := self._names.get(folded)) is not None:
            return exact
        # The longest beginning wins, so that a narrower pattern may be added beside a wider one.
        return next((subset for start, subset in self._starts if folded.startswith(start)), None)

    @cached_property
    def _names(self) -> dict[str, str]:
        return {_folded(n): subset for subset, facts in self.subsets.items() for n in facts.names if not n.endswith("*")}

    @cached_property
    def _starts(self) -> list[tuple[str, str]]:
        found = [(_folded(n[:-1]), subset) for subset, facts in self.subsets.items() for n in facts.names if n.endswith("*")]
        return sorted(found, key=lambda item: -len(item[0]))


class CorpusMapping(_Part):
    """How a corpus is made; `zppo-77k.yaml` is one."""

    seed: int = 0
    tiers: dict[int, Annotated[int, Field(ge=1)]]
    filters: CorpusFilters = CorpusFilters()
    paper: PaperCounts | None = None
    sources: dict[str, CorpusSource] = Field(min_length=1)

    @model_validator(mode="after")
    def _consistent(self) -> CorpusMapping:
        for source, facts in self.sources.items():
            for subset, part in facts.subsets.items():
                if part.tier not in self.tiers:
                    raise ValueError(f"sources.{source}.subsets.{subset} is of tier {part.tier}, and tiers has no cap for it")
                for name in part.names:
                    if not name.strip("*").strip():
                        raise ValueError(f"sources.{source}.subsets.{subset} has the name {name!r}, which stands for everything")
        return self

    @cached_property
    def owners(self) -> dict[str, str]:
        """Which source each canonical sub-set is taken from: the first that has it."""
        found: dict[str, str] = {}
        for source, facts in self.sources.items():
            for subset in facts.subsets:
                found.setdefault(subset, source)
        return found

    def tier(self, subset: str) -> int:
        """The tier of a canonical sub-set, by the source that it is taken from."""
        return self.sources[self.owners[subset]].subsets[subset].tier

    def cap(self, subset: str) -> int:
        """At most so many rows of it are kept."""
        return self.tiers[self.tier(subset)]


def mapping_text(corpus: str) -> str:
    """The mapping that a corpus comes with, as YAML."""
    return (resources.files(__package__) / f"{corpus}.yaml").read_text(encoding="utf-8")


def read_mapping(corpus: str, path: Path | None = None) -> CorpusMapping:
    """The mapping in a file, or the one that a corpus comes with.

    Raises:
        DataError: the file cannot be read, or is no mapping; the message names the key.
    """
    name = corpus if path is None else str(path)
    try:
        if path is not None and path.stat().st_size > _MOST_BYTES:
            raise DataError(f"the mapping {name} has more than {_MOST_BYTES >> 20} MiB; give the YAML file itself")
        text = mapping_text(corpus) if path is None else path.read_text(encoding="utf-8-sig")
        data: Any = YAML(typ="safe", pure=True).load(text)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        raise DataError(f"the mapping {name} cannot be read ({reason}); `zppo data build {corpus} --show-mapping` prints one") from error
    except YAMLError as error:
        raise DataError(f"the mapping {name} is no YAML ({one_line(error)}); mend it there") from error
    try:
        return CorpusMapping.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"])) or "the whole"
        raise DataError(
            f"the mapping {name}, {key}: {first['msg']}; mend it there (`zppo data build {corpus} --show-mapping` prints one that is whole)"
        ) from error
