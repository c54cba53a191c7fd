"""From data to a merged model in three minutes: base, data, adapters, matrix, merge, samples, picture. Offline."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console as RichConsole
from rich.text import Text

from peftune.adapters.merge.merge import merge
from peftune.cli.evaluate import matrix_table
from peftune.config.recipe import Recipe, Source, recipe_from
from peftune.console import Console
from peftune.data.batches import Blocks
from peftune.data.documents import split_by_digest
from peftune.data.tokens.store import TokenStore
from peftune.errors import Interrupted, UserError
from peftune.files import write_json
from peftune.inference.bank import AdapterBank
from peftune.inference.perplexity import as_json, matrix, read_domains
from peftune.inference.settings import GenerationSettings
from peftune.model.base import Base, open_base
from peftune.training.metrics import read_metrics
from peftune.training.run import train

BASE = "builtin:small"
HELDOUT_TOKENS = 8_000  # a domain; enough for two digits, and quick
OWN_HELDOUT = 0.1
PROMPTS = {"docs": 'The "for" statement', "unicode": "LATIN SMALL LETTER"}


@dataclass(frozen=True)
class Lesson:
    """One adapter to train, and a prompt to show what it learnt."""

    name: str
    recipe: Recipe
    prompt: str


def quickstart(out: Path, files: list[Path]) -> None:
    """Train, measure, merge and show one adapter each for `docs`, `unicode` and every file given.

    Raises UserError where `out` holds something else, or a file cannot be read.
    """
    seconds: dict[str, float] = {}
    display, console = Console(), RichConsole(highlight=False)
    _refuse_foreign(out)
    base = open_base(BASE)
    with _stage(
        display, seconds, "data", "three domains that every Python carries" + (" and your own" if files else "")
    ):
        lessons = _lessons(files, out)
        domains = _heldout(base, files)
        for name, blocks in domains.items():
            display.say(f"  {name}: {len(blocks.documents)} held-out documents, {blocks.tokens():,} tokens")
    _empty_directory(out)
    for lesson in lessons:
        with _stage(display, seconds, f"train {lesson.name}", f"an adapter for {lesson.name}"):
            _train(lesson)
    adapters = {lesson.name: Path(lesson.recipe.run.out) for lesson in lessons}
    with _stage(display, seconds, "eval", "base and adapters on documents that none of them saw"):
        rows = matrix(base, adapters, domains)
        console.print(matrix_table(rows))
    merged = out / "merged-docs"
    with _stage(display, seconds, "merge", f"adapter docs into an ordinary checkpoint, {merged}"):
        report = merge(adapters["docs"], merged, BASE)
        console.print(
            f"  {report.modules_applied} of {report.modules_in_adapter} modules applied; logits of merged and "
            f"base + adapter differ by at most {report.max_abs_logit_difference:.1e}, "
            f"the same likeliest token in {report.argmax_agreement:.2%}",
            soft_wrap=True,
        )
    with _stage(display, seconds, "generate", "the same prompt and seed, base and adapter"):
        samples = _samples(base, lessons, adapters)
        for sample in samples:
            _show_sample(console, sample)
    facts = as_json(domains, rows) | {"merge": asdict(report), "seconds": seconds, "samples": samples, "base": BASE}
    _finish(out, adapters, rows, facts, console)


def _train(lesson: Lesson) -> None:
    try:
        train(lesson.recipe)
    except Interrupted as error:
        raise Interrupted(f"stopped while training adapter {lesson.name}; quickstart begins anew next time") from error


def _refuse_foreign(out: Path) -> None:
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / ".quickstart").is_file())):
        raise UserError(f"--out {out}: exists and was not made by quickstart; choose another directory")


def _empty_directory(out: Path) -> None:
    """Start from an empty `out`; only what an earlier quickstart left there is removed."""
    try:
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        (out / ".quickstart").touch()
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written: {error.strerror}") from None


@contextmanager
def _stage(display: Console, seconds: dict[str, float], verb: str, what: str) -> Iterator[None]:
    display.stage(f"{verb}: {what}")
    started = time.monotonic()
    yield
    seconds[verb] = round(time.monotonic() - started, 1)


def _lessons(files: list[Path], out: Path) -> list[Lesson]:
    lessons = [_lesson(name, f"builtin:{name}/train", 0.03, prompt, out) for name, prompt in PROMPTS.items()]
    for path in files:
        if path.stem in (*PROMPTS, "base", "code"):
            raise UserError(f"{path}: the name {path.stem} is taken by a built-in domain; rename the file")
        if path.stem in [lesson.name for lesson in lessons]:
            raise UserError(f"two files are called {path.stem}; an adapter is named after its file, rename one")
        if not path.is_file():
            raise UserError(f"{path}: no such file; expected a text file of your own")
        lessons.append(_lesson(path.stem, str(path), OWN_HELDOUT, "", out))
    return lessons


def _lesson(name: str, source: str, validation: float, prompt: str, out: Path) -> Lesson:
    recipe = {
        "base": BASE,
        "data": {"train": source, "validation": validation, "block_size": 256},  # short blocks: attention costs less
        "lora": {"rank": 16, "alpha": 32},
        "optim": {"lr": 6e-3, "steps": 80, "warmup": 4},
        "batch": {"global_size": 8},
        "run": {"out": str(out / "adapters" / name), "eval_every": 20, "save_every": 0},
    }
    return Lesson(name, recipe_from(recipe, []), prompt)


def _heldout(base: Base, files: list[Path]) -> dict[str, Blocks]:
    """Held-out blocks by domain: of each built-in one a fixed choice of documents, of a user's file its own split."""
    builtin = {name: [Source(path=f"builtin:{name}/heldout")] for name in ("code", "docs", "unicode")}
    domains = {name: _some(blocks) for name, blocks in read_domains(base, builtin).items()}
    own = read_domains(base, {path.stem: [Source(path=str(path))] for path in files})
    for name, blocks in own.items():
        heldout = split_by_digest(blocks.store.digests, OWN_HELDOUT)[1]
        if len(heldout) == 0 or len(heldout) == len(blocks.store):
            raise UserError(f"{name}: one document only, so none can be held out; separate documents with blank lines")
        domains[name] = _some(Blocks.of(blocks.store, heldout, blocks.packing.block_size))
    return domains


