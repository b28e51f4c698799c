"""What must be there for a recipe: the files that it names, and packages beside those of every installation. No torch."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, TemplateSyntaxError

from zppo.config.methods import load_reformulation
from zppo.config.model_settings import FrozenModelSettings, ModelSettings
from zppo.config.settings import Settings
from zppo.core.reformulate import Candidate, Material
from zppo.core.types import Draft, Message, Question
from zppo.data.reasoning_gym import SCHEME
from zppo.errors import ModelError, TemplateError
from zppo.names import check_checkpoint, check_file, model_folder, readable
from zppo.packages import distribution, install_line, kernels_of, missing
from zppo.planning.model_shapes import config_file, family_of, shape_of
from zppo.prompts.book import PromptBook
from zppo.rollout.rewards import make_rewards
from zppo.runs.files import check_output


def packages_needed(settings: Settings, *, gpu: bool) -> list[str]:
    """The packages, by the names that are imported, in the order in which a run would miss them.

    Args:
        gpu: whether it trains on one: kernels are for GPUs.
    """
    train, rollout = settings.train, settings.rollout
    needed = []
    if rollout.engine == "vllm" and rollout.vllm.runs_here:
        needed.append("vllm")
    sources = [settings.data.train] if isinstance(settings.data.train, str) else [part.source for part in settings.data.train]
    for source in (*sources, settings.data.eval or ""):
        needed += [SCHEME] * source.startswith(f"{SCHEME}:") + ["datasets"] * source.startswith("hub:")
    if gpu:
        frozen = [m for m in (settings.teacher, *settings.more_teachers, settings.judge) if m is not None and not m.base_urls]
        own = [] if settings.student.tinker is not None else [settings.student]  # which lies on a cluster
        for model in (*own, *frozen):
            needed += kernels_of(family_of(model.model) or "")
    needed += ["peft"] * (train.lora is not None)
    needed += ["bitsandbytes"] * (settings.student.quantize is not None or train.optimizer == "adamw-8bit")
    needed += train.trackers
    return list(dict.fromkeys(needed))


def missing_rows(settings: Settings, *, gpu: bool) -> list[tuple[str, str]]:
    """(what, how it gets here) for the plan, where something is not installed on this machine."""
    absent = missing(packages_needed(settings, gpu=gpu))
    return [("not installed here", f"{', '.join(map(distribution, absent))}; {install_line(absent)}")] if absent else []


_GENERATION = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")  # tags of transformers, which jinja does not know


def check_files(settings: Settings) -> None:
    """Whether the files that a recipe names are there: templates, folders of models, the reward functions; `output` must be free.

    Raises:
        TemplateError, ModelError, RewardError, SettingsError.
    """
    book = PromptBook(settings.prompts, form=settings.answer_form)
    book.try_out()
    _try_reformulations(settings.method.resolve().reformulations, book)
    for name, model in _models(settings):
        if model.template is not None and not model.template.is_file():
            raise TemplateError(
                f"{name}.template: there is no file {model.template}; give the path of a jinja file from the recipe (none come with zppo), "
                "or leave it out for the tokenizer's own"
            )
        if model.template is not None:
            _check_chat_template(name, model.template)
        folder = model_folder(model.model)
        if _is_path(folder) and not (Path(folder) / "config.json").is_file():
            raise ModelError(
                f"{name}.model: {model.model} is no transformers checkpoint (no config.json in it); "
                "name a folder that has one, or a model of the hub as owner/name"
            )
        check_checkpoint(folder)
    if settings.grading.rewards:
        make_rewards(settings.grading)
    if settings.output is not None:
        check_output(settings.output)


def _models(settings: Settings) -> list[tuple[str, ModelSettings]]:
    """Student, teachers and judge, without those behind an address, each with the section of the recipe that names it."""
    teachers = [*([settings.teacher] if settings.teacher else []), *settings.more_teachers]
    frozen: list[tuple[str, FrozenModelSettings]] = [("teacher", teacher) for teacher in teachers]
    frozen += [("judge", settings.judge)] if settings.judge else []
    return [("student", settings.student), *((name, model) for name, model in frozen if not model.base_urls)]


def fetch_configs(settings: Settings) -> list[tuple[str, str]]:
    """Bring config.json of the recipe's models from the hub into its cache, a few KB each: memory is estimated by it. No weights.

    Returns:
        (what, how to mend it) for the plan, where the hub does not answer at once.

    Raises:
        ModelError: the hub has no such model for this user.
    """
    hubs = [(name, model.model) for name, model in _models(settings) if not _is_path(model.model)]
    absent = [(name, model) for name, model in hubs if config_file(model) is None and shape_of(model) is None]
    if not absent:
        return []
    # They take a second, and most plans need none.
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError

    from zppo.http_client import hub_trouble

    if why := hub_trouble():
        return [("hub", f"{why}; where it answers: {'; '.join(f'`hf download {model} config.json`' for _, model in absent)}")]
    for name, model in absent:
        try:
            hf_hub_download(model, "config.json")
        except RepositoryNotFoundError as error:
            raise ModelError(
                f"{name}.model: the hub has no model {model!r} for you: check the name; for a private or gated one accept its terms at "
                f"{constants.ENDPOINT}/{model} and run `hf auth login`"
            ) from error
        except (OSError, ValueError, EntryNotFoundError):  # no such file in it, a name that cannot be one, the network went away
            continue
    return []


def _check_chat_template(section: str, path: Path) -> None:
    """Whether a file holds a template; what it makes of a conversation hangs on the tokenizer's tokens, which a dry run does not load."""
    check_file(path, TemplateError)
    try:
        text = readable(path).read_text(encoding="utf-8")
        Environment(extensions=["jinja2.ext.loopcontrols", "jinja2.ext.do"]).parse(_GENERATION.sub("", text))
    except (OSError, UnicodeDecodeError) as error:
        raise TemplateError(f"{section}.template: {path} cannot be read: {error}. Name a text file that holds a chat template") from error
    except TemplateSyntaxError as error:
        raise TemplateError(
            f"{section}.template: {path}, line {error.lineno}: the chat template cannot be parsed: {error.message}. Mend that line"
        ) from error
    if not text.strip():
        raise TemplateError(f"{section}.template: {path} is empty; write a chat template, or leave it out")


def _try_reformulations(kinds: Sequence[str], book: PromptBook) -> None:
    """Fills the templates of a method's reformulations with what these make of an invented question.

    Raises:
        SettingsError: one has no template.
        TemplateError: one cannot be filled.
    """
    made = [load_reformulation(kind) for kind in kinds]
    book.check_kinds(r.kind for r in made if not getattr(r, "shows_question_alone", False))
    book.check_used(r.kind for r in made)
    question = Question("invented", (Message("user", "2 plus 3?"),), "5")
    right, *wrong = (Candidate(f"It is \\boxed{{{answer}}}.", answer, i) for i, answer in enumerate("564"))
    material = Material(question, (right, wrong[0]), tuple(wrong), ("6", "4"), "Count.", tuple(range(20)))
    for reformulation in made:
        try:
            draft = reformulation.draft(material, random.Random(0))
        except Exception:  # one of the user's own may count on more than what is invented here
            continue
        if isinstance(draft, Draft):
            book.render(draft)


def _is_path(model: str) -> bool:
    """Whether a model's name can only be a folder: the hub's names are one or two words with a slash between them."""
    path = Path(model).is_absolute() or model.startswith((".", "~")) or model.count("/") > 1
    return path and ":" not in model
