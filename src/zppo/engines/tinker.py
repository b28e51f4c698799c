"""A student on a cluster that somebody else runs, over the Tinker API: sampling, log-probs with a gradient, optimizer steps, saving.

The hosted service and SkyRL's own server speak it; the SDK (`pip install 'zppo[tinker]'`) does the talking. The server holds the weights,
which are LoRA adapters on a model that it has loaded. Token ids go in and out, and log-probs come back; nothing has a vocabulary's width.

The loss is computed here, on log-probs that the server gave, and its gradient with respect to them is all that goes back: the sum of
w * log-prob over tokens, with constant w, has the gradient of any function of the log-probs that is w there. So every loss that is one of
log-probs is exactly ours, whatever losses the server has.
"""

from __future__ import annotations

import atexit
import hashlib
import importlib
import math
import os
import threading
import urllib.request
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from shutil import copyfileobj
from typing import Any, NamedTuple, TypeVar

import torch
from torch.nn.utils.rnn import pad_sequence

from zppo.core.types import Row
from zppo.engines.base import Completion, Ended, SampleRequest, Sampling, check_requests, in_order
from zppo.errors import ClusterError, SettingsError, ZPPOError, one_line

T = TypeVar("T")

_SEEDS = 1 << 31
_PLACE = "tinker://"


class AdamW(NamedTuple):
    """An optimizer step: the settings of AdamW, and the gradient norm above which gradients are scaled down (0: never)."""

    learning_rate: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    grad_clip_norm: float


class TokenGradient(NamedTuple):
    """(T,) gradient of a loss with respect to the log-probs of a row's completion, and those log-probs."""

    row: Row
    gradient: torch.Tensor
    logprobs: torch.Tensor


