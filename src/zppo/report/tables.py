"""The report's tables: held-out accuracy, the zone and the audits in numbers.

Results of `zppo eval` (eval.json): as a part of a run's report, and two of them compared by the cluster bootstrap (App. F.6).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table as View
from rich.text import Text

from zppo.core.types import BCQ, NCQ
from zppo.errors import DataError, SettingsError
from zppo.names import check_file
from zppo.report.audits import Counts, MatchRow, Proportion, ZoneStory, fraction, median, paper_buffer, paper_rows, position_bias
from zppo.report.bootstrap import RESAMPLES, MethodDifference, bootstrap_table
from zppo.report.bootstrap import Table as Accuracies
from zppo.report.charts import AUDITS, DYNAMICS, ZONE, kind_name
from zppo.report.read_run import Run, differing
from zppo.report.tells import LEAST_QUESTIONS

_FEW = 5  # benchmarks below which a bootstrap over them has too little to draw from


class Strong(str):
    """A text of a table that stands out where it is shown."""


class Heading(str):
    """The first text of a row that is the heading of those below it."""


@dataclass(frozen=True, slots=True)
class Table:
    """A table of texts.

    Attributes:
        id, section: its anchor and where on the page it stands.
        title, caption: what it shows; how to read it.
        columns, rows: texts; the first column is words, the others are numbers.
    """

    id: str
    section: str
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str = ""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, with the places of what stands out in each row."""
        return asdict(self) | {"strong": [[i for i, text in enumerate(row) if isinstance(text, Strong)] for row in self.rows]}


def percent(value: float | None) -> str:
    """0.1234 -> "12.3%"; a dash where there is no number."""
    return "–" if value is None or math.isnan(value) else f"{value:.1%}"


def tables_of(
    run: Run, counts: Counts, matches: Sequence[MatchRow], zone: ZoneStory | None, tells: Mapping[str, Proportion]
) -> list[Table]:
    """Every table that has something to show, in the order of the page; `matches` are the rows of the candidate-match audit."""
    audits = (_match(counts, matches), _tells(counts, tells), _leaks(counts), _compression(run.steps))
    return [table for table in (_held_out(run), _eligible(run), _zone(zone), *audits) if table.rows]


_PARTS = {
    "easy": "easy",
    "bcq": "hard, and BCQ can be made",
    "ncq": "hard, and NCQ can be made",
    "unasked": "of these the teacher was not asked",
}


def _eligible(run: Run) -> Table:
    """Fig. 5a as numbers: what could be asked again, and beside it what the batch held."""
    logged = [line["eligibility"] for line in run.steps if "eligibility" in line]
    composed = [line["composition"] for line in run.steps]
    kinds = {kind for parts in composed for kind in parts} & {BCQ, NCQ}

    def mean(parts: Sequence[Mapping[str, float]], *names: str) -> str:
        return percent(math.fsum(part.get(name, 0.0) for part in parts for name in names) / len(parts)) if parts else "not logged"

    sources = {"easy": ("easy",), "bcq": ("bcq",), "ncq": ("bcq", "ncq", "unasked"), "unasked": ("unasked",)}
    rows = tuple(
        (words, mean(logged, *sources[part]), "–" if part == "unasked" else mean(composed, part)) for part, words in _PARTS.items() if kinds
    )
    caption = (
        "Means over the steps. Before the caps: shares of the questions asked plainly; NCQ can be made of every hard one, BCQ where a "
        "teacher response was correct. In the batch: shares of its groups."
    )
    if logged and len(logged) < len(run.steps):
        caption += f" {len(run.steps) - len(logged):,} steps of an older version did not log what was before the caps."
    columns = ("", "before the caps (Fig. 5a)", "in the batch")
    return Table("eligibility-table", DYNAMICS, "What could be asked again, and what was", columns, rows, caption)


def _held_out(run: Run) -> Table:
    first = next((e for e in run.evaluations if e["step"] == 0), None)
    last = run.evaluations[-1] if run.evaluations else None
    rows: list[tuple[str, ...]] = []
    if first and last and last is not first:
        rows = [(level, percent(first["by_level"].get(level)), percent(value)) for level, value in last["by_level"].items()]
        rows.append(("all", percent(first["accuracy"]), percent(last["accuracy"])))
    caption = f"{last['count']:,} completions, plain prompts." if last else ""
    after = f"after step {last['step']:,}" if last else ""
    return Table("held-out-table", DYNAMICS, "Held-out accuracy", ("level", "before", after), tuple(rows), caption)


