"""A run is a function of its configuration: computed once, resumed where it stopped, never mixed; and its notebook tells the story."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT
from tiny import save_tiny

from hybrid_ir import experiment
from hybrid_ir.evaluation import content_sha256, evaluate
from hybrid_ir.experiment import BenchmarkChoice, RunConfig, checkpoint_folder, complete_runs, parse_benchmark, read_run, reports_folder, run, run_folder
from hybrid_ir.samplers import SAMPLERS

SMALL = dict(languages="de,en,th", batch_size=8, steps=6, validate_every=3, checkpoint_every=3, learning_rate=1e-3, query_length=32, passage_length=64)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return str(save_tiny(tmp_path_factory.mktemp("encoders") / "tiny-bert"))


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HYBRID_IR_CACHE", str(tmp_path / "cache"))


def test_a_run_is_computed_once(encoder, tmp_path, monkeypatch):
    config = RunConfig(encoder=encoder, **SMALL)
    first = run(config, tmp_path, progress=False)
    assert {"config.json", "environment.json", "metrics.json", "train_log.jsonl"} <= {path.name for path in first.folder.iterdir()}
    assert (first.folder / "sample" / "per_query.parquet").exists() and not list(first.folder.rglob("*.safetensors"))
    monkeypatch.setattr(experiment, "trained_encoder", lambda *arguments: pytest.fail("computed again"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = run(config, tmp_path, progress=False)
    assert again.metrics == first.metrics and again.log.equals(first.log)
    assert again.after["sample"].summary().equals(first.after["sample"].summary())
    vectors = again.load_encoder().encode(["Wie?"])
    assert vectors.shape == (1, 32)


def test_one_more_benchmark_needs_no_training(encoder, tmp_path, monkeypatch):
    config = RunConfig(encoder=encoder, **SMALL)
    first = run(config, tmp_path, progress=False)
    more = RunConfig(encoder=encoder, **SMALL, benchmarks="sample:el+vi, sample:known")
    with monkeypatch.context() as patch:
        patch.setattr(experiment, "train", lambda *arguments, **options: pytest.fail("trained again"))
        again = run(more, tmp_path, progress=False)
    assert again.folder == first.folder and again.after["sample:el+vi"].info["languages"] == ["el", "vi"]
    pd.testing.assert_frame_equal(again.after["sample:known"].summary(), first.after["sample"].summary())
    (found,) = complete_runs(tmp_path, encoder=encoder)
    assert set(found.after) == {"sample", "sample:el+vi", "sample:known"}
    assert list(complete_runs(tmp_path, "sample:el+vi")[0].after) == ["sample:el+vi"] and not complete_runs(tmp_path, "xquad_r")


def test_lost_weights_are_trained_again(encoder, tmp_path):
    config = RunConfig(encoder=encoder, **SMALL)
    first = run(config, tmp_path, progress=False)
    shutil.rmtree(checkpoint_folder(config))
    again = run(RunConfig(encoder=encoder, **SMALL, benchmarks=("sample", "sample:de+en")), tmp_path, progress=False)
    assert again.log.drop(columns="pairs_per_second").equals(first.log.drop(columns="pairs_per_second"))
    assert (again.load_encoder().encode(["Wie?"]) == first.load_encoder().encode(["Wie?"])).all()


MORE = ("sample", "sample:de+en")


def test_lost_weights_are_not_trained_again_in_another_environment(encoder, tmp_path, monkeypatch):
    config, more = (RunConfig(encoder=encoder, **SMALL, precision="fp32", benchmarks=names) for names in ("sample", MORE))
    first = run(config, tmp_path, progress=False)
    shutil.rmtree(checkpoint_folder(config))
    before, known = {path: path.read_bytes() for path in tmp_path.rglob("*.*") if path.suffix in (".json", ".jsonl", ".parquet")}, experiment.environment
    with monkeypatch.context() as patch:
        for name in ("train", "load_encoder", "load_pairs", "load_benchmark"):
            patch.setattr(experiment, name, lambda *arguments, **options: pytest.fail("something slow was started"))
        for changes in ({"precision": "bf16"}, {"code": "0123456789", "torch": "9.9"}, {"device": "Another GPU", "processor": "Another"}):
            patch.setattr(experiment, "environment", lambda *arguments: known(*arguments) | changes)
            with pytest.raises(ValueError, match=f"trained again they would be others .*remove the folder to compute the whole run anew") as caught:
                run(more, tmp_path, progress=False)
            assert str(first.folder) in str(caught.value) and all(f"{name} was {first.environment[name]}, is {value}" in str(caught.value) for name, value in changes.items())
    assert before == {path: path.read_bytes() for path in before}, "nothing was touched"
    again = run(more, tmp_path, progress=False)
    assert {path.name for path, content in before.items() if path.read_bytes() != content} == {"config.json"}, "what was there stays as it was"
    assert again.metrics == first.metrics and set(again.after) == set(MORE)


def test_a_second_training_that_goes_another_way_is_refused(encoder, tmp_path, monkeypatch):
    config, train, folder = RunConfig(encoder=encoder, **SMALL), experiment.train, checkpoint_folder
    first = run(config, tmp_path, progress=False)
    shutil.rmtree(checkpoint_folder(config))

    def other(*arguments, **options):
        result = train(*arguments, **options)
        result.log.loc[2, "loss"] += 1e-6
        return result

    monkeypatch.setattr(experiment, "train", other)
    with pytest.raises(ValueError, match="went another way than .*train_log.jsonl says; remove .* compute the whole run anew"):
        run(RunConfig(encoder=encoder, **SMALL, benchmarks=MORE), tmp_path, progress=False)
    assert not (checkpoint_folder(config) / "encoder").exists() and not (first.folder / "sample-de+en").exists()


def test_weights_of_another_run_are_not_evaluated(encoder, tmp_path, monkeypatch):
    config = RunConfig(encoder=encoder, **SMALL)
    first, trained = run(config, tmp_path / "here", progress=False), checkpoint_folder(config) / "encoder"
    experiment.load_encoder(encoder).save(trained)  # the untouched weights, as whole as the others
    experiment.write_checksums(trained)
    for use in (first.load_encoder, lambda: run(RunConfig(encoder=encoder, **SMALL, benchmarks=MORE), tmp_path / "here", progress=False)):
        with pytest.raises(ValueError, match="not the weights that the scores of the run belong to; remove this folder"):
            use()


def test_two_precisions_are_told(encoder, tmp_path):
    config = RunConfig(encoder=encoder, **SMALL, precision="fp32")
    run(config, tmp_path, progress=False)
    scores = experiment.Scores.load(experiment.untouched_folder(config, "sample", tmp_path))
    scores.info["environment"]["precision"] = "bf16"
    scores.save(experiment.untouched_folder(config, "sample", tmp_path))
    with pytest.warns(UserWarning, match="sample was evaluated in bf16 before training and in fp32 after it"):
        run(config, tmp_path, progress=False)


def test_two_codes_are_told(encoder, tmp_path, monkeypatch):
    assert "index" in experiment.COMPUTING_MODULES, "it encodes"
    with monkeypatch.context() as patch:
        patch.setattr(experiment, "code_hash", lambda: "0123456789")
        run(RunConfig(encoder=encoder, **SMALL), tmp_path, progress=False)
    with pytest.warns(UserWarning, match=f"sample was evaluated by the code 0123456789 before training and by the code {experiment.code_hash()} after it"):
        run(RunConfig(encoder=encoder, **SMALL, seed=1), tmp_path, progress=False)


def other_weights(folder: str) -> experiment.Encoder:
    "The encoder of a folder, with noise in all its weights."
    encoder = experiment.load_encoder(folder)
    torch.manual_seed(5)
    with torch.no_grad():
        for values in encoder.parameters():
            values.add_(torch.randn_like(values))
    return encoder


def averages(scores: experiment.Scores) -> dict:
    return scores.to_dict()["averages"]


def test_folders_that_end_alike_are_kept_apart(encoder, tmp_path):
    one, other = (str(shutil.copytree(encoder, tmp_path / name / "model" / "final")) for name in "ab")
    other_weights(other).save(other)
    answers = beir(tmp_path / "a" / "data" / "beir", 0), beir(tmp_path / "b" / "data" / "beir", 3)
    for folder in (one, other):
        for benchmark in ("sample", *answers):
            config = RunConfig(encoder=folder, **SMALL, benchmarks=benchmark)
            result, own = run(config, tmp_path / "reports", progress=False), experiment.load_benchmark(benchmark)
            for scores, weights in ((result.before, experiment.load_encoder(folder)), (result.after, result.load_encoder())):
                assert averages(scores[benchmark])["mono"]["map"]["value"] == pytest.approx(evaluate(weights, own, progress=False).to_dict()["averages"]["mono"]["map"]["value"], abs=1e-6)
    assert len(complete_runs(tmp_path / "reports")) == 2
    assert [experiment.slug(name) for name in ("me5-small-q4", "xm3600:known", "owner/model")] == ["me5-small-q4", "xm3600-known", "owner-model"]


def test_files_that_have_changed_are_told(encoder, tmp_path, monkeypatch):
    mine, pairs, benchmark = shutil.copytree(encoder, tmp_path / "mine"), tmp_path / "pairs.jsonl", beir(tmp_path / "beir", 0)
    records = [{"id": f"{n}", "query": {"de": f"Frage {n}", "en": f"question {n}"}, "passage": {"de": f"Antwort {n}", "en": f"answer {n}"}} for n in range(80)]
    pairs.write_text("".join(json.dumps(record) + "\n" for record in records))
    config = RunConfig(encoder=str(mine), **SMALL | {"languages": "de,en"}, train=str(pairs), benchmarks=benchmark)
    first = run(config, tmp_path / "reports", progress=False)
    for slow in ("train", "load_encoder", "load_pairs", "load_benchmark"):
        monkeypatch.setattr(experiment, slow, lambda *arguments, **options: pytest.fail("something slow was started"))
    untouched = experiment.untouched_folder(config, benchmark, tmp_path / "reports")
    for path, kind, name, stale in [
        (mine / "model.safetensors", "encoder", mine, untouched), (pairs, "train", pairs, first.folder), (tmp_path / "beir" / "de" / "qrels" / "test.tsv", "benchmark", benchmark, untouched),
    ]:  # fmt: skip
        kept = path.read_bytes()
        path.write_bytes(kept + b" ")
        for seed in (0, 1) if stale == untouched else (0,):  # another run would take the scores before training for its own
            with pytest.raises(ValueError, match=f"{kind} {name}: changed since these were computed: .*{stale}.* remove them"):
                run(dataclasses.replace(config, seed=seed), tmp_path / "reports", progress=False)
        assert averages(complete_runs(tmp_path / "reports")[0].after[benchmark]) == averages(first.after[benchmark]), "what was computed can be looked at"
        path.write_bytes(kept)
        assert run(config, tmp_path / "reports", progress=False).metrics == first.metrics
    for file in (first.folder / "metrics.json", untouched / "metrics.json"):  # as earlier versions wrote them
        content = {name: value for name, value in json.loads(file.read_text()).items() if name not in ("inputs", "sha256")}
        file.write_text(json.dumps(content | {"sha256": content_sha256(content)}))
    pairs.write_text("")
    assert run(config, tmp_path / "reports", progress=False).log.equals(first.log)


def test_scores_that_do_not_belong_together_are_refused(encoder, tmp_path):
    config = RunConfig(encoder=encoder, **SMALL)
    run(config, tmp_path, progress=False)
    place = experiment.untouched_folder(config, "sample", tmp_path)
    scores = experiment.Scores.load(place)
    scores.info["inputs"][f"encoder {encoder}"] = "another"
    scores.save(place)
    with pytest.raises(ValueError, match=f"sample before and after training do not belong together, they differ in encoder {encoder}"):
        complete_runs(tmp_path)


PROCESSES = """
import json, sys
from accelerate import PartialState
from hybrid_ir.experiment import RunConfig, run
config = RunConfig(encoder=sys.argv[1], benchmarks=("sample:de+en", "sample:en+th", "sample:de"), device="cpu", precision="fp32", **json.loads(sys.argv[2]))
for _ in range(2):  # the second time both only read
    result = run(config, "reports", progress=False)
