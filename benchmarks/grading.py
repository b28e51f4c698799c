"""How right the grader is: precision and recall on labelled pairs by kind, and the share of changed golds that it accepts.

Ours is `Grader.equal`; beside it math-verify (`parse` and `verify` as its README has them) and, where it is installed
(`pip install mathruler pylatexenc tqdm`), mathruler. Neither is told what kind of answer a gold is. An error or five seconds without a
verdict is a refusal.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from benchmarks.common import PACKAGES, ROOT, Options, run, version
from benchmarks.mutations import KINDS, mutations
from benchmarks.tables import markdown

DATA = ROOT / "tests" / "data"
SECONDS = 5

Equal = Callable[[str, str], bool]


def pairs() -> list[dict[str, Any]]:
    """The labelled pairs: kind, gold, answer, whether they are equal."""
    rows: list[dict[str, Any]] = json.loads((DATA / "grading_pairs.json").read_text(encoding="utf-8"))
    return rows


def golds() -> list[str]:
    """All right answers of the files of pairs, each once."""
    older = [row["gold"] for row in json.loads((DATA / "answer_pairs.json").read_text(encoding="utf-8"))]
    rules = [gold for gold, _, _ in json.loads((DATA / "grading_rules.json").read_text(encoding="utf-8"))]
    return sorted({*(row["gold"] for row in pairs()), *older, *rules})


def by_math_verify(gold: str, answer: str) -> bool:
    """Both in the form in which math-verify extracts LaTeX."""
    from math_verify import parse, verify

    return bool(verify(parse(f"${gold}$"), parse(rf"$\boxed{{{answer}}}$")))


def by_mathruler(gold: str, answer: str) -> bool:
    """mathruler takes the text of the box."""
    from mathruler.grader import grade_answer

    return bool(grade_answer(answer, gold))


@contextlib.contextmanager
def graders() -> Iterator[dict[str, Equal]]:
    """All that are installed, by name; says which one is not."""
    from zppo.grading import Grader

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    with Grader(deadline=SECONDS) as grader:
        found: dict[str, Equal] = {"zppo": grader.equal, "math-verify": by_math_verify}
        if importlib.util.find_spec("mathruler") and importlib.util.find_spec("pylatexenc"):
            found["mathruler"] = by_mathruler
        else:
            print("mathruler is left out: it is not installed (pip install mathruler pylatexenc tqdm)", file=sys.stderr)
        yield found


def within(seconds: int, equal: Equal) -> Equal:
    """The same with a limit; an error is a refusal too."""

    def stop(*_: Any) -> None:
        raise TimeoutError

    def limited(gold: str, answer: str) -> bool:
        before = signal.signal(signal.SIGALRM, stop)
        signal.alarm(seconds)
        try:
            return equal(gold, answer)
        except Exception:
            return False
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, before)

    return limited


def counts(said: Sequence[tuple[bool, bool]]) -> dict[str, int]:
    """What was accepted and what was refused, of pairs (label, verdict)."""
    return {
        "right accepted": said.count((True, True)),
        "right refused": said.count((True, False)),
        "wrong accepted": said.count((False, True)),
        "wrong refused": said.count((False, False)),
    }


def precision(found: Mapping[str, int]) -> float | None:
    """Of the accepted ones, the share that is right; None where nothing was accepted."""
    accepted = found["right accepted"] + found["wrong accepted"]
    return found["right accepted"] / accepted if accepted else None


def recall(found: Mapping[str, int]) -> float | None:
    """Of the right ones, the share that is accepted; None without any."""
    right = found["right accepted"] + found["right refused"]
    return found["right accepted"] / right if right else None


def on_pairs(equal: Equal, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Counts by kind and in total, the median of milliseconds, the pairs that were judged otherwise than labelled."""
    said: dict[str, list[tuple[bool, bool]]] = {}
    wrong, milliseconds = [], []
    equal("x+1", "1+x")  # a worker is there when the clock starts
    for row in rows:
        began = time.perf_counter()
        verdict = equal(row["gold"], row["answer"])
        milliseconds.append(1000 * (time.perf_counter() - began))
        said.setdefault(row["kind"], []).append((row["equal"], verdict))
        if verdict is not row["equal"]:
            wrong.append(f"{row['gold']} | {row['answer']}: {'refused' if row['equal'] else 'accepted'}")
    return {
        "kinds": {kind: counts(of_kind) for kind, of_kind in said.items()},
        "total": counts([pair for of_kind in said.values() for pair in of_kind]),
        "milliseconds": round(statistics.median(milliseconds), 3),
        "wrong": wrong,
    }


