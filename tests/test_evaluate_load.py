"""Items from folders and from the hub; what cannot be had is said as such."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pytest
from PIL import Image

from evaluate_data import ROWS, items, write_data
from zppo.core.types import Message
from zppo.errors import DataError, UnavailableError
from zppo.evals.benchmark_rows import Outline, draw_items, load_items, unique
from zppo.evals.clips.places import MVBENCH
from zppo.evals.item import Item
from zppo.evals.media import ContentPart, chat_turns
from zppo.evals.registry import BENCHMARKS, find
from zppo.prompts import PromptBook


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("evaluate"))


@pytest.mark.parametrize("benchmark", BENCHMARKS, ids=lambda b: b.name)
def test_items_come_from_a_folder(benchmark: Any, folder: Path, tmp_path: Path) -> None:
    loaded = load_items(benchmark, folder, store=tmp_path)
    expected = items(benchmark, folder)
    assert [item.id for item in loaded.items] == [item.id for item in expected]
    assert (loaded.origin, loaded.revision) == (str(folder / f"{benchmark.name}.jsonl"), "")
    for item, same in zip(loaded.items, expected, strict=True):
        assert (item.messages, item.gold, item.facts) == (same.messages, same.gold, same.facts)
        assert all(isinstance(media, Path) and media.is_file() for media in (*item.images, *item.frames))


def test_pictures_that_come_as_bytes_are_stored_once(folder: Path, tmp_path: Path) -> None:
    for _ in range(2):
        image = load_items(find("HLE"), folder, store=tmp_path).items[1].images[0]
    assert isinstance(image, Path) and image.read_bytes().startswith(b"\x89PNG")
    assert len(list(tmp_path.iterdir())) == 1
    assert isinstance(load_items(find("HLE"), folder).items[1].images[0], bytes)


def test_parquet_is_read_too(folder: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (folder / "AI2D.jsonl").read_text().splitlines()]
    pictures = [{"bytes": (folder / row["image"]).read_bytes(), "path": None} for row in rows]
    table = [{**row, "image": picture} for row, picture in zip(rows, pictures, strict=True)]
    datasets.Dataset.from_list(table).to_parquet(tmp_path / "AI2D.parquet")
    loaded = load_items(find("AI2D"), tmp_path)
    assert [item.gold for item in loaded.items] == ["B", "A"]
    assert loaded.items[0].images == (pictures[0]["bytes"],)


def test_subtitles_are_read_beside_the_clips(folder: Path, tmp_path: Path) -> None:
    """And only for the benchmark with subtitles; a clip without them says so."""
    clips = write_data(tmp_path)
    (clips / "subtitle" / "fFjv93ACGo8.srt").write_text("1\n00:00:01,000 --> 00:00:02,000\nThree candles!\n")
    with_them = load_items(find("VMMES"), folder, clips=clips).items
    assert "Three candles!" in with_them[0].messages[0].content
    assert "no subtitles" in load_items(find("VMMES"), folder).items[0].messages[0].content
    assert "subtitles" not in load_items(find("VMME"), folder, clips=clips).items[0].messages[0].content


@pytest.mark.parametrize("empty", [True, False])
def test_without_any_subtitles_the_benchmark_with_them_is_unavailable(empty: bool, tmp_path: Path) -> None:
    """Else every question would say that its video has none."""
    clips = write_data(tmp_path)
    shutil.rmtree(clips / "subtitle")
    if empty:
        (clips / "subtitle").mkdir()
    with pytest.raises(UnavailableError, match=r"VMMES: there is no file .*subtitle/<videoID>\.srt; unpack the subtitles"):
        load_items(find("VMMES"), clips)
    assert load_items(find("VMME"), clips).items


def test_clips_are_found_wherever_they_were_unpacked(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "clips").symlink_to(folder / "clips")
    for place in ("star/Charades_v1_480", "video/tvqa/frames_fps3_hq"):  # clips that come as folders of pictures
        (tmp_path / place / "ZS9XR.mp4").mkdir(parents=True)
        for number in range(60):
            (tmp_path / place / "ZS9XR.mp4" / f"{number + 1:05d}.png").write_bytes(b"png")
    rows = [json.loads(line) for line in (folder / "MVBench.jsonl").read_text().splitlines()]

    def first(**fields: Any) -> Item:
        (tmp_path / "MVBench.jsonl").write_text(json.dumps({**rows[0], **fields}) + "\n" + json.dumps(rows[1]) + "\n")
        return load_items(find("MVBench"), tmp_path).items[0]

    def numbers(item: Item) -> list[int]:
        return [int(path.stem) for path in item.frames if isinstance(path, Path)]

    assert first(start=None).video is None and numbers(first(start=None)) == [*range(1, 61)]
    # A part of such a clip: by the rate of TVQA's frames, or the one that the row says; without one the row is left out.
    part: dict[str, Any] = {"start": 5.0, "end": 8.0}
    assert numbers(first(**part, _config="episodic_reasoning")) == [*range(16, 26)]
    assert numbers(first(**part, fps=2)) == [*range(11, 18)]
    assert numbers(first(start=50.0, end=55.0, fps=3)) == [60]
    assert first(**part).frames == (tmp_path / "clips" / "0.png", tmp_path / "clips" / "1.png", tmp_path / "clips" / "2.png")
    (reason,) = load_items(find("MVBench"), tmp_path).unreadable
    assert "(5.0 to 8.0 s) that is a folder of pictures; say how many a second in the field fps" in reason


@pytest.mark.parametrize("task", find("MVBench").source.configs)
def test_each_task_of_mvbench_has_its_folder(task: str, tmp_path: Path) -> None:
    """Clips of several tasks have one name; one of another task is never shown, wherever the folder was unpacked."""
    row = {"_config": task, "video": "video_10009.mp4", "question": "?", "candidates": ["a", "b"], "answer": "a"}
    (tmp_path / "MVBench.jsonl").write_text(json.dumps(row))
    for place in {each[0] for each in MVBENCH.values()} - set(MVBENCH[task]):
        (tmp_path / "data" / place).mkdir(parents=True)
        (tmp_path / "data" / place / "video_10009.mp4").write_bytes(place.encode())
    with pytest.raises(
        UnavailableError, match=r"MVBench: .*video_10009\.mp4 does not exist, nor is .* below .* in .*\(1 of 1 questions lack"
    ):
        load_items(find("MVBench"), tmp_path)
    for place in reversed((*MVBENCH[task], task)):  # the set's branch of plain files wins
        (tmp_path / "more" / place).mkdir(parents=True)
        (tmp_path / "more" / place / "video_10009.mp4").write_bytes(b"mine")
        assert load_items(find("MVBench"), tmp_path).items[0].video == tmp_path / "more" / place / "video_10009.mp4"


def test_ntu_clips_that_were_fetched_by_hand_are_found(tmp_path: Path) -> None:
    """Their owner has them as .avi; the set's own copies are .mp4."""
    row = {"_config": "fine_grained_pose", "video": "S001_rgb.mp4", "question": "?", "candidates": ["a", "b"], "answer": "a"}
    (tmp_path / "MVBench.jsonl").write_text(json.dumps(row))
    (tmp_path / "nturgbd_convert").mkdir()
    (tmp_path / "nturgbd_convert" / "S001_rgb.avi").write_bytes(b"clip")
    assert load_items(find("MVBench"), tmp_path).items[0].video == tmp_path / "nturgbd_convert" / "S001_rgb.avi"


