"""A fake AdmissionService on loopback: it answers as the test configures, and records every request."""

import hashlib
import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any

import grpc
from grpc_status import rpc_status

from engine.errors import MuxtuneError
from muxtune.v1 import admission_pb2 as pb
from muxtune.v1 import admission_pb2_grpc, artifact_pb2, dataset_pb2, event_pb2, task_pb2
from services.rpc.errors import to_status

KEY = "mxt_1_right"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


class Admission(admission_pb2_grpc.AdmissionServiceServicer):
    """Fake servicer with its server. `failures` are raised by the next calls, one each. A watch yields `num_events`
    events and breaks after each of `cuts`; `download` are the responses of a download."""

    def __init__(self, credentials: grpc.ServerCredentials | None = None) -> None:
        self.failures: list[MuxtuneError] = []
        self.num_closing = 0  # calls that come just as the server closes
        self.requests: list[Any] = []
        self.uploads: list[list[Any]] = []
        self.metadata: list[dict[str, Any]] = []
        self.deadlines: list[float | None] = []
        self.num_events, self.cuts = 0, [0]
        self.download: list[pb.DownloadAdapterResponse] = []
        self.released = threading.Event()
        self._server = grpc.server(futures.ThreadPoolExecutor(8))
        admission_pb2_grpc.add_AdmissionServiceServicer_to_server(self, self._server)
        door = "127.0.0.1:0"
        port = self._server.add_secure_port(door, credentials) if credentials else self._server.add_insecure_port(door)
        self.address = f"127.0.0.1:{port}"
        self._server.start()

    def close(self) -> None:
        self.released.set()
        self._server.stop(None).wait()

    def _noted(self, request: Any, context: Any) -> None:
        self.requests.append(request)
        self.metadata.append(dict(context.invocation_metadata()))
        self.deadlines.append(context.time_remaining())
        if self.num_closing:
            self.num_closing -= 1
            context.abort(grpc.StatusCode.CANCELLED, "CANCELLED")
        if self.failures:
            context.abort_with_status(rpc_status.to_status(to_status(self.failures.pop(0))))

    def CreateTask(self, request, context):
        self._noted(request, context)
        return pb.CreateTaskResponse(task=task_pb2.Task(name="tenants/a/tasks/t", spec=request.spec))

    def EstimateTask(self, request, context):
        self._noted(request, context)
        return pb.EstimateTaskResponse(estimate=task_pb2.TaskEstimate(num_steps=7))

    def GetTask(self, request, context):
        self._noted(request, context)
        return pb.GetTaskResponse(task=task_pb2.Task(name=request.name, state=task_pb2.TASK_STATE_SUCCEEDED))

    def CancelTask(self, request, context):
        self._noted(request, context)
        return pb.CancelTaskResponse(task=task_pb2.Task(name=request.name, state=task_pb2.TASK_STATE_CANCELLING))

    def ListTasks(self, request, context):
        self._noted(request, context)
        number = int(request.page_token or 0)
        tasks = [task_pb2.Task(name=f"tenants/a/tasks/t{number}")]
        return pb.ListTasksResponse(tasks=tasks, next_page_token=str(number + 1) if number < 2 else "")

    def ListDatasets(self, request, context):
        self._noted(request, context)
        return pb.ListDatasetsResponse(datasets=[dataset_pb2.Dataset(name="tenants/a/datasets/d", num_rows=3)])

    def GetDataset(self, request, context):
        self._noted(request, context)
        return pb.GetDatasetResponse(dataset=dataset_pb2.Dataset(name=request.name))

    def DeleteDataset(self, request, context):
        self._noted(request, context)
        return pb.DeleteDatasetResponse()

    def PreflightDataset(self, request, context):
        self._noted(request, context)
        return pb.PreflightDatasetResponse(report=dataset_pb2.PreflightReport(num_rows=3))

    def ListBackbones(self, request, context):
        self._noted(request, context)
        return pb.ListBackbonesResponse(backbones=[pb.BackboneSummary(name="tiny", num_executors=1)])

    def UploadDataset(self, request_iterator, context):
        parts = list(request_iterator)
        self.uploads.append(parts)
        self._noted(parts[0], context)
        return pb.UploadDatasetResponse(dataset=dataset_pb2.Dataset(name="tenants/a/datasets/d"))

    def UploadAdapter(self, request_iterator, context):
        parts = list(request_iterator)
        self.uploads.append(parts)
        self._noted(parts[0], context)
        return pb.UploadAdapterResponse(adapter=artifact_pb2.Adapter(name="tenants/a/adapters/x"))

    def DownloadAdapter(self, request, context):
        self._noted(request, context)
        yield from self.download

    def ListAdapters(self, request, context):
        self._noted(request, context)
        number = int(request.page_token or 0)
        adapters = [artifact_pb2.Adapter(name=f"tenants/a/adapters/x{number}", size_bytes=7)]
        return pb.ListAdaptersResponse(adapters=adapters, next_page_token=str(number + 1) if number < 2 else "")

    def DeleteAdapter(self, request, context):
        self._noted(request, context)
        return pb.DeleteAdapterResponse()

    def WatchTask(self, request, context):
        self._noted(request, context)
        until = self.cuts.pop(0) if self.cuts else 0
        for number in range(request.after_sequence + 1, self.num_events + 1):
            yield pb.WatchTaskResponse(event=event_pb2.TaskEvent(sequence=number))
            if number == until:
                context.abort(grpc.StatusCode.UNAVAILABLE, "cut")


def file_parts(name: str, data: bytes, announced: bytes | None = None) -> Iterator[pb.DownloadAdapterResponse]:
    """Yield a file of a download in two chunks. `announced`: the contents that its header describes, if others."""
    promised = data if announced is None else announced
    digest = hashlib.sha256(promised).hexdigest()
    header = artifact_pb2.FileHeader(file_name=name, size_bytes=len(promised), sha256=digest)
    yield pb.DownloadAdapterResponse(file=header)
    for start, end in ((0, len(data) // 2), (len(data) // 2, len(data))):
        yield pb.DownloadAdapterResponse(chunk=artifact_pb2.FileChunk(offset=start, data=data[start:end]))


Change = Callable[[list[pb.DownloadAdapterResponse]], None]
