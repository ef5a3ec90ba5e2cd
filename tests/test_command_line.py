"""`hybrid-ir`: the same numbers as the functions, JSON alone on standard output, one line for an error, and no need of Jupyter."""

import json
import os
import subprocess
import sys

import ir_measures
import nbformat
import pytest
from conftest import ROOT
from tiny import save_tiny

from hybrid_ir.benchmarks import load_benchmark
from hybrid_ir.command_line import build_parser, main, read_config
from hybrid_ir.encoders import load_encoder
from hybrid_ir.evaluation import evaluate
from hybrid_ir.experiment import RunConfig, run_folder, training_batches

COMMANDS = ("run", "evaluate", "sample-batches", "study", "info")
SMALL = ["--languages", "de,en,th", "--batch-size", "8", "--steps", "4", "--validate-every", "2", "--checkpoint-every", "2"]
NO_JUPYTER = """
import sys


class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("papermill", "nbformat", "nbconvert", "nbclient", "IPython", "ipykernel", "jupyter_client", "jupyter_core", "jupyterlab"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, Refuse())
"""


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return str(save_tiny(tmp_path_factory.mktemp("encoders") / "tiny-bert"))


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("HYBRID_IR_CACHE", str(tmp_path_factory.getbasetemp() / "command_line_cache"))


PROGRAM = """
import sys
from hybrid_ir.command_line import main
code = main()
print("imported", *sorted({"torch", "transformers", "papermill", "IPython"} & set(sys.modules)), file=sys.stderr)
sys.exit(code)
"""


def command(*words: str, path=(), **options) -> subprocess.CompletedProcess:
    "`hybrid-ir` in a process of its own, as its entry point starts it; its last line says what of PyTorch and Jupyter was imported."
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([*map(str, path), str(ROOT), os.environ.get("PYTHONPATH", "")])}
    return subprocess.run([sys.executable, "-c", PROGRAM, *words], capture_output=True, text=True, stdin=subprocess.DEVNULL, env=env, **options)


def test_a_run_and_its_evaluation_without_jupyter(encoder, tmp_path, capsys):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(NO_JUPYTER)
    done = command("run", "--encoder", encoder, *SMALL, "--json", cwd=tmp_path, path=[tmp_path / "site"])
    assert done.returncode == 0, done.stderr[-3000:]
    assert "training (hybrid)" in done.stderr and "4/4" in done.stderr and done.stderr.splitlines()[-1] == "imported torch transformers"
    found = json.loads(done.stdout)
    folder = run_folder(RunConfig(encoder=encoder, temperature=0.02, dropout=0.0, query_length=32, passage_length=64, languages="de,en,th", batch_size=8, steps=4, validate_every=2, checkpoint_every=2))
    assert found["folder"] == folder.as_posix() and (tmp_path / folder / "metrics.json").exists()

    assert main(["evaluate", found["encoder_folder"], "--json", "--quiet", "--measures", "map,recall@3", "--save", str(tmp_path / "scores"), "--k", "3"]) == 0
    scores = json.loads(capsys.readouterr().out)["scores"]["sample"]
    assert scores["averages"]["multi"]["map"]["value"] == pytest.approx(found["after"]["sample"]["multi"]["map"]["value"], abs=1e-6)
    assert {path.name for path in (tmp_path / "scores" / "sample").iterdir()} == {"metrics.json", "per_query.parquet", "multi.run", "multi.qrels", "mono.run", "mono.qrels"}
    assert len((tmp_path / "scores" / "sample" / "multi.run").read_text().splitlines()) == 3 * scores["n_queries"]
    for task in ("mono", "multi"):  # another tool comes to the same value from these two files alone
        qrels, ranking = (read(str(tmp_path / "scores" / "sample" / f"{task}.{kind}")) for read, kind in ((ir_measures.read_trec_qrels, "qrels"), (ir_measures.read_trec_run, "run")))
        theirs = ir_measures.calc_aggregate([ir_measures.R @ 3], qrels, ranking)[ir_measures.R @ 3]
        assert theirs == pytest.approx(scores["averages"][task]["recall@3"]["value"], abs=0.01), task

    assert main(["run", "--encoder", encoder, *SMALL, "--reports", str(tmp_path / "reports"), "--quiet"]) == 0, "read, not computed again"
    text, errors = capsys.readouterr()
    assert found["encoder_folder"] in text and "recall@100" in text and "training" not in errors


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_examples_and_does_not_load_torch(name):
    done = command(name, "--help")
    assert done.returncode == 0 and f"\n  hybrid-ir {name}" in done.stdout.partition("examples:")[2] and done.stderr.strip() == "imported"


