"""`/v1/completions`: continues prompts of text or token ids; with the legacy log-probabilities and `echo`."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from peftune.serve.openai.body import read_body
from peftune.serve.openai.chunks import Chunk, ScoredToken
from peftune.serve.openai.errors import ApiError
from peftune.serve.openai.prompts import encode_prompts
from peftune.serve.openai.respond import PendingResponse, ResponseFormat
from peftune.serve.openai.schema import CompletionRequest
from peftune.serve.service import service_of

PATH = "/v1/completions"
_MAX_TOKENS = 16  # OpenAI's default


async def create_completion(http: Request) -> Response:
    """Continue every prompt `n` times."""
    service = service_of(http)
    body = await read_body(http, CompletionRequest)
    limit = service.settings.max_choices
    if len(body.prompt) * body.n > limit:
        found = f"{len(body.prompt)} prompts with n {body.n}"
        raise ApiError(400, f"{found} are more than the {limit} texts that one request may ask for", "prompt")
    prompts = await encode_prompts(service.bank, body.prompt)
    response = PendingResponse(
        http, body, prompts, _format(body), body.max_tokens, _MAX_TOKENS, body.logprobs, body.echo
    )
    return await response.generate()


def _format(body: CompletionRequest) -> ResponseFormat:
    def choice(index: int, chunk: Chunk) -> dict[str, Any]:
        formatted: dict[str, Any] = {
            "index": index,
            "text": chunk.text,
            "logprobs": _logprobs(chunk.scored) if body.logprobs is not None else None,
            "finish_reason": chunk.finish_reason,
        }
        if body.return_token_ids:
            formatted["token_ids"] = list(chunk.ids)
            if chunk.prompt_ids is not None:
                formatted["prompt_token_ids"] = list(chunk.prompt_ids)
        return formatted

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
