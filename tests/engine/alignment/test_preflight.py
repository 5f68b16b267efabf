"""The preview of a dataset before a task is created."""

import json

import numpy as np
import pytest

from engine.alignment.dataset import RowOrder, split, tokenize_dataset
from engine.alignment.jsonl_rows import parse_lines
from engine.alignment.preflight import preflight
from engine.alignment.tokenizer import BackboneTokenizer
from engine.task import Training

ROWS = [
    {"messages": [{"role": "user", "content": "Grüße 🙂"}, {"role": "assistant", "content": "日本 hello"}]},
    {"prompt": "the quick", "completion": " brown fox"},
    {"text": ""},
    {"text": "hello " * 40},
    {"text": "1 2 3"},
]


@pytest.mark.parametrize("options", [{"num_epochs": 2}, {"num_steps": 7}, {"num_epochs": 1, "shuffle": False}])
def test_counts(tokenizer: BackboneTokenizer, options: dict[str, int]) -> None:
    training = Training(1e-3, global_batch_size=2, max_sequence_tokens=32, heldout_fraction=0.25, **options)
    dataset = tokenize_dataset(parse_lines(json.dumps(r).encode() for r in ROWS), tokenizer, training)
    report = preflight(dataset, tokenizer, training, num_samples=10)
    parts = split(4, training)
    lengths = np.diff(dataset.offsets)
    assert (report.num_rows, report.num_train_rows, report.num_heldout_rows) == (5, 3, 1)
    assert report.num_truncated_rows == 1
    assert [(r.line, r.reason) for r in report.refused] == [(3, "no token bears loss")]
    assert report.num_tokens_per_epoch == lengths[parts.train].sum()
    assert report.num_target_tokens_per_epoch == sum(dataset.num_targets(int(i)) for i in parts.train)
    order = RowOrder(training, parts.train)
    assert report.num_train_tokens == sum(lengths[order.batch(step)].sum() for step in range(report.num_steps))
    assert [row.line for row in report.samples if row.is_heldout] == [int(dataset.lines[parts.heldout[0]])]
    assert set(report.length_quantiles) == set(lengths[parts.train].tolist()) and len(report.length_quantiles) == 64
    assert np.mean(report.length_quantiles) == pytest.approx(lengths[parts.train].mean(), rel=0.05)
    assert list(report.length_quantiles) == sorted(report.length_quantiles)
    assert sum(report.length_histogram.values()) == 4
    for (low, high), count in report.length_histogram.items():
        assert count == sum(low <= n < high for n in dataset.original_lengths)


def test_samples_show_the_whole_row_and_its_loss(tokenizer: BackboneTokenizer) -> None:
    training = Training(1e-3, num_epochs=1)
    dataset = tokenize_dataset(parse_lines(json.dumps(r).encode() for r in ROWS), tokenizer, training)
    chat, pair, *_ = preflight(dataset, tokenizer, training, num_samples=2).samples
    assert [(p.text, p.bears_loss) for p in chat.pieces] == [
        ("<|im_start|>user\nGrüße 🙂<|im_end|>\n<|im_start|>assistant\n", False),
        ("日本 hello<|im_end|>", True),
        ("\n", False),
    ]
    assert [(p.text, p.bears_loss) for p in pair.pieces] == [("the quick", False), (" brown fox<|im_end|>", True)]
    for row in (chat, pair):
        assert sum(piece.num_tokens for piece in row.pieces) == row.num_tokens


def test_pieces_join_to_the_row_with_a_decoder_that_drops_leading_spaces() -> None:
    """A sentencepiece decoder drops the first space of each piece that is decoded separately."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {piece: i for i, piece in enumerate(["<unk>", "</s>", "▁a", "▁b", "▁c"])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Metaspace()
    tokenizer = BackboneTokenizer(inner, {"eos_token": "</s>"}, None)
    training = Training(1e-3, num_epochs=1)
    rows = parse_lines([b'{"prompt": "a b", "completion": "c a"}'])
    (sample,) = preflight(tokenize_dataset(rows, tokenizer, training), tokenizer, training, num_samples=1).samples
    assert [piece.text for piece in sample.pieces] == ["a b", " c a</s>"]