def _zone(zone: ZoneStory | None) -> Table:
    rows: list[tuple[str, ...]] = []
    if zone is not None and zone.admitted.any():
        everything = tuple(w for waits in zone.waits for w in waits)
        for row, waits in zip(zone_rows(zone.totals(), "this run"), (*zone.waits, everything), strict=True):
            rows.append((*row, f"{median(waits):g}" if waits else "–"))
        rows += [(*row, "–") for row in paper_zone_rows()]
    columns = (*ZONE_COLUMNS, "median steps to it")
    return Table("zone-table", ZONE, "Entries by plain accuracy at admission", columns, tuple(rows), ZONE_CAPTION)


ZONE_COLUMNS = ("accuracy at admission", "admitted", "graduated", "evicted", "graduated / admitted", "graduated / left")
ZONE_CAPTION = (
    "Entries of the prompt replay buffer by plain accuracy at admission; a question that comes back after it left is a new entry. Left: "
    "graduated or evicted. Rows of the paper: arXiv 2606.18216, Figs. 4, 5b and 23."
)


def zone_rows(totals: Sequence[tuple[str, int, int, int]], source: str) -> list[tuple[str, ...]]:
    """Rows of `ZONE_COLUMNS` from (bin, admitted, graduated, evicted)."""
    return [
        (f"{name} · {source}", f"{admitted:,}", f"{graduated:,}", f"{evicted:,}", percent(graduated / admitted if admitted else None),
         percent(graduated / (graduated + evicted) if graduated + evicted else None))
        for name, admitted, graduated, evicted in totals
    ]  # fmt: skip


def paper_zone_rows() -> list[tuple[str, ...]]:
    """The paper's rows of `ZONE_COLUMNS`, as far as it gives numbers: two methods on the 2B student."""
    rows: list[tuple[str, ...]] = []
    for source, values in paper_buffer().items():
        for name in ("0%", "12.5%"):
            admitted, graduated = values.get(f"admitted at {name}"), values.get(f"graduated from {name}")
            share = values.get(f"graduated share of {name} bin", graduated / admitted if admitted and graduated else None)
            if graduated is not None and share is not None:
                into = f"{admitted:,.0f}" if admitted else "–"
                rows.append((f"{name} · {source}", into, f"{graduated:,.0f}", "–", percent(share), "–"))
        if "evicted in all" in values:
            graduated, evicted = values["graduated in all"], values["evicted in all"]
            out = percent(graduated / (graduated + evicted))
            rows.append((f"all · {source}", "–", f"{graduated:,.0f}", f"{evicted:,.0f}", "–", out))
    return rows


def _match(counts: Counts, matches: Sequence[MatchRow]) -> Table:
    kinds = {row.kind for row in matches}
    rows = tuple(
        (
            f"{kind_name(row.kind)} {row.subset} · {row.source}",
            f"{row.rollouts:,}",
            *(percent(v) for v in (row.positive, row.negative, row.other, row.none, row.accuracy)),
        )
        for kind in (BCQ, NCQ)
        for row in (*matches, *paper_rows())
        if row.kind == kind and kind in kinds and row.rollouts
    )
    columns = ("rollouts", "how many", "the right candidate's", "a wrong one's", "another or none", "of these without answer", "accuracy")
    known, total = counts["ncq", "unseen known"], counts["ncq", "unseen known"] + counts["ncq", "unseen unknown"]
    caption = (
        "Candidate-match audit: whose answer a rollout boxes, both sides in lower case, with spaces collapsed and \\text{} stripped; over "
        "the last three steps with rollouts of a kind, as in the paper, and over the whole run. Accuracy is that of all rollouts of the "
        "kind. For NCQ the right candidate is any correct response of the teacher's to the question in that step, which the NCQ rollout "
        f"never saw (there was one for {known:,} of {total:,} NCQ rollouts), and the wrong ones are those listed. "
        "Rows of the paper: arXiv 2606.18216, Tabs. 16 and 17."
    )
    if alone := counts["ncq", "one answer alone"]:
        caption += (
            f" For {alone:,} NCQ rollouts the log has no answers of the teacher (an older version, or it was not asked): they are compared "
            "with the right candidate of the same question's BCQ, where there was one."
        )
    return Table("match-table", AUDITS, "Whose answer a rollout gives", columns, rows, caption)


