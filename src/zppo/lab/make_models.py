"""Builds a world's student and teacher from nothing, with model cards that say what was planted: `zppo lab build WORLD`."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Qwen3VLForConditionalGeneration

from zppo.core.draws import keyed_random
from zppo.core.types import Message, Question
from zppo.engines.chat import Chat
from zppo.errors import SettingsError
from zppo.lab.corpus import (
    ChainStudentCorpus,
    ChainTeacherCorpus,
    Corpus,
    DescriptionCorpus,
    PictureStudentCorpus,
    PictureTeacherCorpus,
    TeacherCorpus,
)
from zppo.lab.families import family_questions
from zppo.lab.models import lab_book, make_model, make_processor, make_tokenizer
from zppo.lab.picture_world import KINDS, SIZE, Ask, PictureWorld
from zppo.lab.pretrain import Probe, pretrain, pretrain_vision, probe_of
from zppo.lab.questions import any_world, with_pictures, write_questions
from zppo.lab.world import BeliefSettings, CorpusSettings, Entry, Pretraining, World, study
from zppo.prompts import PromptBook

Say = Callable[[str], None]
SAMPLES = 16  # rollouts of a question about a picture that the student's share of right ones is measured on


@dataclass(frozen=True, slots=True)
class Hidden:
    """Probability of the right results of `entries` entries over all contexts that do not show them: the largest and the mean."""

    entries: int
    largest: float
    mean: float


@dataclass(frozen=True, slots=True)
class BuildReport:
    """What one build measured, on held-out questions; shares are by level.

    Attributes:
        student, teacher: greedy accuracy on plain prompts; of a model that was not made, nothing.
        fidelity: share of answers that survive the teacher's compression; None where no teacher was made.
        steps: pretraining steps of student and teacher; of pictures those of vision tower and descriptions before them.
        seed: of weights and corpora.
        seconds: what it took.
        hidden: text: how likely the right results are to the student, for levels that ask about the unlikeliest entries.
        sampled: pictures: share of the student's rollouts at temperature 1 that are right, on plain prompts.
        candidates: pictures: greedy accuracy of the student on prompts with a right and a wrong candidate.
    """

    student: dict[str, float]
    teacher: dict[str, float]
    fidelity: float | None
    steps: tuple[int, ...]
    seed: int
    seconds: float
    hidden: dict[str, Hidden] = field(default_factory=dict)
    sampled: dict[str, float] = field(default_factory=dict)
    candidates: dict[str, float] = field(default_factory=dict)

    def text(self) -> str:
        """As JSON, with what was measured in worlds of this kind."""
        measured = ("student", "sampled", "candidates", "teacher") if self.sampled else ("student", "teacher", "hidden")
        values = asdict(self)
        return json.dumps({name: values[name] for name in (*measured, "fidelity", "steps", "seed", "seconds")}, indent=1) + "\n"


def build_command(world: str, out: Path | None = None, seed: int = 0, steps: int | None = None, *, with_teacher: bool = True) -> None:
    """`zppo lab build WORLD [--out DIR --seed N --steps N --no-teacher]`: remakes student and teacher, prints what they can do.

    Args:
        world: a bundled world's name or the path of a settings file.
        out: gets the folders `student` and `teacher`; runs/lab/<world> by default.
        steps: pretraining steps of either model instead of the world's own.

    Raises:
        SettingsError: no such world; steps or seed out of range.
    """
    if steps is not None and steps < 1:
        raise SettingsError(f"--steps is {steps}: a model takes at least one step; leave it out for the world's own number")
    made = any_world(world)
    folder = out or Path("runs") / "lab" / made.name
    built = build(made, folder, seed, steps, lambda line: print(line, flush=True), with_teacher=with_teacher)
    for role, shares in (("student", built.student), ("teacher", built.teacher))[: 1 + with_teacher]:
        print(f"{role}: {_shares(shares)} of the held-out questions")
    for level, hidden in built.hidden.items():
        print(f"student, level {level}: probability of the right results mean {hidden.mean:.2g}, largest {hidden.largest:.2g}")
    if built.fidelity is not None:
        print(f"teacher: {built.fidelity:.1%} of answers survive its compression")
    print(f"written to {folder} in {built.seconds:.0f} s")


def build(
    world: World | PictureWorld,
    out: Path,
    seed: int = 0,
    steps: int | None = None,
    say: Say = lambda line: None,
    *,
    with_teacher: bool = True,
) -> BuildReport:
    """Pretrains student and teacher and writes both, with model cards, to `out/student` and `out/teacher`; the questions go to
    `out/train.jsonl` and `out/test.jsonl`, their pictures to `out/pictures`, what was measured to `out/build.json`.

    Equal arguments give equal weights on one machine: it computes with one thread, which is as fast for models of this size.

    Args:
        seed: draws weights and documents.
        steps: steps of every pretraining run instead of the world's own, to try things out.
        say: takes a line of progress now and then.
        with_teacher: False for the student alone, where the teacher of a world with the same truth serves.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        started = time.perf_counter()
        probes, taken = _pretrained(world, out, seed, steps, say, with_teacher)
        built = BuildReport(**_measured(world, out, probes), steps=taken, seed=seed, seconds=time.perf_counter() - started)
        for role in probes:
            (out / role / "README.md").write_text(model_card(world, role, built), encoding="utf-8")
        (out / "build.json").write_text(built.text(), encoding="utf-8")
        return built
    finally:
        torch.set_num_threads(threads)


