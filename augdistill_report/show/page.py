"""The executed notebooks of a run as one HTML page that works offline: with its pictures, code folded."""

import html
from pathlib import Path

import nbformat

from augdistill_report.files.sealed_json import read_json
from augdistill_report.files.store import write

WIDGETS = "application/vnd.jupyter.widget-view+json"

TEMPLATES = Path(__file__).parent / "templates"


def read_results(folder: Path, ignore: list[str] | None = None) -> dict[str, dict]:
    """The results of a run by notebook name, without those in `ignore`; a `ValueError` names a damaged file."""
    results = {}
    for path in sorted((folder / "results").glob("*.json")):
        if path.stem not in (ignore or []):
            result = results[path.stem] = read_json(path, "results")
            if result["notebook"] != path.stem:
                raise ValueError(
                    f"{path}: has the results of {result['notebook']}; delete it and run {path.stem} again"
                )
    return results


def finished(folder: Path, configuration: str) -> tuple[dict[str, dict], list[str]]:
    """The results of this configuration by notebook, and the names of notebooks with another configuration."""
    results = read_results(folder)
    ours = {name: r for name, r in results.items() if r["configuration"] == configuration}
    return ours, [name for name in results if name not in ours]


def first_heading(notebook: nbformat.NotebookNode) -> str:
    """A notebook's first heading."""
    return notebook.cells[0].source.splitlines()[0].lstrip("# ")


def build_report(folder: Path, configuration: str) -> Path:
    """Write folder/report.html from the notebooks executed with this configuration; returns its path."""
    from nbconvert import HTMLExporter
    from pygments.formatters import HtmlFormatter

    exporter = HTMLExporter(template_name="page", extra_template_basedirs=[str(TEMPLATES)])
    exporter.exclude_anchor_links = True
    ours, others = finished(folder, configuration)
    items, sections = [], []
    for name in ours:
        path = folder / "notebooks" / f"{name}.ipynb"
        if not path.exists():  # the user ran papermill: the executed copy is elsewhere
            continue
        notebook = nbformat.read(path, as_version=4)
        # readers do not need the parameters that papermill injected, nor progress bars
        notebook.cells = [c for c in notebook.cells if "injected-parameters" not in c.metadata.get("tags", [])]
        for output in (output for cell in notebook.cells for output in cell.get("outputs", [])):
            output.get("data", {}).pop(WIDGETS, None)  # a widget needs a kernel; the text output remains
        notebook.metadata.pop("widgets", None)
        body, _ = exporter.from_notebook_node(notebook)
        items.append(f'<li><a href="#{name}">{html.escape(first_heading(notebook))}</a></li>')
        sections.append(f'<section id="{name}">{body}</section>')
    note = ""
    if others:
        left_out = ", ".join(others)
        note = f'<p class="note">Left out, because they were run with other settings or other code: {left_out}.</p>'
    facts = read_json(folder / "config.json", "run")
    about = next(iter(ours.values()))["environment"] if ours else {}
    footer = " · ".join(
        f"{k}: {v}" for k, v in {"preset": Path(facts["preset"]).stem, "configuration": configuration, **about}.items()
    )
    css = (TEMPLATES / "report.css").read_text() + HtmlFormatter(style="default").get_style_defs(".highlight")
    page = f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Augmentation by distillation</title><style>{css}</style></head><body>
<h1>Augmentation by distillation: a report</h1>
<nav><ol>{"".join(items)}</ol></nav>
{note}{"".join(sections)}
<footer>{html.escape(footer)}</footer></body></html>
"""
    target = folder / "report.html"
    write(target, page)
    return target
