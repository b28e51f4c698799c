"""Made-up rows of the 31 benchmarks, each in its data set's own schema, with pictures and clips that are drawn here.

`python tests/evaluate_data.py` writes the golden renderings in `data/evaluate/golden` and the table in `docs/evaluation.md` anew: look
at the difference before committing it.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from zppo.evals.adapters.row import DatasetRow
from zppo.evals.benchmark import Benchmark
from zppo.evals.item import Item, conversation
from zppo.evals.registry import BENCHMARKS
from zppo.prompts import PromptBook

ROWS = Path(__file__).parent / "data" / "evaluate"
GOLDEN = ROWS / "golden"
DOCS = Path(__file__).parents[1] / "docs" / "evaluation.md"
MARK = "<!-- made by `python tests/evaluate_data.py` -->"
_COLOURS = {"red": (40, 40), "green": (48, 40), "blue": (40, 56), "wide": (120, 40)}
_CLIPS = ("videos/Art/0.mp4", "star/Charades_v1_480/ZS9XR.mp4", "data/fFjv93ACGo8.mp4")  # where the sets have them


def write_data(folder: Path) -> Path:
    """The folder with `<benchmark>.jsonl` of all 31, their pictures, frames and clips (bytes that nobody can decode)."""
    for path in ROWS.glob("*.jsonl"):
        shutil.copy(path, folder / path.name)
    (folder / "images").mkdir()
    for name, size in _COLOURS.items():
        Image.new("RGB", size, "gray" if name == "wide" else name).save(folder / "images" / f"{name}.png")
    (folder / "clips").mkdir()
    for number in range(3):
        frame = Image.new("RGB", (64, 48), "white")
        ImageDraw.Draw(frame).ellipse((8 + 16 * number, 16, 24 + 16 * number, 32), fill="black")
        frame.save(folder / "clips" / f"{number}.png")
    (folder / "subtitle").mkdir()
    (folder / "subtitle" / "another.srt").write_text("1\n00:00:01,000 --> 00:00:02,000\nHello.\n")
    for clip in _CLIPS:
        (folder / clip).parent.mkdir(parents=True, exist_ok=True)
        (folder / clip).write_bytes(b"no real clip")
    return folder


def rows(benchmark: Benchmark, folder: Path = Path("data")) -> list[DatasetRow]:
    """The made-up rows of a benchmark; media are relative to `folder`, which need not exist."""
    result = []
    for number, line in enumerate((ROWS / f"{benchmark.name}.jsonl").read_text(encoding="utf-8").splitlines(), 1):
        data: Mapping[str, Any] = json.loads(line)
        result.append(DatasetRow(benchmark.name, number, data, data.get("_config", ""), data.get("_split", ""), folder))
    return result


def items(benchmark: Benchmark, folder: Path = Path("data")) -> list[Item]:
    return [item for row in rows(benchmark, folder) for item in benchmark.adapter(row)]


def rendering(item: Item, book: PromptBook) -> str:
    """All that is asked and expected, as a text to be read."""
    media = " ".join(m.as_posix() if isinstance(m, Path) else f"<{len(m)} bytes>" for m in item.images)
    lines = [
        f"=== {item.id}",
        f"kind: {item.kind}",
        f"gold: {item.gold if isinstance(item.gold, str) else list(item.gold)}",
        f"images: {media or '-'}",
        f"frames: {len(item.frames)}, video: {item.video.as_posix() if item.video else '-'}, clip: {item.clip or '-'}",
        f"options: {list(item.options)}",
        f"facts: {json.dumps(dict(item.facts), ensure_ascii=False)}",
    ]
    lines += [f"--- {message.role}\n{message.content}" for message in conversation(item, book)]
    return "\n".join(lines) + "\n"


def golden(benchmark: Benchmark) -> str:
    book = PromptBook()
    return "\n".join(rendering(item, book) for item in items(benchmark))


def with_table(text: str) -> str:
    """The document with the table of all benchmarks behind its mark."""
    lines = ["| name | benchmark | data set | questions | judge | official protocol | not certain |", "|---|---|---|---|---|---|---|"]
    for each in BENCHMARKS:
        source = each.source
        where = f"[{source.id}](https://huggingface.co/datasets/{source.id})"
        parts = source.configs[0] if len(source.configs) == 1 else f"{len(source.configs)} configurations"
        splits = source.splits[0] if len(source.splits) == 1 else f"{len(source.splits)} splits"
        where += f", {', '.join(part for part in (parts, splits) if part)}"
        where += f", at `{source.revision[:8]}`" if source.revision else ""
        others = [f"split {copy.splits[0]}" if copy.id == source.id else copy.id for copy in each.also]
        where += "".join(f", else {other}" for other in others)
        where += ", gated" if each.gated else ""
        where += f", {each.licence}" if each.licence else ""
        judge = "none" if not each.judged else "shared" if each.judge == "judge" else each.judge.removeprefix("eval_")
        count = f"{each.rows:,}" if each.rows else "?"
        lines.append(f"| {each.name} | {each.title} | {where} | {count} | {judge} | {each.differs} | {each.unverified} |")
    return text.partition(MARK)[0] + MARK + "\n\n" + "\n".join(lines) + "\n"


if __name__ == "__main__":
    DOCS.write_text(with_table(DOCS.read_text(encoding="utf-8")), encoding="utf-8")
    GOLDEN.mkdir(parents=True, exist_ok=True)
    for each in BENCHMARKS:
        (GOLDEN / f"{each.name}.txt").write_text(golden(each), encoding="utf-8")
    with tempfile.TemporaryDirectory() as name:
        print(f"{len(BENCHMARKS)} written; media: {len(list(write_data(Path(name)).rglob('*.png')))} pictures")
