"""Every claim of docs/security.md names tests that there are."""

import re
from itertools import pairwise
from pathlib import Path

TESTS = Path(__file__).parent
PAGE = (TESTS.parent / "docs" / "security.md").read_text()
NAMED = re.findall(r"`([\w/]+\.py)::([\w*]+)`", PAGE)


def test_the_page_names_tests_in_every_table_row() -> None:
    assert len(NAMED) > 30
    lines = [*PAGE.splitlines(), ""]
    rows = [line for line, below in pairwise(lines) if line.startswith("| ") and "| ---" not in line + below]
    assert rows and all(".py::" in row for row in rows)


def is_there(file: str, name: str) -> bool:
    path = TESTS / file
    return path.is_file() and (name == "*" or bool(re.search(rf"^(async )?def {name}\(", path.read_text(), re.M)))


def test_the_tests_it_names_are_there() -> None:
    assert [f"{file}::{name}" for file, name in NAMED if not is_there(file, name)] == []
    assert not is_there("test_security_page.py", "test_of_nothing") and not is_there("no_file.py", "*")
