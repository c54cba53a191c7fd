"""The package's version, where everything below the public names can read it, and those of what it stands on."""

import platform
from importlib.metadata import version

__version__ = "0.1.0"


def versions_of(*packages: str) -> dict[str, str]:
    """Installed versions by name, that of Python first."""
    return {"python": platform.python_version()} | {name: version(name) for name in packages}
