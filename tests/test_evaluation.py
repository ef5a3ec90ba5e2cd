"Evaluation: every setting against ir_measures, one encoding pass, any kind of encoder, saving, errors before work."

import json
import os
from collections import Counter
from pathlib import Path

import ir_measures
import numpy as np
import pandas as pd
import pytest
import torch

from hybrid_ir import metrics, retrieval
from hybrid_ir.benchmarks import Benchmark, load_benchmark
from hybrid_ir.evaluation import (
    DamagedFile,
    Scores,
    compare,
    compare_gap,
    embed,
    evaluate,
    score_embeddings,
)
from hybrid_ir.figures import bias_plot

IR_NAMES = {"map": "AP", "mrr@10": "RR@10", "ndcg@10": "nDCG@10", "recall@1": "R@1", "recall@10": "R@10", "recall@100": "R@100"}


def small_benchmark(n_ids=12, languages=("de", "en", "hi"), extra=30, seed=0):
    "Parallel questions with holes: some have no answer in a language, some have two, with grades; passage texts repeat."
    random = np.random.default_rng(seed)
    passages, queries, judgements = [], [], []
    for language in languages:
        for number in range(n_ids):
            for part in range(random.integers(0, 3)):
                passages.append((f"{number}/{part}", language, f"answer {number}.{part} {language}"))
        passages += [(f"x{number}", language, f"other {number % 20} {language}") for number in range(extra)]
        queries += [(f"Q{number}", language, f"question {number} {language}") for number in range(n_ids)]
    for query, (query_id, _, _) in enumerate(queries):
        for passage, (passage_id, _, _) in enumerate(passages):
            if passage_id.split("/")[0] == query_id[1:]:
                judgements.append((query, passage, 1 + (query + passage) % 3))
    return Benchmark(
        "small", pd.DataFrame(passages, columns=["id", "lang", "text"]), pd.DataFrame(queries, columns=["id", "lang", "text"]),
        pd.DataFrame(judgements, columns=["query", "passage", "grade"]))  # fmt: skip


def parallel_benchmark(n_ids=20, languages=("de", "en", "hi"), extra=10, without_passages=()):
    "Each question has one answer in every language, but for languages that have queries only."
    passages = [(str(n), language, f"answer {n} {language}") for language in languages if language not in without_passages for n in range(n_ids + extra)]
    queries = [(f"Q{n}", language, f"question {n} {language}") for language in languages for n in range(n_ids)]
    judgements = [(q, p, 1) for q, query in enumerate(queries) for p, passage in enumerate(passages) if passage[0] == query[0][1:]]
    tables = (pd.DataFrame(rows, columns=["id", "lang", "text"]) for rows in (passages, queries))
    return Benchmark("parallel", *tables, pd.DataFrame(judgements, columns=["query", "passage", "grade"]))


def noisy(weight, seed=0):
    "An encoder that knows the number of a text, hidden in noise, so that its quality can be chosen."
    def encoder(texts, kind):
        numbers = np.eye(40)[[int(text.split()[1].split(".")[0][-2:].lstrip("x")) for text in texts]]
        return weight * numbers + random_vectors([f"{seed} {text}" for text in texts], kind, 40) / 6

    return encoder


def small_vectors(texts, kind):
    "Small integers made from each text: exact products and many ties, but no zero vector."
    rows = [np.random.default_rng(list(text.encode())).integers(-1, 2, 6) for text in texts]
    return np.array([np.where(row.any(), row, 1) for row in rows], dtype=np.float32)


def random_vectors(texts, kind, dim=6):
    "Random numbers made from each text: different texts never tie, so the last bit of a sum does not matter."
    return np.array([np.random.default_rng(list(text.encode())).standard_normal(dim) for text in texts])


def ngrams(texts, kind):
    from sklearn.feature_extraction.text import HashingVectorizer

    counts = HashingVectorizer(analyzer="char_wb", ngram_range=(1, 3), n_features=1024, alternate_sign=False, norm=None).transform(texts).toarray()
    return counts + random_vectors(texts, kind, 1024) * 0.01


