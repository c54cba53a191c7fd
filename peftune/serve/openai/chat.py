"""`/v1/chat/completions`: for adapters that were trained on conversations, with the template of their training."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.types import ASGIApp

from peftune.data.sources.chat_template import EOS_TURNS, stops_of
from peftune.serve.openai.body import read_body
from peftune.serve.openai.chunks import Chunk, TokenEntry
from peftune.serve.openai.errors import ApiError
from peftune.serve.openai.prompts import encode_chat, parses_special
from peftune.serve.openai.respond import PendingResponse, ResponseFormat
from peftune.serve.openai.schema import ChatCompletionRequest
from peftune.serve.service import AUTO, Service, service_of

PATH = "/v1/chat/completions"


async def create_chat_completion(http: Request) -> ASGIApp:
    """Generate the assistant's next turn, `n` times."""
    service = service_of(http)
    body = await read_body(http, ChatCompletionRequest)
    candidates = _chat_models(service, body.model)
    chat = _template(service, candidates)
    messages = [message.model_dump() for message in body.messages]
    parse = parses_special(service.bank, candidates, [message["content"] for message in messages])
    prompts = [await encode_chat(service.bank, messages, chat, parse)]
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    response = PendingResponse(
        http,
        body,
        prompts,
        _format(body, "" if chat == EOS_TURNS else " "),
        body.most_tokens,
        logprobs=logprobs,
        stop=stops_of(chat),
        candidates=[name for name in candidates if name is not None],
    )
    return await response.generate()


def _chat_models(service: Service, model: str) -> list[str | None]:
    """The adapters (None: the base) that may answer; ApiError 404 for an unknown name, 400 where none learnt chat."""
    if model == AUTO:
        names = [name for name in service.bank.names if service.bank.chat(name)]
        if not names:
            raise ApiError(400, "no adapter here was trained on chat; use /v1/completions", "model")
        return [*names]
    name = service.adapter_named(model)
    if service.bank.chat(name) is None:
        raise ApiError(400, f"{model} was not trained on chat (messages); use /v1/completions", "model")
    return [name]


def _template(service: Service, names: list[str | None]) -> str:
    """The one by which all of them were trained; ApiError 400 where they differ: it is applied before one is chosen."""
    templates = {service.bank.chat(name) for name in names}
    if len(templates) > 1:
        raise ApiError(400, "the adapters here were trained with different data.chat; name one of them", "model")
    return str(templates.pop())


def _format(body: ChatCompletionRequest, lead: str) -> ResponseFormat:
    def common(index: int, chunk: Chunk) -> dict[str, Any]:
        token_ids = {"token_ids": chunk.ids} if body.return_token_ids else {}
        logprobs = _logprobs(chunk) if body.logprobs else None
        return {"index": index, "logprobs": logprobs, **token_ids, "finish_reason": chunk.finish_reason}

    def choice(index: int, chunk: Chunk) -> dict[str, Any]:
        return common(index, chunk) | {"message": {"role": "assistant", "content": chunk.text, "refusal": None}}

    def prompt_logprobs(first: Chunk) -> dict[str, Any]:
        return {} if first.prompt_logprobs is None else {"prompt_logprobs": first.prompt_logprobs}

    def stream_choice(index: int, chunk: Chunk) -> dict[str, Any]:
        role = {"role": "assistant"} if chunk.prompt_ids is not None else {}
        content = {"content": chunk.text} if chunk.text or role else {}
        return common(index, chunk) | {"delta": role | content}

    return ResponseFormat(
        "chat.completion", "chat.completion.chunk", "chatcmpl", choice, stream_choice, prompt_logprobs, lead=lead
    )


def _logprobs(chunk: Chunk) -> dict[str, Any]:
    def entry(token: TokenEntry) -> dict[str, Any]:
        return {"token": token.text, "logprob": token.logprob, "bytes": list(token.raw)}

    return {"content": [entry(one.token) | {"top_logprobs": [entry(t) for t in one.top]} for one in chunk.scored]}
