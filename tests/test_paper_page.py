"""docs/paper.md names every algorithm, equation, table and figure of the paper, and its commands are commands."""

from __future__ import annotations

import re
import shlex

import pytest

from test_recipes import RECIPES
from zppo.cli import _parser
from zppo.cli.eval_command import split_vllm
from zppo.cli.train_commands import split_overrides
from zppo.config.help import known_keys
from zppo.config.methods import METHODS

ROOT = RECIPES.parent
PAGE = (ROOT / "docs" / "paper.md").read_text(encoding="utf-8")
COMMANDS = sorted(set(re.findall(r"`zppo ([^`]+)`", PAGE)))
ITEMS = [
    *(f"Alg. {n}" for n in range(1, 7)),
    *(f"Eq. {n}" for n in range(1, 7)),
    *(f"Tab. {n}" for n in range(1, 22)),
    *(f"Fig. {n}" for n in ("1", "2", "3", "4", "5a", "5b", *map(str, range(6, 31)))),
]
"""What arXiv 2606.18216 numbers."""


def rows() -> dict[str, str]:
    """Item -> its row."""
    found = re.findall(r"^\| ((?:Alg|Eq|Tab|Fig)\. \w+) \| (.+) \|$", PAGE, re.MULTILINE)
    assert len(dict(found)) == len(found)
    return dict(found)


def test_every_item_has_a_row_with_a_command_or_says_that_there_is_none() -> None:
    assert list(rows()) == ITEMS
    assert [
        item for item, row in rows().items() if "`zppo " not in row.split(" | ")[1] and not re.match(r"none\b", row.split(" | ")[1])
    ] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_its_commands_parse(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, given = shlex.split(command), list[str]()
    if arguments[0] == "train":
        arguments, given = split_overrides(arguments)
    if arguments[0] == "eval":
        arguments, _ = split_vllm(arguments)
    try:
        options, unknown = _parser().parse_known_args(arguments)
    except SystemExit as ended:  # --help ends after it has printed
        said = capsys.readouterr().err
        assert ended.code == 0, said
        return
    given += unknown
    assert not unknown or getattr(options, "takes_settings", False), unknown
    for setting in (*given, *(f"--{varied}" for varied in getattr(options, "vary", ()))):
        key, _, values = setting.removeprefix("--").partition("=")
        assert key in known_keys() or key == "method", f"no setting is called {key}"
        assert key != "method" or set(values.split(",")) <= set(METHODS), values


def test_the_files_that_it_names_exist() -> None:
    named = re.findall(r"(?:`|zppo \w+ )((?:recipes|src|tests|core|prompts|evals)/[\w./-]+)", PAGE)
    assert len(named) > 10
    assert [name for name in named if not any((folder / name).exists() for folder in (ROOT, ROOT / "src" / "zppo"))] == []
