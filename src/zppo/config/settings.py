"""Every setting, with its meaning and the paper's default (method.md sections 2, 4, 6 and 10)."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag, model_validator

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
from zppo.core.types import AnswerList
from zppo.data.layouts import USUAL_CHOICES
from zppo.data.local_files import SourceSettings
from zppo.data.mixture import Part, short_names
from zppo.data.reasoning_gym import check_apart
from zppo.data.row_filters import check_filters
from zppo.data.rows import USUAL_IMAGES
from zppo.grading.answer_form import AFTER_THOUGHTS, AnswerForm, answer_form_of, check_place
from zppo.images.store import PixelLimits
from zppo.names import CLOSINGS

TOKENS_PER_MICROBATCH = 16_384  # by default, and where `auto` begins
TrackerName = Literal["aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio", "wandb"]
OVERRIDES = ("replay", "reformulations", "teacher_response", "control")


class MethodSettings(Section):
    """Which method trains, and single fields of its row that are overridden."""

    name: str = Field("zppo", description="row of the methods table (`zppo methods` prints it)")
    replay: bool | None = Field(None, description="override: replay hard questions from the buffer")
    reformulations: tuple[str, ...] | None = Field(
        None, description="override: kinds of reformulated prompts (bcq, ncq, hint, prefix, or package.module:Class of your own)"
    )
    teacher_response: bool | None = Field(None, description="override: a teacher response replaces a wrong rollout of a hard group")
    control: Control | None = Field(None, description="override: placebo or scrambled content of the reformulated prompts")

    @model_validator(mode="after")
    def _possible(self) -> MethodSettings:
        if self.name not in METHODS:
            raise ValueError(f"{self.name!r} is no method; known: {', '.join(METHODS)}")
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


class ColumnSettings(Section):
    """Which column of the data holds what; `a.b` is the value under b of the object in column a."""

    prompt: str = Field("prompt", description="the question as text")
    messages: str = Field("messages", description="the question as a list of {role, content}; used where the row has it")
    answer: str = Field("answer", description="the right answer")
    images: str = Field(
        USUAL_IMAGES, description="an image or a list of them: paths relative to the data file, bytes, or data: URLs; '' for none"
    )
    id: str = Field("id", description="unique id; rows without the column are named <file>:<row>")
    level: str = Field("level", description="label by which held-out accuracy is broken down")
    grading: str = Field("grading", description="rule or judge: who grades the question; rows without the column go by rule")
    extra: tuple[str, ...] = Field((), description="further columns, which reward functions are given (TRL's **columns, question.extra)")
    answer_list: str = Field("answer_list", description="any, set or ordered, for one row; rows without the column go by data.answer_list")
    solution: str = Field("", description="a worked solution, shown where the question is one of data.examples; '' for none")
    choices: str = Field(
        USUAL_CHOICES, description="the choices of a question, shown with it; by default options, or A, B, C, ..., too; '' for none"
    )


class ImageSettings(Section):
    """Images of questions (docs/images.md)."""

    min_pixels: int = Field(PixelLimits().min_pixels, ge=1, description="smaller images are enlarged to about so many pixels")
    max_pixels: int = Field(PixelLimits().max_pixels, ge=1, description="larger images are reduced to about so many pixels")
    folder: Path | None = Field(
        None, description="where images are kept that come as bytes; empty: $ZPPO_CACHE/images, or zppo/images in the user's cache folder"
    )
    cache_gib: float = Field(4.0, gt=0, description="memory for the preprocessed images of a step; what is over it is preprocessed again")

    @model_validator(mode="after")
    def _some_size(self) -> ImageSettings:
        if self.min_pixels > self.max_pixels:
            raise ValueError(f"min_pixels is {self.min_pixels}, more than max_pixels, which is {self.max_pixels}; exchange them")
        return self


Duplicates = Literal["keep", "one"]
_as_list = BeforeValidator(lambda given: (given,) if isinstance(given, str) else given)
Filters = Annotated[tuple[str, ...], _as_list, AfterValidator(check_filters)]
"""One filter may stand without brackets."""


class MixtureSource(Section):
    """One of several sources of training questions; what is empty is as `data` says."""

    source: str = Field(description="where its questions are, as in data.train")
    name: str | None = Field(
        None, min_length=1, description="what it is called in the plan, and before ids that another source has too; empty: its last part"
    )
    config: str | None = Field(None, description="as data.config")
    split: str | None = Field(None, min_length=1, description="as data.split")
    revision: str | None = Field(None, description="as data.revision")
    columns: ColumnSettings | None = Field(None, description="as data.columns, of which nothing is left where it is set")
    answer_after: str | None = Field(None, min_length=1, description="as data.answer_after")
    answer_list: AnswerList | None = Field(None, description="as data.answer_list")
    limit: int | None = Field(None, ge=1, description="as data.limit: use its first N rows only")
    filters: Filters | None = Field(None, description="as data.filters")
    duplicates: Duplicates | None = Field(None, description="as data.duplicates")
    cap: int | None = Field(None, ge=1, description="at most so many of its questions, drawn by seed and id")
    weight: float | None = Field(
        None, gt=0, description="its share in proportion to the other weights: the scarcest source gives all that it has, the others less"
    )


def _kind_of_source(value: Any) -> str:
    return "tuple[sources]" if isinstance(value, list | tuple) else "constrained-str"


TrainSources = Annotated[
    Annotated[str, Tag("constrained-str")] | Annotated[tuple[MixtureSource, ...], Tag("tuple[sources]")], Discriminator(_kind_of_source)
]
"""A source, or several; the tags are what `config.recipe` leaves out of the key that an error names."""


_OF_READING = ("config", "split", "revision", "answer_after", "answer_list")


class DataSettings(Section):
    """Questions in."""

    train: TrainSources = Field(
        description="JSON lines, JSON, CSV or parquet file, a folder of such files or of save_to_disk, hub:<owner>/<name>, "
        "reasoning_gym:<task>, or lab:<world>/train; or a list of sources, {source, filters, cap, ...} each"
    )
    eval: str | None = Field(None, description="held-out questions, from the same kinds of source; empty: no evaluation")
    config: str | None = Field(None, description="configuration of a hub set or of a folder laid out like one")
    split: str = Field("train", min_length=1, description="split of a hub set or a folder that the student trains on")
    eval_split: str = Field("test", min_length=1, description="split of a hub set or a folder that is held out")
    revision: str | None = Field(None, description="revision of a hub set: a commit, a tag or a branch")
    streaming: bool = Field(False, description="read the first `limit` rows of a hub set one by one instead of downloading it; needs limit")
    columns: ColumnSettings = Field(ColumnSettings(), description="names of the columns")
    images: ImageSettings = Field(ImageSettings(), description="how images are kept, and shown to models")
    answer_after: str | None = Field(
        None,
        min_length=1,
        description="the right answer is what follows the last occurrence of this in the answer column: '####' for GSM8K; '<answer>' ends "
        "at '</answer>'; '\\boxed' is what the last box holds",
    )
    answer_list: AnswerList | None = Field(
        None,
        description="what a list of right answers means: any one of them is right, all are wanted in any order (set), or in their order "
        "(ordered); needed where the answer column holds lists",
    )
    filters: Filters = Field(
        (), description="training rows that are used: those for which all of these hold, e.g. ['pass_rate <= 0.5', 'image_width >= 100']"
    )
    duplicates: Duplicates = Field(
        "keep", description="training questions with the same text and images: keep all of them, or the first one; they are told either way"
    )
    examples: int = Field(
        0,
        ge=0,
        le=16,
        description="training questions that every prompt shows, with their answers, before its own; drawn by the seed, not trained on",
    )
    max_prompt_tokens: int = Field(4096, ge=1, description="longer plain prompts are dropped, with a count")
    limit: int | None = Field(None, ge=1, description="use the first N training questions only; of several sources the first N of each")
    eval_limit: int | None = Field(None, ge=1, description="use the first N held-out questions only")

    @model_validator(mode="after")
    def _readable(self) -> DataSettings:
        if not self.train:
            raise ValueError("data.train names no source; give one, or a list of {source: ...}")
        several = not isinstance(self.train, str)
        keys = [f"data.train.{number}" if several else "data.train" for number in range(len(self.parts))]
        named = [(k, part.source, f"{k}.limit" if several else "data.limit", part.limit) for k, part in zip(keys, self.parts, strict=True)]
        named += [("data.eval", self.eval, "data.eval_limit", self.eval_limit)] if self.eval is not None else []
        from_hub = [row for row in named if row[1].startswith("hub:")]
        for setting, value in (("data.streaming", self.streaming), ("data.revision", self.revision)):
            if value and not from_hub:
                raise ValueError(f"{setting} is set, but neither data.train nor data.eval is a hub set; leave it out")
        for setting, source, name, limit in from_hub:
            if self.streaming and limit is None:
                raise ValueError(
                    f"data.streaming needs {name} for {setting}={source}: every epoch goes over all questions in an order of its own, "
                    "so they are held in memory; set how many to read from the start, or leave streaming out"
                )
        for key, part in zip(keys, self.parts, strict=True):
            if part.reading.revision != self.revision and not part.source.startswith("hub:"):
                raise ValueError(f"{key}.revision is set, and {part.source} is no hub set; leave it out")
        weighted = [part.weight is not None for part in self.parts]
        if any(weighted) and not all(weighted):
            raise ValueError(
                f"{sum(weighted)} of the {len(weighted)} sources of data.train have a weight: give each one a weight, or take cap, which "
                "is a number of questions"
            )
        if self.eval is not None:
            for part in self.parts:
                check_apart(part.source, self.eval)
        return self

    @property
    def parts(self) -> tuple[Part, ...]:
        """The sources of the training questions, with all that the recipe says about each; a single one is one part."""
        given = (MixtureSource(source=self.train),) if isinstance(self.train, str) else self.train
        names = short_names([(each.source, each.name, each.config) for each in given])
        return tuple(self._part(each, name) for each, name in zip(given, names, strict=True))

    def _part(self, each: MixtureSource, name: str) -> Part:
        own = {key: value for key in _OF_READING if (value := getattr(each, key)) is not None}
        return Part(
            each.source,
            name,
            replace(self.reading(), **own),
            each.columns or self.columns,
            each.limit or self.limit,
            self.filters if each.filters is None else each.filters,
            (each.duplicates or self.duplicates) == "one",
            each.cap,
            each.weight,
        )

    @property
    def train_name(self) -> str:
        """data.train in a few words."""
        if isinstance(self.train, str):
            return self.train
        return f"{len(self.train)} sources ({', '.join(part.name for part in self.parts)})" if len(self.train) > 1 else self.train[0].source

    def reading(self, held_out: bool = False) -> SourceSettings:
        """How the training or the held-out source is read."""
        return SourceSettings(
            held_out=held_out,
            config=self.config,
            split=self.eval_split if held_out else self.split,
            revision=self.revision,
            streaming=self.streaming,
            answer_after=self.answer_after,
            answer_list=self.answer_list,
            image_cache=self.images.folder.expanduser() if self.images.folder else None,
        )


class VLLMSettings(Section):
    """vLLM as the student's sampling engine (docs/vllm.md)."""

    mode: Literal["colocate", "server"] = Field(
        "colocate", description="colocate: in the training process, on its GPU; server: in a `vllm serve` with GPUs of its own"
    )
    base_url: str = Field("http://localhost:8000", pattern=r"^https?://[^@\s]+$", description="server: where it listens")
    group_port: int = Field(51216, ge=1, le=65535, description="server: port on which weights are sent")
    gpu_memory_utilization: float = Field(
        0.3, gt=0, le=1, description="colocate: share of the GPU's memory for vLLM; the rest is for training"
    )
    max_model_length: int | None = Field(
        None, ge=1, description="most tokens of prompt and completion; empty: the model's context, which may need much memory"
    )
    enable_sleep_mode: bool = Field(False, description="colocate: give vLLM's memory back during updates, for some seconds a step")


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
    max_grad_norm: float = Field(1.0, gt=0, description="gradient norm clip")
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
        None, gt=0, description="largest mean difference of their log-probs; empty: 1e-3 for transformers in fp32, else 0.05 (bf16 rounds)"
    )
    checkpoint_every: int = Field(50, ge=0, description="steps between checkpoints; 0: none")
    checkpoint_in_background: bool = Field(
        False, description="write them while the next step goes on, from a copy of weights and optimizer in the processor's memory"
    )
    keep_checkpoints: int = Field(2, ge=1, description="older checkpoints are removed")
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
    def _teacher_where_needed(self) -> Settings:
        method = self.method.resolve()
        if method.needs_teacher and self.teacher is None:
            raise ValueError(
                f"method {method.name!r} trains on {method.gradient}, which needs a teacher: "
                "set teacher.model, or choose grpo or grpo-replay"
            )
        if method.distils and self.teacher is not None and self.teacher.base_urls:
            raise ValueError(
                f"method {method.name!r} compares next-token distributions, which no chat server gives: teacher.base_urls must be empty, "
                "so that the teacher runs in this process; or choose a method that keeps the teacher in the prompt (zppo)"
            )
        return self


_VISION_LAYERS = re.compile(r"vis|image|merger|project|connector")


def names_vision_layers(target: str) -> bool:
    """Whether an entry of `train.lora.targets` is a pattern that names layers of a vision tower or projector (*visual*, *connector*)."""
    return "*" in target and _VISION_LAYERS.search(target) is not None
