"""Methods are rows of one table, not trainers (method.md section 8)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Method:
    """One method: what it replays and what it asks again.

    Attributes:
        name: what a recipe says after `method:`.
        replay: whether hard questions come back from the prompt replay buffer (the dagger of the paper).
        reformulations: kinds of reformulated prompts, in building order.
        paper: where the paper has it.
    """

    name: str
    replay: bool
    reformulations: tuple[str, ...]
    paper: str

    @property
    def needs_teacher(self) -> bool:
        return bool(self.reformulations)


METHODS: dict[str, Method] = {
    row.name: row
    for row in (
        Method("grpo", False, (), "GRPO"),
        Method("grpo-replay", True, (), "GRPO†"),
        Method("grpo-both", False, ("bcq", "ncq"), "GRPO+Both"),
        Method("grpo-replay-bcq", True, ("bcq",), "GRPO†+BCQ"),
        Method("grpo-replay-ncq", True, ("ncq",), "GRPO†+NCQ"),
        Method("zppo", True, ("bcq", "ncq"), "ZPPO = GRPO†+Both, Algorithm 1"),
    )
}
