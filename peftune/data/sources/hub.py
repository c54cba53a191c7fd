"""Data sets of the Hugging Face hub, streamed row by row; nothing is downloaded in advance."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

from peftune.config.data_section import Source
from peftune.data.sources.records import Choose, Rows
from peftune.errors import UserError

_TIMEOUT = 5.0  # seconds until the hub counts as out of reach
_ADVICE = "; where the hub cannot be reached, give files"


def identity(source: Source) -> str:
    """Name, revision, subset and split of a hub data set: the same string means the same rows."""
    return f"{source.path}@{revision_of(source.path)}/{source.subset}/{source.split or 'train'}"


@lru_cache(maxsize=64)
def revision_of(name: str) -> str:
    """Commit of a hub data set, asked for once per process so that key and rows agree."""
    from huggingface_hub import HfApi

    with one_line_errors(f"no file {name} and no hub data set of that name could be loaded", _ADVICE):
        return str(HfApi().dataset_info(name, timeout=_TIMEOUT).sha)


def rows(source: Source, revision: str | None, choose: Choose) -> Rows:
    """Rows of a data set by hub name (or a directory that `datasets` understands), read as they are needed.

    `choose` says which of the columns found to read. Raises UserError where the data set cannot be loaded.
    """
    from datasets import load_dataset

    split = source.split or "train"
    with one_line_errors(f"hub data set {source.path} could not be loaded", _ADVICE):
        table = load_dataset(source.path, source.subset, split=split, revision=revision, streaming=True)
        if table.column_names:  # known for most formats; pictures and sound are then not decoded
            table = table.select_columns(choose(table.column_names))
        for number, row in enumerate(table, start=1):
            yield f"{source.path}/{split}:{number}", dict(row)


@contextmanager
def one_line_errors(what: str, advice: str = "") -> Iterator[None]:
    """Failures of the hub client as UserErrors, without its log of retries; the advice is for a hub out of reach."""
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HfHubHTTPError

    log = logging.getLogger("huggingface_hub.utils._http")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    # the bases are OSError, and the root of the client that it is built on
    except (ValueError, RuntimeError, DatasetsError, *HfHubHTTPError.__bases__) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        unreachable = isinstance(error, HfHubHTTPError.__bases__) and not isinstance(error, HfHubHTTPError)
        cut = f"{reason[:200]}{'…' if len(reason) > 200 else ''}"
        raise UserError(f"{what}: {cut}{advice if unreachable else ''}") from None
    finally:
        log.setLevel(level)
