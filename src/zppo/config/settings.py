"""Every setting, with its meaning and the paper's default (method.md sections 2, 4, 6 and 10)."""

from __future__ import annotations

import difflib
import re
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from zppo.config.cluster_settings import cluster_problem
from zppo.config.data_settings import DataSettings
from zppo.config.methods import METHODS, Control, Estimator, Method
from zppo.config.model_settings import (
    FrozenModelSettings,
    JudgeSettings,
    JudgeUse,
    SamplingSettings,
    Section,
    StudentSettings,
    TeacherSettings,
)
from zppo.core.reformulate import REFORMULATIONS
from zppo.core.select import helped_below
from zppo.grading.answer_form import AFTER_THOUGHTS, AnswerForm, answer_form_of, check_place
from zppo.names import CLOSINGS

TOKENS_PER_MICROBATCH = 16_384  # by default, and where `auto` begins
TrackerName = Literal["aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio", "wandb"]
OVERRIDES = ("replay", "reformulations", "teacher_response", "control")


class MethodSettings(Section):
    """Which method trains, and single fields of its row that are overridden."""

    name: str = Field("zppo", description="row of the methods table (`zppo methods` prints it)")
    replay: bool | None = Field(None, description="override: replay hard questions from the buffer")
    reformulations: tuple[str, ...] | None = Field(
        None, description="override: kinds of reformulated prompts (bcq, ncq, hint, prefix, lte, partial; package.module:Class of your own)"
    )
    teacher_response: bool | None = Field(None, description="override: a teacher response replaces a wrong rollout of a hard group")
    control: Control | None = Field(None, description="override: placebo or scrambled content of the reformulated prompts")

    @model_validator(mode="after")
    def _possible(self) -> MethodSettings:
        if self.name not in METHODS:
            near = difflib.get_close_matches(self.name, METHODS, 1)
            said = f"; the nearest one is {near[0]}" if near else ""
            raise ValueError(f"{self.name!r} is no method; known: {', '.join(METHODS)}{said}")
        for kind in self.reformulations or ():
            if kind not in REFORMULATIONS and ":" not in kind:
                raise ValueError(
                    f"{kind!r} is no reformulation; known: {', '.join(sorted(REFORMULATIONS))}, or package.module:Class of your own"
                )
        if problem := self.resolve().problem():
            raise ValueError(f"method {self.name!r} with these overrides cannot train: {problem}; `zppo methods` lists what can")
        return self

    def resolve(self) -> Method:
        """The row of the table with the overrides applied."""
        overrides = {name: value for name in OVERRIDES if (value := getattr(self, name)) is not None}
        return replace(METHODS[self.name], **overrides)


VLLMAddress = Annotated[str, Field(pattern=r"^https?://[^@\s?#]+$")]


class VLLMSettings(Section):
    """vLLM as the student's sampling engine (docs/vllm.md)."""

    mode: Literal["colocate", "server"] = Field(
        "colocate", description="colocate: in the training process, on its GPU; server: in a `vllm serve` with GPUs of its own"
    )
    base_url: VLLMAddress | tuple[VLLMAddress, ...] = Field(
        "http://localhost:8000",
        min_length=1,
        description="server: where it listens; a list of servers is shared out evenly over the processes",
    )
    group_port: int = Field(51216, ge=1, le=65535, description="server: port on which weights are sent over NCCL")
    weights_folder: Path | None = Field(
        None, description="server: a folder that trainer and servers see under one name; weights go through it instead of over NCCL"
    )
    gpu_memory_utilization: float = Field(
        0.3, gt=0, le=1, description="colocate: share of the GPU's memory for vLLM; the rest is for training"
    )
    max_model_length: int | None = Field(
        None, ge=1, description="most tokens of prompt and completion; empty: the model's context, which may need much memory"
    )
    enable_sleep_mode: bool = Field(False, description="colocate: give vLLM's memory back during updates, for some seconds a step")

    @property
    def servers(self) -> tuple[str, ...]:
        """Base addresses of the servers, without the /v1 that addresses of teachers end in; none for colocate."""
        given = (self.base_url,) if isinstance(self.base_url, str) else self.base_url
        return tuple(url.rstrip("/").removesuffix("/v1").rstrip("/") for url in given) if self.mode == "server" else ()

    @property
    def runs_here(self) -> bool:
        """Whether vLLM must be installed where the student trains: to sample, or to send weights over NCCL."""
        return not (self.servers and self.weights_folder)


