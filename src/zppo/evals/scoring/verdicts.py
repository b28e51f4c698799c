"""From a model's reply to a decided row: the rules first, a judge where they cannot decide; what it is asked, and how it is read.

A judge's reply is read in our own form, one JSON object with a verdict or a score, or in the form that a benchmark's official prompt
asks for, so that such a prompt can be given by path. A reply that can be read in two ways is not read.

The words are ours (`prompts/eval_*.jinja`). Figures from ours are no leaderboard figures.
"""

from __future__ import annotations

import importlib.resources
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, get_args
from urllib.parse import urlsplit

from zppo.core.draws import draw_key
from zppo.core.types import IMAGE, Message
from zppo.engines.base import Sampling
from zppo.errors import EvaluationError
from zppo.evals.adapters.documents import DESCRIPTIVE_RUBRICS, REASONING_RUBRICS
from zppo.evals.benchmark import MODES, Benchmark, Judge
from zppo.evals.item import Item
from zppo.evals.journal import Journal
from zppo.evals.options import JUDGE_TOKENS, LONG_JUDGE_TOKENS, digest_of
from zppo.evals.results import BROKEN, MALFORMED, TOO_LONG, SampleResult
from zppo.evals.scoring.rules import SCORED_WHOLE, score
from zppo.grading.answer_form import BOXED, AnswerForm
from zppo.grading.grader import Grader
from zppo.grading.text import final_part
from zppo.prompts import Neutraliser, PromptBook
from zppo.prompts.book import JUDGE
from zppo.prompts.neutralise import IMAGE_TEXTS
from zppo.teacher.http import OPENAI_HOST
from zppo.teacher.interface import TeacherRequest, TeacherSampling
from zppo.teacher.judge import readable, strict_object
from zppo.teacher.remote import RemoteTeacher

_VERDICT = '{"verdict": "correct"} or {"verdict": "wrong"}'
_YES = {"yes": 1.0, "no": 0.0}
_TRUE = {"true": 1.0, "false": 0.0}
_RIGHT = {"correct": 1.0, "incorrect": 0.0, "wrong": 0.0}
_ONE = {"1": 1.0, "0": 0.0, "1.0": 1.0, "0.0": 0.0}
_GRADE = re.compile(r"0(?:\.\d{1,4})?|1(?:\.0{1,4})?", re.ASCII)
_LONGEST = 40_000  # characters of a reply that are parsed
_SHOWN = 2_000  # characters of an unreadable reply that its judge sees again, its end
_EDGE = " \t*_`\"'|,."  # what may stand around a value or the name of a field, in Markdown or JSON


@dataclass(frozen=True, slots=True)
class Form:
    """What a judge is read by.

    Attributes:
        own: key and values of our own form, which has no other key; no values: a number from 0 to 1.
        fields: names, any of which the official form gives its value: in a JSON object among others, or as a line `name: value`.
        words: what the official values come to; none: a number from 0 to 1.
        bare: official values that may also be the last line, without a name; True: any number from 0 to 1.
        last: values that may also be the last word of the reply, in these very letters.
        example: our own form, as a reminder shows it.
    """

    own: tuple[str, Mapping[str, float]] = ("verdict", MappingProxyType({"correct": 1.0, "wrong": 0.0}))
    fields: tuple[str, ...] = ()
    words: Mapping[str, float] = field(default_factory=dict)
    bare: Mapping[str, float] | Literal[True] = field(default_factory=dict)
    last: Mapping[str, float] = field(default_factory=dict)
    example: str = f"either {_VERDICT}"


FORMS: Mapping[Judge, Form] = MappingProxyType(
    {
        "judge": Form(),
        "eval_hle": Form(fields=("correct",), words=_YES | _TRUE),
        "eval_charxiv": Form(fields=("score", "score_T1"), words=_ONE, bare=_ONE),
        "eval_mmvu": Form(fields=("correctness", "correct"), words=_RIGHT | _TRUE | _YES | _ONE, bare=_ONE),
        "eval_mmvet": Form(("score", {}), ("correctness",), bare=True, example='such as {"score": 0.7}'),
        "eval_multichallenge": Form(
            ("verdict", _YES), ("verdict", "answer"), _YES, _YES, {"YES": 1.0, "NO": 0.0},
            example='either {"verdict": "yes"} or {"verdict": "no"}',
        ),
    }
)  # fmt: skip


