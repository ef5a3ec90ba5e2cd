"""Benchmarks: the published counts, relevance, BEIR folders, and what broken folders are told."""

import gzip
import json
import os
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import hybrid_ir.sources
from hybrid_ir.benchmarks import (
    BENCHMARKS,
    MIRACL_FILES,
    XM3600_LANGUAGES,
    Benchmark,
    benchmark_from_pairs,
    count_languages,
    load_beir,
    load_benchmark,
    read_judgements,
)
from hybrid_ir.evaluation import evaluate
from hybrid_ir.pairs import SAMPLE_LANGUAGES, ParallelPairs, load_pairs, sample_file
from hybrid_ir.sources import DownloadError

REGISTERED = ["sample", "xquad_r", "mlqa_r", "miracl", "miracl_pool", "xm3600"]
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
    with pytest.raises(ValueError, match="unknown benchmark 'xquad'; valid: " + ", ".join(REGISTERED)):
        load_benchmark("xquad")
    with pytest.raises(ValueError, match="unknown language 'fr'; valid: ar, de"):
        load_benchmark("xquad_r", languages=["de", "fr"])
    with pytest.raises(ValueError, match="BEIR"):
        load_benchmark("sample", split="test")
    with pytest.raises(ValueError, match="unknown language 'fr'"):
        load_benchmark("sample").select(["fr"])


def test_each_name_has_its_own_options(tmp_path):
    "Before a file is looked for: nothing exists at this path."
    missing = tmp_path / "nothing"
    for name in ("miracl", "miracl_pool", "xm3600"):
        with pytest.raises(ValueError, match="context=True needs .*: sample, xquad_r, mlqa_r$"):
            load_benchmark(name, path=missing, context=True)
    for name in ("miracl", "miracl_pool"):
        with pytest.raises(ValueError, match="unknown split of .* 'test'; valid: dev, train"):
            load_benchmark(name, path=missing, split="test")
        with pytest.raises(ValueError, match="unknown language 'el'; valid: ar, bn"):
            load_benchmark(name, "el", path=missing)
    for name in ("mlqa_r", "xm3600"):
        with pytest.raises(ValueError, match=f"miracl, miracl_pool; {name} has one split"):
            load_benchmark(name, path=missing, split="dev")
    for name in REGISTERED:
        with pytest.raises(ValueError, match="parallel_ids"):
            load_benchmark(name, path=missing, parallel_ids=True)
    with pytest.raises(ValueError, match="unknown language 'tl'"):
        load_benchmark("xm3600", ["fil", "tl"], path=missing)
    for name in REGISTERED[1:]:
        with pytest.raises(FileNotFoundError, match=name):
            load_benchmark(name, path=missing)


def test_the_table_says_what_reports_quote(data_env):
    assert list(BENCHMARKS) == REGISTERED
    for name, entry in BENCHMARKS.items():
        assert entry.license and entry.protocol and "\n" not in entry.protocol and len(set(entry.languages)) == len(entry.languages)
    assert len(XM3600_LANGUAGES) == 36 and sum(MIRACL_FILES.values()) == 222 and len(MIRACL_FILES) == 18
    for name, language in (("sample", "de"), ("xquad_r", "de"), ("mlqa_r", "de"), ("miracl", "yo"), ("miracl_pool", "de")):
        info = load_benchmark(name, language).info
        assert info["name"] == name and info["license"] == BENCHMARKS[name].license and info["protocol"] == BENCHMARKS[name].protocol
        assert set(info["sha256"]) == {language}


# MLQA-R


