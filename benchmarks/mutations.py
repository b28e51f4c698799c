"""Right answers with one thing changed, each certainly another value: what no grader may accept.

Four changes: a digit, a sign, a variable, a part that is left out (a term, an item, a factor, the exponent of a unit). A change is kept
only where the small reader below, which shares nothing with the graders, reads both texts and finds them apart: expressions are evaluated
with 1,200 digits at three points (a difference of 10^-600 is seen, 1^5 against 1^7 is not kept), items of tuples are compared one by one,
those of sets as sets, equations up to a factor. What it cannot read (labels, sentences, repeating decimals) is not changed. What may mean
the same is never changed: an index, the name of the one unknown, a unit as a whole, and all of a family of solutions (`k\\pi`).
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import mpmath

DIGITS, APART, POINTS = 1200, mpmath.mpf(10) ** -1150, 3
LETTERS = "xyzabnmptqr"
UNIT = "|".join(
    (
        *(r"\\Omega", "ohms", "hours?", "minutes?", "days?", "kilometers", "meters", "inches", "dollars", "people", "students", "marbles"),
        *"apples ways units km cm mm nm kg mg g min mi m s h ft in kHz MHz GHz Hz kPa MPa Pa kJ MJ kWh J".split(),
        *"mW MW kW W MV kV V mA A N MeV eV mL L".split(),
    )
)
UNITS = re.compile(
    r"(?P<number>[^a-zA-Z]*?(?:\\times\s*10\^\{?-?\d+\}?|\d))(?:\\?[ ,~]|\\(?:text|mathrm)\{\s*)+"
    rf"(?P<unit>(?:{UNIT})(?:[\s{{}}/^\-\d]|\\[,;]|\\cdot|\\text|\\mathrm|{UNIT})*)"
)
THOUSANDS = re.compile(r"\d(?:,\\!|\{,\}|\\[, ]|,| ) ?\d{3}(?!\d)")
NAME = (
    r"[A-Za-z](?:_\w|_\{[^{}]*\})?(?:\^\{-1\})?(?:\([a-z]\))?|\|[A-Z]+\||[A-Z]+|\\(?:angle|triangle) ?[A-Z]+"
    r"|\\theta|\\(?:cos|sin|tan) ?[A-Z]|P\(A\)|\([a-z](?:, ?[a-z])+\)"
)
LEFT = re.compile(rf"(?:^|(?<=,))\s*(?:{NAME})\s*=")
LABEL = re.compile(r"(?:\\text\{)?(?:\(?(?:[A-Ea-e]|\d|i+)\)|[A-E][.:])(?!$)")
SCIENTIFIC = re.compile(r"\d[eE][+-]?\d")
MONTH = r"jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec"
CLOCK = re.compile(rf"(?i)[^\\]*\d{{1,2}}:\d\d\b.*m\.?\}}?|(?:\\text\{{)?(?:{MONTH})[a-z.]* \d[\d, ]*\}}?")
TAIL = re.compile(r"(?:,?\s*\\q?quad|,)?\s*(?:\\text\{\s*,?)?\s*(?:for all|for every|where|for \$?x|[a-z]\s*\\in|\([a-z] \\g).*$")
FAMILY = re.compile(r"\\pi.*(?<![a-z\\])[kn](?![a-z])|(?<![a-z\\])[kn](?![a-z]).*\\pi|integer|\\mathbb\{?[NZ]")
HIDDEN = re.compile(
    r"\\begin\{\w+\}(?:\{[lrc]+\})?|\\end\{\w+\}|\\(?:text|mathrm|mathbb|operatorname)\{[^{}]*\}|\\[a-zA-Z]+|_\{[^{}]*\}|_\w"
)
TOKEN = re.compile(r"\d+(?:\.\d+)?|\.\d+|\\[a-zA-Z]+|\\.|[A-Za-z](?:_\{[^{}]*\}|_\w)?|\S")
NAMED = {"\\pi": lambda: mpmath.pi, "\\infty": lambda: mpmath.inf, "e": lambda: mpmath.e, "i": lambda: mpmath.mpc(0, 1)}
FUNCTIONS: dict[str, Callable[[Any], Any]] = {
    name: getattr(mpmath, name.lstrip("\\"), None) or mpmath.log for name in r"\sin \cos \tan \sec \cot \exp \ln \log".split()
}
GREEK = "alpha beta gamma theta omega lambda phi mu rho sigma".split()


class UnreadableError(Exception):
    """The small reader does not know this form."""


class Expression:
    """Evaluates a formula while it reads it, with a number for each variable."""

    def __init__(self, text: str, point: int) -> None:
        self.tokens: list[str] = TOKEN.findall(text)
        self.at, self.point, self.bars = 0, point, 0

    def value(self) -> Any:
        """Of all of the text.

        Raises:
            UnreadableError: something is left, or unknown.
        """
        found = self.sum()
        if self.at < len(self.tokens):
            raise UnreadableError
        return found

    def peek(self, ahead: int = 0) -> str:
        """The next token, empty at the end."""
        return self.tokens[self.at + ahead] if self.at + ahead < len(self.tokens) else ""

    def take(self, wanted: str = "") -> str:
        """The next token, which must be `wanted`."""
        token = self.peek()
        if not token or (wanted and token != wanted):
            raise UnreadableError
        self.at += 1
        return token

    def sum(self) -> Any:
        """Terms with signs."""
        sign = -1 if self.peek() == "-" else 1
        if self.peek() in ("+", "-"):
            self.take()
        total = sign * self.product()
        while self.peek() in ("+", "-"):
            sign = 1 if self.take() == "+" else -1
            total += sign * self.product()
        return total

    def starts(self) -> bool:
        """Whether a factor may begin here."""
        token = self.peek()
        if token == "|":
            return not self.bars
        known = token in NAMED or token in FUNCTIONS or token[1:] in GREEK or token in (r"\frac", r"\sqrt", r"\binom")
        return bool(token) and (known or token[0].isalnum() or token in "({" or token[0] == ".")

    def product(self) -> Any:
        """Factors side by side, divisions from left to right."""
        total = self.power()
        while True:
            if self.peek() in ("*", r"\cdot", r"\times"):
                self.take()
                total *= self.power()
            elif self.peek() in ("/", r"\div"):
                self.take()
                total /= self.power()
            elif self.starts():
                if self.peek()[0].isdigit():
                    raise UnreadableError  # two numbers side by side
                total *= self.power()
            else:
                return total

    def power(self) -> Any:
        """A factor with its exponent, factorials, degree and percent signs."""
        base = self.primary()
        while self.peek() in ("^", "!", r"\%", "%"):
            token = self.take()
            if token == "!":
                if base != mpmath.nint(base) or not 0 <= base <= 5000:
                    raise UnreadableError
                base = mpmath.factorial(base)
            elif token == "^" and self.peek() == r"\circ":
                self.take()
                base = base * mpmath.pi / 180
            elif token == "^":
                exponent = self.argument()
                if abs(exponent) > 10**6:
                    raise UnreadableError
                base = mpmath.power(base, exponent)
            else:
                base /= 100
        return base

    def argument(self) -> Any:
        """A group in braces, or one token, of which a number gives its first digit alone."""
        token = self.peek()
        if token == "{":
            return self.group("}")
        if token.isdigit() and len(token) > 1:
            self.tokens[self.at : self.at + 1] = [token[0], token[1:]]
        return self.primary()

    def group(self, closing: str) -> Any:
        """What stands between two brackets."""
        self.take()
        bars, self.bars = self.bars, 0
        found = self.sum()
        self.bars = bars
        self.take(closing)
        return found

    def primary(self) -> Any:
        """A number, a name, a group, a command with its arguments."""
        token = self.peek()
        if token in ("(", "{"):
            return self.group({"(": ")", "{": "}"}[token])
        if token == "|" and not self.bars:
            self.take()
            self.bars = 1
            found = abs(self.sum())
            self.bars = 0
            self.take("|")
            return found
        self.take()
        if re.fullmatch(r"\d*\.?\d+", token):
            return self.number(token)
        if token == r"\frac":
            above = self.argument()
            return above / self.argument()
        if token == r"\binom":
            above = self.argument()
            return mpmath.binomial(above, self.argument())
        if token == r"\sqrt":
            return self.root()
        if token in FUNCTIONS:
            return self.function(token)
        if token in NAMED:
            return +NAMED[token]()
        if (token[0].isascii() and token[0].isalpha()) or token[1:] in GREEK:
            return _coordinate(token, self.point)
        raise UnreadableError

    def number(self, token: str) -> Any:
        """A number; a fraction of whole numbers right behind a whole number is added."""
        found = mpmath.mpf(token)
        if token.isdigit() and self.peek() == r"\frac" and all(self.peek(n).strip("{}").isdigit() for n in (2,)):
            self.take()
            above = self.argument()
            return found + above / self.argument()
        return found

    def root(self) -> Any:
        """With or without its degree."""
        degree: Any = 2
        if self.peek() == "[":
            degree = self.group("]")
        return mpmath.power(self.argument(), 1 / mpmath.mpf(degree))

    def function(self, name: str) -> Any:
        """With an exponent or a base, and with an argument with or without brackets."""
        exponent, base = 1, None
        while self.peek() in ("^", "_"):
            if self.take() == "^":
                exponent = self.argument()
            else:
                base = self.argument()
        inner = self.group(")") if self.peek() == "(" else self.product()
        found = FUNCTIONS[name](inner)
        return (found if base is None else found / mpmath.log(base)) ** exponent


def _coordinate(name: str, point: int) -> Any:
    """A number between 1 and 3 for a variable, its own at every point."""
    digest = hashlib.sha256(f"{name.replace('{', '').replace('}', '')} {point}".encode()).digest()
    return 1 + mpmath.mpf(int.from_bytes(digest[:6], "big")) / 2**47


@dataclass(frozen=True)
class Form:
    """What a text is read as.

    Attributes:
        kind: "value" (parts are its numbers at the points), "equation" (the same, known up to a factor), "set", or anything else, whose
            parts are compared one by one; two of different kinds are apart.
        parts: forms or numbers.
    """

    kind: str
    parts: tuple[Any, ...]


def read(text: str) -> Form:
    """The form of a text.

    Raises:
        UnreadableError: it has none here.
    """
    if CLOCK.fullmatch(text):
        return Form(re.sub(r"\d+", "0", text), tuple(int(n) for n in re.findall(r"\d+", text)))
    if found := re.fullmatch(r"\(?([0-9A-F]+)\)?_\{?(\d+)\}?", text):
        return Form("base", (found[1], int(found[2])))
    if found := UNITS.fullmatch(text):
        return Form(
            "unit " + re.sub(r"\\cdot|\W|text|mathrm", "", found["unit"].replace("^", "P").replace("/", "D")), (read(found["number"]),)
        )
    if LABEL.match(text) or SCIENTIFIC.search(text):
        raise UnreadableError  # a letter and its text; 2e-8 is not 2 times e less 8
    text = re.sub(
        r"\\left(?![a-z])|\\right(?![a-z])|\\!|(?<!\\)\\[,;: ]|\\q?quad|~|\$|\\\$",
        " ",
        text.replace(r"\dfrac", r"\frac").replace(r"\tfrac", r"\frac").replace(r"^{\circ}", r"^\circ"),
    )
    text = re.sub(r"(?<=\d)(?:\{,\}|, ?| )\s*(?=\d{3}(?!\d))(?<![,{] )", "", text) if re.search(r"\d(?:\{,\}|,|  ?)\d{3}", text) else text
    return _compound(text.strip())


def _compound(text: str) -> Form:
    """Lists, relations, matrices; else a formula."""
    if re.search(r"[A-Za-z]{3,}|\b(?:or|and|[Nn]o|is|to)\b", HIDDEN.sub("", text)) or re.search(r"[^\x00-\x7f]", text):
        raise UnreadableError  # words
    if found := re.fullmatch(r"\\begin\{(?:[pb]matrix|array)\}(?:\{\w+\})?(.*)\\end\{\w+\}", text.strip("()[] ")):
        rows = [row for row in re.split(r"\\\\", found[1]) if row.strip()]
        return Form("matrix", tuple(Form("row", tuple(_compound(cell.strip()) for cell in row.split("&"))) for row in rows))
    if len(parts := split(text, r"\cup")) > 1:
        return Form("set", tuple(_compound(part) for part in parts))
    if text.startswith(r"\{") and text.endswith(r"\}"):
        return Form("set", tuple(_compound(part) for part in split(text[2:-2], ",")))
    if len(parts := split(text, ",")) > 1:
        return Form("set", tuple(_compound(part) for part in parts))
    if enclosed(text) and len(parts := split(text[1:-1], ",")) > 1:
        return Form(text[0] + text[-1], tuple(_compound(part) for part in parts))
    if len(parts := split(text, ":")) > 1:
        return Form("equation", tuple(_value(part).parts[0] for part in parts))
    sides = re.split(r"(\\leq?(?![a-z])|\\geq?(?![a-z])|<|>|=)", text)
    if len(sides) == 3 and sides[1] == "=":
        return _equation(sides[0].strip(), sides[2].strip())
    if len(sides) > 1:
        values = [_value(side.strip()) for side in sides[::2]]
        if any(part == 0 for value in values for part in value.parts) or "=" in sides[1::2]:
            raise UnreadableError  # 2x > 0 is x > 0
        return Form("".join(sides[1::2]), tuple(values))
    if text.count(r"\pm") == 1:
        return Form("set", (_value(text.replace(r"\pm", "+")), _value(text.replace(r"\pm", "-"))))
    return _value(text)


def _equation(left: str, right: str) -> Form:
    """A name and what it is, or an equation, which is the same when it is multiplied by a number."""
    if re.fullmatch(NAME, left):
        return Form(f"name {left}", (_compound(right),))
    values = [a - b for a, b in zip(_value(left).parts, _value(right).parts, strict=True)]
    return Form("equation", tuple(values))


def _value(text: str) -> Form:
    """A formula at the points."""
    try:
        return Form("value", tuple(Expression(text, point).value() for point in range(POINTS)))
    except (ValueError, ZeroDivisionError, OverflowError, TypeError, RecursionError) as error:
        raise UnreadableError from error


def enclosed(text: str) -> bool:
    """Whether one pair of round or square brackets holds all of the text."""
    depth = 0
    for i, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if depth == 0:
            return 0 < i == len(text) - 1 and text[0] in "(["
    return False


def split(text: str, mark: str) -> list[str]:
    """At marks outside of all brackets."""
    parts, depth, start, i = [], 0, 0, 0
    while i < len(text):
        depth += (text[i] in "([{") - (text[i] in ")]}")
        if depth <= 0 and text.startswith(mark, i) and (not mark.isalpha()):
            parts.append(text[start:i].strip())
            start = i = i + len(mark)
            continue
        i += 1
    return [*parts, text[start:].strip()]


def same(a: Any, b: Any) -> bool:
    """Whether two forms, or two numbers, are one value."""
    if not isinstance(a, Form) or not isinstance(b, Form):
        if isinstance(a, str | int) or isinstance(b, str | int):
            return bool(a == b)
        if mpmath.isinf(a) or mpmath.isinf(b):
            return bool(a == b)
        return bool(a == b or abs(a - b) <= APART * max(abs(a), abs(b)))
    if a.kind == b.kind == "set":
        return all(any(same(x, y) for y in q) for p, q in ((a.parts, b.parts), (b.parts, a.parts)) for x in p)
    if a.kind != b.kind or len(a.parts) != len(b.parts):
        return False
    if a.kind == "equation":
        x, y = a.parts, b.parts
        return all(abs(x[0] * q - y[0] * p) <= APART * max(abs(x[0] * q), 1) for p, q in zip(x, y, strict=True))
    return all(same(x, y) for x, y in zip(a.parts, b.parts, strict=True))


def apart(gold: str, changed: str) -> bool:
    """Whether both can be read and are different values; a choice's letters count as they stand."""
    if CHOICE.fullmatch(gold):
        return sorted(re.findall(r"[A-E]", gold)) != sorted(re.findall(r"[A-E]", changed)) and bool(CHOICE.fullmatch(changed))
    with mpmath.workdps(DIGITS):
        try:
            return not same(read(gold), read(changed))
        except (UnreadableError, ValueError, ZeroDivisionError):
            return False


