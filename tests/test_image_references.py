"""What a run keeps of images are references: nothing grows with pixels, and a file that has changed since is said."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from accelerate.state import AcceleratorState

from conftest import make_tiny
from pictures import noise
from seeing import PIXELS, make_seeing
from test_resume import collected_step
from test_stopped_updates import nth_call_raises
from zppo.cli import main
from zppo.config.recipe import load_recipe
from zppo.core.replay import PromptReplayBuffer
from zppo.core.types import IMAGE, ImageRef, Message, Question
from zppo.images.store import keep
from zppo.rollout.data import in_both
from zppo.rollout.run_data import unseen
from zppo.runs import checkpoint
from zppo.train.mid_step import MidStep
from zppo.train.provenance import changes_since, origin_of
from zppo.train.trainer import Trainer

STATE = ("state.json", "halfway.json", "halfway.safetensors")


def asked(name: str, *images: ImageRef, text: str = "?") -> Question:
    return Question(name, (Message("user", text),), "1", images)


def test_a_buffer_does_not_grow_with_pixels(tmp_path: Path) -> None:
    def size(side: int) -> int:
        buffer = PromptReplayBuffer(100, 0.5, seed=0)
        questions = [asked(str(i), keep(noise((side, side), i), tmp_path)) for i in range(10)]
        buffer.update([(question, 0.0) for question in questions], step=1)
        again = PromptReplayBuffer(100, 0.5, seed=0)
        again.load_state_dict(json.loads(json.dumps(buffer.state_dict())))
        assert again.questions() == questions
        return len(json.dumps(buffer.state_dict()))

    assert size(8) == size(256)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight questions, half of them with large pictures."""
    folder = tmp_path_factory.mktemp("references")
    make_seeing(folder / "student", "qwen3_vl")
    rows: list[dict[str, Any]] = [{"prompt": f"What is {i} plus 1?", "answer": i + 1} for i in range(8)]
    for i in range(4):
        (folder / f"{i}.png").write_bytes(noise((320, 240), i))
        rows[i]["images"] = [f"{i}.png"]
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    settings = {
        "method": "grpo-replay",
        "student": {"model": "student"},
        "data": {"train": "questions.jsonl", "images": PIXELS},
        "rollout": {"batch_size": 4, "group_size": 2, "max_new_tokens": 4},
        "train": {"steps": 2, "device": "cpu", "minibatches": 1, "checkpoint_every": 1},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    return folder / "recipe.yaml"


@pytest.mark.slow
def test_a_checkpoint_holds_references_and_looks_behind_them_when_it_is_resumed(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def zppo(*argv: object) -> tuple[int, str]:
        AcceleratorState._reset_state(True)
        status = main([str(a) for a in argv])
        said = capsys.readouterr()
        return status, " ".join((said.out + said.err).split())

    run, pictures = tmp_path / "run", sorted(recipe.parent.glob("*.png"))
    with monkeypatch.context() as patch:
        nth_call_raises(patch, Trainer, "step", 2)
        assert zppo("train", recipe, f"--output={run}")[0] != 0
    newest = checkpoint.existing(run)[-1]
    kept = [newest / name for name in STATE if (newest / name).exists()]
    assert sum(path.stat().st_size for path in kept) < pictures[0].stat().st_size / 4
    logged = pq.read_table(run / "rollouts" / "step-000001.parquet").to_pylist()
    seen = next(row for row in logged if row["images"])
    assert seen["images"] == [str(recipe.parent / Path(seen["images"][0]).name)]
    assert re.search(r"<\|image_pad\|>\[x \d+\]", seen["prompt"]) and seen["prompt"].count("<|image_pad|>") == 1

    buffered = json.loads((newest / "state.json").read_text())["buffer"]["entries"]
    [path, *_] = [Path(uri) for question, *_ in buffered for uri, _ in question["images"]]
    data = path.read_bytes()
    path.write_bytes(noise((320, 240), 99))
    status, said = zppo("resume", run)
    assert status == 2 and f"holds questions with images: the image {path} is not the one" in said
    assert "put the old file back, or start a new run" in said
    path.unlink()
    status, said = zppo("resume", run)
    assert status == 2 and f"{path} cannot be read (No such file" in said
    path.write_bytes(data)

    elsewhere = tmp_path / "elsewhere"  # the data's folder is moved, and the recipe of the run says so
    elsewhere.mkdir()
    for file in (*pictures, recipe.parent / "questions.jsonl"):
        shutil.copy(file, elsewhere)
    for picture in pictures:
        picture.unlink()
    status, said = zppo("resume", run)
    assert status == 2 and "cannot be read" in said
    text = (run / "recipe.yaml").read_text(encoding="utf-8")
    (run / "recipe.yaml").write_text(text.replace(str(recipe.parent / "questions"), str(elsewhere / "questions")))
    status, said = zppo("resume", run)
    assert status == 0, said
    state = json.loads((checkpoint.existing(run)[-1] / "state.json").read_text())
    kept_at = [Path(uri).parent for question, *_ in state["buffer"]["entries"] for uri, _ in question["images"]]
    assert kept_at and set(kept_at) == {elsewhere}


def test_a_stopped_step_finds_its_images_where_they_are_now(tmp_path: Path) -> None:
    collected_step().write(tmp_path)
    found = MidStep.read(tmp_path, 4, {"00": "/new/a.png", "11": "/new/b.png"})
    assert found is not None
    prompts = [g.prompt for g in (*found.rollouts.plain, *found.rollouts.reformulated)]
    assert {p.images for p in prompts} == {p.question.images for p in prompts} == {(ImageRef("/new/a.png", "00"),)}


def test_images_that_have_changed_are_said_and_moved_ones_are_not(tmp_path: Path, recipe: Path) -> None:
    settings = load_recipe(recipe, [])
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(make_tiny(tmp_path / "tiny"))

    def origin(*images: ImageRef) -> dict[str, Any]:
        return origin_of(settings, [asked("a", *images)], config, 1)

    one, moved, other = ImageRef("a.png", "0a"), ImageRef("b.png", "0a"), ImageRef("a.png", "0b")
    assert changes_since(origin(one), origin(moved), tmp_path, mid_step=False) == []
    assert changes_since(origin(one), origin(other), tmp_path, mid_step=False) == [
        "the images of the training questions are not the same as before"
    ]
    [note] = changes_since(origin(one), origin(one, one), tmp_path, mid_step=False)[:1]
    assert note == "the training questions are not the same as before"
    old = {key: value for key, value in origin(one).items() if key != "images"}  # from before there were images
    assert changes_since(old, origin(one), tmp_path, mid_step=False) == []


def test_questions_about_other_images_are_other_questions() -> None:
    one, other = ImageRef("a.png", "0a"), ImageRef("b.png", "0b")
    assert in_both([asked("a", one)], [asked("b", other)]) == ""
    assert "1 of 1 held-out" in in_both([asked("a", one)], [asked("b", ImageRef("copy.png", "0a"))])


def test_places_without_images_are_said() -> None:
    assert unseen([asked("a", text="?"), asked("b", ImageRef("a", ""), text=IMAGE)]) == ""
    assert "1 of 2 questions hold <image> and have no image ('b', for one)" in unseen([asked("a"), asked("b", text=IMAGE)])
