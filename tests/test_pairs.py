"""Training pairs: the sample's alignment, the index, splits, and every loader with good and bad input."""

import gzip
import http.server
import json
import os
import pickle
import shutil
import subprocess
import sys
import threading
import time
import unicodedata

import datasets
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hybrid_ir import mmarco as mmarco_module
from hybrid_ir import pairs as pairs_module
from hybrid_ir.pairs import PAIR_SETS, SAMPLE_LANGUAGES, PairIndex, ParallelPairs, load_pairs, read_paragraphs, sample_file
from hybrid_ir.sources import cache_dir, file_sha256

SCRIPTS = {"ar": "ARABIC", "el": "GREEK", "hi": "DEVANAGARI", "ru": "CYRILLIC", "th": "THAI", "zh": "CJK"}


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    "One cache for the whole run, so that each data set is prepared once."
    monkeypatch.setenv("HYBRID_IR_CACHE", str(tmp_path_factory.getbasetemp() / "pairs-cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "hub-cache")
    datasets.disable_progress_bars()


def record(pair_id, query=("en", "de"), passage=("en", "de"), **more):
    return {
        "id": pair_id,
        "query": {language: f"question {pair_id} {language}" for language in query},
        "passage": {language: f"passage {pair_id} {language}" for language in passage},
        **more,
    }


def check_invariants(pairs: ParallelPairs):
    "What every `ParallelPairs` promises to the modules that use it."
    table = pairs.table.to_pandas()
    assert list(table.columns) == ["id", "lang", "query", "passage", "negatives", "source"] and len(table) == len(pairs)
    assert pairs.languages == sorted(set(table["lang"])) and len(pairs.ids) == pairs.n_ids
    shape = (pairs.n_ids, len(pairs.languages))
    for rows, column in ((pairs.rows, None), (pairs.query_rows, "query"), (pairs.passage_rows, "passage")):
        assert rows.shape == shape and rows.dtype == np.int32
        positions, languages = np.nonzero(rows >= 0)
        found = table.iloc[rows[positions, languages]]
        assert (found["id"].to_numpy() == pairs.ids[positions].to_numpy()).all()
        assert (found["lang"].to_numpy() == np.array(pairs.languages)[languages]).all()
        expected = len(table) if column is None else table[column].notna().sum()
        assert len(found) == expected and (column is None or found[column].notna().all())
    assert (pairs.query_rows >= 0).any(axis=1).all() and (pairs.passage_rows >= 0).any(axis=1).all()
    assert pairs.groups.shape == pairs.sets.shape == pairs.blocks.shape == (pairs.n_ids,)
    assert pairs.sets.max() < len(pairs.set_names)


# the sample: is it what it says?


@pytest.mark.parametrize("split, paragraphs", [("train", 48), ("heldout", 24)])
def test_sample_is_complete(split, paragraphs):
    pairs = load_pairs("sample", split=split)
    check_invariants(pairs)
    assert pairs.n_ids == 2 * paragraphs and pairs.languages == SAMPLE_LANGUAGES
    assert (pairs.query_rows >= 0).all() and (pairs.passage_rows >= 0).all()
    assert len(set(pairs.groups)) == pairs.n_ids  # no two questions have the same answer
    assert len(set(pairs.blocks)) == paragraphs
    assert pairs.info["licenses"] == ["CC0-1.0"]
    assert len(set(pairs.table["query"])) == len(set(pairs.table["passage"])) == len(pairs)


@pytest.mark.parametrize("split", ["train", "heldout"])
@pytest.mark.parametrize("lang", [language for language in SAMPLE_LANGUAGES if language != "en"])
def test_sample_alignment(lang, split):
    "Language by language beside English: same ids, same number of sentences, same answering sentences, plausible lengths."
    english, other = list(read_paragraphs(sample_file("en", split))), list(read_paragraphs(sample_file(lang, split)))
    assert [part["title"] for part in english] == [part["title"] for part in other]
    shortest, longest = (0.15, 0.65) if lang == "zh" else (0.6, 1.7)
    for ours, theirs in zip(english, other):
        assert len(ours["sentences"]) == len(theirs["sentences"]) == 3
        assert [(q, s) for q, _, s in ours["questions"]] == [(q, s) for q, _, s in theirs["questions"]]
        assert len({s for _, _, (s,) in ours["questions"]}) == 2
        for sentence, translation in zip(ours["sentences"], theirs["sentences"]):
            assert shortest <= len(translation) / len(sentence) <= longest, translation
        for (_, question, _), (_, translation, _) in zip(ours["questions"], theirs["questions"]):
            assert 0.5 * shortest <= len(translation) / len(question) <= 1.6 * longest, translation


def share_of_script(text: str, script: str) -> float:
    letters = [character for character in text if character.isalpha()]
    return sum(unicodedata.name(character, "").startswith(script) for character in letters) / len(letters)


@pytest.mark.parametrize("split", ["train", "heldout"])
@pytest.mark.parametrize("lang", SAMPLE_LANGUAGES)
def test_sample_files(lang, split):
    "Answers inside their sentence, clean text, the right script."
    data = json.loads(sample_file(lang, split).read_text(encoding="utf-8"))
    script = SCRIPTS.get(lang, "LATIN")
    for article in data["data"]:
        for paragraph in article["paragraphs"]:
            context, breaks = paragraph["context"], paragraph["sentence_breaks"]
            assert context == ("" if lang == "zh" else " ").join(context[start:end] for start, end in breaks)
            assert unicodedata.normalize("NFC", context) == context
            assert all(context[start:end] == context[start:end].strip() != "" for start, end in breaks)
            assert all(share_of_script(context[start:end], script) >= 0.75 for start, end in breaks), context
            for question in paragraph["qas"]:
                (answer,) = question["answers"]
                begin = answer["answer_start"]
                assert context[begin : begin + len(answer["text"])] == answer["text"] != ""
                assert any(start <= begin and begin + len(answer["text"]) <= end for start, end in breaks)
                assert share_of_script(question["question"], script) >= 0.6, question["question"]


def test_sample_is_small_and_licensed():
    folder = sample_file("en").parents[1]
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) < 1_000_000
    assert "CC0-1.0" in (folder / "LICENSE").read_text(encoding="utf-8")


# the index


def test_rows_with_missing_translations():
    pairs = ParallelPairs.from_records([
        record("a"), record("b", query=("en", "th"), passage=("th",)), record("c", query=("de",), passage=("en",)),
    ])
    check_invariants(pairs)
    assert pairs.languages == ["de", "en", "th"]
    assert pairs.rows.tolist() == [[0, 1, -1], [-1, 2, 3], [4, 5, -1]]
    assert pairs.query_rows.tolist() == [[0, 1, -1], [-1, 2, 3], [4, -1, -1]]
    assert pairs.passage_rows.tolist() == [[0, 1, -1], [-1, -1, 3], [-1, 5, -1]]
    assert list(pairs.ids) == ["a", "b", "c"] and pairs.sets.tolist() == [0, 0, 0]
    assert pairs.record(1) == record("b", query=("en", "th"), passage=("th",))


def test_groups_connect_through_any_language():
    records = [record(name) for name in "abcde"]
    records[1]["passage"]["de"] = records[0]["passage"]["de"]
    records[3]["passage"]["de"] = records[1]["passage"]["en"]  # the same text under another language
    groups = ParallelPairs.from_records(records).groups
    assert groups[0] == groups[1] == groups[3] and len({groups[0], groups[2], groups[4]}) == 3
    whole = ParallelPairs.from_records(records)
    german = whole.select("de")
    assert german.groups[0] == german.groups[1] == german.groups[3] != german.groups[2]  # the English that linked them is gone, the link is not
    fewer = german.select(ids=["a", "c", "d"]).groups
    assert fewer[0] == fewer[2] != fewer[1]
    joined = ParallelPairs.concat([german.select(ids=["c", "d"]), german]).groups  # c, d, a, b, c, d, e
    assert joined[0] == joined[4] and len(set(joined[[1, 2, 3, 5]])) == 1 and len(set(joined)) == 3



names = st.text("abcdxyz|", min_size=1, max_size=4)
texts = st.dictionaries(st.sampled_from(["ar", "de", "en", "zh"]), st.sampled_from(["one", "two", "three", "four", "five"]), min_size=1)
record_lists = st.lists(st.fixed_dictionaries({"id": names, "query": texts, "passage": texts}), min_size=1, max_size=12, unique_by=lambda r: r["id"])


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(record_lists)
def test_any_records(records):
    pairs = ParallelPairs.from_records(records)
    check_invariants(pairs)
    assert [pairs.record(position) for position in range(len(records))] == records
    # groups: the transitive closure of "has a passage text in common", computed plainly
    reached = []
    for start in range(len(records)):
        found, todo = {start}, [start]
        while todo:
            here = set(records[todo.pop()]["passage"].values())
            new = {n for n, other in enumerate(records) if n not in found and here & set(other["passage"].values())}
            found |= new
            todo += new
        reached.append(found)
    for n, found in enumerate(reached):
        assert set(np.flatnonzero(pairs.groups == pairs.groups[n])) == found


def test_select():
    pairs = ParallelPairs.from_records([record("a"), record("b", passage=("de",)), record("c", query=("en",), passage=("en",))])
    german = pairs.select("de")
    check_invariants(german)
    assert list(german.ids) == ["a", "b"] and german.languages == ["de"] and german.fingerprint != pairs.fingerprint
    for ids in (["c", "a"], np.array([0, 2]), np.array([True, False, True])):
        chosen = pairs.select(ids=ids)
        check_invariants(chosen)
        assert list(chosen.ids) == ["a", "c"]
    again = pairs.select(languages=["en"]).select(ids="a")
    check_invariants(again)
    assert again.record(0) == {"id": "a", "query": {"en": "question a en"}, "passage": {"en": "passage a en"}}
    assert pairs.select() is pairs and pairs.select(languages=["en", "de"]).fingerprint == pairs.fingerprint
    with pytest.raises(ValueError, match="unknown language 'fr'; valid: de, en"):
        pairs.select(languages=["en", "fr"])
    with pytest.raises(ValueError, match="1 unknown pair ids, the first is 'x'"):
        pairs.select(ids=["a", "x"])
    with pytest.raises(ValueError, match="nothing is left"):
        pairs.select(languages="en", ids=["b"])


def test_split_keeps_blocks_together():
    records = [record(f"page{n // 4}|{n}") for n in range(200)]
    for n in range(0, 40, 8):  # a passage that two pages share
        records[n]["passage"]["de"] = records[n + 4]["passage"]["de"]
    pairs = ParallelPairs.from_records(records)
    train, heldout = pairs.split(heldout=0.2, seed=3)
    check_invariants(train)
    check_invariants(heldout)
    assert sorted([*train.ids, *heldout.ids]) == sorted(pairs.ids)
    assert abs(heldout.n_ids - 40) <= 4
    assert not {name.split("|")[0] for name in train.ids} & {name.split("|")[0] for name in heldout.ids}
    assert not set(train.table["passage"]) & set(heldout.table["passage"])
    again = pairs.split(heldout=0.2, seed=3)[1]
    assert again.fingerprint == heldout.fingerprint and list(again.ids) == list(heldout.ids)
    assert list(pairs.split(heldout=0.2, seed=4)[1].ids) != list(heldout.ids)


def test_split_uses_the_page_key():
    records = [record(f"id-{n}", page=f"page {n % 5}") for n in range(20)]
    _, heldout = ParallelPairs.from_records(records).split(heldout=0.2)
    assert len({int(name[3:]) % 5 for name in heldout.ids}) == 1 and heldout.n_ids == 4


def test_split_with_bad_fractions():
    pairs = ParallelPairs.from_records([record("page|1"), record("page|2"), record("page|3")])
    for fraction in (0, 1, -0.1, 2):
        with pytest.raises(ValueError, match="heldout must lie between 0 and 1"):
            pairs.split(fraction)
    with pytest.raises(ValueError, match="smallest block"):
        pairs.split(0.5)


def test_an_index_on_disk_is_the_index_in_memory(monkeypatch):
    records = [record(f"page{n // 4}|{n}", passage=("de", "en") if n % 3 else ("en",)) for n in range(60)]
    records[7]["passage"]["en"] = records[50]["passage"]["en"]
    monkeypatch.setattr("hybrid_ir.pairs.BLOCK_ROWS", 7)

    def make():
        pairs = ParallelPairs.from_records(records)
        joined = ParallelPairs.concat([pairs.select("en"), pairs])
        return [pairs, *pairs.split(heldout=0.2), joined, joined.split(heldout=0.3)[1]]

    in_memory = make()
    monkeypatch.setattr("hybrid_ir.pairs.MAPPED_ROWS", 3)
    for on_disk in (make(), make()):  # written, then found
        for mine, others in zip(in_memory, on_disk):
            check_invariants(others)
            for name in PairIndex.__annotations__:
                first, second = getattr(mine, name), getattr(others, name)
                assert (first is None and second is None) or (first.dtype == second.dtype and np.array_equal(first, second)), name
            assert mine.fingerprint == others.fingerprint and list(mine.ids) == list(others.ids) and mine.table.to_dict() == others.table.to_dict()
            assert not others.groups.flags.writeable  # a file, not memory
    folders = [path for path in (cache_dir() / "pairs").glob("pair-index-*") if path.name == f"pair-index-{in_memory[0].fingerprint}"]
    assert len(folders) == 1
    os.truncate(folders[0] / "groups.npy", 100)
    with pytest.warns(UserWarning, match="groups.npy has 100 bytes"):
        assert np.array_equal(ParallelPairs.from_records(records).groups, in_memory[0].groups)


def test_concat():
    first = ParallelPairs.from_records([record("a"), record("b")], name="first")
    second = ParallelPairs.from_records([record("a", query=("th",), passage=("th",)), record("c")], name="second")
    both = ParallelPairs.concat([first, second])
    check_invariants(both)
    assert both.sets.tolist() == [0, 0, 1, 1] and both.set_names == ["first", "second"] and both.n_ids == 4
    assert both.languages == ["de", "en", "th"] and both.info["name"] == "first + second"
    assert both.groups[1] != both.groups[0] and both.groups[3] not in both.groups[:3]
    three = ParallelPairs.concat([both.select(["en", "th"]), first])
    check_invariants(three)
    assert three.set_names == ["first", "second", "first"] and three.sets.tolist() == [0, 0, 1, 1, 2, 2]
    assert three.groups[0] == three.groups[4]  # the same passage in two sets is still the same passage
    train, heldout = three.split(0.5)
    assert not set(train.table["passage"]) & set(heldout.table["passage"])
    with pytest.raises(ValueError, match="no training set"):
        ParallelPairs.concat([])


def test_fingerprint_and_cache():
    records = [record("a"), record("b")]
    first, second = ParallelPairs.from_records(records), ParallelPairs.from_records(iter(records))
    assert first.fingerprint == second.fingerprint
    assert first.table.cache_files == second.table.cache_files  # memory-mapped, the same file
    records[1]["passage"]["de"] += "!"
    assert ParallelPairs.from_records(records).fingerprint != first.fingerprint


def test_pickle_and_display():
    pairs = ParallelPairs.from_records([record("a"), record("b")], name="<mine>")
    copy = pickle.loads(pickle.dumps(pairs.select("de")))
    check_invariants(copy)
    assert "2 ids" in repr(pairs) and "<table" in pairs._repr_html_() and "&lt;mine&gt;" in pairs._repr_html_()


def test_negatives_source_and_page_are_kept():
    pairs = ParallelPairs.from_records([record("a", negatives={"de": ["falsch", "auch falsch"], "en": []}, source="somewhere", license="MIT")])
    assert pairs.table["negatives"][:] == [["falsch", "auch falsch"], None] and set(pairs.table["source"]) == {"somewhere"}
    assert pairs.info["sources"] == [{"source": "somewhere", "license": "MIT", "translation": None, "ids": 1}]


# bad records


@pytest.mark.parametrize(
    "bad, message",
    [
        ({"id": "x"}, "id 'x' lacks query, passage"),
        ({"query": {"en": "q"}, "passage": {"en": "p"}}, "lacks id"),
        (record("x") | {"id": ""}, "id must be a text"),
        (record("x") | {"id": ["x"]}, "id must be a text"),
        (record("x") | {"query": "text"}, "id 'x': query must map languages to texts"),
        (record("x") | {"query": {}}, "id 'x': query has no text in any language"),
        (record("x") | {"passage": {"en": None}}, "id 'x': passage has no text in any language"),
        (record("x") | {"passage": {"en": "p", "de": " \n"}}, "id 'x': passage in de is empty"),
        (record("x") | {"passage": {"en": ["p"]}}, "id 'x': passage in en is not a text"),
        (record("x") | {"query": {"en": 3}}, "id 'x': query in en is not a text: 3"),
        (record("x") | {"query": {"": "q"}}, "a language that is not a name"),
        (record("x") | {"query": {"en ": "q"}}, "a language that is not a name: 'en '"),
        (record("x", negatives={"en": "text"}), "negatives in en must be a list"),
        (record("x", negatives={"en": ["fine", ""]}), "negatives in en must be a list"),
        (record("x", negatives=["text"]), "negatives must map languages"),
        (["x"], "expected an object"),
        (record("a"), "id 'a' was already used"),
    ],
)
def test_bad_records_name_line_and_id(tmp_path, bad, message):
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in (record("a"), record("b"))) + "\n\n" + json.dumps(bad), encoding="utf-8")
    with pytest.raises(ValueError, match=message) as caught:
        load_pairs(path)
    assert "mine.jsonl line 4" in str(caught.value)
    if message.endswith("already used"):
        assert "mine.jsonl line 1" in str(caught.value)