def test_mlqa_r(data_env):
    benchmark = load_benchmark("mlqa_r")
    check_invariants(benchmark)
    counts = count_languages(benchmark)
    assert benchmark.languages == ["ar", "de", "en", "es", "hi", "vi", "zh"] and benchmark.tasks == ("mono", "cross", "multi")
    assert counts.loc["queries"].tolist() == [517, 512, 1148, 500, 507, 511, 504]
    assert counts.loc["passages"].tolist() == [2545, 2362, 6264, 1787, 2426, 2828, 2322] and len(benchmark.passages) == 20534
    assert benchmark.info["sha256"] == BENCHMARKS["mlqa_r"].sha256
    per_query = pd.DataFrame({
        "query": benchmark.judgement_queries, "language": benchmark.passages["lang"].to_numpy()[benchmark.judgement_passages]
    }).drop_duplicates().groupby("query").size()
    assert per_query.min() == 2 and per_query.max() == 4
    context = load_benchmark("mlqa_r", "es", context=True)
    plain = benchmark.select("es")
    assert context.info["context"] and context.passages["id"].equals(plain.passages["id"])
    assert all(long.startswith(short + " ") for short, long in zip(plain.passages["text"], context.passages["text"]))


# MIRACL


def write_miracl(folder: Path, lang="zh", topics="q1\tcomet?\nq2\tmoss?\n", qrels="q1\tQ0\td0#0\t1\nq2\tQ0\td1#0\t0\nq2\tQ0\td9#0\t1\n", split="dev"):
    "A corpus with the official number of files and one passage in each, `d<number of the file>#0`."
    base = folder / "miracl" / f"miracl-v1.0-{lang}"
    for kind, text in (("topics", topics), ("qrels", qrels)):
        (base / kind).mkdir(parents=True, exist_ok=True)
        (base / kind / f"{kind}.miracl-v1.0-{lang}-{split}.tsv").write_text(text, encoding="utf-8")
    corpus = folder / "miracl" / f"miracl-corpus-v1.0-{lang}"
    corpus.mkdir(exist_ok=True)
    for number in range(MIRACL_FILES[lang]):
        with gzip.open(corpus / f"docs-{number}.jsonl.gz", "wt", encoding="utf-8") as file:
            file.write(json.dumps({"docid": f"d{number}#0", "title": f"Title {number}", "text": "some text"}) + "\n")
    return corpus


def test_miracl_yoruba(data_env):
    benchmark = load_benchmark("miracl")  # the only one whose corpus is there
    check_invariants(benchmark)
    assert benchmark.languages == ["yo"] and benchmark.tasks == ("mono",)
    assert len(benchmark.passages) == 49043 and len(benchmark.queries) == 119 and len(benchmark.judgement_grades) == 144
    judged = read_judgements(data_env / "miracl" / "miracl-v1.0-yo" / "qrels" / "qrels.miracl-v1.0-yo-dev.tsv")
    assert len(judged) == 1188 and (judged["grade"] > 0).sum() == 144  # the others say "not relevant"
    first = benchmark.passages.iloc[1]
    assert first["id"] == "598#1" and first["text"].startswith("A a (1A) kan")  # title, space, text
    assert benchmark.info["splits"] == {"yo": "dev"} and len(benchmark.info["sha256"]["yo"]) == 3
    for place in (data_env, data_env / "miracl"):
        assert load_benchmark("miracl", "yo", path=place).fingerprint == benchmark.fingerprint


def test_miracl_files_in_numeric_order(tmp_path):
    write_miracl(tmp_path, "ja", qrels="q1\tQ0\td10#0\t1\n")
    benchmark = load_benchmark("miracl", path=tmp_path)
    check_invariants(benchmark)
    assert benchmark.passages["id"].tolist() == [f"d{number}#0" for number in range(14)]
    assert benchmark.passages["text"][10] == "Title 10 some text" and benchmark.judgement_passages.tolist() == [10]


