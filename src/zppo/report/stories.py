"""A question's whole story: every group of rollouts that it had, with prompts, completions and verdicts."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from zppo.core.types import BCQ
from zppo.errors import CheckpointError
from zppo.report.audit import audit_class, match
from zppo.report.load import Run
from zppo.runs.log import ROLLOUT_SCHEMA, ROLLOUTS

Story = dict[str, Any]

_ROLLOUT = (
    "completion",
    "answer",
    "correct",
    "graded",
    "reason",
    "reward",
    "advantage",
    "completion_tokens",
    "truncated",
    "entropy",
)


def load_stories(run: Run, wanted: Mapping[str, Iterable[int]]) -> dict[str, Story]:
    """The stories of some questions, by id; each file that may hold one of them is read once.

    A story has: id, level, gold, question, images (paths), image_sha256, events (of the buffer), prompts (distinct texts) and groups, each
    with step, kind, replayed, prompt (index), audit, prompt_tokens and rollouts. A question that was not asked has no groups.

    Args:
        wanted: question id -> the steps in which it may have been asked.

    Raises:
        CheckpointError: a rollout file cannot be read.
    """
    by_step: dict[int, list[str]] = {}
    for question_id, steps in wanted.items():
        for step in set(steps):
            by_step.setdefault(step, []).append(question_id)
    stories: dict[str, Story] = {
        question_id: {
            "id": question_id,
            "level": "",
            "gold": "",
            "question": "",
            "images": [],
            "image_sha256": [],
            "events": [],
            "prompts": [],
            "groups": [],
        }
        for question_id in wanted
    }
    for event in run.buffer:
        if event["id"] in stories:
            stories[event["id"]]["events"].append({k: v for k, v in event.items() if k != "id"})
    for step in sorted(by_step):
        path = run.folder / ROLLOUTS / f"step-{step:06d}.parquet"
        try:
            for row in _rows(path, by_step[step]):
                _add(stories[row["question_id"]], row)
        except (OSError, pa.ArrowException) as error:
            raise CheckpointError(
                f"{path} cannot be read ({error}). Was the run taken back to a checkpoint? Then try again"
            ) from error
    for story in stories.values():
        _match(story)
    return stories


def _rows(path: Path, ids: list[str]) -> Iterable[Mapping[str, Any]]:
    """The rows of some questions; one row group is held at a time."""
    wanted = pa.array(ids, pa.string())
    with pq.ParquetFile(path) as file:
        for index in range(file.num_row_groups):
            here = pc.is_in(file.read_row_group(index, columns=["question_id"])["question_id"], value_set=wanted)
            if pc.any(here).as_py():
                yield from file.read_row_group(index, columns=ROLLOUT_SCHEMA.names).filter(here).to_pylist()


def _add(story: Story, row: Mapping[str, Any]) -> None:
    """One row of a rollout file."""
    if row["rollout"] == 0:
        story.update({name: row[name] for name in ("question", "images", "level", "gold")})
        story["image_sha256"] = row.get("image_sha256") or []  # older files have none
        if row["prompt"] not in story["prompts"]:
            story["prompts"].append(row["prompt"])
        group = {name: row[name] for name in ("step", "kind", "replayed", "prompt_tokens")}
        prompt = story["prompts"].index(row["prompt"])
        story["groups"].append({**group, "prompt": prompt, "audit": json.loads(row["audit"]), "rollouts": []})
    story["groups"][-1]["rollouts"].append({name: _short(row[name]) for name in _ROLLOUT})


def _short(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _match(story: Story) -> None:
    """Says of every BCQ and NCQ rollout whose answer it gives."""
    unseen = {g["step"]: g["audit"].get("positive_answer") for g in story["groups"] if g["kind"] == BCQ}
    for group in story["groups"]:
        audit = group["audit"]
        if "correct_at" in audit:
            positive, negatives = audit["positive_answer"], [audit["negative_answer"]]
        elif "wrong_answers" in audit:
            positive, negatives = unseen.get(group["step"]), audit["wrong_answers"]
        else:
            continue
        for rollout in group["rollouts"]:
            if rollout["graded"]:
                found = match(rollout["answer"], positive, [n for n in negatives if n is not None])
                rollout["class"] = audit_class(group["kind"], rollout["correct"], found)


def trimmed(story: Story, most_bytes: int) -> Story:
    """A story that fits: completions lose their middle first, then groups in the middle lose their texts (the outcomes stay)."""
    for characters in (8000, 2000, 500):
        if size_of(story) <= most_bytes:
            return story
        prompts = [cut(p, 4 * characters) for p in story["prompts"]]
        groups = [{**g, "rollouts": [_cut_rollout(r, characters) for r in g["rollouts"]]} for g in story["groups"]]
        story = {**story, "prompts": prompts, "groups": groups, "cut": True}
    groups, left = list(story["groups"]), size_of(story) - most_bytes
    # From the middle outwards: the beginning and the end of a story say most.
    for index in sorted(range(len(groups)), key=lambda i: abs(2 * i - len(groups) + 1)):
        if left <= 0:
            break
        bare = {**groups[index], "rollouts": [{**r, "completion": None} for r in groups[index]["rollouts"]]}
        left -= size_of(groups[index]) - size_of(bare)
        groups[index] = bare
    return {**story, "groups": groups}


def _cut_rollout(rollout: Mapping[str, Any], characters: int) -> dict[str, Any]:
    return {**rollout, "completion": cut(rollout["completion"], characters)}


def cut(text: str, characters: int) -> str:
    """A text without its middle where it is too long; what is missing is said in its place."""
    if len(text) <= characters:
        return text
    half = characters // 2
    return f"{text[:half]}\n[... {len(text) - 2 * half:,} characters left out ...]\n{text[-half:]}"


def size_of(story: Story) -> int:
    """Bytes of a story on the page."""
    return len(json.dumps(story, ensure_ascii=False).encode("utf-8", "replace"))
