"""`augdistill publish`: copies a finished run's pictures and numbers, its sweeps and campaigns, to figures/<preset>.

It also writes the tables of README and docs/results.md, and figures/README.md, which shows every picture with the
command, commit and versions that made it. The same run gives the same bytes. Results of uncommitted code are refused,
since nobody could reproduce them. Everything is read and checked before anything is written.
"""

import json
import re
import shlex
from pathlib import Path

from augdistill_report.commands.report import notebooks
from augdistill_report.files.sealed_json import read_json
from augdistill_report.files.store import write
from augdistill_report.places import NOTEBOOKS, ROOT
from augdistill_report.run import configuration, folder_config, run_folder
from augdistill_report.settings import Settings, preset_path
from augdistill_report.show.page import finished, picture_files, strange_pictures
from augdistill_report.studies.grid import read_grid
from augdistill_report.studies.subset_methods import FULL, NONE
from augdistill_report.studies.why import gain_points, values
from augdistill_report.work.statistics import (
    Difference,
    markdown_table,
    mean_and_std,
    over_seeds,
    row_label,
    shown,
    unpaired,
)

FIGURES, PAGES = ROOT / "figures", (ROOT / "docs" / "results.md", ROOT / "README.md")


def publish(preset: str, out: str = "", only: str = "", name: str = "", gallery: Path = FIGURES) -> Path:
    """Copy a finished run's results and pictures, and its sweeps, to `gallery`/<name>; returns that folder.

    `name` is the preset's by default. `only` lists what to publish: numbers of notebooks ("01,02"), "sweeps", or
    "campaigns". The pages are written if the gallery is figures/. A `ValueError` if results are missing or damaged, or
    come from other settings, uncommitted code or several commits, or if another run has replaced one of their pictures.
    """
    folder, target = run_folder(preset, out), gallery / (name or preset_path(preset).stem)
    if target.parent != gallery:
        raise ValueError(f"as={name!r}: must be the name of a folder in {gallery}, without a path")
    ours = {} if only in ADDED else run_results(folder, preset, only)
    added = {
        path: result for kind in ADDED if only in ("", kind) for path, result in added_results(folder, kind).items()
    }
    if not ours and not added:
        raise ValueError(f"{folder} holds no {only}: make one first (augdistill {only.removesuffix('s')} --help)")
    files: dict[Path, Path] = {}  # source by target
    for title, result in ours.items():
        files[target / f"{title}.json"] = folder / "results" / f"{title}.json"
        files |= {target / picture: folder / "figures" / picture for picture in picture_files(result)}
        for strange in strange_pictures(folder, result):
            raise ValueError(
                f"{strange}: another run of {title} has replaced the picture of these results; "
                f"run augdistill report --only {title[:2]} again with the same settings, then publish"
            )
    files |= {target / file.name: file for path in added for file in (path, path.with_suffix(".png"))}
    now = {f"{target.name}/{title}": result for title, result in ours.items()}
    now |= {f"{target.name}/{path.stem}": result for path, result in added.items()}
    pages = {page: fill(page.read_text(encoding="utf-8"), now) for page in PAGES if gallery == FIGURES}
    contents = {}
    for copy, source in files.items():
        if not source.is_file():
            raise ValueError(f"{source}: is missing; run augdistill report (or sweep) again, then publish")
        contents[copy] = source.read_bytes()
    for copy, content in contents.items():
        write(copy, content)
    for page, text in pages.items():
        write(page, text)
    if pages:
        write(FIGURES / "README.md", gallery_page())
    return target


def run_results(folder: Path, preset: str, only: str) -> dict[str, dict]:
    """The chosen notebooks' results by name; a `ValueError` unless all are of the run's settings and one commit."""
    config = folder_config(folder)
    if not config:
        raise ValueError(f"{folder} holds no run: make one first (augdistill report --preset {preset})")
    try:
        settings = Settings.from_dict(config["settings"])
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'}: {error}; run augdistill report again, then publish") from None
    found, _ = finished(folder, configuration(settings))
    chosen = [path.stem for path in notebooks(only)]
    if missing := [name for name in chosen if name not in found]:
        raise ValueError(
            f"{folder}: {', '.join(missing)} not finished with its settings and this code; run augdistill report"
        )
    for name in chosen:
        if not is_committed(found[name]):
            raise ValueError(f"{name} was run from uncommitted code: commit, run the report again, then publish")
    if len({found[name]["environment"]["commit"] for name in chosen}) > 1:
        raise ValueError(f"{folder}: its notebooks ran at different commits; run the report again, then publish")
    return {name: found[name] for name in chosen}


