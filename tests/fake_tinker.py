"""A stand-in of the Tinker SDK over a tiny model in this process: real adapters, real gradients, and faults on demand.

Only what `zppo.engines.tinker` uses of it. It takes the sum of a loss, as the hosted service is documented to, or with `averages` the
means that SkyRL's JAX backend takes. Real SkyRL is run by `make test-tinker`.
"""

from __future__ import annotations

import copy
import io
import json
import tarfile
from concurrent.futures import Future
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import save
from transformers import AutoModelForCausalLM

LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def ready(value: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(value)
    return future


@dataclass
class Server:
    """What outlives a client: the model, and what was saved.

    Attributes:
        down_from: the call from which on nothing can be reached; calls are counted in `calls`.
        broken: changes an answer, by the name of its call.
    """

    folder: Path
    averages: bool = False
    down_from: int | None = None
    calls: list[str] = field(default_factory=list)
    broken: dict[str, Any] = field(default_factory=dict)
    states: dict[str, Any] = field(default_factory=dict)
    archives: Path | None = None
    models: int = 0
    unloaded: list[str] = field(default_factory=list)

    def called(self, name: str, answer: Any = None) -> Any:
        self.calls.append(name)
        if self.down_from is not None and len(self.calls) >= self.down_from:
            raise ConnectionError("connection refused")
        return self.broken[name](answer) if name in self.broken else answer


@dataclass
class Training:
    server: Server
    rank: int
    seed: int
    model_id: str = ""

    def __post_init__(self) -> None:
        self.server.models += 1
        self.model_id = f"model-{self.server.models}"
        base = AutoModelForCausalLM.from_pretrained(self.server.folder, dtype=torch.float32)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            self.model = get_peft_model(base, LoraConfig(r=self.rank, lora_alpha=32, target_modules=LAYERS)).eval()
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=0.0)
        self.rows = 0
        self.holder = SimpleNamespace(aclient=self._aclient, run_coroutine_threadsafe=self._run)

    def forward(self, data: list[Any], loss: str) -> Future[Any]:
        with torch.no_grad():
            return ready(self.server.called("forward", self._answer([self._logprobs(datum) for datum in data])))

    def forward_backward(self, data: list[Any], loss: str) -> Future[Any]:
        lines = []
        for datum in data:
            inputs = {name: torch.tensor(each.data) for name, each in datum.loss_fn_inputs.items()}
            lines.append(self._logprobs(datum))
            if loss == "cross_entropy":
                total = -(inputs["weights"] * lines[-1]).sum()
            else:
                ratio = (lines[-1] - inputs["logprobs"]).exp()
                total = -(inputs["weights"] * ratio * inputs["advantages"]).sum()
            (total / inputs["weights"].sum().clamp(min=1e-9) if self.server.averages else total).backward()
            self.rows += 1
        return ready(self.server.called("forward_backward", self._answer([line.detach() for line in lines])))

    def _logprobs(self, datum: Any) -> torch.Tensor:
        ids, targets = torch.tensor([datum.model_input.ids]), torch.tensor(datum.loss_fn_inputs["target_tokens"].data)
        logprobs: torch.Tensor = self.model(ids).logits[0].log_softmax(-1).gather(1, targets[:, None])[:, 0]
        return logprobs

    def _answer(self, lines: list[torch.Tensor]) -> Any:
        outputs: list[dict[str, Any]] = [{"logprobs": SimpleNamespace(data=line.tolist())} for line in lines]
        if self.server.averages:
            outputs = [output | {"elementwise_loss": output["logprobs"]} for output in outputs]
        return SimpleNamespace(loss_fn_outputs=outputs, metrics={} if self.server.averages else {"loss:sum": 0.0})

    def optim_step(self, adam: Any) -> Future[Any]:
        for p in self.parameters:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad / (max(1, self.rows) if self.server.averages else 1)
        for group in self.optimizer.param_groups:
            group |= {"lr": adam.learning_rate, "betas": (adam.beta1, adam.beta2), "eps": adam.eps, "weight_decay": adam.weight_decay}
        clip = adam.grad_clip_norm if adam.grad_clip_norm and not self.server.averages else float("inf")
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, clip))
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.rows = 0
        return ready(self.server.called("optim_step", SimpleNamespace(metrics={"grad_norm": norm})))

    def save_state(self, name: str) -> Future[Any]:
        path = f"tinker://{self.model_id}/weights/{name}"
        self.server.called("save_state")
        self.server.states[path] = copy.deepcopy((get_peft_model_state_dict(self.model), self.optimizer.state_dict()))
        return ready(SimpleNamespace(path=path))

    def load_state_with_optimizer(self, path: str) -> Future[Any]:
        self.server.called("load_state")
        if path not in self.server.states:
            raise RuntimeError("404: no such checkpoint")
        weights, optimizer = copy.deepcopy(self.server.states[path])
        set_peft_model_state_dict(self.model, weights)
        self.optimizer.load_state_dict(optimizer)
        return ready(None)

    def save_weights_for_sampler(self, name: str) -> Future[Any]:
        path = f"tinker://{self.model_id}/sampler_weights/{name}"
        self.server.called("save_for_sampler")
        self.server.states[path] = copy.deepcopy(get_peft_model_state_dict(self.model))
        return ready(SimpleNamespace(path=path))

    def save_weights_and_get_sampling_client(self) -> Sampler:
        self.server.called("new_sampler")
        return Sampler(self.server, copy.deepcopy(self.model))

    def _aclient(self, pool: str) -> Any:
        raise NotImplementedError  # freeing adapters is tried, and a failure costs nothing

    def _run(self, coroutine: Any) -> Future[Any]:
        coroutine.close()
        self.server.unloaded.append(self.model_id)
        return ready(None)


