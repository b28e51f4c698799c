"""ZPPO in TRL: the advantages and gradients are ours, a resumed run is the same run, and what would train something else is refused."""

from __future__ import annotations

import importlib.util
import json
import math
import pickle
import re
import sys
import tomllib
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import trl
from datasets import Dataset, IterableDataset
from packaging.specifiers import SpecifierSet
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from conftest import make_tiny
from fault_server import Server
from test_distributed import distance
from trl_worker import RECIPE, luck, make_trainer, rows, watch
from victims import Victims
from zppo.config.recipe import load_recipe
from zppo.core.advantages import two_step_advantages
from zppo.core.loss import clipped_surrogate
from zppo.engines.logprobs import completion_logprobs
from zppo.errors import CheckpointError, EngineError, RewardError, SettingsError, ZPPOError
from zppo.integrations.trl import ADMITTED, STATE, ZPPOConfig, check_config
from zppo.rollout.data import load_data

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    make_tiny(folder / "student", seed=0)
    make_tiny(folder / "teacher", seed=1)
    return folder


def by_hand(rewards: list[list[float]]) -> list[float]:
    """Eqs. 2 to 5 in plain Python."""
    centred = [[r - sum(group) / len(group) for r in group] if len(set(group)) > 1 else [] for group in rewards]
    inside = [a for group in centred for a in group]
    mean = sum(inside) / len(inside)
    deviation = math.sqrt(sum((a - mean) ** 2 for a in inside) / len(inside))
    return [(a - mean) / (deviation + 1e-8) if group else 0.0 for group, line in zip(centred, rewards, strict=True) for a in group or line]


def lines(output: dict[str, Any]) -> list[tuple[tuple[int, ...], tuple[int, ...], float]]:
    """(prompt, completion, advantage) of the rows that TRL's loss is given, those without a token left out."""
    found = []
    for row in range(len(output["advantages"])):
        prompt = output["prompt_ids"][row][output["prompt_mask"][row].bool()]
        completion = output["completion_ids"][row][output["completion_mask"][row].bool()]
        if len(completion):
            found.append((tuple(prompt.tolist()), tuple(completion.tolist()), float(output["advantages"][row])))
    return found


def on_the_lab() -> dict[str, Any]:
    """The tiny world, whose models box their answers, so that there are BCQ prompts too; graded by the right answers."""
    lab = load_recipe(ROOT / "recipes" / "lab.yaml")
    asked = [{"prompt": q.messages[-1].content, "answer": q.gold} for q in load_data(lab)[0][60:120]]
    recipe = {
        "prompts": {name: str(path) for name, path in lab.prompts.items()},
        "teacher": {"rollout": {"max_new_tokens": 16}, "compression": {"max_new_tokens": 24}},
        "zone": RECIPE["zone"],
    }
    model, teacher = "lab:unreachable/student", "lab:unreachable/teacher"
    data = Dataset.from_list(asked)
    return {
        "model": model,
        "teacher_model": teacher,
        "train_dataset": data,
        "reward_funcs": None,
        "recipe": recipe,
        "max_completion_length": 16,
    }


@pytest.mark.slow
def test_the_loss_gets_our_advantages_and_our_denominator(models: Path, tmp_path: Path) -> None:
    trainer = make_trainer(models, tmp_path / "run", **on_the_lab())
    steps = watch(trainer)
    trainer.train()
    assert len(steps) == 3 and trainer.state.global_step == 6
    kinds = {group.kind for step in steps for group in step["groups"]}
    assert kinds == {"plain", "bcq", "ncq"} and [sum(g.kind == "plain" for g in s["groups"]) for s in steps] == [8, 10, 10]
    compared = 0
    for step in steps:
        groups = step["groups"]
        rewards = torch.tensor([r.reward for g in groups for r in g.rollouts], dtype=torch.float64)
        expected = two_step_advantages(rewards, torch.arange(len(groups)).repeat_interleave(4)).tolist()
        assert expected == pytest.approx(by_hand([[r.reward for r in g.rollouts] for g in groups]), rel=1e-6)
        every = [(g.prompt.ids + g.prompt.forced_ids, tuple(r.ids.tolist())) for g in groups for r in g.rollouts]
        wanted = sorted((*row, a) for row, a in zip(every, expected, strict=True) if a != 0)
        assert sorted(lines(step["output"])) == wanted, "prompt, tokens and advantage, to the last bit"
        assert float(step["output"]["num_items_in_batch"]) == sum(len(completion) for _, completion in every)
        assert len(step["output"]["advantages"]) % 2 == 0 and "old_per_token_logps" in step["output"]
        compared += len(wanted)
    assert compared > 20
    plain = [g for step in steps for g in step["groups"] if g.kind == "plain"]
    assert {g.question.id for g in plain if g.accuracy < 0.5} >= {q.id for q in trainer.parts.buffer.questions()} != set()


