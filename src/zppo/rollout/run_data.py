"""Whether a run has images to show, and how its models see them.

The questions of a run, and whether the student can read them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console
from transformers import PreTrainedModel

from zppo.config.settings import Settings
from zppo.core.types import IMAGE, Question
from zppo.data.load import drop_long
from zppo.engines.loading import reads_images
from zppo.errors import DataError, ModelError, SettingsError
from zppo.images.processor import PixelCache
from zppo.images.store import PixelLimits
from zppo.names import model_folder
from zppo.rollout.data import load_questions_of
from zppo.rollout.examples import Example
from zppo.rollout.student import PromptRenderer


@dataclass(frozen=True, slots=True)
class ImageInputs:
    """How images are brought into the models of a run that are in this process.

    Attributes:
        limits: of the pixels of a picture.
        cache: preprocessed pictures of the step, shared by models with the same image processor.
    """

    limits: PixelLimits
    cache: PixelCache


@dataclass(frozen=True, slots=True)
class RunData:
    """The questions of a run, before any is dropped.

    Attributes:
        train, held_out: as read.
        image_inputs: None where no question has an image: then no vision tower is loaded.
        examples: what every prompt shows.
    """

    train: list[Question]
    held_out: list[Question]
    image_inputs: ImageInputs | None
    examples: tuple[Example, ...] = ()


def read_data(settings: Settings, *, warn: Callable[[str], None] | None = None, say: Callable[[str], None] | None = None) -> RunData:
    """The questions of a recipe, and how its models are to see.

    Args:
        warn, say: are told of what should be mended, and what each source gives (`load_data`).

    Raises:
        DataError: see `load_questions`; or a question has images and the student reads none.
        SettingsError: images cannot be trained on with these settings.
    """
    loaded = load_questions_of(settings, warn, say)
    return replace(seen_data(settings, loaded.mixture.questions, loaded.held_out), examples=loaded.examples)


def seen_data(settings: Settings, train: list[Question], held_out: list[Question]) -> RunData:
    """Questions that were read, and how the models are to see them; raises as `read_data`."""
    first = first_with_images(settings, train, held_out)
    if first is None:
        return RunData(train, held_out, None)
    check_images(settings, *first)
    images = settings.data.images
    return RunData(
        train, held_out, ImageInputs(PixelLimits(images.min_pixels, images.max_pixels), PixelCache(int(images.cache_gib * (1 << 30))))
    )


def check_images(settings: Settings, source: str, question: Question) -> None:
    """Whether the student of a recipe can be shown a question's images. DataError, SettingsError where not."""
    has = f"{source}: question {question.id!r} has {len(question.images)} image(s)"
    if not reads_images(model_folder(settings.student.model), settings.student.revision):
        raise DataError(
            f"{has}, and the student {settings.student.model!r} reads text only: name a vision-language checkpoint (one that "
            "AutoModelForImageTextToText of transformers loads), or write data.columns.images: '' to leave the images out"
        )


def first_with_images(settings: Settings, train: Sequence[Question], held_out: Sequence[Question]) -> tuple[str, Question] | None:
    """The first question that has images, and where it is from."""
    for source, questions in ((settings.data.train_name, train), (settings.data.eval or "", held_out)):
        for question in questions:
            if question.images:
                return source, question
    return None


SAMPLE = 200
MOST_UNKNOWN = 0.05


def load_short(
    settings: Settings, data: RunData, renderer: PromptRenderer, length: Callable[[Question], int], console: Console
) -> tuple[list[Question], list[Question]]:
    """Training and held-out questions whose plain prompt (`length` tokens) is short enough. What is said: how many were dropped, how
    many there are and have images, a tokenizer that does not know their words, places for images without images.

    Raises:
        DataError: no question is short enough.
    """
    sources = zip((settings.data.train_name, settings.data.eval or ""), (data.train, data.held_out), strict=True)
    train, held_out = (_short(source, asked, settings.data.max_prompt_tokens, length, console) for source, asked in sources)
    for warning in (unknown_tokens(renderer, train), unseen([*train, *held_out])):
        if warning:
            console.print(warning, style="yellow", soft_wrap=True, highlight=False)
    return train, held_out