class TinkerService:
    """LoRA adapters on a Tinker server, as this process trains them.

    Args:
        base_url: of the server; None for TINKER_BASE_URL, else the hosted service.
        base_model: what the server calls the model.
        rank, seed: of the adapters.
        averages: the server takes the mean of a loss over the tokens of a sequence and then over the sequences, instead of the sum.
        deadline: seconds that an answer is waited for. The SDK asks again by itself as long as the server cannot be reached.

    Raises:
        ClusterError: the server cannot be reached, or does not take the model.
    """

    def __init__(self, base_url: str | None, base_model: str, *, rank: int, seed: int, averages: bool, deadline: float) -> None:
        self.where = base_url or os.environ.get("TINKER_BASE_URL") or "the Tinker service"
        self.averages, self.deadline = averages, deadline
        self._types: Any = importlib.import_module("tinker").types
        self._saved = 0
        service = self.ask("open a session", lambda: importlib.import_module("tinker").ServiceClient(base_url=base_url))
        self._service: Any = service
        self._training: Any = self.ask(
            f"make adapters for {base_model!r}",
            lambda: service.create_lora_training_client(
                base_model=base_model, rank=rank, seed=seed, train_attn=True, train_mlp=True, train_unembed=False
            ),
        )
        atexit.register(self.close)  # a server has room for few adapters

    def ask(self, what: str, call: Callable[[], T]) -> T:
        """What `call` gives. It runs in a thread, since the SDK waits without a limit in places.

        Raises:
            ClusterError: it fails, or takes longer than the deadline.
        """
        box: SimpleQueue[tuple[T | None, BaseException | None]] = SimpleQueue()

        def work() -> None:
            try:
                box.put((call(), None))
            except BaseException as error:
                box.put((None, error))

        threading.Thread(target=work, daemon=True, name="tinker").start()
        try:
            value, error = box.get(timeout=self.deadline)
        except Empty:
            raise self._fault(f"gave no answer in {self.deadline:g} seconds when asked to {what}") from None
        if isinstance(error, ZPPOError):
            raise error
        if error is not None:
            raise self._fault(f"could not {what}: {type(error).__name__}: {one_line(error)}") from error
        return value  # type: ignore[return-value]

    def _fault(self, fact: str) -> ClusterError:
        return ClusterError(
            f"student.tinker: {self.where} {fact}. See whether it is up and has what the recipe asks for; what was trained is kept there "
            "after every step"
        )

    # What the weights say.

    def logprobs(self, rows: Sequence[Row]) -> list[torch.Tensor]:
        """(T,) float32 of each row's completion under the current weights, at temperature 1.

        Raises:
            ClusterError: also for an answer without what was asked for.
        """
        data = [self._datum(row, weights=torch.zeros(len(row.completion_ids))) for row in rows]
        answer: Any = self.ask("score completions", lambda: self._training.forward(data, "cross_entropy").result())
        outputs = answer.loss_fn_outputs
        if len(outputs) != len(rows):
            raise self._fault(f"gave log-probs of {len(outputs)} sequences when asked for {len(rows)}")
        self._check_kind(answer)
        return [self._line(output, row) for output, row in zip(outputs, rows, strict=True)]

    def _line(self, output: Any, row: Row) -> torch.Tensor:
        values = torch.tensor(output["logprobs"].data if "logprobs" in output else [], dtype=torch.float32)
        wanted = len(row.prompt_ids) + len(row.completion_ids) - 1
        line = values[len(row.prompt_ids) - 1 :]
        if len(values) != wanted or not bool(line.isfinite().all()):
            raise self._fault(f"gave {len(values)} log-probs of a sequence when asked for {wanted}, or some that are no numbers")
        return line

    def _check_kind(self, answer: Any) -> None:
        """By what is known of the two: the service gives the sum of a loss as a metric, SkyRL's JAX backend each token's loss alone."""
        sums = "loss:sum" in (answer.metrics or {})
        found = "tinker" if sums else "skyrl-jax" if "elementwise_loss" in answer.loss_fn_outputs[0] else None
        named = "skyrl-jax" if self.averages else "tinker"
        if found not in (None, named):
            raise SettingsError(
                f"student.tinker.server is {named}, and {self.where} answers like {found}, which scales gradients differently: set "
                f"student.tinker.server to {found}"
            )

    # What changes them.

    def step(self, gradients: Sequence[TokenGradient], adamw: AdamW) -> float:
        """One optimizer step along the sum of these gradients; returns their norm, NaN where the server does not say.

        Raises:
            ClusterError: the weights may have moved or not; or the norm is not finite.
        """
        data = [self._backward_datum(each, len(gradients)) for each in gradients]
        loss = "importance_sampling" if self.averages else "cross_entropy"

        def work() -> Any:
            # Both are sent before either is waited for: a server that works in cycles does them in one.
            backward = self._training.forward_backward(data, loss) if data else None
            step = self._training.optim_step(self._types.AdamParams(**adamw._asdict()))
            if backward is not None:
                backward.result()
            return step.result()

        answer: Any = self.ask("take an optimizer step", work)
        norms = [float(v) for name, v in (answer.metrics or {}).items() if name.rsplit("/", 1)[-1].startswith("grad_norm")]
        if norms and not math.isfinite(norms[0]):
            raise self._fault(f"took an optimizer step with a gradient norm of {norms[0]}: its weights are spoilt")
        return norms[0] if norms else math.nan

    def _backward_datum(self, each: TokenGradient, rows: int) -> Any:
        if not self.averages:
            return self._datum(each.row, weights=-each.gradient)
        # SkyRL's mean over tokens divides by the sum of the weights, which must be their number: so the gradient goes by the advantages
        # of `importance_sampling`, whose ratio to these log-probs is 1, times what the two means divide by.
        tokens = len(each.gradient)
        return self._datum(each.row, weights=torch.ones(tokens), logprobs=each.logprobs, advantages=-each.gradient * float(tokens * rows))

    def _datum(self, row: Row, **tokens: torch.Tensor) -> Any:
        """A row with a number for each token of its completion; those of its prompt get 0."""
        ids = [*map(int, row.prompt_ids), *map(int, row.completion_ids)]
        before = torch.zeros(len(row.prompt_ids) - 1)
        values = {name: self._tensor(torch.cat([before, line.float()]).tolist(), "float32") for name, line in tokens.items()}
        inputs = {"target_tokens": self._tensor(ids[1:], "int64"), **values}
        return self._types.Datum(model_input=self._types.ModelInput.from_ints(ids[:-1]), loss_fn_inputs=inputs)

    def _tensor(self, values: list[Any], dtype: str) -> Any:
        return self._types.TensorData(data=values, dtype=dtype, shape=[len(values)])

    # Where they are kept.

    def save(self) -> str:
        """Keeps weights and optimizer state on the server; returns the path under which they are there."""
        self._saved += 1
        name = f"state-{self._saved:06d}"
        return str(self.ask("save the weights", lambda: self._training.save_state(name).result()).path)

    def load(self, path: str) -> None:
        """Weights and optimizer state of an earlier `save`, of this run or of one before it."""
        self.ask(f"load {path}", lambda: self._training.load_state_with_optimizer(path).result())

    def delete(self, path: str) -> bool:
        """Whether what lies under a path could be deleted; not every server can."""
        try:
            self.ask("delete a checkpoint", lambda: self._service.create_rest_client().delete_checkpoint_from_tinker_path(path).result())
        except ClusterError:
            return False
        return True

    def save_for_sampling(self, name: str) -> str:
        """Keeps the weights alone, to be sampled from and downloaded; returns their path."""
        return str(self.ask("save the weights", lambda: self._training.save_weights_for_sampler(name).result()).path)

    def download(self, path: str, file: Path) -> None:
        """Writes the archive of weights kept for sampling (.tar.gz) into a file."""
        run, _, name = path.removeprefix(_PLACE).partition("/")

        def work() -> None:
            url = self._service.create_rest_client().get_checkpoint_archive_url(run, name).result().url
            if not str(url).startswith(("http://", "https://")):
                raise ValueError("the address of the archive is none of the web")
            with urllib.request.urlopen(url, timeout=self.deadline) as answer, open(file, "wb") as target:
                copyfileobj(answer, target)

        self.ask("send the trained adapters", work)

    def sampler(self, path: str | None = None) -> Any:
        """A sampling client: of the current weights, or of those under a path."""
        if path is None:
            return self.ask("sample from the weights", lambda: self._training.save_weights_and_get_sampling_client())
        return self.ask("sample from the weights", lambda: self._service.create_sampling_client(model_path=path))

    def request(self, sampler: Any, prompt: Sequence[int], seed: int, limit: int, sampling: Sampling, ends: Collection[int]) -> Future[Any]:
        """One completion, as the SDK's future."""
        parameters = self._types.SamplingParams(
            max_tokens=limit,
            seed=seed,
            stop=sorted(ends),
            temperature=sampling.temperature,
            top_k=sampling.top_k or -1,
            top_p=sampling.top_p,
        )
        future: Future[Any] = sampler.sample(
            prompt=self._types.ModelInput.from_ints(list(prompt)), num_samples=1, sampling_params=parameters
        )
        return future

    def close(self) -> None:
        """Frees the adapters on the server, as far as the SDK lets it; a server frees those of a silent client by itself, minutes later."""
        atexit.unregister(self.close)
        training, self._training = self._training, None
        if training is None:
            return

        async def unload() -> None:
            # The SDK has the request, and no method for it.
            pools = importlib.import_module("tinker.lib.client_connection_pool_type").ClientConnectionPoolType
            with training.holder.aclient(pools.TRAIN) as client:
                await client.models.unload(request=self._types.UnloadModelRequest(model_id=training.model_id))

        with suppress(Exception):
            training.holder.run_coroutine_threadsafe(unload()).result(10)


