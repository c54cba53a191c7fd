"""What each verb says besides errors: `-q` and `-v`, which all of them take, on stderr; `--json -` on stdout."""

from __future__ import annotations

import functools
import inspect
import logging
import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from peftune import console
from peftune.cli.options import only_json
from peftune.errors import UserError

_LIBRARIES = ("TRANSFORMERS_VERBOSITY", "DATASETS_VERBOSITY", "HF_HUB_VERBOSITY")  # read when they are imported
_Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Results and errors only.")]
_Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Also what libraries log, and the time taken.")]


def with_verbosity(verb: Callable[..., Any]) -> Callable[..., Any]:
    """The same verb, or the root that calls verbs, with `--quiet` and `--verbose`; `--json -` leaves JSON alone."""
    signature = inspect.signature(verb, eval_str=True)
    kind = inspect.Parameter.KEYWORD_ONLY
    options = [
        inspect.Parameter(name, kind, default=False, annotation=annotation)
        for name, annotation in (("quiet", _Quiet), ("verbose", _Verbose))
    ]

    @functools.wraps(verb)
    def with_options(*arguments: Any, quiet: bool, verbose: bool, **given: Any) -> Any:
        if quiet or verbose:
            _set(quiet, verbose)
        with only_json(given.get("json_path")):
            return verb(*arguments, **given)

    with_options.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[*signature.parameters.values(), *options]
    )
    return with_options


def _set(quiet: bool, verbose: bool) -> None:
    if (quiet and verbose) or console.verbosity not in ("normal", "quiet" if quiet else "verbose"):
        raise UserError("--quiet and --verbose exclude each other; give one of them")
    if quiet:
        console.verbosity = "quiet"
        logging.disable(logging.WARNING)
        warnings.simplefilter("ignore")
    elif console.verbosity == "normal":
        console.verbosity = "verbose"
        logging.basicConfig(level=logging.INFO, format="%(relativeCreated)7.0f ms  %(name)s: %(message)s")
        os.environ.update(dict.fromkeys(_LIBRARIES, "info"))


@contextmanager
def one_call() -> Iterator[None]:
    """Around a call of the program: `-q` and `-v` are of this call; with `-v` its end says how long it took."""
    began = time.monotonic()
    try:
        with warnings.catch_warnings():
            yield
    finally:
        ended, console.verbosity = console.verbosity, "normal"
        if ended == "quiet":
            logging.disable(logging.NOTSET)
        elif ended == "verbose":
            console.Console().say(f"took {time.monotonic() - began:.1f} s, {time.process_time():.1f} s of a CPU")


def arguments_of_verbosity() -> list[str]:
    """What a process that this one starts is given, so that it says as much."""
    return [] if console.verbosity == "normal" else [f"--{console.verbosity}"]
