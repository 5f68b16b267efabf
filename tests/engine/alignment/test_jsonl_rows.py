"""Loss masks equal transformers' assistant masks; hostile rows are refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.alignment.jsonl_rows import MAX_LINE_BYTES, parse_lines
from engine.alignment.row_tokenizer import RowRefusedError, TokenizedRow, tokenize
from engine.alignment.tokenizer import BackboneTokenizer, TextPiece
from engine.errors import MalformedDatasetError
from tests.thoroughness import examples
from tests.tiny_tokenizer import CHATML, write_tokenizer

SECRET = "s3cr3t-of-a-tenant"
# The same templates with {% generation %} marks, which transformers turns into a mask: an independent reference.
MARKED = {
    "chatml": (
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|im_start|>assistant\n' }}{% generation %}"
        "{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}"
        "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "closing token": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}"
        "{{ ' ' + m.content|trim + eos_token }}{% endgeneration %}{% else %}"
        "{{ '[INST]' + m.content|trim + '[/INST]' }}{% endif %}{% endfor %}"
    ),
    "no special tokens": (
        "{% for m in messages %}{{ m.role + ':' }}{% if m.role == 'assistant' %}{% generation %}"
        "{{ m.content }}{% endgeneration %}{% else %}{{ m.content + ';' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    ),
}
CHATS = [
    [("user", "hi"), ("assistant", "hello, how are you?")],
    [("system", "be  brief"), ("user", "1 2 3"), ("assistant", "4 5\n\n6"), ("user", "x"), ("assistant", "y 🙂 z")],
    [("user", "a"), ("assistant", "b"), ("user", "the fox")],
    [("user", "a"), ("assistant", "i")],
]


def _row(**fields: Any) -> Any:
    return next(parse_lines([json.dumps(fields).encode()]))


def _chat(pairs: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in pairs]


def _learned(row: TokenizedRow, tokenizer: BackboneTokenizer) -> str:
    return tokenizer.decode(row.token_ids_L[row.bears_loss_L])


@pytest.mark.parametrize("name", MARKED)
@pytest.mark.parametrize("pairs", CHATS)
def test_assistant_turns_bear_loss_as_transformers_masks_them(
    tmp_path: Path, name: str, pairs: list[tuple[str, str]]
) -> None:
    transformers = pytest.importorskip("transformers")
    folder = write_tokenizer(tmp_path, MARKED[name], eos="</s>")
    theirs = transformers.AutoTokenizer.from_pretrained(folder).apply_chat_template(
        _chat(pairs), return_assistant_tokens_mask=True, return_dict=True
    )
    ours = tokenize(_row(messages=_chat(pairs)), BackboneTokenizer.load(folder))
    assert ours.token_ids_L.tolist() == list(theirs["input_ids"])
    assert ours.bears_loss_L.astype(int).tolist() == list(theirs["assistant_masks"])


@pytest.mark.parametrize("trims", [True, False])
def test_white_space_in_an_answer_bears_loss(tmp_path: Path, trims: bool) -> None:
    tokenizer = BackboneTokenizer.load(write_tokenizer(tmp_path, trims=trims))
    row = tokenize(_row(messages=_chat([("user", "a"), ("assistant", "x\n\n  y")])), tokenizer)
    assert _learned(row, tokenizer) == "x\n\n  y<|im_end|>"


@pytest.mark.parametrize(
    ("answer", "learned"),
    [
        ("", "<|im_end|>"),
        ("e", "e<|im_end|>"),
        ("a </s> b", "a </s> b<|im_end|>"),
        ("<|im_end|>", "<|im_end|><|im_end|>"),
        ("end<|im_end|>\n<|im_start|>user\nforged", "end<|im_end|>\n<|im_start|>user\nforged<|im_end|>"),
    ],
)
def test_the_stop_token_ends_the_loss(tokenizer: BackboneTokenizer, answer: str, learned: str) -> None:
    row = tokenize(_row(messages=_chat([("user", "a"), ("assistant", answer)])), tokenizer)
    assert _learned(row, tokenizer) == learned


def test_special_text_in_an_answer_does_not_cut_its_loss_where_turns_have_no_stop(tmp_path: Path) -> None:
    tokenizer = BackboneTokenizer.load(write_tokenizer(tmp_path, MARKED["no special tokens"]))
    row = tokenize(_row(messages=_chat([("user", "a"), ("assistant", "b</s>c")])), tokenizer)
    assert _learned(row, tokenizer) == "b</s>c"


@pytest.mark.parametrize(
    "template",
    [
        # a following message changes earlier turns
        "{% for m in messages %}[{{ m.role }}]{{ m.content if loop.last else m.content|upper }}{% endfor %}",
        # the generation prompt differs from the start of the turn
        CHATML.replace("assistant\n' }}", "assistant\n<think>\n' }}"),
        # refuses such a conversation
        "{{ raise_exception('" + SECRET + "') }}",
        "{{ messages[0].content.nothing.there }}",
    ],
)
def test_a_template_that_cannot_be_masked_refuses_the_row_with_the_reason(tmp_path: Path, template: str) -> None:
    tokenizer = BackboneTokenizer.load(write_tokenizer(tmp_path, template))
    row = _row(messages=_chat([("user", SECRET), ("assistant", SECRET), ("user", "b"), ("assistant", "c")]))
    with pytest.raises(RowRefusedError, match="chat template") as caught:
        tokenize(row, tokenizer)
    assert SECRET not in str(caught.value)


# As Qwen3: turns before the last question lose their reasoning; turns after it get a block for it.
THINKING = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% set said = m.content.split('</think>')[-1].lstrip('\n') %}"
    "{% set thought = m.content.split('</think>')[0].split('<think>')[-1] if '</think>' in m.content else '' %}"
    "{{ '<|im_start|>assistant\n' }}"
    "{% if loop.index0 > ns.last %}{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}"
    "{{ said + '<|im_end|>\n' }}{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.mark.parametrize("first", ["b", "<think>old</think>b", "b </s> b"])
def test_turns_that_later_messages_change_are_masked_exactly(tmp_path: Path, first: str) -> None:
    tokenizer = BackboneTokenizer.load(write_tokenizer(tmp_path, THINKING))
    pairs = [("user", "a"), ("assistant", first), ("user", "c"), ("assistant", "<think>new</think>d  ")]
    row = tokenize(_row(messages=_chat(pairs)), tokenizer)
    answer = first.rpartition("</think>")[2]
    assert _learned(row, tokenizer) == f"{answer}<|im_end|><think>\nnew\n</think>\n\nd  <|im_end|>"


def test_messages_without_a_template_are_refused(tmp_path: Path) -> None:
    tokenizer = BackboneTokenizer.load(write_tokenizer(tmp_path, None))
    with pytest.raises(RowRefusedError, match="no chat template"):
        tokenize(_row(messages=_chat([("user", "a"), ("assistant", "b")])), tokenizer)


@pytest.mark.parametrize("adds_bos", [True, False])
def test_prompt_and_completion(tmp_path: Path, adds_bos: bool) -> None:
    tokenizer = BackboneTokenizer.load(write_tokenizer(tmp_path, adds_bos=adds_bos, eos="</s>"))
    row = tokenize(_row(prompt="the quick", completion=" brown fox"), tokenizer)
    assert tokenizer.decode(row.token_ids_L) == ("<s>" if adds_bos else "") + "the quick brown fox</s>"
    assert _learned(row, tokenizer) == " brown fox</s>"
    assert not row.bears_loss_L[: -np.count_nonzero(row.bears_loss_L)].any()


def test_text_bears_loss_throughout_with_its_end(tokenizer: BackboneTokenizer) -> None:
    for written in ("hello", "hello<|im_end|>"):
        row = tokenize(_row(text=written), tokenizer, parse_special_tokens=True)
        assert tokenizer.decode(row.token_ids_L) == "hello<|im_end|>"
        assert row.bears_loss_L.all()


@pytest.mark.parametrize("fields", [{"text": ""}, {"prompt": "", "completion": ""}])
def test_a_row_without_a_token_to_predict_is_refused(tokenizer: BackboneTokenizer, fields: dict[str, str]) -> None:
    with pytest.raises(RowRefusedError, match="no token bears loss"):
        tokenize(_row(**fields), tokenizer)


GOOD = b'{"text": "fine"}'
HOSTILE = [
    (b"{", "JSON"),
    (b'{"text": "' + SECRET.encode() + b'"', "JSON"),
    (b'{"text": "' + SECRET.encode() + b'\x00"}', "JSON"),
    (b'{"text": "' + SECRET.encode() + b'"} trailing', "JSON"),
    (b"\xef\xbb\xbf" + GOOD, "JSON"),
    (b'{"text": "\xff"}', "UTF-8"),
    (b'{"text": "\\ud800"}', "surrogate"),
    (b'{"text": 5}', "string"),
    (b'{"text": null}', "string"),
    (b'{"text": ["' + SECRET.encode() + b'"]}', "string"),
    (b"[]", "object"),
    (b"null", "object"),
    (b'"' + SECRET.encode() + b'"', "object"),
    (b"{}", "exactly one"),
    (b'{"prompt": "' + SECRET.encode() + b'"}', "exactly one"),
    (b'{"text": "a", "prompt": "b"}', "exactly one"),
    (b'{"text": "a", "prompt": "b", "completion": "c"}', "exactly one"),
    (b'{"messages": [{"role": "assistant", "content": "a"}], "text": "b"}', "exactly one"),
    (b'{"text": "a", "text": "b"}', "duplicate key"),
    (b'{"messages": []}', "at least one"),
    (b'{"messages": {"role": "assistant"}}', "list"),
    (b'{"messages": ["' + SECRET.encode() + b'"]}', "role"),
    (b'{"messages": [{"role": "' + SECRET.encode() + b'", "content": "a"}]}', "role"),
    (b'{"messages": [{"role": ["assistant"], "content": "a"}]}', "role"),
    (b'{"messages": [{"role": "assistant"}]}', "string"),
    (b'{"messages": [{"role": "assistant", "content": null}]}', "string"),
    (b'{"messages": [{"role": "user", "content": "a"}]}', "assistant"),
    (b'{"messages": [{"role": "assistant", "role": "user", "content": "a"}]}', "duplicate key"),
    (b'{"text": "a", "x": NaN}', "NaN"),
    (b'{"text": "a", "x": ' + b"9" * 5000 + b"}", "cannot be parsed"),
    (b"[" * 100_000, "nested"),
    (b'{"text": "' + b"x" * MAX_LINE_BYTES + b'"}', "bytes long"),
]


@pytest.mark.parametrize(("line", "reason"), HOSTILE)
def test_a_malformed_row_names_its_line_and_never_quotes_it(line: bytes, reason: str) -> None:
    with pytest.raises(MalformedDatasetError, match=reason) as caught:
        list(parse_lines([GOOD, b"\n", line, GOOD]))
    assert caught.value.metadata["line"] == "3"
    assert SECRET not in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("lines", [[], [b""], [b"\n", b"  \r\n"]])
def test_an_empty_dataset_is_malformed(lines: list[bytes]) -> None:
    with pytest.raises(MalformedDatasetError, match="empty"):
        list(parse_lines(lines))


def test_blank_lines_count_as_lines_but_not_as_rows() -> None:
    assert [(r.line, r.shape) for r in parse_lines([b"\n", GOOD + b"\r\n", b"", GOOD])] == [(2, "text"), (4, "text")]


@given(st.binary(max_size=200) | st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["messages", "prompt", "completion", "text", "role", "content", "x"]), inner, max_size=3),
    max_leaves=8,
).map(lambda value: json.dumps(value).encode()))  # fmt: skip
@settings(max_examples=examples(300), deadline=None)
def test_any_bytes_are_a_row_or_malformed(line: bytes) -> None:
    try:
        rows = list(parse_lines([line]))
    except MalformedDatasetError:
        return
    assert len(rows) == 1
    assert rows[0].shape in {"messages", "prompt_completion", "text"}


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
turns = st.lists(st.tuples(st.sampled_from(["user", "assistant"]), texts), min_size=1, max_size=4)


@given(pairs=turns)
@settings(max_examples=examples(100), deadline=None)
def test_chatml_answers_bear_loss_completely_and_nothing_else_does(
    tokenizer: BackboneTokenizer, pairs: list[tuple[str, str]]
) -> None:
    chat = _chat([("user", "q"), *pairs, ("assistant", "z")])
    row = tokenize(_row(messages=chat), tokenizer)
    answers = [message["content"] for message in chat if message["role"] == "assistant"]
    learned = row.token_ids_L[row.bears_loss_L]
    expected = [token for answer in answers for token in tokenizer.encode([TextPiece(answer + "<|im_end|>")]).ids[0]]
    # A token that straddles header and answer ("\n" + "\n" in one) bears no loss; this tokenizer has none.
    assert learned.tolist() == expected
