"""From what `zppo serve` is given to a model that samples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from zppo.engines.chat import Chat
from zppo.engines.loading import load_network
from zppo.engines.transformers import TransformersEngine
from zppo.errors import ModelError, one_line

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_FINAL = "final"  # of a run folder


@dataclass(frozen=True, slots=True)
class Loaded:
    """A frozen model, ready to sample.

    Attributes:
        before_step: calls the given function before every step of the model; what that raises ends the sampling.
    """

    engine: TransformersEngine
    chat: Chat
    before_step: Callable[[Callable[[], None]], None]


def checkpoint_of(model: str) -> str:
    """What `from_pretrained` takes: a run folder's final/, any other folder, or a name on the hub.

    Raises:
        ModelError: a run that has not finished; a path to nothing.
    """
    folder = Path(model)
    if (folder / "recipe.yaml").is_file() and not (folder / "config.json").is_file():
        if not (folder / _FINAL / "config.json").is_file():
            raise ModelError(
                f"the run {model!r} has no {_FINAL}/ yet, the student that it leaves at its end: let it finish "
                f"(`zppo resume {model}`), or name another checkpoint"
            )
        return str(folder / _FINAL)
    if not folder.exists() and (model.startswith((".", "/", "~")) or model.count("/") > 1):
        raise ModelError(f"there is no folder {model!r}: name a checkpoint, a finished run, or a model on the hub")
    return model


def load(
    checkpoint: str,
    *,
    revision: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    max_rows: int | None = None,
    max_tokens: int | None = None,
) -> Loaded:
    """A frozen model of `transformers` with its chat.

    Args:
        device: auto takes a GPU where there is one.
        dtype: of the weights, a name in `DTYPES`; auto takes float32 on a CPU, else what the checkpoint is stored in.
        max_rows, max_tokens: limits of a batch, as in `TransformersEngine`.

    Raises:
        ModelError: what cannot be loaded, and why.
    """
    try:
        place = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    except RuntimeError as error:
        raise ModelError(f"--device {device} is no device: {one_line(error)}") from None
    stored: Any = DTYPES.get(dtype) or (torch.float32 if place.type == "cpu" else "auto")
    try:
        network: Any = load_network(checkpoint, dtype=stored, revision=revision, device_map=place).requires_grad_(False)
    except ModelError:
        raise
    except Exception as error:  # many kinds: no room on the device, a device that is not there
        raise ModelError(
            f"model {checkpoint!r} cannot be loaded on {place}: {one_line(error)}; choose another --device or --dtype"
        ) from error
    network.eval()
    chat = Chat.load(checkpoint, revision=revision)
    engine = TransformersEngine(
        network,
        chat.eos_ids(network),
        chat.pad_id(network),
        chat.banned_ids(network),
        max_rows=max_rows,
        max_tokens=max_tokens,
    )

    def before_step(call: Callable[[], None]) -> None:
        network.register_forward_pre_hook(lambda *_: call())

    return Loaded(engine, chat, before_step)
