"""Benchmarks: the published counts, relevance, BEIR folders, and what broken folders are told."""

import gzip
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from hybrid_ir.benchmarks import BENCHMARKS, Benchmark, count_languages, load_beir, load_benchmark
from hybrid_ir.pairs import SAMPLE_LANGUAGES, load_pairs, sample_file

CANDIDATES = {"ar": 1222, "de": 1276, "el": 1234, "en": 1180, "es": 1215, "hi": 1244, "ru": 1219, "th": 852, "tr": 1167, "vi": 1209, "zh": 1196}


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("HYBRID_IR_CACHE", str(tmp_path_factory.getbasetemp() / "benchmarks-cache"))


@pytest.fixture(scope="module")
def xquad_r(data_folder):
    return load_benchmark("xquad_r", path=data_folder)


def check_invariants(benchmark: Benchmark):
    "What every benchmark promises to the modules that use it."
    assert benchmark.languages == sorted(benchmark.languages)
    for frame, slices in ((benchmark.passages, benchmark.passage_slices), (benchmark.queries, benchmark.query_slices)):
        assert list(frame.columns) == ["id", "lang", "text"] and frame.index.equals(pd.RangeIndex(len(frame)))
        assert list(slices) == benchmark.languages
        assert sum(part.stop - part.start for part in slices.values()) == len(frame)
        for language, part in slices.items():
            assert (frame["lang"].iloc[part] == language).all()
        assert not frame.duplicated(["lang", "id"]).any()
    queries, passages, grades = benchmark.judgement_queries, benchmark.judgement_passages, benchmark.judgement_grades
    assert queries.dtype == passages.dtype == grades.dtype == np.int64
    assert (np.diff(queries) >= 0).all() and (grades > 0).all()
    assert len(np.unique(np.stack([queries, passages]), axis=1).T) == len(queries)
    assert set(queries) == set(range(len(benchmark.queries)))  # every query can be scored
    assert passages.max() < len(benchmark.passages) and passages.min() >= 0


# the sample


def test_sample():
    benchmark = load_benchmark("sample")
    check_invariants(benchmark)
    assert benchmark.languages == SAMPLE_LANGUAGES and benchmark.tasks == ("mono", "cross", "multi")
    assert len(benchmark.queries) == 48 * 11 and len(benchmark.passages) == 72 * 11
    assert set(np.bincount(benchmark.judgement_queries)) == {11}
    assert benchmark.info["license"] == "CC0-1.0" and len(benchmark.info["sha256"]) == 11


def test_sample_relevance_is_the_sentence_of_the_answer():
    "Against a plain reading of the files."
    benchmark = load_benchmark("sample", languages=["th", "de"])
    judged = set(zip(benchmark.judgement_queries.tolist(), benchmark.judgement_passages.tolist()))
    expected = set()
    for lang in ("de", "th"):
        for article in json.loads(sample_file(lang, "heldout").read_text(encoding="utf-8"))["data"]:
            for paragraph in article["paragraphs"]:
                for question in paragraph["qas"]:
                    start = question["answers"][0]["answer_start"]
                    (begin, end), = [(b, e) for b, e in paragraph["sentence_breaks"] if b <= start < e]
                    passage = benchmark.passages.index[
                        (benchmark.passages["text"] == paragraph["context"][begin:end]) & (benchmark.passages["lang"] == lang)
                    ].item()
                    expected |= {(query, passage) for query in benchmark.queries.index[benchmark.queries["id"] == question["id"]]}
    assert judged == expected


def test_train_and_heldout_share_nothing():
    train, benchmark = load_pairs("sample"), load_benchmark("sample")
    assert not set(train.table["passage"]) & set(benchmark.passages["text"])
    assert not set(train.table["query"]) & set(benchmark.queries["text"])
    assert not set(train.ids) & set(benchmark.queries["id"])


def test_context_appends_the_paragraph():
    plain, context = load_benchmark("sample"), load_benchmark("sample", context=True)
    assert plain.passages["id"].equals(context.passages["id"]) and plain.queries.equals(context.queries)
    assert np.array_equal(plain.judgement_passages, context.judgement_passages)
    for sentence, with_context in zip(plain.passages["text"], context.passages["text"]):
        assert with_context.startswith(sentence + " ") and sentence in with_context[len(sentence):]
    assert plain.fingerprint != context.fingerprint and context.info["context"] and not plain.info["context"]


# XQuAD-R


