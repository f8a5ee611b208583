"""What one GPU does with this project, in minutes: first whether its numbers are exact, then how fast they come.

    python benchmarks/gpu.py --minutes 7 [--device cuda] [--tiny] [--continue] [--out figures/benchmarks]

Exactness, on this device: gradients of the unroll in float64, in each memory mode, compared with the official way; the
cosine of float32's, TF32's and bf16's gradients to float64's; experts, and evaluation students, trained together and
one by one; a run that is resumed and one that is not. Then the speed: iterations a second at N = 50 student steps of
10, 100 and 500 images with DSA in every step, ours (`distill` with pixels, as a user runs it) and the official way;
experts a minute; students a minute.

"official" is the loop of MTT's official code written anew: torch's own layers, one flat parameter vector,
`create_graph` through all N steps, torch's default number types (TF32 in convolutions on a GPU). Images are random,
since their content does not change the time. A time is the median of repeats after a first one, which is listed alone;
the memory is the peak of what was allocated.

Rows come in order of value. gpu.json and gpu.png are written after each one, and each has its share of the time limit,
so a run that is cut short keeps what it has; `--continue` measures the rest. `--tiny` runs the same code in a minute.
This has **never been run on a GPU yet**.
"""

import argparse
import dataclasses
import itertools
import json
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn
from unroll import Layers, fresh_peak, official, status_mb

from augdistill_core import (
    MEMORY,
    PRECISIONS,
    ConvNet,
    DistillConfig,
    ExpertConfig,
    Trajectories,
    arithmetic,
    distill,
    flatten,
    gradient_cosine,
    initial_parameters,
    make_phi,
    matching_loss,
    seeded,
    train_expert,
    train_together,
    unroll,
)
from augdistill_method.capture import warn_once
from augdistill_report.commands.campaign import alarm, device_works
from augdistill_report.data.augmentations import DSA
from augdistill_report.data.datasets import Split
from augdistill_report.files.store import OutOfTime, as_json, write
from augdistill_report.show.plots import PALETTE, new_figure
from augdistill_report.work.provenance import environment
from augdistill_report.work.scoring import EvalConfig, evaluate, train_student, train_students

ALPHA = 0.01

OFFICIAL = "official"


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How large everything is: as in MTT's CIFAR-10 setting, or (`TINY`) so that a CPU needs seconds."""

    shape: tuple = (3, 10, 32, 128, 3)  # the ConvNet's arguments
    steps: int = 50  # N
    batches: tuple = (10, 100, 500)  # images in a student step
    repeats: int = 30  # timed iterations, at most
    experts: int = 40  # that train together
    epoch: int = 176  # an expert's steps in an epoch: 45,000 images in batches of 256
    measured: int = 20  # of these steps, timed
    students: int = 5
    student_steps: int = 200  # timed, of a student's 1,000 (ten images) or 17,600 (all the data)


TINY = Sizes((3, 10, 8, 4, 2), 3, (10, 20), 3, 2, 176, 2, 2, 4)


class Enough(Exception):
    """The time for one measurement is over."""


