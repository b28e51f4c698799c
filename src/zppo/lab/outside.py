"""Questions outside the training distribution, for studies: operations that training leaves out, and longer chains [zppo]."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from zppo.core.draws import keyed_random
from zppo.core.types import Question
from zppo.lab.world import Chain, World, operation_word

UNSEEN, LONGER = "unseen", "longer"


def seen(world: World, questions: Iterable[Question]) -> list[Question]:
    """The questions in which no operation of the world's `unseen` occurs."""
    return [q for q in questions if not _asks_unseen(world, q)]


def study(world: World, questions: Sequence[Question]) -> list[Question]:
    """Held-out questions by what a run on `seen` could know about them.

    The levels of the world hold questions about operations that training asks about. Level `unseen` holds the others: the student met
    their operations in pretraining, with its misconceptions, and in no training question. Level `longer` holds every second question
    that is not easy, with one more easy operation behind it: chains of three, where training has chains of two. A student whose corpus
    has no chains of three either (`corpus.longer: 0`) answers every one with two steps.
    """
    inside = seen(world, questions)
    outside = [replace(q, level=UNSEEN) for q in questions if _asks_unseen(world, q)]
    hard = [chain for q in inside if _tiers(world, chain := chain_of(world, q)) & set(world.settings.beliefs)]
    return [*inside, *outside, *(_longer(world, chain) for chain in hard[::2])]


def chain_of(world: World, question: Question) -> Chain:
    """The chain that a question of the world asks for, from its text."""
    start, *operations, _ = question.messages[-1].content.split()
    words = [operation.word for operation in world.operations]
    return Chain(world.values.index(start), tuple(words.index(word) for word in operations))


def _tiers(world: World, chain: Chain) -> set[str]:
    return set(world.tiers(chain))


def _asks_unseen(world: World, question: Question) -> bool:
    left_out = {operation_word(name) for name in world.settings.unseen}
    return not left_out.isdisjoint(question.messages[-1].content.split())


def _longer(world: World, chain: Chain) -> Question:
    rng = keyed_random("lab", world.settings.seed, LONGER, chain.start, *chain.operations)
    return world.question(world.lengthened(chain, rng), LONGER)