def test_a_clip_of_another_folder_is_not_shown_for_its_name(tmp_path: Path) -> None:
    """MMVU numbers the clips of each discipline from 0."""
    url = "https://huggingface.co/datasets/yale-nlp/MMVU/resolve/main/videos/Art/0.mp4"
    row = {"id": "validation_0", "video": url, "question": "?", "question_type": "open-ended", "answer": "x"}
    (tmp_path / "MMVU.jsonl").write_text(json.dumps(row))
    (tmp_path / "videos" / "Biology").mkdir(parents=True)
    (tmp_path / "videos" / "Biology" / "0.mp4").write_bytes(b"clip")
    with pytest.raises(
        UnavailableError, match=r"MMVU: .*nor is there a file of its name below .* in videos/Art or Art;.*zppo eval fetch MMVU"
    ):
        load_items(find("MMVU"), tmp_path)
    (tmp_path / "part" / "Art").mkdir(parents=True)
    (tmp_path / "part" / "Art" / "0.mp4").write_bytes(b"clip")
    assert load_items(find("MMVU"), tmp_path).items[0].video == tmp_path / "part" / "Art" / "0.mp4"


def test_a_missing_clip_and_one_of_two_names_are_rows_that_are_left_out_up_to_a_share(tmp_path: Path) -> None:
    """199 of 200 there is no reason to skip a benchmark. More than a tenth, rounded up, is."""
    row = {"_config": "Perception", "question": "?", "options": ["a", "b"], "answer": "A", "question_type": "multiple-choice"}
    ids = [f"validation_Art_{number}" for number in range(1, 201)]
    (tmp_path / "VMMMU.jsonl").write_text("".join(json.dumps({**row, "id": name}) + "\n" for name in ids))
    (tmp_path / "Art").mkdir()
    for name in ids[1:]:
        (tmp_path / "Art" / f"{name}.mp4").write_bytes(b"clip")
    loaded = load_items(find("VMMMU"), tmp_path)
    assert len(loaded.items) == 199 and not loaded.unreadable
    (why,) = loaded.missing
    assert re.match(
        r"VMMMU: .*Art/validation_Art_1\.mp4 does not exist, nor is there a file of its name below .*zppo eval fetch VMMMU", why
    )
    for copy in ("a", "b"):
        (tmp_path / copy).mkdir()
        (tmp_path / copy / f"{ids[0]}.mp4").write_bytes(b"clip")
    assert "2 files below" in load_items(find("VMMMU"), tmp_path).missing[0]
    for name in ids[1:20]:
        (tmp_path / "Art" / f"{name}.mp4").unlink()
    assert len(load_items(find("VMMMU"), tmp_path).missing) == 20
    (tmp_path / "Art" / f"{ids[20]}.mp4").unlink()
    with pytest.raises(UnavailableError, match=r"^VMMMU: .*\(21 of 200 questions lack their clip or picture\)$"):
        load_items(find("VMMMU"), tmp_path)


