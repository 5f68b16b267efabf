"""Nonsense by hypothesis at an executor's RPCs: a fair refusal each time, and the trainer lives.

Plans under the right lease are scheduling's, who is certified: they are not drawn here.
"""

import grpc
from google.protobuf.descriptor import MethodDescriptor
from hypothesis import given
from hypothesis import strategies as st

from muxtune.v1 import execution_pb2
from tests.hostile_messages import FAIR, FUZZING, answer_of, messages, streams
from tests.services.execution.executor_mesh import SECRET, running_mesh

METHODS = [m for m in execution_pb2.DESCRIPTOR.services_by_name["ExecutionService"].methods if m.name != "Drain"]


async def test_nonsense_is_refused_fairly(tmp_path, tiny_backbone) -> None:
    async with running_mesh(tmp_path, tiny_backbone, calibration_seconds=0.0) as mesh:
        channel = grpc.aio.insecure_channel(mesh.address)
        trainer = mesh.trainer_pid()

        async def ask(method: MethodDescriptor, sent: object) -> None:
            code, text, _ = await answer_of(channel, method, sent, SECRET)
            assert code in FAIR, (code, text, sent)

        for method in METHODS:
            draw = streams if method.client_streaming else messages
            for sent in drawn(draw(method.input_type, ["tenants/a/tasks/t"]), FUZZING.max_examples):
                for part in sent if isinstance(sent, list) else ():
                    part.lease_epoch = part.lease_epoch or 999_999
                await ask(method, sent)
        assert mesh.trainer_pid() == trainer
        await channel.close()


def drawn(strategy: st.SearchStrategy, count: int) -> list:
    """Examples to be used under a loop that runs already."""
    found: list = []

    @FUZZING
    @given(strategy)
    def collect(example: object) -> None:
        found.append(example)

    collect()
    return found[:count]