CHOICE = re.compile(r"\(?[A-E]{1,4}\)?|[A-E](?:, ?[A-E])+")


def free(text: str) -> list[int]:
    """Places that are no part of a command, an index, a piece of text, a name before an equals sign."""
    spans = [found.span() for pattern in (HIDDEN, LEFT) for found in pattern.finditer(text)]
    hidden = {i for span in spans for i in range(*span)}
    return [i for i in range(len(text)) if i not in hidden]


def digits(text: str) -> Iterator[str]:
    """Each digit in turn by another one."""
    places = range(len(text)) if re.fullmatch(r"\(?[0-9A-F]+\)?_\{?\d+\}?", text) or CLOCK.fullmatch(text) else free(text)
    for i in places:
        if text[i].isdigit() and text[i].isascii():
            for step in (1, 3, 7):
                yield text[:i] + str((int(text[i]) + step) % 10) + text[i + 1 :]


def signs(text: str) -> Iterator[str]:
    """Each sign by the other one; a minus where a number or a name begins."""
    if CLOCK.fullmatch(text) or ":" in text:
        return
    for i in free(text):
        before = text[:i].rstrip()
        opening = not before or before[-1] in "([=,<>" or before.endswith(r"\{") or before.endswith(r"\left")
        if text.startswith(r"\infty", i + 1):
            continue  # an interval that ends where it begins
        if text[i] in "+-":
            yield text[:i] + ("" if opening else "+-"[text[i] == "+"]) + text[i + 1 :]
        elif opening and text[i].isalnum() and not (before and before[-1] == "," and THOUSANDS.search(text)):
            yield text[:i] + "-" + text[i:]
    if text.startswith("\\") and not text.startswith((r"\{", r"\left", r"\begin", r"\text", r"\pm")):
        yield "-" + text


