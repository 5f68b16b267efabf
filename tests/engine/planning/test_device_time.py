"""Tenants that always have work get device time by weight, whatever their turns cost."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.planning.device_time import MAX_AHEAD_SECONDS, MAX_CREDIT_SECONDS, DeviceTime
from tests.thoroughness import examples

Costs = dict[str, tuple[float, float]]  # the least and most seconds of each tenant's turns


def run(weights: dict[str, float], costs: Costs, num_turns: int, seed: int) -> dict[str, float]:
    """Return the seconds of each tenant after turns that each cost between the tenant's least and most seconds."""
    draw, used, shares = random.Random(seed), dict.fromkeys(weights, 0.0), DeviceTime()
    shares.set_weights(weights)
    for _ in range(num_turns):
        tenant = min(weights, key=lambda name: shares.charged([name]))
        shares.begin_turn([tenant])
        seconds = draw.uniform(*costs[tenant])
        shares.charge(tenant, seconds)
        used[tenant] += seconds
    return used


@given(
    weights=st.lists(st.floats(0.25, 8), min_size=2, max_size=8),
    least=st.lists(st.floats(0.001, 0.4), min_size=8, max_size=8),
    seed=st.integers(0, 999),
)
@settings(max_examples=examples(40), deadline=None)
def test_no_two_tenants_differ_by_more_than_one_turn_each(weights: list[float], least: list[float], seed: int) -> None:
    """The bound of start-time fair queueing: |S_i / w_i - S_j / w_j| <= longest_i / w_i + longest_j / w_j."""
    names = [str(i) for i in range(len(weights))]
    costs = {name: (seconds, 3 * seconds) for name, seconds in zip(names, least, strict=False)}
    by_name = dict(zip(names, weights, strict=True))
    used = run(by_name, costs, 400, seed)
    normal = {name: used[name] / by_name[name] for name in names}
    turn = {name: costs[name][1] / by_name[name] for name in names}
    if max(turn.values()) < MAX_CREDIT_SECONDS / 2:  # else a debt of more than the credit is forgiven
        for one in names:
            for other in names:
                assert abs(normal[one] - normal[other]) <= turn[one] + turn[other] + 1e-9


def test_a_hundred_tenants_of_any_appetite_get_equal_time() -> None:
    draw = random.Random(0)
    costs = {f"tenants/{i}": (seconds, 2 * seconds) for i in range(100) for seconds in [10 ** draw.uniform(-3, -1.3)]}
    used = run(dict.fromkeys(costs, 1.0), costs, 30_000, seed=1)
    mean = sum(used.values()) / len(used)
    assert max(abs(seconds / mean - 1) for seconds in used.values()) < 0.1


def test_a_tenant_that_joins_is_owed_nothing_and_one_that_comes_back_keeps_its_debt() -> None:
    shares = DeviceTime()
    shares.set_weights({"a": 1.0, "b": 1.0})
    for _ in range(10):
        tenant = min("ab", key=lambda name: shares.charged([name]))
        shares.begin_turn([tenant])
        shares.charge(tenant, 0.1)
    shares.set_weights({"a": 1.0, "b": 1.0, "c": 1.0})
    assert shares.charged(["c"]) == pytest.approx(min(shares.charged(["a"]), shares.charged(["b"])), abs=0.1)
    shares.charge("a", 5.0)
    shares.set_weights({"b": 1.0, "c": 1.0})  # `a` leaves with a debt,
    shares.set_weights({"a": 1.0, "b": 1.0, "c": 1.0})  # and comes back at once
    assert shares.charged(["a"]) > shares.charged(["b"]) + 4


def test_a_tenant_whose_data_came_late_is_owed_a_second_at_most() -> None:
    shares = DeviceTime()
    shares.set_weights({"late": 1.0, "other": 1.0})
    for _ in range(100):
        shares.begin_turn(["other"])
        shares.charge("other", 0.1)
    assert shares.charged(["other"]) - shares.charged(["late"]) <= MAX_CREDIT_SECONDS + 0.1 + 1e-9


def test_tenants_that_share_a_turn_are_charged_for_their_own_part() -> None:
    shares = DeviceTime()
    shares.set_weights({"a": 1.0, "b": 3.0, "c": 1.0})
    shares.begin_turn(["a", "b"])
    shares.charge("a", 1.0)
    shares.charge("b", 3.0)
    assert shares.charged(["a", "b"]) == pytest.approx(1.0) and shares.charged(["c"]) == 0.0


def test_a_tenant_that_is_ahead_of_those_it_shares_turns_with_waits() -> None:
    """Tasks that come and go cost their tenant more than the turns that it shares."""
    shares, used = DeviceTime(), {"calm": 0.0, "busy": 0.0}
    shares.set_weights(dict.fromkeys(used, 1.0))
    for _ in range(400):
        running = used.keys() - shares.hold(list(used))
        shares.begin_turn(sorted(running))
        for tenant in running:
            seconds = 0.05 + 0.1 * (tenant == "busy")
            shares.charge(tenant, seconds)
            used[tenant] += seconds
    assert abs(used["busy"] - used["calm"]) < MAX_AHEAD_SECONDS + 0.2 and used["calm"] > 15
