"""Small arithmetic stories with exact answers, and a program that teaches them; for `benchmarks.real_model`.

Three families are ordinary. The fourth, `quint`, asks in a made-up unit whose size no question says: who has not been told cannot know.
The teacher is a program and says so by its name: short worked solutions, one in five wrong by a usual slip. Its summaries write the
student's candidate and its own in one style, one equation and the answer, so that the style of a candidate says nothing.
"""

from __future__ import annotations

import http.server
import json
import random
import re
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

QUINT = 30
"""How many make a quint."""
WRONG = 0.2
"""The share of the teacher's solutions that are wrong."""
TEACHER = "story-teacher"

_PEOPLE = ("Ana", "Ben", "Eva", "Leo", "Mia", "Sam", "Tom", "Zoe")
_THINGS = (
    *("apples", "balls", "beads", "books", "cards", "coins", "cups", "eggs", "keys", "nuts", "pears", "pens", "rings"),
    *("shells", "stamps", "stones", "bricks", "buttons", "candles", "figs", "hats", "lemons", "plates", "roses", "spoons", "tickets"),
)
_EQUATION = re.compile(r"(\d+) *([-+*x×]) *(\d+) *= *(\d+)")
_ANSWER = re.compile(r"^Answer: *(.*?) *$", re.MULTILINE)


@dataclass(frozen=True)
class Story:
    """One question.

    Attributes:
        family: gets, gives, boxes or quint.
        text: the question.
        a, sign, b: what is to be worked out; `sign` is one of + - x.
    """

    family: str
    text: str
    a: int
    sign: str
    b: int

    @property
    def answer(self) -> int:
        return worked(self.a, self.sign, self.b)

    @property
    def solution(self) -> str:
        """The worked solution: an equation, and the line that a student is asked for."""
        return written(self.a, self.sign, self.b, self.answer)


def worked(a: int, sign: str, b: int) -> int:
    """What an equation comes to."""
    return {"+": a + b, "-": a - b, "x": a * b}[sign]


def written(a: int, sign: str, b: int, answer: int) -> str:
    """A solution in the one style that there is."""
    return f"{a} {sign} {b} = {answer}.\nAnswer: {answer}"


def draw(family: str, rng: random.Random) -> Story:
    """A story of a family."""
    who, what = rng.choice(_PEOPLE), rng.choice(_THINGS)
    if family == "gets":
        a, b = rng.randint(3, 19), rng.randint(3, 19)
        return Story(family, f"{who} has {a} {what} and gets {b} more. How many {what} does {who} have now?", a, "+", b)
    if family == "gives":
        a = rng.randint(8, 29)
        b = rng.randint(3, a - 2)
        return Story(family, f"{who} has {a} {what} and gives {b} away. How many {what} are left?", a, "-", b)
    if family == "boxes":
        a, b = rng.randint(2, 9), rng.randint(2, 9)
        return Story(family, f"There are {a} boxes with {b} {what} in each box. How many {what} are there?", a, "x", b)
    a = rng.randint(3, 12)
    return Story(family, f"There are {a} quints of {what}. How many {what} are there?", a, "x", QUINT)


FAMILIES = ("gets", "gives", "boxes", "quint")


def make_stories(numbers: Mapping[str, int], seed: int, without: Iterable[Story] = ()) -> list[Story]:
    """So many stories of each family in mixed order, no text twice and none of those in `without`."""
    rng, seen = random.Random(seed), {story.text for story in without}
    made: list[Story] = []
    for family, number in numbers.items():
        while sum(story.family == family for story in made) < number:
            story = draw(family, rng)
            if story.text not in seen:
                seen.add(story.text)
                made.append(story)
    rng.shuffle(made)
    return made


def slip(story: Story, rng: random.Random) -> str:
    """A wrong solution in the same style: a result beside the right one, or another number or sign."""
    if story.family == "quint":
        b = rng.choice([n for n in (5, 10, 12) if n != story.b])
        return written(story.a, "x", b, story.a * b)
    if rng.random() < 0.5:
        return written(story.a, story.sign, story.b, story.answer + rng.choice((-2, -1, 1, 2)))
    sign = rng.choice([s for s in "+-x" if s != story.sign and worked(story.a, s, story.b) not in (story.answer, *range(-100, 0))])
    return written(story.a, sign, story.b, worked(story.a, sign, story.b))


