"""Metrics by hand, ties, and the two-stage evaluation against a plain one."""

import weakref

import numpy as np
import pytest
import torch
from conftest import tiny_config
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import cada.evaluation.matching
from cada.evaluation.encoding import Gallery, Queries, encode_gallery, encode_queries
from cada.evaluation.matching import evaluate_retrieval, in_doubt, match_candidates, score_gallery
from cada.evaluation.metrics import METRICS, RetrievalMetric, rerank_scores, retrieval_metrics, top_candidates
from modeling_cada import CADAForTextToImageRetrieval, CADAImages, blocks_of_pairs


def test_metrics_by_hand():
    """
    Query 0 (person 7) ranks 7, 8, 7, 9: R1 yes; AP = (1/1 + 2/3) / 2 = 5/6; mINP = 2/3.
    Query 1 (person 8) ranks 7, 9, 8, 7: R1 no, R5 yes; AP = 1/3; mINP = 1/3.
    """
    gallery = [7, 8, 7, 9]
    similarity = [[0.9, 0.8, 0.7, 0.1], [0.9, 0.3, 0.2, 0.8]]
    metrics = retrieval_metrics(similarity, [7, 8], gallery)
    assert metrics == {
        "R1": 50.0,
        "R5": 100.0,
        "R10": 100.0,
        "mAP": pytest.approx(100 * (5 / 6 + 1 / 3) / 2),
        "mINP": pytest.approx(100 * (2 / 3 + 1 / 3) / 2),
    }


@pytest.mark.parametrize(("rank", "r1", "r5", "r10"), [(1, 100, 100, 100), (2, 0, 100, 100), (6, 0, 0, 100)])
def test_rank_of_a_person_with_one_image(rank, r1, r5, r10):
    """With one right image at rank r, AP = INP = 1/r."""
    similarity = -np.arange(12.0)[None]
    gallery = np.zeros(12, dtype=int)
    gallery[rank - 1] = 1
    metrics = retrieval_metrics(similarity, [1], gallery)
    assert [metrics[name] for name in METRICS] == pytest.approx([r1, r5, r10, 100 / rank, 100 / rank])


def test_equal_scores_count_against_the_model():
    """All four scores equal, two of them right: the wrong ones come first, so ranks 3 and 4."""
    metrics = retrieval_metrics([[0.5] * 4], [1], [1, 2, 1, 3])
    assert metrics["R1"] == 0
    assert metrics["mAP"] == pytest.approx(100 * (1 / 3 + 2 / 4) / 2)
    assert metrics["mINP"] == pytest.approx(100 * 2 / 4)


def naive_metrics(similarity, query_ids, gallery_ids):
    """The definitions, one query and one image at a time."""
    rows = []
    for scores, person in zip(similarity, query_ids):
        order = sorted(range(len(scores)), key=lambda image: (-scores[image], gallery_ids[image] == person))
        ranks = [rank for rank, image in enumerate(order, start=1) if gallery_ids[image] == person]
        precision = [count / rank for count, rank in enumerate(ranks, start=1)]
        rows.append([float(ranks[0] <= k) for k in (1, 5, 10)] + [sum(precision) / len(ranks), len(ranks) / ranks[-1]])
    return dict(zip(METRICS, 100 * np.mean(rows, axis=0)))


@st.composite
def searches(draw):
    """Few different scores and persons, so that ties and persons of one image are common."""
    gallery = draw(st.lists(st.integers(0, 4), min_size=1, max_size=15))
    queries = draw(st.lists(st.sampled_from(gallery), min_size=1, max_size=6))
    scores = draw(
        st.lists(
            st.lists(st.sampled_from([-np.inf, 0.0, 0.25, 0.5, 1.0]), min_size=len(gallery), max_size=len(gallery)),
            min_size=len(queries),
            max_size=len(queries),
        )
    )
    return scores, queries, gallery


@given(searches())
@settings(max_examples=150)
def test_metrics_equal_their_definition(search):
    assert retrieval_metrics(*search) == pytest.approx(naive_metrics(*search))