class RolloutSettings(SamplingSettings):
    """Student rollouts."""

    temperature: float = Field(1.0, gt=0, description="divides the logits, in sampling and in training")
    batch_size: int = Field(384, ge=1, description="new questions per step (X_new)")
    group_size: int = Field(8, ge=2, description="student rollouts per prompt (G_S)")
    max_rows: int | None = Field(None, ge=1, description="rollouts that are decoded at once; empty: all of a step")
    engine: Literal["transformers", "vllm"] = Field(
        "transformers", description="what samples: transformers, with keyed draws, or vLLM, fast on a GPU"
    )
    vllm: VLLMSettings = Field(VLLMSettings(), description="vLLM, where it is the engine")


class ZoneSettings(Section):
    """Hard questions: threshold, replay, caps, buffer (method.md sections 2 and 3)."""

    threshold: float = Field(0.5, gt=0, le=1, description="a question is hard iff its plain accuracy is below this (tau)")
    teacher_group_size: int = Field(4, ge=1, description="teacher rollouts per hard question (G_T)")
    rho_replay: float = Field(0.25, ge=0, description="replayed questions per new question")
    rho_aug: float = Field(0.25, ge=0, description="cap on BCQ and NCQ prompts per new question")
    buffer_capacity: int = Field(10_000, ge=1, description="capacity of the prompt replay buffer (Bmax)")
    ncq_duplicates: Literal["shown", "counted"] = Field(
        "shown", description="NCQ candidates with one text: each is shown (the paper); counted: one of them, with how many there are"
    )
    prefix_fraction: float = Field(0.4, gt=0, lt=1, description="share of a teacher response that Prefix gives")
    dynamic_sampling: Literal["off", "after-reformulation"] = Field(
        "off", description="extension: after-reformulation leaves all-right and all-wrong groups out of the batch and its denominator"
    )
    ties: Literal["random", "batch"] = Field("random", description="order among equally hard questions: keyed random, or batch order")


class AdvantageSettings(Section):
    """Advantages (Eqs. 1-6)."""

    scope: Estimator | None = Field(
        None,
        description="override: groups that the batch statistics are over, nontrivial or all; none: mean only; group: textbook GRPO; "
        "empty: the method's own estimator",
    )
    statistics: Literal["step", "minibatch"] = Field(
        "step", description="what mean and deviation of Eq. 3 are over: the whole rollout step, or each of its minibatches by itself"
    )


class LossSettings(Section):
    """The clipped surrogate (method.md section 6)."""

    clip_low: float = Field(0.20, ge=0, lt=1, description="clip range below 1")
    clip_high: float = Field(0.28, ge=0, description="clip range above 1")
    dual_clip: float | None = Field(10.0, gt=1, description="bound of the ratio for negative advantages; null is off")
    mask_truncated: bool = Field(False, description="leave truncated rollouts out of the loss and its denominator")


class LoraSettings(Section):
    """Low-rank adapters. There is no dropout: a run keeps its model in evaluation mode, where dropout does nothing."""

    rank: int = Field(16, ge=1, description="rank of the adapters")
    alpha: float = Field(32.0, gt=0, description="adapters are multiplied by alpha / rank")
    targets: Literal["all-linear"] | tuple[str, ...] = Field(
        "all-linear",
        description="layers that get adapters: all-linear (all but lm_head and a vision tower), or names and patterns of linear layers, "
        "e.g. [q_proj, v_proj, '*.mlp.*']",
    )

    @model_validator(mode="after")
    def _some_target(self) -> LoraSettings:
        if not self.targets:
            raise ValueError("targets is empty: name at least one layer, or all-linear")
        return self


class VisionSettings(Section):
    """The vision parts of a vision-language student (docs/images.md); where no question has an image they are frozen."""

    freeze_tower: bool = Field(
        False, description="leave the vision tower as it is: no gradients, no optimizer state; it is saved all the same"
    )
    freeze_projector: bool = Field(False, description="leave what brings its features into the language model (Qwen's merger) as it is")
    tower_rate: float = Field(1.0, gt=0, description="learning rate of the vision tower, in train.learning_rate")
    projector_rate: float = Field(1.0, gt=0, description="learning rate of the projector, in train.learning_rate")


