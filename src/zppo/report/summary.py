"""Everything that a page shows of a run besides the stories, worked out from its folder."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zppo.config.methods import METHODS
from zppo.config.recipe import load_recipe
from zppo.errors import ZPPOError
from zppo.planning.flops import as_run
from zppo.planning.model_shapes import size_of
from zppo.report.audits import Counts, ZoneStory, run_rows, zone_story
from zppo.report.bootstrap import mean_interval
from zppo.report.charts import ChartSpec, charts_of
from zppo.report.read_run import FINAL, RECIPE, RolloutFileError, Run, StepScan, held_out_accuracies, open_run, scan_file
from zppo.report.stories import QuestionLine, held_out_lines, question_lines
from zppo.report.tables import EVAL, Table, evaluation_table, percent, read_evaluation, tables_of
from zppo.report.tells import tell_warnings, tells
from zppo.runs.log import HELD_OUT, METRICS, ROLLOUTS
from zppo.train.health_checks import HealthChecks


@dataclass(frozen=True, slots=True)
class Summary:
    """A run, worked out.

    Attributes:
        outcome: what came out, in one sentence.
        head: what was run and what it took, label -> text, in the order of the page.
        charts, tables: what its sections show.
        lines: one per question, by key; training first, then held-out ones.
        warnings: what a person should know: tells of candidates, and what the metrics of the steps show.
        left_out: files of rollouts and of held-out completions that are cut or damaged, and why. Nothing of them is in the rest;
            where the completions alone are, which only stories need, the stories lack them.
    """

    run: Run
    outcome: str
    head: dict[str, str]
    charts: list[ChartSpec]
    tables: list[Table]
    lines: dict[str, QuestionLine]
    warnings: list[str] = field(default_factory=list)
    left_out: dict[Path, str] = field(default_factory=dict)


class Reader:
    """Reads a run folder again and again; a rollout file that has not changed is read once.

    Args:
        folder: the run folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._scans: dict[Path, tuple[tuple[int, int], StepScan]] = {}

    def stamp(self) -> tuple[tuple[str, int, int], ...]:
        """Changes whenever a file of the run does; cheap."""
        run_files = [*self.folder.glob("*.jsonl"), *self.folder.glob(EVAL), *(self.folder / FINAL).glob("README.md")]
        completions = [path for name in (ROLLOUTS, HELD_OUT) for path in (self.folder / name).glob("*-*.parquet")]
        return tuple((path.name, *_stamp(path)) for path in sorted([*run_files, *completions]))

    def read(self) -> Summary:
        """The run as it is now.

        Raises:
            CheckpointError: the folder holds no run, or one of another version.
        """
        run = open_run(self.folder)
        left_out: dict[Path, str] = {}
        training, held_out = run.rollout_files, run.held_out_files
        every = self._scan([*training, *held_out], left_out)
        scans, evaluations = ([every[path] for path in paths if path in every] for paths in (training, held_out))
        counts: Counts = Counter()
        for scan in scans:
            counts.update(scan.counts)
        shares = tells(counts, [pair for scan in scans for pair in scan.pairs])
        matches = run_rows([scan.counts for scan in scans])
        visits = [visit for scan in scans for visit in scan.visits]
        zone = zone_story(run.buffer, run.group_size, run.threshold, run.last_step, visits) if run.replays and run.steps else None
        return Summary(
            run=run,
            outcome=outcome(run, zone),
            head=_head(run) | ({"left out, damaged": ", ".join(path.name for path in left_out)} if left_out else {}),
            charts=charts_of(run, scans, matches, zone),
            tables=[*tables_of(run, counts, matches, zone, shares), *_benchmarks(self.folder)],
            lines=question_lines(run, scans) | held_out_lines(evaluations),
            warnings=[*tell_warnings(shares), *_health(run)],
            left_out=left_out,
        )

    def _scan(self, paths: Sequence[Path], left_out: dict[Path, str]) -> dict[Path, StepScan]:
        scans = {}
        for path in paths:
            stamp = _stamp(path)
            known = self._scans.get(path)
            try:
                scans[path] = known if known and known[0] == stamp else (stamp, scan_file(path))
            except RolloutFileError as error:
                left_out[path] = str(error)
        self._scans = scans
        return {path: scan for path, (_, scan) in scans.items()}


def _health(run: Run) -> list[str]:
    """The warnings that the metrics of the steps gave while the run went on, or would have given."""
    with suppress(ZPPOError):
        checks = HealthChecks.of(load_recipe(run.recipe))
        lines = sorted([*run.steps, *run.evaluations], key=lambda line: line["step"])  # an evaluation comes after its step
        return [text for line in lines for text in checks.advice(line["step"], line)]
    return []


def _benchmarks(folder: Path) -> list[Table]:
    """The table of `zppo eval`, where it has results in the run's folder."""
    if not (folder / EVAL).is_file():
        return []
    table = evaluation_table(read_evaluation(folder / EVAL))
    return [table] if table.rows else []


