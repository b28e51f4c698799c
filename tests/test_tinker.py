"""The student on a Tinker server, against a stand-in (tests/fake_tinker.py) with real gradients. Real SkyRL: `make test-tinker`."""

from __future__ import annotations

import copy
import http.server
import io
import json
import shutil
import sys
import tarfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from fake_tinker import Server, Training, adapter_files, archive, make_sdk
from test_update import make_groups, make_policy_gradient
from zppo.cli import main
from zppo.config.cluster_settings import KEY
from zppo.config.recipe import load_recipe
from zppo.config.settings import Settings
from zppo.core.types import Row
from zppo.distributed.parallel import ReplicatedWeights
from zppo.engines.base import SampleRequest, Sampling
from zppo.engines.tinker import TinkerEngine, TinkerService
from zppo.errors import ClusterError, SettingsError
from zppo.runs.log import read_lines
from zppo.step_log import StepLog
from zppo.train.cluster.tinker_student import TinkerStudent, open_student

SECRET = "tml-a-key-that-is-written-nowhere"
ON = ("--student.tinker={}", "--train.lora.rank=4", "--eval.presence_penalty=0")
SMALL = ("--rollout.batch_size=4", "--rollout.max_new_tokens=6", "--eval.max_new_tokens=4", "--data.eval_limit=2", "--eval.every=0")
RUN = (*ON, *SMALL, "--train.steps=2", "--train.minibatches=2")