@dataclass
class Sampler:
    server: Server
    model: Any

    def sample(self, *, prompt: Any, num_samples: int, sampling_params: Any) -> Future[Any]:
        ids, logprobs, rng = list(prompt.ids), [], torch.Generator().manual_seed(sampling_params.seed)
        with torch.no_grad():
            for _ in range(sampling_params.max_tokens):
                logits = self.model(torch.tensor([ids])).logits[0, -1]
                scored = (logits / sampling_params.temperature if sampling_params.temperature else logits).log_softmax(-1)
                drawn = int(torch.multinomial(scored.exp(), 1, generator=rng)) if sampling_params.temperature else int(scored.argmax())
                ids.append(drawn)
                logprobs.append(float(scored[drawn]))
                if drawn in sampling_params.stop:
                    break
        answer = SimpleNamespace(sequences=[SimpleNamespace(tokens=ids[len(prompt.ids) :], logprobs=logprobs)])
        future: Future[Any] = Future()
        try:
            future.set_result(self.server.called("sample", answer))
        except ConnectionError as error:
            future.set_exception(error)
        return future


class Service:
    """`tinker.ServiceClient`."""

    server: Server

    def __init__(self, base_url: str | None = None) -> None:
        self.server.called("session")

    def create_lora_training_client(self, *, base_model: str, rank: int, seed: int, **layers: bool) -> Training:
        self.server.called("create")
        return Training(self.server, rank, seed)

    def create_sampling_client(self, *, model_path: str) -> Sampler:
        self.server.called("sampler_of")
        model = Training(Server(self.server.folder), 4, 0).model
        set_peft_model_state_dict(model, self.server.states[model_path])
        return Sampler(self.server, model)

    def create_rest_client(self) -> Any:
        return SimpleNamespace(delete_checkpoint_from_tinker_path=self._delete, get_checkpoint_archive_url=self._archive)

    def _delete(self, path: str) -> Future[Any]:
        self.server.called("delete")
        del self.server.states[path]
        return ready(None)

    def _archive(self, run: str, name: str) -> Future[Any]:
        raise NotImplementedError("no archives here")


def archive(files: dict[str, bytes]) -> bytes:
    """A .tar.gz with these files."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as target:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            target.addfile(member, io.BytesIO(content))
    return packed.getvalue()


def adapter_files(state: dict[str, torch.Tensor]) -> dict[str, bytes]:
    """An adapter as SkyRL packs it: a configuration that names no layers."""
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 32.0, "target_modules": None}
    return {"adapter_config.json": json.dumps(config).encode(), "adapter_model.safetensors": save(state)}


def make_sdk(server: Server) -> ModuleType:
    """A module to be imported as `tinker`."""
    module = ModuleType("tinker")
    module.__spec__ = ModuleSpec("tinker", None)
    types = {name: lambda **fields: SimpleNamespace(**fields) for name in ("Datum", "TensorData", "SamplingParams", "AdamParams")}
    inputs = SimpleNamespace(from_ints=lambda ids: SimpleNamespace(ids=ids))
    module.types = SimpleNamespace(**types, ModelInput=inputs)  # type: ignore[attr-defined]
    module.ServiceClient = type("ServiceClient", (Service,), {"server": server})  # type: ignore[attr-defined]
    return module
