"""The answer of a completion as text: found, and brought into one spelling (method.md section 7).

The answer is the last balanced box after the thinking. One spelling stands for what Unicode, LaTeX commands, text wrappers and white space
can write in many ways. Everything here is bounded: linear regular expressions on at most `MAX_ANSWER` characters, and nothing is evaluated.
Standard library only.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from functools import lru_cache

from zppo.grading.units import spelled_unit

_THINK_OPEN = "<think>"
_THINK_CLOSE = "</think>"
# A run of backslashes with a box or a brace behind it, or a brace. Runs are taken whole (possessive), so that a million
# backslashes, like ten thousand unclosed boxes, cost one pass over the text.
_TOKEN = re.compile(
    r"(?P<run>\\++)(?:(?P<box>(?:boxed|fbox)\s*+\{)|(?P<bare>boxed\s++(?P<word>[^\s${}\\]++))|(?P<behind>[{}]?))|(?P<brace>[{}])"
)
_WHOLE_BOX = re.compile(r"\\++(?:boxed|fbox)\s*+\{(.*)\}", re.DOTALL)
_BARE_BOX = re.compile(r"^\\++boxed\s++(?=[^\s{}\\]++$)")
_UNWRAPPED = 8  # boxes around one answer that are taken off; more is an attack, and each costs a pass


def final_part(text: str, think_open: bool = False) -> str | None:
    """The part of a completion that may hold the answer: what follows the last `</think>`.

    Args:
        text: the completion.
        think_open: whether the chat template ended the prompt inside an opened think block.

    Returns:
        The text after the last `</think>`; the whole text if there are no think tags; None where a think block is still
        open at the end.
    """
    close = text.rfind(_THINK_CLOSE)
    if text.rfind(_THINK_OPEN) > close or (think_open and close < 0):
        return None
    return text[close + len(_THINK_CLOSE) :] if close >= 0 else text


def last_box(text: str) -> str | None:
    """Content of the last balanced `\\boxed{...}`, `\\fbox{...}` or `\\boxed 7`, of nested ones the outer; None without. Linear time."""
    opened: list[int | None] = []  # for every open brace: where a box's content starts, None for an ordinary brace
    boxes = 0  # of those, how many are of boxes
    span: tuple[int, int] | None = None
    for token in _TOKEN.finditer(text):
        if token["box"]:
            opened.append(token.end())
            boxes += 1
            continue
        if token["bare"]:  # \boxed 7
            if not boxes:
                span = token.span("word")
            continue
        escaped = token["run"] is not None and len(token["run"]) % 2 == 1
        brace = "" if escaped else token["brace"] or token["behind"]
        if brace == "{":
            opened.append(None)
        elif brace == "}" and opened:
            start = opened.pop()
            if start is not None:
                boxes -= 1
                span = (start, token.start())
    return None if span is None else text[span[0] : span[1]]


def extract_boxed(text: str, think_open: bool = False, anywhere: bool = False) -> str | None:
    """The answer of a completion (method.md section 7).

    Args:
        text: the completion.
        think_open: whether the prompt already ended inside an opened think block.
        anywhere: thoughts count too, closed or not: the last box of the whole response, as the paper's grader takes it (App. D.1).

    Returns:
        Content of the last balanced `\\boxed{}` after the last `</think>`, without surrounding white space. None if there is
        no box, the box is empty, or the thinking never ended. [zppo] Of boxes inside one another the outer one counts, so
        that `\\boxed{3 or \\boxed{5}}` is not 5; a box that only holds a box is unwrapped.
    """
    part = text if anywhere else final_part(text, think_open)
    content = None if part is None else last_box(part)
    if content is None:
        return None
    for _ in range(_UNWRAPPED):
        inner = _WHOLE_BOX.fullmatch(content.strip())
        if inner is None or last_box(content) != inner[1]:
            break
        content = inner[1]
    return content.strip() or None


MAX_ANSWER = 1000  # characters; longer answers are compared as strings only
MAX_DEPTH = 40  # nested brackets; deeper answers are compared as strings only

_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n")
_SUPERSCRIPT_RUN = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ]+")
_SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")
_SUBSCRIPT_RUN = re.compile("[₀₁₂₃₄₅₆₇₈₉]+")
_VULGAR_FRACTION = re.compile("[¼½¾⅐-⅞]")
_SQUARE_UNITS = {"㎡": "m^{2}", "㎝": "cm", "㎞": "km", "㎏": "kg", "㎜": "mm", "㎥": "m^{3}", "㎠": "cm^{2}", "㎢": "km^{2}"}

_SYMBOLS = {
    "−": "-", "‐": "-", "‑": "-", "–": "-", "—": "-", "×": r"\times ", "✕": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "∙": r"\cdot ",
    "÷": "/", "⁄": "/", "∕": "/", "π": r"\pi ", "∞": r"\infty ", "≤": r"\le ", "⩽": r"\le ", "≥": r"\ge ", "⩾": r"\ge ",
    "≠": r"\ne ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "±": r"\pm ", "∓": r"\mp ", "≈": r"\approx ", "º": "°", "∘": "°",
    "α": r"\alpha ", "β": r"\beta ", "γ": r"\gamma ", "δ": r"\delta ", "θ": r"\theta ", "λ": r"\lambda ", "φ": r"\phi ",
    "σ": r"\sigma ", "ω": r"\omega ", "∅": r"\emptyset ", "ℝ": r"\mathbb{R}", "→": r"\to ",
    "’": "'", "‘": "'", "“": '"', "”": '"', "。": ".", "、": ",",
    "`": "'", "…": r"\ldots ", "℃": "°C", "℉": "°F",
}  # fmt: skip
_SYMBOL_TABLE = str.maketrans(_SYMBOLS)

_INVISIBLE = re.compile("[\u00ad\u034f\u061c\u180e\u200b-\u200f\u202a-\u202e\u2060-\u2064\u2066-\u206f\ufe00-\ufe0f\ufeff]")
_UPRIGHT = r"\\(?:text|mathrm|textrm|mbox|hbox|textnormal|operatorname|mathit|textit|mathbf|textbf)\*?\s*"
_SPACE = r"(?:\s|\\[,;:! ]|~)*"
_UNIT = re.compile(
    rf"(?:(?<=[\d)}}\].])(?<!\\circ\}})|(?<=[a-zA-Z])(?={_SPACE}{_UPRIGHT}\{{\s*\w\w))({_SPACE}){_UPRIGHT}\{{((?:[^{{}}]|\{{[^{{}}]*\}}){{1,40}})\}}"
    r"(?=\s*(?:$|[\^/,.;)}\]$*]|\\cdot|\\text|\\math|\\[\])]))"
)
_UNIT_FRACTION = re.compile(
    rf"\\[dt]?frac\s*\{{\s*{_UPRIGHT}\{{([^{{}}]*)\}}((?:\^\{{?\d\}}?)?)\s*\}}\s*\{{\s*{_UPRIGHT}\{{([^{{}}]*)\}}((?:\^\{{?\d\}}?)?)\s*\}}"
)
_SIUNITX = re.compile(r"\\(?:SI|qty)\s*\{([^{}]*)\}\s*\{([^{}]*)\}")
_WRAPPER = re.compile(
    r"\\(?:text|textbf|textit|textrm|textsf|texttt|textnormal|mathrm|mathbf|mathit|mathsf|mathtt|boldsymbol|bm|operatorname"
    r"|mbox|hbox|emph|underline|vec|overrightarrow)\*?\s*\{([^{}]*)\}"
)
_ESCAPED = re.compile(r"\\([%$#&_{} ])")
_TEXT_ONLY = re.compile(r"\\text\s*\{([^{}]*)\}")
_DELIMITERS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), ("**", "**"), ('"', '"'), ("'", "'"), ("{", "}"))
_LABEL = re.compile(
    r"^(?:the )?(?:final )?answer(?: is)?\s*[:=]?\s+|^(?:the )?(?:final )?answer\s*[:=]\s*|^(?:答案|答)(?:是|为|:)\s*", re.IGNORECASE
)
_GREEK = "alpha|beta|gamma|delta|epsilon|theta|lambda|mu|rho|sigma|tau|phi|omega"
_FUNCTION = r"(?:cis|arcsinh|arccosh|arctanh|arcsin|arccos|arctan|gcd|lcm|sinh|cosh|tanh|sin|cos|tan|cot|sec|csc|log|ln|exp)"

# Applied in order. Each maps spellings of one thing to one spelling.
_REWRITES: tuple[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]], ...] = tuple(
    (re.compile(pattern), new)
    for pattern, new in (
        (r"(?<=\d)(?:,?\s*\\[,;:! ]\s*|\{,\}|\u202f|\u00a0)(?=\d{3}(?!\d))", ","),  # thousands: 1\,000, 1{,}000 and 1,\! 000
        (r"\\!", ""),
        (r"\\(?:textcolor|colorbox)\s*(?:\[\w*\])?\s*\{[^{}]*\}\s*\{([^{}]*)\}", r" \1 "),
        (r"\\(?:text)?color(?:box)?\s*(?:\[\w*\])?\s*\{[^{}]*\}", " "),
        (r"\\(?:tiny|scriptsize|footnotesize|small|normalsize|[lL]arge|LARGE|[hH]uge|bf|rm|it|sf|tt|mathstrut)(?![a-zA-Z])", " "),
        (r"\\[hv](?:space\*?|phantom)\s*\{[^{}]*\}|\\phantom\s*\{[^{}]*\}", " "),
        (r"\\begin\s*\{array\}\s*(?:\[\w*\])?\s*\{[lcr| ]*\}|\\begin\s*\{(?:small|B)?matrix\}", r"\\begin{pmatrix}"),
        (r"\\end\s*\{(?:array|(?:small|B)?matrix)\}", r"\\end{pmatrix}"),
        (r"\\[lr]?vert(?![a-zA-Z])", "|"),
        (r"\\colon(?![a-zA-Z])", ":"),
        (r"\\(?:l|c|d)?dots[cbmio]?(?![a-zA-Z])", r"\\ldots "),
        (r"\\(?:lor|vee)(?![a-zA-Z])", " or "),
        (r"\\(?:land|wedge)(?![a-zA-Z])", " and "),
        (r"\\(?:[bp]?mod)(?![a-zA-Z])", r"\\mod "),
        (r"\{([^{}]*)\\choose([^{}]*)\}", r"\\binom{\1}{\2}"),
        (r"∛", r"\\sqrt[3] "),
        (r"\\log\s*_\s*(\d)(?=\d)", r"\\log_{\1} "),
        (r"(?<![\\a-zA-Z])Abs\(([^()]*)\)", r"|\1|"),
        (r"(?<![\\a-zA-Z])a(sin|cos|tan)(?=h?\()", r"arc\1"),
        (r"(?<![\\a-zA-Z])(sin|cos|tan|ln|log)(?=[a-gi-z](?![a-zA-Z]))", r"\\\1 "),
        (rf"(?<![\\a-zA-Z])({_GREEK})(?![a-zA-Z])", r"\\\1 "),
        (r"^([^{}]*)\\choose([^{}]*)$", r"\\binom{\1}{\2}"),
        (r"\\log\s+_", r"\\log_"),
        (r"(?<![\\a-zA-Z])i(sin|cos)(?=\s*[(\\\d])", r"i\\\1 "),
        (r"(?<![\w}/.])(\d+)/(\d+) (?=[a-zA-Z\\](?![a-zA-Z]{2}))", r"\\frac{\1}{\2} "),
        (r"\\[,;: ]|~|\\q?quad(?![a-zA-Z])|\\(?:display|text|script)style(?![a-zA-Z])|\\limits(?![a-zA-Z])", " "),
        (r"\\(?:left|right|[bB]igg?[lrm]?)(?![a-zA-Z])\.?", ""),
        (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
        (r"\\(?:lbrace)(?![a-zA-Z])", r"\\{"),
        (r"\\(?:rbrace)(?![a-zA-Z])", r"\\}"),
        (r"\\(?:leqslant|leqq|leq)(?![a-zA-Z])|<=", r"\\le "),
        (r"\\(?:geqslant|geqq|geq)(?![a-zA-Z])|>=", r"\\ge "),
        (r"\\lt(?![a-zA-Z])", "<"),
        (r"\\gt(?![a-zA-Z])", ">"),
        (r"\\neq(?![a-zA-Z])|!=", r"\\ne "),
        (r"\\varnothing(?![a-zA-Z])", r"\\emptyset "),
        (r"\^\s*\{?\s*\\circ\s*\}?|\\degree(?![a-zA-Z])|\\circ(?![a-zA-Z])|\^\s*\{?\s*°\s*\}?", "°"),
        (r"\\([%$#&])", r"\1"),
        (r"\*\*", "^"),
        (r"\\cdot(?![a-zA-Z])", r"\\cdot "),
        (r"(?<![\\a-zA-Z])sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"),
        (r"√\s*(\d+|[a-zA-Z])", r"\\sqrt{\1}"),
        (r"√\s*\(([^()]*)\)", r"\\sqrt{\1}"),
        (r"√", r"\\sqrt "),
        (r"\^\s*([-+]?\d+)", r"^{\1}"),
        (r"\^\s*\(([^()]*)\)", r"^{\1}"),
        (r"\^\s*([a-zA-Z])", r"^{\1}"),
        (r"_\s*(\d+|[a-zA-Z])", r"_{\1}"),
        (r"(?<![\\a-zA-Z])pi(?![a-zA-Z])", r"\\pi "),
        (r"(?<![\\a-zA-Z])(?:infinity|infty|inf|oo)(?![a-zA-Z])", r"\\infty "),
        (rf"(?<![\\a-zA-Z])({_FUNCTION})(?![a-zA-Z])(?=\s*[\^_({{\\\d]|\s+(?:{_FUNCTION}|[a-zA-Z])(?![a-zA-Z]))", r"\\\1 "),
        (r"(?<![\w)}])\+(?=\\infty)", ""),
        (r"^\\\{\s*\\\}$", r"\\emptyset "),
        (r"^(?:all |the )*real numbers$", r"\\mathbb{R}"),
        (r"^[(\[]\s*(\\begin\{[pb]matrix\}(?:(?!\\begin).)*\\end\{[pb]matrix\})\s*[)\]]$", r"\1"),
        (r"\s+", " "),
        (r"(?<=[A-Za-z)]) ([.:]) ", r"\1 "),
        (r"^(\d+(?:\.\d+)?) (?:is )?to (\d+(?:\.\d+)?)(?: (?:is )?to (\d+(?:\.\d+)?))?$", lambda m: ":".join(filter(None, m.groups()))),
        (r"(?<=\d) ?\(([a-zA-Z]{3,})\)\.?$", r" \1"),
        (r"^(?:negative|minus) (?=[\d\\.])", "-"),
        (r" ?([=<>+*/^_{}()\[\]|;]) ?", r"\1"),
        (r"(\\[a-zA-Z]+) (?![a-zA-Z])", r"\1"),
        (r"(?<=[\d)}]) (?=\\[a-zA-Z])", ""),
    )
)
# Spellings with a space that tells a list from a number with separators: removed only after numbers were joined.
_JOINED_THOUSANDS = re.compile(r"(?<![\d.,])(\d{1,3}(?:,\d{3})+)(?![\d,])")
_JOINED_BY_SPACE = re.compile(r"(?<![\d.,] )(?<![\d.,/])(?<!\d)([1-9]\d{0,2}(?: \d{3})+)(?![\d,/ ])")
_COMMA = re.compile(r" ?, ?")
_SOFT_END = re.compile(r"(?<![.])[.,;:?\s]+$")
_QUANTITY = re.compile(r"[-+]?[\d.]+ ?[a-zA-Zμ]{2,4}$")  # MeV is not meV
_PLAIN_ENGLISH = re.compile(r"[^\W\d_]{3,}")


def normalise(answer: str) -> str:
    """The form in which audits compare answers: lower case, `\\text{}` stripped, spaces collapsed (method.md section 9)."""
    text = answer[:MAX_ANSWER] if len(answer) > MAX_ANSWER else answer
    for _ in range(MAX_DEPTH):
        text, found = _TEXT_ONLY.subn(r"\1", text)
        if not found:
            break
    return " ".join((text + answer[MAX_ANSWER:]).lower().split())


def printed(text: str) -> str:
    """A text in LaTeX as it is printed: commands for fonts and text off, escaped characters bare. Case and spaces stay. Linear time."""
    for _ in range(MAX_DEPTH):
        text, found = _WRAPPER.subn(r"\1", text)
        if not found:
            break
    return _ESCAPED.sub(r"\1", text)


def nested_too_deep(text: str) -> bool:
    """Whether brackets, or commands that take an argument, are nested deeper than `MAX_DEPTH`. Linear time."""
    depth = 0
    for char in text:
        if char in "([{":
            depth += 1
            if depth > MAX_DEPTH:
                return True
        elif char in ")]}":
            depth -= 1
    return text.count("\\sqrt") > MAX_DEPTH or text.count("√") > MAX_DEPTH or text.count("^") > MAX_DEPTH


def _plain_characters(text: str) -> str:
    """Superscripts, vulgar fractions, full-width forms and mathematical symbols in their LaTeX or ASCII spelling."""
    if text.isascii():
        return text.replace("`", "'")
    for char, unit in _SQUARE_UNITS.items():
        text = text.replace(char, unit)
    text = _SUPERSCRIPT_RUN.sub(lambda m: "^{" + m[0].translate(_SUPERSCRIPTS) + "}", text)
    text = _SUBSCRIPT_RUN.sub(lambda m: "_{" + m[0].translate(_SUBSCRIPTS) + "}", text)
    text = _VULGAR_FRACTION.sub(lambda m: " " + unicodedata.normalize("NFKC", m[0]), text)
    text = text.translate(_SYMBOL_TABLE)
    return unicodedata.normalize("NFKC", text).translate(_SYMBOL_TABLE)


def _line_breaks(text: str) -> str:
    """`text` with `\\\\` as the row separator `\\cr` in a matrix, and as the doubled backslash of an escaped text elsewhere."""
    if r"\begin" in text:
        return text.replace("\\\\", r"\cr ")
    return re.sub(r"\\{2,}(?=[a-zA-Z%$#&{}])", r"\\", text)


def _closes_at_end(text: str) -> bool:
    """Whether the bracket that opens `text` is closed by its last character."""
    depth = 0
    for index, char in enumerate(text):
        depth += (char in "([{") - (char in ")]}")
        if depth == 0:
            return index == len(text) - 1
    return False


def _spell_units(text: str) -> str:
    """`text` with units in upright type as words: `2x\\text{ m}` says that m is no variable, which `2xm` does not."""

    def spelled(match: re.Match[str]) -> str:
        word = spelled_unit(match[2])
        return match[0] if word is None else " " + word

    text = _SIUNITX.sub(lambda m: m[1] + r"\text{ " + m[2].replace("\\per", "/").replace("\\", " ").replace("/ ", "/") + "}", text)
    return _UNIT.sub(spelled, _UNIT_FRACTION.sub(r"\\text{\1\2/\3\4}", text))


_ARGUMENTS = {"sqrt": 1, "frac": 2, "binom": 2}
_WITH_ARGUMENTS = re.compile(r"\\(sqrt|frac|binom)(?![a-zA-Z])")
_ROOT = re.compile(r"\s*\[[^\[\]]*\]")
_ARGUMENT = re.compile(r"\s*(?:(?P<open>\{)|(?P<token>\\(?!sqrt|frac|binom)[a-zA-Z]+|[\da-zA-Z]))")


def _braced(text: str) -> str:
    """`text` with every argument of a fraction, root or binomial in braces; LaTeX does without where it is one token: `\\frac\\pi2`."""
    parts, position = [], 0
    while command := _WITH_ARGUMENTS.search(text, position):
        parts.append(text[position : command.end()])
        position = command.end()
        if command[1] == "sqrt" and (root := _ROOT.match(text, position)):
            parts.append(root[0].strip())
            position = root.end()
        for _ in range(_ARGUMENTS[command[1]]):
            argument = _ARGUMENT.match(text, position)
            if argument is None:
                break
            inner, end = argument["token"], argument.end()
            if argument["open"]:
                end = _closing(text, end)
                if end < 0:
                    break
                inner, end = _braced(text[argument.end() : end]), end + 1
            parts.append("{" + inner + "}")
            position = end
    return "".join(parts) + text[position:]


def _closing(text: str, start: int) -> int:
    """Where the brace is closed that was opened before `start`; -1 where it is not."""
    depth = 1
    for index in range(start, len(text)):
        depth += (text[index] == "{") - (text[index] == "}")
        if depth == 0:
            return index
    return -1


def _unwrap(text: str) -> str:
    """`text` without what stands around the whole of it: math delimiters, quotes, bold marks, braces, text commands."""
    for _ in range(MAX_DEPTH):
        before = text
        text = text.strip()
        if (box := _WHOLE_BOX.fullmatch(text)) and _closes_at_end(text[text.index("{") :]):
            text = box[1]
        text = _BARE_BOX.sub("", text)
        for left, right in _DELIMITERS:
            inner = text[len(left) : len(text) - len(right)]
            if not (text.startswith(left) and text.endswith(right) and len(text) > len(left) + len(right)):
                continue
            if left == "{" and (not _closes_at_end(text) or "," in inner or ";" in inner):
                continue  # two groups, or a set written with bare braces
            if left != "{" and (left in inner or inner.endswith("\\")):
                continue  # two quotations, not one
            text = inner
        text = _WRAPPER.sub(r" \1 ", text)
        if text == before:
            break
    return text


def _drop_dollars(text: str) -> str:
    """`text` without the dollar signs that delimit math inside it; an odd one out is a currency sign and stays."""
    bare = re.findall(r"(?<!\\)\$", text)
    return re.sub(r"(?<!\\)\$", " ", text) if bare and len(bare) % 2 == 0 else text


def _join_thousands(text: str) -> str:
    """`text` without thousands separators, except in bracketed lists: 1,234.5 -> 1234.5, (1,234) stays."""

    def joined(match: re.Match[str]) -> str:
        before = text[: match.start()].replace(r"\{", "(").replace(r"\}", ")")
        inside = sum(map(before.count, "([")) > sum(map(before.count, ")]")) or text.startswith("{")
        return match[0] if inside else match[0].replace(",", "").replace(" ", "")

    text = _JOINED_THOUSANDS.sub(joined, text)
    return _JOINED_BY_SPACE.sub(joined, text)


@lru_cache(maxsize=8192)
def clean(answer: str) -> str:
    """One spelling of an answer of at most `MAX_ANSWER` characters; equal spellings are equal answers.

    Unicode symbols become LaTeX, LaTeX synonyms become one command, text wrappers, delimiters, spaces without meaning, an
    "answer:" label, thousands separators and a closing full stop go. Case stays: `text_key` folds it where that is safe.
    """
    text = _spell_units(_line_breaks(_plain_characters(_INVISIBLE.sub("", answer))))
    text = _drop_dollars(_unwrap(text))
    for pattern, new in _REWRITES:
        text = pattern.sub(new, text)
    text = _braced(_LABEL.sub("", _unwrap(text)))
    if r"\pm" not in text:
        text = re.sub(r"\\mp(?![a-zA-Z])", r"\\pm", text)  # alone it is the same two values
    text = re.sub(r"^(?:=|\\approx|:)\s*", "", text.strip())
    if not text.endswith(".."):
        text = _SOFT_END.sub("", text)
    text = _COMMA.sub(",", _join_thousands(text)).strip()
    while len(text) > 2 and text[0] + text[-1] == "()" and _closes_at_end(text) and not re.search(r"[,;]", text):
        text = text[1:-1].strip()
    return text


def text_key(cleaned: str) -> str:
    """What two texts are compared by: lower case, without articles, quotes and hyphens; case stays in formulas."""
    cleaned = re.sub(r"(?<=[a-zA-Z])_\{(\w+)\}", r"\1", cleaned)
    if not (_PLAIN_ENGLISH.search(cleaned) or (len(cleaned) == 1 and cleaned.isalpha())) or _QUANTITY.match(cleaned):
        return cleaned
    text = re.sub(r"(?<![\\\w])(?:the|a|an) (?=\w)", "", cleaned.lower())
    return " ".join(re.sub(r"[\"']|(?<=[a-z])-(?=[a-z])", " ", text).split()).rstrip("!")