def _pretrained(
    world: World | PictureWorld, out: Path, seed: int, steps: int | None, say: Say, with_teacher: bool
) -> tuple[dict[str, Probe], tuple[int, ...]]:
    """Student and teacher by role, written and loaded again; and the steps of every pretraining run, of the teacher's too."""

    def shortened(how: Pretraining) -> Pretraining:
        return how if steps is None else how.model_copy(update={"steps": steps})

    tokenizer = make_tokenizer(world)
    chat = Chat(tokenizer)
    book = lab_book(chat)
    base, taken = make_model(world, tokenizer, seed), []
    corpora: list[Corpus[Any, Any]]
    if isinstance(world, PictureWorld):
        # The vision tower is trained first, then the rest on descriptions, both once; student and teacher go on from there.
        assert isinstance(base, Qwen3VLForConditionalGeneration)
        seeing, describing = shortened(world.settings.seeing), shortened(world.settings.describing)
        pretrain_vision(base, chat, seeing, seed, teller(say, f"{world.name}/sight", seeing.steps))
        pretrain(base, DescriptionCorpus(world, book), chat, describing, seed, teller(say, f"{world.name}/words", describing.steps))
        taken = [seeing.steps, describing.steps]
        corpora = [PictureStudentCorpus(world, book), PictureTeacherCorpus(world, book)]
    else:
        corpora = [ChainStudentCorpus(world, book), ChainTeacherCorpus(world, book)]
    probes: dict[str, Probe] = {}
    roles = ["student", "teacher"] if with_teacher else ["student"]
    hows = shortened(world.settings.pretraining), shortened(world.settings.teacher)
    for role, corpus, how in zip(roles, corpora, hows, strict=False):
        shape = world.settings.teacher.model if isinstance(world, World) and role == "teacher" else None
        model = make_model(world, tokenizer, seed, shape) if shape else deepcopy(base)
        pretrain(model, corpus, chat, how, seed, teller(say, f"{world.name}/{role}", how.steps))
        save_models(model, tokenizer, out / role)
        if isinstance(world, PictureWorld):
            make_processor().save_pretrained(out / role)
        probes[role] = probe_of(out / role)  # what is bundled is measured, after rounding
    return probes, (*taken, *(how.steps for how in hows))