class TinkerEngine:
    """Samples from the weights of the last `sync`, one request and one seed a rollout.

    Args:
        eos_ids: ids that end a completion; the end token is part of it.
        vocab_size, context: ids that the model knows, and its positions (None: unknown).
    """

    def __init__(self, service: TinkerService, eos_ids: Collection[int], *, vocab_size: int, context: int | None) -> None:
        self.service, self.eos_ids, self.vocab_size, self.context = service, frozenset(eos_ids), vocab_size, context
        self.where = service.where
        self._sampler: Any = None

    def sync(self) -> None:
        """Makes the server sample from the weights as they are now."""
        self.sample_from(None)

    def sample_from(self, path: str | None) -> None:
        """Samples from now on from weights that are kept under a path; None: from the current ones."""
        self._sampler = self.service.sampler(path)

    def sample(self, requests: Sequence[SampleRequest], sampling: Sampling) -> list[list[Completion]]:
        """Completions per request; see `stream`."""
        return in_order(requests, list(self.stream(requests, sampling)))

    def stream(self, requests: Sequence[SampleRequest], sampling: Sampling) -> Iterator[Ended]:
        """Completions as they end. Entropies are NaN: the API does not tell them.

        Raises:
            ModelError: see `check_requests`.
            ClusterError: nothing came for as long as the deadline; or an answer without what was asked for.
        """
        check_requests(requests, sampling, self.vocab_size, self.context)
        asked: dict[Future[Any], tuple[int, int, int]] = {}
        try:
            for i, request in enumerate(requests):
                room = self.context - len(request.prompt_ids) if self.context is not None else sampling.max_new_tokens
                limit = min(sampling.max_new_tokens, room)
                for j, key in enumerate(request.keys):
                    future = self.service.request(self._sampler, request.prompt_ids, key % _SEEDS, limit, sampling, self.eos_ids)
                    asked[future] = i, j, limit
            while asked:
                done, _ = wait(asked, self.service.deadline, FIRST_COMPLETED)
                if not done:
                    raise self.service._fault(f"gave no completion in {self.service.deadline:g} seconds, {len(asked)} are open")
                for future in done:
                    i, j, limit = asked.pop(future)
                    yield i, j, self._completion(self.service.ask("sample", future.result), limit)
        finally:
            for future in asked:
                future.cancel()

    def _completion(self, answer: Any, limit: int) -> Completion:
        sequences = answer.sequences
        if len(sequences) != 1:
            raise self.service._fault(f"gave {len(sequences)} completions when asked for one")
        (sequence,) = sequences
        ids = torch.tensor(sequence.tokens, dtype=torch.int64)
        logprobs = torch.tensor(sequence.logprobs or [], dtype=torch.float32)
        if not 0 < len(ids) <= limit or len(ids) != len(logprobs) or not bool(logprobs.isfinite().all()):
            raise self.service._fault(f"gave {len(ids)} tokens and {len(logprobs)} log-probs of a completion of at most {limit} tokens")
        if int(ids.min()) < 0 or int(ids.max()) >= self.vocab_size:
            raise self.service._fault(f"gave a token that the model does not know: ids are 0 to {self.vocab_size - 1}")
        truncated = int(ids[-1]) not in self.eos_ids
        if truncated and len(ids) < limit:
            raise self.service._fault(f"ended a completion after {len(ids)} of {limit} tokens without an end token")
        return Completion(ids, logprobs, truncated, math.nan)


