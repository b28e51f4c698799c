"""Settings of the data: columns, images, one source or several (docs/data.md)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag, model_validator

from zppo.config.model_settings import Section
from zppo.core.types import AnswerList
from zppo.data.layouts import USUAL_CHOICES
from zppo.data.local_files import SourceSettings
from zppo.data.mixture import Part, short_names
from zppo.data.reasoning_gym import check_apart
from zppo.data.row_filters import check_filters
from zppo.data.rows import USUAL_IMAGES
from zppo.images.store import PixelLimits


class ColumnSettings(Section):
    """Which column of the data holds what; `a.b` is the value under b of the object in column a."""

    prompt: str = Field("prompt", description="the question as text")
    messages: str = Field("messages", description="the question as a list of {role, content}; used where the row has it")
    answer: str = Field("answer", description="the right answer")
    images: str = Field(
        USUAL_IMAGES, description="an image or a list of them: paths relative to the data file, bytes, or data: URLs; '' for none"
    )
    id: str = Field("id", description="unique id; rows without the column are named <file>:<row>")
    level: str = Field("level", description="label by which held-out accuracy is broken down")
    grading: str = Field("grading", description="rule or judge: who grades the question; rows without the column go by rule")
    extra: tuple[str, ...] = Field((), description="further columns, which reward functions are given (TRL's **columns, question.extra)")
    answer_list: str = Field("answer_list", description="any, set or ordered, for one row; rows without the column go by data.answer_list")
    solution: str = Field("", description="a worked solution, shown where the question is one of data.examples; '' for none")
    choices: str = Field(
        USUAL_CHOICES, description="the choices of a question, shown with it; by default options, or A, B, C, ..., too; '' for none"
    )


class ImageSettings(Section):
    """Images of questions (docs/images.md)."""

    min_pixels: int = Field(PixelLimits().min_pixels, ge=1, description="smaller images are enlarged to about so many pixels")
    max_pixels: int = Field(PixelLimits().max_pixels, ge=1, description="larger images are reduced to about so many pixels")
    folder: Path | None = Field(
        None, description="where images are kept that come as bytes; empty: $ZPPO_CACHE/images, or zppo/images in the user's cache folder"
    )
    cache_gib: float = Field(4.0, gt=0, description="memory for the preprocessed images of a step; what is over it is preprocessed again")

    @model_validator(mode="after")
    def _some_size(self) -> ImageSettings:
        if self.min_pixels > self.max_pixels:
            raise ValueError(f"min_pixels is {self.min_pixels}, more than max_pixels, which is {self.max_pixels}; exchange them")
        return self


Duplicates = Literal["keep", "one"]
_as_list = BeforeValidator(lambda given: (given,) if isinstance(given, str) else given)
Filters = Annotated[tuple[str, ...], _as_list, AfterValidator(check_filters)]
"""One filter may stand without brackets."""


class MixtureSource(Section):
    """One of several sources of training questions; what is empty is as `data` says."""

    source: str = Field(description="where its questions are, as in data.train")
    name: str | None = Field(
        None, min_length=1, description="what it is called in the plan, and before ids that another source has too; empty: its last part"
    )
    config: str | None = Field(None, description="as data.config")
    split: str | None = Field(None, min_length=1, description="as data.split")
    revision: str | None = Field(None, description="as data.revision")
    columns: ColumnSettings | None = Field(None, description="as data.columns, of which nothing is left where it is set")
    answer_after: str | None = Field(None, min_length=1, description="as data.answer_after")
    answer_list: AnswerList | None = Field(None, description="as data.answer_list")
    limit: int | None = Field(None, ge=1, description="as data.limit: use its first N rows only")
    filters: Filters | None = Field(None, description="as data.filters")
    duplicates: Duplicates | None = Field(None, description="as data.duplicates")
    cap: int | None = Field(None, ge=1, description="at most so many of its questions, drawn by seed and id")
    weight: float | None = Field(
        None, gt=0, description="its share in proportion to the other weights: the scarcest source gives all that it has, the others less"
    )


def _kind_of_source(value: Any) -> str:
    return "tuple[sources]" if isinstance(value, list | tuple) else "constrained-str"


TrainSources = Annotated[
    Annotated[str, Tag("constrained-str")] | Annotated[tuple[MixtureSource, ...], Tag("tuple[sources]")], Discriminator(_kind_of_source)
]
"""A source, or several; the tags are what `config.recipe` leaves out of the key that an error names."""


_OF_READING = ("config", "split", "revision", "answer_after", "answer_list")


class DataSettings(Section):
    """Questions in."""

    train: TrainSources = Field(
        description="JSON lines, JSON, CSV or parquet file, a folder of such files or of save_to_disk, hub:<owner>/<name>, "
        "reasoning_gym:<task>, or lab:<world>/train; or a list of sources, {source, filters, cap, ...} each"
    )
    eval: str | None = Field(None, description="held-out questions, from the same kinds of source; empty: no evaluation")
    config: str | None = Field(None, description="configuration of a hub set or of a folder laid out like one")
    split: str = Field("train", min_length=1, description="split of a hub set or a folder that the student trains on")
    eval_split: str = Field("test", min_length=1, description="split of a hub set or a folder that is held out")
    revision: str | None = Field(None, description="revision of a hub set: a commit, a tag or a branch")
    streaming: bool = Field(False, description="read the first `limit` rows of a hub set one by one instead of downloading it; needs limit")
    columns: ColumnSettings = Field(ColumnSettings(), description="names of the columns")
    images: ImageSettings = Field(ImageSettings(), description="how images are kept, and shown to models")
    answer_after: str | None = Field(
        None,
        min_length=1,
        description="the right answer is what follows the last occurrence of this in the answer column: '####' for GSM8K; '<answer>' ends "
        "at '</answer>'; '\\boxed' is what the last box holds",
    )
    answer_list: AnswerList | None = Field(
        None,
        description="what a list of right answers means: any one of them is right, all are wanted in any order (set), or in their order "
        "(ordered); needed where the answer column holds lists",
    )
    filters: Filters = Field(
        (), description="training rows that are used: those for which all of these hold, e.g. ['pass_rate <= 0.5', 'image_width >= 100']"
    )
    duplicates: Duplicates = Field(
        "keep", description="training questions with the same text and images: keep all of them, or the first one; they are told either way"
    )
    examples: int = Field(
        0,
        ge=0,
        le=16,
        description="training questions that every prompt shows, with their answers, before its own; drawn by the seed, not trained on",
    )
    max_prompt_tokens: int = Field(4096, ge=1, description="longer plain prompts are dropped, with a count")
    limit: int | None = Field(None, ge=1, description="use the first N training questions only; of several sources the first N of each")
    eval_limit: int | None = Field(None, ge=1, description="use the first N held-out questions only")

    @model_validator(mode="after")
    def _readable(self) -> DataSettings:
        if not self.train:
            raise ValueError("data.train names no source; give one, or a list of {source: ...}")
        several = not isinstance(self.train, str)
        keys = [f"data.train.{number}" if several else "data.train" for number in range(len(self.parts))]
        named = [(k, part.source, f"{k}.limit" if several else "data.limit", part.limit) for k, part in zip(keys, self.parts, strict=True)]
        named += [("data.eval", self.eval, "data.eval_limit", self.eval_limit)] if self.eval is not None else []
        from_hub = [row for row in named if row[1].startswith("hub:")]
        for setting, value in (("data.streaming", self.streaming), ("data.revision", self.revision)):
            if value and not from_hub:
                raise ValueError(f"{setting} is set, but neither data.train nor data.eval is a hub set; leave it out")
        for setting, source, name, limit in from_hub:
            if self.streaming and limit is None:
                raise ValueError(
                    f"data.streaming needs {name} for {setting}={source}: every epoch goes over all questions in an order of its own, "
                    "so they are held in memory; set how many to read from the start, or leave streaming out"
                )
        for key, part in zip(keys, self.parts, strict=True):
            if part.reading.revision != self.revision and not part.source.startswith("hub:"):
                raise ValueError(f"{key}.revision is set, and {part.source} is no hub set; leave it out")
        weighted = [part.weight is not None for part in self.parts]
        if any(weighted) and not all(weighted):
            raise ValueError(
                f"{sum(weighted)} of the {len(weighted)} sources of data.train have a weight: give each one a weight, or take cap, which "
                "is a number of questions"
            )
        if self.eval is not None:
            for part in self.parts:
                check_apart(part.source, self.eval)
        return self

    @property
    def parts(self) -> tuple[Part, ...]:
        """The sources of the training questions, with all that the recipe says about each; a single one is one part."""
        given = (MixtureSource(source=self.train),) if isinstance(self.train, str) else self.train
        names = short_names([(each.source, each.name, each.config) for each in given])
        return tuple(self._part(each, name) for each, name in zip(given, names, strict=True))

    def _part(self, each: MixtureSource, name: str) -> Part:
        own = {key: value for key in _OF_READING if (value := getattr(each, key)) is not None}
        return Part(
            each.source,
            name,
            replace(self.reading(), **own),
            each.columns or self.columns,
            each.limit or self.limit,
            self.filters if each.filters is None else each.filters,
            (each.duplicates or self.duplicates) == "one",
            each.cap,
            each.weight,
        )

    @property
    def train_name(self) -> str:
        """data.train in a few words."""
        if isinstance(self.train, str):
            return self.train
        return f"{len(self.train)} sources ({', '.join(part.name for part in self.parts)})" if len(self.train) > 1 else self.train[0].source

    def reading(self, held_out: bool = False) -> SourceSettings:
        """How the training or the held-out source is read."""
        return SourceSettings(
            held_out=held_out,
            config=self.config,
            split=self.eval_split if held_out else self.split,
            revision=self.revision,
            streaming=self.streaming,
            answer_after=self.answer_after,
            answer_list=self.answer_list,
            image_cache=self.images.folder.expanduser() if self.images.folder else None,
        )
