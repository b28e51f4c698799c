"""Do image inputs give the same outputs here as in the model's own code? Checked before a run starts, for any architecture [zppo]."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from zppo.core.types import ImageRef, Message, Row
from zppo.engines.base import SampleRequest, Sampling
from zppo.engines.chat import Chat
from zppo.engines.logprobs import completion_logprobs
from zppo.engines.transformers import TransformersEngine
from zppo.errors import ModelError, ZPPOError, one_line
from zppo.images.features import plain_inputs, why_blind

TOLERANCE_FP32, TOLERANCE_ROUNDED = 2e-3, 0.1  # mean difference of log-probs, nats a token
_TOKENS = 4


def check_image_input(engine: TransformersEngine, chat: Chat, name: str) -> None:
    """Compares sampling, the training forward and the library's own forward pass on prompts with two pictures, one and none, side by
    side: pictures that are taken for one another are found too.

    Args:
        engine: over the model, with the chat's image processor.
        name: of the model, for messages.

    Raises:
        ModelError: they differ, or one of them cannot be done; the message says what.
    """
    if reason := why_blind(engine.model):
        raise _cannot(name, reason)
    try:
        with tempfile.TemporaryDirectory() as folder:
            worst = _difference(engine, chat, _pictures(Path(folder)))
    except ZPPOError as error:
        raise _cannot(name, str(error)) from error
    except Exception as error:  # the model's own code may fail in any way
        raise _cannot(name, f"{type(error).__name__}: {one_line(error)}") from error
    exact = next(engine.model.parameters()).dtype == torch.float32 and engine.autocast_dtype is None
    if not worst <= (TOLERANCE_FP32 if exact else TOLERANCE_ROUNDED):
        raise _cannot(name, f"its log-probs with pictures in a batch differ by {worst:.3g} a token from those of its own code")


def _pictures(folder: Path) -> list[ImageRef]:
    """Gradients of colours, as files: two of one size, and one of another."""
    found: list[ImageRef] = []
    for size, order in (((96, 64), (0, 1, 2)), ((96, 64), (2, 0, 1)), ((48, 112), (1, 2, 0))):
        path = folder / f"check-{len(found)}.png"
        ramp = Image.linear_gradient("L").resize(size)
        colours = ramp, ramp.transpose(Image.Transpose.FLIP_TOP_BOTTOM), ramp.rotate(90)
        Image.merge("RGB", [colours[i] for i in order]).save(path)
        found.append(ImageRef(str(path), hashlib.sha256(path.read_bytes()).hexdigest()))
    return found


@torch.no_grad()
def _difference(engine: TransformersEngine, chat: Chat, refs: Sequence[ImageRef]) -> float:
    """The larger mean difference of log-probs from the library's own: of the sampler, of the training forward."""
    assert chat.image_processor is not None
    first, second, third = refs
    asked = (("What do you see?", (first, third), (1, 2)), ("And here?", (second,), (3,)), ("1 + 1 = ? " * 3, (), (4,)))
    requests = [SampleRequest(chat.encode([Message("user", text)], own), keys, own) for text, own, keys in asked]
    done = engine.sample(requests, Sampling(max_new_tokens=_TOKENS))
    rows = [Row(r.prompt_ids, c.ids, r.images) for r, group in zip(requests, done, strict=True) for c in group]
    banned = sorted(engine.banned_ids)
    with engine.autocast():
        logprobs, mask = completion_logprobs(
            engine.model, rows, banned_ids=banned, pad_id=engine.pad_id, image_processor=chat.image_processor
        )
        wanted = [_plainly(engine, chat, row, banned) for row in rows]
    sampled = torch.cat([c.logprobs for group in done for c in group])
    own = torch.cat(wanted).float().cpu()
    return max(float((values - own).abs().mean()) for values in (sampled, logprobs[mask].float().cpu()))


def _plainly(engine: TransformersEngine, chat: Chat, row: Row, banned: list[int]) -> torch.Tensor:
    """(T,) log-probs of one row as the model's own code has them."""
    assert chat.image_processor is not None
    completion = torch.as_tensor(row.completion_ids)
    ids = torch.cat([torch.as_tensor(row.prompt_ids), completion])[None].to(engine.model.device)
    given = plain_inputs(engine.model, chat.image_processor, ids, row.images) if row.images else {}
    out = engine.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **given)
    logits = out.logits[0, len(row.prompt_ids) - 1 : -1].float()
    logits[:, [i for i in banned if i < logits.shape[1]]] = float("-inf")
    logprobs: torch.Tensor = logits.log_softmax(-1).gather(1, completion[:, None].to(logits.device))[:, 0]
    return logprobs


def _cannot(name: str, reason: str) -> ModelError:
    return ModelError(
        f"model {name!r} cannot be shown images here: {reason}. Take a model of a family that docs/images.md names, or questions without "
        "images"
    )
