"""The lab's language: one token a word, a chat template of three control tokens, the lab's own short prompt templates [zppo].

Pretraining documents: a prompt as the trainer would show it, and what is written under it [zppo].

The student's corpus plants *misconceptions*: about medium and hard entries the right result is rare, fixed mistakes are common. Part of it
are candidate documents (like BCQ and NCQ prompts); what they show of an operation that is not easy is wrong, always: how to read
candidates can be learnt from them, the truth cannot. The teacher's corpus is truthful, and holds compression documents.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from random import Random

from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Sequence as PreTokenizers
from tokenizers.pre_tokenizers import Split, WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from zppo.core.types import BCQ, NCQ, PLAIN, Draft, Message, Question
from zppo.grading import extract_boxed
from zppo.lab.world import Chain, Entry, World
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
    every: Iterable[str] = (*control, *TAGS, *HARMLESS_TAGS, "\\boxed{", "}", *shown, *own)
    return list(dict.fromkeys(every))


def make_tokenizer(world: World) -> PreTrainedTokenizerFast:
    """The tokenizer of a world of text: whole words, decoded with single spaces between them; the template opens no think block."""
    return word_tokenizer(own_words(world))


def word_tokenizer(own: Iterable[str], media: Sequence[str] = (), template: str = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
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


Results = tuple[int, ...]
Tables = dict[Entry, list[float]]
# Wrong rollouts of a group of eight: how many candidates an NCQ prompt shows.
NCQ_CANDIDATES = (1, 2, 3, 4, 5, 6, 7, 8)
# Draws after which a result that differs from given ones is given up.
TRIES = 16
# Share of responses in the teacher's compression documents with other operations than a question's, and of damaged ones.
ODD = 0.35
LONGEST = 18  # words of a response
MOST_DAMAGE = 3  # places of a response
MOST_STEPS = 4  # words of the thought that a compressed response keeps


@dataclass(frozen=True, slots=True)
class Document:
    """One pretraining document: the conversation, and the completion that is learnt."""

    kind: str
    messages: tuple[Message, ...]
    completion: str


@dataclass(frozen=True, slots=True)
class Response:
    """A response to compress, and its compressed form."""

    text: str
    summary: str
    has_answer: bool


class StudentCorpus:
    """Draws the student's documents."""

    def __init__(self, world: World, book: PromptBook) -> None:
        self.world = world
        self.book = book
        self.settings = world.settings.corpus
        self._believed = _tables(world, lambda index, value: world.beliefs[index, value])
        self._mistaken = _tables(world, lambda index, value: self._wrong(index, value, 0.0))
        self._strayed = _tables(world, lambda index, value: self._wrong(index, value, self.settings.stray))

    def _wrong(self, index: int, value: int, stray: float) -> tuple[float, ...]:
        """What candidate documents show of an entry: the truth if it is known. Else its mistakes, their shares moved towards even by
        `flatten`, and with probability `stray` any other wrong value; never the truth."""
        mistakes = self.world.mistakes.get((index, value))
        if mistakes is None:
            return self.world.beliefs[index, value]
        operation, size = self.world.operations[index], len(self.world.values)
        shares = self.world.settings.beliefs[operation.tier].mistakes
        flatten, total = self.settings.flatten, sum(shares)
        weights = [stray / (size - 1 - len(mistakes))] * size
        for mistake, share in zip(mistakes, shares, strict=True):
            weights[mistake] = (1 - stray) * ((1 - flatten) * share / total + flatten / len(mistakes))
        weights[operation.table[value]] = 0.0
        return tuple(weights)

    def document(self, rng: Random) -> Document:
        """One document."""
        weights = (self.settings.plain, self.settings.bcq, self.settings.ncq)
        kind = rng.choices((PLAIN, BCQ, NCQ), weights)[0]
        level = rng.choices(tuple(self.settings.levels), tuple(self.settings.levels.values()))[0]
        chain = self.world.draw_chain(level, rng)
        return {PLAIN: self._plain, BCQ: self._bcq, NCQ: self._ncq}[kind](chain, level, rng)

    def _plain(self, chain: Chain, level: str, rng: Random) -> Document:
        if self.settings.longer and rng.random() < self.settings.longer:
            chain = self.world.lengthened(chain, rng)
        results = _walk(self._believed, chain, rng)
        return Document(PLAIN, self.book.plain(self.world.question(chain, level)), self.world.completion_text(chain, results))

    def _bcq(self, chain: Chain, level: str, rng: Random) -> Document:
        """Two different candidates; the target is one of them, the one without a slip where the other has one."""
        target = _walk(self._strayed, chain, rng)
        others = (_walk(self._strayed, chain, rng) for _ in range(TRIES))
        other = next((o for o in others if o != target), target)
        if other == target or rng.random() < self.settings.slip:
            other = self._slip(self._strayed, chain, target, rng) or other
        pair = [target, other]
        rng.shuffle(pair)
        return Document(BCQ, self.bcq_prompt(chain, level, pair), self.world.completion_text(chain, target))

    def _ncq(self, chain: Chain, level: str, rng: Random) -> Document:
        """Wrong candidates, duplicates kept; the target heeds them where a mistake is left."""
        shown = self.mistaken(chain, rng.choice(NCQ_CANDIDATES), rng)
        target = _walk(self._mistaken, chain, rng)
        if rng.random() < self.settings.heed:
            others = (_walk(self._mistaken, chain, rng) for _ in range(TRIES))
            target = next((o for o in others if o not in shown), target)
        return Document(NCQ, self.ncq_prompt(chain, level, shown), self.world.completion_text(chain, target))

    def mistaken(self, chain: Chain, count: int, rng: Random) -> list[Results]:
        """Wrong results of a chain as NCQ documents show them: mistakes, and slips in easy steps (where all are easy: in every one)."""
        known = all(tier not in self.world.settings.beliefs for tier in self.world.tiers(chain))
        drawn = [_walk(self._mistaken, chain, rng) for _ in range(count)]
        slip = 1.0 if known else self.settings.slip
        return [(rng.random() < slip and self._slip(self._mistaken, chain, results, rng)) or results for results in drawn]

    def bcq_prompt(self, chain: Chain, level: str, candidates: Sequence[Results]) -> tuple[Message, ...]:
        """The prompt that shows two candidates in this order."""
        texts = tuple(self.world.summary_text(chain, results) for results in candidates)
        return self.book.render(Draft(BCQ, self.world.question(chain, level), {"candidates": texts}))

    def ncq_prompt(self, chain: Chain, level: str, wrong: Sequence[Results]) -> tuple[Message, ...]:
        """The prompt that lists wrong answers, each once, and shows all candidates."""
        slots = {
            "answers": tuple(dict.fromkeys(self.world.answer_text(chain, results) for results in wrong)),
            "candidates": tuple(self.world.summary_text(chain, results) for results in wrong),
        }
        return self.book.render(Draft(NCQ, self.world.question(chain, level), slots))

    def _slip(self, tables: Tables, chain: Chain, results: Results, rng: Random) -> Results | None:
        """The results with a random wrong value after one easy operation; what follows goes on from it. None if none is easy."""
        steps = [n for n, tier in enumerate(self.world.tiers(chain)) if tier not in self.world.settings.beliefs]
        if not steps:
            return None
        at = rng.choice(steps)
        wrong = rng.choice([v for v in range(len(self.world.values)) if v != results[at]])
        return (*results[:at], wrong, *_walk(tables, Chain(wrong, chain.operations[at + 1 :]), rng))


