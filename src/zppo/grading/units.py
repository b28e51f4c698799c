"""Units and currencies: taking them off an answer, telling whether two are the same, and converting one into the other [zppo].

A unit is cut off only where it cannot be a variable: words ("5 meters", "2x \\text{ cm}") behind all, abbreviations ("5 cm") behind one
number, a single letter ("20 m") behind plain figures. The tables below say what a unit is and how it is spelled, pint what it is worth.
"""

from __future__ import annotations

import re
from fractions import Fraction
from functools import lru_cache
from types import MappingProxyType
from typing import Any

Unit = tuple[tuple[str, int], ...]
"""A product of powers of named units, sorted: m/s^2 is (("meter", 1), ("second", -2))."""

# Abbreviations are case-sensitive: MeV is not meV. SI units with all the prefixes that people use on them...
_SI = {
    "m": "meter", "g": "gram", "s": "second", "A": "ampere", "K": "kelvin", "mol": "mole", "Hz": "hertz", "N": "newton", "Pa": "pascal",
    "J": "joule", "W": "watt", "Wh": "watt_hour", "V": "volt", "C": "coulomb", "F": "farad", "Ω": "ohm", "T": "tesla", "Wb": "weber",
    "H": "henry", "eV": "electron_volt", "L": "liter", "l": "liter", "cal": "calorie", "B": "byte", "bar": "bar",
}  # fmt: skip
_SHORT_PREFIXES = {"n": "nano", "μ": "micro", "u": "micro", "m": "milli", "k": "kilo", "M": "mega", "G": "giga", "T": "tera"}
_SMALL_PREFIXES = {"c": "centi", "d": "deci", "p": "pico", "f": "femto"}  # on meters, liters, grams, seconds, farads alone
# ...and what takes no prefix, or has spellings of its own.
_ABBREVIATIONS = {
    "kilogram": "Kg KG kgs", "kilometer": "Km KM kms", "centimeter": "cms", "second": "sec secs sec.", "minute": "min mins min.",
    "hour": "h hr hrs hr.", "inch": "in in.", "foot": "ft ft.", "yard": "yd yds", "mile": "mi", "tonne": "t", "pound": "lb lbs lb.",
    "ounce": "oz oz.", "gallon": "gal", "kilobyte": "KB", "atmosphere": "atm", "mmHg": "mmHg", "psi": "psi", "radian": "rad rads",
    "degree": "° deg degs", "degC": "°C", "degF": "°F", "rpm": "rpm", "decibel": "dB", "percent": "% pct", "hectare": "ha",
    "light_year": "ly", "angstrom": "Å", "hectopascal": "hPa", "usd": "$ USD US$", "eur": "€ EUR", "gbp": "£ GBP", "cny": "¥ CNY RMB",
    "inr": "₹ INR Rs Rs.", "cent": "¢", "jpy": "JPY",
}  # fmt: skip
_COMPOUND = {
    "kmh": "km/h", "kph": "km/h", "kmph": "km/h", "mph": "mi/h", "fps": "ft/s", "cc": "cm^3", "sqcm": "cm^2", "sqm": "m^2", "sqft": "ft^2",
}  # fmt: skip
# Words are not case-sensitive; plurals in -s are added.
_SI_WORDS = (
    "meter metre gram gramme second ampere amp kelvin mole hertz newton pascal joule watt volt coulomb farad ohm tesla weber henry liter "
    "litre calorie byte"
).split()
_WORD_PREFIXES = "nano micro milli centi deci hecto kilo mega giga tera".split()
_WORDS = {
    "electron_volt": "electronvolt", "kilogram": "kilo", "micrometer": "micron", "inch": "inches", "foot": "feet", "minute": "minute",
    "hour": "hour", "day": "day", "week": "week", "month": "month", "year": "year yr", "century": "century centuries", "yard": "yard",
    "mile": "mile", "knot": "knot", "tonne": "ton tonne", "pound": "pound", "ounce": "ounce", "gallon": "gallon", "pint": "pint",
    "quart": "quart", "cup": "cup", "acre": "acre", "hectare": "hectare", "bit": "bit", "atmosphere": "atmosphere", "bar": "bar",
    "radian": "radian", "degree": "degree", "revolution": "revolution", "light_year": "lightyear", "horsepower": "horsepower",
    "degC": "celsius centigrade", "degF": "fahrenheit", "percent": "percent percentage", "usd": "dollar", "eur": "euro", "inr": "rupee",
    "cny": "yuan renminbi", "jpy": "yen", "cent": "cent", "unit": "unit", "point": "point", "way": "way",
}  # fmt: skip
_CHINESE = {
    "毫米": "millimeter", "厘米": "centimeter", "分米": "decimeter", "米": "meter", "千米": "kilometer", "公里": "kilometer",
    "克": "gram", "千克": "kilogram", "公斤": "kilogram", "吨": "tonne", "毫升": "milliliter", "升": "liter", "秒": "second",
    "分钟": "minute", "分": "minute", "小时": "hour", "时": "hour", "天": "day", "日": "day", "周": "week", "月": "month",
    "个月": "month", "年": "year", "岁": "year", "度": "degree", "摄氏度": "degC", "元": "cny", "块": "cny", "角": "jiao", "美元": "usd",
    "欧元": "eur", "个": "piece", "只": "piece", "件": "piece", "人": "person", "名": "person", "本": "piece", "条": "piece",
    "棵": "piece", "辆": "piece", "张": "piece", "种": "kind", "次": "times", "倍": "fold", "页": "page", "台": "piece",
    "公顷": "hectare", "牛": "newton", "牛顿": "newton", "焦": "joule", "焦耳": "joule", "瓦": "watt", "千瓦": "kilowatt",
    "千瓦时": "kilowatt_hour", "伏": "volt", "安": "ampere", "欧": "ohm", "帕": "pascal", "单位": "unit",
}  # fmt: skip
# Worth of what pint does not know; one name stands for the dimension.
_OWN = {
    "usd": ("usd", Fraction(1)), "cent": ("usd", Fraction(1, 100)), "cny": ("cny", Fraction(1)), "jiao": ("cny", Fraction(1, 10)),
    "degree": ("degree", Fraction(1)), "revolution": ("degree", Fraction(360)),
}  # fmt: skip
_NOT_CONVERTED = frozenset(
    "radian degC degF decibel percent eur gbp inr jpy piece person kind times fold page unit point way rpm".split()
)  # and nouns


