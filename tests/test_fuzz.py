"""Every loader against broken, strange and hostile files: an error of ours that names the file, or the right result; nothing else.

`HYBRID_IR_FUZZ=2000` sets the number of cases of each loader (default: 40). Files are made in three ways: well-formed
ones with strange texts, well-formed ones in which a value is replaced by something of another kind, and bytes that are
cut, flipped, swapped or inserted. Where a file is accepted, a second, plain reader here says what must come out.
"""

import gzip
import io
import json
import os
import random
import shutil
import warnings
import zipfile
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny import save_tiny

from hybrid_ir.benchmarks import load_benchmark, read_beir_texts, read_captions, read_judgements, read_topics
from hybrid_ir.encoders import load_encoder
from hybrid_ir.evaluation import DamagedFile, Scores, evaluate
from hybrid_ir.exchange import dataset_to_pairs
from hybrid_ir.pairs import ParallelPairs, load_pairs, read_json_lines, read_paragraphs, sample_file
from hybrid_ir.sources import find_damage, write_checksums

CASES = int(os.environ.get("HYBRID_IR_FUZZ") or 40)
PROMISE = "whatever is in a file: its content, or an error that names it"
STRANGE = ["nul \0 inside", "\0", "‮right to left‬", "‏‫عربي‬", "e\u0301", "\ufeffmark", "a\u2028b\x85c", "😀", "\U0010ffff", " \u00a0x\u3000 ", "x" * 1_000_000, "\ud83d", "\udfffz", "", " ", "\n", "\t", "'\"\\", "NaN", "ÿ"]
VALUES = [None, True, False, 0, -1, 3, 1e400, float("nan"), 10**30, "", "x", [], ["x"], [None], {}, {"x": 1}, [[1, 2]], {"en": None}, {"en": ["x"]}, [0.5, 1], "\ud800"]
DEEP = "[" * 100_000


def record(number: int, extra: str = "") -> dict:
    return {
        "id": f"page|{number}", "query": {"en": f"question {number}{extra}", "ar": f"سؤال {number}"}, "passage": {"en": f"passage {number}", "ar": f"فقرة {number}"},
        "negatives": {"en": [f"wrong {number}"]}, "source": "fuzz", "license": "CC0",
    }  # fmt: skip


def replace_one(content, chance: random.Random, value):
    "The content with one value, at a random place in it, replaced."
    if isinstance(content, dict) and content and chance.random() < 0.85:
        key = chance.choice(list(content))
        return {name: replace_one(part, chance, value) if name == key else part for name, part in content.items()}
    if isinstance(content, list) and content and chance.random() < 0.85:
        place = chance.randrange(len(content))
        return [replace_one(part, chance, value) if number == place else part for number, part in enumerate(content)]
    return value


def damage(whole: bytes, chance: random.Random) -> bytes:
    "The bytes, cut, flipped, swapped, or with something inserted."
    data = bytearray(whole)
    for _ in range(chance.choice([1, 1, 1, 2, 5])):
        place, kind = chance.randrange(len(data) + 1), chance.randrange(7)
        if kind == 0:
            data = data[:place]
        elif kind == 1 and data:
            data[min(place, len(data) - 1)] ^= 1 << chance.randrange(8)
        elif kind == 2:
            data[place:place] = chance.choice([b"\0", b"\xff\xfe", b"\xed\xa0\x80", b"\n", b"\r", b"\t", b"\x1f\x8b", b'"', b"}", b"[", b"\xef\xbb\xbf", b"\\ud800", b"9" * 5000])
        elif kind == 3:
            end = place + chance.randrange(40)
            data[place:place] = data[place:end]
        elif kind == 4:
            del data[place : place + chance.randrange(1, 40)]
        elif kind == 5:
            data = data[place:] + data[:place]
        else:
            data = bytearray(chance.choice([b"", b"\n", b"<html>not here</html>", DEEP.encode(), b"\xff" * 100, bytes(100), whole.decode("utf-8", "replace").encode("utf-16")]))
    return bytes(data)


