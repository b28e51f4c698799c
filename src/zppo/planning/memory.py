"""How much memory a recipe needs, from sizes alone. No torch.

An estimate of the most that is allocated: what is held all the time, and what sampling and the update add. Weights, gradients and
optimizer are counted; activations are a fit to what autograd keeps of the library's own layers (tests/test_memory_plan.py measures
how well), and a GPU's allocator wastes some on top. docs/train-your-model.md says how rough each part is.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple

from zppo.config.cluster_settings import missing_for_tinker
from zppo.config.methods import needs_of
from zppo.config.model_settings import ModelSettings, TinkerSettings
from zppo.config.settings import TOKENS_PER_MICROBATCH, Settings, names_vision_layers
from zppo.core.minibatch import MERGED_TOKENS, Sharing, head_tokens, micro_batches, pass_tokens, share_prompt
from zppo.core.select import share_of
from zppo.core.types import Message, Question
from zppo.names import model_folder
from zppo.planning.machine import Machine
from zppo.planning.model_shapes import LINEAR, DecoderShape, VisionTowerShape, config_file, count_parameters, shape_of, vision_shape_of
from zppo.planning.prompt_lengths import prompt_tokens

GIB = 1024**3


def cluster_rows(tinker: TinkerSettings) -> list[tuple[str, str]]:
    """(what, how) for the plan of a run whose student is on a server: what this machine lacks for it."""
    where = tinker.base_url or "the server that TINKER_BASE_URL names, else the hosted service"
    lacks = missing_for_tinker()
    verdict = f"student.tinker is set, and {lacks}" if lacks else "its SDK and a key are here"
    return [("student", f"on {where}: its weights are not here"), ("verdict", verdict)]


RUNTIME = GIB  # Python, torch, and CUDA's own
_PROCESSES = (2, 4, 8, 16, 32, 64)
_CHUNK = 64  # tokens that linear attention works on at a time
_DRAW = 26  # bytes per row and token of the vocabulary while one is drawn: logits, log-probs and probs in fp32, sums in fp64
_DIVERGENCE = 48  # bytes per token and token of the vocabulary for a Jensen-Shannon divergence and its gradient
FOUR_BITS = 0.516  # bytes a number in NF4: blocks of 64 share a scale, whose own are in 8 bits
_WORDS = 300  # tokens of a reformulation's own words, about


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes.

    Attributes:
        weights, gradients, optimizer: of the student; adapters among them.
        others: weights of frozen models in this process.
        vllm: vLLM's share of the GPU where it samples in this process.
        cast: the bf16 copy of fp32 weights under autocast.
        packed: the copy that sampling on a CPU multiplies with, in its place; 0 elsewhere.
        row, rows: what one rollout that is being sampled holds at its longest, and how many are sampled at once.
        activations: what the largest micro-batch keeps for its backward pass.
        layer: what the backward pass computes again of one layer, with gradient checkpointing; 0 without.
        logits: of a chunk of that micro-batch's tokens, and the output layer's gradient; gone when layers are computed again.
        tokens: of that micro-batch.
        longest: tokens of the longest single row, which no micro-batch can be smaller than.
        widest: what the longest rollout of all holds, where more of shorter ones hold the most together.
        stepping: what the optimizer's step holds besides its state.
        tower: what a vision tower keeps for the backward pass of the pictures in that micro-batch.
        images: preprocessed pictures of a step, where they lie in the same memory.
        unknown: frozen models in this process that are in no number, because nothing here says how large they are.
        passing: where weights are sharded, what the update gathers of them, with the gradients of a layer, in the place of `cast`.
        host: what `train.offload` keeps in the processor's memory instead, in each process.
        sleeps: vLLM gives its share back while the student is updated.
    """

    weights: int
    gradients: int
    optimizer: int
    others: int
    vllm: int
    cast: int
    row: int
    rows: int
    activations: int
    layer: int
    logits: int
    tokens: int
    longest: int
    stepping: int
    packed: int = 0
    widest: int = 0
    tower: int = 0
    images: int = 0
    unknown: tuple[str, ...] = ()
    passing: int | None = None
    host: int = 0
    sleeps: bool = False

    @property
    def standing(self) -> int:
        """What is held all the time."""
        return RUNTIME + self.weights + self.gradients + self.optimizer + self.others + self.vllm * (not self.sleeps) + self.images

    @property
    def multiplied(self) -> int:
        """The copy of the weights that sampling multiplies with; 0 where it takes the weights themselves."""
        return self.packed or self.cast

    @property
    def sampling(self) -> int:
        """What sampling holds on top."""
        return self.multiplied + self.row * self.rows + self.vllm * self.sleeps

    @property
    def update(self) -> int:
        """What the update holds on top: the larger of its backward pass and its optimizer step."""
        weights = self.cast if self.passing is None else self.passing
        return max(weights + self.activations + self.tower + max(self.logits, self.layer), self.stepping)

    @property
    def total(self) -> int:
        """The most that is held at once."""
        return self.standing + max(self.sampling, self.update)