def _short_names() -> dict[str, str]:
    names = dict(_SI)
    for prefix, name in _SHORT_PREFIXES.items():
        names |= {prefix + short: name + full for short, full in _SI.items()}
    for prefix, name in _SMALL_PREFIXES.items():
        names |= {prefix + short: name + _SI[short] for short in "mLlgsF"}
    names |= {spelling: name for name, row in _ABBREVIATIONS.items() for spelling in row.split()}
    return names | _CHINESE


def _long_names() -> dict[str, str]:
    same = {"metre": "meter", "gramme": "gram", "litre": "liter", "amp": "ampere"}
    names = {prefix + word: prefix + same.get(word, word) for word in _SI_WORDS for prefix in ("", *_WORD_PREFIXES)}
    names |= {word: name for name, row in _WORDS.items() for word in row.split()}
    return {word + ending: name for word, name in names.items() for ending in ("", "s", "es")}


_SHORT = MappingProxyType(_short_names())
_LONG = MappingProxyType(_long_names())
_LONGEST_UNIT = 60
_PHRASES = tuple(
    (re.compile(pattern, re.IGNORECASE), new)
    for pattern, new in (
        (r"degrees? (?=celsius|centigrade|fahrenheit)", ""),
        (r"years? old\b", "year"),
        (r"light[- ]year", "lightyear"),
        (r"electron[- ]volt", "electronvolt"),
        (r"\b(?:square|sq\.?) ([a-z]+\.?)|\b([a-z]+) squared\b", r"\1\2^2"),
        (r"\b(?:cubic|cu\.?) ([a-z]+\.?)|\b([a-z]+) cubed\b", r"\1\2^3"),
        (r" ?\bper ", "/"),
        (r" ?\\(?:cdot|times|per(?= ?\\)) ?| ?· ?|⋅|-(?=[a-z])", "*"),
        (r"\\mu ?", "μ"),
        (r"° (?=[CF]$)", "°"),
        (r"\\Omega", "Ω"),
        (r"\b([kM]) (?=Ω)", r"\1"),
        (r"\^\{([-+]?\d)\}", r"^\1"),
        (r"平方(\w+)", r"\1^2"),
        (r"立方(\w+)", r"\1^3"),
        (r"[{}]", ""),
        (r" ?([*/^]) ?", r"\1"),
    )
)
_FACTOR = re.compile(r"(?P<base>[^\^*/\s\d()]+)(?:\^(?P<power>[-+]?\d)|(?P<digit>[23]))?")


