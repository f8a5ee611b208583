"""Time and peak memory of one outer gradient through N student steps, each way, as ratios to the official code's way.

    python benchmarks/unroll.py [--shapes S P] [--steps 10 50] [--repeat 2] [--out figures/benchmarks/unroll.json]

The yardstick is MTT's official way written afresh: one flat parameter vector, `create_graph`, one backward pass. Each
way runs in a process of its own on the same inputs, on one thread; time is process time, the least of the repeats;
memory is the rise of the process's peak resident size over what it was before the first gradient.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.func import functional_call

from augdistill_core import ConvNet, initial_parameters, seeded, unflatten, unroll
from augdistill_report.artefacts import as_json, write
from augdistill_report.run import environment

SHAPES = {  # channels, size, width, depth, batch
    "S": (1, 16, 32, 2, 10),
    "P": (3, 32, 128, 3, 10),
}


def official(student, start, batches, labels, alpha):
    """The official code's unroll: every step's parameters are slices of one flat vector."""
    names = [name for name, _ in student.named_parameters()]
    theta = start.detach().requires_grad_()
    for images, targets in zip(batches, labels, strict=True):
        parameters = dict(zip(names, unflatten(student, theta), strict=True))
        loss = F.cross_entropy(functional_call(student, parameters, (images,)), targets)
        (gradient,) = torch.autograd.grad(loss, theta, create_graph=True)
        theta = theta - alpha * gradient
    return theta


WAYS = {
    "official": official,
    "graph": lambda *inputs: unroll(*inputs, memory="graph"),
    "replay": lambda *inputs: unroll(*inputs, memory="replay"),
}


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(way: str, shape: str, steps: int, repeat: int) -> dict:
    """Seconds, rise of peak memory in MB, and the norms of the gradients, of one way in this process."""
    torch.set_num_threads(1)
    channels, size, width, depth, batch = SHAPES[shape]
    student, generator = ConvNet(channels, 10, size, width, depth), seeded(0)
    batches = [torch.randn(batch, channels, size, size, generator=generator).requires_grad_() for _ in range(steps)]
    labels = [torch.arange(batch) % 10] * steps
    alpha = torch.tensor(0.01, requires_grad=True)
    start, target = initial_parameters(student, 0), initial_parameters(student, 1)
    F.cross_entropy(student(batches[0].detach()), labels[0]).backward()  # what any way needs is loaded before it counts
    before, seconds = peak_mb(), []
    for _ in range(repeat):
        begin = time.process_time()
        loss = (WAYS[way](student, start, batches, labels, alpha) - target).square().sum()
        gradients = torch.autograd.grad(loss, [alpha, *batches])
        seconds.append(time.process_time() - begin)
        del loss
    return dict(seconds=min(seconds), memory_mb=peak_mb() - before, norms=[g.norm().item() for g in gradients])


def table(shapes: list[str], all_steps: list[int], repeat: int) -> list[dict]:
    """A row for each shape, N and way, printed as it comes."""
    rows = []
    print(f"{'shape':6}{'N':>4}  {'way':10}{'seconds':>9}{'of official':>13}{'MB':>8}{'of official':>13}")
    for shape in shapes:
        for steps in all_steps:
            found = {}
            for way in WAYS:
                call = [sys.executable, __file__, "--one", way, shape, "--steps", str(steps), "--repeat", str(repeat)]
                out = subprocess.run(call, check=True, capture_output=True, text=True).stdout
                row = found[way] = json.loads(out)
                first, pairs = found["official"], zip(row["norms"], found["official"]["norms"], strict=True)
                row["largest_difference_of_norms"] = max(abs(a - b) / abs(b) for a, b in pairs)
                row["time_ratio"] = row["seconds"] / first["seconds"]
                row["memory_ratio"] = row["memory_mb"] / first["memory_mb"]
                print(
                    f"{shape:6}{steps:4}  {way:10}{row['seconds']:9.2f}{row['time_ratio']:13.2f}"
                    f"{row['memory_mb']:8.0f}{row['memory_ratio']:13.2f}",
                    flush=True,
                )
                rows.append(dict(shape=shape, steps=steps, way=way) | {k: v for k, v in row.items() if k != "norms"})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["S", "P"], choices=SHAPES)
    parser.add_argument("--steps", nargs="+", default=[10, 50], type=int)
    parser.add_argument("--repeat", default=2, type=int)
    parser.add_argument("--out", default="")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)  # way and shape: the call of a child
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(*options.one, options.steps[0], options.repeat)))
        return
    rows = table(options.shapes, options.steps, options.repeat)
    if options.out:
        write(Path(options.out), as_json({"environment": environment("cpu"), "rows": rows}))


if __name__ == "__main__":
    main()
