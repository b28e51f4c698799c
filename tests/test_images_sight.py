"""Pictures on their way into a prompt: sizes, placeholders, templates, the cache, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from conftest import make_tiny
from seeing import KINDS, PIXELS, make_picture, make_seeing
from zppo.core.types import ImageRef, Message
from zppo.engines.chat import Chat
from zppo.errors import DataError, ModelError
from zppo.images import processor as sight_module
from zppo.images.processor import PixelCache
from zppo.images.store import PixelLimits, fit, fitted_size, open_image, shown_size

LIMITS = PixelLimits(**PIXELS)


@given(st.integers(1, 3000), st.integers(1, 3000))
def test_a_fitted_size_is_within_the_limits_and_keeps_the_aspect(width: int, height: int) -> None:
    limits = PixelLimits(10_000, 40_000)
    w, h = fitted_size(width, height, limits)
    if 10_000 <= width * height <= 40_000:
        assert (w, h) == (width, height)
    elif width * height > 40_000:
        assert (w * h <= 40_000 or min(w, h) == 1) and (w + 1) * (h + 1) >= 40_000
    else:
        assert 10_000 <= w * h < 10_000 + w + h
    aspect = width / height  # of a size that is less than a pixel off on each side
    assert (w - 1) / (h + 1) <= aspect <= (w + 1) / max(h - 1, 1e-9) or min(w, h) == 1


def test_the_paper_s_limits_are_the_default() -> None:
    assert PixelLimits() == (256 * 32 * 32, 1280 * 32 * 32)
    small = Image.new("RGB", (10, 20))
    assert fit(small, PixelLimits(1, 1000)) is small
    assert fit(small, PixelLimits(800, 1000)).size == (20, 40)


def test_the_shown_size_is_that_of_the_opened_picture(tmp_path: Path) -> None:
    image, exif = Image.new("RGB", (30, 20), "red"), Image.Exif()
    exif[0x0112] = 6  # turn it by 90 degrees
    image.save(tmp_path / "turned.jpg", exif=exif)
    image.save(tmp_path / "plain.png")
    for name, size in (("turned.jpg", (20, 30)), ("plain.png", (30, 20))):
        path = tmp_path / name
        ref = ImageRef(str(path), __import__("hashlib").sha256(path.read_bytes()).hexdigest())
        assert shown_size(ref) == open_image(ref).size == size


def test_the_cache_is_bounded_and_forgets_all_but_the_pinned() -> None:
    cache, made = PixelCache(most_bytes=1000), list[str]()

    def get(name: str, numbers: int = 100) -> None:
        cache.get((name, ""), lambda: made.append(name) or {"x": torch.zeros(numbers)})  # type: ignore[func-returns-value]

    for name in ("a", "b", "a", "c", "a"):  # 400 bytes each: the third drives out the least recently used one
        get(name)
    assert made == ["a", "b", "c"] and cache.held_bytes == 800
    get("big", 10_000)
    assert cache.held_bytes == 40_000
    cache.pin({"a"})
    get("a")
    get("d")
    cache.clear()
    assert cache.held_bytes == 400
    made.clear()
    get("a")
    get("d")
    assert made == ["d"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("sight")
    for kind in KINDS:
        make_seeing(made / kind, kind)
    return made


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_holds_one_id_for_every_feature(kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Known from sizes alone, without decoding, and what the processor itself puts there; the ids are those of the text."""
    chat = Chat.load(str(folder / kind), images=LIMITS)
    image_processor = chat.image_processor
    assert image_processor is not None
    pictures = [make_picture(folder, 1, 20, 16), make_picture(folder, 2, 60, 24), make_picture(folder, 3, 12, 50)]
    monkeypatch.setattr(sight_module, "open_image", lambda ref: pytest.fail("decoded"))
    places = [image_processor.placeholder(ref) for ref in pictures]
    messages = [Message("system", "Look."), Message("user", "<image> and <image>, then <image>"), Message("assistant", "ok")]
    ids = chat.encode([*messages, Message("user", "And?")], pictures)
    monkeypatch.undo()
    assert sum(i in image_processor.image_ids for i in ids) == sum(p.features for p in places)
    for ref, place in zip(pictures, places, strict=True):
        made = image_processor._process(open_image(ref))
        assert image_processor.processor.replace_image_token(made, 0) == place.text
    shown = chat.show(ids)
    start = 0
    for text in (places[0].text, " and ", places[1].text, ", then ", places[2].text, "And?"):
        start = shown.index(text, start) + len(text)