def _product(text: str) -> dict[str, int] | None:
    """Powers of the named units of "kg*m/s^2", quotients and brackets below the stroke included; None if a part is no unit."""
    if "/" in text:
        above, below = text.rsplit("/", 1)
        if below.startswith("(") and below.endswith(")"):
            below = below[1:-1]
        first, second = (_product(part) if part else {} for part in (above, below))
        if first is None or not second:
            return None
        return {name: first.get(name, 0) - second.get(name, 0) for name in first | second}
    powers: dict[str, int] = {}
    for part in re.split(r"[* ]", text):
        match = _FACTOR.fullmatch(part)
        if match is None:
            return None
        base = match["base"]
        inner = _COMPOUND.get(base)
        name = _SHORT.get(base) or _LONG.get(base.lower())
        factors = _product(inner) if inner else ({name: 1} if name else None)
        if factors is None:
            return None
        for factor, power in factors.items():
            powers[factor] = powers.get(factor, 0) + power * int(match["power"] or match["digit"] or 1)
    return powers


@lru_cache(maxsize=4096)
def canonical_unit(text: str) -> Unit | None:
    """The unit that a text is, in any of its spellings, products, quotients and powers included; None if it is no unit."""
    text = text.strip()
    if not text or len(text) > _LONGEST_UNIT:
        return None
    for pattern, new in _PHRASES:
        text = pattern.sub(new, text)
    powers = _product(text.strip())
    return tuple(sorted((name, power) for name, power in powers.items() if power)) or None if powers else None


def spelled_unit(text: str) -> str | None:
    """A unit in words that cannot be taken for variables: "m/s^2" is "meter/second^{2}"; None if `text` is no unit."""
    unit = canonical_unit(text)
    if unit is None or any(name in ("degree", "degC", "degF", "percent") or len(name) < 3 for name, _ in unit):
        return None
    parts = [
        "*".join(name.replace("_", "") + (f"^{{{abs(power)}}}" if abs(power) > 1 else "") for name, power in unit if (power > 0) is above)
        for above in (True, False)
    ]
    spelled = parts[0] + "".join("/" + part for part in parts[1].split("*") if part)
    return spelled if parts[0] and canonical_unit(spelled) == unit else None


@lru_cache(maxsize=1)
def _registry() -> Any:
    """Pint's definitions with exact factors; loaded where two different units are compared, which few answers need."""
    import pint

    return pint.UnitRegistry(non_int_type=Fraction)


@lru_cache(maxsize=4096)
def _worth(unit: Unit) -> tuple[tuple[tuple[str, int], ...], Fraction] | None:
    """(dimension, worth in base units) of a unit; None for what has none. Only names of the tables above reach pint."""
    dimension: dict[str, int] = {}
    worth = Fraction(1)
    for name, power in unit:
        if name in _OWN:
            base, factor = _OWN[name]
            dimension[base] = dimension.get(base, 0) + power
        elif name in _NOT_CONVERTED or name.startswith("a "):
            return None
        else:
            quantity = _registry().Quantity(Fraction(1), name).to_base_units()
            factor = quantity.magnitude
            for base, exponent in quantity.unit_items():
                dimension[str(base)] = dimension.get(str(base), 0) + power * int(exponent)
        worth *= Fraction(factor) ** power
    return tuple(sorted((base, power) for base, power in dimension.items() if power)), worth


def ratio(gold: Unit, answer: Unit) -> Fraction | None:
    """How many of `answer` one of `gold` is: 1000 for km and m; None where they are of two dimensions or not to be converted."""
    if gold == answer:
        return Fraction(1)
    first, second = _worth(gold), _worth(answer)
    return first[1] / second[1] if first and second and first[0] == second[0] else None


# Words that may follow a number without being what it counts: they question, extend, multiply or invert it.
_NO_NOUN = frozenset(
    "and or not no is are was be if but to than then wrong false incorrect right true correct maybe perhaps probably about at by in "
    "times always sometimes less more plus minus others else tens hundreds thousands millions billions trillions dozens hundred "
    "thousand million billion trillion dozen mod squared cubed factorial choose remainder pi guess unknown sure impossible halves "
    "thirds quarters fifths tenths sixths eighths fourths sevenths ninths hundredths thousandths negatives positives opposites "
    "inverses reciprocals doubles triples squares cubes roots powers factorials multiples zeros zeroes ones twos threes fours fives "
    "sixes sevens eights nines pairs couples scores gross modulo exponents logs logarithms radicals variables".split()
)
_PREFIX = re.compile(r"^(?P<sign>[-+]?)(?P<unit>US ?\$|\$|€|£|¥|₹|Rs\.?|USD|EUR|GBP|CNY|RMB|INR) ?(?=[-+]?\.?\d|\\frac)")
_MATH = re.compile(r"\d|\\pi|\\sqrt|\\frac")
_TRIGONOMETRY = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)")
_SCALE_WORDS = re.compile(r" ?(?:hundred|thousand|million|billion|trillion|dozen)(?![a-z])")
_BARE_WORD = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z]{2,}|[\u4e00-\u9fff]")
_FIGURES = re.compile(r"[-+]? ?[\d.,]*\d\.?(?:[eE][-+]?\d+| ?(?:\\times|\\cdot|\*|x) ?10\^\{[-+]?\d+\})?|[-+]?10\^\{[-+]?\d+\}")
_CONSTANTS = re.compile(r"\\(?:frac|sqrt|pi|cdot|times|pm)(?![a-zA-Z])|(?<=\d)[eE](?=[-+]?\d)|(?<=\d)x(?=10\^)|(?<=\d) x (?=10\^)")
_INNER = re.compile(r"\{[^{}]*\}|\([^()]*\)")
_TERMS = re.compile(r"(?<=.)[-+]")
_SIGNS = "°%$€£¥₹¢"
_LETTERS = re.compile(r"[^\W\d_]+")
_ATTACHED = frozenset("m g L l V W J Ω".split())  # single letters that are units right behind figures; t, h, s, N are variables as often
_NOUN = re.compile(r"(?=.*[aeiou])[a-z]{3,}|of|per")  # "xy" is a product


