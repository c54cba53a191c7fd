"""Where the configurations and recipes lie that come with peftune."""

from __future__ import annotations

from pathlib import Path

FOLDERS = ("accelerate_configs", "ds_configs", "recipes")


def shipped(name: str) -> Path:
    """The path of `name`, which begins with one of FOLDERS, or of constraints.txt: of a package or a clone."""
    package = Path(__file__).parents[1]
    candidates = (package / "configs" / name, package.parent / name, package.parent / "launch" / name)
    return next((path for path in candidates if path.exists()), candidates[0])
