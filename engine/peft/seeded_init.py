"""Random numbers that depend on (task seed, key) alone: equal on any device and in any order of calls."""

import hashlib

import torch


def normal_(tensor: torch.Tensor, seed: int, key: str) -> None:
    """Fill `tensor` in place from a normal distribution of mean 0 and deviation 1."""
    tensor.copy_(torch.empty(tensor.shape).normal_(generator=generator_of(seed, key)))


def uniform_(tensor: torch.Tensor, bound: float, seed: int, key: str) -> None:
    """Fill `tensor` in place with values uniform in [-bound, bound]."""
    tensor.copy_(torch.empty(tensor.shape).uniform_(-bound, bound, generator=generator_of(seed, key)))


def generator_of(seed: int, key: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{key}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
