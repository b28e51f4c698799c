"""What the lab's tiny models are made of: a tokenizer of whole words, a Qwen3 or Qwen3-VL with random weights, an image processor [zppo].

Every word is one token, the chat template has three control tokens, and prompts use the lab's own short templates: so a model of a few
hundred thousand parameters can read them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Sequence as PreTokenizers
from tokenizers.pre_tokenizers import Split, WhitespaceSplit
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2VLImageProcessorPil,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from zppo.core.draws import draw_key
from zppo.core.types import BCQ, HINT, NCQ, Draft, Message, Question
from zppo.engines.chat import Chat
from zppo.lab.families import family_words
from zppo.lab.picture_world import CELL, PALETTE, SIDE, SIZE, WORDS, Picture, PictureWorld, pixels
from zppo.lab.world import ModelShape, World
from zppo.prompts import Neutraliser
from zppo.prompts.book import PromptBook

PAD, UNKNOWN, USER, ASSISTANT, END = "<|pad|>", "<|unknown|>", "<|user|>", "<|assistant|>", "<|end|>"
CONTROL = (PAD, UNKNOWN, USER, ASSISTANT, END)
IMAGE_PAD, VIDEO_PAD, VISION_START, VISION_END = "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"
MEDIA: tuple[str, ...] = (IMAGE_PAD, VIDEO_PAD, VISION_START, VISION_END)
# What the prompts' neutraliser makes of think tags: the teacher reads them in the responses that it compresses.
HARMLESS_TAGS = ("[think]", "[/think]")
TAGS = ("<think>", "</think>", "<candidate>", "</candidate>", "<response>", "</response>", "<summary>", "</summary>")

# The templates are part of the bundled checkpoints: their text never changes.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ '<|assistant|> ' + message['content'] + ' <|end|> ' }}"
    "{% else %}{{ '<|user|> ' + message['content'] + ' ' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
PICTURE_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ ('" + ASSISTANT + "' if message['role'] == 'assistant' else '" + USER + "') + ' ' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '" + VISION_START + IMAGE_PAD + VISION_END + "' }}{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{{ ' " + END + " ' if message['role'] == 'assistant' else ' ' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '" + ASSISTANT + "' }}{% endif %}"
)
# A box and its closing brace, and tags, are words of their own even where no space sets them off.
_WORDS_OF_THEIR_OWN = r"\\boxed\{|\}|</?[a-z]+>"

CONTEXT = 512
MERGE = 2  # patches of a token on a side
PATCH = CELL // MERGE  # pixels of a patch on a side
FRAMES = 2  # a picture counts as a film of two equal frames, as in every model of this family
GRID = SIZE // PATCH
TOKENS = (GRID // MERGE) ** 2
"""Tokens of a picture: one for every cell of the grid."""


def templates() -> dict[str, Path]:
    """The lab's short templates by name; the value for `prompts` in a recipe."""
    folder = Path(str(resources.files("zppo.lab"))) / "prompts"
    return {path.stem: path for path in sorted(folder.glob("*.jinja"))}


def lab_book(chat: Chat) -> PromptBook:
    """The prompts of a lab run: the short templates, model text made harmless."""
    return PromptBook(templates(), Neutraliser(chat.special_texts))


def words(text: str) -> list[str]:
    """The words of a text as the tokenizer cuts it."""
    return re.sub(f"({_WORDS_OF_THEIR_OWN})", r" \1 ", text).split()


def vocabulary(own: Iterable[str], control: Sequence[str]) -> list[str]:
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
    return list(dict.fromkeys((*control, *TAGS, *HARMLESS_TAGS, "\\boxed{", "}", *shown, *own)))


def _wordier(world: World) -> list[str]:
    """What a world with other writings, families and hints says besides: its words, and those of the prompts with hints."""
    settings = world.settings
    writings = [writing for writing in (settings.dialect, settings.teacher.writing) if writing is not None]
    said = [*family_words(world), *(word for writing in writings for word in writing.words)]
    if settings.corpus.hint or settings.teacher.hints:
        book = PromptBook(templates())
        asked = Question("vocabulary", (Message("user", "?"),), "")
        prompts = (book.render(Draft(HINT, asked, {"hint": "?"})), book.hinting(asked, book.stated("?")))
        said += ["<hint>", "</hint>", *(word for prompt in prompts for message in prompt for word in words(message.content))]
    return said