def estimate(settings: Settings, *, gpu: bool, capacity: int = 0, images: int = 0, shortest: int = 0, processes: int = 1) -> Memory | str:
    """What a run of this recipe needs in one process.

    Args:
        gpu: whether it trains on one; decides what `auto` precision is.
        capacity: bytes of that GPU, of which vLLM in this process takes its share.
        images: most images of a question; with any the student has its vision tower, and so has a teacher in this process.
        shortest: tokens of the shortest prompt, for which no logits are computed; 0 where it is not known.
        processes: that train together, and share weights out where `train.sharding` says so; 1: it holds all of them.

    Returns:
        The estimate, or why there is none.

    Raises:
        ModelError: a checkpoint on disk cannot be read.
    """
    shape = shape_of(settings.student.model)
    if shape is None:
        name = settings.student.model
        if config_file(name) is not None:
            return f"not known: the config.json of {name} is not that of a dense decoder"
        return f"not known: there is no config.json of {name} on this machine, and it is not in the table of Qwen3.5 students"
    vision_shape = vision_shape_of(settings.student.model) if images else None
    others, unknown = _frozen(settings, gpu, images=bool(images))
    # Weights are fp32, but for those under LoRA adapters, which have the width of the forward pass.
    train = settings.train
    parameters = _parameters(settings.student, shape, vision_shape)
    bf16 = train.precision == "bf16" or (train.precision == "auto" and gpu)
    still = _still(settings, vision_shape)
    trained = shape.adapters(train.lora.rank, train.lora.targets) if train.lora else parameters - still
    frozen_bytes = parameters * (2 if bf16 else 4) if train.lora else still * 4
    linear = sum(width_in * width_out for _, width_in, width_out in shape.linear_maps())
    quantized = linear if settings.student.quantize else 0
    frozen_bytes -= int(quantized * ((2 if bf16 else 4) - FOUR_BITS))
    # The update: the largest micro-batch, whose rows all have the longest length.
    largest = _largest(settings, shape, gpu=gpu, images=images)
    tokens = largest.rows * largest.longest
    width = 2 if bf16 else 4
    kept, again = activations_per_token(shape, bf16=bf16, recomputed=train.gradient_checkpointing)
    scored = tokens - largest.rows * min(shortest, largest.longest)
    own = settings.rollout.engine == "transformers"
    row, rows, widest = _sampled(settings, shape, width)
    vllm = settings.rollout.vllm
    whole = Memory(
        weights=trained * 4 + frozen_bytes,
        gradients=trained * 4,
        optimizer=_optimizer(train.optimizer, trained),
        others=others,
        vllm=int(capacity * vllm.gpu_memory_utilization) if not own and vllm.mode == "colocate" else 0,
        cast=parameters * 2 if bf16 and not train.lora else 0,
        row=row if own else 0,
        rows=rows if own else 0,
        packed=(linear + shape.vocab * shape.hidden) * width if own and not gpu and not settings.student.quantize else 0,
        widest=widest if own else 0,
        activations=int(tokens * kept),
        layer=int(tokens * again),
        logits=head_bytes(shape, scored, bf16=bf16, gpu=gpu, diverges=settings.method.resolve().distils, trained=train.lora is None),
        tokens=tokens,
        longest=_longest(settings),
        stepping=trained * 4 if gpu else 0,
        tower=_tower(settings, vision_shape, largest.rows, images, bf16=bf16),
        images=int(settings.data.images.cache_gib * GIB) if vision_shape and not gpu else 0,
        unknown=unknown,
        sleeps=vllm.enable_sleep_mode,
    )
    shards = train.shard_within or processes
    if train.sharding == "none" or shards == 1:
        return whole
    seeing = vision_shape.tower + vision_shape.projector if vision_shape else 0
    stays = _kept(settings, trained if train.lora else seeing - still, seeing, quantized, gpu=gpu, width=width)
    return _shared_out(whole, stays, settings, shape, parameters - seeing - quantized, shards, gpu=gpu, width=width)


