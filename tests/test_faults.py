"""Nothing lost: what is promised, what goes wrong, what happens. Each test leaves a row for the page "Nothing lost".

The long run: `HYBRID_IR_FAULTS=reports/faults.json HYBRID_IR_LONG=1 HYBRID_IR_FUZZ=1250 pytest tests/test_faults.py tests/test_fuzz.py`
"""

import hashlib
import http.server
import json
import os
import pickle
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections import Counter
from contextlib import contextmanager
from html import escape
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from tiny import save_tiny

from hybrid_ir import experiment, index
from hybrid_ir.benchmarks import load_benchmark
from hybrid_ir.encoders import Encoder, load_encoder
from hybrid_ir.evaluation import DamagedFile
from hybrid_ir.experiment import Run, RunConfig, checkpoint_folder, complete_runs, read_run, run
from hybrid_ir.pairs import ParallelPairs, load_pairs
from hybrid_ir.sources import DownloadError, FolderInUse, download, find_file, write_checksums
from hybrid_ir.training import TABLE_ROWS, CheckpointError, checkpoints, train, weights_hash

LONG = os.environ.get("HYBRID_IR_LONG") == "1"
OPTIONS = dict(batch_size=12, steps=16, learning_rate=2e-3, validate_every=4, checkpoint_every=4, seed=3, patience=50)
SMALL = dict(languages="de,en,th", batch_size=8, steps=6, validate_every=3, checkpoint_every=3, learning_rate=1e-3, query_length=32, passage_length=64)
RESUME = "a run goes on where it stopped, and ends with the same weights"
FOLDERS = "one run, one folder, one process"
DAMAGE = "what is read is what was written, or an error says what is damaged"
ROOM = "a disk that is full or read-only is named, and nothing that was whole is harmed"
DOWNLOADS = "a download is whole and right, or it is not there"
PROGRAMS = "no program that came with data or weights is run"
SAME = "the same configuration gives the same numbers"
MEMORY = "memory does not grow with the data beyond a stated budget"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("bert") / "tiny")


@pytest.fixture(scope="module")
def pairs():
    return load_pairs("sample", languages=["de", "en", "th"])


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HYBRID_IR_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HYBRID_IR_DATA", raising=False)
    monkeypatch.setenv("NO_PROXY", "*")


def tiny(folder):
    return load_encoder(str(folder), device="cpu", precision="fp32", query_length=32, passage_length=64)


def trained(folder, pairs, place, **options) -> str:
    encoder = tiny(folder)
    train(encoder, pairs, folder=place, progress=False, **OPTIONS | options)
    return weights_hash(encoder)


@pytest.fixture(scope="module")
def expected(folder, pairs, tmp_path_factory):
    "The weights of an undisturbed run."
    return trained(folder, pairs, tmp_path_factory.mktemp("undisturbed"))


# -------------------------------------------------------------- killed

# Trains again and again in children of one process (so that torch is imported once), and kills each at a random moment.
KILLER = """
import json, os, random, signal, sys, time
from hybrid_ir import training
from hybrid_ir.encoders import load_encoder
from hybrid_ir.pairs import load_pairs
from hybrid_ir.training import train, weights_hash
from pathlib import Path
encoder, kills, options = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
pairs, resume = load_pairs("sample", languages=["de", "en", "th"]), training.Trainer.resume

def noted(trainer):  # each training notes the step it really begins at
    resume(trainer)
    with open("begun.txt", "a") as lines:
        lines.write(f"{trainer.progress.step}\\n")

training.Trainer.resume = noted

def child(place, result):
    process = os.fork()
    if process:
        return process
    model = load_encoder(encoder, device="cpu", precision="fp32", query_length=32, passage_length=64)
    train(model, pairs, folder=place, progress=False, **options)
    Path(result).write_text(weights_hash(model))
    os._exit(0)

def finish(place, result):
    os.waitpid(child(place, result), 0)
    return Path(result).read_text()

def log_lines():
    log = Path("killed", "train_log.jsonl")
    return log.read_bytes().count(b"\\n") if log.exists() else 0

undisturbed, chance, killed, half = finish("undisturbed", "first.txt"), random.Random(7), 0, 0
while killed < kills:
    target, process, ended = log_lines() + chance.randrange(6), child("killed", "second.txt"), (0, 0)
    while ended == (0, 0) and log_lines() < target:  # some steps further, and then somewhere in the next
        time.sleep(0.001)
        ended = os.waitpid(process, os.WNOHANG)
    if ended == (0, 0):
        time.sleep(chance.uniform(0, 0.05))
        os.kill(process, signal.SIGKILL)
        ended = os.waitpid(process, 0)
    if os.WIFSIGNALED(ended[1]):
        killed += 1
        half += bool(list(Path("killed").glob("*.tmp"))) if Path("killed").exists() else 0
    else:  # it was done before: begin again
        assert Path("second.txt").read_text() == undisturbed
        import shutil; shutil.rmtree("killed")
print(json.dumps({"undisturbed": undisturbed, "resumed": finish("killed", "second.txt"), "kills": killed, "begun": [int(line) for line in open("begun.txt")], "half": half}))
"""


