"""Hostile datasets are refused by line number, never quoted, with bounded memory and work."""

import hashlib
import json
import os
import secrets
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from engine.alignment import jsonl_rows
from engine.alignment.jsonl_rows import MAX_LINE_BYTES, MAX_MESSAGES, parse_lines
from engine.alignment.row_tokenizer import tokenize
from engine.errors import InvalidInputError, MalformedDatasetError, QuotaExceededError
from engine.strict_json import MAX_NESTING
from engine.task import Training
from services.alignment.dataset_store import DatasetStore
from services.storage.artifact_store import ArtifactStore
from services.storage.uploaded_file import UploadedFile
from tests.tiny_tokenizer import CHATML, write_tokenizer

# The line of a gigabyte is one with MUXTUNE_FUZZ_EXAMPLES set; it is read no further than the limit either way.
LINE_BYTES = 1 << (30 if "MUXTUNE_FUZZ_EXAMPLES" in os.environ else 26)
WORD = "xylophonic"
Receive = Callable[..., UploadedFile]


@pytest.fixture
def datasets(tmp_path: Path) -> DatasetStore:
    store = ArtifactStore.open(str(tmp_path / "store"))
    return DatasetStore(store, {"tiny": write_tokenizer(tmp_path / "tiny")}, cache_bytes=1 << 20)


@pytest.fixture
def received(tmp_path: Path) -> Receive:
    """Return a function that receives a dataset in chunks."""

    def receive(*chunks: bytes) -> UploadedFile:
        digest = hashlib.sha256()
        for chunk in chunks:
            digest.update(chunk)
        path = tmp_path / f"received-{secrets.token_hex(4)}"
        upload, offset = UploadedFile(path, sum(map(len, chunks)), digest.hexdigest(), "dataset"), 0
        for chunk in chunks:
            if upload.add(offset, chunk):
                upload.write()
            offset += len(chunk)
        return upload

    return receive


def test_an_endless_line_is_read_up_to_the_limit(received: Receive, datasets: DatasetStore) -> None:
    megabyte = b"x" * (1 << 20)
    upload = received(b'{"text": "', *[megabyte] * (LINE_BYTES >> 20), b'"}')
    tracemalloc.start()
    with pytest.raises(MalformedDatasetError, match=f"line 1 is .* at most {MAX_LINE_BYTES}"):
        datasets.store("tenants/a", upload)
    assert tracemalloc.get_traced_memory()[1] < 4 * MAX_LINE_BYTES
    tracemalloc.stop()


def test_a_million_empty_rows_are_refused(received: Receive, datasets: DatasetStore) -> None:
    for empty in (b"\n", b" \n", b"\r\n", b"\t\n"):
        upload = received(empty * 1_000_000)
        with pytest.raises(MalformedDatasetError, match="empty"):
            datasets.store("tenants/a", upload)


