"""Distilled sets of others are read without running their code, and are refused by name where they are damaged."""

import json
import os
import pickle
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from augdistill_report.files.distilled_sets import DistilledSet, read_set, write_set


class Harmful:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def images(count=6, kind=torch.float32):
    values = torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return values.to(kind) if kind.is_floating_point else (values * 40 + 128).clamp(0, 255).to(kind)


LABELS = torch.tensor([2, 0, 1, 1, 0, 2])
CARD = {"data": "digits", "classes": list("abc"), "normalisation": {"name": "own"}, "lr": 0.25}
CARD |= {"environment": {"commit": "", "uncommitted": False}}


def pair(folder, x, y):
    folder.mkdir(exist_ok=True)
    torch.save(x, folder / "images_best.pt")
    torch.save(y, folder / "labels_best.pt")
    return folder


@pytest.mark.parametrize("form", ["mtt", "npz", "safetensors"])
@pytest.mark.parametrize("soft", [False, True])
def test_what_is_written_comes_back_with_the_same_bits_and_the_same_file(form, soft, tmp_path):
    labels = torch.rand(6, 3, generator=torch.Generator().manual_seed(1)).softmax(1) if soft else LABELS
    given = DistilledSet(images(), labels, form, 0, lr=0.25, card=CARD)
    written = write_set(given, tmp_path / "one", form)
    found = read_set(written)
    assert torch.equal(found.images, given.images) and torch.equal(found.labels, labels)
    assert (found.lr, found.form, found.bytes) == (0.25, form, 4 * 6 * 64)
    assert found.card == CARD | {"content": given.content}
    again = write_set(found, tmp_path / "two", form)
    for path in sorted(written.iterdir()) if written.is_dir() else [written]:
        assert path.read_bytes() == (again / path.name if again.is_dir() else again).read_bytes()


@pytest.mark.parametrize("form", ["mtt", "npz", "safetensors"])
def test_the_soft_labels_of_a_card_may_be_read_as_classes(form, tmp_path):
    soft = torch.rand(6, 3, generator=torch.Generator().manual_seed(1)).softmax(1)
    written = write_set(DistilledSet(images(), soft, form, 0, card=CARD), tmp_path / "soft", form)
    for kind in ("hard", "experts"):
        found = read_set(written, kind)
        assert torch.equal(found.labels, soft.argmax(1)) and found.card["content"] != found.content
    assert torch.equal(read_set(written, "probabilities").labels, soft)
    if form == "mtt":
        torch.save(soft.flip(0), written / "labels_best.pt")
        for kind in ("", "hard"):
            with pytest.raises(ValueError, match="its card is of other images, labels or step size"):
                read_set(written, kind)


