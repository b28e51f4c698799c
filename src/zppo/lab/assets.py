"""Where the bundled checkpoints are."""

from __future__ import annotations

from pathlib import Path

from zppo.errors import ModelError

ASSETS = Path(__file__).with_name("assets")
SCHEME = "lab:"
ROLES = ("student", "teacher")


def resolve(name: str) -> Path:
    """The folder of a bundled checkpoint, `lab:<world>/<student|teacher>` (the scheme may be left out).

    Raises:
        ModelError: no such checkpoint.
    """
    world, _, role = name.removeprefix(SCHEME).partition("/")
    folder = ASSETS / world / role
    if role not in ROLES or not (folder / "config.json").is_file():
        known = (
            ", ".join(f"{SCHEME}{p.parent.parent.name}/{p.parent.name}" for p in sorted(ASSETS.glob("*/*/config.json")))
            or "none"
        )
        raise ModelError(
            f"there is no bundled model {name!r} (known: {known}); name one of them, or build your own with "
            "`zppo lab build WORLD --out DIR` and name its folder"
        )
    return folder