def variables(text: str) -> Iterator[str]:
    """Each variable by another one of the text, or by one that is new; a choice's letter by another letter."""
    if CHOICE.fullmatch(text):
        yield from (text[:i] + other + text[i + 1 :] for i, c in enumerate(text) if c in "ABCDE" for other in "ABCDE" if other not in text)
        return
    if (
        UNITS.fullmatch(text)
        or CLOCK.fullmatch(text)
        or re.search(r"[A-Za-z]{3,}", HIDDEN.sub("", text))
        or re.search(r"\\text|\\math|^-?[\d.,]+\s+[A-Za-z]{1,3}$|[ }][A-Za-z]{2}$", text)
    ):
        return
    places = [i for i in free(text) if text[i].isalpha() and text[i].isascii() and text[i] not in "eid" and "(" not in text[i + 1 : i + 2]]
    names = [*dict.fromkeys(text[i] for i in places), *LETTERS]
    if re.search(r"[<>=]|\\[lg]e", LEFT.sub("", text)) and len({text[i] for i in places}) == 1:
        return  # the one unknown has another name
    for i in places:
        yield from (text[:i] + name + text[i + 1 :] for name in names if name != text[i])


def parts(text: str) -> Iterator[str]:
    """Without one term, item, factor, or exponent of a unit."""
    if found := UNITS.fullmatch(text):
        start = found.start("unit")
        for power in re.finditer(r"\^\{?-?\d\}?", text[start:]):
            if re.search(r"[A-Za-z}]\s*$", text[: start + power.start()]):
                yield text[: start + power.start()] + text[start + power.end() :]
        return
    if CHOICE.fullmatch(text):
        if len(re.findall(r"[A-E]", text)) > 1:
            yield text.rstrip(")")[:-1].rstrip(", ")
        return
    if CLOCK.fullmatch(text) or re.search(r"\\text|\\math|[A-Za-z]{3,}|^-?[\d.,]+\s+[A-Za-z]{1,3}$|[ }][A-Za-z]{2}$", HIDDEN.sub("", text)):
        return
    yield from _without_item(text)
    places = set(free(text))
    level = [i for i in places if all(text[:i].count(a) == text[:i].count(b) for a, b in ("{}", "()", "[]"))]
    cuts = sorted(i for i in level if text[i] in "+-" and text[:i].strip() and text[:i].rstrip()[-1] not in "=<>,")
    ends = sorted([*cuts, *(i for i in level if text[i] in "=<>,"), len(text)])
    for cut in cuts:
        yield (text[:cut] + text[next(end for end in ends if end > cut) :]).strip()
    if found := re.search(r"\s*([a-zA-Z])(\^\{?\d\}?)?$", text):
        rest = text[: found.start()]
        if found[1] in "xyznkpqi" or not re.fullmatch(r"-?[\d.,]*", rest):
            yield rest


