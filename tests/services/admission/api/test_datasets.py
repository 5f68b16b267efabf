"""RPCs of datasets, adapters and backbones, and the names that each tenant may use."""

import asyncio
import hashlib
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2

from engine.errors import UnavailableError
from muxtune.v1 import admission_pb2 as pb
from muxtune.v1 import dataset_pb2, ledger_pb2, plan_pb2, task_pb2
from tests.services.admission.admission_mesh import (
    DATABASES,
    ROWS,
    SECRET,
    TEN_ROWS,
    Admission,
    Alignment,
    adapter_files,
    adapter_parts,
    executor,
    finished,
    lease,
    lines,
    refused,
    spec,
    step,
)

both = pytest.mark.parametrize("database_url", DATABASES, indirect=True)
DENIED = (grpc.StatusCode.PERMISSION_DENIED, "PERMISSION_DENIED")
INVALID = (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_INPUT")
PRECONDITION, LOST = grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.DATA_LOSS


async def download(admission: Admission, name: str) -> dict[str, bytes]:
    """Download an adapter, checking order, size and SHA-256 as a client should."""
    files: dict[str, bytes] = {}
    headers: dict[str, Any] = {}
    last = ""
    async for part in admission.tenant().DownloadAdapter(pb.DownloadAdapterRequest(name=name)):
        if part.WhichOneof("part") == "file":
            last = part.file.file_name
            files[last], headers[last] = b"", part.file
        else:
            assert part.chunk.offset == len(files[last])
            files[last] += part.chunk.data
    for file_name, header in headers.items():
        data = files[file_name]
        assert (len(data), hashlib.sha256(data).hexdigest()) == (header.size_bytes, header.sha256)
    return files


def preflight(name: str, **options: Any) -> pb.PreflightDatasetRequest:
    training = task_pb2.Training(**{"learning_rate": 0.1, "num_epochs": 1, "global_batch_size": 4, **options})
    return pb.PreflightDatasetRequest(
        name=name, options=dataset_pb2.PreflightOptions(backbone="tiny", training=training)
    )


@both
async def test_a_dataset_is_what_was_uploaded(admission: Admission) -> None:
    rows = [*ROWS, {"prompt": "a", "completion": "b"}, {"messages": [{"role": "user", "content": "x"},
            {"role": "assistant", "content": "y"}]}]  # fmt: skip
    data = lines(rows)
    dataset = await admission.upload(data, "one")
    assert (dataset.name, dataset.sha256) == ("tenants/acme/datasets/one", hashlib.sha256(data).hexdigest())
    assert (dataset.size_bytes, dataset.num_rows) == (len(data), 12)
    assert dict(dataset.num_rows_by_shape) == {"text": 10, "prompt_completion": 1, "messages": 1}
    await admission.restart()
    assert (await admission.tenant().GetDataset(pb.GetDatasetRequest(name=dataset.name))).dataset == dataset
    assert (admission.folder / f"tenants/acme/datasets/{dataset.sha256}.jsonl").read_bytes() == data


@both
async def test_datasets_are_listed_in_pages_newest_first(admission: Admission) -> None:
    datasets = [await admission.upload(lines(ROWS[: i + 1]), f"d{i}") for i in range(5)]
    answer = await admission.tenant().ListDatasets(pb.ListDatasetsRequest(page_size=3))
    rest = pb.ListDatasetsRequest(page_size=3, page_token=answer.next_page_token)
    last = await admission.tenant().ListDatasets(rest)
    assert [*answer.datasets, *last.datasets] == datasets[::-1] and not last.next_page_token
    assert not (await admission.tenant("other").ListDatasets(pb.ListDatasetsRequest())).datasets
    with refused(*INVALID):
        await admission.tenant().ListDatasets(pb.ListDatasetsRequest(page_size=-1))


async def test_preflight_shows_how_a_task_would_read_it(admission: Admission) -> None:
    dataset = await admission.upload(lines([{"prompt": "the quick", "completion": " brown fox"}] * 6))
    report = (await admission.tenant().PreflightDataset(preflight(dataset.name, heldout_fraction=0.5))).report
    assert (report.num_rows, report.num_train_rows, report.num_heldout_rows, report.num_steps) == (6, 3, 3, 1)
    assert len(report.samples) == 3
    pieces = report.samples[0].pieces
    assert "".join(piece.text for piece in pieces).startswith("the quick brown fox")
    assert [piece.bears_loss for piece in pieces] == [False, True]
    assert sum(bucket.num_rows for bucket in report.length_histogram) == 6
    estimate = (await admission.create(dataset.name, num_epochs=1, global_batch_size=4)).estimate
    whole = (await admission.tenant().PreflightDataset(preflight(dataset.name))).report
    assert (estimate.num_steps, estimate.num_train_tokens) == (whole.num_steps, whole.num_train_tokens)


async def test_preflight_refuses_what_no_task_could_read(admission: Admission) -> None:
    name = (await admission.upload()).name
    unknown = preflight(name)
    unknown.options.backbone = "nosuch"
    bare = pb.PreflightDatasetRequest(name=name)
    negative = preflight(name)
    negative.options.num_samples = -1
    for request in (unknown, bare, negative, preflight(name, global_batch_size=-1), preflight(name, num_epochs=0),
                    preflight(name, heldout_fraction=2.0), preflight(name, num_epochs=2**31 - 1)):  # fmt: skip
        with refused(*INVALID) as refusal:
            await admission.tenant().PreflightDataset(request)
        assert refusal.fields


@both
async def test_a_dataset_is_deleted_once_no_unfinished_task_reads_it(admission: Admission) -> None:
    dataset = await admission.upload(TEN_ROWS, "one")
    same = await admission.upload(TEN_ROWS, "two")
    task = await admission.create(dataset.name)
    request = pb.DeleteDatasetRequest(name=dataset.name)
    with refused(PRECONDITION, "RESOURCE_IN_USE") as refusal:
        await admission.tenant().DeleteDataset(request)
    assert refusal.has(error_details_pb2.PreconditionFailure)
    await admission.tenant().CancelTask(pb.CancelTaskRequest(name=task.name))
    await admission.tenant().DeleteDataset(request)
    assert len(admission.files()) == 1  # the other one's
    for call in (admission.tenant().DeleteDataset(request), admission.create(dataset.name)):
        with refused(*DENIED):
            await call
    await admission.tenant().DeleteDataset(pb.DeleteDatasetRequest(name=same.name))
    assert admission.files() == []
    assert (await admission.tenant().GetTask(pb.GetTaskRequest(name=task.name))).task.spec.dataset == dataset.name


async def test_a_dataset_deleted_while_its_task_is_examined(
    admission: Admission, alignment: Alignment, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = await admission.upload()
    inspected, go_on, inspect = asyncio.Event(), asyncio.Event(), alignment.servicer._datasets.inspect
    loop = asyncio.get_running_loop()

    def slow(*arguments: Any) -> Any:
        report = inspect(*arguments)
        loop.call_soon_threadsafe(inspected.set)
        asyncio.run_coroutine_threadsafe(go_on.wait(), loop).result(10)
        return report

    monkeypatch.setattr(alignment.servicer._datasets, "inspect", slow)
    creating = asyncio.create_task(admission.create(dataset.name))
    await inspected.wait()
    await admission.tenant().DeleteDataset(pb.DeleteDatasetRequest(name=dataset.name))
    go_on.set()
    with refused(*DENIED):
        await creating
    assert admission.num_rows()["tasks"] == 0


async def test_bytes_without_a_dataset_are_deleted_by_a_sweep(
    admission: Admission, alignment: Alignment, monkeypatch: pytest.MonkeyPatch
) -> None:
    remaining, gone = await admission.upload(), await admission.upload(lines(ROWS[:2]))
    both_files = admission.files()

    def away(tenant: str, sha256: str) -> None:
        raise UnavailableError("the store is away")

    with monkeypatch.context() as patched:
        patched.setattr(alignment.servicer._datasets, "remove", away)
        await admission.tenant().DeleteDataset(pb.DeleteDatasetRequest(name=gone.name))
    assert admission.files() == both_files
    await admission.servicer.dataset_objects.remove_all_unreferenced()
    assert admission.files() == [f"tenants/acme/datasets/{remaining.sha256}.jsonl"]


async def test_calls_are_unavailable_without_alignment_and_store_nothing(
    admission: Admission, alignment: Alignment
) -> None:
    dataset = await admission.upload()
    before = admission.num_rows(), admission.files()
    await alignment.server.stop(None)
    for call in (
        admission.create(dataset.name),
        admission.upload(lines(ROWS[:2])),
        admission.tenant().PreflightDataset(preflight(dataset.name)),
    ):
        with refused(grpc.StatusCode.UNAVAILABLE, "UNAVAILABLE") as refusal:
            await call
        assert refusal.has(error_details_pb2.RetryInfo)
    assert (admission.num_rows(), admission.files()) == before


async def test_uploaded_adapters_come_back_as_they_were(admission: Admission) -> None:
    files = adapter_files()
    adapter = (await admission.tenant().UploadAdapter(adapter_parts(files, "one"))).adapter
    assert (adapter.name, adapter.size_bytes) == ("tenants/acme/adapters/one", sum(map(len, files.values())))
    assert await download(admission, adapter.name) == files


@both
async def test_a_tasks_adapter_is_downloaded_by_either_name(admission: Admission) -> None:
    task = (await admission.create((await admission.upload()).name, "t")).name
    await admission.run(task)
    with refused(PRECONDITION, "ILLEGAL_TRANSITION") as refusal:
        await download(admission, task)
    assert refusal.metadata["state"] == "RUNNING"
    large = {"adapter_config.json": b"{}", "adapter_model.safetensors": bytes(range(256)) * 10_000}
    manifest = admission.artifacts.commit_folder("tenants/acme/adapters/t/1", large, {})
    await admission.commit(step(task, 1, 1), finished(task, 1, manifest.key))
    ended_task = (await admission.tenant().GetTask(pb.GetTaskRequest(name=task))).task
    assert ended_task.adapter == "tenants/acme/adapters/t"
    for name in (task, ended_task.adapter):
        assert await download(admission, name) == large
    damaged = next(admission.folder.rglob("adapter_model.safetensors"))
    damaged.write_bytes(b"x" + damaged.read_bytes()[1:])
    with refused(LOST, "ARTIFACT_CORRUPT"):
        await download(admission, task)


async def test_backbones_are_what_live_executors_describe(admission: Admission) -> None:
    await admission.register("executors/two", "j1")
    answer = await admission.tenant().ListBackbones(pb.ListBackbonesRequest())
    (backbone,) = answer.backbones
    assert (backbone.name, backbone.architecture, backbone.num_executors) == ("tiny", "LlamaForCausalLM", 2)
    assert sorted(backbone.target_modules) == ["q_proj", "v_proj"] and backbone.max_sequence_tokens == 128
    for name, incarnation in (("executors/one", "i1"), ("executors/two", "j1")):
        await admission.ledger().EndLease(ledger_pb2.EndLeaseRequest(executor=name, incarnation=incarnation))
    assert not (await admission.tenant().ListBackbones(pb.ListBackbonesRequest())).backbones
    # Its executors are away for now: what they take is known, so the task waits.
    assert (await admission.create((await admission.upload()).name)).state == task_pb2.TASK_STATE_QUEUED


async def test_scheduling_is_notified_of_a_drained_executor(admission: Admission) -> None:
    draining = executor(lease_term=1)
    draining.draining = True
    draining.device.effective_tokens_per_second = 7
    draining.backbone.CopyFrom(plan_pb2.Backbone())  # a renewal says only what changes
    await admission.ledger().PutLease(lease(draining))
    (seen,) = (await admission.ledger().GetSnapshot(ledger_pb2.GetSnapshotRequest())).executors
    assert seen.draining and seen.device.effective_tokens_per_second == 7 and seen.backbone.name == "tiny"


def every_call_that_names(name: str) -> list[tuple[str, Any]]:
    """Return requests of all RPCs of AdmissionService that name a resource, with this name."""
    return [
        ("GetTask", pb.GetTaskRequest(name=name)),
        ("WatchTask", pb.WatchTaskRequest(name=name)),
        ("CancelTask", pb.CancelTaskRequest(name=name)),
        ("GetDataset", pb.GetDatasetRequest(name=name)),
        ("PreflightDataset", preflight(name)),
        ("DeleteDataset", pb.DeleteDatasetRequest(name=name)),
        ("DeleteAdapter", pb.DeleteAdapterRequest(name=name)),
        ("DownloadAdapter", pb.DownloadAdapterRequest(name=name)),
        ("CreateTask", pb.CreateTaskRequest(spec=spec(name))),
        ("EstimateTask", pb.EstimateTaskRequest(spec=spec(name))),
        ("CreateTask", pb.CreateTaskRequest(parent=name)),
        ("EstimateTask", pb.EstimateTaskRequest(parent=name)),
        ("ListTasks", pb.ListTasksRequest(parent=name)),
        ("ListDatasets", pb.ListDatasetsRequest(parent=name)),
        ("ListAdapters", pb.ListAdaptersRequest(parent=name)),
    ]


async def finish(call: Any) -> None:
    if hasattr(call, "__aiter__"):
        async for _ in call:
            pass
    else:
        await call


async def test_anothers_name_and_one_that_is_not_there_answer_alike(admission: Admission) -> None:
    dataset = await admission.upload(TEN_ROWS, "d")
    task = await admission.create(dataset.name, "t")
    await admission.tenant().UploadAdapter(adapter_parts(adapter_files(), "a"))
    stranger = admission.tenant("other")
    before = admission.num_rows(), admission.files()
    for existing, missing in (
        (dataset.name, "datasets/x"),
        (task.name, "tasks/x"),
        ("tenants/acme/adapters/a", "adapters/x"),
    ):
        messages: dict[str, set[str]] = {}
        for name in (existing, f"tenants/acme/{missing}", f"tenants/other/{missing}", f"tenants/none/{missing}"):
            for method, request in every_call_that_names(name):
                with refused(*DENIED) as refusal:
                    await finish(getattr(stranger, method)(request))
                assert not refusal.fields
                messages.setdefault(method, set()).add(refusal.message.replace(name, "NAME"))
        assert all(len(texts) == 1 for texts in messages.values()), messages
    for odd in ("", "x", "tenants/other", "tenants/other/", "tenants/other/tasks/", "tenants/other/tasks/../x", "ä",
                "\0", "tenants/other/tasks/x/y", "tenants/other/datasets/X", "tenants/other/tasks/x\n"):  # fmt: skip
        for method, request in every_call_that_names(odd)[:8]:
            with refused(*DENIED):
                await finish(getattr(stranger, method)(request))
    assert (admission.num_rows(), admission.files()) == before
    assert await admission.state(task.name) == "QUEUED"


async def test_every_call_needs_a_key_of_its_kind(admission: Admission) -> None:
    key = admission.key_store.create("tenants/acme", None)[1]
    stranger, admin = "mxt_000000000000_x", SECRET
    wrong = ["", "x", stranger, key[:-1], key + "x", key.upper(), key.replace("mxt", "mxx"), "mxt__", "mxt_", "_" * 5]
    for token in (*wrong, admin):
        for method, request in (
            *every_call_that_names("tenants/acme/tasks/x"),
            ("ListBackbones", pb.ListBackbonesRequest()),
        ):
            with refused(grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED"):
                await finish(getattr(admission.with_token(token), method)(request))
        for method in ("UploadDataset", "UploadAdapter"):
            with refused(grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED"):
                await getattr(admission.with_token(token), method)(iter([]))
    for token in (*wrong, key):
        for caller, service in ((admission.ledger(token), "LedgerService"), (admission.keys(token), "KeyService")):
            for method, request in every_call_of(service):
                status = grpc.StatusCode.PERMISSION_DENIED if token == key else grpc.StatusCode.UNAUTHENTICATED
                with refused(status, status.name):  # who it is is known, or not even that
                    await finish(getattr(caller, method)(request))


def every_call_of(service: str) -> list[tuple[str, Any]]:
    from google.protobuf.message_factory import GetMessageClass

    from muxtune.v1 import key_pb2

    module = ledger_pb2 if service == "LedgerService" else key_pb2
    methods = module.DESCRIPTOR.services_by_name[service].methods
    return [(method.name, GetMessageClass(method.input_type)()) for method in methods]


async def test_the_error_of_a_call_without_metadata_names_what_to_send(admission: Admission) -> None:
    stub = admission.with_token("")._stub
    with refused(grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED") as refusal:
        await stub.ListTasks(pb.ListTasksRequest(), timeout=10)
    assert "Bearer" in refusal.message
