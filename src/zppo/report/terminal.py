"""A question's story in the terminal: `zppo inspect RUN QUESTION_ID`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.rule import Rule
from rich.text import Text

from zppo.report.figures import kind_name
from zppo.report.stories import Story, cut

SHOWN = 1200
"""Characters of a text that are shown unless all of it is asked for."""

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_MATCH_WORDS = {
    "bcq": {
        "positive": "the right candidate's answer",
        "negative": "the wrong candidate's answer",
        "other": "neither candidate's answer",
    },
    "ncq": {
        "positive": "the teacher's unseen answer",
        "negative": "a listed wrong answer",
        "other": "an answer that was not listed",
    },
}


def harmless(text: str) -> str:
    """A text whose control characters are shown instead of obeyed: model text must not steer the terminal."""
    return _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


def print_story(
    story: Story, console: Console, *, step: int | None = None, kind: str | None = None, full: bool = False
) -> None:
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
        Text(
            f"right answer {harmless(story['gold'])}"
            + (f"  level {harmless(story['level'])}" if story["level"] else ""),
            style="bold",
        ),
        0,
    )
    for path in story["images"]:
        _print(console, Text(f"image {harmless(path)}", style="dim"), 0)
    for event in story["events"]:
        detail = (
            f"at {event['entry_accuracy']:.1%}" if event["event"] == "admitted" else f"after {event['visits']} visits"
        )
        _print(console, Text(f"step {event['step']}: {event['event']} {detail}", style="cyan"), 0)
    shown: set[int] = set()
    for group in story["groups"]:
        if step in (None, group["step"]) and kind in (None, group["kind"]):
            _print_group(
                console, group, story["prompts"][group["prompt"]] if group["prompt"] not in shown else None, limit
            )
            shown.add(group["prompt"])
    if not shown:
        asked = ", ".join(f"{g['step']} ({g['kind']})" for g in story["groups"])
        console.print(Text(f"No group fits; the question was asked in the steps {asked}.", style="yellow"))


def _print_group(console: Console, group: Mapping[str, Any], prompt: str | None, limit: int) -> None:
    rollouts = group["rollouts"]
    right, graded = sum(r["correct"] and r["graded"] for r in rollouts), sum(r["graded"] for r in rollouts)
    replayed = ", replayed" if group["replayed"] else ""
    console.print()
    console.print(
        Rule(
            Text(f"step {group['step']}{replayed}: {kind_name(group['kind'])}, {right} of {graded} right"),
            align="left",
            style="dim",
        )
    )
    audit = group["audit"]
    if "correct_at" in audit:
        words = f"candidate {audit['correct_at'] + 1} is right ({audit['positive_answer']}), the other wrong ({audit['negative_answer']})"
        _print(console, Text(harmless(words), style="dim"), 2)
    if "wrong_answers" in audit:
        _print(
            console, Text(harmless(f"listed as wrong: {', '.join(audit['wrong_answers']) or 'none'}"), style="dim"), 2
        )
    if prompt is None:
        _print(console, Text("the same prompt as before", style="dim"), 2)
    else:
        _print(console, Text(f"prompt as the student saw it ({group['prompt_tokens']} tokens)", style="dim"), 2)
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
    facts = [answer, harmless(rollout["reason"]), which, f"reward {rollout['reward']:g}", f"advantage {rollout['advantage']:.3g}",
             f"{rollout['completion_tokens']} tokens", "cut by the token limit" if rollout["truncated"] else None]  # fmt: skip
    text = Text(f"{number} ", style="dim").append(words, style=style)
    return text.append(": " + ", ".join(dict.fromkeys(f for f in facts if f)), style="not bold default")


def _print(console: Console, text: Text, indent: int) -> None:
    console.print(Padding(text, (0, 0, 0, indent)), highlight=False)
