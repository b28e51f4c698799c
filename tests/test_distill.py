"""Distillation: the divergence against TRL's and the plain formula; rows aligned as the model reads them."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from zppo.core.loss import jensen_shannon
from zppo.engines.logprobs import Row
from zppo.train.distillation import completion_logits


@given(seed=st.integers(0, 10**6), scale=st.floats(0.1, 20), tokens=st.integers(1, 6))
def test_the_divergence_is_trl_s(seed: int, scale: float, tokens: int) -> None:
    """TRL's generalised divergence at beta 0.5 and temperature 1, value and gradient."""
    from trl.experimental.gkd import GKDTrainer

    rng = torch.Generator().manual_seed(seed)
    student = (scale * torch.randn(1, tokens, 17, generator=rng)).requires_grad_()
    teacher = scale * torch.randn(1, tokens, 17, generator=rng)
    ours = jensen_shannon(student, teacher).mean()
    (our_gradient,) = torch.autograd.grad(ours, student)
    theirs = GKDTrainer.generalized_jsd_loss(student, teacher, labels=torch.zeros(1, tokens, dtype=torch.int64), beta=0.5, temperature=1.0)
    (their_gradient,) = torch.autograd.grad(theirs, student)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(our_gradient, their_gradient, rtol=1e-3, atol=1e-6)


def test_the_divergence_lies_between_zero_and_log_two() -> None:
    same = torch.randn(5, 9)
    assert jensen_shannon(same, same).abs().max() < 1e-6
    apart = torch.tensor([[50.0, -50.0]]), torch.tensor([[-50.0, 50.0]])
    assert float(jensen_shannon(*apart)) == pytest.approx(math.log(2), abs=1e-5)


def test_ids_that_both_mask_contribute_nothing() -> None:
    student, teacher = torch.randn(3, 4), torch.randn(3, 4)
    masked = [torch.cat([x, torch.full((3, 2), -torch.inf)], -1) for x in (student, teacher)]
    torch.testing.assert_close(jensen_shannon(*masked), jensen_shannon(student, teacher))


def test_completion_logits_are_those_of_each_row_alone(tiny_qwen3_dir: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_qwen3_dir, dtype=torch.float32).eval()
    rows = [Row((5, 6, 7), (8, 9)), Row((10,), (11, 12, 13, 14)), Row((5, 6, 7, 8, 9), (20,))]
    with torch.no_grad():
        together = completion_logits(model, rows, pad_id=0)
        alone = [model(torch.tensor([[*row.prompt_ids, *row.completion_ids]])).logits[0, len(row.prompt_ids) - 1 : -1] for row in rows]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-4)
