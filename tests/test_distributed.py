"""Several processes train what one trains: real processes on loopback, started by torchrun and accelerate launch."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState
from accelerate.utils.launch import prepare_multi_gpu_env, prepare_simple_launcher_cmd_env
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from distributed_worker import distil, distrust, load, make_policy_gradient, train
from ports import hold_port
from test_update import make_groups
from victims import Victims, ranks
from zppo.cli import main
from zppo.config.recipe import load_recipe
from zppo.core.types import Group
from zppo.distributed.launcher import Launch, check_shards, rank_of, read_launch
from zppo.distributed.parallel import ReplicatedWeights
from zppo.errors import LauncherError, SettingsError

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "recipes" / "accelerate"
LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
METRICS_OF_ONE_PROCESS = (
    "seconds",
    "tokens_per_second",
    "teacher_wait_seconds",
    "system",
    "train_tokens_computed",  # padding depends on who computes what
)


def environment() -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k not in LAUNCHED and not k.startswith(("ACCELERATE_", "FSDP_"))}
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


def torchrun(*command: str) -> subprocess.CompletedProcess[str]:
    """Runs a script or `-m module` in several processes."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    rendezvous = ["--master_addr", "127.0.0.1", "--master_port", str(hold_port())]
    return subprocess.run([*launcher, *rendezvous, *command], env=environment(), capture_output=True, text=True, timeout=240)


def newest(run: Path) -> Path:
    return sorted((run / "checkpoints").glob("step-*"))[-1]


def records(run: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / name).read_text(encoding="utf-8").splitlines()]
    return [{k: v for k, v in line.items() if k not in METRICS_OF_ONE_PROCESS} for line in lines]


def assert_near(one: Any, other: Any, where: str = "") -> None:
    """Equal, but for the rounding of sums that are taken in another order."""
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_near(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, float) and not (one.is_integer() and float(other).is_integer()):  # counts are equal
        assert other == pytest.approx(one, rel=1e-4, abs=1e-5), where
    else:
        assert one == other, where


def assert_near_run(one: Path, other: Path) -> None:
    """Metrics, buffer events, rollouts and weights of two runs."""
    for ours, theirs in zip(records(one), records(other), strict=True):
        assert_near(ours, theirs, f"{ours['event']} {ours['step']}")
    assert records(one, "buffer.jsonl") == records(other, "buffer.jsonl")
    for path in sorted((one / "rollouts").iterdir()):
        ours, theirs = (pq.read_table(folder / "rollouts" / path.name) for folder in (one, other))
        exact = [name for name in ours.column_names if name not in ("entropy", "advantage")]
        assert ours.select(exact).equals(theirs.select(exact)), path.name
    assert distance(one / "final", other / "final") < 2e-5  # steps of 1e-3, blown up where a gradient is near 0


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    """In one file or in several."""
    return {name: value for path in sorted(folder.glob("*.safetensors")) for name, value in load_file(path).items()}


def distance(one: Path, other: Path) -> float:
    ours, theirs = map(weights_in, (one, other))
    assert ours.keys() == theirs.keys()
    return max(float((ours[k] - theirs[k]).abs().max()) for k in ours)


@pytest.fixture(scope="module")
def recorded(tiny_qwen3_dir: Path) -> list[list[Group]]:
    """Five steps; of two processes one often has no row with a gradient, and some minibatches have none at all."""
    model = load(str(tiny_qwen3_dir))
    rewards = [
        [[1.0, 0.0, 0.0, 1.0], [0.0] * 4, [1.0] * 4, [0.0, 0.0, 1.0, 0.0], [0.0] * 4],
        [[1.0, 0.0, 1.0, 1.0], [0.0] * 4],
        [[0.0, 1.0, 0.0, 0.0], [1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 0.0, 1.0], [0.0, 1.0, 0.0, 1.0], [1.0, 0.0, 0.0, 0.0]],
        [[0.0] * 4, [1.0] * 4, [0.0] * 4],
        [[0.0, 1.0, 1.0, 1.0] for _ in range(7)],
    ]
    return [make_groups(model, rows, seed=step) for step, rows in enumerate(rewards)]


