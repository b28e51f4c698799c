"""Whether a step gets shorter where the teacher is asked while the student samples: the paper's step for a 9B student, simulated.

Student and teacher are vLLM's on cards of their own, from the memory that a pass over a batch reads. What they write is invented: lengths
are log-normal with one in ten at the limit. Who is asked, when, and what is waited for is the step's.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
import statistics
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from benchmarks.common import Options, run
from benchmarks.tables import markdown

# The step: recipes/qwen3.5-9b.yaml.
NEW, REPLAYED, SIZE, TEACHER_SIZE, LIMIT, TAU = 384, 96, 8, 4, 12_288, 0.5
CAP = 96
REACH = 63  # questions that are asked about ahead: 1.3 times those that the slots take at least
PROMPT = 600  # tokens of a question with its image
CONCURRENCY = 64  # requests under way: the default of teacher.concurrency

# Lengths: log-normal, this median, 10% at the limit; half of the variance is the question's. Harder questions have longer answers.
MEDIAN, AT_LIMIT, SHARED, LONGER = 3_000, 1.2816, 0.5, 0.5
SUMMARY, SUMMARY_PROMPT, SUMMARY_FAILS = (100, 300), 200, 0.1  # tokens written, tokens of its instructions, share that is drawn anew
REDRAWS = 3

# A card: 80 GB, 3.35 TB/s, 990 TFLOP/s in bf16 (NVIDIA's H100 SXM); what vLLM reaches of it, and what a pass costs beside it.
MEMORY, BANDWIDTH, MATRIX = 80e9, 3.35e12, 990e12
REACHED, PREFILL, PASS = 0.6, 0.45, 0.005
NEXT_CARD = 2250e12  # of the card that trains in the recipe: 180 GB, bf16 (NVIDIA's B200)
SHARED_CARD = 0.6  # of the memory, where vLLM is in the trainer's process and gives it back for the update
USED = 0.88  # of the memory: vLLM's 0.92 less what a pass needs
RESERVE = 4_500  # tokens that memory is set aside for in a row, of teacher and reformulated rollouts
MOST_ROWS = 1024  # vLLM's max_num_seqs on such a card
TRAINED = 0.4  # of the matrix rate, in training
PASSES = 10  # FLOPs a parameter and token of an update: old log-probs 2, forward 2, forward again 2, backward 4
SHOWN, MIXED_AGAIN = 1_000, 0.6  # tokens of the candidates in a reformulated prompt; share of their groups that have a gradient
OTHER = 60  # seconds of weights sent, checks and files


class Clock:
    """Simulated time: what is to happen, in order."""

    def __init__(self) -> None:
        self.now, self._count = 0.0, itertools.count()
        self._heap: list[tuple[float, int, Callable[[], None]]] = []

    def at(self, when: float, what: Callable[[], None]) -> None:
        heapq.heappush(self._heap, (max(when, self.now), next(self._count), what))

    def run(self, until: Callable[[], bool]) -> None:
        while not until():
            self.now, _, what = heapq.heappop(self._heap)
            what()


@dataclass(frozen=True)
class Served:
    """A model on a card.

    Attributes:
        weights: bytes that every pass reads.
        parameters: of the model; a token takes two FLOPs of each.
        per_token, per_row: bytes of keys and values of a token; of a row's recurrent states, which a pass reads and writes.
        matrix: FLOP/s of the card in the model's precision.
        used: share of the card's memory.
    """

    weights: float
    parameters: float
    per_token: float
    per_row: float
    matrix: float = MATRIX
    used: float = USED

    def seconds(self, rows: int, context: float) -> float:
        """Of one pass that gives every row a token; `context` are the tokens of all rows together."""
        moved = self.weights + self.per_token * context + 2 * self.per_row * rows
        return PASS + max(moved / (REACHED * BANDWIDTH), 2 * self.parameters * rows / (PREFILL * self.matrix))

    def reads(self, tokens: float) -> float:
        """Seconds of the pass over a prompt."""
        return 2 * self.parameters * tokens / (PREFILL * self.matrix)

    @property
    def room(self) -> float:
        return self.used * MEMORY - self.weights


@dataclass(frozen=True)
class Api:
    """A provider: every row has the same speed, however many there are; its latency stands for the reading."""

    pace: float
    latency: float = 1.0
    per_token = per_row = 0.0
    room = math.inf

    def seconds(self, rows: int, context: float) -> float:
        return 1 / self.pace

    def reads(self, tokens: float) -> float:
        return 0.0


@dataclass(eq=False)
class Row:
    """A completion that is sampled; `fresh` tokens of its prompt are read for it."""

    prompt: int
    fresh: int
    tokens: int
    done: Callable[[], None]
    reserve: float
    began: float | None = None
    gone: bool = False


class Card:
    """A vLLM: rows join as soon as there is memory, first come first served, and all advance by a token a pass.

    A row's memory is set aside at its start, for its prompt and the mean of what rows of its kind write; vLLM would take some back in need.
    """

    def __init__(self, clock: Clock, served: Served | Api) -> None:
        self.clock, self.served = clock, served
        self.waiting: deque[Row] = deque()
        self.rows: list[tuple[float, int, Row]] = []
        self.count, self.numbers = 0, itertools.count()
        self.tokens = self.at = self.busy_until = self.context = self.held = 0.0
        self.step, self.version = 1.0, 0

    @property
    def load(self) -> int:
        return self.count + len(self.waiting)

    def add(self, rows: Sequence[Row]) -> None:
        self._settle()
        self.waiting.extend(rows)
        self._go_on()

    def drop(self, row: Row) -> None:
        """A client that broke off."""
        self._settle()
        if row in self.waiting:
            self.waiting.remove(row)
        elif row.began is not None and not row.gone:
            self._leave(row)
        row.gone = True
        self._go_on()

    def _leave(self, row: Row) -> None:
        row.gone = True
        self.count -= 1
        self.context -= row.prompt - (row.began or 0.0)
        self.held -= self._needs(row)

    def _needs(self, row: Row) -> float:
        return self.served.per_row + self.served.per_token * (row.prompt + row.reserve)

    def _settle(self) -> None:
        begins = max(self.at, self.busy_until)
        if self.clock.now > begins:
            self.tokens += (self.clock.now - begins) / self.step
        self.at = self.clock.now

    def _go_on(self) -> None:
        while self.waiting and self.count < MOST_ROWS and self.held + self._needs(self.waiting[0]) <= self.served.room:
            row = self.waiting.popleft()
            row.began = self.tokens
            self.count += 1
            self.context += row.prompt - row.began
            self.held += self._needs(row)
            self.busy_until = max(self.busy_until, self.clock.now) + self.served.reads(row.fresh)
            heapq.heappush(self.rows, (self.tokens + row.tokens, next(self.numbers), row))
        while self.rows and self.rows[0][2].gone:
            heapq.heappop(self.rows)
        self.version += 1
        if self.rows:
            self.step = self.served.seconds(self.count, self.context + self.count * self.tokens)
            ends = max(self.clock.now, self.busy_until) + max(0.0, self.rows[0][0] - self.tokens) * self.step
            self.clock.at(ends, lambda version=self.version: self._fire(version))  # type: ignore[misc]

    def _fire(self, version: int) -> None:
        if version != self.version:
            return
        self._settle()
        self.tokens = max(self.tokens, self.rows[0][0])
        ended = []
        while self.rows and self.rows[0][0] <= self.tokens:
            row = heapq.heappop(self.rows)[2]
            if not row.gone:
                self._leave(row)
                ended.append(row)
        self._go_on()
        for row in ended:
            row.done()


@dataclass(eq=False)
class Call:
    """A request to the teacher: rows of one prompt."""

    prompt: int
    lengths: Sequence[int]
    done: Callable[[], None]
    reserve: float
    rows: list[tuple[Card, Row]] = field(default_factory=list)
    left: int = 0

    @property
    def card(self) -> Card:
        return self.rows[0][0]


class Client:
    """Sends calls, so many at once, first come first served, each to the card with the least to do; counts what was written and read."""

    def __init__(self, clock: Clock, cards: Sequence[Card], latency: float = 0.0) -> None:
        self.clock, self.cards, self.latency = clock, cards, latency
        self.waiting: list[Call] = []
        self.under_way: set[Call] = set()
        self.sent = dict.fromkeys(cards, 0)  # rows that have not ended
        self.written = self.read = 0

    def ask(self, call: Call) -> None:
        self.waiting.append(call)
        self._send()

    def cancel(self, call: Call) -> None:
        if call in self.waiting:
            self.waiting.remove(call)
        elif call in self.under_way:
            self.under_way.remove(call)
            for card, row in call.rows:
                if not row.gone:
                    card._settle()
                    if row.began is not None:
                        self.written += int(min(row.tokens, card.tokens - row.began))
                    card.drop(row)
                    self.sent[card] -= 1
            self._send()

    def _send(self) -> None:
        while self.waiting and len(self.under_way) < CONCURRENCY:
            call = self.waiting.pop(0)
            self.under_way.add(call)
            card = min(self.cards, key=lambda c: self.sent[c])
            self.sent[card] += len(call.lengths)
            call.left = len(call.lengths)
            self.read += call.prompt
            rows = [
                Row(call.prompt, 0 if i else call.prompt, n, lambda call=call, n=n: self._row(call, n), call.reserve)  # type: ignore[misc]
                for i, n in enumerate(call.lengths)
            ]
            call.rows = [(card, row) for row in rows]
            if self.latency:
                self.clock.at(self.clock.now + self.latency, lambda card=card, rows=rows: card.add([r for r in rows if not r.gone]))  # type: ignore[misc]
            else:
                card.add(rows)

    def _row(self, call: Call, tokens: int) -> None:
        self.written += tokens
        self.sent[call.card] -= 1
        call.left -= 1
        if not call.left and call in self.under_way:
            self.under_way.remove(call)
            self._send()
            call.done()


@dataclass(eq=False)
class Question:
    """A question of the step, what student and teacher will write about it, and how far it is.

    Attributes:
        entry: accuracy at which a replayed question was admitted; None of a new one.
        right, ended: rollouts that are there.
        pool: correct responses, once all are there.
        open: summaries under way.
    """

    place: int
    entry: float | None
    rollouts: list[tuple[int, bool]]
    teacher: list[tuple[int, bool]]
    again: list[int]
    summaries: random.Random
    tie: float
    right: int = 0
    ended: int = 0
    asked: bool = False
    pool: int | None = None
    shortened: bool = False
    open: int = 0
    calls: list[Call] = field(default_factory=list)

    @property
    def hard(self) -> bool:
        return sum(right for _, right in self.rollouts) / SIZE < TAU

    @property
    def certain(self) -> bool:
        """Hard whatever the rest says."""
        return (self.right + SIZE - self.ended) / SIZE < TAU

    @property
    def candidate(self) -> bool:
        """May be asked about before all is known."""
        return self.certain or (self.entry is not None and self.right / SIZE < TAU)

    @property
    def rank(self) -> tuple[float, float]:
        """As far as is known."""
        return (self.right / self.ended if self.ended else self.entry or 0.0), self.tie

    @property
    def slots(self) -> int:
        return 2 if self.pool else 1


def draw_step(seed: int, chance: float) -> list[Question]:
    """The questions of a step, new ones first; `chance` is what a middling new question is answered rightly with."""
    rng = random.Random(f"{seed} {chance}")
    return [_question(rng, place, place >= NEW, chance) for place in range(NEW + REPLAYED)]


def _question(rng: random.Random, place: int, replayed: bool, chance: float) -> Question:
    spread = math.log(LIMIT / MEDIAN) / AT_LIMIT

    def length(shift: float) -> int:
        z = math.sqrt(SHARED) * shift + math.sqrt(1 - SHARED) * rng.gauss(0, 1)
        return max(20, min(LIMIT, round(MEDIAN * math.exp(spread * z))))

    def answers(p: float, shift: float, count: int = SIZE) -> list[tuple[int, bool]]:
        return [(tokens, tokens < LIMIT and rng.random() < p) for tokens in (length(shift) for _ in range(count))]

    while True:
        shift = rng.gauss(0, 1)
        ease = -LONGER * shift + math.sqrt(1 - LONGER**2) * rng.gauss(0, 1)
        normal = statistics.NormalDist()
        p = normal.cdf(2 * normal.inv_cdf(chance) + 1.5 * ease)  # many questions are nearly always or nearly never answered rightly
        entry = sum(right for _, right in answers(p, shift)) / SIZE
        if not replayed or entry < TAU:
            break
    return Question(
        place,
        entry if replayed else None,
        answers(p, shift),
        answers(rng.random(), shift, TEACHER_SIZE),
        [length(shift) for _ in range(2 * SIZE)],
        random.Random(rng.random()),
        rng.random(),
    )


class Step:
    """A step until its reformulated prompts are there.

    Afterwards all ways go on like the lazy one, and find there what was asked before.

    Args:
        way: "lazy"; "one wave" asks at once about 1.3 times the questions that slots may need at least, which mostly spares the further
            waves. While the student samples: "ahead" asks about a question as soon as it is hard for certain, about a replayed one from the
            start, and shortens its wrong rollouts when all are there; it asks about the `REACH` hardest as far as is known, and breaks off
            what is no longer among them. "ahead, all" asks about all of them. "foreseen" asks about those that a lazy step asks about,
            which nobody can know.
        foreseen: their places.
    """

    def __init__(self, questions: Sequence[Question], layout: Layout, way: str, foreseen: frozenset[int] = frozenset()) -> None:
        self.questions, self.way, self.foreseen = questions, way, foreseen
        self.clock = Clock()
        self.student = [Card(self.clock, layout.student) for _ in range(layout.student_cards)]
        latency = layout.teacher.latency if isinstance(layout.teacher, Api) else 0.0
        self.teacher = Client(self.clock, [Card(self.clock, layout.teacher) for _ in range(layout.teacher_cards)], latency)
        self.sampled = math.inf
        self.left = len(questions)
        self.hard: list[Question] = []
        self.made: list[Question] = []
        self.wave: list[Question] = []
        self.redraws: list[tuple[Question, list[int]]] = []
        self.stage = 0
        self.finished = False

    @property
    def early(self) -> bool:
        return self.way not in ("lazy", "one wave")

    def run(self) -> tuple[float, float]:
        """Seconds of the plain rollouts; seconds waited for the teacher after them."""
        mean = statistics.mean(n for q in self.questions for n, _ in q.rollouts)
        for q in self.questions:
            rows = [
                Row(PROMPT, 0 if i else PROMPT, n, lambda q=q, right=right: self._ended(q, right), mean)  # type: ignore[misc]
                for i, (n, right) in enumerate(q.rollouts)
            ]
            self.student[q.place % len(self.student)].add(rows)
        if self.early:
            self._look()
        self.clock.run(lambda: self.finished)
        ended = self.clock.now
        for call in [*self.teacher.waiting, *self.teacher.under_way]:
            self.teacher.cancel(call)
        return self.sampled, ended - self.sampled

    def _ended(self, q: Question, right: bool) -> None:
        q.ended += 1
        q.right += right
        self.left -= q.ended == SIZE
        if not self.left:
            self.sampled = self.clock.now
            self.hard = sorted((other for other in self.questions if other.hard), key=lambda other: other.rank)
            if self.early:
                self._look()
            self._go_on()
        elif self.early and q.candidate:
            self._look()

    def _look(self) -> None:
        """While the student samples, and when it has: asks what is to be asked by what is known, and breaks off what is not."""
        known = [q for q in self.questions if (q.candidate if self.left else q.hard)]
        if self.way == "ahead" or not self.left:
            known = sorted(known, key=lambda q: q.rank)[:REACH]
        if self.way == "foreseen":
            known = [q for q in known if q.place in self.foreseen]
        if self.way == "ahead" or not self.left:
            for q in {q for q in self.questions if q.asked} - set(known):
                self._break_off(q)
        for q in known:
            self._ask(q)
            if q.ended == SIZE and q.hard:
                self._shorten(q)

    def _break_off(self, q: Question) -> None:
        for call in q.calls:
            self.teacher.cancel(call)
        q.asked = q.pool is not None
        if q.open:
            q.open, q.shortened = 0, False

    def _ask(self, q: Question) -> None:
        if q.asked:
            return
        q.asked = True

        def done() -> None:
            q.pool = sum(right for _, right in q.teacher)
            self._go_on()

        self._call(q, Call(PROMPT, [n for n, _ in q.teacher], done, RESERVE))

    def _call(self, q: Question, call: Call) -> None:
        q.calls.append(call)
        self.teacher.ask(call)

    def _shorten(self, q: Question) -> None:
        """The wrong rollouts."""
        if not q.shortened:
            q.shortened = True
            for n, right in q.rollouts:
                if not right:
                    self._summary(q, n, lambda: None)

    def _positive(self, q: Question, options: list[int]) -> None:
        """A correct response; where its summary fails, the next one is drawn."""

        def done() -> None:
            if options[1:] and q.summaries.random() < SUMMARY_FAILS:
                self.redraws.append((q, options[1:]))

        if options:
            self._summary(q, options[0], done)

    def _summary(self, q: Question, tokens: int, then: Callable[[], None]) -> None:
        q.open += 1

        def done() -> None:
            q.open -= 1
            then()
            self._go_on()

        written = q.summaries.randint(*SUMMARY)
        self._call(q, Call(tokens + SUMMARY_PROMPT, [written], done, written))

    def _go_on(self) -> None:
        """After the sampling: a wave's responses, then its summaries, those that failed once more, then the next wave."""
        if self.sampled == math.inf or self.finished or any(q.pool is None for q in self.wave):
            return
        if self.stage == 0 and self.wave:
            self.stage = 1
            for q in self.wave:
                self._shorten(q)
                self._positive(q, [n for n, right in q.teacher if right][: REDRAWS + 1])
        if any(q.open for q in self.wave):
            return
        if self.redraws:
            again, self.redraws = self.redraws, []
            for q, options in again:
                self._positive(q, options)
            return
        self.made += self.wave
        free = CAP - sum(q.slots for q in self.made)
        size = math.ceil(free / 2 * (REACH / (CAP / 2) if self.way == "one wave" else 1))
        self.wave, self.stage = self.hard[len(self.made) : CAP][:size] if free > 0 else [], 0
        if not self.wave:
            self.finished = True
        for q in self.wave:
            self._ask(q)
        if self.wave:
            self._go_on()