def on_mutations(equal: Equal, changed: Sequence[tuple[str, str, str]]) -> dict[str, Any]:
    """By what was changed: how many there are and how many were accepted; and which."""
    accepted = [(kind, gold, other) for kind, gold, other in changed if equal(gold, other)]
    return {
        "kinds": {kind: [sum(k == kind for k, _, _ in which) for which in (changed, accepted)] for kind in KINDS},
        "accepted": [f"{gold} | {other}" for _, gold, other in accepted],
    }


def measure(options: Options) -> Mapping[str, Any]:
    """All graders on all pairs and on all changed golds; with --quick on a few."""
    rows, changed = pairs(), mutations(golds())
    if options.quick:
        rows, changed = rows[::40], changed[::60]
    found = {}
    with graders() as all_of_them:
        for name, equal in all_of_them.items():
            limited = equal if name == "zppo" else within(SECONDS, equal)
            found[name] = {"pairs": on_pairs(limited, rows), "mutations": on_mutations(limited, changed)}
    return {
        "versions": {name: version(name) for name in (*PACKAGES[:2], "sympy", "math-verify", "mathruler")},
        "pairs": len(rows),
        "mutations": len(changed),
        "graders": found,
    }


def shown(value: float | None) -> str:
    """A share with three figures behind the point."""
    return "–" if value is None else f"{value:.3f}"


def table(result: Mapping[str, Any]) -> str:
    """Two tables: pairs by kind, changed golds by change."""
    found: dict[str, Any] = result["graders"]

    def row(label: str, counted: Mapping[str, Mapping[str, int]]) -> list[str]:
        some = next(iter(counted.values()))
        sizes = [str(some[f"{side} accepted"] + some[f"{side} refused"]) for side in ("right", "wrong")]
        return [label, *sizes, *(shown(share(counted[name])) for name in found for share in (precision, recall))]

    kinds = next(iter(found.values()))["pairs"]["kinds"]
    rows = [row(kind, {name: of["pairs"]["kinds"][kind] for name, of in found.items()}) for kind in kinds]
    rows.append(row("**all**", {name: of["pairs"]["total"] for name, of in found.items()}))
    header = ["kind", "right", "wrong", *(f"{name}, {what}" for name in found for what in ("precision", "recall"))]
    speed = ", ".join(f"{name} {of['pairs']['milliseconds']:.2f} ms" for name, of in found.items())

    changes = {name: of["mutations"]["kinds"] for name, of in found.items()}
    parts = [*KINDS, "**all**"]
    sums = {name: {**of, "**all**": [sum(n) for n in zip(*of.values(), strict=True)]} for name, of in changes.items()}
    second = [[kind, str(sums["zppo"][kind][0]), *(f"{of[kind][1]} ({_share(of[kind]):.1%})" for of in sums.values())] for kind in parts]
    return f"{markdown(header, rows)}\n\nMedian of one comparison: {speed}.\n\n" + markdown(
        ["changed", "golds", *(f"{name} accepts" for name in found)], second
    )


def _share(counted: Sequence[int]) -> float:
    return counted[1] / counted[0] if counted[0] else 0.0


if __name__ == "__main__":
    sys.exit(run("grading", measure))
