"""Ten hostile tenants, each with an ordinary key and one kind of too much, for the load test of a mesh.

Each function of HOSTILE acts for its tenant until `stop` is set; what it gets back does not matter. The tenants run in
a process of their own, at the lowest priority: `python -m tests.hostile_tenants ADDRESS CA NAME=KEY ...`, until its
standard input ends.
"""

import hashlib
import json
import os
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from muxtune.client import Client
from muxtune.errors import MuxtuneError
from muxtune.v1 import admission_pb2 as pb
from muxtune.v1 import artifact_pb2, dataset_pb2, task_pb2

FOREVER = 1_000_000  # steps
_PART_BYTES = 1 << 20


@dataclass(frozen=True)
class Attacker:
    """A hostile tenant: its client, its bearer metadata, and the sign to stop."""

    name: str
    client: Client
    metadata: tuple[tuple[str, str], ...]
    stop: threading.Event

    @property
    def stub(self) -> Any:
        return self.client._stub

    def until_stopped(self, act: Callable[[], object]) -> None:
        """Repeat an act until `stop` is set. Refusals are expected."""
        while not self.stop.is_set():
            with suppress(MuxtuneError, grpc.RpcError):
                act()
            self.stop.wait(0.02)

    def dataset(self, num_rows: int, words: int = 2) -> str:
        return self.client.upload_dataset([{"text": f"{i} " + "some words " * words} for i in range(num_rows)]).name

    def create(self, dataset: str, **training: float) -> task_pb2.Task:
        return self.client.create_task(spec(dataset, **training))


def spec(dataset: str, **training: float) -> task_pb2.TaskSpec:
    values = {"learning_rate": 1e-4, "num_steps": FOREVER, "max_sequence_tokens": 64, "micro_batch_size": 8} | training
    return task_pb2.TaskSpec(
        backbone="tiny", dataset=dataset, lora=task_pb2.Lora(rank=4, alpha=8, target_modules=["q_proj"]),
        training=task_pb2.Training(**values),
    )  # fmt: skip


def many_tasks(attacker: Attacker) -> None:
    dataset = attacker.dataset(100)
    for seed in range(60):
        attacker.create(dataset, seed=seed)
    attacker.stop.wait()


def a_large_batch(attacker: Attacker) -> None:
    attacker.create(attacker.dataset(9000, 6), global_batch_size=8192)
    attacker.stop.wait()


def long_evaluations(attacker: Attacker) -> None:
    attacker.create(attacker.dataset(6000), heldout_fraction=0.9, evaluate_every_steps=1)
    attacker.stop.wait()


def tasks_that_come_and_go(attacker: Attacker) -> None:
    dataset = attacker.dataset(20)
    seeds = iter(range(FOREVER))

    def act() -> None:
        task = attacker.create(dataset, num_steps=1, seed=(seed := next(seeds)))
        if seed % 3 == 0:
            attacker.client.cancel_task(task.name)

    attacker.until_stopped(act)


def unfinished_uploads(attacker: Attacker) -> None:
    """300 uploads that send a header and 10 bytes, then nothing."""

    def parts() -> Iterator[pb.UploadDatasetRequest]:
        yield pb.UploadDatasetRequest(header=artifact_pb2.UploadHeader(parent=f"tenants/{attacker.name}"))
        yield pb.UploadDatasetRequest(
            file=artifact_pb2.FileHeader(size_bytes=1000, sha256=hashlib.sha256().hexdigest())
        )
        yield pb.UploadDatasetRequest(chunk=artifact_pb2.FileChunk(data=b"{" * 10))
        attacker.stop.wait()

    calls: list[Any] = []

    def act() -> None:
        calls[:] = [call for call in calls if not call.done()]
        while len(calls) < 300 and not attacker.stop.is_set():
            calls.append(attacker.stub.UploadDataset.future(parts(), metadata=attacker.metadata))
        attacker.stop.wait(0.5)

    attacker.until_stopped(act)


def unread_streams(attacker: Attacker) -> None:
    """1,100 streams of events of its own task, of which none is read."""
    task = attacker.create(attacker.dataset(20))
    request = pb.WatchTaskRequest(name=task.name)
    streams: list[Any] = []

    def act() -> None:
        streams[:] = [stream for stream in streams if stream.is_active()]
        while len(streams) < 1100 and not attacker.stop.is_set():
            streams.append(attacker.stub.WatchTask(request, metadata=attacker.metadata))
        attacker.stop.wait(1.0)

    attacker.until_stopped(act)
    for stream in streams:
        stream.cancel()


