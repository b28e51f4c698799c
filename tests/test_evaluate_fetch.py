"""Bringing clips: what comes from the hub is unpacked, hostile archives are not, and what must be fetched by hand is said."""

from __future__ import annotations

import fnmatch
import io
import json
import shutil
import stat
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pytest
from rich.console import Console

from zppo import cli
from zppo.errors import DataError, SettingsError, StorageError, UnavailableError
from zppo.evals.benchmark_rows import load_items
from zppo.evals.clips.archives import ArchiveLimits, unpack
from zppo.evals.clips.fetch import fetch_clips
from zppo.evals.registry import BENCHMARKS, find

Files = dict[str, bytes]


def zipped(path: Path, files: Files) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as out:
        for name, data in files.items():
            out.writestr(name, data)
    return path


def below(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file() or path.is_symlink()}


# --- archives -------------------------------------------------------------------------------------------------------------


def test_an_archive_is_unpacked_with_its_folders_and_nothing_but_media(tmp_path: Path) -> None:
    files = {"Art/a.mp4": b"a" * 5, "subtitle/x.srt": b"1", "tvqa/c/1.jpg": b"j", "Art/run.py": b"x", "__MACOSX/Art/._a.mp4": b"m",
             ".hidden.mp4": b"h", "./Art/b.MP4": b"b"}  # fmt: skip
    archive = zipped(tmp_path / "Art.zip", files)
    assert unpack(archive, tmp_path / "out") == 4
    assert below(tmp_path / "out") == {"Art/a.mp4", "subtitle/x.srt", "tvqa/c/1.jpg", "Art/b.MP4"}
    assert (tmp_path / "out" / "Art" / "a.mp4").read_bytes() == b"aaaaa"


@pytest.mark.parametrize("ending", ["tar", "tar.gz", "tgz"])
def test_tar_archives_too(ending: str, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / f"a.{ending}", "w:gz" if ending != "tar" else "w") as out:
        for name in ("Art/a.mp4", "Art/b.mp4"):
            info = tarfile.TarInfo(name)
            info.size = 4
            out.addfile(info, io.BytesIO(name[-5:-1].encode()))
    assert unpack(tmp_path / f"a.{ending}", tmp_path / "out") == 2
    assert (tmp_path / "out" / "Art" / "b.mp4").read_bytes() == b"b.mp"


def test_what_is_there_is_not_written_again(tmp_path: Path) -> None:
    archive = zipped(tmp_path / "a.zip", {"a.mp4": b"new", "b.mp4": b"bb"})
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a.mp4").write_bytes(b"old")  # of the same size
    (tmp_path / "out" / "b.mp4").write_bytes(b"half of a call that ended")
    assert unpack(archive, tmp_path / "out") == 2
    assert [(tmp_path / "out" / f"{name}.mp4").read_bytes() for name in "ab"] == [b"old", b"bb"]


@pytest.mark.parametrize("name", ["../x.mp4", "a/../../x.mp4", "/x.mp4", "..\\x.mp4", "C:/x.mp4", "a/..\\..\\x.mp4"])
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_an_entry_that_leads_out_of_the_folder_stops_the_archive(kind: str, name: str, tmp_path: Path) -> None:
    archive = tmp_path / f"a.{kind}"
    if kind == "zip":
        zipped(archive, {name: b"x"})
    else:
        with tarfile.open(archive, "w") as out:
            info = tarfile.TarInfo(name)
            info.size = 1
            out.addfile(info, io.BytesIO(b"x"))
    with pytest.raises(DataError, match="which leads out of the folder; it is no archive of clips"):
        unpack(archive, tmp_path / "in" / "out")
    assert below(tmp_path) == {archive.name}


