"""The build: recipes/ of the repository becomes zppo/recipes of the package. Everything else is in pyproject.toml."""

from pathlib import Path
from shutil import copytree

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithRecipes(build_py):
    def run(self) -> None:
        super().run()
        if not self.editable_mode:  # what runs from the repository finds them there
            copytree("recipes", Path(self.build_lib, "zppo", "recipes"), dirs_exist_ok=True)


setup(cmdclass={"build_py": BuildWithRecipes})