def reference_rows(benchmark, scores, corpus, query_rows):
    "Measures by ir_measures of rankings that were sorted one by one, ties against the system."
    grades = {}
    for query, passage, grade in zip(benchmark.judgement_queries, benchmark.judgement_passages, benchmark.judgement_grades):
        grades.setdefault(int(query), {})[int(passage)] = int(grade)
    run, qrels = {}, {}
    for query in range(query_rows.start, query_rows.stop):
        relevant = {passage: grade for passage, grade in grades[query].items() if corpus.start <= passage < corpus.stop}
        if relevant:
            order = sorted(range(corpus.start, corpus.stop), key=lambda row: (-scores[query, row], relevant.get(row, 0)))
            run[str(query)] = {str(row): -float(place) for place, row in enumerate(order)}
            qrels[str(query)] = {str(row): grade for row, grade in relevant.items()}
    rows = ir_measures.iter_calc([ir_measures.parse_measure(name) for name in IR_NAMES.values()], qrels, run) if qrels else []
    return pd.DataFrame([(int(row.query_id), str(row.measure), row.value) for row in rows], columns=["query", "measure", "value"]).pivot(index="query", columns="measure", values="value")


def product(query_vectors, passage_vectors):
    with retrieval.full_precision():
        return (torch.from_numpy(passage_vectors) @ torch.from_numpy(query_vectors).T).T.numpy()


@pytest.mark.parametrize("name, encoder", [("small", small_vectors), ("sample", ngrams)])
def test_every_setting_agrees_with_ir_measures(name, encoder):
    benchmark = small_benchmark() if name == "small" else load_benchmark("sample")
    queries, passages = (embed(encoder, rows["text"], kind, progress=False) for rows, kind in ((benchmark.queries, "query"), (benchmark.passages, "passage")))
    if name == "small":  # whole numbers, so that there are ties and each sum is exact
        queries, passages = small_vectors(benchmark.queries["text"], ""), small_vectors(benchmark.passages["text"], "")
    got = score_embeddings(benchmark, queries, passages)
    scores, checked = product(queries, passages), 0
    corpora = {**benchmark.passage_slices, "all": slice(0, len(benchmark.passages))}
    for language, query_rows in benchmark.query_slices.items():
        for corpus_language, corpus in corpora.items():
            expected = reference_rows(benchmark, scores, corpus, query_rows)
            part = got.per_query[(got.per_query["query_language"] == language) & (got.per_query["passage_language"] == corpus_language)]
            assert part["query_id"].tolist() == benchmark.queries["id"].iloc[expected.index].tolist()
            assert set(part["task"]) == {"multi" if corpus_language == "all" else "mono" if corpus_language == language else "cross"}
            for measure, ir_name in IR_NAMES.items():
                assert np.allclose(part[measure], expected[ir_name], atol=1e-6), (language, corpus_language, measure)
                column = "multi" if corpus_language == "all" else corpus_language
                assert got.by_language(measure).loc[language, column] == pytest.approx(expected[ir_name].mean(), abs=1e-6)
            checked += 1
    assert checked == len(benchmark.languages) * (len(benchmark.languages) + 1)


def test_tasks_alone_equal_tasks_together():
    benchmark = small_benchmark()
    together = evaluate(random_vectors, benchmark, progress=False)
    for tasks in ("mono", "cross", "multi", ["mono", "cross"]):
        alone = evaluate(random_vectors, benchmark, tasks=tasks, progress=False)
        expected = together.summary().loc[[tasks] if isinstance(tasks, str) else tasks]
        pd.testing.assert_frame_equal(alone.summary(), expected)
        assert list(alone.info["tasks"]) == list(expected.index)


def test_every_distinct_text_is_encoded_once():
    benchmark, seen = small_benchmark(), Counter()

    def encoder(texts, kind):
        seen.update((kind, text) for text in texts)
        return small_vectors(texts, kind)

    evaluate(encoder, benchmark, progress=False, batch_size=7)
    assert set(seen.values()) == {1}
    assert set(seen) == {("query", text) for text in benchmark.queries["text"]} | {("passage", text) for text in benchmark.passages["text"]}
    assert len(benchmark.passages) > benchmark.passages["text"].nunique()


