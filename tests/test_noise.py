"""The benchmark of noisy captions swaps what it says."""

from noise import swap_captions

from cada.data.drawn import load_drawn


def test_a_share_of_the_captions_describes_another_person():
    """20 persons with two images, two captions each: 80 captions, of which 40 move, with their phrases."""
    rows = load_drawn(train_persons=20, val_persons=1, test_persons=1)["train"]
    noisy = swap_captions(rows, 0.5, seed=0)
    assert noisy.features == rows.features and noisy["person_id"][:] == rows["person_id"][:]

    def captions(dataset):
        columns = (dataset["person_id"], dataset["captions"], dataset["attribute_spans"])
        return [(row[0], *caption) for row in zip(*columns) for caption in zip(*row[1:])]

    before, after = captions(rows), captions(noisy)
    persons = {caption: person for person, caption, _ in before}
    assert len(persons) == 80  # no two captions are equal
    assert sum(first != second for first, second in zip(before, after)) == 40
    assert sum(persons[caption] != person for person, caption, _ in after) == 40
    assert sorted(caption[1:] for caption in before) == sorted(caption[1:] for caption in after)
    assert captions(swap_captions(rows, 0.0, seed=0)) == before
