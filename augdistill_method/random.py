"""Randomness: always a seed or a generator as an argument, never torch's global state."""

import hashlib
import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


def seeded(*path) -> torch.Generator:
    """A CPU generator seeded by all of `path` (a seed, then names and numbers), for example `seeded(0, "expert", 3)`.

    Streams of different paths are independent, so a new draw in one place changes no result elsewhere.
    """
    digest = hashlib.sha256(repr(path).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def minibatches(count: int, batch: int, generator: torch.Generator) -> Iterator[Tensor]:
    """An endless sequence of index batches: a new permutation of `count` images per epoch; its last batch may be short.

    `batch` 0, or at least `count`, means all images in their own order (nothing is drawn).
    """
    if batch <= 0 or batch >= count:
        yield from itertools.repeat(torch.arange(count))
    while True:
        yield from torch.randperm(count, generator=generator).split(batch)


def draw_base(labels: Tensor, episode: int, generator: torch.Generator) -> Tensor:
    """Indices of one iteration's base set: `episode` random images of each class; all images if it is 0."""
    if episode == 0:
        return torch.arange(len(labels))
    classes = [torch.nonzero(labels == c).flatten().cpu() for c in labels.unique()]
    return torch.cat([c[torch.randperm(len(c), generator=generator)[:episode]] for c in classes])


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """`values` on a device; from the CPU through pinned memory, since the program would wait for any other copy."""
    if device.type == "cuda" and not values.is_cuda:
        return values.pin_memory().to(device, non_blocking=True)
    return values.to(device)


def randn(like: Tensor, generator: torch.Generator, shape: Sequence[int] | None = None) -> Tensor:
    """Standard normal noise with `like`'s shape (or `shape`), type and device, from a generator on any device."""
    options = dict(generator=generator, device=generator.device, dtype=like.dtype)
    return to_device(torch.randn(shape or like.shape, **options), like.device)
