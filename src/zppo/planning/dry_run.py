"""`zppo train RECIPE --dry-run`: what a recipe will do, and whether it fits into memory, worked out without touching a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from zppo.config.model_settings import FrozenModelSettings, TeacherSettings
from zppo.config.settings import LoraSettings, Settings
from zppo.core.reformulate import RESPONSES
from zppo.core.select import share_of
from zppo.data.order import effective_batch, steps_per_epochs
from zppo.engines.base import Sampling
from zppo.errors import SettingsError
from zppo.planning.machine import Machine, find_machine
from zppo.planning.memory import GIB, Memory, cluster_rows, enough, estimate
from zppo.planning.model_shapes import context_in
from zppo.planning.prompt_lengths import PromptLengths
from zppo.rollout.rewards import unique_names
from zppo.runs.display import Whole
from zppo.teacher.compression import REDRAWS

_MUCH = 0.1  # of what is usable, for models that could be elsewhere
_TIGHT = 0.9  # of what is usable; above, an allocator's waste may be what does not fit

Rows = list[tuple[str, str]]


def memory_rows(settings: Settings, machine: Machine | None = None, images: int = 0, shortest: int = 0, processes: int = 1) -> Rows:
    """(what, how much) for the plan, the verdict last.

    Args:
        machine: None for the one that this runs on.
        images: most images of a question.
        shortest: tokens of the shortest prompt, 0 where it is not known.
        processes: that train together; 1 where none are started: with sharded weights the fewest that have room are found.

    Raises:
        ModelError: a checkpoint on disk cannot be read.
    """
    if settings.student.tinker is not None:
        return cluster_rows(settings.student.tinker)
    machine = machine or find_machine(settings.train.device)
    data = _DataFacts(images, shortest, processes)
    sharding: Rows = []
    if settings.train.sharding != "none" and processes == 1 and settings.train.shard_within is None:
        count, totals = enough(settings, machine, _TIGHT, **data._asdict())
        listed = ", ".join(f"{tried}: {gib(total)}" for tried, total in totals.items())
        data, sharding = data._replace(processes=count), [("sharding", f"counted for {count} processes; at most in each of {listed}")]
    memory = _estimate(settings, machine, data)
    if isinstance(memory, str):
        return [("estimate", memory)]
    most = ("at most", _against(memory.total, machine))
    return [*_parts(settings, memory), *sharding, most, *_verdict(settings, memory, machine, data), *_gpu_row(settings, memory, machine)]


class _DataFacts(NamedTuple):
    """What an estimate takes from the data: most images of a question, tokens of the shortest prompt; and how many processes train."""

    images: int
    shortest: int
    processes: int = 1


def _estimate(settings: Settings, machine: Machine | None, data: _DataFacts) -> Memory | str:
    gpu = machine is not None and machine.gpu
    return estimate(settings, gpu=gpu, capacity=machine.total if machine and gpu else 0, **data._asdict())


def _parts(settings: Settings, memory: Memory) -> Rows:
    trained = "adapters and frozen weights" if settings.train.lora else "weights"
    rows = [
        (f"student: {trained}", gib(memory.weights)),
        ("gradients", gib(memory.gradients)),
        (f"{settings.train.optimizer} state", gib(memory.optimizer)),
    ]
    if memory.others:
        rows.append(("teachers and judge in this process", gib(memory.others)))
    if memory.unknown:
        names = ", ".join(memory.unknown)
        rows.append(("not counted", f"{names}: not on this machine (or no dense decoder), and not in the table of Qwen3.5 models"))
    if memory.vllm:
        awake = ", not during updates" if memory.sleeps else ""
        rows.append(("vLLM in this process", f"{gib(memory.vllm)} (rollout.vllm.gpu_memory_utilization{awake})"))
    if memory.host:
        rows.append(("in the processor's memory", f"{gib(memory.host)} a process: weights, gradients and optimizer (train.offload)"))
    if memory.cast:
        what = "bf16 copy of the weights" if memory.passing is None else "sampling: all weights, gathered"
        rows.append((what, gib(memory.cast)))
    if memory.passing is not None:
        rows.append(("update: gathered weights, their gradients", gib(memory.passing)))
    if memory.rows:
        each = f"{memory.rows:,} rollouts at once, {gib(memory.row)} each at the limits"
        rows.append(("sampling", f"{gib(memory.row * memory.rows)} ({each})"))
    if memory.packed:
        rows.append(("sampling: weights, packed", gib(memory.packed)))
    rows.append(("update: activations", f"{gib(memory.activations)} (micro-batches of {memory.tokens:,} tokens)"))
    if memory.images:
        rows.append(("preprocessed images of a step", f"{gib(memory.images)} at most (data.images.cache_gib)"))
    if memory.tower:
        rows.append(("update: vision tower", f"{gib(memory.tower)} (roughly; every row with images of the largest size)"))
    if memory.layer:
        rows.append(("update: a layer computed again", f"{gib(memory.layer)} (not while logits are held)"))
    rows.append(("update: logits", f"{gib(memory.logits)} (gradients included)"))
    return rows


def _verdict(settings: Settings, memory: Memory, machine: Machine | None, data: _DataFacts) -> Rows:
    if machine is None:
        return [("verdict", "this machine does not say how much memory it has")]
    room = machine.usable
    if memory.total <= room:
        tight = memory.total > _TIGHT * room
        fits = "fits, but it is tight: an estimate may be off by more than what is left" if tight else "fits"
        left = f", if {', '.join(memory.unknown)} takes no more than {gib(room - memory.total)}" if memory.unknown else ""
        return [("verdict", fits + left)]
    words = []
    if memory.total <= machine.total:
        words.append(f"others hold {gib(machine.total - room)} of it now; with all of it free it would fit")
    if memory.standing + memory.update > room:
        advice, memory = _lighter(settings, memory, machine, data)
        words.append(advice)
    if memory.standing < room < memory.standing + memory.sampling:
        words.append(_fewer_rows(memory, machine))
    return [("verdict", "; ".join(words))]


def _gpu_row(settings: Settings, memory: Memory, machine: Machine | None) -> Rows:
    """How to plan for a GPU, where a student that wants one is planned for a CPU since none was found."""
    if machine is None or machine.gpu or settings.train.device == "cpu" or memory.weights < GIB:
        return []
    return [("on a GPU", "--for-gpu=24 plans for one of 24 GB, from any machine")]


def _fewer_rows(memory: Memory, machine: Machine) -> str:
    """How many rollouts fit at once."""
    fit = (machine.usable - memory.standing - memory.multiplied) // memory.widest if memory.widest else 0
    if fit < 1:
        return "sampling: not even one rollout fits beside what stands; lower rollout.max_new_tokens or data.max_prompt_tokens"
    says = "it halves them by itself until they fit" if machine.gpu else "set it: a machine that runs out of RAM ends the run"
    return f"sampling: {fit:,} of {memory.rows:,} rollouts fit at once, rollout.max_rows={fit}; {says}"


def _lighter(settings: Settings, memory: Memory, machine: Machine, data: _DataFacts) -> tuple[str, Memory]:
    """The first change of settings with which the update fits, in words, and the memory with it."""

    def fitting(changes: Mapping[str, Any]) -> Memory | None:
        lighter = _estimate(_with(settings, changes), machine, data)
        fits = isinstance(lighter, Memory) and lighter.standing + lighter.update <= machine.usable
        return lighter if fits and isinstance(lighter, Memory) else None

    halves = settings.train.tokens_per_microbatch == "auto" and machine.gpu
    if halves and (smallest := fitting({"train.tokens_per_microbatch": memory.longest})):
        says = "the update does not fit at once; train.tokens_per_microbatch=auto halves its micro-batches until they do"
        return says, smallest
    every = list(_changes(settings, memory, gpu=machine.gpu))
    for changes in every:
        if lighter := fitting(changes):
            says = f"the update does not fit; it would with {_options(changes)} ({gib(lighter.standing + lighter.update)})"
            if "train.lora" in changes:
                says += "; recipes/single-gpu-lora.yaml is a recipe like that, and has a larger train.learning_rate, which adapters want"
            return says + _elsewhere(settings, memory, machine), lighter
    for changes in ({}, *every) if memory.others else ():
        beside = _estimate(_with(settings, changes), machine, data)
        if isinstance(beside, Memory) and beside.standing + beside.update - beside.others <= machine.usable:
            return _without_others(settings, replace(beside, others=0), memory.others, machine, changes)
    last = every[-1] if every else {}
    least = _estimate(_with(settings, last), machine, data)
    standing = least.standing if isinstance(least, Memory) else memory.standing
    what = "LoRA, weights in 4 bits" if "student.quantize" in last or settings.student.quantize else "LoRA"
    says = f"the update does not fit, even with {what}, gradient checkpointing and one row at a time: "
    if standing > machine.usable:
        others = " put the teacher on another machine (teacher.base_urls) or" if memory.others else ""
        return f"{says}what stands all the while takes {gib(standing)};{others} take a smaller student or more memory", memory
    mends = ["lower rollout.max_new_tokens or data.max_prompt_tokens"]
    mends += ["put the teacher on another machine (teacher.base_urls)"] if memory.others else []
    return f"{says}{', '.join(mends)}, or take a smaller student", memory


def _without_others(settings: Settings, lighter: Memory, others: int, machine: Machine, changes: Mapping[str, Any]) -> tuple[str, Memory]:
    """What to say where the frozen models are what does not fit; `lighter` is without them."""
    keys = _options(changes)
    room = machine.usable - lighter.standing - lighter.update
    frozen = [model for model in (settings.teacher, *settings.more_teachers, settings.judge) if model is not None and not model.base_urls]
    names = ", ".join(dict.fromkeys(model.model for model in frozen))
    says = (
        f"the update does not fit beside the {gib(others)} of {names}: put them on a server (base_urls), or take smaller ones, of "
        f"{gib(room)} at most{f', both with {keys}' if keys else ''}"
    )
    return says + ("; recipes/single-gpu-lora.yaml is a recipe like that" if "train.lora" in changes else ""), lighter


def _elsewhere(settings: Settings, memory: Memory, machine: Machine) -> str:
    """What the frozen models of this process take, where it is much, and how to have it back; "" where it is not."""
    if memory.others <= _MUCH * machine.usable:
        return ""
    teacher = f"{settings.teacher.model!r}" if settings.teacher is not None else "the judge"
    return (
        f"; teachers and judge take {gib(memory.others)} of that: a smaller one than {teacher} takes less, and one on a server "
        "(teacher.base_urls) nothing"
    )


def _changes(settings: Settings, memory: Memory, *, gpu: bool) -> Iterator[Mapping[str, Any]]:
    """Settings, by their dotted keys, that take less memory, those that cost least first."""
    again: dict[str, Any] = {} if settings.train.gradient_checkpointing else {"train.gradient_checkpointing": True}
    small: dict[str, Any] = {"train.tokens_per_microbatch": memory.longest} if memory.tokens > memory.longest else {}
    lora: dict[str, Any] = {} if settings.train.lora else {"train.lora": LoraSettings()}
    steps: list[dict[str, Any]] = [small, again, {**small, **again}]
    if lora:
        if settings.train.optimizer == "adamw":
            steps.append({**small, **again, "train.optimizer": "adamw-8bit"})
        steps.append({**small, **again, **lora})
    if gpu and settings.student.quantize is None and settings.rollout.engine != "vllm":
        steps.append({**small, **again, **lora, "student.quantize": "4bit"})
    yield from (step for step in steps if step)


def _with(settings: Settings, changes: Mapping[str, Any]) -> Settings:
    for name, value in changes.items():
        section, _, key = name.partition(".")
        settings = settings.model_copy(update={section: getattr(settings, section).model_copy(update={key: value})})
    return settings


def _options(changes: Mapping[str, Any]) -> str:
    return " ".join(f"--{name}={_shown(value)}" for name, value in changes.items())


def _shown(value: Any) -> str:
    return "'{}'" if isinstance(value, LoraSettings) else str(value).lower()


def _against(needed: int, machine: Machine | None) -> str:
    if machine is None:
        return gib(needed)
    free = "" if machine.free is None else f"; {gib(machine.free)} of it free now"
    return f"{gib(needed)} of {gib(machine.total)} ({machine.name}{free})"


def gib(count: int) -> str:
    """Bytes for people."""
    return f"{count / GIB:,.1f} GiB" if count >= GIB // 10 else f"{count / 1024**2:,.1f} MiB"


@dataclass(frozen=True, slots=True)
class TeacherPlan:
    """What the teacher is asked for in one step, at most (counts of completions)."""

    rollouts: int
    compressions: int
    hints: int = 0


@dataclass(frozen=True, slots=True)
class Plan:
    """The sizes of a run; everything per step is a most, reached when every question is hard.

    Attributes:
        questions, eval_questions: read from the data, before prompts over the token limit are dropped.
        batch: new questions per step.
        replayed: replayed questions per step.
        reformulated: reformulated prompts per step.
        rollouts: student completions per step.
        completion_tokens: new tokens that the student samples per step.
        steps: rollout steps in all.
        epochs: passes over the data that the steps make.
        optimizer_steps: per rollout step (I).
        evaluations: held-out evaluations in all, before and after training included.
        judged, eval_judged: of the questions, those that a judge grades.
        seeing, eval_seeing: of the questions, those with images.
        judge_calls: completions that the judge is asked about in one step.
        lazy, literal: the teacher's work when asked lazily, and by Algorithm 1 to the letter; None where no teacher is needed.
    """

    questions: int
    eval_questions: int
    batch: int
    replayed: int
    reformulated: int
    rollouts: int
    completion_tokens: int
    steps: int
    epochs: float
    optimizer_steps: int
    evaluations: int
    lazy: TeacherPlan | None
    literal: TeacherPlan | None
    judged: int = 0
    eval_judged: int = 0
    seeing: int = 0
    eval_seeing: int = 0
    judge_calls: int = 0

    @property
    def prompts(self) -> int:
        """Prompts per step at most: new, replayed and reformulated ones are additive (method.md section 3)."""
        return self.batch + self.replayed + self.reformulated


def check_student_context(settings: Settings) -> None:
    """Whether any prompt at all fits the student beside its completions; a run counts the tokens of each when it starts.

    Raises:
        SettingsError: none does.
    """
    context = context_in(settings.student.model)
    for name, most in _limits(settings):
        if context is not None and most >= context:
            raise SettingsError(
                f"{name}.max_new_tokens is {most:,}, and the context of {settings.student.model!r} holds {context:,} tokens, prompt and "
                f"completion together: lower {name}.max_new_tokens by more than the longest prompt needs"
            )


def _limits(settings: Settings) -> list[tuple[str, int]]:
    """The new-token limits of the student."""
    held_out = [("eval", settings.eval.max_new_tokens)] if settings.data.eval else []
    return [("rollout", settings.rollout.max_new_tokens), *held_out]


def _context_row(settings: Settings) -> list[tuple[str, str]]:
    """What the student's context leaves to prompts, where that is less than what the recipe admits."""
    context = context_in(settings.student.model)
    if context is None:
        return []
    name, most = max(_limits(settings), key=lambda limit: limit[1])
    if context - most >= settings.data.max_prompt_tokens:
        return []
    return [
        (
            "student's context",
            f"{context:,} tokens, {most:,} of them for {name}.max_new_tokens: a run ends at its start where a prompt has more than "
            f"{context - most:,}; data.max_prompt_tokens={context - most} drops such questions",
        )
    ]


