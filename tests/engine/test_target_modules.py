"""Target modules match as in PEFT."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import InvalidInputError
from engine.target_modules import first_match, matches, matching_modules, suffixes

NAMES = [f"model.layers.{i}.{n}" for i in (0, 1, 10) for n in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj")]
LISTS = [
    ["q_proj"],
    ["self_attn.q_proj"],
    ["layers.1.self_attn.v_proj", "up_proj"],
    ["model.layers.0.mlp.up_proj"],
    ["1.mlp.up_proj"],
]


@pytest.mark.parametrize("targets", LISTS)
def test_lists_match_as_in_peft(targets: list[str]) -> None:
    tuners = pytest.importorskip("peft.tuners.tuners_utils")
    config = pytest.importorskip("peft").LoraConfig(target_modules=targets)
    expected = [name for name in NAMES if tuners.check_target_module_exists(config, name)]
    assert expected
    assert matching_modules(targets, NAMES) == expected


def test_all_linear_matches_all() -> None:
    assert matching_modules(["all-linear"], NAMES) == NAMES


@pytest.mark.parametrize("targets", [[], ["z_proj"], ["q_proj", "proj"], ["all-linear", "q_proj"], [""], ["q_pro"]])
def test_a_target_without_a_match_is_refused_with_the_names_that_exist(targets: list[str]) -> None:
    with pytest.raises(InvalidInputError, match="q_proj, v_proj, up_proj") as caught:
        matching_modules(targets, NAMES)
    assert caught.value.violations[0].field == "spec.lora.target_modules"


def test_suffixes_in_order() -> None:
    assert suffixes(NAMES) == ["q_proj", "v_proj", "up_proj"]


parts = st.lists(st.sampled_from(["a", "b", "a.b", "", "q_proj", "0"]), min_size=1, max_size=4).map(".".join)


@given(st.lists(parts, min_size=1, max_size=6), st.lists(parts, max_size=8))
def test_many_targets_are_found_in_many_names_as_if_each_was_compared(targets: list[str], names: list[str]) -> None:
    matched = [name for name in names if any(matches(target, name) for target in targets)]
    unmatched = [target for target in targets if not any(matches(target, name) for name in names)]
    if unmatched:
        with pytest.raises(InvalidInputError, match=f'^.*"{re.escape(unmatched[0])}" matches no adaptable module'):
            matching_modules(targets, names)
    else:
        assert matching_modules(targets, names) == matched
    for name in names:
        first = next((target for target in targets if matches(target, name)), None)
        assert first_match(dict.fromkeys(targets), name) == first
