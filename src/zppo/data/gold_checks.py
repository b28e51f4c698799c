"""Right answers that the rules can never find in a box: told when data is read, not after a run [zppo]."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from types import MappingProxyType

from zppo.core.types import RULE, Question
from zppo.data.local_files import Place
from zppo.grading.equality import compare, undecided
from zppo.grading.text import clean, last_box
from zppo.grading.words import choice, yes_no

MOST_WORDS = 5
"""Words of one part of an answer (between commas) from which on it is a sentence, of which people write as many as there are people."""

_SHOWN = 60
_JUDGE = "let a judge grade them (a column `grading` that says judge)"
MENDS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "mark": ("holds the mark '####'", "take what follows it with data.answer_after: '####'"),
        "box": ("is more than a box", "take what the box holds with data.answer_after: '\\boxed'"),
        "tag": ("holds the tag {found!r}", "take what stands in it with data.answer_after: {found!r}"),
        "thought": ("holds '</think>'", "take what follows it with data.answer_after: '</think>'"),
        "lines": ("has several lines", f"take the answer alone with data.answer_after and a text that stands before it, or {_JUDGE}"),
        "nothing": ("is what an empty cell is written as", "take these rows out, or write the right answer"),
        "words": (f"has more than {MOST_WORDS} words", f"keep the answer alone (data.answer_after), or {_JUDGE}"),
    }
)
"""What stands in the way of a right answer, by its kind: how it is said, and what to do."""

_MARK = "####"
_TAG = re.compile(r"<([A-Za-z][\w-]*)>(.*?)</\1>", re.DOTALL)
_OPENED = re.compile(r"<((?:final[_-]?)?(?:answer|ans|result|solution))>(.*)", re.DOTALL | re.IGNORECASE)
_THOUGHT = "</think>"
NOTHING = frozenset(("nan", "NaN", "<NA>", "None", "null", "NULL", "N/A", "#N/A"))
"""What an empty cell is written as."""
_LATEX = re.compile(r"\\(?:begin|end)\{[^{}]*\}|\\[a-zA-Z]+")
_PART = re.compile(r"[,;、，；]|\b(?:and|or)\b")
# A word has three letters, or two with another word before it: `ab + cd` has none. Two characters of a script without spaces are one.
_WORD = re.compile(r"[^\W\d_]{3,}|(?<=[^\W\d_] )[^\W\d_]{2}(?![^\W\d_])")
_WITHOUT_SPACES = re.compile("[\u3040-\u30ff\u3400-\u9fff]")
_NO_WORDS = frozenset(
    "the sin cos tan cot sec csc log exp sqrt arcsin arccos arctan sinh cosh tanh max min lim det mod gcd lcm inf".split()
)


def unmatchable(gold: str) -> tuple[str, str]:
    """Why no boxed answer can be this right answer, a key of `MENDS`, and what it is about; ("", "") where one can."""
    if gold in NOTHING:
        return "nothing", ""
    head, mark, tail = gold.rpartition(_MARK)
    if mark and not _says(gold, tail):
        return "mark", _MARK
    if "boxed" in gold and (box := last_box(gold)) is not None and not _says(gold, box):
        return "box", box
    tag = _TAG.search(gold)
    if tag is not None and not (_OPENED.match(tag[0]) or tag[0] == gold.strip()):
        tag = None  # markup inside an answer
    tag = tag or _OPENED.search(gold)
    if tag is not None and not _says(gold, tag[2]):
        return "tag", f"<{tag[1]}>"
    if _THOUGHT in gold:
        return "thought", _THOUGHT
    if len(gold.strip().splitlines()) > 1 and r"\begin" not in gold:
        return "lines", ""
    if max(map(_words, _PART.split(_LATEX.sub(" ", gold)))) > MOST_WORDS:
        cleaned = clean(gold)
        if not (choice(cleaned)[0] or yes_no(cleaned)):
            return "words", ""
    return "", ""


def _words(part: str) -> int:
    plain = _WITHOUT_SPACES.sub(" ", part)
    return sum(word.lower() not in _NO_WORDS for word in _WORD.findall(plain)) + len(_WITHOUT_SPACES.findall(part)) // 2


def _says(gold: str, inner: str) -> bool:
    """Whether the rules take a part of a right answer for all of it."""
    try:
        return compare(gold, inner, undecided) is True
    except Exception:  # whatever the grader stumbles over, it will not match
        return False


class GoldChecks:
    """Looks at the right answers of a source that the rules grade; keeps the first of each kind, and how many there are."""

    def __init__(self) -> None:
        self._found: dict[str, tuple[str, str, int]] = {}  # what the first one is, the mend, how many
        self._questions = 0

    def look(self, question: Question, place: Place, column: str) -> None:
        """Takes note of one question."""
        if question.grading != RULE:
            return
        self._questions += 1
        for kind, found, gold in ((*unmatchable(gold), gold) for gold in question.golds):
            if kind:
                what, mend = (text.format(found=found) for text in MENDS[kind])
                first, mend, count = self._found.get(kind, (f"{place}, column {column!r}: the right answer {_shown(gold)} {what}", mend, 0))
                self._found[kind] = first, mend, count + 1
                return

    def tell(self, say: Callable[[str], None]) -> None:
        """One warning of each kind that was found."""
        for kind, (first, mend, count) in self._found.items():
            more = f" ({count:,} of {self._questions:,} are like it)" if count > 1 else ""
            matched = "" if kind == "nothing" else ", and graded by rule no boxed answer matches that"
            say(f"warning: {first}{more}{matched}: {mend}")


def _shown(gold: str) -> str:
    return repr(gold) if len(gold) <= _SHOWN else f"{gold[: _SHOWN // 2]!r}...{gold[-_SHOWN // 2 :]!r}"
