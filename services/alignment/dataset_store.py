"""Stores datasets in the artifact store and tokenizes them, with a bounded cache. No gRPC here.

A dataset's key is its tenant and its SHA-256, so that equal bytes are stored once.
"""

import io
import math
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from engine.alignment.dataset import TokenizedDataset, tokenize_dataset
from engine.alignment.jsonl_rows import MAX_LINE_BYTES, parse_lines
from engine.alignment.preflight import Preflight, preflight
from engine.alignment.tokenizer import BackboneTokenizer
from engine.errors import (
    ArtifactCorruptError,
    InvalidInputError,
    MalformedDatasetError,
    QuotaExceededError,
)
from engine.task import Affects, Training, values_affecting
from services.concurrency.fair_queue import ComputeSlot, FairQueue
from services.concurrency.memory_queue import MemoryQueue
from services.storage.artifact_layout import DatasetObject
from services.storage.artifact_store import READ_BYTES, ArtifactStore, ObjectReader
from services.storage.scratch_folder import scratch_errors
from services.storage.uploaded_file import UploadedFile

_OVERHEAD_BYTES, _REFUSED_ROW_BYTES = 4096, 256
_BYTES_PER_BYTE = 4  # of memory while a dataset is tokenized; measured 3 for text, up to 9 where a byte is a token


@dataclass(frozen=True)
class TokenizedKey:
    """Everything that a tokenized dataset depends on."""

    tenant: str
    sha256: str
    backbone: str
    training: tuple[Any, ...]  # values of the fields that affect tokens

    @classmethod
    def of(cls, tenant: str, sha256: str, backbone: str, training: Training) -> "TokenizedKey":
        return cls(tenant, sha256, backbone, values_affecting(training, Affects.TOKENS))


@dataclass(frozen=True)
class StoredDataset:
    sha256: str
    size_bytes: int
    num_rows: int
    num_rows_by_shape: Mapping[str, int]