@given(searches(), st.randoms())
@settings(max_examples=50)
def test_metrics_do_not_depend_on_the_order_of_the_gallery(search, random):
    scores, queries, gallery = search
    order = list(range(len(gallery)))
    random.shuffle(order)
    shuffled = retrieval_metrics(np.array(scores)[:, order], queries, [gallery[image] for image in order])
    assert shuffled == pytest.approx(retrieval_metrics(scores, queries, gallery))


@pytest.mark.parametrize("kind", [torch.int64, torch.bfloat16, torch.float16, torch.float64])
def test_scores_of_any_kind(kind):
    """Persons 1 and 2 both come second of three."""
    scores = torch.tensor([[3, 2, 1], [-1, 2, 0]]).to(kind)
    if kind.is_floating_point:
        scores.requires_grad_()
    metrics = retrieval_metrics(scores, [1, 2], [5, 1, 2])
    assert metrics["R1"] == 0 and metrics["R5"] == 100
    assert metrics["mAP"] == pytest.approx(100 * (1 / 2 + 1 / 2) / 2)


def test_many_queries_are_summed_in_parts():
    rng = np.random.default_rng(0)
    gallery = rng.integers(0, 20, 40)
    queries = rng.choice(gallery, 1200)
    scores = rng.random((1200, 40))
    assert retrieval_metrics(scores, queries, gallery) == pytest.approx(naive_metrics(scores, queries, gallery))


@pytest.mark.parametrize(
    ("scores", "queries", "gallery", "message"),
    [
        ([[0.1, 0.2]], [1], [1, 2, 3], "shape"),
        ([[0.1, float("nan")]], [1], [1, 2], "NaN in row 0"),
        ([[0.1, 0.2], [0.3, 0.4]], [1, 5], [1, 2], "Query 1 shows person 5"),
        (np.zeros((0, 2)), [], [1, 2], "no queries"),
    ],
)
def test_bad_input_is_named(scores, queries, gallery, message):
    with pytest.raises(ValueError, match=message):
        retrieval_metrics(scores, queries, gallery)


def test_candidates_are_the_highest_scores_and_ties_keep_the_order_of_the_gallery():
    similarity = torch.tensor([[0.5, 0.9, 0.5, 0.1], [0.1, 0.1, 0.1, 0.1]])
    assert top_candidates(similarity, 3).tolist() == [[1, 0, 2], [0, 1, 2]]
    assert top_candidates(similarity, 9).shape == (2, 4)


def test_reranking_by_hand():
    """Candidates 1 and 0 score 0.9 + 0.0 and 0.8 + 0.5; the others stay behind in their own order."""
    similarity = torch.tensor([[0.8, 0.9, 0.1, 0.7]])
    scores = rerank_scores(similarity, torch.tensor([[1, 0]]), torch.tensor([[0.0, 0.5]]))
    assert scores[0, [0, 1]].tolist() == pytest.approx([1.3, 0.9])
    assert scores[0].argsort(descending=True).tolist() == [0, 1, 3, 2]


@given(
    st.lists(st.floats(-1, 1, width=16), min_size=8, max_size=8),
    st.lists(st.floats(-30, 30, width=32), min_size=3, max_size=3),
)
def test_others_rank_behind_every_candidate_in_global_order(similarity, local):
    similarity = torch.tensor([similarity])
    candidates = top_candidates(similarity, 3)
    scores = rerank_scores(similarity, candidates, torch.tensor([local]))[0]
    others = torch.ones(8, dtype=torch.bool)
    others[candidates[0]] = False
    assert scores[others].max() < scores[candidates[0]].min()
    assert torch.equal(scores[others].argsort(stable=True), similarity[0][others].argsort(stable=True))


