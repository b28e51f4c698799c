"""What saves memory: smaller batches where it runs out, gradient checkpointing, the 8-bit optimizer, bf16 autocast."""

from __future__ import annotations

import copy
import importlib.machinery
import importlib.util
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from test_engine import engine, flat, requests, tiny
from test_update import Recorder, load, make_groups, make_policy_gradient, update
from zppo.cli import main
from zppo.config.settings import LoraSettings, TrainSettings
from zppo.core.advantages import step_advantages
from zppo.distributed.parallel import keep_logits_small
from zppo.engines import output_head
from zppo.engines.base import Sampling, in_order
from zppo.engines.logprobs import ForwardPass, completion_logprobs
from zppo.engines.out_of_memory import MemoryElsewhereError, TokenBudget, out_of_memory
from zppo.engines.output_head import head_form
from zppo.engines.transformers import Piece, TransformersEngine, halves
from zppo.errors import MemoryLimitError, ModelError, SettingsError
from zppo.models import optimizer as optimizer_module
from zppo.models.lora import add_adapters
from zppo.models.optimizer import make_optimizer
from zppo.models.student_model import load_model, recompute_layers
from zppo.runs import checkpoint
from zppo.train.learner import UpdateStopped
from zppo.train.policy_gradient import make_budget

pytestmark = pytest.mark.slow

TIME_FIELDS = ("seconds", "tokens_per_second", "teacher_wait_seconds", "system")
FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.fixture(autouse=True)
def fresh_accelerate() -> None:
    AcceleratorState._reset_state(True)


def records(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{k: v for k, v in line.items() if k not in TIME_FIELDS} for line in lines]


