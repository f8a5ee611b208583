"""Reads the YAML files that people write, presets and grids: the only place where YAML is read.

A file that is damaged, hostile or ambiguous is refused in one line that names it, within a second: it must be a small
UTF-8 file of `key: value` lines that names each key once, and stays small when its aliases (`*name`) are written out.
"""

from pathlib import Path

import yaml

from augdistill_core import in_short

YAML_BYTES = 50_000  # the largest file of the report has 6,000
YAML_VALUES = 5_000  # keys and values, each alias counted as what it stands for
YAML_DEPTH = 20  # lists and mappings inside each other
MERGE = "tag:yaml.org,2002:merge"  # the key `<<`


def read_yaml(path: Path) -> dict:
    """The content of a YAML file, {} if it is empty; a `ValueError` of one line names the file and what is wrong."""
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
        raise ValueError(f"{path}: nests lists or mappings more than {YAML_DEPTH} deep") from None
    except Exception as error:  # `!!int x` and its like end in errors of any type
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        what = " ".join(str(getattr(error, "problem", None) or f"{type(error).__name__}: {error}").split())
        raise ValueError(f"{path}: is not YAML that can be read ({where}{what[:200]})") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: must hold `key: value` lines")
    return values


def parse_yaml(text: str):
    """What a YAML text holds; an exception of PyYAML's, or a `RecursionError`, if it is wrong."""
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
    """The number of values in a node, aliases written out; an exception if it is too large, or a key stands twice."""

    def wrong(text: str, at: yaml.Node = node):
        return yaml.MarkedYAMLError(problem=text, problem_mark=at.start_mark)

    if node in counts:
        if counts[node] is None:
            raise wrong("an alias stands inside of what it names")
        return counts[node]
    if depth > YAML_DEPTH:
        raise RecursionError
    counts[node], keys, parts = None, set(), []
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            name = (key.tag, key.value if isinstance(key, yaml.ScalarNode) else id(key))
            if name in keys:
                raise wrong(f"key {in_short(key.value)} stands twice", key)
            keys.add(name)
            parts += [key, value]
    elif isinstance(node, yaml.SequenceNode):
        parts = node.value
    counts[node] = 1 + sum(count_values(part, counts, depth + 1) for part in parts)
    if counts[node] > YAML_VALUES:
        raise wrong(f"more than {YAML_VALUES} values, its aliases written out")
    for key, value in node.value if isinstance(node, yaml.MappingNode) else []:
        if key.tag == MERGE and isinstance(value, yaml.SequenceNode):
            merged = [name for part in value.value for name in key_names(part)]
            if len(set(merged)) < len(merged):  # which one counts differs between versions of PyYAML
                raise wrong("`<<` takes one key from two mappings; say which", key)
    return counts[node]


def key_names(node: yaml.Node) -> set[str]:
    """The keys of a mapping, with those that it merges; of another node none."""
    found = set()
    for key, value in node.value if isinstance(node, yaml.MappingNode) else []:
        if key.tag != MERGE:
            found.add(str(key.value))
            continue
        for part in value.value if isinstance(value, yaml.SequenceNode) else [value]:
            found |= key_names(part)
    return found
