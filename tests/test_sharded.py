"""Pictures, adapters and the automatic token budget where weights are sharded: two processes on loopback against one."""

from __future__ import annotations

import importlib.util
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState

from conftest import make_tiny
from seeing import make_picture, make_seeing
from sharded_worker import CASES, FITS, LIMITS, train
from test_distributed import assert_near, weights_in
from victims import Victims
from zppo.core.types import Group, ImageRef, Message, Prompt, Question, Rollout
from zppo.distributed.parallel import ReplicatedWeights
from zppo.distributed.retries import why_no_retries
from zppo.engines.chat import Chat
from zppo.images.processor import PixelCache


def group(chat: Chat, text: str, images: tuple[ImageRef, ...], rewards: list[float], rng: torch.Generator) -> Group:
    messages = (Message("user", text),)
    prompt = Prompt("plain", Question(text, messages, "1", images), messages, chat.encode(messages, images), images=images)
    rollouts = []
    for reward in rewards:
        ids = torch.randint(5, 150, (int(torch.randint(2, 9, (1,), generator=rng)),), generator=rng)
        rollouts.append(Rollout(ids, torch.randn(len(ids), generator=rng) - 5, "", None, reward >= 1, reward))
    return Group(prompt, tuple(rollouts))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Students, and two recorded steps for each; in a minibatch of the first only one group has a picture."""
    folder = tmp_path_factory.mktemp("sharded")
    make_tiny(folder / "text")
    pictures = [make_picture(folder, i, 16 + 4 * i, 16) for i in range(2)]
    for kind in ("qwen3_vl", "qwen3_5", "text"):
        if kind != "text":
            make_seeing(folder / kind, kind, num_hidden_layers=4 if kind == "qwen3_5" else 3)
        rng = torch.Generator().manual_seed(0)
        chat = Chat.load(str(folder / kind), images=LIMITS, cache=PixelCache(1 << 20)) if kind != "text" else Chat.load(str(folder / kind))
        seen = tuple(pictures) if kind != "text" else ()
        steps = [
            [
                group(chat, "<image> what?" if seen else "what?", seen[:1], [1.0, 0.0, 0.0], rng),
                group(chat, "2 + 2", (), [1.0, 0.0], rng),
                group(chat, "why?", (), [0.0, 0.0], rng),
                group(chat, "3 + 3 + 3", (), [0.0, 1.0, 1.0], rng),
            ],
            [
                group(chat, "who is <image> or <image>?" if seen else "who?", seen, [1.0, 0.0, 1.0, 0.0], rng),
                group(chat, "1 + 1", (), [1.0, 0.0], rng),
                group(chat, "<image>" if seen else "that", seen[1:], [1.0, 0.0], rng),
            ],
        ]
        (folder / f"{kind}.pickle").write_bytes(pickle.dumps(steps))
    return folder


def assert_weights_near(ours: Path, theirs: Path, bound: float) -> None:
    one, other = weights_in(ours), weights_in(theirs)
    assert one.keys() == other.keys()
    worst = max((float((one[k] - other[k]).abs().max()), k) for k in one)
    assert worst[0] <= bound, worst
    assert all(value.dtype == torch.float32 for value in other.values())


@pytest.mark.long
@pytest.mark.parametrize("names", [("rates", "adapters"), ("frozen", "4 bits")], ids=" ".join)
def test_two_processes_with_shards_train_what_one_trains(names: tuple[str, ...], folder: Path, tmp_path: Path, victims: Victims) -> None:
    """Only one of them sees pictures, or has rows; memory runs out in the second one, on its way forward or back."""
    bits = importlib.util.find_spec("bitsandbytes") is not None
    tried = [case for case in CASES if case.name in names and (bits or not case.quantize) and not (case.full and why_no_retries())]
    status = victims.run(folder, *(case.name for case in tried), run=folder, call="sharded_worker:main", processes=2)
    assert status == 0, victims.said[-4000:]
    for case in tried:
        AcceleratorState._reset_state(True)
        out = tmp_path / case.name
        out.mkdir()
        alone: Any = train(case, ReplicatedWeights(), folder, pickle.loads((folder / f"{case.student}.pickle").read_bytes()), out)
        first, second = (pickle.loads((folder / case.name / f"{rank}.pickle").read_bytes()) for rank in (0, 1))
        for ours, theirs in zip(alone["metrics"], first["metrics"], strict=True):
            known = ours.keys() - {"train_tokens_computed", "tokens_per_microbatch"}
            assert_near({k: ours[k] for k in known}, {k: theirs[k] for k in known}, case.name)
        assert first["metrics"] == second["metrics"] and first["budget"] == second["budget"]
        if case.student != "text":
            assert first["looked"] != second["looked"]  # or the case is none
        if case.full:
            assert max(second["tried"]) > FITS >= second["tried"][-1] and first["budget"] <= FITS, second["tried"]
        for name in ("model", "whole"):
            assert_weights_near(out / name, folder / case.name / name, 2e-6)
        config = json.loads((folder / case.name / "whole" / "config.json").read_text())
        assert config["dtype"] == "float32" and "quantization_config" not in config
        own = torch.load(out / "optimizer.pt", weights_only=True)
        if (folder / case.name / "optimizer.pt").exists():
            state = torch.load(folder / case.name / "optimizer.pt", weights_only=True)
            assert own["state"].keys() == state["state"].keys() and len(own["param_groups"]) == len(state["param_groups"])
        else:  # a part of each process
            steps = json.loads((folder / case.name / "optimizer" / "steps.json").read_text())
            assert len(own["state"]) == len(steps) and set(steps.values()) == {float(next(iter(own["state"].values()))["step"])}