def test_nothing_is_left_of_a_failed_conversion(tmp_path, monkeypatch):
    monkeypatch.setenv("HYBRID_IR_CACHE", str(tmp_path / "cache"))
    (tmp_path / "mine.jsonl").write_text(json.dumps(record("a")) + "\n{broken", encoding="utf-8")
    with pytest.raises(ValueError, match="line 2: not valid JSON"):
        load_pairs(tmp_path / "mine.jsonl")
    assert list((tmp_path / "cache" / "pairs").iterdir()) == []


# JSON lines


def write_lines(path, records):
    with gzip.open(path, "wt", encoding="utf-8") if path.suffix == ".gz" else open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in records)
    return path


@pytest.mark.parametrize("name", ["mine.jsonl", "mine.jsonl.gz"])
def test_json_lines(tmp_path, name):
    records = [record("a"), record(7, passage=("de",)), record("ü|1", query=("th",))]
    path = write_lines(tmp_path / name, records)
    pairs = load_pairs(str(path))
    check_invariants(pairs)
    assert pairs.info["name"] == "mine" and pairs.info["sha256"] == file_sha256(path) and list(pairs.ids) == ["a", "7", "ü|1"]
    assert load_pairs(path).table.cache_files == pairs.table.cache_files
    assert load_pairs(path, languages="de").languages == ["de"]
    write_lines(path, records[:2])
    assert load_pairs(path).n_ids == 2  # a changed file is read again


