"""What happened to a question of a run: a line by which a reader finds it, and its story, on a page or by `zppo inspect`.

The story of a question is every group of rollouts that it had, with prompts, images, completions and verdicts.
"""

from __future__ import annotations

import difflib
import io
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image
from rich.console import Console
from rich.padding import Padding
from rich.rule import Rule
from rich.text import Text

from zppo.core.draws import draw_key
from zppo.core.select import is_hard
from zppo.core.types import BCQ, PLAIN, ImageRef
from zppo.errors import CheckpointError, DataError, one_line
from zppo.images.store import as_url, open_file, open_image
from zppo.report.audits import audit_class, bin_count, bin_name, bin_of, compared, match
from zppo.report.charts import kind_name
from zppo.report.read_run import DAMAGE, GroupLine, RolloutFileError, Run, StepScan, open_run, question_ids, step_of
from zppo.runs.log import ROLLOUT_SCHEMA, ROLLOUTS

SIDES = (640, 320, 160)
"""Pixels of the longer side; the smaller ones where there is little room."""
_LOSSLESS = 4096  # bytes; drawings and tiny pictures are small as PNG, and blurred as JPEG


def with_images(story: Mapping[str, Any], most_bytes: int | None = None) -> dict[str, Any]:
    """The story with its images as data URIs, small enough for a page; one that cannot be read, or that is not the file that the
    model saw, is named instead. Runs from before there were digests are shown what is there now.

    Args:
        most_bytes: that all of them may take together, as far as smaller copies help; None for no limit.
    """
    digests = list(story.get("image_sha256") or ())
    if len(digests) != len(story["images"]):
        digests = [""] * len(story["images"])
    pictures = [_read(path, digest) for path, digest in zip(story["images"], digests, strict=True)]
    for side in SIDES:
        shown = [_shown(path, found, side) for path, found in zip(story["images"], pictures, strict=True)]
        if most_bytes is None or sum(len(image.get("data", "")) for image in shown) <= most_bytes:
            break
    return {name: value for name, value in story.items() if name != "image_sha256"} | {"images": shown}


def _read(path: str, digest: str) -> Image.Image | str:
    """The picture, or why there is none."""
    try:
        picture = open_image(ImageRef(path, digest)) if digest else open_file(Path(path))
    except DataError as error:
        cause = str(error).removeprefix(f"the image {path} ")
        return re.split(r"[:;] (?:put|replace|convert|crop|make) ", cause)[0]
    picture.thumbnail((SIDES[0], SIDES[0]))
    return picture


def _shown(path: str, found: Image.Image | str, side: int) -> dict[str, str]:
    if isinstance(found, str):
        return {"path": path, "missing": found}
    picture = found.copy()
    picture.thumbnail((side, side))
    return {"path": path, "data": as_url(*_smallest(picture))}


def _smallest(picture: Image.Image) -> tuple[bytes, str]:
    """Bytes and media type."""
    out = io.BytesIO()
    picture.save(out, "PNG")
    if out.tell() <= _LOSSLESS:
        return out.getvalue(), "image/png"
    out = io.BytesIO()
    picture.save(out, "JPEG", quality=80)
    return out.getvalue(), "image/jpeg"


EXCERPT = 160
"""Characters of a question's text in its line."""

HELD_OUT_KIND, HELD_OUT_KEY = "held-out", "held-out="

GRADUATED, EVICTED, WAITING, NEVER_HARD = "graduated", "evicted", "waiting", "never hard"
"""Fates: what the last of a question's buffer events was. `NEVER_HARD` stands for no event at all."""


class Visit(NamedTuple):
    """One group of a question."""

    step: int
    kind: str
    correct: int
    graded: int
    size: int
    reward: float
    tokens: int


