"""What the planner reads (a snapshot) and what it answers (a plan that explains itself). Frozen, pure, no clocks."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from engine.method import Site, SiteKind
from engine.planning.cost import UNKNOWN, CostProfile
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

    @cached_property
    def linear_width(self) -> int:
        """Inputs and outputs of all its linear operators."""
        return sum(site.in_features + site.out_features for site in self.sites if site.kind is SiteKind.LINEAR)


@dataclass(frozen=True)
class ExecutorView:
    """`memory_bytes`: what it may use in all, backbone included. Over several stages it is a pipeline, its work split
    evenly, `hop_seconds` from one to the next."""

    name: str
    backbone: BackboneView
    memory_bytes: int
    effective_tokens_per_second: float = 0.0
    is_draining: bool = False
    cost: CostProfile = UNKNOWN
    num_stages: int = 1
    hop_seconds: float = 0.0

    @property
    def profile(self) -> CostProfile:
        """As calibrated; else from the throughput that was measured; else one that only compares: a second a token."""
        if self.cost.is_known:
            return self.cost
        rate = self.effective_tokens_per_second
        return CostProfile(token_seconds=1 / rate if rate > 0 else 1.0)

    @property
    def can_predict(self) -> bool:
        """Whether seconds mean seconds."""
        return self.cost.is_known or self.effective_tokens_per_second > 0


@dataclass(frozen=True)
class TaskView:
    """An unfinished task. `executor`: who holds its current attempt, or ""; `age` orders tasks, oldest smallest.

    `seconds_to_deadline` may be past. What was measured so far: seconds of device, tokens, and padding among them.
    """

    name: str
    tenant: str
    spec: TaskSpec
    age: int
    num_steps: int
    step: int = 0
    num_train_tokens: int = 0
    executor: str = ""
    is_cancelling: bool = False
    seconds_to_deadline: float = math.inf
    device_seconds: float = 0.0
    num_effective_tokens: int = 0
    num_padding_tokens: int = 0

    @property
    def num_steps_left(self) -> int:
        return max(0, self.num_steps - self.step)

    @property
    def tokens_per_step(self) -> float:
        """Effective tokens of one optimizer step, on average."""
        return self.num_train_tokens / max(1, self.num_steps)


@dataclass(frozen=True)
class Snapshot:
    """Everything one scheduling cycle looks at. `running`: the hTasks each executor runs now. A tenant's weight is 1
    unless `tenant_weights` has another."""

    tasks: tuple[TaskView, ...]
    executors: tuple[ExecutorView, ...]
    running: Mapping[str, tuple["HTask", ...]] = field(default_factory=dict)
    tenant_weights: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Limits:
    """The operator's settings: tokens of one microbatch, and the alignment quantum. `fuses` and `preempts` are switches
    for ablation: without the first every task is an hTask of its own."""

    token_budget: int = 2048
    chunk_tokens: int = 16
    fuses: bool = True
    preempts: bool = True


@dataclass(frozen=True)
class HTask:
    """Tasks fused in space: their tokens share microbatches of at most `token_budget` tokens."""

    tasks: tuple[str, ...]
    token_budget: int
    chunk_tokens: int


@dataclass(frozen=True)
class Explanation:
    """Why a task runs where it runs (`executor` set) or waits, and beside whom.

    Seconds are None until the executor's costs are known. `round_seconds`: in which every task of its executor takes a
    step; `alone_round_seconds`: of the task, had it the executor to itself. `predicted_step_seconds` and
    `measured_step_seconds`: its own share of device time, a step. `padding_fraction`: of its tokens so far.
    """

    task: str
    executor: str
    neighbours: tuple[str, ...]
    reason: str
    predicted_bytes: int = 0
    predicted_seconds_left: float | None = None
    alone_bytes: int = 0
    round_seconds: float | None = None
    alone_round_seconds: float | None = None
    predicted_step_seconds: float | None = None
    measured_step_seconds: float | None = None
    padding_fraction: float | None = None
    misses_deadline: bool = False


@dataclass(frozen=True)
class Plan:
    """hTasks by executor. Two plans are equal if they would run the same."""

    htasks: Mapping[str, tuple[HTask, ...]]
    explanations: tuple[Explanation, ...] = field(compare=False, default=())

    def tasks_of(self, executor: str) -> tuple[str, ...]:
        return tuple(task for htask in self.htasks.get(executor, ()) for task in htask.tasks)
