"""What the names in recipes and commands stand for: `lab:<world>/<what>`, run folders, objects by import path; what is in a checkpoint.

Every room may ask, so nothing heavy and nothing above is imported here: what stands behind a scheme is an import path, followed when
such a name is met.
"""

from __future__ import annotations

import errno
import importlib
import importlib.util
import os
import pickle
import re
import stat
import sys
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from types import ModuleType
from typing import Any

from zppo.errors import CheckpointError, ModelError, SettingsError, ZPPOError

POINTER = "is a git-lfs pointer, which only stands for the file: run `git lfs pull` in the folder that was cloned"
_POINTERS = (b"version https://git-lfs.github.com/spec/", b"version https://hawser.github.com/spec/")  # the second one is its old name
_POINTER_BYTES = 1024  # a pointer is smaller

MODELS = {"lab": "zppo.lab.questions:bundled_model"}
"""Scheme -> a function from the whole name to the checkpoint's folder."""
QUESTIONS = {"lab": "zppo.lab.questions:bundled_questions"}
"""Scheme -> a function from the whole name to questions; `data.load` has the sources that it reads itself."""
TEMPLATES = {"lab": "zppo.lab.questions:bundled_template"}
"""Scheme -> a function from the whole name to a prompt template's file."""

_SCHEME = re.compile(r"([a-z][a-z0-9_]+):(?!//)")
_FINAL = "final"  # of a run folder
_WANTS_CODE = re.compile(r"trust_remote_code|custom code|remote code")


def scheme_of(name: str) -> str:
    """The scheme of `<scheme>:<rest>`; "" of a path, an address or a name on the hub."""
    found = _SCHEME.match(name)
    return found[1] if found else ""


CLOSINGS: Mapping[str, str] = {"think-boxed": "after-thoughts", "boxed": "anywhere", "answer-line": "line"}
"""Closing instructions that come with zppo, by what a recipe calls them, and where the answers stand that they ask for."""


def model_folder(name: str) -> str:
    """What `from_pretrained` takes: the folder behind a scheme of `MODELS`, any other name as it is.

    Raises:
        ModelError: there is no such model.
    """
    path = MODELS.get(scheme_of(name))
    return str(load_object(path, "model", ModelError)(name)) if path else name


def template_file(name: str) -> str:
    """The file behind a scheme of `TEMPLATES`, any other path as it is. SettingsError where there is no such template."""
    path = TEMPLATES.get(scheme_of(name))
    return str(load_object(path, "template", SettingsError)(name)) if path else name


def checkpoint_folder(name: str) -> str:
    """As `model_folder`; of the folder of a finished run the `final/` in it."""
    name = model_folder(name)
    final = Path(name) / _FINAL
    run = (final / "config.json").is_file() and not (final.parent / "config.json").is_file()
    return str(final) if run else name


def load_part(kind: Any, name: str | Path, **more: Any) -> Any:
    """`kind.from_pretrained(name, ...)`: everything that is read of a checkpoint by `transformers` comes through here [zppo].

    A checkpoint is data: code that its files name (`auto_map`, a `custom_generate` folder) is never run and nobody is asked whether it
    should be. Where `transformers` knows the architecture itself, what is named there is passed over. A folder is looked through for
    pointers of git-lfs first.

    Args:
        kind: a class with `from_pretrained`: an auto class, a processor.
        more: its other arguments.

    Raises:
        ModelError: the checkpoint cannot be loaded without its code, or has a pointer in place of a file. Whatever else goes wrong is
            the caller's to put into words.
    """
    check_checkpoint(name)
    if not Path(name).exists():
        from zppo.http_client import hub_trouble

        hub_trouble()  # where it does not answer, what was downloaded before is taken at once
    from transformers import dynamic_module_utils

    dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0  # parts of parts are not told of the refusal; with 0 they do not ask either
    try:
        return kind.from_pretrained(name, trust_remote_code=False, **more)
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"model {str(name)!r} has pickled weights (*.bin) that hold more than tensors, or are damaged; zppo runs nothing of them. "
            "Convert the checkpoint to safetensors where you trust it, or name another one"
        ) from error
    except ValueError as error:
        if not _WANTS_CODE.search(str(error)):
            raise
        raise ModelError(
            f"model {str(name)!r} brings code of its own (`auto_map` in its files), which zppo does not run: name a checkpoint whose "
            "architecture transformers has itself, or convert it to one"
        ) from error


