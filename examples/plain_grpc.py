"""The same task with nothing but grpcio and the generated stubs: what any language can do.

Start a mesh with `muxtune up`, export what it prints, then run this file.
"""

import hashlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import grpc

from muxtune.v1 import admission_pb2, admission_pb2_grpc, artifact_pb2, task_pb2


def upload(data: bytes) -> Iterator[admission_pb2.UploadDatasetRequest]:
    header = artifact_pb2.UploadHeader(request_id=str(uuid.uuid4()))
    file = artifact_pb2.FileHeader(size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    yield admission_pb2.UploadDatasetRequest(header=header)
    yield admission_pb2.UploadDatasetRequest(file=file)
    for offset in range(0, len(data), 1 << 20):
        chunk = artifact_pb2.FileChunk(offset=offset, data=data[offset : offset + (1 << 20)])
        yield admission_pb2.UploadDatasetRequest(chunk=chunk)


def main() -> None:
    metadata = (("authorization", f"Bearer {os.environ['MUXTUNE_API_KEY']}"),)
    credentials = grpc.ssl_channel_credentials(Path(os.environ["MUXTUNE_CA"]).read_bytes())
    with grpc.secure_channel(os.environ["MUXTUNE_ADDRESS"], credentials) as channel:
        stub = admission_pb2_grpc.AdmissionServiceStub(channel)
        data = (Path(__file__).parent / "support_replies.jsonl").read_bytes()
        dataset = stub.UploadDataset(upload(data), metadata=metadata, timeout=60).dataset
        spec = task_pb2.TaskSpec(
            backbone="smollm2",
            dataset=dataset.name,
            lora=task_pb2.Lora(rank=8, alpha=16, target_modules=["q_proj", "v_proj"]),
            training=task_pb2.Training(learning_rate=2e-3, num_steps=10, max_sequence_tokens=128),
        )
        request = admission_pb2.CreateTaskRequest(spec=spec, request_id=str(uuid.uuid4()))
        task = stub.CreateTask(request, metadata=metadata, timeout=60).task
        watching = stub.WatchTask(admission_pb2.WatchTaskRequest(name=task.name), metadata=metadata)
        for response in watching:  # after a break: WatchTaskRequest(name=..., after_sequence=the last one seen)
            print(response.event.sequence, response.event.WhichOneof("event"))
        folder = Path("replies-adapter")
        folder.mkdir(exist_ok=True)
        received: dict[str, bytearray] = {}
        for part in stub.DownloadAdapter(admission_pb2.DownloadAdapterRequest(name=task.name), metadata=metadata):
            if part.WhichOneof("part") == "file":
                received[part.file.file_name] = bytearray()
            else:
                received[next(reversed(received))] += part.chunk.data
        for name, content in received.items():
            (folder / name).write_bytes(content)
        print("adapter in", folder)


if __name__ == "__main__":
    main()
