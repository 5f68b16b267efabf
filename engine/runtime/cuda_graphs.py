"""Small microbatches as CUDA graphs: captured once for a form, replayed for every other of it (docs/adr/0015).

A microbatch of few tokens is bound by the host, which launches some thousand kernels for it one by one; a replay is one
launch. Forward, losses, backward and the sums into the tasks' gradients are in a graph; optimizers are two launches for
all tasks and are not. A form is run eagerly when it is first seen, is captured when it comes again, and its graph is
believed once its first replay has given what an eager pass over the same tokens gave.

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
from engine.kernels.launch import Memory
from engine.kernels.segment_cross_entropy import segment_cross_entropy
from engine.runtime.backbone import Backbone
from engine.runtime.graph_buckets import GraphBucket, GraphInputs, form_of, packed, unpacked
from engine.runtime.out_of_memory import OutOfMemoryError, is_out_of_memory, within_memory
from engine.runtime.task_state import TaskTrainingState
from engine.runtime.varlen_attention import Shared

Work = Callable[[], torch.Tensor]
_MOST_FORMS = 1024  # that are remembered to have been seen
_IDLE_RUNS = 16  # for each graph there may be: one that was not replayed for so long makes room for another
_LOSS_TOLERANCE, _GRADIENT_TOLERANCE = 1e-3, 1e-2  # relative; flash attention's backward adds in no fixed order
_log = logging.getLogger(__name__)


class Recording(Protocol):
    """What becomes one graph."""

    def run(self, work: Work) -> torch.Tensor:
        """Runs it as it is going to be captured. What it raises passes."""

    def capture(self, work: Work) -> None:
        """Records it; nothing of it runs."""

    def replay(self) -> torch.Tensor:
        """Runs what was recorded, on the same memory. The next replay overwrites its answer."""


class _Graph:
    """A form's recording. `is_proven`: its replay was compared."""

    def __init__(self, form: GraphBucket, inputs: GraphInputs, recording: Recording, work: Work) -> None:
        self.form, self.inputs, self.recording, self.work = form, inputs, recording, work
        self.is_proven, self.last_run = False, 0


