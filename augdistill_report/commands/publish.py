"""`augdistill figures`: publish a finished run's (or only its sweeps') pictures and numbers to figures/<preset>.

The same run gives the same bytes. A run of uncommitted code is refused: its numbers could not be made again.
"""

import json
import re
from pathlib import Path

from augdistill_report.commands.report import notebooks
from augdistill_report.files.store import as_json, write
from augdistill_report.places import NOTEBOOKS, ROOT
from augdistill_report.run import configuration, run_folder
from augdistill_report.settings import Settings, preset_path
from augdistill_report.show.page import finished
from augdistill_report.studies.grid import read_grid
from augdistill_report.studies.why import gain_points, values
from augdistill_report.work.statistics import markdown_table, over_seeds, row_label, shown


def publish(preset: str, out: str = "", gallery: Path | None = None, only: str = "") -> Path:
    """Copy what the run left (pictures, films, numbers with settings, versions and commit); refresh README's table.

    `only` publishes the notebooks whose numbers it lists ("01,02") and nothing else: no sweeps, no table.
    """
    folder, target = run_folder(preset, out), (gallery or ROOT / "figures") / preset_path(preset).stem
    if not (folder / "config.json").exists():
        raise ValueError(f"{folder} holds no run: make one first (augdistill report --preset {preset})")
    settings = Settings.from_dict(json.loads((folder / "config.json").read_text())["settings"])
    ours, _ = finished(folder, configuration(settings))
    chosen = [path.stem for path in notebooks(only)]
    missing = [name for name in chosen if name not in ours]
    if missing:
        raise ValueError(
            f"{folder}: {', '.join(missing)} not finished with its settings and this code; run augdistill report"
        )
    ours = {name: ours[name] for name in chosen}
    for name, result in ours.items():
        if result["environment"]["uncommitted"] or not result["environment"]["commit"]:
            raise ValueError(f"{name} was run from uncommitted code: commit, run the report again, then publish")
    if len({result["environment"]["commit"] for result in ours.values()}) > 1:
        raise ValueError(f"{folder}: its notebooks ran at different commits; run the report again, then publish")
    for name, result in ours.items():
        write(target / f"{name}.json", as_json(result))
        for file in [*(f"{name}.png" for name in result["figures"]), *(f"{name}.gif" for name in result["films"])]:
            write(target / file, (folder / "figures" / file).read_bytes())
    if not only and any(folder.glob("sweeps/*/*.json")):
        publish_sweeps(preset, out, gallery)
    if not only and gallery is None:
        readme = ROOT / "README.md"
        write(readme, fill(readme.read_text(encoding="utf-8"), target.name, ours))
    return target


def publish_sweeps(preset: str, out: str = "", gallery: Path | None = None) -> Path:
    """Copy the JSON and the picture of every sweep in a run's folder; a `ValueError` if there is none."""
    folder, target = run_folder(preset, out), (gallery or ROOT / "figures") / preset_path(preset).stem
    found = {path: json.loads(path.read_text()) for path in sorted(folder.glob("sweeps/*/*.json"))}
    if not found:
        raise ValueError(f"{folder} holds no sweep: make one first (augdistill sweep GRID.yaml --preset {preset})")
    for path, result in found.items():
        if result["environment"]["uncommitted"] or not result["environment"]["commit"]:
            raise ValueError(f"{path.stem} was swept with uncommitted code: commit, sweep again, then publish")
    for path in found:
        for file in (path, path.with_suffix(".png")):
            write(target / file.name, file.read_bytes())
    if gallery is None:
        readme = ROOT / "README.md"
        write(readme, fill_study(readme.read_text(encoding="utf-8"), target.parent))
    return target


STUDY = "why_phi_failed"


def study_table(gallery: Path) -> str:
    """README's table of the study: what phi adds to the accuracy, by row (those of its short form) and data set."""
    found = {path.parent.name: json.loads(path.read_text()) for path in sorted(gallery.glob(f"*/{STUDY}.json"))}
    sets = sorted(found, key=lambda name: (name != "digits", name != "fashion-small", name))

    def gain(cells: list[dict], row: tuple[str, str]) -> str:
        gains = values(cells, row, "gain")
        return gain_points(gains) if gains else "refused" if row in over_seeds(cells) else "not run"

    rows = read_grid(NOTEBOOKS / "sweeps" / f"{STUDY}.yaml").short
    table = [
        {"gain over the real images": row_label(row)} | {name: gain(found[name]["cells"], row) for name in sets}
        for row in rows
    ]
    return markdown_table(table).rstrip() if found else ""


def fill_study(text: str, gallery: Path) -> str:
    """`text` with what stands between `<!-- study -->` and `<!-- /study -->` replaced by the study's table."""
    pattern = r"(<!-- study -->\n).*?(<!-- /study -->)"
    return re.sub(pattern, lambda m: f"{m[1]}\n{study_table(gallery)}\n\n{m[2]}", text, flags=re.DOTALL)


def result_tables(results: dict[str, dict]) -> str:
    """README's tables from a published run: methods on the base images, by fraction of the data, on unseen images."""
    base = scores(results["03_phi_distillation"])
    subsets, unseen = (results[name]["numbers"] for name in ("05_subset_evaluation", "07_unseen_images"))
    by_fraction = subsets["test accuracy"]["equal updates"]
    fractions = sorted({fraction for found in by_fraction.values() for fraction in found}, key=float)
    tables = [
        [{"trained on a few real images, each through": name, "test accuracy": score} for name, score in base.items()],
        [
            {"subset": subsets["methods"][name]} | {f"{100 * float(f):g} %": found.get(f, "") for f in fractions}
            for name, found in by_fraction.items()
        ],
        [
            {"a few images that no phi has seen, each through": name, "test accuracy": score}
            for name, score in unseen["test accuracy"].items()
        ],
    ]
    return "\n".join(map(markdown_table, tables)).rstrip()


def scores(result: dict) -> dict[str, str]:
    """Every mean with its deviation that a notebook's results hold, as a person reads it."""
    return {k: shown(v) for k, v in result["numbers"].items() if isinstance(v, dict) and {"mean", "std", "n"} <= set(v)}


def fill(text: str, preset: str, results: dict[str, dict]) -> str:
    """`text` with what stands between `<!-- results: PRESET -->` and `<!-- /results -->` replaced by the tables."""
    pattern = rf"(<!-- results: {re.escape(preset)} -->\n).*?(<!-- /results -->)"
    return re.sub(pattern, lambda m: f"{m[1]}\n{result_tables(results)}\n\n{m[2]}", text, flags=re.DOTALL)
