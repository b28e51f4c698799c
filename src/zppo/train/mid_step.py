"""A step that was stopped between two of its I updates: what a checkpoint keeps of it, so that it goes on with the next update."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from zppo.core.types import Group, ImageRef, Message, Prompt, Question, Rollout
from zppo.errors import CheckpointError
from zppo.rollout.teacher import Pools
from zppo.runs.checkpoint import unusable
from zppo.step_log import StepLog
from zppo.teacher.compression import Source
from zppo.train.learner import PartialUpdate, UpdateCounts

_FACTS, _TOKENS = "halfway.json", "halfway.safetensors"
_ROLLOUT = tuple(f.name for f in fields(Rollout) if f.name not in ("ids", "logprobs", "drawn"))


@dataclass(frozen=True, slots=True)
class StepRollouts:
    """Everything that a step has before its first update (Alg. 1, l. 2-16).

    Attributes:
        new: how many questions are new.
        replayed: ids of the replayed ones.
        plain, reformulated: plain groups, new questions first; reformulated groups.
        responses: correct teacher responses by question id.
    """

    new: int
    replayed: tuple[str, ...]
    plain: list[Group]
    reformulated: list[Group]
    responses: Pools


@dataclass(frozen=True, slots=True)
class MidStep:
    """The rollouts of a step, what it has logged, and how far its updates are."""

    rollouts: StepRollouts
    log: StepLog
    partial: PartialUpdate

    def write(self, folder: Path) -> None:
        """Two files in a checkpoint's folder: JSON, and token ids with log-probs as safetensors."""
        step, log, partial = self.rollouts, self.log, self.partial
        groups = [*step.plain, *step.reformulated]
        rollouts = [r for g in groups for r in g.rollouts]
        facts = {
            "new": step.new,
            "replayed": step.replayed,
            "plain": len(step.plain),
            "groups": [_group_facts(g) for g in groups],
            "pools": {q: [asdict(source) for source in pool] for q, pool in step.responses.items()},
            "counts": log.counts,
            "teacher_error": log.errors.get("teacher", ""),
            "seconds": log.elapsed(),
            "done": partial.done,
            "tally": asdict(partial.tally),
            "old": [len(line) for line in partial.old],
        }
        (folder / _FACTS).write_text(json.dumps(facts), encoding="utf-8")
        prompts = [torch.tensor(ids, dtype=torch.int64) for g in groups for ids in (g.prompt.ids, g.prompt.forced_ids)]
        tensors = {
            "prompts": _joined(prompts, torch.int64),
            "ids": _joined([r.ids for r in rollouts], torch.int64),
            "logprobs": _joined([r.logprobs for r in rollouts], torch.float32),
            "old": _joined(partial.old, torch.float32),
        }
        save_file(tensors, folder / _TOKENS)

    @classmethod
    def read(cls, folder: Path, step: int, places: Mapping[str, str] | None = None) -> MidStep | None:
        """What `write` left in a checkpoint; None where it was made between two steps.

        Args:
            step: the number of the step.
            places: where images lie now (`as_placed`).

        Raises:
            CheckpointError: the files do not hold such a step.
        """
        if not (folder / _FACTS).exists():
            return None
        try:
            facts = json.loads((folder / _FACTS).read_text(encoding="utf-8"))
            for group in facts["groups"]:
                for holder in (group, group["question"]):
                    holder["images"] = as_placed(holder["images"], places or {})
            return cls._parse(facts, load_file(folder / _TOKENS), step)
        except (OSError, KeyError, TypeError, ValueError, StopIteration, RuntimeError, SafetensorError) as error:
            raise CheckpointError(unusable(folder / _FACTS, error)) from error

    @classmethod
    def _parse(cls, facts: dict[str, Any], tensors: dict[str, torch.Tensor], step: int) -> MidStep:
        prompts = _parts(tensors["prompts"], [n for g in facts["groups"] for n in (g["prompt"], g["forced"])])
        lengths = [r["tokens"] for g in facts["groups"] for r in g["rollouts"]]
        ids, logprobs = _parts(tensors["ids"], lengths), _parts(tensors["logprobs"], lengths)
        groups = [_group(g, prompts, ids, logprobs) for g in facts["groups"]]
        pools = {q: tuple(Source(**source) for source in pool) for q, pool in facts["pools"].items()}
        split = facts["plain"]
        rollouts = StepRollouts(facts["new"], tuple(facts["replayed"]), groups[:split], groups[split:], pools)
        # Checkpoints of earlier versions have the counts in two parts.
        log = StepLog(step, {**facts.get("zone_metrics", {}), **facts["counts"]})
        log.note_error("teacher", facts["teacher_error"])
        log.resume_clock(facts["seconds"])
        old = list(_parts(tensors["old"], facts["old"]))
        return cls(rollouts, log, PartialUpdate(facts["done"], UpdateCounts(**facts["tally"]), old))


def as_placed(images: Sequence[Sequence[str]], places: Mapping[str, str]) -> list[list[str]]:
    """References as a checkpoint has them, with the places where these images lie now: a picture is known by its bytes [zppo].

    Args:
        images: (path, SHA-256) of each.
        places: paths by SHA-256; others stay where they were.
    """
    return [[places.get(digest, uri), digest] for uri, digest in images]


def _group_facts(group: Group) -> dict[str, Any]:
    """All of a group that is no tensor."""
    prompt = group.prompt
    return {
        "kind": prompt.kind,
        "question": prompt.question.to_dict(),
        "messages": prompt.messages,
        "think_open": prompt.think_open,
        "images": prompt.images,
        "audit": dict(prompt.audit),
        "prompt": len(prompt.ids),
        "forced": len(prompt.forced_ids),
        "rollouts": [{"tokens": len(r.ids)} | {name: getattr(r, name) for name in _ROLLOUT} for r in group.rollouts],
    }


def _group(facts: dict[str, Any], prompts: Iterator[torch.Tensor], ids: Iterator[torch.Tensor], logprobs: Iterator[torch.Tensor]) -> Group:
    prompt = Prompt(
        facts["kind"],
        Question.from_dict(facts["question"]),
        tuple(Message(*m) for m in facts["messages"]),
        tuple(next(prompts).tolist()),
        facts["think_open"],
        tuple(ImageRef(*i) for i in facts["images"]),
        tuple(next(prompts).tolist()),
        facts["audit"],
    )
    # Checkpoints of earlier versions lack the last fields, which have defaults.
    rollouts = tuple(Rollout(next(ids), next(logprobs), **{name: r[name] for name in _ROLLOUT if name in r}) for r in facts["rollouts"])
    return Group(prompt, rollouts)


def _joined(lines: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    return torch.cat([torch.empty(0, dtype=dtype), *(line.cpu() for line in lines)])


def _parts(joined: torch.Tensor, lengths: Sequence[int]) -> Iterator[torch.Tensor]:
    """The tensors that `_joined` has put together. ValueError where the lengths are not those."""
    if sum(lengths) != len(joined) or min(lengths, default=0) < 0:
        raise ValueError(f"{len(joined)} tokens, and {sum(lengths)} are named")
    return iter(joined.split(list(lengths)))
