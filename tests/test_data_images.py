"""The images of questions: every form in which data sets have them, and what is said where one cannot be used."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pictures import bomb, noise, picture, save
from zppo.config.data_settings import ColumnSettings, DataSettings, ImageSettings
from zppo.core.parts import message_parts
from zppo.core.types import IMAGE, ImageRef, Message, Question
from zppo.data import rows as data_images
from zppo.data.load import load_questions
from zppo.data.local_files import SourceSettings
from zppo.data.rows import RowImages
from zppo.errors import DataError
from zppo.images.store import open_image, read_bytes

RED, BLUE = (255, 0, 0), (0, 0, 255)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ZPPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    return tmp_path / "cache" / "images"


def load(source: object, limit: int | None = None, streaming: bool = False, **columns: str) -> list[Question]:
    return load_questions(str(source), ColumnSettings(**columns), limit, SourceSettings(streaming=streaming))


def lines(folder: Path, *rows: Any) -> Path:
    path = folder / "q.jsonl"
    path.write_text("".join(json.dumps({"prompt": "p", "answer": "1"} | row) + "\n" for row in rows), encoding="utf-8")
    return path


def said(folder: Path, *rows: Any, **columns: Any) -> str:
    with pytest.raises(DataError) as caught:
        load(lines(folder, *rows), **columns)
    return str(caught.value)


def test_nobody_trains_blind_by_mistake(tmp_path: Path) -> None:
    """A column of images that is not read, or not there, is an error, unless the recipe says that there are to be none."""
    save(tmp_path / "a.png")
    held = {"bytes": base64.b64encode(picture()).decode(), "path": None}
    for row in ({"image": "a.png"}, {"figure": held}, {"figure": [held]}):
        [name] = row
        assert f"data.columns.images: {name}, or ''" in said(tmp_path, {}, row)
        assert not any(q.images for q in load(lines(tmp_path, {}, row), images=""))
        assert len(load(lines(tmp_path, {}, row), images=name)[1].images) == 1
    assert "no row has the column 'imagge'" in said(tmp_path, {"images": "a.png"}, images="imagge")
    text = lines(tmp_path, {"image": None}, {"image": ""})
    assert not any(q.images for q in load(text))  # nothing to see
    assert load_questions(str(text), ColumnSettings(images="figure"), None, SourceSettings(held_out=True))
    assert len(load(lines(tmp_path, {"images": "a.png", "image": "b"}))[0].images) == 1  # one of two is read
    kept = datasets.Dataset.from_list([{"prompt": "p", "answer": "1", "figure": {"bytes": picture(), "path": None}}])
    kept.cast_column("figure", datasets.Image()).save_to_disk(str(tmp_path / "kept"))
    with pytest.raises(DataError, match="'figure' seems to hold images"):
        load(tmp_path / "kept")
    assert [len(load(tmp_path / "kept", images=name)[0].images) for name in ("figure", "")] == [1, 0]
    datasets.Dataset.from_list([{"prompt": "p", "answer": "1", "image": "a.png"}]).save_to_disk(str(tmp_path / "paths"))
    with pytest.raises(DataError, match="'image' seems to hold images"):
        load(tmp_path / "paths")


def colours(question: Question) -> list[tuple[int, ...]]:
    return [open_image(ref).getpixel((0, 0)) for ref in question.images]  # type: ignore[misc]


def url(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


# --- files -----------------------------------------------------------------------------------------------------------


def test_none_one_and_several_in_one_file(tmp_path: Path) -> None:
    save(tmp_path / "in" / "a.png")
    save(tmp_path / "b.png", BLUE)
    absolute = str(tmp_path / "b.png")
    path = lines(
        tmp_path,
        {"images": "in/a.png"},
        {},
        {"images": None},
        {"images": []},
        {"images": ["in/a.png", absolute, "b.png"]},
        {"images": [f"file://{absolute}"]},
    )
    questions = load(path)
    assert [colours(q) for q in questions] == [[RED], [], [], [], [RED, BLUE, BLUE], [BLUE]]
    assert questions[4].images[1] == ImageRef(absolute, hashlib.sha256(picture(colour=BLUE)).hexdigest())


def test_bytes_of_any_form_are_kept_once_under_their_digest(tmp_path: Path, cache: Path) -> None:
    red, blue = picture(), picture(colour=BLUE)
    path = lines(
        tmp_path,
        {"images": url(red)},
        {"images": [{"bytes": base64.b64encode(blue).decode(), "path": "gone.png"}]},
        {"images": {"image_url": {"url": url(red)}}},
        {"images": [{"url": url(blue)}, {"image": url(red)}]},
    )
    questions = load(path)
    assert [colours(q) for q in questions] == [[RED], [BLUE], [RED], [BLUE, RED]]
    assert sorted(p.name for p in cache.rglob("*.*")) == sorted(f"{hashlib.sha256(d).hexdigest()}.png" for d in (red, blue))
    assert all(ref.uri.startswith(str(cache)) and read_bytes(ref) in (red, blue) for q in questions for ref in q.images)


def test_the_cache_is_where_the_recipe_says(tmp_path: Path) -> None:
    data = DataSettings(train="q.jsonl", images=ImageSettings(folder=tmp_path / "own"))
    path = lines(tmp_path, {"images": url(picture())})
    assert data.reading().image_cache == tmp_path / "own"
    [question] = load_questions(str(path), data.columns, None, data.reading())
    assert question.images[0].uri.startswith(f"{tmp_path}/own/")


def test_pil_images_become_files() -> None:
    grey = Image.new("LA", (4, 4), (0, 0))
    [ref] = RowImages().refer(grey, Path())
    assert open_image(ref).getpixel((0, 0)) == (255, 255, 255)


def test_parquet_as_datasets_writes_it(tmp_path: Path) -> None:
    rows = [
        {"prompt": "p", "answer": "1", "images": [{"bytes": picture(), "path": None}]},
        {"prompt": "q", "answer": "2", "images": []},
        {"prompt": "r", "answer": "3", "images": [{"bytes": picture(), "path": "a"}, {"bytes": picture(colour=BLUE), "path": "b"}]},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "q.parquet")
    assert [colours(q) for q in load(tmp_path / "q.parquet")] == [[RED], [], [RED, BLUE]]
    single = [{"prompt": "p", "answer": "1", "images": picture()}]
    pq.write_table(pa.Table.from_pylist(single), tmp_path / "s.parquet")
    assert [colours(q) for q in load(tmp_path / "s.parquet")] == [[RED]]


def test_tables_name_one_image_or_a_json_list(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    save(tmp_path / "b.png", BLUE)
    with (tmp_path / "q.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["prompt", "answer", "images"], ["p", "1", "a.png"], ["q", "2", ""], ["r", "3", '["a.png", "b.png"]']])
    assert [colours(q) for q in load(tmp_path / "q.csv")] == [[RED], [], [RED, BLUE]]


# --- sets of `datasets` ----------------------------------------------------------------------------------------------


def image_set() -> datasets.Dataset:
    rows = {
        "prompt": ["p", "q"],
        "answer": ["1", "2"],
        "images": [[{"bytes": picture(), "path": None}], [{"bytes": picture(colour=BLUE), "path": None}] * 2],
        "other": [{"bytes": b"broken", "path": None}] * 2,
    }
    features = {
        "prompt": datasets.Value("string"),
        "answer": datasets.Value("string"),
        "images": datasets.List(datasets.Image()),
        "other": datasets.Image(),
    }
    return datasets.Dataset.from_dict(rows, features=datasets.Features(features))


@pytest.fixture
def undecoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoding an image while data is read would be for nothing."""
    monkeypatch.setattr(datasets.Image, "decode_example", lambda *_, **__: pytest.fail("decoded"))