class DatasetStore:
    """Stores, inspects and tokenizes datasets; a FairQueue shares the computation among tenants. Thread-safe.

    The cache holds at most `cache_bytes`, but always the newest dataset. Tokenizing one may take `tokenize_seconds`;
    all that are being tokenized take about `tokenizing_bytes`.
    Raises InvalidInputError if a backbone's folder has no tokenizer.
    """

    def __init__(
        self,
        store: ArtifactStore,
        backbones: Mapping[str, Path],
        cache_bytes: int,
        tokenize_seconds: float = math.inf,
        tokenizing_bytes: int = 4 << 30,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._tokenize_seconds, self._fair_queue = tokenize_seconds, FairQueue(monotonic=monotonic)
        self._memory = MemoryQueue(tokenizing_bytes)
        self._store = store
        self._tokenizers = {name: BackboneTokenizer.load(folder) for name, folder in backbones.items()}
        self._cache: OrderedDict[TokenizedKey, TokenizedDataset] = OrderedDict()
        self._cache_bytes, self._cached_bytes = cache_bytes, 0
        self._lock = threading.Lock()

    def close(self) -> None:
        """End work in progress soon; its callers get UnavailableError."""
        self._fair_queue.close()

    def store(self, tenant: str, upload: UploadedFile) -> StoredDataset:
        """Parse every line, then store the bytes. Raises MalformedDatasetError, and then stores nothing."""
        received = upload.finish()
        key = DatasetObject(tenant, received.entry.sha256).key
        with scratch_errors(), received.path.open("rb") as file, self._fair_queue.slot(tenant) as slot:
            shapes = Counter(row.shape for row in parse_lines(_lines_in_turns(file, slot)))
        self._fair_queue.check_wanted()
        self._store.put(key, received.path)  # replaces bytes that changed in the store
        return StoredDataset(received.entry.sha256, received.entry.size_bytes, shapes.total(), dict(shapes))

    def remove(self, tenant: str, sha256: str) -> None:
        """Delete the dataset's bytes and its tokenized forms."""
        self._store.delete(DatasetObject(tenant, sha256).key)
        with self._lock:
            for key in [k for k in self._cache if (k.tenant, k.sha256) == (tenant, sha256)]:
                self._evict(key)

    def inspect(
        self, tenant: str, backbone: str, dataset: TokenizedDataset, training: Training, num_samples: int
    ) -> Preflight:
        with self._fair_queue.slot(tenant) as slot:
            return preflight(dataset, self._tokenizer(backbone), training, num_samples, slot.yield_to_waiting)

    def tokenized(self, tenant: str, sha256: str, backbone: str, training: Training) -> TokenizedDataset:
        """Return the tokenized dataset, which is kept in the cache.

        Raises NotFoundError, InvalidInputError, ArtifactCorruptError, and QuotaExceededError for one that takes too
        long.
        """
        dataset = self.cached(tenant, sha256, backbone, training)
        if dataset is None:
            tokenizer = self._tokenizer(backbone)
            reader = self._store.reader(DatasetObject(tenant, sha256).key)
            num_bytes = reader.size_bytes * _BYTES_PER_BYTE
            with (
                self._memory.hold(tenant, num_bytes, self._fair_queue.check_wanted),
                _verified(reader, tenant, sha256) as file,
                self._fair_queue.slot(tenant) as slot,
            ):
                lines = _lines_in_turns(file, slot, self._tokenize_seconds)
                dataset = tokenize_dataset(parse_lines(lines), tokenizer, training)
            self._put(TokenizedKey.of(tenant, sha256, backbone, training), dataset)
        return dataset

    def cached(self, tenant: str, sha256: str, backbone: str, training: Training) -> TokenizedDataset | None:
        """Return the tokenized dataset if it is in the cache, else None."""
        key = TokenizedKey.of(tenant, sha256, backbone, training)
        with self._lock:
            if key in self._cache:
                self._cache.move_to_end(key)
            return self._cache.get(key)

    def _put(self, key: TokenizedKey, dataset: TokenizedDataset) -> None:
        with self._lock:
            self._evict(key)
            self._cache[key] = dataset
            self._cached_bytes += _memory_bytes(dataset)
            while len(self._cache) > 1 and self._cached_bytes > self._cache_bytes:
                self._evict(next(iter(self._cache)))

    def _evict(self, key: TokenizedKey) -> None:
        if (dataset := self._cache.pop(key, None)) is not None:
            self._cached_bytes -= _memory_bytes(dataset)

    def _tokenizer(self, backbone: str) -> BackboneTokenizer:
        if backbone not in self._tokenizers:
            names = ", ".join(sorted(self._tokenizers)) or "none"
            raise InvalidInputError.of_field("spec.backbone", f'"{backbone}" is unknown; available: {names}')
        return self._tokenizers[backbone]


@contextmanager
def _verified(reader: ObjectReader, tenant: str, sha256: str) -> Iterator[IO[bytes]]:
    """Yield the stored dataset as a file. At the end of the block, or if the rows are refused, raise
    ArtifactCorruptError unless the bytes are those that were uploaded."""
    file, refusal = io.BufferedReader(reader, READ_BYTES), None
    try:
        yield file
    except (InvalidInputError, MalformedDatasetError) as error:
        refusal = error
    try:
        reader.check(sha256)
    except ArtifactCorruptError as error:
        message = f"The stored dataset {sha256} of {tenant} does not match its SHA-256: upload it again."
        raise ArtifactCorruptError(message, sha256=sha256) from error
    if refusal is not None:
        raise refusal


def _lines_in_turns(file: IO[bytes], slot: ComputeSlot, max_seconds: float = math.inf) -> Iterator[bytes]:
    """Yield the lines, blank ones too, in the tenant's turns; of an endless line no more than the maximal length.

    Raises QuotaExceededError after `max_seconds` of computing: slow rows must not hold a thread for days.
    """
    number = 0
    while line := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        if slot.yield_to_waiting() > max_seconds:
            raise QuotaExceededError(
                f"Tokenizing the dataset takes longer than {max_seconds:g} s; it stopped at line {number}. "
                "Upload it in parts.",
                subject="dataset",
            )
        yield line


def _memory_bytes(dataset: TokenizedDataset) -> int:
    """Return the bytes of the arrays and of the objects around them, the larger part of a small dataset."""
    return dataset.num_bytes + _OVERHEAD_BYTES + _REFUSED_ROW_BYTES * len(dataset.refused)