@pytest.mark.slow
def test_an_update_has_our_gradient(models: Path, tmp_path: Path) -> None:
    """One update a step, so that the denominators are the same: TRL's gradients against those of our loss on the same rollouts."""
    trainer = make_trainer(
        models, tmp_path / "run", per_device_train_batch_size=32, steps_per_generation=1, max_steps=1, save_strategy="no"
    )
    steps, seen = watch(trainer), dict[str, torch.Tensor]()

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, *_: Any, model: Any, **__: Any) -> None:  # type: ignore[override]
            seen.update({name: p.grad.clone() for name, p in model.named_parameters()})

    trainer.add_callback(Look())
    trainer.train()
    model: Any = AutoModelForCausalLM.from_pretrained(models / "student", dtype=torch.float32)
    groups = steps[0]["groups"]
    logprobs, mask = completion_logprobs(model, [(g.prompt.ids + g.prompt.forced_ids, r.ids) for g in groups for r in g.rollouts])
    surrogate = clipped_surrogate(logprobs, logprobs.detach(), trainer.parts.advantages(groups))
    (surrogate.loss.where(mask, 0.0).sum() / mask.sum()).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for name, p in model.named_parameters():
        torch.testing.assert_close(seen[name], p.grad, rtol=1e-4, atol=1e-6, msg=name)
    assert max(float(g.abs().max()) for g in seen.values()) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("own", [False, pytest.param(True, marks=pytest.mark.long)], ids=["keyed", "trl"])
def test_a_resumed_run_is_the_same_run(models: Path, tmp_path: Path, own: bool) -> None:
    """Weights, optimizer and buffer, bit for bit; the newest checkpoint is found."""
    whole = make_trainer(models, tmp_path / "whole", trl_generation=own)
    whole.train()
    cut = make_trainer(models, tmp_path / "cut", trl_generation=own, max_steps=4)
    cut.train()
    again = make_trainer(models, tmp_path / "cut", trl_generation=own)
    steps = watch(again)
    again.train(resume_from_checkpoint=True)
    assert len(steps) == 1 and again.state.global_step == 6
    last = "checkpoint-6"
    assert distance(tmp_path / "whole" / last, tmp_path / "cut" / last) == 0.0
    assert distance(tmp_path / "whole" / last, tmp_path / "whole" / "checkpoint-4") > 1e-4
    assert again.parts.buffer.state_dict() == whole.parts.buffer.state_dict()
    states = [torch.load(tmp_path / run / last / "optimizer.pt", weights_only=True) for run in ("whole", "cut")]
    assert all(torch.equal(states[0]["state"][i]["exp_avg"], states[1]["state"][i]["exp_avg"]) for i in states[0]["state"])


