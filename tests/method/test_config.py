"""Configuration: literals in any spelling become their declared type, and what is wrong is refused by its name."""

import dataclasses
import math

import numpy as np
import pytest

from augdistill_core import Config, knob


@dataclasses.dataclass(frozen=True)
class Part(Config):
    steps: int = knob(3, "number of steps", low=1)
    rate: float = knob(0.5, "step size", low=0, high=1)


@dataclasses.dataclass(frozen=True)
class Whole(Part):
    free: float = knob(0.0, "any number")
    floor: float = knob(0.0, "at least", low=0)
    ceiling: float = knob(0.0, "at most", high=1)
    fast: bool = knob(False, "whether to hurry")
    mode: str = knob("a", "which way", choices=("a", "b"))


@pytest.mark.parametrize(
    "key, value, expected",
    [
        ("steps", "10", 10),
        ("steps", 10.0, 10),
        ("steps", 1, 1),
        ("rate", "1e-3", 0.001),
        ("rate", 1, 1.0),
        ("rate", 0, 0.0),
        ("free", "-2.5", -2.5),
        ("fast", "true", True),
        ("fast", "False", False),
        ("fast", True, True),
        ("mode", "b", "b"),
    ],
)
def test_values_become_the_declared_type(key, value, expected):
    result = getattr(Whole(**{key: value}), key)
    assert result == expected and type(result) is type(expected)


@pytest.mark.parametrize(
    "key, value, says",
    [
        ("steps", "ten", "an int"),
        ("steps", "", "an int"),
        ("steps", "1.5", "an int"),
        ("steps", 1.5, "an int"),
        ("steps", math.nan, "an int"),
        ("steps", math.inf, "an int"),
        ("steps", True, "an int"),
        ("steps", None, "an int"),
        ("steps", [1], "an int"),
        ("steps", -1, "at least 1"),
        ("steps", "0", "at least 1"),
        ("rate", "fast", "a float"),
        ("rate", True, "a float"),
        ("rate", math.nan, "finite"),
        ("rate", "nan", "finite"),
        ("floor", "inf", "finite"),
        ("ceiling", -math.inf, "finite"),
        ("ceiling", 2, "at most 1"),
        ("steps", np.float32(1.5), "an int"),
        ("rate", 1.0001, r"in \[0, 1\]"),
        ("rate", -1, r"in \[0, 1\]"),
        ("fast", 1, "a bool"),
        ("fast", "yes", "a bool"),
        ("mode", "c", "one of a, b"),
        ("mode", 1, "a str"),
    ],
)
def test_wrong_values_are_refused_by_name(key, value, says):
    with pytest.raises(ValueError, match=f"^{key}=.*must be {says}"):
        Whole(**{key: value})


def test_refusals_tell_what_the_knob_means():
    with pytest.raises(ValueError, match="number of steps"):
        Part(steps=0)


def test_from_dict_and_to_dict_are_inverse():
    values = dict(steps=7, rate=0.25, free=-1.0, floor=2.0, ceiling=-2.0, fast=True, mode="b")
    assert Whole.from_dict(values).to_dict() == values
    assert Whole.from_dict({}) == Whole() and list(Whole.names()) == list(values)


def test_unknown_key_is_refused_by_name():
    with pytest.raises(ValueError, match=r"'stepz'.*steps, rate"):
        Whole.from_dict({"steps": 2, "stepz": 2})


def test_a_configuration_is_frozen():
    config = Part()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.steps = 4
    assert config.steps == 3


def test_part_takes_its_values_from_the_whole_then_changes_them():
    whole = Whole(steps=9, rate=0.1, mode="b")
    assert whole.select(Part) == Part(steps=9, rate=0.1)
    assert whole.select(Part, rate="0.2") == Part(steps=9, rate=0.2)
    with pytest.raises(ValueError, match="steps=0"):
        whole.select(Part, steps=0)
