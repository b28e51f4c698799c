"""One benchmark as a task of inspect-ai: asked through a model of its own, decided by `zppo.evals.scoring.verdicts`, all in its log.

The model is an OpenAI-compatible server that is sent every sampling setting, and videos too. The only module that needs inspect-ai
(`pip install 'zppo[eval]'`): it is imported when an evaluation runs.
"""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from anyio import CapacityLimiter, to_thread
from inspect_ai import Epochs, Task
from inspect_ai import eval as inspect_eval
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.log import EvalLog
from inspect_ai.model import (
    ChatCompletionChoice,
    ChatMessage,
    ChatMessageAssistant,
    ChatMessageSystem,
    ChatMessageUser,
    Content,
    ContentImage,
    ContentReasoning,
    ContentText,
    GenerateConfig,
    Model,
    ModelOutput,
    get_model,
    modelapi,
)
from inspect_ai.model._providers.openai_compatible import OpenAICompatibleAPI
from inspect_ai.scorer import Score, Scorer, Target, mean, scorer
from inspect_ai.solver import Generate, Solver, TaskState, solver
from inspect_ai.tool import ToolInfo
from openai import DEFAULT_CONNECTION_LIMITS, DefaultAsyncHttpxClient
from tenacity import RetryError

from zppo.errors import DataError, EvaluationError, UnavailableError, one_line
from zppo.evals.benchmark import Benchmark
from zppo.evals.endpoint import Thoughts
from zppo.evals.item import Item
from zppo.evals.journal import Journal
from zppo.evals.media import ChatTurn, media_key, media_there, small_picture
from zppo.evals.options import Decoding, digest_of
from zppo.evals.results import BROKEN, TOO_LONG, By, SampleResult
from zppo.evals.scoring.verdicts import Decider
from zppo.teacher.http import within_origin
from zppo.teacher.proxy import proxy_to, transport_to
from zppo.teacher.reply import SHORTEST_SECRET, sound, split_content

PROVIDER = "zppo"
RAW = "raw"  # metadata of a message: the text as the server sent it
ATTEMPT = 3600.0  # seconds for one whole reply: 12,288 tokens of a busy server take their time
RETRIES = 4
BUSY = 429
_VIDEO = "zppo-video:"
_BLIND = re.compile(
    r"not a multi-?modal model|at most 0 image|images? (input )?(is|are) not supported|not support (images?|vision|multi-?modal)", re.I
)
_TOO_LONG = re.compile(r"maximum (context|model) length|context[ _](length|size) (is|exceeded)|exceeds the (\w+ )?context", re.I)


@modelapi(name=PROVIDER)
class ServedAPI(OpenAICompatibleAPI):
    """An OpenAI-compatible server that may take `video_url` parts. Its key never reaches a log, even where the server repeats it."""

    def __init__(self, model_name: str, base_url: str, api_key: str, config: GenerateConfig) -> None:
        super().__init__(
            model_name,
            base_url=base_url,
            api_key=api_key or "EMPTY",
            config=config,
            service=PROVIDER,
            client_timeout=ATTEMPT,
            stream=False,
            max_retries=0,  # of the client's own: inspect-ai retries, and says so
            http_client=DefaultAsyncHttpxClient(
                event_hooks={"response": [within_origin, _hiding(api_key)]},
                transport=transport_to(proxy_to(base_url), DEFAULT_CONNECTION_LIMITS),
            ),
        )

    async def messages_to_openai(self, input: list[ChatMessage]) -> list[Any]:
        """Messages hold small pictures, for the transcript: what is sent are those that they stand for. inspect-ai refuses videos on
        this path: they go through it as images, and come out as what they are.
        """
        messages: list[Any] = await super().messages_to_openai([_whole(m) for m in input])
        return [m | {"content": [_part(p) for p in m["content"]]} if isinstance(m.get("content"), list) else m for m in messages]

    def service_model_name(self) -> str:
        """The model's name as its server knows it, slashes and all."""
        return str(self.model_name)

    def completion_params(self, config: GenerateConfig, tools: bool) -> dict[str, Any]:
        """`max_tokens` under the name that vLLM and `zppo serve` take, whatever the model is called."""
        params = super().completion_params(config, tools)
        if "max_completion_tokens" in params:
            params["max_tokens"] = params.pop("max_completion_tokens")
        return params

    def chat_choices_from_completion(self, completion: Any, tools: list[ToolInfo]) -> list[ChatCompletionChoice]:
        """The choices, each with the text as it was sent: thoughts are moved elsewhere, and the rules want to see them."""
        for sent in completion.choices:  # inspect-ai knows a text alone
            if isinstance(sent.message.content, list):
                sent.message.content, thoughts = split_content(sent.message.content)
                sent.message.reasoning_content = getattr(sent.message, "reasoning_content", None) or thoughts or None
        choices = super().chat_choices_from_completion(completion, tools)
        for choice, sent in zip(choices, completion.choices, strict=True):
            choice.message.metadata = {RAW: _raw_of(sent.message)}
        return choices


