"""`/v1/models`; and adapters loaded and unloaded while serving, from the operator's directories only."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from peftune.errors import UserError
from peftune.serve.openai.body import read_body
from peftune.serve.openai.errors import ApiError
from peftune.serve.openai.schema import LoadLoRAAdapterRequest, UnloadLoRAAdapterRequest
from peftune.serve.private_copy import is_inside, private_copy
from peftune.serve.service import Service, service_of


async def list_models(http: Request) -> Response:
    """The base and every adapter."""
    service = service_of(http)
    return JSONResponse({"object": "list", "data": [_card(service, name) for name in (None, *service.bank.names)]})


async def show_model(http: Request) -> Response:
    """One of them; its name may hold slashes, as a base's does."""
    service = service_of(http)
    return JSONResponse(_card(service, service.adapter_named(http.path_params["model"])))


async def load_adapter(http: Request) -> Response:
    """`{"lora_name": …, "lora_path": …}`: from now on the name is a model.

    With `load_inplace` the name goes on meaning the adapter that it has until the new one is read.
    """
    service, roots = service_of(http), _roots(http)
    body = await read_body(http, LoadLoRAAdapterRequest)
    if body.lora_name == service.bank.base.name:
        raise ApiError(400, f"lora_name: {body.lora_name} is the base's name; choose another name", "lora_name")
    directory = await asyncio.to_thread(allowed_directory, body.lora_path, roots)
    async with service.loading:  # one at a time: reading is slow, and more threads would not read faster
        known = body.lora_name in service.bank.names
        if known and not body.load_inplace:
            message = f"lora_name: {body.lora_name} is loaded; unload it, or replace it with load_inplace: true"
            raise ApiError(400, message, "lora_name")
        if not known and len(service.bank.names) >= service.settings.max_adapters:
            raise ApiError(400, f"{service.settings.max_adapters} adapters are loaded already; unload one first")
        try:
            await asyncio.to_thread(_add, service, body, directory, roots)
        except UserError as error:
            told = {str(directory): body.lora_path, str(service.bank.base.directory): service.bank.base.name}
            raise ApiError(400, without_paths(str(error), told), "lora_path") from None
    done = "replaced" if known else "added"
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' {done} successfully.")


def without_paths(message: str, told: Mapping[str, str]) -> str:
    """The message as a client may read it: paths of this machine become what they are `told` as, or their last part."""
    for path in sorted(told, key=len, reverse=True):
        message = message.replace(path, told[path])
    keep = "|".join(map(re.escape, sorted(told.values(), key=len, reverse=True)))
    return re.sub(
        rf"({keep})|(?<![\w.:/-])(?:/[^\s/:;,'\"()]+)+", lambda m: m[1] or f"…/{m[0].rpartition('/')[2]}", message
    )


def _add(service: Service, body: LoadLoRAAdapterRequest, directory: Path, roots: Sequence[Path]) -> None:
    with private_copy(directory, roots) as copy:
        try:
            service.bank.add(body.lora_name, copy, body.load_inplace, new_tokens=False)
        except UserError as error:
            raise UserError(str(error).replace(str(copy), str(directory))) from None


async def unload_adapter(http: Request) -> Response:
    """`{"lora_name": …}`: requests in flight finish with it, new ones are refused."""
    service, _ = service_of(http), _roots(http)
    body = await read_body(http, UnloadLoRAAdapterRequest)
    async with service.loading:
        if body.lora_name not in service.bank.names:
            raise ApiError(404, f"the adapter {body.lora_name!a} is not loaded", "lora_name", "model_not_found")
        await asyncio.to_thread(service.bank.remove, body.lora_name)
        service.metrics.remove_model(body.lora_name)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


def allowed_directory(path: str, roots: Sequence[Path]) -> Path:
    """The directory that `path` (absolute, or relative to a root) means, symbolic links resolved, its files checked.

    Raises ApiError 403 for whatever lies outside the roots, the same whether it exists or not; 404 inside.
    """
    outside = ApiError(403, "lora_path lies outside the directories that this server may load from", "lora_path")
    inside = [found for root in roots if is_inside(found := Path(os.path.realpath(root / path)), roots)]
    if not inside:
        raise outside
    directory = next(filter(os.path.isdir, inside), None)
    if directory is None:
        raise ApiError(404, f"lora_path {path!a}: no adapter is there", "lora_path")
    try:
        files = [Path(os.path.realpath(entry)) for entry in directory.iterdir()]
    except OSError as error:
        raise ApiError(400, f"lora_path {path!a}: {error.strerror}", "lora_path") from None
    if not all(is_inside(file, roots) for file in files):  # a link to a file elsewhere
        raise outside
    return directory


def _roots(http: Request) -> list[Path]:
    """Where adapters may come from; ApiError 403 where nowhere, or where a page of another origin asks."""
    roots = [Path(os.path.realpath(root)) for root in service_of(http).settings.roots]
    if not roots:
        raise ApiError(403, "this server loads no adapters: it was started without a directory to load them from")
    origin = http.headers.get("origin")
    if origin is not None and origin.partition("://")[2] != http.headers.get("host", ""):
        raise ApiError(403, "a page of another origin may not load or unload adapters")
    return roots


def _card(service: Service, name: str | None) -> dict[str, Any]:
    """A model in the format of OpenAI's list, with the fields that other servers of adapters add."""
    bank = service.bank
    card = {"id": name or bank.base.name, "object": "model", "created": service.created, "owned_by": "peftune"}
    if name is None:
        card |= {"root": bank.base.name, "parent": None, "max_model_len": bank.config.n_positions}
        return card | {"chat": bank.base.chat is not None}
    adapter = bank.get(name)
    more = {"max_model_len": bank.config.n_positions, "chat": adapter.chat is not None, "rank": adapter.rank}
    return card | {"root": adapter.directory.name, "parent": bank.base.name} | more
