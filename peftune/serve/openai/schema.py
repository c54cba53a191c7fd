"""What clients may send, field by field. Any other field is refused by name."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, FailFast, Field, PlainValidator, model_validator

from peftune.data.rows.chat_messages import joined_parts
from peftune.inference.settings import GenerationSettings
from peftune.serve.openai.neutral import (
    NeutralChatFields,
    NeutralFields,
    OpenAIBaseModel,
    StreamOptions,
    belongs_to,
    only,
)
from peftune.serve.settings import check_adapter_name

MAX_LOGPROBS = 20
MAX_CHOICES = 16
_MAX_MESSAGES, _MAX_PROMPTS, _MAX_STOPS, _MAX_BIASES = 1024, 1024, 64, 1024
_SEEDS = 2**63
_AS_IN_SETTINGS = (
    "temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias",
    "ignore_eos",
)  # fmt: skip
_Count = Annotated[int, Field(ge=0, le=1 << 31)]
_Logprobs = Annotated[int, Field(ge=0, le=MAX_LOGPROBS)]
_Name = Annotated[str, Field(min_length=1, max_length=512)]
_Stop = Annotated[str, Field(min_length=1, max_length=1000)]


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
    """The text of a turn from OpenAI's list of text parts, each with nothing but its type and text."""
    if not isinstance(value, list):
        return value
    text = joined_parts(value)
    if text is None or any(part.keys() != {"type", "text"} for part in value):
        raise ValueError("expected text, or parts such as {type: text, text: …}")
    return text


def _biases(value: Any) -> Any:
    """OpenAI's {"token id": bias} as pairs."""
    if not isinstance(value, dict) or len(value) > _MAX_BIASES:
        raise ValueError(f'expected an object such as {{"50256": -100}} of at most {_MAX_BIASES} tokens')
    wrong = next((key for key in value if not re.fullmatch(r"0|[1-9][0-9]{0,9}", key)), None)
    if wrong is not None:
        raise ValueError(f"expected token ids as names, found {wrong[:40]!a}")
    return tuple((int(key), bias) for key, bias in value.items())


_Bias = Annotated[float, Field(ge=-100, le=100)]
_Penalty = Annotated[float, Field(ge=-2, le=2)]


class SamplingRequest(NeutralFields):
    """The fields that completions and chat share."""

    model: _Name
    temperature: Annotated[float, Field(ge=0, le=100)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=-1, le=1 << 31)] = 0
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] = 1.0
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] = 1
    seed: Annotated[int, Field(ge=-_SEEDS, lt=_SEEDS)] | None = None
    stop: Annotated[list[_Stop], FailFast(), Field(max_length=_MAX_STOPS), BeforeValidator(_listed)] = Field(
        default_factory=list
    )
    stream: bool = False
    stream_options: StreamOptions | None = None
    return_token_ids: bool = False
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    presence_penalty: _Penalty = 0.0
    frequency_penalty: _Penalty = 0.0
    logit_bias: Annotated[tuple[tuple[int, _Bias], ...], FailFast(), BeforeValidator(_biases)] = ()
    min_tokens: _Count = 0
    ignore_eos: bool = False
    stop_token_ids: Annotated[list[_Count], FailFast(), Field(max_length=_MAX_STOPS)] = Field(default_factory=list)
    prompt_logprobs: _Logprobs | None = None

    @model_validator(mode="after")
    def _check_streaming(self) -> SamplingRequest:
        if self.stream_options is not None and self.stream_options.include_usage and not self.stream:
            raise ValueError("stream_options goes with stream: true")
        if self.prompt_logprobs is not None and self.stream:
            raise ValueError("prompt_logprobs goes without stream")
        return self

    def settings(self, max_tokens: int, choice: int, stops: Sequence[str] = ()) -> GenerationSettings:
        """The settings of choice 0, 1, … of `n`, which samples with seed `seed` + choice.

        Raises UserError where they do not go together.
        """
        return GenerationSettings(
            max_new_tokens=max(1, max_tokens),
            min_new_tokens=self.min_tokens,
            top_k=max(0, self.top_k),
            seed=None if self.seed is None else (self.seed + choice) % _SEEDS,
            stop=(*stops, *self.stop),
            stop_token_ids=tuple(self.stop_token_ids),
            **{name: getattr(self, name) for name in _AS_IN_SETTINGS},
        )


