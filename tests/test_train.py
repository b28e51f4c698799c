"""Whole runs on tiny models through the command line: files, determinism, kill and resume, every method."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from conftest import make_tiny
from same_run import assert_same_run, records
from zppo.cli import main
from zppo.config.methods import METHODS, RIVALS
from zppo.engines import logprobs

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def fresh_accelerate() -> None:
    """`accelerate` fixes its precision once per process; every run here stands for a process of its own."""
    AcceleratorState._reset_state(True)


def train(recipe: Path, output: Path, *overrides: str) -> Path:
    assert main(["train", str(recipe), f"--output={output}", *overrides]) == 0
    return output


@pytest.fixture(scope="module")
def finished(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The uninterrupted run."""
    AcceleratorState._reset_state(True)
    return train(recipe, tmp_path_factory.mktemp("runs") / "whole")


def test_a_run_leaves_its_files(finished: Path) -> None:
    steps = [r for r in records(finished) if r["event"] == "step"]
    assert [r["step"] for r in steps] == [1, 2, 3, 4, 5]
    assert [(r["event"], r["step"]) for r in records(finished) if r["event"] != "step"] == [
        ("eval", 0),
        ("eval", 2),
        ("eval", 4),
        ("final", 5),
    ]
    assert {"plain", "bcq", "ncq"} <= {kind for r in steps for kind in r["accuracy"]}
    assert all(0 <= r["bcq_prompts"] + r["ncq_prompts"] <= 4 for r in steps)
    assert sorted(p.name for p in (finished / "checkpoints").iterdir()) == ["step-000004", "step-000005"]
    recipe = yaml.safe_load((finished / "recipe.yaml").read_text(encoding="utf-8"))
    assert recipe["train"]["weight_decay"] == 0.1 and recipe["zone"]["threshold"] == 0.5  # defaults stand in it


def test_every_rollout_is_in_the_parquet_files(finished: Path) -> None:
    steps = [r for r in records(finished) if r["event"] == "step"]
    for record in steps:
        rows = pq.read_table(finished / "rollouts" / f"step-{record['step']:06d}.parquet").to_pylist()
        groups = 8 + record["replayed_questions"] + record["bcq_prompts"] + record["ncq_prompts"]
        assert len(rows) == 4 * groups
        for kind, accuracy in record["accuracy"].items():
            correct = [row["correct"] for row in rows if row["kind"] == kind]
            assert sum(correct) / len(correct) == pytest.approx(accuracy)
        for row in rows:
            assert row["prompt"].startswith("<|im_start|>user") and row["prompt"].count("boxed{}") >= 1
            assert (row["kind"] == "bcq") == ("correct_at" in json.loads(row["audit"]))
            assert 1 <= row["completion_tokens"] <= 12
        share = sum(row["advantage"] > 0 for row in rows) / len(rows)
        assert share == pytest.approx(record["positive_advantage_share"])


def test_every_completion_of_an_evaluation_is_kept(finished: Path) -> None:
    evaluations = {(r["event"], r["step"]): r for r in records(finished) if r["event"] != "step"}
    names = {f"{event}-{step:06d}.parquet": record for (event, step), record in evaluations.items()}
    assert {path.name for path in (finished / "held_out").iterdir()} == set(names)
    for name, record in names.items():
        rows = pq.read_table(finished / "held_out" / name).to_pylist()
        assert len(rows) == record["count"] and {row["step"] for row in rows} == {record["step"]}
        assert sum(row["correct"] for row in rows) / len(rows) == pytest.approx(record["accuracy"])
        assert sum(row["answer"] is None for row in rows) / len(rows) == pytest.approx(record["no_answer_share"])
        assert all(row["completion"] is not None and row["prompt"] and row["advantage"] is None for row in rows)


