"""What the lazy teacher asks for, as a share of Algorithm 1's literal schedule, at the paper's step size.

No model is at work: groups are invented, and the teacher's replies are short texts that claim a length. What is real is everything that
decides who is asked: the zone of a recipe with `teacher.ask: lazy` against the same with `teacher.ask: all`.
"""

from __future__ import annotations

import random
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import Options, run
from benchmarks.ours import Ours, Script, assembled
from benchmarks.tables import markdown
from benchmarks.world import Shape, make_model, questions

HARD = (0.3, 0.5, 0.65)
REPLAYED = 0.25
LENGTHS = {"prompt": (200, 400), "response": (1000, 5000), "summary": (100, 300)}  # tokens, uniform between
STEP = 1


class Claims(Script):
    """A teacher that claims its lengths. A question is as hard for it as chance will have it: on one in five it is never right in four."""

    def score(self, answered: Sequence[Any], log: Any = None) -> list[Any]:
        """Of the teacher's responses alone: right with a chance that is the question's own, uniform in [0, 1]."""
        from zppo.core.draws import keyed_random
        from zppo.grading.grader import Verdict

        verdicts = []
        for a in answered:
            chance = keyed_random(0, "skill", a.question.id).random()
            flag = keyed_random(0, "right", a.completion).random() < chance
            verdicts.append(Verdict(flag, a.question.gold if flag else "x", "script", float(flag)))
            self._answers[a.completion] = verdicts[-1].answer
        return verdicts

    def knows(self, text: str, answer: str | None) -> None:
        """A student's completion that it may be asked to shorten."""
        self._answers[text] = answer

    def complete(self, requests: Sequence[Any], how: Any, log: Any = None) -> list[Any]:
        """Replies with the tokens that a text of that kind would have."""
        from dataclasses import replace

        replies = super().complete(requests, how)
        for i, (request, reply) in enumerate(zip(requests, replies, strict=True)):
            shortening = "<summary>" in request.messages[-1].content
            rng = random.Random(request.keys[0])
            read, write = ("response", "summary") if shortening else ("prompt", "response")
            written = sum(rng.randint(*LENGTHS[write]) for _ in request.keys)
            replies[i] = replace(reply, prompt_tokens=rng.randint(*LENGTHS[read]), completion_tokens=written)
        return replies


def measure(options: Options) -> Mapping[str, Any]:
    """Tokens written and read by the teacher in one step, both ways; the reformulated prompts must be the same."""
    shape = Shape(questions=32 if options.quick else 384, steps=2, limit=80, layers=1)
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(Path(folder) / "model", shape)
        found = {f"{hard:.0%}": _compare(model, shape, hard, options.threads) for hard in HARD}
    return {"new": shape.questions, "replayed_share": REPLAYED, "lengths": LENGTHS, "hard": found}


def _compare(model: Path, shape: Shape, hard: float, threads: int) -> dict[str, Any]:
    from zppo.step_log import StepLog

    prompts, counts = {}, {}
    for ask in ("lazy", "all"):
        script = Claims(shape)
        own = Ours(model, shape, questions(shape), threads, method="zppo", settings={"teacher": {"ask": ask}})
        with assembled(own, script) as parts:
            trainer = parts.trainer
            asked = trainer.questions[: round((1 + REPLAYED) * shape.questions)]
            groups = _groups(trainer.student.renderer, asked, hard, shape.group, script)
            log = StepLog(STEP)
            asked_again = trainer.parts.reformulate(trainer.parts.hard(groups, STEP), shape.questions, log)
        prompts[ask] = [(p.kind, p.ids) for p in asked_again.prompts]
        counts[ask] = {name: float(value or 0) for name, value in log.counts.items()}
    if prompts["lazy"] != prompts["all"]:
        raise AssertionError("the lazy teacher led to other prompts than the literal one")
    tokens = {ask: _tokens(c) for ask, c in counts.items()}
    return {
        "prompts": len(prompts["lazy"]),
        "written_share": tokens["lazy"]["written"] / tokens["all"]["written"],
        "all_share": sum(tokens["lazy"].values()) / sum(tokens["all"].values()),
        "lazy": tokens["lazy"],
        "literal": tokens["all"],
        "counts": counts,
    }


def _tokens(counts: Mapping[str, float]) -> dict[str, float]:
    parts = ("teacher", "compression")
    written = sum(counts[f"{part}_completion_tokens"] for part in parts)
    return {"written": written, "read": sum(counts[f"{part}_prompt_tokens"] for part in parts)}


def _groups(renderer: Any, asked: Sequence[Any], hard: float, size: int, script: Claims) -> list[Any]:
    """Plain groups, a share `hard` of them with less than half right, spread evenly over what is below and above."""
    import torch

    from zppo.core.types import Group, Rollout

    rng = random.Random(0)
    count, groups = round(hard * len(asked)), []
    for i, question in enumerate(rng.sample(asked, len(asked))):
        right = rng.randrange(size // 2) if i < count else rng.randint(size // 2, size)
        rollouts = []
        for place in range(size):
            flag, text = place < right, f"{question.id} {place}"
            answer = question.gold if flag else f"x{place}"
            script.knows(text, answer)
            rollouts.append(Rollout(torch.tensor([9]), torch.zeros(1), text, answer, flag, float(flag)))
        groups.append(Group(renderer.plain(question), tuple(rollouts)))
    return groups


def table(result: Mapping[str, Any]) -> str:
    """Shares first."""
    hard: Mapping[str, Any] = result["hard"]
    rows: list[tuple[Any, ...]] = [("**tokens written, lazy / literal**", *(f"**{h['written_share']:.2f}**" for h in hard.values()))]
    rows.append(("tokens written and read, lazy / literal", *(f"{h['all_share']:.2f}" for h in hard.values())))
    rows += [
        (f"tokens written, {name}", *(h[ask]["written"] for h in hard.values())) for name, ask in (("lazy", "lazy"), ("literal", "literal"))
    ]
    rows += [
        (f"questions asked about, {name}", *(h["counts"][ask]["teacher_questions"] for h in hard.values()))
        for name, ask in (("lazy", "lazy"), ("literal", "all"))
    ]
    return markdown(["hard questions", *hard], rows)


if __name__ == "__main__":
    sys.exit(run("teacher_tokens", measure))
