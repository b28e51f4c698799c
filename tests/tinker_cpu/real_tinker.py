"""SkyRL's own Tinker server, its JAX backend on a CPU: `make test-tinker`, in environments of their own. Not part of `make test`.

The lab's bundled student, fp32, and runs from the command line. SKYRL names the environment that the server is in.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tarfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet
import pytest
import torch
from accelerate import Accelerator

import test_update
from test_update import make_groups, make_policy_gradient
from zppo.config.settings import LoraSettings, Settings
from zppo.distributed.parallel import ReplicatedWeights
from zppo.engines.loading import load_network
from zppo.models.lora import add_adapters
from zppo.names import model_folder
from zppo.runs.log import read_lines
from zppo.step_log import StepLog
from zppo.train.cluster.tinker_student import TinkerStudent, open_student

pytestmark = pytest.mark.timeout(1800)

NAME = "lab:unreachable/student"
RANK = 8
BACKEND = {"max_lora_adapters": 4, "max_lora_rank": RANK, "train_micro_batch_size": 8, "sample_max_num_sequences": 32}
RECIPE = Path(__file__).parents[2] / "recipes" / "lab.yaml"


class SkyRL:
    """The server: what it keeps, and the compiled kernels, outlive a kill."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.process: subprocess.Popen[bytes]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        home = Path(os.environ["SKYRL"]).absolute()
        own = {
            "VIRTUAL_ENV": str(home),
            "PATH": f"{home / 'bin'}:{os.environ['PATH']}",
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(self.folder / "jax"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "UV_OFFLINE": "1",
        }
        options = {
            "base-model": model_folder(NAME),
            "backend": "jax",
            "backend-config": json.dumps(BACKEND),
            "checkpoints-base": self.folder / "kept",
            "database-url": f"sqlite:///{self.folder / 'tinker.db'}",
            "host": "127.0.0.1",
            "port": self.port,
        }
        given = [f"--{name}={value}" for name, value in options.items()]
        with open(self.folder / "server.log", "ab") as log:
            # It looks at the command that started it to start its engine by the same.
            self.process = subprocess.Popen(
                ["uv", "run", "--no-project", "-m", "skyrl.tinker.api", *given],
                env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | own,
                cwd=self.folder,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        for _ in range(600):
            try:
                with urllib.request.urlopen(f"{self.url}/api/v1/healthz", timeout=5):
                    return
            except OSError:
                assert self.process.poll() is None, (self.folder / "server.log").read_text()[-4000:]
                time.sleep(0.5)
        raise TimeoutError((self.folder / "server.log").read_text()[-4000:])

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SkyRL]:
    os.environ["TINKER_API_KEY"] = "tml-any"
    os.environ["TINKER_TELEMETRY"] = "0"
    started = SkyRL(tmp_path_factory.mktemp("skyrl"))
    started.start()
    yield started
    started.kill()


# --- the gradient ------------------------------------------------------------------------------------------------------


def adapters_of(student: TinkerStudent, name: str, folder: Path) -> Path:
    """The trained weights as the server gives them, in the form of peft."""
    folder.mkdir(parents=True)
    student.service.download(student.service.save_for_sampling(name), folder / "archive.tar.gz")
    with tarfile.open(folder / "archive.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    return folder


def tie(model: torch.nn.Module) -> None:
    """q, k and v share the first matrix of their adapters on SkyRL's JAX backend, as gate and up do: a file in peft's form repeats it."""
    for block in model.modules():
        for first, *others in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
            if hasattr(block, first):
                for other in others:
                    getattr(block, other).lora_A = getattr(block, first).lora_A


def test_the_gradients_of_a_minibatch_are_ours(server: SkyRL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both clips and the dual clip are at work. Gradients are read off the weights: with betas of 0 and an eps of 1, AdamW at a learning
    rate of 1 moves a weight by -g / (|g| + 1)."""
    monkeypatch.setattr(test_update, "VOCABULARY", 72)
    train: dict[str, Any] = {"minibatches": 1, "learning_rate": 1.0, "betas": (0.0, 0.0), "adam_eps": 1.0, "weight_decay": 0.0}
    settings = Settings(
        method="grpo",
        student={"model": NAME, "tinker": {"base_url": server.url, "base_model": model_folder(NAME), "server": "skyrl-jax"}},
        data={"train": "-"},
        eval={"temperature": 0},
        train={**train, "lora": {"rank": RANK}, "max_grad_norm": None, "old_logprobs": "sampler", "logprob_tolerance": 1e3},
    )
    student = open_student(settings, None, tmp_path, images=False, processes=1)
    lora = settings.train.lora
    assert lora is not None
    model = load_network(model_folder(NAME), dtype=torch.float32).eval()
    ours = add_adapters(model, lora, base=NAME)
    tie(model)
    ours.load(adapters_of(student, "begin", tmp_path / "begin"))
    learner = student.learner(settings, Accelerator(cpu=True), ReplicatedWeights(), None)
    local = make_policy_gradient(model, max_grad_norm=1e9, **train)
    weights = {name: p for name, p in ours.handle.named_parameters() if p.requires_grad}
    try:
        for step in (1, 2):  # at first the second matrices are 0, and with them the gradients of the first ones
            groups = make_groups(model, [[1.0, 0.0, 0.0, 1.0], [0.0, 1.0, 0.0, 0.0]], seed=step, shift=2.5)
            before = {name: p.detach().clone() for name, p in weights.items()}
            log, local_log = StepLog(step), StepLog(step)
            learner.update(groups, [], {}, log)
            local.update(groups, [], {}, local_log)
            our_gradients = _gradients(before, weights)
            ours.load(adapters_of(student, f"after-{step}", tmp_path / f"after-{step}"))
            their_gradients = _gradients(before, weights)
            gap, size = (their_gradients - our_gradients).abs(), our_gradients.abs()
            shares = [log.counts[f"clip_{name}_share"] or 0.0 for name in ("low", "high", "dual")]
            norms = [counts["grad_norm"] or 0.0 for counts in (log.counts, local_log.counts)]
            print(
                f"\nminibatch {step}: {len(size):,} gradients of up to {size.max():.3g}, the server's differ by {gap.max():.2g} at most; "
                f"norm {norms[0]:.6f}, ours {norms[1]:.6f}; clipped (low, high, dual) {', '.join(f'{s:.0%}' for s in shares)} of tokens"
            )
            assert gap.max() < 1e-5 * max(1.0, float(size.max())) and size.max() > 1e-2
            assert norms[0] == pytest.approx(norms[1], rel=1e-5) and log.counts["loss"] == pytest.approx(local_log.counts["loss"], rel=1e-5)
            assert shares == [local_log.counts[f"clip_{name}_share"] for name in ("low", "high", "dual")] and min(shares) > 0
    finally:
        student.service.close()


def _gradients(before: dict[str, torch.Tensor], weights: dict[str, torch.nn.Parameter]) -> torch.Tensor:
    moved = torch.cat([(p.detach() - before[name]).double().flatten() for name, p in weights.items()])
    return -moved / (1 - moved.abs())


# --- runs --------------------------------------------------------------------------------------------------------------


def start(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "zppo", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def end(run: subprocess.Popen[str], status: int = 0) -> str:
    said, _ = run.communicate(timeout=1500)
    assert run.returncode == status and "Traceback" not in said, said[-6000:]
    return " ".join(said.split())


def options(server: SkyRL, run: Path, deadline: int) -> list[str]:
    return [
        *(f"--student.tinker.base_url={server.url}", f"--student.tinker.base_model={model_folder(NAME)}"),
        *("--student.tinker.server=skyrl-jax", f"--student.tinker.deadline={deadline}", f"--train.lora.rank={RANK}"),
        *("--train.max_grad_norm=null", "--train.learning_rate=5e-3", "--train.steps=3", "--train.minibatches=2"),
        *("--rollout.batch_size=8", "--data.eval_limit=16", "--train.checkpoint_every=0", f"--output={run}"),
    ]


def steps(run: Path) -> list[dict[str, Any]]:
    return [line for line in read_lines(run / "metrics.jsonl") if line["event"] == "step"]


def completions(run: Path, step: int) -> list[tuple[str, ...]]:
    table = parquet.read_table(run / "rollouts" / f"step-{step:06d}.parquet", columns=["kind", "question_id", "completion"])
    return [tuple(row.values()) for row in table.to_pylist()]


def test_a_run_of_zppo_and_one_whose_server_is_killed(server: SkyRL, tmp_path: Path) -> None:
    """Three steps of the lab's recipe; the same again with a server that is killed after the second one, started anew, and resumed."""
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    end(start("train", RECIPE, *options(server, whole, 900)))
    lines = steps(whole)
    assert [line["step"] for line in lines] == [1, 2, 3]
    for line in lines:
        assert line["engine_gap_mean"] < 1e-5 and (line["logprob_gap_mean"] or 0) < 1e-5 and line["optimizer_steps"] == 2
    assert {kind for kind, *_ in completions(whole, 2)} >= {"plain", "bcq", "ncq"}
    gaps = [max(line[name] or 0 for line in lines) for name in ("engine_gap_mean", "logprob_gap_mean")]
    print(f"\nthree steps: log-probs differ by {gaps[0]:.2g} a token in the check, by {gaps[1]:.2g} over trained rows")
    adapter = whole / "final" / "adapter"
    ours = add_adapters(load_network(model_folder(NAME), dtype=torch.float32), LoraSettings(rank=RANK), base=NAME)
    ours.load(adapter)
    assert max(float(p.abs().max()) for name, p in ours.handle.named_parameters() if "lora_B" in name) > 1e-3

    run, began = start("train", RECIPE, *options(server, parted, 60)), time.monotonic()
    while not (parted / "rollouts" / "step-000002.parquet").exists():
        assert run.poll() is None and time.monotonic() - began < 900, end(run)
        time.sleep(0.05)
    time.sleep(0.5)
    server.kill()
    said = end(run, 2)
    assert "student.tinker:" in said and "continue with `zppo resume" in said
    assert [path.name for path in (parted / "checkpoints").iterdir()] == ["step-000002"]
    print(f"killed: {said[said.index('student.tinker:') :].partition('. See')[0].replace(server.url, 'the server')}")
    server.start()
    recipe = parted / "recipe.yaml"
    recipe.write_text(re.sub(r"deadline: 60(\.0)?\b", "deadline: 900", recipe.read_text(encoding="utf-8")), encoding="utf-8")
    assert "resumed after step 2 of 3" in end(start("resume", parted))
    same = sum(a == b for a, b in zip(completions(whole, 3), completions(parted, 3), strict=False))
    print(f"resumed: {same} of {len(completions(whole, 3))} completions of step 3 are those of the uninterrupted run")
    assert completions(parted, 2) == completions(whole, 2) and completions(parted, 3) == completions(whole, 3)
    for folder in (whole, parted):
        for file in folder.rglob("*"):
            assert not file.is_file() or b"tml-any" not in file.read_bytes()
