"""The prompt replay buffer against a plain list, its draws against the uniform distribution, and its cost."""

from __future__ import annotations

import copy
import json
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from zppo.core.replay import Changes, Entry, PromptReplayBuffer
from zppo.core.types import ImageRef, Message, Question

TEXT = (Message("user", "?"),)
IMAGES = (ImageRef("a.png", "00"),)
IDS = [f"q{i}" for i in range(14)]


def question(name: str) -> Question:
    return Question(name, TEXT, "1", IMAGES)


def ids(entries: tuple[Entry, ...]) -> list[str]:
    return [e.question.id for e in entries]


def filled(count: int, capacity: int = 10_000, seed: int = 0, accuracy: float = 0.0) -> PromptReplayBuffer:
    buffer = PromptReplayBuffer(capacity, seed=seed)
    buffer.update([(question(f"q{i}"), accuracy) for i in range(count)], step=1)
    return buffer


@dataclass
class Row:
    id: str
    accuracy: float
    step: int
    visits: int = 0

    @classmethod
    def of(cls, entry: Entry) -> Row:
        return cls(entry.question.id, entry.accuracy, entry.step, entry.visits)


class ListBuffer:
    """Algorithm 1, line 19, on a list, oldest first, without a thought for speed."""

    def __init__(self, capacity: int, threshold: float) -> None:
        self.capacity, self.threshold, self.rows = capacity, threshold, list[Row]()

    def update(self, results: list[tuple[str, float]], step: int) -> tuple[list[Row], list[Row], list[Row]]:
        admitted, graduated, evicted = list[Row](), list[Row](), list[Row]()
        for name, accuracy in results:
            inside = [row for row in self.rows if row.id == name]
            for row in inside:
                row.visits += 1
                if accuracy >= self.threshold:
                    graduated.append(row)
                    self.rows.remove(row)
            if not inside and accuracy < self.threshold:
                self.rows.append(Row(name, accuracy, step))
                admitted.append(copy.copy(self.rows[-1]))
        while len(self.rows) > self.capacity:
            evicted.append(self.rows.pop(0))
        return admitted, graduated, evicted


class BufferAgainstList(RuleBasedStateMachine):
    """Any order of updates, draws and reloads leaves buffer and list alike."""

    @initialize(capacity=st.integers(1, 9), threshold=st.sampled_from([0.125, 0.5, 1.0]), seed=st.integers(0, 3))
    def start(self, capacity: int, threshold: float, seed: int) -> None:
        self.buffer = PromptReplayBuffer(capacity, threshold, seed)
        self.model = ListBuffer(capacity, threshold)
        self.step = 0

    @rule(batch=st.lists(st.tuples(st.sampled_from(IDS), st.integers(0, 8)), max_size=10))
    def update(self, batch: list[tuple[str, int]]) -> None:
        self.step += 1
        results = [(name, eighths / 8) for name, eighths in batch]
        changes = self.buffer.update(((question(name), accuracy) for name, accuracy in results), self.step)
        expected = self.model.update(results, self.step)
        found = (changes.admitted, changes.graduated, changes.evicted)
        assert tuple([Row.of(e) for e in part] for part in found) == expected

    @rule(k=st.integers(0, 12), exclude=st.sets(st.sampled_from(IDS), max_size=6))
    def sample(self, k: int, exclude: set[str]) -> None:
        drawn = [q.id for q in self.buffer.sample(k, exclude)]
        free = {row.id for row in self.model.rows} - exclude
        assert len(set(drawn)) == len(drawn) == min(k, len(free))
        assert set(drawn) <= free

    @rule()
    def refused(self) -> None:
        with pytest.raises(ValueError, match="1.5"):
            self.buffer.update([(question("q0"), 0.0), (question("new"), 1.5)], self.step)

    @precondition(lambda self: self.model.rows)
    @rule(other_seed=st.integers(0, 3))
    def reload(self, other_seed: int) -> None:
        state = json.loads(json.dumps(self.buffer.state_dict()))
        self.buffer = PromptReplayBuffer(self.model.capacity, self.model.threshold, other_seed)
        self.buffer.load_state_dict(state)

    @invariant()
    def alike(self) -> None:
        rows = self.model.rows
        assert len(self.buffer) == len(rows) <= self.model.capacity
        entries = {name: self.buffer.get(name) for name in IDS}
        assert {name: Row.of(e) for name, e in entries.items() if e} == {row.id: row for row in rows}
        assert {name for name in IDS if name in self.buffer} == {row.id for row in rows}
        assert [e[0]["id"] for e in self.buffer.state_dict()["entries"]] == [row.id for row in rows]
        assert self.buffer.occupancy() == Counter(row.accuracy for row in rows)
        assert list(self.buffer.occupancy()) == sorted(self.buffer.occupancy())


