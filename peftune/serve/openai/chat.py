"""`/v1/chat/completions`: for adapters that were trained on conversations, with the template of their training."""

from __future__ import annotations

import time
from typing import Any

from fastapi import Request, Response

from peftune.data.sources.chat_template import STOPS, render_chat
from peftune.errors import UserError
from peftune.inference.request import Request as EngineRequest
from peftune.serve.openai import schema
from peftune.serve.openai.body import read_json
from peftune.serve.openai.chunks import ChoiceFormatter, Chunk, Spelled
from peftune.serve.openai.errors import ApiError
from peftune.serve.openai.prompts import prompts_of, room_for
from peftune.serve.openai.respond import Answer, Choice, Shape
from peftune.serve.service import AUTO, Service, service_of

PATH = "/v1/chat/completions"


async def chat(http: Request) -> Response:
    """Say the assistant's next turn, `n` times."""
    arrived, service = time.monotonic(), service_of(http)
    value = await read_json(http, service.settings.max_body, service.settings.body_seconds)
    body = schema.read(schema.Chat, value)
    http.state.model = body.model
    speakers = _speakers(service, body.model)
    try:
        text = render_chat([message.model_dump() for message in body.messages])
    except UserError as error:
        raise ApiError(400, str(error), "messages") from None
    (prompt,) = await prompts_of(service.bank, [text])
    max_tokens = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    most = room_for(prompt, max_tokens, None, service.bank.config.n_positions)
    chosen = await service.choose(body.model, [prompt.read], among=speakers)
    http.state.model = chosen.shown
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    choices = [
        Choice(
            EngineRequest(prompt.read, chosen.adapter, body.settings(most, number, STOPS), logprobs=logprobs),
            ChoiceFormatter(service.spelling, prompt.text, prompt.ids, echo=False, lead=" "),
        )
        for number in range(body.n)
    ]
    shape = _shape(body)
    answer = Answer(service, chosen, choices, len(prompt.ids), shape, PATH, arrived, body.include_usage)
    return answer.stream() if body.stream else await answer.whole(http)


def _speakers(service: Service, model: str) -> list[str]:
    """The adapters that may answer; ApiError 404 for an unknown model, 400 where it was not trained on chat."""
    if model == AUTO:
        found = [name for name in service.bank.names if service.bank.get(name).is_chat]
        if not found:
            raise ApiError(400, "no adapter here was trained on chat; use /v1/completions", "model")
        return found
    name = service.named(model)
    if name is None or not service.bank.get(name).is_chat:
        raise ApiError(400, f"{model} was not trained on chat (messages); use /v1/completions", "model")
    return [name]


def _shape(body: schema.Chat) -> Shape:
    def common(index: int, piece: Chunk) -> dict[str, Any]:
        told: dict[str, Any] = {"logprobs": _logprobs(piece) if body.logprobs else None}
        if body.return_token_ids:
            told["token_ids"] = list(piece.ids)
        return {"index": index} | told | {"finish_reason": piece.finish_reason}

    def choice(index: int, piece: Chunk) -> dict[str, Any]:
        return common(index, piece) | {"message": {"role": "assistant", "content": piece.text, "refusal": None}}

    def delta(index: int, piece: Chunk) -> dict[str, Any]:
        role = {"role": "assistant"} if piece.prompt_ids is not None else {}
        content = {"content": piece.text} if piece.text or role else {}
        return common(index, piece) | {"delta": role | content}

    return Shape("chat.completion", "chat.completion.chunk", "chatcmpl", choice, delta)


def _logprobs(piece: Chunk) -> dict[str, Any]:
    def told(token: Spelled) -> dict[str, Any]:
        return {"token": token.text, "logprob": token.logprob, "bytes": list(token.raw)}

    content = [told(one.token) | {"top_logprobs": [told(other) for other in one.top]} for one in piece.scored]
    return {"content": content}