@pytest.mark.slow
def test_draws_do_not_depend_on_what_was_drawn_before(models: Path, tmp_path: Path) -> None:
    """The first step is the same whatever torch's generator holds; TRL's own sampling is another."""
    texts = []
    for name, changes in (("a", {}), ("b", {}), ("trl", {"trl_generation": True})):
        trainer = make_trainer(models, tmp_path / name, max_steps=2, save_strategy="no", **changes)
        steps = watch(trainer)
        torch.manual_seed(len(texts))
        trainer.train()
        texts.append([r.text for g in steps[0]["groups"] if g.kind == "plain" for r in g.rollouts])
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.slow
def test_two_processes_train_as_one(models: Path, tmp_path: Path, victims: Victims) -> None:
    """The same rollouts, advantages and buffer as one process, and the same weights in both, near those of one."""
    assert victims.run(models, tmp_path, run=tmp_path, call="trl_worker:main", processes=2) == 0, victims.said[-3000:]
    (first, buffer), (second, other) = (pickle.loads((tmp_path / f"{rank}.pickle").read_bytes()) for rank in (0, 1))
    alone = make_trainer(models, tmp_path / "one", max_steps=4)
    steps = watch(alone)
    alone.train()
    assert buffer == other == json.loads(json.dumps(buffer)) and len(first) == len(second) == len(steps) == 2
    assert buffer["slots"] and distance(tmp_path / "final-0", tmp_path / "final-1") == 0.0
    ours = {id(r): r.text for g in steps[0]["groups"] for r in g.rollouts}
    assert first[0]["texts"] == second[0]["texts"] == list(ours.values())
    assert sorted([*lines(first[0]), *lines(second[0])]) == sorted(lines(steps[0]["output"]))
    assert len(first[0]["advantages"]) == len(second[0]["advantages"]), "all processes take equally many rows"
    for step in (0, 1):
        assert float(first[step]["num_items_in_batch"]) == float(second[step]["num_items_in_batch"])
        assert first[step]["texts"] == second[step]["texts"]
    alone.save_model(str(tmp_path / "final-one"))
    assert (
        0 < distance(tmp_path / "final-0", tmp_path / "final-one") < 0.02
    )  # minibatches of other rows, eight times the step of one update


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.long
def test_the_example_runs_on_the_lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["trl_zppo.py", "2"])
    source = (ROOT / "examples" / "trl_zppo.py").read_text(encoding="utf-8")
    made: dict[str, Any] = {}
    exec(compile(source, "trl_zppo.py", "exec"), made)  # noqa: S102 - our own
    trainer = made["trainer"]
    assert "held out: 0." in capsys.readouterr().out
    logged = {name: value for line in trainer.state.log_history for name, value in line.items()}
    assert logged["zppo/teacher_correct"] > 0 and {"zppo/accuracy/bcq", "zppo/accuracy/ncq", "zppo/buffer"} <= logged.keys()
    assert 0 <= logged["zppo/no_answer_share"] < 0.5
    assert (tmp_path / "runs" / "trl-zppo" / "checkpoint-16" / STATE).exists()
    card = (tmp_path / "runs" / "trl-zppo" / "README.md").read_text(encoding="utf-8")
    assert "ZPPO" in card and "2606.18216" in card


@pytest.mark.slow
def test_rewards_prompts_evaluation_and_adapters(models: Path, tmp_path: Path) -> None:
    """Conversations, TRL's own sampling, an evaluation, LoRA, a reward function that leaves some ungraded, and nobody's default."""
    seen: list[Any] = []

    async def reward(
        prompts: list[Any], completions: list[Any], completion_ids: list[Any], solution: list[str], topic: list[str]
    ) -> list[Any]:
        seen.append((prompts[0], completions[0], solution[0], topic[0], completion_ids[0]))
        right = luck([p[-1]["content"] for p in prompts], [c[0]["content"] for c in completions], bonus=[0.0] * len(prompts))
        return [None if len(c[0]["content"]) % 5 == 0 else r for c, r in zip(completions, right, strict=True)]

    chats = [{"prompt": [{"role": "user", "content": f"What is {i}?"}], "answer": str(i), "topic": "sums"} for i in range(20)]
    trainer = make_trainer(
        models, tmp_path / "run", train_dataset=Dataset.from_list(chats), eval_dataset=Dataset.from_list(chats[:6]), reward_funcs=[reward],
        peft_config=LoraConfig(r=4, target_modules="all-linear"), trl_generation=True, eval_strategy="steps", eval_steps=2, max_steps=2,
        per_device_eval_batch_size=8,
    )  # fmt: skip
    steps = watch(trainer)
    trainer.train()
    prompt, completion, answer, topic, ids = seen[0]
    assert prompt[0]["content"].startswith("What is ") and completion[0]["role"] == "assistant" and answer.isdigit() and topic == "sums"
    assert trainer.parts.prompts.chat.decode(ids) == completion[0]["content"]
    graded = [r for g in steps[0]["groups"] for r in g.rollouts if r.graded]
    assert 0 < len(graded) < sum(len(g.rollouts) for g in steps[0]["groups"])
    assert float(steps[0]["output"]["num_items_in_batch"]) == sum(len(r.ids) for r in graded)
    logged = {name: value for line in trainer.state.log_history for name, value in line.items()}
    assert 0 <= logged["eval_reward"] <= 1 and "rewards/reward/mean" in logged
    held = load_file(tmp_path / "run" / "checkpoint-2" / "adapter_model.safetensors")
    assert any(value.abs().max() > 0 for name, value in held.items() if "lora_B" in name)


