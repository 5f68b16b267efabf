"""What is in progress is shared fairly: whoever holds much leaves room for those who hold less."""

from contextlib import ExitStack

import pytest

from engine.errors import OverloadedError
from services.rpc.fair_limit import FairLimit


def fill(limit: FairLimit, owner: str, stack: ExitStack) -> int:
    """Hold all that the owner may have until the stack closes; return their number."""
    num_held = 0
    while True:
        try:
            stack.enter_context(limit.hold(owner))
        except OverloadedError:
            return num_held
        num_held += 1


@pytest.mark.parametrize(("limit", "expected"), [(1, 1), (3, 1), (9, 1), (256, 29), (1024, 114)])
def test_one_owner_gets_a_ninth_and_at_least_one(limit: int, expected: int) -> None:
    with ExitStack() as stack:
        assert fill(FairLimit("calls", limit), "bad", stack) == expected


@pytest.mark.parametrize(("num_hostile", "least"), [(1, 102), (10, 35), (20, 11), (40, 1)])
def test_owners_that_hold_all_they_can_leave_room_for_one_that_comes_later(num_hostile: int, least: int) -> None:
    limit = FairLimit("calls", 1024)
    with ExitStack() as stack:
        for number in range(num_hostile):
            fill(limit, f"bad{number}", stack)
        assert fill(limit, "good", stack) == least


def test_what_ends_makes_room_again(limit: int = 9) -> None:
    calls = FairLimit("calls", limit)
    for _ in range(3):
        with ExitStack() as stack:
            owners = [f"tenant{number}" for number in range(limit)]
            for owner in owners:
                stack.enter_context(calls.hold(owner))
            with pytest.raises(OverloadedError, match="no room for more calls"), calls.hold("another"):
                pass
    with calls.hold("another"):
        pass


def test_an_owner_that_fails_holds_nothing_more() -> None:
    calls = FairLimit("calls", 1)
    with pytest.raises(ValueError, match="of the call"), calls.hold("bad"):
        raise ValueError("of the call")
    with calls.hold("good"):
        pass


def test_the_error_names_what_the_owner_holds_and_nothing_of_others() -> None:
    calls = FairLimit("uploads", 256)
    with ExitStack() as stack:
        fill(calls, "tenants/good", stack)
        num_held = fill(calls, "tenants/bad", stack)
        expected = f"tenants/bad has {num_held} uploads in progress, as many as it may have now"
        with pytest.raises(OverloadedError, match=expected) as refused, calls.hold("tenants/bad"):
            pass
    assert "good" not in refused.value.message and refused.value.metadata == {"subject": "tenants/bad"}


def test_callers_that_trust_each_other_may_use_it_all() -> None:
    with ExitStack() as stack:
        assert fill(FairLimit("calls", 100, is_shared_fairly=False), "scheduling", stack) == 100