ADDED = {"sweeps": "sweeps/*/*.json", "campaigns": "campaigns/*.json"}  # files of a run's folder besides its results


def added_results(folder: Path, kind: str) -> dict[Path, dict]:
    """A run's sweeps or campaigns (no trials) by file; a `ValueError` if one is damaged, or of uncommitted code."""
    paths = sorted(folder.glob(ADDED[kind]))
    found = {path: read_sweep(path) if kind == "sweeps" else read_json(path, "campaign") for path in paths}
    found = {path: result for path, result in found.items() if not result.get("tiny")}
    for path, result in found.items():
        if not is_committed(result):
            raise ValueError(f"{path} was made with uncommitted code: commit, make it again, then publish")
    return found


def read_sweep(path: Path) -> dict:
    """The results of a sweep from its file; a `ValueError` if it is damaged or that of another grid."""
    result = read_json(path, "sweep")
    if Path(result["grid"]).stem != path.stem:
        raise ValueError(f"{path}: holds what the grid {result['grid']} found; delete it and sweep again")
    return result


def is_committed(result: dict) -> bool:
    """Whether a result was made by committed code."""
    return bool(result["environment"]["commit"]) and not result["environment"]["uncommitted"]


# --- the tables of README and docs/results.md -------------------------------------------------------------------------

STUDY = "why_phi_failed"

SCORES = "scoreboard"  # the folder of what `augdistill score --publish` writes


def fill(text: str, now: dict[str, dict] | None = None) -> str:
    """`text` with every table between `<!-- table: KIND NAME -->` and `<!-- /table -->` written anew.

    NAME is a file of figures/ without its suffix (digits/03_phi_distillation); the study's table takes all its files.
    `now` holds, by such names, results that are published at this moment. A `ValueError` names a damaged file.
    """
    now = now or {}
    studies = {f"{path.parent.name}/{STUDY}" for path in FIGURES.glob(f"*/{STUDY}.json")}
    studies |= {name for name in now if name.partition("/")[2] == STUDY}

    def result(name: str) -> dict:
        path = FIGURES / f"{name}.json"
        kind = "score" if path.parent.name == SCORES else "results"
        return now.get(name) or (read_sweep(path) if name in studies else read_json(path, kind))

    def table(match: re.Match) -> str:
        kind, *names = match[2].split()
        found = {name: result(name) for name in names or sorted(studies)}
        return f"{match[1]}\n{markdown_table(TABLES[kind](found))}\n{match[3]}"

    return re.sub(r"(<!-- table: (.*?) -->\n).*?(<!-- /table -->)", table, text, flags=re.DOTALL)


def images_table(found: dict[str, dict]) -> list[dict]:
    """Test accuracy on a few real images, a row a method (notebook 03)."""
    (result,) = found.values()
    scores = {k: v for k, v in result["numbers"].items() if isinstance(v, dict) and {"mean", "std", "n"} <= set(v)}
    return [{"ten real images, through": name, "test accuracy": score} for name, score in scores.items()]


def subsets_table(found: dict[str, dict]) -> list[dict]:
    """Test accuracy and the gain over no augmentation, by method and subset (notebook 05)."""
    (result,) = found.values()
    numbers = result["numbers"]
    scores, gains = numbers["test accuracy"]["equal updates"], numbers["gain over no augmentation"]
    fractions = sorted({fraction for by_fraction in scores.values() for fraction in by_fraction}, key=float)

    def cell(id: str, fraction: str) -> str:
        its = gains.get(id, {}).get(fraction)
        gain = f"; {Difference(its['gain'], its['interval'], its['over'])}" if its else ""
        return shown(scores[id][fraction]) + gain if fraction in scores[id] else ""

    return [
        {"test accuracy; gain (points, 95 % CI)": numbers["methods"][id]}
        | {subset_title(result, fraction): cell(id, fraction) for fraction in fractions}
        for id in scores
    ]


def subset_title(result: dict, fraction: str) -> str:
    """A subset as the title of a column: "10 % (450 a class)"."""
    each = float(fraction) * result.get("images", {}).get("train", 0) / result.get("classes", 1)
    about = "" if each == round(each) else "about "
    return f"{100 * float(fraction):g} %" + (f" ({about}{each:,.0f} a class)" if each and float(fraction) < 1 else "")


