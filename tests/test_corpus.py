"""ZPPO-77K out of made-up copies of its two sets: what fits, what is dropped and why, and that the result trains."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from corpus_sources import (
    IMAGE_CELL,
    MMFR_NAMES,
    MMFR_SCHEMA,
    SHARED,
    TEXT,
    VERO_NAMES,
    VERO_SCHEMA,
    both,
    coloured,
    mmfr_row,
    vero_row,
    write_mmfr,
    write_vero,
)
from pictures import bomb, noise, picture
from seeing import make_seeing
from zppo import cli
from zppo.config.data_settings import ColumnSettings
from zppo.core.types import Golds, Question
from zppo.data.corpora.build import PromptLength, build_corpus
from zppo.data.corpora.build_manifest import CorpusManifest
from zppo.data.corpora.mapping import CorpusMapping, mapping_text, read_mapping
from zppo.data.load import load_questions
from zppo.errors import DataError

MAPPING = read_mapping("zppo-77k")


def changed(**changes: Any) -> CorpusMapping:
    """The mapping with other values in it."""
    return CorpusMapping.model_validate(MAPPING.model_dump(exclude_none=True) | changes)


def build(tmp_path: Path, vero: list[dict[str, Any]] = (), mmfr: list[dict[str, Any]] = (), **more: Any) -> CorpusManifest:  # type: ignore[assignment]
    """The corpus in tmp_path/out of these rows; each set needs one row at least."""
    by_name: dict[str, list[dict[str, Any]]] = {}
    for row in vero or [vero_row("reachqa", 0)]:
        by_name.setdefault(row["data_source"] or "stem-tqa", []).append(row)
    schema = more.pop("schema", MMFR_SCHEMA)
    folders = {
        "vero": write_vero(tmp_path / "vero", by_name),
        "mmfinereason": write_mmfr(tmp_path / "mmfr", mmfr or [mmfr_row("MMK12", 0)], 1, schema),
    }
    return build_corpus(more.pop("mapping", MAPPING), tmp_path / "out", folders, **more)


def rows_of(out: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(out / "train.parquet").to_pylist()
    return rows


def dropped(manifest: CorpusManifest, subset: str) -> dict[str, int]:
    """Reason -> rows of a sub-set; checks that the numbers of every filter follow from one another."""
    (facts,) = (facts for facts in manifest.subsets if facts.subset == subset)
    left = facts.rows
    for entry in facts.filters:
        assert entry.before == left >= entry.after
        left = entry.after
    assert left == facts.kept
    return {entry.reason: entry.before - entry.after for entry in facts.filters if entry.before != entry.after}


def test_every_name_of_both_sets(tmp_path: Path) -> None:
    vero, mmfr = both(tmp_path, each=3)
    manifest = build_corpus(MAPPING, tmp_path / "out", {"vero": vero, "mmfinereason": mmfr})
    rows = rows_of(tmp_path / "out")
    of_vero = [canonical for _, canonical in VERO_NAMES.values() if canonical]
    assert len(set(of_vero)) == 29 and len({name for name in MMFR_NAMES.values() if name}) == 17
    expected = {name: 3 * of_vero.count(name) for name in of_vero}
    expected |= {name: 3 for name in MMFR_NAMES.values() if name and name not in SHARED}
    assert len(expected) == 40
    found: dict[str, int] = {}
    for row in rows:
        found[row["level"]] = found.get(row["level"], 0) + 1
        assert row["source"] == ("vero" if row["level"] in of_vero else "mmfinereason")
        assert row["id"].startswith(row["level"] + "-")
    assert found == expected
    assert {facts.subset: facts.kept for facts in manifest.subsets} == expected
    assert manifest.rows == len(rows) == len({row["id"] for row in rows})
    assert (manifest.ceiling, len(manifest.subsets)) == (85_400, 40)
    assert {f.cap for f in manifest.subsets if f.tier == 1} == {2800} and {f.cap for f in manifest.subsets if f.tier == 2} == {1400}
    # Shared ones are dropped whole on the other side (WeMath has three names there), the rest by name; no row is lost from the counts.
    assert manifest.dropped["mmfinereason"] == {"other_source": 3 * (len(SHARED) + 2), "unlisted": 9}
    assert manifest.dropped["vero"] == {"unlisted": 3 * sum(not canonical for _, canonical in VERO_NAMES.values())}
    unlisted = {entry.name for entry in manifest.unused if entry.why == "sub-set not in the mapping"}
    assert unlisted == {name for name, canonical in VERO_NAMES.values() if not canonical} | {"MMK12", "GameQA-140K", "WaltonColdStart"}


def test_the_tiers_of_the_paper() -> None:
    """Tier 1 and 2 of each source, as the paper's appendix B.1 names them."""
    tier_1 = "ai2d geo170k geomverse geoqa_plus mmk12 cosyn_math cosyn_chart cosyn_diagram cosyn_table wemath tqa"
    tier_1 += " visualwebinstruct chartqa arxivqa"
    tier_2 = (
        "pathvqa vqarad raven evochart infographic_vqa aokvqa gqa iconqa vqav2 visual7w tallyqa pixelreasoner multihop pixmo visual_probe"
    )
    other_1 = "mmr1 euclid geo170k geometry3k mm_openr1 wemath visualwebinstruct bmmr tqa ai2d scienceqa virl39k"
    other_2 = "raven visualsphinx puzzleqa llava_cot zebra_cot"
    vero, mmfr = MAPPING.sources["vero"], MAPPING.sources["mmfinereason"]
    for source, first, second in ((vero, tier_1, tier_2), (mmfr, other_1, other_2)):
        assert {name for name, facts in source.subsets.items() if facts.tier == 1} == set(first.split())
        assert {name for name, facts in source.subsets.items() if facts.tier == 2} == set(second.split())
    assert (MAPPING.tiers, MAPPING.filters.max_answer_characters, MAPPING.filters.min_image_side) == ({1: 2800, 2: 1400}, 512, 100)
    assert (MAPPING.filters.max_pass_rate, MAPPING.filters.max_prompt_tokens) == (0.5, 4096)


