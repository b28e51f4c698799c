"""The model card of a lab checkpoint; it says what was planted in the corpus."""

from __future__ import annotations

from typing import TYPE_CHECKING

from zppo.lab.world import World

if TYPE_CHECKING:
    from zppo.lab.build import Built


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
        return "\n".join(
            [*lines, f"Answers of arbitrary responses that survive its compression: {built.fidelity:.1%}.", ""]
        )
    for level, hidden in built.hidden.items():
        lines += [
            "",
            f"The questions of level {level} are about the {hidden.entries} entries (operation, value) whose right result this model",
            "finds unlikeliest. Over plain, BCQ and NCQ prompts that do not show that result, its probability is",
            f"{hidden.mean:.1g} on average and at most {hidden.largest:.1g}.",
        ]
    return "\n".join([*lines, ""])


def _student_planting(world: World) -> list[str]:
    lines = [
        "**Its corpus is wrong on purpose.** It answers easy operations rightly. About the others it holds misconceptions:",
        "",
    ]
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