def enough(settings: Settings, machine: Machine | None, most: float, **facts: int) -> tuple[int, dict[int, int]]:
    """The fewest processes whose shares take no more than `most` of this machine, else the most that are tried; and the bytes of each.

    Args:
        facts: of the data, as `estimate` takes them.
    """
    gpu, capacity = machine is not None and machine.gpu, machine.total if machine and machine.gpu else 0
    tried = {count: estimate(settings, gpu=gpu, capacity=capacity, **{**facts, "processes": count}) for count in _PROCESSES}
    totals = {count: memory.total for count, memory in tried.items() if isinstance(memory, Memory)}
    room = most * machine.usable if machine is not None else 0
    return next((count for count, total in totals.items() if total <= room), _PROCESSES[-1]), totals


class _Kept(NamedTuple):
    """Bytes of what every process holds whole (`ShardedWeights`): the parts that see, adapters, weights in 4 bits."""

    weights: int
    gradients: int
    optimizer: int
    stepping: int


def _kept(settings: Settings, moving: int, seeing: int, packed: int, *, gpu: bool, width: int) -> _Kept:
    """Of `moving` trained parameters, all of a vision tower and its projector, and so many in 4 bits."""
    own = moving * 4 + seeing * width if settings.train.lora else seeing * 4
    optimizer = _optimizer(settings.train.optimizer, moving)
    return _Kept(own + int(packed * FOUR_BITS), moving * 4, optimizer, moving * 4 if gpu else 0)


