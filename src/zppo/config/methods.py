"""Methods are rows of one table, not trainers (method.md sections 8 and 13)."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass
from typing import Literal, get_args

from zppo.core.credit import Credit, Grouping
from zppo.core.reformulate import REFORMULATIONS, Need, Reformulation
from zppo.core.select import Helped
from zppo.core.types import LTE, PARTIAL
from zppo.errors import SettingsError
from zppo.names import load_object

Loss = Literal["policy", "off-distill", "on-distill", "self-distill"]
Control = Literal["none", "placebo", "scrambled"]
Estimator = Literal["nontrivial", "all", "none", "group"]
"""How advantages are computed (method.md section 5): two-step over the groups of a scope (Eqs. 2-6), or textbook GRPO (Eq. 1)."""

_ESTIMATORS: dict[Estimator, str] = {
    "nontrivial": "two-step, Eqs. 2-3",
    "all": "two-step over all groups",
    "none": "reward - group mean",
    "group": "textbook GRPO, Eq. 1",
}


@dataclass(frozen=True, slots=True)
class Method:
    """One method: what it replays, what it asks again, what enters the gradient.

    Attributes:
        name: what a recipe says after `method:`.
        paper: where the paper has it; "[zppo]" for a control of this project's.
        replay: whether hard questions come back from the prompt replay buffer (the dagger of the paper).
        reformulations: kinds of reformulated prompts, in building order; an import path names one of the user's own.
        teacher_response: on a hard question a correct teacher response takes the place of a wrong rollout in the plain group; with
            `loss: self-distill` it is what the privileged prompt shows.
        loss: the clipped surrogate over rollouts, or a divergence from the teacher on its own or on the student's completions, or from
            the student itself, which is shown a right response.
        control: what the reformulated prompts hold: what they should, the plain question again, or another question's candidates.
        advantage: the advantage estimator.
        helped: which questions are helped, by reformulations and responses (rivals: this and what follows).
        grouping: what becomes of reformulated groups.
        credit: which prompt the gradient of reformulated rollouts is on.
        gamma: shapes the ratio of what the student did not sample from that prompt (`shaped_surrogate`); None: it is clipped.
        refill: all-right and all-wrong groups leave the batch, and others are sampled in their place (DAPO).
    """

    name: str
    paper: str
    replay: bool = False
    reformulations: tuple[str, ...] = ()
    teacher_response: bool = False
    loss: Loss = "policy"
    control: Control = "none"
    advantage: Estimator = "nontrivial"
    helped: Helped = "hard"
    grouping: Grouping = "own"
    credit: Credit = "shown"
    gamma: float | None = None
    refill: bool = False

    @property
    def needs(self) -> frozenset[Need]:
        """What of a hard question must be prepared for the reformulations: candidates, a hint, a response."""
        return frozenset(need for kind in self.reformulations for need in needs_of(kind))

    @property
    def distils(self) -> bool:
        return self.loss != "policy"

    @property
    def advantages(self) -> str:
        """How advantages are computed, in words."""
        return "-" if self.distils else _ESTIMATORS[self.advantage]

    @property
    def asks_distributions(self) -> bool:
        """Whether the teacher's next-token distributions are learnt from."""
        return self.loss in ("off-distill", "on-distill")

    @property
    def needs_teacher(self) -> bool:
        alone = all(kind == LTE for kind in self.reformulations)  # it shows nothing but the student's own answers, as they are
        return not alone or self.teacher_response or self.asks_distributions

    @property
    def rearranges(self) -> bool:
        """Whether the gradient is of other groups than those that were sampled (`core.credit`)."""
        return self.grouping != "own" or self.credit != "shown"

    @property
    def plain_step(self) -> bool:
        """Whether a step is the paper's: groups as they were sampled, in the clipped surrogate."""
        own = self.rearranges or self.teacher_response or self.distils or self.refill
        return not own

    @property
    def gradient(self) -> str:
        """What enters the gradient, in words."""
        if self.loss == "off-distill":
            return "divergence from the teacher on its correct responses"
        if self.loss == "on-distill":
            return "divergence from the teacher on the student's rollouts"
        if self.loss == "self-distill":
            shown = "a teacher response" if self.teacher_response else "another right rollout"
            return f"divergence from the student itself that is shown {shown}, on its rollouts"
        every = self.helped == "every"
        place = "one rollout of each" if every else "one wrong rollout of a hard one"
        plain = f"plain groups, {place} replaced by a teacher response" if self.teacher_response else "plain groups"
        plain += ", all-right and all-wrong ones replaced by others" if self.refill else ""
        again = " + ".join(kind if ":" in kind else kind.upper() for kind in self.reformulations)
        again += {"none": "", "placebo": " as the plain question", "scrambled": " with another question's candidates"}[self.control]
        if self.grouping != "own":
            count = "a right rollout" if self.grouping == "one-joins" else "right rollouts"
            again = f"{count} of {again} in them"
        again += ", credited to the plain prompt" if self.credit == "plain" else ""
        again += " (unsolved questions)" if self.helped == "unsolved" else ""
        return f"{plain} + {again}" if self.reformulations else plain

    def problem(self) -> str:
        """Why this combination cannot train; "" where it can."""
        if self.distils and (self.reformulations or (self.teacher_response and self.loss != "self-distill")):
            return f"loss {self.loss} has no policy gradient for reformulations or teacher responses to enter"
        if self.rearranges and not self.reformulations:
            return "its gradient is that of reformulated prompts on the plain one, and there are none: leave method.reformulations out"
        if self.gamma is not None and not (self.credit == "plain" or self.teacher_response):
            return "it shapes the ratio of teacher responses, and there are none: leave method.teacher_response out"
        if self.control != "none" and not self.reformulations:
            return f"control {self.control} needs reformulations to take the content from"
        if self.control == "scrambled" and any(
            getattr(REFORMULATIONS.get(kind), "shows_question_alone", False) for kind in self.reformulations
        ):
            return "control scrambled exchanges what a prompt shows, and one of its prompts shows the question alone (prefix does)"
        if len(set(self.reformulations)) != len(self.reformulations):
            return "a reformulation stands twice"
        return ""