def _stamp(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except FileNotFoundError:  # a resumed run took it back
        return 0, 0
    return status.st_mtime_ns, status.st_size


def outcome(run: Run, zone: ZoneStory | None) -> str:
    """What came out, in one sentence."""
    if not run.steps:
        if run.finished and run.evaluations:
            return f"Held-out accuracy {percent(run.evaluations[-1]['accuracy'])}; no step was trained."
        return "No step is finished yet."
    parts = []
    first = next((e for e in run.evaluations if e["step"] == 0), None)
    if run.evaluations and first and (last := run.evaluations[-1]) is not first:
        levels = [f"{name} {percent(first['by_level'].get(name))} → {percent(v)}" for name, v in last["by_level"].items()]
        detail = f" ({', '.join(levels)})" if levels else ""
        moved = ", " + words if (words := change(run)) else ""
        parts.append(f"held-out accuracy {percent(first['accuracy'])} → {percent(last['accuracy'])}{detail}{moved}")
    if zone is not None and zone.admitted.any():
        name, admitted, graduated, _ = zone.totals()[0]
        if admitted:
            parts.append(f"{graduated:,} of {admitted:,} entries admitted at {name} graduated ({graduated / admitted:.0%})")
    plain = [line["accuracy"]["plain"] for line in run.steps if "plain" in line["accuracy"]]
    if not parts and plain:
        parts.append(f"accuracy of plain rollouts {percent(plain[0])} → {percent(plain[-1])}")
    planned = run.setting("train.steps")
    state = "" if run.finished else f" after {run.last_step:,} of {planned:,} steps" if planned else f" after {run.last_step:,} steps"
    text = "; ".join(parts) or "No evaluation yet"
    return f"{text[0].upper()}{text[1:]}{state}."


def change(run: Run) -> str:
    """Held-out accuracy after training minus before, with a 95% interval over questions; "" where fewer than two were asked both times."""
    before, after = held_out_accuracies(run, before=True), held_out_accuracies(run)
    pairs = [(value, before.get(question)) for question, value in after.items()]
    mean = mean_interval([value - old for value, old in pairs if value is not None and old is not None])
    if mean.n < 2:
        return ""
    words = "" if mean.low > 0 or mean.high < 0 or mean.low == mean.high else ", which may be chance"
    return f"{100 * mean.value:+.1f} points [{100 * mean.low:+.1f}, {100 * mean.high:+.1f}] over {mean.n:,} questions{words}"


def _head(run: Run) -> dict[str, str]:
    """What was run, and what it took."""
    method = str(run.setting("method.name", "zppo"))
    row = METHODS.get(method)
    student, teacher = str(run.setting("student.model", "?")), run.setting("teacher.model")
    planned = run.setting("train.steps")
    seconds = math.fsum(line["seconds"]["step"] for line in run.steps)
    waited = math.fsum(line.get("teacher_wait_seconds") or 0.0 for line in run.steps)
    of_planned = f" of {planned:,}" if planned and not run.finished else ""
    return {
        "method": f"{method} ({row.paper})" if row else method,
        "student": _model_name(student),
        "teacher": _model_name(str(teacher)) if teacher else "none",
        "data": _data_name(run.setting("data.train", "?")),
        "seed": str(run.setting("seed", 0)),
        "steps": f"{run.last_step:,}{of_planned}",
        "time": f"{duration(seconds)} of steps",
        "student tokens": f"{_total(run, 'student_tokens'):,}",
        "teacher tokens": f"{_total(run, 'teacher_tokens'):,}",
        **({"waited for the teacher": f"{duration(waited)} ({waited / seconds:.0%})"} if waited else {}),
        **({"judge tokens": f"{judged:,}"} if (judged := _total(run, "judge_completion_tokens")) else {}),
        "cost": _cost(run, student, teacher),
    }


def _total(run: Run, key: str) -> int:
    return sum(int(line.get(key) or 0) for line in run.steps)


def _cost(run: Run, student: str, teacher: str | None) -> str:
    """FLOPs with the exact savings, as `zppo cost` counts them; why not, where they are not known."""
    if not run.steps:
        return "no step yet"
    try:
        settings = load_recipe(run.folder / RECIPE)
        cost = as_run(settings, run.steps, run.folder / METRICS)
        sizes = [size_of(student).parameters, size_of(teacher).parameters if teacher else 0.0]
        if cost.saved.judge and settings.judging is not None:
            sizes.append(size_of(settings.judging[0].model).parameters)
    except ZPPOError:
        return "not known (zppo cost says why)"
    return f"{math.fsum(cost.saved.flops(*sizes).values()):.2g} FLOPs"


def _model_name(name: str) -> str:
    """A path by its last two parts; anything else as it is."""
    return "/".join(Path(name).parts[-2:]) if name.startswith("/") else name


def _data_name(train: Any) -> str:
    """data.train, which may be a list of sources."""
    sources = [each.get("source") if isinstance(each, Mapping) else each for each in (train if isinstance(train, list) else [train])]
    return ", ".join(_model_name(str(source)) for source in sources)


def duration(seconds: float) -> str:
    """4000 -> "1 h 07 min"."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"