@pytest.mark.parametrize(
    "source, name, canonical",
    [
        ("vero", "stem-ai2d_merged", "ai2d"),
        ("vero", "AI2D", "ai2d"),
        ("vero", "cosyn_math", "cosyn_math"),
        ("vero", "CoSyn_400k_chemical", None),
        ("vero", "pixmo", "pixmo"),
        ("vero", "GeoQA+", "geoqa_plus"),
        ("vero", "VQA-RAD", "vqarad"),
        ("vero", "CoSyn-Math", "cosyn_math"),
        ("vero", "counting_grounding_search-pixmo", "pixmo"),
        ("vero", "PixMo-CapQA", None),
        ("vero", "captioning_IF-PixMo-Cap", None),
        ("vero", "PixMo-Count", "pixmo"),
        ("vero", "pixmo_cap", None),
        ("vero", "geoqa-plus", "geoqa_plus"),
        ("vero", "tally_qa", "tallyqa"),
        ("vero", "Visual 7W", "visual7w"),
        ("vero", "vqa_v2", "vqav2"),
        ("vero", "infoVQA", "infographic_vqa"),
        ("vero", "knowledge_recognition_a-okvqa", "aokvqa"),
        ("vero", "kvqa", None),
        ("vero", "objects365_qa", None),
        ("vero", "stvqa", None),
        ("mmfinereason", "FineVision-geometry3k(mathv360k)", "geometry3k"),
        ("mmfinereason", "Geo3K", "geometry3k"),
        ("mmfinereason", "mm-openr1", "mm_openr1"),
        ("mmfinereason", "Euclid", "euclid"),
        ("mmfinereason", "WeMath", "wemath"),
        ("mmfinereason", "Zebra-CoT", "zebra_cot"),
        ("mmfinereason", "ZebraCoT", "zebra_cot"),
        ("mmfinereason", "finevision_visual-web-instruct(filtered)", "visualwebinstruct"),
        ("mmfinereason", "MMK12", None),
    ],
)
def test_spellings_of_names(source: str, name: str, canonical: str | None) -> None:
    assert MAPPING.sources[source].canonical(name) == canonical


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def damaged(data: bytes) -> bytes:
    """Whole by its ends, and no picture in the middle."""
    return data[:80] + bytes(len(data) - 160) + data[-80:]