class TrainSettings(Section):
    """Optimizer and loop."""

    steps: int | None = Field(None, ge=0, description="rollout steps; empty: `epochs` passes over the data")
    epochs: int = Field(1, ge=1, description="passes over the data where `steps` is empty")
    minibatches: int = Field(4, ge=1, description="optimizer steps per rollout step (I)")
    learning_rate: float = Field(1e-6, gt=0, description="constant, no warm-up")
    betas: tuple[float, float] = Field((0.9, 0.999), description="AdamW")
    adam_eps: float = Field(1e-8, gt=0, description="AdamW")
    weight_decay: float = Field(0.1, ge=0, description="AdamW")
    max_grad_norm: float | None = Field(1.0, gt=0, description="gradient norm clip; null is off")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto",
        description="trained weights are fp32 always; bf16 is autocast, and holds the frozen weights below LoRA adapters in bf16; auto: "
        "bf16 on a GPU, fp32 on a CPU",
    )
    device: Literal["auto", "cpu"] = Field("auto", description="cpu: leave a GPU alone")
    optimizer: Literal["adamw", "adamw-8bit"] = Field(
        "adamw", description="adamw-8bit keeps its state in 8 bits (`pip install bitsandbytes`)"
    )
    lora: LoraSettings | None = Field(
        None, description="train low-rank adapters and freeze the weights (peft); empty: train all weights; {} is on"
    )
    vision: VisionSettings = Field(VisionSettings(), description="the vision parts of a vision-language student")
    gradient_checkpointing: bool = Field(
        False, description="compute activations again in the backward pass: less memory, about a third more compute"
    )
    tokens_per_microbatch: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        TOKENS_PER_MICROBATCH,
        description="padded tokens of one forward and backward: the memory knob; "
        f"auto: {TOKENS_PER_MICROBATCH:,}, halved whenever memory runs out",
    )
    share_prompts: Literal["auto", "on", "off"] = Field(
        "auto",
        description="completions of one prompt are computed as branches of one sequence where that takes less: exact, for models with full "
        "attention and text (linear attention, sliding windows and images: never); auto: on a CPU, where it was measured",
    )
    old_logprobs: Literal["auto", "sampler", "forward"] = Field(
        "auto",
        description="auto: the sampler's where they are exact, else one forward pass; sampler: always the sampler's; both as long as "
        "`logprob_tolerance` is kept",
    )
    logprob_tolerance: float | None = Field(
        None,
        gt=0,
        description="largest mean difference between the sampler's and the trainer's log-probs before a step's first update, a single "
        "token 100 times as much; above it old log-probs come from a forward pass for the rest of the run; empty: 1e-4 for transformers "
        "in fp32, else 0.05 (bf16 rounds)",
    )
    check_engine_every: int = Field(1, ge=0, description="steps between comparisons of engine and trainer around an update; 0: none")
    engine_tolerance: float | None = Field(
        None,
        gt=0,
        description="largest mean difference of their log-probs; empty: 1e-3 for transformers in fp32, 0.2 for it in bf16, which rounds, "
        "0.05 for an engine with a copy of the weights",
    )
    checkpoint_every: int = Field(50, ge=0, description="steps between checkpoints; 0: none")
    checkpoint_in_background: bool = Field(
        False, description="write them while the next step goes on, from a copy of weights and optimizer in the processor's memory"
    )
    keep_checkpoints: int = Field(
        2, ge=1, description="older checkpoints are removed; after a fall of accuracy by half the newest one from before it stays"
    )
    stop_on_collapse: bool = Field(
        True, description="end a run that had right answers, and has none and no gradient any more; `zppo resume` goes on from before that"
    )
    threads: int | None = Field(None, ge=1, description="CPU threads of torch; empty: its default")
    trackers: tuple[TrackerName, ...] = Field(
        (), description="where the numbers of metrics.jsonl go too; files of TensorBoard and DVCLive: in the run folder"
    )
    tracker_project: str = Field("zppo", min_length=1, description="what trackers file the run under")
    tracker_completions: int = Field(
        2, ge=0, description="completions of each kind of prompt that trackers get of a step, as a table; 0: only numbers leave"
    )
    sharding: Literal["none", "fsdp2"] = Field(
        "none", description="several processes: each holds all, or a share (FSDP2); an accelerate configuration wins"
    )
    shard_within: int | None = Field(
        None,
        ge=2,
        description="fsdp2: so many processes share one copy of weights, gradients and optimizer state, and the groups of them only sum "
        "gradients (HSDP): the GPUs of a node; empty: all processes share one",
    )
    offload: bool = Field(
        False,
        description="fsdp2: each process's share of weights, gradients and optimizer state in the processor's memory, where AdamW steps",
    )
    collective_timeout: float = Field(1800, gt=0, description="seconds that a process waits for the others before it gives up")