def settings_table(found: dict[str, dict]) -> list[dict]:
    """What the runs of notebook 05 had in common and what not: a row a run."""
    rows = []
    for name, result in found.items():
        s = result["settings"]
        taught = s.get("taught_augment") or s["teach"]  # its name in older files
        rows.append(
            {
                "run": f"`{name.partition('/')[0]}`",
                "data": f"{s['dataset']} {s['size']}x{s['size']}",
                "experts": f"{s['experts']} of {s['epochs']} epochs",
                "experts' augmentation": taught,
                "iterations of phi; of policies, labels, images under augmentation": (
                    f"{s['subset_iterations']}; {s['policy_iterations']}"
                ),
                "students": f"width {s['width']}, {s['subset_eval_steps']:,} steps",
                "subsets x students": f"{s['subset_repeats']} x {s['eval_students']}",
            }
        )
    return rows


FRONT_ROWS = {  # of README's table: how it names a row, and the row's id
    "no augmentation": "none",
    "RandAugment": "randaugment",
    "distilled pixels (MTT)": "pixels_mtt",
    "phi: U-Net with noise": "phi",
    "phi: free images + the experts' augmentation": "pixels_augmented",
    "real images, mixed labels + the experts' augmentation": "mixed_labels",
    "real images, soft labels + the experts' augmentation": "soft_augmented",
}


def front_table(found: dict[str, dict]) -> list[dict]:
    """README's table: test accuracy by method, a column for each subset of each data set (notebook 05)."""
    rows = {label: {"test accuracy in % (mean ± standard deviation)": label} for label in [*FRONT_ROWS, FULL.label]}
    for result in found.values():
        scores = result["numbers"]["test accuracy"]["equal updates"]
        for fraction in sorted(set(scores[NONE]), key=float):
            size = result["settings"]["size"]
            column = f"{result['settings']['dataset']} {size}x{size}, {100 * float(fraction):g} %"
            for label, id in [*FRONT_ROWS.items(), (FULL.label, FULL.id)]:
                score = scores.get(id, {}).get("1" if id == FULL.id else fraction)
                rows[label][column] = "" if score is None else mean_and_std(score["values"], unit=100)
    return list(rows.values())


BESIDE_FULL = (  # ids of rows
    *("none", "experts_augmentation", "crop_flip", "randaugment"),
    *("policy", "soft_augmented", "mixed_labels", "learned_labels", "pixels_augmented"),
)


def full_table(found: dict[str, dict]) -> list[dict]:
    """What a few methods give minus what all the data give, a column for each subset of each file (notebook 05).

    The methods are fixed: the best of many would be above all the data by chance. "Equivalent": the interval is within
    .5 points of 0.
    """
    rows: dict[str, dict] = {}
    for name, result in found.items():
        scores, settings = result["numbers"]["test accuracy"]["equal updates"], result["settings"]
        for fraction in sorted(scores[NONE], key=float):
            column = f"{name.partition('/')[0]}, {100 * float(fraction):g} %, {settings['subset_eval_steps']:,} steps"
            for id in BESIDE_FULL:
                if values := scores.get(id, {}).get(fraction, {}).get("values"):
                    each = len(values) // settings["subset_repeats"]
                    trials = [values[start : start + each] for start in range(0, len(values), each)]
                    its = unpaired(trials, scores[FULL.id]["1"]["values"])
                    label = {"minus all the data (points, 95 % CI)": result["numbers"]["methods"][id]}
                    rows.setdefault(id, label)[column] = f"{its}{' (equivalent)' * its.equivalent}"
    return [rows[id] for id in BESIDE_FULL if id in rows]


def scores_table(found: dict[str, dict]) -> list[dict]:
    """What a set gives, and the real images that stand beside it: test accuracy, and how many images that is."""
    columns = ("the set", "random", "random, same bytes", "best window", "all the data")
    table = []
    for result in found.values():
        rows = {name: result["rows"][name] for name in columns if name in result["rows"]}
        cells = {name: f"{shown(row['accuracy'])}; {row['images']:,} images" for name, row in rows.items()}
        table.append({"set": f"{result['name']}, {result['data']} {result['size']}x{result['size']}"} | cells)
    return table


def unseen_table(found: dict[str, dict]) -> list[dict]:
    """Test accuracy on a few images that no phi has seen (notebook 07)."""
    (result,) = found.values()
    scores = result["numbers"]["test accuracy"]
    return [{"ten unseen images, through": name, "test accuracy": score} for name, score in scores.items()]