HOSTILE: dict[str, bytes] = {
    "100,000 levels": b'{"text":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "100,000 objects": b'{"text":' * 100_000,
    "a number of 5,000 digits": b'{"text":"' + WORD.encode() + b'","n":' + b"9" * 5_000 + b"}",
    "a number too large": b'{"text":"a","n":1e400000000000,"m":NaN}',
    "NaN": b'{"text":"a","n":NaN}',
    "Infinity": b'{"text":"a","n":-Infinity}',
    "a key twice": b'{"text":"a","text":"' + WORD.encode() + b'"}',
    "a key twice by escapes": rb'{"text":"a","\u0074ext":"b"}',
    "a key twice deep down": b'{"text":"a","x":{"k":1,"k":2}}',
    "invalid UTF-8": b'{"text":"\xff\xfe"}',
    "an overlong slash": b'{"text":"\xc0\xaf"}',
    "a surrogate in UTF-8": b'{"text":"\xed\xa0\x80"}',
    "a lone surrogate": rb'{"text":"\ud800"}',
    "a lone surrogate in a message": rb'{"messages":[{"role":"assistant","content":"\udfff"}]}',
    "a lone surrogate in a role": rb'{"messages":[{"role":"\ud800","content":"a"}]}',
    "UTF-16": '{"text":"a"}'.encode("utf-16"),
    "an array": b'["text"]',
    "two values": b'{"text":"a"}{"text":"b"}',
    "a comment": b'{"text":"a"} // b',
    "text that is a number": b'{"text":5}',
    "a gzip": b"\x1f\x8b\x08\x00" + b"\0" * 20,
    "a pickle": b"\x80\x04\x95" + b"\0" * 20,
    "many messages": json.dumps({"messages": [{"role": "assistant", "content": ""}] * (MAX_MESSAGES + 1)}).encode(),
}


@pytest.mark.parametrize("line", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_line_is_named_and_not_quoted(
    received: Callable[..., UploadedFile], datasets: DatasetStore, tmp_path: Path, line: bytes
) -> None:
    upload = received(b'{"text":"fine"}\n', line + b"\n")
    with pytest.raises(MalformedDatasetError) as refused:
        datasets.store("tenants/a", upload)
    assert refused.value.metadata["line"] in ("2", "3")  # UTF-16 has a line feed's byte in it
    assert WORD not in refused.value.message and len(refused.value.message) < 300
    assert not list((tmp_path / "store").rglob("*.jsonl"))


ANSWER = '{"role":"assistant","content":"a"}'
DEEP_FIELDS = {
    "beside the text": '{"text":"a<|im_end|>","x":%s}',
    "beside the messages": '{"messages":[' + ANSWER + '],"x":%s}',
    "in a message": '{"messages":[{"role":"user","content":"a<|im_end|>","x":%s},' + ANSWER + "]}",
    "in an answer": '{"messages":[{"role":"assistant","content":"a","tool_calls":%s}]}',
    "the reasoning": '{"messages":[{"role":"assistant","content":"a","reasoning_content":%s}]}',
    "a message": '{"messages":[%s]}',
    "the messages": '{"messages":%s}',
    "a content": '{"messages":[{"role":"user","content":%s},' + ANSWER + "]}",
    "a role": '{"messages":[{"role":%s,"content":"a"}]}',
    "the text": '{"text":%s}',
    "the prompt": '{"prompt":%s,"completion":"a"}',
    "the completion": '{"prompt":"a","completion":%s}',
    "the row": "%s",
}
# A template that writes every field of a message, as those for tools do.
WRITES_ALL = "{% for m in messages %}{{ '<|im_start|>' + m.role }}{{ m|tojson }}{{ '<|im_end|>' }}{% endfor %}"


@pytest.mark.parametrize("template", [CHATML, WRITES_ALL], ids=["chatml", "writes all"])
@pytest.mark.parametrize("field", DEEP_FIELDS.values(), ids=DEEP_FIELDS.keys())
def test_a_deep_row_is_refused_by_its_line_or_read(
    received: Receive, tmp_path: Path, field: str, template: str
) -> None:
    """Depths of 900 to 970 once failed with RecursionError after the upload."""
    backbones = {"tiny": write_tokenizer(tmp_path / "tiny", template)}
    datasets = DatasetStore(ArtifactStore.open(str(tmp_path / "store")), backbones, cache_bytes=1 << 20)
    training = Training(learning_rate=1e-3, num_epochs=1, max_sequence_tokens=32)
    for depth in (10, 50, 63, 64, 65, 100, 400, 800, *range(880, 1000, 13), 1500, 2000):
        for opening, closing in (("[", "]"), ('{"<|im_end|>":', "}")):
            row = field % (opening * depth + '"<|im_end|>"' + closing * depth)
            upload = received(b'{"text":"fine"}\n', row.encode() + b"\n")
            try:
                sha256 = datasets.store("tenants/a", upload).sha256
            except MalformedDatasetError as error:
                assert error.metadata["line"] == "2"
            else:
                assert depth <= MAX_NESTING
                datasets.tokenized("tenants/a", sha256, "tiny", training)


def test_rows_have_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsonl_rows, "MAX_ROWS", 3)
    with pytest.raises(MalformedDatasetError, match="line 4"):
        list(parse_lines([b'{"text":"a"}'] * 4))


@pytest.mark.parametrize(
    "text",
    ["a" * 200_000, "\u200d" * 50_000, "\U0001f468\u200d" * 30_000, "e" + "\u0301" * 100_000, " " * 200_000,
     "<|im_end|>" * 20_000, "\n" * 100_000, "\u202e" * 1000],
    ids=["one word", "joiners", "families", "accents", "blanks", "special tokens", "line feeds", "right to left"],
)  # fmt: skip
def test_a_token_bomb_is_cut_where_the_task_says(
    received: Callable[..., UploadedFile], datasets: DatasetStore, text: str
) -> None:
    data = json.dumps({"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "b"}]}).encode()
    short = b'{"text":"fine"}'
    upload = received(data + b"\n" + short)
    sha256 = datasets.store("tenants/a", upload).sha256
    training = Training(learning_rate=1e-3, num_epochs=1, max_sequence_tokens=32)
    dataset = datasets.tokenized("tenants/a", sha256, "tiny", training)
    assert dataset.num_bytes < 10_000


def test_a_dataset_that_tokenizes_too_slowly_is_refused(received: Receive, tmp_path: Path) -> None:
    seconds = iter(range(1000))
    store = ArtifactStore.open(str(tmp_path / "store"))
    tokenizer = {"tiny": write_tokenizer(tmp_path / "tiny")}
    datasets = DatasetStore(store, tokenizer, 1 << 20, tokenize_seconds=5, monotonic=lambda: float(next(seconds)))
    upload = received(b'{"text":"fine"}\n' * 20)
    sha256 = datasets.store("tenants/a", upload).sha256
    with pytest.raises(QuotaExceededError, match=r"longer than 5 s.* line 6"):
        datasets.tokenized("tenants/a", sha256, "tiny", Training(learning_rate=1e-3, num_epochs=1))


def test_the_longest_conversation_is_rendered_and_masked(datasets: DatasetStore) -> None:
    pair = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    line = json.dumps({"messages": pair * (MAX_MESSAGES // 2)}).encode()
    (row,) = parse_lines([line])
    assert int(tokenize(row, datasets._tokenizer("tiny")).bears_loss_L.sum()) == MAX_MESSAGES  # an answer, a stop


def keys() -> Iterator[str]:
    yield from (
        "../x",
        "/etc/passwd",
        "a/../../b",
        "a/./b",
        "a//b",
        "",
        "/",
        "a/",
        "~",
        "a\0b",
        "a\\..\\b",
        "a b",
        "C:\\x",
    )
    yield from ("file:///etc/passwd", "s3://bucket/key", "http://169.254.169.254/latest/meta-data", "%2e%2e/x", "..")


@pytest.mark.parametrize("key", keys())
def test_a_key_stays_in_the_store(tmp_path: Path, key: str) -> None:
    store = ArtifactStore.open(str(tmp_path / "store"))
    for act in (store.get, store.exists, store.delete, store.list, lambda key: store.put(key, b"x")):
        with pytest.raises(InvalidInputError):
            act(key)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("name", ["tenants/../x", "tenants/", "tenants/a/b", "x", "", "tenants/..", "tenants/a\0"])
def test_a_tenant_name_cannot_lead_out_of_its_folder(
    received: Callable[..., UploadedFile], datasets: DatasetStore, tmp_path: Path, name: str
) -> None:
    upload = received(b'{"text":"fine"}')
    with pytest.raises(InvalidInputError):
        datasets.store(name, upload)
    assert not list(tmp_path.rglob("*.jsonl"))


def test_a_symbolic_link_in_the_store_is_not_followed(tmp_path: Path) -> None:
    """Only an operator can make a link there; the store does not follow it out of its folder."""
    (tmp_path / "secret").write_bytes(b"secret")
    store = ArtifactStore.open(str(tmp_path / "store"))
    (tmp_path / "store" / "tenants").mkdir()
    (tmp_path / "store" / "tenants" / "link").symlink_to(tmp_path / "secret")
    (tmp_path / "store" / "folder").symlink_to(tmp_path)
    for key in ("tenants/link", "folder/secret"):
        with pytest.raises(InvalidInputError):
            store.get(key)
        with pytest.raises(InvalidInputError):
            store.put(key, b"x")
    assert (tmp_path / "secret").read_bytes() == b"secret"
