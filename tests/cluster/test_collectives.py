"""Rows of all ranks on every rank, however many each has, and the gradient that one process would have."""

import pytest
import torch
import torch.distributed as dist

from cluster.collectives import all_gather, all_gather_with_grad, all_reduce_sum, rank
from tests.ranks import on_ranks

ROWS = {1: [3], 2: [1, 4], 4: [3, 1, 5, 2]}


def everything(world):
    count = sum(ROWS[world])
    return torch.arange(2.0 * count).reshape(count, 2).sin(), torch.tensor([[0.5, -1.0], [2.0, 0.3]])


def loss_of(mine, gathered, number):
    """Every rank wants something else of all rows."""
    return (number + 1) * (mine @ gathered.T).tanh().pow(2).sum()


def uneven(world, told):
    """(rows of all, gradient of the weight summed over ranks, of this rank's own rows), `told` how many there are or not."""
    inputs, weight = everything(world)
    weight.requires_grad_()
    own = (inputs.split(ROWS[world])[rank()] @ weight).requires_grad_()
    own.retain_grad()
    rows = ROWS[world] if told else None
    loss_of(own, all_gather_with_grad(own, rows), rank()).backward()
    flags = all_gather(torch.full((ROWS[world][rank()],), rank() % 2 == 0), rows)
    none = all_gather(torch.ones(rank(), 3))  # the first has nothing
    gradients = all_gather(own.grad, rows)
    return all_gather(own, rows), all_reduce_sum(weight.grad), gradients, flags, len(none)


def both(world):
    return [uneven(world, told) for told in (False, True)]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_uneven_rows_have_the_values_and_gradients_of_one_process(world):
    inputs, weight = everything(world)
    weight.requires_grad_()
    rows = inputs @ weight
    rows.retain_grad()
    sum(loss_of(part, rows, number) for number, part in enumerate(rows.split(ROWS[world]))).backward()
    for gathered, gradient, own, flags, none in on_ranks(both, world, world):
        torch.testing.assert_close(gathered, rows.detach())
        torch.testing.assert_close(gradient, weight.grad)
        torch.testing.assert_close(own, rows.grad)
        assert flags.tolist() == [number % 2 == 0 for number, count in enumerate(ROWS[world]) for _ in range(count)]
        assert none == sum(range(world))


def test_without_a_group_there_is_nobody_to_ask():
    assert not dist.is_initialized()
    rows = torch.ones(2, 3, requires_grad=True)
    assert all_gather_with_grad(rows) is rows and not all_gather(rows).requires_grad
