"""What was answered, question by question, in a file that only grows: a measurement that is repeated asks nothing twice."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

from zppo.config.settings import Settings
from zppo.core.types import PLAIN, Question, Rollout
from zppo.errors import SettingsError
from zppo.grading.grader import Verdict
from zppo.names import CLOSINGS, readable
from zppo.runs.files import writing
from zppo.runs.log import question_columns
from zppo.train.provenance import model_facts, word_files

Who = Literal["student", "teacher"]


@dataclass(frozen=True, slots=True)
class Given:
    """One answer, by the names of ROLLOUT_SCHEMA; None for what is not known of a teacher's."""

    completion: str
    answer: str | None
    correct: bool
    graded: bool
    reason: str
    reward: float
    completion_tokens: int | None = None
    truncated: bool | None = None


@dataclass(frozen=True, slots=True)
class Answers:
    """What a model answered to one question.

    Attributes:
        n: answers that have a verdict; those of an unreachable model or judge have none.
        correct: how many of them are right.
        none: how many have no answer that could be extracted.
        truncated: how many the limit stopped; None where that is not known.
        tokens: of all of them.
        prompt, given: what was asked, and each answer; in the file alone, which may be large.
    """

    n: int
    correct: int
    none: int
    truncated: int | None
    tokens: int
    prompt: str = ""
    given: tuple[Given, ...] = ()

    @property
    def accuracy(self) -> float | None:
        """Share of right ones; None where none has a verdict."""
        return self.correct / self.n if self.n else None

    def columns(self, who: Who) -> dict[str, Any]:
        """As columns of the question's row; the teacher's have its name in front, of the student's the accuracy alone."""
        front = "" if who == "student" else f"{who}_"
        shares = {"no_answer_share": self.none / self.n if self.n else None}
        if self.truncated is not None:
            shares["truncated_share"] = self.truncated / self.n if self.n else None
        values = {**shares, "mean_tokens": self.tokens / self.n if self.n else None}
        return {f"{who}_accuracy": self.accuracy, **{f"{front}{name}": value for name, value in values.items()}}


def of_rollouts(rollouts: Sequence[Rollout], prompt: str) -> Answers:
    """The student's; those without a verdict are left out of the counts."""
    graded = [rollout for rollout in rollouts if rollout.graded]
    return Answers(
        len(graded),
        sum(r.correct for r in graded),
        sum(r.answer is None for r in graded),
        sum(r.truncated for r in graded),
        sum(len(r.ids) for r in graded),
        prompt,
        tuple(Given(r.text, r.answer, r.correct, r.graded, r.reason, r.reward, len(r.ids), r.truncated) for r in rollouts),
    )


def of_verdicts(texts: Sequence[str], verdicts: Sequence[Verdict], tokens: int, prompt: str) -> Answers:
    """A teacher's, which does not say where its limit stopped it."""
    graded = [verdict for verdict in verdicts if verdict.graded]
    given = tuple(Given(t, v.answer, v.correct, v.graded, v.reason, v.reward) for t, v in zip(texts, verdicts, strict=True))
    return Answers(len(graded), sum(v.correct for v in graded), sum(v.answer is None for v in graded), None, tokens, prompt, given)


