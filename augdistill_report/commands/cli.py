"""The command `augdistill`: runs a subcommand, and turns errors, Ctrl-C and SIGTERM into a message and an exit code.

What each subcommand takes and does is in `subcommands`.
"""

import argparse
import contextlib
import importlib
import logging
import os
import signal
import sys
from collections.abc import Callable

from augdistill_report.commands.failures import NotebookFailed
from augdistill_report.commands.subcommands import SUBCOMMANDS

STOPPED = "augdistill: stopped; what was finished is kept, the same command goes on from there"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options of a subcommand, with `run`: its action."""
    about = "Learns augmentations by matching training trajectories, and compares them with other methods."
    parser = argparse.ArgumentParser(prog="augdistill", description=about)
    several = parser.add_subparsers(dest="command", required=True)
    for name, (add, what) in SUBCOMMANDS.items():
        command = several.add_parser(name, help=what)
        command.set_defaults(run=add(command))
    return parser.parse_args(arguments)


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
    own = contextlib.ExitStack()
    try:
        with contextlib.suppress(ImportError):  # the action says which package it lacks
            importlib.import_module(f"augdistill_report.commands.{options.command}")
        if whole:
            from augdistill_report.work.scratch import scratch  # late: wrong options answer without it

            on_stop(signal.default_int_handler)
            own.enter_context(scratch())
        return options.run(options) or 0
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


if __name__ == "__main__":
    sys.exit(main())