def undocumented(run: Path) -> set[str]:
    """Keys of metrics.jsonl that docs/runs.md does not name."""
    text = (Path(__file__).parents[1] / "docs" / "runs.md").read_text(encoding="utf-8")
    section = text.partition("## What metrics.jsonl counts")[2].partition("\n## ")[0]
    named = set(re.findall(r"`([\w<>*]+)`", section)) | {"step", "event"}
    patterns = [re.sub(r"<\w+>|\*", r"[\\w-]+", name) for name in named]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    keys = {key for line in lines for key in line}
    return {key for key in keys if not any(re.fullmatch(pattern, key) for pattern in patterns)}


def test_what_the_machine_was_like_is_in_the_log(finished: Path) -> None:
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    for line in lines:
        if line["event"] == "step":
            assert 0.05 < line["system"]["memory_gib"] < 1000 and line["system"]["memory_free_gib"] > 0
            assert torch.cuda.is_available() or not any(name.startswith("gpu") for name in line["system"])


def test_the_buffer_log_tells_the_buffer_s_story(finished: Path) -> None:
    held: dict[str, float] = {}
    for event in records(finished, "buffer.jsonl"):
        if event["event"] == "admitted":
            assert event["id"] not in held and event["entry_accuracy"] < 0.5 and event["visits"] == 0
            held[event["id"]] = event["entry_accuracy"]
        else:
            assert event["visits"] >= 1 and held.pop(event["id"]) == event["entry_accuracy"]
    assert len(held) == [r for r in records(finished) if r["event"] == "step"][-1]["buffer"]


