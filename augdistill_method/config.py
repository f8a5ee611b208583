"""Configurations: frozen dataclasses of plain values that reject wrong keys, types and values by name."""

import dataclasses
import difflib
import math
import reprlib
from collections.abc import Iterable, Sequence

LONGEST = 4096  # characters in a text value
SHORT = reprlib.Repr()  # for values in messages: a hostile value may be huge, or nested without end
SHORT.maxstring = SHORT.maxother = 200


def knob(default, help: str, *, low=None, high=None, choices: Sequence | None = None):
    """A field of a `Config`: its default, its meaning (with unit), and its closed range or choices."""
    return dataclasses.field(default=default, metadata=dict(help=help, low=low, high=high, choices=choices))


def in_short(value) -> str:
    """`repr` of any value for a message: one line of at most about 200 characters."""
    try:
        return SHORT.repr(value)
    except Exception:  # an int of 5,000 digits has no repr
        return f"a {type(value).__name__}"


def nearest(key, names: Sequence[str]) -> str:
    """The three names most similar to a mistyped `key`, the most similar first, as text for a message."""
    key = key[:50] if isinstance(key, str) else ""
    like = sorted(names, key=lambda name: (key in name, difflib.SequenceMatcher(None, key, name).ratio()), reverse=True)
    return f"the nearest are {', '.join(like[:3])}"


@dataclasses.dataclass(frozen=True)
class Config:
    """A frozen set of plain values; a `ValueError` names an unknown key, a wrong type or a value out of range."""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = self.checked(field, getattr(self, field.name))
            object.__setattr__(self, field.name, value)

    @staticmethod
    def checked(field: dataclasses.Field, value):
        """`value` converted to the type of `field` ("10" to int 10, "1e-3" to float .001), or a `ValueError`."""

        def wrong(right: str):
            return ValueError(f"{field.name}={in_short(value)}: must be {right} ({field.metadata.get('help', '')})")

        kind = field.type
        try:
            if kind is bool and isinstance(value, str):
                result = {"true": True, "false": False}[value.lower()]
            elif isinstance(value, bool) != (kind is bool) or (kind is str and not isinstance(value, str)):
                raise ValueError
            else:
                result = kind(value)
            if not isinstance(value, str) and result != value and result == result:
                raise ValueError  # int(1.5)
        except (ValueError, TypeError, KeyError, OverflowError):
            article = "an" if kind is int else "a"
            raise wrong(f"{article} {kind.__name__}") from None
        if kind is float and not math.isfinite(result):
            raise wrong("finite")
        if kind is int and abs(result) >= 2**63:
            raise wrong("below 2**63")
        if kind is str and not all(c >= " " and c != "\x7f" and not "\ud800" <= c <= "\udfff" for c in result):
            raise wrong("one line of text, without control characters")
        if kind is str and len(result) > LONGEST:
            raise wrong(f"at most {LONGEST} characters")
        low, high, choices = (field.metadata.get(k) for k in ("low", "high", "choices"))
        if choices is not None and result not in choices:
            raise wrong("one of " + ", ".join(map(str, choices)))
        if (low is not None and result < low) or (high is not None and result > high):
            both = low is not None and high is not None
            raise wrong(f"in [{low}, {high}]" if both else f"at least {low}" if high is None else f"at most {high}")
        return result

    @classmethod
    def names(cls) -> list[str]:
        return [field.name for field in dataclasses.fields(cls)]

    @classmethod
    def refuse_unknown(cls, keys: Iterable) -> None:
        """A `ValueError` that names the first key that does not exist, and the most similar names."""
        for key in keys:
            if key not in cls.names():
                raise ValueError(f"unknown key {in_short(key)}: {nearest(key, cls.names())}")

    @classmethod
    def from_dict(cls, values: dict):
        """The configuration with these values, or a `ValueError` that names the first key that does not exist."""
        cls.refuse_unknown(values)
        return cls(**values)

    def select(self, cls, **changes):
        """The configuration `cls`, whose fields are a subset of this one's, with these values and then `changes`."""
        return cls(**{**{key: getattr(self, key) for key in cls.names()}, **changes})

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)