def _shares(rows: Sequence[tuple[str, Proportion]]) -> tuple[tuple[str, ...], ...]:
    return tuple((words, percent(s.share), f"{percent(s.low)} to {percent(s.high)}", f"{s.n:,}") for words, s in rows if s.n)


_TELLS = {
    "place": "BCQ prompts in which the right candidate stands first",
    "length": "BCQ prompts in which the right candidate is the longer one",
    "style": "BCQ questions whose right candidate is told by words and marks alone",
}


def _tells(counts: Counts, tells: Mapping[str, Proportion]) -> Table:
    rows = (
        ("BCQ rollouts that follow a candidate and follow the first one", position_bias(counts)),
        *((_TELLS[name], share) for name, share in tells.items()),
    )
    caption = (
        "50% is no tell. 95% intervals by Wilson's score; for rollouts at the effective number, because those of one prompt are alike. "
        "Candidates of equal length are left out of their row. Words and marks: a classifier that sees neither numbers nor answers, on "
        f"questions that it has not learned from; from {LEAST_QUESTIONS} questions on."
    )
    return Table("tells-table", AUDITS, "Tells: place, length, style", ("", "share", "95% interval", "of"), _shares(rows), caption)


def _leaks(counts: Counts) -> Table:
    rows = (
        (NCQ, "gold boxed", "NCQ prompts in which something that is said to be wrong boxes the right answer"),
        (BCQ, "gold in wrong", "BCQ prompts whose wrong candidate boxes the right answer"),
        (BCQ, "answer changed", "BCQ prompts with a candidate that boxes another answer than the completion behind it"),
        (BCQ, "one box", "BCQ prompts in which only one of the two candidates has a box"),
    )
    shares = [(words, fraction(counts["leak", kind, name], counts["leak", kind, "checked"])) for kind, name, words in rows]
    unchecked = counts["leak", BCQ, "unchecked"] + counts["leak", NCQ, "unchecked"]
    caption = "Read from the prompts as the student saw them, answers compared after normalisation."
    if unchecked:
        caption += f" {unchecked:,} prompts have no <candidate> blocks to read (a template of one's own) and are left out."
    return Table("leaks-table", AUDITS, "Answer leaks", ("", "share", "95% interval", "of"), _shares(shares), caption)


def _compression(steps: Sequence[Mapping[str, Any]]) -> Table:
    def total(name: str) -> float:
        return math.fsum(line.get(name) or 0 for line in steps)

    asked = total("compression_asked")
    rows: list[tuple[str, ...]] = []
    if asked:
        rows = [
            ("completions sent to be compressed", f"{asked:,.0f}", ""),
            ("summaries refused: the answer did not survive, or the form is wrong", f"{total('compression_failed'):,.0f}",
             percent(total("compression_failed") / asked)),
            *([("of these, the instructions repeated", f"{echoed:,.0f}", percent(echoed / asked))]
              if (echoed := total("compression_echoed")) else []),
            ("requests that got no reply", f"{total('compression_unreachable'):,.0f}", percent(total("compression_unreachable") / asked)),
            ("NCQ candidates shown uncompressed", f"{total('ncq_raw_candidates'):,.0f}", ""),
        ]  # fmt: skip
        if bcq := total("bcq_prompts"):
            raw = total("bcq_raw_pairs")
            rows.append(("BCQ prompts with both candidates uncompressed", f"{raw:,.0f}", f"{percent(raw / bcq)} of {bcq:,.0f}"))
    return Table("compression-table", AUDITS, "Compression", ("", "how many", "share"), tuple(rows))


EVAL = "eval.json"
SECTION = "Benchmarks"
_NO_SCALE = "-"
_MOST_PARTS = 12  # figures of one benchmark that are shown next to its own


@dataclass(frozen=True, slots=True)
class Result:
    """A benchmark's figure.

    Attributes:
        value, error: shares from 0 to 1; the error is NaN where it is not known.
        rows, open: decided rows, and those that are not decided yet.
        beside: other figures of the benchmark, of its parts or of another kind, by name; NaN where there is none.
        left_out: rows that could not be put to the model.
        settings: what must be alike for a comparison: questions and samples.
    """

    family: str
    value: float
    error: float
    rows: int
    open: int
    left_out: int
    beside: Mapping[str, float]
    settings: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class EvaluationResults:
    """What eval.json holds, checked.

    Attributes:
        path: the file.
        label: the model.
        results: by benchmark, those with a figure.
        skipped: benchmarks whose data could not be had.
        protocol: decoding, judge and all else that the rows have in common.
    """

    path: Path
    label: str
    results: Mapping[str, Result]
    skipped: tuple[str, ...]
    protocol: Mapping[str, Any]


