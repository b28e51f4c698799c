"""Transcripts show the pictures, small, while the model is sent them as they are; rows name their files."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from eval_server import scripted
from test_evaluate_run import write_clip
from zppo import cli
from zppo.evals.media import small_picture
from zppo.images.store import as_url

pytestmark = pytest.mark.slow


def sizes(message: Any) -> list[tuple[int, int]]:
    """Of the pictures of a message in a log."""
    return [sizes_of(part.image) for part in message.content if part.type == "image"]


def sizes_of(url: str) -> tuple[int, int]:
    return Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).size


def logged(out: Path) -> list[Any]:
    """The samples of all transcripts, oldest first, what stands in attachments put in its place."""
    from inspect_ai.log import read_eval_log

    logs = sorted((out / "eval" / "logs").glob("*.eval"), key=lambda path: path.stat().st_mtime_ns)
    return [sample for path in logs for sample in read_eval_log(str(path), resolve_attachments=True).samples or ()]


def benchmark(folder: Path, rows: list[dict[str, Any]]) -> Path:
    folder.mkdir()
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "mine.yaml").write_text("source: rows.jsonl\nkind: choice\n")
    noise = np.random.default_rng(0).integers(0, 255, (800, 1000, 3), np.uint8)
    Image.fromarray(noise).save(folder / "large.png")
    return folder / "mine.yaml"


@pytest.mark.long
def test_a_transcript_shows_a_small_picture_and_the_model_gets_the_whole_one(tmp_path: Path) -> None:
    row = {"prompt": "Which, <image> or <image>?", "options": ["x", "y"], "answer": "A", "images": ["large.png", "large.png"]}
    path, out = benchmark(tmp_path / "mine", [row]), tmp_path / "out"
    with scripted(lambda body: r"\boxed{A}", "m") as model, scripted(lambda body: "", "j") as judge:
        arguments = ["eval", model.url, "--suite", str(path), "--judge", judge.url, "--output", str(out)]
        assert cli.main(arguments) == 0
        (body,) = model.requests
        assert cli.main([*arguments, "--samples", "2"]) == 0 and len(model.requests) == 2
    whole = [part["image_url"]["url"] for part in body["messages"][-1]["content"] if part["type"] == "image_url"]
    assert [base64.b64decode(url.partition(",")[2]) for url in whole] == [(tmp_path / "mine" / "large.png").read_bytes()] * 2
    first, known, new = logged(out)
    for sample in (first, known, new):
        assert sizes(sample.messages[0]) == [(512, 410)] * 2
        assert [part.type for part in sample.messages[0].content] == ["text", "image", "text", "image", "text"]
        assert sample.messages[-1].text == r"\boxed{A}"
    log = max((out / "eval" / "logs").glob("*.eval"), key=lambda path: path.stat().st_size)
    assert log.stat().st_size < len(whole[0]) / 2
    (line, _) = (out / "eval/rows/mine.jsonl").read_text().splitlines()
    assert json.loads(line)["media"] == [str(tmp_path / "mine" / "large.png")] * 2


@pytest.mark.long
def test_a_picture_that_is_small_or_broken_is_shown_as_it_is() -> None:
    out = io.BytesIO()
    Image.new("RGBA", (700, 300), (9, 9, 9, 128)).save(out, "PNG")
    whole = out.getvalue()
    cut = as_url(whole[: len(whole) // 2], "image/png")
    assert small_picture(cut, 512) == cut
    assert small_picture(as_url(whole, "image/png"), 512) == as_url(whole, "image/png")  # one colour: shorter than any JPEG
    noise = io.BytesIO()
    Image.effect_noise((700, 300), 90).save(noise, "PNG")
    shown = small_picture(as_url(noise.getvalue(), "image/png"), 512)
    assert shown.startswith("data:image/jpeg;base64,") and sizes_of(shown) == (512, 219)


@pytest.mark.parametrize("video", ["frames", "file"])
@pytest.mark.long
def test_frames_are_shown_smaller_and_a_whole_clip_is_named(tmp_path: Path, video: str) -> None:
    (tmp_path / "data" / "videos").mkdir(parents=True)
    write_clip(tmp_path / "data" / "videos" / "a.mp4")
    (tmp_path / "clips.py").write_text(
        "from pathlib import Path\n"
        "from zppo.evals.item import Item, Message\n"
        "def clips():\n"
        f"    clip = Path({str(tmp_path / 'data' / 'videos' / 'a.mp4')!r})\n"
        "    yield Item('1', 'clips', (Message('user', 'Which?'),), 'A', 'choice', video=clip, options=('x', 'y'))\n"
    )
    out = tmp_path / "out"
    with scripted(lambda body: r"\boxed{A}", "m") as model, scripted(lambda body: "", "j") as judge:
        arguments = ["eval", model.url, "--suite", f"{tmp_path / 'clips.py'}:clips", "--judge", judge.url, "--output", str(out)]
        assert cli.main([*arguments, "--video", video, "--frames", "6"]) == 0
    content = model.requests[0]["messages"][-1]["content"]
    (sample,) = logged(out)
    if video == "file":
        assert [part["type"] for part in content] == ["video_url", "text"]
        assert sample.messages[0].content[0].text.startswith("[the whole clip, 0.0 MB]")
    else:
        assert [part["type"] for part in content] == ["image_url"] * 6 + ["text"]
        assert all(max(size) <= 256 for size in sizes(sample.messages[0])) and len(sizes(sample.messages[0])) == 6
    (line,) = (out / "eval/rows/clips.jsonl").read_text().splitlines()
    assert json.loads(line)["media"] == [str(tmp_path / "data" / "videos" / "a.mp4")]
