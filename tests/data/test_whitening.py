"""ZCA whitening: kornia's numbers, fitted once, the same for subsets, batches and phis, and undone for pictures.

The reference is the formula that kornia documents, by numpy in float64: U diag(1 / sqrt(S + eps)) U^T, from the
singular value decomposition of the unbiased covariance. benchmarks/zca.py compares with kornia itself, on CIFAR-10.
"""

import dataclasses

import numpy as np
import pytest
import torch

from augdistill_core import DistillConfig, seeded
from augdistill_report.data import whitening
from augdistill_report.data.datasets import load, load_data, standardised, whitened
from augdistill_report.files.phi_files import load_phi, save_phi
from augdistill_report.files.store import SealedFile
from augdistill_report.run import Run, configuration
from augdistill_report.settings import resolve
from augdistill_report.work.distillation import Distillation
from augdistill_report.work.experts import Expert
from augdistill_report.work.jobs import Subset
from augdistill_report.work.scoring import EvalConfig, Evaluation
from augdistill_report.work.setup import Setup


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache folder of each test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    load_data.cache_clear()
    yield tmp_path / "cache" / "augdistill" / "zca"
    load_data.cache_clear()


def some_bytes(count=300, shape=(3, 4, 4)) -> torch.Tensor:
    """Images whose pixels hang together, as those of photographs do; some of them at 0 and at 255."""
    noise = torch.randn(count, *shape, generator=seeded(0)).cumsum(-1).cumsum(-2)
    return (128 + 25 * noise).clamp(0, 255).byte()


