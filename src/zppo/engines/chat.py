"""Between words and token ids: the tokenizer's own chat template, and what a model's special tokens are."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from itertools import groupby
from typing import Any

from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from zppo.core.parts import TurnParts, message_parts
from zppo.core.types import ImageRef, Message
from zppo.errors import DataError, ModelError, one_line
from zppo.images.processor import ImageProcessor, PixelCache
from zppo.images.store import PixelLimits
from zppo.names import load_part

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"
_CONTROL = re.compile(r"[<\[{|]\S*[>\]}|]")  # how control tokens look: <tool_call>, [INST], <|im_end|>
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
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
        image_processor: the model's; None for one that reads text only.

    Raises:
        ModelError: the template cannot be rendered, or shows no images to a vision-language model.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template_args: Mapping[str, Any] | None = None,
        template: str | None = None,
        image_processor: ImageProcessor | None = None,
    ) -> None:
        self.tokenizer, self.image_processor = tokenizer, image_processor
        self.template_args = dict(template_args or {})
        self._name = str(tokenizer.name_or_path or type(tokenizer).__name__)
        own = image_processor.template if image_processor is not None and image_processor.template is not None else tokenizer.chat_template
        self.template = template if template is not None else own
        added = {i: (token.content, token.special) for i, token in tokenizer.added_tokens_decoder.items()}
        special = {i: text for i, (text, flagged) in added.items() if flagged}
        special |= dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
        controls = {text for text, flagged in added.values() if flagged or _CONTROL.fullmatch(text)} | set(special.values())
        # Some tokenizers keep runs of spaces or line breaks as added tokens: those are ordinary text.
        self.special_texts: tuple[str, ...] = tuple(sorted((t for t in controls if t.strip()), key=lambda t: (-len(t), t)))
        self._hidden = frozenset(i for i, text in special.items() if text not in (THINK_OPEN, THINK_CLOSE))
        self._texts_in_parts = False  # whether the template wants texts as lists of parts too
        if self.template is not None:
            self._try_template()

    @classmethod
    def load(
        cls,
        name: str,
        template_args: Mapping[str, Any] | None = None,
        template: str | None = None,
        *,
        images: PixelLimits | None = None,
        cache: PixelCache | None = None,
        revision: str | None = None,
        **kwargs: Any,
    ) -> Chat:
        """The tokenizer of a checkpoint (folder or hub name); `kwargs` go to `AutoTokenizer.from_pretrained`.

        Args:
            images: load its image processor too, which brings pictures into these limits; None for text only.
            cache: of preprocessed pictures, where it is shared.

        Raises:
            ModelError: there is none, or it cannot be read.
        """
        try:
            tokenizer = load_part(AutoTokenizer, name, revision=revision, **kwargs)
        except ModelError:
            raise
        except Exception as error:  # many kinds, by what is missing or broken
            raise ModelError(
                f"cannot load the tokenizer of {name!r}: {one_line(error)}; name a folder of a checkpoint with a tokenizer, or a model on "
                "the hub (the first time that needs a network)"
            ) from error
        tokenizer.init_kwargs.pop("auto_map", None)  # names code that was not run; what is saved from here does without
        if not tokenizer("0 a")["input_ids"]:  # what `transformers` makes of a checkpoint that has none
            raise ModelError(
                f"{name!r} has no tokenizer: there is no tokenizer.json in it, or an empty one; copy the tokenizer's files of the "
                "checkpoint into the folder"
            )
        image_processor = None if images is None else ImageProcessor.load(name, tokenizer, images, cache, revision=revision)
        return cls(tokenizer, template_args, template, image_processor)

    def with_arguments(self, template_args: Mapping[str, Any]) -> Chat:
        """The same with other arguments of the chat template."""
        return Chat(self.tokenizer, template_args, self.template, self.image_processor)

    def forget_images(self) -> None:
        """Lets go of the preprocessed images of the last step."""
        if self.image_processor is not None:
            self.image_processor.cache.clear()

    def _try_template(self) -> None:
        probe = "1 + 1 = ?"
        shown = self.render([Message("user", probe)])
        if self.image_processor is None:
            return
        if probe not in shown:  # SmolVLM's goes over parts, and a text has none
            self._texts_in_parts = True
            shown = self.render([Message("user", probe)])
        picture = self.render([Message("user", probe)], [ImageRef("", "")])
        if probe not in shown or self.image_processor.token in shown or picture.count(self.image_processor.token) != 1:
            raise ModelError(
                f"the chat template of {self._name!r} does not show images as {self.image_processor.token!r}: take the template "
                "of a vision-language "
                "checkpoint, or questions without images"
            )

    def render(self, messages: Sequence[Message], images: Sequence[ImageRef] = ()) -> str:
        """The conversation as the model's prompt text, up to where its answer begins; a picture is one placeholder.

        Raises:
            DataError: see `message_parts`.
            ModelError: the template is broken or refuses this conversation (a role that it does not know, for
                example); or there are images, and the model reads text only.
        """
        if images and (self.image_processor is None or self.template is None):
            raise ModelError(
                f"the conversation has {len(images)} image(s), and {self._name!r} reads text only: name a vision-language model"
            )
        if self.template is None:
            return "\n\n".join(message.content for message in messages) + "\n"
        turns: list[Any]
        if images or self._texts_in_parts:
            turns = [{"role": t.role, "content": self._content(t)} for t in message_parts(messages, images)]
        else:
            turns = [{"role": message.role, "content": message.content} for message in messages]
        try:
            text = self.tokenizer.apply_chat_template(
                turns, chat_template=self.template, add_generation_prompt=True, tokenize=False, **self.template_args
            )
        except Exception as error:  # a template is a program: it can fail in any way
            roles = ", ".join(message.role for message in messages)
            raise ModelError(
                f"the chat template of {self._name!r} cannot render a conversation with the roles {roles}: {error}; "
                f"mend the template, its arguments {self.template_args}, or the roles"
            ) from error
        return str(text)

    def _content(self, turn: TurnParts) -> str | list[dict[str, str]]:
        """A turn as templates take it: a text, or a list of parts."""
        if not self._texts_in_parts and not any(isinstance(part, ImageRef) for part in turn.parts):
            return "".join(map(str, turn.parts))
        return [{"type": "image"} if isinstance(part, ImageRef) else {"type": "text", "text": part} for part in turn.parts]

    def encode(self, messages: Sequence[Message], images: Sequence[ImageRef] = ()) -> tuple[int, ...]:
        """The conversation as token ids, up to where the model's answer begins; one id per feature of a picture.

        Of a picture only the size is looked at.

        Raises:
            DataError, ModelError: as `render`; or a text holds the token that stands for images.
        """
        text = self.render(messages, images)
        if self.image_processor is not None:
            return self._with_pictures(self.image_processor, text, images)
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if self.template is None and self.tokenizer.bos_token_id is not None:
            bos = self.tokenizer.bos_token_id
            if self.tokenizer("")["input_ids"][:1] == [bos] and ids[:1] != [bos]:
                ids = [bos, *ids]
        if not ids:
            raise ModelError("a conversation became an empty prompt: its turns hold no text that the tokenizer knows; give them content")
        return tuple(ids)

    def _with_pictures(self, image_processor: ImageProcessor, text: str, images: Sequence[ImageRef]) -> tuple[int, ...]:
        """Token ids of a rendered text, every placeholder replaced by what stands for its picture."""
        places = [image_processor.placeholder(ref) for ref in images]
        pieces = text.split(image_processor.token)
        ids: list[int] = []
        if len(pieces) == len(places) + 1:
            whole = "".join([pieces[0], *(place.text + piece for place, piece in zip(places, pieces[1:], strict=True))])
            ids = self.tokenizer(whole, add_special_tokens=False)["input_ids"]
        if len(pieces) != len(places) + 1 or sum(i in image_processor.image_ids for i in ids) != sum(p.features for p in places):
            raise DataError(
                f"the text of a conversation with {len(places)} image(s) holds {image_processor.token!r} or another "
                "token that stands for an image "
                "in this model: take it out of the question"
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

    def settled(self, ids: Sequence[int]) -> int:
        """How many of these tokens of a completion have a text that no later token changes.

        Tokens that stand for a byte each (`<0xE2>`, of SentencePiece) are decoded as a run: a broken character spoils the whole of it.
        """
        count = len(ids)
        while count and (ids[count - 1] in self._hidden or _BYTE.fullmatch(str(self.tokenizer.convert_ids_to_tokens(int(ids[count - 1]))))):
            count -= 1
        return count

    def show(self, ids: Sequence[int]) -> str:
        """Token ids as text with every special token, as a model sees a prompt."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def show_short(self, ids: Sequence[int]) -> str:
        """The same for a log: of tokens that stand for features of a picture the first is written, and how many there are."""
        images = self.image_processor.image_ids if self.image_processor is not None else frozenset()
        text = ""
        for image, run in groupby(ids, lambda i: i if i in images else None):
            same = list(run)
            text += self.show(same) if image is None else f"{self.show(same[:1])}[x {len(same):,}]"
        return text

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
        seen = self.image_processor.image_ids if self.image_processor is not None else frozenset()
        return frozenset(named | marked | seen | set(more))
