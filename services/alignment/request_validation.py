"""What alignment can't compute with, said before it tries. Pure; admission's own rules for tasks are stricter."""

from engine.errors import FieldViolation, InvalidInputError
from engine.task import Training
from muxtune.v1 import alignment_pb2 as pb

MAX_STEPS = 10_000_000
MAX_VIRTUAL_TOKENS = 1024


def check_training(training: Training, path: str) -> None:
    """The fields that order, split and pack the data. Raises InvalidInputError naming every wrong one at once."""
    duration = "num_steps" if training.num_steps is not None else "num_epochs"
    wrong = [
        FieldViolation(f"{path}.{field}", f'"{getattr(training, field)}" {remedy}')
        for field, holds, remedy in (
            (duration, (training.num_steps or training.num_epochs or 0) >= 1, "must be at least 1"),
            ("micro_batch_size", training.micro_batch_size >= 1, "must be at least 1"),
            ("global_batch_size", training.global_batch_size >= 1, "must be at least 1"),
            ("max_sequence_tokens", training.max_sequence_tokens >= 2, "must be at least 2"),
            ("heldout_fraction", 0 <= training.heldout_fraction <= 0.9, "must be 0 to 0.9"),
            ("evaluate_every_steps", training.evaluate_every_steps >= 0, "must not be negative"),
        )
        if not holds
    ]
    if wrong:
        raise InvalidInputError("; ".join(f"{v.field}: {v.description}" for v in wrong), wrong)


def check_num_steps(num_steps: int) -> None:
    """Raises InvalidInputError for more steps than a task can count (num_epochs over a long dataset)."""
    if num_steps > MAX_STEPS:
        raise InvalidInputError.of_field(
            "spec.training.num_epochs", f"makes {num_steps} steps, more than {MAX_STEPS}: train fewer epochs"
        )


def check_layout(request: pb.StreamMicrobatchesRequest) -> None:
    """Raises InvalidInputError for an hTask that cannot be packed."""
    names = [member.task for member in request.members]
    if not names or len(set(names)) != len(names):
        raise InvalidInputError.of_field("members", f"{len(names)} members: name each task once")
    if request.chunk_tokens < 1 or request.chunk_tokens & (request.chunk_tokens - 1):
        raise InvalidInputError.of_field("chunk_tokens", f"{request.chunk_tokens} is no power of two")
    if request.token_budget < 1:
        raise InvalidInputError.of_field("token_budget", f"{request.token_budget} must be positive")


def check_steps(member: pb.Member, num_steps: int) -> None:
    """Raises InvalidInputError unless admission's count, made from the same dataset, is ours."""
    if num_steps != member.num_steps:
        raise InvalidInputError.of_field(
            "members.num_steps", f"{member.task} has {num_steps} steps by its dataset, not {member.num_steps}"
        )
    for field in ("num_virtual_tokens", "num_prefix_tokens"):
        if not 0 <= (count := getattr(member, field)) <= MAX_VIRTUAL_TOKENS:
            raise InvalidInputError.of_field(
                f"members.{field}", f"{count} of {member.task} must be 0 to {MAX_VIRTUAL_TOKENS}"
            )
    if not 0 <= member.cursor_step <= num_steps:
        raise InvalidInputError.of_field(
            "members.cursor_step", f"{member.cursor_step} of {member.task} must be 0 to {num_steps}"
        )
