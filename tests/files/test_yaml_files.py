"""YAML files, whatever they hold: read, or refused within a second in one line that names the file."""

import time

import pytest

from augdistill_report.commands.cli import main
from augdistill_report.files.yaml_files import read_yaml


def multiplied(first: str, more: str) -> str:
    """Nine aliases of what stands above, twelve times over: 9^12 values."""
    lines = [f"a0: &a0 {first}"]
    lines += [f"a{i}: &a{i} {more.format(', '.join([f'*a{i - 1}'] * 9))}" for i in range(1, 13)]
    return "\n".join(lines)


WRONG = {
    "aliases that multiply": (multiplied("[x, x]", "[{}]"), r"more than 5000 values, aliases expanded"),
    "merges that multiply": (multiplied("{x: 1}", "{{<<: [{}]}}"), "merges two mappings with the same key"),
    "an ambiguous merge": (
        "a: &a {seed: 1}\nb: {<<: [*a, {seed: 2}]}",
        "merges two mappings with the same key",
    ),
    "a circle": ("a: &a [*a]", "line 1, column 4: an alias is inside the value that it names"),
    "deep lists": ("a: " + "[" * 49_000, "more than 20 levels"),
    "deep mappings": ("{a: " * 10_000, "more than 20 levels"),
    "deep blocks": ("- " * 24_000 + "x", "more than 20 levels"),
    "21 deep": ("a: " + "[" * 20 + "]" * 20, "more than 20 levels"),
    "many keys": ("".join(f"k{i}: 1\n" for i in range(4000)), "more than 5000 values"),
    "too large": ("data: " + "x" * 60_000, "is larger than 50 kB"),
    "a key twice": ("seed: 1\nwidth: 8\nseed: 2", "line 3, column 1: key 'seed' is repeated"),
    "a key twice, inside": ("set: {seed: 1, seed: 1}", "key 'seed' is repeated"),
    "NUL": ("seed: 1\0", "special characters are not allowed"),
    "UTF-16": ("seed: 1".encode("utf-16"), "byte 0 is not UTF-8; save the file as UTF-8 text"),
    "latin-1": ("data: é".encode("latin-1"), "byte 6 is not UTF-8"),
    "a list": ("- seed", "must hold `key: value` lines"),
    "a word": ("seed", "must hold `key: value` lines"),
    "two documents": ("seed: 1\n---\nseed: 2", "line 2, column 1: but found another document"),
    "not YAML": ("a: [", "line 1, column 5: "),
    "a list as a key": ("? [a]\n: 1", "found unhashable key"),
    "no int": ("seed: !!int x", "ValueError: invalid literal for int"),
    "no int at all": ("seed: !!int ''", "IndexError: "),
    "no bool": ("zca: !!bool x", "KeyError: 'x'"),
    "no day": ("seed: 2001-99-99", "ValueError: month must be in 1..12"),
    "5,000 digits": ("seed: " + "9" * 5000, "ValueError: Exceeds the limit"),
    "a call": ("seed: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_named_within_a_second(case, tmp_path, capsys):
    content, says = WRONG[case]
    path = tmp_path / "mine.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    start = time.process_time()
    with pytest.raises(ValueError) as error:
        read_yaml(path)
    assert time.process_time() - start < 1
    message = str(error.value)
    assert message.startswith(f"{path}: ") and says in message
    assert message.isprintable() and len(message) < len(str(path)) + 300
    for arguments in (["report", "--preset", str(path), "--out", str(tmp_path / "run")], ["sweep", str(path)]):
        assert main(arguments) == 2
        assert capsys.readouterr().err == f"augdistill: {message}\n"


def test_what_is_no_file(tmp_path):
    (tmp_path / "folder.yaml").mkdir()
    for path, says in (
        (tmp_path / "folder.yaml", "is a folder"),
        (tmp_path / "nowhere.yaml", "no such file"),
        (tmp_path / f"{'x' * 300}.yaml", "cannot be read"),
    ):
        with pytest.raises(ValueError, match=says) as error:
            read_yaml(path)
        assert str(error.value).startswith(f"{path}: ")


def test_what_people_write_is_read(tmp_path):
    path = tmp_path / "mine.yaml"
    for content, expected in {
        b"": {},
        b"# nothing": {},
        b"\xef\xbb\xbfseed: 1\r\nphi_lr: 1.0e-3\r\n": {"seed": 1, "phi_lr": 0.001},
        "data: /données".encode(): {"data": "/données"},
        b"a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}": {"a": {"x": 1, "y": 2}, "b": {"x": 1, "y": 3}},
        b"a: {<<: [{x: 1}, {y: 2}], x: 3}": {"a": {"x": 3, "y": 2}},
        b"a: " + b"[" * 19 + b"]" * 19: {"a": nested(19)},
    }.items():
        path.write_bytes(content)
        assert read_yaml(path) == expected


def nested(depth: int) -> list:
    return [nested(depth - 1)] if depth > 1 else []
