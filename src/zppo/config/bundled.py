"""The recipes that come with zppo: found by name, listed, copied."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from zppo.errors import SettingsError

_FOLDER = "recipes"
_SUFFIX = ".yaml"
_ACCELERATE = "accelerate"
_SLURM = "slurm.sbatch"
_MADE_FOR = re.compile(r"Made for (.+?)(?:[;.]\s|[;.]$)")


def recipes_folder() -> Path:
    """Where they are: in the installed package, or in the repository that the package runs from."""
    package = Path(__file__).parents[1]
    installed = package / _FOLDER
    return installed if installed.is_dir() else package.parents[1] / _FOLDER


def recipe_names() -> list[str]:
    """The names by which commands know them, in order."""
    return sorted(path.stem for path in recipes_folder().glob(f"*{_SUFFIX}"))


def accelerate_files() -> list[Path]:
    """The configurations for `accelerate launch`."""
    return sorted((recipes_folder() / _ACCELERATE).glob(f"*{_SUFFIX}"))


def slurm_script() -> Path:
    """The batch script for SLURM."""
    return recipes_folder() / _SLURM


def find_recipe(given: str | Path) -> Path:
    """The file that is meant: the path where a file lies there, else what comes with zppo under this name, else the path.

    `lab`, `lab.yaml` and `recipes/lab.yaml` are one name, wherever the command runs.
    """
    path = Path(given).expanduser()
    if path.is_file():
        return path
    name = str(given).replace("\\", "/").removeprefix(f"{_FOLDER}/").removesuffix(_SUFFIX)
    return recipes_folder() / f"{name}{_SUFFIX}" if name in recipe_names() else path


def made_for(text: str) -> str:
    """The machine that a recipe's own comments name, behind "Made for"."""
    comments = " ".join(line.removeprefix("#").strip() for line in text.splitlines() if line.startswith("#"))
    found = _MADE_FOR.search(comments)
    return found[1] if found else ""


@dataclass(frozen=True, slots=True)
class CopiedRecipe:
    """What `copy_recipe` wrote.

    Attributes:
        recipe: the copy.
        written: files that it needs, copied with it.
        kept: such files that were there already and stay as they are.
    """

    recipe: Path
    written: list[Path]
    kept: list[Path]


def copy_recipe(name: str, source: str) -> CopiedRecipe:
    """Copies what comes with zppo as `source` to NAME.yaml (a batch script to NAME.sbatch), with the data files beside it that it names,
    ready to edit.

    Raises:
        SettingsError: there is no such recipe, NAME.yaml is there already, or the place cannot be written.
    """
    folder = recipes_folder()
    files = [*(folder / f"{name}{_SUFFIX}" for name in recipe_names()), *accelerate_files(), slurm_script()]
    known = {file.relative_to(folder).as_posix().removesuffix(file.suffix): file for file in files}
    source = source.removeprefix(f"{_FOLDER}/").removesuffix(_SUFFIX).removesuffix(Path(_SLURM).suffix)
    if source not in known:
        raise SettingsError(f"--from is {source!r}, and no recipe of this name comes with zppo: take one of {', '.join(known)}")
    suffix = known[source].suffix
    target = Path(name if name.endswith(suffix) else f"{name}{suffix}").expanduser()
    text = known[source].read_text(encoding="utf-8")
    for old, new in (
        (f"{_FOLDER}/{source}{suffix}", str(target)),
        (f" {source}{suffix}", f" {target}"),
        (f"runs/{source}-", f"runs/{target.stem}-"),
    ):
        text = text.replace(old, new)  # in its comments
    needed = sorted({file for file in re.findall(r"^\s*\w+: (data/[\w.-]+)", text, re.MULTILINE) if (folder / file).is_file()})
    written, kept = [], []
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("x", encoding="utf-8") as file:
            file.write(text)
        for place in needed:
            copy = target.parent / place
            copy.parent.mkdir(exist_ok=True)
            if copy.exists():
                kept.append(copy)
            else:
                copy.write_bytes((folder / place).read_bytes())
                written.append(copy)
    except FileExistsError as error:
        raise SettingsError(f"{error.filename} is there already and is not overwritten: take another NAME, or remove it") from error
    except OSError as error:
        raise SettingsError(
            f"{error.filename or target} cannot be written ({error.strerror}): take a place that you may write to"
        ) from error
    return CopiedRecipe(target, written, kept)
