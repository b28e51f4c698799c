"""What can be wrong, one function per row of docs/errors.md: each breaks a good recipe in one way (see tests/test_errors.py).

To add a row: a function with `@case("what is wrong")`, the same words in the table of docs/errors.md, and what is said beside them.
"""

from __future__ import annotations

import atexit
import gzip
import json
import os
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from fault_server import Server
from pictures import bomb, noise, picture
from seeing import PIXELS, make_seeing
from zppo.data.corpora.mapping import mapping_text


@dataclass
class World:
    """A folder with a recipe that trains: change it, then say what to run.

    Attributes:
        folder: where everything lies; `student` in it is a tiny checkpoint, `train.jsonl` the questions.
        recipe: the recipe's data, written to `recipe.yaml` when the command is run.
        more: further arguments of `zppo train recipe.yaml`.
        output: the run folder.
        command: other arguments than those of `zppo train`.
        env: environment variables, as a launcher sets them.
    """

    folder: Path
    recipe: dict[str, Any] = field(default_factory=dict)
    more: list[str] = field(default_factory=list)
    command: list[str] | None = None
    env: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.recipe = {
            "method": "grpo",
            "output": str(self.output),
            "student": {"model": "./student"},
            "data": {"train": "train.jsonl"},
            "rollout": {"batch_size": 2, "group_size": 2, "max_new_tokens": 4},
            "train": {"steps": 1, "device": "cpu"},
        }
        self.questions(*({"prompt": f"{i} plus 1?", "answer": i + 1} for i in range(4)))

    @property
    def output(self) -> Path:
        return self.folder / "run"

    @property
    def student(self) -> Path:
        return self.folder / "student"

    def write(self, name: str, text: str | bytes) -> Path:
        path = self.folder / name
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return path

    def questions(self, *rows: Any) -> None:
        self.write("train.jsonl", "".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))

    def set(self, key: str, value: Any) -> None:
        """A setting of the recipe by its dotted name."""
        section = self.recipe
        *above, last = key.split(".")
        for part in above:
            section = section.setdefault(part, {})
        section[last] = value

    def config(self, **changes: Any) -> None:
        """Fields of the student's config.json; None removes one."""
        path = self.student / "config.json"
        data = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({key: value for key, value in data.items() if value is not None}))

    def with_teacher(self) -> None:
        self.set("method", "zppo")
        self.set("teacher.model", "./student")

    def arguments(self) -> list[str]:
        if self.command is not None:
            return self.command
        path = self.folder / "recipe.yaml"
        if not path.exists():
            path.write_text(yaml.safe_dump(self.recipe))
        return ["train", str(path), *self.more]


LFS_POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'4d' * 32}\nsize 12345\n"
Break = Callable[[World], None]
CASES: dict[str, Break] = {}


def case(wrong: str) -> Callable[[Break], Break]:
    """Registers what breaks the world in the way of that row."""

    def register(function: Break) -> Break:
        assert wrong not in CASES, wrong
        CASES[wrong] = function
        return function

    return register


# --- recipes --------------------------------------------------------------------------------------------------------


@case("the recipe does not exist")
def _(w: World) -> None:
    w.command = ["train", str(w.folder / "none.yaml")]


@case("a copy of a recipe that does not come with zppo")
def _(w: World) -> None:
    w.command = ["init", str(w.folder / "mine"), "--from", "qwen"]


@case("a copy where a recipe lies already")
def _(w: World) -> None:
    w.write("recipe.yaml", "seed: 0\n")
    w.command = ["init", str(w.folder / "recipe"), "--from", "lab"]


@case("a template that the lab does not have")
def _(w: World) -> None:
    w.set("prompts", {"judge": "lab:judge"})


@case("the recipe is a folder")
def _(w: World) -> None:
    w.command = ["train", str(w.folder)]


@case("the recipe is a pipe")
def _(w: World) -> None:
    os.mkfifo(w.folder / "pipe")
    w.command = ["train", str(w.folder / "pipe")]


@case("the recipe stands for more than it says")
def _(w: World) -> None:
    lines = [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10)]
    w.write("recipe.yaml", "\n".join(["a0: &a0 [x]", *lines]))


@case("the recipe names code, and none is wanted")
def _(w: World) -> None:
    w.write("reward.py", "raise SystemExit('the code ran')\n")
    w.set("grading.reward", "reward.py:score")
    w.more = ["--no-code"]


@case("the recipe is no YAML")
def _(w: World) -> None:
    w.write("recipe.yaml", "data: {train: train.jsonl\nstudent: [\n")


@case("the recipe is not UTF-8")
def _(w: World) -> None:
    w.write("recipe.yaml", b"seed: 0 # caf\xe9\n")


