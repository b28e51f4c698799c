"""The model behind the stand-in: sampled token by token without a cache, in plain torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoImageProcessor, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

from vllm.sampling_params import SamplingParams


class Model:
    """Args: a checkpoint with a tokenizer, the longest sequence, and the faults that are looked at at every call."""

    def __init__(self, checkpoint: str, max_model_len: int | None, faults: set[str]) -> None:
        sees = (Path(checkpoint) / "preprocessor_config.json").exists()
        kind = AutoModelForImageTextToText if sees else AutoModelForCausalLM
        self.checkpoint, self.network = checkpoint, kind.from_pretrained(checkpoint, dtype=torch.float32).eval()
        AutoTokenizer.from_pretrained(checkpoint)  # as vLLM does: a checkpoint without one is an error
        self.context = max_model_len or self.network.config.get_text_config().max_position_embeddings
        self.faults, self.loads, self.unknown, self.calls = faults, 0, 0, 0
        with safe_open(f"{checkpoint}/model.safetensors", "pt") as file:
            on_disk = set(file.keys())
        # Parameters by their name on disk: an image checkpoint keeps its text model under a prefix.
        self.by_name = {
            name if name in on_disk else name.replace("model.", "model.language_model.", 1): parameter
            for name, parameter in self.network.named_parameters()
        }

    def load(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Takes weights by their name on disk; like vLLM's models it passes over names that it does not know."""
        with torch.no_grad():
            for name, value in weights:
                self.loads += 1
                if name not in self.by_name:
                    self.unknown += 1
                elif "deaf" not in self.faults:
                    assert self.by_name[name].shape == value.shape
                    self.by_name[name].copy_(value)

    def expanded(self, ids: list[int], images: Sequence[Any]) -> list[int]:
        """As vLLM does: for the first image token of each picture as many as the picture has features; others stay as they are."""
        written, rest = list[int](), list(ids)
        for image in images:
            processor = AutoImageProcessor.from_pretrained(self.checkpoint, backend="pil")
            grid = processor(image, return_tensors="pt")["image_grid_thw"]
            token = self.network.config.image_token_id
            start = rest.index(token)
            written += rest[:start] + [token] * int(grid.prod() // processor.merge_size**2)
            rest = rest[start + 1 :]
        return written + rest

    def seen(self, row: list[int], images: Any) -> torch.Tensor:
        """Logits after a row and its pictures, which are preprocessed here, by the checkpoint's own rules."""
        ids, given = torch.tensor([row]), dict[str, Any]()
        if images is not None:
            processor = AutoImageProcessor.from_pretrained(self.checkpoint, backend="pil")
            given = dict(processor(images if isinstance(images, list) else [images], return_tensors="pt"))
            given["mm_token_type_ids"] = (ids == self.network.config.image_token_id).int()
        return self.network(input_ids=ids, use_cache=False, **given).logits[0, -1].float()

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[list[int]], given: SamplingParams | Sequence[SamplingParams], images: Sequence[Any] = ()
    ) -> list[tuple[list[int], list[dict[int, Any]]]]:
        """Per prompt one completion: tokens and, per token, {id: (logprob, rank)} of that token alone."""
        assert all(len(prompt) < self.context for prompt in prompts)
        self.calls += 1  # vLLM's own generators: other draws every time, though not from the keys of the project
        hows = [given] * len(prompts) if isinstance(given, SamplingParams) else given
        shared = torch.Generator().manual_seed(self.calls)
        own = [shared if how.seed is None else torch.Generator().manual_seed(how.seed) for how in hows]
        rows = [list(prompt) for prompt in prompts]
        found: list[list[dict[int, Any]]] = [[] for _ in prompts]
        live = list(range(len(rows)))
        while live:
            places = torch.tensor([len(rows[i]) - 1 for i in live])
            ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(rows[i]) for i in live], batch_first=True)
            if any(images):
                logits = torch.stack([self.seen(rows[i], images[i]) for i in live])
            else:
                logits = self.network(input_ids=ids, use_cache=False).logits[torch.arange(len(live)), places].float()
            for line, i in zip(logits, live, strict=True):
                how = hows[i]
                logprobs = processed(line, rows[i][len(prompts[i]) :], rows[i], how)
                best = int(logprobs.argmax())
                token = best if how.temperature == 0 else int(logprobs.exp().multinomial(1, generator=own[i]))
                rows[i].append(token)
                found[i].append({token: SimpleNamespace(logprob=float(logprobs[token]), rank=1)})
            stop = [set(how.stop_token_ids or ()) for how in hows]
            live = [i for i in live if rows[i][-1] not in stop[i] and len(found[i]) < hows[i].max_tokens and len(rows[i]) < self.context]
        return [(row[len(prompt) :], lps) for row, prompt, lps in zip(rows, prompts, found, strict=True)]


def processed(logits: torch.Tensor, written: list[int], seen: list[int], how: SamplingParams) -> torch.Tensor:
    """Log-probs of the distribution that a token is drawn from: bias, penalties, temperature, min-p, top-k, top-p."""
    for i, bias in (how.logit_bias or {}).items():
        logits[i] += bias
    some = torch.tensor(sorted(set(seen)))
    penalty = how.repetition_penalty
    logits[some] = torch.where(logits[some] > 0, logits[some] / penalty, logits[some] * penalty)
    logits[torch.tensor(sorted(set(written)), dtype=torch.int64)] -= how.presence_penalty
    if how.temperature == 0:
        return logits.log_softmax(0)
    logits = logits / how.temperature
    if how.min_p:
        probs = logits.softmax(0)
        logits[probs < how.min_p * probs.max()] = -torch.inf
    if how.top_k:
        logits[logits < logits.topk(how.top_k).values[-1]] = -torch.inf
    if how.top_p < 1:
        probs, order = logits.softmax(0).sort(descending=True)
        logits[order[probs.cumsum(0) - probs >= how.top_p]] = -torch.inf
    return logits.log_softmax(0)
