"""vLLM servers as the student's engine, against a stand-in that speaks HTTP (tests/fake_vllm). Real servers: `make test-vllm`."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import ModuleType
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM, AutoTokenizer

from test_vllm import SMALL, assert_holds, colocated, records, requests, start, vllm  # noqa: F401 - the last is a fixture
from zppo.cli import main
from zppo.config.settings import VLLMSettings
from zppo.distributed.processes import Processes
from zppo.engines.base import Sampling
from zppo.engines.vllm import vllm_server
from zppo.engines.vllm.vllm_colocate import ProcessPlace
from zppo.engines.vllm.vllm_engine import VLLMEngine, open_vllm
from zppo.engines.vllm.vllm_server import FileSender, ServedVLLM, connect, servers_of
from zppo.errors import EngineError, SettingsError

Serve = Callable[..., Any]


@pytest.fixture
def serve(vllm: ModuleType) -> Iterator[Serve]:  # noqa: F811
    """Starts stand-in servers; those that a test leaves are closed."""
    made = []

    def one(folder: Path, **options: Any) -> Any:
        made.append(importlib.import_module("vllm.server").Server(str(folder), vllm.FAULTS, **options))
        return made[-1]

    yield one
    for server in made:
        server.close()


def served(folder: Path, *servers: Any, weights: Path | None, **options: Any) -> VLLMEngine:
    """An engine over servers, without their weights."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    more = {"eos_ids": [AutoTokenizer.from_pretrained(folder).eos_token_id], "banned_ids": [5, 6], **options}
    return open_vllm(model, str(folder), Accelerator(cpu=True), servers=[s.url for s in servers], weights_folder=weights, **more)


def address(server: Any, folder: Path) -> list[str]:
    return ["--rollout.vllm.mode=server", f"--rollout.vllm.base_url={server.url}/", f"--rollout.vllm.weights_folder={folder / 'weights'}"]


# --- asking ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_rollouts_are_those_of_vllm_in_the_process(serve: Serve, vllm: ModuleType, tiny_qwen3_dir: Path, tmp_path: Path) -> None:  # noqa: F811
    """One request and one seed a rollout, all limits under way together, no more at once than the server takes."""
    server, how = serve(tiny_qwen3_dir), Sampling(max_new_tokens=12, presence_penalty=0.3)
    engine = served(tiny_qwen3_dir, server, weights=tmp_path)
    engine.sync()
    asked = [*requests(2, 4), requests(1, 3, length=9)[0]]
    own, _, _ = colocated(vllm, tiny_qwen3_dir, banned_ids=[5, 6])
    expected = own.sample(asked, how)
    for found, row in zip(engine.sample(asked, how), expected, strict=True):
        assert [c.ids.tolist() for c in found] == [c.ids.tolist() for c in row]
        torch.testing.assert_close(torch.cat([c.logprobs for c in found]), torch.cat([c.logprobs for c in row]), atol=1e-4, rtol=0)
    assert len(server.bodies) == 11 and {len(body["prompt"]) for body in server.bodies} == {6, 9}
    assert all(body["logit_bias"] == {"5": -100, "6": -100} and body["return_token_ids"] for body in server.bodies)
    assert 1 < server.most_open <= 5  # its --max-num-seqs
    assert not engine.rounded and engine.context == 4096


def test_rollouts_come_as_they_end_and_a_reader_may_go_away(serve: Serve, tiny_qwen3_dir: Path, tmp_path: Path) -> None:
    server = serve(tiny_qwen3_dir)
    engine = served(tiny_qwen3_dir, server, weights=tmp_path)
    engine.sync()
    stream: Any = engine.stream(requests(8, 8), Sampling(max_new_tokens=8))
    next(stream)
    assert len(server.bodies) < 64
    stream.close()
    assert len(server.bodies) < 64
    assert [len(row) for row in engine.sample(requests(1, 3), Sampling(max_new_tokens=2))] == [3]


