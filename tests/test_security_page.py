"""Every claim of docs/security.md names tests that there are."""

import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
PAGE = (TESTS.parent / "docs" / "security.md").read_text()
NAMED = re.findall(r"`([\w/]+\.py)::([\w*]+)`", PAGE)


def test_the_page_names_tests_in_every_table_row() -> None:
    assert len(NAMED) > 30
    rows = [line for line in PAGE.splitlines() if line.startswith("| ") and "claim |" not in line and "---" not in line]
    assert rows and all(".py::" in row for row in rows)


@pytest.mark.parametrize(("file", "name"), NAMED, ids=lambda text: text)
def test_a_test_it_names_is_there(file: str, name: str) -> None:
    text = (TESTS / file).read_text()
    assert name == "*" or re.search(rf"^(async )?def {name}\(", text, re.MULTILINE)
