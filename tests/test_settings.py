"""Recipes: YAML, overrides, paths, errors, and back to YAML."""

from __future__ import annotations

import re
import string
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zppo.config.help import help_text, known_keys, nearest_key
from zppo.config.methods import METHODS
from zppo.config.recipe import dump_recipe, dump_yaml, load_recipe, parse_overrides, parse_yaml
from zppo.config.removed import REMOVED
from zppo.config.settings import Settings
from zppo.engines.base import Sampling
from zppo.errors import SettingsError
from zppo.names import CLOSINGS

RECIPES = Path(__file__).parents[1] / "recipes"
SMALL = "student: {model: s}\nteacher: {model: t}\ndata: {train: questions.jsonl}\n"


def write(folder: Path, text: str = SMALL, name: str = "recipe.yaml") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def message(path: Path, *overrides: str) -> str:
    with pytest.raises(SettingsError) as caught:
        load_recipe(path, overrides)
    return str(caught.value)


# --- the paper's defaults -------------------------------------------------------------------------------------------

PAPER = {
    "rollout.batch_size": 384,
    "rollout.group_size": 8,
    "rollout.temperature": 1.0,
    "rollout.top_p": 1.0,
    "rollout.max_new_tokens": 12_288,
    "zone.teacher_group_size": 4,
    "zone.threshold": 0.5,
    "zone.rho_replay": 0.25,
    "zone.rho_aug": 0.25,
    "zone.buffer_capacity": 10_000,
    "zone.ties": "random",
    "train.minibatches": 4,
    "train.learning_rate": 1e-6,
    "train.betas": (0.9, 0.999),
    "train.adam_eps": 1e-8,
    "train.weight_decay": 0.1,
    "train.max_grad_norm": 1.0,
    "loss.clip_low": 0.20,
    "loss.clip_high": 0.28,
    "loss.dual_clip": 10.0,
    "loss.mask_truncated": False,
    "data.max_prompt_tokens": 4096,
    "teacher.rollout.temperature": 1.0,
    "teacher.compression.max_new_tokens": 512,
    "teacher.ask": "lazy",
    "eval.temperature": 0.6,
    "eval.top_p": 0.95,
    "eval.top_k": 20,
    "eval.presence_penalty": 1.5,
}


def test_every_number_of_the_paper_is_a_default(tmp_path: Path) -> None:
    settings = load_recipe(write(tmp_path))
    for dotted, value in PAPER.items():
        found: Any = settings
        for part in dotted.split("."):
            found = getattr(found, part)
        assert found == value, dotted
        assert known_keys()[dotted].default == value, dotted
    assert settings.estimator == "nontrivial" == METHODS["grpo"].advantage and settings.advantage.scope is None


# --- overrides ------------------------------------------------------------------------------------------------------


def test_overrides_win_and_the_last_one_wins(tmp_path: Path) -> None:
    path = write(tmp_path, SMALL + "train: {steps: 3, epochs: 2}\n")
    settings = load_recipe(path, ["--train.steps=7", "--seed", "4", "--train.steps=8", "--eval.presence_penalty", "-1"])
    assert (settings.train.steps, settings.train.epochs, settings.seed) == (8, 2, 4)
    assert settings.eval.presence_penalty == -1


def test_override_of_a_field_of_a_method_named_in_short(tmp_path: Path) -> None:
    path = write(tmp_path, "method: zppo\n" + SMALL)
    assert load_recipe(path).method.resolve() == METHODS["zppo"]
    method = load_recipe(path, ["--method.replay=false"]).method.resolve()
    assert (method.name, method.replay, method.reformulations) == ("zppo", False, ("bcq", "ncq"))
    assert load_recipe(path, ["--method=grpo"]).method.name == "grpo"
    assert load_recipe(path, ["--method.reformulations=[ncq]"]).method.resolve().reformulations == ("ncq",)


def test_an_override_can_empty_a_setting(tmp_path: Path) -> None:
    path = write(tmp_path, "method: grpo\n" + SMALL + "loss: {dual_clip: 5}\n")
    settings = load_recipe(path, ["--loss.dual_clip=null", "--teacher=null"])
    assert settings.loss.dual_clip is None
    assert settings.teacher is None