@dataclass(slots=True)
class QuestionLine:
    """What happened to one question.

    Attributes:
        text: the beginning of its text.
        visits: its groups of all kinds, in order.
        fate: see above.
        entry_bin: index of the bin at its last admission, None where it never was in the buffer.
        classes: audit classes among its BCQ and NCQ rollouts; of a held-out question what its last evaluation was.
        held_out: it was asked in evaluations alone; an id may stand for one such question and for one of training.
    """

    id: str
    text: str
    level: str
    gold: str
    visits: list[Visit] = field(default_factory=list)
    fate: str = NEVER_HARD
    entry_bin: int | None = None
    classes: set[str] = field(default_factory=set)
    held_out: bool = False

    @property
    def key(self) -> str:
        """By what it is found on a page."""
        return f"{HELD_OUT_KEY}{self.id}" if self.held_out else self.id

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of prompts that it was asked with, in order of first appearance."""
        if self.held_out:
            return (HELD_OUT_KIND,)
        return tuple(dict.fromkeys(visit.kind for visit in self.visits))

    @property
    def steps(self) -> list[int]:
        """Steps in which it was asked, ascending."""
        return sorted({visit.step for visit in self.visits})

    @property
    def accuracies(self) -> list[float]:
        """Plain accuracy visit by visit; groups without a verdict are left out."""
        return [v.correct / v.graded for v in self.visits if v.kind == PLAIN and v.graded]

    def never_improved(self, threshold: float) -> bool:
        """Hard at first, asked plainly again, and never above its first accuracy [zppo]."""
        values = self.accuracies
        return len(values) > 1 and is_hard(values[0], threshold) and max(values[1:]) <= values[0]


def question_lines(run: Run, scans: Iterable[StepScan]) -> dict[str, QuestionLine]:
    """All questions that were asked, by id, in order of first appearance."""
    lines: dict[str, QuestionLine] = {}
    for scan in scans:
        for group in scan.groups:
            line = lines.get(group.question_id)
            if line is None:
                line = lines[group.question_id] = QuestionLine(group.question_id, _excerpt(group.question), group.level, group.gold)
            line.visits.append(_visit(group))
            line.classes |= group.classes
    bins = bin_count(run.group_size, run.threshold)
    for event in run.buffer:
        line = lines.get(event["id"])
        if line is not None:
            line.fate = WAITING if event["event"] == "admitted" else event["event"]
            line.entry_bin = bin_of(event["entry_accuracy"], run.group_size, bins)
    return lines


def _excerpt(question: str) -> str:
    """The beginning of a question's text, with a mark where it goes on."""
    text = " ".join(question[: 4 * EXCERPT].split())
    return text if len(text) <= EXCERPT and len(question) <= 4 * EXCERPT else f"{text[: EXCERPT - 1]}…"


def _visit(group: GroupLine) -> Visit:
    return Visit(group.step, group.kind, group.correct, group.graded, group.size, group.reward, group.tokens)


def held_out_lines(scans: Iterable[StepScan]) -> dict[str, QuestionLine]:
    """All questions of the evaluations, by key, in order of first appearance."""
    lines: dict[str, QuestionLine] = {}
    for scan in scans:
        for group in scan.groups:
            line = QuestionLine(group.question_id, _excerpt(group.question), group.level, group.gold, fate=HELD_OUT_KIND, held_out=True)
            line = lines.setdefault(line.key, line)
            line.visits.append(_visit(group))
            outcome = "right" if group.correct else "wrong" if group.answers else "none"
            line.classes = {f"{HELD_OUT_KIND}:{outcome}"} if group.graded else set()
    return lines


def stratified(lines: Iterable[QuestionLine], most: int) -> list[QuestionLine]:
    """Up to `most` questions, spread evenly over kinds asked, entry bins and audit classes [zppo].

    Every stratum in turn gives one question until there are enough; a question with rollouts of several audit classes lies in several
    strata. Inside a stratum the order is keyed by question id: the same run always gives the same questions, in an order in which a
    shorter list is spread as evenly.
    """
    strata: dict[tuple[str, str, str], list[QuestionLine]] = {}
    for line in lines:
        kinds = "+".join(sorted(line.kinds))
        for name in line.classes or {""}:
            strata.setdefault((kinds, str(line.entry_bin), name), []).append(line)
    queues = [iter(sorted(strata[key], key=lambda q: (draw_key("story", q.key), q.key))) for key in sorted(strata)]
    chosen: dict[str, QuestionLine] = {}
    while queues and len(chosen) < most:
        alive = []
        for queue in queues:
            found = next((q for q in queue if q.key not in chosen), None)
            if found is not None and len(chosen) < most:
                chosen[found.key] = found
                alive.append(queue)
        queues = alive
    return list(chosen.values())


