"""Device time that executors report is charged once, whatever is repeated, lost or run again. Hypothesis draws the life
of a task, and a model adds up what its attempts reported."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from unittest import mock

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from muxtune.v1 import admission_pb2 as pb
from muxtune.v1 import ledger_pb2, operator_pb2, plan_pb2, task_pb2
from services.admission.ledger.ledger import Ledger
from services.admission.policy import quotas
from services.admission.store import tasks
from services.admission.store.database import Database
from services.admission.store.tables import usage
from services.resource_names import tenant_of
from tests.services.admission.admission_mesh import (
    BOTH_DATABASES,
    Admission,
    checkpoint,
    executor,
    finished,
    spec,
    step,
)
from tests.services.admission.work_reports import Work, evaluation, in_progress, step_with_work
from tests.thoroughness import examples

ACTIONS = [
    "report",
    "report",
    "complete",
    "complete",
    "deliver",
    "deliver",
    "repeat",
    "repeat",
    "checkpoint",
    "lose",
    "day",
]
ATTEMPT_ENDS = ("release", "revoke", "crash")
both = pytest.mark.parametrize("database_url", BOTH_DATABASES, indirect=True)


@dataclass
class Life:
    """The attempts of one task on one executor, whose results arrive late, in order, and again and again.

    `reported`: the totals that arrived, by attempt and by step or evaluation, but for what an earlier attempt had
    recorded. `recorded`: the totals of steps and evaluations that are complete.
    """

    ledger: Ledger
    task: str
    executor: str
    lease_term: int = 0
    num_starts: int = 0
    attempt: int = 0
    step: int = 0  # done in this attempt
    is_evaluated: bool = False
    totals: Work = (0, 0, 0.0)
    outbox: list[plan_pb2.TaskResult] = field(default_factory=list)
    delivered: list[plan_pb2.TaskResult] = field(default_factory=list)
    checkpoint_step: int = 0
    reported: dict[tuple[int, str, int], Work] = field(default_factory=dict)
    recorded: dict[tuple[str, int], Work] = field(default_factory=dict)

    def start(self) -> None:
        """Start an attempt at the last checkpoint."""
        if not self.lease_term:
            self.register()
        version = self.ledger.snapshot_pages()[0].plan_version + 1
        start = ledger_pb2.AttemptStart(task=self.task, expected_attempt=self.attempt)
        request = ledger_pb2.CommitPlanRequest(
            executor=self.executor, lease_term=self.lease_term, version=version, starts=[start]
        )
        (self.attempt,) = self.ledger.commit_plan(request)
        self.step, self.is_evaluated, self.totals, self.outbox = self.checkpoint_step, False, (0, 0, 0.0), []

    def register(self) -> None:
        self.num_starts += 1
        self.lease_term, _ = self.ledger.put_lease(executor(self.executor, f"i{self.num_starts}"), 3600)

    @property
    def evaluates(self) -> bool:
        return self.step % 2 == 0 and not self.is_evaluated

    def act(self, action: str, value: int) -> None:
        if action in ("report", "complete"):
            added = (value % 7, value % 3, 0.25 * (value % 11))
            self.totals = tuple(a + b for a, b in zip(self.totals, added, strict=True))  # type: ignore[assignment]
        if action == "report":
            report = in_progress(self.task, self.attempt, self.step, self.totals, is_evaluation=self.evaluates)
            self.outbox.append(report)
        elif action == "complete":
            kind, number = (evaluation, self.step) if self.evaluates else (step_with_work, self.step + 1)
            self.outbox.append(kind(self.task, self.attempt, number, self.totals))
            self.is_evaluated, self.step, self.totals = kind is evaluation, number, (0, 0, 0.0)
        elif action == "checkpoint" and self.step > 0:
            self.outbox.append(checkpoint(self.task, self.attempt, self.step))
        elif action == "deliver":
            self.deliver(1 + value % 4)
        elif action == "repeat" and self.delivered:
            newest_first = self.delivered[::-1]
            assert self.commit(newest_first[min(value % 16, len(newest_first) - 1)]) in ("DUPLICATE", "STALE")
        elif action == "lose":
            self.end_attempt(ATTEMPT_ENDS[value % 3])
            self.start()

    def deliver(self, count: int) -> None:
        for _ in range(min(count, len(self.outbox))):
            result = self.outbox.pop(0)
            self.delivered.append(result)
            self.note(result)
            assert self.commit(result) in ("COMMITTED", "DUPLICATE")

    def note(self, result: plan_pb2.TaskResult) -> None:
        """Add the result to the model."""
        kind, number = result.WhichOneof("result"), 0
        if kind == "checkpoint_committed":
            self.checkpoint_step = max(self.checkpoint_step, result.checkpoint_committed.step)
            return
        report = getattr(result, kind or "")
        is_evaluation = kind == "evaluated" or (kind == "in_progress" and report.is_evaluation)
        number = report.step - (kind == "step_done")
        key = ("evaluation" if is_evaluation else "step", number)
        if key in self.recorded:
            return
        work = (report.effective_tokens, report.padding_tokens, report.device_seconds)
        self.reported[(self.attempt, *key)] = work  # totals: the newest has all of those before
        if kind != "in_progress":
            self.recorded[key] = work

    def end_attempt(self, how: str) -> None:
        if how == "release":
            self.deliver(len(self.outbox))
            released = plan_pb2.TaskResult(task=self.task, attempt=self.attempt, released=plan_pb2.TaskReleased())
            assert self.commit(released) == "COMMITTED"
        elif how == "revoke":
            assert self.ledger.revoke_attempts(self.executor, [self.task], "test") == [self.task]
            self.attempt += 1
        else:
            self.register()
            self.attempt += 1

    def commit(self, result: plan_pb2.TaskResult) -> str:
        ((verdict,), _) = self.ledger.commit_results(self.executor, self.lease_term, [result])
        return ledger_pb2.ResultVerdict.Name(verdict).removeprefix("RESULT_VERDICT_")

    def check(self, database: Database) -> None:
        """Compare the day's usage and the task's progress with the model."""
        with database.read() as connection:
            columns = [usage.c.effective_tokens, usage.c.padding_tokens, usage.c.device_seconds, usage.c.num_steps]
            query = sa.select(*map(sa.func.sum, columns)).where(usage.c.tenant == tenant_of(self.task))
            charged = [number or 0 for number in connection.execute(query).one()]
            progress = tasks.get_task(connection, self.task).progress
            events = tasks.list_events(connection, self.task, 0, 10_000)
        num_steps = sum(kind == "step" for kind, _ in self.recorded)
        sums = [sum(parts) for parts in zip(*self.reported.values(), strict=True)] or [0, 0, 0.0]
        assert charged == [*sums, num_steps]
        assert progress.device_seconds == sums[2]
        for kind, tokens in (("step", progress.effective_tokens), ("evaluation", progress.evaluated_tokens)):
            assert tokens == sum(work[0] for (what, _), work in self.recorded.items() if what == kind)
        done = progress.effective_tokens + progress.evaluated_tokens
        assert done + progress.tokens_in_progress + progress.lost_tokens == sums[0]
        kinds = [event.WhichOneof("event") for event in events]
        assert kinds.count("step_done") + kinds.count("evaluated") == len(self.recorded)


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Database]:
    database = Database(f"sqlite:///{tmp_path_factory.mktemp('charges') / 'a.db'}")
    database.migrate()
    yield database
    database.close()


_numbers = itertools.count()


@settings(max_examples=examples(125), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.sampled_from(ACTIONS), st.integers(0, 200)), min_size=40, max_size=60))
def test_usage_is_what_all_attempts_reported(database: Database, actions: list[tuple[str, int]]) -> None:
    number, day = next(_numbers), quotas.today()
    ledger = Ledger(database, lambda: 0.0, max_crashes=1000)
    task = f"tenants/t{number}/tasks/a"
    with database.write() as connection:
        tasks.insert(connection, task, spec("tenants/acme/datasets/d"), task_pb2.TaskEstimate(num_steps=4), "", "")
    life = Life(ledger, task, f"executors/e{number}")
    life.start()
    for action, value in actions:
        day += action == "day"
        with mock.patch.object(quotas, "today", lambda today=day: today):
            life.act(action, value)
            life.check(database)
    life.end_attempt("release")
    life.check(database)


async def progress_of(admission: Admission, task: str) -> task_pb2.TaskProgress:
    progress: task_pb2.TaskProgress = (await admission.tenant().GetTask(pb.GetTaskRequest(name=task))).task.progress
    return progress


async def usage_of(admission: Admission, tenant: str = "tenants/acme") -> tuple[int, int, float, int]:
    request = operator_pb2.ListUsageRequest(tenant=tenant)
    (day,) = (await admission.operator().ListUsage(request)).days
    return day.effective_tokens, day.padding_tokens, day.device_seconds, day.num_steps


@both
async def test_a_long_evaluation_is_charged_while_it_runs(admission: Admission) -> None:
    task = (await admission.create((await admission.upload()).name)).name
    await admission.run(task)
    reports = [
        in_progress(task, 1, 0, (100, 4, 2.0), is_evaluation=True),
        in_progress(task, 1, 0, (250, 9, 5.0), is_evaluation=True),
    ]
    assert await admission.commit(*reports) == ["COMMITTED", "COMMITTED"]
    assert await admission.commit(*reports) == ["DUPLICATE", "DUPLICATE"]
    progress = await progress_of(admission, task)
    assert (progress.tokens_in_progress, progress.seconds_in_progress, progress.device_seconds) == (250, 5.0, 5.0)
    assert await usage_of(admission) == (250, 9, 5.0, 0)
    whole = evaluation(task, 1, 0, (300, 12, 6.0))
    # Reports of the evaluation that come again after its end are not taken for those of the step that follows.
    assert await admission.commit(whole, *reports, whole) == ["COMMITTED", "DUPLICATE", "DUPLICATE", "DUPLICATE"]
    progress = await progress_of(admission, task)
    assert (progress.evaluated_tokens, progress.effective_tokens, progress.tokens_in_progress) == (300, 0, 0)
    assert (progress.device_seconds, progress.seconds_in_progress) == (6.0, 0.0)
    assert await usage_of(admission) == (300, 12, 6.0, 0)
    await admission.commit(step(task, 1, 1), finished(task, 1, "k"))
    assert await usage_of(admission) == (310, 14, 6.5, 1)
    kinds = [event.WhichOneof("event") for event in await admission.events(task)]
    assert kinds.count("evaluated") == kinds.count("step_done") == 1 and len(kinds) == 5


async def test_what_a_lost_attempt_did_stays_charged_and_the_next_starts_at_zero(admission: Admission) -> None:
    task = (await admission.create((await admission.upload()).name)).name
    await admission.run(task)
    await admission.commit(evaluation(task, 1, 0, (50, 0, 1.0)), in_progress(task, 1, 0, (8, 1, 4.0)))
    assert await admission.register(incarnation="i2") == 2  # its executor died
    progress = await progress_of(admission, task)
    assert (progress.lost_tokens, progress.tokens_in_progress, progress.seconds_in_progress) == (8, 0, 0.0)
    await admission.run(task, lease_term=2)
    # The evaluation is recorded and runs again: it is not charged again. The step is not, and begins again.
    again = [
        in_progress(task, 3, 0, (50, 0, 1.0), is_evaluation=True), evaluation(task, 3, 0, (50, 0, 1.0)),
        in_progress(task, 3, 0, (2, 0, 0.25)), step(task, 3, 1),
    ]  # fmt: skip
    assert await admission.commit(*again, lease_term=2) == ["DUPLICATE", "DUPLICATE", "COMMITTED", "COMMITTED"]
    assert await admission.commit(in_progress(task, 1, 0, (9, 1, 9.0)), lease_term=2) == ["STALE"]
    assert await admission.commit(in_progress(task, 3, 0, (9, 1, 9.0)), lease_term=2) == ["DUPLICATE"]  # of a step done
    assert await usage_of(admission) == (50 + 8 + 10, 1 + 2, 1.0 + 4.0 + 0.5, 1)
    progress = await progress_of(admission, task)
    assert (progress.device_seconds, progress.effective_tokens, progress.lost_tokens) == (5.5, 10, 8)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -5.0])
async def test_impossible_values_charge_nothing(admission: Admission, value: float) -> None:
    task = (await admission.create((await admission.upload()).name)).name
    other = (await admission.create((await admission.upload()).name)).name
    await admission.run(task, other)
    nonsense = (-7, -(2**63), value)
    sent = [
        in_progress(task, 1, 0, nonsense), evaluation(task, 1, 0, nonsense), step_with_work(task, 1, 1, nonsense),
        step(other, 1, 1),
    ]  # fmt: skip
    assert await admission.commit(*sent) == ["DUPLICATE", "COMMITTED", "COMMITTED", "COMMITTED"]
    assert await usage_of(admission) == (10, 2, 0.5, 2)
    progress = await progress_of(admission, task)
    assert (progress.device_seconds, progress.effective_tokens, progress.evaluated_tokens) == (0.0, 0, 0)


@both
async def test_huge_values_do_not_break_the_sums(admission: Admission) -> None:
    task = (await admission.create((await admission.upload()).name)).name
    await admission.run(task)
    for number in range(3):
        huge = (2**63 - 1, 2**63 - 1, 1e308)
        results = in_progress(task, 1, number, huge), step_with_work(task, 1, number + 1, huge)
        assert await admission.commit(*results) == ["COMMITTED", "COMMITTED"]
    charged = await usage_of(admission)
    assert math.isfinite(charged[2]) and 0 < charged[0] < 2**62 and charged[3] == 3