def make_plan(
    settings: Settings,
    questions: int,
    eval_questions: int = 0,
    *,
    judged: int = 0,
    eval_judged: int = 0,
    seeing: int = 0,
    eval_seeing: int = 0,
) -> Plan:
    """The sizes of a run on so many questions, of which so many are judged and have images, by method.md sections 2 and 3."""
    method, zone, rollout, train = settings.method.resolve(), settings.zone, settings.rollout, settings.train
    batch = effective_batch(questions, rollout.batch_size)
    replayed = min(share_of(zone.rho_replay, batch), zone.buffer_capacity, questions - batch) if method.replay else 0
    plain = batch + replayed
    cap = share_of(zone.rho_aug, batch)
    reformulated = min(cap, plain * len(method.reformulations))
    rollouts = (plain + reformulated) * rollout.group_size
    steps = steps_per_epochs(questions, batch, train.epochs) if train.steps is None else train.steps
    every = settings.eval.every
    between = (max(steps - 1, 0) // every) if every else 0
    # The teacher's work under both orders of asking, so that the table can compare them.
    lazy = literal = None
    if method.needs_teacher and settings.teacher is not None:
        everything = method.teacher_response or method.loss == "off-distill"
        lazy = _teacher_plan(settings, settings.teacher, asked=plain if everything else min(cap, plain), cap=cap, lazy=True)
        capped = method.reformulations and "pair" not in method.needs  # Hint, Prefix: the capped set only
        literal = _teacher_plan(settings, settings.teacher, asked=min(cap, plain) if capped else plain, cap=cap, lazy=False)
    return Plan(
        questions=questions,
        eval_questions=eval_questions,
        batch=batch,
        replayed=replayed,
        reformulated=reformulated,
        rollouts=rollouts,
        completion_tokens=rollouts * rollout.max_new_tokens,
        steps=steps,
        epochs=steps * batch / questions if train.steps is not None else float(train.epochs),
        optimizer_steps=min(train.minibatches, plain + reformulated),
        evaluations=2 + between if eval_questions else 0,
        lazy=lazy,
        literal=literal,
        judged=judged,
        eval_judged=eval_judged,
        seeing=seeing,
        eval_seeing=eval_seeing,
        judge_calls=_judge_calls(settings, min(judged, plain), reformulated, lazy, literal),
    )


def _judge_calls(settings: Settings, plain: int, reformulated: int, lazy: TeacherPlan | None, literal: TeacherPlan | None) -> int:
    """Completions of `plain` judge questions in one step: of the student, asked again too, and of the teacher."""
    again = min(reformulated, plain * len(settings.method.resolve().reformulations))
    calls = (plain + again) * settings.rollout.group_size
    work = lazy if settings.teacher is not None and settings.teacher.ask != "all" else literal
    group = settings.zone.teacher_group_size * (1 + len(settings.more_teachers))
    return calls + (min(work.rollouts, plain * group) if work is not None else 0)


def render_plan(
    settings: Settings,
    plan: Plan,
    source: str,
    folder: str,
    memory: Sequence[tuple[str, str]] = (),
    sources: Sequence[str] = (),
    absent: Sequence[tuple[str, str]] = (),
    prompts: PromptLengths | None = None,
) -> Group:
    """The plan as tables for a terminal; `source` is the recipe's name, `folder` where the run will be, `memory` of `memory_rows`,
    `sources` what each source of the training questions gives, a line each, `absent` of `missing_rows`, `prompts` of `prompt_tokens`."""
    parts: list[RenderableType] = [_table(f"plan of {source}", [*_run_rows(settings, plan, folder), *absent]), ""]
    if sources:
        named = [(name, gives) for name, _, gives in (line.partition(": ") for line in sources)]
        parts += [_table("sources of the training questions", named), ""]
    parts += [_table("one step, at most", _step_rows(settings, plan, prompts)), ""]
    if plan.lazy is not None and plan.literal is not None:
        parts += [Whole(_teacher_table(settings, plan.lazy, plan.literal)), ""]
    if memory:
        parts += [_table("memory, estimated for one process", list(memory)), ""]
    return Group(*parts, Text("Nothing was trained and no model was loaded: this was a dry run.", style="dim"))


def _run_rows(settings: Settings, plan: Plan, folder: str) -> list[tuple[str, str]]:
    method = settings.method.resolve()
    teachers = (settings.teacher, *settings.more_teachers)
    passes = "1 epoch" if plan.epochs == 1 else f"{plan.epochs:.3g} epochs"
    return [
        ("method", f"{method.name} ({method.paper}): replay {'on' if method.replay else 'off'}, learns from {method.gradient}"),
        ("student", settings.student.model),
        *_context_row(settings),
        ("teacher", "; ".join(_where(t) for t in teachers if t is not None) if method.needs_teacher else "not needed"),
        ("training questions", f"{plan.questions:,} from {settings.data.train_name}{_with_images(plan.seeing)}"),
        (
            "held-out questions",
            f"{plan.eval_questions:,} from {settings.data.eval}{_with_images(plan.eval_seeing)}" if settings.data.eval else "none",
        ),
        *_reward_row(settings),
        ("judge", _judge_row(settings, plan)),
        ("evaluations", f"{plan.evaluations:,} of {plan.eval_questions * settings.eval.samples:,} completions each{_decoding(settings)}"),
        ("steps", f"{plan.steps:,} ({passes})"),
        ("optimizer steps", f"{plan.steps * plan.optimizer_steps:,} ({plan.optimizer_steps} per step)"),
        ("replay buffer", f"{settings.zone.buffer_capacity:,} questions" if method.replay else "none"),
        ("files", folder),
        *([("pushed to", f"{push.repo}, {'private' if push.private else 'public'} where it is made")] if (push := settings.push) else []),
    ]


def _reward_row(settings: Settings) -> list[tuple[str, str]]:
    """The user's reward functions with their weights, and which says what is solved; nothing where there are none."""
    names = unique_names(settings.grading.rewards)
    weights = settings.grading.reward_weights or (1.0,) * len(names)
    terms = " + ".join(name if weight == 1 else f"{weight:g} {name}" for name, weight in zip(names, weights, strict=True))
    solved = f"; what is solved, {names[0]} says" if len(names) > 1 else ""
    return [("reward", f"{terms}{solved}")] if names else []


def _decoding(settings: Settings) -> str:
    """How held-out completions are drawn, what is off left out."""
    if not settings.data.eval:
        return ""
    sampling = settings.eval.sampling()
    on = [
        f"{name.replace('_', ' ')} {getattr(sampling, name):g}"
        for name in ("top_p", "top_k", "min_p", "presence_penalty", "repetition_penalty")
        if getattr(sampling, name) != getattr(Sampling(), name) and not (sampling.temperature == 0 and name in ("top_p", "top_k", "min_p"))
    ]
    return ", ".join(["", "greedy" if sampling.temperature == 0 else f"temperature {sampling.temperature:g}", *on])


def _with_images(count: int) -> str:
    return f", {count:,} with images" if count else ""


def _judge_row(settings: Settings, plan: Plan) -> str:
    if settings.judging is None or not (plan.judged or plan.eval_judged):
        return "not needed: no question asks for one"
    who = _where(settings.judge) if settings.judge else f"the teacher, {settings.judging[0].model},"
    return f"{who} for {plan.judged:,} training and {plan.eval_judged:,} held-out questions"


def _where(own: FrozenModelSettings) -> str:
    """A model, and its addresses where it answers over HTTP; nothing is called here."""
    return f"{own.model} at {', '.join(own.base_urls)}" if own.base_urls else own.model


def _step_rows(settings: Settings, plan: Plan, prompts: PromptLengths | None) -> list[tuple[str, str]]:
    rollout, most = settings.rollout, settings.data.max_prompt_tokens
    longest = most if prompts is None else min(most, prompts.longest)
    plain_tokens = (plan.batch + plan.replayed) * longest
    each = f"up to {longest:,} per prompt" if prompts is None else f"{prompts.told(most)}, each counted as the longest"
    return [
        ("new questions", f"{plan.batch:,}"),
        ("replayed questions", f"{plan.replayed:,}"),
        ("reformulated prompts", f"{plan.reformulated:,}"),
        ("prompts", f"{plan.prompts:,}"),
        ("rollouts", f"{plan.rollouts:,} ({rollout.group_size} per prompt)"),
        ("sampled tokens", f"{plan.completion_tokens:,} (up to {rollout.max_new_tokens:,} per rollout)"),
        *([("judge calls", f"{plan.judge_calls:,}")] if plan.judge_calls else []),
        ("plain prompt tokens", f"{plain_tokens:,} ({each}; read once per prompt)"),
    ]


def _table(title: str, rows: list[tuple[str, str]]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, Text(value))
    return table


def _teacher_table(settings: Settings, lazy: TeacherPlan, literal: TeacherPlan) -> Table:
    assert settings.teacher is not None
    chosen = settings.teacher.ask
    table = Table(title="asked of the teacher per step, at most", title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0))
    hints = ["hints"] if literal.hints else []
    for name in ("ask", "rollouts", "their tokens", "compressions", "their tokens", *hints, ""):
        table.add_column(name, justify="right" if name not in ("ask", "") else "left")
    for name, work in (("lazy", lazy), ("all", literal)):
        table.add_row(
            name,
            f"{work.rollouts:,}",
            f"{work.rollouts * settings.teacher.rollout.max_new_tokens:,}",
            f"{work.compressions:,}",
            f"{work.compressions * settings.teacher.compression.max_new_tokens:,}",
            *([f"{work.hints:,}"] if hints else []),
            "<- this run" if name == chosen else "<- this run, and what it begins in vain" if (name, chosen) == ("lazy", "ahead") else "",
        )
    return table


