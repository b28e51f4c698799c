"""`zppo eval`: benchmark after benchmark, asked, decided and written down, so that the same call goes on where it stopped."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

from rich.console import Console

from zppo.core.types import Message
from zppo.errors import DataError, EvaluationError, SettingsError, UnavailableError
from zppo.evals.benchmark import Benchmark
from zppo.evals.benchmark_rows import LoadedBenchmark, load_items
from zppo.evals.endpoint import (
    NAME,
    EndpointModel,
    Server,
    Thoughts,
    check_context,
    find_model,
    find_models,
    has_vllm,
    is_url,
    read_model_key,
    served,
    whole_checkpoint,
)
from zppo.evals.item import Item
from zppo.evals.journal import Journal
from zppo.evals.media import chat_turns, check_decoder, media_names
from zppo.evals.options import OURS, EvalOptions, fingerprint, settings_of, with_words_of_run
from zppo.evals.registry import BENCHMARKS, find, suite
from zppo.evals.results import (
    EvalFolder,
    SampleResult,
    begin,
    default_output,
    finished,
    summary,
    with_benchmark,
    with_skipped,
    with_think_open,
)
from zppo.evals.scoring.verdicts import Decider, judge_book
from zppo.evals.view import ProgressDisplay, estimate_benchmark, print_estimates, print_results, say
from zppo.grading.answer_form import AnswerForm
from zppo.names import CLOSINGS, checkpoint_folder
from zppo.prompts import PromptBook

Addresses = tuple[EndpointModel, tuple[str, ...]]
"""A model and where it is served."""
_IMAGES = 64  # of a request to a server of ours, besides the frames of a clip


@dataclass(frozen=True, slots=True)
class Session:
    """What all benchmarks of a call share."""

    options: EvalOptions
    folder: EvalFolder
    console: Console
    server: Server
    name: str
    book: PromptBook
    decider: Decider
    thoughts: Thoughts


def evaluate_benchmarks(options: EvalOptions, console: Console | None = None) -> None:
    """Evaluate a model, or say with `dry_run` what that would take.

    Raises:
        SettingsError: an option is wrong, or the folder holds another evaluation.
        EvaluationError: a server or a package is missing, nothing could be evaluated, or rows are open at the end.
        ZPPOError: what reading data, loading a checkpoint or writing says.
    """
    console = console or Console()
    chosen = suite(options.suite, options.code)
    for benchmark in chosen:
        if benchmark.code:
            say(console, f"{benchmark.name} runs code of your own: {benchmark.code}", "yellow")
    _check(options, chosen)
    place = None if is_url(options.model) else _checkpoint(options.model)
    if options.dry_run:
        print_estimates(console, [estimate_benchmark(benchmark, options) for benchmark in chosen], options)
        return
    judged = _check_needs(options, chosen)
    # What can be wrong with the call is looked for before a server is started or a question is asked.
    options = with_words_of_run(options, place)
    book = options.book
    judge_book(options.judge_prompts)
    judge_key = read_model_key(options.judge_key_env, "--judge-key-env")
    key = read_model_key(options.key_env, "--key-env")
    folder = EvalFolder(options.output or default_output(options))
    tell = partial(say, console, style="yellow")
    target: Path | Addresses = place or find_models(options.model, key, options.name, "model", tell)
    label = str(target.absolute()) if isinstance(target, Path) else target[0].name
    weights = fingerprint(place)
    # A finished evaluation is only shown again: its server is not started, its judge not needed.
    known = folder.read()
    if known is not None:
        options = replace(options, think_open=options.think_open or bool(known["settings"].get("think_open")))  # found out by then
    if known is not None and all(_finished(known, each, options) for each in chosen):
        begin(folder, "", "", _settings_now(options, known, label, weights, judge_key if judged else None, tell))
        say(console, f"{folder.result}: every row is decided, nothing is asked")
        print_results(console, known)
        return
    judge, judges = find_models(str(options.judge), judge_key, options.judge_model, "judge", tell) if judged else (None, ())
    with ExitStack() as stack:
        stack.enter_context(folder.alone())
        server, found, think_open = _serve(options, key, folder, target, stack, console)
        check_context(found.context, options.max_tokens)
        options = replace(options, think_open=think_open)
        own = settings_of(options, label, judge.name if judge else None, options.video, weights)
        state = begin(folder, label, options.model, own)  # refuses rows that were made under other settings
        folder.write(state)
        decider = _decider(options, judges, judge.name if judge else "", judge_key)
        stack.callback(decider.close)
        session = Session(options, folder, console, server, found.name, book, decider, Thoughts())
        state = _all(session, chosen, state)
    _close(state, chosen, options, folder, console)


def _decider(options: EvalOptions, urls: Sequence[str], judge: str, key: str) -> Decider:
    return Decider(
        urls,
        judge,
        key,
        options.judge_prompts,
        concurrency=options.concurrency,
        think_open=options.think_open,
        strict=options.strict,
        form=AnswerForm(options.answer_from),
    )


def _all(session: Session, chosen: tuple[Benchmark, ...], state: dict[str, Any]) -> dict[str, Any]:
    """The state with all benchmarks, written down after each.

    Where replies of an address show that its prompts open a think block, all is decided anew; nothing is asked for that again.
    """
    for benchmark in chosen:
        state = _one(session, benchmark, state)
        thoughts = session.thoughts
        noticed = session.server.kind == "other" and not session.decider.think_open and thoughts.opened
        if noticed:
            session.decider.think_open = True
            say(
                session.console,
                f"the server's prompts open a think block: {thoughts.closing:,} of {thoughts.whole:,} whole replies close one that "
                "they did not open; a reply that closes none has no answer, and what was decided before this was known is decided anew",
                "yellow",
            )
            state = with_think_open(state)
        session.folder.write(state)
        if noticed:
            return _all(session, chosen, state)
    return state


def _check(options: EvalOptions, chosen: tuple[Benchmark, ...]) -> None:
    given = {"": options.samples} if isinstance(options.samples, int) else options.samples
    for name, samples in given.items():
        if samples < 1:
            raise SettingsError(f"--samples is {f'{name}={samples}' if name else samples}: it must be 1 or more")
        if name and name.lower() not in {benchmark.name.lower() for benchmark in chosen}:
            find(name)  # one that is not asked this time is no mistake
    for name in ("concurrency", "frames", "max_tokens", "limit"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise SettingsError(f"--{name.replace('_', '-')} is {value}: it must be 1 or more")
    for flag, path in (("--data", options.data), ("--clips", options.clips)):
        if path is not None and not path.is_dir():
            raise SettingsError(f"{flag}: there is no folder {path}")
    if taken := [name for name in options.vllm_named if name in OURS]:
        raise SettingsError(f"--vllm.{taken[0]} is given by zppo itself: leave it out")
    if options.vllm and not options.dry_run and (is_url(options.model) or not has_vllm()):
        why = f"{options.model} is served already" if is_url(options.model) else "vLLM is not installed here"
        raise SettingsError(
            f"--vllm.{next(iter(options.vllm_named))} is for the vLLM that zppo starts for a folder, and {why}: leave it out"
        )
    if options.closing is not None and str(options.closing) not in CLOSINGS and not options.closing.is_file():
        raise SettingsError(f"--closing: there is no file {options.closing}; give one, or a name that zppo knows: {', '.join(CLOSINGS)}")
    for name, path in options.judge_prompts.items():
        if not path.is_file():
            raise SettingsError(f"--judge-prompt {name}={path}: there is no such file")


def _check_needs(options: EvalOptions, chosen: tuple[Benchmark, ...]) -> bool:
    """Whether a judge is needed. SettingsError where it is and none is named, EvaluationError where a package is missing."""
    missing = [name for name in ("inspect_ai", "rapidfuzz") if importlib.util.find_spec(name) is None]
    if missing:
        raise EvaluationError(f"zppo eval needs {' and '.join(missing)}, not installed here: pip install 'zppo[eval]'")
    judged = [benchmark.name for benchmark in chosen if benchmark.judged]
    if judged and options.judge is None:
        raise SettingsError(
            f"there is no judge for rows that rules cannot decide ({', '.join(judged[:5])}{', ...' * (len(judged) > 5)}): name its server "
            "with --judge URL (`zppo serve` is one)"
        )
    return bool(judged)


def _settings_now(
    options: EvalOptions, known: Mapping[str, Any], model: str, weights: str | None, judge_key: str | None, tell: Callable[[str], None]
) -> dict[str, Any]:
    """The settings under which this call would go on with a finished evaluation, whose server of the checkpoint is not started any more.

    Args:
        model: the checkpoint, or what the server says that it serves now.
        judge_key: None where no judge is needed.
    """
    judge = options.judge_model
    if judge_key is None or not any(each["by_judge"] for each in known["benchmarks"]):
        judge = known["settings"]["judge"]  # said nothing
    elif not judge:
        judge = find_models(str(options.judge), judge_key, None, "judge", tell)[0].name
    return settings_of(options, model, judge, options.video, weights)


def _serve(
    options: EvalOptions, key: str, folder: EvalFolder, target: Addresses | Path, stack: ExitStack, console: Console
) -> tuple[Server, EndpointModel, bool]:
    """(the server, the model there, whether its prompts end inside an open think block)."""
    if not isinstance(target, Path):
        return Server(target[1], key, "other"), target[0], options.think_open
    # Loads transformers, which nothing else here needs.
    from zppo.engines.chat import Chat

    target = whole_checkpoint(target, folder.inside("model"))
    chat = Chat.load(str(target), options.template_args)
    open_ = options.think_open or chat.think_open(chat.encode((Message("user", "Hello."),)))
    log = folder.inside("server.log")
    kind = "vLLM" if has_vllm() else "zppo serve (vLLM is not installed)"
    say(console, f"starting {kind} for {target}; its log is {folder.inside('server.log')}")
    server = stack.enter_context(served(target, log, images=_IMAGES + options.frames, arguments=options.vllm_arguments))
    return server, find_model(server.urls[0], server.key, NAME, "model"), open_


def _checkpoint(model: str) -> Path:
    """The checkpoint of that name: a folder, final/ of a finished run, or model/ of one that it goes on from.

    Raises:
        SettingsError: there is none, or it holds adapters alone.
    """
    folder = Path(checkpoint_folder(model))
    for place in (folder, folder / "model"):
        if (place / "config.json").is_file():
            return place
        if (place / "adapter_config.json").is_file():
            raise SettingsError(
                f"{str(place)!r} holds adapters alone; final/ of its run has them in the weights, so let it finish, or merge them"
            )
    what = "is a run without final/, the student that it leaves at its end" if (folder / "recipe.yaml").is_file() else "is no checkpoint"
    if not folder.is_dir():
        what = "is no folder"
    raise SettingsError(f"{str(folder)!r} {what}; name a checkpoint folder, a finished run, or the URL of a server (http://HOST:8000/v1)")


def _finished(state: Mapping[str, Any], benchmark: Benchmark, options: EvalOptions) -> bool:
    return finished(state, benchmark.name, options.limit, options.samples_of(benchmark.name), options.strict, benchmark.definition)


def _one(session: Session, benchmark: Benchmark, state: dict[str, Any]) -> dict[str, Any]:
    """The state with one more benchmark."""
    options, folder, console = session.options, session.folder, session.console
    if _finished(state, benchmark, options):
        return state
    samples = options.samples_of(benchmark.name)
    try:
        loaded = load_items(benchmark, options.data, clips=options.clips, store=folder.inside("media"), limit=options.limit)
        _check_packages(session, benchmark, loaded)
    except DataError as error:  # unreachable, or too many rows that cannot be read: the other benchmarks are asked all the same
        say(console, f"skipped {error}", "yellow")
        return with_skipped(state, benchmark.name, benchmark.family, str(error))
    rows = _rows(session, benchmark, loaded)
    part = summary(benchmark, rows, len(loaded.items) * samples, samples)
    part |= {"limit": options.limit, "samples": samples, "origin": loaded.origin, "revision": loaded.revision}
    part |= {"definition": benchmark.definition} if benchmark.definition else {}
    part |= {"unreadable": len(loaded.unreadable), "unreadable_first": next(iter(loaded.unreadable), "")}
    part |= {"missing": len(loaded.missing), "missing_first": next(iter(loaded.missing), "")}
    return with_benchmark(state, part, [each.name for each in BENCHMARKS])


def _check_packages(session: Session, benchmark: Benchmark, loaded: LoadedBenchmark) -> None:
    """UnavailableError where a package is missing that this benchmark alone needs."""
    if any(item.video is not None and not ((session.options.video == "file") and item.clip is None) for item in loaded.items):
        try:
            check_decoder()
        except UnavailableError as error:
            raise UnavailableError(f"{benchmark.name}: {error}") from error
    missing = [name for name in ("nltk", "jieba") if importlib.util.find_spec(name) is None]
    if missing and benchmark.name in ("OCREN", "OCRZH"):
        raise UnavailableError(f"{benchmark.name}: its metrics need {', '.join(missing)}: pip install 'zppo[ocr]'")


def _rows(session: Session, benchmark: Benchmark, loaded: LoadedBenchmark) -> list[SampleResult]:
    """Asks what is not answered and decides what is not decided; every row also goes to a file, whole."""
    # inspect-ai is an extra.
    from anyio import CapacityLimiter

    from zppo.evals.task import Health, Route, TaskContext, run_task, served_model

    options, folder = session.options, session.folder
    items: dict[str, Item] = {item.id: item for item in loaded.items}
    samples = options.samples_of(benchmark.name)
    path = folder.inside("rows", f"{benchmark.name}.jsonl")
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_suffix(".part")
    rows: list[SampleResult] = []
    lock = Lock()
    with ExitStack() as stack:
        answers, judgements = (Journal(folder.inside(what, f"{benchmark.name}.jsonl")) for what in ("answers", "judgements"))
        stack.callback(answers.close)
        stack.callback(judgements.close)
        out = stack.enter_context(open(half, "w", encoding="ascii"))
        watch = stack.enter_context(ProgressDisplay(session.console, benchmark.name, len(items) * samples))

        def take(row: SampleResult) -> None:
            with lock:
                named = {"media": media_names(items[row.id], folder.path)}
                out.write(json.dumps(asdict(row) | named, default=str) + "\n")
                rows.append(replace(row, text="", reply=""))  # whole answers of a large benchmark do not fit in memory
                watch.take(row)

        turns = partial(
            chat_turns, book=options.book, store=folder.inside("media"), as_file=(session.options.video == "file"), frames=options.frames
        )
        words = (session.name, session.server.key, options.decoding, options.concurrency, options.template_args or {})
        health = Health([Route(served_model(url, *words)) for url in session.server.urls])
        threads = CapacityLimiter(options.concurrency + 4)
        work = TaskContext(
            benchmark, items, turns, session.decider, answers, judgements, health, threads, take, session.thoughts, options.strict
        )
        log = run_task(work, samples=samples, concurrency=options.concurrency, logs=folder.inside("logs"))
    half.replace(path)
    if log.status == "cancelled":
        raise KeyboardInterrupt
    if log.status == "error":
        raise EvaluationError(f"{benchmark.name}: inspect-ai could not run it ({log.error.message if log.error else 'no reason given'})")
    gone = [url for url, route in zip(session.server.urls, health.routes, strict=True) if route.down]
    if gone and not health.down:
        say(
            session.console,
            f"{benchmark.name}: {', '.join(gone)} did not answer any more ({health.last}); the others took its share",
            "yellow",
        )
    if health.down:
        say(session.console, f"{benchmark.name}: the model's server does not answer any more ({health.last})", "yellow")
    return rows


def _close(state: Mapping[str, Any], chosen: tuple[Benchmark, ...], options: EvalOptions, folder: EvalFolder, console: Console) -> None:
    """The closing table; EvaluationError where something is left to do."""
    print_results(console, state)
    say(console, f"written to {folder.result}; transcripts: inspect view --log-dir {folder.inside('logs')}")
    names = {benchmark.name for benchmark in chosen}
    left = {each["name"]: each["open"] for each in state["benchmarks"] if each["name"] in names and each["open"]}
    if left:
        counts = ", ".join(f"{name} {count:,}" for name, count in left.items())
        raise EvaluationError(
            f"rows are open, since a server failed{' or a clip or verdict cannot be read' * options.strict} ({counts}): "
            f"{folder.inside('rows')} says why. Mend it; "
            "the same command asks for these rows alone"
        )
    if not any(each["name"] in names for each in state["benchmarks"]):
        raise EvaluationError("no benchmark could be evaluated: the data of each cannot be had; see above what each needs")
