"""Parses deploy/ for the tests: compose.yaml with its variables replaced as by Docker, the Dockerfile by stage."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
SERVICES = ("alignment", "admission", "scheduling", "execution")


def filled_in(text: str, variables: Mapping[str, str]) -> str:
    """Replace `${NAME}`, `${NAME:-default}` and `${NAME:?message}` as the Compose specification defines."""

    def value(match: re.Match[str]) -> str:
        name, operator, rest = match["name"], match["operator"], match["rest"]
        if variables.get(name):
            return variables[name]
        assert operator != ":?", f"{name} must be set: {rest}"
        return rest or ""

    return re.sub(r"\$\{(?P<name>\w+)(?:(?P<operator>:-|:\?)(?P<rest>[^}]*))?\}", value, text)


def compose(variables: Mapping[str, str], name: str = "compose.yaml") -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(filled_in((DEPLOY / name).read_text(), variables))
    return loaded


@dataclass
class Stage:
    """One stage of the Dockerfile: a FROM and its instructions."""

    base: str
    instructions: list[tuple[str, str]] = field(default_factory=list)


def stages() -> dict[str, Stage]:
    stages_by_name: dict[str, Stage] = {}
    current: Stage | None = None
    text = re.sub(r"\\\n\s*", " ", (DEPLOY / "Dockerfile").read_text())
    for line in text.splitlines():
        word, _, rest = line.strip().partition(" ")
        if word == "FROM":
            base, _, name = rest.partition(" AS ")
            current = stages_by_name[name] = Stage(base)
        elif word and not word.startswith("#") and current is not None:
            current.instructions.append((word, rest.strip()))
    return stages_by_name


def image_of(target: str) -> list[tuple[str, str]]:
    """Return all instructions of a target's image, those of its base stages first."""
    stage_by_name, chain = stages(), []
    while target in stage_by_name:
        chain.append(stage_by_name[target])
        target = stage_by_name[target].base
    return [instruction for stage in reversed(chain) for instruction in stage.instructions]


def environment_of_image(target: str) -> dict[str, str]:
    pairs = (pair for word, rest in image_of(target) if word == "ENV" for pair in rest.split())
    return dict(pair.split("=", 1) for pair in pairs)


def last_of(target: str, word: str) -> str:
    return [rest for instruction, rest in image_of(target) if instruction == word][-1]
