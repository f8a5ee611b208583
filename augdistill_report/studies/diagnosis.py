"""Measures why a phi learns or not: its size and receptive field, its gradient by layer, the student's sensitivity."""

import copy
import dataclasses
import warnings

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from augdistill_core import (
    DistillConfig,
    Phi,
    Trajectories,
    augmented,
    distill,
    initial_parameters,
    make_phi,
    seeded,
    unroll,
)
from augdistill_report.data.datasets import Split


def operations(module, *inputs, **given) -> int:
    """The number of multiply-adds of one call, in convolutions and matrix products."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(*inputs, **given)
    return counter.get_total_flops() // 2


def receptive_field(phi: Phi, image: Tensor) -> int:
    """The side of the receptive field of the centre of phi(x), in pixels, found by its gradient; 0 if it is empty."""
    size, reached = image.shape[-1], torch.zeros(image.shape[-2:], dtype=torch.bool)
    for seed in range(8):  # for one choice of weights a ReLU may be zero
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for p in phi.parameters():
                nn.init.normal_(p, std=0.1)
            x = torch.randn(1, *image.shape).requires_grad_()
        out = augmented(phi, x, torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64), seeded(seed))
        if out.requires_grad:
            (gradient,) = torch.autograd.grad(out[0, :, size // 2, size // 2].sum(), x, allow_unused=True)
            reached |= torch.zeros_like(reached) if gradient is None else gradient[0].abs().sum(0) > 0
    rows, columns = torch.nonzero(reached, as_tuple=True)
    return 0 if len(rows) == 0 else int(max(rows.max() - rows.min(), columns.max() - columns.min())) + 1


def zoo(names: list[str], base: Split, classes: int, student: nn.Module) -> list[dict]:
    """For each phi of `names`: parameters (also in images), inputs, and multiply-adds in student forward passes."""
    x, rows = base.images[:1], []
    passes = operations(student, x)
    for name in names:
        phi = make_phi(name, base.images, classes, 0)
        given = dict(labels=base.labels[:1], index=torch.zeros(1, dtype=torch.int64), generator=seeded(0))
        parameters = sum(p.numel() for p in phi.parameters())
        rows.append(
            {
                "phi": name,
                "parameters": parameters,
                "in images": parameters / x[0].numel(),
                "receptive field": receptive_field(make_phi(name, base.images, classes, 0), x[0]),
                "labels": phi.conditional,
                "positions": phi.positional,
                "noise": phi.stochastic,
                "cost in student passes": operations(phi, x, **given) / passes,
            }
        )
    return rows


def first_step(phi: Phi, base: Split, experts: Trajectories, config: DistillConfig, seed: int) -> dict[str, dict]:
    """For each parameter tensor of phi: the norms of the weights, the gradient, and the first update by `config`."""

    def change(**changes) -> dict[str, float]:
        own = copy.deepcopy(phi)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # phi may explode in this step, and that is measured here
            moved = step(own, base, experts, dataclasses.replace(config, iterations=1, **changes), seed)
        return {name: float((moved[name] - p.detach()).norm()) for name, p in phi.named_parameters()}

    gradient, update = change(phi_optimizer="SGD", phi_lr=1.0, phi_momentum=0.0), change()
    return {
        name: {"weights": float(p.detach().norm()), "gradient": gradient[name], "update": update[name]}
        for name, p in phi.named_parameters()
    }


def step(phi: Phi, base: Split, experts: Trajectories, config: DistillConfig, seed: int) -> dict[str, Tensor]:
    """phi's parameters after one step, taken before `distill` checks for divergence."""
    states = []

    def before_each(record):
        states.append({name: p.detach().clone() for name, p in phi.named_parameters()})

    two = dataclasses.replace(config, iterations=2)
    distill(phi, base.images, base.labels, experts, two, seed=seed, on_iteration=before_each)
    return states[1]


def gains(student: nn.Module, split: Split, sizes: list[float], seed: int) -> dict[str, list[float]]:
    """The relative change of a student's first gradient g when x is scaled by `sizes`: ||g(s x) - g(x)|| / ||g(x)||.

    For the student, and for the same student without instance norm, both at a new initialisation.
    """
    bare = nn.Sequential(*(m for m in student.features if not isinstance(m, nn.GroupNorm)), nn.Flatten())
    bare.append(student.classifier)
    found = {}
    for name, model in (("with instance norm", student), ("without", bare)):
        start = initial_parameters(model, seed)

        def direction(images, model=model, start=start):
            with torch.no_grad():
                return unroll(model, start, [images], [split.labels], 1.0) - start

        unscaled = direction(split.images)
        found[name] = [float((direction(s * split.images) - unscaled).norm() / unscaled.norm()) for s in sizes]
    return found