# --- how it is said -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (FULL, True),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"), False),
        (MemoryLimitError("out of memory for good"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_counts_as_out_of_memory(error: Exception, full: bool) -> None:
    assert out_of_memory(error) == full


# --- sampling -------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6).filter(lambda sizes: sum(sizes) > 1))
def test_halves_keep_every_rollout_in_its_order(sizes: list[int]) -> None:
    batch = [Piece(i, 2, 2 + size) for i, size in enumerate(sizes)]
    first, second = halves(batch)
    rollouts = [[(p.request, i) for p in part for i in range(p.start, p.stop)] for part in (batch, first, second)]
    assert rollouts[1] + rollouts[2] == rollouts[0]
    assert len(rollouts[1]) == sum(sizes) // 2


@contextmanager
def small_device(model: PreTrainedModel, tokens: int) -> Iterator[list[int]]:
    """The model as on a device whose cache holds so many tokens at once; gives the sizes that were asked of it."""
    asked, forward = [], model.forward

    def limited(*args: Any, **kwargs: Any) -> Any:
        rows, new = kwargs["input_ids"].shape
        asked.append(rows * (kwargs["past_key_values"].get_seq_length() + new))
        if asked[-1] > tokens:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return forward(*args, **kwargs)

    model.forward = limited  # type: ignore[method-assign]
    yield asked
    model.forward = forward  # type: ignore[method-assign]


@pytest.mark.parametrize("kind", ["qwen3", "qwen3.5"])
def test_sampling_halves_its_rows_and_changes_nothing(kind: str) -> None:
    """20 rollouts of 70 + 12 tokens at most run out of memory, 10 do, 5 do not."""
    model, asked, how = tiny(kind), requests([3, 40, 17, 1, 70]), Sampling(max_new_tokens=12)
    whole = engine(model).sample(asked, how)
    said: list[str] = []
    sampler = engine(model, say=said.append)
    with small_device(model, 450) as sizes:
        given: list[tuple[int, int]] = []
        ended = list(sampler.stream(asked, how))
        given += [(request, key) for request, key, _ in ended]
        done = in_order(asked, ended)
        assert sorted(given) == [(i, j) for i in range(5) for j in range(4)], "what had ended is not decoded again"
        assert sum(size > 450 for size in sizes) == 2
        assert flat(done) == flat(whole)
        for ours, theirs in zip(sum(done, []), sum(whole, []), strict=True):
            torch.testing.assert_close(ours.logprobs, theirs.logprobs, rtol=0, atol=1e-4)
            assert ours.truncated == theirs.truncated
        (message,) = said
        assert "memory ran out with 20 rollouts at once; 5 fit, and no more than 410 cached tokens" in message
        sizes.clear()
        assert flat(sampler.sample(asked[::-1], how)) == flat(whole[::-1])
        assert max(sizes) <= 450 and len(said) == 1  # remembered, and said once


def test_a_single_rollout_that_does_not_fit_is_an_error_and_other_errors_are_not_caught() -> None:
    model, how = tiny(), Sampling(max_new_tokens=4)
    with small_device(model, 0), pytest.raises(MemoryLimitError, match="does not hold one rollout of 44 tokens"):
        engine(model).sample(requests([3, 40]), how)
    model.forward = lambda **_: (_ for _ in ()).throw(RuntimeError("shapes"))  # type: ignore[method-assign, assignment]
    with pytest.raises(RuntimeError, match="shapes"):
        engine(model).sample(requests([3]), how)


# --- the update -----------------------------------------------------------------------------------------------------

REWARDS = [[1.0, 0.0, 0.0, 1.0], [0.0] * 4, [1.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 0.0]]


class Full(torch.autograd.Function):
    """The identity, whose backward runs out of memory: by then the layers above it have added to their gradients."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def runs_out(model: PreTrainedModel, tokens: int, where: str) -> list[int]:
    """The model's first layer fails on micro-batches of more padded tokens; gives the sizes that were tried."""
    tried: list[int] = []

    def hook(_: Any, args: tuple[Any, ...]) -> Any:
        tried.append(args[0].shape[0] * args[0].shape[1])
        if tried[-1] > tokens:
            if where == "forward":
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return (Full.apply(args[0]), *args[1:])  # type: ignore[no-untyped-call]
        return None

    model.model.layers[0].register_forward_pre_hook(hook)
    return tried


@pytest.mark.parametrize("sampler", [True, False])
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_an_update_that_runs_out_of_memory_halves_its_micro_batches_and_changes_no_gradient(
    tiny_qwen3_dir: Path, where: str, sampler: bool
) -> None:
    model = load(tiny_qwen3_dir)
    groups = make_groups(model, REWARDS)
    advantages = step_advantages(groups, "nontrivial")
    plain = make_policy_gradient(copy.deepcopy(model), minibatches=2, sampler=sampler)
    expected = Recorder(plain)
    wanted = update(plain, groups, advantages, step=1)
    tried = runs_out(model, 40, where)
    learner = make_policy_gradient(model, minibatches=2, sampler=sampler, tokens_per_microbatch="auto")
    said: list[str] = []
    learner.budget.say = said.append
    recorder = Recorder(learner)
    metrics = update(learner, groups, advantages, step=1)
    assert max(tried) > 40 and tried[-1] <= 40
    assert len(recorder.gradients) == len(expected.gradients) == 2
    for ours, theirs in zip(recorder.gradients, expected.gradients, strict=True):
        biggest = max(float(g.abs().max()) for g in theirs)
        assert max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True)) <= 1e-5 * biggest
    changed = {"tokens_per_microbatch", "train_tokens_computed"}
    for name in wanted.keys() - changed:
        assert metrics[name] == pytest.approx(wanted[name], rel=1e-4, abs=1e-6), name
    assert metrics["tokens_per_microbatch"] == learner.budget.tokens <= 40
    assert said and "micro-batches hold" in said[0]
    other = TokenBudget(16_384, adaptive=True)
    other.load_state_dict(json.loads(json.dumps(learner.budget.state_dict())))
    assert other.tokens == learner.budget.tokens


def test_an_attempt_that_fails_in_its_middle_leaves_nothing(tiny_qwen3_dir: Path) -> None:
    """Two micro-batches succeed and the third one does not, once: gradients and counts are those of a run without it."""
    model = load(tiny_qwen3_dir)
    groups = make_groups(model, REWARDS)
    advantages = step_advantages(groups, "nontrivial")
    results = []
    for fails in (False, True):
        learner = make_policy_gradient(copy.deepcopy(model), minibatches=1, tokens_per_microbatch="auto")
        learner.budget.tokens = 60
        calls: list[int] = []

        def hook(*_: Any, calls: list[int] = calls, fails: bool = fails) -> None:
            calls.append(0)
            if fails and len(calls) == 3:
                raise torch.OutOfMemoryError("CUDA out of memory.")

        cast(Any, learner.optimizer.model).model.layers[0].register_forward_pre_hook(hook)
        recorder = Recorder(learner)
        results.append((recorder.gradients, update(learner, groups, advantages, step=1), learner.budget.tokens))
    (expected, wanted, _), (gradients, metrics, tokens) = results
    assert tokens <= 30 and metrics["train_tokens_needed"] == wanted["train_tokens_needed"]
    assert metrics["clip_low_share"] == wanted["clip_low_share"]
    assert metrics["loss"] == pytest.approx(wanted["loss"], abs=1e-6)
    biggest = max(float(g.abs().max()) for g in expected[0])
    assert max(float((a - b).abs().max()) for a, b in zip(gradients[0], expected[0], strict=True)) <= 1e-5 * biggest


