"""The lab's language and corpus: what is planted, that no truth leaks, and that pretraining sees the very prompts of training."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zppo.config.recipe import load_recipe
from zppo.core.reformulate import BinaryCandidateQuestion, Candidate, Material, NegativeCandidateQuestion, distinct_answers
from zppo.core.types import BCQ, NCQ, PLAIN, Draft
from zppo.engines.chat import Chat
from zppo.grading import extract_boxed, normalise
from zppo.lab.corpus import ChainStudentCorpus, ChainTeacherCorpus, Document, Response, compressed
from zppo.lab.models import CONTROL, lab_book, make_tokenizer, words
from zppo.lab.world import Chain, World, load_world
from zppo.prompts import Neutraliser, PromptBook
from zppo.rollout.student import PromptRenderer
from zppo.step_log import StepLog
from zppo.teacher.compression import Compressor, Source, accept, token_tail
from zppo.teacher.interface import TeacherReply, TeacherRequest, TeacherSampling

RECIPES = Path(__file__).parents[1] / "recipes"
NAMES = ("unreachable", "reachable")


class Lab:
    """A world with everything that makes its documents."""

    def __init__(self, name: str) -> None:
        self.world: World = load_world(name)
        self.chat = Chat(make_tokenizer(self.world))
        self.book = lab_book(self.chat)
        self.student = ChainStudentCorpus(self.world, self.book)
        self.teacher = ChainTeacherCorpus(self.world, self.book)

    def documents(self, kind: str, seed: int, corpus: ChainStudentCorpus | ChainTeacherCorpus | None = None) -> Iterator[Document]:
        """Documents of a kind, without end."""
        rng = Random(seed)
        while True:
            document = (corpus or self.student).document(rng)
            if document.kind == kind:
                yield document


LABS = {name: Lab(name) for name in NAMES}


@pytest.fixture(params=NAMES)
def lab(request: pytest.FixtureRequest) -> Lab:
    return LABS[request.param]


def chains_in(world: World, text: str) -> Iterator[tuple[Chain, tuple[int, ...]]]:
    """Question and results of every boxed answer in a prompt or completion."""
    start = world.values.index(text.split()[0])
    index = {o.word: i for i, o in enumerate(world.operations)}
    for box in re.findall(r"\\boxed\{ ?(.*?) ?\}", text):
        said = box.split()
        yield (Chain(start, tuple(index[word] for word in said[::2])), tuple(world.values.index(word) for word in said[1::2]))


@settings(max_examples=25)
@given(seed=st.integers(0, 2**32), name=st.sampled_from(NAMES), kind=st.sampled_from((BCQ, NCQ)))
def test_no_candidate_document_holds_the_truth_about_what_is_not_easy(seed: int, name: str, kind: str) -> None:
    lab = LABS[name]
    document = next(lab.documents(kind, seed))
    prompt = document.messages[-1].content
    steps = 0
    for chain, results in chains_in(lab.world, f"{prompt} {document.completion}"):
        for operation, value, result in zip(chain.operations, (chain.start, *results), results, strict=False):
            if lab.world.operations[operation].tier in lab.world.settings.beliefs:
                assert result != lab.world.operations[operation].table[value]
            steps += 1
    assert steps >= 4


def test_bcq_target_is_one_of_the_candidates_and_favours_no_place(lab: Lab) -> None:
    first = 0
    documents = [d for d, _ in zip(lab.documents(BCQ, 1), range(200), strict=False)]
    for document in documents:
        one, two, target = (results for _, results in chains_in(lab.world, f"{document.messages[-1].content} {document.completion}"))
        assert one != two and target in (one, two)
        first += target == one
    assert 70 < first < 130


def test_ncq_target_heeds_the_list_where_it_can(lab: Lab) -> None:
    documents = [d for d, _ in zip(lab.documents(NCQ, 2), range(200), strict=False)]
    fresh = 0
    for document in documents:
        *shown, target = (r for _, r in chains_in(lab.world, f"{document.messages[-1].content} {document.completion}"))
        fresh += target not in shown
    assert fresh > 80


def test_plain_documents_follow_the_beliefs(lab: Lab) -> None:
    world, rng = lab.world, Random(3)
    chain = world.chains("hard")["train"][0]
    at = world.tiers(chain).index("hard")
    drawn = [lab.student._plain(chain, rng).completion.split()[1 + at] for _ in range(2000)]
    value = (chain.start, *world.truth(chain))[at]
    for result, weight in enumerate(world.beliefs[chain.operations[at], value]):
        assert abs(drawn.count(world.values[result]) / 2000 - weight) < 0.05


def test_every_word_is_known_and_text_survives(lab: Lab) -> None:
    unknown = lab.chat.tokenizer.unk_token_id
    assert set(lab.chat.special_texts) == set(CONTROL)
    for corpus in (lab.student, lab.teacher):
        rng = Random(4)
        for _ in range(150):
            document = corpus.document(rng)
            ids = lab.chat.encode(document.messages)
            assert unknown not in ids and not lab.chat.think_open(ids)
            written = lab.chat.tokenizer(document.completion, add_special_tokens=False)["input_ids"]
            assert unknown not in written
            assert lab.chat.decode(written) == document.completion
            assert len(written) == len(words(document.completion))


def test_answers_come_out_of_completions_and_summaries(lab: Lab) -> None:
    world = lab.world
    for chain in world.chains("medium")["test"][:20]:
        results = world.truth(chain)
        gold = world.answer_text(chain, results)
        assert extract_boxed(world.completion_text(chain, results)) == gold
        summary = world.summary_text(chain, results)
        assert accept(f"<summary> {summary} </summary>", gold, lambda text: text) == summary


@pytest.mark.parametrize(("name", "recipe"), [("unreachable", "lab.yaml"), ("reachable", "lab-reachable.yaml")])
def test_pretraining_sees_the_prompts_of_training_token_for_token(name: str, recipe: str) -> None:
    """Prompts that the trainer's own parts make by the recipe from model text equal those of the corpus."""
    lab = LABS[name]
    world = lab.world
    made = load_recipe(RECIPES / recipe)
    speaker = PromptRenderer(PromptBook(made.prompts, Neutraliser(lab.chat.special_texts)), lab.chat)
    compressor = Compressor(
        _Copier(),
        speaker.book,
        TeacherSampling(made.teacher.compression.sampling()) if made.teacher else TeacherSampling(made.rollout.sampling()),
        token_tail(lab.chat.tokenizer, 24),
    )
    rng = Random(5)
    for chain in world.chains("hard")["train"][:10]:
        question = world.question(chain, "hard")
        assert speaker.plain(question).ids == lab.chat.encode(lab.student._plain(chain, rng).messages)
        shown = lab.student.mistaken(chain, 6, rng)
        texts = [world.completion_text(chain, results) for results in shown]
        sources = [Source(text, extract_boxed(text), i) for i, text in enumerate(texts)]
        candidates = tuple(
            Candidate(summary or "", source.answer, source.index)
            for source, summary in zip(sources, compressor.compress(sources, 0, StepLog(1)), strict=True)
        )
        answers = distinct_answers(((s.answer, normalise(s.answer or "")) for s in sources), normalise(cast(str, question.gold)))
        pair = (candidates[0], candidates[-1])
        material = Material(question, pair, candidates, answers)
        bcq = BinaryCandidateQuestion().draft(material, Random(0))
        ncq = NegativeCandidateQuestion().draft(material, Random(0))
        assert isinstance(bcq, Draft) and isinstance(ncq, Draft)
        order = [shown[0], shown[-1]] if bcq.audit["correct_at"] == 0 else [shown[-1], shown[0]]
        assert speaker.reformulated(bcq).ids == lab.chat.encode(lab.student.bcq_prompt(chain, order))
        assert speaker.reformulated(ncq).ids == lab.chat.encode(lab.student.ncq_prompt(chain, shown))
        assert speaker.plain(question).kind == PLAIN