def test_several_servers_share_the_prompts_and_hold_the_same_weights(serve: Serve, tiny_qwen3_dir: Path, tmp_path: Path) -> None:
    servers = [serve(tiny_qwen3_dir), serve(tiny_qwen3_dir)]
    engine = served(tiny_qwen3_dir, *servers, weights=tmp_path)
    with torch.no_grad():
        for parameter in engine.model.parameters():
            parameter.mul_(1.5)
    engine.sync()
    engine.sample(requests(4, 2), Sampling(max_new_tokens=2))
    for k, server in enumerate(servers):
        assert {tuple(body["prompt"]) for body in server.bodies} == {r.prompt_ids for r in requests(4, 2)[k::2]}
        assert all(torch.equal(value, server.model.by_name[name]) for name, value in engine.model.named_parameters())
    assert servers[0].version == servers[1].version != "default"


@pytest.mark.parametrize(
    ("servers", "processes", "expected"),
    [(1, 1, ["0"]), (3, 1, ["012"]), (1, 2, ["0", "0"]), (2, 2, ["0", "1"]), (4, 2, ["02", "13"]), (2, 4, ["0", "1", "0", "1"])],
)
def test_servers_are_shared_out_evenly(servers: int, processes: int, expected: list[str]) -> None:
    urls = [str(k) for k in range(servers)]
    assert ["".join(servers_of(urls, ProcessPlace(rank, rank, processes))) for rank in range(processes)] == expected


