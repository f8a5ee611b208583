"""Time and peak memory of one outer gradient through N student steps, for each implementation, relative to MTT's.

    python benchmarks/unroll.py [--shapes S P] [--steps 10 30 50] [--repeat 3] [--out figures/benchmarks]

The reference, "official", is MTT's method implemented again: torch's own layers, one flat parameter vector,
`create_graph`, one backward pass. TESLA's gradient (Cui et al. 2023) needs little memory since it omits every Hessian;
its cosine to the exact gradient is printed with it. "unet" is a complete iteration of `distill` with a U-Net phi that
is redrawn each step.

Each variant runs in its own process on the same inputs, on one thread. Time is the minimal process time of the repeats.
Memory is the peak resident size of the process minus its size before the first gradient. "of peak" is the variant's
floating-point rate relative to this machine's fastest matrix product (2048 x 2048, float32).
"""

import argparse
import ctypes
import json
import subprocess
import sys
import time
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from augdistill_core import (
    ConvNet,
    DistillConfig,
    Trajectories,
    distill,
    initial_parameters,
    make_phi,
    seeded,
    unflatten,
    unroll,
)
from augdistill_method.unroll import eager, leaves, step_gradient
from augdistill_report.files.store import as_json, write
from augdistill_report.show.plots import PALETTE, new_figure
from augdistill_report.work.provenance import environment

SHAPES = {  # channels, size, width, depth, batch
    "S": (1, 16, 32, 2, 10),
    "P": (3, 32, 128, 3, 10),
}
ALPHA = 0.01


class Layers(ConvNet):
    """The same student, built from torch's own layers."""

    forward_mode = False

    def forward(self, images):
        return self.classifier(self.features(images).flatten(1))


# --- the variants: (student's shape, start, target, batches, labels) -> a function that computes the gradients --------


def official(student, start, batches, labels, alpha):
    """The official code's unroll: each step's parameters are slices of one flat vector `[P]`; returns the last one."""
    names = [name for name, _ in student.named_parameters()]
    theta = start.detach().requires_grad_()
    for images, targets in zip(batches, labels, strict=True):
        parameters = dict(zip(names, unflatten(student, theta), strict=True))
        loss = F.cross_entropy(functional_call(student, parameters, (images,)), targets)
        (gradient,) = torch.autograd.grad(loss, theta, create_graph=True)
        theta = theta - alpha * gradient
    return theta


def through(unrolled, kind=ConvNet, **options):
    """The gradient of the squared distance at the end of `unrolled` with respect to alpha and every batch."""

    def build(shape, start, target, batches, labels):
        student, alpha = kind(*shape), torch.tensor(ALPHA, requires_grad=True)
        batches = [x.clone().requires_grad_() for x in batches]

        def gradients():
            end = unrolled(student, start, batches, labels, alpha, **options)
            return torch.autograd.grad((end - target).square().sum(), [alpha, *batches])

        return gradients

    return build


def tesla(shape, start, target, batches, labels):
    """TESLA: each step's batch gets -alpha (d/dx)(g . v) with the same v, that of the end, as if Hessians were 0."""
    student = Layers(*shape)

    def gradients():
        steps, theta, g = eager(student), start, 0
        for x, y in zip(batches, labels, strict=True):
            g = g + steps.gradient(theta, x, y)
            theta = start - ALPHA * g
        v, theta, found = 2 * (theta - target), start, []
        for images, y in zip(batches, labels, strict=True):
            x, pieces = images.clone().requires_grad_(), leaves(student, theta)
            slope = step_gradient(student, pieces, x, y, create_graph=True)
            along = sum((a * b).sum() for a, b in zip(slope, unflatten(student, v), strict=True))
            found.append(-ALPHA * torch.autograd.grad(along, x)[0])
            theta = theta - ALPHA * torch.cat([s.detach().flatten() for s in slope])
        return [-(g @ v), *found]

    return gradients