def test_parts_that_are_cut_already_are_shown_whole(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "clips").symlink_to(folder / "clips")
    for name, clip in (("Charades_v1_480", (11.1, 19.6)), ("Charades_segment", None)):
        (tmp_path / name / "star" / name).mkdir(parents=True)
        (tmp_path / name / "clips").symlink_to(folder / "clips")
        (tmp_path / name / "star" / name / "ZS9XR.mp4").write_bytes(b"clip")
        assert load_items(find("MVBench"), folder, clips=tmp_path / name).items[0].clip == clip


@pytest.mark.parametrize(
    ("name", "clips", "message"),
    [
        ("AI2D", None, r"AI2D: .* has none of AI2D\.jsonl, AI2D\.parquet, AI2D\.json"),
        ("VMME", None, r"VMME: .*fFjv93ACGo8\.mp4 does not exist, nor is there a file of its name below"),
    ],
)
def test_what_a_folder_lacks_is_unavailable(name: str, clips: Path | None, message: str, folder: Path, tmp_path: Path) -> None:
    if name != "AI2D":
        (tmp_path / f"{name}.jsonl").write_text((folder / f"{name}.jsonl").read_text())
    with pytest.raises(UnavailableError, match=message):
        load_items(find(name), tmp_path, clips=clips)


def test_data_of_another_benchmark_is_not_scored_zero(folder: Path, tmp_path: Path) -> None:
    lines = (folder / "OCREN.jsonl").read_text().splitlines()
    (tmp_path / "OCRZH.jsonl").write_text(lines[0] + "\n")  # English only
    with pytest.raises(UnavailableError, match="holds no question of the benchmark"):
        load_items(find("OCRZH"), tmp_path)


def test_many_rows_that_cannot_be_read_stop_a_benchmark_and_few_are_left_out(folder: Path, tmp_path: Path) -> None:
    """One in a hundred, rounded up."""
    good, bad = (folder / "MMLU.jsonl").read_text(), '{"question": "?", "choices": ["a", " "], "answer": 0}\n'
    path = tmp_path / "MMLU.jsonl"
    path.write_text(bad + good)
    loaded = load_items(find("MMLU"), tmp_path)
    assert [item.gold for item in loaded.items] == ["B", "D"]
    assert loaded.unreadable == ("MMLU, row 1, field 'choices': is blank; a text is expected",)
    path.write_text(bad + good + bad)
    with pytest.raises(DataError, match=r"^MMLU, row 1, field 'choices': is blank.*\(2 of 4 rows cannot be read\)$") as caught:
        load_items(find("MMLU"), tmp_path)
    assert not isinstance(caught.value, UnavailableError)
    path.write_text(bad + good * 50 + bad)  # 2 of 102
    assert len(load_items(find("MMLU"), tmp_path).unreadable) == 2
    for nothing in (bad, "[1]\n"):
        path.write_text(nothing)
        with pytest.raises(DataError):
            load_items(find("MMLU"), tmp_path)