TestBufferAgainstList = BufferAgainstList.TestCase
TestBufferAgainstList.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)


def test_a_question_that_is_hard_again_keeps_its_place_and_its_entry() -> None:
    buffer = filled(3, capacity=3)
    changes = buffer.update([(question("q0"), 0.375), (question("new"), 0.25)], step=5)
    assert ids(changes.admitted) == ["new"] and ids(changes.evicted) == ["q0"] and changes.graduated == ()
    assert changes.evicted[0] == Entry(question("q0"), 0.0, 1, visits=1)


def test_graduated_questions_make_room_before_anything_is_evicted() -> None:
    buffer = filled(2, capacity=2)
    changes = buffer.update([(question("new"), 0.0), (question("q1"), 0.5)], step=2)
    assert ids(changes.graduated) == ["q1"] and changes.evicted == () and len(buffer) == 2


def test_a_question_that_left_comes_back_as_a_new_entry_at_the_end() -> None:
    buffer = filled(2, capacity=2)
    buffer.update([(question("q0"), 1.0)], step=2)
    changes = buffer.update([(question("q0"), 0.125)], step=3)
    assert changes == Changes(admitted=(Entry(question("q0"), 0.125, 3),))
    assert ids(buffer.update([(question("x"), 0.0)], step=4).evicted) == ["q1"]


def test_more_than_the_capacity_in_one_update() -> None:
    buffer = PromptReplayBuffer(2)
    changes = buffer.update([(question(f"q{i}"), 0.0) for i in range(5)], step=1)
    assert ids(changes.admitted) == [f"q{i}" for i in range(5)] and ids(changes.evicted) == ["q0", "q1", "q2"]


@pytest.mark.parametrize("accuracy", [float("nan"), -0.1, 1.01, float("inf")])
def test_an_accuracy_that_is_none_changes_nothing(accuracy: float) -> None:
    buffer = filled(2)
    before = buffer.state_dict()
    with pytest.raises(ValueError, match="'bad'"):
        buffer.update([(question("good"), 0.0), (question("bad"), accuracy)], step=2)
    assert buffer.state_dict() == before


@pytest.mark.parametrize(("capacity", "threshold"), [(0, 0.5), (-1, 0.5), (1, 0.0), (1, 1.1), (1, float("nan"))])
def test_impossible_settings_are_refused(capacity: int, threshold: float) -> None:
    with pytest.raises(ValueError, match="capacity is|threshold is"):
        PromptReplayBuffer(capacity, threshold)


def chi_square(counts: Counter[Any], cells: int, draws: int) -> float:
    expected = draws / cells
    return sum((n - expected) ** 2 / expected for n in counts.values()) + (cells - len(counts)) * expected


def churned(seed: int) -> PromptReplayBuffer:
    """Five questions left of many, so that the slots are in no order of their own."""
    buffer = filled(40, capacity=12, seed=seed)
    buffer.update([(question(f"q{i}"), 1.0) for i in (28, 31, 39, 33, 34, 37, 29)], step=2)
    assert len(buffer) == 5
    return buffer


