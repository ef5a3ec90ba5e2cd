"Ranks: against a brute-force reference, with ties, in any block size, and clear errors."

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid_ir import retrieval


def reference_rank(scores, relevant, grades, passage):
    "Rank of one relevant passage in one ranking, by sorting: other passages before relevant ones with the same score."
    rows = sorted(range(len(scores)), key=lambda row: (-scores[row], row in relevant, grades.get(row, 0)))
    tied_before = [row for row in rows if scores[row] == scores[passage] and row in relevant and grades[row] < grades[passage]]
    first = next(place for place, row in enumerate(rows) if scores[row] == scores[passage] and row in relevant)
    same = sorted(row for row in relevant if scores[row] == scores[passage] and grades[row] == grades[passage])
    return first + len(tied_before) + 1 + same.index(passage)


@st.composite
def problems(draw):
    "Small integer embeddings (many ties, exact products), languages of any size, any judgements, grades 1 to 3."
    sizes = draw(st.lists(st.integers(0, 7), min_size=1, max_size=4).filter(sum))
    n_queries, dim = draw(st.integers(1, 6)), draw(st.integers(1, 3))
    numbers = st.integers(-2, 2)
    queries = np.array(draw(st.lists(numbers, min_size=n_queries * dim, max_size=n_queries * dim)), dtype=np.float32).reshape(n_queries, dim)
    passages = np.array(draw(st.lists(numbers, min_size=sum(sizes) * dim, max_size=sum(sizes) * dim)), dtype=np.float32).reshape(-1, dim)
    pairs = draw(st.lists(st.tuples(st.integers(0, n_queries - 1), st.integers(0, sum(sizes) - 1)), min_size=1, max_size=15, unique=True))
    grades = draw(st.lists(st.integers(1, 3), min_size=len(pairs), max_size=len(pairs)))
    stops = np.cumsum(sizes).tolist()
    slices = {f"l{n}": slice(start, stop) for n, (start, stop) in enumerate(zip([0, *stops], stops))}
    return queries, passages, slices, np.array(pairs), np.array(grades)


@settings(max_examples=200, deadline=None)
@given(problems(), st.integers(1, 3))
def test_ranks_equal_brute_force(problem, top_k):
    queries, passages, slices, pairs, grades = problem
    ranks = retrieval.rank_judgements(queries, passages, slices, *pairs.T, grades, top_k=top_k, device="cpu")
    scores = queries @ passages.T
    graded = {tuple(pair): grade for pair, grade in zip(pairs.tolist(), grades.tolist())}
    seen = {"corpus": [], "pool": []}
    for number, (query, passage) in enumerate(pairs.tolist()):
        own = next(rows for rows in slices.values() if rows.start <= passage < rows.stop)
        for place, (kind, rows, got) in enumerate([("corpus", own, ranks.corpus_ranks), ("pool", slice(0, len(passages)), ranks.pool_ranks)]):
            relevant = {p - rows.start: grade for (q, p), grade in graded.items() if q == query and rows.start <= p < rows.stop}
            expected = reference_rank(scores[query, rows], set(relevant), relevant, passage - rows.start)
            tied = sum(1 for p in relevant if scores[query, rows][p] == scores[query, passage] and relevant[p] == graded[query, passage])
            seen[kind].append((query, rows.start, int(got[number])))
            if tied == 1:
                assert got[number] == expected
    for places in seen.values():  # relevant passages that tie in score and grade take different places
        assert len(set(places)) == len(places)
    assert np.array_equal(ranks.scores, scores[pairs[:, 0], pairs[:, 1]])
    best = -np.sort(-scores, axis=1)[:, :top_k]
    assert np.array_equal(ranks.top_scores, best)
    assert np.array_equal(np.take_along_axis(scores, ranks.top_passages.astype(int), 1), best)


