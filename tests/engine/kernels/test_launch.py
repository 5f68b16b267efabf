"""Tests a launcher's cache, and the separate cache of a recorded graph."""

import numpy as np
import pytest
import torch

from engine.kernels.launch import CachingUploader, LruCache

ROWS = np.arange(5, dtype=np.int32)


def test_the_least_recently_used_value_is_dropped() -> None:
    cache = LruCache(2)
    assert [cache.get_or_create(key, lambda key=key: key * 10) for key in (1, 2, 1, 3)] == [10, 20, 10, 30]  # type: ignore[misc]
    assert cache.get_or_create(1, lambda: 0) == 10 and cache.get_or_create(2, lambda: 0) == 0


def test_a_recordings_cache_is_its_own_and_drops_nothing() -> None:
    """Its graph reads the tables as long as it lives, so its subcaches drop nothing either."""
    tables, cache = CachingUploader(torch.device("cpu")), LruCache(None)
    outside = tables.get_or_create("table", lambda: tables.upload(ROWS))
    with tables.using_cache(cache):
        inside = tables.get_or_create("table", lambda: tables.upload(ROWS))
        values = [tables.subcache("plans", 1).get_or_create(i, lambda i=i: i) for i in range(5)]  # type: ignore[misc]
        assert values == [tables.subcache("plans", 1).get_or_create(i, lambda: -1) for i in range(5)]
    assert inside is not outside and tables.get_or_create("table", lambda: None) is outside  # type: ignore[arg-type, return-value]
    assert [tables.subcache("plans", 1).get_or_create(i, lambda i=i: i) for i in (0, 1)] == [0, 1]  # type: ignore[misc]
    assert tables.subcache("plans", 1).get_or_create(0, lambda: -1) == -1


def test_tables_of_a_capture_are_written_when_it_has_ended() -> None:
    tables = CachingUploader(torch.device("cpu"))
    with tables.capturing():
        table = tables.upload(ROWS)
        table.tensor_B.fill_(255)  # during a capture nothing runs
    assert np.array_equal(table.tensor_B.numpy().view(np.int32), ROWS)
    with pytest.raises(RuntimeError), tables.capturing():
        tables.upload(ROWS)
        raise RuntimeError("the capture failed")
    assert np.array_equal(tables.upload(ROWS).tensor_B.numpy().view(np.int32), ROWS)
