"""Tests dropout bits against Philox4x64-10 as its paper defines it, keyed by the token, not by its place."""

import numpy as np
import pytest
import torch

from engine.kernels.dropout import keep_mask, keep_scale

_MULTIPLIERS = (0xD2E7470EE14C6C93, 0xCA5A826395121157)
_WEYL = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)
_WORD = 2**64


def philox4x64_10(counter: tuple[int, int, int, int], key: tuple[int, int]) -> list[int]:
    """Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (SC'11), section 3.3."""
    x, (k0, k1) = list(counter), key
    for _ in range(10):
        high0, low0 = divmod(_MULTIPLIERS[0] * x[0], _WORD)
        high1, low1 = divmod(_MULTIPLIERS[1] * x[2], _WORD)
        x = [high1 ^ x[1] ^ k0, low1, high0 ^ x[3] ^ k1, low0]
        k0, k1 = (k0 + _WEYL[0]) % _WORD, (k1 + _WEYL[1]) % _WORD
    return x


def expected(seed: int, step: int, site: int, position: int, column: int, width: int, probability: float) -> bool:
    blocks = -(-width // 16)
    words = philox4x64_10((position * blocks + column // 16, 0, 0, 0), (seed % _WORD, (step << 32) + site))
    lane = column % 16
    return (words[lane // 4] >> (16 * (lane % 4))) & 0xFFFF >= round(probability * 65536)


@pytest.mark.parametrize(("seed", "step", "site"), [(0, 0, 0), (7, 3, 11), (2**63 + 5, 2**31, 400), (-1, 1, 1)])
def test_bits_are_philox(seed: int, step: int, site: int) -> None:
    positions = np.array([0, 1, 2, 9, 10, 5], np.int64)
    mask = keep_mask(seed, step, site, positions, 37, 0.3)
    assert mask.shape == (6, 37)
    for row, position in enumerate(positions):
        for column in (0, 1, 15, 16, 31, 36):
            assert mask[row, column].item() == expected(seed, step, site, int(position), column, 37, 0.3)


def test_a_token_keeps_its_mask_wherever_it_stands() -> None:
    whole = keep_mask(3, 1, 2, np.arange(50), 20, 0.5)
    assert torch.equal(keep_mask(3, 1, 2, np.arange(17, 23), 20, 0.5), whole[17:23])
    assert torch.equal(keep_mask(3, 1, 2, np.array([40, 3, 4]), 20, 0.5), whole[[40, 3, 4]])


@pytest.mark.parametrize("other", [(4, 1, 2), (3, 2, 2), (3, 1, 3)])
def test_seed_step_and_site_each_give_another_mask(other: tuple[int, int, int]) -> None:
    assert not torch.equal(keep_mask(3, 1, 2, np.arange(50), 20, 0.5), keep_mask(*other, np.arange(50), 20, 0.5))


@pytest.mark.parametrize("probability", [0.05, 0.5, 0.9])
def test_share_kept_and_its_scale(probability: float) -> None:
    mask = keep_mask(0, 0, 0, np.arange(1000), 256, probability)
    assert mask.float().mean().item() == pytest.approx(1 - probability, abs=0.004)
    assert keep_scale(probability) == pytest.approx(1 / (1 - probability), rel=1e-3)


def test_a_probability_just_under_one_still_scales_by_a_number() -> None:
    assert np.isfinite(keep_scale(1 - 1e-9))
    assert keep_mask(0, 0, 0, np.arange(4), 16, 1 - 1e-9).shape == (4, 16)


def test_no_tokens() -> None:
    assert keep_mask(0, 0, 0, np.arange(0), 16, 0.5).shape == (0, 16)
