"""How long a task still takes, from what is left of it and of those it is fused with."""

from collections.abc import Sequence

from engine.planning.plan import TaskView


def seconds_left(task: TaskView, fused: Sequence[TaskView], tokens_per_second: float) -> float | None:
    """Until `task` has done its last step beside `fused` (which holds it too); None until a rate is measured.

    Every round is one step of each fused task, so a neighbour costs its tokens for as many rounds as both still run.
    """
    if tokens_per_second <= 0:
        return None
    rounds = steps_left(task)
    tokens = sum(min(rounds, steps_left(other)) * tokens_per_step(other) for other in fused)
    return tokens / tokens_per_second


def steps_left(task: TaskView) -> int:
    return max(0, task.num_steps - task.step)


def tokens_per_step(task: TaskView) -> float:
    """Effective tokens of one optimizer step, on average."""
    return task.num_train_tokens / max(1, task.num_steps)
