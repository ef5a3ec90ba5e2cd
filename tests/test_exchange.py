"Pairs, benchmarks, rankings and encoders in the forms that others read."

import base64
import json
import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import datasets
import huggingface_hub
import ir_measures
import numpy as np
import pandas as pd
import pytest
from huggingface_hub import ModelCard
from tiny import save_tiny

from hybrid_ir.benchmarks import Benchmark, load_benchmark
from hybrid_ir.encoders import load_encoder
from hybrid_ir.evaluation import Scores, evaluate, score_embeddings
from hybrid_ir.exchange import (
    benchmark_to_datasets,
    cross_run,
    dataset_to_pairs,
    datasets_to_benchmark,
    mteb_task,
    pairs_to_dataset,
    prepare_upload,
    push_to_hub,
    save_beir,
    save_trec,
    task_qrels,
    write_trec_qrels,
)
from hybrid_ir.experiment import RunConfig, run
from hybrid_ir.interop import save_sentence_transformer
from hybrid_ir.pairs import ParallelPairs, load_pairs
from hybrid_ir.retrieval import write_trec_run


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny"), "bert")


def graded_benchmark() -> Benchmark:
    "Grades, a language without passages, ids that repeat across languages and hold a quotation mark."
    passages = pd.DataFrame([(f'p"{number}', language, f"{language} passage {number}") for language in ("de", "en", "fi") for number in range(30)], columns=["id", "lang", "text"])
    queries = pd.DataFrame([(f"q{number}", language, f"{language} query {number}") for language in ("bn", "de", "en", "fi") for number in range(8)], columns=["id", "lang", "text"])
    draw = np.random.default_rng(0)
    judged = {(query, int(passage)) for query in range(len(queries)) for passage in draw.choice(len(passages), 4, replace=False)}
    judgements = pd.DataFrame(sorted(judged), columns=["query", "passage"]).assign(grade=draw.integers(1, 4, len(judged)))
    return Benchmark("graded", passages, queries, judgements, {"license": "CC0-1.0"}, pooled=True)


def test_pairs_survive_datasets_and_keep_what_belongs_together(tmp_path):
    record = {"id": "x", "query": {"de": "Frage", "en": "question"}, "passage": {"en": "passage"}, "negatives": {"en": ["one", "two"]}, "page": "p", "license": "MIT"}
    records = [record, {**record, "id": "y", "query": {"en": "other"}, "passage": {"de": "Absatz"}, "negatives": {}}, {**record, "id": "z", "page": "q", "passage": {"en": "else"}}]
    both = ParallelPairs.concat([load_pairs("sample", languages=["de", "en"]), ParallelPairs.from_records(records, "own")])
    saved = pairs_to_dataset(both)
    saved.save_to_disk(tmp_path / "pairs")
    back = dataset_to_pairs(datasets.load_from_disk(str(tmp_path / "pairs")))
    assert back.set_names == ["sample", "own"] and back.table.remove_columns("source").to_dict() == both.table.remove_columns("source").to_dict()
    assert np.array_equal(back.groups, both.groups) and back.info["licenses"] == ["CC0-1.0", "MIT"]
    for one, other in ((back.blocks, both.blocks), (both.blocks, back.blocks)):  # the same pages hold together
        assert pd.Series(one).groupby(other).nunique().eq(1).all()
    shuffled = saved["sample"].shuffle(seed=0).select_columns(["id", "language", "query", "passage"])
    assert {number: len(rows) for number, rows in dataset_to_pairs(shuffled).table.to_pandas().groupby("id")} == dict.fromkeys(saved["sample"].unique("id"), 2)
    with pytest.raises(ValueError, match="unknown column 'passage'; valid: id, language, query"):
        dataset_to_pairs(shuffled.remove_columns("passage"))


def test_benchmarks_survive_datasets_and_beir(tmp_path):
    for benchmark in (graded_benchmark(), load_benchmark("sample", languages=["de", "en", "th"])):
        parts = benchmark_to_datasets(benchmark)
        parts.save_to_disk(tmp_path / "datasets" / benchmark.name)
        again = datasets_to_benchmark(datasets.load_from_disk(str(tmp_path / "datasets" / benchmark.name)))
        assert (again.fingerprint, again.tasks, again.info, again.pooled) == (benchmark.fingerprint, benchmark.tasks, benchmark.info, benchmark.pooled)
        again = load_benchmark(save_beir(benchmark, tmp_path / "beir" / benchmark.name, split="dev"), split="dev")
        assert again.fingerprint == benchmark.fingerprint and again.name == benchmark.name
    parts["qrels"] = parts["qrels"].add_item({**parts["qrels"][0], "passage_id": "nowhere"})
    with pytest.raises(ValueError, match="names the passage 'nowhere' in de, which does not exist"):
        datasets_to_benchmark(parts)