@dataclass(frozen=True)
class Layout:
    """Cards of a run.

    Attributes:
        training: FLOP/s of all cards that train, at their full rate.
    """

    name: str
    student: Served
    student_cards: int
    teacher: Served | Api
    teacher_cards: int
    training: float


def models() -> tuple[Served, Served]:
    """Qwen3.5-9B in bf16, Qwen3.5-27B in fp8; caches in bf16, recurrent states in fp32."""
    from zppo.planning.model_shapes import shape_of

    student, teacher = shape_of("Qwen/Qwen3.5-9B"), shape_of("Qwen/Qwen3.5-27B-FP8")
    assert student and teacher
    return (
        Served(2 * student.parameters, student.parameters, student.cache_per_token(2), student.cache_per_row(2)),
        Served(teacher.parameters, teacher.parameters, teacher.cache_per_token(2), teacher.cache_per_row(2), 2 * MATRIX),
    )


def layouts() -> Iterator[Layout]:
    """The recipe's cards, one node, four nodes; teachers on one card and more, and providers."""
    student, teacher = models()
    shared = replace(student, used=SHARED_CARD)
    for cards in (1, 2, 4):
        yield Layout(f"1 trains, 1 samples; teacher on {cards}", student, 1, teacher, cards, NEXT_CARD)
    for cards in (1, 2, 4):
        yield Layout(f"8 train and sample; teacher on {cards}", shared, 8, teacher, cards, 8 * MATRIX)
    for cards in (2, 4, 8):
        yield Layout(f"24 train and sample; teacher on {cards}", shared, 24, teacher, cards, 24 * MATRIX)
    for pace in (40.0, 80.0):
        yield Layout(f"1 trains, 1 samples; provider, {pace:.0f} tokens/s", student, 1, Api(pace), 1, NEXT_CARD)
        yield Layout(f"8 train and sample; provider, {pace:.0f} tokens/s", shared, 8, Api(pace), 1, 8 * MATRIX)


