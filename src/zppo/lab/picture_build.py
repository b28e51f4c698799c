"""The models that see: a tiny Qwen3-VL with its tokenizer and image processor, and its pretraining [zppo].

Builds the student and the teacher of a world of pictures from nothing: `zppo lab build vision`.

The model card of a checkpoint that sees; it says what was planted in the corpus.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from transformers import PreTrainedTokenizerFast, Qwen2VLImageProcessorPil, Qwen3VLConfig, Qwen3VLForConditionalGeneration

from zppo.core.draws import draw_key, keyed_random
from zppo.core.types import Message, Question
from zppo.engines.chat import Chat
from zppo.images.processor import ImageProcessor
from zppo.images.store import PixelLimits
from zppo.lab import pretrain
from zppo.lab.build import Say, lab_book, save, teller
from zppo.lab.corpus import ASSISTANT, END, USER, word_tokenizer
from zppo.lab.picture_corpus import Descriptions, Document, StudentCorpus, TeacherCorpus
from zppo.lab.picture_world import Ask, VisionSettings, VisionWorld
from zppo.lab.pictures import CELL, KINDS, PALETTE, SIDE, SIZE, WORDS, Picture, cell_words, draw_chart, draw_scene, pixels
from zppo.lab.pretrain import CONTEXT, Probe, Report, batches, optimise
from zppo.lab.questions import with_pictures, write_vision_questions
from zppo.lab.world import Pretraining
from zppo.prompts import PromptBook

IMAGE_PAD, VIDEO_PAD, VISION_START, VISION_END = "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"
MEDIA = (IMAGE_PAD, VIDEO_PAD, VISION_START, VISION_END)
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ ('" + ASSISTANT + "' if message['role'] == 'assistant' else '" + USER + "') + ' ' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '" + VISION_START + IMAGE_PAD + VISION_END + "' }}{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{{ ' " + END + " ' if message['role'] == 'assistant' else ' ' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '" + ASSISTANT + "' }}{% endif %}"
)
MERGE = 2  # patches of a token on a side
PATCH = CELL // MERGE  # pixels of a patch on a side
FRAMES = 2  # a picture counts as a film of two equal frames, as in every model of this family
CHARTS = 0.4  # share of charts among the pictures that seeing is learnt from
ALIKE = 8.0  # how much more a word counts that is nearer by one, in nats: keeps a picture's tokens as long as words are
GRID = SIZE // PATCH
TOKENS = (GRID // MERGE) ** 2
"""Tokens of a picture: one for every cell of the grid."""


@dataclass(frozen=True, slots=True)
class Row(pretrain.Row):
    """One document as token ids, and the picture that stands in them; compressions have none."""

    picture: Picture | None


def make_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of all worlds of pictures."""
    return word_tokenizer(WORDS, MEDIA, CHAT_TEMPLATE)


def make_processor() -> Qwen2VLImageProcessorPil:
    """Cuts a picture of SIZE by SIZE pixels into patches as it is; what is larger is made smaller."""
    half = [0.5, 0.5, 0.5]
    return Qwen2VLImageProcessorPil(
        patch_size=PATCH,
        merge_size=MERGE,
        temporal_patch_size=FRAMES,
        min_pixels=CELL * CELL,
        max_pixels=SIZE * SIZE,
        image_mean=half,
        image_std=half,
    )


def make_model(settings: VisionSettings, tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen3VLForConditionalGeneration:
    """A Qwen3-VL model with random weights drawn from `seed`; embeddings are tied."""
    text, sight = settings.model, settings.vision
    ids = tokenizer.get_vocab()
    head = text.width // text.heads
    part = head // 6  # of the rotations: as many for the time, the row and the column of a token
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": text.width,
            "intermediate_size": text.feed_forward,
            "num_hidden_layers": text.layers,
            "num_attention_heads": text.heads,
            "num_key_value_heads": text.heads,
            "head_dim": head,
            "max_position_embeddings": CONTEXT,
            "initializer_range": 0.05,
            "tie_word_embeddings": True,
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [head // 2 - 2 * part, part, part],
                "mrope_interleaved": True,
            },
        },
        vision_config={
            "depth": sight.layers,
            "hidden_size": sight.width,
            "intermediate_size": sight.feed_forward,
            "num_heads": sight.heads,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": FRAMES,
            "out_hidden_size": text.width,
            "num_position_embeddings": GRID * GRID,
            "deepstack_visual_indexes": [],
            "initializer_range": 0.05,
        },
        image_token_id=ids[IMAGE_PAD],
        video_token_id=ids[VIDEO_PAD],
        vision_start_token_id=ids[VISION_START],
        vision_end_token_id=ids[VISION_END],
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(draw_key("lab", "weights", seed) % 2**31)
        return Qwen3VLForConditionalGeneration(config)