def test_miracl_languages_and_splits(tmp_path, monkeypatch):
    write_miracl(tmp_path, "zh")
    write_miracl(tmp_path, "fi", topics="q1\tjää?\n", qrels="q1\tQ0\td3#0\t1\n")
    write_miracl(tmp_path, "fi", topics="t1\tlumi?\n", qrels="t1\tQ0\td0#0\t1\n", split="train")
    monkeypatch.setenv("HYBRID_IR_DATA", str(tmp_path))
    both = load_benchmark("miracl")
    check_invariants(both)
    assert both.languages == ["fi", "zh"] and both.tasks == ("mono", "multi")
    assert both.select("zh").tasks == ("mono",) and both.select(["fi", "zh"]).tasks == ("mono", "multi")
    # the judgement of grade 0 does not count, and no judgement leaves its language although the ids are the same
    judged = zip(both.judgement_queries.tolist(), both.judgement_passages.tolist())
    assert list(judged) == [(0, 3), (1, 4 + 0), (2, 4 + 9)]
    assert load_benchmark("miracl", "fi", split="train").queries["id"].tolist() == ["t1"]
    with pytest.raises(FileNotFoundError, match="topics.miracl-v1.0-zh-train.tsv"):
        load_benchmark("miracl", "zh", split="train", path=tmp_path)


def test_miracl_missing_files(tmp_path, monkeypatch):
    corpus = write_miracl(tmp_path, "zh")
    (corpus / "docs-7.jsonl.gz").unlink()
    with pytest.raises(FileNotFoundError, match="miracl-corpus-v1.0-zh/docs-7.jsonl.gz"):
        load_benchmark("miracl", path=tmp_path)
    (tmp_path / "miracl" / "miracl-v1.0-zh" / "qrels" / "qrels.miracl-v1.0-zh-dev.tsv").unlink()
    with pytest.raises(FileNotFoundError, match="qrels.miracl-v1.0-zh-dev.tsv.*gated"):
        load_benchmark("miracl", path=tmp_path)
    with pytest.raises(FileNotFoundError, match="name its language: ar, bn"):
        load_benchmark("miracl", path=tmp_path / "miracl" / "miracl-v1.0-zh")
    monkeypatch.setenv("HYBRID_IR_DATA", str(tmp_path / "nothing"))
    with pytest.raises(FileNotFoundError, match="name its language: ar, bn"):
        load_benchmark("miracl")


