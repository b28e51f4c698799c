"""Compression: what is accepted, what is redrawn, and what both sides fall back to."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zppo.core.draws import keyed_random
from zppo.engines.base import Sampling
from zppo.prompts import PromptBook
from zppo.step_log import StepLog
from zppo.teacher.compression import COMPRESSION_COUNTS, Compressor, PairRequest, Source, accept, draw_order, token_tail
from zppo.teacher.interface import TeacherReply, TeacherRequest, TeacherSampling

HOW = TeacherSampling(Sampling(max_new_tokens=512), {"enable_thinking": False})


def last_words(limit: int) -> Callable[[str], str]:
    return lambda text: text if len(text.split()) <= limit else " ".join(text.split()[-limit:])


WIDE = last_words(512)


class ScriptedTeacher:
    """Answers from the response in the prompt; counts its calls."""

    def __init__(self, answer: Callable[[str], str | None] = lambda text: f"<summary>short {text}</summary>") -> None:
        self.answer = answer
        self.calls: list[list[TeacherRequest]] = []

    def complete(self, requests: Sequence[TeacherRequest], how: TeacherSampling, log: StepLog | None = None) -> list[TeacherReply]:
        assert how is HOW
        self.calls.append(list(requests))
        replies = []
        for request in requests:
            response = re.search(r"<response>\n(.*)\n</response>", request.messages[-1].content, re.DOTALL)
            assert response is not None
            text = self.answer(response[1])
            replies.append(TeacherReply((text,), prompt_tokens=10, completion_tokens=3, error="" if text else "down"))
        return replies

    @property
    def asked(self) -> list[str]:
        return [request.messages[-1].content for call in self.calls for request in call]


def compressor(teacher: ScriptedTeacher | None, **options: Any) -> Compressor:
    return Compressor(teacher, PromptBook(), HOW, options.pop("cap", WIDE), **options)


def source(text: str, answer: str | None = "7", index: int = 0) -> Source:
    return Source(f"{text} \\boxed{{{answer}}}" if answer is not None else text, answer, index)


@pytest.mark.parametrize(
    ("reply", "answer", "summary"),
    [
        ("<summary>a\nb \\boxed{7}</summary>", "7", "a\nb \\boxed{7}"),
        ("Here: <summary>\n\n a \n\n \\boxed{7}\n</summary> done", "7", "a\n\\boxed{7}"),
        ("<think><summary>no</summary></think><summary>\\boxed{7}</summary>", "7", "\\boxed{7}"),
        ("between <summary> and </summary>: <summary>\\boxed{7}</summary>", "7", "\\boxed{7}"),
        ("<summary>\\boxed{Red  APPLE}</summary>", "\\text{red apple}", "\\boxed{Red  APPLE}"),
        ("<summary>1\n2\n3\n4\n5\n6\n\\boxed{7}</summary>", "7", "1\n2\n3\n4\n5 6 \\boxed{7}"),
        ("<summary>nothing found</summary>", None, "nothing found"),
        ("<summary>a \\boxed{8}</summary>", "7", None),
        ("<summary>a \\boxed{7}, no: \\boxed{8}</summary>", "7", None),
        ("<summary>it is 7</summary>", "7", None),
        ("<summary>a \\boxed{7}</summary>", None, None),
        ("<summary>a \\boxed{7</summary>", None, None),
        ("<summary>a \\boxed{7}", "7", None),
        ("a \\boxed{7}</summary>", "7", None),
        ("<summary> \n </summary>", None, None),
        ("", None, None),
        ("<summary>one two three four five six \\boxed{7}</summary>", "7", None),
    ],
)
def test_what_is_accepted(reply: str, answer: str | None, summary: str | None) -> None:
    cap = last_words(6) if "four five six" in reply else WIDE
    assert accept(reply, answer, cap) == summary


@given(st.text(), st.one_of(st.none(), st.text(max_size=5)))
def test_an_accepted_summary_is_short_and_keeps_no_blank_line(text: str, answer: str | None) -> None:
    summary = accept(f"<summary>{text}</summary>", answer, WIDE)
    if summary is not None:
        assert summary == summary.strip() != ""
        assert 1 <= len(summary.split("\n")) <= 5
        assert all(line.strip() for line in summary.split("\n"))


def test_each_distinct_completion_is_asked_once_a_step() -> None:
    teacher = ScriptedTeacher()
    compress, log = compressor(teacher), StepLog(0)
    one, other = source("one"), source("other", None)
    assert compress.compress([one, other, source("one", index=5)], 0, log) == [
        "short one \\boxed{7}",
        "short other",
        "short one \\boxed{7}",
    ]
    compress.compress([one], 0, log)
    assert [len(call) for call in teacher.calls] == [2]
    assert "Do not write \\boxed{}" in teacher.asked[1]
    assert "Do not write \\boxed{}" not in teacher.asked[0]
    assert list(log.counts) == list(COMPRESSION_COUNTS) and list(log.counts.values()) == [2, 0, 0, 0, 20, 6]
    compress.compress([one], 0, StepLog(1))
    assert [len(call) for call in teacher.calls] == [2, 1]


def test_keys_depend_on_seed_step_and_text_alone() -> None:
    def keys(items: list[Source], seed: int, step: int) -> dict[str, int]:
        teacher = ScriptedTeacher()
        compressor(teacher).compress(items, seed, StepLog(step))
        return {r.messages[-1].content: r.keys[0] for r in teacher.calls[0]}

    one, other = source("one"), source("other")
    assert keys([one, other], 1, 2) == keys([other, one], 1, 2)
    assert len({*keys([one, other], 1, 2).values(), *keys([one], 2, 2).values(), *keys([one], 1, 3).values()}) == 4


def test_failures_and_silence_are_counted_apart() -> None:
    replies = {"bad \\boxed{7}": "<summary>\\boxed{8}</summary>", "gone \\boxed{7}": None}
    log = StepLog(0)
    compress = compressor(ScriptedTeacher(lambda text: replies[text]))
    assert compress.compress([source("bad"), source("gone")], 0, log) == [None, None]
    assert [log.counts[f"compression_{name}"] for name in ("asked", "failed", "unreachable")] == [2, 1, 1]
    assert log.errors == {"teacher": "down"}


def test_an_unfinished_thought_is_no_summary() -> None:
    class Thinking(ScriptedTeacher):
        def complete(self, requests: Sequence[TeacherRequest], how: TeacherSampling, log: StepLog | None = None) -> list[TeacherReply]:
            return [TeacherReply(("maybe <summary>short</summary>",), think_open=True) for _ in requests]

    assert compressor(Thinking()).compress([source("a", None)], 0, StepLog(0)) == [None]


def test_a_failed_candidate_is_redrawn_from_its_own_pool() -> None:
    positives = tuple(source(f"right{i}", index=i) for i in range(4))
    negatives = tuple(source(f"wrong{i}", "9", i) for i in range(4))

    def answer(text: str) -> str:
        return f"<summary>{text}</summary>" if "right" in text or "wrong2" in text else "<summary>?</summary>"

    teacher = ScriptedTeacher(answer)
    (got,) = compressor(teacher).prepare([PairRequest("q", positives, negatives, want_pair=True)], 0, StepLog(0))
    assert got.pair is not None
    positive, negative = got.pair
    assert not got.pair_raw
    assert (negative.text, negative.answer, negative.index) == ("wrong2 \\boxed{9}", "9", 2)
    assert positive.index == draw_order(positives, 1, keyed_random(0, 0, "q", "candidate", "positive"))[0].index
    assert sum("right" in text for text in teacher.asked) == 1


@pytest.mark.parametrize("failing", ["right", "wrong"])
def test_both_sides_take_the_raw_form_if_one_fails_for_good(failing: str) -> None:
    positives = tuple(source(f"right{i}", index=i) for i in range(6))
    negatives = tuple(source(f"wrong{i}", "9", i) for i in range(6))
    teacher = ScriptedTeacher(lambda text: None if failing in text else f"<summary>short {text}</summary>")
    (got,) = compressor(teacher, cap=last_words(3)).prepare([PairRequest("q", positives, negatives, want_pair=True)], 0, StepLog(0))
    assert got.pair is not None
    assert got.pair_raw
    assert [c.text for c in got.pair] == [f"right{got.pair[0].index} \\boxed{{7}}", f"wrong{got.pair[1].index} \\boxed{{9}}"]
    assert len(teacher.calls) == 4
    assert [sum(failing in text for text in map(str, call)) for call in teacher.calls] == [1, 1, 1, 1]
    assert len(set(teacher.asked)) == len(teacher.asked) == 5


def test_no_redraws_and_a_pool_of_one() -> None:
    teacher = ScriptedTeacher(lambda text: None)
    many = tuple(source(f"w{i}", "9", i) for i in range(6))
    compressor(teacher, redraws=0).prepare([PairRequest("q", many, many, want_pair=True)], 0, StepLog(0))
    assert len(teacher.calls) == 1
    teacher = ScriptedTeacher(lambda text: None)
    (got,) = compressor(teacher).prepare([PairRequest("q", many[:1], (many[1], many[1]), want_pair=True)], 0, StepLog(0))
    assert got.pair_raw
    assert len(teacher.calls) == 1


def test_all_questions_share_a_round_and_bcq_and_ncq_share_a_summary() -> None:
    requests = []
    for q in range(3):
        wrong = tuple(source(f"q{q} wrong{i}", None if i == 2 else "9", i) for i in range(3))
        positives = (source(f"q{q} right"),)
        requests.append(PairRequest(f"q{q}", positives, wrong[:2], wrong, want_pair=True, want_wrong=True))
    teacher = ScriptedTeacher()
    got = compressor(teacher).prepare(requests, 0, StepLog(0))
    assert [len(call) for call in teacher.calls] == [3 * 4]
    for q, prepared in enumerate(got):
        assert [c.text for c in prepared.wrong] == [
            f"short q{q} wrong0 \\boxed{{9}}",
            f"short q{q} wrong1 \\boxed{{9}}",
            f"short q{q} wrong2",
        ]
        assert [c.index for c in prepared.wrong] == [0, 1, 2]
        assert prepared.pair is not None
        assert prepared.pair[1] in prepared.wrong
        assert prepared.wrong_raw == 0


def test_a_wrong_candidate_of_ncq_that_fails_takes_its_own_raw_form() -> None:
    wrong = (source("good", "9"), source("very bad indeed", "8", 1), source("good", "9", 2))
    teacher = ScriptedTeacher(lambda text: None if "bad" in text else f"<summary>{text}!</summary>")
    (got,) = compressor(teacher, cap=last_words(3)).prepare([PairRequest("q", wrong=wrong, want_wrong=True)], 0, StepLog(0))
    assert [c.text for c in got.wrong] == ["good \\boxed{9}!", "bad indeed \\boxed{8}", "good \\boxed{9}!"]
    assert (got.wrong_raw, got.pair) == (1, None)
    assert len(teacher.calls) == 1


def test_compression_off_shows_raw_forms_and_asks_nothing() -> None:
    teacher = ScriptedTeacher()
    wrong = (source("a b c d", "9"),)
    request = PairRequest("q", (source("e f g h"),), wrong, wrong, want_pair=True, want_wrong=True)
    for off in (compressor(teacher, cap=last_words(2), enabled=False), compressor(None, cap=last_words(2))):
        (got,) = off.prepare([request], 0, StepLog(0))
        assert got.pair is not None
        assert [c.text for c in got.pair] == ["h \\boxed{7}", "d \\boxed{9}"]
        assert not got.pair_raw and got.wrong_raw == 0  # as wanted: nothing was missed
        assert [c.text for c in got.wrong] == ["d \\boxed{9}"]
    assert teacher.calls == []


def test_nothing_wanted_or_an_empty_pool_costs_nothing() -> None:
    teacher = ScriptedTeacher()
    some = (source("a"),)
    requests = [PairRequest("q", some, some, some), PairRequest("r", (), some, want_pair=True)]
    assert all(p.pair is None and p.wrong == () for p in compressor(teacher).prepare(requests, 0, StepLog(0)))
    assert teacher.calls == []


def test_pairs_do_not_depend_on_the_other_requests() -> None:
    def requests() -> list[PairRequest]:
        pools = [tuple(source(f"q{q} c{i}", index=i) for i in range(8)) for q in range(5)]
        return [PairRequest(f"q{q}", pool[:4], pool[4:], want_pair=True) for q, pool in enumerate(pools)]

    def answer(text: str) -> str | None:
        return f"<summary>{text}</summary>" if int(text.split()[1][1:]) % 3 else None

    together = compressor(ScriptedTeacher(answer)).prepare(requests(), 3, StepLog(4))
    backwards = compressor(ScriptedTeacher(answer)).prepare(requests()[::-1], 3, StepLog(4))[::-1]
    alone = [compressor(ScriptedTeacher(answer)).prepare([request], 3, StepLog(4))[0] for request in requests()]
    assert together == backwards == alone


def test_draws_are_uniform_and_skip_repeats() -> None:
    pool = [source("a", index=0), source("b", index=1), source("b", index=2), source("c", index=3)]
    orders = [draw_order(pool, 4, keyed_random("uniform", i)) for i in range(4000)]
    assert all({s.text[0] for s in order} == {"a", "b", "c"} and len(order) == 3 for order in orders)
    first = Counter(order[0].index for order in orders)
    assert all(900 < first[i] < 1100 for i in range(4))
    assert len(draw_order(pool, 2, keyed_random("two"))) == 2


class SlowTokenizer:
    """A tokenizer without offsets: bytes."""

    is_fast = False

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        return list(text.encode())

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode(errors="replace")


def test_the_tail_is_kept() -> None:
    from conftest import make_tokenizer

    tokenizer = make_tokenizer()
    text = "What is 3 plus 4? é The answer is \\boxed{7}"
    for cap in (token_tail(tokenizer, 6), token_tail(SlowTokenizer(), 6)):
        cut = cap(text)
        assert cut
        assert text.endswith(cut)
        assert len(cut) < 20
        assert cap("7") == "7"
        assert cap("") == ""
    assert token_tail(tokenizer, 10_000)(text) == text
    assert token_tail(SlowTokenizer(), 7)("aé" + "b" * 6) == "b" * 6
