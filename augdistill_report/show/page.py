"""The executed notebooks of a run as one HTML page that works offline: with its pictures, code folded."""

import base64
import hashlib
import html
from pathlib import Path

import nbformat

from augdistill_report.files.sealed_json import read_json
from augdistill_report.files.store import write
from augdistill_report.run import CONFIGURATION

WIDGETS = "application/vnd.jupyter.widget-view+json"

TEMPLATES = Path(__file__).parent / "templates"

# the contents list marks the section that is read: the last one that begins in the upper third of the window
FOLLOW = """
const links = [...document.querySelectorAll("nav a")];
function follow() {
  const top = (a) => document.getElementById(a.hash.slice(1)).getBoundingClientRect().top;
  const begun = links.filter((a) => top(a) < innerHeight / 3);
  links.forEach((a) => a.removeAttribute("aria-current"));
  (begun.at(-1) ?? links[0]).setAttribute("aria-current", "true");
}
addEventListener("scroll", follow, { passive: true });
follow();
"""

KEY_NOTEBOOK = "03_phi_distillation"  # its key figure stands on the front page, where it was run

ANSWER = "05_subset_evaluation"  # its headline answers the question, and comes first

QUESTION = (
    "Can we learn a stochastic augmentation phi(x), by matching training trajectories, so that a classifier trained on "
    "phi(x) from a small part of the data does as well as one trained on all of it?"
)


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


def copy_configuration(notebook: nbformat.NotebookNode) -> str:
    """The configuration that an executed notebook ran with, as `Run.finish` wrote it; "" if it did not finish."""
    found = ""
    for output in (output for cell in notebook.cells for output in cell.get("outputs", [])):
        for about in output.get("metadata", {}).values():  # by kind of data
            found = about.get(CONFIGURATION, found) if isinstance(about, dict) else found
    return found


def picture_files(result: dict) -> list[str]:
    """The files of a notebook's figures and films."""
    return [*(f"{figure}.png" for figure in result["figures"]), *(f"{film}.gif" for film in result["films"])]


def strange_pictures(folder: Path, result: dict) -> list[Path]:
    """The pictures that a result of a run names, but whose files another run of the notebook has replaced.

    Results of older code have no digests: their pictures are taken as they are.
    """
    said = result.get("digests", {})
    found = [folder / "figures" / file for file in picture_files(result) if file in said]
    return [p for p in found if p.is_file() and hashlib.sha256(p.read_bytes()).hexdigest() != said[p.name]]


def readable(notebook: nbformat.NotebookNode, result: dict, folder: Path) -> nbformat.NotebookNode:
    """An executed notebook as the page shows it: its headline and key figure first, without what needs a kernel."""
    # what papermill injected and long-running bars are of no use to a reader
    notebook.cells = [c for c in notebook.cells if "injected-parameters" not in c.metadata.get("tags", [])]
    for output in (output for cell in notebook.cells for output in cell.get("outputs", [])):
        output.get("data", {}).pop(WIDGETS, None)  # without a kernel the line beside it says more
    notebook.metadata.pop("widgets", None)
    if result["headline"]:
        headline = html.escape(result["headline"], quote=False)
        first = f"<p><b>{headline}</b></p>\n\n{inline(folder, result)}"
        notebook.cells.insert(1, nbformat.v4.new_markdown_cell(first))
    return notebook


def inline(folder: Path, result: dict) -> str:
    """A result's key figure as an image inside the page; "" if it has none, or the file is that of another run."""
    name = result["figure"]
    path = folder / "figures" / f"{name}.png"
    if not name or not path.is_file() or path in strange_pictures(folder, result):
        return ""
    content = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{html.escape(name.replace("_", " "))}" src="data:image/png;base64,{content}">'


SMOKE = "smoke"  # the preset that only shows that every step works


def origin_line(result: dict) -> str:
    """What a run is of: its data, preset and changed settings, and the user's own phis; a warning for a trial."""
    settings, images = result["settings"], result["images"]
    counts = ", ".join(f"{count:,} {name}" for name, count in images.items()).replace("train,", "training,")
    parts = [
        f"Data: {settings['dataset']}, {settings['size']}x{settings['size']} pixels, {result['classes']} classes "
        f"({counts} images)",
        f"preset {result['preset']}",
        *([f"changed: {', '.join(f'{k}={v}' for k, v in result['changes'].items())}"] if result["changes"] else []),
        *(f"{name} (content {content})" for name, content in result["phi_files"].items()),
    ]
    text = f'<p class="origin">{html.escape(" · ".join(parts))}</p>'
    if result["preset"] == SMOKE:
        text += '<p class="note">A trial: this preset shows that every step works. Its numbers mean nothing.</p>'
    return text