def test_overrides_reach_sections_that_the_recipe_leaves_out(tmp_path: Path) -> None:
    settings = load_recipe(write(tmp_path), ["--teacher.compression.enabled=false", "--data.columns.answer=solution"])
    assert settings.teacher is not None and not settings.teacher.compression.enabled
    assert settings.data.columns.answer == "solution"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["--train.steps"], "--train.steps has no value"),
        (["--train.steps", "--seed=1"], "--train.steps has no value"),
        (["train.steps=1"], "'train.steps=1' is no override"),
        (["--prompts=[a"], "the value of --prompts is no YAML: '[a'"),
        (["--data.train.x=1"], "data.train.x cannot be set: data.train is"),
        (["--trian.steps=1"], "trian is no setting (set on the command line); the nearest one is train"),
        (["--train.step=1"], "train.step is no setting (set on the command line); the nearest one is train.steps"),
    ],
)
def test_bad_overrides_say_what_is_wrong(tmp_path: Path, overrides: list[str], said: str) -> None:
    assert said in message(write(tmp_path), *overrides)


# --- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("unknown", "nearest"),
    [
        ("train.lr", "train.learning_rate"),
        ("learning_rate", "train.learning_rate"),
        ("train.learning_rte", "train.learning_rate"),
        ("rollout.batchsize", "rollout.batch_size"),
        ("teacher.compresion.enabled", "teacher.compression.enabled"),
        ("metod", "method"),
        ("data.evl", "data.eval"),
    ],
)
def test_the_nearest_key(unknown: str, nearest: str) -> None:
    assert nearest_key(unknown) == nearest


def test_all_problems_stand_in_one_message(tmp_path: Path) -> None:
    text = """
        student: {modle: s}
        data: {train: 5}
        train: {lr: 1e-6, steps: true, betas: [0.9, x], precision: fp8}
        rollout: 7
        loss: {dual_clip: .inf}
        zone: {threshold: 1.5}
    """
    said = message(write(tmp_path, text))
    for part in (
        "10 problems",
        "student.modle is no setting; the nearest one is student.model",
        "student.model is missing",
        "data.train: '5' does not fit; expected text",
        "train.lr is no setting; the nearest one is train.learning_rate",
        "train.steps: 'true' does not fit; expected integer >= 0, or empty",
        "train.betas.1: 'x' does not fit; expected list of 2: number, number",
        "train.precision: 'fp8' does not fit; expected auto | fp32 | bf16",
        "rollout: '7' does not fit; expected a section with",
        "loss.dual_clip: 'inf' does not fit; expected number > 1, or empty",
        "zone.threshold: '1.5' does not fit; expected number > 0 and <= 1",
        "`zppo train --help`",
    ):
        assert part in said


def test_a_missing_section_names_the_key_to_set(tmp_path: Path) -> None:
    said = message(write(tmp_path, "method: grpo\ndata: {train: x.jsonl}\n"))
    assert "student is missing (the model that is trained); set student.model in the recipe or with --student.model=VALUE" in said


def test_a_method_that_reformulates_needs_a_teacher(tmp_path: Path) -> None:
    path = write(tmp_path, "student: {model: s}\ndata: {train: x.jsonl}\n")
    assert "needs a teacher: set teacher.model" in message(path)
    assert load_recipe(path, ["--method=grpo-replay"]).teacher is None
    assert load_recipe(path, ["--method.reformulations=[]"]).teacher is None


def test_unknown_methods_and_reformulations(tmp_path: Path) -> None:
    assert "method: 'zpo' is no method; known: grpo," in message(write(tmp_path), "--method=zpo")
    assert "'hnt' is no reformulation; known: bcq, hint, lte, ncq, partial, prefix" in message(
        write(tmp_path), "--method.reformulations=[hnt]"
    )