def test_broken_files(tmp_path):
    whole = gzip.compress((json.dumps(record("a")) + "\n").encode() * 500)
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"cut.jsonl.gz: the compressed file is broken after line \d+"):
        load_pairs(tmp_path / "cut.jsonl.gz")
    (tmp_path / "plain.jsonl.gz").write_text(json.dumps(record("a")))
    with pytest.raises(ValueError, match="plain.jsonl.gz: the compressed file is broken"):
        load_pairs(tmp_path / "plain.jsonl.gz")
    (tmp_path / "latin.jsonl").write_bytes('{"id": "ü"}'.encode("latin-1"))
    with pytest.raises(ValueError, match="latin.jsonl line 1: not valid JSON"):
        load_pairs(tmp_path / "latin.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="empty.jsonl: no pairs in it"):
        load_pairs(tmp_path / "empty.jsonl")
    with pytest.raises(FileNotFoundError, match="nowhere.jsonl"):
        load_pairs(tmp_path / "nowhere.jsonl")


# names


def test_names_are_checked_first():
    with pytest.raises(ValueError, match="unknown training set 'sampel'; valid: sample, parallel_docs, mlqa_test"):
        load_pairs("sampel")
    with pytest.raises(ValueError, match="unknown split of sample 'test'; valid: train, heldout"):
        load_pairs("sample", split="test")
    with pytest.raises(ValueError, match="unknown language 'fr'; valid: ar, de"):
        load_pairs("sample", languages=["de", "fr"])
    with pytest.raises(ValueError, match="unknown language 'xx'; valid: ar, de"):
        load_pairs("parallel_docs", languages="xx", path="nowhere")  # before the file is looked for


def test_without_data_folder_the_error_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.delenv("HYBRID_IR_DATA", raising=False)
    monkeypatch.setenv("HYBRID_IR_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="Set HYBRID_IR_DATA") as caught:
        load_pairs("parallel_docs")
    assert "train/parallel_docs.jsonl.gz" in str(caught.value)


def test_a_list_of_sets(tmp_path):
    path = write_lines(tmp_path / "mine.jsonl", [record("a"), record("b")])
    pairs = load_pairs(["sample", path], languages=["de", "en"])
    check_invariants(pairs)
    assert pairs.set_names == ["sample", "mine"] and pairs.languages == ["de", "en"] and pairs.sets[-1] == 1


# Hugging Face datasets


HUB_RECORDS = [record("a"), record("b", passage=("de",)), record("c", query=("th",), passage=("en", "th"))]


def check_hub(pairs):
    check_invariants(pairs)
    assert [pairs.record(position) for position in range(3)] == HUB_RECORDS


def test_folder_of_parquet(tmp_path):
    datasets.Dataset.from_list(HUB_RECORDS).to_parquet(str(tmp_path / "mine" / "train.parquet"))
    check_hub(load_pairs(str(tmp_path / "mine")))


def test_folder_of_json_lines(tmp_path):
    (tmp_path / "mine").mkdir()
    write_lines(tmp_path / "mine" / "train.jsonl", HUB_RECORDS)
    write_lines(tmp_path / "mine" / "validation.jsonl", [record("v")])
    check_hub(load_pairs(tmp_path / "mine"))
    assert list(load_pairs(tmp_path / "mine", split="validation").ids) == ["v"]


def test_saved_dataset(tmp_path):
    datasets.Dataset.from_list(HUB_RECORDS).save_to_disk(str(tmp_path / "one"))
    check_hub(load_pairs(tmp_path / "one"))
    datasets.DatasetDict(train=datasets.Dataset.from_list(HUB_RECORDS)).save_to_disk(str(tmp_path / "dict"))
    check_hub(load_pairs(tmp_path / "dict"))
    with pytest.raises(ValueError, match="unknown split 'dev'; valid: train"):
        load_pairs(tmp_path / "dict", split="dev")


def test_hub_dataset_with_negatives_and_nulls(tmp_path):
    rows = [record("a", negatives={"en": ["no"], "de": None}), record("b", negatives=None)]
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "mine"))
    assert load_pairs(tmp_path / "mine").table["negatives"][:] == [None, ["no"], None, None]


