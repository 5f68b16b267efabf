# Written by tools/client_code.py from muxtune/aio.py.
"""The blocking client of muxtune; `muxtune.aio` is the asyncio one, with the same methods.

    with Client("127.0.0.1:7401", api_key) as client:
        dataset = client.upload_dataset("replies.jsonl")
        task = client.create_task(task_pb2.TaskSpec(backbone="smollm2", dataset=dataset.name, ...))
        for event in client.watch_task(task.name):
            ...
        client.download_adapter(task.name, "adapter")

Calls raise `muxtune.errors`. Calls that end UNAVAILABLE are repeated for about nine seconds; a repeated call that
creates something creates it once.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, TypeVar

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
from muxtune.v1 import admission_pb2_grpc, artifact_pb2, dataset_pb2, event_pb2, task_pb2


class _Page(Protocol):
    @property
    def next_page_token(self) -> str: ...


Request = TypeVar("Request")
Response = TypeVar("Response")
Result = TypeVar("Result")
Page = TypeVar("Page", bound=_Page)


class Client:
    """Calls admission with one API key, from any thread. Close it, or use it as a context manager.

    `address`: "host:port", a name that may resolve to several replicas, or "ip:port,ip:port"; default: MUXTUNE_ADDRESS.
    `api_key`: default: MUXTUNE_API_KEY. `ca`: a file with the CA of admission's certificate; default: MUXTUNE_CA, else
    the system's CAs.
    """

    def __init__(self, address: str | None = None, api_key: str | None = None, ca: Path | str | None = None) -> None:
        address, self._api_key = address_and_key(address, api_key)
        secure, server, options = credentials(address, ca), target(address), channel_options(address)
        self._channel = (
            grpc.secure_channel(server, secure, options) if secure else grpc.insecure_channel(server, options)
        )
        self._stub: admission_pb2_grpc.AdmissionServiceStub = admission_pb2_grpc.AdmissionServiceStub(self._channel)

    def upload_dataset(
        self, rows: Path | str | bytes | Rows, dataset_id: str = "", request_id: str = ""
    ) -> dataset_pb2.Dataset:
        """Upload a dataset: the path of a JSON Lines file, its bytes, or rows as dicts.

        If the connection breaks, the upload is sent again from its start.
        """
        data = rows_as_bytes(rows)
        header = artifact_pb2.UploadHeader(id=dataset_id, request_id=request_id or new_request_id())
        upload = self._stub.UploadDataset
        return self._upload("UploadDataset", upload, lambda: dataset_requests(header, data)).dataset

    def get_dataset(self, name: str) -> dataset_pb2.Dataset:
        """Return a dataset."""
        return self._call(self._stub.GetDataset, pb.GetDatasetRequest(name=name)).dataset

    def list_datasets(self, page_size: int = 0) -> Iterator[dataset_pb2.Dataset]:
        """Iterate over all datasets, newest first; pages are read as needed."""
        for page in self._pages(self._stub.ListDatasets, pb.ListDatasetsRequest(page_size=page_size)):
            yield from page.datasets

    def preflight_dataset(
        self, name: str, backbone: str, training: task_pb2.Training, num_samples: int = 0
    ) -> dataset_pb2.PreflightReport:
        """Return how a task would read a dataset: rendered rows, tokens that bear loss, lengths, refused rows."""
        options = dataset_pb2.PreflightOptions(backbone=backbone, training=training, num_samples=num_samples)
        request = pb.PreflightDatasetRequest(name=name, options=options)
        return self._call(self._stub.PreflightDataset, request, ADMIT_SECONDS).report

    def delete_dataset(self, name: str) -> None:
        """Delete a dataset. Raises ResourceInUseError while an unfinished task reads it."""
        self._call(self._stub.DeleteDataset, pb.DeleteDatasetRequest(name=name))

    def create_task(self, spec: task_pb2.TaskSpec, task_id: str = "", request_id: str = "") -> task_pb2.Task:
        """Create a task. It is durable when this returns; the same `request_id` returns the same task."""
        request = pb.CreateTaskRequest(task_id=task_id, spec=spec, request_id=request_id or new_request_id())
        return self._call(self._stub.CreateTask, request, ADMIT_SECONDS).task

    def estimate_task(self, spec: task_pb2.TaskSpec) -> task_pb2.TaskEstimate:
        """Return the estimate that create_task would give, or raise its error; nothing is stored."""
        return self._call(self._stub.EstimateTask, pb.EstimateTaskRequest(spec=spec), ADMIT_SECONDS).estimate

    def get_task(self, name: str) -> task_pb2.Task:
        """Return a task with its state and progress."""
        return self._call(self._stub.GetTask, pb.GetTaskRequest(name=name)).task

    def list_tasks(
        self, states: Sequence["task_pb2.TaskState.ValueType"] = (), page_size: int = 0
    ) -> Iterator[task_pb2.Task]:
        """Iterate over all tasks, or those in `states`, newest first; pages are read as needed."""
        for page in self._pages(self._stub.ListTasks, pb.ListTasksRequest(page_size=page_size, states=states)):
            yield from page.tasks

    def watch_task(self, name: str, after_sequence: int = 0) -> Iterator[event_pb2.TaskEvent]:
        """Iterate over a task's events after `after_sequence` until it ends, each once.

        A stream that breaks is opened again after the last event.
        """
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
        """Wait until a task has ended and return it."""
        for _ in self.watch_task(name):
            pass
        return self.get_task(name)

    def cancel_task(self, name: str) -> task_pb2.Task:
        """Ask a task to stop; the adapter trained so far is kept."""
        return self._call(self._stub.CancelTask, pb.CancelTaskRequest(name=name)).task

    def upload_adapter(self, folder: Path | str, adapter_id: str = "", request_id: str = "") -> artifact_pb2.Adapter:
        """Upload a PEFT folder, for tasks to continue from as `initial_adapter`.

        If the connection breaks, the upload is sent again from its start.
        """
        header = artifact_pb2.UploadHeader(id=adapter_id, request_id=request_id or new_request_id())
        requests = list(adapter_requests(header, Path(folder)))
        upload = self._stub.UploadAdapter
        return self._upload("UploadAdapter", upload, lambda: iter(requests)).adapter

    def download_adapter(self, name: str, dest: Path | str) -> Path:
        """Download the checked PEFT folder of an adapter or a task. It appears at `dest` complete or not at all."""

        def attempt() -> Path:
            with call_span("DownloadAdapter"), raising(), FolderSink(Path(dest)) as sink:
                request = pb.DownloadAdapterRequest(name=name)
                for response in self._stub.DownloadAdapter(request, **self._options(TRANSFER_SECONDS)):
                    sink.add(response)
                return sink.close()

        return _retried(attempt)

    def list_adapters(self, page_size: int = 0) -> Iterator[artifact_pb2.Adapter]:
        """Iterate over all adapters, uploaded and trained, newest first; pages are read as needed."""
        for page in self._pages(self._stub.ListAdapters, pb.ListAdaptersRequest(page_size=page_size)):
            yield from page.adapters

    def delete_adapter(self, name: str) -> None:
        """Delete an adapter. Raises ResourceInUseError while an unfinished task starts from it."""
        self._call(self._stub.DeleteAdapter, pb.DeleteAdapterRequest(name=name))

    def list_backbones(self) -> Sequence[pb.BackboneSummary]:
        """Return the backbones that executors host."""
        return self._call(self._stub.ListBackbones, pb.ListBackbonesRequest()).backbones

    @property
    def channel(self) -> grpc.Channel:
        """The channel, for stubs of other services at the same address."""
        return self._channel

    def close(self) -> None:
        """Close the channel; calls in progress are cancelled."""
        self._channel.close()

    def __enter__(self) -> "Client":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _options(self, seconds: float) -> CallOptions:
        return {"timeout": seconds, "metadata": metadata(self._api_key)}

    def _call(
        self,
        rpc: "grpc.UnaryUnaryMultiCallable[Request, Response]",
        request: Request,
        seconds: float = DEADLINE_SECONDS,
    ) -> Response:
        with call_span(type(request).__name__.removesuffix("Request")), raising():
            return rpc(request, **self._options(seconds))

    def _pages(self, rpc: "grpc.UnaryUnaryMultiCallable[Any, Page]", request: Any) -> Iterator[Page]:
        while True:
            page = self._call(rpc, request)
            yield page
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    def _upload(
        self,
        method: str,
        rpc: "grpc.StreamUnaryMultiCallable[Request, Response]",
        requests: Callable[[], Iterator[Request]],
    ) -> Response:
        def attempt() -> Response:
            with call_span(method), raising():
                return rpc(requests(), **self._options(TRANSFER_SECONDS))

        return _retried(attempt)


def _retried(attempt: Callable[[], Result]) -> Result:
    """Run a streaming call, which gRPC does not repeat by itself, again after UNAVAILABLE."""
    for backoff in STREAM_BACKOFFS_SECONDS:
        try:
            return attempt()
        except UnavailableError:
            if backoff is None:
                raise
            time.sleep(backoff)
    raise AssertionError("the last of the back-offs is None")
