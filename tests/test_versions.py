"""The versions that are tested are the lowest that pyproject.toml allows, in constraints-oldest.txt, and newer ones."""

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = ("admission", "alignment", "execution", "cuda", "test")


def pinned(file: str) -> dict[str, Version]:
    lines = [line.strip() for line in (ROOT / file).read_text().splitlines()]
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): Version(version) for name, version in pairs}


def requirements() -> list[Requirement]:
    extras = PROJECT["optional-dependencies"]
    lines = [*PROJECT["dependencies"], *(line for name in EXTRAS for line in extras[name])]
    return [Requirement(line) for line in lines]


@pytest.mark.parametrize("requirement", requirements(), ids=lambda requirement: requirement.name)
def test_the_lowest_version_is_the_oldest_tested_and_the_newest_tested_is_allowed(requirement: Requirement) -> None:
    name = canonicalize_name(requirement.name)
    lowest = [Version(one.version) for one in requirement.specifier if one.operator == ">="]
    assert lowest == [pinned("constraints-oldest.txt")[name]]
    newest = pinned("constraints.txt").get(name)
    assert newest is not None or name == "cupy-cuda13x"  # which needs a GPU to be of use
    assert newest is None or requirement.specifier.contains(newest, prereleases=True)
