"""`zppo eval fetch`: brings the clips that a licence lets one bring, unpacks them, and says what must be fetched by hand."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from zppo.errors import DataError, SettingsError, StorageError, UnavailableError, one_line
from zppo.evals.benchmark import Benchmark, ClipFiles
from zppo.evals.benchmark_rows import load_items
from zppo.evals.clips.archives import is_archive, unpack
from zppo.evals.clips.places import look_again
from zppo.evals.registry import suite
from zppo.evals.view import say

FOLDER = Path("clips")
_DONE = ".unpacked"  # in the folder: a line for each archive that was unpacked and removed


def fetch_clips(names: Sequence[str], folder: Path, console: Console | None = None) -> None:
    """Bring the clips of benchmarks into a folder, in which each has the folders that its set has.

    What is there is not brought again. Archives are removed when they are unpacked.

    Args:
        names: benchmarks or suites.
        folder: to be named with --clips of `zppo eval`.

    Raises:
        SettingsError: no name, or an unknown one.
        UnavailableError: the hub does not give the files.
        DataError: an archive is none, or hostile.
        StorageError: the folder cannot be written.
    """
    console = console or Console()
    if not names:
        raise SettingsError(
            "name the benchmarks whose clips shall be brought, such as: zppo eval fetch VMMMU MVBench, or video for all five"
        )
    for benchmark in suite(names):
        if benchmark.clips is None:
            more = f"; accept its terms at {_page(benchmark.source.id)}, then run `hf auth login`" if benchmark.gated else ""
            say(console, f"{benchmark.name}: nothing to bring, its rows come from the hub when it is evaluated{more}")
            continue
        say(console, f"{benchmark.name}: {benchmark.clips.size} into {folder} ({benchmark.clips.terms})")
        _bring(benchmark, benchmark.clips, folder, console)
        if benchmark.clips.by_hand:
            say(console, f"{benchmark.name}: to be fetched by hand: {benchmark.clips.by_hand}", "yellow")
        say(console, _found_there(benchmark, folder))


def _page(name: str) -> str:
    return f"https://huggingface.co/datasets/{name}"


def _bring(benchmark: Benchmark, clips: ClipFiles, folder: Path, console: Console) -> None:
    """Plain files where they are in the set, archives one after another."""
    import huggingface_hub
    from huggingface_hub.errors import OfflineModeIsEnabled

    from zppo.http_client import hub_trouble

    source, unreached = benchmark.source, hub_trouble()
    done = folder / _DONE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        known = done.read_text(encoding="utf-8").splitlines() if done.exists() else []
    except OSError as error:
        raise StorageError(f"{folder} cannot be written ({error.strerror or error}); name another folder with --clips") from error
    try:
        files = huggingface_hub.HfApi().list_repo_files(source.id, revision=source.revision, repo_type="dataset")
        wanted = [name for name in files if _any(clips.patterns, name) and not _any(clips.without, name)]
        if any(not is_archive(name) for name in wanted):
            huggingface_hub.snapshot_download(
                source.id,
                repo_type="dataset",
                revision=source.revision,
                local_dir=folder,
                allow_patterns=list(clips.patterns),
                ignore_patterns=[*clips.without, *(name for name in wanted if is_archive(name))],
            )
        for name in sorted(filter(is_archive, wanted)):
            line = f"{source.id} {name}"
            if line in known:
                continue
            path = Path(huggingface_hub.hf_hub_download(source.id, name, repo_type="dataset", revision=source.revision, local_dir=folder))
            say(console, f"{benchmark.name}: {unpack(path, folder):,} files of {name}")
            with open(done, "a", encoding="utf-8") as out:
                out.write(line + "\n")
            path.unlink()
    except (DataError, StorageError):
        raise
    except Exception as error:  # a network, a log-in, terms that were not accepted, a set that is gone
        why = unreached if isinstance(error, OfflineModeIsEnabled) else one_line(error)
        raise UnavailableError(
            f"{benchmark.name}: {source.id} cannot be brought ({why}); accept its terms at {_page(source.id)} if it has some, "
            "run `hf auth login`, and check the network and the disk; the same command goes on"
        ) from error
    if not wanted:
        raise UnavailableError(f"{benchmark.name}: {source.id} has none of {', '.join(clips.patterns)} any more; see {_page(source.id)}")


def _any(patterns: Sequence[str], name: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _found_there(benchmark: Benchmark, folder: Path) -> str:
    """Which questions have their clip now, in a sentence."""
    look_again()
    try:
        loaded = load_items(benchmark, clips=folder)
    except DataError as error:
        return f"{benchmark.name}: not all is there yet: {one_line(error)}"
    if not loaded.missing:
        return f"{benchmark.name}: all {len(loaded.items):,} questions have their clips; evaluate with --clips {folder}"
    missing = len(loaded.missing)
    return f"{benchmark.name}: {missing:,} of {missing + len(loaded.items):,} questions lack their clip; the first: {loaded.missing[0]}"
