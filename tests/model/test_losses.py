"""The losses: by hand, against naive loops, and what has to hold for any batch."""

from math import exp, log, sqrt

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from losses_cada import (
    ara_loss,
    atp_loss,
    cmpm_loss,
    draw_negatives,
    group_states,
    match_pairs,
    ndf_loss,
    ndf_reference_loss,
    pair_weights,
    positive_pairs,
)


EPSILON = 1e-8
PROPERTY = settings(max_examples=25)
BATCHES = st.tuples(st.lists(st.integers(0, 3), min_size=1, max_size=6), st.integers(0, 10**6))


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def same_person(ids: list[int]) -> torch.Tensor:
    return positive_pairs(torch.tensor(ids), torch.tensor(ids))


def softmax(scores: list[float]) -> list[float]:
    total = sum(exp(score) for score in scores)
    return [exp(score) / total for score in scores]


def targets(row: list[bool]) -> list[float]:
    return [entry / sum(row) for entry in row]


def test_positive_pairs():
    same = positive_pairs(torch.tensor([7, 8]), torch.tensor([8, 7, 8]))
    assert same.tolist() == [[False, True, False], [True, False, True]]


@pytest.mark.parametrize("temperature", [1.0, 0.02])
def test_ndf_by_hand(temperature):
    """
    S/τ = [[log 3, 0], [log 3, 0]], y the identity, e = log ε. Over rows p = (3/4, 1/4) twice:
      row 1, q = (1, 0): (3/4 - 1) log 3/4 + 1/4 (log 1/4 - e)
      row 2, q = (0, 1): 3/4 (log 3/4 - e) + (1/4 - 1) log 1/4
      sum: 1/2 log 3/4 - 1/2 log 1/4 - e = 1/2 log 3 - e; mean over B = 2: 1/4 log 3 - e/2.
    Over columns p = (1/2, 1/2) twice, each 1/2 (log 1/2 - e) - 1/2 log 1/2 = -e/2; mean: -e/2.
    Mean of both directions: 1/8 log 3 - e/2.
    """
    similarity = torch.tensor([[log(3), 0.0], [log(3), 0.0]], dtype=torch.float64) * temperature
    loss = ndf_loss(similarity, torch.eye(2, dtype=torch.bool), temperature)
    assert loss.item() == pytest.approx(log(3) / 8 - log(EPSILON) / 2, abs=1e-6)


def test_ndf_with_several_positives():
    """
    Two images, three texts, y = [[1, 1, 0], [0, 0, 1]], S = 0, e = log ε. Over rows p = 1/3:
      row 1, q = (1/2, 1/2, 0): 2 (1/3 - 1/2)(log 1/3 - log 1/2) + 1/3 (log 1/3 - e) = -1/3 log 2 - e/3
      row 2, q = (0, 0, 1): 2/3 (log 1/3 - e) - 2/3 log 1/3 = -2e/3; mean: -1/6 log 2 - e/2.
    Over columns p = 1/2 and one positive each: -e/2. Mean of both directions: -1/12 log 2 - e/2.
    """
    positives = torch.tensor([[True, True, False], [False, False, True]])
    loss = ndf_loss(torch.zeros(2, 3, dtype=torch.float64), positives, 0.02)
    assert loss.item() == pytest.approx(-log(2) / 12 - log(EPSILON) / 2, abs=1e-6)


def naive_ndf(similarity, positives, temperature):
    def one_direction(rows, same):
        total = 0.0
        for scores, row in zip(rows, same):
            p, q = softmax([score / temperature for score in scores]), targets(row)
            total += sum(a * (log(a) - log(b + EPSILON)) for a, b in zip(p, q))
            total += sum(b * (log(b + EPSILON) - log(a)) for a, b in zip(p, q))
        return total / len(rows)

    forward = one_direction(similarity.tolist(), positives.tolist())
    return (forward + one_direction(similarity.t().tolist(), positives.t().tolist())) / 2


