"""Pretraining of the lab's tiny models, and what they know afterwards [zppo].

Next-token loss on completions, AdamW, a short warm-up, linear decay to zero. `Probe` measures greedy accuracy by level, the probability of
the truth where the corpus hides it, and whether compressions keep the answer.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Qwen3ForCausalLM, Qwen3VLForConditionalGeneration
from transformers.utils import logging

from zppo.core.draws import draw_key, keyed_random
from zppo.core.types import ImageRef, Message, Question
from zppo.engines.base import SampleRequest, Sampling
from zppo.engines.chat import Chat
from zppo.engines.transformers import TransformersEngine
from zppo.grading import extract_boxed, normalise
from zppo.images.processor import ImageProcessor
from zppo.images.store import PixelLimits
from zppo.lab.corpus import ChainStudentCorpus, Corpus, Response
from zppo.lab.models import END, IMAGE_PAD, TOKENS, VISION_END, VISION_START, grids, lab_book, patches
from zppo.lab.picture_world import SIZE, Picture, cell_words, draw_chart, draw_scene
from zppo.lab.world import Chain, Entry, Pretraining, World
from zppo.prompts import PromptBook

WARM_UP = 50
CHARTS = 0.4  # share of charts among the pictures that the vision tower is trained on
ALIKE = 8.0  # how much more a word counts that is nearer by one, in nats: keeps a picture's tokens as long as words are

Report = Callable[[int, float], None]


@dataclass(frozen=True, slots=True)
class TokenizedDocument:
    """One document as token ids, and the picture that stands in them, if there is one; the first `prompt` ids carry no loss."""

    ids: tuple[int, ...]
    prompt: int
    picture: Picture | None = None


def tokenized(corpus: Corpus[Any, Any], chat: Chat, seed: int, step: int, count: int) -> list[TokenizedDocument]:
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
        made.append(TokenizedDocument((*prompt, *completion), len(prompt), document.picture))
    return made


def with_picture(ids: Sequence[int], chat: Chat) -> tuple[int, ...]:
    """A prompt's token ids with the places of a picture's tokens, which stand at the start of its one turn."""
    vocabulary = chat.tokenizer.get_vocab()
    places = (vocabulary[VISION_START], *[vocabulary[IMAGE_PAD]] * TOKENS, vocabulary[VISION_END])
    return (ids[0], *places, *ids[1:])


def batches(documents: Sequence[TokenizedDocument], limit: int) -> list[list[TokenizedDocument]]:
    """The documents by length, cut so that a batch padded to its longest one holds at most `limit` tokens (one alone may exceed it)."""
    made: list[list[TokenizedDocument]] = []
    for document in sorted(documents, key=lambda d: len(d.ids), reverse=True):
        if made and (len(made[-1]) + 1) * len(made[-1][0].ids) <= limit:
            made[-1].append(document)
        else:
            made.append([document])
    return made


def loss_sum(model: PreTrainedModel, batch: Sequence[TokenizedDocument]) -> torch.Tensor:
    """Summed negative log-probability (nats) of the completions' tokens; a scalar. All documents have a picture, or none has."""
    network: Any = model
    longest = max(len(document.ids) for document in batch)
    ids = torch.zeros(len(batch), longest, dtype=torch.long)  # (B, T); padding on the right is never looked back at
    learnt = torch.zeros(len(batch), longest, dtype=torch.bool)
    for i, document in enumerate(batch):
        ids[i, : len(document.ids)] = torch.tensor(document.ids)
        learnt[i, document.prompt : len(document.ids)] = True
    vision = {}
    if pictures := [document.picture for document in batch if document.picture is not None]:
        kinds = (ids[:1] == network.config.image_token_id).long()
        places, _ = network.model.get_rope_index(ids[:1], kinds, grids(1))  # pictures stand at the same place in all documents
        vision = {
            "pixel_values": patches(pictures),
            "image_grid_thw": grids(len(pictures)),
            "position_ids": places.expand(-1, len(batch), -1),
        }
    hidden = network.model(input_ids=ids, use_cache=False, **vision).last_hidden_state  # (B, T, D)
    logits = network.lm_head(hidden[:, :-1][learnt[:, 1:]])  # (N, V)
    return F.cross_entropy(logits.float(), ids[:, 1:][learnt[:, 1:]], reduction="sum")


def pretrain(
    model: PreTrainedModel, corpus: Corpus[Any, Any], chat: Chat, how: Pretraining, seed: int, report: Report = lambda step, loss: None
) -> None:
    """Trains the model in place on `how.steps` batches of fresh documents; deterministic on one machine and thread count.

    A vision tower is left as it is: `pretrain_vision` comes first.

    Args:
        report: called with (step, mean loss per completion token in nats) after every step.
    """

    def losses(step: int) -> Iterator[torch.Tensor]:
        documents = tokenized(corpus, chat, seed, step, how.batch)
        tokens = sum(len(document.ids) - document.prompt for document in documents)
        for alike in ([d for d in documents if d.picture], [d for d in documents if not d.picture]):
            for batch in batches(alike, how.tokens):
                yield loss_sum(model, batch) / tokens

    tower = model.model.visual if isinstance(model, Qwen3VLForConditionalGeneration) else torch.nn.Identity()
    tower.requires_grad_(False)
    optimise(model, how, losses, report)
    tower.requires_grad_(True)