def test_reranked_order_of_the_reference(reference_model, reference):
    """Candidates have the authors' scores; the others follow in the authors' order."""
    inputs, expected = reference["inputs"], reference["outputs"]["reranked_scores"]
    k = reference["config"]["rerank_k"]
    with torch.no_grad():
        out = reference_model(inputs["input_ids"], inputs["pixel_values"], inputs["attention_mask"])
        states = reference_model.encode_images(inputs["pixel_values"])
    similarity = out.text_embeds @ out.image_embeds.t()
    candidates = top_candidates(similarity, k)
    queries = Queries(out.text_embeds, inputs["input_ids"], inputs["attention_mask"])
    local = match_candidates(reference_model, queries, Gallery(out.image_embeds, states), candidates)
    scores = rerank_scores(similarity, candidates, local)
    torch.testing.assert_close(
        scores.gather(1, candidates).float(), expected.gather(1, candidates), rtol=1e-4, atol=1e-4
    )
    assert torch.equal(scores.argsort(dim=1, descending=True), expected.argsort(dim=1, descending=True))


def small_set() -> Dataset:
    """Six images of four persons, one to three captions each."""
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (40, 20, 3), dtype=np.uint8)) for _ in range(6)]
    captions = [
        ["a man in red"],
        ["a woman", "a tall woman in blue"],
        ["a man"],
        ["one", "two", "three"],
        ["x y"],
        ["z"],
    ]
    return Dataset.from_dict({"image": images, "captions": captions, "person_id": [1, 1, 2, 3, 3, 4]})


def model_with(initializer_range: float) -> CADAForTextToImageRetrieval:
    torch.manual_seed(0)
    vocabulary = {"vocab_size": 30524, "enc_token_id": 30523}
    spread = {"initializer_range": initializer_range}
    return CADAForTextToImageRetrieval(tiny_config(text_config={**vocabulary, **spread}, vision_config=spread)).eval()


@pytest.fixture
def small_model() -> CADAForTextToImageRetrieval:
    return model_with(0.5)


def test_two_stages_equal_the_plain_computation(small_model, processor):
    """Every query against every image, each pair on its own, without any sharing."""
    dataset = small_set()
    metrics = evaluate_retrieval(small_model, processor, dataset, rerank_k=3, batch_size=4, progress=False)
    captions = [caption for row in dataset["captions"] for caption in row]
    query_ids = [1, 1, 1, 2, 3, 3, 3, 3, 4]
    small_model.eval()
    similarity, local = torch.zeros(9, 6), torch.zeros(9, 6)
    with torch.no_grad():
        for query, caption in enumerate(captions):
            for index, image in enumerate(dataset["image"]):
                inputs = processor(images=image, text=[caption], return_tensors="pt")
                out = small_model(**inputs)
                similarity[query, index] = (out.text_embeds * out.image_embeds).sum()
                states = small_model.encode_images(inputs["pixel_values"])
                logits = small_model.match(inputs["input_ids"], inputs["attention_mask"], states)
                local[query, index] = logits.softmax(dim=-1)[0, 1]
    expected = naive_metrics(similarity.tolist(), query_ids, dataset["person_id"])
    assert {name: metrics[f"global_{name}"] for name in METRICS} == pytest.approx(expected, abs=1e-3)
    total = similarity - 100
    for query in range(9):
        best = similarity[query].topk(3).indices
        total[query, best] = similarity[query, best] + local[query, best]
    expected = naive_metrics(total.tolist(), query_ids, dataset["person_id"])
    assert {name: metrics[f"local_{name}"] for name in METRICS} == pytest.approx(expected, abs=1e-3)
    assert (metrics["queries"], metrics["gallery"], metrics["rerank_k"]) == (9, 6, 3)


def test_evaluation_does_not_depend_on_batches_and_restores_the_mode(small_model, processor):
    dataset = small_set()
    small_model.train()
    first = evaluate_retrieval(small_model, processor, dataset, batch_size=1, progress=False)
    second = evaluate_retrieval(small_model, processor, dataset, batch_size=6, progress=False)
    assert first == pytest.approx(second)
    assert small_model.training


