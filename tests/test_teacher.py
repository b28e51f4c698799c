"""The in-process teacher: frozen, served through its chat, and never in the way of a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from zppo.core.types import ImageRef, Message
from zppo.engines.base import Completion, SampleRequest, Sampling
from zppo.errors import ModelError, TeacherError
from zppo.teacher.interface import TeacherRequest, TeacherSampling
from zppo.teacher.local import LocalTeacher

GREEDY = Sampling(temperature=0.0, max_new_tokens=6)


class Letters:
    """A chat whose tokens are characters; refuses a system turn."""

    def __init__(self, args: Mapping[str, Any]) -> None:
        self.args = args

    def encode(self, messages: Sequence[Message], images: Sequence[ImageRef] = ()) -> tuple[int, ...]:
        if messages[0].role == "system":
            raise ModelError("no system turns")
        return tuple(map(ord, messages[-1].content + self.args.get("mark", "")))

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(map(chr, ids))

    def think_open(self, ids: Sequence[int]) -> bool:
        return ids[-1] == ord("<")


class Echo:
    """Completes a prompt with itself and the key; fails on prompts with an `!`; remembers the calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, int]] = []

    def sample(self, requests: Sequence[SampleRequest], sampling: Sampling) -> list[list[Completion]]:
        self.calls.append((len(requests), sampling.max_new_tokens))
        if any(ord("!") in request.prompt_ids for request in requests):
            raise RuntimeError("out of memory")
        return [[self._complete(request, key) for key in request.keys] for request in requests]

    @staticmethod
    def _complete(request: SampleRequest, key: int) -> Completion:
        ids = torch.tensor([*request.prompt_ids, ord("0") + key])
        return Completion(ids, torch.zeros(len(ids)), False, 0.0)


def ask(text: str, keys: tuple[int, ...] = (1,), role: Any = "user", images: tuple[ImageRef, ...] = ()) -> TeacherRequest:
    return TeacherRequest((Message(role, text),), keys, images)


def test_replies_in_order_with_one_text_per_key_and_token_counts() -> None:
    engine = Echo()
    teacher = LocalTeacher(cast(Any, engine), Letters, special_texts=["<s>"])
    replies = teacher.complete([ask("ab", (1, 2)), ask("c<")], TeacherSampling(GREEDY))
    assert [reply.texts for reply in replies] == [("ab1", "ab2"), ("c<1",)]
    assert [reply.think_open for reply in replies] == [False, True]
    assert [(reply.prompt_tokens, reply.completion_tokens) for reply in replies] == [(2, 6), (2, 3)]
    assert engine.calls == [(2, 6)]
    assert teacher.special_texts == ("<s>",)
    assert teacher.complete([], TeacherSampling(GREEDY)) == []


def test_a_chat_of_its_own_for_each_set_of_template_arguments() -> None:
    made: list[Mapping[str, Any]] = []

    def make(args: Mapping[str, Any]) -> Letters:
        made.append(args)
        return Letters(args)

    teacher = LocalTeacher(cast(Any, Echo()), make)
    for args in ({"mark": "x", "n": 1}, {"n": 1, "mark": "x"}, {}, {"mark": "y"}):
        teacher.complete([ask("a")], TeacherSampling(GREEDY, args))
    assert made == [{"mark": "x", "n": 1}, {}, {"mark": "y"}]
    assert teacher.complete([ask("a")], TeacherSampling(GREEDY, {"mark": "y"}))[0].texts == ("ay1",)


def test_what_cannot_be_served_says_why_and_the_rest_is_served() -> None:
    requests = [
        ask("fine"),
        ask("hello", role="system", keys=(1, 2)),
        ask("much too long for it"),
        ask("seen", images=(ImageRef("a.png", "00"),)),
        ask("bad!"),
    ]
    engine = Echo()
    replies = LocalTeacher(cast(Any, engine), Letters, context=12).complete(requests, TeacherSampling(GREEDY))
    assert [reply.texts for reply in replies] == [("fine1",), (None, None), (None,), (None,), (None,)]
    assert replies[0].error == ""
    for reply, words in zip(replies[1:], ("no system turns", "context holds 12", "image", "out of memory"), strict=True):
        assert words in reply.error
    assert [size for size, _ in engine.calls] == [2, 1, 1]


