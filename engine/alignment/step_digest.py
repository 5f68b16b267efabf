"""What a step was trained on, as one hash: two runs that show the same saw the same data in the same order, and dropped
the same of it.

    SHA-256 over  seed (uint64), steps done before (uint64), dropout rate (float64),
                  then the SHA-256 of each sequence of the global batch, in the batch's order:
                  tokens of the batch before it (uint64), its token ids (int32 each), its targets (int32 each)

Little-endian all. Ids and targets are those of `Microbatch`: a sequence's virtual tokens among them, padding not. So
it is a function of dataset version, backbone, spec and step: neither neighbours nor the cut into microbatches, neither
their order nor a resume enters. Seed, step and rate with the tokens' places are all that keys dropout, beside the
module that drops (engine/kernels/dropout.py).
"""

import struct
from hashlib import sha256

from engine.alignment.microbatch import Microbatch, Range
from engine.task import Affects, Training, values_affecting


class StepDigest:
    """Gathers a step's sequences as its microbatches come: 32 bytes each."""

    def __init__(self) -> None:
        self._sequences: dict[int, bytes] = {}  # by place in the task's own stream

    def add(self, microbatch: Microbatch, range_: Range) -> None:
        """The sequences of one of the task's ranges."""
        start = range_.start
        for segment in range_.segments:
            part = slice(start, start + segment.num_tokens)
            sequence = sha256(struct.pack("<Q", segment.stream_offset_tokens))
            sequence.update(microbatch.token_ids_T[part].astype("<i4", copy=False).tobytes())
            sequence.update(microbatch.targets_T[part].astype("<i4", copy=False).tobytes())
            self._sequences[segment.stream_offset_tokens] = sequence.digest()
            start += segment.num_tokens

    def of(self, training: Training, step: int, dropout: float) -> bytes:
        """Return the digest, 32 bytes, of the whole step: `step` steps were done before it."""
        seeds = (seed % 2**64 for seed in values_affecting(training, Affects.RANDOMNESS))
        keys = b"".join(struct.pack("<Q", seed) for seed in seeds) + struct.pack("<Qd", step, dropout)
        return sha256(keys + b"".join(digest for _, digest in sorted(self._sequences.items()))).digest()
