"""The benchmarks compare the same work, count right, and run from end to end with tiny sizes."""

from __future__ import annotations

import dataclasses
import json
import math
import multiprocessing
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from benchmarks import (
    common,
    flops,
    gpu_training,
    same_gradients,
    scaling,
    step_vs_trl,
    tables,
    teacher_ahead,
    teacher_tokens,
    training_part,
    workers,
    world,
)
from benchmarks.__main__ import ROWS

from bench_echo import echo

ROOT = Path(__file__).parents[1]


class Beside:
    """A worker in a thread: a process of its own would import everything once more."""

    def __init__(self, serve: workers.Serve, config: Any) -> None:
        self.pipe, other = multiprocessing.Pipe()
        self.thread = threading.Thread(target=workers.obey, args=(serve, other, config))
        self.thread.start()
        # One after the other: the library's `from_pretrained` is not made for threads, and two at once leave models untied for good.
        self.first = self.answer()

    def ready(self) -> Any:
        return self.first

    def ask(self, message: Any) -> Any:
        self.pipe.send(message)
        return self.answer()

    def answer(self) -> Any:
        kind, reply = self.pipe.recv()
        assert kind != "failed", reply
        return reply

    def close(self) -> None:
        self.pipe.close()
        self.thread.join()


@pytest.fixture
def one_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Workers are threads, and what rows set for their process is taken back."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    monkeypatch.setattr(workers, "Worker", Beside)
    for name in ("OMP_NUM_THREADS", "HF_HUB_OFFLINE", "TOKENIZERS_PARALLELISM", "TRANSFORMERS_VERBOSITY", "PYTHONWARNINGS"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    yield
    AcceleratorState._reset_state(True)


def row(module: Any, folder: Path) -> dict[str, Any]:
    """A row's result, by way of its command line."""
    name = module.__name__.rpartition(".")[2]
    assert common.run(name, module.measure, ["--quick", "--threads", "1", "--results", str(folder)]) == 0
    found: dict[str, Any] = json.loads((folder / f"{name.replace('_', '-')}.json").read_text())
    assert found["quick"] and found["threads"] == 1 and found["versions"]["torch"] and found["date"] and found["machine"]
    assert module.table(found).startswith("|")
    return found


@pytest.mark.slow
@pytest.mark.long
def test_both_sides_do_the_same_work_and_every_part_is_measured(tmp_path: Path, one_process: None) -> None:
    pytest.importorskip("trl")
    assert row(same_gradients, tmp_path)["relative_difference"] <= 1e-5
    shares = row(step_vs_trl, tmp_path)["shares"]["50%"]
    assert shares["peer"] == "trl 8"
    for name in ("grpo", "zppo", "trl 8"):
        found = shares["medians"][name]
        assert math.isclose(sum(found[part] for part in step_vs_trl.PARTS[:-1]), found["step"], rel_tol=1e-6)
        assert min(found["sampling"], found["update"], found["other"]) > 0
    asked = shares["medians"]
    assert asked["grpo"]["rollouts"] == 16 and asked["zppo"]["rollouts"] == 16 * 1.5  # replayed and asked again on top
    parts = row(training_part, tmp_path)["shares"]["50%"]["medians"]
    assert parts["grpo"]["student_tokens"] == parts["trl 8"]["student_tokens"] > 0  # the same ids
    assert parts["trl 8"]["sampling"] < parts["trl 8"]["step"] / 2
    for share in row(teacher_tokens, tmp_path)["hard"].values():
        assert 0 < share["written_share"] < 1


@pytest.mark.slow
def test_the_training_part_for_a_gpu_runs_on_a_cpu(tmp_path: Path, one_process: None) -> None:
    found = row(gpu_training, tmp_path)
    assert found["tokens_needed"] <= found["tokens_computed"] and found["operations"] > 0


class Counted:
    """What torch itself counts for one forward pass of the tiny model."""

    def __init__(self, shape: world.Shape) -> None:
        from transformers import Qwen3ForCausalLM

        config = world.model_config(shape)
        config._attn_implementation = "eager"
        self.cost, self.model = flops.Cost.of(config), Qwen3ForCausalLM(config)

    def forward(self, tokens: int, kept: int) -> int:
        from torch.utils.flop_counter import FlopCounterMode

        counter = FlopCounterMode(display=False)
        with counter, torch.no_grad():
            self.model(torch.zeros(1, tokens, dtype=torch.int64), logits_to_keep=kept)
        total: int = counter.get_total_flops()
        return total


def test_operations_are_those_that_torch_counts() -> None:
    counted = Counted(world.QUICK)
    prompt, completion = 13, 9
    read = prompt + completion - 1
    masked = read * (read - 1) // 2 * counted.cost.pair  # torch counts what a token may not look at too
    rotary = counted.forward(read, completion) - counted.cost.forward(prompt, completion) - masked
    assert 0 <= rotary <= 2 * read * world.QUICK.width  # positions times frequencies is a product as well
    lines = [flops.Line(prompt, completion, True), flops.Line(prompt, completion, False)]
    assert counted.cost.training(lines) == 3 * counted.cost.forward(prompt, completion)
    # Decoding token by token costs what scoring does, where the prompt is read once.
    assert counted.cost.sampling([lines[:1]]) == counted.cost.forward(prompt, completion)
    prefill = prompt * counted.cost.token + prompt * (prompt + 1) // 2 * counted.cost.pair
    assert counted.cost.sampling([lines]) == 2 * counted.cost.forward(prompt, completion) - prefill


@pytest.mark.slow
def test_lengths_and_rewards_are_the_stated_ones() -> None:
    shape = world.Shape(questions=100)
    assert round(shape.mean) == 80
    found = [len(ids) for group in world.completions(shape, seed=1) for ids in group]
    assert abs(sum(found) / len(found) - shape.mean) < 5
    assert 0.15 < sum(n == shape.limit for n in found) / len(found) < 0.25
    for share in step_vs_trl.SHARES:
        rows = world.correct(16, 8, share, seed=3)
        assert rows == world.correct(16, 8, share, seed=3) and [len(r) for r in rows] == [8] * 16
        assert sum(len(set(r)) == 1 for r in rows) == round(share * 16)
    prompts = [len(f"{world.user_turn(q['prompt'])}".split()) + 5 for q in world.questions(world.Shape(steps=8))]
    assert min(prompts) == 40 and max(prompts) == 80


def test_turns_change_their_order_and_ratios_are_of_neighbours() -> None:
    order: list[str] = []

    def step(name: str, seconds: float) -> Mapping[str, float]:
        order.append(name)
        return {"step": seconds * len(order)}

    found = common.interleaved(3, {"a": lambda: step("a", 1.0), "b": lambda: step("b", 2.0)})
    assert order == list("abbaab")
    assert common.medians(found["a"]) == {"step": 4.0}
    assert common.ratio(found["a"], found["b"], "step") == {"median": 5 / 12, "low": 1 / 4, "high": 4 / 6}


def test_tables_are_written_between_their_marks_and_nowhere_else(tmp_path: Path) -> None:
    result = {"date": "d", "machine": "m", "threads": 2, "commit": "c", "versions": {"torch": "1", "trl": None}, "command": "x"}
    case = {"repetitions": 1, "memory_ratio": 0.5, "ratio": {"median": 0.4, "low": 0.3, "high": 0.5}, "cpu_ratio": {"median": 0.45}}
    seconds = {"sampling": 1.0, "update": 2.0, "logprobs": 0.0, "step": 3.5}
    cases = {"16 questions": {**case, "ours": seconds, "theirs": seconds}}
    (tmp_path / "scaling.json").write_text(json.dumps({**result, "took_seconds": 3.0, "cases": cases}))
    page = "a\n<!-- table: scaling -->\nold\n<!-- end -->\nb\n<!-- table: step_vs_trl -->\nkept\n<!-- end -->\n"
    made = tables.rendered(page, tmp_path)
    assert made.startswith("a\n<!-- table: scaling -->\n| ") and "old" not in made and "kept" in made
    assert "| 16 questions | **0.40** (0.30 to 0.50) | 0.45 |" in made and "torch 1" in made
    assert tables.rendered(made, tmp_path) == made


def test_every_row_has_a_table_on_a_page() -> None:
    pages = "".join(page.read_text(encoding="utf-8") for page in tables.PAGES)
    shown = {found[2] for found in tables.BLOCK.finditer(pages)}
    assert set(ROWS) <= shown
    assert {scaling.__name__, gpu_training.__name__} <= {f"benchmarks.{name}" for name in shown}


@pytest.mark.long
@pytest.mark.parametrize("name", ROWS)
def test_every_row_runs(name: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", f"benchmarks.{name}", "--quick", "--results", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads((tmp_path / f"{name.replace('_', '-')}.json").read_text())["quick"]


def test_a_name_that_is_no_row_is_refused() -> None:
    done = subprocess.run([sys.executable, "-m", "benchmarks", "speed"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "no row of the benchmarks is called speed" in done.stderr and "step_vs_trl" in done.stderr


def test_the_gpu_row_says_that_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_training.main([]) == 2
    assert "no GPU" in capsys.readouterr().err


def test_a_worker_process_answers_and_says_why_it_failed() -> None:
    worker = workers.Worker(echo, "config")
    assert worker.ready() == "config" and worker.ask(4) == 8
    with pytest.raises(RuntimeError, match="unlucky"):
        worker.ask(13)
    worker.close()


def test_the_simulated_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    """A card gives every row a token a pass; what a lazy step asks for is the least; nobody waits for a teacher without a latency."""
    clock, ended = teacher_ahead.Clock(), []
    card = teacher_ahead.Card(clock, teacher_ahead.Api(pace=2.0))
    card.add(
        [teacher_ahead.Row(5, 5, tokens, cast(Any, lambda tokens=tokens: ended.append((clock.now, tokens))), 0) for tokens in (30, 10)]
    )
    clock.run(lambda: len(ended) == 2)
    assert ended == [(5.0, 10), (15.0, 30)]

    for name, value in {"NEW": 48, "REPLAYED": 12, "CAP": 12, "REACH": 8}.items():
        monkeypatch.setattr(teacher_ahead, name, value)
    layout = next(teacher_ahead.layouts())
    found = teacher_ahead.simulate(0, 0.5, layout)
    assert found["ahead"]["waited"] < found["lazy"]["waited"]
    assert found["foreseen"]["written"] == found["lazy"]["written"] < found["ahead"]["written"] < found["ahead, all"]["written"]
    assert all(found[way]["plain"] == found["lazy"]["plain"] for way in teacher_ahead.WAYS)
    fast = teacher_ahead.simulate(0, 0.5, dataclasses.replace(layout, teacher=teacher_ahead.Api(1e9, 0.0)))
    assert all(f["waited"] < 0.01 for f in fast.values())