def naive_ndf_reference(similarity, positives, temperature):
    def one_direction(rows, same):
        divergence, entropy = 0.0, 0.0
        for scores, row in zip(rows, same):
            p, q = softmax([score / temperature for score in scores]), targets(row)
            divergence += sum(a * (log(a) - log(b + EPSILON)) for a, b in zip(p, q))
            divergence += sum(b * (log(b + EPSILON) - log(a)) for a, b in zip(p, q))
            entropy -= sum(b * log(a) for a, b in zip(p, q))
        return divergence / (len(rows) * len(rows[0])) + entropy / len(rows)

    forward = one_direction(similarity.tolist(), positives.tolist())
    return (forward + one_direction(similarity.t().tolist(), positives.t().tolist())) / 2


def naive_cmpm(image_features, text_features, positives):
    def one_direction(features, others, same):
        total = 0.0
        for feature, row in zip(features, same):
            projections = [
                sum(a * b for a, b in zip(feature, other)) / sqrt(sum(b * b for b in other)) for other in others
            ]
            p, q = softmax(projections), targets(row)
            total += sum(a * log(a / (b + EPSILON)) for a, b in zip(p, q))
        return total / len(features)

    images, texts = image_features.tolist(), text_features.tolist()
    return one_direction(images, texts, positives.tolist()) + one_direction(texts, images, positives.t().tolist())


@PROPERTY
@given(BATCHES, st.sampled_from([0.05, 0.3, 1.0]))
def test_naive_loops(batch, temperature):
    ids, seed = batch
    similarity, same = draw(seed, len(ids), len(ids)).tanh(), same_person(ids)
    images, texts = draw(seed + 1, len(ids), 3), draw(seed + 2, len(ids), 3)
    assert ndf_loss(similarity, same, temperature).item() == pytest.approx(naive_ndf(similarity, same, temperature))
    assert ndf_reference_loss(similarity, same, temperature).item() == pytest.approx(
        naive_ndf_reference(similarity, same, temperature)
    )
    assert cmpm_loss(images, texts, same).item() == pytest.approx(naive_cmpm(images, texts, same))


@PROPERTY
@given(BATCHES, st.randoms(use_true_random=False))
def test_order_of_pairs_and_of_modalities(batch, random):
    ids, seed = batch
    similarity, same = draw(seed, len(ids), len(ids)).tanh(), same_person(ids)
    images, texts = draw(seed + 1, len(ids), 3), draw(seed + 2, len(ids), 3)
    order = list(range(len(ids)))
    random.shuffle(order)
    shuffled, shuffled_same = similarity[order][:, order], same[order][:, order]
    for loss in (ndf_loss, ndf_reference_loss):
        expected = pytest.approx(loss(similarity, same, 0.1).item())
        assert loss(shuffled, shuffled_same, 0.1).item() == expected
        assert loss(similarity.t(), same.t(), 0.1).item() == expected
    expected = pytest.approx(cmpm_loss(images, texts, same).item())
    assert cmpm_loss(images[order], texts[order], shuffled_same).item() == expected
    assert cmpm_loss(texts, images, same.t()).item() == expected


@PROPERTY
@given(BATCHES, st.floats(0.01, 3.0))
def test_ndf_is_smallest_where_p_is_q(batch, distance):
    """A symmetric divergence: 0 at p = q, which S = τ log(q + ε) reaches up to ε, and above it everywhere else."""
    ids, seed = batch
    same = same_person(ids)
    best = 0.1 * torch.log(same.double() + EPSILON)
    best.requires_grad_()
    loss = ndf_loss(best, same, 0.1)
    (slope,) = torch.autograd.grad(loss, best)
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert slope.abs().max().item() == pytest.approx(0, abs=1e-5)
    other = ndf_loss(best.detach() + distance * draw(seed, len(ids), len(ids)), same, 0.1).item()
    assert other >= loss.item() - 1e-6
    # A row of scores that are equal up to a constant stays at p = q only where there is one person.
    assert (ndf_loss(torch.zeros_like(best), same, 0.1).item() > 1) == (len(set(ids)) > 1)


