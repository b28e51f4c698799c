"""The words shown to models: one jinja2 file per text, each replaceable by a path.

What the texts say follows method.md sections 3, 4 and 7; the wording is ours.
"""

from __future__ import annotations

import importlib.resources
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import jinja2
import jinja2.meta
import jinja2.nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from zppo.core.types import PLAIN, Draft, Message, Question
from zppo.errors import DataError, SettingsError, TemplateError
from zppo.names import CLOSINGS, check_file, readable
from zppo.prompts.neutralise import TAGS, Neutraliser

CLOSING = "closing"
COMPRESSION = "compression"
JUDGE = "judge"
HINTING = "hinting"
PRIVILEGED = "privileged"
"""What a student is shown that teaches itself (SDPO, OPSD)."""

VARIABLES: Mapping[str, frozenset[str]] = MappingProxyType(
    {
        CLOSING: frozenset(),
        "bcq": frozenset({"candidates"}),
        "ncq": frozenset({"answers", "candidates", "counts", "answer_form"}),
        COMPRESSION: frozenset({"response", "has_answer", "answer_form"}),
        JUDGE: frozenset({"question", "gold", "completion"}),
        "hint": frozenset({"hint"}),
        HINTING: frozenset({"question", "response", "answer_form"}),
        "lte": frozenset({"answers", "truncated", "answer_form"}),
        "partial": frozenset({"beginning"}),
        PRIVILEGED: frozenset({"solution"}),
    }
)
"""The bundled templates and the variables that each of them may use; `answer_form` is box, line or own (`WrittenForm.kind`)."""

_INVENTED: tuple[tuple[str, Mapping[str, Any]], ...] = (
    ("bcq", {"candidates": ["one", "two"]}),
    ("ncq", {"candidates": ["one"], "answers": []}),
    ("ncq", {"candidates": ["one", "two", "one"], "answers": ["1", "2"]}),
    ("ncq", {"candidates": ["one", "two"], "answers": ["1", "2"], "counts": [2, 1]}),
    (COMPRESSION, {"response": "one", "has_answer": True}),
    (COMPRESSION, {"response": "one", "has_answer": False}),
    (JUDGE, {"question": "why?", "gold": "so", "completion": "so"}),
    ("hint", {"hint": "look"}),
    (HINTING, {"question": "why?", "response": "so"}),
    ("lte", {"answers": [], "truncated": True}),
    ("lte", {"answers": ["1", "2"], "truncated": False}),
    ("partial", {"beginning": "so"}),
    (PRIVILEGED, {"solution": "so"}),
)
_TAG = re.compile(r"</?\s*([A-Za-z][\w.:-]*)(?:\s[^<>]*?)?/?>")  # in a template
_NOT_A_KIND = frozenset({PLAIN, CLOSING, COMPRESSION, JUDGE, HINTING})
_BETWEEN = "\n\n"


class WrittenForm(Protocol):
    """How the answers of a run are written (`zppo.grading.answer_form.AnswerForm`): `kind` is box, line or own."""

    @property
    def kind(self) -> str: ...

    @property
    def place(self) -> str: ...

    def written(self, answer: str) -> str: ...


class _Boxed:
    """Answers in boxes after the thoughts, as in the paper."""

    kind = "box"
    place = "after-thoughts"

    def written(self, answer: str) -> str:
        return f"\\boxed{{{answer}}}"


