"""How many tokens the plain prompts of a recipe have, by the student's tokenizer and chat template. No torch, no transformers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from jinja2.sandbox import ImmutableSandboxedEnvironment

from zppo.config.settings import Settings
from zppo.core.types import Message, Question
from zppo.names import readable
from zppo.planning.model_shapes import config_file, vision_shape_of
from zppo.prompts.book import CLOSING, PromptBook

_COUNTED = 2_000  # texts of the data that are counted, of its shortest and of its longest
_TEMPLATE, _TURN = 48, 8  # tokens of what a chat template says by itself and around the question, about; and around each other turn
_WORDS = 300  # tokens of closing instruction and chat template, about


class PromptLengths(NamedTuple):
    """Tokens of the plain prompts of the data, about; `counted`: by the student's tokenizer, else no more than a byte has; `over`: prompts
    that are surely longer than a run lets in, of those that were counted."""

    shortest: int
    longest: int
    mean: float
    counted: bool
    over: int = 0

    def told(self, most: int) -> str:
        """In words, where no more than `most` are let in."""
        how = "by the student's tokenizer" if self.counted else "by a token a byte: its tokenizer is not on this machine"
        over = f"; at least {self.over:,} are over data.max_prompt_tokens = {most:,} and are dropped" if self.over else ""
        return f"the data's have {self.mean:,.0f} on average and {self.longest:,} at most, {how}{over}"


def prompt_tokens(settings: Settings, questions: Iterable[Question], shown: Sequence[Message] = ()) -> PromptLengths:
    """How long the plain prompts are, about: an image has the tokens of the largest.

    Counted with the student's tokenizer.json and chat template, where they are on this machine; without them a token has a byte at least,
    and the shortest is 0.
    """
    asked = list(questions)
    vision_shape = vision_shape_of(settings.student.model) if any(q.images for q in asked) else None
    each = vision_shape.tokens(settings.data.images.max_pixels) if vision_shape else 0
    texts = sorted((("\n".join(m.content for m in q.messages), len(q.images)) for q in asked), key=lambda text: len(text[0].encode()))
    turns = "\n".join(message.content for message in shown)
    count = _token_counter(settings)
    if count is None:
        lengths = [len(text.encode()) + each * images + len(turns.encode()) + _WORDS for text, images in texts]
        return PromptLengths(0, max(lengths, default=_WORDS), fmean(lengths) if lengths else 0.0, False)
    around = count(turns) + count(PromptBook(settings.prompts, form=settings.answer_form).text(CLOSING, {}))
    low = min((count(text) for text, _ in texts[:_COUNTED]), default=0)
    longest = [(count(text), images) for text, images in texts[-_COUNTED:]]
    high = max((tokens + each * images for tokens, images in longest), default=0)
    some = texts[:: len(texts) // _COUNTED + 1]  # short and long ones alike
    mean = fmean(count(text) + each * images for text, images in some) if some else 0.0
    template, known = _template_tokens(settings, shown, count)
    over = sum(tokens + around + known > settings.data.max_prompt_tokens for tokens, images in longest if not images)
    joined = around + template + (count("\n\n") if around else 0)  # what a tokenizer may make one token is counted apart
    return PromptLengths(low + around + known, high + joined, mean + joined, True, over)


def _token_counter(settings: Settings) -> Callable[[str], int] | None:
    """Counts tokens as the student's tokenizer does; None where its file is not on this machine, or cannot be read."""
    config = config_file(settings.student.model)
    file = config.with_name("tokenizer.json") if config else None
    if file is None or not file.is_file():
        return None
    from tokenizers import Tokenizer  # only where there is a file to read

    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception:  # it raises nothing else; what is wrong with the file is said when the student is loaded
        return None
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids)


def _template_tokens(settings: Settings, shown: Sequence[Message], count: Callable[[str], int]) -> tuple[int, int]:
    """(about, at least): tokens that the chat template adds to a question behind the turns shown; about as usual where it is not known."""
    config = config_file(settings.student.model)
    try:
        template = _template(settings.student.template, config.parent if config else Path())
        turns = [{"role": message.role, "content": message.content} for message in (*shown, Message("user", "x"))]
        # As `transformers` renders it; what it cannot do here is guessed.
        made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
        text = made.from_string(template).render(messages=turns, add_generation_prompt=True, **settings.student.template_args)
        added = max(0, count(text) - sum(count(turn["content"]) for turn in turns))
        return added, added
    except Exception:  # a template is a program: it can fail in any way, and the run says how
        return _TEMPLATE + _TURN * len(shown), 0


def _template(given: Path | None, folder: Path) -> str:
    """The student's chat template, which the recipe or the checkpoint has. OSError or ValueError where neither has one that can be read."""
    own = given or folder / "chat_template.jinja"
    if own.is_file():
        return own.read_text(encoding="utf-8")
    config: Mapping[str, Any] = json.loads(readable(folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    if isinstance(config.get("chat_template"), str):
        return str(config["chat_template"])
    raise ValueError("no chat template, or several")
