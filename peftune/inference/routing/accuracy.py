"""How often a prompt finds its own domain, and one of no domain finds the base: held-out documents are routed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from peftune.adapters.base_of import base_of
from peftune.config.data_section import Documents
from peftune.console import Console
from peftune.data.tokens.store import TokenStore
from peftune.errors import CheckFailed, UserError
from peftune.inference.bank import AdapterBank
from peftune.inference.perplexity import how_to_read, read_blocks
from peftune.inference.routing.route import THRESHOLD, Route, route
from peftune.model.base import Base


def measure_routing(
    base: str | Base | None,
    data: Mapping[str, Documents],
    adapters: Mapping[str, Path | str],
    prompt_tokens: int = 32,
    max_prompts: int = 500,
    threshold: float = THRESHOLD,
    precision: str = "auto",
    device: str = "auto",
) -> dict[str, Any]:
    """Where the prompts of each domain are sent: `prompt_tokens` of at most `max_prompts` documents each.

    `base` None is the one that the first adapter names. The domain `base` is text that belongs to no adapter. Returned
    as it is written as JSON: for each domain how many prompts there were, `to` whom they were sent, and how many of
    them were `right`: sent to the adapter of the domain's own name (or `base`). `errors` at this threshold, and where
    there is a domain `base` `calibrated`, the threshold at which the larger error is least, with its errors. Raises
    UserError where a domain has no such adapter, or no prompt; CheckFailed where a loss is not finite.
    """
    if len(adapters) < 2 or not data or not data.keys() <= {*adapters, "base"}:
        found = f"the adapters are {', '.join(adapters) or 'none'}, the domains {', '.join(data) or 'none'}"
        raise UserError(f"routing: {found}; expected two adapters or more, and each domain named after its adapter")
    bank = AdapterBank(base or base_of(Path(next(iter(adapters.values())))), precision, device)
    for name, directory in adapters.items():
        bank.add(name, directory, new_tokens=False)
    how = how_to_read(bank.base, {name: bank.get(name).provenance for name in adapters})
    prompts: dict[str, list[list[int]]] = {}
    for domain, documents in data.items():
        prompts[domain] = prompts_of(read_blocks(bank.base, documents, how=how).store, prompt_tokens, max_prompts)
        if not prompts[domain]:
            raise UserError(f"routing: no document of {domain} has a token to judge it by")
    routes = _routes(bank, prompts)
    domains: dict[str, dict[str, Any]] = {}
    for domain, of_domain in routes.items():
        to, count = Counter(_sent(one, threshold) for one in of_domain), len(of_domain)
        domains[domain] = {"prompts": count, "right": to[domain], "accuracy": to[domain] / count, "to": dict(to)}
    right, total = (sum(facts[key] for facts in domains.values()) for key in ("right", "prompts"))
    results = {"routing": domains, "accuracy": right / total, "prompt_tokens": prompt_tokens, "threshold": threshold}
    results["errors"] = _errors(routes, threshold)
    if "base" in routes and len(routes) > 1:
        tried = [step / 20 for step in range(-100, 101)]
        best = min(tried, key=lambda t: (*sorted(_errors(routes, t).values(), reverse=True), abs(t)))
        results["calibrated"] = {"threshold": best, **_errors(routes, best)}
    return results


def _routes(bank: AdapterBank, prompts: Mapping[str, Sequence[list[int]]]) -> dict[str, list[Route]]:
    """The likeliest adapter for each prompt, by domain; CheckFailed where a loss is not finite."""
    routes: dict[str, list[Route]] = {domain: [] for domain in prompts}
    with Console().progress as progress:
        task = progress.add_task("routing", total=sum(map(len, prompts.values())), note="")
        for domain, ids in ((domain, ids) for domain, group in prompts.items() for ids in group):
            found = route(bank, ids, threshold=None)
            if left_out := set(bank.names) - found.scores.keys():
                raise CheckFailed(
                    f"routing: a loss under the base or under {min(left_out)} is not a finite number; its weights hold "
                    "values that are not finite, or are broken"
                )
            routes[domain].append(found)
            progress.advance(task)
    return routes


def _sent(found: Route, threshold: float) -> str:
    """Whom a route names at this threshold."""
    return found.name if found.name and found.margin is not None and found.margin > threshold else "base"


def _errors(routes: Mapping[str, Sequence[Route]], threshold: float) -> dict[str, float]:
    """Shares of prompts: `false_accept`, of no domain, sent to an adapter; `false_reject`, of one, sent to the base."""
    none = [_sent(one, threshold) for one in routes.get("base", ())]
    own = [_sent(one, threshold) for domain, found in routes.items() if domain != "base" for one in found]
    errors = {"false_accept": sum(to != "base" for to in none) / len(none)} if none else {}
    return errors | ({"false_reject": own.count("base") / len(own)} if own else {})


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
