"""A checkpoint's image processor: the token ids that stand for a picture, and the tensors that its model takes for one.

Pictures are preprocessed once a step and cached for everything that uses them.
"""

from __future__ import annotations

import inspect
import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy
import torch
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, PreTrainedTokenizerBase
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.utils.hub import cached_file

from zppo.core.types import ImageRef
from zppo.errors import ModelError, one_line
from zppo.images.store import PixelLimits, fit, fitted_size, open_image, shown_size
from zppo.names import load_part

if TYPE_CHECKING:
    import torch

Pixels = Mapping[str, "torch.Tensor"]
"""What a model takes for one picture: pixel values, and whatever else its architecture wants."""

Key = tuple[str, str]
"""Digest of a picture, and what was done to it (processor and limits)."""


class PixelCache:
    """Preprocessed pictures by digest and processor, within a bound of memory; the least recently used ones leave first.

    Threads take turns.

    Args:
        most_bytes: what the tensors may take together; the last one is kept however large it is.
    """

    def __init__(self, most_bytes: int = 4 << 30) -> None:
        self.most_bytes = most_bytes
        self.held_bytes = 0
        self._held: OrderedDict[Key, Pixels] = OrderedDict()
        self._pinned: frozenset[str] = frozenset()
        self._turn = threading.Lock()

    def get(self, key: Key, make: Callable[[], Pixels]) -> Pixels:
        """What is held under a key, made where it is not."""
        with self._turn:
            if key in self._held:
                self._held.move_to_end(key)
                return self._held[key]
            made = self._held[key] = make()
            self.held_bytes += _size(made)
            while self.held_bytes > self.most_bytes and len(self._held) > 1:
                self._drop(next(iter(self._held)))
            return made

    def pin(self, digests: Collection[str]) -> None:
        """Names the pictures that `clear` leaves: those that every step looks at."""
        self._pinned = frozenset(digests)

    def clear(self) -> None:
        """Forgets everything that is not pinned: a new step begins."""
        with self._turn:
            for key in [key for key in self._held if key[0] not in self._pinned]:
                self._drop(key)

    def _drop(self, key: Key) -> None:
        self.held_bytes -= _size(self._held.pop(key))


def _size(pixels: Pixels) -> int:
    return sum(t.numel() * t.element_size() for t in pixels.values())


FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
"""What a checkpoint may hold in addition to weights and tokenizer, for code that shows pictures to it."""
_PICTURE = "_picture"  # (H, W, 3) uint8, in addition to what the model takes
_MOST_SIZES = 1 << 18  # sizes of pictures that are remembered
_MOST_PLACEHOLDERS = 1 << 16  # sizes whose placeholders are remembered: some are found by preprocessing a blank picture, 10 ms or more
_ROUND_TRIP = ((96, 64), (50, 210))  # sizes of pictures on which placeholders are looked at when a checkpoint is loaded


class Placeholder(NamedTuple):
    """What stands for a picture in a prompt's text, and how many of its token ids stand for features of the picture."""

    text: str
    features: int