class TinkerForward:
    """The forward pass of the student on the server, with the face of `ForwardPass`; what autograd brings back waits in `pending`.

    Log-probs are asked for once as long as the weights stay: old log-probs of a step are those of its first minibatch.

    Attributes:
        temperature: 1, the API's.
        pending: gradients of the losses that were backpropagated since `forget`.
    """

    temperature = 1.0

    def __init__(self, service: TinkerService) -> None:
        self.service = service
        self.pending: list[TokenGradient] = []
        self._known: dict[bytes, torch.Tensor] = {}

    def logprobs(self, rows: Sequence[Row]) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probs (B, T) float32 and completion mask (B, T) bool, on the CPU."""
        keys = [_digest(row) for row in rows]
        unknown = {key: row for key, row in zip(keys, rows, strict=True) if key not in self._known}
        if unknown:
            self._known |= zip(unknown, self.service.logprobs(list(unknown.values())), strict=True)
        lines = [self._known[key] for key in keys]
        values = pad_sequence(lines, batch_first=True)
        mask = pad_sequence([torch.ones(len(line), dtype=torch.bool) for line in lines], batch_first=True)
        if torch.is_grad_enabled():
            values.requires_grad_()
            values.register_hook(lambda gradient: self._take(rows, lines, gradient))
        return values, mask

    def _take(self, rows: Sequence[Row], lines: Sequence[torch.Tensor], gradient: torch.Tensor) -> None:
        for row, line, part in zip(rows, lines, gradient.detach().cpu(), strict=True):
            if part.any():
                self.pending.append(TokenGradient(row, part[: len(line)].clone(), line))

    def forget(self) -> None:
        """The weights have moved."""
        self._known.clear()
        self.pending.clear()


def _digest(row: Row) -> bytes:
    if row.images:
        raise ClusterError("student.tinker: a row has images, and the student reads text only: take questions without images")
    ids = torch.tensor([len(row.prompt_ids), *row.prompt_ids, *row.completion_ids], dtype=torch.int32)
    return hashlib.blake2b(ids.numpy().tobytes(), digest_size=16).digest()
