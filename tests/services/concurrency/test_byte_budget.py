"""Bytes are shared so that no tenant's uploads leave nothing for others."""

from contextlib import ExitStack

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import OverloadedError, QuotaExceededError
from services.concurrency.byte_budget import ByteBudget

TOTAL = 1000


def fill(budget: ByteBudget, tenant: str, stack: ExitStack, size: int = 10) -> int:
    """Take as many pieces as the tenant can get; return their bytes."""
    taken = 0
    while True:
        try:
            stack.enter_context(budget.take(tenant, "datasets", size))
        except (OverloadedError, QuotaExceededError):
            return taken
        taken += size


def test_tenants_that_take_all_they_can_leave_as_much_as_each_of_them_has() -> None:
    with ExitStack() as stack:
        budget = ByteBudget("uploads", TOTAL, TOTAL)
        assert fill(budget, "one", stack) == 500
        assert fill(budget, "two", stack) == 250
        assert fill(budget, "good", stack) == 130
    with ExitStack() as stack:
        assert fill(budget, "good", stack) == 500, "all was given back"


def test_a_tenants_own_limit_counts_all_kinds_and_names_it() -> None:
    budget = ByteBudget("unfinished uploads", TOTAL, 100)
    with budget.take("a", "datasets", 60), budget.take("a", "adapters", 40):
        assert (budget.taken("a", "datasets"), budget.taken("a", "adapters")) == (60, 40)
        with pytest.raises(QuotaExceededError, match="a has 100 bytes of unfinished uploads and adds 1; at most 100"):
            budget.take("a", "datasets", 1).__enter__()
        with budget.take("b", "datasets", 100):
            pass
    with pytest.raises(QuotaExceededError):
        budget.take("a", "datasets", 101).__enter__()
    with budget.take("a", "datasets", 100):
        assert budget.taken("a", "adapters") == 0


@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(0, 400)), max_size=60))
def test_the_total_is_never_exceeded_and_a_newcomer_never_finds_less_than_any_has(wants: list[tuple[str, int]]) -> None:
    budget = ByteBudget("uploads", TOTAL, TOTAL)
    with ExitStack() as stack:
        for tenant, size in wants:
            try:
                stack.enter_context(budget.take(tenant, "x", size))
            except (OverloadedError, QuotaExceededError):
                continue
            left = TOTAL - sum(budget.taken(each, "x") for each in "abcdef")
            assert left >= 0 and budget.taken(tenant, "x") - size <= left
    assert not budget._bytes
