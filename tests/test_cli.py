"""The command line: what it prints, what it refuses, how fast it answers, and the plan of a dry run."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

import zppo
from zppo import cli
from zppo.config.bundled import recipe_names, recipes_folder
from zppo.config.help import known_keys
from zppo.config.methods import METHODS
from zppo.config.recipe import load_recipe
from zppo.config.settings import Settings
from zppo.errors import SettingsError
from zppo.planning.dry_run import Plan, TeacherPlan, make_plan

MY_DATA = Path(__file__).parents[1] / "recipes" / "my-data.yaml"


def make_recipe(folder: Path, questions: int = 10, **settings: Any) -> Path:
    data = "\n".join(json.dumps({"prompt": f"{i}?", "answer": i}) for i in range(questions))
    (folder / "train.jsonl").write_text(data, encoding="utf-8")
    recipe = {"student": {"model": "owner/student"}, "teacher": {"model": "owner/teacher"}, "data": {"train": "train.jsonl"}} | settings
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    status = cli.main(arguments)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def rows(text: str) -> dict[str, str]:
    """Name -> value of the two-column tables of a plan."""
    found = (re.split(r" {2,}", line.strip(), maxsplit=1) for line in text.splitlines())
    return {parts[0]: parts[1].strip() for parts in found if len(parts) == 2}


# --- errors and exit codes ------------------------------------------------------------------------------------------


def test_errors_of_the_user_are_one_block_and_status_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, "train", str(make_recipe(tmp_path)), "--train.lr=1", "--seed", "x")
    assert (status, out) == (2, "")
    assert err.startswith("Error: ")
    assert "train.lr is no setting (set on the command line); the nearest one is train.learning_rate" in err
    assert "seed: 'x' does not fit (set on the command line); expected integer >= 0 (keys every random draw)" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train"], "zppo train needs a recipe"),
        (["train", "--train.steps=1"], "zppo train needs a recipe"),
        (["train", "none.yaml"], "there is no recipe none.yaml"),
        (["train", "{recipe}", "--dry-run", "--data.train=none.jsonl"], "there is no such file"),
        (["train", "{recipe}", "--dry-run", "--prompts.bcq=none.jinja"], "none.jinja"),
        (["train", "{recipe}", "--dry-run", "--student.template=none.jinja"], "student.template: there is no file"),
        (["train", "{recipe}", "--dry-run", "--prompts.closing=answerline"], "(think-boxed, boxed, answer-line)"),
        (["train", "{recipe}", "--dry-run", "--prompts.closng=boxed"], "texts are called closing, bcq, ncq"),
        (["train", "{recipe}", "--dry-run", "--prompts.closng={recipe}"], "no prompt of this run is called 'closng'"),
        (["train", "{recipe}", "--dry-run", "--teacher.model=./none"], "teacher.model: "),
        (["train", "{recipe}", "--dry-run", "--grading.reward=none.py:f"], "there is no file"),
        (
            ["train", "{recipe}", "--dry-run", "--grading.reward=no_such_module:f"],
            "importing 'no_such_module' failed with ModuleNotFoundError",
        ),
        (["train", "{recipe}", "--dry-run", "--grading.reward=f"], "has no module and name"),
        (["train", "{recipe}", "--dry-run", "--data.train=lab:w"], "'lab:w' names no split"),
        (
            ["train", "{recipe}", "--dry-run", "--data.train=lob:w/train"],
            "'lob' is no source of questions (known: hub:, lab:, reasoning_gym:)",
        ),
        (["train", "{recipe}", "--train.steps", "--dry-run"], "--train.steps has no value"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str) -> None:
    recipe = str(make_recipe(tmp_path))
    status, _, err = run(capsys, *(a.replace("{recipe}", recipe) for a in arguments))
    assert status == 2
    assert said in err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"a\n{{ x }", "mine.jinja, line 2: the chat template cannot be parsed"),
        (b"\xe9", "mine.jinja cannot be read: 'utf-8' codec"),
        (b" \n", "mine.jinja is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "mine.jinja is a git-lfs pointer"),
        (b"{% for m in messages %}{%- generation %}{% if m.a %}{% break %}{% endif %}{% endgeneration %}{% endfor %}", ""),
    ],
)
def test_a_chat_template_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: bytes, said: str) -> None:
    (tmp_path / "mine.jinja").write_bytes(text)
    assert cli.main(["train", "lab", "--dry-run", f"--student.template={tmp_path / 'mine.jinja'}"]) == (2 if said else 0)
    assert said in capsys.readouterr().err


def test_broken_templates_are_found_before_anything_is_loaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "broken.jinja").write_text("{% if %}", encoding="utf-8")
    status, _, err = run(capsys, "train", str(make_recipe(tmp_path, prompts={"bcq": "broken.jinja"})))
    assert status == 2
    assert "broken.jinja" in err


def test_a_defect_shows_its_traceback_and_an_interruption_does_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(error: BaseException) -> Any:
        def methods(options: object) -> None:
            raise error

        return methods

    monkeypatch.setattr(cli.train_commands, "_methods", fail(KeyError("defect")))
    status, _, err = run(capsys, "methods")
    assert status == 1
    assert "Traceback" in err and "defect" in err
    monkeypatch.setattr(cli.train_commands, "_methods", fail(KeyboardInterrupt()))
    status, _, err = run(capsys, "methods")
    assert (status, err) == (130, "interrupted\n")
    monkeypatch.setattr(cli.train_commands, "_methods", fail(SettingsError("a [bold]value[/bold]")))
    status, _, err = run(capsys, "methods")
    assert (status, err) == (2, "Error: a [bold]value[/bold]\n")


# --- what runs ------------------------------------------------------------------------------------------------------


def test_train_and_resume_reach_the_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    calls: list[tuple[Any, ...]] = []
    stand_in: Any = types.ModuleType("zppo.train.run")
    stand_in.train = lambda settings, name, console, stop: calls.append((settings, name)) or tmp_path
    stand_in.resume = lambda folder, console, stop, addresses: calls.append((folder,)) or tmp_path
    monkeypatch.setitem(sys.modules, "zppo.train.run", stand_in)
    assert run(capsys, "train", "--train.steps", "3", str(make_recipe(tmp_path)), "--seed=5")[0] == 0
    assert run(capsys, "resume", "runs/x")[0] == 0
    (settings, name), (folder,) = calls
    assert (settings.train.steps, settings.seed, name) == (3, 5, "mine")
    assert folder == Path("runs/x")


@given(st.lists(st.sampled_from(["r.yaml", "--dry-run", "--for-gpu=24", "--a.b=1", "--c"]), max_size=6))
def test_overrides_are_parted_from_the_rest(tokens: list[str]) -> None:
    ours, overrides = cli.split_overrides(["train", *tokens])
    assert sorted([*ours, *overrides]) == sorted(["train", *tokens])
    assert not {"--dry-run", "--for-gpu=24"} & set(overrides) and "--a.b=1" not in ours and "--c" not in ours
    assert ours.count("--dry-run") == tokens.count("--dry-run")


def test_methods_lists_the_table(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    status, out, _ = run(capsys, "methods")
    assert status == 0
    lines = {line.split()[0]: line for line in out.splitlines() if line}
    for method in METHODS.values():
        assert method.paper in lines[method.name] and method.gradient in lines[method.name]
        assert ("yes" in lines[method.name].split()) == method.replay
    assert "advantages of the rows of the paper that do not distil: two-step, Eqs. 2-3." in out
    assert "advantages of luffy: reward - group mean." in out


@pytest.mark.parametrize("width", ["40", "80", pytest.param("120", marks=pytest.mark.long)])
def test_lists_break_no_word(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, width: str) -> None:
    monkeypatch.setenv("COLUMNS", width)
    words = set(run(capsys, "methods")[1].split())
    for method in METHODS.values():
        assert set(f"{method.name} {method.gradient} {method.paper}".split()) <= words
    words = set(run(capsys, "recipes")[1].split())
    models = {load_recipe(recipes_folder() / f"{name}.yaml").student.model for name in recipe_names()}
    assert {*recipe_names(), *(model.rpartition("/")[2] for model in models if not model.startswith("lab:"))} <= words


def test_a_slip_is_told_what_it_resembles(capsys: pytest.CaptureFixture[str]) -> None:
    assert "there is no --dry-runn; the nearest one is --dry-run" in run(capsys, "train", "lab", "--dry-runn")[2]
    assert "the nearest one that comes with zppo is lab;" in run(capsys, "train", "labb", "--dry-run")[2]
    assert run(capsys, "train", "lab", "--dry-run", "--method=grop")[2].splitlines()[1].endswith("; the nearest one is grpo")


@pytest.mark.parametrize("given", ["teacher.base_urls=", "teacher.base_urls=null", "data.filters=", "train.trackers=null"])
def test_an_empty_list_may_be_left_empty(given: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "train", str(MY_DATA), "--dry-run", f"--{given}")[0] == 0


@pytest.mark.parametrize("width", ["50", pytest.param("80", marks=pytest.mark.long)])
@pytest.mark.parametrize("command", [["cost", "lab"], ["cost", "--paper"], ["train", "lab", "--dry-run"]])
def test_no_number_is_cut(command: list[str], width: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    numbers = {word for word in run(capsys, *command)[1].split() if re.fullmatch(r"[\d.,]+(e\d+|%)?", word)}
    monkeypatch.setenv("COLUMNS", width)
    assert len(numbers) > 20 and numbers <= set(run(capsys, *command)[1].split())


def test_resume_takes_no_settings(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--train.steps=20"], ["--train.steps", "20"]):
        status, _, err = run(capsys, "resume", "runs/mine", *words)
        assert status == 2 and "zppo resume takes no settings (--train.steps" in err
        assert "runs/mine/recipe.yaml. Edit them there: train.steps and epochs" in err


def test_help_of_train_lists_every_setting_after_the_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["train", "--help"])
    out = capsys.readouterr().out
    assert caught.value.code == 0
    assert out.startswith("usage: zppo train RECIPE [--dry-run [--for-gpu=GB]] [--key=value ...]")
    assert all(f" {key.name}" in out for key in known_keys().values())
    assert out.index("--dry-run  ") < out.index("train.learning_rate")


def test_lab_questions_and_errors(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "lab", "questions", "--world", "unreachable", "--level", "2", "--n", "3")
    assert status == 0
    assert len(out.splitlines()) == 3
    assert run(capsys, "lab", "questions", "--world", "nowhere")[0] == 2


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=60, env={**os.environ, "COLUMNS": "100"})


def test_version_of_the_module() -> None:
    done = python("-m", "zppo", "--version")
    assert (done.returncode, done.stdout) == (0, f"zppo {zppo.__version__}\n")
    assert python("-m", "zppo").returncode == 2


@pytest.mark.slow
def test_dry_run_errors_and_help_never_import_torch(tmp_path: Path) -> None:
    script = (
        "import sys, runpy; from zppo.cli import main\n"
        "try: status = main(sys.argv[1:])\n"
        "except SystemExit as end: status = end.code\n"
        "heavy = {'torch', 'transformers', 'accelerate'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else status)\n"
    )
    recipe = str(make_recipe(tmp_path))
    for arguments, status in ((["train", recipe, "--dry-run"], 0), (["train", recipe, "--x=1"], 2), (["train", "--help"], 0)):
        done = python("-c", script, *arguments)
        assert done.returncode == status, done.stderr


# --- the plan -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [["--for-gpu=24"], ["--for-gpu", "24"], ["--for-gpu=24GB", "--train.device=auto"]])
def test_a_run_is_planned_for_a_gpu_that_is_not_here(
    given: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "150")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    asked = ["train", str(MY_DATA), "--dry-run"]
    here, there = run(capsys, *asked)[1], run(capsys, *asked, *given)[1]
    assert "(RAM, as no GPU was found; " in here.replace(", as much as the control group may have", "") and "--for-gpu=24 plans for" in here
    assert "of 22.4 GiB (a GPU of 24 GB)" in there and "bf16 copy of the weights" in there and "--for-gpu" not in there
    assert "for-gpu" not in run(capsys, *asked, "--train.device=cpu")[1] + run(capsys, "train", "lab", "--dry-run")[1]


def test_a_gpu_to_plan_for_has_a_size(capsys: pytest.CaptureFixture[str]) -> None:
    for wrong in ("x", "0", "-1", "nan", "inf", "24GiB", "24564"):
        with pytest.raises(SystemExit):
            cli.main(["train", str(MY_DATA), "--dry-run", f"--for-gpu={wrong}"])
        assert f"{wrong!r} is no size of a GPU in gigabytes, such as 24 or 80" in capsys.readouterr().err
    assert "give it with --dry-run" in run(capsys, "train", str(MY_DATA), "--for-gpu=80")[2]
    assert "leave one of them out" in run(capsys, "train", str(MY_DATA), "--dry-run", "--for-gpu=80", "--train.device=cpu")[2]


def test_dry_run_of_a_control_prints_its_mark(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "150")
    status, out, _ = run(capsys, "train", str(MY_DATA), "--dry-run", "--method=zppo-placebo")
    assert status == 0
    assert rows(out)["method"].startswith("zppo-placebo ([zppo]): replay on")


def test_dry_run_of_the_recipe_to_copy(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "150")
    status, out, _ = run(capsys, "train", str(MY_DATA), "--dry-run")
    assert status == 0
    plan = rows(out)
    assert plan["method"] == "zppo (ZPPO, Alg. 1): replay on, learns from plain groups + BCQ + NCQ"
    assert plan["training questions"].startswith("12 from ")
    assert plan["held-out questions"].startswith("4 from ")
    assert plan["steps"] == "6 (2 epochs)"
    assert plan["optimizer steps"] == "24 (4 per step)"
    assert (plan["new questions"], plan["replayed questions"], plan["reformulated prompts"], plan["prompts"]) == ("4", "2", "2", "8")
    assert plan["rollouts"] == "64 (8 per prompt)"
    assert plan["files"] == "runs/my-data-<date>-<time>"
    assert plan["lazy"].split() == ["8", "32,768", "20", "10,240", "<-", "this", "run"]
    assert plan["all"].split() == ["24", "98,304", "24", "12,288"]


def test_dry_run_looks_at_the_students_context(
    tmp_path: Path, tiny_qwen3_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "250")
    folder = Path(shutil.copytree(tiny_qwen3_dir, tmp_path / "student"))
    config = json.loads((folder / "config.json").read_text())
    asked = ["train", str(make_recipe(tmp_path)), "--dry-run", f"--student.model={folder}", "--data.max_prompt_tokens=100"]
    for written in (
        config | {"max_position_embeddings": 512},
        {**config, "max_position_embeddings": None, "text_config": {"max_position_embeddings": 512}},
    ):
        (folder / "config.json").write_text(json.dumps(written))
        status, out, err = run(capsys, *asked, "--rollout.max_new_tokens=512")
        assert status == 2 and f"rollout.max_new_tokens is 512, and the context of '{folder}' holds 512 tokens" in err
        status, out, _ = run(capsys, *asked, "--rollout.max_new_tokens=413")
        assert status == 0 and rows(out)["student's context"].startswith("512 tokens, 413 of them for rollout.max_new_tokens")
        assert "more than 99; data.max_prompt_tokens=99 drops such questions" in rows(out)["student's context"]
        status, out, _ = run(capsys, *asked, "--rollout.max_new_tokens=412")
        assert status == 0 and "student's context" not in rows(out)


def test_dry_run_leaves_nothing_behind(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "150")
    recipe = make_recipe(tmp_path, output="runs/here", method="grpo", teacher=None)
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    status, out, _ = run(capsys, "train", str(recipe), "--dry-run")
    assert status == 0
    assert sorted(tmp_path.rglob("*")) == before
    assert rows(out)["files"] == "runs/here"
    assert rows(out)["teacher"] == "not needed"
    assert "asked of the teacher" not in out


def settings_of(**parts: Any) -> Settings:
    base = {"student": {"model": "s"}, "teacher": {"model": "t"}, "data": {"train": "x"}}
    return Settings.model_validate(base | parts)


def test_the_paper_in_numbers() -> None:
    """method.md sections 2 and 3: 384 + 96 + 96 prompts, 8 rollouts each; 200 steps of 384 questions are the corpus of 77,000."""
    plan = make_plan(settings_of(), 76_800, 100)
    assert (plan.batch, plan.replayed, plan.reformulated, plan.prompts) == (384, 96, 96, 576)
    assert (plan.rollouts, plan.completion_tokens) == (4608, 4608 * 12_288)
    assert (plan.steps, plan.epochs, plan.optimizer_steps) == (200, 1.0, 4)
    assert plan.evaluations == 2 + 3  # before, after 50, 100, 150, and at the end
    # Literally: all 480 questions are hard; lazily: at worst every one of the 96 under the cap.
    assert plan.literal == TeacherPlan(rollouts=480 * 4, compressions=96 * (8 + 4))
    assert plan.lazy is not None and plan.lazy.rollouts == 96 * 4
    assert plan.lazy.compressions == 96 * 8


@pytest.mark.parametrize(
    ("method", "replayed", "reformulated", "rollouts", "compressions"),
    [
        ("grpo", 0, 0, None, None),
        ("grpo-replay", 2, 0, None, None),
        ("grpo-both", 0, 2, 8, 20),
        ("grpo-replay-bcq", 2, 2, 8, 2 * (4 + 4)),
        ("grpo-replay-ncq", 2, 2, 0, 2 * 8),
        ("zppo", 2, 2, 8, 20),
    ],
)
def test_plans_of_the_methods(method: str, replayed: int, reformulated: int, rollouts: int | None, compressions: int | None) -> None:
    plan = make_plan(settings_of(method=method, rollout={"batch_size": 8}), 100)
    assert (plan.batch, plan.replayed, plan.reformulated) == (8, replayed, reformulated)
    asked = plan.lazy and (plan.lazy.rollouts, plan.lazy.compressions)
    assert asked == (None if rollouts is None else (rollouts, compressions))


def test_without_compression_nothing_is_compressed() -> None:
    plan = make_plan(settings_of(teacher={"model": "t", "compression": {"enabled": False}}), 1000)
    assert plan.lazy is not None and plan.lazy.compressions == 0 and plan.lazy.rollouts > 0


def test_steps_and_small_data() -> None:
    plan = make_plan(settings_of(train={"steps": 30}), 10)
    assert (plan.batch, plan.replayed, plan.steps, plan.epochs) == (10, 0, 30, 30.0)
    nothing = make_plan(settings_of(train={"steps": 0}), 10, 5)
    assert (nothing.steps, nothing.epochs, nothing.evaluations) == (0, 0.0, 2)


@given(st.integers(1, 2000), st.integers(1, 400), st.sampled_from(list(METHODS)), st.floats(0, 1.5), st.integers(1, 8), st.integers(2, 16))
def test_bounds_hold_for_any_sizes(questions: int, batch: int, method: str, rho: float, teacher: int, group: int) -> None:
    settings = settings_of(
        method=method,
        rollout={"batch_size": batch, "group_size": group},
        zone={"rho_aug": rho, "rho_replay": rho, "teacher_group_size": teacher},
    )
    plan: Plan = make_plan(settings, questions)
    assert plan.batch + plan.replayed <= questions
    assert plan.reformulated <= rho * plan.batch + 1e-6
    assert plan.rollouts == plan.prompts * group
    if plan.lazy and plan.literal:
        assert plan.lazy.rollouts <= plan.literal.rollouts
        assert plan.lazy.compressions <= plan.literal.compressions


# --- what the dry run finds -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("closing", "{{ 1 / 0 }}"),
        ("bcq", "{{ candidates[2].text }}"),
        ("bcq", "{{ candidates | no_such_filter }}"),
        ("ncq", "{{ answers[0].strip() }}"),
        ("ncq", "{% for c in candidates %}{{ c.words }}{% endfor %}"),
        ("compression", "{{ response }}{% if not has_answer %}{{ response.shorten() }}{% endif %}"),
        ("judge", "{{ question }} {{ gold + 1 }} {{ completion }}"),
        ("hint", "{{ hint.text.lower() }}"),
        ("hinting", "{{ question }} {{ response | int / 0 }}"),
    ],
)
def test_a_template_that_cannot_be_filled(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, text: str) -> None:
    (tmp_path / "mine.jinja").write_text(f"Well:\n{text}\n", encoding="utf-8")
    status, _, err = run(capsys, "train", str(make_recipe(tmp_path, prompts={name: "mine.jinja"})), "--dry-run")
    assert status == 2
    assert "mine.jinja, line 2: the template" in err or "cannot be parsed" in err


REFORMULATION = """
from zppo.core.types import Draft

