"""Made-up copies of the two sets that ZPPO-77K is built of, in the schemas in which public readers see them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pictures import picture

TEXT = pa.string()
IMAGE_CELL = pa.struct([("bytes", pa.binary()), ("path", TEXT)])

_CHAT = pa.struct([("role", pa.list_(TEXT)), ("content", pa.list_(TEXT))])
_EXTRA = pa.struct(
    [("index", pa.int64()), ("question", TEXT), ("answer", TEXT), ("reward_type", TEXT), ("tolerance", pa.float64()), ("split", TEXT)]
)
VERO_SCHEMA = pa.schema(
    [
        ("id", TEXT),
        ("data_source", TEXT),
        ("prompt", _CHAT),
        ("image", IMAGE_CELL),
        ("ability", TEXT),
        ("reward_model", pa.struct([("style", TEXT), ("ground_truth", TEXT)])),
        ("extra_info", _EXTRA),
    ]
)
MMFR_SCHEMA = pa.schema(
    [
        ("source", TEXT),
        ("id", TEXT),
        ("original_question", TEXT),
        ("original_answer", TEXT),
        ("image", IMAGE_CELL),
        ("question", TEXT),
        ("answer", TEXT),
        ("qwen3vl_235b_thinking_response", TEXT),
        ("pass_rate", pa.float64()),
        ("is_consistent", pa.bool_()),
    ]
)

# configuration on the hub (its folder) -> `data_source` of its rows and the canonical name; "" for what is not in the corpus.
VERO_NAMES: dict[str, tuple[str, str]] = {
    "stem-ai2d_merged": ("ai2d_merged", "ai2d"),
    "stem-geo170k": ("geo170k", "geo170k"),
    "stem-geomverse": ("geomverse", "geomverse"),
    "stem-geoqa_plus": ("geoqa_plus", "geoqa_plus"),
    "stem-mmk12": ("mmk12", "mmk12"),
    "stem-CoSyn_400k_math": ("CoSyn_400k_math", "cosyn_math"),
    "chart_ocr-CoSyn_400k_chart": ("CoSyn_400k_chart", "cosyn_chart"),
    "chart_ocr-CoSyn_400k_diagram": ("CoSyn_400k_diagram", "cosyn_diagram"),
    "chart_ocr-CoSyn_400k_table": ("CoSyn_400k_table", "cosyn_table"),
    "stem-wemath20_pro": ("wemath20_pro", "wemath"),
    "stem-wemath20_standard": ("wemath20_standard", "wemath"),
    "stem-tqa": ("tqa", "tqa"),
    "stem-visualwebinstruct": ("visualwebinstruct", "visualwebinstruct"),
    "chart_ocr-chartqa_difficulty": ("chartqa_difficulty", "chartqa"),
    "chart_ocr-arxivqa_formatted": ("arxivqa_formatted", "arxivqa"),
    "stem-pathvqa": ("pathvqa", "pathvqa"),
    "stem-vqarad": ("vqarad", "vqarad"),
    "stem-raven": ("raven", "raven"),
    "chart_ocr-evochart": ("evochart", "evochart"),
    "chart_ocr-infographic_vqa": ("infographic_vqa", "infographic_vqa"),
    "knowledge_recognition-aokvqa": ("aokvqa", "aokvqa"),
    "knowledge_recognition-gqa": ("gqa", "gqa"),
    "knowledge_recognition-iconqa": ("iconqa", "iconqa"),
    "knowledge_recognition-vqav2": ("vqav2", "vqav2"),
    "knowledge_recognition-visual7w": ("visual7w", "visual7w"),
    "counting_grounding_search-tallyqa": ("tallyqa", "tallyqa"),
    "counting_grounding_search-pixelreasoner": ("pixelreasoner", "pixelreasoner"),
    "counting_grounding_search-multihop": ("multihop_qa", "multihop"),
    "counting_grounding_search-pixmo": ("pixmo", "pixmo"),
    "counting_grounding_search-visual_probe": ("visual_probe", "visual_probe"),
    "stem-CoSyn_400k_chemical": ("CoSyn_400k_chemical", ""),
    "stem-mavis_math_rule_geo": ("mavis_math_rule_geo", ""),
    "chart_ocr-reachqa": ("reachqa", ""),
    "counting_grounding_search-objects365_qa": ("objects365_qa", ""),
    "knowledge_recognition-vizwiz": ("vizwiz", ""),
    "spatial_action-stvqa": ("stvqa", ""),
    "captioning_IF-PixMo-Cap": ("PixMo-Cap", ""),
    "captioning_IF-PixMo-AskAnything": ("PixMo-AskAnything", ""),
    "captioning_IF-MM-RLVR-IFEval": ("MM-RLVR-IFEval", ""),
}
# `source` of MMFineReason's rows -> the canonical name.
MMFR_NAMES: dict[str, str] = {
    "MMR1": "mmr1",
    "Euclid30K": "euclid",
    "FineVision-geo170k(qa)": "geo170k",
    "FineVision-geometry3k(mathv360k)": "geometry3k",
    "mmopenr1-8k": "mm_openr1",
    "WeMath2-Pro": "wemath",
    "WeMath2-Standard": "wemath",
    "WeMath2-SFT": "wemath",
    "FineVision-visualwebinstruct(filtered)": "visualwebinstruct",
    "BMMR": "bmmr",
    "FineVision-tqa": "tqa",
    "FineVision-ai2d_merged": "ai2d",
    "FineVision-scienceqa": "scienceqa",
    "ViRL39K": "virl39k",
    "FineVision-raven": "raven",
    "VisualSphinx": "visualsphinx",
    "PuzzleQA": "puzzleqa",
    "LLaVA-CoT": "llava_cot",
    "Zebra-CoT-Physics": "zebra_cot",
    "MMK12": "",
    "GameQA-140K": "",
    "WaltonColdStart": "",
}
SHARED = {"ai2d", "geo170k", "wemath", "visualwebinstruct", "tqa", "raven"}


@lru_cache(maxsize=4096)
def coloured(number: int, size: tuple[int, int] = (120, 110)) -> bytes:
    """A picture of its own for a number."""
    return picture(size, (number % 251, number // 251 % 251, number // 63001 % 251))


def vero_row(name: str, number: int, **changes: Any) -> dict[str, Any]:
    """A row of Vero; `changes` are of question, answer, kind, image, or columns."""
    question = changes.pop("question", f"<image>\nQuestion {number} of {name}?")
    answer, kind = changes.pop("answer", str(number)), changes.pop("kind", "numeric")
    image = changes.pop("image", coloured(number))
    return {
        "id": f"{name}-{number}",
        "data_source": name,
        "prompt": {"role": ["system", "user"], "content": ["Think within <think></think>.", f"{question} Answer in a box."]},
        "image": None if image is None else {"bytes": image, "path": f"{number}.png"},
        "ability": "stem",
        "reward_model": {"style": "rule", "ground_truth": answer},
        "extra_info": {"index": number, "question": question, "answer": answer, "reward_type": kind, "tolerance": None, "split": "train"},
    } | changes


def mmfr_row(name: str, number: int, **changes: Any) -> dict[str, Any]:
    """A row of MMFineReason; `changes` are of columns, `image` as bytes."""
    image = changes.pop("image", coloured(100_000 + number))
    return {
        "source": name,
        "id": f"{name}_{number}",
        "original_question": "?",
        "original_answer": "long prose",
        "image": None if image is None else {"bytes": image, "path": None},
        "question": f"<image>Task {number} of {name}.",
        "answer": str(number),
        "qwen3vl_235b_thinking_response": "<think>...</think><answer>...</answer>",
        "pass_rate": 0.25,
        "is_consistent": True,
    } | changes


def write_shard(path: Path, rows: Sequence[dict[str, Any]], schema: pa.Schema, group: int = 100) -> None:
    """Rows as one parquet file, in row groups as the hub has them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(rows), schema), path, row_group_size=group)


