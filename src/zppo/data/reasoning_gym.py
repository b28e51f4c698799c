"""Generated questions of the reasoning_gym package: `reasoning_gym:<task>?size=1000&seed=1` (extra `gym`).

Tasks that can train are those with exactly one right answer that the rule grader tells from wrong ones. The package's own scorers are never
called: some of them execute the text that they grade. So a task is here only if comparing a boxed answer with the task's gold
(`zppo.grading`) decides it, and if the question itself, boxed, is no right answer. Both are tested.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, Literal
from urllib.parse import parse_qsl

from zppo.core.types import Message, Question
from zppo.data.local_files import SourceSettings
from zppo.errors import DataError

GymAnswer = Literal["number", "fraction", "truth", "word"]

_ALLOWED: dict[GymAnswer, str] = {
    # an integer or a decimal without rounding: equal values are equal
    "number": """
        aiw binary_alternation circuit_logic count_bits count_primes gsm_symbolic largest_island leg_counting letter_counting maze
        rotten_oranges self_reference simple_equations simple_geometry
    """,
    # equal values are equal, reduced or not
    "fraction": "dice",
    # True or False, Yes or No: the same word
    "truth": "course_schedule game_of_life_halting isomorphic_strings ransom_note syllogism",
    # the same text, upper and lower case alike
    "word": """
        acre caesar_cipher calendar_arithmetic color_cube_rotation family_relationships mahjong_puzzle needle_haystack
    """,
}

_REFUSED = {
    "several answers are right, and only its own scorer, which is not run, could tell": """
        boxnet codeio countdown course_planning cryptarithm futoshiki graph_color group_anagrams intermediate_integration jugs kakurasu
        knight_swap letter_jumble list_functions n_queens number_sequence palindrome_generation palindrome_partitioning
        propositional_logic puzzle24 quantum_lock rubiks_cube rush_hour sentence_reordering shortest_path simple_integration sokoban
        survo tower_of_hanoi tsumego word_ladder
    """,
    "its answer is a grid, a list or a sentence, whose layout or order the rule grader does not compare": """
        ab arc_1d arc_agi binary_matrix game_of_life knights_knaves manipulate_matrix mini_sudoku modulo_grid number_filtering
        number_sorting path_star pool_matrix rearc rotate_matrix spiral_matrix string_splitting string_synthesis sudoku
        word_sequence_reversal word_sorting
    """,
    "the question itself, copied into the box, equals the answer": """
        basic_arithmetic bitwise_arithmetic chain_sum complex_arithmetic decimal_arithmetic decimal_chain_sum fraction_simplification
        gcd lcm polynomial_multiplication prime_factorization products
    """,
    "its answer is rounded, or has several notations of which one is meant": """
        advanced_geometry base_conversion coin_flip number_format polynomial_equations power_function time_intervals
    """,
    "short strings of letters can be taken for products, in which order does not count": """
        spell_backward string_insertion string_manipulation
    """,
    "what its questions show depends on fonts, drawings or output that is not always legible": """
        bf emoji_mystery figlet_font rectangle_count
    """,
    "making its questions takes a tenth of a second each": "zebra_puzzles",
    "it is a mixture; name one task": "composite",
}

TASKS: Mapping[str, GymAnswer] = MappingProxyType({task: kind for kind, tasks in _ALLOWED.items() for task in tasks.split()})
"""Every task that may train, and how its answer is compared."""

REFUSED: Mapping[str, str] = MappingProxyType({task: why for why, tasks in _REFUSED.items() for task in tasks.split()})
"""Every other task, and why it may not."""


SCHEME = "reasoning_gym"
SIZE, HELD_OUT_SIZE = 1000, 100
# The package draws question i from seed + i, so that neighbouring seeds share almost all of their questions.
SEED, HELD_OUT_SEED = 0, 1_000_000_000
_LARGEST = 10_000_000


@dataclasses.dataclass(frozen=True, slots=True)
class GymSource:
    """One task with its seed, how many questions are made, and the task's own `min_...` and `max_...` settings."""

    task: str
    size: int
    seed: int
    options: Mapping[str, int]


