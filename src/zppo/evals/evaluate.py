"""`zppo eval`: benchmark after benchmark, asked, decided and written down, so that the same call goes on where it stopped."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
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
from zppo.evals.endpoint import NAME, EndpointModel, Server, check_context, find_model, has_vllm, is_url, read_model_key, served
from zppo.evals.item import Item
from zppo.evals.journal import Journal
from zppo.evals.media import chat_turns, check_decoder, media_names
from zppo.evals.options import EvalOptions, fingerprint, settings_of
from zppo.evals.registry import BENCHMARKS, suite
from zppo.evals.results import EvalFolder, SampleResult, begin, default_output, finished, summary, with_benchmark, with_skipped
from zppo.evals.scoring.verdicts import Decider, judge_book
from zppo.evals.view import ProgressDisplay, estimate_benchmark, print_estimates, print_results, say
from zppo.names import checkpoint_folder
from zppo.prompts import PromptBook

_IMAGES = 64  # of a request to a server of ours, besides the frames of a clip


@dataclass(frozen=True, slots=True)
class Session:
    """What all benchmarks of a call share."""

    options: EvalOptions
    folder: EvalFolder
    console: Console
    server: Server
    name: str
    as_file: bool
    decider: Decider


def evaluate_benchmarks(options: EvalOptions, console: Console | None = None) -> None:
    """Evaluate a model, or say with `dry_run` what that would take.

    Raises:
        SettingsError: an option is wrong, or the folder holds another evaluation.
        EvaluationError: a server or a package is missing, nothing could be evaluated, or rows are open at the end.
        ZPPOError: what reading data, loading a checkpoint or writing says.
    """
    console = console or Console()
    chosen = suite(options.suite)
    for benchmark in chosen:
        if benchmark.code:
            say(console, f"{benchmark.name} runs code of your own: {benchmark.code}", "yellow")
    _check(options)
    if options.dry_run:
        print_estimates(console, [estimate_benchmark(benchmark, options) for benchmark in chosen], options)
        return
    missing = [name for name in ("inspect_ai", "rapidfuzz") if importlib.util.find_spec(name) is None]
    if missing:
        raise EvaluationError(f"zppo eval needs {' and '.join(missing)}, not installed here: pip install 'zppo[eval]'")
    judge_url = options.judge
    if judge_url is None:
        raise SettingsError("there is no judge for rows that rules cannot decide: name its server with --judge URL (`zppo serve` is one)")
    # What can be wrong with the call is looked for before a server is started or a question is asked.
    place = None if is_url(options.model) else _checkpoint(options.model)
    judge_book(options.judge_prompts)
    judge_key = read_model_key(options.judge_key_env, "--judge-key-env")
    key = read_model_key(options.key_env, "--key-env")
    folder = EvalFolder(options.output or default_output(options))
    target = place or find_model(options.model, key, options.name, "model")
    label = target.name if isinstance(target, EndpointModel) else str(target.absolute())
    weights = fingerprint(place)
    # A finished evaluation is only shown again: its server is not started, its judge not needed.
    known = folder.read()
    if known is not None and all(finished(known, each.name, options.limit, options.samples, each.definition) for each in chosen):
        begin(folder, "", "", _settings_now(options, known, label, weights, judge_key))
        say(console, f"{folder.result}: every row is decided, nothing is asked")
        print_results(console, known)
        return
    judge = find_model(judge_url, judge_key, options.judge_model, "judge").name
    with ExitStack() as stack:
        stack.enter_context(folder.alone())
        server, found, think_open = _serve(options, key, folder, target, stack, console)
        check_context(found.context, options.max_tokens)
        as_file = options.video == "file" or (options.video == "auto" and server.kind == "vllm")
        options = replace(options, think_open=think_open)
        own = settings_of(options, label, judge, "file" if as_file else "frames", weights)
        state = begin(folder, label, options.model, own)  # refuses rows that were made under other settings
        folder.write(state)
        decider = Decider(judge_url, judge, judge_key, options.judge_prompts, concurrency=options.concurrency, think_open=think_open)
        stack.callback(decider.close)
        session = Session(options, folder, console, server, found.name, as_file, decider)
        for benchmark in chosen:
            state = _one(session, benchmark, state)
            folder.write(state)
    _close(state, chosen, folder, console)


def _check(options: EvalOptions) -> None:
    for name in ("samples", "concurrency", "frames", "max_tokens", "limit"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise SettingsError(f"--{name.replace('_', '-')} is {value}: it must be 1 or more")
    for flag, path in (("--data", options.data), ("--clips", options.clips)):
        if path is not None and not path.is_dir():
            raise SettingsError(f"{flag}: there is no folder {path}")
    for name, path in options.judge_prompts.items():
        if not path.is_file():
            raise SettingsError(f"--judge-prompt {name}={path}: there is no such file")


def _settings_now(options: EvalOptions, known: Mapping[str, Any], model: str, weights: str | None, judge_key: str) -> dict[str, Any]:
    """The settings under which this call would go on with a finished evaluation, whose server of the checkpoint is not started any more.

    Args:
        model: the checkpoint, or what the server says that it serves now.
    """
    old, judge = known["settings"], options.judge_model or ""
    if not any(each["by_judge"] for each in known["benchmarks"]):
        judge = old["judge"]  # said nothing
    elif not judge:
        judge = find_model(str(options.judge), judge_key, None, "judge").name
    # What a checkpoint's template and the kind of its server decide follows from the weights and from nothing that this call says.
    think_open = options.think_open or (weights is not None and old["think_open"])
    video = old["video"] if options.video == "auto" else options.video
    return settings_of(replace(options, think_open=think_open), model, judge, video, weights)


def _serve(
    options: EvalOptions, key: str, folder: EvalFolder, target: EndpointModel | Path, stack: ExitStack, console: Console
) -> tuple[Server, EndpointModel, bool]:
    """(the server, the model there, whether its prompts end inside an open think block)."""
    if isinstance(target, EndpointModel):
        return Server(options.model, key, "other"), target, options.think_open
    # Loads transformers, which nothing else here needs.
    from zppo.engines.chat import Chat

    chat = Chat.load(str(target))
    open_ = options.think_open or chat.think_open(chat.encode((Message("user", "Hello."),)))
    log = folder.inside("server.log")
    kind = "vLLM" if has_vllm() else "zppo serve (vLLM is not installed)"
    say(console, f"starting {kind} for {target}; its log is {folder.inside('server.log')}")
    server = stack.enter_context(served(target, log, images=_IMAGES + options.frames))
    return server, find_model(server.url, server.key, NAME, "model"), open_


def _checkpoint(model: str) -> Path:
    """The checkpoint of that name: a folder, or final/ of a finished run. SettingsError where there is none."""
    folder = Path(checkpoint_folder(model))
    if (folder / "config.json").is_file():
        return folder
    what = "is a run without final/, the student that it leaves at its end" if (folder / "recipe.yaml").is_file() else "is no checkpoint"
    if not folder.is_dir():
        what = "is no folder"
    raise SettingsError(f"{str(folder)!r} {what}; name a checkpoint folder, a finished run, or the URL of a server (http://HOST:8000/v1)")


def _one(session: Session, benchmark: Benchmark, state: dict[str, Any]) -> dict[str, Any]:
    """The state with one more benchmark."""
    options, folder, console = session.options, session.folder, session.console
    if finished(state, benchmark.name, options.limit, options.samples, benchmark.definition):
        return state
    try:
        loaded = load_items(benchmark, options.data, clips=options.clips, store=folder.inside("media"), limit=options.limit)
        _check_packages(session, benchmark, loaded)
    except DataError as error:  # unreachable, or too many rows that cannot be read: the other benchmarks are asked all the same
        say(console, f"skipped {error}", "yellow")
        return with_skipped(state, benchmark.name, benchmark.family, str(error))
    rows = _rows(session, benchmark, loaded)
    part = summary(benchmark, rows, len(loaded.items) * options.samples)
    part |= {"definition": benchmark.definition} if benchmark.definition else {}
    part |= {"limit": options.limit, "samples": options.samples, "origin": loaded.origin, "revision": loaded.revision}
    part |= {"unreadable": len(loaded.unreadable), "unreadable_first": next(iter(loaded.unreadable), "")}
    return with_benchmark(state, part, [each.name for each in BENCHMARKS])


def _check_packages(session: Session, benchmark: Benchmark, loaded: LoadedBenchmark) -> None:
    """UnavailableError where a package is missing that this benchmark alone needs."""
    if any(item.video is not None and not (session.as_file and item.clip is None) for item in loaded.items):
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

    from zppo.evals.task import Health, TaskContext, run_task, served_model

    options, folder = session.options, session.folder
    items: dict[str, Item] = {item.id: item for item in loaded.items}
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
        watch = stack.enter_context(ProgressDisplay(session.console, benchmark.name, len(items) * options.samples))

        def take(row: SampleResult) -> None:
            with lock:
                named = {"media": media_names(items[row.id], folder.path)}
                out.write(json.dumps(asdict(row) | named, default=str) + "\n")
                rows.append(replace(row, text="", reply=""))  # whole answers of a large benchmark do not fit in memory
                watch.take(row)

        turns = partial(chat_turns, book=PromptBook(), store=folder.inside("media"), as_file=session.as_file, frames=options.frames)
        health = Health()
        work = TaskContext(
            benchmark, items, turns, session.decider, answers, judgements, health, CapacityLimiter(options.concurrency + 4), take
        )
        model = served_model(session.server.url, session.name, session.server.key, options.decoding, options.concurrency)
        log = run_task(work, model, samples=options.samples, concurrency=options.concurrency, logs=folder.inside("logs"))
    half.replace(path)
    if log.status == "cancelled":
        raise KeyboardInterrupt
    if log.status == "error":
        raise EvaluationError(f"{benchmark.name}: inspect-ai could not run it ({log.error.message if log.error else 'no reason given'})")
    if health.down:
        say(session.console, f"{benchmark.name}: the model's server does not answer any more ({health.last})", "yellow")
    return rows


def _close(state: Mapping[str, Any], chosen: tuple[Benchmark, ...], folder: EvalFolder, console: Console) -> None:
    """The closing table; EvaluationError where something is left to do."""
    print_results(console, state)
    say(console, f"written to {folder.result}; transcripts: inspect view --log-dir {folder.inside('logs')}")
    names = {benchmark.name for benchmark in chosen}
    left = {each["name"]: each["open"] for each in state["benchmarks"] if each["name"] in names and each["open"]}
    if left:
        counts = ", ".join(f"{name} {count:,}" for name, count in left.items())
        raise EvaluationError(
            f"rows are open, since a server failed or a clip cannot be read ({counts}): {folder.inside('rows')} says why. Mend it; "
            "the same command asks for these rows alone"
        )
    if not any(each["name"] in names for each in state["benchmarks"]):
        raise EvaluationError("no benchmark could be evaluated: the data of each cannot be had; see above what each needs")
