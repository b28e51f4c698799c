"""The world "elsewhere": other families of skills, a dialect, hints, and a teacher that is another model."""

from __future__ import annotations

import re
from pathlib import Path
from random import Random
from typing import Any, cast

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from zppo.config.recipe import load_recipe
from zppo.core.types import HINT, PLAIN, Draft
from zppo.engines.chat import Chat
from zppo.errors import SettingsError
from zppo.grading import equal, extract_boxed
from zppo.lab.corpus import ChainStudentCorpus, ChainTeacherCorpus, compressed
from zppo.lab.families import KINDS, family_questions, held_out_exercises
from zppo.lab.levels import levels_command
from zppo.lab.models import lab_book, make_model, make_tokenizer, words
from zppo.lab.pretrain import probe_of
from zppo.lab.questions import ASSETS, bundled_model, lab_questions
from zppo.lab.world import WORLDS, Writing, chain_of, load_world
from zppo.prompts import Neutraliser, PromptBook
from zppo.prompts.book import HINTING
from zppo.rollout.student import PromptRenderer

RECIPES = Path(__file__).parents[1] / "recipes"
WORLD = load_world("elsewhere")
CHAT = Chat(make_tokenizer(WORLD))
BOOK = lab_book(CHAT)
DIALECT, STYLE = WORLD.settings.dialect, WORLD.settings.teacher.writing


def edited(tmp_path: Path, **changes: object) -> str:
    """A world like this one with other sections."""
    path = tmp_path / f"mine-{len(list(tmp_path.iterdir()))}.yaml"  # a world is read once
    path.write_text(yaml.safe_dump({"name": "mine", "like": "elsewhere"} | changes), encoding="utf-8")
    return str(path)


def answer(question: str) -> str:
    """The right answer, found anew from the words of a question."""
    said = question.removesuffix(" ?").split()
    if said[0] == "sort→":
        return " ".join(["sort→", *sorted(said[1:])])
    if said[0] == "count→":
        return f"count→ {('zero', 'one', 'two', 'three', 'four', 'five', 'six', 'seven', 'eight')[said[3:].count(said[1])]}"
    if said[0] == "copy→":
        *shown, _, place, _, other = said[1:]
        shown[("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth").index(place)] = other
        return " ".join(["copy→", *shown])
    tables, value, steps = {o.word: o.table for o in WORLD.operations}, WORLD.values.index(said[0]), list[str]()
    for word in said[1:]:
        value = tables[word][value]
        steps += [word, WORLD.values[value]]
    return " ".join(steps)


def test_questions_of_families_are_exact_and_stand_in_no_document() -> None:
    assert list(WORLD.values) == sorted(WORLD.values)
    questions = family_questions(WORLD)
    assert len({q.id for q in questions}) == len({q.messages for q in questions}) == len(questions)
    for question in questions:
        assert question.gold == answer(question.messages[-1].content)
    asked = {q.messages[-1].content for q in questions}
    for corpus in (ChainStudentCorpus(WORLD, BOOK), ChainTeacherCorpus(WORLD, BOOK)):
        rng = Random(0)
        drawn = [corpus.document(rng) for _ in range(1500)]
        plain = [d for d in drawn if d.kind == PLAIN]
        assert not {d.messages[-1].content.split("\n\n")[0] for d in plain} & asked
        families = {d.messages[-1].content.split()[0] for d in plain} & {"sort→", "count→", "copy→"}
        assert families == ({"count→"} if isinstance(corpus, ChainTeacherCorpus) else {"sort→", "count→", "copy→"})


@pytest.mark.slow
@settings(max_examples=60)
@given(st.data())
def test_grading_takes_no_other_order_of_an_answer_for_it(data: st.DataObject) -> None:
    gold = data.draw(st.sampled_from(family_questions(WORLD))).gold
    other = data.draw(st.permutations(gold.split()))
    assert equal(cast(str, gold), " ".join(other)) == (other == gold.split())


def test_a_study_asks_by_level_what_may_be_lost_and_what_may_carry_over() -> None:
    trained, asked = lab_questions("elsewhere", "seen"), lab_questions("elsewhere", "study")
    levels = {q.level for q in asked}
    assert levels == {"easy", "medium", "hard", "unseen", "longer", "dialect", "reworded", *WORLD.settings.families}
    assert len({q.id for q in asked}) == len(asked) and not {q.messages for q in trained} & {q.messages for q in asked}
    left_out = {f"{name}→" for name in WORLD.settings.unseen}
    others = {o.word for o in WORLD.operations if o.tier == "other"}
    for question in trained:
        said = set(question.messages[-1].content.split())
        assert not said & (left_out | others) and said <= {*WORLD.values, *(o.word for o in WORLD.operations), "?"}
    assert DIALECT is not None
    golds = {q.gold for q in asked if q.level in ("easy", "medium", "hard")}
    for level, others in (("dialect", {"easy"}), ("reworded", {"medium", "hard"})):
        mine = [q for q in asked if q.level == level]
        assert len(mine) >= 40 and {q.gold for q in mine} <= golds
        for question in mine:
            chain = chain_of(WORLD, question, DIALECT)
            assert question.gold == WORLD.answer_text(chain, WORLD.truth(chain))
            assert {q.level for q in asked if q.gold == question.gold and q.level in ("easy", "medium", "hard")} <= others


