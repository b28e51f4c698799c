"""The same model, prompts, lengths and rewards for both sides; nothing in it knows who is measured.

Completions end by themselves: the model's output weights are tiny, so that each of its 200 tokens is drawn with a chance of 1/200,
and two of them end a completion. Every token therefore ends it with a chance of 1/100, and the limit is 160: lengths are geometric,
cut at 160, with a mean of 100 * (1 - 0.99**160) = 80 tokens, and one in five completions stands at the limit. Neither engine is told
anything or patched; both draw from that one distribution, and the lengths that came out stand in the results.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

VOCABULARY = 200
WORDS = tuple(f"w{i}" for i in range(193))
SPECIAL = ("<pad>", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<unk>")
ENDS = (2, 3)
TURNS = ("user", "assistant")
TEMPLATE = (
    "{% for message in messages %}<|im_start|> {{ message.role }} {{ message.content }} <|im_end|> {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
)


@dataclass(frozen=True)
class Shape:
    """How large a step is.

    Attributes:
        questions: new questions per step.
        group: rollouts per prompt.
        prompt: shortest and longest plain prompt in tokens, chat template and closing instruction included; uniform between.
        limit: new-token limit; the mean length follows from it (see above).
        layers, width: of the model.
        steps: steps that there are questions for.
        lognormal: median and spread of completions whose lengths are given; None where they end by themselves (see above).
        vocabulary: of the model; that of lengths that are given may be any.
    """

    questions: int = 16
    group: int = 8
    prompt: tuple[int, int] = (40, 80)
    limit: int = 160
    layers: int = 4
    width: int = 128
    steps: int = 64
    lognormal: tuple[float, float] | None = None
    vocabulary: int = VOCABULARY

    @property
    def mean(self) -> float:
        """Mean length of a completion, about."""
        if self.lognormal is not None:
            return self.lognormal[0] * math.exp(self.lognormal[1] ** 2 / 2)
        chance = len(ENDS) / VOCABULARY
        return (1 - (1 - chance) ** self.limit) / chance


QUICK = Shape(questions=4, group=4, prompt=(20, 30), limit=12, layers=1, width=32, steps=12)


def make_tokenizer(more: Sequence[str] = (), template: str = TEMPLATE, *, size: int = VOCABULARY, **settings: Any) -> Any:
    """One word, one token, `size` of them; `more` are special ones behind all others, `settings` the tokenizer's own."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    known = (*SPECIAL, *TURNS, *(f"w{i}" for i in range(size - len(SPECIAL) - len(TURNS))), *more)
    vocabulary = {word: i for i, word in enumerate(known)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<|im_end|>",
        unk_token="<unk>",
        additional_special_tokens=["<|im_start|>", "<|endoftext|>", *more],
        chat_template=template,
        **settings,
    )


def make_model(folder: Path, shape: Shape, *, std: float = 0.02, head: float = 1e-3) -> Path:
    """Writes the tiny random Qwen3 with its tokenizer: one word, one token.

    Args:
        std, head: standard deviation of the weights, and of those of the output layer; lengths are as said above with a small one.
    """
    import torch
    from transformers import GenerationConfig, Qwen3ForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    config = model_config(shape)
    config.initializer_range = std
    model = Qwen3ForCausalLM(config)
    torch.nn.init.normal_(model.lm_head.weight, std=head)
    model.generation_config = GenerationConfig(eos_token_id=list(ENDS), pad_token_id=0, do_sample=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def model_config(shape: Shape) -> Any:
    """Of the tiny Qwen3."""
    from transformers import Qwen3Config

    return Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=shape.width,
        intermediate_size=3 * shape.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=shape.width // 4,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=2,
    )


def make_llama(folder: Path, shape: Shape) -> Path:
    """Writes a random Llama of the shape of SmolLM2-135M, with a tokenizer of as many words as it has tokens."""
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        intermediate_size=shape.width * 8 // 3,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.width // 64,
        num_key_value_heads=shape.width // 64 // 3,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=list(ENDS), pad_token_id=0, do_sample=True)
    model.save_pretrained(folder)
    make_tokenizer(size=shape.vocabulary).save_pretrained(folder)
    return folder


def lengths(shape: Shape, count: int, call: int) -> list[int]:
    """Of so many completions, log-normal within the limit; the same for both sides at the same call."""
    assert shape.lognormal is not None
    (median, spread), rng = shape.lognormal, random.Random(call)
    return [min(shape.limit, max(4, round(rng.lognormvariate(math.log(median), spread)))) for _ in range(count)]


def user_turn(text: str) -> str:
    """What a question's turn says: its text and the closing instruction."""
    from zppo.core.types import Message, Question
    from zppo.prompts.book import PromptBook

    return PromptBook().plain(Question("", (Message("user", text),), ""))[-1].content


def words(rng: random.Random, count: int) -> str:
    """So many tokens of text."""
    return " ".join(rng.choices(WORDS, k=count))


def questions(shape: Shape) -> list[dict[str, str]]:
    """Question rows, in the order in which both sides are to meet them, `shape.questions` a step."""
    rng, fixed = random.Random(0), 5 + len(user_turn("").split())  # 5 tokens are the chat template's
    rows = []
    for i in range(shape.steps * shape.questions):
        length = max(1, rng.randint(*shape.prompt) - fixed)
        rows.append({"id": f"q{i}", "prompt": words(rng, length), "answer": WORDS[i % len(WORDS)]})
    return rows


def correct(groups: int, size: int, trivial: float, seed: int) -> list[list[bool]]:
    """Which rollouts of a batch are right: (groups, size).

    A share `trivial` of the groups, rounded, is all-wrong or all-right in turn; the others have 1, 2, ... size - 1 right ones in turn.
    Their order is shuffled.
    """
    count = round(trivial * groups)
    right = [size * (i % 2) for i in range(count)] + [1 + i % (size - 1) for i in range(groups - count)]
    rng = random.Random(seed)
    rng.shuffle(right)
    rows = [[True] * n + [False] * (size - n) for n in right]
    for row in rows:
        rng.shuffle(row)
    return rows


def completions(shape: Shape, seed: int) -> list[list[list[int]]]:
    """Token ids of a whole step's plain rollouts, from the distribution that the model samples from; for replaying through both sides."""
    rng = random.Random(seed)

    def one() -> list[int]:
        ids: list[int] = []
        for _ in range(shape.limit):
            ids.append(rng.randrange(VOCABULARY))
            if ids[-1] in ENDS:
                break
        return ids

    return [[one() for _ in range(shape.group)] for _ in range(shape.questions)]
