"""Sets of the Hugging Face hub: `hub:owner/name`, read by `datasets`."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from urllib.parse import parse_qsl

from zppo.data.reading import Reading, Rows
from zppo.data.rows import Columns
from zppo.data.sets import set_rows, shorten
from zppo.errors import DataError

SCHEME = "hub"
_NAME = re.compile(r"[A-Za-z0-9_][\w.-]*(/[A-Za-z0-9_][\w.-]*)?", re.ASCII)
_OPTIONS = ("config", "split", "revision")


def hub_rows(rest: str, reading: Reading, columns: Columns) -> Rows:
    """Rows of `owner/name` or `owner/name?config=...&split=...&revision=...`, where what stands in the name wins over the settings.

    Raises:
        DataError: no such set, configuration, split or revision, one that needs a log-in, or no network; each with the mend.
    """
    name, reading = parse_hub(rest, reading)
    if Path(name).exists():
        raise DataError(
            f"hub:{name}: {Path(name).absolute()} exists, and `datasets` would read it instead of the hub's; "
            f"start in another folder, or write ./{name} to mean the folder"
        )
    # Heavy, and most people bring files.
    import datasets

    try:
        loaded = datasets.load_dataset(
            name, reading.config, split=reading.split, revision=reading.revision, streaming=reading.streaming
        )
    except Exception as error:  # many kinds, by what is missing: see `_why`
        raise DataError(f"hub:{name}: {_why(name, reading, error)}") from error
    return set_rows(loaded, f"hub:{name}, split {reading.split}", f"{name}:{reading.split}", columns, Path.cwd())


def parse_hub(rest: str, reading: Reading) -> tuple[str, Reading]:
    """(name, reading with the options that stand behind it). Raises DataError for a name or an option that cannot be."""
    name, mark, query = rest.partition("?")
    if not _NAME.fullmatch(name):
        raise DataError(f"hub:{rest}: {name!r} is no name of a data set; write hub:owner/name")
    try:
        options = dict(parse_qsl(query, keep_blank_values=True, strict_parsing=True)) if mark else {}
    except ValueError as error:
        raise DataError(
            f"hub:{rest}: {query!r} cannot be read; write hub:{name}?split=test, with & between options"
        ) from error
    unknown = [key for key in options if key not in _OPTIONS]
    if unknown:
        raise DataError(f"hub:{rest}: {unknown[0]!r} is no option of a hub set; known: {', '.join(_OPTIONS)}")
    return name, replace(
        reading,
        config=options.get("config", reading.config),
        split=options.get("split", reading.split),
        revision=options.get("revision", reading.revision),
    )


def _why(name: str, reading: Reading, error: BaseException) -> str:
    """What went wrong and how to mend it. `datasets` drops the causes of its errors, so some are told apart by their words."""
    import datasets

    page, said = f"https://huggingface.co/datasets/{name}", shorten(error)
    if isinstance(error, datasets.exceptions.DatasetNotFoundError):
        if "gated dataset" in said:
            return f"is gated: accept its terms at {page}, then run `hf auth login` ({said})"
        if "Revision" in said:
            return f"has no revision {reading.revision!r}; see {page}/commits/main and set data.revision ({said})"
        return f"does not exist on the hub, or is private: check the name at {page}; for a private one run `hf auth login` ({said})"
    if isinstance(error, ConnectionError | TimeoutError):
        return (
            f"the hub could not be reached, and no copy was made earlier ({said}): check the network and that HF_HUB_OFFLINE is not "
            "set; or name a folder with a copy of the set"
        )
    if isinstance(error, ValueError) and "split" in said:
        return f"has no split {reading.split!r} ({said}); name another with {reading.split_setting}"
    if isinstance(error, ValueError) and "config" in said.lower():
        wrong = "needs a configuration" if reading.config is None else f"has no configuration {reading.config!r}"
        return f"{wrong} ({said}); name one with data.config"
    return f"cannot be loaded ({said}); see {page}, or download it and name the folder"
