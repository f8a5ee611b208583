"""Pictures can be read."""

import numpy as np
import pytest
from matplotlib.colors import to_rgb

from augdistill_report.show import plots
from augdistill_report.work.statistics import Accuracy


def brightness(colour) -> float:
    """The relative luminance of sRGB by WCAG 2.2, in [0, 1]."""
    rgb = np.array(to_rgb(colour))
    return float(np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4) @ (0.2126, 0.7152, 0.0722))


@pytest.mark.parametrize("name", [*plots.COLOURS, "a method of one's own", "another"])
def test_a_number_stands_out_against_its_bar(name):
    axis = plots.bars({name: Accuracy([0.9, 0.8], [0.9, 0.8])}).axes[0]
    inside, behind = brightness(axis.texts[0].get_color()), brightness(axis.patches[0].get_facecolor())
    assert (max(inside, behind) + 0.05) / (min(inside, behind) + 0.05) >= 4.5


def test_a_name_has_one_look_and_a_row_brings_its_own():
    rows = {"mine": plots.Style("my method", "#123456", "^", ":")}
    assert plots.look("mine", rows) == rows["mine"]
    assert plots.look(("mine", "10 %"), rows) == plots.Style("my method, 10 %", "#123456", "^", ":")
    assert plots.look(("pixels (MTT)", "step size .01")).colour == plots.look("pixels (MTT)").colour == "#d55e00"
    assert plots.look("a phi on 10 %").colour != plots.look("a phi").colour  # names are not parsed


def test_a_bar_shows_that_its_run_stopped_in_the_bar_only_if_that_is_long_enough():
    scores = {str(v): Accuracy([v, v], [v, v], stopped="diverged") for v in (0.4, 0.9)}
    short, long = plots.bars(scores).axes[0].texts
    assert short.get_text() == "40.0 ± 0.0 % (stopped: diverged)" and short.get_position()[0] > 40
    assert long.get_text() == "90.0 ± 0.0 % (stopped: diverged)" and long.get_position()[0] < 40


def test_the_number_beside_a_bar_stands_clear_of_its_error_bar():
    score = Accuracy([0.1, 0.2], [0.1, 0.2])
    (text,) = plots.bars({"phi": score}).axes[0].texts
    assert text.get_position()[0] > 100 * (score.mean + score.std)
