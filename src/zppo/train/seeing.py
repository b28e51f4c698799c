"""Whether a run has images to show, and how its models see them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from zppo.config.settings import Settings
from zppo.core.types import Question
from zppo.data.load import load_questions
from zppo.engines.loading import reads_images
from zppo.errors import DataError, SettingsError
from zppo.images.processor import PixelCache
from zppo.images.store import PixelLimits
from zppo.models.student import resolve_model


@dataclass(frozen=True, slots=True)
class Seeing:
    """How every model of a run that is in this process sees.

    Attributes:
        limits: of the pixels of a picture.
        cache: preprocessed pictures of the step, shared by those who see alike.
    """

    limits: PixelLimits
    cache: PixelCache


@dataclass(frozen=True, slots=True)
class RunData:
    """The questions of a run, before any is dropped.

    Attributes:
        train, held_out: as read.
        seeing: None where no question has an image: then nothing of a model that sees is loaded.
    """

    train: list[Question]
    held_out: list[Question]
    seeing: Seeing | None


def read_data(settings: Settings, *, sharded: bool = False) -> RunData:
    """The questions of a recipe, and how its models are to see.

    Args:
        sharded: whether the student's weights lie in shards over several processes.

    Raises:
        DataError: see `load_questions`; or a question has images and the student reads none.
        SettingsError: images cannot be trained on with these settings.
    """
    train, held_out = load_data(settings)
    first = first_with_images(settings, train, held_out)
    if first is None:
        return RunData(train, held_out, None)
    check_images(settings, *first, sharded=sharded)
    images = settings.data.images
    return RunData(
        train,
        held_out,
        Seeing(PixelLimits(images.min_pixels, images.max_pixels), PixelCache(int(images.cache_gib * (1 << 30)))),
    )


def check_images(settings: Settings, source: str, question: Question, *, sharded: bool) -> None:
    """Whether the student of a recipe can be shown a question's images. DataError, SettingsError where not."""
    has = f"{source}: question {question.id!r} has {len(question.images)} image(s)"
    if not reads_images(resolve_model(settings.student.model), settings.student.revision):
        raise DataError(
            f"{has}, and the student {settings.student.model!r} reads text only: name a vision-language checkpoint (one that "
            "AutoModelForImageTextToText of transformers loads), or write data.columns.images: '' to leave the images out"
        )
    if sharded:
        raise SettingsError(
            f"{has}, and the weights are sharded over several processes: the vision tower is called only by those that have an image in "
            "their rows, and shards need all of them. Train without sharding (train.sharding: none)"
        )


def first_with_images(
    settings: Settings, train: Sequence[Question], held_out: Sequence[Question]
) -> tuple[str, Question] | None:
    """The first question that has images, and where it is from."""
    for source, questions in ((settings.data.train, train), (settings.data.eval or "", held_out)):
        for question in questions:
            if question.images:
                return source, question
    return None


def load_data(settings: Settings) -> tuple[list[Question], list[Question]]:
    """Training and held-out questions of a recipe. Raises DataError."""
    data = settings.data
    train = load_questions(data.train, data.columns, data.limit, data.reading())
    held_out = (
        load_questions(data.eval, data.columns, data.eval_limit, data.reading(held_out=True)) if data.eval else []
    )
    return train, held_out