def test_bias_of_a_segregated_and_of_a_perfect_encoder():
    languages = ["ar", "de", "en", "hi"]
    ids = range(25)
    table = pd.DataFrame([(str(number), language, f"{number} {language}") for language in languages for number in ids], columns=["id", "lang", "text"])
    judgements = pd.DataFrame([(q, p, 1) for q in range(100) for p in range(100) if q % 25 == p % 25], columns=["query", "passage", "grade"])
    benchmark = Benchmark("parallel", table, table, judgements)
    meaning = np.eye(25)

    def encoder(weight):
        return lambda texts, kind: np.array([np.r_[meaning[int(text.split()[0])], weight * np.eye(4)[languages.index(text.split()[1])]] for text in texts])

    perfect, segregated = (evaluate(encoder(weight), benchmark, progress=False) for weight in (0.01, 5))
    bias = perfect.bias().loc["macro"]
    assert bias["rank_distance"] == 3 and bias["normalized_rank_distance"] == 0 and bias["worst_rank"] == 4 and perfect.summary().loc["multi", "map"] == 1
    bias = segregated.bias().loc["macro"]
    assert bias["same_language_share@10"] == 1 and bias["expected_share"] == 0.25 and bias["rank_distance"] > 25
    assert segregated.summary().loc["mono", "map"] == 1 and segregated.gap("map").value == pytest.approx(0)
    assert perfect.info["random_rank_distance"] == pytest.approx(101 * 3 / 5) and perfect.info["perfect_rank_distance"] == 3


def test_random_embeddings_at_the_size_of_xquad_r():
    random = np.random.default_rng(0)
    sizes = [1222, 1276, 1234, 1180, 1215, 1244, 1219, 852, 1167, 1209, 1196]
    starts = np.cumsum([0, *sizes[:-1]])
    slices = {str(n): slice(int(start), int(start + size)) for n, (start, size) in enumerate(zip(starts, sizes))}
    queries, passages = random.standard_normal((1190, 32), dtype=np.float32), random.standard_normal((13_014, 32), dtype=np.float32)
    pairs = np.array([(query, start + random.integers(size)) for query in range(1190) for start, size in zip(starts, sizes)])
    ranks = retrieval.rank_judgements(queries, passages, slices, *pairs.T)
    judged = metrics.judged_ranks(pairs[:, 0], ranks.pool_ranks)
    assert metrics.rank_distance(judged).mean() == pytest.approx(10_846, rel=0.02)


def test_gap_is_over_the_same_queries():
    scores = evaluate(small_vectors, small_benchmark(), progress=False)
    table = scores.per_query[scores.per_query["task"] != "multi"]
    gaps = {}
    for (_, language), rows in table.groupby(["query_id", "query_language"], observed=True):
        values = dict(zip(rows["passage_language"], rows["map"]))
        for other, value in values.items():
            if language in values and other != language:
                gaps.setdefault((language, other), []).append(values[language] - value)
    assert scores.gap("map").value == pytest.approx(np.mean([np.mean(values) for values in gaps.values()]), abs=1e-6)


def macro(table, columns):
    "Average over query languages of the averages over their rows."
    return table.groupby(["task", "query_language"], observed=True)[columns].mean().groupby("task", observed=True).mean()


def test_by_query_averages_to_the_cells_and_the_summary():
    "A benchmark with holes: rows of a query language average to the mean of its cells. Without holes they average to the summary."
    holes, complete = (evaluate(random_vectors, benchmark, progress=False) for benchmark in (small_benchmark(), parallel_benchmark()))
    assert holes.cells.query("task == 'cross'").groupby("query_language")["n_queries"].nunique().max() > 1
    for scores in (holes, complete):
        table = scores.by_query
        assert list(table.columns) == ["query_id", "query_language", "task", *scores.measures, *scores.bias().columns[:-1]]
        assert not table.duplicated(["query_id", "query_language", "task"]).any() and table[table["task"] != "multi"]["rank_distance"].isna().all()
        got = table.groupby(["task", "query_language"], observed=True)[scores.measures].mean()
        expected = scores.cells.groupby(["task", "query_language"])[scores.measures].mean()
        assert len(got) == 9 and np.allclose(got, expected.loc[[(str(task), str(language)) for task, language in got.index]], atol=1e-6)
    assert np.allclose(macro(complete.by_query, complete.measures), complete.summary(), atol=1e-6)
    cross = complete.per_query[complete.per_query["task"] == "cross"].groupby(["query_language", "query_id"], observed=True)["map"].mean()
    assert np.allclose(complete.by_query.query("task == 'cross'")["map"], cross, atol=1e-6)
    plain = holes.per_query[holes.per_query["task"] == "cross"].groupby(["query_language", "query_id"], observed=True)["map"].mean()
    assert not np.allclose(holes.by_query.query("task == 'cross'")["map"], plain, atol=1e-3)