def _hiding(key: str) -> Callable[[Any], Awaitable[None]]:
    """A hook that takes the key out of what a server sends, before it can be logged."""
    secret = key.encode()

    async def hide(response: Any) -> None:
        body = await response.aread()
        if len(secret) >= SHORTEST_SECRET and secret in body:
            response._content = body.replace(secret, b"[key]")

    return hide


def served_model(url: str, name: str, key: str, decoding: Decoding, concurrency: int, template_args: Mapping[str, Any]) -> Model:
    """The model of a server under the protocol's decoding.

    top_k, min_p and repetition_penalty go as fields of the body: inspect-ai's own top_k is never sent on this path. So do arguments of the
    chat template, where there are some: not every server knows the field.
    """
    extra: dict[str, Any] = {"top_k": decoding.top_k, "min_p": decoding.min_p, "repetition_penalty": decoding.repetition_penalty}
    if template_args:
        extra["chat_template_kwargs"] = dict(template_args)
    config = GenerateConfig(
        temperature=decoding.temperature,
        top_p=decoding.top_p,
        presence_penalty=decoding.presence_penalty,
        max_tokens=decoding.max_tokens,
        extra_body=extra,
        max_connections=concurrency,
        max_retries=RETRIES,
    )
    return get_model(f"{PROVIDER}/{name}", config=config, base_url=url, api_key=key or "EMPTY", memoize=False)


_SIDE, _SIDE_OF_MANY, _MANY = 512, 256, 4  # pixels of a picture in a transcript, and where a conversation has more than so many
_SENT: dict[str, str] = {}  # pictures and clips of the requests under way, by the names that their messages hold
_NAMES = itertools.count()


def chat_messages(turns: Sequence[ChatTurn]) -> tuple[list[ChatMessage], dict[str, str]]:
    """A conversation in inspect-ai's types, as transcripts keep it: with small pictures; and the whole ones by the names in the messages.

    Whole ones would make the transcripts of a benchmark tens of gigabytes [zppo].
    """
    sent: dict[str, str] = {}
    side = _SIDE if sum(part.kind == "image" for turn in turns for part in turn.parts) <= _MANY else _SIDE_OF_MANY

    def named(value: str) -> str:
        name = f"{PROVIDER}-{next(_NAMES)}"
        sent[name] = value
        return name

    kinds = {"system": ChatMessageSystem, "user": ChatMessageUser, "assistant": ChatMessageAssistant}
    messages: list[ChatMessage] = []
    for turn in turns:
        parts: list[Content] = []
        for part in turn.parts:
            if part.kind == "text":
                parts.append(ContentText(text=sound(part.value)))
            elif part.kind == "image":
                parts.append(ContentImage(image=small_picture(part.value, side), internal=named(part.value)))
            else:
                megabytes = len(part.value) * 3 / 4 / 1e6
                parts.append(ContentText(text=f"[the whole clip, {megabytes:.1f} MB]", internal=named(part.value)))
        texts = [p.text for p in parts if isinstance(p, ContentText)]
        content: Any = texts[0] if len(texts) == len(parts) == 1 and not sent else parts
        messages.append(kinds[turn.role](content=content))
    return messages, sent


