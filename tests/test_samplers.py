"""The batches of every sampler, as properties that hold for any pairs."""

from itertools import islice

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, chisquare

from hybrid_ir.pairs import ParallelPairs, load_pairs
from hybrid_ir.samplers import SAMPLERS, BatchSampler, composition

slow = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


@st.composite
def parallel_pairs(draw) -> ParallelPairs:
    "Pairs with missing translations, missing sides, and passages that several ids share."
    languages = draw(st.sampled_from([["de", "en"], ["de", "en", "th"], ["ar", "de", "en", "zh"]]))
    n_ids, seed = draw(st.integers(12, 40)), draw(st.integers(0, 2**16))
    missing, shared = draw(st.sampled_from([0.0, 0.2, 0.5])), draw(st.sampled_from([0.0, 0.3]))
    rng, records = np.random.default_rng(seed), []
    for number in range(n_ids):
        passage = rng.integers(0, number + 1) if rng.random() < shared else number
        query_languages = [language for language in languages if rng.random() >= missing] or [languages[0]]
        passage_languages = [language for language in languages if rng.random() >= missing] or [languages[0]]
        records.append({
            "id": f"id-{number}", "query": {language: f"question {number} {language}" for language in query_languages},
            "passage": {language: f"passage {passage} {language}" for language in passage_languages},
        })  # fmt: skip
    return ParallelPairs.from_records(records)


def usable_sampler(pairs, sampler, batch_size, **options) -> BatchSampler | None:
    try:
        return BatchSampler(pairs, sampler, batch_size=batch_size, **options)
    except ValueError as error:
        assert any(word in str(error) for word in ("valid", "works", "needs", "keep only", "leave it out", "choose another"))
        return None


@slow
@given(parallel_pairs(), st.sampled_from(SAMPLERS), st.integers(2, 5), st.integers(0, 100))
def test_every_batch_keeps_the_rules(pairs, sampler, batch_size, seed):
    batches = usable_sampler(pairs, sampler, batch_size, seed=seed)
    if batches is None:
        return
    row_ids, row_languages = pairs.id_of_row, pairs.language_of_row
    for batch in islice(batches, 30):
        assert batch.shape == (batch_size, 2) and batch.dtype == np.int64
        ids = row_ids[batch]
        assert (ids[:, 0] == ids[:, 1]).all(), "question and passage belong together"
        assert len(set(ids[:, 0])) == batch_size, "no id twice"
        assert len(set(pairs.groups[ids[:, 0]])) == batch_size, "no passage twice, in any language"
        assert all(pairs.table[int(row)]["query"] for row in batch[:, 0]) and all(pairs.table[int(row)]["passage"] for row in batch[:, 1])
        query_languages, passage_languages = row_languages[batch].T
        same = query_languages == passage_languages
        if sampler == "cross":
            assert not same.any()
        elif sampler == "hybrid":
            assert not same.any() or (same.all() and len(set(query_languages)) == 1)
        else:
            assert same.all()
            if sampler in ("mono", "english"):
                assert len(set(query_languages)) == 1
            if sampler == "english":
                assert pairs.languages[query_languages[0]] == "en"


@slow
@given(parallel_pairs(), st.sampled_from(SAMPLERS), st.integers(0, 100), st.integers(0, 20))
def test_resume_and_seed(pairs, sampler, seed, done):
    batches = usable_sampler(pairs, sampler, 3, seed=seed)
    if batches is None:
        return
    list(islice(batches, done))
    state, following = batches.state_dict(), list(islice(batches, 10))
    resumed = BatchSampler(pairs, sampler, batch_size=3, seed=seed)
    resumed.load_state_dict(state)
    assert np.array_equal(following, list(islice(resumed, 10)))
    first, second = (list(islice(BatchSampler(pairs, sampler, batch_size=3, seed=seed), 10)) for _ in range(2))
    assert np.array_equal(first, second)
    other = list(islice(BatchSampler(pairs, sampler, batch_size=3, seed=seed + 1), 10))
    assert not np.array_equal(first, other)