class TeacherCorpus:
    """Draws the teacher's documents: right answers to plain prompts, and compressions of right, wrong and broken responses."""

    def __init__(self, world: World, book: PromptBook) -> None:
        self.world = world
        self.book = book
        self._share = world.settings.teacher.compression

    def document(self, rng: Random) -> Document:
        """One document."""
        if rng.random() < self._share:
            return self._compression(rng)
        chain = self.world.draw_chain(rng.choice(tuple(self.world.levels)), rng)
        question = self.world.question(chain, "")
        return Document(PLAIN, self.book.plain(question), self.world.completion_text(chain, self.world.truth(chain)))

    def _compression(self, rng: Random) -> Document:
        response = self.response(rng)
        messages = self.book.compression(response.text, response.has_answer)
        return Document("compression", messages, " ".join(["<summary>", *words(response.summary), "</summary>"]))

    def response(self, rng: Random) -> Response:
        """What was written is to be copied, never mended: the values are arbitrary, so nothing but the response can tell them."""
        world = self.world
        chain = world.draw_chain(rng.choice(tuple(world.levels)), rng)
        if rng.random() < ODD:
            chain = Chain(chain.start, tuple(rng.randrange(len(world.operations)) for _ in chain.operations))
        results = tuple(rng.randrange(len(world.values)) for _ in chain.operations)
        written = world.completion_text(chain, results).split()
        if rng.random() < ODD:
            inserted = (*world.values, *(o.word for o in world.operations), "}", "}", "}", "</think>")
            for _ in range(rng.randint(1, MOST_DAMAGE)):
                written = damaged(written, inserted, rng)
        return compressed(" ".join(written))


def damaged(written: list[str], inserted: Sequence[str], rng: Random) -> list[str]:
    """A response as a student in training may write it: a word doubled, lost or out of place, an end cut off or said again."""
    at = rng.randrange(len(written))
    match rng.randrange(5):
        case 0:
            return [*written[: at + 1], *written[at:]]
        case 1:
            return [*written[:at], *written[at + 1 :]] or written
        case 2:
            return [*written[: at + 1], rng.choice(inserted), *written[at + 1 :]]
        case 3:
            return written[: at + 1]
        case _:
            return [*written, *written[at:]][:LONGEST]


def compressed(text: str, most_steps: int = MOST_STEPS) -> Response:
    """A response with its compressed form: the first words of its thought, and the box as it stands, if there is one."""
    answer = extract_boxed(text)
    thought = text.replace("<think>", " ").split("</think>")[0].split("\\boxed{")[0]
    steps = [word for word in thought.split() if word != "}"][:most_steps]
    box = [] if answer is None else ["\\boxed{", *words(answer), "}"]
    return Response(text, " ".join([*steps, *box]), has_answer=answer is not None)


def _tables(world: World, weights: Callable[[int, int], tuple[float, ...]]) -> Tables:
    """Cumulative weights of the results of every entry, for `random.choices`."""
    tables: Tables = {}
    for index in range(len(world.operations)):
        for value in range(len(world.values)):
            total, cumulative = 0.0, []
            for weight in weights(index, value):
                total += weight
                cumulative.append(total)
            tables[index, value] = cumulative
    return tables


def _walk(tables: Tables, chain: Chain, rng: Random) -> Results:
    """A result after each operation, drawn from the tables; each goes on from the one before."""
    results: list[int] = []
    value = chain.start
    for index in chain.operations:
        table = tables[index, value]
        value = rng.choices(range(len(table)), cum_weights=table)[0]
        results.append(value)
    return tuple(results)
