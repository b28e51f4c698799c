"""How long a step waits for its teacher, asked lazily or eagerly, and for how many tokens; beside a teacher that answers at once.

The teacher is a script that answers after a given time, however much it is asked at once: a server with room. That time is set
relative to what the student's plain rollouts take, measured in the same process. Right and wrong follow from the question and the
completion alone, so all ways see the same batches.
"""

from __future__ import annotations

import dataclasses
import hashlib
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.common import Options, interleaved, medians, run
from benchmarks.ours import Ours, assembled
from benchmarks.tables import markdown
from benchmarks.workers import workers
from benchmarks.world import QUICK, Shape, make_model, questions

HARD = 0.5  # share of the new questions; replayed ones are hard mostly
LATENCIES = (0.25, 0.5, 1.0)  # of a call, in plain rollout times
WAYS = ("lazy", "eager")
RESPONSE = "teacher-said"
WARM = 3  # steps that are not counted: imports, caches, and a buffer to replay from


class Slow:
    """A teacher whose replies take their time, and the rewards: on a hard question one rollout in eight is right, else seven.

    Attributes:
        seconds: of a call.
    """

    special_texts: tuple[str, ...] = ()

    def __init__(self, shape: Shape) -> None:
        self.shape, self.seconds = shape, 0.0
        self.gone = threading.Event()
        self.answers: dict[str, str] = {}  # by completion: a summary has to keep it

    def check(self, *_: Any) -> None:
        """Nothing can be wrong with it."""

    def score(self, answered: Sequence[Any]) -> list[Any]:
        """Of the teacher's responses three in four are right."""
        from zppo.grading.base import Verdict

        def right(a: Any) -> bool:
            hard = number(a.question.id) < HARD
            chance = 0.75 if a.completion.startswith(RESPONSE) else 1 / 8 if hard else 7 / 8
            return number(a.question.id + a.completion) < chance

        verdicts = []
        for a in answered:
            flag = right(a)
            answer = a.question.gold if flag else f"x{int(7 * number(a.completion))}"
            self.answers[a.completion.strip()] = answer
            verdicts.append(Verdict(flag, answer, "script", float(flag)))
        return verdicts

    def complete(self, requests: Sequence[Any], how: Any) -> list[Any]:
        """Replies after `seconds`: responses of the student's mean length, summaries of half their cap."""
        from zppo.teacher.base import Cancelled, TeacherReply

        self.gone.clear()
        if self.seconds and self.gone.wait(self.seconds):
            raise Cancelled
        replies = []
        for request in requests:
            _, tag, rest = request.messages[-1].content.rpartition("<response>\n")
            shown = rest.partition("</response>")[0].strip() if tag else ""
            count = how.sampling.max_new_tokens // 2 if shown else int(self.shape.mean)
            texts = [" ".join([RESPONSE, f"w{key % 191}", *["w1"] * count]) for key in request.keys]
            if shown:
                texts = [f"<summary>{' '.join(['w1'] * count)} \\boxed{{{self.answers.get(shown)}}}</summary>"]
            replies.append(TeacherReply(tuple(texts), completion_tokens=count * len(texts)))
        return replies

    def cancel(self) -> None:
        """Whoever waits goes."""
        self.gone.set()


def number(text: str) -> float:
    """In [0, 1), from a text."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=6).digest(), "big") / 2**48


def serve(pipe: Connection, own: Ours) -> None:
    """Steps on demand: a message is the teacher's seconds; the reply has seconds and tokens."""
    script = Slow(own.shape)
    with assembled(own, script) as parts:  # type: ignore[arg-type]
        trainer = parts.trainer
        if trainer.zone.ahead is not None:
            trainer.zone.ahead._cancel = script.cancel
        engine, sampling, reported = trainer.roller.engine, [], {}
        real = engine.sample

        def sample(*arguments: Any) -> Any:
            began = time.perf_counter()
            done = real(*arguments)
            sampling.append(time.perf_counter() - began)
            return done

        engine.sample = sample
        trainer.log.listener = lambda step, event, metrics: reported.update(metrics)
        pipe.send(("ready", None))
        while True:
            script.seconds = pipe.recv()
            sampling.clear()
            began = time.perf_counter()
            trainer.step(trainer.done + 1)
            found = {
                "step": time.perf_counter() - began,
                "plain": max(sampling),
                "wait": reported["teacher_wait_seconds"],
            }
            counts = ("teacher_tokens", "teacher_questions", "hard_questions")
            pipe.send(("step", {**found, **{name: float(reported[name]) for name in counts}}))