def test_the_command_alone_lists_its_commands():
    done = command("--help")
    assert done.returncode == 0 and all(f"\n    {name}" in done.stdout for name in COMMANDS)
    assert command().returncode == 2


def test_without_options_it_is_the_main_job():
    "The defaults lead to the folder that `make run` fills."
    notebook = nbformat.read(ROOT / "nbs" / "run.ipynb", as_version=4)
    (cell,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    values = {}
    exec(cell.source, values)
    names = {"encoder", "train", "sampler", "alpha", "languages", "batch_size", "steps", "learning_rate", "temperature", "query_length", "passage_length", "unique_ids", "dropout", "validate_every", "seed", "device", "precision"}
    expected = RunConfig(benchmarks=values["benchmark"], checkpoint_every=values["validate_every"], **{name: values[name] for name in names})
    assert read_config(build_parser().parse_args(["run"])) == expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("run --sampler hybird", "'hybird' (choose from"), ("run --steps ten", "--steps: invalid whole number value: 'ten'"), ("run --alpha 2", "alpha must be a number from 0 to 1, not 2.0"),
        ("run --encoder me5", "unknown encoder 'me5'; valid: me5-small-q4"), ("run --benchmarks xquad", "unknown benchmark 'xquad'; valid: sample, xquad_r"), ("run --train parallel_doc", "valid: sample, parallel_docs"),
        ("run --batch-size 500 --encoder use-multilingual-v3", "a batch_size up to 86 works"), ("evaluate me5-small-q4 --tasks multy", "unknown task 'multy'; valid: mono, cross, multi"),
        ("run --precision int8", "'int8' (choose from"), ("evaluate use-multilingual-v3 --device cpu --precision int8", "'use-multilingual-v3' cannot encode in 'int8'"),
        ("evaluate me5-small-q4 --benchmarks ,,", "--benchmarks ',,' names nothing"), ("evaluate me5-small-q4 --measures ,", "--measures ',' names nothing"), ("evaluate me5-small-q4 --tasks ,", "--tasks ',' names nothing"),
        ("evaluate me5-small-q4 --measures map@x", "map@x"), ("evaluate me5-small-q4 --benchmarks sample:xx", "'xx'; valid: ar"), ("evaluate", "ENCODER"),
        ("sample-batches --batches 0", "batches must be a whole number of at least 1, not 0"), ("study --only [", "'[' is not a regular expression"), ("study --encoder me5", "valid: use-multilingual-v3"), ("inform", "'inform' (choose from"),
    ],
)  # fmt: skip
def test_wrong_use_is_one_line_with_the_valid_values(words, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT if words.startswith("study") else tmp_path)
    assert main(words.split()) == 2
    text, errors = capsys.readouterr()
    assert not text and len(errors.splitlines()) == 1 and message in errors and ": error: " in errors, errors


