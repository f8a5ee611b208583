"""A folder of images: its two layouts, what is skipped, and every kind of image file, right or refused by name."""

import io
import os
import re
import struct
import subprocess
import sys
import tempfile
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import make_folder
from PIL import Image
from published import rows

from augdistill_report.commands.cli import main
from augdistill_report.data.datasets import SPLITS, load
from augdistill_report.data.folders import APPLY_PICTURE, SPLIT_OF, read_image, read_images, resized, scan_folder

pytestmark = pytest.mark.usefixtures("nowhere")


def test_a_folder_is_a_data_set(tmp_path):
    root = make_folder(tmp_path / "pets", count=20)
    (root / ".hidden").mkdir()
    (root / "cat" / ".ipynb_checkpoints").mkdir()
    (root / "cat" / ".ipynb_checkpoints" / "00-checkpoint.png").write_bytes((root / "cat" / "00.png").read_bytes())
    (root / "cat" / "._00.png").write_bytes(b"what macOS leaves")
    (root / "README.txt").write_text("not a class")
    (root / "cat" / "notes.txt").write_text("not an image")
    data = load(f"folder:{root}", 12)
    assert data.classes == ("cat", "dog") and data.shape == (3, 12, 12) and data.name == f"folder:{root}"
    assert [torch.bincount(getattr(data, k).labels).tolist() for k in SPLITS] == [[14, 14], [2, 2], [4, 4]]
    ours = {bytes(row) for k in SPLITS for row in rows(getattr(data, k)).numpy()}
    theirs = {
        bytes([label]) + np.asarray(Image.open(path)).transpose(2, 0, 1).tobytes()
        for label, c in enumerate(("cat", "dog"))
        for path in (root / c).glob("[!.]*.png")
    }
    assert ours == theirs and len(ours) == 40
    assert load(f"folder:{root}", 12).fingerprint == data.fingerprint
    moved = root.rename(tmp_path / "elsewhere")
    assert load(f"folder:{moved}", 12).fingerprint == data.fingerprint


def test_images_of_many_sizes_and_modes_become_one_tensor(tmp_path):
    root = make_folder(tmp_path, size=(9, 17))
    for i, mode in enumerate(["L", "1", "P", "RGBA", "LA", "CMYK"]):
        image = Image.new("RGB", (20 + i, 30), (200, 10 * i, 5)).convert(mode)
        image.save(tmp_path / "cat" / f"x{mode}.{'tif' if mode == 'CMYK' else 'png'}")
    Image.new("P", (5, 5)).save(tmp_path / "cat" / "transparent.png", transparency=bytes([0, 128, 255]))
    data = load(f"folder:{root}", 16)
    assert data.shape == (3, 16, 16) and sum(len(getattr(data, k)) for k in SPLITS) == 27


def test_grey_images_have_one_channel(tmp_path):
    assert load(f"folder:{make_folder(tmp_path, mode='L')}", 8).shape == (1, 8, 8)


def test_a_camera_s_orientation_is_followed(tmp_path):
    root = make_folder(tmp_path, count=6)
    upright = np.zeros((12, 12, 3), np.uint8)
    upright[:6] = 255
    exif = Image.Exif()
    exif[0x0112] = 3  # held upside down
    for c in ("cat", "dog"):
        for path in (root / c).iterdir():
            Image.fromarray(upright[::-1].copy()).save(path, exif=exif)
    data = load(f"folder:{root}", 12)
    assert (data.train.raw[:, 0, :6] == 255).all() and (data.train.raw[:, 0, 6:] == 0).all()


def test_folders_that_are_no_data_set(tmp_path):
    def refused(match):
        with pytest.raises(ValueError, match=match):
            load(f"folder:{tmp_path}", 8)

    with pytest.raises(ValueError, match=r"dataset='folder:/nowhere.*no such folder"):
        load("folder:/nowhere/at/all", 8)
    refused("at least two; has \\[\\]")
    make_folder(tmp_path, ["cat"])
    refused("at least two; has \\['cat'\\]")
    (tmp_path / "dog").mkdir()
    refused("class dog has 0 images")
    (tmp_path / "dog").rmdir()
    make_folder(tmp_path, ["dog"], count=5)
    refused("class dog has 5 images.*at least 6")


