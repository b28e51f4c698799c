"""The results of an evaluation: its rows, the figure that they come to, and the folder that holds them.

A row is one sample of one question. Scores of rows become the figure of a benchmark, with others that are reported with it.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from types import MappingProxyType
from typing import IO, Any, Literal, NamedTuple

from zppo import __version__
from zppo.errors import DataError, EvaluationError, SettingsError, StorageError
from zppo.evals.benchmark import Aggregate, Benchmark
from zppo.evals.options import RESULT, EvalOptions
from zppo.grading.text import normalise
from zppo.names import check_file


class Scored(NamedTuple):
    """The final score of a row.

    Attributes:
        value: 0 to 1; the mean, where a row was sampled several times.
        facts: of its item.
    """

    value: float
    facts: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Figure:
    """What a benchmark comes to, as shares from 0 to 1.

    Attributes:
        value: the figure that counts in the family's average.
        error: its standard error, NaN below two rows.
        n: how many units it is the mean of: rows, seed questions, tasks.
        beside: other figures of the benchmark, by name.
    """

    value: float
    error: float
    n: int
    beside: Mapping[str, float] = field(default_factory=dict)


def figure(benchmark: Benchmark, rows: Sequence[Scored]) -> Figure:
    """The benchmark's figure over its scored rows; NaN without any."""
    return _AGGREGATES[benchmark.aggregate](rows)


def _mean(values: Iterable[float]) -> float:
    numbers = list(values)
    return math.fsum(numbers) / len(numbers) if numbers else math.nan


def _error(values: Sequence[float]) -> float:
    """Standard error of a mean, from the sample's standard deviation."""
    if len(values) < 2:
        return math.nan
    mean = _mean(values)
    return math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))


def _groups(rows: Sequence[Scored], fact: str) -> dict[str, list[float]]:
    """Values by what a fact says, in the order in which it is first said; rows without it are left out."""
    groups: dict[str, list[float]] = {}
    for row in rows:
        if row.facts.get(fact) not in (None, ""):
            groups.setdefault(str(row.facts[fact]), []).append(row.value)
    return groups


_BREAKDOWNS = ("config", "part", "task", "type", "version", "answer_type", "track", "duration")


def _plain(rows: Sequence[Scored]) -> Figure:
    """The mean over rows, with that of the groups that a benchmark reports."""
    values = [row.value for row in rows]
    beside: dict[str, float] = {}
    for fact in _BREAKDOWNS:
        groups = _groups(rows, fact)
        if len(groups) > 1:
            beside |= {f"{fact} {name}": _mean(group) for name, group in groups.items()}
    return Figure(_mean(values), _error(values), len(values), beside)


def _worst_case(rows: Sequence[Scored]) -> Figure:
    """DynaMath: the share of seed questions right in every variant; the average over all rows is reported too."""
    seeds = list(_groups(rows, "seed").values())
    worst = [min(values) for values in seeds]
    always = sum(min(values) == max(values) for values in seeds)
    beside = {"average": _mean(row.value for row in rows), "consistent": always / len(seeds) if seeds else math.nan}
    return Figure(_mean(worst), _error(worst), len(worst), beside)


# OCRBench v2 averages kinds of ability, not rows: which tasks belong to each.
_ABILITIES: Mapping[str, str] = MappingProxyType(
    {
        task: ability
        for ability, tasks in {
            "text recognition": "text recognition en, fine-grained text recognition en, full-page OCR en, full-page OCR cn",
            "text referring": "text grounding en, VQA with position en",
            "text spotting": "text spotting en",
            "relation extraction": "key information extraction en, key information mapping en, key information extraction cn, "
            "handwritten answer extraction cn",
            "element parsing": "document parsing en, chart parsing en, table parsing en, formula recognition en, document parsing cn, "
            "table parsing cn, formula recognition cn",
            "mathematical calculation": "math QA en, text counting en",
            "visual text understanding": "document classification en, cognition VQA en, diagram QA en, cognition VQA cn",
            "knowledge reasoning": "reasoning VQA en, science QA en, APP agent en, ASCII art classification en, reasoning VQA cn, "
            "text translation cn",
        }.items()
        for task in tasks.split(", ")
    }
)  # fmt: skip


