"""The losses of CADA (arXiv 2312.01745), and the batch of all processes. Equation numbers are the paper's."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


EPSILON = 1e-8


class _GatherWithGradient(torch.autograd.Function):
    """
    Tensors of all processes, one after the other. The backward pass adds what every process computed for this
    process's part, so that the mean that DDP takes afterwards is the gradient of the loss over the global batch.
    """

    @staticmethod
    def forward(ctx, tensor: Tensor) -> Tensor:
        parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, tensor)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        grad = grad.clone()  # autograd may hand the same tensor to others
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size())[dist.get_rank()]


def rank_and_size() -> tuple[int, int]:
    """Number of this process, and how many there are."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def gather_batch(tensor: Tensor) -> Tensor:
    """The rows of all processes, which hold equally many `(rows, ...)`, with gradient."""
    return tensor if rank_and_size()[1] == 1 else _GatherWithGradient.apply(tensor.contiguous())


def check_parts(rows: int, device: torch.device) -> None:
    """Every process has to hold as many `rows` of the batch: else they would wait for each other without end."""
    parts = gather_batch(torch.tensor([rows], device=device))
    if len(parts) > 1 and parts.min() < parts.max():
        raise ValueError(f"The processes hold {parts.tolist()} pairs of the batch. Give each as many (`drop_last`).")


def batch_mean(total: Tensor, count: Tensor) -> Tensor:
    """
    `total / count`. Of several processes each has a part of both: then the mean over the processes of what they get,
    as DDP takes it, is the mean over the whole batch. 0 where there is nothing to count.
    """
    _, size = rank_and_size()
    if size > 1:
        count = count.clone()
        dist.all_reduce(count)
    return size * total / count.clamp(min=1)


def positive_pairs(row_ids: Tensor, column_ids: Tensor) -> Tensor:
    """Boolean matrix y of shape `(rows, columns)`: true where both sides show the same person."""
    return row_ids[:, None] == column_ids[None, :]


