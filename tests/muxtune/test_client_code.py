"""The files that tools/client_code.py writes are committed as it writes them."""

from pathlib import Path

import pytest

from tools.client_code import GENERATED


@pytest.mark.parametrize("path", GENERATED, ids=lambda path: path.name)
def test_generated_client_code_is_up_to_date(path: Path) -> None:
    assert path.read_text() == GENERATED[path](), "run `python tools/client_code.py`"
