"""The command `augdistill`: `report` runs the notebooks, `sweep` runs one notebook over a grid, `publish` copies a run
to figures/, `campaign` makes a list of results in order of value within a time limit, `app` serves the explorer, `data`
checks or downloads a data set, `experts` trains, checks or imports experts, `apply` augments images with a phi, `score`
says what a distilled set is worth, `export` writes one."""

import argparse
import contextlib
import logging
import os
import signal
import sys
from collections.abc import Callable


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="augdistill", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    report = commands.add_parser("report", help="run the notebooks, then write one HTML page")
    report.add_argument("--track", default="", metavar="NAME", help="also log curves to trackio, wandb or tensorboard")
    sweep = commands.add_parser("sweep", help="run a notebook for every point of a grid")
    sweep.add_argument("grid", metavar="GRID.yaml", help="the grid: the notebook, and the settings that vary")
    sweep.add_argument("--row", action="append", default=[], metavar="NAME", help="only this row; repeatable")
    sweep.add_argument("--short", action="store_true", help="only the rows that the grid lists under `short`")
    campaign = commands.add_parser("campaign", help="make a list of results in order of value, within a time limit")
    campaign.add_argument("name", metavar="NAME", help="a list in notebooks/campaigns, or a .yaml file")
    campaign.add_argument("--minutes", type=float, default=7.0, metavar="M", help="the time limit (7)")
    campaign.add_argument("--device", default="", metavar="cpu|cuda", help="default: as in the preset")
    campaign.add_argument("--tiny", action="store_true", help="a trial in a minute, with numbers that mean nothing")
    campaign.add_argument("--out", default="", metavar="DIR", help="the run's folder (runs/<preset>)")
    app = commands.add_parser("app", help="serve the explorer (notebook 06) to a browser on this machine")
    app.add_argument("--port", type=int, default=8866, metavar="N", help="or one near it, if it is in use (8866)")
    app.add_argument("--no-browser", action="store_true", help="only print the address, with its token")
    for command in (report, sweep):
        add_cluster(command)
    for command in (report, sweep, campaign, app):
        command.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting")
    for command in (report, sweep):
        again = "repeat finished cells" if command is sweep else "repeat finished work"
        command.add_argument("--fresh", action="store_true", help=again)
    publish = commands.add_parser("publish", help="copy a finished run to figures/, and write docs/results.md")
    publish.add_argument("--as", dest="name", default="", metavar="NAME", help="its folder in figures/ (the preset's)")
    report.add_argument("--only", default="", metavar="02,03", help="only these notebooks")
    publish.add_argument("--only", default="", metavar="02,03", help="only these notebooks, or: sweeps, campaigns")
    for command in (report, sweep, publish, app):
        default = "" if command is sweep else "digits"
        command.add_argument("--preset", default=default, help="a name in notebooks/presets, or a .yaml file")
        command.add_argument("--out", default="", metavar="DIR", help="the run's folder (runs/<preset>)")
    apply = commands.add_parser("apply", help="augment a data set's images with a saved phi")
    apply.add_argument("phi", metavar="PHI", help="a phi's file: runs/<preset>/phis/<name>.safetensors")
    apply.add_argument("--to", required=True, metavar="WHAT", help="a data set (training split), or folder of classes")
    apply.add_argument("--out", required=True, metavar="DIR", help="the output folder, a sub-folder for each class")
    apply.add_argument("--copies", type=int, default=1, metavar="K", help="augmented copies of each image (1)")
    apply.add_argument("--count", type=int, default=0, metavar="N", help="only the first N images of each class")
    apply.add_argument("--seed", type=int, default=0, metavar="S", help="the same seed makes the same images (0)")
    apply.add_argument("--strength", type=float, metavar="L", help="x + L (phi(x) - x); default: as in the file")
    apply.add_argument("--probability", type=float, metavar="P", help="of applying phi; default: as in the file")
    apply.add_argument("--set", action="append", default=[], metavar="phis=FILE", help="files that register your phis")
    apply.add_argument("--data", default="", metavar="DIR", help="its folder (AUGDISTILL_DATA, or the cache)")
    add_score(commands.add_parser("score", help="test students trained on a distilled set, and what stands beside it"))
    add_export(commands.add_parser("export", help="write what a run has distilled, in a form that others read"))
    data = commands.add_parser("data", help="check a data set, or download one")
    data = data.add_subparsers(dest="what", required=True)
    check = data.add_parser("check", help="read a complete data set and describe it")
    check.add_argument("--size", type=int, default=0, help="resize its images to this many pixels (0: no)")
    fetch = data.add_parser("fetch", help="download a missing data set; no other command does")
    fetch.add_argument("--mirror", default="", metavar="URL", help="a web folder with its files")
    for command in (check, fetch):
        command.add_argument("name", help="a data set's name, or (check) folder:PATH")
        command.add_argument("--data", default="", metavar="DIR", help="its folder (AUGDISTILL_DATA, or the cache)")
    experts = commands.add_parser("experts", help="train, list, check or import experts")
    experts = experts.add_subparsers(dest="what", required=True)
    train = experts.add_parser("train", help="train the experts that a run lacks; continues after a stop")
    show = experts.add_parser("list", help="one line per expert: its data, length, accuracy, size")
    check = experts.add_parser("check", help="read each expert completely, list damaged files (exit code 1)")
    bring = experts.add_parser("import", help="convert experts of the official MTT code, for the setting expert_files")
    bring.add_argument("files", nargs="+", metavar="replay_buffer_N.pt", help="the official code's files")
    for command in (show, check):
        command.add_argument("files", nargs="*", metavar="FILE", help="experts' files or folders (those of a run)")
    add_cluster(train)
    for command in (train, bring):
        command.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting")
    for command in (train, show, check, bring):
        needed = command is bring
        command.add_argument(
            "--preset", default="digits", required=needed, help="a name in notebooks/presets, or a .yaml"
        )
        what = "the output folder" if needed else "the run's folder (runs/<preset>)"
        command.add_argument("--out", default="", required=needed, metavar="DIR", help=what)
    return parser.parse_args(arguments)