def fuzzed(test):
    "Run a test with many seeds, drawn by hypothesis: the same ones every time. A failure prints its seed; seeds are not shrunk, a smaller one is no simpler case."
    options = settings(max_examples=CASES, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck), phases=[Phase.explicit, Phase.generate])
    return options(given(seed=st.integers(0, 2**32 - 1))(test))


class Outcomes:
    "What the cases of one loader led to. Anything but an acceptance or an error of ours fails the test."

    def __init__(self):
        self.counts = Counter()

    def check(self, load, *names: str):
        "The result of `load()`, or None after an error that names one of the files."
        self.counts["cases"] += 1
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                result = load()
        except (ValueError, FileNotFoundError) as error:
            assert type(error) in (ValueError, FileNotFoundError, DamagedFile), f"not an error of ours: {error!r:.500}"
            assert any(name in str(error) for name in names), f"names no file: {error!r:.500}"
            assert len(str(error)) < 2000, f"a message of {len(str(error))} characters"
            self.counts["refused"] += 1
            return None
        self.counts["accepted"] += 1
        return result

    def row(self, what: str = "files", names: str = "the file") -> str:
        return f"{self.counts['cases']:,} {what}: {self.counts['accepted']:,} read as a plain reader reads them, {self.counts['refused']:,} refused by an error that names {names}"


@pytest.fixture
def outcomes() -> Outcomes:
    return Outcomes()


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HYBRID_IR_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HYBRID_IR_DATA", raising=False)
    datasets.disable_progress_bars()


def texts_of(records: list[dict]) -> list:
    "Rows (id, lang, query, passage) as a plain reader makes them."
    rows = []
    for one in records:
        query, passage = ({lang: text for lang, text in one[field].items() if text is not None} for field in ("query", "passage"))
        rows += [(str(one["id"]), lang, query.get(lang), passage.get(lang)) for lang in sorted({*query, *passage})]
    return rows


def rows_of(pairs: ParallelPairs) -> list:
    return list(zip(*(pairs.table[name][:] for name in ("id", "lang", "query", "passage"))))


def dump(content) -> bytes:
    "JSON as other programs write it: half surrogates escaped, or not."
    return json.dumps(content, ensure_ascii=True).encode()


# -------------------------------------------------------------- training pairs


def test_records_with_strange_texts(outcomes, fault_row):
    "Texts that are texts come back unchanged, character by character; the others are refused."

    @settings(max_examples=CASES, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(st.sampled_from(STRANGE) | st.text(st.characters(exclude_categories=[]), max_size=20), min_size=2, max_size=4))
    def run(texts):
        records = [{"id": f"a|{number}", "query": {"en": text}, "passage": {"en": f"p{number} {text}"}, "page": text or None} for number, text in enumerate(texts)]
        pairs = outcomes.check(lambda: ParallelPairs.from_records(records, name="mine"), "record ")
        assert (pairs is None) == any(not text.strip() or any("\ud800" <= c <= "\udfff" for c in text) for text in texts), texts
        if pairs is not None:
            assert rows_of(pairs) == texts_of(records)

    run()
    fault_row(PROMISE, "training records with NUL, half surrogates, marks for right-to-left, a million characters, nothing at all", outcomes.row("sets of records", "the record"))


def test_json_lines_of_pairs(tmp_path, outcomes, fault_row):
    @fuzzed
    def run(seed):
        chance = random.Random(seed)
        records = [record(number, chance.choice(STRANGE)) for number in range(chance.randrange(1, 5))]
        kind = chance.randrange(3)
        if kind == 0:
            records[chance.randrange(len(records))] = replace_one(chance.choice(records), chance, chance.choice(VALUES))
        whole = b"\n".join(dump(one) for one in records) + b"\n"
        whole = damage(whole, chance) if kind == 1 else whole
        path = tmp_path / chance.choice(["mine.jsonl", "mine.jsonl.gz"])
        if path.suffix == ".gz":
            whole = gzip.compress(whole, 1)
            whole = damage(whole, chance) if kind == 2 else whole
        path.write_bytes(whole)
        pairs = outcomes.check(lambda: load_pairs(path), "mine.jsonl")
        if pairs is not None:
            plain = gzip.decompress(whole) if path.suffix == ".gz" else whole
            assert rows_of(pairs) == texts_of([json.loads(line.decode("utf-8-sig")) for line in plain.split(b"\n") if line.strip()])

    run()
    fault_row(PROMISE, "JSON lines of training pairs, plain and gzipped, with damaged bytes or values of another kind", outcomes.row())


