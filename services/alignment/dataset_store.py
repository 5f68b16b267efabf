"""Stores datasets in the artifact store and tokenizes them, with a bounded cache. No gRPC here.

A dataset's key is its tenant and its SHA-256, so that equal bytes are stored once.
"""

import hashlib
import io
import math
import tempfile
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from engine.alignment.dataset import TokenizedDataset, tokenize_dataset
from engine.alignment.jsonl_rows import MAX_LINE_BYTES, parse_lines
from engine.alignment.preflight import Preflight, preflight
from engine.alignment.tokenizer import BackboneTokenizer
from engine.errors import (
    ArtifactCorruptError,
    ChecksumMismatchError,
    InvalidInputError,
    MalformedDatasetError,
    QuotaExceededError,
    UnavailableError,
)
from engine.task import Affects, Training, values_affecting
from services.concurrency.fair_queue import ComputeSlot, FairQueue
from services.storage.artifact_layout import DatasetObject
from services.storage.artifact_store import ArtifactStore

_OVERHEAD_BYTES, _REFUSED_ROW_BYTES = 4096, 256
_READ_BYTES = 4 << 20  # of the store at once


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


class DatasetUpload:
    """An upload in progress: writes the bytes to a temporary file and checks them against the announced hash."""

    def __init__(self, size_bytes: int, sha256: str, max_bytes: int) -> None:
        if size_bytes > max_bytes:
            raise QuotaExceededError(
                f"The dataset has {size_bytes} bytes, more than the {max_bytes} allowed.", subject="dataset"
            )
        self._announced = (size_bytes, sha256.lower())
        self._hash = hashlib.sha256()
        self._size = 0
        with _temporary_file_errors():
            self.file: IO[bytes] = tempfile.NamedTemporaryFile(prefix="dataset-")  # noqa: SIM115  # gone with `discard`

    def add(self, offset: int, data: bytes) -> None:
        """Append a chunk. Raises ChecksumMismatchError if it does not follow the previous one."""
        if offset != self._size:
            raise ChecksumMismatchError(f"A chunk has offset {offset}, not {self._size}. Upload the dataset again.")
        if self._size + len(data) > self._announced[0]:
            raise ChecksumMismatchError(f"More bytes arrived than the announced {self._announced[0]}. Upload it again.")
        self._hash.update(data)
        self._size += len(data)
        with _temporary_file_errors():
            self.file.write(data)

    def close(self) -> str:
        """Return the SHA-256 of the bytes. Raises ChecksumMismatchError unless size and hash are as announced."""
        received = (self._size, self._hash.hexdigest())
        if received != self._announced:
            raise ChecksumMismatchError(
                f"Received {received[0]} bytes with SHA-256 {received[1]}, announced were {self._announced[0]} with "
                f"{self._announced[1]}. Upload the dataset again."
            )
        with _temporary_file_errors():
            self.file.seek(0)
        return received[1]

    def discard(self) -> None:
        with suppress(OSError):
            self.file.close()


@contextmanager
def _temporary_file_errors() -> Iterator[None]:
    """Raise UnavailableError for OSError: a full or read-only temporary folder is not the caller's mistake."""
    try:
        yield
    except OSError as error:
        raise UnavailableError(f"Alignment cannot write to its temporary folder: {error.strerror}.") from error


class DatasetStore:
    """Stores, inspects and tokenizes datasets; a FairQueue shares the computation among tenants. Thread-safe.

    The cache holds at most `cache_bytes`, but always the newest dataset. Tokenizing one may take `tokenize_seconds`.
    Raises InvalidInputError if a backbone's folder has no tokenizer.
    """

    def __init__(
        self,
        store: ArtifactStore,
        backbones: Mapping[str, Path],
        cache_bytes: int,
        tokenize_seconds: float = math.inf,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._tokenize_seconds, self._fair_queue = tokenize_seconds, FairQueue(monotonic=monotonic)
        self._store = store
        self._tokenizers = {name: BackboneTokenizer.load(folder) for name, folder in backbones.items()}
        self._cache: OrderedDict[TokenizedKey, TokenizedDataset] = OrderedDict()
        self._cache_bytes, self._cached_bytes = cache_bytes, 0
        self._lock = threading.Lock()

    def close(self) -> None:
        """End work in progress soon; its callers get UnavailableError."""
        self._fair_queue.close()

    def store(self, tenant: str, upload: DatasetUpload) -> StoredDataset:
        """Parse every line, then store the bytes. Raises MalformedDatasetError, and then stores nothing."""
        sha256 = upload.close()
        key = DatasetObject(tenant, sha256).key
        with self._fair_queue.slot(tenant) as slot:
            shapes = Counter(row.shape for row in parse_lines(_lines_in_turns(upload.file, slot)))
        self._fair_queue.check_wanted()
        self._store.put(key, Path(upload.file.name))  # replaces bytes that changed in the store
        return StoredDataset(sha256, upload.file.tell(), shapes.total(), dict(shapes))

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
            with self._verified(tenant, sha256) as file, self._fair_queue.slot(tenant) as slot:
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

    @contextmanager
    def _verified(self, tenant: str, sha256: str) -> Iterator[IO[bytes]]:
        """Open the stored dataset. At the end of the block, or if the rows are refused, raise ArtifactCorruptError
        unless the bytes are those that were uploaded."""
        reader, refusal = self._store.reader(DatasetObject(tenant, sha256).key), None
        file = io.BufferedReader(reader, _READ_BYTES)
        try:
            yield file
        except (InvalidInputError, MalformedDatasetError) as error:
            refusal = error
        if reader.sha256() != sha256:
            raise ArtifactCorruptError(
                f"The stored dataset {sha256} of {tenant} does not match its SHA-256: upload it again.", sha256=sha256
            )
        if refusal is not None:
            raise refusal

    def _tokenizer(self, backbone: str) -> BackboneTokenizer:
        if backbone not in self._tokenizers:
            names = ", ".join(sorted(self._tokenizers)) or "none"
            raise InvalidInputError.of_field("spec.backbone", f'"{backbone}" is unknown; available: {names}')
        return self._tokenizers[backbone]


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