def _abilities(rows: Sequence[Scored]) -> Figure:
    """OCRBench v2: the mean over kinds of ability of the mean over their rows; the mean over rows is reported too."""
    return _axes([Scored(row.value, {"axis": _ABILITIES.get(str(row.facts.get("task")), "other")}) for row in rows])


def _axes(rows: Sequence[Scored]) -> Figure:
    """MultiChallenge, VLMs-are-Blind: the mean of its four axes, of its eight tasks; the mean over all rows is reported too."""
    groups = _groups(rows, "axis")
    means = {name: _mean(values) for name, values in groups.items()}
    # Independent means: the error of their average.
    errors = [_error(values) for values in groups.values()]
    error = math.sqrt(math.fsum(e * e for e in errors)) / len(errors) if errors else math.nan
    return Figure(_mean(means.values()), error, len(means), means | {"all rows": _mean(row.value for row in rows)})


def _wemath(rows: Sequence[Scored]) -> Figure:
    """We-Math: accuracy over all rows; the four-way score of `mastery` is reported too."""
    values = [row.value for row in rows]
    return Figure(_mean(values), _error(values), len(values), mastery(rows))


def mastery(rows: Sequence[Scored]) -> dict[str, float]:
    """We-Math's four-way score over its composite problems (Qiao et al. 2024, section 3.3).

    A composite problem, which has the key `<n>steps_multi`, is looked at together with its steps, `<n>steps_1` to n:

    - IK, insufficient knowledge: it is wrong, and so is a step.
    - IG, inadequate generalisation: it is wrong, and every step is right.
    - CM, complete mastery: it is right, and every step is (strict), or at least one is (loose).
    - RM, rote memorisation: it is right, and a step is wrong (strict), or every one is (loose).

    The score is CM + IG / 2, as a share of the composite problems; RM is also reported as a share of those that are right. Problems of
    which a row is missing are left out.

    Returns:
        IK, IG, and for strict and loose CM, RM, RM of right, score; empty without a whole problem.
    """
    problems: dict[tuple[str, str], dict[str, bool]] = {}
    for row in rows:
        steps, _, part = str(row.facts.get("key", "")).partition("steps_")
        if part:
            problems.setdefault((str(row.facts.get("problem")), steps), {})[part] = row.value >= 0.5
    whole = [
        ([parts[str(i)] for i in range(1, int(steps) + 1)], parts["multi"])
        for (_, steps), parts in problems.items()
        if steps.isdigit() and parts.keys() >= {"multi", *(str(i) for i in range(1, int(steps[:2]) + 1))}
    ]
    if not whole:
        return {}
    n = len(whole)
    right = [steps for steps, composite in whole if composite]
    wrong = [steps for steps, composite in whole if not composite]
    inadequate = sum(all(steps) for steps in wrong) / n
    result = {"IK": 1 - len(right) / n - inadequate, "IG": inadequate}
    for name, mastered in (("strict", all), ("loose", any)):
        complete = sum(mastered(steps) for steps in right) / n
        rote = len(right) / n - complete
        result |= {
            f"CM {name}": complete,
            f"RM {name}": rote,
            f"RM of right {name}": rote * n / len(right) if right else 0.0,
            f"score {name}": complete + inadequate / 2,
        }
    return result


_AGGREGATES: Mapping[Aggregate, Callable[[Sequence[Scored]], Figure]] = MappingProxyType(
    {"mean": _plain, "worst case": _worst_case, "wemath": _wemath, "abilities": _abilities, "axes": _axes}
)


By = Literal["rule", "judge", "open", "left out"]
TRUNCATED = "max_tokens"
TOO_LONG = "model_length"
"""What inspect-ai calls it where the server refuses a conversation that is too long for the model's context."""
BROKEN = "broken_media"
"""A question that is not asked, since its clip or a picture of it cannot be decoded."""
MALFORMED = "the judge's reply is malformed"


