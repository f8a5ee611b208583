"""JSON files that our own code reads back: readable for people, and every change of their content is detected.

The content keeps its order, between "kind" (the kind of file) and "sha256" (a digest of the content and its order).
Only spaces and line breaks may change.
"""

import hashlib
import json
from pathlib import Path
from typing import NamedTuple

from augdistill_report.files.store import as_json, write


class JsonKind(NamedTuple):
    """The content that a kind of file must have (`shape`), and what a user can do about a damaged file (`again`).

    `shape` is a type, `[shape]` (a list), `{"key": shape}` (an object with at least these keys) or `{str: shape}` (an
    object with any keys).
    """

    shape: dict
    again: str


CODE_STATE = {"commit": str, "uncommitted": bool}

JSON_KINDS = {
    "run": JsonKind({"preset": str, "settings": dict}, "delete it and run the same command again"),
    "results": JsonKind(
        {
            "notebook": str,
            "preset": str,
            "changes": dict,  # of the preset's settings
            "seconds": float,  # CPU time of its jobs, without the experts
            "settings": dict,
            "fingerprint": str,
            "configuration": str,
            "environment": CODE_STATE,
            "numbers": dict,
            "figures": [str],
            "films": [str],
            "headline": str,
            "figure": str,
        },
        "delete it and run its notebook again (or publish it again, if it is in figures/)",
    ),
    "sweep": JsonKind(
        {
            "grid": str,
            "notebook": str,
            "preset": str,
            "environment": CODE_STATE,
            "cells": [{"row": str, "point": dict, "settings": dict}],
        },
        "delete it and run the sweep again: finished cells are kept (or publish it again, if it is in figures/)",
    ),
    "campaign": JsonKind(
        {
            "campaign": str,
            "preset": str,
            "changes": dict,  # of the preset's settings, for every piece
            "tiny": bool,
            "settings": dict,
            "environment": CODE_STATE,
            "rows": [{"row": str, "images": str, "seed": int, "state": str, "settings": dict}],
        },
        "delete it and run the campaign again: finished pieces are kept",
    ),
    "timings": JsonKind({"seconds": {str: float}}, "delete it and run the report again, which measures them again"),
    "tracked": JsonKind({"sent": {str: str}}, "delete it and run the notebooks again: everything is sent again"),
    "card": JsonKind(
        {"data": str, "classes": [str], "normalisation": dict, "lr": float, "content": str, "environment": CODE_STATE},
        "export the set again, or remove the card",
    ),
    "score": JsonKind(
        {
            "name": str,
            "data": str,
            "size": int,
            "protocol": dict,
            "rows": dict,
            "command": str,
            "environment": CODE_STATE,
        },
        "delete it and score the set again",
    ),
    "row": JsonKind(
        {"row": str, "store": str, "setup": dict, "phi": str, "subset": dict, "config": dict}, "run its notebook again"
    ),
    "apply": JsonKind({"phi": str, "to": str, "of": str, "state": str}, "delete its folder, or choose an empty one"),
}


def write_json(path: Path, kind: str, content: dict) -> None:
    """Write `content` (JSON values with text keys) as a sealed file of a kind in `JSON_KINDS`.

    Values that are not finite become null. A `ValueError` names the file if the content does not fit the kind.
    """
    try:
        content = strict_json(as_json(content))  # as it will be read: tuples as lists, keys as text
        check_json(content, JSON_KINDS[kind].shape, "it")
        if {"kind", "sha256"} & set(content):
            raise ValueError("the keys 'kind' and 'sha256' are reserved for the seal")
        text = as_json({"kind": kind, **content, "sha256": json_seal(kind, content)})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: cannot be written as JSON ({error})") from None
    write(path, text)


def read_json(path: Path, kind: str) -> dict:
    """The content that `write_json` wrote; a `ValueError` names a damaged file and says what to do about it."""
    try:
        content = strict_json(path.read_bytes().decode())
        if not isinstance(content, dict) or "sha256" not in content:
            raise ValueError("it has no seal: not a file of augdistill, or of an earlier version")
        if (said := content.pop("kind", None)) != kind:
            raise ValueError(f"its kind is {said!r}, must be {kind!r}")
        if content.pop("sha256") != json_seal(kind, content):
            raise ValueError("its content is not what was written")
        check_json(content, JSON_KINDS[kind].shape, "it")
        return content
    except (ValueError, RecursionError, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ValueError(f"{path}: is damaged or not ours ({reason}); {JSON_KINDS[kind].again}") from None


def strict_json(text: str):
    """The value of a JSON text; a `ValueError` for what parsers may read differently (NaN, a repeated key)."""

    def distinct(pairs: list[tuple]) -> dict:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("it has the same key twice")
        return found

    def refused(name: str):
        raise ValueError(f"{name} is not valid JSON")

    return json.loads(text, object_pairs_hook=distinct, parse_constant=refused)


def json_seal(kind: str, content: dict) -> str:
    """The SHA-256 of a file's kind and content, with the content's order, since tables are shown in it."""
    return hashlib.sha256(json.dumps([kind, content]).encode()).hexdigest()


def check_json(value, shape, place: str) -> None:
    """A `ValueError` that says where `value` (at `place`) does not have a `JsonKind`'s shape."""
    kind = shape if isinstance(shape, type) else type(shape)
    if type(value) is not kind and not (kind is float and type(value) is int):
        raise ValueError(f"{place} must be of type {kind.__name__}, is {type(value).__name__}")
    if isinstance(shape, list):
        for number, item in enumerate(value):
            check_json(item, shape[0], f"{place}[{number}]")
    elif isinstance(shape, dict):
        if missing := [key for key in shape if key is not str and key not in value]:
            raise ValueError(f"{place} has no {missing[0]!r}")
        for key, inner in value.items():
            expected = shape.get(key, shape.get(str))
            if expected is not None:
                check_json(inner, expected, f"{place}[{key!r}]")
