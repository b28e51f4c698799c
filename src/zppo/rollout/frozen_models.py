"""The frozen models of a run, teachers and a judge: loaded in this process or reached over HTTP, and let go of at the end."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, TypeAlias

import torch

from zppo.config.methods import Method
from zppo.config.model_settings import FrozenModelSettings, TeacherSettings
from zppo.config.settings import Settings
from zppo.core.reformulate import Reformulation
from zppo.core.types import Question
from zppo.errors import TeacherError
from zppo.images.store import PixelLimits
from zppo.models.student_model import read_template
from zppo.names import model_folder
from zppo.prompts.book import PromptBook
from zppo.rollout.run_data import ImageInputs
from zppo.teacher.hints import hint_trial
from zppo.teacher.local import LocalTeacher

if TYPE_CHECKING:
    from zppo.teacher.remote import RemoteTeacher

FrozenTeacher: TypeAlias = "LocalTeacher | RemoteTeacher"


class FrozenModels:
    """The frozen models of one run.

    Attributes:
        teachers: those that the method needs; `teacher`, which also compresses, comes first.
        settings_of: the section of the recipe of each of them.
    """

    def __init__(
        self,
        settings: Settings,
        device: torch.device,
        image_inputs: ImageInputs | None = None,
        *,
        doing: Callable[[str], None] = lambda text: None,
        warn: Callable[[str], None] = warnings.warn,
    ) -> None:
        self.teachers: list[FrozenTeacher] = []
        self.settings_of: list[TeacherSettings] = []
        self._settings, self._device, self._image_inputs, self._doing, self._warn = settings, device, image_inputs, doing, warn
        self._remote: list[RemoteTeacher] = []

    def load(self, own: FrozenModelSettings, section: str) -> FrozenTeacher:
        """A frozen model by its section of the recipe.

        Raises:
            TeacherError: it cannot be loaded, or there is no key for its address.
        """
        if not own.base_urls:
            self._doing(f"loading the {section} {own.model}")
            return _load_frozen(self._settings, own, self._device, self._image_inputs)
        from zppo.teacher.remote import RemoteTeacher  # the openai package comes with it, most of a second
        from zppo.teacher.startup_check import Names, read_key

        self._doing(f"checking the {section} {own.model} at {', '.join(own.base_urls)}")
        images = self._settings.data.images
        teacher = RemoteTeacher(
            own.model,
            own.base_urls,
            key=read_key(own.key_env, own.base_urls, section),
            concurrency=own.concurrency,
            deadline=own.deadline,
            retry_for=own.retry_for,
            names=Names(section, own.key_env),
            limits=PixelLimits(images.min_pixels, images.max_pixels),
            warn=lambda text: self._warn(f"warning: {text}"),
        )
        self._remote.append(teacher)
        return teacher

    def check_images(self, count: int) -> None:
        """Whether remote teachers read `count` images in one prompt, the most that a training question has; nothing where it is 0.

        Raises:
            TeacherError: one refuses them.
        """
        for teacher, own in zip(self.teachers, self.settings_of, strict=True):
            if count and not isinstance(teacher, LocalTeacher):
                teacher.check_images(own.how(own.rollout), count, "rollout")

    def check_hints(
        self, settings: Settings, reformulations: Sequence[Reformulation], questions: Sequence[Question], book: PromptBook
    ) -> None:
        """Asks the teacher for one hint where a reformulation needs hints, and warns where none came: the run is then its control."""
        wanted = any("hint" in r.needs for r in reformulations)
        if not wanted or settings.teacher is None or not self.teachers or not questions:
            return
        self._doing("asking the teacher for a hint")
        own, method = settings.teacher, settings.method.resolve()
        question = next((q for q in questions if not q.images), questions[0])
        if problem := hint_trial(question, self.teachers[0], book, own.how(own.hint), settings.seed):
            others = [r.kind for r in reformulations if "hint" not in r.needs]
            rest = f"{', '.join(others)} alone" if others else "GRPO† (grpo-replay)" if method.replay else "GRPO (grpo)"
            self._warn(
                f"the teacher {own.model} writes no hints: {problem}. No question will be asked again with a hint, so that this run is "
                f"{rest}: take an instruction-tuned teacher, or say it in its words with prompts.hinting"
            )

    def close(self) -> None:
        """Ends the threads and connections of remote models."""
        for teacher in self._remote:
            teacher.close()


@contextmanager
def load_frozen_models(
    settings: Settings,
    device: torch.device,
    image_inputs: ImageInputs | None = None,
    *,
    doing: Callable[[str], None] = lambda text: None,
    warn: Callable[[str], None] = warnings.warn,
) -> Iterator[FrozenModels]:
    """The frozen models for the length of a run; the teachers that the method needs are loaded and checked.

    Args:
        device: where those run that are in this process and name no device of their own.
        image_inputs: limits and cache of images, where the run has any.
        doing, warn: told what begins, and what a person should know.

    Raises:
        TeacherError: a teacher cannot be loaded, or cannot be reached with this key, model and fields.
        ModelError: template arguments break a chat template.
    """
    method = settings.method.resolve()
    named = [("teacher", settings.teacher), *((f"more_teachers.{i}", t) for i, t in enumerate(settings.more_teachers))]
    with ExitStack() as stack:
        frozen_models = FrozenModels(settings, device, image_inputs, doing=doing, warn=warn)
        stack.callback(frozen_models.close)
        for section, own in named if method.needs_teacher else ():
            if own is not None:
                teacher = frozen_models.load(own, section)
                for use in _uses(own, method, first=section == "teacher"):
                    n = settings.zone.teacher_group_size if use == "rollout" else 1
                    teacher.check(own.how(own.uses()[use]), use, n)
                frozen_models.teachers.append(teacher)
                frozen_models.settings_of.append(own)
        yield frozen_models


def in_process(teacher: FrozenTeacher) -> LocalTeacher:
    """A teacher whose distributions can be read. TeacherError where it is behind an address."""
    if isinstance(teacher, LocalTeacher):
        return teacher
    raise TeacherError(f"the teacher {teacher.model!r} is remote, and distillation needs one in this process: leave base_urls empty")


def _uses(own: TeacherSettings, method: Method, *, first: bool) -> list[str]:
    """What the method asks a teacher for; further teachers give rollouts only. The judge checks its own."""
    compresses = first and own.compression.enabled and bool({"pair", "wrong"} & method.needs)
    return ["rollout", *["compression"] * compresses, *["hint"] * (first and "hint" in method.needs)]


def _load_frozen(
    settings: Settings, own: FrozenModelSettings, student_device: torch.device, image_inputs: ImageInputs | None
) -> LocalTeacher:
    """A model that is never trained, in this process: a teacher, or a judge."""
    device = student_device if own.device == "auto" else torch.device(own.device)
    return LocalTeacher.load(
        model_folder(own.model),
        revision=own.revision,
        device=device,
        dtype=torch.float32 if device.type == "cpu" else torch.bfloat16,
        template=read_template(own),
        attention=own.attention,
        max_rows=settings.rollout.max_rows,
        images=image_inputs.limits if image_inputs else None,
        cache=image_inputs.cache if image_inputs else None,
    )
