"""Writes a run folder of any size with invented content, to measure and to test what reads run folders.

    python benchmarks/make_run.py runs/big                        200 steps x 576 groups x 8 rollouts
    python benchmarks/make_run.py runs/small --steps 12 --batch 16

Questions have a hidden difficulty, the student gets better with the steps, and the replay buffer is the real one, so that the files
hang together like those of a real run: the report's numbers are plausible, but they say nothing about the method.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from zppo.config.methods import METHODS
from zppo.config.recipe import dump_recipe
from zppo.config.settings import Settings
from zppo.core.draws import keyed_random
from zppo.core.replay import PromptReplayBuffer
from zppo.core.types import Draft, Message, Question
from zppo.prompts.book import PromptBook
from zppo.runs.log import ROLLOUT_SCHEMA, ROLLOUTS, ROWS_PER_GROUP, RunLog

WORDS = (
    "first we add the two numbers then multiply by three and check the result again so that nothing is lost along the way "
    "because a sum of even terms stays even while the remainder follows from the last step hence take the difference"
).split()


@dataclass(frozen=True)
class Shape:
    """How large the run is and how its student behaves."""

    steps: int = 200
    batch: int = 384
    group_size: int = 8
    capacity: int = 10_000
    characters: int = 1500  # mean length of a completion
    seed: int = 0
    gain: float = 3.0  # what the student learns over the run, in logits
    method: str = "zppo"


@dataclass
class Row:
    """One group on its way into the file."""

    kind: str
    question: Question
    prompt: str
    audit: dict[str, Any]
    replayed: bool
    answers: list[str | None]


class Maker:
    """Makes one run."""

    def __init__(self, folder: Path, shape: Shape) -> None:
        self.shape, self.log, self.book = shape, RunLog(folder), PromptBook()
        self.random = random.Random(shape.seed)
        self.text = " ".join(self.random.choices(WORDS, k=400_000))
        self.buffer = PromptReplayBuffer(shape.capacity, 0.5, shape.seed)
        self.method = METHODS[shape.method]
        self.skill = 0.0

    def make(self) -> None:
        """Writes recipe.yaml, metrics.jsonl, buffer.jsonl and rollouts/."""
        shape = self.shape
        self.log.open()
        settings = Settings.model_validate(
            {
                "method": shape.method,
                "seed": shape.seed,
                "student": {"model": "invented-student"},
                "teacher": {"model": "invented-teacher"},
                "data": {"train": "invented.jsonl", "eval": "invented-eval.jsonl"},
                "rollout": {"batch_size": shape.batch, "group_size": shape.group_size},
                "zone": {"buffer_capacity": shape.capacity},
                "train": {"steps": shape.steps},
            }
        )
        (self.log.folder / "recipe.yaml").write_text(dump_recipe(settings), encoding="utf-8")
        self._evaluate(0, "eval")
        for step in range(1, shape.steps + 1):
            self._step(step)
            if step % max(1, shape.steps // 4) == 0 and step < shape.steps:
                self._evaluate(step, "eval")
        self._evaluate(shape.steps, "final")

    def _question(self, number: int) -> Question:
        a, b = 3 + number % 97, 5 + number // 97
        text = f"What is {a} times {b}, plus {number}?"
        level = ("easy", "medium", "hard")[number % 3]
        return Question(f"invented.jsonl:{number + 1}", (Message("user", text),), str(a * b + number), level=level)

    def _chance(self, question: Question) -> float:
        """Chance of a right plain rollout: some questions are out of reach from the start, and the student learns."""
        hidden = keyed_random(self.shape.seed, question.id).gauss({"easy": 1.5, "medium": -0.8, "hard": -3.2}[question.level], 1.2)
        return 1 / (1 + math.exp(-(hidden + self.skill)))

    def _wrong(self, question: Question) -> str:
        return str(int(str(question.gold)) + self.random.choice((-10, -1, 1, 2, 10)))

    def _plain(self, question: Question, replayed: bool) -> Row:
        chance = self._chance(question)
        answers = [self._answer(question, chance) for _ in range(self.shape.group_size)]
        return Row("plain", question, self._render(self.book.plain(question)), {}, replayed, answers)

    def _answer(self, question: Question, chance: float) -> str | None:
        if self.random.random() < chance:
            return str(question.gold)
        return None if self.random.random() < 0.05 else self._wrong(question)

    def _render(self, messages: tuple[Message, ...]) -> str:
        return "".join(f"<|im_start|>{m.role}\n{m.content}<|im_end|>\n" for m in messages) + "<|im_start|>assistant\n"

    def _slice(self, characters: int) -> str:
        start = self.random.randrange(len(self.text) - characters - 1)
        return self.text[start : start + characters]

    def _candidate(self, answer: str | None) -> str:
        return self._slice(200) + (f"\nThe answer is \\boxed{{{answer}}}" if answer is not None else "")

    def _again(self, row: Row) -> list[Row]:
        """BCQ and NCQ of a hard question."""
        question, gold = row.question, str(row.question.gold)
        wrong = [a for a in row.answers if a != gold]
        rows = []
        negatives = [a for a in wrong if a is not None]
        if negatives and self.random.random() < 0.9:
            correct_at, negative = self.random.randrange(2), self.random.choice(negatives)
            texts = [self._candidate(gold), self._candidate(negative)]
            shown = texts if correct_at == 0 else texts[::-1]
            audit: dict[str, Any] = {"correct_at": correct_at, "positive_answer": gold, "negative_answer": negative}
            prompt = self._render(self.book.render(Draft("bcq", question, {"candidates": shown})))
            first = (gold, negative)[correct_at]
            pool: list[str | None] = [*[gold] * 5, *[negative] * 3, first, self._wrong(question)]
            rows.append(Row("bcq", question, prompt, audit, row.replayed, [self.random.choice(pool) for _ in row.answers]))
        listed = tuple(dict.fromkeys(a for a in wrong if a is not None))
        slots = {"answers": listed, "candidates": [self._candidate(a) for a in wrong]}
        prompt = self._render(self.book.render(Draft("ncq", question, slots)))
        audit = {"wrong_answers": listed, "teacher_answers": [gold] if rows else []}
        pool = [*[gold] * 2, *listed, self._wrong(question), None]
        answers = [self.random.choice(pool) for _ in row.answers]
        rows.append(Row("ncq", question, prompt, audit, row.replayed, answers))
        return rows

    def _step(self, step: int) -> None:
        shape = self.shape
        new = [self._question((step - 1) * shape.batch + i) for i in range(shape.batch)]
        replayed = self.buffer.sample(shape.batch // 4, {q.id for q in new}) if self.method.replay else []
        self.skill = shape.gain * step / shape.steps
        plain = [self._plain(q, False) for q in new] + [self._plain(q, True) for q in replayed]
        hard = sorted((r for r in plain if _accuracy(r) < 0.5), key=_accuracy)
        again: list[Row] = []
        able = 0
        for row in hard:
            wanted = [r for r in self._again(row) if r.kind in self.method.reformulations]
            able += any(r.kind == "bcq" for r in wanted)
            again += wanted[: shape.batch // 4 - len(again)]
        rows = plain + again
        entries = {q.question.id: e.accuracy for q in plain if (e := self.buffer.get(q.question.id))}
        results = [(r.question, _accuracy(r)) for r in plain] if self.method.replay else []
        changes = self.buffer.update(results, step)
        entries |= {e.question.id: e.accuracy for e in changes.admitted}
        table = self._table(step, rows, entries)
        pq.write_table(table, self.log.folder / ROLLOUTS / f"step-{step:06d}.parquet", compression="zstd", row_group_size=ROWS_PER_GROUP)
        self.log.buffer(step, changes)
        self.log.metrics(step, "step", self._metrics(rows, table, (len(hard), able), len(replayed), changes))

    def _table(self, step: int, rows: list[Row], entries: dict[str, float]) -> pa.Table:
        size, columns = self.shape.group_size, {name: [] for name in ROLLOUT_SCHEMA.names}
        for row in rows:
            correct = [a == row.question.gold for a in row.answers]
            mean = sum(correct) / size
            audit = json.dumps(row.audit)
            for i, (answer, right) in enumerate(zip(row.answers, correct, strict=True)):
                length = max(40, int(self.random.expovariate(1 / self.shape.characters)) % (6 * self.shape.characters))
                values = (
                    step, row.kind, row.question.id, row.question.messages[-1].content, [], [], row.question.level, row.replayed,
                    entries.get(row.question.id), i, row.prompt,
                    f"<think>{self._slice(length)}</think>" + (f"\n\\boxed{{{answer}}}" if answer is not None else ""),
                    row.question.gold, [row.question.gold], None, row.question.grading, answer, right, True,
                    "equal" if right else "no answer" if answer is None else "different", float(right), None, None, float(right) - mean,
                    len(row.prompt) // 4, length // 4, answer is None, 0.9 - 0.1 * self.skill + 0.1 * self.random.random(), audit,
                )  # fmt: skip
                for column, value in zip(columns.values(), values, strict=True):
                    column.append(value)
        return pa.table(columns, schema=ROLLOUT_SCHEMA)

    def _metrics(self, rows: list[Row], table: pa.Table, eligible: tuple[int, int], replayed: int, changes: Any) -> dict[str, Any]:
        hard, able = eligible
        tokens = sum(table["completion_tokens"].to_pylist())
        kinds = {k: [r for r in rows if r.kind == k] for k in ("plain", "bcq", "ncq")}
        asked = len(kinds["bcq"]) + len(kinds["ncq"])
        noise = self.random.random
        return {
            "accuracy": {k: sum(map(_accuracy, v)) / len(v) for k, v in kinds.items() if v},
            "composition": {
                "easy": (len(kinds["plain"]) - hard) / len(rows),
                "hard": hard / len(rows),
                **{k: len(kinds[k]) / len(rows) for k in self.method.reformulations},
            },
            "eligibility": {
                "easy": (len(kinds["plain"]) - hard) / len(kinds["plain"]),
                **({"bcq": able / len(kinds["plain"]), "ncq": (hard - able) / len(kinds["plain"])} if self.method.reformulations else {}),
            },
            "replayed_questions": replayed,
            "replayed_share_of_slots": sum(r.replayed for k in ("bcq", "ncq") for r in kinds[k]) / max(1, asked),
            "loss": 0.02 * (noise() - 0.5), "grad_norm": 0.3 + 0.1 * noise(), "clip_low_share": 0.001 * noise(),
            "clip_high_share": 0.002 * noise(), "clip_dual_share": 1e-5 * noise(), "logprob_gap_mean": 1e-6, "logprob_gap_max": 1e-5,
            "optimizer_steps": 4.0, "skipped_updates": 0.0, "train_tokens_needed": 1.2 * tokens, "train_tokens_computed": 1.4 * tokens,
            "positive_advantage_share": sum(a > 0 for a in table["advantage"].to_pylist()) / len(table),
            "nonzero_advantage_share": sum(a != 0 for a in table["advantage"].to_pylist()) / len(table),
            "entropy": sum(table["entropy"].to_pylist()) / len(table), "completion_tokens_mean": tokens / len(table),
            "completion_tokens_max": max(table["completion_tokens"].to_pylist()),
            "truncated_share": sum(table["truncated"].to_pylist()) / len(table),
            "no_answer_share": table["answer"].null_count / len(table), "ungraded": 0.0,
            "bcq_prompts": float(len(kinds["bcq"])), "ncq_prompts": float(len(kinds["ncq"])), "hard_questions": float(hard),
            "teacher_questions": asked / 2, "teacher_rollouts": 2.0 * asked, "teacher_correct": 2.0 * asked * (0.7 + 0.1 * noise()),
            "teacher_unreachable": float(noise() < 0.1), "teacher_solved_none": 2.0, "teacher_prompt_tokens": 100.0 * asked,
            "teacher_completion_tokens": 1500.0 * asked, "bcq_without_negative": 1.0, "bcq_raw_pairs": float(noise() < 0.3),
            "ncq_raw_candidates": 3.0, "too_long": 0.0, "compression_asked": 5.0 * asked, "compression_failed": 10 * noise(),
            "compression_unreachable": 0.0, "compression_prompt_tokens": 2000.0 * asked, "compression_completion_tokens": 300.0 * asked,
            "buffer": len(self.buffer), "buffer_by_entry": {f"{a:.1%}": n for a, n in self.buffer.occupancy().items()},
            "admitted": len(changes.admitted), "graduated": len(changes.graduated), "evicted": len(changes.evicted),
            "student_tokens": tokens, "prompt_tokens": sum(table["prompt_tokens"].to_pylist()), "teacher_tokens": int(1800.0 * asked),
            "seconds": {"sampling": 200 + 20 * noise(), "teacher": 50 + 9 * noise(), "update": 90.0, "other": 2.0, "step": 350.0},
            "tokens_per_second": tokens / 350,
        }  # fmt: skip

    def _evaluate(self, step: int, event: str) -> None:
        self.skill = self.shape.gain * step / self.shape.steps
        questions = [self._question(10_000_000 + i) for i in range(300)]
        levels: dict[str, list[float]] = {}
        for question in questions:
            levels.setdefault(question.level, []).append(self._chance(question))
        means = {level: sum(v) / len(v) for level, v in levels.items()}
        overall = sum(means.values()) / len(means)
        values = {"accuracy": overall, "by_level": means, "count": 300, "tokens": 350.0, "truncated": 0.01}
        self.log.metrics(step, event, values)


def _accuracy(row: Row) -> float:
    return sum(a == row.question.gold for a in row.answers) / len(row.answers)


def make_run(folder: Path, shape: Shape | None = None) -> Path:
    """Writes an invented run of this shape into `folder`, which must not exist, and returns it."""
    folder.mkdir(parents=True)
    Maker(folder, shape or Shape()).make()
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    for field in fields(Shape):
        kind = type(field.default)
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=kind, default=field.default)
    options = vars(parser.parse_args())
    folder = options.pop("folder")
    started = time.perf_counter()
    make_run(folder, Shape(**options))
    size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    print(f"{folder}: {size / 1e6:,.0f} MB in {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