MISFITS: list[tuple[str, str, Callable[[int], dict[str, Any]]]] = [
    ("tqa", "no_question", lambda i: vero_row("tqa", i, question=None)),
    ("tqa", "no_question", lambda i: vero_row("tqa", i, question="<image> \n")),
    ("tqa", "no_answer", lambda i: vero_row("tqa", i, answer=None)),
    ("tqa", "no_answer", lambda i: vero_row("tqa", i, answer="  ")),
    ("tqa", "no_answer", lambda i: vero_row("tqa", i, answer="None")),
    ("tqa", "no_answer", lambda i: vero_row("tqa", i, answer=" nan ")),
    ("tqa", "no_answer", lambda i: vero_row("tqa", i, answer="['', ' ']", kind="list_string_match")),
    ("tqa", "kind", lambda i: vero_row("tqa", i, kind="grounding", answer='[{"bbox_2d": [1, 2, 3, 4]}]')),
    ("tqa", "kind", lambda i: vero_row("tqa", i, kind="Clicking")),
    ("tqa", "kind", lambda i: vero_row("tqa", i, kind="web_action")),
    ("tqa", "kind", lambda i: vero_row("tqa", i, kind="instruction_following")),
    ("tqa", "long_answer", lambda i: vero_row("tqa", i, answer="x" * 513)),
    ("tqa", "no_image", lambda i: vero_row("tqa", i, image=None)),
    ("tqa", "no_image", lambda i: vero_row("tqa", i, image=b"")),
    ("tqa", "places", lambda i: vero_row("tqa", i, question=f"<image> and <image>, {i}?")),
    ("tqa", "broken_image", lambda i: vero_row("tqa", i, image=b"no picture")),
    ("tqa", "broken_image", lambda i: vero_row("tqa", i, image=cut(coloured(i)))),
    ("tqa", "broken_image", lambda i: vero_row("tqa", i, image=damaged(noise((120, 110), i)))),
    ("tqa", "broken_image", lambda i: vero_row("tqa", i, image=bomb(60_000, 60_000))),
    ("tqa", "broken_image", lambda i: vero_row("tqa", i, image=picture((101, 25_000)))),
    ("tqa", "small_image", lambda i: vero_row("tqa", i, image=picture((99, 500)))),
    ("tqa", "small_image", lambda i: vero_row("tqa", i, image=picture((500, 99)))),
    ("mmr1", "no_answer", lambda i: mmfr_row("MMR1", i, answer=None)),
    ("mmr1", "no_pass_rate", lambda i: mmfr_row("MMR1", i, pass_rate=None)),
    ("mmr1", "no_pass_rate", lambda i: mmfr_row("MMR1", i, pass_rate=float("nan"))),
    ("mmr1", "pass_rate", lambda i: mmfr_row("MMR1", i, pass_rate=0.75)),
    ("mmr1", "pass_rate", lambda i: mmfr_row("MMR1", i, pass_rate=1.0)),
    ("mmr1", "long_answer", lambda i: mmfr_row("MMR1", i, answer="y" * 600)),
    ("mmr1", "no_image", lambda i: mmfr_row("MMR1", i, image=None)),
    ("mmr1", "small_image", lambda i: mmfr_row("MMR1", i, image=picture((40, 40)))),
]


def test_what_does_not_fit_is_counted_by_reason(tmp_path: Path) -> None:
    made = [(subset, reason, row(i)) for i, (subset, reason, row) in enumerate(MISFITS)]
    good_vero = [vero_row("tqa", 500, answer="x" * 512), vero_row("tqa", 501, image=picture((100, 100)))]
    good_mmfr = [mmfr_row("MMR1", 500 + i, pass_rate=rate) for i, rate in enumerate((0.0, 0.25, 0.5))]
    vero = [row for subset, _, row in made if subset == "tqa"]
    mmfr = [row for subset, _, row in made if subset == "mmr1"]
    manifest = build(tmp_path, vero + good_vero, mmfr + good_mmfr)
    for subset in ("tqa", "mmr1"):
        expected: dict[str, int] = {}
        for of, reason, _ in made:
            if of == subset:
                expected[reason] = expected.get(reason, 0) + 1
        assert dropped(manifest, subset) == expected
    kept = {row["source_id"] for row in rows_of(tmp_path / "out")}
    assert kept == {"tqa-500", "tqa-501", "MMR1_500", "MMR1_501", "MMR1_502"}
    assert load_questions(str(tmp_path / "out"), ColumnSettings())


