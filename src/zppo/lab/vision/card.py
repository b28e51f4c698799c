"""The model card of a checkpoint that sees; it says what was planted in the corpus."""

from __future__ import annotations

from typing import TYPE_CHECKING

from zppo.lab.vision.kinds import KINDS
from zppo.lab.vision.pictures import SIZE
from zppo.lab.vision.world import VisionWorld

if TYPE_CHECKING:
    from zppo.lab.vision.build import BuiltVision


def model_card(world: VisionWorld, role: str, built: BuiltVision) -> str:
    """Markdown for the checkpoint's README."""
    settings, student = world.settings, role == "student"
    text, sight, seeing, describing = settings.model, settings.vision, settings.seeing, settings.describing
    how = settings.pretraining if student else settings.teacher
    command = f"zppo lab build {world.name} --seed {built.seed}" + ("" if built.teacher else " --no-teacher")
    lines = [
        "---",
        "license: apache-2.0",
        "library_name: transformers",
        "pipeline_tag: image-text-to-text",
        "---",
        f"# zppo lab: {role} of the world {world.name}",
        "",
        f"A toy vision-language model of the Qwen3-VL architecture ({text.layers} layers, width {text.width}, {text.heads} heads;",
        f"to see {sight.layers} layers, width {sight.width}) whose vocabulary is whole words, trained from random weights on generated",
        f"pictures of {SIZE} by {SIZE} pixels and generated text. It was made for the offline lab of `zppo` and knows nothing else.",
        "",
        "## What was planted",
        "",
        *(_student_planting(world) if student else _teacher_planting()),
        "",
        "## How it was made",
        "",
        f"`{command}`:",
        "",
        f"1. {built.steps[0]} steps of {seeing.batch} pictures, learning rate {seeing.learning_rate:g}: what a picture's token is turned",
        "   into is to be near the words for what lies in its cell;",
        f"2. {built.steps[1]} steps of {describing.batch} descriptions of pictures, learning rate {describing.learning_rate:g}; what",
        "   sees is left as it is, here and from here on;",
        f"3. student and teacher each go on from there: {built.steps[2 if student else 3]} steps of {how.batch} documents, learning rate",
        f"   {how.learning_rate:g}.",
        "",
        "AdamW, learning rates falling to 0, loss on completions only. Weights are stored in half precision.",
        "",
        "## What it can do",
        "",
    ]
    if not student:
        kept = f"Answers of arbitrary responses that survive its compression: {built.fidelity:.1%}."
        return "\n".join([*lines, f"Greedy accuracy on held-out questions: {_shares(built.teacher)}.", kept, ""])
    return "\n".join(
        [
            *lines,
            f"Greedy accuracy on held-out questions: {_shares(built.student)}.",
            "",
            f"Share of right rollouts at temperature 1: {_shares(built.sampled)}.",
            "",
            f"Greedy accuracy where a right and a wrong candidate are shown: {_shares(built.candidates)}.",
            "",
        ]
    )


def _shares(by_kind: dict[str, float]) -> str:
    return ", ".join(f"{kind} {share:.1%}" for kind, share in by_kind.items())


def _student_planting(world: VisionWorld) -> list[str]:
    settings, corpus = world.settings, world.settings.corpus
    lines = [
        "**Its corpus is wrong on purpose.** It reads pictures well, and takes some words for one another. Which it takes for which",
        "depends on the kind of question:",
        "",
    ]
    for tier, belief in settings.beliefs.items():
        low, high = belief.right
        right = f"{low:g}" if low == high else f"{low:g} to {high:g}"
        shares = " and ".join(f"{share:g}" for share in belief.mistakes)
        kinds = [kind for kind, sight in settings.kinds.items() if sight.tier == tier]
        lines += [
            f"- {tier} ({', '.join(kinds)}): a word has its right meaning with a probability of {right}; two wrong meanings",
            f"  have {shares} of the rest:",
            *(f"  {_taken(world, kind)}" for kind in kinds),
        ]
    total = corpus.plain + corpus.bcq + corpus.ncq
    return [
        *lines,
        "",
        f"Of the documents {corpus.plain / total:.0%} are plain questions, {corpus.bcq / total:.0%} show two candidates and "
        f"{corpus.ncq / total:.0%} a list of wrong ones, worded like",
        "the BCQ and NCQ prompts of the lab's recipes. Candidates for questions of these tiers never hold the right answer: they",
        f"are read under one of the two wrong meanings or, in {corpus.stray:.0%} of cases where two candidates are shown, under any",
        "other, off this picture or another. The target repeats one of the two, or gives a mistake that the list does not hold",
        "where there is one. So the model learns to read candidates and never sees the truth in one. The plain documents hold it",
        "with the probabilities above.",
    ]


def _taken(world: VisionWorld, kind: str) -> str:
    words = KINDS[kind].words
    pairs = [
        f"{word} for {' or '.join(words[m] for m in world.mistakes[kind, index])}" for index, word in enumerate(words)
    ]
    return f"- {kind}: {', '.join(pairs)}"


def _teacher_planting() -> list[str]:
    return [
        "Nothing wrong: its corpus answers every question rightly. Part of it are compression documents, in which arbitrary",
        "responses, most of them wrong, are to be shortened as they are: steps and boxed answer copied, mistakes kept.",
    ]
