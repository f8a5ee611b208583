"""A stored result is reused only while the code of a user's own phi is the same, wherever that stands."""

import functools
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch

from augdistill_core import PHIS
from augdistill_method import phi as registry
from augdistill_report.run import configuration
from augdistill_report.settings import resolve
from augdistill_report.work.own_code import code_of, file_source, own_source

CELL = """
import torch
from augdistill_core import Phi, register_phi
STRENGTH = 1.0
def noise(images, generator):
    return STRENGTH * torch.randn(len(images), 1, 1, 1, generator=generator)
class Base(Phi):
    def __init__(self, images, classes):
        super().__init__()
        self.range = torch.nn.Parameter(torch.tensor(0.1))
@register_phi("brightness")
class Brightness(Base):
    def forward(self, images, *, generator, **_):
        return images + self.range * noise(images, generator)
class Two(Brightness):
    pass
register_phi("two")(lambda images, classes: Two(images, classes))
"""

EDITS = {  # of a notebook's cell
    "forward": ("images + self.range", "images - self.range"),
    "a constant that it uses": ("STRENGTH = 1.0", "STRENGTH = 20.0"),
    "a function that it uses": ("return STRENGTH *", "return 2 * STRENGTH *"),
    "its base class": ("torch.tensor(0.1)", "torch.tensor(0.2)"),
}


@pytest.fixture
def register(monkeypatch):
    """Run a cell as a notebook does, without a file; returns the code of its two phis."""
    monkeypatch.setattr(registry, "_REGISTRY", dict(PHIS))
    monkeypatch.setattr(registry, "PHIS", registry._REGISTRY)

    def run(cell: str) -> tuple[str, str]:
        exec(compile(cell, "<cell>", "exec"), {"__name__": "__main__"})
        return own_source("brightness"), own_source("two")

    return run


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_cell_of_a_notebook_is_another_phi(register, edit):
    before = register(CELL)
    assert all(before) and register(CELL) == before  # the cell runs twice
    assert register(f"# another comment, and a line\n\n{CELL}") == before
    edited = register(CELL.replace(*EDITS[edit]))
    assert edited[0] != before[0] and edited[1] != before[1]


def test_a_notebook_s_phi_is_the_same_in_another_process(tmp_path):
    """So a run that is opened again in a new kernel goes on where it was."""
    code = f"{CELL}\nfrom augdistill_report.work.own_code import own_source\nprint(hash_of(own_source('two')))"
    code = "import hashlib\nhash_of = lambda text: hashlib.sha256(text.encode()).hexdigest()\n" + code
    said = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path).stdout
        for _ in range(2)
    ]
    assert said[0] == said[1] and len(said[0].strip()) == 64


def test_a_phi_s_file_counts_with_the_modules_of_the_user_that_it_imports(tmp_path, monkeypatch):
    package = tmp_path / "of_mine"
    package.mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    texts = {
        tmp_path / "strength_of_mine.py": "STRENGTH = 1\n",
        package / "__init__.py": "",
        package / "inner.py": "from . import deep\n",
        package / "deep.py": "import strength_of_mine\nfrom of_mine import inner\n",  # a circle
        tmp_path / "brightness.py": "import torch, kornia, os.path\nfrom of_mine.inner import deep\n",
    }
    for path, text in texts.items():
        path.write_text(text)
    before = file_source(tmp_path / "brightness.py")
    assert sorted(before.splitlines()) == sorted("".join(texts.values()).splitlines())  # each once, no package
    settings = resolve("smoke", {"phis": str(tmp_path / "brightness.py")})
    first = configuration(settings)
    for changed in ("strength_of_mine.py", "of_mine/deep.py", "of_mine/__init__.py"):
        path = tmp_path / changed
        text = path.read_text()
        path.write_text(text + "MORE = 2\n")
        assert file_source(tmp_path / "brightness.py") != before
        assert configuration(settings) != first
        path.write_text(text)
    assert configuration(settings) == first


def test_a_value_counts_by_its_content():
    class Plain:
        def __init__(self, size):
            self.size, self.own = size, self

        def grown(self):
            return self.size + 1

    def same(one, other):
        return code_of(one) == code_of(other)

    pairs = {
        "tensors": (torch.zeros(2), torch.ones(2)),
        "types of tensors": (torch.zeros(2), torch.zeros(2, dtype=torch.float64)),
        "modules": (torch.nn.Linear(2, 2), torch.nn.Linear(2, 3)),
        "objects": (Plain(1), Plain(2)),
        "dictionaries": ({"a": [1, {2}]}, {"a": [1, {3}]}),
        "functions": [eval(f"lambda x: x + {k}", {"__name__": "__main__"}) for k in (1, 2)],
        "partials": (functools.partial(max, 1), functools.partial(max, 2)),
        "methods": (Plain(1).grown, Plain(2).grown),
        "arrays": (np.zeros(2), np.ones(2)),
        "installed functions": (torch.sin, torch.cos),
    }
    for name, (one, other) in pairs.items():
        assert same(one, one) and not same(one, other), name
    made = [type("Made", (), {"__module__": "__main__", "size": size}) for size in (1, 1, 2)]
    assert same(made[0], made[1]) and not same(made[0], made[2])
    assert not same(torch.Generator(), torch.Generator())  # nothing is known: nothing is reused
    assert textwrap.dedent("  a") == "a" and same(textwrap.dedent, textwrap.dedent)