def plain_dataset(files: dict[str, bytes]) -> list[dict]:
    "The records of a folder of datasets, read by Arrow and by the JSON of Python alone."
    name = next(name for name in files if name.endswith((".arrow", ".parquet", ".jsonl")))
    if name.endswith(".jsonl"):
        return [json.loads(line, parse_constant=lambda word: None) for line in files[name].split(b"\n") if line.strip()]  # to `datasets`, NaN is nothing
    return (pa.ipc.open_stream(files[name]).read_all() if name.endswith(".arrow") else pa.parquet.read_table(pa.BufferReader(files[name]))).to_pylist()


def test_dataset_folders(tmp_path, outcomes, fault_row, monkeypatch):
    "Folders as `save_to_disk` writes them, as the Hub keeps them, with Parquet, with JSON lines."
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub-cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    good = [record(number) for number in range(3)]
    datasets.Dataset.from_list(good).save_to_disk(str(tmp_path / "saved"))
    saved = {path.name: path.read_bytes() for path in (tmp_path / "saved").iterdir()}
    buffer = io.BytesIO()
    pa.parquet.write_table(pa.Table.from_pylist(good), buffer)
    hub = {
        "README.md": b"---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: data/train-*\n---\n# Mine\n",
        "data/train-00000-of-00001.parquet": buffer.getvalue(),
    }
    counter = iter(range(10**9))

    def run(seed):
        chance = random.Random(seed)
        folder = tmp_path / f"mine{next(counter)}"
        kind = chance.choice(["saved", "parquet", "hub", "json"])
        if kind == "json":
            changed = [replace_one(one, chance, chance.choice(VALUES)) if chance.random() < 0.5 else one for one in good]
            files = {"train.jsonl": b"\n".join(dump(one) for one in changed) + b"\n"}
        else:
            files = dict({"saved": saved, "parquet": {"train.parquet": buffer.getvalue()}, "hub": hub}[kind])
            name = chance.choice(list(files))
            files[name] = damage(files[name], chance) if chance.random() < 0.9 else files[name]
        for name, content in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        pairs = outcomes.check(lambda: load_pairs(f"hf:{folder}" if kind == "hub" else folder), folder.name)
        if pairs is not None:
            assert rows_of(pairs) == texts_of(plain_dataset(files)), (seed, kind)

    for seed in range(max(10, CASES // 4)):
        run(seed)
    fault_row(PROMISE, "datasets as `save_to_disk` writes them, as the Hub keeps them (a card and Parquet), Parquet, JSON lines, with damaged bytes or values of another kind", outcomes.row("folders", "the folder"))


def test_rows_of_datasets(outcomes, fault_row):
    "Rows {id, language, query, passage}, as they lie on the Hub, in any order."

    @fuzzed
    def run(seed):
        chance = random.Random(seed)
        rows = [{"id": f"page|{n}", "language": lang, "query": f"question {n} {lang}", "passage": f"passage {n} {lang}"} for n in range(4) for lang in ("ar", "en")]
        chance.shuffle(rows)
        for _ in range(chance.choice([0, 1, 1, 2])):
            chance.choice(rows)[chance.choice(list(rows[0]))] = chance.choice([None, *(text for text in STRANGE if not any("\ud800" <= c <= "\udfff" for c in text))])
        pairs = outcomes.check(lambda: dataset_to_pairs(datasets.Dataset.from_list(rows)), "record", "row ", "language", "id ")
        if pairs is not None:
            kept = sorted((row["id"], row["language"], row["query"], row["passage"]) for row in rows if row["query"] is not None or row["passage"] is not None)
            assert sorted(rows_of(pairs)) == kept, (seed, rows)

    run()
    fault_row(PROMISE, "rows of a dataset (id, language, query, passage) with strange texts, nothing, ids or languages that repeat", outcomes.row("datasets", "the row, the record, the id or the language"))


MMARCO = {
    "triples.train.ids.small.tsv": "1\t11\t12\n2\t12\t13\n1\t11\t13\n3\t13\t11\n",
    "google/collections/english_collection.tsv": "11\tCold nights.\n12\tA fungus.\n13\tIn flight.\n",
    "google/queries/train/english_queries.train.tsv": "1\twhy is it red\n2\twhat is a lichen\n3\twhere do swifts sleep\n",
}


def test_mmarco_tables(tmp_path, outcomes, fault_row):
    @fuzzed
    def run(seed):
        chance = random.Random(seed)
        target = chance.choice(list(MMARCO))
        files = {name: text.encode() for name, text in MMARCO.items()}
        if chance.random() < 0.7:
            files[target] = damage(files[target], chance)
        else:
            lines = [line.split("\t") for line in MMARCO[target].splitlines()]
            line = chance.choice(lines)
            line[chance.randrange(len(line))] = chance.choice(["-1", "", "2147483648", "0", "1.5", "١", " 11 ", "x\0y", "9" * 40, "\ufeff1", "11"])
            files[target] = "".join("\t".join(line) + "\n" for line in lines).encode()
        for name, content in files.items():
            path = tmp_path / "mmarco" / "data" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        pairs = outcomes.check(lambda: load_pairs("mmarco", "en", path=tmp_path), *(Path(name).name for name in MMARCO))
        if pairs is not None:
            tables = [[line.split("\t") for line in content.decode("utf-8-sig").removesuffix("\n").replace("\r\n", "\n").split("\n")] for content in files.values()]
            (triples, passages, queries) = tables[0], *({int(number): text for number, text in table} for table in tables[1:])
            expected = {(f"{int(q)}-{int(p)}", "en", queries[int(q)], passages[int(p)]) for q, p, _ in triples}
            assert set(rows_of(pairs)) == expected, files[target]

    run()
    fault_row(PROMISE, "mMARCO's tables with damaged lines, numbers that are none, ids that do not exist", outcomes.row())


# -------------------------------------------------------------- benchmarks


def test_question_files(tmp_path, outcomes, fault_row):
    "The layout of XQuAD-R and MLQA-R."
    source = json.loads(sample_file("en", "heldout").read_bytes())
    source["data"] = source["data"][:2]

    @fuzzed
    def run(seed):
        chance = random.Random(seed)
        content, kind = source, chance.randrange(3)
        if kind == 0:
            content = replace_one(content, chance, chance.choice(VALUES))
        path = tmp_path / "en.json"
        path.write_bytes(damage(dump(content), chance) if kind == 1 else dump(content) if kind == 0 else damage(json.dumps(source, ensure_ascii=False).encode(), chance))
        found = outcomes.check(lambda: list(read_paragraphs(path)), "en.json")
        if found is not None:
            plain = json.loads(path.read_bytes())
            paragraphs = [paragraph for article in plain["data"] for paragraph in article["paragraphs"]]
            assert [one["sentences"] for one in found] == [[paragraph["context"][a:b] for a, b in paragraph["sentence_breaks"]] for paragraph in paragraphs]
            assert all(text.strip() for one in found for _, text, _ in one["questions"]) and all(sentence for one in found for sentence in one["sentences"])

    run()
    fault_row(PROMISE, "question files of XQuAD-R and MLQA-R with damaged bytes, sentences outside their paragraph, values of another kind", outcomes.row())


BEIR = {"corpus.jsonl": [{"_id": f"d{n}", "title": "T", "text": f"text {n}"} for n in range(3)], "queries.jsonl": [{"_id": f"q{n}", "text": f"question {n}"} for n in range(3)]}


def test_beir_folders(tmp_path, outcomes, fault_row):
    @fuzzed
    def run(seed):
        chance = random.Random(seed)
        files = {name: b"\n".join(dump(one) for one in lines) + b"\n" for name, lines in BEIR.items()} | {"qrels/test.tsv": b"query-id\tcorpus-id\tscore\nq0\td0\t1\nq1\td1\t2\nq2\td2\t1\nq2\td0\t0\n"}
        target, kind = chance.choice(list(files)), chance.randrange(3)
        if kind == 0 or target.endswith("tsv"):
            files[target] = damage(files[target], chance)
        elif kind == 1:
            files[target] = b"\n".join(dump(replace_one(one, chance, chance.choice(VALUES))) for one in BEIR[target])
        else:
            files[target] = b"\n".join(dump(one | {"text": chance.choice(STRANGE)}) for one in BEIR[target])
        for name, content in files.items():
            (tmp_path / "beir" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "beir" / name).write_bytes(content)
        found = outcomes.check(lambda: load_benchmark(tmp_path / "beir", languages="en"), "corpus.jsonl", "queries.jsonl", "test.tsv", "beir")
        if found is not None:
            assert len(found.fingerprint) == 32
            for name, frame in (("corpus.jsonl", found.passages), ("queries.jsonl", found.queries)):
                plain = [json.loads(line.decode("utf-8-sig")) for line in files[name].split(b"\n") if line.strip()]
                texts = {str(one["_id"]): f"{one.get('title') or ''} {one['text']}".strip() for one in plain}
                assert all(texts[key] == text for key, text in zip(frame["id"], frame["text"], strict=True)), files[target]
                assert name == "queries.jsonl" or len(texts) == len(frame) == len(plain)
            lines = [line.removesuffix("\r").split("\t") for line in files["qrels/test.tsv"].decode("utf-8-sig").split("\n") if line.removesuffix("\r")]
            expected = {(query, passage): int(grade) for query, passage, grade in ((parts[0], *parts[-2:]) for parts in lines if parts[-1] not in ("score", "relevance", "label", "grade"))}
            linked = zip(found.queries["id"].iloc[found.judgement_queries], found.passages["id"].iloc[found.judgement_passages], found.judgement_grades)
            assert {(query, passage): grade for query, passage, grade in linked} == {key: grade for key, grade in expected.items() if grade > 0}, files["qrels/test.tsv"]

    run()
    fault_row(PROMISE, "BEIR folders with damaged bytes, strange texts, values of another kind", outcomes.row())


def test_judgements_and_topics(tmp_path, outcomes, fault_row):
    "The tables of BEIR, TREC and MIRACL."
    tables = {"qrels.tsv": ("q1\td1\t1\nq2\td2\t0\nq3\td3\t3\n", read_judgements), "trec.tsv": ("q1\tQ0\td1\t1\nq2\tQ0\td2\t0\n", read_judgements), "topics.tsv": ("1\twhy\n2\tسؤال\n", lambda path: read_topics(path, "ar"))}

    @fuzzed
    def run(seed):
        chance = random.Random(seed)
        name = chance.choice(list(tables))
        text, read = tables[name]
        if chance.random() < 0.6:
            content = damage(text.encode(), chance)
        else:
            lines = [line.split("\t") for line in text.splitlines()]
            line = chance.choice(lines)
            line[chance.randrange(len(line))] = chance.choice(["", " ", "1e3", "1_000", "٣", "9" * 30, "-1", "x\0y", "\u2028", "\x85", "a\tb", "0x1", "\ufeff"])
            content = "".join("\t".join(line) + "\n" for line in lines).encode()
        (tmp_path / name).write_bytes(content)
        frame = outcomes.check(lambda: read(tmp_path / name), name)
        if frame is not None:
            lines = [line.removesuffix("\r") for line in content.decode("utf-8-sig").split("\n")]
            lines = [line for line in (lines if name == "topics.tsv" else [line for line in lines if line]) if line.strip()]
            assert len(frame) == len(lines), content
            cells = [line.split("\t") for line in lines]
            if name == "topics.tsv":
                assert list(zip(frame["id"], frame["text"])) == [tuple(part.strip() for part in line.split("\t", 1)) for line in lines], content
            else:
                assert list(zip(frame["query_id"], frame["passage_id"], frame["grade"])) == [(parts[0], parts[-2], int(parts[-1])) for parts in cells], content

    run()
    fault_row(PROMISE, "tables of judgements and topics (BEIR, TREC, MIRACL) with damaged lines and grades that are no numbers", outcomes.row())


def test_gzipped_corpora(tmp_path, outcomes, fault_row):
    "The corpora of MIRACL."
    whole = gzip.compress(b"\n".join(dump({"docid": f"1#{n}", "title": "T", "text": f"text {n} " * 20}) for n in range(20)) + b"\n", 1)

    @fuzzed
    def run(seed):
        chance = random.Random(seed)
        path = tmp_path / "docs-0.jsonl.gz"
        path.write_bytes(damage(whole, chance))
        frame = outcomes.check(lambda: read_beir_texts(path, "yo", "docid"), "docs-0.jsonl.gz")
        if frame is not None and len(frame):
            plain = [json.loads(line.decode("utf-8-sig")) for line in gzip.decompress(path.read_bytes()).split(b"\n") if line.strip()]
            assert list(zip(frame["id"], frame["text"])) == [(str(one["docid"]), f"{one.get('title') or ''} {one['text']}".strip()) for one in plain]

    run()
    fault_row(PROMISE, "gzipped corpora of MIRACL with damaged bytes", outcomes.row())


def test_captions(tmp_path, outcomes, fault_row):
    "The file of XM3600: plain, and as the official zip."
    images = [{"image/key": f"k{n}", "en": {"caption": [f"a dog {n}", f"the dog {n}"]}, "de": {"caption": [f"ein Hund {n}", f"der Hund {n}"]}} for n in range(3)]

    @fuzzed
    def run(seed):
        chance = random.Random(seed)
        kind = chance.randrange(4)
        changed = [replace_one(one, chance, chance.choice(VALUES + STRANGE)) if kind == 0 and chance.random() < 0.5 else one for one in images]
        content = b"\n".join(dump(one) for one in changed) + b"\n"
        content = damage(content, chance) if kind == 1 else content
        path = tmp_path / "captions.jsonl"
        if kind >= 2:
            path, buffer = tmp_path / "captions.zip", io.BytesIO()
            with zipfile.ZipFile(buffer, "w", chance.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2])) as archive:
                archive.writestr(chance.choice(["captions.jsonl", "../../captions.jsonl", "/etc/captions.jsonl", "other.txt"]), content)
            content = damage(buffer.getvalue(), chance) if kind == 3 else buffer.getvalue()
        path.write_bytes(content)
        found = outcomes.check(lambda: read_captions(path), path.name)
        if found is not None:
            if path.suffix == ".zip":
                with zipfile.ZipFile(path) as archive:
                    content = archive.read(next(name for name in archive.namelist() if Path(name).name == "captions.jsonl"))
            plain = [json.loads(line.decode("utf-8-sig")) for line in content.split(b"\n") if line.strip()]
            captions = lambda one: {lang: [text for text in one[lang].get("caption") or [] if text.strip()] for lang in one if not lang.startswith("image/")}
            assert found == {one["image/key"]: captions(one) for one in plain} and list(found) == [one["image/key"] for one in plain]
        assert {entry.name for entry in tmp_path.iterdir()} <= {"captions.jsonl", "captions.zip", "cache"}, "an archive is never unpacked"

    run()
    fault_row(PROMISE, "captions of XM3600, plain and zipped, with damaged bytes, values of another kind, members outside the archive", outcomes.row())


