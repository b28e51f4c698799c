"""Whole runs on pictures: one batch with questions about text, decoded once, saved, stopped, resumed, and evaluated."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer, Qwen3VLForConditionalGeneration

from conftest import REWARD, make_tiny
from same_run import assert_same_run, records
from seeing import PIXELS, make_picture, make_seeing
from test_stopped_updates import nth_call_raises
from test_vllm import vllm  # noqa: F401 - a fixture
from victims import Victims
from zppo.cli import main
from zppo.config.recipe import load_recipe
from zppo.images import processor as sight_module
from zppo.images.store import open_image
from zppo.rollout.run_data import read_data
from zppo.runs import checkpoint
from zppo.step_log import StepLog
from zppo.train.mid_step import StepRollouts
from zppo.train.policy_gradient import PolicyGradient
from zppo.train.trainer import Trainer

Zppo = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve questions, two in three with a picture, a third of those with two; a student and a teacher that see."""
    folder = tmp_path_factory.mktemp("pictures")
    make_seeing(folder / "student", "qwen3_vl")
    make_seeing(folder / "teacher", "qwen3_vl", seed=1)
    pictures = [make_picture(folder, i, 16 + 8 * (i % 3), 16).uri for i in range(5)]
    rows: list[dict[str, Any]] = [{"prompt": f"What is {i} plus 1?", "answer": i + 1} for i in range(12)]
    for i, row in enumerate(rows):
        if i % 3 == 1:
            row["images"] = [pictures[i % 5]]
        elif i % 3 == 2:
            row |= {"images": [pictures[i % 5], pictures[(i + 1) % 5]], "prompt": f"<image> or <image>, and {i}?"}
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (folder / "reward.py").write_text(REWARD, encoding="utf-8")
    settings = {
        "student": {"model": "student"},
        "teacher": {"model": "teacher", "rollout": {"max_new_tokens": 4}, "compression": {"enabled": False}},
        "data": {"train": "questions.jsonl", "eval": "questions.jsonl", "eval_limit": 3, "images": PIXELS},
        "rollout": {"batch_size": 6, "group_size": 3, "max_new_tokens": 5},
        "zone": {"rho_aug": 0.5},
        "eval": {"max_new_tokens": 4, "every": 0},
        "train": {"steps": 2, "learning_rate": 1e-3, "device": "cpu", "keep_checkpoints": 9},
        "grading": {"reward": "reward.py:reward"},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    return folder / "recipe.yaml"


@pytest.fixture
def zppo(capsys: pytest.CaptureFixture[str]) -> Zppo:
    def run(*argv: object) -> tuple[int, str]:
        AcceleratorState._reset_state(True)
        status = main([str(a) for a in argv])
        said = capsys.readouterr()
        return status, " ".join((said.out + said.err).split())

    return run


@pytest.mark.slow
def test_a_run_decodes_every_picture_once_a_step_and_goes_on_where_it_was_stopped(
    zppo: Zppo, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, run, opened, steps = tmp_path / "whole", tmp_path / "run", list[str](), list[tuple[list[str], set[str]]]()
    step, update = Trainer.step, Trainer.update

    def counted(self: Trainer, number: int) -> StepLog:
        opened.clear()
        log = step(self, number)
        steps[-1][0].extend(opened)
        return log

    def collected(self: Trainer, found: StepRollouts, log: StepLog, *partial: Any) -> StepLog:
        steps.append(([], {image.sha256 for group in found.plain for image in group.question.images}))
        return update(self, found, log, *partial)

    with monkeypatch.context() as patch:
        patch.setattr(sight_module, "open_image", lambda ref: opened.append(ref.sha256) or open_image(ref))  # type: ignore[func-returns-value]
        patch.setattr(Trainer, "step", counted)
        patch.setattr(Trainer, "update", collected)
        assert zppo("train", recipe, f"--output={whole}")[0] == 0
    for decoded, shown in steps:  # student, teacher, BCQ, NCQ, both passes; `EngineCheck`'s picture stays from step to step
        assert len(decoded) == len(set(decoded)) and 0 <= len(shown - set(decoded)) <= 1 and set(decoded) <= shown
    lines = [r for r in records(whole) if r["event"] == "step"]
    assert all(r["logprob_gap_max"] <= 1e-5 and r["engine_gap_max"] <= 1e-5 for r in lines)
    assert sum(r["bcq_prompts"] + r["ncq_prompts"] for r in lines) > 0 and not any(r["teacher_unreachable"] for r in lines)

    with monkeypatch.context() as patch:
        nth_call_raises(patch, PolicyGradient, "_backward", 7)  # one micro-batch per update, four updates a step
        assert zppo("train", recipe, f"--output={run}")[0] == 2
    (stopped,) = [path for path in checkpoint.existing(run) if "+" in path.name]
    told = (stopped / "halfway.json").read_text(encoding="utf-8")
    assert ".png" in told and sum(f.stat().st_size for f in stopped.glob("halfway*")) < 60_000  # references, no pixels
    assert zppo("resume", run)[0] == 0
    assert_same_run(whole, run)

    final = whole / "final"
    model, report = cast(Any, AutoModelForImageTextToText.from_pretrained(final, dtype=torch.float32, output_loading_info=True))
    assert not report["missing_keys"] and AutoTokenizer.from_pretrained(final).chat_template
    assert AutoImageProcessor.from_pretrained(final, backend="pil").merge_size == 2
    before = load_file(recipe.parent / "student" / "model.safetensors")
    after = model.state_dict()
    assert all((before[name] != after[name]).any() for name in before if "blocks" in name and name.endswith("weight"))


SHORT = ["--train.steps=1", "--train.minibatches=1", "--train.checkpoint_every=1", "--data.eval=null"]


@pytest.mark.slow
def test_frozen_parts_have_no_optimizer_state_and_are_saved(zppo: Zppo, recipe: Path, tmp_path: Path) -> None:
    vision = ["--train.vision.freeze_tower=true", "--train.vision.projector_rate=0.5", "--method=grpo"]
    assert zppo("train", recipe, *SHORT, *vision, f"--output={tmp_path / 'run'}")[0] == 0
    before, after = (load_file(p / "model.safetensors") for p in (recipe.parent / "student", tmp_path / "run" / "final"))
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    tower = {name for name in before if "visual" in name and "merger" not in name}
    assert tower and not moved & tower and any("merger" in name for name in moved) and any("layers" in n for n in moved)
    (saved,) = checkpoint.existing(tmp_path / "run")
    state = torch.load(saved / "optimizer.pt", weights_only=True)
    assert [group["lr"] for group in state["param_groups"]] == [1e-3, 5e-4]
    assert len(state["state"]) == len(before) - len(tower)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["on-distill", "off-distill"])
def test_distillation_shows_pictures_to_both(method: str, zppo: Zppo, recipe: Path, tmp_path: Path) -> None:
    status, said = zppo("train", recipe, *SHORT, f"--method={method}", f"--output={tmp_path / 'run'}")
    assert status == 0, said
    (line,) = [r for r in records(tmp_path / "run") if r["event"] == "step"]
    assert line["loss"] > 0.01 and line["distilled_completions"] > 0


@pytest.mark.slow
def test_adapters_are_trained_beside_a_tower_that_stays(zppo: Zppo, recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert zppo("train", recipe, *SHORT, "--train.lora={}", "--method=grpo", f"--output={run}")[0] == 0
    adapted = load_file(run / "final" / "adapter" / "adapter_model.safetensors")
    assert adapted and not any("visual" in name for name in adapted)
    before, after = (load_file(p / "model.safetensors") for p in (recipe.parent / "student", run / "final"))
    assert all(torch.equal(before[n], after[n]) == ("layers" not in n or "norm" in n) for n in before)


@pytest.mark.slow
def test_a_teacher_that_reads_text_only_says_so_and_the_run_goes_on(zppo: Zppo, recipe: Path, tmp_path: Path, tiny_qwen3_dir: Path) -> None:
    run = tmp_path / "run"
    status, said = zppo("train", recipe, *SHORT, f"--teacher.model={tiny_qwen3_dir}", f"--output={run}")
    assert status == 0 and "this teacher reads text only" in said
    assert records(run)[0]["teacher_unreachable"] > 0


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["--student.model={text}"], "question 'questions.jsonl:2' has 1 image(s), and the student '{text}' reads text only"),
        (["--method=on-distill", "--teacher.model={text}"], "their vocabularies differ"),
        (["--data.images.min_pixels=9", "--data.images.max_pixels=8"], "min_pixels is 9, more than max_pixels"),
    ],
)
def test_what_cannot_be_is_refused_before_a_folder_is_made(
    overrides: list[str], said: str, zppo: Zppo, recipe: Path, tmp_path: Path, tiny_qwen3_dir: Path
) -> None:
    given = [o.replace("{text}", str(tiny_qwen3_dir)) for o in overrides]
    status, told = zppo("train", recipe, *given, f"--output={tmp_path / 'run'}")
    assert status == 2 and said.replace("{text}", str(tiny_qwen3_dir)) in told, told
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("vllm")
def test_vllm_is_shown_what_the_trainer_sees(zppo: Zppo, recipe: Path, tmp_path: Path) -> None:
    """The stand-in preprocesses the pictures by the checkpoint's own rules; its log-probs are the trainer's."""
    run, student = tmp_path / "run", Path(shutil.copytree(recipe.parent / "student", tmp_path / "student"))
    given = ["--rollout.engine=vllm", f"--student.model={student}", f"--output={run}", "--train.engine_tolerance=1e-5"]
    status, said = zppo("train", recipe, *SHORT, *given)
    assert status == 2 and "vLLM resizes images to the checkpoint's own 3136 to 1003520" in said
    file = student / "preprocessor_config.json"
    sizes = {"shortest_edge": 64, "longest_edge": 4096}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"size": sizes}))
    status, said = zppo("train", recipe, *SHORT, *given)
    assert status == 0, said
    (line,) = [r for r in records(run) if r["event"] == "step"]
    assert line["engine_gap_mean"] < 1e-5 and line["logprob_gap_max"] < 1e-4 and line["teacher_unreachable"] == 0


