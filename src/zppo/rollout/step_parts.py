"""The pieces of a step, put together: `zppo train`, the adapter for TRL, notebooks and own loops all get theirs from `parts`.

Nothing here needs our trainer, an `Accelerator` or one of our engines; `docs/library.md` takes a step by hand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from zppo.config.recipe import load_recipe
from zppo.config.settings import Settings
from zppo.core.advantages import spread_advantages, step_advantages, trivial
from zppo.core.replay import Changes, PromptReplayBuffer
from zppo.core.select import hard_groups, share_of
from zppo.core.types import JUDGE, Group, Prompt, Question
from zppo.distributed.processes import ONE_PROCESS, Processes
from zppo.engines.base import Completion, Engine
from zppo.engines.chat import Chat
from zppo.engines.loading import context_of
from zppo.errors import SettingsError
from zppo.images.processor import PixelCache
from zppo.images.store import PixelLimits
from zppo.models.student_model import load_chat, read_template
from zppo.names import model_folder
from zppo.prompts.book import PromptBook
from zppo.prompts.neutralise import Neutraliser
from zppo.rollout.data import load_mixture
from zppo.rollout.examples import Example, example_turns
from zppo.rollout.frozen_models import FrozenModels, load_frozen_models
from zppo.rollout.grading import Rule, Scorer, grades_while_sampling, make_scorer, rule_grading
from zppo.rollout.reformulated import ReformulatedPrompts, Reformulator, make_reformulations, make_reformulator
from zppo.rollout.student import PromptRenderer, StudentSampler, graded_rollouts
from zppo.rollout.teacher import SharedTeacher, TeacherSampler, make_teacher_sampler
from zppo.step_log import StepLog
from zppo.teacher.interface import Teacher


@dataclass(frozen=True, slots=True)
class Parts:
    """What a step is made of, for one recipe. `with parts(...) as p` ends the grader's workers and the teacher's connections at the end.

    Attributes:
        settings: the recipe.
        prompts: `plain(question)` is the student's prompt, with its token ids.
        score: grades completions: by rule, by a reward function, by a judge.
        teacher: `ask(questions, log)` gives the correct teacher responses of each, G_T drawn.
        reformulator: from hard groups to BCQ, NCQ, ... prompts; it asks the teacher, and compresses the candidates.
        buffer: the prompt replay buffer; `state_dict` and `load_state_dict` go into a checkpoint.
    """

    settings: Settings
    prompts: PromptRenderer
    score: Scorer
    teacher: TeacherSampler
    reformulator: Reformulator
    buffer: PromptReplayBuffer
    _open: ExitStack = field(default_factory=ExitStack, repr=False, compare=False)

    def replayed(self, new: Sequence[Question]) -> list[Question]:
        """X_replay: floor(rho_replay |X_new|) questions of the buffer, none of them new (Alg. 1, l. 2); every call is another draw."""
        if not self.settings.method.resolve().replay:
            return []
        return self.buffer.sample(share_of(self.settings.zone.rho_replay, len(new)), [question.id for question in new])

    def hard(self, plain: Sequence[Group], step: int) -> list[Group]:
        """The plain groups below tau, hardest first (Alg. 1, l. 4 and 6); for rivals those that they help."""
        zone = self.settings.zone
        return hard_groups(plain, self.settings.helped_below, ties=zone.ties, seed=self.settings.seed, step=step)

    def reformulate(self, hard: Sequence[Group], new: int, log: StepLog) -> ReformulatedPrompts:
        """The prompts on which hard questions are asked again (Alg. 1, l. 4-15): at most floor(rho_aug `new`) of them.

        Args:
            hard: as `hard` gives them.
            new: |X_new|, the questions of the step that were not replayed.
        """
        return self.reformulator.reformulate(hard, share_of(self.settings.zone.rho_aug, new), log)

    def grade(self, prompts: Sequence[Prompt], completions: Sequence[Sequence[Completion | Sequence[int]]], log: StepLog) -> list[Group]:
        """Groups of completions that were sampled elsewhere, one per prompt.

        Args:
            prompts: P of them, plain or reformulated.
            completions: per prompt its completions: token ids without the prompt's, with the end token where there is one; or
                `Completion`s, which hold the sampler's log-probs too. Ids count as truncated where they are `rollout.max_new_tokens`
                long and do not end with the tokenizer's end token.

        Raises:
            ValueError: not as many lists of completions as prompts, or an empty one.
            SettingsError: a question wants a judge, and was not among those that `parts` was given.
        """
        if len(prompts) != len(completions) or not all(completions):
            raise ValueError(f"{len(prompts)} prompts and {len(completions)} lists of completions: give every prompt one, with completions")
        judged = [p.question.id for p in prompts if p.question.grading == JUDGE] if self.score.judge is None else []
        if judged:
            raise SettingsError(f"question {judged[0]!r} wants a judge, and none is loaded: name it among the questions of `zppo.parts`")
        ended = [(i, j, self._completion(c)) for i, group in enumerate(completions) for j, c in enumerate(group)]
        rollouts = iter(graded_rollouts(prompts, ended, self.prompts.chat, self.score, log))
        return [Group(p, tuple(next(rollouts) for _ in group)) for p, group in zip(prompts, completions, strict=True)]

    def _completion(self, given: Completion | Sequence[int]) -> Completion:
        if isinstance(given, Completion):
            return given
        ids = torch.as_tensor(given, dtype=torch.int64)
        if ids.dim() != 1 or not len(ids):
            raise ValueError(f"a completion is a sequence of at least one token id, and this one has the shape {tuple(ids.shape)}")
        cut = len(ids) >= self.settings.rollout.max_new_tokens and int(ids[-1]) != self.prompts.chat.tokenizer.eos_token_id
        return Completion(ids, torch.full(ids.shape, torch.nan), cut, float("nan"))

    def counted(self, groups: Sequence[Group]) -> list[Group]:
        """The groups that the batch consists of: all, but for those that `zone.dynamic_sampling` leaves out."""
        return [group for group in groups if not (self.settings.drops_trivial and trivial(group))]

    def advantages(self, groups: Sequence[Group]) -> torch.Tensor:
        """Advantages of all rollouts of a whole step, plain and reformulated, in their order (Eqs. 2-6): (N,) float32.

        The loss is a mean over the tokens of the graded rollouts of `counted` groups, those with an advantage of 0 too.

        Raises:
            SettingsError: the method trains on something else than these groups (Teacher response, distillation, rivals), or the
                statistics are those of minibatches, which are your trainer's.
        """
        method = self.settings.method.resolve()
        if not method.plain_step:
            raise SettingsError(
                f"method {method.name!r} trains on {method.gradient}, which `zppo train` alone puts together: choose a method whose "
                "gradient is that of plain and reformulated groups (zppo, grpo, hint, ...)"
            )
        if self.settings.advantage.statistics == "minibatch":
            raise SettingsError(
                "advantage.statistics is minibatch, and which groups a minibatch has is decided by your trainer: set it to step, or call "
                "zppo.core.advantages.step_advantages with the groups of each minibatch"
            )
        kept = self.counted(groups)
        return spread_advantages(groups, kept, step_advantages(kept, self.settings.estimator))

    def remember(self, plain: Sequence[Group], step: int) -> Changes:
        """Admits, graduates and evicts by the accuracy of the plain groups alone (Alg. 1, l. 19), once a step."""
        if not self.settings.method.resolve().replay:
            return Changes()
        return self.buffer.update([(g.question, g.accuracy) for g in plain if g.counts], step)

    def student(self, engine: Engine, whole: Callable[[], AbstractContextManager[None]] = nullcontext) -> StudentSampler:
        """Samples and grades groups with an engine, `zppo.engines.transformers.TransformersEngine` or your own; draws are keyed.

        Args:
            whole: inside it the engine has all weights, where they lie in shards.
        """
        return StudentSampler(
            engine,
            self.prompts,
            self.score,
            self.settings.rollout.sampling(),
            self.settings.rollout.group_size,
            self.settings.seed,
            self.teacher.processes,
            whole,
            grades_while_sampling=grades_while_sampling(self.settings, self.score),
            watch=self.reformulator.ahead,
        )

    def within(self, context: int | None) -> Parts:
        """The same for a student with so many positions: longer reformulated prompts are not asked. None: no limit."""
        old = self.reformulator
        made = Reformulator(self.settings, old.reformulations, old.teacher_sampler, old.candidates, old.renderer, context, old.ahead)
        return replace(self, reformulator=made)

    def close(self) -> None:
        """Ends what was opened for these parts: the grader's workers, connections to remote models."""
        self._open.close()

    def __enter__(self) -> Parts:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def make_renderer(settings: Settings, chat: Chat, teachers: Sequence[Teacher] = (), examples: Sequence[Example] = ()) -> PromptRenderer:
    """The words of a recipe's prompts; special texts of student and teachers are broken up in what a model wrote.

    Args:
        examples: what every prompt shows first, of `data.examples`.

    Raises:
        SettingsError: the answer of an example could not be read.
        TemplateError: a template cannot be used.
    """
    special = {*chat.special_texts, *(text for teacher in teachers for text in getattr(teacher, "special_texts", ()))}
    neutraliser, form = Neutraliser(special), settings.answer_form
    book = PromptBook(settings.prompts, neutraliser, form)
    turns = example_turns(settings, examples, book, Neutraliser(special, tags=()))
    return PromptRenderer(PromptBook(settings.prompts, neutraliser, form, turns) if turns else book, chat)


