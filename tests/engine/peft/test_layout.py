"""Kernels read a task's step from device memory that stays the same while the task is resident."""

from engine.peft.layout import Layout
from tests.engine.runtime.tiny import pack_round, task_of


def step_cells(layout: Layout) -> dict[str, tuple[int, int]]:
    """Return (address, value) of each task's step."""
    steps = {span.task: span.device_step for span in layout.spans}
    return {task: (step.data_ptr(), int(step)) for task, step in steps.items() if step is not None}


def test_a_step_changes_in_place() -> None:
    tasks, layout = [task_of("a", micro_batch_size=4), task_of("b", micro_batch_size=4)], Layout()
    both = frozenset({"a", "b"})
    layout.lay_out(pack_round(tasks, [0, 4])[0], both)
    first = step_cells(layout)
    assert [first[task][1] for task in "ab"] == [0, 4] and first["a"][0] != first["b"][0]
    version = layout.spans[0].device_step._version  # type: ignore[union-attr]
    layout.lay_out(pack_round(tasks, [0, 5])[0], both)
    assert layout.spans[0].device_step._version == version  # type: ignore[union-attr]
    layout.lay_out(pack_round(tasks, [1, 5])[0], both)
    assert step_cells(layout) == {"a": (first["a"][0], 1), "b": (first["b"][0], 5)}
    layout.lay_out(pack_round(tasks, [2, 6])[0], frozenset({"b"}))
    assert step_cells(layout) == {"b": (first["b"][0], 6)}
