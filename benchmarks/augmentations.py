"""Time and accuracy of AutoAugment, RandAugment, TrivialAugment, AugMix: ours (batched, by kornia) and torchvision's.

    python benchmarks/augmentations.py [--accuracy] [--subsets 3] [--steps 1000] [--out figures/benchmarks]

CPU seconds for 1,000 images of CIFAR-10 at 32x32, in batches of 64 and of 1,000, on one thread; torchvision augments
images one by one. With `--accuracy`, also the validation accuracy of students trained under each: 10 % subsets of
CIFAR-10 at 16x16, 3 students (width 32) on each, and the 95 % interval of the difference (ours minus torchvision's,
paired by subset and student). Finished accuracies are kept in augmentations.part.json, so that a stopped run continues.
"""

import argparse
import itertools
import json
import time
from pathlib import Path

import numpy as np
import torch
from scipy import stats
from torchvision.transforms import v2

from augdistill_core import ConvNet, seeded
from augdistill_report.data.augmentations import augmentation
from augdistill_report.data.datasets import load
from augdistill_report.files.store import as_json, write
from augdistill_report.work.provenance import environment
from augdistill_report.work.scoring import EvalConfig, evaluate

STUDENTS = 3  # on each subset

COMPARED = ("autoaugment", "randaugment", "trivialaugment")  # by accuracy


def shifts(size):
    """torchvision's TrivialAugment with our range of shifts: up to the image's width, not up to 32 pixels."""
    space, own = v2.TrivialAugmentWide._AUGMENTATION_SPACE, (lambda bins, *_: torch.linspace(0, size, bins), True)
    trivial = v2.TrivialAugmentWide()
    trivial._AUGMENTATION_SPACE = space | {"TranslateX": own, "TranslateY": own}
    return trivial


POLICIES = {
    "autoaugment": lambda size: v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10),
    "randaugment": lambda size: v2.RandAugment(magnitude=9),
    "trivialaugment": shifts,
    "augmix": lambda size: v2.AugMix(),
}


def ours(name, data):
    return augmentation(name, data)


def torchvision(name, data):
    """Crop, flip and the policy on each image as uint8, as in torchvision's reference scripts."""
    size = data.shape[-1]
    crop_flip = v2.RandomCrop(size, padding=max(size // 8, 1)), v2.RandomHorizontalFlip(0.5)
    transform = v2.Compose([*crop_flip, POLICIES[name](size)])

    def augment(images, *, generator, **_):
        values = (data.pixels(images) * 255).round().byte()
        with torch.random.fork_rng(devices=[]):  # torchvision draws from the global generator
            torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
            values = torch.stack([transform(image) for image in values])
        return data.standardise(values.float() / 255)

    return augment


VARIANTS = {f.__name__: f for f in (ours, torchvision)}


def times(data, repeat) -> list[dict]:
    rows = []
    images = data.train.take(slice(0, 1000)).images
    for name in POLICIES:
        row = {"policy": name}
        for variant, batch in (("ours", 64), ("ours", 1000), ("torchvision", 64)):
            augment, seconds = VARIANTS[variant](name, data), []
            augment(images[:batch], generator=seeded(0))
            for k in range(repeat):
                begin, generator = time.process_time(), seeded(k)
                for x in images.split(batch):
                    augment(x, generator=generator)
                seconds.append(time.process_time() - begin)
            row[f"{variant}, batches of {batch}"] = min(seconds)
        rows.append(row)
        print(row, flush=True)
    return rows


def accuracies(data, subsets, steps, kept) -> list[dict]:
    """A row for each policy; the file `kept` holds the accuracies measured so far."""
    found = json.loads(kept.read_text()) if kept.exists() else {}
    config = EvalConfig(eval_students=STUDENTS, eval_steps=steps)
    for subset, name, (variant, build) in itertools.product(range(subsets), COMPARED, VARIANTS.items()):
        key = f"{name}, {variant}, subset {subset}, {steps} steps"
        if key not in found:
            train = data.train.take(data.subset(subset, fraction=0.1))
            student = ConvNet(3, 10, data.shape[-1], width=32, depth=2)
            found[key] = evaluate(student, None, train, data.validation.made(), config, 0, augment=build(name, data))[1]
            write(kept, as_json(found))
            print(key, found[key], flush=True)
    rows = []
    for name in COMPARED:
        of = {
            w: [x for s in range(subsets) for x in found[f"{name}, {w}, subset {s}, {steps} steps"]] for w in VARIANTS
        }
        difference = np.subtract(of["ours"], of["torchvision"])
        half = stats.t.ppf(0.975, len(difference) - 1) * difference.std(ddof=1) / len(difference) ** 0.5
        rows.append(
            {"policy": name, "steps": steps, "n": len(difference)}
            | {variant: float(np.mean(values)) for variant, values in of.items()}
            | {"difference": float(difference.mean()), "half_interval": float(half)}
        )
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", default=3, type=int)
    parser.add_argument("--accuracy", action="store_true", help="also train students (half an hour on one core)")
    parser.add_argument("--subsets", default=3, type=int)
    parser.add_argument("--steps", default=1000, type=int, help="SGD steps of each student")
    parser.add_argument("--out", default="", help="a folder for augmentations.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    result = {"environment": environment("cpu"), "times": times(load("cifar10"), options.repeat)}
    out = Path(options.out or "/tmp")
    if options.accuracy:
        result["accuracies"] = accuracies(
            load("cifar10", 16), options.subsets, options.steps, out / "augmentations.part.json"
        )
    if options.out:
        write(out / "augmentations.json", as_json(result))


if __name__ == "__main__":
    main()
