"Corpora on disk: what a stop, damage, another encoder and several processes do to the shards; FAISS indexes against exact search; questions in, texts out."

import errno
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset, DatasetDict
from tiny import save_tiny

from hybrid_ir import index
from hybrid_ir.benchmarks import load_benchmark
from hybrid_ir.encoders import load_encoder
from hybrid_ir.index import DamagedShard, FaissIndex, Searcher, Vectors, build_index, encode_corpus, index_folder, recall_at
from hybrid_ir.retrieval import top_passages
from hybrid_ir.sources import FolderInUse

SIZE = 40  # rows per shard


@pytest.fixture(scope="module")
def passages():
    return load_benchmark("sample", languages=["de", "en"]).passages[["id", "lang", "text"]]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def encoder(tiny):
    return load_encoder(str(tiny), device="cpu")


@pytest.fixture(scope="module")
def encoded(encoder, passages, tmp_path_factory):
    return encode_corpus(encoder, passages, tmp_path_factory.mktemp("vectors") / "whole", SIZE, progress=False)


@pytest.fixture
def copy(encoded, tmp_path):
    return Path(shutil.copytree(encoded.folder, tmp_path / "copy"))


def contents(folder: Path) -> dict:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def generated(folder: Path, rows: int = 3000, dim: int = 32) -> Vectors:
    "Random vectors in shards of 700."
    random = np.random.default_rng(0)
    index.claim_vectors(folder, {"weights": "none", "dim": dim, "dtype": "float32", "shard_size": 700, "kind": "passage"}, {"encoder": {"name": "none"}})
    for number, start in enumerate(range(0, rows, 700)):
        n = min(700, rows - start)
        values = random.standard_normal((n, dim), dtype=np.float32)
        index.write_shard(folder, number, values / np.linalg.norm(values, axis=1, keepdims=True), {"id": [str(start + row) for row in range(n)], "lang": [""] * n, "text": ["x"] * n})
    index.finish_vectors(folder)
    return Vectors(folder)


@pytest.fixture(scope="module")
def random_vectors(tmp_path_factory):
    return generated(tmp_path_factory.mktemp("random") / "vectors")