@pytest.mark.usefixtures("undecoded")
def test_image_features_of_a_saved_set(tmp_path: Path) -> None:
    image_set().save_to_disk(tmp_path / "set")
    assert [colours(q) for q in load(tmp_path / "set")] == [[RED], [BLUE, BLUE]]


@pytest.mark.usefixtures("undecoded")
@pytest.mark.parametrize("streaming", [False, True])
def test_image_features_of_the_hub(monkeypatch: pytest.MonkeyPatch, streaming: bool) -> None:
    made = image_set().to_iterable_dataset() if streaming else image_set()
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: made)
    questions = load("hub:owner/name", limit=1, streaming=streaming)
    assert [colours(q) for q in questions] == [[RED]]
    assert [colours(q) for q in load("hub:owner/name", limit=2, streaming=streaming)] == [[RED], [BLUE, BLUE]]


@pytest.mark.usefixtures("undecoded")
def test_images_in_messages_of_a_set(monkeypatch: pytest.MonkeyPatch) -> None:
    turn = {
        "role": "user",
        "content": [
            {"type": "text", "text": "what?", "image": None},
            {"type": "image", "text": None, "image": {"bytes": picture(), "path": None}},
        ],
    }
    part = {"type": datasets.Value("string"), "text": datasets.Value("string"), "image": datasets.Image()}
    features = {
        "messages": datasets.List({"role": datasets.Value("string"), "content": datasets.List(part)}),
        "answer": datasets.Value("string"),
    }
    made = datasets.Dataset.from_dict({"messages": [[turn]], "answer": ["1"]}, features=datasets.Features(features))
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: made)
    [question] = load("hub:owner/name")
    assert question.messages == (Message("user", f"what?{IMAGE}"),) and colours(question) == [RED]


