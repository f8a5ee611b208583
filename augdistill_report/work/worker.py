"""How a worker process starts, and that it ends with its parent. Imports nothing large, so that this holds at once."""

import os
import signal
import threading
import time


def start_worker(threads: int, parent: int) -> None:
    """Called in a new worker, with torch's number of threads and the process id of its parent."""
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the parent, which ends the workers
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # the block is not for what a worker starts
    import torch  # late: it takes seconds

    torch.set_num_threads(threads)


def _end_with(parent: int) -> None:
    """End this process within a second of its parent's end: a killed parent cannot end its workers.

    Not by Linux's PR_SET_PDEATHSIG, which looks at the *thread* that started the worker: threads end earlier.
    """
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)