def _distributions(scores: Tensor, positives: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of every row: log p, p the softmax of the scores; the true q, and its logarithm."""
    q = positives.to(scores.dtype)
    q = q / q.sum(dim=1, keepdim=True).clamp(min=1)
    return F.log_softmax(scores, dim=1), q, torch.log(q + EPSILON)


def ndf_loss(similarity: Tensor, positives: Tensor, temperature: float, weights: Tensor | float = 1.0) -> Tensor:
    """
    Equation (2): symmetric Kullback-Leibler divergence between the distribution of matching scores and the true one,
    mean over both directions.

    Args:
        similarity: cosine similarities `(images, texts)`.
        positives: boolean `(images, texts)`, true for the same person.
        temperature: τ of equation (1).
        weights: how much each pair counts `(pairs,)`, see [`pair_weights`].

    Returns:
        A scalar.
    """
    total = 0
    for scores, same in ((similarity, positives), (similarity.t(), positives.t())):
        log_p, q, log_q = _distributions(scores / temperature, same)
        total = total + (weights * ((log_p.exp() - q) * (log_p - log_q)).sum(dim=1)).mean()
    return total / 2


def ndf_reference_loss(
    similarity: Tensor, positives: Tensor, temperature: float, weights: Tensor | float = 1.0
) -> Tensor:
    """
    Equation (2) as the authors' code computes it: both divergences averaged over all entries instead of summed over
    a row, plus the cross entropy of the soft labels. Arguments as in [`ndf_loss`].
    """
    total = 0
    for scores, same in ((similarity, positives), (similarity.t(), positives.t())):
        log_p, q, log_q = _distributions(scores / temperature, same)
        rows = ((log_p.exp() - q) * (log_p - log_q)).mean(dim=1) - (q * log_p).sum(dim=1)
        total = total + (weights * rows).mean()
    return total / 2


def cmpm_loss(
    image_features: Tensor, text_features: Tensor, positives: Tensor, weights: Tensor | float = 1.0
) -> Tensor:
    """
    Cross-modal projection matching (Zhang and Lu, ECCV 2018), the baseline of the paper's ablation: KL(p‖q) with p the
    softmax of one modality projected on the normalised other one. Both directions are added.

    Args:
        image_features, text_features: unnormalised features `(images, d)`, `(texts, d)`.
        positives: boolean `(images, texts)`.
        weights: as in [`ndf_loss`].
    """

    total, directions = 0, ((image_features, text_features, positives), (text_features, image_features, positives.t()))
    for rows, columns, same in directions:
        log_p, _, log_q = _distributions(rows @ F.normalize(columns, dim=-1).t(), same)
        total = total + (weights * (log_p.exp() * (log_p - log_q)).sum(dim=1)).mean()
    return total


def _log_density(values: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Of a Gaussian, up to a constant."""
    return -(((values - mean) / std) ** 2) / 2 - std.log()


def pair_weights(similarity: Tensor, positives: Tensor, temperature: float) -> Tensor:
    """
    How much each pair counts where captions may describe another person: in proportion to the probability that its
    text describes its image.

    Per-pair losses are split by a mixture of two Gaussians, as in DivideMix (Li et al., ICLR 2020) and in the
    consensus division of RDE (Qin et al., CVPR 2024). Theirs is fitted freely, and finds bad pairs in any set. Here
    the Gaussian of mismatched pairs is known: images and texts of different persons of the batch are such pairs. Only
    that of the true pairs and the share of both are fitted, so where all pairs are true, all count alike.

    Args:
        similarity, positives, temperature: as in [`ndf_loss`], of as many images as texts.

    Returns:
        `(pairs,)`, 1 in the mean, without gradient; all 1 where the batch holds one person.
    """
    if positives.all():
        return torch.ones_like(similarity[0])
    scores = similarity.detach() / temperature
    # log p of equation (1), the mean over both directions.
    scores = scores - (scores.logsumexp(dim=1, keepdim=True) + scores.logsumexp(dim=0, keepdim=True)) / 2
    pairs, others = scores.diagonal(), scores[~positives]
    low, spread = others.mean(), others.std().clamp(min=0.01)  # of mismatched pairs
    high, std, share = torch.maximum(pairs.quantile(0.75), low), 0.4 * spread, torch.full_like(low, 0.5)
    for _ in range(20):  # expectation maximisation
        odds = _log_density(pairs, high, std) - _log_density(pairs, low, spread) + share.logit()
        true = odds.sigmoid()
        total, share = true.sum().clamp(min=0.01), true.mean().clamp(0.05, 0.98)
        high = torch.maximum((true * pairs).sum() / total, low)
        # Not too narrow: true pairs that are hard to tell have a long tail on the side of the mismatched ones.
        std = ((true * (pairs - high) ** 2).sum() / total).sqrt().clamp(0.3 * spread, 0.7 * spread)
    # Gaussians of unequal width cross again far out; but a better score never counts less.
    pairs = pairs.clamp(low, high)
    true = (_log_density(pairs, high, std) - _log_density(pairs, low, spread) + share.logit()).sigmoid()
    return true / true.mean().clamp(min=0.01)


def contrastive_loss(
    kind: str,
    image_features: Tensor,
    text_features: Tensor,
    person_ids: Tensor,
    temperature: float,
    label_noise_robust: bool = False,
) -> tuple[Tensor, Tensor]:
    """
    The loss that `CADAConfig.contrastive_loss` names, and how much each pair counts in all losses.

    Args:
        kind: `"ndf"`, `"ndf_reference"` or `"cmpm"`.
        image_features, text_features, person_ids: `(batch, d)`, unnormalised, and `(batch,)`, of all processes.
        temperature: τ of equation (1).
        label_noise_robust: whether pairs count as [`pair_weights`] says; by default all count alike.

    Returns:
        A scalar, and the weights of this process's pairs `(rows,)`.
    """
    positives = positive_pairs(person_ids, person_ids)
    similarity = F.normalize(image_features, dim=-1) @ F.normalize(text_features, dim=-1).t()
    weights = torch.ones_like(similarity[0])
    if label_noise_robust:
        weights = pair_weights(similarity, positives, temperature)
    if kind == "cmpm":
        loss = cmpm_loss(image_features, text_features, positives, weights)
    else:
        loss = {"ndf": ndf_loss, "ndf_reference": ndf_reference_loss}[kind](
            similarity, positives, temperature, weights
        )
    rank, size = rank_and_size()
    return loss, weights.chunk(size)[rank]


def draw_negatives(similarity: Tensor, positives: Tensor, temperature: float | None = None) -> tuple[Tensor, Tensor]:
    """
    The negative of every row for equation (5): a column that shows another person.

    Args:
        similarity, positives: `(rows, columns)`; boolean, true for the same person.
        temperature:
            `None` takes the hardest, the highest similarity. A number T draws a column with probability
            softmax(similarity / T): any of them where T is large, the hardest where it is small.

    Returns:
        Column indices `(rows,)` and a boolean `(rows,)`, false where the batch holds no other person.
    """
    scores = similarity.detach().float().masked_fill(positives, float("-inf"))
    exists = ~positives.all(dim=1)
    if temperature is None:
        return scores.argmax(dim=1), exists
    if not temperature > 0:
        raise ValueError(f"The temperature of the negatives is {temperature}. Give a number above 0, or None.")
    # The Gumbel maximum draws from softmax(scores / T) and is safe for rows of -inf alone.
    noise = -torch.log(-torch.log(torch.rand_like(scores).clamp(min=1e-20, max=1 - 1e-7)))
    return (scores / temperature + noise).argmax(dim=1), exists


def match_pairs(
    image_features: Tensor,
    text_features: Tensor,
    person_ids: Tensor,
    rows: int,
    temperature: float | None = None,
    caption_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """
    The pairs of equation (5) for this process: first its own pairs, then every image with its negative text, then
    every text with its negative image.

    Args:
        image_features, text_features, person_ids: `(batch, d)` and `(batch,)`, of all processes.
        rows: of this process, as many as of every other one.
        temperature: as in [`draw_negatives`].
        caption_ids: `(batch,)`, equal for equal captions, which are no negatives of each other's images.

    Returns:
        Text and image of each pair, as rows of the batch, and 1 for a match, 0 for none: three times `(pairs,)`.
    """
    own = torch.arange(rows, device=person_ids.device) + rows * rank_and_size()[0]
    positives = positive_pairs(person_ids[own], person_ids)
    if caption_ids is not None:
        positives = positives | positive_pairs(caption_ids[own], caption_ids)
    with torch.autocast(image_features.device.type, enabled=False):
        to_texts = image_features[own] @ text_features.t()
        to_images = text_features[own] @ image_features.t()
    text_of_image, has_text = draw_negatives(to_texts, positives, temperature)
    image_of_text, has_image = draw_negatives(to_images, positives, temperature)
    text_index = torch.cat([own, text_of_image[has_text], own[has_image]])
    image_index = torch.cat([own, own[has_text], image_of_text[has_image]])
    match_labels = torch.zeros_like(text_index)
    match_labels[: len(own)] = 1
    return text_index, image_index, match_labels


def group_states(
    states: Tensor, attention_mask: Tensor, size: int, stride: int, pool_padding: bool
) -> tuple[Tensor, Tensor]:
    """
    Equation (4): means of groups of decoder states.

    Args:
        states: `(pairs, 1 + M, hidden)`; the first state, e_cls, belongs to no group.
        attention_mask: `(pairs, 1 + M)`, 1 for real tokens.
        size, stride, pool_padding: of a group, in tokens; whether padding positions count in the mean.

    Returns:
        Group means `(pairs, groups, hidden)` and a boolean `(pairs, groups)`, true for groups that count.
    """
    windows = states[:, 1:].unfold(1, size, stride)  # (pairs, groups, hidden, size)
    real = attention_mask[:, 1:].unfold(1, size, stride).to(states.dtype)  # (pairs, groups, size)
    if pool_padding:
        return windows.mean(dim=-1), torch.ones_like(real[..., 0], dtype=torch.bool)
    count = real.sum(dim=-1)
    means = (windows * real[:, :, None]).sum(dim=-1) / count[..., None].clamp(min=1)
    return means, count > 0


def atp_loss(
    match_logits: Tensor, group_logits: Tensor, group_mask: Tensor, labels: Tensor, weights: Tensor | float = 1.0
) -> Tensor:
    """
    Equation (5): cross entropy of match against no match, for e_cls plus for the groups.

    Args:
        match_logits, group_logits: `(pairs, 2)`, from e_cls, and `(pairs, groups, 2)`.
        group_mask: boolean `(pairs, groups)`, true for groups that count.
        labels: `(pairs,)`, 1 for a match.
        weights: how much each pair counts `(pairs,)`.
    """
    per_pair = F.cross_entropy(match_logits.float(), labels, reduction="none")
    loss = batch_mean((weights * per_pair).sum(), torch.ones_like(labels).sum())
    per_group = F.cross_entropy(
        group_logits.float().transpose(1, 2), labels[:, None].expand_as(group_mask), reduction="none"
    )
    return loss + batch_mean((weights * (group_mask * per_group).sum(dim=1)).sum(), group_mask.sum())


def ara_loss(logits: Tensor, labels: Tensor, weights: Tensor | float = 1.0) -> Tensor:
    """
    Equation (7): cross entropy of the masked attribute tokens. Zero, with a gradient, where nothing is masked.

    Args:
        logits: `(masked, vocabulary)`, at masked positions only.
        labels: `(masked,)`, the ids that were masked.
        weights: how much each token counts `(masked,)`.
    """
    per_token = F.cross_entropy(logits.float(), labels, reduction="none")
    return batch_mean((weights * per_token).sum(), torch.ones_like(labels).sum())
