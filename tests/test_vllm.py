"""vLLM as the student's engine, against a stand-in (tests/fake_vllm) that checks the calls and samples with the weights it was sent.

Real vLLM is run by `make test-vllm`; the stand-in is for faults, and for what must be counted.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import make_tiny, make_tokenizer
from zppo.cli import main
from zppo.config.settings import LoraSettings
from zppo.engines.base import Completion, SampleRequest, Sampling
from zppo.engines.logprobs import Row, completion_logprobs
from zppo.engines.vllm.vllm_colocate import Sampled
from zppo.engines.vllm.vllm_engine import VLLMEngine, open_vllm, require_vllm
from zppo.errors import EngineError, ModelError, SettingsError
from zppo.models.lora import add_adapters
from zppo.runs.log import read_lines

FAKE = Path(__file__).parent / "fake_vllm"
SMALL = ("--rollout.engine=vllm", "--rollout.batch_size=4", "--rollout.max_new_tokens=8", "--zone.rho_aug=1", "--data.eval_limit=2")


@pytest.fixture
def vllm() -> Iterator[ModuleType]:
    """The stand-in, importable as `vllm`."""
    environment = dict(os.environ)  # vLLM in a process sets RANK and its like
    sys.path.insert(0, str(FAKE))
    _forget()
    AcceleratorState._reset_state(True)
    yield importlib.import_module("vllm")
    sys.path.remove(str(FAKE))
    _forget()
    os.environ.clear()
    os.environ.update(environment)


def _forget() -> None:
    for name in [n for n in sys.modules if n.partition(".")[0] == "vllm"]:
        del sys.modules[name]


def records(run: Path, event: str) -> list[dict[str, Any]]:
    return [line for line in read_lines(run / "metrics.jsonl") if line["event"] == event]


def assert_holds(engine: Any, weights: Path) -> None:
    """Every parameter of the stand-in's model equals the saved one."""
    saved = load_file(weights / "model.safetensors")
    assert set(saved) == set(engine.model.by_name) and engine.model.unknown == 0
    assert all(torch.equal(saved[name], value) for name, value in engine.model.by_name.items())


# --- whole runs --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_measurement_with_vllm(vllm: ModuleType, recipe: Path, tmp_path: Path) -> None:
    """It samples with the student's weights, and is checked before anything is asked."""
    out = tmp_path / "measured.jsonl"
    options = [*SMALL, "--data.eval_limit=null", "--train.engine_tolerance=1e-5"]
    assert main(["data", "measure", str(recipe), "--n=3", "--sample=4", f"--out={out}", *options]) == 0
    (engine,) = vllm.ENGINES
    assert_holds(engine, recipe.parent / "student")
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == 4 and all(3 * row["student_accuracy"] in range(4) and row["mean_tokens"] <= 8 for row in rows)


