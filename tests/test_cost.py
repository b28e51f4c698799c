"""The cost of a recipe and of a run: counted by hand, against the rollouts of a real run, and against the paper's table."""

from __future__ import annotations

import json
import struct
from collections import defaultdict
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from conftest import make_tiny
from zppo.cli import main
from zppo.config.recipe import load_recipe
from zppo.config.settings import Settings
from zppo.errors import CheckpointError, ModelError, SettingsError
from zppo.planning.dry_run import make_plan
from zppo.planning.flops import (
    HARD,
    MOST,
    SCALES,
    STEPS,
    TEACHER,
    Assumptions,
    TokensByPart,
    as_run,
    counted,
    nearest_scale,
    paper_costs,
    planned,
)
from zppo.planning.machine import Machine
from zppo.planning.model_shapes import count_parameters, nominal_size, parse_size, size_of
from zppo.planning.prompt_lengths import prompt_tokens
from zppo.rollout.data import load_questions_of

PAPER = [pytest.param(row, id=f"{row.method}-{row.scale}") for row in paper_costs()]
QUESTIONS = 76_800


def paper_settings(method: str | dict[str, Any] = "zppo", **sections: Any) -> Settings:
    """The paper's sizes, which are the defaults."""
    data = {"student": {"model": "m-2B"}, "teacher": {"model": "t-27B"}, "data": {"train": "none.jsonl"}, "method": method}
    return Settings.model_validate(data | sections)


def total(work: TokensByPart, student: float = 1.0, teacher: float = 0.0) -> float:
    return sum(work.flops(student, teacher).values())


# --- the convention -------------------------------------------------------------------------------------------------


def test_two_flops_a_token_forward_and_six_with_backward() -> None:
    work = TokensByPart(sampling=1, logprob=10, update=100, teacher=1000, compression=10_000, scoring=100_000, judge=1e6)
    assert work.flops(3.0, 5.0) == {
        "sampling": 2 * 3,
        "logprob": 2 * 3 * 10,
        "update": 6 * 3 * 100,
        "teacher": 2 * 5 * 1000,
        "compression": 2 * 5 * 10_000,
        "scoring": 2 * 5 * 100_000,
        "judge": 2 * 5 * 1e6,
    }
    assert (work + work).flops(3.0, 5.0) == work.times(2).flops(3.0, 5.0)


# --- plans ----------------------------------------------------------------------------------------------------------


def test_grpo_at_the_papers_sizes_is_ten_n_per_token() -> None:
    cost = planned(paper_settings("grpo"), QUESTIONS)
    rows = 200 * 384 * 8 * (4096 + 12_288)
    assert cost.steps == STEPS
    assert cost.literal == TokensByPart(sampling=rows, logprob=rows, update=rows)
    assert total(cost.literal, 2e9) == counted("GRPO", 2e9) == 10 * 2e9 * rows
    assert cost.saved.sampling == 200 * 384 * (4096 + 8 * 12_288)


def test_zppo_by_hand() -> None:
    """One step: 384 new and 96 replayed questions, 48 BCQ and 48 NCQ, a prompt of 100, rollouts of 1,000, teacher rollouts of 500."""
    assumed = Assumptions(prompt=100, completion=1000, teacher_completion=500, hard=0.5, solved=1.0, live=0.25)
    cost = planned(paper_settings(train={"steps": 1}), QUESTIONS, assumed)
    prompts = 480 * 100 + 48 * (100 + 2 * 512) + 48 * (100 + 8 * 512)
    sampled = 576 * 8 * 1000
    rows = 8 * prompts + sampled
    # 240 hard questions; the pre-cap keeps 96; each takes two slots, so lazily 48 are asked about.
    candidates = 8 * (1000 + 512) + (500 + 512)
    assert cost.literal == TokensByPart(rows, rows, rows, 240 * 4 * 600, 96 * candidates)
    assert cost.saved == TokensByPart(prompts + sampled, rows / 4, rows / 4, 48 * (100 + 4 * 500), 48 * candidates)