def read_reply(judge: Judge, reply: str, think_open: bool = False) -> float | None:
    """The value in a judge's reply, 0 to 1; None where it has none, or several that differ.

    Args:
        judge: whose form; our own form is read for each of them.
        reply: the whole text, with or without thoughts.
        think_open: whether the prompt already ended inside an opened think block.
    """
    form = FORMS[judge]
    own = _own(form, strict_object(reply, think_open))
    if own is not None or not form.fields:
        return own
    text = final_part(reply, think_open) if len(reply) <= _LONGEST else None
    return None if text is None else _official(form, text.strip())


def reminder(judge: Judge, reply: str) -> tuple[Message, ...]:
    """The turns that follow an unreadable reply: it, without thoughts, and what a reply must be. Asked again in the very same words, a
    judge at temperature 0 would say the same.
    """
    said = (final_part(reply) or "").strip()[-_SHOWN:] or "..."
    asked = f"That cannot be read. Reply with one JSON object and nothing else, {FORMS[judge].example}."
    return Message("assistant", said), Message("user", asked)


def _own(form: Form, pairs: tuple[tuple[str, object], ...] | None) -> float | None:
    """The value of an object with our own key and no other."""
    key, words = form.own
    if not isinstance(pairs, tuple) or len(pairs) != 1 or pairs[0][0] != key:
        return None
    value = pairs[0][1]
    if words:
        return words.get(value) if isinstance(value, str) else None
    known = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1
    return float(value) if known and isinstance(value, int | float) else None


def _official(form: Form, text: str) -> float | None:
    fenced = re.fullmatch(r"```(?:json)?[ \t]*\n(.*)\n[ \t]*```", text, re.DOTALL)
    try:
        parsed = json.loads(fenced[1] if fenced else text, object_pairs_hook=tuple)
    except (ValueError, RecursionError):
        parsed = None
    if isinstance(parsed, tuple):
        found = [value for key, value in parsed if key in form.fields or key == form.own[0]]
        named = {key for key, _ in parsed} & {*form.fields}
        return _value(form, str(found[0])) if named and len(found) == 1 else None
    if isinstance(parsed, list):
        return None
    lines = [line for line in text.splitlines() if line.strip()]
    name = re.compile(rf"[^\w:]*(?:final )?(?:{'|'.join(form.fields)})[^\w:]*:(.*)", re.IGNORECASE)
    said = [match[1] for line in lines if (match := name.fullmatch(line))]
    bare = [line for line in lines if _bare(form, line) is not None]
    values = {_value(form, each) for each in said} | {_bare(form, each) for each in bare}
    ending = _ending(form, lines[-1]) if lines else None
    if ending is not None:
        values.add(ending)
    elif not said and (not bare or bare[-1] is not lines[-1]):
        return None
    return values.pop() if len(values) == 1 else None


def _value(form: Form, text: str) -> float | None:
    word = text.strip(_EDGE).lower()
    if form.words:
        return form.words.get(word)
    return float(word) if _GRADE.fullmatch(word) else None


def _bare(form: Form, line: str) -> float | None:
    """The value of a line that is nothing but one."""
    return _value(form, line) if form.bare is True else form.bare.get(line.strip(_EDGE).lower())


def _ending(form: Form, line: str) -> float | None:
    """The value that the last line's last word is; None where the line names several."""
    found = [word for word in re.findall(r"\w+", line) if word in form.last]
    return form.last[found[0]] if len(set(found)) == 1 and line.strip(_EDGE + "!").endswith(found[0]) else None


_MOST = 20_000  # characters of a response that a judge reads, its end; more is no answer
_WHOLE = 100_000  # of one that is read with its thoughts
_THOUGHTS_TOO: frozenset[Judge] = frozenset(("eval_hle",))
_RUBRICS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"eval_charxiv_reasoning": REASONING_RUBRICS, "eval_charxiv_descriptive": tuple(dict.fromkeys(DESCRIPTIVE_RUBRICS.values()))}
)


_NEUTRALISE = Neutraliser(IMAGE_TEXTS)  # the tokens of a judge on a server are not known


def judge_book(overrides: Mapping[str, str | Path] | None = None, neutralise: Callable[[str], str] = _NEUTRALISE) -> PromptBook:
    """The prompt book with the judges' templates, each replaceable by the path of a file. What a model wrote is neutralised.

    A judge with several modes has a template for each (`MODES`); a file for the judge itself stands for all of them. A template may use
    what `judge_slots` has; the shared one, `judge`, has its own variables (`zppo.prompts.book`).

    Raises:
        TemplateError: a file cannot be read, or uses another variable.
    """
    folder = Path(str(importlib.resources.files("zppo.evals"))) / "prompts"
    given = dict(overrides or {})
    paths: dict[str, str | Path] = {}
    for judge in get_args(Judge):
        for name in judge_templates(judge):
            path = given.get(name, given.get(judge))
            if name != JUDGE or path is not None:
                paths[name] = folder / f"{name}.jinja" if path is None else path
    # No more tags than the usual ones are broken: `<AND>` and `<OR>` of MM-Vet's words stand in its golds.
    book = PromptBook(paths, lambda text: neutralise(text))
    for name in paths.keys() - {JUDGE}:  # a mistake shows now, not after the model was asked everything
        for rubric in _RUBRICS.get(name, ("",)):
            book.text(name, dict.fromkeys(_TEXTS, "") | {"rubric": rubric, "options": ["", ""], "number": 1})
    return book