class PromptBook:
    """Renders every prompt of a run.

    Images stay with the question, once: its markers (`core.types.IMAGE`) stay where they are, model text holds none (it is neutralised),
    and what is asked about texts alone, compression and judging, shows none.

    A template is jinja2 text; values are inserted as they are and never rendered again, so template syntax in them is
    inert.
    """

    def __init__(
        self,
        overrides: Mapping[str, str | Path] | None = None,
        neutralise: Callable[[str], str] = lambda text: text,
        form: WrittenForm | None = None,
        examples: Sequence[Message] = (),
    ) -> None:
        """Reads and checks every template.

        Args:
            overrides: name -> path of a file, or for the closing instruction one of `zppo.names.CLOSINGS`, that replaces the bundled
                template of that name; a new name adds the template of a reformulation of one's own, called like its `Draft.kind`. `~` is
                expanded.
            neutralise: makes model text harmless (`Neutraliser` with the special texts of student and teacher); it breaks the tags too
                that stand in the overrides; not those that an answer is written in, which belong to the candidates.
            form: how answers are written, in lists of answers and in what is said about summaries and hints; None for boxes.
            examples: turns of worked examples, which every prompt that asks a question shows before it.

        Raises:
            TemplateError: a file is missing or not UTF-8 text, has a syntax error, or uses a variable that its prompt
                does not have.
        """
        self._neutralise = neutralise
        self._form, self.examples = form or _Boxed(), tuple(examples)
        self._paths = _bundled() | {name: _path(name, path) for name, path in (overrides or {}).items()}
        if PLAIN in self._paths:
            raise TemplateError(
                f"The template {PLAIN!r} ({self._paths[PLAIN]}) would never be shown: a plain prompt is the question "
                f"and the closing instruction. Override {CLOSING!r} instead."
            )
        self._environment = ImmutableSandboxedEnvironment(
            loader=jinja2.FunctionLoader(self._load),
            undefined=jinja2.StrictUndefined,
            autoescape=False,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._environment.filters["written"] = self._form.written
        self._environment.globals["answer_form"] = self._form.kind
        for name in self._paths:
            self._check(name)
        written = [tag for name in overrides or {} for tag in _TAG.findall(_read(name, self._paths[name]))]
        own = {tag for tag in written if tag.lower() not in TAGS and f"<{tag}>" not in self._form.place}
        if own and isinstance(neutralise, Neutraliser):
            self._neutralise = neutralise.with_tags(sorted(own))
        self._closing = self._fill(CLOSING, {})

    def try_out(self) -> None:
        """Fills every bundled template's place once with invented values, the smallest and larger ones.

        Raises:
            TemplateError: one cannot be filled.
        """
        for name, values in _INVENTED:
            self._fill(name, values)

    def check_kinds(self, kinds: Iterable[str]) -> None:
        """Whether prompts of these kinds have a template. SettingsError where one has none."""
        for kind in kinds:
            if kind not in self._paths:
                raise SettingsError(f"the method asks again with {kind!r}, which has no template: add prompts.{kind} to the recipe")

    def check_used(self, kinds: Iterable[str]) -> None:
        """Whether every template has a prompt that shows it, one of zppo's or of these kinds. TemplateError where one has none."""
        known = [*dict.fromkeys([*VARIABLES, *kinds])]
        for name in self.names():
            if name not in known:
                raise TemplateError(
                    f"prompts.{name}: no prompt of this run is called {name!r}, so the template would never be shown (known: "
                    f"{', '.join(known)}); mend the name, or leave it out"
                )

    def names(self) -> tuple[str, ...]:
        """All templates, sorted by name."""
        return tuple(sorted(self._paths))

    def plain(self, question: Question) -> tuple[Message, ...]:
        """The question and the closing instruction (method.md section 7). DataError if the last turn is not a user's."""
        return self._ask(question, "")

    def render(self, draft: Draft) -> tuple[Message, ...]:
        """The question, the template named by `draft.kind` filled with the slots, the closing instruction (Alg. 1).

        A draft without slots whose kind has no template shows nothing but the question (Prefix, placebo): a plain prompt.
        Every string in the slots, nested ones too, is neutralised and stripped of surrounding white space first; the
        question is the user's own text and stays as it is.

        Raises:
            TemplateError: no template of that name, or it uses a variable that the slots lack.
            DataError: the question's last turn is not a user's.
        """
        if not draft.slots and draft.kind not in self._paths:
            return self._ask(draft.question, "")
        if draft.kind in _NOT_A_KIND or draft.kind not in self._paths:
            known = ", ".join(name for name in self.names() if name not in _NOT_A_KIND)
            raise TemplateError(
                f"There is no template for prompts of the kind {draft.kind!r} (known: {known}). "
                f"Name a file for {draft.kind!r} among the template overrides."
            )
        return self._ask(draft.question, self._fill(draft.kind, {k: self._clean(v) for k, v in draft.slots.items()}))

    def compression(self, response: str, has_answer: bool) -> tuple[Message, ...]:
        """The request to compress one completion (method.md section 4); without an answer it asks for no box."""
        text = self._fill(COMPRESSION, {"response": self._clean(response), "has_answer": has_answer})
        return (Message("user", text),)

    def hinting(self, question: Question, response: str) -> tuple[Message, ...]:
        """The request to turn a correct response into a hint (Alg. 5); the question is shown as its last turn, whose
        images go along (`core.parts.last_turn_images`)."""
        values = {"question": question.messages[-1].content, "response": self._clean(response)}
        return (Message("user", self._fill(HINTING, values)),)

    def judge(self, question_text: str, gold: str, completion: str) -> tuple[Message, ...]:
        """The request to compare one completion with the gold (method.md section 7).

        All three are neutralised: what is compared is changed in the same way, and no text of a data file can pose as another block.
        """
        values = {"question": self._clean(question_text), "gold": self._clean(gold), "completion": self._clean(completion)}
        return (Message("user", self._fill(JUDGE, values)),)

    def stated(self, answer: str) -> str:
        """The shortest response that gives this answer."""
        written = self._form.written(answer)
        return f"The answer is {written}." if self._form.kind == "box" else f"It follows.\n{written}"

    def text(self, name: str, values: Mapping[str, Any]) -> str:
        """The template of this name filled with the values, neutralised like slots; no question, no closing instruction.

        Raises:
            TemplateError: no template of that name, or it uses a variable that it is not given.
        """
        if name not in self._paths:
            raise TemplateError(f"There is no template {name!r}; name a file for it among the template overrides.")
        return self._fill(name, {key: self._clean(value) for key, value in values.items()})

    def _ask(self, question: Question, text: str) -> tuple[Message, ...]:
        if not question.messages or question.messages[-1].role != "user":
            last = f"a turn of the role {question.messages[-1].role!r}" if question.messages else "no turn at all"
            raise DataError(
                f"The conversation of question {question.id!r} ends with {last}, but it must end with the user's turn "
                "that asks. Remove what follows that turn, or drop the question."
            )
        *before, last_turn = question.messages
        if self.examples:
            told = 1 if question.messages[0].role == "system" else 0
            before[told:told] = self.examples
        parts = (last_turn.content.rstrip(), text, self._closing)
        return (*before, Message("user", _BETWEEN.join(part for part in parts if part)))

    def _clean(self, value: Any) -> Any:
        """The value with every string in it neutralised and stripped."""
        if isinstance(value, str):
            return self._neutralise(value).strip()
        if isinstance(value, Mapping):
            return {key: self._clean(inner) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return [self._clean(inner) for inner in value]
        return value

    def _load(self, name: str) -> tuple[str, str, Callable[[], bool]] | None:
        if name not in self._paths:
            return None
        return _read(name, self._paths[name]), _frame(name), lambda: True

    def _check(self, name: str) -> None:
        """Compiles a template now, so that a mistake in it shows before anything is sampled."""
        try:
            self._environment.get_template(name)
        except jinja2.TemplateSyntaxError as error:
            raise TemplateError(
                f"{self._paths.get(error.name or name, name)}, line {error.lineno}: the template {name!r} cannot be parsed: "
                f"{error.message}. Mend that line; see https://jinja.palletsprojects.com/templates/."
            ) from error
        if name not in VARIABLES:
            return
        tree = self._environment.parse(_read(name, self._paths[name]))
        unknown = jinja2.meta.find_undeclared_variables(tree) - VARIABLES[name]
        for used in tree.find_all(jinja2.nodes.Name):
            if used.name in unknown:
                has = ", ".join(sorted(VARIABLES[name])) or "none"
                raise TemplateError(
                    f"{self._paths[name]}, line {used.lineno}: the template {name!r} uses the variable {used.name!r}, "
                    f"which it is not given (its variables: {has}). Use one of these, or remove it."
                )

    def _fill(self, name: str, values: Mapping[str, Any]) -> str:
        try:
            return self._environment.get_template(name).render(values).strip()
        except Exception as error:  # a template may run any expression, so any exception may come out of it
            has = ", ".join(sorted(values)) or "none"
            raise TemplateError(
                f"{self._paths[name]}, line {_line(error, self._paths)}: the template {name!r} cannot be filled: "
                f"{error} (its variables: {has}). Mend that line."
            ) from error


def _path(name: str, path: str | Path) -> Path:
    """The file of an override."""
    if name == CLOSING and str(path) in CLOSINGS:
        return _bundled()[CLOSING].with_name(f"{CLOSING}.jinja" if str(path) == "think-boxed" else f"{CLOSING}_{path}.jinja")
    return Path(path).expanduser()


def _bundled() -> dict[str, Path]:
    folder = Path(str(importlib.resources.files("zppo.prompts")))
    return {name: folder / f"{name}.jinja" for name in VARIABLES}


def _read(name: str, path: Path) -> str:
    check_file(path, TemplateError)
    try:
        return readable(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        mend = "Give the path of a UTF-8 text file, or leave the override out"
        if name == CLOSING:
            mend = f"Take one that comes with zppo ({', '.join(CLOSINGS)}), or give the path of a UTF-8 text file"
        elif name not in VARIABLES:
            mend += f"; zppo's own texts are called {', '.join(VARIABLES)}"
        raise TemplateError(f"The template {name!r} cannot be read from {path}: {error}. {mend}.") from error


def _frame(name: str) -> str:
    """How a template is called in tracebacks."""
    return f"<template {name}>"


def _line(error: BaseException, paths: Mapping[str, Path]) -> int | str:
    """The innermost template line in the error's traceback."""
    files = {_frame(name) for name in paths}
    line: int | str = "?"
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename in files:
            line = trace.tb_lineno
        trace = trace.tb_next
    return line