@pytest.mark.parametrize("images", [0, 1, 4, 6])
def test_images_beyond_the_memory_are_encoded_again(small_model, processor, images):
    """Patch states of an image of 32×16 in patches of 8: 9 positions of 16 numbers of 4 bytes; half the memory."""
    small_model.eval()
    gallery = encode_gallery(small_model, processor, small_set(), progress=False, memory=2 * images * 9 * 16 * 4 / 1e9)
    whole = encode_gallery(small_model, processor, small_set(), progress=False)
    assert (len(gallery.states), len(whole.states)) == (images, 6)
    wanted = torch.tensor([0, 3, 5])
    assert torch.equal(torch.cat(list(gallery.states_of([wanted[:1], wanted[1:]]))), whole.states[wanted])
    whole = evaluate_retrieval(small_model, processor, small_set(), rerank_k=3, progress=False)
    less = evaluate_retrieval(small_model, processor, small_set(), rerank_k=3, progress=False, memory=1e-9)
    assert less == pytest.approx(whole)


def test_global_matching_is_of_full_precision_under_autocast(small_model, processor):
    small_model.eval()
    images, captions = small_set(), ["a man in red", "a woman"]
    gallery, queries = encode_gallery(small_model, processor, images), encode_queries(small_model, processor, captions)
    scores = score_gallery(small_model, queries, gallery, 3)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half_gallery = encode_gallery(small_model, processor, images)
        half_queries = encode_queries(small_model, processor, captions)
        half_scores = score_gallery(small_model, half_queries, half_gallery, 3)[0]
    assert torch.equal(half_gallery.states, gallery.states)
    assert torch.equal(half_scores, scores)


@pytest.mark.parametrize("match_score", ["probability", "logit"])
def test_first_ranks_of_half_precision_are_those_of_full_precision(match_score):
    """200 queries with 14 candidates of 16 images; bfloat16 alone puts others among the first ten of some queries."""
    model = model_with(0.2)
    model.config.match_score = match_score
    lengths = torch.randint(3, 10, (200,))
    mask = (torch.arange(9)[None] < lengths[:, None]).long()
    queries = Queries(torch.randn(200, 8) / 30, torch.randint(5, 1000, (200, 9)) * mask, mask)
    gallery = Gallery(torch.randn(16, 8) / 30, torch.randn(16, 9, 16))
    similarity, scores = score_gallery(model, queries, gallery, 14)
    candidates = top_candidates(similarity, 14)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        alone = rerank_scores(similarity, candidates, match_candidates(model, queries, gallery, candidates))
        half = score_gallery(model, queries, gallery, 14)[1]

    def first(scores: torch.Tensor, rank: int) -> torch.Tensor:
        return scores.topk(rank).indices.sort(dim=1).values

    for rank in (1, 5, 10):
        assert torch.equal(first(half, rank), first(scores, rank))
    assert not torch.equal(first(alone, 10), first(scores, 10))
    assert (half == alone).double().mean() > 0.5  # most pairs are read once


@given(st.integers(0, 10**6), st.sampled_from(["probability", "logit"]), st.sampled_from([1e-3, 0.05, 1.0]))
def test_what_is_not_in_doubt_keeps_its_place(seed, match_score, tolerance):
    """Any errors up to the tolerance: with the true scores of the doubtful ones the first 1, 5 and 10 are right."""
    generator = torch.Generator().manual_seed(seed)
    similarity = torch.rand(8, 14, generator=generator, dtype=torch.float64)
    logits = 3 * torch.randn(8, 14, generator=generator, dtype=torch.float64)
    error = tolerance * (2 * torch.rand(8, 14, generator=generator, dtype=torch.float64) - 1)
    true, read = logits, logits + error
    if match_score == "probability":
        true, read = true.sigmoid(), read.sigmoid()
    doubtful = in_doubt(similarity, read, tolerance, match_score)
    mixed = similarity + torch.where(doubtful, true, read)
    for rank in (1, 5, 10):
        expected = (similarity + true).topk(rank).indices.sort(dim=1).values
        assert torch.equal(mixed.topk(rank).indices.sort(dim=1).values, expected)


def test_in_doubt_by_hand():
    """Twelve candidates, far apart but for the first two, and for ranks 6 and 7, which are both behind a border."""
    local = torch.tensor([[9.95, 9.9, 8, 7, 6, 5.05, 5, 4, 3, 2, 1, 0]])
    doubtful = in_doubt(torch.zeros(1, 12), local, 0.04, "logit")
    assert doubtful[0].nonzero().flatten().tolist() == [0, 1]
    assert not in_doubt(torch.zeros(1, 12), local, 0.02, "logit").any()


