"""The layout of the code holds: three boxes, no cycles, one meaning for a name, digests that follow the imports."""

import ast
import collections
import functools
import importlib.metadata
import json
import shutil

import pytest

from augdistill_report import run
from augdistill_report.places import ROOT
from augdistill_report.settings import resolve
from augdistill_report.work import provenance
from augdistill_report.work.provenance import PACKAGES, SOURCES, Sources

EXPERT, DISTILLATION = "augdistill_report.work.experts", "augdistill_report.work.distillation"
SCORING, ALL = "augdistill_report.work.scoring", ()


def test_no_import_runs_in_a_circle_late_ones_included():
    done, path = set(), []

    def visit(module):
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            path.append(module)
            for other in sorted(SOURCES.imports(module)):
                visit(other)
            done.add(path.pop())

    for module in SOURCES.text:
        visit(module)
    assert len(done) > 40


def test_imports_go_down_through_one_door():
    for module, text in SOURCES.text.items():
        box = module.split(".")[0]
        named = [n.module for n in ast.walk(ast.parse(text)) if isinstance(n, ast.ImportFrom) and n.module]
        named += [a.name for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Import) for a in n.names]
        below = {
            "augdistill_method": ("augdistill_core", "augdistill_report"),
            "augdistill_core": ("augdistill_report",),
        }
        refused = below.get(box, ("augdistill_method",))
        assert not [name for name in named if name.split(".")[0] in refused], module


def test_a_module_can_be_read_in_one_sitting():
    long = {module: text.count("\n") for module, text in SOURCES.text.items() if text.count("\n") > 450}
    assert not long, f"{long}: divide them"


def test_no_name_of_a_function_or_a_class_means_two_things():
    found = collections.defaultdict(list)
    for module, text in SOURCES.text.items():
        for node in ast.parse(text).body:
            names = [node.name] if isinstance(node, ast.FunctionDef | ast.ClassDef) else []
            if isinstance(node, ast.Assign):
                names = [target.id for target in node.targets if isinstance(target, ast.Name)]
            for name in names:
                if not name.startswith("__"):
                    found[name].append(module)
    assert not {name: modules for name, modules in found.items() if len(modules) > 1}


@pytest.fixture
def edited(tmp_path):
    """`edited(module, more)`: the digests' view of the code with a line more in a module."""
    for package in PACKAGES:
        source = ROOT / package
        shutil.copy(source, tmp_path) if source.is_file() else shutil.copytree(source, tmp_path / package)

    def edit(module: str, more: str) -> Sources:
        path = tmp_path / (module.replace(".", "/") + ".py")
        before = path.read_text() if path.exists() else None
        path.write_text((before or "") + more)
        try:
            return Sources(tmp_path)
        finally:
            path.write_text(before) if before is not None else path.unlink()

    return edit


@pytest.mark.parametrize(
    "module, remade",
    {
        "augdistill_method.unroll": {DISTILLATION},
        "augdistill_core": {DISTILLATION},
        "augdistill_method.student": {EXPERT, DISTILLATION, SCORING},
        "augdistill_method.experts": {EXPERT, DISTILLATION, SCORING},
        "augdistill_report.data.datasets": {EXPERT, DISTILLATION, SCORING},
        "augdistill_report.data.downloads": set(),
        "augdistill_report.data.instaaug": {SCORING},
        "augdistill_report.files.checkpoints": {EXPERT, DISTILLATION, SCORING},
        "augdistill_method.zoo.distnets": set(),
        "augdistill_report.explorer.page": set(),
        "augdistill_report.show.plots": set(),
        "augdistill_report.studies.subsets": set(),
        "augdistill_report.settings": set(),
        "augdistill_report.commands.cli": set(),
    }.items(),
)
def test_an_edit_remakes_what_imports_it_and_nothing_else(edited, module, remade):
    changed = edited(module, "\nanother = 1\n")
    assert {job for job in (EXPERT, DISTILLATION, SCORING) if changed.digest(job) != SOURCES.digest(job)} == remade
    assert changed.digest() != SOURCES.digest()  # of all the code, as a run's configuration has it


def test_comments_docstrings_and_new_files_remake_nothing(edited):
    for changed in (
        edited("augdistill_method.unroll", "\n# a comment\n"),
        edited("augdistill_report.studies.why", "\n# a comment\n"),
        edited("augdistill_method.zoo.mine", "from augdistill_method.phi import register_phi\n"),
    ):
        for job in (EXPERT, DISTILLATION, SCORING):
            assert changed.digest(job) == SOURCES.digest(job)


def test_a_phi_s_own_file_is_part_of_its_digest_and_of_no_other_s(edited):
    changed = edited("augdistill_method.zoo.unet", "\nanother = 1\n")
    unet, mlp = ((DISTILLATION, f"augdistill_method.zoo.{name}") for name in ("unet", "mlp"))
    assert changed.digest(*unet) != SOURCES.digest(*unet) and changed.digest(*mlp) == SOURCES.digest(*mlp)


def test_the_version_of_a_package_counts_where_it_computes(monkeypatch):
    """After an upgrade of kornia what it computes is made again, and nothing else."""
    kornia, plain = "augdistill_report.data.policies_by_kornia", "augdistill_method.student"
    before = [Sources(ROOT).digest(module) for module in (kornia, SCORING, plain)]
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "99")
    now = [Sources(ROOT).digest(module) for module in (kornia, SCORING, plain)]
    assert [a == b for a, b in zip(before, now, strict=True)] == [False, False, True]


def test_a_result_is_of_the_commit_at_its_start(tmp_path, monkeypatch):
    """Somebody may commit while a notebook runs."""
    monkeypatch.setattr(provenance, "code_state", functools.cache(provenance.code_state.__wrapped__))
    monkeypatch.setattr(run, "code_state", provenance.code_state)
    monkeypatch.setattr(provenance, "git", lambda *arguments: "a" * 40 if "log" in arguments else "")
    mine = run.Run("mine", resolve("smoke"), tmp_path)
    monkeypatch.setattr(provenance, "git", lambda *arguments: "b" * 40)
    mine.finish()
    found = json.loads((tmp_path / "results" / "mine.json").read_text())["environment"]
    assert (found["commit"], found["uncommitted"]) == ("a" * 40, False)


def test_a_late_import_counts_and_one_for_type_checkers_does_not(edited):
    late = "\ndef later():\n    from augdistill_report.studies import drift\n"
    assert "augdistill_report.studies.drift" in edited(EXPERT, late).imported(EXPERT)
    typed = "\nif TYPE_CHECKING:\n    from augdistill_report.studies import drift\n"
    assert "augdistill_report.studies.drift" not in edited(EXPERT, typed).imported(EXPERT)
