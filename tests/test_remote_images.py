"""Images on their way to a teacher on a server: what is sent, what is said where they cannot be, and what memory they take."""

from __future__ import annotations

import asyncio
import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fault_server import Server
from pictures import noise, picture
from zppo.core.types import IMAGE, ImageRef, Message
from zppo.engines.base import Sampling
from zppo.errors import DataError, TeacherError
from zppo.images.store import PixelLimits, keep, request_url
from zppo.teacher import remote as sending
from zppo.teacher.interface import TeacherRequest, TeacherSampling
from zppo.teacher.remote import RemoteTeacher
from zppo.teacher.reply import Scrubber
from zppo.teacher.startup_check import PING_IMAGE, Names

HOW = TeacherSampling(Sampling(max_new_tokens=16))
LIMITS = PixelLimits(16 * 16, 32 * 32)


@pytest.fixture(scope="module")
def shared() -> Iterator[Server]:
    server = Server()
    yield server
    server.kill()


@pytest.fixture
def server(shared: Server) -> Server:
    shared.control()
    return shared


@pytest.fixture
def teacher(server: Server) -> Iterator[RemoteTeacher]:
    teacher = RemoteTeacher("tiny", [server.url], limits=LIMITS, names=Names("teacher"), concurrency=8)
    yield teacher
    teacher.close()


def shown(url: str) -> tuple[str, Image.Image]:
    head, _, body = url.partition(",")
    return head, Image.open(io.BytesIO(base64.b64decode(body)))


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return picture((30, 20), kind="JPEG", exif=exif.tobytes())


# --- one image -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_files_within_the_limits_go_as_they_are(tmp_path: Path, kind: str) -> None:
    data = noise((24, 20), kind=kind)
    head, _, body = request_url(keep(data, tmp_path), LIMITS).partition(",")
    assert head == f"data:image/{kind.lower()};base64" and base64.b64decode(body) == data


@pytest.mark.parametrize(
    ("data", "head", "size"),
    [
        (noise((64, 64)), "png", (32, 32)),
        (noise((128, 32), kind="JPEG"), "jpeg", (64, 16)),
        (noise((8, 8)), "png", (16, 16)),
        (picture((20, 20), (0, 0, 0, 0), "RGBA"), "png", (20, 20)),
        (picture((20, 20), kind="GIF"), "png", (20, 20)),
        (picture((20, 20), kind="WEBP"), "png", (20, 20)),
        (picture((20, 20), 0, "P", transparency=0), "png", (20, 20)),
        (picture((20, 20), (0, 0, 0, 0), "CMYK", "JPEG"), "jpeg", (20, 20)),
        (picture((20, 20), 0x8000, "I;16"), "png", (20, 20)),
        (turned(), "jpeg", (20, 30)),
    ],
)
def test_all_others_go_as_models_see_them(tmp_path: Path, data: bytes, head: str, size: tuple[int, int]) -> None:
    found, image = shown(request_url(keep(data, tmp_path), LIMITS))
    assert (found, image.size, image.mode) == (f"data:image/{head};base64", size, "RGB")
    assert len(image.getexif()) == 0


def test_a_file_that_is_gone_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone.png cannot be read"):
        request_url(ImageRef(str(tmp_path / "gone.png"), ""), LIMITS)


# --- requests --------------------------------------------------------------------------------------------------------


def test_a_request_has_texts_and_images_in_order(server: Server, teacher: RemoteTeacher, tmp_path: Path) -> None:
    small, large = keep(noise((20, 20)), tmp_path), keep(noise((80, 80)), tmp_path)
    turns = (Message("system", "be"), Message("user", f"is {IMAGE} in {IMAGE}?\ud800"))
    with_images = TeacherRequest(turns, (5, 6), (small, large))
    replies = teacher.complete([with_images, TeacherRequest((Message("user", f"{IMAGE}?"),), (1,))], HOW)
    assert [len(r.texts) for r in replies] == [2, 1] and not any(r.error for r in replies)
    sent = {str(type(r["messages"][-1]["content"])): r["messages"] for r in server.log}
    assert sent["<class 'str'>"] == [{"role": "user", "content": f"{IMAGE}?"}]
    system, user = sent["<class 'list'>"]
    assert system == {"role": "system", "content": "be"}
    kinds = [part["type"] for part in user["content"]]
    assert kinds == ["text", "image_url", "text", "image_url", "text"]
    assert [part["text"] for part in user["content"] if "text" in part] == ["is ", " in ", "??"]
    sizes = [shown(part["image_url"]["url"])[1].size for part in user["content"] if "image_url" in part]
    assert sizes == [(20, 20), (32, 32)]


def test_an_image_that_is_gone_costs_its_own_request_alone(teacher: RemoteTeacher, tmp_path: Path) -> None:
    gone = TeacherRequest((Message("user", "x"),), (1, 2), (ImageRef(str(tmp_path / "gone.png"), "00"),))
    unfit = TeacherRequest((Message("user", IMAGE * 2),), (3,), (keep(noise((20, 20)), tmp_path),))
    replies = teacher.complete([gone, unfit, TeacherRequest((Message("user", "y"),), (4,))], HOW)
    assert replies[0].texts == (None, None) and "gone.png cannot be read" in replies[0].error
    assert replies[1].texts == (None,) and "2 <image> marker(s)" in replies[1].error
    assert replies[2].texts[0] is not None


