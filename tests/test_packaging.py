"""What the project says about versions, and the check for machines with a GPU where there is none."""

from __future__ import annotations

import ast
import contextlib
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

import zppo

ROOT = Path(__file__).parents[1]
CORE = sorted((Path(zppo.__file__).parent / "core").rglob("*.py"))


def pins(name: str) -> dict[str, str]:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    return {r.name: str(r.specifier) for line in lines if line[:1].isalpha() for r in [Requirement(line)]}


def project() -> dict[str, dict[str, Requirement]]:
    """Requirements by extra, "" for those of everybody."""
    data = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    groups = {"": data["dependencies"], **data["optional-dependencies"]}
    return {extra: {r.name: r for r in map(Requirement, lines)} for extra, lines in groups.items()}


def test_what_is_tested_as_lowest_is_the_lowest_that_is_admitted() -> None:
    lowest = {name: Version(pin.removeprefix("==")) for name, pin in pins("constraints-lowest.txt").items()}
    floors = {
        name: Version(re.search(r">=([\d.]+)", str(r.specifier))[1])  # type: ignore[index]
        for name, r in project()[""].items()
    }
    assert lowest.keys() == floors.keys()
    assert {n: v for n, v in lowest.items() if v != floors[n]}.keys() == {"torch"}  # no older build for a CPU at hand
    assert lowest["torch"] == Version(pins("constraints.txt")["torch"].removeprefix("=="))


def test_the_constraints_for_vllm_admit_what_the_project_admits() -> None:
    given, wanted = pins("constraints-vllm.txt"), project()
    assert given["vllm"] == "<0.33" and "<0.33" in str(wanted["vllm"]["vllm"].specifier)
    assert given["transformers"] == "<5.20" and wanted[""]["transformers"].specifier.contains("5.19.0")
    assert wanted["vllm"].keys() == {"vllm"}


def test_other_people_s_scripts_are_packed_and_named() -> None:
    data = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["package-data"]["zppo"]
    package = Path(zppo.__file__).parent
    packed = {path for pattern in data for path in package.glob(pattern)}
    notice = (ROOT / "NOTICE").read_text(encoding="utf-8")
    found = sorted((package / "report" / "page" / "vendor").iterdir())
    assert found and set(found) <= packed and all(path.name in notice for path in found)
    assert sum(path.stat().st_size for path in found) < 1_700_000  # every report holds them


@pytest.mark.slow
def test_gpu_check_says_that_there_is_no_gpu(tmp_path: Path) -> None:
    """CUDA_VISIBLE_DEVICES empty: none, wherever this runs."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_check", "--results", str(tmp_path / "results")],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 2 and "no GPU" in done.stderr and "nvidia-smi" in done.stderr
    assert not (tmp_path / "results").exists()


def imported(tree: ast.AST) -> set[str]:
    """First parts of what a module imports, wherever the import stands; "zppo" for relative ones."""
    names = {alias.name for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names}
    names |= {"zppo" if n.level else str(n.module) for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("path", CORE, ids=lambda p: p.name)
def test_the_core_is_pure(path: Path) -> None:
    """The standard library and torch alone; no files, processes, network or clock (which rooms it may import: `make lint`)."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert imported(tree) <= {"torch", "zppo"} | sys.stdlib_module_names
    io = "os io pathlib subprocess socket shutil tempfile threading multiprocessing asyncio time".split()
    assert not imported(tree) & set(io)
    called = {n.func.id for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
    assert not called & {"open", "print", "input", "eval", "exec"}


@pytest.mark.parametrize("module", ["zppo", "zppo.core.types", "zppo.engines.base"])
def test_what_everything_imports_loads_no_torch(module: str) -> None:
    script = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


def test_what_contributors_are_told_to_run_exists() -> None:
    """`make` targets in the guides and the public workflow; hooks run what `make lint` runs."""
    import yaml

    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    workflow = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text(encoding="utf-8"))
    told = "\n".join(
        [*((ROOT / name).read_text(encoding="utf-8") for name in ("CONTRIBUTING.md", "AGENTS.md", "README.md")),
         *(step.get("run", "") for step in workflow["jobs"]["test"]["steps"])]
    )  # fmt: skip
    named = {target for line in re.findall(r"(?:^|`|run: )make ([a-z -]+)", told, re.MULTILINE) for target in line.split()[:1]}
    assert len(named) > 6 and named <= targets
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"][0]["hooks"]
    lint = makefile[makefile.index("\nlint:") : makefile.index("\nsite:")]
    for hook in hooks:
        tool = hook["entry"].replace(".venv/bin/python -m ", "").removeprefix(".venv/bin/").split()[0]
        assert tool in lint, hook
    versions = workflow["jobs"]["test"]["strategy"]["matrix"]["python"]
    assert all(zppo_python(version) for version in versions)