@case("the recipe is no mapping")
def _(w: World) -> None:
    w.write("recipe.yaml", "- student\n- data\n")


@case("an unknown key")
def _(w: World) -> None:
    w.set("train.lr", 1e-6)


@case("a key that is gone")
def _(w: World) -> None:
    w.set("rollout.min_p", 0.1)


@case("a required setting is missing")
def _(w: World) -> None:
    del w.recipe["student"]


@case("a value of the wrong type")
def _(w: World) -> None:
    w.set("train.steps", "many")


@case("a value out of range")
def _(w: World) -> None:
    w.set("rollout.group_size", 1)


@case("true where a number is expected")
def _(w: World) -> None:
    w.set("train.steps", True)


@case("an override without a value")
def _(w: World) -> None:
    w.more = ["--train.steps"]


@case("an override below a value that is no section")
def _(w: World) -> None:
    w.more = ["--seed.first=1"]


@case("an unknown method")
def _(w: World) -> None:
    w.set("method", "zpo")


@case("an impossible combination of a method and its overrides")
def _(w: World) -> None:
    w.set("method", {"name": "grpo", "control": "scrambled"})


@case("a method that needs a teacher has none")
def _(w: World) -> None:
    w.set("method", "zppo")


@case("weights in 4 bits without adapters")
def _(w: World) -> None:
    w.set("student.quantize", "4bit")


@case("a student on a Tinker server with a setting that the API does not know")
def _(w: World) -> None:
    w.set("student.tinker", {})
    w.set("train.lora", {})
    w.set("eval", {"temperature": 0})
    w.set("rollout.temperature", 0.8)


@case("weights in 4 bits with vLLM as the engine")
def _(w: World) -> None:
    w.set("student.quantize", "4bit")
    w.set("train.lora", {})
    w.set("rollout.engine", "vllm")


@case("a reformulation of one's own cannot be imported")
def _(w: World) -> None:
    w.with_teacher()
    w.write("mine.py", "import no_such_package\n")
    w.set("method", {"name": "zppo", "reformulations": ["mine.py:Warning"]})


@case("a reformulation of one's own has no template")
def _(w: World) -> None:
    w.with_teacher()
    w.write("mine.py", "class Mine:\n    kind = 'mine'\n    needs = frozenset()\n    def draft(self, material, rng): return None\n")
    w.set("method", {"name": "zppo", "reformulations": ["mine.py:Mine"]})


@case("a reward function's file does not exist")
def _(w: World) -> None:
    w.set("grading.reward", "none.py:score")


@case("a reward function cannot be imported")
def _(w: World) -> None:
    w.write("reward.py", "raise RuntimeError('not ready')\n")
    w.set("grading.reward", "reward.py:score")


@case("a reward function in the form of another trainer")
def _(w: World) -> None:
    w.write("reward.py", "def score(reward_input):\n    return {'overall': 1.0}\n")
    w.set("grading.reward", "reward.py:score")


@case("a reward function with its arguments in another order")
def _(w: World) -> None:
    w.write("reward.py", "def score(prompt, response):\n    return 1.0\n")
    w.set("grading.reward", "reward.py:score")


@case("a reward function that asks for a column")
def _(w: World) -> None:
    w.write("reward.py", "def score(completions, task, **columns):\n    return [1.0 for _ in task]\n")
    w.set("grading.reward", "reward.py:score")


@case("a reward function that is a class with arguments")
def _(w: World) -> None:
    w.write("reward.py", "class score:\n    def __init__(self, limit): ...\n    def __call__(self, completion, question): ...\n")
    w.set("grading.reward", "reward.py:score")


@case("not as many weights as reward functions")
def _(w: World) -> None:
    w.set("grading.reward", ["a.py:f", "a.py:g"])
    w.set("grading.reward_weights", [1])


@case("a reward function's file lacks the function")
def _(w: World) -> None:
    w.write("reward.py", "def other(completion, question): return True\n")
    w.set("grading.reward", "reward.py:score")


# --- data -----------------------------------------------------------------------------------------------------------


@case("the data file does not exist")
def _(w: World) -> None:
    w.set("data.train", "none.jsonl")


@case("the corpus of the paper is not built")
def _(w: World) -> None:
    w.set("data.train", "data/zppo-77k")


@case("a filter that cannot be read")
def _(w: World) -> None:
    w.set("data.filters", ["pass_rate = 0.5"])


@case("a filter of a column that there is not")
def _(w: World) -> None:
    w.set("data.filters", ["pass_rate <= 0.5"])