def full_pairs(n_ids: int, languages: list[str]) -> ParallelPairs:
    both = lambda kind, number: {language: f"{kind} {number} {language}" for language in languages}  # noqa: E731
    return ParallelPairs.from_records({"id": f"id-{n}", "query": both("question", n), "passage": both("passage", n)} for n in range(n_ids))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_all_ids_are_used_before_any_is_used_again(sampler):
    pairs = full_pairs(100, ["de", "en", "tr"])
    row_ids = pairs.id_of_row
    used = np.concatenate([row_ids[batch[:, 0]] for batch in islice(BatchSampler(pairs, sampler, batch_size=10), 30)])
    for start in range(0, 300, 100):
        assert len(set(used[start : start + 100])) == 100
    assert not np.array_equal(used[:100], used[100:200])


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_batch_across_two_passes_repeats_nothing(sampler):
    pairs = full_pairs(25, ["de", "en", "tr"])
    row_ids = pairs.id_of_row
    counts = np.zeros(25, dtype=int)
    for batch in islice(BatchSampler(pairs, sampler, batch_size=10), 200):
        ids = row_ids[batch[:, 0]]
        assert len(set(ids)) == 10
        counts[ids] += 1
        assert counts.max() - counts.min() <= 1


@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.5, 1.0])
def test_alpha_is_the_share_of_monolingual_batches(alpha):
    pairs = full_pairs(40, ["de", "en", "tr"])
    kinds = composition(islice(BatchSampler(pairs, "hybrid", alpha, batch_size=10, seed=1), 800), pairs).batches["kind"]
    mono = int((kinds == "mono").sum())
    assert set(kinds) <= {"mono", "cross"}
    assert mono == alpha * 800 if alpha in (0, 1) else binomtest(mono, 800, alpha).pvalue > 1e-4


def test_languages_and_ordered_pairs_are_uniform():
    pairs = full_pairs(60, ["ar", "de", "en", "zh"])
    mono = composition(islice(BatchSampler(pairs, "mono", batch_size=10, seed=2), 1000), pairs).language_pairs.to_numpy()
    assert chisquare(np.diag(mono) / 10).pvalue > 1e-4 and mono.sum() == np.trace(mono)
    cross = composition(islice(BatchSampler(pairs, "cross", batch_size=10, seed=2), 1000), pairs).language_pairs.to_numpy()
    assert chisquare(cross[~np.eye(4, dtype=bool)]).pvalue > 1e-4 and np.trace(cross) == 0
    mixed = composition(islice(BatchSampler(pairs, "mixed", batch_size=10, seed=2), 1000), pairs).language_pairs.to_numpy()
    assert chisquare(np.diag(mixed)).pvalue > 1e-4


def test_languages_by_size():
    records = [{"id": f"{n}", "query": {"en": f"q{n}"} | ({"de": f"f{n}"} if n < 20 else {}), "passage": {"en": f"p{n}"} | ({"de": f"a{n}"} if n < 20 else {})} for n in range(80)]
    pairs = ParallelPairs.from_records(records)
    counts = composition(islice(BatchSampler(pairs, "mono", batch_size=5, language_exponent=1.0), 1000), pairs).language_pairs.to_numpy()
    assert binomtest(int(counts[0, 0] / 5), 1000, 0.2).pvalue > 1e-4


@pytest.mark.parametrize("exponent, share", [(1.0, 0.75), (0.0, 0.5)])
def test_several_training_sets(exponent, share):
    small, large = full_pairs(30, ["de", "en"]), full_pairs(90, ["de", "en", "tr"])
    pairs = ParallelPairs.concat([large, small])
    row_ids = pairs.id_of_row
    sets = [set(pairs.sets[row_ids[batch[:, 0]]]) for batch in islice(BatchSampler(pairs, "hybrid", batch_size=5, set_exponent=exponent), 800)]
    assert all(len(of_batch) == 1 for of_batch in sets)
    assert binomtest(sum(of_batch == {0} for of_batch in sets), 800, share).pvalue > 1e-4