def foreseen(latency: float, questions: int, slots: int, shape: Shape, seed: int = 0) -> float:
    """What is left to wait for an eager teacher where every token takes the same time, in plain rollout times; no machine is in it.

    Args:
        questions: plain groups of a step, `HARD` of them hard.
        slots: reformulated prompts, two a question.
    """
    from zppo.core.draws import keyed_random

    rng, waits = keyed_random(seed, "foreseen"), []
    enough = shape.group // 2 + 1  # wrong rollouts with which a question is hard in any case
    for _ in range(200):
        hard, longest = [], 0
        for i in range(questions):
            lengths = [min(shape.limit, 1 + int(rng.expovariate(0.01))) for _ in range(shape.group)]
            longest = max(longest, *lengths)
            chance = 7 / 8 if rng.random() < HARD else 1 / 8
            wrong = sorted(length for length in lengths if rng.random() < chance)
            if len(wrong) >= enough:
                hard.append((-len(wrong), i, wrong[enough - 1] / shape.limit, max(lengths) / shape.limit))
        ends = [max(known + latency, ended) + latency for *_, known, ended in sorted(hard)[: slots // 2]]
        waits.append(max(0.0, max(ends, default=0.0) - longest / shape.limit))
    return sum(waits) / len(waits)


SIZES = {"16 questions": (20, 4), "384 questions": (480, 96)}


def measure(options: Options) -> Mapping[str, Any]:
    """For each latency every way, in turn, beside a teacher that answers at once."""
    shape, repetitions = (QUICK, 1) if options.quick else (Shape(), min(3, options.repetitions))
    found = {}
    with tempfile.TemporaryDirectory() as name:
        asked, model = questions(shape), make_model(Path(name) / "model", shape)
        address = {"base_urls": ["http://127.0.0.1:9/v1"]}  # nobody's: the script stands in for the server
        sides = {
            way: (
                serve,
                Ours(model, shape, asked, options.threads, "zppo", settings={"teacher": {**address, "ask": way}}),
            )
            for way in WAYS
        }
        with workers(**sides, at_once=sides["lazy"]) as processes:
            warm = [{n: worker.ask(0.0) for n, worker in processes.items()} for _ in range(WARM)]
            plain = warm[-1]["at_once"]["plain"]
            for latency in LATENCIES:
                seconds = {n: 0.0 if n == "at_once" else latency * plain for n in processes}
                steps = interleaved(repetitions, {n: partial(w.ask, seconds[n]) for n, w in processes.items()})
                plain = medians(steps["at_once"])["plain"]
                pairs = {way: zip(steps[way], steps["at_once"], strict=True) for way in WAYS}
                found[str(latency)] = {
                    "call": seconds["lazy"],
                    "longer": {w: medians([{"s": a["step"] - b["step"]} for a, b in p])["s"] for w, p in pairs.items()},
                    "medians": {n: medians(rows) for n, rows in steps.items()},
                    "tokens": {n: sum(row["teacher_tokens"] for row in rows) for n, rows in steps.items()},
                }
    sizes = {
        name: {str(latency): foreseen(latency, *size, Shape()) for latency in LATENCIES} for name, size in SIZES.items()
    }
    return {
        "shape": dataclasses.asdict(shape),
        "repetitions": repetitions,
        "latencies": found,
        "foreseen": sizes,
    }


def table(result: Mapping[str, Any]) -> str:
    """How much longer a step takes than one whose teacher answers at once."""
    rows = []
    for latency, row in result["latencies"].items():
        at_once = row["medians"]["at_once"]
        for way in WAYS:
            longer = row["longer"][way]
            rows.append(
                (
                    f"{latency} ({row['call']:.2f} s)",
                    way,
                    f"{row['medians'][way]['wait']:.2f}",
                    f"{longer:.2f}",
                    f"{longer / row['call']:.1f}",
                    f"{(longer - row['call']) / at_once['step']:+.0%}",
                    f"{row['tokens'][way] / row['tokens']['at_once']:.2f}",
                )
            )
    head = ["a call, in plain rollout times", "ask", "seconds waited", "step longer by, s", "the same in calls"]
    counted = [
        (latency, f"{2 * float(latency):.2f}", *(f"{waits[latency]:.2f}" for waits in result["foreseen"].values()))
        for latency in next(iter(result["foreseen"].values()))
    ]
    return (
        markdown([*head, "beyond one call, in steps", "tokens asked for, lazy = 1"], rows)
        + "\n\n"
        + markdown(["a call", "waited for, lazily", *(f"eagerly, {name}" for name in result["foreseen"])], counted)
    )


if __name__ == "__main__":
    sys.exit(run("teacher_waiting", measure))