def test_text_that_is_no_utf8(tmp_path: Path) -> None:
    """Parquet does not check that texts are UTF-8."""
    table = pa.Table.from_pylist([mmfr_row("MMR1", 1), mmfr_row("MMR1", 2)], MMFR_SCHEMA)
    broken = pa.array([b"Task \xff\xfe", b"Task"], pa.binary()).view(TEXT)
    table = table.set_column(table.column_names.index("question"), "question", broken)
    folder = tmp_path / "mmfr"
    folder.mkdir()
    pq.write_table(table, folder / "a.parquet")
    vero = write_vero(tmp_path / "vero", {"stem-tqa": [vero_row("tqa", 1)]})
    manifest = build_corpus(MAPPING, tmp_path / "out", {"vero": vero, "mmfinereason": folder})
    assert dropped(manifest, "mmr1") == {"no_text": 1} and manifest.rows == 2


@pytest.mark.parametrize("column", ["pass_rate", "qwen3vl_4b_pass_rate"])
def test_pass_rates_under_both_names_as_texts_too(tmp_path: Path, column: str) -> None:
    schema = pa.schema([pa.field(column, TEXT) if f.name == "pass_rate" else f for f in MMFR_SCHEMA])
    rates = ["0", "0.25", " 0.5 ", "0.75", "1.0", None, "", "often"]
    rows = [{column: rate} | {k: v for k, v in mmfr_row("BMMR", i).items() if k != "pass_rate"} for i, rate in enumerate(rates)]
    manifest = build(tmp_path, mmfr=rows, schema=schema)
    assert dropped(manifest, "bmmr") == {"pass_rate": 2, "no_pass_rate": 3}
    assert sorted(row["pass_rate"] for row in rows_of(tmp_path / "out")) == [0, 0.25, 0.5]


def test_a_null_pass_rate_under_one_name_is_looked_for_under_the_other(tmp_path: Path) -> None:
    schema = MMFR_SCHEMA.append(pa.field("qwen3vl_4b_pass_rate", pa.float64()))
    rows = [mmfr_row("BMMR", i, pass_rate=a, qwen3vl_4b_pass_rate=b) for i, (a, b) in enumerate(((None, 0.25), (None, 1.0), (0.5, 1.0)))]
    manifest = build(tmp_path, mmfr=rows, schema=schema)
    assert dropped(manifest, "bmmr") == {"pass_rate": 1} and manifest.rows == 2


def test_kinds_of_answers(tmp_path: Path) -> None:
    """The judge's rows go to the judge; lists of right answers stay lists, in JSON or as Python writes them."""
    rows = [
        vero_row("vqav2", 1, kind="llm_judge", answer="A man rides a horse along the beach."),
        vero_row("vqav2", 2, kind="list_string_match", answer="['body butter', \"butter\", 'body butter']"),
        vero_row("vqav2", 3, kind="list_string_match", answer='["red", "dark red"]'),
        vero_row("vqav2", 4, kind="list_string_match", answer="['one']"),
        vero_row("vqav2", 5, kind="list_string_match", answer="plain"),
        vero_row("vqav2", 6, kind="number_list", answer="[2, 1, 3]"),
        vero_row("vqav2", 7, kind="multiple_choice", answer="B"),
        vero_row("vqav2", 8, kind=None, answer="['not', 'said']"),
        vero_row("vqav2", 9, kind="string_match", answer="[1, 2]"),
        vero_row("vqav2", 10, kind="string_match", answer="['one']"),
    ]
    manifest = build(tmp_path, rows)
    questions = {q.id: q for q in load_questions(str(tmp_path / "out"), ColumnSettings())}
    found = {row["source_id"]: questions[row["id"]] for row in rows_of(tmp_path / "out")}
    gold = {int(name.removeprefix("vqav2-")): (question.gold, question.grading) for name, question in found.items()}
    assert gold == {
        1: ("A man rides a horse along the beach.", "judge"),
        2: (Golds("any", ("body butter", "butter")), "rule"),
        3: (Golds("any", ("red", "dark red")), "rule"),
        4: ("one", "rule"),
        5: ("plain", "rule"),
        6: (Golds("ordered", ("2", "1", "3")), "rule"),
        7: ("B", "rule"),
        9: ("[1, 2]", "rule"),
        10: ("one", "rule"),
    }
    assert manifest.judged == 1
    assert dropped(manifest, "vqav2") == {"unreadable": 1}, "a list without a kind: whether any of it is right, or all, is not said"


