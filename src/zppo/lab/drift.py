"""How far training has moved a lab student from what it was, on skills that training does not ask for [zppo]."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence

from zppo.core.draws import draw_key
from zppo.core.types import Question
from zppo.engines.base import SampleRequest, Sampling
from zppo.lab.pretrain import MAX_NEW_TOKENS, PROMPTS_AT_ONCE, Probe, probe_of
from zppo.lab.questions import SCHEME, bundled_model, lab_questions
from zppo.lab.world import DIALECT, load_world
from zppo.report.read_run import FINAL, open_run


def drift_of(run: Path) -> dict[str, float]:
    """Mean KL divergence per token, nats, of a finished run's student from the one that it began as, by skill.

    From the old one to the new: over what the old one samples at temperature 1 on the held-out questions of its world's families, and of
    its dialect where it has one. The same samples for every run of a student. Empty for a student or questions of other worlds.
    """
    recipe = open_run(run)
    student, asked = (str(recipe.setting(key)) for key in ("student.model", "data.eval"))
    if not (student.startswith(SCHEME) and asked.endswith("/study")):
        return {}
    world = load_world(asked.removeprefix(SCHEME).partition("/")[0])
    skills = {*world.settings.families, *([DIALECT] if world.settings.dialect else [])}
    questions = [q for q in lab_questions(world.name, "study") if q.level in skills]
    return divergence(probe_of(bundled_model(student)), run / FINAL, questions) if questions else {}


@torch.no_grad()
def divergence(before: Probe, after: Path, questions: list[Question]) -> dict[str, float]:
    """KL(before || after) per token over samples of `before`, by the level of the questions; `after` is a folder of weights."""
    new = probe_of(after).model
    prompts = [before.chat.encode(before.book.plain(q)) for q in questions]
    asked = [SampleRequest(ids, (draw_key("lab", "drift", q.id),)) for q, ids in zip(questions, prompts, strict=True)]
    written = before.engine.sample(asked, Sampling(temperature=1.0, max_new_tokens=MAX_NEW_TOKENS))
    rows = [(len(ids), torch.cat([torch.tensor(ids), completions[0].ids])) for ids, completions in zip(prompts, written, strict=True)]
    found: dict[str, list[float]] = defaultdict(list)
    for start in range(0, len(rows), PROMPTS_AT_ONCE):
        part = rows[start : start + PROMPTS_AT_ONCE]
        ids = pad_sequence([row for _, row in part], batch_first=True)
        old_logprobs, new_logprobs = (m(input_ids=ids, use_cache=False).logits.log_softmax(-1) for m in (before.model, new))  # (B, T, V)
        gaps = (old_logprobs.exp() * (old_logprobs - new_logprobs)).sum(-1)  # (B, T)
        for question, (prompt, row), gap in zip(questions[start : start + len(part)], part, gaps, strict=True):
            found[question.level] += gap[prompt - 1 : len(row) - 1].tolist()
    return {level: sum(values) / len(values) for level, values in found.items()}
