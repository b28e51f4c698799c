"""Sentences that say how to reason or how to write the answer down: found in the benchmarks' questions and taken out.

The protocol has one such directive for all (method.md section 10).
"""

from __future__ import annotations

import re

# Each pattern covers a whole sentence in the words of one or several benchmarks, and nothing of a question: "Answer the question using
# a single word" is one, "Select the best title" is none.
_PLEASE = r"(?:please )?(?:directly )?"
# "the letter of the correct option" is a form, "the number of cats" and "the word that fills the gap" are questions.
_OF_THE_OPTION = (
    r"(?! (?:of|that|which|whose)\b(?! (?:the |your )?(?:correct |right |best |chosen )?(?:answer|option|choice)\b))"
)
_FORM = (
    r"(?:only )?(?:the |an? )?(?:correct |final |single |full )?"
    rf"(?:option(?:['’]s)?|choice|answer|yes/no|yes or no|(?:letters?|number|integer|word|phrase){_OF_THE_OPTION})"
)
_WORDS = r"(?:e\.g\.|i\.e\.|\d\.\d|[^.!?\n]){0,400}+"  # bounded, and so linear in the text
_END = r"(?:[.!][\"'”’]?|(?=\n|$))"  # a sentence with a question mark is none of these
_REST = _WORDS + _END
_LIST = (
    r"(?:the |these )?(?:(?:correct|given|right|following|provided|listed) )?(?:answer )?(?:choices?|options?|answers?)"
)
# Behind a list of options only what says more of the form: "the following options that are true" is a question.
_NO_MORE = (
    rf"(?: (?:of|from) {_LIST})?"
    r"(?: (?:letter|directly|only|below|above|provided|given|listed|as your (?:final )?answer|\([^()\n]{0,60}\)))*"
    r"(?:,? (?:e\.g\.|i\.e\.|such as|for example|without|and nothing)" + _WORDS + r")?" + _END
)
_BOXED = r"[^.!?\n\\]{0,200}\\boxed\{[^{}]{0,80}\}" + _REST
_DIRECTIVES = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        rf"{_PLEASE}(?:answer|respond|reply)(?: (?:the|this) question)?(?: directly)? (?:with|using|in|by) {_FORM}{_REST}",
        rf"{_PLEASE}(?:provide|give|output|select|choose) {_FORM} (?:letter )?(?:of|from) {_LIST}{_NO_MORE}",
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
_IMAGES = re.compile(r"<image[ _]?\d*>", re.IGNORECASE)


def strip_directives(text: str, may_be_empty: bool = False) -> str:
    """The text without its directives; what stands between them keeps its lines.

    Where nothing would be left but marks of images, the text stays as it is: what looked like a directive is the question.

    Args:
        text: a question.
        may_be_empty: the question may stand in the picture, and the text be nothing but directives.
    """
    left = _stripped(text)
    return left if may_be_empty or re.search(r"\w", _IMAGES.sub("", left)) else text.strip()


def _stripped(text: str) -> str:
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