def patches(pictures: Sequence[Picture]) -> torch.Tensor:
    """What `make_processor` gives for pictures of SIZE by SIZE pixels, without its detours: (pictures * GRID * GRID, values), float32."""
    colours = (PALETTE.astype(np.float64) / 255 - 0.5) / 0.5
    shown = colours.astype(np.float32)[np.stack([pixels(picture) for picture in pictures])]  # (B, SIZE, SIZE, 3)
    cut = shown.reshape(len(pictures), SIDE, MERGE, PATCH, SIDE, MERGE, PATCH, 3)
    ordered = cut.transpose(0, 1, 4, 2, 5, 7, 3, 6)  # (B, row, column, row of the patch, its column, 3, y, x)
    frames = np.repeat(ordered[:, :, :, :, :, :, None], FRAMES, axis=6)
    return torch.from_numpy(frames.reshape(len(pictures) * GRID * GRID, -1))


def grids(count: int) -> torch.Tensor:
    """How many patches pictures have: frames, rows, columns; (count, 3)."""
    return torch.tensor([[1, GRID, GRID]] * count)


def look(model: Qwen3VLForConditionalGeneration, pictures: Sequence[Picture]) -> torch.Tensor:
    """How alike every token of a picture is to every word, where both enter the language model: logits (pictures * TOKENS, V)."""
    seen = model.model.get_image_features(patches(pictures), grids(len(pictures)), return_dict=True)
    features = torch.cat(list(seen.pooler_output))
    return ALIKE * F.linear(features, model.lm_head.weight)  # a word's vector is the same at either end


def learn_to_see(
    model: Qwen3VLForConditionalGeneration, chat: Chat, how: Pretraining, seed: int, report: Report = lambda step, loss: None
) -> None:
    """Teaches the part that sees, before any document: a picture's token is to be what lies in its cell, in the model's own words.

    Its three words (`zppo.lab.pictures.cell_words`) are equally likely. Language comes to pictures that mean something
    this way, in a tenth of the steps; loss in nats per token of a picture.
    """
    ids = chat.tokenizer.get_vocab()

    def losses(step: int) -> Iterator[torch.Tensor]:
        rng = keyed_random("lab", "sight", seed, step)
        pictures = [draw_chart(rng) if rng.random() < CHARTS else draw_scene(rng) for _ in range(how.batch)]
        wanted = torch.tensor([[ids[word] for word in words] for p in pictures for words in cell_words(p)])  # (N, 3)
        yield -look(model, pictures).log_softmax(-1).gather(1, wanted).mean()

    optimise(model, how, losses, report)


def with_picture(ids: Sequence[int], chat: Chat) -> tuple[int, ...]:
    """A prompt's token ids with the places of a picture's tokens, which stand at the start of its one turn."""
    vocabulary = chat.tokenizer.get_vocab()
    places = (vocabulary[VISION_START], *[vocabulary[IMAGE_PAD]] * TOKENS, vocabulary[VISION_END])
    return (ids[0], *places, *ids[1:])


class Corpus(Protocol):
    """Where documents come from."""

    def document(self, rng: Random) -> Document:
        """One document."""
        ...


def rows(corpus: Corpus, chat: Chat, seed: int, step: int, count: int) -> list[Row]:
    """The documents of one step, the same for equal (seed, step)."""
    rng = keyed_random("lab", "corpus", seed, step)
    documents = [corpus.document(rng) for _ in range(count)]
    texts = [f"{document.completion} {END}" for document in documents]
    completions = chat.tokenizer(texts, add_special_tokens=False)["input_ids"]
    made = []
    for document, completion in zip(documents, completions, strict=True):
        prompt = chat.encode(document.messages)
        if document.picture is not None:
            prompt = with_picture(prompt, chat)
        made.append(Row((*prompt, *completion), len(prompt), document.picture))
    return made


