"""Fields of OpenAI's and vLLM's protocols that this server does not have: values that change nothing pass.

Clients send them unasked. Any other value is refused by the field's name: an answer must not differ silently from what
was asked for. Each is annotated as Any; whatever is not has an effect here.
"""

from __future__ import annotations

import json
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, model_validator

_MAX_FIELDS = 128


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


def only(*neutral: Any) -> PlainValidator:
    """A field of which nothing but the `neutral` values passes."""
    accepted = " or ".join(json.dumps(value) for value in neutral)

    def check(value: Any) -> Any:
        for one in neutral:
            if value == one and isinstance(value, bool) == isinstance(one, bool):  # True is 1, and no number
                return value
        raise ValueError("is not supported by this server" + (f"; leave it out, or {accepted}" if neutral else ""))

    return PlainValidator(check)


def belongs_to(path: str) -> PlainValidator:
    """A field of another endpoint."""

    def check(value: Any) -> Any:
        raise ValueError(f"belongs to {path}")

    return PlainValidator(check)


class StreamOptions(OpenAIBaseModel):
    """`include_usage`: a last event with the token counts."""

    include_usage: bool = False
    continuous_usage_stats: Annotated[Any, only(False)] = None
    include_obfuscation: Annotated[Any, only(False)] = None


_Label = Annotated[str, Field(max_length=1024)]


class NeutralFields(OpenAIBaseModel):
    """Those that completions and chat share."""

    # Labels for whoever keeps requests, which this server does not.
    user: _Label = ""
    metadata: dict[str, Any] = {}
    safety_identifier: _Label = ""
    prompt_cache_key: _Label = ""
    request_id: _Label = ""
    store: Annotated[Any, only(False)] = None
    service_tier: Annotated[Any, only("auto", "default")] = None
    priority: Annotated[Any, only(0)] = None
    response_format: Annotated[Any, only({"type": "text"})] = None
    structured_outputs: Annotated[Any, only({})] = None
    guided_json: Annotated[Any, only()] = None
    guided_regex: Annotated[Any, only()] = None
    guided_choice: Annotated[Any, only()] = None
    guided_grammar: Annotated[Any, only()] = None
    use_beam_search: Annotated[Any, only(False)] = None
    length_penalty: Annotated[Any, only(1)] = None
    early_stopping: Annotated[Any, only(False)] = None
    typical_p: Annotated[Any, only(1)] = None
    bad_words: Annotated[Any, only([])] = None
    allowed_token_ids: Annotated[Any, only()] = None
    logits_processors: Annotated[Any, only([])] = None
    truncate_prompt_tokens: Annotated[Any, only()] = None
    skip_special_tokens: Annotated[Any, only(True)] = None
    spaces_between_special_tokens: Annotated[Any, only(True)] = None
    include_stop_str_in_output: Annotated[Any, only(False)] = None
    return_tokens_as_token_ids: Annotated[Any, only(False)] = None


class NeutralChatFields(NeutralFields):
    """Those of chat alone."""

    tools: Annotated[Any, only([])] = None
    tool_choice: Annotated[Any, only("none", "auto")] = None
    parallel_tool_calls: bool = True
    functions: Annotated[Any, only([])] = None
    function_call: Annotated[Any, only("none", "auto")] = None
    modalities: Annotated[Any, only(["text"])] = None
    audio: Annotated[Any, only()] = None
    prediction: Annotated[Any, only()] = None
    web_search_options: Annotated[Any, only()] = None
    reasoning_effort: Annotated[Any, only("none")] = None
    verbosity: Annotated[Any, only("medium")] = None
    documents: Annotated[Any, only([])] = None
    echo: Annotated[Any, only(False)] = None
    best_of: Annotated[Any, only(1)] = None
    add_generation_prompt: Annotated[Any, only(True)] = None
    continue_final_message: Annotated[Any, only(False)] = None
    add_special_tokens: bool = False
    chat_template: Annotated[Any, only()] = None
    chat_template_kwargs: Annotated[Any, only({})] = None
    prompt: Annotated[Any, belongs_to("/v1/completions")] = None
    suffix: Annotated[Any, belongs_to("/v1/completions")] = None
