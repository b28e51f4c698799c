"""What a run shows in the terminal, from its first second to its last evaluation."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from accelerate.state import AcceleratorState
from rich.console import Console

import zppo
from zppo.runs.display import Progress, busy
from zppo.step_log import StepLog

METRICS = {"accuracy": {"plain": 0.25, "bcq": 0.5}, "buffer": 7, "tokens_per_second": 1000.0, "seconds": {"step": 2.0}}
TOTALS = SimpleNamespace(graduated={"0%": 1}, admitted={"0%": 4}, evicted={})


def shown(progress: Progress, width: int = 80) -> str:
    """What a terminal of that width would show now."""
    console = Console(file=io.StringIO(), width=width, force_terminal=False, color_system=None)
    console.print(progress._render())
    return str(console.file.getvalue())  # type: ignore[attr-defined]


def on_terminal() -> Progress:
    return Progress(Console(file=io.StringIO(), width=80, force_terminal=True, _environ={"TERM": "xterm"}))


def test_the_table_stays_while_the_last_evaluation_goes_on() -> None:
    with on_terminal() as progress:
        progress.plan(20, ("plain", "bcq"), replay=True)
        progress.doing("loading the student s")
        assert "loading the student s" in shown(progress)
        progress.at_step(1)
        log = StepLog(1, watch=progress.part)
        with log.time("sampling"):
            log.tell("sampling", 12, 384)
            assert "step 1: sampling 12 of 384" in shown(progress)
        with log.time("grading"):  # a part of sampling: nobody needs to know
            assert "step 1: sampling 12 of 384" in shown(progress)
        progress.step(1, METRICS, TOTALS)
        progress.doing("evaluating final/ on 9 held-out questions")
        text = shown(progress)
    assert "step 1/20" in text and "graduated" in text and "evaluating final/ on 9 held-out questions" in text
    assert all(len(line) <= 80 for line in text.splitlines())


def test_without_a_terminal_there_are_lines_and_few_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("zppo.runs.display.time.monotonic", lambda: now[0])
    out = io.StringIO()
    with Progress(Console(file=out, width=80, force_terminal=False)) as progress:
        progress.doing("loading the teacher t")
        progress.at_step(1)
        for count in range(1, 1001):
            now[0] += 0.125
            progress.part("sampling", count, 1000)
    lines = out.getvalue().splitlines()
    assert lines[0] == "loading the teacher t ..."
    assert [line.split("  ")[0] for line in lines[1:]] == [f"step 1: sampling {n} of 1,000" for n in (240, 480, 720, 960)]


def test_nothing_is_shown_to_a_quiet_console() -> None:
    out = io.StringIO()
    console = Console(file=out, quiet=True, force_terminal=False)
    with busy(console, "loading"), Progress(console) as progress:
        progress.doing("loading")
    assert out.getvalue() == ""


@pytest.mark.slow
def test_a_piped_run_says_what_it_is_at_and_the_table_is_there_in_its_last_evaluation(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from zppo.train import finish

    seen: list[str] = []
    evaluate = finish.evaluate_held_out

    def look(student: Any, questions: Any, settings: Any, log: StepLog) -> Any:
        assert log.watch is not None
        seen.append(shown(log.watch.__self__))  # type: ignore[attr-defined]
        return evaluate(student, questions, settings, log)

    monkeypatch.setattr(finish, "evaluate_held_out", look)
    AcceleratorState._reset_state(True)
    out = io.StringIO()
    zppo.train(recipe, console=Console(file=out, width=80, force_terminal=False), output=tmp_path / "run", train__steps=1)
    lines = out.getvalue().splitlines()
    begun = [line for line in lines if line.endswith(" ...")]
    wanted = ("reading the questions", "loading the teacher", "reading the prompts", "loading the student", "checking the sampler",
              "evaluating on", "writing", "evaluating final/")  # fmt: skip
    places = [next(i for i, line in enumerate(begun) if line.startswith(text)) for text in wanted]
    assert places == sorted(places)
    assert len(seen) == 1 and "evaluating final/" in seen[0]


def test_running_means_begin_unbiased() -> None:
    """The mean after n steps weighs them by 0.9 ** age over the sum of these weights: no step counts more because it came first."""
    progress = Progress(Console(file=io.StringIO()))
    progress.plan(100, ("plain",), replay=False)
    values = [0.0, 1.0, 0.5, 0.25, 1.0] * 4
    for step, value in enumerate(values, 1):
        progress.step(step, {"seconds": {"step": 1.0}, "accuracy": {"plain": value}, "tokens_per_second": 1.0}, SimpleNamespace())
        weights = [0.9 ** (step - i) for i in range(1, step + 1)]
        expected = sum(w * v for w, v in zip(weights, values, strict=False)) / sum(weights)
        assert progress._means["plain"] == pytest.approx(expected)


def test_a_step_says_how_many_groups_moved_the_weights_and_the_last_evaluation_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("zppo.runs.display.time.monotonic", lambda: now[0])
    kinds = ("plain", "bcq", "ncq")
    for terminal, wide in ((True, 80), (False, 200)):
        out = io.StringIO()
        progress = Progress(Console(file=out, width=wide, force_terminal=terminal, _environ={"TERM": "xterm"}))
        progress.plan(3, kinds, replay=True, evaluates=True)
        said = []
        for step, live in ((1, 3), (2, 0), (3, 1)):
            now[0] += 4.0
            progress.step(step, METRICS | {"seconds": {"step": 4.0}, "groups": 8, "groups_with_gradient": live}, TOTALS)
            said.append(shown(progress) if terminal else out.getvalue().splitlines()[-1])
            if step == 1:  # as a held-out evaluation between two steps
                progress.doing("evaluating on 9 held-out questions")
                now[0] += 7.0
                progress.evaluation(1, SimpleNamespace(accuracy=0.5, by_level={}, ungraded=0, count=9))  # type: ignore[arg-type]
        assert "3 of 8" in said[0] and "none of 8" in said[1] and "1 of 8" in said[2] and "gradient" in said[2]
        assert "left 0:08 and the last evaluation" in said[0]  # how long one takes is not known yet
        assert "left 0:14" in said[1] and "and" not in said[1]  # (4 + 7 + 4) / 2 for the step, 7 for the evaluation
        assert "left: the last evaluation, 0:07" in said[2] and "left 0:00" not in said[2]
        assert all(len(line) <= wide for text in said for line in text.splitlines())


def test_a_run_without_held_out_questions_ends_with_its_last_step() -> None:
    out = io.StringIO()
    progress = Progress(Console(file=out, width=200, force_terminal=False))
    progress.plan(1, ("plain",), replay=False)
    progress.step(1, METRICS, TOTALS)
    line = out.getvalue()
    assert "left 0:00" in line and "gradient" not in line  # distillation has no advantages
