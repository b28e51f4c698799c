"""What a step learns from: the policy gradient over groups (Alg. 1, l. 18), with a teacher's response in a group where asked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from zppo.config.settings import AdvantageSettings
from zppo.core.draws import keyed_random
from zppo.core.types import Group, Rollout
from zppo.rollout.teacher import Pools
from zppo.teacher.compression import Source
from zppo.train.update import Begun, Updater, advantages_of


@dataclass(frozen=True, slots=True)
class Learnt:
    """What a step did to the weights.

    Attributes:
        groups: what was learnt from, plain groups first; the rollout log holds these.
        advantages: (N,) of their rollouts; 0 where none is used.
        metrics: numbers for the run log.
        teacher_error: why the teacher could not serve a request that learning needed; "" where it served all.
        fault: why the run has to stop after this step; "" where it goes on.
    """

    groups: list[Group]
    advantages: torch.Tensor
    metrics: dict[str, float | None]
    teacher_error: str = ""
    fault: str = ""


class Learner(Protocol):
    """Turns the groups of a step into optimizer steps."""

    def learn(
        self, plain: Sequence[Group], again: Sequence[Group], pools: Pools, step: int, begun: Begun | None = None
    ) -> Learnt:
        """Learn from plain groups, reformulated groups and correct teacher responses.

        Args:
            begun: where `UpdateStopped` left the same step; None: from its start.

        Raises:
            UpdateStopped: the run shall stop, and the learner is between two optimizer steps.
            MemoryLimitError: memory ran out; in one process only before the first optimizer step.
        """
        ...

    def state_dict(self) -> dict[str, int]:
        """What the next step depends on, besides weights and optimizer; JSON-ready."""
        ...

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue from a state."""
        ...


class PolicyLearner:
    """The clipped surrogate over all groups of a step.

    Args:
        updater: the optimizer steps.
        advantage: how advantages are computed.
        respond: makes a rollout of a teacher response; None for methods without Teacher response.
        drop_trivial: leave groups whose rewards are all equal out of the batch and its denominator (dynamic sampling after
            reformulation, an extension).
        seed: keys the draws.
    """

    def __init__(
        self,
        updater: Updater,
        advantage: AdvantageSettings,
        *,
        respond: Callable[[Source], Rollout | None] | None,
        drop_trivial: bool,
        seed: int,
    ) -> None:
        self.updater, self.advantage, self.respond = updater, advantage, respond
        self.drop_trivial, self.seed = drop_trivial, seed

    def learn(
        self, plain: Sequence[Group], again: Sequence[Group], pools: Pools, step: int, begun: Begun | None = None
    ) -> Learnt:
        """Advantages over the whole step, then I optimizer steps."""
        groups = [*(self._with_response(g, pools, step) for g in plain), *again]
        replaced = sum(a is not b for a, b in zip(groups, plain, strict=False))
        kept = [g for g in groups if not (self.drop_trivial and trivial(g))]
        inside = advantages_of(kept, self.advantage)
        metrics = self.updater.update(kept, inside, step, begun)
        if self.respond is not None:
            metrics["teacher_responses_in_groups"] = float(replaced)
        return Learnt(groups, self._spread(groups, kept, inside), metrics, fault=self.updater.guard.fault)

    def state_dict(self) -> dict[str, int]:
        checked = self.updater.check.state_dict() if self.updater.check else {}
        return {
            "skipped_in_a_row": self.updater.guard.skipped_in_a_row,
            **self.updater.budget.state_dict(),
            **checked,
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.updater.guard.skipped_in_a_row = state["skipped_in_a_row"]
        self.updater.budget.load_state_dict(state)
        if self.updater.check:
            self.updater.check.load_state_dict(state)

    def _with_response(self, group: Group, pools: Pools, step: int) -> Group:
        """A correct teacher response in the place of a wrong rollout, both drawn uniformly, as if the student had sampled it."""
        pool = pools.get(group.question.id, ()) if self.respond is not None else ()
        wrong = [i for i, r in enumerate(group.rollouts) if r.graded and not r.correct]
        if self.respond is None or not pool or not wrong:
            return group
        rng = keyed_random(self.seed, "teacher-response", step, group.question.id)
        rollout, place = self.respond(rng.choice(pool)), rng.choice(wrong)
        if rollout is None:
            return group
        return replace(group, rollouts=(*group.rollouts[:place], rollout, *group.rollouts[place + 1 :]))

    @staticmethod
    def _spread(groups: Sequence[Group], kept: Sequence[Group], inside: torch.Tensor) -> torch.Tensor:
        """Advantages of all rollouts, 0 for those of groups that left."""
        values, held = iter(inside.tolist()), {id(g) for g in kept}
        return torch.tensor([next(values) if id(g) in held else 0.0 for g in groups for _ in g.rollouts])


def trivial(group: Group) -> bool:
    """Whether all graded rewards of a group are equal: it is all-right or all-wrong."""
    return len({r.reward for r in group.graded}) <= 1
