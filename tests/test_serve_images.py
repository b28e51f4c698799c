"""`zppo serve` with images: what a model sees of them, what is refused, and that nothing hostile brings the server down or stays behind."""

from __future__ import annotations

import base64
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from pictures import bomb, noise, picture
from seeing import make_seeing
from serving import QUESTION, URL, Gate, ask, connect, connected, service, texts, wait_for
from zppo.core.types import IMAGE, Message
from zppo.engines.base import SampleRequest, Sampling
from zppo.errors import ModelError
from zppo.images.store import PixelLimits, keep
from zppo.serve import protocol as pictures
from zppo.serve.command import ServedModel, load
from zppo.serve.protocol import RequestImages
from zppo.serve.server import make_app
from zppo.teacher.interface import TeacherRequest, TeacherSampling
from zppo.teacher.local import LocalTeacher
from zppo.teacher.remote import RemoteTeacher

LIMITS = PixelLimits(16 * 16, 24 * 24)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    """A tiny model that sees."""
    return load(str(make_seeing(tmp_path_factory.mktemp("seeing"))), device="cpu", images=LIMITS)


@pytest.fixture
def client(loaded: ServedModel, tmp_path: Path) -> Iterator[TestClient]:
    with connected(loaded.engine, loaded.chat, pictures=RequestImages(tmp_path, 3), context=512) as client:
        yield client


