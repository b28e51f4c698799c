"""Which tasks of reasoning_gym can train: those with exactly one right answer that the rule grader tells from wrong ones.

The package's own scorers are never called: some of them execute the text that they grade. So a task is here only if comparing a boxed
answer with the task's gold (`zppo.grading`) decides it, and if the question itself, boxed, is no right answer. Both are tested.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

Kind = Literal["number", "fraction", "truth", "word"]

_ALLOWED: dict[Kind, str] = {
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

TASKS: Mapping[str, Kind] = MappingProxyType({task: kind for kind, tasks in _ALLOWED.items() for task in tasks.split()})
"""Every task that may train, and how its answer is compared."""

REFUSED: Mapping[str, str] = MappingProxyType({task: why for why, tasks in _REFUSED.items() for task in tasks.split()})
"""Every other task, and why it may not."""
