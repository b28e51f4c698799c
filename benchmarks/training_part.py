"""The training part alone: the same token ids replayed through both sides, from rewards to weights."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import partial
from typing import Any

from benchmarks.common import Options, interleaved, medians, ratio, run
from benchmarks.pair import sides
from benchmarks.step_vs_trl import PEER_ROWS, SHARES
from benchmarks.tables import markdown, span
from benchmarks.world import QUICK, Shape


def measure(options: Options) -> Mapping[str, Any]:
    """TRL with three micro-batch sizes at the first share; the fastest one at the others too."""
    shape = QUICK if options.quick else Shape()
    peer_rows, shares = ((8,), SHARES[:1]) if options.quick else (PEER_ROWS, SHARES)
    found: dict[str, Any] = {}
    with sides(shape, options.threads, peer_rows=peer_rows) as started:
        for worker in started.values():
            worker.ask({"trivial": 0.5, "replay": True})
        names = list(started)
        for share in shares:
            asked = {"trivial": share, "replay": True}
            steps = interleaved(options.repetitions, {n: partial(_step, started[n], asked) for n in names})
            best = min((n for n in names if n.startswith("trl")), key=lambda n: medians(steps[n])["training"])
            names = ["grpo", best]
            found[f"{share:.0%}"] = {
                "peer": best,
                "ratio": ratio(steps["grpo"], steps[best], "training"),
                "medians": {n: medians(rows) for n, rows in steps.items()},
            }
    return {"shape": vars(shape), "repetitions": options.repetitions, "shares": found}


def _step(worker: Any, asked: Mapping[str, Any]) -> dict[str, float]:
    reply: dict[str, float] = worker.ask(asked)
    return {**reply, "training": reply["logprobs"] + reply["update"]}


def table(result: Mapping[str, Any]) -> str:
    """Ratios first."""
    shares = result["shares"]
    rows: list[tuple[Any, ...]] = [("**our training part / TRL's**", *(span(s["ratio"]) for s in shares.values()))]
    rows.append(("our seconds", *(s["medians"]["grpo"]["training"] for s in shares.values())))
    rows.append(("TRL's seconds", *(s["medians"][s["peer"]]["training"] for s in shares.values())))
    rows.append(("TRL's rows a micro-batch, the fastest", *(s["peer"].split()[1] for s in shares.values())))
    own = [s["medians"]["grpo"] for s in shares.values()]
    rows.append(("tokens computed / needed", *(m["train_tokens_computed"] / m["train_tokens_needed"] for m in own)))
    return markdown(["groups without a gradient", *shares], rows)


if __name__ == "__main__":
    sys.exit(run("training_part", measure))
