"""Lists are cut by bytes, and the pages of an answer belong together."""

import pytest

from engine.errors import SupersededError
from muxtune.v1 import plan_pb2, task_pb2
from services.conversion.plan_parts import PlanParts, split_plan
from services.message_parts import MAX_PART_BYTES, HeldPages, cut, joined


def planned(number: int, num_bytes: int = 100) -> plan_pb2.PlannedTask:
    spec = task_pb2.TaskSpec(dataset="x" * num_bytes)
    return plan_pb2.PlannedTask(task=f"tenants/a/tasks/{number}", attempt=number, spec=spec)


def test_a_list_is_cut_by_bytes_and_nothing_is_lost() -> None:
    items = [planned(i, 10 * i) for i in range(100)]
    parts = list(cut(items, 1000))
    assert [item for part in parts for item in part] == items
    assert all(sum(item.ByteSize() for item in part) <= 1000 or len(part) == 1 for part in parts)
    assert max(map(len, parts)) > 1 and list(cut([], 1000)) == []
    assert [len(part) for part in cut([planned(1, 5000), planned(2, 1)], 1000)] == [1, 1]  # larger than a part: alone


def test_small_neighbours_become_one_part() -> None:
    parts = [plan_pb2.ExecutorPlan(tasks=[planned(i, 400)]) for i in range(10)]
    whole = joined(parts, 1000)
    assert [task.attempt for part in whole for task in part.tasks] == list(range(10))
    assert len(whole) == 5 and all(part.ByteSize() <= 1000 for part in whole) and joined([]) == []


@pytest.mark.parametrize("num_tasks", [0, 1, 400])
def test_a_plan_is_put_together_as_it_was(num_tasks: int) -> None:
    plan = plan_pb2.ExecutorPlan(
        version=3, executor="executors/x", tasks=[planned(i, 16_000) for i in range(num_tasks)]
    )
    plan.htasks.add(tasks=[task.task for task in plan.tasks], token_budget=5)
    plan.trace_parent = "t"
    *parts, last = split_plan(plan)
    assert len(parts) == (2 if num_tasks == 400 else 0)
    assert max(part.ByteSize() for part in [*parts, last]) < MAX_PART_BYTES + 100_000
    collected = PlanParts()
    collected.add(plan_pb2.ExecutorPlan(version=2, tasks=[planned(7)]))  # of a plan whose end never came
    for part in parts:
        collected.add(part)
    assert collected.finish(last) == plan
    assert collected.finish(plan_pb2.ExecutorPlan(version=4)) == plan_pb2.ExecutorPlan(version=4)


def test_pages_of_one_answer_belong_together_and_have_an_end() -> None:
    now = [0.0]
    held = HeldPages[str](lambda: now[0])
    assert held.hold(["only"]) == ("only", "")
    first, token = held.hold(["a1", "a2", "a3"])
    other, other_token = held.hold(["b1", "b2"])
    assert (first, other) == ("a1", "b1")
    assert held.page(token) == held.page(token)  # again, if the answer was lost
    second, token = held.page(token)
    assert (second, *held.page(token)) == ("a2", "a3", "")
    assert held.page(other_token) == ("b2", "")
    _, token = held.hold(["c1", "c2"])
    for wrong in ("", "x", other_token, token + "9", token[:-1] + "0", token[:-1] + "-1", f"{token[:-1]}{'9' * 5000}"):
        with pytest.raises(SupersededError):
            held.page(wrong)
    now[0] = 61.0
    with pytest.raises(SupersededError):
        held.page(token)


def test_only_the_newest_answers_are_held() -> None:
    held = HeldPages[int]()
    tokens = [held.hold([i, i])[1] for i in range(20)]
    with pytest.raises(SupersededError):
        held.page(tokens[0])
    assert held.page(tokens[-1]) == (19, "")
