"""What runs in a worker process: algebra with math-verify. Imports the standard library, math-verify and the typed rules only.

A worker may be killed at any moment, by the pool when it overruns its deadline or by the kernel when it overruns its limits.
"""

from __future__ import annotations

import contextlib
import logging
import math
import re
import resource
import signal
from typing import Any

from latex2sympy2_extended import NormalizationConfig
from math_verify import LatexExtractionConfig, parse, verify

from zppo.grading.equality import compare

# Only a whole box is read: math-verify's search for numbers in plain text would find a 5 in "5 is wrong", and evaluates.
_BOX = (
    LatexExtractionConfig(
        try_extract_without_anchor=False,
        boxed_match_priority=0,
        normalization_config=NormalizationConfig(
            basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="last", equations=False
        ),
    ),
)
_RELATIVE_ERROR = 1e-6
_E_NOTATION = re.compile(r"(?<=\d)[eE]([-+]?\d+)")
_TRIGONOMETRY = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)")
_DEGREES = re.compile(r"(\d+(?:\.\d+)?)°")


def limit_worker(memory_limit: int) -> None:
    """Called once in each new worker: bounds its address space (bytes) and silences the libraries' logs."""
    logging.disable(logging.CRITICAL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # die at once, also inside one long operation on a huge integer
    with contextlib.suppress(ValueError, OSError):  # a platform without this limit still has the deadline
        resource.setrlimit(resource.RLIMIT_AS, (memory_limit, memory_limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _limit_processor(seconds: float) -> None:
    """Let the kernel kill this process once it has used `seconds` more: it ends even if the process that should kill it is gone."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    soft = math.ceil(usage.ru_utime + usage.ru_stime + seconds) + 1
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    if hard == resource.RLIM_INFINITY or soft < hard:
        resource.setrlimit(resource.RLIMIT_CPU, (soft, hard))


def _parsed(text: str) -> Any:
    """The sympy object that a cleaned answer means, or None."""
    text = _E_NOTATION.sub(r"\\cdot 10^{\1}", text.replace(r"\cr", r"\\"))
    if _TRIGONOMETRY.search(text):
        text = _DEGREES.sub(r"(\\frac{\1\\pi}{180})", text)
    text = text.replace("°", "")
    found = parse("\\boxed{" + text + "}", _BOX, fallback_mode="no_fallback", parsing_timeout=None)
    return found[0] if found else None


def _close(gold: Any, answer: Any) -> bool:
    """Whether two numbers agree relative to their size: math-verify rounds to six places, and 2e-8 is not 1e-8."""
    try:
        first, second = complex(gold), complex(answer)
    except (TypeError, ValueError, OverflowError, AttributeError):
        return True  # no numbers: what algebra said stands
    return abs(first - second) <= _RELATIVE_ERROR * max(abs(first), abs(second))


def algebra(gold: str, answer: str) -> bool:
    """Whether two formulas in LaTeX are equal, by math-verify with the gold in a box. Never None, may take for ever."""
    first, second = _parsed(gold), _parsed(answer)
    if first is None or second is None or verify(first, second, timeout_seconds=None) is not True:
        return False
    return _close(first, second)


algebra("x+1", "1+x")  # workers are forked from a server that imported this: none of them starts with cold parser tables


def compare_in_worker(gold: str, answer: str, deadline: float) -> bool:
    """`zppo.grading.equality.compare` with algebra; `deadline` in seconds bounds the processor time from within."""
    _limit_processor(deadline)
    return compare(gold, answer, algebra) is True