@pytest.mark.slow
def test_recorded_completions_train_the_same_weights(
    tiny_qwen3_dir: Path, recorded: list[list[Group]], tmp_path: Path, victims: Victims
) -> None:
    """Two processes, with all weights and sharded, against one: five steps of four minibatches, and a distillation of either kind."""
    AcceleratorState._reset_state(True)
    model = load(str(tiny_qwen3_dir))
    learner = make_policy_gradient(model, Accelerator(cpu=True), ReplicatedWeights(), sampler=False)
    expected = train(learner, recorded)
    model.save_pretrained(tmp_path / "one-five")
    expected += distrust(learner, recorded[:2])
    expected.append(distil(learner, load(str(tiny_qwen3_dir)), recorded[0]))
    expected.append(distil(learner, load(str(tiny_qwen3_dir)), recorded[0], off_policy=True))
    model.save_pretrained(tmp_path / "one")
    (tmp_path / "recorded.pickle").write_bytes(pickle.dumps(recorded))

    folders = (tiny_qwen3_dir, tmp_path / "recorded.pickle", tmp_path)
    status = victims.run(*folders, run=tmp_path, call="distributed_worker:main", processes=2)
    assert status == 0, victims.said[-3000:]
    assert distance(tmp_path / "one", tiny_qwen3_dir) > 5e-4  # it has learnt something
    for layout in ("replicated", "sharded"):
        assert distance(tmp_path / "one-five", tmp_path / f"{layout}-five" / "model") <= 1e-6, layout
        assert distance(tmp_path / "one", tmp_path / layout / "model") <= 5e-6, layout  # AdamW blows up a gradient near 0
        ranks = [pickle.loads((tmp_path / f"{layout}-{rank}.pickle").read_bytes()) for rank in (0, 1)]
        assert ranks[0] == ranks[1]
        for ours, theirs in zip(expected, ranks[0], strict=True):
            known = {k: v for k, v in ours.items() if k != "train_tokens_computed"}
            assert_near(known, {k: theirs[k] for k in known}, layout)
        own, fresh = learner.optimizer.optimizer, load(str(tmp_path / layout / "model"))
        other = make_policy_gradient(fresh, Accelerator(cpu=True), ReplicatedWeights(), sampler=False).optimizer.optimizer
        ReplicatedWeights().load_optimizer(tmp_path / layout, other, fresh)  # one process reads what two have written
        state = other.state_dict()["state"]
        assert state.keys() == own.state_dict()["state"].keys()
        for index, values in own.state_dict()["state"].items():
            for name, value in values.items():
                torch.testing.assert_close(state[index][name], value, rtol=1e-3, atol=1e-7)
    for rank in (0, 1):
        assert "disagree about the rank" in (tmp_path / f"refused-{rank}").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def alone(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run in one process."""
    AcceleratorState._reset_state(True)
    run = tmp_path_factory.mktemp("runs") / "one"
    assert main(["train", str(recipe), f"--output={run}"]) == 0
    return run


@pytest.fixture(scope="module")
def pair(recipe: Path, tmp_path_factory: pytest.TempPathFactory, victims: Victims) -> Path:
    """The same run in two processes, in the environment that torchrun makes."""
    run = tmp_path_factory.mktemp("runs") / "two"
    assert victims.run("train", recipe, f"--output={run}", run=run, processes=2) == 0, victims.said[-3000:]
    assert "2 processes, each with all weights" in victims.said
    assert victims.said.count("run folder") == victims.said.count("after minus before") == 1  # one of them speaks
    return run


SEEN = """
import json, os, pathlib, sys
from zppo.distributed.launcher import rank_of, read_launch

found = {"launch": repr(read_launch()), "rank": rank_of(), "env": dict(os.environ)}
pathlib.Path(sys.argv[1], os.environ["RANK"]).write_text(json.dumps(found))
"""


@pytest.mark.slow
def test_torchrun_makes_the_environment_of_these_tests(tmp_path: Path) -> None:
    """The processes of the other tests are forked, which is quicker than torchrun; it would tell them the same."""
    (tmp_path / "seen.py").write_text(SEEN, encoding="utf-8")
    done = torchrun(str(tmp_path / "seen.py"), str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    for rank, env in enumerate(ranks(2)):
        found = json.loads((tmp_path / str(rank)).read_text(encoding="utf-8"))
        assert found["rank"] == rank_of(env) == rank
        assert found["launch"] == repr(read_launch(env)) == repr(Launch(rank=rank, processes=2))
        assert {**env, "MASTER_PORT": ""} == {name: found["env"][name] for name in env} | {"MASTER_PORT": ""}


def interrupted(run: Path, folder: Path) -> Path:
    """A copy of a finished run as if it had been killed in step 5."""
    copy = Path(shutil.copytree(run, folder))
    shutil.rmtree(copy / "final")
    shutil.rmtree(copy / "checkpoints" / "step-000005")
    return copy


@pytest.mark.slow
def test_two_processes_run_as_one(alone: Path, pair: Path) -> None:
    assert_near_run(alone, pair)


@pytest.mark.slow
def test_resumed_with_fewer_processes_it_goes_on(pair: Path, tmp_path: Path) -> None:
    AcceleratorState._reset_state(True)
    run = interrupted(pair, tmp_path / "run")
    assert main(["resume", str(run)]) == 0
    assert_near_run(pair, run)


@pytest.mark.slow
@pytest.mark.long
def test_resumed_with_sharded_weights_by_accelerate_launch(alone: Path, tmp_path: Path) -> None:
    """A checkpoint knows nothing of processes and shards: one process wrote it, two with FSDP2 go on, with recipes/accelerate/."""
    run = interrupted(alone, tmp_path / "run")
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / "fsdp2.yaml")]
    sizes = ["--num_processes", "2", "--main_process_port", str(hold_port())]
    command = [*launcher, *sizes, "-m", "zppo", "resume", str(run)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 processes, weights sharded over them (FSDP2)" in done.stdout
    assert_near_run(alone, run)


KILLED = """
import hashlib, os, signal

calls = 0

def reward(completion, question):
    global calls
    calls += 1
    if os.environ.get("RANK") == "1" and calls == int(os.environ.get("KILL_AT", 0)):
        os.kill(os.getpid(), signal.SIGKILL)
    digest = hashlib.sha256((completion + question.id).encode("utf-8", "surrogatepass")).digest()[0]
    return {"correct": digest % 5 == 0, "reward": float(digest % 5 == 0), "answer": str(digest)}
"""


@pytest.mark.slow
def test_killed_with_sharded_weights_it_goes_on_with_all_in_each(alone: Path, recipe: Path, tmp_path: Path, victims: Victims) -> None:
    """Trained with FSDP2 until a process is killed, on from its newest checkpoint without sharding."""
    (tmp_path / "killed.py").write_text(KILLED, encoding="utf-8")
    run, more = tmp_path / "run", (f"--grading.reward={tmp_path / 'killed.py'}:reward", "--data.eval=null")
    command = ("train", recipe, f"--output={run}", "--train.sharding=fsdp2", *more)
    assert victims.run(*command, run=run, processes=2, KILL_AT="90") != 0 and victims.statuses[1] == -signal.SIGKILL
    assert "2 processes, weights sharded over them (FSDP2)" in victims.said
    assert newest(run).name == "step-000002" and not (run / "final").exists()

    saved = yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8"))
    saved["train"]["sharding"] = "none"
    (run / "recipe.yaml").write_text(yaml.safe_dump(saved), encoding="utf-8")
    assert victims.run("resume", run, run=run, processes=2) == 0, victims.said[-3000:]
    assert "step 2 of 5" in victims.said and "2 processes, each with all weights" in victims.said
    ours, theirs = ([r for r in records(folder) if r["event"] == "step"] for folder in (run, alone))
    for own, other in zip(ours, theirs, strict=True):
        assert_near(own, other, f"step {own['step']}")
    assert records(run, "buffer.jsonl") == records(alone, "buffer.jsonl")
    final, expected = (AutoModelForCausalLM.from_pretrained(folder / "final") for folder in (run, alone))
    pairs = zip(final.state_dict().values(), expected.state_dict().values(), strict=True)
    assert all(a.dtype == torch.float32 and float((a - b).abs().max()) < 2e-5 for a, b in pairs)


STOPPING = """
import hashlib, os, signal

calls = 0

def reward(completion, question):
    global calls
    calls += 1
    if os.environ["RANK"] == "1" and calls == int(os.environ["STOP_AT"]):
        os.kill(os.getpid(), signal.SIGTERM)
    digest = hashlib.sha256((completion + question.id).encode("utf-8", "surrogatepass")).digest()[0]
    return {"correct": digest % 5 == 0, "reward": float(digest % 5 == 0), "answer": str(digest)}
"""


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_and_resumed_it_is_the_same_run(
    pair: Path, recipe: Path, tmp_path: Path, victims: Victims
) -> None:
    """In the middle of grading, in a step after one that no checkpoint has: what was trained is saved once, and goes on."""
    (tmp_path / "stopping.py").write_text(STOPPING, encoding="utf-8")
    run, reward = tmp_path / "run", f"--grading.reward={tmp_path / 'stopping.py'}:reward"
    rest = (reward, "--train.checkpoint_every=4", "--data.eval=null")
    assert victims.run("train", recipe, f"--output={run}", *rest, run=run, processes=2, STOP_AT="70") == 143
    assert "SIGTERM" in victims.said and victims.said.count("the run is saved in") == 1
    (saved,) = (run / "checkpoints").iterdir()
    assert saved.name in ("step-000001", "step-000002", "step-000003")
    assert victims.run("resume", run, run=run, processes=2, STOP_AT="-1") == 0, victims.said[-3000:]
    ours, theirs = ([r for r in records(folder) if r["event"] == "step"] for folder in (run, pair))
    assert ours == theirs and records(run, "buffer.jsonl") == records(pair, "buffer.jsonl")
    assert distance(run / "final", pair / "final") == 0
    ours, theirs = (torch.load(newest(folder) / "optimizer.pt", weights_only=True) for folder in (run, pair))
    assert all(torch.equal(v, theirs["state"][i][n]) for i, s in ours["state"].items() for n, v in s.items())
    for path in (pair / "rollouts").iterdir():
        assert pq.read_table(path).equals(pq.read_table(run / "rollouts" / path.name))


FAILING = """
import os, signal

def reward(completion, question):
    if os.environ["RANK"] == "1":
        {fault}
    return 0.0
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("raise ValueError('the reward broke')", "rank 1: Error: "),
        ("os.kill(os.getpid(), signal.SIGKILL)", "rank 0: Error: another process of this run has ended"),
    ],
)
def test_a_process_that_dies_ends_the_others_with_the_reason(recipe: Path, tmp_path: Path, victims: Victims, fault: str, said: str) -> None:
    """Without a launcher, which would end them too; a child that hangs is killed in the end, and its status is negative."""
    (tmp_path / "failing.py").write_text(FAILING.format(fault=fault), encoding="utf-8")
    reward = f"--grading.reward={tmp_path / 'failing.py'}:reward"
    command = ("train", recipe, f"--output={tmp_path / 'run'}", reward, "--data.eval=null")
    assert victims.run(*command, run=tmp_path, processes=2) > 0 and all(victims.statuses), victims.said[-3000:]
    assert said in victims.said, victims.said[-3000:]
    assert ("the reward broke" in victims.said) == ("broke" in fault)


