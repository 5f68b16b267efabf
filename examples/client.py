"""A task from upload to adapter with the Python client.

Start a mesh with `muxtune up`, export what it prints, then run this file.
"""

from pathlib import Path

from muxtune.client import Client
from muxtune.v1 import task_pb2


def main() -> None:
    with Client() as client:
        dataset = client.upload_dataset(Path(__file__).parent / "support_replies.jsonl")
        task = client.create_task(
            task_pb2.TaskSpec(
                backbone="smollm2",
                dataset=dataset.name,
                lora=task_pb2.Lora(rank=8, alpha=16, target_modules=["q_proj", "v_proj"]),
                training=task_pb2.Training(
                    learning_rate=2e-3, num_steps=10, max_sequence_tokens=128, heldout_fraction=0.1
                ),
            )
        )
        for event in client.watch_task(task.name):
            if event.WhichOneof("event") == "step_done":
                print(f"step {event.step_done.step}: loss {event.step_done.loss:.3f}")
        print("adapter in", client.download_adapter(task.name, "replies-adapter"))


if __name__ == "__main__":
    main()