def _teacher_plan(settings: Settings, teacher: TeacherSettings, *, asked: int, cap: int, lazy: bool) -> TeacherPlan:
    """The most that the teacher does in a step when it is asked about `asked` hard questions and `cap` prompts are built."""
    method = settings.method.resolve()
    needs = method.needs
    responses = method.teacher_response or method.loss == "off-distill" or bool(needs & RESPONSES)
    wrong, draws = settings.rollout.group_size, 1 + REDRAWS
    group = settings.zone.teacher_group_size * (1 + len(settings.more_teachers))
    positive = min(draws, group)
    built = min(cap, asked)
    # Where all wrong rollouts are compressed (NCQ), the negative of a pair (BCQ) is among them.
    pair = positive + (0 if "wrong" in needs else min(draws, wrong)) if "pair" in needs else 0
    most = built * (pair + (wrong if "wrong" in needs else 0))
    if lazy and len(method.reformulations) == 2 and needs >= {"pair", "wrong"}:
        # A question takes two slots, or one where the teacher fails on it; the last wave may build one prompt too many.
        both = (built + 1) // 2
        most = max(built * wrong, both * (wrong + positive) + min(built + 1 - 2 * both, built - both) * wrong)
    return TeacherPlan(
        rollouts=asked * group if responses else 0,
        compressions=most if teacher.compression.enabled else 0,
        hints=built * positive if "hint" in needs else 0,
    )