def test_a_failed_backward_leaves_gradients_behind_that_an_attempt_must_not_keep(tiny_qwen3_dir: Path) -> None:
    """The stand-in above is one: without starting from 0 the test before this one would have to fail."""
    model = load(tiny_qwen3_dir)
    runs_out(model, 0, "backward")
    with pytest.raises(torch.OutOfMemoryError):
        completion_logprobs(model, [((5, 6, 7), (8, 9))])[0].sum().backward()
    assert model.model.layers[1].mlp.up_proj.weight.grad.abs().max() > 0


def test_a_fixed_budget_and_a_single_row_are_errors_that_say_the_mend(tiny_qwen3_dir: Path) -> None:
    model = load(tiny_qwen3_dir)
    groups = make_groups(model, REWARDS)
    advantages = step_advantages(groups, "nontrivial")
    runs_out(model, 0, "forward")
    with pytest.raises(UpdateStopped) as stopped:
        update(make_policy_gradient(model), groups, advantages, step=1)
    assert "set train.tokens_per_microbatch to auto or to less than 16,384" in str(stopped.value.cause)
    with pytest.raises(UpdateStopped) as stopped:
        update(make_policy_gradient(model, tokens_per_microbatch="auto"), groups, advantages, step=1)
    assert re.search("with a single row of .* lower rollout.max_new_tokens", str(stopped.value.cause))
    assert TokenBudget(100).state_dict() == {}