def test_hub_name_asks_for_that_dataset(monkeypatch):
    calls = []

    def load_dataset(*args, **options):
        calls.append((args, options))
        return datasets.Dataset.from_list(HUB_RECORDS)

    monkeypatch.setattr(pairs_module.datasets, "load_dataset", load_dataset)
    pairs = load_pairs("hf:owner/name", split="validation")
    check_hub(pairs)
    assert calls == [(("owner/name",), {"split": "validation"})] and pairs.info["name"] == "owner/name"


def test_hub_without_network(monkeypatch):
    def load_dataset(*args, **options):
        raise ConnectionError("Couldn't reach 'owner/name' on the Hub")

    monkeypatch.setattr(pairs_module.datasets, "load_dataset", load_dataset)
    with pytest.raises(FileNotFoundError, match="owner/name.*Couldn't reach.*save_to_disk"):
        load_pairs("hf:owner/name")


def test_hub_dataset_with_other_columns(tmp_path):
    datasets.Dataset.from_list([{"question": "q", "id": "a"}]).save_to_disk(str(tmp_path / "mine"))
    with pytest.raises(ValueError, match="lacks the columns query, passage; it has question, id"):
        load_pairs(tmp_path / "mine")
    datasets.Dataset.from_list([record("a"), record("b") | {"query": {"en": " ", "de": "d"}}]).save_to_disk(str(tmp_path / "blank"))
    with pytest.raises(ValueError, match="row 1, id 'b': query in en is empty"):
        load_pairs(tmp_path / "blank")