def test_killed_at_random_moments(folder, tmp_path, fault_row):
    kills = 20 if LONG else 5
    options = OPTIONS | dict(steps=40, checkpoint_every=1)
    done = subprocess.run([sys.executable, "-c", KILLER, str(folder), str(kills), json.dumps(options)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    resumed = [step for step in seen["begun"] if step]  # the others began without a checkpoint
    assert seen["resumed"] == seen["undisturbed"] and seen["kills"] == kills and len(set(resumed)) >= (5 if LONG else 1)
    fault_row(RESUME, f"`kill -9` at {kills} random moments, resumed each time",
              f"final weights equal those of an undisturbed run, bit for bit; {len(resumed)} trainings went on from {len(set(resumed))} different checkpoints, {seen['half']} kills fell into the writing of a file")  # fmt: skip


# One run that kills itself before it encodes shard number argv[4] of its evaluations; 0: never. Each shard that is encoded leaves a line.
SHARDS = """
import json, os, signal, sys
from pathlib import Path
from hybrid_ir import experiment, index
from hybrid_ir.experiment import RunConfig, run
log, encode_shard = Path(sys.argv[3] + ".shards"), index.encode_shard

def encode(encoder, folder, number, rows, kind, dtype):
    lines = log.read_text().splitlines() if log.exists() else []
    if len(lines) + 1 == int(sys.argv[4]):
        os.kill(os.getpid(), signal.SIGKILL)
    encode_shard(encoder, folder, number, rows, kind, dtype)
    log.write_text("\\n".join([*lines, f"{folder.name}/{number}"]))

index.encode_shard, experiment.SHARD_ROWS = encode, 32
result = run(RunConfig(encoder=sys.argv[1], **json.loads(sys.argv[2])), sys.argv[3], progress=False)
print(json.dumps(result.after["sample"].summary().to_dict()))
"""


def test_killed_while_encoding_a_benchmark(folder, tmp_path, fault_row):
    def attempt(place: str, stop_at: int = 0):
        return subprocess.run([sys.executable, "-c", SHARDS, str(folder), json.dumps(SMALL), str(tmp_path / place), str(stop_at)], capture_output=True, text=True)

    undisturbed = attempt("undisturbed")
    shards = len((tmp_path / "undisturbed.shards").read_text().splitlines())
    assert undisturbed.returncode == 0, undisturbed.stderr
    for stop_at in (shards // 4, shards - 1):  # before training, and after it
        assert attempt("killed", stop_at).returncode == -signal.SIGKILL
    finished = attempt("killed")
    encoded = (tmp_path / "killed.shards").read_text().splitlines()
    assert finished.stdout == undisturbed.stdout and len(encoded) == len(set(encoded)) == shards
    assert not list((tmp_path / "cache" / "vectors").iterdir()), "shards stay after the scores are saved"
    fault_row(RESUME, "`kill -9` while a benchmark is encoded, before and after training", f"none of {shards} shards is encoded twice; every score equals that of an undisturbed run, bit for bit")



# -------------------------------------------------------------- two processes


def start_run(folder, place: Path, cache: Path, **options) -> subprocess.Popen:
    "A run in a process of its own; it prints its scores at the end."
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HYBRID_IR_CACHE": str(cache), "PYTHONWARNINGS": "always::UserWarning"}
    return subprocess.Popen([sys.executable, "-c", RUN, str(folder), json.dumps(SMALL | options), str(place)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)


def wait_for_training(process: subprocess.Popen, weights: Path):
    "Until the process has written a line of its training log."
    for _ in range(60_000):
        if (weights / "train_log.jsonl").exists():
            return
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.005)
    raise AssertionError("no training has begun")


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_second_run_in_a_folder(folder, pairs, tmp_path, fault_row, monkeypatch):
    config, reports, cache = RunConfig(encoder=str(folder), **SMALL), tmp_path / "reports", tmp_path / "cache"
    first = start_run(folder, reports, cache)
    wait_for_training(first, checkpoint_folder(config))
    os.kill(first.pid, signal.SIGSTOP)  # it holds its folders, and does nothing while the others try
    try:
        before = content(tmp_path)
        second = start_run(folder, reports, cache)
        error = second.communicate()[1]
        assert second.returncode != 0 and re.search(rf"FolderInUse: .*{config.sampler}-{config.key} is in use by process {first.pid} on .*another folder", error), error
        with pytest.raises(FolderInUse, match=f"in use by process {first.pid} "):
            trained(folder, pairs, checkpoint_folder(config))
        assert content(tmp_path) == before, "the second changes no file"
    finally:
        os.kill(first.pid, signal.SIGCONT)
    scores, error = first.communicate()
    assert first.returncode == 0, error
    killed = start_run(folder, tmp_path / "killed", tmp_path / "other")
    monkeypatch.setenv("HYBRID_IR_CACHE", str(tmp_path / "other"))
    wait_for_training(killed, checkpoint_folder(config))
    killed.kill()
    killed.communicate()
    next_one = start_run(folder, tmp_path / "killed", tmp_path / "other")
    again, error = next_one.communicate()
    assert next_one.returncode == 0 and re.search(rf"UserWarning: .*process {killed.pid} on .* did not come to its end; this run goes on", error), error
    assert json.loads(again.splitlines()[-1]) == json.loads(scores.splitlines()[-1])
    fault_row(FOLDERS, "the same run is started twice, and a training into its folder of weights; another run is killed in its training, its lock file stays, and it is started again",
              "the second run and the training are refused, with the number of the first process, and change no file; the first ends as ever. The lock of the killed process holds nothing: a warning names it, the run goes on, every score equals that of the undisturbed run")  # fmt: skip


# -------------------------------------------------------------- damage


def stopped_run(folder, pairs, place: Path) -> Path:
    "A run that was stopped after its checkpoint at step 12; the one of step 8 is still there."
    from hybrid_ir import training

    write = training.write_checkpoint

    def stop(accelerator, target, step):
        write(accelerator, target, step)
        if step == 12:
            raise KeyboardInterrupt

    training.write_checkpoint = stop
    try:
        with pytest.raises(KeyboardInterrupt):
            trained(folder, pairs, place)
    finally:
        training.write_checkpoint = write
    assert [path.name[-2:] for path in checkpoints(place)] == ["08", "12"]
    return checkpoints(place)[-1]


def flip(path: Path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "a bit of the weights flipped": (lambda newest: flip(newest / "model.safetensors"), "model.safetensors has changed"),
    "a bit of the optimiser flipped": (lambda newest: flip(newest / "optimizer.bin"), "optimizer.bin has changed"),
    "the random numbers' state gone": (lambda newest: (newest / "random_states_0.pkl").unlink(), "random_states_0.pkl is missing"),
    "the weights cut off": (lambda newest: os.truncate(newest / "model.safetensors", 1000), "model.safetensors has 1000 bytes instead of"),
    "the checksums gone": (lambda newest: (newest / "checksums.json").unlink(), "checksums.json is missing"),
    "the checksums damaged": (lambda newest: (newest / "checksums.json").write_text("{"), "checksums.json cannot be read"),
}


def test_damaged_checkpoint(folder, pairs, expected, tmp_path, fault_row):
    stopped_run(folder, pairs, tmp_path / "whole")
    for number, (damage, message) in enumerate(DAMAGES.values()):
        place = tmp_path / f"copy{number}"
        shutil.copytree(tmp_path / "whole", place)
        damage(checkpoints(place)[-1])
        with pytest.warns(UserWarning, match=f"checkpoint-00000012 .*{message}.*goes on from .*checkpoint-00000008"):
            assert trained(folder, pairs, place) == expected
    for newest in checkpoints(place := shutil.copytree(tmp_path / "whole", tmp_path / "both")):
        flip(newest / "model.safetensors")
    with pytest.raises(CheckpointError, match="cannot read .*checkpoint-00000012 .*changed.*checkpoint-00000008 .*remove .*both"):
        trained(folder, pairs, place)
    fault_row(DAMAGE, "the newest checkpoint: " + "; ".join(DAMAGES), "found before anything is loaded; a warning names the file, the run goes on from the checkpoint before, final weights equal; if both are damaged, an error names both")


def test_half_deleted_training_folder(folder, pairs, expected, tmp_path, fault_row):
    stopped_run(folder, pairs, tmp_path / "whole")
    log = (tmp_path / "whole" / "train_log.jsonl").read_text()
    for number, name in enumerate(["best.safetensors", "train_log.jsonl"]):
        place = shutil.copytree(tmp_path / "whole", tmp_path / f"copy{number}")
        (place / name).unlink() if number else flip(place / name)
        assert trained(folder, pairs, place) == expected
        assert [json.loads(line)["step"] for line in (place / "train_log.jsonl").read_text().splitlines()][: len(log.splitlines())] == [json.loads(line)["step"] for line in log.splitlines()]
    place = shutil.copytree(tmp_path / "whole", tmp_path / "unknown")
    (place / "training.json").write_text("{")
    with pytest.raises(ValueError, match="training.json is damaged .*use another folder"):
        trained(folder, pairs, place)
    for path in checkpoints(place := shutil.copytree(tmp_path / "whole", tmp_path / "bare")):
        shutil.rmtree(path)
    (place / "train_log.jsonl").write_text('{"step": 1}}\n')
    assert trained(folder, pairs, place) == expected
    fault_row(DAMAGE, "a training folder without its log, with a bit of the best weights flipped, with a damaged identity, without any checkpoint",
              "log and best weights come back from the checkpoint, which holds them too; an unknown identity is refused; without checkpoints the run starts again; final weights equal")  # fmt: skip


def damages_of(whole: bytes, chance: random.Random, number: int):
    "The file gone; cut off at so many places; with so many single bits flipped."
    yield "gone", None
    for place in [0, len(whole) - 1, *(chance.randrange(len(whole)) for _ in range(number))]:
        yield "cut off", whole[:place]
    for place in (chance.randrange(len(whole)) for _ in range(number)):
        yield "flipped", whole[:place] + bytes([whole[place] ^ 1 << chance.randrange(8)]) + whole[place + 1 :]


def same_run(one: Run, other: Run) -> bool:
    tables = [(getattr(one, side)[name], getattr(other, side)[name]) for side in ("before", "after") for name in one.after]
    return (one.config, one.metrics, one.environment) == (other.config, other.metrics, other.environment) and one.log.equals(other.log) and all(
        a.to_dict() == b.to_dict() and a.by_query.equals(b.by_query) for a, b in tables)  # fmt: skip


def test_damaged_run_folder(folder, tmp_path, fault_row):
    "Every file of a complete run, and of the untouched scores it is compared with."
    config, reports, chance, number, counts = RunConfig(encoder=str(folder), **SMALL), tmp_path / "reports", random.Random(5), 100 if LONG else 6, Counter()
    whole = run(config, reports, progress=False)
    files = [path for path in sorted(reports.rglob("*")) if path.is_file() and path.name != "folder.lock"]
    assert {path.relative_to(whole.folder).as_posix() for path in files if whole.folder in path.parents} == {
        "config.json", "environment.json", "metrics.json", "train_log.jsonl", "sample/metrics.json", "sample/per_query.parquet"} and len(files) == 8  # fmt: skip
    for path in files:
        kept = path.read_bytes()
        for kind, damaged in damages_of(kept, chance, number):
            path.unlink() if damaged is None else path.write_bytes(damaged)
            try:
                read = read_run(config, reports) if path.name != "config.json" else complete_runs(reports)[0]
                assert damaged is not None and same_run(read, whole), f"{path}, {kind}: other numbers, and no error"
                counts["blank"] += 1
            except DamagedFile as error:
                assert re.search(rf"{path.name} is (missing|damaged).*; remove {path.parent} to compute it again", str(error)), error
                counts[kind] += 1
        path.write_bytes(kept)
    assert counts["gone"] == len(files) and counts["blank"] < counts.total() / 4
    fault_row(DAMAGE, f"each of the {len(files)} files of a complete run and of its untouched scores: gone, cut off at a random place, a random bit flipped",
              f"{counts['gone']} of {len(files)} that were gone, {counts['cut off']:,} that were cut off and {counts['flipped']:,} with a flipped bit: an error names the file and what to remove. "
              f"The other {counts['blank']:,} were damaged in a space or a line break of JSON and read with equal numbers")  # fmt: skip


def test_half_deleted_run_folder(folder, tmp_path, fault_row):
    config, more = (RunConfig(encoder=str(folder), **SMALL, benchmarks=names) for names in ("sample", ("sample", "sample:de+en")))
    whole = run(config, tmp_path / "reports", progress=False)
    kept = shutil.copytree(whole.folder, tmp_path / "kept")
    (whole.folder / "metrics.json").unlink()
    with pytest.raises(DamagedFile, match="metrics.json is missing; remove"):
        run(config, tmp_path / "reports", progress=False)
    shutil.copy(kept / "metrics.json", whole.folder)
    shutil.rmtree(whole.folder / "sample")
    again = run(config, tmp_path / "reports", progress=False)
    assert same_run(again, whole) or again.after["sample"].summary().equals(whole.after["sample"].summary())
    shutil.rmtree(whole.folder)
    again = run(config, tmp_path / "reports", progress=False)
    assert again.after["sample"].summary().equals(whole.after["sample"].summary())
    flip(checkpoint_folder(config) / "encoder" / "model.safetensors")
    with pytest.raises(ValueError, match="encoder: model.safetensors has changed .*train the encoder again"):
        again.load_encoder()
    with pytest.raises(ValueError, match="model.safetensors has changed"):
        run(more, tmp_path / "reports", progress=False)
    assert not (whole.folder / "sample-de+en").exists()
    fault_row(DAMAGE, "a complete run folder loses its metrics.json, the folder of a benchmark, everything; a bit of its trained encoder is flipped",
              "scores without their metrics.json are refused; the benchmark, or the whole, computed again gives equal averages; a flipped bit of the encoder is found before it is used")  # fmt: skip


def test_lost_weights(folder, tmp_path, fault_row, monkeypatch):
    config, more = (RunConfig(encoder=str(folder), **SMALL, precision="fp32", benchmarks=names) for names in ("sample", ("sample", "sample:de+en")))
    whole, known = run(config, tmp_path / "reports", progress=False), experiment.environment
    shutil.rmtree(checkpoint_folder(config))
    with monkeypatch.context() as patch:
        for name in ("load_encoder", "load_pairs", "load_benchmark"):
            patch.setattr(experiment, name, lambda *arguments, **options: pytest.fail("something was loaded"))
        for name, value in {"code": "0123456789", "precision": "bf16", "device": "another", "processor": "another", "torch": "0.1", "threads": 99}.items():
            patch.setattr(experiment, "environment", lambda *arguments: known(*arguments) | {name: value})
            with pytest.raises(ValueError, match=f"{name} was {re.escape(str(whole.environment[name]))}, is {value}.*remove the folder to compute the whole run anew"):
                run(more, tmp_path / "reports", progress=False)
    again = run(more, tmp_path / "reports", progress=False)
    assert (again.metrics, again.environment) == (whole.metrics, whole.environment) and again.log.equals(whole.log) and again.after["sample"].by_query.equals(whole.after["sample"].by_query)
    fault_row(SAME, "one more benchmark is asked for where the trained weights of a run are lost: with other code, precision, device, processor, torch or number of threads; then in the same environment",
              "refused before anything is loaded, with the difference and the remedy; in the same environment trained again: log and checksum of the weights equal, nothing that was there is written anew")  # fmt: skip


def test_damaged_cache(tmp_path, fault_row):
    records = [{"id": f"a|{n}", "query": {"en": f"question {n}"}, "passage": {"en": f"passage {n}"}} for n in range(50)]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, records)))
    load_pairs(tmp_path / "mine.jsonl")
    (prepared,) = (tmp_path / "cache" / "pairs").iterdir()
    fingerprint = load_pairs(tmp_path / "mine.jsonl").fingerprint
    damages = {"rows.arrow has changed": lambda: flip(prepared / "rows.arrow"), "rows.arrow has 200 bytes": lambda: os.truncate(prepared / "rows.arrow", 200), "written.json has": lambda: (prepared / "written.json").write_text("{"),
               "rows.arrow is missing": lambda: (prepared / "rows.arrow").unlink(), "checksums.json is missing": lambda: (prepared / "checksums.json").unlink()}  # fmt: skip
    for message, damage in damages.items():
        damage()
        with pytest.warns(UserWarning, match=f"mine-.*{message}.*prepared again"):
            pairs = load_pairs(tmp_path / "mine.jsonl")
        assert pairs.fingerprint == fingerprint and pairs.table["query"][:] == [record["query"]["en"] for record in records]
        assert [path.name for path in prepared.parent.iterdir()] == [prepared.name]
    ParallelPairs.from_records(records)
    (other,) = [path for path in prepared.parent.iterdir() if path != prepared]
    flip(other / "rows.arrow")
    with pytest.warns(UserWarning, match="rows.arrow has changed"):
        assert ParallelPairs.from_records(records).table["query"][:] == [record["query"]["en"] for record in records]
    fault_row(DAMAGE, "a prepared table in the cache: a bit flipped, cut off, a file gone, its description damaged", "found when the table is opened; a warning names the file, and it is prepared again from its source")