@pytest.mark.parametrize(("exclude", "k"), [((), 2), ((), 1), (("q30", "q36"), 2), (("q30", "q36"), 3)])
def test_draws_are_uniform(exclude: tuple[str, ...], k: int) -> None:
    """Every ordered selection is equally likely: chi-square over all of them, at a bound that chance passes once in a million."""
    buffer = churned(seed=7)
    free = [name for name in ("q30", "q32", "q35", "q36", "q38") if name not in exclude]
    cells = len(list(permutations(free, k)))
    draws = 200 * cells
    counts = Counter(tuple(q.id for q in buffer.sample(k, exclude)) for _ in range(draws))
    freedom = cells - 1
    assert set(counts) <= set(permutations(free, k))
    assert chi_square(counts, cells, draws) < freedom + 7 * (2 * freedom) ** 0.5 + 10


def test_draws_of_one_buffer_differ_and_the_seed_decides_them() -> None:
    first, again, other = filled(50, seed=1), filled(50, seed=1), filled(50, seed=2)
    drawn = [first.sample(10) for _ in range(5)]
    assert drawn == [again.sample(10) for _ in range(5)]
    assert len({tuple(q.id for q in d) for d in drawn}) == 5
    assert drawn != [other.sample(10) for _ in range(5)]


def test_an_empty_buffer_and_one_that_is_all_excluded_give_nothing() -> None:
    assert PromptReplayBuffer(3).sample(4) == []
    assert filled(3).sample(4, ["q0", "q1", "q2"]) == []
    assert filled(3).sample(0) == []


def test_state_continues_with_the_same_draws_and_changes() -> None:
    one = churned(seed=3)
    one.sample(2)
    state = json.loads(json.dumps(one.state_dict()))
    two = PromptReplayBuffer(12, seed=99)
    two.load_state_dict(state)
    for step in range(3, 30):
        batch = [(question(f"q{(7 * step + i) % 45}"), ((step * i) % 9) / 8) for i in range(6)]
        assert one.sample(3, ["q30"]) == two.sample(3, ["q30"])
        assert one.update(batch, step) == two.update(batch, step)
    assert one.state_dict() == two.state_dict() and one.occupancy() == two.occupancy()


def test_the_state_is_a_copy() -> None:
    buffer = filled(3)
    state = buffer.state_dict()
    frozen = copy.deepcopy(state)
    buffer.update([(question("q1"), 1.0), (question("x"), 0.0)], step=2)
    buffer.sample(2)
    assert state == frozen


def test_a_smaller_capacity_evicts_at_the_next_update() -> None:
    buffer = PromptReplayBuffer(2)
    buffer.load_state_dict(filled(5).state_dict())
    assert len(buffer) == 5
    assert ids(buffer.update([], step=2).evicted) == ["q0", "q1", "q2"]


def damage(state: dict[str, Any], how: str) -> None:
    if how == "slot lost":
        state["slots"].pop()
    elif how == "slot twice":
        state["slots"][0] = state["slots"][1]
    elif how == "slot of another":
        state["slots"][0] = "stranger"
    elif how == "entry lost":
        state["entries"].pop()
    elif how == "entry twice":
        state["entries"].append(state["entries"][0])
    elif how == "entry cut":
        state["entries"][0].pop()
    elif how == "question cut":
        del state["entries"][0][0]["gold"]
    elif how == "no draws":
        del state["draws"]
    else:
        state["entries"] = None


@pytest.mark.parametrize(
    "how",
    ["slot lost", "slot twice", "slot of another", "entry lost", "entry twice", "entry cut", "question cut", "no draws", "no entries"],
)
def test_a_damaged_state_is_refused_and_changes_nothing(how: str) -> None:
    state = json.loads(json.dumps(filled(4).state_dict()))
    damage(state, how)
    buffer = churned(seed=1)
    before = buffer.state_dict()
    with pytest.raises(ValueError, match="damaged"):
        buffer.load_state_dict(state)
    assert buffer.state_dict() == before


