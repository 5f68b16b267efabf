"""Types that the planner reads (a snapshot of the mesh) and returns (a plan that explains itself). Frozen and pure."""

import functools
import math
import operator
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

from engine.methods.base import Site, SiteKind
from engine.task import TaskSpec

MAX_NAMED_NEIGHBOURS = 16  # in an explanation
MAX_CHUNK_TOKENS = 64  # the largest alignment quantum that the planner chooses


@dataclass(frozen=True)
class CostProfile:
    """Prices in seconds that `engine.planning.cost.cost_model` multiplies by a microbatch's work.

    Each price is at least 0, so that more work never costs less. In the zero profile nothing is measured. `error`:
    median relative error on the microbatches that the profile was fitted to.
    """

    fixed_seconds: float = 0.0
    token_seconds: float = 0.0
    knee_tokens: float = 0.0
    square_seconds: float = 0.0
    target_seconds: float = 0.0
    module_seconds: float = 0.0
    multiplication_seconds: float = 0.0
    parameter_seconds: float = 0.0
    segment_seconds: float = 0.0
    error: float = 0.0

    @property
    def is_known(self) -> bool:
        return self.token_seconds > 0 or self.fixed_seconds > 0


UNKNOWN_COST = CostProfile()


@dataclass(frozen=True)
class BackboneView:
    """A backbone as its executor describes it.

    The executor measures some fields when it loads the backbone; their defaults mean "not measured":
    - `kept_token_bytes`: bytes that backward needs for each token, adapters excluded;
    - `input_groups`: linear operators with the same number read the same tensor;
    - `process_bytes`: memory of the executor's process beside the weights.

    `allocator_slack`: bytes that the allocator reserves for each byte requested. `recomputed_token_bytes`: with
    activation checkpointing, bytes for each token that one layer keeps while it runs again in backward; else 0.
    `packed_weight_bytes`: a second copy of weights, packed for a CPU's kernels.
    """

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
        """Bytes that backward needs for each token, adapters excluded.

        As measured; else an estimate: the outputs of all linear operators and three hidden states for each layer.
        """
        if self.kept_token_bytes:
            return self.kept_token_bytes
        outputs = sum(site.out_features for site in self.sites if site.kind is SiteKind.LINEAR)
        return self.element_bytes * (outputs + 3 * self.num_layers * self.hidden_size)

    @cached_property
    def inputs(self) -> "OperatorInputs":
        return OperatorInputs(self)


class OperatorInputs:
    """Tensors that a backbone's linear operators read: sets of them as bit masks, and their bytes for each token."""

    def __init__(self, backbone: BackboneView) -> None:
        linear = [site for site in backbone.sites if site.kind is SiteKind.LINEAR]
        groups = [backbone.input_groups.get(site.name) or site.name for site in linear]
        numbers = {group: i for i, group in enumerate(dict.fromkeys(groups))}
        self._bits = {site.name: 1 << numbers[group] for site, group in zip(linear, groups, strict=True)}
        self._widths = {self._bits[site.name]: site.in_features * backbone.element_bytes for site in linear}
        self._bytes_by_mask: dict[int, int] = {}

    def mask(self, sites: Iterable[str]) -> int:
        return functools.reduce(operator.or_, (self._bits.get(name, 0) for name in sites), 0)

    def token_bytes(self, mask: int) -> int:
        if mask not in self._bytes_by_mask:
            self._bytes_by_mask[mask] = sum(width for bit, width in self._widths.items() if mask & bit)
        return self._bytes_by_mask[mask]


@dataclass(frozen=True)
class ExecutorView:
    """An executor as the planner sees it. `memory_bytes`: all memory that it may use, the backbone included.

    An executor of several stages is a pipeline: its work is split evenly, and data takes `hop_seconds` between stages.
    """

    name: str
    backbone: BackboneView
    memory_bytes: int
    effective_tokens_per_second: float = 0.0
    is_draining: bool = False
    cost: CostProfile = UNKNOWN_COST
    num_stages: int = 1
    hop_seconds: float = 0.0

    @property
    def profile(self) -> CostProfile:
        """The calibrated profile; else one from the measured throughput; else one second for each token.

        The last serves comparisons only: its seconds are not real ones.
        """
        if self.cost.is_known:
            return self.cost
        rate = self.effective_tokens_per_second
        return CostProfile(token_seconds=1 / rate if rate > 0 else 1.0)

    @property
    def can_predict(self) -> bool:
        """Return whether seconds of `profile` are real ones."""
        return self.cost.is_known or self.effective_tokens_per_second > 0