# -------------------------------------------------------------- disks


@contextmanager
def small_disk(size: int):
    "A folder on a file system of its own with `size` bytes, if this process may mount one; else a limit on the size of files."
    place = Path(tempfile.mkdtemp())
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)], capture_output=True).returncode == 0 if shutil.which("mount") else False
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if not mounted:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 4, hard))
    try:
        yield place, "a file system of its own, full" if mounted else "a limit of the process on the size of files"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        if mounted:
            subprocess.run(["umount", "-l", str(place)], check=True)
        shutil.rmtree(place, ignore_errors=True)


def test_full_disk(folder, pairs, expected, tmp_path, fault_row, server, monkeypatch):
    "Training, preparing pairs, downloading: each until the disk is full."
    newest = stopped_run(folder, pairs, tmp_path / "whole")
    best, state = (newest / "best.safetensors").stat().st_size, sum(path.stat().st_size for path in newest.iterdir())
    with small_disk(2 * best + state + state // 2) as (place, kind):  # room for the first checkpoint, not for the second
        if "limit" not in kind:
            with pytest.raises(CheckpointError, match=r"cannot write .*checkpoint-\d+ is intact: make room"):
                trained(folder, pairs, place / "run")
            intact = checkpoints(place / "run")
            assert intact and not list((place / "run").glob("*.tmp"))
            shutil.copytree(place / "run", tmp_path / "run")
            shutil.rmtree(place / "run")
            assert trained(folder, pairs, tmp_path / "run") == expected
        monkeypatch.setenv("HYBRID_IR_CACHE", str(place / "cache"))
        records = ({"id": f"a|{n}", "query": {"en": f"question {n}"}, "passage": {"en": f"passage {n} " * 200}} for n in range(20_000))
        with pytest.raises(OSError, match="pairs cannot be written .*HYBRID_IR_CACHE"):
            ParallelPairs.from_records(records)
        assert list((place / "cache" / "pairs").iterdir()) == [], "nothing half-written"
        with pytest.raises(DownloadError, match="big.bin: cannot write .*(No space left|too large)"):
            download(f"{server.url}/big.bin", place / "big.bin", progress=False)
        assert not (place / "big.bin").exists()
    fault_row(ROOM, f"the disk fills up ({kind}) during training, while pairs are prepared, during a download",
              "training: the checkpoint before is intact and named, nothing half-written stays, and resumed with room the final weights are equal; pairs and download: an error names the folder, nothing half-written stays")  # fmt: skip


def test_full_disk_of_a_run(folder, tmp_path, fault_row, monkeypatch):
    "The disk of the reports; the disk of the cache while vectors of an evaluation are written."
    config, encode_shard, encoded = RunConfig(encoder=str(folder), **SMALL), index.encode_shard, []
    monkeypatch.setattr(experiment, "SHARD_ROWS", 32)
    monkeypatch.setattr(index, "encode_shard", lambda encoder, folder, number, *rest: (encode_shard(encoder, folder, number, *rest), encoded.append(f"{folder.name}/{number}")))
    whole = run(config, tmp_path / "undisturbed", progress=False)
    shards, size = len(encoded), sum(-(-path.stat().st_size // 4096) * 4096 for path in (tmp_path / "undisturbed").rglob("*") if path.is_file())
    prepared = sum(path.stat().st_size for path in (tmp_path / "cache" / "pairs").rglob("*") if path.is_file())
    full = "cannot be written .*make room"
    for number, share in enumerate((0.2, 0.4, 0.6, 0.8)):
        monkeypatch.setenv("HYBRID_IR_CACHE", str(tmp_path / f"cache{number}"))
        with small_disk(int(size * share)) as (place, kind):
            if "limit" in kind:
                pytest.skip("needs a file system of its own")
            with pytest.raises(OSError, match=full):
                run(config, place / "reports", progress=False)
            assert not list(place.rglob("*.partial")), "nothing half-written"
            moved = shutil.copytree(place / "reports", tmp_path / f"reports{number}")
        assert run(config, moved, progress=False).after["sample"].by_query.equals(whole.after["sample"].by_query)
    encoded.clear()
    with small_disk(prepared + 100_000) as (place, kind):
        monkeypatch.setenv("HYBRID_IR_CACHE", str(place / "cache"))
        with pytest.raises(OSError, match=full):
            run(config, tmp_path / "reports", progress=False)
        assert 0 < len(encoded) < shards // 2 and not list((tmp_path / "reports").rglob("metrics.json"))
        shutil.copytree(place / "cache", tmp_path / "larger")
    monkeypatch.setenv("HYBRID_IR_CACHE", str(tmp_path / "larger"))
    assert run(config, tmp_path / "reports", progress=False).after["sample"].by_query.equals(whole.after["sample"].by_query)
    assert len(encoded) == len(set(encoded)) == shards
    fault_row(ROOM, f"the disk of a run folder fills up ({kind}), at four sizes; the disk of the cache, while the vectors of a benchmark are written in shards",
              "an error says what cannot be written and that room is needed, nothing half-written stays; continued with room, every score equals that of an undisturbed run, and no shard is encoded twice")  # fmt: skip


@contextmanager
def read_only():
    "A folder that this process cannot write: without the rights, and as root with another user's rights for a while."
    place = Path(tempfile.mkdtemp())
    place.chmod(0o555)
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(65534)
    try:
        yield place
    finally:
        if is_root:
            os.seteuid(0)
        place.chmod(0o755)
        shutil.rmtree(place)


def test_read_only_folder(folder, pairs, tmp_path, fault_row, server, monkeypatch):
    encoder, config, open_reports = tiny(folder), RunConfig(**SMALL), Path(tempfile.mkdtemp())
    open_reports.chmod(0o777)
    for computing in ("encode", "forward"):  # neither a text is encoded nor a step trained
        monkeypatch.setattr(Encoder, computing, lambda *arguments, **options: pytest.fail("something was computed"))
    with read_only() as place:
        for action, message in [
            (lambda: train(encoder, pairs, folder=place / "run", progress=False, **OPTIONS), "run cannot be written .*choose a folder that can"),
            (lambda: ParallelPairs.from_records([{"id": "a", "query": {"en": "q"}, "passage": {"en": "p"}}]), "cannot be written .*set HYBRID_IR_CACHE"),
            (lambda: download(f"{server.url}/good.bin", place / "good.bin", progress=False), "good.bin: cannot write"),
            (lambda: run(config, place, progress=False), "cannot be written .*choose a folder that can"),
            (lambda: run(config, open_reports, progress=False), "cannot be written .*set HYBRID_IR_CACHE"),
        ]:
            monkeypatch.setenv("HYBRID_IR_CACHE", str(place / "cache"))
            with pytest.raises(OSError, match=message) as caught:
                action()
            assert str(place) in str(caught.value) and not list(place.iterdir())
    shutil.rmtree(open_reports)
    fault_row(ROOM, "the folder for training, for reports, for the cache (of pairs, and of a run), for a download is read-only", "an error names the folder, and for all but the download what to set or choose; no text was encoded and no step trained")


# -------------------------------------------------------------- downloads

BODY = bytes(range(256)) * 2000
PAGE = b"<!DOCTYPE html>\n<html><title>Log in</title></html>"


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def answer(self, body: bytes, length: int | None = None, code: int = 200, **headers):
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Connection", "close")
        if length is not None:
            self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = True

    def do_GET(self):
        name = self.path.strip("/").split(".")[0]
        try:
            if name == "good":
                self.answer(BODY, len(BODY))
            elif name == "cut":
                self.answer(BODY[:1000], len(BODY))
            elif name == "chunks":  # chunked transfer that ends without its last chunk
                self.answer(b"%x\r\n%s\r\n" % (1000, BODY[:1000]), Transfer_Encoding="chunked")
            elif name == "silent-end":  # says no length, and ends early
                self.answer(BODY[:1000])
            elif name == "short":  # promises less than it has
                self.answer(BODY, 1000)
            elif name == "other":
                self.answer(BODY[::-1], len(BODY))
            elif name == "page":
                self.answer(PAGE, len(PAGE), Content_Type="application/octet-stream")
            elif name == "loop":
                self.answer(b"", 0, 302, Location="/loop.bin")
            elif name == "elsewhere":
                self.answer(b"", 0, 302, Location="file:///etc/passwd")
            elif name == "drip":
                self.send_response(200)
                self.send_header("Content-Length", "30")
                self.end_headers()
                for place in range(30):
                    self.wfile.write(BODY[place : place + 1])
                    time.sleep(0.03)
            elif name == "stall":
                self.answer(BODY[:1000], len(BODY))
                self.server.released.wait(20)
            elif name == "big":
                self.answer(bytes(20_000_000), 20_000_000)
        except OSError:
            pass

    def finish(self):
        if not self.path.startswith("/stall"):
            super().finish()

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.released, server.url = threading.Event(), f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.released.set()
    server.shutdown()
    server.server_close()


FAULTS = {  # name: (what is wrong, message without a checksum, message with one); None: the download succeeds
    "cut": ("cut off in the middle", "broke off", "broke off"),
    "chunks": ("cut off in a chunked transfer", "broke off", "broke off"),
    "silent-end": ("cut off by a server that names no size", None, "wrong checksum"),
    "short": ("a size that is too small", None, "wrong checksum"),
    "other": ("other bytes of the right size", None, "wrong checksum"),
    "page": ("a page of HTML with the status 200", "a page of HTML", "a page of HTML"),
    "loop": ("a redirect to itself", "redirects", "redirects"),
    "elsewhere": ("a redirect to a file of this machine", "No connection adapters", "No connection adapters"),
    "stall": ("nothing more after a thousand bytes", "no answer in 0.5 seconds", "no answer in 0.5 seconds"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_download(server, tmp_path, fault_row, name):
    fault, plain, checked = FAULTS[name]
    limit = 0.5 if name == "stall" else 30  # seconds of silence
    seen, right = [], hashlib.sha256(BODY).hexdigest()
    for sha256, message in ((None, plain), (right, checked)):
        target = tmp_path / "files" / f"{name}.bin"
        if message is None:
            assert download(f"{server.url}/{name}.bin", target, sha256, progress=False, timeout=limit).exists()
            seen.append("not seen")
            target.unlink()
            continue
        with pytest.raises(DownloadError, match=message) as caught:
            download(f"{server.url}/{name}.bin", target, sha256, progress=False, timeout=limit)
        assert f"{server.url}/{name}.bin" in str(caught.value) and not list(target.parent.iterdir())
        seen.append(re.search(message, str(caught.value))[0])
    outcome = f'error "{seen[1]}", nothing is left' if seen[0] == seen[1] else f'with a recorded checksum: error "{seen[1]}", nothing is left; without one it cannot be seen'
    fault_row(DOWNLOADS, fault, outcome)


def test_slow_download(server, tmp_path, fault_row):
    assert download(f"{server.url}/drip.bin", tmp_path / "drip.bin", progress=False, timeout=0.5).read_bytes() == BODY[:30]
    fault_row(DOWNLOADS, "slow, one byte after the other, for longer than the time limit", "it arrives: the limit is for silence, not for the whole")


def test_damaged_file_in_the_cache(server, tmp_path, fault_row):
    right = hashlib.sha256(BODY).hexdigest()
    path = find_file("good.bin", url=f"{server.url}/good.bin", sha256=right, progress=False)
    flip(path)
    assert find_file("good.bin", url=f"{server.url}/good.bin", sha256=right, progress=False).read_bytes() == BODY
    flip(path)
    with pytest.raises(FileNotFoundError, match=r"its SHA-256 is wrong"):
        find_file("good.bin", url=f"{server.url}/page.bin", sha256=right, progress=False)
    fault_row(DOWNLOADS, "a downloaded file changes in the cache", "with a recorded checksum: it is downloaded again; offline, an error says so")


def test_archive_with_paths_outside(tmp_path, fault_row):
    image = {"image/key": "k", "en": {"caption": ["a dog", "the dog"]}, "de": {"caption": ["ein Hund", "der Hund"]}}
    place = tmp_path / "deep" / "folder"
    place.mkdir(parents=True)
    for name in ("../../captions.jsonl", "/captions.jsonl", "..\\..\\captions.jsonl"):
        with zipfile.ZipFile(place / "captions.zip", "w") as archive:
            archive.writestr(name, json.dumps(image) + "\n")
        try:
            assert len(load_benchmark("xm3600", path=place / "captions.zip").queries) == 2
        except ValueError as error:
            assert "no captions.jsonl in this zip file" in str(error)
        assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["captions.zip"]
    source = "".join((ROOT / "hybrid_ir" / f"{name}.py").read_text() for name in ("sources", "pairs", "benchmarks", "encoders"))
    assert not re.search(r"extractall|\.extract\(|unpack_archive|tarfile|Unzip|Untar", source)
    fault_row(DOWNLOADS, "an archive with paths outside its folder", "archives are read in place and never unpacked: no file is written")


# -------------------------------------------------------------- programs in files


class Bomb:
    "A pickle that writes a file when it is loaded."

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return (Path.write_text, (self.target, "executed"))


def test_programs_in_a_checkpoint(folder, pairs, tmp_path, fault_row):
    names = ["optimizer.bin", "scheduler.bin", "random_states_0.pkl", "custom_checkpoint_0.pkl", "custom_checkpoint_1.pkl", "model.safetensors"]
    stopped_run(folder, pairs, tmp_path / "whole")
    mark = tmp_path / "mark"
    for number, name in enumerate(names):
        for style in ("pickle", "torch"):
            place = shutil.copytree(tmp_path / "whole", tmp_path / f"{number}{style}")
            target = checkpoints(place)[-1] / name
            target.write_bytes(pickle.dumps(Bomb(mark))) if style == "pickle" else torch.save(Bomb(mark), target)
            write_checksums(target.parent)
            with pytest.raises(CheckpointError, match=f"{name} is not a file of numbers|cannot read .*checkpoint-00000012"):
                trained(folder, pairs, place)
            assert not mark.exists(), name
            shutil.rmtree(place)
    torch.save(Bomb(mark), tmp_path / "proof.pt")
    torch.load(tmp_path / "proof.pt", weights_only=False)
    assert mark.exists(), "the bomb works where it is loaded without care"
    fault_row(PROGRAMS, f"a pickle that runs a program in place of each file of a checkpoint ({', '.join(names)}), with right checksums", "refused, with the name of the file; the program did not run")


def test_programs_in_an_encoder_folder(folder, tmp_path, fault_row):
    mark = tmp_path / "mark"
    place = shutil.copytree(folder, tmp_path / "planted")
    (place / "model.safetensors").unlink()
    for style in ("pickle", "torch"):
        target = place / "pytorch_model.bin"
        target.write_bytes(pickle.dumps(Bomb(mark))) if style == "pickle" else torch.save(Bomb(mark), target)
        with pytest.raises(Exception, match=r"(?i)weights|unpickl|pickle|load"):
            tiny(place)
        assert not mark.exists()
    place = shutil.copytree(folder, tmp_path / "code")
    (place / "evil.py").write_text(f"from pathlib import Path\nPath({str(mark)!r}).write_text('executed')\nfrom transformers import BertConfig as EvilConfig, BertModel as EvilModel\n")
    config = json.loads((place / "config.json").read_text())
    for model_type in ("bert", "evil"):  # an architecture that transformers knows itself, and one that only the code knows
        other = shutil.copytree(place, tmp_path / model_type)
        (other / "config.json").write_text(json.dumps(config | {"model_type": model_type, "auto_map": {"AutoConfig": "evil.EvilConfig", "AutoModel": "evil.EvilModel"}}))
    code = "import sys; from hybrid_ir.encoders import load_encoder; print(load_encoder(sys.argv[1], device='cpu').dim, flush=True); load_encoder(sys.argv[2], device='cpu')"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "bert"), str(tmp_path / "evil")], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.stdout.startswith("32\n") and done.returncode != 0 and "trust_remote_code" in done.stderr and not mark.exists(), done.stderr
    fault_row(PROGRAMS, "an encoder folder with a pickle for its weights, or with code of its own", "the pickle is refused and does not run; code that came with weights does not run (`trust_remote_code` is off)")


def test_no_loader_of_programs_in_the_source(fault_row):
    for path in (ROOT / "hybrid_ir").glob("*.py"):
        text = path.read_text()
        assert not re.search(r"\bpickle\b|weights_only\s*=\s*False|allow_pickle\s*=\s*True|trust_remote_code\s*=\s*True|(?<![\w.])(eval|exec)\(|yaml\.load\(", text), path
    fault_row(PROGRAMS, "the source of the package", "no `pickle`, no `weights_only=False`, no `allow_pickle=True`, no `eval`")


# -------------------------------------------------------------- determinism

RUN = """
import json, os, sys, torch
from hybrid_ir.experiment import RunConfig, run
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
result = run(RunConfig(encoder=sys.argv[1], **json.loads(sys.argv[2])), sys.argv[3], progress=False)
print(json.dumps({"metrics": result.after["sample"].summary().to_dict(), "rank_distance": result.after["sample"].bias()["rank_distance"].to_dict(), "losses": result.log["loss"].dropna().tolist(), "threads": result.environment["threads"]}))
"""


def run_with(folder, place: Path, threads: int, **options) -> dict:
    env = {**os.environ, "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive", "HYBRID_IR_CACHE": f"{place}-cache"}
    done = subprocess.run([sys.executable, "-c", RUN, str(folder), json.dumps(SMALL | options), str(place)], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def largest(first: dict, other: dict, difference) -> float:
    "The largest difference between two dicts of dicts of numbers."
    return max(difference(first[name][key], other[name][key]) for name in first for key in first[name])


TOLERANCE = {"fp32": (0.0001, 0.01, 1), "bf16": (0.1, 0.01, 1)}  # losses, measures, rank distance in percent


@pytest.mark.parametrize("precision", TOLERANCE)
def test_determinism(folder, tmp_path, fault_row, precision):
    first, again, other = (run_with(folder, tmp_path / name, threads, steps=8, precision=precision) for name, threads in (("a", 1), ("b", 1), ("c", 2)))
    assert first == again and other["threads"] == 2
    losses = max(abs(a - b) for a, b in zip(first["losses"], other["losses"], strict=True))
    measures = largest(first["metrics"], other["metrics"], lambda a, b: abs(a - b))
    distance = largest({"": first["rank_distance"]}, {"": other["rank_distance"]}, lambda a, b: 100 * abs(a / b - 1))
    allowed = TOLERANCE[precision]
    assert losses < allowed[0] and measures < allowed[1] and distance < allowed[2], (losses, measures, distance)
    fault_row(SAME, f"one configuration in {precision} in two processes; then with two threads instead of one",
              f"every loss, every average of a measure and every rank distance equal, bit for bit; with two threads losses differ by at most {losses:.1g} (tolerance {allowed[0]}), mAP, MRR, nDCG and recall by at most {measures:.1g} (tolerance {allowed[1]}), "
              f"the rank distance of a language by at most {distance:.2g} % (tolerance {allowed[2]} %)")  # fmt: skip


# -------------------------------------------------------------- memory

MEASURE = """
import json, sys, threading, psutil
from hybrid_ir import training
from hybrid_ir.encoders import load_encoder
from hybrid_ir.pairs import load_pairs
process, peaks, done = psutil.Process(), {}, threading.Event()

def private():  # without what is mapped from files, which the system may take back
    memory = process.memory_info()
    return memory.rss - memory.shared

def watch():
    while not done.wait(0.05):
        peaks[phase] = max(peaks.get(phase, 0), private() - before)

file, folder, steps, training.TABLE_ROWS = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
encoder = load_encoder(folder, device="cpu", precision="fp32", query_length=32, passage_length=64)
before, phase = private(), "open"
watcher = threading.Thread(target=watch)
watcher.start()
pairs = load_pairs(file)
phase = "train"
lengths = {kind: len(encoder.tokenize([pairs.table[len(pairs) - 1][kind]], kind)[0]) for kind in ("query", "passage")}
result = training.train(encoder, pairs, sampler="hybrid", steps=steps, batch_size=100, validate_every=steps // 2, progress=False)
done.set()
watcher.join()
print(json.dumps({"rows": len(pairs), "losses": len(result.log), "lengths": lengths, **peaks}))
"""
TOKENS = ("table", "stream")
TEXTS = {"query": 32, "passage": 64}  # tokens: the texts fill both
BYTES_FIXED = 300_000_000  # the libraries, the activations of a batch, buffers of Arrow
BYTES_PER_ROW = 150  # the index of the pairs, the arrays of the sampler, the ids while they are read
BYTES_PER_TOKEN = 4  # of a table that is tokenised once; above `TABLE_ROWS` there is none


@pytest.mark.parametrize("tokens", TOKENS)
def test_memory(folder, tmp_path, fault_row, tokens):
    "From a file that was never opened to a trained encoder, in one process."
    is_table = tokens == "table"
    ids, steps, file = (500_000 if is_table else 600_000) if LONG else 10_000, 300 if LONG else 10, tmp_path / "many.jsonl"
    with file.open("w") as lines:
        for n in range(ids):
            lines.write(json.dumps({"id": f"page{n // 3}|{n}", "query": {lang: f"{n} {lang} " + "a b c d " * 8 for lang in ("en", "de")}, "passage": {lang: f"{n} {lang} " + "d c b a " * 16 for lang in ("en", "de")}}) + "\n")
    limit = TABLE_ROWS if LONG or is_table else 10_000
    done = subprocess.run([sys.executable, "-c", MEASURE, str(file), str(folder), str(steps), str(limit)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    per_row = BYTES_PER_ROW + (BYTES_PER_TOKEN * sum(TEXTS.values()) if is_table else 0)
    budget, grown = BYTES_FIXED + per_row * seen["rows"], max(seen["open"], seen["train"])
    assert seen["rows"] == 2 * ids and seen["losses"] >= steps and seen["lengths"] == TEXTS and grown < budget, seen
    fault_row(MEMORY, f"{seen['rows']:,} pairs ({file.stat().st_size / 1e6:,.0f} MB, texts that fill {TEXTS['query']} and {TEXTS['passage']} tokens) are read from a file for the first time, and an encoder is trained on them for {steps:,} steps of 100, "
              f"with {'all tokens in a table' if is_table else f'texts tokenised batch by batch, as above {limit:,} pairs'}",
              f"memory of the process grows by {seen['open'] / 1e6:,.0f} MB at its highest while the file is read, by {seen['train'] / 1e6:,.0f} MB in training; budget: {budget / 1e6:,.0f} MB ({BYTES_FIXED / 1e6:.0f} MB and {per_row} bytes a pair)")  # fmt: skip


# -------------------------------------------------------------- the table


VARIANTS = {"test_download": FAULTS, "test_determinism": TOLERANCE, "test_memory": TOKENS}


def tests_with_a_row() -> set[str]:
    "The tests of today that write a row."
    names = set()
    for file in ("tests/test_faults.py", "tests/test_fuzz.py"):
        for function in re.findall(r"^def (test_\w+)\(.*\bfault_row\b.*\):", (ROOT / file).read_text(encoding="utf-8"), re.M):
            names |= {f"{file}::{function}" + (f"[{case}]" if case else "") for case in VARIANTS.get(function, [""])}
    return names


def test_the_table_names_tests_that_exist():
    "Every row of the committed table belongs to a test of today, every test has its row, and each says which code it came from."
    rows = json.loads((ROOT / "reports" / "faults.json").read_text(encoding="utf-8"))["rows"]
    assert sorted(row["test"] for row in rows) == sorted(tests_with_a_row())
    for row in rows:
        assert row["promise"] and row["fault"] and row["outcome"] and not re.search(r"/tmp/|/work/|/home/", json.dumps(row))
        assert re.fullmatch(r"[0-9a-f]{10}", row["code"]) and re.fullmatch(r"\d{4}-\d\d-\d\d", row["date"])


def test_the_page_shows_the_table():
    notebook = json.loads((ROOT / "nbs" / "nothing_lost.ipynb").read_text(encoding="utf-8"))
    shown = "".join("".join(output.get("data", {}).get("text/html", "")) for cell in notebook["cells"] for output in cell.get("outputs", []))
    rows = json.loads((ROOT / "reports" / "faults.json").read_text(encoding="utf-8"))["rows"]
    assert shown.count("<tr>") == len(rows) + len({row["promise"] for row in rows})
    assert all(escape(row["outcome"]).replace("`", "") in shown and row["code"] in shown and row["date"] in shown for row in rows), "execute nbs/nothing_lost.ipynb again"