def parse_gym(rest: str, held_out: bool = False) -> GymSource:
    """What stands behind `reasoning_gym:`; without size and seed 1000 from 0, held-out 100 from 1,000,000,000.

    Raises:
        DataError: a task that is unknown or cannot be graded, with the reason; an option that is no integer.
    """
    task, mark, query = rest.partition("?")
    source = f"{SCHEME}:{rest}"
    if task not in TASKS:
        known = ", ".join(sorted(TASKS))
        near = difflib.get_close_matches(task, TASKS, 1)
        why = REFUSED.get(task, f"no such task{f', the nearest one is {near[0]}' if near else ''}")
        raise DataError(f"{source}: {task!r} cannot train: {why}. Tasks that can: {known}")
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=True) if mark else []
        options = {key: int(value) for key, value in pairs}
    except ValueError as error:
        raise DataError(f"{source}: {query!r} cannot be read ({error}); write {SCHEME}:{task}?size=1000&seed=1, integers only") from error
    size = options.pop("size", HELD_OUT_SIZE if held_out else SIZE)
    seed = options.pop("seed", HELD_OUT_SEED if held_out else SEED)
    if not 1 <= size <= _LARGEST or seed < 0:
        raise DataError(f"{source}: size is {size} and seed is {seed}; size must be 1 to {_LARGEST}, seed at least 0")
    return GymSource(task, size, seed, options)


def check_apart(train: str, held_out: str) -> None:
    """Whether two sources generate questions of their own. DataError where both draw the same task from overlapping seeds."""
    if not (train.startswith(f"{SCHEME}:") and held_out.startswith(f"{SCHEME}:")):
        return
    a, b = parse_gym(train.partition(":")[2]), parse_gym(held_out.partition(":")[2], held_out=True)
    if (a.task, a.options) == (b.task, b.options) and a.seed < b.seed + b.size and b.seed < a.seed + a.size:
        raise DataError(
            f"{train} and {held_out} share questions: question i is drawn from seed + i, {a.seed} to {a.seed + a.size - 1} and "
            f"{b.seed} to {b.seed + b.size - 1}; give the held-out one seed={a.seed + a.size} or more, or none"
        )


def gym_questions(rest: str, reading: SourceSettings) -> Iterator[Question]:
    """Questions of a task, made one by one; ids are `<task>:<seed>:<index>`. Its scorer is never called.

    Raises:
        DataError: the package is not installed; a setting that the task does not have or does not admit.
    """
    wanted = parse_gym(rest, reading.held_out)
    source = f"{SCHEME}:{rest}"
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise DataError(f"{source}: needs the package reasoning-gym: pip install reasoning-gym ({error})") from error
    if wanted.task not in DATASETS:
        raise DataError(f"{source}: the installed reasoning-gym has no task {wanted.task!r}; install a later version")
    known = [f.name for f in dataclasses.fields(DATASETS[wanted.task][1]) if f.name.startswith(("min_", "max_"))]
    unknown = [key for key in wanted.options if key not in known]
    if unknown:
        raise DataError(f"{source}: {unknown[0]!r} is no option of it; known: {', '.join(('size', 'seed', *known))}")
    try:
        made: Any = reasoning_gym.create_dataset(wanted.task, size=wanted.size, seed=wanted.seed, **wanted.options)
    except (AssertionError, ValueError, TypeError) as error:
        raise DataError(f"{source}: its settings do not fit together: {error}; mend what stands behind the ?") from error
    return (_question(made[i], f"{wanted.task}:{wanted.seed}:{i}") for i in range(wanted.size))


def _question(item: Mapping[str, Any], identity: str) -> Question:
    return Question(identity, (Message("user", str(item["question"]).strip()),), str(item["answer"]).strip())