def test_ambiguous_passage_names_are_refused(tmp_path):
    passages = pd.DataFrame([("x", "de", "eins"), ("de/x", "en", "one")], columns=["id", "lang", "text"])
    queries = pd.DataFrame([("q", "en", "question")], columns=["id", "lang", "text"])
    with pytest.raises(ValueError, match="'de/x' would mean two passages"):
        save_beir(Benchmark("b", passages, queries, pd.DataFrame({"query": [0], "passage": [0], "grade": [1]})), tmp_path)


MEASURES = {"map": "AP", "mrr@10": "RR@10", "ndcg@10": "nDCG@10", "recall@10": "R@10"}


def test_ir_measures_agrees_query_by_query(tmp_path):
    benchmark, draw = graded_benchmark(), np.random.default_rng(1)
    vectors = [draw.standard_normal((len(table), 8)).astype(np.float32) for table in (benchmark.queries, benchmark.passages)]
    scores = score_embeddings(benchmark, *vectors, measures=list(MEASURES), k=len(benchmark.passages))
    save_trec(scores, tmp_path)
    write_trec_run(cross_run(benchmark, *vectors, k=len(benchmark.passages)), tmp_path / "cross.run")
    write_trec_qrels(task_qrels(benchmark, "cross"), tmp_path / "cross.qrels")
    compared = 0
    for task in ("mono", "cross", "multi"):
        qrels, ranking = (list(read(str(tmp_path / f"{task}.{kind}"))) for read, kind in ((ir_measures.read_trec_qrels, "qrels"), (ir_measures.read_trec_run, "run")))
        theirs = {(metric.query_id, str(metric.measure)): metric.value for metric in ir_measures.iter_calc([ir_measures.parse_measure(name) for name in MEASURES.values()], qrels, ranking)}
        for row in scores.per_query[scores.per_query["task"] == task].to_dict("records"):
            name = f"{row['query_language']}:{row['query_id']}" + (f"@{row['passage_language']}" if task == "cross" else "")
            for ours, measure in MEASURES.items():
                assert row[ours] == pytest.approx(theirs[name, measure], abs=1e-6), (task, name, measure)
                compared += 1
    assert compared == len(MEASURES) * len(scores.per_query) > 200
    assert (tmp_path / "multi.run").read_text().count("\n") == len(benchmark.queries) * len(benchmark.passages)
    judged = pd.DataFrame({"query": benchmark.judgement_queries, "passage": benchmark.judgement_passages, "grade": benchmark.judgement_grades})
    own = judged[benchmark.queries["lang"].to_numpy()[judged["query"]] == benchmark.passages["lang"].to_numpy()[judged["passage"]]]
    with pytest.raises(ValueError, match="cross"):
        cross_run(Benchmark("own", benchmark.passages, benchmark.queries, own), *vectors)
    scores.save(tmp_path / "saved")
    with pytest.raises(ValueError, match="have no rankings"):
        save_trec(Scores.load(tmp_path / "saved"), tmp_path / "none")


def test_mteb_comes_to_the_same_numbers(tiny_folder, tmp_path):
    mteb = pytest.importorskip("mteb")
    from sentence_transformers import SentenceTransformer

    benchmark = load_benchmark("sample", languages=["de", "en", "zh"])
    encoder = load_encoder(str(tiny_folder), device="cpu", precision="fp32")
    cells = evaluate(encoder, benchmark, progress=False).cells.set_index(["query_language", "passage_language"])
    model = SentenceTransformer(str(save_sentence_transformer(encoder, tmp_path / "model")), device="cpu")
    task = mteb_task(benchmark, ("mono", "cross"))
    assert task.metadata.eval_langs["de-zh"] == ["deu-Latn", "zho-Hans"]
    found = mteb.evaluate(model, task, cache=None, show_progress_bar=False).task_results[0].scores["test"]
    assert len(found) == 9
    for entry in found:
        query, _, passage = entry["hf_subset"].partition("-")
        assert entry["recall_at_20"] >= entry["recall_at_10"] == pytest.approx(cells.loc[(query, passage or query), "recall@10"], abs=0.021)  # one tie moves a query
    assert np.mean([entry["ndcg_at_10"] for entry in found]) == pytest.approx(cells.loc[cells["task"] != "multi", "ndcg@10"].mean(), abs=0.01)


