"""How long a chunk: from the lengths of the tasks' sequences, what the tails of ranges cost; from the cost model, how
much of that is cheap.

A large chunk means few shapes for kernels, pipeline stages and graph captures, and full tiles; what it costs is the
tail of each range. So the largest power of two is taken whose tails are within what the planner allows. Of k sequences
drawn from a task's lengths the sum modulo the chunk is distributed as the k-fold circular convolution of one sequence's
residues. Source: MuxTune's chunk-based alignment; this choice of the size is ours.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from engine.planning.cost.cost_model import UNKNOWN, CostProfile

CHUNKS = (64, 32, 16, 8, 4, 2, 1)
MAX_CHUNK_TOKENS = CHUNKS[0]
_MAX_TOKEN_SHARE = 0.025  # of a round's tokens
_MAX_COST_SHARE = 0.01  # of a round's seconds


@dataclass(frozen=True)
class SequenceLengths:
    """A task's sequences of one step: any of `lengths` as likely as another (none: not known), cut into slices."""

    lengths: tuple[int, ...]
    num_sequences: int
    num_slices: int
    num_tokens: float

    def num_ranges(self, num_microbatches: int) -> float:
        """In how many microbatches of a round some of its slices are, were each as likely in any of them."""
        return num_microbatches * (1 - (1 - 1 / num_microbatches) ** self.num_slices)

    def padding_tokens(self, num_microbatches: int, chunk_tokens: int) -> float:
        """Of its ranges' tails in one round, on average."""
        ranges = self.num_ranges(num_microbatches)
        if not self.lengths:
            return ranges * (chunk_tokens - 1) / 2
        return ranges * _tail_tokens(self.lengths, self.num_sequences / ranges, chunk_tokens)


def choose_chunk(tasks: Sequence[SequenceLengths], num_microbatches: int, allowed_tokens: float) -> int:
    """The largest of which the tails are within the tokens allowed in a round."""
    fitting = (
        chunk for chunk in CHUNKS if sum(t.padding_tokens(num_microbatches, chunk) for t in tasks) <= allowed_tokens
    )
    return next(fitting, CHUNKS[-1])


def allowed_padding_tokens(
    num_tokens: float, num_microbatches: int, round_seconds: float = math.inf, profile: CostProfile = UNKNOWN
) -> float:
    """In a round of so many tokens: a small part of them, that takes a small part of its time; idle places under the
    knee take none."""
    idle = max(0.0, num_microbatches * profile.knee_tokens - num_tokens)
    cheap = _MAX_COST_SHARE * round_seconds / profile.token_seconds if profile.token_seconds else num_tokens
    return min(_MAX_TOKEN_SHARE * num_tokens, idle + cheap)


def _tail_tokens(lengths: tuple[int, ...], num_sequences: float, chunk_tokens: int) -> float:
    """On average, after so many sequences of such lengths."""
    residues = np.bincount(np.asarray(lengths) % chunk_tokens, minlength=chunk_tokens) / len(lengths)
    count = max(1, round(num_sequences))
    sums = np.fft.ifft(np.fft.fft(residues) ** count).real
    return float(sums @ (-np.arange(chunk_tokens) % chunk_tokens))
