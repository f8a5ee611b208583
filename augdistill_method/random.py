"""Randomness: a seed or a generator, an argument to every section of `augdistill_core`; never global state."""

import hashlib
import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


def seeded(*path) -> torch.Generator:
    """A CPU generator that depends on the whole `path` (a seed, then names and numbers), e.g. `seeded(0, "expert", 3)`.

    Streams with different paths are independent, so that adding a draw in one place moves no number elsewhere.
    """
    digest = hashlib.sha256(repr(path).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def minibatches(count: int, batch: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Index batches without end: a new permutation of `count` images each epoch, the last batch of it may be short.

    `batch` 0 or above `count` means all of them, in their own order (no draw: a full batch has no order to draw).
    """
    if batch <= 0 or batch >= count:
        yield from itertools.repeat(torch.arange(count))
    while True:
        yield from torch.randperm(count, generator=generator).split(batch)


def draw_base(labels: Tensor, episode: int, generator: torch.Generator) -> Tensor:
    """Indices of one iteration's base set: `episode` images of each class, drawn afresh; all images if it is 0."""
    if episode == 0:
        return torch.arange(len(labels))
    classes = [torch.nonzero(labels == c).flatten().cpu() for c in labels.unique()]
    return torch.cat([c[torch.randperm(len(c), generator=generator)[:episode]] for c in classes])


def randn(like: Tensor, generator: torch.Generator, shape: Sequence[int] | None = None) -> Tensor:
    """Standard normal noise of `like`'s shape (or `shape`), type and device, drawn from a generator on any device."""
    return torch.randn(shape or like.shape, generator=generator, device=generator.device, dtype=like.dtype).to(
        like.device
    )
