"""The nouns of the method (paper section 3): question, prompt, rollout, group, draft.

*gold* is the right answer of a question, *answer* what was extracted from a completion, *completion* what a model wrote.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:  # the command line reads these types before it needs torch
    import torch

PLAIN = "plain"
BCQ = "bcq"
NCQ = "ncq"
HINT = "hint"
PREFIX = "prefix"
LTE = "lte"
PARTIAL = "partial"

Grading = Literal["rule", "judge"]
"""Who decides whether an answer is right: the rules (or a reward function of the user's), or an LLM judge."""
RULE: Grading = "rule"
JUDGE: Grading = "judge"


IMAGE = "<image>"
"""Marks the place of the next image in the text of a conversation that has images; in one without images it is ordinary text [zppo]."""


AnswerList = Literal["any", "set", "ordered"]
"""How several right answers belong together: any one of them is right, all are wanted in any order, or all in their order."""


class Golds(NamedTuple):
    """Several right answers of one question."""

    how: AnswerList
    answers: tuple[str, ...]

    def __str__(self) -> str:
        """One text that names all of them and how they belong together, for the judge, logs and people."""
        words = {"any": "any one of these", "set": "all of these, in any order", "ordered": "all of these, in this order"}
        return f"{words[self.how]}: {'; '.join(self.answers)}"


Gold = str | Golds


class ImageRef(NamedTuple):
    """An image by reference, never its pixels: where it is, and the SHA-256 of its bytes (hex)."""

    uri: str
    sha256: str


class Message(NamedTuple):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


@dataclass(frozen=True, slots=True)
class Question:
    """A question with a checkable answer.

    Attributes:
        id: unique in its data set; keys every random draw that concerns the question.
        messages: the conversation that asks it; the last turn is a user's.
        gold: the right answer, or several.
        images: its images, in the order in which they stand in the conversation: at its `IMAGE` markers, or, where it has none, at the
            start of the last user turn (`core.parts`).
        level: a label by which held-out accuracy is broken down (difficulty, source); "" for none.
        grading: rule, or judge for a free-form answer (method.md section 7).
        chat: its source has it as a conversation, not as a text; reward functions of TRL's form are given completions alike.
        extra: further columns of its row, JSON-ready, for reward functions.
    """

    id: str
    messages: tuple[Message, ...]
    gold: Gold
    images: tuple[ImageRef, ...] = ()
    level: str = ""
    grading: Grading = RULE
    chat: bool = field(default=False, compare=False)
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def golds(self) -> tuple[str, ...]:
        """Every right answer by itself."""
        return (self.gold,) if isinstance(self.gold, str) else self.gold.answers

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form; `from_dict` undoes it."""
        return {
            "id": self.id,
            "messages": [list(m) for m in self.messages],
            "gold": self.gold if isinstance(self.gold, str) else {self.gold.how: list(self.gold.answers)},
            "images": [list(i) for i in self.images],
            "level": self.level,
            "grading": self.grading,
            "chat": self.chat,
            "extra": dict(self.extra),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Question:
        """The question that `to_dict` wrote."""
        gold = data["gold"]
        return cls(
            id=data["id"],
            messages=tuple(Message(*m) for m in data["messages"]),
            gold=gold if isinstance(gold, str) else next(Golds(how, tuple(answers)) for how, answers in gold.items()),
            images=tuple(ImageRef(*i) for i in data["images"]),
            level=data["level"],
            grading=data.get("grading", RULE),  # checkpoints of earlier versions lack the last ones
            chat=data.get("chat", False),
            extra=data.get("extra", {}),
        )


@dataclass(frozen=True, slots=True)
class Draft:
    """A reformulated prompt before its words are rendered: which template (`kind`) with which `slots`.

    Attributes:
        kind: name of the reformulation and of its template (bcq, ncq, a user's own).
        question: the hard question that is asked again.
        slots: what the template shows, in the order in which it shows it; nothing in them says which candidate is right.
        forced_ids: response tokens that the student continues from and that are masked from the loss (Prefix, Alg. 6).
        audit: facts for the log that the student never sees (which candidate is right, their answers); method.md section 9's audits.
    """

    kind: str
    question: Question
    slots: Mapping[str, Any]
    forced_ids: tuple[int, ...] = ()
    audit: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Prompt:
    """What one group of rollouts is sampled from.

    Attributes:
        kind: plain, bcq, ncq, or another registered name.
        question: the question behind it.
        messages: the conversation as the student sees it, before the chat template.
        ids: the same as token ids, after the chat template; the engine's input. `forced_ids` follow them.
        think_open: whether the chat template ends inside an opened think block (method.md section 7).
        images: the question's images, once.
        forced_ids, audit: see `Draft`.
    """

    kind: str
    question: Question
    messages: tuple[Message, ...]
    ids: tuple[int, ...]
    think_open: bool = False
    images: tuple[ImageRef, ...] = ()
    forced_ids: tuple[int, ...] = ()
    audit: Mapping[str, Any] = field(default_factory=dict)


class Row(NamedTuple):
    """A prompt (with forced ids, if any) and the completion that is scored; lists, tuples or (T,) int64 tensors.

    `images` are those that stand in the prompt, in order.
    """

    prompt_ids: Sequence[int] | torch.Tensor
    completion_ids: Sequence[int] | torch.Tensor
    images: tuple[ImageRef, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Rollout:
    """One graded completion of the student.

    Attributes:
        ids: (T,) int64, the sampled tokens with the end token where there is one.
        logprobs: (T,) float32, of the sampled tokens under the distribution that they were sampled from.
        text: the completion as text, special tokens left out.
        answer: what was extracted, or None.
        correct: decides hardness, pools and the buffer.
        reward: feeds advantages.
        truncated: stopped by the token limit.
        graded: False where the judge could not be reached: advantage 0, out of all statistics.
        reason: how the verdict came about, a short word for the log.
        entropy: mean over the tokens of the entropy of the sampling distribution, nats.
        rewards: what each of the user's reward functions gave, by its name; one that did not apply is left out.
        notes: what they reported about the completion, by name.
        drawn: the prompt that it was sampled from, where that is another than its group's (`core.credit`); never saved.
    """

    ids: torch.Tensor
    logprobs: torch.Tensor
    text: str
    answer: str | None
    correct: bool
    reward: float
    truncated: bool = False
    graded: bool = True
    reason: str = ""
    entropy: float = float("nan")
    rewards: Mapping[str, float] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)
    drawn: Prompt | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """The rollouts of one prompt; plain, BCQ and NCQ groups of one question are three groups (Alg. 1, l. 16)."""

    prompt: Prompt
    rollouts: tuple[Rollout, ...]

    @property
    def kind(self) -> str:
        return self.prompt.kind

    @property
    def question(self) -> Question:
        return self.prompt.question

    @property
    def graded(self) -> tuple[Rollout, ...]:
        """The rollouts that have a verdict."""
        return tuple(r for r in self.rollouts if r.graded)

    @property
    def accuracy(self) -> float:
        """rbar_x: share of correct rollouts among the graded ones; NaN if none is graded."""
        graded = self.graded
        return sum(r.correct for r in graded) / len(graded) if graded else float("nan")

    @property
    def wrong(self) -> tuple[Rollout, ...]:
        """W_x: the graded wrong rollouts, in rollout order."""
        return tuple(r for r in self.graded if not r.correct)

    @property
    def counts(self) -> bool:
        """Whether the group may touch the buffer: at least half of its rollouts are graded."""
        return 2 * len(self.graded) >= len(self.rollouts) > 0