def loss_sum(model: Qwen3VLForConditionalGeneration, batch: Sequence[Row]) -> torch.Tensor:
    """Summed negative log-probability (nats) of the completions' tokens; a scalar. All rows have a picture, or none has."""
    longest = max(len(row.ids) for row in batch)
    ids = torch.zeros(len(batch), longest, dtype=torch.long)  # (B, T); padding on the right is never looked back at
    learnt = torch.zeros(len(batch), longest, dtype=torch.bool)
    for i, row in enumerate(batch):
        ids[i, : len(row.ids)] = torch.tensor(row.ids)
        learnt[i, row.prompt : len(row.ids)] = True
    seen = {}
    if pictures := [row.picture for row in batch if row.picture is not None]:
        kinds = (ids[:1] == model.config.image_token_id).long()
        places, _ = model.model.get_rope_index(ids[:1], kinds, grids(1))  # pictures stand at the same place in all rows
        seen = {
            "pixel_values": patches(pictures),
            "image_grid_thw": grids(len(pictures)),
            "position_ids": places.expand(-1, len(batch), -1),
        }
    hidden = model.model(input_ids=ids, use_cache=False, **seen).last_hidden_state  # (B, T, D)
    logits = model.lm_head(hidden[:, :-1][learnt[:, 1:]])  # (N, V)
    return F.cross_entropy(logits.float(), ids[:, 1:][learnt[:, 1:]], reduction="sum")


def pretrain_seeing(
    model: Qwen3VLForConditionalGeneration,
    corpus: Corpus,
    chat: Chat,
    how: Pretraining,
    seed: int,
    report: Report = lambda step, loss: None,
) -> Qwen3VLForConditionalGeneration:
    """Trains the model in place on `how.steps` batches of fresh documents; see `zppo.lab.pretrain.pretrain`. What sees is left as it is."""

    model.model.visual.requires_grad_(False)

    def losses(step: int) -> Iterator[torch.Tensor]:
        documents = rows(corpus, chat, seed, step, how.batch)
        tokens = sum(len(row.ids) - row.prompt for row in documents)
        for alike in ([r for r in documents if r.picture], [r for r in documents if not r.picture]):
            for batch in batches(alike):
                yield loss_sum(model, batch) / tokens

    optimise(model, how, losses, report)
    model.model.visual.requires_grad_(True)
    return model


LIMITS = PixelLimits(SIZE * SIZE, SIZE * SIZE)
"""Pictures are shown as they are drawn."""
SAMPLES = 16


@dataclass(frozen=True, slots=True)
class BuiltVision:
    """What one build measured, on held-out questions and by kind.

    Attributes:
        student, teacher: greedy accuracy on plain prompts; of a model that was not made, nothing.
        sampled: share of the student's rollouts at temperature 1 that are right, on plain prompts.
        candidates: greedy accuracy of the student on prompts with a right and a wrong candidate.
        fidelity: share of answers that survive the teacher's compression; None where no teacher was made.
        steps: of seeing, of describing, of the student and of the teacher.
        seed: of weights and corpora.
        seconds: what it took.
    """

    student: dict[str, float]
    sampled: dict[str, float]
    candidates: dict[str, float]
    teacher: dict[str, float]
    fidelity: float | None
    steps: tuple[int, int, int, int]
    seed: int
    seconds: float


