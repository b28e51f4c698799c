"""Pictures in and out of models of every family: what is sampled, scored and learnt equals the library's own, plainest computation."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from transformers import PreTrainedModel

from seeing import KINDS, PIXELS, make_picture, make_seeing
from test_update import make_settings, update
from zppo.config.settings import LossSettings
from zppo.core.advantages import step_advantages
from zppo.core.loss import clipped_surrogate
from zppo.core.types import Group, ImageRef, Message, Prompt, Question, Rollout
from zppo.engines.base import Completion, SampleRequest, Sampling
from zppo.engines.chat import Chat
from zppo.engines.image_check import check_image_input
from zppo.engines.loading import load_network, reads_images
from zppo.engines.logprobs import ForwardPass, Row, completion_logprobs
from zppo.engines.transformers import TransformersEngine
from zppo.errors import ModelError
from zppo.images import features as vision
from zppo.images.features import plain_inputs
from zppo.images.store import PixelLimits
from zppo.train.learner import OptimizerStep
from zppo.train.policy_gradient import PolicyGradient, make_budget


class Eyes(NamedTuple):
    """A tiny model that sees, its chat, and three pictures of different shapes."""

    model: PreTrainedModel
    chat: Chat
    pictures: list[ImageRef]

    @property
    def conversations(self) -> list[tuple[str, tuple[ImageRef, ...]]]:
        a, b, c = self.pictures
        return [
            ("What is 3 plus 4?", ()),
            ("Compare <image> and <image>.", (a, b)),
            ("Which colour?", (c,)),
            ("So be it, this one has no picture and many words all the same.", ()),
        ]

    def requests(self, group: int = 3) -> list[SampleRequest]:
        return [
            SampleRequest(self.chat.encode([Message("user", text)], images), tuple(range(9 * i, 9 * i + group)), images)
            for i, (text, images) in enumerate(self.conversations)
        ]

    def engine(self, **more: Any) -> TransformersEngine:
        model, chat = self.model, self.chat
        return TransformersEngine(
            model, chat.eos_ids(model), chat.pad_id(model), chat.banned_ids(model), image_processor=chat.image_processor, **more
        )

    def banned(self) -> list[int]:
        return sorted(self.chat.banned_ids(self.model))


@pytest.fixture(scope="module")
def eyes(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Eyes]:
    folder = tmp_path_factory.mktemp("eyes")

    @lru_cache
    def made(kind: str) -> Eyes:
        path = make_seeing(folder / kind, kind)
        model = load_network(path, dtype=torch.float32, images=True).eval()
        chat = Chat.load(str(path), images=PixelLimits(**PIXELS))
        return Eyes(model, chat, [make_picture(folder, 1), make_picture(folder, 2, 40, 16), make_picture(folder, 3, 16, 30)])

    return made


def plainly(eyes: Eyes, row: Row) -> torch.Tensor:
    """(T,) log-probs of one row, from the library's own forward pass over it and its pixels."""
    completion = torch.as_tensor(row.completion_ids)
    ids = torch.cat([torch.as_tensor(row.prompt_ids), completion])[None]
    image_processor = eyes.chat.image_processor
    assert image_processor is not None
    given = plain_inputs(eyes.model, image_processor, ids, row.images) if row.images else {}
    logits = eyes.model(input_ids=ids, use_cache=False, **given).logits[0, len(row.prompt_ids) - 1 : -1]
    allowed = torch.ones(logits.shape[-1], dtype=torch.bool)
    allowed[eyes.banned()] = False
    return logits.masked_fill(~allowed, -1e30).log_softmax(-1).gather(1, completion[:, None])[:, 0]


def rows_of(requests: list[SampleRequest], done: list[list[Completion]]) -> list[Row]:
    return [Row(r.prompt_ids, c.ids, r.images) for r, group in zip(requests, done, strict=True) for c in group]


@contextmanager
def looked_at(model: PreTrainedModel) -> Iterator[list[int]]:
    """How many rows of pixels each call of the vision encoder was given."""
    tower: Any = model.get_encoder(modality="image")  # type: ignore[no-untyped-call]
    seen: list[int] = []
    handle = tower.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(len(args[0] if args else kwargs["pixel_values"])), with_kwargs=True
    )
    yield seen
    handle.remove()


