"Measures against ir_measures, rank distance against simulation, bootstrap against its definition."

import ir_measures
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid_ir import metrics

IR_NAMES = {
    "map": "AP", "map@5": "AP@5", "mrr": "RR", "mrr@10": "RR@10", "ndcg": "nDCG", "ndcg@10": "nDCG@10", "ndcg@3": "nDCG@3",
    "recall@1": "R@1", "recall@10": "R@10", "recall@100": "R@100"}  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 30), st.integers(1, 12))
def test_measures_agree_with_ir_measures(seed, n_rankings, most_relevant):
    random = np.random.default_rng(seed)
    groups, ranks = [], []
    for ranking in range(n_rankings):
        count = random.integers(1, most_relevant + 1)
        groups += [ranking] * count
        ranks += random.choice(150, count, replace=False).tolist()
    groups, ranks, grades = np.array(groups), np.array(ranks) + 1, random.integers(1, 4, len(ranks))
    run = pd.DataFrame({"query_id": np.repeat(np.arange(n_rankings), 150).astype(str), "doc_id": np.tile(np.arange(1, 151), n_rankings).astype(str), "score": np.tile(-np.arange(150.0), n_rankings)})
    qrels = pd.DataFrame({"query_id": groups.astype(str), "doc_id": ranks.astype(str), "relevance": grades})
    shuffle = random.permutation(len(ranks))
    judged = metrics.judged_ranks(groups[shuffle], ranks[shuffle], grades[shuffle])
    got = metrics.measure(judged, list(IR_NAMES))
    expected = {(str(row.measure), int(row.query_id)): row.value for row in ir_measures.iter_calc(list(map(ir_measures.parse_measure, IR_NAMES.values())), qrels, run)}
    for name, ir_name in IR_NAMES.items():
        assert np.allclose(got[name], [expected[ir_name, ranking] for ranking in range(n_rankings)], atol=1e-6), name


@pytest.mark.parametrize("name", ["", "MAP", "ndcg@0", "ndcg@", "recall", "p@10", "map@x", None])
def test_unknown_measures(name):
    with pytest.raises(ValueError, match="valid: map"):
        metrics.parse_measure(name)


@pytest.mark.parametrize("groups, ranks, grades", [([], [], None), ([0], [0], None), ([0], [1], [0]), ([0, 1], [1], None)])
def test_bad_ranks(groups, ranks, grades):
    with pytest.raises(ValueError):
        metrics.judged_ranks(groups, ranks, grades)


def test_rank_distance_of_random_and_perfect_rankings():
    assert metrics.expected_rank_distance(13_014, 11) == pytest.approx(10_845.83, abs=0.01)
    random = np.random.default_rng(0)
    draws = np.array([random.choice(13_014, 11, replace=False) for _ in range(4000)]) + 1
    judged = metrics.judged_ranks(np.repeat(np.arange(4000), 11), draws.ravel())
    assert metrics.rank_distance(judged).mean() == pytest.approx(10_846, rel=0.01)
    assert metrics.normalized_rank_distance(judged, 13_014).mean() == pytest.approx(1, rel=0.01)
    perfect = metrics.judged_ranks(np.zeros(11, int), np.arange(1, 12))
    assert metrics.rank_distance(perfect) == [10] and metrics.normalized_rank_distance(perfect, 13_014) == [0] and metrics.worst_rank(perfect) == [11]


def test_rank_distance_needs_two_passages():
    judged = metrics.judged_ranks([0, 1, 1], [4, 1, 2])
    assert np.isnan(metrics.rank_distance(judged)[0]) and metrics.rank_distance(judged)[1] == 1
    assert np.isnan(metrics.normalized_rank_distance(judged, 2)).all()  # the whole pool is relevant: no scale
    assert metrics.worst_rank(judged).tolist() == [4, 2]


def test_same_language_share():
    top = np.array([[0, 1, 2, 3], [3, 2, 1, 0]])
    share = metrics.same_language_share(top, np.array([0, 0, 1, 1]), np.array([0, 0]), k=2)
    assert share.tolist() == [1, 0] and metrics.expected_language_share(np.array([0, 0, 1]), 3).round(2).tolist() == [0.67, 0.33, 0]


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 20), st.integers(1, 5))
def test_contributions_average_to_the_macro_average(seed, n_ids, n_cells):
    random = np.random.default_rng(seed)
    table = pd.DataFrame([(i, c) for i in range(n_ids) for c in range(n_cells)], columns=["id", "cell"])
    table["value"] = np.where(random.random(len(table)) < 0.3, np.nan, random.random(len(table)))
    contributions = metrics.id_contributions(table["value"], table["id"], table["cell"])
    expected = table.groupby("cell")["value"].mean().mean()
    assert len(contributions) == table.dropna()["id"].nunique()
    assert np.isnan(expected) and not len(contributions) or contributions.mean() == pytest.approx(expected)
    table["value"] = random.random(len(table))
    complete = metrics.id_contributions(table["value"], table["id"], table["cell"])
    assert np.allclose(complete, table.groupby("id")["value"].mean())


def test_interval_equals_resampling_questions():
    "With missing cells: against a bootstrap that draws questions and computes the macro-average anew each time."
    random = np.random.default_rng(0)
    values = np.clip(random.normal(0.5, 0.2, (150, 1)) + random.normal(0, 0.2, (150, 6)), 0, 1)
    values[random.random(values.shape) < 0.4] = np.nan
    ids, cells = np.divmod(np.arange(values.size), 6)
    estimate = metrics.bootstrap_interval(values.ravel(), ids, cells)
    drawn = [np.nanmean(values[random.integers(0, 150, 150)], axis=0).mean() for _ in range(4000)]
    low, high = np.quantile(drawn, [0.025, 0.975])
    assert estimate.value == pytest.approx(np.nanmean(values, axis=0).mean())
    assert (estimate.low, estimate.high) == pytest.approx((low, high), abs=0.1 * (high - low))
    assert metrics.bootstrap_interval(values.ravel(), ids, cells) == estimate
    assert metrics.bootstrap_interval(values.ravel(), ids, cells, seed=1) != estimate


def test_interval_of_little():
    assert np.isnan(metrics.bootstrap_interval([]).value)
    one = metrics.bootstrap_interval([0.5, 0.7], ids=["Q1", "Q1"])
    assert one.value == pytest.approx(0.6) and np.isnan(one.low)
    assert metrics.bootstrap_interval([1.0, 1.0, 1.0]) == (1, 1, 1)
    with pytest.raises(ValueError, match="confidence"):
        metrics.bootstrap_interval([1.0, 2.0], confidence=95)
