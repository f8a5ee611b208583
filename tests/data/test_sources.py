"""Published data sets are looked for in a fixed order, and a file that is missing or damaged is named, never opened."""

import gzip
import pickle

import pytest
from published import make_cifar, make_mnist
from torchvision import datasets

from augdistill_report.data import sources
from augdistill_report.data.datasets import load

pytestmark = pytest.mark.usefixtures("nowhere")


def test_roots_are_looked_into_in_order(tmp_path, monkeypatch):
    first, second, cache = tmp_path / "first", tmp_path / "second", tmp_path / "cache" / "augdistill"
    make_mnist(cache)
    monkeypatch.setenv("AUGDISTILL_DATA", str(second))
    first.mkdir()
    assert load("mnist", 0, str(first)).where == str(cache)
    make_mnist(second)
    assert load("mnist", 0, str(first)).where == str(second)
    make_mnist(first)
    assert load("mnist", 0, str(first)).where == str(first)
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert list(sources.roots().values())[-1] == tmp_path / ".cache" / "augdistill"


def test_a_missing_set_says_where_it_was_looked_for_and_what_helps(tmp_path, monkeypatch):
    monkeypatch.setenv("AUGDISTILL_DATA", str(tmp_path / "mine"))
    (tmp_path / "given").mkdir()
    with pytest.raises(ValueError, match="'cifar100': not found") as error:
        load("cifar100", 0, str(tmp_path / "given"))
    for place in ("given", "mine", "cache/augdistill"):
        assert str(tmp_path / place / "cifar-100-python") in str(error.value)
    assert "augdistill data fetch cifar100" in str(error.value)
    with pytest.raises(ValueError, match=r"data=.*nosuch.*no such folder"):
        load("mnist", 0, str(tmp_path / "nosuch"))


@pytest.mark.parametrize("file", ["train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte"])
@pytest.mark.parametrize("how", ["missing", "empty", "short", "long", "foreign"])
def test_a_damaged_idx_file_is_named(tmp_path, file, how):
    path = make_mnist(tmp_path) / file
    content = path.read_bytes()
    changed = {"empty": b"", "short": content[:-1], "long": content + b"x", "foreign": gzip.compress(content)}
    path.unlink() if how == "missing" else path.write_bytes(changed[how])
    with pytest.raises(ValueError, match=f"{path} is {'missing' if how == 'missing' else 'damaged'}.*data fetch mnist"):
        load("mnist", 0, str(tmp_path))


@pytest.mark.parametrize("file", ["data_batch_3", "test_batch", "batches.meta"])
@pytest.mark.parametrize("how", ["missing", "short", "bit"])
def test_a_damaged_pickle_is_named_and_never_opened(tmp_path, monkeypatch, file, how):
    path = make_cifar(tmp_path, datasets.CIFAR10, monkeypatch) / file
    content = path.read_bytes()
    changed = {"short": content[: len(content) // 2], "bit": content[:20] + bytes((content[20] ^ 1,)) + content[21:]}
    path.unlink() if how == "missing" else path.write_bytes(changed[how])
    monkeypatch.setattr(pickle, "load", lambda *_, **__: pytest.fail("opened"))
    with pytest.raises(ValueError, match=f"{path} is {'missing' if how == 'missing' else 'damaged .md5'}"):
        load("cifar10", 0, str(tmp_path))
