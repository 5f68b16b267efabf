"""States of a task: which ones are final, and their names as people read them."""

from muxtune.v1 import task_pb2

FINAL_STATES = frozenset({task_pb2.TASK_STATE_SUCCEEDED, task_pb2.TASK_STATE_FAILED, task_pb2.TASK_STATE_CANCELLED})


def state_name(state: "task_pb2.TaskState.ValueType") -> str:
    """Return "RUNNING" for TASK_STATE_RUNNING."""
    return task_pb2.TaskState.Name(state).removeprefix("TASK_STATE_")
