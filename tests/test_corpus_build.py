"""How a corpus is built: kills and resumes, the hub, memory, and what is said where it cannot be."""

from __future__ import annotations

import json
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import datasets
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from corpus_sources import MMFR_SCHEMA, both, coloured, mmfr_row, vero_row, write_mmfr, write_vero
from victims import FILES, Victims
from zppo import cli
from zppo.data.corpora.build import BuildDisplay, build_corpus
from zppo.data.corpora.build_manifest import CorpusManifest
from zppo.data.corpora.draw_state import STATE
from zppo.data.corpora.mapping import CorpusMapping, mapping_text, read_mapping
from zppo.errors import DataError, StorageError

MAPPING = read_mapping("zppo-77k")


def files_of(out: Path) -> dict[str, bytes]:
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def command(out: Path, vero: Path, mmfr: Path, *more: object) -> list[str]:
    return ["data", "build", "zppo-77k", f"--out={out}", f"--vero={vero}", f"--mmfinereason={mmfr}", *map(str, more)]


@pytest.fixture(scope="module")
def crowded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Copies in which the draw drops many rows, a mapping with low caps, and rows that do not fit among them."""
    folder = tmp_path_factory.mktemp("crowded")
    vero = {"stem-tqa": [vero_row("tqa", i) for i in range(700)], "stem-ai2d_merged": [vero_row("ai2d_merged", i % 40) for i in range(60)]}
    mmfr = [mmfr_row("MMR1", i, pass_rate=(i % 4) / 4) for i in range(1300)]
    mapping = folder / "mapping.yaml"
    mapping.write_text(mapping_text("zppo-77k").replace("{1: 2800, 2: 1400}", "{1: 100, 2: 50}"), encoding="utf-8")
    return write_vero(folder / "vero", vero), write_mmfr(folder / "mmfr", mmfr, 1), mapping


@pytest.fixture(scope="module")
def uninterrupted(crowded: tuple[Path, Path, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    vero, mmfr, mapping = crowded
    out = tmp_path_factory.mktemp("whole") / "out"
    assert cli.main(command(out, vero, mmfr, f"--mapping={mapping}")) == 0
    found = files_of(out)
    assert {"train.parquet", "manifest.json", "README.md"} < set(found) and len(found) > 200
    return found


PLACES = [
    ("opening", "zppo.data.corpora.draw_state:DrawState.keep_fact", 1),
    ("the files are listed", "zppo.data.corpora.shards:_shard", 2),
    ("a picture is written", "zppo.data.corpora.build:keep", 5),
    ("a commit", "zppo.data.corpora.draw_state:DrawState.commit", 1),
    ("the next commit", "zppo.data.corpora.draw_state:DrawState.commit", 2),
    ("between a commit and the removal of pictures", "zppo.data.corpora.draw_state:DrawState.refers_to", 20),
    ("the draw", "zppo.data.corpora.draw_state:DrawState.add", 150),
    ("cleaning", "zppo.data.corpora.build:_Build._clean", 1),
    ("cleaning, further on", "zppo.data.corpora.draw_state:DrawState.refers_to", 200),
    ("the rows", "zppo.data.corpora.build:_write_rows", 1),
    ("the card", "zppo.data.corpora.build:write_text", 1),
    ("the manifest", "zppo.data.corpora.build:write_text", 2),
]


@pytest.mark.slow
@pytest.mark.long
def test_a_build_killed_at_every_place(
    victims: Victims, crowded: tuple[Path, Path, Path], uninterrupted: dict[str, bytes], tmp_path: Path
) -> None:
    """One build, killed at every place of the list, one after the other: every file of it is as if nothing had happened."""
    vero, mmfr, mapping = crowded
    out = tmp_path / "out"
    for name, at, nth in PLACES:
        status = victims.run(*command(out, vero, mmfr, f"--mapping={mapping}"), run=out, at=at, nth=nth)
        assert status == -signal.SIGKILL, f"{name}: {victims.said}"
        assert not (out / "manifest.json").exists()
    last: dict[str, Any] = {"at": "zppo.data.corpora.draw_state:DrawState.remove"}  # by now it is done, and only the state is left
    assert victims.run(*command(out, vero, mmfr, f"--mapping={mapping}"), run=out, **last) == -signal.SIGKILL
    assert set(files_of(out)) > set(uninterrupted)
    assert victims.run(*command(out, vero, mmfr, f"--mapping={mapping}"), run=out) == 0, victims.said
    assert files_of(out) == uninterrupted


@pytest.mark.slow
@pytest.mark.long
def test_a_build_killed_at_random(
    victims: Victims, crowded: tuple[Path, Path, Path], uninterrupted: dict[str, bytes], tmp_path: Path
) -> None:
    """At random operations on files, again and again, until it comes to its end."""
    vero, mmfr, mapping = crowded
    rng, out, kills = random.Random(5), tmp_path / "out", 0
    for _ in range(8):
        status = victims.run(*command(out, vero, mmfr, f"--mapping={mapping}"), run=out, at=FILES, nth=rng.randrange(1, 900))
        kills += status == -signal.SIGKILL
        if status == 0:
            break
    assert kills >= 2
    assert victims.run(*command(out, vero, mmfr, f"--mapping={mapping}"), run=out) == 0, victims.said
    assert files_of(out) == uninterrupted


@pytest.mark.slow
def test_a_stop_in_the_middle_of_a_file_goes_on_from_there(
    crowded: tuple[Path, Path, Path], uninterrupted: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vero, mmfr, mapping = crowded
    out, seen = tmp_path / "out", []

    def stop(done: int, total: int) -> None:
        assert total == 700 + 60 + 1300
        seen.append(done)
        if done > 1500:
            raise KeyboardInterrupt

    folders = {"vero": vero, "mmfinereason": mmfr}
    with pytest.raises(KeyboardInterrupt):
        build_corpus(read_mapping("", mapping), out, folders, display=BuildDisplay(step=stop))
    assert not (out / "train.parquet").exists()
    again: list[int] = []
    build_corpus(read_mapping("", mapping), out, folders, display=BuildDisplay(step=lambda done, total: again.append(done)))
    assert again[-1] == 2060 and min(step for step in again if step > 760) > 1200, "rows before the last commit are not read again"
    assert files_of(out) == uninterrupted


@pytest.mark.slow
def test_done_is_done(crowded: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same command prints the table again and reads nothing; another mapping is refused."""
    vero, mmfr, mapping = crowded
    out = tmp_path / "out"
    assert cli.main(command(out, vero, mmfr, f"--mapping={mapping}")) == 0
    first, files = capsys.readouterr().out, files_of(out)
    assert cli.main(command(out, tmp_path / "gone", tmp_path / "gone", f"--mapping={mapping}")) == 0
    assert capsys.readouterr().out.splitlines()[-5:] == first.splitlines()[-5:] and files_of(out) == files
    assert cli.main(command(out, vero, mmfr)) == 2
    assert "holds a corpus that was built with another mapping or tokenizer" in capsys.readouterr().err