@case("a filter that compares what has no order")
def _(w: World) -> None:
    w.questions({"prompt": "a", "answer": 1, "rate": "high"})
    w.set("data.filters", ["rate <= 0.5"])


@case("filters that no row passes")
def _(w: World) -> None:
    w.questions({"prompt": "a", "answer": 1, "rate": 0.7}, {"prompt": "b", "answer": 1, "rate": None})
    w.set("data.filters", ["rate <= 0.5"])


@case("a source with a weight beside one without")
def _(w: World) -> None:
    w.set("data.train", [{"source": "train.jsonl", "weight": 1}, {"source": "lab:unreachable/train"}])


@case("two sources with one name")
def _(w: World) -> None:
    w.set("data.train", [{"source": "train.jsonl", "name": "a"}, {"source": "lab:unreachable/train", "name": "a"}])


@case("a list of no sources")
def _(w: World) -> None:
    w.set("data.train", [])


@case("a source's revision, and no hub set")
def _(w: World) -> None:
    w.set("data.train", [{"source": "train.jsonl", "revision": "v1"}])


@case("a measurement with a teacher, and none in the recipe")
def _(w: World) -> None:
    w.command = ["data", "measure", w.arguments()[1], "--teacher", f"--out={w.folder / 'm'}"]


@case("a measurement of no answers")
def _(w: World) -> None:
    w.command = ["data", "measure", w.arguments()[1], "--n=0", f"--out={w.folder / 'm'}"]


@case("a measurement into one file, of several sources")
def _(w: World) -> None:
    w.set("data.train", [{"source": "train.jsonl"}, {"source": "lab:unreachable/train"}])
    w.command = ["data", "measure", w.arguments()[1], f"--out={w.folder / 'm.jsonl'}"]


@case("a measurement over the questions themselves")
def _(w: World) -> None:
    w.write("train-answers.jsonl", "")
    w.command = ["data", "measure", w.arguments()[1], f"--out={w.folder / 'train.jsonl'}"]


@case("a measurement into the folder of the questions")
def _(w: World) -> None:
    (w.folder / "set").mkdir()
    w.write("set/train.jsonl", '{"prompt": "a", "answer": 1}\n')
    w.set("data.train", "set")
    w.command = ["data", "measure", w.arguments()[1], f"--out={w.folder / 'set'}"]


@case("a measurement over another file")
def _(w: World) -> None:
    w.command = ["data", "measure", w.arguments()[1], f"--out={w.write('mine.jsonl', 'x')}"]


@case("a measurement into a file of a kind that is not written")
def _(w: World) -> None:
    w.command = ["data", "measure", w.arguments()[1], f"--out={w.folder / 'm.csv'}"]


@case("a measurement beside answers that are none")
def _(w: World) -> None:
    (w.folder / "m").mkdir()
    w.write("m/answers.jsonl", "{}\n")
    w.command = ["data", "measure", w.arguments()[1], f"--out={w.folder / 'm'}"]


@case("a file of a kind that is not read")
def _(w: World) -> None:
    w.write("train.txt", "1+1?")
    w.set("data.train", "train.txt")


@case("a line that is no JSON")
def _(w: World) -> None:
    w.questions({"prompt": "a", "answer": 1}, '{"prompt": "b", "answer": }')


@case("a file that is not UTF-8")
def _(w: World) -> None:
    w.write("train.jsonl", b'{"prompt": "caf\xe9", "answer": 1}\n')


@case("a column is missing")
def _(w: World) -> None:
    w.questions({"question": "a", "solution": 1})


@case("the answer's column is missing")
def _(w: World) -> None:
    w.questions({"prompt": "a", "solution": 1})


@case("a file without rows")
def _(w: World) -> None:
    w.questions()


@case("an empty prompt")
def _(w: World) -> None:
    w.questions({"prompt": " ", "answer": 1})


@case("an id that stands twice")
def _(w: World) -> None:
    w.questions({"prompt": "a", "answer": 1, "id": "x"}, {"prompt": "b", "answer": 2, "id": "x"})


@case("an answer of the wrong type")
def _(w: World) -> None:
    w.questions({"prompt": "a", "answer": True})


@case("several answers, and not what they mean")
def _(w: World) -> None:
    w.questions({"prompt": "a", "answer": ["1", "2"]})


@case("a meaning of several answers that does not exist")
def _(w: World) -> None:
    w.questions({"prompt": "a", "answer": ["1", "2"], "answer_list": "all"})


@case("no answer after the mark")
def _(w: World) -> None:
    w.set("data.answer_after", "####")


@case("a grading that does not exist")
def _(w: World) -> None:
    w.questions({"prompt": "a", "answer": 1, "grading": "llm"})


