"""Builds a world's student and teacher from nothing: `zppo lab build WORLD`."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from zppo.engines.chat import Chat
from zppo.lab.card import model_card
from zppo.lab.corpus import StudentCorpus, TeacherCorpus
from zppo.lab.language import make_tokenizer, templates
from zppo.lab.measure import Probe
from zppo.lab.pretrain import make_model, pretrain
from zppo.lab.world import World
from zppo.prompts import Neutraliser, PromptBook

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Built:
    """What one build measured; shares by level are greedy accuracy on held-out plain prompts.

    Attributes:
        student, teacher: held-out accuracy by level.
        hidden: largest and mean probability that the student gives the right result of an entry that is not easy, by level.
        fidelity: share of answers that survive the teacher's compression.
        steps: pretraining steps of student and teacher.
        seed: of weights and corpora.
        seconds: what it took.
    """

    student: dict[str, float]
    teacher: dict[str, float]
    hidden: dict[str, dict[str, float]]
    fidelity: float
    steps: tuple[int, int]
    seed: int
    seconds: float


def lab_book(chat: Chat) -> PromptBook:
    """The prompts of a lab run: the short templates, model text made harmless."""
    return PromptBook(templates(), Neutraliser(chat.special_texts))


def build(world: World, out: Path, seed: int = 0, steps: int | None = None, say: Say = lambda line: None) -> Built:
    """Pretrains student and teacher and writes both, with model cards, to `out/student` and `out/teacher`.

    Equal arguments give equal weights (one machine, one number of threads).

    Args:
        seed: draws weights and documents.
        steps: pretraining steps of either model instead of the world's own, to try things out.
        say: takes a line of progress now and then.
    """
    started = time.perf_counter()
    tokenizer = make_tokenizer(world)
    chat = Chat(tokenizer)
    book = lab_book(chat)
    probes: dict[str, Probe] = {}
    for role, corpus, how in (
        ("student", StudentCorpus(world, book), world.settings.pretraining),
        ("teacher", TeacherCorpus(world, book), world.settings.teacher),
    ):
        how = how if steps is None else how.model_copy(update={"steps": steps})
        model = make_model(world.settings.model, tokenizer, seed)
        pretrain(model, corpus, chat, how, seed, _teller(say, f"{world.name}/{role}", how.steps))
        save(model, tokenizer, out / role)
        # What is bundled is measured, after rounding.
        loaded = Qwen3ForCausalLM.from_pretrained(out / role, dtype=torch.float32)
        probes[role] = Probe(loaded, tokenizer, book)
    test = world.questions("test")
    built = Built(
        student=probes["student"].accuracy(test),
        teacher=probes["teacher"].accuracy(test),
        hidden={
            level: {"max": max(chances), "mean": sum(chances) / len(chances)}
            for level in world.levels
            if (chances := probes["student"].truth(world, level))
        },
        fidelity=probes["teacher"].fidelity(world),
        steps=(steps or world.settings.pretraining.steps, steps or world.settings.teacher.steps),
        seed=seed,
        seconds=time.perf_counter() - started,
    )
    for role in probes:
        (out / role / "README.md").write_text(model_card(world, role, built), encoding="utf-8")
    (out / "build.json").write_text(json.dumps(asdict(built), indent=1) + "\n", encoding="utf-8")
    return built


def save(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Writes a checkpoint with weights stored in half precision; `from_pretrained` gives them back in single precision."""
    config = model.config.to_dict()
    state = {name: tensor.to(torch.float16) for name, tensor in model.state_dict().items()}
    model.save_pretrained(folder, state_dict=state)
    tokenizer.save_pretrained(folder)
    written = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    written["dtype"] = str(config["dtype"] or torch.float32).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")


def _teller(say: Say, name: str, steps: int) -> Callable[[int, float], None]:
    def tell(step: int, loss: float) -> None:
        if (step + 1) % max(1, steps // 10) == 0:
            say(f"{name}: step {step + 1} of {steps}, loss {loss:.3f} nats per token")

    return tell
