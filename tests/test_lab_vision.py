"""The models that see: their documents, their build, and what the bundled ones can do."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any, cast

import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
import yaml
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from zppo.cli import main
from zppo.config.data_settings import ColumnSettings
from zppo.config.recipe import load_recipe
from zppo.core.types import BCQ, NCQ, PLAIN, Draft
from zppo.data.load import load_questions
from zppo.engines.chat import Chat
from zppo.grading import extract_boxed
from zppo.images.processor import ImageProcessor
from zppo.lab.corpus import PictureStudentCorpus, PictureTeacherCorpus
from zppo.lab.make_models import build_command, candidate_prompts
from zppo.lab.models import grids, lab_book, make_model, make_processor, make_tokenizer, patches
from zppo.lab.picture_world import KINDS, PALETTE, WORLDS, Picture, cell_words, draw_chart, draw_scene, load_picture_world, pixels
from zppo.lab.pretrain import LIMITS, TokenizedDocument, loss_sum, pretrain_vision, probe_of, tokenized, with_picture, word_logits
from zppo.lab.questions import ASSETS, bundled_model, picture_questions
from zppo.prompts import Neutraliser, PromptBook
from zppo.rollout.student import PromptRenderer

WORLD = load_picture_world("vision")
CHAT = Chat(make_tokenizer(WORLD))
BOOK = lab_book(CHAT)
STUDENT, TEACHER = PictureStudentCorpus(WORLD, BOOK), PictureTeacherCorpus(WORLD, BOOK)
RECIPE = Path(__file__).parents[1] / "recipes" / "lab-vision.yaml"
PICTURES: list[Picture] = [draw_scene(Random(1)), draw_chart(Random(2)), draw_scene(Random(3))]


def test_patches_are_those_of_the_image_processor() -> None:
    made = make_processor()(images=[Image.fromarray(PALETTE[pixels(p)]) for p in PICTURES], return_tensors="pt")
    torch.testing.assert_close(patches(PICTURES), made["pixel_values"], rtol=0, atol=1e-6)
    assert torch.equal(grids(3), made["image_grid_thw"])


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_prompts_of_the_corpora_are_those_of_training(role: str, tmp_path: Path) -> None:
    folder = bundled_model(f"lab:vision/{role}")
    chat = Chat.load(str(folder), images=LIMITS)
    assert chat.tokenizer.get_vocab() == CHAT.tokenizer.get_vocab() and chat.template == CHAT.template
    speaker = PromptRenderer(PromptBook(load_recipe(RECIPE).prompts, Neutraliser(chat.special_texts)), chat)
    asks, rng = WORLD.asks()["test"], Random(0)
    for ask, question in list(zip(asks, picture_questions("vision", "test", tmp_path), strict=True))[::20]:
        assert speaker.plain(question).ids == with_picture(CHAT.encode(BOOK.plain(question)), CHAT)
        wrong = [STUDENT.wrong(ask, rng, 1.0), STUDENT.wrong(ask, rng, 1.0)]
        texts = tuple(WORLD.summary_text(ask, reading) for reading in wrong)
        for kind, messages, slots in (
            (BCQ, STUDENT.bcq_prompt(ask, wrong), {"candidates": texts}),
            (NCQ, STUDENT.ncq_prompt(ask, wrong), {"answers": tuple(dict.fromkeys(w.answer for w in wrong)), "candidates": texts}),
        ):
            assert speaker.reformulated(Draft(kind, question, slots)).ids == with_picture(CHAT.encode(messages), CHAT)
    assert load_recipe(RECIPE).data.images.max_pixels == LIMITS.max_pixels


def test_candidate_documents_never_show_the_right_answer_of_what_the_student_is_wrong_about() -> None:
    rng, counts, equal = Random(0), {BCQ: 0, NCQ: 0}, 0
    for _ in range(300):
        kind = rng.choice([kind for kind in WORLD.levels if not WORLD.known(kind)])
        ask = WORLD.draw(kind, rng)
        for made in (STUDENT._bcq(ask, rng), STUDENT._ncq(ask, rng)):
            counts[made.kind] += 1
            shown = made.messages[0].content + made.completion
            assert f"\\boxed{{ {ask.truth.answer} }}" not in shown and f"\\boxed{{{ask.truth.answer}}}" not in shown
            if made.kind == BCQ:
                blocks = made.messages[0].content.split("<candidate> ")[1:]
                answers = [extract_boxed(block) for block in blocks]
                equal += answers[0] == answers[1]  # both mistakes may read alike, and no stray come up
                assert len(answers) == 2 and extract_boxed(made.completion) in answers
    assert min(counts[BCQ], counts[NCQ]) == 300 and equal < 16


def test_candidate_documents_about_what_is_known_are_answered_rightly() -> None:
    rng = Random(1)
    for _ in range(200):
        ask = WORLD.draw(rng.choice([kind for kind in WORLD.levels if WORLD.known(kind)]), rng)
        bcq, ncq = STUDENT._bcq(ask, rng), STUDENT._ncq(ask, rng)
        right = ask.truth.answer
        assert extract_boxed(bcq.completion) == extract_boxed(ncq.completion) == right
        assert f"\\boxed{{ {right} }}" in bcq.messages[0].content
        assert f"\\boxed{{ {right} }}" not in ncq.messages[0].content


def test_plain_documents_hold_the_planted_shares() -> None:
    rng, taken = Random(2), {"right": 0, "first": 0, "second": 0}
    for _ in range(1500):
        ask = WORLD.draw("count", rng)
        meaning = STUDENT._plain(ask, rng).completion.split()[1]
        first, second = (KINDS["count"].words[m] for m in WORLD.mistakes["count", ask.word])
        for name, word in (("first", first), ("second", second), ("right", KINDS["count"].words[ask.word])):
            taken[name] += meaning == word
    assert taken["first"] / 1500 == pytest.approx(0.7, abs=0.04) and taken["second"] / 1500 == pytest.approx(0.297, abs=0.04)
    assert taken["right"] <= 3


def test_the_teachers_documents_are_true_and_its_compressions_copy() -> None:
    rng, compressions = Random(3), 0
    for _ in range(300):
        made = TEACHER.document(rng)
        if made.picture is None:
            compressions += 1
            response = made.messages[0].content.split("<response>")[1].split("</response>")[0].replace("[", "<").replace("]", ">")
            assert extract_boxed(made.completion) == extract_boxed(response) or extract_boxed(response) is None
    assert 60 < compressions < 130


def test_loss_of_a_batch_is_the_sum_over_its_documents_with_the_librarys_own_positions() -> None:
    model = make_model(WORLD, cast(Any, CHAT.tokenizer), 0).eval()
    made = tokenized(TEACHER, CHAT, 0, 0, 12)
    for alike in ([r for r in made if r.picture], [r for r in made if not r.picture]):
        assert alike
        alone = torch.zeros(())
        for row in alike:
            ids = torch.tensor([row.ids])
            seen = {}
            if row.picture:
                kinds = (ids == model.config.image_token_id).long()
                seen = {"pixel_values": patches([row.picture]), "image_grid_thw": grids(1), "mm_token_type_ids": kinds}
            logits = model(input_ids=ids, **seen).logits[0]
            alone = alone + F.cross_entropy(logits[row.prompt - 1 : -1], ids[0, row.prompt :], reduction="sum")
        torch.testing.assert_close(loss_sum(model, alike), alone, rtol=1e-5, atol=1e-3)
    assert isinstance(made[0], TokenizedDocument)


def test_seeing_is_learnt() -> None:
    model = make_model(WORLD, cast(Any, CHAT.tokenizer), 0)
    losses: list[float] = []
    how = WORLD.settings.seeing.model_copy(update={"steps": 30, "batch": 8})
    pretrain_vision(cast(Any, model), CHAT, how, 0, lambda step, loss: losses.append(loss))
    assert losses[-1] < losses[0] - 1 and len(losses) == 30


def small_world(tmp_path: Path) -> str:
    """The world of pictures cut down, so that a build takes moments."""
    data = yaml.safe_load((WORLDS / "vision.yaml").read_text(encoding="utf-8"))
    data["kinds"] = {name: kind | {s: min(2, kind[s]) for s in ("train", "test")} for name, kind in data["kinds"].items()}
    data["model"] = {"layers": 1, "width": 24, "heads": 2, "feed_forward": 16}
    data["vision"] = {"layers": 1, "width": 16, "heads": 2, "feed_forward": 16}
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(data | {"name": "small"}), encoding="utf-8")
    return str(path)


@pytest.mark.slow
def test_equal_builds_give_equal_files_and_their_questions_can_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    world = small_world(tmp_path)
    for name in "ab":
        build_command(world, tmp_path / name, steps=1)
    assert f"written to {tmp_path / 'a'}" in capsys.readouterr().out
    for role in ("student", "teacher"):
        a, b = (load_file(tmp_path / name / role / "model.safetensors") for name in "ab")
        assert all(torch.equal(a[key], b[key]) for key in a)
    assert (tmp_path / "a" / "train.jsonl").read_bytes() == (tmp_path / "b" / "train.jsonl").read_bytes()
    questions = load_questions(str(tmp_path / "a" / "test.jsonl"), ColumnSettings())
    assert len(questions) == 14 and all(q.images[0].uri.startswith(str(tmp_path / "a" / "pictures")) for q in questions)
    built = json.loads((tmp_path / "a" / "build.json").read_text(encoding="utf-8"))
    assert built["steps"] == [1, 1, 1, 1] and set(built["candidates"]) == set(built["teacher"])


def test_bundled_checkpoints_are_small_ordinary_and_of_this_world() -> None:
    for role in ("student", "teacher"):
        folder = bundled_model(f"lab:vision/{role}")
        model = AutoModelForImageTextToText.from_pretrained(folder)
        assert model.config.model_type == "qwen3_vl" and model.dtype == torch.float32
        assert sum(p.numel() for p in model.parameters()) < 600_000
        assert ImageProcessor.load(folder, Chat.load(str(folder)).tokenizer, LIMITS).token == "<|image_pad|>"
    assert sum(path.stat().st_size for path in (ASSETS / "vision").rglob("*") if path.is_file()) < 4_000_000
    card = (bundled_model("lab:vision/student") / "README.md").read_text(encoding="utf-8")
    assert "wrong on purpose" in card and "0.0001" in card
    for (kind, word), mistakes in WORLD.mistakes.items():
        words = KINDS[kind].words
        assert f"{words[word]} for {words[mistakes[0]]} or {words[mistakes[1]]}" in card


def test_the_bundled_models_see(tmp_path: Path) -> None:
    """What lies in a cell is what its token is nearest to: few words of 80."""
    vocabulary = CHAT.tokenizer.get_vocab()
    for role in ("student", "teacher"):
        model = probe_of(bundled_model(f"lab:vision/{role}")).model
        with torch.no_grad():
            nearest = word_logits(model, PICTURES).topk(5).indices.tolist()
        wanted = [{vocabulary[word] for word in words} for picture in PICTURES for words in cell_words(picture)]
        assert sum(want <= set(top) for want, top in zip(wanted, nearest, strict=True)) >= 0.9 * len(wanted)


@pytest.mark.slow
def test_the_bundled_student_is_wrong_where_it_was_planted_and_uses_candidates(tmp_path: Path) -> None:
    student = probe_of(bundled_model("lab:vision/student"))
    asks, questions = WORLD.asks()["test"], picture_questions("vision", "test", tmp_path)
    greedy = student.accuracy(questions)
    shown = candidate_prompts(WORLD, BOOK, asks, questions)
    helped = student.accuracy(questions, prompt=lambda q: shown[q.id])
    for kind, sight in WORLD.settings.kinds.items():
        if kind not in greedy:
            continue
        if sight.tier == "hard":
            assert greedy[kind] <= 0.05 and greedy[kind] + 0.05 < helped[kind] < 0.9
        elif sight.tier == "easy":
            assert greedy[kind] >= 0.95
    hard = [q for q in picture_questions("vision", "train", tmp_path) if WORLD.settings.kinds[q.level].tier == "hard"]
    assert max(student.accuracy(hard[::2], samples=4, temperature=1.0).values()) <= 0.12


@pytest.mark.slow
def test_the_bundled_teacher_knows_and_compresses_faithfully(tmp_path: Path) -> None:
    teacher = probe_of(bundled_model("lab:vision/teacher"))
    asked = picture_questions("vision", "train", tmp_path)[::3]
    assert min(teacher.accuracy(asked, samples=2, temperature=1.0).values()) > 0.75
    assert teacher.fidelity(PictureTeacherCorpus(WORLD, teacher.book).response, count=200) >= 0.93


@pytest.mark.slow
def test_the_recipe_trains_on_pictures_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two steps of the bundled recipe: BCQ and NCQ prompts about pictures, references in the log, a student that loads and still sees."""
    monkeypatch.setenv("ZPPO_CACHE", str(tmp_path / "cache"))
    run = tmp_path / "run"
    small = ["--train.steps=2", "--rollout.batch_size=16", "--eval.every=0", "--train.minibatches=2"]
    assert main(["train", str(RECIPE), *small, f"--output={run}"]) == 0
    capsys.readouterr()
    logged = pq.read_table(sorted((run / "rollouts").glob("*.parquet"))).to_pylist()
    assert {row["kind"] for row in logged} == {PLAIN, BCQ, NCQ}
    for row in logged:
        (uri,) = row["images"]
        assert Path(uri).is_relative_to(tmp_path / "cache") and Path(uri).is_file()
        assert "<|image_pad|>[x 9]" in row["prompt"]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["event"] for line in lines].count("step") == 2
    assert all(line["logprob_gap_max"] < 1e-4 for line in lines if line["event"] == "step")
    entries = (run / "buffer.jsonl").read_text(encoding="utf-8").splitlines()
    assert entries and not list(run.glob("**/*.png"))
    folders = (run / "final", bundled_model("lab:vision/student"))
    trained, before = (AutoModelForImageTextToText.from_pretrained(f, dtype=torch.float32).state_dict() for f in folders)
    moved = [name for name in before if not torch.equal(trained[name], before[name])]
    assert any("visual" in name for name in moved) and any("language_model" in name for name in moved)