def test_addresses_on_the_hub_are_read_by_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream of a folder of images gives addresses alone."""
    rows: dict[str, list[Any]] = {"prompt": ["p"], "answer": ["1"], "images": [{"bytes": None, "path": "hf://datasets/owner/name/a.png"}]}
    made = datasets.IterableDataset.from_generator(lambda: iter([{k: v[0] for k, v in rows.items()}]))
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: made)
    asked = []

    def xopen(path: str, mode: str) -> io.BytesIO:
        asked.append((path, mode))
        return io.BytesIO(picture(colour=BLUE))

    monkeypatch.setattr("datasets.utils.file_utils.xopen", xopen)
    assert [colours(q) for q in load("hub:owner/name", limit=1, streaming=True)] == [[BLUE]]
    assert asked == [("hf://datasets/owner/name/a.png", "rb")]


def test_a_folder_of_images_with_a_file_of_names(tmp_path: Path) -> None:
    top = tmp_path / "folder"
    save(top / "train" / "a.png")
    save(top / "train" / "b.png", BLUE)
    rows = [{"file_name": "a.png", "prompt": "p", "answer": "1"}, {"file_name": "b.png", "prompt": "q", "answer": "2"}]
    (top / "train" / "metadata.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    assert [colours(q) for q in load(top, images="file_name")] == [[RED], [BLUE]]


# --- how people write them -------------------------------------------------------------------------------------------


def test_verl(tmp_path: Path) -> None:
    row = {
        "prompt": [{"role": "user", "content": f"{IMAGE}How many?"}],
        "images": [{"bytes": picture(), "path": None}],
        "reward_model": {"style": "rule", "ground_truth": "3"},
        "extra_info": {"index": 7, "split": "train"},
    }
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "q.parquet")
    names: dict[str, Any] = {"messages": "prompt", "answer": "reward_model.ground_truth", "id": "extra_info.index"}
    [question] = load(tmp_path / "q.parquet", **names)
    assert (question.id, question.gold, colours(question)) == ("7", "3", [RED])
    assert [t.parts for t in message_parts(question.messages, question.images)] == [(question.images[0], "How many?")]


def test_trl(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    save(tmp_path / "b.png", BLUE)
    content = [{"type": "image"}, {"type": "text", "text": "or"}, {"type": "image"}, {"type": "text", "text": "?"}]
    row = {"prompt": [{"role": "user", "content": content}], "images": ["a.png", "b.png"], "solution": "1"}
    [question] = load(lines(tmp_path, row), messages="prompt", answer="solution")
    assert question.messages == (Message("user", f"{IMAGE}or{IMAGE}?"),) and colours(question) == [RED, BLUE]


def test_openai_and_qwen_parts_hold_their_images(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    content = [
        {"type": "image_url", "image_url": {"url": url(picture(colour=BLUE)), "detail": "low"}},
        {"type": "image", "image": "a.png"},
        {"type": "text", "text": "?"},
    ]
    turns = [{"role": "user", "content": content}]
    for more in ({}, {"images": ["a.png", "a.png"]}):
        [question] = load(lines(tmp_path, {"messages": turns, **more}))
        assert question.messages == (Message("user", f"{IMAGE}{IMAGE}?"),) and colours(question) == [BLUE, RED]


def test_llava(tmp_path: Path) -> None:
    save(tmp_path / "coco" / "a.png")
    turns = [
        {"from": "human", "value": f"{IMAGE}\nWhat is it?"},
        {"from": "gpt", "value": "A bird."},
        {"from": "human", "value": "How many?"},
        {"from": "gpt", "value": "2"},
    ]
    path = tmp_path / "llava.json"
    path.write_text(json.dumps([{"id": "000", "image": "coco/a.png", "conversations": turns}, {"id": "1", "conversations": turns[2:]}]))
    first, second = load(path, messages="conversations", images="image")
    assert [m.role for m in first.messages] == ["user", "assistant", "user"]
    assert (first.gold, colours(first), second.gold, second.images) == ("2", [RED], "2", ())
    assert message_parts(first.messages, first.images)[0].parts == (first.images[0], "\nWhat is it?")
    unknown = [{"from": "robot", "value": "?"}]
    assert "turn 1 is from 'robot'" in said(tmp_path, {"conversations": unknown}, messages="conversations")


# --- what cannot be used ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (["none.png"], "none.png cannot be read (No such file or directory)|written 'none.png'; paths are relative"),
        (["."], "cannot be read (it is no file)"),
        ([""], "holds str ''"),
        ([None], "holds null"),
        (5, "holds int 5; expected a path, bytes"),
        ([{"width": 3}], "holds an object without an image; expected one of the keys bytes, path"),
        (["https://example.org/a.png"], "is a web address, and nothing is downloaded|download it first"),
        (["data:image/png;base64,???"], "is no data: URL that can be read"),
        (["data:image/png"], "it has no comma"),
        (["data:image/png;base64,"], "is empty (0 bytes)"),
        (["data:text/plain,hello"], "is no image that can be read"),
        (["text.png"], "text.png is no image that can be read"),
        (["empty.png"], "empty.png is empty"),
        (["cut.png"], "cut.png is broken"),
        (["bomb.png"], "bomb.png is too large"),
        (["thin.png"], "thin.png has 402 x 2 pixels"),
    ],
)
def test_what_is_no_image_is_said_with_its_row(tmp_path: Path, images: Any, words: str) -> None:
    (tmp_path / "text.png").write_bytes(b"pixels")
    (tmp_path / "empty.png").touch()
    (tmp_path / "cut.png").write_bytes(noise((64, 64))[:-200])
    (tmp_path / "bomb.png").write_bytes(bomb(1 << 15, 1 << 15))
    (tmp_path / "thin.png").write_bytes(picture((402, 2)))
    text = said(tmp_path, {}, {"images": images})
    assert text.startswith(f"{tmp_path}/q.jsonl, row 2, column 'images': ")
    assert all(part in text for part in words.split("|")), text


def test_places_and_images_must_be_as_many(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    bare = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}]
    own = [{"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "?"}]}]
    both = [{"role": "user", "content": [*bare[0]["content"], *own[0]["content"]]}]  # type: ignore[misc]
    assert "has 2 <image> marker(s), and there are 1 image(s)" in said(tmp_path, {"prompt": IMAGE * 2, "images": ["a.png"]})
    assert "1 image part(s) without an image of their own; name the column" in said(tmp_path, {"messages": bare})
    assert "some image parts of the messages hold an image and others do not" in said(tmp_path, {"messages": both})
    assert "has 2 image(s), and the messages hold 1 of their own" in said(tmp_path, {"messages": own, "images": ["a.png"] * 2})
    assert load(lines(tmp_path, {"prompt": f"what is {IMAGE}?"}))[0].images == ()


def test_large_sets_are_checked_by_header_and_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first ones are decoded; behind them damage in the middle is found when the image is used, a cut file at once."""
    monkeypatch.setattr(data_images, "FULLY_CHECKED", 1)
    good, middle = noise((64, 64)), bytearray(noise((64, 64), seed=1))
    middle[len(middle) // 2] ^= 255
    (tmp_path / "a.png").write_bytes(good)
    (tmp_path / "b.png").write_bytes(middle)
    (tmp_path / "c.png").write_bytes(good[: len(good) // 2])
    assert "b.png is broken" in said(tmp_path, {"images": "b.png"})
    _, second = load(lines(tmp_path, {"images": "a.png"}, {"images": "b.png"}))
    with pytest.raises(DataError, match="b.png is broken"):
        open_image(second.images[0])
    assert "row 2, column 'images': the image" in said(tmp_path, {"images": "a.png"}, {"images": "c.png"})


def test_a_file_that_many_questions_share_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "a.png")
    path, read = lines(tmp_path, *({"images": "a.png"} for _ in range(5))), list[Path]()
    real = data_images.reference
    monkeypatch.setattr(data_images, "reference", lambda p: (read.append(p), real(p))[1])
    assert len({q.images for q in load(path)}) == 1 and len(read) == 1


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"])
def test_base64_without_a_head(tmp_path: Path, kind: str) -> None:
    data = noise((64, 64), kind=kind)
    text = base64.b64encode(data).decode()
    broken = "\n".join(text[i : i + 76] for i in range(0, len(text), 76))
    rows = [{"images": given} for given in (text, [text], broken, {"bytes": text}, {"url": text})]
    questions = load(lines(tmp_path, *rows))
    assert {read_bytes(q.images[0]) for q in questions} == {data}


@pytest.mark.parametrize(
    "given",
    ["A" * 60_000, base64.b64encode(b"no image" * 5000).decode(), "x" * 300, "~nobody-of-that-name/a.png", "file://[/a.png", "a\0b"],
)
def test_a_text_that_is_no_path_is_said_in_one_line(tmp_path: Path, given: str) -> None:
    text = said(tmp_path, {"images": given})
    assert "row 1, column 'images': the image " in text and len(text) < 600


def test_base64_of_a_small_image(tmp_path: Path) -> None:
    """One colour takes fewer characters than a file name may have; the alphabet of URLs is that of some tools."""
    for kind in ("PNG", "GIF", "WEBP", "JPEG"):
        data = picture((40, 40), kind=kind)
        text = base64.b64encode(data).decode()
        other = base64.urlsafe_b64encode(data).decode().rstrip("=")
        questions = load(lines(tmp_path, *({"images": given} for given in (text, [text], f"{text[:76]}\n{text[76:]}\n", other))))
        assert {read_bytes(q.images[0]) for q in questions} == {data}
    save(tmp_path / (name := "QkbeginsAsABitmapDoesAndIsTheNameOfAFile.png")).rename(tmp_path / (name := name.removesuffix(".png")))
    assert load(lines(tmp_path, {"images": name}))[0].images[0].uri.endswith(name)
    assert "cannot be read (No such file" in said(tmp_path, {"images": "QkbeginsAsABitmapDoesAndIsTheNameOfNoFile.png"})


def test_base64_that_is_cut(tmp_path: Path) -> None:
    text = said(tmp_path, {"images": base64.b64encode(noise((64, 64))).decode()[:-7]})
    assert "row 1, column 'images': the image " in text and "write data:image/png;base64" in text and len(text) < 600