# mMARCO


TINY = {
    "english": (["why is it red", "what is a lichen", "where do swifts sleep"], ["Cold nights.", "A fungus.", "In flight.", "No \"roots.", "In a nest."]),
    "german": (["warum rot", "was ist eine Flechte", "wo schlafen Segler"], ["Kalte Nächte.", "Ein Pilz.", "Im Flug.", "Keine Wurzeln.", "Im Nest."]),
}
TRIPLES = [(1, 11, 14), (3, 13, 12), (1, 11, 14), (2, 12, 14), (1, 11, 12), (3, 15, 14), (3, 13, 15), (2, 14, 13), (1, 11, 13)]
ENGLISH = "mmarco/data/google/collections/english_collection.tsv"
QUESTIONS = "mmarco/data/google/queries/train/german_queries.train.tsv"


def tsv(lines) -> str:
    return "".join("\t".join(map(str, line)) + "\n" for line in lines)


def write_mmarco(folder):
    "Three questions and five passages in the published layout."
    tables = {"triples.train.ids.small.tsv": TRIPLES}
    for language, (questions, passages) in TINY.items():
        tables[f"google/queries/train/{language}_queries.train.tsv"] = enumerate(questions, start=1)
        tables[f"google/collections/{language}_collection.tsv"] = enumerate(passages, start=11)
    for name, lines in tables.items():
        target = folder / "mmarco" / "data" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(tsv(lines), encoding="utf-8")
    return folder


@pytest.fixture
def mmarco(tmp_path, monkeypatch):
    monkeypatch.setenv("HYBRID_IR_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HYBRID_IR_DATA", raising=False)
    return write_mmarco(tmp_path / "files")


