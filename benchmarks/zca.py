"""Time and memory of loading CIFAR-10 and of fitting ZCA on its training images: ours and kornia's `ZCAWhitening`.

    python benchmarks/zca.py [--threads 2] [--out figures/benchmarks]

ZCA has 3,072 dimensions here. A fit starts from the data set's bytes, in its own process. Memory is the peak resident
size minus the size before. On a busy machine compare CPU seconds. The largest difference between kornia's numbers and
ours is printed, too. CIFAR-10 is searched in AUGDISTILL_DATA and in the cache.
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


VARIANTS = {f.__name__: f for f in (ours, kornia)}


def measure(variant: str, threads: int, keep: str) -> dict:
    """Seconds and peak extra memory in MB, of loading and of one fit.

    The fitted tensors, and ten test images whitened with them, are saved in the file `keep`.
    """
    import torchvision  # noqa: F401 (imported before the measurement)

    torch.set_num_threads(threads)
    before, start = fresh_peak(), time.perf_counter()
    data = load("cifar10")
    loading = dict(seconds=time.perf_counter() - start, memory_mb=status_mb("VmHWM") - before)
    if variant == "kornia":
        import kornia  # noqa: F401 (imported before the measurement)
    before, start, cpu = fresh_peak(), time.perf_counter(), time.process_time()
    found = VARIANTS[variant](data.train.raw)
    result = dict(seconds=time.perf_counter() - start, cpu_seconds=time.process_time() - cpu)
    result["memory_mb"] = status_mb("VmHWM") - before
    found["images"] = mixed(data.test.raw[:10] / 255 - found["mean"], found["matrix"])
    save_file({name: t.detach().contiguous() for name, t in found.items()}, keep)
    return result | {"loading": loading}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", default=2, type=int)
    parser.add_argument("--variant", choices=VARIANTS, help="measure this one in this process, and print JSON")
    parser.add_argument("--keep", help="(with --variant) the file for the fitted tensors")
    parser.add_argument("--out", default="", help="a folder for zca.json")
    options = parser.parse_args()
    if options.variant:
        print(json.dumps(measure(options.variant, options.threads, options.keep)))
        return
    rows, found = [], {}
    with tempfile.TemporaryDirectory() as folder:
        for variant in VARIANTS:
            keep = f"{folder}/{variant}.safetensors"
            call = [sys.executable, __file__, "--threads", str(options.threads), "--variant", variant, "--keep", keep]
            out = subprocess.run(call, check=True, stdout=subprocess.PIPE, text=True).stdout
            found[variant] = load_file(keep)
            row = dict(way=variant, threads=options.threads) | json.loads(out)
            loading = row.pop("loading")
            row["largest_difference"] = {
                k: (t - found["ours"][k]).abs().max().item() for k, t in found[variant].items()
            }
            rows.append(row)
            print(
                f"{variant:8}{row['seconds']:8.1f} s ({row['cpu_seconds']:.1f} CPU) "
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
