"""Experts per minute on one thread, at the sizes of digits and CIFAR-10: `train_expert` and an ordinary training loop.

    python benchmarks/experts.py [--out figures/benchmarks]

The ordinary loop uses a DataLoader over a TensorDataset, torch's own layers and SGD, and augments each sample. Ours
keeps the data set as one tensor, and augments each batch. Student, batch size and augmentation (DSA) are the same.
Images are random, since their content does not change the time. An expert is 15 epochs of 1,437 images for digits, and
1 epoch of 50,000 for CIFAR-10 (extrapolated from 1,280).
"""

import argparse
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset
from unroll import Layers

from augdistill_core import ConvNet, ExpertConfig, seeded, train_expert
from augdistill_report.data.augmentations import DSA
from augdistill_report.files.store import as_json, write
from augdistill_report.work.provenance import environment

SHAPES = {  # ConvNet's arguments; images and epochs measured; batch size; images times epochs of a whole expert
    "digits": ((1, 10, 16, 32, 2), 1437, 2, 64, 1437 * 15),
    "CIFAR-10": ((3, 10, 32, 128, 3), 1280, 1, 256, 50_000),
}


class Augmented(TensorDataset):
    """A data set that augments each sample when it is read."""

    def __init__(self, images, labels, augment):
        super().__init__(images, labels)
        self.augment, self.generator = augment, seeded(0)

    def __getitem__(self, index):
        image, label = super().__getitem__(index)
        if self.augment is not None:
            image = self.augment(image[None], generator=self.generator)[0]
        return image, label


def ordinary(shape, images, labels, config, augment):
    model = Layers(*shape)
    optimizer = torch.optim.SGD(model.parameters(), lr=config.expert_lr)
    loader = DataLoader(Augmented(images, labels, augment), batch_size=config.expert_batch, shuffle=True)
    for _ in range(config.epochs):
        for x, y in loader:
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def ours(shape, images, labels, config, augment):
    train_expert(ConvNet(*shape), images, labels, config, 0, 0, augment=augment)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", default=2, type=int)
    parser.add_argument("--out", default="", help="a folder for experts.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    print(f"{'size':10}{'augmentation':14}{'ordinary':>10}{'ours':>8}{'ratio':>7}   experts a minute")
    for name, (shape, count, epochs, batch, whole) in SHAPES.items():
        images = torch.randn(count, shape[0], shape[2], shape[2], generator=seeded(0))
        labels, config = torch.arange(count) % 10, ExpertConfig(epochs=epochs, expert_batch=batch)
        for augment in (None, DSA()):
            rate = {}
            for variant in (ordinary, ours):
                seconds = []
                for _ in range(options.repeat):
                    begin = time.process_time()
                    variant(shape, images, labels, config, augment)
                    seconds.append(time.process_time() - begin)
                rate[variant.__name__] = 60 * count * epochs / whole / min(seconds)
            row = dict(size=name, augmentation="DSA" if augment else "none") | rate
            rows.append(row | {"ratio": rate["ours"] / rate["ordinary"]})
            print(
                f"{name:10}{row['augmentation']:14}{rate['ordinary']:10.2f}{rate['ours']:8.2f}{rows[-1]['ratio']:7.2f}",
                flush=True,
            )
    if options.out:
        write(Path(options.out) / "experts.json", as_json({"environment": environment("cpu"), "rows": rows}))


if __name__ == "__main__":
    main()