def test_questions_that_the_teacher_fails_on_leave_more_to_ask() -> None:
    """With half of them solved a question takes 1.5 slots: 64 are asked, 32 BCQ and 64 NCQ."""
    assumed = Assumptions(prompt=100, completion=1000, teacher_completion=500, hard=0.5, solved=0.5)
    half, none = (planned(paper_settings(train={"steps": 1}), QUESTIONS, replace(assumed, solved=share)).saved for share in (0.5, 0.0))
    assert half.teacher == 64 * (100 + 4 * 500)
    assert half.compression == 64 * (8 * 1512 + 0.5 * 1012)
    assert none.teacher == 96 * (100 + 4 * 500)


@pytest.mark.parametrize(
    ("method", "literal", "saved"),
    [("grpo", 0, 0), ("grpo-replay-ncq", 0, 0), ("grpo-replay-bcq", 480, 96), ("grpo-both", 384, 48), ("zppo", 480, 48)],
)
def test_who_is_asked_about_how_many_questions(method: str, literal: int, saved: int) -> None:
    cost = planned(paper_settings(method, train={"steps": 1}), QUESTIONS, Assumptions(prompt=4, teacher_completion=1))
    assert cost.literal.teacher == literal * 4 * (4 + 1)
    assert cost.saved.teacher == saved * (4 + 4 * 1)


@pytest.mark.parametrize(("need", "kind"), [("pair", "bcq"), ("wrong", "ncq"), ("hint", "hint"), ("prefix", "prefix")])
def test_a_reformulation_of_ones_own_costs_what_it_needs(need: str, kind: str, tmp_path: Path) -> None:
    module = tmp_path / "own.py"
    module.write_text(f"class Own:\n    kind = 'own'\n    needs = frozenset({{{need!r}}})\n    def draft(self, material, rng): ...\n")
    own, known = (paper_settings(method={"name": "zppo", "reformulations": [name]}) for name in (f"{module}:Own", kind))
    assumed = Assumptions(hard=0.5, solved=0.5, teacher_completion=500)
    ours, theirs = planned(own, QUESTIONS, assumed), planned(known, QUESTIONS, assumed)
    assert (ours.literal, ours.saved) == (theirs.literal, theirs.saved)
    assert make_plan(own, QUESTIONS) == make_plan(known, QUESTIONS)


@pytest.mark.parametrize(
    ("sections", "part", "same"),
    [
        ({"teacher": {"model": "t", "ask": "all"}}, "compression", True),
        ({"teacher": {"model": "t"}}, "compression", False),
        ({"train": {"old_logprobs": "forward"}}, "logprob", True),
        ({"train": {"old_logprobs": "sampler"}}, "logprob", False),
        ({"train": {"precision": "fp32"}}, "logprob", False),
        ({"train": {"device": "cpu"}}, "logprob", False),
        ({"train": {"precision": "fp32"}, "rollout": {"top_p": 0.9}}, "logprob", True),
        ({}, "logprob", True),
    ],
)
def test_settings_that_decide_what_is_saved(sections: dict[str, Any], part: str, same: bool) -> None:
    cost = planned(paper_settings(**sections), 384)
    assert (getattr(cost.literal, part) == getattr(cost.saved, part)) is same


def test_compression_off_costs_nothing() -> None:
    settings = paper_settings(teacher={"model": "t", "compression": {"enabled": False}})
    assert planned(settings, 384).literal.compression == 0


shares = st.floats(0, 1)


@given(shares, shares, shares, st.sampled_from(["grpo", "grpo-replay", "grpo-both", "grpo-replay-bcq", "grpo-replay-ncq", "zppo"]))
def test_savings_save_and_the_assumptions_only_lower(hard: float, solved: float, live: float, method: str) -> None:
    cost = planned(paper_settings(method), 5000, Assumptions(hard=hard, solved=solved, live=live))
    most = planned(paper_settings(method), 5000, MOST)
    for part, tokens in asdict(cost.saved).items():
        assert 0 <= tokens <= getattr(cost.literal, part) * (1 + 1e-9)
        if part != "compression":  # a teacher that fails leaves more questions to build
            assert getattr(cost.literal, part) <= getattr(most.literal, part) * (1 + 1e-9) or solved < 1