def _one_number(text: str) -> bool:
    """Whether a cleaned text is one number, or several with commas: figures, fractions, roots, powers of ten; no letter, no sum."""
    rest = _CONSTANTS.sub("", _SCALE_WORDS.sub("", text))
    if re.search(r"[^\W\d_]|[\\=<>:]", rest):
        return False
    for _ in range(6):
        rest, found = _INNER.subn("", rest)
        if not found:
            break
    return not re.search(r"[{}()]", rest) and not any(_TERMS.search(part.strip()) for part in rest.split(","))


def _counted_noun(text: str, trusted: bool) -> Unit | None:
    """The noun behind a number ("12 apples"): up to three words of a gold, one plural word of an answer."""
    words = text.lower().split()
    if not words or len(words) > 3 or any(not _NOUN.fullmatch(w) or w in _NO_NOUN for w in words):
        return None
    last = words[-1]
    plural = len(last) >= 4 and last.endswith("s") and not last.endswith(("ss", "us", "is"))
    if not trusted and not (len(words) == 1 and plural):
        return None
    return (("a " + " ".join([*words[:-1], last[:-1] if plural else last]), 1),)


def _starts(text: str) -> list[int]:
    """Where a unit may begin in `text`, longest first: behind a digit, a closing bracket or a space."""
    first = max(1, len(text) - _LONGEST_UNIT)
    return [
        i for i in range(first, len(text)) if not text[i].isdigit() and text[i] not in " (){}[]^_,;" and text[i - 1] in "0123456789)}]° "
    ] + [i for i in range(first, len(text)) if text[i] in "°%" and text[i - 1] not in "0123456789)}] "]


def _fits(rest: str, tail: str, attached: bool, loose: bool) -> bool:
    """Whether the unit `tail` may be cut off `rest`: the less its letters can be variables, the more may stand before it."""
    if rest.count("{") != rest.count("}") or rest.count("(") != rest.count(")"):
        return False
    runs = _LETTERS.findall(tail)
    if tail[0] in _SIGNS or all(len(run) > 2 or not run.isascii() for run in runs):
        return True
    if len(runs) == 1 and len(runs[0]) == 1 and not loose:
        return _FIGURES.fullmatch(rest) is not None and runs[0] != "t" and (not attached or runs[0] in _ATTACHED)
    return _one_number(rest)


@lru_cache(maxsize=8192)
def split_unit(text: str, trusted: bool = False, loose: bool = False) -> tuple[str, Unit | None]:
    """A cleaned answer as (the rest, unit or None).

    Args:
        text: what `zppo.grading.text.clean` returned.
        trusted: whether this is a gold: words behind its number are what it counts; an answer's could be anything.
        loose: whether single letters count as other abbreviations do: for a side whose other side has such a unit.
    """
    prefix = _PREFIX.match(text)
    if prefix:
        rest = prefix["sign"] + text[prefix.end() :]
        behind, unit = split_unit(rest, trusted)
        name = canonical_unit(prefix["unit"].replace(" ", ""))
        return (behind, name) if unit in (None, name) else (text, None)
    for start in _starts(text):
        rest, tail = text[:start].rstrip(), text[start:]
        if not _MATH.search(rest) or _BARE_WORD.search(_SCALE_WORDS.sub("", rest)):
            continue
        unit = canonical_unit(tail)
        if unit is None:
            unit = _counted_noun(tail, trusted) if _one_number(rest) else None
        elif not _fits(rest, tail, start == len(rest), loose) or (unit == (("degree", 1),) and _TRIGONOMETRY.search(rest)):
            continue  # a degree sign behind a sine belongs to the angle
        if unit is not None:
            return rest.removesuffix(r"\cdot").rstrip(), None if unit[0][0] == "unit" else unit
    return text, None
