"""Loading CIFAR-10, and fitting ZCA on its training images (3,072 dimensions): ours against kornia's `ZCAWhitening`.

    python benchmarks/zca.py [--threads 2] [--out figures/benchmarks]

A fit starts from the set's bytes, in a process of its own; memory is the rise of the resident size at its peak over
what it was before. On a busy machine look at the processor's seconds. How far kornia's numbers are from ours is printed
beside it. CIFAR-10 is looked for as everywhere.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from unroll import fresh_peak, status_mb

from augdistill_report.data.datasets import load, mixed
from augdistill_report.data.whitening import EPS, fit
from augdistill_report.files.store import as_json, write
from augdistill_report.work.provenance import environment


def ours(raw: torch.Tensor) -> dict[str, torch.Tensor]:
    return fit(raw)


def kornia(raw: torch.Tensor) -> dict[str, torch.Tensor]:
    """As the official code calls it: on all images as floats in [0, 1]."""
    from kornia.enhance import ZCAWhitening

    whitening = ZCAWhitening(eps=EPS, compute_inv=True).fit(raw / 255)
    mean = whitening.mean_vector.view(raw.shape[1:])
    return {"mean": mean, "matrix": whitening.transform_matrix, "inverse": whitening.transform_inv}


WAYS = {f.__name__: f for f in (ours, kornia)}


def measure(way: str, threads: int, keep: str) -> dict:
    """Seconds and peak extra memory of loading, and of one fit.

    What it found, and ten test images whitened by it, go to `keep`.
    """
    import torchvision  # noqa: F401 (its own time and memory are not the set's)

    torch.set_num_threads(threads)
    before, start = fresh_peak(), time.perf_counter()
    data = load("cifar10")
    loading = dict(seconds=time.perf_counter() - start, memory_mb=status_mb("VmHWM") - before)
    if way == "kornia":
        import kornia  # noqa: F401 (its own time and memory are not a fit's)
    before, start, cpu = fresh_peak(), time.perf_counter(), time.process_time()
    found = WAYS[way](data.train.raw)
    result = dict(seconds=time.perf_counter() - start, cpu_seconds=time.process_time() - cpu)
    result["memory_mb"] = status_mb("VmHWM") - before
    found["images"] = mixed(data.test.raw[:10] / 255 - found["mean"], found["matrix"])
    save_file({name: t.detach().contiguous() for name, t in found.items()}, keep)
    return result | {"loading": loading}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", default=2, type=int)
    parser.add_argument("--way", choices=WAYS, help="measure this one here, and print it as JSON")
    parser.add_argument("--keep", help="(with --way) the file for what was found")
    parser.add_argument("--out", default="", help="a folder for zca.json")
    options = parser.parse_args()
    if options.way:
        print(json.dumps(measure(options.way, options.threads, options.keep)))
        return
    rows, found = [], {}
    with tempfile.TemporaryDirectory() as folder:
        for way in WAYS:
            keep = f"{folder}/{way}.safetensors"
            call = [sys.executable, __file__, "--threads", str(options.threads), "--way", way, "--keep", keep]
            out = subprocess.run(call, check=True, stdout=subprocess.PIPE, text=True).stdout
            found[way] = load_file(keep)
            row = dict(way=way, threads=options.threads) | json.loads(out)
            loading = row.pop("loading")
            row["largest_difference"] = {k: (t - found["ours"][k]).abs().max().item() for k, t in found[way].items()}
            rows.append(row)
            print(
                f"{way:8}{row['seconds']:8.1f} s ({row['cpu_seconds']:.1f} of processor time) "
                f"{row['memory_mb']:8.0f} MB   {row['largest_difference']}",
                flush=True,
            )
    print(f"loading {loading['seconds']:8.1f} s {loading['memory_mb']:8.0f} MB")
    if options.out:
        write(
            Path(options.out) / "zca.json",
            as_json({"environment": environment("cpu"), "loading": loading, "rows": rows}),
        )


if __name__ == "__main__":
    main()