def test_what_a_build_was_begun_with_is_kept_to(crowded: tuple[Path, Path, Path], tmp_path: Path) -> None:
    vero, mmfr, mapping = crowded
    out = tmp_path / "out"

    def stop(done: int, total: int) -> None:
        if done > 800:
            raise KeyboardInterrupt

    own = read_mapping("", mapping)
    with pytest.raises(KeyboardInterrupt):
        build_corpus(own, out, {"vero": vero, "mmfinereason": mmfr}, display=BuildDisplay(step=stop))
    with pytest.raises(DataError, match="was begun there with another mapping or tokenizer"):
        build_corpus(MAPPING, out, {"vero": vero, "mmfinereason": mmfr})
    other = write_mmfr(tmp_path / "other", [mmfr_row("MMR1", 1)], 1)
    with pytest.raises(DataError, match="was begun there with other files of mmfinereason"):
        build_corpus(own, out, {"vero": vero, "mmfinereason": other})


@pytest.mark.slow
def test_two_builds_in_one_folder(crowded: tuple[Path, Path, Path], tmp_path: Path) -> None:
    vero, mmfr, mapping = crowded
    out, refused = tmp_path / "out", []

    def second(done: int, total: int) -> None:
        if not refused:
            code = "import sys; from zppo.cli import main; sys.exit(main(sys.argv[1:]))"
            found = subprocess.run(
                [sys.executable, "-c", code, *command(out, vero, mmfr, f"--mapping={mapping}")], capture_output=True, text=True, check=False
            )
            refused.append((found.returncode, found.stderr))

    build_corpus(read_mapping("", mapping), out, {"vero": vero, "mmfinereason": mmfr}, display=BuildDisplay(step=second))
    assert refused[0][0] == 2 and "another process builds a corpus there" in refused[0][1]


