"""Converts microbatches between protobuf and the engine's dataclasses.

Legend: T tokens of a microbatch.
"""

import numpy as np
from numpy.typing import NDArray

from engine.alignment.microbatch import Microbatch, MicrobatchKind, Range, Segment
from engine.errors import InvalidInputError
from muxtune.v1 import alignment_pb2

_KINDS = {
    MicrobatchKind.TRAIN: alignment_pb2.MICROBATCH_KIND_TRAIN,
    MicrobatchKind.EVALUATE: alignment_pb2.MICROBATCH_KIND_EVALUATE,
}


def microbatch_to_proto(microbatch: Microbatch) -> alignment_pb2.Microbatch:
    return alignment_pb2.Microbatch(
        round=microbatch.round,
        kind=_KINDS[microbatch.kind],
        token_ids=microbatch.token_ids_T.astype("<i4", copy=False).tobytes(),
        targets=microbatch.targets_T.astype("<i4", copy=False).tobytes(),
        ranges=[_range_to_proto(range_) for range_ in microbatch.ranges],
        is_last_in_round=microbatch.is_last_in_round,
    )


def microbatch_to_domain(message: alignment_pb2.Microbatch) -> Microbatch:
    """Return the microbatch. Raises InvalidInputError if tokens, targets, ranges and segments do not match."""
    token_ids_T = _int32(message.token_ids, "token_ids")
    targets_T = _int32(message.targets, "targets")
    ranges = tuple(_range_to_domain(range_) for range_ in message.ranges)
    end = 0
    for range_ in ranges:
        if range_.start != end:
            raise InvalidInputError.of_field(
                "ranges", f"the range of {range_.task} starts at {range_.start}, not at {end}"
            )
        if any(s.num_tokens < 1 for s in range_.segments) or range_.num_effective_tokens > range_.num_tokens:
            raise InvalidInputError.of_field(
                "ranges.segments",
                f"those of {range_.task} have {range_.num_effective_tokens} tokens, its range {range_.num_tokens}",
            )
        end += range_.num_tokens
    if not len(token_ids_T) == len(targets_T) == end:
        raise InvalidInputError.of_field(
            "token_ids",
            f"{len(token_ids_T)} tokens do not match {len(targets_T)} targets and {end} tokens in ranges",
        )
    kind = next((k for k, v in _KINDS.items() if v == message.kind), None)
    if kind is None:
        raise InvalidInputError.of_field("kind", f"{message.kind} is not a kind of microbatch")
    return Microbatch(message.round, kind, token_ids_T, targets_T, ranges, message.is_last_in_round)


def _int32(data: bytes, field: str) -> NDArray[np.int32]:
    if len(data) % 4:
        raise InvalidInputError.of_field(field, f"{len(data)} bytes are not a multiple of 4 (int32)")
    return np.frombuffer(data, dtype="<i4").astype(np.int32)


def _range_to_proto(range_: Range) -> alignment_pb2.Range:
    return alignment_pb2.Range(
        task=range_.task,
        step=range_.step,
        start=range_.start,
        num_tokens=range_.num_tokens,
        segments=[
            alignment_pb2.Segment(num_tokens=s.num_tokens, stream_offset_tokens=s.stream_offset_tokens)
            for s in range_.segments
        ],
        num_step_target_tokens=range_.num_step_target_tokens,
        is_last=range_.is_last,
    )


def _range_to_domain(message: alignment_pb2.Range) -> Range:
    segments = tuple(Segment(s.num_tokens, s.stream_offset_tokens) for s in message.segments)
    return Range(
        message.task,
        message.step,
        message.start,
        message.num_tokens,
        segments,
        message.num_step_target_tokens,
        message.is_last,
    )
