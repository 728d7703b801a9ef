"""The plan of the ablation: every run is a valid configuration, and the paper's settings are among them."""

import json

import ablation
import pytest
from ablation import Run, claims, plan, scores_of, spread

from configuration_cada import CADAConfig


@pytest.fixture(scope="module")
def studies():
    return plan(CADAConfig(), drawn=True)


def test_every_run_is_a_valid_configuration_and_has_one_meaning(studies):
    meanings = {}
    for row in [row for rows in studies.values() for row in rows]:
        CADAConfig(**row.run.overrides)
        assert meanings.setdefault(row.run.name, row.run) == row.run
        assert row.run.trained is None or row.run.trained in ablation.KEPT


def test_groups_are_those_of_table_5(studies):
    groups = {row.title: row.run.overrides for row in studies["groups"]}
    for title, fields in list(groups.items())[1:]:
        assert f"{fields['group_size']}/{fields['group_stride']}" == title
    default = CADAConfig()  # the first line is the default
    assert (default.group_size, default.group_stride) == (36, 36)
    assert list(groups)[0] == "36/36" and groups["36/36"] == {"use_ara": False}


def test_groups_fit_a_text_that_cannot_be_halved_or_thirded_twice():
    """A text of 34 words, as on the drawn set. Three groups at a stride of 34 / 4 = 8.5, so 8: 34 - 2 * 8 = 18."""
    words = 34
    start = CADAConfig(max_text_length=words + 1, group_size=17, group_stride=17)
    groups = {row.title: row.run.overrides for row in plan(start, drawn=True)["groups"]}
    sizes = {title: (fields.get("group_size", 17), fields.get("group_stride", 17)) for title, fields in groups.items()}
    assert sizes == {"36/36": (17, 17), "36/18": (18, 8), "24/24": (12, 11), "48/24": (23, 11), "72/72": (34, 34)}
    for fields in groups.values():
        CADAConfig(**{"max_text_length": words + 1, "group_size": 17, "group_stride": 17, **fields})


def test_components_and_layers_are_those_of_tables_4_and_7(studies):
    switches = {row.run.name: row.run.overrides for row in studies["components"]}
    assert switches["full"] == {}
    assert switches["cmpm"] == {"use_atp": False, "use_ara": False, "contrastive_loss": "cmpm"}
    assert [row.title for row in studies["layers"]] == ["6 vision, 6 text", "8 vision, 8 text", "12 vision, 12 text"]
    assert studies["layers"][-1].run.name == "full"


def test_other_sets_have_no_second_domain():
    assert "domains" not in plan(CADAConfig(), drawn=False)


def test_claims_compare_planned_runs(studies):
    known = {(row.run.name, stage) for rows in studies.values() for row in rows for stage in row.stages}
    for _, better, worse in claims(CADAConfig()):
        assert {better, worse} <= known


def test_scores_are_read_for_all_seeds_or_none(tmp_path):
    for seed, value in ((0, 50.0), (1, 53.0)):
        folder = ablation.folder_of(tmp_path, Run("full"), seed)
        folder.mkdir(parents=True)
        (folder / "test_results.json").write_text(json.dumps({"test_local_R1": value}))
    assert scores_of(tmp_path, "full", [0, 1], "local", "R1") == [50.0, 53.0]
    assert scores_of(tmp_path, "full", [0, 1, 2], "local", "R1") == []
    # Deviation of 50 and 53 with n - 1 in the denominator: sqrt(2 * 1.5²) = 2.12.
    assert spread([50.0, 53.0]) == "51.5 ± 2.1"
    assert spread([1.0, 2.0], "+") == "+1.5 ± 0.7"
    assert spread([]) == "–"