def build_vision(
    world: VisionWorld, out: Path, seed: int = 0, steps: int | None = None, say: Say = lambda line: None, *, with_teacher: bool = True
) -> BuiltVision:
    """As `zppo.lab.build.build`; the pictures of the questions go to `out/pictures`.

    What sees is trained first, then the rest on descriptions, both once; student and teacher go on from there with their own documents.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _build(world, out, seed, steps, say, with_teacher)
    finally:
        torch.set_num_threads(threads)


def _build(world: VisionWorld, out: Path, seed: int, steps: int | None, say: Say, with_teacher: bool) -> BuiltVision:
    started = time.perf_counter()
    settings, tokenizer = world.settings, make_tokenizer()
    chat = Chat(tokenizer)
    book = lab_book(chat)
    seeing, describing, own, teachers = (
        how if steps is None else how.model_copy(update={"steps": steps})
        for how in (settings.seeing, settings.describing, settings.pretraining, settings.teacher)
    )
    seer = make_model(settings, tokenizer, seed)
    learn_to_see(seer, chat, seeing, seed, teller(say, f"{world.name}/sight", seeing.steps))
    told = teller(say, f"{world.name}/words", describing.steps)
    pretrain_seeing(seer, Descriptions(world, book), chat, describing, seed, told)
    roles: list[tuple[str, StudentCorpus | TeacherCorpus, Pretraining]] = [("student", StudentCorpus(world, book), own)]
    if with_teacher:
        roles.append(("teacher", TeacherCorpus(world, book), teachers))
    probes: dict[str, Probe] = {}
    for role, corpus, how in roles:
        model = deepcopy(seer)
        pretrain_seeing(model, corpus, chat, how, seed, teller(say, f"{world.name}/{role}", how.steps))
        save(model, tokenizer, out / role)
        make_processor().save_pretrained(out / role)
        probes[role] = probe_of(out / role)
    asks = world.asks()
    questions = {split: with_pictures(world, split, asks[split], out.absolute() / "pictures") for split in asks}
    for split, of_split in questions.items():
        write_vision_questions(out / f"{split}.jsonl", of_split)
    test, shown = questions["test"], candidate_prompts(world, book, asks["test"], questions["test"])
    student = probes["student"]
    built = BuiltVision(
        student=student.accuracy(test),
        sampled=student.accuracy(test, SAMPLES, 1.0),
        candidates=student.accuracy(test, prompt=lambda q: shown[q.id]),
        teacher=probes["teacher"].accuracy(test) if with_teacher else {},
        fidelity=probes["teacher"].copied(TeacherCorpus(world, book).response) if with_teacher else None,
        steps=(seeing.steps, describing.steps, own.steps, teachers.steps),
        seed=seed,
        seconds=time.perf_counter() - started,
    )
    for role in probes:
        (out / role / "README.md").write_text(model_card(world, role, built), encoding="utf-8")
    (out / "build.json").write_text(json.dumps(asdict(built), indent=1) + "\n", encoding="utf-8")
    return built


def probe_of(folder: Path) -> Probe:
    """A checkpoint as it lies there, ready to be asked."""
    model = Qwen3VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    image_processor = ImageProcessor.load(folder, tokenizer, LIMITS)
    return Probe(model, tokenizer, lab_book(Chat(tokenizer)), image_processor)


def candidate_prompts(
    world: VisionWorld, book: PromptBook, asks: Sequence[Ask], questions: Sequence[Question]
) -> dict[str, tuple[Message, ...]]:
    """For every question by id: a BCQ prompt with the right reading and a wrong one, in either order."""
    corpus, made = StudentCorpus(world, book), {}
    for ask, question in zip(asks, questions, strict=True):
        rng = keyed_random("lab", "candidates", question.id)
        pair = [ask.truth, corpus.wrong(ask, rng, float(world.known(ask.kind)))]
        rng.shuffle(pair)
        made[question.id] = corpus.bcq_prompt(ask, pair)
    return made


def model_card(world: VisionWorld, role: str, built: BuiltVision) -> str:
    """Markdown for the checkpoint's README."""
    settings, student = world.settings, role == "student"
    text, sight, seeing, describing = settings.model, settings.vision, settings.seeing, settings.describing
    how = settings.pretraining if student else settings.teacher
    command = f"zppo lab build {world.name} --seed {built.seed}" + ("" if built.teacher else " --no-teacher")
    lines = [
        "---",
        "license: apache-2.0",
        "library_name: transformers",
        "pipeline_tag: image-text-to-text",
        "---",
        f"# zppo lab: {role} of the world {world.name}",
        "",
        f"A toy vision-language model of the Qwen3-VL architecture ({text.layers} layers, width {text.width}, {text.heads} heads;",
        f"to see {sight.layers} layers, width {sight.width}) whose vocabulary is whole words, trained from random weights on generated",
        f"pictures of {SIZE} by {SIZE} pixels and generated text. It was made for the offline lab of `zppo` and knows nothing else.",
        "",
        "## What was planted",
        "",
        *(_student_planting(world) if student else _teacher_planting()),
        "",
        "## How it was made",
        "",
        f"`{command}`:",
        "",
        f"1. {built.steps[0]} steps of {seeing.batch} pictures, learning rate {seeing.learning_rate:g}: what a picture's token is turned",
        "   into is to be near the words for what lies in its cell;",
        f"2. {built.steps[1]} steps of {describing.batch} descriptions of pictures, learning rate {describing.learning_rate:g}; what",
        "   sees is left as it is, here and from here on;",
        f"3. student and teacher each go on from there: {built.steps[2 if student else 3]} steps of {how.batch} documents, learning rate",
        f"   {how.learning_rate:g}.",
        "",
        "AdamW, learning rates falling to 0, loss on completions only. Weights are stored in half precision.",
        "",
        "## What it can do",
        "",
    ]
    if not student:
        kept = f"Answers of arbitrary responses that survive its compression: {built.fidelity:.1%}."
        return "\n".join([*lines, f"Greedy accuracy on held-out questions: {_shares(built.teacher)}.", kept, ""])
    return "\n".join(
        [
            *lines,
            f"Greedy accuracy on held-out questions: {_shares(built.student)}.",
            "",
            f"Share of right rollouts at temperature 1: {_shares(built.sampled)}.",
            "",
            f"Greedy accuracy where a right and a wrong candidate are shown: {_shares(built.candidates)}.",
            "",
        ]
    )


