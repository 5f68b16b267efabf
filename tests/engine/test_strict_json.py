"""Untrusted JSON is the standard format alone, and its nesting has a limit at which nothing that reads it fails."""

import json

import pytest

from engine.strict_json import MAX_NESTING, parse_strict_json


def nested(depth: int, opening: str, closing: str) -> bytes:
    return (opening * depth + '"x"' + closing * depth).encode()


@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a":', "}"), ('[[],{"a":', "}]")])
def test_nesting_is_accepted_up_to_the_limit_and_refused_from_there(opening: str, closing: str) -> None:
    levels = opening.count("[") - opening.count("]") + opening.count("{")
    for depth in range(1, 3000 if levels == 1 else 1500, 7):
        data = nested(depth, opening, closing)
        if depth * levels <= MAX_NESTING:
            assert parse_strict_json(data) == json.loads(data)
        else:
            with pytest.raises(ValueError, match=f"more than {MAX_NESTING} arrays and objects are nested"):
                parse_strict_json(data)
    parse_strict_json(nested(MAX_NESTING // levels, opening, closing))


def test_brackets_in_text_and_wide_values_are_not_nesting() -> None:
    for value in (
        "[{" * 1000,
        [[]] * 1000,
        {"a" * i: {} for i in range(100)},
        [{"messages": [{"content": "[["}] * 99}],
    ):
        assert parse_strict_json(json.dumps(value).encode()) == value