def _measured(world: World | PictureWorld, out: Path, probes: dict[str, Probe]) -> dict[str, Any]:
    """Writes the questions; gives what was measured on the held-out ones, as fields of `BuildReport`."""
    student, teacher = probes["student"], probes.get("teacher")
    measured: dict[str, Any]
    corpus: TeacherCorpus[Any, Any]
    if isinstance(world, PictureWorld):
        asks = world.asks()
        questions = {split: with_pictures(world, split, asks[split], out.absolute() / "pictures") for split in asks}
        shown = candidate_prompts(world, student.book, asks["test"], questions["test"])
        measured = {
            "sampled": student.accuracy(questions["test"], SAMPLES, 1.0),
            "candidates": student.accuracy(questions["test"], prompt=lambda q: shown[q.id]),
        }
        corpus = PictureTeacherCorpus(world, student.book)
    else:
        chosen, hidden = choose(world, student)  # what is asked depends on what the student finds unlikeliest
        questions = {"train": world.questions("train", chosen), "test": world.questions("test", chosen)}
        measured, corpus = {"hidden": hidden}, ChainTeacherCorpus(world, student.book)
    for split, of_split in questions.items():
        write_questions(out / f"{split}.jsonl", of_split)
    asked = questions["test"]
    if isinstance(world, World) and world.settings.families:
        asked = [*study(world, asked), *family_questions(world)]
    return measured | {
        "student": student.accuracy(asked),
        "teacher": teacher.accuracy(asked) if teacher else {},
        "fidelity": teacher.fidelity(corpus.response) if teacher else None,
    }


def choose(world: World, probe: Probe) -> tuple[dict[str, list[Entry]], dict[str, Hidden]]:
    """The entries of levels that ask for the unlikeliest, and how likely their right results are to the student."""
    chosen: dict[str, list[Entry]] = {}
    hidden: dict[str, Hidden] = {}
    for name, level in ((name, level) for name, level in world.levels.items() if level.unlikeliest):
        chances = probe.truth(world, name, world.entries(name))
        ranked = sorted(chances, key=lambda entry: (max(chances[entry]), entry))[: level.entries]
        shown = [chance for entry in ranked for chance in chances[entry]]
        chosen[name] = ranked
        hidden[name] = Hidden(len(ranked), max(shown), sum(shown) / len(shown))
    return chosen, hidden


def candidate_prompts(
    world: PictureWorld, book: PromptBook, asks: Sequence[Ask], questions: Sequence[Question]
) -> dict[str, tuple[Message, ...]]:
    """For every question by id: a BCQ prompt with the right reading and a wrong one, in either order."""
    corpus, made = PictureStudentCorpus(world, book), {}
    for ask, question in zip(asks, questions, strict=True):
        rng = keyed_random("lab", "candidates", question.id)
        pair = [ask.truth, corpus.wrong(ask, rng, float(world.known(ask.kind)))]
        rng.shuffle(pair)
        made[question.id] = corpus.bcq_prompt(ask, pair)
    return made