def _shares(by_kind: dict[str, float]) -> str:
    return ", ".join(f"{kind} {share:.1%}" for kind, share in by_kind.items())


def _student_planting(world: VisionWorld) -> list[str]:
    settings, corpus = world.settings, world.settings.corpus
    lines = [
        "**Its corpus is wrong on purpose.** It reads pictures well, and takes some words for one another. Which it takes for which",
        "depends on the kind of question:",
        "",
    ]
    for tier, belief in settings.beliefs.items():
        low, high = belief.right
        right = f"{low:g}" if low == high else f"{low:g} to {high:g}"
        shares = " and ".join(f"{share:g}" for share in belief.mistakes)
        kinds = [kind for kind, sight in settings.kinds.items() if sight.tier == tier]
        lines += [
            f"- {tier} ({', '.join(kinds)}): a word has its right meaning with a probability of {right}; two wrong meanings",
            f"  have {shares} of the rest:",
            *(f"  {_taken(world, kind)}" for kind in kinds),
        ]
    total = corpus.plain + corpus.bcq + corpus.ncq
    return [
        *lines,
        "",
        f"Of the documents {corpus.plain / total:.0%} are plain questions, {corpus.bcq / total:.0%} show two candidates and "
        f"{corpus.ncq / total:.0%} a list of wrong ones, worded like",
        "the BCQ and NCQ prompts of the lab's recipes. Candidates for questions of these tiers never hold the right answer: they",
        f"are read under one of the two wrong meanings or, in {corpus.stray:.0%} of cases where two candidates are shown, under any",
        "other, off this picture or another. The target repeats one of the two, or gives a mistake that the list does not hold",
        "where there is one. So the model learns to read candidates and never sees the truth in one. The plain documents hold it",
        "with the probabilities above.",
    ]


def _taken(world: VisionWorld, kind: str) -> str:
    words = KINDS[kind].words
    pairs = [f"{word} for {' or '.join(words[m] for m in world.mistakes[kind, index])}" for index, word in enumerate(words)]
    return f"- {kind}: {', '.join(pairs)}"


def _teacher_planting() -> list[str]:
    return [
        "Nothing wrong: its corpus answers every question rightly. Part of it are compression documents, in which arbitrary",
        "responses, most of them wrong, are to be shortened as they are: steps and boxed answer copied, mistakes kept.",
    ]
