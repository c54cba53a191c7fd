"""From data to a merged model in three minutes: base, data, adapters, matrix, merge, samples, picture. Offline."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich.text import Text

from peftune.adapters.merge.merge import merge
from peftune.cli.output.evaluate import print_matrix
from peftune.cli.output.text_output import results
from peftune.config.recipe import Recipe, recipe_from
from peftune.console import Console, SafeConsole
from peftune.data.batches import Blocks
from peftune.data.documents import split_by_digest
from peftune.errors import Interrupted, PeftuneError, UserError, explained
from peftune.files import write_json
from peftune.inference.bank import AdapterBank
from peftune.inference.perplexity import evaluate, read_blocks
from peftune.inference.settings import GenerationSettings
from peftune.model.base import Base, open_base
from peftune.training.export.adapter import Delivery
from peftune.training.fleet.train_fleet import train_fleet
from peftune.training.metrics import read_metrics

BASE = "builtin:small"
HELDOUT_TOKENS = 8_000  # a domain; enough for two digits, and quick
OWN_HELDOUT = 0.1
PROMPTS = {"docs": 'The "for" statement', "unicode": "LATIN SMALL LETTER"}


def quickstart(out: Path, files: list[Path]) -> None:
    """Train, measure, merge and show one adapter each for `docs`, `unicode` and every file given.

    Raises UserError where `out` holds something else, or a file cannot be read.
    """
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / ".quickstart").is_file())):
        raise UserError(f"--out {out}: exists and was not made by quickstart; choose another directory")
    seconds: dict[str, float] = {}
    display, console = Console(), results()
    base, merged = open_base(BASE), out / "merged-docs"

    @contextmanager
    def stage(verb: str, what: str) -> Iterator[None]:
        display.stage(f"{verb}: {what}")
        started = time.monotonic()
        yield
        seconds[verb] = round(time.monotonic() - started, 1)

    with stage("data", "three domains that every Python carries" + (" and your own" if files else "")):
        recipes = _recipes(files, out)
        domains = _heldout(base, files)
        for name, blocks in domains.items():
            display.say(f"  {name}: {len(blocks.documents)} held-out documents, {blocks.tokens():,} tokens")
    _empty_directory(out)
    with stage("train", f"adapters for {', '.join(recipes)}, side by side over one base"):
        try:
            outcomes = train_fleet([*recipes.values()])
        except Interrupted as error:
            raise Interrupted("stopped while training; quickstart begins anew next time") from error
        for outcome in outcomes:
            if isinstance(outcome, PeftuneError):
                raise outcome
            assert isinstance(outcome, Delivery)
            display.say(outcome.summary())
    adapters = {name: Path(recipe.run.out) for name, recipe in recipes.items()}
    with stage("eval", "base and adapters on documents that none of them saw"):
        facts = evaluate(base, domains, adapters)
        print_matrix(facts["rows"])
    with stage("merge", f"adapter docs into an ordinary checkpoint, {merged}"):
        report = merge(adapters["docs"], merged, BASE)
        console.print(
            f"  {report.modules_applied} of {report.modules_in_adapter} modules applied; logits of merged and "
            f"base + adapter differ by at most {report.max_abs_logit_difference:.1e}, "
            f"the same likeliest token in {report.argmax_agreement:.2%}",
            soft_wrap=True,
        )
    with stage("generate", "the same prompt and seed, base and adapter"):
        samples = _show_samples(base, adapters, console)
    facts |= {"merge": asdict(report), "seconds": seconds, "samples": samples, "base": BASE}
    _finish(out, merged, adapters, facts, console)


def _empty_directory(out: Path) -> None:
    """Start from an empty `out`; only what an earlier quickstart left there is removed."""
    with explained(f"--out {out}: cannot be written"):
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        (out / ".quickstart").touch()


def _recipes(files: list[Path], out: Path) -> dict[str, Recipe]:
    """What to train, by the name of the adapter."""
    sources = {name: (f"builtin:{name}/train", 0.03) for name in PROMPTS}
    for path in files:
        if path.stem in (*PROMPTS, "base", "code"):
            raise UserError(f"{path}: the name {path.stem} is taken by a built-in domain; rename the file")
        if path.stem in sources:
            raise UserError(f"two files are called {path.stem}; an adapter is named after its file, rename one")
        if not path.is_file():
            raise UserError(f"{path}: no such file; expected a text file of your own")
        sources[path.stem] = (str(path), OWN_HELDOUT)
    recipes = {}
    for name, (source, heldout) in sources.items():
        recipe = {
            "base": BASE,
            "data": {"train": source, "validation": heldout, "block_size": 256},  # short blocks: attention costs less
            "lora": {"rank": 16, "alpha": 32},
            "optim": {"lr": 6e-3, "steps": 80, "warmup": 4},
            "batch": {"global_size": 8},
            "run": {"out": str(out / "adapters" / name), "eval_every": 20, "save_every": 0},
        }
        recipes[name] = recipe_from(recipe, [])
    return recipes


def _heldout(base: Base, files: list[Path]) -> dict[str, Blocks]:
    """Held-out blocks by domain: of each built-in one a fixed choice of documents, of a user's file its own split."""
    domains = {name: _some(read_blocks(base, f"builtin:{name}/heldout")) for name in ("code", "docs", "unicode")}
    for path in files:
        name, blocks = path.stem, read_blocks(base, path)
        heldout = split_by_digest(blocks.store.digests, OWN_HELDOUT)[1]
        if len(heldout) == 0 or len(heldout) == len(blocks.store):
            raise UserError(f"{name}: one document only, so none can be held out; separate documents with blank lines")
        domains[name] = _some(Blocks.of(blocks.store, heldout, blocks.packing.block_size))
    return domains


