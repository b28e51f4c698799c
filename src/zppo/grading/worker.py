"""What runs in a worker process: algebra with latex2sympy and sympy, and expressions of a user's over model text.

Imports no other part of the package than the typed rules.

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

import sympy
from latex2sympy2_extended import latex2sympy
from latex2sympy2_extended.latex2sympy2 import ConversionConfig
from sympy.functions.elementary.hyperbolic import HyperbolicFunction

from zppo.grading.equality import compare
from zppo.grading.units import ratio

# Mixed numbers are rewritten before; R is not r.
_CONVERSION = ConversionConfig(interpret_as_mixed_fractions=False, lowercase_symbols=False)
_E_NOTATION = re.compile(r"(?<=\d)[eE]([-+]?\d+)")
_TRIGONOMETRY = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)")
_DEGREES = re.compile(r"(\d+(?:\.\d+)?)°")
_MIXED = re.compile(r"(?<![\d.}_^\w])(\d+)\\frac\{(\d+)\}\{(\d+)\}")
_SIDE_BY_SIDE = re.compile(r"(?<=[\d)])(?=\()|(?<=\\pi)(?=\()|(?<=\))(?=\d|\\frac)")  # a product; its grammar adds two integers
_BINOMIAL = re.compile(r"(\\binom\{[^{}]*\}\{[^{}]*\})(?=[\d(])")
_PRIME = re.compile(r"([a-zA-Z])('+)")
_BASED = re.compile(r"\d\)?_\{?\d")
_CIS = re.compile(r"\\cis(?![a-zA-Z]) ?(\([^()]*\)|\d+°?|\\frac\{[^{}]*\}\{[^{}]*\})")


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


def _mixed(match: re.Match[str]) -> str:
    """`2\\frac{1}{2}` is a mixed number where the fraction is a proper one, else a product."""
    whole, above, below = match.groups()
    return rf"({whole}+\frac{{{above}}}{{{below}}})" if int(above) < int(below) else rf"{whole}\cdot\frac{{{above}}}{{{below}}}"


def _parsed(text: str) -> Any:
    """The exact sympy object that a cleaned answer means, decimals as fractions; None where it cannot be read."""
    text = _E_NOTATION.sub(r"\\cdot 10^{\1}", text.replace(r"\cr", r"\\"))
    text = _CIS.sub(r"(\\cos \1+i\\sin \1)", text)
    if _TRIGONOMETRY.search(text):
        text = _DEGREES.sub(r"(\\frac{\1\\pi}{180})", text)
    text = _MIXED.sub(_mixed, text.replace("°", ""))
    if r"\sqrt[" not in text:
        text = text.replace("[", "(").replace("]", ")")
    text = _BINOMIAL.sub(r"\1\\cdot ", _SIDE_BY_SIDE.sub(r"\\cdot ", text))
    text = _PRIME.sub(lambda match: rf"{match[1]}_{{prime{len(match[2])}}}", text)
    try:
        found = latex2sympy(text, is_real=True, normalization_config=None, conversion_config=_CONVERSION)
    except Exception:  # whatever its grammar or sympy say of a text that a model wrote
        return None
    if not isinstance(found, sympy.Basic):
        return found
    # dy/dx of a y that no x is in is a name, and not 0
    found = found.xreplace({d: sympy.Symbol(str(d)) for d in found.atoms(sympy.Derivative) if not d.expr.free_symbols & set(d.variables)})
    return found.xreplace({decimal: sympy.Rational(str(decimal)) for decimal in found.atoms(sympy.Float)})


def _with_imaginary_unit(gold: Any, answer: Any) -> tuple[Any, Any]:
    """Both with `i` as the imaginary unit, unless a `j` beside it says that it is a vector or an index."""
    names = {symbol.name for side in (gold, answer) for symbol in side.free_symbols}
    if "i" not in names or "j" in names:
        return gold, answer
    unit = {symbol: sympy.I for side in (gold, answer) for symbol in side.free_symbols if symbol.name == "i"}
    return gold.xreplace(unit), answer.xreplace(unit)


def _exactly_equal(gold: Any, answer: Any) -> bool:
    """Whether two expressions without decimals are equal, by proof: no float ever says so."""
    gold, answer = (sympy.sympify(side.doit()) for side in _with_imaginary_unit(gold, answer))
    said = gold.equals(answer)
    if said is None:
        said = sympy.simplify(gold - answer) == 0
    if said or not (gold.free_symbols and gold.free_symbols == answer.free_symbols):
        return bool(said)
    if gold.has(HyperbolicFunction) or answer.has(HyperbolicFunction):
        return bool(sympy.simplify((gold - answer).rewrite(sympy.exp)) == 0)
    roots = any(not power.exp.is_integer for side in (gold, answer) for power in side.atoms(sympy.Pow))
    return roots and _equal_where_real(gold, answer)


def _equal_where_real(gold: Any, answer: Any) -> bool:
    """Whether two expressions with roots are equal for positive variables, and for no sign of one are both real and different.

    \\sqrt{v/g} is \\sqrt{v}/\\sqrt{g} to whoever asks for a speed; \\sqrt{x^2} is not x.
    """
    symbols = sorted(gold.free_symbols, key=str)
    positive = {symbol: sympy.Symbol(symbol.name, positive=True) for symbol in symbols}
    if not gold.xreplace(positive).equals(answer.xreplace(positive)):
        return False
    for negative in symbols:
        at = {symbol: sympy.Rational(-7 if symbol == negative else 11 + index, 5) for index, symbol in enumerate(symbols)}
        values = [sympy.N(side.subs(at), 30) for side in (gold, answer)]
        if all(value.is_real for value in values) and abs(values[0] - values[1]) > 1e-12 * abs(values[0]):
            return False
    return True


def _same_relation(gold: Any, answer: Any) -> bool:
    """Whether two equations or inequalities say the same: their sides differ by a constant factor, by a positive one in inequalities."""
    if isinstance(gold, sympy.Eq | sympy.Ne) or isinstance(answer, sympy.Eq | sympy.Ne):
        if type(gold) is not type(answer):
            return False
        first, second = gold.lhs - gold.rhs, answer.lhs - answer.rhs
    else:
        if isinstance(gold, sympy.Lt | sympy.Gt) != isinstance(answer, sympy.Lt | sympy.Gt):
            return False
        first, second = gold.lts - gold.gts, answer.lts - answer.gts
    first, second = _with_imaginary_unit(first, second)
    if _exactly_equal(first, second):
        return True
    ratio = sympy.cancel(sympy.simplify(first / second)) if second != 0 else sympy.nan
    if not (ratio.is_number and ratio.is_finite and ratio != 0):
        return False
    return isinstance(gold, sympy.Eq | sympy.Ne) or bool(ratio > 0)


def _same_set(gold: Any, answer: Any) -> bool:
    """Whether two sets are equal; where that needs more than their ends and items, sympy's own form of them decides."""
    if isinstance(gold, sympy.Interval) and isinstance(answer, sympy.Interval):
        ends = gold.left_open == answer.left_open and gold.right_open == answer.right_open
        return bool(ends) and _exactly_equal(gold.start, answer.start) and _exactly_equal(gold.end, answer.end)
    if isinstance(gold, sympy.FiniteSet) and isinstance(answer, sympy.FiniteSet):
        left = list(answer.args)
        for item in gold.args:
            match = next((other for other in left if _equal(item, other)), None)
            if match is None:
                return False
            left.remove(match)
        return not left
    return bool(gold == answer or sympy.simplify(gold) == sympy.simplify(answer))