def test_links_of_an_archive_are_left_out_and_links_of_the_folder_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "else").mkdir()
    archive = tmp_path / "a.tar"
    with tarfile.open(archive, "w") as out:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
            info = tarfile.TarInfo("evil.mp4")
            info.type, info.linkname = kind, "../else/x.mp4"
            out.addfile(info)
        info = tarfile.TarInfo("Art")
        info.type, info.linkname = tarfile.SYMTYPE, str(tmp_path / "else")
        out.addfile(info)
        info = tarfile.TarInfo("Art/x.mp4")
        info.size = 1
        out.addfile(info, io.BytesIO(b"x"))
    assert unpack(archive, tmp_path / "out") == 1
    assert below(tmp_path / "out") == {"Art/x.mp4"} and not below(tmp_path / "else")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as packed:
        link = zipfile.ZipInfo("evil.mp4")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        packed.writestr(link, "../else/x.mp4")
    assert unpack(tmp_path / "a.zip", tmp_path / "out") == 0
    shutil.rmtree(tmp_path / "out" / "Art")
    (tmp_path / "out" / "Art").symlink_to(tmp_path / "else")
    with pytest.raises(DataError, match="through a link there; remove the link"):
        unpack(archive, tmp_path / "out")
    assert not below(tmp_path / "else")


def lying(path: Path) -> Path:
    """A zip whose headers say that its file has 10 bytes."""
    size = 1 << 20
    data = zipped(path, {"a.mp4": b"0" * size}).read_bytes()
    path.write_bytes(data.replace(size.to_bytes(4, "little"), (10).to_bytes(4, "little")))
    return path


def many(path: Path) -> Path:
    return zipped(path, {f"{number}.mp4": b"" for number in range(30)})


def deep(path: Path) -> Path:
    with tarfile.open(path, "w:gz") as out:
        info = tarfile.TarInfo("a.mp4")
        info.size = 1 << 20
        out.addfile(info, io.BytesIO(b"0" * info.size))
    return path


@pytest.mark.parametrize(
    ("make", "name", "message"),
    [
        (lambda path: zipped(path, {"a.mp4": b"0" * (1 << 20)}), "a.zip", "unpacks to more than [0-9,]+ bytes, which no archive"),
        (lambda path: zipped(path, {f"{n}.mp4": b"0" * 9000 for n in range(20)}), "a.zip", "unpacks to more than"),
        (deep, "a.tar.gz", "unpacks to more than"),
        (lying, "a.zip", "cannot be unpacked|unpacks to more"),
        (many, "a.zip", "has more than 20 entries; it is no archive of clips"),
    ],
)  # fmt: skip
def test_a_bomb_is_not_unpacked(make: Callable[[Path], Path], name: str, message: str, tmp_path: Path) -> None:
    """Whatever its headers say: what is written is counted."""
    limits = ArchiveLimits(files=20, ratio=20.0, floor=1 << 16)
    with pytest.raises(DataError, match=message):
        unpack(make(tmp_path / name), tmp_path / "out", limits)
    assert sum((tmp_path / "out" / each).stat().st_size for each in below(tmp_path / "out")) <= 1 << 16
    assert not any(each.endswith(".part") for each in below(tmp_path / "out"))


@pytest.mark.parametrize("data", [b"", b"no archive", b"PK\x03\x04" + b"x" * 100, b"\x1f\x8b" + b"x" * 100])
def test_a_broken_archive_says_so(data: bytes, tmp_path: Path) -> None:
    archive = tmp_path / "a.zip"
    archive.write_bytes(data)
    with pytest.raises(DataError, match=r"a\.zip cannot be unpacked .*; remove it, and fetch it again"):
        unpack(archive, tmp_path / "out")
    whole = zipped(tmp_path / "b.zip", {"a.mp4": bytes(range(256)) * 64}).read_bytes()
    (tmp_path / "b.zip").write_bytes(whole.replace(whole[60:70], b"y" * 10, 1))
    with pytest.raises(DataError, match="cannot be unpacked"):
        unpack(tmp_path / "b.zip", tmp_path / "out")
    assert below(tmp_path / "out") == set()


def test_a_folder_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "out").write_bytes(b"a file")
    with pytest.raises(StorageError, match="cannot be written"):
        unpack(zipped(tmp_path / "a.zip", {"a.mp4": b"x"}), tmp_path / "out")


# --- from the hub ------------------------------------------------------------------------------------------------------------