def expected_rows(languages, limit) -> list:
    "The join, plainly, with dictionaries."
    rows = []
    for query, passage in sorted({triple[:2] for triple in TRIPLES}):
        wrong = list(dict.fromkeys(n for q, p, n in TRIPLES if (q, p) == (query, passage)))[:limit]
        wrong = [n for n in wrong if (query, n) not in {triple[:2] for triple in TRIPLES}]
        for language in languages:
            questions, passages = TINY[{"de": "german", "en": "english"}[language]]
            rows.append({
                "id": f"{query}-{passage}", "lang": language, "query": questions[query - 1], "passage": passages[passage - 11],
                "negatives": [passages[n - 11] for n in wrong] or None, "source": "mmarco",
            })
    return rows


@pytest.mark.parametrize("languages, limit", [(["de", "en"], 4), (["en"], 1), (["de"], 0), (["de", "en"], 2)])
def test_mmarco_rows(mmarco, languages, limit):
    pairs = load_pairs("mmarco", languages=languages, path=mmarco, negatives=limit)
    check_invariants(pairs)
    assert pairs.table.to_list() == expected_rows(languages, limit)
    assert pairs.groups.tolist() == [0, 1, 1, 2, 2] and pairs.blocks.tolist() == [0, 1, 1, 2, 2]
    assert pairs.info["sha256"][ENGLISH.rpartition("/")[2] if "en" in languages else QUESTIONS.rpartition("/")[2]]
    assert pairs.info["sources"][0]["ids"] == 5


@pytest.mark.parametrize("limit", [0, 1, 2, 4])
def test_mmarco_in_small_blocks(mmarco, tmp_path, monkeypatch, limit):
    "Blocks of triples, of lines and of rows end anywhere; the result is the same."
    whole = load_pairs("mmarco", ["de", "en"], path=mmarco, negatives=limit)
    files = mmarco_module.find_mmarco(["de", "en"], mmarco)
    for name in ("read_triples", "read_tsv"):
        small = {"read_triples": {"block_rows": 2}, "read_tsv": {"block_bytes": 40}}[name]
        original = getattr(mmarco_module, name)
        monkeypatch.setattr(mmarco_module, name, lambda *args, original=original, small=small: original(*args, **small))
    folder = tmp_path / "small"
    folder.mkdir()
    written = mmarco_module.write_mmarco(folder, files, ["de", "en"], limit, block_rows=4)
    small = pairs_module.open_pairs(folder / "rows.arrow", written, "mmarco")
    assert small.fingerprint == whole.fingerprint and small.table.to_list() == whole.table.to_list() and written["rows"] == 10
    assert [path.name for path in folder.iterdir()] == ["rows.arrow"]


def test_first_of_each_agrees_with_dictionaries():
    generator = np.random.default_rng(0)
    keys, negatives = generator.integers(0, 40, 3000) << 32, generator.integers(0, 30, 3000).astype(np.int32)
    kept = mmarco_module.first_of_each(keys, negatives, 5)
    expected = [
        (key, negative) for key in np.unique(keys) for negative in list(dict.fromkeys(negatives[keys == key].tolist()))[:5]
    ]
    assert list(zip(*(part.tolist() for part in kept))) == expected


def test_mmarco_shared_passages(mmarco):
    "Equal text under two ids is one passage, and a passage that answers two questions joins their groups."
    path = mmarco / ENGLISH
    path.write_text(path.read_text(encoding="utf-8").replace("A fungus.", "Cold nights."), encoding="utf-8")
    triples = mmarco / "mmarco/data/triples.train.ids.small.tsv"
    triples.write_text(tsv([(1, 11, 14), (2, 12, 14), (3, 13, 14)]))
    assert load_pairs("mmarco", "en", path=mmarco).groups.tolist() == [0, 0, 1]
    assert load_pairs("mmarco", "de", path=mmarco).groups.tolist() == [0, 1, 2]
    triples.write_text(tsv([(1, 11, 14), (2, 11, 14), (3, 13, 14)]))
    assert load_pairs("mmarco", "de", path=mmarco).groups.tolist() == [0, 0, 1]


def test_mmarco_is_prepared_once_and_again_when_a_file_changes(mmarco, monkeypatch):
    first = load_pairs("mmarco", "en", path=mmarco)
    with monkeypatch.context() as patch:
        patch.setattr(mmarco_module, "read_tsv", None)
        again = load_pairs("mmarco", ["en"], path=mmarco / "mmarco")  # the hub's repository itself
    assert again.table.cache_files == first.table.cache_files
    assert load_pairs("mmarco", "en", path=mmarco, negatives=1).fingerprint != first.fingerprint
    path = mmarco / ENGLISH
    path.write_text(path.read_text(encoding="utf-8").replace("In flight.", "While they fly."), encoding="utf-8")
    changed = load_pairs("mmarco", "en", path=mmarco)
    assert changed.fingerprint != first.fingerprint and "While they fly." in changed.table["passage"][:]


def test_mmarco_beside_other_sets(mmarco):
    pairs = load_pairs(["sample", "mmarco"], languages=["th", "en"], path=mmarco)  # no Thai in mMARCO
    check_invariants(pairs)
    assert pairs.set_names == ["sample", "mmarco"] and pairs.n_ids == 96 + 5 and pairs.groups[-1] == pairs.groups[-2] != pairs.groups[-3]
    assert len(set(pairs.groups)) == 96 + 3


