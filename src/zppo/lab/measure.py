"""What a lab model knows: greedy accuracy by level, the probability of the truth where it was planted away, faithful compression."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby, islice
from random import Random

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from zppo.core.draws import draw_key, keyed_random
from zppo.core.types import ImageRef, Message, Question
from zppo.engines.base import SampleRequest, Sampling
from zppo.engines.chat import Chat
from zppo.engines.transformers import TransformersEngine
from zppo.grading import extract_boxed, normalise
from zppo.images.processor import Sight
from zppo.lab.corpus import Response, StudentCorpus, TeacherCorpus
from zppo.lab.world import Chain, Entry, World
from zppo.prompts import PromptBook

MAX_NEW_TOKENS = 28
ROWS_AT_ONCE = 256


class Probe:
    """Asks one model of a world.

    Args:
        book: with the neutraliser of the run, so that prompts are those of training.
        sight: how the model sees; None for one that reads text only.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerFast,
        book: PromptBook,
        sight: Sight | None = None,
    ) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.chat = Chat(tokenizer, sight=sight)
        self.book = book
        self.engine = TransformersEngine(self.model, [tokenizer.eos_token_id], tokenizer.pad_token_id, sight=sight)

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
            SampleRequest(
                self.chat.encode(messages, refs), tuple(draw_key("lab", seed, i, j) for j in range(samples)), refs
            )
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
            same(extract_boxed(summary), extract_boxed(response.text) or "")
            for summary, response in zip(summaries, responses, strict=True)
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

    def _contexts(
        self, corpus: StudentCorpus, chain: Chain, level: str, entry: Entry, rng: Random
    ) -> list[tuple[int, ...]]:
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
                probabilities = (
                    self.model(input_ids=ids, logits_to_keep=1, use_cache=False).logits[:, -1].softmax(-1)
                )  # (B, V)
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