@pytest.mark.parametrize("kind", KINDS)
def test_sampler_and_training_forward_equal_the_library_s_own(kind: str, eyes: Callable[[str], Eyes]) -> None:
    """Rows with two pictures, one and none in one batch, of unequal lengths; the bounds of these tests."""
    own = eyes(kind)
    asked = own.requests()
    done = own.engine().sample(asked, Sampling(max_new_tokens=8, temperature=0.9))
    rows = rows_of(asked, done)
    with torch.no_grad():
        scored, mask = completion_logprobs(
            own.model, rows, temperature=0.9, banned_ids=own.banned(), image_processor=own.chat.image_processor
        )
    error = (torch.cat([c.logprobs for group in done for c in group]) - scored[mask]).abs()
    assert error.max() <= (1e-3 if kind == "qwen3_5" else 1e-5) and error.mean() <= 1e-5
    with torch.no_grad():
        scored, mask = completion_logprobs(own.model, rows, banned_ids=own.banned(), image_processor=own.chat.image_processor)
        for i, row in enumerate(rows):
            torch.testing.assert_close(scored[i][mask[i]], plainly(own, row), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_models_that_take_no_features_are_given_pixels(kind: str, eyes: Callable[[str], Eyes], monkeypatch: pytest.MonkeyPatch) -> None:
    """As in versions of transformers before 5.23: the same numbers, with features computed once a row."""
    own = eyes(kind)
    asked = own.requests(group=2)
    rows = [Row(r.prompt_ids, [9, 10, 11 + i], r.images) for r in asked for i in range(2)]
    with torch.no_grad():
        wanted, _ = completion_logprobs(own.model, rows, image_processor=own.chat.image_processor)
        monkeypatch.setattr(vision, "_FEATURES", "no_such_argument")
        found, _ = completion_logprobs(own.model, rows, image_processor=own.chat.image_processor)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    check_image_input(own.engine(), own.chat, kind)


def test_a_picture_is_what_counts(eyes: Callable[[str], Eyes]) -> None:
    """The comparison above would pass on a model that looks away."""
    own = eyes("qwen3_vl")
    same = [Row((), [9, 10, 11], (picture,)) for picture in (make_picture(Path(own.pictures[0].uri).parent, s) for s in (7, 8))]
    rows = [Row(own.chat.encode([Message("user", "?")], row.images), row.completion_ids, row.images) for row in same]
    assert rows[0].prompt_ids == rows[1].prompt_ids
    one, other = completion_logprobs(own.model, rows, image_processor=own.chat.image_processor)[0]
    assert (one - other).abs().max() > 1e-2


@pytest.mark.parametrize("limits", [{"max_rows": 2}, {"max_tokens": 150}])
def test_limits_change_nothing_but_the_batches(limits: dict[str, int], eyes: Callable[[str], Eyes]) -> None:
    own = eyes("qwen3_vl")
    whole, parts = (own.engine(**more).sample(own.requests(), Sampling(max_new_tokens=6)) for more in ({}, limits))
    assert [c.ids.tolist() for g in parts for c in g] == [c.ids.tolist() for g in whole for c in g]


@pytest.mark.parametrize("kind", ["qwen3_vl", "smolvlm"])
def test_features_are_computed_once_for_every_picture(kind: str, eyes: Callable[[str], Eyes]) -> None:
    """In sampling once for the G rollouts of a prompt; in a micro-batch once for all rows that hold the picture."""
    own = eyes(kind)
    image_processor, asked = own.chat.image_processor, own.requests()
    assert image_processor is not None
    (pixels,) = ({ref: image_processor.pixels(ref)["pixel_values"] for ref in own.pictures},)
    expected = sum(len(p) if p.ndim == 2 else p.shape[1] for p in pixels.values())
    with looked_at(own.model) as sampled:
        done = own.engine().sample(asked, Sampling(max_new_tokens=5))
    with looked_at(own.model) as scored, torch.no_grad():
        completion_logprobs(own.model, rows_of(asked, done), image_processor=image_processor)
    assert sum(sampled) == sum(scored) == expected
    with looked_at(own.model) as text, torch.no_grad():
        completion_logprobs(own.model, [Row([5, 6], [7])], image_processor=image_processor)
    assert text == []


@pytest.mark.parametrize("kind", KINDS)
def test_image_tokens_are_never_written(kind: str, eyes: Callable[[str], Eyes]) -> None:
    own = eyes(kind)
    image_processor = own.chat.image_processor
    assert image_processor is not None and image_processor.image_ids <= own.chat.banned_ids(own.model)
    head, ids = own.model.get_output_embeddings().weight, sorted(image_processor.image_ids)
    kept = head.detach()[ids].clone()
    with torch.no_grad():
        head[ids] = 50 * torch.randn(len(ids), head.shape[1], generator=torch.Generator().manual_seed(0))
    done = own.engine().sample(own.requests(), Sampling(max_new_tokens=6))
    with torch.no_grad():
        head[ids] = kept
    assert not any(set(c.ids.tolist()) & own.chat.banned_ids(own.model) for group in done for c in group)


def groups_of(own: Eyes, rewards: list[list[float]]) -> list[Group]:
    """A group per conversation, of random rollouts, with old log-probs near the model's own."""
    rng = torch.Generator().manual_seed(0)
    groups = []
    for (text, images), row in zip(own.conversations, rewards, strict=True):
        messages = (Message("user", text),)
        ids, rollouts = own.chat.encode(messages, images), []
        for reward in row:
            tokens = torch.randint(5, 300, (int(torch.randint(2, 9, (1,), generator=rng)),), generator=rng)
            with torch.no_grad():
                old = plainly(own, Row(ids, tokens, images)) + 0.2 * torch.randn(len(tokens), generator=rng)
            rollouts.append(Rollout(tokens, old, "", None, reward >= 1, reward))
        question = Question(text, messages, "1", images)
        groups.append(Group(Prompt("plain", question, messages, ids, images=images), tuple(rollouts)))
    return groups


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_equal_the_plain_computation(kind: str, eyes: Callable[[str], Eyes]) -> None:
    """Rows with A = 0 dropped, micro-batches trimmed, pictures shared and mixed with text: the gradient of the token-level mean over
    all rows, each computed alone by the library's own code; the vision tower's too."""
    own = eyes(kind)
    groups = groups_of(own, [[1.0, 0.0], [1.0, 0.0, 0.0], [1.0, 1.0, 1.0], [0.0, 1.0]])
    advantages = step_advantages(groups, "nontrivial")
    loss, values = LossSettings(), iter(advantages.tolist())
    model = own.model.requires_grad_(True)
    model.zero_grad()
    tokens = sum(len(r.ids) for g in groups for r in g.rollouts)
    for group in groups:
        for rollout in group.rollouts:
            new = plainly(own, Row(group.prompt.ids, rollout.ids, group.prompt.images))[None]
            surrogate = clipped_surrogate(
                new,
                rollout.logprobs[None],
                torch.tensor([next(values)]),
                clip_low=loss.clip_low,
                clip_high=loss.clip_high,
                dual_clip=loss.dual_clip,
            )
            (surrogate.loss.sum() / tokens).backward()  # type: ignore[no-untyped-call]
    wanted = {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    twin = Eyes(copy.deepcopy(model), own.chat, own.pictures)
    model.zero_grad()
    found = updated_gradients(twin, groups, advantages)
    biggest = max(float(g.abs().max()) for g in wanted.values())
    assert max(float((found[n] - g).abs().max()) for n, g in wanted.items()) <= 1e-5 * biggest
    tower = [n for n in wanted if "vis" in n]
    assert max(float(found[n].abs().max()) for n in tower) > 1e-3 * biggest, "the tower is meant to learn"


def updated_gradients(own: Eyes, groups: list[Group], advantages: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the learner's one optimizer step would have used."""
    settings = make_settings(train={"minibatches": 1, "max_grad_norm": 1e9, "tokens_per_microbatch": 200})
    optimizer = torch.optim.AdamW(own.model.parameters())
    AcceleratorState._reset_state(True)
    accelerator = Accelerator(cpu=True)
    prepared, optimizer = accelerator.prepare(own.model, optimizer)
    forward = ForwardPass(prepared, own.chat.pad_id(own.model), banned_ids=tuple(own.banned()), image_processor=own.chat.image_processor)
    step_of = OptimizerStep(prepared, optimizer, accelerator, settings.train.max_grad_norm)
    budget = make_budget(settings.train)
    learner = PolicyGradient(settings, forward, step_of, budget, sampler_is_exact=True)
    gradients: dict[str, torch.Tensor] = {}

    def step(*_: Any) -> None:
        gradients.update({n: p.grad.clone() for n, p in own.model.named_parameters() if p.grad is not None})

    step_of.optimizer.step = step  # type: ignore[assignment]
    update(learner, groups, advantages, 1)
    return gradients


def test_the_check_at_the_start_finds_wrong_positions(eyes: Callable[[str], Eyes], monkeypatch: pytest.MonkeyPatch) -> None:
    own = eyes("qwen3_vl")
    check_image_input(own.engine(), own.chat, "tiny")
    right = vision.positions_of

    def wrong(*args: Any) -> vision.Positions:
        places, following = right(*args)
        return vision.Positions(torch.arange(places.shape[1]).expand(3, -1), following)

    monkeypatch.setattr("zppo.engines.logprobs.positions_of", wrong)
    with pytest.raises(ModelError, match="'tiny' cannot be shown images here: its log-probs with pictures in a batch differ"):
        check_image_input(own.engine(), own.chat, "tiny")
    monkeypatch.setattr("zppo.engines.logprobs.positions_of", right)
    monkeypatch.setattr("zppo.engines.transformers.positions_of", wrong)
    with pytest.raises(ModelError, match="differ"):
        check_image_input(own.engine(), own.chat, "tiny")


@pytest.mark.parametrize("kind", ["qwen3_vl", "gemma3"])
def test_the_check_at_the_start_finds_pictures_that_are_taken_for_one_another(
    kind: str, eyes: Callable[[str], Eyes], monkeypatch: pytest.MonkeyPatch
) -> None:
    own, right = eyes(kind), vision._part
    monkeypatch.setattr(vision, "_part", lambda value, place, count: right(value, count - 1 - place, count))
    with pytest.raises(ModelError, match="cannot be shown images here"):
        check_image_input(own.engine(), own.chat, "tiny")


class _Parts:
    """Pictures as LLaVA-NeXT's processor gives them: (1, parts, ...) and a size (1, 2)."""

    def __init__(self, **parts: int) -> None:
        self.parts = parts

    def pixels(self, ref: ImageRef) -> dict[str, torch.Tensor]:
        return {
            "pixel_values": torch.full((1, self.parts[ref.sha256], 3, 4, 4), float(self.parts[ref.sha256])),
            "image_sizes": torch.tensor([[self.parts[ref.sha256], 7]]),
        }


class _Takes(torch.nn.Linear):
    def forward(self, pixel_values: torch.Tensor, image_sizes: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        raise NotImplementedError


def test_pictures_are_put_together_by_each_tensor_s_own_layout() -> None:
    image_processor: Any = _Parts(a=3, b=5)
    made = vision._pixels(_Takes(1, 1), image_processor, [ImageRef("", "a"), ImageRef("", "b"), ImageRef("", "a")])
    assert made["image_sizes"].tolist() == [[3, 7], [5, 7], [3, 7]]
    pixels = made["pixel_values"]
    assert pixels.shape == (3, 5, 3, 4, 4) and not pixels[[0, 2], 3:].any()
    assert torch.equal(pixels[1:2], image_processor.pixels(ImageRef("", "b"))["pixel_values"]) and (pixels[0, :3] == 3).all()


def test_features_that_cannot_be_told_apart_are_refused() -> None:
    assert vision._part(torch.arange(6), 1, 2).tolist() == [3, 4, 5] and vision._part(("a", "b"), 1, 2) == "b"
    for value in (torch.arange(5), ["layer"] * 4):
        with pytest.raises(ModelError, match="cannot be told apart"):
            vision._part(value, 0, 2)


def test_a_class_without_image_features_is_refused(eyes: Callable[[str], Eyes], monkeypatch: pytest.MonkeyPatch) -> None:
    own = eyes("qwen3_vl")
    monkeypatch.delattr(type(own.model), "get_image_features")
    with pytest.raises(ModelError, match="computes no image features apart from its forward pass"):
        check_image_input(own.engine(), own.chat, "tiny")


def test_text_alone_is_loaded_as_before(tmp_path: Path, tiny_qwen3_dir: Path) -> None:
    """A Qwen3.5 checkpoint without images is its text model, to the last bit of its logits; Qwen3-VL, which has none, is loaded whole."""
    path = make_seeing(tmp_path / "qwen3_5", "qwen3_5")
    assert reads_images(path) and not reads_images(tiny_qwen3_dir)
    text, whole = (load_network(path, dtype=torch.float32, images=images).eval() for images in (False, True))
    assert (type(text).__name__, type(whole).__name__) == ("Qwen3_5ForCausalLM", "Qwen3_5ForConditionalGeneration")
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        assert torch.equal(text(ids).logits, whole(ids).logits)
    assert type(load_network(make_seeing(tmp_path / "vl"), dtype=torch.float32)).__name__ == "Qwen3VLForConditionalGeneration"
    with pytest.raises(ModelError, match="reads text only"):
        TransformersEngine(text, [2], 0).sample([SampleRequest((5, 6), (1,), (ImageRef("a", "b"),))], Sampling(max_new_tokens=1))
