"""Python imports this at its start where PYTHONPATH names this folder: on SIGUSR2 a process counts its memory.

It writes `{folder}/{pid}.json`: bytes of all Python objects, by type, and bytes that C code has from malloc. The folder
is the environment's HEAP_CENSUS. A number in its file `planted` is a leak to feign: so many objects of a kilobyte.
"""

import ctypes
import gc
import json
import os
import signal
import sys
from collections import defaultdict
from functools import lru_cache
from pathlib import Path
from types import FrameType

_FOLDER = os.environ.get("HEAP_CENSUS", "")
_LEAKED: list[bytearray] = []
_CACHED_FUNCTION = type(lru_cache(lambda: None))
_PART = 10_000  # objects whose referents are asked for at once
# Caches that many tasks fill and that hold little: smaller, so that they are full before memory is judged.
_SMALLER = {"services.admission.policy.task_estimator": {"_MAX_CACHED": 2}}


class _Mallinfo2(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keep",
        )
    ]


# Once: each CDLL has a class of its own, which is memory that a count would find the next time.
_LIBC = ctypes.CDLL(None)


def _malloc_bytes() -> int:
    """Bytes in use of all arenas and of single mappings; 0 where the C library is another than glibc."""
    mallinfo2 = getattr(_LIBC, "mallinfo2", None)
    if mallinfo2 is None:
        return 0
    mallinfo2.restype = _Mallinfo2
    info = mallinfo2()
    return int(info.uordblks + info.hblkhd)


def _empty_caches() -> None:
    """Of bounded caches of functions: until they are full they look like leaks."""
    for item in gc.get_objects():
        if type(item) is _CACHED_FUNCTION and item.cache_parameters()["maxsize"] is not None:
            item.cache_clear()


def _bytes_by_type() -> dict[str, int]:
    """Sizes of all objects that the collector tracks, and of all that they refer to."""
    gc.collect()
    sizes: defaultdict[type, int] = defaultdict(int)
    waiting = gc.get_objects()
    seen = set(map(id, waiting))
    seen |= {id(waiting), id(seen), id(sizes)}
    while waiting:
        new = []
        for item in waiting:
            sizes[type(item)] += sys.getsizeof(item, 0)
        for start in range(0, len(waiting), _PART):
            for item in gc.get_referents(*waiting[start : start + _PART]):
                if id(item) not in seen:
                    seen.add(id(item))
                    new.append(item)
        waiting = new
    by_name: defaultdict[str, int] = defaultdict(int)
    for kind, size in sizes.items():
        by_name[f"{kind.__module__}.{kind.__qualname__}"] += size
    return by_name


def _count(number: int, frame: FrameType | None) -> None:
    for module, values in _SMALLER.items():
        if module in sys.modules:
            assert values.keys() <= vars(sys.modules[module]).keys(), f"{module} has other names"
            vars(sys.modules[module]).update(values)
    planted = Path(_FOLDER, "planted")
    if planted.exists():
        _LEAKED.extend(bytearray(1000) for _ in range(int(planted.read_text()) - len(_LEAKED)))
    _empty_caches()
    by_type = _bytes_by_type()
    census = {"malloc": _malloc_bytes(), "by_type": by_type}
    partial = Path(_FOLDER, f"{os.getpid()}.partial")
    partial.write_text(json.dumps(census))
    partial.rename(partial.with_suffix(".json"))


if _FOLDER:
    signal.signal(signal.SIGUSR2, _count)
