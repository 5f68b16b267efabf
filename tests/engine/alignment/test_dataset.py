"""Splits, order and truncation are pure functions of their arguments."""

import collections
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.alignment.dataset import RowOrder, TokenizedDataset, num_steps, split, tokenize_dataset
from engine.alignment.jsonl_rows import Row, parse_lines
from engine.alignment.row_tokenizer import tokenize
from engine.alignment.tokenizer import BackboneTokenizer
from engine.errors import InvalidInputError
from engine.task import Overlength, Training
from tests.thoroughness import examples
from tests.tiny_tokenizer import write_tokenizer

trainings = st.builds(
    Training,
    learning_rate=st.just(1e-3),
    num_epochs=st.integers(1, 3),
    global_batch_size=st.integers(1, 9),
    seed=st.integers(0, 2**64 - 1),
    shuffle=st.booleans(),
    heldout_fraction=st.sampled_from([0.0, 0.01, 0.25, 0.9]),
)


def _tokenized(tokenizer: BackboneTokenizer, rows: list[dict[str, str]], **options: object) -> TokenizedDataset:
    training = Training(learning_rate=1e-3, num_epochs=1, **options)  # type: ignore[arg-type]
    return tokenize_dataset(parse_lines(json.dumps(row).encode() for row in rows), tokenizer, training)


@given(num_rows=st.integers(2, 60), training=trainings)
@settings(deadline=None)
def test_split_is_a_partition_by_the_seed(num_rows: int, training: Training) -> None:
    parts = split(num_rows, training)
    assert sorted([*parts.train, *parts.heldout]) == list(range(num_rows))
    assert len(parts.train) >= 1
    if training.heldout_fraction:
        assert len(parts.heldout) == min(num_rows - 1, max(1, round(num_rows * training.heldout_fraction)))
    else:
        assert len(parts.heldout) == 0
    again = split(num_rows, training)
    assert np.array_equal(again.train, parts.train) and np.array_equal(again.heldout, parts.heldout)


@given(num_rows=st.integers(2, 60), training=trainings)
@settings(deadline=None)
def test_each_epoch_uses_every_training_row_once(num_rows: int, training: Training) -> None:
    train = split(num_rows, training).train
    steps_per_epoch = math.ceil(len(train) / training.global_batch_size)
    steps = num_steps(training, len(train))
    assert steps == training.num_epochs * steps_per_epoch
    order = RowOrder(training, train)
    batches = [order.batch(step).tolist() for step in range(steps)]
    for epoch in range(training.num_epochs or 0):
        seen = [row for batch in batches[epoch * steps_per_epoch : (epoch + 1) * steps_per_epoch] for row in batch]
        assert collections.Counter(seen) == collections.Counter(train.tolist())
        if not training.shuffle:
            assert seen == train.tolist()
    # Random access: any step alone, on a fresh object and backwards, is the same.
    for step in reversed(range(steps)):
        assert RowOrder(training, train).batch(step).tolist() == batches[step]
        assert order.batch(step).tolist() == batches[step]


def test_order_differs_by_epoch_and_seed_and_never_changes() -> None:
    rows = np.arange(10)
    first = RowOrder(Training(1e-3, num_epochs=2, global_batch_size=10, seed=7), rows)
    assert first.batch(0).tolist() != first.batch(1).tolist()
    assert (
        RowOrder(Training(1e-3, num_epochs=2, global_batch_size=10, seed=8), rows).batch(0).tolist()
        != first.batch(0).tolist()
    )
    # numpy's Philox keyed by (seed, epoch + 1): written down, so that a release cannot change what tenants resume.
    reference = np.random.Generator(np.random.Philox(key=np.array([7, 1], np.uint64))).permutation(10)
    assert first.batch(0).tolist() == reference.tolist()


def test_num_steps_may_span_several_epochs() -> None:
    training = Training(1e-3, num_steps=7, global_batch_size=4)
    assert num_steps(training, 5) == 7
    assert [len(RowOrder(training, np.arange(5)).batch(step)) for step in range(7)] == [4, 1, 4, 1, 4, 1, 4]


