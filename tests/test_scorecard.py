"""The scorecard: contrasts of rows whose truth is known, and how far a student has drifted."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from rich.console import Console

from zppo.cli import main
from zppo.config.bundled import recipes_folder
from zppo.config.recipe import load_recipe
from zppo.errors import SettingsError
from zppo.lab.drift import divergence, drift_of
from zppo.lab.pretrain import probe_of
from zppo.lab.questions import bundled_model, lab_questions
from zppo.lab.scorecard import CLAIMS, ENOUGH, MEASURES, STUDENTS, Contrast, methods_of, score, scorecard_tables
from zppo.lab.study import VARIANTS, Cell, Row, grid, overrides_of, print_table
from zppo.report.bootstrap import student_t

LEVELS = ("easy", "medium", "hard", "unseen", "longer", "dialect", "reworded", "other", "three", "sort", "count", "copy")


def row(method: str, seed: int, student: str, trained: float, **more: Any) -> Row:
    after = dict.fromkeys(LEVELS, 0.5) | dict.fromkeys(LEVELS[:3], trained)
    start: dict[str, Any] = {"step": 0, "student_tokens": 0, "teacher_tokens": 0, "by_level": dict.fromkeys(LEVELS, 0.0)}
    half = {"step": 25, "student_tokens": 400, "teacher_tokens": 40, "by_level": dict.fromkeys(LEVELS, trained / 4)}
    made = {"before": dict.fromkeys(LEVELS, 0.0), "after": after, "curve": [start, half], "student_tokens": 1000, "teacher_tokens": 100}
    counts = {"admitted": {"0": 10}, "graduated": {"0": 5}, "drift": {"sort": 0.5, "copy": 1.5}, "seconds": 9.0}
    return {"method": method, "seed": seed, "student": student, "recipe": "lab-elsewhere", **made, **counts} | more


def rows(effects: Mapping[str, float], seeds: int = ENOUGH, noise: float = 0.01, weaker: float = 0.0) -> list[Row]:
    """Rows whose methods differ by known effects around one half; `weaker` is added to all effects on the second student."""
    rng = Random(0)
    return [
        row(method, seed, student, 0.5 + effect + (weaker if at and effect else 0) + rng.gauss(0, noise))
        for seed in range(seeds)
        for at, student in enumerate(STUDENTS)
        for method, effect in effects.items()
    ]


AB = Contrast("a > b", "trained", {"a": 1, "b": -1}, small=0.03)


@pytest.mark.parametrize(
    ("effect", "noise", "seeds", "verdict"),
    [
        (0.2, 0.01, 8, "holds"),
        (-0.2, 0.01, 8, "refuted"),
        (0.0, 0.005, 8, "refuted"),  # nothing as large as it would have to be
        (0.05, 0.1, 8, "undecided"),
        (0.2, 0.01, 7, "7 of 8 seeds"),
        (0.2, 0.01, 0, "0 of 8 seeds"),
    ],
)
def test_a_verdict_follows_the_interval(effect: float, noise: float, seeds: int, verdict: str) -> None:
    found = score(AB, rows({"a": effect, "b": 0.0}, seeds, noise), 1)
    assert found.verdict(AB) == verdict
    if seeds:
        assert found.low < effect < found.high and found.seeds == seeds


def test_the_interval_is_student_s_t_over_both_students_and_as_wide_as_the_looks_ask() -> None:
    """Worked out by hand from the differences: pooled over two students, 14 degrees of freedom."""
    made = rows({"a": 0.1, "b": 0.0})
    gaps = [
        [AB.value({r["method"]: r for r in made if (r["seed"], r["student"]) == (seed, s)}) or 0 for seed in range(8)] for s in STUDENTS
    ]
    means = [sum(g) / 8 for g in gaps]
    error = math.sqrt(sum(sum((x - m) ** 2 for x in g) / 7 / 8 for g, m in zip(gaps, means, strict=True))) / 2
    found = score(AB, made, 1)
    assert found.value == pytest.approx(sum(means) / 2) and found.students == pytest.approx(means)
    assert found.high - found.value == pytest.approx(2.14479 * error, rel=1e-4)
    many = score(AB, made, 50)  # a level of 0.1%
    assert many.high - many.value == pytest.approx(4.14045 * error, rel=1e-4)


@pytest.mark.parametrize(("without", "verdict"), [(1, "holds"), (2, "holds"), (7, "undecided"), (8, "undecided")])
def test_a_seed_that_left_nothing_to_measure_counts_as_run(without: int, verdict: str) -> None:
    """It has no value, so that the interval is of the others; no run would add one."""
    half = Contrast("more than half", "followed", {"zppo": 1}, constant=-0.5)
    made = [row("zppo", seed, s, 0.8, bcq_followed=0.8 + seed / 100 if seed >= without else None) for seed in range(8) for s in STUDENTS]
    found = score(half, made, 1)
    assert (found.verdict(half), found.seeds) == (verdict, 8)
    if verdict == "holds":
        assert found.value == pytest.approx(0.3 + (without + 7) / 200)


def test_quantiles_of_student_s_t() -> None:
    for level, freedom, known in ((0.975, 1, 12.7062), (0.975, 7, 2.36462), (0.995, 14, 2.97684), (0.9995, 30, 3.64596)):
        assert student_t(level, freedom) == pytest.approx(known, rel=1e-4)


def test_a_difference_between_students_is_the_weaker_one_s_minus_the_other_s() -> None:
    between = Contrast("more for the weaker", "trained", {"a": 1, "b": -1}, between=True)
    found = score(between, rows({"a": 0.1, "b": 0.0}, weaker=0.2), 1)
    assert found.value == pytest.approx(0.2, abs=0.02) and found.verdict(between) == "holds"


def test_equal_cost_is_what_the_cheaper_run_spends() -> None:
    """The dearer run is read on its curve: 0 tokens 0, 40 tokens a quarter of its end, 100 tokens its end."""
    dear, cheap = row("a", 0, STUDENTS[0], 0.8), row("b", 0, STUDENTS[0], 0.3, teacher_tokens=70)
    contrast = Contrast("a > b", "trained", {"a": 1, "b": -1}, equal="teacher_tokens")
    assert contrast.value({"a": dear, "b": cheap}) == pytest.approx((0.2 + 0.8) / 2 - 0.3)
    assert contrast.value({"a": dear, "b": cheap | {"teacher_tokens": 20, "curve": cheap["curve"][:1]}}) == pytest.approx(0.1 - 0.3)


def test_measures_of_a_row() -> None:
    made = row("zppo", 0, STUDENTS[0], 0.8, bcq_accuracy=0.7, bcq_followed=0.6)
    values = {name: measure.of(made) for name, measure in MEASURES.items()}
    assert values == pytest.approx(
        {"trained": 0.8, "hard": 0.8, "composed": 0.5, "carried": 0.5, "kept": 0.5, "along": 0.2, "drift": 1.0, "graduated": 0.5}
        | {"bcq": 0.7, "followed": 0.6, "asked": 0.1}
    )
    assert MEASURES["bcq"].of(row("grpo", 0, STUDENTS[0], 0.8)) is None


def test_every_claim_asks_for_methods_and_measures_that_are_there() -> None:
    methods = methods_of(list(CLAIMS))
    cells = list(grid([recipes_folder() / "lab-elsewhere.yaml"], methods, [10], STUDENTS))
    assert len({cell.name for cell in cells}) == len(cells) == 2 * len(methods)
    assert {contrast.measure for claim in CLAIMS.values() for contrast in claim.contrasts} <= set(MEASURES)
    with pytest.raises(SettingsError, match="--claims names 99; the card has 1 to"):
        methods_of(["99"])


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_is_a_setting_of_a_method(variant: str) -> None:
    recipe = recipes_folder() / "lab-elsewhere.yaml"
    plain = load_recipe(recipe, overrides_of(Cell(recipe, variant.partition(":")[0], 10), load_recipe(recipe)))
    varied = load_recipe(recipe, overrides_of(Cell(recipe, variant, 10), load_recipe(recipe)))
    assert varied.method == plain.method and varied != plain


def test_the_card_says_what_there_is_and_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.jsonl"
    made = rows({"zppo": 0.3, "grpo-replay": 0.1, "grpo": 0.0})
    path.write_text("".join(json.dumps(r) + "\n" for r in made), encoding="utf-8")
    (_, columns, lines), *outcomes = scorecard_tables(made, ["1", "3"])
    assert [line[-1] for line in lines] == ["holds", "holds", "0 of 8 seeds"] and len(columns) == len(lines[0])
    assert [line[0] for line in outcomes[0][2]] == ["zppo", "grpo-replay", "grpo"]
    assert main(["lab", "scorecard", "--print", "--rows", str(path), "--claims", "1", "--markdown"]) == 0
    assert "| zppo > grpo-replay, trained |" in capsys.readouterr().out
    assert main(["lab", "scorecard", "--print", "--rows", str(tmp_path / "none.jsonl")]) == 2
    assert "holds no rows" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("width", [60, 80, 100, 300])
def test_no_word_of_a_wide_table_is_cut(width: int) -> None:
    console = Console(width=width, file=io.StringIO(), force_terminal=False)
    columns, line = [f"measure{i}" for i in range(14)], [f"-0.{i:03}" for i in range(14)]
    print_table(columns, [line], console)
    told = console.file.getvalue()  # type: ignore[attr-defined]
    assert {*columns, *line} <= set(told.split()) and max(map(len, told.splitlines())) <= width
    assert told.count(line[0]) == told.count(columns[0]) and (told.count(line[0]) == 1) == (width == 300)


@pytest.mark.parametrize("width", [60, 80, 100, 130, 300])
def test_no_word_of_a_table_of_sentences_is_cut(width: int) -> None:
    """Columns of text beside columns of numbers: what is left of a line goes to the text, and no line is longer than the terminal."""
    console = Console(width=width, file=io.StringIO(), force_terminal=False)
    columns = ["", "claim", "what is above zero if it holds", "elsewhere", "elsewhere-2", "verdict"]
    line = [
        "7.10",
        "with the teacher in the gradient students lose",
        "zppo:minibatches-4 > teacher-response:minibatches-4",
        "-0.017",
        "+0.066",
    ]
    print_table(columns, [[*line, "undecided"]], console)
    told = console.file.getvalue()  # type: ignore[attr-defined]
    words = {word for cell in (*columns, *line, "undecided") for word in cell.split()}
    assert words <= set(told.split()) and max(map(len, told.splitlines())) <= width


@pytest.mark.slow
def test_drift_is_the_mean_divergence_over_the_old_student_s_samples(tmp_path: Path) -> None:
    """Of itself none; of another one the literal sum, token by token."""
    probe = probe_of(bundled_model("lab:elsewhere/student"))
    questions = [q for q in lab_questions("elsewhere", "study") if q.level in ("sort", "copy")][58:62]
    assert divergence(probe, bundled_model("lab:elsewhere/student"), questions) == pytest.approx({"sort": 0, "copy": 0}, abs=1e-6)
    other = bundled_model("lab:elsewhere-2/student")
    found = divergence(probe, other, questions)
    new = probe_of(other).model
    for level, value in found.items():
        gaps = []
        for question in (q for q in questions if q.level == level):
            from zppo.core.draws import draw_key
            from zppo.engines.base import SampleRequest, Sampling

            prompt = probe.chat.encode(probe.book.plain(question))
            request = SampleRequest(prompt, (draw_key("lab", "drift", question.id),))
            ids = [*prompt, *probe.engine.sample([request], Sampling(temperature=1.0, max_new_tokens=28))[0][0].ids.tolist()]
            for at in range(len(prompt), len(ids)):
                with torch.no_grad():
                    before, after = (m(torch.tensor([ids[:at]])).logits[0, -1].softmax(-1) for m in (probe.model, new))
                gaps.append(float((before * (before / after).log()).sum()))
        assert value == pytest.approx(sum(gaps) / len(gaps), rel=1e-3) and value > 0.01


@pytest.mark.slow
def test_a_run_of_another_world_has_no_drift(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("", encoding="utf-8")
    (tmp_path / "recipe.yaml").write_text("student: {model: lab:unreachable/student}\ndata: {eval: lab:unreachable/study}\n")
    assert drift_of(tmp_path) == {}