@pytest.mark.slow
def test_the_teacher_may_be_on_a_server(models: Path, tmp_path: Path) -> None:
    server = Server(model="big")
    try:
        trainer = make_trainer(models, tmp_path / "run", teacher_model="big", teacher_base_url=server.url, max_steps=2, save_strategy="no")
        trainer.train()
        assert server.log and all(request["model"] == "big" for request in server.log)
    finally:
        server.kill()


@pytest.mark.slow
def test_truncated_rows_can_be_left_out(models: Path, tmp_path: Path) -> None:
    trainer = make_trainer(
        models, tmp_path / "run", mask_truncated_completions=True, max_steps=2, max_completion_length=150, save_strategy="no"
    )
    steps = watch(trainer)
    trainer.train()
    ended = [r for g in steps[0]["groups"] for r in g.rollouts if not r.truncated]
    assert 0 < len(ended) < sum(len(g.rollouts) for g in steps[0]["groups"])
    assert float(steps[0]["output"]["num_items_in_batch"]) == sum(len(r.ids) for r in ended)
    assert {c for _, c, _ in lines(steps[0]["output"])} <= {tuple(r.ids.tolist()) for r in ended}


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "iterations": ({"num_iterations": 2}, "num_iterations=2 .* used once"),
    "a KL term": ({"beta": 0.1}, "beta=0.1 .* no KL term"),
    "another loss": ({"loss_type": "grpo"}, "loss_type='grpo'"),
    "sequences": ({"importance_sampling_level": "sequence"}, "importance_sampling_level='sequence'"),
    "scaled rewards": ({"scale_rewards": "group"}, "scale_rewards='group' .* ZPPO's"),
    "weights of rewards": ({"reward_weights": [1.0]}, r"reward_weights=\[1.0\]"),
    "an entropy bonus": ({"entropy_coef": 0.01}, "entropy_coef=0.01"),
    "tokens of high entropy": ({"top_entropy_quantile": 0.5}, "top_entropy_quantile=0.5"),
    "a penalty of draws": ({"repetition_penalty": 1.1}, "repetition_penalty=1.1 .*trl_generation=True"),
    "a group over two processes": ({"per_device_train_batch_size": 3, "steps_per_generation": 4, "num_generations": 2,
                                    "gradient_accumulation_steps": 3}, "steps_per_generation=4 does not divide by 3"),
    "a last step that is cut": ({"max_steps": 3}, "max_steps=3 does not divide by 2"),
    "a step that is saved half": ({"save_steps": 3}, "save_steps=3 does not divide by 2"),
    "several rewards": ({"reward_funcs": [luck, luck]}, "reward_funcs holds 2"),
    "a reward model": ({"reward_funcs": "some/model"}, "reward model"),
    "tools": ({"tools": [print]}, "tools cannot be used"),
    "another rollout_func": ({"rollout_func": print}, "rollout_func cannot be used"),
    "GRPO's configuration": ({"args": GRPOConfig("out", use_cpu=True, bf16=False, report_to="none")}, "args is a GRPOConfig"),
    "iterable data": ({"train_dataset": IterableDataset.from_generator(lambda: iter([]))}, "train_dataset is a IterableDataset"),
    "no data": ({"train_dataset": None}, "train_dataset is a NoneType"),
    "images": ({"train_dataset": Dataset.from_list([{"prompt": "?", "answer": "1", "images": ["data:image/png;base64,AA"]}] * 9)}, "image"),
    "few questions": ({"train_dataset": rows(5)}, "5 questions, and a step 8"),
    "no answer": ({"train_dataset": rows().remove_columns("answer")}, "train_dataset, row 1, column 'answer'"),
    "a section of ours": ({"recipe": {"train": {"steps": 3}}}, "recipe holds 'train.steps'"),
    "a setting that is none": ({"recipe": {"zone": {"rho": 1}}}, "zone.rho is no setting"),
    "another method": ({"recipe": {"method": "on-distill"}}, "'on-distill' .*`zppo train` does that"),
    "no teacher": ({"teacher_model": None, "recipe": None}, "needs a teacher"),
    "no teacher but what is asked of it": ({"teacher_model": None}, "teacher_model is missing.*leave recipe's `teacher` out"),
    "no such teacher": ({"teacher_model": "none/such"}, "none/such"),
    "a long prompt": ({"max_completion_length": 4090}, "more than the model's context of 4096"),
}  # fmt: skip


