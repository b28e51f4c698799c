"""What a finished run leaves: final/ with a model card, and the closing table."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from zppo.config.settings import Settings
from zppo.core.select import is_hard
from zppo.distributed.parallel import ReplicatedWeights
from zppo.engines.chat import Chat
from zppo.engines.tinker import TinkerEngine
from zppo.engines.vllm.vllm_engine import VLLMEngine
from zppo.images.features import device_of
from zppo.models.student_model import Student, load_model
from zppo.planning.dry_run import gib
from zppo.planning.memory import Memory, expected, peak_of_process
from zppo.rollout.evaluation import Evaluation, evaluate_held_out
from zppo.rollout.student import StudentSampler
from zppo.runs.display import Progress, Whole
from zppo.runs.files import FINAL, PARTIAL, sync, writing
from zppo.runs.log import METRICS, read_lines
from zppo.runs.model_card import run_card
from zppo.step_log import StepLog
from zppo.train.assemble import Assembled, make_engine
from zppo.train.cluster.tinker_student import TinkerStudent, final_place
from zppo.train.trainer import MISSED, Totals, entry_bin

GOLDS = 10  # right answers that the closing table names
ADAPTER = "adapter"  # in final/, where adapters were trained


def save_final(run: Path, student: Student, weights: ReplicatedWeights, chat: Chat) -> Path:
    """final/: weights in fp32, tokenizer, generation config; loads with `AutoModelForCausalLM.from_pretrained`. Every process must call it.

    Of a student on a server it holds the adapters and where they are there.

    A student that was trained on images keeps its vision tower and processor, and loads with `AutoModelForImageTextToText`.

    Adapters are merged into the weights, for good (`ReplicatedWeights.write_final`); by themselves they are in final/adapter/.

    Returns:
        The folder that it is in until `finish_final` gives it its name.

    Raises:
        StorageError: the disk refuses.
    """
    processes, folder = weights.processes, run / f"{FINAL}{PARTIAL}"
    if processes.main:
        with writing(folder):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
    if isinstance(student, TinkerStudent):
        student.save_final(folder, chat)
        return folder
    folder = processes.gather(folder)[0]
    with writing(folder):
        if student.adapters and processes.main:
            student.adapters.save_pretrained(folder / ADAPTER)
        weights.write_final(folder, student)
        if processes.main:
            _write_words(folder, chat)
    processes.wait()
    return folder


def _write_words(folder: Path, chat: Chat) -> None:
    """What final/ holds beside the weights."""
    chat.tokenizer.chat_template = chat.template  # what the student was trained with
    chat.tokenizer.save_pretrained(folder)
    for name, content in chat.image_processor.files.items() if chat.image_processor is not None else ():
        (folder / name).write_bytes(content)


def finish_final(run: Path, folder: Path) -> Path:
    """Give the folder of `save_final` its name: from now on the run is finished."""
    target = run / FINAL
    with writing(target):
        for path in (*folder.rglob("*"), folder):
            sync(path)
        shutil.rmtree(target, ignore_errors=True)
        folder.rename(target)
        sync(run)
    return target


def write_model_card(folder: Path, run: Path, settings: Settings) -> None:
    """README.md of final/: what was trained how, with which result."""
    with writing(folder / "README.md"):
        (folder / "README.md").write_text(run_card(run.name, settings, read_lines(run / METRICS), folder), encoding="utf-8")


def closing_table(
    console: Console,
    run: Path,
    settings: Settings,
    *,
    before: Evaluation | None,
    after: Evaluation | None,
    totals: Totals,
    memory: str = "",
) -> None:
    """Held-out accuracy before and after, graduated/admitted by entry bin, what help was missed, memory, where the files are."""
    if before and after:
        console.print("\nheld-out accuracy, plain prompts")
        table = Table("level", "before", "after")
        for row in _levels(before, after):
            table.add_row(*row)
        console.print(Whole(table))
        if note := _left_out(before, after):
            console.print(note.strip())
    if settings.method.resolve().replay:
        group_size, threshold = settings.rollout.group_size, settings.zone.threshold
        console.print("\nprompt replay buffer")
        table = Table("entry accuracy", "admitted", "graduated", "evicted", "graduated/admitted")
        for correct in range(group_size + 1):
            if is_hard(correct / group_size, threshold):
                name = entry_bin(correct / group_size)
                admitted, graduated = totals.admitted.get(name, 0), totals.graduated.get(name, 0)
                share = f"{graduated / admitted:.0%}" if admitted else "-"
                table.add_row(name, str(admitted), str(graduated), str(totals.evicted.get(name, 0)), share)
        console.print(Whole(table))
    missed = {name: count for name, count in totals.missed.items() if count}
    if missed:
        console.print("help that was missed: " + ", ".join(f"{n:,} {MISSED[name]}" for name, n in missed.items()))
    if totals.hint_leaks:
        console.print(_leaks(totals.hint_leaks), markup=False, highlight=False)
    console.print(f"\n{_work(totals)}", highlight=False)
    if memory:
        console.print(memory, highlight=False)
    files: Mapping[str, str] = {
        "final/": "the trained student",
        "metrics.jsonl": "one line a step",
        "rollouts/": "every completion",
        "held_out/": "every completion of the evaluations",
        "buffer.jsonl": "who came and went",
        "recipe.yaml": "the recipe, resolved",
    }
    for name, what in files.items():
        if not (run / name).exists():
            continue
        console.print(f"  {run / name}  [dim]{what}[/dim]", highlight=False, soft_wrap=True)
    console.print(f"`zppo report {run}` makes a page of it", highlight=False, soft_wrap=True)


def _leaks(leaks: Mapping[str, int]) -> str:
    """Which right answers hints gave away: where one stands out, the check may have refused what gives nothing away."""
    most = sorted(leaks.items(), key=lambda item: (-item[1], item[0]))
    named = ", ".join(f"{gold!r} {count:,}" for gold, count in most[:GOLDS])
    others = f", {len(most) - GOLDS:,} others {sum(n for _, n in most[GOLDS:]):,}" if len(most) > GOLDS else ""
    return f"hints that gave the answer away, by right answer: {named}{others}"


def _work(totals: Totals) -> str:
    judged = f", {totals.judge_tokens:,} judge tokens" if totals.judge_tokens else ""
    waited = f", {totals.teacher_wait_seconds:,.0f} s of them waiting for the teacher" if totals.teacher_tokens else ""
    return (
        f"{totals.rollouts:,} rollouts, {totals.student_tokens:,} student tokens, {totals.teacher_tokens:,} teacher tokens{judged} "
        f"in {totals.seconds:,.0f} s{waited}"
    )


def _memory(settings: Settings, parts: Assembled) -> str:
    """The most memory that this process has held until now, beside what a dry run says."""
    device, trainer = device_of(parts.student.model), parts.trainer
    gpu = device.type == "cuda"
    measured = torch.cuda.max_memory_allocated(device) if gpu else peak_of_process()
    capacity = torch.cuda.get_device_properties(device).total_memory if gpu else 0
    shown, processes = trainer.student.renderer.book.examples, trainer.processes.size
    guess = expected(settings, trainer.questions, trainer.held_out, shown, gpu=gpu, capacity=capacity, processes=processes)
    estimated = f"{gib(guess.total)} at most by the estimate of `--dry-run`" if isinstance(guess, Memory) else "no estimate"
    return f"peak memory of {'the GPU (torch)' if gpu else 'this process'}: {gib(measured)}; {estimated}"


def _left_out(before: Evaluation, after: Evaluation) -> str:
    """How many completions have no verdict; "" where all have one."""
    if not (before.ungraded or after.ungraded):
        return ""
    return (
        f" Left out, since the judge could not be reached: {before.ungraded:,} of {before.count:,} completions before training, "
        f"{after.ungraded:,} of {after.count:,} after."
    )


def _levels(before: Evaluation, after: Evaluation) -> list[tuple[str, str, str]]:
    rows = [(level, f"{before.by_level.get(level, float('nan')):.3f}", f"{value:.3f}") for level, value in after.by_level.items()]
    return [*rows, ("all", f"{before.accuracy:.3f}", f"{after.accuracy:.3f}")]


def finish(settings: Settings, run: Path, parts: Assembled, progress: Progress, *, bf16: bool) -> None:
    """Save final/, evaluate it, freshly from the disk where it is not sharded, write its card and print the closing table."""
    trainer, processes, student = parts.trainer, parts.weights.processes, parts.student
    here = not isinstance(student, TinkerStudent)
    memory = _memory(settings, parts) if processes.main and here else ""  # before final/ is loaded beside it for its evaluation
    progress.doing(f"writing {run / FINAL}")
    folder = save_final(run, student, parts.weights, parts.chat)
    if trainer.held_out and trainer.done:
        progress.doing(f"evaluating {FINAL}/ on {len(trainer.held_out):,} held-out questions")
    after = None
    if trainer.held_out and trainer.done:
        # What is sharded has no room for a second student: it is asked where it lies, and final/ was written from there.
        sampler = trainer.student if parts.weights.sharded else _fresh(settings, folder, parts, bf16=bf16)
        after = _evaluate(settings, sampler, parts)
    progress.end()
    if not processes.main:
        return
    at_start = _at_start(run)
    before = _evaluation(at_start) if at_start else None
    if at_start and not trainer.done:  # nothing was trained: these are the weights that were evaluated a moment ago
        after = before
        trainer.run_log.metrics(0, "final", {name: value for name, value in at_start.items() if name not in ("step", "event")})
    with processes.stop.ignored():  # it is finished: a signal changes nothing now
        write_model_card(folder, run, settings)
        finish_final(run, folder)
    closing_table(progress.console, run, settings, before=before, after=after, totals=trainer.totals, memory=memory)


def _fresh(settings: Settings, folder: Path, parts: Assembled, *, bf16: bool) -> StudentSampler:
    """final/ as it was written, by an engine over what was loaded from there."""
    trainer, engine = parts.trainer, parts.trainer.student.engine
    if isinstance(engine, TinkerEngine):
        engine.sample_from(final_place(folder))
        return replace(trainer.student, whole=nullcontext)
    images = parts.chat.image_processor is not None
    fresh = load_model(folder, dtype=torch.float32, attention=settings.student.attention, images=images)
    torch.nn.Module.to(fresh, parts.student.model.device)
    if isinstance(engine, VLLMEngine):
        engine.sample_from(fresh)
    else:
        engine = make_engine(settings, fresh, parts.chat, torch.bfloat16 if bf16 else None)
    return replace(trainer.student, engine=engine, whole=nullcontext)


def _evaluate(settings: Settings, student: StudentSampler, parts: Assembled) -> Evaluation:
    trainer = parts.trainer
    log = StepLog(watch=trainer.watch)
    result, groups = evaluate_held_out(student, trainer.held_out, settings.eval, log)
    with trainer.processes.stop.shield():
        trainer.log_evaluation("final", result, groups, log)
    return result


def _at_start(run: Path) -> dict[str, Any] | None:
    """What metrics.jsonl says of the evaluation before training."""
    return next((record for record in read_lines(run / METRICS) if record["event"] == "eval" and record["step"] == 0), None)


def _evaluation(record: Mapping[str, Any]) -> Evaluation:
    found = {name: record[name] for name in Evaluation.__slots__ if name in record}
    return Evaluation(**found | {"accuracy": float("nan") if record["accuracy"] is None else record["accuracy"]})
