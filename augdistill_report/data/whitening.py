"""ZCA whitening, as in MTT's recipe: removes the correlations between pixels and changes images as little as possible.

    z = (x - mean) W,   W = U diag(1 / sqrt(S + eps)) U^T,   covariance of the training pixels = U diag(S) U^T

with x in [0, 1] as one vector of d = C H W values, the unbiased covariance, and eps = .1. The result equals that of
kornia's `ZCAWhitening(eps=.1, compute_inv=True)`, which the official code uses, to 3e-6. kornia's is not used because
of its memory: on CIFAR-10 (d = 3,072, two cores) it needs 1.6 GB more at its peak and 22 s, since it takes all images
as floats. This module works in chunks of bytes: .4 GB and 26 s (`benchmarks/zca.py`). On a laptop of 8 GB, with a
notebook open and one process per core, 1.6 GB matters. W is fitted once per data set and kept in the user's cache
folder.
"""

import torch
from torch import Tensor

from augdistill_report.data.sources import cache
from augdistill_report.files.store import Store

EPS = 0.1  # MTT's; the variances along CIFAR-10's principal axes go from 55 to 2e-6, and 129 of 3,072 exceed it

PIECE = 1024  # images per chunk: few enough that sums of products of (byte - 128) are integers below 2^24


def covariance(raw: Tensor) -> tuple[Tensor, Tensor]:
    """Mean `[d]` and unbiased covariance `[d, d]`, in float64, of images `[n, C, H, W]` (uint8, or floats in [0, 1]).

    Computed in chunks, so that there is no float copy of the data set. For bytes the result is exact: every sum is of
    integers that float32 represents without rounding. So the order does not matter, at twice the speed of float64.
    """
    count, size = len(raw), raw[0].numel()
    shift, full, kind = (128, 255, torch.float32) if raw.dtype == torch.uint8 else (0, 1, torch.float64)
    total = torch.zeros(size, dtype=torch.float64, device=raw.device)
    products = torch.zeros(size, size, dtype=torch.float64, device=raw.device)
    for chunk in raw.split(PIECE):
        x = chunk.flatten(1).to(kind) - shift
        total += x.sum(0)
        products += x.T @ x
    mean = total / count
    products.addr_(total, mean, alpha=-1).div_(count - 1)
    return (mean + shift) / full, products.div_(full**2)


def fit(raw: Tensor, eps: float = EPS) -> dict[str, Tensor]:
    """`mean` `[C, H, W]` of pixels in [0, 1], the `matrix` W `[d, d]` and its `inverse`, in float32."""
    if len(raw) < 2:
        raise ValueError(f"{len(raw)} images: at least 2 are needed to whiten them")
    mean, products = covariance(raw)
    values, vectors = torch.linalg.eigh(products)
    del products
    deviation = (values.clamp(min=0) + eps).sqrt()  # negative values are rounding

    def of(diagonal: Tensor) -> Tensor:
        return ((vectors * diagonal) @ vectors.T).float()

    return {"mean": mean.float().view(raw.shape[1:]), "matrix": of(1 / deviation), "inverse": of(deviation)}


def cached_fit(raw: Tensor, fingerprint: str) -> dict[str, Tensor]:
    """`fit` of a data set's training images, cached by its fingerprint; only one process computes it, others wait.

    A `ValueError` names a cached file that is damaged, or a folder that cannot be written.
    """
    store, spec = Store(cache() / "zca"), {"data": fingerprint, "shape": list(raw.shape), "eps": EPS}
    try:
        if not store.has("zca", spec):
            with store.making("zca", spec):
                if not store.has("zca", spec):
                    store.save("zca", spec, fit(raw), {})
    except OSError as error:
        reason = error.strerror or error
        raise ValueError(
            f"zca=True: {store.folder} cannot be written ({reason}); set XDG_CACHE_HOME to another folder"
        ) from None
    return store.load("zca", spec)[0]
