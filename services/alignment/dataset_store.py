"""Datasets in the artifact store, and their tokenized forms in a bounded cache. No gRPC here.

Bytes are addressed by their SHA-256 under the tenant, so storing them twice is storing them once.
"""

import hashlib
import math
import tempfile
import threading
import time
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from engine.alignment.dataset import TokenizedDataset, tokenize_dataset
from engine.alignment.jsonl_rows import MAX_LINE_BYTES, Row, parse_lines
from engine.alignment.preflight import Preflight, preflight
from engine.alignment.tokenizer import BackboneTokenizer
from engine.errors import (
    ArtifactCorruptError,
    ChecksumMismatchError,
    InvalidInputError,
    QuotaExceededError,
    UnavailableError,
)
from engine.task import Affects, Training, values_affecting
from services.alignment.tenant_fairness import ComputeSlot, FairQueue
from services.storage.artifact_layout import DatasetObject
from services.storage.artifact_store import ArtifactStore

_OBJECTS_BYTES, _REFUSED_BYTES = 4096, 256


@dataclass(frozen=True)
class TokenizedKey:
    """All that decides how a dataset is tokenized."""

    tenant: str
    sha256: str
    backbone: str
    training: tuple[Any, ...]  # values of the fields that affect tokens


@dataclass(frozen=True)
class StoredDataset:
    sha256: str
    size_bytes: int
    num_rows: int
    num_rows_by_shape: Mapping[str, int]


class DatasetUpload:
    """A dataset on its way in: bytes to a temporary file, checked against what was announced."""

    def __init__(self, size_bytes: int, sha256: str, max_bytes: int) -> None:
        if size_bytes > max_bytes:
            raise QuotaExceededError(
                f"the dataset has {size_bytes} bytes; at most {max_bytes} are taken", subject="dataset"
            )
        self._announced = (size_bytes, sha256.lower())
        self._hash = hashlib.sha256()
        self._size = 0
        with _disk():
            self.file: IO[bytes] = tempfile.NamedTemporaryFile(prefix="dataset-")  # noqa: SIM115  # gone with `discard`

    def add(self, offset: int, data: bytes) -> None:
        """The next chunk. Raises ChecksumMismatchError if it does not follow the one before."""
        if offset != self._size:
            raise ChecksumMismatchError(f"a chunk at offset {offset} where {self._size} was due: send it again whole")
        if self._size + len(data) > self._announced[0]:
            raise ChecksumMismatchError(f"more than the {self._announced[0]} bytes announced: send it again whole")
        self._hash.update(data)
        self._size += len(data)
        with _disk():
            self.file.write(data)

    def close(self) -> str:
        """The SHA-256 of what came. Raises ChecksumMismatchError unless it is what was announced."""
        found = (self._size, self._hash.hexdigest())
        if found != self._announced:
            raise ChecksumMismatchError(
                f"{found[0]} bytes with SHA-256 {found[1]} came, {self._announced[0]} with {self._announced[1]} were "
                "announced: send it again whole"
            )
        with _disk():
            self.file.seek(0)
        return found[1]

    def discard(self) -> None:
        with suppress(OSError):
            self.file.close()


@contextmanager
def _disk() -> Iterator[None]:
    """A temporary folder that is full or read-only is no fault of the caller's."""
    try:
        yield
    except OSError as error:
        raise UnavailableError(f"alignment cannot write to its temporary folder: {error.strerror}") from error


