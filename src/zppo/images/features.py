"""What a model is given in addition to token ids where prompts hold pictures: features, positions, token types.

Features are computed once for every distinct picture of a batch and placed wherever it stands, so that the rollouts of a prompt share
them and their gradients add up. Positions are always passed: models of the Qwen family keep those of the last prompt as a state.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from zppo.core.types import ImageRef
from zppo.errors import ModelError
from zppo.images.processor import ImageProcessor, Pixels

_PACKED = "image_grid_thw"  # with it, pictures of all sizes stand in one sequence of patches
_FEATURES = "mm_encoder_outputs"
_TYPES = ("token_type_ids", "mm_token_type_ids")
_POOLED, _LAYERS = ("pooler_output", "deepstack_features")  # what a language model reads: one of an image, and one of every layer


class Seen(NamedTuple):
    """A prompt with its pictures: token ids (L,) and references in the order in which they stand."""

    ids: torch.Tensor
    images: Sequence[ImageRef]


class Positions(NamedTuple):
    """Where the tokens of a prompt stand.

    Attributes:
        places: (A, L) int64; A axes of rotary positions, 1 where the model knows no others.
        next: position of the first token after it, on all axes.
    """

    places: torch.Tensor
    next: int


def positions_of(model: Any, image_processor: ImageProcessor, prompt: Seen) -> Positions:
    """Positions of one prompt; with multimodal rotary positions a picture takes fewer than it has tokens."""
    length = len(prompt.ids)
    ranker = _ranker(model)
    if ranker is None:
        return Positions(torch.arange(length)[None], length)
    ids = prompt.ids[None].cpu()
    types = _types(prompt.ids.cpu(), image_processor)[None]
    # `image_grid_thw` is what all who rank positions ask for; text alone is ranked by its order.
    if not prompt.images:
        return Positions(torch.arange(length).expand(3, length), length)
    grids = torch.cat([image_processor.pixels(ref)[_PACKED] for ref in prompt.images])
    places, deltas = ranker(input_ids=ids, mm_token_type_ids=types, image_grid_thw=grids, attention_mask=torch.ones_like(ids))
    return Positions(places[:, 0], int(deltas.reshape(-1)[0]) + length)


def picture_inputs(
    model: Any, image_processor: ImageProcessor | None, images: Sequence[Sequence[ImageRef]], ids: torch.Tensor
) -> dict[str, Any]:
    """Arguments of a forward pass over rows with these pictures; empty where no row has one.

    Args:
        model: whose parameters the features are computed with, gradients and autocast as the caller has them.
        images: of every row, in order.
        ids: (B, L) as they go into the model.

    Raises:
        ModelError: there are pictures and no image processor.
    """
    refs = [ref for row in images for ref in row]
    if not refs:
        return {}
    if image_processor is None:
        raise ModelError("the prompts have images, and this model was loaded without its image processor: it reads text only")
    names = inspect.signature(_inner(model).forward).parameters
    given = {_FEATURES: {"image": encode(model, image_processor, refs)}} if _FEATURES in names else _pixels(model, image_processor, refs)
    return given | {name: _types(ids, image_processor) for name in _TYPES if name in names}


def encode(model: Any, image_processor: ImageProcessor, refs: Sequence[ImageRef]) -> Any:
    """The vision encoder's output for these pictures, in this order; each distinct one is computed once."""
    inner = _inner(model)
    device = device_of(inner)
    takes = inspect.signature(inner.get_image_features).parameters
    distinct = {ref.sha256: ref for ref in refs}
    pixels = {
        digest: {name: value for name, value in image_processor.pixels(ref).items() if name in takes} for digest, ref in distinct.items()
    }
    parts: dict[str, list[Any]] = {}
    whole: Any = None
    for batch in _alike(pixels):
        tensors = {name: torch.cat([pixels[d][name] for d in batch]).to(device) for name in pixels[batch[0]]}
        whole = inner.get_image_features(**tensors, return_dict=True)
        for place, digest in enumerate(batch):
            parts[digest] = [_part(value, place, len(batch)) for value in _outputs(whole)]
    placed = [parts[ref.sha256] for ref in refs]
    pooled, *layers = (
        torch.cat(own) if isinstance(like, torch.Tensor) else list(own)  # in the form that the encoder gave
        for own, like in zip(zip(*placed, strict=True), _outputs(whole), strict=True)
    )
    return type(whole)(**{_POOLED: pooled} | ({_LAYERS: layers} if getattr(whole, _LAYERS, None) is not None else {}))