class Downloads:
    """Stands for the downloads of `huggingface_hub`: sets are folders here. Everything behind it is real."""

    def __init__(self, root: Path) -> None:
        self.root, self.asked = root, []  # type: ignore[var-annotated]

    def files(self, name: str, *, revision: str | None, repo_type: str) -> list[str]:
        assert repo_type == "dataset"
        folder = self.root / name / (revision or "main")
        if not folder.is_dir():
            raise PermissionError("401 Client Error: Access to this dataset is restricted")
        return sorted(below(folder))

    def one(self, name: str, file: str, *, repo_type: str, revision: str | None, local_dir: Path) -> str:
        self.asked.append(file)
        place = local_dir / file
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(self.root / name / (revision or "main") / file, place)
        return str(place)

    def all(self, name: str, *, allow_patterns: list[str], ignore_patterns: list[str], **where: Any) -> str:
        for file in self.files(name, revision=where["revision"], repo_type="dataset"):
            fits = any(fnmatch.fnmatch(file, pattern) for pattern in allow_patterns)
            if fits and not any(fnmatch.fnmatch(file, pattern) for pattern in ignore_patterns):
                self.one(name, file, **where)
        return str(where["local_dir"])


@pytest.fixture
def downloads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Downloads]:
    made = Downloads(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda self, name, **where: made.files(name, **where))
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda self, name, revision=None: None)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", made.one)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", made.all)
    yield made


def hub_rows(monkeypatch: pytest.MonkeyPatch, rows: Callable[[str, str | None], list[dict[str, Any]]]) -> None:
    def load(name: str, config: str | None, *, split: str, revision: str | None) -> datasets.Dataset:
        return datasets.Dataset.from_list(rows(name, config))

    monkeypatch.setattr(datasets, "load_dataset", load)