def test_one_bad_request_does_not_take_the_others_along() -> None:
    engine = Echo()
    texts = ["a", "b", "c!", "d", "e", "f", "g", "h"]
    replies = LocalTeacher(cast(Any, engine), Letters).complete([ask(text) for text in texts], TeacherSampling(GREEDY))
    assert [reply.texts[0] for reply in replies] == [None if "!" in text else f"{text}1" for text in texts]
    assert [size for size, _ in engine.calls] == [8, 4, 2, 2, 1, 1, 4]


def test_template_arguments_that_break_the_template_show_at_start_up(tiny_qwen3_dir: Path) -> None:
    teacher = LocalTeacher.load(tiny_qwen3_dir, template="{{ 1 // (divisor | default(1)) }}{{ messages[0].content }}")
    teacher.check(TeacherSampling(GREEDY, {"divisor": 1}))
    with pytest.raises(ModelError, match="divisor"):
        teacher.check(TeacherSampling(GREEDY, {"divisor": 0}))


def test_a_checkpoint_is_loaded_frozen_and_answers_as_generate_does(tiny_qwen3_dir: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    teacher = LocalTeacher.load(tiny_qwen3_dir)
    assert teacher.context == 4096
    assert "<|im_end|>" in teacher.special_texts
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_qwen3_dir, dtype=torch.float32)
    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_qwen3_dir)
    how = TeacherSampling(GREEDY, {"enable_thinking": True})
    requests = [ask("What is 3 plus 4?", (5, 6)), ask("Is it wrong?")]
    for request, reply in zip(requests, teacher.complete(requests, how), strict=True):
        ids = tokenizer.apply_chat_template(
            [m._asdict() for m in request.messages], add_generation_prompt=True, enable_thinking=True, return_tensors="pt", return_dict=True
        )
        length = ids["input_ids"].shape[1]
        expected = model.generate(**ids, do_sample=False, max_new_tokens=6)[0, length:]
        text = tokenizer.decode(expected, skip_special_tokens=True)
        assert reply.texts == (text,) * len(request.keys)
        assert reply.think_open
        assert reply.prompt_tokens == length


def test_sampled_completions_depend_on_their_key_alone(tiny_qwen3_dir: Path) -> None:
    teacher = LocalTeacher.load(tiny_qwen3_dir)
    how = TeacherSampling(Sampling(max_new_tokens=8))
    (both,) = teacher.complete([ask("What is 3?", (11, 12))], how)
    (other, again) = teacher.complete([ask("Why?", (3,)), ask("What is 3?", (12, 11))], how)
    assert both.texts == again.texts[::-1]
    assert len({*both.texts, *other.texts}) == 3


def test_weights_are_frozen_and_in_the_asked_dtype(tiny_qwen3_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import zppo.teacher.local as local

    seen: list[torch.nn.Module] = []
    real = local.TransformersEngine

    def spy(model: Any, *args: Any, **options: Any) -> Any:
        seen.append(model)
        return real(model, *args, **options)

    monkeypatch.setattr(local, "TransformersEngine", spy)
    LocalTeacher.load(tiny_qwen3_dir)
    LocalTeacher.load(tiny_qwen3_dir, dtype=torch.bfloat16)
    for model, dtype in zip(seen, (torch.float32, torch.bfloat16), strict=True):
        assert not model.training
        assert all(p.dtype == dtype and not p.requires_grad for p in model.parameters())


def test_a_missing_checkpoint_is_a_teacher_error(tmp_path: Path) -> None:
    with pytest.raises(TeacherError, match="nowhere"):
        LocalTeacher.load(tmp_path / "nowhere")
