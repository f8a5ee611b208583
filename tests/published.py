"""Small data sets in the formats of the published ones, which several test files read."""

import hashlib
import pickle
import struct
from pathlib import Path

import numpy as np
import torch


def idx(array) -> bytes:
    """An idx file of bytes (LeCun's format): 0, 0, 8 = uint8, the number of axes, their lengths, the bytes."""
    return bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def mnist_files(seed=0) -> dict[str, bytes]:
    """200 training and 30 test images of 8x8 noise in ten classes."""
    rng, files = np.random.default_rng(seed), {}
    for name, count in (("train", 200), ("t10k", 30)):
        files[f"{name}-images-idx3-ubyte"] = idx(rng.integers(0, 256, (count, 8, 8), dtype=np.uint8))
        files[f"{name}-labels-idx1-ubyte"] = idx(rng.permutation(np.arange(count, dtype=np.uint8) % 10))
    return files


def make_mnist(root: Path, kind="MNIST", seed=0) -> Path:
    folder = root / kind / "raw"
    folder.mkdir(parents=True)
    for name, content in mnist_files(seed).items():
        (folder / name).write_bytes(content)
    return folder


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


def cifar_files(kind, monkeypatch, classes=10) -> dict[str, bytes]:
    """A small set in CIFAR's format by file, with torchvision's md5 sums replaced by those of these files."""
    rng, key = np.random.default_rng(0), kind.meta["key"]
    label = "fine_labels" if key.startswith("fine") else "labels"
    files = {kind.meta["filename"]: pickle.dumps({key: [f"class {c}" for c in range(classes)]})}
    for file, _ in [*kind.train_list, *kind.test_list]:
        data = rng.integers(0, 256, (20 * classes, 3072), dtype=np.uint8)
        files[file] = pickle.dumps({"data": data, label: [i % classes for i in range(20 * classes)]})
    for table in ("train_list", "test_list"):
        monkeypatch.setattr(kind, table, [[file, md5(files[file])] for file, _ in getattr(kind, table)])
    monkeypatch.setattr(kind, "meta", kind.meta | {"md5": md5(files[kind.meta["filename"]])})
    return files


def make_cifar(root: Path, kind, monkeypatch, **options) -> Path:
    folder = root / kind.base_folder
    folder.mkdir(parents=True)
    for name, content in cifar_files(kind, monkeypatch, **options).items():
        (folder / name).write_bytes(content)
    return folder


def rows(split) -> torch.Tensor:
    """A split's labels and bytes `[n, 1 + C H W]`."""
    return torch.cat([split.labels[:, None].byte(), split.raw.flatten(1)], 1)