def judge_templates(judge: Judge) -> tuple[str, ...]:
    """Names of a judge's templates, one for each mode."""
    return MODES.get(judge, (judge,))


def template_of(judge: Judge, item: Item) -> str:
    """The template that asks a judge about an item: CharXiv by the part, MMVU by whether there are options."""
    if judge == "eval_charxiv":
        return f"{judge}_{item.facts['part']}"
    if judge == "eval_mmvu":
        return f"{judge}_{'choice' if item.options else 'open'}"
    return judge


_TEXTS = ("question", "gold", "response", "criterion", "kind", "category", "rubric")


def judge_slots(item: Item, asked: str, response: str) -> dict[str, Any]:
    """What the template of a benchmark's own judge may use.

    question, gold, response; criterion: MultiChallenge's target question; kind: of question, as the set calls it (CharXiv: reasoning or
    descriptive; HLE: exactMatch or multipleChoice; else multiple-choice or open-ended); category: of HLE, MMVU's discipline, MM-Vet's
    capabilities, MultiChallenge's axis; rubric: CharXiv's, by name; options: their texts; number: of CharXiv's question, 1 to 19, or of
    the kind of its answer, 1 to 4; 0 elsewhere.
    """
    facts = item.facts
    kind = facts.get("part") or facts.get("answer_type") or ("multiple-choice" if item.options else "open-ended")
    category = next((str(facts[name]) for name in ("category", "discipline", "capability", "axis") if facts.get(name)), "")
    return {
        "question": asked,
        "gold": " or ".join(item.golds).replace("<AND>", " <AND> ").replace("<OR>", " <OR> ").replace("  ", " "),
        "response": response,
        "criterion": str(facts.get("criterion", "")),
        "kind": str(kind),
        "category": category,
        "rubric": str(facts.get("rubric", "")),
        "options": list(item.options),
        "number": int(facts.get("question_type", 0)),
    }


def judge_request(
    benchmark: Benchmark, item: Item, completion: str, book: PromptBook, think_open: bool = False, form: AnswerForm = BOXED
) -> tuple[Message, ...]:
    """The request to judge one completion.

    A judge reads what follows the thinking; of a completion without an answer that can be read all, thoughts included
    (`zppo.teacher.judge.readable`), at most its last 20,000 characters. HLE's reads the whole response with its thoughts, at most 100,000.
    """
    gold = " or ".join(item.golds)
    asked = (item.asked.replace(IMAGE, "") if item.images else item.asked).strip()
    if "shown" in item.facts:  # the question stands in the picture, which a judge does not see
        asked = str(item.facts["shown"])
    # What is scored whole is an answer without a box too.
    whole = (final_part(completion, think_open) or "").strip() or None if item.kind in SCORED_WHOLE else None
    response = readable(completion, form.find(completion, think_open) or whole, think_open)[-_MOST:]
    if benchmark.judge == JUDGE:
        return book.judge(asked, gold, response)
    if benchmark.judge in _THOUGHTS_TOO:
        response = completion.strip()[-_WHOLE:]
    return (Message("user", book.text(template_of(benchmark.judge, item), judge_slots(item, asked, response))),)


def judge_score(benchmark: Benchmark, item: Item, reply: str, think_open: bool = False) -> float | None:
    """The score in a judge's reply, 0 to 1; None where the reply is malformed, which is an error of the judge, not of the model.

    Forms: `zppo.evals.scoring.verdicts`. MultiChallenge: the judge says yes or no, which is right if it is what the row wants.
    """
    value = read_reply(benchmark.judge, reply, think_open)
    if benchmark.judge == "eval_multichallenge" and value is not None:
        return float((value == 1.0) == (item.golds[0] == "yes"))
    return value


TURNS = 2  # replies of a judge that are read before its verdict is malformed
DOWN = 120.0  # seconds for which a judge is asked again


_NOT_ASKED = {TOO_LONG: "too long for the model's context", BROKEN: "its clip or picture cannot be decoded"}