@dataclass(frozen=True, slots=True)
class SampleResult:
    """One sample of one question.

    Attributes:
        id, epoch: which one; epochs count from 1.
        by: who decided; open: not decided yet, because model or judge failed. A repeated call asks again;
            left out: it has pictures, and the model takes none.
        value: 0 to 1; None while open, or where it is left out.
        boxless: strictly by box it is 0: there is no box that can be read, whatever the judge found in the text.
        text: what the model wrote, thoughts included.
        answer: what was extracted.
        reason: what the rules said, in a word or two.
        reply: the judge's, "" where it was not asked.
        error: why the row is open, left out, or 0 without having been asked or judged.
        finish: why the model stopped.
        tokens_in, tokens_out: of the model, as its server counts.
        judge_tokens: of the judge, in and out.
        gold: what is right.
        facts: of the question.
    """

    id: str
    epoch: int
    by: By
    value: float | None = None
    boxless: bool = False
    text: str = ""
    answer: str | None = None
    reason: str = ""
    reply: str = ""
    error: str = ""
    finish: str = ""
    tokens_in: int = 0
    tokens_out: int = 0
    judge_tokens: tuple[int, int] = (0, 0)
    gold: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)


_MOST_NAMED = 20  # rows of a kind that eval.json names


def scored(rows: Iterable[SampleResult], *, by_box: bool = False) -> list[Scored]:
    """Decided rows by question: samples of one question are no new questions, their mean is one value (so errors are clustered).

    Args:
        by_box: the values strictly by box.
    """
    by_id: dict[str, list[SampleResult]] = {}
    for row in rows:
        if row.value is not None:
            by_id.setdefault(row.id, []).append(row)
    return [Scored(fmean(0.0 if by_box and row.boxless else row.value or 0.0 for row in group), group[0].facts) for group in by_id.values()]


def several_samples(benchmark: Benchmark, rows: Iterable[SampleResult]) -> dict[str, float | None]:
    """What several answers to each question come to, as the benchmark's own figure does, with standard errors over questions.

    - avg: their mean (avg@k); it is the benchmark's figure.
    - pass: the best of them (pass@k).
    - maj: the answer that most of them give (maj@k). Right answers are all one, since all are the gold; wrong ones are alike by their text.
      Answers with equally many votes share, and a question without any answer is 0. None where whole responses are graded.
    """
    by_id: dict[str, list[SampleResult]] = {}
    for row in rows:
        if row.value is not None:
            by_id.setdefault(row.id, []).append(row)
    ways: dict[str, Callable[[list[SampleResult]], float]] = {
        "avg": lambda group: fmean(row.value or 0.0 for row in group),
        "pass": lambda group: max(row.value or 0.0 for row in group),
        "maj": _voted,
    }
    result: dict[str, float | None] = {}
    for name, way in ways.items():
        found = figure(benchmark, [Scored(way(group), group[0].facts) for group in by_id.values()])
        voted = name != "maj" or benchmark.judge not in _GRADED
        result |= {name: _number(found.value) if voted else None, f"{name}_error": _number(found.error) if voted else None}
    return result


_GRADED = ("eval_mmvet", "eval_multichallenge")  # judges of whole responses, which give no answer to vote for


def _voted(group: list[SampleResult]) -> float:
    votes: dict[str, list[float]] = {}
    for row in group:
        right = row.value == 1.0
        if right or row.answer is not None:
            votes.setdefault("right" if right else f"wrong {normalise(row.answer or '')}", []).append(row.value or 0.0)
    most = max(map(len, votes.values()), default=0)
    return fmean(fmean(values) for values in votes.values() if len(values) == most) if votes else 0.0


