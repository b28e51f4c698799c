"""Between words and token ids: the tokenizer's own chat template, and what a model's special tokens are."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from zppo.core.types import Message
from zppo.errors import ModelError, one_line

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"
_CONTROL = re.compile(r"[<\[{|]\S*[>\]}|]")  # how control tokens look: <tool_call>, [INST], <|im_end|>
_MEDIA = re.compile(r"<\|?/?(image|video|audio|vision|img|vid)(?![a-z]*_?text)\w*\|?>", re.IGNORECASE)
_MEDIA_FIELDS = re.compile(r"(image|video|audio|vision)_.*token_id|(image|video|audio)_token_index")


class Chat:
    """Turns conversations into prompts of one model and its tokens back into text.

    Base models without a chat template get a plain form: the contents of the turns joined by blank lines, with a line
    break at the end, after the beginning-of-text token where the tokenizer adds one.

    Args:
        tokenizer: a tokenizer of `transformers`.
        template_args: arguments passed on to the chat template (for example {"enable_thinking": False}).
        template: a chat template (its Jinja text) to use in place of the tokenizer's own.

    Raises:
        ModelError: the template cannot be rendered.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template_args: Mapping[str, Any] | None = None,
        template: str | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.template_args = dict(template_args or {})
        self._name = str(tokenizer.name_or_path or type(tokenizer).__name__)
        self.template = template if template is not None else tokenizer.chat_template
        added = {i: (token.content, token.special) for i, token in tokenizer.added_tokens_decoder.items()}
        special = {i: text for i, (text, flagged) in added.items() if flagged}
        special |= dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
        controls = {text for text, flagged in added.values() if flagged or _CONTROL.fullmatch(text)} | set(
            special.values()
        )
        # Some tokenizers keep runs of spaces or line breaks as added tokens: those are ordinary text.
        self.special_texts: tuple[str, ...] = tuple(
            sorted((t for t in controls if t.strip()), key=lambda t: (-len(t), t))
        )
        self._hidden = frozenset(i for i, text in special.items() if text not in (THINK_OPEN, THINK_CLOSE))
        if self.template is not None:
            self.render([Message("user", "1 + 1 = ?")])

    @classmethod
    def load(
        cls, name: str, template_args: Mapping[str, Any] | None = None, template: str | None = None, **kwargs: Any
    ) -> Chat:
        """The tokenizer of a checkpoint (folder or hub name); `kwargs` go to `AutoTokenizer.from_pretrained`.

        Raises:
            ModelError: there is none, or it cannot be read.
        """
        try:
            tokenizer = AutoTokenizer.from_pretrained(name, **kwargs)
        except Exception as error:  # many kinds, by what is missing or broken
            raise ModelError(
                f"cannot load the tokenizer of {name!r}: {one_line(error)}; name a folder of a checkpoint with a tokenizer, or a model on "
                "the hub (the first time that needs a network)"
            ) from error
        if not tokenizer("0 a")["input_ids"]:  # what `transformers` makes of a checkpoint that has none
            raise ModelError(
                f"{name!r} has no tokenizer: there is no tokenizer.json in it, or an empty one; copy the tokenizer's files of the "
                "checkpoint into the folder"
            )
        return cls(tokenizer, template_args, template)

    def render(self, messages: Sequence[Message]) -> str:
        """The conversation as the model's prompt text, up to where its answer begins.

        Raises:
            ModelError: the template is broken or refuses this conversation (a role that it does not know, for
                example).
        """
        if self.template is None:
            return "\n\n".join(message.content for message in messages) + "\n"
        try:
            text = self.tokenizer.apply_chat_template(
                [{"role": message.role, "content": message.content} for message in messages],
                chat_template=self.template,
                add_generation_prompt=True,
                tokenize=False,
                **self.template_args,
            )
        except Exception as error:  # a template is a program: it can fail in any way
            roles = ", ".join(message.role for message in messages)
            raise ModelError(
                f"the chat template of {self._name!r} cannot render a conversation with the roles {roles}: {error}; "
                f"mend the template, its arguments {self.template_args}, or the roles"
            ) from error
        return str(text)

    def encode(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """The conversation as token ids, up to where the model's answer begins. Raises `ModelError` like `render`."""
        ids = self.tokenizer(self.render(messages), add_special_tokens=False)["input_ids"]
        if self.template is None and self.tokenizer.bos_token_id is not None:
            bos = self.tokenizer.bos_token_id
            if self.tokenizer("")["input_ids"][:1] == [bos] and ids[:1] != [bos]:
                ids = [bos, *ids]
        if not ids:
            raise ModelError(
                "a conversation became an empty prompt: its turns hold no text that the tokenizer knows; give them content"
            )
        return tuple(ids)

    def think_open(self, ids: Sequence[int]) -> bool:
        """Whether a prompt ends inside an opened and unclosed think block (method.md section 7).

        Only what follows the last control token counts, which is the head of the model's own turn: a question may
        well mention the tags.
        """
        head = next((i for i in range(len(ids), 0, -1) if ids[i - 1] in self._hidden), 0)
        text = self.show(ids[head:])
        return text.rfind(THINK_OPEN) > text.rfind(THINK_CLOSE)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of a completion: special tokens left out, think tags kept even where they count as special."""
        shown = [int(i) for i in ids if int(i) not in self._hidden]
        return str(self.tokenizer.decode(shown, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def show(self, ids: Sequence[int]) -> str:
        """Token ids as text with every special token in sight, as a model sees a prompt."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def eos_ids(self, model: PreTrainedModel) -> frozenset[int]:
        """The ids that end a completion: those of the model's generation settings and the tokenizer's own.

        Raises:
            ModelError: there is none.
        """
        found: set[int] = set()
        for holder in (getattr(model, "generation_config", None), self.tokenizer):
            ids = getattr(holder, "eos_token_id", None)
            found.update([] if ids is None else [ids] if isinstance(ids, int) else ids)
        if not found:
            raise ModelError(
                f"neither the tokenizer of {self._name!r} nor the model's generation settings name an end token: completions "
                "would never end; set eos_token in the tokenizer or eos_token_id in generation_config.json"
            )
        return frozenset(found)

    def pad_id(self, model: PreTrainedModel) -> int:
        """An id to fill up shorter rows with: the tokenizer's padding token, else an end token; it is always masked."""
        return self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else min(self.eos_ids(model))

    def banned_ids(self, model: PreTrainedModel, more: Collection[int] = ()) -> frozenset[int]:
        """Ids that a student must never write, since they stand for images, video or sound; `more` are added.

        A drawn image token would be a place without an image, on which the training forward fails.
        """
        config = model.config.to_dict()
        named = {v for k, v in config.items() if _MEDIA_FIELDS.fullmatch(k) and isinstance(v, int)}
        marked = {i for i, token in self.tokenizer.added_tokens_decoder.items() if _MEDIA.fullmatch(token.content)}
        return frozenset(named | marked | set(more))