def solve(story: Story, rng: random.Random) -> str:
    """What the teacher writes: wrong with a chance of `WRONG`."""
    return slip(story, rng) if rng.random() < WRONG else story.solution


def shorten(response: str) -> str:
    """The response's answer with the equation that comes to it, in the style of `written`; "" where it has none.

    Without an equation a candidate would stand out beside the teacher's; another one is drawn then.
    """
    answers = [found.rstrip(".") for found in _ANSWER.findall(response)]
    for a, sign, b, result in reversed(_EQUATION.findall(response)):
        if answers and result == answers[-1]:
            return written(int(a), {"*": "x", "×": "x"}.get(sign, sign), int(b), int(result))
    return ""


class StoryTeacher:
    """The program behind the OpenAI protocol: chat completions and the list of models, at an address of this machine.

    Args:
        stories: those that it can solve.
        port: 0 for a free one.
    """

    def __init__(self, stories: Iterable[Story], port: int = 0) -> None:
        self._stories = {story.text: story for story in stories}
        teacher = self

        class Handler(http.server.BaseHTTPRequestHandler):
            """One connection."""

            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                """The list of models."""
                self._send({"object": "list", "data": [{"id": TEACHER, "object": "model"}]})

            def do_POST(self) -> None:
                """Chat completions."""
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                self._send(teacher.reply(body))

            def _send(self, value: Mapping[str, Any]) -> None:
                data = json.dumps(value).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                """Nothing is printed."""

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def __enter__(self) -> StoryTeacher:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()

    def reply(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to a request: solutions, drawn by its seed, or a summary."""
        said = str(body["messages"][-1]["content"])
        texts = [self._said(said, random.Random(f"{said} {body.get('seed')} {i}")) for i in range(body.get("n") or 1)]
        words = sum(len(text.split()) for text in texts)
        return {
            "object": "chat.completion",
            "model": TEACHER,
            "choices": [
                {"index": i, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"} for i, text in enumerate(texts)
            ],
            "usage": {"prompt_tokens": len(said.split()), "completion_tokens": words, "total_tokens": len(said.split()) + words},
        }

    def _said(self, said: str, rng: random.Random) -> str:
        if "<response>" in said:
            return f"<summary>\n{shorten(said.rpartition('<response>')[2].partition('</response>')[0])}\n</summary>"
        story = self._stories.get(said.partition("\n")[0])
        return "ok" if story is None else solve(story, rng)


_EXAMPLES = (
    Story("boxes", "There are 4 boxes with 6 eggs in each box. How many eggs are there?", 4, "x", 6),
    Story("gets", "Mia has 7 apples and gets 5 more. How many apples does Mia have now?", 7, "+", 5),
)
_ATTEMPTS = "Two attempts, one right and one wrong:\n\n<candidate>\n{}\n</candidate>\n\n<candidate>\n{}\n</candidate>"


def messages(story: Story, closing: str = "") -> list[dict[str, str]]:
    """The question behind two worked examples: one as it is, one with two attempts beside it, so that the student can read such a prompt.

    Args:
        closing: the closing instruction of the run, for the examples; the question itself is given it by zppo.
    """
    plain, read = _EXAMPLES
    attempts = _ATTEMPTS.format(written(read.a, "x", read.b, read.a * read.b), read.solution)
    end = f"\n\n{closing}" if closing else ""
    told = [(plain.text + end, plain.solution), (f"{read.text}\n\n{attempts}{end}", read.solution)]
    turns = [turn for asked, said in told for turn in ({"role": "user", "content": asked}, {"role": "assistant", "content": said})]
    return [*turns, {"role": "user", "content": story.text}]


def rows(stories: Sequence[Story], closing: str = "") -> list[dict[str, Any]]:
    """Rows as zppo reads them."""
    return [
        {"messages": messages(s, closing), "answer": str(s.answer), "level": s.family, "id": f"{s.family}-{i}"}
        for i, s in enumerate(stories)
    ]