def through_unet(memory):
    """One iteration of `distill`: the gradient with respect to a U-Net's parameters and alpha."""

    def build(shape, start, target, batches, labels):
        experts = Trajectories(ConvNet(*shape), torch.stack([start, target])[None])
        options = dict(syn_steps=len(batches), expert_epochs=1, max_start_epoch=0, memory=memory)
        phi = make_phi("unet_noise", batches[0], 10, seed=0)

        def gradients():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # warnings about the loss of a random target
                distill(phi, batches[0], labels[0], experts, DistillConfig(iterations=1, **options), seed=0)
            return []

        return gradients

    return build


VARIANTS = {
    "official": through(official, Layers),
    "graph": through(unroll, memory="graph"),
    "replay": through(unroll, memory="replay"),
    "replay, all kept": through(unroll, memory="replay", keep=0),
    "replay, torch's layers": through(unroll, Layers, memory="replay"),
    "tesla": tesla,
    "unet, graph": through_unet("graph"),
    "unet, replay": through_unet("replay"),
}
ONLY = {"tesla": (10, 50), "unet, graph": (10, 50), "unet, replay": (10, 50), "replay, torch's layers": (10,)}


class Flops(TorchDispatchMode):
    """Counts the floating-point operations of matrix products and convolutions (torch's own counter cannot follow
    autograd.grad)."""

    total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function.overloadpacket in flop_registry:
            self.total += flop_registry[function.overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


# --- one variant, measured in this process ----------------------------------------------------------------------------


def fresh_peak() -> float:
    """Return free memory to the system, reset the peak, and return the resident size in MB (Linux with glibc)."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return status_mb("VmRSS")


def status_mb(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024


def inputs(name: str, steps: int) -> tuple[tuple, Tensor, Tensor, list[Tensor], list[Tensor]]:
    """A shape's ConvNet arguments, a start, the target that `steps` steps on other images reach, batches and labels."""
    channels, size, width, depth, batch = SHAPES[name]
    shape, generator = (channels, 10, size, width, depth), seeded(0)
    batches, others = (
        [torch.randn(batch, channels, size, size, generator=generator) for _ in range(steps)] for _ in range(2)
    )
    labels, start = [torch.arange(batch) % 10] * steps, initial_parameters(ConvNet(*shape), 0)
    with torch.no_grad():
        target = unroll(ConvNet(*shape), start, others, labels, ALPHA)
    return shape, start, target, batches, labels


def measure(variant: str, name: str, steps: int, repeat: int) -> dict:
    """Seconds, peak extra memory in MB, floating-point operations, and the gradients' norms, by which gradients are
    compared (for TESLA also the cosine to the exact gradient)."""
    torch.set_num_threads(1)
    given = inputs(name, steps)
    gradients = VARIANTS[variant](*given)
    before, seconds = fresh_peak(), []
    for _ in range(repeat):
        begin = time.process_time()
        found = gradients()
        seconds.append(time.process_time() - begin)
    result = dict(seconds=min(seconds), memory_mb=status_mb("VmHWM") - before)
    result["norms"] = [g.norm().item() for g in found]
    if variant == "tesla":
        true = VARIANTS["replay"](*given)()
        flat, of_true = (torch.cat([g.flatten() for g in gs[1:]]) for gs in (found, true))
        result["cosine"] = F.cosine_similarity(flat, of_true, dim=0).item()
        result["alpha_ratio"] = (found[0] / true[0]).item()
    with Flops() as flops:
        gradients()
    result["flops"] = flops.total
    return result


def matrix_product_peak() -> float:
    """Floating-point operations per second of the fastest of ten 2048 x 2048 matrix products, on one thread."""
    torch.set_num_threads(1)
    a, seconds = torch.randn(2048, 2048), []
    for _ in range(10):
        begin = time.process_time()
        a @ a
        seconds.append(time.process_time() - begin)
    return 2 * 2048**3 / min(seconds)


# --- all variants -----------------------------------------------------------------------------------------------------


def table(shapes: list[str], all_steps: list[int], repeat: int, variants: list[str], peak: float) -> list[dict]:
    """A row for each shape, N and variant, printed when it is measured."""
    rows = []
    print(f"{'shape':6}{'N':>3}  {'variant':23}{'seconds':>8}{'ratio':>7}{'MB':>7}{'ratio':>7}{'of peak':>9}")
    for shape in shapes:
        for steps in all_steps:
            found = {}
            for variant in variants:
                if steps not in ONLY.get(variant, all_steps):
                    continue
                call = [
                    sys.executable,
                    __file__,
                    "--one",
                    variant,
                    shape,
                    "--steps",
                    str(steps),
                    "--repeat",
                    str(repeat),
                ]
                out = subprocess.run(call, check=True, stdout=subprocess.PIPE, text=True).stdout
                row = found[variant] = json.loads(out)
                first, norms = found["official"], row.pop("norms")
                if variant == "official":
                    expected = norms
                elif norms and variant != "tesla":
                    row["largest_difference_of_norms"] = max(
                        abs(a - b) / abs(b) for a, b in zip(norms, expected, strict=True)
                    )
                row["time_ratio"] = row["seconds"] / first["seconds"]
                row["memory_ratio"] = row["memory_mb"] / first["memory_mb"]
                row["of_peak"] = row["flops"] / row["seconds"] / peak
                rows.append(dict(shape=shape, steps=steps, way=variant) | row)
                print(as_line(rows[-1]), flush=True)
    return rows


def as_line(row: dict) -> str:
    line = f"{row['shape']:6}{row['steps']:3}  {row['way']:23}{row['seconds']:8.2f}{row['time_ratio']:7.2f}"
    line += f"{row['memory_mb']:7.0f}{row['memory_ratio']:7.2f}"
    line += f"{row['of_peak']:9.2f}"
    if "cosine" in row:
        line += f"  cosine {row['cosine']:.3f}, d/dalpha x {row['alpha_ratio']:.2f}"
    return line


def picture(rows: list[dict], shape: str):
    """A figure of peak memory and time by N, a line for each variant."""
    figure, (left, right) = new_figure(10.5, 3.8, 2)
    drawn = [v for v in VARIANTS if len([r for r in rows if r["shape"] == shape and r["way"] == v]) > 1]
    for number, variant in enumerate(drawn):
        mine = [r for r in rows if r["shape"] == shape and r["way"] == variant]
        look = dict(color="black" if variant == "official" else PALETTE[number - 1], label=variant)
        look["linestyle"] = "--" if variant.startswith(("unet", "tesla")) else "-"
        for axis, key in ((left, "memory_mb"), (right, "seconds")):
            points = [(r["steps"], r[key]) for r in mine]
            axis.plot(*zip(*points, strict=True), marker="o", markersize=4, **look)
    left.set(xlabel="N, student steps", ylabel="peak extra memory in MB", yscale="log")
    left.yaxis.set_major_formatter("{x:g}")
    right.set(xlabel="N, student steps", ylabel="seconds for one gradient", ylim=(0, None))
    right.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["S", "P"], choices=SHAPES)
    parser.add_argument("--steps", nargs="+", default=[10, 30, 50], type=int)
    parser.add_argument("--repeat", default=3, type=int)
    parser.add_argument("--variants", nargs="+", default=[], choices=VARIANTS, help="only these and the official one")
    parser.add_argument("--out", default="", help="a folder for unroll.json and unroll.png")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)  # variant and shape: the call of a child
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(*options.one, options.steps[0], options.repeat)))
        return
    variants = [variant for variant in VARIANTS if variant in ("official", *(options.variants or VARIANTS))]
    peak = matrix_product_peak()
    print(f"matrix product: {peak / 1e9:.0f} Gflop/s on one thread")
    rows = table(options.shapes, options.steps, options.repeat, variants, peak)
    if options.out:
        found = {"environment": environment("cpu"), "matrix_product_flops": peak, "rows": rows}
        write(Path(options.out) / "unroll.json", as_json(found))
        picture(rows, options.shapes[-1]).savefig(
            Path(options.out) / "unroll.png", dpi=110, metadata={"Software": None}
        )


if __name__ == "__main__":
    main()