def test_combinations_of_methods_that_cannot_train_are_refused(tmp_path: Path) -> None:
    for override, said in (
        ("--method={name: grpo, control: placebo}", "needs reformulations"),
        ("--method={name: on-distill, reformulations: [bcq]}", "no policy gradient"),
        ("--method={name: off-distill, teacher_response: true}", "no policy gradient"),
        ("--method={name: prefix, control: scrambled}", "the question alone"),
        ("--method={name: zppo, reformulations: [bcq, bcq]}", "stands twice"),
    ):
        assert said in message(write(tmp_path), override)
    assert load_recipe(write(tmp_path), ["--method={name: hint, control: placebo}"]).method.resolve().control == "placebo"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is empty"),
        ("- a\n- b\n", "holds list"),
        ("5: x\n", "holds dict"),
        ("a: [1,\n", "is no YAML: line 2"),
        ("seed: 1\nseed: 2\n", 'line 2, column 1: found duplicate key "seed"'),
        ("a: !!python/object/apply:os.system ['true']\n", "is no YAML"),
    ],
)
def test_files_that_are_no_recipe(tmp_path: Path, text: str, said: str) -> None:
    path = write(tmp_path, text)
    assert said in message(path)
    assert str(path) in message(path)


def test_missing_recipes(tmp_path: Path) -> None:
    assert "there is no recipe" in message(tmp_path / "none.yaml")
    assert "is a folder" in message(tmp_path)
    broken = tmp_path / "latin.yaml"
    broken.write_bytes(b"seed: \xff\n")
    assert "is not UTF-8 (byte 7 is 0xff); save it as UTF-8" in message(broken)


# --- what is gone ---------------------------------------------------------------------------------------------------

OFF = {"min_p": 0.0, "presence_penalty": 0.0, "repetition_penalty": 1.0}
OF_OLDER_RUNS: dict[str, Any] = {
    **{f"{s}.{k}": v for s in ("rollout", "judge", "teacher.judge") for k, v in OFF.items()},
    **{f"teacher.{s}.{k}": v for s in ("rollout", "hint", "compression") for k, v in OFF.items()},
    "method.loss": None,
    "advantage.eps": 1e-08,
    "rollout.vllm.wait": 240.0,
    "rollout.vllm.model_impl": "auto",
    "grading.box": "after-thoughts",
}


def put(data: dict[str, Any], dotted: str, value: Any) -> None:
    *above, last = dotted.split(".")
    for part in above:
        data = data.setdefault(part, {})
    data[last] = value


def old_recipe(folder: Path, *, null: tuple[str, ...] = ()) -> Path:
    """As an older version wrote it into a run: every setting that there was, with what its default was."""
    text = SMALL + "judge: {model: j}\nmore_teachers: [{model: u}, {model: v}]\n"
    data = parse_yaml(dump_recipe(load_recipe(write(folder, text))))
    for key, value in OF_OLDER_RUNS.items():
        put(data, key, value)
    data["more_teachers"][1] = data["teacher"]
    data |= dict.fromkeys(null)
    return write(folder, dump_yaml(data), "old.yaml")


def test_removed_settings_of_older_runs_are_read_over(tmp_path: Path) -> None:
    assert OF_OLDER_RUNS.keys() == {key for key in REMOVED if ": " not in key}
    assert not REMOVED.keys() & known_keys().keys()
    path = old_recipe(tmp_path)
    settings = load_recipe(path)
    assert settings.judge is not None and settings.judge.model == "j"
    assert load_recipe(write(tmp_path, dump_recipe(settings), "new.yaml")) == settings
    assert "wait" not in dump_recipe(settings)
    assert load_recipe(old_recipe(tmp_path, null=("judge",))).judge is None
    assert load_recipe(old_recipe(tmp_path, null=("judge", "teacher")), ["--method=grpo"]).teacher is None
    assert "rollout: 'empty' does not fit" in message(old_recipe(tmp_path, null=("rollout",)))
    assert load_recipe(path, ["--rollout.min_p=0"]) == settings


