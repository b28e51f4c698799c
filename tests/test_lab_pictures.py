"""The lab's pictures and what is asked about them: gold answers by an independent look at the pixels, equal bytes, apart splits."""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from pathlib import Path
from random import Random

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from zppo.errors import DataError, SettingsError
from zppo.images.store import open_image, read_bytes
from zppo.lab.picture_world import (
    CELL,
    CELLS,
    COLOURS,
    DIRECTIONS,
    KINDS,
    PAIRINGS,
    SIDE,
    SIZE,
    STEP,
    WORDS,
    WORLDS,
    Ask,
    PictureWorld,
    draw_scene,
    is_picture_world,
    load_picture_world,
    png,
)
from zppo.lab.questions import lab_questions, picture_questions, questions_command

WORLD = load_picture_world("vision")


def decoded(ask: Ask) -> np.ndarray:
    """The picture as anybody's decoder shows it, (SIZE, SIZE, 3)."""
    return np.asarray(Image.open(io.BytesIO(png(ask.picture))).convert("RGB")).astype(int)


def colour_of(pixels: np.ndarray) -> str | None:
    """The colour of what is in a part of a picture, None where it is empty."""
    painted = Counter(tuple(p) for p in pixels.reshape(-1, 3)) & Counter(dict.fromkeys(COLOURS.values(), CELL * SIZE))
    assert len(painted) <= 1
    return next((name for name, rgb in COLOURS.items() if rgb in painted), None)


def shape_of(pixels: np.ndarray) -> str | None:
    """The shape in a cell, by the pixels in each row that it covers."""
    covered = (pixels != 250).any(-1)
    widths = [int(row.sum()) for row in covered if row.any()]
    if not widths:
        return None
    if min(widths) == max(widths):
        return "square"
    if widths == sorted(widths):
        return "triangle"
    return "circle" if widths[1] > widths[0] and len(set(widths)) > 2 else "cross"


def seen(ask: Ask) -> dict[str, tuple[str, str]]:
    """Name of each cell that holds something -> colour and shape, from the pixels."""
    picture, found = decoded(ask), {}
    for i, name in enumerate(CELLS):
        y, x = i // SIDE * CELL, i % SIDE * CELL
        part = picture[y : y + CELL, x : x + CELL]
        if (colour := colour_of(part)) and (shape := shape_of(part)):
            found[name] = (colour, shape)
    return found


def bars(ask: Ask) -> dict[str, int]:
    """Colour -> height in steps, from left to right, from the pixels."""
    picture = decoded(ask)
    columns = [picture[:, i * CELL : (i + 1) * CELL] for i in range(SIDE)]
    return {str(colour_of(c)): int((c != 250).any(-1).any(-1).sum()) // STEP for c in columns}


def right_answer(ask: Ask) -> str:
    """The gold answer, worked out from the question's words and the pixels."""
    words = ask.text.split()
    match ask.kind:
        case "colour" | "shape":
            return seen(ask).get(words[2], ("nothing", "nothing"))[ask.kind == "shape"]
        case "count":
            return str(sum(words[1] in thing for thing in seen(ask).values()))
        case "beside":
            at = words[2]
            dx, dy = {"left": (-1, 0), "right": (1, 0), "above": (0, -1), "below": (0, 1)}[words[0]]
            return " ".join(seen(ask)[f"{chr(ord(at[0]) + dx)}{int(at[1]) + dy}"])
        case "height":
            return str(bars(ask).get(words[2], "nothing"))
        case "rank":
            ranked = sorted(bars(ask), key=lambda colour: bars(ask)[colour])
            return ranked[{"shortest": 0, "middle": 1, "tallest": 2}[words[0]]]
        case _:
            first, second = bars(ask)[words[2]], bars(ask)[words[3]]
            results = {"sum": first + second, "difference": abs(first - second)}
            return str(results.get(words[0], (max if words[0] == "larger" else min)(first, second)))


KINDS_ASKED = list(WORLD.levels)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS_ASKED)
@settings(max_examples=40)
@given(seed=st.integers(0, 2**32))
def test_the_right_answer_is_what_the_pixels_show(kind: str, seed: int) -> None:
    ask = WORLD.draw(kind, Random(seed))
    assert ask.truth.answer == right_answer(ask)
    assert set(" ".join([ask.text, *ask.truth.thought, ask.truth.answer]).split()) <= set(WORDS)


@given(seed=st.integers(0, 2**32))
def test_mistakes_never_answer_rightly_by_luck(seed: int) -> None:
    rng = Random(seed)
    for kind in WORLD.levels:
        ask = WORLD.draw(kind, rng)
        if not WORLD.known(kind):
            wrong = [ask.read(meaning).answer for meaning in WORLD.mistakes[kind, ask.word]]
            assert ask.truth.answer not in (*wrong, "0", "nothing") and len(wrong) == 2