def test_shards_hold_the_vectors_ids_and_texts(encoded, encoder, passages):
    assert len(encoded) == len(passages) and encoded.manifest["shards"] == -(-len(passages) // SIZE)
    kept = encoded.take(np.arange(len(passages)))
    assert np.abs(kept - encoder.encode(list(passages["text"]), "passage")).max() < 1e-3
    assert encoded.passages.to_pandas().equals(passages.reset_index(drop=True)) or encoded.passages["text"][:] == passages["text"].tolist()
    assert isinstance(encoded.shard(0), np.memmap) and encoded.shard(0).dtype == np.float16


def test_list_dataset_and_generator_give_the_same_files(encoded, encoder, passages, tmp_path):
    rows = passages.to_dict("records")
    for name, corpus in {"list": rows, "dataset": Dataset.from_list(rows), "generator": (row for row in rows)}.items():
        encode_corpus(encoder, corpus, tmp_path / name, SIZE, progress=False)
        assert contents(tmp_path / name) == contents(encoded.folder), name


def encode_and_die(tiny: str, passages, folder: Path, shards: int):
    "Encode; the process kills itself while it writes the vectors of a shard."
    write = np.save

    def save(file, array):
        if (folder / f"{shards - 1:05d}.json").exists():
            file.write(b"half"), file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        write(file, array)

    np.save = save
    encode_corpus(load_encoder(tiny, device="cpu"), passages, folder, SIZE, progress=False)


def test_killed_while_writing_and_continued(encoded, encoder, tiny, passages, tmp_path):
    folder = tmp_path / "killed"
    process = multiprocessing.get_context("spawn").Process(target=encode_and_die, args=(str(tiny), passages, folder, 2))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL and list(folder.glob("00002.npy*.partial")) and not (folder / "00002.npy").exists()
    with pytest.raises(FileNotFoundError, match="not complete .2 shards so far.*goes on"):
        Vectors(folder)
    first = (folder / "00001.npy").stat().st_mtime_ns
    with pytest.raises(ValueError, match=f"this corpus {SIZE}: another corpus"):
        encode_corpus(encoder, passages[:SIZE], folder, SIZE, progress=False)
    encode_corpus(encoder, passages, folder, SIZE, progress=False)
    assert contents(folder) == contents(encoded.folder) and (folder / "00001.npy").stat().st_mtime_ns == first


def test_two_processes_give_the_files_of_one(encoded, tiny, passages, tmp_path):
    passages.to_parquet(tmp_path / "passages.parquet")
    script = tmp_path / "encode.py"
    script.write_text(
        "import pandas as pd\nfrom accelerate import PartialState\nfrom hybrid_ir.encoders import load_encoder\nfrom hybrid_ir.index import encode_corpus\n"
        f"encode_corpus(load_encoder({str(tiny)!r}, device='cpu'), pd.read_parquet('passages.parquet'), 'shared', {SIZE})\n"
        "print(f'processes: {PartialState().num_processes}\\n', end='')\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]  # `accelerate launch --cpu` starts one process only
    paths = os.pathsep.join([str(Path(index.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(command, check=False, cwd=tmp_path, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("processes: 2") == 2, done.stdout
    assert contents(tmp_path / "shared") == contents(encoded.folder)


def test_damage_is_named_and_mended(copy, encoded, encoder, passages, capsys):
    with (copy / "00001.npy").open("r+b") as file:
        file.truncate(300)
    with pytest.raises(DamagedShard, match="00001.npy is 300 bytes"):
        Vectors(copy)
    (copy / "00001.npy").write_bytes(bytes(len(contents(encoded.folder)["00001.npy"])))  # the right size, other bytes
    with pytest.raises(DamagedShard, match="00001.npy is not what was written"):
        Vectors(copy).check(checksums=True)
    with pytest.raises(DamagedShard, match="00001.npy"):
        build_index(Vectors(copy), "Flat", progress=False)
    (copy / "00002.arrow").unlink()
    with pytest.raises(DamagedShard, match="00002.arrow is missing"):
        Vectors(copy)
    shutil.rmtree(copy / "indexes")
    encode_corpus(encoder, passages, copy, SIZE, progress=False)
    assert contents(copy) == contents(encoded.folder)
    assert "00001.npy" in capsys.readouterr().out


def test_other_texts_and_other_encoders_are_refused(copy, encoded, encoder, tiny, passages):
    changed = passages["text"].tolist()
    changed[SIZE + 3] += " More."
    for corpus, reason in ((passages.assign(text=changed), "shard 1 has other texts"), (passages[:50], f"rows: {len(passages)} there, 50 now"), (passages.assign(lang="en"), "other texts")):
        with pytest.raises(ValueError, match=reason):
            encode_corpus(encoder, corpus, copy, SIZE, progress=False)
    longer = iter(passages["text"].tolist()[: 2 * SIZE] + ["one more"])
    short = copy.parent / "short"
    encode_corpus(encoder, passages["text"].tolist()[: 2 * SIZE], short, SIZE, progress=False)
    with pytest.raises(ValueError, match="this corpus has more"):
        encode_corpus(encoder, longer, short, SIZE, progress=False)
    with pytest.raises(ValueError, match="shard_size: 40 there, 41 now"):
        encode_corpus(encoder, passages, copy, SIZE + 1, progress=False)
    with pytest.raises(ValueError, match="length: 256 there, 32 now"):
        encode_corpus(load_encoder(str(tiny), device="cpu", passage_length=32), passages, copy, SIZE, progress=False)
    other = load_encoder(str(tiny), device="cpu")
    with torch.no_grad():
        next(other.parameters()).add_(0.1)
    for use in (lambda: encode_corpus(other, passages, copy, SIZE, progress=False), lambda: Searcher(copy, other)):
        with pytest.raises(ValueError, match="weights"):
            use()
    with pytest.raises(ValueError, match=r"give the one that made the vectors: Searcher\(folder, encoder\)"):
        Searcher(copy, other)
    assert contents(copy) == contents(encoded.folder)


def test_wrong_arguments_and_rows_are_named(encoder, tmp_path):
    for arguments, message in (({"dtype": "int8"}, "float16, float32"), ({"kind": "title"}, "query, passage"), ({"shard_size": 0}, "at least 1")):
        with pytest.raises(ValueError, match=message):
            encode_corpus(encoder, ["a text"], tmp_path / "none", **arguments)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="shard 1.*passage 0 is empty"):
        encode_corpus(encoder, ["one", "two", " "], tmp_path / "empty", 2, progress=False)
    with pytest.raises(ValueError, match="no column 'text'"):
        encode_corpus(encoder, Dataset.from_dict({"body": ["one"]}), tmp_path / "column", progress=False)
    for corpus in (DatasetDict(train=Dataset.from_dict({"text": ["one"]})), "one"):
        with pytest.raises(TypeError, match="one split"):
            encode_corpus(encoder, corpus, tmp_path / "split", progress=False)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("do not touch")
    with pytest.raises(ValueError, match="not empty"):
        encode_corpus(encoder, ["one"], tmp_path / "full", progress=False)
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["thesis.tex"]


def test_a_shorter_generator_is_another_corpus(encoder, passages, tmp_path):
    texts = passages["text"].tolist()[:12]

    def interrupted():
        yield from texts[:9]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encode_corpus(encoder, interrupted(), tmp_path / "begun", 3, progress=False)
    with pytest.raises(ValueError, match="has 9 rows, and this corpus 6: another corpus was begun"):
        encode_corpus(encoder, iter(texts[:6]), tmp_path / "begun", 3, progress=False)
    assert len(encode_corpus(encoder, iter(texts), tmp_path / "begun", 3, progress=False)) == 12
    with pytest.raises(ValueError, match="has 12 rows, and this corpus 3"):
        encode_corpus(encoder, iter(texts[:3]), tmp_path / "begun", 3, progress=False)


@pytest.mark.parametrize("corpus, message", [
    ([{"id": "a", "text": "x"}, {"id": None, "text": "y"}], "row 1 has no id: it is None"), ([{"id": 1, "lang": float("nan"), "text": "x"}], "row 0 has no lang: it is nan"),
    (pd.DataFrame({"id": [1, None, 3], "text": ["x", "y", "z"]}), "row 1 has no id"), ([{"text": "x"}, {"id": "b", "text": "y"}], "row 1 has id, text, and the first row text"),
    ([{"id": "a", "text": "x"}, "y"], "row 1 has text, and the first row id, text"), ([{"id": "a"}], "row 0 has no 'text'; it has id"),
])  # fmt: skip
def test_rows_that_would_lose_their_names_are_refused(encoder, tmp_path, corpus, message):
    for size in (1, 3):
        with pytest.raises(ValueError, match=message):
            encode_corpus(encoder, corpus, tmp_path / str(size), size, progress=False)


def test_a_corpus_without_texts_leaves_nothing_behind(encoder, tmp_path):
    for corpus, error in (([], ValueError), (iter(()), ValueError), (pd.DataFrame({"text": []}), ValueError), (pd.DataFrame({"body": ["x"]}), ValueError), ([5], TypeError)):
        with pytest.raises(error, match="empty|no column 'text'; it has body|row 0 must be a string"):
            encode_corpus(encoder, corpus, tmp_path / "none", progress=False)
    assert not list(tmp_path.iterdir())


def test_one_call_at_a_time_writes_into_a_folder(encoder, tmp_path):
    def texts():
        yield "one"
        with pytest.raises(FolderInUse, match=f"vectors is in use by process {os.getpid()}"):
            encode_corpus(encoder, ["one", "two"], tmp_path / "vectors", 1, progress=False)
        yield "two"

    assert len(encode_corpus(encoder, texts(), tmp_path / "vectors", 1, progress=False)) == 2
    assert len(encode_corpus(encoder, ["one", "two"], tmp_path / "vectors", 1, progress=False)) == 2


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit of file sizes")
def test_a_full_disk_is_named(encoder, tmp_path):
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        with pytest.raises(OSError, match="vectors cannot be written .*; make room") as raised:
            encode_corpus(encoder, [f"text {number}" for number in range(200)], tmp_path / "vectors", progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert raised.value.errno == errno.EFBIG


def test_exact_search_is_the_search_in_memory(random_vectors):
    everything = np.concatenate([block for _, block in random_vectors.blocks(rows=123)])
    queries = everything[::97] + 0.1
    rows, scores = random_vectors.search(queries, k=25, memory=1)
    expected_rows, expected_scores = top_passages(queries, everything, k=25, device="cpu")
    assert np.array_equal(rows, expected_rows) and np.allclose(scores, expected_scores, atol=1e-6)
    assert random_vectors.search(queries, k=10_000)[0].shape == (len(queries), 3000)
    with pytest.raises(ValueError, match="31 dimensions, the vectors 32"):
        random_vectors.search(queries[:, :31])
    with pytest.raises(ValueError, match="k must be a whole number of at least 1, not 0"):
        random_vectors.search(queries, k=0)
    with pytest.raises(ValueError, match="not True"):
        random_vectors.search(queries, k=True)
    for row in (-1, 3000):
        with pytest.raises(IndexError, match=f"row {row} is not there: the rows are 0 to 2,999"):
            random_vectors.take([5, row])


def test_equal_scores_keep_the_order_of_rows(tmp_path):
    "Integer vectors: many ties, within a shard and across; on the path of a processor and on that of a GPU."
    random = np.random.default_rng(0)
    values = random.integers(-1, 2, size=(300, 3)).astype(np.float32)
    index.claim_vectors(tmp_path / "ties", {"weights": "none", "dim": 3, "dtype": "float32", "shard_size": 70, "kind": "passage"}, {"encoder": {"name": "none"}})
    for number, start in enumerate(range(0, 300, 70)):
        part = values[start : start + 70]
        index.write_shard(tmp_path / "ties", number, part, {"id": ["x"] * len(part), "lang": [""] * len(part), "text": ["x"] * len(part)})
    index.finish_vectors(tmp_path / "ties")
    scores = values[:20] @ values.T
    expected = np.argsort(-scores, axis=1, kind="stable")[:, :50]
    assert np.array_equal(Vectors(tmp_path / "ties").search(values[:20], k=50)[0], expected)
    assert np.array_equal(index.best_of_keys(torch.from_numpy(scores), 50)[0], expected)


def test_wrong_factories_are_refused_at_once(random_vectors):
    started = sorted(random_vectors.folder.rglob("*"))
    for factory in ("IVF", "nonsense", "PQ7", "IVF64,PQ8x4fs", "Flat,IDMap", "IVF64,PQ8,RFlat", "NSG8", 5):
        with pytest.raises(ValueError, match="valid ones are, for example: Flat"):
            build_index(random_vectors, factory)
    with pytest.raises(ValueError, match="at least 4,096 vectors, not 3,000"):
        build_index(random_vectors, "IVF4096,Flat")
    with pytest.raises(ValueError, match="at least 256 vectors, not 200"):
        build_index(random_vectors, "PQ8", training_rows=200)
    assert sorted(random_vectors.folder.rglob("*")) == started


@pytest.fixture(scope="module")
def questions(random_vectors):
    queries = random_vectors.sample(60, seed=1) + np.random.default_rng(2).normal(0, 0.1, (60, 32)).astype(np.float32)
    return queries, random_vectors.search(queries, 10)[0]


def test_flat_and_all_lists_are_exact(random_vectors, questions):
    queries, exact = questions
    assert recall_at(build_index(random_vectors, "Flat", progress=False).search(queries, 10)[0], exact, 10) == 1
    lists = build_index(random_vectors, "IVF16,Flat", memory=1, progress=False)  # a part for each shard
    assert np.array_equal(lists.search(queries, 10, nprobe=16)[0], exact)
    assert recall_at(lists.search(queries, 10, nprobe=1)[0], exact, 10) < 1
    assert sorted(path.name for path in lists.folder.iterdir()) == ["index.faiss", "lists.ivfdata", "manifest.json"]


@pytest.mark.parametrize("factory, parameters", [("OPQ8,IVF16,PQ8", {"nprobe": 16}), ("IVF16,SQ8", {"nprobe": 16}), ("PQ8", {}), ("HNSW32", {"efSearch": 200})])
def test_rescoring_gives_exact_scores(random_vectors, questions, factory, parameters):
    queries, exact = questions
    built = build_index(random_vectors, factory, progress=False)
    plain, rescored = (recall_at(built.search(queries, 10, rescore=rescore, **parameters)[0], exact, 10) for rescore in (0, 1000))
    assert rescored >= plain and rescored > 0.95
    rows, scores = built.search(queries, 10, rescore=1000, **parameters)
    assert np.allclose(scores, np.einsum("qd,qkd->qk", queries, random_vectors.take(rows.ravel()).reshape(60, 10, 32)), atol=1e-5)


def test_parameters_of_another_kind_of_index_are_refused(random_vectors, questions):
    flat = build_index(random_vectors, "Flat", progress=False)
    with pytest.raises(ValueError, match="Flat has no search parameter nprobe"):
        flat.search(questions[0], nprobe=4)
    with pytest.raises(ValueError, match="nprobe, efSearch"):
        flat.search(questions[0], probes=4)


@pytest.mark.parametrize("factory, name, values", [("IVF16,Flat", "nprobe", (0, 2.7, True)), ("HNSW32", "efSearch", (0, -5, "x")), ("HNSW32", "rescore", (-1, 2.5))])
def test_wrong_numbers_are_refused_and_change_nothing(random_vectors, questions, factory, name, values):
    found = build_index(random_vectors, factory, progress=False)
    expected = found.search(questions[0], 10)[0]
    for value in values:
        with pytest.raises(ValueError, match=f"{name} must be a whole number of at least {int(name != 'rescore')}, not {value!r}"):
            found.search(questions[0], 10, **{name: value})
    assert np.array_equal(found.search(questions[0], 10)[0], expected)


def test_killed_build_goes_on_and_finds_the_same(tmp_path, questions):
    vectors = generated(tmp_path / "vectors")
    expected = build_index(vectors, "IVF16,PQ8", memory=1, progress=False).search(questions[0], 10, nprobe=4)
    folder = index_folder(vectors, "IVF16,PQ8")
    shutil.rmtree(folder)
    done = []

    def stop_after_two(*arguments):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(arguments)
        return add(*arguments)

    add, index.add_shards = index.add_shards, stop_after_two
    try:
        with pytest.raises(KeyboardInterrupt):
            build_index(vectors, "IVF16,PQ8", memory=1, progress=False)
    finally:
        index.add_shards = add
    with pytest.raises(FileNotFoundError, match="call build_index"):
        FaissIndex(folder)
    kept = {path.name: path.stat().st_mtime_ns for path in folder.glob("part-*")}
    trained = (folder / "trained.faiss").read_bytes()
    assert len(kept) == 2 and trained
    parts = index.build_parts(folder, vectors, 1, False)
    assert {name: (folder / name).stat().st_mtime_ns for name in kept} == kept and len(parts) == 5
    found = build_index(vectors, "IVF16,PQ8", memory=1, progress=False).search(questions[0], 10, nprobe=4)
    assert np.array_equal(found[0], expected[0]) and np.array_equal(found[1], expected[1])


def test_index_is_mapped_and_may_move(tmp_path, questions):
    vectors, files = generated(tmp_path / "here"), {"IVF16,Flat": "lists.ivfdata", "Flat": "index.faiss", "HNSW8": "index.faiss", "SQ8": "index.faiss"}
    rows = {factory: build_index(vectors, factory, progress=False).search(questions[0], 5)[0] for factory in files}
    (tmp_path / "here").rename(tmp_path / "there")
    for factory, expected in rows.items():
        moved = FaissIndex(index_folder(Vectors(tmp_path / "there"), factory))
        assert np.array_equal(moved.search(questions[0], 5)[0], expected)
        if sys.platform == "linux":
            assert str(moved.folder / files[factory]) in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize("factory, name", [("IVF16,Flat", "lists.ivfdata"), ("HNSW8", "index.faiss")])
def test_a_shortened_index_is_named(tmp_path, factory, name):
    vectors = generated(tmp_path)
    folder = build_index(vectors, factory, progress=False).folder
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({key: value for key, value in manifest.items() if key != "files"}))
    assert len(FaissIndex(folder)) == len(vectors), "an index of an older version"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    os.truncate(folder / name, 999)
    for use in (lambda: FaissIndex(folder), lambda: build_index(vectors, factory, progress=False)):
        with pytest.raises(DamagedShard, match=f"{name} is 999 bytes, {manifest['files'][name]:,} bytes were written; remove .* and call build_index"):
            use()


def test_no_merge_without_room(tmp_path, monkeypatch):
    vectors, used = generated(tmp_path), shutil.disk_usage(tmp_path)
    needed = len(vectors) * (4 * vectors.dim + 8)
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda folder: used._replace(free=needed - 1))
        with pytest.raises(OSError, match=f"lists.ivfdata needs {needed:,} bytes and {needed - 1:,} are free in .*IVF16-Flat"):
            build_index(vectors, "IVF16,Flat", progress=False)
    assert build_index(vectors, "IVF16,Flat", progress=False).manifest["files"]["lists.ivfdata"] == needed


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("factory", ["HNSW32", "Flat"])
def test_mapped_index_needs_no_memory_of_its_own(tmp_path, factory):
    "Vectors and graph stay in the file: opening and searching in a fresh process adds less than a quarter of its bytes."
    found = build_index(generated(tmp_path, 4_000, 256), factory, progress=False)
    script = f"""
import re, numpy as np
from pathlib import Path
from hybrid_ir.index import FaissIndex
own = lambda: 1024 * int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
before = own()
FaissIndex({str(found.folder)!r}).search(np.ones((1, 256), np.float32))
print(own() - before)
"""
    taken = int(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()[-1])
    assert taken < found.bytes / 4, (taken, found.bytes)


def test_index_of_other_vectors_is_refused(tmp_path):
    vectors = generated(tmp_path / "vectors")
    build_index(vectors, "Flat", progress=False)
    path = vectors.folder / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest | {"weights": "others"}))
    with pytest.raises(ValueError, match="other vectors .weights"):
        FaissIndex(index_folder(vectors, "Flat"))
    with pytest.raises(ValueError, match="another index"):
        build_index(Vectors(vectors.folder), "Flat", progress=False)


def test_recall_counts_shared_rows():
    assert recall_at([[1, 2, 3], [7, 8, -1]], [[3, 2, 9], [4, 5, 6]], 3) == pytest.approx(1 / 3)
    assert recall_at([[5, 1]], [[1, 5]], 1) == 0
    with pytest.raises(ValueError, match="recall at 5"):
        recall_at([[1, 2]], [[1, 2]], 5)


def test_searcher_answers_in_two_languages(tmp_path):
    benchmark = load_benchmark("sample", languages=["de", "es"])
    encoder = load_encoder("use-multilingual-v3", device="cpu")
    vectors = encode_corpus(encoder, benchmark.passages, tmp_path / "sample", progress=False)
    build_index(vectors, "HNSW16", progress=False)
    for factory in (None, "HNSW16"):
        searcher = Searcher(tmp_path / "sample", factory=factory)  # the manifest names the encoder
        for language, other in (("de", "es"), ("es", "de")):
            asked = benchmark.queries.query("lang == @language").iloc[0]
            found = searcher.search(asked["text"], k=5)
            assert found.index.tolist() == [1, 2, 3, 4, 5] and list(found) == ["score", "lang", "id", "text"]
            assert found["score"].is_monotonic_decreasing and {language, other} == set(found["lang"])
            by_id = benchmark.passages.set_index(["lang", "id"])["text"]
            assert [by_id[row["lang"], row["id"]] for _, row in found.iterrows()] == found["text"].tolist()
    table = searcher.search(benchmark.queries["text"].tolist()[:3], k=2, efSearch=50)
    assert table["question"].tolist() == np.repeat(benchmark.queries["text"].tolist()[:3], 2).tolist()
    with pytest.raises(ValueError, match="question 0 is empty"):
        searcher.search(" ")
    with pytest.raises(ValueError, match="no question: give one"):
        searcher.search([])
    with pytest.raises(ValueError, match="exact search has no parameters"):
        Searcher(tmp_path / "sample", encoder).search("Was?", nprobe=3)


def test_cost_page_follows_its_parameters_and_measurements(root):
    "The page runs, and its last table is the sum of what the cells before it found."
    import nbformat
    from nbconvert.preprocessors import ExecutePreprocessor

    notebook = nbformat.read(root / "nbs" / "cost.ipynb", as_version=4)
    parameters = next(cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    parameters.source += "\ncpu_price = gpu_price = disk_price = 0"
    notebook.cells.append(nbformat.v4.new_code_cell("assert bill['in all'] == 0\nassert abs(encode_cpu - total * length_factor / per_thread / 3600) < 1e-6 and sizes.min() > 1\nprint('free')"))
    ExecutePreprocessor(timeout=200).preprocess(notebook, {"metadata": {"path": str(root / "nbs")}})
    assert notebook.cells[-1].outputs[0].text == "free\n"