def make_tokenizer(world: World | PictureWorld) -> PreTrainedTokenizerFast:
    """The tokenizer of a world: whole words, decoded with single spaces between them; the template opens no think block.

    All worlds of pictures have the same one, with special tokens that stand for pictures.
    """
    own, media, template = WORDS, MEDIA, PICTURE_CHAT_TEMPLATE
    if isinstance(world, World):
        own, media, template = (*(operation.word for operation in world.operations), *world.values, *_wordier(world)), (), CHAT_TEMPLATE
    model = WordLevel({word: i for i, word in enumerate(vocabulary(own, (*CONTROL, *media)))}, unk_token=UNKNOWN)
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


def make_model(
    world: World | PictureWorld, tokenizer: PreTrainedTokenizerFast, seed: int, shape: ModelShape | None = None
) -> Qwen3ForCausalLM | Qwen3VLForConditionalGeneration:
    """A Qwen3 model, for a world of pictures a Qwen3-VL, with random weights drawn from `seed`; embeddings are tied. `shape`: the world's
    own by default."""
    shape = shape or world.settings.model
    text: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": shape.width,
        "intermediate_size": shape.feed_forward,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.heads,
        "head_dim": shape.width // shape.heads,
        "max_position_embeddings": CONTEXT,
        "tie_word_embeddings": True,
        "initializer_range": 0.05,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(draw_key("lab", "weights", seed) % 2**31)
        if isinstance(world, PictureWorld):
            return Qwen3VLForConditionalGeneration(_vision_config(world, text, tokenizer))
        return Qwen3ForCausalLM(Qwen3Config(**text))


def _vision_config(world: PictureWorld, text: dict[str, Any], tokenizer: PreTrainedTokenizerFast) -> Qwen3VLConfig:
    tower, ids = world.settings.vision, tokenizer.get_vocab()
    part = text["head_dim"] // 6  # of the rotations: as many for the time, the row and the column of a token
    return Qwen3VLConfig(
        text_config=text
        | {
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [text["head_dim"] // 2 - 2 * part, part, part],
                "mrope_interleaved": True,
            }
        },
        vision_config={
            "depth": tower.layers,
            "hidden_size": tower.width,
            "intermediate_size": tower.feed_forward,
            "num_heads": tower.heads,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": FRAMES,
            "out_hidden_size": text["hidden_size"],
            "num_position_embeddings": GRID * GRID,
            "deepstack_visual_indexes": [],
            "initializer_range": 0.05,
        },
        image_token_id=ids[IMAGE_PAD],
        video_token_id=ids[VIDEO_PAD],
        vision_start_token_id=ids[VISION_START],
        vision_end_token_id=ids[VISION_END],
        tie_word_embeddings=True,
    )


def make_processor() -> Qwen2VLImageProcessorPil:
    """Cuts a picture of SIZE by SIZE pixels into patches as it is; what is larger is made smaller."""
    half = [0.5, 0.5, 0.5]
    return Qwen2VLImageProcessorPil(
        patch_size=PATCH,
        merge_size=MERGE,
        temporal_patch_size=FRAMES,
        min_pixels=CELL * CELL,
        max_pixels=SIZE * SIZE,
        image_mean=half,
        image_std=half,
    )


def patches(pictures: Sequence[Picture]) -> torch.Tensor:
    """What `make_processor` gives for pictures of SIZE by SIZE pixels, without its detours: (pictures * GRID * GRID, values), float32."""
    colours = (PALETTE.astype(np.float64) / 255 - 0.5) / 0.5
    shown = colours.astype(np.float32)[np.stack([pixels(picture) for picture in pictures])]  # (B, SIZE, SIZE, 3)
    cut = shown.reshape(len(pictures), SIDE, MERGE, PATCH, SIDE, MERGE, PATCH, 3)
    ordered = cut.transpose(0, 1, 4, 2, 5, 7, 3, 6)  # (B, row, column, row of the patch, its column, 3, y, x)
    frames = np.repeat(ordered[:, :, :, :, :, :, None], FRAMES, axis=6)
    return torch.from_numpy(frames.reshape(len(pictures) * GRID * GRID, -1))


def grids(count: int) -> torch.Tensor:
    """How many patches pictures have: frames, rows, columns; (count, 3)."""
    return torch.tensor([[1, GRID, GRID]] * count)
