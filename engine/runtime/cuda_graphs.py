"""Runs small microbatches as CUDA graphs: captured once for a bucket, replayed for all others of it (docs/adr/0015).

A microbatch of few tokens is bound by the host, which launches some thousand kernels for it one by one; a replay is one
launch. A graph contains forward, losses, backward and the sums into the tasks' gradients, but not the optimizers, which
are two launches for all tasks. A bucket runs eagerly when it is first seen and is captured when it comes again. Its
graph is used once its first replay has given the results of an eager pass over the same tokens.

Legend: T tokens of the stream, M rows of them that bear a loss, P parameters of a task.
"""

import gc
import logging
import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from engine.alignment.microbatch import Microbatch
from engine.kernels.cupy_launcher import CupyLauncher, launcher_of
from engine.kernels.launch import LruCache
from engine.kernels.segment_cross_entropy import segment_cross_entropy
from engine.runtime.backbone import Backbone
from engine.runtime.graph_buckets import GraphBucket, GraphInputs, RowLosses, bucket_of, pack_inputs, unpack_losses
from engine.runtime.out_of_memory import OutOfMemoryError, is_out_of_memory, within_memory
from engine.runtime.task_state import TaskTrainingState
from engine.runtime.varlen_attention import AttentionCache, SegmentBounds

Work = Callable[[], torch.Tensor]
_MAX_SEEN_BUCKETS = 1024
_IDLE_RUNS = 16  # times the capacity: a graph that was not replayed for so many runs may be replaced
_LOSS_TOLERANCE, _GRADIENT_TOLERANCE = 1e-3, 1e-2  # relative; the order of sums in flash attention's backward varies
_log = logging.getLogger(__name__)


class Recording(Protocol):
    """Records work as one graph."""

    def run(self, work: Work) -> torch.Tensor:
        """Runs the work as the capture will run it. Raises what the work raises."""

    def capture(self, work: Work) -> None:
        """Records the work without running it."""

    def replay(self) -> torch.Tensor:
        """Runs the recorded work on the same memory. The next replay overwrites the result."""


class _Graph:
    """The recording of a bucket. `is_verified`: its replay gave the results of an eager pass."""

    def __init__(self, bucket: GraphBucket, inputs: GraphInputs, recording: Recording, work: Work) -> None:
        self.bucket, self.inputs, self.recording, self.work = bucket, inputs, recording, work
        self.is_verified, self.last_run = False, 0


