"""A user's own reward function, named in the recipe by its import path: which form it has, how it is called, what it returned.

A function may be of this project's form (one completion and its question), of TRL's (lists of completions and of columns) or of verl's
(one completion and its right answer), plain or async; an object that can be called, or a class that is one when made without arguments.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, NoReturn

from zppo.errors import RewardError
from zppo.grading.answer_form import AnswerForm
from zppo.grading.grader import Verdict
from zppo.names import load_object

if TYPE_CHECKING:
    from zppo.core.types import Gold, Question

_WANTED = "return (correct, reward), a mapping with 'correct' and 'reward', or a number (correct then means reward >= 1)"
_WANTED_OF_LISTS = "return one number (or None, where it does not apply) for each completion"

Form = Literal["zppo", "trl", "verl"]

GOLD_NAMES = (
    *("answer", "answers", "correct_answer", "expected", "expected_answer", "final_answer", "gold", "gold_answer", "golden_answer", "gt"),
    *("ground_truth", "label", "reference", "reference_answer", "solution", "target", "truth", "y_true"),
)
"""How parameters with the right answer are called: a function of TRL's form is given it under these names too."""
_QUESTIONS = ("prompt", "question", "query", "problem", "messages", "data_source")
_TRL = ("prompts", "completions", "completion_ids")


@dataclass(frozen=True, slots=True)
class Batch:
    """Completions that are rewarded together.

    Attributes:
        completions, questions: one of each for each completion; `think_open` as `extract_boxed` takes it.
        ids: their tokens.
        state: `trainer_state` of TRL's form.
        log_metric: takes numbers that functions of TRL's form report by name.
    """

    completions: Sequence[str]
    questions: Sequence[Question]
    think_open: Sequence[bool] = ()
    ids: Sequence[Sequence[int]] = ()
    state: Any = None
    log_metric: Callable[[str, float], None] = field(default=lambda name, value: None)


class Call(NamedTuple):
    """A function was called.

    Attributes:
        places: of the batch's completions that it was about.
        result: what it gave: a value, or something to wait for.
        notes: what it reported about each of them by name (`log_extra` of TRL's form).
    """

    places: tuple[int, ...]
    result: Any
    notes: Mapping[str, Sequence[Any]]


class Reward(NamedTuple):
    """What a function says of one completion; `answer` is missing where it names none."""

    correct: bool
    reward: float
    answer: Any = ...
    reason: str = "reward"


