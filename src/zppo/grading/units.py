"""Units and currencies: taking them off an answer and telling whether two are the same (method.md section 7) [zppo]."""

from __future__ import annotations

import re
from functools import lru_cache
from types import MappingProxyType

# Canonical name -> its spellings. Abbreviations are case-sensitive, words are not; plurals in -s are added to words.
_ABBREVIATIONS = {
    "mm": "mm", "cm": "cm", "dm": "dm", "m": "m", "km": "km", "nm": "nm", "um": "μm µm um", "in": "in in.", "ft": "ft ft.", "yd": "yd",
    "mi": "mi", "mg": "mg", "g": "g gm", "kg": "kg", "t": "t", "lb": "lb lbs lb.", "oz": "oz oz.", "ml": "mL ml", "l": "L l",
    "s": "s sec secs", "ms": "ms", "min": "min mins min.", "h": "h hr hrs", "n": "N", "kn": "kN",
    "j": "J", "kj": "kJ", "w": "W", "kw": "kW", "kwh": "kWh",
    "v": "V", "mv": "mV", "amp": "A", "ma": "mA", "ohm": "Ω", "kohm": "kΩ", "k": "K", "pa": "Pa", "kpa": "kPa", "mpa": "MPa", "atm": "atm",
    "hz": "Hz", "khz": "kHz", "mhz": "MHz", "ghz": "GHz", "mol": "mol", "mmol": "mmol", "ev": "eV", "rad": "rad", "deg": "° deg",
    "cal": "cal", "degc": "°C", "degf": "°F", "kcal": "kcal", "rpm": "rpm", "db": "dB", "km/h": "kmh kph kmph", "mi/h": "mph", "tesla": "T",
    "coulomb": "C", "farad": "F", "kb": "KB kB", "mb": "MB", "gb": "GB", "tb": "TB", "%": "% pct", "cm^2": "sqcm", "m^2": "sqm",
    "usd": "$ USD US$", "eur": "€ EUR", "gbp": "£ GBP", "cny": "¥ CNY RMB", "inr": "₹ INR Rs Rs.", "cent": "¢", "jpy": "JPY",
}  # fmt: skip
_WORDS = {
    "mm": "millimeter millimetre", "cm": "centimeter centimetre", "dm": "decimeter decimetre", "m": "meter metre",
    "km": "kilometer kilometre", "nm": "nanometer nanometre", "um": "micrometer micron", "in": "inch inches",
    "ft": "foot feet", "yd": "yard", "mi": "mile",
    "mg": "milligram", "g": "gram gramme", "kg": "kilogram kilo", "t": "ton tonne", "lb": "pound", "oz": "ounce", "l": "liter litre",
    "ml": "milliliter millilitre", "s": "second", "ms": "millisecond", "min": "minute", "h": "hour", "day": "day", "week": "week",
    "month": "month", "year": "year yr", "n": "newton", "j": "joule", "w": "watt", "kw": "kilowatt", "v": "volt", "amp": "ampere amp",
    "ohm": "ohm", "k": "kelvin", "pa": "pascal", "hz": "hertz", "mol": "mole", "rad": "radian", "deg": "degree", "gal": "gallon",
    "pint": "pint", "quart": "quart", "cup": "cup", "acre": "acre", "ha": "hectare ha", "bit": "bit", "byte": "byte", "unit": "unit",
    "degc": "celsius centigrade", "degf": "fahrenheit", "%": "percent percentage", "usd": "dollar", "eur": "euro", "inr": "rupee",
    "cny": "yuan renminbi", "jpy": "yen", "cent": "cent", "point": "point", "mi/h": "milesperhour", "way": "way",
}  # fmt: skip
_CHINESE = {
    "毫米": "mm", "厘米": "cm", "分米": "dm", "米": "m", "千米": "km", "公里": "km", "克": "g", "千克": "kg", "公斤": "kg", "吨": "t",
    "毫升": "ml", "升": "l", "秒": "s", "分钟": "min", "分": "min", "小时": "h", "时": "h", "天": "day", "日": "day", "周": "week",
    "月": "month", "个月": "month", "年": "year", "岁": "year", "度": "deg", "摄氏度": "degc", "元": "cny", "块": "cny", "角": "jiao",
    "美元": "usd", "欧元": "eur", "个": "piece", "只": "piece", "件": "piece", "人": "person", "名": "person", "本": "piece",
    "条": "piece", "棵": "piece", "辆": "piece", "张": "piece", "种": "kind", "次": "times", "倍": "fold", "页": "page", "台": "piece",
    "平方毫米": "mm^2", "平方厘米": "cm^2", "平方分米": "dm^2", "平方米": "m^2", "平方千米": "km^2", "平方公里": "km^2", "公顷": "ha",
    "立方厘米": "cm^3", "立方分米": "dm^3", "立方米": "m^3", "千米/时": "km/h", "米/秒": "m/s", "千米/小时": "km/h", "牛": "n", "焦": "j",
    "瓦": "w", "伏": "v", "安": "amp", "欧": "ohm", "千瓦时": "kwh", "牛顿": "n", "焦耳": "j", "帕": "pa", "千瓦": "kw", "单位": "unit",
}  # fmt: skip