class CudaGraphs:
    """Holds at most `capacity` graphs of one backbone. Not thread-safe, like the executor."""

    def __init__(self, backbone: Backbone, capacity: int, recorder: Callable[[], Recording]) -> None:
        self._backbone, self._capacity, self._recorder = backbone, capacity, recorder
        self._seen: OrderedDict[GraphBucket, bool] = OrderedDict()  # by bucket, whether it may be captured
        self._graphs: dict[GraphBucket, _Graph] = {}
        self._num_runs = 0
        self._is_off = not backbone.is_all_varlen

    @classmethod
    def of(cls, backbone: Backbone, capacity: int) -> "CudaGraphs | None":
        """Returns None without a CUDA device or with capacity 0."""
        is_usable = capacity > 0 and backbone.device.type == "cuda"
        return cls(backbone, capacity, CudaRecorder(backbone.device)) if is_usable else None

    def __len__(self) -> int:
        return len(self._graphs)

    def run(self, microbatch: Microbatch, tasks: Mapping[str, TaskTrainingState]) -> RowLosses | None:
        """Runs the microbatch in its bucket. A training microbatch adds to the tasks' gradients.

        Returns None, before anything has run, if the caller must run it eagerly. Raises OutOfMemoryError.
        """
        bucket = None if self._is_off else bucket_of(microbatch, tasks)
        if bucket is None:
            return None
        self._num_runs += 1
        graph = self._graphs.get(bucket)
        if graph is None and not self._may_capture(bucket):
            return None
        try:
            loss_M = within_memory(lambda: self._losses(bucket, graph, pack_inputs(bucket, microbatch)))
        except OutOfMemoryError:
            self._refuse(bucket)  # run eagerly, the microbatch may need less memory
            raise
        return None if loss_M is None else unpack_losses(bucket, microbatch, loss_M)

    def forget(self, state: TaskTrainingState) -> None:
        """Forgets every bucket that contains the task."""
        for bucket in [bucket for bucket in (*self._seen, *self._graphs) if state in bucket.tasks]:
            self._seen.pop(bucket, None)
            self._graphs.pop(bucket, None)

    def clear(self) -> None:
        """Releases the memory of all graphs to the allocator's cache."""
        self._graphs.clear()

    def _may_capture(self, bucket: GraphBucket) -> bool:
        """Returns whether the bucket may be captured.

        It must have been seen before and not refused, and there must be room or an idle graph, which is removed.
        """
        if bucket not in self._seen:
            self._seen[bucket] = True
            if len(self._seen) > _MAX_SEEN_BUCKETS:
                self._seen.popitem(last=False)
            return False
        if not self._seen[bucket] or len(self._graphs) < self._capacity:
            return self._seen[bucket]
        oldest = min(self._graphs.values(), key=lambda graph: graph.last_run)
        if self._num_runs - oldest.last_run < _IDLE_RUNS * self._capacity:
            return False
        del self._graphs[oldest.bucket]
        return True

    def _losses(self, bucket: GraphBucket, graph: _Graph | None, values: NDArray[np.int64]) -> torch.Tensor | None:
        """Returns the losses [M] of the bucket's rows, on the host."""
        if graph is None:
            loss_M = self._record(bucket, values)
        else:
            graph.last_run = self._num_runs
            graph.inputs.write(values)
            loss_M = graph.recording.replay() if graph.is_verified else self._verify(graph)
        return None if loss_M is None else loss_M.cpu()

    def _record(self, bucket: GraphBucket, values: NDArray[np.int64]) -> torch.Tensor | None:
        """Runs this microbatch, then captures a graph of it.

        A failed capture costs only the graph: nothing has run twice.

        Returns None if the microbatch does not run in its bucket, which shows before any gradient is written.
        """
        inputs, recording = GraphInputs(bucket, self._backbone.device), self._recorder()
        inputs.write(values)
        work = partial(self._forward_backward, bucket, inputs)
        versions = [state.gradient_P._version for state in bucket.tasks]
        try:
            loss_M = recording.run(work)
        except RuntimeError as error:
            if is_out_of_memory(error) or versions != [state.gradient_P._version for state in bucket.tasks]:
                raise
            self._disable(f"a bucket does not run: {error}")
            return None
        try:
            within_memory(lambda: recording.capture(work))
        except OutOfMemoryError as error:
            _log.warning("No memory for a graph of %d tokens: %s", bucket.num_tokens, error)
            self._refuse(bucket)
        except Exception as error:  # libraries raise many types for work that cannot be captured
            self._disable(f"a capture failed: {error}")
        else:
            graph = self._graphs[bucket] = _Graph(bucket, inputs, recording, work)
            graph.last_run = self._num_runs
        return loss_M

    def _verify(self, graph: _Graph) -> torch.Tensor | None:
        """Replays the graph, runs the same eagerly, and compares. The eager results are the ones that count.

        Returns None, before anything has run, if memory is too short to compare. Results that are not finite verify
        nothing.
        """
        gradients = [state.gradient_P for state in graph.bucket.tasks] if graph.bucket.trains else []
        try:
            copies, spare = within_memory(lambda: _copies(gradients))
        except OutOfMemoryError:
            self._refuse(graph.bucket)
            return None
        replayed_M = graph.recording.replay().clone()
        sizes = [torch.dist(gradient_P, copy_P) for gradient_P, copy_P in zip(gradients, copies, strict=True)]
        for gradient_P, copy_P in zip(gradients, copies, strict=True):
            copy_P.copy_(_swap(gradient_P, copy_P, spare))
        loss_M = graph.recording.run(graph.work)
        triples = zip(sizes, gradients, copies, strict=True)
        differences = [
            (_GRADIENT_TOLERANCE * size, torch.dist(eager_P, replayed_P)) for size, eager_P, replayed_P in triples
        ]
        differences.append((_LOSS_TOLERANCE * loss_M.norm(), torch.dist(loss_M, replayed_M)))
        if bool(torch.stack([loss_M.norm(), *(gradient_P.norm() for gradient_P in gradients)]).isfinite().all()):
            graph.is_verified = all(bool(difference <= limit) for limit, difference in differences)
            if not graph.is_verified:
                self._disable("a replay and an eager pass gave different results")
        return loss_M

    def _refuse(self, bucket: GraphBucket) -> None:
        self._seen[bucket] = False
        self._graphs.pop(bucket, None)

    def _disable(self, reason: str) -> None:
        _log.error("CUDA graphs are disabled from now on: %s", reason)
        self._is_off = True
        self._graphs.clear()

    def _forward_backward(self, bucket: GraphBucket, inputs: GraphInputs) -> torch.Tensor:
        """Returns the losses [M] of the bucket's rows. A training bucket adds to the tasks' gradients.

        Reads only device memory.
        """
        backbone, has_no_loss_M = self._backbone, inputs.weights_M == 0
        backbone.layout.lay_out_spans(inputs.spans, bucket.trains)
        cache = AttentionCache(bounds=SegmentBounds(inputs.bounds_S.to(torch.int32), bucket.num_range_tokens))
        with torch.set_grad_enabled(bucket.trains):
            hidden_TH = backbone.packed_hidden(
                inputs.token_ids_T.unsqueeze(0), inputs.positions_T.unsqueeze(0), [], cache
            )
        loss_M, dhidden_MH = segment_cross_entropy(
            backbone.head,
            hidden_TH.detach()[inputs.rows_M],
            inputs.targets_M,
            inputs.weights_M if bucket.trains else None,
        )
        if dhidden_MH is not None and hidden_TH.requires_grad:
            dhidden_MH.masked_fill_(has_no_loss_M.unsqueeze(1), 0)  # a weight of 0 would not remove NaN
            torch.autograd.backward(hidden_TH, torch.zeros_like(hidden_TH).index_copy_(0, inputs.rows_M, dhidden_MH))
        return loss_M.double().masked_fill_(has_no_loss_M, 0)