def zppo_python(version: str) -> bool:
    data = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return Version(version) in SpecifierSet(data["requires-python"])


def brought(requirements: Iterable[Requirement]) -> set[str]:
    """Distributions that pip installs for these, and for what they ask for in turn, of those that are here."""
    seen: set[tuple[str, str]] = set()
    waiting = [(canonicalize_name(r.name), extra) for r in requirements for extra in ("", *r.extras)]
    while waiting:
        name, extra = waiting.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        with contextlib.suppress(PackageNotFoundError):
            asked = [r for r in map(Requirement, requires(name) or []) if r.marker is None or r.marker.evaluate({"extra": extra})]
            waiting += [(canonicalize_name(r.name), more) for r in asked for more in ("", *r.extras)]
    return {name for name, _ in seen}


@pytest.mark.slow
def test_what_is_imported_is_asked_for(tmp_path: Path) -> None:
    """With what `pip install zppo` brings and nothing that else is installed here: the lab trains, and what cannot be imported names a
    package of an extra."""
    base = brought(project()[""].values())
    extras = {canonicalize_name(name) for group in project().values() for name in group}
    owners = {module: {canonicalize_name(name) for name in names} for module, names in packages_distributions().items()}
    hidden = sorted(module for module, names in owners.items() if not names & (base | {"zppo"}))
    assert "hypothesis" in hidden and "torch" not in hidden
    run = ("--train.steps=1", "--rollout.batch_size=2", "--rollout.group_size=2", "--data.eval=null", f"--output={tmp_path / 'run'}")
    script = f"""
import importlib, pkgutil, sys
from importlib.machinery import PathFinder
class Fresh(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in {hidden} else super().find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(PathFinder)] = Fresh
import zppo
from zppo.errors import SettingsError
for module in pkgutil.walk_packages(zppo.__path__, "zppo."):
    if not module.name.endswith("__main__"):
        try:
            importlib.import_module(module.name)
        except ModuleNotFoundError as error:
            print("missing:", module.name, error.name.partition(".")[0])
        except SettingsError as error:
            assert "pip install 'zppo[" in str(error), error
from zppo.cli import main
assert main(["train", "lab", *{run}]) == 0
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for _, module, package in (line.split() for line in done.stdout.splitlines() if line.startswith("missing:")):
        assert owners.get(package, {canonicalize_name(package)}) & extras, (
            f"{module} imports {package}, which no dependency or extra asks for"
        )


HEAVY = "datasets deepspeed matplotlib openai pandas plotly torch.distributed.checkpoint.state_dict trl vllm wandb"


@pytest.mark.long
def test_a_run_with_a_teacher_in_its_process_imports_no_more_than_it_needs(tmp_path: Path) -> None:
    """The client of servers, FSDP2's checkpoints and what reports draw with take seconds together."""
    small = ("--train.steps=1", "--rollout.batch_size=2", "--rollout.group_size=2", "--data.eval=null", f"--output={tmp_path / 'run'}")
    script = f"""
import sys
import zppo.train.run
early = sorted(set({HEAVY.split()}) & sys.modules.keys())
from zppo.cli import main
assert main(["train", "lab", *{small}]) == 0
print("loaded:", early, sorted({{"openai", "datasets", "matplotlib"}} & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "loaded: [] []"


def test_help_loads_neither_settings_nor_numbers() -> None:
    script = "import sys; from zppo.cli import main\ntry: main(['--help'])\nexcept SystemExit: print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    loaded = set(done.stdout.split("\n")[-2].split())
    assert "zppo.cli" in loaded and not loaded & {"numpy", "pydantic", "rich", "ruamel.yaml", "torch", "transformers"}


@pytest.mark.slow
def test_the_first_line_of_a_run_comes_before_torch(tmp_path: Path) -> None:
    """What is said first is said while nothing heavy has been imported."""
    script = f"""
import builtins, sys
from rich.console import Console
real = Console.print
def first(self, *a, **k):
    real(self, *a, **k)
    print("torch" in sys.modules, "transformers" in sys.modules, file=sys.stderr)
    raise SystemExit(0)
Console.print = first
from zppo.cli import main
main(["train", "lab", "--output={tmp_path / "run"}"])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.startswith("loading torch") and done.stderr.splitlines()[-1] == "False False"
