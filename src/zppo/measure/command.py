"""`zppo data measure`: asks, writes the questions with what was measured, and says what it means."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers.utils import logging as transformers_logging

from zppo.config.settings import Settings
from zppo.core.types import Question
from zppo.errors import DataError, SettingsError
from zppo.measure.answers import AnswerFile, Who
from zppo.measure.ask import Asking, ask_all, check_teacher, keyed_sample, ready_models
from zppo.measure.verdict import Measured, judge_data, print_verdict, useful_filter, verdict_page
from zppo.planning.needed import check_files
from zppo.rollout.data import Loaded, load_mixture, tell_sources
from zppo.rollout.run_data import seen_data
from zppo.runs.display import show, warn
from zppo.runs.files import PARTIAL, sync, write_whole, writing
from zppo.runs.log import ROLLOUT_SCHEMA, ROWS_PER_GROUP

FILES = (".jsonl", ".parquet")


@dataclass(frozen=True, slots=True)
class Places:
    """Where a measurement writes.

    Attributes:
        answers: what was answered, for the next time.
        summary, page: what it says, for programs and for people.
        data: the measured questions of each source.
        completions: every answer, laid out as rollouts of a run.
    """

    answers: Path
    summary: Path
    page: Path
    data: tuple[Path, ...]
    completions: Path


def places_of(out: Path, settings: Settings) -> Places:
    """The files of a measurement: in the folder `out`, or in and beside the data file `out`.

    Raises:
        SettingsError: one file for several sources, an ending of another kind, a file that is not of a measurement.
    """
    parts = settings.data.parts
    if out.suffix in FILES:
        if len(parts) > 1:
            raise SettingsError(f"--out {out} is one file, and data.train has {len(parts)} sources, each with its columns: name a folder")
        beside = out.with_suffix("")
        answers = beside.with_name(f"{beside.name}-answers.jsonl")
        places = Places(
            answers,
            beside.with_name(f"{beside.name}-measure.json"),
            beside.with_suffix(".html"),
            (out,),
            beside.with_name(f"{beside.name}-completions.parquet"),
        )
        if out.exists() and not answers.exists():
            raise SettingsError(f"--out {out} is there already and holds no measurement: name a file that there is not yet")
    elif out.suffix and not out.is_dir():
        raise SettingsError(f"--out {out} ends in {out.suffix}: name a folder, or a file that ends in {' or '.join(FILES)}")
    else:
        data = tuple(out / f"{part.name}.jsonl" for part in parts)
        places = Places(out / "answers.jsonl", out / "measure.json", out / "measure.html", data, out / "completions.parquet")
    for part in parts:
        source = Path(part.source).expanduser().resolve()
        if any(source in (path.resolve(), path.resolve().parent) for path in places.data):
            raise SettingsError(f"--out would write over {part.source}, which the recipe reads: name another place")
    return places


def measure(settings: Settings, name: str, *, n: int, sample: int | None, teacher: bool, out: Path | None, console: Console) -> None:
    """Ask the models of a recipe n times about its training questions, or a sample, and write what came out. The same call goes on.

    Args:
        name: of the recipe.
        sample: how many questions; None for all.
        teacher: ask the recipe's teacher too.
        out: a folder, or a data file; None for runs/measure-<name>.

    Raises:
        ZPPOError: something is wrong with recipe, data or models, or a place cannot be written.
        Interrupted: it was asked to stop; what was answered is kept.
    """
    for option, value in (("--n", n), ("--sample", sample)):
        if value is not None and value < 1:
            raise SettingsError(f"{option} is {value}; give at least 1")
    if teacher:
        check_teacher(settings)
    check_files(settings.model_copy(update={"output": None}))
    places = places_of(out or Path("runs") / f"measure-{name}", settings)
    transformers_logging.disable_progress_bar()
    show(console, f"reading the questions of {settings.data.train_name} ...")
    loaded = load_mixture(settings, lambda text: warn(console, text), keep_rows=True)
    tell_sources(settings, loaded, lambda text: warn(console, text), lambda text: show(console, text))
    answers = AnswerFile(places.answers, settings, n)
    asked: list[Question] = []
    who: list[Who] = ["student", "teacher"] if teacher else ["student"]

    def wanted(questions: list[Question]) -> list[Who]:
        asked[:] = keyed_sample(questions, sample, settings.seed)
        left = {each: sum(answers.get(each, question) is None for question in asked) for each in who}
        for each, count in left.items():
            again = f"; {len(asked) - count:,} were answered before" if count < len(asked) else ""
            show(console, f"{each}: {count:,} of {len(asked):,} questions to ask, {n} answers each{again}")
        return [each for each, count in left.items() if count]

    try:
        data = replace(seen_data(settings, loaded.mixture.questions, []), examples=loaded.examples)
        with ready_models(settings, data, n, wanted, console) as asking:
            opened = _ask(asking, who, asked, n, answers, console)
        _finish(settings, name, loaded, asked, answers, places, n, console)
    except KeyboardInterrupt:
        measured, _ = _measured(settings, loaded, asked, answers)
        if any(each.student for each in measured):
            show(console, f"what {len(measured):,} of {len(asked):,} questions say so far:")
            print_verdict(judge_data(measured, settings, n), console)
        done = sum(all(answers.get(each, question) is not None for each in who) for question in asked)
        show(console, f"stopped: {done:,} of {len(asked):,} questions are measured, in {places.answers}; the same command goes on")
        raise
    finally:
        answers.close()
    if opened:
        warn(console, f"{opened:,} times a question stayed open, since teacher or judge could not be reached; the same command asks again")


def _ask(asking: Asking, who: Sequence[Who], asked: Sequence[Question], n: int, answers: AnswerFile, console: Console) -> int:
    return sum(ask_all(asking, each, asked, n, answers, console) for each in who if each in asking.ask)


def _measured(
    settings: Settings, loaded: Loaded, asked: Sequence[Question], answers: AnswerFile
) -> tuple[list[Measured], list[list[dict[str, Any]]]]:
    """The questions of which something is known, in the order of the data, and their rows with what is known, by part of the data."""
    chosen = {question.id for question in asked}
    measured: list[Measured] = []
    rows: list[list[dict[str, Any]]] = [[] for _ in loaded.parts]
    for question, (number, place) in zip(loaded.mixture.questions, loaded.mixture.places, strict=True):
        student, teacher = answers.get("student", question), answers.get("teacher", question)
        if question.id not in chosen or (student is None and teacher is None):
            continue
        measured.append(Measured(settings.data.parts[number].name, question.level, student, teacher))
        columns = {**(student.columns("student") if student else {}), **(teacher.columns("teacher") if teacher else {})}
        rows[number].append(loaded.parts[number].kept_rows[place] | columns)
    return measured, rows


def _finish(
    settings: Settings, name: str, loaded: Loaded, asked: Sequence[Question], answers: AnswerFile, places: Places, n: int, console: Console
) -> None:
    """Writes the measured rows, the summary and the page, and prints what they say."""
    measured, rows = _measured(settings, loaded, asked, answers)
    if not any(each.student for each in measured):
        raise DataError("nothing was answered, so nothing is measured: see the messages above; the same command asks again")
    verdict = judge_data(measured, settings, n)
    for path, each in zip(places.data, rows, strict=True):
        if each:
            write_rows(path, each)
    chosen = {question.id for question in asked}
    _write_completions(places.completions, answers, [question for question in loaded.mixture.questions if question.id in chosen])
    facts = {name: value for name, value in asdict(verdict).items() if name != "questions"} | {"questions": len(measured)}
    write_whole(places.summary, json.dumps({"recipe": name, "student_model": settings.student.model, **facts}, indent=1) + "\n")
    models = [("student", settings.student.model)]
    models += [("teacher", settings.teacher.model)] if settings.teacher and verdict.teacher.count else []
    head = [*models, ("data", settings.data.train_name), ("questions", f"{len(measured):,}, {n} answers each")]
    write_whole(places.page, verdict_page(verdict, f"{name}, measured", head))
    console.print()
    print_verdict(verdict, console)
    console.print()
    for path, each in zip(places.data, rows, strict=True):
        if each:
            show(console, f"{path}  {len(each):,} rows with student_accuracy{' and teacher_accuracy' if verdict.teacher.count else ''}")
    show(console, f"{places.page}  the same as a page")
    show(console, f"{places.completions}  every answer; `zppo inspect {places.completions} QUESTION_ID` shows those to one question")
    show(console, _next_words(settings, places, useful_filter(verdict)))


def _write_completions(path: Path, answers: AnswerFile, asked: Sequence[Question]) -> None:
    """Every answer to the questions, a row each, whole or not at all."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    partial = path.with_name(path.name + PARTIAL)
    with writing(path), pq.ParquetWriter(partial, ROLLOUT_SCHEMA, compression="zstd") as file:
        held: list[dict[str, Any]] = []
        for rows in answers.rows(asked):
            held += rows
            if len(held) >= ROWS_PER_GROUP:
                file.write_table(pa.Table.from_pylist(held, schema=ROLLOUT_SCHEMA))
                held = []
        file.write_table(pa.Table.from_pylist(held, schema=ROLLOUT_SCHEMA))
    with writing(path):
        sync(partial)
        partial.replace(path)