def add_score(command: argparse.ArgumentParser) -> None:
    what = "images_best.pt (MTT), .npz, .safetensors, a folder, positions (.npy, .txt), a phi, or RUN/NOTEBOOK/ROW"
    command.add_argument("what", metavar="WHAT", help=what)
    command.add_argument("--on", default="", metavar="DATA", help="the data set to test on (a row has its own)")
    command.add_argument("--protocol", default="ours", metavar="NAME", help="ours, mtt, dc-bench, dd-ranking ...")
    command.add_argument("--preset", default="digits", help="of all other settings: the ConvNet, the experts (digits)")
    command.add_argument("--student", default="", metavar="NAME", help="convnet3, resnet18, vgg11, alexnet ...")
    command.add_argument("--students", type=int, default=0, metavar="N", help="students of each row")
    command.add_argument("--labels", default="", metavar="KIND", help="hard, probabilities, logits, or experts")
    command.add_argument("--normalisation", default="", metavar="NAME", help="pixels, own, zca, cifar10 ...")
    command.add_argument("--lr", type=float, default=0.0, help="the step size learned with the images, for mtt")
    command.add_argument("--size", type=int, default=0, help="image size in pixels, for positions")
    command.add_argument("--beside", default="random,bytes,window,all", metavar="ROWS", help="what else is scored")
    command.add_argument("--name", default="", help="what the result is called")
    command.add_argument("--out", default="", metavar="DIR", help="the folder of results (runs/<preset>)")
    command.add_argument("--publish", action="store_true", help="also write it to figures/scoreboard (committed code)")
    command.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting")


def add_export(command: argparse.ArgumentParser) -> None:
    command.add_argument("row", metavar="ROW", help="RUN/NOTEBOOK/ROW, or the file of a saved phi")
    command.add_argument("--format", required=True, metavar="FORM", help="mtt, folder, npz or safetensors")
    command.add_argument("--out", required=True, metavar="PATH", help="the file or folder to write")
    command.add_argument("--draws", type=int, default=1, metavar="K", help="draws of a stochastic phi (1)")
    command.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting (phis, data)"
    )


def add_cluster(command: argparse.ArgumentParser) -> None:
    command.add_argument("--cluster", default="", metavar="SCHEDULER", help="a Dask scheduler's address, or its .json")


def settings_changes(pairs: list[str]) -> dict[str, str]:
    changes = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise ValueError(f"--set {pair!r}: must be key=value")
        changes[key.strip()] = value.strip()
    return changes


def given(options: argparse.Namespace, *keys: str) -> dict[str, str]:
    """The settings with a command-line option of their own, as far as those options were used."""
    return {key: getattr(options, key) for key in keys if getattr(options, key)}


def serve_app(options: argparse.Namespace) -> None:
    try:
        from augdistill_report.commands.app import app
    except ImportError as error:  # an optional package
        raise ValueError(f"app: needs voila ({error}): pip install 'augdistill[app]'") from None
    app(options.preset, options.out, settings_changes(options.set), options.port, not options.no_browser)


STOPPED = "augdistill: stopped; what was finished is kept, the same command goes on from there"


