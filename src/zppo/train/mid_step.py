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
from zppo.rollout.reformulated import Reformulated
from zppo.runs.checkpoint import unusable
from zppo.teacher.compression import Source
from zppo.train.policy_gradient import PartialUpdate, UpdateCounts

_FACTS, _TOKENS = "halfway.json", "halfway.safetensors"
_ROLLOUT = tuple(f.name for f in fields(Rollout) if f.name not in ("ids", "logprobs"))


@dataclass(frozen=True, slots=True)
class StepRollouts:
    """Everything that a step has before its first update (Alg. 1, l. 2-16).

    Attributes:
        new: how many questions are new.
        replayed: ids of the replayed ones.
        plain, again: plain groups, new questions first; reformulated groups.
        zone: what the teacher gave; its prompts are those of `again`.
        counts: what grading and remote models took, for the run log; known when the updates end or stop.
        seconds: spent so far, by part of the step.
    """

    new: int
    replayed: tuple[str, ...]
    plain: list[Group]
    again: list[Group]
    zone: Reformulated
    counts: dict[str, float]
    seconds: dict[str, float]


@dataclass(frozen=True, slots=True)
class MidStep:
    """A collected step and how far its updates are."""

    collected: StepRollouts
    begun: PartialUpdate

    def write(self, folder: Path) -> None:
        """Two files in a checkpoint's folder: JSON, and token ids with log-probs as safetensors."""
        collected, begun = self.collected, self.begun
        groups = [*collected.plain, *collected.again]
        rollouts = [r for g in groups for r in g.rollouts]
        facts = {
            "new": collected.new,
            "replayed": collected.replayed,
            "plain": len(collected.plain),
            "groups": [_group_facts(g) for g in groups],
            "pools": {q: [asdict(source) for source in pool] for q, pool in collected.zone.pools.items()},
            "zone_metrics": collected.zone.metrics,
            "teacher_error": collected.zone.teacher_error,
            "counts": collected.counts,
            "seconds": collected.seconds,
            "done": begun.done,
            "tally": asdict(begun.tally),
            "old": [len(line) for line in begun.old],
        }
        (folder / _FACTS).write_text(json.dumps(facts), encoding="utf-8")
        prompts = [torch.tensor(ids, dtype=torch.int64) for g in groups for ids in (g.prompt.ids, g.prompt.forced_ids)]
        tensors = {
            "prompts": _joined(prompts, torch.int64),
            "ids": _joined([r.ids for r in rollouts], torch.int64),
            "logprobs": _joined([r.logprobs for r in rollouts], torch.float32),
            "old": _joined(begun.old, torch.float32),
        }
        save_file(tensors, folder / _TOKENS)

    @classmethod
    def read(cls, folder: Path, places: Mapping[str, str] | None = None) -> MidStep | None:
        """What `write` left in a checkpoint; None where it was made between two steps.

        Args:
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
            return cls._parse(facts, load_file(folder / _TOKENS))
        except (OSError, KeyError, TypeError, ValueError, StopIteration, RuntimeError, SafetensorError) as error:
            raise CheckpointError(unusable(folder / _FACTS, error)) from error

    @classmethod
    def _parse(cls, facts: dict[str, Any], tensors: dict[str, torch.Tensor]) -> MidStep:
        prompts = _parts(tensors["prompts"], [n for g in facts["groups"] for n in (g["prompt"], g["forced"])])
        lengths = [r["tokens"] for g in facts["groups"] for r in g["rollouts"]]
        ids, logprobs = _parts(tensors["ids"], lengths), _parts(tensors["logprobs"], lengths)
        groups = [_group(g, prompts, ids, logprobs) for g in facts["groups"]]
        plain = groups[: facts["plain"]]
        pools = {q: tuple(Source(**source) for source in pool) for q, pool in facts["pools"].items()}
        again = groups[facts["plain"] :]
        zone = Reformulated([g.prompt for g in again], pools, facts["zone_metrics"], facts["teacher_error"])
        begun = PartialUpdate(facts["done"], UpdateCounts(**facts["tally"]), list(_parts(tensors["old"], facts["old"])))
        collected = StepRollouts(
            facts["new"], tuple(facts["replayed"]), plain, again, zone, facts["counts"], facts["seconds"]
        )
        return cls(collected, begun)


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


def _group(
    facts: dict[str, Any],
    prompts: Iterator[torch.Tensor],
    ids: Iterator[torch.Tensor],
    logprobs: Iterator[torch.Tensor],
) -> Group:
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
    rollouts = tuple(
        Rollout(next(ids), next(logprobs), **{name: r[name] for name in _ROLLOUT}) for r in facts["rollouts"]
    )
    return Group(prompt, rollouts)


def _joined(lines: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    return torch.cat([torch.empty(0, dtype=dtype), *(line.cpu() for line in lines)])


def _parts(joined: torch.Tensor, lengths: Sequence[int]) -> Iterator[torch.Tensor]:
    """The tensors that `_joined` has put together. ValueError where the lengths are not those."""
    if sum(lengths) != len(joined) or min(lengths, default=0) < 0:
        raise ValueError(f"{len(joined)} tokens, and {sum(lengths)} are named")
    return iter(joined.split(list(lengths)))
