"""Random numbers from (task seed, key) alone: the same on any device, whatever was drawn before."""

import hashlib

import torch


def normal_(tensor: torch.Tensor, seed: int, key: str) -> None:
    """Fills in place, of mean 0 and deviation 1, from (seed, key) alone."""
    tensor.copy_(torch.empty(tensor.shape).normal_(generator=generator_of(seed, key)))


def uniform_(tensor: torch.Tensor, bound: float, seed: int, key: str) -> None:
    """Fills in place, uniform in [-bound, bound], from (seed, key) alone: the same on any device."""
    tensor.copy_(torch.empty(tensor.shape).uniform_(-bound, bound, generator=generator_of(seed, key)))


def generator_of(seed: int, key: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{key}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