def save_models(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Writes a checkpoint with weights stored in half precision; `from_pretrained` gives them back in single precision."""
    config = model.config.to_dict()
    state = {name: tensor.to(torch.float16) for name, tensor in model.state_dict().items()}
    model.save_pretrained(folder, state_dict=state)
    tokenizer.save_pretrained(folder)
    written = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    written["dtype"] = str(config["dtype"] or torch.float32).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")


def teller(say: Say, name: str, steps: int) -> Callable[[int, float], None]:
    """Logs about ten times how far a pretraining run is."""

    def tell(step: int, loss: float) -> None:
        if (step + 1) % max(1, steps // 10) == 0:
            say(f"{name}: step {step + 1} of {steps}, loss {loss:.3f} nats per token")

    return tell


def model_card(world: World | PictureWorld, role: str, built: BuildReport) -> str:
    """Markdown for the checkpoint's README: what was planted, how it was made, what it can do. The text is part of the bundled files."""
    student, pictures = role == "student", isinstance(world, PictureWorld)
    how = world.settings.pretraining if student else world.settings.teacher
    steps = built.steps[-2 if student else -1]
    command = f"zppo lab build {world.name} --seed {built.seed}" + ("" if built.teacher else " --no-teacher")
    if student:
        planted = _picture_planting(world) if isinstance(world, PictureWorld) else _text_planting(world)
    elif isinstance(world, World) and world.settings.teacher.beliefs:
        planted = _teacher_planting(world)
    else:
        what = "question" if pictures else "operation"
        planted = [
            f"Nothing wrong: its corpus answers every {what} rightly. Part of it are compression documents, in which arbitrary",
            "responses, most of them wrong, are to be shortened as they are: steps and boxed answer copied, mistakes kept.",
        ]
    can = [f"Greedy accuracy on held-out questions: {_shares(built.student if student else built.teacher)}."]
    if not student:
        can.append(f"Answers of arbitrary responses that survive its compression: {built.fidelity:.1%}.")
    elif pictures:
        can += ["", f"Share of right rollouts at temperature 1: {_shares(built.sampled)}.", ""]
        can.append(f"Greedy accuracy where a right and a wrong candidate are shown: {_shares(built.candidates)}.")
    for level, hidden in built.hidden.items() if student else ():
        can += [
            "",
            f"The questions of level {level} are about the {hidden.entries} entries (operation, value) whose right result this model",
            "finds unlikeliest. Over plain, BCQ and NCQ prompts that do not show that result, its probability is",
            f"{hidden.mean:.1g} on average and at most {hidden.largest:.1g}.",
        ]
    lines = ["---", "license: apache-2.0", "library_name: transformers", *(["pipeline_tag: image-text-to-text"] if pictures else []), "---"]
    lines += [f"# zppo lab: {role} of the world {world.name}", "", *_about(world, student)]
    sections = {"What was planted": planted, "How it was made": _made(world, how, steps, command, built), "What it can do": can}
    for title, text in sections.items():
        lines += ["", f"## {title}", "", *text]
    return "\n".join([*lines, ""])


def _shares(by_level: dict[str, float]) -> str:
    return ", ".join(f"{level} {share:.1%}" for level, share in by_level.items())


def _about(world: World | PictureWorld, student: bool) -> list[str]:
    """What kind of model it is."""
    shape = world.settings.model
    if isinstance(world, World) and not student:
        shape = world.settings.teacher.model or shape
    if isinstance(world, PictureWorld):
        tower = world.settings.vision
        return [
            f"A toy vision-language model of the Qwen3-VL architecture ({shape.layers} layers, width {shape.width}, {shape.heads} heads;",
            f"to see {tower.layers} layers, width {tower.width}) whose vocabulary is whole words, trained from random weights on generated",
            f"pictures of {SIZE} by {SIZE} pixels and generated text. It was made for the offline lab of `zppo` and knows nothing else.",
        ]
    return [
        f"A toy language model of the Qwen3 architecture ({shape.layers} layers, width {shape.width}, {shape.heads} heads) whose",
        "vocabulary is whole words, trained from random weights on generated text. It was made for the offline lab of `zppo`",
        "and knows nothing else.",
    ]


def _made(world: World | PictureWorld, how: Pretraining, steps: int, command: str, built: BuildReport) -> list[str]:
    """The command, and what it does."""
    if not isinstance(world, PictureWorld):
        return [
            f"`{command}`: {steps} steps of {how.batch} documents, AdamW, learning rate",
            f"{how.learning_rate:g} falling to 0, loss on completions only. Weights are stored in half precision.",
        ]
    seeing, describing = world.settings.seeing, world.settings.describing
    return [
        f"`{command}`:",
        "",
        f"1. {built.steps[0]} steps of {seeing.batch} pictures, learning rate {seeing.learning_rate:g}: what a picture's token is turned",
        "   into is to be near the words for what lies in its cell;",
        f"2. {built.steps[1]} steps of {describing.batch} descriptions of pictures, learning rate {describing.learning_rate:g}; what",
        "   sees is left as it is, here and from here on;",
        f"3. student and teacher each go on from there: {steps} steps of {how.batch} documents, learning rate",
        f"   {how.learning_rate:g}.",
        "",
        "AdamW, learning rates falling to 0, loss on completions only. Weights are stored in half precision.",
    ]


def _belief(belief: BeliefSettings) -> tuple[str, str]:
    """A range of probabilities and the shares of mistakes in words."""
    low, high = belief.right
    return f"{low:g}" if low == high else f"{low:g} to {high:g}", " and ".join(f"{share:g}" for share in belief.mistakes)


def _document_shares(corpus: CorpusSettings) -> str:
    plain, bcq, ncq = (share / (corpus.plain + corpus.bcq + corpus.ncq) for share in (corpus.plain, corpus.bcq, corpus.ncq))
    return (
        f"Of the documents {plain:.0%} are plain questions, {bcq:.0%} show two candidates and {ncq:.0%} a list of wrong ones, worded like"
    )


def _text_planting(world: World) -> list[str]:
    lines = ["**Its corpus is wrong on purpose.** It answers easy operations rightly. About the others it holds misconceptions:", ""]
    for tier, belief in world.settings.beliefs.items():
        right, shares = _belief(belief)
        lines += [
            f"- {tier}: the right result has a probability of {right}; {len(belief.mistakes)} fixed mistakes per operation and value",
            f"  have {shares} of the rest, what is left is spread over all other values.",
        ]
    corpus = world.settings.corpus
    lines += [
        "",
        _document_shares(corpus),
        "the BCQ and NCQ prompts of the lab's recipes. What these show about an operation that is not easy is always wrong: one of",
        f"the fixed mistakes or, in {corpus.stray:.0%} of such steps where two candidates are shown, any other wrong value. The",
        "target repeats one of the two, or gives a mistake that the list does not hold where there is one. So the model learns to",
        "read candidates and never sees the truth in one. The plain documents hold it with the probabilities above.",
    ]
    if corpus.longer:
        lines += ["", f"{corpus.longer:.0%} of the plain documents have one more easy operation behind the chain."]
    settings = world.settings
    if corpus.dialect and settings.dialect is not None:
        lines += ["", f"{corpus.dialect:.0%} of them are in a second writing, question and thoughts:"]
        lines += [f"`{settings.dialect.question}`, `{settings.dialect.step}`."]
    if corpus.hint:
        lines += ["", f"{corpus.hint:.0%} of all documents show a hint, one step of the answer, which is as wrong as candidates are."]
    if settings.families:
        shares = ", ".join(f"{name} {family.share:.0%}" for name, family in settings.families.items())
        lines += ["", f"Of all documents these are about other skills, rightly answered: {shares}."]
    return lines


def _teacher_planting(world: World) -> list[str]:
    teacher = world.settings.teacher
    lines = ["**Its corpus is wrong about a few things.** It answers most entries (operation, value) rightly, and errs about some:", ""]
    for tier, belief in teacher.beliefs.items():
        right, shares = _belief(belief)
        lines += [f"- {tier}: {belief.share:.0%} of the entries, where the right result has a probability of {right};"]
        lines += [f"  {len(belief.mistakes)} fixed mistakes have {shares} of the rest."]
    if teacher.writing is not None:
        lines += ["", f"It writes its thoughts as `{teacher.writing.opening}`, then `{teacher.writing.step}` for every step."]
    families = ", ".join(name for name, family in world.settings.families.items() if family.teacher) or "none"
    lines += ["", f"Of the student's other skills it was taught: {families}."]
    lines += ["", f"{teacher.compression:.0%} of its other documents are compression documents, in which arbitrary responses, most of them"]
    lines += ["wrong, are to be shortened as they are: results and boxed answer copied, mistakes kept."]
    if teacher.hints:
        lines += [f"{teacher.hints:.0%} of all turn an arbitrary response into a hint, one of its two steps."]
    return lines


def _picture_planting(world: PictureWorld) -> list[str]:
    settings, corpus, lines = (
        world.settings,
        world.settings.corpus,
        [
            "**Its corpus is wrong on purpose.** It reads pictures well, and takes some words for one another. Which it takes for which",
            "depends on the kind of question:",
            "",
        ],
    )
    for tier, belief in settings.beliefs.items():
        right, shares = _belief(belief)
        kinds = [kind for kind, about in settings.kinds.items() if about.tier == tier]
        lines += [
            f"- {tier} ({', '.join(kinds)}): a word has its right meaning with a probability of {right}; two wrong meanings",
            f"  have {shares} of the rest:",
        ]
        for kind in kinds:
            words = KINDS[kind].words
            pairs = [f"{word} for {' or '.join(words[m] for m in world.mistakes[kind, i])}" for i, word in enumerate(words)]
            lines.append(f"  - {kind}: {', '.join(pairs)}")
    return [
        *lines,
        "",
        _document_shares(corpus),
        "the BCQ and NCQ prompts of the lab's recipes. Candidates for questions of these tiers never hold the right answer: they",
        f"are read under one of the two wrong meanings or, in {corpus.stray:.0%} of cases where two candidates are shown, under any",
        "other, off this picture or another. The target repeats one of the two, or gives a mistake that the list does not hold",
        "where there is one. So the model learns to read candidates and never sees the truth in one. The plain documents hold it",
        "with the probabilities above.",
    ]