def test_xquad_r_counts(xquad_r):
    check_invariants(xquad_r)
    assert len(xquad_r.passages) == 13014 and len(xquad_r.queries) == 13090
    counts = count_languages(xquad_r)
    assert counts.loc["passages"].to_dict() == CANDIDATES
    assert (counts.loc["queries"] == 1190).all() and (counts.loc["judgements"] == 1190 * 11).all()
    assert xquad_r.tasks == ("mono", "cross", "multi")
    assert xquad_r.info["sha256"] == BENCHMARKS["xquad_r"].sha256


def test_xquad_r_has_one_relevant_passage_in_each_language(xquad_r):
    languages = xquad_r.passages["lang"].to_numpy()[xquad_r.judgement_passages].reshape(-1, 11)
    assert (languages == np.array(sorted(CANDIDATES))).all()
    of_first_language = xquad_r.judgement_passages.reshape(11, 1190, 11)
    ids = xquad_r.queries["id"].to_numpy().reshape(11, 1190)
    for language in range(1, 11):  # a translation has the same right answers
        order = pd.Index(ids[language]).get_indexer(ids[0])
        assert np.array_equal(of_first_language[language][order], of_first_language[0])


def test_xquad_r_ids(xquad_r):
    assert xquad_r.passages["id"].is_unique and xquad_r.passages["id"].str.fullmatch(r"[a-z]{2}/\d+/\d+/\d+").all()
    assert (xquad_r.passages["id"].str[:2] == xquad_r.passages["lang"]).all()
    row = xquad_r.passages[xquad_r.passages["id"] == "en/0/0/0"].iloc[0]
    assert row["text"].startswith("The Panthers defense gave up just 308 points")


def test_xquad_r_languages_and_context(data_env, xquad_r):
    part = load_benchmark("xquad_r", languages=["zh", "de"], context=True)
    check_invariants(part)
    assert part.languages == ["de", "zh"] and len(part.passages) == 1276 + 1196
    selected = xquad_r.select(["de", "zh"])
    check_invariants(selected)
    assert selected.fingerprint == load_benchmark("xquad_r", languages=["de", "zh"]).fingerprint
    assert xquad_r.select() is xquad_r
    assert load_benchmark("xquad_r", languages="de").tasks == ("mono",)
    # the path may be the folder of the files themselves
    assert load_benchmark("xquad_r", languages="de", path=data_env / "xquad_r").fingerprint == xquad_r.select("de").fingerprint


def test_missing_file_names_it(tmp_path):
    with pytest.raises(FileNotFoundError, match="xquad_r/el.json"):
        load_benchmark("xquad_r", languages="el", path=tmp_path)


def test_broken_files_are_named(tmp_path):
    folder = tmp_path / "xquad_r"
    folder.mkdir()
    original = json.loads(sample_file("de", "heldout").read_text(encoding="utf-8"))
    question = original["data"][1]["paragraphs"][0]["qas"][0]
    question["answers"][0]["answer_start"] = 9999
    (folder / "de.json").write_text(json.dumps(original), encoding="utf-8")
    with pytest.raises(ValueError, match="9999") as caught:
        load_benchmark("xquad_r", languages="de", path=tmp_path)
    assert question["id"] in str(caught.value) and "de.json" in str(caught.value)
    for text, message in (('{"data": [', "not valid JSON"), ('{"data": [{"title": "x", "paragraphs": [{"context": "y"}]}]}', "layout of XQuAD-R")):
        (folder / "de.json").write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            load_benchmark("xquad_r", languages="de", path=tmp_path)


def test_names_and_options_are_checked_first():
    with pytest.raises(ValueError, match="unknown benchmark 'xquad'; valid: sample, xquad_r"):
        load_benchmark("xquad")
    with pytest.raises(ValueError, match="unknown language 'fr'; valid: ar, de"):
        load_benchmark("xquad_r", languages=["de", "fr"])
    with pytest.raises(ValueError, match="BEIR"):
        load_benchmark("sample", split="test")
    with pytest.raises(ValueError, match="unknown language 'fr'"):
        load_benchmark("sample").select(["fr"])


# BEIR folders


