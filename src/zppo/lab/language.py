"""The lab's language: one token a word, a chat template of three control tokens, the lab's own short prompt templates [zppo]."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path

from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Sequence as PreTokenizers
from tokenizers.pre_tokenizers import Split, WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from zppo.core.types import BCQ, NCQ, Draft, Message, Question
from zppo.lab.world import World
from zppo.prompts.book import CLOSING, COMPRESSION, PromptBook

PAD, UNKNOWN, USER, ASSISTANT, END = "<|pad|>", "<|unknown|>", "<|user|>", "<|assistant|>", "<|end|>"
CONTROL = (PAD, UNKNOWN, USER, ASSISTANT, END)
# What the prompts' neutraliser makes of think tags: the teacher reads them in the responses that it compresses.
HARMLESS_TAGS = ("[think]", "[/think]")
TAGS = ("<think>", "</think>", "<candidate>", "</candidate>", "<response>", "</response>", "<summary>", "</summary>")

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ '<|assistant|> ' + message['content'] + ' <|end|> ' }}"
    "{% else %}{{ '<|user|> ' + message['content'] + ' ' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
# A box and its closing brace, and tags, are words of their own even where no space sets them off.
_WORDS_OF_THEIR_OWN = r"\\boxed\{|\}|</?[a-z]+>"


def templates() -> dict[str, Path]:
    """The lab's short templates by name; the value for `prompts` in a recipe."""
    folder = Path(str(resources.files("zppo.lab"))) / "prompts"
    return {name: folder / f"{name}.jinja" for name in (CLOSING, BCQ, NCQ, COMPRESSION)}


def words(text: str) -> list[str]:
    """The words of a text as the tokenizer cuts it."""
    return re.sub(f"({_WORDS_OF_THEIR_OWN})", r" \1 ", text).split()


def own_words(world: World) -> tuple[str, ...]:
    """The operations and values of a world of text."""
    return (*(operation.word for operation in world.operations), *world.values)


def vocabulary(own: Iterable[str], control: Sequence[str] = CONTROL) -> list[str]:
    """Every word of a world: control tokens first, then tags, template words, and the world's own."""
    book = PromptBook(templates())
    asked = Question("vocabulary", (Message("user", "?"),), "")
    prompts = [
        book.plain(asked),
        book.render(Draft(BCQ, asked, {"candidates": ["?", "?"]})),
        book.render(Draft(NCQ, asked, {"answers": ["?"], "candidates": ["?"]})),
        book.compression("?", has_answer=True),
        book.compression("?", has_answer=False),
    ]
    shown = [word for prompt in prompts for message in prompt for word in words(message.content)]
    every: Iterable[str] = (
        *control,
        *TAGS,
        *HARMLESS_TAGS,
        "\\boxed{",
        "}",
        *shown,
        *own,
    )
    return list(dict.fromkeys(every))


def make_tokenizer(world: World) -> PreTrainedTokenizerFast:
    """The tokenizer of a world of text: whole words, decoded with single spaces between them; the template opens no think block."""
    return word_tokenizer(own_words(world))


def word_tokenizer(
    own: Iterable[str], media: Sequence[str] = (), template: str = CHAT_TEMPLATE
) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words: the lab's and `own`; `media` are special tokens that stand for pictures."""
    words_of = vocabulary(own, (*CONTROL, *media))
    model = WordLevel({word: i for i, word in enumerate(words_of)}, unk_token=UNKNOWN)
    backend = Tokenizer(model)
    backend.pre_tokenizer = PreTokenizers([Split(Regex(_WORDS_OF_THEIR_OWN), "isolated"), WhitespaceSplit()])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        unk_token=UNKNOWN,
        eos_token=END,
        additional_special_tokens=[USER, ASSISTANT, *media],
        clean_up_tokenization_spaces=False,
        chat_template=template,
    )