def heavy(number: int, size: int) -> bytes:
    """A small picture in a file of `size` bytes more: in a chunk of its own, which no reader looks at."""
    whole, body = coloured(number), random.Random(number).randbytes(size)
    chunk = struct.pack(">I", size) + b"prVt" + body + struct.pack(">I", zlib.crc32(b"prVt" + body))
    return whole[:-12] + chunk + whole[-12:]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak of memory from /proc")
@pytest.mark.long
def test_memory_does_not_grow_with_a_set(tmp_path: Path) -> None:
    """12,000 rows with 0.3 GB of pictures in one row group, as a careless export writes them: the build stays far below."""
    rows, size = 12_000, 25_000
    folder = tmp_path / "mmfr"
    folder.mkdir()
    parts = ([mmfr_row("MMR1", i, image=heavy(i, size)) for i in range(n, n + 1000)] for n in range(0, rows, 1000))
    table = pa.concat_tables(pa.Table.from_pylist(part, MMFR_SCHEMA) for part in parts)
    pq.write_table(table, folder / "train.parquet", row_group_size=rows, compression="none")
    del table
    vero = write_vero(tmp_path / "vero", {"stem-tqa": [vero_row("tqa", 1)]})
    code = (
        "import re, sys\nfrom zppo.cli import main\nstatus = main(sys.argv[1:])\n"
        "print(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1], status)"
    )
    arguments = [sys.executable, "-c", code, *command(tmp_path / "out", vero, folder)]
    found = subprocess.run(arguments, capture_output=True, text=True, check=True)
    peak, status = map(int, found.stdout.splitlines()[-1].split())
    assert status == 0 and (folder / "train.parquet").stat().st_size > 2.9e8
    assert peak < 450 << 10, f"{peak >> 10} MB"
    assert CorpusManifest.read(tmp_path / "out" / "manifest.json").rows == 2801


# --- the hub --------------------------------------------------------------------------------------------------------

COMMIT = "c0ffee" * 6 + "abcd"


class MadeUpHub:
    """Both sets as repositories: what was listed, looked at and downloaded."""

    def __init__(self, folders: dict[str, Path]) -> None:
        self.folders, self.fetched, self.revisions, self.fails = folders, [], [], ""  # type: ignore[var-annotated]

    def dataset_info(self, name: str, revision: str | None = None) -> Any:
        self.revisions.append(revision)
        paths = sorted(p for p in self.folders[name].rglob("*") if p.is_file())
        siblings = [SimpleNamespace(rfilename=p.relative_to(self.folders[name]).as_posix()) for p in paths]
        return SimpleNamespace(sha=COMMIT, siblings=[*siblings, SimpleNamespace(rfilename="README.md")])

    def open(self, path: str, mode: str, block_size: int) -> BinaryIO:
        name, _, rest = path.removeprefix("datasets/").partition(f"@{COMMIT}/")
        return open(self.folders[name] / rest, "rb")

    def download(self, name: str, path: str, revision: str, repo_type: str, local_dir: Path) -> str:
        assert (revision, repo_type) == (COMMIT, "dataset")
        if self.fails and self.fails in path:
            raise ConnectionError("the line is dead")
        assert not list(local_dir.rglob("*.parquet")), "one file at a time lies on the disk"
        self.fetched.append(path)
        (local_dir / path).parent.mkdir(parents=True, exist_ok=True)
        return str(shutil.copy(self.folders[name] / path, local_dir / path))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MadeUpHub]:
    vero, mmfr = both(tmp_path / "hub", each=2)
    made = MadeUpHub({MAPPING.sources["vero"].repository: vero, MAPPING.sources["mmfinereason"].repository: mmfr})
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda self, name, revision=None: made.dataset_info(name, revision))
    monkeypatch.setattr(huggingface_hub, "HfFileSystem", lambda: made)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", made.download)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *args, **kwargs: None)
    yield made


