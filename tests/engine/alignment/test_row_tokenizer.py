"""A dataset with rows of all shapes, in batches of any size, equals transformers' results for each row."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from engine.alignment import row_tokenizer
from engine.alignment.dataset import tokenize_dataset
from engine.alignment.jsonl_rows import Row, parse_lines
from engine.alignment.row_tokenizer import RowRefusedError, tokenize, tokenize_all
from engine.alignment.tokenizer import BackboneTokenizer
from engine.errors import InvalidInputError
from engine.task import Overlength, Training
from tests.engine.alignment.test_special_tokens import KINDS
from tests.thoroughness import examples
from tests.tiny_tokenizer import CHATML, write_tokenizer

ANSWER = "{{ message['content'] + '<|im_end|>\n' }}"
# CHATML with its answers marked, for transformers' mask. Ours get CHATML, which is recognised by syntax, and LOOPED,
# which is not, so that every prefix is rendered.
MARKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}"
    + ANSWER
    + "{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LOOPED = CHATML.replace("{% for", "{% set n = messages|length %}{% for")
SPECIAL = ("<|im_start|>", "<|im_end|>", "</s>", "<s>", "<pad>")


@pytest.fixture(scope="module", params=[CHATML, LOOPED], ids=["recognised by syntax", "rendered by prefix"])
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[BackboneTokenizer, Any]:
    ours, theirs = (
        write_tokenizer(tmp_path_factory.mktemp("tiny"), template, adds_bos=True)
        for template in (request.param, MARKED)
    )
    return BackboneTokenizer.load(ours), AutoTokenizer.from_pretrained(theirs)


HONEST = ["", " ", "the quick brown fox ", "\r\n", "\n\n", "a\x00b", "Grüße 日本 🙂", "e\u0301\u200d\u202e", '"\\u0022']
honest = st.sampled_from(HONEST) | st.text(st.characters(exclude_categories=["Cs"]), max_size=9)
honest_text = st.lists(honest, max_size=6).map("".join)
spelling = st.lists(honest | st.sampled_from(SPECIAL), max_size=6).map("".join)
turn = st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant"]), "content": honest_text})
spelled_turn = st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": spelling})
spelled_rows = st.fixed_dictionaries({"messages": st.lists(spelled_turn, max_size=3)}).map(
    lambda row: {"messages": [*row["messages"], {"role": "assistant", "content": "</s>z"}]}
)
rows = st.one_of(
    st.fixed_dictionaries({"text": spelling}),
    st.fixed_dictionaries({"prompt": spelling, "completion": spelling}),
    st.fixed_dictionaries({"messages": st.lists(turn, max_size=4)}).map(
        lambda row: {"messages": [*row["messages"], {"role": "assistant", "content": "z"}]}
    ),
)


def expected(row: dict[str, Any], theirs: Any, parses: bool) -> tuple[list[int], list[int]]:
    """Return transformers' token ids, and a 1 for each token that bears loss."""
    if "messages" in row:
        rendered = theirs.apply_chat_template(row["messages"], return_assistant_tokens_mask=True, return_dict=True)
        return list(rendered["input_ids"]), list(rendered["assistant_masks"])
    eos, how = theirs.eos_token_id, {"split_special_tokens": not parses}
    prompt = theirs(row["prompt"], **how)["input_ids"] if "prompt" in row else []
    text = row["completion"] if "prompt" in row else row["text"]
    ids = theirs(text, add_special_tokens="prompt" not in row, **how)["input_ids"]
    prompt, ids = prompt[:-1] if prompt[-1:] == [eos] else prompt, ids if ids[-1:] == [eos] else [*ids, eos]
    return prompt + ids, [0] * len(prompt) + [1] * len(ids)