def test_save_and_load(tmp_path):
    scores = evaluate(small_vectors, small_benchmark(), progress=False)
    scores.save(tmp_path / "new" / "run")
    loaded = Scores.load(tmp_path / "new" / "run")
    assert json.dumps(loaded.to_dict()) == json.dumps(scores.to_dict())
    pd.testing.assert_frame_equal(loaded.summary(), scores.summary(), rtol=0, atol=1e-5)
    pd.testing.assert_frame_equal(loaded.bias(), scores.bias(), rtol=0, atol=1e-5)
    pd.testing.assert_frame_equal(loaded.by_language("ndcg@10"), scores.by_language("ndcg@10"), rtol=0, atol=1e-5)
    pd.testing.assert_frame_equal(loaded.intervals(), scores.intervals())
    assert loaded._repr_html_() == scores._repr_html_() and loaded._repr_markdown_() == scores._repr_markdown_()
    assert sorted(path.name for path in (tmp_path / "new" / "run").iterdir()) == ["metrics.json", "per_query.parquet"]
    loaded.save(tmp_path / "again")
    for name in ("metrics.json", "per_query.parquet"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "new" / "run" / name).read_bytes()
    means = Scores.load(Scores.from_dict(loaded.to_dict()).save(tmp_path / "again"))  # averages only, over a folder with a table
    assert means.summary().equals(loaded.summary()) and means.by_query is None
    with pytest.raises(ValueError, match="averages only"):
        compare(means, loaded)
    with pytest.raises(ValueError, match="format"):
        Scores.from_dict({})


def unsealed(folder: Path):
    "Take the seal off, as scores of earlier versions have none."
    content = json.loads((folder / "metrics.json").read_text())
    (folder / "metrics.json").write_text(json.dumps({name: value for name, value in content.items() if name not in ("files", "sha256")}))


