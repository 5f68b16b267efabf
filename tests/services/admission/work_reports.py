"""Results of an executor with the work that it did for them: effective tokens, padding tokens, device seconds."""

from muxtune.v1 import event_pb2, plan_pb2

Work = tuple[int, int, float]


def fill_work(report: event_pb2.StepDone | event_pb2.Evaluated | plan_pb2.WorkInProgress, work: Work) -> None:
    report.effective_tokens, report.padding_tokens, report.device_seconds = work


def step_with_work(task: str, attempt: int, number: int, work: Work) -> plan_pb2.TaskResult:
    done = event_pb2.StepDone(step=number, loss=1.0)
    fill_work(done, work)
    return plan_pb2.TaskResult(task=task, attempt=attempt, step_done=done)


def evaluation(task: str, attempt: int, number: int, work: Work) -> plan_pb2.TaskResult:
    evaluated = event_pb2.Evaluated(step=number, loss=2.0)
    fill_work(evaluated, work)
    return plan_pb2.TaskResult(task=task, attempt=attempt, evaluated=evaluated)


def in_progress(
    task: str, attempt: int, steps_done: int, work: Work, *, is_evaluation: bool = False
) -> plan_pb2.TaskResult:
    report = plan_pb2.WorkInProgress(step=steps_done, is_evaluation=is_evaluation)
    fill_work(report, work)
    return plan_pb2.TaskResult(task=task, attempt=attempt, in_progress=report)