@pytest.mark.slow
def test_a_run_with_vllm_in_its_process(vllm: ModuleType, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    options = [*SMALL, "--train.steps=2", "--train.engine_tolerance=1e-5", "--rollout.max_rows=64"]
    limits = ["--rollout.vllm.gpu_memory_utilization=0.4", "--rollout.vllm.max_model_length=1000", "--eval.every=0"]
    assert main(["train", str(recipe), f"--output={run}", *options, *limits]) == 0
    (engine,) = vllm.ENGINES
    assert engine.arguments["model"] == str(recipe.parent / "student")
    assert engine.arguments["gpu_memory_utilization"] == 0.4 and engine.arguments["max_num_seqs"] == 64
    assert engine.arguments["max_model_len"] == 1000 and engine.arguments["dtype"] == "float32"  # the trainer's
    steps = records(run, "step")
    assert {"plain", "bcq", "ncq"} <= {kind for s in steps for kind in s["accuracy"]}
    for step in steps:
        assert step["entropy"] is None  # vLLM does not tell
        assert step["engine_gap_mean"] < 1e-5 and step["logprob_gap_max"] < 1e-4  # fresh weights, right log-probs
        assert step["logprob_tokens"] > 0  # old log-probs are the trainer's own
        assert 0 < step["truncated_share"] <= 1
    assert_holds(engine, run / "final")
    assert engine.model.loads == (1 + 1 + 1) * len(engine.model.by_name)  # start, between the steps, what was saved
    assert engine.resets == engine.llm_engine.emptied == 3
    rollouts = [how for _, how in engine.calls if how.temperature == 1 and how.max_tokens == 8]
    assert len(rollouts) >= sum(step["rollouts"] for step in steps) and len({how.seed for how in rollouts}) > 0.8 * len(rollouts)
    assert all((how.top_p, how.top_k) == (1, 0) for how in rollouts)
    held_out = [how for _, how in engine.calls if how.temperature == 0.6]
    assert [(how.top_p, how.top_k, how.presence_penalty) for how in held_out] == [(0.95, 20, 1.5)] * 4  # two questions, twice
    assert engine.llm_engine.ended == 1 and not engine.llm_engine.waiting
    assert len(records(run, "eval")) == len(records(run, "final")) == 1
    assert main(["report", str(run), "--figures", "none"]) == 0


@pytest.mark.slow
def test_a_stale_vllm_stops_the_run(vllm: ModuleType, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The engine starts from the student's own weights and then never takes any."""
    vllm.FAULTS.add("deaf")
    run = tmp_path / "run"
    options = [*SMALL, "--data.eval=null", "--train.steps=4", "--train.learning_rate=1e-7"]
    assert main(["train", str(recipe), f"--output={run}", *options]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "the sampling engine does not hold the trainer's weights" in said and "zppo resume" in said
    done = len(records(run, "step"))
    assert done == 1  # after one update, however small
    assert (run / "checkpoints" / f"step-{done:06d}" / "model").is_dir()  # nothing that was learnt is lost


@pytest.mark.slow
def test_a_stale_vllm_goes_unnoticed_without_the_guard(vllm: ModuleType, recipe: Path, tmp_path: Path) -> None:
    vllm.FAULTS.add("deaf")
    options = [*SMALL, "--data.eval=null", "--train.steps=1", "--train.check_engine_every=0"]
    assert main(["train", str(recipe), f"--output={tmp_path / 'run'}", *options]) == 0
    (step,) = records(tmp_path / "run", "step")
    assert "engine_gap_mean" not in step


# --- what can go wrong at the start ------------------------------------------------------------------------------------


def start(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    """What a run says that cannot start; it leaves nothing."""
    assert main(["train", str(recipe), f"--output={tmp_path / 'run'}", "--rollout.engine=vllm", *options]) == 2
    assert not (tmp_path / "run").exists()
    return " ".join(capsys.readouterr().err.split())


def test_without_vllm_nothing_starts(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "constraints-vllm.txt" in start(recipe, tmp_path, capsys)
    with pytest.raises(SettingsError, match="vllm cannot be imported"):
        require_vllm()


@pytest.mark.slow
def test_vllm_that_does_not_start_says_why(vllm: ModuleType, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    vllm.FAULTS.add("no memory")
    said = start(recipe, tmp_path, capsys)
    assert "No available memory" in said and "gpu_memory_utilization" in said


# --- the engine --------------------------------------------------------------------------------------------------------


def colocated(vllm: ModuleType, folder: Path, **options: Any) -> tuple[VLLMEngine, Any, Any]:
    """(engine after a sync, the trainer's model, the stand-in)."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    more = {"eos_ids": [tokenizer.eos_token_id], "banned_ids": [], **options}
    engine = open_vllm(model, str(folder), Accelerator(cpu=True), **more)
    engine.sync()
    return engine, model, vllm.ENGINES[-1]


def requests(count: int, size: int, length: int = 6) -> list[SampleRequest]:
    return [SampleRequest(tuple(range(10 + i, 10 + i + length)), tuple(range(size))) for i in range(count)]


def test_logprobs_are_the_trainers_at_the_sampling_temperature(vllm: ModuleType, tiny_qwen3_dir: Path) -> None:
    """With banned ids and a temperature: what is returned is what a training forward with both computes."""
    engine, model, fake = colocated(vllm, tiny_qwen3_dir, banned_ids=[5, 6, 7])
    asked = requests(3, 4)
    done = engine.sample(asked, Sampling(temperature=0.7, max_new_tokens=8))
    assert [len(row) for row in done] == [4, 4, 4] and len(fake.calls) == 12
    for request, row in zip(asked, done, strict=True):
        rows = [Row(request.prompt_ids, c.ids) for c in row]
        with torch.no_grad():
            logprobs, mask = completion_logprobs(model, rows, temperature=0.7, banned_ids=[5, 6, 7])
        torch.testing.assert_close(torch.cat([c.logprobs for c in row]), logprobs[mask], atol=1e-4, rtol=0)
        assert all(math.isnan(c.entropy) and not {5, 6, 7} & set(c.ids.tolist()) for c in row)
    assert [tuple(ids) for ids, _ in fake.calls] == [r.prompt_ids for r in asked for _ in range(4)]
    how = fake.calls[0][1]
    assert how.logit_bias == {5: -100, 6: -100, 7: -100} and how.stop_token_ids == sorted(engine.eos_ids)


def test_sampling_settings_are_those_of_the_call(vllm: ModuleType, tiny_qwen3_dir: Path) -> None:
    engine, _, fake = colocated(vllm, tiny_qwen3_dir)
    how = Sampling(0.6, 0.9, 20, 0.05, 1.5, 1.1, 5)
    engine.sample(requests(1, 2), how)
    engine.sample(requests(1, 2), Sampling(temperature=0, max_new_tokens=3))
    first, other, second, _ = (call[1] for call in fake.calls)
    assert first.seed != other.seed  # the rollouts of a prompt
    assert (first.temperature, first.top_p, first.top_k, first.min_p) == (0.6, 0.9, 20, 0.05)
    assert (first.presence_penalty, first.repetition_penalty, first.max_tokens) == (1.5, 1.1, 5)
    assert first.logit_bias is None
    assert (second.temperature, second.top_p, second.top_k, second.max_tokens) == (0, 1, 0, 3)
    assert (second.presence_penalty, second.repetition_penalty) == (0, 1)


def test_truncation_and_the_end_token(vllm: ModuleType, tiny_qwen3_dir: Path) -> None:
    everything = range(30, 400)
    engine, _, _ = colocated(vllm, tiny_qwen3_dir, eos_ids=everything)
    (row,) = engine.sample(requests(1, 40), Sampling(max_new_tokens=3))
    ended = [c for c in row if int(c.ids[-1]) in everything]
    assert ended and all(not c.truncated for c in ended)
    cut = [c for c in row if int(c.ids[-1]) not in everything]
    assert all(c.truncated and len(c.ids) == 3 for c in cut)


def test_groups_of_unequal_size_and_prompts_near_the_context_keep_their_places(vllm: ModuleType, tmp_path: Path) -> None:
    folder = make_tiny(tmp_path / "short", max_position_embeddings=20)
    engine, _, fake = colocated(vllm, folder)
    asked = [requests(1, 2)[0], requests(1, 3, length=18)[0], requests(2, 2)[1]]
    done = engine.sample(asked, Sampling(max_new_tokens=4))
    assert [len(row) for row in done] == [2, 3, 2]
    assert all(len(c.ids) <= 2 for c in done[1]) and any(len(c.ids) > 2 for c in done[0] + done[2])
    assert [(len(ids), how.max_tokens) for ids, how in fake.calls] == [(6, 4)] * 2 + [(18, 2)] * 3 + [(6, 4)] * 2
    with pytest.raises(ModelError, match="context is 20"):
        engine.sample(requests(1, 1, length=20), Sampling(max_new_tokens=4))


def test_a_rollout_is_drawn_from_its_key_in_any_order_and_company(vllm: ModuleType, tiny_qwen3_dir: Path) -> None:
    engine, _, fake = colocated(vllm, tiny_qwen3_dir)
    how = Sampling(max_new_tokens=16)
    asked = [SampleRequest(tuple(range(10 + i, 16 + i)), (1 << 60, 77, i)) for i in range(3)]
    tokens = lambda requests: [[c.ids.tolist() for c in row] for row in engine.sample(requests, how)]  # noqa: E731
    found = tokens(asked)
    assert found == tokens(asked[::-1])[::-1] == [tokens([request])[0] for request in asked]
    assert all(first != second for first, second, _ in found)
    assert all(0 <= call.seed < 1 << 31 for _, call in fake.calls)


def test_what_has_ended_comes_before_the_rest_and_nothing_is_left_behind(vllm: ModuleType, tiny_qwen3_dir: Path) -> None:
    """A reader that goes away (a signal) leaves no request that the next call would find."""
    engine, _, fake = colocated(vllm, tiny_qwen3_dir)
    stream: Any = engine.stream(requests(1, 2), Sampling(top_k=9))
    first = next(stream)
    assert first[:2] in ((0, 0), (0, 1))
    stream.close()
    assert not fake.llm_engine.waiting
    assert [len(row) for row in engine.sample(requests(2, 3), Sampling(max_new_tokens=3))] == [3, 3]


def test_vllm_rests_during_updates_and_keeps_its_weights(vllm: ModuleType, tiny_qwen3_dir: Path) -> None:
    """Weights are sent once a step, however often vLLM sleeps."""
    engine, model, fake = colocated(vllm, tiny_qwen3_dir, enable_sleep_mode=True)
    for _ in range(2):  # two calls between updates, as in a step
        engine.sample(requests(2, 2), Sampling(max_new_tokens=3))
    assert fake.slept == 0
    engine.rest()
    engine.rest()
    assert fake.slept == 1 and fake.sleeping == {"weights", "kv_cache"}
    engine.sync()
    assert fake.sleeping == {"kv_cache"} and fake.model.loads == 2 * len(list(model.parameters()))
    engine.sample(requests(1, 1), Sampling(max_new_tokens=3))
    assert not fake.sleeping


def test_the_text_model_of_an_image_checkpoint_is_sent_under_its_names_on_disk(vllm: ModuleType, tmp_path: Path) -> None:
    """Qwen3.5: `transformers` takes `language_model` off the names, and vLLM passes over names that it does not know."""
    folder = make_image_checkpoint(tmp_path / "image")
    engine, model, fake = colocated(vllm, folder)
    assert any(name.startswith("model.language_model.") for name in fake.model.by_name)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    engine.sync()
    assert fake.model.unknown == 0
    theirs = dict(fake.model.network.named_parameters())
    assert all(torch.equal(value, theirs[name]) for name, value in model.named_parameters())


def test_adapters_are_sent_merged_and_the_frozen_weights_stay_as_they_are(vllm: ModuleType, tiny_qwen3_dir: Path) -> None:
    engine, model, fake = colocated(vllm, tiny_qwen3_dir)
    before = {name: value.clone() for name, value in model.named_parameters()}
    add_adapters(model, LoraSettings(rank=4), base="x")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(len(name)))
    engine.sync()
    assert fake.model.unknown == 0 and fake.model.loads == 2 * len(before)
    after = {n.replace(".base_layer", ""): v for n, v in model.named_parameters() if "lora" not in n}
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    (row,) = engine.sample(requests(1, 4), Sampling(max_new_tokens=8))
    with torch.no_grad():
        logprobs, mask = completion_logprobs(model, [Row(requests(1, 1)[0].prompt_ids, c.ids) for c in row])
    torch.testing.assert_close(torch.cat([c.logprobs for c in row]), logprobs[mask], atol=1e-4, rtol=0)
    moved = [name for name, value in fake.model.by_name.items() if not torch.equal(value, before[name])]
    assert len(moved) == 2 * 7  # every linear layer


def make_image_checkpoint(folder: Path) -> Path:
    """A tiny Qwen3.5 with an image tower, as it lies on the hub."""
    from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration

    tokenizer = make_tokenizer()
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "layer_types": ["linear_attention", "full_attention"],
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
    }
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
    Qwen3_5ForConditionalGeneration(Qwen3_5Config(text_config=text, vision_config=vision)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


class Says:
    """A vLLM that answers what it is told."""

    dtype = torch.float32

    def __init__(self, ids: list[int], logprobs: list[float | None] | None, prompt: tuple[int, ...] | None = (1,)) -> None:
        self.answer = Sampled(0, ids, logprobs, prompt, " at http://host:1")

    def load(self, weights: Any) -> None:
        raise AssertionError

    def run(self, draws: Any, how: Any) -> Iterator[Sampled]:
        yield self.answer

    def rest(self) -> None:
        raise AssertionError

    close = rest


def asked(driver: Any) -> Completion:
    engine = VLLMEngine(driver, torch.nn.Linear(1, 1), {}, [2], vocab_size=50, context=None)
    ((completion,),) = engine.sample([SampleRequest((1,), (0,))], Sampling(max_new_tokens=4))
    return completion


@pytest.mark.parametrize(
    ("answer", "error", "said"),
    [
        (([3, 2], None), EngineError, "2 tokens with 0 log-probs"),
        (([3, 2], [-1.0]), EngineError, "2 tokens with 1 log-probs"),
        (([], []), EngineError, "empty completion"),
        (([3, 4, 5, 6, 7], [-1.0] * 5), EngineError, "5 tokens, over the limit of 4"),
        (([3, 2, 4, 2], [-1.0] * 4), EngineError, "after an end token"),
        (([3, 4], [-1.0] * 2), EngineError, "after 2 of 4 tokens with token 4, which is no end token"),
        (([3, 50, 2], [-1.0] * 3), EngineError, "token ids 2 to 50"),
        (([-1, 2], [-1.0] * 2), EngineError, "token ids -1 to 2"),
        (([3, 2], [-1.0] * 2, (1, 1)), EngineError, "read one of 2 tokens"),
        (([3, 2], [-1.0] * 2, None), EngineError, "read no prompt"),
        (([3, 2], [-1.0, None]), ModelError, "not numbers"),
        (([3, 2], [-1.0, math.nan]), ModelError, "not numbers"),
        (([3, 2], [-1.0, -9999.0]), ModelError, "not numbers"),  # what vLLM's server makes of NaN
        (([3, 2], [-1.0, 0.5]), ModelError, "not numbers"),
    ],
)
def test_answers_that_are_none(answer: Any, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said) as caught:
        asked(Says(*answer))
    assert "http://host:1" in str(caught.value)


def test_an_answer_that_is_one() -> None:
    completion = asked(Says([3, 2], [-3.0, -0.5]))
    assert completion.ids.tolist() == [3, 2] and completion.logprobs.tolist() == [-3.0, -0.5] and not completion.truncated
    assert asked(Says([3, 4, 5, 6], [-1.0] * 4)).truncated


def test_a_revision_is_given_to_vllm_as_a_folder(monkeypatch: pytest.MonkeyPatch, tiny_qwen3_dir: Path) -> None:
    from zppo.config.model_settings import ModelSettings
    from zppo.train import assemble as student_engine

    asked: list[Any] = []
    monkeypatch.setattr(student_engine, "snapshot_download", lambda *a, **k: asked.append((a, k)) or "/snapshot")
    assert student_engine._checkpoint(ModelSettings(model="owner/name", revision="abc")) == "/snapshot"
    assert asked[0][0] == ("owner/name",) and asked[0][1]["revision"] == "abc"
    assert student_engine._checkpoint(ModelSettings(model="owner/name")) == "owner/name"
    assert student_engine._checkpoint(ModelSettings(model=str(tiny_qwen3_dir), revision="abc")) == str(tiny_qwen3_dir)
    assert len(asked) == 1