def launched(env: dict[str, str], processes: int = 8) -> dict[str, str]:
    return {**env, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(processes)}


def accelerate_environment(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> dict[str, str]:
    """What `accelerate launch` puts into the environment, made by its own code."""
    for name in [n for n in os.environ if n in LAUNCHED or n.startswith(("ACCELERATE_", "FSDP_"))]:
        monkeypatch.delenv(name)
    parsed = launch_command_parser().parse_args([*arguments, "script.py"])
    options, _, _ = _validate_launch_command(parsed)
    if options.cpu or not (options.multi_gpu or options.use_fsdp):
        return dict(prepare_simple_launcher_cmd_env(options)[1])
    options.main_process_port = 0
    return dict(prepare_multi_gpu_env(options))


EXPECTED = {"ddp.yaml": Launch(processes=8), "fsdp2.yaml": Launch(processes=8, sharding="fsdp2", reshard=True)}


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.name)
def test_accelerate_configurations_say_what_we_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    env = accelerate_environment(monkeypatch, "--config_file", str(path))
    assert read_launch(launched(env)) == EXPECTED[path.name]


def configured(tmp_path: Path, **changes: Any) -> str:
    """fsdp2.yaml with other values."""
    config = yaml.safe_load((CONFIGS / "fsdp2.yaml").read_text(encoding="utf-8"))
    fsdp = {k: v for k, v in changes.items() if k.startswith("fsdp_")}
    config = {**config, **{k: v for k, v in changes.items() if k not in fsdp}}
    config["fsdp_config"] |= fsdp
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    return str(tmp_path / "config.yaml")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"fsdp_version": 1, "fsdp_reshard_after_forward": "FULL_SHARD"}, "fsdp_version: 2"),
        ({"fsdp_activation_checkpointing": True}, "train.gradient_checkpointing"),
    ],
)
def test_what_would_silently_be_something_else_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], said: str
) -> None:
    env = accelerate_environment(monkeypatch, "--config_file", configured(tmp_path, **changes))
    with pytest.raises(LauncherError, match=said):
        read_launch(launched(env))