def fetched(names: list[str], folder: Path) -> str:
    console = Console(file=io.StringIO(), width=1000)
    fetch_clips(names, folder, console)
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def test_archives_are_brought_one_by_one_unpacked_and_removed(
    downloads: Downloads, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = downloads.root / "lmms-lab" / "VideoMMMU" / "main"
    for field, subject in {"Art": "Music", "Science": "Math", "Business": "Finance", "Engineering": "Electronics", "Medicine": "Pharmacy",
                           "Humanities": "History"}.items():  # fmt: skip
        zipped(place / f"{field}.zip", {f"{field}/validation_{subject}_1.mp4": subject.encode(), f"__MACOSX/{field}/._x.mp4": b"x"})
    zipped(place / "question_only_videos.zip", {"question_only/x.mp4": b"x"})
    row = {"question": "?", "options": ["a", "b"], "answer": "A", "question_type": "multiple-choice"}
    hub_rows(monkeypatch, lambda name, config: [{**row, "id": f"validation_{subject}_1"} for subject in ("Music", "Math", "History")])
    clips = tmp_path / "clips"
    said = fetched(["VMMMU"], clips)
    assert "VMMMU: all 9 questions have their clips; evaluate with --clips" in said and "its terms must be accepted" in said
    assert {name for name in below(clips) if not name.startswith(".")} == {
        f"{field}/validation_{subject}_1.mp4"
        for field, subject in (("Art", "Music"), ("Science", "Math"), ("Business", "Finance"), ("Engineering", "Electronics"),
                               ("Medicine", "Pharmacy"), ("Humanities", "History"))
    }  # fmt: skip
    assert [item.video for item in load_items(find("VMMMU"), clips=clips).items][:2] == [
        clips / "Art" / "validation_Music_1.mp4", clips / "Science" / "validation_Math_1.mp4"
    ]  # fmt: skip
    assert len(downloads.asked) == 6
    fetched(["VMMMU"], clips)
    assert len(downloads.asked) == 6  # nothing again


def test_a_call_goes_on_where_the_last_one_ended(downloads: Downloads, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = downloads.root / "lmms-lab" / "Video-MME" / "main"
    zipped(place / "subtitle.zip", {"subtitle/abc.srt": b"1\n00:00:01,000 --> 00:00:02,000\nHello.\n"})
    (place / "videos_chunked_01.zip").write_bytes(b"broken")
    hub_rows(
        monkeypatch, lambda name, config: [{"videoID": "abc", "question_id": "1", "question": "?", "options": ["a", "b"], "answer": "A"}]
    )
    with pytest.raises(DataError, match=r"videos_chunked_01\.zip cannot be unpacked"):
        fetched(["VMMES"], tmp_path / "clips")
    zipped(place / "videos_chunked_01.zip", {"data/abc.mp4": b"clip"})
    assert "VMMES: all 1 questions have their clips" in fetched(["VMMES"], tmp_path / "clips")
    assert downloads.asked == ["subtitle.zip", "videos_chunked_01.zip", "videos_chunked_01.zip"]
    assert "all 1 questions" in fetched(["VMME"], tmp_path / "clips") and len(downloads.asked) == 3  # the same clips
    (item,) = load_items(find("VMMES"), clips=tmp_path / "clips").items
    assert "Hello." in item.messages[0].content


def test_what_an_owner_must_be_asked_for_is_not_brought_but_said(
    downloads: Downloads, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NTU RGB+D's clips are on MVBench's branch, against their licence; without them their questions are left out."""
    place = downloads.root / "OpenGVLab" / "MVBench" / "video"
    for name in ("star/Charades_segment/x.mp4", "nturgbd_convert/x.mp4", "json/action_sequence.json", "test.json"):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(b"clip")
    tasks = {"action_sequence": 30, "fine_grained_pose": 2}
    row = {"video": "x.mp4", "question": "?", "candidates": ["a", "b"], "answer": "a"}
    # A set of the hub has a row at least in each part; the other tasks have theirs in a folder that is there.
    hub_rows(monkeypatch, lambda name, config: [row | ({} if config in tasks else {"video": "y.mp4"})] * tasks.get(str(config), 1))
    for task in find("MVBench").source.configs:
        if task not in tasks:
            (tmp_path / "clips" / task).mkdir(parents=True)
            (tmp_path / "clips" / task / "y.mp4").write_bytes(b"clip")
    said = fetched(["MVBench"], tmp_path / "clips")
    assert downloads.asked == ["star/Charades_segment/x.mp4"]
    assert "to be fetched by hand: the 200 clips of fine_grained_pose are NTU RGB+D's" in said and "nturgbd_convert/" in said
    assert "MVBench: 2 of 50 questions lack their clip; the first: MVBench: " in said
    (tmp_path / "clips" / "nturgbd_convert").mkdir()
    (tmp_path / "clips" / "nturgbd_convert" / "x.avi").write_bytes(b"clip")
    assert "all 50 questions have their clips" in fetched(["MVBench"], tmp_path / "clips")


def test_a_set_that_does_not_give_its_files_says_what_it_wants(downloads: Downloads, tmp_path: Path) -> None:
    with pytest.raises(
        UnavailableError, match=r"VMMMU: lmms-lab/VideoMMMU cannot be brought \(401 .*accept its terms at https://hugging.*hf auth"
    ):
        fetched(["VMMMU"], tmp_path / "clips")
    (downloads.root / "lmms-lab" / "VideoMMMU" / "main").mkdir(parents=True)
    with pytest.raises(UnavailableError, match=r"has none of Art\.zip, Business\.zip"):
        fetched(["VMMMU"], tmp_path / "clips")


def test_a_benchmark_whose_rows_are_all_there_is_needs_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = fetched(["AI2D", "GPQA-D"], tmp_path / "clips")
    assert "AI2D: nothing to bring" in said and "GPQA-D: nothing to bring" in said and "datasets/Idavidrein/gpqa, then run `hf auth" in said
    assert not (tmp_path / "clips").exists()
    with pytest.raises(SettingsError, match="there is no benchmark 'MMLUX'"):
        fetched(["MMLUX"], tmp_path)
    assert cli.main(["eval", "fetch"]) == 2
    assert "name the benchmarks whose clips shall be brought" in capsys.readouterr().err
    assert cli.main(["eval", "fetch", "AIME25", "--clips", str(tmp_path)]) == 0


def test_every_video_benchmark_can_be_fetched() -> None:
    assert {benchmark.name for benchmark in BENCHMARKS if benchmark.clips} == {b.name for b in BENCHMARKS if b.family == "video"}
    assert json.dumps([benchmark.clips.patterns for benchmark in BENCHMARKS if benchmark.clips])
