"""Attention over a packed stream: which path it takes, the arguments of flash attention, and that both paths agree."""

import functools
import inspect
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.attention.varlen import varlen_attn

from engine.runtime import varlen_attention
from engine.runtime.attention import packed_attention
from engine.runtime.backbone import Backbone
from engine.runtime.varlen_attention import AttentionCache, fallback_reason
from tests.engine.runtime.tiny import CONFIGS, model_of
from tests.thoroughness import examples

MODULE = nn.Linear(1, 1)


def plain_varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Implements the docstring of torch.nn.attention.varlen.varlen_attn one query at a time in float64: (left, right)
    keys beside the query's own, -1 for all; groups of query heads share key heads."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32 and max_q == max_k == int(cu_seq_q.diff().max())
    assert enable_gqa or query.shape[1] == key.shape[1]
    left, right = window_size
    out, group = torch.zeros_like(query, dtype=torch.float64), query.shape[1] // key.shape[1]
    for start, end in itertools.pairwise(cu_seq_q.tolist()):
        for i, head in itertools.product(range(start, end), range(query.shape[1])):
            first = start if left < 0 else max(start, i - left)
            last = end if right < 0 else min(end, i + right + 1)
            k, v = (t[first:last, head // group].double() for t in (key, value))
            scores = k @ query[i, head].double() * (query.shape[-1] ** -0.5 if scale is None else scale)
            out[i, head] = torch.softmax(scores, dim=0) @ v
    return out.to(query.dtype)


def plain_varlen_of_torch_2_11(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    return_aux: Any = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
) -> torch.Tensor:
    """Has the signature of torch 2.11.0, which lets query heads share key heads without an option."""
    rest = (cu_seq_q, cu_seq_k, max_q, max_k)
    return plain_varlen(query, key, value, *rest, scale=scale, window_size=window_size, enable_gqa=True)


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[Any, ...]]]:
    """Makes tensors look like those of a GPU with flash attention, and records its arguments.

    The arguments must fit the installed torch.
    """
    handed: list[tuple[Any, ...]] = []
    signature = inspect.signature(varlen_attn)

    @functools.wraps(varlen_attn)
    def record(*args: Any, **options: Any) -> torch.Tensor:
        signature.bind(*args, **options)
        handed.append((*args, options))
        return plain_varlen(*args, **{"enable_gqa": "enable_gqa" not in signature.parameters} | options)

    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(varlen_attention, "varlen_attn", record)
    yield handed


def heads(num_heads: int, num_tokens: int, width: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + num_heads)
    return torch.randn(1, num_heads, num_tokens, width, generator=generator).to(dtype)


@settings(max_examples=examples(15), deadline=None)
@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    group=st.integers(1, 3),
    window=st.sampled_from([None, 1, 3]),
    scaling=st.sampled_from([None, 0.3]),
    varlen=st.sampled_from([plain_varlen, plain_varlen_of_torch_2_11]),
)
def test_flash_attention_computes_what_attention_by_segment_does(
    lengths: list[int], group: int, window: int | None, scaling: float | None, varlen: Callable[..., torch.Tensor]
) -> None:
    bounds, num_tokens = [0, *itertools.accumulate(lengths)], sum(lengths)
    q, k, v = (heads(count, num_tokens, 8, torch.float32, i) for i, count in enumerate((2 * group, 2, 2)))
    by_segment, _ = packed_attention(MODULE, q, k, v, None, scaling, sliding_window=window, cu_seqlens=bounds)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(varlen_attention, "varlen_attn", varlen)
        segment_bounds = AttentionCache().bounds_on(torch.device("cpu"), bounds)
        in_one = varlen_attention.varlen_attention(q, k, v, segment_bounds, scaling, window)
    assert in_one.shape == by_segment.shape == (1, num_tokens, 2 * group, 8)
    torch.testing.assert_close(in_one, by_segment, rtol=1e-5, atol=1e-5)


def test_arguments_of_flash_attention(as_on_a_gpu: list[tuple[Any, ...]]) -> None:
    q, k, v = (heads(count, 9, 8, torch.bfloat16, i) for i, count in enumerate((4, 2, 2)))
    cache = AttentionCache()
    for window in (None, 3):
        packed_attention(MODULE, q, k, v, None, 0.5, sliding_window=window, cu_seqlens=[0, 4, 9], attention_cache=cache)
    first, second = as_on_a_gpu
    grouped = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
    assert first[-1] == {"scale": 0.5, "window_size": (-1, 0), **grouped}
    assert second[-1] == {"scale": 0.5, "window_size": (2, 0), **grouped}
    assert first[3].tolist() == [0, 4, 9] and first[5:7] == (5, 5)
    assert first[3] is second[3] is first[4]  # one copy to the device for all layers
    assert torch.equal(first[1], k[0].transpose(0, 1))  # not repeated for each query head
    assert cache.paths == {"flash attention"}


@pytest.mark.parametrize(
    ("dtype", "width", "options", "words"),
    [
        (torch.float32, 8, {}, "float32"),
        (torch.bfloat16, 12, {}, "not of 12"),
        (torch.bfloat16, 264, {}, "not of 264"),
        (torch.bfloat16, 8, {"softcap": 2.0}, "soft-capping"),
        (torch.bfloat16, 8, {"prefix": True}, "prefixes"),
    ],
)
def test_attention_by_segment_has_a_reason(
    as_on_a_gpu: list[tuple[Any, ...]], dtype: torch.dtype, width: int, options: dict[str, Any], words: str
) -> None:
    q, k, v = (heads(2, 5, width, dtype, i) for i in range(3))
    prefixes = {id(MODULE): {0: (heads(2, 1, width, dtype), heads(2, 1, width, dtype))}}
    arguments = {"prefixes": prefixes} if options.pop("prefix", False) else options
    cache = AttentionCache()
    packed_attention(MODULE, q, k, v, None, cu_seqlens=[0, 2, 5], attention_cache=cache, **arguments)
    [path] = cache.paths
    assert path.startswith("by segment: ") and words in path and not as_on_a_gpu


def test_without_flash_attention_segments_run_one_by_one(
    as_on_a_gpu: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    q = heads(2, 5, 8, torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    assert "8.0" in (fallback_reason(q, None, False) or "")
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: False)
    assert "built without" in (fallback_reason(q, None, False) or "")


def test_a_backbone_reports_its_attention_path() -> None:
    assert Backbone(model_of(CONFIGS["llama"])).attention_paths == {"by segment: on cpu"}


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_both_paths_agree_on_a_device(dtype: torch.dtype, window: int | None) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    bounds = [0, 1, 70, 71, 300]
    tensors = [heads(count, 300, 64, dtype, i).cuda().requires_grad_() for i, count in enumerate((8, 2, 2))]
    exact = [t.detach().float().requires_grad_() for t in tensors]  # float32 runs segment by segment
    results, cache = [], AttentionCache()
    for q, k, v in (tensors, exact):
        out, _ = packed_attention(
            MODULE, q, k, v, None, sliding_window=window, cu_seqlens=bounds, attention_cache=cache
        )
        gradients = torch.autograd.grad((out * out.detach()).sum(), (q, k, v))
        results.append([out, *gradients])
        cache.bounds = None
    assert "flash attention" in cache.paths and len(cache.paths) == 2
    for result, reference in zip(*results, strict=True):
        error = (result.float() - reference).norm() / reference.norm()
        assert error < (1e-2 if dtype is torch.bfloat16 else 2e-3)
