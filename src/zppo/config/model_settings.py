"""Settings of models: how they are sampled, where they are, what a frozen one is asked for."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar, Literal, Self
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from zppo.engines.base import Sampling
from zppo.teacher.interface import TeacherSampling

OPENAI_HOST = "api.openai.com"


class RemoteSettings(BaseModel):
    """OpenAI-compatible addresses and how patiently they are called."""

    base_urls: tuple[str, ...] = Field(
        (), description="addresses of servers, e.g. [http://localhost:8000/v1]; empty: the model runs in this process"
    )
    key_env: str = Field(
        "OPENAI_API_KEY", description="name of the environment variable that holds the key for base_urls; empty or not set: no key is sent"
    )
    concurrency: int = Field(64, ge=1, description="requests to base_urls that are under way at once, all together")
    deadline: float = Field(600.0, gt=0, description="seconds for one attempt of a request to base_urls, to its last byte")
    retry_for: float = Field(
        600.0, ge=0, description="seconds for which a request to base_urls is tried again, and after which a silent teacher counts as down"
    )

    @field_validator("base_urls")
    @classmethod
    def _addresses(cls, urls: tuple[str, ...]) -> tuple[str, ...]:
        for number, url in enumerate(urls, 1):
            parts = urlsplit(url)
            if parts.username is not None or parts.query or parts.fragment:
                raise ValueError(  # not shown: it may hold a key
                    f"address {number} holds a user name, a password or a query; give http://HOST:PORT/PATH alone, and the key in the "
                    "environment variable that key_env names"
                )
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise ValueError(f"{url!r} is no address of a server; write http://HOST:PORT/v1 or https://HOST/v1")
            if parts.port == 0:  # a port that is no number, or too large, is a ValueError
                raise ValueError(f"{url!r} has no port that can be called; write http://HOST:PORT/v1")
        urls = tuple(url.rstrip("/") for url in urls)
        if len(set(urls)) != len(urls):
            raise ValueError("an address stands twice; name each server once")
        return urls

    @field_validator("key_env")
    @classmethod
    def _name_of_a_variable(cls, name: str) -> str:
        if name and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise ValueError(  # not shown: it may be the key itself
                "this is no name of an environment variable; if it is the key, put it into a variable and name that: a key in a recipe "
                "ends up in files"
            )
        return name

    @property
    def official(self) -> bool:
        """Whether OpenAI's own address is among them, which refuses the fields that other servers add."""
        return any(urlsplit(url).hostname == OPENAI_HOST for url in self.base_urls)