@pytest.mark.parametrize(
    ("urls", "processes", "said"), [("ab", 3, "2 servers for 3 training"), ("abc", 2, "3 servers"), ("aa", 1, "twice")]
)
def test_servers_that_cannot_be_shared_out(urls: str, processes: int, said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        servers_of(list(urls), ProcessPlace(0, 0, processes))


def test_addresses_are_one_or_several() -> None:
    two = VLLMSettings(mode="server", base_url=("http://a:1/v1/", "http://[::1]:1"))  # type: ignore[arg-type]
    assert two.servers == ("http://a:1", "http://[::1]:1") and VLLMSettings(mode="server").servers == ("http://localhost:8000",)
    assert VLLMSettings().servers == ()
    for wrong in ("ftp://a", "http://key@host", (), ["http://a", "b"]):
        with pytest.raises(ValueError, match="base_url"):
            VLLMSettings(base_url=wrong)  # type: ignore[arg-type]


def test_what_a_server_says_of_itself_is_read_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    class Endless(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            with suppress(OSError):  # the reader goes away
                while True:
                    self.wfile.write(b" " * 4096)

        def log_message(self, *args: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Endless)
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(vllm_server, "SERVER_WAIT", 0.0)
    monkeypatch.setattr(vllm_server, "MOST_SAID", 10_000)
    url = f"http://127.0.0.1:{server.server_port}"
    with pytest.raises(EngineError, match="answers /health with more than 10,000 bytes"):
        connect([url], ProcessPlace(0, 0, 1), lambda text: [text], port=1, folder=Path("w"), rows=None, device=torch.device("cpu"))
    server.shutdown()
    server.server_close()


# --- what may go wrong ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_busy_server_is_asked_again_and_gives_the_same(serve: Serve, tiny_qwen3_dir: Path, tmp_path: Path) -> None:
    server = serve(tiny_qwen3_dir)
    engine = served(tiny_qwen3_dir, server, weights=tmp_path)
    engine.sync()
    once = [c.ids.tolist() for c in engine.sample(requests(1, 3), Sampling(max_new_tokens=6))[0]]
    server.refused = 2
    assert [c.ids.tolist() for c in engine.sample(requests(1, 3), Sampling(max_new_tokens=6))[0]] == once
    assert len(server.bodies) == 3 + 3 + 2


def changed(reply: Any, **fields: Any) -> Any:
    return {"choices": [reply["choices"][0] | fields]}


ODD: list[tuple[Callable[[Any], Any], str]] = [
    (lambda reply: {"choices": []}, "something else than one completion"),
    (lambda reply: {"choices": reply["choices"] * 2}, "something else than one completion"),
    (lambda reply: [], "something else than one completion"),
    (lambda reply: {"choices": [{"text": "x"}]}, "KeyError"),
    (lambda reply: changed(reply, token_ids=None), "something else than one completion"),
    (lambda reply: changed(reply, token_ids=["3", "2"]), "no numbers"),
    (lambda reply: changed(reply, token_ids=[True]), "no numbers"),
    (lambda reply: changed(reply, logprobs=None), "something else than one completion"),
    (lambda reply: changed(reply, logprobs={"token_logprobs": [-1.0]}), "tokens with 1 log-probs"),
    (lambda reply: changed(reply, logprobs={"token_logprobs": "abc"}), "no numbers"),
    (lambda reply: changed(reply, prompt_token_ids=[1]), "read one of 1 tokens"),
    (lambda reply: changed(reply, finish_reason="abort"), "ended for the reason 'abort'"),
    (lambda reply: b"<html>", "no JSON"),
    (lambda reply: b"[" * 100_000, "no JSON"),
    (lambda reply: b" " * (2 << 20), "more than 1,0"),
]


@pytest.mark.slow
def test_odd_replies_are_named(serve: Serve, tiny_qwen3_dir: Path, tmp_path: Path) -> None:
    server = serve(tiny_qwen3_dir)
    engine = served(tiny_qwen3_dir, server, weights=tmp_path)
    engine.sync()
    for server.change, said in ODD:
        with pytest.raises(EngineError, match=said) as caught:
            engine.sample(requests(1, 2), Sampling(max_new_tokens=3))
        assert server.url in str(caught.value) and len(str(caught.value)) < 900


def test_a_refusal_is_not_asked_again(serve: Serve, tiny_qwen3_dir: Path, tmp_path: Path) -> None:
    server = serve(tiny_qwen3_dir)
    engine = served(tiny_qwen3_dir, server, weights=tmp_path)
    engine.sync()
    server.model.context = 5
    with pytest.raises(EngineError, match="status 400: .*maximum context length"):
        engine.sample(requests(1, 1), Sampling(max_new_tokens=3))
    assert len(server.bodies) == 1


@pytest.mark.parametrize("version", ["default", "of another run"])
def test_rollouts_of_other_weights_are_not_used(serve: Serve, tiny_qwen3_dir: Path, tmp_path: Path, version: str) -> None:
    """A server that was started again, or that two runs send weights to."""
    server = serve(tiny_qwen3_dir)
    engine = served(tiny_qwen3_dir, server, weights=tmp_path)
    engine.sync()
    server.version = version
    with pytest.raises(EngineError, match=f"does not hold the weights that were sent .version '{version}'"):
        engine.sample(requests(1, 1), Sampling(max_new_tokens=3))


def test_a_silent_server(serve: Serve, tiny_qwen3_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = serve(tiny_qwen3_dir)
    engine = served(tiny_qwen3_dir, server, weights=tmp_path)
    engine.sync()
    monkeypatch.setattr(vllm_server, "SILENCE", 0.05)
    server.refused = 1000
    with pytest.raises(EngineError, match="no rollout has come from vLLM at http"):
        engine.sample(requests(1, 1), Sampling(max_new_tokens=3))


# --- weights ---------------------------------------------------------------------------------------------------------


def test_weights_in_several_files_and_none_is_left(
    serve: Serve, tiny_qwen3_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve(tiny_qwen3_dir)
    engine = served(tiny_qwen3_dir, server, weights=tmp_path / "new" / "weights")
    monkeypatch.setattr(vllm_server, "FILE_BYTES", 5000)
    engine.sync()
    assert server.model.loads == len(server.model.by_name) and not list((tmp_path / "new" / "weights").iterdir())
    assert server.log == ["/collective_rpc", "/update_weight_version", "/reset_encoder_cache", "/reset_prefix_cache"]


def over_nccl(monkeypatch: pytest.MonkeyPatch, *servers: Any) -> ServedVLLM:
    """A connection whose weights go over what stands in for NCCL."""
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    urls, device = [server.url for server in servers], torch.device("cuda:0")
    return connect(urls, ProcessPlace(), lambda text: [text], port=1234, folder=None, rows=None, device=device)


@pytest.mark.slow
def test_weights_over_nccl_reach_all_servers_once(serve: Serve, tiny_qwen3_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    servers = [serve(tiny_qwen3_dir), serve(tiny_qwen3_dir)]
    driver = over_nccl(monkeypatch, *servers)
    model = AutoModelForCausalLM.from_pretrained(tiny_qwen3_dir, dtype=torch.float32)
    for factor in (1.5, 2.0):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(factor)
        driver.load([(name, value.detach()) for name, value in model.named_parameters()])
        for server in servers:
            assert all(torch.equal(value, server.model.by_name[name]) for name, value in model.named_parameters())
    assert [server.rank for server in servers] == [1, 2]
    once = ["/start_weight_update", "/update_weights", "/finish_weight_update", "/reset_encoder_cache", "/reset_prefix_cache"]
    assert servers[0].log == ["/init_weight_transfer_engine", *once, *once]


def test_a_server_that_fails_while_weights_are_sent(
    vllm: ModuleType,  # noqa: F811
    serve: Serve,
    tiny_qwen3_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What NCCL would wait for is said by HTTP; and the others go on with their parts."""
    driver = over_nccl(monkeypatch, serve(tiny_qwen3_dir))
    vllm.FAULTS.add("no memory")
    passes = []

    class Weights:
        def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
            passes.append(1)
            yield "lm_head.weight", torch.zeros(2, 2)

    with pytest.raises(EngineError, match="/update_weights with status 500: .*out of memory"):
        driver.load(Weights())
    assert len(passes) == 2


def test_other_processes_go_through_the_weights_too_and_learn_of_a_fault(serve: Serve, tiny_qwen3_dir: Path, tmp_path: Path) -> None:
    said = ['["v1", "the disk is full"]', '["", ""]']
    answers = iter([["", ""], said])
    server, seen = serve(tiny_qwen3_dir), []
    place = ProcessPlace(1, 1, 2)
    driver = connect([server.url], place, lambda text: next(answers), port=1, folder=tmp_path, rows=None, device=torch.device("cpu"))
    with pytest.raises(EngineError, match="the disk is full"):
        driver.load((seen.append(name) or name, value) for name, value in [("a", torch.zeros(1)), ("b", torch.zeros(1))])  # type: ignore[func-returns-value]
    assert seen == ["a", "b"] and server.log == []
    assert driver.rows == (2,)  # of five, for two processes


def test_a_folder_that_cannot_be_written(serve: Serve, tiny_qwen3_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    engine = served(tiny_qwen3_dir, serve(tiny_qwen3_dir), weights=tmp_path / "file")
    with pytest.raises(EngineError, match="rollout.vllm.weights_folder"):
        engine.sync()


def test_an_engine_that_fails_in_one_process_ends_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Together, so that they can save the run."""
    processes = Processes(0, 2)
    monkeypatch.setattr(processes, "gather", lambda value: [value, (None, "the server is gone", {})])
    with pytest.raises(EngineError, match="the server is gone"), processes.deal([1.0, 1.0]) as deal:
        deal.done = ["mine"]
    monkeypatch.setattr(processes, "gather", lambda value: [value, (None, "", {1: "theirs"})])
    with pytest.raises(EngineError, match="mine is gone"), processes.deal([1.0, 1.0]) as deal:
        raise EngineError("mine is gone")


# --- whole runs --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_with_a_vllm_server(serve: Serve, recipe: Path, tmp_path: Path) -> None:
    server, run = serve(recipe.parent / "student"), tmp_path / "run"
    options = [*SMALL, *address(server, tmp_path), "--train.engine_tolerance=1e-5"]
    assert main(["train", str(recipe), f"--output={run}", *options, "--train.steps=2", "--eval.every=0"]) == 0
    assert_holds(server, run / "final")
    assert all(step["engine_gap_mean"] < 1e-5 and step["logprob_gap_max"] < 1e-4 for step in records(run, "step"))
    assert server.log.count("/collective_rpc") == server.log.count("/reset_prefix_cache") == 3
    rollouts = [body for body in server.bodies if body["max_tokens"] == 8 and body["temperature"] == 1]
    assert len(rollouts) >= sum(step["rollouts"] for step in records(run, "step"))
    assert len({body["seed"] for body in rollouts}) > 0.8 * len(rollouts)


@pytest.mark.long
def test_a_server_that_goes_away_leaves_a_run_that_can_be_resumed(
    serve: Serve, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_server, "RETRIED", 1.0)
    server, run = serve(recipe.parent / "student"), tmp_path / "run"

    def gone(reply: Any) -> Any:
        if server.log.count("/collective_rpc") == 2:  # in the second step
            server.close()
            server.refused = 1 << 30  # connections that are open
        return reply

    server.change = gone
    options = [*SMALL, *address(server, tmp_path), "--data.eval=null", "--train.steps=2"]
    assert main(["train", str(recipe), f"--output={run}", *options]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert f"the vLLM server at {server.url}" in said and "continue with `zppo resume" in said
    assert [step["step"] for step in records(run, "step")] == [1]
    another = serve(recipe.parent / "student")
    written = (run / "recipe.yaml").read_text(encoding="utf-8")
    (run / "recipe.yaml").write_text(re.sub(r"http://127.0.0.1:\d+", another.url, written), encoding="utf-8")
    assert main(["resume", str(run)]) == 0
    assert [step["step"] for step in records(run, "step")] == [1, 2]


@pytest.mark.slow
def test_half_sent_weights_are_found(
    serve: Serve, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that is told fewer weights says nothing; the guard sees it after one update, however small."""
    write, calls = FileSender._write, []

    def half(self: FileSender, weights: Any, place: Path) -> None:
        given = list(weights)
        calls.append(1)
        write(self, given if len(calls) == 1 else given[: len(given) // 2], place)

    monkeypatch.setattr(FileSender, "_write", half)
    options = [*SMALL, *address(serve(recipe.parent / "student"), tmp_path), "--data.eval=null", "--train.steps=3"]
    assert main(["train", str(recipe), f"--output={tmp_path / 'run'}", *options, "--train.learning_rate=1e-5"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "the sampling engine does not hold the trainer's weights" in said
    assert len(records(tmp_path / "run", "step")) <= 2


# --- what can go wrong at the start ------------------------------------------------------------------------------------


def test_no_server(serve: Serve, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_server, "SERVER_WAIT", 0)
    nobody = ["--rollout.vllm.mode=server", "--rollout.vllm.base_url=http://127.0.0.1:9"]
    said = start(recipe, tmp_path, capsys, *nobody, f"--rollout.vllm.weights_folder={tmp_path}")
    assert "http://127.0.0.1:9" in said and "vllm serve" in said
    said = start(recipe, tmp_path, capsys, *nobody)
    assert "needs a GPU here too" in said and "weights_folder" in said
    assert "base_url" in start(recipe, tmp_path, capsys, "--rollout.vllm.base_url=http://key@host")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"mode": "raw_logprobs"}, "--logprobs-mode processed_logprobs"),
        ({"max_model_len": 40}, "context of 40"),
        ({"fault": "not in development mode"}, "VLLM_SERVER_DEV_MODE=1"),
    ],
)
def test_a_server_that_does_not_fit(
    vllm: ModuleType,  # noqa: F811
    serve: Serve,
    recipe: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: dict[str, Any],
    said: str,
) -> None:
    vllm.FAULTS.update({options.pop("fault", "none")})
    server = serve(recipe.parent / "student", **options)
    assert said in start(recipe, tmp_path, capsys, *address(server, tmp_path))


def test_a_server_that_describes_itself_otherwise(serve: Serve, tiny_qwen3_dir: Path, tmp_path: Path) -> None:
    server = serve(tiny_qwen3_dir)
    for found in ({"vllm_config": "VllmConfig(...)"}, {}, []):
        server.get = lambda path, found=found: found
        with pytest.raises(EngineError, match="describes itself otherwise"):
            served(tiny_qwen3_dir, server, weights=tmp_path)


@pytest.mark.slow
def test_a_server_of_another_model_is_found_before_anything_is_sampled(
    vllm: ModuleType,  # noqa: F811
    serve: Serve,
    recipe: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    server = serve(recipe.parent / "teacher")
    vllm.FAULTS.add("deaf")
    said = start(recipe, tmp_path, capsys, *address(server, tmp_path))
    assert "before the first step" in said and "on average over" in said


def test_the_stand_in_reads_what_is_sent(serve: Serve, tiny_qwen3_dir: Path) -> None:
    """A field that vLLM does not know would be an error there."""
    status, said = serve(tiny_qwen3_dir).post("/v1/completions", json.loads('{"prompt": [1], "sampling": 1}'))
    assert status == 400 and "sampling" in said["error"]
