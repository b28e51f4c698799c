"""Real vLLM, on a CPU: `make test-vllm`, in an environment of its own. Not part of `make test`.

Tiny random models, fp32. Every run is a process of its own, since vLLM is started once in a process.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet
import pytest
import yaml

from conftest import REWARD, make_tiny
from seeing import make_picture, make_seeing
from zppo.runs.log import read_lines

HEAD = 32
"""A head dimension that vLLM's attention for CPUs takes."""

START = 900
"""Seconds that a run may take on a busy machine."""

ON_CPU = str(Path(__file__).with_name("zppo_on_cpu.py"))
SETTINGS = {"OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1"}
PROCESSED = ("--logprobs-mode", "processed_logprobs")
VLLM = ("--rollout.engine=vllm", "--rollout.vllm.max_model_length=512", "--eval.every=0")

pytestmark = pytest.mark.timeout(START + 60)


@pytest.fixture(scope="session")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    make_tiny(folder / "student", seed=0, head_dim=HEAD)
    make_tiny(folder / "teacher", seed=1, head_dim=HEAD)
    return write_recipe(folder, [{"prompt": f"What is {i} plus {j}?", "answer": i + j} for i in range(5) for j in range(4)])


@pytest.fixture(scope="session")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen3-VL and its teacher; every question has a picture."""
    folder = tmp_path_factory.mktemp("seeing")
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [6, 5, 5], "mrope_interleaved": True}
    for name, seed in (("student", 0), ("teacher", 1)):
        make_seeing(folder / name, "qwen3_vl", seed=seed, head_dim=HEAD, rope_parameters=rope, max_position_embeddings=1024)
        file = folder / name / "preprocessor_config.json"
        sizes = {"shortest_edge": 64, "longest_edge": 4096}
        file.write_text(json.dumps(json.loads(file.read_text()) | {"size": sizes}), encoding="utf-8")
    pictures = [make_picture(folder, i, 16 + 8 * (i % 3), 16).uri for i in range(5)]
    rows = [{"prompt": f"What is {i} plus 1?", "answer": i + 1, "images": [pictures[i % 5]]} for i in range(12)]
    return write_recipe(folder, rows, images={"min_pixels": 64, "max_pixels": 4096})


def write_recipe(folder: Path, rows: list[dict[str, Any]], **data: Any) -> Path:
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (folder / "reward.py").write_text(REWARD, encoding="utf-8")
    settings = {
        "student": {"model": "student"},
        "teacher": {"model": "teacher", "rollout": {"max_new_tokens": 6}, "compression": {"max_new_tokens": 12}},
        "data": {"train": "questions.jsonl", "eval": "questions.jsonl", "eval_limit": 4, **data},
        "rollout": {"batch_size": 8, "group_size": 4, "max_new_tokens": 12},
        "zone": {"rho_aug": 0.5},
        "eval": {"max_new_tokens": 12},
        "train": {"steps": 3, "checkpoint_every": 1, "learning_rate": 1e-3, "device": "cpu"},
        "grading": {"reward": "reward.py:reward"},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    return folder / "recipe.yaml"


def zppo(*arguments: object, processes: int = 1, status: int = 0, own: bool = True) -> str:
    """What a run says; it must end with this status, and without a traceback. `own`: vLLM runs in its process, with the repair."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)] if processes > 1 else []
    command = [sys.executable, *launch, *([ON_CPU] if own else ["-m", "zppo"]), *map(str, arguments)]
    done = subprocess.run(command, env=os.environ | SETTINGS, capture_output=True, text=True, timeout=START)
    said = done.stdout + done.stderr
    assert done.returncode == status and "Traceback" not in said, said[-6000:]
    return said


def steps(run: Path) -> list[dict[str, Any]]:
    return [line for line in read_lines(run / "metrics.jsonl") if line["event"] == "step"]