def test_damaged_scores(tmp_path):
    folder = evaluate(small_vectors, small_benchmark(), progress=False).save(tmp_path / "scores")
    metrics, table = (folder / "metrics.json").read_text(), (folder / "per_query.parquet").read_bytes()
    for name, content, message in [
        ("per_query.parquet", None, "per_query.parquet is missing"), ("per_query.parquet", table[:-1], r"per_query.parquet is damaged: it has \d+ bytes instead of \d+"),
        ("per_query.parquet", table[:500] + bytes([table[500] ^ 1]) + table[501:], "per_query.parquet is damaged: its SHA-256"),
        ("metrics.json", None, "metrics.json is missing"), ("metrics.json", metrics[:-9], "metrics.json is damaged"), ("metrics.json", "[]", "metrics.json is damaged"),
        ("metrics.json", metrics.replace("0.", "1.", 1), "metrics.json is damaged: it does not say what was written"),
        ("metrics.json", metrics.replace('"sha256": "', '"sha257": "'), "metrics.json is damaged"), ("metrics.json", metrics.replace('"files"', '"filfs"'), "metrics.json is damaged"),
    ]:  # fmt: skip
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content) if content is not None else (folder / name).unlink()
        with pytest.raises(DamagedFile, match=f"{message}.*; remove .*scores to compute it again"):
            Scores.load(folder)
        (folder / "metrics.json").write_text(metrics), (folder / "per_query.parquet").write_bytes(table)
    unsealed(folder)
    assert Scores.load(folder).by_query.equals(Scores.load(folder).by_query)
    os.truncate(folder / "per_query.parquet", len(table) // 2)
    with pytest.raises(DamagedFile, match="per_query.parquet is damaged"):
        Scores.load(folder)


def test_saved_rows_are_by_query_and_rounded(tmp_path, monkeypatch):
    scores = evaluate(small_vectors, small_benchmark(), progress=False)
    loaded, bias = Scores.load(scores.save(tmp_path / "all")), ["rank_distance", "normalized_rank_distance", "same_language_share@10"]
    assert loaded.per_query is None
    names = ["query_id", "query_language", "task", *scores.measures, *bias]
    pd.testing.assert_frame_equal(loaded.by_query[names[:-3]], scores.by_query[names[:-3]], rtol=0.006, atol=6e-4, check_categorical=False)
    pd.testing.assert_frame_equal(loaded.by_query[bias], scores.by_query[bias], rtol=0.06, atol=6e-4)
    assert loaded.by_query["map"].round(3).nunique() == loaded.by_query["map"].nunique() < scores.by_query["map"].nunique()
    chosen = Scores.load(scores.save(tmp_path / "chosen", keep=["recall@100", "map"])).by_query
    assert list(chosen.columns) == ["query_id", "query_language", "task", "map", "recall@100", *bias]
    with pytest.raises(ValueError, match="unknown measure 'mapp'; valid: map, mrr@10"):
        scores.save(tmp_path / "wrong", keep="mapp")
    monkeypatch.setattr("hybrid_ir.evaluation.SMALL_TABLE", 10)
    assert list(Scores.load(scores.save(tmp_path / "large")).by_query.columns) == ["query_id", "query_language", "task", "map", "rank_distance", "same_language_share@10"]


def test_size_on_disk(tmp_path):
    "1,000 questions in 10 languages: 30,000 rows."
    random = np.random.default_rng(0)
    columns = [pd.Categorical(values) for values in (np.tile([f"{n:016x}" for n in range(1000)], 30), np.repeat(list("abcdefghij") * 3, 1000), np.repeat(["mono", "cross", "multi"], 10_000))]
    table = pd.DataFrame(dict(zip(["query_id", "query_language", "task"], columns)) | {"map": random.random(30_000), "rank_distance": random.exponential(5000, 30_000)})
    cells = pd.DataFrame([("mono", a, a, 1000, 0.5) for a in "abcdefghij"], columns=["task", "query_language", "passage_language", "n_queries", "map"])
    info = {"benchmark": "large", "languages": list("abcdefghij"), "tasks": ["mono"], "measures": ["map"]}
    averages = pd.DataFrame(columns=["task", "measure", "value", "low", "high"])
    folder = Scores(info, cells, saved_by_query=table, saved_estimates=averages).save(tmp_path)
    assert (folder / "per_query.parquet").stat().st_size < 30_000 * 3.5
    assert Scores.load(folder).by_query["map"].mean() == pytest.approx(table["map"].mean(), abs=1e-4)


@pytest.mark.parametrize("benchmark", [parallel_benchmark(), small_benchmark()])
@pytest.mark.parametrize("task", ["mono", "cross", "multi", "gap"])
def test_comparison_is_of_the_macro_averages(benchmark, task, tmp_path):
    first, second = (Scores.load(evaluate(noisy(weight), benchmark, progress=False).save(tmp_path / str(weight))) for weight in (0.8, 0.4))
    table = compare(first, second, task=task, by_language=True, flips=999)
    assert list(table.index) == ["macro", "de", "en", "hi"] and np.isnan(table.loc["macro", "p_holm"])
    for name, scores in (("first", first), ("second", second)):
        rows = scores.by_query.set_index(["query_language", "query_id"])
        if task == "gap":
            expected = (rows[rows["task"] == "mono"]["map"] - rows[rows["task"] == "cross"]["map"]).dropna().groupby("query_language", observed=True).mean()
        else:
            expected = rows[rows["task"] == task].groupby("query_language", observed=True)["map"].mean()
        assert np.allclose(table[name], [expected.mean(), *expected], atol=1e-6)
    assert np.allclose(table["difference"], table["first"] - table["second"]) and (table["low"] <= table["difference"]).all() and (table["difference"] <= table["high"]).all()
    assert np.allclose(table["p_holm"].iloc[1:], metrics.holm(table["p"].iloc[1:])) and (table["p"] > 0).all()
    if task != "gap":
        assert table.loc["macro", "p"] < 0.05 and table.loc["macro", "low"] > 0
    else:
        pd.testing.assert_frame_equal(table, compare_gap(first, second, by_language=True, flips=999))


def test_comparison_with_itself_and_of_bias():
    benchmark = parallel_benchmark()
    first, second = (evaluate(noisy(weight), benchmark, progress=False) for weight in (0.8, 0.2))
    assert compare(first, first).loc["macro", ["difference", "low", "high", "p"]].tolist() == [0, 0, 0, 1]
    for name in ("rank_distance", "normalized_rank_distance", "same_language_share@10"):
        row = compare(first, second, name, task="multi", flips=999).loc["macro"]
        assert row["first"] == pytest.approx(first.bias().loc["macro", name], rel=1e-5) and row["n_ids"] == 20
    assert compare(first, second, "rank_distance", task="multi").loc["macro", "high"] < 0


def test_seeds_are_averaged_by_query():
    seeds = [evaluate(noisy(0.4, seed), parallel_benchmark(), progress=False) for seed in range(3)]
    other = evaluate(noisy(0.8), parallel_benchmark(), progress=False)
    together = compare(seeds, [other], flips=999).loc["macro"]
    assert together["first"] == pytest.approx(np.mean([scores.summary().loc["mono", "map"] for scores in seeds]), abs=1e-6)
    assert together["difference"] == pytest.approx(np.mean([compare(scores, other, flips=9).loc["macro", "difference"] for scores in seeds]))
    assert together["n_ids"] == 20


def test_what_cannot_be_compared():
    scores = evaluate(random_vectors, parallel_benchmark(), progress=False)
    fewer = evaluate(random_vectors, parallel_benchmark(languages=("de", "en")), progress=False)
    with pytest.raises(ValueError, match="languages differs"):
        compare(scores, fewer)
    with pytest.raises(ValueError, match="benchmark differs, parallel and small"):
        compare([scores, scores], [scores, evaluate(random_vectors, small_benchmark(), progress=False)])
    renamed = Scores(scores.info, scores.cells, saved_by_query=scores.by_query.assign(query_id=scores.by_query["query_id"].cat.rename_categories({"Q3": "R3"})))
    with pytest.raises(ValueError, match="only, for instance .3 in de"):
        compare(scores, renamed)
    for options, message in (
        ({"measure": "mapp"}, "unknown measure of the task mono 'mapp'; valid: map"), ({"measure": "rank_distance"}, "unknown measure of the task mono"),
        ({"task": "pool"}, "unknown task 'pool'; valid: mono, cross, multi, gap"), ({"task": "gap", "measure": "rank_distance"}, "task gap")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            compare(scores, scores, **options)
    with pytest.raises(ValueError, match="empty list"):
        compare(scores, [])


def test_shows_itself():
    scores = evaluate(small_vectors, small_benchmark(), progress=False)
    html, markdown = scores._repr_html_(), scores._repr_markdown_()
    for text in (html, markdown):
        assert "gap (mono - cross)" in text and "macro" in text and f"{scores.gap('map')}" in text
    assert html.count("<table") == 2 and "Scores(small, 3 languages)" in repr(scores)
    only_mono = evaluate(small_vectors, small_benchmark(), tasks="mono", progress=False)
    assert only_mono._repr_html_().count("<table") == 1
    with pytest.raises(ValueError, match="mono and cross"):
        only_mono.gap()


def test_runs():
    benchmark = small_benchmark()
    scores = evaluate(small_vectors, benchmark, k=40, progress=False)
    run = scores.run()
    assert len(run) == len(benchmark.queries) * 40 and run["query_id"].nunique() == len(benchmark.queries)
    assert (run.groupby("query_id")["score"].apply(lambda column: column.is_monotonic_decreasing)).all()
    assert len(scores.run(5)) == len(benchmark.queries) * 5
    mono = scores.run(task="mono")
    assert (mono["query_id"].str[:2] == mono["doc_id"].str[:2]).all()
    with pytest.raises(ValueError, match="valid: multi, mono"):
        scores.run(task="cross")


def test_a_language_with_queries_only():
    benchmark = small_benchmark()
    keep = benchmark.passages["lang"] != "hi"
    rows = np.cumsum(keep) - 1
    judged = keep.to_numpy()[benchmark.judgement_passages]
    benchmark = Benchmark(
        "holes", benchmark.passages[keep].reset_index(drop=True), benchmark.queries,
        pd.DataFrame({"query": benchmark.judgement_queries, "passage": rows.to_numpy()[benchmark.judgement_passages], "grade": benchmark.judgement_grades})[judged])  # fmt: skip
    scores = evaluate(small_vectors, benchmark, progress=False)
    table = scores.by_language("map")
    assert list(table.index) == ["de", "en", "hi"] and list(table.columns) == ["de", "en", "multi"]
    assert scores.bias().loc["hi", "expected_share"] == 0
    assert not set(scores.run(task="mono")["query_id"].str[:2]) & {"hi"}


def test_by_query_of_a_language_with_queries_only(tmp_path):
    "Its queries meet one passage language more than the others: pairs and query languages are then weighted differently."
    scores = evaluate(noisy(0.5), parallel_benchmark(without_passages=["hi"]), progress=False)
    scores = Scores.load(scores.save(tmp_path))
    counts = scores.by_query.groupby(["task", "query_language"], observed=True).size()
    assert counts["mono"].to_dict() == {"de": 20, "en": 20} and set(counts["cross"]) == {20} and len(counts["cross"]) == 3
    cells = scores.cells.query("task == 'cross'").groupby("query_language")["map"]
    assert cells.size().to_dict() == {"de": 1, "en": 1, "hi": 2}
    assert macro(scores.by_query, "map")["cross"] == pytest.approx(cells.mean().mean(), abs=1e-4)
    assert abs(macro(scores.by_query, "map")["cross"] - scores.summary().loc["cross", "map"]) > 1e-4
    table = compare(scores, scores, task="gap", by_language=True, flips=9)
    assert list(table.index) == ["macro", "de", "en"] and list(compare(scores, scores, by_language=True, flips=9).index) == ["macro", "de", "en"]


class OldSentenceTransformer:
    "The interface before version 5: `encode` with prompt names."

    def __init__(self):
        self.prompts = {"query": "Q: ", "document": "D: "}

    def encode(self, texts, prompt_name=None):
        return small_vectors([self.prompts.get(prompt_name, "") + text for text in texts], "")


class NewSentenceTransformer(OldSentenceTransformer):
    def encode_query(self, texts, show_progress_bar=True, convert_to_numpy=True, batch_size=32):
        return self.encode(texts, "query")

    def encode_document(self, texts, show_progress_bar=True, convert_to_numpy=True, batch_size=32):
        return self.encode(texts, "document")


class OwnEncoder:
    def encode(self, texts, kind="query", progress=True):
        return torch.from_numpy(small_vectors([{"query": "Q: ", "passage": "D: "}[kind] + text for text in texts], kind))


def test_kinds_of_encoders():
    benchmark = small_benchmark()
    encoders = [OldSentenceTransformer(), NewSentenceTransformer(), OwnEncoder(), lambda texts, kind: OwnEncoder().encode(texts, kind)]
    tables = [evaluate(encoder, benchmark, progress=False).summary() for encoder in encoders]
    for table in tables[1:]:
        pd.testing.assert_frame_equal(tables[0], table)
    evaluate(NewSentenceTransformer(), benchmark, progress=False, batch_size=8)


def test_a_sentence_transformer(tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    from transformers import BertConfig, BertModel, BertTokenizerFast

    words = sorted({word for table in (small_benchmark().queries, small_benchmark().passages) for text in table["text"] for word in text.replace(".", " . ").split()})
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ":", "query", *words]))
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=8 + len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)).save_pretrained(tmp_path)
    BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    model = sentence_transformers.SentenceTransformer(str(tmp_path), device="cpu", prompts={"query": "query: "})
    benchmark = small_benchmark()
    got = embed(model, benchmark.queries["text"], "query", progress=False)
    expected = model.encode([f"query: {text}" for text in benchmark.queries["text"]], normalize_embeddings=True, show_progress_bar=False)
    assert np.allclose(got, expected, atol=1e-5)
    assert evaluate(model, benchmark, progress=False, batch_size=16).summary().shape == (3, 6)