@pytest.mark.usefixtures("vllm")
def test_a_student_that_cannot_be_shown_images_is_refused_before_vllm_starts(
    zppo: Zppo, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(Qwen3VLForConditionalGeneration, "get_image_features")
    monkeypatch.setattr("zppo.train.assemble.start_vllm", lambda *_: pytest.fail("vLLM was started"))
    given = ["--rollout.engine=vllm", "--method=grpo", f"--output={tmp_path / 'run'}"]
    status, said = zppo("train", recipe, *SHORT, *given)
    assert status == 2 and "cannot be shown images here: its class computes no image features" in said, said


def test_a_dry_run_counts_images_and_finds_who_cannot_see_them(zppo: Zppo, recipe: Path, tiny_qwen3_dir: Path) -> None:
    status, said = zppo("train", recipe, "--dry-run")
    unbroken = said.replace(" ", "")  # a long path is broken anywhere
    assert status == 0 and "12from" in unbroken and "questions.jsonl,8withimages" in unbroken, said
    status, said = zppo("train", recipe, "--dry-run", f"--student.model={tiny_qwen3_dir}")
    assert status == 2 and "reads text only" in said
    status, said = zppo("train", recipe, "--dry-run", "--student.model=nobody/Qwen3.5-2B")  # not here: not known
    assert status == 0 and "8withimages" in said.replace(" ", "")


def test_the_recipe_s_limits_reach_the_models(recipe: Path) -> None:
    settings = load_recipe(recipe, ["--data.images.max_pixels=900", "--data.images.cache_gib=0.5"])
    seeing = read_data(settings).image_inputs
    assert seeing is not None and seeing.limits == (256, 900) and seeing.cache.most_bytes == 1 << 29


@pytest.mark.parametrize("template", [True, False])
def test_distillation_wants_two_that_see_alike(template: bool, zppo: Zppo, recipe: Path, tmp_path: Path) -> None:
    """The same tokenizer, but another patch size, or no eyes at all."""
    teacher = make_seeing(tmp_path / "teacher", "qwen3_vl")
    if template:
        file = teacher / "preprocessor_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"image_mean": [0.4] * 3}))
    else:
        make_tiny(teacher)
        make_seeing(tmp_path / "words", "qwen3_vl")
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (teacher / name).write_bytes((tmp_path / "words" / name).read_bytes())
        (teacher / "preprocessor_config.json").unlink(missing_ok=True)
    status, told = zppo("train", recipe, "--method=on-distill", f"--teacher.model={teacher}", f"--output={tmp_path / 'run'}")
    assert status == 2 and ("their image processors differ" if template else "the teacher reads text only") in told, told


@pytest.mark.slow
@pytest.mark.parametrize("sharding", [pytest.param("none", marks=pytest.mark.long), "fsdp2"])
def test_two_processes_look_at_their_own_pictures(sharding: str, zppo: Zppo, recipe: Path, tmp_path: Path, victims: Victims) -> None:
    """No pixels are sent; the numbers, the adapters and what they are merged into are those of one process."""
    alone, pair = tmp_path / "one", tmp_path / "two"
    adapters = "--train.lora={rank: 4, alpha: 8, targets: ['*layers.1.*', '*visual*']}"
    command = ("train", recipe, *SHORT, "--method=grpo", adapters)
    assert zppo(*command, f"--output={alone}")[0] == 0
    status = victims.run(*command, f"--train.sharding={sharding}", f"--output={pair}", run=pair, processes=2)
    assert status == 0, victims.said[-3000:]
    one, two = (next(r for r in records(run) if r["event"] == "step") for run in (alone, pair))
    for name in ("loss", "grad_norm", "entropy", "completion_tokens_mean", "train_tokens_needed"):
        assert one.get(name) == pytest.approx(two.get(name), rel=1e-4, abs=1e-6), name
    saved = "checkpoints/step-000001/model/adapter_model.safetensors"
    for name in (saved, "final/model*.safetensors", "final/adapter/adapter_model.safetensors"):  # sharded weights are in several files
        ours, theirs = ({k: v for file in run.glob(name) for k, v in load_file(file).items()} for run in (alone, pair))
        assert ours.keys() == theirs.keys() and max(float((ours[k] - theirs[k]).abs().max()) for k in ours) < 2e-5, name
    assert json.loads((alone / "final" / "config.json").read_text()) == json.loads((pair / "final" / "config.json").read_text())
