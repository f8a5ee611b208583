"""A grid of images shows a readable choice, names it, and says what it leaves out."""

import itertools

import numpy as np
import pytest
import torch

from augdistill_report.show.image_grids import COLUMNS, NAMES, SIZES, fitted, font, image_grid, readable_choice

LONG = ["aquarium_fish", "Egyptian Mau cat", "chimpanzee", "Donaudampfschifffahrtskapitän", "x"]


@pytest.mark.parametrize(
    "classes, each, channels, size",
    [(2, 1, 1, 8), (2, 50, 3, 128), (5, 3, 1, 28), (10, 1, 1, 16), (10, 5, 3, 32), (100, 1, 3, 48), (200, 10, 3, 64)],
)
def test_a_grid_of_any_data_set_fits_on_a_page(classes, each, channels, size):
    labels = torch.arange(classes).repeat_interleave(each)
    index, note = readable_choice(labels)
    shown = labels[index].tolist()
    kept = sorted(set(shown))
    assert len(kept) == min(classes, COLUMNS) and {0, classes - 1} <= set(kept) and len(index) <= COLUMNS
    gaps = {later - earlier for earlier, later in itertools.pairwise(kept)}
    assert max(gaps) - min(gaps) <= 1  # evenly spread over all classes
    of_each = min(each, 2, COLUMNS // len(kept))
    assert all(shown.count(c) == of_each for c in kept)
    assert (f"{len(kept)} of {classes} classes" in note) == (classes > COLUMNS)
    assert (f"{of_each} of {each} images a class" in note) == (each > of_each)
    # every image has a colour of its own, a whole number of 256ths
    codes = torch.arange(1, len(index) + 1) * 16
    images = (codes / 255).view(-1, 1, 1, 1).expand(-1, channels, size, size)
    sheet = np.array(image_grid({"x": images}, [LONG[c % len(LONG)] for c in shown], title=note))
    assert sheet.shape[1] <= 1100 and sheet.shape[0] <= 200
    below = sheet[-50:-10, 24:]  # without text
    for code in codes.tolist():
        rows, columns = np.nonzero((below == code).all(2))
        wide = np.ptp(columns) + 1
        assert 40 < wide <= 84 and len(rows) == 40 * wide  # whole, and once


@pytest.mark.parametrize("text", [*LONG, "pixels + experts' augmentation (stopped: diverged)", ""])
@pytest.mark.parametrize("width", [60, NAMES])
def test_a_name_is_wrapped_and_shrunk_before_it_is_cut(text, width):
    wrapped, size = fitted(text, width, 4)
    lines = wrapped.split("\n")
    assert len(lines) <= 4 and all(font(size).getlength(line) <= width for line in lines) and size in SIZES
    if width == NAMES or text in LONG:
        assert wrapped.replace("\n", "").replace(" ", "") == text.replace(" ", "")


def test_a_name_that_fits_nowhere_is_cut():
    wrapped, size = fitted("ß" * 400, 60, 4)
    assert wrapped.count("\n") == 3 and wrapped.endswith("…") and font(size).getlength(wrapped.split("\n")[3]) <= 60


def test_classes_of_different_sizes_are_said():
    assert readable_choice(torch.tensor([0, 1, 1, 1, 2, 2]))[1] == "shown: 2 of 1 to 3 images a class"
    assert readable_choice(torch.tensor([5, 5, 7]))[0].tolist() == [0, 1, 2]