def write_vero(folder: Path, rows: Mapping[str, Sequence[dict[str, Any]]], schema: pa.Schema = VERO_SCHEMA) -> Path:
    """A copy of Vero: configuration -> its rows; a val split is beside each."""
    for config, of in rows.items():
        write_shard(folder / config / "train-00000-of-00001.parquet", of, schema)
        write_shard(folder / config / "val-00000-of-00001.parquet", [vero_row("ai2d", 9_999_999)], VERO_SCHEMA)
    return folder


def write_mmfr(folder: Path, rows: Sequence[dict[str, Any]], files: int = 2, schema: pa.Schema = MMFR_SCHEMA) -> Path:
    """A copy of MMFineReason, its rows dealt out over files."""
    for file in range(files):
        write_shard(folder / "data" / f"train-{file:05}-of-{files:05}.parquet", rows[file::files], schema)
    return folder


def both(folder: Path, each: int = 3) -> tuple[Path, Path]:
    """Copies of both with `each` good rows of every name."""
    vero = {config: [vero_row(name, 1000 * i + k) for k in range(each)] for i, (config, (name, _)) in enumerate(VERO_NAMES.items())}
    mmfr = [mmfr_row(name, 1000 * i + k) for k in range(each) for i, name in enumerate(MMFR_NAMES)]
    return write_vero(folder / "vero", vero), write_mmfr(folder / "mmfr", mmfr)