def test_places_of_pictures(tmp_path: Path) -> None:
    """None, one, or as many as there are pictures; a column of lists has several."""
    schema = MMFR_SCHEMA.set(MMFR_SCHEMA.get_field_index("image"), pa.field("images", pa.list_(IMAGE_CELL)))

    def row(i: int, question: str, pictures: int) -> dict[str, Any]:
        cells = [{"bytes": coloured(10 * i + k), "path": None} for k in range(pictures)]
        return {k: v for k, v in mmfr_row("BMMR", i).items() if k != "image"} | {"question": question, "images": cells}

    cases = [("no place, 1", 1), ("<image> 2", 1), ("3 <image>", 1), ("<image> with <image> 4", 2), ("none of two 5", 2)]
    wrong = [("<image><image> 6", 1), ("<image> 7", 2), ("<image> 8", 0)]
    manifest = build(tmp_path, mmfr=[row(i, *case) for i, case in enumerate(cases + wrong)], schema=schema)
    assert dropped(manifest, "bmmr") == {"places": 2, "no_image": 1}
    questions = load_questions(str(tmp_path / "out"), ColumnSettings())
    assert sorted((q.messages[-1].content[-1], len(q.images)) for q in questions) == [("1", 1), ("2", 1), ("4", 2), ("5", 2), (">", 1)]


def test_duplicates_within_a_subset(tmp_path: Path) -> None:
    again = vero_row("gqa", 1)
    rows = [
        vero_row("gqa", 1),
        again | {"id": "second"},
        vero_row("gqa", 1, question="Question 1  of gqa?\n") | {"id": "spaces"},
        vero_row("gqa", 1, answer="another answer") | {"id": "answer"},
        vero_row("gqa", 1, image=coloured(77)) | {"id": "picture"},
        vero_row("gqa", 1, question="Something else?") | {"id": "question"},
        vero_row("iconqa", 1, question="<image>\nQuestion 1 of gqa?") | {"id": "subset"},
    ]
    manifest = build(tmp_path, rows)
    assert dropped(manifest, "gqa") == {"duplicate": 3} and dropped(manifest, "iconqa") == {}
    assert {row["source_id"] for row in rows_of(tmp_path / "out")} == {"gqa-1", "picture", "question", "subset"}
    assert len(list((tmp_path / "out" / "images").rglob("*.png"))) == 2, "one file for a picture of several rows"