@given(seed=st.integers(0, 2**32))
def test_a_writing_says_the_same_in_other_words(seed: int) -> None:
    rng = Random(seed)
    chain = WORLD.draw(rng.choice(tuple(WORLD.levels)), rng)
    results = tuple(rng.randrange(31) for _ in chain.operations)
    assert DIALECT is not None and STYLE is not None
    for writing in (DIALECT, STYLE, Writing()):
        assert chain_of(WORLD, WORLD.question(chain, writing=writing), writing) == chain
        text = WORLD.completion_text(chain, results, writing)
        assert extract_boxed(text) == WORLD.answer_text(chain, results)
        assert compressed(text, mark=writing.mark).summary == WORLD.summary_text(chain, results)


def test_every_word_is_known_and_those_of_the_teacher_s_style_are_no_news_to_the_student() -> None:
    unknown, known = CHAT.tokenizer.unk_token_id, set[str]()
    for corpus in (ChainStudentCorpus(WORLD, BOOK), ChainTeacherCorpus(WORLD, BOOK)):
        rng = Random(4)
        for _ in range(400):
            document = corpus.document(rng)
            written = CHAT.tokenizer(document.completion, add_special_tokens=False)["input_ids"]
            assert unknown not in (*CHAT.encode(document.messages), *written)
            assert CHAT.decode(written) == document.completion
            if isinstance(corpus, ChainStudentCorpus):
                known |= {word for text in (document.messages[-1].content, document.completion) for word in words(text)}
    assert STYLE is not None and set(STYLE.words) <= known
    assert unknown not in CHAT.encode(BOOK.hinting(WORLD.question(WORLD.chains("easy")["train"][0]), BOOK.stated("amber")))


def test_the_teacher_writes_at_greater_length_and_errs_about_a_share_of_what_is_not_easy() -> None:
    chain = WORLD.chains("hard")["train"][0]
    right = WORLD.truth(chain)
    assert STYLE is not None
    lengths = [len(words(WORLD.completion_text(chain, right, writing))) for writing in (Writing(), STYLE)]
    assert lengths[1] > 2 * lengths[0]
    shares = {"easy": 1.0, "other": 1.0, "medium": 0.85, "hard": 0.8}
    for tier, share in shares.items():
        entries = [(i, v) for i in WORLD.tier(tier) for v in range(31)]
        sure = [WORLD.teacher_beliefs[i, v][WORLD.operations[i].table[v]] == 1 for i, v in entries]
        assert abs(sum(sure) / len(sure) - share) < 0.12
    for weights in WORLD.teacher_beliefs.values():
        assert sum(weights) == pytest.approx(1)
    corpus, rng, wrong = ChainTeacherCorpus(WORLD, BOOK), Random(1), 0
    for _ in range(300):
        document = corpus._answered(chain := WORLD.draw("hard", rng), rng)
        wrong += extract_boxed(document.completion) != WORLD.answer_text(chain, WORLD.truth(chain))
    assert 20 < wrong < 90


def test_hints_are_a_step_and_prompts_are_those_of_training_token_for_token() -> None:
    made = load_recipe(RECIPES / "lab-elsewhere.yaml")
    speaker = PromptRenderer(PromptBook(made.prompts, Neutraliser(CHAT.special_texts)), CHAT)
    student, teacher, rng = ChainStudentCorpus(WORLD, BOOK), ChainTeacherCorpus(WORLD, BOOK), Random(5)
    seen = 0
    while seen < 20:
        document = student.document(rng)
        if document.kind != HINT:
            continue
        seen += 1
        start, first, second = document.messages[-1].content.split("\n")[0].split()[:3]
        (hint,) = re.findall(r"<hint> (.*) </hint>", document.messages[-1].content)
        assert hint in (extract_boxed(document.completion) or "")
        question = WORLD.question(WORLD.draw("easy", rng))
        draft = Draft(HINT, question, {"hint": hint})
        chain = chain_of(WORLD, question)
        assert speaker.reformulated(draft).ids == CHAT.encode(student.hint_prompt(chain, hint))
        assert {first, second} <= {o.word for o in WORLD.operations} and start in WORLD.values
    seen = 0
    while seen < 20:
        document = teacher.document(rng)
        if document.kind == HINTING:
            seen += 1
            hint = document.completion.removeprefix("<hint> ").removesuffix(" </hint>")
            assert hint in document.messages[-1].content


