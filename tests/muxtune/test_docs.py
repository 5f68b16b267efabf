"""The YAML examples in docs/ADAPTERS.md parse into the methods that they name."""

import re
from pathlib import Path

import pytest

from engine.methods import METHODS
from muxtune.cli.spec import read_spec
from services.conversion.method import method_to_domain

PAGE = Path(__file__).parents[2] / "docs" / "ADAPTERS.md"
LINES = [line for block in re.findall(r"```yaml\n(.*?)```", PAGE.read_text(), re.S) for line in block.splitlines()]


def test_every_method_is_shown() -> None:
    assert {line.partition(":")[0] for line in LINES} == set(METHODS)


@pytest.mark.parametrize("line", LINES)
def test_an_example_line_selects_its_method(line: str, tmp_path: Path) -> None:
    (tmp_path / "task.yaml").write_text(f"backbone: smollm2\n{line}\n")
    wrong: list = []
    method = method_to_domain(read_spec(tmp_path / "task.yaml", {}), "spec", wrong)
    assert method is not None and not wrong and not list(method.validate())
    assert method.name == line.partition(":")[0]