@pytest.mark.parametrize("name", [name for name, (_, said) in REFUSED.items() if said])
def test_what_would_train_something_else_is_refused_by_name(models: Path, tmp_path: Path, name: str) -> None:
    changes, said = REFUSED[name]
    with pytest.raises(ZPPOError, match=said):
        make_trainer(models, tmp_path / "run", **changes)
    assert not list(tmp_path.glob("run/*"))


def test_what_several_processes_cannot_do(monkeypatch: pytest.MonkeyPatch) -> None:
    config = ZPPOConfig("out", use_cpu=True, bf16=False, report_to="none", per_device_train_batch_size=6, num_generations=3)
    assert check_config(config) == 1
    config.num_generations = 4  # as where the rows of two processes are whole groups, and those of one are not
    with pytest.raises(SettingsError, match=r"steps_per_generation=6 does not divide by 4, num_generations: a group lies in one process"):
        check_config(config)
    config.num_generations, config.eval_strategy, config.do_eval = 3, "steps", True
    with pytest.raises(SettingsError, match="per_device_eval_batch_size=8 does not divide by 3, num_generations_eval"):
        check_config(config)
    config.eval_strategy, config.use_vllm = "no", True
    assert check_config(config) == 1
    monkeypatch.setattr(ZPPOConfig, "world_size", 2)
    with pytest.raises(SettingsError, match="use_vllm=True cannot be used: it was not tried with several processes"):
        check_config(config)


@pytest.mark.slow
def test_a_checkpoint_without_the_buffer_is_refused(models: Path, tmp_path: Path) -> None:
    trainer = make_trainer(models, tmp_path / "run", max_steps=2, save_steps=2)
    trainer.train()
    state = tmp_path / "run" / "checkpoint-2" / STATE
    for text in (
        None,
        "{",
        "[]",
        '{"updates": "2", "buffer": {}}',
        '{"updates": 2, "buffer": {"seed": 0}}',
        '{"updates": 1, "buffer": {}}',
    ):
        state.unlink() if text is None else state.write_text(text, encoding="utf-8")
        with pytest.raises(CheckpointError, match=f"checkpoint-2.{STATE} is not what ZPPOTrainer goes on from"):
            trainer.train(resume_from_checkpoint=str(state.parent))


