"""ZPPO in TRL: `ZPPOTrainer` is a `GRPOTrainer` whose rollout step is the method's (docs/trl.md).

One method of TRL is overridden, the one that makes a rollout batch: groups are sampled with the parts that `zppo train` has, TRL scores and
pads them, and its loss gets the rows that have an advantage.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from packaging.specifiers import SpecifierSet
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from zppo.config.recipe import load_recipe
from zppo.config.settings import Settings
from zppo.core.metrics import accuracy_by_kind, composition
from zppo.core.types import Group, Question
from zppo.data.load import listed_questions
from zppo.distributed.processes import ONE_PROCESS, Processes
from zppo.engines.base import Engine, FunctionEngine
from zppo.engines.chat import Chat
from zppo.engines.transformers import TransformersEngine
from zppo.errors import CheckpointError, EngineError, SettingsError
from zppo.grading.reward_function import RewardFunction, form_of
from zppo.models.student_model import context_length, read_template
from zppo.names import model_folder
from zppo.rollout.data import idle_parts
from zppo.rollout.rewards import Rewards
from zppo.rollout.run_data import check_context
from zppo.rollout.step_parts import parts
from zppo.runs.files import write_whole
from zppo.step_log import StepLog
from zppo.teacher.interface import Teacher

try:
    import trl
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer  # type: ignore[attr-defined] # they are given lazily
except ImportError as error:
    raise SettingsError(f"zppo.integrations.trl needs TRL ({error}): pip install 'zppo[trl]'") from error

SECTIONS = ("method", "student", "teacher", "more_teachers", "judge", "data", "prompts", "zone", "advantage", "grading")
ADMITTED = ">=1.14,!=1.15.*,<1.17"  # as the extra `trl` says
STATE = "zppo.json"  # what a checkpoint of TRL holds of ours
_PROMPTS = ("prompt_ids", "prompt_mask")
_COMPLETIONS = ("completion_ids", "completion_mask", "old_per_token_logps", "sampling_per_token_logps", "importance_sampling_ratio")
_LOGGED = ("hard_questions", "teacher_rollouts", "teacher_correct", "teacher_unreachable", "compression_failed", "bcq_raw_pairs")
if trl.__version__ not in SpecifierSet(ADMITTED):
    raise SettingsError(f"TRL {trl.__version__} is installed, and {ADMITTED} is admitted: pip install 'zppo[trl]'")


@dataclass
class ZPPOConfig(GRPOConfig):
    """`GRPOConfig` with the paper's loss and optimizer as defaults, the teacher's address, and the sections of a recipe.

    I, the optimizer steps of a rollout step, is `steps_per_generation / gradient_accumulation_steps`; X_new is
    `generation_batch_size / num_generations` questions, and `num_generations` is G_S.

    Args:
        teacher_base_url: an OpenAI-compatible server that has the teacher; empty: it is loaded in this process.
        recipe: sections of a recipe over the defaults, `{"zone": {"rho_aug": 0.5}}`; not what this class has a field for.
        trl_generation: sample as `GRPOTrainer` does (always with `use_vllm`), instead of with draws that are keyed by question.
    """

    _VALID_DICT_FIELDS = [*GRPOConfig._VALID_DICT_FIELDS, "recipe"]

    teacher_base_url: str | None = field(default=None, metadata={"help": "OpenAI-compatible server of the teacher; empty: in process."})
    recipe: dict[str, Any] | str | None = field(default=None, metadata={"help": "Sections of a zppo recipe: zone, teacher, prompts, ..."})
    trl_generation: bool = field(default=False, metadata={"help": "Sample as GRPOTrainer does, instead of with keyed draws."})
    epsilon_high: float | None = field(default=0.28, metadata={"help": "Clip range above 1."})
    delta: float | None = field(default=10.0, metadata={"help": "Bound of the ratio for negative advantages (dual clip)."})
    scale_rewards: str = field(default="none", metadata={"help": "Not used: advantages are ZPPO's."})
    weight_decay: float = field(default=0.1, metadata={"help": "Weight decay of AdamW."})
    lr_scheduler_type: str = field(default="constant", metadata={"help": "Schedule of the learning rate."})
    disable_dropout: bool = field(default=True, metadata={"help": "No dropout: old and new log-probs must be comparable."})


_ONLY: Mapping[str, Mapping[str, object]] = {
    "a rollout batch is used once": {"num_iterations": 1},
    "ZPPO has no KL term": {"beta": 0.0},
    "the loss is a mean over tokens": {"loss_type": "dapo", "importance_sampling_level": "token", "off_policy_mask_threshold": None},
    "advantages are ZPPO's (recipe={'advantage': {'scope': ...}} changes them)": {"scale_rewards": "none"},
    "there is one reward": {"reward_weights": None, "multi_objective_aggregation": "sum_then_normalize"},
    "rows without an advantage never reach the loss": {"top_entropy_quantile": 1.0, "entropy_coef": 0.0, "use_adaptive_entropy": False},
    "it was not tried": {"use_transformers_continuous_batching": False},
}
_KEYED: Mapping[str, object] = {"generation_kwargs": None, "min_p": None, "repetition_penalty": 1.0, "cache_implementation": None}


def check_config(args: Any) -> int:
    """I, the optimizer steps of a rollout step. SettingsError, with the field's name, for what would train something else."""
    if not issubclass(type(args), ZPPOConfig):
        raise SettingsError(f"args is a {type(args).__name__}: give a ZPPOConfig, whose defaults are the paper's")
    wanted = dict(_ONLY)
    if not (args.trl_generation or args.use_vllm):
        wanted["keyed draws do not know it (trl_generation=True samples as GRPOTrainer does)"] = _KEYED
    if args.world_size > 1:
        wanted["it was not tried with several processes"] = {"use_vllm": False}
    wrong = [(n, why) for why, fields in wanted.items() for n, only in fields.items() if getattr(args, n) not in (only, only or None)]
    group, each, rows = args.num_generations, args.steps_per_generation, args.per_device_train_batch_size * args.steps_per_generation
    if wrong:
        raise SettingsError("; ".join(f"{name}={getattr(args, name)!r} cannot be used: {why}" for name, why in wrong))
    updates: int = max(1, each // args.gradient_accumulation_steps)
    eval_rows = args.per_device_eval_batch_size if args.do_eval and args.eval_strategy != "no" else 0
    save_steps, a_step = args.save_steps if args.save_strategy == "steps" else 0, "the updates of a rollout step, which is not split"
    for name, value, part, why in (
        ("per_device_train_batch_size * steps_per_generation", rows, group, "num_generations: a group lies in one process"),
        ("steps_per_generation", each, args.gradient_accumulation_steps, "gradient_accumulation_steps: an update lies in one rollout step"),
        ("max_steps", max(0, args.max_steps), updates, a_step),
        ("save_steps", save_steps, updates, a_step),
        ("per_device_eval_batch_size", eval_rows, args.num_generations_eval or group, "num_generations_eval"),
    ):
        if value % part or 0 < value < 1:
            raise SettingsError(f"{name}={value} does not divide by {part}, {why}")
    return updates


def settings_of(args: Any, student: str, teacher: str | None) -> Settings:
    """The recipe that the fields of a configuration and its `recipe` stand for. SettingsError where they are wrong."""
    own = dict(_leaves(args.recipe)) if isinstance(args.recipe, Mapping) else {}
    if unknown := [name for name in own if name.partition(".")[0] not in SECTIONS]:
        raise SettingsError(f"recipe holds {unknown[0]!r}, and may hold {', '.join(SECTIONS)}; fields of ZPPOConfig set the rest")
    if teacher is None and any(name.startswith("teacher.") for name in own) and "teacher.model" not in own:
        raise SettingsError("teacher_model is missing: name a checkpoint, or a model at teacher_base_url; or leave recipe's `teacher` out")
    base: dict[str, Any] = {"seed": args.seed, "data": {"train": "train_dataset"}}
    base["student"] = {"model": student, "template_args": args.chat_template_kwargs or {}}
    base["rollout"] = {"batch_size": args.generation_batch_size // args.num_generations, "group_size": args.num_generations}
    base["rollout"] |= {"max_new_tokens": args.max_completion_length, "temperature": args.temperature, "top_p": args.top_p}
    base["rollout"]["top_k"] = args.top_k or 0
    if teacher is not None:
        base["teacher"] = {"model": teacher, "base_urls": [args.teacher_base_url] if args.teacher_base_url else []}
    settings = load_recipe(base, own)
    method = settings.method.resolve()
    if not method.plain_step:
        raise SettingsError(f"method {method.name!r} trains on {method.gradient}: `zppo train` does that, the trainer for TRL does not")
    return settings


def _leaves(section: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in section.items():
        yield from _leaves(value, f"{before}{name}.") if isinstance(value, Mapping) and value else ((f"{before}{name}", value),)


def _read(rows: Any, name: str, settings: Settings) -> list[Question]:
    if not isinstance(rows, Dataset):
        raise SettingsError(f"{name} is a {type(rows).__name__}: give a `datasets.Dataset`, whose rows can be looked up; no iterable one")
    own = settings.data.columns  # reward functions are given every column
    extra = tuple(name for name in rows.column_names if name not in (own.prompt, own.messages, own.images, "image"))
    questions = listed_questions(rows, name, own.model_copy(update={"extra": extra}), settings.data.reading())
    if "Image(" in repr(rows.features) or any(question.images for question in questions):
        raise SettingsError(f"{name} has images, which the trainer for TRL does not show; `zppo train` does")
    return questions


def one_function(reward_funcs: Any) -> RewardFunction | None:
    """The reward function; None for the rules. SettingsError for several, or a model."""
    given = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs] if reward_funcs is not None else []
    if len(given) > 1:
        raise SettingsError(f"reward_funcs holds {len(given)}: what is hard follows from one reward; add them up in one function")
    if given and (not callable(given[0]) or isinstance(given[0], torch.nn.Module)):
        raise SettingsError("reward_funcs is a reward model, which says not what is right: give a function, or None for the column answer")
    name = getattr(given[0], "__name__", type(given[0]).__name__) if given else ""
    return RewardFunction(given[0], name, form=form_of(given[0], name)) if given else None


class ZPPOTrainer(GRPOTrainer):
    """Trains with ZPPO as `GRPOTrainer` trains with GRPO.

    Args:
        model, processing_class: as of `GRPOTrainer`; `args` is a `ZPPOConfig`.
        reward_funcs: one function of TRL's form, for student and teacher alike; None grades the boxed answer against the column `answer`.
        train_dataset, eval_dataset: columns `prompt` (a text, or a list of turns) and `answer`.
        teacher_model: a checkpoint, the teacher's name at `args.teacher_base_url`, or a `zppo.teacher.interface.Teacher`.
        more: `callbacks`, `optimizers`, `peft_config`, `quantization_config`.

    Raises:
        ZPPOError: what cannot be trained so, or does not fit, by name.
    """

    args: Any
    model: Any
    _tag_names, _name = ["trl", "zppo"], "ZPPO"
    _paper = {"title": "Zone of Proximal Policy Optimization: Teacher in Prompts, Not Gradients", "id": "2606.18216"}

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: ZPPOConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        *,
        teacher_model: str | Teacher | None = None,
        **more: Any,
    ) -> None:
        model = model_folder(model) if isinstance(model, str) else model
        name = model if isinstance(model, str) else str(getattr(model.config, "_name_or_path", "") or "model")
        args = ZPPOConfig(f"{Path(name).name}-ZPPO") if args is None else args
        self.updates, function = check_config(args), one_function(reward_funcs)
        if refused := [key for key in more if key in ("tools", "environment_factory", "rollout_func", "reward_processing_classes")]:
            raise SettingsError(f"{refused[0]} cannot be used: ZPPO asks one question, and grades one answer to it")
        own_teacher = [] if teacher_model is None or isinstance(teacher_model, str) else [teacher_model]
        settings = settings_of(args, name, "teacher_model" if own_teacher else teacher_model)  # type: ignore[arg-type]
        data = {"train": train_dataset} | ({"eval": eval_dataset} if eval_dataset is not None else {})
        asked = {key: _read(rows, f"{key}_dataset", settings) for key, rows in data.items()}
        if (count := len(asked["train"])) < settings.rollout.batch_size:
            raise SettingsError(
                f"train_dataset has {count} questions, and a step {settings.rollout.batch_size}: lower generation_batch_size"
            )
        for text in idle_parts(settings, count):
            logging.getLogger("zppo").warning(text)
        self._questions = {(key, q.id): q for key, questions in asked.items() for q in questions}
        reward: Any = lambda zppo_reward, **_: zppo_reward  # noqa: E731 - what was graded already
        reward.__name__ = function.name if function else "accuracy"
        ids = {key: Dataset.from_dict({"prompt": [q.id for q in questions]}) for key, questions in asked.items()}
        super().__init__(model, reward, args, ids["train"], ids.get("eval"), processing_class, **more)
        if self.accelerator.distributed_type not in ("NO", "MULTI_CPU", "MULTI_GPU") or self.aux_loss_enabled:
            what = "an auxiliary loss of experts" if self.aux_loss_enabled else self.accelerator.distributed_type
            raise SettingsError(f"{what} cannot be used: train a dense model, whole in every process")
        self.rollout_func = lambda prompts, trainer: self._sampled()
        network = self.model.get_base_model() if hasattr(self.model, "peft_config") else self.model
        chat = Chat(self._tokenizer, settings.student.template_args, read_template(settings.student))
        self.parts = parts(
            settings,
            self._questions.values(),
            chat,
            teachers=own_teacher or None,
            rule=Rewards([function], [1.0], settings.grading.reward_deadline, settings.answer_form) if function else None,
            context=context_length(network),
            device=self.accelerator.device,
            processes=Processes(self.accelerator.process_index, self.accelerator.num_processes),
        )
        every, plain = list(self._questions.values()), self.parts.prompts.plain
        check_context(settings, context_length(network), every, [], lambda question: len(plain(question).ids))
        precision = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.accelerator.mixed_precision)
        engine: Engine = TransformersEngine(network, chat.eos_ids(network), chat.pad_id(network), autocast_dtype=precision)
        if args.trl_generation or args.use_vllm:
            generate: Any = self._generate_single_turn
            engine = FunctionEngine(lambda ids, n: generate([p for p in ids for _ in range(n)], None, {}, n), chat.eos_ids(network))
        self.student = self.parts.student(engine)
        self.student = replace(self.student, grades_while_sampling=self.student.grades_while_sampling and not function)
        self.add_callback(_KeepState(self))

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """A rollout step: TRL's rows of this process in, what its loss takes out."""
        asked, processes = [row["prompt"] for row in inputs], self.student.processes
        if not self.model.training:
            counts = [(self.parts.prompts.plain(self._questions["eval", name]), len(list(same))) for name, same in groupby(asked)]
            student = replace(self.student, group_size=max(n for _, n in counts), processes=ONE_PROCESS)
            made = student.rollout([prompt for prompt, _ in counts], StepLog(), purpose="eval")
            return self._scored([replace(group, rollouts=group.rollouts[:n]) for group, (_, n) in zip(made, counts, strict=True)])
        groups = self._take_step([name for part in processes.gather(asked) for name in part])
        # Advantages over the whole step, and which rows stand in the denominator.
        kept, masked = {id(group) for group in self.parts.counted(groups)}, self.args.mask_truncated_completions
        stands = torch.tensor([[id(g) in kept and r.graded and not (masked and r.truncated) for r in g.rollouts] for g in groups])
        advantages = self.parts.advantages(groups).view(stands.shape) * stands
        # Every process has equally many groups scored; those that make up the number weigh nothing.
        mine = torch.arange(processes.rank, len(groups), processes.size)
        spare = math.ceil(len(groups) / processes.size) - len(mine)
        output = self._scored([groups[i] for i in [*mine.tolist(), *[0] * spare]])
        if unknown := output.keys() - {*_PROMPTS, *_COMPLETIONS, "advantages", "num_items_in_batch"}:
            raise EngineError(f"TRL {trl.__version__} gives its loss {sorted(unknown)}, unknown to ZPPOTrainer: take another version")
        own = torch.stack([advantages[mine], stands[mine]]).flatten(1).to(output["advantages"])
        output["advantages"], weights = torch.nn.functional.pad(own, (0, spare * self.args.num_generations))
        output["num_items_in_batch"] = self.accelerator.gather((output["completion_mask"].sum(-1) * weights).sum()).sum()
        return self._live(output)

    def _take_step(self, asked: Sequence[str]) -> list[Group]:
        """Plain and reformulated groups of a step of Algorithm 1, the same in all processes, and the buffer after it."""
        made, log = self.parts, StepLog(self.state.global_step // self.updates + 1)
        new = [self._questions["train", name] for name in dict.fromkeys(asked)]
        if len(new) != made.settings.rollout.batch_size or len(new) * self.args.num_generations != len(asked):
            raise EngineError(f"TRL gave {len(asked)} rows of {len(new)} questions to a step of {made.settings.rollout.batch_size}")
        plain = self.student.rollout([made.prompts.plain(q) for q in [*new, *made.replayed(new)]], log)
        again = made.reformulate(made.hard(plain, log.step), len(new), log)
        groups = [*plain, *self.student.rollout(again.prompts, log)]
        changes = made.remember(plain, log.step)
        self.student.processes.gather_log(log)
        numbers: dict[str, Any] = {f"accuracy/{kind}": value for kind, value in accuracy_by_kind(groups).items()}
        numbers |= {f"share/{kind}": value for kind, value in composition(groups, made.settings.zone.threshold).items()}
        numbers |= {"buffer": len(made.buffer), "admitted": len(changes.admitted), "graduated": len(changes.graduated)}
        numbers |= {"no_answer_share": sum(r.answer is None for g in groups for r in g.rollouts) / sum(len(g.rollouts) for g in groups)}
        numbers |= {name: log.counts[name] for name in _LOGGED if name in log.counts}
        for name, value in numbers.items():
            self._metrics["train"][f"zppo/{name}"].append(value)
        for text in [*log.warnings.values(), *(f"the {who}: {text}" for who, text in log.errors.items())]:
            logging.getLogger("zppo").warning("step %s: %s", log.step, text)
        return groups

    def _scored(self, groups: Sequence[Group]) -> dict[str, Any]:
        """What TRL makes of groups: logs, padded tensors, old log-probs."""
        self._rows = [(group.prompt, rollout) for group in groups for rollout in group.rollouts]
        show, rows = self.parts.prompts.chat.show, list[dict[str, Any]]()
        rows += [{"prompt": show(p.ids + p.forced_ids), "zppo_reward": r.reward if r.graded else None} for p, r in self._rows]
        return dict(super()._generate_and_score_completions(rows))

    def _sampled(self) -> dict[str, Any]:
        """The same for TRL's `rollout_func`: ids, and log-probs where TRL corrects by them."""
        logprobs = [rollout.logprobs.tolist() for _, rollout in self._rows] if self.use_vllm else None
        ids = [(list(p.ids + p.forced_ids), r.ids.tolist()) for p, r in self._rows]
        return {"prompt_ids": [p for p, _ in ids], "completion_ids": [c for _, c in ids], "logprobs": logprobs}

    def _live(self, output: dict[str, Any]) -> dict[str, Any]:
        """The rows with a gradient, made up to equally many in every minibatch and process with rows that have none."""
        live, count = output["advantages"].nonzero()[:, 0], self.args.steps_per_generation
        each = max(1, *(math.ceil(n / count) for n in self.student.processes.gather(len(live))))
        rows = torch.cat([live, live.new_zeros(each * count - len(live))])
        output |= {name: output[name][rows] for name in (*_PROMPTS, *_COMPLETIONS, "advantages") if name in output}
        output["advantages"][len(live) :], output["completion_mask"][len(live) :] = 0.0, 0
        first, last = int(output["prompt_mask"].any(0).int().argmax()), max(1, int(output["completion_mask"].any(0).sum()))
        return output | {n: output[n][:, first:] for n in _PROMPTS} | {n: output[n][:, :last] for n in _COMPLETIONS if n in output}

    def train(self, resume_from_checkpoint: str | bool | None = None, *rest: Any, **more: Any) -> Any:
        """As of `GRPOTrainer`; the buffer comes from the checkpoint too. CheckpointError where it has none, or a step is half done."""
        folder = get_last_checkpoint(self.args.output_dir) if resume_from_checkpoint is True else resume_from_checkpoint
        if folder:
            path = Path(folder) / STATE
            try:
                state = json.loads(path.read_text(encoding="utf-8"))
                if state["updates"] % self.updates:
                    raise ValueError(f"written after {state['updates']} updates, inside a rollout step of {self.updates}")
                self.parts.buffer.load_state_dict(state["buffer"])
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise CheckpointError(f"{path} is not what ZPPOTrainer goes on from ({error!r}): name another checkpoint") from error
        return super().train(folder or resume_from_checkpoint, *rest, **more)


class _KeepState(TrainerCallback):
    """Puts the buffer into every checkpoint."""

    def __init__(self, trainer: ZPPOTrainer) -> None:
        self.trainer = trainer

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if args.should_save:
            kept = {"updates": state.global_step, "buffer": self.trainer.parts.buffer.state_dict()}
            write_whole(Path(args.output_dir) / f"checkpoint-{state.global_step}" / STATE, json.dumps(kept))


__all__ = ["ZPPOConfig", "ZPPOTrainer"]