def to_index(line: QuestionLine, run: Run) -> dict[str, Any]:
    """A question's line as the page reads it; short keys, because a long run has many."""
    size = sum(visit.size for visit in line.visits)
    return {
        "key": line.key,
        "id": line.id,
        "text": line.text,
        "level": line.level,
        "gold": line.gold[:EXCERPT],
        "kinds": line.kinds,
        "steps": line.steps,
        "visits": len(line.visits),
        "acc": [round(a, 4) for a in line.accuracies],
        "reward": _short(sum(visit.reward for visit in line.visits) / size),
        "tokens": round(sum(visit.tokens for visit in line.visits) / size),
        "fate": line.fate,
        "bin": None if line.entry_bin is None else bin_name(line.entry_bin, run.group_size),
        "stuck": not line.held_out and line.never_improved(run.threshold),
        "classes": sorted(line.classes),
    }


def nearest(wanted: str, known: Iterable[str], most: int = 3) -> list[str]:
    """Known ids that resemble a wanted one: those that contain it, else those that look alike."""
    names = list(known)
    containing = [name for name in names if wanted in name]
    return (containing or difflib.get_close_matches(wanted, names[:50_000], n=most, cutoff=0.5))[:most]


Story = dict[str, Any]

_ROLLOUT = ("completion", "answer", "correct", "graded", "reason", "reward", "advantage", "completion_tokens", "truncated", "entropy")


def load_stories(
    run: Run, wanted: Mapping[str, Iterable[int]], left_out: dict[Path, str] | None = None, *, held_out: bool = False
) -> dict[str, Story]:
    """The stories of some questions, by id; each file that may hold one of them is read once.

    A story has: id, level, gold, question, images (paths), image_sha256, events (of the buffer), prompts (distinct texts) and groups, each
    with step, kind, replayed, prompt (index), audit, prompt_tokens and rollouts; those of evaluations have event, eval or final. A
    question that was not asked has no groups.

    Args:
        wanted: question id -> the steps in which it may have been asked.
        held_out: tell of evaluations instead of training.

    Damaged files are left out, and named in `left_out`.
    """
    by_step: dict[int, list[str]] = {}
    for question_id, steps in wanted.items():
        for step in set(steps):
            by_step.setdefault(step, []).append(question_id)
    stories = {question_id: _new_story(question_id) for question_id in wanted}
    for event in () if held_out else run.buffer:
        if event["id"] in stories:
            stories[event["id"]]["events"].append({k: v for k, v in event.items() if k != "id"})
    training = [run.folder / ROLLOUTS / f"step-{step:06d}.parquet" for step in sorted(by_step)]
    for path in [p for p in run.held_out_files if step_of(p) in by_step] if held_out else training:
        try:
            rows = list(_rows(path, by_step[step_of(path)]))  # all of them, or none of a file that is cut
        except pa.ArrowMemoryError:
            raise
        except DAMAGE as error:
            if left_out is not None:
                left_out[path] = str(RolloutFileError(path, error))
            continue
        for row in rows:
            _add(stories[row["question_id"]], row, path.stem.partition("-")[0])
    for story in stories.values():
        _match(story)
    return stories


def _new_story(question_id: str) -> Story:
    texts = {"id": question_id, "level": "", "gold": "", "question": ""}
    return texts | {name: [] for name in ("images", "image_sha256", "events", "prompts", "groups")}


def _rows(path: Path, ids: list[str]) -> Iterable[Mapping[str, Any]]:
    """The rows of some questions; one row group is held at a time."""
    wanted = pa.array(ids, pa.string())
    with pq.ParquetFile(path) as file:
        for index in range(file.num_row_groups):
            here = pc.is_in(file.read_row_group(index, columns=["question_id"])["question_id"], value_set=wanted)
            if pc.any(here).as_py():
                yield from file.read_row_group(index, columns=ROLLOUT_SCHEMA.names).filter(here).to_pylist()