def _short(source: str, questions: Sequence[Question], most: int, length: Callable[[Question], int], console: Console) -> list[Question]:
    kept, dropped = drop_long(questions, length, most)
    if questions and not kept:
        shortest = min(map(length, questions))
        raise DataError(
            f"{source}: all {dropped} prompts have more than {most} tokens, the shortest {shortest}: raise data.max_prompt_tokens"
        )
    if dropped:
        console.print(f"{source}: {dropped} of {len(questions)} questions dropped, their prompts have more than {most} tokens")
    if kept:
        with_images = sum(bool(question.images) for question in kept)
        console.print(f"{source}: {len(kept):,} questions, {with_images:,} with images", soft_wrap=True, highlight=False)
    return kept


def check_context(
    settings: Settings, context: int | None, questions: Sequence[Question], held_out: Sequence[Question], length: Callable[[Question], int]
) -> None:
    """Whether every plain prompt (`length` tokens) fits the model with its token limit. SettingsError where one does not."""
    uses = (("rollout", questions, settings.rollout), ("eval", held_out, settings.eval))
    for name, asked, sampling in uses:
        tokens, longest = max(((length(q), q.id) for q in asked), default=(0, ""))
        if context is not None and asked and tokens + sampling.max_new_tokens > context:
            raise SettingsError(
                f"{name}.max_new_tokens is {sampling.max_new_tokens}, and the prompt of question {longest!r} has {tokens} tokens: "
                f"together more than the model's context of {context}. Lower {name}.max_new_tokens or data.max_prompt_tokens"
            )


def check_vocabulary(model: PreTrainedModel, renderer: PromptRenderer, questions: Sequence[Question]) -> None:
    """Whether the model has a row for every token of the first 200 plain prompts. ModelError where it has not.

    A tokenizer may know more tokens than its model, as long as none of them is used.
    """
    embedding: Any = model.get_input_embeddings()
    rows = embedding.weight.shape[0]
    largest = max((max(renderer.plain(question).ids) for question in questions[:SAMPLE]), default=0)
    if largest >= rows:
        raise ModelError(
            f"student.model: the prompts hold the token {renderer.chat.show([largest])!r} with the id {largest}, and the model knows "
            f"the ids 0 to {rows - 1}: tokenizer and model do not belong together; take both from one checkpoint"
        )


def unseen(questions: Sequence[Question]) -> str:
    """A warning where a text marks the place of an image and the question has none [zppo]; "" where none does."""
    blind = [q.id for q in questions if not q.images and any(IMAGE in m.content for m in q.messages)]
    if not blind:
        return ""
    return (
        f"warning: {len(blind)} of {len(questions)} questions hold {IMAGE} and have no image ({blind[0]!r}, for one): it is shown as text. "
        "Name the column of the images in data.columns.images, or take the marks out"
    )


def unknown_tokens(renderer: PromptRenderer, questions: Sequence[Question]) -> str:
    """A warning where more than 5% of the tokens of the first 200 plain prompts are the unknown token [zppo]; "" where they are not.

    Such a tokenizer maps different questions to one prompt without a word; most have no unknown token at all.
    """
    tokenizer = renderer.chat.tokenizer
    unknown = tokenizer.unk_token_id
    if unknown is None:
        return ""
    rows = [renderer.plain(question).ids for question in questions[:SAMPLE]]
    count, total = sum(row.count(unknown) for row in rows), sum(map(len, rows))
    if count <= MOST_UNKNOWN * total:
        return ""
    first = next(question.id for question, row in zip(questions, rows, strict=False) if unknown in row)
    return (
        f"warning: {count / total:.0%} of the tokens of the prompts are {tokenizer.unk_token!r}, which stands for any text that the "
        f"student's tokenizer does not know (question {first!r}, for one): different texts become the same prompt. "
        "Choose a student whose tokenizer knows the words of your questions and of the templates (the lab's models know only the lab's)"
    )