def reference(raw: torch.Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean `[d]`, W and its inverse `[d, d]`."""
    x = raw.flatten(1).double().numpy() / (255 if raw.dtype == torch.uint8 else 1)
    mean = x.sum(0) / len(x)
    u, s, _ = np.linalg.svd((x - mean).T @ (x - mean) / (len(x) - 1))
    return mean, u @ np.diag((s + 0.1) ** -0.5) @ u.T, u @ np.diag((s + 0.1) ** 0.5) @ u.T


def a_set(raw=None):
    raw = some_bytes() if raw is None else raw
    labels = torch.arange(len(raw)) % 3
    index = torch.arange(len(raw))
    return standardised("some", "abc", raw, labels, (index[:200], index[200:250], index[250:]))


@pytest.mark.parametrize("kind", ["bytes", "floats"])
@pytest.mark.parametrize("piece", [7, 1024])
def test_the_numbers_are_those_of_the_formula(kind, piece, monkeypatch, rng_untouched):
    monkeypatch.setattr(whitening, "PIECE", piece)
    raw = some_bytes() if kind == "bytes" else some_bytes().double().div(255).float()
    with rng_untouched():
        found = whitening.fit(raw)
    mean, matrix, inverse = reference(raw)
    assert {k: t.dtype for k, t in found.items()} == dict.fromkeys(("mean", "matrix", "inverse"), torch.float32)
    assert found["mean"].shape == (3, 4, 4)
    np.testing.assert_allclose(found["mean"].flatten(), mean, rtol=1e-6)
    np.testing.assert_allclose(found["matrix"], matrix, atol=1e-6)
    np.testing.assert_allclose(found["inverse"], inverse, atol=1e-6)


def test_the_covariance_of_bytes_is_exact_in_whatever_pieces(monkeypatch):
    """The largest sums that a piece can have: all bytes at 0, which is 128 from the middle."""
    raw = torch.zeros(3000, 1, 2, 2, dtype=torch.uint8)
    raw[:1500, :, 0] = 255
    mean, products = whitening.covariance(raw)
    n = 3000
    variance = 0.25 * n / (n - 1)
    expected = torch.tensor([[variance, variance, 0, 0]] * 2 + [[0.0] * 4] * 2, dtype=torch.float64)
    torch.testing.assert_close(products, expected, rtol=1e-14, atol=1e-16)
    assert mean.tolist() == [0.5, 0.5, 0, 0]
    raw = some_bytes(2100)
    one = whitening.covariance(raw)
    monkeypatch.setattr(whitening, "PIECE", 11)
    other = whitening.covariance(raw)
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert all(
        torch.equal(a, b)
        for a, b in zip(one, whitening.covariance(raw[torch.randperm(2100, generator=seeded(1))]), strict=True)
    )


def test_whitened_images_are_made_of_the_training_split_alone():
    data = a_set()
    white = whitened(data)
    mean, matrix, _ = reference(data.train.raw)
    for name in ("train", "validation", "test"):
        split = getattr(white, name).opened()
        x = split.raw.flatten(1).double().numpy() / 255
        expected = ((x - mean) @ matrix).reshape(-1, 3, 4, 4)
        np.testing.assert_allclose(split.images, expected, atol=2e-6)
        assert split.raw.dtype == torch.uint8 and split.images.dtype == torch.float32
    # what eps leaves of the covariance: S / (S + eps), so close to 1 where S is large
    z = white.train.images.flatten(1).double()
    kept, was = (torch.linalg.eigvalsh(torch.cov(t.T)) for t in (z, data.train.raw.flatten(1).double() / 255))
    torch.testing.assert_close(kept, was / (was + 0.1), rtol=1e-4, atol=1e-6)


def test_subsets_and_batches_are_the_same_images():
    white = whitened(a_set())
    whole = white.train.images
    index = torch.tensor([3, 190, 3, 7])
    torch.testing.assert_close(white.train.take(index).images, whole[index], rtol=1e-5, atol=1e-6)
    parts = torch.cat([part.images for part in white.train.batches(33)])
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-6)
    made = white.train.made()
    assert torch.equal(made.images, whole) and torch.equal(made.take(index).images, whole[index])
    assert torch.equal(made.labels, white.train.labels)
    plain = a_set().train
    assert torch.equal(plain.made().images, plain.images)


def test_pixels_are_the_inverse():
    data, white = a_set(), whitened(a_set())
    pixels = white.pixels(white.test.opened().images)
    torch.testing.assert_close(pixels, data.test.raw / 255, rtol=0, atol=5e-6)
    torch.testing.assert_close(pixels, data.pixels(data.test.opened().images), rtol=0, atol=5e-6)
    assert white.pixels(100 * white.test.opened().images).aminmax() == (0, 1)  # clamped


def test_to_moves_everything():
    white = whitened(a_set()).to("meta")
    held = [white.mean, white.std, white.colour]
    held += [getattr(white.train, f.name) for f in dataclasses.fields(white.train)]
    assert len(held) == 8 and {t.device.type for t in held} == {"meta"}
    assert white.train.images.device.type == "meta"


def test_it_is_fitted_once_and_kept(cache, monkeypatch):
    white = whitened(a_set())
    (file,) = cache.glob("zca-*.safetensors")
    assert SealedFile(file, "zca")["matrix"].shape == (48, 48)
    with monkeypatch.context() as changed:
        changed.setattr(whitening, "fit", lambda raw: pytest.fail("fitted again"))
        again = whitened(a_set())
    assert torch.equal(again.train.images, white.train.images) and torch.equal(again.colour, white.colour)
    other = whitened(a_set(some_bytes().flip(0)))  # another set has a file of its own
    assert len(list(cache.glob("zca-*.safetensors"))) == 2 and not torch.equal(other.colour, white.colour)


def test_a_damaged_file_and_a_place_that_cannot_be_written_are_named(cache, monkeypatch, tmp_path):
    whitened(a_set())
    (file,) = cache.glob("zca-*.safetensors")
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=rf"{file.name} is damaged .*delete it, and run again"):
        whitened(a_set())
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(ValueError, match=r"zca=True: .*file.augdistill.zca cannot be written .*XDG_CACHE_HOME"):
        whitened(a_set())


def test_results_of_whitened_images_are_results_of_their_own():
    plain, white = (Setup(size=8, width=4, zca=zca) for zca in (False, True))
    assert plain.load().fingerprint == white.load().fingerprint  # of what the set holds
    subset, config = Subset(0, per_class=1), DistillConfig()
    for job in (
        lambda setup: Expert(setup, 0),
        lambda setup: Distillation(setup, "identity", subset, config),
        lambda setup: Evaluation(setup, subset, EvalConfig()),
    ):
        assert job(plain).spec() != job(white).spec()
    assert configuration(resolve("smoke")) != configuration(resolve("smoke", {"zca": "true"}))


@pytest.mark.parametrize("text, value", [("true", True), ("False", False), (True, True)])
def test_it_is_a_setting(text, value):
    assert resolve("smoke", {"zca": text}).zca is value


def test_other_words_are_refused():
    for wrong in ("yes", "1", 1):
        with pytest.raises(ValueError, match=r"zca=.*must be a bool"):
            resolve("smoke", {"zca": wrong})


def test_experts_pixels_and_students_see_whitened_images(tmp_path):
    """The pixels start at the whitened base images, and a picture shows them as they were."""
    run = Run("zca", resolve("smoke", {"zca": True, "iterations": 1, "pixel_lr": 0.0}), tmp_path)
    job = run.distillation("pixels", run.base, run.settings.pixel_config)
    (result,) = run.distill({"pixels": job}).values()
    base = run.train(run.base)
    torch.testing.assert_close(result.phi.pixels.detach(), base.images, rtol=0, atol=0)
    torch.testing.assert_close(run.data.pixels(base.images), base.raw, rtol=0, atol=1e-5)
    (score,) = run.evaluate({"pixels": run.evaluation(run.base, job)}).values()
    assert len(score.test) == 2


@pytest.mark.parametrize("name", ["unet_noise", "identity"])
def test_a_saved_phi_brings_its_whitening_along(name, tmp_path):
    """It gives on pixels what phi gives on whitened images; another process, without the cache, needs nothing else."""
    run = Run("zca", resolve("smoke", {"zca": True, "iterations": 2, "phi_lr": 0.03}), tmp_path / "run")
    job = run.distillation(name, run.base)
    path = save_phi(tmp_path / "phi.safetensors", job, run.store)
    white, pixels = run.data.train.take(slice(12)), run.data.train.raw[:12]
    phi = job.stored_phi(run.store).phi
    given = dict(labels=white.labels, index=torch.arange(12))
    expected = run.data.pixels(phi(white.images, **given, generator=seeded(3)).detach())
    found = load_phi(path)(pixels, labels=white.labels, generator=seeded(3))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert (found - pixels).abs().max() < 1e-5 if name == "identity" else (found - pixels).abs().max() > 1e-3
    assert load_phi(path).about["setup"]["zca"] is True


def test_digits_by_their_own_loader():
    data = load("digits", 8)
    mean, matrix, _ = reference(data.train.raw)
    expected = (data.train.raw.flatten(1).double().numpy() - mean) @ matrix
    np.testing.assert_allclose(whitened(data).train.images.flatten(1), expected, atol=2e-6)
