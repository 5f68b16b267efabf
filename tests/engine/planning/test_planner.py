"""Every plan is within memory, complete, explained, and the same for the same snapshot."""

import collections
import dataclasses

from hypothesis import given, settings
from hypothesis import strategies as st

from engine.methods import Lora
from engine.planning.eta import seconds_left
from engine.planning.memory import total_bytes
from engine.planning.plan import BackboneView, ExecutorView, Limits, Plan, Site, Snapshot, TaskView
from engine.planning.planner import plan
from engine.task import TaskSpec, Training

LIMITS = Limits(token_budget=256, chunk_tokens=16)
SITES = tuple(Site(f"layers.{i}.{n}", 512, 512) for i in range(4) for n in ("q_proj", "v_proj"))
BACKBONES = {name: BackboneView(name, 10**7, 4, 512, 1000, 512, 40 << 20, "float32", SITES) for name in ("a", "b")}


def _task(index: int, rank: int = 8, backbone: str = "a", **fields: object) -> TaskView:
    target = fields.pop("target", "q_proj")
    training = Training(1e-3, num_steps=10, max_sequence_tokens=64, micro_batch_size=2)
    spec = TaskSpec(backbone, Lora(rank, 16.0, (str(target),)), "d", training)
    values = {"age": index, "num_steps": 10, "num_train_tokens": 1000, **fields}
    return TaskView(f"tenants/t/tasks/{index}", "tenants/t", spec, **values)  # type: ignore[arg-type]


def _executor(name: str, memory_mib: int = 4096, backbone: str = "a", **fields: object) -> ExecutorView:
    return ExecutorView(name, BACKBONES[backbone], memory_mib << 20, **fields)  # type: ignore[arg-type]


@st.composite
def snapshots(draw: st.DrawFn) -> Snapshot:
    executors = tuple(
        _executor(
            f"executors/{i}",
            draw(st.sampled_from([64, 280, 300, 320, 400])),
            draw(st.sampled_from(["a", "b"])),
            effective_tokens_per_second=draw(st.sampled_from([0.0, 100.0])),
            is_draining=draw(st.booleans()),
        )
        for i in range(draw(st.integers(0, 3)))
    )
    names = ["", "executors/gone", *(e.name for e in executors)]
    tasks = tuple(
        _task(
            i,
            draw(st.sampled_from([4, 64, 256])),
            draw(st.sampled_from(["a", "b", "c"])),
            target=draw(st.sampled_from(["q_proj", "all-linear", "nothing"])),
            age=draw(st.integers(0, 3)),
            executor=draw(st.sampled_from(names)),
            step=draw(st.integers(0, 10)),
        )
        for i in range(draw(st.integers(0, 8)))
    )
    return Snapshot(tasks, executors)


def _placed(made: Plan) -> dict[str, str]:
    return {task: executor for executor in made.htasks for task in made.tasks_of(executor)}


@given(snapshots())
@settings(max_examples=300, deadline=None)
def test_any_plan_is_within_memory_complete_and_explained(snapshot: Snapshot) -> None:
    made = plan(snapshot, LIMITS)
    by_name = {task.name: task for task in snapshot.tasks}
    counts = collections.Counter(task for executor in made.htasks for task in made.tasks_of(executor))
    assert not counts or max(counts.values()) == 1
    for executor in snapshot.executors:
        residents = [by_name[name] for name in made.tasks_of(executor.name)]
        if residents:
            assert not executor.is_draining
            assert {task.spec.backbone for task in residents} == {executor.backbone.name}
            (htask,) = made.htasks[executor.name]
            assert htask.token_budget % htask.chunk_tokens == 0
            specs = [task.spec for task in residents]
            assert total_bytes(specs, executor.backbone, htask.token_budget) <= executor.memory_bytes
    placed = _placed(made)
    explained = {e.task: e for e in made.explanations}
    assert len(made.explanations) == len(explained) == len(snapshot.tasks)
    for name, explanation in explained.items():
        assert explanation.executor == placed.get(name, "")
        assert explanation.reason
        if explanation.executor:
            together = set(made.tasks_of(explanation.executor))
            assert set(explanation.neighbours) == together - {name}
            assert explanation.predicted_bytes > 0