def _next_words(settings: Settings, places: Places, text: str) -> str:
    """How what was measured is used."""
    if len(places.data) > 1:
        return (
            "To train on what was measured: name these files as the sources of data.train, with a filter such as 0 < student_accuracy < 1"
        )
    given = isinstance(settings.data.train, str)
    plain = "".join(
        f" --data.{key}={value}"
        for key, value, on in (("revision", "null", settings.data.revision), ("streaming", "false", settings.data.streaming))
        if on and given
    )
    how = f"--data.train={places.data[0]}" if given else f"source: {places.data[0]} in data.train"
    return f"To train on what was measured: {how}{plain} --data.filters='{text}'"


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows as JSON lines or parquet, whole or not at all.

    Raises:
        StorageError: the file cannot be written.
        DataError: the values of a column are of kinds that parquet does not hold together.
    """
    partial = path.with_name(path.name + PARTIAL)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".parquet":
            _write_parquet(partial, rows)
        else:
            with open(partial, "w", encoding="utf-8") as file:
                file.writelines(f"{json.dumps(row, ensure_ascii=False, default=_as_json)}\n" for row in rows)
        sync(partial)
        partial.replace(path)


def _write_parquet(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = list(dict.fromkeys(name for row in rows for name in row))
    try:
        pq.write_table(pa.table({name: pa.array([row.get(name) for row in rows]) for name in names}), path)
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError) as error:
        raise DataError(
            f"{path} cannot hold these rows ({' '.join(str(error).split())}): name a file that ends in .jsonl with --out"
        ) from error


def _as_json(value: Any) -> Any:
    """What JSON has no form for: bytes as base64, dates and decimals as texts."""
    return base64.b64encode(value).decode() if isinstance(value, bytes) else str(value)
