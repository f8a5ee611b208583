"""Starts a worker process, and ends it with its parent. Imports nothing large, so that both work at once."""

import os
import signal
import threading
import time


def start_worker(threads: int, parent: int) -> None:
    """Set up a new worker: torch's number of threads, its end with the process `parent` (an id), and its signals."""
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the parent, which ends the workers
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # else its own children would inherit the block
    import torch  # late: it takes seconds

    torch.set_num_threads(threads)


def _end_with(parent: int) -> None:
    """End this process within a second of its parent's end, since a killed parent cannot end its workers.

    Linux's PR_SET_PDEATHSIG does not fit: it watches the *thread* that started the worker, which ends earlier.
    """
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)
