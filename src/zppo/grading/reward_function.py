"""A user's own reward function, named in the recipe by its import path."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from zppo.errors import RewardError
from zppo.grading.answer_form import AnswerForm
from zppo.grading.grader import Verdict
from zppo.names import load_object

if TYPE_CHECKING:
    from zppo.core.types import Question

_WANTED = "return (correct, reward), a mapping with 'correct' and 'reward', or a number (correct then means reward >= 1)"


class RewardFunction:
    """Calls a user's function `(completion, question)` and makes a verdict of what it returns (method.md section 7).

    Args:
        function: returns `(correct, reward)`, a mapping with `correct`, `reward` or both (and `answer`, `reason`, if it
            likes), or a bare number; a bare number means correct = reward >= 1.
        name: what errors call it.
        form: where the answer of a completion stands; None for the last box after the thoughts.
    """

    def __init__(self, function: Callable[[str, Any], object], name: str = "", form: AnswerForm | None = None) -> None:
        self._function, self._form = function, form or AnswerForm()
        self.name = name or getattr(function, "__qualname__", repr(function))

    def __call__(self, completion: str, question: Question, think_open: bool = False) -> Verdict:
        """The verdict on one completion; its answer is found as the rules find it unless the function names another.

        Raises:
            RewardError: the function raised, or returned something that is no reward, NaN and infinity included.
        """
        try:
            result = self._function(completion, question)
        except Exception as error:
            raise RewardError(
                f"reward function {self.name} failed on question {question.id!r} with {type(error).__name__}: {error}. Mend it there."
            ) from error
        answer: object = self._form.find(completion, think_open)
        reason: object = "reward"
        if isinstance(result, Mapping):
            answer, reason = result.get("answer", answer), result.get("reason", reason)
        if (answer is not None and not isinstance(answer, str)) or not isinstance(reason, str):
            raise self._bad(result, question, "its 'answer' or 'reason' is no text")
        correct, reward = self._judged(result, question)
        return Verdict(correct=correct, answer=answer, reason=reason, reward=reward)

    def _bad(self, result: object, question: Question, cause: str) -> RewardError:
        shown = repr(result)
        shown = shown if len(shown) <= 200 else shown[:200] + "..."
        return RewardError(f"reward function {self.name} returned {shown} for question {question.id!r}: {cause}. It must {_WANTED}.")

    def _judged(self, result: object, question: Question) -> tuple[bool, float]:
        """(correct, reward) of what the function returned."""
        if isinstance(result, Mapping):
            if "correct" not in result and "reward" not in result:
                raise self._bad(result, question, "the mapping has neither 'correct' nor 'reward'")
            correct, reward = result.get("correct"), result.get("reward")
            if "reward" not in result:
                reward = _flag(correct)
            elif "correct" not in result:
                return self._judged(reward, question)
        elif isinstance(result, tuple | list):
            if len(result) != 2:
                raise self._bad(result, question, f"it has {len(result)} items, not 2")
            correct, reward = result
        else:
            number = _number(result)
            if number is None:
                raise self._bad(result, question, "it is no finite number")
            return number >= 1, number
        flag, number = _flag(correct), _number(reward)
        if flag is None:
            raise self._bad(result, question, "'correct' is neither True nor False")
        if number is None:
            raise self._bad(result, question, "'reward' is no finite number")
        return flag, number


def _number(value: object) -> float | None:
    """A finite float of a number or a scalar array; None for anything else (text that reads like a number too)."""
    if value is None or isinstance(value, str | bytes):
        return None
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return None
    return number if math.isfinite(number) else None


def _flag(value: object) -> bool | None:
    """True or False of a bool, 0, 1 or a scalar array of one of them; None for anything else."""
    number = _number(value)
    return {0.0: False, 1.0: True}.get(number) if number is not None else None


def load_reward(spec: str, form: AnswerForm | None = None) -> RewardFunction:
    """The reward function that a recipe names.

    Args:
        spec: "package.module:function" or "path/to/file.py:function"; the function may be an attribute ("Class.method").
        form: see `RewardFunction`.

    Raises:
        RewardError: the form, the module or the function is wrong; the message says which.
    """
    function = load_object(spec, "reward function", RewardError)
    if inspect.isclass(function):
        raise RewardError(f"reward function {spec!r} is a class: name a function, a method, or an object that can be called")
    coroutine = any(inspect.iscoroutinefunction(f) for f in (function, getattr(function, "__call__", None)))  # noqa: B004 - not whether
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # of a compiled function
        return RewardFunction(function, spec, form)
    try:
        signature.bind("", None)
        fits = True
    except TypeError:
        fits = False
    check_form(spec, list(signature.parameters), fits, coroutine)
    return RewardFunction(function, spec, form)


def check_form(spec: str, parameters: Sequence[str], fits: bool, coroutine: bool) -> None:
    """Refuses functions that are made for another trainer, with how to bring them here.

    Args:
        spec: as in a recipe.
        parameters: their names.
        fits: two positional arguments can be given.
        coroutine: it is an `async def`.

    Raises:
        RewardError: it cannot be called with (completion, question).
    """
    what, name = f"reward function {spec!r}", spec.rpartition(":")[2].rpartition(".")[2]
    call, wait = f"{name}({', '.join(parameters)})", ("asyncio.run(", ")") if coroutine else ("", "")
    mend = ""
    if "completions" in parameters:  # TRL's: lists of all completions, and of the columns of their rows
        columns = "".join(f", {n}=[question.gold]" for n in parameters if n in _GOLDS)
        prompts = "prompts=[question.messages[-1].content], " if "prompts" in parameters else ""
        what += f" has the form of TRL, {call}"
        mend = f"{wait[0]}{name}({prompts}completions=[completion]{columns}){wait[1]}[0]"
    elif {"solution_str", "ground_truth"} <= set(parameters):  # verl's
        what += f" has the form of verl, {call}"
        source = "data_source='', " if "data_source" in parameters else ""
        mend = f"{wait[0]}{name}({source}solution_str=completion, ground_truth=question.gold){wait[1]}"
    elif coroutine:
        what += " is an async function"
        mend = f"asyncio.run({name}(completion, question))"
    elif not fits:
        raise RewardError(f"{what} cannot be called with (completion, question): it is {call}. Give it these two arguments")
    if mend:
        raise RewardError(
            f"{what}; here a function takes one completion and its question, and returns (correct, reward) or a number. Name one that "
            f"calls it: def {'reward' if name == 'score' else 'score'}(completion, question): return {mend}"
        )


_GOLDS = ("answer", "answers", "gold", "gold_answer", "ground_truth", "label", "solution", "target")
"""How columns with the right answer are called."""