def test_a_cpu_puts_no_long_packs_into_one_pass(tiny_qwen3_dir: Path) -> None:
    """Rows that share nothing are put together as before, and so are packs on a GPU."""
    train, packs = make_policy_gradient(load(tiny_qwen3_dir)).budget, [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert [m.packs for m in train.split([500, 500, 300, 300], packs)] == [[[0, 1]], [[2, 3]], [[4, 5], [6, 7]]]
    assert [len(m.packs) for m in train.split([500, 500, 500])] == [3]
    assert [len(m.packs) for m in make_budget(TrainSettings(), gpu=True).split([500, 500, 500, 500], packs)] == [4]
    assert [m.width for m in train.split([2000], [[0, 1]])] == [2000]  # alone, whatever it has


def test_where_one_budget_is_shared_the_process_that_failed_decides() -> None:
    """What the others have tried says nothing of what would fit; a row that does not fit ends all of them."""
    failed, fine = (TokenBudget(100, adaptive=True) for _ in range(2))
    told: list[Any] = []

    def of_all(own: Any) -> list[Any]:
        told.append(own)
        return told[:2]

    elsewhere = MemoryElsewhereError("another process of this run is out of memory")
    failed.shrink(FULL, failed.split([30, 30, 30]), 30, of_all)
    fine.shrink(elsewhere, fine.split([5]), 5, of_all)
    assert failed.tokens == fine.tokens == 45 and told[1] is None
    told.clear()
    with pytest.raises(MemoryLimitError, match="a single row of 30 tokens"):
        failed.shrink(FULL, failed.split([30]), 30, of_all)
    with pytest.raises(MemoryLimitError, match="a single row of 30 tokens"):
        fine.shrink(elsewhere, fine.split([5, 5]), 5, of_all)


def test_other_errors_pass() -> None:
    budget = TokenBudget(100, adaptive=True)
    with pytest.raises(RuntimeError, match="shapes"):
        budget.shrink(RuntimeError("shapes"), budget.split([3]), 3)
    assert budget.tokens == 100


LIMIT = 345  # padded tokens of a pass, between one row's and those of the run's larger micro-batches


@pytest.mark.slow
@pytest.mark.parametrize("method", ["zppo", "on-distill"])
def test_a_run_finds_its_budget_once_and_keeps_it_in_its_checkpoints(
    recipe: Path, tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tried: list[int] = []

    def limited(inner: Callable[..., Any]) -> Callable[..., Any]:
        def forward(of: ForwardPass, rows: Any, *more: Any) -> Any:
            packs = more[0] if inner.__name__ == "shared_logprobs" else [[i] for i in range(len(rows))]
            width = max(len(rows[pack[0]].prompt_ids) + sum(len(rows[i].completion_ids) for i in pack) for pack in packs)
            tried.append(len(packs) * width)
            if tried[-1] > LIMIT:
                raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return inner(of, rows, *more)

        return forward

    for name in ("logprobs", "shared_logprobs", "divergence"):
        monkeypatch.setattr(ForwardPass, name, limited(getattr(ForwardPass, name)))
    run = tmp_path / "run"
    command = [f"--output={run}", f"--method={method}", "--train.tokens_per_microbatch=auto", "--data.eval=null"]
    assert main(["train", str(recipe), *command, "--train.steps=3", "--train.minibatches=2"]) == 0
    budgets = [r["tokens_per_microbatch"] for r in records(run)]
    assert budgets[0] >= budgets[1] and 16_384 > budgets[1] >= budgets[2] >= 100 and max(tried) > LIMIT
    assert "memory ran out in the update" in " ".join(capsys.readouterr().out.split())
    before = records(run)
    shutil.rmtree(run / "final")
    shutil.rmtree(run / "checkpoints" / "step-000003")
    tried.clear()
    AcceleratorState._reset_state(True)
    assert main(["resume", str(run)]) == 0
    assert records(run) == before and max(tried) <= LIMIT
    assert "memory ran out" not in capsys.readouterr().out


# --- gradient checkpointing -----------------------------------------------------------------------------------------


def gradients(model: PreTrainedModel) -> tuple[list[torch.Tensor], int]:
    """Gradients of one loss, and the bytes that autograd kept for them."""
    kept = 0

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        kept += tensor.numel() * tensor.element_size()
        return tensor

    rows = [(tuple(range(5, 15)), tuple(range(20, 50))), (tuple(range(7, 10)), tuple(range(30, 52)))]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logprobs, mask = completion_logprobs(model, rows)
    (logprobs * mask).square().sum().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None], kept


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("kind", ["qwen3", "qwen3.5", "llama"])
def test_layers_are_computed_again_and_gradients_are_the_same(kind: str, lora: bool) -> None:
    model = tiny(kind)
    if lora:
        adapters = add_adapters(model, LoraSettings(), base="base")
        torch.manual_seed(0)
        for name, weight in adapters.handle.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.1)
    plain, kept = gradients(model)
    model.zero_grad()
    layers = len(model.model.layers)
    assert recompute_layers(model) == layers
    calls: list[int] = []
    for index, layer in enumerate(model.model.layers):
        layer.input_layernorm.register_forward_hook(lambda *_, index=index: calls.append(index))
    again, kept_less = gradients(model)
    assert calls == [*range(layers), *reversed(range(layers))]  # once forward, once more in the backward pass
    assert kept_less < 0.6 * kept
    biggest = max(float(g.abs().max()) for g in plain)
    assert max(float((a - b).abs().max()) for a, b in zip(plain, again, strict=True)) <= 1e-6 * biggest
    assert not any(module.training for module in model.modules())
    calls.clear()
    done = engine(model).sample(requests([5]), Sampling(max_new_tokens=3))
    assert len(calls) == layers * max(len(c.ids) for c in done[0])  # nothing is computed twice while sampling


def test_the_library_s_own_switch_does_nothing_in_evaluation_mode() -> None:
    """Why it is not used. If this fails, the library has changed, and ours may go."""
    model, calls = tiny(), []
    head_form(model)  # by a pass that does not count
    model.activation_checkpointing_enable()
    model.model.layers[0].input_layernorm.register_forward_hook(lambda *_: calls.append(0))
    gradients(model)
    assert len(calls) == 1


def test_a_model_without_such_layers_is_refused() -> None:
    class Bare(torch.nn.Module):
        pass

    with pytest.raises(ModelError, match="Bare has no layers that can be computed again"):
        recompute_layers(Bare())  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_run_with_gradient_checkpointing_is_the_same_run(recipe: Path, tmp_path: Path) -> None:
    runs: list[tuple[Any, Any]] = []
    for on in ("false", "true"):
        AcceleratorState._reset_state(True)
        run = tmp_path / on
        switch = f"--train.gradient_checkpointing={on}"
        assert main(["train", str(recipe), f"--output={run}", switch, "--train.steps=1", "--data.eval=null"]) == 0
        runs.append((records(run), load_file(run / "final" / "model.safetensors")))
    (one, ours), (other, theirs) = runs
    assert one == other and all(torch.equal(ours[name], theirs[name]) for name in ours)


