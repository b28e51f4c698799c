"""Memory of sharded weights: who reads, gathers and writes how much of them, and in which type. Four real processes on loopback."""

from __future__ import annotations

import pickle
import signal
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from conftest import make_tiny
from distributed_worker import load
from shards_worker import make_learner, train
from test_distributed import assert_near, distance, newest, records
from test_update import make_groups
from victims import Victims
from zppo.distributed.checkpoint_parts import read_moments
from zppo.distributed.parallel import ReplicatedWeights
from zppo.errors import CheckpointError
from zppo.runs import checkpoint


@pytest.mark.slow
def test_four_processes_hold_shares_and_train_as_one(tmp_path: Path, victims: Victims) -> None:
    """Shards within two (HSDP), the optimizer on the processor, bf16, and checkpoints in parts, each against one process."""
    AcceleratorState._reset_state(True)
    path = make_tiny(tmp_path / "model", num_hidden_layers=8, tie_word_embeddings=True)
    model = load(str(path))
    rewards = [[[1.0, 0.0, 0.0, 1.0], [0.0] * 4, [0.0, 0.0, 1.0, 0.0]], [[1.0, 0.0, 1.0, 1.0], [0.0, 1.0, 0.0, 0.0]]]
    recorded = [make_groups(model, rows, seed=step) for step, rows in enumerate(rewards)]
    (tmp_path / "recorded.pickle").write_bytes(pickle.dumps(recorded))
    learner = make_learner(model, ReplicatedWeights())
    expected = train(learner, recorded)
    model.save_pretrained(tmp_path / "one")

    status = victims.run(path, tmp_path / "recorded.pickle", tmp_path, run=tmp_path, call="shards_worker:main", processes=4)
    assert status == 0, victims.said[-3000:]
    assert distance(tmp_path / "one", path) > 1e-4  # it has learnt something
    for rank in range(4):
        for ours, theirs in zip(expected, pickle.loads((tmp_path / f"within-{rank}.pickle").read_bytes()), strict=True):
            known = {k: v for k, v in ours.items() if k != "train_tokens_computed"}
            assert_near(known, {k: theirs[k] for k in known})
        assert (tmp_path / f"refused-{rank}").exists()  # one disk is full, and every process knows
    for name in ("within/model", "final"):  # tied weights have one name there
        assert distance(tmp_path / "one", tmp_path / name) <= 1e-6, name
    assert distance(tmp_path / "one", tmp_path / "two" / "model") <= 1e-6
    assert distance(tmp_path / "one", tmp_path / "bf16" / "model") <= 1e-3

    # What four have written one reads, and goes on from.
    files = sorted(p.name for p in (tmp_path / "two" / "model").iterdir())
    assert [name for name in files if name.endswith(".safetensors")] == [f"model-0000{i}-of-00004.safetensors" for i in range(1, 5)]
    fresh = load(str(tmp_path / "two" / "model"))
    other = make_learner(fresh, ReplicatedWeights())
    other.weights.load_optimizer(tmp_path / "two", other.optimizer.optimizer, fresh)
    ours, theirs = (each.optimizer.optimizer.state_dict()["state"] for each in (learner, other))
    assert ours.keys() == theirs.keys()
    for index, values in ours.items():
        for name, value in values.items():
            torch.testing.assert_close(theirs[index][name], value, rtol=1e-3, atol=1e-7)
    trained = dict(fresh.named_parameters())
    more = {**trained, "more": torch.nn.Parameter(torch.zeros(2))}
    wider = {**trained, "model.norm.weight": torch.nn.Parameter(torch.zeros(64))}
    for wrong in (more, wider):
        with pytest.raises(CheckpointError, match="does not fit the student"):
            read_moments(tmp_path / "two", other.optimizer.optimizer, wrong)
    (tmp_path / "two" / "optimizer" / "steps.json").write_text("[1]")
    with pytest.raises(CheckpointError, match="cannot be used"):
        read_moments(tmp_path / "two", other.optimizer.optimizer, trained)


@pytest.mark.slow
@pytest.mark.long
def test_killed_amid_a_checkpoint_it_goes_on_from_the_one_before_bit_for_bit(recipe: Path, tmp_path: Path, victims: Victims) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    command = ("train", recipe, "--train.sharding=fsdp2", "--data.eval=null")
    assert victims.run(*command, f"--output={whole}", run=whole, processes=2) == 0, victims.said[-3000:]
    amid = "zppo.distributed.checkpoint_parts:write_moments"
    assert victims.run(*command, f"--output={run}", run=run, processes=2, at=amid, nth=2) == -signal.SIGKILL
    before, partial = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert partial.endswith(".partial") and checkpoint.existing(run) == [run / "checkpoints" / before]
    assert victims.run("resume", run, run=run, processes=2) == 0, victims.said[-3000:]
    assert records(run) == records(whole) and distance(run / "final", whole / "final") == 0
    parts = sorted(path.name for path in (newest(whole) / "optimizer").glob("*.safetensors"))
    assert len(parts) == 2
    for name in parts:
        ours, theirs = (load_file(newest(folder) / "optimizer" / name) for folder in (run, whole))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    # One process's part is missing: it is no checkpoint.
    next((newest(run) / "optimizer").glob("shard-*")).unlink()
    good, damaged = checkpoint.newest_good(run)
    assert good == sorted((run / "checkpoints").iterdir())[0] and "is missing" in damaged[newest(run)]