def url(data: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def turn(*parts: str | bytes, role: str = "user") -> dict[str, Any]:
    """A message of texts and images."""
    content = [{"type": "text", "text": p} if isinstance(p, str) else {"type": "image_url", "image_url": {"url": url(p)}} for p in parts]
    return {"role": role, "content": content}


def image_part(address: Any, **more: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": address, **more}}]}]


# --- what the model sees ---------------------------------------------------------------------------------------------


def test_a_request_is_what_the_engine_samples_from_these_pictures(client: TestClient, loaded: ServedModel, tmp_path: Path) -> None:
    one, other = noise((20, 20)), noise((40, 24), seed=1, kind="JPEG")
    messages = [turn("is this: ", one, "in", other, "?")]
    refs = (keep(one, tmp_path / "own"), keep(other, tmp_path / "own"))
    ids = loaded.chat.encode([Message("user", f"is this: {IMAGE}in{IMAGE}?")], refs)
    greedy = Sampling(temperature=0.0, max_new_tokens=8)
    [[expected]] = loaded.engine.sample([SampleRequest(ids, (0,), refs)], greedy)
    answer = ask(client, messages=messages, temperature=0)
    assert texts(answer) == [loaded.chat.decode(expected.ids.tolist())]
    assert answer["usage"]["prompt_tokens"] == len(ids) and ids.count(next(iter(loaded.chat.image_processor.image_ids))) > 8  # type: ignore[union-attr]


def test_another_picture_is_another_answer_and_the_same_is_the_same(client: TestClient) -> None:
    def logprobs(data: bytes) -> list[float]:
        answer = ask(client, messages=[turn(data, "what?")], seed=3, logprobs=True)
        return [token["logprob"] for token in answer["choices"][0]["logprobs"]["content"]]

    one, again, other = logprobs(noise((20, 20))), logprobs(noise((20, 20))), logprobs(noise((20, 20), seed=1))
    assert one == again != other


def test_texts_beside_images_and_requests_without(client: TestClient) -> None:
    plain = ask(client, messages=[turn("a", "b")])["usage"]["prompt_tokens"]
    assert plain == ask(client, messages=[{"role": "user", "content": "a\nb"}])["usage"]["prompt_tokens"]
    assert ask(client, messages=[{"role": "user", "content": f"what is {IMAGE}?"}])["choices"]
    seen = ask(client, messages=[{"role": "system", "content": "be"}, turn(noise((20, 20)), "a", "b")])
    assert seen["usage"]["prompt_tokens"] > plain
    low = image_part(url(noise((20, 20))), detail="low")
    assert ask(client, messages=low)["choices"]


# --- what is refused -------------------------------------------------------------------------------------------------

NOISE = noise((64, 64))


@pytest.mark.parametrize(
    ("messages", "code", "said"),
    [
        (image_part("https://example.org/a.png"), "invalid_value", "this server fetches nothing: send the image itself"),
        (image_part("file:///etc/passwd"), "invalid_value", "this server fetches nothing"),
        (image_part("/etc/passwd"), "invalid_value", "this server fetches nothing"),
        (image_part(None), "invalid_value", 'the image_url of part 0 is {"url": null} and no'),
        (image_part("data:,", size=3), "invalid_value", "the image_url of part 0 is"),
        ([turn(picture(), role="system")], "invalid_value", "images stand in turns of the user, not of the system"),
        ([turn(picture(), f"or {IMAGE}?")], "invalid_value", "its text holds <image>, which marks the place of an image"),
        ([turn(picture(), "<|image_pad|>")], "invalid_value", "another token that stands for an image"),
        (image_part("data:image/png"), "invalid_image", "it has no comma"),
        (image_part("data:image/png;base64,????"), "invalid_image", "is no data: URL that can be read"),
        ([turn(b"")], "invalid_image", "the image 1 of the conversation is empty"),
        ([turn(b"pixels")], "invalid_image", "the image 1 of the conversation is no image that can be read"),
        ([turn(picture(), NOISE[:-200])], "invalid_image", "the image 2 of the conversation is broken"),
        ([turn(bomb(1 << 13, 1 << 13))], "invalid_image", "send one of at most 33,554,432 pixels"),
        ([turn(bomb(1 << 30, 1 << 30))], "invalid_image", "is too large"),
        ([turn(picture((402, 2)))], "invalid_image", "its longer side may be 200 times the shorter one"),
        ([turn(picture(), picture()), turn(picture(), picture())], "too_many_images", "has 4 images; send at most 3"),
        ([turn(picture(), "x " * 500)], "context_length_exceeded", "the model's context holds 512"),
    ],
)
def test_what_cannot_be_shown_is_said(client: TestClient, tmp_path: Path, messages: list[dict[str, Any]], code: str, said: str) -> None:
    error = ask(client, 400, messages=messages)["error"]
    assert error["code"] == code and said in error["message"], error
    assert error["param"].startswith("messages") and len(error["message"]) < 700
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_reads_text_only_says_so(tmp_path: Path, client: TestClient, loaded: ServedModel) -> None:
    for taker, said in (
        (RequestImages(tmp_path, 3, "this model reads text only"), "has 1 image(s), and this model reads text only; send text alone"),
        (RequestImages(tmp_path, 0), "has 1 image(s), and this server takes none; send text alone"),
    ):
        with connected(loaded.engine, loaded.chat, pictures=taker) as blind:
            error = ask(blind, 400, messages=[turn(picture(), "?")])["error"]
            assert (error["code"], error["param"]) == ("images_refused", "messages") and said in error["message"]
            assert ask(blind, messages=[QUESTION])["choices"]


def test_a_checkpoint_is_loaded_for_text_where_it_cannot_be_shown_images(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_seeing(tmp_path / "model")
    assert load(str(path), device="cpu").text_only == "this model reads text only"
    (path / "preprocessor_config.json").unlink()
    alone = load(str(path), device="cpu", images=LIMITS)
    assert "this model cannot be shown images here" in alone.text_only and alone.chat.image_processor is None
    assert "images are refused" in caplog.text
    make_seeing(path)
    monkeypatch.setattr("zppo.engines.image_check.why_blind", lambda *_: "it has no eyes")
    with pytest.raises(ModelError, match="it has no eyes.*--max-images 0"):
        load(str(path), device="cpu", images=LIMITS)


# --- what stays behind -----------------------------------------------------------------------------------------------


def test_nothing_of_a_request_stays_behind(loaded: ServedModel, tmp_path: Path) -> None:
    """Whether it is answered, fails while it is decoded, or its client goes away while it waits."""
    gate = Gate(poison=-2)
    served = service(gate, loaded.chat, pictures=RequestImages(tmp_path, 3), max_queue=1, context=512)
    gate.open.set()
    with connect(served) as client:
        ask(client, messages=[turn(picture(), "?")])
        assert list(tmp_path.iterdir()) == []
        length = gate.batches[-1][0]
        gate.poison = length
        assert ask(client, 500, messages=[turn(picture(), "?")])["error"]["code"] == "decoding_failed"
        assert list(tmp_path.iterdir()) == []
        gate.open.clear()
        waiting = [served.batcher.submit(SampleRequest((1,), (0,)), Sampling()) for _ in range(1)]
        gate.entered.clear()
        gate.entered.wait(10)
        served.batcher.submit(SampleRequest((1,), (0,)), Sampling(max_new_tokens=3))
        assert ask(client, 429, messages=[turn(picture(), "?")])["error"]["code"] == "queue_full"
        assert list(tmp_path.iterdir()) == []
        gate.open.set()
        assert waiting[0].future.result(30)
    served.batcher.close(30)


def test_a_client_that_leaves_while_it_waits_leaves_nothing(loaded: ServedModel) -> None:
    gate, ended = Gate(), list[bool]()
    batcher = service(gate, loaded.chat).batcher
    first = batcher.submit(SampleRequest((1,), (0,)), Sampling())
    assert gate.entered.wait(10)
    waiting = batcher.submit(SampleRequest((1,), (0,)), Sampling(max_new_tokens=3))
    waiting.future.add_done_callback(lambda _: ended.append(True))
    batcher.abandon(waiting)
    assert ended == [True] and not first.future.done()
    gate.open.set()
    assert first.future.result(30)
    wait_for(lambda: batcher.load == (0, 0))
    batcher.close(30)


# --- hostile images --------------------------------------------------------------------------------------------------

SEEDS = [noise((16, 16), kind=kind) for kind in ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF")]


@st.composite
def hostile(draw: st.DrawFn) -> str:
    """Random bytes, damaged files and odd URLs."""
    kind = draw(st.integers(0, 2))
    if kind == 0:
        return "data:" + draw(st.text(max_size=30)) + draw(st.sampled_from([",", ";base64,", ""])) + draw(st.text(max_size=30))
    data = bytearray(draw(st.binary(max_size=60)) if kind == 1 else draw(st.sampled_from(SEEDS)))
    for place in draw(st.lists(st.integers(0, max(0, len(data) - 1)), max_size=5)) if data else []:
        data[place] = draw(st.integers(0, 255))
    return url(bytes(data))


@pytest.mark.slow
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(hostile(), min_size=1, max_size=3))
def test_hostile_images_are_shown_or_refused(loaded: ServedModel, tmp_path: Path, addresses: list[str]) -> None:
    gate = Gate()
    gate.open.set()
    served = service(gate, loaded.chat, pictures=RequestImages(tmp_path, 3), context=4096)
    content = [{"type": "image_url", "image_url": {"url": address}} for address in addresses]
    with connect(served) as client:
        answer = client.post(URL, json={"model": "tiny", "messages": [{"role": "user", "content": content}]})
        assert answer.status_code in (200, 400), answer.text
        assert (answer.status_code == 200) == ("error" not in answer.json())
        assert list(tmp_path.iterdir()) == []
    served.batcher.close(30)


def test_few_images_are_decoded_at_once(loaded: ServedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = most = 0
    lock, real = threading.Lock(), pictures.decode

    def slow(data: bytes, name: str) -> Any:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.02)
        with lock:
            now -= 1
        return real(data, name)

    monkeypatch.setattr(pictures, "decode", slow)
    with connected(loaded.engine, loaded.chat, pictures=RequestImages(tmp_path, 3), context=512) as client, ThreadPoolExecutor(8) as pool:
        assert all(pool.map(lambda i: ask(client, messages=[turn(noise((16, 16), i), "?")]), range(8)))
    assert most <= pictures.DECODERS


def test_a_server_does_not_remember_every_picture(loaded: ServedModel, client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zppo.images.processor._MOST_SIZES", 2)
    assert loaded.chat.image_processor is not None
    loaded.chat.image_processor._sizes.clear()
    for seed in range(5):
        ask(client, messages=[turn(noise((16, 16), seed), "?")], max_tokens=1)
        assert 1 <= len(loaded.chat.image_processor._sizes) <= 2


# --- a teacher that is served ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_served_model_is_a_teacher_that_sees(loaded: ServedModel, tmp_path: Path) -> None:
    """What a remote teacher sends is what the server shows to its model: the same pictures as in this process."""
    served = service(loaded.engine, loaded.chat, pictures=RequestImages(tmp_path / "served", 3), context=512)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(make_app(served), log_config=None, lifespan="off"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        teacher = RemoteTeacher("tiny", [f"http://127.0.0.1:{listener.getsockname()[1]}/v1"], limits=LIMITS)
        try:
            how = TeacherSampling(Sampling(temperature=0.0, max_new_tokens=8))
            teacher.check(how)
            teacher.check_images(how, 2)
            refs = (keep(noise((20, 20)), tmp_path), keep(noise((24, 16), seed=1), tmp_path))
            turns = (Message("system", "be"), Message("user", f"{IMAGE} or {IMAGE}?"))
            requests = [TeacherRequest(turns, (1,), refs), TeacherRequest((Message("user", "?"),), (2,))]
            remote = teacher.complete(requests, how)
            here = LocalTeacher(loaded.engine, lambda args: loaded.chat)
            here.image_processor = loaded.chat.image_processor
            local = here.complete(requests, how)
            assert [(r.texts, r.prompt_tokens, r.error) for r in remote] == [(r.texts, r.prompt_tokens, "") for r in local]
            assert list((tmp_path / "served").iterdir()) == []
        finally:
            teacher.close()
            server.should_exit = True
            thread.join(60)
            served.batcher.close(30)


def test_the_pictures_of_a_request_are_bounded_in_sum(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "MOST_PIXELS_IN_ALL", 1000)
    assert texts(ask(client, messages=[turn(noise((20, 20)), noise((20, 20), seed=1))]))
    error = ask(client, 400, messages=[turn(*(noise((20, 20), seed=i) for i in range(3)))])["error"]
    assert error["code"] == "invalid_image"
    assert "the image 3 of the conversation has 20 x 20 pixels, with those before it more than 1,000 in all" in error["message"]