@case("questions that want a judge, and nobody who could")
def _(w: World) -> None:
    w.questions({"prompt": "a", "answer": 1, "grading": "judge"})


@case("a last turn that is not the user's")
def _(w: World) -> None:
    w.questions({"messages": [{"role": "assistant", "content": "b"}], "answer": 1})


@case("every prompt is too long")
def _(w: World) -> None:
    w.set("data.max_prompt_tokens", 5)


@case("more examples than there are questions for")
def _(w: World) -> None:
    w.set("data.examples", 9)


@case("a column of worked solutions that is not there")
def _(w: World) -> None:
    w.set("data.examples", 1)
    w.set("data.columns.solution", "steps")


@case("an example whose answer cannot be read")
def _(w: World) -> None:
    w.set("data.examples", 1)
    w.set("grading.answer_from", "(?:so|thus) ([a-z]+)")


@case("a place of the answer that is none")
def _(w: World) -> None:
    w.set("grading.answer_from", "boxes")


@case("images, and a student that reads text only")
def _(w: World) -> None:
    w.write("a.png", picture())
    w.questions({"prompt": "a", "answer": 1, "images": ["a.png"]})


@case("the model's own image token in a question")
def _(w: World) -> None:
    shutil.rmtree(w.student)
    make_seeing(w.student)
    w.write("a.png", picture())
    w.set("data.images", PIXELS)
    w.questions({"prompt": "a", "answer": 1, "images": "a.png"}, {"prompt": "what is <|image_pad|>?", "answer": 1})


@case("images in a column that nobody looks at")
def _(w: World) -> None:
    w.write("a.png", picture())
    w.questions({"prompt": "a", "answer": 1, "image": "a.png"})


@case("a misspelt column of images")
def _(w: World) -> None:
    w.questions({"prompt": "a", "answer": 1, "images": ["a.png"]})
    w.set("data.columns", {"images": "imagge"})


@case("an image that is not there")
def _(w: World) -> None:
    w.questions({"prompt": "a", "answer": 1, "images": ["a.png"]})


@case("an image that is broken")
def _(w: World) -> None:
    w.write("a.png", noise((32, 32))[:-200])
    w.questions({"prompt": "a", "answer": 1, "images": ["a.png"]})


@case("a file that is no image")
def _(w: World) -> None:
    w.write("a.svg", "<svg/>")
    w.questions({"prompt": "a", "answer": 1, "images": "a.svg"})


@case("an image that is too large")
def _(w: World) -> None:
    w.write("a.png", bomb(30_000, 20_000))
    w.questions({"prompt": "a", "answer": 1, "images": "a.png"})


@case("an image on the web")
def _(w: World) -> None:
    w.questions({"prompt": "a", "answer": 1, "images": "https://example.org/a.png"})


@case("another number of images than of their places")
def _(w: World) -> None:
    w.write("a.png", picture())
    w.questions({"prompt": "is <image> in <image>?", "answer": 1, "images": ["a.png"]})


@case("image parts without images")
def _(w: World) -> None:
    w.questions({"messages": [{"role": "user", "content": [{"type": "image"}]}], "answer": 1})


@case("a CSV row with too many cells")
def _(w: World) -> None:
    w.write("train.csv", "prompt,answer\n1, 2 or 3?,2\n")
    w.set("data.train", "train.csv")


@case("an answer that is none of the choices")
def _(w: World) -> None:
    w.questions({"prompt": "Capital of France?", "choices": ["Rome", "Paris"], "answer": 2})


@case("a row in the layout of another trainer")
def _(w: World) -> None:
    w.questions({"instruction": "Add.", "input": "1 and 1", "output": "2"})


@case("a line that is a bare list")
def _(w: World) -> None:
    w.write("train.jsonl", '["1 and 1?", "2"]\n')


@case("cut cells of the hub's viewer")
def _(w: World) -> None:
    w.write("train.json", '{"rows": [{"row_idx": 0, "row": {"prompt": "1 a"}, "truncated_cells": ["prompt"]}]}')
    w.set("data.train", "train.json")


@case("a JSON file of another shape")
def _(w: World) -> None:
    w.write("train.json", '{"q1": {"prompt": "a", "answer": 1}, "q2": {"prompt": "b", "answer": 2}}')
    w.set("data.train", "train.json")


@case("a file of another kind than its name says")
def _(w: World) -> None:
    w.write("train.csv", b"PK\x03\x04")
    w.set("data.train", "train.csv")


@case("a packed file that is cut off")
def _(w: World) -> None:
    w.write("train.jsonl.gz", gzip.compress(b'{"prompt": "a", "answer": 1}\n' * 9)[:-9])
    w.set("data.train", "train.jsonl.gz")