def test_a_limit_keeps_groups_whole(folder: Path) -> None:
    """DynaMath: both variants of a seed question or none."""
    (one, two) = (item.id for item in load_items(find("DynaM"), folder, limit=3).items)
    assert one.partition("/")[0] == two.partition("/")[0] and one != two
    assert len(load_items(find("WeMath"), folder, limit=1).items) == 3  # one group at least
    assert draw_items([], 3, "MMLU") == frozenset()


def test_a_limit_is_spread_over_configurations_and_tasks(tmp_path: Path) -> None:
    """MMLU's rows stand subject by subject: five of them are one of each of five subjects, and the same whatever the order is."""
    (template, *_) = (json.loads(line) for line in (ROWS / "MMLU.jsonl").read_text().splitlines())
    subjects = [f"subject_{number}" for number in range(8)]
    lines = [json.dumps({**template, "subject": s, "question": f"{s}, question {n:02}?"}) for s in subjects for n in range(20)]
    (tmp_path / "MMLU.jsonl").write_text("\n".join(lines))

    def drawn(limit: int) -> list[str]:
        loaded = load_items(find("MMLU"), tmp_path, limit=limit).items
        return [item.messages[0].content.partition("?")[0] for item in loaded]

    assert len({text.partition(",")[0] for text in drawn(5)}) == 5
    per_subject = Counter(text.partition(",")[0] for text in drawn(20))
    assert len(drawn(20)) == 20 and set(per_subject.values()) == {2, 3} and len(per_subject) == 8
    assert set(drawn(5)) < set(drawn(20)) and {text[-2:] for text in drawn(20)} != {"00", "01", "02"}
    assert sorted(drawn(20)) == drawn(20)  # asked in the order of the data
    assert len(drawn(1000)) == 160


def test_a_draw_hangs_on_names_alone() -> None:
    """Not on the order of the rows; a large part does not drive out a small one."""
    outlines = [Outline(f"a{n}", f"a{n}", "a") for n in range(100)] + [Outline(f"b{n}", f"b{n}", "b") for n in range(3)]
    taken = draw_items(outlines, 10, "X")
    assert taken == draw_items(outlines[::-1], 10, "X") != draw_items(outlines, 10, "Y")
    assert sum(name.startswith("b") for name in taken) == 3 and len(taken) == 10


@pytest.mark.parametrize("name", ["CharXiv", "MMMUPro", "CEval", "MultiCh"])
def test_every_kind_of_part_is_drawn_from(name: str, folder: Path) -> None:
    """Reasoning and descriptive questions, configurations, subjects, axes: two items are of two parts."""
    loaded = load_items(find(name), folder, limit=2).items
    parts = [item.facts.get("part") or item.facts.get("config") or item.facts.get("subject") or item.facts.get("axis") for item in loaded]
    assert len(set(parts)) == 2


def test_pictures_of_what_is_not_drawn_are_not_kept(folder: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (ROWS / "AI2D.jsonl").read_text().splitlines()]
    pictures = [base64.b64encode((folder / "images" / f"{name}.png").read_bytes()).decode() for name in ("red", "blue")]
    lines = [json.dumps({**row, "image": picture}) for row, picture in zip(rows, pictures, strict=True)]
    (tmp_path / "AI2D.jsonl").write_text("\n".join(lines))
    (item,) = load_items(find("AI2D"), tmp_path, store=tmp_path / "store", limit=1).items
    assert list((tmp_path / "store").iterdir()) == list(item.images)


def test_ids_that_stand_twice_are_told_apart() -> None:
    item, counts = items(find("MMLU"))[0], Counter[str]()
    assert [unique(item, counts).id for _ in range(3)] == [item.id, f"{item.id}~2", f"{item.id}~3"]