@pytest.mark.parametrize("loss", [ndf_loss, ndf_reference_loss])
def test_confident_mistakes_stay_finite(loss):
    """Cosines of -1 for the right pairs and 1 for the wrong ones at τ = 0.02: logits 100 apart."""
    similarity = (1 - 2 * torch.eye(4)).requires_grad_()
    value = loss(similarity, torch.eye(4, dtype=torch.bool), 0.02)
    value.backward()
    assert value.isfinite() and similarity.grad.isfinite().all()
    # Pulling a right pair together has to lower the loss.
    assert (similarity.grad.diagonal() < 0).all()


def test_hardest_negatives_by_hand():
    similarity = torch.tensor([[0.9, 0.1, 0.5], [0.2, 0.8, 0.7], [0.9, 0.3, 0.6]])
    same = same_person([0, 1, 0])
    # Row 0 may only take column 1; row 1 columns 0 and 2, of which 0.7 is the higher; row 2 only column 1.
    index, exists = draw_negatives(similarity, same)
    assert index.tolist() == [1, 2, 1]
    assert exists.tolist() == [True, True, True]


def test_equal_captions_are_no_negatives():
    """Four persons; the texts 0 and 1 are equal, and the hardest for each other's image."""
    images = torch.eye(4)
    texts = torch.tensor([[0.9, 0.8, 0.1, 0.2], [0.9, 0.8, 0.1, 0.2], [0.3, 0.1, 0.9, 0.5], [0.0, 0.4, 0.1, 0.9]])
    text_index, image_index, labels = match_pairs(images, texts, torch.arange(4), 4)
    assert text_index.tolist() == [0, 1, 2, 3, 1, 0, 0, 2, 0, 1, 2, 3]
    assert image_index.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 1, 0, 3, 1]
    assert labels.tolist() == [1] * 4 + [0] * 8
    text_index, image_index, _ = match_pairs(images, texts, torch.arange(4), 4, caption_ids=torch.tensor([7, 7, 8, 9]))
    # Image 0 has 0.3 of text 2, image 1 0.4 of text 3; text 0 and 1 have 0.2 of image 3.
    assert text_index.tolist() == [0, 1, 2, 3, 2, 3, 0, 2, 0, 1, 2, 3]
    assert image_index.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 3, 3, 3, 1]


@PROPERTY
@given(BATCHES, st.one_of(st.none(), st.floats(1e-3, 1e3)))
def test_negatives_are_never_positives(batch, temperature):
    ids, seed = batch
    torch.manual_seed(seed)
    index, exists = draw_negatives(draw(seed, len(ids), len(ids)), same_person(ids), temperature)
    assert exists.tolist() == [any(other != own for other in ids) for own in ids]
    assert all(0 <= column < len(ids) for column in index.tolist())
    assert all(ids[column] != ids[row] for row, column in enumerate(index.tolist()) if exists[row])


@pytest.mark.parametrize("temperature", [None, 1.0])
def test_rows_without_other_persons(temperature):
    """Of two images and two texts of person 0 and one text of person 1, in a rectangular batch."""
    same = positive_pairs(torch.tensor([0, 1]), torch.tensor([0, 0]))
    _, exists = draw_negatives(torch.zeros(2, 2), same, temperature)
    assert exists.tolist() == [False, True]


@PROPERTY
@given(st.permutations(range(6)), st.integers(0, 10**6))
def test_small_temperature_takes_the_hardest(ranks, seed):
    """Scores at least 0.1 apart and T = 1e-4: a lead of 1000, far above the noise."""
    torch.manual_seed(seed)
    similarity = torch.tensor(ranks)[None] * 0.1
    same = torch.arange(6)[None] == 0
    assert draw_negatives(similarity, same, 1e-4)[0].tolist() == draw_negatives(similarity, same)[0].tolist()