class NotReached:
    def __call__(self, texts, kind):
        raise AssertionError("encoding started before the request was checked")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"tasks": "mnoo"}, "unknown task 'mnoo'; valid: mono, cross, multi"),
        ({"tasks": ["mono", "pool"]}, "unknown task 'pool'"),
        ({"languages": ["de", "xx"]}, "unknown language 'xx'; valid: de, en, hi"),
        ({"languages": "de", "tasks": "cross"}, "'cross'; valid: mono"),
        ({"measures": ["ndgc@10"]}, "unknown measure 'ndgc@10'; valid: map"),
        ({"measures": "recall"}, "unknown measure 'recall'"),
        ({"k": -1}, "k must be"),
        ({"share_at": 0}, "share_at"),
    ],
)
def test_errors_come_before_encoding(options, message):
    with pytest.raises(ValueError, match=message):
        evaluate(NotReached(), small_benchmark(), **options)


@pytest.mark.parametrize(
    "encoder, error, message",
    [
        ("me5", TypeError, "cannot encode with a str"),
        (lambda texts, kind: np.full((len(texts), 3), np.nan), ValueError, "query embeddings must be finite"),
        (lambda texts, kind: np.zeros((len(texts), 0)), ValueError, "non-empty matrix"),
        (lambda texts, kind: np.ones(len(texts)), ValueError, "non-empty matrix"),
        (lambda texts, kind: np.ones((len(texts) + 1, 3)), ValueError, r"returned \d+ query embeddings for \d+ texts"),
        (lambda texts, kind: np.zeros((len(texts), 3)), ValueError, "all zeros"),
        (lambda texts, kind: np.ones((len(texts), 3 if kind == "query" else 4)), ValueError, "3 dimensions, passage embeddings 4"),
    ],
)
def test_bad_encoders(encoder, error, message):
    with pytest.raises(error, match=message):
        evaluate(encoder, small_benchmark(), progress=False)