def study_table(found: dict[str, dict]) -> list[dict]:
    """What phi adds to the test accuracy, by row of the study's short form and by preset (notebook 04)."""
    columns = {}  # by preset, with what was changed in it
    for name, result in found.items():
        columns[name] = ", ".join([name.partition("/")[0], *(f"{k} {v}" for k, v in result.get("changes", {}).items())])
    cells = {columns[name]: result["cells"] for name, result in found.items()}
    presets = sorted(cells, key=lambda name: (name != "digits", name != "fashion-small", name))

    def gain(cells: list[dict], row: tuple[str, str]) -> str:
        gains = values(cells, row, "gain")
        return gain_points(gains) if gains else "refused" if row in over_seeds(cells) else "not run"

    rows = read_grid(NOTEBOOKS / "sweeps" / f"{STUDY}.yaml").short
    return [
        {"gain over the real images": row_label(row)} | {name: gain(cells[name], row) for name in presets}
        for row in rows
    ]


TABLES = {
    "front": front_table,
    "full": full_table,
    "images": images_table,
    "scores": scores_table,
    "settings": settings_table,
    "subsets": subsets_table,
    "unseen": unseen_table,
    "study": study_table,
}


# --- figures/README.md ------------------------------------------------------------------------------------------------

BENCHMARKS = "benchmarks"  # the folder of what `make bench` writes


def gallery_page() -> str:
    """figures/README.md: for each published file the command, commit, versions and CPU time; and the pictures."""
    parts = [
        "# Published figures and numbers\n",
        "Written by `augdistill publish`. A JSON file holds the numbers behind the pictures of its line, with n, "
        "settings and versions. The command makes all of them again; the commit is that of the code that did. "
        "`augdistill publish --preset NAME` then copies them here. The time is that of the jobs on one core, without "
        "the experts.\n",
    ]
    for folder in sorted(path for path in FIGURES.iterdir() if path.is_dir()):
        files = sorted(folder.glob("*.json"))
        rows = [origin_row(path) for path in files]
        images = sorted([*folder.glob("*.png"), *folder.glob("*.gif")])
        shown = [
            f'<a href="{folder.name}/{p.name}"><img src="{folder.name}/{p.name}" height="150"></a>' for p in images
        ]
        parts += [f"## {folder.name}\n", f"{markdown_table(rows)}\n", *([" ".join(shown) + "\n"] if shown else [])]
    return "\n".join(parts)


def set_arguments(changes: dict) -> str:
    """Changed settings as options of a command."""
    return "".join(f" --set {shlex.quote(f'{key}={value}')}" for key, value in changes.items())


def origin_row(path: Path) -> dict:
    """A published JSON file's line in figures/README.md."""
    link = f"[{path.stem}]({path.parent.name}/{path.name})"
    if path.parent.name == BENCHMARKS:
        facts, command = json.loads(path.read_text(encoding="utf-8")), "make bench"
    elif "grid" in (raw := json.loads(path.read_text(encoding="utf-8"))):
        facts = read_sweep(path)
        command = f"augdistill sweep notebooks/sweeps/{raw['grid']} --preset {raw['preset']}"
        command += " --short" if raw["short"] else ""
        command += set_arguments(raw.get("changes", {}))  # older files do not have them
        command += "".join(f" --row {shlex.quote(row)}" for row in raw.get("only", []))
        facts["seconds"] = sum(cell.get("seconds", 0.0) for cell in raw["cells"])
    elif raw["kind"] == "campaign":
        facts = read_json(path, "campaign")
        command = f"augdistill campaign {raw['campaign']}{set_arguments(raw['changes'])}"
        facts["seconds"] = sum(row.get("seconds", 0.0) for row in raw["rows"])
    elif raw["kind"] == "score":
        facts = read_json(path, "score")
        command = facts["command"]
    else:
        facts = read_json(path, "results")
        command = (
            f"augdistill report --preset {facts['preset']} --only {path.stem[:2]}{set_arguments(facts['changes'])}"
        )
    about = facts["environment"]
    minutes = f"{facts['seconds'] / 60:.0f}" if facts.get("seconds") else ""
    versions = f"Python {about['python']}, torch {about['torch']}, {about['device']}"
    return {"numbers": link, "command": f"`{command}`", "commit": about["commit"][:8], "versions": versions} | {
        "minutes": minutes
    }
