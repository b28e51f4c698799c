"""What a hard question is reformulated with: compressed candidates, hints, response tokens (Alg. 1, l. 8-10; Algs. 5 and 6)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields

from zppo.core.draws import keyed_random
from zppo.core.reformulate import Material, Need, Reformulation, distinct_answers
from zppo.core.types import Draft, Group
from zppo.grading import normalise
from zppo.prompts.book import PromptBook
from zppo.teacher.base import Teacher, TeacherSampling
from zppo.teacher.compression import Compressor, PairRequest, Prepared, Source
from zppo.teacher.hints import HintCounts, HintRequest, make_hints
from zppo.train.ask import Pools


@dataclass(slots=True)
class _Counts:
    """Candidates that a step could not show as it should."""

    bcq_without_negative: int = 0
    bcq_raw_pairs: int = 0
    ncq_raw_candidates: int = 0


class MaterialMaker:
    """Prepares what the reformulations of a method need, for several questions at once.

    Args:
        needs: what the reformulations name in their `needs`; nothing else is made.
        compressor: candidate compression.
        teacher, hint: who writes hints and how it is sampled.
        book: the words of the request for a hint.
        response_ids: a response in the student's tokens, for Prefix.
        seed: keys every draw.
    """

    def __init__(
        self,
        needs: frozenset[Need],
        *,
        compressor: Compressor,
        teacher: Teacher | None,
        hint: TeacherSampling,
        book: PromptBook,
        response_ids: Callable[[Source], tuple[int, ...]],
        seed: int,
    ) -> None:
        self.needs, self.compressor, self.teacher, self.hint = needs, compressor, teacher, hint
        self.book, self.response_ids, self.seed = book, response_ids, seed
        self.new_step()

    def new_step(self) -> None:
        """Forget summaries and counts."""
        self.compressor.new_step()
        self._counts = _Counts()
        self._hints = HintCounts()

    def metrics(self) -> dict[str, float | None]:
        """Counts since `new_step`: compression_*, hint_* where hints are made, and what could not be shown as it should."""
        named = {
            f"compression_{f.name}": getattr(self.compressor.counts, f.name) for f in fields(self.compressor.counts)
        }
        if "hint" in self.needs:
            named |= {f"hint_{name}": value for name, value in asdict(self._hints).items() if name != "error"}
        return {name: float(value) for name, value in (asdict(self._counts) | named).items()}

    @property
    def error(self) -> str:
        """Why a compression or a hint did not come, the last such reason; "" where all came."""
        return self.compressor.error or self._hints.error

    def make(self, groups: Sequence[Group], pools: Pools, step: int) -> list[Material]:
        """Materials in the order of the groups, from their wrong rollouts and the correct teacher responses."""
        wrong = [_wrong(g) for g in groups]
        prepared = self._candidates(groups, wrong, pools, step)
        hints = self._make_hints(groups, pools, step)
        return [
            Material(
                question=g.question,
                pair=p.pair,
                wrong=p.wrong,
                wrong_answers=_listed(sources, g.question.gold),
                hint=hint,
                response_ids=self._response(g, pools, step),
            )
            for g, sources, p, hint in zip(groups, wrong, prepared, hints, strict=True)
        ]

    def _candidates(
        self, groups: Sequence[Group], wrong: Sequence[tuple[Source, ...]], pools: Pools, step: int
    ) -> list[Prepared]:
        if not self.needs & {"pair", "wrong"}:
            return [Prepared() for _ in groups]
        requests = [
            PairRequest(
                question_id=g.question.id,
                # Beside a negative, which always has an answer, a positive without one would stand out [zppo].
                positives=tuple(s for s in pools.get(g.question.id, ()) if s.answer is not None),
                negatives=tuple(s for s in sources if s.answer is not None),
                wrong=sources,
                want_pair="pair" in self.needs,
                want_wrong="wrong" in self.needs,
            )
            for g, sources in zip(groups, wrong, strict=True)
        ]
        prepared = self.compressor.prepare(requests, self.seed, step)
        self._counts.bcq_without_negative += sum(bool(r.want_pair and r.wrong and not r.negatives) for r in requests)
        self._counts.bcq_raw_pairs += sum(p.pair_raw for p in prepared)
        self._counts.ncq_raw_candidates += sum(p.wrong_raw for p in prepared)
        return prepared

    def _make_hints(self, groups: Sequence[Group], pools: Pools, step: int) -> list[str | None]:
        if "hint" not in self.needs or self.teacher is None:
            return [None] * len(groups)
        requests = [HintRequest(g.question, pools.get(g.question.id, ())) for g in groups]
        hints, counts = make_hints(requests, self.teacher, self.book, self.hint, seed=self.seed, step=step)
        had = self._hints
        self._hints = HintCounts(
            asked=had.asked + counts.asked,
            failed=had.failed + counts.failed,
            unreachable=had.unreachable + counts.unreachable,
            completion_tokens=had.completion_tokens + counts.completion_tokens,
            error=counts.error or had.error,
        )
        return hints

    def _response(self, group: Group, pools: Pools, step: int) -> tuple[int, ...]:
        """One correct teacher response, drawn uniformly, in the student's tokens."""
        pool = pools.get(group.question.id, ())
        if "prefix" not in self.needs or not pool:
            return ()
        return self.response_ids(keyed_random(self.seed, "prefix", step, group.question.id).choice(pool))


def drafts_of(reformulations: Sequence[Reformulation], material: Material, seed: int, step: int) -> list[Draft]:
    """What one question is asked again with, in building order (Alg. 1, l. 8-10)."""
    drafts = (
        r.draft(material, keyed_random(seed, "reformulate", step, material.question.id, r.kind)) for r in reformulations
    )
    return [draft for draft in drafts if draft is not None]


def _wrong(group: Group) -> tuple[Source, ...]:
    """W_x in rollout order."""
    return tuple(Source(r.text, r.answer, i) for i, r in enumerate(group.rollouts) if r.graded and not r.correct)


def _listed(wrong: Sequence[Source], gold: str) -> tuple[str, ...]:
    """The answers that NCQ lists."""
    answers = ((s.answer, "" if s.answer is None else normalise(s.answer)) for s in wrong)
    return distinct_answers(answers, normalise(gold))
