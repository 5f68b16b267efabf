"""Chooses the alignment chunk of an hTask: the largest power of two that causes no more padding than allowed.

A large chunk means few shapes for kernels, pipeline stages and graph captures, and full tiles; it costs padding at the
tail of each range. How much padding is cheap follows from the cost model. Of k sequences drawn from a task's lengths
the sum modulo the chunk is distributed as the k-fold circular convolution of one sequence's residues. Source: MuxTune's
chunk-based alignment; this choice of the size is ours.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from engine.planning.types import MAX_CHUNK_TOKENS, UNKNOWN_COST, CostProfile

CHUNK_SIZES = tuple(1 << power for power in reversed(range(MAX_CHUNK_TOKENS.bit_length())))
_MAX_TOKEN_SHARE = 0.025  # of a round's tokens
_MAX_COST_SHARE = 0.01  # of a round's seconds


@dataclass(frozen=True)
class SequenceLengths:
    """Lengths of the sequences of one step of a task, cut into slices.

    Each of `lengths` is equally likely; () if they are not known.
    """

    lengths: tuple[int, ...]
    num_sequences: int
    num_slices: int
    num_tokens: float

    def part(self, fraction: float) -> "SequenceLengths":
        """Return the sequences of a part of the step."""
        if fraction >= 1:
            return self
        num_sequences, num_slices = (max(1, math.ceil(fraction * n)) for n in (self.num_sequences, self.num_slices))
        return SequenceLengths(self.lengths, num_sequences, num_slices, fraction * self.num_tokens)

    def num_ranges(self, num_microbatches: int) -> float:
        """Return the expected number of a round's microbatches that hold a slice, each slice equally likely in any."""
        return num_microbatches * (1 - (1 - 1 / num_microbatches) ** self.num_slices)

    def padding_tokens(self, num_microbatches: int, chunk_tokens: int) -> float:
        """Return the expected padding of the tails of the task's ranges in one round."""
        ranges = self.num_ranges(num_microbatches)
        if not self.lengths:
            return ranges * (chunk_tokens - 1) / 2
        return ranges * _tail_tokens(self.lengths, max(1, round(self.num_sequences / ranges)), chunk_tokens)


def choose_chunk(tasks: Sequence[SequenceLengths], num_microbatches: int, allowed_tokens: float) -> int:
    """Return the largest chunk whose padding in a round is at most `allowed_tokens`."""
    for chunk in CHUNK_SIZES:
        if sum(task.padding_tokens(num_microbatches, chunk) for task in tasks) <= allowed_tokens:
            return chunk
    return CHUNK_SIZES[-1]


def allowed_padding_tokens(
    num_tokens: float, num_microbatches: int, round_seconds: float = math.inf, profile: CostProfile = UNKNOWN_COST
) -> float:
    """Return how many tokens of padding a round of `num_tokens` may have: a small share of its tokens and its seconds.

    Tokens below the knee cost no time.
    """
    idle_tokens = max(0.0, num_microbatches * profile.knee_tokens - num_tokens)
    cheap_tokens = _MAX_COST_SHARE * round_seconds / profile.token_seconds if profile.token_seconds else num_tokens
    return min(_MAX_TOKEN_SHARE * num_tokens, idle_tokens + cheap_tokens)


@functools.lru_cache(8192)
def _tail_tokens(lengths: tuple[int, ...], num_sequences: int, chunk_tokens: int) -> float:
    """Return the expected padding after so many sequences of such lengths."""
    residues = np.bincount(np.asarray(lengths) % chunk_tokens, minlength=chunk_tokens) / len(lengths)
    sums = np.fft.ifft(np.fft.fft(residues) ** num_sequences).real
    return float(sums @ (-np.arange(chunk_tokens) % chunk_tokens))
