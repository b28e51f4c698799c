"""Whether a hint gives the answer away (Alg. 5): refused is only what says more than the question does [zppo].

The paper neither checks nor redraws. A right answer that stands in a hint gives it away, unless its words are everybody's: a single letter
("A" is an English word), a stop word, yes or no, or what the question itself says. Of these only a statement does: "the answer is A",
"(A)", "choose red", "x = 4".
"""

from __future__ import annotations

import re
from fractions import Fraction
from functools import lru_cache

from zppo.grading import normalise

MOST_CHARACTERS = 4000  # of a hint or a question that are looked at, twice what a hint of the usual limit has

_COMMON = frozenset(
    "a about above across after again all along also always am among an and another any are around as at back be because been before being "
    "below best between both but by can cannot could did do does doing done down during each either else enough equal even ever every few "
    "first for from get give given go good had has have he her here him his how i if in into is it its just know last least less let like "
    "look make many may me might more most much must my near need neither never next no none nor not now of off often on once one only or "
    "other our out over own part same see set several she should show side since so some such take than that the their them then there "
    "these they thing think this those three through to together too try two under until up upon us use very was way we well were what "
    "when where which while who why will with within without work would yes you your true false correct incorrect right wrong".split()
)
_OPTION = re.compile(
    r"(?:(?:option|choice)\s+)?(?:\(([A-Z])\)[.:]?|([A-Z])[.):]?|([A-Z])[.):]\s+(\S.*)|\(([A-Z])\)[.:]?\s+(\S.*))",
    re.IGNORECASE | re.DOTALL,
)
_RATIO = re.compile(r"([-+]?\d+(?:\.\d+)?)(?:/(\d+))?")
# A quotient that stands by itself, no date and no part of an expression.
_QUOTIENT = re.compile(r"(?<![\w.^_/\\])(?<![-+*/^] )(?<![-+*])([-+]?\d+)/(\d+)(?![\w/^*+]|\.\d|-\d| [-+*/^] ?\S)")
# A number that stands by itself: no index, exponent, part of a word, of a longer number or of an expression.
_ALONE = re.compile(r"(?<![\w.^_/\\])(?<!\^\{)(?<!_\{)(?<![-+*/^] )(?<![-+*])[-+]?\d+(?:\.\d+)?(?![\w/^*+]|\.\d|-\d| [-+*/^] ?\S)")
_LABEL = re.compile(r"\b(?:steps?|cases?|parts?|lines?|equations?|eq\.?|figures?|hints?|rules?) \(?\d+\)?|(?:^|\n)\s*\(?\d{1,2}[.):](?=\s)")
_MARKUP = re.compile(r"\\(?:left|right|displaystyle|quad|[,;:! ()\[\]])|\*\*|[$`]|\\(?=%)")
_TEXT = re.compile(r"\\(?:text|textbf|mathrm|mathbf)\s*\{([^{}]*)\}")
_FRACTION = re.compile(r"\\[dtc]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}")
_SHORT_FRACTION = re.compile(r"\\[dtc]?frac\s*(\d)\s*(\d)")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_EMPTY_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{\s*(?:\.\.\.|\\(?:l?dots|cdot))?\s*\}")

_SAYS = r"(?:(?:is|are|was|must be|should be|will be|would be|has to be|equals?|being|becomes)\s+|[=:]\s*|->\s*|[-\u2013\u2014]\s+)"
_FILL = r"(?:(?:therefore|thus|then|clearly|simply|just|exactly|indeed|option|choice|letter|the)\s+){0,3}"
_OPEN = r"[\"'(\[{]{0,3}"
_CLOSE = r"[\"')\]}]{0,3}"
_END = r"(?=\s*(?:[.;:!?,]|$)|\s+(?:because|since|as|so|and)\b)"
_STOP = r"(?=\s*(?:[.;!?]|$)|\s+(?:because|since)\b)"
_ANSWER = r"\b(?:answer|solution|result|option|choice|letter)\s*"
_CHOOSE = r"\b(?:choose|pick|select|mark|tick|go with|go for|answer|answer with|conclude)\s+"
_IS_RIGHT = (
    r"\s+(?:is|are|must be|should be|has to be)\s+(?:(?!not\b)\w+\s+)?(?:the\s+)?(?:only\s+|one\s+)?"
    r"(?:(?:correct|answer|solution)\b|right\b(?=\W*$|\s*[.;:!?,)]|\s+(?:answer|option|choice|one|letter|because|since|as|so|and)\b))"
)
# Before a letter in parentheses: what names a part of the question or a function rather than an option.
_PART = "".join(f"(?<!{word} )" for word in ("part", "case", "step", "figure", "panel", "equation", "graph", "diagram", "question"))


