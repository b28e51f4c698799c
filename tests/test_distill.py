"""Distillation: the divergence against TRL's and the plain formula; rows aligned as the model reads them."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, PreTrainedModel

from distributed_worker import distil, load
from test_update import make_groups, make_policy_gradient
from zppo.core.loss import jensen_shannon
from zppo.core.types import Group, Row
from zppo.engines.logprobs import ForwardPass


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
        together = ForwardPass(model).late(rows).part(slice(0, 7))
        alone = [model(torch.tensor([[*row.prompt_ids, *row.completion_ids]])).logits[0, len(row.prompt_ids) - 1 : -1] for row in rows]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-4)


def literal_divergence(model: PreTrainedModel, teacher: PreTrainedModel, prompt: tuple[int, ...], completion: torch.Tensor) -> torch.Tensor:
    """(T,) of one completion, from the definition."""
    ids = torch.cat([torch.tensor(prompt), completion])[None]
    p, q = (m(ids).logits[0, len(prompt) - 1 : -1].softmax(-1) for m in (model, teacher))
    m = (p + q) / 2
    return ((p * (p / m).log()).sum(-1) + (q * (q / m).log()).sum(-1)) / 2


def literal_loss(model: PreTrainedModel, teacher: PreTrainedModel, groups: list[Group]) -> torch.Tensor:
    """Alg. 2, l. 3-13, one response after the other."""
    of_questions = []
    for group in groups:
        correct = [r for r in group.rollouts if r.correct]
        if not correct:
            continue
        of_responses = [literal_divergence(model, teacher, group.prompt.ids, r.ids).mean() for r in correct]
        of_questions.append(sum(of_responses, torch.tensor(0.0)) / len(of_responses))
    return sum(of_questions, torch.tensor(0.0)) / len(of_questions)


@pytest.mark.parametrize("budget", [1, 40, 10**6])
@pytest.mark.parametrize("off_policy", [True, False])
def test_a_step_is_its_definition_in_any_micro_batches(off_policy: bool, budget: int, tiny_qwen3_dir: Path) -> None:
    """Off-policy a question weighs the same however often and at what length the teacher solves it; on-policy every token does."""
    model, teacher = load(str(tiny_qwen3_dir)), load(str(tiny_qwen3_dir))
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())))
    groups = make_groups(model, [[1, 1, 1, 1], [0, 0, 0, 0], [0, 1, 0, 0], [1, 0, 0, 1]], seed=5)
    if off_policy:
        expected = literal_loss(model, teacher, groups)
    else:
        expected = torch.cat([literal_divergence(model, teacher, g.prompt.ids, r.ids) for g in groups for r in g.rollouts]).mean()
    wanted = dict(zip(dict(model.named_parameters()), torch.autograd.grad(expected, list(model.parameters())), strict=True))

    learner = make_policy_gradient(model)
    given: dict[str, torch.Tensor] = {}
    inner = learner.optimizer.step

    def step(loss: float) -> tuple[float, float, bool]:
        given.update({name: p.grad.clone() for name, p in learner.optimizer.model.named_parameters() if p.grad is not None})
        return inner(loss)

    learner.optimizer.step = step  # type: ignore[method-assign]
    counts = distil(learner, teacher, groups, off_policy=off_policy, budget=budget)
    assert counts["loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert counts["distilled_completions"] == (7 if off_policy else 16)
    assert given.keys() == wanted.keys() and any(g.abs().max() > 1e-4 for g in wanted.values())
    for name, gradient in wanted.items():
        torch.testing.assert_close(given[name], gradient, rtol=1e-3, atol=1e-6)


def test_a_question_that_is_solved_often_weighs_no_more(tiny_qwen3_dir: Path) -> None:
    """One question with four copies of a response, one with a single one: half of the loss each, not four fifths."""
    model, teacher = load(str(tiny_qwen3_dir)), load(str(tiny_qwen3_dir))
    with torch.no_grad():
        teacher.lm_head.weight.add_(torch.randn(teacher.lm_head.weight.shape, generator=torch.Generator().manual_seed(1)))
    often, once = make_groups(model, [[1], [1]], seed=2)
    with torch.no_grad():
        parts = [float(literal_divergence(model, teacher, g.prompt.ids, g.rollouts[0].ids).mean()) for g in (often, once)]
    assert abs(parts[0] - parts[1]) > 1e-3
    four = Group(often.prompt, often.rollouts * 4)
    loss = distil(make_policy_gradient(model), teacher, [four, once], off_policy=True)["loss"]
    assert loss == pytest.approx(sum(parts) / 2, rel=1e-5)