class EvalSettings(SamplingSettings):
    """Held-out evaluation with plain prompts (decoding defaults: method.md section 10)."""

    temperature: float = Field(0.6, ge=0, description="0 is greedy; presence_penalty is off then, unless it is set")
    top_p: float = Field(0.95, gt=0, le=1, description="nucleus; 1 is off")
    top_k: int = Field(20, ge=0, description="0 is off")
    min_p: float = Field(0.0, ge=0, lt=1, description="0 is off")
    presence_penalty: float = Field(1.5, description="0 is off")
    repetition_penalty: float = Field(1.0, gt=0, description="1 is off")
    every: int = Field(50, ge=0, description="steps between evaluations; 0: before and after training only")
    samples: int = Field(1, ge=1, description="completions per question")

    @model_validator(mode="before")
    @classmethod
    def _greedy(cls, data: Any) -> Any:
        """Temperature 0 is the likeliest token; the default presence penalty would choose another one, so it is off unless it is set."""
        if isinstance(data, dict) and str(data.get("temperature")) in ("0", "0.0"):
            data = {"presence_penalty": 0.0, **data}
        return data


class PushSettings(Section):
    """The trained student, put on the Hugging Face hub at the end of a run (docs/runs.md)."""

    repo: str = Field(pattern=r"^[\w.-]+(/[\w.-]+)?$", description="repository of the hub: NAME or OWNER/NAME; made where there is none")
    private: bool = Field(True, description="a repository that is made is private")


class GradingSettings(Section):
    """How completions are graded."""

    reward: str | tuple[str, ...] | None = Field(
        None,
        description="a reward function of yours, package.module:function or file.py:function; or a list of them, first the one that judges "
        "the answer",
    )
    reward_weights: tuple[float, ...] = Field((), description="the weight of each in the reward, their weighted sum; empty: 1 each")
    reward_deadline: float = Field(60.0, gt=0, description="seconds for one call of an async reward function; what is late is ungraded")
    deadline: float = Field(3.0, gt=0, description="seconds after which a comparison counts as wrong")
    workers: int = Field(1, ge=1, description="worker processes for symbolic comparison")
    rounded_golds: bool = Field(True, description="a right answer that is a rounded decimal equals the exact answer: 0.33 is 1/3")
    answer_from: Annotated[str, AfterValidator(check_place)] | None = Field(
        None,
        description="where the answer stands: after-thoughts (the last \\boxed{} there), anywhere (the last one of the whole response, as "
        "in the paper: one in thoughts that were cut off counts too), line (the last line `Answer: ...`), or a regular expression with "
        "one group; empty: where prompts.closing asks for it",
    )

    @property
    def rewards(self) -> tuple[str, ...]:
        """The reward functions."""
        return (self.reward,) if isinstance(self.reward, str) else self.reward or ()

    @model_validator(mode="after")
    def _a_weight_for_each(self) -> GradingSettings:
        if self.reward == ():
            raise ValueError("grading.reward is an empty list; leave it out, or name a function")
        if self.reward_weights and len(self.reward_weights) != len(self.rewards):
            raise ValueError(
                f"grading.reward_weights has {len(self.reward_weights)} values for {len(self.rewards)} reward functions; give one for each"
            )
        return self


