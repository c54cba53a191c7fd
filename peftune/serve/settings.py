"""A server's settings: typed; validation lists every problem at once."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, DirectoryPath, Field, ValidationError, model_validator

from peftune.config.messages import validation_messages
from peftune.errors import UserError
from peftune.inference.bank import RESERVED

_Count = Annotated[int, Field(ge=1)]


def _check_key(key: str) -> str:
    if not key.strip() or not key.isascii() or not key.isprintable():
        raise ValueError("expected printable ASCII characters, which a header can carry, or no key at all")
    return key


def check_adapter_name(name: str) -> str:
    """The name, which is a model's in the API and a label in metrics; ValueError for one that cannot be."""
    if re.fullmatch("[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name) is None:
        raise ValueError("expected up to 64 letters, digits, dots, dashes and underscores, the first no sign")
    if name in RESERVED:
        raise ValueError(f"{' and '.join(RESERVED)} mean something else; choose another name")
    return name


class ServeSettings(BaseModel):
    """Where and how to serve. Raises UserError that names every problem.

    `host`, `port`        where to listen; port 0 takes a free one
    `api_key`             what a client must send as `Authorization: Bearer KEY`; None asks for none
    `no_auth`             others than this machine may use a server that has no key
    `roots`               directories from which clients may load adapters; none: they may not
    `allowed_hosts`       names under which the server may be addressed without a key, besides IP addresses
    `data_parallel_size`  engines, each with the base and the adapters in a process of its own: one a GPU
    `slots`, `queue`      sequences in the running batch of each; sequences that may wait for all of them
    `max_body`            bytes of a request's body
    `max_adapters`        adapters in memory at a time
    `drain`               seconds that requests in flight get to finish once the server stops
    `routing_threshold`   what an adapter's margin over the base must exceed before `auto` takes it, in nats per token
    `body_seconds`        in which a body must arrive
    """

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    host: Annotated[str, Field(min_length=1)] = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    api_key: Annotated[str, AfterValidator(_check_key)] | None = Field(default=None, repr=False)
    no_auth: bool = False
    roots: tuple[DirectoryPath, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    data_parallel_size: Annotated[int, Field(ge=1, le=1024)] = 1
    slots: _Count = 8
    queue: _Count = 256
    max_body: Annotated[int, Field(ge=1024)] = 1 << 20
    max_adapters: _Count = 256
    drain: Annotated[float, Field(ge=0)] = 30.0
    routing_threshold: float = 0.0
    body_seconds: float = 30.0

    @model_validator(mode="after")
    def _check_key_or_none(self) -> ServeSettings:
        if self.no_auth and self.api_key is not None:
            raise ValueError("a key is set, and no_auth says that none is needed; leave one of them out")
        return self

    @model_validator(mode="wrap")
    @classmethod
    def _raise_user_error(cls, values: Any, handler: Callable[[Any], ServeSettings]) -> ServeSettings:
        try:
            return handler(values)
        except ValidationError as error:
            raise UserError("serve: " + "; ".join(validation_messages(error, {"": list(cls.model_fields)}))) from None