def test_errors_say_what_would_work():
    pairs = load_pairs("sample")
    for arguments, message in [
        (dict(sampler="hybird"), "unknown sampler 'hybird'; valid: english, mixed, mono, cross, hybrid"),
        (dict(alpha=1.01), "alpha must be a number from 0 to 1"),
        (dict(alpha=float("nan")), "alpha must be a number from 0 to 1"),
        (dict(languages=["de", "xx"]), "unknown training language 'xx'; valid: ar, de"),
        (dict(sampler="cross", languages=["de"]), "at least two training languages"),
        (dict(sampler="english", languages=["de", "tr"]), "needs 'en'"),
        (dict(batch_size=0), "batch_size must be a whole number"),
        (dict(batch_size=10_000), f"a batch_size up to {pairs.n_ids} works"),
        (dict(seed=-1), "seed must be"),
    ]:
        with pytest.raises(ValueError, match=message):
            BatchSampler(pairs, **arguments)


def test_the_language_that_is_too_small_is_named():
    records = [{"id": f"{n}", "query": {"en": f"q{n}"} | ({"th": f"t{n}"} if n < 7 else {}), "passage": {"en": f"p{n}"} | ({"th": f"s{n}"} if n < 7 else {})} for n in range(50)]
    with pytest.raises(ValueError, match=r"th: 7\); a batch_size up to 7 works, or keep only en"):
        BatchSampler(ParallelPairs.from_records(records), "mono", batch_size=20)


def repeats(pairs, batches) -> int:
    return composition(batches, pairs).repeated_ids


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_ids_repeat_only_where_that_is_asked_for(sampler):
    "Drawn independently, as many ids repeat in a batch as chance makes them; all other rules stay."
    pairs, batch_size, count = load_pairs("sample"), 40, 150
    assert repeats(pairs, islice(BatchSampler(pairs, sampler, batch_size=batch_size, seed=1), 20)) == 0
    batches = list(islice(BatchSampler(pairs, sampler, batch_size=batch_size, seed=1, unique_ids=False), count))
    expected = batch_size - pairs.n_ids * (1 - (1 - 1 / pairs.n_ids) ** batch_size)  # pairs of a batch whose id stands there already
    assert repeats(pairs, batches) / count == pytest.approx(expected, rel=0.1)
    row_ids, row_languages = pairs.id_of_row, pairs.language_of_row
    kinds = set()
    for batch in batches:
        assert batch.shape == (batch_size, 2) and (row_ids[batch[:, 0]] == row_ids[batch[:, 1]]).all()
        kinds.add("cross" if (row_languages[batch[:, 0]] != row_languages[batch[:, 1]]).all() else "same" if (row_languages[batch[:, 0]] == row_languages[batch[:, 1]]).all() else "other")
    assert kinds == {"cross": {"cross"}, "hybrid": {"cross", "same"}}.get(sampler, {"same"})
    counts = np.bincount(row_ids[np.concatenate(batches)[:, 0]], minlength=pairs.n_ids)
    assert chisquare(counts).pvalue > 1e-4, "every id is as likely as any other"


@slow
@given(parallel_pairs(), st.sampled_from(SAMPLERS), st.integers(0, 100), st.integers(0, 20))
def test_resume_is_exact_with_repeated_ids_too(pairs, sampler, seed, done):
    batches = usable_sampler(pairs, sampler, 3, seed=seed, unique_ids=False)
    if batches is None:
        return
    list(islice(batches, done))
    state, following = batches.state_dict(), list(islice(batches, 10))
    resumed = BatchSampler(pairs, sampler, batch_size=3, seed=seed + 7, unique_ids=False)
    resumed.load_state_dict(state)
    assert np.array_equal(following, list(islice(resumed, 10)))
    for batch in following:
        rows, ids = pairs.table, pairs.id_of_row[batch]
        assert (ids[:, 0] == ids[:, 1]).all() and all(rows[int(row)]["query"] for row in batch[:, 0]) and all(rows[int(row)]["passage"] for row in batch[:, 1])


def test_a_set_without_pairs_in_the_languages_says_so():
    both = ParallelPairs.concat([load_pairs("sample", ["de", "en"]), load_pairs("sample", ["th", "tr"])])
    with pytest.raises(ValueError, match="has no pairs in these languages: leave it out"):
        BatchSampler(both, "mono", batch_size=4, languages=["de", "en"])