class CudaGraphs:
    """The graphs of one backbone, at most `capacity`. Not thread-safe, as the executor."""

    def __init__(self, backbone: Backbone, capacity: int, recorder: Callable[[], Recording]) -> None:
        self._backbone, self._capacity, self._recorder = backbone, capacity, recorder
        self._seen: OrderedDict[GraphBucket, bool] = OrderedDict()  # and whether it may be captured
        self._graphs: dict[GraphBucket, _Graph] = {}
        self._num_runs = 0
        self._is_off = not backbone.is_all_varlen

    @classmethod
    def of(cls, backbone: Backbone, capacity: int) -> "CudaGraphs | None":
        """None where there are to be none, or no CUDA device is there to have them."""
        is_there = capacity > 0 and backbone.device.type == "cuda"
        return cls(backbone, capacity, CudaRecorder(backbone.device)) if is_there else None

    def __len__(self) -> int:
        return len(self._graphs)

    def run(
        self, microbatch: Microbatch, tasks: Mapping[str, TaskTrainingState]
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """(rows [M] that bear a loss, losses [M]), on the host; where it trains, gradients go to the tasks' own.

        None where it is to be run as any other, which is then not begun. Raises NoMemory.
        """
        form = None if self._is_off else form_of(microbatch, tasks)
        if form is None:
            return None
        self._num_runs += 1
        graph = self._graphs.get(form)
        if graph is None and not self._may_capture(form):
            return None
        try:
            loss_M = within_memory(lambda: self._losses(form, graph, packed(form, microbatch)))
        except OutOfMemoryError:
            self._refuse(form)  # the microbatch as it is may be smaller
            raise
        return None if loss_M is None else unpacked(form, microbatch, loss_M)

    def forget(self, run: TaskTrainingState) -> None:
        """Every form with this task in it."""
        for form in [form for form in (*self._seen, *self._graphs) if run in form.runs]:
            self._seen.pop(form, None)
            self._graphs.pop(form, None)

    def clear(self) -> None:
        """Gives all graphs' memory back, to the allocator's cache."""
        self._graphs.clear()

    def _may_capture(self, form: GraphBucket) -> bool:
        """When it is seen again, unless it was refused, and if there is room or a graph is idle, which goes."""
        if form not in self._seen:
            self._seen[form] = True
            if len(self._seen) > _MOST_FORMS:
                self._seen.popitem(last=False)
            return False
        if not self._seen[form] or len(self._graphs) < self._capacity:
            return self._seen[form]
        oldest = min(self._graphs.values(), key=lambda graph: graph.last_run)
        if self._num_runs - oldest.last_run < _IDLE_RUNS * self._capacity:
            return False
        del self._graphs[oldest.form]
        return True

    def _losses(self, form: GraphBucket, graph: _Graph | None, values: NDArray[np.int64]) -> torch.Tensor | None:
        """[M], of the form's rows, on the host."""
        if graph is None:
            loss_M = self._record(form, values)
        else:
            graph.last_run = self._num_runs
            graph.inputs.write(values)
            loss_M = graph.recording.replay() if graph.is_proven else self._prove(graph)
        return None if loss_M is None else loss_M.cpu()

    def _record(self, form: GraphBucket, values: NDArray[np.int64]) -> torch.Tensor | None:
        """This microbatch runs for real, as it is going to be captured; then it is. A failure of that costs the graph
        alone: nothing has run.

        None where it does not run in its form: what is refused is refused before a gradient is written to.
        """
        inputs, recording = GraphInputs(form, self._backbone.device), self._recorder()
        inputs.write(values)
        work = partial(self._forward_backward, form, inputs)
        before = [run.gradient_P._version for run in form.runs]
        try:
            loss_M = recording.run(work)
        except RuntimeError as error:
            if is_out_of_memory(error) or before != [run.gradient_P._version for run in form.runs]:
                raise
            self._turn_off(f"a form does not run: {error}")
            return None
        try:
            within_memory(lambda: recording.capture(work))
        except OutOfMemoryError as error:
            _log.warning("no memory for a graph of %d tokens: %s", form.num_tokens, error)
            self._refuse(form)
        except Exception as error:  # whatever a library raises for what may not be captured
            self._turn_off(f"a capture failed: {error}")
        else:
            graph = self._graphs[form] = _Graph(form, inputs, recording, work)
            graph.last_run = self._num_runs
        return loss_M

    def _prove(self, graph: _Graph) -> torch.Tensor | None:
        """A replay, and an eager pass over the same, whose results stand and which it has to have given.

        None, and nothing is begun, where there is no memory to compare them. What is not finite proves nothing.
        """
        gradients = [run.gradient_P for run in graph.form.runs] if graph.form.trains else []
        try:
            kept, spare = within_memory(lambda: _copies(gradients))
        except OutOfMemoryError:
            self._refuse(graph.form)
            return None
        replayed_M = graph.recording.replay().clone()
        sizes = [torch.dist(gradient_P, own_P) for gradient_P, own_P in zip(gradients, kept, strict=True)]
        for gradient_P, own_P in zip(gradients, kept, strict=True):
            own_P.copy_(_swapped(gradient_P, own_P, spare))
        loss_M = graph.recording.run(graph.work)
        pairs = zip(sizes, gradients, kept, strict=True)
        differences = [(_GRADIENT_TOLERANCE * size, torch.dist(ours_P, own_P)) for size, ours_P, own_P in pairs]
        differences.append((_LOSS_TOLERANCE * loss_M.norm(), torch.dist(loss_M, replayed_M)))
        if bool(torch.stack([loss_M.norm(), *(gradient_P.norm() for gradient_P in gradients)]).isfinite().all()):
            graph.is_proven = all(bool(difference <= most) for most, difference in differences)
            if not graph.is_proven:
                self._turn_off("a replay gave other results than an eager pass")
        return loss_M

    def _refuse(self, form: GraphBucket) -> None:
        self._seen[form] = False
        self._graphs.pop(form, None)

    def _turn_off(self, why: str) -> None:
        _log.error("CUDA graphs are off from here on: %s", why)
        self._is_off = True
        self._graphs.clear()

    def _forward_backward(self, form: GraphBucket, inputs: GraphInputs) -> torch.Tensor:
        """Losses [M] of the form's rows; gradients go to the tasks' own. Reads nothing but device memory."""
        backbone, bears_none_M = self._backbone, inputs.weights_M == 0
        backbone.layout.lay(inputs.spans, form.trains)
        shared = Shared(bounds=(inputs.bounds_S.to(torch.int32), form.num_range_tokens))
        with torch.set_grad_enabled(form.trains):
            hidden_TH = backbone.packed_hidden(
                inputs.token_ids_T.unsqueeze(0), inputs.positions_T.unsqueeze(0), [], shared
            )
        loss_M, dhidden_MH = segment_cross_entropy(
            backbone.head,
            hidden_TH.detach()[inputs.rows_M],
            inputs.targets_M,
            inputs.weights_M if form.trains else None,
        )
        if dhidden_MH is not None and hidden_TH.requires_grad:
            dhidden_MH.masked_fill_(bears_none_M.unsqueeze(1), 0)  # what is no number is not made one by a weight of 0
            torch.autograd.backward(hidden_TH, torch.zeros_like(hidden_TH).index_copy_(0, inputs.rows_M, dhidden_MH))
        return loss_M.double().masked_fill_(bears_none_M, 0)


def _copies(tensors: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], torch.Tensor]:
    """(one of each, room for one more)."""
    return [tensor.clone() for tensor in tensors], torch.empty_like(
        max(tensors, key=torch.numel, default=torch.empty(0))
    )


