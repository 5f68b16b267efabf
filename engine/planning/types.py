"""What the planner reads (a snapshot) and what it answers (a plan that explains itself). Frozen, pure, no clocks."""

import functools
import math
import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from engine.methods.base import Site, SiteKind
from engine.planning.cost.chunk_size import MAX_CHUNK_TOKENS
from engine.planning.cost.cost_model import UNKNOWN, CostProfile
from engine.task import TaskSpec


@dataclass(frozen=True)
class BackboneView:
    """A backbone as its executor described it. Measured at its load, where they are there: bytes that it keeps for
    backward by a token, which linear operators, by number, read one tensor, what its process has beside the weights.
    `allocator_slack`: what the allocator takes for a byte that is asked for. `recomputed_token_bytes`: where each layer
    runs again in backward (activation checkpointing), what it keeps then by a token; else 0. `packed_weight_bytes`: of
    weights that are held once more, packed for a CPU's kernels."""

    name: str
    num_parameters: int
    num_layers: int
    hidden_size: int
    vocab_size: int
    max_sequence_tokens: int
    weight_bytes: int
    dtype: str
    sites: tuple[Site, ...]
    kept_token_bytes: float = 0.0
    input_groups: Mapping[str, int] = field(default_factory=dict, hash=False)
    process_bytes: int = 0
    allocator_slack: float = 1.05
    recomputed_token_bytes: float = 0.0
    packed_weight_bytes: int = 0

    @property
    def element_bytes(self) -> int:
        return {"float32": 4, "bfloat16": 2, "float16": 2}[self.dtype]

    @cached_property
    def token_bytes(self) -> float:
        """Kept for backward by a token, adapters aside: as measured, or a guess: the outputs of all operators and three
        hidden states a layer."""
        if self.kept_token_bytes:
            return self.kept_token_bytes
        outputs = sum(site.out_features for site in self.sites if site.kind is SiteKind.LINEAR)
        return self.element_bytes * (outputs + 3 * self.num_layers * self.hidden_size)

    @cached_property
    def inputs(self) -> "OperatorInputs":
        return OperatorInputs(self)


class OperatorInputs:
    """What a backbone's linear operators read: sets of tensors as bit masks, and the bytes of a token in them."""

    def __init__(self, backbone: BackboneView) -> None:
        linear = [site for site in backbone.sites if site.kind is SiteKind.LINEAR]
        groups = [backbone.input_groups.get(site.name) or site.name for site in linear]
        numbers = {group: i for i, group in enumerate(dict.fromkeys(groups))}
        self._bits = {site.name: 1 << numbers[group] for site, group in zip(linear, groups, strict=True)}
        self._widths = {self._bits[site.name]: site.in_features * backbone.element_bytes for site in linear}
        self._known: dict[int, int] = {}

    def mask(self, sites: Iterable[str]) -> int:
        return functools.reduce(operator.or_, (self._bits.get(name, 0) for name in sites), 0)

    def token_bytes(self, mask: int) -> int:
        if mask not in self._known:
            self._known[mask] = sum(width for bit, width in self._widths.items() if mask & bit)
        return self._known[mask]


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

    `length_quantiles`: tokens of its training rows, as many from each part of them; () if not known.
    `seconds_to_deadline` may be past. What was measured so far: seconds of device, tokens, and padding among them.
    """

    name: str
    tenant: str
    spec: TaskSpec
    age: int
    num_steps: int
    step: int = 0
    num_train_tokens: int = 0
    length_quantiles: tuple[int, ...] = ()
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
class PlannerConfig:
    """The operator's settings: tokens of one microbatch, and the alignment quantum, chosen for each hTask if it is 0.

    Switches for ablation: without `fuses` every task is an hTask of its own; without `interleaves` hTasks' rounds run
    one after another, each alone in the pipeline; a chunk of 1 is no alignment; without `preempts` nobody gives way.
    """

    token_budget: int = 2048
    chunk_tokens: int = 0
    fuses: bool = True
    interleaves: bool = True
    preempts: bool = True

    @property
    def largest_chunk_tokens(self) -> int:
        return self.chunk_tokens or MAX_CHUNK_TOKENS


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
    `measured_step_seconds`: its own share of device time, a step. `padding_fraction`: of its tokens so far, and
    `predicted_padding_fraction`: in a round of its hTask.
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
    predicted_padding_fraction: float | None = None
    misses_deadline: bool = False


@dataclass(frozen=True)
class Plan:
    """hTasks by executor. Two plans are equal if they would run the same."""

    htasks: Mapping[str, tuple[HTask, ...]]
    explanations: tuple[Explanation, ...] = field(compare=False, default=())

    def tasks_of(self, executor: str) -> tuple[str, ...]:
        return tuple(task for htask in self.htasks.get(executor, ()) for task in htask.tasks)
