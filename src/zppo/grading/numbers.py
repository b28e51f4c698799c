"""Plain numbers as exact fractions, in every spelling that needs no algebra. Bounded: nothing large is ever expanded."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

_MAX_DIGITS = 300
_MAX_EXPONENT = 300
_ROUNDED_PLACES = 6  # a decimal with at least so many places may stand for a fraction that no decimal can write

_DECIMAL = r"(?:\d+(?:\.\d*)?|\.\d+)"
_SIGNED = rf"[-+]? ?{_DECIMAL}"
_SCALES = {
    "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12,
    "百": 100, "千": 10**3, "万": 10**4, "百万": 10**6, "千万": 10**7, "亿": 10**8,
}  # fmt: skip
_NUMBER_WORDS = {
    word: value
    for value, word in enumerate(
        "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen "
        "nineteen twenty".split()
    )
}
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
    decimals, hexadecimal with 0x, "2.5 million", the words zero to twenty.
    """
    if len(cleaned) > _MAX_DIGITS:
        return None
    if (word := _NUMBER_WORDS.get(cleaned.lower())) is not None:
        return Number(Fraction(word))
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


def _is_rounding_of(exact: Fraction, decimal: Number) -> bool:
    """Whether `decimal` is `exact`, which no decimal can write, rounded or cut off at its last place."""
    rest = exact.denominator
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    if decimal.places is None or decimal.places < _ROUNDED_PLACES or rest == 1:
        return False
    unit = Fraction(10) ** decimal.places
    cut = Fraction(int(abs(exact) * unit), 1) / unit * (1 if exact >= 0 else -1)
    return decimal.value in (cut, round(exact, decimal.places)) and decimal.value != 0


def numbers_equal(first: Number, second: Number) -> bool:
    """Exact equality; a fraction without a finite decimal also equals its decimals of six and more places [zppo]."""
    if first.value == second.value:
        return True
    return _is_rounding_of(first.value, second) or _is_rounding_of(second.value, first)


def percent_equal(percent: Number, other: Number) -> bool:
    """Whether `percent` % is `other`, read as the same figure or as the number that it means: 50% is 50 and 0.5."""
    return numbers_equal(percent, other) or numbers_equal(Number(percent.value / 100), other)