class RewardFunction:
    """Calls a user's function and makes rewards of what it returns (method.md section 7).

    Args:
        function: of one of the forms; see `Form`.
        name: what errors call it.
        answers: where the answer of a completion stands; None for the last box after the thoughts.
        form: how it is called.
        optional: it may return None, where it does not apply to a question.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        name: str = "",
        answers: AnswerForm | None = None,
        *,
        form: Form = "zppo",
        optional: bool = False,
    ) -> None:
        self._function, self._answers = function, answers or AnswerForm()
        self.form, self.optional = form, optional or form == "trl"
        self.name = name or getattr(function, "__qualname__", repr(function))
        self._parameters = _parameters(function)
        self._takes_all = any(p.kind is p.VAR_KEYWORD for p in self._parameters.values())

    def __call__(self, completion: str, question: Question, think_open: bool = False) -> Verdict:
        """The verdict of a function that is not async on one completion; it has the answer that the rules find, or the function names.

        Raises:
            RewardError: the function raised, or returned something that is no reward, NaN and infinity included.
        """
        batch = Batch([completion], [question], [think_open], [()])
        (call,) = self.calls(batch)
        (reward,) = self.rewards(call, batch)
        answer = self._answers.find(completion, think_open)
        if reward is None:
            return Verdict(correct=False, answer=answer, reason="reward does not apply", reward=0.0, graded=False)
        answer = answer if reward.answer is ... else reward.answer
        return Verdict(correct=reward.correct, answer=answer, reason=reward.reason, reward=reward.reward)

    def calls(self, batch: Batch) -> list[Call]:
        """Calls the function for all completions: for each by itself, or, in TRL's form, once for those that have the same form.

        Raises:
            RewardError: it raised.
        """
        if self.form == "trl":
            parts = [[i for i, q in enumerate(batch.questions) if q.chat == chat] for chat in (False, True)]
            return [self._call_on_lists(tuple(places), batch) for places in parts if places]
        one = self._call_like_verl if self.form == "verl" else self._function
        return [
            Call((i,), self._called(functools.partial(one, completion, question), question), {})
            for i, (completion, question) in enumerate(zip(batch.completions, batch.questions, strict=True))
        ]

    def rewards(self, call: Call, batch: Batch) -> list[Reward | None]:
        """What a call that is over says of each of its completions; None where the function does not apply.

        Raises:
            RewardError: it returned something that is no reward.
        """
        questions = [batch.questions[i] for i in call.places]
        if self.form != "trl":
            return [self._reward(call.result, questions[0])]
        values = _listed(call.result)
        if values is None or len(values) != len(questions):
            cause = "it is no list" if values is None else f"it has {len(values)} rewards, and {len(questions)} completions were given"
            self._bad(call.result, questions[0], cause)
        return [self._reward(value, question) for value, question in zip(values, questions, strict=True)]

    def failed(self, error: BaseException, question: Question) -> RewardError:
        """What is said where the function raised."""
        hint = ""
        if self.form == "trl" and isinstance(error, TypeError | AttributeError | KeyError):
            kind, other = ("lists of messages", "texts") if question.chat else ("texts", "lists of messages, as chats are")
            hint = f" It was given completions as {kind}, as the rows have their questions; it may count on {other}."
        said = type(error).__name__ + (f": {error}" if str(error) else "")
        return RewardError(f"reward function {self.name} failed on question {question.id!r} with {said}.{hint} Mend it there.")

    def check_columns(self, questions: Iterable[Question]) -> None:
        """Whether the questions have what a function of TRL's form asks for by name.

        Raises:
            RewardError: they lack a column.
        """
        if self.form != "trl":
            return
        given = {*_TRL, "trainer_state", "log_extra", "log_metric", *GOLD_NAMES}
        needed = [n for n, p in self._parameters.items() if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        left = [name for name in needed if name not in given]
        for question in questions if left else ():
            missing = next((name for name in left if name not in question.extra), None)
            if missing is not None:
                raise RewardError(
                    f"reward function {self.name} takes {missing!r}, and question {question.id!r} brings no column of that name: name the "
                    f"columns that it needs, with data.columns.extra: [{', '.join(left)}]"
                )

    def _called(self, call: Callable[[], Any], question: Question) -> Any:
        try:
            return call()
        except (Exception, SystemExit) as error:  # one that calls exit() does not end the run without a word
            raise self.failed(error, question) from error

    def _call_on_lists(self, places: tuple[int, ...], batch: Batch) -> Call:
        """As TRL calls it: everything by name, columns that the rows lack left out; the right answer under the names that it may have."""
        questions, texts = [batch.questions[i] for i in places], [batch.completions[i] for i in places]
        chat, notes = questions[0].chat, dict[str, Sequence[Any]]()
        golds = [_plain(question.gold) for question in questions]
        extra = dict.fromkeys(name for question in questions for name in question.extra)
        given = {
            **dict.fromkeys(GOLD_NAMES, golds),
            **{name: [question.extra.get(name) for question in questions] for name in extra},
            "prompts": [[m._asdict() for m in q.messages] if chat else q.messages[-1].content for q in questions],
            "completions": [[{"role": "assistant", "content": text}] for text in texts] if chat else texts,
            "completion_ids": [list(batch.ids[i]) for i in places],
            "trainer_state": batch.state,
            "log_extra": notes.__setitem__,
            "log_metric": batch.log_metric,
        }
        wanted = given if self._takes_all else {name: value for name, value in given.items() if name in self._parameters}
        return Call(places, self._called(functools.partial(self._function, **wanted), questions[0]), notes)

    def _call_like_verl(self, completion: str, question: Question) -> Any:
        given = {
            "data_source": question.extra.get("data_source", ""),
            "solution_str": completion,
            "ground_truth": question.extra.get("ground_truth", _plain(question.gold)),
            "extra_info": question.extra.get("extra_info", {}),
        }
        return self._function(**(given if self._takes_all else {n: v for n, v in given.items() if n in self._parameters}))

    def _bad(self, result: object, question: Question, cause: str) -> NoReturn:
        shown = repr(result)
        shown = shown if len(shown) <= 200 else shown[:200] + "..."
        wanted = _WANTED_OF_LISTS if self.form == "trl" else _WANTED
        raise RewardError(f"reward function {self.name} returned {shown} for question {question.id!r}: {cause}. It must {wanted}.")

    def _reward(self, result: object, question: Question) -> Reward | None:
        """What one value that the function returned says."""
        if result is None and self.optional:
            return None
        answer: object = ...
        reason: object = "reward"
        if isinstance(result, Mapping):
            if self.form == "verl" and "score" in result:
                result = {"reward": result["score"], "answer": result.get("pred", ...)} | (
                    {"correct": result["acc"]} if _flag(result.get("acc")) is not None else {}
                )
            answer, reason = result.get("answer", answer), result.get("reason", reason)
        if (answer is not None and answer is not ... and not isinstance(answer, str)) or not isinstance(reason, str):
            self._bad(result, question, "its 'answer' or 'reason' is no text")
        correct, reward = self._judged(result, question)
        return Reward(correct, reward, answer, reason)

    def _judged(self, result: object, question: Question) -> tuple[bool, float]:
        """(correct, reward) of what the function returned."""
        if isinstance(result, Mapping):
            if "correct" not in result and "reward" not in result:
                self._bad(result, question, "the mapping has neither 'correct' nor 'reward'")
            correct, reward = result.get("correct"), result.get("reward")
            if "reward" not in result:
                reward = _flag(correct)
            elif "correct" not in result:
                return self._judged(reward, question)
        elif isinstance(result, tuple | list):
            if len(result) != 2:
                self._bad(result, question, f"it has {len(result)} items, not 2")
            correct, reward = result
        else:
            number = _number(result)
            if number is None:
                self._bad(result, question, "it is no finite number")
            return number >= 1, number
        flag, number = _flag(correct), _number(reward)
        if flag is None:
            self._bad(result, question, "'correct' is neither True nor False")
        if number is None:
            self._bad(result, question, "'reward' is no finite number")
        return flag, number


def _plain(gold: Gold) -> Any:
    """A right answer as functions of other trainers take it: a text, or a list of several."""
    return gold if isinstance(gold, str) else list(gold.answers)


def _listed(value: object) -> list[Any] | None:
    """The items of a list, a tensor, an array or a generator; None for what is none of these."""
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
        return None
    try:
        return list(value.tolist() if hasattr(value, "tolist") else value)
    except TypeError:  # a tensor without a dimension
        return None


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


def load_reward(spec: str, answers: AnswerForm | None = None, *, optional: bool = False) -> RewardFunction:
    """The reward function that a recipe names.

    Args:
        spec: "package.module:function" or "path/to/file.py:function"; the function may be an attribute ("Class.method"), an object that
            can be called, or a class that gives one without arguments.
        answers, optional: see `RewardFunction`.

    Raises:
        RewardError: the form, the module or the function is wrong; the message says which.
    """
    function = load_object(spec, "reward function", RewardError)
    if inspect.isclass(function):
        function = _made(function, spec)  # type: ignore[arg-type]  # classes can be hashed
    return RewardFunction(function, spec, answers, form=form_of(function, spec), optional=optional)


@functools.cache  # a run looks at its functions before it loads anything, and one that holds a model is not made twice
def _made(kind: type, spec: str) -> Any:
    try:
        made = kind()
    except (Exception, SystemExit) as error:
        raise RewardError(
            f"reward function {spec!r} is a class, and cannot be made without arguments ({type(error).__name__}: {error}): give them "
            f"defaults, or name an object of it that your file makes"
        ) from error
    if not callable(made):
        raise RewardError(f"reward function {spec!r} is a class without __call__: name a function, a method, or give it __call__")
    return made


def _parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    """Its parameters by name; of a decorated function that passes everything on, those of what it decorates."""
    try:
        own = inspect.signature(function, follow_wrapped=False).parameters
        passes_on = own and all(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in own.values())
        return inspect.signature(function).parameters if passes_on else own
    except (TypeError, ValueError):  # of a compiled function
        return {}


def form_of(function: Callable[..., Any], spec: str) -> Form:
    """Which form a function has, by its parameters.

    Args:
        spec: as in a recipe.

    Raises:
        RewardError: it cannot be called in any form; the message says how to bring it here.
    """
    if hasattr(function, "forward") and hasattr(function, "state_dict"):  # of torch, which is not loaded for this
        raise RewardError(f"reward function {spec!r} is a model: name a function that gives it what it reads, and returns a number")
    parameters = _parameters(function)
    names = list(parameters)
    form: Form = "zppo"
    if {"completions", "completion_ids"} & set(names):
        form = "trl"
    elif "solution_str" in names:
        form = "verl"
    elif names and all(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        form = "trl"
    yields = _yields(function)
    if yields and (form != "trl" or yields == "async"):
        raise RewardError(f"reward function {spec!r} is a generator, since it has `yield`: give its rewards back with `return`")
    if form == "zppo" and parameters:
        _check_own_form(spec, parameters)
    return form


def _yields(function: Any) -> str:
    """Whether calling it gives a generator: "" for no, "async" for one of these."""
    while isinstance(function, functools.partial):
        function = function.func
    own = [function, getattr(function, "__call__", None), inspect.unwrap(function)]  # noqa: B004 - not whether
    if any(map(inspect.isasyncgenfunction, own)):
        return "async"
    return "plain" if any(map(inspect.isgeneratorfunction, own)) else ""


def _check_own_form(spec: str, parameters: Mapping[str, inspect.Parameter]) -> None:
    """Refuses functions that cannot be called with (completion, question), or that mean something else by their two arguments."""
    name = spec.rpartition(":")[2].rpartition(".")[2]
    call = f"{name}({', '.join(parameters)})"
    try:
        inspect.Signature(list(parameters.values())).bind("", None)
        fits = True
    except TypeError:
        fits = False
    needed = [n for n, p in parameters.items() if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    first, second, *_ = (*needed, "", "")
    what, mend = f"reward function {spec!r} is {call}", ""
    if {"reward_inputs", "reward_input"} & set(parameters):  # EasyR1's
        one = '{"response": completion, "response_length": len(completion), "ground_truth": question.gold}'
        mend = f'{name}([{one}])[0]["overall"]' if "reward_inputs" in parameters else f'{name}({one})["overall"]'
        what = f"reward function {spec!r} has the form of EasyR1, {call}"
    elif {"solution_strs", "ground_truths"} <= set(parameters):
        mend = f"{name}(data_sources=[''], solution_strs=[completion], ground_truths=[question.gold], extra_infos=[{{}}])[0]"
        what = f"reward function {spec!r} has the form of verl for batches, {call}"
    elif first in _QUESTIONS and second:
        rest = ", question.gold" if len(needed) > 2 and needed[2] in GOLD_NAMES else ""
        mend = f"{name}(question.messages[-1].content, completion{rest})"
    elif second in GOLD_NAMES:
        mend = f"{name}(completion, question.gold)"
    elif first in GOLD_NAMES and second:
        mend = f"{name}(question.gold, completion)"
    if mend:
        raise RewardError(
            f"{what}; here a function takes one completion and its question, in that order, and returns (correct, reward) or a number. "
            f"Name one that calls it: def {'reward' if name == 'score' else 'score'}(completion, question): return {mend}"
        )
    if not fits:
        raise RewardError(
            f"{what}, which cannot be called with (completion, question). Give it these two arguments, or the form of TRL "
            "(completions, **columns)"
        )