def write_beir(folder: Path, corpus, queries, judgements, split="test", header=True, zipped=False):
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    for name, lines in (("corpus", corpus), ("queries", queries)):
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        if zipped:
            with gzip.open(folder / f"{name}.jsonl.gz", "wt", encoding="utf-8") as file:
                file.write(text)
        else:
            (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    lines = ["query-id\tcorpus-id\tscore"] * header + ["\t".join(map(str, line)) for line in judgements]
    (folder / "qrels" / f"{split}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")


CORPUS = [{"_id": "p1", "title": "Comet", "text": "Ice and dust."}, {"_id": "p2", "text": "Moss has no roots."}, {"_id": 3, "title": "", "text": "Tides."}]
QUERIES = [{"_id": "q1", "text": "What is a comet made of?"}, {"_id": "q2", "text": "Does moss have roots?"}, {"_id": "q3", "text": "Unjudged?"}]
JUDGEMENTS = [("q1", "p1", 2), ("q2", "p2", 1), ("q2", "p1", 0), ("q1", "3", 1)]


@pytest.mark.parametrize("header", [True, False])
@pytest.mark.parametrize("zipped", [True, False])
def test_flat_folder(tmp_path, header, zipped):
    write_beir(tmp_path / "mine", CORPUS, QUERIES, JUDGEMENTS, header=header, zipped=zipped)
    benchmark = load_benchmark(tmp_path / "mine", languages="en")
    check_invariants(benchmark)
    assert benchmark.name == "mine" and benchmark.languages == ["en"] and benchmark.tasks == ("mono",)
    assert benchmark.passages["text"].tolist() == ["Comet Ice and dust.", "Moss has no roots.", "Tides."]
    assert benchmark.queries["id"].tolist() == ["q1", "q2"]  # q3 has no relevant passage
    judged = zip(benchmark.judgement_queries.tolist(), benchmark.judgement_passages.tolist(), benchmark.judgement_grades.tolist())
    assert list(judged) == [(0, 0, 2), (0, 2, 1), (1, 1, 1)]
    assert load_benchmark(tmp_path / "mine").languages == ["und"]
    with pytest.raises(ValueError, match="one language"):
        load_benchmark(tmp_path / "mine", languages=["en", "de"])


def test_trec_judgements(tmp_path):
    write_beir(tmp_path, CORPUS, QUERIES, [("q1", "Q0", "p1", 1)], header=False)
    assert load_benchmark(tmp_path).judgement_passages.tolist() == [0]


def test_splits(tmp_path):
    write_beir(tmp_path, CORPUS, QUERIES, [("q1", "p1", 1)], split="dev")
    assert load_benchmark(tmp_path).info["splits"] == {"und": "dev"}
    write_beir(tmp_path, CORPUS, QUERIES, [("q2", "p2", 1)], split="test")
    assert load_benchmark(tmp_path).queries["id"].tolist() == ["q2"]
    assert load_benchmark(tmp_path, split="dev").queries["id"].tolist() == ["q1"]
    with pytest.raises(ValueError, match="unknown split 'train'; valid: dev, test"):
        load_benchmark(tmp_path, split="train")
    (tmp_path / "qrels" / "test.tsv").rename(tmp_path / "qrels" / "one.tsv")
    (tmp_path / "qrels" / "dev.tsv").rename(tmp_path / "qrels" / "two.tsv")
    with pytest.raises(ValueError, match="valid: one, two"):
        load_benchmark(tmp_path)


def test_languages_in_folders(tmp_path):
    for language in ("en", "de", "th"):
        write_beir(tmp_path / language, CORPUS, QUERIES, JUDGEMENTS)
    (tmp_path / "README.md").write_text("not a language")
    apart = load_benchmark(tmp_path)
    check_invariants(apart)
    assert apart.languages == ["de", "en", "th"] and apart.tasks == ("mono",) and len(apart.judgement_queries) == 9
    parallel = load_benchmark(tmp_path, parallel_ids=True)
    check_invariants(parallel)
    assert parallel.tasks == ("mono", "cross", "multi") and len(parallel.judgement_queries) == 27
    assert parallel.select("de").fingerprint == apart.select("de").fingerprint
    assert load_benchmark(tmp_path, languages=["th", "de"], parallel_ids=True).fingerprint == parallel.select(["de", "th"]).fingerprint
    with pytest.raises(ValueError, match="unknown language 'fr'; valid: de, en, th"):
        load_benchmark(tmp_path, languages="fr")
    with pytest.raises(ValueError, match="context"):
        load_benchmark(tmp_path, context=True)


def test_judgements_across_languages(tmp_path):
    write_beir(tmp_path / "de", CORPUS, QUERIES, [("q1", "p1", 1), ("q1", "en/p1", 3)])
    write_beir(tmp_path / "en", CORPUS, QUERIES, [("q1", "p1", 1)])
    benchmark = load_benchmark(tmp_path)
    check_invariants(benchmark)
    assert benchmark.tasks == ("mono", "cross", "multi")
    assert list(zip(benchmark.judgement_queries.tolist(), benchmark.judgement_passages.tolist())) == [(0, 0), (0, 3), (1, 3)]
    only_german = load_benchmark(tmp_path, languages="de")  # a judgement into a language that was not asked for
    assert only_german.tasks == ("mono",) and only_german.fingerprint == benchmark.select("de").fingerprint


def test_links_to_nowhere_name_file_line_and_id(tmp_path):
    write_beir(tmp_path / "de", CORPUS, QUERIES, [("q1", "p1", 1), ("q2", "p7", 1)])
    with pytest.raises(ValueError, match="passage 'p7' does not exist") as caught:
        load_benchmark(tmp_path)
    assert f"{Path('de') / 'qrels' / 'test.tsv'} line 3" in str(caught.value)
    write_beir(tmp_path / "de", CORPUS, QUERIES, [("q9", "p1", 0)], header=False)
    with pytest.raises(ValueError, match="line 1: query 'q9' does not exist"):
        load_benchmark(tmp_path)
    write_beir(tmp_path / "de", CORPUS, QUERIES, [("q1", "xx/p1", 1)])
    with pytest.raises(ValueError, match="passage 'xx/p1' does not exist"):
        load_benchmark(tmp_path)


@pytest.mark.parametrize(
    "corpus, message",
    [
        ([*CORPUS, {"_id": "p4", "text": " "}], "corpus.jsonl line 4: id 'p4' has an empty text"),
        ([*CORPUS, {"_id": "p1", "text": "again"}], "corpus.jsonl line 4: id 'p1' was already used in line 1"),
        ([*CORPUS, {"_id": "p4", "text": 7}], "corpus.jsonl line 4: id 'p4' has a text or title that is not a string"),
        ([*CORPUS, {"text": "no id"}], "corpus.jsonl line 4: expected an object with _id and text"),
        ([*CORPUS, ["p4", "text"]], "corpus.jsonl line 4: expected an object"),
    ],
)
def test_bad_corpus_lines(tmp_path, corpus, message):
    write_beir(tmp_path, corpus, QUERIES, JUDGEMENTS)
    with pytest.raises(ValueError, match=message):
        load_benchmark(tmp_path)


def test_other_broken_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match="corpus.jsonl"):
        load_benchmark(tmp_path)
    write_beir(tmp_path, CORPUS, QUERIES, [("q1", "p1", "often")])
    with pytest.raises(ValueError, match="test.tsv line 2: expected query id, passage id and a whole number"):
        load_benchmark(tmp_path)
    write_beir(tmp_path, CORPUS, QUERIES, [("q1", "p1", 0)])
    with pytest.raises(ValueError, match="no judgement says that a passage is relevant"):
        load_benchmark(tmp_path)
    with open(tmp_path / "queries.jsonl", "a") as file:
        file.write('{"_id": "q4", "te')
    with pytest.raises(ValueError, match="queries.jsonl line 4: not valid JSON"):
        load_benchmark(tmp_path)
    os.remove(tmp_path / "queries.jsonl")
    with pytest.raises(FileNotFoundError, match="queries.jsonl"):
        load_benchmark(tmp_path)
    shutil.rmtree(tmp_path / "qrels")
    with pytest.raises(FileNotFoundError, match="qrels"):
        load_benchmark(tmp_path)