def completions(run: Path, step: int) -> list[tuple[str, ...]]:
    """Prompt kind, question and text of a step's rollouts."""
    table = parquet.read_table(run / "rollouts" / f"step-{step:06d}.parquet", columns=["kind", "question_id", "completion"])
    return [tuple(row.values()) for row in table.to_pylist()]


def assert_near(run: Path, count: int) -> None:
    """Steps with fresh weights, and log-probs that are the trainer's."""
    found = steps(run)
    assert [line["step"] for line in found] == list(range(1, count + 1))
    for line in found:
        assert line["engine_gap_mean"] < 1e-4 and line["logprob_gap_mean"] < 1e-4 and line["logprob_gap_max"] < 1e-2
    engine, rows = (max(line[name] for line in found) for name in ("engine_gap_mean", "logprob_gap_mean"))
    print(f"\n{run.name}: log-probs differ by {engine:.2g} a token in the check, by {rows:.2g} over trained rows")


@pytest.fixture(scope="session")
def trained(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three steps in one process."""
    run = tmp_path_factory.mktemp("runs") / "one-process"
    zppo("train", recipe, *VLLM, f"--output={run}")
    return run


def test_a_student_in_one_process(trained: Path) -> None:
    assert_near(trained, 3)
    assert (trained / "final" / "model.safetensors").exists()


def test_two_processes_with_sharded_weights_come_to_the_same(recipe: Path, trained: Path, tmp_path: Path) -> None:
    run = tmp_path / "two-processes"
    sharded = ("--train.sharding=fsdp2", "--train.tokens_per_microbatch=2048")
    zppo("train", recipe, *VLLM, *sharded, f"--output={run}", processes=2)
    assert_near(run, 3)
    assert completions(run, 1) == completions(trained, 1)
    assert [line["rollouts"] for line in steps(run)] == [line["rollouts"] for line in steps(trained)]


def test_a_resumed_run_repeats_the_uninterrupted_one(recipe: Path, trained: Path, tmp_path: Path) -> None:
    run = tmp_path / "resumed"
    zppo("train", recipe, *VLLM, f"--output={run}", "--train.steps=2")
    written = (run / "recipe.yaml").read_text(encoding="utf-8")
    (run / "recipe.yaml").write_text(re.sub(r"\bsteps: 2\b", "steps: 3", written), encoding="utf-8")
    assert "resumed after step 2 of 3" in zppo("resume", run)
    assert_near(run, 3)
    assert completions(run, 3) == completions(trained, 3)


def test_adapters(recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "lora"
    zppo("train", recipe, *VLLM, "--train.lora.rank=4", f"--output={run}", "--train.steps=2")
    assert_near(run, 2)


def test_pictures(seeing: Path, tmp_path: Path) -> None:
    """The vision tower is trained, so that what vLLM has computed of a picture grows old."""
    pytest.importorskip("torchvision", reason="vLLM's Qwen3-VL imports it; tests/vllm_cpu/install.py sees to that")
    run = tmp_path / "pictures"
    zppo("train", seeing, *VLLM, f"--output={run}", "--train.steps=2")
    assert_near(run, 2)


def test_pictures_over_a_server(seeing: Path, tmp_path: Path) -> None:
    pytest.importorskip("torchvision", reason="as above")
    run = tmp_path / "pictures-server"
    with serving(seeing.parent / "student", tmp_path / "log", *PROCESSED, "--enable-scale-out") as url:
        zppo("train", seeing, *over(url, tmp_path), f"--output={run}", "--train.steps=2", own=False)
    assert_near(run, 2)


@pytest.mark.parametrize("rate", [1e-3, 1e-7])
def test_a_deaf_vllm_is_found_after_one_update(recipe: Path, tmp_path: Path, rate: float) -> None:
    run = tmp_path / "deaf"
    said = zppo("--deaf", "train", recipe, *VLLM, f"--output={run}", f"--train.learning_rate={rate}", status=2)
    assert "after step 1 the sampling engine does not hold the trainer's weights" in " ".join(said.split())
    assert len(steps(run)) == 1
    print(f"\ndeaf, learning rate {rate:g}: {re.search('weights: (.*?) .allowed', ' '.join(said.split()))[1]}")  # type: ignore[index]


@contextmanager
def serving(folder: Path, log: Path, *options: str) -> Iterator[str]:
    """A checkpoint in `vllm serve`; gives its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [Path(sys.executable).with_name("vllm"), "serve", folder, "--host", "127.0.0.1", "--port", port, *options]
    command += "--dtype float32 --max-model-len 1024 --max-num-seqs 16 --no-enable-chunked-prefill --enforce-eager".split()
    with open(log, "w", encoding="utf-8") as file:
        environment = os.environ | SETTINGS | {"VLLM_SERVER_DEV_MODE": "1"}
        server = subprocess.Popen([*map(str, command)], env=environment, stdout=file, stderr=file)
        try:
            _wait(server, f"http://127.0.0.1:{port}/health", log)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()
            server.wait(60)


def _wait(server: subprocess.Popen[bytes], address: str, log: Path) -> None:
    until = time.monotonic() + START / 2
    while time.monotonic() < until and server.poll() is None:
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except OSError:
            time.sleep(1)
    pytest.fail(log.read_text(encoding="utf-8")[-4000:])


def test_a_teacher_over_vllm_serve(recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "teacher"
    with serving(recipe.parent / "teacher", tmp_path / "server.log", "--served-model-name", "tiny-teacher") as url:
        zppo(
            "train",
            recipe,
            f"--teacher.base_urls=[{url}/v1]",
            "--teacher.model=tiny-teacher",
            f"--output={run}",
            "--eval.every=0",
            own=False,
        )
    found = steps(run)
    assert sum(line["teacher_tokens"] for line in found) > 100
    assert all(not line.get("teacher_unreachable") and not line.get("remote_errors") for line in found)
    print(f"\nteacher: {sum(line['teacher_tokens'] for line in found):,.0f} tokens over vllm serve")


def test_a_teacher_that_is_asked_ahead(recipe: Path, server: str, tmp_path: Path) -> None:
    """The student in the process or a server, the teacher in another: rollouts come as they end, and the steps are the same."""
    size = ("--zone.rho_aug=0.25", "--rollout.group_size=8", "--rollout.max_new_tokens=160", "--teacher.rollout.max_new_tokens=160")
    teacher = ("--teacher.model=tiny-teacher", "--zone.teacher_group_size=4")
    runs = {"lazy": ("lazy", VLLM), "ahead": ("ahead", VLLM), "ahead-server": ("ahead", over(server, tmp_path))}
    with serving(recipe.parent / "teacher", tmp_path / "server.log", "--served-model-name", "tiny-teacher") as url:
        for name, (ask, where) in runs.items():
            options = (*where, *size, *teacher, f"--teacher.base_urls=[{url}/v1]", f"--teacher.ask={ask}", "--data.eval=null")
            said = zppo("--beside", "train", recipe, *options, f"--output={tmp_path / name}")
            begun = [int(count) for count in re.findall(r"begun while sampling: (\d+)", said)]
            assert len(begun) == (3 if ask == "ahead" else 0) and all(begun), said[-2000:]
            print(f"\n{how_long(tmp_path / name)}; begun while sampling: {begun}")
    for name in ("ahead", "ahead-server"):
        assert completions(tmp_path / name, 1) == completions(tmp_path / "lazy", 1)


def how_long(run: Path) -> str:
    found = steps(run)
    waited, tokens = (sum(line[name] for line in found) for name in ("teacher_wait_seconds", "teacher_tokens"))
    whole, sampling = (sum(line["seconds"][name] for line in found) for name in ("step", "sampling"))
    return f"{run.name}: {whole:.1f} s in steps, {sampling:.1f} s of sampling, {waited:.1f} s waited, {tokens:,.0f} teacher tokens"


# --- the student in servers of its own -----------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def server(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The student in `vllm serve`; every run sends it its own weights first."""
    with serving(recipe.parent / "student", tmp_path_factory.mktemp("server") / "log", *PROCESSED) as url:
        yield url


def over(url: str, folder: Path) -> tuple[str, ...]:
    """Settings of a run whose student is sampled there."""
    return *VLLM, "--rollout.vllm.mode=server", f"--rollout.vllm.base_url={url}", f"--rollout.vllm.weights_folder={folder / 'weights'}"


def assert_alike(run: Path, other: Path, name: str) -> None:
    """Every step's rollouts are those of the other run."""
    same = [completions(run, step) == completions(other, step) for step in range(1, len(steps(run)) + 1)]
    print(f"{name}: equal to colocate in {sum(same)} of {len(same)} steps")
    assert same[0]


def test_a_student_in_a_server_comes_to_the_same(recipe: Path, server: str, trained: Path, tmp_path: Path) -> None:
    run = tmp_path / "server"
    zppo("train", recipe, *over(server, tmp_path), f"--output={run}", own=False)
    assert_near(run, 3)
    assert_alike(run, trained, "server")
    assert not list((tmp_path / "weights").iterdir())


def test_two_processes_share_a_server(recipe: Path, server: str, trained: Path, tmp_path: Path) -> None:
    run = tmp_path / "two-processes-one-server"
    sharded = ("--train.sharding=fsdp2", "--train.tokens_per_microbatch=2048")
    zppo("train", recipe, *over(server, tmp_path), *sharded, f"--output={run}", processes=2, own=False)
    assert_near(run, 3)
    assert_alike(run, trained, "two processes, one server")


def test_two_processes_with_a_server_each(recipe: Path, server: str, trained: Path, tmp_path: Path) -> None:
    run = tmp_path / "two-servers"
    with serving(recipe.parent / "student", tmp_path / "log", *PROCESSED) as other:
        zppo("train", recipe, *over(f"[{server},{other}]", tmp_path), f"--output={run}", processes=2, own=False)
    assert_near(run, 3)
    assert_alike(run, trained, "two processes, two servers")


def test_a_run_with_a_server_is_resumed(recipe: Path, server: str, tmp_path: Path) -> None:
    whole, run = tmp_path / "whole", tmp_path / "resumed-server"
    zppo("train", recipe, *over(server, tmp_path), f"--output={whole}", own=False)
    zppo("train", recipe, *over(server, tmp_path), f"--output={run}", "--train.steps=2", own=False)
    written = (run / "recipe.yaml").read_text(encoding="utf-8")
    (run / "recipe.yaml").write_text(re.sub(r"\bsteps: 2\b", "steps: 3", written), encoding="utf-8")
    assert "resumed after step 2 of 3" in zppo("resume", run, own=False)
    assert_near(run, 3)
    assert completions(run, 3) == completions(whole, 3)


def test_adapters_over_a_server(recipe: Path, server: str, tmp_path: Path) -> None:
    run = tmp_path / "lora-server"
    zppo("train", recipe, *over(server, tmp_path), "--train.lora.rank=4", f"--output={run}", "--train.steps=2", own=False)
    assert_near(run, 2)


@pytest.mark.parametrize("rate", [1e-3, 1e-7])
def test_a_deaf_server_is_found_after_one_update(recipe: Path, server: str, tmp_path: Path, rate: float) -> None:
    run = tmp_path / "deaf"
    said = zppo("--deaf", "train", recipe, *over(server, tmp_path), f"--output={run}", f"--train.learning_rate={rate}", status=2)
    assert "after step 1 the sampling engine does not hold the trainer's weights" in " ".join(said.split())
    assert len(steps(run)) == 1
    print(f"\ndeaf server, learning rate {rate:g}: {re.search('weights: (.*?) .allowed', ' '.join(said.split()))[1]}")  # type: ignore[index]
