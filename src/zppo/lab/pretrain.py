"""Pretraining of the lab's tiny models: next-token loss on completions, AdamW, short warm-up, linear decay to zero [zppo]."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from zppo.core.draws import draw_key, keyed_random
from zppo.engines.chat import Chat
from zppo.lab.corpus import StudentCorpus, TeacherCorpus
from zppo.lab.language import END
from zppo.lab.settings import ModelShape, Pretraining

CONTEXT = 512
WARM_UP = 50
# Padded tokens of one forward and backward; documents of like length share one.
TOKENS_AT_ONCE = 2048

Report = Callable[[int, float], None]


@dataclass(frozen=True, slots=True)
class Row:
    """One document as token ids; the first `prompt` of them carry no loss."""

    ids: tuple[int, ...]
    prompt: int


def make_model(shape: ModelShape, tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen3ForCausalLM:
    """A Qwen3 model with random weights drawn from `seed`; embeddings are tied."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=shape.width,
        intermediate_size=shape.feed_forward,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        head_dim=shape.width // shape.heads,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        initializer_range=0.05,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(draw_key("lab", "weights", seed) % 2**31)
        return Qwen3ForCausalLM(config)


def rows(corpus: StudentCorpus | TeacherCorpus, chat: Chat, seed: int, step: int, count: int) -> list[Row]:
    """The documents of one step, the same for equal (seed, step)."""
    rng = keyed_random("lab", "corpus", seed, step)
    documents = [corpus.document(rng) for _ in range(count)]
    prompts = [chat.encode(document.messages) for document in documents]
    completions = chat.tokenizer([f"{document.completion} {END}" for document in documents], add_special_tokens=False)[
        "input_ids"
    ]
    return [Row((*prompt, *completion), len(prompt)) for prompt, completion in zip(prompts, completions, strict=True)]


AnyRow = TypeVar("AnyRow", bound=Row)


def batches(documents: Sequence[AnyRow], limit: int = TOKENS_AT_ONCE) -> list[list[AnyRow]]:
    """The documents by length, cut so that a batch padded to its longest row holds at most `limit` tokens (one row may exceed it)."""
    made: list[list[AnyRow]] = []
    for row in sorted(documents, key=lambda r: len(r.ids), reverse=True):
        if made and (len(made[-1]) + 1) * len(made[-1][0].ids) <= limit:
            made[-1].append(row)
        else:
            made.append([row])
    return made


def loss_sum(model: Qwen3ForCausalLM, batch: Sequence[Row]) -> torch.Tensor:
    """Summed negative log-probability (nats) of the completions' tokens; a scalar."""
    longest = len(batch[0].ids)
    ids = torch.zeros(len(batch), longest, dtype=torch.long)  # (B, T); padding on the right is never looked back at
    learnt = torch.zeros(len(batch), longest, dtype=torch.bool)
    for i, row in enumerate(batch):
        ids[i, : len(row.ids)] = torch.tensor(row.ids)
        learnt[i, row.prompt : len(row.ids)] = True
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state  # (B, T, D)
    logits = model.lm_head(hidden[:, :-1][learnt[:, 1:]])  # (N, V)
    return F.cross_entropy(logits.float(), ids[:, 1:][learnt[:, 1:]], reduction="sum")


def pretrain(
    model: Qwen3ForCausalLM,
    corpus: StudentCorpus | TeacherCorpus,
    chat: Chat,
    how: Pretraining,
    seed: int,
    report: Report = lambda step, loss: None,
) -> Qwen3ForCausalLM:
    """Trains the model in place on `how.steps` batches of fresh documents; deterministic on one machine and thread count.

    Args:
        report: called with (step, mean loss per completion token in nats) after every step.
    """

    def losses(step: int) -> Iterator[torch.Tensor]:
        documents = rows(corpus, chat, seed, step, how.batch)
        tokens = sum(len(row.ids) - row.prompt for row in documents)
        for batch in batches(documents):
            yield loss_sum(model, batch) / tokens

    optimise(model, how, losses, report)
    return model


def optimise(
    model: PreTrainedModel, how: Pretraining, losses: Callable[[int], Iterator[torch.Tensor]], report: Report
) -> None:
    """Takes `how.steps` optimizer steps; `losses(step)` yields parts (scalars) that add up to the loss of a step."""
    learnt = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learnt, lr=how.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    model.train()
    for step in range(how.steps):
        rate = min((step + 1) / WARM_UP, 1.0) * (1 - step / how.steps)
        for group in optimizer.param_groups:
            group["lr"] = how.learning_rate * rate
        total = 0.0
        for loss in losses(step):
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(learnt, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        report(step, total)
    model.eval()