class Settings(Section):
    """A whole recipe."""

    method: MethodSettings = Field(MethodSettings(), description="the method")
    seed: int = Field(0, ge=0, description="keys every random draw")
    output: Path | None = Field(None, description="run folder; empty: runs/<recipe>-<date>-<time>")
    student: StudentSettings = Field(description="the model that is trained")
    teacher: TeacherSettings | None = Field(None, description="the frozen teacher; needed where the method reformulates")
    more_teachers: tuple[TeacherSettings, ...] = Field(
        (), description="extension: further teachers whose rollouts join the pool of correct responses; `teacher` alone compresses"
    )
    judge: JudgeSettings | None = Field(
        None, description="model that grades questions whose grading column says judge; empty: the teacher judges"
    )
    data: DataSettings = Field(description="questions")
    prompts: dict[str, Path] = Field(
        {},
        description="templates instead of the project's own: {closing: path, bcq: path, ...}; closing may be think-boxed (the paper's), "
        "boxed (for models that do not think) or answer-line, too",
    )
    rollout: RolloutSettings = Field(RolloutSettings(), description="student rollouts")
    zone: ZoneSettings = Field(ZoneSettings(), description="hard questions")
    advantage: AdvantageSettings = Field(AdvantageSettings(), description="advantages")
    loss: LossSettings = Field(LossSettings(), description="loss")
    train: TrainSettings = Field(TrainSettings(), description="optimizer and loop")
    eval: EvalSettings = Field(EvalSettings(), description="held-out evaluation")
    grading: GradingSettings = Field(GradingSettings(), description="grading")
    push: PushSettings | None = Field(None, description="put the trained student on the hub at the end; empty: it stays here")

    @model_validator(mode="before")
    @classmethod
    def _method_by_name(cls, data: Any) -> Any:
        """`method: zppo` is short for `method: {name: zppo}`."""
        if isinstance(data, dict) and isinstance(data.get("method"), str):
            data = {**data, "method": {"name": data["method"]}}
        return data

    @property
    def estimator(self) -> Estimator:
        """How advantages are computed."""
        return self.advantage.scope or self.method.resolve().advantage

    @property
    def helped_below(self) -> float:
        """The plain accuracy below which a question is helped: tau, but for rivals."""
        return helped_below(self.method.resolve().helped, self.zone.threshold)

    @property
    def drops_trivial(self) -> bool:
        """Whether groups whose rewards are all equal leave the batch and its denominator."""
        return self.zone.dynamic_sampling == "after-reformulation" or self.method.resolve().refill

    @property
    def answer_form(self) -> AnswerForm:
        """How an answer stands in a response: as `grading.answer_from` says, else as the closing instruction asks for it."""
        place = self.grading.answer_from or CLOSINGS.get(str(self.prompts.get("closing", "")), AFTER_THOUGHTS)
        return answer_form_of(place, self.grading.deadline, self.grading.workers)

    @property
    def own_code(self) -> dict[str, str]:
        """Code that is no part of this project and that a run of the recipe imports, by the setting that names it."""
        models = {"student": self.student, "teacher": self.teacher, "judge": self.judge}
        models |= {f"more_teachers.{i}": teacher for i, teacher in enumerate(self.more_teachers)}
        kernels = {f"{name}.attention": model.attention for name, model in models.items() if model and "/" in (model.attention or "")}
        own = {f"method.reformulations.{i}": kind for i, kind in enumerate(self.method.resolve().reformulations) if ":" in kind}
        several = not isinstance(self.grading.reward, str)
        rewards = {f"grading.reward.{i}" if several else "grading.reward": spec for i, spec in enumerate(self.grading.rewards)}
        named = {**rewards, **own, **kernels}
        return {key: spec for key, spec in named.items() if spec}

    @property
    def judging(self) -> tuple[FrozenModelSettings, JudgeUse] | None:
        """Which model judges and how; None where there is neither a judge nor a teacher."""
        if self.judge is not None:
            return self.judge, self.judge
        return (self.teacher, self.teacher.judge) if self.teacher is not None else None

    @model_validator(mode="after")
    def _quantized_where_possible(self) -> Settings:
        if self.student.quantize is not None:
            if self.train.lora is None:
                raise ValueError(
                    "student.quantize holds frozen weights in 4 bits, and without train.lora none are frozen: set train.lora to {}"
                )
            if self.rollout.engine == "vllm":
                raise ValueError(
                    "student.quantize does not go with rollout.engine: vllm, which is sent whole weights: take transformers, or leave "
                    "one of them out"
                )
        return self

    @model_validator(mode="after")
    def _cluster_where_possible(self) -> Settings:
        if problem := cluster_problem(self):
            raise ValueError(f"student.tinker is set: {problem}")
        return self

    @model_validator(mode="after")
    def _teacher_where_needed(self) -> Settings:
        method = self.method.resolve()
        if method.needs_teacher and self.teacher is None:
            raise ValueError(
                f"method {method.name!r} trains on {method.gradient}, which needs a teacher: "
                "set teacher.model, or choose grpo or grpo-replay"
            )
        if method.asks_distributions and self.teacher is not None and self.teacher.base_urls:
            raise ValueError(
                f"method {method.name!r} compares next-token distributions, which no chat server gives: teacher.base_urls must be empty, "
                "so that the teacher runs in this process; or choose a method that keeps the teacher in the prompt (zppo)"
            )
        return self


_VISION_LAYERS = re.compile(r"vis|image|merger|project|connector")


def names_vision_layers(target: str) -> bool:
    """Whether an entry of `train.lora.targets` is a pattern that names layers of a vision tower or projector (*visual*, *connector*)."""
    return "*" in target and _VISION_LAYERS.search(target) is not None
