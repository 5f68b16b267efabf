"""Converts the report of a dataset's preflight to protobuf."""

from engine.alignment.preflight import Preflight
from muxtune.v1 import dataset_pb2
from services.message_parts import cut


def preflight_to_proto(report: Preflight, max_refused: int = 100) -> dataset_pb2.PreflightReport:
    """Convert the report. It has fewer samples, at least one, where they would be larger than a message."""
    samples = (
        dataset_pb2.RenderedRow(
            line=row.line,
            num_tokens=row.num_tokens,
            pieces=[
                dataset_pb2.RenderedRow.Piece(text=p.text, bears_loss=p.bears_loss, num_tokens=p.num_tokens)
                for p in row.pieces
            ],
            is_heldout=row.is_heldout,
        )
        for row in report.samples
    )
    return dataset_pb2.PreflightReport(
        num_rows=report.num_rows,
        num_train_rows=report.num_train_rows,
        num_heldout_rows=report.num_heldout_rows,
        num_tokens_per_epoch=report.num_tokens_per_epoch,
        num_target_tokens_per_epoch=report.num_target_tokens_per_epoch,
        num_steps=report.num_steps,
        num_train_tokens=report.num_train_tokens,
        samples=next(cut(samples), []),
        length_histogram=[
            dataset_pb2.LengthBucket(from_tokens=low, to_tokens=high, num_rows=count)
            for (low, high), count in sorted(report.length_histogram.items())
        ],
        num_truncated_rows=report.num_truncated_rows,
        refused_rows=[dataset_pb2.RefusedRow(line=r.line, reason=r.reason) for r in report.refused[:max_refused]],
        num_refused_rows=len(report.refused),
        length_quantiles=report.length_quantiles,
        num_special_text_rows=report.num_special_text_rows,
    )
