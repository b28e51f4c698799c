"""The FLOPs of Tab. 9 beside a count from the paper's own sizes. `docs/cost.md` says what follows from it.

The paper gives one figure per method and scale and no table of its parts. What stands here is our arithmetic, not the authors' word.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

DATA = Path(__file__).with_name("data")
SCALES = {"0.8B": 0.8e9, "2B": 2e9, "4B": 4e9, "9B": 9e9}
TEACHER = 27e9

STEPS, BATCH, GROUP, TEACHER_GROUP, UPDATES = 200, 384, 8, 4, 4
LONGEST = 4_096 + 12_288  # tokens of a prompt and a rollout at their limits
REPLAY = AGAIN = 0.25  # rho_replay, rho_aug
HARD = 0.38  # hard questions per plain one, from the paper's buffer at 2B (docs/cost.md)
TEACHER_RIGHT = 0.62  # share of teacher rollouts that are right: fitted to Off-Distill
ROWS = STEPS * BATCH * GROUP * LONGEST  # tokens of all plain student rollouts without replay, at their limits


@dataclass(frozen=True, slots=True)
class PaperCost:
    """A row of Tab. 9."""

    method: str
    scale: str
    hours: float
    flops: float


def paper_costs() -> list[PaperCost]:
    """Tab. 9, in its order."""
    with open(DATA / "paper_cost.csv", encoding="utf-8", newline="") as file:
        return [PaperCost(r["method"], r["scale"], float(r["hours"]), float(r["flops"])) for r in csv.DictReader(file)]


def counted(method: str, student: float, *, teacher: float = TEACHER, updates: int = 1) -> float:
    """FLOPs of a method of Tab. 9 at the paper's sizes, every prompt and rollout at its limit of tokens.

    GRPO and ZPPO: 2N sampling, 2N old log-probs, 6N forward and backward for every token; ZPPO adds teacher rollouts on all hard
    questions (compression left out). On-Distill: 2N sampling, 6N training, 2 N_T scoring. Off-Distill: 2 N_T for teacher rollouts,
    and 2 N_T scoring and 6N training of the right ones among them; 2N for the student's own rollouts.

    Args:
        method: as in Tab. 9; a dagger adds full replay from the first step.
        student, teacher: parameters.
        updates: how often forward and backward is counted for GRPO and ZPPO: 1 is what the method does (every token is used once).
    """
    replay = method.endswith("†") or method == "ZPPO"
    rows = ROWS * (1 + REPLAY * replay + AGAIN * (method == "ZPPO"))
    if method.startswith("Off-Distill"):
        theirs = rows * TEACHER_GROUP / GROUP
        return theirs * (2 * teacher * (1 + TEACHER_RIGHT) + 6 * student * TEACHER_RIGHT) + rows * 2 * student
    if method.startswith("On-Distill"):
        return rows * (8 * student + 2 * teacher)
    asked = ROWS * (1 + REPLAY) * HARD * TEACHER_GROUP / GROUP if method == "ZPPO" else 0.0
    return rows * (4 + 6 * updates) * student + asked * 2 * teacher


def nearest_scale(parameters: float) -> str | None:
    """The paper's scale that a student of so many parameters belongs to, within a third; None: none."""
    name = min(SCALES, key=lambda scale: abs(SCALES[scale] - parameters))
    return name if abs(SCALES[name] - parameters) <= SCALES[name] / 3 else None
