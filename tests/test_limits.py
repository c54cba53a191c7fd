"""docs/limits.md: what stands in the code, and what was measured, stands there with the same number."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from family import FAMILY

from peftune import console, files
from peftune.adapters import module_names
from peftune.adapters.inspect import scan
from peftune.adapters.merge import report
from peftune.cli.launcher import configuration
from peftune.config import yaml_loader
from peftune.data import documents
from peftune.data.sources import records
from peftune.inference.evaluation import bootstrap
from peftune.inference.evaluation.memorisation import Window
from peftune.inference.routing import route
from peftune.model import tokenizer_rules
from peftune.serve import key
from peftune.serve.http import connection
from peftune.serve.openai import completions, schema
from peftune.serve.settings import ServeSettings
from peftune.training import checkpoint
from peftune.training.distributed import watchdog
from peftune.training.planning import plan, trace
from peftune.training.sweep import grid, sweep

ROOT = Path(__file__).parents[1]
PAGE = " ".join((ROOT / "docs" / "limits.md").read_text(encoding="utf-8").split())
SERVER = ServeSettings()
MIB = 1 << 20

CLAIMS = (
    f"a recipe | {yaml_loader._BYTES // MIB} MiB, {yaml_loader._VALUES:,} values after aliases, "
    f"{yaml_loader._DEPTH} levels |",
    f"(not data) | {files._JSON_BYTES // MIB} MiB, {files._JSON_DEPTH} levels |",
    f"unpacked | {records._MOST_UNPACKED} times the size of the file, and {records._SLACK // 16 // MIB} MiB |",
    f"the text of a parquet file | {records._MOST_TEXT:,} times the size of the file, and {records._SLACK >> 30} GiB |",
    f"patterns of an adapter | {module_names._LONGEST:,} characters, {module_names._SECONDS:g} s to match |",
    f"a pattern of a tokenizer | {tokenizer_rules._LONGEST:,} characters |",
    f"`adapters list` visits {scan.DEPTH} levels and {scan.DIRECTORIES:,} directories",
    f"a key file | {key._LONGEST:,} bytes |",
    f"ranks of a launch | {configuration._MOST_RANKS:,} |",
    f"runs of a sweep | {grid.MOST:,}, of which {sweep._FLEET} learn side by side |",
    f"hashes of {documents._SAMPLE:,} of its training documents, memorisation draws {Window().most:,} windows, "
    f"intervals are of {bootstrap.SAMPLES:,} draws, a route judges the last {route.JUDGED_TOKENS} tokens",
    f"connections | {connection.MAX_CONNECTIONS} |",
    f"headers | {connection.MAX_HEAD_BYTES >> 10} KiB, within {connection.HEAD_SECONDS:g} s |",
    f"body | {SERVER.max_body // MIB} MiB (`--max-body`), within {SERVER.body_seconds:g} s |",
    f"stops reading | {connection.STALL_SECONDS:g} s |",
    f"sequences | {SERVER.slots} (`--slots`), {SERVER.queue} (`--queue`) |",
    f"prompts times choices | {schema.MAX_CHOICES}; {completions._MAX_TEXTS} |",
    f"of a request | {schema._MAX_PROMPTS:,}; {schema._MAX_MESSAGES:,}; {schema._MAX_STOPS}; {schema._MAX_BIASES:,} |",
    f"log-probabilities a token | {schema.MAX_LOGPROBS} |",
    f"adapters in memory | {SERVER.max_adapters} (`--max-adapters`) |",
    f"The newest {checkpoint._KEPT} checkpoints are kept",
    f"On a GPU {1 - trace.GPU_SHARE:.0%} and {plan._CONTEXT / 1e9:g} GB".replace("%", " %"),
    f"base and adapter | {report._EXACT:.0e}, more".replace("e-04", "e-4"),
    f"a line every {console._LINE_EVERY:g} seconds",
    f"missed after {watchdog._LOST_AFTER:g} s",
)


@pytest.mark.parametrize("claim", CLAIMS)
def test_a_limit_of_the_code_stands_in_the_page(claim: str) -> None:
    assert claim in PAGE


@pytest.mark.parametrize("member", [m for m in FAMILY if m.refused], ids=lambda member: member.name)
def test_every_kind_that_is_refused_is_named(member: Any) -> None:
    assert re.search(rf"\b{re.escape(member.name)}\b", PAGE.partition("## What was never run")[0])


def test_a_name_of_64_characters_is_the_longest() -> None:
    from peftune.serve.settings import check_adapter_name

    assert "a name | 64 characters |" in PAGE and check_adapter_name("a" * 64)
    with pytest.raises(ValueError, match="up to 64"):
        check_adapter_name("a" * 65)


MEASURED: dict[tuple[str, str], Callable[[float], str]] = {
    ("merge and verify", "PEFT 0.21.2, unverified"): lambda x: f"GPT-2 medium | {x:.3g} times as fast |",
    ("merge, time", "cp of the base"): lambda x: f"without verification | {x:.3g} times as long |",
    ("swap from disk, checked", "the clock"): lambda x: f"checked | {x:.3g} ms |",
    ("swap from disk", "PEFT 0.21.2 hotswap_adapter"): lambda x: f"as long with PEFT ({x:.3g}) |",
    ("speed on a base in int8", "our bf16"): lambda x: f"int8 base | {x:.3g} times as fast |",
    ("peftune --help", "the clock"): lambda x: f"`peftune --help` | {x:.2g} s |",
    ("train small, ragged documents", "peftune run.fast=false"): lambda x: f"own steps are {x:.3g} times as fast",
}


def measured() -> list[dict[str, Any]]:
    found = json.loads((ROOT / "docs" / "performance.json").read_text(encoding="utf-8"))
    return [row for part in found for row in part["rows"]]


@pytest.mark.parametrize("what", MEASURED, ids=lambda what: what[0])
def test_a_measured_figure_is_the_one_of_the_results(what: tuple[str, str]) -> None:
    (row,) = [row for row in measured() if (row["what"], row["against"]) == what]
    assert MEASURED[what](row["measured"]["median"]) in PAGE


def test_missed_targets_are_counted() -> None:
    assert f"{sum(row['status'] == 'missed' for row in measured())} targets of ours were missed" in PAGE


def test_its_tests_are_there() -> None:
    named = re.findall(r"`(tests/[\w/.]+)`", PAGE)
    assert [name for name in named if not (ROOT / name).exists()] == [] and len(named) >= 4