@case("a file that is no parquet")
def _(w: World) -> None:
    w.write("train.parquet", "prompt,answer")
    w.set("data.train", "train.parquet")


@case("a pointer of git-lfs in place of a data file")
def _(w: World) -> None:
    w.write("train.parquet", LFS_POINTER)
    w.set("data.train", "train.parquet")


@case("a folder without data files")
def _(w: World) -> None:
    (w.folder / "empty").mkdir()
    w.set("data.train", "empty")


@case("a folder without the split")
def _(w: World) -> None:
    (w.folder / "data").mkdir()
    shutil.copy(w.folder / "train.jsonl", w.folder / "data" / "train.jsonl")
    w.set("data.train", "data")
    w.set("data.eval", "data")


@case("a hub set without a network")
def _(w: World) -> None:
    w.set("data.train", "hub:owner/name")


@case("a hub set by a name that cannot be")
def _(w: World) -> None:
    w.set("data.train", "hub:owner/name/more")


@case("streaming without a limit")
def _(w: World) -> None:
    w.set("data.train", "hub:owner/name")
    w.set("data.streaming", True)


@case("an unknown kind of source")
def _(w: World) -> None:
    w.set("data.train", "hab:owner/name")


@case("a generated task that cannot be graded")
def _(w: World) -> None:
    w.set("data.train", "reasoning_gym:countdown")


@case("generated questions that overlap")
def _(w: World) -> None:
    w.set("data.train", "reasoning_gym:aiw?size=10")
    w.set("data.eval", "reasoning_gym:aiw?size=5&seed=9")


def _build(w: World, *more: str) -> None:
    w.command = ["data", "build", "zppo-77k", f"--out={w.folder / 'out'}", f"--mmfinereason={w.folder / 'vero'}", *more]


@case("a copy of a source of the corpus that is no folder")
def _(w: World) -> None:
    _build(w, f"--vero={w.folder / 'none'}")


@case("a source of the corpus without a column of the mapping")
def _(w: World) -> None:
    path = w.folder / "vero" / "stem-tqa" / "train.parquet"
    path.parent.mkdir(parents=True)
    pq.write_table(pa.table({"question": ["1 + 1?"]}), path)
    _build(w, f"--vero={w.folder / 'vero'}")


@case("a mapping with a key that does not exist")
def _(w: World) -> None:
    text = mapping_text("zppo-77k").replace("min_image_side", "min_side")
    _build(w, f"--vero={w.folder / 'vero'}", f"--mapping={w.write('mine.yaml', text)}")


@case("a corpus into a folder that is not empty")
def _(w: World) -> None:
    (w.folder / "out").mkdir()
    w.write("out/mine.txt", "mine")
    _build(w, f"--vero={w.folder / 'vero'}")


# --- models ---------------------------------------------------------------------------------------------------------


@case("a folder that does not exist or holds no checkpoint")
def _(w: World) -> None:
    w.set("student.model", "./none")


@case("a hub model without a network")
def _(w: World) -> None:
    w.set("student.model", "owner/name")


@case("an unknown bundled model")
def _(w: World) -> None:
    w.set("student.model", "lab:nowhere/student")


@case("config.json is no JSON")
def _(w: World) -> None:
    (w.student / "config.json").write_text('{"model_type": ')


@case("config.json names no architecture")
def _(w: World) -> None:
    w.config(model_type=None, architectures=None)


@case("an unknown architecture")
def _(w: World) -> None:
    w.config(model_type="qwen99", architectures=["Qwen99ForCausalLM"])


@case("an architecture that does not write text")
def _(w: World) -> None:
    w.config(model_type="vit", architectures=["ViTModel"])


@case("an architecture whose code comes with the checkpoint")
def _(w: World) -> None:
    w.config(model_type="own", auto_map={"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"})
    (w.student / "own.py").write_text("raise SystemExit('the code ran')")


@case("no weights")
def _(w: World) -> None:
    (w.student / "model.safetensors").unlink()


@case("weights that are cut off")
def _(w: World) -> None:
    path = w.student / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


@case("a pointer of git-lfs in place of the weights")
def _(w: World) -> None:
    (w.student / "model.safetensors").write_text(LFS_POINTER)


@case("weights that are no safetensors")
def _(w: World) -> None:
    (w.student / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 40) + b"{}")


@case("weights of other sizes than config.json says")
def _(w: World) -> None:
    w.config(hidden_size=48)


@case("weights that lack a tensor")
def _(w: World) -> None:
    from safetensors.torch import load_file, save_file

    path = w.student / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path, {"format": "pt"})


