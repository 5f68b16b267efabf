"""What the engine measured, as the messages of the contract."""

from engine.errors import MuxtuneError
from engine.runtime.executor import EvaluationResult, StepResult
from muxtune.v1 import plan_pb2, task_pb2
from services.errors import to_failure


def step_result(result: StepResult, epoch: int) -> plan_pb2.TaskResult:
    done = task_pb2.StepDone(
        step=result.step,
        loss=result.loss,
        learning_rate=result.learning_rate,
        grad_norm=result.grad_norm,
        effective_tokens=result.num_effective_tokens,
        target_tokens=result.num_target_tokens,
        padding_tokens=result.num_padding_tokens,
        device_seconds=result.seconds,
        num_neighbours=result.num_neighbours,
    )
    return plan_pb2.TaskResult(task=result.task, attempt_epoch=epoch, step_done=done)


def evaluation_result(result: EvaluationResult, epoch: int) -> plan_pb2.TaskResult:
    done = task_pb2.Evaluated(step=result.step, loss=result.loss, target_tokens=result.num_target_tokens)
    return plan_pb2.TaskResult(task=result.task, attempt_epoch=epoch, evaluated=done)


def failed(task: str, epoch: int, error: MuxtuneError) -> plan_pb2.TaskResult:
    return plan_pb2.TaskResult(task=task, attempt_epoch=epoch, failed=to_failure(error))


def released(task: str, epoch: int, reason: str) -> plan_pb2.TaskResult:
    return plan_pb2.TaskResult(task=task, attempt_epoch=epoch, released=plan_pb2.TaskReleased(reason=reason))