def test_the_last_frame_of_a_clip_is_shown_and_the_picture_of_a_question_after_the_frames(tmp_path: Path) -> None:
    """Video-MMMU asks about a picture, and about a quiz that only the end of a clip shows; the file says that it lasts longer."""
    import av

    def grey(part: ContentPart) -> int:
        shown = Image.open(io.BytesIO(base64.b64decode(part.value.partition(",")[2]))).convert("L")
        return int(shown.getpixel((shown.width // 2, shown.height // 2)))  # type: ignore[arg-type]

    with av.open(str(tmp_path / "clip.mp4"), "w") as out:
        stream = out.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 64
        for number in range(20):
            frame = av.VideoFrame.from_image(Image.new("RGB", (64, 64), (255 if number == 19 else 8 * number,) * 3))
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    Image.new("RGB", (40, 40), "white").save(tmp_path / "own.png")
    item = Item(
        "1", "VMMMU", (Message("user", "See <image> here."),), "A", "text", video=tmp_path / "clip.mp4", images=(tmp_path / "own.png",)
    )
    (turn,) = chat_turns(item, PromptBook(), store=tmp_path, as_file=False, frames=4)
    assert [part.kind for part in turn.parts] == ["image"] * 4 + ["text", "image", "text"]
    shades = [grey(part) for part in turn.parts[:4]]
    assert shades == sorted(shades) and shades[0] < 16 and shades[2] < 150 and shades[3] > 240
    (turn,) = chat_turns(replace(item, clip=(0.0, 1.0)), PromptBook(), store=tmp_path, as_file=True, frames=2)
    assert [grey(part) < 120 for part in turn.parts[:2]] == [True, True]  # a part does not reach the clip's end


# The hub, without a network: `load_dataset` gives what it is told to.


class Hub:
    """Stands for `datasets.load_dataset`; remembers what it was asked for."""

    def __init__(self, parts: dict[tuple[str | None, str], list[dict[str, Any]]]) -> None:
        self.parts, self.asked = parts, []  # type: ignore[var-annotated]

    def __call__(self, name: str, config: str | None, *, split: str, revision: str | None) -> datasets.Dataset:
        self.asked.append((name, config, split, revision))
        return datasets.Dataset.from_list(self.parts[config, split])


class Info:
    sha = "c0ffee"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Any:
    def make(parts: dict[tuple[str | None, str], list[dict[str, Any]]]) -> Hub:
        made = Hub(parts)
        monkeypatch.setattr(datasets, "load_dataset", made)
        monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda self, name, revision=None: Info())
        return made

    return make


def test_all_parts_of_a_set_are_asked_for_at_the_known_revision(hub: Any) -> None:
    mmlu = find("MMLU")
    made = hub({("all", "test"): [{"question": "2+2?", "subject": "maths", "choices": ["3", "4"], "answer": 1}]})
    loaded = load_items(mmlu)
    assert made.asked == [("cais/mmlu", "all", "test", mmlu.source.revision)] and mmlu.source.revision
    assert (loaded.origin, loaded.revision) == ("cais/mmlu", "c0ffee")
    assert loaded.items[0].id == "maths-1"


def test_splits_and_configurations_reach_the_adapter(hub: Any) -> None:
    row = {"id": "7", "question": "?", "decoded_image": b"png", "ground_truth": "1", "answer_type": "float"}
    made = hub({(None, f"sample_variant{i}"): [row] for i in range(1, 11)})
    loaded = load_items(find("DynaM"))
    assert [item.id for item in loaded.items] == [f"7/{i}" for i in range(1, 11)]
    assert len(made.asked) == 10
    hub({(name, "test"): [{"question": "?", "answer": 7}] for name in ("AIME2025-I", "AIME2025-II")})
    assert [item.id for item in load_items(find("AIME25")).items] == ["AIME2025-I-1", "AIME2025-II-2"]


def test_pictures_of_the_hub_come_as_bytes(hub: Any, folder: Path) -> None:
    part = [{"question": "?", "options": ["a", "b"], "answer": "0", "image": str(folder / "images" / "red.png")}]
    made = hub({})
    features = datasets.Features(
        {"question": datasets.Value("string"), "options": datasets.List(datasets.Value("string")), "answer": datasets.Value("string"),
         "image": datasets.Image()}
    )  # fmt: skip
    made.parts = {(None, "test"): part}
    import unittest.mock

    with unittest.mock.patch.object(datasets, "load_dataset", lambda *a, **k: datasets.Dataset.from_list(part, features=features)):
        (item,) = load_items(find("AI2D")).items
    assert item.images in ((folder / "images" / "red.png",), ((folder / "images" / "red.png").read_bytes(),))


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("MMLU", ConnectionError("no route"), r"MMLU: cais/mmlu, configuration all, split test, cannot be loaded \(no route\)"),
        ("GPQA-D", PermissionError("401"), "it is gated: accept its terms at https://huggingface.co/datasets/Idavidrein/gpqa"),
    ],
)  # fmt: skip
def test_a_set_that_cannot_be_reached_is_unavailable(name: str, error: Exception, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", fails)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", fails)
    with pytest.raises(UnavailableError, match=message):
        load_items(find(name))