@pytest.mark.parametrize("key", OF_OLDER_RUNS)
def test_a_removed_setting_that_asks_for_something_is_refused(key: str, tmp_path: Path) -> None:
    path = write(tmp_path, SMALL + "judge: {model: j}\n")
    for value in ("on-distill", 0.25, True, [0]):
        said = message(path, f"--{key}={value}")
        assert f"1 problem\n  - {key} is gone{REMOVED[key]}\n" in said


def test_removed_settings_of_further_teachers_and_removed_values(tmp_path: Path) -> None:
    further = "more_teachers: [{model: u}, {model: v, ask: eager, rollout: {min_p: 0.1, top_p: 0.9}}]\n"
    said = message(write(tmp_path, SMALL + further), "--train.sharding=zero2", "--teacher.ask=eager", "--seed=x")
    for part in (
        "5 problems",
        "more_teachers.1.rollout.min_p is gone: leave it out, or ask a server for it with extra_body: {min_p: VALUE}",
        "more_teachers.1.ask: eager is gone: ",
        "teacher.ask: eager is gone: ",
        "train.sharding: zero2 is gone with DeepSpeed: take fsdp2",
        "seed: 'x' does not fit",
    ):
        assert part in said


def test_evaluation_keeps_what_the_protocol_says(tmp_path: Path) -> None:
    """And only truncation and temperature make the sampler's log-probs others than the model's."""
    settings = load_recipe(write(tmp_path, SMALL + "eval: {min_p: 0.1, repetition_penalty: 1.2}\n"))
    assert settings.eval.sampling() == Sampling(0.6, 0.95, 20, 0.1, 1.5, 1.2)
    assert settings.rollout.sampling() == Sampling() and not settings.eval.sampling().exact
    for override, exact in (("temperature=0.7", True), ("max_new_tokens=9", True), ("top_p=0.9", False), ("top_k=5", False)):
        assert load_recipe(write(tmp_path), [f"--rollout.{override}"]).rollout.sampling().exact == exact


# --- numbers --------------------------------------------------------------------------------------------------------


def test_scientific_notation_is_a_number(tmp_path: Path) -> None:
    path = write(tmp_path, SMALL + "train: {learning_rate: 5e-4}\n")
    assert load_recipe(path).train.learning_rate == 5e-4
    assert load_recipe(path, ["--train.learning_rate=1e-6"]).train.learning_rate == 1e-6
    assert load_recipe(path, ["--teacher.template_args={budget: 1e3, flag: no}"]).teacher.template_args == {  # type: ignore[union-attr]
        "budget": 1000.0,
        "flag": "no",
    }


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-6", 1e-6),
        ("1E6", 1e6),
        ("-.5", -0.5),
        ("12_288", 12288),
        ("010", 10),
        ("0x1f", 31),
        (".inf", float("inf")),
        ("no", "no"),
        ("true", True),
        ("2026-06-16", "2026-06-16"),
        ("12:30", "12:30"),
        ("", None),
        ("~", None),
        ("1.2.3", "1.2.3"),
        ("e5", "e5"),
        ("'1'", "1"),
    ],
)
def test_yaml_scalars(text: str, value: object) -> None:
    parsed = parse_yaml(text)
    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize("text", ["a: 1\nb: {c: 1, c: 2}", "a: !!bool x", "a: !!int ''", "a: *b", "a: 1\n---\nb: 2"])
def test_whatever_is_no_yaml_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError):
        parse_yaml(text)


def test_plain_data_and_line_breaks_come_back() -> None:
    texts = ["a\x85b", "\u2028", "x\u2029", "tab\t", "no\nyes\n", "word " * 60, "12:30", "# no", ""]
    data = {"texts": texts, "word " * 40: {"b": 1e-6, "c": [{}, []]}, "a\x85": 12288}
    back = parse_yaml(dump_yaml(data))
    assert back == data and list(back) == list(data)
    assert type(back) is dict and type(back["texts"]) is list and type(back["texts"][0]) is str


_scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(st.characters(codec="utf-8", exclude_categories=["Cc"]))
    | st.from_regex(r"\A[-+]?[0-9_.]+[eExo]?[-+]?[0-9:]*\Z")
    | st.sampled_from(["no", "yes", "on", "null", "~", "<<", "=", "1e5", "12e4567", "0o7", "2026-06-16", ".nan", "1_0", ""])
)


