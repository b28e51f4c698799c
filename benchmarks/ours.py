"""Our side: the trainer of a recipe, put together as `zppo train` does it, one step at a time."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks import flops
from benchmarks.workers import PeakMemory, Stopwatch
from benchmarks.world import Shape, completions, correct, lengths

TEACHER_SAID = "teacher-said"


@dataclasses.dataclass(frozen=True)
class Ours:
    """What our side runs.

    Attributes:
        model: folder of the student.
        shape: of a step.
        questions: rows of the data set.
        threads: of the CPU.
        method: grpo or zppo.
        settings: more settings, by section.
    """

    model: Path
    shape: Shape
    questions: list[dict[str, str]]
    threads: int
    method: str = "grpo"
    settings: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)


def settings_of(own: Ours, folder: Path) -> Any:
    """The recipe: one optimizer step per rollout step, as the peer's default; everything else by default."""
    from zppo.config.settings import Settings

    shape = own.shape
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, own.questions)), encoding="utf-8")
    given: dict[str, Any] = {
        "method": own.method,
        "output": folder / "run",
        "student": {"model": str(own.model)},
        "data": {"train": str(folder / "questions.jsonl")},
        "rollout": {"batch_size": shape.questions, "group_size": shape.group, "max_new_tokens": shape.limit},
        "train": {"steps": shape.steps, "minibatches": 1, "checkpoint_every": 0, "device": "cpu", "threads": own.threads},
    }
    if own.method != "grpo":
        summary = {"max_new_tokens": shape.limit // 4}
        given["teacher"] = {"model": "scripted", "rollout": {"max_new_tokens": shape.limit}, "compression": summary}
    for section, values in own.settings.items():
        given[section] = {**given.get(section, {}), **values}
    return Settings.model_validate(given)


class Script:
    """Rewards by place in the batch, and a teacher whose replies are ready: responses of mean length, summaries of its cap.

    Attributes:
        trivial: share of the groups of the next step that are all-right or all-wrong, among reformulated ones too.
    """

    special_texts: tuple[str, ...] = ()

    def __init__(self, shape: Shape) -> None:
        self.shape, self.trivial = shape, 0.5
        self._calls = 0
        self._answers: dict[str, str | None] = {}  # by completion: a summary has to keep it

    def new_step(self, trivial: float) -> None:
        """Rewards of the next step."""
        self.trivial, self._calls = trivial, 0
        self._answers.clear()

    def score(self, answered: Sequence[Any], log: Any = None) -> list[Any]:
        """A verdict per completion: plain groups come first in a step, then reformulated ones; of the teacher's 3 in 4 are right."""
        from zppo.grading.grader import Verdict

        if answered and answered[0].completion.startswith(TEACHER_SAID):
            flags = [i % 4 != 3 for i in range(len(answered))]
        else:
            self._calls += 1
            size = self.shape.group
            flags = [f for row in correct(len(answered) // size, size, self.trivial, self._calls) for f in row]
        answers = [a.question.gold if flag else f"x{i % 7}" for i, (flag, a) in enumerate(zip(flags, answered, strict=True))]
        self._answers |= {a.completion.strip(): answer for a, answer in zip(answered, answers, strict=True)}
        return [Verdict(flag, answer, "script", float(flag)) for flag, answer in zip(flags, answers, strict=True)]

    def check(self, *_: Any) -> None:
        """Nothing can be wrong with it."""

    def complete(self, requests: Sequence[Any], how: Any, log: Any = None) -> list[Any]:
        """Replies at once."""
        from zppo.teacher.interface import TeacherReply

        return [TeacherReply(tuple(self._reply(r.messages[-1].content, key, how) for key in r.keys)) for r in requests]

    def _reply(self, asked: str, key: int, how: Any) -> str:
        """A summary that keeps the answer where one is asked for, else a response; one word, one token."""
        if "<summary>" not in asked:
            return " ".join([TEACHER_SAID, str(key), *["w1"] * (int(self.shape.mean) - 2)])
        response = asked.rpartition("<response>")[2].partition("</response>")[0].strip()
        room = " ".join(["w2"] * (how.sampling.max_new_tokens - 1))
        return f"<summary>\n{room} \\boxed{{{self._answers[response]}}}\n</summary>"


@contextmanager
def assembled(own: Ours, script: Script) -> Iterator[Any]:
    """A trainer that is ready for its first step, in a run folder of its own."""
    import torch
    from rich.console import Console

    from zppo.distributed.launcher import read_launch
    from zppo.distributed.parallel import make_accelerator, make_weights
    from zppo.rollout.frozen_models import FrozenModels
    from zppo.rollout.run_data import read_data
    from zppo.runs.display import Progress
    from zppo.runs.signals import Stop
    from zppo.train.assemble import assemble

    torch.set_num_threads(own.threads)
    with tempfile.TemporaryDirectory() as name:
        settings, stop, launch = settings_of(own, Path(name)), Stop(), read_launch()
        accelerator = make_accelerator(settings, launch)
        weights = make_weights(settings, accelerator, launch, stop)
        progress = Progress(Console(quiet=True, force_terminal=False))
        frozen_models = FrozenModels(settings, accelerator.device)
        if own.method != "grpo":
            frozen_models.teachers.append(script)  # type: ignore[arg-type]
            frozen_models.settings_of.append(settings.teacher)
        run = Path(name) / "run"
        parts = assemble(settings, read_data(settings), run, None, script.score, frozen_models, accelerator, weights, progress)
        run.mkdir()
        parts.trainer.run_log.open()
        yield parts


def in_order(trainer: Any) -> Any:
    """The trainer's roller, which from now on grades whole batches: the script's rewards go by place in the batch."""
    trainer.student = dataclasses.replace(trainer.student, grades_while_sampling=False)
    return trainer.student


class Replaying:
    """An engine that says what it is told to; log-probs are of the current weights, as a sampler's would be."""

    def __init__(self, engine: Any, rows: list[list[list[int]]]) -> None:
        self.engine, self.rows = engine, rows

    def sample(self, requests: Sequence[Any], sampling: Any) -> list[list[Any]]:
        """The rows, whatever is asked."""
        import torch

        from zppo.engines.base import Completion
        from zppo.engines.logprobs import completion_logprobs

        made = []
        for request, group in zip(requests, self.rows, strict=True):
            with torch.no_grad():
                logprobs, _ = completion_logprobs(self.engine.model, [(request.prompt_ids, ids) for ids in group])
            rows = zip(group, logprobs, strict=True)
            made.append([Completion(torch.tensor(ids), lp[: len(ids)].clone(), False, 0.0) for ids, lp in rows])
        return made

    def stream(self, requests: Sequence[Any], sampling: Any) -> Iterator[Any]:
        """The same, one by one."""
        for i, row in enumerate(self.sample(requests, sampling)):
            yield from ((i, j, completion) for j, completion in enumerate(row))


class GivenLengths:
    """Ends completions where it is said, by the engine's own way to be told so; see `world.lengths`.

    Attributes:
        step: of the trainer. Its first batch has the plain rollouts, as the peer's has.
    """

    def __init__(self, shape: Shape) -> None:
        self.shape, self.step, self._batch = shape, 0, 0

    def new_step(self, step: int) -> None:
        """What is sampled from now on belongs to it."""
        self.step, self._batch = step, 0

    def __call__(self, asked: Sequence[Any]) -> Any:
        """What the engine asks at every token of a batch: which rows end with it. A look of `EngineCheck` is no batch of whole groups."""
        if len(asked) % self.shape.group:
            return None
        given = lengths(self.shape, len(asked), 1000 * self._batch + self.step)
        self._batch += 1

        def ends(step: int, drawn: Any) -> list[int]:
            return [row for row, length in enumerate(given) if length == step + 1]

        return ends


class Seen:
    """What the learner was given: which rollouts, of what length, with a gradient or not."""

    def __init__(self, learner: Any) -> None:
        self.groups: list[list[flops.Line]] = []
        self._update = learner.optimizer_steps
        learner.optimizer_steps = self

    def __call__(self, groups: Sequence[Any], advantages: Any, *rest: Any) -> Any:
        live = iter((advantages != 0).tolist())
        self.groups = [[flops.Line(len(g.prompt.ids), len(r.ids), next(live)) for r in g.rollouts] for g in groups]
        return self._update(groups, advantages, *rest)

    def operations(self, config: Any) -> dict[str, float]:
        """That sampling and training of these cannot do without."""
        cost = flops.Cost.of(config)
        training = cost.training([line for group in self.groups for line in group])
        return {"sampling_operations": float(cost.sampling(self.groups)), "update_operations": float(training)}


def serve(pipe: Connection, own: Ours) -> None:
    """Steps on demand.

    A message is {"trivial": share, "replay": bool}; the reply holds seconds by part, and counts. {"rates": True} is answered by the
    rates at which matrices are multiplied.
    """
    script = Script(own.shape)
    with assembled(own, script) as parts:
        trainer, config = parts.trainer, parts.student.model.config
        sampling = in_order(trainer)
        replayed = Replaying(sampling.engine, completions(own.shape, seed=0))
        replaying = dataclasses.replace(sampling, engine=replayed)
        learner, watch, memory = trainer.learner, Stopwatch(), PeakMemory()
        learner._old_logprobs = watch.timed("logprobs", learner._old_logprobs)
        seen = Seen(learner)
        reported: dict[str, Any] = {}
        trainer.run_log.listener = lambda step, event, metrics: reported.update(metrics)
        given = GivenLengths(own.shape)
        if own.shape.lognormal is not None:
            sampling.engine.watch = given
        pipe.send(("ready", None))
        while True:
            asked = pipe.recv()
            if asked.get("rates"):
                rows = own.shape.questions * own.shape.group // 2  # half of the rollouts go on, on average
                pipe.send(("rates", flops.rates(config, 2048, rows)))
                continue
            script.new_step(asked["trivial"])
            given.new_step(trainer.done + 1)
            trainer.student = replaying if asked.get("replay") else sampling
            watch.start()
            trainer.step(trainer.done + 1)
            seconds = watch.seconds()
            pipe.send(("step", {**by_part(seconds, reported), "memory": memory.above(), **seen.operations(config)}))


def by_part(watched: dict[str, float], reported: dict[str, Any]) -> dict[str, float]:
    """Seconds of sampling, log-probs, forward and backward, teacher, other; of the step; processor seconds; counts."""
    seconds = reported["seconds"]
    logprobs = watched.get("logprobs", 0.0)
    parts = {"sampling": seconds["sampling"], "logprobs": logprobs, "update": seconds["update"] - logprobs, "teacher": seconds["teacher"]}
    counts = ("student_tokens", "prompt_tokens", "rollouts", "train_tokens_needed", "train_tokens_computed")
    return {
        **parts,
        "other": watched["step"] - sum(parts.values()),
        "step": watched["step"],
        "cpu": watched["cpu"],
        **{name: float(reported[name]) for name in counts},
    }