@case("no tokenizer")
def _(w: World) -> None:
    for path in w.student.glob("*token*"):
        path.unlink()


@case("tokenizer.json is broken")
def _(w: World) -> None:
    (w.student / "tokenizer.json").write_text("{")


@case("a tokenizer with more tokens than the model")
def _(w: World) -> None:
    from safetensors.torch import load_file, save_file

    path = w.student / "model.safetensors"
    names = ("model.embed_tokens.weight", "lm_head.weight")
    save_file({k: (v[:300].contiguous() if k in names else v) for k, v in load_file(path).items()}, path, {"format": "pt"})
    w.config(vocab_size=300)


@case("no end token")
def _(w: World) -> None:
    w.config(eos_token_id=None)
    (w.student / "generation_config.json").unlink()
    path = w.student / "tokenizer_config.json"
    data = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in data.items() if key != "eos_token"}))


@case("a teacher whose weights are cut off")
def _(w: World) -> None:
    w.with_teacher()
    shutil.copytree(w.student, w.folder / "teacher")
    path = w.folder / "teacher" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    w.set("teacher.model", "./teacher")


@case("a context that is too small")
def _(w: World) -> None:
    w.config(max_position_embeddings=64)
    w.set("rollout.max_new_tokens", 60)


@case("a device that does not exist")
def _(w: World) -> None:
    w.with_teacher()
    w.set("teacher.device", "gpu:0")


@case("a model on a GPU without the kernels of its layers")
def _(w: World) -> None:
    w.with_teacher()
    w.set("teacher.model", "./linear")
    w.set("teacher.device", "cuda:0")
    (w.folder / "linear").mkdir()
    w.write("linear/config.json", json.dumps({"model_type": "qwen3_5_text", "architectures": ["Qwen3_5ForCausalLM"]}))


@case("an attention implementation that does not exist")
def _(w: World) -> None:
    w.set("student.attention", "flush")


@case("vLLM as the engine, and it is not installed")
def _(w: World) -> None:
    w.set("rollout.engine", "vllm")


@case("a student on a Tinker server, and its SDK is not installed")
def _(w: World) -> None:
    w.set("student.tinker", {})
    w.set("train.lora", {})
    w.set("eval", {"temperature": 0})


@case("a vLLM server, and no vLLM here to send weights by")
def _(w: World) -> None:
    w.set("rollout.engine", "vllm")
    w.set("rollout.vllm.mode", "server")


@case("a vLLM server that is named twice")
def _(w: World) -> None:
    w.set("rollout.engine", "vllm")
    w.set("rollout.vllm", {"mode": "server", "base_url": ["http://localhost:1", "http://localhost:1"], "weights_folder": "weights"})


# --- templates ------------------------------------------------------------------------------------------------------


@case("a chat template's file does not exist")
def _(w: World) -> None:
    w.set("student.template", "none.jinja")


@case("a chat template with a syntax error")
def _(w: World) -> None:
    w.write("chat.jinja", "{% for message in messages %}{{ message.content }}")
    w.set("student.template", "chat.jinja")