def summary(benchmark: Benchmark, rows: Sequence[SampleResult], expected: int, samples: int = 1) -> dict[str, Any]:
    """The benchmark's part of eval.json: figure, error, counts. Shares are from 0 to 1; null where there is no number.

    Args:
        expected: rows that there should be, samples counted; those that are missing are open.
        samples: of each question.
    """
    result, by_box = figure(benchmark, scored(rows)), figure(benchmark, scored(rows, by_box=True))
    decided = [row for row in rows if row.by not in ("open", "left out")]
    malformed = [row for row in decided if row.error == MALFORMED]
    broken = [row for row in decided if row.finish == BROKEN]
    left_out = [row for row in rows if row.by == "left out"]
    return {
        "name": benchmark.name,
        "title": benchmark.title,
        "family": benchmark.family,
        "aggregate": benchmark.aggregate,
        "value": _number(result.value),
        "error": _number(result.error),
        "by_box": _number(by_box.value),
        "by_box_error": _number(by_box.error),
        "at_k": {"k": samples, **several_samples(benchmark, rows)} if samples > 1 else None,
        "units": result.n,
        "beside": {name: _number(value) for name, value in result.beside.items()},
        "expected": expected,
        "rows": len(decided),
        "by_rule": sum(row.by == "rule" for row in decided),
        "by_judge": sum(row.by == "judge" for row in decided),
        "no_answer": sum(row.boxless and row.finish not in (TOO_LONG, BROKEN) for row in decided),
        "truncated": sum(row.finish == TRUNCATED for row in decided),
        "too_long": sum(row.finish == TOO_LONG for row in decided),
        "malformed": len(malformed),
        "malformed_rows": _named(malformed),
        "broken": len(broken),
        "broken_rows": _named(broken),
        "why_broken": broken[0].error if broken else "",
        "left_out": len(left_out),
        "why_left_out": left_out[0].error if left_out else "",
        "open": expected - len(decided) - len(left_out),
        "judge_errors": sum(row.by == "open" and bool(row.finish) for row in rows),
        "tokens_in": sum(row.tokens_in for row in rows),
        "tokens_out": sum(row.tokens_out for row in rows),
        "judge_tokens_in": sum(row.judge_tokens[0] for row in rows),
        "judge_tokens_out": sum(row.judge_tokens[1] for row in rows),
    }


def _named(rows: Sequence[SampleResult]) -> list[str]:
    """Ids of the first questions among the rows."""
    return sorted({row.id for row in rows})[:_MOST_NAMED]


