"""`zppo recipes` and `zppo init`: what comes with zppo to train by."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from zppo.cli.command_parser import Subcommands
    from zppo.config.model_settings import TeacherSettings


def add_recipes(commands: Subcommands) -> None:
    """`recipes` and `init`."""
    commands.add_parser("recipes", help="list the recipes that come with zppo").set_defaults(run=_recipes)
    init = commands.add_parser(
        "init",
        help="copy one of them, ready to edit",
        description="Copy a recipe that comes with zppo to NAME.yaml (slurm: to NAME.sbatch), with the data files that it needs; nothing "
        "is overwritten.",
    )
    init.add_argument("name", metavar="NAME", help="of the copy: NAME.yaml, a path may stand before it")
    init.add_argument("--from", dest="source", metavar="RECIPE", default="my-data", help="a name of `zppo recipes` (default: my-data)")
    init.set_defaults(run=_init)


def _recipes(options: argparse.Namespace) -> None:
    from rich.console import Console

    from zppo.config.bundled import accelerate_files, made_for, recipe_names, recipes_folder, slurm_script
    from zppo.config.recipe import load_recipe
    from zppo.runs.display import show_table

    lines = []
    for name in recipe_names():
        path = recipes_folder() / f"{name}.yaml"
        settings = load_recipe(path)
        student, data = _short(settings.student.model), _short(settings.data.train_name)
        trains = student + (" by LoRA" if settings.train.lora else "") + ("" if data == student else f" on {data}")
        lines.append((name, trains, _teacher(settings.teacher), made_for(path.read_text(encoding="utf-8"))))
    console = Console(highlight=False)
    show_table(console, ("recipe", "trains", "teacher", "made for"), lines)
    console.print(
        "\nQuestions of your own: begin with my-data on a GPU, with smollm2-135m where the student is small and the teacher behind an "
        "address (docs/train-your-model.md).",
        soft_wrap=True,
    )
    console.print("`zppo train NAME` trains by one, `zppo init MINE --from NAME` copies it to MINE.yaml, ready to edit.", soft_wrap=True)
    console.print("For `accelerate launch --config_file FILE`, and `zppo init MINE --from accelerate/NAME`:", soft_wrap=True)
    for file in accelerate_files():
        console.print(f"  {file}", soft_wrap=True)
    console.print("For `sbatch FILE` on a cluster with SLURM, and `zppo init MINE --from slurm`:", soft_wrap=True)
    console.print(f"  {slurm_script()}", soft_wrap=True)


def _teacher(teacher: TeacherSettings | None) -> str:
    if teacher is None:
        return "-"
    return _short(teacher.model) + (" (server)" if teacher.base_urls else "")


def _short(name: str) -> str:
    """A name without its owner or folder; of the lab, the world."""
    return name.partition("/")[0] if name.startswith("lab:") else name.rpartition("/")[2]


def _init(options: argparse.Namespace) -> None:
    from rich.console import Console

    from zppo.config.bundled import copy_recipe

    made, console = copy_recipe(options.name, options.source), Console(highlight=False)
    say = [(made.recipe, f"from {options.source}"), *((file, "questions to replace by yours") for file in made.written)]
    say += [(file, "was there already and stays as it is") for file in made.kept]
    for file, what in say:
        console.print(f"{file}  [dim]{what}[/dim]", soft_wrap=True)
    if made.recipe.suffix == ".sbatch":
        console.print(f"edit what stands at its top, then `sbatch {made.recipe}`; docs/cluster.md has the numbers", soft_wrap=True)
    elif not options.source.startswith("accelerate/"):
        console.print(f"edit it, then `zppo train {made.recipe} --dry-run` says what it will do", soft_wrap=True)