@pytest.mark.parametrize("how", ["cut", "text", "empty", "deep"])
def test_a_broken_image_is_named(tmp_path, how):
    root = make_folder(tmp_path, size=(64, 64))
    path = root / "dog" / "03.png"
    if how == "deep":
        Image.fromarray(np.full((8, 8), 40000, np.uint16)).save(path)
    else:
        path.write_bytes({"cut": path.read_bytes()[:900], "text": b"hello", "empty": b""}[how])
    with pytest.raises(ValueError, match=f"{path} is not a readable image"):
        load(f"folder:{root}", 8)


@pytest.mark.parametrize("size, to", [(8, 3), (9, 4), (28, 16), (4, 10)])
def test_bytes_are_resized_with_a_triangle_as_wide_as_the_step(size, to):
    raw = torch.randint(256, (2, 3, size, size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    scale = size / to
    centres = (torch.arange(to, dtype=torch.float64) + 0.5) * scale - 0.5
    distance = (centres[:, None] - torch.arange(size)) / max(scale, 1)
    weights = (1 - distance.abs()).clamp(min=0)
    weights /= weights.sum(1, keepdim=True)
    expected = weights @ raw.double() @ weights.T
    assert (resized(raw, to).double() - expected).abs().max() <= 0.5 + 1e-4


# --- split folders ----------------------------------------------------------------------------------------------------


def images_of(split) -> set[bytes]:
    return set(map(bytes, rows(split.opened()).numpy()))


def files_of(*folders) -> set[bytes]:
    """What `rows` gives of the images in class folders, the classes in order of their names, as PIL reads them."""
    return {
        bytes([label]) + np.asarray(Image.open(path)).transpose(2, 0, 1).tobytes()
        for folder in folders
        for label, inner in enumerate(sorted(folder.iterdir()))
        for path in inner.iterdir()
    }


def make_splits(root, **counts):
    """Split folders of two classes; every image is another."""
    for i, (split, count) in enumerate(counts.items()):
        make_folder(root / split, count=count, seed=i)
    return root


@pytest.mark.parametrize(
    "counts, sizes, says",
    [
        (
            dict(train=20, test=5),
            (36, 4, 10),
            "train from train/, test from test/, validation from 10 % of every class",
        ),
        (dict(Training=20, Testing=5), (36, 4, 10), "train from Training/, test from Testing/, validation from 10 %"),
        (dict(train=20, val=5), (32, 10, 8), "train from train/, validation from val/, test from 20 % of every class"),
        (dict(TRAIN=9, valid=2, test=1), (18, 4, 2), "train from TRAIN/, validation from valid/, test from test/"),
        (dict(train=1, validation=1, testing=1), (2, 2, 2), "validation from validation/, test from testing/"),
        (
            dict(train=20),
            (28, 4, 8),
            "train from train/, validation from 10 % of every class of train/, test",
        ),
    ],
)
def test_split_folders_are_the_split_that_they_are(tmp_path, capsys, counts, sizes, says):
    root = make_splits(tmp_path / "pets", **counts)
    data = load(f"folder:{root}", 12)
    assert data.classes == ("cat", "dog") and says in data.where
    assert tuple(len(getattr(data, split)) for split in SPLITS) == sizes
    found = {split: images_of(getattr(data, split)) for split in SPLITS}
    given = {SPLIT_OF[name.lower()]: files_of(root / name) for name in counts}
    for split in given.keys() - {"train"}:
        assert found[split] == given[split]
    cut = set().union(*(found[split] for split in SPLITS if split == "train" or split not in given))
    assert cut == given["train"] and sum(map(len, found.values())) == sum(sizes)  # none lost, and none in two splits
    for split in SPLITS:
        assert len(set(torch.bincount(getattr(data, split).labels).tolist())) == 1  # as many of each class
    assert main(["data", "check", f"folder:{root}", "--size", "12"]) == 0
    said = capsys.readouterr().out
    assert says in said and "x 12 x 12 (C, H, W)" in said and "Images of another size are resized to this one" in said


def test_a_class_may_have_a_split_s_name_among_others(tmp_path):
    make_folder(tmp_path, ["bus", "car", "train"])
    assert load(f"folder:{tmp_path}", 12).classes == ("bus", "car", "train")


def other_layouts(root):
    """How a folder is neither layout: (what is made of it, what the refusal says)."""
    return {
        "images": (lambda: make_folder(root, [""]), r"holds 00.png, .*: every image must be in the sub-folder of its"),
        "mixed": (lambda: make_folder(root, ["cat", "dog", ""]), r"00.png.* beside cat/, dog/: every image must be in"),
        "under train": (lambda: make_folder(root / "train", ["cat", ""]), r"train holds 00.png, .*of a split must be"),
        "no classes": (lambda: make_folder(root, ["train", "test"]), r"train holds 00.png, .*of a split must be in"),
        "one too many": (
            lambda: (make_splits(root, train=9, test=9), make_folder(root / "test", ["emu"])),
            r"must hold the same classes; only test has emu",
        ),
        "other classes": (
            lambda: (make_folder(root / "train", ["a", "b"]), make_folder(root / "val", ["a", "c"])),
            r"only train has b; only val has c",
        ),
        "more folders": (
            lambda: (make_splits(root, train=9, test=9), make_folder(root, ["dogs"])),
            r"holds test/, train/ beside dogs/: must hold split folders \(train, .*\) or class folders, not both",
        ),
        "unlabelled": (lambda: make_folder(root, ["train", "test", "cat"]), r"holds test/, train/ beside cat/"),
        "train and one more": (
            lambda: (make_splits(root, train=9), make_folder(root / "dev")),
            r"holds train/ beside dev/",
        ),
        "twice": (lambda: make_splits(root, train=9, val=9, validation=9), r"one folder for the validation split"),
        "no train": (lambda: make_splits(root, val=9, test=9), r"holds test/, val/: must hold train/ as well"),
        "splits in classes": (
            lambda: [make_folder(root / c, ["train", "test"]) for c in ("cat", "dog")],
            r"cat holds test/, train/: split folders must contain the class folders",
        ),
        "one class": (lambda: make_folder(root / "train", ["cat"]), r"at least two; has \['cat'\]"),
        "empty class": (
            lambda: (make_splits(root, train=9, test=9), [path.unlink() for path in (root / "test/dog").iterdir()]),
            r"test/dog has 0 images .*must have at least 1",
        ),
        "few": (lambda: make_splits(root, train=5, test=9), r"train/cat has 5 images .*at least 6"),
    }


@pytest.mark.parametrize("how", other_layouts(Path()))
def test_a_folder_of_neither_layout_is_refused(tmp_path, capsys, how):
    root = tmp_path / "pets"
    make, says = other_layouts(root)[how]
    make()
    assert main(["data", "check", f"folder:{root}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"augdistill: dataset='folder:{root}': ") and error.count("\n") == 1
    assert re.search(says, error), error


# --- what is skipped --------------------------------------------------------------------------------------------------


def test_what_is_skipped_is_counted(tmp_path, capsys):
    root, out = make_folder(tmp_path / "pets"), make_folder(tmp_path / "out", ["emu"])
    before = load(f"folder:{root}", 12)
    assert before.where.endswith("skipped: nothing")
    for i in range(2):
        (root / "cat" / f"{i}.gif").write_bytes(b"GIF89a")
    (root / "dog" / "link.png").symlink_to(out / "emu" / "00.png")
    (root / "dog" / "twin.png").symlink_to(root / "dog" / "00.png")
    (root / "dog" / "nowhere.png").symlink_to(root / "nowhere.png")
    (root / "dog" / "self").symlink_to(root)  # a circle
    (root / "emu").symlink_to(out / "emu")
    (root / "dog" / ".hidden.png").write_bytes(b"")
    (root / ".git").mkdir()
    (root / "README.TXT").write_text("")
    (root / "cat" / "LICENSE").write_text("")
    os.mkfifo(root / "cat" / "fifo.png")
    data = load(f"folder:{root}", 12)
    assert data.fingerprint == before.fingerprint and data.classes == ("cat", "dog")
    says = "skipped: 2 .gif, 1 .txt, 2 hidden, 5 links, 1 special, 1 without a suffix"
    assert data.where.endswith(says)
    assert main(["data", "check", f"folder:{root}", "--size", "12"]) == 0 and says in capsys.readouterr().out


def test_a_class_of_links_alone_is_refused_and_says_why(tmp_path):
    root = make_folder(tmp_path / "pets", ["cat", "dog"])
    (root / "emu").mkdir()
    for path in (root / "cat").iterdir():
        (root / "emu" / path.name).symlink_to(path)
    with pytest.raises(ValueError, match=r"class emu has 0 images .*skipped: 10 links"):
        load(f"folder:{root}", 8)


def test_a_folder_may_be_named_by_a_link(tmp_path):
    root = make_folder(tmp_path / "pets")
    (tmp_path / "link").symlink_to(root)
    assert load(f"folder:{tmp_path / 'link'}", 8).fingerprint == load(f"folder:{root}", 8).fingerprint


# --- image files ------------------------------------------------------------------------------------------------------


def test_all_bad_files_are_reported_at_once(tmp_path, capsys):
    root = make_splits(tmp_path / "pets", train=12, test=3)
    bad = sorted(path for c in ("cat", "dog") for path in (root / "train" / c).glob("0[0-5]*"))
    for path in bad:
        path.write_bytes(b"")
    assert main(["data", "check", f"folder:{root}"]) == 2
    error = capsys.readouterr().err
    assert "12 of 30 images cannot be read: " in error and "; and 2 more" in error and error.count("\n") == 1
    assert all(f"{path} is not a readable image" in error for path in bad[:10]) and str(bad[10]) not in error


def png(width, height) -> bytes:
    """A black PNG of one bit a pixel, written row by row: a few kB for any size."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    packer, row = zlib.compressobj(9), bytes(1 + (width + 7) // 8)
    pixels = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


PEAK = """
import resource, sys
from augdistill_report.data.folders import read_image
from pathlib import Path
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
read_image(Path(sys.argv[1]), 32)
before = peak()
try:
    read_image(Path(sys.argv[2]), 32)
except ValueError as error:
    print(error, file=sys.stderr)
print(peak() - before)
"""


@pytest.mark.parametrize("side, most", [(13_000, 50), (9_000, 1_200)])
def test_memory_of_an_image_is_bounded(tmp_path, side, most):
    Image.new("RGB", (40, 40), "red").save(tmp_path / "small.png")
    large = tmp_path / "large.png"
    large.write_bytes(png(side, side))
    assert large.stat().st_size < 25_000
    command = [sys.executable, "-c", PEAK, tmp_path / "small.png", large]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) < most  # MB
    assert ("large.png is not a readable image (Image size (169000000 pixels)" in done.stderr) == (side > 9_459)


def test_memory_of_a_folder_is_that_of_its_small_images(tmp_path):
    root = make_folder(tmp_path / "pets", count=6)
    for i, path in enumerate(path for c in ("cat", "dog") for path in (root / c).iterdir()):
        Image.fromarray(np.tile(np.arange(2000, dtype=np.uint8) + i, (2000, 1))).save(path)
    tracemalloc.start()
    try:
        assert len(load(f"folder:{root}", 32).train) == 8
        assert tracemalloc.get_traced_memory()[1] < 2 * 3 * 2000 * 2000 + 5_000_000  # numpy's; not all twelve of them
    finally:
        tracemalloc.stop()


def test_large_images_are_resized_as_small_ones_are(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (2400, 2400, 3), dtype=np.uint8)  # over 2^24 values
    Image.fromarray(pixels).save(tmp_path / "x.png", compress_level=0)
    expected = resized(torch.from_numpy(pixels).permute(2, 0, 1)[None], 50)[0]
    assert torch.equal(read_image(tmp_path / "x.png", 50), expected)


def save_several(path, kind):
    Image.new("RGB", (9, 9), "red").save(path, kind, save_all=True, append_images=[Image.new("RGB", (9, 9), "blue")])


def test_several_frames_are_refused_but_a_photograph_with_its_preview_is_not(tmp_path):
    for kind, suffix in (("png", "png"), ("tiff", "tif"), ("webp", "webp"), ("gif", "png")):
        path = tmp_path / f"{kind}.{suffix}"
        save_several(path, kind)
        with pytest.raises(ValueError, match=rf"{path} is not a readable image \(it has 2 frames; must be one"):
            read_image(path, 8)
    save_several(tmp_path / "photo.jpg", "mpo")
    assert read_image(tmp_path / "photo.jpg", 9)[:, 4, 4].tolist() == [254, 0, 0]


def test_sixteen_bits_a_channel_in_colour_are_read_as_their_upper_eight(tmp_path):
    values = np.arange(12, dtype=np.uint16).reshape(2, 2, 3) * 5000
    rows_of = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 2, 2, 16, 2, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows_of)) + chunk(b"IEND", b"")
    (tmp_path / "deep.png").write_bytes(b"\x89PNG\r\n\x1a\n" + parts)
    assert read_image(tmp_path / "deep.png", 2).permute(1, 2, 0).tolist() == (values >> 8).tolist()


def test_formats_for_which_pillow_runs_programs_are_not_opened(tmp_path):
    (tmp_path / "x.png").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"
    )
    with pytest.raises(ValueError, match=r"x\.png is not a readable image \(cannot identify image file"):
        read_image(tmp_path / "x.png", 8)


@pytest.mark.filterwarnings("ignore")  # Pillow's, of damage that it can live with
@pytest.mark.parametrize("kind", ["png", "jpeg", "tiff", "webp", "bmp", "ppm", "gif", "mpo"])
def test_damaged_files_are_read_or_refused_by_name(tmp_path, kind):
    rng, good = np.random.default_rng(0), io.BytesIO()
    pixels = rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    options = {"exif": exif} if kind in ("png", "jpeg", "webp", "tiff") else {}
    Image.fromarray(pixels).save(good, kind, **options)
    path, refused = tmp_path / "x.png", 0
    for i in range(150):
        content = bytearray(good.getvalue())
        for at in rng.integers(0, min(len(content), 200 if i % 2 else 10**6), 1 + i % 4):
            content[at] = rng.integers(256)
        path.write_bytes(content[: rng.integers(len(content))] if i % 5 == 0 else content)
        try:
            image = read_image(path, 8)
            assert image.shape == (3, 8, 8) and image.dtype == torch.uint8
        except ValueError as error:
            refused += 1
            assert str(error).startswith(f"{path} is not a readable image (") and "\n" not in str(error)
    assert refused > 20


# --- what the system refuses ------------------------------------------------------------------------------------------


@pytest.fixture
def somebody():
    """A folder of a user who may not read everything, which root may."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        root = Path(folder)
        make_folder(root / "pets")
        root.chmod(0o755)
        is_root = os.geteuid() == 0
        if is_root:
            os.seteuid(65534)
        try:
            yield root / "pets", lambda path: (is_root and os.seteuid(0), path.chmod(0), is_root and os.seteuid(65534))
        finally:
            if is_root:
                os.seteuid(0)
            for path in [root / "pets", *(root / "pets").iterdir()]:
                path.chmod(0o755)


@pytest.mark.parametrize("what", ["pets", "pets/dog", "pets/dog/03.png"])
def test_what_may_not_be_read_is_named(somebody, what):
    root, lock = somebody
    load(f"folder:{root}", 8)
    path = root.parent / what
    lock(path)
    with pytest.raises(ValueError, match=rf"dataset='folder:{root}': .*{path}.*\(Permission denied\)"):
        load(f"folder:{root}", 8)


def test_a_file_that_vanishes_while_they_are_read_is_named(tmp_path):
    root = make_folder(tmp_path)
    found = scan_folder(root)
    (root / "dog" / "03.png").unlink()
    with pytest.raises(ValueError, match=r"1 of 20 images cannot be read: .*dog/03.png .*\(No such file or dir"):
        read_images([path for paths in found.files["train"] for path in paths], 8)


def test_few_open_files_are_enough(tmp_path):
    root = make_folder(tmp_path / "pets", count=100)
    inner = root / "dog"
    for i in range(40):
        inner = inner / str(i)
    make_folder(inner, [""], count=1)
    check = "import resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64)); "
    check += "from augdistill_report.commands.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", check, "data", "check", f"folder:{root}", "--size", "8"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "141 train, 20 validation, 40 test" in done.stdout, done.stderr


def test_what_apply_wrote_is_a_data_set(tmp_path):
    root = make_folder(tmp_path)
    Image.new("RGB", (9, 9)).save(root / APPLY_PICTURE)
    (root / "apply.json").write_text("{}")
    assert load(f"folder:{root}", 8).where.endswith("skipped: 1 .json, 1 grid.png")
