"""The teacher in process: any `transformers` checkpoint, frozen, on the training device or another one."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from zppo.core.types import ImageRef, Message
from zppo.engines.base import Completion, Engine, SampleRequest
from zppo.engines.chat import Chat
from zppo.engines.image_check import check_image_input
from zppo.engines.loading import load_network, reads_images
from zppo.engines.out_of_memory import sample_in_halves
from zppo.engines.transformers import TransformersEngine
from zppo.errors import ModelError, TeacherError, ZPPOError, one_line
from zppo.images.processor import ImageProcessor, PixelCache
from zppo.images.store import PixelLimits
from zppo.step_log import StepLog
from zppo.teacher.interface import TeacherReply, TeacherRequest, TeacherSampling


class Speech(Protocol):
    """What the teacher needs of a `Chat`."""

    def encode(self, messages: Sequence[Message], images: Sequence[ImageRef] = ()) -> tuple[int, ...]:
        """A conversation as prompt ids."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Completion ids as text."""
        ...

    def think_open(self, ids: Sequence[int]) -> bool:
        """Whether prompt ids end inside an opened think block."""
        ...


class LocalTeacher:
    """A `Teacher` on an engine in this process. What cannot be served gets a reply that says why; nothing is raised."""

    def __init__(
        self, engine: Engine, chat: Callable[[Mapping[str, Any]], Speech], *, context: int | None = None, special_texts: Sequence[str] = ()
    ) -> None:
        """Puts a teacher together; `load` does it from a checkpoint.

        Args:
            engine: samples from the teacher's weights.
            chat: the chat for given chat-template arguments; asked once for each distinct set of them.
            context: a prompt of this many tokens or more is not served; None for no limit.
            special_texts: the tokenizer's control tokens, for the `Neutraliser`.
        """
        self._engine = engine
        self._make_chat = chat
        self._chats: dict[str, Speech] = {}
        self.context = context
        self.special_texts = tuple(special_texts)
        self.network: Any = None  # the frozen model and its tokenizer, where `load` made the teacher: for distillation
        self.tokenizer: Any = None
        self.image_processor: ImageProcessor | None = None  # None for one that reads text only

    @classmethod
    def load(
        cls,
        model: str | Path,
        *,
        revision: str | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        template: str | None = None,
        attention: str | None = None,
        max_rows: int | None = None,
        images: PixelLimits | None = None,
        cache: PixelCache | None = None,
    ) -> LocalTeacher:
        """A frozen teacher from a `transformers` checkpoint.

        Args:
            model: folder or hub name.
            revision: revision on the hub.
            device: where it runs.
            dtype: of the weights; None: float32 on a CPU, else what the checkpoint is stored in.
            template: chat template (its text) instead of the tokenizer's own.
            attention: `attn_implementation` of `transformers`; None for its default.
            max_rows: completions that are decoded at once; None for all.
            images: load it with its vision tower where it has one, and bring images into these limits; None for text only.
            cache: of preprocessed pictures, where it is shared.

        Raises:
            TeacherError: the checkpoint cannot be loaded.
        """
        place = torch.device(device)
        stored: torch.dtype | str = dtype or (torch.float32 if place.type == "cpu" else "auto")
        try:
            sees = images is not None and reads_images(model, revision)
            network: Any = load_network(model, revision=revision, dtype=stored, attention=attention, images=sees, device_map=place)
            chat = Chat.load(str(model), template=template, images=images if sees else None, cache=cache, revision=revision)
            engine = TransformersEngine(
                network.requires_grad_(False).eval(),
                chat.eos_ids(network),
                chat.pad_id(network),
                chat.banned_ids(network) if sees else (),
                max_rows=max_rows,
                image_processor=chat.image_processor,
            )
            if sees:
                check_image_input(engine, chat, str(model))
        except ModelError as error:
            raise TeacherError(str(error)) from error
        except Exception as error:  # many kinds: no room on the device, no such device
            raise TeacherError(
                f"The teacher {str(model)!r} cannot be loaded: {one_line(error)}. Give the folder or hub name of a transformers "
                "checkpoint with its tokenizer, and a device with room for it."
            ) from error
        teacher = cls(engine, chat.with_arguments, context=engine.context, special_texts=chat.special_texts)
        teacher.network, teacher.tokenizer, teacher.image_processor = network, chat.tokenizer, chat.image_processor
        return teacher

    def check(self, how: TeacherSampling, use: str = "", n: int = 1) -> None:
        """Builds the chat of one use, so that wrong template arguments show at start-up (ModelError). Its name and size are not needed."""
        self._chat(how.template_args)

    def complete(self, requests: Sequence[TeacherRequest], how: TeacherSampling, log: StepLog | None = None) -> list[TeacherReply]:
        """Replies in the order of the requests.

        A request gets `texts` of None and an `error` if it has images that this teacher cannot read, cannot be put into
        the chat template, fills the context, or if sampling it fails: where sampling a batch fails, its halves are tried
        on their own.
        """
        chat = self._chat(how.template_args)
        encoded = [self._encode(chat, request) for request in requests]
        samples = [sample for sample in encoded if not isinstance(sample, str)]
        outcomes = iter(sample_in_halves(self._engine, samples, how.sampling))
        replies = []
        for request, sample in zip(requests, encoded, strict=True):
            if isinstance(sample, str):
                replies.append(_failed(request, sample))
            else:
                replies.append(_reply(chat, request, sample, next(outcomes)))
        return replies

    def _chat(self, template_args: Mapping[str, Any]) -> Speech:
        key = json.dumps(template_args, sort_keys=True, default=repr)
        if key not in self._chats:
            self._chats[key] = self._make_chat(dict(template_args))
        return self._chats[key]

    def _encode(self, chat: Speech, request: TeacherRequest) -> SampleRequest | str:
        """What to sample, or the reason why not."""
        if request.images and self.image_processor is None:
            return f"the prompt has {len(request.images)} image(s), and this teacher reads text only"
        try:
            ids = chat.encode(request.messages, request.images)
        except ZPPOError as error:
            return str(error)
        if self.context is not None and len(ids) >= self.context:
            return f"the prompt has {len(ids)} tokens, and the teacher's context holds {self.context}"
        return SampleRequest(ids, request.keys, request.images)


def _failed(request: TeacherRequest, error: str, prompt_tokens: int = 0) -> TeacherReply:
    return TeacherReply((None,) * len(request.keys), prompt_tokens=prompt_tokens, error=error)


def _reply(chat: Speech, request: TeacherRequest, sample: SampleRequest, outcome: list[Completion] | str) -> TeacherReply:
    if isinstance(outcome, str):
        return _failed(request, outcome, len(sample.prompt_ids))
    return TeacherReply(
        texts=tuple(chat.decode(completion.ids.tolist()) for completion in outcome),
        think_open=chat.think_open(sample.prompt_ids),
        prompt_tokens=len(sample.prompt_ids),
        completion_tokens=sum(len(completion.ids) for completion in outcome),
    )