@pytest.fixture
def tinker(tiny_qwen3_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Server:
    server = Server(tiny_qwen3_dir)
    monkeypatch.setitem(sys.modules, "tinker", make_sdk(server))
    monkeypatch.setenv(KEY, SECRET)
    return server


def steps(run: Path) -> list[dict[str, Any]]:
    """But for times, and for what the check of the engine looked at, which a resumed run chooses anew."""
    times = ("seconds", "tokens_per_second", "system", "teacher_wait_seconds", "engine_gap_mean", "engine_gap_max")
    return [{k: v for k, v in line.items() if k not in times} for line in read_lines(run / "metrics.jsonl") if line["event"] == "step"]


# --- the gradient ------------------------------------------------------------------------------------------------------


def make_student(tiny: Path, run: Path, server: str, **train: Any) -> tuple[Settings, TinkerStudent]:
    settings = Settings(
        method="grpo",
        student={"model": str(tiny), "tinker": {"server": server}},
        data={"train": "-"},
        eval={"temperature": 0},
        train={"lora": {"rank": 4}, "minibatches": 2, "learning_rate": 1e-2, "logprob_tolerance": 1e3, **train},
    )
    return settings, open_student(settings, None, run, images=False, processes=1)


@pytest.mark.parametrize(("server", "norm"), [("tinker", 0.05), ("skyrl-jax", None)])
@pytest.mark.parametrize("old", ["sampler", "forward"])
def test_updates_are_those_of_a_student_in_this_process(
    server: str, norm: float | None, old: str, tinker: Server, tiny_qwen3_dir: Path, tmp_path: Path
) -> None:
    """Two optimizer steps, with both clips and the dual clip at work, whether the server sums its losses or averages them."""
    tinker.averages = server == "skyrl-jax"
    settings, student = make_student(tiny_qwen3_dir, tmp_path, server, max_grad_norm=norm, old_logprobs=old)
    theirs: Training = student.service._training
    with torch.no_grad():  # adapters that do something
        for p in theirs.parameters:
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    ours: Any = copy.deepcopy(theirs.model)
    groups = make_groups(ours, [[1.0, 0.0, 0.0, 1.0], [0.0, 1.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0], [1.0, 0.0, 1.0, 1.0]], shift=2.5)

    learner = student.learner(settings, Accelerator(cpu=True), ReplicatedWeights(), None)
    log = StepLog(1)
    learner.update(groups, [], {}, log)

    train = settings.train.model_dump(include={"minibatches", "learning_rate"})
    local = make_policy_gradient(ours, sampler=old == "sampler", **train, max_grad_norm=norm or 1e9)
    local_log = StepLog(1)
    local.update(groups, [], {}, local_log)
    assert log.counts["loss"] == pytest.approx(local_log.counts["loss"], rel=1e-4)
    assert log.counts["grad_norm"] == pytest.approx(local_log.counts["grad_norm"], rel=1e-4)
    shares = [log.counts[f"clip_{name}_share"] or 0.0 for name in ("low", "high", "dual")]
    assert shares == [local_log.counts[f"clip_{name}_share"] for name in ("low", "high", "dual")]
    assert (min(shares) > 0) == (old == "sampler")
    moved = dict(ours.named_parameters())
    for name, value in theirs.model.named_parameters():
        torch.testing.assert_close(value, moved[name], atol=2e-5, rtol=0)  # steps are 1e-2
    assert tinker.calls.count("forward_backward") == 2
    # Old log-probs of all rows are those of the first minibatch, which are asked for once.
    assert tinker.calls.count("forward") == 2


# --- whole runs --------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_a_run_is_resumed_to_the_same_end(recipe: Path, tinker: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All of ZPPO: plain rollouts, the teacher, reformulated prompts, replay; the server has gone in between."""
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    assert main(["train", str(recipe), *RUN, "--train.checkpoint_every=1", "--train.keep_checkpoints=1", f"--output={whole}"]) == 0
    lines = steps(whole)
    assert [line["step"] for line in lines] == [1, 2] and any(line["accuracy"].get("bcq") is not None for line in lines)
    assert all(line["optimizer_steps"] == 2 for line in lines)
    assert all(line["engine_gap_mean"] < 1e-5 for line in read_lines(whole / "metrics.jsonl") if line["event"] == "step")
    assert lines[1]["replayed_questions"]
    # What the server keeps is what the run still names: a checkpoint, and final/.
    named = json.loads((whole / "checkpoints" / "step-000002" / "model" / "tinker.json").read_text())["state"]
    final = json.loads((whole / "final" / "tinker.json").read_text())
    assert set(tinker.states) == {named, final["sampler"]} and "could not be downloaded" in final["note"]
    assert (whole / "final" / "tokenizer.json").exists() and "kept by the server" in (whole / "final" / "README.md").read_text()
    assert tinker.unloaded
    for file in whole.rglob("*"):
        assert not file.is_file() or SECRET.encode() not in file.read_bytes()

    tinker.calls.clear()
    tinker.down_from = 10**9
    tinker.broken["forward_backward"] = lambda answer: _go_down(tinker) if tinker.calls.count("forward_backward") == 3 else answer
    assert main(["train", str(recipe), *RUN, "--train.checkpoint_every=0", f"--output={parted}"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "could not take an optimizer step: ConnectionError" in said and "Traceback" not in said
    assert [path.name for path in (parted / "checkpoints").iterdir()] == ["step-000001"]
    tinker.down_from = None
    tinker.broken.clear()
    assert main(["resume", str(parted)]) == 0
    assert steps(parted) == lines


def _go_down(server: Server) -> Any:
    server.down_from = 0
    raise ConnectionError("connection refused")


@pytest.mark.slow
@pytest.mark.parametrize("call", ["session", "sample", "save_state", "save_for_sampler"])
def test_a_server_that_is_down_ends_the_run_in_order(
    call: str, recipe: Path, tinker: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Wherever it happens, and without a traceback; what was trained can be resumed."""
    tinker.broken[call] = lambda answer: _go_down(tinker)
    run = tmp_path / "run"
    short = ("--method=grpo", "--teacher=null", "--train.steps=1", "--train.minibatches=1", "--train.checkpoint_every=0")
    assert main(["train", str(recipe), *ON, *SMALL, *short, f"--output={run}"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "student.tinker: the Tinker service could not" in said and "Traceback" not in said
    assert (run / "checkpoints" / "step-000001").exists() == (call == "save_for_sampler")
    assert run.exists() == (call in ("save_state", "save_for_sampler"))


# --- half an answer ----------------------------------------------------------------------------------------------------


@pytest.fixture
def service(tinker: Server) -> TinkerService:
    return TinkerService(None, "tiny", rank=4, seed=0, averages=False, deadline=20.0)


def _of_first(change: Callable[[Any], None]) -> Callable[[Any], Any]:
    def changed(answer: Any) -> Any:
        change(answer)
        return answer

    return changed


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda a: a.loss_fn_outputs.pop(), "log-probs of 1 sequences when asked for 2"),
        (lambda a: a.loss_fn_outputs[1].pop("logprobs"), "gave 0 log-probs of a sequence when asked for 4"),
        (lambda a: a.loss_fn_outputs[0]["logprobs"].data.pop(), "gave 3 log-probs of a sequence when asked for 4"),
        (lambda a: a.loss_fn_outputs[0]["logprobs"].data.__setitem__(-1, float("nan")), "some that are no numbers"),
    ],
)
def test_half_an_answer_to_a_forward_pass(change: Callable[[Any], None], said: str, service: TinkerService, tinker: Server) -> None:
    rows = [Row((5, 6, 7), (8, 9)), Row((5, 6), (7, 8, 9))]
    assert [len(line) for line in service.logprobs(rows)] == [2, 3]
    tinker.broken["forward"] = _of_first(change)
    with pytest.raises(ClusterError, match=said):
        service.logprobs(rows)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda a: a.sequences.clear(), "gave 0 completions when asked for one"),
        (lambda a: a.sequences[0].logprobs.pop(), "3 log-probs of a completion"),
        (lambda a: setattr(a.sequences[0], "logprobs", None), "0 log-probs of a completion"),
        (lambda a: a.sequences[0].tokens.clear(), "gave 0 tokens"),
        (lambda a: a.sequences[0].tokens.__setitem__(1, 10**6), "a token that the model does not know"),
        (lambda a: (a.sequences[0].tokens.pop(), a.sequences[0].logprobs.pop()), "after 3 of 4 tokens without an end token"),
        (lambda a: a.sequences[0].logprobs.__setitem__(0, float("inf")), "4 tokens and 4 log-probs"),
    ],
)
def test_half_an_answer_to_a_sample(change: Callable[[Any], None], said: str, service: TinkerService, tinker: Server) -> None:
    engine = TinkerEngine(service, {999_999}, vocab_size=1000, context=None)
    engine.sync()
    requests = [SampleRequest((5, 6, 7), (1, 2 + (1 << 40)))]
    whole, again = engine.sample(requests, Sampling(max_new_tokens=4)), engine.sample(requests, Sampling(max_new_tokens=4))
    for one, other in zip(whole[0], again[0], strict=True):
        assert torch.equal(one.ids, other.ids) and one.truncated and len(one.ids) == 4
    torch.testing.assert_close(service.logprobs([Row((5, 6, 7), whole[0][0].ids)])[0], whole[0][0].logprobs)
    tinker.broken["sample"] = _of_first(change)
    with pytest.raises(ClusterError, match=said):
        engine.sample(requests, Sampling(max_new_tokens=4))


def test_spoilt_weights_and_a_silent_server_are_said(service: TinkerService, tinker: Server) -> None:
    row = Row((5, 6), (7, 8))
    settings = SimpleNamespace(
        _asdict=lambda: {"learning_rate": 0.0, "beta1": 0.9, "beta2": 0.9, "eps": 1.0, "weight_decay": 0.0, "grad_clip_norm": 0.0}
    )
    tinker.broken["optim_step"] = _of_first(lambda a: a.metrics.__setitem__("grad_norm", float("nan")))
    with pytest.raises(ClusterError, match="its weights are spoilt"):
        service.step([], settings)  # type: ignore[arg-type]
    never = threading.Event()
    tinker.broken["forward"] = lambda answer: never.wait()
    service.deadline = 0.05
    with pytest.raises(ClusterError, match="gave no answer in 0.05 seconds when asked to score completions"):
        service.logprobs([row])
    never.set()


@pytest.mark.parametrize("averages", [False, True])
def test_a_server_of_the_other_kind_is_noticed(averages: bool, service: TinkerService, tinker: Server) -> None:
    tinker.averages, service.averages = averages, not averages
    with pytest.raises(SettingsError, match=f"answers like {'skyrl-jax' if averages else 'tinker'}, which scales gradients differently"):
        service.logprobs([Row((5, 6), (7,))])


# --- final/ ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def web() -> Iterator[tuple[str, dict[str, bytes]]]:
    """An address, and what lies below it."""
    files: dict[str, bytes] = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(files[self.path])

        def log_message(self, *args: Any) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", files
    server.shutdown()
    server.server_close()


def test_final_has_the_adapters_and_nothing_else_of_an_archive(
    tinker: Server, tiny_qwen3_dir: Path, tmp_path: Path, web: tuple[str, dict[str, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from zppo.models.student_model import load_chat

    url, files = web
    settings, student = make_student(tiny_qwen3_dir, tmp_path, "tinker")
    state = adapter_files_of(student)
    packed = archive({**state, "../../escaped": b"x", "more.txt": b"x", "/absolute": b"x"})
    files["/archive"] = packed
    monkeypatch.setattr(sys.modules["tinker"].ServiceClient, "_archive", lambda self, run, name: _ready(f"{url}/archive"))
    folder = tmp_path / "run" / "final"
    folder.mkdir(parents=True)
    student.save_final(folder, load_chat(settings.student))
    assert sorted(path.name for path in (folder / "adapter").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert not list(tmp_path.rglob("escaped")) and not list(tmp_path.rglob("more.txt")) and not list(folder.glob("*.tar.gz"))
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_qwen3_dir, dtype=torch.float32), folder / "adapter")
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, student.service._training.model(ids).logits)

    # A link in place of a file is passed over, and an archive without adapters is said; the run goes on.
    linked = io.BytesIO()
    with tarfile.open(fileobj=linked, mode="w:gz") as target:
        link = tarfile.TarInfo("adapter_config.json")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        target.addfile(link)
    files["/archive"] = linked.getvalue()
    shutil.rmtree(folder)
    folder.mkdir()
    student.save_final(folder, load_chat(settings.student))
    assert "could not be downloaded" in json.loads((folder / "tinker.json").read_text())["note"]
    assert not (folder / "adapter").exists()


def adapter_files_of(student: TinkerStudent) -> dict[str, bytes]:
    from peft import get_peft_model_state_dict

    model = student.service._training.model
    with torch.no_grad():
        for p in student.service._training.parameters:
            p.add_(0.05)
    return adapter_files({name: value.contiguous() for name, value in get_peft_model_state_dict(model).items()})


def _ready(url: str) -> Any:
    return SimpleNamespace(result=lambda: SimpleNamespace(url=url))


# --- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("--train.lora=null", "the API trains low-rank adapters, and train.lora is empty"),
        ("--train.lora.alpha=16", "train.lora.alpha is 16.0, and must be 32.0: the API's adapters have that one"),
        ("--train.lora.targets=[q_proj]", "train.lora.targets"),
        ("--student.tinker.server=skyrl-jax", "clips no gradients, and train.max_grad_norm is 1: set it to null"),
        ("--rollout.engine=vllm", "rollout.engine is vllm, and must be transformers: the server samples"),
        ("--rollout.temperature=0.8", "rollout.temperature is 0.8, and must be 1.0"),
        ("--eval.presence_penalty=1.5", "eval.presence_penalty is 1.5, and the API does not know it: set it to 0"),
        ("--eval.min_p=0.1", "eval.min_p"),
        ("--train.sharding=fsdp2", "train.sharding is fsdp2, and must be none"),
        ("--train.optimizer=adamw-8bit", "train.optimizer"),
        ("--train.tokens_per_microbatch=auto", "train.tokens_per_microbatch is auto, and must be 16384"),
        ("--train.vision.freeze_tower=true", "train.vision is set, and must be left out: the student reads text only"),
        ("--student.quantize=4bit", "student.quantize is set, and must be left out"),
        ("--push.repo=me/it", "push is set, and must be left out"),
        ("--method=on-distill", "compares next-token distributions, which the API does not give"),
        ("--student.tinker.base_url=http://me:secret@host", "student.tinker.base_url"),
    ],
)
def test_what_the_api_cannot_do_is_refused_by_name(more: str, said: str, recipe: Path) -> None:
    with pytest.raises(SettingsError) as error:
        load_recipe(recipe, [*ON, more])
    assert said in str(error.value)


def test_pictures_and_several_processes_are_refused(tinker: Server, tiny_qwen3_dir: Path, tmp_path: Path) -> None:
    settings, _ = make_student(tiny_qwen3_dir, tmp_path, "tinker")
    with pytest.raises(SettingsError, match="questions have images"):
        open_student(settings, None, tmp_path, images=True, processes=1)
    with pytest.raises(SettingsError, match="2 processes train"):
        open_student(settings, None, tmp_path, images=False, processes=2)


def test_without_the_sdk_or_a_key_a_dry_run_says_what_to_do(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "tinker", None)  # the import fails
    monkeypatch.delenv(KEY, raising=False)
    assert main(["train", str(recipe), *ON, "--dry-run"]) == 0
    assert "pip install 'zppo[tinker]'" in capsys.readouterr().out
    assert main(["train", str(recipe), *ON, f"--output={tmp_path / 'run'}"]) == 2
    assert "pip install 'zppo[tinker]'" in capsys.readouterr().err and not (tmp_path / "run").exists()
    monkeypatch.setitem(sys.modules, "tinker", make_sdk(Server(tmp_path)))
    assert main(["train", str(recipe), *ON, "--dry-run"]) == 0
    assert f"{KEY} is not set" in capsys.readouterr().out
    monkeypatch.setenv(KEY, SECRET)
    assert main(["train", str(recipe), *ON, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "its SDK and a key are here" in printed and SECRET not in printed


def test_checkpoints_of_the_two_kinds_are_not_mixed(recipe: Path, tinker: Server, tmp_path: Path) -> None:
    """A run that began in this process does not go on at a server; and its own settings are what a person needs."""
    folder = tmp_path / "step-000001"
    (folder / "model").mkdir(parents=True)
    _, student = make_student(recipe.parent / "student", tmp_path, "tinker")
    for text in ("", "[]", "{}", '{"state": 3}'):
        (folder / "model" / "tinker.json").write_text(text)
        with pytest.raises(Exception, match="names no weights on a server"):
            student.weights.load(folder)
    with pytest.raises(ClusterError, match="could not load tinker://gone/weights/1"):
        (folder / "model" / "tinker.json").write_text('{"state": "tinker://gone/weights/1"}')
        student.weights.load(folder)
