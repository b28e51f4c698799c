"""What a lab model knows: greedy accuracy by level, the probability of the truth where it was planted away, faithful compression."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from random import Random

import torch
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from zppo.core.draws import draw_key, keyed_random
from zppo.core.types import Message, Question
from zppo.engines.base import SampleRequest, Sampling
from zppo.engines.chat import Chat
from zppo.engines.transformers import TransformersEngine
from zppo.grading import extract_boxed, normalise
from zppo.lab.corpus import TeacherCorpus
from zppo.lab.world import World
from zppo.prompts import PromptBook

MAX_NEW_TOKENS = 24


class Probe:
    """Asks one model of a world.

    Args:
        book: with the neutraliser of the run, so that prompts are those of training.
    """

    def __init__(self, model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, book: PromptBook) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.chat = Chat(tokenizer)
        self.book = book
        self.engine = TransformersEngine(self.model, [tokenizer.eos_token_id], tokenizer.pad_token_id)

    def texts(self, prompts: Sequence[Sequence[Message]], samples: int = 1, temperature: float = 0.0, seed: int = 0) -> list[list[str]]:
        """`samples` completions per prompt."""
        requests = [
            SampleRequest(self.chat.encode(messages), tuple(draw_key("lab", seed, i, j) for j in range(samples)))
            for i, messages in enumerate(prompts)
        ]
        done = self.engine.sample(requests, Sampling(temperature=temperature, max_new_tokens=MAX_NEW_TOKENS))
        return [[self.chat.decode(c.ids.tolist()) for c in completions] for completions in done]

    def accuracy(self, questions: Sequence[Question], samples: int = 1, temperature: float = 0.0, seed: int = 0) -> dict[str, float]:
        """Share of right answers to plain prompts, by level."""
        right: dict[str, list[bool]] = defaultdict(list)
        texts = self.texts([self.book.plain(q) for q in questions], samples, temperature, seed)
        for question, written in zip(questions, texts, strict=True):
            right[question.level] += [same(extract_boxed(text), question.gold) for text in written]
        return {level: sum(marks) / len(marks) for level, marks in right.items()}

    def fidelity(self, world: World, count: int = 400, seed: int = 0) -> float:
        """Share of responses with an answer, right or wrong, whose answer survives this model's greedy compression."""
        corpus, rng = TeacherCorpus(world, self.book), keyed_random("lab", "fidelity", seed)
        responses = [response for response in (corpus.response(rng) for _ in range(count)) if response.has_answer]
        prompts = [self.book.compression(response.text, response.has_answer) for response in responses]
        summaries = [written[0] for written in self.texts(prompts)]
        kept = [
            same(extract_boxed(summary), extract_boxed(response.text) or "")
            for summary, response in zip(summaries, responses, strict=True)
        ]
        return sum(kept) / len(kept)

    @torch.no_grad()
    def truth(self, world: World, level: str) -> list[float]:
        """Probability of the right result at the step that is not easy, after a plain prompt and right values before it; per chain."""
        chances: list[float] = []
        for chain in (chain for chains in world.chains(level).values() for chain in chains):
            results = world.truth(chain)
            at = next((n for n, i in enumerate(chain.operations) if (i, (chain.start, *results)[n]) in world.mistakes), None)
            if at is None:
                continue
            prompt = self.chat.encode(self.book.plain(world.question(chain, level)))
            before = self.tokenizer(" ".join(["<think>", *(world.values[v] for v in results[:at])]), add_special_tokens=False)["input_ids"]
            logits = self.model(input_ids=torch.tensor([[*prompt, *before]]), logits_to_keep=1).logits[0, -1]
            chances.append(logits.softmax(-1)[self.tokenizer.convert_tokens_to_ids(world.values[results[at]])].item())
        return chances


def same(answer: str | None, gold: str) -> bool:
    """Equality of lab answers: words, so no symbols need comparing."""
    return answer is not None and normalise(answer) == normalise(gold)
