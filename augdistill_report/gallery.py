"""`augdistill figures`: publish a finished run's pictures and numbers to figures/<preset>, on purpose.

The same run gives the same bytes. A run of uncommitted code is refused: its numbers could not be made again.
"""

import json
import re
from pathlib import Path

from augdistill_report.artefacts import as_json, write
from augdistill_report.html import finished
from augdistill_report.run import configuration, run_folder, shown
from augdistill_report.runner import notebooks
from augdistill_report.settings import ROOT, Settings, preset_path


def publish(preset: str, out: str = "", gallery: Path | None = None) -> Path:
    """Copy what the run left (pictures; numbers with settings, versions, device and commit); refresh README's table."""
    folder, target = run_folder(preset, out), (gallery or ROOT / "figures") / preset_path(preset).stem
    if not (folder / "config.json").exists():
        raise ValueError(f"{folder} holds no run: make one first (augdistill report --preset {preset})")
    settings = Settings.from_dict(json.loads((folder / "config.json").read_text())["settings"])
    ours, _ = finished(folder, configuration(settings))
    missing = [path.stem for path in notebooks() if path.stem not in ours]
    if missing:
        raise ValueError(
            f"{folder}: {', '.join(missing)} not finished with its settings and this code; run augdistill report"
        )
    for name, result in ours.items():
        if result["environment"]["uncommitted"] or not result["environment"]["commit"]:
            raise ValueError(f"{name} was run from uncommitted code: commit, run the report again, then publish")
    if len({result["environment"]["commit"] for result in ours.values()}) > 1:
        raise ValueError(f"{folder}: its notebooks ran at different commits; run the report again, then publish")
    for name, result in ours.items():
        write(target / f"{name}.json", as_json(result))
        for figure in result["figures"]:
            write(target / f"{figure}.png", (folder / "figures" / f"{figure}.png").read_bytes())
    if gallery is None:
        readme = ROOT / "README.md"
        write(readme, fill(readme.read_text(encoding="utf-8"), target.name, ours))
    return target


def table(results: dict[str, dict]) -> str:
    """README's two tables from a published run: methods on the base images, and methods by fraction of the data."""
    base = scores(results["03_phi_distillation"])
    lines = ["| trained on a few real images, each through | test accuracy |", "|---|---|"]
    lines += [f"| {name} | {score} |" for name, score in base.items()]
    parts = {tuple(name.rsplit(", ", 1)): score for name, score in scores(results["05_subset_evaluation"]).items()}
    parts = {key: score for key, score in parts.items() if not key[0].startswith("gain")}
    fractions = sorted({part for _, part in parts}, key=lambda part: float(part.rstrip("%")))
    lines += ["", "| part of the data | " + " | ".join(fractions) + " |", "|---" * (len(fractions) + 1) + "|"]
    for name in dict.fromkeys(name for name, _ in parts):
        lines.append(f"| {name} | " + " | ".join(parts.get((name, part), "") for part in fractions) + " |")
    return "\n".join(lines)


def scores(result: dict) -> dict[str, str]:
    """Every mean with its deviation that a notebook's results hold, as a person reads it."""
    return {k: shown(v) for k, v in result["numbers"].items() if isinstance(v, dict) and {"mean", "std", "n"} <= set(v)}


def fill(text: str, preset: str, results: dict[str, dict]) -> str:
    """`text` with what stands between `<!-- results: PRESET -->` and `<!-- /results -->` replaced by the tables."""
    pattern = rf"(<!-- results: {re.escape(preset)} -->\n).*?(<!-- /results -->)"
    return re.sub(pattern, lambda m: f"{m[1]}\n{table(results)}\n\n{m[2]}", text, flags=re.DOTALL)
