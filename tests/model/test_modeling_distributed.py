"""Two processes compute the losses and gradients of one with both halves of the batch."""

import pytest
import torch
import torch.distributed as dist
from conftest import run_processes, tiny_batch
from test_modeling import LOSSES, assert_close, gradients, losses, tiny_model

from losses_cada import gather_batch


SETTINGS: list[tuple[dict, dict]] = [  # of the configuration, of the forward pass
    ({}, {}),
    ({"contrastive_loss": "ndf_reference", "hard_negative_similarity": "dot", "ara_causal": True}, {}),
    ({"contrastive_loss": "cmpm", "pool_padding": False}, {}),
    ({"use_ara": False}, {}),
    ({}, {"label_noise_robust": True}),
]
SHARED = [0, 1, 2, 0, 3, 1]  # persons 0 and 1 are in both halves


def joint_batch() -> dict[str, torch.Tensor]:
    """Six pairs whose texts have 8 or 9 tokens in the first half and up to 11 in the second: two groups each."""
    batch = tiny_batch(batch=6, length=11)
    lengths = torch.tensor([9, 8, 9, 11, 10, 8])
    generator = torch.Generator().manual_seed(1)
    mask = (torch.arange(11)[None] < lengths[:, None]).long()
    ids = torch.randint(5, 38, (6, 11), generator=generator) * mask
    labels = torch.full((6, 11), -100)
    labels[:, 2:4] = ids[:, 2:4]
    masked = ids.clone()
    masked[:, 2:4] = 3
    batch.update(input_ids=ids, attention_mask=mask, labels=labels, masked_input_ids=masked)
    batch["person_ids"] = torch.tensor(SHARED)
    batch["caption_ids"] = torch.tensor([7, 8, 9, 8, 7, 6])  # equal ones in both halves, of other persons
    return batch


def half_batch(rank: int) -> dict[str, torch.Tensor]:
    """Three pairs, padded as far as they need: 9 tokens on the first process, 11 on the second."""
    half = {name: tensor[3 * rank : 3 * rank + 3] for name, tensor in joint_batch().items()}
    width = int(half["attention_mask"].sum(1).max())
    return {name: tensor[:, :width] if tensor.shape[1:] == (11,) else tensor for name, tensor in half.items()}


def one_process(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    results = []
    for changes, options in SETTINGS:
        model = torch.nn.parallel.DistributedDataParallel(tiny_model(**changes))
        out = model(**half_batch(rank), **options)
        out.loss.backward()
        grads = {name: parameter.grad for name, parameter in model.module.named_parameters()}
        results.append(({name: out[name].item() for name in LOSSES if out.get(name) is not None}, grads))
    # Process r holds x = r + 1 and y = 10 (r + 1), and weighs the gathered sum with (1 + r) * [1, 2].
    x = torch.tensor([rank + 1.0], requires_grad=True)
    y = torch.tensor([10 * (rank + 1.0)], requires_grad=True)
    total = gather_batch(x) + gather_batch(y)
    total.backward((1 + rank) * torch.tensor([1.0, 2.0]))
    with pytest.raises(ValueError, match=r"hold \[3, 2\] pairs"):  # on every process: none waits for another
        tiny_model()(**{name: tensor[: 3 - rank] for name, tensor in half_batch(rank).items()})
    torch.save((results, total.detach(), x.grad, y.grad), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_equal_one(tmp_path):
    """
    DDP's gradients and the mean of the losses are those of one process with the joint batch.

    The gathered sum: x = (1, 2) and y = (10, 20) over both processes, x + y = (11, 22). The weights (1, 2) and (2, 4)
    of the processes add up to (3, 6): 3 for both tensors of the first process, 6 for those of the second.
    """
    run_processes(one_process, str(tmp_path))
    saved = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for setting, (first, grads), (second, other_grads) in zip(SETTINGS, saved[0][0], saved[1][0], strict=True):
        model, options = tiny_model(**setting[0]), setting[1]
        expected = losses(model, joint_batch(), **options)
        assert first.keys() == second.keys() == expected.keys()
        mean = {name: (first[name] + second[name]) / 2 for name in expected}
        assert mean == pytest.approx(expected, rel=1e-5), setting
        assert first["loss_ndf"] == pytest.approx(second["loss_ndf"]), setting  # both see the global batch
        for name, gradient in gradients(model, joint_batch(), **options).items():
            scale = 1 + gradient.abs().max()
            assert torch.equal(grads[name], other_grads[name]), (setting, name)
            assert_close(grads[name] / scale, gradient / scale, 1e-5)
    for rank, (_, total, x_grad, y_grad) in enumerate(saved):
        assert total.tolist() == [11, 22]
        assert x_grad.tolist() == y_grad.tolist() == [[3.0], [6.0]][rank]