def test_final_loads_with_transformers_and_differs_from_the_start(finished: Path, recipe: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(finished / "final")
    assert AutoTokenizer.from_pretrained(finished / "final").chat_template
    assert model.generation_config.eos_token_id == model.config.eos_token_id
    before = load_file(recipe.parent / "student" / "model.safetensors")
    after = load_file(finished / "final" / "model.safetensors")
    moved = sum(int((before[k] != after[k]).sum()) for k in before)
    assert moved > 0.9 * sum(v.numel() for v in before.values())
    card = (finished / "final" / "README.md").read_text(encoding="utf-8")
    assert "| all |" in card and "learning_rate: 0.001" in card and "library_name: transformers" in card


def test_a_run_without_steps_evaluates_once_and_says_the_same_of_its_end(recipe: Path, tmp_path: Path) -> None:
    run = train(recipe, tmp_path / "run", "--train.steps=0")
    before, after = records(run)
    assert (before.pop("event"), after.pop("event")) == ("eval", "final") and before == after
    assert [path.name for path in (run / "held_out").iterdir()] == ["eval-000000.parquet"]
    assert AutoModelForCausalLM.from_pretrained(run / "final")
    assert "| all |" in (run / "final" / "README.md").read_text(encoding="utf-8")


def test_two_runs_of_one_seed_are_identical_and_another_seed_differs(finished: Path, recipe: Path, tmp_path: Path) -> None:
    assert_same_run(finished, train(recipe, tmp_path / "again"))
    AcceleratorState._reset_state(True)
    other = train(recipe, tmp_path / "other", "--seed=1", "--train.steps=1")
    assert records(other)[1] != records(finished)[1]


def test_resume_without_a_checkpoint_starts_over_and_of_a_finished_run_does_nothing(
    finished: Path, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train(recipe, tmp_path / "run", "--train.checkpoint_every=0")
    before = records(run)
    (run / "final" / "README.md").unlink()
    AcceleratorState._reset_state(True)
    assert main(["resume", str(run)]) == 0
    assert records(run) == before
    stamp = (run / "metrics.jsonl").stat().st_mtime_ns
    assert main(["resume", str(run)]) == 0
    assert "finished already" in " ".join(capsys.readouterr().out.split())
    assert (run / "metrics.jsonl").stat().st_mtime_ns == stamp


def test_a_run_killed_at_the_very_end_says_its_result_once(finished: Path, tmp_path: Path) -> None:
    """After the last checkpoint and the evaluation of final/, before the model card."""
    run = Path(shutil.copytree(finished, tmp_path / "copy"))
    (run / "final" / "README.md").unlink()
    assert main(["resume", str(run)]) == 0
    assert [r["event"] for r in records(run)].count("final") == 1
    assert_same_run(finished, run)


@pytest.mark.parametrize("method", sorted(METHODS.keys() - {row.name for row in RIVALS}))  # theirs: tests/test_rivals.py
def test_every_method_trains(recipe: Path, tmp_path: Path, method: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Every row of the table through the command line: its kinds of prompts, its replay, its learner."""
    row = METHODS[method]
    run = train(recipe, tmp_path / method, f"--method={method}", "--train.steps=2", "--data.eval=null")
    steps = records(run)
    assert undocumented(run) == set()
    kinds = {kind for r in steps for kind in r["accuracy"]} - {"plain"}
    wanted = {f"placebo-{kind}" if row.control == "placebo" else kind for kind in row.reformulations}
    assert kinds <= wanted and (kinds == wanted or method in ("hint", "zppo-scrambled"))  # a random teacher writes no hint
    assert any(r["replayed_questions"] for r in steps) == row.replay
    assert all(r["optimizer_steps"] == (1 if row.distils else 4) and r["loss"] is not None for r in steps)
    if row.distils:
        assert all(0 < r["loss"] < 0.7 for r in steps)  # a divergence lies between 0 and log 2
    if row.teacher_response:
        assert sum(r["teacher_responses_in_groups"] for r in steps) > 0
        rows = pq.read_table(run / "rollouts" / "step-000001.parquet").to_pylist()
        given = [r for r in rows if r["reason"] == "teacher response"]
        assert given and all(r["correct"] and r["advantage"] > 0 for r in given)
    assert (run / "final" / "model.safetensors").exists()
    capsys.readouterr()
    assert main(["cost", str(run)]) == 0
    (scoring,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("teacher scoring"))
    assert (scoring.split()[2] != "0") == row.distils


def test_several_teachers_are_asked(recipe: Path, tmp_path: Path) -> None:
    second = f"--more_teachers=[{{model: {recipe.parent / 'student'}, rollout: {{max_new_tokens: 6}}}}]"
    run = train(recipe, tmp_path / "two", second, "--train.steps=1", "--data.eval=null")
    (step,) = records(run)
    assert step["teacher_rollouts"] == 2 * 4 * step["teacher_questions"]


def test_dynamic_sampling_leaves_trivial_groups_out_of_the_denominator(recipe: Path, tmp_path: Path) -> None:
    runs = []
    for mode in ("off", "after-reformulation"):
        AcceleratorState._reset_state(True)
        run = train(
            recipe, tmp_path / mode, f"--zone.dynamic_sampling={mode}", "--train.steps=1", "--data.eval=null", "--train.minibatches=1"
        )
        runs.append(records(run)[0])
    off, on = runs
    assert on["accuracy"] == off["accuracy"] and on["train_tokens_needed"] == off["train_tokens_needed"]
    assert on["nonzero_advantage_share"] == off["nonzero_advantage_share"] < 1
    assert 0 < off["groups_with_gradient"] < off["groups"] == off["rollouts"] / 4
    assert abs(on["loss"]) > abs(off["loss"])  # the same sum over fewer tokens


def test_distillation_needs_a_shared_tokenizer(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_tiny(tmp_path / "other", merges=100)
    assert main(["train", str(recipe), "--method=on-distill", f"--teacher.model={tmp_path / 'other'}", f"--output={tmp_path / 'run'}"]) == 2
    assert "must share a tokenizer" in " ".join(capsys.readouterr().err.split())


OWN = '''
from zppo.core.types import Draft

class Warning:
    """Names how many attempts went wrong."""

    kind = "warning"
    needs = frozenset({"wrong"})

    def draft(self, material, rng):
        return Draft(self.kind, material.question, {"count": len(material.wrong)}) if material.wrong else None
'''


def test_a_reformulation_of_one_s_own(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "own.py").write_text(OWN, encoding="utf-8")
    (tmp_path / "warning.jinja").write_text("{{ count }} attempts at this problem were wrong.", encoding="utf-8")
    method = f"--method={{name: zppo, reformulations: ['{tmp_path / 'own.py'}:Warning', bcq]}}"
    template = f"--prompts.warning={tmp_path / 'warning.jinja'}"
    run = train(recipe, tmp_path / "run", method, template, "--train.steps=2", "--data.eval=null")
    rows = pq.read_table(run / "rollouts" / "step-000001.parquet").to_pylist()
    assert any("attempts at this problem were wrong." in row["prompt"] for row in rows if row["kind"] == "warning")
    assert main(["train", str(recipe), method, f"--output={tmp_path / 'other'}"]) == 2
    assert "prompts.warning" in capsys.readouterr().err
    assert main(["train", str(recipe), "--method.reformulations=[no.such:Thing]", f"--output={tmp_path / 'other'}"]) == 2
    assert "no.such" in capsys.readouterr().err


def test_the_lazy_teacher_trains_the_same_student(recipe: Path, tmp_path: Path) -> None:
    """Equal prompts; the batches in which the teacher is asked differ, so its arithmetic may round differently: draws are the same."""
    lazy = train(recipe, tmp_path / "lazy", "--train.steps=2")
    AcceleratorState._reset_state(True)
    literal = train(recipe, tmp_path / "all", "--train.steps=2", "--teacher.ask=all")
    pair = zip(records(lazy), records(literal), strict=True)
    for ours, theirs in pair:
        if ours["event"] == "step":
            assert ours["teacher_rollouts"] <= theirs["teacher_rollouts"]
            assert ours["accuracy"] == theirs["accuracy"] and ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)


def test_bf16_trains_with_old_logprobs_of_its_own(recipe: Path, tmp_path: Path) -> None:
    run = train(recipe, tmp_path / "bf16", "--train.precision=bf16", "--train.steps=2", "--data.eval=null")
    weights = load_file(run / "final" / "model.safetensors")
    assert all(w.dtype == torch.float32 for w in weights.values())
    assert all(r["loss"] is not None and r["skipped_updates"] == 0 for r in records(run))


def test_a_model_that_rounds_shares_prompts_all_the_same(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether it can is tried in fp32: a real model's log-probs are up to half a nat apart in bf16, and no prompt would be shared."""
    agrees, seen = logprobs._agrees, set[torch.dtype]()

    def spied(model: PreTrainedModel, rounded: bool) -> bool:
        layer = next(module for module in model.modules() if isinstance(module, torch.nn.Linear))
        hook = layer.register_forward_hook(lambda _, __, out: seen.add(out.dtype))
        found = agrees(model, rounded)
        hook.remove()
        return found

    monkeypatch.setattr(logprobs, "_agrees", spied)
    run = train(recipe, tmp_path / "run", "--train.precision=bf16", "--method=grpo", "--train.steps=1", "--data.eval=null")
    assert seen == {torch.float32} and (run / "final").is_dir()


def test_a_run_folder_is_never_overwritten(finished: Path, recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(recipe), f"--output={finished}"]) == 2
    assert "zppo resume" in " ".join(capsys.readouterr().err.split())
    assert main(["train", str(recipe), f"--output={recipe.parent / 'student'}"]) == 2
    assert "is not empty" in capsys.readouterr().err


def test_nothing_is_written_before_the_checks_pass(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for override, told in (
        ("--student.model=/nowhere/at/all", "/nowhere/at/all"),
        ("--teacher.model=/nowhere/at/all", "/nowhere/at/all"),
        ("--rollout.max_new_tokens=5000", "context of 4096"),
        ("--data.max_prompt_tokens=3", "max_prompt_tokens"),
        ("--prompts.bcq=/nowhere.jinja", "/nowhere.jinja"),
        ("--grading.reward=nowhere.py:reward", "nowhere.py"),
    ):
        assert main(["train", str(recipe), f"--output={tmp_path / 'run'}", override]) == 2
        assert told in " ".join(capsys.readouterr().err.split()), override
        assert not (tmp_path / "run").exists()


def test_resume_of_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["resume", str(tmp_path)]) == 2
    assert "holds no run" in " ".join(capsys.readouterr().err.split())


RECIPES = Path(__file__).parents[1] / "recipes"


@pytest.mark.parametrize(("name", "level"), [("lab", "hard"), ("lab-reachable", "both")])
def test_the_lab_s_recipes_run_on_the_bundled_models(tmp_path: Path, name: str, level: str) -> None:
    """Three steps of each: the student knows the easy level and nothing harder, the teacher helps on what it fails."""
    run = train(RECIPES / f"{name}.yaml", tmp_path / name, "--train.steps=3", "--eval.every=0")
    before, *steps, after = records(run)
    assert before["by_level"]["easy"] >= 0.95 and before["by_level"][level] <= 0.02
    assert set(after["by_level"]) == set(before["by_level"])
    for step in steps:
        assert step["hard_questions"] > 16 and step["bcq_prompts"] + step["ncq_prompts"] == 16
        assert step["teacher_correct"] >= 0.9 * step["teacher_rollouts"] > 0  # the teacher knows
        assert step["compression_failed"] <= 0.1 * step["compression_asked"]
        assert step["logprob_gap_max"] < 1e-3
    prompts = {row["kind"]: row["prompt"] for row in pq.read_table(run / "rollouts" / "step-000003.parquet").to_pylist()}
    assert prompts["bcq"].count("<candidate>") == 2 and "wrong" in prompts["ncq"]


def test_the_recipe_to_copy_runs_with_any_student_and_teacher(recipe: Path, tmp_path: Path) -> None:
    models = [f"--{role}.model={recipe.parent / role}" for role in ("student", "teacher")]
    limits = [f"--{key}.max_new_tokens=8" for key in ("rollout", "eval", "teacher.rollout", "teacher.compression")]
    run = train(RECIPES / "my-data.yaml", tmp_path / "mine", *models, *limits, "--train.steps=2")
    assert [r["event"] for r in records(run)] == ["eval", "step", "step", "final"]
    assert (run / "final" / "tokenizer.json").exists()


def test_matrices_that_are_two_are_called_so_in_final(recipe: Path, tmp_path: Path) -> None:
    """A checkpoint may say that its embeddings are tied and hold two matrices that differ; what it leaves says what is there."""
    student = shutil.copytree(recipe.parent / "student", tmp_path / "student")
    config = json.loads((student / "config.json").read_text(encoding="utf-8"))
    (student / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}), encoding="utf-8")
    overrides = (f"--student.model={student}", "--train.steps=1", "--method=grpo", "--data.eval=", "--train.checkpoint_every=1")
    run = train(recipe, tmp_path / "run", *overrides)
    for folder in (run / "final", run / "checkpoints" / "step-000001" / "model"):
        assert json.loads((folder / "config.json").read_text(encoding="utf-8"))["tie_word_embeddings"] is False
        weights = load_file(folder / "model.safetensors")
        assert not torch.equal(weights["lm_head.weight"], weights["model.embed_tokens.weight"])
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        assert torch.equal(loaded.lm_head.weight, weights["lm_head.weight"].to(loaded.lm_head.weight.dtype))
    tied = make_tiny(tmp_path / "tied", tie_word_embeddings=True)
    kept = train(recipe, tmp_path / "kept", f"--student.model={tied}", *overrides[1:]) / "final"
    assert json.loads((kept / "config.json").read_text(encoding="utf-8"))["tie_word_embeddings"] is True
    assert "lm_head.weight" not in load_file(kept / "model.safetensors")