def _outputs(whole: Any) -> list[Any]:
    """The features of all pictures, then those of every layer that gives some; there may be none (Qwen3-VL without deep features)."""
    return [getattr(whole, _POOLED), *(getattr(whole, _LAYERS, None) or ())]


def why_blind(model: Any) -> str:
    """Why pictures cannot be shown to a model of this class; "" where they can, as far as its signature says."""
    inner = _inner(model)
    names = inspect.signature(inner.forward).parameters
    if _FEATURES in names and not hasattr(inner, "get_image_features"):
        return "its class computes no image features apart from its forward pass"
    lacking = [name for name in ("pixel_values", "logits_to_keep") if name not in names]
    return f"its forward pass takes no {' and no '.join(lacking)} in this version of transformers" if lacking else ""


def plain_inputs(model: Any, image_processor: ImageProcessor, ids: torch.Tensor, refs: Sequence[ImageRef]) -> dict[str, Any]:
    """Arguments with which a model's own code looks at the pictures of one row; (1, L) ids."""
    names = inspect.signature(_inner(model).forward).parameters
    return _pixels(model, image_processor, refs) | {name: _types(ids, image_processor) for name in _TYPES if name in names}


def _pixels(model: Any, image_processor: ImageProcessor, refs: Sequence[ImageRef]) -> dict[str, Any]:
    """Pixels for a model's own forward pass, every picture as often as it stands in the rows.

    For versions of transformers whose models take no features: these are computed once a row then.
    """
    inner = _inner(model)
    device, names = device_of(inner), inspect.signature(inner.forward).parameters
    shown = [{n: value for n, value in image_processor.pixels(ref).items() if n in names} for ref in refs]
    return {name: _stacked([pixels[name] for pixels in shown]).to(device) for name in shown[0]}


def device_of(model: Any) -> torch.device:
    """Where a model computes: where its weights are, but for shards in the processor's memory, which are gathered on a GPU."""
    weight = next(model.parameters())
    mesh = getattr(weight, "device_mesh", None)
    device: torch.device = weight.device if mesh is None else torch.device(mesh.device_type)
    return device


def _inner(model: Any) -> Any:
    """The model itself, without the wrapper of a distributed trainer."""
    return getattr(model, "module", model)


def _ranker(model: Any) -> Callable[..., tuple[torch.Tensor, torch.Tensor]] | None:
    """What gives multimodal rotary positions, None where there are none."""
    base = getattr(_inner(model), "base_model", None)
    found: Callable[..., tuple[torch.Tensor, torch.Tensor]] | None = getattr(base, "get_rope_index", None)
    return found


def _types(ids: torch.Tensor, image_processor: ImageProcessor) -> torch.Tensor:
    """1 where a token stands for a picture, 0 elsewhere."""
    known = torch.tensor(sorted(image_processor.image_ids), device=ids.device)
    return torch.isin(ids, known).long()


def _alike(pixels: Mapping[str, Pixels]) -> list[list[str]]:
    """Pictures that can be encoded together: all where they are sequences of patches, else those of equal shapes."""
    groups: dict[Any, list[str]] = {}
    for digest, tensors in pixels.items():
        shape = None if _PACKED in tensors else tuple((name, tuple(t.shape)) for name, t in sorted(tensors.items()))
        groups.setdefault(shape, []).append(digest)
    return list(groups.values())


def _part(value: Any, place: int, count: int) -> Any:
    """What belongs to one of `count` pictures: an entry of a list of them, or an equal share of a tensor."""
    if len(value) % count or (len(value) != count and not isinstance(value, torch.Tensor)):
        raise ModelError(f"the vision encoder made {len(value)} outputs of {count} images: they cannot be told apart")
    return value.split(len(value) // count)[place] if isinstance(value, torch.Tensor) else value[place]


def _stacked(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """What pictures bring, one after the other; where they have more or fewer parts, zeros follow the fewer, as processors fill them up."""
    wide = max((t.shape[1] for t in tensors if t.ndim > 1), default=0)
    filled = [torch.cat([t, t.new_zeros(t.shape[0], wide - t.shape[1], *t.shape[2:])], 1) if t.ndim > 1 else t for t in tensors]
    return torch.cat(filled)