def test_the_teacher_is_a_model_of_its_own_size() -> None:
    shape = WORLD.settings.teacher.model
    assert (
        shape is not None
        and make_model(WORLD, cast(Any, CHAT.tokenizer), 0, shape).num_parameters()
        > 2 * make_model(WORLD, cast(Any, CHAT.tokenizer), 0).num_parameters()
    )


def test_what_may_be_wrong_with_families(tmp_path: Path) -> None:
    one = {"kind": "sort", "length": [2, 2], "share": 0.1, "test": 5000}
    with pytest.raises(SettingsError, match="family 'pairs': it has 930 questions; ask for fewer than 5000"):
        held_out_exercises(load_world(edited(tmp_path, families={"pairs": one})))
    for family, message in (
        (one | {"tier": "easy"}, "family 'pairs' names tier 'easy'"),
        (one | {"kind": "chains"}, "family 'pairs' names tier ''"),
        (one | {"kind": "guess"}, "kind"),
    ):
        with pytest.raises(SettingsError, match=message):
            load_world(edited(tmp_path, families={"pairs": family}))
    with pytest.raises(SettingsError, match="corpus.dialect asks for a dialect"):
        load_world(edited(tmp_path, dialect=None))
    assert set(KINDS) == {family.kind for family in WORLD.settings.families.values()}
    for world in ("vision", str(WORLDS / "elsewhere.yaml")):
        with pytest.raises(SettingsError, match="a bundled world of text"):
            levels_command(world)
    with pytest.raises(SettingsError, match="--samples is 0"):
        levels_command("elsewhere", 0)


def roles_of(world: str) -> list[str]:
    """The models of a world; a second student's teacher is the first one's."""
    return [role for role in ("student", "teacher") if (ASSETS / world / role).is_dir()]


def documented(world: str) -> dict[str, list[float]]:
    """The table of levels in the docs: greedy and sampled shares, student first."""
    text = (Path(__file__).parents[1] / "docs" / "lab.md").read_text(encoding="utf-8")
    table = text.split(f"**{world}**")[1].split("\n\n")[1]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    return {level: [float(cell) for cell in cells] for level, _, *cells in rows}


@pytest.mark.slow
@pytest.mark.parametrize("world", ["elsewhere", "elsewhere-2"])
def test_the_pretrained_models_are_at_the_levels_that_the_docs_say(world: str) -> None:
    """On a few questions of every level: a world that was built anew has another table, and other studies."""
    by_level = {level: [q for q in lab_questions(world, "study") if q.level == level] for level in documented(world)}
    few = [q for mine in by_level.values() for q in Random(0).sample(mine, 15)]
    for column, role in enumerate(roles_of(world)):
        measured = probe_of(bundled_model(f"lab:{world}/{role}")).accuracy(few)
        for level, cells in documented(world).items():
            assert abs(measured[level] - cells[2 * column]) <= 0.3, (role, level)


@pytest.mark.parametrize("world", ["elsewhere", "elsewhere-2"])
def test_bundled_questions_and_checkpoints_are_the_world_s(world: str) -> None:
    made = load_world(world)
    train, test = (lab_questions(world, split) for split in ("train", "test"))
    assert not {q.messages for q in train} & {q.messages for q in test}
    for question in (*train, *test):
        chain = chain_of(made, question)
        assert question.gold == made.answer_text(chain, made.truth(chain)) == answer(question.messages[-1].content)
    for role in roles_of(world):
        folder = bundled_model(f"lab:{world}/{role}")
        assert PreTrainedTokenizerFast.from_pretrained(folder).get_vocab() == CHAT.tokenizer.get_vocab()
    assert sum(path.stat().st_size for path in (ASSETS / world).rglob("*") if path.is_file()) < 4_000_000
    assert sum(path.stat().st_size for path in ASSETS.rglob("*") if path.is_file()) < 25_000_000


@pytest.mark.long
def test_levels_are_measured_and_printed(capsys: pytest.CaptureFixture[str]) -> None:
    levels_command("elsewhere", 2, markdown=True)
    told = capsys.readouterr().out
    for level, cells in documented("elsewhere").items():
        row = next(line for line in told.splitlines() if line.startswith(f"| {level} |")).strip("|").split("|")
        assert abs(float(row[2]) - cells[0]) < 0.05 and abs(float(row[4]) - cells[2]) < 0.05, level
    assert re.search(r"teacher: 2\d\.\d tokens a completion", told) and "student, hard, shown the right answer and its likeliest" in told
    shown = re.search(r"student, easy, shown the right answer as self-distillation shows it \(SDPO, OPSD\): ([\d.]+)", told)
    assert shown and abs(float(shown[1]) - 0.15) < 0.05
