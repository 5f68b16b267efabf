"""What the planner reads (a snapshot) and what it answers (a plan that explains itself). Frozen, pure, no clocks."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from engine.method import Site
from engine.task import TaskSpec


@dataclass(frozen=True)
class BackboneView:
    """A backbone as its executor described it."""

    name: str
    num_parameters: int
    num_layers: int
    hidden_size: int
    vocab_size: int
    max_sequence_tokens: int
    weight_bytes: int
    dtype: str
    sites: tuple[Site, ...]

    @property
    def element_bytes(self) -> int:
        return {"float32": 4, "bfloat16": 2, "float16": 2}[self.dtype]


@dataclass(frozen=True)
class ExecutorView:
    """`memory_bytes`: what it may use in all, backbone included."""

    name: str
    backbone: BackboneView
    memory_bytes: int
    effective_tokens_per_second: float = 0.0
    is_draining: bool = False


@dataclass(frozen=True)
class TaskView:
    """An unfinished task. `executor`: who holds its current attempt, or ""; `age` orders tasks, oldest smallest."""

    name: str
    tenant: str
    spec: TaskSpec
    age: int
    num_steps: int
    step: int = 0
    num_train_tokens: int = 0
    executor: str = ""
    is_cancelling: bool = False


@dataclass(frozen=True)
class Snapshot:
    """Everything one scheduling cycle looks at."""

    tasks: tuple[TaskView, ...]
    executors: tuple[ExecutorView, ...]


@dataclass(frozen=True)
class Limits:
    """The operator's settings: tokens of one microbatch, and the alignment quantum."""

    token_budget: int = 2048
    chunk_tokens: int = 16


@dataclass(frozen=True)
class HTask:
    """Tasks fused in space: their tokens share microbatches of at most `token_budget` tokens."""

    tasks: tuple[str, ...]
    token_budget: int
    chunk_tokens: int


@dataclass(frozen=True)
class Explanation:
    """Why a task runs where it runs (`executor` set) or waits, and beside whom."""

    task: str
    executor: str
    neighbours: tuple[str, ...]
    reason: str
    predicted_bytes: int = 0
    predicted_seconds_left: float | None = None


@dataclass(frozen=True)
class Plan:
    """hTasks by executor. Two plans are equal if they would run the same."""

    htasks: Mapping[str, tuple[HTask, ...]]
    explanations: tuple[Explanation, ...] = field(compare=False, default=())

    def tasks_of(self, executor: str) -> tuple[str, ...]:
        return tuple(task for htask in self.htasks.get(executor, ()) for task in htask.tasks)
