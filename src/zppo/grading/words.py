"""Answers in words: yes and no, choice letters, prose, the ways to say that nothing is an answer. Standard library only."""

from __future__ import annotations

import re
from functools import lru_cache

_YES_NO = {
    "yes": "yes", "no": "no", "true": "true", "false": "false", "correct": "true", "incorrect": "false",
    "是": "yes", "是的": "yes", "否": "no", "不是": "no", "对": "true", "错": "false", "正确": "true", "错误": "false",
}  # fmt: skip
_CONTRADICTIONS: dict[str, set[str]] = {"yes": {"not"}, "no": set(), "true": {"not"}, "false": set()}
_LETTER = re.compile(r"(?:(?:option|choice|选项?)\s*)?(?:\(([A-Za-z])\)|([A-Za-z]))[.):]?", re.IGNORECASE)
_LETTER_WITH_TEXT = re.compile(r"(?:(?:option|choice)\s*)?(?:\(([A-J])\)[.:,]?|([A-J])(?:[.):](?!\d)|\)))\s*(\S.*)", re.DOTALL)
_ANOTHER_LETTER = re.compile(r"(?<![A-Za-z])(?:\([A-J]\)|[A-J](?=[.):,;]|$)|[A-J]\b(?= (?:and|or)\b))")
_LETTERS = re.compile(r"[A-J](?:(?:,| and |,and | & |、|)[A-J])+")
_COMMAND = re.compile(r"\\[a-zA-Z]+")
_WORD = re.compile(r"[^\W\d_]{2,}")
_CJK = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]")
_TWO_LETTER_WORDS = frozenset("is or if no to of in on at it we he be by an as do go so up us my me am ok hi oh ie eg vs".split())
_VARIABLE_RUNS = (frozenset("xyz"), frozenset("abc"), frozenset("pqr"), frozenset("uvw"), frozenset("mn"))


def yes_no(text: str) -> str | None:
    """The verdict in an answer: "yes", "no", "true" or "false", where the answer is one or starts with one and a comma."""
    first, separator, rest = text.lower().partition(",")
    if not separator:
        first, separator, rest = text.lower().partition(". ")
    verdict = _YES_NO.get(first.strip(" .!"))
    if verdict is None or (rest and not rest.strip()[:1].isalpha()):
        return None
    doubt = _CONTRADICTIONS[verdict] | {"yes", "no", "true", "false"}
    return None if doubt & set(re.findall(r"[a-z]+", rest)) else verdict


def choice(text: str) -> tuple[frozenset[str], str]:
    """The choice letters of an answer (upper case, empty if it is none) and the text that stands next to a single one."""
    if match := _LETTER.fullmatch(text):
        return frozenset((match[1] or match[2]).upper()), ""
    if match := _LETTER_WITH_TEXT.fullmatch(text):
        if _ANOTHER_LETTER.search(match[3]):
            return frozenset(), ""
        return frozenset(match[1] or match[2]), match[3].strip()
    if _LETTERS.fullmatch(text):
        letters = re.findall(r"[A-J]", text)
        return (frozenset(letters), "") if len(set(letters)) == len(letters) else (frozenset(), "")
    return frozenset(), ""


@lru_cache(maxsize=8192)
def is_prose(text: str) -> bool:
    """Whether a cleaned answer contains words: nothing that algebra should see, nor guess a number in."""
    if _CJK.search(text):
        return True
    for run in _WORD.findall(_COMMAND.sub(" ", text)):
        letters = set(run)
        if len(run) == 2 and run.lower() not in _TWO_LETTER_WORDS:
            continue  # a product of two variables
        if len(run) > 3 or not any(letters <= variables for variables in _VARIABLE_RUNS):
            return True
    return False


def only_choice(text: str) -> bool:
    """Whether an answer can only be read as a choice: an upper-case letter from A to J, alone, with text, or several."""
    letters, rest = choice(text)
    return bool(rest) or len(letters) > 1 or bool(re.fullmatch(r"\(?[A-J]\)?[.):]?", text))


_NOTHING = re.compile(
    r"(?:there (?:is|are|exists?) |has |have )?no (?:such |real |integer |valid |possible )*(?:solutions?|values?|roots?)(?: exists?)?"
    r"|(?:the )?(?:empty|null) set|none exists?|\\emptyset|无解|空集"
)


_SYNONYMS = {
    "dne": "does not exist",
    "not defined": "undefined",
    "infinite": "infinitely many",
    "infinitely many solutions": "infinitely many",
}
_SYNONYMS |= {
    "infinite solutions": "infinitely many",
    "an infinite number of solutions": "infinitely many",
    "cannot be determined": "not enough information",
}


def same_words(gold: str, answer: str) -> bool:
    """Whether two cleaned answers are two stock phrases for one thing."""
    first, second = (re.sub(r"^(?:it |the limit |there are )", "", text.lower()).strip(" .") for text in (gold, answer))
    return not _SYNONYMS.keys().isdisjoint((first, second)) and _SYNONYMS.get(first, first) == _SYNONYMS.get(second, second)


def says_nothing(text: str) -> bool:
    """Whether a cleaned answer says that nothing solves the question: "no solution", the empty set."""
    return _NOTHING.fullmatch(text.lower()) is not None