def why(error: BaseException) -> str:
    """What a server said, without the request that inspect-ai puts before it."""
    said = getattr(error, "provider_message", None)
    return one_line(RuntimeError(said) if isinstance(said, str) and said else error)


def refused(error: BaseException) -> bool:
    """Whether a server refuses this very request; it may well answer another one."""
    return getattr(error, "status_code", None) in (400, 413, 422)


def too_long(error: BaseException) -> bool:
    """Whether a server refuses a conversation for its length; inspect-ai knows only those that give it OpenAI's code."""
    return refused(error) and bool(_TOO_LONG.search(why(error)))


def blind(error: BaseException) -> bool:
    """Whether a server says that its model takes no pictures at all: by the code of `zppo serve`, or in other servers' words."""
    return refused(error) and (getattr(error.__cause__, "code", None) == "images_refused" or bool(_BLIND.search(why(error))))


def message_text(output: ModelOutput) -> str:
    """What the model wrote, thoughts included: as it was sent, or put together again where a provider has taken it apart."""
    if not output.choices:
        return ""
    message = output.choices[0].message
    if message.metadata and isinstance(message.metadata.get(RAW), str):
        return sound(message.metadata[RAW])
    if isinstance(message.content, str):
        return sound(message.content)
    thoughts = "".join(p.reasoning for p in message.content if isinstance(p, ContentReasoning))
    return sound(_joined(thoughts, message.text))


def _raw_of(message: Any) -> str:
    """The whole text of a reply; servers that split thoughts off call them reasoning or reasoning_content."""
    thoughts = next((t for n in ("reasoning_content", "reasoning") if isinstance(t := getattr(message, n, None), str)), "")
    return _joined(thoughts, message.content or "")


def _joined(thoughts: str, text: str) -> str:
    """Thoughts without an answer behind them stay open: they are no answer."""
    if not thoughts:
        return text
    return f"<think>{thoughts}</think>{text}" if text.strip() else f"<think>{thoughts}"


def _whole(message: ChatMessage) -> ChatMessage:
    """The message with what is to be sent in place of what the transcript shows of it."""
    if isinstance(message.content, str):
        return message
    return message.model_copy(update={"content": [_sent(part) for part in message.content]})


def _sent(part: Content) -> Content:
    value = _SENT.get(part.internal) if isinstance(part.internal, str) else None
    if value is None:
        return part
    return ContentImage(image=value if isinstance(part, ContentImage) else f"data:image/png;base64,{_VIDEO}{value}")


def _part(part: dict[str, Any]) -> dict[str, Any]:
    url = part.get("image_url", {}).get("url", "") if part.get("type") == "image_url" else ""
    found = re.match(rf"data:image/png;base64,{_VIDEO}", url)
    if found:
        return {"type": "video_url", "video_url": {"url": url[found.end() :]}}
    return {"type": "image_url", "image_url": {"url": url}} if url else part


DOWN_AFTER = 8  # failures in a row without an answer between them: the rest is not asked any more

Turns = Callable[[Item], list[ChatTurn]]
Take = Callable[[SampleResult], None]


@dataclass
class Route:
    """One address of the model.

    Attributes:
        under_way: requests that it has not answered yet.
        failures: in a row.
    """

    model: Model
    under_way: int = 0
    failures: int = 0

    @property
    def down(self) -> bool:
        return self.failures >= DOWN_AFTER


@dataclass
class Health:
    """The addresses of the model, why it takes no pictures, "" where it does, and the last failure."""

    routes: Sequence[Route]
    blind: str = ""
    last: str = ""

    @property
    def down(self) -> bool:
        """Whether none of them answers any more."""
        return all(route.down for route in self.routes)


