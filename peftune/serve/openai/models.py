"""`/v1/models`, and adapters loaded and unloaded while serving, from the operator's directories and no others."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response

from peftune.errors import UserError
from peftune.serve.openai import schema
from peftune.serve.openai.body import read_json
from peftune.serve.openai.errors import ApiError
from peftune.serve.service import AUTO, BASE, Service, is_inside, service_of


async def list_models(http: Request) -> Response:
    """The base and every adapter."""
    service = service_of(http)
    cards = [_card(service, None), *(_card(service, name) for name in service.bank.names)]
    return JSONResponse({"object": "list", "data": cards})


async def show_model(http: Request) -> Response:
    """One of them; its name may hold slashes, as a base's does."""
    service = service_of(http)
    return JSONResponse(_card(service, service.named(http.path_params["model"])))


async def load_adapter(http: Request) -> Response:
    """`{"lora_name": …, "lora_path": …}`: from now on the name is a model."""
    service = service_of(http)
    roots = _roots(http)
    body = schema.read(
        schema.LoadAdapter, await read_json(http, service.settings.max_body, service.settings.body_seconds)
    )
    if body.lora_name in (AUTO, BASE, service.base):
        raise ApiError(400, f"lora_name: {body.lora_name} means something else; choose another name", "lora_name")
    directory = await asyncio.to_thread(allowed_directory, body.lora_path, roots)
    async with service.loading:  # one at a time: reading is slow, and more threads would not read faster
        if len(service.bank.names) >= service.settings.max_adapters:
            raise ApiError(400, f"{service.settings.max_adapters} adapters are loaded already; unload one first")
        try:
            await asyncio.to_thread(service.bank.add, body.lora_name, directory)
        except UserError as error:
            told = (
                str(error)
                .replace(str(directory), body.lora_path)
                .replace(str(service.bank.base.directory), service.base)
            )
            raise ApiError(400, told, "lora_path") from None
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")


async def unload_adapter(http: Request) -> Response:
    """`{"lora_name": …}`: texts that are being written with it end, new ones are refused."""
    service = service_of(http)
    _roots(http)
    body = schema.read(
        schema.UnloadAdapter, await read_json(http, service.settings.max_body, service.settings.body_seconds)
    )
    async with service.loading:
        if body.lora_name not in service.bank.names:
            raise ApiError(404, f"the adapter {body.lora_name!a} is not loaded", "lora_name", "model_not_found")
        await asyncio.to_thread(service.bank.remove, body.lora_name)
        service.metrics.forget(body.lora_name)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


def allowed_directory(path: str, roots: Sequence[Path]) -> Path:
    """The directory that `path` (absolute, or below a root) means, links followed, with all that it holds.

    Raises ApiError 403 for whatever lies outside the roots, the same whether it is there or not; 404 inside.
    """
    if "\0" in path:
        raise ApiError(400, "lora_path holds a NUL character", "lora_path")
    outside = ApiError(403, "lora_path lies outside the directories that this server may load from", "lora_path")
    meant = [found for root in roots if is_inside(found := Path(os.path.realpath(root / path)), roots)]
    if not meant:
        raise outside
    directory = next(filter(os.path.isdir, meant), None)
    if directory is None:
        raise ApiError(404, f"lora_path {path!a}: no adapter is there", "lora_path")
    try:
        held = [Path(os.path.realpath(entry)) for entry in directory.iterdir()]
    except OSError as error:
        raise ApiError(400, f"lora_path {path!a}: {error.strerror}", "lora_path") from None
    if not all(is_inside(one, roots) for one in held):  # a link to a file elsewhere
        raise outside
    return directory


def _roots(http: Request) -> list[Path]:
    """Where adapters may come from; ApiError 403 where nowhere, or where a page of another origin asks."""
    roots = [Path(os.path.realpath(root)) for root in service_of(http).settings.roots]
    if not roots:
        raise ApiError(403, "this server loads no adapters: it was started without --adapter-root")
    origin = http.headers.get("origin")
    if origin is not None and origin.partition("://")[2] != http.headers.get("host", ""):
        raise ApiError(403, "a page of another origin may not load or unload adapters")
    return roots


def _card(service: Service, name: str | None) -> dict[str, Any]:
    """A model in the shape of OpenAI's list, with what other servers of adapters add."""
    bank = service.bank
    card: dict[str, Any] = {
        "id": name or service.base,
        "object": "model",
        "created": service.created,
        "owned_by": "peftune",
    }
    if name is None:
        return card | {"root": service.base, "parent": None, "max_model_len": bank.config.n_positions, "chat": False}
    loaded = bank.get(name)
    more = {"max_model_len": bank.config.n_positions, "chat": loaded.is_chat, "rank": loaded.rank}
    return card | {"root": loaded.directory.name, "parent": service.base} | more