def test_images_are_encoded_for_requests_under_way_alone(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No more base64 is held than requests are under way; encoding does not run ahead."""
    server.control(always={"kind": "slow", "seconds": 0.05})
    ahead: list[int] = []
    done, real = 0, sending.request_url

    def counted(ref: ImageRef, limits: PixelLimits) -> str:
        nonlocal done
        done += 1
        ahead.append(done - sum("image_url" in str(r["messages"]) for r in server.log))
        return real(ref, limits)

    monkeypatch.setattr(sending, "request_url", counted)
    teacher = RemoteTeacher("tiny", [server.url], limits=LIMITS, concurrency=2)
    requests = [TeacherRequest((Message("user", str(i)),), (i,), (keep(noise((20, 20), i), tmp_path),)) for i in range(8)]
    try:
        assert not any(reply.error for reply in teacher.complete(requests, HOW))
    finally:
        teacher.close()
    assert done == 8 and max(ahead) <= 2


def test_an_image_is_encoded_once_for_all_completions_and_repeats(
    server: Server, teacher: RemoteTeacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, real = list[ImageRef](), sending.request_url
    monkeypatch.setattr(sending, "request_url", lambda ref, limits: made.append(ref) or real(ref, limits))  # type: ignore[func-returns-value]
    server.control({"kind": "short", "choices": 2})
    images = [keep(noise((80, 80), i), tmp_path) for i in range(3)]
    requests = [TeacherRequest((Message("user", f"{i}?"),), (1, 2, 3), (ref,)) for i, ref in enumerate(images)]
    assert not any(reply.error for reply in teacher.complete(requests, HOW))
    teacher.one_by_one = True
    assert not any(reply.error for reply in teacher.complete(requests, HOW))
    assert len(server.log) > 9 and sorted(made) == sorted(images)


def test_what_is_kept_for_requests_to_come_is_bounded(tmp_path: Path) -> None:
    images = [keep(noise((20, 20), i), tmp_path) for i in range(4)]
    most = sum(len(request_url(ref, LIMITS)) for ref in images[:2]) + 100

    async def send() -> int:
        own = sending.Sending(LIMITS, most)
        for ref in images:
            assert await own.url(ref) == request_url(ref, LIMITS)
        with pytest.raises(DataError):
            await own.url(ImageRef("gone.png", ""))
        return sum(map(len, own._kept.values()))

    assert 0 < asyncio.run(send()) <= most


def test_errors_hold_no_image(server: Server, teacher: RemoteTeacher, tmp_path: Path) -> None:
    ref = keep(noise((30, 30)), tmp_path)
    url = request_url(ref, LIMITS)
    server.control(always={"kind": "status", "status": 400, "body": f"cannot read '{url}' in the request, sorry"})
    (reply,) = teacher.complete([TeacherRequest((Message("user", "x"),), (1,), (ref,))], HOW)
    assert "cannot read '[data]' in the request, sorry" in reply.error and url[30:60] not in reply.error


@given(st.binary(min_size=60, max_size=600), st.text(max_size=20))
def test_base64_of_any_image_is_taken_out_of_texts(data: bytes, around: str) -> None:
    encoded = base64.b64encode(data).decode()
    said = Scrubber("").words(f"a {around} data:image/png;base64,{encoded} z", 10_000)
    assert encoded not in said and said.endswith("z")


# --- at the start of a run -------------------------------------------------------------------------------------------


def test_a_server_that_reads_images_is_asked_with_as_many_as_a_question_has(server: Server, teacher: RemoteTeacher) -> None:
    teacher.check_images(HOW, 3, "rollout")
    (request,) = server.log
    content: list[dict[str, Any]] = request["messages"][0]["content"]
    assert [part["type"] for part in content] == ["image_url"] * 3 + ["text"] and request["max_tokens"] == 16
    assert shown(PING_IMAGE)[1].size == (64, 64)


def test_a_server_that_refuses_images_is_said_at_the_start(server: Server, teacher: RemoteTeacher) -> None:
    server.control({"kind": "status", "status": 400, "body": "tiny is not a multimodal model"})
    with pytest.raises(TeacherError) as caught:
        teacher.check_images(HOW, 2, "rollout")
    assert str(caught.value) == (
        f"teacher.rollout: questions have up to 2 image(s), and 'tiny' at {server.url} refuses them ({server.url}: status 400: tiny is "
        "not a multimodal model). Name a vision-language model in teacher.model, let the server take as many (`--limit-mm-per-prompt` of "
        "vLLM), or leave the questions with images out"
    )


def test_a_server_that_is_down_is_passed_over(teacher: RemoteTeacher, server: Server) -> None:
    server.control(always={"kind": "drop"})
    teacher.check_images(HOW, 1)