def read_evaluation(path: Path) -> EvaluationResults:
    """The results in a file of `zppo eval`, or in the folder that holds it.

    Raises:
        DataError: it cannot be read, or is none.
    """
    path = path / EVAL if path.is_dir() else path
    check_file(path, DataError)
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        results = {str(each["name"]): _result(each) for each in state["benchmarks"] if each["value"] is not None}
        skipped = tuple(str(each["name"]) for each in state["skipped"])
        return EvaluationResults(
            path, str(state["label"]), results, skipped, {k: v for k, v in state["settings"].items() if k not in ("model", "weights")}
        )
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}); name the eval.json of `zppo eval`") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{path}: is no result of `zppo eval` ({type(error).__name__}: {error}); name its eval.json") from error


def _result(each: Mapping[str, Any]) -> Result:
    value, error = float(each["value"]), math.nan if each["error"] is None else float(each["error"])
    if not 0 <= value <= 1:
        raise ValueError(f"the score of {each['name']} is {value}")
    left_out = int(each.get("left_out", 0))
    beside = {str(name): math.nan if part is None else float(part) for name, part in each["beside"].items()}
    settings = (each["expected"], left_out, each["limit"], each["samples"])
    return Result(str(each["family"]), value, error, int(each["rows"]), int(each["open"]), left_out, beside, settings)


def evaluation_table(evaluation: EvaluationResults) -> Table:
    """The section of a run's report: figures by benchmark, then the means of families."""
    rows = []
    for name, each in evaluation.results.items():
        rows.append((name, each.family, percent(each.value), percent(each.error), f"{each.rows:,}", f"{each.open:,}"))
        if len(each.beside) <= _MOST_PARTS:
            rows += [(f"{name}: {part}", "", percent(value), "", "", "") for part, value in each.beside.items()]
    for family in dict.fromkeys(each.family for each in evaluation.results.values()):
        inside = [each for each in evaluation.results.values() if each.family == family]
        mean = math.fsum(each.value for each in inside) / len(inside)
        error = math.sqrt(math.fsum(each.error**2 for each in inside)) / len(inside)
        rows.append((f"mean of {len(inside)}", family, percent(mean), percent(error), "", ""))
    skipped = f" Skipped, since their data could not be had: {', '.join(evaluation.skipped)}." if evaluation.skipped else ""
    left_out = ", ".join(f"{name} {each.left_out:,}" for name, each in evaluation.results.items() if each.left_out)
    if left_out:
        skipped += f" Rows left out, since they have pictures and the model takes none: {left_out}."
    judge = evaluation.protocol.get("judge") or "rules alone"
    caption = (
        f"By zppo eval, judged by {judge}; ± is a standard error, samples of one question counted as one. Not leaderboard figures.{skipped}"
    )
    columns = ("benchmark", "family", "score", "±", "rows", "open")
    return Table("benchmarks-table", SECTION, "Benchmarks after training", columns, tuple(rows), caption)


def as_accuracies(evaluations: Sequence[EvaluationResults]) -> tuple[Accuracies, list[str]]:
    """The table that the bootstrap takes, in percent, and what was left out of it.

    Only benchmarks that all of the evaluations have count. Methods are named by label, and by file where labels are alike.

    Raises:
        SettingsError: they have no benchmark in common.
    """
    labels = [evaluation.label for evaluation in evaluations]
    names = labels if len(set(labels)) == len(labels) else [str(evaluation.path) for evaluation in evaluations]
    every = dict.fromkeys(name for evaluation in evaluations for name in evaluation.results)
    shared = [name for name in every if all(name in evaluation.results for evaluation in evaluations)]
    if not shared:
        raise SettingsError(
            f"{' and '.join(str(e.path) for e in evaluations)} have no benchmark in common; evaluate both on the same suite"
        )
    notes = (
        [f"left out, since not all have it: {', '.join(name for name in every if name not in shared)}"] if len(every) > len(shared) else []
    )
    table: Accuracies = {}
    for name in shared:
        results = [evaluation.results[name] for evaluation in evaluations]
        for method, each in zip(names, results, strict=True):
            table.setdefault((_NO_SCALE, each.family), {}).setdefault(method, {})[name] = 100 * each.value
    return table, notes + unlike(evaluations, shared)