# --- the 8-bit optimizer --------------------------------------------------------------------------------------------


class AdamW8bit(torch.optim.AdamW):
    """Stands for bitsandbytes' optimizer: keeps its arguments, and its state in a nested mapping with whole numbers as that one does."""

    made: list[dict[str, Any]] = []

    def __init__(self, parameters: Any, **given: Any) -> None:
        type(self).made.append(given)
        super().__init__(parameters, **given)

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        state["state"] = {k: {"step": int(v["step"]), "quantised": v} for k, v in state["state"].items()}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        inner = {k: v["quantised"] for k, v in state["state"].items()}
        super().load_state_dict({**state, "state": inner})


def install(monkeypatch: pytest.MonkeyPatch, adamw: Any) -> None:
    package, optim = ModuleType("bitsandbytes"), ModuleType("bitsandbytes.optim")
    package.optim, optim.AdamW8bit = optim, adamw  # type: ignore[attr-defined]
    for made in (package, optim):
        made.__spec__ = importlib.machinery.ModuleSpec(made.__name__, None)
        monkeypatch.setitem(sys.modules, made.__name__, made)


# The real package is no dependency of the tests; where it is there, it is tested like the stand-in.
PACKAGES = ["stand-in", *(["bitsandbytes"] if importlib.util.find_spec("bitsandbytes") else [])]


@pytest.mark.slow
def test_a_run_with_the_8_bit_optimizer_resumes_bit_for_bit(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, AdamW8bit)
    AdamW8bit.made.clear()
    run = tmp_path / "run"
    command = [str(recipe), f"--output={run}", "--train.optimizer=adamw-8bit", "--data.eval=null"]
    assert main(["train", *command, "--train.steps=2", "--train.checkpoint_every=1"]) == 0
    wanted = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
    assert AdamW8bit.made == [wanted, wanted]  # the probe's and the run's
    state = torch.load(run / "checkpoints" / "step-000002" / "optimizer.pt", weights_only=True)
    assert state["state"][0]["quantised"]["exp_avg"].abs().max() > 0
    before, weights = records(run), load_file(run / "final" / "model.safetensors")
    assert all(r["optimizer_steps"] == 4 for r in before)
    shutil.rmtree(run / "final")
    shutil.rmtree(run / "checkpoints" / "step-000002")
    AcceleratorState._reset_state(True)
    assert main(["resume", str(run)]) == 0
    again = load_file(run / "final" / "model.safetensors")
    assert records(run) == before and all(torch.equal(weights[name], again[name]) for name in weights)