def test_a_folder_comes_back_with_its_bytes_in_order_of_class(tmp_path):
    given = DistilledSet(images(kind=torch.uint8), LABELS, "folder", 0, classes=("b/x", "a", "c"), lr=0.25, card=CARD)
    found = read_set(write_set(given, tmp_path / "set", "folder"))
    assert found.classes == ("a", "b_x", "c") and found.lr == 0.25
    assert found.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert torch.equal(found.images, given.images[[2, 3, 1, 4, 0, 5]])
    assert found.bytes == sum(path.stat().st_size for path in (tmp_path / "set").glob("*/*.png"))
    assert torch.equal(read_set(tmp_path / "set", "hard").labels, found.labels)
    with pytest.raises(
        ValueError, match=r"labels='logits': .* is a folder, whose sub-folders are classes: must be hard"
    ):
        read_set(tmp_path / "set", "logits")
    (tmp_path / "set" / "a" / "9.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"9\.png is not a readable image"):
        read_set(tmp_path / "set")
    Image.new("L", (9, 9)).save(tmp_path / "set" / "a" / "9.png")
    with pytest.raises(ValueError, match="images of 8x8, 9x9 pixels: all must be squares of one size"):
        read_set(tmp_path / "set")
    with pytest.raises(ValueError, match="exists and is not empty"):
        write_set(given, tmp_path / "set", "folder")


def test_code_in_a_file_is_never_run(tmp_path):
    mark = tmp_path / "it ran"
    folder = pair(tmp_path / "pt", images(), LABELS)
    torch.save({"images": Harmful(mark)}, folder / "images_best.pt")
    (tmp_path / "images.pt").write_bytes(pickle.dumps(Harmful(mark)))  # the old format: a bare pickle
    torch.save(LABELS, tmp_path / "labels.pt")
    objects = np.empty(1, dtype=object)
    objects[0] = Harmful(mark)
    np.savez(tmp_path / "set.npz", images=objects, labels=LABELS.numpy())
    np.save(tmp_path / "positions.npy", objects)
    (tmp_path / "set.safetensors").write_bytes(pickle.dumps(Harmful(mark)))
    errors = {
        folder: "may hold code",
        tmp_path / "images.pt": "may hold code",
        tmp_path / "set.npz": "more than arrays",
        tmp_path / "positions.npy": "is no file of positions",
        tmp_path / "set.safetensors": "is damaged",
    }
    for path, error in errors.items():
        with pytest.raises(ValueError, match=error):
            read_set(path)
    assert not mark.exists()
    pickle.loads(pickle.dumps(Harmful(mark)))
    assert mark.exists()  # and it would have run


@pytest.mark.parametrize(
    "x, y, kind, error",
    [
        (images(), LABELS[:5], "", "6 images but 5 labels"),
        (None, LABELS, "", "3 values of the images are not finite"),
        (images()[:, 0], LABELS, "", r"images are \(6, 8, 8\), must be \[n, C, H, W\]"),
        (images().permute(0, 2, 3, 1), LABELS, "", r"must be square: .*channels come second"),
        (images().long(), LABELS, "", "images are torch.int64, must be floats or uint8"),
        ([images()], LABELS, "", "holds a list, must hold one tensor"),
        (images(), LABELS.float(), "", "labels are torch.float32, must be whole numbers"),
        (images(), torch.randn(6, 3), "", "labels are a matrix, but no probabilities: name them"),
        (images(), torch.randn(6, 3), "probabilities", "labels are no probabilities"),
        (images(), LABELS, "logits", r"labels are \(6,\), must be \[n, classes\] for --labels logits"),
        (images(), torch.full((6, 3), torch.inf), "logits", "18 values of the labels are not finite"),
        (images(), LABELS, "soft", "labels='soft': must be one of hard, probabilities, logits, experts"),
    ],
)
def test_a_set_that_cannot_be_right_is_refused_by_name(x, y, kind, error, tmp_path):
    if x is None:
        x = images()
        x[2, 0, 1, :3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    with pytest.raises(ValueError, match=error):
        read_set(pair(tmp_path / "set", x, y), kind)


def test_soft_labels_are_read_as_they_are_named(tmp_path):
    logits = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    path = pair(tmp_path / "set", images(), logits)
    assert torch.equal(read_set(path, "logits").labels, logits.softmax(1))
    assert torch.equal(read_set(path, "hard").labels, logits.argmax(1))
    assert torch.equal(read_set(pair(path, images(), logits.softmax(1))).labels, logits.softmax(1))
    np.savez(tmp_path / "both.npz", images=images().numpy(), labels=LABELS.numpy(), logits=logits.numpy())
    with pytest.raises(ValueError, match=r"both.npz: holds labels and logits; .* \(of several: name --labels\)"):
        read_set(tmp_path / "both.npz")
    assert torch.equal(read_set(tmp_path / "both.npz", "logits").labels, logits.softmax(1))
    save_file({"images": images(), "labels": LABELS}, tmp_path / "of another code.safetensors")
    assert torch.equal(read_set(tmp_path / "of another code.safetensors").labels, LABELS)
    save_file({"pictures": images()}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="holds pictures; must hold images"):
        read_set(tmp_path / "other.safetensors")


@pytest.mark.parametrize("form", ["mtt", "npz", "safetensors"])
def test_a_truncated_or_changed_file_is_refused_by_name(form, tmp_path):
    written = write_set(DistilledSet(images(), LABELS, form, 0, card=CARD), tmp_path / "set", form)
    path = written / "images_best.pt" if form == "mtt" else written
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], whole[:40], b""):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=path.name):
            read_set(written)
    at = whole.index(images().numpy().tobytes()[:64])  # a changed value
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    with pytest.raises(ValueError, match=f"{path.name}.*(damaged|its card is of other images)"):
        read_set(written)
    (tmp_path / "set.json").write_text(json.dumps({}))
    with pytest.raises(ValueError, match=r"must be \.npz, \.safetensors"):
        read_set(tmp_path / "set.json")
    with pytest.raises(ValueError, match="no such file or folder"):
        read_set(tmp_path / "nowhere")


def test_an_archive_that_claims_too_much_is_not_unpacked(tmp_path, monkeypatch):
    np.savez_compressed(tmp_path / "bomb.npz", images=np.zeros((10, 1, 64, 64), np.float32), labels=np.arange(10))
    monkeypatch.setattr("augdistill_report.files.distilled_sets.MOST_BYTES", 1000)
    monkeypatch.setattr(zipfile.ZipFile, "read", lambda *_: pytest.fail("it was unpacked"))
    with pytest.raises(ValueError, match="claims to hold more than 1,000 bytes"):
        read_set(tmp_path / "bomb.npz")


def test_positions_are_whole_numbers_in_any_form(tmp_path):
    np.save(tmp_path / "a.npy", np.array([5, 3, 9], dtype=np.int32))
    (tmp_path / "b.txt").write_text("5\n3\n9\n")
    torch.save(torch.tensor([5, 3, 9]), tmp_path / "c.pt")
    for name in ("a.npy", "b.txt", "c.pt"):
        assert read_set(tmp_path / name).positions.tolist() == [5, 3, 9]
    torch.save({"images": images(), "labels": LABELS}, tmp_path / "d.pt")
    torch.save(images(), tmp_path / "e.pt")
    for name in ("d.pt", "e.pt"):
        with pytest.raises(
            ValueError, match=r"images themselves: images_best.pt, with labels_best.pt beside it, or .npz"
        ):
            read_set(tmp_path / name)
    (tmp_path / "b.txt").write_text("5\n3.5\n")
    np.save(tmp_path / "a.npy", np.array([[5, 3]]))
    for name, error in (("b.txt", "is no file of positions"), ("a.npy", r"must be whole numbers \[n\]")):
        with pytest.raises(ValueError, match=error):
            read_set(tmp_path / name)