WAYS = ("lazy", "one wave", "ahead", "ahead, all", "foreseen")


def simulate(seed: int, chance: float, layout: Layout) -> dict[str, dict[str, float]]:
    """One step, every way."""
    found: dict[str, dict[str, float]] = {}
    foreseen: frozenset[int] = frozenset()
    rest: dict[str, float] = {}
    for way in WAYS:
        questions = draw_step(seed, chance)
        step = Step(questions, layout, way, foreseen)
        plain, waited = step.run()
        if way == "lazy":
            foreseen = frozenset(q.place for q in step.made)
            rest = _rest(step, layout)
        found[way] = {"plain": plain, **rest, "waited": waited, "step": plain + waited + sum(rest.values())}
        found[way] |= {"written": step.teacher.written, "read": step.teacher.read, "asked": sum(q.asked for q in questions)}
        found[way] |= {"hard": sum(q.hard for q in questions) / len(questions)}
    return found


def _rest(step: Step, layout: Layout) -> dict[str, float]:
    """Seconds of what comes after the prompts: their rollouts, the update."""
    clock = Clock()
    cards = [Card(clock, layout.student) for _ in range(layout.student_cards)]
    prompts = [(q, i) for q in step.made for i in range(q.slots)][:CAP]
    left = [len(prompts) * SIZE]

    def done() -> None:
        left[0] -= 1

    for n, (q, i) in enumerate(prompts):
        tokens = PROMPT + SHOWN
        cards[n % len(cards)].add([Row(tokens, 0 if k else tokens, q.again[SIZE * i + k], done, RESERVE) for k in range(SIZE)])
    clock.run(lambda: not left[0])
    mixed = [q for q in step.questions if 0 < sum(right for _, right in q.rollouts) < SIZE]
    trained = float(sum(PROMPT + n for q in mixed for n, _ in q.rollouts))
    trained += MIXED_AGAIN * sum(PROMPT + SHOWN + n for q, i in prompts for n in q.again[SIZE * i : SIZE * (i + 1)])
    update = PASSES * layout.student.parameters * trained / (TRAINED * layout.training)
    return {"again": clock.now, "update": update, "other": OTHER}