@pytest.mark.parametrize(
    "temperature, expected",
    [(1e6, [0, 1 / 3, 1 / 3, 1 / 3]), (1.0, [0, 1 / 6, 2 / 6, 3 / 6]), (0.5, [0, 1 / 14, 4 / 14, 9 / 14])],
)
def test_draws_follow_the_softmax(temperature, expected):
    """Scores log 1, log 2, log 3: weights 1, 2, 3 at T = 1, their squares at T = 1/2, equal for large T."""
    torch.manual_seed(0)
    draws = 6000
    similarity = torch.tensor([9.0, 0.0, log(2), log(3)]).expand(draws, 4)
    same = torch.tensor([True, False, False, False]).expand(draws, 4)
    index, _ = draw_negatives(similarity, same, temperature)
    counts = torch.bincount(index, minlength=4).tolist()
    for count, probability in zip(counts, expected):
        assert abs(count - draws * probability) <= 5 * sqrt(draws * probability * (1 - probability))


# One pair with states 99 (e_cls), 1, 2, 3, 4 of width one.
STATES = torch.tensor([[[99.0], [1.0], [2.0], [3.0], [4.0]]])


@pytest.mark.parametrize(
    "real, stride, pool_padding, means, counts",
    [
        (4, 2, True, [1.5, 3.5], [True, True]),
        (4, 2, False, [1.5, 3.5], [True, True]),
        (3, 2, True, [1.5, 3.5], [True, True]),
        (3, 2, False, [1.5, 3.0], [True, True]),
        (4, 1, True, [1.5, 2.5, 3.5], [True, True, True]),
        (3, 1, False, [1.5, 2.5, 3.0], [True, True, True]),
        (1, 2, True, [1.5, 3.5], [True, True]),
        (1, 2, False, [1.0, 0.0], [True, False]),
        (1, 1, False, [1.0, 0.0, 0.0], [True, False, False]),
        (0, 2, False, [0.0, 0.0], [False, False]),
    ],
)
def test_groups_by_hand(real, stride, pool_padding, means, counts):
    """Groups of two states, of which the first `real` are words."""
    states = STATES.clone().requires_grad_()
    mask = (torch.arange(5) <= real).long()[None]
    groups, group_mask = group_states(states, mask, 2, stride, pool_padding)
    assert groups.shape == (1, len(means), 1)
    assert groups.flatten().tolist() == pytest.approx(means)
    assert group_mask.tolist() == [counts]
    groups.sum().backward()
    assert states.grad.isfinite().all()
    assert states.grad[0, 0].item() == 0  # e_cls belongs to no group


@PROPERTY
@given(
    st.integers(1, 4), st.integers(1, 3), st.integers(0, 3), st.booleans(), st.integers(1, 3), st.integers(0, 10**6)
)
def test_groups_by_loops(size, stride, steps, pool_padding, pairs, seed):
    length = size + steps * stride
    states = draw(seed, pairs, 1 + length, 2)
    lengths = torch.randint(0, length + 1, (pairs,), generator=torch.Generator().manual_seed(seed)).tolist()
    mask = torch.tensor([[1] * (1 + real) + [0] * (length - real) for real in lengths])
    groups, group_mask = group_states(states, mask, size, stride, pool_padding)
    assert groups.shape == (pairs, steps + 1, 2)
    for pair, real in enumerate(lengths):
        for k in range(steps + 1):
            members = [j for j in range(k * stride, k * stride + size) if pool_padding or j < real]
            assert group_mask[pair, k].item() == bool(members)
            mean = sum((states[pair, 1 + j] for j in members), torch.zeros(2)) / max(len(members), 1)
            assert groups[pair, k].tolist() == pytest.approx(mean.tolist())


MATCH_LOGITS = torch.tensor([[0.0, log(3)], [0.0, 0.0]])
GROUP_LOGITS = torch.tensor([[[0.0, log(3)], [50.0, -50.0]], [[log(3), 0.0], [0.0, 0.0]]])
MATCH_LABELS = torch.tensor([1, 0])


