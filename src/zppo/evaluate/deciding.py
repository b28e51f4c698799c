"""From a model's reply to a decided row: the rules first, the judge where they cannot decide."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from zppo.core.draws import draw_key
from zppo.engines.base import Sampling
from zppo.evaluate.benchmark import Benchmark
from zppo.evaluate.item import Item
from zppo.evaluate.journal import Journal
from zppo.evaluate.judging import judge_book, judge_request, judge_score
from zppo.evaluate.protocol import JUDGE_TOKENS, LONG_JUDGE_TOKENS, digest_of
from zppo.evaluate.replies import reminder
from zppo.evaluate.rows import TOO_LONG, Row
from zppo.evaluate.scoring import score
from zppo.grading.grader import Grader
from zppo.teacher.base import TeacherRequest, TeacherSampling
from zppo.teacher.http import OPENAI_HOST
from zppo.teacher.remote import RemoteTeacher

TURNS = 2  # replies of a judge that are read before a row stays open
DOWN = 120.0  # seconds for which a judge is asked again


@dataclass(frozen=True, slots=True)
class JudgeServer:
    """Where the shared judge is; its key is in no printed form."""

    url: str
    model: str
    key: str

    def __repr__(self) -> str:
        return f"JudgeServer({self.url!r}, {self.model!r})"


class Decider:
    """Decides rows. Threads may share it; it ends its workers and connections with its block."""

    def __init__(
        self,
        judge: JudgeServer,
        *,
        prompts: Mapping[str, Path],
        concurrency: int,
        workers: int = 2,
        think_open: bool = False,
    ) -> None:
        self._grader = Grader(workers=workers)
        self._judge = RemoteTeacher(judge.model, [judge.url], key=judge.key, concurrency=concurrency, retry_for=DOWN)
        self._book = judge_book(prompts)
        self._think_open = think_open
        # Its few tokens are for the verdict: a judge that can think shall not. OpenAI's own address does not know the field.
        official = urlsplit(judge.url).hostname == OPENAI_HOST
        self._template_args: dict[str, Any] = {} if official else {"enable_thinking": False}
        self._given = frozenset(prompts)

    def close(self) -> None:
        """Ends workers and connections."""
        self._grader.close()
        self._judge.close()

    def decide(self, benchmark: Benchmark, item: Item, epoch: int, reply: Mapping[str, Any], journal: Journal) -> Row:
        """The row of one reply of the model.

        Args:
            reply: as `zppo.evaluate.task` keeps it: text, finish, tokens_in, tokens_out.
            journal: of the judge's replies; what stands there is not asked again.

        Raises:
            SettingsError: a metric of OCRBench v2 lacks its packages.
        """
        text = str(reply["text"])
        ruled = score(item, text, self._grader.equal, self._think_open)
        row = Row(
            id=item.id,
            epoch=epoch,
            by="rule",
            value=ruled.value,
            text=text,
            answer=ruled.answer,
            reason="too long for the model's context" if reply["finish"] == TOO_LONG else ruled.reason,
            finish=str(reply["finish"]),
            tokens_in=int(reply["tokens_in"]),
            tokens_out=int(reply["tokens_out"]),
            gold=item.golds,
            facts=item.facts,
        )
        return row if ruled.decided else self._judged(benchmark, item, row, journal)

    def _judged(self, benchmark: Benchmark, item: Item, row: Row, journal: Journal) -> Row:
        messages = judge_request(benchmark, item, row.text, self._book, self._think_open)
        key = digest_of([benchmark.name, item.id, row.epoch, messages])
        known = journal.get(key)
        tokens = LONG_JUDGE_TOKENS if benchmark.judge in self._given else JUDGE_TOKENS
        how = TeacherSampling(Sampling(temperature=0.0, max_new_tokens=tokens), self._template_args)
        spent_in = spent_out = 0
        said = error = ""
        for turn in range(0 if known else TURNS):
            request = TeacherRequest(messages, (draw_key(turn, "judge", item.id, row.text),))
            answer = self._judge.complete([request], how)[0]
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
            error = "the judge's reply is malformed"
            messages = (*messages, *reminder(benchmark.judge, text))
        if known is None:
            return replace(row, by="open", value=None, reply=said, error=error, judge_tokens=(spent_in, spent_out))
        spent = (int(known["tokens_in"]), int(known["tokens_out"]))
        return replace(row, by="judge", value=float(known["value"]), reply=str(known["reply"]), judge_tokens=spent)
