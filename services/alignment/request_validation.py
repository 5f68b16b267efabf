"""Validates requests before alignment computes. Pure; admission's own rules for tasks are stricter."""

from engine.errors import FieldViolation, InvalidInputError
from engine.task import MAX_STEPS, Affects, Training, out_of_bounds, slice_error
from muxtune.v1 import alignment_pb2 as pb

MAX_VIRTUAL_TOKENS = 1024


def check_training(training: Training, path: str) -> None:
    """Raise InvalidInputError that names every invalid field on which tokens, order, split or packing depend."""
    violations = [
        FieldViolation(f"{path}.{error.field}", f'"{error.value}" {error.remedy}')
        for error in out_of_bounds(training, Affects.TOKENS | Affects.DATA)
    ]
    if violations:
        raise InvalidInputError.of_fields(violations)


def check_slice(member: pb.Member, training: Training) -> None:
    """Raise InvalidInputError for a task whose slices are larger than a microbatch may be: one from before that limit
    would end the streams of all tasks that share its hTask."""
    if error := slice_error(training, member.num_virtual_tokens):
        raise InvalidInputError.of_field(
            f"members[{member.task}].training.{error.field}", f'"{error.value}" {error.remedy}'
        )


def check_num_steps(num_steps: int) -> None:
    """Raise InvalidInputError for too many steps (num_epochs over a long dataset)."""
    if num_steps > MAX_STEPS:
        raise InvalidInputError.of_field(
            "spec.training.num_epochs", f"makes {num_steps} steps, more than {MAX_STEPS}; train fewer epochs"
        )


def check_layout(request: pb.StreamMicrobatchesRequest) -> None:
    """Raise InvalidInputError for an hTask that cannot be packed."""
    names = [member.task for member in request.members]
    if not names or len(set(names)) != len(names):
        raise InvalidInputError.of_field(
            "members", f"{len(names)} members must name one task or more, and each task once"
        )
    if request.chunk_tokens < 1 or request.chunk_tokens & (request.chunk_tokens - 1):
        raise InvalidInputError.of_field("chunk_tokens", f"{request.chunk_tokens} is not a power of two")
    if request.token_budget < 1:
        raise InvalidInputError.of_field("token_budget", f"{request.token_budget} must be positive")


def check_steps(member: pb.Member, num_steps: int) -> None:
    """Raise InvalidInputError unless the member's step count is the dataset's and its other counts are in bounds."""
    if num_steps != member.num_steps:
        raise InvalidInputError.of_field(
            "members.num_steps", f"{member.task} has {num_steps} steps by its dataset, not {member.num_steps}"
        )
    for field in ("num_virtual_tokens", "num_prefix_tokens"):
        if not 0 <= (count := getattr(member, field)) <= MAX_VIRTUAL_TOKENS:
            raise InvalidInputError.of_field(
                f"members.{field}", f"{count} of {member.task} must be 0 to {MAX_VIRTUAL_TOKENS}"
            )
    if member.round_tokens < 0:
        raise InvalidInputError.of_field(
            "members.round_tokens", f"{member.round_tokens} of {member.task} must not be negative"
        )
    ends = [0, *(bound for interval in member.done for bound in (interval.start, interval.end))]
    if ends != sorted(ends):
        raise InvalidInputError.of_field(
            "members.done", f"the intervals of {member.task} must be in order, and none may overlap another"
        )
    if not 0 <= member.cursor_step <= num_steps:
        raise InvalidInputError.of_field(
            "members.cursor_step", f"{member.cursor_step} of {member.task} must be 0 to {num_steps}"
        )