@given(snapshots(), st.randoms())
@settings(max_examples=100, deadline=None)
def test_same_snapshot_same_plan(snapshot: Snapshot, random: object) -> None:
    assert plan(snapshot, LIMITS) == plan(snapshot, LIMITS)
    executors = list(snapshot.executors)
    random.shuffle(executors)  # type: ignore[attr-defined]
    shuffled = plan(Snapshot(snapshot.tasks, tuple(executors)), LIMITS)
    assert _placed(shuffled) == _placed(plan(snapshot, LIMITS))


@given(snapshots())
@settings(max_examples=100, deadline=None)
def test_a_plan_carried_out_is_planned_again(snapshot: Snapshot) -> None:
    """Sticky: when nothing changes, nobody moves."""
    placed = _placed(plan(snapshot, LIMITS))
    after = tuple(dataclasses.replace(task, executor=placed.get(task.name, "")) for task in snapshot.tasks)
    assert _placed(plan(Snapshot(after, snapshot.executors), LIMITS)) == placed


def test_oldest_first_and_the_rest_waits_with_the_reason() -> None:
    tasks = tuple(_task(i, rank=256, age=9 - i) for i in range(9))
    made = plan(Snapshot(tasks, (_executor("executors/0", 340),)), LIMITS)
    resident = made.tasks_of("executors/0")
    assert 0 < len(resident) < 9
    assert list(resident) == [task.name for task in sorted(tasks, key=lambda t: t.age)][: len(resident)]
    waiting = [e for e in made.explanations if not e.executor]
    assert {e.reason for e in waiting} == {"waits for memory: every executor of its backbone is full"}


def test_newcomers_go_to_the_executor_with_fewest_tasks() -> None:
    residents = [_task(i, executor="executors/0") for i in range(2)]
    snapshot = Snapshot((*residents, _task(5), _task(6)), (_executor("executors/0"), _executor("executors/1")))
    made = plan(snapshot, LIMITS)
    assert made.tasks_of("executors/1") == (_task(5).name, _task(6).name)


def test_a_resident_stays_before_an_older_newcomer() -> None:
    resident = _task(7, rank=256, executor="executors/0")
    memory = total_bytes([resident.spec], BACKBONES["a"], 256)
    snapshot = Snapshot((_task(1, rank=256), resident), (ExecutorView("executors/0", BACKBONES["a"], memory),))
    made = plan(snapshot, LIMITS)
    assert made.tasks_of("executors/0") == (resident.name,)
    assert {e.task: e.reason for e in made.explanations}[resident.name] == "stays where it runs"


def test_reasons_to_wait_are_precise() -> None:
    executors = (_executor("executors/0", 64), _executor("executors/1", 4096, "b"))
    tasks = (_task(0), _task(1, backbone="c"), _task(2, backbone="b", target="nothing"))
    reasons = {e.task: e.reason for e in plan(Snapshot(tasks, executors), LIMITS).explanations}
    assert "GiB, the executors of a have at most 0.1 GiB: reduce" in reasons[tasks[0].name]
    assert reasons[tasks[1].name] == "no executor of backbone c is ready"
    assert '"nothing" matches no adaptable module' in reasons[tasks[2].name]


def test_seconds_left_counts_each_neighbour_for_the_rounds_both_run() -> None:
    short, long = _task(0, step=5), _task(1, num_steps=20, num_train_tokens=4000)
    fused = [short, long]
    assert seconds_left(short, fused, 100.0) == (5 * 100 + 5 * 200) / 100
    assert seconds_left(long, fused, 100.0) == (5 * 100 + 20 * 200) / 100
    assert seconds_left(short, fused, 0.0) is None