def _some(blocks: Blocks) -> Blocks:
    """Whole documents in an order that their content decides, until there are enough tokens."""
    store = blocks.store
    order = blocks.documents[np.argsort(store.digests[blocks.documents], kind="stable")]
    enough = int(np.searchsorted(np.cumsum(store.supervised_counts[order]), HELDOUT_TOKENS)) + 1
    return Blocks.of(store, np.sort(order[:enough]), blocks.packing.block_size)


def _show_samples(base: Base, adapters: dict[str, Path], console: SafeConsole) -> list[dict[str, str]]:
    """What base and adapter make of each adapter's prompt, with one seed."""
    settings = GenerationSettings(max_new_tokens=90, temperature=0.8, repetition_penalty=1.1, seed=1)
    bank, samples = AdapterBank(base), []
    for name, directory in adapters.items():
        prompt, loaded = PROMPTS.get(name, ""), f"adapter {name}"  # a file may be called auto.txt
        bank.add(loaded, directory)
        before, after = bank.generate([prompt] * 2, settings, [None, loaded])
        for who, generation in (("base", before), (loaded, after)):
            console.print(Text(f"  ── {who}", style="bold"))
            body = Text(prompt, style="dim") + Text(generation.text.rstrip())
            console.print(Text("\n").join(Text("     ") + line for line in body.split("\n")))
        samples.append({"adapter": name, "prompt": prompt, "base": before.text, "text": after.text})
    return samples


def _finish(out: Path, merged: Path, adapters: dict[str, Path], facts: dict[str, Any], console: SafeConsole) -> None:
    from peftune.training.export.plots import draw_overview

    runs = {name: read_metrics(directory / "metrics.jsonl") for name, directory in adapters.items()}
    (out / "quickstart.png").write_bytes(draw_overview(runs, facts["rows"]))
    paths = {"picture": out / "quickstart.png", "merged": merged}
    paths |= {f"adapter {name}": directory for name, directory in adapters.items()}
    write_json(out / "quickstart.json", facts | {"files": {name: str(path) for name, path in paths.items()}})
    size = sum(path.stat().st_size for path in adapters["docs"].glob("*.safetensors")) / 1e6
    console.print(
        f"""
Done in {sum(facts["seconds"].values()):.0f} s. Everything lies in {out}/:
  quickstart.png    loss curves and the matrix
  quickstart.json   every figure
  adapters/         {", ".join(adapters)}: {size:.1f} MB each, plain PEFT
  merged-docs/      the docs adapter folded into a full GPT-2 checkpoint

Next:
  peftune generate --base {BASE} --adapter {adapters["unicode"]} --prompt "GREEK CAPITAL"
  peftune serve --base {BASE} {" ".join(f"--adapter {name}={path}" for name, path in adapters.items())}
      then open http://127.0.0.1:8000: the adapters side by side       (docs/serve.md tells more)
  peftune train launch/recipes/poems.yaml data.train=your.txt        (docs/guide.md tells more)""",
        soft_wrap=True,
    )
