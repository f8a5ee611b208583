"""The bundle for a machine without a network: what it packs is restored to the byte, from pieces in any order."""

import hashlib
import io
import json
import shutil
import struct
import subprocess
import sys
import tarfile
import zipfile

import numpy as np
import pytest

from augdistill_report.places import ROOT
from augdistill_report.work.provenance import archived_commit


@pytest.fixture
def make(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "bundle"))
    import make

    yield make
    for name in ("make", "join"):
        sys.modules.pop(name)


def test_pieces_that_arrive_one_at_a_time_become_the_same_files(make, monkeypatch, tmp_path):
    monkeypatch.setattr(make, "IMAGES", 2000 * 3072)
    images = np.random.default_rng(0).integers(0, 256, make.IMAGES, dtype=np.uint8)
    images[: len(images) // 2] = np.arange(len(images) // 2) // 500 % 256  # smooth, then noise
    batch = b"labels" + b"T" + struct.pack("<I", make.IMAGES) + images.tobytes() + b"names"
    data = tmp_path / "data" / "cifar-10-batches-py"
    data.mkdir(parents=True)
    (data / "data_batch_1").write_bytes(batch)
    (data / "batches.meta").write_bytes(b"airplane")
    monkeypatch.setattr(make, "find", lambda name: tmp_path / "data")
    monkeypatch.setattr(make, "files", lambda name: [path.relative_to(tmp_path / "data") for path in data.iterdir()])
    cifar = make.pack_cifar(tmp_path / "cifar")
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "x.py").write_text("1")
    (tmp_path / "wheels").mkdir()
    with zipfile.ZipFile(tmp_path / "wheels" / "x-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("x/__init__.py", "2")
    with tarfile.open(tmp_path / "bundle.tar", "w") as tar:
        for part in ("code", "wheels", "cifar"):
            tar.add(tmp_path / part, part)
    content, pieces, there = (tmp_path / "bundle.tar").read_bytes(), {}, tmp_path / "there"
    there.mkdir()
    shutil.copy(ROOT / "bundle" / "join.py", there)
    for number, start in enumerate(range(0, len(content), len(content) // 2), 1):
        pieces[f"piece-{number:02}"] = content[start : start + len(content) // 2]
    digests = {name: hashlib.sha256(piece).hexdigest() for name, piece in pieces.items()}
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    manifest = {"python": python, "commit": "c" * 40, "pieces": digests, "cifar": cifar}

    def join(**changes) -> tuple[int, str]:
        (there / "manifest.json").write_text(json.dumps(manifest | changes))
        found = subprocess.run([sys.executable, there / "join.py"], check=False, capture_output=True, text=True)
        assert not found.stderr
        return found.returncode, found.stdout

    last, *others = reversed(pieces)
    for name in others:
        (there / name).write_bytes(pieces[name])
    assert join() == (1, f"{len(others)} of {len(pieces)} pieces are here; {last} is missing\n")
    (there / last).write_bytes(pieces[last] + b"x")
    assert f"{last} is damaged, or not whole yet" in join()[1] and not (there / "code").exists()
    (there / last).write_bytes(pieces[last])
    code, text = join(python="2.7")
    assert code == 2 and "this bundle is for Python 2.7" in text and f"GPU_PYTHON={python} make gpu-bundle" in text
    wrong = cifar | {"data_batch_1": cifar["data_batch_1"] | {"sha256": "0"}}
    assert join(cifar=wrong) == (1, "data_batch_1: was not restored (this Pillow may read WebP differently)\n")
    assert sorted(path.name for path in there.iterdir()) == ["join.py", "manifest.json", *pieces]
    for _ in range(2):
        code, text = join()
        assert code == 0 and "code/benchmarks/gpu.py --minutes 7" in text and "campaign cifar10-gpu" in text
    restored = there / "data" / "cifar-10-batches-py"
    assert (restored / "data_batch_1").read_bytes() == batch and (restored / "batches.meta").read_bytes() == b"airplane"
    assert (there / "code" / "x.py").read_text() == "1" and (there / "site" / "x" / "__init__.py").read_text() == "2"


def test_the_packages_that_travel_are_those_that_torch_does_not_bring(make):
    carried = make.needed(make.IMPORTED) - make.needed(make.THERE)
    assert {"kornia", "kornia-rs", "scipy", "matplotlib", "loky", "cloudpickle", "pyyaml"} <= carried
    assert not carried & {"torch", "numpy", "filelock", "papermill", "jupyterlab", "nbformat", "ipython", "pooch"}


HEAVY = "papermill nbformat nbclient nbconvert jupyter_client IPython ipywidgets traitlets sklearn pooch distributed"


def test_a_campaign_and_the_benchmark_import_no_package_of_the_notebooks():
    code = f"""
import sys
sys.path.insert(0, "benchmarks")
for name in {HEAVY!r}.split():
    sys.modules[name] = None  # an import of it fails
import gpu
from augdistill_report.commands.cli import main
sys.exit(main(["campaign", "nothing"]))
"""
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False, capture_output=True, text=True)
    assert found.returncode == 2 and "campaign 'nothing': must be one of cifar10-gpu" in found.stderr, found.stderr


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs the history")
def test_the_commit_travels_with_the_code(tmp_path):
    def git(*arguments):
        return subprocess.run(["git", "-C", ROOT, *arguments], check=True, capture_output=True).stdout

    with tarfile.open(fileobj=io.BytesIO(git("archive", "HEAD", "augdistill_report/COMMIT"))) as tar:
        found = tar.extractfile("augdistill_report/COMMIT").read()
    assert found == git("rev-parse", "HEAD")
    assert archived_commit() == ""  # here git itself tells