@pytest.mark.parametrize(
    "name, old, new, message",
    [
        ("triples", "3\t13\t12\n", "3\t13\n", "triples.train.ids.small.tsv line 2: expected 3 columns .*, found 2"),
        ("triples", "3\t13\t12\n", "\n", "line 2: expected 3 columns .*, found 1"),
        ("triples", "3\t13\t12\n", "3\t13\tx12\n", "line 2: wrong passage id must be a number, not 'x12'"),
        ("triples", "3\t13\t12\n", "3\t13\t99999999999\n", "line 2: wrong passage id must be a number, not '99999999999'"),
        ("triples", "1\t11\t13\n", "1\t11\t1", "line 9: the last line does not end"),
        ("triples", "1\t11\t13\n", "1\t11", "line 9: expected 3 columns"),
        ("triples", None, "", "triples.train.ids.small.tsv: the file is empty"),
        ("triples", "3\t15\t14", "3\t99\t14", "english_collection.tsv: no passage 99, which .*triples.train.ids.small.tsv line 6 asks for"),
        ("triples", "3\t15\t14", "3\t15\t99", "english_collection.tsv: no passage 99, which .*triples.train.ids.small.tsv line 6 asks for"),
        ("triples", "2\t14\t13", "9\t14\t13", "english_queries.train.tsv: no query 9, which .* line 8 asks for"),
        ("english_collection", "A fungus.", "A\tfungus.", "english_collection.tsv line 2: expected 2 columns .*, found 3"),
        ("english_collection", "A fungus.", " ", "line 2: the text of passage 12 is empty"),
        ("english_collection", "12\t", "11\t", "line 2: passage 11 was already there .line 1."),
        ("english_collection", "In a nest.\n", "In a n", "line 5: the last line does not end"),
        ("english_collection", "A fungus.", "A \udcfffungus.", "line 2: text is not UTF-8"),
        ("english_collection", "A fungus.", "A\rfungus.", "line 2: a carriage return inside"),
        ("english_queries", "2\twhat", "two\twhat", "english_queries.train.tsv line 2: query id must be a number, not 'two'"),
        ("english_queries", "what is a lichen", "", "line 2: the text of query 2 is empty"),
    ],
)
def test_mmarco_with_broken_files(mmarco, name, old, new, message):
    (path,) = [path for path in mmarco.rglob("*.tsv") if path.name.startswith(name)]
    whole = path.read_bytes().decode("utf-8")
    assert old is None or old in whole
    path.write_bytes((new if old is None else whole.replace(old, new)).encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=message) as caught:
        load_pairs("mmarco", "en", path=mmarco)
    assert str(path.parent) in str(caught.value)
    assert list((mmarco.parent / "cache" / "pairs").iterdir()) == []  # nothing half-written


def test_mmarco_options_are_checked_first():
    with pytest.raises(ValueError, match="unknown language 'th'; valid: ar, de, en, es, fr, hi, id, it, ja, nl, pt, ru, vi, zh"):
        load_pairs("mmarco", languages=["en", "th"], path="nowhere")
    for bad in (-1, 1.5, True):
        with pytest.raises(ValueError, match="negatives must be a whole number from 0"):
            load_pairs("mmarco", languages="en", path="nowhere", negatives=bad)


def test_mmarco_needs_disk(mmarco, monkeypatch):
    usage = shutil.disk_usage(mmarco)
    monkeypatch.setattr(mmarco_module.shutil, "disk_usage", lambda folder: usage._replace(free=100))
    monkeypatch.setattr(mmarco_module, "keep_texts", None)  # the collections are not even read
    with pytest.raises(OSError, match="preparing 5 mmarco pairs in 1 languages .* GB are free .* HYBRID_IR_CACHE"):
        load_pairs("mmarco", "en", path=mmarco)
    with pytest.raises(OSError, match="the download of 2 mmarco collections needs about 8.2 GB"):
        load_pairs("mmarco", ["en", "de"])


def test_mmarco_size_is_estimated(mmarco):
    files = mmarco_module.find_mmarco(["en"], mmarco)
    triples = mmarco_module.read_triples(files[mmarco_module.MMARCO_TRIPLES], 4, {})
    assert 0.5 < mmarco_module.table_bytes(["en"], files, triples) / (17 * 5 + 12 * 8 + 80 * 5) < 2


def test_mmarco_download(mmarco, tmp_path, monkeypatch):
    "From a server on this machine, below the address that the hub has."
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(mmarco / "mmarco"))

        def log_message(self, *args):
            asked.append(self.path)

    assert mmarco_module.MMARCO_URL == "https://huggingface.co/datasets/unicamp-dl/mmarco/resolve/main/"
    monkeypatch.setenv("NO_PROXY", "*")
    usage = shutil.disk_usage(mmarco)
    monkeypatch.setattr(mmarco_module.shutil, "disk_usage", lambda folder: usage._replace(free=10**12))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        files = mmarco_module.find_mmarco(["de"], url=f"http://127.0.0.1:{server.server_port}/")
        assert asked == [
            "/data/triples.train.ids.small.tsv", "/data/google/collections/german_collection.tsv",
            "/data/google/queries/train/german_queries.train.tsv",
        ]
        assert all(path == tmp_path / "cache" / name for name, path in files.items())
        assert load_pairs("mmarco", "de").table.to_list() == expected_rows(["de"], 4) and len(asked) == 3
        with pytest.raises(FileNotFoundError, match="french_collection.tsv was not found") as caught:
            mmarco_module.find_mmarco(["fr"], url=f"http://127.0.0.1:{server.server_port}/")
        assert "answered 404" in str(caught.value)
    finally:
        server.shutdown()
        server.server_close()


