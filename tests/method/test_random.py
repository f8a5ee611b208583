"""Seeds and minibatches."""

import itertools

import pytest
import torch

from augdistill_core import (
    minibatches,
    seeded,
)
from augdistill_method.random import randn


def test_streams_depend_on_their_whole_path():
    def draw(*path):
        return torch.rand((), generator=seeded(*path)).item()

    paths = [(0,), (1,), (0, "a"), (0, "b"), (0, "a", 0), (0, "a", 1), ("0", "a")]
    assert len({draw(*p) for p in paths}) == len(paths) and draw(0, "a") == draw(0, "a")


def test_minibatches_are_a_new_permutation_each_epoch():
    epochs = [list(itertools.islice(stream, 3)) for stream in [minibatches(10, 4, seeded(0))] * 2]
    assert [[len(b) for b in epoch] for epoch in epochs] == [[4, 4, 2]] * 2
    orders = [torch.cat(epoch).tolist() for epoch in epochs]
    assert orders[0] != orders[1] and sorted(orders[0]) == sorted(orders[1]) == list(range(10))


@pytest.mark.parametrize("batch", [0, 10, 11])
def test_a_full_batch_keeps_the_order(batch):
    for index in itertools.islice(minibatches(10, batch, seeded(0)), 3):
        assert index.tolist() == list(range(10))


def test_randn_takes_type_and_shape_from_its_image():
    like = torch.zeros(2, 3, dtype=torch.float64)
    assert torch.equal(randn(like, seeded(0)), torch.randn(2, 3, generator=seeded(0), dtype=torch.float64))
    assert randn(like, seeded(0), (5,)).shape == (5,)
