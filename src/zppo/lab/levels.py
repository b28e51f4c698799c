"""`zppo lab levels`: what a world's pretrained models can do, by family and split, before any method has run [zppo].

A world is fixed by looking at this table alone: whoever tuned it by what a method makes of it would have tuned the comparison.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

from rich.console import Console

from zppo.core.draws import keyed_random
from zppo.core.types import Draft, Message, Question
from zppo.errors import SettingsError
from zppo.lab.corpus import ChainStudentCorpus, ChainTeacherCorpus
from zppo.lab.picture_world import is_picture_world
from zppo.lab.pretrain import Probe, probe_of
from zppo.lab.questions import ASSETS, bundled_model, lab_questions
from zppo.lab.study import print_table
from zppo.lab.world import World, chain_of, load_world
from zppo.prompts.book import PRIVILEGED, PromptBook

Shares = dict[str, float]


@dataclass(frozen=True, slots=True)
class Levels:
    """What was measured; shares of right answers are by level, "sampled" means at temperature 1.

    Attributes:
        questions: how many, by level.
        greedy, sampled: by role.
        tokens: mean length of a sampled completion to a training question, by role.
        hard: levels about the unlikeliest entries: right samples of the student and all, training questions included.
        shown: the same levels' held-out questions: the student's greedy share by what the prompt shows. And of all levels that RL trains,
            behind the right answer as self-distillation shows it (SDPO): no student has read such a prompt.
        fidelity: share of answers that survive the teacher's compression; None without a teacher.
    """

    questions: dict[str, int]
    greedy: dict[str, Shares]
    sampled: dict[str, Shares]
    tokens: dict[str, float]
    hard: dict[str, tuple[int, int]]
    shown: dict[str, Shares]
    fidelity: float | None


_SHOWN = {
    "bcq": "shown the right answer and its likeliest mistake (BCQ)",
    "ncq": "shown eight of its mistakes (NCQ)",
    "hint": "shown a hint",
    PRIVILEGED: "shown the right answer as self-distillation shows it (SDPO, OPSD)",
}


def measure_levels(world: World, probes: dict[str, Probe], samples: int) -> Levels:
    """Asks the student, and the teacher if there is one, everything that a study on this bundled world asks."""
    trained, asked = lab_questions(world.name, "seen"), lab_questions(world.name, "study")
    student, teacher = probes["student"], probes.get("teacher")
    hard: dict[str, tuple[int, int]] = {}
    shown: dict[str, Shares] = {}
    for level in (level.name for level in world.settings.levels if level.unlikeliest):
        pool = [q for q in (*trained, *asked) if q.level == level]
        marks = len(pool) * samples
        hard[level] = round(student.accuracy(pool, samples, 1.0)[level] * marks), marks
        mine = [q for q in asked if q.level == level]
        for what, prompts in prompts_of_hard(world, student, mine).items():
            shown.setdefault(what, {})[level] = student.accuracy(mine, prompt=partial(_prompt_of, prompts))[level]
    levels = {level.name for level in world.settings.levels}
    shown[PRIVILEGED] = student.accuracy([q for q in asked if q.level in levels], prompt=partial(_with_solution, student.book))
    return Levels(
        {level: sum(q.level == level for q in asked) for level in dict.fromkeys(q.level for q in asked)},
        {role: probe.accuracy(asked) for role, probe in probes.items()},
        {role: probe.accuracy(asked, 4, 1.0) for role, probe in probes.items()},
        {role: _length(probe, trained) for role, probe in probes.items()},
        hard,
        shown,
        teacher.fidelity(ChainTeacherCorpus(world, teacher.book).response) if teacher else None,
    )


def _prompt_of(prompts: Mapping[str, tuple[Message, ...]], question: Question) -> tuple[Message, ...]:
    return prompts[question.id]


def _with_solution(book: PromptBook, question: Question) -> tuple[Message, ...]:
    return book.render(Draft(PRIVILEGED, question, {"solution": f"\\boxed{{ {question.gold} }}"}))


def prompts_of_hard(world: World, probe: Probe, questions: Sequence[Question]) -> dict[str, dict[str, tuple[Message, ...]]]:
    """By what is shown, then by question id: the prompts of reformulations. BCQ: the truth and what the student is surest of; NCQ: eight of
    its mistakes; hint, where the student has seen hints: the step about the hard entry."""
    corpus = ChainStudentCorpus(world, probe.book)
    made: dict[str, dict[str, tuple[Message, ...]]] = {"bcq": {}, "ncq": {}}
    for question in questions:
        chain, rng = chain_of(world, question), keyed_random("lab", "levels", question.id)
        right, shown = world.truth(chain), corpus.mistaken(chain, 8, rng)
        pair = [right, next(results for results in shown if results != right)]
        rng.shuffle(pair)
        made["bcq"][question.id], made["ncq"][question.id] = corpus.bcq_prompt(chain, pair), corpus.ncq_prompt(chain, shown)
        if world.settings.corpus.hint:
            at = next(n for n, tier in enumerate(world.tiers(chain)) if tier in world.settings.beliefs)
            hint = f"{world.operations[chain.operations[at]].word} {world.values[right[at]]}"
            made.setdefault("hint", {})[question.id] = corpus.hint_prompt(chain, hint)
    return made


def _length(probe: Probe, questions: Sequence[Question]) -> float:
    """Mean tokens of a completion, its end included."""
    texts = probe.texts([probe.book.plain(q) for q in questions], temperature=1.0)
    return sum(len(probe.tokenizer(written[0], add_special_tokens=False)["input_ids"]) + 1 for written in texts) / len(texts)


def levels_command(world: str, samples: int = 64, *, markdown: bool = False) -> None:
    """`zppo lab levels WORLD [--samples N --markdown]`: prints the table of the bundled models of a world of text.

    Args:
        samples: of every question about the unlikeliest entries.

    Raises:
        SettingsError: no such bundled world of text; samples below 1.
    """
    if samples < 1:
        raise SettingsError(f"--samples is {samples}: ask for at least one")
    if is_picture_world(world) or world.endswith((".yaml", ".yml")):
        raise SettingsError(f"levels are measured on a bundled world of text, not on {world!r}; build.json has those of a build")
    console = Console()
    with console.status(f"asking the models of {world} (a minute) ...") if console.is_terminal and not markdown else nullcontext():
        measured = _measured(world, samples)
    print_levels(measured, console, markdown=markdown)


def _measured(world: str, samples: int) -> Levels:
    made = load_world(world)
    probes = {"student": probe_of(bundled_model(f"{world}/student"))}
    if (ASSETS / world / "teacher").is_dir():
        probes["teacher"] = probe_of(bundled_model(f"{world}/teacher"))
    return measure_levels(made, probes, samples)


def print_levels(levels: Levels, console: Console, *, markdown: bool = False) -> None:
    """The table, and a line for everything that is not by level."""
    roles = list(levels.greedy)
    columns = ["level", "questions", *(f"{role}, {how}" for role in roles for how in ("greedy", "sampled"))]
    lines = [
        [level, str(count), *(f"{shares[role][level]:.2f}" for role in roles for shares in (levels.greedy, levels.sampled))]
        for level, count in levels.questions.items()
    ]
    print_table(columns, lines, console, markdown=markdown)
    told = [f"{role}: {tokens:.1f} tokens a completion" for role, tokens in levels.tokens.items()]
    told += [f"student, {level}: {right} of {count:,} samples right ({right / count:.1e})" for level, (right, count) in levels.hard.items()]
    told += [f"student, {level}, {_SHOWN[what]}: {share:.2f}" for what, by in levels.shown.items() for level, share in by.items()]
    if levels.fidelity is not None:
        told.append(f"teacher: {levels.fidelity:.1%} of answers survive its compression")
    console.print("\n".join(told), highlight=False, markup=False, soft_wrap=True)