def large_specs(attacker: Attacker) -> None:
    """Tasks with the largest spec that is taken, and ones beyond."""
    dataset = attacker.dataset(20)
    sizes = iter(range(FOREVER))

    def act() -> None:
        large = spec(dataset, seed=next(sizes))
        count = 20_000 if next(sizes) % 2 else 500
        large.lora.target_modules.extend(f"module_{i}_{next(sizes)}" for i in range(count))
        attacker.client.create_task(large)

    attacker.until_stopped(act)


def large_adapters(attacker: Attacker) -> None:
    """Eight uploads at once of 60 MB that end without their last byte."""
    size = 60 << 20

    def parts() -> Iterator[pb.UploadAdapterRequest]:
        yield pb.UploadAdapterRequest(header=artifact_pb2.UploadHeader(parent=f"tenants/{attacker.name}"))
        name = "adapter_model.safetensors"
        yield pb.UploadAdapterRequest(
            file=artifact_pb2.FileHeader(file_name=name, size_bytes=size, sha256=hashlib.sha256().hexdigest())
        )
        for offset in range(0, size - _PART_BYTES, _PART_BYTES):
            if attacker.stop.is_set():
                return
            chunk = artifact_pb2.FileChunk(offset=offset, data=bytes(_PART_BYTES))
            yield pb.UploadAdapterRequest(chunk=chunk)

    def act() -> None:
        calls = [attacker.stub.UploadAdapter.future(parts(), metadata=attacker.metadata) for _ in range(8)]
        for call in calls:
            with suppress(grpc.RpcError):
                call.result(timeout=30)

    attacker.until_stopped(act)


def many_tensors(attacker: Attacker) -> None:
    """Adapters whose header names 100,000 tensors of one element."""
    header = {f"t{i}": {"dtype": "F32", "shape": [1], "data_offsets": [4 * i, 4 * i + 4]} for i in range(100_000)}
    text = json.dumps(header).encode()
    weights = struct.pack("<Q", len(text)) + text + bytes(400_000)
    config = json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}).encode()

    def parts() -> Iterator[pb.UploadAdapterRequest]:
        yield pb.UploadAdapterRequest(header=artifact_pb2.UploadHeader(parent=f"tenants/{attacker.name}"))
        for name, data in (("adapter_config.json", config), ("adapter_model.safetensors", weights)):
            digest = hashlib.sha256(data).hexdigest()
            file = artifact_pb2.FileHeader(file_name=name, size_bytes=len(data), sha256=digest)
            yield pb.UploadAdapterRequest(file=file)
            for offset in range(0, len(data), _PART_BYTES):
                chunk = artifact_pb2.FileChunk(offset=offset, data=data[offset : offset + _PART_BYTES])
                yield pb.UploadAdapterRequest(chunk=chunk)

    def act() -> None:
        calls = [attacker.stub.UploadAdapter.future(parts(), metadata=attacker.metadata) for _ in range(6)]
        for call in calls:
            with suppress(grpc.RpcError):
                call.result(timeout=60)

    attacker.until_stopped(act)


def blank_lines(attacker: Attacker) -> None:
    """Datasets of 40 MB of blank lines and one row, and preflights that are given up at once."""
    small = attacker.dataset(3000, 30)
    seeds = iter(range(FOREVER))

    def act() -> None:
        rows = b"\n" * (40 << 20) + json.dumps({"text": f"a row {next(seeds)}"}).encode()
        attacker.client.upload_dataset(rows)
        options = dataset_pb2.PreflightOptions(
            backbone="tiny", training=task_pb2.Training(learning_rate=1e-3, num_steps=1, seed=next(seeds))
        )
        request = pb.PreflightDatasetRequest(name=small, options=options)
        with suppress(grpc.RpcError):
            attacker.stub.PreflightDataset(request, metadata=attacker.metadata, timeout=0.01)

    attacker.until_stopped(act)


HOSTILE: dict[str, Callable[[Attacker], None]] = {
    "many-tasks": many_tasks,
    "a-large-batch": a_large_batch,
    "long-evaluations": long_evaluations,
    "come-and-go": tasks_that_come_and_go,
    "unfinished-uploads": unfinished_uploads,
    "unread-streams": unread_streams,
    "large-specs": large_specs,
    "large-adapters": large_adapters,
    "many-tensors": many_tensors,
    "blank-lines": blank_lines,
}


def main(address: str, ca: str, *keys: str) -> None:
    os.nice(19)
    stop = threading.Event()
    for name, _, key in (pair.partition("=") for pair in keys):
        client = Client(address, key, Path(ca))
        attacker = Attacker(name, client, (("authorization", f"Bearer {key}"),), stop)
        threading.Thread(target=HOSTILE[name], args=[attacker], name=name, daemon=True).start()
    sys.stdin.read()
    stop.set()


if __name__ == "__main__":
    main(*sys.argv[1:])
