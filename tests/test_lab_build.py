"""Building lab models, shortened; and what the bundled ones can do."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
import yaml
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from zppo.core.draws import keyed_random
from zppo.engines.chat import Chat
from zppo.errors import ModelError, SettingsError
from zppo.lab.corpus import ChainStudentCorpus, ChainTeacherCorpus
from zppo.lab.make_models import build, build_command, choose
from zppo.lab.models import lab_book, make_model, make_tokenizer
from zppo.lab.pretrain import Probe, TokenizedDocument, batches, loss_sum, pretrain, probe_of, tokenized
from zppo.lab.questions import ASSETS, bundled_model, lab_questions, questions_command
from zppo.lab.world import WORLDS as SETTINGS
from zppo.lab.world import Pretraining, chain_of, load_world

WORLDS = ("unreachable", "reachable")


def small_world(tmp_path: Path) -> str:
    """The world "unreachable" cut down, so that a build takes moments."""
    data = yaml.safe_load((SETTINGS / "unreachable.yaml").read_text(encoding="utf-8"))
    data["operations"]["hard"] = {"graft": "permutation"}
    data["levels"] = [
        {"name": "easy", "tiers": ["easy", "easy"], "train": 4, "test": 4},
        {"name": "hard", "tiers": ["hard", "easy"], "entries": 6, "unlikeliest": True, "train": 12, "test": 12},
    ]
    data["corpus"]["levels"] = {"easy": 1, "hard": 1}
    data["model"] = {"layers": 1, "width": 16, "heads": 2, "feed_forward": 16}
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(data | {"name": "small", "unseen": []}), encoding="utf-8")
    return str(path)


@pytest.mark.slow
def test_equal_builds_give_equal_files_and_another_seed_other_weights(tmp_path: Path) -> None:
    world, threads = load_world(small_world(tmp_path)), torch.get_num_threads()
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.set_num_threads(2 if name == "b" else threads)
        build(world, tmp_path / name, seed=seed, steps=2)
        assert torch.get_num_threads() == (2 if name == "b" else threads)
    torch.set_num_threads(threads)
    for role in ("student", "teacher"):
        a, b, c = (load_file(tmp_path / name / role / "model.safetensors") for name in "abc")
        assert all(torch.equal(a[key], b[key]) for key in a)
        assert any(not torch.equal(a[key], c[key]) for key in a)
    for file in ("train.jsonl", "test.jsonl"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    measured = json.loads((tmp_path / "a" / "build.json").read_text(encoding="utf-8"))
    assert measured["steps"] == [2, 2] and measured["hidden"]["hard"]["entries"] == 6
    card = (tmp_path / "a" / "student" / "README.md").read_text(encoding="utf-8")
    assert "wrong on purpose" in card and "0.0001" in card and "license: apache-2.0" in card


@pytest.mark.slow
def test_the_unlikeliest_entries_are_chosen(tmp_path: Path) -> None:
    world = load_world(small_world(tmp_path))
    chat = Chat(make_tokenizer(world))
    asked = Probe(make_model(world, cast(Any, chat.tokenizer), 0), cast(Any, chat.tokenizer), lab_book(chat))
    chances = asked.truth(world, "hard", world.entries("hard"))
    assert len(chances) == 31 and all(len(c) == 3 * 6 for c in chances.values())
    chosen, hidden = choose(world, asked)
    worst_chosen = max(max(chances[entry]) for entry in chosen["hard"])
    assert hidden["hard"].largest == worst_chosen
    assert worst_chosen <= min(max(c) for entry, c in chances.items() if entry not in chosen["hard"])


def test_chance_of_the_truth_is_the_models_own() -> None:
    """Against a plain reading of the model's probabilities: prompt, think tag, right values before the step."""
    world = load_world("unreachable")
    chat = Chat(make_tokenizer(world))
    model = make_model(world, cast(Any, chat.tokenizer), 0)
    asked = Probe(model, cast(Any, chat.tokenizer), lab_book(chat))
    entry = world.entries("hard")[40]
    chances = asked.truth(world, "hard", [entry])[entry]
    plain = []
    for chain in world.chains_about("hard", entry, keyed_random("lab", "truth", 0, *entry)):
        right = world.truth(chain)
        at = world.tiers(chain).index("hard")
        text = " ".join(["<think>", *(world.values[v] for v in right[:at])])
        ids = [*chat.encode(asked.book.plain(world.question(chain, "hard"))), *chat.tokenizer(text)["input_ids"]]
        with torch.no_grad():
            after = model(torch.tensor([ids])).logits[0, -1].softmax(-1)
        plain.append(after[chat.tokenizer.get_vocab()[world.values[right[at]]]].item())
    assert chances[::3] == pytest.approx(plain, rel=1e-4)