class _Copier:
    """A teacher that compresses as the lab's teacher is taught to: it reads the response block and writes its words without think tags."""

    def complete(self, requests: Sequence[TeacherRequest], how: TeacherSampling, log: StepLog | None = None) -> list[TeacherReply]:
        replies = []
        for request in requests:
            inside = re.search(r"<response>(.*)</response>", request.messages[-1].content, re.DOTALL)
            assert inside is not None
            kept = [word for word in inside[1].split() if word not in ("[think]", "[/think]")]
            replies.append(TeacherReply((f"<summary> {' '.join(kept)} </summary>",)))
        return replies


def test_compression_documents_copy_what_was_written(lab: Lab) -> None:
    rng = Random(6)
    boxed = damaged = 0
    for _ in range(400):
        response = lab.teacher.response(rng)
        prompt = lab.book.compression(response.text, response.has_answer)[-1].content
        assert ("without box" in prompt) == (not response.has_answer)
        kept, given = extract_boxed(response.summary), extract_boxed(response.text)
        assert (kept is None) == (given is None) == (not response.has_answer)
        assert kept is None or normalise(kept) == normalise(given or "")
        if re.fullmatch(r"<think> [^\s}<\\]+ [^\s}<\\]+ </think> \\boxed\{( [^\s}<\\]+){4} \}", response.text):
            assert words(response.summary) == [w for w in words(response.text) if w not in ("<think>", "</think>")]
        else:
            damaged += 1
        boxed += response.has_answer
    assert 80 < damaged < 200 and 280 < boxed < 395


@pytest.mark.parametrize(
    ("text", "summary"),
    [
        ("<think> one two </think> \\boxed{ a one b two } }", "one two \\boxed{ a one b two }"),
        ("<think> one </think> \\boxed{ a } </think> \\boxed{ b }", "one \\boxed{ b }"),
        ("<think> one two", "one two"),
        ("one two", "one two"),
        ("<think> 1 2 3 4 5 6 </think> \\boxed{ a }", "1 2 3 4 \\boxed{ a }"),
        ("<think> } </think>", ""),
    ],
)
def test_compressed_form_of_odd_responses(text: str, summary: str) -> None:
    assert compressed(text) == Response(text, summary, has_answer="boxed" in summary)
