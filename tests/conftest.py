"""What every test file shares: one thread, every warning reported each time, a check that global randomness is left."""

import contextlib

import pytest
import torch

torch.set_num_threads(1)
torch.set_warn_always(True)  # torch reports some warnings once a process, so which test failed would hang on the order


@pytest.fixture
def rng_untouched():
    """A context manager: what runs inside must neither draw from torch's global generator nor seed it."""

    @contextlib.contextmanager
    def check():
        before = torch.get_rng_state()
        yield
        assert torch.equal(before, torch.get_rng_state()), "the global random state has changed"

    return check