def test_one_row_cannot_be_split() -> None:
    with pytest.raises(InvalidInputError, match="heldout_fraction"):
        split(1, Training(1e-3, num_epochs=1, heldout_fraction=0.5))


def test_rows_are_stored_flat(tokenizer: BackboneTokenizer) -> None:
    dataset = _tokenized(tokenizer, [{"text": "hello"}, {"prompt": "the fox", "completion": " jumps"}])
    assert dataset.num_rows == 2 and dataset.lines.tolist() == [1, 2]
    ids, bears_loss = dataset.row(1)
    assert tokenizer.decode(ids) == "the fox jumps<|im_end|>"
    assert dataset.num_targets(1) == bears_loss.sum()
    assert dataset.num_targets(0) == len(dataset.row(0)[0]) - 1  # no token precedes a row's first token
    assert dataset.num_bytes >= dataset.token_ids_S.nbytes


LONG = {"text": "the lazy dog jumps over the quick brown fox " * 4}
LATE = {"prompt": "the lazy dog jumps over the quick brown fox " * 4, "completion": "x"}


def test_truncate(tokenizer: BackboneTokenizer) -> None:
    dataset = _tokenized(tokenizer, [LONG, {"text": "hi"}, LATE], max_sequence_tokens=10)
    whole = _tokenized(tokenizer, [LONG])
    assert dataset.row(0)[0].tolist() == whole.row(0)[0][:10].tolist()
    assert dataset.num_truncated == 1
    assert [(r.line, "no token bears loss within" in r.reason) for r in dataset.refused] == [(3, True)]
    assert dataset.original_lengths.max() > 10


def test_drop(tokenizer: BackboneTokenizer) -> None:
    dataset = _tokenized(tokenizer, [LONG, {"text": "hi"}], max_sequence_tokens=10, overlength=Overlength.DROP)
    assert dataset.lines.tolist() == [2] and dataset.num_truncated == 0
    assert dataset.refused[0].line == 1 and "max_sequence_tokens 10" in dataset.refused[0].reason


def test_refuse(tokenizer: BackboneTokenizer) -> None:
    with pytest.raises(InvalidInputError, match=r"line 2 has \d+ tokens, over 10"):
        _tokenized(tokenizer, [{"text": "hi"}, LONG], max_sequence_tokens=10, overlength=Overlength.REFUSE)


def test_every_row_refused(tokenizer: BackboneTokenizer) -> None:
    with pytest.raises(InvalidInputError, match="every row is refused; line 1"):
        _tokenized(tokenizer, [{"text": ""}, {"text": ""}])
    with pytest.raises(InvalidInputError, match="has no rows"):
        tokenize_dataset([], tokenizer, Training(1e-3, num_epochs=1))


# Some answers have no token, and no text separates them.
BARE = (
    "{% for m in messages %}{{ m.content if m.role == 'assistant' else m.content + ';' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '' }}{% endif %}"
)


@given(
    chats=st.lists(st.lists(st.sampled_from(["", "", "a", "the fox"]), min_size=1, max_size=6), min_size=1, max_size=4),
    limit=st.integers(3, 12),
)
@settings(max_examples=examples(100), deadline=None)
def test_loss_masks_are_stored_row_by_row(bare: BackboneTokenizer, chats: list[list[str]], limit: int) -> None:
    rows = [
        Row(i, "messages", {"messages": [{"role": "user", "content": "q"}]
                            + [{"role": "assistant", "content": content} for content in chat]})
        for i, chat in enumerate([*chats, ["the"]])
    ]  # fmt: skip
    dataset = tokenize_dataset(rows, bare, Training(1e-3, num_epochs=1, max_sequence_tokens=limit))
    for index, line in enumerate(dataset.lines):
        alone = tokenize(rows[line], bare)
        ids, bears_loss = dataset.row(index)
        assert ids.tolist() == alone.token_ids_L[:limit].tolist()
        assert bears_loss.tolist() == alone.bears_loss_L[:limit].tolist()


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> BackboneTokenizer:
    return BackboneTokenizer.load(write_tokenizer(tmp_path_factory.mktemp("bare"), BARE))