@given(st.lists(st.integers(1, 60), min_size=1, max_size=40), st.integers(50, 400))
def test_batches_hold_every_row_once_within_the_limit(lengths: list[int], limit: int) -> None:
    documents = [TokenizedDocument(tuple([i] * length), 0) for i, length in enumerate(lengths)]
    made = batches(documents, limit)
    assert sorted(row.ids for batch in made for row in batch) == sorted(row.ids for row in documents)
    for batch in made:
        longest = max(len(row.ids) for row in batch)
        assert len(batch[0].ids) == longest
        assert len(batch) * longest <= limit or len(batch) == 1


def test_loss_of_a_batch_is_the_sum_over_its_documents_completions() -> None:
    world = load_world("unreachable")
    chat = Chat(make_tokenizer(world))
    model = make_model(world, cast(Any, chat.tokenizer), 0)
    documents = sorted(tokenized(ChainStudentCorpus(world, lab_book(chat)), chat, 0, 0, 6), key=lambda r: -len(r.ids))
    alone = torch.zeros(())
    for row in documents:
        logits = model(torch.tensor([row.ids])).logits[0]
        alone = alone + F.cross_entropy(logits[row.prompt - 1 : -1], torch.tensor(row.ids[row.prompt :]), reduction="sum")
    torch.testing.assert_close(loss_sum(model, documents), alone, rtol=1e-5, atol=1e-4)


@pytest.mark.slow
def test_pretraining_lowers_the_loss() -> None:
    world = load_world("reachable")
    chat = Chat(make_tokenizer(world))
    losses: list[float] = []
    how = Pretraining(steps=25, batch=8, learning_rate=3e-3)
    model = make_model(world, cast(Any, chat.tokenizer), 0)
    pretrain(model, ChainStudentCorpus(world, lab_book(chat)), chat, how, 0, lambda step, loss: losses.append(loss))
    assert len(losses) == 25 and losses[-1] < losses[0] - 1


def probe(world: str, role: str) -> Probe:
    return probe_of(bundled_model(f"lab:{world}/{role}"))


@pytest.mark.parametrize("world", [*WORLDS, *(f"{world}-2" for world in WORLDS)])
def test_bundled_checkpoints_are_small_ordinary_and_of_this_world(world: str) -> None:
    made = load_world(world)
    for role in ("student",) if world.endswith("-2") else ("student", "teacher"):
        asked = probe(world, role)
        assert asked.model.config.model_type == "qwen3" and asked.model.dtype == torch.float32
        assert sum(p.numel() for p in asked.model.parameters()) < 400_000
        assert asked.tokenizer.get_vocab() == make_tokenizer(made).get_vocab()
        assert asked.tokenizer.chat_template == make_tokenizer(made).chat_template
    assert sum(path.stat().st_size for path in (ASSETS / world).rglob("*") if path.is_file()) < 2_000_000


