"""Microbatches in their buckets hold the same sequences and losses, read back token by token."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from engine.alignment.microbatch import IGNORE, Microbatch, MicrobatchKind, Range, Segment
from engine.methods import Lora
from engine.runtime.graph_buckets import GraphBucket, GraphInputs, bucket_of, pack_inputs, unpack_losses
from tests.thoroughness import examples

RANGES = st.lists(
    st.tuples(st.lists(st.integers(1, 40), min_size=1, max_size=5), st.integers(0, 15)), min_size=1, max_size=5
)


def tasks_of(names: Any) -> Any:
    """Returns tasks with the attributes that a bucket reads."""
    method = Lora(1, 1.0, ("all-linear",))
    spec = SimpleNamespace(method=method)
    return {
        name: SimpleNamespace(assignment=SimpleNamespace(task=name, spec=spec), adapters={"": None}) for name in names
    }


def microbatch_of(ranges: Any, seed: int) -> Microbatch:
    """Returns a microbatch of ranges of (lengths, tail). Their names are not in the stream's order."""
    random, start, packed_ranges = np.random.default_rng(seed), 0, []
    for i, (lengths, tail) in enumerate(ranges):
        offsets = [int(random.integers(0, 1000)) for _ in lengths]
        segments = tuple(Segment(n, at) for n, at in zip(lengths, offsets, strict=True))
        name, size = str(9 - i), sum(lengths) + tail
        packed_ranges.append(
            Range(name, int(random.integers(0, 9)), start, size, segments, int(random.integers(1, 50)), True)
        )
        start += size
    ids_T = random.integers(1, 1000, start).astype(np.int32)
    targets_T = np.where(random.random(start) < 0.5, ids_T + 1, IGNORE).astype(np.int32)
    for range_ in packed_ranges:
        targets_T[range_.start + range_.num_effective_tokens : range_.start + range_.num_tokens] = IGNORE
    return Microbatch(0, MicrobatchKind.TRAIN, ids_T, targets_T, tuple(packed_ranges), True)


@settings(deadline=None, max_examples=examples(60))
@given(ranges=RANGES, seed=st.integers(0, 2**31), has_left=st.booleans())
def test_every_token_is_in_its_bucket_and_its_loss_is_returned(ranges: Any, seed: int, has_left: bool) -> None:
    microbatch = microbatch_of(ranges, seed)
    names = [r.task for r in microbatch.ranges][: -1 if has_left and len(ranges) > 1 else None]
    bucket = bucket_of(microbatch, tasks_of(names))
    assume(bucket is not None)  # otherwise it would grow too much
    assert bucket is not None and [task.assignment.task for task in bucket.tasks] == sorted(names)
    inputs = GraphInputs(bucket, torch.device("cpu"))
    inputs.write(pack_inputs(bucket, microbatch))
    assert len(set(inputs.rows_M.tolist())) == bucket.num_rows
    rows, losses = (t.tolist() for t in unpack_losses(bucket, microbatch, inputs.rows_M.double()))
    loss_of = dict(zip(rows, losses, strict=True))
    bounds = inputs.bounds_S.tolist()
    assert bounds[0] == 0 and bounds[-1] == bucket.num_tokens and sorted(bounds) == bounds
    assert max(np.diff(bounds)) <= bucket.num_range_tokens and len(loss_of) == len(rows)
    for range_ in microbatch.ranges:
        if range_.task in names:
            check(bucket, inputs, microbatch, range_, loss_of, bounds)
    assert len(loss_of) == sum(
        int((microbatch.targets_T[r.start : r.start + r.num_tokens] != IGNORE).sum())
        for r in microbatch.ranges
        if r.task in names
    )


def test_large_microbatches_and_those_that_would_grow_much_have_no_bucket() -> None:
    def bucket(*lengths: int) -> GraphBucket | None:
        microbatch = microbatch_of([([n], 0) for n in lengths], 0)
        return bucket_of(microbatch, tasks_of([r.task for r in microbatch.ranges]))

    assert bucket(2049) is None and bucket(2, 200) is not None and bucket(2, 600) is None
    large = bucket(1000, 900)
    assert large is not None and large.num_tokens == 2048


def check(
    bucket: GraphBucket, inputs: GraphInputs, microbatch: Microbatch, range_: Range, loss_of: Any, bounds: list[int]
) -> None:
    """Checks that the range has its tokens, then the same repeated, with bounds at each sequence and no weight on
    copies."""
    span = next(span for span in inputs.spans if span.task == range_.task)
    assert span.end - span.start == bucket.num_range_tokens >= range_.num_effective_tokens
    assert span.device_step is not None and int(span.device_step) == range_.step
    assert span.device_positions_T is not None
    at, copy, places, ids, positions, rows, weights, targets = span.start, 0, *(
        t.tolist()
        for t in (
            span.device_positions_T, inputs.token_ids_T, inputs.positions_T, inputs.rows_M, inputs.weights_M,
            inputs.targets_M,
        )
    )  # fmt: skip
    weight_of, target_of = dict(zip(rows, weights, strict=True)), dict(zip(rows, targets, strict=True))
    while at < span.end:
        place = range_.start
        for segment in range_.segments:
            for offset in range(segment.num_tokens):
                if at == span.end:
                    return
                assert (at in bounds) == (offset == 0)
                assert ids[at] == int(microbatch.token_ids_T[place])
                assert positions[at] == offset
                assert places[at] == segment.stream_offset_tokens + offset
                target = int(microbatch.targets_T[place])
                bears_loss = target != IGNORE and not copy
                if bears_loss:
                    assert weight_of[at] == 1 / range_.num_step_target_tokens and target_of[at] == target
                    assert loss_of[place] == at
                else:
                    assert weight_of.get(at, 0) == 0 == target_of.get(at, 0)
                at, place = at + 1, place + 1
        copy += 1