@dataclasses.dataclass(frozen=True)
class Bench:
    """One run of the benchmark: its device and sizes. Each measurement is a method that returns a row's numbers."""

    device: str
    sizes: Sizes

    @property
    def memories(self) -> list[str]:
        return [memory for memory in MEMORY if memory != "captured" or self.device == "cuda"]

    @property
    def precisions(self) -> list[str]:
        return [precision for precision in PRECISIONS if precision != "tf32" or self.device == "cuda"]

    @property
    def fast(self) -> tuple[str, str]:
        """The memory mode and the precision that are meant for this device."""
        return ("captured", "tf32") if self.device == "cuda" else ("graph", "float32")

    def student(self, precision: str = "float32", kind: type[nn.Module] = ConvNet) -> nn.Module:
        return kind(*self.sizes.shape, precision=precision).to(self.device)

    def images(self, count: int, seed: int) -> Tensor:
        channels, _, size, *_ = self.sizes.shape
        return torch.randn(count, channels, size, size, generator=seeded(seed)).to(self.device)

    def labels(self, count: int) -> Tensor:
        return (torch.arange(count) % 10).to(self.device)

    def segment(self, steps: int, batch: int) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
        """A start `[P]`, the target that as many steps on other images reach, and N batches with their labels."""
        start = initial_parameters(self.student(), 0).to(self.device)
        batches, others = ([self.images(batch, seed + k) for k in range(steps)] for seed in (0, 1000))
        labels = [self.labels(batch)] * steps
        with torch.no_grad():
            return start, unroll(self.student(), start, others, labels, ALPHA), batches, labels

    def wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    # --- exactness ----------------------------------------------------------------------------------------------------

    def float64(self) -> dict:
        """The relative difference of each memory mode's gradients to the official way's, all in float64."""
        start, target, batches, labels = self.segment(min(self.sizes.steps, 6), 10)
        found = {}
        for name in (OFFICIAL, *self.memories):
            student = self.student(kind=Layers if name == OFFICIAL else ConvNet).double()
            alpha = torch.tensor(ALPHA, dtype=torch.float64, device=self.device, requires_grad=True)
            own = [x.double().requires_grad_() for x in batches]
            options = {} if name == OFFICIAL else {"memory": name}
            end = (official if name == OFFICIAL else unroll)(student, start.double(), own, labels, alpha, **options)
            grads = torch.autograd.grad((end - target.double()).square().sum(), [alpha, *own])
            found[name] = torch.cat([g.flatten() for g in grads])
        reference = found.pop(OFFICIAL)
        numbers = {name: float((g - reference).norm() / reference.norm()) for name, g in found.items()}
        return numbers | {"exact": max(numbers.values()) < 1e-9}

    def cosine(self, precision: str) -> dict:
        """The cosine of the gradient in all batches to that in float64, through N steps of ten images."""
        start, target, batches, labels = self.segment(self.sizes.steps, 10)
        student = self.student(precision)
        return {"cosine": gradient_cosine(student, start, target, batches, labels, ALPHA, memory=self.fast[0])}

    def experts_together(self) -> dict:
        """The largest relative difference of trajectories trained together to those trained one by one, in float64."""
        images, labels = self.images(1024, 0).double(), self.labels(1024)
        arguments = self.student().double(), images, labels, ExpertConfig(epochs=2, expert_batch=256), 0
        theta = train_together(*arguments, range(3), augment=DSA())
        alone = [train_expert(*arguments, k, augment=DSA()) for k in range(3)]
        return self.differences(theta, alone)

    def students_together(self) -> dict:
        """The same of evaluation students after ten steps with momentum and weight decay."""
        config = EvalConfig(eval_students=3, eval_steps=10, eval_batch=64, eval_lr=ALPHA)
        arguments = self.student().double(), None, self.images(256, 0).double(), self.labels(256), config
        seeds = [(0, "student", k) for k in range(3)]
        models = train_students(*arguments, seeds, augment=DSA())
        alone = [train_student(*arguments, *seed, augment=DSA()) for seed in seeds]
        return self.differences(*([flatten(m.parameters()).detach() for m in found] for found in (models, alone)))

    def differences(self, found: Iterable[Tensor], reference: Iterable[Tensor]) -> dict:
        worst = max(float((a - b).norm() / b.norm()) for a, b in zip(found, reference, strict=True))
        return {"relative difference": worst, "exact": worst < 1e-9}

    def resumed(self) -> dict:
        """A `distill` run of 6 iterations, and one that is resumed from its state after the third."""
        start, target, batches, labels = self.segment(1, 10)
        images, states = batches[0], []

        def pixels(iterations: int, resume=None) -> Tensor:
            phi = make_phi("pixels", images, 10, seed=0)
            experts = Trajectories(self.student(), torch.stack([start, target])[None])
            config = self.config(iterations=iterations)
            on_step = (lambda state: states.append(state())) if resume is None else None
            options = dict(seed=0, augment=DSA(), on_step=on_step, resume=resume)
            distill(phi, images, labels[0], experts, config, **options)
            return phi.pixels.detach()

        undisturbed = pixels(6)
        again = pixels(6, resume=states[2])
        moved = float((undisturbed - images).norm())
        return {
            "same bits": torch.equal(undisturbed, again),
            "relative difference": float((undisturbed - again).norm()) / moved,
        }

    # --- speed --------------------------------------------------------------------------------------------------------

    def config(self, **changes) -> DistillConfig:
        options = dict(syn_steps=self.sizes.steps, expert_epochs=1, max_start_epoch=0, memory=self.fast[0])
        options |= dict(phi_optimizer="SGD", phi_lr=1.0, alpha_mode="raw", alpha_optimizer="SGD", alpha_lr=1e-9)
        return DistillConfig(alpha=ALPHA, **options | changes)

    def ours(self, batch: int, memory: str, precision: str) -> Callable:
        """Iterations of `distill` with pixels, each reported to the function that it is called with."""
        start, target, (images, *_), (labels, *_) = self.segment(1, batch)

        def run(on_iteration: Callable[[], None]) -> None:
            experts = Trajectories(self.student(precision), torch.stack([start, target])[None])
            config, phi = self.config(iterations=10**6, memory=memory), make_phi("pixels", images, 10, seed=0)
            options = dict(seed=0, augment=DSA(), on_iteration=lambda record: on_iteration())
            distill(phi, images, labels, experts, config, **options)

        return run

    def officially(self, batch: int) -> Callable:
        """The same iterations in the official way."""
        start, target, (images, *_), (labels, *_) = self.segment(1, batch)

        def run(on_iteration: Callable[[], None]) -> None:
            student, pixels = self.student(kind=Layers), images.clone().requires_grad_()
            alpha = torch.tensor(ALPHA, device=self.device, requires_grad=True)
            optimizers = [torch.optim.SGD([pixels], lr=1.0), torch.optim.SGD([alpha], lr=1e-9)]
            augment, generator = DSA(), seeded(0)
            while True:
                fed = [augment(pixels, generator=generator) for _ in range(self.sizes.steps)]
                end = official(student, start, fed, [labels] * self.sizes.steps, alpha)
                for optimizer in optimizers:
                    optimizer.zero_grad()
                matching_loss(end, target, start).backward()
                for optimizer in optimizers:
                    optimizer.step()
                on_iteration()

        return run

    def iterations(self, batch: int, run: Callable, until: float) -> dict:
        """Seconds an iteration (median, after the first), and the peak memory in MB."""
        before = self.fresh()
        moments = [time.perf_counter()]

        def on_iteration():
            self.wait()
            moments.append(time.perf_counter())
            if len(moments) > self.sizes.repeats + 1 or (len(moments) > 3 and time.monotonic() > until):
                raise Enough

        try:
            run(on_iteration)
        except Enough:
            pass
        except torch.OutOfMemoryError:
            return {"batch": batch, "stopped": "the memory did not suffice"}
        seconds = [b - a for a, b in itertools.pairwise(moments)]
        numbers = {"seconds": statistics.median(seconds[1:]), "n": len(seconds) - 1, "first seconds": seconds[0]}
        return {"batch": batch} | numbers | {"memory MB": self.peak() - before}

    def fresh(self) -> float:
        """Return unused memory, reset the peak, and return what is allocated in MB."""
        if self.device != "cuda":
            return fresh_peak()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 2**20

    def peak(self) -> float:
        return torch.cuda.max_memory_allocated() / 2**20 if self.device == "cuda" else status_mb("VmHWM")

    def experts(self, how: str) -> dict:
        """Experts a minute (5 epochs of 45,000 images in batches of 256, with DSA), together or one by one."""
        s, batch = self.sizes, 256
        count = s.experts if how == "together" else 1
        images, labels, moments = self.images(batch * s.measured, 0), self.labels(batch * s.measured), []

        def on_snapshot(*_):
            self.wait()
            moments.append(time.perf_counter())

        arguments = self.student(self.fast[1]), images, labels, ExpertConfig(epochs=3, expert_batch=batch), 0
        options = dict(augment=DSA(), on_snapshot=on_snapshot)
        before = self.fresh()
        train_together(*arguments, range(count), **options) if count > 1 else train_expert(*arguments, 0, **options)
        step = min(b - a for a, b in itertools.pairwise(moments)) / s.measured  # without the first epoch: warm-up
        numbers = {"experts": count, "seconds a step": step, "experts a minute": 60 * count / (step * s.epoch * 5)}
        return numbers | {"memory MB": self.peak() - before}

    def students(self, images: int, steps: int) -> dict:
        """Students a minute: trained for so many steps on ten images under DSA, or on batches of 256."""
        s = self.sizes
        mean, one = torch.zeros(1, 1, 1, device=self.device), torch.ones(1, 1, 1, device=self.device)
        train = Split(self.images(images, 0), self.labels(images), mean, one)
        student, seconds = self.student(self.fast[1]), []
        for count in (max(s.student_steps // 10, 2), s.student_steps):  # the first call warms up
            config = EvalConfig(eval_students=s.students, eval_steps=count, eval_batch=256, eval_lr=ALPHA)
            before = self.fresh()
            self.wait()
            began = time.perf_counter()
            evaluate(student, None, train, train.take(slice(0, 10)), config, 0, augment=DSA())
            self.wait()
            seconds.append(time.perf_counter() - began)
        step = seconds[-1] / s.student_steps
        numbers = {"students": s.students, "images": images, "steps": steps, "seconds a step of all": step}
        return numbers | {"students a minute": 60 * s.students / (step * steps), "memory MB": self.peak() - before}

    def card(self) -> dict:
        """The fastest of ten matrix products (TFLOP/s) by precision, and of ten copies (GB/s, read and written)."""
        n, found = (8192 if self.device == "cuda" else 512), {}
        for precision in self.precisions:
            a = torch.randn(n, n, device=self.device, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
            with arithmetic(self.student(precision)):
                found[precision] = 2e-12 * n**3 / self.fastest(lambda a=a: a @ a)
        memory = torch.empty(n, n, device=self.device)
        found["copy GB/s"] = 8e-9 * n * n / self.fastest(memory.clone)
        return found

    def fastest(self, work: Callable) -> float:
        seconds = []
        for _ in range(11):
            self.wait()
            began = time.perf_counter()
            work()
            self.wait()
            seconds.append(time.perf_counter() - began)
        return min(seconds[1:])


def plan(bench: Bench) -> list[tuple[str, float, Callable[[float], dict]]]:
    """The rows in order of value: a name, its share of the time, and the measurement, called with its last moment."""
    memory, all_data = bench.fast[0], 256 * bench.sizes.measured
    rows = [("exact: gradients in float64", 1, lambda until: bench.float64())]
    rows += [(f"exact: gradient in {p}", 0.5, lambda until, p=p: bench.cosine(p)) for p in bench.precisions]
    rows += [("exact: experts together", 1, lambda until: bench.experts_together())]
    rows += [("exact: students together", 0.5, lambda until: bench.students_together())]
    rows += [("exact: resumed", 0.5, lambda until: bench.resumed())]

    def timed(batch: int, variant: str, share: float, build: Callable) -> tuple:
        name = f"{batch} images a step, {variant}"
        return name, share, lambda until: {"variant": variant} | bench.iterations(batch, build(batch), until)

    def ours(batch: int, memory: str, precision: str) -> tuple:
        return timed(batch, f"{memory}, {precision}", 0.5, lambda batch: bench.ours(batch, memory, precision))

    for batch in bench.sizes.batches:
        rows += [ours(batch, *bench.fast), timed(batch, OFFICIAL, 1, bench.officially), ours(batch, memory, "bf16")]
    rows += [("experts together", 1, lambda until: bench.experts("together"))]
    rows += [("students on 10 images", 0.5, lambda until: bench.students(10, 1000))]
    rows += [("students on all the data", 1, lambda until: bench.students(all_data, 17600))]
    rows += [("experts one by one", 0.5, lambda until: bench.experts("one by one"))]
    rows += [("the card", 0.2, lambda until: bench.card())]
    others = [(m, p) for m in bench.memories for p in bench.precisions if p != "bf16" and (m, p) != bench.fast]
    return rows + [ours(batch, *other) for other in others for batch in bench.sizes.batches]


def measure_all(bench: Bench, seconds: float, out: Path, goes_on: bool) -> list[dict]:
    """Measure the rows as far as the time suffices, and write gpu.json and gpu.png in `out` after each.

    If it `goes_on`, the rows of the file in `out` are kept: they must come from the same device, sizes and code.
    """
    deadline, file = time.monotonic() + 0.95 * seconds, out / "gpu.json"
    found = json.loads(as_json({"environment": environment(bench.device), "sizes": dataclasses.asdict(bench.sizes)}))
    kept = json.loads(file.read_text()) if goes_on and file.exists() else found | {"rows": []}
    if any(kept.get(key) != value for key, value in found.items()):
        raise SystemExit(f"{file}: is of another device, size or commit; choose another --out, or leave out --continue")
    rows = [row for row in plan(bench) if row[0] not in [row["row"] for row in kept["rows"]]]
    for number, (name, share, measure) in enumerate(rows):
        began = time.monotonic()
        if began >= deadline:
            break
        until = began + (deadline - began) * share / sum(s for _, s, _ in rows[number:])
        row = {"row": name}
        warn_once.cache_clear()  # each row tells if its steps could not be captured
        try:
            with warnings.catch_warnings(record=True) as warned, alarm(min(deadline, until + 0.2 * seconds)):
                warnings.simplefilter("always")
                row |= measure(until)
        except OutOfTime:
            row["stopped"] = "its share of the time was over"
        except (RuntimeError, ValueError) as error:  # torch's, for example without memory
            row["stopped"] = " ".join(str(error).split())[:300]
        if texts := {str(w.message) for w in warned if not str(w.message).startswith("iteration")}:  # of a random loss
            row["warnings"] = sorted(texts)[:5]
        row["measured in"] = round(time.monotonic() - began, 1)
        kept["rows"].append(row)
        print(row_text(row), flush=True)
        write(file, as_json(kept | {"rows left out": [name for name, *_ in rows[number + 1 :]]}))
        if drawn := iteration_rows(kept["rows"]):
            drawing = figure(drawn, kept["environment"]["device"], bench.sizes.steps)
            drawing.savefig(out / "gpu.png", dpi=110, metadata={"Software": None})
        if "stopped" in row and not device_works(bench.device):
            start_again(deadline - time.monotonic())
    return kept["rows"]


def start_again(seconds: float) -> None:
    """Replace this process, whose device gives errors only after an invalid kernel, by one that measures the rest."""
    options = [a for a in sys.argv[1:] if a != "--continue"]
    if "--minutes" in options:
        place = options.index("--minutes")
        del options[place : place + 2]
    print("the device gives errors only: a new process measures the rest", flush=True)
    os.execv(sys.executable, [sys.executable, __file__, *options, "--continue", "--minutes", str(max(seconds, 0) / 60)])


def row_text(row: dict) -> str:
    numbers = {k: v for k, v in row.items() if k not in ("row", "variant", "batch", "measured in")}
    text = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in numbers.items())
    return f"{row['row']:36} {text}  [{row['measured in']:.1f} s]"


def iteration_rows(rows: list[dict]) -> list[dict]:
    return [row for row in rows if "seconds" in row]


def figure(rows: list[dict], device: str, steps: int):
    """Milliseconds and memory of one iteration by the images in a student step, a line for each variant."""
    drawing, (left, right) = new_figure(10.5, 3.8, 2)
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    for number, variant in enumerate(sorted(variants, key=lambda name: name != OFFICIAL)):
        colour = "black" if variant == OFFICIAL else PALETTE[(number - 1) % len(PALETTE)]
        its = [row for row in rows if row["variant"] == variant]
        for axis, factor, key in ((left, 1000, "seconds"), (right, 1, "memory MB")):
            axis.plot(
                [row["batch"] for row in its], [factor * row[key] for row in its], "o-", color=colour, label=variant
            )
    left.set(ylabel="milliseconds an iteration", title=f"N = {steps}, {device}")
    right.set(ylabel="peak memory in MB")
    for axis in (left, right):
        axis.set(xlabel="images in a student step", xscale="log", yscale="log")
        axis.set_xticks(sorted({row["batch"] for row in rows}))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter("")
    right.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return drawing


def conclusions(rows: list[dict]) -> list[str]:
    """For each batch size: the fastest of ours with a gradient's cosine to float64's of at least .999, and official."""
    cosines = {row["row"].rpartition(" ")[2]: row["cosine"] for row in rows if "cosine" in row}
    by_batch: dict[int, dict[str, float]] = {}
    for row in iteration_rows(rows):
        if row["variant"] == OFFICIAL or cosines.get(row["variant"].rpartition(", ")[2], 0) >= 0.999:
            slow = " (NOT as CUDA graphs)" if any("CUDA graph" in text for text in row.get("warnings", [])) else ""
            by_batch.setdefault(row["batch"], {})[row["variant"] + slow] = 1000 * row["seconds"]
    lines = []
    for batch, found in by_batch.items():
        reference = found.pop(OFFICIAL, None)
        if found:
            best = min(found, key=found.get)
            ratio = (
                f", {reference / found[best]:.1f} times as fast as official ({reference:.1f} ms)" if reference else ""
            )
            lines.append(f"{batch} images a step: {best}, {found[best]:.1f} ms an iteration{ratio}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", default=7.0, type=float, help="the time limit (7)")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="a trial in a minute, with numbers that mean nothing")
    parser.add_argument(
        "--continue", action="store_true", dest="goes_on", help="keep the rows in --out, measure the rest"
    )
    parser.add_argument("--out", default="figures/benchmarks", type=Path, help="the folder for gpu.json and gpu.png")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device here; use cpu")
    torch.set_num_threads(1 if options.device == "cpu" else torch.get_num_threads())
    bench = Bench(options.device, TINY if options.tiny else Sizes())
    rows = measure_all(bench, 60 * options.minutes, options.out, options.goes_on)
    print("\n".join(conclusions(rows)))
    if wrong := [row["row"] for row in rows if row.get("exact") is False]:
        parser.exit(1, f"NOT EXACT on this device: {', '.join(wrong)}\n")


if __name__ == "__main__":
    main()