def test_match_candidates_does_not_depend_on_its_batches(small_model):
    small_model.eval()
    torch.manual_seed(0)
    gallery = Gallery(torch.randn(5, 8), torch.randn(5, 9, 16))
    mask = (torch.arange(9)[None] < torch.tensor([9, 4, 6, 6, 5, 9])[:, None]).long()
    queries = Queries(torch.randn(6, 8), torch.randint(5, 1000, (6, 9)) * mask, mask)
    candidates = torch.tensor([[4, 1, 0], [1, 2, 3], [4, 3, 1], [1, 4, 2], [0, 4, 1], [3, 4, 1]])
    whole = match_candidates(small_model, queries, gallery, candidates)
    parts = match_candidates(small_model, queries, gallery, candidates, memory=1e-9)  # image by image, pair by pair
    torch.testing.assert_close(whole, parts)
    with pytest.MonkeyPatch.context() as patch:
        # As on an accelerator; then several groups and batches, with blocks of pairs.
        for batches in ({}, {"cpu": (60, 1)}):
            patch.setattr(cada.evaluation.matching, "_BATCHES", batches)
            torch.testing.assert_close(whole, match_candidates(small_model, queries, gallery, candidates))
    chosen = torch.tensor([[True, False, False], [False, False, False], [False, True, True]]).repeat(2, 1)
    some = match_candidates(small_model, queries, gallery, candidates, chosen=chosen)
    torch.testing.assert_close(some, whole * chosen)
    assert not match_candidates(small_model, queries, gallery, candidates, chosen=chosen & False).any()
    with torch.no_grad():
        for query, row in enumerate(candidates.tolist()):
            for place, image in enumerate(row):
                states = gallery.states[image : image + 1]
                logits = small_model.match(queries.input_ids[query : query + 1], mask[query : query + 1], states)
                torch.testing.assert_close(whole[query, place], small_model.local_score(logits)[0])


@pytest.mark.parametrize("images_of_a_quarter", [1, 10, 25])
def test_match_candidates_keeps_to_its_memory(small_model, monkeypatch, images_of_a_quarter):
    """A quarter for the keys and values of one group, of which there is one at a time, and a quarter for a batch."""
    small_model.eval()
    torch.manual_seed(0)
    text = small_model.config.text_config
    layer = 2 * 9 * text.hidden_size * 4  # bytes of the keys and values of an image, 9 states, in one layer
    token = (2 * text.intermediate_size + 8 * text.hidden_size) * 4
    quarter = images_of_a_quarter * layer * text.num_hidden_layers
    gallery = Gallery(torch.randn(40, 8), torch.randn(40, 9, 16))
    mask = (torch.arange(9)[None] < torch.randint(3, 10, (20, 1))).long()
    queries = Queries(torch.randn(20, 8), torch.randint(5, 1000, (20, 9)) * mask, mask)
    monkeypatch.setattr(cada.evaluation.matching, "_BATCHES", {"cpu": (10**9, 10**3)})  # so that memory alone bounds
    match, groups, batches, last = small_model.match, [], [], []

    class Images(CADAImages):
        def __init__(self, states):
            assert all(reference() is None for reference in last), "the group before is still there"
            super().__init__(states)
            groups.append(len(states))

    def match_pairs(input_ids, attention_mask, images, text_index, image_index):
        blocks = blocks_of_pairs(image_index)
        tokens = len(text_index) * int(attention_mask[text_index].sum(dim=1).max())
        batches.append((len(text_index), len(text_index if blocks is None else blocks) * layer + tokens * token))
        logits = match(input_ids, attention_mask, images, text_index, image_index)
        last[:] = [weakref.ref(tensor) for pair in images.keys_and_values.values() for tensor in pair]
        assert len(last) == 2 * text.num_hidden_layers
        return logits

    monkeypatch.setattr(cada.evaluation.matching, "CADAImages", Images)
    monkeypatch.setattr(small_model, "match", match_pairs)
    match_candidates(small_model, queries, gallery, top_candidates(torch.randn(20, 40), 30), memory=4 * quarter / 1e9)
    assert max(groups) == images_of_a_quarter and sum(groups) == 40
    assert sum(pairs for pairs, _ in batches) == 600
    assert all(bytes_of_batch <= quarter for pairs, bytes_of_batch in batches if pairs > 1)
    # Batches are not needlessly small: with room for many pairs they take most of it.
    assert images_of_a_quarter == 1 or max(bytes_of_batch for _, bytes_of_batch in batches) > quarter / 2


