from pathlib import Path

import pytest

from engine.alignment.tokenizer import BackboneTokenizer
from tests.tiny_tokenizer import write_tokenizer


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder: Path) -> BackboneTokenizer:
    return BackboneTokenizer.load(tokenizer_folder)
