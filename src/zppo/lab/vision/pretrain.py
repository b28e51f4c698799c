"""The models that see: a tiny Qwen3-VL with its tokenizer and image processor, and its pretraining [zppo]."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2VLImageProcessorPil,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from zppo.core.draws import draw_key, keyed_random
from zppo.engines.chat import Chat
from zppo.lab import pretrain
from zppo.lab.language import ASSISTANT, END, USER, word_tokenizer
from zppo.lab.pretrain import CONTEXT, Report, batches, optimise
from zppo.lab.settings import Pretraining
from zppo.lab.vision.corpus import Document
from zppo.lab.vision.kinds import WORDS, cell_words
from zppo.lab.vision.pictures import CELL, PALETTE, SIDE, SIZE, Picture, draw_chart, draw_scene, pixels
from zppo.lab.vision.settings import VisionSettings

IMAGE_PAD, VIDEO_PAD, VISION_START, VISION_END = "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"
MEDIA = (IMAGE_PAD, VIDEO_PAD, VISION_START, VISION_END)
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ ('" + ASSISTANT + "' if message['role'] == 'assistant' else '" + USER + "') + ' ' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '"
    + VISION_START
    + IMAGE_PAD
    + VISION_END
    + "' }}{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{{ ' " + END + " ' if message['role'] == 'assistant' else ' ' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '" + ASSISTANT + "' }}{% endif %}"
)
MERGE = 2  # patches of a token on a side
PATCH = CELL // MERGE  # pixels of a patch on a side
FRAMES = 2  # a picture counts as a film of two equal frames, as in every model of this family
CHARTS = 0.4  # share of charts among the pictures that seeing is learnt from
ALIKE = 8.0  # how much more a word counts that is nearer by one, in nats: keeps a picture's tokens as long as words are
GRID = SIZE // PATCH
TOKENS = (GRID // MERGE) ** 2
"""Tokens of a picture: one for every cell of the grid."""


@dataclass(frozen=True, slots=True)
class Row(pretrain.Row):
    """One document as token ids, and the picture that stands in them; compressions have none."""

    picture: Picture | None


def make_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of all worlds of pictures."""
    return word_tokenizer(WORDS, MEDIA, CHAT_TEMPLATE)


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