@pytest.mark.parametrize("package", PACKAGES)
def test_its_state_survives_a_checkpoint(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the project's own functions, which load no pickled code: the next update is the same, bit for bit."""
    if package == "stand-in":
        install(monkeypatch, AdamW8bit)
    model, other = (tiny(hidden_size=128) for _ in range(2))
    train = TrainSettings(optimizer="adamw-8bit", learning_rate=1e-2)
    accelerator = Accelerator(cpu=True)
    ours, theirs = (accelerator.prepare(make_optimizer(train, m.parameters(), torch.device("cpu"))) for m in (model, other))
    for step in range(3):
        torch.manual_seed(step)
        for weight in model.parameters():
            weight.grad = torch.randn_like(weight)
        ours.step()
    folder = checkpoint.save(tmp_path, 3, model, ours, {}, keep=1)
    other.load_state_dict(load_model(checkpoint.weights_folder(folder), dtype=torch.float32).state_dict())
    checkpoint.load_optimizer(folder, theirs)
    for one, twin in zip(model.parameters(), other.parameters(), strict=True):
        one.grad = torch.randn_like(one)
        twin.grad = one.grad.clone()
    ours.step()
    theirs.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    if package == "bitsandbytes":
        saved = torch.load(folder / "optimizer.pt", weights_only=True)["state"].values()
        kept = [v for state in saved for inner in state.values() if isinstance(inner, dict) for v in inner.values()]
        assert {torch.uint8, torch.float32} == {v.dtype for v in kept}


@pytest.mark.parametrize("package", PACKAGES)
def test_its_updates_are_close_to_adamw_s(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if package == "stand-in":
        install(monkeypatch, AdamW8bit)
    torch.manual_seed(0)
    start = torch.randn(128, 64)
    frozen = torch.nn.Parameter(torch.zeros(3), requires_grad=False)
    ends = []
    for kind in ("adamw", "adamw-8bit"):
        weight = torch.nn.Parameter(start.clone())
        train = TrainSettings(optimizer=kind, learning_rate=1e-2)
        made = make_optimizer(train, [weight, frozen], torch.device("cpu"))
        assert [len(group["params"]) for group in made.param_groups] == [1]
        generator = torch.Generator().manual_seed(1)
        for _ in range(5):
            weight.grad = torch.randn(weight.shape, generator=generator)
            made.step()
        ends.append(weight.detach())
    assert (ends[0] - start).abs().mean() > 1e-2
    assert (ends[0] - ends[1]).abs().mean() <= 1e-3


def test_without_the_package_or_its_kernels_the_mend_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    class NoKernels(torch.optim.AdamW):
        def step(self, closure: Any = None) -> Any:
            raise NotImplementedError("no kernel for cpu")

    train, weights = TrainSettings(optimizer="adamw-8bit"), [torch.nn.Parameter(torch.zeros(3))]
    install(monkeypatch, NoKernels)
    with pytest.raises(SettingsError, match="does not work on cpu: NotImplementedError: no kernel for cpu.*optimizer=adamw"):
        make_optimizer(train, weights, torch.device("cpu"))
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(SettingsError, match=r"pip install bitsandbytes"):
        make_optimizer(train, weights, torch.device("cpu"))
    assert optimizer_module._PROBE_SIZE > 4096  # where the package starts to use 8 bits


# --- bf16 -----------------------------------------------------------------------------------------------------------


class Casts(TorchDispatchMode):
    """Counts how often a weight is turned into bf16."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._to_copy.default and isinstance(args[0], torch.nn.Parameter):
            self.count += kwargs.get("dtype") == torch.bfloat16
        return func(*args, **(kwargs or {}))


def prepared(precision: str = "bf16") -> tuple[PreTrainedModel, Accelerator]:
    model, accelerator = tiny(), Accelerator(cpu=True, mixed_precision=precision)
    return accelerator.prepare(model), accelerator


def test_sampling_under_autocast_turns_weights_into_bf16_once_for_all_tokens() -> None:
    """accelerate puts its autocast into the model's own forward: by itself that turns every weight anew at every token."""
    counts = []
    for dtype in (None, torch.bfloat16):
        AcceleratorState._reset_state(True)
        model, _ = prepared()
        seen = set[torch.dtype]()
        model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda _, __, out, seen=seen: seen.add(out.dtype))
        with Casts() as casts:
            done = engine(model, autocast_dtype=dtype).sample(requests([5]), Sampling(max_new_tokens=6))
        assert seen == {torch.bfloat16} and {weight.dtype for weight in model.parameters()} == {torch.float32}
        counts.append((casts.count, flat(done)))
    linear = sum(isinstance(module, torch.nn.Linear) for module in tiny().modules())
    (each, one), (once, other) = counts
    steps = max(map(len, one))
    assert once == linear and each == linear * steps > once and one == other


def test_logits_stay_bf16_and_the_gradients_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output_head, "head_form", lambda _: None)  # of a model whose logits are computed whole
    results = []
    for small in (False, True):
        AcceleratorState._reset_state(True)
        model, accelerator = prepared()
        if small:
            keep_logits_small(model, accelerator)
        logits = model(torch.arange(5, 30)[None]).logits
        assert logits.dtype == (torch.bfloat16 if small else torch.float32)
        results.append(gradients(model))
    (whole, kept), (ours, kept_less) = results
    assert all(torch.equal(a, b) for a, b in zip(whole, ours, strict=True)) and kept_less < kept
    AcceleratorState._reset_state(True)
    model, accelerator = prepared("no")
    before = model.forward
    keep_logits_small(model, accelerator)
    assert model.forward == before


@pytest.mark.slow
def test_a_run_s_student_samples_in_the_run_s_precision(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[torch.dtype | None] = []
    inner = TransformersEngine.sample

    def sample(self: TransformersEngine, *args: Any) -> Any:
        made.append(self.autocast_dtype)
        return inner(self, *args)

    monkeypatch.setattr(TransformersEngine, "sample", sample)
    command = ["train", str(recipe), "--method=grpo", "--data.eval=null", "--train.steps=1"]
    assert main([*command, f"--output={tmp_path / 'bf16'}", "--train.precision=bf16"]) == 0
    assert set(made) == {torch.bfloat16}
    made.clear()
    AcceleratorState._reset_state(True)
    assert main([*command, f"--output={tmp_path / 'fp32'}"]) == 0
    assert set(made) == {None}
