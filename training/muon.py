"""Muon: momentum whose update of a weight matrix is made orthogonal; the rest of a network learns by Adam."""

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.adam import adam

MOMENTUM = 0.9
ADAM_BETAS, ADAM_EPS = (0.9, 0.99), 1e-8
UPDATE_RMS = 0.2  # root mean square of an update at a rate of 1, about Adam's: one rate serves both


def orthogonalize(matrix: Tensor) -> Tensor:
    """About U V^T of the singular value decomposition U S V^T of a matrix, (m, n): singular values come near 1 (0.7 to
    1.2). Five steps of a quintic Newton-Schulz iteration (Jordan et al., Muon, 2024)."""
    if matrix.shape[0] > matrix.shape[1]:  # products of the shorter side are smaller
        return orthogonalize(matrix.T).T
    matrix = matrix / (matrix.norm() + 1e-7)
    for _ in range(5):
        square = matrix @ matrix.T
        factor = torch.addmm(square, square, square, beta=-4.7750, alpha=2.0315)
        matrix = torch.addmm(matrix, factor, matrix, beta=3.4445)
    return matrix


class Muon(Optimizer):
    """Filters of hidden layers, (C', C, 3, 3), learn as matrices (C', C * 9) by Nesterov momentum made orthogonal, and
    scaled to the size of Adam's updates (Liu et al., arXiv 2502.16982); biases, and the filters of the picture's three
    colours, by Adam. No weight decay. groups: of parameters, each with "lr"; dtype: to iterate in, bfloat16 will do."""

    def __init__(self, groups: list[dict], dtype: torch.dtype = torch.float32) -> None:
        split = []
        for group in groups:
            for is_matrix in (True, False):
                chosen = [each for each in group["params"] if (each.dim() == 4 and len(each) > 3) == is_matrix]
                split.append(group | {"params": chosen, "orthogonal": is_matrix})
        super().__init__(split, {"lr": 1e-3})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            step = self._matrix_step if group["orthogonal"] else self._adam_step
            for weight in group["params"]:
                if weight.grad is not None:
                    step(weight, group["lr"])

    def _matrix_step(self, weight: Tensor, rate: float) -> None:
        state = self.state[weight]
        if not state:
            state["momentum"] = torch.zeros_like(weight)
        momentum = state["momentum"].mul_(MOMENTUM).add_(weight.grad)
        matrix = weight.grad.add(momentum, alpha=MOMENTUM).reshape(len(weight), -1)  # (C', C * 9)
        update = orthogonalize(matrix.to(self.dtype)).to(weight.dtype).reshape(weight.shape)
        weight.sub_(update, alpha=rate * UPDATE_RMS * max(matrix.shape) ** 0.5)

    def _adam_step(self, weight: Tensor, rate: float) -> None:
        state = self.state[weight]
        if not state:
            state.update(step=torch.zeros(()), mean=torch.zeros_like(weight), square=torch.zeros_like(weight))
        adam([weight], [weight.grad], [state["mean"]], [state["square"]], [], [state["step"]], amsgrad=False,
             beta1=ADAM_BETAS[0], beta2=ADAM_BETAS[1], lr=rate, weight_decay=0.0, eps=ADAM_EPS, maximize=False)