# what killed conversions leave


def test_killed_conversions_are_cleaned_up(tmp_path, monkeypatch):
    monkeypatch.setenv("HYBRID_IR_CACHE", str(tmp_path))
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    hour = 3600
    ages = {  # name: (age of the folder, age of the file in it, is removed)
        f"{pairs_module.unfinished_prefix(gone.pid)}a": (hour, hour, True),
        f"{pairs_module.unfinished_prefix(gone.pid)}b": (hour, 60, False),  # still written to: a process of another container
        f"{pairs_module.unfinished_prefix()}c": (23 * hour, 23 * hour, False),  # this process
        f"{pairs_module.unfinished_prefix()}d": (25 * hour, 25 * hour, True),
        f"unfinished-00000000-{gone.pid}-e": (hour, hour, False),  # another machine
        "unfinished-x1y2z3": (hour, hour, False),
        "unfinished-old": (30 * hour, 25 * hour, True),
        "unfinished-long": (30 * hour, hour, False),  # a long conversion
        "mine-0123": (99 * hour, 99 * hour, False),
    }
    for name, (folder_age, file_age, _) in ages.items():
        file = tmp_path / "pairs" / name / "work" / "rows.arrow"
        file.parent.mkdir(parents=True)
        file.touch()
        os.utime(file, (time.time() - file_age,) * 2)
        for folder in (file.parent, file.parent.parent):
            os.utime(folder, (time.time() - folder_age,) * 2)
    pairs = ParallelPairs.from_records([record("a")])
    left = {folder.name for folder in (tmp_path / "pairs").iterdir()}
    assert left == {name for name, (_, _, is_removed) in ages.items() if not is_removed} | {f"records-{pairs.fingerprint}"}


def test_a_killed_conversion_leaves_nothing_that_counts(mmarco):
    "Killed while it writes: no folder under the final name, and the next run succeeds."
    code = """
import os, signal, sys
from hybrid_ir import mmarco, pairs
mmarco.merge_languages = lambda parts, target: (target.write_bytes(b"half"), os.kill(os.getpid(), signal.SIGKILL))
pairs.load_pairs("mmarco", "en", path=sys.argv[1])
"""
    killed = subprocess.run([sys.executable, "-c", code, str(mmarco)], capture_output=True, check=False)
    assert killed.returncode == -9, killed.stderr
    (left,) = (mmarco.parent / "cache" / "pairs").iterdir()
    assert left.name.startswith(f"unfinished-{pairs_module.unfinished_prefix().split('-')[1]}")
    for path in [*left.rglob("*"), left]:
        os.utime(path, (time.time() - 700,) * 2)
    assert load_pairs("mmarco", "en", path=mmarco).n_ids == 5 and not left.exists()


# the real sets


def test_parallel_docs(data_env):
    pairs = load_pairs("parallel_docs")
    check_invariants(pairs)
    assert pairs.n_ids == 7517 and len(pairs) == 95252 and tuple(pairs.languages) == PAIR_SETS["parallel_docs"].languages
    assert pairs.info["sha256"] == PAIR_SETS["parallel_docs"].sha256
    assert "MIT" in pairs.info["licenses"] and len({entry["source"] for entry in pairs.info["sources"]}) == 20
    assert np.bincount(pairs.groups).max() == 2
    nine = pairs.select(["ar", "de", "en", "es", "hi", "ru", "th", "tr", "zh"])
    assert (nine.rows >= 0).all(axis=1).sum() == 2236
    train, heldout = nine.split(0.1, seed=1)
    assert abs(heldout.n_ids / nine.n_ids - 0.1) < 0.002
    pages = [{name.rpartition("|")[0] for name in part.ids} for part in (train, heldout)]
    assert not pages[0] & pages[1]
    assert not set(train.table["passage"]) & set(heldout.table["passage"])


def test_mlqa_test(data_env):
    pairs = load_pairs("mlqa_test")
    check_invariants(pairs)
    assert pairs.n_ids == 9677 and tuple(pairs.languages) == PAIR_SETS["mlqa_test"].languages
    assert np.bincount(pairs.groups).max() == 7 and pairs.groups.max() + 1 == 8499
    assert (pairs.passage_rows >= 0).any(axis=0).tolist() == [False, True, True, False, True, True]
    with pytest.raises(ValueError, match="nothing is left"):
        pairs.select(["ar", "hi"])  # questions only


def test_what_cannot_be_chosen(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(json.dumps(record(name) | {"source": "s", "page": "p"}, ensure_ascii=False) for name in "ab"))
    with pytest.raises(ValueError, match="split of .*mine.jsonl 'heldout'.*train"):
        load_pairs(str(path), split="heldout")
    datasets.Dataset.from_list(HUB_RECORDS).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(ValueError, match="split of .*saved 'test'.*train"):
        load_pairs(str(tmp_path / "saved"), split="test")
    with pytest.raises(ValueError, match="no such positions among its 2 pair ids"):
        load_pairs(str(path)).select(ids=[0, 5])
    with pytest.raises(ValueError, match="negatives in tr, but no query and no passage there"):
        ParallelPairs.from_records([record("a") | {"negatives": {"tr": ["x"]}}])
    with pytest.raises(TypeError, match="not DataFrame; of records in memory, ParallelPairs.from_records"):
        load_pairs(load_pairs(str(path)).table.to_pandas())