def test_miracl_gated_download(tmp_path, monkeypatch):
    asked = []

    def refuse(url, target, **options):
        asked.append(url)
        raise DownloadError(f"{url}: the server answered 401 Unauthorized")

    monkeypatch.setattr(hybrid_ir.sources, "download", refuse)
    monkeypatch.setenv("HYBRID_IR_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError) as caught:
        load_benchmark("miracl", "sw")
    hub = "https://huggingface.co/datasets/miracl/"
    assert asked == [hub + "miracl/resolve/main/miracl-v1.0-sw/topics/topics.miracl-v1.0-sw-dev.tsv"]
    for part in ("401 Unauthorized", "gated", "accept the terms", "hf download --repo-type dataset miracl/miracl", "HYBRID_IR_DATA"):
        assert part in str(caught.value)
    write_miracl(tmp_path, "sw")
    shutil.rmtree(tmp_path / "miracl" / "miracl-corpus-v1.0-sw")
    asked.clear()
    with pytest.raises(FileNotFoundError) as caught:  # the corpus is public
        load_benchmark("miracl", "sw")
    assert asked == [hub + "miracl-corpus/resolve/main/miracl-corpus-v1.0-sw/docs-0.jsonl.gz"] and "accept the terms" not in str(caught.value)


@pytest.mark.parametrize(
    "broken, message",
    [
        ({"topics": "q1\tcomet?\nq2 moss?\n"}, "topics.miracl-v1.0-sw-dev.tsv line 2: expected query id and query, separated by a tab"),
        ({"topics": "q1\t \n"}, "dev.tsv line 1: expected query id and query"),
        ({"topics": "q1\ta\nq1\tb\n"}, "dev.tsv line 2: query id 'q1' was already used in line 1"),
        ({"qrels": "q1\tQ0\td0#0\t1\nq1\tQ0\td7#7\t0\n"}, "qrels.miracl-v1.0-sw-dev.tsv line 2: passage 'd7#7' does not exist"),
        ({"qrels": "q7\tQ0\td0#0\t1\n"}, "dev.tsv line 1: query 'q7' does not exist"),
        ({"qrels": "q1\tQ0\td0#0\tyes\n"}, "dev.tsv line 1: expected query id, passage id and a whole number"),
    ],
)
def test_miracl_broken_tables(tmp_path, broken, message):
    write_miracl(tmp_path, "sw", **{"qrels": "q1\tQ0\td0#0\t1\n", **broken})
    with pytest.raises(ValueError, match=message):
        load_benchmark("miracl", path=tmp_path)


def test_miracl_broken_corpus(tmp_path):
    corpus = write_miracl(tmp_path, "te", qrels="q1\tQ0\td0#0\t1\n")
    whole = gzip.compress(b"".join(json.dumps({"docid": f"x{n}", "title": "", "text": os.urandom(50).hex()}).encode() + b"\n" for n in range(200)))
    for content, message in (
        (whole[:-3000], "docs-1.jsonl.gz: the compressed file is broken after line"),
        (gzip.compress(b'{"docid": "x", "title": "T", "te'), "docs-1.jsonl.gz line 1: not valid JSON"),
        (gzip.compress(b'{"_id": "x", "text": "y"}'), "docs-1.jsonl.gz line 1: expected an object with docid and text"),
        (gzip.compress(b'{"docid": "d0#0", "text": "y"}'), "passage id 'd0#0' occurs twice in te"),
    ):
        (corpus / "docs-1.jsonl.gz").write_bytes(content)
        with pytest.raises(ValueError, match=message):
            load_benchmark("miracl", path=tmp_path)


def test_miracl_pool(data_env):
    benchmark = load_benchmark("miracl_pool")
    check_invariants(benchmark)
    assert benchmark.name == "miracl_pool" and benchmark.languages == sorted(MIRACL_FILES)
    assert len(benchmark.passages) == 83280 and benchmark.tasks == ("mono", "multi")
    assert set(benchmark.info["splits"].values()) == {"dev"}
    counts = count_languages(benchmark)
    assert counts.loc["queries", "de"] == 19 and counts.loc["passages", "yo"] == 2647 and counts.loc["judgements", "yo"] == 56
    german = load_beir(data_env / "miracl_pool" / "de", languages="de")
    assert german.fingerprint == benchmark.select("de").fingerprint and german.tasks == ("mono",)
    assert load_benchmark(data_env / "miracl_pool", ["de", "yo"]).tasks == ("mono",)  # a folder of one's own: no pool unless judged
    assert benchmark.select(["de", "yo"]).tasks == ("mono", "multi")
    for place in (data_env, data_env / "miracl_pool"):
        assert load_benchmark("miracl_pool", "de", path=place).fingerprint == german.fingerprint
    assert load_benchmark("miracl_pool", "sw", split="train").fingerprint != benchmark.select("sw").fingerprint
    with pytest.raises(ValueError, match="unknown split 'train'; valid: dev"):
        load_benchmark("miracl_pool", "de", split="train")


def test_miracl_pool_missing(tmp_path, monkeypatch):
    monkeypatch.setenv("HYBRID_IR_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="miracl_pool: no such folder .*no public address"):
        load_benchmark("miracl_pool")


# XM3600


IMAGES = [
    {"image/key": "k1", "image/locale": "de", "de": {"caption": ["ein Hund", "der Hund", "noch ein Hund"], "caption/tokenized": ["ein Hund"]},
     "quz": {"caption": ["allqu", "huk allqu"]}, "bn": {"caption": ["কুকুর"]}},
    {"image/key": "k2", "de": {"caption": ["zwei Stühle"]}, "quz": {"caption": ["tiyana", "iskay tiyana"]}, "bn": {"caption": ["চেয়ার"]}},
    {"image/key": "k3", "de": {"caption": ["", "das Meer", " ", "am Meer"]}, "quz": {"caption": []}, "bn": {"caption": ["সমুদ্র"]}},
]


def write_captions(folder: Path, images=IMAGES, name="captions.jsonl", tail="") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(image, ensure_ascii=False) + "\n" for image in images) + tail
    path = folder / name
    if name.endswith(".zip"):
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("captions.jsonl", text)
    elif name.endswith(".gz"):
        path.write_bytes(gzip.compress(text.encode("utf-8")))
    else:
        path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["captions.jsonl", "captions.jsonl.gz", "captions.zip"])