class LeftOutError(EvaluationError):
    """A question that cannot be put to this model at all."""


@dataclass(frozen=True, slots=True)
class TaskContext:
    """What the samples of a benchmark share.

    Attributes:
        turns: the conversation of a question with its media.
        answers, judgements: journals of replies.
        thoughts: is shown every reply.
        strict: a question whose clip or picture cannot be decoded stays open; else it is 0.
        take: is given every row as it is decided or fails.
    """

    benchmark: Benchmark
    items: Mapping[str, Item]
    turns: Turns
    decider: Decider
    answers: Journal
    judgements: Journal
    health: Health
    threads: CapacityLimiter
    take: Take
    thoughts: Thoughts = field(default_factory=Thoughts)
    strict: bool = False


def run_task(work: TaskContext, *, samples: int, concurrency: int, logs: Path) -> EvalLog:
    """Asks and decides every row of a benchmark that the journals do not hold; the transcripts go to a log that `inspect view` opens.

    Args:
        samples: of each question.
        concurrency: questions under way at once.
    """

    def facts(item: Item) -> dict[str, Any]:
        return {"kind": item.kind, "options": list(item.options), "facts": dict(item.facts)}

    dataset = MemoryDataset(
        [Sample(id=item.id, input=item.asked, target=list(item.golds), metadata=facts(item)) for item in work.items.values()],
        name=work.benchmark.name,
    )
    task = Task(
        dataset=dataset,
        name=work.benchmark.name,
        solver=[ask(work)],
        scorer=decide(work),
        epochs=Epochs(samples, "mean"),
        fail_on_error=False,
    )
    logs.mkdir(parents=True, exist_ok=True)
    level = logging.getLogger().level
    log = inspect_eval(
        task,
        model=work.health.routes[0].model,
        display="none",
        log_dir=str(logs),
        log_format="eval",
        log_images=True,  # small ones: `chat_messages`
        log_realtime=False,
        log_level="error",
        log_header_only=True,
        max_samples=concurrency,
        max_tasks=1,
        score_display=False,
        acp_server=False,
        ctl_server=False,
    )[0]
    logging.getLogger().setLevel(level)  # inspect-ai sets one for the whole process
    return log


def answer_key(work: TaskContext, item: Item, epoch: int) -> str:
    """What names one request: the same question in other words, or about another picture, is another one."""
    return digest_of([work.benchmark.name, item.id, epoch, item.asked, media_key(item)])


@solver
def ask(work: TaskContext) -> Solver:
    """Puts the question to the model, unless it has been answered."""

    async def solve(state: TaskState, generate: Generate) -> TaskState:
        item = work.items[str(state.sample_id)]
        key = await to_thread.run_sync(answer_key, work, item, state.epoch, limiter=work.threads)
        known = await to_thread.run_sync(work.answers.get, key, limiter=work.threads)
        if known is None:
            try:
                known = await _asked(work, item, state)
            except Exception as error:
                said = why(error)
                by: By = "left out" if isinstance(error, LeftOutError) else "open"
                work.take(SampleResult(item.id, state.epoch, by, error=said, gold=item.golds, facts=item.facts))
                raise EvaluationError(said) from None
            if known["finish"] not in (TOO_LONG, BROKEN):  # a longer context or another clip may come
                await to_thread.run_sync(work.answers.add, key, known, limiter=work.threads)
        else:
            state.messages = await to_thread.run_sync(_again, work, item, state.messages, limiter=work.threads)
            state.output = ModelOutput.from_content(str(state.model), known["text"], stop_reason=known["finish"])
            state.messages.append(state.output.message)
        work.thoughts.note(str(known["text"]), str(known["finish"]))
        state.metadata["reply"] = known
        return state

    return solve


