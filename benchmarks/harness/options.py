"""The command line of benchmarks, and what it leads to: a base of random weights, documents, jobs for contestants.

Options, their defaults for each command, and their help stand in `benchmarks/options.yaml`, other trainers with their
settings in `benchmarks/peers.yaml`. `--tune NAME:KEY=VALUE` changes any of those, `--peer JSON` adds one; all settings
are printed with the figures. KEY is a field of TrainingArguments (of SFTConfig for TRL), or of `Peer`: `weights`,
`dropout`, `attention`.
"""

from __future__ import annotations

import argparse
import inspect
import json
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import torch
import yaml

from benchmarks.harness import corpus, machine
from benchmarks.harness.report import Result
from benchmarks.harness.shapes import parse_shape, target_modules
from benchmarks.harness.workers import ROOT, Contestant, interleave
from peftune.files import write_json
from peftune.model.base import Base, open_base

DECLARED: dict[str, dict[str, Any]] = yaml.safe_load((ROOT / "benchmarks" / "options.yaml").read_text())


@dataclass(frozen=True)
class Peer:
    """One trainer with its settings; what is not named stays at its own default."""

    name: str
    trainer: Literal["trl", "trainer", "loop"]
    """TRL's SFTTrainer, Transformers' Trainer with PEFT, or a bare loop around a PEFT model (no trainer's overhead)."""
    weights: Literal["float32", "bfloat16"] = "float32"
    """How the frozen base is held; adapter matrices are float32 in the loop, PEFT's own choice in the others."""
    dropout: float | None = None
    """The base's dropouts; None leaves GPT-2's 0.1."""
    attention: str | None = None
    """Transformers' `attn_implementation`; None lets it choose (sdpa)."""
    arguments: dict[str, Any] = field(default_factory=dict)

    def settings(self) -> dict[str, Any]:
        """Settings as they are printed."""
        return {key: value for key, value in asdict(self).items() if value is not None and key != "name"}


PEERS: dict[str, dict[str, Any]] = yaml.safe_load((ROOT / "benchmarks" / "peers.yaml").read_text())["peers"]


def chosen(names: str, tunes: list[str], added: list[str]) -> list[Peer]:
    """Peers by name (with commas), tuned, and those described in JSON; ValueError names what is not known."""
    asked = list(filter(None, names.split(",")))
    if unknown := [name for name in asked if name not in PEERS]:
        raise ValueError(f"--peers {', '.join(unknown)}: known are {', '.join(PEERS)}")
    found = {name: {"name": name, "arguments": {}, **PEERS[name]} for name in asked}
    found |= {peer["name"]: {"arguments": {}, **peer} for peer in map(json.loads, added)}
    own = {each.name for each in fields(Peer)} - {"name", "trainer", "arguments"}
    for tune in tunes:
        name, _, setting = tune.partition(":")
        key, separator, value = setting.partition("=")
        if name not in found or not separator:
            raise ValueError(f"--tune {tune}: expected NAME:KEY=VALUE with NAME one of {', '.join(found)}")
        peer = found[name]
        found[name] = peer | ({key: yaml.safe_load(value)} if key in own else
                              {"arguments": {**peer["arguments"], key: yaml.safe_load(value)}})  # fmt: skip
    return [Peer(**peer) for peer in found.values()]


class _Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """The function's docstring as it stands, and the default of every option."""


def main(module: str, benchmarks: dict[str, Callable[[Setup], Result]], argv: list[str] | None = None) -> None:
    """`python -m benchmarks.MODULE NAME …`: measure, print, write. A function's docstring is its help."""
    given = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(f"python -m benchmarks.{module}")
    commands = parser.add_subparsers(dest="name", required=True, metavar="|".join(benchmarks))
    for name, run in benchmarks.items():
        text, options = inspect.getdoc(run) or "", DECLARED["commands"][f"{module} {name}"]
        quick = {**DECLARED["quick"], **DECLARED["quick"].get(f"{module} {name}", {})}
        command = commands.add_parser(name, description=text, help=text.splitlines()[0], formatter_class=_Help)
        for option, default in options.items():
            if "--quick" in given and options.get(option) != math.inf:
                default = quick.get(option, default)
            actions = {bool: {"action": "store_true"}, list: {"action": "append"}, type(None): {}}
            settings = actions.get(type(default), {"type": type(default)})
            command.add_argument(f"--{option}", default=default, help=DECLARED["help"][option], **settings)
    arguments = parser.parse_args(given)
    try:
        arguments.shape = parse_shape(arguments.shape)
        if "peers" in arguments:
            arguments.peers = chosen(arguments.peers, arguments.tune, arguments.peer)
    except (ValueError, TypeError) as error:
        parser.error(str(error))
    with prepared(arguments) as setup:
        result = benchmarks[arguments.name](setup)
    print(result.description())
    if arguments.json:
        write_json(Path(arguments.json), result.values())


