"""One benchmark as a task of inspect-ai: asked through its model, decided by `zppo.evaluate.deciding`, everything in its log."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from anyio import CapacityLimiter, to_thread
from inspect_ai import Epochs, Task
from inspect_ai import eval as inspect_eval
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.log import EvalLog
from inspect_ai.model import Model, ModelOutput
from inspect_ai.scorer import Score, Scorer, Target, mean, scorer
from inspect_ai.solver import Generate, Solver, TaskState, solver

from zppo.errors import EvaluationError
from zppo.evaluate.benchmark import Benchmark
from zppo.evaluate.deciding import Decider
from zppo.evaluate.inspected import blind, chat_messages, refused, text_of, too_long, why
from zppo.evaluate.item import Item
from zppo.evaluate.journal import Journal
from zppo.evaluate.media import Turn, media_key
from zppo.evaluate.protocol import digest_of
from zppo.evaluate.rows import TOO_LONG, By, Row

DOWN_AFTER = 8  # failures in a row without an answer between them: the rest is not asked any more

Turns = Callable[[Item], list[Turn]]
Take = Callable[[Row], None]


@dataclass
class Health:
    """Whether the model's server still answers, and why it takes no pictures, "" where it does."""

    failures: int = 0
    blind: str = ""
    last: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def down(self) -> bool:
        return self.failures >= DOWN_AFTER

    def note(self, error: str = "") -> None:
        """An answer, or why there was none."""
        with self.lock:
            self.failures, self.last = (self.failures + 1, error) if error else (0, "")


class LeftOutError(EvaluationError):
    """A question that cannot be put to this model at all."""


@dataclass(frozen=True, slots=True)
class Work:
    """What the samples of a benchmark share.

    Attributes:
        turns: the conversation of a question with its media.
        answers, judgements: journals of replies.
        take: is given every row as it is decided or fails.
    """

    benchmark: Benchmark
    items: Mapping[str, Item]
    turns: Turns
    decider: Decider
    answers: Journal
    judgements: Journal
    health: Health
    threads: CapacityLimiter
    take: Take


def run_task(work: Work, model: Model, *, samples: int, concurrency: int, logs: Path) -> EvalLog:
    """Asks and decides every row of a benchmark that the journals do not hold; the transcripts go to a log that `inspect view` opens.

    Args:
        samples: of each question.
        concurrency: questions under way at once.
    """
    dataset = MemoryDataset(
        [
            Sample(id=item.id, input=item.asked, target=list(item.golds), metadata=_facts(item))
            for item in work.items.values()
        ],
        name=work.benchmark.name,
    )
    task = Task(
        dataset=dataset,
        name=work.benchmark.name,
        solver=[ask(work)],
        scorer=decide(work),
        epochs=Epochs(samples, "mean"),
        fail_on_error=False,
    )
    logs.mkdir(parents=True, exist_ok=True)
    level = logging.getLogger().level
    log = inspect_eval(
        task,
        model=model,
        display="none",
        log_dir=str(logs),
        log_format="eval",
        log_images=False,
        log_realtime=False,
        log_level="error",
        log_header_only=True,
        max_samples=concurrency,
        max_tasks=1,
        score_display=False,
        acp_server=False,
        ctl_server=False,
    )[0]
    logging.getLogger().setLevel(level)  # inspect-ai sets one for the whole process
    return log


def answer_key(work: Work, item: Item, epoch: int) -> str:
    """What names one request: the same question in other words, or about another picture, is another one."""
    return digest_of([work.benchmark.name, item.id, epoch, item.asked, media_key(item)])


@solver
def ask(work: Work) -> Solver:
    """Puts the question to the model, unless it has been answered."""

    async def solve(state: TaskState, generate: Generate) -> TaskState:
        item = work.items[str(state.sample_id)]
        key = await to_thread.run_sync(answer_key, work, item, state.epoch, limiter=work.threads)
        known = await to_thread.run_sync(work.answers.get, key, limiter=work.threads)
        if known is None:
            try:
                known = await _asked(work, item, state, generate)
            except Exception as error:
                said = why(error)
                by: By = "left out" if isinstance(error, LeftOutError) else "open"
                work.take(Row(item.id, state.epoch, by, error=said, gold=item.golds, facts=item.facts))
                raise EvaluationError(said) from None
            if known["finish"] != TOO_LONG:  # another server of the model may have a longer context
                await to_thread.run_sync(work.answers.add, key, known, limiter=work.threads)
        else:
            state.output = ModelOutput.from_content(str(state.model), known["text"], stop_reason=known["finish"])
            state.messages.append(state.output.message)
        state.metadata["reply"] = known
        return state

    return solve


async def _asked(work: Work, item: Item, state: TaskState, generate: Generate) -> dict[str, Any]:
    """What the model says. Raises whatever is wrong with the question's media or the server; LeftOutError where it takes no pictures."""
    pictured = bool(item.images or item.frames or item.video)
    if pictured and work.health.blind:
        raise LeftOutError(work.health.blind)
    if work.health.down:
        raise EvaluationError(f"not asked, since {work.health.failures} requests before it failed ({work.health.last})")
    state.messages = chat_messages(await to_thread.run_sync(work.turns, item, limiter=work.threads))
    try:
        output = (await generate(state)).output
    except Exception as error:
        if too_long(error):
            work.health.note()
            return {"text": "", "finish": TOO_LONG, "tokens_in": 0, "tokens_out": 0}
        if pictured and blind(error):
            work.health.note()
            work.health.blind = why(error)
            raise LeftOutError(why(error)) from None
        if not refused(error):
            work.health.note(why(error))
        raise
    work.health.note()
    usage, finish = output.usage, output.stop_reason
    return {
        # What a server says about a conversation that is too long for it is no answer of the model.
        "text": "" if finish == TOO_LONG else text_of(output),
        "finish": finish,
        "tokens_in": usage.input_tokens if usage else 0,
        "tokens_out": usage.output_tokens if usage else 0,
    }


@scorer(metrics=[mean()])
def decide(work: Work) -> Scorer:
    """The row's score with everything that led to it; unscored where the judge failed, so that no failure counts as wrong."""

    async def score(state: TaskState, target: Target) -> Score:
        item = work.items[str(state.sample_id)]
        decided = partial(
            work.decider.decide, work.benchmark, item, state.epoch, state.metadata["reply"], work.judgements
        )
        row = await to_thread.run_sync(decided, limiter=work.threads)
        work.take(row)
        told = {name: value for name, value in row.to_dict().items() if name not in ("text", "facts", "answer")}
        if row.value is None:
            return Score.unscored(answer=row.answer, explanation=row.error, metadata=told)
        return Score(value=row.value, answer=row.answer, explanation=row.reply or row.reason, metadata=told)

    return score


def _facts(item: Item) -> dict[str, Any]:
    return {"kind": item.kind, "options": list(item.options), "facts": dict(item.facts)}