def test_caption_protocol(tmp_path, monkeypatch, name):
    path = write_captions(tmp_path / "xm3600", name=name)
    monkeypatch.setenv("HYBRID_IR_DATA", str(tmp_path))
    benchmark = load_benchmark("xm3600")
    check_invariants(benchmark)
    assert benchmark.languages == ["bn", "de", "quz"] and benchmark.tasks == ("mono", "cross", "multi")
    # first captions ask; empty captions are skipped, so the second of k3 in German is its fourth
    asked = [tuple(row) for row in benchmark.queries[["lang", "id", "text"]].itertuples(index=False)]
    assert asked == [
        ("bn", "k1", "কুকুর"), ("bn", "k2", "চেয়ার"), ("bn", "k3", "সমুদ্র"), ("de", "k1", "ein Hund"), ("de", "k2", "zwei Stühle"),
        ("de", "k3", "das Meer"), ("quz", "k1", "allqu"), ("quz", "k2", "tiyana"),
    ]
    found = [tuple(row) for row in benchmark.passages[["id", "text"]].itertuples(index=False)]
    assert found == [("de/k1", "der Hund"), ("de/k3", "am Meer"), ("quz/k1", "huk allqu"), ("quz/k2", "iskay tiyana")]
    judged = {(*asked[query][:2], found[passage][0]) for query, passage in zip(benchmark.judgement_queries, benchmark.judgement_passages)}
    assert judged == {(lang, key, passage) for lang, key, _ in asked for passage, _ in found if passage.endswith(key)}
    assert benchmark.info["sha256"] == hybrid_ir.sources.file_sha256(path) and benchmark.info["file"] == name
    for place in (path, path.parent, tmp_path):
        assert load_benchmark("xm3600", path=place).fingerprint == benchmark.fingerprint
    part = load_benchmark("xm3600", ["quz", "bn"])
    assert part.fingerprint == benchmark.select(["bn", "quz"]).fingerprint and len(part.passages) == 2


def test_language_with_queries_only(tmp_path):
    benchmark = load_benchmark("xm3600", path=write_captions(tmp_path))
    assert benchmark.passage_slices["bn"] == slice(0, 0) and count_languages(benchmark)["bn"].tolist() == [3, 0, 4]
    assert "bn" in benchmark._repr_html_()
    pair = benchmark.select(["bn", "quz"])
    check_invariants(pair)
    assert pair.tasks == ("mono", "cross", "multi") and len(pair.judgement_queries) == 4
    with pytest.raises(ValueError, match="no judgement says that a passage is relevant"):
        benchmark.select("bn")
    with pytest.raises(ValueError, match="no image has a second caption in bn"):
        load_benchmark("xm3600", "bn", path=tmp_path)

    def encoder(texts, kind):  # each text its own direction
        return np.stack([np.random.default_rng(list(text.encode())).standard_normal(8) for text in texts])

    scores = evaluate(encoder, benchmark, progress=False, device="cpu")
    table = scores.by_language("map")
    assert np.isnan(table.loc["bn"].get("bn", np.nan)) and table.loc["bn", ["de", "quz", "multi"]].notna().all()
    assert set(scores.per_query.loc[scores.per_query["task"] == "mono", "query_language"]) == {"de", "quz"}