class Decider:
    """Decides rows. Threads may share it; it ends its workers and connections with its block.

    Attributes:
        think_open: whether the model's prompts end inside an open think block; may be found out while it is at work.

    Args:
        urls: addresses of the judge; none where rules decide every row.
        form: where the answers of replies stand.
        strict: rows with a malformed verdict stay open, and are judged anew by the next call; else they are 0 (method.md section 10).
    """

    def __init__(
        self,
        urls: Sequence[str],
        model: str,
        key: str,
        prompts: Mapping[str, Path],
        *,
        concurrency: int,
        workers: int = 2,
        think_open: bool = False,
        strict: bool = False,
        form: AnswerForm = BOXED,
    ) -> None:
        self._grader, self._form = Grader(workers=workers, form=form), form
        self._judge = RemoteTeacher(model, urls, key=key, concurrency=concurrency, retry_for=DOWN) if urls else None
        self._book = judge_book(prompts)
        self.think_open, self._strict = think_open, strict
        # Its few tokens are for the verdict: a judge that can think shall not. OpenAI's own address does not know the field.
        official = any(urlsplit(url).hostname == OPENAI_HOST for url in urls)
        self._template_args: dict[str, Any] = {} if official else {"enable_thinking": False}
        self._given = frozenset(prompts)

    def close(self) -> None:
        """Ends workers and connections."""
        self._grader.close()
        if self._judge is not None:
            self._judge.close()

    def decide(self, benchmark: Benchmark, item: Item, epoch: int, reply: Mapping[str, Any], journal: Journal) -> SampleResult:
        """The row of one reply of the model.

        Args:
            reply: as `zppo.evals.task` keeps it: text, finish, tokens_in, tokens_out; error where its media are broken.
            journal: of the judge's replies; what stands there is not asked again.

        Raises:
            SettingsError: a metric of OCRBench v2 lacks its packages.
        """
        text = str(reply["text"])
        ruled = score(item, text, self._grader.equal, self.think_open, self._form)
        unresolved = ruled.value is None and benchmark.judged
        value = None if unresolved else ruled.value or 0.0
        row = SampleResult(
            id=item.id,
            epoch=epoch,
            by="rule",
            value=value,
            boxless=ruled.boxless,
            text=text,
            answer=ruled.answer,
            reason=_NOT_ASKED.get(str(reply["finish"]), ruled.reason),
            error=str(reply.get("error", "")),
            finish=str(reply["finish"]),
            tokens_in=int(reply["tokens_in"]),
            tokens_out=int(reply["tokens_out"]),
            gold=item.golds,
            facts=item.facts,
        )
        return self._judged(benchmark, item, row, journal) if unresolved else row

    def _judged(self, benchmark: Benchmark, item: Item, row: SampleResult, journal: Journal) -> SampleResult:
        messages = judge_request(benchmark, item, row.text, self._book, self.think_open, self._form)
        key = digest_of([benchmark.name, item.id, row.epoch, messages])
        known, judge = journal.get(key), self._judge
        if judge is None:
            raise EvaluationError(f"{benchmark.name}: a row is to be judged, and there is no judge; name its server with --judge URL")
        if known and known["value"] is None and self._strict:
            known = None
        tokens = LONG_JUDGE_TOKENS if self._given & {benchmark.judge, *judge_templates(benchmark.judge)} else JUDGE_TOKENS
        how = TeacherSampling(Sampling(temperature=0.0, max_new_tokens=tokens), self._template_args)
        spent_in = spent_out = 0
        said = error = ""
        for turn in range(0 if known else TURNS):
            request = TeacherRequest(messages, (draw_key(turn, "judge", item.id, row.text),))
            answer = judge.complete([request], how)[0]
            spent_in, spent_out = spent_in + answer.prompt_tokens, spent_out + answer.completion_tokens
            text = answer.texts[0]
            if text is None:
                error = f"the judge did not answer ({answer.error})"
                break
            said, value = text, judge_score(benchmark, item, text)
            if value is not None:
                known = {"reply": text, "value": value, "tokens_in": spent_in, "tokens_out": spent_out}
                journal.add(key, known)
                break
            messages = (*messages, *reminder(benchmark.judge, text))
        else:
            if known is None:
                error = MALFORMED
                known = {"reply": said, "value": None, "tokens_in": spent_in, "tokens_out": spent_out}
                journal.add(key, known)
        if known is None or (known["value"] is None and self._strict):
            return replace(row, by="open", value=None, reply=said, error=error, judge_tokens=(spent_in, spent_out))
        spent = (int(known["tokens_in"]), int(known["tokens_out"]))
        row = replace(row, by="judge", reply=str(known["reply"]), judge_tokens=spent)
        return replace(row, value=0.0, error=MALFORMED) if known["value"] is None else replace(row, value=float(known["value"]))
