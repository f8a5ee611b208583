"""`augdistill apply` into folders that were changed since the last command, and for classes of any name."""

import itertools
import re

import numpy as np
import pytest
import torch
from helpers import make_folder
from PIL import Image

from augdistill_report.commands.cli import main
from augdistill_report.run import Run
from augdistill_report.settings import resolve
from augdistill_report.show.image_grids import image_grid, is_whole_png, png, printable

NAMES = ["a\nb", "a\rb", "a\tb", "\x1b[31m", "a\u2028b", "q\udcffz", "$x^$", " ", "猫", "-", "a|b", "<b>"]


@pytest.fixture(scope="module")
def phi(tmp_path_factory):
    """The file of a policy that was trained for one iteration."""
    run = Run("mine", resolve("smoke", {"iterations": 1}), tmp_path_factory.mktemp("phi"))
    return str(run.save("policy", run.distillation("policy", run.base)))


@pytest.fixture
def command(phi, tmp_path):
    """A command that writes six images of two classes to OUT."""
    make_folder(tmp_path / "pets", classes=("cat", "dog"), count=3, mode="L", size=(8, 8))
    return ["apply", phi, "--to", str(tmp_path / "pets"), "--out", str(tmp_path / "out")]


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_classes_of_any_name(phi, tmp_path):
    make_folder(tmp_path / "pets", classes=NAMES, count=1, mode="L", size=(8, 8))
    assert main(["apply", phi, "--to", str(tmp_path / "pets"), "--out", str(tmp_path / "out")]) == 0
    assert len(list((tmp_path / "out").glob("*/00000.png"))) == len(NAMES)
    assert is_whole_png(tmp_path / "out" / "grid.png")


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_a_picture_takes_any_name_in_any_place(name):
    images = torch.zeros(1, 1, 8, 8)
    for row, column, title in itertools.product((name, "x"), repeat=3):
        assert png(image_grid({row: images}, [column], title=title))
    assert printable(name).isprintable() and (printable(name) == name) == name.isprintable()


def test_whole_pngs_are_kept_and_all_others_made_again(command, tmp_path):
    out = tmp_path / "out"
    assert main(command) == 0
    before, file = contents(out), out / "cat" / "00001.png"
    whole, elsewhere = file.read_bytes(), tmp_path / "elsewhere.png"
    times = {p: p.stat().st_mtime_ns for p in out.glob("*/*.png")}
    rng = np.random.default_rng(0)
    flipped = [whole[:i] + bytes([whole[i] ^ 1 << rng.integers(8)]) + whole[i + 1 :] for i in range(len(whole))]
    for damaged in flipped:
        file.write_bytes(damaged)
        assert not is_whole_png(file)
    for damaged in (b"", whole[:30], whole[:-1], whole + b"0", b"no image", flipped[60]):
        file.write_bytes(damaged)
        assert main(command) == 0 and contents(out) == before
    file.rename(elsewhere)
    file.symlink_to(elsewhere)  # whole, but not in this folder
    assert main(command) == 0 and contents(out) == before and not file.is_symlink()
    file.unlink()
    file.symlink_to(tmp_path / "nowhere.png")
    assert main(command) == 0 and contents(out) == before and not (tmp_path / "nowhere.png").exists()
    assert {p: p.stat().st_mtime_ns for p in out.glob("*/*.png") if p != file} == {
        p: t for p, t in times.items() if p != file
    }
    for image in out.glob("*/*.png"):
        with Image.open(image) as opened:
            opened.load()


def test_a_class_folder_that_leads_elsewhere_is_refused_before_anything_is_written(command, tmp_path, capsys):
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    elsewhere.mkdir()
    out.mkdir()
    for kind, make in (
        ("a link", lambda path: path.symlink_to(elsewhere)),
        ("a link", lambda path: path.symlink_to(tmp_path / "nowhere")),
        ("a file", lambda path: path.write_text("")),
    ):
        make(out / "dog")
        assert main(command) == 2
        assert f"--out {out}: 'dog' is {kind}, must be a folder" in capsys.readouterr().err
        assert not list(elsewhere.iterdir()) and [p.name for p in out.iterdir()] == ["dog"]
        (out / "dog").unlink()
    assert main(command) == 0  # also into a folder that is linked itself
    (tmp_path / "link").symlink_to(elsewhere)
    assert main([*command[:-1], str(tmp_path / "link")]) == 0 and contents(elsewhere) == contents(out)


@pytest.mark.parametrize("name", ["grid.png", "apply.json"])
def test_a_class_with_the_name_of_a_file_is_refused_before_anything_is_written(phi, name, tmp_path, capsys):
    make_folder(tmp_path / "pets", classes=("cat", name), count=1, mode="L", size=(8, 8))
    assert main(["apply", phi, "--to", str(tmp_path / "pets"), "--out", str(tmp_path / "out")]) == 2
    assert f"class '{name}' has the name of a file that apply writes" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_damaged_note_is_refused_by_name(command, tmp_path, capsys):
    assert main(command) == 0
    note = tmp_path / "out" / "apply.json"
    text = note.read_text()
    for damaged in (
        text[:40],
        text.replace('"copies": 1', '"copies": 2'),
        "{}",
        "",
        "[" * 9999,
        text.replace("0", "1"),
    ):
        note.write_text(damaged)
        before = contents(tmp_path / "out")
        assert main(command) == 2
        error = capsys.readouterr().err
        assert re.search(
            rf"augdistill: {re.escape(str(note))}: is damaged or not ours \(.+\); delete its folder", error
        )
        assert contents(tmp_path / "out") == before