def load_lines(run: Run, lines: Iterable[QuestionLine], left_out: dict[Path, str] | None = None) -> dict[str, Story]:
    """The stories of questions of both kinds, by key; the kind stands in them as held_out. `left_out` as of `load_stories`."""
    asked: dict[bool, dict[str, QuestionLine]] = {False: {}, True: {}}
    for line in lines:
        asked[line.held_out][line.id] = line
    found: dict[str, Story] = {}
    for held_out, own in asked.items():
        if own:
            stories = load_stories(run, {line.id: line.steps for line in own.values()}, left_out, held_out=held_out)
            found |= {own[id].key: {**story, "held_out": held_out} for id, story in stories.items()}
    return found


def _add(story: Story, row: Mapping[str, Any], event: str) -> None:
    """One row of a rollout file; `event` is step, eval or final."""
    if row["rollout"] == 0:
        story.update({name: row[name] for name in ("question", "images", "level", "gold")})
        story["image_sha256"] = row.get("image_sha256") or []  # older files have none
        if row["prompt"] not in story["prompts"]:
            story["prompts"].append(row["prompt"])
        group = {name: row[name] for name in ("step", "kind", "replayed", "prompt_tokens")}
        prompt = story["prompts"].index(row["prompt"])
        story["groups"].append({**group, "event": event, "prompt": prompt, "audit": json.loads(row["audit"]), "rollouts": []})
    given = {"rewards": _by_name(row.get("rewards"), 2), "notes": _by_name(row.get("reward_notes"), 1)}  # older files have none
    story["groups"][-1]["rollouts"].append({name: _short(row[name]) for name in _ROLLOUT} | given)


def _by_name(text: str | None, fewest: int) -> str | None:
    """What a user's reward functions gave or reported, in words; None where they are fewer."""
    values = json.loads(text) if text else {}
    shown = (f"{name} {value:.4g}" if isinstance(value, int | float) else f"{name} {value}" for name, value in values.items())
    return ", ".join(shown) if len(values) >= fewest else None


