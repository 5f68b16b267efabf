"""The Python client of muxtune: blocking here, the same on asyncio in `muxtune.aio`.

    with Client("127.0.0.1:7401", api_key) as client:
        dataset = client.upload_dataset("replies.jsonl")
        task = client.create_task(task_pb2.TaskSpec(backbone="smollm2", dataset=dataset.name, ...))
        for event in client.watch_task(task.name):
            ...
        client.download_adapter(task.name, Path("adapter"))

Calls raise `muxtune.errors`; UNAVAILABLE is retried by itself, and a creating call repeated that way is done once.
"""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType

import grpc

from muxtune.errors import UnavailableError, raising
from muxtune.transport import (
    ADMIT_SECONDS,
    DEADLINE_SECONDS,
    STREAM_BACKOFFS_SECONDS,
    TRANSFER_SECONDS,
    CallOptions,
    FolderSink,
    Rows,
    adapter_requests,
    address_and_key,
    call_span,
    channel_options,
    credentials,
    dataset_requests,
    metadata,
    new_request_id,
    rows_as_bytes,
    target,
    watch_backoff,
)
from muxtune.v1 import admission_pb2 as pb
from muxtune.v1 import admission_pb2_grpc, artifact_pb2, dataset_pb2, task_pb2


class Client:
    """Speaks to admission with one tenant's key. Thread-safe; close it, or use it as a context manager.

    `address`: "host:port", whose name may stand for several replicas, or "ip:port,ip:port"; default: MUXTUNE_ADDRESS.
    `ca`: file with the roots of admission's certificate; default: MUXTUNE_CA, else the system's.
    """

    def __init__(self, address: str | None = None, api_key: str | None = None, ca: Path | str | None = None) -> None:
        address, self._api_key = address_and_key(address, api_key)
        secure = credentials(address, ca)
        dialled, options = target(address), channel_options(address)
        self._channel = (
            grpc.secure_channel(dialled, secure, options) if secure else grpc.insecure_channel(dialled, options)
        )
        self._stub = admission_pb2_grpc.AdmissionServiceStub(self._channel)

    def upload_dataset(
        self, rows: Path | str | bytes | Rows, dataset_id: str = "", request_id: str = ""
    ) -> dataset_pb2.Dataset:
        """A path to JSON Lines, its bytes, or rows as dicts. Sent again whole if the connection breaks."""
        data = rows_as_bytes(rows)
        header = artifact_pb2.UploadHeader(id=dataset_id, request_id=request_id or new_request_id())
        for backoff in STREAM_BACKOFFS_SECONDS:
            try:
                with call_span("UploadDataset"), raising():
                    requests = dataset_requests(header, data)
                    return self._stub.UploadDataset(requests, **self._call(TRANSFER_SECONDS)).dataset
            except UnavailableError:
                if backoff is None:
                    raise
                time.sleep(backoff)
        raise AssertionError("unreachable")

    def get_dataset(self, name: str) -> dataset_pb2.Dataset:
        with call_span("GetDataset"), raising():
            return self._stub.GetDataset(pb.GetDatasetRequest(name=name), **self._call()).dataset

    def list_datasets(self, page_size: int = 0) -> Iterator[dataset_pb2.Dataset]:
        """All of them, newest first, page by page."""
        token = ""
        while True:
            with call_span("ListDatasets"), raising():
                request = pb.ListDatasetsRequest(page_size=page_size, page_token=token)
                page = self._stub.ListDatasets(request, **self._call())
            yield from page.datasets
            if not (token := page.next_page_token):
                return

    def preflight_dataset(
        self, name: str, backbone: str, training: task_pb2.Training, num_samples: int = 0
    ) -> dataset_pb2.PreflightReport:
        """How a task would read the dataset: rendered rows, what bears loss, lengths, what is refused and why."""
        options = dataset_pb2.PreflightOptions(backbone=backbone, training=training, num_samples=num_samples)
        with call_span("PreflightDataset"), raising():
            request = pb.PreflightDatasetRequest(name=name, options=options)
            return self._stub.PreflightDataset(request, **self._call(ADMIT_SECONDS)).report

    def delete_dataset(self, name: str) -> None:
        with call_span("DeleteDataset"), raising():
            self._stub.DeleteDataset(pb.DeleteDatasetRequest(name=name), **self._call())

    def create_task(self, spec: task_pb2.TaskSpec, task_id: str = "", request_id: str = "") -> task_pb2.Task:
        """Acknowledged means durable. The same `request_id` gives the same task."""
        request = pb.CreateTaskRequest(task_id=task_id, spec=spec, request_id=request_id or new_request_id())
        with call_span("CreateTask"), raising():
            return self._stub.CreateTask(request, **self._call(ADMIT_SECONDS)).task

    def estimate_task(self, spec: task_pb2.TaskSpec) -> task_pb2.TaskEstimate:
        """What create_task would answer, storing nothing."""
        with call_span("EstimateTask"), raising():
            request = pb.EstimateTaskRequest(spec=spec)
            return self._stub.EstimateTask(request, **self._call(ADMIT_SECONDS)).estimate

    def get_task(self, name: str) -> task_pb2.Task:
        with call_span("GetTask"), raising():
            return self._stub.GetTask(pb.GetTaskRequest(name=name), **self._call()).task

    def list_tasks(
        self, states: Sequence["task_pb2.TaskState.ValueType"] = (), page_size: int = 0
    ) -> Iterator[task_pb2.Task]:
        """All of them (in these states), newest first, page by page."""
        token = ""
        while True:
            with call_span("ListTasks"), raising():
                request = pb.ListTasksRequest(page_size=page_size, page_token=token, states=states)
                page = self._stub.ListTasks(request, **self._call())
            yield from page.tasks
            if not (token := page.next_page_token):
                return

    def watch_task(self, name: str, after_sequence: int = 0) -> Iterator[task_pb2.TaskEvent]:
        """Every event after the sequence, once, until the task's end. A broken stream is opened again where it was."""
        num_failures, was_heard = 0, False
        while True:
            try:
                with raising():
                    request = pb.WatchTaskRequest(name=name, after_sequence=after_sequence)
                    for response in self._stub.WatchTask(request, metadata=metadata(self._api_key)):
                        after_sequence, was_heard, num_failures = response.event.sequence, True, 0
                        yield response.event
                    return
            except UnavailableError:
                num_failures += 1
                backoff = watch_backoff(num_failures, was_heard)
                if backoff is None:
                    raise
                time.sleep(backoff)

    def wait_task(self, name: str) -> task_pb2.Task:
        """The task when it has come to its end."""
        for _ in self.watch_task(name):
            pass
        return self.get_task(name)

    def cancel_task(self, name: str) -> task_pb2.Task:
        with call_span("CancelTask"), raising():
            return self._stub.CancelTask(pb.CancelTaskRequest(name=name), **self._call()).task

    def upload_adapter(self, folder: Path | str, adapter_id: str = "", request_id: str = "") -> artifact_pb2.Adapter:
        """A PEFT folder, to continue from as `initial_adapter`. Sent again whole if the connection breaks."""
        header = artifact_pb2.UploadHeader(id=adapter_id, request_id=request_id or new_request_id())
        parts = list(adapter_requests(header, Path(folder)))  # read before anything is sent
        for backoff in STREAM_BACKOFFS_SECONDS:
            try:
                with call_span("UploadAdapter"), raising():
                    return self._stub.UploadAdapter(iter(parts), **self._call(TRANSFER_SECONDS)).adapter
            except UnavailableError:
                if backoff is None:
                    raise
                time.sleep(backoff)
        raise AssertionError("unreachable")

    def download_adapter(self, name: str, dest: Path | str) -> Path:
        """An adapter's or a task's PEFT folder, checked; it appears at `dest` whole or not at all."""
        request = pb.DownloadAdapterRequest(name=name)
        for backoff in STREAM_BACKOFFS_SECONDS:
            try:
                with call_span("DownloadAdapter"), raising(), FolderSink(Path(dest)) as sink:
                    for response in self._stub.DownloadAdapter(request, **self._call(TRANSFER_SECONDS)):
                        sink.add(response)
                    return sink.close()
            except UnavailableError:
                if backoff is None:
                    raise
                time.sleep(backoff)
        raise AssertionError("unreachable")

    def list_adapters(self, page_size: int = 0) -> Iterator[artifact_pb2.Adapter]:
        """All of them, uploaded or left by tasks, newest first, page by page."""
        token = ""
        while True:
            with call_span("ListAdapters"), raising():
                request = pb.ListAdaptersRequest(page_size=page_size, page_token=token)
                page = self._stub.ListAdapters(request, **self._call())
            yield from page.adapters
            if not (token := page.next_page_token):
                return

    def delete_adapter(self, name: str) -> None:
        """Raises ResourceInUseError while an unfinished task starts from it."""
        with call_span("DeleteAdapter"), raising():
            self._stub.DeleteAdapter(pb.DeleteAdapterRequest(name=name), **self._call())

    def list_backbones(self) -> Sequence[pb.BackboneSummary]:
        with call_span("ListBackbones"), raising():
            return self._stub.ListBackbones(pb.ListBackbonesRequest(), **self._call()).backbones

    @property
    def channel(self) -> grpc.Channel:
        """For stubs of other services at the same address."""
        return self._channel

    def close(self) -> None:
        self._channel.close()

    def __enter__(self) -> "Client":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()

    def _call(self, seconds: float = DEADLINE_SECONDS) -> CallOptions:
        return {"timeout": seconds, "metadata": metadata(self._api_key)}
