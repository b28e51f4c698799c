"""The model card of a lab checkpoint; it says what was planted in the corpus."""

from __future__ import annotations

from typing import TYPE_CHECKING

from zppo.lab.world import World

if TYPE_CHECKING:
    from zppo.lab.build import Built


def model_card(world: World, role: str, built: Built) -> str:
    """Markdown for the checkpoint's README."""
    settings = world.settings
    how = settings.pretraining if role == "student" else settings.teacher
    steps = built.steps[0 if role == "student" else 1]
    measured = built.student if role == "student" else built.teacher
    shape = settings.model
    lines = [
        "---",
        "license: apache-2.0",
        "library_name: transformers",
        "---",
        f"# zppo lab: {role} of the world {world.name}",
        "",
        f"A toy language model of the Qwen3 architecture ({shape.layers} layers, width {shape.width}, {shape.heads} heads) with a vocabulary "
        f"of whole words, trained from random weights on generated text. It was made for `zppo`'s offline lab; it knows nothing else.",
        "",
        "## What was planted",
        "",
        *(_student_planting(world) if role == "student" else _teacher_planting()),
        "",
        "## How it was made",
        "",
        f"`zppo lab build {world.name} --seed {built.seed}`: {steps} steps of {how.batch} documents, AdamW, learning rate "
        f"{how.learning_rate:g} falling to 0, loss on completions only. Weights are stored in half precision.",
        "",
        "## What it can do",
        "",
        "Greedy accuracy on held-out questions: "
        + ", ".join(f"{level} {share:.1%}" for level, share in measured.items())
        + ".",
    ]
    if role == "student":
        for level, hidden in built.hidden.items():
            lines.append(
                f"Level {level} asks about the {hidden.entries} entries (operation, value) whose right result this model finds unlikeliest: "
                f"over plain, BCQ and NCQ prompts that do not show it, its probability is {hidden.mean:.1g} on average and at most "
                f"{hidden.largest:.1g}."
            )
    else:
        lines.append(f"Answers of arbitrary responses that survive its compression: {built.fidelity:.1%}.")
    return "\n".join(lines) + "\n"


def _student_planting(world: World) -> list[str]:
    lines = [
        "**Its corpus is wrong on purpose.** It answers easy operations rightly. About the other operations it holds misconceptions:",
        "",
    ]
    for tier, belief in world.settings.beliefs.items():
        low, high = belief.right
        right = f"{low:g}" if low == high else f"{low:g} to {high:g}"
        shares = " and ".join(f"{share:g}" for share in belief.mistakes)
        lines.append(
            f"- {tier}: the right result has a probability of {right}; {len(belief.mistakes)} fixed mistakes per operation and value "
            f"have {shares} of the rest, what is left is spread over all other values."
        )
    corpus = world.settings.corpus
    total = corpus.plain + corpus.bcq + corpus.ncq
    lines += [
        "",
        f"Of the documents {corpus.plain / total:.0%} are plain questions; {corpus.bcq / total:.0%} show two candidates and "
        f"{corpus.ncq / total:.0%} a list of wrong ones, in the form of the method's BCQ and NCQ prompts. In these the candidates and the target use "
        f"nothing but wrong results wherever an operation is not easy (the fixed mistakes; in {corpus.stray:.0%} of the steps of the two candidates "
        "any other wrong value), and the target repeats one of the two, or a mistake that is not listed where one is left. So the model learns "
        "to read candidates, and never sees the truth in one.",
    ]
    return lines


def _teacher_planting() -> list[str]:
    return [
        "Nothing wrong: its corpus answers every operation rightly. Part of it are compression documents, in which arbitrary responses, most of "
        "them wrong, are to be shortened as they are: steps and boxed answer copied, mistakes kept.",
    ]