@pytest.mark.parametrize("texts", [["one", ""], ["one", None], [" "], [3]])
def test_bad_texts(texts):
    with pytest.raises(ValueError, match="query text"):
        embed(small_vectors, texts, "query", progress=False)


def test_languages_make_the_pool_smaller():
    benchmark = small_benchmark()
    part = evaluate(random_vectors, benchmark, languages=["hi", "de"], progress=False)
    whole = evaluate(random_vectors, benchmark, progress=False)
    assert part.info["languages"] == ["de", "hi"] and part.info["n_passages"] < whole.info["n_passages"]
    columns = ["de", "hi"]
    pd.testing.assert_frame_equal(part.by_language("map")[columns], whole.by_language("map").loc[columns, columns])


def test_chosen_measures():
    scores = evaluate(small_vectors, small_benchmark(), measures=["ndcg@3", "mrr"], share_at=3, progress=False)
    assert list(scores.summary().columns) == ["ndcg@3", "mrr"] and "same_language_share@3" in scores.bias().columns
    with pytest.raises(ValueError, match="valid: ndcg@3, mrr, rank_distance"):
        scores.by_language("map")
    assert scores.by_language("rank_distance").columns.tolist() == ["multi"]


def test_no_distance_between_languages_where_answers_are_in_one():
    "Answers in the question's own language only, several of each, as in the pool of MIRACL: the share in the top says something, a distance between languages would not."
    names, ids = ("de", "en"), range(6)
    passages = pd.DataFrame([(f"{n}/{part}", lang, f"answer {n}.{part} {lang}") for lang in names for n in ids for part in (0, 1)], columns=["id", "lang", "text"])
    queries = pd.DataFrame([(f"{lang}{n}", lang, f"question {n} {lang}") for lang in names for n in ids], columns=["id", "lang", "text"])
    judgements = pd.DataFrame([(row, 2 * row + part, 1) for row in range(len(queries)) for part in (0, 1)], columns=["query", "passage", "grade"])
    scores = evaluate(small_vectors, Benchmark("own", passages, queries, judgements, pooled=True), progress=False)
    assert scores.info["tasks"] == ["mono", "multi"] and scores.info["perfect_rank_distance"] is None
    assert scores.bias()[["rank_distance", "normalized_rank_distance", "worst_rank"]].isna().all(axis=None) and scores.bias()["same_language_share@10"].notna().all()
    shown = scores._repr_html_()
    assert "same_language_share@10" in shown and "nan" not in shown and "distance" not in shown
    assert len(bias_plot(scores, scores).axes) == 1


