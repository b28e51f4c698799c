"""Where images stand in a conversation; files of images: checked, decoded the same way everywhere, kept."""

from __future__ import annotations

import hashlib
import io
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pictures import bomb, noise, picture
from zppo.core.parts import TurnParts, message_parts
from zppo.core.types import IMAGE, ImageRef, Message
from zppo.errors import DataError, StorageError
from zppo.images.store import cache_folder, check_whole, decode, header_of, keep, open_image, read_bytes, reference

A, B = ImageRef("a.png", "0a"), ImageRef("b.png", "0b")


# Where images stand.


def test_images_stand_at_their_markers_in_order() -> None:
    messages = (Message("user", f"{IMAGE}left, {IMAGE}"), Message("assistant", "yes"), Message("user", f"and {IMAGE}?"))
    assert message_parts(messages, (A, B, A)) == [
        TurnParts("user", (A, "left, ", B)),
        TurnParts("assistant", ("yes",)),
        TurnParts("user", ("and ", A, "?")),
    ]


def test_without_a_marker_images_stand_before_the_last_users_turn() -> None:
    messages = (Message("system", "s"), Message("user", "first"), Message("assistant", "x"), Message("user", "last"))
    turns = message_parts(messages, (A, B))
    assert [turn.parts for turn in turns] == [("s",), ("first",), ("x",), (A, B, "last")]
    assert message_parts((Message("user", ""),), (A,)) == [TurnParts("user", (A,))]


def test_without_images_a_marker_is_ordinary_text() -> None:
    assert message_parts((Message("user", f"what does {IMAGE} mean?"),), ()) == [TurnParts("user", (f"what does {IMAGE} mean?",))]


@pytest.mark.parametrize(("text", "images"), [(f"{IMAGE}{IMAGE}", (A,)), (IMAGE, (A, B))])
def test_another_number_of_markers_is_refused(text: str, images: tuple[ImageRef, ...]) -> None:
    with pytest.raises(DataError, match=rf"has {text.count(IMAGE)} <image> marker.*there are {len(images)} image"):
        message_parts((Message("user", text),), images)


def test_images_need_a_user_turn() -> None:
    with pytest.raises(DataError, match="no user turn"):
        message_parts((Message("system", "s"),), (A,))


@given(st.lists(st.lists(st.sampled_from([IMAGE, "a", "<", "image>", " "]), max_size=6).map("".join), min_size=1, max_size=4))
def test_parts_are_the_text_again_with_every_image_once(texts: list[str]) -> None:
    messages = tuple(Message("user", text) for text in texts)
    count = sum(text.count(IMAGE) for text in texts)
    images = tuple(ImageRef(str(i), "") for i in range(count))
    turns = message_parts(messages, images)
    assert ["".join(p if isinstance(p, str) else IMAGE for p in turn.parts) for turn in turns] == texts
    assert tuple(p for turn in turns for p in turn.parts if isinstance(p, ImageRef)) == images
    assert all(p != "" for turn in turns for p in turn.parts)


# References.


def test_a_reference_gives_back_the_bytes_of_its_file(tmp_path: Path) -> None:
    data = picture()
    (tmp_path / "a.png").write_bytes(data)
    ref = reference(tmp_path / "a.png")[0]
    assert ref == ImageRef(str(tmp_path / "a.png"), hashlib.sha256(data).hexdigest())
    assert read_bytes(ref) == data


def test_a_file_that_has_changed_or_is_gone_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(picture())
    ref = reference(path)[0]
    path.write_bytes(picture(colour=(0, 0, 255)))
    with pytest.raises(DataError, match="a.png is not the one that the questions were read with"):
        read_bytes(ref)
    path.unlink()
    with pytest.raises(DataError, match=r"a.png cannot be read \(No such file"):
        open_image(ref)


def test_kept_images_are_named_by_their_digest_and_written_once(tmp_path: Path) -> None:
    data = picture()
    ref = keep(data, tmp_path)
    assert Path(ref.uri).name == f"{ref.sha256}.png" and read_bytes(ref) == data
    written = Path(ref.uri).stat().st_mtime_ns
    assert keep(data, tmp_path) == ref and Path(ref.uri).stat().st_mtime_ns == written
    assert keep(picture(kind="JPEG"), tmp_path).uri.endswith(".jpeg")
    assert not list(tmp_path.rglob("*.partial"))


def test_a_kept_file_that_was_cut_is_written_again(tmp_path: Path) -> None:
    ref = keep(picture(), tmp_path)
    Path(ref.uri).write_bytes(b"")
    assert keep(picture(), tmp_path) == ref and read_bytes(ref) == picture()


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="ZPPO_CACHE"):
        keep(picture(), tmp_path / "file")


