"""Reads the YAML files that people write (presets and grids): the only module that reads YAML.

A damaged, hostile or ambiguous file is rejected within a second, with one line that names it. It must be a small UTF-8
file of `key: value` lines with each key once, and must stay small after its aliases (`*name`) are expanded.
"""

from pathlib import Path

import yaml

from augdistill_core import in_short

YAML_BYTES = 50_000  # the largest file of the report has 6,000
YAML_VALUES = 5_000  # keys and values, aliases expanded
YAML_DEPTH = 20  # levels of nested lists and mappings
MERGE = "tag:yaml.org,2002:merge"  # the key `<<`


def read_yaml(path: Path) -> dict:
    """The content of a YAML file, {} if it is empty; a `ValueError` of one line says what is wrong in which file."""
    try:
        if not path.is_file():
            raise ValueError(f"{path}: {'is a folder' if path.is_dir() else 'no such file'}; must be a YAML file")
        with path.open("rb") as file:
            content = file.read(YAML_BYTES + 1)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    if len(content) > YAML_BYTES:
        raise ValueError(f"{path}: is larger than {YAML_BYTES // 1000} kB; must be a few `key: value` lines")
    try:
        values = parse_yaml(content.decode("utf-8-sig"))  # some editors write a byte order mark first
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8 text") from None
    except RecursionError:
        raise ValueError(f"{path}: has more than {YAML_DEPTH} levels of nested lists or mappings") from None
    except Exception as error:  # `!!int x` and similar texts raise errors of any type
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        what = " ".join(str(getattr(error, "problem", None) or f"{type(error).__name__}: {error}").split())
        raise ValueError(f"{path}: is not readable YAML ({where}{what[:200]})") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: must hold `key: value` lines")
    return values


def parse_yaml(text: str):
    """The content of a YAML text; raises an exception of PyYAML, or a `RecursionError`, if it is wrong."""
    loader = yaml.SafeLoader(text)
    try:
        root = loader.get_single_node()
        if root is None:
            return {}
        count_values(root, {}, 1)
        return loader.construct_document(root)
    finally:
        loader.dispose()


def count_values(node: yaml.Node, counts: dict[yaml.Node, int | None], depth: int) -> int:
    """The number of values in a node, aliases expanded; an exception if it is too large, or a key is repeated."""

    def wrong(text: str, at: yaml.Node = node):
        return yaml.MarkedYAMLError(problem=text, problem_mark=at.start_mark)

    if node in counts:
        if counts[node] is None:
            raise wrong("an alias is inside the value that it names")
        return counts[node]
    if depth > YAML_DEPTH:
        raise RecursionError
    counts[node], keys, children = None, set(), []
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            name = (key.tag, key.value if isinstance(key, yaml.ScalarNode) else id(key))
            if name in keys:
                raise wrong(f"key {in_short(key.value)} is repeated", key)
            keys.add(name)
            children += [key, value]
    elif isinstance(node, yaml.SequenceNode):
        children = node.value
    counts[node] = 1 + sum(count_values(child, counts, depth + 1) for child in children)
    if counts[node] > YAML_VALUES:
        raise wrong(f"more than {YAML_VALUES} values, aliases expanded")
    for key, value in node.value if isinstance(node, yaml.MappingNode) else []:
        if key.tag == MERGE and isinstance(value, yaml.SequenceNode):
            merged = [name for child in value.value for name in key_names(child)]
            if len(set(merged)) < len(merged):  # versions of PyYAML differ in which of them is used
                raise wrong("`<<` merges two mappings with the same key; keep one of them", key)
    return counts[node]


def key_names(node: yaml.Node) -> set[str]:
    """The keys of a mapping, merged ones included; empty for another node."""
    found = set()
    for key, value in node.value if isinstance(node, yaml.MappingNode) else []:
        if key.tag != MERGE:
            found.add(str(key.value))
            continue
        for child in value.value if isinstance(value, yaml.SequenceNode) else [value]:
            found |= key_names(child)
    return found