@pytest.mark.parametrize(
    ("values", "said"),
    [({"hard": 1.5}, "share hard is 1.5"), ({"live": -0.1}, "share live"), ({"completion": 0}, "mean length completion is 0")],
)
def test_assumptions_that_make_no_sense(values: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        Assumptions(**values)


# --- runs -----------------------------------------------------------------------------------------------------------


def record(**values: float) -> dict[str, Any]:
    zeros = dict.fromkeys(
        (
            "prompt_tokens student_tokens logprob_tokens train_tokens_needed train_tokens_computed hard_questions teacher_questions "
            "teacher_prompt_tokens teacher_completion_tokens compression_prompt_tokens compression_completion_tokens"
        ).split(),
        0,
    )
    return {"event": "step", "step": 1} | zeros | values


def test_a_log_by_hand() -> None:
    """Two steps of 8 rollouts a prompt: 400 prompt tokens are 50 read once; 40 questions would have been asked where 10 were."""
    step = record(
        prompt_tokens=400,
        student_tokens=1000,
        logprob_tokens=70,
        train_tokens_needed=700,
        train_tokens_computed=770,
        hard_questions=20,
        teacher_questions=5,
        teacher_prompt_tokens=30,
        teacher_completion_tokens=300,
        compression_prompt_tokens=80,
        compression_completion_tokens=8,
    )
    settings = paper_settings(rollout={"batch_size": 40})  # a cap of 10: Algorithm 1 builds twice as much
    cost = as_run(settings, [step, {"event": "eval", "step": 1}, step | {"step": 2}], Path("metrics.jsonl"))
    assert cost.saved == TokensByPart(2 * (50 + 1000), 140, 1400, 660, 176)
    assert cost.literal == TokensByPart(2800, 2800, 2800, 4 * (60 * 4 + 600), 2 * 176)
    assert cost.steps == 2
    assert cost.notes[0].startswith("Padding, not counted, adds 10.0%")
    assert "10 of 40 hard questions" in cost.notes[1]
    asked_all = as_run(paper_settings(teacher={"model": "t", "ask": "all"}), [step], Path("m"))
    assert asked_all.literal.teacher == 30 * 4 + 300
    assert asked_all.literal.compression == 88


def test_logs_that_cannot_be_counted() -> None:
    with pytest.raises(CheckpointError, match="holds no finished step"):
        as_run(paper_settings(), [{"event": "eval", "step": 0}], Path("metrics.jsonl"))
    broken = record(step=3)
    del broken["logprob_tokens"]
    with pytest.raises(CheckpointError, match="step 3: there is no number 'logprob_tokens'"):
        as_run(paper_settings(), [record(), broken], Path("metrics.jsonl"))


REWARD = """
import hashlib

def reward(completion, question):
    digest = hashlib.sha256((completion + question.id).encode("utf-8", "surrogatepass")).digest()[0]
    return {"correct": digest % 4 == 0, "reward": float(digest % 4 == 0), "answer": str(digest)}
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps on random models; old log-probs from a forward pass."""
    AcceleratorState._reset_state(True)
    folder = tmp_path_factory.mktemp("cost")
    make_tiny(folder / "student", seed=0)
    make_tiny(folder / "teacher", seed=1, num_hidden_layers=3)
    rows = [{"prompt": f"What is {i} plus {i * i}?", "answer": i} for i in range(8)]
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (folder / "reward.py").write_text(REWARD, encoding="utf-8")
    settings = {
        "student": {"model": "student"},
        "teacher": {"model": "teacher", "rollout": {"max_new_tokens": 6}, "compression": {"max_new_tokens": 6}},
        "data": {"train": "questions.jsonl"},
        "rollout": {"batch_size": 4, "group_size": 4, "max_new_tokens": 8},
        "zone": {"rho_aug": 0.5},
        "eval": {"max_new_tokens": 8},
        "train": {"steps": 2, "checkpoint_every": 0, "device": "cpu", "old_logprobs": "forward", "share_prompts": "off"},
        "grading": {"reward": "reward.py:reward"},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    assert main(["train", str(folder / "recipe.yaml"), f"--output={folder / 'run'}"]) == 0
    return folder / "run"


def test_a_run_is_counted_as_its_rollouts_say(finished: Path) -> None:
    settings = load_recipe(finished / "recipe.yaml")
    records = [json.loads(line) for line in (finished / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    cost = as_run(settings, records, finished / "metrics.jsonl")
    rows = [row for path in sorted((finished / "rollouts").glob("*.parquet")) for row in pq.read_table(path).to_pylist()]
    groups = defaultdict(list)
    for row in rows:
        groups[row["step"], row["kind"], row["question_id"]].append(row)
    live = sum(r["prompt_tokens"] + r["completion_tokens"] for r in rows if r["advantage"] != 0)
    everything = sum(r["prompt_tokens"] + r["completion_tokens"] for r in rows)
    once = sum(group[0]["prompt_tokens"] for group in groups.values())
    assert 0 < live < everything
    assert cost.saved.sampling == once + sum(r["completion_tokens"] for r in rows)
    assert cost.saved.update == cost.saved.logprob == live
    assert (cost.literal.sampling, cost.literal.logprob, cost.literal.update) == (everything,) * 3
    assert cost.literal.teacher > cost.saved.teacher > 0
    assert cost.saved.compression > 0


def test_zppo_cost_of_a_run(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cost", str(finished)]) == 0
    out = capsys.readouterr().out
    size = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(finished.parent / "student").parameters())
    assert f"cost of {finished}" in out.replace("\n", "")
    assert f": {size:,} parameters (from the headers of its weights)" in out
    assert "2 steps as run" in " ".join(out.split())
    assert main(["cost", str(finished), "--hard-share", "0.5"]) == 2
    assert "is a run, of which everything was measured" in capsys.readouterr().err


def test_a_moved_student_is_counted_in_final(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (finished / "recipe.yaml").read_text(encoding="utf-8")
    moved = tmp_path / "run"
    moved.mkdir()
    (moved / "recipe.yaml").write_text(text.replace(str(finished.parent / "student"), str(tmp_path / "gone")), encoding="utf-8")
    (moved / "metrics.jsonl").write_bytes((finished / "metrics.jsonl").read_bytes())
    assert main(["cost", str(moved)]) == 2
    assert "is not known: there is no such folder" in capsys.readouterr().err
    (moved / "final").symlink_to(finished / "final")
    assert main(["cost", str(moved)]) == 0


# --- the command on recipes -----------------------------------------------------------------------------------------


def test_zppo_cost_of_a_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(yaml.safe_dump(paper_settings("grpo").model_dump(mode="json")), encoding="utf-8")
    arguments = ["cost", str(recipe), "--questions", str(QUESTIONS)]
    assert main([*arguments]) == 0
    out = capsys.readouterr().out
    assert "2.01e20" in out  # 10 N per token at the limits
    assert "2,000,000,000 parameters (by its name)" in out
    assert "The paper's figure for GRPO at 2B: 5.60e20 FLOPs and 69 hours" in out
    assert main([*arguments, "--student-params", "4B", "--mean-completion", "100", "--mean-prompt", "28"]) == 0
    assert f"{10 * 4e9 * 614_400 * 128:.2e}".replace("e+", "e") in capsys.readouterr().out
    assert main([*arguments, "--set", "train.steps=2", "--set", "rollout.group_size=4"]) == 0
    assert "2 steps" in " ".join(capsys.readouterr().out.split())
    assert main([*arguments, "--set", "rollout.groupsize=4"]) == 2
    assert "rollout.group_size" in capsys.readouterr().err


def test_the_data_s_own_prompts_are_counted_and_the_machine_is_named(
    tiny_qwen3_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the data can be read; the dry run says the same lengths. What `auto` precision is follows the machine."""
    rows = [f"What is {i} plus {i}?,{2 * i}" for i in range(10)]
    (tmp_path / "mine.csv").write_text("prompt,answer\n" + "\n".join(rows) + "\n", encoding="utf-8")
    recipe = tmp_path / "mine.yaml"
    own = {"method": "grpo", "student": {"model": str(tiny_qwen3_dir)}, "data": {"train": "mine.csv"}, "train": {"steps": 1}}
    recipe.write_text(yaml.safe_dump(own | {"rollout": {"max_new_tokens": 64}}), encoding="utf-8")

    def said(*arguments: str) -> str:
        assert main([*arguments]) == 0
        return " ".join(capsys.readouterr().out.split())

    settings = load_recipe(recipe)
    lengths = prompt_tokens(settings, load_questions_of(settings).mixture.questions)
    for gpu, why in ((False, "exact in fp32: train.precision is auto, and this is counted for a CPU"), (True, "counted for a GPU")):
        monkeypatch.setattr("zppo.report.cost.find_machine", lambda device, gpu=gpu: Machine("it", gpu, 1 << 40))
        out = said("cost", str(recipe))
        assert f"plain prompts of {lengths.mean:,.0f} tokens (the data's have {lengths.mean:,.0f} on average" in out and why in out
    assert "plain prompts of 9 tokens, " in said("cost", str(recipe), "--mean-prompt", "9")
    assert "4,096 (the limit)" in said("cost", str(recipe), "--questions", "10")  # the data is not read
    assert f"the data's have {lengths.mean:,.0f} on average and {lengths.longest} at most" in said("train", str(recipe), "--dry-run")


def test_zppo_cost_without_a_target(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cost"]) == 2
    assert "needs a recipe or a run folder" in capsys.readouterr().err
    assert main(["cost", str(tmp_path)]) == 2
    assert "holds no run" in capsys.readouterr().err
    assert main(["cost", "--paper"]) == 0
    assert capsys.readouterr().out.count("ZPPO") == 4


# --- parameters -----------------------------------------------------------------------------------------------------


def test_parameters_from_headers_and_from_the_config_agree(tiny_qwen3_dir: Path, tmp_path: Path) -> None:
    true = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(tiny_qwen3_dir).parameters())
    assert count_parameters(tiny_qwen3_dir).parameters == true
    (tmp_path / "config.json").write_bytes((tiny_qwen3_dir / "config.json").read_bytes())
    found = count_parameters(tmp_path)
    assert (found.parameters, found.source) == (true, "from its config.json")


def test_shards_and_tied_weights_count_once(tiny_qwen3_dir: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_qwen3_dir, dtype=torch.float32)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    (tmp_path / "sharded" / "consolidated.safetensors").write_bytes(b"not read")
    assert count_parameters(tmp_path / "sharded").parameters == sum(p.numel() for p in model.parameters())
    tied = make_tiny(tmp_path / "tied", tie_word_embeddings=True)
    assert count_parameters(tied).parameters == sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(tied).parameters())


@pytest.mark.parametrize("content", [b"", b"\x01", struct.pack("<Q", 1 << 60), struct.pack("<Q", 2) + b"[]", struct.pack("<Q", 9) + b"{"])
def test_damaged_weights(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match="is no readable safetensors file"):
        count_parameters(tmp_path)


def test_folders_that_hold_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is no transformers checkpoint"):
        count_parameters(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "none of these"}', encoding="utf-8")
    with pytest.raises(ModelError, match="makes no model"):
        count_parameters(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ModelError, match="index.json cannot be read"):
        count_parameters(tmp_path)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("Qwen/Qwen3.5-0.8B", 0.8e9),
        ("owner/thing-27b-instruct", 27e9),
        ("SmolLM2-135M", 135e6),
        ("Qwen/Qwen3.5-35B-A3B", 3e9),
        ("owner-7B/student", None),
        ("abc3Bold", None),
    ],
)
def test_sizes_in_names(name: str, size: float | None) -> None:
    assert nominal_size(name) == size


def test_sizes_that_are_given() -> None:
    assert [parse_size(text) for text in ("0.8e9", "27B", "340m", "1000", "2.5 b")] == [0.8e9, 27e9, 340e6, 1000, 2.5e9]
    for text in ("", "big", "-3B", "0", "1e999"):
        with pytest.raises(SettingsError, match="is no number of parameters"):
            parse_size(text)
    assert size_of("anything", 5.0).parameters == 5
    with pytest.raises(ModelError, match="give it with --student-params"):
        size_of("owner/student")


# --- the paper ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", PAPER)
def test_the_papers_figures_are_those_of_full_lengths_and_four_updates(row: Any) -> None:
    """docs/cost.md: every figure of Tab. 9 within 14%, those of GRPO, its replay and ZPPO within 5%."""
    ratio = row.flops / counted(row.method, SCALES[row.scale], updates=4)
    near = 0.14 if "Distill" in row.method else 0.05
    assert abs(ratio - 1) < near


def test_grpos_figures_are_beyond_every_token_once() -> None:
    """2.7 to 2.9 times the most that a run of these sizes can use by 2N and 6N."""
    ratios = [row.flops / counted("GRPO", SCALES[row.scale]) for row in paper_costs() if row.method == "GRPO"]
    assert min(ratios) > 2.7 and max(ratios) < 2.9


def test_counts_agree_with_plans() -> None:
    """The table's own count and `planned` are two ways to the same figures."""
    for name, paper in (("grpo", "GRPO"), ("grpo-replay", "GRPO†")):
        assert total(planned(paper_settings(name), QUESTIONS).literal, 4e9) == pytest.approx(counted(paper, 4e9))
    for name, paper, solved in (("on-distill", "On-Distill", 1.0), ("off-distill-replay", "Off-Distill†", 0.62)):
        plan = planned(paper_settings(name), QUESTIONS, Assumptions(solved=solved))
        assert total(plan.literal, 4e9, TEACHER) == pytest.approx(counted(paper, 4e9))


@pytest.mark.parametrize("scale", SCALES)
def test_the_table_of_the_docs_is_what_plans_say(scale: str) -> None:
    text = (Path(__file__).parents[1] / "docs" / "cost.md").read_text(encoding="utf-8")
    line = next(line for line in text.split("## What follows")[1].splitlines() if line.startswith(f"| {scale} |"))
    grpo = planned(paper_settings("grpo"), QUESTIONS)
    zppo = planned(paper_settings(), QUESTIONS, Assumptions(hard=HARD))
    figures = [total(work, SCALES[scale], TEACHER) for work in (grpo.literal, zppo.literal, zppo.saved)]
    shown = [float(cell.split()[0]) for cell in line.strip("| ").split("|")[1:]]
    assert shown == pytest.approx(figures, rel=0.01)
    assert float(line.split("(")[1].split()[0]) == pytest.approx(figures[1] / figures[0], abs=0.06)


def test_scales() -> None:
    assert [nearest_scale(n) for n in (0.85e9, 2.2e9, 4.5e9, 9e9, 3e5, 27e9)] == ["0.8B", "2B", "4B", "9B", None, None]


def test_a_teacher_of_unknown_size_leaves_the_students_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def printed(*more: str) -> str:
        recipe = {"student": {"model": "m-2B"}, "teacher": {"model": "gpt-large"}, "data": {"train": "none.jsonl"}}
        (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
        assert main(["cost", str(tmp_path / "r.yaml"), "--questions=1000", *more]) == 0
        return capsys.readouterr().out

    def flops(text: str, part: str) -> list[str]:
        return next(line for line in text.splitlines() if line.startswith(part)).split()[-3:-1]

    unknown, known = printed(), printed("--teacher-params=27B")
    for part in ("student sampling", "forward and backward"):
        assert flops(unknown, part) == flops(known, part) and "?" not in flops(unknown, part)
    assert flops(unknown, "teacher rollouts") == ["?", "?"] != flops(known, "teacher rollouts")
    assert float(flops(unknown, "total")[0]) < float(flops(known, "total")[0])
    assert "The number of parameters of the teacher 'gpt-large' is not known" in unknown and "--teacher-params" in unknown
    assert "not known" not in known