def word_logits(model: Qwen3VLForConditionalGeneration, pictures: Sequence[Picture]) -> torch.Tensor:
    """How alike every token of a picture is to every word, where both enter the language model: logits (pictures * TOKENS, V)."""
    encoded = model.model.get_image_features(patches(pictures), grids(len(pictures)), return_dict=True)
    features = torch.cat(list(encoded.pooler_output))
    return ALIKE * F.linear(features, model.lm_head.weight)  # a word's vector is the same at either end


def pretrain_vision(
    model: Qwen3VLForConditionalGeneration, chat: Chat, how: Pretraining, seed: int, report: Report = lambda step, loss: None
) -> None:
    """Trains the vision tower before any document: a picture's token is to be what lies in its cell, in the model's own words.

    Its three words (`zppo.lab.picture_world.cell_words`) are equally likely. Language comes to pictures that mean something
    this way, in a tenth of the steps; loss in nats per token of a picture.
    """
    ids = chat.tokenizer.get_vocab()

    def losses(step: int) -> Iterator[torch.Tensor]:
        rng = keyed_random("lab", "sight", seed, step)
        pictures = [draw_chart(rng) if rng.random() < CHARTS else draw_scene(rng) for _ in range(how.batch)]
        wanted = torch.tensor([[ids[word] for word in words] for p in pictures for words in cell_words(p)])  # (N, 3)
        yield -word_logits(model, pictures).log_softmax(-1).gather(1, wanted).mean()

    optimise(model, how, losses, report)


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
PROMPTS_AT_ONCE = 256
LIMITS = PixelLimits(SIZE * SIZE, SIZE * SIZE)
"""Pictures are shown as they are drawn."""


def probe_of(folder: Path) -> Probe:
    """A checkpoint as it lies there, with or without a vision tower, ready to be asked."""
    logging.disable_progress_bar()  # so small a model is there at once
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    vision = (folder / "preprocessor_config.json").is_file()
    model: Any = Qwen3VLForConditionalGeneration if vision else Qwen3ForCausalLM
    image_processor = ImageProcessor.load(folder, tokenizer, LIMITS) if vision else None
    return Probe(model.from_pretrained(folder, dtype=torch.float32), tokenizer, lab_book(Chat(tokenizer)), image_processor)


class Probe:
    """Asks one model of a world.

    Args:
        book: with the neutraliser of the run, so that prompts are those of training.
        image_processor: of a model with a vision tower.
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
            right[question.level] += [same(extract_boxed(text), str(question.gold)) for text in written]
        return {level: sum(marks) / len(marks) for level, marks in right.items()}

    def fidelity(self, respond: Callable[[Random], Response], count: int = 400, seed: int = 0) -> float:
        """Share of the responses with an answer, right or wrong, whose answer survives this model's greedy compression."""
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
        corpus, words = ChainStudentCorpus(world, self.book), self.tokenizer.get_vocab()
        owners: list[Entry] = []
        rows: list[tuple[int, ...]] = []
        for entry in entries:
            rng = keyed_random("lab", "truth", seed, *entry)
            for chain in world.chains_about(level, entry, rng):
                contexts = self._contexts(corpus, chain, entry, rng)
                rows += contexts
                owners += [entry] * len(contexts)
        tokens = [words[world.values[world.operations[index].table[value]]] for index, value in owners]
        chances: dict[Entry, list[float]] = defaultdict(list)
        for entry, chance in zip(owners, self._next(rows, tokens), strict=True):
            chances[entry].append(chance)
        return chances

    def _contexts(self, corpus: ChainStudentCorpus, chain: Chain, entry: Entry, rng: Random) -> list[tuple[int, ...]]:
        """Prompts of a chain as token ids, with the completion's beginning up to where the entry's result is due."""
        world, right = corpus.world, corpus.world.truth(chain)
        at = next(n for n, i in enumerate(chain.operations) if (i, (chain.start, *right)[n]) == entry)
        before = " ".join(["<think>", *(world.values[v] for v in right[:at])])
        written = self.tokenizer(before, add_special_tokens=False)["input_ids"]
        mistakes = [(*right[:at], wrong, *right[at + 1 :]) for wrong in world.mistakes[entry][:2]]
        prompts = (
            self.book.plain(world.question(chain)),
            corpus.bcq_prompt(chain, mistakes),
            corpus.ncq_prompt(chain, corpus.mistaken(chain, 8, rng)),
        )
        return [(*self.chat.encode(messages), *written) for messages in prompts]

    @torch.no_grad()
    def _next(self, rows: Sequence[tuple[int, ...]], tokens: Sequence[int]) -> list[float]:
        """Probability of a token after each row; rows of equal length share forward passes."""
        chances = [0.0] * len(rows)
        by_length = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        for _, same_length in groupby(by_length, key=lambda i: len(rows[i])):
            every = list(same_length)
            for indices in (every[start : start + PROMPTS_AT_ONCE] for start in range(0, len(every), PROMPTS_AT_ONCE)):
                ids = torch.tensor([rows[i] for i in indices])  # (B, T)
                probabilities = self.model(input_ids=ids, logits_to_keep=1, use_cache=False).logits[:, -1].softmax(-1)  # (B, V)
                for i, row in zip(indices, probabilities, strict=True):
                    chances[i] = row[tokens[i]].item()
        return chances


def same(answer: str | None, gold: str) -> bool:
    """Equality of lab answers: words, so no symbols need comparing."""
    return answer is not None and normalise(answer) == normalise(gold)