def test_atp_by_hand():
    """
    e_cls: -log 3/4 for the match, -log 1/2 for the other; mean 1/2 log 8/3. Groups that count: -log 3/4, -log 3/4 and
    -log 1/2; mean 1/3 (2 log 4/3 + log 2) = 1/3 log 32/9.
    """
    mask = torch.tensor([[True, False], [True, True]])
    loss = atp_loss(MATCH_LOGITS, GROUP_LOGITS, mask, MATCH_LABELS)
    assert loss.item() == pytest.approx(log(8 / 3) / 2 + log(32 / 9) / 3)


def test_atp_counts_every_group():
    """The confident wrong group of the case above costs log(1 + e^100) = 100; the mean is over four groups."""
    loss = atp_loss(MATCH_LOGITS, GROUP_LOGITS, torch.ones(2, 2, dtype=torch.bool), MATCH_LABELS)
    assert loss.item() == pytest.approx(log(8 / 3) / 2 + (log(32 / 9) + 100) / 4)


def test_atp_without_groups():
    """Texts without words leave the loss of e_cls."""
    groups = GROUP_LOGITS.clone().requires_grad_()
    loss = atp_loss(MATCH_LOGITS, groups, torch.zeros(2, 2, dtype=torch.bool), MATCH_LABELS)
    loss.backward()
    assert loss.item() == pytest.approx(log(8 / 3) / 2)
    assert groups.grad.abs().sum().item() == 0


def test_ara_by_hand():
    """Weights 2, 1, 1: -log 1/2. Weights 1, 1, 1: -log 1/3. Mean 1/2 log 6."""
    loss = ara_loss(torch.tensor([[log(2), 0.0, 0.0], [0.0, 0.0, 0.0]]), torch.tensor([0, 2]))
    assert loss.item() == pytest.approx(log(6) / 2)


def test_ara_with_nothing_masked():
    """Zero with zero gradient, so that every process has the same gradients to average."""
    weight = torch.ones(3, 5, requires_grad=True)
    loss = ara_loss(torch.zeros(0, 3) @ weight, torch.zeros(0, dtype=torch.long))
    loss.backward()
    assert loss.item() == 0
    assert weight.grad.tolist() == torch.zeros(3, 5).tolist()


@pytest.mark.parametrize("loss", [ndf_loss, ndf_reference_loss])
def test_contrastive_weights(loss):
    """With the weights 2, 0, 1 the mean holds the first pair twice, the second not at all and the third once."""
    similarity, same = draw(0, 3, 3), torch.eye(3, dtype=torch.bool)
    weights = torch.tensor([2.0, 0.0, 1.0], dtype=torch.float64)
    alone = [loss(similarity, same, 0.5, 3 * one).item() for one in torch.eye(3, dtype=torch.float64)]
    assert loss(similarity, same, 0.5).item() == pytest.approx(sum(alone) / 3)
    assert loss(similarity, same, 0.5, weights).item() == pytest.approx((2 * alone[0] + alone[2]) / 3)


def test_cmpm_weights():
    images, texts, same = draw(0, 3, 4), draw(1, 3, 4), torch.eye(3, dtype=torch.bool)
    alone = [cmpm_loss(images, texts, same, 3 * one).item() for one in torch.eye(3, dtype=torch.float64)]
    weights = torch.tensor([2.0, 0.0, 1.0], dtype=torch.float64)
    assert cmpm_loss(images, texts, same, weights).item() == pytest.approx((2 * alone[0] + alone[2]) / 3)


def test_atp_weights():
    """
    As by hand above, with weights 2 and 1/2. e_cls: (2 log 4/3 + 1/2 log 2) / 2; groups: (2 log 4/3 + 1/2 (log 4/3 +
    log 2)) / 3.
    """
    mask = torch.tensor([[True, False], [True, True]])
    loss = atp_loss(MATCH_LOGITS, GROUP_LOGITS, mask, MATCH_LABELS, torch.tensor([2.0, 0.5]))
    expected = (2 * log(4 / 3) + log(2) / 2) / 2 + (2 * log(4 / 3) + (log(4 / 3) + log(2)) / 2) / 3
    assert loss.item() == pytest.approx(expected)