def parts(
    settings: Settings | str | Path | Mapping[str, Any],
    questions: Iterable[Question],
    tokenizer: PreTrainedTokenizerBase | Chat | PromptRenderer | None = None,
    *,
    teachers: Sequence[Teacher] | FrozenModels | None = None,
    rule: Rule | None = None,
    context: int | None = None,
    device: torch.device | str = "cpu",
    processes: Processes = ONE_PROCESS,
) -> Parts:
    """The pieces of a step for a recipe: prompts, grading, teacher, compression, reformulation, advantages, buffer.

    What is not given is made as the recipe says. `settings.rollout` need not describe your sampler, but for `max_new_tokens`, which
    bounds prompts to the student's context.

    Args:
        settings: a recipe: its path, a mapping as such a file holds it, or `zppo.load_recipe`'s result.
        questions: all that will be asked; a judge is loaded where one of them wants it.
        tokenizer: the student's; None loads that of `student.model`. `student.template` and `template_args` go to its chat template.
        teachers: frozen models in the order of `teacher` and `more_teachers`; None loads them, or connects to their addresses. Anything
            with `complete` (`zppo.teacher.interface.Teacher`) does.
        rule: grades completions that no judge grades; None: `grading.reward`, else the rules.
        context: the student's positions; None: what the configuration of `student.model` says, where it can be read.
        device: where models run that are loaded here.
        processes: those that train together and share the work out; all of them must call with the same groups.

    Raises:
        ZPPOError: what is wrong with the recipe, the models or the templates, by name.
    """
    settings = load_recipe(settings)
    questions = list(questions)
    reformulations = make_reformulations(settings.method.resolve())
    with ExitStack() as stack:
        rule = rule or stack.enter_context(rule_grading(settings))
        if not isinstance(teachers, FrozenModels):
            loaded = settings if teachers is None else settings.model_copy(update={"teacher": None, "more_teachers": ()})
            ready = stack.enter_context(load_frozen_models(loaded, torch.device(device)))
            ready.teachers += teachers or ()  # type: ignore[arg-type]
            teachers = ready
        renderer = tokenizer
        if not isinstance(renderer, PromptRenderer):
            examples = load_mixture(settings).examples if settings.data.examples else ()
            renderer = make_renderer(settings, _chat(settings, tokenizer, any(q.images for q in questions)), teachers.teachers, examples)
        teachers.check_hints(settings, reformulations, questions, renderer.book)
        load = teachers.load
        score = make_scorer(
            settings, rule, questions, renderer.chat, teachers.teachers, lambda own: load(own, "judge" if settings.judge else "teacher")
        )
        ahead = settings.teacher is not None and settings.teacher.ask == "ahead"
        asked = [SharedTeacher(teacher, processes, ahead=ahead) for teacher in teachers.teachers]
        sampler = make_teacher_sampler(settings, asked, renderer, score, processes)
        if context is None:
            context = context_of(model_folder(settings.student.model), settings.student.revision)
        buffer = PromptReplayBuffer(settings.zone.buffer_capacity, settings.zone.threshold, settings.seed)
        reformulator = make_reformulator(settings, reformulations, asked, renderer, sampler, context, buffer)
        return Parts(settings, renderer, score, sampler, reformulator, buffer, stack.pop_all())


def _chat(settings: Settings, tokenizer: PreTrainedTokenizerBase | Chat | PromptRenderer | None, images: bool) -> Chat:
    if isinstance(tokenizer, Chat):
        return tokenizer
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        return Chat(tokenizer, settings.student.template_args, read_template(settings.student))
    if not images:
        return load_chat(settings.student)
    own = settings.data.images
    return load_chat(settings.student, PixelLimits(own.min_pixels, own.max_pixels), PixelCache(int(own.cache_gib * (1 << 30))))
