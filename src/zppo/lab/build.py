"""Builds a world's student and teacher from nothing: `zppo lab build WORLD`.

The model card of a lab checkpoint; it says what was planted in the corpus.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Qwen3ForCausalLM

from zppo.engines.chat import Chat
from zppo.lab.corpus import StudentCorpus, TeacherCorpus, make_tokenizer, templates
from zppo.lab.pretrain import Probe, make_model, pretrain
from zppo.lab.questions import write_questions
from zppo.lab.world import Entry, Pretraining, World
from zppo.prompts import Neutraliser, PromptBook

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Hidden:
    """Probability of the right results of `entries` entries over all contexts that do not show them: the largest and the mean."""

    entries: int
    largest: float
    mean: float


@dataclass(frozen=True, slots=True)
class Built:
    """What one build measured; shares by level are greedy accuracy on held-out plain prompts.

    Attributes:
        student, teacher: held-out accuracy by level; of a model that was not made, nothing.
        hidden: how likely the right results are to the student, for levels that ask about the unlikeliest entries.
        fidelity: share of answers that survive the teacher's compression; None where no teacher was made.
        steps: pretraining steps of student and teacher.
        seed: of weights and corpora.
        seconds: what it took.
    """

    student: dict[str, float]
    teacher: dict[str, float]
    hidden: dict[str, Hidden]
    fidelity: float | None
    steps: tuple[int, int]
    seed: int
    seconds: float


def lab_book(chat: Chat) -> PromptBook:
    """The prompts of a lab run: the short templates, model text made harmless."""
    return PromptBook(templates(), Neutraliser(chat.special_texts))


def build(
    world: World, out: Path, seed: int = 0, steps: int | None = None, say: Say = lambda line: None, *, with_teacher: bool = True
) -> Built:
    """Pretrains student and teacher and writes both, with model cards, to `out/student` and `out/teacher`;
    the questions go to `out/train.jsonl` and `out/test.jsonl`, what was measured to `out/build.json`.

    Equal arguments give equal weights on one machine: it computes with one thread, which is as fast for models of this size.

    Args:
        seed: draws weights and documents.
        steps: pretraining steps of either model instead of the world's own, to try things out.
        say: takes a line of progress now and then.
        with_teacher: False for the student alone, where the teacher of a world with the same truth serves.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _build(world, out, seed, steps, say, with_teacher)
    finally:
        torch.set_num_threads(threads)


def _build(world: World, out: Path, seed: int, steps: int | None, say: Say, with_teacher: bool) -> Built:
    started = time.perf_counter()
    tokenizer = make_tokenizer(world)
    chat = Chat(tokenizer)
    book = lab_book(chat)
    probes: dict[str, Probe] = {}
    roles: list[tuple[str, StudentCorpus | TeacherCorpus, Pretraining]] = [
        ("student", StudentCorpus(world, book), world.settings.pretraining)
    ]
    if with_teacher:
        roles.append(("teacher", TeacherCorpus(world, book), world.settings.teacher))
    for role, corpus, how in roles:
        how = how if steps is None else how.model_copy(update={"steps": steps})
        model = make_model(world.settings.model, tokenizer, seed)
        pretrain(model, corpus, chat, how, seed, teller(say, f"{world.name}/{role}", how.steps))
        save(model, tokenizer, out / role)
        # What is bundled is measured, after rounding.
        loaded = Qwen3ForCausalLM.from_pretrained(out / role, dtype=torch.float32)
        probes[role] = Probe(loaded, tokenizer, book)
    chosen, hidden = choose(world, probes["student"])
    for split in ("train", "test"):
        write_questions(out / f"{split}.jsonl", world.questions(split, chosen))
    test = world.questions("test", chosen)
    built = Built(
        student=probes["student"].accuracy(test),
        teacher=probes["teacher"].accuracy(test) if with_teacher else {},
        hidden=hidden,
        fidelity=probes["teacher"].fidelity(world) if with_teacher else None,
        steps=(steps or world.settings.pretraining.steps, steps or world.settings.teacher.steps),
        seed=seed,
        seconds=time.perf_counter() - started,
    )
    for role in probes:
        (out / role / "README.md").write_text(model_card(world, role, built), encoding="utf-8")
    (out / "build.json").write_text(json.dumps(asdict(built), indent=1) + "\n", encoding="utf-8")
    return built