@dataclass(frozen=True)
class TaskView:
    """An unfinished task as the planner sees it.

    `executor`: the executor of its current attempt, or ""; `age` orders tasks, the oldest is the smallest.
    `length_quantiles`: tokens of its training rows, at evenly spaced quantiles; () if they are not known.
    `num_heldout_rows`: rows of one evaluation.
    `seconds_to_deadline` is negative once the deadline has passed. `device_seconds`, `num_effective_tokens` and
    `num_padding_tokens` are measured so far.
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
    num_heldout_rows: int = 0

    @property
    def num_steps_left(self) -> int:
        return max(0, self.num_steps - self.step)

    @property
    def tokens_per_step(self) -> float:
        """Mean effective tokens of an optimizer step."""
        return self.num_train_tokens / max(1, self.num_steps)

    @property
    def num_heldout_tokens(self) -> float:
        """Effective tokens of one evaluation, whose rows are assumed to be as long as those that train."""
        lengths = self.length_quantiles or (self.tokens_per_step / max(1, self.spec.training.global_batch_size),)
        return self.num_heldout_rows * sum(lengths) / len(lengths)


@dataclass(frozen=True)
class Snapshot:
    """Everything that one scheduling cycle reads.

    `running`: the hTasks that each executor runs now. A tenant that `tenant_weights` does not list has weight 1.
    """

    tasks: tuple[TaskView, ...]
    executors: tuple[ExecutorView, ...]
    running: Mapping[str, tuple["HTask", ...]] = field(default_factory=dict)
    tenant_weights: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class PlannerConfig:
    """Settings of the planner. Their defaults stand here alone: services and the offline planner read them.

    `token_budget`: tokens of one microbatch. `chunk_tokens`: the alignment quantum; 0 chooses it for each hTask, 1
    means no alignment. The switches serve ablations: without `fuses` every task is an hTask of its own; without
    `interleaves` hTasks' rounds run one after another, each alone in the pipeline; without `preempts` no task gives way
    to another. `max_resident_tasks`: tasks on one executor at once. With more, the messages about an executor and the
    time of a plan would have no bound; each gets a small part of the device then, and waiting costs it little.
    """

    token_budget: int = 2048
    chunk_tokens: int = 0
    fuses: bool = True
    interleaves: bool = True
    preempts: bool = True
    max_resident_tasks: int = 1024

    @property
    def largest_chunk_tokens(self) -> int:
        return self.chunk_tokens or MAX_CHUNK_TOKENS


@dataclass(frozen=True)
class HTask:
    """Tasks fused in space: their tokens share microbatches of at most `token_budget` tokens.

    `round_tokens`: for each task, the tokens that it adds to a round on average; 0, or no value: a whole step.
    """

    tasks: tuple[str, ...]
    token_budget: int
    chunk_tokens: int
    round_tokens: tuple[int, ...] = ()

    def without(self, tasks: Collection[str]) -> "HTask":
        if not (left := [i for i, name in enumerate(self.tasks) if name not in tasks]):
            return replace(self, tasks=(), round_tokens=())
        tokens = tuple(self.round_tokens[i] for i in left) if self.round_tokens else ()
        return replace(self, tasks=tuple(self.tasks[i] for i in left), round_tokens=tokens)


@dataclass(frozen=True)
class TaskRate:
    """A resident's share of its executor's time, of 1, and the predicted seconds from one of its steps to the next."""

    device_share: float
    seconds_per_step: float


@dataclass(frozen=True)
class Explanation:
    """Explains why a task runs on `executor`, or waits if that is "", and which tasks share its hTask.

    `neighbours` names the oldest of them at most, so that a plan of N tasks does not hold N * N names; `num_neighbours`
    counts all. Predicted seconds are None until the executor's costs are known. `round_seconds`: time in which every
    task of the executor takes one step; `alone_round_seconds`: the same with no other task on the executor.
    `predicted_step_seconds` and `measured_step_seconds`: the task's own share of device time for one step.
    `device_share`: its part of its executor's time; `seconds_per_step`: from one of its steps to the next.
    `padding_fraction`: padding among its tokens so far; `predicted_padding_fraction`: in a round of its hTask.
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
    num_neighbours: int = 0
    device_share: float | None = None
    seconds_per_step: float | None = None


@dataclass(frozen=True)
class Plan:
    """The hTasks of each executor, with explanations. Two plans with the same hTasks are equal."""

    htasks: Mapping[str, tuple[HTask, ...]]
    explanations: tuple[Explanation, ...] = field(compare=False, default=())

    def tasks_of(self, executor: str) -> tuple[str, ...]:
        return tuple(task for htask in self.htasks.get(executor, ()) for task in htask.tasks)