def readable(path: Path) -> Path:
    """The path. OSError where a pipe or a device lies there, which may never end or keep whoever opens it waiting."""
    mode = path.stat().st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise OSError(errno.EINVAL, "it is a pipe or a device, no file", str(path))
    return path


def check_run_folder(run: Path) -> None:
    """Refuses a run folder that holds a pipe or a device: whoever opens it may wait for ever.

    Raises:
        CheckpointError: it names the first of them.
    """
    for folder, _, names in os.walk(run):
        for name in names:
            path = Path(folder) / name
            try:
                readable(path)
            except FileNotFoundError:
                continue  # a broken link, or it went away
            except OSError as error:
                raise CheckpointError(f"{path} cannot be read: {error.strerror}. Take it out of the run folder") from error


def is_pointer(start: bytes) -> bool:
    """Whether a file that begins like this is a pointer of git-lfs: `git clone` without git-lfs leaves them in place of large files."""
    return start.startswith(_POINTERS)


def check_file(path: Path, error: type[ZPPOError]) -> None:
    """Refuses a file that is a pointer of git-lfs; one that cannot be read is left to who reads it."""
    if is_pointer_file(path):
        raise error(f"{path} {POINTER}")


def is_pointer_file(path: Path) -> bool:
    """Whether a file is a pointer of git-lfs; one that cannot be read is none."""
    try:
        return path.is_file() and path.stat().st_size < _POINTER_BYTES and is_pointer(path.read_bytes())
    except OSError:
        return False


def check_checkpoint(name: str | Path) -> None:
    """Refuses a checkpoint's folder with pointers of git-lfs among the files that are loaded; a name on the hub passes.

    Raises:
        ModelError: it names the first of them.
    """
    folder = Path(name)
    if not folder.is_dir():
        return
    # Some hold the same weights or the same tokenizer once more, in an older form that nobody reads.
    kinds = ["*.json", "*.jinja", "*.txt", "model*.safetensors", "adapter_model*.safetensors"]
    kinds += [] if any(folder.glob("*.safetensors")) else ["*.bin"]
    kinds += [] if (folder / "tokenizer.json").exists() else ["*.model"]
    for path in sorted(path for kind in kinds for path in folder.glob(kind)):
        check_file(path, ModelError)


def load_object(spec: str, what: str, error: type[ZPPOError], *, call: bool = True) -> Any:
    """What an import path names.

    Args:
        spec: "package.module:name" or "path/to/file.py:name"; the name may be an attribute ("Class.method").
        what: what messages call it, e.g. "reward function".
        error: raised where form, module or name is wrong; the message says which.
        call: it must be something that can be called.
    """
    place, colon, name = spec.rpartition(":")
    if not colon or not place or not name:
        raise error(f"{what} {spec!r} has no module and name: write package.module:name or path/to/file.py:name")
    try:
        target: Any = _module_of_file(Path(place), spec, what, error) if place.endswith(".py") else importlib.import_module(place)
    except error:
        raise
    except (Exception, SystemExit) as cause:  # a script without `if __name__ == "__main__"` may end the program
        if isinstance(cause, SyntaxError) and cause.filename:
            check_file(Path(cause.filename), error)
        raise error(
            f"{what} {spec!r}: importing {place!r} failed with {type(cause).__name__}: {cause}. "
            + ("Mend that file." if place.endswith(".py") else "Check the name and that its folder is on PYTHONPATH.")
        ) from cause
    for part in name.split("."):
        if not hasattr(target, part):
            raise error(f"{what} {spec!r}: {place!r} has no {name!r}. Check the spelling.")
        target = getattr(target, part)
    if call and not callable(target):
        raise error(f"{what} {spec!r} is a {type(target).__name__}, which cannot be called. Name a function or a class.")
    return target


def _module_of_file(path: Path, spec: str, what: str, error: type[ZPPOError]) -> ModuleType:
    if not path.is_file():
        raise error(f"{what} {spec!r}: there is no file {str(path)!r}. Give a path from where you run, or an import path.")
    check_file(path, error)
    name = f"zppo_user_{sha256(str(path.resolve()).encode()).hexdigest()[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    found = importlib.util.spec_from_file_location(name, path)
    if found is None or found.loader is None:
        raise error(f"{what} {spec!r}: {str(path)!r} cannot be read as Python. Name a .py file.")
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module  # dataclasses and pickles of the module look it up
    try:
        found.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