_SHORT = MappingProxyType({spelling: name for name, row in _ABBREVIATIONS.items() for spelling in row.split()} | _CHINESE)
_LONG = MappingProxyType({word + ending: name for name, row in _WORDS.items() for word in row.split() for ending in ("", "s")})
# Words that may follow a number without being what it counts: they question, extend or multiply it.
_NO_NOUN = frozenset(
    "and or not no is are was be if but to than then wrong false incorrect right true correct maybe perhaps probably about at by in "
    "times always sometimes less more plus minus others else tens hundreds thousands millions billions trillions dozens hundred thousand "
    "million billion trillion dozen mod squared cubed factorial choose remainder pi guess unknown sure impossible halves thirds quarters "
    "fifths tenths sixths eighths fourths sevenths ninths hundredths thousandths".split()
)
_PREFIX = re.compile(r"^(?P<sign>[-+]?)(?P<unit>US ?\$|\$|€|£|¥|₹|Rs\.?|USD|EUR|GBP|CNY|RMB|INR) ?(?=[-+]?\.?\d|\\frac)")
_POWERED = re.compile(r"^(?P<base>.+?)(?:\^\{?(?P<power>-?\d)\}?|(?<=[a-z])(?P<digit>[23]))$")
_MATH = re.compile(r"\d|\\pi|\\sqrt|\\frac")
_TRIGONOMETRY = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)")
_BARE_WORD = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z]{2,}|[\u4e00-\u9fff]")
_ATTACHED_LETTERS = frozenset("m g h L".split())  # single letters that count as units right behind a number; x, a, n do not
_NOUN = re.compile(r"(?=.*[aeiou])[a-z]{3,}|of|per")  # "xy" is a product
_LONGEST_UNIT = 40


@lru_cache(maxsize=4096)
def canonical_unit(text: str) -> str | None:
    """Canonical name of a unit in any of its spellings, products, quotients and powers included; None if it is no unit."""
    text = text.strip().replace(r"\cdot", "*").replace(r"\mu", "μ").replace("·", "*").strip("{} ")
    if not text or len(text) > _LONGEST_UNIT:
        return None
    if simple := _SHORT.get(text) or _LONG.get(text.lower()):
        return simple
    for separator, joint in ((" per ", "/"), ("/", "/"), ("*", "*")):
        if separator in text:
            left, right = (canonical_unit(part) for part in text.rsplit(separator, 1))
            return None if left is None or right is None else f"{left}{joint}{right}"
    lower = text.lower()
    for word, power in (("square ", 2), ("sq. ", 2), ("sq ", 2), ("cubic ", 3), ("cu ", 3)):
        if lower.startswith(word):
            base = canonical_unit(text[len(word) :])
            return None if base is None else f"{base}^{power}"
    for word, power in ((" squared", 2), (" cubed", 3)):
        if lower.endswith(word):
            base = canonical_unit(text[: -len(word)])
            return None if base is None else f"{base}^{power}"
    if (match := _POWERED.match(text)) and (base := _SHORT.get(match["base"].strip()) or _LONG.get(match["base"].strip().lower())):
        return f"{base}^{match['power'] or match['digit']}"
    return {
        "degrees celsius": "degc",
        "degree celsius": "degc",
        "degrees fahrenheit": "degf",
        "years old": "year",
        "year old": "year",
        "degree fahrenheit": "degf",
    }.get(lower)


def _counted_noun(text: str, trusted: bool) -> str | None:
    """The noun behind a number ("12 apples"): up to three words of a gold, one plural word of an answer."""
    words = text.lower().split()
    if not words or len(words) > 3 or any(not _NOUN.fullmatch(w) or w in _NO_NOUN for w in words):
        return None
    last = words[-1]
    plural = len(last) >= 4 and last.endswith("s") and not last.endswith(("ss", "us", "is"))
    if not trusted and not (len(words) == 1 and plural):
        return None
    return " ".join([*words[:-1], last[:-1] if plural else last])


def _starts(text: str) -> list[int]:
    """Where a unit may begin in `text`, longest first: behind a digit, a closing bracket or a space."""
    first = max(1, len(text) - _LONGEST_UNIT)
    return [
        i for i in range(first, len(text)) if not text[i].isdigit() and text[i] not in " (){}[]" and text[i - 1] in "0123456789)}]° "
    ] + [i for i in range(first, len(text)) if text[i] in "°%" and text[i - 1] not in "0123456789)}] "]


@lru_cache(maxsize=8192)
def split_unit(text: str, trusted: bool = False) -> tuple[str, str | None]:
    """A cleaned answer as (the rest, canonical unit or None).

    Args:
        text: what `zppo.grading.text.clean` returned.
        trusted: whether this is a gold: words behind its number are what it counts; an answer's could be anything.
    """
    prefix = _PREFIX.match(text)
    if prefix:
        rest = prefix["sign"] + text[prefix.end() :]
        behind, unit = split_unit(rest, trusted)
        name = canonical_unit(prefix["unit"].replace(" ", ""))
        return (behind, name) if unit in (None, name) else (text, None)
    for start in _starts(text):
        rest, tail = text[:start].rstrip(), text[start:]
        if not _MATH.search(rest) or _BARE_WORD.search(rest.replace("million", "").replace("billion", "").replace("thousand", "")):
            continue
        attached = start == len(rest)
        if attached and len(tail) == 1 and tail.isalpha() and tail.isascii() and tail not in _ATTACHED_LETTERS:
            continue
        unit = canonical_unit(tail) or _counted_noun(tail, trusted)
        if unit == "deg" and _TRIGONOMETRY.search(rest):
            continue  # the sign belongs to the angle
        if unit is not None:
            return rest.removesuffix(r"\cdot").rstrip(), unit
    return text, None