@settings(max_examples=100, deadline=None)
@given(problems(), st.integers(1, 400))
def test_blocks_and_pool_change_nothing(problem, memory):
    queries, passages, slices, pairs, grades = problem
    queries = np.tile(queries, (20, 1))  # more queries than the smallest block
    pairs = np.concatenate([pairs + [n * (len(queries) // 20), 0] for n in range(20)])
    grades = np.tile(grades, 20)
    whole = retrieval.rank_judgements(queries, passages, slices, *pairs.T, grades, top_k=2, device="cpu")
    blocks = retrieval.rank_judgements(queries, passages, slices, *pairs.T, grades, top_k=2, memory=memory, device="cpu")
    corpora = retrieval.rank_judgements(queries, passages, slices, *pairs.T, grades, pool=False, memory=memory, device="cpu")
    for name in ("corpus_ranks", "pool_ranks", "scores", "top_scores"):
        assert np.array_equal(getattr(whole, name), getattr(blocks, name)), name
    assert np.array_equal(whole.corpus_ranks, corpora.corpus_ranks) and corpora.pool_ranks is None and corpora.top_passages is None


def test_order_of_judgements_is_kept():
    random = np.random.default_rng(0)
    queries, passages = random.standard_normal((30, 5)), random.standard_normal((40, 5))
    slices = {"de": slice(0, 25), "en": slice(25, 40)}
    pairs = np.argwhere(random.random((30, 40)) < 0.1)
    shuffle = random.permutation(len(pairs))
    straight, mixed = (retrieval.rank_judgements(queries, passages, slices, *part.T) for part in (pairs, pairs[shuffle]))
    for name in ("corpus_ranks", "pool_ranks", "scores"):
        assert np.array_equal(getattr(straight, name)[shuffle], getattr(mixed, name))


def test_ties_count_against_the_system():
    passages = np.ones((10, 4))
    ranks = retrieval.rank_judgements(np.ones((1, 4)), passages, {"de": slice(0, 4), "en": slice(4, 10)}, [0, 0], [0, 4])
    assert ranks.corpus_ranks.tolist() == [4, 6] and sorted(ranks.pool_ranks) == [9, 10]


def test_equal_embeddings_tie_wherever_they_stand():
    "The same passage at both ends of the pool has the same score in every block size, so it always counts as a tie."
    random = np.random.default_rng(0)
    passages = random.standard_normal((3001, 100)).astype(np.float32)
    passages[[0, 1500, 3000]] = passages[7]
    queries = passages[7] + random.standard_normal((333, 100)).astype(np.float32) * 0.1
    for memory in (2**16, 2**20, 2**25):
        ranks = retrieval.rank_judgements(queries, passages, {"de": slice(0, 3001)}, np.arange(333), np.full(333, 7), memory=memory)
        assert (ranks.pool_ranks == 4).all()


def test_many_thresholds_and_long_corpora():
    random = np.random.default_rng(0)
    scores, passages = random.integers(0, 50, (8, 9000)).astype(np.float32), random.integers(0, 9000, 320)
    corpora = np.sort(random.integers(0, 9001, (320, 2)), axis=1)
    own, counts = retrieval.count_block(scores, np.arange(0, 321, 40), passages, corpora, True)
    for judgement, (passage, (start, stop)) in enumerate(zip(passages, corpora)):
        row = scores[judgement // 40]
        assert own[judgement] == row[passage]
        assert counts[:, judgement].tolist() == [(row[start:stop] >= row[passage]).sum(), (row >= row[passage]).sum()]


def test_half_precision_is_scored_in_single():
    random = np.random.default_rng(0)
    passages = random.standard_normal((50, 16)).astype(np.float16)
    ranks = retrieval.rank_judgements(torch.from_numpy(passages), torch.from_numpy(passages).to(torch.bfloat16), {"de": slice(0, 50)}, [3], [3])
    assert ranks.scores.dtype == np.float32 and ranks.scores[0] == pytest.approx(float(passages[3].astype(float) @ torch.from_numpy(passages)[3].to(torch.bfloat16).double().numpy()), rel=1e-5)


def test_precision_setting_is_restored():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with retrieval.full_precision():
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(
    "queries, passages, slices, pairs, message",
    [
        (np.zeros((0, 2)), np.ones((2, 2)), {"de": slice(0, 2)}, [(0, 0)], "query embeddings.*non-empty"),
        (np.ones((1, 2)), np.array([[1, 2], [np.inf, 1]]), {"de": slice(0, 2)}, [(0, 0)], "passage embeddings.*row 1"),
        (np.ones((1, 3)), np.ones((2, 2)), {"de": slice(0, 2)}, [(0, 0)], "3 dimensions.*2"),
        (np.ones((1, 2)), np.ones((2, 2)), {"de": slice(0, 1)}, [(0, 0)], "slices must cover the 2 rows"),
        (np.ones((1, 2)), np.ones((2, 2)), {"de": slice(0, 2)}, [(0, 2)], "passage row 2.*2 passage"),
        (np.ones((1, 2)), np.ones((2, 2)), {"de": slice(0, 2)}, [(1, 0)], "query row 1"),
        (np.ones((1, 2)), np.ones((2, 2)), {"de": slice(0, 2)}, [(0, 1), (0, 1)], "judged twice"),
        (np.ones((1, 2)), np.ones((2, 2)), {"de": slice(0, 2)}, np.empty((0, 2), int), "at least one"),
        (np.array([["a", None]], dtype=object), np.ones((2, 2)), {"de": slice(0, 2)}, [(0, 0)], "array of numbers"),
    ],
)
def test_errors(queries, passages, slices, pairs, message):
    with pytest.raises(ValueError, match=message):
        retrieval.rank_judgements(queries, passages, slices, *np.array(pairs).T)


def test_top_passages():
    random = np.random.default_rng(0)
    queries, passages = random.standard_normal((70, 6)).astype(np.float32), random.standard_normal((30, 6)).astype(np.float32)
    rows, scores = retrieval.top_passages(queries, passages, k=100, memory=1000)
    assert rows.shape == (70, 30) and np.array_equal(np.sort(rows, axis=1), np.tile(np.arange(30), (70, 1)))
    assert (np.diff(scores, axis=1) <= 0).all() and np.allclose(scores, np.take_along_axis(queries @ passages.T, rows.astype(int), 1), atol=1e-5)
    with pytest.raises(ValueError, match="k must be"):
        retrieval.top_passages(queries, passages, k=0)


def test_trec_files(tmp_path):
    import ir_measures

    run = retrieval.trec_run(["de:Q1", "de:Q2"], ["a", "b", "c"], np.array([[2, 0], [1, -1]]), np.array([[0.75, 0.5], [0.25, np.nan]], dtype=np.float32))
    assert run["doc_id"].tolist() == ["c", "a", "b"]
    retrieval.write_trec_run(run, tmp_path / "a.run")
    read = pd.DataFrame(ir_measures.read_trec_run(str(tmp_path / "a.run")))
    assert read[["query_id", "doc_id", "score"]].values.tolist() == run[["query_id", "doc_id", "score"]].values.tolist()
    qrels = retrieval.trec_qrels(["de:Q1", "de:Q2"], ["a", "b", "c"], np.array([0, 1]), np.array([2, 1]), np.array([2, 1]))
    assert qrels.values.tolist() == [["de:Q1", "c", 2], ["de:Q2", "b", 1]]
    with pytest.raises(ValueError, match="white space"):
        retrieval.trec_names(["de"], ["Q 1"])


@pytest.mark.parametrize("dim", [7, 384])
def test_equal_passages_tie_however_few_the_queries(dim):
    "The relevant passage is the last of equal ones, and ranks behind all of them."
    rng = np.random.default_rng(0)
    for n_queries in [*range(1, 13), 17, 33]:
        for n_passages in (1, 2, 3, 17, 129, 130):
            queries, passage = rng.standard_normal((n_queries, dim), dtype=np.float32), rng.standard_normal((1, dim), dtype=np.float32)
            slices, rows = {"de": slice(0, n_passages)}, np.arange(n_queries)
            ranks = retrieval.rank_judgements(queries, np.repeat(passage, n_passages, axis=0), slices, rows, np.full(n_queries, n_passages - 1), memory=16 * 4 * n_passages)
            assert (ranks.corpus_ranks == n_passages).all() and (ranks.pool_ranks == n_passages).all()