def _swapped(tensor: torch.Tensor, other: torch.Tensor, spare: torch.Tensor) -> torch.Tensor:
    """What was in `tensor`, which has `other`'s from now on."""
    was = spare[: tensor.numel()].copy_(tensor)
    tensor.copy_(other)
    return was


class CudaRecorder:
    """Begins recordings that share one stream and one pool of memory: a replay's results are read before the next."""

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
    """A torch.cuda.CUDAGraph, and the tables that its kernels read."""

    def __init__(self, recorder: CudaRecorder) -> None:
        self._recorder, self._memory = recorder, Memory(None)
        self._graph = torch.cuda.CUDAGraph()
        self._result: torch.Tensor | None = None

    def run(self, work: Work) -> torch.Tensor:
        """On the stream of the capture: its workspaces, kernels and tables are there then."""
        stream, current = self._recorder.stream, torch.cuda.current_stream(self._recorder.device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream), self._recorder.launcher.remembering(self._memory):
            result = work()
        current.wait_stream(stream)
        result.record_stream(current)
        return result

    def capture(self, work: Work) -> None:
        """Other threads may go on copying (`thread_local`). Nodes of autograd that are garbage would bring another
        stream into it, so there are to be none."""
        recorder = self._recorder
        gc.collect()
        pool = next((graph.pool() for graph in recorder.captured), None)
        graph = torch.cuda.graph(self._graph, pool, recorder.stream, capture_error_mode="thread_local")
        with (
            recorder.launcher.captured(),
            recorder.launcher.remembering(self._memory),
            torch.cuda.stream(recorder.stream),  # whose end sets the stream back, which a failed capture does not
            graph,
        ):
            self._result = work()
        recorder.captured.add(self._graph)

    def replay(self) -> torch.Tensor:
        assert self._result is not None
        self._graph.replay()
        return self._result
