"""Pretraining of the lab's tiny models: next-token loss on completions, AdamW, short warm-up, linear decay to zero [zppo].

What a lab model knows: greedy accuracy by level, the probability of the truth where it was planted away, faithful compression.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from random import Random
from typing import TypeVar

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from zppo.core.draws import draw_key, keyed_random
from zppo.core.types import ImageRef, Message, Question
from zppo.engines.base import SampleRequest, Sampling
from zppo.engines.chat import Chat
from zppo.engines.transformers import TransformersEngine
from zppo.grading import extract_boxed, normalise
from zppo.images.processor import ImageProcessor
from zppo.lab.corpus import END, Response, StudentCorpus, TeacherCorpus
from zppo.lab.world import Chain, Entry, ModelShape, Pretraining, World
from zppo.prompts import PromptBook

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
    completions = chat.tokenizer([f"{document.completion} {END}" for document in documents], add_special_tokens=False)["input_ids"]
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


def optimise(model: PreTrainedModel, how: Pretraining, losses: Callable[[int], Iterator[torch.Tensor]], report: Report) -> None:
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


MAX_NEW_TOKENS = 28
ROWS_AT_ONCE = 256


class Probe:
    """Asks one model of a world.

    Args:
        book: with the neutraliser of the run, so that prompts are those of training.
        image_processor: how the model sees; None for one that reads text only.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, book: PromptBook, image_processor: ImageProcessor | None = None
    ) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.chat = Chat(tokenizer, image_processor=image_processor)
        self.book = book
        self.engine = TransformersEngine(self.model, [tokenizer.eos_token_id], tokenizer.pad_token_id, image_processor=image_processor)

    def texts(
        self,
        prompts: Sequence[Sequence[Message]],
        samples: int = 1,
        temperature: float = 0.0,
        seed: int = 0,
        images: Sequence[tuple[ImageRef, ...]] | None = None,
    ) -> list[list[str]]:
        """`samples` completions per prompt; `images` are those of every prompt."""
        shown = images or [()] * len(prompts)
        requests = [
            SampleRequest(self.chat.encode(messages, refs), tuple(draw_key("lab", seed, i, j) for j in range(samples)), refs)
            for i, (messages, refs) in enumerate(zip(prompts, shown, strict=True))
        ]
        done = self.engine.sample(requests, Sampling(temperature=temperature, max_new_tokens=MAX_NEW_TOKENS))
        return [[self.chat.decode(c.ids.tolist()) for c in completions] for completions in done]

    def accuracy(
        self,
        questions: Sequence[Question],
        samples: int = 1,
        temperature: float = 0.0,
        seed: int = 0,
        prompt: Callable[[Question], Sequence[Message]] | None = None,
    ) -> dict[str, float]:
        """Share of right answers by level, to plain prompts or to those that `prompt` makes."""
        right: dict[str, list[bool]] = defaultdict(list)
        prompts = [(prompt or self.book.plain)(q) for q in questions]
        texts = self.texts(prompts, samples, temperature, seed, [q.images for q in questions])
        for question, written in zip(questions, texts, strict=True):
            right[question.level] += [same(extract_boxed(text), question.gold) for text in written]
        return {level: sum(marks) / len(marks) for level, marks in right.items()}

    def fidelity(self, world: World, count: int = 400, seed: int = 0) -> float:
        """Share of a world's responses with an answer, right or wrong, whose answer survives this model's greedy compression."""
        return self.copied(TeacherCorpus(world, self.book).response, count, seed)

    def copied(self, respond: Callable[[Random], Response], count: int = 400, seed: int = 0) -> float:
        """The same for responses that `respond` draws."""
        rng = keyed_random("lab", "fidelity", seed)
        responses = [response for response in (respond(rng) for _ in range(count)) if response.has_answer]
        prompts = [self.book.compression(response.text, response.has_answer) for response in responses]
        summaries = [written[0] for written in self.texts(prompts)]
        kept = [
            same(extract_boxed(summary), extract_boxed(response.text) or "") for summary, response in zip(summaries, responses, strict=True)
        ]
        return sum(kept) / len(kept)

    def truth(self, world: World, level: str, entries: Sequence[Entry], seed: int = 0) -> dict[Entry, list[float]]:
        """How likely the right results are in contexts that do not show them: plain, BCQ and NCQ prompts of all chains of an entry.

        Earlier steps of the chain are given rightly; the values are probabilities of the next token.
        """
        corpus, words = StudentCorpus(world, self.book), self.tokenizer.get_vocab()
        owners: list[Entry] = []
        rows: list[tuple[int, ...]] = []
        for entry in entries:
            rng = keyed_random("lab", "truth", seed, *entry)
            for chain in world.chains_about(level, entry, rng):
                contexts = self._contexts(corpus, chain, level, entry, rng)
                rows += contexts
                owners += [entry] * len(contexts)
        tokens = [words[world.values[world.operations[index].table[value]]] for index, value in owners]
        chances: dict[Entry, list[float]] = defaultdict(list)
        for entry, chance in zip(owners, self._next(rows, tokens), strict=True):
            chances[entry].append(chance)
        return chances

    def _contexts(self, corpus: StudentCorpus, chain: Chain, level: str, entry: Entry, rng: Random) -> list[tuple[int, ...]]:
        """Prompts of a chain as token ids, with the completion's beginning up to where the entry's result is due."""
        world, right = corpus.world, corpus.world.truth(chain)
        at = next(n for n, i in enumerate(chain.operations) if (i, (chain.start, *right)[n]) == entry)
        before = " ".join(["<think>", *(world.values[v] for v in right[:at])])
        told = self.tokenizer(before, add_special_tokens=False)["input_ids"]
        mistakes = [(*right[:at], wrong, *right[at + 1 :]) for wrong in world.mistakes[entry][:2]]
        prompts = (
            self.book.plain(world.question(chain, level)),
            corpus.bcq_prompt(chain, level, mistakes),
            corpus.ncq_prompt(chain, level, corpus.mistaken(chain, 8, rng)),
        )
        return [(*self.chat.encode(messages), *told) for messages in prompts]

    @torch.no_grad()
    def _next(self, rows: Sequence[tuple[int, ...]], tokens: Sequence[int]) -> list[float]:
        """Probability of a token after each row; rows of equal length share forward passes."""
        chances = [0.0] * len(rows)
        by_length = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        for _, same_length in groupby(by_length, key=lambda i: len(rows[i])):
            for indices in batched(same_length, ROWS_AT_ONCE):
                ids = torch.tensor([rows[i] for i in indices])  # (B, T)
                probabilities = self.model(input_ids=ids, logits_to_keep=1, use_cache=False).logits[:, -1].softmax(-1)  # (B, V)
                for i, row in zip(indices, probabilities, strict=True):
                    chances[i] = row[tokens[i]].item()
        return chances


def batched(items: Iterable[int], size: int) -> Iterator[list[int]]:
    """The items in lists of `size`, the last one shorter."""
    rest = iter(items)
    while batch := list(islice(rest, size)):
        yield batch


def same(answer: str | None, gold: str) -> bool:
    """Equality of lab answers: words, so no symbols need comparing."""
    return answer is not None and normalise(answer) == normalise(gold)