class Warn:
    kind = "warn"
    needs = frozenset({"wrong"})

    def draft(self, material, rng):
        return Draft(self.kind, material.question, {"count": len(material.wrong)}) if material.wrong else None
"""


@pytest.mark.parametrize(
    ("text", "status", "said"),
    [
        ("{{ count }} were wrong.", 0, ""),
        ("{{ counts }} were wrong.", 2, "warn.jinja, line 1: the template 'warn' cannot be filled: 'counts' is undefined"),
        (None, 2, "the method asks again with 'warn', which has no template: add prompts.warn to the recipe"),
    ],
)
def test_the_template_of_a_reformulation_of_ones_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str | None, status: int, said: str
) -> None:
    (tmp_path / "warn.py").write_text(REFORMULATION, encoding="utf-8")
    (tmp_path / "warn.jinja").write_text(text or "", encoding="utf-8")
    prompts = {} if text is None else {"warn": "warn.jinja"}
    recipe = make_recipe(tmp_path, method={"name": "zppo", "reformulations": [f"{tmp_path / 'warn.py'}:Warn"]}, prompts=prompts)
    found, _, err = run(capsys, "train", str(recipe), "--dry-run")
    assert found == status and said in err


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("a #1", "a #1"),
        ("#1", "#1"),
        ("a#1", "a#1"),
        ("a #1 # 2", "a #1 # 2"),
        ("'a #1'", "a #1"),
        ('"a #1 \\\\#"', "a #1 \\#"),
        ("[a #1, 'b #2']", ["a #1", "b #2"]),
        ("{a: b #1, '#k': 2}", {"a": "b #1", "#k": 2}),
        ("3", 3),
        ("####", "####"),
    ],
)
def test_a_hash_on_the_command_line_is_part_of_the_value(value: str, expected: Any) -> None:
    from zppo.config.recipe import parse_overrides

    assert parse_overrides([f"--a.b={value}", "--c", value]) == [("a.b", expected), ("c", expected)]


def test_a_hash_reaches_the_setting(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run(capsys, "train", str(make_recipe(tmp_path)), "--dry-run", "--data.train=no such #1.jsonl")
    assert status == 2 and "no such #1.jsonl: there is no such file" in err


@pytest.mark.parametrize(
    ("needs", "status"),
    [
        ('frozenset({"wrong"})', 0),
        ('{"pair", "hint"}', 0),
        ("frozenset()", 0),
        ('frozenset({"worng"})', 2),
        ('"wrong"', 2),
        ('["wrong"]', 2),
        ("None", 2),
        ("frozenset({1})", 2),
    ],
)
def test_the_needs_of_a_reformulation_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str], needs: str, status: int) -> None:
    (tmp_path / "warn.py").write_text(REFORMULATION.replace('frozenset({"wrong"})', needs), encoding="utf-8")
    (tmp_path / "warn.jinja").write_text("Well.", encoding="utf-8")
    spec = f"{tmp_path / 'warn.py'}:Warn"
    recipe = make_recipe(tmp_path, method={"name": "zppo", "reformulations": [spec]}, prompts={"warn": "warn.jinja"})
    found, _, err = run(capsys, "train", str(recipe), "--dry-run")
    assert found == status, err
    if status:
        assert "what can be prepared is answers, hint, pair, prefix, wrong" in " ".join(err.split())


@pytest.mark.parametrize(("like", "needs"), [("ncq", '{"wrong"}'), ("bcq", '{"pair"}'), ("hint", '{"hint"}'), ("prefix", '{"prefix"}')])
def test_a_reformulation_of_ones_own_is_planned_and_checked_like_a_bundled_one(tmp_path: Path, like: str, needs: str) -> None:
    """What the plan, the cost and the start-up check say follows from what it needs, not from its name."""
    from zppo.planning.flops import MOST, planned
    from zppo.rollout.frozen_models import _uses

    (tmp_path / "warn.py").write_text(REFORMULATION.replace('frozenset({"wrong"})', needs), encoding="utf-8")
    own, bundled = (
        settings_of(method={"name": "zppo", "reformulations": [kind]}, rollout={"batch_size": 8})
        for kind in (f"{tmp_path}/warn.py:Warn", like)
    )
    assert make_plan(own, 100) == make_plan(bundled, 100)
    assert planned(own, 100, MOST).literal == planned(bundled, 100, MOST).literal
    uses = [_uses(s.teacher, s.method.resolve(), first=True) for s in (own, bundled) if s.teacher is not None]
    assert uses[0] == uses[1] and ("compression" in uses[0]) == (like in ("bcq", "ncq"))


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("zppo ", {"train", "resume", "sweep", "eval", "lab"}),
        ("zppo train --train.le", {"--train.learning_rate"}),
        ("zppo sweep --zone.rho", {"--zone.rho_replay", "--zone.rho_aug"}),
        ("zppo report --figures ", {"png", "svg", "both", "none"}),
        ("zppo lab ", {"build", "questions", "study"}),
        ("zppo train la", {"lab", "lab-vision"}),
        ("zppo data measure ", {"my-data"}),
        ("zppo init mine --from single", {"single-gpu-lora"}),
    ],
)
def test_a_shell_is_offered_commands_options_and_settings(line: str, offered: set[str], tmp_path: Path) -> None:
    """As bash asks: the line in the environment, the answer in a file."""
    asked = {"_ARGCOMPLETE": "1", "_ARGCOMPLETE_IFS": "\n", "_ARGCOMPLETE_STDOUT_FILENAME": str(tmp_path / "out")}
    asked |= {"COMP_LINE": line, "COMP_POINT": str(len(line)), "COMP_TYPE": "9", "_ARGCOMPLETE_SUPPRESS_SPACE": "1"}
    subprocess.run([sys.executable, "-m", "zppo"], env={**os.environ, **asked}, check=True, capture_output=True)
    assert offered <= set((tmp_path / "out").read_text(encoding="utf-8").split("\n"))


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ([], "completions each, greedy"),
        (["--eval.temperature=0.6"], "completions each, temperature 0.6, top p 0.95, top k 20, presence penalty 1.5"),
    ],
)
def test_the_plan_says_how_held_out_completions_are_drawn(given: list[str], shown: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", str(Path(__file__).parents[1] / "recipes" / "lab.yaml"), "--dry-run", *given]) == 0
    assert shown in " ".join(capsys.readouterr().out.split())