EASE = (0.5, 0.7)
"""What a middling new question is answered rightly with: about half and a third of the step's questions are hard then."""


def measure(options: Options) -> Mapping[str, Any]:
    """Means over steps of half of either kind."""
    rows: dict[str, dict[str, dict[str, float]]] = {}
    steps = [(seed, ease) for seed in range(1 if options.quick else options.repetitions) for ease in EASE]
    for layout in list(layouts())[: 1 if options.quick else None]:
        found = [simulate(seed, ease, layout) for seed, ease in steps]
        rows[layout.name] = {way: {key: statistics.mean(f[way][key] for f in found) for key in found[0][way]} for way in WAYS}
    return {"steps": len(steps), "concurrency": CONCURRENCY, "median": MEDIAN, "limit": LIMIT, "layouts": rows}


def table(result: Mapping[str, Any]) -> str:
    """A row a layout and way of asking."""
    rows: list[tuple[Any, ...]] = []
    for name, ways in result["layouts"].items():
        lazy = ways["lazy"]
        for way, of in ways.items():
            shorter = "" if way == "lazy" else f"**{1 - of['step'] / lazy['step']:.1%}**"
            tokens = f"{of['written'] / lazy['written']:.2f}"
            rows.append((name if way == "lazy" else "", way, f"{of['waited']:,.0f}", f"{of['step']:,.0f}", shorter, tokens))
    return markdown(["cards", "asked", "s waited", "s a step", "shorter", "tokens written, lazy = 1"], rows)


if __name__ == "__main__":
    sys.exit(run("teacher_ahead", measure))