@pytest.mark.slow
def test_a_cap_is_a_keyed_draw_whatever_the_order(tmp_path: Path) -> None:
    """The same rows in another order and in other files give the same corpus, byte for byte; another seed draws others."""
    rows = [mmfr_row("MMR1", i) for i in range(200)] + [mmfr_row("PuzzleQA", i) for i in range(40)]
    vero = write_vero(tmp_path / "vero", {"stem-tqa": [vero_row("tqa", 1)]})
    found = []
    for name, seed, tiers in (("a", 0, {1: 30, 2: 10}), ("b", 0, {1: 30, 2: 10}), ("c", 1, {1: 30, 2: 10}), ("d", 0, {1: 60, 2: 10})):
        mixed = random.Random(name).sample(rows, len(rows))
        copy = write_mmfr(tmp_path / f"mmfr-{name}", mixed, files=len(name) + ord(name) - ord("a"))
        manifest = build_corpus(changed(seed=seed, tiers=tiers), tmp_path / name, {"vero": vero, "mmfinereason": copy})
        assert dropped(manifest, "mmr1") == {"cap": 200 - tiers[1]} and dropped(manifest, "puzzleqa") == {"cap": 30}
        found.append({row["source_id"] for row in rows_of(tmp_path / name)})
        pictures = {path for row in rows_of(tmp_path / name) for path in row["images"]}
        left = {path.relative_to(tmp_path / name).as_posix() for path in (tmp_path / name / "images").rglob("*.*")}
        assert left == pictures, "pictures of rows that left the draw are gone"
    first, second = ((tmp_path / name / "train.parquet").read_bytes() for name in "ab")
    assert first == second and found[0] != found[2]
    assert {name for name in found[0] if "MMR1" in name} < found[3], "a higher cap keeps the rows of a lower one"
    ids = sorted(int(name[5:]) for name in found[0] if "MMR1" in name)
    assert 50 < sum(ids) / len(ids) < 150, "a draw, not the first rows"


def test_a_subset_without_a_name_is_its_folders(tmp_path: Path) -> None:
    manifest = build(tmp_path, [vero_row("tqa", 1) | {"data_source": None}])
    assert {facts.subset for facts in manifest.subsets if facts.kept} == {"tqa"}


def test_columns_of_json_text(tmp_path: Path) -> None:
    """Objects may be JSON text, as some exports write them."""
    schema = pa.schema([pa.field(f.name, TEXT) if f.name in ("reward_model", "extra_info") else f for f in VERO_SCHEMA])
    row = vero_row("tqa", 3)
    row |= {name: json.dumps(row[name]) for name in ("reward_model", "extra_info")}
    vero = write_vero(tmp_path / "vero", {"stem-tqa": [row]}, schema)
    mmfr = write_mmfr(tmp_path / "mmfr", [mmfr_row("MMK12", 0)], 1)
    build_corpus(MAPPING, tmp_path / "out", {"vero": vero, "mmfinereason": mmfr})
    assert [(r["prompt"], r["answer"]) for r in rows_of(tmp_path / "out")] == [("<image>\nQuestion 3 of tqa?", "3")]


def test_a_mapping_of_ones_own(tmp_path: Path) -> None:
    """Other column names, other sub-sets, other caps: all of it is in the file."""
    text = (
        mapping_text("zppo-77k")
        .replace("question: extra_info.question", "question: task.words")
        .replace("{1: 2800, 2: 1400}", "{1: 2, 2: 1}")
    )
    text = text.replace("tqa: {tier: 1, names: [tqa*]}", "my_own: {tier: 2, names: [mine*]}", 1)
    file = tmp_path / "mine.yaml"
    file.write_text(text, encoding="utf-8")
    mapping = read_mapping("zppo-77k", file)
    schema = VERO_SCHEMA.append(pa.field("task", pa.struct([("words", TEXT)])))
    rows = [vero_row("mine_1", i) | {"task": {"words": f"Own question {i}"}} for i in range(3)]
    vero = write_vero(tmp_path / "vero", {"x": rows}, schema)
    mmfr = write_mmfr(tmp_path / "mmfr", [mmfr_row("FineVision-tqa", i) for i in range(3)], 1)
    build_corpus(mapping, tmp_path / "out", {"vero": vero, "mmfinereason": mmfr})
    found = rows_of(tmp_path / "out")
    assert sorted((r["level"], r["source"]) for r in found) == [("my_own", "vero"), ("tqa", "mmfinereason"), ("tqa", "mmfinereason")]
    assert {r["prompt"][:12] for r in found if r["level"] == "my_own"} == {"Own question"}