def test_each_process_matches_its_images(small_model):
    """Two parts of the gallery, as two processes have them: each encodes nothing again, and their scores add up."""
    small_model.eval()
    torch.manual_seed(0)
    states, mask = torch.randn(7, 9, 16), torch.ones(4, 9, dtype=torch.long)
    queries = Queries(torch.randn(4, 8), torch.randint(5, 1000, (4, 9)), mask)
    candidates = top_candidates(torch.randn(4, 7), 5)
    whole = match_candidates(small_model, queries, Gallery(torch.randn(7, 8), states), candidates)
    parts = []
    for own in (range(3), range(3, 7)):
        gallery = Gallery(torch.randn(7, 8), states[own.start : own.stop], own.start, own)
        parts.append(match_candidates(small_model, queries, gallery, candidates))
    torch.testing.assert_close(sum(parts), whole)
    assert ((parts[0] != 0) == (candidates < 3)).all()


def test_model_without_match_heads_is_evaluated_globally(processor):
    config = tiny_config(text_config={"vocab_size": 30524, "enc_token_id": 30523}, use_atp=False, use_ara=False)
    metrics = evaluate_retrieval(CADAForTextToImageRetrieval(config), processor, small_set(), progress=False)
    assert {name.split("_")[0] for name in metrics} == {"global", "queries", "gallery", "rerank"}


def test_rerank_k_has_to_be_positive(small_model, processor):
    with pytest.raises(ValueError, match="rerank_k"):
        evaluate_retrieval(small_model, processor, small_set(), rerank_k=0)
    queries = encode_queries(small_model, processor, ["a man"], progress=False)
    gallery = encode_gallery(small_model, processor, small_set(), progress=False)
    with pytest.raises(ValueError, match="`rerank_k` is 0. Give the number of candidates, 1 or more"):
        score_gallery(small_model, queries, gallery, rerank_k=0)


def test_letters_are_no_captions_and_texts_no_persons(small_model, processor):
    """Rows and captions made in Python, which nothing has checked before."""
    rows = small_set()
    first = rows.remove_columns("captions").add_column("captions", ["a man"] * len(rows))
    second = rows.remove_columns("person_id").add_column("person_id", ["0007"] * len(rows))
    for wrong, message in (
        (first, "Row 0: `captions` is the text 'a man'"),
        (second, "Row 0: `person_id` is the text"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate_retrieval(small_model, processor, wrong, progress=False)
    with pytest.raises(ValueError, match="`query_ids` does not hold numbers: 'a'. Give persons whole numbers"):
        retrieval_metrics([[0.5]], ["a"], ["a"])
    with pytest.raises(ValueError, match="`captions` is the text 'a man'. Give a list"):
        encode_queries(small_model, processor, "a man", progress=False)


def test_evaluate_metric_gives_the_same_numbers():
    similarity, persons, gallery_ids = [[0.9, 0.8, 0.7, 0.1], [0.9, 0.3, 0.2, 0.8]], [7, 8], [7, 8, 7, 9]
    expected = pytest.approx(retrieval_metrics(similarity, persons, gallery_ids))
    metric = RetrievalMetric()
    assert metric.compute(predictions=similarity, references=persons, gallery_ids=gallery_ids) == expected
    metric.add_batch(predictions=similarity[:1], references=persons[:1])
    metric.add_batch(predictions=similarity[1:], references=persons[1:])
    assert metric.compute(gallery_ids=gallery_ids) == expected