class ImageProcessor:
    """The image processor of a checkpoint and what its prompts hold in a picture's place.

    Pictures are brought into the pixel limits: by the processor where it knows such limits itself (Qwen), before it elsewhere.

    Args:
        processor: of `transformers`, with its image processor and tokenizer.
        limits: fewest and most pixels of a picture as the model sees it.
        cache: of preprocessed pictures; shared by models with equal processors.
        files: what the checkpoint holds for its processor, by name; a trained student keeps them.

    Attributes:
        token: what the chat template writes in a picture's place.
        image_ids: the ids that stand for features of pictures; never written by a model.
        own_limits: pixel limits that the checkpoint's processor has of its own; None where it knows none.
        keeps_pictures: keep the pictures themselves too, for an engine that preprocesses them once more (vLLM).

    Raises:
        ModelError: the processor does not say what stands for a picture.
    """

    def __init__(
        self, processor: Any, limits: PixelLimits | None = None, cache: PixelCache | None = None, files: Mapping[str, bytes] | None = None
    ) -> None:
        self.processor, self.limits = processor, limits or PixelLimits()
        self.cache, self.files = cache or PixelCache(), dict(files or {})
        own = getattr(type(processor.image_processor), "valid_kwargs", None)
        self._limits_itself = {"min_pixels", "max_pixels"} <= set(getattr(own, "__annotations__", {}))
        self.own_limits: PixelLimits | None = None
        self.keeps_pictures = False
        if self._limits_itself:
            size = processor.image_processor.size
            self.own_limits = PixelLimits(size["shortest_edge"], size["longest_edge"])
            processor.image_processor.size = type(size)(shortest_edge=self.limits.min_pixels, longest_edge=self.limits.max_pixels)
        self.token: str = processor.image_token
        self.image_ids = frozenset(int(i) for i in processor.image_token_ids if i is not None)
        if not self.token or not self.image_ids:
            raise ModelError(f"{type(processor).__name__} names no token that stands for an image")
        look = (type(processor.image_processor).__name__, self.limits, processor.image_processor.to_json_string())
        self._fingerprint = json.dumps(look)
        self._sizes: dict[str, tuple[int, int]] = {}
        self._distinct: dict[Placeholder, Placeholder] = {}
        self._placeholder_of = lru_cache(maxsize=_MOST_PLACEHOLDERS)(self._make_placeholder)
        self._counted = self._counts_patches()

    @classmethod
    def load(
        cls,
        name: str | Path,
        tokenizer: PreTrainedTokenizerBase,
        limits: PixelLimits | None = None,
        cache: PixelCache | None = None,
        *,
        revision: str | None = None,
    ) -> ImageProcessor:
        """The image processor of a checkpoint (folder or hub name), with PIL.

        A processor for videos, which may want packages that are not there, is left out: frames come as several images.

        Raises:
            ModelError: it has no image processor, or one that cannot be used.
        """
        try:
            config = load_part(AutoConfig, name, revision=revision)
            images = load_part(AutoImageProcessor, name, revision=revision, backend="pil")
            kind: Any = PROCESSOR_MAPPING[type(config)]
            options, _ = kind.get_processor_dict(name, revision=revision)
            others = dict.fromkeys(kind.get_attributes()) | {"image_processor": images, "tokenizer": tokenizer}
            # The class itself would refuse None for its video processor.
            unchecked: Any = type(kind.__name__, (kind,), {"check_argument_for_proper_class": lambda self, name, value: type(value)})
            processor = unchecked(**_fitting(kind, options), **others)
            return cls(processor, limits, cache, _read_files(name, revision))
        except ModelError:
            raise
        except Exception as error:  # many kinds, by what is missing or broken
            raise ModelError(
                f"model {str(name)!r} cannot be shown images: {one_line(error)}; name a vision-language checkpoint with its "
                "preprocessor_config.json, or questions without images"
            ) from error

    @property
    def template(self) -> str | None:
        """The processor's own chat template; None where only the tokenizer has one."""
        own = getattr(self.processor, "chat_template", None)
        return own if isinstance(own, str) else None

    def same_as(self, other: ImageProcessor) -> bool:
        """Whether two checkpoints get the same tensors and placeholders for every picture."""
        return self._fingerprint == other._fingerprint and (self.token, self.image_ids) == (other.token, other.image_ids)

    def placeholder(self, ref: ImageRef) -> Placeholder:
        """What stands for a picture in a prompt; its size is all that is looked at. DataError where the file is no picture."""
        if ref.sha256 not in self._sizes:
            if len(self._sizes) >= _MOST_SIZES:  # a server's clients never stop sending new ones
                self._sizes.clear()
            self._sizes[ref.sha256] = shown_size(ref)
        return self._placeholder_of(*self._sizes[ref.sha256])

    def as_written(self, ids: Sequence[int], images: Sequence[ImageRef]) -> list[int]:
        """A prompt's ids before its pictures were given their places: what the chat template writes stands for each, once.

        For an engine that makes the places itself (vLLM).

        Raises:
            ModelError: the ids of a picture are not found.
        """
        written, rest = list[int](), list(ids)
        for ref in images:
            place = self._ids_of(self.placeholder(ref).text)
            starts = (i for i, token in enumerate(rest) if token == place[0] and rest[i : i + len(place)] == place)
            start = next(starts, None)
            if start is None:
                raise ModelError(
                    f"the tokens of image {ref.uri!r} are not found in its prompt, which an engine that reads pictures itself needs "
                    "(vLLM): set rollout.engine to transformers"
                )
            written += rest[:start] + self._ids_of(self.token)
            rest = rest[start + len(place) :]
        return written + rest

    def pixels(self, ref: ImageRef) -> Pixels:
        """What the model takes for one picture, decoded and preprocessed once a step. DataError where it cannot be decoded."""

        def make() -> Pixels:
            image = open_image(ref)
            made = {n: value.detach().clone() for n, value in self._process(image).items() if isinstance(value, torch.Tensor)}
            if self.keeps_pictures:
                made[_PICTURE] = torch.from_numpy(numpy.array(self._resized(image, made)))
            return made

        return self.cache.get((ref.sha256, self._fingerprint), make)

    def picture(self, ref: ImageRef) -> Image.Image:
        """The picture in the size in which the model sees it; another processor of the family makes the same of it. DataError as above."""
        return Image.fromarray(self.pixels(ref)[_PICTURE].numpy())

    def _resized(self, image: Image.Image, made: Pixels) -> Image.Image:
        if "image_grid_thw" not in made:
            return fit(image, self.limits)
        _, rows, columns = made["image_grid_thw"][0].tolist()
        patch = self.processor.image_processor.patch_size
        return image.resize((columns * patch, rows * patch), Image.Resampling.BICUBIC)

    def _process(self, image: Image.Image) -> Mapping[str, Any]:
        """Everything that the image processor makes of one picture."""
        if not self._limits_itself:
            image = fit(image, self.limits)
        (pictures, *_) = self.processor.prepare_inputs_layout(images=[image])
        kind: Any = type(self.processor)
        options = getattr(kind, "images_kwargs", None) or getattr(kind.valid_processor_kwargs, "_defaults", {}).get("images_kwargs")
        made: Mapping[str, Any] = self.processor.image_processor(
            pictures, **(options if isinstance(options, dict) else {}), return_tensors="pt"
        )
        return made

    def _make_placeholder(self, width: int, height: int) -> Placeholder:
        if self._counted:
            images = self.processor.image_processor
            count = images.get_number_of_image_patches(height, width) // images.merge_size**2
            return Placeholder(self.token * count, count)
        size = (width, height) if self._limits_itself else fitted_size(width, height, self.limits)
        made = self._of_blank(*size)
        return self._distinct.setdefault(made, made)  # texts of thousands of characters, few of them different

    def _of_blank(self, width: int, height: int) -> Placeholder:
        """By the processor itself, of an empty picture of that size."""
        text = str(self.processor.replace_image_token(self._process(Image.new("RGB", (width, height), "white")), 0))
        return Placeholder(text, sum(i in self.image_ids for i in self._ids_of(text)))

    def _ids_of(self, text: str) -> list[int]:
        ids: list[int] = self.processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _counts_patches(self) -> bool:
        """Whether placeholders are one token per merged patch, which needs no preprocessing to be known; found by trying."""
        images = self.processor.image_processor
        if not (hasattr(images, "merge_size") and hasattr(images, "get_number_of_image_patches")):
            return False
        for width, height in _ROUND_TRIP:
            count = images.get_number_of_image_patches(height, width) // images.merge_size**2
            if self._of_blank(width, height) != Placeholder(self.token * count, count):
                return False
        return True


def _fitting(kind: type[Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a processor's saved options that its constructor takes, its parts aside."""
    taken = set(inspect.signature(kind.__init__).parameters) - {"self", "args", "kwargs", *kind.get_attributes()}
    return {name: value for name, value in options.items() if name in taken}


def _read_files(name: str | Path, revision: str | None) -> dict[str, bytes]:
    found = {}
    for file in FILES:
        path = cached_file(
            str(name), file, revision=revision, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False
        )
        if path is not None:
            found[file] = Path(path).read_bytes()
    return found
