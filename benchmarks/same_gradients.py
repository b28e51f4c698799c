"""That both sides do the same work: the gradient of one optimizer step on the same token ids, ours against TRL's.

Both take advantages as reward minus group mean here, since the two scale them in different ways, and no gradient is clipped; all
else is as in the other rows. TRL's loss is `dapo`: the token-level mean that ours is (method.md section 6).
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import ours, theirs
from benchmarks.common import Options, run
from benchmarks.tables import markdown
from benchmarks.world import QUICK, Shape, completions, make_model, questions

BOUND = 1e-5


def measure(options: Options) -> Mapping[str, Any]:
    """Largest difference of any gradient, relative to the largest gradient."""
    from zppo.data.order import batch_ids

    shape = dataclasses.replace(QUICK if options.quick else Shape(), steps=1)
    with tempfile.TemporaryDirectory() as folder:
        # Larger weights than elsewhere: small ones would hide an error in the lower layers.
        model, asked = make_model(Path(folder) / "model", shape, std=0.1, head=0.1), questions(shape)
        mine = _ours(ours.Ours(model, shape, asked, options.threads))
        order = [asked[i] for i in batch_ids(len(asked), shape.questions, 0, 0)]
        peer = _theirs(theirs.Theirs(model, shape, order, options.threads, 8), folder)
    if mine.keys() != peer.keys():
        raise AssertionError(f"only one side has a gradient of {sorted(mine.keys() ^ peer.keys())}")
    largest = max(float(g.abs().max()) for g in peer.values())
    difference = max(float((mine[name] - peer[name]).abs().max()) for name in mine) / largest
    if difference > BOUND:
        raise AssertionError(f"gradients differ by {difference:.1e} of the largest one, and {BOUND:g} is admitted")
    return {"largest_gradient": largest, "relative_difference": difference, "parameters": len(mine)}


def _gradients(model: Any) -> dict[str, Any]:
    return {name: p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None}


def _ours(own: ours.Ours) -> dict[str, Any]:
    sections: dict[str, dict[str, Any]] = {"advantage": {"scope": "none"}, "train": {"max_grad_norm": 1e9}}
    script, found = ours.Script(own.shape), {}
    with ours.assembled(dataclasses.replace(own, settings=sections), script) as parts:
        trainer = parts.trainer
        sampler = ours.in_order(trainer)
        replayed = ours.Replaying(sampler.engine, completions(own.shape, seed=0))
        trainer.student = dataclasses.replace(sampler, engine=replayed)
        model, optimizer = parts.student.model, trainer.learner.optimizer.optimizer.optimizer
        optimizer.register_step_pre_hook(lambda *_: found.update(_gradients(model)))
        script.new_step(0.5)
        trainer.step(1)
    return found


def _theirs(own: theirs.Theirs, folder: str) -> dict[str, Any]:
    from transformers import TrainerCallback

    settings = {"scale_rewards": "none", "max_grad_norm": 0.0}
    peer = theirs.Peer(dataclasses.replace(own, settings=settings), folder)
    peer.trainer.rollout_func = peer.replay
    found: dict[str, Any] = {}

    class Keep(TrainerCallback):
        def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
            found.update(_gradients(peer.trainer.model))

    peer.trainer.add_callback(Keep())
    peer.trainer.train()
    return found


def table(result: Mapping[str, Any]) -> str:
    """One line."""
    row = (result["parameters"], result["largest_gradient"], f"**{result['relative_difference']:.1e}**", f"{BOUND:g}")
    return markdown(["tensors", "largest gradient", "largest difference / largest gradient", "admitted"], [row])


if __name__ == "__main__":
    sys.exit(run("same_gradients", measure))