def _shared_out(
    whole: Memory, kept: _Kept, settings: Settings, shape: DecoderShape, parameters: int, shards: int, *, gpu: bool, width: int
) -> Memory:
    """A process's part of the memory of one that holds all weights, with what it gathers for a while.

    A pass has two layers whole, the one that it computes and the next, beside what lies outside of the layers; in a backward pass the
    gradients of that, and of a layer, in the type of the pass and once more in fp32, in which they are summed; none of frozen ones. The
    transformers engine samples with all weights whole.

    Args:
        parameters: that are shared out.
        width: bytes of a number in a pass.
    """
    offload = settings.train.offload and gpu
    outside = shape.vocab * shape.hidden * (1 if shape.tied else 2)
    layer = max(0, parameters - outside) // len(shape.layers)
    own = {name: (getattr(whole, name) - each) // shards for name, each in kept._asdict().items()}
    parts: dict[str, Any] = {name: each if offload else each + own[name] for name, each in kept._asdict().items()}
    trained = width + 4 if settings.train.lora is None else 0
    gathered = parameters * width if settings.rollout.engine == "transformers" else 0
    return replace(
        whole,
        **parts,
        cast=gathered,
        packed=whole.packed and whole.packed + gathered,
        passing=(outside + 2 * layer) * width + (outside + layer) * trained,
        host=own["weights"] + own["gradients"] + own["optimizer"] if offload else 0,
    )


def within(settings: Settings, questions: Iterable[Question], train: int | None = None, shown: Sequence[Message] = ()) -> Settings:
    """The settings with limits that the questions can reach: a step takes no more than `train` of them, where that is given, and its
    prompts are those of the data.

    Args:
        shown: turns of examples, which every prompt holds.
    """
    limit = min(settings.data.max_prompt_tokens, prompt_tokens(settings, questions, shown).longest)
    batch = settings.rollout.batch_size if train is None else min(settings.rollout.batch_size, train)
    replay = settings.zone.rho_replay if train is None else min(settings.zone.rho_replay, (train - batch) / batch if batch else 0.0)
    rollout = settings.rollout.model_copy(update={"batch_size": batch})
    data = settings.data.model_copy(update={"max_prompt_tokens": limit})
    zone = settings.zone.model_copy(update={"rho_replay": replay})
    return settings.model_copy(update={"data": data, "rollout": rollout, "zone": zone})


def expected(
    settings: Settings,
    train: Sequence[Question],
    held_out: Sequence[Question],
    shown: Sequence[Message],
    *,
    gpu: bool,
    capacity: int,
    processes: int = 1,
) -> Memory | str:
    """The estimate of a run on these questions, as its dry run shows it; the other args are of `within` and `estimate`."""
    asked = [*train, *held_out]
    images = max((len(q.images) for q in asked), default=0)
    limits, shortest = within(settings, asked, len(train), shown), prompt_tokens(settings, asked, shown).shortest
    return estimate(limits, gpu=gpu, capacity=capacity, images=images, shortest=shortest, processes=processes)


def peak_of_process() -> int:
    """Bytes of RAM that this process has held at most so far."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration, ValueError, IndexError):  # another system; on Linux the number below may be the parent's
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def activations_per_token(shape: DecoderShape, *, bf16: bool, recomputed: bool) -> tuple[float, float]:
    """Bytes per token of a row, the logits aside: what is kept until the backward pass, and what that computes again at a time.

    Args:
        recomputed: gradient checkpointing: kept is the input of every layer, computed again is one of them.
    """
    layers = [_layer(shape, kind, bf16=bf16) for kind in shape.layers]
    ends = 24.0 * shape.hidden  # embedding, last norm
    return (ends + 4 * shape.hidden * len(layers), max(layers)) if recomputed else (ends + sum(layers), 0.0)


def head_bytes(shape: DecoderShape, tokens: int, *, bf16: bool, gpu: bool, diverges: bool = False, trained: bool = True) -> int:
    """What scores of so many tokens hold at once in the backward pass: the logits of a chunk, and gradients of the output layer.

    Args:
        diverges: they are a divergence from a teacher.
        trained: the output layer's weights have gradients: those of a chunk, and where there are several their sum in fp32.
    """
    chunk = min(tokens, head_tokens(shape.vocab, gpu=gpu, diverges=diverges))
    per_logit = _DIVERGENCE if diverges else 10 if bf16 else 8  # logits in the pass's type, in fp32, their gradient
    per_weight = (2 if bf16 else 4) + (4 if chunk < tokens else 0)
    return chunk * shape.vocab * per_logit + (shape.vocab * shape.hidden * per_weight if trained else 0)


def _layer(shape: DecoderShape, kind: str, *, bf16: bool) -> float:
    """Bytes per token of one layer: a fit to what is saved for the backward pass.

    Of transformers 5.23, with its own torch code for linear attention; scaled-dot-product attention keeps no scores.
    """
    h, i = shape.hidden, shape.mlp
    if kind == LINEAR:
        heads, spread, values = (shape.linear_value_heads, shape.linear_value_heads * shape.linear_key_dim, shape.linear_values)
        state = spread * shape.linear_value_dim / _CHUNK  # one state per chunk
        if bf16:
            return 28 * h + 8 * i + 8 * shape.linear_keys + 38 * spread + 36 * values + 934 * heads + 8 * state
        return 22 * h + 16 * i + 24 * shape.linear_keys + 30 * spread + 36 * values + 1732 * heads + 30 * state
    gate = (8 if bf16 else 16) * shape.queries if shape.gated else 0
    if bf16:
        return 26 * h + 8 * i + 10 * shape.queries + gate + 12 * shape.keys + 12 * shape.heads
    return 24 * h + 16 * i + 16 * shape.queries + gate + 16 * shape.keys + 10 * shape.heads


def _optimizer(name: str, trained: int) -> int:
    """Bytes of AdamW's two moments: fp32, or 8 bits with a scale for every 256 numbers."""
    return trained * 8 if name == "adamw" else trained * 2 + 2 * 4 * (trained // 256)


def _row(settings: Settings, shape: DecoderShape, width: int, prompt: int) -> int:
    """Bytes of one rollout: the larger of its share of reading the prompt, and of its cache at the end and drawing a token."""
    new = settings.rollout.max_new_tokens
    cache = shape.cache_per_token(width) * (prompt + new) + shape.cache_per_row(width)
    layer = max(_layer(shape, kind, bf16=width == 2) for kind in set(shape.layers))
    reading = prompt * (layer + shape.cache_per_token(width)) / settings.rollout.group_size
    return int(max(reading, cache + _DRAW * shape.vocab))


def _groups(settings: Settings) -> tuple[int, int]:
    """Plain and reformulated groups of a step, at most."""
    batch, zone, method = settings.rollout.batch_size, settings.zone, settings.method.resolve()
    plain = batch + (share_of(zone.rho_replay, batch) if method.replay else 0)
    return plain, min(share_of(zone.rho_aug, batch), plain * len(method.reformulations))


def _sampled(settings: Settings, shape: DecoderShape, width: int) -> tuple[int, int, int]:
    """(bytes of a rollout, how many at once, bytes of the longest of all) where sampling holds most: all plain ones of a step, all
    reformulated ones, or `max_rows`."""
    prompt, most = settings.data.max_prompt_tokens, settings.rollout.max_rows
    counts = [groups * settings.rollout.group_size for groups in _groups(settings)]
    rows = [count if most is None else min(count, most) for count in counts]
    each = [_row(settings, shape, width, tokens) for tokens in (prompt, prompt + _added(settings))]
    row, count = max(zip(each, rows, strict=True), key=lambda kind: kind[0] * kind[1])
    return row, count, max(size for size, some in zip(each, rows, strict=True) if some)


@dataclass(frozen=True, slots=True)
class _Largest:
    """The largest micro-batch: so many rows, or packs that share a prompt, padded to the longest, in tokens."""

    rows: int
    longest: int


def _largest(settings: Settings, shape: DecoderShape, *, gpu: bool, images: int) -> _Largest:
    """The largest micro-batch of a minibatch with as many reformulated groups as there are, all rollouts at their limit.

    Split as the update splits it: prompts shared where they are, and no more rows than the minibatch has.
    """
    train, method = settings.train, settings.method.resolve()
    plain, again = _groups(settings)
    groups = ceil((plain + again) / (1 if method.distils else train.minibatches))
    budget = TOKENS_PER_MICROBATCH if train.tokens_per_microbatch == "auto" else train.tokens_per_microbatch
    wanted = train.share_prompts == "on" or (train.share_prompts == "auto" and not gpu)
    shares = wanted and not method.distils and not images and LINEAR not in shape.layers
    prompt, size, new = settings.data.max_prompt_tokens, settings.rollout.group_size, settings.rollout.max_new_tokens
    shared, single = list[int](), list[int]()
    for tokens, count in ((prompt + _added(settings), min(again, groups)), (prompt, max(0, groups - again))):
        sharing = Sharing(reach=6 * shape.hidden)
        packs = (
            share_prompt(tokens, [new] * size, reach=sharing.reach, most=min(budget, sharing.most))
            if shares
            else [[i] for i in range(size)]
        )
        for pack in packs * count:
            (shared if len(pack) > 1 else single).append(tokens + len(pack) * new)
    overhead = pass_tokens(shape.hidden, gpu=gpu)
    found = [
        _Largest(len(batch), max(lengths[row] for row in batch))
        for lengths, limit in ((shared, budget if gpu else min(budget, MERGED_TOKENS)), (single, budget))
        for batch in micro_batches(lengths, limit, overhead)
    ]
    return max(found, key=lambda micro: micro.rows * micro.longest)


def shown_tokens(settings: Settings, kind: str, response: float) -> float:
    """Tokens that a reformulated prompt shows of what its kind needs, each part at its limit; its own words are not counted.

    Args:
        kind: of the reformulation, or its import path.
        response: tokens of a teacher response.
    """
    if settings.teacher is None:
        return 0.0
    cap = settings.teacher.compression.max_new_tokens
    of = {
        "pair": 2.0 * cap,
        "wrong": float(settings.rollout.group_size * cap),
        "hint": float(settings.teacher.hint.max_new_tokens),
        "prefix": settings.zone.prefix_fraction * response,
        "answers": 16.0 * settings.rollout.group_size,  # an answer is short
    }
    return sum(of[need] for need in needs_of(kind))


def _added(settings: Settings) -> int:
    """Tokens that the widest reformulation adds to a prompt, at most; a summary is taken to be no longer than what it shortens."""
    teacher, new = settings.teacher, settings.rollout.max_new_tokens
    if teacher is None:
        return 0
    cap = min(teacher.compression.max_new_tokens, max(new, teacher.rollout.max_new_tokens))
    shorter = teacher.model_copy(update={"compression": teacher.compression.model_copy(update={"max_new_tokens": cap})})
    of_wrong = teacher.model_copy(update={"compression": teacher.compression.model_copy(update={"max_new_tokens": min(cap, new)})})
    added = 0
    for kind in settings.method.resolve().reformulations:
        words = _WORDS if needs_of(kind) - {"prefix"} else 0  # a prefix stands behind the plain question
        own = of_wrong if "wrong" in needs_of(kind) else shorter
        shown = shown_tokens(settings.model_copy(update={"teacher": own}), kind, teacher.rollout.max_new_tokens)
        added = max(added, int(shown) + words)
    return added


def _longest(settings: Settings) -> int:
    """Tokens of the longest row that may come: a prompt at its limit, what the widest reformulation shows at its own, a rollout."""
    return settings.data.max_prompt_tokens + _added(settings) + settings.rollout.max_new_tokens


def _still(settings: Settings, vision_shape: VisionTowerShape | None) -> int:
    """Parameters that are there and are not trained."""
    if vision_shape is None:
        return 0
    frozen = settings.train.vision
    return vision_shape.tower * frozen.freeze_tower + vision_shape.projector * frozen.freeze_projector


def _tower(settings: Settings, vision_shape: VisionTowerShape | None, rows: int, images: int, *, bf16: bool) -> int:
    """Bytes that the tower keeps for the backward pass.

    At worst every row of a micro-batch has pictures of its own, of the largest size or as many as its prompt holds.
    """
    train = settings.train
    adapted = train.lora is None or any(map(names_vision_layers, () if train.lora.targets == "all-linear" else train.lora.targets))
    if vision_shape is None or train.vision.freeze_tower or not adapted:
        return 0
    kept = vision_shape.kept_per_patch(bf16=bf16, recomputed=train.gradient_checkpointing)
    tokens = min(images * vision_shape.tokens(settings.data.images.max_pixels), settings.data.max_prompt_tokens)
    return int(rows * tokens * vision_shape.merge**2 * kept)


def _frozen(settings: Settings, gpu: bool, *, images: bool) -> tuple[int, tuple[str, ...]]:
    """Bytes of the frozen models that the run loads, and those of which they are not known."""
    teachers = (settings.teacher, *settings.more_teachers) if settings.method.resolve().needs_teacher else ()
    total, unknown = 0, list[str]()
    for model in (*teachers, settings.judge):
        if model is None or model.base_urls:
            continue
        shape = shape_of(model.model)
        if shape is None:
            unknown.append(model.model)
            continue
        vision_shape = vision_shape_of(model.model) if images else None
        total += _parameters(model, shape, vision_shape) * (2 if gpu else 4)
    return total, tuple(dict.fromkeys(unknown))


def _parameters(model: ModelSettings, shape: DecoderShape, vision_shape: VisionTowerShape | None) -> int:
    """N of what is loaded: from the headers of the weights on disk without draft layers, else from the shapes.

    The vision tower counts where there are images to show; without, a text model of its own is loaded.
    """
    folder = Path(model_folder(model.model))
    if (folder / "model.safetensors").is_file() or (folder / "model.safetensors.index.json").is_file():
        left = {"mtp"} if vision_shape else {"visual", "mtp"}
        return int(count_parameters(folder, keep=lambda tensor: left.isdisjoint(tensor.split("."))).parameters)
    return shape.parameters + (vision_shape.tower + vision_shape.projector if vision_shape else 0)