def load_reformulation(kind: str) -> Reformulation:
    """The reformulation of a kind, or of an import path.

    Raises:
        SettingsError: one of the user's own cannot be imported or is none; the message says why.
    """
    if kind in REFORMULATIONS:
        return REFORMULATIONS[kind]()
    made = load_object(kind, "reformulation", SettingsError)()
    missing = [name for name in ("kind", "needs", "draft") if not hasattr(made, name)]
    if missing:
        raise SettingsError(
            f"reformulation {kind!r} has no {', '.join(missing)}: a reformulation is a class with `kind`, `needs` and `draft` "
            "(zppo.core.reformulate.Reformulation)"
        )
    known = frozenset(get_args(Need))
    if not isinstance(made.needs, Set) or not made.needs <= known:
        raise SettingsError(
            f"reformulation {kind!r} needs {made.needs!r}, and what can be prepared is {', '.join(sorted(known))}: write them as a set "
            'of these, such as frozenset({"wrong"})'
        )
    if not isinstance(made.kind, str) or not made.kind.isidentifier():
        raise SettingsError(f"reformulation {kind!r} has the kind {made.kind!r}; a kind is one word, the name of its template")
    reformulation: Reformulation = made
    return reformulation


def needs_of(kind: str) -> frozenset[Need]:
    """What the reformulation of a kind, or of an import path, needs."""
    return load_reformulation(kind).needs


BOTH = ("bcq", "ncq")

RIVALS = (
    Method("dapo", "DAPO, 2503.14476", advantage="group", refill=True),
    Method("luffy", "LUFFY, 2504.14945", teacher_response=True, helped="every", gamma=0.1, advantage="none"),
    Method(
        "guide-grpo", "Guide-GRPO, 2506.13923", reformulations=("hint",), helped="unsolved", credit="plain", gamma=1.0, advantage="group"
    ),
    Method("scaf-grpo", "Scaf-GRPO, 2510.19807", reformulations=("hint",), helped="unsolved", grouping="one-joins", advantage="group"),
    Method(
        "lte",
        "LTE, 2510.26109",
        reformulations=(LTE,),
        helped="unsolved",
        grouping="all-join",
        credit="plain",
        gamma=0.1,
        advantage="group",
    ),
    Method("pope", "POPE, 2601.18779", reformulations=(PARTIAL,), helped="unsolved", advantage="group"),
    Method("sdpo", "SDPO, 2601.20802", loss="self-distill"),
    Method("opsd", "OPSD, 2601.18734", teacher_response=True, helped="every", loss="self-distill"),
)
"""Other answers to the question that ZPPO asks, what to do with hard questions; what is simplified stands in method.md section 13."""

METHODS: dict[str, Method] = {
    row.name: row
    for row in (
        Method("grpo", "GRPO, Alg. 4"),
        Method("grpo-replay", "GRPO†", replay=True),
        Method("grpo-both", "GRPO+Both", reformulations=BOTH),
        Method("grpo-replay-bcq", "GRPO†+BCQ", replay=True, reformulations=("bcq",)),
        Method("grpo-replay-ncq", "GRPO†+NCQ", replay=True, reformulations=("ncq",)),
        Method("zppo", "ZPPO, Alg. 1", replay=True, reformulations=BOTH),
        Method("teacher-response", "project page", teacher_response=True),
        Method("teacher-response-replay", "project page, †", replay=True, teacher_response=True),
        Method("hint", "Hint, Alg. 5", replay=True, reformulations=("hint",)),
        Method("prefix", "Prefix, Alg. 6", replay=True, reformulations=("prefix",)),
        Method("off-distill", "Off-Distill, Alg. 2", loss="off-distill"),
        Method("off-distill-replay", "Off-Distill†", replay=True, loss="off-distill"),
        Method("on-distill", "On-Distill, Alg. 3", loss="on-distill"),
        Method("on-distill-replay", "On-Distill†", replay=True, loss="on-distill"),
        Method("zppo-placebo", "[zppo]", replay=True, reformulations=BOTH, control="placebo"),
        Method("zppo-scrambled", "[zppo]", replay=True, reformulations=BOTH, control="scrambled"),
        *RIVALS,
    )
}
