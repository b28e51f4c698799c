"""Tiny random vision-language checkpoints, one for each family, and pictures to show to them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, cast

import numpy
import torch
from PIL import Image
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)

from conftest import make_tokenizer
from zppo.core.types import ImageRef

KINDS = ("qwen3_5", "qwen3_vl", "qwen2_5_vl", "smolvlm", "gemma3")
PIXELS = {"min_pixels": 16 * 16, "max_pixels": 24 * 24}  # of tiny pictures for tiny models

_BEGIN = "{% for message in messages %}<|im_start|>{{ message.role }}\n"
_END = "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
TEMPLATE = (  # takes texts and lists of parts, as Qwen's; PICTURE is the placeholder
    _BEGIN
    + "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    + "{% if part.type == 'image' %}{{ 'PICTURE' }}{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}"
    + _END
)
PARTS_TEMPLATE = (  # goes over parts alone, as SmolVLM's
    _BEGIN
    + "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}"
    + "{% elif part['type'] == 'image' %}{{ 'PICTURE' }}{% endif %}{% endfor %}"
    + _END
)
TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "bos_token_id": None,
}
_QWEN_IDS = {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>", "vision_start_token_id": "<|vision_start|>"}
_QWEN_IDS["vision_end_token_id"] = "<|vision_end|>"


def make_seeing(path: Path, kind: str = "qwen3_vl", seed: int = 0, std: float = 0.15, **text: Any) -> Path:
    """A checkpoint of a family with its tokenizer and image processor; `text` overrides fields of its language model."""
    tokenizer = _tokenizer(kind)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _model(kind, tokenizer, text)
        for weight in model.parameters():
            if weight.ndim >= 2:
                torch.nn.init.normal_(weight, std=std)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    for name, content in _processor_files(kind).items():
        (path / name).write_text(json.dumps(content), encoding="utf-8")
    return path


def _tokenizer(kind: str) -> PreTrainedTokenizerFast:
    tokenizer = make_tokenizer()
    named: dict[str, str] = {}
    if kind.startswith("qwen"):
        tokens, shown, template = list(_QWEN_IDS.values()), "<|vision_start|><|image_pad|><|vision_end|>", TEMPLATE
    elif kind == "smolvlm":
        rows = [f"<row_{r}_col_{c}>" for r in (1, 2, 3) for c in (1, 2, 3)]
        tokens = ["<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>", *rows]
        shown, template = "<image>", PARTS_TEMPLATE
    else:
        named = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
        tokens, shown, template = list(named.values()), "<start_of_image>", TEMPLATE
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", *tokens]})
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>", *tokens],
        extra_special_tokens=named or None,
        chat_template=template.replace("PICTURE", shown),
    )


def _model(kind: str, tokenizer: PreTrainedTokenizerFast, more: dict[str, Any]) -> PreTrainedModel:
    def token(name: str) -> int:
        return int(cast(int, tokenizer.convert_tokens_to_ids(name)))

    size = {**TEXT, "vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    vision: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "patch_size": 4}
    ids: dict[str, Any] = {name: token(text) for name, text in _QWEN_IDS.items()} if kind.startswith("qwen") else {}
    if kind == "qwen3_5":
        linear = {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
        rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 0], "partial_rotary_factor": 0.25}
        size |= {**linear, "head_dim": 16, "num_hidden_layers": 4, "rope_parameters": rope, **more}
        vision |= {"depth": 2, "num_heads": 2, "out_hidden_size": 32, "num_position_embeddings": 36}
        return Qwen3_5ForConditionalGeneration(Qwen3_5Config(text_config=size, vision_config=vision, tie_word_embeddings=False, **ids))
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
    if kind == "qwen3_vl":
        size |= {"head_dim": 8, "rope_parameters": rope, **more}
        vision |= {"depth": 3, "num_heads": 2, "out_hidden_size": 32, "num_position_embeddings": 36, "deepstack_visual_indexes": [0, 1]}
        return Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=size, vision_config=vision, tie_word_embeddings=False, **ids))
    if kind == "qwen2_5_vl":
        size |= {"rope_parameters": rope, **more}
        vision |= {"depth": 2, "num_heads": 2, "out_hidden_size": 32, "window_size": 16, "fullatt_block_indexes": [1]}
        config: Any = Qwen2_5_VLConfig(text_config=size, vision_config=vision, tie_word_embeddings=False, **ids)
        return Qwen2_5_VLForConditionalGeneration(config)
    vision |= {"num_hidden_layers": 2, "num_attention_heads": 2}
    if kind == "smolvlm":
        text = {"model_type": "llama", **size, **more}
        config = SmolVLMConfig(
            text_config=text,
            vision_config={**vision, "image_size": 16},
            scale_factor=2,
            image_token_id=token("<image>"),
            tie_word_embeddings=False,
            pad_token_id=tokenizer.pad_token_id,  # type: ignore[call-arg]
        )
        return SmolVLMForConditionalGeneration(config)
    text = {**size, "head_dim": 8, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"], **more}
    return Gemma3ForConditionalGeneration(
        Gemma3Config(
            text_config=text,
            vision_config={**vision, "image_size": 16},
            mm_tokens_per_image=4,
            image_token_index=token("<image_soft_token>"),
            boi_token_index=token("<start_of_image>"),
            eoi_token_index=token("<end_of_image>"),
            tie_word_embeddings=False,
        )
    )


def _processor_files(kind: str) -> dict[str, dict[str, Any]]:
    half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    if kind.startswith("qwen"):
        images = {"image_processor_type": "Qwen2VLImageProcessorFast", "patch_size": 4, "merge_size": 2, "temporal_patch_size": 2, **half}
        return {"preprocessor_config.json": images}
    if kind == "smolvlm":
        images = {
            "image_processor_type": "SmolVLMImageProcessor",
            "size": {"longest_edge": 32},
            "max_image_size": {"longest_edge": 16},
            **half,
        }
        return {"preprocessor_config.json": images, "processor_config.json": {"image_seq_len": 4}}
    images = {"image_processor_type": "Gemma3ImageProcessor", "size": {"height": 16, "width": 16}, **half}
    return {"preprocessor_config.json": images, "processor_config.json": {"image_seq_length": 4}}


def make_picture(folder: Path, seed: int, width: int = 20, height: int = 16) -> ImageRef:
    """A picture of random blocks of colour as a PNG file."""
    rng = numpy.random.default_rng(seed)
    blocks = rng.integers(0, 256, (max(1, height // 4), max(1, width // 4), 3), dtype=numpy.uint8)
    path = folder / f"picture-{seed}-{width}x{height}.png"
    Image.fromarray(blocks).resize((width, height), Image.Resampling.NEAREST).save(path)
    return ImageRef(str(path), hashlib.sha256(path.read_bytes()).hexdigest())