class AnswerFile:
    """Answers by model and question. A last line that a kill has torn is dropped.

    Args:
        path: the file; its folder is made.
        settings, n: what the answers hang on; what was answered under other settings is not found.

    Raises:
        SettingsError: the file holds something else.
    """

    _file: BinaryIO | None

    def __init__(self, path: Path, settings: Settings, n: int) -> None:
        self._how = {who: f"{n}:{_digest(facts)}" for who, facts in _facts(settings).items()}
        self._known = _read(path)
        self._path, self._file = path, None

    def get(self, who: Who, question: Question) -> Answers | None:
        """What was answered, None where it was not asked yet."""
        return self._known.get(self._key(who, question))

    def add(self, who: Who, answers: Sequence[tuple[Question, Answers]]) -> None:
        """Keeps answers; they are in the file when this returns. StorageError where they cannot be written."""
        lines = [
            {"who": who, "question": question.id, "key": self._key(who, question), "answers": asdict(each)} for question, each in answers
        ]
        with writing(self._path):
            if self._file is None:  # not before there is something to keep
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._file = open(self._path, "ab")  # noqa: SIM115 - open for as long as the measurement
                self._file.truncate(self._path.read_bytes().rfind(b"\n") + 1)
            self._file.write("".join(f"{json.dumps(line)}\n" for line in lines).encode())
            self._file.flush()
        self._known |= {str(line["key"]): _without_texts(each) for line, (_, each) in zip(lines, answers, strict=True)}

    def rows(self, questions: Sequence[Question]) -> Iterator[list[dict[str, Any]]]:
        """Rows of ROLLOUT_SCHEMA of all answers to each question, in the order of the questions, the student's first."""
        places = _places(self._path)
        with open(self._path, "rb") as file:
            for question in questions:
                rows: list[dict[str, Any]] = []
                for who, kind in (("student", PLAIN), ("teacher", "teacher")):
                    place = places.get(self._key(cast(Who, who), question))
                    if place is None:
                        continue
                    file.seek(place)
                    kept = json.loads(file.readline())["answers"]
                    same = {"step": 0, "kind": kind, "replayed": False, "prompt": kept.get("prompt"), "audit": "{}"}
                    given = kept.get("given") or ()  # older files have none
                    rows += [{**same, **question_columns(question), "rollout": i, **each} for i, each in enumerate(given)]
                yield rows

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()

    def _key(self, who: Who, question: Question) -> str:
        known = question.to_dict() | {"images": [image.sha256 for image in question.images]}
        return _digest([who, self._how[who], known])


def _without_texts(answers: Answers) -> Answers:
    return replace(answers, prompt="", given=())


def _places(path: Path) -> dict[str, int]:
    """Where the last whole line of each key begins."""
    places: dict[str, int] = {}
    at = 0
    with open(path, "rb") as file:
        for line in file:
            with suppress(ValueError, KeyError, TypeError):
                places[str(json.loads(line)["key"])] = at
            at += len(line)
    return places


def _read(path: Path) -> dict[str, Answers]:
    """Answers by key; a line that is damaged is left out, and asked about again."""
    known: dict[str, Answers] = {}
    lines = 0
    with open(readable(path), "rb") if path.exists() else nullcontext(()) as file:
        for line in file:
            lines += 1
            with suppress(ValueError, KeyError, TypeError):
                data = json.loads(line)
                known[str(data["key"])] = _without_texts(Answers(**data["answers"]))
    if lines and not known:
        raise SettingsError(f"{path} holds something else than answers of a measurement: name another place with --out")
    return known


def _facts(settings: Settings) -> dict[Who, Any]:
    """What the answers of each model hang on."""
    whole = settings.model_dump(mode="json")
    words = {key: hashlib.sha256(path.read_bytes()).hexdigest() for key, path in word_files(settings).items()}
    limits = settings.data.images.min_pixels, settings.data.images.max_pixels
    judge = settings.judging[0] if settings.judging else None
    grading = [settings.grading.reward, settings.grading.rounded_golds, judge.model if judge else None]
    closing = str(settings.prompts.get("closing", ""))
    form = [closing if closing in CLOSINGS else "", settings.answer_form.name]
    shown = [settings.data.examples, settings.data.columns.solution]
    shared = [settings.seed, words, limits, grading, form, shown]
    return {
        "student": [shared, whole["student"], model_facts(settings.student), _sampling(whole["rollout"]), settings.train.precision],
        "teacher": [shared, settings.teacher and [settings.teacher.model, model_facts(settings.teacher), whole["teacher"]["rollout"]]],
    }


def _sampling(rollout: Mapping[str, Any]) -> dict[str, Any]:
    return {name: rollout[name] for name in ("temperature", "top_p", "top_k", "max_new_tokens", "engine")}


def _digest(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=12).hexdigest()
