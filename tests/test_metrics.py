"Measures against ir_measures, rank distance against simulation, bootstrap and randomisation test against their definitions."

import ir_measures
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

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


def incomplete(n_ids=60, n_cells=4, seed=0, missing=0.4):
    "Two systems on questions of different difficulty, with holes in the same places."
    random = np.random.default_rng(seed)
    first = random.normal(0.5, 0.2, (n_ids, 1)) + random.normal(0, 0.1, (n_ids, n_cells))
    second = first + random.normal(0.02, 0.1, (n_ids, 1)) + random.normal(0, 0.05, (n_ids, n_cells))
    first[random.random(first.shape) < missing] = np.nan
    return first, np.where(np.isnan(first), np.nan, second), *np.divmod(np.arange(first.size), n_cells)


def test_randomisation_test_equals_swapping_the_systems_of_a_question():
    "With missing cells: against a direct computation that swaps all values of an id and averages anew."
    first, second, ids, cells = incomplete()
    got = metrics.paired_difference(first.ravel(), second.ravel(), ids, cells)
    random, differences = np.random.default_rng(1), first - second
    observed = np.nanmean(differences, axis=0).mean()
    null = [np.nanmean(differences * random.choice([-1, 1], (len(first), 1)), axis=0).mean() for _ in range(4000)]
    assert got.value == pytest.approx(observed) and got.n_ids == np.isfinite(differences).any(axis=1).sum()
    assert 0.01 < got.p < 0.9 and got.p == pytest.approx(np.mean(np.abs(null) >= abs(observed)), abs=0.03)
    drawn = [np.nanmean(differences[random.integers(0, 60, 60)], axis=0).mean() for _ in range(4000)]
    low, high = np.quantile(drawn, [0.025, 0.975])
    assert (got.low, got.high) == pytest.approx((low, high), abs=0.15 * (high - low))
    assert metrics.paired_difference(first.ravel(), second.ravel(), ids, cells) == got
    swapped = metrics.paired_difference(second.ravel(), first.ravel(), ids, cells)
    assert swapped.value == pytest.approx(-got.value) and swapped.p == pytest.approx(got.p)


@pytest.mark.parametrize("seed", [14, 20, 46])
def test_randomisation_test_with_many_holes_is_exact(seed):
    "All 256 ways to swap the systems of eight questions. With the centred contributions p would be far too small."
    first, second, ids, cells = incomplete(8, 3, seed, 0.6)
    signs = np.array(np.meshgrid(*[[-1, 1]] * 8)).reshape(8, -1).T
    null = np.array([np.nanmean((first - second) * row[:, None], axis=0).mean() for row in signs])
    got = metrics.paired_difference(first.ravel(), second.ravel(), ids, cells)
    assert got.p == pytest.approx(np.mean(np.abs(null) >= abs(got.value) - 1e-12), abs=0.03)


@pytest.mark.parametrize("n", [3, 8, 300])
def test_sign_flips_agree_with_scipy(n):
    values = np.random.default_rng(n).normal(0.05, 0.5, n)
    expected = stats.permutation_test((values,), lambda x, axis: x.mean(axis=axis), permutation_type="samples", vectorized=True, n_resamples=2999, batch=500, rng=np.random.default_rng(0)).pvalue
    assert metrics.sign_flip_test(values) == pytest.approx(expected, abs=0.03)


def test_noise_is_not_significant_and_a_shift_is():
    random = np.random.default_rng(0)
    first = random.normal(0.5, 0.2, 200)
    shift = metrics.paired_difference(first + 0.01 + random.normal(0, 0.01, 200), first)
    assert shift.p == pytest.approx(2 / 10_000) and 0 < shift.low < 0.01 < shift.high
    assert np.mean([metrics.sign_flip_test(random.normal(0, 0.1, 50), resamples=499) < 0.05 for _ in range(300)]) < 0.09
    same = metrics.paired_difference(first, first)
    assert same == (0, 0, 0, 1, 200) and "p = 1.0000" in str(same)
    balanced = np.tile([0.1, -0.1], 50)
    assert metrics.paired_difference(first[:100] + balanced, first[:100]).p > 0.9


def test_translations_count_once():
    "The same question eleven times is no more evidence than once."
    values = np.random.default_rng(0).normal(0.03, 0.1, 30)
    once = metrics.paired_difference(values, np.zeros(30))
    eleven = metrics.paired_difference(np.repeat(values, 11), np.zeros(330), np.repeat(np.arange(30), 11), np.tile(np.arange(11), 30))
    assert eleven == pytest.approx(once)
    assert metrics.paired_difference(np.repeat(values, 11), np.zeros(330)).p < once.p / 2


def test_differences_of_little():
    assert np.isnan(metrics.paired_difference([], [])[:4]).all()
    one = metrics.paired_difference([0.5, 0.7], [0.4, 0.4], ids=["Q1", "Q1"])
    assert one.value == pytest.approx(0.2) and np.isnan(one[1:4]).all() and one.n_ids == 1
    for first, second in (([1.0], [1.0, 2.0]), ([1.0, np.nan], [1.0, 2.0])):
        with pytest.raises(ValueError, match="same queries"):
            metrics.paired_difference(first, second)


def test_holm_by_hand():
    corrected = metrics.holm([0.04, np.nan, 0.01, 0.03, 0.5])
    assert np.allclose(corrected, [0.09, np.nan, 0.04, 0.09, 0.5], equal_nan=True)
    assert np.isnan(metrics.holm([np.nan])).all() and len(metrics.holm([])) == 0 and metrics.holm([0.7, 0.8]).max() <= 1


def test_seeds_one_by_one():
    summary = metrics.seed_summary([0.3, 0.1, 0.2])
    assert summary.values == (0.3, 0.1, 0.2) and (summary.mean, summary.std, summary.minimum, summary.maximum) == pytest.approx((0.2, 0.1, 0.1, 0.3))
    assert str(summary) == "0.200 ± 0.100 (0.300, 0.100, 0.200)" and np.isnan(metrics.seed_summary([0.5]).std)
    for values in ([], [[1.0]]):
        with pytest.raises(ValueError, match="one number per seed"):
            metrics.seed_summary(values)
