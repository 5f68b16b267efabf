"""What a launcher remembers, and what a graph that is recorded has of its own."""

import numpy as np
import pytest
import torch

from engine.kernels.launch import CachingUploader, LruCache

ROWS = np.arange(5, dtype=np.int32)


def test_the_least_recently_used_is_forgotten() -> None:
    memory = LruCache(2)
    assert [memory.get_or_create(key, lambda key=key: key * 10) for key in (1, 2, 1, 3)] == [10, 20, 10, 30]  # type: ignore[misc]
    assert memory.get_or_create(1, lambda: 0) == 10 and memory.get_or_create(2, lambda: 0) == 0


def test_a_recordings_memory_is_its_own_and_forgets_nothing() -> None:
    """Its graph reads those tables for as long as it lives: its parts keep all, whatever they keep elsewhere."""
    tables, own = CachingUploader(torch.device("cpu")), LruCache(None)
    outside = tables.get_or_create("table", lambda: tables.upload(ROWS))
    with tables.using_cache(own):
        inside = tables.get_or_create("table", lambda: tables.upload(ROWS))
        kept = [tables.subcache("plans", 1).get_or_create(i, lambda i=i: i) for i in range(5)]  # type: ignore[misc]
        assert kept == [tables.subcache("plans", 1).get_or_create(i, lambda: -1) for i in range(5)]
    assert inside is not outside and tables.get_or_create("table", lambda: None) is outside  # type: ignore[arg-type, return-value]
    assert [tables.subcache("plans", 1).get_or_create(i, lambda i=i: i) for i in (0, 1)] == [0, 1]  # type: ignore[misc]
    assert tables.subcache("plans", 1).get_or_create(0, lambda: -1) == -1


def test_tables_of_a_capture_are_written_when_it_has_ended() -> None:
    tables = CachingUploader(torch.device("cpu"))
    with tables.capturing():
        table = tables.upload(ROWS)
        table.tensor_B.fill_(255)  # nothing that is done while it is captured happens before its end
    assert np.array_equal(table.tensor_B.numpy().view(np.int32), ROWS)
    with pytest.raises(RuntimeError), tables.capturing():
        tables.upload(ROWS)
        raise RuntimeError("the capture failed")
    assert np.array_equal(tables.upload(ROWS).tensor_B.numpy().view(np.int32), ROWS)
