"""Why a phi learns or not, by measurement: what each one is, where its gradient goes, what its student can see."""

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
    """Multiply-adds of one call, in convolutions and matrix products."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(*inputs, **given)
    return counter.get_total_flops() // 2


def receptive_field(phi: Phi, image: Tensor) -> int:
    """The side of the square of pixels that the centre of phi(x) depends on, found through its gradient; 0 for none."""
    size, reached = image.shape[-1], torch.zeros(image.shape[-2:], dtype=torch.bool)
    for seed in range(8):  # a ReLU may be shut for one choice of weights
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
    """For each phi of `names`: its parameters (also in images), what it sees, its multiply-adds in student passes."""
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
    """For each tensor of phi's parameters: the norms of itself, its gradient, and its first update by `config`."""

    def change(**changes) -> dict[str, float]:
        own = copy.deepcopy(phi)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a step may be so large that phi explodes: that is what is looked for
            moved = step(own, base, experts, dataclasses.replace(config, iterations=1, **changes), seed)
        return {name: float((moved[name] - p.detach()).norm()) for name, p in phi.named_parameters()}

    gradient, update = change(phi_optimizer="SGD", phi_lr=1.0, phi_momentum=0.0), change()
    return {
        name: {"weights": float(p.detach().norm()), "gradient": gradient[name], "update": update[name]}
        for name, p in phi.named_parameters()
    }


def step(phi: Phi, base: Split, experts: Trajectories, config: DistillConfig, seed: int) -> dict[str, Tensor]:
    """phi's parameters as they are after one step, before anything looks whether that was wise."""
    states = []

    def before_each(record):
        states.append({name: p.detach().clone() for name, p in phi.named_parameters()})

    two = dataclasses.replace(config, iterations=2)
    distill(phi, base.images, base.labels, experts, two, seed=seed, on_iteration=before_each)
    return states[1]


def gains(student: nn.Module, split: Split, sizes: list[float], seed: int) -> dict[str, list[float]]:
    """How much a student's first step changes if its images are `sizes` times as large: ||g(s x) - g(x)|| / ||g(x)||.

    For the student, and for the same one without its instance norm, both at a fresh initialisation.
    """
    bare = nn.Sequential(*(m for m in student.features if not isinstance(m, nn.GroupNorm)), nn.Flatten())
    bare.append(student.classifier)
    found = {}
    for name, model in (("with instance norm", student), ("without", bare)):
        start = initial_parameters(model, seed)

        def direction(images, model=model, start=start):
            with torch.no_grad():
                return unroll(model, start, [images], [split.labels], 1.0) - start

        plain = direction(split.images)
        found[name] = [float((direction(s * split.images) - plain).norm() / plain.norm()) for s in sizes]
    return found
