"""Of two schedulers one leads, and the other commits no plan, on both databases."""

from typing import Any

import grpc
import pytest

from muxtune.v1 import ledger_pb2
from tests.services.admission.admission_mesh import DATABASES, Admission, refused

pytestmark = pytest.mark.parametrize("database_url", DATABASES, indirect=True)
STALE = (grpc.StatusCode.ABORTED, "SUPERSEDED")


async def lead(admission: Admission, scheduler: str, seconds: int = 6, start: int = 1) -> tuple[str, int]:
    """Try to lead; return the leader (scheduler and number of its start) and the term."""
    request = ledger_pb2.LeadSchedulingRequest(scheduler=scheduler, incarnation=f"{scheduler}{start}")
    request.duration.FromSeconds(seconds)
    answer: Any = await admission.ledger().LeadScheduling(request)
    assert answer.incarnation.startswith(answer.leader)
    return answer.incarnation, answer.leader_term


async def test_the_first_scheduler_leads_and_another_takes_over_when_the_lease_expires(admission: Admission) -> None:
    assert await lead(admission, "a") == ("a1", 1)
    admission.clock.seconds += 5
    assert await lead(admission, "b") == ("a1", 1)
    assert await lead(admission, "a") == ("a1", 1)  # renewed
    admission.clock.seconds += 5
    assert await lead(admission, "b") == ("a1", 1)
    admission.clock.seconds += 1
    assert await lead(admission, "b") == ("b1", 2)
    assert await lead(admission, "a") == ("b1", 2)


async def test_a_leader_that_resigns_is_replaced_at_once_and_no_other_can_resign_for_it(admission: Admission) -> None:
    assert await lead(admission, "b", 0) == ("", 0)
    assert await lead(admission, "a") == ("a1", 1)
    assert await lead(admission, "b", 0) == ("a1", 1)
    assert await lead(admission, "a", 0) == ("", 1)
    assert await lead(admission, "b") == ("b1", 2)


async def test_a_restarted_leader_leads_under_a_new_term(admission: Admission) -> None:
    assert await lead(admission, "a") == ("a1", 1)
    assert await lead(admission, "a", start=2) == ("a2", 2)


async def test_the_leader_outlives_a_restart_of_admission_and_gets_its_time_again(admission: Admission) -> None:
    assert await lead(admission, "a") == ("a1", 1)
    admission.clock.seconds += 5
    await admission.restart()
    admission.clock.seconds += 5
    assert await lead(admission, "b") == ("a1", 1)
    admission.clock.seconds += 1
    assert await lead(admission, "b") == ("b1", 2)


async def test_a_superseded_leader_commits_no_plan(admission: Admission) -> None:
    task = (await admission.create((await admission.upload()).name)).name
    start = ledger_pb2.AttemptStart(task=task, expected_attempt=0)
    await lead(admission, "a")
    await lead(admission, "a", 0)
    await lead(admission, "b")
    before = admission.num_rows()
    for term in (0, 1, 3):
        with refused(*STALE):
            await admission.ledger().CommitPlan(plan(start, term))
    assert admission.num_rows() == before and await admission.state(task) == "QUEUED"
    await admission.ledger().CommitPlan(plan(start, 2))
    assert await admission.state(task) == "RUNNING"


def plan(start: ledger_pb2.AttemptStart, leader_term: int) -> ledger_pb2.CommitPlanRequest:
    return ledger_pb2.CommitPlanRequest(
        executor="executors/one", lease_term=1, version=1, starts=[start], leader_term=leader_term
    )


async def test_a_scheduler_must_name_itself_to_lead(admission: Admission) -> None:
    for request in (ledger_pb2.LeadSchedulingRequest(scheduler="a"), ledger_pb2.LeadSchedulingRequest(incarnation="i")):
        with refused(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_INPUT") as refusal:
            await admission.ledger().LeadScheduling(request)
        assert refusal.fields == ["incarnation" if request.scheduler else "scheduler"]