# -------------------------------------------------------------- what this package wrote


def test_saved_scores(tmp_path, outcomes, fault_row):
    "Scores with a seal, and without one, as earlier versions wrote them."
    whole = evaluate(lambda texts, kind: np.random.default_rng(len(texts)).normal(size=(len(texts), 8)), load_benchmark("sample", "de,en".split(",")), progress=False)
    folder = whole.save(tmp_path / "scores")
    names = ("metrics.json", "per_query.parquet")
    sealed = {name: (folder / name).read_bytes() for name in names}
    plain = {name: value for name, value in json.loads(sealed["metrics.json"]).items() if name not in ("files", "sha256")}
    old, expected, kinds = sealed | {"metrics.json": json.dumps(plain, indent=1).encode()}, Scores.load(folder), Counter()

    @fuzzed
    def run(seed):
        chance = random.Random(seed)
        is_sealed, name = chance.random() < 0.5, chance.choice(names)
        files = dict(sealed if is_sealed else old)
        by_value = name == "metrics.json" and chance.random() < 0.5
        files[name] = dump(replace_one(json.loads(files[name]), chance, chance.choice(VALUES))) if by_value else damage(files[name], chance)
        for part in names:
            (folder / part).write_bytes(files[part])
        found = outcomes.check(lambda: Scores.load(folder), *names)
        kinds[is_sealed, found is not None] += 1
        if found is not None and is_sealed:
            assert found.to_dict() == expected.to_dict() and found.by_query.equals(expected.by_query), seed
        elif found is not None:
            content = json.loads(files["metrics.json"])
            assert {key: value for key, value in content.items() if key not in ("format", "averages", "cells")} == found.info or by_value, seed
            table = pa.parquet.read_table(pa.BufferReader(files["per_query.parquet"])).to_pandas()
            assert sorted(found.by_query["query_id"]) == sorted(table["query_id"]) and sorted(found.by_query["map"].fillna(-1)) == sorted(table["map"].fillna(-1)), seed

    run()
    fault_row(PROMISE, "saved scores (`metrics.json`, `per_query.parquet`) with damaged bytes or values of another kind; half of them without a seal, as earlier versions wrote them",
              f"with a seal: {kinds[True, False]:,} refused by an error that names the file, {kinds[True, True]:,} read with equal numbers (the damage was in a space or was none); without: {kinds[False, False]:,} refused, {kinds[False, True]:,} read as they are in the file")  # fmt: skip