class Hub(BaseHTTPRequestHandler):
    "As much of a hub as receives a commit: makes the repository, asks for plain uploads, keeps the files."

    files, requests, token = {}, [], None  # shared by all requests

    def log_message(self, *args):
        pass

    def answer(self, body: dict):
        data = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        Hub.requests.append((self.path, body))
        Hub.token = self.headers.get("Authorization")
        address = f"http://{self.headers['Host']}"
        if self.path == "/api/repos/create":
            self.answer({"url": f"{address}/me/tiny", "name": "me/tiny"})
        elif "/preupload/" in self.path:
            self.answer({"files": [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in json.loads(body)["files"]]})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    Hub.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.answer({"success": True, "commitOid": "0" * 40, "commitUrl": f"{address}/me/tiny/commit/{'0' * 40}", "hookOutput": ""})
        else:
            self.answer({})

    def do_GET(self):
        Hub.requests.append((self.path, b""))
        self.answer({"id": "me/tiny", "modelId": "me/tiny", "sha": "0" * 40, "siblings": [], "private": True})


def test_one_call_sends_encoder_card_and_report(tiny_folder, tmp_path, monkeypatch):
    "Up to the HTTP requests, to a server on this machine; what arrived is a working folder."
    monkeypatch.setenv("HYBRID_IR_CACHE", str(tmp_path / "cache"))
    options = dict(train="sample", steps=2, batch_size=8, languages=("de", "en"), validate_every=2, checkpoint_every=2, device="cpu", precision="fp32")
    done = run(RunConfig(encoder=str(tiny_folder), benchmarks=("sample:de+en",), **options), tmp_path / "reports", progress=False)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")  # what HF_ENDPOINT sets
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    address = push_to_hub(done.load_encoder(), "me/tiny", done, license="cc0-1.0", token="hf_secret")
    server.shutdown()
    assert address.endswith(f"/me/tiny/commit/{'0' * 40}") and Hub.token == "Bearer hf_secret"
    created = json.loads(next(body for path, body in Hub.requests if path == "/api/repos/create"))
    assert created["name"] == "tiny" and created["organization"] == "me" and (created.get("private") is True or created.get("visibility") == "private")
    assert len([path for path, _ in Hub.requests if "/commit/" in path]) == 1
    for path, content in Hub.files.items():
        (tmp_path / "hub" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "hub" / path).write_bytes(content)
    received = tmp_path / "hub"
    texts = load_pairs("sample").table["query"][:20]
    assert np.array_equal(load_encoder(str(received), device="cpu", precision="fp32").encode(texts), done.load_encoder().encode(texts))
    head = ModelCard.load(str(received / "README.md"))
    assert head.data.license == "cc0-1.0" and head.data.language == ["de", "en"] and 'SentenceTransformer("me/tiny")' in head.text
    shown = np.array([float(number) for number in re.findall(r"(\d\.\d{3}) \[", head.text)])
    for value in done.after["sample:de+en"].summary().to_numpy().ravel():
        assert np.abs(shown - value).min() <= 0.0005 + 1e-6  # not `round(value, 3) in shown`: the means are summed in another order, and one may lie on either side of a half
    report = next((received / "report").iterdir())
    assert json.loads((report / "config.json").read_text())["sampler"] == "hybrid" and (report / "train_log.jsonl").exists()


def test_nothing_is_sent_without_a_card_a_report_or_a_name(tiny_folder, tmp_path):
    encoder = load_encoder(str(tiny_folder), device="cpu")
    with pytest.raises(ValueError, match="needs a card"):
        prepare_upload(encoder, tmp_path / "a", "me/tiny")
    with pytest.raises(FileNotFoundError, match="no report at"):
        prepare_upload(encoder, tmp_path / "a", "me/tiny", card="text", report=tmp_path / "nowhere")
    assert not (tmp_path / "a").exists()
    with pytest.raises(ValueError, match="me/my/tiny"):
        push_to_hub(encoder, "me/my/tiny", card="text", endpoint="http://127.0.0.1:9")