@given(st.dictionaries(st.text(string.ascii_lowercase, min_size=1), _scalars | st.lists(_scalars), max_size=5))
def test_yaml_round_trip(data: dict[str, Any]) -> None:
    back = parse_yaml(dump_yaml(data))
    assert back == data
    assert repr(back) == repr(data)  # 1 is not 1.0 and "1" is not 1


# --- paths ----------------------------------------------------------------------------------------------------------


def test_relative_paths_of_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the recipe first, then in the working directory; overrides in the working directory only."""
    beside, here = tmp_path / "recipes", tmp_path / "here"
    recipe = write(
        beside,
        """
        student: {model: my-student, template: chat.jinja}
        teacher: {model: owner/name}
        data: {train: train.jsonl, eval: eval.jsonl}
        prompts: {closing: closing.jinja, bcq: bcq.jinja}
        grading: {reward: "reward.py:score"}
        """,
    )
    for name in ("train.jsonl", "closing.jinja", "reward.py"):
        write(beside, "x", name)
    for name in ("train.jsonl", "eval.jsonl", "chat.jinja", "other.jsonl"):
        write(here, "x", name)
    (beside / "my-student").mkdir()
    monkeypatch.chdir(here)
    settings = load_recipe(recipe)
    assert settings.data.train == str(beside / "train.jsonl")
    assert settings.data.eval == str(here / "eval.jsonl")
    assert settings.student.model == str(beside / "my-student")
    assert settings.student.template == here / "chat.jinja"
    assert settings.teacher is not None and settings.teacher.model == "owner/name"
    assert settings.prompts == {"closing": beside / "closing.jinja", "bcq": beside / "bcq.jinja"}
    assert settings.grading.reward == f"{beside / 'reward.py'}:score"

    over = load_recipe(recipe, ["--data.train=train.jsonl", "--prompts.ncq=ncq.jinja", "--teacher.model=./t"])
    assert over.data.train == str(here / "train.jsonl")
    assert over.prompts["ncq"] == here / "ncq.jinja"
    assert over.prompts["closing"] == beside / "closing.jinja"
    assert over.teacher is not None and over.teacher.model == str(here / "t")


def test_names_that_are_no_paths_pass_through(tmp_path: Path) -> None:
    text = "student: {model: 'lab:w/student'}\nteacher: {model: Qwen/Qwen3.5-4B}\ndata: {train: 'lab:w/train'}\n"
    settings = load_recipe(write(tmp_path, text), ["--grading.reward=package.module:score", "--data.eval=lab:w/test"])
    assert (settings.student.model, settings.data.train, settings.data.eval) == ("lab:w/student", "lab:w/train", "lab:w/test")
    assert settings.teacher is not None and settings.teacher.model == "Qwen/Qwen3.5-4B"
    assert settings.grading.reward == "package.module:score"


# --- back to YAML ---------------------------------------------------------------------------------------------------


def test_a_dumped_recipe_loads_back_equal_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = write(tmp_path / "recipes", SMALL + "prompts: {closing: c.jinja}\noutput: runs/x\n")
    overrides = ["--train.learning_rate=3e-7", "--student.revision='12e4567'", "--teacher.template_args={a: [1, 1.0, 'no', null]}"]
    settings = load_recipe(recipe, overrides)
    dumped = write(tmp_path / "run", dump_recipe(settings))
    monkeypatch.chdir(tmp_path / "run")
    again = load_recipe(dumped)
    assert again == settings
    assert again.student.revision == "12e4567"
    assert dump_recipe(again) == dump_recipe(settings)


@pytest.mark.slow
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "seed": st.integers(0, 2**63),
            "loss": st.fixed_dictionaries({"clip_high": st.floats(0, 1e300), "dual_clip": st.none() | st.floats(1.5, 50)}),
            "student": st.fixed_dictionaries({"model": st.just("s"), "revision": st.text(st.characters(codec="utf-8"))}),
            "method": st.sampled_from(list(METHODS)),
        },
    )
)
def test_any_settings_survive_the_dump(values: dict[str, Any]) -> None:
    settings = Settings.model_validate({"student": {"model": "s"}, "teacher": {"model": "t"}, "data": {"train": "x"}} | values)
    assert Settings.model_validate(parse_yaml(dump_recipe(settings))) == settings


# --- help -----------------------------------------------------------------------------------------------------------


def test_help_lists_every_setting_with_type_default_and_meaning() -> None:
    text = help_text()
    assert max(map(len, text.splitlines())) <= 100
    words = " ".join(text.split())
    for key in known_keys().values():
        assert key.description, f"{key.name} has no description"
        assert " ".join(key.description.split()) in words, key.name
        if not key.section:
            assert re.search(rf"^ +{re.escape(key.name)}  \[", text, re.MULTILINE), key.name
    assert "train.learning_rate [number > 0; default 1e-06]" in words
    assert "student.model [text; required]" in words
    assert "zone.ties [random | batch; default random]" in words


def test_help_knows_every_field_of_the_settings() -> None:
    def leaves(data: Any, prefix: str) -> set[str]:
        if not isinstance(data, dict) or prefix.removesuffix(".") in ("prompts",) or prefix.endswith(("template_args.", "extra_body.")):
            return {prefix.removesuffix(".")}
        return {leaf for key, value in data.items() for leaf in leaves(value, f"{prefix}{key}.")}

    data: dict[str, Any] = {"student": {"model": "s"}, "teacher": {"model": "t"}, "judge": {"model": "j"}}
    data |= {"data": {"train": "x"}, "train": {"lora": {}}, "push": {"repo": "me/mine"}}
    here = leaves(Settings.model_validate(data).model_dump(), "") - {"student.tinker"}
    # A student on a server goes without some of that.
    away = {**data, "student": {"model": "s", "tinker": {}}, "push": None, "eval": {"presence_penalty": 0}}
    assert here | (leaves(Settings.model_validate(away).model_dump(), "") - {"push"}) == {
        key.name for key in known_keys().values() if not key.section
    }


def test_parse_overrides_reads_values_as_yaml() -> None:
    assert parse_overrides(["--data.answer_after=####", "--a", "#"]) == [("data.answer_after", "####"), ("a", "#")]
    assert parse_overrides(["--a=1e-3", "--b", "[x, 2]", "--c==x", "--d="]) == [("a", 1e-3), ("b", ["x", 2]), ("c", "=x"), ("d", None)]


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.name)
def test_every_recipe_of_the_project_is_valid(recipe: Path) -> None:
    settings = load_recipe(recipe)
    assert not isinstance(settings.data.train, Path)
    sources = [settings.data.train] if isinstance(settings.data.train, str) else [part.source for part in settings.data.train]
    for source in (*sources, settings.data.eval):
        made = source is not None and (source.endswith("zppo-77k") or Path(source).parent.name == "stories")  # by a command of the docs
        assert source is None or source.startswith(("lab:", "hub:")) or Path(source).is_file() or made
    for path in settings.prompts.values():
        assert path.is_file() or str(path) in CLOSINGS


MINIMAL: dict[str, Any] = {"method": "grpo", "student": {"model": "owner/name"}, "data": {"train": "lab:unreachable/train"}}


@pytest.mark.parametrize(
    ("given", "penalty"),
    [({"temperature": 0}, 0.0), ({"temperature": 0.0, "presence_penalty": 1.0}, 1.0), ({"temperature": 0.6}, 1.5), ({}, 1.5)],
)
def test_held_out_decoding_at_temperature_0_is_greedy(given: dict[str, float], penalty: float) -> None:
    settings = load_recipe({**MINIMAL, "eval": given})
    assert settings.eval.presence_penalty == penalty
    again = load_recipe(parse_yaml(dump_recipe(settings)))  # as a resumed run reads it
    assert again.eval == settings.eval
    assert load_recipe({**MINIMAL, "eval": {}}, ["--eval.temperature=0"]).eval.presence_penalty == 0