def families(benchmarks: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The mean of each family over its benchmarks that have a figure, with its standard error (benchmarks are independent)."""
    result: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(str(each["family"]) for each in benchmarks):
        have = [each for each in benchmarks if each["family"] == name and each["value"] is not None]
        if not have:
            continue
        errors = [math.nan if each["error"] is None else float(each["error"]) for each in have]
        result[name] = {
            "value": fmean(float(each["value"]) for each in have),
            "by_box": fmean(float(each["by_box"]) for each in have),
            "error": _number(math.sqrt(math.fsum(e * e for e in errors)) / len(errors)),
            "benchmarks": [each["name"] for each in have],
        }
    return result


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

FORMAT = "zppo eval 1"
WORK = "eval"


def opened(path: Path, mode: Literal["wb", "ab"]) -> IO[bytes]:
    """A file of an evaluation to write to, in a folder that is made where there is none. StorageError where that is refused."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return open(path, mode)
    except OSError as error:
        raise StorageError(f"{path} cannot be written ({error.strerror or error}); name another folder with --output") from error


@dataclass(frozen=True, slots=True)
class EvalFolder:
    """Places in the folder: eval.json, and below eval/ the rows, the journals, the transcripts and the server's log."""

    path: Path

    @property
    def result(self) -> Path:
        return self.path / RESULT

    def inside(self, *names: str) -> Path:
        return self.path.joinpath(WORK, *names)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """A lock: no other process may evaluate into the folder within the block. It ends with the process, however that ends.

        Raises:
            EvaluationError: another one does.
            StorageError: the folder cannot be written.
        """
        with opened(self.inside("lock"), "ab") as file:
            try:
                if fcntl is not None:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise EvaluationError(
                    f"another zppo eval is at work in {self.path}: wait for its end, or name another folder with --output"
                ) from None
            except OSError:  # a file system without locks
                pass
            yield

    def read(self) -> dict[str, Any] | None:
        """What eval.json holds, None where there is none. DataError where it cannot be read."""
        if not self.result.exists():
            return None
        check_file(self.result, DataError)
        try:
            state = json.loads(self.result.read_text(encoding="utf-8"))
            if state["format"] != FORMAT:
                raise ValueError(f"its format is {state['format']!r}")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{self.result} is no result of `zppo eval` ({error}); name another folder with --output") from error
        return dict(state)

    def write(self, state: Mapping[str, Any]) -> None:
        """Replaces eval.json in one go; StorageError where it cannot be written."""
        half = self.result.with_suffix(".part")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            half.write_text(json.dumps(state, ensure_ascii=True, indent=1, allow_nan=False), encoding="utf-8")
            os.replace(half, self.result)
        except OSError as error:
            raise StorageError(f"{self.result} cannot be written ({error.strerror or error}); name another folder with --output") from error


def default_output(options: EvalOptions) -> Path:
    """The folder of a run itself, so that its report shows the results; else one below runs/ that is named after the model."""
    folder = Path(options.model)
    if (folder / "recipe.yaml").is_file():
        return folder
    name = options.name or options.model.partition(",")[0]
    words = "".join(c if c.isalnum() or c in "-_." else "-" for c in name.split("://")[-1]).strip("-.")
    return Path("runs") / f"eval-{words[-80:] or 'model'}"


def begin(folder: EvalFolder, label: str, source: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The state to go on with, or a new one.

    Args:
        label: how results call the model.
        source: MODEL of the command.

    Raises:
        SettingsError: the folder holds an evaluation under other settings.
    """
    state = folder.read()
    if state is None:
        return {
            "format": FORMAT,
            "zppo": __version__,
            "label": label,
            "source": source,
            "settings": dict(settings),
            "benchmarks": [],
            "skipped": [],
            "families": {},
        }
    if state["settings"].get("judge") is None:  # nothing was judged yet
        state["settings"]["judge"] = settings["judge"]
    if settings["judge"] is None:  # nothing will be
        settings = {**settings, "judge": state["settings"]["judge"]}
    for name, value in settings.items():
        if state["settings"].get(name) != json.loads(json.dumps(value)):
            raise SettingsError(
                f"{folder.result} was made with {name} = {state['settings'].get(name)!r}, and now it is {value!r}: rows of both must not "
                "stand beside one another; name another folder with --output"
            )
    return state


def with_benchmark(state: Mapping[str, Any], part: Mapping[str, Any], order: list[str]) -> dict[str, Any]:
    """The state with the results of a benchmark, in the registry's order, family averages anew."""
    parts = [each for each in state["benchmarks"] if each["name"] != part["name"]] + [dict(part)]
    parts.sort(key=lambda each: order.index(each["name"]) if each["name"] in order else len(order))
    skipped = [each for each in state["skipped"] if each["name"] != part["name"]]
    return {**state, "benchmarks": parts, "skipped": skipped, "families": families(parts)}


def with_think_open(state: Mapping[str, Any]) -> dict[str, Any]:
    """The state once it is known that the model's prompts open a think block: what was decided before is to be decided anew."""
    parts = [{**each, "stale": True} for each in state["benchmarks"]]
    return {**state, "settings": {**state["settings"], "think_open": True}, "benchmarks": parts}


def with_skipped(state: Mapping[str, Any], name: str, family: str, why: str) -> dict[str, Any]:
    """The state with a benchmark whose data cannot be had; what an earlier call made of it stays."""
    skipped = [each for each in state["skipped"] if each["name"] != name]
    return {**state, "skipped": [*skipped, {"name": name, "family": family, "why": why}]}


def finished(state: Mapping[str, Any], name: str, limit: int | None, samples: int, strict: bool = False, definition: str = "") -> bool:
    """Whether an earlier call has decided every row that this one would.

    Args:
        strict: what was malformed or broken is not decided.
        definition: as `Benchmark` has it.
    """
    for each in state["benchmarks"]:
        if each["name"] == name:
            left = each["open"] or each.get("stale") or (strict and (each.get("malformed") or each.get("broken")))
            same = each["limit"] == limit and each["samples"] == samples and each.get("definition", "") == definition
            return same and not left
    return False
