"""The README and docs/: every command that they show is one, every setting that they set exists."""

from __future__ import annotations

import importlib.util
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from zppo import cli
from zppo.cli.eval_command import split_vllm
from zppo.cli.train_commands import split_overrides
from zppo.config.help import find_key
from zppo.config.recipe import parse_overrides

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "AGENTS.md")] + sorted((ROOT / "docs").glob("*.md"))


def commands(page: Path) -> Iterator[str]:
    """Lines of code blocks, and code within lines, that begin with `zppo `."""
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"```(?:bash|sh)?\n(.*?)```", text, re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    lines += [code.replace("\n", " ") for code in re.findall(r"`(zppo [^`]+)`", prose)]
    return (re.sub(r"^(?:\$ |[A-Z_]+=\S+ )+", "", line.strip()) for line in lines)


CASES = [(page.name, line) for page in PAGES for line in dict.fromkeys(commands(page)) if line.startswith("zppo ")]


@pytest.mark.parametrize(("page", "line"), CASES)
def test_commands_that_are_shown_parse(page: str, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    line = line.replace("=...", "=x")
    line = re.split(r"\s#|\s(?:>|\||&&|;)\s|\s&$", line)[0]
    words = [word for word in shlex.split(line.replace("\\|", "|"))[1:] if word not in ("...", "[...]")]
    if any(re.search(r"[|\[\]]", word) and "=[" not in word and "{" not in word for word in words) or not words:
        return  # a form with alternatives, `zppo lab build|questions`, not a command
    overrides: list[str] = []
    if words[0] == "train":
        words, overrides = split_overrides(words)
    if words[0] == "eval":
        words, _ = split_vllm(words)
    words = [re.sub(r"^(?:N|K|STEP)$", "1", word) for word in words]
    words = [re.sub(r"=(?:N|K)$", "=1", word) for word in words]
    try:
        options, unknown = cli._parser().parse_known_args(words)
    except SystemExit as end:
        told = capsys.readouterr().err
        assert end.code == 0 or "are required" in told, f"{page}: {line}: {told}"  # in prose a command stands without what it works on
        return
    assert not unknown or getattr(options, "takes_settings", False), f"{page}: {line}: {unknown}"
    for key, _ in parse_overrides([word for word in (*overrides, *unknown) if word not in ("--key=value",)]):
        assert find_key(key) is not None, f"{page}: {line}: {key} is no setting"


def test_the_site_names_files_that_it_does_not_hold_and_shows_bars_as_they_are() -> None:
    spec = importlib.util.spec_from_file_location("site_pages", ROOT / "docs/site/pages.py")
    assert spec is not None and spec.loader is not None
    hook = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hook)
    files = SimpleNamespace(get_file_from_path=lambda path: path if path in {"data.md", "security.md"} else None)
    page = SimpleNamespace(file=SimpleNamespace(src_uri="index.md"))

    def shown(text: str) -> str:
        made: str = hook.on_page_markdown(text, page=page, config=None, files=files)
        return made

    assert shown("[a](docs/data.md#x), [b](SECURITY.md), [c](CITATION.cff) and [d](https://x.org)") == (
        "[a](data.md#x), [b](security.md), c and [d](https://x.org)"
    )
    assert shown(r"| `a\|b` | one \| two |") == r"| `a|b` | one \| two |"
    assert shown(r"`a\|b`") == r"`a\|b`"  # no row of a table
