"""Versions of Python and of the libraries: what the package says that it needs, and what it was tested with."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, metadata, requires, version

from packaging.requirements import Requirement

from peftune.cli.checks.result import CheckResult
from peftune.config.shipped import shipped
from peftune.version import __version__

_DEVELOPERS = ("dev", "bench")  # extras that no user needs


def check_libraries() -> Iterator[CheckResult]:
    """Python and peftune, then what is missing, too old, or another version than the tested one, then the rest."""
    yield CheckResult("peftune", "fine", f"{__version__} on Python {platform.python_version()}, {platform.platform()}")
    try:
        needed = [Requirement(line) for line in requires("peftune") or []]
    except PackageNotFoundError:
        advice = "pip install it (a clone: pip install -e .), as its libraries are not known otherwise"
        yield CheckResult("libraries", "broken", f"peftune is not installed as a package; {advice}")
        return
    tested, same, absent = tested_versions(), 0, []
    for requirement in needed:
        extra = _extra_of(requirement)
        if extra in _DEVELOPERS:
            continue
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            if extra is None:
                yield CheckResult(requirement.name, "broken", f"not installed; pip install '{requirement.name}'")
            else:
                absent.append(f"{requirement.name} (pip install 'peftune[{extra}]')")
            continue
        wanted = tested.get(requirement.name.lower())
        if not requirement.specifier.contains(found, prereleases=True):
            advice = f"pip install '{requirement.name}{requirement.specifier}'"
            reason = f"{found} is here, {requirement.specifier} is needed"
            yield CheckResult(requirement.name, "broken", f"{reason}; {advice}")
        elif wanted is None or found.partition("+")[0] == wanted:
            same += 1
        else:
            yield CheckResult(requirement.name, "fine", f"{found}; tested with {wanted}")
    yield CheckResult("libraries", "fine", f"{same} others as tested")
    if absent:
        yield CheckResult("not installed", "fine", f"{', '.join(absent)}: needed for some verbs and recipes only")


def tested_versions() -> dict[str, str]:
    """The version that was tested of each library, by name in lower case."""
    pinned = {}
    for line in shipped("constraints.txt").read_text(encoding="utf-8").splitlines():
        if line[:1].isalnum():
            requirement = Requirement(line.removesuffix("\\").strip())
            if requirement.marker is None or requirement.marker.evaluate():
                pinned[requirement.name.lower()] = str(requirement.specifier).removeprefix("==")
    return pinned


def _extra_of(requirement: Requirement) -> str | None:
    """The extra that a requirement belongs to, None for what is always needed."""
    marker, extras = requirement.marker, metadata("peftune").get_all("Provides-Extra") or []
    return next((extra for extra in extras if marker is not None and marker.evaluate({"extra": extra})), None)
