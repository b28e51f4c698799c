"""What a teacher is, in process or remote."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from zppo.core.types import ImageRef, Message
from zppo.engines.base import Sampling
from zppo.step_log import StepLog


@dataclass(frozen=True, slots=True)
class TeacherSampling:
    """How the teacher is sampled for one use (rollout, compression, hint, judge).

    Attributes:
        sampling: how tokens are drawn.
        template_args: arguments of the chat template.
        extra_body: fields of a remote request, over all others; None leaves a field out. Nothing in process.
    """

    sampling: Sampling
    template_args: Mapping[str, Any] = field(default_factory=dict)
    extra_body: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TeacherRequest:
    """One prompt for the teacher, with one key per completion asked for."""

    messages: tuple[Message, ...]
    keys: tuple[int, ...]
    images: tuple[ImageRef, ...] = ()


@dataclass(frozen=True, slots=True)
class TeacherReply:
    """What came back: one text per key, None where that completion failed; tokens as far as known; `error` says why."""

    texts: tuple[str | None, ...]
    think_open: bool = False
    prompt_tokens: int = 0
    completion_tokens: int = 0
    error: str = ""


class Teacher(Protocol):
    """A frozen model that completes conversations. Never raises for a single failed request: the reply says so."""

    def complete(self, requests: Sequence[TeacherRequest], how: TeacherSampling, log: StepLog | None = None) -> list[TeacherReply]:
        """Replies in the order of the requests; what serving them took is counted in `log`."""
        ...
