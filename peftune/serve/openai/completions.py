"""`/v1/completions`: prompts as text or token ids, continued; legacy log-probabilities, echo and all."""

from __future__ import annotations

import time
from typing import Any

from fastapi import Request, Response

from peftune.inference.request import Request as EngineRequest
from peftune.serve.openai import schema
from peftune.serve.openai.body import read_json
from peftune.serve.openai.chunks import ChoiceFormatter, Chunk, Scored
from peftune.serve.openai.errors import ApiError
from peftune.serve.openai.prompts import Prompt, prompts_of, room_for
from peftune.serve.openai.respond import Answer, Choice, Shape
from peftune.serve.service import Chosen, Service, service_of

PATH = "/v1/completions"
_MAX_TOKENS = 16  # OpenAI's default


async def completions(http: Request) -> Response:
    """Continue every prompt `n` times."""
    arrived, service = time.monotonic(), service_of(http)
    value = await read_json(http, service.settings.max_body, service.settings.body_seconds)
    body = schema.read(schema.Completion, value)
    http.state.model = body.model
    most = service.settings.most_choices
    if len(body.prompt) * body.n > most:
        found = f"{len(body.prompt)} prompts with n {body.n}"
        raise ApiError(400, f"{found} are more than the {most} texts that one request may ask for", "prompt")
    prompts = await prompts_of(service.bank, body.prompt)
    room = [room_for(prompt, body.max_tokens, _MAX_TOKENS, service.bank.config.n_positions) for prompt in prompts]
    chosen = await service.choose(body.model, [prompt.read for prompt in prompts])
    http.state.model = chosen.shown
    answer = Answer(
        service=service,
        chosen=chosen,
        choices=[
            _choice(service, body, chosen, prompt, most, number)
            for prompt, most in zip(prompts, room, strict=True)
            for number in range(body.n)
        ],
        prompt_tokens=sum(len(prompt.ids) for prompt in prompts),
        shape=_shape(body),
        endpoint=PATH,
        arrived=arrived,
        stream_usage=body.include_usage,
    )
    return answer.stream() if body.stream else await answer.whole(http)


def _choice(
    service: Service, body: schema.Completion, chosen: Chosen, prompt: Prompt, max_tokens: int, number: int
) -> Choice:
    request = EngineRequest(
        prompt.read,
        chosen.adapter,
        body.settings(max_tokens, number),
        logprobs=body.logprobs,
        echo=body.echo,
        only_score=max_tokens == 0,
    )
    return Choice(request, ChoiceFormatter(service.spelling, prompt.text, prompt.ids, body.echo))


def _shape(body: schema.Completion) -> Shape:
    def choice(index: int, piece: Chunk) -> dict[str, Any]:
        told: dict[str, Any] = {
            "index": index,
            "text": piece.text,
            "logprobs": _logprobs(piece.scored) if body.logprobs is not None else None,
            "finish_reason": piece.finish_reason,
        }
        if body.return_token_ids:
            told["token_ids"] = list(piece.ids)
            if piece.prompt_ids is not None:
                told["prompt_token_ids"] = list(piece.prompt_ids)
        return told

    return Shape("text_completion", "text_completion", "cmpl", choice, choice)


def _logprobs(scored: tuple[Scored, ...]) -> dict[str, Any]:
    """The legacy shape; `top_logprobs` holds the token itself too, and null where nothing predicts it."""
    return {
        "tokens": [one.token.text for one in scored],
        "token_logprobs": [one.token.logprob for one in scored],
        "top_logprobs": [
            None if one.token.logprob is None else {t.text: t.logprob for t in (*one.top, one.token)} for one in scored
        ],
        "text_offset": [one.offset for one in scored],
    }