def test_failures_are_one_line_and_debug_adds_the_traceback(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("HYBRID_IR_DATA", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for words in (["sample-batches", "--train", "mlqa_test", "--languages", "de,es"], ["study", "--list"]):
        assert main(words) == 1
        text, errors = capsys.readouterr()
        assert not text and len(errors.splitlines()) == 1 and errors.startswith(f"hybrid-ir {words[0]}: error: "), errors
    assert main(["study", "--list", "--debug"]) == 1
    errors = capsys.readouterr().err
    assert "Traceback" in errors and "needs a checkout" in errors.splitlines()[-1]


def test_a_folder_that_cannot_be_written_stops_the_evaluation_before_it_starts(encoder, capsys, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setattr("hybrid_ir.encoders.load_encoder", lambda *words, **options: pytest.fail("the encoder was loaded"))
    assert main(["evaluate", encoder, "--save", str(tmp_path / "file" / "scores")]) == 1
    assert str(tmp_path / "file") in capsys.readouterr().err


def test_sample_batches_are_those_of_the_run(capsys):
    words = ["sample-batches", "--sampler", "cross", "--languages", "de,en,th", "--batch-size", "8", "--batches", "10", "--show", "2", "--seed", "3"]
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["kinds"] == {"cross": 10} and found["repeated_ids"] == 0 and sum(map(sum, found["language_pairs"])) == 80
    assert [len(batch) for batch in found["shown"]] == [8, 8] and all(pair["query_language"] != pair["passage_language"] for batch in found["shown"] for pair in batch)
    config = RunConfig(sampler="cross", languages="de,en,th", batch_size=8, seed=3)
    pairs, sampler = training_batches(config.load_pairs(), config.options())
    assert [pairs.table[int(row)]["query"] for row in sampler.next_batch()[:, 0]] == [pair["query"] for pair in found["shown"][0]]
    assert main(words) == 0
    assert "10 batches of 8 (10 cross)" in capsys.readouterr().out


def test_study_lists_the_matrix(capsys, monkeypatch):
    monkeypatch.chdir(ROOT / "nbs")
    assert main(["study", "--list", "--encoder", "use-multilingual-v3", "--only", "hybrid.*seed 0", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    runs = [row["run"].partition(": ")[0] for row in found["runs"]]
    assert "use-multilingual-v3 hybrid, alpha 0.25, seed 0" in runs and "use-multilingual-v3 hybrid, ids may repeat, seed 0" in runs and not [run for run in runs if "seed 1" in run or "cross" in run]
    complete = [row for row in found["runs"] if row["complete"]]
    assert found["complete"] == len(complete) > 0 and all((ROOT / row["folder"] / "metrics.json").exists() for row in complete)
    assert main(["study", "--list", "--only", "no such run"]) == 0
    assert capsys.readouterr().out == "0 of 0 complete\n"


def test_study_computes_with_the_script_of_the_checkout(capfd, monkeypatch, tmp_path):
    (tmp_path / "tools").mkdir()
    (tmp_path / "nbs").mkdir()
    (tmp_path / "nbs" / "run.ipynb").touch()
    (tmp_path / "tools" / "study.py").write_text("import os, sys; print(os.getcwd(), sys.argv[1:]); sys.exit('seed 1' in sys.argv)")
    monkeypatch.chdir(tmp_path / "nbs")
    assert main(["study", "--encoder", "use-multilingual-v3", "--only", "seed 0", "--reports", "--json"]) == 0
    text, errors = capfd.readouterr()
    assert json.loads(text)["complete"] == 0 and f"{tmp_path} ['--encoder', 'use-multilingual-v3', '--only', 'seed 0', '--reports']" in errors
    assert main(["study", "--only", "seed 1"]) == 1
    text, errors = capfd.readouterr()
    assert not text and "tools/study.py stopped with code 1" in errors.splitlines()[-1]


def test_info_says_which_data_are_there(capsys, monkeypatch, tmp_path):
    (tmp_path / "xquad_r").mkdir()
    monkeypatch.setenv("HYBRID_IR_DATA", str(tmp_path))
    assert main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["benchmarks"]["xquad_r"] == str(tmp_path / "xquad_r") and found["benchmarks"]["mlqa_r"] == "to download" and found["benchmarks"]["miracl_pool"] == "missing"
    assert found["training_sets"]["sample"] == "shipped" and found["training_sets"]["parallel_docs"] == "missing" and found["packages"]["torch"]
    assert main(["info"]) == 0
    assert f"xquad_r        {tmp_path}" in capsys.readouterr().out


def test_known_languages_of_a_trained_copy(tmp_path, encoder, capsys):
    "A trained copy knows the languages of the encoder it came from."
    folder = load_encoder(encoder).save(tmp_path / "trained")
    settings = json.loads((folder / "hybrid_ir.json").read_text())
    (folder / "hybrid_ir.json").write_text(json.dumps(settings | {"name": "use-multilingual-v3"}))
    assert main(["evaluate", str(folder), "--benchmarks", "sample:known", "--measures", "map", "--tasks", "mono", "--json", "-q"]) == 0
    found = json.loads(capsys.readouterr().out)["scores"]["sample:known"]
    assert found["languages"] == ["ar", "de", "en", "es", "ru", "th", "tr", "zh"] and found["measures"] == ["map"] and found["tasks"] == ["mono"]
    expected = evaluate(load_encoder(str(folder)), load_benchmark("sample", found["languages"]), "mono", measures="map", progress=False)
    assert found["averages"]["mono"]["map"]["value"] == pytest.approx(expected.summary().loc["mono", "map"], abs=1e-6)


def test_the_package_installs_the_command(tmp_path):
    subprocess.run([sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(tmp_path)], cwd=ROOT, check=True, capture_output=True)
    (entries,) = tmp_path.glob("*/entry_points.txt")
    assert "hybrid-ir = hybrid_ir.command_line:main" in entries.read_text()
