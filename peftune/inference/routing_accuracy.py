"""How often a prompt finds its own domain: each domain's held-out documents, cut to prompts, are routed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from peftune.adapters.base_of import base_of
from peftune.config.recipe import Source
from peftune.console import Console
from peftune.data.tokens.store import TokenStore, prepare
from peftune.errors import UserError
from peftune.files import check_writable, write_json
from peftune.inference.bank import AdapterBank
from peftune.inference.routing import route


@dataclass(frozen=True)
class Sent:
    """Where the prompts of one domain went; `right` of them to the adapter of the domain's own name."""

    domain: str
    to: Mapping[str, int]

    @property
    def prompts(self) -> int:
        """How many there were."""
        return sum(self.to.values())

    @property
    def right(self) -> int:
        """How many went where they belong."""
        return self.to.get(self.domain, 0)


def run(
    base: str | None,
    adapters: Mapping[str, Path],
    data: Mapping[str, list[Source]],
    prompt_tokens: int,
    at_most: int,
    threshold: float,
    json_path: Path | None = None,
) -> list[Sent]:
    """`peftune eval --routing`: print and return where the prompts of each domain are sent.

    A domain has the name of its adapter (or `base`). Raises UserError where one has not, or has no prompt.
    """
    strangers = [name for name in data if name not in adapters and name != "base"]
    if len(adapters) < 2 or not data or strangers:
        found = (
            f"no adapter is called {strangers[0]}" if strangers else f"{len(adapters)} adapters, {len(data)} domains"
        )
        raise UserError(f"routing: {found}; expected two adapters or more, and each --data named after its adapter")
    if json_path is not None:
        check_writable(json_path)
    bank = AdapterBank(base or base_of(next(iter(adapters.values()))))
    for name, directory in adapters.items():
        bank.add(name, directory)
    display = Console()
    prompts = {}
    for domain, sources in data.items():
        store = prepare(sources, bank.tokenizer, bank.opened.tokenizer_fingerprint, " ", "auto")
        prompts[domain] = prompts_of(store, prompt_tokens, at_most)
        if not prompts[domain]:
            raise UserError(f"routing: no document of {domain} has a token to judge it by")
    results = []
    with display.progress as progress:
        task = progress.add_task("routing", total=sum(map(len, prompts.values())), note="")
        for domain, group in prompts.items():
            to: Counter[str] = Counter()
            for ids in group:
                to[route(bank, ids, threshold=threshold).name or "base"] += 1
                progress.advance(task)
            results.append(Sent(domain, dict(to)))
    _print(results, [*adapters, "base"])
    if json_path is not None:
        write_json(json_path, as_json(results, prompt_tokens, threshold))
    return results


def prompts_of(store: TokenStore, tokens: int, at_most: int) -> list[list[int]]:
    """Prompts out of documents, context token first: a document's own prompt, else its first `tokens` tokens.

    Where there are more than `at_most` documents, so many of them at even distances.
    """
    chosen = np.unique(np.linspace(0, len(store) - 1, min(at_most, len(store))).astype(np.int64))
    found = []
    for number in chosen.tolist():
        ids, first = store.ids(number), int(np.argmax(store.supervised(number)))
        given = first if first > 1 else min(1 + tokens, len(ids) - 1)  # the last token is the end of the document
        if given > 1:
            found.append(ids[:given].tolist())
    return found


def as_json(results: Sequence[Sent], prompt_tokens: int, threshold: float) -> dict[str, object]:
    """The contract of `peftune eval --routing --json`."""
    right, prompts = sum(sent.right for sent in results), sum(sent.prompts for sent in results)
    domains = {
        sent.domain: {
            "prompts": sent.prompts,
            "right": sent.right,
            "accuracy": sent.right / sent.prompts,
            "to": sent.to,
        }
        for sent in results
    }
    return {
        "routing": domains, "accuracy": right / prompts, "prompt_tokens": prompt_tokens, "threshold": threshold
    }  # fmt: skip


def _print(results: Sequence[Sent], names: Sequence[str]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Where prompts are sent", title_justify="left", title_style="bold", pad_edge=False)
    for column in ("prompts of", *names, "right"):
        table.add_column(column, justify="left" if column == "prompts of" else "right")
    for sent in results:
        cells = [f"[green]{sent.to.get(n, 0)}[/]" if n == sent.domain else str(sent.to.get(n, 0)) for n in names]
        table.add_row(sent.domain, *cells, f"{sent.right / sent.prompts:.1%}")
    Console(highlight=False).print(table)
