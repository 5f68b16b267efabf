"""Converts the results of steps and evaluations to protobuf."""

import dataclasses

from engine.results import EvaluationResult, StepResult, WorkInProgress
from muxtune.v1 import event_pb2, execution_pb2, plan_pb2

ATTEMPT_ENDS = frozenset({"finished", "failed", "released"})  # kinds of result after which an attempt is over


def step_to_proto(result: StepResult) -> event_pb2.StepDone:
    check = None
    if result.shadow_check is not None:
        check = event_pb2.ShadowCheck(**dataclasses.asdict(result.shadow_check))
    return event_pb2.StepDone(
        shadow_check=check,
        step=result.step,
        loss=result.loss,
        learning_rate=result.learning_rate,
        grad_norm=result.grad_norm,
        effective_tokens=result.num_effective_tokens,
        target_tokens=result.num_target_tokens,
        padding_tokens=result.num_padding_tokens,
        device_seconds=result.seconds,
        num_neighbours=result.num_neighbours,
        input_digest=result.input_digest,
    )


def evaluation_to_proto(result: EvaluationResult) -> event_pb2.Evaluated:
    return event_pb2.Evaluated(
        step=result.step,
        loss=result.loss,
        effective_tokens=result.num_effective_tokens,
        target_tokens=result.num_target_tokens,
        padding_tokens=result.num_padding_tokens,
        device_seconds=result.seconds,
    )


def work_in_progress_to_proto(work: WorkInProgress) -> plan_pb2.WorkInProgress:
    return plan_pb2.WorkInProgress(
        step=work.step,
        is_evaluation=work.is_evaluation,
        device_seconds=work.seconds,
        effective_tokens=work.num_effective_tokens,
        padding_tokens=work.num_padding_tokens,
    )


def exported_to_proto(finished: plan_pb2.TaskFinished) -> execution_pb2.ExportAdapterResponse:
    """Return the response of ExportAdapter."""
    return execution_pb2.ExportAdapterResponse(
        step=finished.step,
        adapter_key=finished.adapter_key,
        max_logit_difference=finished.max_logit_difference,
    )
