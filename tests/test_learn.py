"""Small rules of learning: think tags of foreign responses, settings that keep their defaults, guards."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from zppo.config.model_settings import TeacherSettings
from zppo.config.recipe import load_recipe
from zppo.core.loss import jensen_shannon
from zppo.engines.chat import Chat
from zppo.rollout.teacher import ResponseTokens
from zppo.teacher.compression import Source


@pytest.mark.parametrize(
    ("teacher_open", "student_open", "text", "expected"),
    [
        (False, False, "<think>a</think>b", "<think>a</think>b"),
        (True, True, "a</think>b", "a</think>b"),
        (True, False, "a</think>b", "<think>\na</think>b"),
        (False, True, "<think>a</think>b", "a</think>b"),
        (False, True, "b", "</think>\n\nb"),
        (False, False, "a<|im_end|>b", "a< |im_end|>b"),
    ],
)
def test_a_response_stands_rightly_behind_the_student_s_prompt(
    tiny_qwen3_dir: Path, teacher_open: bool, student_open: bool, text: str, expected: str
) -> None:
    chat = Chat.load(str(tiny_qwen3_dir), {"enable_thinking": student_open})
    ids = ResponseTokens(chat)(Source(text, "b", think_open=teacher_open))
    assert chat.show(ids) == expected


def test_one_key_of_a_section_leaves_its_other_defaults() -> None:
    teacher = TeacherSettings.model_validate({"model": "t", "hint": {"temperature": 0.5}, "compression": {"temperature": 0.5}})
    assert teacher.hint.max_new_tokens == 512 and teacher.compression.max_new_tokens == 512


def test_paths_of_further_teachers_and_reformulations_lie_beside_the_recipe(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    (tmp_path / "own.py").write_text("", encoding="utf-8")
    (tmp_path / "recipe.yaml").write_text(
        "student: {model: one}\nteacher: {model: one}\nmore_teachers: [{model: two}]\ndata: {train: q.jsonl}\n"
        "method: {name: zppo, reformulations: ['own.py:Mine']}\n",
        encoding="utf-8",
    )
    settings = load_recipe(tmp_path / "recipe.yaml")
    assert settings.more_teachers[0].model == str(tmp_path / "two")
    assert settings.method.reformulations == (f"{tmp_path / 'own.py'}:Mine",)


def test_the_divergence_of_masked_and_broken_logits() -> None:
    student = torch.tensor([[1.0, 2.0, -math.inf]], requires_grad=True)
    loss = jensen_shannon(student, torch.tensor([[1.0, 0.0, -math.inf]])).sum()
    loss.backward()
    assert student.grad is not None and torch.isfinite(student.grad).all()
    apart = jensen_shannon(torch.tensor([[0.0, -math.inf]]), torch.tensor([[-math.inf, 0.0]]))
    assert float(apart) == pytest.approx(math.log(2))
    assert jensen_shannon(torch.full((1, 2), math.nan), torch.zeros(1, 2)).isnan().all()