def test_from_the_hub_file_by_file(hub: MadeUpHub, tmp_path: Path) -> None:
    """Equal to the build from copies; the files of sub-sets that are not wanted are never downloaded, nor those of other splits."""
    lines: list[str] = []
    manifest = build_corpus(MAPPING, tmp_path / "out", {}, display=BuildDisplay(say=lines.append))
    folders = dict(zip(("vero", "mmfinereason"), hub.folders.values(), strict=True))
    local = build_corpus(MAPPING, tmp_path / "local", folders)
    assert (tmp_path / "out" / "train.parquet").read_bytes() == (tmp_path / "local" / "train.parquet").read_bytes()
    assert manifest.subsets == local.subsets and manifest.unused == local.unused and manifest.dropped == local.dropped
    assert manifest.sources["vero"].revision == COMMIT and hub.revisions == ["main", "main"]
    assert len(hub.fetched) == 30 + 2 and not any("val-" in path or "reachqa" in path for path in hub.fetched)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["README.md", "images", "manifest.json", "train.parquet"]
    assert lines == [f"hub:{name}@{COMMIT[:12]}: {n} files" for name, n in zip(hub.folders, (39, 2), strict=True)]


def test_a_broken_line_goes_on_at_the_same_commit(hub: MadeUpHub, tmp_path: Path) -> None:
    hub.fails = "data/train-00001"
    with pytest.raises(DataError, match=r"train-00001-of-00002.parquet: cannot be downloaded .*the line is dead.*same command goes on"):
        build_corpus(MAPPING, tmp_path / "out", {})
    hub.fails, before = "", list(hub.fetched)
    hub.revisions.clear()
    manifest = build_corpus(MAPPING, tmp_path / "out", {})
    assert hub.revisions == [COMMIT, COMMIT], "main may have moved on meanwhile"
    assert hub.fetched[len(before) :] == ["data/train-00001-of-00002.parquet"] and manifest.rows == 82


def test_a_file_in_the_users_cache_is_not_downloaded(hub: MadeUpHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cached(name: str, path: str, revision: str, repo_type: str) -> str:
        return str(hub.folders[name] / path)

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", cached)
    assert build_corpus(MAPPING, tmp_path / "out", {}).rows == 82 and hub.fetched == []
    assert all(any(folder.rglob("*.parquet")) for folder in hub.folders.values())


def test_a_set_that_cannot_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: object, name: str, revision: str | None = None) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", refuse)
    with pytest.raises(DataError, match=r"hub:zlab-princeton/Vero-600k, revision 'main': cannot be had .*no route.*local copy"):
        build_corpus(MAPPING, tmp_path / "out", {})


# --- what cannot be -------------------------------------------------------------------------------------------------


def refused(tmp_path: Path, mapping: CorpusMapping = MAPPING, **folders: Path) -> str:
    with pytest.raises(DataError) as caught:
        build_corpus(mapping, tmp_path / "out", folders)
    return str(caught.value)


def test_a_missing_column_is_said_before_a_row_is_read(tmp_path: Path) -> None:
    vero, mmfr = both(tmp_path, each=1)
    last = mmfr / "data" / "train-00001-of-00002.parquet"
    pq.write_table(pq.read_table(last).drop_columns(["answer"]), last)
    said = refused(tmp_path, vero=vero, mmfinereason=mmfr)
    assert "data/train-00001-of-00002.parquet: has no column 'answer' (answer); it has source, id" in said and "--mapping" in said
    table = pq.read_table(vero / "stem-tqa" / "train-00000-of-00001.parquet")
    bare = pa.array([{"index": 1}], pa.struct([("index", pa.int64())]))
    pq.write_table(
        table.set_column(table.column_names.index("extra_info"), "extra_info", bare), vero / "stem-tqa" / "train-00000-of-00001.parquet"
    )
    said = refused(tmp_path, vero=vero, mmfinereason=mmfr)
    assert "has no column 'extra_info.question' (question)" in said


def test_a_copy_may_be_one_file(tmp_path: Path) -> None:
    vero, mmfr = both(tmp_path, each=1)
    one = mmfr / "data" / "train-00000-of-00002.parquet"
    manifest = build_corpus(MAPPING, tmp_path / "out", {"vero": vero, "mmfinereason": one})
    assert manifest.sources["mmfinereason"].files == 1 and manifest.sources["mmfinereason"].rows == 11


def test_datasets_reads_the_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its card: the pictures beside the rows make no set of pictures of it."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    vero, mmfr = both(tmp_path, each=1)
    build_corpus(MAPPING, tmp_path / "out", {"vero": vero, "mmfinereason": mmfr})
    loaded = datasets.load_dataset(str(tmp_path / "out"), split="train")
    assert len(loaded) == 41 and set(loaded[0]) >= {"id", "prompt", "answer", "images", "level", "grading"}