def test_encoder_folders(tmp_path, fault_row):
    "Weights, tokenizer and configurations of an encoder; a folder has checksums if a run wrote it."
    whole, counts = tmp_path / "whole", Counter()
    load_encoder(str(save_tiny(tmp_path / "base")), device="cpu", precision="fp32").save(whole)
    write_checksums(whole)
    cases = max(20, CASES // 4)
    for seed in range(cases):
        chance = random.Random(seed)
        place = shutil.copytree(whole, tmp_path / f"encoder{seed}")
        path = chance.choice([path for path in sorted(place.iterdir()) if path.name != "checksums.json"])
        kept = path.read_bytes()
        path.unlink() if chance.random() < 0.15 else path.write_bytes(damage(kept, chance))
        is_same = path.exists() and path.read_bytes() == kept
        found = find_damage(place)
        assert found.startswith(path.name) if not is_same else not found, (seed, found)
        try:
            encoder = load_encoder(str(place), device="cpu", precision="fp32")
        except Exception as error:  # of the readers of transformers, tokenizers and safetensors
            counts["refused"] += 1
            counts["named"] += place.name in str(error)
        else:
            counts["loaded"] += 1
            weights, written = encoder.backbone.state_dict(), load_file(place / "model.safetensors")
            assert all(torch.equal(weights[name], value) for name, value in written.items() if name in weights) and set(weights) <= set(written), seed
            assert np.isfinite(encoder.encode(["one text"], "query", progress=False)).all() or path.name == "model.safetensors", seed
        shutil.rmtree(place)
    fault_row(PROMISE, "folders of an encoder with a file gone or with damaged bytes",
              f"{cases:,} folders: the checksums that a run writes name the file in every one. `load_encoder`, which does not look at them: {counts['refused']:,} refused, {counts['named']:,} of these with the name of the folder; "
              f"{counts['loaded']:,} loaded, with the weights that are in the file")  # fmt: skip


def test_deep_and_long_lines(tmp_path, fault_row):
    "100,000 brackets, a number of 5,000 digits, a line of 20 MB."
    for content, message in ((DEEP.encode(), "not valid JSON"), (b'{"id": ' + b"9" * 5000 + b"}", "not valid JSON")):
        for name, read in (("a.jsonl", lambda path: list(read_json_lines(path))), ("a.json", lambda path: list(read_paragraphs(path))), ("captions.jsonl", read_captions)):
            (tmp_path / name).write_bytes(content)
            with pytest.raises(ValueError, match=f"{name}.*{message}"):
                read(tmp_path / name)
    long = "x" * 20_000_000
    (tmp_path / "long.jsonl").write_bytes(dump(record(1) | {"query": {"en": long}}))
    assert load_pairs(tmp_path / "long.jsonl").table["query"][1] == long
    fault_row(PROMISE, "100,000 nested brackets; a number of 5,000 digits; a line of 20 MB", "the first two are refused with file and line; the long line is read whole")