def _equal(gold: Any, answer: Any) -> bool:
    """Whether two objects of sympy are of one kind and equal."""
    for kind, same in ((sympy.Expr, _exactly_equal), (sympy.core.relational.Relational, _same_relation), (sympy.Set, _same_set)):
        if isinstance(gold, kind) or isinstance(answer, kind):
            return isinstance(gold, kind) and isinstance(answer, kind) and same(gold, answer)
    if isinstance(gold, sympy.MatrixBase) and isinstance(answer, sympy.MatrixBase):
        return gold.shape == answer.shape and all(map(_equal, gold, answer))
    return bool(gold == answer)


def algebra(gold: str, answer: str) -> bool:
    """Whether two formulas in LaTeX are equal. Never None, may take for ever."""
    if _BASED.search(gold) or _BASED.search(answer):
        return False  # figures in some base are compared as figures, before
    first, second = _parsed(gold), _parsed(answer)
    return first is not None and second is not None and _equal(first, second)


def value(text: str) -> str | None:
    """A constant ("\\frac{\\pi}{3}") as a decimal of 40 digits; None for anything else. May take for ever."""
    found = None if _BASED.search(text) else _parsed(text)
    if not isinstance(found, sympy.Expr) or found.free_symbols:
        return None
    number = sympy.N(found.doit(), 40)
    return str(number) if number.is_Float or number.is_Integer else None


# Workers are forked from a server that imported this: none of them starts with cold parser tables or units.
algebra("x+1", "1+x")
ratio((("kilometer", 1),), (("meter", 1),))


def compare_in_worker(gold: str, answer: str, rounded_golds: bool, deadline: float) -> bool:
    """`zppo.grading.equality.compare` with algebra; `deadline` in seconds bounds the processor time from within."""
    _limit_processor(deadline)
    return compare(gold, answer, algebra, value, rounded_golds) is True


def search_in_worker(pattern: str, text: str, deadline: float) -> str | None:
    """What the group of the last match of an expression holds, None without a match; it may backtrack for ever, but for `deadline`."""
    _limit_processor(deadline)
    found = None
    for match in re.finditer(pattern, text):
        found = match[1] if match[1] is not None else found
    return found
