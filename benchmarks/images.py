"""A step on questions about images: ours against stock TRL GRPO, in turn; seconds, and how often an image is decoded and preprocessed.

The model is a tiny Gemma 3: its processor is the one that AutoProcessor of transformers loads without torchvision, so that the peer can
run on any machine. Questions, images, prompts and rewards are the same for both; each question has an image of its own.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks import ours, theirs
from benchmarks.common import Options, interleaved, medians, ratio, run
from benchmarks.tables import markdown
from benchmarks.workers import Stopwatch, workers
from benchmarks.world import Shape, make_tokenizer, questions, user_turn

SHAPE = Shape(questions=16, group=8, prompt=(40, 60), limit=32, layers=2, width=64, steps=24)
QUICK = Shape(questions=4, group=4, prompt=(20, 30), limit=6, layers=1, width=32, steps=8)
WARM = 2
PHOTO = (800, 600)  # pixels of an image as it lies on disk, a JPEG
SIDE, PATCH, TOKENS = 112, 14, 16  # what the model sees of it: pixels on a side, patches of so many, tokens
IMAGE = ("<start_of_image>", "<end_of_image>", "<image_soft_token>")
TEMPLATE = (
    "{% for message in messages %}<|im_start|> {{ message.role }} {% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}{% if part.type == 'image' %}<start_of_image>{% else %} {{ part.text }}{% endif %}{% endfor %}"
    "{% endif %} <|im_end|> {% endfor %}{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
)


@dataclass(frozen=True)
class World:
    """What both sides get: checkpoint, sizes, questions with the paths of their images, CPU threads."""

    model: Path
    shape: Shape
    asked: list[dict[str, Any]]
    threads: int


def make_world(folder: Path, shape: Shape, threads: int) -> World:
    """Writes the checkpoint and an image for every question."""
    import numpy
    from PIL import Image

    rng, asked = numpy.random.default_rng(0), []
    for row in questions(shape):
        blocks, path = (Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=numpy.uint8)), folder / f"{row['id']}.jpg")
        blocks.resize(PHOTO, Image.Resampling.BICUBIC).save(path, quality=90)
        asked.append({**row, "images": [str(path)]})
    return World(make_model(folder / "model", shape), shape, asked, threads)


def make_model(folder: Path, shape: Shape) -> Path:
    """The tiny Gemma 3, random; its output weights are tiny, so that completions end by chance as in `world`."""
    import torch
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration, GenerationConfig

    names = dict(zip(("boi_token", "eoi_token", "image_token"), IMAGE, strict=True))
    tokenizer = make_tokenizer(IMAGE, TEMPLATE, extra_special_tokens=names)
    first, last, image = tokenizer.convert_tokens_to_ids(list(IMAGE))
    width, half = shape.width, [0.5] * 3
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": width,
        "intermediate_size": 3 * width,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": width // 4,
        "max_position_embeddings": 4096,
        "pad_token_id": 0,
        "eos_token_id": 2,
        "bos_token_id": None,
    }
    vision = {"hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": 4, "num_attention_heads": 4}
    torch.manual_seed(0)
    model = Gemma3ForConditionalGeneration(
        Gemma3Config(
            text_config=text,
            vision_config={**vision, "image_size": SIDE, "patch_size": PATCH},
            mm_tokens_per_image=TOKENS,
            boi_token_index=first,
            eoi_token_index=last,
            image_token_index=image,
            tie_word_embeddings=False,
        )
    )
    torch.nn.init.normal_(model.lm_head.weight, std=1e-3)
    model.generation_config = GenerationConfig(eos_token_id=[2, 3], pad_token_id=0, do_sample=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    images = {"image_processor_type": "Gemma3ImageProcessor", "size": {"height": SIDE, "width": SIDE}}
    files = {
        "preprocessor_config.json": {**images, "image_mean": half, "image_std": half},
        "processor_config.json": {"image_seq_length": TOKENS, "processor_class": "Gemma3Processor"},
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    return folder


class Counts:
    """How many images were decoded and preprocessed since the last look."""

    def __init__(self) -> None:
        self.seen = {"decoded": 0.0, "preprocessed": 0.0}

    def counted(self, what: str, function: Callable[..., Any], number: Callable[..., int]) -> Callable[..., Any]:
        """The function, counted."""

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self.seen[what] += number(*args)
            return function(*args, **kwargs)

        return wrapped

    def watch_preprocessing(self) -> None:
        """Of every image processor with PIL."""
        from transformers.image_processing_backends import PilBackend
        from transformers.image_utils import make_flat_list_of_images

        flat: Any = make_flat_list_of_images
        PilBackend.preprocess = self.counted(  # type: ignore[method-assign]
            "preprocessed", PilBackend.preprocess, lambda _, images, *rest: len(flat(images))
        )

    def take(self) -> dict[str, float]:
        """What was counted; from now on anew."""
        taken, self.seen = self.seen, dict.fromkeys(self.seen, 0.0)
        return taken


def serve_ours(pipe: Connection, world: World) -> None:
    """Steps on demand, as `ours.serve`, with counts."""
    from zppo.images import processor as image_processor

    counts = Counts()
    counts.watch_preprocessing()
    image_processor.open_image = counts.counted("decoded", image_processor.open_image, lambda *_: 1)
    limits = {"data": {"images": {"min_pixels": 1, "max_pixels": 10**8}}}
    own = ours.Ours(world.model, world.shape, world.asked, world.threads, settings=limits)
    script = ours.Script(world.shape)
    with ours.assembled(own, script) as parts:
        trainer, watch, reported = parts.trainer, Stopwatch(), dict[str, Any]()
        trainer.student = dataclasses.replace(trainer.student, grades_while_sampling=False)  # the script's rewards go by place in the batch
        trainer.run_log.listener = lambda step, event, metrics: reported.update(metrics)
        pipe.send(("ready", None))
        while True:
            script.new_step(pipe.recv()["trivial"])
            counts.take()
            watch.start()
            trainer.step(trainer.done + 1)
            tokens = {"student_tokens": float(reported["student_tokens"])}
            pipe.send(("step", {**watch.seconds(), **counts.take(), **tokens}))


def serve_theirs(pipe: Connection, world: World) -> None:
    """The peer, halted between two steps."""
    import torch
    from datasets import Dataset, Sequence
    from datasets import Image as ImageFeature
    from transformers import AutoModelForImageTextToText, AutoProcessor, TrainerCallback
    from trl import GRPOTrainer

    from benchmarks.world import correct
    from zppo.data.order import batch_ids

    torch.set_num_threads(world.threads)
    counts, watch, asked = Counts(), Stopwatch(), {"trivial": 0.5, "tokens": 0}
    counts.watch_preprocessing()
    ImageFeature.decode_example = counts.counted("decoded", ImageFeature.decode_example, lambda *_: 1)

    def reward(completion_ids: list[list[int]], **_: Any) -> list[float | None]:
        asked["tokens"] = sum(map(len, completion_ids))
        size = world.shape.group
        return [float(f) for row in correct(len(completion_ids) // size, size, asked["trivial"], 1) for f in row]

    class Halt(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            pipe.send(("ready", None))
            self._wait()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            tokens = {"student_tokens": float(asked["tokens"])}
            pipe.send(("step", {**watch.seconds(), **counts.take(), **tokens}))
            self._wait()

        def _wait(self) -> None:
            asked["trivial"] = pipe.recv()["trivial"]
            counts.take()
            watch.start()

    shape = world.shape
    order = [i for step in range(shape.steps) for i in batch_ids(len(world.asked), shape.questions, 0, step)]  # our side's
    rows = [world.asked[i] for i in order]
    data = Dataset.from_dict(
        {"prompt": [[{"role": "user", "content": user_turn(row["prompt"])}] for row in rows], "images": [row["images"] for row in rows]}
    ).cast_column("images", Sequence(ImageFeature()))
    with tempfile.TemporaryDirectory() as folder:
        own = theirs.Theirs(world.model, world.shape, [], world.threads, rows=world.shape.group * 2)
        trainer: Any = GRPOTrainer(
            model=AutoModelForImageTextToText.from_pretrained(world.model, dtype=torch.float32),
            reward_funcs=reward,
            args=theirs.config_of(own, folder),
            train_dataset=data,
            processing_class=AutoProcessor.from_pretrained(world.model),
        )
        trainer.add_callback(Halt())
        trainer.train()


def measure(options: Options) -> Mapping[str, Any]:
    """Steps of both in turn."""
    shape, repetitions = (QUICK, 2) if options.quick else (SHAPE, 9)
    with tempfile.TemporaryDirectory() as folder:
        world = make_world(Path(folder), shape, options.threads)
        with workers(ours=(serve_ours, world), trl=(serve_theirs, world)) as started:
            for _ in range(WARM):
                for worker in started.values():
                    worker.ask({"trivial": 0.5})
            steps = interleaved(repetitions, {n: partial(w.ask, {"trivial": 0.5}) for n, w in started.items()})
    return {
        "shape": vars(shape),
        "photo": PHOTO,
        "ratio": ratio(steps["ours"], steps["trl"], "step"),
        "cpu_ratio": ratio(steps["ours"], steps["trl"], "cpu"),
        "medians": {name: medians(rows) for name, rows in steps.items()},
        "repetitions": repetitions,
    }


def table(result: Mapping[str, Any]) -> str:
    """Counts and seconds of a step."""
    names = {"ours": "our GRPO", "trl": "TRL GRPO"}
    rows = [
        (
            names[name],
            f"{found['decoded']:.0f}",
            f"{found['preprocessed']:.0f}",
            f"{found['step']:.3f}",
            f"{found['cpu']:.3f}",
            f"{found['student_tokens']:,.0f}",
        )
        for name, found in result["medians"].items()
    ]
    questions, group = result["shape"]["questions"], result["shape"]["group"]
    own = result["ratio"]
    return (
        markdown(["a step", "images decoded", "preprocessed", "seconds", "processor seconds", "tokens sampled"], rows)
        + f"\n\n{questions} questions with an image each, {group} rollouts: ours takes **{own['median']:.2f}** ({own['low']:.2f}-"
        f"{own['high']:.2f}) of its time, {result['cpu_ratio']['median']:.2f} of its processor time."
    )


if __name__ == "__main__":
    sys.exit(run("images", measure))