def test_columns_that_may_be_missing(tmp_path: Path) -> None:
    """Ids and kinds of answers are not needed."""
    vero, mmfr = both(tmp_path, each=1)
    for path in mmfr.rglob("*.parquet"):
        pq.write_table(pq.read_table(path).drop_columns(["id", "is_consistent", "original_answer"]), path)
    build_corpus(MAPPING, tmp_path / "out", {"vero": vero, "mmfinereason": mmfr})
    rows = pq.read_table(tmp_path / "out" / "train.parquet").to_pylist()
    assert {row["source_id"] for row in rows if row["source"] == "mmfinereason"} == {""} and len(rows) == 41


def test_folders_and_files_that_cannot_be_read(tmp_path: Path) -> None:
    vero, mmfr = both(tmp_path, each=1)
    assert "none: is no folder" in refused(tmp_path, vero=tmp_path / "none", mmfinereason=mmfr)
    (tmp_path / "empty").mkdir()
    assert "has no parquet files" in refused(tmp_path, vero=tmp_path / "empty", mmfinereason=mmfr)
    (mmfr / "data" / "train-x.parquet").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", encoding="utf-8")
    assert "git lfs pull" in refused(tmp_path, vero=vero, mmfinereason=mmfr)
    whole = (mmfr / "data" / "train-00000-of-00002.parquet").read_bytes()
    (mmfr / "data" / "train-x.parquet").write_bytes(whole[:-20])
    assert "train-x.parquet: cannot be read as parquet" in refused(tmp_path, vero=vero, mmfinereason=mmfr)
    (mmfr / "data" / "train-x.parquet").write_bytes(b"\xff" * 0 + whole[:200] + bytes(4000) + whole[4200:])
    assert "cannot be read as parquet" in refused(tmp_path, vero=vero, mmfinereason=mmfr)
    assert "'other' is no source of the mapping; it has vero, mmfinereason" in refused(tmp_path, other=vero)


def test_an_output_folder_that_cannot_be(tmp_path: Path) -> None:
    vero, mmfr = both(tmp_path, each=1)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep", encoding="utf-8")
    assert "out: is not empty; name a folder of its own" in refused(tmp_path, vero=vero, mmfinereason=mmfr)
    shutil.rmtree(tmp_path / "out")
    (tmp_path / "out").write_text("file", encoding="utf-8")
    assert "out: is a file" in refused(tmp_path, vero=vero, mmfinereason=mmfr)


def test_nothing_fits(tmp_path: Path) -> None:
    vero = write_vero(tmp_path / "vero", {"renamed": [vero_row("renamed_by_its_authors", 1)]})
    mmfr = write_mmfr(tmp_path / "mmfr", [mmfr_row("MMR1", 1, answer=None)], 1)
    said = refused(tmp_path, vero=vero, mmfinereason=mmfr)
    assert "1 rows of mmfinereason: no answer" in said and "unlisted are 'renamed_by_its_authors'" in said
    assert not (tmp_path / "out" / "train.parquet").exists()


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vero, mmfr = both(tmp_path, each=1)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)

    def full(done: int, total: int) -> None:
        if done > 20:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, limit[1]))

    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with pytest.raises(StorageError, match="cannot be written .*the same command goes on"):
            build_corpus(MAPPING, tmp_path / "out", {"vero": vero, "mmfinereason": mmfr}, display=BuildDisplay(step=full))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert build_corpus(MAPPING, tmp_path / "out", {"vero": vero, "mmfinereason": mmfr}).rows == 41


def test_damage_is_said(tmp_path: Path) -> None:
    vero, mmfr = both(tmp_path, each=1)
    out = tmp_path / "out"
    out.mkdir()
    (out / STATE).write_bytes(b"no database" * 100)
    assert "build.sqlite is damaged" in refused(tmp_path, vero=vero, mmfinereason=mmfr)
    shutil.rmtree(out)
    build_corpus(MAPPING, out, {"vero": vero, "mmfinereason": mmfr})
    (out / "train.parquet").unlink()
    assert "has a manifest.json and no train.parquet" in refused(tmp_path, vero=vero, mmfinereason=mmfr)
    (out / "manifest.json").write_text(json.dumps({"format": 1}), encoding="utf-8")
    assert "manifest.json is damaged" in refused(tmp_path, vero=vero, mmfinereason=mmfr)
