"""The student of a run on a Tinker server: what samples, scores, learns and is saved, with the faces that a student in this process has.

Its weights never come here before the end. A checkpoint names what the server keeps; final/ has the trained adapters.
"""

from __future__ import annotations

import json
import shutil
import tarfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from accelerate import Accelerator
from safetensors import SafetensorError, safe_open

from zppo.config.cluster_settings import missing_for_tinker
from zppo.config.settings import Settings, TrainSettings
from zppo.core.types import Group, Rollout
from zppo.distributed.parallel import ReplicatedWeights
from zppo.engines.chat import Chat
from zppo.engines.loading import empty_network
from zppo.engines.logprobs import ForwardPass
from zppo.engines.out_of_memory import TokenBudget
from zppo.engines.tinker import AdamW, TinkerEngine, TinkerForward, TinkerService
from zppo.errors import CheckpointError, ClusterError, SettingsError
from zppo.models.student_model import Student, context_length
from zppo.names import model_folder
from zppo.rollout.teacher import Pools
from zppo.runs import checkpoint
from zppo.runs.files import writing
from zppo.step_log import StepLog
from zppo.teacher.compression import Source
from zppo.train.engine_checks import make_check
from zppo.train.learner import OptimizerStep, PartialUpdate, UpdateResult, UpdateStopped
from zppo.train.policy_gradient import PolicyGradient

PLACE = "tinker.json"
"""In a checkpoint's model/ and in final/: where on the server the weights are."""

_ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
_WHOLE = 1 << 40  # tokens of a micro-batch: the server makes its own


class TinkerWeights:
    """Weights and optimizer state as the server keeps them: what a checkpoint saves is their path.

    They are kept after every update, so that a run whose server cannot be reached any more is saved as it was after its last step.
    """

    def __init__(self, service: TinkerService, run: Path, facts: dict[str, Any]) -> None:
        self.service, self._run, self._facts = service, run, facts
        self.path = ""
        self._old: list[str] = []
        self._deletes = True

    def keep(self) -> None:
        """Saves them as they are. ClusterError where that fails; what was kept before counts then."""
        path = self.service.save()
        self._old, self.path = [*self._old, *([self.path] if self.path else [])], path
        self.tidy()

    def tidy(self) -> None:
        """Deletes what this process has kept and no checkpoint of the run names any more."""
        named = {_place(folder).get("state") for folder in checkpoint.existing(self._run)}
        for old in [old for old in self._old if old not in named and self._deletes]:
            self._deletes = self.service.delete(old)  # a server that cannot is not asked again
            self._old.remove(old)

    def load(self, start: Path) -> None:
        """The weights of a checkpoint.

        Raises:
            CheckpointError: it is one of a student in this process.
            ClusterError: the server does not have them any more.
        """
        path = _place(start).get("state")
        if not path:
            raise CheckpointError(
                f"{checkpoint.weights_folder(start)} names no weights on a server, and student.tinker is set: go back to the settings that "
                "the run was started with"
            )
        self.service.load(path)
        self.path = path

    def save_pretrained(self, folder: Path, /) -> None:
        """Writes where they were last kept; nothing is asked of the server."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / PLACE).write_text(json.dumps({**self._facts, "state": self.path}, indent=1) + "\n", encoding="utf-8")


def _place(start: Path) -> dict[str, str]:
    """What a checkpoint says of where its weights are; empty where it says nothing."""
    with suppress(OSError, ValueError):
        facts = json.loads((checkpoint.weights_folder(start) / PLACE).read_text(encoding="utf-8"))
        return {name: value for name, value in facts.items() if isinstance(value, str)} if isinstance(facts, dict) else {}
    return {}


def final_place(folder: Path) -> str:
    """Where on the server the weights of final/ are."""
    return str(json.loads((folder / PLACE).read_text(encoding="utf-8"))["sampler"])


class NoState:
    """The optimizer's state in a checkpoint of a student whose server keeps it."""

    def state_dict(self) -> dict[str, Any]:
        return {}