def gives_away(hint: str, *golds: str, question: str = "") -> bool:
    """Whether a hint says more of the answer than the question does: a box that holds something, or any of the right answers.

    Args:
        hint: the teacher's text.
        golds: the right answers.
        question: what was asked, with its options.
    """
    hint, question = hint[:MOST_CHARACTERS], question[-MOST_CHARACTERS:]
    if re.search(r"\\(?:boxed|fbox)", _EMPTY_BOX.sub("", hint)):
        return True
    return any(_reveals(hint, question, _bare(gold[:MOST_CHARACTERS]).strip()) for gold in golds)


def _reveals(hint: str, question: str, gold: str) -> bool:
    if option := _OPTION.fullmatch(gold):
        letter = next(option[i] for i in (1, 2, 3, 5) if option[i])
        rest = option[4] or option[6] or ""
        return _marks(_bare(hint), letter) or (bool(rest) and _reveals(hint, question, rest))
    shown, asked, words = _flat(hint), _flat(question), _flat(gold)
    if not words:
        return False
    if (number := _RATIO.fullmatch(words)) and (value := _value(number)) is not None:
        if value not in _numbers(asked):
            return value in _numbers(shown)
    elif words not in _COMMON and not _phrase(words).search(asked):
        return _phrase(words).search(shown) is not None
    return any(found[0] not in asked for pattern in _statements(re.escape(words)) for found in pattern.finditer(shown))


def _bare(text: str) -> str:
    """Without LaTeX and Markdown that only change how a text looks; fractions as a/b, thousands joined, one kind of minus."""
    text = _SHORT_FRACTION.sub(r"\1/\2", text.replace("\u2212", "-"))
    return _THOUSANDS.sub("", _FRACTION.sub(r"\1/\2", _TEXT.sub(r"\1", _MARKUP.sub("", text))))


def _flat(text: str) -> str:
    """The form in which texts are compared, lines kept apart."""
    return "\n".join(normalise(line) for line in _bare(text).splitlines() if line.strip())


def _numbers(text: str) -> set[Fraction]:
    """The numbers that stand by themselves, not as the label of a step."""
    text = _LABEL.sub(" ", text)
    quotients = {value for found in _QUOTIENT.finditer(text) if (value := _value(found)) is not None}
    return quotients | {Fraction(found) for found in _ALONE.findall(text)}


def _value(ratio: re.Match[str]) -> Fraction | None:
    """What a number or a quotient is worth; None for one over 0."""
    below = Fraction(ratio[2] or 1)
    return Fraction(ratio[1]) / below if below else None


@lru_cache(maxsize=1024)
def _phrase(words: str) -> re.Pattern[str]:
    """A right answer as words of its own, whatever the spaces in it."""
    tokens = re.findall(r"\w+|[^\w\s]", words)
    joined = [r"\s+" if a[-1].isalnum() and b[0].isalnum() else r"\s*" for a, b in zip(tokens, tokens[1:], strict=False)]
    inner = "".join(re.escape(token) + gap for token, gap in zip(tokens, [*joined, ""], strict=True))
    return re.compile(rf"(?<!\w){inner}(?!\w)")


@lru_cache(maxsize=1024)
def _statements(gold: str) -> tuple[re.Pattern[str], ...]:
    """What says of an answer that it is right; `gold` is an expression."""
    said = rf"{_OPEN}{gold}{_CLOSE}"
    return tuple(
        re.compile(pattern)
        for pattern in (
            rf"{_ANSWER}{_SAYS}?{_FILL}{said}{_END}",
            rf"{_CHOOSE}{_FILL}{said}{_STOP}",
            rf"(?<!\w){said}{_IS_RIGHT}",
            rf"(?<![\w=])[^\s=]{{1,20}}\s*=\s*{said}{_STOP}",
        )
    )


def _marks(text: str, letter: str) -> bool:
    """Whether a text names a letter as an option, rather than as a word or a variable."""
    upper, lower = re.escape(letter.upper()), re.escape(letter.lower())
    either, same = f"[{upper}{lower}]", re.escape(letter)
    text = " ".join(text.split())
    patterns = (
        rf"(?i:{_ANSWER}{_SAYS}?{_FILL}){_OPEN}{either}{_CLOSE}{_END}",
        rf"(?i:\b(?:option|choice|letter)s?\s+){_OPEN}{same}{_CLOSE}(?!\w)",
        rf"(?i:{_CHOOSE}{_FILL}){_OPEN}{same}{_CLOSE}{_STOP}",
        rf"(?<!\w){same}{_CLOSE}(?i:{_IS_RIGHT})",
        rf"(?<!\w)(?i:{_PART})\({same}\)",
        rf"\b(?i:it\s+(?:must|has\s+to|can\s+only)\s+be)\s+{_OPEN}{same}{_CLOSE}{_END}",
        rf"\b(?i:end\s+up\s+with|(?:all|everything|every\s+option|all\s+options)\s+(?:except|but))\s+{_OPEN}{same}{_CLOSE}{_STOP}",
    )
    return any(re.search(pattern, text) for pattern in patterns)
