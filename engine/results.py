"""What the executor says of a task after a microbatch. Only the standard library, so that every service can read it."""

from dataclasses import dataclass

from engine.errors import MuxtuneError


@dataclass(frozen=True)
class ShadowCheck:
    """A step run again for its task alone, from the same parameters: relative differences to what its neighbours left.

    `loss_difference`: |fused - alone| / |alone|. `gradient_difference`: the norm of the difference over the norm alone.
    """

    loss_difference: float
    gradient_difference: float


@dataclass(frozen=True)
class StepResult:
    """One optimizer step of one task. `step` counts steps done. `seconds` is its share of its microbatches' time.

    `input_digest`: what it was trained on, 32 bytes (engine/alignment/step_digest.py).
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
    """Mean loss over the held-out split when `step` steps were done."""

    task: str
    step: int
    loss: float
    num_target_tokens: int


@dataclass(frozen=True)
class TaskFailure:
    """The task was detached; its neighbours never noticed."""

    task: str
    step: int
    error: MuxtuneError


Result = StepResult | EvaluationResult | TaskFailure
