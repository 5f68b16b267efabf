"""Results of a task that the executor returns after a microbatch. Only the standard library, for every service."""

from dataclasses import dataclass

from engine.errors import MuxtuneError


@dataclass(frozen=True)
class ShadowCheck:
    """Relative differences between a fused step and the same step run again for its task alone.

    `loss_difference`: |fused - alone| / |alone|. `gradient_difference`: the norm of the difference over the norm alone.
    """

    loss_difference: float
    gradient_difference: float


@dataclass(frozen=True)
class StepResult:
    """One optimizer step of one task. `step` counts steps done. `seconds` is its share of its microbatches' time.

    `input_digest`: 32 bytes that identify the data of the step (engine/alignment/step_digest.py).
    """

    task: str
    step: int
    loss: float
    learning_rate: float
    grad_norm: float
    num_effective_tokens: int
    num_target_tokens: int
    num_padding_tokens: int
    seconds: float
    num_neighbours: int
    input_digest: bytes
    shadow_check: ShadowCheck | None = None


@dataclass(frozen=True)
class EvaluationResult:
    """The mean loss over the held-out split after `step` steps. `seconds` is its share of its microbatches' time."""

    task: str
    step: int
    loss: float
    num_effective_tokens: int
    num_target_tokens: int
    num_padding_tokens: int
    seconds: float


@dataclass(frozen=True)
class WorkInProgress:
    """Totals of a step, or of the evaluation before it, that is not complete. `step` counts steps done."""

    step: int
    is_evaluation: bool
    seconds: float
    num_effective_tokens: int
    num_padding_tokens: int


@dataclass(frozen=True)
class TaskFailure:
    """The executor detached the task because of `error`. Its neighbours are not affected. `work`: of the lost step."""

    task: str
    step: int
    error: MuxtuneError
    work: WorkInProgress


Result = StepResult | EvaluationResult | TaskFailure