def test_other_texts_or_judgements_are_not_compared():
    plain, context = (score_all(load_benchmark("sample", ["de", "en"], context=context)) for context in (False, True))
    with pytest.raises(ValueError, match="the texts or judgements of sample differ"):
        compare(plain, context)
    del context.info["fingerprint"]  # as in scores that were saved before
    assert len(compare(plain, context))


def score_all(benchmark, **options):
    rng = np.random.default_rng(0)
    vectors = [rng.standard_normal((len(table), 8)) for table in (benchmark.queries, benchmark.passages)]
    return score_embeddings(benchmark, *vectors, **{"k": 0, **options})


def test_what_is_scored_is_checked_first():
    benchmark = load_benchmark("sample", ["de", "en"])
    one, twice = score_all(benchmark, measures="map"), score_all(benchmark, measures=["map", "map"])
    assert one.measures == twice.measures == ["map"] and "rank_distance" in twice.bias().columns
    for options, message in (({"k": -5}, "k must be a whole number of at least 0, not -5"), ({"k": 2.5}, "not 2.5"), ({"share_at": 0}, "share_at must be a whole number of at least 1"), ({"measures": ["mop"]}, "unknown measure 'mop'")):
        with pytest.raises(ValueError, match=message):
            score_all(benchmark, **options)


def test_a_name_is_no_benchmark():
    with pytest.raises(TypeError, match="expected a Benchmark, as `load_benchmark.name.` gives it, not 'sample'"):
        evaluate(lambda texts, kind: np.ones((len(texts), 2)), "sample")