def test_xm3600(data_env):
    benchmark = load_benchmark("xm3600")
    check_invariants(benchmark)
    counts = count_languages(benchmark)
    assert set(XM3600_LANGUAGES) - set(benchmark.languages) == {"he", "hi", "ru"} and len(benchmark.languages) == 33
    assert (counts.loc["queries"] == 3600).all() and (counts.loc["judgements"] == 112051).all()
    assert counts.loc["passages"].sum() == 112051 and (counts.loc["passages"] == 3600).sum() == 19
    assert counts.loc["passages", ["bn", "mi", "sv", "sw"]].tolist() == [0, 1117, 3599, 3446]
    with pytest.raises(ValueError, match="captions.jsonl has no captions in he, ru; it has ar, bn, .*quz, ro, sv"):
        load_benchmark("xm3600", ["de", "he", "ru"])


@pytest.mark.parametrize(
    "image, message",
    [
        ({"image/key": "k1", "de": {"caption": ["x", "y"]}}, "line 4: image 'k1' was already described in line 1"),
        ({"image/key": "k4"}, "line 4: image 'k4' has no caption in any language"),
        ({"image/key": "k4", "de": {"caption": []}, "quz": {}}, "line 4: image 'k4' has no caption in any language"),
        ({"image/key": "k4", "de": {"caption": ["", " "]}}, "line 4: image 'k4' has no caption in any language"),
        ({"image/key": "k4", "de": {"caption": ["x", 7]}}, "line 4: image 'k4' in de has a caption that is not a string: 7"),
        ({"image/key": "k4", "de": {"caption": ["x", None]}}, "line 4: image 'k4' in de has a caption that is not a string: None"),
        ({"image/key": "k4", "de": {"caption": "x"}}, "line 4: image 'k4' in de: expected an object with a list of captions"),
        ({"image/key": "k4", "de": ["x", "y"]}, "line 4: image 'k4' in de: expected an object with a list of captions"),
        ({"image/key": "k4", "tl": {"caption": ["x", "y"]}}, "line 4: image 'k4' has captions in 'tl', which is not a language of XM3600"),
        ({"image/key": 4, "de": {"caption": ["x"]}}, "line 4: expected an object with image/key and captions"),
        (["k4"], "line 4: expected an object with image/key and captions"),
    ],
)
def test_bad_captions(tmp_path, image, message):
    path = write_captions(tmp_path, [*IMAGES, image])
    with pytest.raises(ValueError, match=message) as caught:
        load_benchmark("xm3600", path=path)
    assert str(path) in str(caught.value)


