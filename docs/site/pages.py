"""A hook of mkdocs: the pages of the site that lie above docs/, and their links turned to where the site has them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from mkdocs.structure.files import File

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
PAGES = {
    "README.md": "index.md", "SECURITY.md": "security.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md",
    "AGENTS.md": "agents.md",
}  # fmt: skip


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for name, page in PAGES.items():
        if (ROOT / name).is_file():
            files.append(File.generated(config, page, content=(ROOT / name).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    def turned(match: re.Match[str]) -> str:
        words, target, anchor = match[1], match[2], match[3] or ""
        if page.file.src_uri in PAGES.values():
            target = target.removeprefix("docs/")
        target = PAGES.get(target.removeprefix("../"), target)
        known = files.get_file_from_path(target) is not None
        # Files of the repository that the site does not hold (recipes, CITATION.cff) are named, not linked.
        return f"[{words}]({target}{anchor})" if known or "://" in target else words

    markdown = re.sub(r"\[([^\[\]]+)\]\(([^)#\s]+)(#[^)\s]*)?\)", turned, markdown)
    # In a table GitHub wants a bar within code escaped, and mkdocs would show the backslash.
    return re.sub(r"^\|.*$", lambda row: re.sub(r"`[^`]+`", lambda code: code[0].replace(r"\|", "|"), row[0]), markdown, flags=re.MULTILINE)
