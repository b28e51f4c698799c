"""The questions of a recipe, and who grades them. No torch: a dry run asks too."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from zppo.config.settings import Settings
from zppo.core.select import share_of
from zppo.core.types import JUDGE, Question
from zppo.data.load import check_there, load_questions, read_part
from zppo.data.mixture import Mixture, PartRead, mix, question_key, tell_copies
from zppo.data.order import effective_batch
from zppo.errors import SettingsError
from zppo.rollout.examples import Example, draw_examples

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Loaded:
    """The questions of a recipe; `parts` is what was read of each training source, `examples` what prompts show and nobody is asked."""

    mixture: Mixture
    parts: tuple[PartRead, ...]
    held_out: list[Question]
    examples: tuple[Example, ...] = ()


def load_data(settings: Settings, warn: Say | None = None, say: Say | None = None) -> tuple[list[Question], list[Question]]:
    """Training and held-out questions of a recipe; the args are those of `load_questions_of`. Raises DataError."""
    loaded = load_questions_of(settings, warn, say)
    return loaded.mixture.questions, loaded.held_out


def load_questions_of(settings: Settings, warn: Say | None = None, say: Say | None = None) -> Loaded:
    """The questions of a recipe, with what a person should know about them said. Raises DataError.

    Args:
        warn: is told of right answers that cannot match, of copies, of training questions that are held out too, and of parts of the
            method that stay idle.
        say: is told what each source gives, where there is something to tell.
    """
    loaded = load_mixture(settings, warn)
    tell_sources(settings, loaded, warn, say)
    if warn is not None:
        for text in idle_parts(settings, len(loaded.mixture.questions)):
            warn(text)
    return loaded


def tell_sources(settings: Settings, loaded: Loaded, warn: Say | None, say: Say | None) -> None:
    """What the sources of the training questions give, copies, and what is held out too; see `load_data`."""
    mixture = loaded.mixture
    if say is not None:
        for line in mixture.lines():
            say(line)
        if loaded.examples:
            shown = ", ".join(repr(example.question.id) for example in loaded.examples)
            say(f"examples: {len(loaded.examples)} training questions, shown in every prompt and not trained on ({shown})")
    if warn is not None:
        if any(not example.solution for example in loaded.examples):
            warn(
                "examples (data.examples) show answers without the steps to them, and a small student copies that: write worked steps into "
                f"a column, in {len(loaded.examples)} rows or more, and name it in data.columns.solution; examples are drawn from those"
            )
        tell_copies(mixture.questions, warn)
        parts = settings.data.parts
        names = [parts[number].name for number, _ in mixture.places]
        if settings.train.steps != 0 and (both := in_both(mixture.questions, loaded.held_out, names)):  # a run of 0 steps only evaluates
            warn(both)


def load_mixture(settings: Settings, warn: Say | None = None, *, keep_rows: bool = False) -> Loaded:
    """The questions of a recipe, with what its sources hold. Raises DataError.

    Args:
        warn: is told of right answers that cannot match.
        keep_rows: keep the training rows too.
    """
    data, parts = settings.data, settings.data.parts
    warn = None if settings.grading.reward else warn  # it may know what the rules do not

    def held_out() -> list[Question]:
        return load_questions(data.eval, data.columns, data.eval_limit, data.reading(held_out=True), warn) if data.eval else []

    for part in parts:
        check_there(part.source)  # before hours of reading
    first = held_out() if any("held_out" in text for part in parts for text in part.filters) else None
    keys = frozenset(map(question_key, first or ()))
    solved = data.examples > 0 and any(part.columns.solution for part in parts)
    read = tuple(read_part(part, warn, held_out=keys, keep_rows=keep_rows or solved) for part in parts)
    asked = held_out() if first is None else first
    mixture, examples = draw_examples(settings, mix(parts, read, settings.seed), read, asked)
    if not keep_rows:
        for part_read in read:
            part_read.kept_rows.clear()
    return Loaded(mixture, read, asked, examples)


def in_both(train: Sequence[Question], held_out: Sequence[Question], names: Sequence[str] = ()) -> str:
    """A warning where held-out questions are asked in training too, with the same text and images [zppo]; "" where none is.

    Args:
        names: of the source of each training question.
    """
    asked = [question_key(question) for question in held_out]
    known = set(asked)
    trained = {place: key for place, question in enumerate(train) if (key := question_key(question)) in known} if asked else {}
    if not trained:
        return ""
    keys = set(trained.values())
    both = [question.id for question, key in zip(held_out, asked, strict=True) if key in keys]
    by_source = Counter(names[place] for place in trained if names)
    where = f" (rows: {', '.join(f'{name} {count:,}' for name, count in by_source.items())})" if len(set(names)) > 1 else ""
    return (
        f"warning: {len(both)} of {len(held_out)} held-out questions are training questions too ({both[0]!r}, for one): held-out "
        f"accuracy will look better than it is. Leave them out of training{where} with data.filters: not held_out"
    )


def idle_parts(settings: Settings, questions: int) -> list[str]:
    """What a method does not get to do where there are few questions, or few in a batch: its shares of the batch are rounded down."""
    method, zone = settings.method.resolve(), settings.zone
    batch = effective_batch(questions, settings.rollout.batch_size)
    said = []
    if method.replay and zone.rho_replay > 0 and batch == questions:
        said.append(
            f"no question is ever replayed: each of the {questions:,} is new in every step. Give more questions, or lower "
            f"rollout.batch_size ({settings.rollout.batch_size:,})"
        )
    for name, share, on, what in (
        ("rho_replay", zone.rho_replay, method.replay, "no question is ever replayed"),
        (
            "rho_aug",
            zone.rho_aug,
            bool(method.reformulations),
            "no hard question is ever asked again with help, so the teacher is of no use",
        ),
    ):
        if on and share > 0 and share_of(share, batch) == 0:
            said.append(
                f"{what}: zone.{name} = {share:g} of {batch:,} new questions is less than one. Raise rollout.batch_size, or the share"
            )
    return said


def count_judged(settings: Settings, questions: Iterable[Question]) -> int:
    """How many of the questions want a judge.

    Raises:
        SettingsError: some do, and the recipe names no model that could judge.
    """
    wanting = [question.id for question in questions if question.grading == JUDGE]
    if wanting and settings.judging is None:
        raise SettingsError(
            f"{len(wanting):,} questions want a judge (the first is {wanting[0]!r}, column {settings.data.columns.grading!r}), and the "
            "recipe has neither a judge nor a teacher: set judge.model, or teacher.model, or let these questions be graded by rule"
        )
    return len(wanting)
