"""Answers in words: yes and no, choice letters, dates and times of day, prose, the ways to say that nothing is an answer [zppo]."""

from __future__ import annotations

import re
from datetime import datetime
from functools import lru_cache

from dateutil import parser

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


_MONTHS = (
    "jan(?:uary)? feb(?:ruary)? mar(?:ch)? apr(?:il)? may june? july? aug(?:ust)? sept?(?:ember)? oct(?:ober)? nov(?:ember)? dec(?:ember)?"
)
_MONTH = rf"(?:{'|'.join(_MONTHS.split())})\.?"
_WEEKDAY = r"(?:(?:mon|tues|wednes|thurs|fri|satur|sun)day,? ?)?(?:the )?"
_DAY = r"\d{1,2}(?:st|nd|rd|th)?"
_YEAR = r"(?:,? ?\d{4})?"
_DATE = re.compile(
    rf"{_WEEKDAY}(?:{_MONTH} (?:the )?{_DAY}{_YEAR}|{_DAY} (?:of )?{_MONTH}{_YEAR}|{_MONTH},? \d{{4}}|\d{{4}} {_MONTH} {_DAY})"
    r"|\d{4}-\d{2}-\d{2}|\d{4}年\d{1,2}月(?:\d{1,2}日?)?|\d{1,2}月\d{1,2}日",
    re.IGNORECASE,
)
_TIME = re.compile(
    r"(?P<hour>\d{1,2})(?:[:.](?P<minute>\d{2})(?::(?P<second>\d{2}))?)? ?(?P<half>[ap]\.?m\.?|o'?clock)?"
    r"(?: in the (?P<part>morning|afternoon|evening))?",
    re.IGNORECASE,
)
_NAMED = {"noon": (12, 0, 0), "12 noon": (12, 0, 0), "midday": (12, 0, 0), "midnight": (0, 0, 0), "12 midnight": (0, 0, 0)}
_DEFAULTS = (datetime(2000, 1, 1), datetime(2004, 2, 2))  # what differs between them was not said


@lru_cache(maxsize=4096)
def parse_date(text: str) -> tuple[int | None, int, int | None] | None:
    """(year, month, day) of a date with a month in words, or in the order of ISO 8601; None for what was not said, or if it is no date."""
    if len(text) > 40 or not _DATE.fullmatch(text):
        return None
    plain = re.sub(r"[年月]", "-", text).rstrip("日-") if "月" in text else re.sub(r"(?i)\b(?:the|of)\b|,", " ", text)
    try:
        first, second = (parser.parse(plain, default=default) for default in _DEFAULTS)
    except (ValueError, OverflowError):
        return None
    year, day = (a if a == b else None for a, b in ((first.year, second.year), (first.day, second.day)))
    return (year, first.month, day) if first.month == second.month else None


def _in_figures(text: str) -> tuple[int, int, int] | None:
    """A date such as 12/25/1999, where only one of the two numbers can be the month; it may be a quotient: never read by itself."""
    match = re.fullmatch(r"(\d{1,2})([/.-])(\d{1,2})\2(\d{4})", text)
    if match is None:
        return None
    first, second, year = int(match[1]), int(match[3]), int(match[4])
    months = {(m, d) for m, d in ((first, second), (second, first)) if 1 <= m <= 12 and 1 <= d <= 31}
    return (year, *months.pop()) if len(months) == 1 else None


@lru_cache(maxsize=4096)
def parse_time(text: str) -> tuple[int, int, int, bool] | None:
    """(hour, minute, second, whether it says which half of the day) of a time of day; None if it is none."""
    if named := _NAMED.get(text.lower()):
        return (*named, True)
    match = _TIME.fullmatch(text) if len(text) <= 30 else None
    if match is None or not (match["half"] or match["part"] or (match["minute"] and ":" in text)):
        return None
    hour, minute, second = (int(match[name] or 0) for name in ("hour", "minute", "second"))
    half = (match["half"] or "").lower()[:1]
    half = {"morning": "a", "afternoon": "p", "evening": "p"}.get(match["part"] or "", half)
    if minute > 59 or second > 59 or hour > 23 or (half in ("a", "p") and not 1 <= hour <= 12):
        return None
    if half in ("a", "p"):
        hour = hour % 12 + (12 if half == "p" else 0)
    return hour, minute, second, half in ("a", "p") or hour > 12 or hour == 0


def same_moment(gold: str, answer: str) -> bool | None:
    """Whether two dates, or two times of day, are the same; None where they are not two of one kind.

    What the gold does not say may be said by the answer: "March 4" and "March 4, 2024", but not the other way round.
    """
    dates = [parse_date(gold), parse_date(answer)]
    for index in (0, 1):
        if dates[1 - index] and not dates[index]:
            dates[index] = _in_figures((gold, answer)[index])
    if dates[0] and dates[1]:
        return all(said is None or said == other for said, other in zip(dates[0], dates[1], strict=True))
    times = parse_time(gold), parse_time(answer)
    if times[0] and times[1] and not (gold + answer).replace(":", "").isdigit():  # "1:12" and "13:12" may be ratios
        said = times[0][3] and times[1][3]
        return times[0][:3] == times[1][:3] or (not said and times[0][0] % 12 == times[1][0] % 12 and times[0][1:3] == times[1][1:3])
    return None
