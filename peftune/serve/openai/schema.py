"""What clients may send, field by field. Any other field is refused by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, FailFast, Field, PlainValidator, model_validator

from peftune.inference.settings import GenerationSettings

MAX_LOGPROBS = 20
MAX_CHOICES = 16
_MAX_FIELDS, _MAX_MESSAGES, _MAX_PROMPTS, _MAX_STOPS = 64, 1024, 1024, 4
_SEEDS = 2**63
_TEXT_PART = {"type": "text", "text": ""}
_Stop = Annotated[str, Field(min_length=1, max_length=1000)]


class OpenAIBaseModel(BaseModel):
    """A request's body: unknown fields are refused, nothing is converted; null is the same as leaving a field out."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        if len(value) > _MAX_FIELDS:
            raise ValueError(f"{len(value)} fields, expected at most {_MAX_FIELDS}")  # each is a line of the error
        return {key: item for key, item in value.items() if item is not None}


def _prompts(value: Any) -> Any:
    """A string, a list of strings, token ids, or a list of token ids: always as a list of strings or ids."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if all(isinstance(item, str) for item in value):
            return value
        if _are_ids(value):
            return [value]
        if len(value) > _MAX_PROMPTS:
            raise ValueError(f"{len(value)} prompts, expected at most {_MAX_PROMPTS}")
        if all(isinstance(item, list) and item and _are_ids(item) for item in value):
            return value
    raise ValueError("expected a string, a list of strings, a list of token ids, or a list of such lists; none empty")


def _are_ids(value: list[Any]) -> bool:
    return all(type(item) is int for item in value)  # a boolean is an int too, and no token


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _join_parts(value: Any) -> Any:
    """The text of a turn from OpenAI's list of text parts."""
    if not isinstance(value, list):
        return value
    for part in value:
        if not isinstance(part, dict) or part | {"text": ""} != _TEXT_PART or not isinstance(part.get("text"), str):
            raise ValueError("expected text, or parts such as {type: text, text: …}")
    return "".join(part["text"] for part in value)


def _refuse(value: Any) -> Any:
    """For a field that is not supported: only the value that has no effect passes, and has its type checked later."""
    if value:
        raise ValueError("is not supported by this server")
    return value


_UNSUPPORTED = BeforeValidator(_refuse)


class StreamOptions(OpenAIBaseModel):
    """`include_usage`: a last event with the token counts."""

    include_usage: bool = False


class SamplingRequest(OpenAIBaseModel):
    """The fields that completions and chat share."""

    model: Annotated[str, Field(min_length=1, max_length=512)]
    temperature: Annotated[float, Field(ge=0, le=100)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=-1, le=1 << 31)] = 0
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] = 1.0
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] = 1
    seed: Annotated[int, Field(ge=-_SEEDS, lt=_SEEDS)] | None = None
    stop: Annotated[list[_Stop], FailFast(), Field(max_length=_MAX_STOPS), BeforeValidator(_listed)] = []
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: Annotated[str, Field(max_length=1024)] = ""
    return_token_ids: bool = False
    logit_bias: Annotated[dict[str, Any], _UNSUPPORTED] = {}
    presence_penalty: Annotated[float, _UNSUPPORTED] = 0.0
    frequency_penalty: Annotated[float, _UNSUPPORTED] = 0.0

    @model_validator(mode="after")
    def _check_stream_options(self) -> SamplingRequest:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options goes with stream: true")
        return self

    def settings(self, max_tokens: int, choice: int, stops: Sequence[str] = ()) -> GenerationSettings:
        """The settings of choice 0, 1, … of `n`, which samples with seed `seed` + choice."""
        return GenerationSettings(
            max_new_tokens=max(1, max_tokens),
            temperature=self.temperature,
            top_k=max(0, self.top_k),
            top_p=self.top_p,
            repetition_penalty=self.repetition_penalty,
            seed=None if self.seed is None else (self.seed + choice) % _SEEDS,
            stop=(*stops, *self.stop),
        )


class CompletionRequest(SamplingRequest):
    """`/v1/completions`; without a prompt a new document begins."""

    prompt: Annotated[list[str] | list[list[int]], PlainValidator(_prompts)] = Field(default_factory=lambda: [""])
    max_tokens: Annotated[int, Field(ge=0, le=1 << 31)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    echo: bool = False
    best_of: Annotated[int, Field(ge=1)] | None = None
    suffix: Annotated[str, _UNSUPPORTED] = ""

    @model_validator(mode="after")
    def _check_combination(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of != self.n:
            raise ValueError(f"best_of is {self.best_of} with n {self.n}: choosing among more is not supported")
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens is 0, expected 1 or more, or echo: true to score the prompt")
        return self


class ChatMessage(OpenAIBaseModel):
    """One turn of a conversation; `content` is text, or OpenAI's list of text parts."""

    role: Literal["system", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_join_parts)]


class ChatCompletionRequest(SamplingRequest):
    """`/v1/chat/completions`."""

    messages: Annotated[list[ChatMessage], FailFast(), Field(min_length=1, max_length=_MAX_MESSAGES)]
    max_tokens: Annotated[int, Field(ge=1, le=1 << 31)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=1 << 31)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    @model_validator(mode="after")
    def _check_combination(self) -> ChatCompletionRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs goes with logprobs: true")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("max_tokens and max_completion_tokens mean the same; give one of them")
        return self


class LoadLoRAAdapterRequest(OpenAIBaseModel):
    """`/v1/load_lora_adapter`; `lora_name` becomes the name of a model."""

    lora_name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    lora_path: Annotated[str, Field(pattern=r"^[^\x00]+$", max_length=4096)]


class UnloadLoRAAdapterRequest(OpenAIBaseModel):
    """`/v1/unload_lora_adapter`."""

    lora_name: Annotated[str, Field(min_length=1, max_length=512)]