def unlike(evaluations: Sequence[EvaluationResults], names: Sequence[str]) -> list[str]:
    """What must be known where figures of these benchmarks stand beside one another, though they were not made alike."""
    notes = []
    for name in names:
        results = [evaluation.results[name] for evaluation in evaluations if name in evaluation.results]
        if len({each.settings for each in results}) > 1:
            notes.append(f"{name}: not the same questions or samples everywhere")
        if any(each.open for each in results):
            notes.append(f"{name}: rows are open, and its figure is that of the others")
    for key in sorted({key for evaluation in evaluations for key in evaluation.protocol}):
        said = {json.dumps(e.protocol.get(key), sort_keys=True): str(e.protocol.get(key)) for e in evaluations}
        if len(said) > 1 and key not in ("data", "clips"):
            notes.append(f"the evaluations differ in {key}: {' and '.join(said.values())}")
    return notes


def unlike_questions(asked: Sequence[tuple[str, Iterable[object]]], recipes: Sequence[Mapping[str, str]]) -> tuple[str, ...]:
    """Why held-out accuracies of runs may not be compared: other questions, or asked in another way.

    Args:
        asked: the name of each run and its held-out questions; none where they are not known.
        recipes: their settings, dotted.
    """
    sets: dict[frozenset[object], list[str]] = {}
    for name, questions in asked:
        if known := frozenset(questions):
            sets.setdefault(known, []).append(name)
    found = []
    if len(sets) > 1:
        named = "; ".join(f"{', '.join(names)}: {len(known):,}" for known, names in sets.items())
        shared = len(frozenset.intersection(*sets)) or "none"
        found.append(
            f"these runs were evaluated on different held-out questions ({named}; {shared} in common): their held-out accuracies are of "
            "different things. To ask the same of each: zppo train RECIPE --student.model=RUN/final --train.steps=0 --data.eval=FILE"
        )
    if ways := [key for key in differing(recipes) if key.startswith("eval.")]:
        told = "; ".join(f"{key}: {', '.join(dict.fromkeys(recipe.get(key, '–') for recipe in recipes))}" for key in ways)
        found.append(f"held-out questions were asked in different ways ({told}): a difference in accuracy may come from that")
    return tuple(found)


def compare_evaluations(
    files: Sequence[Path], *, resamples: int = RESAMPLES, seed: int = 0, console: Console | None = None
) -> list[MethodDifference]:
    """`zppo eval compare A.json B.json`: benchmark by benchmark, and A minus B with its interval in each family.

    Raises:
        SettingsError: not two files, or nothing in common.
        DataError: a file cannot be read.
    """
    if len(files) != 2:
        raise SettingsError(f"zppo eval compare takes two eval.json files, not {len(files)}")
    console = console or Console()
    evaluations = [read_evaluation(path) for path in files]
    table, notes = as_accuracies(evaluations)
    first = next(iter(next(iter(table.values()))))
    comparisons = bootstrap_table(table, minuend=first, resamples=resamples, seed=seed)
    view = View(box=None, padding=(0, 2, 0, 0))
    for name in ("benchmark", "family", "A", "B", "A - B"):
        view.add_column(name, justify="left" if name in ("benchmark", "family") else "right")
    for (_, family), methods in table.items():
        one, other = methods.values()
        for name in one:
            view.add_row(name, family, f"{one[name]:.1f}", f"{other[name]:.1f}", f"{one[name] - other[name]:+.1f}")
    for letter, evaluation in zip("AB", evaluations, strict=True):
        console.print(Text(f"{letter}: {evaluation.label} ({evaluation.path})"), soft_wrap=True)
    console.print(view)
    for each in comparisons:
        i = each.interval
        line = f"{each.family}: A - B = {i.delta:+.2f} points, "
        if i.n == 1:
            line += "on one benchmark: no interval, which says how much benchmarks differ"
        else:
            line += f"95% interval {i.low:+.2f} to {i.high:+.2f}, A higher on {i.wins} of {i.n}"
            line += ", which are too few for it: it comes out too narrow" if i.n < _FEW else ""
        console.print(Text(line), soft_wrap=True)
    console.print(Text(f"{resamples:,} resamples of the benchmarks with seed {seed}", style="dim"), soft_wrap=True)
    for note in notes:
        console.print(Text(note, style="yellow"), soft_wrap=True)
    return comparisons
