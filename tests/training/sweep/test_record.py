"""`sweep.json` that was damaged, or that somebody else wrote: read, or refused in one line."""

from __future__ import annotations

import io
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path

import pytest
from fuzzing import damaged_json, deadline, fuzz, read_or_refuse
from hypothesis import given

from peftune.cli.output.sweep_table import print_sweep
from peftune.errors import UserError
from peftune.training.sweep.picture import draw_sweep
from peftune.training.sweep.record import RECORD, Record, Rung, SweptRun, sole_sweep
from peftune.training.sweep.results import RunResult


def swept(name: str, rate: float, loss: float) -> SweptRun:
    return SweptRun(
        name, 0, {"optim.lr": rate}, {"optim.lr": rate, "lora.rank": 8}, RunResult("delivered", 9, loss, 2.0)
    )


RUNS = [swept("lr1e-4", 1e-4, 3.0), swept("lr2e-4", 2e-4, 2.9), swept("lr4e-4", 4e-4, 3.1)]
VALID = Record({run.combination: run for run in RUNS}, [Rung(0.25, {"lr1e-4": [3.0], "lr2e-4": [2.9]}, ["lr2e-4"])])


def test_what_is_written_is_read_back_and_a_changed_digit_is_found(tmp_path: Path) -> None:
    VALID.write(tmp_path)
    with sole_sweep(tmp_path) as found:
        assert found == VALID
    path = tmp_path / RECORD
    path.write_text(path.read_text().replace('"loss": 2.9', '"loss": 2.8', 1))
    with pytest.raises(UserError, match="was changed or damaged"), sole_sweep(tmp_path):
        pass


@fuzz(30)
@given(content=damaged_json(asdict(VALID)))
def test_any_record_is_read_and_shown_or_refused(content: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    out, said = tmp_path_factory.mktemp("sweep"), io.StringIO()
    (out / RECORD).write_bytes(content)

    def read() -> None:
        with sole_sweep(out) as record, redirect_stdout(said):
            found = record.results()
            print_sweep(found, out)
            if found.best is not None:
                draw_sweep(found, "x")

    with deadline():
        read_or_refuse(read)
    assert "\x1b" not in said.getvalue()
