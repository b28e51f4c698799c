"""Builds the student and the teacher of a world of pictures from nothing: `zppo lab build vision`."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast, Qwen3VLForConditionalGeneration

from zppo.core.draws import keyed_random
from zppo.core.types import Message, Question
from zppo.engines.chat import Chat
from zppo.images.processor import Sight
from zppo.images.store import PixelLimits
from zppo.lab.build import Say, lab_book, save, teller
from zppo.lab.measure import Probe
from zppo.lab.settings import Pretraining
from zppo.lab.vision.card import model_card
from zppo.lab.vision.corpus import Descriptions, StudentCorpus, TeacherCorpus
from zppo.lab.vision.pictures import SIZE
from zppo.lab.vision.pretrain import learn_to_see, make_model, make_processor, make_tokenizer, pretrain_seeing
from zppo.lab.vision.questions import with_pictures, write_vision_questions
from zppo.lab.vision.world import Ask, VisionWorld
from zppo.prompts import PromptBook

LIMITS = PixelLimits(SIZE * SIZE, SIZE * SIZE)
"""Pictures are shown as they are drawn."""
SAMPLES = 16


@dataclass(frozen=True, slots=True)
class BuiltVision:
    """What one build measured, on held-out questions and by kind.

    Attributes:
        student, teacher: greedy accuracy on plain prompts; of a model that was not made, nothing.
        sampled: share of the student's rollouts at temperature 1 that are right, on plain prompts.
        candidates: greedy accuracy of the student on prompts with a right and a wrong candidate.
        fidelity: share of answers that survive the teacher's compression; None where no teacher was made.
        steps: of seeing, of describing, of the student and of the teacher.
        seed: of weights and corpora.
        seconds: what it took.
    """

    student: dict[str, float]
    sampled: dict[str, float]
    candidates: dict[str, float]
    teacher: dict[str, float]
    fidelity: float | None
    steps: tuple[int, int, int, int]
    seed: int
    seconds: float


def build_vision(
    world: VisionWorld,
    out: Path,
    seed: int = 0,
    steps: int | None = None,
    say: Say = lambda line: None,
    *,
    with_teacher: bool = True,
) -> BuiltVision:
    """As `zppo.lab.build.build`; the pictures of the questions go to `out/pictures`.

    What sees is trained first, then the rest on descriptions, both once; student and teacher go on from there with their own documents.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _build(world, out, seed, steps, say, with_teacher)
    finally:
        torch.set_num_threads(threads)


def _build(world: VisionWorld, out: Path, seed: int, steps: int | None, say: Say, with_teacher: bool) -> BuiltVision:
    started = time.perf_counter()
    settings, tokenizer = world.settings, make_tokenizer()
    chat = Chat(tokenizer)
    book = lab_book(chat)
    seeing, describing, own, teachers = (
        how if steps is None else how.model_copy(update={"steps": steps})
        for how in (settings.seeing, settings.describing, settings.pretraining, settings.teacher)
    )
    seer = make_model(settings, tokenizer, seed)
    learn_to_see(seer, chat, seeing, seed, teller(say, f"{world.name}/sight", seeing.steps))
    told = teller(say, f"{world.name}/words", describing.steps)
    pretrain_seeing(seer, Descriptions(world, book), chat, describing, seed, told)
    roles: list[tuple[str, StudentCorpus | TeacherCorpus, Pretraining]] = [("student", StudentCorpus(world, book), own)]
    if with_teacher:
        roles.append(("teacher", TeacherCorpus(world, book), teachers))
    probes: dict[str, Probe] = {}
    for role, corpus, how in roles:
        model = deepcopy(seer)
        pretrain_seeing(model, corpus, chat, how, seed, teller(say, f"{world.name}/{role}", how.steps))
        save(model, tokenizer, out / role)
        make_processor().save_pretrained(out / role)
        probes[role] = probe_of(out / role)
    asks = world.asks()
    questions = {split: with_pictures(world, split, asks[split], out.absolute() / "pictures") for split in asks}
    for split, of_split in questions.items():
        write_vision_questions(out / f"{split}.jsonl", of_split)
    test, shown = questions["test"], candidate_prompts(world, book, asks["test"], questions["test"])
    student = probes["student"]
    built = BuiltVision(
        student=student.accuracy(test),
        sampled=student.accuracy(test, SAMPLES, 1.0),
        candidates=student.accuracy(test, prompt=lambda q: shown[q.id]),
        teacher=probes["teacher"].accuracy(test) if with_teacher else {},
        fidelity=probes["teacher"].copied(TeacherCorpus(world, book).response) if with_teacher else None,
        steps=(seeing.steps, describing.steps, own.steps, teachers.steps),
        seed=seed,
        seconds=time.perf_counter() - started,
    )
    for role in probes:
        (out / role / "README.md").write_text(model_card(world, role, built), encoding="utf-8")
    (out / "build.json").write_text(json.dumps(asdict(built), indent=1) + "\n", encoding="utf-8")
    return built


def probe_of(folder: Path) -> Probe:
    """A checkpoint as it lies there, ready to be asked."""
    model = Qwen3VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    sight = Sight.load(folder, tokenizer, LIMITS)
    return Probe(model, tokenizer, lab_book(Chat(tokenizer)), sight)


def candidate_prompts(
    world: VisionWorld, book: PromptBook, asks: Sequence[Ask], questions: Sequence[Question]
) -> dict[str, tuple[Message, ...]]:
    """For every question by id: a BCQ prompt with the right reading and a wrong one, in either order."""
    corpus, made = StudentCorpus(world, book), {}
    for ask, question in zip(asks, questions, strict=True):
        rng = keyed_random("lab", "candidates", question.id)
        pair = [ask.truth, corpus.wrong(ask, rng, float(world.known(ask.kind)))]
        rng.shuffle(pair)
        made[question.id] = corpus.bcq_prompt(ask, pair)
    return made
