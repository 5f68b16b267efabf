"""A microbatch: one packed stream of tokens with ranges of one or more tasks.

Legend: T tokens of the stream (all ranges, tails included). Source: MuxTune's chunk-based alignment.
"""

import dataclasses
import enum
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

IGNORE = -100  # the target of a position that bears no loss


class MicrobatchKind(enum.Enum):
    TRAIN = "train"
    EVALUATE = "evaluate"  # held-out rows: forward only


@dataclass(frozen=True)
class Segment:
    """One sequence inside a range; attention never crosses its bounds.

    `stream_offset_tokens` counts the unpadded tokens of the sequences before it in the same global batch. It is part of
    the key of dropout, so that masks don't depend on how the batch was packed.
    """

    num_tokens: int
    stream_offset_tokens: int


@dataclass(frozen=True)
class Range:
    """The contiguous tokens of one task: its segments, then a tail of padding to a multiple of the chunk.

    `step`: the step that this range trains, from 0. `num_step_target_tokens`: target
    tokens of the whole global batch (or of the whole held-out split), over all microbatches: the loss's denominator.
    `is_last`: no later microbatch contains tokens of this step (or evaluation), so the optimizer may step after it.
    """

    task: str
    step: int
    start: int  # index of its first token in the stream
    num_tokens: int  # tail included; a multiple of the chunk
    segments: tuple[Segment, ...]
    num_step_target_tokens: int
    is_last: bool

    @property
    def num_effective_tokens(self) -> int:
        return sum(segment.num_tokens for segment in self.segments)


@dataclass(frozen=True)
class Microbatch:
    """A packed stream: `token_ids_T` int32, and `targets_T` int32, the token that each position predicts, or IGNORE.

    A round contains each member task's evaluation, if one is due, then all microbatches of its next step. All EVALUATE
    microbatches of a round precede its TRAIN ones. The last microbatch of a round has `is_last_in_round`.
    """

    round: int
    kind: MicrobatchKind
    token_ids_T: NDArray[np.int32]
    targets_T: NDArray[np.int32]
    ranges: tuple[Range, ...]
    is_last_in_round: bool

    @property
    def num_tokens(self) -> int:
        return int(self.token_ids_T.shape[0])

    def alone(self, range_: Range) -> "Microbatch":
        """Return one of its ranges as a separate microbatch."""
        part = slice(range_.start, range_.start + range_.num_tokens)
        ranges = (dataclasses.replace(range_, start=0),)
        return Microbatch(self.round, self.kind, self.token_ids_T[part], self.targets_T[part], ranges, False)