class CompletionRequest(SamplingRequest):
    """`/v1/completions`; without a prompt a new document begins.

    `split_special_tokens` (the word of Transformers) false reads `<|endoftext|>` in a text as the token, true as text;
    without it the model's adapter says, by how it was trained.
    """

    prompt: Annotated[list[str] | list[list[int]], PlainValidator(_prompts)] = Field(default_factory=lambda: [""])
    max_tokens: _Count | None = None
    logprobs: _Logprobs | None = None
    echo: bool = False
    best_of: Annotated[int, Field(ge=1)] | None = None
    split_special_tokens: bool | None = None
    suffix: Annotated[Any, only("")] = None
    add_special_tokens: Annotated[Any, only(True)] = None
    messages: Annotated[Any, belongs_to("/v1/chat/completions")] = None

    @model_validator(mode="after")
    def _check_combination(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of != self.n:
            raise ValueError(f"best_of is {self.best_of} with n {self.n}: choosing among more is not supported")
        return self


class ChatMessage(OpenAIBaseModel):
    """One turn of a conversation, which is read as in training (`data.rows.chat_messages`).

    `content` is text, or OpenAI's list of text parts; an assistant's message of `tool_calls` may have none.
    """

    role: Literal["system", "developer", "tool", "user", "assistant"]
    content: Annotated[str | None, BeforeValidator(_join_parts)] = None
    name: Annotated[str, Field(max_length=1024)] = ""  # the template has no place for it
    tool_call_id: Annotated[str, Field(max_length=1024)] = ""
    tool_calls: list[dict[str, Any]] = Field(default_factory=list)
    refusal: Annotated[Any, only("")] = None
    annotations: Annotated[Any, only([])] = None
    function_call: Annotated[Any, only()] = None
    audio: Annotated[Any, only()] = None
    reasoning: Annotated[Any, only("")] = None
    reasoning_content: Annotated[Any, only("")] = None

    @model_validator(mode="after")
    def _check_it_says_something(self) -> ChatMessage:
        if self.tool_calls and self.role != "assistant":
            raise ValueError("tool_calls belong to the assistant's messages")
        if self.content is None and not self.tool_calls:
            raise ValueError("content is missing")
        return self


class ChatCompletionRequest(SamplingRequest, NeutralChatFields):
    """`/v1/chat/completions`."""

    messages: Annotated[list[ChatMessage], FailFast(), Field(min_length=1, max_length=_MAX_MESSAGES)]
    max_tokens: _Count | None = None
    max_completion_tokens: _Count | None = None
    logprobs: bool = False
    top_logprobs: _Logprobs | None = None

    @model_validator(mode="after")
    def _check_combination(self) -> ChatCompletionRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs goes with logprobs: true")
        if len({self.max_tokens, self.max_completion_tokens} - {None}) > 1:
            raise ValueError("max_tokens and max_completion_tokens mean the same; give one of them")
        return self

    @property
    def most_tokens(self) -> int | None:
        """At most so many tokens, under either of the two names."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class LoadLoRAAdapterRequest(OpenAIBaseModel):
    """`/v1/load_lora_adapter`; `lora_name` becomes the name of a model.

    `load_inplace` (vLLM's word) replaces the adapter of this name.
    """

    lora_name: Annotated[str, AfterValidator(check_adapter_name)]
    lora_path: Annotated[str, Field(pattern=r"^[^\x00]+$", max_length=4096)]
    load_inplace: bool = False


class UnloadLoRAAdapterRequest(OpenAIBaseModel):
    """`/v1/unload_lora_adapter`."""

    lora_name: _Name


class TokenizeRequest(OpenAIBaseModel):
    """`/tokenize`: the ids of a prompt, or of a conversation as it is rendered; without a model the base's."""

    model: _Name = "base"
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], FailFast(), Field(max_length=_MAX_MESSAGES)] = Field(default_factory=list)
    split_special_tokens: bool | None = None
    return_token_strs: bool = False
    add_generation_prompt: bool = True
    add_special_tokens: Annotated[Any, only(True, False)] = None  # the context token is never listed
    continue_final_message: Annotated[Any, only(False)] = None
    chat_template: Annotated[Any, only()] = None
    chat_template_kwargs: Annotated[Any, only({})] = None
    tools: Annotated[Any, only([])] = None

    @model_validator(mode="after")
    def _check_one(self) -> TokenizeRequest:
        if (self.prompt is None) != bool(self.messages):
            raise ValueError("expected prompt or messages, one of them")
        return self


class DetokenizeRequest(OpenAIBaseModel):
    """`/detokenize`: the text of `tokens`."""

    model: _Name = "base"
    tokens: Annotated[list[_Count], FailFast()]
