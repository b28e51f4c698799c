"""The clipped surrogate against a plain formula and against TRL's own loss on the same tensors (method.md section 6)."""

from __future__ import annotations

import math
from collections import defaultdict
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zppo.core.loss import Surrogate, clipped_surrogate

LOW, HIGH, DUAL = 0.20, 0.28, 10.0
ROWS, LENGTH = 12, 9


class Batch(NamedTuple):
    """(B, T) log-probs with gradient, old ones and mask, and (B,) advantages, float64."""

    logprobs: torch.Tensor
    old: torch.Tensor
    mask: torch.Tensor
    advantages: torch.Tensor

    def rows(self, index: torch.Tensor) -> Batch:
        return Batch(*(part[index] for part in self))


def random_batch(seed: int, rows: int = ROWS, length: int = LENGTH) -> Batch:
    """Ratios inside and beyond every bound (up to e^3.5, past the dual clip), ragged masks, and some rows with A = 0."""
    g = torch.Generator().manual_seed(seed)
    old = -3 * torch.rand(rows, length, generator=g, dtype=torch.float64) - 3.5
    logprobs = old + 1.5 * torch.randn(rows, length, generator=g, dtype=torch.float64).clamp(-2, 2.3)
    lengths = torch.randint(1, length + 1, (rows, 1), generator=g)
    advantages = torch.randn(rows, generator=g, dtype=torch.float64)
    advantages[:: max(1, rows // 3)] = 0.0
    return Batch(logprobs.requires_grad_(), old, (torch.arange(length) < lengths).double(), advantages)


def token_mean(batch: Batch, tokens: torch.Tensor | None = None) -> torch.Tensor:
    """Our loss: sum over the completion tokens, divided by their number in the minibatch."""
    loss = clipped_surrogate(batch.logprobs, batch.old, batch.advantages).loss
    return (loss * batch.mask).sum() / (batch.mask.sum() if tokens is None else tokens)


def plain_token(new: float, old: float, a: float, low: float = LOW, high: float = HIGH, dual: float | None = DUAL) -> tuple[float, float]:
    """One token as the papers have it: (loss, its derivative with respect to the new log-prob)."""
    ratio = math.exp(new - old)
    free, clipped = ratio * a, min(max(ratio, 1 - low), 1 + high) * a
    objective, slope = (free, ratio * a) if free <= clipped else (clipped, 0.0)
    if dual is not None and a < 0 and objective < dual * a:
        objective, slope = dual * a, 0.0
    return -objective, -slope


tokens = st.tuples(st.floats(-6, 6), st.floats(-6, 0), st.sampled_from([-2.0, -0.5, 0.0, 0.3, 1.7]))


@given(st.lists(tokens, min_size=1, max_size=8), st.floats(0, 0.9), st.floats(0, 2), st.sampled_from([None, 1.01, 1.1, 3.0, 10.0]))
def test_every_token_is_the_plain_formula(made: list[tuple[float, float, float]], low: float, high: float, dual: float | None) -> None:
    """Value and gradient, for a dual clip below 1 + clip_high as well."""
    old = torch.tensor([before for _, before, _ in made], dtype=torch.float64)
    new = (old + torch.tensor([move for move, _, _ in made], dtype=torch.float64)).requires_grad_()
    advantages = torch.tensor([a for *_, a in made], dtype=torch.float64)
    found = clipped_surrogate(
        new.unsqueeze(1), old.unsqueeze(1), advantages, clip_low=low, clip_high=high, dual_clip=dual
    )  # every token a rollout of its own
    found.loss.sum().backward()
    assert new.grad is not None
    assert (found.clipped_low.int() + found.clipped_high.int() + found.clipped_dual.int()).max() <= 1
    for i, (a, now, before) in enumerate(zip([a for *_, a in made], new.tolist(), old.tolist(), strict=True)):
        ratio = math.exp(now - before)
        edges = (1 - low, 1 + high, *([dual] if dual is not None else []))
        if min(abs(ratio - edge) for edge in edges) < 1e-9:
            continue  # on a kink either side's slope is right
        loss, slope = plain_token(now, before, a, low, high, dual)
        assert found.loss[i].item() == pytest.approx(loss, rel=1e-9, abs=1e-12)
        assert float(new.grad[i]) == pytest.approx(slope, rel=1e-9, abs=1e-12)
        active = found.clipped_low[i] | found.clipped_high[i] | found.clipped_dual[i]
        assert bool(active) == (slope == 0 and a != 0)


def test_the_bounds_one_by_one() -> None:
    """Rows: A = 1 and A = -1; columns: ratio 0.5, 1, 2, 20."""
    old = torch.zeros(2, 4)
    found = clipped_surrogate(torch.tensor([[0.5, 1, 2, 20]] * 2).log(), old, torch.tensor([1.0, -1.0]))
    torch.testing.assert_close(found.loss, torch.tensor([[-0.5, -1.0, -1.28, -1.28], [0.8, 1.0, 2.0, 10.0]]))
    assert found.clipped_low.tolist() == [[False] * 4, [True, False, False, False]]
    assert found.clipped_high.tolist() == [[False, False, True, True], [False] * 4]
    assert found.clipped_dual.tolist() == [[False] * 4, [False, False, False, True]]


def test_without_dual_clip() -> None:
    found = clipped_surrogate(torch.tensor([[20.0]]).log(), torch.zeros(1, 1), torch.tensor([-1.0]), dual_clip=None)
    assert float(found.loss) == pytest.approx(20.0) and not found.clipped_dual.any()


def test_on_policy_the_gradient_is_minus_the_advantage() -> None:
    batch = random_batch(0)
    new = batch.old.clone().requires_grad_()
    clipped_surrogate(new, batch.old, batch.advantages).loss.sum().backward()
    torch.testing.assert_close(new.grad, -batch.advantages.unsqueeze(1).expand_as(new))


@pytest.mark.parametrize("distance", [0.0, 5.0, -5.0, 95.0, 1000.0, -1000.0])
@pytest.mark.parametrize("dual", [None, 10.0])
def test_a_zero_advantage_gives_exactly_zero_however_far_the_ratio(distance: float, dual: float | None) -> None:
    """Also where fp32 could not hold the ratio."""
    new = torch.full((2, 3), distance, requires_grad=True)
    found = clipped_surrogate(new, torch.zeros(2, 3), torch.tensor([0.0, -0.0]), dual_clip=dual)
    found.loss.sum().backward()
    assert new.grad is not None
    assert found.loss.count_nonzero() == 0 and new.grad.count_nonzero() == 0
    assert not (found.clipped_low | found.clipped_high | found.clipped_dual).any()


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_a_ratio_beyond_fp32_is_clipped_and_has_no_gradient(advantage: float) -> None:
    new = torch.full((1, 2), 200.0, requires_grad=True)
    found = clipped_surrogate(new, torch.zeros(1, 2), torch.tensor([advantage]))
    found.loss.sum().backward()
    torch.testing.assert_close(found.loss.detach(), torch.full((1, 2), -1.28 if advantage > 0 else 10.0))
    assert new.grad is not None and new.grad.tolist() == [[0.0, 0.0]]


def test_rows_without_advantage_can_be_left_out_while_the_denominator_counts_them() -> None:
    """Through shared weights, the gradient of the rest is that of all rows."""
    batch = random_batch(3)
    features = torch.randn(ROWS, LENGTH, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    kept = batch.advantages.nonzero().flatten()
    assert 0 < len(kept) < ROWS
    gradients = []
    for rows in (torch.arange(ROWS), kept):
        weights = torch.zeros(4, dtype=torch.float64, requires_grad=True)
        part = batch.rows(rows)._replace(logprobs=batch.logprobs.detach()[rows] + features[rows] @ weights)
        token_mean(part, tokens=batch.mask.sum()).backward()
        assert weights.grad is not None
        gradients.append(weights.grad)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-12, atol=1e-15)


def trl_loss(
    batch: Batch, loss_type: str, tokens: float, accumulation: int, per_generation: int
) -> tuple[torch.Tensor, dict[str, list[float]]]:
    """TRL's own loss code on given log-probs: (loss of one micro-batch, the metrics that it logged).

    Args:
        batch: one micro-batch.
        loss_type: TRL's name.
        tokens: completion tokens of the whole generation batch.
        accumulation: micro-batches per optimizer step.
        per_generation: micro-batches per generation batch.
    """
    from trl.trainer.grpo_trainer import GRPOTrainer

    trainer = SimpleNamespace(
        loss_type=loss_type,
        beta=0.0,
        epsilon_low=LOW,
        epsilon_high=HIGH,
        importance_sampling_level="token",
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        aux_loss_enabled=False,
        use_vllm=False,
        vllm_importance_sampling_correction=False,
        _entropy_bonus_enabled=False,
        current_gradient_accumulation_steps=accumulation,
        args=SimpleNamespace(delta=DUAL, steps_per_generation=per_generation, use_bias_correction_kl=False),
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x),
        _metrics={"train": defaultdict(list)},
        _get_per_token_logps_and_entropies=lambda *_, **__: (batch.logprobs, torch.zeros_like(batch.old), None),
    )
    ids = torch.zeros_like(batch.mask, dtype=torch.int64)
    inputs = {
        "prompt_ids": ids[:, :1],
        "prompt_mask": ids[:, :1] + 1,
        "completion_ids": ids,
        "completion_mask": batch.mask,
        "advantages": batch.advantages,
        "old_per_token_logps": batch.old,
        "num_items_in_batch": torch.tensor(tokens, dtype=torch.float64),
    }
    compute: Any = GRPOTrainer._compute_loss  # unbound: the stand-in has all that it reads
    return compute(trainer, None, inputs), trainer._metrics["train"]


def gradient(loss: torch.Tensor, of: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(loss, of, retain_graph=True)[0]


def same(ours: torch.Tensor, theirs: torch.Tensor, leaf: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(gradient(ours, leaf), gradient(theirs, leaf), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("seed", range(4))
def test_equals_trl_dapo_with_one_minibatch(seed: int, micro_batches: int) -> None:
    batch = random_batch(seed)
    parts = [batch.rows(rows) for rows in torch.arange(ROWS).chunk(micro_batches)]
    tokens = float(batch.mask.sum())
    theirs = torch.stack([trl_loss(p, "dapo", tokens, micro_batches, micro_batches)[0] for p in parts]).sum()
    same(token_mean(batch), theirs, batch.logprobs)


@pytest.mark.parametrize("minibatches", [2, 4])
@pytest.mark.parametrize("seed", range(4))
def test_equals_trl_bnpo_with_one_micro_batch_per_minibatch(seed: int, minibatches: int) -> None:
    batch = random_batch(seed)
    for rows in torch.arange(ROWS).chunk(minibatches):
        part = batch.rows(rows)
        theirs, _ = trl_loss(part, "bnpo", float(batch.mask.sum()), 1, minibatches)
        same(token_mean(part), theirs, batch.logprobs)


def test_trl_dapo_beyond_one_minibatch_divides_by_the_generation_batch() -> None:
    """Why `bnpo` is the one to compare with there: its dapo gives every minibatch an equal share of all tokens."""
    batch, minibatches = random_batch(1), 3
    for rows in torch.arange(ROWS).chunk(minibatches):
        part = batch.rows(rows)
        theirs, _ = trl_loss(part, "dapo", float(batch.mask.sum()), 1, minibatches)
        share = part.mask.sum() * minibatches / batch.mask.sum()
        same(token_mean(part) * share, theirs, batch.logprobs)


def test_clip_shares_equal_trl_s() -> None:
    batch = random_batch(2)
    found: Surrogate = clipped_surrogate(batch.logprobs, batch.old, batch.advantages)
    _, logged = trl_loss(batch, "dapo", float(batch.mask.sum()), 1, 1)
    for flag, name in ((found.clipped_low, "clip_ratio/low_mean"), (found.clipped_high, "clip_ratio/high_mean")):
        assert float((flag * batch.mask).sum() / batch.mask.sum()) == pytest.approx(logged[name][0], rel=1e-6)
        assert flag.any()
    assert found.clipped_dual.any(), "the batch must reach the dual clip, or the comparison shows nothing of it"