def test_what_trl_gives_is_checked(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A version that hands the loss something else, or a batch that is no step of different questions."""
    trainer = make_trainer(models, tmp_path / "run")
    with pytest.raises(EngineError, match="TRL gave 32 rows of 1 questions to a step of 8"):
        trainer._take_step([cast(Any, trainer.train_dataset)[0]["prompt"]] * 32)
    original = GRPOTrainer._generate_and_score_completions
    monkeypatch.setattr(
        GRPOTrainer, "_generate_and_score_completions", lambda self, inputs: original(self, inputs) | {"novel": torch.zeros(1)}
    )
    with pytest.raises(EngineError, match=r"gives its loss \['novel'\]"):
        trainer.train()


@pytest.mark.parametrize(
    ("given", "said"),
    [(lambda **_: [1.0], "it has 1 rewards, and"), (lambda completions, **_: [math.nan] * len(completions), "it is no finite number")],
)
def test_a_reward_function_that_returns_no_rewards(models: Path, tmp_path: Path, given: Any, said: str) -> None:
    with pytest.raises(RewardError, match=said):
        make_trainer(models, tmp_path / "run", reward_funcs=given).train()


def test_other_versions_of_trl_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert extras["trl"] == [f"trl{ADMITTED}"] and trl.__version__ in SpecifierSet(ADMITTED)
    path = ROOT / "src" / "zppo" / "integrations" / "trl.py"

    def load() -> None:
        spec = importlib.util.spec_from_file_location("another_trl", path)
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, "another_trl", module)
        spec.loader.exec_module(module)

    load()
    monkeypatch.setattr(trl, "__version__", "1.17.0")
    with pytest.raises(SettingsError, match=r"TRL 1\.17\.0 is installed"):
        load()
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(SettingsError, match=r"pip install 'zppo\[trl\]'"):
        load()


def test_defaults_are_the_paper_s() -> None:
    config = ZPPOConfig("out", use_cpu=True, bf16=False, report_to="none")
    assert (config.epsilon, config.epsilon_high, config.delta, config.beta, config.loss_type) == (0.2, 0.28, 10.0, 0.0, "dapo")
    assert (config.learning_rate, config.weight_decay, config.adam_beta2, config.max_grad_norm) == (1e-6, 0.1, 0.999, 1.0)
    assert config.num_generations == 8 and config.temperature == 1.0 and config.lr_scheduler_type == "constant" and RECIPE


@pytest.mark.long
def test_the_page_shows_what_there_is(models: Path, tmp_path: Path) -> None:
    """Its script, on tiny models and a file of questions, takes a step; what it names exists."""
    page = (ROOT / "docs" / "trl.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (tmp_path / "questions.jsonl").write_text("\n".join(json.dumps({"prompt": f"What is {i}?", "answer": i}) for i in range(40)))
    fields = 'max_steps=32, save_strategy="no", use_cpu=True, bf16=False, report_to="none"'
    for old, new in (
        ("Qwen/Qwen3-0.6B", str(models / "student")),
        ("Qwen/Qwen3-8B", str(models / "teacher")),
        ('teacher_base_url="http://localhost:8000/v1"', fields),
        ("max_completion_length=4096", 'max_completion_length=6, recipe={"teacher": {"rollout": {"max_new_tokens": 6}}}'),
        ("gradient_accumulation_steps=8", "gradient_accumulation_steps=1"),
        ("runs/trl-zppo", str(tmp_path / "run")),
        ('"questions.jsonl"', repr(str(tmp_path / "questions.jsonl"))),
    ):
        assert old in code
        code = code.replace(old, new)
    made: dict[str, Any] = {}
    exec(compile(code, "trl.md", "exec"), made)  # noqa: S102 - the page's own
    assert made["trainer"].state.global_step == 32 and made["trainer"].parts.settings.rollout.batch_size == 32
    config = vars(ZPPOConfig("out", use_cpu=True, bf16=False, report_to="none"))
    for name in (
        "num_generations",
        "generation_batch_size",
        "teacher_base_url",
        "epsilon_high",
        "trl_generation",
        "num_iterations",
        "beta",
        "scale_rewards",
    ):
        assert name in config and f"`{name}" in page, name