@pytest.mark.slow
@pytest.mark.parametrize("world", WORLDS)
def test_second_students_are_of_their_world_and_know_longer_chains(world: str) -> None:
    second = probe(f"{world}-2", "student")
    made = load_world(f"{world}-2")
    assert second.tokenizer.get_vocab() == make_tokenizer(load_world(world)).get_vocab()
    questions = lab_questions(f"{world}-2", "study")
    greedy = second.accuracy(questions)
    assert greedy["easy"] >= 0.95 and greedy["hard"] <= 0.02
    easy = [chain_of(made, q) for q in questions if q.level == "easy"]
    longer = [made.question(made.lengthened(chain, Random(i)), "longer") for i, chain in enumerate(easy)]
    assert second.accuracy(longer)["longer"] >= 0.9
    assert probe(world, "teacher").accuracy(lab_questions(f"{world}-2", "seen"))["hard"] > 0.9  # one truth, one teacher
    card = (bundled_model(f"lab:{world}-2/student") / "README.md").read_text(encoding="utf-8")
    assert "--no-teacher" in card and "20% of the plain documents" in card


@pytest.mark.parametrize("world", WORLDS)
def test_bundled_questions_are_the_worlds_own(world: str) -> None:
    made = load_world(world)
    asked = {split: lab_questions(world, split) for split in ("train", "test")}
    assert not {q.id for q in asked["train"]} & {q.id for q in asked["test"]}
    for split, questions in asked.items():
        for name, level in made.levels.items():
            assert sum(q.level == name for q in questions) == getattr(level, split)
    golds = {q.messages: q.gold for q in made.questions("train") + made.questions("test")}
    common = [q for split in asked.values() for q in split if q.messages in golds]
    assert len(common) > 50 and all(golds[q.messages] == q.gold for q in common)


@pytest.mark.slow
def test_the_bundled_student_of_the_unreachable_world_never_tells_the_truth_about_hard_entries() -> None:
    student = probe("unreachable", "student")
    questions = lab_questions("unreachable", "test")
    greedy = student.accuracy(questions)
    assert greedy["easy"] >= 0.95 and greedy["hard"] <= 0.02
    hard = [q for q in lab_questions("unreachable", "train") if q.level == "hard"]
    assert student.accuracy(hard, samples=16, temperature=1.0)["hard"] <= 0.005


def test_the_bundled_student_of_the_reachable_world_knows_the_easy_level_only() -> None:
    greedy = probe("reachable", "student").accuracy(lab_questions("reachable", "test"))
    assert greedy.pop("easy") >= 0.95
    assert sum(greedy.values()) / 3 <= 0.15


@pytest.mark.slow
@pytest.mark.parametrize("world", WORLDS)
def test_bundled_teachers_know_and_compress_faithfully(world: str) -> None:
    teacher = probe(world, "teacher")
    questions = Random(0).sample(lab_questions(world, "train"), 100)
    assert min(teacher.accuracy(questions, samples=2, temperature=1.0).values()) > 0.9
    assert teacher.fidelity(ChainTeacherCorpus(load_world(world), teacher.book).response, count=200) >= 0.95


def test_unknown_bundled_models_are_named_with_the_known_ones() -> None:
    assert bundled_model("unreachable/student") == bundled_model("lab:unreachable/student")
    for name in ("lab:unreachable/judge", "lab:nowhere/student", "lab:unreachable"):
        with pytest.raises(ModelError, match="lab:reachable/student"):
            bundled_model(name)


@pytest.mark.slow
def test_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build_command(small_world(tmp_path), tmp_path, seed=3, steps=1)
    assert f"written to {tmp_path}" in capsys.readouterr().out
    assert "--seed 3" in (tmp_path / "teacher" / "README.md").read_text(encoding="utf-8")
    questions_command("unreachable", "3", 4)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and all(line.startswith("hard") and "→" in line for line in lines)
    questions_command("unreachable", None, 10_000, "test")
    assert len(capsys.readouterr().out.splitlines()) == len(lab_questions("unreachable", "test"))
    with pytest.raises(SettingsError, match="--n"):
        questions_command("unreachable", n=0)
    with pytest.raises(SettingsError, match="--steps"):
        build_command("unreachable", tmp_path, steps=0)