def _copies(tensors: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Returns a copy of each tensor, and memory for one more."""
    return [tensor.clone() for tensor in tensors], torch.empty_like(
        max(tensors, key=torch.numel, default=torch.empty(0))
    )


def _swap(tensor: torch.Tensor, other: torch.Tensor, spare: torch.Tensor) -> torch.Tensor:
    """Copies `other` into `tensor`. Returns the previous values of `tensor`, in `spare`."""
    previous = spare[: tensor.numel()].copy_(tensor)
    tensor.copy_(other)
    return previous


class CudaRecorder:
    """Creates recordings that share one stream and one memory pool.

    They may share them because a replay's results are read before the next replay.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = torch.device("cuda", device.index if device.index is not None else torch.cuda.current_device())
        self.stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        launcher = launcher_of(self.device)
        assert isinstance(launcher, CupyLauncher)
        self.launcher = launcher
        self.captured = weakref.WeakSet[torch.cuda.CUDAGraph]()

    def __call__(self) -> "CudaRecording":
        return CudaRecording(self)


class CudaRecording:
    """Holds a torch.cuda.CUDAGraph and the tables that its kernels read."""

    def __init__(self, recorder: CudaRecorder) -> None:
        self._recorder, self._cache = recorder, LruCache(None)
        self._graph = torch.cuda.CUDAGraph()
        self._result: torch.Tensor | None = None

    def run(self, work: Work) -> torch.Tensor:
        """Runs the work on the stream of the capture, which creates its workspaces, kernels and tables."""
        stream, current = self._recorder.stream, torch.cuda.current_stream(self._recorder.device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream), self._recorder.launcher.using_cache(self._cache):
            result = work()
        current.wait_stream(stream)
        result.record_stream(current)
        return result

    def capture(self, work: Work) -> None:
        """Captures the work.

        Other threads may continue to copy (`thread_local`). Autograd nodes that are garbage would bring another stream
        into the capture, so they are collected first.
        """
        recorder = self._recorder
        gc.collect()
        pool = next((graph.pool() for graph in recorder.captured), None)
        graph = torch.cuda.graph(self._graph, pool, recorder.stream, capture_error_mode="thread_local")
        with (
            recorder.launcher.capturing(),
            recorder.launcher.using_cache(self._cache),
            torch.cuda.stream(recorder.stream),  # restores the stream also after a failed capture
            graph,
        ):
            self._result = work()
        recorder.captured.add(self._graph)

    def replay(self) -> torch.Tensor:
        assert self._result is not None
        self._graph.replay()
        return self._result
