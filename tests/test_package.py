"""What a wheel and a source distribution carry: licences beside what they are about, and all data files."""

from __future__ import annotations

import email
import hashlib
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LICENCES = ["LICENSE", "NOTICE", "peftune/model/small/LICENSE"]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A wheel and a source distribution of this tree."""
    sdist = pytest.importorskip("hatchling.builders.sdist", reason="hatchling is not installed")
    wheel = pytest.importorskip("hatchling.builders.wheel", reason="hatchling is not installed")
    out = str(tmp_path_factory.mktemp("dist"))
    (first,) = wheel.WheelBuilder(str(ROOT)).build(directory=out, versions=["standard"])
    (second,) = sdist.SdistBuilder(str(ROOT)).build(directory=out, versions=["standard"])
    return Path(first), Path(second)


def test_a_wheel_carries_the_licence_of_everything_in_it(built: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(built[0]) as wheel:
        names = wheel.namelist()
        about = next(name for name in names if name.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(wheel.read(about))
        assert metadata["License-Expression"] == "Apache-2.0 AND PSF-2.0"
        assert metadata.get_all("License-File") == LICENCES
        folder = about.removesuffix("METADATA") + "licenses/"
        for licence in LICENCES:
            assert wheel.read(folder + licence) == (ROOT / licence).read_bytes()
    shipped = {str(path.relative_to(ROOT)) for path in (ROOT / "peftune").rglob("*") if path.is_file()}
    missing = {name for name in shipped if "__pycache__" not in name} - set(names)
    assert missing == set()


def test_a_source_distribution_carries_them_too(built: tuple[Path, Path]) -> None:
    with tarfile.open(built[1]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert set(LICENCES) <= names


def test_the_licence_of_the_base_is_python_s_and_its_card_names_it() -> None:
    text = (ROOT / "peftune/model/small/LICENSE").read_text(encoding="utf-8")
    assert "PYTHON SOFTWARE FOUNDATION LICENSE VERSION 2" in text and "Copyright (c) 2001" in text
    card = (ROOT / "peftune/model/small/README.md").read_text(encoding="utf-8")
    assert "license: psf-2.0" in card and "`LICENSE`" in card


def test_every_package_is_pinned_with_hashes_and_one_index_serves_it() -> None:
    pins = (ROOT / "launch/constraints.txt").read_text(encoding="utf-8")
    blocks = re.split(r"\n(?=\S)", "\n".join(line for line in pins.splitlines() if not line.startswith("#")))
    assert len(blocks) > 100
    for block in blocks:
        assert re.match(r"[a-z0-9.-]+==\S+", block), block[:80]
        hashes = re.findall(r"--hash=sha256:[0-9a-f]{64}", block)
        assert hashes and len(set(hashes)) == len(hashes), block[:80]
    assert any(block.startswith("pip==") for block in blocks)
    script = (ROOT / "launch/environment.sh").read_text(encoding="utf-8")
    assert "--require-hashes" in script and "extra-index-url" not in script


def test_a_file_whose_hash_is_not_in_the_pins_is_refused(tmp_path: Path) -> None:
    wheel, pins = tmp_path / "sample-1.0-py3-none-any.whl", tmp_path / "pins"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("sample.py", "")
        archive.writestr("sample-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: sample\nVersion: 1.0\n")
        archive.writestr("sample-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr("sample-1.0.dist-info/RECORD", "")
    pins.write_text(f"sample==1.0 --hash=sha256:{hashlib.sha256(wheel.read_bytes()).hexdigest()}\n")
    call = 'pip_install --no-index --find-links "$3" --target "$4" --requirement "$2"'
    script = f'. "{ROOT}/launch/environment.sh"; venv=$1 pins=$2; {call}'

    def install(out: str) -> subprocess.CompletedProcess[str]:
        command = ["bash", "-c", script, "bash", sys.prefix, str(pins), str(tmp_path), str(tmp_path / out)]
        return subprocess.run(
            command, env=os.environ | {"PIP_CONFIG_FILE": os.devnull}, capture_output=True, text=True, check=False
        )

    done = install("good")
    assert done.returncode == 0 and (tmp_path / "good" / "sample.py").exists(), done.stderr
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.comment = b"changed"
    done = install("bad")
    assert (done.returncode, done.stdout) == (2, "") and "DO NOT MATCH THE HASHES" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("peftune: the installation failed")
    assert not (tmp_path / "bad").exists()