@case("a chat template that refuses a system turn")
def _(w: World) -> None:
    w.write(
        "chat.jinja",
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}{{ m.content }}{% endfor %}",
    )
    w.set("student.template", "chat.jinja")
    w.questions({"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}], "answer": 1})


@case("a prompt template under a name that nothing uses")
def _(w: World) -> None:
    w.write("mine.jinja", "words")
    w.set("prompts.bqc", "mine.jinja")


@case("a prompt template's file does not exist")
def _(w: World) -> None:
    w.set("prompts.closing", "none.jinja")


@case("a prompt template with a syntax error")
def _(w: World) -> None:
    w.write("closing.jinja", "Think.\n{% if %}\n")
    w.set("prompts.closing", "closing.jinja")


@case("a prompt template with a variable that it is not given")
def _(w: World) -> None:
    w.write("bcq.jinja", "{{ candidates }}\n{{ solution }}\n")
    w.set("prompts.bcq", "bcq.jinja")


# --- endpoints ------------------------------------------------------------------------------------------------------


@cache
def open_server() -> Server:
    """A server that serves the model `tiny` to everybody."""
    server = Server()
    atexit.register(server.kill)
    return server


@cache
def locked_server() -> Server:
    """The same for those who have the key."""
    server = Server(key="sk-0123456789")
    atexit.register(server.kill)
    return server


def at(w: World, url: str, **teacher: Any) -> None:
    w.set("method", "zppo")
    w.set("teacher", {"model": "tiny", "base_urls": [url], "key_env": "ZPPO_NO_SUCH_KEY"} | teacher)


@case("a teacher on a server that reads no images")
def _(w: World) -> None:
    shutil.rmtree(w.student)
    make_seeing(w.student)
    w.write("a.png", picture())
    w.questions(*({"prompt": "<image> or <image>?", "answer": 1, "images": ["a.png", "a.png"]} for _ in range(4)))
    server = open_server()
    server.control(always={"kind": "status", "status": 400, "body": "no multimodal model", "image": True})
    at(w, server.url, model="tiny")
    w.set("data.images", PIXELS)


@case("an address that is none")
def _(w: World) -> None:
    at(w, "localhost:8000/v1")


@case("an address with a password")
def _(w: World) -> None:
    at(w, "http://me:secret@localhost:8000/v1")


@case("a key instead of the name of its variable")
def _(w: World) -> None:
    at(w, "http://localhost:8000/v1", key_env="sk-0123456789")


@case("a way of asking that is gone")
def _(w: World) -> None:
    w.with_teacher()
    w.set("teacher.ask", "eager")


@case("a teacher in this process that shall be asked ahead")
def _(w: World) -> None:
    w.with_teacher()
    w.set("teacher.ask", "ahead")


@case("a setting that only a teacher in this process has")
def _(w: World) -> None:
    at(w, "http://localhost:8000/v1", device="cuda:1")


@case("request fields for a teacher in this process")
def _(w: World) -> None:
    w.with_teacher()
    w.set("teacher.compression.extra_body", {"seed": None})


@case("distillation from a teacher on a server")
def _(w: World) -> None:
    at(w, "http://localhost:8000/v1")
    w.set("method", "on-distill")


@case("nobody answers at the address")
def _(w: World) -> None:
    at(w, "http://127.0.0.1:9/v1")


@case("a SOCKS proxy without its package")
def _(w: World) -> None:
    w.env = {"ALL_PROXY": "socks5://proxy.example:1080"}
    at(w, "http://teacher.example/v1")


@case("a proxy of another kind")
def _(w: World) -> None:
    w.env = {"HTTP_PROXY": "ftp://proxy.example"}
    at(w, "http://teacher.example/v1")


@case("no key where one is needed")
def _(w: World) -> None:
    at(w, "https://api.openai.com/v1")


@case("a key that the server refuses")
def _(w: World) -> None:
    at(w, locked_server().url)


@case("a model that the server does not have")
def _(w: World) -> None:
    at(w, open_server().url, model="huge")


@case("an address without its path")
def _(w: World) -> None:
    at(w, open_server().url.removesuffix("/v1"))


@case("request fields that the server refuses")
def _(w: World) -> None:
    open_server().control({"kind": "status", "status": 422, "body": "unknown field top_k"})
    at(w, open_server().url)
    w.set("teacher.rollout", {"top_k": 5})


@case("a server that sends requests on to another origin")
def _(w: World) -> None:
    open_server().control(always={"kind": "status", "status": 307, "headers": {"Location": "https://elsewhere.example/v1?key=a"}})
    at(w, open_server().url)


# --- several processes ----------------------------------------------------------------------------------------------


def _accelerate(w: World, **more: str) -> None:
    """The environment of one process of `accelerate launch`."""
    w.env = {"RANK": "0", "WORLD_SIZE": "1", "ACCELERATE_MIXED_PRECISION": "no", **more}


@case("a recipe that shards with DeepSpeed")
def _(w: World) -> None:
    w.set("train.sharding", "zero3")


@case("accelerate launch on CPUs, which starts one process")
def _(w: World) -> None:
    w.env = {"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1"}


@case("sharding, and one process runs")
def _(w: World) -> None:
    w.set("train.sharding", "fsdp2")


@case("the optimizer on the processor, and nothing is sharded")
def _(w: World) -> None:
    w.set("train.offload", True)


@case("groups of processes, and nothing is sharded")
def _(w: World) -> None:
    w.set("train.shard_within", 8)


@case("groups that the processes cannot be split into")
def _(w: World) -> None:
    w.set("train.sharding", "fsdp2")
    w.set("train.shard_within", 4)
    w.env = {"RANK": "0", "WORLD_SIZE": "6"}


@case("sharding, and an optimizer whose state cannot be sharded")
def _(w: World) -> None:
    w.set("train.sharding", "fsdp2")
    w.set("train.optimizer", "adamw-8bit")


@case("sharding, and a student that teaches itself")
def _(w: World) -> None:
    w.set("train.sharding", "fsdp2")
    w.set("method", "sdpo")


@case("an accelerate configuration with Megatron-LM")
def _(w: World) -> None:
    _accelerate(w, ACCELERATE_USE_MEGATRON_LM="true")


@case("an accelerate configuration with DeepSpeed")
def _(w: World) -> None:
    _accelerate(w, ACCELERATE_USE_DEEPSPEED="true")


@case("an accelerate configuration with FSDP 1")
def _(w: World) -> None:
    _accelerate(w, ACCELERATE_USE_FSDP="true", FSDP_VERSION="1")


@case("an accelerate configuration with gradient accumulation")
def _(w: World) -> None:
    _accelerate(w, ACCELERATE_GRADIENT_ACCUMULATION_STEPS="4")


@case("an accelerate configuration with another precision")
def _(w: World) -> None:
    _accelerate(w, ACCELERATE_MIXED_PRECISION="fp16")


@case("a number of processes that is none")
def _(w: World) -> None:
    w.env = {"RANK": "0", "WORLD_SIZE": "two"}


def _srun(w: World, **more: str) -> None:
    """The environment of the first of two processes that srun started."""
    w.env = {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "gpu[1-2]", **more}


@case("srun, and a RANK that was set by hand")
def _(w: World) -> None:
    _srun(w, RANK="1")


@case("srun starts a torchrun for every GPU")
def _(w: World) -> None:
    _srun(w, RANK="0", WORLD_SIZE="2", GROUP_WORLD_SIZE="1")


@case("srun on several nodes, and a MASTER_ADDR that each has")
def _(w: World) -> None:
    _srun(w, MASTER_ADDR="localhost", SLURM_NNODES="2")


@case("srun in a heterogeneous job")
def _(w: World) -> None:
    _srun(w, SLURM_HET_SIZE="2")


@case("srun without a list of hosts")
def _(w: World) -> None:
    _srun(w, SLURM_STEP_NODELIST="")


@case("a number from SLURM that is none")
def _(w: World) -> None:
    _srun(w, SLURM_PROCID="7")


@case("a command that runs in one process, started as several")
def _(w: World) -> None:
    w.env = {"RANK": "0", "WORLD_SIZE": "2"}
    w.command = ["recipes"]


# --- folders of runs ------------------------------------------------------------------------------------------------


@case("the output folder holds a run")
def _(w: World) -> None:
    w.output.mkdir()
    (w.output / "recipe.yaml").write_text("seed: 0\n")


@case("the output folder is not empty")
def _(w: World) -> None:
    w.output.mkdir()
    (w.output / "notes.txt").write_text("mine")


@case("the output folder is a file")
def _(w: World) -> None:
    w.output.write_text("mine")


@case("the output folder lies below a file")
def _(w: World) -> None:
    w.write("file", "mine")
    w.set("output", str(w.folder / "file" / "run"))


@case("the output folder cannot be written")
def _(w: World) -> None:
    (w.folder / "locked").mkdir(mode=0o555)
    w.set("output", str(w.folder / "locked" / "run"))


@case("nothing to resume")
def _(w: World) -> None:
    w.command = ["resume", str(w.output)]


@case("nothing to push")
def _(w: World) -> None:
    w.command = ["push", str(w.output), "--repo", "mine"]


@case("a run whose recipe is damaged")
def _(w: World) -> None:
    w.output.mkdir()
    (w.output / "recipe.yaml").write_text("student: {model\n")
    w.command = ["resume", str(w.output)]


# --- evaluations ----------------------------------------------------------------------------------------------------


@case("an unknown benchmark")
def _(w: World) -> None:
    w.command = ["eval", str(w.student), "--suite", "MMLUX"]


@case("a benchmark of one's own that does not say what it asks")
def _(w: World) -> None:
    (w.folder / "my-bench.yaml").write_text("source: rows.jsonl\n")
    w.command = ["eval", str(w.student), "--suite", f"AIME25,{w.folder / 'my-bench.yaml'}"]


@case("an evaluation without a judge")
def _(w: World) -> None:
    w.command = ["eval", str(w.student)]


@case("a judge that nobody serves")
def _(w: World) -> None:
    w.command = ["eval", str(w.student), "--judge", "http://127.0.0.1:9/v1", "--output", str(w.output)]


@case("an evaluation of no checkpoint")
def _(w: World) -> None:
    w.command = ["eval", str(w.folder / "none"), "--judge", "http://127.0.0.1:9/v1", "--output", str(w.output)]


@case("clips of no benchmark")
def _(w: World) -> None:
    w.command = ["eval", "fetch", "--clips", str(w.output)]


@case("a table of what is no evaluation")
def _(w: World) -> None:
    w.command = ["eval", "table", str(w.student)]


@case("a comparison of one evaluation")
def _(w: World) -> None:
    w.command = ["eval", "compare", "a.json"]