BAD_MAPPINGS = [
    ("tiers: {1: 2800, 2: 1400}", "tiers: {1: 2800}", "is of tier 2, and tiers has no cap for it"),
    ("min_image_side: 100", "min_image_sid: 100", "filters.min_image_sid: Extra inputs are not permitted"),
    ("min_image_side: 100", "min_image_side: many", "filters.min_image_side: Input should be a valid integer"),
    ("grounding: drop", "grounding: away", "sources.vero.kinds.grounding"),
    ("names: [ai2d*]", "names: ['*']", "which stands for everything"),
    ("seed: 0", "seed: [0", "is no YAML"),
]


@pytest.mark.parametrize("old, new, said", BAD_MAPPINGS)
def test_a_mapping_with_a_mistake(tmp_path: Path, old: str, new: str, said: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(mapping_text("zppo-77k").replace(old, new), encoding="utf-8")
    with pytest.raises(DataError) as caught:
        read_mapping("zppo-77k", file)
    assert str(file) in str(caught.value) and said in str(caught.value)


@pytest.mark.slow
def test_the_corpus_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """From the command to a step of a tiny vision-language student, with `data.train: DIR` and nothing else."""
    vero, mmfr = both(tmp_path, each=1)
    student = make_seeing(tmp_path / "student", "qwen3_5")
    out = tmp_path / "corpus"
    roomy = tmp_path / "roomy.yaml"  # the tiny student has small patches, and so many tokens for a picture
    roomy.write_text(mapping_text("zppo-77k").replace("max_prompt_tokens: 4096", "max_prompt_tokens: 9999999"), encoding="utf-8")
    command = ["data", "build", "zppo-77k", f"--out={out}", f"--vero={vero}", f"--mmfinereason={mmfr}", f"--tokenizer={student}"]
    assert cli.main([*command, f"--mapping={roomy}"]) == 0
    said = capsys.readouterr().out
    assert "41 rows in" in said and "85,400" in said and "about 77,000" in said and "were not counted" not in said
    questions = load_questions(str(out), ColumnSettings())
    assert len(questions) == 41 and all(len(q.images) == 1 for q in questions) and len({q.level for q in questions}) == 40
    assert all(Path(q.images[0].uri).is_relative_to(out) for q in questions)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"student: {{model: {student}}}\nmethod: grpo\ndata: {{train: {out}, images: {{min_pixels: 256, max_pixels: 576}}}}\n"
        "rollout: {batch_size: 2, group_size: 2, max_new_tokens: 4}\ntrain: {steps: 1}\n",
        encoding="utf-8",
    )
    assert cli.main(["train", str(recipe), "--dry-run"]) == 0, capsys.readouterr()
    planned = capsys.readouterr().out
    assert "41" in planned, planned
    assert cli.main(["train", str(recipe), f"--output={tmp_path / 'run'}"]) == 0, capsys.readouterr()


def test_long_prompts_are_dropped_where_a_tokenizer_counts_them(tmp_path: Path) -> None:
    rows = [vero_row("gqa", i, question=f"<image>\n{'word ' * i}end") for i in (1, 2, 50, 60)]
    rows += [vero_row("gqa", 70, question="<image>\nno <|image_pad|>"), vero_row("gqa", 71, question="<image>\n<own>")]

    def tokens(question: Question) -> int:
        if "<own>" in question.messages[-1].content:
            raise DataError("the text holds the model's own token")
        assert question.images[0].uri.endswith(".png")
        return len(question.messages[-1].content.split())

    mapping = changed(filters={"max_prompt_tokens": 40})
    manifest = build(tmp_path, rows, mapping=mapping, length=PromptLength("words", tokens))
    assert dropped(manifest, "gqa") == {"long_prompt": 2, "unshowable": 2}
    assert len(list((tmp_path / "out" / "images").rglob("*.png"))) == 2
    without = build_corpus(mapping, tmp_path / "without", {"vero": tmp_path / "vero", "mmfinereason": tmp_path / "mmfr"})
    assert without.rows == 5 and without.asked["tokenizer"] is None


def test_show_mapping_prints_one_that_can_be_edited(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["data", "build", "zppo-77k", "--show-mapping"]) == 0
    file = tmp_path / "m.yaml"
    file.write_text(capsys.readouterr().out, encoding="utf-8")
    assert read_mapping("zppo-77k", file) == MAPPING
