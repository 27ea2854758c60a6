"""Muon: orthogonal updates of filters, Adam for the rest."""

import pytest
import torch

from training.muon import ADAM_BETAS, ADAM_EPS, UPDATE_RMS, Muon, orthogonalize


@pytest.mark.parametrize("shape", [(8, 8), (8, 72), (16, 40)])
def test_orthogonalize_keeps_the_directions_and_evens_out_the_lengths(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    actual = orthogonalize(matrix)
    values = torch.diagonal(left.T @ actual @ right.T)
    assert 0.6 < values.min() and values.max() < 1.3
    assert (left.T @ actual @ right.T - torch.diag(values)).abs().max() < 1e-4


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_filters_are_matrices_of_one_row_each_in_any_memory_format(memory_format):
    weight = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(2))
    filters = torch.nn.Parameter(weight.contiguous(memory_format=memory_format))
    optimizer = Muon([{"params": [filters], "orthogonal": True, "lr": 1.0}])
    filters.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(3)).contiguous(
        memory_format=memory_format)
    desired = weight - UPDATE_RMS * 6.0 * orthogonalize(filters.grad.reshape(6, -1)).reshape(weight.shape)
    optimizer.step()
    torch.testing.assert_close(filters.detach(), desired, rtol=1e-5, atol=1e-5)


def test_the_rest_learns_by_adam():
    generator = torch.Generator().manual_seed(4)
    start, gradients = torch.randn(7, generator=generator), torch.randn(5, 7, generator=generator)
    pair = [torch.nn.Parameter(start.clone()) for _ in range(2)]
    optimizers = [Muon([{"params": [pair[0]], "lr": 0.1}]),
                  torch.optim.Adam([pair[1]], 0.1, ADAM_BETAS, ADAM_EPS)]
    for gradient in gradients:
        for parameter, optimizer in zip(pair, optimizers):
            parameter.grad = gradient.clone()
            optimizer.step()
    torch.testing.assert_close(pair[0], pair[1])