def _some(blocks: Blocks) -> Blocks:
    """Whole documents in an order that their content decides, until there are enough tokens."""
    store: TokenStore = blocks.store
    order = blocks.documents[np.argsort(store.digests[blocks.documents], kind="stable")]
    enough = int(np.searchsorted(np.cumsum(store.supervised_counts[order]), HELDOUT_TOKENS)) + 1
    return Blocks.of(store, np.sort(order[:enough]), blocks.packing.block_size)


def _samples(base: Base, lessons: list[Lesson], adapters: dict[str, Path]) -> list[dict[str, str]]:
    """What base and adapter make of each lesson's prompt, with one seed."""
    settings = GenerationSettings(max_new_tokens=90, temperature=0.8, repetition_penalty=1.1, seed=1)
    bank, samples = AdapterBank(base), []
    for lesson in lessons:
        name = f"adapter {lesson.name}"  # a file may be called auto.txt
        bank.add(name, adapters[lesson.name])
        before, after = bank.generate([lesson.prompt] * 2, settings, [None, name])
        samples.append({"adapter": lesson.name, "prompt": lesson.prompt, "base": before.text, "text": after.text})
    return samples


def _show_sample(console: RichConsole, sample: dict[str, str]) -> None:
    for who, text in (("base", sample["base"]), (f"adapter {sample['adapter']}", sample["text"])):
        console.print(Text(f"  ── {who}", style="bold"))
        body = Text(sample["prompt"], style="dim") + Text(text.rstrip())
        console.print(Text("\n").join(Text("     ") + line for line in body.split("\n")))


def _finish(
    out: Path, adapters: dict[str, Path], rows: dict[str, Any], facts: dict[str, Any], console: RichConsole
) -> None:
    runs = {name: read_metrics(directory / "metrics.jsonl") for name, directory in adapters.items()}
    from peftune.training.export.plots import draw_overview

    (out / "quickstart.png").write_bytes(draw_overview(runs, rows))
    facts["files"] = {"picture": str(out / "quickstart.png"), "merged": str(out / "merged-docs")} | {
        f"adapter {name}": str(path) for name, path in adapters.items()
    }
    write_json(out / "quickstart.json", facts)
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
        markup=False,
    )