def test_ara_weights():
    """As by hand above: (2 log 2 + 1/2 log 3) / 2."""
    logits = torch.tensor([[log(2), 0.0, 0.0], [0.0, 0.0, 0.0]])
    loss = ara_loss(logits, torch.tensor([0, 2]), torch.tensor([2.0, 0.5]))
    assert loss.item() == pytest.approx(log(2) + log(3) / 4)


def similarity_of(true: list[bool], seed: int = 0) -> torch.Tensor:
    """Cosines of pairs: a text that describes its image is near it, one that does not is as near as any other's."""
    images = draw(seed, len(true), 16)
    texts = torch.where(
        torch.tensor(true)[:, None], images + 0.5 * draw(seed + 1, len(true), 16), draw(seed + 2, len(true), 16)
    )
    return torch.nn.functional.normalize(images, dim=1) @ torch.nn.functional.normalize(texts, dim=1).t()


@pytest.mark.parametrize("wrong", [6, 16])
def test_pairs_of_other_persons_do_not_count(wrong):
    """Of 32 pairs the wrong ones get nothing, and the others all: 32 / (32 - wrong) each, so that the mean is 1."""
    weights = pair_weights(
        similarity_of([False] * wrong + [True] * (32 - wrong)), torch.eye(32, dtype=torch.bool), 0.1
    )
    assert weights[:wrong].max() < 0.05
    torch.testing.assert_close(weights[wrong:], torch.full_like(weights[wrong:], 32 / (32 - wrong)), rtol=0.05, atol=0)


@pytest.mark.parametrize("size", [2, 4, 32, 96])
def test_without_wrong_pairs_all_count_alike(size):
    weights = pair_weights(similarity_of([True] * size), torch.eye(size, dtype=torch.bool), 0.1)
    torch.testing.assert_close(weights, torch.ones_like(weights), rtol=0.05, atol=0)


def test_images_of_one_person_are_no_mismatched_pairs():
    """Where the batch holds one person nothing can be told, and a pair of the same person is never an example."""
    similarity = similarity_of([True] * 8)
    assert pair_weights(similarity, torch.ones(8, 8, dtype=torch.bool), 0.1).tolist() == [1.0] * 8


@PROPERTY
@given(BATCHES, st.sampled_from([1e-4, 0.1, 10.0]))
def test_pair_weights_of_any_batch(batch, scale):
    """Finite, 1 in the mean, without gradient, and never less for a better pair."""
    ids, seed = batch
    similarity = (scale * draw(seed, len(ids), len(ids))).requires_grad_()
    weights = pair_weights(similarity, same_person(ids), 0.02)
    assert weights.mean().item() == pytest.approx(1) and not weights.requires_grad
    scores = similarity.detach() / 0.02
    scores = (scores.log_softmax(dim=0) + scores.log_softmax(dim=1)).diagonal()
    assert (weights[scores.argsort()].diff() >= -1e-9).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits(dtype):
    """Cross entropies are taken in float32."""
    logits = torch.tensor([[0.5, 0.25], [0.0, 1.0]])
    labels, mask = torch.tensor([1, 0]), torch.ones(2, 1, dtype=torch.bool)
    ara = ara_loss(logits.to(dtype), labels)
    atp = atp_loss(logits.to(dtype), logits.to(dtype)[:, None], mask, labels)
    assert ara.dtype == atp.dtype == torch.float32
    # log(1 + e^0.25) and log(1 + e): the entries are exact in half precision.
    expected = (log(1 + exp(0.25)) + log(1 + exp(1))) / 2
    assert ara.item() == pytest.approx(expected)
    assert atp.item() == pytest.approx(2 * expected)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_temperature_of_negatives_has_to_be_positive(temperature):
    with pytest.raises(ValueError, match="temperature"):
        draw_negatives(torch.zeros(1, 2), torch.tensor([[True, False]]), temperature)