print(json.dumps([PartialState().num_processes, {name: scores.to_dict()["averages"] for name, scores in result.after.items()}]) + "\\n", end="")
"""


def test_two_processes(encoder, tmp_path):
    "One of them scores and writes, both return the run."
    (tmp_path / "script.py").write_text(PROCESSES)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "script.py", encoder, json.dumps(SMALL | {"dropout": 0.0})]
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(launch, cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths}, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    one, other = (json.loads(line) for line in done.stdout.splitlines() if line.startswith("["))
    assert one == other and one[0] == 2 and list(one[1]) == ["sample:de+en", "sample:en+th", "sample:de"]
    assert not list(tmp_path.rglob("*.partial")) and len(list((tmp_path / "reports").rglob("metrics.json"))) == 7


def test_what_was_drawn_is_what_was_trained_on(encoder, tmp_path):
    options = SMALL | dict(steps=60, validate_every=1, patience=1, learning_rate=3e-2, warmup=0.0)
    metrics = run(RunConfig(encoder=encoder, **options), tmp_path, progress=False).metrics
    assert metrics["composition"]["batches"] == metrics["training"]["steps"] < 60


def test_metrics_are_json_without_validation_too(encoder, tmp_path):
    folder = run(RunConfig(encoder=encoder, **SMALL, heldout=0), tmp_path, progress=False).folder
    for file in folder.rglob("*.json"):
        json.loads(file.read_text(), parse_constant=lambda word: pytest.fail(f"{word} in {file}"))
    assert json.loads((folder / "metrics.json").read_text())["training"]["best_validation_loss"] is None


def test_a_configuration_that_was_changed_is_found(encoder, tmp_path):
    config = RunConfig(encoder=encoder, **SMALL)
    file = run(config, tmp_path, progress=False).folder / "config.json"
    whole = file.read_text()
    other = json.dumps(experiment.asdict(RunConfig(encoder=encoder, **SMALL, seed=1)))
    for content, message in ((other, "not the configuration that the folder is named by"), (whole.replace('"seed": 0', '"seed": 1'), "not say what was written"), (whole[:-9], "damaged"), (None, "missing")):
        file.write_text(content) if content else file.unlink()
        with pytest.raises(ValueError, match=f"config.json is .*{message}"):
            complete_runs(tmp_path)


def test_runs_in_progress_are_left_out(encoder, tmp_path, monkeypatch):
    monkeypatch.setattr(experiment, "evaluate_missing", lambda config, encoder, folders, progress: None if "untouched" in str(folders) else (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run(RunConfig(encoder=encoder, **SMALL), tmp_path, progress=False)
    assert complete_runs(tmp_path) == []


def test_benchmarks_as_words():
    assert parse_benchmark("xquad_r:known:context") == BenchmarkChoice("xquad_r", known=True, context=True)
    assert parse_benchmark("miracl:yo").languages == ("yo",)
    choice = parse_benchmark("xquad_r:el+ar+de:known")
    assert choice.of(["ar", "de", "el", "en"], "use-multilingual-v3") == ["ar", "de"] and choice.of(["ar", "el"], "me5-small-q4") == ["ar", "el"]
    for wrong, message in [
        ("xquad", "valid: sample, xquad_r"), ("xquad_r:contxt", "'contxt'; valid: ar"), ("xquad_r:de+xx", "'xx'; valid: ar"), ("xquad_r:de+known", "'known'; valid: ar.* colon of its own known, context"),
        ("xquad_r:known+context", "'known'; valid: ar"), ("xm3600:de:context", "context is an option of sample, xquad_r, mlqa_r"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            parse_benchmark(wrong)


def beir(folder: Path, relevant: int, languages=("de",)) -> str:
    "A benchmark of one question a language, answered by passage number `relevant` of four; without languages, a folder that does not say its own."
    for place in [folder / language for language in languages] or [folder]:
        (place / "qrels").mkdir(parents=True, exist_ok=True)
        (place / "corpus.jsonl").write_text("".join(json.dumps({"_id": f"d{number}", "text": f"Text {number}: {word}"}) + "\n" for number, word in enumerate(["Hund", "Katze", "Maus", "Vogel"])))
        (place / "queries.jsonl").write_text(json.dumps({"_id": "q", "text": "Wo ist der Hund?"}))
        (place / "qrels" / "test.tsv").write_text(f"query-id\tcorpus-id\tscore\nq\td{relevant}\t1\n")
    return str(folder)


def test_words_of_folders(encoder, tmp_path, monkeypatch):
    mine, flat = beir(tmp_path / "mine", 0, ("de", "en")), beir(tmp_path / "flat", 0, ())
    assert parse_benchmark(f"{mine}:de").languages == ("de",) and parse_benchmark(flat).source == (flat, None, False)
    for wrong, message in [(f"{mine}:de+fr", "'fr'; valid: de, en"), (f"{mine}:contxt", "'contxt'; valid: de, en"), (f"{flat}:en+de", "must name that one"), (f"{mine}:context", "context is an option of sample")]:
        with pytest.raises(ValueError, match=message):
            RunConfig(encoder=encoder, benchmarks=wrong)
    with pytest.raises(ValueError, match="leaves no language: use-multilingual-v3 knows ar, de"):
        RunConfig(encoder="use-multilingual-v3", benchmarks="xquad_r:el+vi:known")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no corpus.jsonl"):
        RunConfig(encoder=encoder, benchmarks=str(tmp_path / "empty"))
    result = run(RunConfig(encoder=encoder, **SMALL, benchmarks=f"{flat}:en"), tmp_path, progress=False)
    assert result.after[f"{flat}:en"].info["languages"] == ["en"]


def test_languages_that_the_files_lack_are_told_before_anything_is_encoded(encoder, tmp_path, monkeypatch):
    load = experiment.load_benchmark
    monkeypatch.setattr(experiment, "load_benchmark", lambda name, *arguments, **options: load("sample", ["de", "en"]) if name == "xquad_r" else load(name, *arguments, **options))
    monkeypatch.setattr(experiment, "embed", lambda *arguments: pytest.fail("something was encoded"))
    with pytest.raises(ValueError, match="unknown language of xquad_r 'el'; valid: de, en"):
        run(RunConfig(encoder=encoder, **SMALL, benchmarks="sample, xquad_r:de+el"), tmp_path, progress=False)


def test_equal_configurations_have_equal_keys():
    plain = RunConfig(seed=1, alpha=1.0, dropout=0.0, batch_size=8, languages=("de", "en"))
    same = RunConfig(seed=np.int64(1), alpha=1, dropout=np.float64(0), batch_size=np.int32(8), languages=["de", "en"])
    assert same == plain and same.key == plain.key and RunConfig(languages="de").languages == ("de",)
    for file in sorted((ROOT / "reports").glob("*/runs/*/config.json")):
        saved = {name: value for name, value in json.loads(file.read_text()).items() if name not in ("files", "sha256")}
        assert run_folder(RunConfig(**saved), ROOT / "reports") == file.parent


def test_the_code_hash_ignores_comments():
    first = 'def f(x):  # a comment\n    "Says nothing."\n    return x + 1\n'
    assert experiment.bare_source(first) == experiment.bare_source("def f(x):\n    return x+1") != experiment.bare_source("def f(x):\n    return x+2")


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_runs(encoder, tmp_path, sampler):
    result = run(RunConfig(encoder=encoder, sampler=sampler, **SMALL), tmp_path, progress=False)
    drawn = result.metrics["composition"]
    kinds = {"english": {"mono"}, "mixed": {"mixed"}, "mono": {"mono"}, "cross": {"cross"}, "hybrid": {"mono", "cross"}}[sampler]
    assert set(drawn["kinds"]) <= kinds and drawn["batches"] == 6 and drawn["repeated_ids"] == drawn["repeated_groups"] == 0
    assert set(result.after["sample"].summary().index) == {"mono", "cross", "multi"}


def test_an_interrupted_run_goes_on_where_it_stopped(encoder, tmp_path, monkeypatch):
    config, score = RunConfig(encoder=encoder, **SMALL), experiment.score_embeddings
    calls = []

    def stop_at_second(*arguments, **options):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return score(*arguments, **options)

    monkeypatch.setattr(experiment, "score_embeddings", stop_at_second)
    with pytest.raises(KeyboardInterrupt):
        run(config, tmp_path, progress=False)
    assert (run_folder(config, tmp_path) / "metrics.json").exists() and not experiment.is_complete(config, tmp_path)
    steps = (checkpoint_folder(config) / "train_log.jsonl").read_text()
    result = run(config, tmp_path, progress=False)
    assert len(calls) == 3, "the untouched encoder was not evaluated again"
    assert (checkpoint_folder(config) / "train_log.jsonl").read_text() == steps, "nor trained again"
    shutil.rmtree(checkpoint_folder(config))
    undisturbed = run(config, tmp_path / "other", progress=False)
    assert undisturbed.after["sample"].summary().equals(result.after["sample"].summary())


def test_folders_of_other_code_or_configuration_are_refused(encoder, tmp_path, monkeypatch):
    config = RunConfig(encoder=encoder, **SMALL)
    folder = run_folder(config, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(experiment, "train", lambda *arguments, **options: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(config, tmp_path, progress=False)
    with monkeypatch.context() as patch:
        patch.setattr(experiment, "code_hash", lambda: "0123456789")
        with pytest.raises(ValueError, match="begun by other code .*0123456789"):
            run(config, tmp_path, progress=False)
    content = (folder / "config.json").read_text()
    (folder / "config.json").write_text(json.dumps(experiment.asdict(RunConfig(encoder=encoder, **SMALL | {"steps": 99}))))
    with pytest.raises(ValueError, match="another configuration"):
        run(config, tmp_path, progress=False)
    (folder / "config.json").write_text(content)
    run(config, tmp_path, progress=False)
    monkeypatch.setattr(experiment, "code_hash", lambda: "0123456789")
    with pytest.warns(UserWarning, match="computed by other code"):
        read_run(config, tmp_path)


def test_wrong_configurations_fail_before_anything_is_loaded(monkeypatch, tmp_path):
    monkeypatch.setattr(experiment, "load_encoder", lambda *arguments, **options: pytest.fail("an encoder was loaded"))
    for wrong, message in [
        (dict(encoder="me5"), "unknown encoder 'me5'; valid: me5-small-q4"), (dict(sampler="x"), "valid: english, mixed"), (dict(alpha=-0.1), "alpha"),
        (dict(device="tpu"), "valid: auto, cpu"), (dict(precision="int8"), "valid: auto, fp32, bf16"), (dict(passage_length=1), "passage_length"),
        (dict(benchmarks=()), "at least one benchmark"), (dict(train="parallel_doc"), "parallel_docs"), (dict(benchmarks="xquad"), "xquad_r"),
        (dict(languages="de,xx"), "unknown language 'xx'; valid: ar, de"), (dict(languages=[]), "no training language"), (dict(train=["sample", "nonsense"]), "unknown training set 'nonsense'"), (dict(batch_size=500), "a batch_size up to"), (dict(sampler="cross", languages="de"), "two training languages"),
    ]:  # fmt: skip
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            run(RunConfig(**{"batch_size": 8, **wrong}), tmp_path, progress=False)
    assert not list(tmp_path.rglob("metrics.json"))


def papermill(output, *parameters, folder=ROOT) -> subprocess.CompletedProcess:
    words = [word for name, value in parameters for word in ("-p", name, str(value))]
    env = {name: value for name, value in os.environ.items() if name != "MPLBACKEND"}  # the kernel chooses the one that shows figures
    return subprocess.run([sys.executable, "-m", "papermill", str(ROOT / "nbs" / "run.ipynb"), str(output), *words], cwd=folder, capture_output=True, text=True, env=env)


def test_the_run_notebook(encoder, tmp_path):
    parameters = [("encoder", encoder), ("languages", "de,en,th"), ("batch_size", 8), ("steps", 6), ("validate_every", 3), ("reports", tmp_path / "reports")]
    for _ in range(2):  # the second time it reads what the first one computed
        done = papermill(tmp_path / "out.ipynb", *parameters, ("sampler", "hybrid"))
        assert done.returncode == 0, done.stderr[-3000:]
    notebook = nbformat.read(tmp_path / "out.ipynb", as_version=4)
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 5, "composition, training, before and after, languages, bias"
    assert any(re.search(r"ids repeated within a batch\s+0", output.get("data", {}).get("text/plain", "")) for output in outputs)
    assert not any(output.output_type == "stream" and output.name == "stderr" for output in outputs)
    assert len(list((tmp_path / "reports").rglob("runs/*/metrics.json"))) == 1


def test_the_run_notebook_in_its_own_folder(encoder, tmp_path):
    "As JupyterLab runs it: the reports are those of the checkout, not of `nbs`."
    checkout = tmp_path / "checkout"
    (checkout / "nbs").mkdir(parents=True)
    shutil.copy(ROOT / "settings.ini", checkout)
    parameters = [("encoder", encoder), ("languages", "de,en,th"), ("batch_size", 8), ("steps", 2), ("validate_every", 2)]
    done = papermill(tmp_path / "out.ipynb", *parameters, folder=checkout / "nbs")
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(list((checkout / "reports").glob("*/runs/*/metrics.json"))) == 1 and not list((checkout / "nbs").iterdir())
    assert "../reports/" in (tmp_path / "out.ipynb").read_text()


def test_reports_are_those_of_the_checkout(tmp_path, monkeypatch):
    (tmp_path / "nbs").mkdir()
    monkeypatch.chdir(tmp_path / "nbs")
    assert reports_folder() == Path("reports"), "a folder of this name, but no checkout"
    (tmp_path / "settings.ini").touch()
    assert reports_folder().resolve() == tmp_path / "reports" and reports_folder(tmp_path / "mine") == tmp_path / "mine"
    monkeypatch.chdir(tmp_path)
    assert reports_folder("mine") == Path("mine")
    for name in ("run", "report", "summary"):
        code = "".join(cell.source for cell in nbformat.read(ROOT / "nbs" / f"{name}.ipynb", as_version=4).cells)
        assert "reports_folder(reports)" in code


def test_the_run_notebook_names_a_wrong_parameter(tmp_path):
    done = papermill(tmp_path / "out.ipynb", ("sampler", "hybird"), ("reports", tmp_path / "reports"))
    assert done.returncode != 0 and "unknown sampler 'hybird'; valid: english, mixed, mono, cross, hybrid" in done.stderr
    done = papermill(tmp_path / "out.ipynb", ("smapler", "mono"), ("reports", tmp_path / "reports"))
    assert done.returncode != 0 and "unknown parameter 'smapler'; valid: benchmark, reports, alpha," in done.stderr
    done = papermill(tmp_path / "out.ipynb", ("patience", -3), ("reports", tmp_path / "reports"))  # a setting that the first cell does not name
    assert done.returncode != 0 and "patience" in done.stderr and "-3" in done.stderr


def test_a_run_that_fails_leaves_its_error_in_the_notebook_not_its_progress_bars(encoder, tmp_path):
    parameters = [("encoder", encoder), ("languages", "de,en,th"), ("batch_size", 8), ("steps", 20), ("validate_every", 20), ("learning_rate", 1e30), ("reports", tmp_path / "reports")]
    done = papermill(tmp_path / "out.ipynb", *parameters)
    assert done.returncode != 0 and "TrainingDiverged" in done.stderr
    outputs = [output for cell in nbformat.read(tmp_path / "out.ipynb", as_version=4).cells if cell.cell_type == "code" for output in cell.outputs]
    assert [output.output_type for output in outputs] == ["error"] and "A lower learning rate than 1e+30" in outputs[0].evalue


def test_the_parameters_tag_survived():
    notebook = nbformat.read(ROOT / "nbs" / "run.ipynb", as_version=4)
    tagged = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    assert len(tagged) == 1 and "sampler" in tagged[0].source and not any(cell.get("outputs") for cell in notebook.cells)
