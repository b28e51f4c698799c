"""Plain numbers as exact fractions, in every spelling that needs no algebra. Bounded: nothing large is ever expanded."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

_MAX_DIGITS = 300
_MAX_EXPONENT = 300
ROUNDED_PLACES = 6
"""A decimal with at least so many places may stand for a number that no decimal can write."""

_DECIMAL = r"(?:\d+(?:\.\d*)?|\.\d+)"
_SIGNED = rf"[-+]? ?{_DECIMAL}"
_SCALES = {
    "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12,
    "百": 100, "千": 10**3, "万": 10**4, "百万": 10**6, "千万": 10**7, "亿": 10**8,
}  # fmt: skip
_UNITS = {
    word: value
    for value, word in enumerate(
        "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen "
        "nineteen".split()
    )
}
_TENS = {word: 10 * value for value, word in enumerate("twenty thirty forty fifty sixty seventy eighty ninety".split(), 2)}
_THOUSANDS = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_PARTS = {"half": 2, "halve": 2, "third": 3, "quarter": 4, "fourth": 4} | {
    word + "th": value for word, value in {"fif": 5, "six": 6, "seven": 7, "eigh": 8, "nin": 9, "ten": 10, "twelf": 12}.items()
}
_CHINESE_DIGITS = {digit: value for value, digit in enumerate("零一二三四五六七八九")} | {"〇": 0, "两": 2}
_CHINESE_TENS = {"十": 10, "百": 100, "千": 1000}
_CHINESE_NUMBER = re.compile(r"[零〇一二两三四五六七八九十百千万亿]+")
_PATTERNS = {
    name: re.compile(pattern)
    for name, pattern in {
        "decimal": rf"(?P<a>{_SIGNED})",
        "scientific": rf"(?P<a>{_SIGNED})[eE](?P<exp>[-+]?\d{{1,4}})",
        "power of ten": rf"(?:(?P<a>{_SIGNED}) ?(?:\\times|\\cdot|\*|x|X) ?|(?P<sign>[-+]?))10\^\{{(?P<exp>[-+]?\d{{1,4}})\}}",
        "fraction": rf"(?P<sign>[-+]?) ?\\frac\{{(?P<a>{_SIGNED})\}}\{{(?P<b>{_SIGNED})\}}",
        "slash": rf"(?P<a>{_SIGNED}) ?/ ?(?P<b>{_SIGNED})",
        "mixed": r"(?P<sign>[-+]?) ?(?P<whole>\d+)(?:\\frac\{(?P<a>\d+)\}\{(?P<b>\d+)\}| (?P<c>\d+)/(?P<d>\d+))",
        "product": rf"(?P<a>{_SIGNED}) ?(?:\\times|\\cdot|\*) ?(?P<b>{_SIGNED})",
        "repeating": r"(?P<sign>[-+]?)(?P<whole>\d*)\.(?P<once>\d*)\\(?:overline|dot|bar)\{(?P<again>\d+)\}",
        "hexadecimal": r"(?P<sign>[-+]?)0[xX](?P<hex>[0-9a-fA-F]+)",
        "scaled": rf"(?P<a>{_SIGNED}) ?(?P<scale>{'|'.join(sorted(_SCALES, key=len, reverse=True))})",
    }.items()
}

_HUGE = re.compile(rf"{_SIGNED}(?:[eE][-+]?\d+| ?(?:\\times|\\cdot|\*|x|X) ?10\^\{{[-+]?\d+\}})?|[-+]?10\^\{{[-+]?\d+\}}")


@dataclass(frozen=True, slots=True)
class Number:
    """An exact number.

    Attributes:
        value: the number.
        places: digits behind the point where it was written as a plain decimal, None where it was written exactly.
    """

    value: Fraction
    places: int | None = None


def _english(words: list[str]) -> int | None:
    """ "one hundred and twenty three" as 123; None if it is no number in words."""
    total = group = 0
    last = ""
    for word in words:
        if word in _UNITS and last not in _UNITS:
            group += _UNITS[word]
        elif word in _TENS and last not in _UNITS and last not in _TENS:
            group += _TENS[word]
        elif word == "hundred" and 0 < group < 100:
            group *= 100
        elif word in _THOUSANDS and group > 0 and (total == 0 or total % (_THOUSANDS[word] * 1000) == 0):
            total, group = total + group * _THOUSANDS[word], 0
        elif word != "and" or last not in ("hundred", *_THOUSANDS):
            return None
        last = word
    return total + group if words and last != "and" else None


def _chinese(text: str) -> int | None:
    """ "一百二十三" as 123; None if it is no number in figures of that writing."""
    if not _CHINESE_NUMBER.fullmatch(text):
        return None
    for mark, scale in (("亿", 10**8), ("万", 10**4)):
        if mark in text:
            above, _, below = text.partition(mark)
            first, second = _chinese(above or "一"), _chinese(below) if below else 0
            return None if first is None or second is None or second >= scale else first * scale + second
    if len(text) > 1 and not any(mark in text for mark in _CHINESE_TENS):
        return int("".join(str(_CHINESE_DIGITS[digit]) for digit in text))  # a year, digit by digit
    total = digit = 0
    for char in text:
        if char in _CHINESE_TENS:
            total, digit = total + (digit or 1) * _CHINESE_TENS[char], 0
        else:
            digit = _CHINESE_DIGITS[char]
    return total + digit


def _in_words(text: str) -> Fraction | None:
    """A number written out in English or Chinese, with its sign, as a fraction too ("two thirds", "三分之二"); None if it is none."""
    text = text.lower()
    for sign in ("negative ", "minus ", "负"):
        if text.startswith(sign):
            positive = _in_words(text.removeprefix(sign))
            return None if positive is None or positive < 0 else -positive
    if not text.isascii():
        below, joint, above = text.partition("分之")
        first, second = _chinese(above if joint else text), _chinese(below) if joint else 1
        return None if first is None or second is None else _quotient(Fraction(first), Fraction(second))
    words = text.replace("-", " ").split()
    if words[:1] == ["a"] and words[1:2] in (["hundred"], ["thousand"], ["million"]):
        words[0] = "one"
    if len(words) > 1 and (part := _PARTS.get(words[-1]) or _PARTS.get(words[-1].removesuffix("s"))):
        count = 1 if words[:-1] in (["a"], ["one"]) else _english(words[:-1])
        if count is not None and (count == 1) is not words[-1].endswith("s"):
            return Fraction(count, part)
        whole, joint, rest = text.replace("-", " ").partition(" and ")
        number, broken = _english(whole.split()), _in_words(rest) if joint else None
        return number + broken if number is not None and broken is not None and broken < 1 else None
    value = _english(words)
    return None if value is None else Fraction(value)


def _fraction(text: str) -> Fraction:
    return Fraction(text.replace(" ", ""))


def _quotient(above: Fraction, below: Fraction) -> Fraction | None:
    return above / below if below else None


def _repeating(whole: str, once: str, again: str) -> Fraction:
    """0.1(6) is (16 - 1) / 90."""
    every, first = int((whole + once + again) or "0"), int((whole + once) or "0")
    return Fraction(every - first, (10 ** len(again) - 1) * 10 ** len(once))


def _value(name: str, match: re.Match[str]) -> Fraction | None:
    """Value of `match`, which the pattern `name` made; None for a zero denominator or too large an exponent."""
    part = match.groupdict()
    sign = -1 if part.get("sign") == "-" else 1
    if name in ("scientific", "power of ten"):
        shift = int(part["exp"])
        return sign * _fraction(part["a"] or "1") * Fraction(10) ** shift if abs(shift) <= _MAX_EXPONENT else None
    if name == "mixed":
        broken = _quotient(_fraction(part["a"] or part["c"]), _fraction(part["b"] or part["d"]))
        return None if broken is None else sign * (int(part["whole"]) + broken)
    if name == "hexadecimal":  # algebra would read a product with the factor 0
        return Fraction(sign * int(part["hex"], 16))
    if name == "repeating":
        return sign * _repeating(part["whole"], part["once"], part["again"])
    first = _fraction(part["a"])
    if name == "scaled":
        return first * _SCALES[part["scale"]]
    if name == "product":
        return first * _fraction(part["b"])
    if name in ("fraction", "slash"):
        quotient = _quotient(first, _fraction(part["b"]))
        return None if quotient is None else sign * quotient
    return first


@lru_cache(maxsize=8192)
def parse_number(cleaned: str) -> Number | None:
    """The number that a cleaned answer without unit is; None if it is not one of the plain spellings.

    Plain spellings: integers, decimals, fractions, mixed numbers, scientific notation, a product of two numbers, repeating
    decimals, hexadecimal with 0x, "2.5 million", numbers in English or Chinese words.
    """
    if len(cleaned) > _MAX_DIGITS:
        return None
    if (value := _in_words(cleaned)) is not None:
        return Number(value)
    if not cleaned.isascii() and not cleaned.endswith(tuple(_SCALES)):
        return None  # other digits than 0-9 are not read
    for name, pattern in _PATTERNS.items():
        match = pattern.fullmatch(cleaned)
        if match:
            value = _value(name, match)
            if value is None:
                return None
            places = len(cleaned.partition(".")[2]) if name == "decimal" else None
            return Number(value, places)
    return None


def is_huge(cleaned: str) -> bool:
    """Whether a cleaned answer is a plain number that is never expanded: more digits or a larger exponent than read here."""
    return parse_number(cleaned) is None and _HUGE.fullmatch(cleaned) is not None


def _is_rounding_of(exact: Fraction, decimal: Number, places: int) -> bool:
    """Whether `decimal`, written with at least `places` digits behind the point, is `exact` rounded or cut off at its last place."""
    if decimal.places is None or decimal.places < places or decimal.value == 0:
        return False
    return is_rounding(exact, decimal) or decimal.value == Fraction(int(exact * 10**decimal.places), 10**decimal.places)


def is_rounding(exact: Fraction, decimal: Number) -> bool:
    """Whether `decimal` is `exact` rounded to the places that it is written with, a half up or down."""
    unit = Fraction(1, 10 ** (decimal.places or 0))
    return abs(exact - decimal.value) * 2 <= unit


def _needs_rounding(exact: Number) -> bool:
    """Whether no decimal can write an exact number."""
    rest = exact.value.denominator
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    return exact.places is None and rest > 1


def numbers_equal(gold: Number, answer: Number, rounded_golds: bool = True) -> bool:
    """Exact equality, and two roundings [zppo].

    A fraction that no decimal can write equals its decimals of six and more places, rounded or cut off. With `rounded_golds` a gold that
    is a decimal equals any fraction that rounds to it: 0.33 is 1/3; never another decimal, and never an integer.
    """
    if gold.value == answer.value:
        return True
    if rounded_golds and gold.places and answer.places is None and is_rounding(answer.value, gold):
        return answer.value.denominator > 1 and gold.value != 0
    if _needs_rounding(gold):
        return _is_rounding_of(gold.value, answer, ROUNDED_PLACES)
    return _needs_rounding(answer) and _is_rounding_of(answer.value, gold, ROUNDED_PLACES)


def percent_equal(percent: Number, other: Number, gold_first: bool, rounded_golds: bool = True) -> bool:
    """Whether `percent` % is `other`, read as the same figure or as the number that it means: 50% is 50 and 0.5."""
    whole_gold = gold_first and not percent.places  # a gold of 33% is no rounding
    meant = Number(percent.value / 100, None if percent.places is None or whole_gold else percent.places + 2)
    return any(
        numbers_equal(*((figure, other) if gold_first else (other, figure)), rounded_golds=rounded_golds) for figure in (percent, meant)
    )


@dataclass(frozen=True, slots=True)
class Figures:
    """Figures in some base: 52_8."""

    digits: str
    base: int


_BASED = re.compile(
    r"\(?(?P<sign>-?)(?P<digits>[0-9A-Za-z]+)\)?(?:_\{?\(?(?:base ?)?(?P<below>\d{1,2}|[a-z]+)\)?\}?"
    r"| ?[,(]? ?(?:in )?base[ -](?P<base>\d{1,2}|[a-z]+)\)?)"
)


@lru_cache(maxsize=8192)
def parse_figures(cleaned: str) -> Figures | None:
    """Figures with the base that they are in, beside or below them: `1101_2`, `(1101)_{two}`, "1101 base 2"; None if it is none."""
    match = (
        _BASED.fullmatch(cleaned.replace(" base", "base").replace("base", " base").replace("{ base", "{base"))
        if len(cleaned) <= _MAX_DIGITS
        else None
    )
    if match is None:
        return None
    written = match["below"] or match["base"]
    base = int(written) if written.isdigit() else _english([written])
    digits = match["digits"].upper()
    if (
        base is None
        or not 2 <= base <= 36
        or not (digits[0].isdigit() or (base > 10 and len(digits) > 1 and any(d.isdigit() for d in digits)))
    ):
        return None
    return Figures(match["sign"] + (digits.lstrip("0") or "0"), base)


def figures_equal(gold: str, answer: str) -> bool | None:
    """Whether two answers one of which names its base have the same digits in the same base, ten where none is named; None if none does."""
    first, second = parse_figures(gold), parse_figures(answer)
    if first is None and second is None:
        return None
    plain = [re.sub(r"^(-?)0+(?=\d)", r"\1", text) for text in (gold, answer)]
    return (first or Figures(plain[0], 10)) == (second or Figures(plain[1], 10))
