"""Latency of the explorer from a slider to its picture: 20 CIFAR-10 images and 6 draws of one, by one phi or two.

    python benchmarks/explorer.py [--changes 500] [--out figures/benchmarks]

Milliseconds in the kernel from a slider's new value to the encoded pictures (without their transfer to the browser), by
slider: the U-Net with noise, at rest and while a phi trains in the background; the U-Net beside a policy; ten digits
with the paths of students (N 15). Also the process's memory, and its growth after the first fifty changes. On a busy
machine compare the CPU times. CIFAR-10 is searched in AUGDISTILL_DATA and in the cache.
"""

import argparse
import itertools
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

from unroll import status_mb

from augdistill_report import open_run
from augdistill_report.explorer.page import Page
from augdistill_report.files.store import as_json, write
from augdistill_report.work.provenance import environment

LIMIT, LIMIT_OF_TWO, LIMIT_OF_PATHS = 0.15, 0.3, 0.5  # seconds: one phi, two, and one with the paths of students
WARM = 50  # changes before memory is measured


def changes(page: Page):
    """An endless sequence of sliders and new values, each of which changes the picture."""
    sliders = {
        "strength": (page.strength, itertools.cycle([0.5, 1.5, 1.0])),
        "noise": (page.noise, itertools.cycle([0.5, 2.0, 1.0])),
        "seed": (page.seed, itertools.cycle(range(1, 50))),
        "class": (page.label, itertools.cycle([*range(10), -1])),
        "image": (page.image, itertools.cycle(range(1, 21))),
    }
    for name, (control, values) in itertools.cycle(sliders.items()):
        value = next(values)
        yield name, control, value if value != control.value else next(values)


def turned(page: Page, count: int, limit: float = LIMIT) -> dict:
    """Milliseconds from slider to picture, by slider."""
    wall, cpu, turns = {}, {}, itertools.islice(changes(page), count)
    follow = page.students.follow
    done = {}

    def timed():  # work after the pictures (the mean of draws for later) does not count
        follow()
        done.update(wall=time.perf_counter(), cpu=time.thread_time())

    page.students.follow = timed
    for name, control, value in turns:
        start, start_cpu = time.perf_counter(), time.thread_time()
        control.value = value
        wall.setdefault(name, []).append(1000 * (done["wall"] - start))
        cpu.setdefault(name, []).append(1000 * (done["cpu"] - start_cpu))
    page.students.follow = follow
    every, every_cpu = (sorted(itertools.chain(*times.values())) for times in (wall, cpu))
    return {
        "changes": count,
        "median_ms": statistics.median(every),
        "ninety_percent_ms": every[int(0.9 * count)],
        "longest_ms": every[-1],
        "within_limit": sum(ms <= 1000 * limit for ms in every) / count,
        "processor_median_ms": statistics.median(every_cpu),
        "processor_longest_ms": every_cpu[-1],
        "median_ms_by_slider": {name: statistics.median(times) for name, times in wall.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--changes", default=500, type=int)
    parser.add_argument("--out", default="", help="a folder for explorer.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = open_run("06_phi_explorer", dict(preset="cifar10-small", out=f"{folder}/run", experts=1, epochs=1))
        page = Page(run)
        page.phi.value, page.count.value = "untrained unet_noise", 20
        turned(page, WARM)
        before = status_mb("VmRSS")
        rest = turned(page, options.changes) | {"growth_mb": status_mb("VmRSS") - before}
        page.learning.network.value, page.learning.iterations.value = "unet_noise", 500
        page.learning.train.click()
        while page.background.busy and not page.learning.here()[0].history:
            time.sleep(0.1)
        page.phi.value = "untrained unet_noise"
        training = turned(page, options.changes // 10)
        page.close()
        page.other.value = "untrained policy"
        two = turned(page, options.changes // 5, LIMIT_OF_TWO)
        digits = open_run("06_phi_explorer", dict(preset="digits", out=f"{folder}/digits", experts=1))
        digits.experts()
        small = Page(digits)
        small.phi.value, small.students.where.value = "untrained unet_noise", True
        paths = turned(small, options.changes // 5, LIMIT_OF_PATHS)
        for error in page.errors + small.errors:
            raise error
    rows = {"at rest": rest, "while a phi is trained": training, "two phis": two, "digits, paths of students": paths}
    print(json.dumps(rows, indent=1))
    if options.out:
        about = {"environment": environment("cpu"), "images": 20, "draws": 6}
        about["limits_ms"] = [1000 * limit for limit in (LIMIT, LIMIT_OF_TWO, LIMIT_OF_PATHS)]
        about["memory_mb"] = {"resident": status_mb("VmRSS"), "private": status_mb("RssAnon")}
        about["busy"] = dict(cores=os.cpu_count(), load=os.getloadavg()[1])  # mean over 5 minutes
        write(Path(options.out) / "explorer.json", as_json(about | {"rows": rows}))


if __name__ == "__main__":
    main()