class Work:
    """Elements of containers that were looked at, moved or copied."""

    done = 0


def walked(found: Iterable[Any]) -> Iterator[Any]:
    for each in found:
        Work.done += 1
        yield each


def counted(kind: type) -> type:
    """A list or dict that counts: one for what takes a moment, its length for what goes through all of it."""

    def wrapped(name: str) -> Callable[..., Any]:
        def method(self: Any, *given: Any) -> Any:
            if name in WALKS:
                return walked(getattr(kind, name)(self))
            by_key = name in LOOKUPS and kind is not list
            Work.done += 1 if by_key or name in MOMENTS or (name == "pop" and not given) else len(self)
            return getattr(kind, name)(self, *given)

        return method

    names = [name for name in dir(kind) if callable(getattr(kind, name)) and name not in UNTOUCHED]
    return type(f"Counted{kind.__name__}", (kind,), {name: wrapped(name) for name in names})


MOMENTS = {"__getitem__", "__setitem__", "append", "get", "setdefault", "popitem", "move_to_end"}
LOOKUPS = {"__contains__", "__delitem__", "pop"}  # of a dict
WALKS = {"__iter__", "__reversed__", "keys", "values", "items"}
UNTOUCHED = {name for name in dir(object) if name != "__eq__"} | {"__len__", "__class_getitem__", "__missing__", "__setstate__"}


def work_of_a_step(capacity: int) -> int:
    """400 evictions by admission, 400 graduations, 400 visits and 20 draws of 20 with 20 excluded, at full capacity."""
    buffer = filled(capacity, capacity)
    for name, value in vars(buffer).items():
        if isinstance(value, list | dict):
            setattr(buffer, name, counted(type(value))(value))
    Work.done = 0
    middle = range(capacity // 2, capacity // 2 + 400)
    solved, seen = [[(question(f"q{i}"), a) for i in middle] for a in (1.0, 0.25)]
    assert len(buffer.update([(question(f"new{i}"), 0.0) for i in range(400)], step=2).evicted) == 400
    assert buffer.update(seen, step=2) == Changes()
    assert len(buffer.update(solved, step=2).graduated) == 400
    excluded = [f"q{capacity - 1 - i}" for i in range(20)]
    assert all(len(buffer.sample(20, excluded)) == 20 for _ in range(20))
    return Work.done


def test_cost_does_not_grow_with_the_capacity() -> None:
    """Ten times the capacity: what is linear in it would be ten times the work."""
    small, large = work_of_a_step(2_000), work_of_a_step(20_000)
    assert 4 * 400 < large < 1.2 * small


@pytest.mark.parametrize("kind", [list, dict, OrderedDict, Counter])
def test_the_count_sees_what_is_linear(kind: Any) -> None:
    """What this file's idea of work rests on."""
    full = counted(kind)(range(1000) if kind is list else {i: i for i in range(1000)})

    def cost(use: Callable[[], Any]) -> int:
        Work.done = 0
        use()
        return Work.done

    assert cost(lambda: full[3]) == cost(lambda: full.__setitem__(3, 3)) == 1 and cost(lambda: next(iter(full))) <= 2
    assert min(cost(lambda: list(full)), cost(lambda: sorted(full)), cost(lambda: full == full.copy())) >= 1000
    if kind is list:
        assert min(cost(lambda: 5 in full), cost(lambda: full.index(5)), cost(lambda: full.pop(0))) >= 999
        assert cost(full.pop) == 1
    else:
        assert cost(lambda: 5 in full) == cost(lambda: full.pop(5)) == 1
        assert min(cost(lambda: list(full.values())), cost(lambda: max(full.items())), cost(lambda: dict(full))) >= 999
