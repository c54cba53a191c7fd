"""How often a prompt finds its own domain: each domain's held-out documents, cut to prompts, are routed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from peftune.adapters.base_of import base_of
from peftune.console import Console
from peftune.data.tokens.store import TokenStore
from peftune.errors import UserError
from peftune.inference.bank import AdapterBank
from peftune.inference.perplexity import Documents, read_blocks
from peftune.inference.routing.route import THRESHOLD, route
from peftune.model.base import Base


def measure_routing(
    base: str | Base | None,
    data: Mapping[str, Documents],
    adapters: Mapping[str, Path | str],
    prompt_tokens: int = 32,
    max_prompts: int = 500,
    threshold: float = THRESHOLD,
) -> dict[str, Any]:
    """Where the prompts of each domain are sent: `prompt_tokens` of at most `max_prompts` documents each.

    `base` None is the one that the first adapter names. Returned as it is written as JSON: for each domain how many
    prompts there were, `to` whom they were sent, and how many of them were `right`: sent to the adapter of the domain's
    own name (or `base`). Raises UserError where a domain has no such adapter, or no prompt.
    """
    if len(adapters) < 2 or not data or not data.keys() <= {*adapters, "base"}:
        found = f"the adapters are {', '.join(adapters) or 'none'}, the domains {', '.join(data) or 'none'}"
        raise UserError(f"routing: {found}; expected two adapters or more, and each domain named after its adapter")
    bank = AdapterBank(base or base_of(Path(next(iter(adapters.values())))))
    for name, directory in adapters.items():
        bank.add(name, directory)
    prompts = {}
    for domain, documents in data.items():
        prompts[domain] = prompts_of(read_blocks(bank.base, documents).store, prompt_tokens, max_prompts)
        if not prompts[domain]:
            raise UserError(f"routing: no document of {domain} has a token to judge it by")
    domains: dict[str, dict[str, Any]] = {}
    with Console().progress as progress:
        task = progress.add_task("routing", total=sum(map(len, prompts.values())), note="")
        for domain, group in prompts.items():
            to: Counter[str] = Counter()
            for ids in group:
                to[route(bank, ids, threshold=threshold).name or "base"] += 1
                progress.advance(task)
            share = to[domain] / len(group)
            domains[domain] = {"prompts": len(group), "right": to[domain], "accuracy": share, "to": dict(to)}
    right, total = (sum(facts[key] for facts in domains.values()) for key in ("right", "prompts"))
    return {"routing": domains, "accuracy": right / total, "prompt_tokens": prompt_tokens, "threshold": threshold}


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
