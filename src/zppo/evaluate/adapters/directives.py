"""Sentences that say how to reason or how to write the answer down: found in the benchmarks' questions and taken out.

The protocol has one such directive for all (method.md section 10).
"""

from __future__ import annotations

import re

# Each pattern covers a whole sentence in the words of one or several benchmarks, and nothing of a question: "Answer the question using
# a single word" is one, "Select the best title" is none.
_PLEASE = r"(?:please )?(?:directly )?"
_FORM = (
    r"(?:only )?(?:the |an? )?(?:correct |final |single |full )?"
    r"(?:option(?:['’]s)?|choice|letters?|number|integer|word|phrase|answer|yes/no|yes or no)"
)
_WORDS = r"(?:e\.g\.|i\.e\.|\d\.\d|[^.!?\n]){0,400}+"  # bounded, and so linear in the text
_END = r"(?:[.!][\"'”’]?|(?=\n|$))"  # a sentence with a question mark is none of these
_REST = _WORDS + _END
_BOXED = r"[^.!?\n\\]{0,200}\\boxed\{[^{}]{0,80}\}" + _REST
_DIRECTIVES = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        rf"{_PLEASE}(?:answer|respond|reply)(?: (?:the|this) question)?(?: directly)? (?:with|using|in|by) {_FORM}{_REST}",
        rf"{_PLEASE}(?:provide|give|output|select|choose) {_FORM} (?:letter )?(?:of|from) (?:the )?(?:correct|given|right|following)"
        + _REST,
        rf"{_PLEASE}answer (?:the|this) (?:question|task)(?: below)?(?: using| with| in| directly| based){_REST}",
        rf"answer this question using the text in the image directly{_REST}",
        r"for example, rows=\{\d+\} columns=\{\d+\}[.!]?",
        r"(?:let['’]s |please )?(?:think|reason|work|solve)(?: (?:the|this) problem)?(?: about (?:it|this))?,? step[- ]by[- ]step"
        + _REST,
        r"(?:please )?(?:carefully )?solve (?:the|this) (?:problem|question)" + _BOXED,
        r"(?:please )?(?:put|give|write|place|state|return|report|present|provide|enclose)" + _BOXED,
        r"think about the question and give your final answer" + _REST,
        r"(?:hint: )?please answer the question(?: requiring [^.!?\n]{0,100})? and provide [^\n]{0,300}?at the end[.!]?",
        rf"please first conduct reasoning,? and then answer the question{_REST}",
        rf"please directly answer the question{_REST}",
        r"(?:the )?last line of your response should[^\n]*",
        rf"select the best answer to the following multiple[- ]choice question{_REST}",
        r"(?:the )?(?:best|correct) answer is:?(?=\s*$)",
        rf"do not (?:generate|include|provide|write) any (?:intermediate )?(?:reasoning|explanation){_REST}",
        rf"(?:your )?final answer should be (?:in |an? |the form){_REST}",
        r"请?(?:一步一步|逐步)地?(?:思考|推理|解答)[^。\n]*。?",
        r"请?直接(?:回答|输出|给出|选择)(?:正确)?(?:选项|答案)[^。\n]*。?",
    )
)
# Where a sentence may start: at the start of a line, or behind the end of another sentence.
_START = re.compile(r"(?:^|(?<=[.!?:]\s)|(?<=[.!?。？！]))[ \t]*", re.MULTILINE)
_BLANK_LINES = re.compile(r"\n{3,}")
_MOST = 8  # directives in one question; more is not a question


def strip_directives(text: str) -> str:
    """The text without its directives; what stands between them keeps its lines."""
    for _ in range(_MOST):
        span = _first(text)
        if span is None:
            break
        before, after = text[: span[0]].rstrip(" \t"), text[span[1] :].lstrip(" \t")
        text = (
            before
            + (" " if before and after and not before.endswith("\n") and not after.startswith("\n") else "")
            + after
        )
    return _BLANK_LINES.sub("\n\n", text).strip()


def _first(text: str) -> tuple[int, int] | None:
    """Where the first directive stands."""
    for start in _START.finditer(text):
        for directive in _DIRECTIVES:
            match = directive.match(text, start.end())
            if match is not None:
                return match.span()
    return None
