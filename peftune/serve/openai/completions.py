"""`/v1/completions`: continues prompts of text or token ids; with the legacy log-probabilities and `echo`."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.types import ASGIApp

from peftune.serve.openai.body import read_body
from peftune.serve.openai.chunks import Chunk, ScoredToken
from peftune.serve.openai.errors import ApiError
from peftune.serve.openai.prompts import encode_prompts, parses_special, special_tokens_in
from peftune.serve.openai.respond import PendingResponse, ResponseFormat
from peftune.serve.openai.schema import CompletionRequest
from peftune.serve.service import AUTO, service_of

PATH = "/v1/completions"
_MAX_TOKENS = 16  # OpenAI's default
_MAX_TEXTS = 128


async def create_completion(http: Request) -> ASGIApp:
    """Continue every prompt `n` times."""
    service = service_of(http)
    body = await read_body(http, CompletionRequest)
    limit = min(_MAX_TEXTS, service.settings.queue)  # more might not fit even into an empty queue
    if len(body.prompt) * body.n > limit:
        found = f"{len(body.prompt)} prompts with n {body.n}"
        raise ApiError(400, f"{found} are more than the {limit} texts that one request may ask for", "prompt")
    names = service.bank.names if body.model == AUTO else [service.adapter_named(body.model)]
    parse = parses_special(service.bank, names, body.prompt, body.split_special_tokens)
    prompts = await encode_prompts(service.bank, body.prompt, parse, body.split_special_tokens is False)
    response = PendingResponse(
        http, body, prompts, _format(body), body.max_tokens, _MAX_TOKENS, body.logprobs, body.echo,
        warnings=() if parse else special_tokens_in(service.bank, body.prompt),
    )  # fmt: skip
    return await response.generate()


def _format(body: CompletionRequest) -> ResponseFormat:
    def choice(index: int, chunk: Chunk) -> dict[str, Any]:
        logprobs = _logprobs(chunk.scored) if body.logprobs is not None else None
        token_ids = {"token_ids": chunk.ids} if body.return_token_ids else {}
        if body.return_token_ids and chunk.prompt_ids is not None:
            token_ids["prompt_token_ids"] = chunk.prompt_ids
        prompt = {} if chunk.prompt_logprobs is None else {"prompt_logprobs": chunk.prompt_logprobs}
        choice = {"index": index, "text": chunk.text, "logprobs": logprobs, "finish_reason": chunk.finish_reason}
        return choice | token_ids | prompt

    return ResponseFormat("text_completion", "text_completion", "cmpl", choice, choice)


def _logprobs(scored: tuple[ScoredToken, ...]) -> dict[str, Any]:
    """The legacy format; `top_logprobs` holds the token itself too, and null where nothing predicts it."""
    return {
        "tokens": [one.token.text for one in scored],
        "token_logprobs": [one.token.logprob for one in scored],
        "top_logprobs": [
            None if one.token.logprob is None else {t.text: t.logprob for t in (*one.top, one.token)} for one in scored
        ],
        "text_offset": [one.offset for one in scored],
    }