@dataclass(frozen=True, slots=True)
class TinkerStudent(Student):
    """The student; `model` has its shape and no weights.

    Attributes:
        service: the server.
        forward: its forward pass.
        weights: its weights as they are kept.
    """

    service: TinkerService
    forward: TinkerForward
    weights: TinkerWeights

    @property
    def saved(self) -> checkpoint.Savable:
        return self.weights

    @property
    def scorer(self) -> ForwardPass:
        """`forward` by its face: of `ForwardPass` it has all that is used where prompts are not shared."""
        return cast(ForwardPass, self.forward)

    def engine(self, chat: Chat) -> TinkerEngine:
        """What samples."""
        embedding: Any = self.model.get_input_embeddings()
        return TinkerEngine(
            self.service, chat.eos_ids(self.model), vocab_size=embedding.weight.shape[0], context=context_length(self.model)
        )

    def learner(
        self,
        settings: Settings,
        accelerator: Accelerator,
        weights: ReplicatedWeights,
        respond: Callable[[Source], Rollout | None] | None,
        say: Callable[[str], None] | None = None,
    ) -> PolicyGradient:
        """The policy gradient; see `make_learner`."""
        old, exact = settings.train.old_logprobs, settings.rollout.sampling().exact
        if old == "sampler" and not exact:
            raise SettingsError(
                "train.old_logprobs is sampler, but rollout.top_p or top_k is active: the sampler's log-probs are no old log-probs "
                "then. Use train.old_logprobs=auto"
            )
        return TinkerLearner(
            settings,
            self.scorer,
            TinkerStep(self.forward, settings.train, accelerator, weights),
            TokenBudget(_WHOLE, overhead=_WHOLE),  # one request for all rows: padding is not sent
            sampler_is_exact=old == "sampler",  # another kernel, and most often bf16: near is not exact
            check=make_check(settings.train, False, say),
            respond=respond,
            kept=self.weights,
        )

    def save_final(self, folder: Path, chat: Chat) -> None:
        """Fills the folder that becomes final/: adapters, tokenizer, and where on the server they are.

        Raises:
            StorageError: the disk refuses.
            ClusterError: the server does.
        """
        path = self.service.save_for_sampling("final")
        self.weights.tidy()
        with writing(folder):
            chat.tokenizer.chat_template = chat.template
            chat.tokenizer.save_pretrained(folder)
        note = ""
        try:
            self._adapter(path, folder)
        except (ClusterError, OSError, tarfile.TarError, ValueError, SafetensorError) as error:
            shutil.rmtree(folder / "adapter", ignore_errors=True)
            note = f"the adapters could not be downloaded: {error}"
        with writing(folder / PLACE):
            facts = {"sampler": path, "state": self.weights.path, "note": note or "the adapters are in adapter/, in the form of peft"}
            (folder / PLACE).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")

    def _adapter(self, path: str, folder: Path) -> None:
        """adapter/ in a folder, out of the server's archive: two files and nothing else of it."""
        archive = folder / "adapter.tar.gz"
        try:
            self.service.download(path, archive)
            (folder / "adapter").mkdir()
            with tarfile.open(archive, "r:*") as files:
                for member in files:
                    name = Path(member.name).name
                    content = files.extractfile(member) if member.isfile() and name in _ADAPTER else None
                    if content is not None:
                        with content, open(folder / "adapter" / name, "wb") as target:
                            while part := content.read(1 << 20):
                                target.write(part)
        finally:
            archive.unlink(missing_ok=True)
        config = folder / "adapter" / _ADAPTER[0]
        facts = json.loads(config.read_text(encoding="utf-8"))
        with safe_open(folder / "adapter" / _ADAPTER[1], "pt") as tensors:
            layers = {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in tensors.keys()}  # noqa: SIM118 - it is no dict
        # SkyRL's archive names no layers, and peft would guess: all that have tensors.
        facts["target_modules"] = facts.get("target_modules") or sorted(layers)
        config.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


class TinkerStep(OptimizerStep):
    """AdamW on the server, along the gradients that autograd has brought back to the log-probs of `forward`.

    They are sent when the step is taken: what a refused minibatch has left never reaches the server.
    """

    def __init__(self, forward: TinkerForward, train: TrainSettings, accelerator: Accelerator, weights: ReplicatedWeights) -> None:
        self.forward, self.accelerator, self.weights = forward, accelerator, weights
        self.skipped_in_a_row, self.fault = 0, ""
        self.adamw = AdamW(train.learning_rate, *train.betas, train.adam_eps, train.weight_decay, train.max_grad_norm or 0.0)

    def gradients(self) -> AbstractContextManager[None]:
        """Nothing is computed here."""
        return nullcontext()

    def zero_gradients(self) -> None:
        self.forward.pending.clear()

    def _move(self, *, finite: bool) -> tuple[float, bool]:
        norm = self.forward.service.step(self.forward.pending, self.adamw) if finite else float("nan")
        self.forward.forget()
        return norm, finite


class TinkerLearner(PolicyGradient):
    """The policy gradient, whose weights are kept on the server after every update, and where one is left half-way."""

    def __init__(self, *parts: Any, kept: TinkerWeights, **more: Any) -> None:
        super().__init__(*parts, **more)
        self.kept = kept

    def update(
        self, plain: Sequence[Group], reformulated: Sequence[Group], responses: Pools, log: StepLog, partial: PartialUpdate | None = None
    ) -> UpdateResult:
        """See `PolicyGradient.update`. ClusterError: the server failed; the weights of the step before are still kept there."""
        try:
            result = super().update(plain, reformulated, responses, log, partial)
        except UpdateStopped:
            self.kept.keep()
            raise
        self.kept.keep()
        log.counts["tokens_per_microbatch"] = None
        return result


def open_student(settings: Settings, start: Path | None, run: Path, *, images: bool, processes: int) -> TinkerStudent:
    """Adapters on the server of `student.tinker`, new ones or those of a checkpoint.

    Raises:
        SettingsError: the SDK or the key is missing, several processes train, or questions have images.
        ModelError: the configuration of `student.model` cannot be read.
        CheckpointError, ClusterError: see `TinkerWeights.load`.
    """
    own, lora = settings.student, settings.train.lora
    if own.tinker is None or lora is None:
        raise SettingsError("student.tinker and train.lora must be set for a student on a Tinker server")
    if processes > 1:
        raise SettingsError(f"student.tinker is set, and {processes} processes train: the cluster is elsewhere, so start one process")
    if images:
        raise SettingsError("student.tinker is set, and questions have images: the student reads text only there; leave them out")
    if lacks := missing_for_tinker():
        raise SettingsError(f"student.tinker is set, and {lacks}")
    network = empty_network(model_folder(own.model), own.revision)
    base = own.tinker.base_model or own.model
    service = TinkerService(
        own.tinker.base_url,
        base,
        rank=lora.rank,
        seed=settings.seed % (1 << 31),
        averages=own.tinker.server == "skyrl-jax",
        deadline=own.tinker.deadline,
    )
    weights = TinkerWeights(service, run, {"base_model": base})
    if start is not None:
        weights.load(start)
    return TinkerStudent(network, None, service, TinkerForward(service), weights)
