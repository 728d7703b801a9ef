"""Muon: steps of weight matrices whose singular values are all alike. For training from random weights."""

import torch
from torch import nn
from transformers import TrainingArguments


# Of the odd polynomial of Jordan et al. (2024, "Muon: an optimizer for hidden layers in neural networks"): five
# iterations bring any singular value from 0.01 to 1 near 1.
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5


def orthogonalise(matrices: torch.Tensor) -> torch.Tensor:
    """`(count, rows, columns)` with the same singular vectors, and singular values between 0.7 and 1.2."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    a, b, c = _COEFFICIENTS
    for _ in range(_ITERATIONS):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x.mT if tall else x


class MuonAdamW(torch.optim.AdamW):
    """
    AdamW, but groups with `momentum` (a number; others have `None`) hold matrices that take Muon's step
    `lr * max(1, rows / columns)^0.5 * orthogonalise(Nesterov momentum of the gradient)`. `lr` is a group's own.
    In single precision: `torch.optim.Muon` computes in bfloat16, which many a processor has no instructions for.
    """

    def __init__(self, params, **kwargs):
        super().__init__([{"momentum": None, **group} for group in params], **kwargs)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            if group["momentum"] is not None:
                self._step_of_matrices(group)
        return super().step(closure)  # which passes over matrices, as their gradients are used up

    def _step_of_matrices(self, group: dict) -> None:
        alike: dict[torch.Size, list[torch.Tensor]] = {}  # one product for all matrices of a shape
        for matrix in group["params"]:
            if matrix.grad is not None:
                alike.setdefault(matrix.shape, []).append(matrix)
        for shape, matrices in alike.items():
            gradients = torch.stack([matrix.grad for matrix in matrices]).float()
            averages = []
            for matrix, gradient in zip(matrices, gradients):
                state = self.state[matrix]
                if not state:  # `step` is what AdamW looks for when it loads a state
                    state.update(step=torch.tensor(0.0), average=torch.zeros_like(gradient))
                averages.append(state["average"].lerp_(gradient, 1 - group["momentum"]))
            steps = orthogonalise(gradients.lerp(torch.stack(averages), group["momentum"]))
            size = group["lr"] * max(1, shape[0] / shape[1]) ** 0.5
            for matrix, step in zip(matrices, steps):
                matrix.mul_(1 - group["lr"] * group["weight_decay"]).sub_(size * step)
                matrix.grad = None


def muon_for(model: nn.Module, args: TrainingArguments, decayed: list[str]) -> MuonAdamW:
    """
    Muon for the matrices of the layers with `args.muon_learning_rate`; embeddings and heads, whose rows are words and
    classes, stay with AdamW, as do vectors. `decayed` names the weights that AdamW decays.
    """
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    matrices = {
        name for name, weight in weights.items() if weight.ndim == 2 and "embed" not in name and "head" not in name
    }
    others, decayed = weights.keys() - matrices, set(decayed)
    groups = [
        {"params": [weights[name] for name in weights if name in others & decayed]},
        {"params": [weights[name] for name in weights if name in others - decayed], "weight_decay": 0.0},
        {
            "params": [weights[name] for name in weights if name in matrices],
            "lr": args.muon_learning_rate,
            "momentum": 0.95,
        },
    ]
    betas = (args.adam_beta1, args.adam_beta2)
    return MuonAdamW(groups, lr=args.learning_rate, betas=betas, eps=args.adam_epsilon, weight_decay=args.weight_decay)
