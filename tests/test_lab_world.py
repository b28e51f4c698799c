"""The lab's worlds as data: tables, beliefs, questions, and what a user may get wrong."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import cast

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from zppo.core.types import Question
from zppo.errors import SettingsError
from zppo.grading import equal
from zppo.lab.questions import lab_questions, level_name, write_questions
from zppo.lab.world import WORLDS, Chain, World, chain_of, load_world

NAMES = ("unreachable", "reachable")


@pytest.fixture(params=NAMES)
def world(request: pytest.FixtureRequest) -> World:
    return load_world(request.param)


def edited(tmp_path: Path, **changes: object) -> str:
    """A copy of the world "unreachable" with other values of top-level keys."""
    data = yaml.safe_load((WORLDS / "unreachable.yaml").read_text(encoding="utf-8")) | changes
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(data), encoding="utf-8")
    return str(path)


def test_a_belief_is_a_distribution_with_rare_truth_and_common_mistakes(world: World) -> None:
    for (index, value), weights in world.beliefs.items():
        operation = world.operations[index]
        right = operation.table[value]
        assert sum(weights) == pytest.approx(1)
        belief = world.settings.beliefs.get(operation.tier)
        if belief is None:
            assert weights[right] == 1
            continue
        mistakes = world.mistakes[index, value]
        assert right not in mistakes and len(set(mistakes)) == len(mistakes)
        assert belief.right[0] <= weights[right] <= belief.right[1]
        assert weights[mistakes[0]] == pytest.approx((1 - weights[right]) * belief.mistakes[0])


def test_hard_entries_of_the_unreachable_world_are_as_the_issue_says() -> None:
    world = load_world("unreachable")
    hard = [world.beliefs[i, v] for i in world.tier("hard") for v in range(31)]
    assert len(hard) == 6 * 31
    for weights in hard:
        top = sorted(weights, reverse=True)
        assert top[0] == pytest.approx(0.7, abs=1e-3) and top[1] == pytest.approx(0.297, abs=1e-3) and top[2] < 2e-4


def test_operations_are_permutations_and_arithmetic() -> None:
    for operation in load_world("unreachable").operations:
        assert sorted(operation.table) == list(range(31))
    reachable = load_world("reachable")
    tables = {o.word: o.table for o in reachable.operations}
    assert tables["plus3→"][9] == 1 and tables["times7→"][5] == 2


def test_splits_share_entries_and_no_chain(world: World) -> None:
    for name, level in world.levels.items():
        chains = world.chains(name)
        train, test = set(chains["train"]), set(chains["test"])
        assert (len(train), len(test)) == (level.train, level.test)
        assert not train & test
        if level.tiers[0] == level.tiers[1]:
            continue

        def entry(chain: Chain, tier: str = level.tiers[0]) -> tuple[int, int]:
            at = world.tiers(chain).index(tier)
            return chain.operations[at], (chain.start, *world.truth(chain))[at]

        assert {entry(c) for c in test} <= {entry(c) for c in train} or level.entries is None
        orders = Counter(world.tiers(chain)[0] == level.tiers[0] for chain in train)
        assert min(orders.values()) > level.train // 4


def test_chosen_entries_are_the_ones_asked_about() -> None:
    world = load_world("unreachable")
    chosen = world.entries("hard")[5:45]
    for chains in world.chains("hard", chosen).values():
        for chain in chains:
            at = world.tiers(chain).index("hard")
            assert (chain.operations[at], (chain.start, *world.truth(chain))[at]) in chosen


def test_ids_are_unique_and_golds_name_every_step(world: World) -> None:
    questions = [q for split in ("train", "test") for q in world.questions(split)]
    assert len({q.id for q in questions}) == len(questions)
    words = {o.word: o.table for o in world.operations}
    for question in questions:
        start, *operations = question.messages[-1].content.split()[:-1]
        value = world.values.index(start)
        said = question.gold.split()
        assert said[::2] == operations
        for operation, name in zip(operations, said[1::2], strict=True):
            value = words[operation][value]
            assert world.values[value] == name


def test_questions_survive_their_file(tmp_path: Path, world: World) -> None:
    questions = world.questions("test")
    path = tmp_path / "test.jsonl"
    write_questions(path, questions)
    from zppo.config.data_settings import ColumnSettings
    from zppo.data.load import load_questions

    assert load_questions(str(path), ColumnSettings()) == questions


@pytest.mark.slow
@settings(max_examples=60)
@given(st.data())
def test_grading_never_takes_another_answer_for_the_gold(data: st.DataObject) -> None:
    """Least of all one with the same words in another order, which a symbolic comparison would call a commuted product."""
    world = load_world(data.draw(st.sampled_from(NAMES)))
    gold = data.draw(st.sampled_from(world.questions("test"))).gold
    words = gold.split()
    other = data.draw(
        st.one_of(
            st.permutations(words), st.lists(st.sampled_from([*world.values, *(o.word for o in world.operations)]), min_size=1, max_size=6)
        )
    )
    assert equal(cast(str, gold), " ".join(other)) == (list(other) == words)


def test_a_world_of_ones_own_and_what_may_be_wrong_with_it(tmp_path: Path) -> None:
    assert load_world(edited(tmp_path, name="mine")).name == "mine"
    with pytest.raises(SettingsError, match="unreachable"):
        load_world("nowhere")
    wrong: list[tuple[dict[str, object], str]] = [
        ({"values": ["a", "a"]}, "different single words"),
        ({"levels": [{"name": "x", "tiers": ["soft", "easy"], "train": 1, "test": 1}]}, "soft"),
        ({"beliefs": {"hard": {"right": [0.5, 0.1], "mistakes": [0.5, 0.5]}}}, "lower one first"),
        ({"beliefs": {"hard": {"right": [0.1, 0.1], "mistakes": [0.9, 0.5]}}}, "more than 1"),
        ({"color": "red"}, "color"),
    ]
    for i, (changes, message) in enumerate(wrong):
        folder = tmp_path / str(i)
        folder.mkdir()
        with pytest.raises(SettingsError, match=message):
            load_world(edited(folder, **changes))


def test_too_few_chains_are_an_error_that_counts_them(tmp_path: Path) -> None:
    levels = yaml.safe_load((WORLDS / "unreachable.yaml").read_text(encoding="utf-8"))["levels"]
    levels[2]["entries"] = 3
    with pytest.raises(SettingsError, match="18 chains are too few"):
        load_world(edited(tmp_path, levels=levels)).questions("train")


def test_a_like_world_shares_the_truth_and_has_a_mind_of_its_own(world: World, tmp_path: Path) -> None:
    second = load_world(f"{world.name}-2")
    assert [o.table for o in second.operations] == [o.table for o in world.operations]
    same = sum(second.mistakes[entry] == mistakes for entry, mistakes in world.mistakes.items())
    assert same < len(world.mistakes) / 4
    assert second.settings.corpus == world.settings.corpus.model_copy(update={"longer": 0.2})
    path = tmp_path / "mine.yaml"
    path.write_text(f"name: mine\nlike: {world.name}\nunseen: [nothing]\n", encoding="utf-8")
    with pytest.raises(SettingsError, match="unseen names nothing"):
        load_world(str(path))


def test_a_study_trains_without_the_unseen_operations_and_asks_about_them(world: World) -> None:
    left_out = {f"{name}→" for name in world.settings.unseen}
    assert len(left_out) == 2

    def asked(question: Question) -> set[str]:
        return set(question.messages[-1].content.split())

    train, test = lab_questions(world.name, "train"), lab_questions(world.name, "test")
    trained, studied = lab_questions(world.name, "seen"), lab_questions(world.name, "study")
    assert trained == [q for q in train if not asked(q) & left_out] and len(trained) < len(train)
    by_level: dict[str, list[Question]] = {}
    for question in studied:
        by_level.setdefault(question.level, []).append(question)
    unseen, longer = by_level.pop("unseen"), by_level.pop("longer")
    assert all(asked(q) & left_out for q in unseen) and len(unseen) > 40
    inside = [q for questions in by_level.values() for q in questions]
    assert {q.id for q in (*inside, *unseen)} == {q.id for q in test} and set(by_level) == set(world.levels)
    assert not any(asked(q) & left_out for q in (*inside, *longer))
    assert len({q.id for q in studied}) == len(studied) and len(longer) > 40
    hard = {q.messages[-1].content.removesuffix(" ?"): q.gold for q in inside if q.level != "easy"}
    for question in longer:
        start, gold = question.messages[-1].content.rsplit(" ", 2)[0], question.gold.rsplit(" ", 2)[0]
        assert hard[start] == gold and len(question.gold.split()) == 6
        assert world.truth(chain_of(world, question))[-1] == world.values.index(question.gold.split()[-1])


def test_questions_of_an_unknown_split_or_world() -> None:
    with pytest.raises(SettingsError, match="train, test, seen, study"):
        lab_questions("unreachable", "dev")
    with pytest.raises(SettingsError, match="nowhere"):
        lab_questions("nowhere", "train")


def test_levels_by_name_and_number() -> None:
    world = load_world("unreachable")
    assert level_name(world, "medium") == level_name(world, "2") == "medium"
    for wrong in ("0", "4", "harder"):
        with pytest.raises(SettingsError, match="3 \\(hard\\)"):
            level_name(world, wrong)