def make_model(
    settings: VisionSettings, tokenizer: PreTrainedTokenizerFast, seed: int
) -> Qwen3VLForConditionalGeneration:
    """A Qwen3-VL model with random weights drawn from `seed`; embeddings are tied."""
    text, sight = settings.model, settings.vision
    ids = tokenizer.get_vocab()
    head = text.width // text.heads
    part = head // 6  # of the rotations: as many for the time, the row and the column of a token
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": text.width,
            "intermediate_size": text.feed_forward,
            "num_hidden_layers": text.layers,
            "num_attention_heads": text.heads,
            "num_key_value_heads": text.heads,
            "head_dim": head,
            "max_position_embeddings": CONTEXT,
            "initializer_range": 0.05,
            "tie_word_embeddings": True,
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [head // 2 - 2 * part, part, part],
                "mrope_interleaved": True,
            },
        },
        vision_config={
            "depth": sight.layers,
            "hidden_size": sight.width,
            "intermediate_size": sight.feed_forward,
            "num_heads": sight.heads,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": FRAMES,
            "out_hidden_size": text.width,
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
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(draw_key("lab", "weights", seed) % 2**31)
        return Qwen3VLForConditionalGeneration(config)


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


def look(model: Qwen3VLForConditionalGeneration, pictures: Sequence[Picture]) -> torch.Tensor:
    """How alike every token of a picture is to every word, where both enter the language model: logits (pictures * TOKENS, V)."""
    seen = model.model.get_image_features(patches(pictures), grids(len(pictures)), return_dict=True)
    features = torch.cat(list(seen.pooler_output))
    return ALIKE * F.linear(features, model.lm_head.weight)  # a word's vector is the same at either end


def learn_to_see(
    model: Qwen3VLForConditionalGeneration,
    chat: Chat,
    how: Pretraining,
    seed: int,
    report: Report = lambda step, loss: None,
) -> None:
    """Teaches the part that sees, before any document: a picture's token is to be what lies in its cell, in the model's own words.

    Its three words (`zppo.lab.vision.kinds.cell_words`) are equally likely. Language comes to pictures that mean something
    this way, in a tenth of the steps; loss in nats per token of a picture.
    """
    ids = chat.tokenizer.get_vocab()

    def losses(step: int) -> Iterator[torch.Tensor]:
        rng = keyed_random("lab", "sight", seed, step)
        pictures = [draw_chart(rng) if rng.random() < CHARTS else draw_scene(rng) for _ in range(how.batch)]
        wanted = torch.tensor([[ids[word] for word in words] for p in pictures for words in cell_words(p)])  # (N, 3)
        yield -look(model, pictures).log_softmax(-1).gather(1, wanted).mean()

    optimise(model, how, losses, report)


def with_picture(ids: Sequence[int], chat: Chat) -> tuple[int, ...]:
    """A prompt's token ids with the places of a picture's tokens, which stand at the start of its one turn."""
    vocabulary = chat.tokenizer.get_vocab()
    places = (vocabulary[VISION_START], *[vocabulary[IMAGE_PAD]] * TOKENS, vocabulary[VISION_END])
    return (ids[0], *places, *ids[1:])


class Corpus(Protocol):
    """Where documents come from."""

    def document(self, rng: Random) -> Document:
        """One document."""
        ...


def rows(corpus: Corpus, chat: Chat, seed: int, step: int, count: int) -> list[Row]:
    """The documents of one step, the same for equal (seed, step)."""
    rng = keyed_random("lab", "corpus", seed, step)
    documents = [corpus.document(rng) for _ in range(count)]
    texts = [f"{document.completion} {END}" for document in documents]
    completions = chat.tokenizer(texts, add_special_tokens=False)["input_ids"]
    made = []
    for document, completion in zip(documents, completions, strict=True):
        prompt = chat.encode(document.messages)
        if document.picture is not None:
            prompt = with_picture(prompt, chat)
        made.append(Row((*prompt, *completion), len(prompt), document.picture))
    return made


def loss_sum(model: Qwen3VLForConditionalGeneration, batch: Sequence[Row]) -> torch.Tensor:
    """Summed negative log-probability (nats) of the completions' tokens; a scalar. All rows have a picture, or none has."""
    longest = max(len(row.ids) for row in batch)
    ids = torch.zeros(len(batch), longest, dtype=torch.long)  # (B, T); padding on the right is never looked back at
    learnt = torch.zeros(len(batch), longest, dtype=torch.bool)
    for i, row in enumerate(batch):
        ids[i, : len(row.ids)] = torch.tensor(row.ids)
        learnt[i, row.prompt : len(row.ids)] = True
    seen = {}
    if pictures := [row.picture for row in batch if row.picture is not None]:
        kinds = (ids[:1] == model.config.image_token_id).long()
        places, _ = model.model.get_rope_index(ids[:1], kinds, grids(1))  # pictures stand at the same place in all rows
        seen = {
            "pixel_values": patches(pictures),
            "image_grid_thw": grids(len(pictures)),
            "position_ids": places.expand(-1, len(batch), -1),
        }
    hidden = model.model(input_ids=ids, use_cache=False, **seen).last_hidden_state  # (B, T, D)
    logits = model.lm_head(hidden[:, :-1][learnt[:, 1:]])  # (N, V)
    return F.cross_entropy(logits.float(), ids[:, 1:][learnt[:, 1:]], reduction="sum")


def pretrain_seeing(
    model: Qwen3VLForConditionalGeneration,
    corpus: Corpus,
    chat: Chat,
    how: Pretraining,
    seed: int,
    report: Report = lambda step, loss: None,
) -> Qwen3VLForConditionalGeneration:
    """Trains the model in place on `how.steps` batches of fresh documents; see `zppo.lab.pretrain.pretrain`. What sees is left as it is."""

    model.model.visual.requires_grad_(False)

    def losses(step: int) -> Iterator[torch.Tensor]:
        documents = rows(corpus, chat, seed, step, how.batch)
        tokens = sum(len(row.ids) - row.prompt for row in documents)
        for alike in ([r for r in documents if r.picture], [r for r in documents if not r.picture]):
            for batch in batches(alike):
                yield loss_sum(model, batch) / tokens

    optimise(model, how, losses, report)
    model.model.visual.requires_grad_(True)
    return model