@given(
    data=st.lists(st.tuples(rows, st.booleans(), st.sampled_from([b"\n", b"\r\n", b"\n \n"])), min_size=1, max_size=12),
    limit=st.integers(1, 40) | st.just(10_000),
    overlength=st.sampled_from([Overlength.TRUNCATE, Overlength.DROP]),
    parses=st.booleans(),
    batch=st.sampled_from([(512, 1 << 16), (1, 1), (3, 1 << 16), (512, 40)]),
)
@settings(max_examples=examples(150), deadline=None)
def test_a_dataset_has_the_tokens_of_transformers_for_each_row(
    both: tuple[BackboneTokenizer, Any],
    data: Any,
    limit: int,
    overlength: Overlength,
    parses: bool,
    batch: tuple[int, int],
) -> None:
    ours, theirs = both
    file = b"".join(json.dumps(row, ensure_ascii=ascii).encode() + end for row, ascii, end in data)
    remaining, refused, lengths, num_cut, line = [], [], [], 0, 1
    for row, _, end in data:
        ids, bears_loss = expected(row, theirs, parses)
        learns = any(bears_loss[1:])
        lengths += [len(ids)] * learns
        if not learns:
            refused.append((line, "no token bears loss"))
        elif len(ids) > limit and overlength is Overlength.DROP:
            refused.append((line, f"{len(ids)} tokens, over max_sequence_tokens {limit}"))
        elif not any(bears_loss[1:limit]):
            refused.append((line, f"no token bears loss within max_sequence_tokens {limit}"))
        else:
            remaining.append((line, ids[:limit], bears_loss[:limit]))
            num_cut += len(ids) > limit
        line += end.count(b"\n")
    training = Training(
        1e-3, num_epochs=1, max_sequence_tokens=limit, overlength=overlength, parse_special_tokens=parses
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_tokenizer, "_BATCH_ROWS", batch[0])
        patch.setattr(row_tokenizer, "_BATCH_CHARACTERS", batch[1])
        parsed_rows = parse_lines(file.splitlines(keepends=True))
        if not remaining:
            with pytest.raises(InvalidInputError, match=f"line {refused[0][0]}: {refused[0][1]}"):
                tokenize_dataset(parsed_rows, ours, training)
            return
        actual = tokenize_dataset(parsed_rows, ours, training)
    assert [(line, *map(np.ndarray.tolist, actual.row(i))) for i, line in enumerate(actual.lines)] == remaining
    assert [(row.line, row.reason) for row in actual.refused] == refused
    assert actual.original_lengths.tolist() == lengths
    assert actual.num_truncated == num_cut


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: kind.__name__)
def any_kind(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> BackboneTokenizer:
    folder = request.param(tmp_path_factory.mktemp("tokenizer") / "folder")
    (folder / "chat_template.jinja").write_text(CHATML)
    return BackboneTokenizer.load(folder)


@given(data=st.data())
@settings(max_examples=examples(60), deadline=None)
def test_a_row_does_not_depend_on_its_neighbours(any_kind: BackboneTokenizer, data: st.DataObject) -> None:
    """Also beside rows that spell special tokens and rows that a model turns into special tokens."""
    ours = any_kind
    forging = {"messages": [{"role": "user", "content": "a</s>b"}, {"role": "assistant", "content": "\ufb01</s>"}]}
    drawn = data.draw(st.lists(rows | spelled_rows | st.just(forging), min_size=1, max_size=8))
    parsed_rows = list(parse_lines(json.dumps(row).encode() for row in drawn))
    alone, refused = [], []
    for row in parsed_rows:
        try:
            alone.append(tokenize(row, ours))
        except RowRefusedError as error:
            refused.append((row.line, str(error)))
    together = list(tokenize_all(parsed_rows, ours))
    actual = [part.row(index) for part in together for index in range(len(part.lines))]
    assert [(row.line, row.token_ids_L.tolist(), row.bears_loss_L.tolist(), row.spells_special) for row in actual] == [
        (row.line, row.token_ids_L.tolist(), row.bears_loss_L.tolist(), row.spells_special) for row in alone
    ]
    assert [(row.line, row.reason) for part in together for row in part.refused] == refused


def test_refusals_keep_the_order_of_rows(both: tuple[BackboneTokenizer, Any]) -> None:
    """For rows without a target and rows over the limit, in one batch and in several."""
    ours, _ = both
    texts = ["", "a", "the quick brown fox " * 9, "", "b", "the lazy dog " * 9, "c", ""]
    data = [Row(line, "prompt_completion", {"prompt": text, "completion": text}) for line, text in enumerate(texts, 1)]
    data[2], data[5] = (Row(row.line, "text", {"text": row.fields["prompt"]}) for row in (data[2], data[5]))
    training = Training(1e-3, num_epochs=1, max_sequence_tokens=4, overlength=Overlength.DROP)
    for size in (1, 2, 100):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(row_tokenizer, "_BATCH_ROWS", size)
            actual = tokenize_dataset(iter(data), ours, training)
        assert [row.line for row in actual.refused] == [3, 6] and actual.lines.tolist() == [1, 2, 4, 5, 7, 8]


def test_the_first_row_that_is_too_long_is_reported(both: tuple[BackboneTokenizer, Any]) -> None:
    ours, _ = both
    data = [Row(line, "text", {"text": "the quick brown fox " * line}) for line in range(1, 30)]
    training = Training(1e-3, num_epochs=1, max_sequence_tokens=20, overlength=Overlength.REFUSE)
    first = next(row.line for row in data if len(tokenize(row, ours).token_ids_L) > 20)
    with pytest.raises(InvalidInputError, match=f"line {first} has"):
        tokenize_dataset(iter(data), ours, training)


def test_a_surrogate_that_the_template_writes_refuses_the_row(tmp_path: Path) -> None:
    """Contents are checked before; other fields may contain one, and few templates write such a field."""
    template = "{% for m in messages %}{{ m.name }}:{{ m.content }}{% endfor %}"
    ours = BackboneTokenizer.load(write_tokenizer(tmp_path, template))
    line = rb'{"messages":[{"role":"user","content":"a","name":"\ud800"},{"role":"assistant","content":"b"}]}'
    (row,) = parse_lines([line])
    with pytest.raises(RowRefusedError, match="chat template writes a lone surrogate"):
        tokenize(row, ours)


@pytest.mark.parametrize(
    ("num_characters", "limit", "most"),
    [(10, 10_000, 1 + row_tokenizer._BATCHES_AHEAD), (60, 100, 1 + 1), (300, 100, 1 + 1)],
    ids=["batches", "characters", "one row larger than all that may be ahead"],
)
def test_few_rows_are_in_memory_at_once(
    both: tuple[BackboneTokenizer, Any], monkeypatch: pytest.MonkeyPatch, num_characters: int, limit: int, most: int
) -> None:
    """In memory are the rows in work and the one that waits for them, however many rows the dataset has."""
    monkeypatch.setattr(row_tokenizer, "_BATCH_ROWS", 1)
    monkeypatch.setattr(row_tokenizer, "_CHARACTERS_AHEAD", limit)
    num_parsed = 0

    def parsed() -> Iterator[Row]:
        nonlocal num_parsed
        for line in range(1, 50):
            num_parsed += 1
            yield Row(line, "text", {"text": "x" * num_characters})

    for num_done, part in enumerate(tokenize_all(parsed(), both[0])):
        assert part.lines.tolist() == [num_done + 1]
        assert num_parsed - num_done <= most


def test_an_error_of_the_rows_ends_tokenization(both: tuple[BackboneTokenizer, Any]) -> None:
    def stopped() -> Iterator[Row]:
        yield Row(1, "text", {"text": "the quick brown fox"})
        raise InvalidInputError("enough")

    with pytest.raises(InvalidInputError, match="enough"):
        tokenize_dataset(stopped(), both[0], Training(1e-3, num_epochs=1))