def _short(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _match(story: Story) -> None:
    """Says of every BCQ and NCQ rollout whose answer it gives."""
    unseen = {g["step"]: g["audit"].get("positive_answer") for g in story["groups"] if g["kind"] == BCQ}
    for group in story["groups"]:
        answers = compared(group["kind"], group["audit"], unseen.get(group["step"]))
        for rollout in group["rollouts"]:
            if rollout["graded"] and answers is not None:
                rollout["class"] = audit_class(group["kind"], rollout["correct"], match(rollout["answer"], *answers))


def trimmed(story: Story, most_bytes: int) -> Story:
    """A story that fits: completions lose their middle first, then groups in the middle lose their texts (the outcomes stay)."""
    for characters in (8000, 2000, 500):
        if bytes_of(story) <= most_bytes:
            return story
        prompts = [cut(p, 4 * characters) for p in story["prompts"]]
        groups = [
            {**g, "rollouts": [{**r, "completion": cut(r["completion"], characters)} for r in g["rollouts"]]} for g in story["groups"]
        ]
        story = {**story, "prompts": prompts, "groups": groups, "cut": True}
    groups, left = list(story["groups"]), bytes_of(story) - most_bytes
    # From the middle outwards: the beginning and the end of a story say most.
    for index in sorted(range(len(groups)), key=lambda i: abs(2 * i - len(groups) + 1)):
        if left <= 0:
            break
        bare = {**groups[index], "rollouts": [{**r, "completion": None} for r in groups[index]["rollouts"]]}
        left -= bytes_of(groups[index]) - bytes_of(bare)
        groups[index] = bare
    return {**story, "groups": groups}


def cut(text: str, characters: int) -> str:
    """A text without its middle where it is too long; what is missing is said in its place."""
    if len(text) <= characters:
        return text
    half = characters // 2
    return f"{text[:half]}\n[... {len(text) - 2 * half:,} characters left out ...]\n{text[-half:]}"


def bytes_of(story: Story) -> int:
    """Bytes of a story on the page."""
    return len(json.dumps(story, ensure_ascii=False).encode("utf-8", "replace"))


SHOWN = 1200
"""Characters of a text that are shown unless all of it is asked for."""

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_MATCH_WORDS = {
    "bcq": {"positive": "the right candidate's answer", "negative": "the wrong candidate's answer", "other": "neither candidate's answer"},
    "ncq": {"positive": "the teacher's unseen answer", "negative": "a listed wrong answer", "other": "an answer that was not listed"},
}


def harmless(text: str) -> str:
    """A text whose control characters are shown instead of obeyed: model text must not steer the terminal."""
    return _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


def inspect_command(
    folder: Path, question_id: str, *, step: int | None, kind: str | None, full: bool, console: Console | None = None
) -> None:
    """Print one question's story.

    Raises:
        CheckpointError: the folder holds no run, or the run never asked this question.
    """
    console, left_out = console or Console(), dict[Path, str]()
    if folder.is_file():
        _inspect_file(folder, question_id, console, step=step, kind=kind, full=full)
        return
    run = open_run(folder)
    story = load_stories(run, {question_id: map(step_of, run.rollout_files)}, left_out)[question_id]
    held_out = load_stories(run, {question_id: map(step_of, run.held_out_files)}, left_out, held_out=True)[question_id]
    for problem in left_out.values():
        console.print(Text(f"left out: {problem}", style="yellow"), soft_wrap=True)
    if not story["groups"] and not held_out["groups"]:
        known = question_ids(run)
        near = nearest(question_id, known)
        hint = (
            f"similar ones: {', '.join(near)}" if near else f"it asked {len(known):,} questions, such as {', '.join(known[:1]) or 'none'}"
        )
        raise CheckpointError(f"{folder} never asked a question {question_id!r}; {hint}")
    for told in (story, held_out):
        if told["groups"]:
            print_story(told, console, step=step, kind=kind, full=full)
    if not full and any(_shortened(told, step, kind) for told in (story, held_out)):
        console.print(Text(_HOW_WHOLE, style="yellow"))


def _inspect_file(path: Path, question_id: str, console: Console, *, step: int | None, kind: str | None, full: bool) -> None:
    """Prints what one file of rollouts holds of a question, such as the completions of a measurement. CheckpointError where nothing."""
    story = _new_story(question_id)
    try:
        for row in _rows(path, [question_id]):
            _add(story, row, "measure")
        known = [] if story["groups"] else pq.read_table(path, columns=["question_id"])["question_id"].unique().to_pylist()
    except (*DAMAGE, KeyError) as error:
        raise CheckpointError(f"{path} holds no rollouts ({one_line(error)}): name a run, or completions of `zppo data measure`") from error
    if not story["groups"]:
        near = ", ".join(nearest(question_id, known) or known[:1]) or "none"
        raise CheckpointError(f"{path} holds no question {question_id!r}; it holds {len(known):,}, such as {near}")
    _match(story)
    print_story(story, console, step=step, kind=kind, full=full)
    if not full and _shortened(story, step, kind):
        console.print(Text(_HOW_WHOLE, style="yellow"))


_HOW_WHOLE = f"Texts of more than {SHOWN:,} characters lost their middle; --full shows them whole."


def _shortened(story: Story, step: int | None, kind: str | None) -> bool:
    """Whether `print_story` leaves something out."""
    groups = [g for g in story["groups"] if step in (None, g["step"]) and kind in (None, g["kind"])]
    texts = [*(story["prompts"][g["prompt"]] for g in groups), *(r["completion"] for g in groups for r in g["rollouts"])]
    return any(len(text) > SHOWN for text in texts)


def print_story(story: Story, console: Console, *, step: int | None = None, kind: str | None = None, full: bool = False) -> None:
    """Print a story.

    Args:
        story: as `load_stories` returns it.
        step, kind: show only groups of this step, of this kind of prompt.
        full: show texts whole.
    """
    limit = 10**9 if full else SHOWN
    console.print(Rule(Text(harmless(story["id"])), align="left"))
    _print(console, Text(harmless(story["question"])), 0)
    _print(
        console,
        Text(f"right answer {harmless(story['gold'])}" + (f"  level {harmless(story['level'])}" if story["level"] else ""), style="bold"),
        0,
    )
    for path in story["images"]:
        _print(console, Text(f"image {harmless(path)}", style="dim"), 0)
    for event in story["events"]:
        detail = f"at {event['entry_accuracy']:.1%}" if event["event"] == "admitted" else f"after {event['visits']} visits"
        _print(console, Text(f"step {event['step']}: {event['event']} {detail}", style="cyan"), 0)
    shown: set[int] = set()
    for group in story["groups"]:
        if step in (None, group["step"]) and kind in (None, group["kind"]):
            _print_group(console, group, story["prompts"][group["prompt"]] if group["prompt"] not in shown else None, limit)
            shown.add(group["prompt"])
    if not shown:
        asked = ", ".join(f"{g['step']} ({g['kind']})" for g in story["groups"])
        console.print(Text(f"No group fits; the question was asked in the steps {asked}.", style="yellow"))


def _print_group(console: Console, group: Mapping[str, Any], prompt: str | None, limit: int) -> None:
    rollouts = group["rollouts"]
    right, graded = sum(r["correct"] and r["graded"] for r in rollouts), sum(r["graded"] for r in rollouts)
    named = {"eval": f"evaluation at step {group['step']}", "final": "evaluation of final/", "measure": "measured"}
    when = named.get(group["event"], f"step {group['step']}")
    replayed = ", replayed" if group["replayed"] else ""
    console.print()
    console.print(Rule(Text(f"{when}{replayed}: {kind_name(group['kind'])}, {right} of {graded} right"), align="left", style="dim"))
    audit = group["audit"]
    if "correct_at" in audit:
        right, wrong = ("no answer" if audit[f"{side}_answer"] is None else audit[f"{side}_answer"] for side in ("positive", "negative"))
        words = f"candidate {audit['correct_at'] + 1} is right ({right}), the other wrong ({wrong})"
        _print(console, Text(harmless(words), style="dim"), 2)
    if "wrong_answers" in audit:
        _print(console, Text(harmless(f"listed as wrong: {', '.join(audit['wrong_answers']) or 'none'}"), style="dim"), 2)
    if audit.get("teacher_answers"):
        _print(console, Text(harmless(f"the teacher's answers, not shown: {', '.join(audit['teacher_answers'])}"), style="dim"), 2)
    if prompt is None:
        _print(console, Text("the same prompt as before", style="dim"), 2)
    else:
        tokens = "" if group["prompt_tokens"] is None else f" ({group['prompt_tokens']} tokens)"
        who = "teacher" if group["kind"] == "teacher" else "student"
        _print(console, Text(f"prompt as the {who} saw it{tokens}", style="dim"), 2)
        _print(console, Text(harmless(cut(prompt, limit))), 4)
    for number, rollout in enumerate(rollouts, 1):
        _print(console, _verdict(number, rollout, group["kind"]), 2)
        _print(console, Text(harmless(cut(rollout["completion"], limit))), 4)


def _verdict(number: int, rollout: Mapping[str, Any], kind: str) -> Text:
    """How one rollout was graded and why, in one line."""
    words, style = ("right", "bold green") if rollout["correct"] else ("wrong", "bold red")
    if not rollout["graded"]:
        words, style = "not graded", "bold yellow"
    which = _MATCH_WORDS.get(kind, {}).get(rollout.get("class", "::").split(":")[2])
    answer = "no answer" if rollout["answer"] is None else f"answer {harmless(rollout['answer'])}"
    parts, notes = rollout.get("rewards"), rollout.get("notes")
    reason = "" if rollout["reason"] == "reward" else harmless(rollout["reason"])
    facts = [answer, reason, which, f"reward {rollout['reward']:g}" + (f" ({harmless(parts)})" if parts else ""),
             harmless(notes) if notes else None,
             None if rollout["advantage"] is None else f"advantage {rollout['advantage']:.3g}",
             None if rollout["completion_tokens"] is None else f"{rollout['completion_tokens']} tokens",
             "cut by the token limit" if rollout["truncated"] else None]  # fmt: skip
    text = Text(f"{number} ", style="dim").append(words, style=style)
    return text.append(": " + ", ".join(dict.fromkeys(f for f in facts if f)), style="not bold default")


def _print(console: Console, text: Text, indent: int) -> None:
    console.print(Padding(text, (0, 0, 0, indent)), highlight=False)