def test_broken_caption_files(tmp_path):
    path = write_captions(tmp_path / "cut", tail='{"image/key": "k4", "de": {"capt')
    with pytest.raises(ValueError, match="captions.jsonl line 4: not valid JSON"):
        load_benchmark("xm3600", path=path)
    path = write_captions(tmp_path / "cutzip", name="captions.zip", tail='{"image/key": "k4", "de": {"capt')
    with pytest.raises(ValueError, match="captions.zip, captions.jsonl line 4: not valid JSON"):
        load_benchmark("xm3600", path=path)
    path = write_captions(tmp_path / "gz", name="captions.jsonl.gz")
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match="captions.jsonl.gz: the compressed file is broken"):
        load_benchmark("xm3600", path=path)
    path = write_captions(tmp_path / "zip", name="captions.zip")
    whole = path.read_bytes()
    for content in (whole[:-30], b"<html>not here</html>", b""):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="captions.zip: not a zip file that can be read"):
            load_benchmark("xm3600", path=path)
    damaged = bytearray(whole)
    damaged[60:80] = bytes(20)  # inside the compressed captions
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match="captions.zip"):
        load_benchmark("xm3600", path=path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("images/k1.jpg", b"")
    with pytest.raises(ValueError, match="captions.zip: no captions.jsonl in this zip file, it has images/k1.jpg"):
        load_benchmark("xm3600", path=path)
    with pytest.raises(ValueError, match="captions.jsonl: no image in it"):
        load_benchmark("xm3600", path=write_captions(tmp_path / "empty", []))


def test_captions_are_downloaded_as_zip(tmp_path, monkeypatch):
    asked = []

    def fetch(url, target, **options):
        asked.append((url, options["sha256"]))
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        return write_captions(Path(target).parent, name=Path(target).name)

    monkeypatch.setattr(hybrid_ir.sources, "download", fetch)
    monkeypatch.setenv("HYBRID_IR_DATA", str(tmp_path))
    monkeypatch.setenv("HYBRID_IR_CACHE", str(tmp_path / "cache"))
    first = load_benchmark("xm3600")
    assert asked == [("https://google.github.io/crossmodal-3600/web-data/captions.zip", None)]
    assert load_benchmark("xm3600").fingerprint == first.fingerprint and len(asked) == 1  # from the cache
    with pytest.raises(FileNotFoundError, match="none of captions.jsonl, captions.jsonl.gz, captions.zip"):
        load_benchmark("xm3600", path=tmp_path)


# held-out pairs


def test_benchmark_from_pairs():
    pairs = ParallelPairs.from_records([
        {"id": "1", "query": {"de": "Frage 1", "en": "question 1"}, "passage": {"de": "gleich", "en": "passage 1"}},
        {"id": "2", "query": {"en": "question 2"}, "passage": {"de": "gleich", "tr": "metin 2"}},
        {"id": "3", "query": {"tr": "soru 3"}, "passage": {"en": "gleich"}},  # the same text in another language is another candidate
    ])
    benchmark = benchmark_from_pairs(pairs, name="mine")
    check_invariants(benchmark)
    assert benchmark.name == "mine" and benchmark.tasks == ("mono", "cross", "multi")
    passages = dict(zip(benchmark.passages["id"], benchmark.passages["text"]))
    assert passages == {"de/1": "gleich", "en/1": "passage 1", "en/3": "gleich", "tr/2": "metin 2"}
    judged = {
        (*benchmark.queries.loc[query, ["id", "lang"]], benchmark.passages.loc[passage, "id"])
        for query, passage in zip(benchmark.judgement_queries, benchmark.judgement_passages)
    }
    assert judged == {
        ("1", "de", "de/1"), ("1", "de", "en/1"), ("1", "en", "de/1"), ("1", "en", "en/1"),
        ("2", "en", "de/1"), ("2", "en", "tr/2"), ("3", "tr", "en/3"),
    }
    assert benchmark.info["fingerprint"] == pairs.fingerprint


def test_benchmark_from_selected_and_joined_pairs():
    sample = load_pairs("sample", split="heldout")
    part = benchmark_from_pairs(sample.select(["de", "th"], ids=[3, 5]))
    check_invariants(part)
    assert part.name == "sample" and part.languages == ["de", "th"] and len(part.queries) == 4 and len(part.judgement_queries) == 8
    assert set(part.queries["id"]) == set(sample.ids[[3, 5]])
    other = ParallelPairs.from_records([{"id": sample.ids[0], "query": {"de": "Frage"}, "passage": {"de": "Text"}}], name="other")
    joined = benchmark_from_pairs(ParallelPairs.concat([sample, other]))  # an id of both sets
    check_invariants(joined)
    assert len(joined.queries) == 48 * 11 + 1 and {f"sample/{sample.ids[0]}", f"other/{sample.ids[0]}"} <= set(joined.queries["id"])


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


@pytest.mark.parametrize("query, passage", [(-1, 0), (0, 1), (0, -1), (2, 0)])
def test_a_judgement_about_no_row(query, passage):
    frame = pd.DataFrame({"id": ["a"], "lang": ["de"], "text": ["Text"]})
    with pytest.raises(ValueError, match="mine: a judgement names .* and there are 1 rows"):
        Benchmark("mine", frame, frame, pd.DataFrame({"query": [query], "passage": [passage], "grade": [1]}))
