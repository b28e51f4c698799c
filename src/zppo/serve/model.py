"""From what `zppo serve` is given to a model that samples."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from zppo.engines.chat import Chat
from zppo.engines.image_check import check_image_input
from zppo.engines.loading import load_network, reads_images
from zppo.engines.transformers import TransformersEngine
from zppo.errors import ModelError, one_line
from zppo.images.processor import PixelCache
from zppo.images.store import PixelLimits
from zppo.names import checkpoint_folder

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_LOG = logging.getLogger("zppo.serve")
_CACHE = 1 << 28  # bytes of preprocessed pictures that are kept for requests that show them again


@dataclass(frozen=True, slots=True)
class Loaded:
    """A frozen model, ready to sample.

    Attributes:
        blind: why it is shown no images; "" where it is.
        before_step: calls the given function before every step of the model; what that raises ends the sampling.
    """

    engine: TransformersEngine
    chat: Chat
    blind: str
    before_step: Callable[[Callable[[], None]], None]


def checkpoint_of(model: str) -> str:
    """What `from_pretrained` takes: a run folder's final/, any other folder, or a name on the hub.

    Raises:
        ModelError: a run that has not finished; a path to nothing.
    """
    found = checkpoint_folder(model)
    folder = Path(found)
    if (folder / "recipe.yaml").is_file() and not (folder / "config.json").is_file():
        raise ModelError(
            f"the run {model!r} has no final/ yet, the student that it leaves at its end: let it finish "
            f"(`zppo resume {model}`), or name another checkpoint"
        )
    if not folder.exists() and (model.startswith((".", "/", "~")) or model.count("/") > 1):
        raise ModelError(f"there is no folder {model!r}: name a checkpoint, a finished run, or a model on the hub")
    return found


def load(
    checkpoint: str,
    *,
    revision: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    max_rows: int | None = None,
    max_tokens: int | None = None,
    images: PixelLimits | None = None,
) -> Loaded:
    """A frozen model of `transformers` with its chat.

    Args:
        device: auto takes a GPU where there is one.
        dtype: of the weights, a name in `DTYPES`; auto takes float32 on a CPU, else what the checkpoint is stored in.
        max_rows, max_tokens: limits of a batch, as in `TransformersEngine`.
        images: bring pictures into these limits, where the checkpoint reads any; None for text only.

    Raises:
        ModelError: what cannot be loaded, and why.
    """
    try:
        place = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    except RuntimeError as error:
        raise ModelError(f"--device {device} is no device: {one_line(error)}") from None
    stored: Any = DTYPES.get(dtype) or (torch.float32 if place.type == "cpu" else "auto")
    sees = images is not None and reads_images(checkpoint, revision)
    try:
        network: Any = load_network(checkpoint, dtype=stored, revision=revision, images=sees, device_map=place).requires_grad_(False)
    except ModelError:
        raise
    except Exception as error:  # many kinds: no room on the device, a device that is not there
        raise ModelError(
            f"model {checkpoint!r} cannot be loaded on {place}: {one_line(error)}; choose another --device or --dtype"
        ) from error
    network.eval()
    chat, blind = _load_chat(checkpoint, revision, images if sees else None)
    engine = TransformersEngine(
        network,
        chat.eos_ids(network),
        chat.pad_id(network),
        chat.banned_ids(network),
        max_rows=max_rows,
        max_tokens=max_tokens,
        image_processor=chat.image_processor,
    )
    if not blind:
        try:
            check_image_input(engine, chat, checkpoint)
        except ModelError as error:
            raise ModelError(f"{one_line(error)}; or serve it for text alone with --max-images 0") from error

    def before_step(call: Callable[[], None]) -> None:
        network.register_forward_pre_hook(lambda *_: call())

    return Loaded(engine, chat, blind, before_step)


def _load_chat(checkpoint: str, revision: str | None, images: PixelLimits | None) -> tuple[Chat, str]:
    """The chat, and why it shows no images. A checkpoint whose image processor cannot be used is served for text [zppo]."""
    if images is None:
        return Chat.load(checkpoint, revision=revision), "this model reads text only"
    try:
        return Chat.load(checkpoint, revision=revision, images=images, cache=PixelCache(_CACHE)), ""
    except ModelError as error:
        chat = Chat.load(checkpoint, revision=revision)
        _LOG.warning("images are refused: %s", error)
        return chat, f"this model cannot be shown images here ({one_line(error, 200)})"
