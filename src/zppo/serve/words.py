"""Between conversations and token ids, for many threads at once."""

from __future__ import annotations

import inspect
import json
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from zppo.core.types import ImageRef, Message
from zppo.engines.chat import Chat
from zppo.errors import ModelError

_CHATS = 16  # kept; clients choose the template arguments
_RESERVED = frozenset(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters)


class Words:
    """A model's chat behind a lock: fast tokenizers refuse to be used by two threads at once."""

    def __init__(self, chat: Chat) -> None:
        self._chat = chat
        self._chats: dict[str, Chat] = {}
        self._lock = threading.Lock()

    def encode(
        self, messages: Sequence[Message], template_args: Mapping[str, Any], images: Sequence[ImageRef] = ()
    ) -> tuple[int, ...]:
        """Prompt ids of a conversation.

        Raises:
            ModelError: the template cannot render it, or does not take these arguments.
            DataError: a text holds what stands for an image.
        """
        with self._lock:
            return self._with(template_args).encode(messages, images)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of a completion, without special tokens; think tags stay."""
        with self._lock:
            return self._chat.decode(ids)

    def token(self, index: int) -> str:
        """One token as text, special ones too."""
        with self._lock:
            return self._chat.show([index])

    def _with(self, template_args: Mapping[str, Any]) -> Chat:
        if not template_args:
            return self._chat
        if self._chat.template is None:
            raise ModelError(
                "this model has no chat template that could take arguments: leave chat_template_kwargs out"
            )
        if reserved := sorted(_RESERVED & set(template_args)):
            raise ModelError(
                f"{', '.join(reserved)} is no argument of a chat template but of the tokenizer: leave it out of "
                "chat_template_kwargs"
            )
        key = json.dumps(template_args, sort_keys=True)
        if key not in self._chats:
            if len(self._chats) >= _CHATS:
                self._chats.clear()
            self._chats[key] = self._chat.with_arguments(template_args)
        return self._chats[key]