def choose(world: World, probe: Probe) -> tuple[dict[str, list[Entry]], dict[str, Hidden]]:
    """The entries of levels that ask for the unlikeliest, and how likely their right results are to the student."""
    chosen: dict[str, list[Entry]] = {}
    hidden: dict[str, Hidden] = {}
    for name, level in world.levels.items():
        if not level.unlikeliest:
            continue
        chances = probe.truth(world, name, world.entries(name))
        ranked = sorted(chances, key=lambda entry: (max(chances[entry]), entry))[: level.entries]
        shown = [chance for entry in ranked for chance in chances[entry]]
        chosen[name] = ranked
        hidden[name] = Hidden(len(ranked), max(shown), sum(shown) / len(shown))
    return chosen, hidden


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Writes a checkpoint with weights stored in half precision; `from_pretrained` gives them back in single precision."""
    config = model.config.to_dict()
    state = {name: tensor.to(torch.float16) for name, tensor in model.state_dict().items()}
    model.save_pretrained(folder, state_dict=state)
    tokenizer.save_pretrained(folder)
    written = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    written["dtype"] = str(config["dtype"] or torch.float32).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")


def teller(say: Say, name: str, steps: int) -> Callable[[int, float], None]:
    """Says now and then how far a pretraining run is."""

    def tell(step: int, loss: float) -> None:
        if (step + 1) % max(1, steps // 10) == 0:
            say(f"{name}: step {step + 1} of {steps}, loss {loss:.3f} nats per token")

    return tell


def model_card(world: World, role: str, built: Built) -> str:
    """Markdown for the checkpoint's README."""
    settings, shape, student = world.settings, world.settings.model, role == "student"
    how = settings.pretraining if student else settings.teacher
    steps = built.steps[0 if student else 1]
    command = f"zppo lab build {world.name} --seed {built.seed}" + ("" if built.teacher else " --no-teacher")
    measured = built.student if student else built.teacher
    lines = [
        "---",
        "license: apache-2.0",
        "library_name: transformers",
        "---",
        f"# zppo lab: {role} of the world {world.name}",
        "",
        f"A toy language model of the Qwen3 architecture ({shape.layers} layers, width {shape.width}, {shape.heads} heads) whose",
        "vocabulary is whole words, trained from random weights on generated text. It was made for the offline lab of `zppo`",
        "and knows nothing else.",
        "",
        "## What was planted",
        "",
        *(_student_planting(world) if student else _teacher_planting()),
        "",
        "## How it was made",
        "",
        f"`{command}`: {steps} steps of {how.batch} documents, AdamW, learning rate",
        f"{how.learning_rate:g} falling to 0, loss on completions only. Weights are stored in half precision.",
        "",
        "## What it can do",
        "",
        f"Greedy accuracy on held-out questions: {', '.join(f'{level} {share:.1%}' for level, share in measured.items())}.",
    ]
    if not student:
        return "\n".join([*lines, f"Answers of arbitrary responses that survive its compression: {built.fidelity:.1%}.", ""])
    for level, hidden in built.hidden.items():
        lines += [
            "",
            f"The questions of level {level} are about the {hidden.entries} entries (operation, value) whose right result this model",
            "finds unlikeliest. Over plain, BCQ and NCQ prompts that do not show that result, its probability is",
            f"{hidden.mean:.1g} on average and at most {hidden.largest:.1g}.",
        ]
    return "\n".join([*lines, ""])


def _student_planting(world: World) -> list[str]:
    lines = ["**Its corpus is wrong on purpose.** It answers easy operations rightly. About the others it holds misconceptions:", ""]
    for tier, belief in world.settings.beliefs.items():
        low, high = belief.right
        right = f"{low:g}" if low == high else f"{low:g} to {high:g}"
        shares = " and ".join(f"{share:g}" for share in belief.mistakes)
        lines += [
            f"- {tier}: the right result has a probability of {right}; {len(belief.mistakes)} fixed mistakes per operation and value",
            f"  have {shares} of the rest, what is left is spread over all other values.",
        ]
    corpus = world.settings.corpus
    total = corpus.plain + corpus.bcq + corpus.ncq
    return [
        *lines,
        "",
        f"Of the documents {corpus.plain / total:.0%} are plain questions, {corpus.bcq / total:.0%} show two candidates and "
        f"{corpus.ncq / total:.0%} a list of wrong ones, worded like",
        "the BCQ and NCQ prompts of the lab's recipes. What these show about an operation that is not easy is always wrong: one of",
        f"the fixed mistakes or, in {corpus.stray:.0%} of such steps where two candidates are shown, any other wrong value. The",
        "target repeats one of the two, or gives a mistake that the list does not hold where there is one. So the model learns to",
        "read candidates and never sees the truth in one. The plain documents hold it with the probabilities above.",
        *_longer(corpus.longer),
    ]


def _longer(share: float) -> list[str]:
    return ["", f"{share:.0%} of the plain documents have one more easy operation behind the chain."] if share else []


def _teacher_planting() -> list[str]:
    return [
        "Nothing wrong: its corpus answers every operation rightly. Part of it are compression documents, in which arbitrary",
        "responses, most of them wrong, are to be shortened as they are: steps and boxed answer copied, mistakes kept.",
    ]