def test_a_copy_is_read_where_the_set_itself_cannot_be_had(hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """And its origin is written down; of a set that can be had in part nothing is mixed with a copy."""
    row = {"id": "7", "problem": "?", "question": "?", "answer": 7}
    made = hub({(name, "test"): [row] for name in ("AIME2025-I", None)})  # AIME2025-II is missing
    aime = find("AIME25")
    loaded = load_items(aime)
    assert (loaded.origin, len(loaded.items)) == ("math-ai/aime25", 1)
    assert [name for name, *_ in made.asked] == ["opencompass/AIME2025"] * 2 + ["math-ai/aime25"]
    assert made.asked[-1][-1] == aime.also[0].revision
    made.parts = {}
    with pytest.raises(UnavailableError, match=r"AIME25: opencompass/AIME2025, .*, nor can math-ai/aime25; see https://hu"):
        load_items(aime)


def test_a_copy_is_read_where_the_rows_of_the_set_cannot_be(hub: Any) -> None:
    """A set may change its form; the first one's trouble is said where no copy helps."""
    turns = [{"role": "user", "content": "Hi"}]
    row = {"QUESTION_ID": "1", "AXIS": "a", "CONVERSATION": turns, "TARGET_QUESTION": "?", "PASS_CRITERIA": "YES"}
    made = hub({(None, "test"): [{"question_id": "1", "axis": "a", "turns": "Hi"}] * 3, (None, "train"): [row]})
    loaded = load_items(find("MultiCh"))
    assert (loaded.origin, [item.id for item in loaded.items]) == ("nmayorga7/multichallenge", ["1"])
    del made.parts[None, "train"]
    with pytest.raises(DataError, match=r"MultiCh, row 1, field 'conversation': missing.*\(3 of 3 rows cannot be read\)"):
        load_items(find("MultiCh"))


def test_another_split_of_a_set_is_tried_like_a_copy(hub: Any) -> None:
    """VisualPuzzles: `train` in loaders, `test` on a newer card."""
    made = hub({(None, "test"): [{"question": "?", "options": None, "answer": "A", "image": b"png"}]})
    assert load_items(find("VisP")).origin == "neulab/VisualPuzzles"
    assert [(name, split) for name, _, split, _ in made.asked] == [("neulab/VisualPuzzles", "train"), ("neulab/VisualPuzzles", "test")]
    made.parts = {}
    with pytest.raises(UnavailableError, match=r"split train, cannot be loaded .*, nor can neulab/VisualPuzzles \(split test\); see"):
        load_items(find("VisP"))


def test_the_clips_of_mvbench_are_those_of_its_branch_of_clips(hub: Any, tmp_path: Path) -> None:
    row = {"video": "ZS9XR.mp4", "question": "?", "candidates": ["a", "b"], "answer": "a"}
    made = hub({(task, "train"): [row] for task in find("MVBench").source.configs})
    for task in find("MVBench").source.configs:
        (tmp_path / MVBENCH[task][0]).mkdir(parents=True, exist_ok=True)
        (tmp_path / MVBENCH[task][0] / "ZS9XR.mp4").write_bytes(b"clip")
    assert [item.video for item in load_items(find("MVBench"), clips=tmp_path).items] == [
        tmp_path / MVBENCH[task][0] / "ZS9XR.mp4" for task in find("MVBench").source.configs
    ]
    assert {revision for *_, revision in made.asked} == {"video"}


def test_clips_of_the_hub_must_be_unpacked_by_hand() -> None:
    with pytest.raises(UnavailableError, match=r"MVBench: its clips are .*datasets/OpenGVLab/MVBench; .* zppo eval fetch MVBench"):
        load_items(find("MVBench"))


def test_a_folder_of_the_sets_name_is_not_read_by_mistake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cais" / "mmlu").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UnavailableError, match="would be read instead"):
        load_items(find("MMLU"))


def test_item_is_frozen() -> None:
    item: Item = items(find("MMLU"))[0]
    with pytest.raises(AttributeError):
        item.gold = "B"  # type: ignore[misc]