def _without_item(text: str) -> Iterator[str]:
    """A tuple, set or list with one item fewer; intervals stay as they are."""
    plain = text.replace(r"\left", "").replace(r"\right", "").strip()
    if THOUSANDS.search(plain) or r"\infty" in plain or r"\cup" in plain:
        return
    opening, inner, closing = "", plain, ""
    if plain.startswith(r"\{") and plain.endswith(r"\}"):
        opening, inner, closing = r"\{", plain[2:-2], r"\}"
    elif enclosed(plain) and plain[0] + plain[-1] == "()":
        opening, inner, closing = "(", plain[1:-1], ")"
    items = split(inner, ",")
    if len(items) > 1:
        yield from (opening + ", ".join(items[:i] + items[i + 1 :]) + closing for i in range(len(items)))


KINDS: dict[str, Callable[[str], Iterable[str]]] = {"digit": digits, "sign": signs, "variable": variables, "part": parts}


def mutations(golds: Iterable[str], seed: int = 0) -> list[tuple[str, str, str]]:
    """What was changed, the gold, the changed one: of each gold and kind at most one, drawn by gold and seed."""
    found = []
    for gold in sorted(set(golds)):
        if FAMILY.search(gold):
            continue
        tail = TAIL.search(gold)
        head, rest = (gold[: tail.start()], tail[0]) if tail else (gold, "")
        for kind, change in KINDS.items():
            if rest and kind == "variable":
                continue
            candidates = list(dict.fromkeys(change(head)))
            random.Random(f"{seed} {kind} {gold}").shuffle(candidates)
            changed = next((other for other in candidates[:40] if other.strip() and apart(head, other)), None)
            if changed is not None:
                found.append((kind, gold, changed + rest))
    return found
