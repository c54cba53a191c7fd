"""`/tokenize` and `/detokenize` as vLLM has them: how the model sees a text."""

from __future__ import annotations

import asyncio

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from peftune.data.sources.chat_template import EOS_TURNS, render_chat
from peftune.inference.detokenize import decode_plain
from peftune.inference.request import chat_ids
from peftune.serve.openai.body import read_body
from peftune.serve.openai.prompts import check_ids, parses_special, text_ids
from peftune.serve.openai.schema import DetokenizeRequest, TokenizeRequest
from peftune.serve.service import service_of


async def tokenize(http: Request) -> Response:
    """The ids of a prompt or a conversation, without the context token, as `usage` counts them."""
    service = service_of(http)
    body = await read_body(http, TokenizeRequest)
    name = service.adapter_named(body.model)
    parse = parses_special(service.bank, [name], [], body.split_special_tokens)
    text, messages = body.prompt, [message.model_dump() for message in body.messages]
    if text is None and service.bank.chat(name) == EOS_TURNS:
        ids = await asyncio.to_thread(chat_ids, service.bank.tokenizer, messages, EOS_TURNS)
    else:
        text = render_chat(messages, body.add_generation_prompt) if text is None else text
        ids = await asyncio.to_thread(text_ids, service.bank, text, parse)
    texts = [service.token_text.text_of(id) for id in ids] if body.return_token_strs else None
    most = service.bank.config.n_positions
    return JSONResponse({"count": len(ids), "max_model_len": most, "tokens": ids, "token_strs": texts})


async def detokenize(http: Request) -> Response:
    """The text of tokens; bytes that are no complete character become U+FFFD."""
    service = service_of(http)
    body = await read_body(http, DetokenizeRequest)
    service.adapter_named(body.model)
    check_ids(body.tokens, len(service.bank.tokenizer), "tokens")
    return JSONResponse({"prompt": await asyncio.to_thread(decode_plain, service.bank.tokenizer, body.tokens)})