class Section(BaseModel):
    """A part of a recipe: unknown keys are refused, values never change after parsing. A list that is empty may be left empty (null)."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _empty_lists(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        lists = {name for name, field in cls.model_fields.items() if field.default == ()}
        return {name: () if value is None and name in lists else value for name, value in data.items()}


class SamplingSettings(Section):
    """How tokens are drawn."""

    temperature: float = Field(1.0, ge=0, description="0 is greedy")
    top_p: float = Field(1.0, gt=0, le=1, description="nucleus; 1 is off")
    top_k: int = Field(0, ge=0, description="0 is off")
    max_new_tokens: int = Field(12_288, ge=1, description="token limit of a completion")

    def sampling(self) -> Sampling:
        """The same for an engine."""
        return Sampling(**self.model_dump(include={field.name for field in fields(Sampling)}))


class ModelSettings(Section):
    """A `transformers` checkpoint and how it is spoken to."""

    model: str = Field(description="folder or hub name of a transformers checkpoint, or lab:<world>/<student|teacher>")
    revision: str | None = Field(None, description="revision on the hub")
    template: Path | None = Field(None, description="chat template (a jinja file) instead of the tokenizer's own")
    template_args: dict[str, Any] = Field({}, description="arguments of the chat template, e.g. {enable_thinking: true}")
    attention: str | None = Field(None, description="attn_implementation of transformers; empty: its default")


class TinkerSettings(Section):
    """A cluster that somebody else runs, over the Tinker API (docs/tinker.md)."""

    base_url: str | None = Field(
        None, pattern=r"^https?://[^@?#\s]+$", description="address of the server; empty: TINKER_BASE_URL, else the hosted service"
    )
    base_model: str | None = Field(None, min_length=1, description="what the server calls the model; empty: student.model")
    server: Literal["tinker", "skyrl-jax"] = Field(
        "tinker", description="what answers: tinker, the hosted service; skyrl-jax, SkyRL's server with its JAX backend"
    )
    deadline: float = Field(1800.0, gt=0, description="seconds that an answer is waited for before the run is saved and ends")


class StudentSettings(ModelSettings):
    """The model that is trained."""

    tinker: TinkerSettings | None = Field(
        None, description="the student lives on a server that speaks the Tinker API; empty: in this process; {} is the hosted service"
    )

    quantize: Literal["4bit"] | None = Field(
        None,
        description="4bit: the frozen linear layers below LoRA adapters are held in 4 bits (QLoRA; `pip install bitsandbytes`); "
        "final/ is whole again",
    )


class TeacherUse(SamplingSettings):
    """How the teacher is sampled for one use."""

    thinks: ClassVar[bool] = True
    """False where the token limit has no room for thoughts."""

    template_args: dict[str, Any] = Field({}, description="chat-template arguments for this use, over teacher.template_args")
    extra_body: dict[str, Any] = Field({}, description="fields of requests to base_urls, over all others; null leaves a field out")


class CompressionSettings(TeacherUse):
    """How candidates are compressed (method.md section 4)."""

    thinks: ClassVar[bool] = False

    enabled: bool = Field(True, description="false: candidates are shown uncompressed, cut to `max_new_tokens`")
    temperature: float = Field(0.0, ge=0, description="0 is greedy")
    max_new_tokens: int = Field(512, ge=1, description="cap of a candidate in tokens, compressed or not")


class HintSettings(TeacherUse):
    """How hints are written (Alg. 5)."""

    thinks: ClassVar[bool] = False

    max_new_tokens: int = Field(512, ge=1, description="token limit of a hint")


class JudgeUse(TeacherUse):
    """How completions are judged (method.md section 7)."""

    thinks: ClassVar[bool] = False

    temperature: float = Field(0.0, ge=0, description="0 is greedy")
    max_new_tokens: int = Field(512, ge=1, description="token limit of a verdict")
    template_args: dict[str, Any] = Field(
        {"enable_thinking": False}, description="chat-template arguments for judging; thinking would eat the token limit"
    )
    response_tokens: int = Field(4096, ge=1, description="the judge reads at most so many tokens of a completion, its last ones")


class FrozenModelSettings(ModelSettings, RemoteSettings):
    """A model that is never trained, in this process or behind OpenAI-compatible addresses."""

    device: str = Field(
        "auto",
        pattern="^(auto|cpu|mps|(cuda|xpu|npu|hpu|mlu|musa)(:[0-9]+)?)$",
        description="auto: the training device; else a torch device such as cuda:1 or cpu",
    )

    @model_validator(mode="after")
    def _in_process_or_remote(self) -> Self:
        if self.base_urls:
            for name in ("revision", "template", "attention", "device"):
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(f"{name} is set, and base_urls too: there the server decides it; leave one of the two out")
            return self
        for name, use in self.uses().items():
            if use.extra_body:
                key = f"{name}.extra_body".lstrip(".")
                raise ValueError(f"{key} is set, and base_urls is not: it holds fields of HTTP requests; set base_urls, or leave it out")
        return self

    def uses(self) -> dict[str, TeacherUse]:
        """What the model is asked for, by the name of its section; "" where that is the model's own."""
        own: dict[str, TeacherUse] = {"": self} if isinstance(self, TeacherUse) else {}
        return own | {n: use for n in type(self).model_fields if isinstance(use := getattr(self, n), TeacherUse)}

    def how(self, use: TeacherUse) -> TeacherSampling:
        """Sampling, template arguments and request fields of one use.

        A remote model is sent `enable_thinking: false` where thoughts would eat the token limit, unless the recipe says otherwise.
        OpenAI's own address knows no template arguments, and is sent none.
        """
        args = {**self.template_args, **use.template_args}
        if self.base_urls and not use.thinks:
            args.setdefault("enable_thinking", False)
        return TeacherSampling(use.sampling(), {} if self.official else args, use.extra_body)


class JudgeSettings(JudgeUse, FrozenModelSettings):
    """A model that judges, where it is not the teacher."""


class TeacherSettings(FrozenModelSettings):
    """The frozen teacher."""

    ask: Literal["lazy", "all", "ahead"] = Field(
        "lazy",
        description="lazy: hardest questions first until the cap is full; ahead: the same, begun while the student samples, for a teacher "
        "on a server; all: Algorithm 1 to the letter; the batches are the same",
    )
    rollout: TeacherUse = Field(TeacherUse(), description="teacher rollouts on hard questions")
    hint: HintSettings = Field(HintSettings(), description="hints of the method hint")
    compression: CompressionSettings = Field(CompressionSettings(), description="candidate compression")
    judge: JudgeUse = Field(JudgeUse(), description="verdicts on free-form answers, where the recipe names no judge")

    @model_validator(mode="after")
    def _ahead_of_the_student(self) -> Self:
        if self.ask == "ahead" and not self.base_urls:
            raise ValueError(
                "ask is ahead, and base_urls is not set: a teacher in this process would take turns with the student's sampling and save "
                "nothing; serve it (vllm serve, zppo serve) and set base_urls, or take lazy"
            )
        return self
