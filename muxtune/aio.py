"""The asyncio client of muxtune; `muxtune.client` is the blocking one, with the same methods.

    async with AsyncClient("127.0.0.1:7401", api_key) as client:
        dataset = await client.upload_dataset("replies.jsonl")
        task = await client.create_task(task_pb2.TaskSpec(backbone="smollm2", dataset=dataset.name, ...))
        async for event in client.watch_task(task.name):
            ...
        await client.download_adapter(task.name, "adapter")

Calls raise `muxtune.errors`. Calls that end UNAVAILABLE are repeated for about nine seconds; a repeated call that
creates something creates it once. Files are read and written in threads.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
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
from muxtune.upload_status import upload_response
from muxtune.v1 import admission_pb2 as pb
from muxtune.v1 import admission_pb2_grpc, artifact_pb2, dataset_pb2, event_pb2, task_pb2


class _Page(Protocol):
    @property
    def next_page_token(self) -> str: ...


Request = TypeVar("Request")
Response = TypeVar("Response")
Result = TypeVar("Result")
Page = TypeVar("Page", bound=_Page)


class AsyncClient:
    """Calls admission with one API key, from one event loop. Close it, or use it as a context manager.

    `address`: "host:port", a name that may resolve to several replicas, or "ip:port,ip:port"; default: MUXTUNE_ADDRESS.
    `api_key`: default: MUXTUNE_API_KEY. `ca`: a file with the CA of admission's certificate; default: MUXTUNE_CA, else
    the system's CAs.
    """

    def __init__(self, address: str | None = None, api_key: str | None = None, ca: Path | str | None = None) -> None:
        address, self._api_key = address_and_key(address, api_key)
        secure, server, options = credentials(address, ca), target(address), channel_options(address)
        self._channel = (
            grpc.aio.secure_channel(server, secure, options) if secure else grpc.aio.insecure_channel(server, options)
        )
        self._stub: admission_pb2_grpc.AdmissionServiceAsyncStub = admission_pb2_grpc.AdmissionServiceStub(
            self._channel
        )

    async def upload_dataset(
        self, rows: Path | str | bytes | Rows, dataset_id: str = "", request_id: str = ""
    ) -> dataset_pb2.Dataset:
        """Upload a dataset: the path of a JSON Lines file, its bytes, or rows as dicts.

        If the connection breaks, the upload is sent again from its start.
        """
        data = await asyncio.to_thread(rows_as_bytes, rows)
        header = artifact_pb2.UploadHeader(id=dataset_id, request_id=request_id or new_request_id())
        upload = self._stub.UploadDataset
        return (await self._upload("UploadDataset", upload, lambda: dataset_requests(header, data))).dataset

    async def get_dataset(self, name: str) -> dataset_pb2.Dataset:
        """Return a dataset."""
        return (await self._call(self._stub.GetDataset, pb.GetDatasetRequest(name=name))).dataset

    async def list_datasets(self, page_size: int = 0) -> AsyncIterator[dataset_pb2.Dataset]:
        """Iterate over all datasets, newest first; pages are read as needed."""
        async for page in self._pages(self._stub.ListDatasets, pb.ListDatasetsRequest(page_size=page_size)):
            for dataset in page.datasets:
                yield dataset

    async def preflight_dataset(
        self, name: str, backbone: str, training: task_pb2.Training, num_samples: int = 0
    ) -> dataset_pb2.PreflightReport:
        """Return how a task would read a dataset: rendered rows, tokens that bear loss, lengths, refused rows."""
        options = dataset_pb2.PreflightOptions(backbone=backbone, training=training, num_samples=num_samples)
        request = pb.PreflightDatasetRequest(name=name, options=options)
        return (await self._call(self._stub.PreflightDataset, request, ADMIT_SECONDS)).report

    async def delete_dataset(self, name: str) -> None:
        """Delete a dataset. Raises ResourceInUseError while an unfinished task reads it."""
        await self._call(self._stub.DeleteDataset, pb.DeleteDatasetRequest(name=name))

    async def create_task(self, spec: task_pb2.TaskSpec, task_id: str = "", request_id: str = "") -> task_pb2.Task:
        """Create a task. It is durable when this returns; the same `request_id` returns the same task."""
        request = pb.CreateTaskRequest(task_id=task_id, spec=spec, request_id=request_id or new_request_id())
        return (await self._call(self._stub.CreateTask, request, ADMIT_SECONDS)).task

    async def estimate_task(self, spec: task_pb2.TaskSpec) -> task_pb2.TaskEstimate:
        """Return the estimate that create_task would give, or raise its error; nothing is stored."""
        return (await self._call(self._stub.EstimateTask, pb.EstimateTaskRequest(spec=spec), ADMIT_SECONDS)).estimate

    async def get_task(self, name: str) -> task_pb2.Task:
        """Return a task with its state and progress."""
        return (await self._call(self._stub.GetTask, pb.GetTaskRequest(name=name))).task

    async def list_tasks(
        self, states: Sequence["task_pb2.TaskState.ValueType"] = (), page_size: int = 0
    ) -> AsyncIterator[task_pb2.Task]:
        """Iterate over all tasks, or those in `states`, newest first; pages are read as needed."""
        async for page in self._pages(self._stub.ListTasks, pb.ListTasksRequest(page_size=page_size, states=states)):
            for task in page.tasks:
                yield task

    async def watch_task(self, name: str, after_sequence: int = 0) -> AsyncIterator[event_pb2.TaskEvent]:
        """Iterate over a task's events after `after_sequence` until it ends, each once.

        A stream that breaks is opened again after the last event.
        """
        num_failures, was_heard = 0, False
        while True:
            try:
                with raising():
                    request = pb.WatchTaskRequest(name=name, after_sequence=after_sequence)
                    async for response in self._stub.WatchTask(request, metadata=metadata(self._api_key)):
                        after_sequence, was_heard, num_failures = response.event.sequence, True, 0
                        yield response.event
                    return
            except UnavailableError:
                num_failures += 1
                backoff = watch_backoff(num_failures, was_heard)
                if backoff is None:
                    raise
                await asyncio.sleep(backoff)

    async def wait_task(self, name: str) -> task_pb2.Task:
        """Wait until a task has ended and return it."""
        async for _ in self.watch_task(name):
            pass
        return await self.get_task(name)

    async def cancel_task(self, name: str) -> task_pb2.Task:
        """Ask a task to stop; the adapter trained so far is kept."""
        return (await self._call(self._stub.CancelTask, pb.CancelTaskRequest(name=name))).task

    async def upload_adapter(
        self, folder: Path | str, adapter_id: str = "", request_id: str = ""
    ) -> artifact_pb2.Adapter:
        """Upload a PEFT folder, for tasks to continue from as `initial_adapter`.

        If the connection breaks, the upload is sent again from its start.
        """
        header = artifact_pb2.UploadHeader(id=adapter_id, request_id=request_id or new_request_id())
        requests = await asyncio.to_thread(list, adapter_requests(header, Path(folder)))
        upload = self._stub.UploadAdapter
        return (await self._upload("UploadAdapter", upload, lambda: iter(requests))).adapter

    async def download_adapter(self, name: str, dest: Path | str) -> Path:
        """Download the checked PEFT folder of an adapter or a task. It appears at `dest` complete or not at all."""

        async def attempt() -> Path:
            with call_span("DownloadAdapter"), raising(), FolderSink(Path(dest)) as sink:
                request = pb.DownloadAdapterRequest(name=name)
                async for response in self._stub.DownloadAdapter(request, **self._options(TRANSFER_SECONDS)):
                    await asyncio.to_thread(sink.add, response)
                return await asyncio.to_thread(sink.close)

        return await _retried(attempt)

    async def list_adapters(self, page_size: int = 0) -> AsyncIterator[artifact_pb2.Adapter]:
        """Iterate over all adapters, uploaded and trained, newest first; pages are read as needed."""
        async for page in self._pages(self._stub.ListAdapters, pb.ListAdaptersRequest(page_size=page_size)):
            for adapter in page.adapters:
                yield adapter

    async def delete_adapter(self, name: str) -> None:
        """Delete an adapter. Raises ResourceInUseError while an unfinished task starts from it."""
        await self._call(self._stub.DeleteAdapter, pb.DeleteAdapterRequest(name=name))

    async def list_backbones(self) -> Sequence[pb.BackboneSummary]:
        """Return the backbones that executors host."""
        return (await self._call(self._stub.ListBackbones, pb.ListBackbonesRequest())).backbones

    @property
    def channel(self) -> grpc.aio.Channel:
        """The channel, for stubs of other services at the same address."""
        return self._channel

    async def close(self) -> None:
        """Close the channel; calls in progress are cancelled."""
        await self._channel.close()

    async def __aenter__(self) -> "AsyncClient":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    def _options(self, seconds: float) -> CallOptions:
        return {"timeout": seconds, "metadata": metadata(self._api_key)}

    async def _call(
        self,
        rpc: "grpc.aio.UnaryUnaryMultiCallable[Request, Response]",
        request: Request,
        seconds: float = DEADLINE_SECONDS,
    ) -> Response:
        with call_span(type(request).__name__.removesuffix("Request")), raising():
            return await rpc(request, **self._options(seconds))

    async def _pages(self, rpc: "grpc.aio.UnaryUnaryMultiCallable[Any, Page]", request: Any) -> AsyncIterator[Page]:
        while True:
            page = await self._call(rpc, request)
            yield page
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    async def _upload(
        self,
        method: str,
        rpc: "grpc.aio.StreamUnaryMultiCallable[Request, Response]",
        requests: Callable[[], Iterator[Request]],
    ) -> Response:
        async def attempt() -> Response:
            with call_span(method), raising():
                return await upload_response(rpc(requests(), **self._options(TRANSFER_SECONDS)))

        return await _retried(attempt)


async def _retried(attempt: Callable[[], Awaitable[Result]]) -> Result:
    """Run a streaming call, which gRPC does not repeat by itself, again after UNAVAILABLE."""
    for backoff in STREAM_BACKOFFS_SECONDS:
        try:
            return await attempt()
        except UnavailableError:
            if backoff is None:
                raise
            await asyncio.sleep(backoff)
    raise AssertionError("the last of the back-offs is None")
