"""The hash of a step's training data: steps with equal hashes trained on equal data in equal order with equal dropout.

    SHA-256 over  seed (uint64), steps done before (uint64), dropout rate (float64),
                  then the SHA-256 of each sequence of the global batch, in the batch's order:
                  tokens of the batch before it (uint64), its token ids (int32 each), its targets (int32 each)

All values are little-endian. Ids and targets are those of `Microbatch`, with a sequence's virtual tokens and without
padding. The hash is a function of dataset version, backbone, spec and step; it does not depend on neighbours, on how
the batch is packed into microbatches, on their order or on a resume. Seed, step, rate and the tokens' positions are the
key of dropout, together with the module that drops (engine/kernels/dropout.py).
"""

import struct
from hashlib import sha256

from engine.alignment.microbatch import Microbatch, Range
from engine.task import Affects, Training, values_affecting


class StepDigest:
    """Collects the hashes of a step's sequences, 32 bytes each, from its microbatches."""

    def __init__(self) -> None:
        self._sequences: dict[int, bytes] = {}  # by position in the task's own stream

    def add(self, microbatch: Microbatch, range_: Range) -> None:
        """Add the sequences of one of the task's ranges."""
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