def on_stop(action: Callable) -> None:
    """Set what Ctrl-C and SIGTERM do, unless this process was started with them ignored (`nohup`)."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, action)


def end_at_once(*_) -> None:
    """End the process now. During imports and at Python's exit an exception would be lost, or print a traceback."""
    with contextlib.suppress(Exception):
        sys.stdout.flush()
    os.write(2, f"\n{STOPPED}\n".encode())
    os._exit(130)


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit code.

    The code is 0, or 1 if a notebook (or every cell of a sweep) failed, 2 for a wrong argument, 130 for Ctrl-C or
    SIGTERM. Without `arguments` it takes those of the process, and also sets its signals and its temporary folder.
    """
    whole = arguments is None
    if whole:
        on_stop(end_at_once)
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # else a stop tells of the kernel's pending tasks
    options = parse(arguments)
    # imported late, so that --help and wrong arguments answer at once
    from augdistill_report.commands import apply, campaign, experts
    from augdistill_report.commands.failures import NotebookFailed
    from augdistill_report.data import datasets as data
    from augdistill_report.data import downloads
    from augdistill_report.files import expert_files
    from augdistill_report.work.scratch import scratch

    if options.command != "campaign":  # which runs without the packages of the notebooks
        from augdistill_report.commands import export, score, sweep
        from augdistill_report.commands import publish as gallery
        from augdistill_report.commands import report as runner

    own = contextlib.ExitStack()
    try:
        if whole:
            on_stop(signal.default_int_handler)
            own.enter_context(scratch())
        if options.command == "report":
            changes = settings_changes(options.set) | given(options, "track", "cluster")
            page = runner.report(options.preset, options.out, options.only, changes, options.fresh)
            print(f"report: {page}")
        elif options.command == "sweep":
            changes = settings_changes(options.set) | given(options, "cluster")
            arguments = (options.grid, options.preset, options.out, changes, options.short, options.row, options.fresh)
            folder, cells = sweep.sweep(*arguments)
            print((folder / "table.md").read_text())
            failed = sum("error" in cell for cell in cells)
            print(f"sweep: {folder} ({len(cells)} cells{f', {failed} failed' if failed else ''})")
            return 1 if failed == len(cells) else 0
        elif options.command == "campaign":
            changes = settings_changes(options.set) | given(options, "device")
            table, rows = campaign.campaign(options.name, options.minutes, options.out, changes, options.tiny)
            done = sum(row.state == campaign.DONE for row in rows)
            print(table.read_text())
            goes_on = "" if done == len(rows) else "; the same command goes on from there"
            print(f"campaign: {table} ({done} of {len(rows)} pieces done{goes_on})")
            return 1 if not done and any(row.failed for row in rows) else 0
        elif options.command == "data":
            if options.what == "fetch":
                options.size, options.data = 0, str(downloads.fetch(options.name, options.mirror, options.data))
            print(data.describe(data.load(options.name, options.size, options.data)))
            if options.name.startswith("folder:"):
                print("\nImages of another size are resized to this one, not cropped; --size gives another.")
        elif options.command == "experts":
            if options.what == "check":
                paths = experts.files_of(options.files, options.preset, options.out)
                wrong = experts.check(paths)
                print("\n".join([*wrong, f"experts: {len(paths)} checked, {len(wrong)} damaged"]))
                return 1 if wrong else 0
            if options.what == "list":
                paths = experts.files_of(options.files, options.preset, options.out)
                files = [expert_files.ExpertFile(path) for path in paths]
            elif options.what == "train":
                changes = settings_changes(options.set) | given(options, "cluster")
                files = experts.train(options.preset, options.out, changes)
            else:
                arguments = (options.files, options.preset, options.out, settings_changes(options.set))
                files = experts.import_buffers(*arguments)
            print(f"{experts.expert_table(files)}\nexperts: {files[0].path.parent}")
        elif options.command == "app":
            serve_app(options)
        elif options.command == "apply":
            apply.load_phis(settings_changes(options.set))
            how = apply.How(options.copies, options.count, options.seed)
            augment = apply.load_phi(options.phi, options.strength, options.probability)
            print(f"apply: {apply.apply(augment, options.to, options.out, how, options.data)}")
        elif options.command == "score":
            rest = {key: value for key, value in vars(options).items() if key not in ("command", "what", "set")}
            print(score.score(options.what, changes=settings_changes(options.set), **rest))
        elif options.command == "export":
            arguments = (options.row, options.format, options.out, options.draws, settings_changes(options.set))
            print(f"export: {export.export(*arguments)}")
        else:
            print(f"published: {gallery.publish(options.preset, options.out, options.only, options.name)}")
    except ValueError as error:
        print(f"augdistill: {error}", file=sys.stderr)
        return 2
    except (NotebookFailed, OSError) as error:  # OSError: for example a full disk
        print(f"augdistill: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        if whole:
            on_stop(end_at_once)  # for a second Ctrl-C
            own.close()
            end_at_once()  # inside an `exec` Python would end by SIGINT, whatever is returned here
        print(f"\n{STOPPED}", file=sys.stderr)
        return 130
    finally:
        if whole:
            on_stop(end_at_once)
        own.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