def test_miracl_pool(data_folder):
    benchmark = load_benchmark(data_folder / "miracl_pool")
    check_invariants(benchmark)
    assert len(benchmark.passages) == 83280 and len(benchmark.languages) == 18 and benchmark.tasks == ("mono",)
    assert set(benchmark.info["splits"].values()) == {"dev"}
    counts = count_languages(benchmark)
    assert counts.loc["queries", "de"] == 19 and counts.loc["passages", "yo"] == 2647 and counts.loc["judgements", "yo"] == 56
    german = load_beir(data_folder / "miracl_pool" / "de", languages="de")
    assert german.fingerprint == benchmark.select("de").fingerprint


# the class itself


def test_repeated_ids_and_empty_texts_are_refused():
    passages = pd.DataFrame({"id": ["a", "b"], "lang": "de", "text": ["x", "y"]})
    judgements = pd.DataFrame({"query": [0], "passage": [1], "grade": [1]})
    with pytest.raises(ValueError, match="passage id 'a' occurs twice in de"):
        Benchmark("mine", passages.assign(id="a"), passages, judgements)
    with pytest.raises(ValueError, match="query 'b' in de has no text"):
        Benchmark("mine", passages, passages.assign(text=["x", None]), judgements)


def test_displays_itself():
    benchmark = load_benchmark("sample")
    assert "sample" in repr(benchmark) and "<table" in benchmark._repr_html_() and "528" in benchmark._repr_html_()