def front(folder: Path, results: dict[str, dict], titles: dict[str, str]) -> str:
    """The answer, then a line for each other notebook; the key figure; and a card for each notebook.

    A card has the headline, the figure, the time, and links.
    """
    timings = folder / "timings.json"
    seconds = read_json(timings, "timings")["seconds"] if timings.is_file() else {}
    said = {
        name: html.escape(result["headline"], quote=False) for name, result in results.items() if result["headline"]
    }
    lines = {name: f'{line} <a href="#{name}">{name[:2]}</a>' for name, line in said.items()}
    first = f'<p class="first">{lines.pop(ANSWER)}</p>' if ANSWER in lines else ""
    answer = "".join(f"<li>{line}</li>" for line in lines.values())
    key = next((name for name in (KEY_NOTEBOOK, *results) if name in results and results[name]["figure"]), "")
    cards = []
    for name, result in results.items():
        took = f"{seconds[name]:.0f} s · " if name in seconds else ""
        cards.append(
            f'<div class="card"><a href="#{name}"><b>{html.escape(titles[name])}</b></a>{said.get(name, "")}'
            f"{inline(folder, result)}"
            f'<small>{took}<a href="results/{name}.json">numbers</a></small></div>'
        )
    picture = inline(folder, results[key]) if key else ""
    return f'{first}<ul class="answer">{answer}</ul>{picture}<div class="cards">{"".join(cards)}</div>'


def build_report(folder: Path, configuration: str) -> Path:
    """Write folder/report.html from the notebooks that were executed with this configuration.

    A front page (the question, each notebook's headline, key figure and time), then the notebooks. One file, offline.
    Results and executed copies of another configuration, and pictures of another run, are left out, and named.
    """
    from nbconvert import HTMLExporter
    from pygments.formatters import HtmlFormatter

    exporter = HTMLExporter(template_name="page", extra_template_basedirs=[str(TEMPLATES)])
    exporter.exclude_anchor_links = True
    ours, others = finished(folder, configuration)
    executed = {name: folder / "notebooks" / f"{name}.ipynb" for name in ours}
    # one that was run by plain papermill has its copy wherever the user put it
    copies = {name: nbformat.read(path, as_version=4) for name, path in executed.items() if path.exists()}
    others += [name for name, copy in copies.items() if copy_configuration(copy) != configuration]
    notebooks = {name: readable(copy, ours[name], folder) for name, copy in copies.items() if name not in others}
    titles = {name: first_heading(notebook) for name, notebook in notebooks.items()}
    sections = [f'<section id="{name}">{exporter.from_notebook_node(n)[0]}</section>' for name, n in notebooks.items()]
    contents = "".join(f'<li><a href="#{name}">{html.escape(title)}</a></li>' for name, title in titles.items())
    note = origin_line(next(iter(ours.values()))) if ours else ""
    if others:
        left_out = html.escape(", ".join(sorted(others)))
        note += f'<p class="note">Left out, because they were run with other settings or other code: {left_out}.</p>'
    for name in notebooks:
        if strange := ", ".join(path.name for path in strange_pictures(folder, ours[name])):
            left_out = f"Left out, because another run has replaced them in figures/: {strange}."
            note += (
                f'<p class="note">{html.escape(left_out)} <code>augdistill report --only {name[:2]}</code>, with the'
            )
            note += " settings of this page, makes them again.</p>"
    facts = read_json(folder / "config.json", "run")
    about = next(iter(ours.values()))["environment"] if ours else {}
    about = {"preset": Path(facts["preset"]).stem, "configuration": configuration, **about}
    footer = html.escape(" · ".join(f"{key}: {value}" for key, value in about.items()))
    css = (TEMPLATES / "report.css").read_text() + HtmlFormatter(style="default").get_style_defs(".highlight")
    page = f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>augdistill: {html.escape(about["preset"])}</title><style>{css}</style></head><body>
<nav><a href="#front">Report</a><ul>{contents}</ul></nav>
<main><header id="front"><h1>Augmentation by distillation</h1><p class="question">{QUESTION}</p>
{note}{front(folder, {name: ours[name] for name in notebooks}, titles)}</header>
{"".join(sections)}
<footer>{footer}</footer></main><script>{FOLLOW}</script></body></html>
"""
    target = folder / "report.html"
    write(target, page)
    return target
