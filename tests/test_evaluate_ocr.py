"""OCRBench v2's metrics: values worked out by hand, bounds for what models write; `test_evaluate_harness.py` has the harness's."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zppo.core.types import Message
from zppo.errors import SettingsError
from zppo.evals.item import Item
from zppo.evals.results import _ABILITIES
from zppo.evals.scoring import text_scores as page_text
from zppo.evals.scoring.text_scores import _METRICS, Node, ocr_score, outline_similarity, page_score, teds, tree_distance


def table(*rows: str) -> str:
    return "<table>" + "".join("<tr>" + "".join(f"<td>{c}</td>" for c in row.split()) + "</tr>" for row in rows) + "</table>"


@pytest.mark.parametrize(
    ("gold", "answer", "value"),
    [
        (table("a b"), table("a b"), 1.0),
        (table("a b"), table("a c"), 1 - 1 / 3),  # one of three nodes below the table differs wholly
        (table("ab cd"), table("ab cx"), 1 - 0.5 / 3),  # half of a cell
        (table("a b", "c d"), table("a b"), 1 - 3 / 6),  # a row and its two cells are missing
        (table("a b"), "no table", 0.0),
        (table("a b"), "<table></table>", 0.0),
        (table("a"), table("a").replace("<td>", '<td colspan="2">'), 1 - 1 / 2),
        (table("a b"), "<table><tr><td>a<td>b</table> and more", 1.0),  # tags that nobody closed
        (table("a"), "<table><tr><td>a</td></tr></table><table><tr><td>x</td></tr></table>", 1.0),  # the first counts
        (table("&lt;"), table("&lt;"), 1.0),
    ],
)
def test_tables_by_hand(gold: str, answer: str, value: float) -> None:
    assert teds(gold, answer) == pytest.approx(value)


@pytest.mark.timeout(60)
def test_much_more_than_the_gold_is_not_compared() -> None:
    """[zppo] A table of 4,000 cells against one of two: 0, at once."""
    assert teds(table("a b"), table(*["x y z w"] * 1000)) == 0.0
    assert outline_similarity("# One\ntext", "line\n" * 4000) == 0.0


NODES = st.recursive(
    st.builds(Node, st.sampled_from("abc")),
    lambda inner: st.builds(lambda label, children: Node(label, children=children), st.sampled_from("abc"), st.lists(inner, max_size=3)),
    max_leaves=5,
)  # fmt: skip


def unit(first: Node | None, second: Node | None) -> float:
    return 0.0 if first and second and first.label == second.label else 1.0


def forest(first: tuple[Node, ...], second: tuple[Node, ...], known: dict[Any, float]) -> float:
    """The textbook recursion over rightmost trees, slow and plain."""
    key = (tuple(map(id, first)), tuple(map(id, second)))
    if key not in known:
        if not first or not second:
            rest = first or second
            known[key] = float(sum(size(node) for node in rest))
        else:
            a, b = first[-1], second[-1]
            known[key] = min(
                forest((*first[:-1], *a.children), second, known) + 1,
                forest(first, (*second[:-1], *b.children), known) + 1,
                forest(first[:-1], second[:-1], known) + forest(tuple(a.children), tuple(b.children), known) + unit(a, b),
            )
    return known[key]


def size(node: Node) -> int:
    return 1 + sum(map(size, node.children))


@settings(max_examples=60, deadline=None)
@given(NODES, NODES)
def test_tree_distance_is_the_textbook_one(first: Node, second: Node) -> None:
    assert tree_distance(first, second, unit) == forest((first,), (second,), {})


def test_pages_by_hand() -> None:
    assert page_score("one two three four five", "one two three four five") == pytest.approx(1, abs=0.01)
    assert page_score("one two", "") == 0.0
    some = page_score("the cat sat on the mat today", "the cat sat on a mat")
    none = page_score("the cat sat on the mat today", "zzz")
    assert 0.4 < some < 0.9 and none < 0.1


def test_a_missing_package_is_named_with_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    import builtins

    real = builtins.__import__

    def no_nltk(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith(("nltk", "jieba")):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_nltk)
    for loader, package in ((page_text._nltk, "nltk"), (page_text._jieba, "jieba")):
        loader.cache_clear()
        with pytest.raises(SettingsError, match=rf"{package}, which is not installed: pip install 'zppo\[ocr\]'"):
            loader()


def test_every_task_has_a_metric_and_an_ability() -> None:
    assert set(_METRICS) == set(_ABILITIES)


HOSTILE = ("[" * 20_000, "{" * 20_000, "<table>" * 5000, "<td>" * 10_000, "(1,2,3," * 5000, "```" * 10_000, "a:" * 20_000, "((((" * 9999)


@pytest.mark.parametrize("task", sorted(set(_METRICS) - {"full-page OCR en", "full-page OCR cn", "text translation cn"}))
def test_a_hostile_response_neither_raises_nor_stalls(task: str) -> None:
    facts = {"task": task, "question": "简答 html", "boxes": ((1, 1, 5, 1, 5, 5, 1, 5),), "content": ("A",), "bbox": (1, 2, 3, 4)}
    asked = Item("1", "x", (Message("user", "?"),), ('{"a": "b"}',), "ocr", facts=facts)
    for response in HOSTILE:
        assert 0 <= ocr_score(asked, response) <= 1


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(_METRICS)), st.text(max_size=80), st.text(min_size=1, max_size=40))
def test_scores_are_shares(task: str, response: str, gold: str) -> None:
    facts = {"task": task, "boxes": (), "content": ()}
    assert 0 <= ocr_score(Item("1", "x", (Message("user", "?"),), (gold,), "ocr", facts=facts), response) <= 1