def test_the_cache_is_where_the_variables_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZPPO_CACHE", "/x/y")
    assert cache_folder() == Path("/x/y/images")
    monkeypatch.delenv("ZPPO_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/z")
    assert cache_folder() == Path("/z/zppo/images")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache/zppo/images"


# Pictures.


def pixel(data: bytes) -> tuple[int, ...]:
    image = decode(data, "x")
    assert image.mode == "RGB"
    return tuple(image.getpixel((0, 0)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (picture(), (255, 0, 0)),
        (picture(mode="L", colour=7), (7, 7, 7)),
        (picture(mode="1", colour=1), (255, 255, 255)),
        (picture(mode="RGBA", colour=(0, 0, 0, 0)), (255, 255, 255)),
        (picture(mode="LA", colour=(0, 0)), (255, 255, 255)),
        (picture(mode="P", colour=0, transparency=0), (255, 255, 255)),
        (picture(mode="RGB", colour=(1, 2, 3), transparency=(1, 2, 3)), (255, 255, 255)),
        (picture(mode="I;16", colour=0x8000), (128, 128, 128)),
        (picture(mode="I;16", colour=0xFFFF), (255, 255, 255)),
        (picture(mode="I", colour=0x4000, kind="TIFF"), (64, 64, 64)),
        (picture(mode="CMYK", colour=(0, 0, 0, 255), kind="TIFF"), (0, 0, 0)),
        (picture(mode="CMYK", colour=(0, 0, 0, 0), kind="JPEG"), (255, 255, 255)),
        (picture(kind="BMP"), (255, 0, 0)),
        (picture(kind="GIF"), (255, 0, 0)),
    ],
)
def test_every_kind_of_picture_becomes_rgb(data: bytes, expected: tuple[int, ...]) -> None:
    assert pixel(data) == expected


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_the_first_frame_of_several_is_the_picture(kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    out = io.BytesIO()
    frames[0].save(out, kind, save_all=True, append_images=frames[1:], **({"lossless": True} if kind == "WEBP" else {}))
    assert pixel(out.getvalue()) == (255, 0, 0)


def test_a_picture_stands_as_its_exif_data_says() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    data = picture((8, 6), exif=exif.tobytes())
    assert decode(data, "x").size == (6, 8)
    broken = picture((8, 6), exif=b"Exif\0\0MM\0*\0\0\xff\xff")
    assert decode(broken, "x").size == (8, 6)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "is empty"),
        (b"no image", "is no image that can be read"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "is no image that can be read"),
        (picture()[:20], "is no image that can be read"),
        (picture((64, 64), mode="RGB", colour=(9, 8, 7))[:-30], "is broken"),
        (picture((64, 64), kind="JPEG")[:-30], "is broken"),
        (bomb(1 << 14, 1 << 13), "too large"),
        (bomb(1 << 30, 1 << 30), "too large"),
        (picture((402, 2)), "longer side"),
        (picture(mode="F", colour=0.5, kind="TIFF"), "floating-point"),
    ],
)
def test_what_is_no_usable_picture_is_refused_with_its_name(data: bytes, why: str) -> None:
    with pytest.raises(DataError, match=f"(?s)the image here.png .*{why}"):
        decode(data, "here.png")


@settings(max_examples=150, deadline=None)
@given(st.sampled_from([picture((16, 16), kind=k) for k in ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF")]), st.data())
def test_damaged_files_give_a_picture_or_a_data_error(data: bytes, draw: st.DataObject) -> None:
    damaged = bytearray(data)
    for place in draw.draw(st.lists(st.integers(0, len(data) - 1), max_size=6)):
        damaged[place] = draw.draw(st.integers(0, 255))
    damaged = damaged[: draw.draw(st.integers(0, len(data)))] if draw.draw(st.booleans()) else damaged
    try:
        header_of(bytes(damaged), "x")
        assert decode(bytes(damaged), "x").mode == "RGB"
    except DataError as error:
        assert str(error).startswith("the image x ")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"])
def test_files_that_were_cut_are_found_without_decoding_whole_ones(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = noise((32, 32), kind=kind)
    with pytest.raises(DataError, match="the image x is "):
        check_whole(data[: len(data) // 2], "x")
    check_whole(data + b"\0" * 3, "x")  # something behind the end does no harm
    monkeypatch.setattr("zppo.images.store.decode", lambda *_: pytest.fail("decoded"))
    if kind not in ("BMP", "TIFF"):
        check_whole(data, "x")


def test_a_pipe_is_no_image(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(DataError, match=r"pipe.png cannot be read \(it is no file\)"):
        reference(tmp_path / "pipe.png")