class DatasetStore:
    """Thread-safe; the tokenized cache holds at most `cache_bytes` (or the one dataset asked for last). No dataset is
    tokenized for longer than `tokenize_seconds`. Tenants compute in turns: see Turns.

    Raises InvalidInputError if a backbone's folder holds no tokenizer.
    """

    def __init__(
        self,
        store: ArtifactStore,
        backbones: Mapping[str, Path],
        cache_bytes: int,
        tokenize_seconds: float = math.inf,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._tokenize_seconds, self._turns = tokenize_seconds, FairQueue(monotonic=monotonic)
        self._store = store
        self._tokenizers = {name: BackboneTokenizer.load(folder) for name, folder in backbones.items()}
        self._cache: OrderedDict[TokenizedKey, TokenizedDataset] = OrderedDict()
        self._cache_bytes, self._cached_bytes = cache_bytes, 0
        self._lock = threading.Lock()
        self._at_work: defaultdict[TokenizedKey, threading.Lock] = defaultdict(threading.Lock)
        self._closing = threading.Event()

    def close(self) -> None:
        """Makes work in progress end soon, with UnavailableError."""
        self._closing.set()

    def store(self, tenant: str, receipt: DatasetUpload) -> StoredDataset:
        """Parses every line, then puts the bytes. Raises MalformedDatasetError with nothing stored."""
        sha256 = receipt.close()
        key = DatasetObject(tenant, sha256).key
        # No line is read further than it may be long.
        lines = iter(lambda: receipt.file.readline(MAX_LINE_BYTES + 1), b"")
        with self._turns.of(tenant) as turn:
            shapes = Counter(row.shape for row in self._paced(parse_lines(lines), turn, math.inf))
        self._store.put_new(key, Path(receipt.file.name))
        return StoredDataset(sha256, receipt.file.tell(), shapes.total(), dict(shapes))

    def remove(self, tenant: str, sha256: str) -> None:
        """Its bytes and all that was made of them."""
        self._store.delete(DatasetObject(tenant, sha256).key)
        with self._lock:
            for key in [k for k in self._cache if (k.tenant, k.sha256) == (tenant, sha256)]:
                self._forget(key)

    def inspect(self, tenant: str, sha256: str, backbone: str, training: Training, num_samples: int) -> Preflight:
        dataset = self.tokenized(tenant, sha256, backbone, training)
        with self._turns.of(tenant):
            return preflight(dataset, self._tokenizer(backbone), training, num_samples)

    def tokenized(self, tenant: str, sha256: str, backbone: str, training: Training) -> TokenizedDataset:
        """Raises NotFoundError (no such version), InvalidInputError (backbone, rows), ArtifactCorruptError."""
        key = _tokenized_key(tenant, sha256, backbone, training)
        with self._lock:
            at_work = self._at_work[key]
        try:
            with at_work:  # who comes second waits for what the first is making
                found = self._cached(key)
                if found is None:
                    tokenizer = self._tokenizer(backbone)
                    with self._fetched(tenant, sha256) as lines, self._turns.of(tenant) as turn:
                        rows = self._paced(parse_lines(lines), turn, self._tokenize_seconds)
                        found = tokenize_dataset(rows, tokenizer, training)
                    self._keep(key, found)
                return found
        finally:
            with self._lock:
                self._at_work.pop(key, None)

    def cached(self, tenant: str, sha256: str, backbone: str, training: Training) -> TokenizedDataset | None:
        """What `tokenized` would answer at once."""
        return self._cached(_tokenized_key(tenant, sha256, backbone, training))

    def _cached(self, key: TokenizedKey) -> TokenizedDataset | None:
        with self._lock:
            if key in self._cache:
                self._cache.move_to_end(key)
            return self._cache.get(key)

    def _keep(self, key: TokenizedKey, dataset: TokenizedDataset) -> None:
        with self._lock:
            self._forget(key)
            self._cache[key] = dataset
            self._cached_bytes += _held_bytes(dataset)
            while len(self._cache) > 1 and self._cached_bytes > self._cache_bytes:
                self._forget(next(iter(self._cache)))

    def _forget(self, key: TokenizedKey) -> None:
        if (dataset := self._cache.pop(key, None)) is not None:
            self._cached_bytes -= _held_bytes(dataset)

    def _paced(self, rows: Iterator[Row], turn: ComputeSlot, max_seconds: float) -> Iterator[Row]:
        """Raises QuotaExceededError: rows made to be slow must not hold a thread for days."""
        for row in rows:
            if self._closing.is_set():
                raise UnavailableError("alignment is stopping: send the call again")
            if turn.offer() > max_seconds:
                raise QuotaExceededError(
                    f"the dataset takes longer than {max_seconds:g} s to tokenize, which got to line "
                    f"{row.line}: upload it in parts",
                    subject="dataset",
                )
            yield row

    @contextmanager
    def _fetched(self, tenant: str, sha256: str) -> Iterator[IO[bytes]]:
        """Its bytes as a temporary file: many datasets may be under work, and memory holds none of them whole."""
        digest = hashlib.sha256()
        with _disk():
            file = tempfile.TemporaryFile(prefix="dataset-")  # noqa: SIM115  # closed below, its errors told apart
        with file:
            for chunk in self._store.stream(DatasetObject(tenant, sha256).key, 1 << 20):
                digest.update(chunk)
                with _disk():
                    file.write(chunk)
            if digest.hexdigest() != sha256:
                raise ArtifactCorruptError(f"dataset {sha256} of {tenant} is not what was stored", sha256=sha256)
            with _disk():
                file.seek(0)
            yield file

    def _tokenizer(self, backbone: str) -> BackboneTokenizer:
        if backbone not in self._tokenizers:
            known = ", ".join(sorted(self._tokenizers)) or "none"
            raise InvalidInputError.of_field("spec.backbone", f'"{backbone}" is unknown; there is {known}')
        return self._tokenizers[backbone]


def _held_bytes(dataset: TokenizedDataset) -> int:
    """With the objects around its arrays: of a small dataset they are the larger part."""
    return dataset.num_bytes + _OBJECTS_BYTES + _REFUSED_BYTES * len(dataset.refused)


def _tokenized_key(tenant: str, sha256: str, backbone: str, training: Training) -> TokenizedKey:
    return TokenizedKey(tenant, sha256, backbone, values_affecting(training, Affects.TOKENS))
