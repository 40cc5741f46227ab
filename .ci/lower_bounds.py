"""Print a constraints file with the lowest version that pyproject.toml allows of each dependency.

Taken are the required dependencies and those of the adapters' extras. torch keeps the version of
constraints.txt: its older CPU builds are not on the package index.
"""

from __future__ import annotations

import sys
from pathlib import Path

from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    from pip._vendor import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]


def lower_bound(requirement: Requirement) -> str:
    """Return ``name==version`` for a requirement of the form ``name>=version``."""
    bounds = [spec.version for spec in requirement.specifier if spec.operator == ">="]
    if len(bounds) != 1:
        raise SystemExit(f"pyproject.toml: {requirement} must have exactly one lower bound")
    return f"{requirement.name}=={bounds[0]}"


def main() -> None:
    """Write the constraints to standard output."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    adapters = ("langchain", "openai", "outlines", "server")
    declared = [*project["dependencies"], *(line for name in adapters for line in extras[name])]
    requirements = [Requirement(line) for line in declared]
    sys.stdout.writelines(
        f"{lower_bound(requirement)}\n"
        for requirement in requirements
        if requirement.name != "torch"
    )
    pinned = (ROOT / "constraints.txt").read_text().splitlines()
    sys.stdout.writelines(f"{line}\n" for line in pinned if line.startswith("torch=="))


if __name__ == "__main__":
    main()
