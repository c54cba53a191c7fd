"""docs/install.md is followed as it stands: a wheel in its own environment, used and removed, without the clone."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def blocks() -> list[str]:
    """The page's shell blocks between its first and its second heading of that level, in order."""
    page = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
    part = page.split("\n## ")[1]
    return re.findall(r"```bash\n(.*?)```", part, re.DOTALL)


def shell(script: str, folder: Path, **environment: str) -> str:
    ours = ("PYTHONPATH", "VIRTUAL_ENV")
    clean = {key: value for key, value in os.environ.items() if key not in ours} | environment
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script], cwd=folder, env=clean, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_page_is_followed_from_the_wheel_to_its_removal(tmp_path: Path) -> None:
    pytest.importorskip("hatchling", reason="hatchling is not installed")
    clone = tmp_path / "clone"
    shutil.copytree(ROOT, clone, ignore=shutil.ignore_patterns(".*", "__pycache__", "tests", "benchmarks", "docs"))
    build, use, remove = blocks()
    # What stands for the package index: this environment's packages, so that nothing is downloaded.
    offline = {
        "PIP_NO_INDEX": "1",
        "PIP_NO_DEPS": "1",
        "PIP_NO_BUILD_ISOLATION": "0",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    }
    shell(f'PATH="{Path(sys.executable).parent}:$PATH"\n{build}', clone, **offline)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (clone / "peftune-env").rename(elsewhere / "peftune-env")
    shutil.rmtree(clone)
    (site,) = (elsewhere / "peftune-env").glob("lib/python*/site-packages")
    (site / "index.pth").write_text(f"{sysconfig.get_paths()['purelib']}\n", encoding="utf-8")
    activate = elsewhere / "peftune-env" / "bin" / "activate"  # it and the scripts hold the old path
    for script in (activate, activate.with_name("peftune")):
        script.write_text(script.read_text().replace(str(clone), str(elsewhere)), encoding="utf-8")
    environment = {"PEFTUNE_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    told = shell(f"{use}\npython -c 'import peftune; print(peftune.__file__)'", elsewhere, **environment)
    assert str(site) in told
    assert (elsewhere / "adapters" / "first" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "cache").is_dir()
    shell(f"source peftune-env/bin/activate\n{remove}", elsewhere, **environment, **offline)
    assert not (site / "peftune").exists()
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