def test_every_meaning_that_a_kind_has_is_some_words_mistake() -> None:
    """So the student knows how to read each of them off a picture, and not which word asks for it."""
    for kind in ("rank", "count", "beside", "pair"):
        words = range(len(KINDS[kind].words))
        for place in (0, 1):
            assert sorted(WORLD.mistakes[kind, word][place] for word in words) == list(words)
        assert all(word not in WORLD.mistakes[kind, word] for word in words)


def test_beliefs_are_probabilities_as_the_settings_say() -> None:
    for kind, word in WORLD.words:
        beliefs = WORLD.beliefs((kind, word))
        assert sum(beliefs) == pytest.approx(1) and min(beliefs) >= 0
        if WORLD.settings.kinds[kind].tier == "hard":
            assert beliefs[word] == 0.0001
            assert beliefs[WORLD.mistakes[kind, word][0]] == pytest.approx(0.7, abs=1e-3)
        elif WORLD.known(kind):
            assert beliefs[word] == 1


def test_bytes_are_those_of_ever() -> None:
    """References in checkpoints name pictures by digest: they must be the same with every version of every library."""
    digest = hashlib.sha256(b"".join(png(draw_scene(Random(n))) for n in range(3))).hexdigest()
    assert digest == "104bf6ac28ac9942506f86817257d91ad2ca671392b78eb17d46595e9e4fcf9a"


@pytest.mark.slow
def test_the_splits_are_apart_and_ask_about_every_word(tmp_path: Path) -> None:
    made = {split: picture_questions("vision", split, tmp_path) for split in ("train", "test")}
    assert not {ask.layout for ask in WORLD.asks()["train"]} & {ask.layout for ask in WORLD.asks()["test"]}
    for split, questions in made.items():
        assert len({q.id for q in questions}) == len(questions)
        assert made[split] == picture_questions("vision", split, tmp_path)
        counts = Counter(q.level for q in questions)
        assert counts == {k: getattr(s, split) for k, s in WORLD.settings.kinds.items() if getattr(s, split)}
        for ask, question in zip(WORLD.asks()[split], questions, strict=True):
            assert question.messages[0].content == ask.text and question.gold == ask.truth.answer
            assert hashlib.sha256(read_bytes(question.images[0])).hexdigest() == question.images[0].sha256
    hard = [a for a in WORLD.asks()["train"] if not WORLD.known(a.kind)]
    assert {(a.kind, a.word) for a in hard} == {word for word in WORLD.words if word in WORLD.mistakes}
    assert open_image(made["test"][0].images[0]).size == (SIZE, SIZE)


def test_pictures_go_to_the_cache_and_come_back_when_it_was_emptied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ZPPO_CACHE", str(tmp_path))
    ref = lab_questions("vision", "train")[0].images[0]
    assert Path(ref.uri).is_relative_to(tmp_path)
    Path(ref.uri).unlink()
    with pytest.raises(DataError):
        read_bytes(ref)
    assert lab_questions("vision", "train")[0].images[0] == ref and read_bytes(ref)
    questions_command("vision", "beside", 3)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and all(line.split()[1] in DIRECTIONS and line.endswith(".png") for line in lines)


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    assert is_picture_world("vision") and not is_picture_world("unreachable")
    with pytest.raises(SettingsError, match="train, test"):
        lab_questions("vision", "study")
    with pytest.raises(SettingsError, match="vision"):
        lab_questions("nowhere", "train")
    with pytest.raises(SettingsError, match="vision"):
        load_picture_world("nowhere")


@pytest.mark.parametrize(
    ("section", "key", "value", "said"),
    [
        ("kinds", "taste", {"tier": "easy", "train": 1, "test": 1}, "taste"),
        ("kinds", "colour", {"tier": "odd", "train": 1, "test": 1}, "odd"),
        ("beliefs", "hard", {"right": [0, 0], "mistakes": [0.2, 0.2, 0.2, 0.2]}, "4 mistakes"),
        ("corpus", "levels", {"colour": 1}, "exactly the kinds"),
        ("vision", "depth", 3, "depth"),
    ],
)
def test_wrong_settings_are_refused(tmp_path: Path, section: str, key: str, value: object, said: str) -> None:
    written = yaml.safe_load((WORLDS / "vision.yaml").read_text(encoding="utf-8"))
    written[section][key] = value
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump(written), encoding="utf-8")
    assert is_picture_world(str(path))
    with pytest.raises(SettingsError, match=said):
        load_picture_world(str(path))


def test_pairings_and_kinds_are_as_described() -> None:
    assert list(PAIRINGS) == list(KINDS["pair"].words) and list(KINDS["colour"].words) == list(CELLS)
    assert PictureWorld(WORLD.settings.model_copy(update={"misconceptions": 99})).mistakes != WORLD.mistakes
