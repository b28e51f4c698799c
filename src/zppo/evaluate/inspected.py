"""The model as inspect-ai asks it: an OpenAI-compatible server that is sent every sampling setting, videos too.

Imported when an evaluation runs; it is the only module beside `task` that needs inspect-ai (`pip install 'zppo[eval]'`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

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
    ContentVideo,
    GenerateConfig,
    Model,
    ModelOutput,
    get_model,
    modelapi,
)
from inspect_ai.model._providers.openai_compatible import OpenAICompatibleAPI
from inspect_ai.tool import ToolInfo
from openai import DefaultAsyncHttpxClient

from zppo.errors import one_line
from zppo.evaluate.media import Turn
from zppo.evaluate.protocol import Decoding
from zppo.teacher.http import SHORTEST_SECRET, sound

PROVIDER = "zppo"
RAW = "raw"  # metadata of a message: the text as the server sent it
ATTEMPT = 3600.0  # seconds for one whole reply: 12,288 tokens of a busy server take their time
RETRIES = 4
_VIDEO = "zppo-video:"
_BLIND = re.compile(
    r"not a multi-?modal model|at most 0 image|images? (input )?(is|are) not supported|not support (images?|vision|multi-?modal)",
    re.I,
)
_TOO_LONG = re.compile(
    r"maximum (context|model) length|context[ _](length|size) (is|exceeded)|exceeds the (\w+ )?context", re.I
)


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
            http_client=DefaultAsyncHttpxClient(event_hooks={"response": [_Hush(api_key)]}),
        )

    async def messages_to_openai(self, input: list[ChatMessage]) -> list[Any]:
        """inspect-ai refuses videos on this path: they go through it as images, and come out as what they are."""
        return [_with_videos(message) for message in await super().messages_to_openai([_hidden(m) for m in input])]

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
        choices = super().chat_choices_from_completion(completion, tools)
        for choice, sent in zip(choices, completion.choices, strict=True):
            choice.message.metadata = {RAW: _raw_of(sent.message)}
        return choices


class _Hush:
    """Takes the key out of what a server sends, before anybody can log it."""

    def __init__(self, key: str) -> None:
        self._key = key.encode()

    async def __call__(self, response: Any) -> None:
        body = await response.aread()
        if len(self._key) >= SHORTEST_SECRET and self._key in body:
            response._content = body.replace(self._key, b"[key]")


def served_model(url: str, name: str, key: str, decoding: Decoding, concurrency: int) -> Model:
    """The model of a server under the protocol's decoding.

    top_k, min_p and repetition_penalty go as fields of the body: inspect-ai's own top_k is never sent on this path.
    """
    extra = {"top_k": decoding.top_k, "min_p": decoding.min_p, "repetition_penalty": decoding.repetition_penalty}
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


def chat_messages(turns: Sequence[Turn]) -> list[ChatMessage]:
    """A conversation in inspect-ai's types."""
    kinds = {"system": ChatMessageSystem, "user": ChatMessageUser, "assistant": ChatMessageAssistant}
    messages: list[ChatMessage] = []
    for turn in turns:
        parts: list[Content] = []
        for part in turn.parts:
            if part.kind == "text":
                parts.append(ContentText(text=sound(part.value)))
            elif part.kind == "image":
                parts.append(ContentImage(image=part.value))
            else:
                parts.append(ContentVideo(video=part.value, format="mp4"))
        texts = [p.text for p in parts if isinstance(p, ContentText)]
        content: Any = texts[0] if len(texts) == len(parts) == 1 else parts
        messages.append(kinds[turn.role](content=content))
    return messages


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
    return refused(error) and (
        getattr(error.__cause__, "code", None) == "images_refused" or bool(_BLIND.search(why(error)))
    )


def text_of(output: ModelOutput) -> str:
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
    thoughts = next(
        (t for n in ("reasoning_content", "reasoning") if isinstance(t := getattr(message, n, None), str)), ""
    )
    return _joined(thoughts, message.content or "")


def _joined(thoughts: str, text: str) -> str:
    """Thoughts without an answer behind them stay open: they are no answer."""
    if not thoughts:
        return text
    return f"<think>{thoughts}</think>{text}" if text.strip() else f"<think>{thoughts}"


def _hidden(message: ChatMessage) -> ChatMessage:
    if isinstance(message.content, str) or not any(isinstance(p, ContentVideo) for p in message.content):
        return message
    parts = [
        ContentImage(image=f"data:image/png;base64,{_VIDEO}{p.video}") if isinstance(p, ContentVideo) else p
        for p in message.content
    ]
    return message.model_copy(update={"content": parts})


def _with_videos(message: Any) -> Any:
    if not isinstance(message.get("content"), list):
        return message
    return {**message, "content": [_part(part) for part in message["content"]]}


def _part(part: dict[str, Any]) -> dict[str, Any]:
    url = part.get("image_url", {}).get("url", "") if part.get("type") == "image_url" else ""
    found = re.match(rf"data:image/png;base64,{_VIDEO}", url)
    if found:
        return {"type": "video_url", "video_url": {"url": url[found.end() :]}}
    return {"type": "image_url", "image_url": {"url": url}} if url else part