def test_a_layer_may_stay_gathered_and_shards_may_lie_on_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = configured(tmp_path, fsdp_reshard_after_forward=False)
    assert not read_launch(launched(accelerate_environment(monkeypatch, "--config_file", path))).reshard
    path = configured(tmp_path, fsdp_offload_params=True)
    found = read_launch(launched(accelerate_environment(monkeypatch, "--config_file", path)))
    assert found.reshard and found.offload


@pytest.mark.parametrize(
    ("env", "said"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed.*fsdp2.yaml"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, "parallelism_config"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, "train.tokens_per_microbatch"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE"),
    ],
)
def test_what_is_not_built_is_refused(env: dict[str, str], said: str) -> None:
    with pytest.raises(LauncherError, match=said):
        read_launch(launched({}) | env)


def test_accelerate_on_cpus_starts_one_process_and_we_say_so(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    env = accelerate_environment(monkeypatch, "--cpu", "--num_processes", "2")
    for name in ("MASTER_ADDR", "MASTER_PORT", "ACCELERATE_MIXED_PRECISION", "ACCELERATE_USE_CPU"):
        monkeypatch.setenv(name, env[name])
    assert main(["train", str(recipe), f"--output={tmp_path / 'run'}"]) == 2
    assert "torchrun" in capsys.readouterr().err and not (tmp_path / "run").exists()
    assert read_launch(accelerate_environment(monkeypatch, "--cpu", "--num_processes", "1")) == Launch()


def test_sharding_needs_several_processes(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    AcceleratorState._reset_state(True)
    assert main(["train", str(recipe), "--train.sharding=fsdp2", f"--output={tmp_path / 'run'}"]) == 2
    assert "one runs" in " ".join(capsys.readouterr().err.split()) and not (tmp_path / "run").exists()


def test_what_cannot_be_sharded_is_refused(recipe: Path) -> None:
    train = load_recipe(recipe, ["--train.optimizer=adamw-8bit"]).train
    check_shards(train, Launch(processes=2))
    with pytest.raises(SettingsError, match="train.optimizer=adamw-8bit does not go with sharded weights"):
        check_shards(train, Launch(processes=2, sharding="fsdp2"))


def test_groups_of_processes_must_come_out_even(recipe: Path) -> None:
    train = load_recipe(recipe, ["--train.sharding=fsdp2", "--train.shard_within=4"]).train
    check_shards(train, Launch(processes=8))
    with pytest.raises(SettingsError, match="shard_within is 4, and 6 processes"):
        check_shards(train, Launch(processes=6))


def test_precision_and_count_must_be_what_was_asked_for() -> None:
    Launch(mixed_precision="bf16").check_precision("bf16")
    with pytest.raises(LauncherError, match="train.precision"):
        Launch(mixed_precision="fp16").check_precision("bf16")
    with pytest.raises(LauncherError, match="2 processes were started"):
        Launch(processes=2).check_processes(1)


def test_only_one_of_several_processes_has_a_rank() -> None:
    assert rank_of({}) is None and rank_of({"RANK": "0", "WORLD_SIZE": "1"}) is None
    assert rank_of({"RANK": "1", "WORLD_SIZE": "2"}) == 1
