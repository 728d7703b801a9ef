"""Muon for matrices, AdamW for the rest."""

from copy import deepcopy

import pytest
import torch
from conftest import tiny_config

from cada.training.arguments import CADATrainingArguments
from cada.training.muon import MuonAdamW, orthogonalise
from cada.training.trainer import CADATrainer
from modeling_cada import CADAForTextToImageRetrieval


@pytest.mark.parametrize("shape", [(4, 4), (3, 8), (8, 3)])
def test_singular_values_become_alike_and_their_vectors_stay(shape):
    matrix = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    left, before, right = torch.linalg.svd(matrix, full_matrices=False)
    values = left.mT @ orthogonalise(matrix) @ right.mT
    after = values.diagonal(dim1=1, dim2=2)
    assert (before.amax(1) / before.amin(1) > 1.5).all()
    assert ((after > 0.6) & (after < 1.3)).all()
    assert (values - torch.diag_embed(after)).abs().max() < 1e-4


def test_first_step_of_a_matrix_by_hand():
    """The momentum points where the gradient does; the step is the size of the learning rate, times (4 / 1)^0.5."""
    weight = torch.nn.Parameter(torch.ones(4, 1))
    optimizer = MuonAdamW([{"params": [weight], "lr": 0.1, "momentum": 0.95}], weight_decay=0.5)
    weight.grad = torch.tensor([[3.0], [0.0], [-4.0], [0.0]])  # of length 5
    optimizer.step()
    step = (torch.ones(4, 1) * (1 - 0.1 * 0.5) - weight.detach()) / (0.1 * 4**0.5)
    assert step[1] == step[3] == 0 and step[2] / step[0] == pytest.approx(-4 / 3, rel=1e-5)
    assert 0.6 < step.norm() < 1.3


def test_other_weights_take_the_step_of_adamw():
    weights = [torch.nn.Parameter(torch.ones(5)) for _ in range(2)]
    ours = MuonAdamW([{"params": weights[:1]}], lr=0.1)
    theirs = torch.optim.AdamW(weights[1:], lr=0.1)
    for number in range(3):
        for weight in weights:
            weight.grad = torch.arange(5.0) - number
        ours.step()
        theirs.step()
    assert torch.equal(*weights)


def test_a_saved_state_goes_on_to_the_bit():
    def optimizer(weights):
        return MuonAdamW([{"params": weights[1:]}, {"params": weights[:1], "lr": 0.02, "momentum": 0.95}], lr=0.1)

    def step(optimizer, weights, seed):
        generator = torch.Generator().manual_seed(seed)
        for weight in weights:
            weight.grad = torch.randn(weight.shape, generator=generator)
        optimizer.step()

    whole = [torch.nn.Parameter(torch.ones(3, 2)), torch.nn.Parameter(torch.ones(3))]
    first = optimizer(whole)
    step(first, whole, 0)
    resumed = [torch.nn.Parameter(weight.detach().clone()) for weight in whole]
    second = optimizer(resumed)
    second.load_state_dict(deepcopy(first.state_dict()))
    step(first, whole, 1)
    step(second, resumed, 1)
    assert all(torch.equal(*pair) for pair in zip(whole, resumed))


def test_matrices_of_the_layers_go_to_muon(tmp_path):
    model = CADAForTextToImageRetrieval(tiny_config())
    arguments = CADATrainingArguments(str(tmp_path), muon_learning_rate=0.02, use_cpu=True, eval_strategy="no",
                                      load_best_model_at_end=False)  # fmt: skip
    optimizer = CADATrainer(model=model, args=arguments).create_optimizer()
    names = {id(weight): name for name, weight in model.named_parameters()}
    groups = [{names[id(weight)] for weight in group["params"]} for group in optimizer.param_groups]
    assert sum(map(len, groups)) == len(names) and groups[0] | groups[1] | groups[2] == set(names.values())
    assert (
        "cada.text_model.layers.0.self_attn.q_proj.weight" in groups[2]
        and "cada.visual_projection.weight" in groups[2]
    )
    assert not any("embed" in name or "head" in name or name.endswith("bias") for name in groups[2])
    assert "cada.text_model.embeddings.word_embeddings.weight" in groups[0]
