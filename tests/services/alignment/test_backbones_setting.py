"""MUXTUNE_BACKBONES: names and folders as a list, or as JSON where a path has a comma before NAME=."""

from pathlib import Path

import pytest

from services.alignment.__main__ import AlignmentSettings
from services.settings import SettingsError


def folders(text: str) -> dict[str, Path]:
    return AlignmentSettings(artifact_url="a", backbones=text).backbone_folders()


def test_both_forms_name_folders() -> None:
    assert folders("a=/x,b=/y,z") == {"a": Path("/x"), "b": Path("/y,z")}
    assert folders('{"a": "/x,b=/y"}') == {"a": Path("/x,b=/y")}


@pytest.mark.parametrize("text", ['{"a": ', '{"a": 5}', '{"a": {"b": "c"}}'])
def test_other_json_is_refused_with_the_name_of_the_variable(text: str) -> None:
    with pytest.raises(SettingsError, match="MUXTUNE_BACKBONES"):
        folders(text)
