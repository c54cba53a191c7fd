"""`/v1/chat/completions`: for adapters that were trained on conversations, with the template of their training."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.types import ASGIApp

from peftune.data.sources.chat_template import STOPS, render_chat
from peftune.serve.openai.body import read_body
from peftune.serve.openai.chunks import Chunk, TokenEntry
from peftune.serve.openai.errors import ApiError
from peftune.serve.openai.prompts import encode_prompts, parses_special
from peftune.serve.openai.respond import PendingResponse, ResponseFormat
from peftune.serve.openai.schema import ChatCompletionRequest
from peftune.serve.service import AUTO, Service, service_of

PATH = "/v1/chat/completions"


async def create_chat_completion(http: Request) -> ASGIApp:
    """Generate the assistant's next turn, `n` times."""
    service = service_of(http)
    body = await read_body(http, ChatCompletionRequest)
    candidates = _chat_adapters(service, body.model)
    texts = [render_chat([m.model_dump() for m in body.messages])]
    prompts = await encode_prompts(service.bank, texts, parses_special(service.bank, candidates, texts))
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    response = PendingResponse(
        http, body, prompts, _format(body), body.most_tokens, logprobs=logprobs, stop=STOPS, candidates=candidates
    )
    return await response.generate()


def _chat_adapters(service: Service, model: str) -> list[str]:
    """The adapters that may answer; ApiError 404 for an unknown model, 400 where it was not trained on chat."""
    if model == AUTO:
        names = [name for name in service.bank.names if service.bank.get(name).is_chat]
        if not names:
            raise ApiError(400, "no adapter here was trained on chat; use /v1/completions", "model")
        return names
    name = service.adapter_named(model)
    if name is None or not service.bank.get(name).is_chat:
        raise ApiError(400, f"{model} was not trained on chat (messages); use /v1/completions", "model")
    return [name]


def _format(body: ChatCompletionRequest) -> ResponseFormat:
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
        "chat.completion", "chat.completion.chunk", "chatcmpl", choice, stream_choice, prompt_logprobs, lead=" "
    )


def _logprobs(chunk: Chunk) -> dict[str, Any]:
    def entry(token: TokenEntry) -> dict[str, Any]:
        return {"token": token.text, "logprob": token.logprob, "bytes": list(token.raw)}

    return {"content": [entry(one.token) | {"top_logprobs": [entry(t) for t in one.top]} for one in chunk.scored]}