def test_what_stands_for_a_size_is_found_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A blank picture is preprocessed for it where the processor cannot count; equal texts are held once."""
    image_processor = Chat.load(str(folder / "gemma3"), images=LIMITS).image_processor
    assert image_processor is not None
    made = list[tuple[int, int]]()
    monkeypatch.setattr(image_processor, "_limits_itself", True)  # no two sizes become one
    monkeypatch.setattr(
        image_processor,
        "_of_blank",
        lambda *size: made.append(size) or sight_module.Placeholder(f"<{size[0] % 2}>", 1),  # type: ignore[func-returns-value]
    )
    found = [image_processor._placeholder_of(width, 16) for _ in range(2) for width in range(2000)]
    assert len(made) == 2000 and len({id(place) for place in found}) == 2


def test_pictures_without_markers_come_first_and_text_keeps_its_markers(folder: Path) -> None:
    chat = Chat.load(str(folder / "qwen3_vl"), images=LIMITS)
    ref, shown = make_picture(folder, 1), Chat.show
    with_it = shown(chat, chat.encode([Message("user", "What?")], [ref]))
    assert with_it.startswith("<|im_start|>user\n<|vision_start|><|image_pad|>") and with_it.count("What?") == 1
    assert "the mark <image> here" in shown(chat, chat.encode([Message("user", "the mark <image> here")]))
    with pytest.raises(DataError, match="2 <image> marker"):
        chat.encode([Message("user", "<image> <image>")], [ref])


@pytest.mark.parametrize(("kind", "token"), [("qwen3_vl", "<|image_pad|>"), ("smolvlm", "<image>"), ("gemma3", "<image_soft_token>")])
def test_a_question_that_writes_the_model_s_own_token_is_refused(kind: str, token: str, folder: Path) -> None:
    chat = Chat.load(str(folder / kind), images=LIMITS)
    for images in ((), (make_picture(folder, 1),)):
        text = f"what is {token}?" if token != "<image>" or not images else "what is <image><image>?"
        with pytest.raises(DataError):
            chat.encode([Message("user", text)], images)


def test_images_are_decoded_once_for_all_who_see_alike(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, cache = list[str](), PixelCache()
    monkeypatch.setattr(sight_module, "open_image", lambda ref: opened.append(ref.uri) or open_image(ref))  # type: ignore[func-returns-value]
    ref = make_picture(folder, 1)
    chats = [Chat.load(str(folder / kind), images=LIMITS, cache=cache) for kind in ("qwen3_vl", "qwen3_5", "smolvlm")]
    seen = [chat.image_processor.pixels(ref) for chat in chats if chat.image_processor is not None]
    assert seen[0] is seen[1] and seen[1] is not seen[2] and len(opened) == 2
    chats[0].new_step()
    assert chats[1].image_processor is not None and chats[1].image_processor.pixels(ref) is not seen[0]
    other = Chat.load(str(folder / "qwen3_vl"), images=PixelLimits(300, 4000), cache=cache).image_processor
    assert other is not None and chats[0].image_processor is not None and not chats[0].image_processor.same_as(other)
    assert other.pixels(make_picture(folder, 9, 64, 64))["pixel_values"].shape[0] > 100  # of 16 pixels each, beyond LIMITS


def broken(folder: Path, kind: str, how: str) -> Path:
    path = make_seeing(folder / f"{kind}-{how}", kind)
    if how == "no processor":
        (path / "preprocessor_config.json").unlink()
    elif how == "unknown processor":
        (path / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": "NoSuchProcessor"}))
    elif how == "text template":
        (path / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    return path


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("no processor", "cannot be shown images: .*preprocessor_config"),
        ("unknown processor", "cannot be shown images: Unrecognized image processor"),
        ("text template", "does not show images as '<.image_pad.>'"),
    ],
)
def test_what_cannot_see_is_refused_with_the_reason(how: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=said):
        Chat.load(str(broken(tmp_path, "qwen2_5_vl", how)), images=LIMITS)


def test_a_model_of_text_cannot_be_shown_images(tmp_path: Path, folder: Path) -> None:
    name = str(make_tiny(tmp_path / "text"))
    with pytest.raises(ModelError, match="cannot be shown images"):
        Chat.load(name, images=LIMITS)
    with pytest.raises(ModelError, match=r"the conversation has 1 image\(s\), and .* reads text only"):
        Chat.load(name).encode([Message("user", "?")], [make_picture(folder, 1)])


def test_a_recipe_s_own_template_wins(folder: Path) -> None:
    template = "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}"
    template += "{{ '<|image_pad|>' if p.type == 'image' else p.text }}{% endfor %}{% endif %}{% endfor %}A:"
    chat = Chat.load(str(folder / "qwen3_vl"), template=template, images=LIMITS)
    args: dict[str, Any] = {"a": 1}
    for made in (chat, chat.with_arguments(args)):
        assert made.render([Message("user", "x<image>y")], [ImageRef("", "")]) == "x<|image_pad|>yA:"