@dataclass
class Setup:
    """What contestants of one command share."""

    arguments: argparse.Namespace
    root: Path
    base: Path
    documents: Path
    lengths: list[int]
    load: float
    """Load average of the machine before anything was measured."""

    def interleave(self, contestants: list[Contestant], at_once: bool = True, **counts: int) -> None:
        """Rounds in turns, as many as the options say; all with the same threads, no hub, a cache of their own."""
        a = self.arguments
        counts = {"rounds": a.rounds, "warmup": a.warmup, **counts}
        environment = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true", "PYTHONWARNINGS": "ignore"}
        environment |= {"PEFTUNE_CACHE": str(self.root / "cache"), "PYTHONUNBUFFERED": "1"}
        if a.threads:
            environment |= {name: str(a.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        if a.device == "cpu":
            environment |= {"CUDA_VISIBLE_DEVICES": ""}
        interleave(contestants, environment=environment, at_once=at_once, **counts)

    def measure(self, target: str, title: str, contestants: list[Contestant], at_once: bool = True) -> Result:
        """Rounds of these in turns, and what they found."""
        self.interleave(contestants, at_once)
        return Result(target, title, self.settings()).add(contestants)

    def recipe(self, name: str, **changed: Any) -> dict[str, Any]:
        """Of ours, on these documents; every step like the first."""
        a = self.arguments
        targets = a.targets if a.targets in ("all", "attention") else a.targets.split(",")
        return {
            "base": str(self.base),
            "data": {"train": str(self.documents), "validation": 0, "block_size": a.block, "join": ""},
            "lora": {"rank": a.rank, "alpha": 2 * a.rank, "targets": targets},
            "optim": {"lr": 1e-4, "schedule": "constant", "warmup": 0, "steps": 1_000_000},
            "batch": {"global_size": a.batch},
            "run": {"out": str(self.root / f"out-{name}"), "seed": a.seed, "eval_every": 0, "save_every": 0},
            **changed,
        }

    def ours(self, name: str = "peftune", *overrides: str, must_run: bool = True, **changed: Any) -> Contestant:
        """peftune; overrides of the command come after those of the target."""
        recipe = self.recipe(name.replace(" ", "-"), **changed)
        job = {"recipe": recipe, "overrides": [*overrides, *self.arguments.ours], "tokens": self.arguments.tokens}
        return Contestant(name, "benchmarks.harness.ours", job, "tok/s", must_run)

    def peer(self, peer: Peer) -> Contestant:
        """A peer on the same base and documents with the same adapter."""
        a = self.arguments
        job = {key: getattr(a, key) for key in ("rank", "tokens", "batch", "device", "seed")}
        job |= {"peer": asdict(peer), "base": str(self.base), "documents": str(self.documents)}
        job |= {"targets": target_modules(a.targets)}
        return Contestant(peer.name, "benchmarks.harness.peer_loop", job, "tok/s")

    def calibration(self) -> Contestant:
        """GEMM peak and bandwidth, measured in the same rounds as what they are compared with."""
        job = {"sizes": machine.products(self.arguments.shape, 2048), "device": self.arguments.device}
        return Contestant("calibration", "benchmarks.harness.machine", job, "GFLOP/s")

    def adapters(self, count: int) -> list[str]:
        """Directories of so many random adapters of this base."""
        directories = [self.root / f"adapter-{number}" for number in range(count)]
        for directory in directories:
            corpus.make_adapter(directory, self.base, self.arguments.rank, target_modules(self.arguments.targets))
        return list(map(str, directories))

    def settings(self, **more: Any) -> dict[str, Any]:
        """What was compared on what, to be printed with the figures."""
        a = self.arguments
        tokenizer = Path(a.tokenizer).name
        if a.tokenizer == "builtin:small":
            tokenizer += f": ids are of its 4,096 tokens, the embedding and the head have {a.shape.vocabulary:,} rows"
        found = {"shape": str(a.shape), "weights": "random", "tokenizer": tokenizer, "rounds": a.rounds}
        found |= {"load average before": round(self.load, 2)}
        found |= {"warm-up rounds": a.warmup, "threads": a.threads or "default", "seed": a.seed}
        if self.lengths:
            found |= {"documents": corpus.statistics_of(self.lengths, self.documents)}
            found |= {"tokens a round": a.tokens, "ours": a.ours or "defaults"}
        if "rank" in a:
            found |= {"adapter": f"rank {a.rank} on {a.targets}"}
        return found | more


@contextmanager
def prepared(arguments: argparse.Namespace) -> Iterator[Setup]:
    """Base and documents of a command, in `--work` or in a temporary directory."""
    a, load = arguments, os.getloadavg()[0]
    if a.device == "auto":
        a.device = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory(prefix="peftune-bench-") as scratch:
        root = Path(a.work or scratch).absolute()
        root.mkdir(parents=True, exist_ok=True)
        os.environ["PEFTUNE_CACHE"] = str(root / "cache")
        base = open_base(a.base).directory if "base" in a else corpus.base_of_shape(root, a.shape, a.tokenizer, a.seed)
        documents, lengths, prompted = root / "documents.jsonl", [], getattr(a, "prompted", 0.0)
        if "documents" in a:
            print("cutting documents", file=sys.stderr)
            documents = root / f"documents-{a.mean:g}-{a.longest}-{prompted:g}.jsonl"
            shape = (a.documents, a.mean, a.longest)
            lengths = corpus.write_documents(documents, Base(base).tokenizer, *shape, a.data, a.seed, prompted)
        yield Setup(a, root, base, documents, lengths, load)


def fresh(directory: Path) -> Path:
    """An empty directory of this name."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    return directory