def _again(work: TaskContext, item: Item, plain: list[ChatMessage]) -> list[ChatMessage]:
    """The conversation of a question that was answered before. Clips are not taken apart for it, and pictures may be gone."""
    if item.video is not None or not (item.images or item.frames):
        return plain
    try:
        return chat_messages(work.turns(item))[0]
    except DataError:
        return plain


async def _asked(work: TaskContext, item: Item, state: TaskState) -> dict[str, Any]:
    """What the model says. Raises whatever is wrong with the question's media or the server; LeftOutError where it takes no pictures."""
    pictured = bool(item.images or item.frames or item.video)
    if pictured and work.health.blind:
        raise LeftOutError(work.health.blind)
    if work.health.down:
        raise EvaluationError(f"not asked, since {DOWN_AFTER} requests before it failed ({work.health.last})")
    try:
        turns = await to_thread.run_sync(work.turns, item, limiter=work.threads)
    except UnavailableError:
        raise
    except DataError as error:
        if work.strict or not media_there(item):
            raise
        return {"text": "", "finish": BROKEN, "tokens_in": 0, "tokens_out": 0, "error": why(error)}
    state.messages, sent = await to_thread.run_sync(chat_messages, turns, limiter=work.threads)
    _SENT.update(sent)
    try:
        state.output = output = await _answered(work.health, state.messages)
    except Exception as error:
        if too_long(error):
            return {"text": "", "finish": TOO_LONG, "tokens_in": 0, "tokens_out": 0}
        if pictured and blind(error):
            work.health.blind = why(error)
            raise LeftOutError(why(error)) from None
        raise
    finally:
        for name in sent:
            del _SENT[name]
    state.messages.append(output.message)
    usage, finish = output.usage, output.stop_reason
    return {
        # What a server says about a conversation that is too long for it is no answer of the model.
        "text": "" if finish == TOO_LONG else message_text(output),
        "finish": finish,
        "tokens_in": usage.input_tokens if usage else 0,
        "tokens_out": usage.output_tokens if usage else 0,
    }


def _last_attempt(error: Exception) -> BaseException:
    """What the last attempt raised, where retries were given up."""
    return (error.last_attempt.exception() or error) if isinstance(error, RetryError) else error


async def _answered(health: Health, messages: list[ChatMessage]) -> ModelOutput:
    """What the least busy address says. One that fails is left for the others, and for good after eight failures in a row.

    Where others are left a failure is not waited for. Raises what the last one that was asked has raised.
    """
    left = [route for route in health.routes if not route.down]
    while True:
        route = min(left, key=lambda route: route.under_way)
        left.remove(route)
        route.under_way += 1
        try:
            output = await route.model.generate(messages, config=GenerateConfig(max_retries=0 if left else RETRIES))
        except Exception as raised:
            error = _last_attempt(raised)
            if refused(error):
                route.failures = 0  # it is there, and dislikes this request
                raise error from error.__cause__
            health.last = why(error)
            route.failures += getattr(error, "status_code", None) != BUSY
            left = [other for other in left if not other.down]
            if not left:
                raise error from error.__cause__
        else:
            route.failures = 0
            return output
        finally:
            route.under_way -= 1


@scorer(metrics=[mean()])
def decide(work: TaskContext) -> Scorer:
    """The row's score with everything that led to it; unscored where the judge failed, so that no failure counts as wrong."""

    async def score(state: TaskState, target: Target) -> Score:
        item = work.items[str(state.sample_id)]
        decided = partial(work.decider.decide, work.benchmark, item, state.epoch, state.metadata["reply"], work.judgements)
        row = await to_thread.run_sync(decided, limiter=work.threads)
        work.take(row)
        kept = {name: value for name, value in asdict(row).items() if name not in ("text", "facts", "answer")}
        if row.value is None:
            return Score.unscored(answer=row.answer, explanation=row.error, metadata=kept)
        return Score(value=row.value, answer=row.answer, explanation=row.reply or row.reason, metadata=kept)

    return score
