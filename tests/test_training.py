"""Training learns, is exact, and loses nothing: resume after kill -9, full disk, NaN, folders of other runs."""

import json
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from tiny import save_tiny

from hybrid_ir import training
from hybrid_ir.encoders import load_encoder
from hybrid_ir.pairs import ParallelPairs, load_pairs
from hybrid_ir.samplers import BatchSampler
from hybrid_ir.training import CheckpointError, TokenBatch, TokenStream, TokenTable, Towers, Trainer, TrainingDiverged, batch_loss, checkpoints, train, training_options, weights_hash

OPTIONS = dict(batch_size=12, steps=20, learning_rate=2e-3, validate_every=5, checkpoint_every=5, seed=3, patience=50, temperature=0.05)


@pytest.fixture(scope="module", params=["bert", "xlm-roberta"])
def any_folder(request, tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def pairs():
    return load_pairs("sample", languages=["de", "en", "th"])


def tiny(folder):
    return load_encoder(str(folder), device="cpu", precision="fp32", query_length=32, passage_length=64)


def test_training_learns(any_folder, pairs):
    encoder = tiny(any_folder)
    result = train(encoder, pairs, sampler="hybrid", progress=False, **OPTIONS | dict(steps=60, learning_rate=1e-3, validate_every=20))
    checks = result.log["validation_loss"].dropna()
    assert checks.min() < checks.iloc[0] and result.best_step > 0 and result.steps == 60 and not result.stopped_early
    losses = result.log["loss"].dropna()
    assert losses.tail(10).mean() < losses.head(10).mean()


def test_same_seed_same_weights(folder, pairs):
    hashes = []
    for seed in (3, 3, 4):
        encoder = tiny(folder)
        train(encoder, pairs, progress=False, **OPTIONS | dict(seed=seed, heldout=0))
        hashes.append(weights_hash(encoder))
    assert hashes[0] == hashes[1] != hashes[2]


@pytest.mark.parametrize("architecture", ["bert", "xlm-roberta"])
def test_compact_vocabulary_is_exact(tmp_path, pairs, monkeypatch, architecture):
    "Training on the rows in use gives the weights of training on the full table."
    folder, trained = save_tiny(tmp_path, architecture), []
    for compact in (True, False):
        encoder = tiny(folder)
        if not compact:
            monkeypatch.setattr(training.CompactVocabulary, "__init__", keep_all_rows)
            monkeypatch.setattr(training.CompactVocabulary, "restore", lambda self: None)
        train(encoder, pairs, progress=False, **OPTIONS | dict(heldout=0, steps=10, dropout=0.0))
        trained.append(encoder.state_dict())
    untouched = tiny(folder).state_dict()
    assert any(not torch.equal(untouched[name], trained[0][name]) for name in untouched)
    for name, values in trained[0].items():
        assert torch.allclose(values, trained[1][name], atol=1e-5), name


def keep_all_rows(self, encoder, token_arrays):
    self.encoder, self.full = encoder, encoder.backbone.get_input_embeddings()
    self.compact, self.tokens = self.full, np.arange(self.full.num_embeddings)
    self.numbers = self.tokens.astype(np.int32)


def test_frozen_word_embeddings_stay(folder, pairs):
    encoder = tiny(folder)
    before = encoder.backbone.get_input_embeddings().weight.clone()
    train(encoder, pairs, progress=False, train_embeddings=False, **OPTIONS)
    assert torch.equal(encoder.backbone.get_input_embeddings().weight, before)
    train(encoder, pairs, progress=False, **OPTIONS)
    assert not torch.equal(encoder.backbone.get_input_embeddings().weight, before)


def test_dropout_changes_training_and_can_be_set(folder, pairs):
    hashes = []
    for dropout in (None, 0.0):
        encoder = tiny(folder)
        train(encoder, pairs, progress=False, dropout=dropout, **OPTIONS | dict(heldout=0, steps=3))
        hashes.append(weights_hash(encoder))
    assert hashes[0] != hashes[1]


@pytest.mark.parametrize("fails", [False, True])
def test_what_training_sets_is_taken_back(folder, pairs, monkeypatch, fails):
    "Dropout and frozen word embeddings are those of one training, also of one that fails."
    encoder = tiny(folder)

    def state():
        return [module.p for module in encoder.modules() if isinstance(module, torch.nn.Dropout)], [parameter.requires_grad for parameter in encoder.parameters()]

    before = state()
    assert all(before[0]) and all(before[1])
    if fails:
        monkeypatch.setattr(Trainer, "step", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError) if fails else nullcontext():
        train(encoder, pairs, progress=False, **OPTIONS | dict(steps=2, heldout=0, dropout=0.0, train_embeddings=False))
    assert state() == before


def test_the_environment_of_accelerate_decides_nothing(folder, pairs, monkeypatch):
    records = []
    for variables in ({}, {"ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}):
        AcceleratorState._reset_state(reset_partial_state=True)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        records.append(train(tiny(folder), pairs, progress=False, **OPTIONS | dict(steps=2, heldout=0)).log.drop(columns="pairs_per_second"))
    assert records[0].equals(records[1])


def test_training_stays_on_the_device_of_the_encoder(folder, pairs, monkeypatch):
    "An earlier training elsewhere (here on a device without memory) is forgotten; processes started for another device are refused."
    trainer = lambda: Trainer(tiny(folder), pairs, training_options(**OPTIONS), None, progress=False)  # noqa: E731
    trainer()
    for state in (PartialState._shared_state, AcceleratorState._shared_state):
        monkeypatch.setitem(state, "device", torch.device("meta"))
    assert trainer().accelerator.device.type == "cpu"
    monkeypatch.undo()
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "meta")
    with pytest.raises(ValueError, match="the encoder is on cpu, but accelerate computes on meta"):
        trainer()
    monkeypatch.undo()
    assert trainer().accelerator.device.type == "cpu"


def test_early_stopping_restores_the_best(folder, pairs):
    encoder = tiny(folder)
    untouched = weights_hash(encoder)
    result = train(encoder, pairs, progress=False, **OPTIONS | dict(learning_rate=3.0, clip=1e6, steps=40, patience=2, warmup=0.0))
    assert result.stopped_early and result.steps == 10 and result.best_step == 0
    assert weights_hash(encoder) == untouched, "a run that only does harm leaves the encoder as it was"


def test_hard_negatives_enter_the_loss(folder):
    plain = [{"id": f"{n}", "query": {"de": f"Frage {n}", "en": f"question {n}"}, "passage": {"de": f"Antwort {n}", "en": f"answer {n}"}} for n in range(30)]
    hard = [record | {"negatives": {"de": [f"falsch {n}"], "en": [f"wrong {n}"]}} for n, record in enumerate(plain)]
    losses = [train(tiny(folder), ParallelPairs.from_records(records), progress=False, hard_negatives=count, **OPTIONS | dict(steps=1, heldout=0, dropout=0.0)).log["loss"][0] for count, records in enumerate((plain, hard))]
    assert losses[1] > losses[0]


# a run in a process of its own, which dies when its log has so many lines
RUN = """
import sys
from hybrid_ir.encoders import load_encoder
from hybrid_ir.pairs import load_pairs
from hybrid_ir.training import train, weights_hash
encoder = load_encoder(sys.argv[1], device="cpu", precision="fp32", query_length=32, passage_length=64)
pairs = load_pairs("sample", languages=["de", "en", "th"])
result = train(encoder, pairs, folder=sys.argv[2], progress=False, **eval(sys.argv[3]))
print(weights_hash(encoder), result.steps, result.best_step)
"""


def run_process(folder, run_folder, options, kill_after: int | None = None) -> str:
    process = subprocess.Popen([sys.executable, "-c", RUN, str(folder), str(run_folder), repr(options)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if kill_after is not None:
        log = Path(run_folder) / "train_log.jsonl"
        while process.poll() is None and not (log.exists() and len(log.read_text().splitlines()) >= kill_after):
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    out, err = process.communicate()
    assert kill_after is not None or process.returncode == 0, err
    return out.strip()


def test_resume_after_kill_is_exact(folder, tmp_path):
    "Killed three times, at any moment, and with dropout: the same weights, the same log."
    options = OPTIONS | dict(steps=40)
    expected = run_process(folder, tmp_path / "undisturbed", options)
    for kill_after in (9, 22, 31):
        assert run_process(folder, tmp_path / "killed", options, kill_after) == ""
    found = checkpoints(tmp_path / "killed")
    assert len(found) in (2, 3) and found[0].name > "checkpoint-00000009"  # 3: killed before the oldest was removed
    assert run_process(folder, tmp_path / "killed", options) == expected
    logs = [[json.loads(line) for line in (tmp_path / name / "train_log.jsonl").read_text().splitlines()] for name in ("undisturbed", "killed")]
    for first, second in zip(*logs, strict=True):
        assert {k: v for k, v in first.items() if k != "pairs_per_second"} == {k: v for k, v in second.items() if k != "pairs_per_second"}


def test_a_finished_run_is_not_trained_again(folder, pairs, tmp_path):
    encoder = tiny(folder)
    first = train(encoder, pairs, folder=tmp_path, progress=False, **OPTIONS)
    again = tiny(folder)
    second = train(again, pairs, folder=tmp_path, progress=False, **OPTIONS)
    assert weights_hash(again) == weights_hash(encoder) and second.to_dict() == first.to_dict()


def test_a_run_that_stopped_early_is_not_trained_on(folder, pairs, tmp_path):
    "Neither in its result nor in its files does a second call change anything; and the checkpoint of the early stop has the sampler after the last batch that was used."
    options = OPTIONS | dict(learning_rate=3.0, clip=1e6, warmup=0.0, steps=40, patience=2, validate_every=3)
    encoder, again = tiny(folder), tiny(folder)
    first = train(encoder, pairs, folder=tmp_path, progress=False, **options)
    assert first.stopped_early and first.steps == 6, "not a step at which a checkpoint is due anyway"
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    second = train(again, pairs, folder=tmp_path, progress=False, **options)
    assert second.to_dict() == first.to_dict() and second.log.equals(first.log) and weights_hash(again) == weights_hash(encoder)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == files
    twin = Trainer(tiny(folder), pairs, training_options(**options), None, progress=False).sampler
    for _ in range(6):
        twin.next_batch()
    saved = training.load_numbers(checkpoints(tmp_path)[-1] / "custom_checkpoint_0.pkl")
    assert saved["rng"] == twin.state_dict()["rng"] and all(map(torch.equal, saved["queues"], twin.state_dict()["queues"]))


@pytest.mark.parametrize("schedule", training.SCHEDULES)
def test_every_schedule_resumes(folder, pairs, tmp_path, schedule):
    options, expected, resumed = OPTIONS | dict(schedule=schedule, steps=6, checkpoint_every=3, heldout=0), tiny(folder), tiny(folder)
    train(expected, pairs, progress=False, **options)
    stopped = Trainer(tiny(folder), pairs, training_options(**options), tmp_path, progress=False)
    for _ in range(3):
        stopped.step()
    training.write_checkpoint(stopped.accelerator, stopped.folder, 3)
    train(resumed, pairs, folder=tmp_path, progress=False, **options)
    assert weights_hash(resumed) == weights_hash(expected)


def test_numbers_of_numpy_are_options_like_others(folder, pairs, tmp_path):
    given = dict(seed=np.int64(3), batch_size=np.int32(12), learning_rate=np.float64(2e-3), temperature=np.float32(0.5), alpha=np.float32(0.5), symmetric=np.bool_(True))
    options = training_options(**given)
    assert options == training_options(**{name: value.item() for name, value in given.items()})
    assert all(type(getattr(options, name)) in (int, float, bool) for name in given)
    results = [train(tiny(folder), pairs, folder=tmp_path, progress=False, **OPTIONS | given | dict(steps=2)) for _ in range(2)]
    assert results[0].to_dict() == results[1].to_dict()


def test_nan_stops_and_keeps_the_last_good_checkpoint(folder, pairs, tmp_path, monkeypatch):
    encoder, calls = tiny(folder), []

    def poisoned(*arguments, **options):
        calls.append(1)
        loss = true_loss(*arguments, **options)
        return loss * float("nan") if len(calls) > 60 else loss

    true_loss = training.info_nce
    monkeypatch.setattr(training, "info_nce", poisoned)
    with pytest.raises(TrainingDiverged, match=r"at step (\d+): not finite.*checkpoint-"):
        train(encoder, pairs, folder=tmp_path, progress=False, **OPTIONS | dict(steps=100, checkpoint_every=2, validate_every=30))
    assert all(torch.isfinite(values).all() for values in encoder.state_dict().values())
    assert len(checkpoints(tmp_path)) == 2
    monkeypatch.setattr(training, "info_nce", true_loss)
    result = train(tiny(folder), pairs, folder=tmp_path, progress=False, **OPTIONS | dict(steps=100, checkpoint_every=2, validate_every=30))
    assert result.steps == 100


def test_full_disk_while_writing_a_checkpoint(folder, tmp_path):
    "The file system refuses to write more (a limit of the process stands for it): the previous checkpoint stays, and the run resumes from it."
    code = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n" + RUN.replace(
        "result = train(", "import hybrid_ir.training as t\nwrite = t.write_checkpoint\n"
        "def limited(accelerator, folder, step):\n    if step > 10: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))\n"
        "    return write(accelerator, folder, step)\nt.write_checkpoint = limited\nresult = train(",
    )  # fmt: skip
    options = OPTIONS | dict(steps=30)
    done = subprocess.run([sys.executable, "-c", code, str(folder), str(tmp_path / "full"), repr(options)], capture_output=True, text=True)
    assert done.returncode != 0 and "CheckpointError" in done.stderr and "checkpoint-00000010 is intact" in done.stderr
    assert [path.name for path in sorted((tmp_path / "full").glob("checkpoint-*"))] == ["checkpoint-00000005", "checkpoint-00000010"]
    assert run_process(folder, tmp_path / "full", options) == run_process(folder, tmp_path / "other", options)


def test_a_damaged_checkpoint_is_named(folder, pairs, tmp_path):
    options = OPTIONS | dict(steps=10, checkpoint_every=10)
    train(tiny(folder), pairs, folder=tmp_path, progress=False, **options)
    weights = next(checkpoints(tmp_path)[-1].glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="cannot read .*checkpoint-00000010"):
        train(tiny(folder), pairs, folder=tmp_path, progress=False, **options)


def test_folders_are_never_mixed(folder, pairs, tmp_path):
    train(tiny(folder), pairs, folder=tmp_path / "run", progress=False, **OPTIONS | dict(steps=5))
    with pytest.raises(ValueError, match="another training run .*options"):
        train(tiny(folder), pairs, folder=tmp_path / "run", progress=False, **OPTIONS | dict(steps=6))
    with pytest.raises(ValueError, match="another training run .*pairs"):
        train(tiny(folder), load_pairs("sample", languages=["de", "en"]), folder=tmp_path / "run", progress=False, **OPTIONS | dict(steps=5))
    other = tiny(folder)
    with torch.no_grad():
        other.backbone.get_input_embeddings().weight[5] += 1
    with pytest.raises(ValueError, match="another training run .*weights"):
        train(other, pairs, folder=tmp_path / "run", progress=False, **OPTIONS | dict(steps=5))
    (tmp_path / "run" / "training.json").unlink()
    with pytest.raises(ValueError, match="their run is unknown"):
        train(tiny(folder), pairs, folder=tmp_path / "run", progress=False, **OPTIONS | dict(steps=5))


def test_wrong_options_fail_before_anything_slow(folder, pairs, monkeypatch):
    monkeypatch.setattr(Trainer, "prepare", lambda self: pytest.fail("training began"))
    encoder = tiny(folder)
    for wrong, message in [
        (dict(sampler="x"), "english, mixed, mono, cross, hybrid"), (dict(alpha=2), "alpha"), (dict(temperature=-1), "temperature"), (dict(temperature=float("nan")), "temperature"),
        (dict(batch_size=5000), "works"), (dict(lr=1), "unknown training option 'lr'; valid: .*learning_rate"), (dict(steps=0), "steps"), (dict(languages=["xx"]), "unknown training language 'xx'"),
        (dict(heldout=0.001), "0.001 of 96 ids is less than"),
        (dict(symmetric="false"), "symmetric must be True or False, not 'false'"), (dict(unique_ids="no"), "unique_ids must be"), (dict(train_embeddings=1), "train_embeddings must be"),
        (dict(query_length=33), "query_length is 33, but the encoder reads 32 tokens"), (dict(passage_length=128), "passage_length is 128, but the encoder reads 64 tokens"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            train(encoder, pairs, progress=False, **OPTIONS | wrong)


def test_gradients_equal_those_of_a_plain_forward_pass(folder, pairs):
    "Sorting by length and cutting into chunks changes no gradient."
    gradients = []
    for budget in (100, 100_000):
        encoder = tiny(folder).eval()
        encoder.token_budget = budget
        tokens = encoder.tokenize(list(pairs.table["query"])[:8], "query") + encoder.tokenize(list(pairs.table["passage"])[:8], "passage")
        vectors = encoder.embed_tokens(tokens)
        training.info_nce(vectors[:8], vectors[8:], 0.05).backward()
        gradients.append([parameter.grad.clone() for parameter in encoder.parameters() if parameter.grad is not None])
    assert all(torch.allclose(first, second, atol=1e-5) for first, second in zip(*gradients, strict=True))


# the same run in any number of processes; the first of them writes the weights
PROCESSES = """
import sys
import torch
from accelerate import PartialState
from hybrid_ir.encoders import load_encoder
from hybrid_ir.pairs import ParallelPairs
from hybrid_ir.training import train
records = [{"id": f"{n}", "query": {"de": f"Frage {n}", "en": f"question {n}"}, "passage": {"de": f"Antwort {n}", "en": f"answer {n}"},
            "negatives": {"de": [f"falsch {n}"] * (n % 3), "en": [f"Antwort {(n + 1) % 60}"]}} for n in range(60)]  # some answer another question of the batch
encoder = load_encoder(sys.argv[1], device="cpu", precision="fp32", query_length=32, passage_length=64)
result = train(encoder, ParallelPairs.from_records(records), folder=sys.argv[4], progress=False, **eval(sys.argv[2]))
if PartialState().is_main_process:
    torch.save({"processes": PartialState().num_processes, "weights": encoder.state_dict(), "losses": result.log["loss"].dropna().tolist(), "validation": result.log["validation_loss"].dropna().tolist()}, sys.argv[3])
"""


def test_two_processes_equal_one(folder, tmp_path):
    "Two processes with half of each batch train the weights of one process with the whole batch, hard negatives and gradient caching included; and so they do in two parts."
    options, found = OPTIONS | dict(steps=6, dropout=0.0, hard_negatives=2, symmetric=True, mini_batch_size=4, validate_every=3, checkpoint_every=3), []
    for number, processes in enumerate((1, 2, 2)):
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]  # `accelerate launch --cpu` starts one process, however many it is asked for
        script = tmp_path / "script.py"
        script.write_text(PROCESSES)
        done = subprocess.run([*launch, str(script), str(folder), repr(options), str(tmp_path / f"{number}.pt"), str(tmp_path / f"{processes}")], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        found.append(torch.load(tmp_path / f"{number}.pt", weights_only=True))
        if number == 1:  # as if both had been killed after step 3
            newest = checkpoints(tmp_path / "2")[-1]
            assert newest.name.endswith("6") and len(checkpoints(tmp_path / "2")) == 2
            shutil.rmtree(newest)
    assert [each["processes"] for each in found] == [1, 2, 2]
    alone, together, again = found
    assert all(torch.equal(values, again["weights"][name]) for name, values in together["weights"].items()) and again["losses"] == together["losses"]
    assert alone["losses"] == pytest.approx(together["losses"], abs=1e-4) and alone["validation"] == pytest.approx(together["validation"], abs=1e-4)
    untouched = tiny(folder).state_dict()
    assert any((alone["weights"][name] - values).abs().max() > 2e-3 for name, values in untouched.items())
    for name, values in alone["weights"].items():
        assert torch.allclose(values, together["weights"][name], atol=2e-4), name


def test_a_batch_that_processes_cannot_share_is_refused():
    from types import SimpleNamespace

    assert training.own_share(12, SimpleNamespace(num_processes=3, process_index=2)) == slice(8, 12)
    with pytest.raises(ValueError, match="batch_size 10 cannot be shared by 3 processes; it must be a multiple of 3"):
        training.own_share(10, SimpleNamespace(num_processes=3, process_index=0))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradient_caching_changes_no_gradient(folder, pairs, monkeypatch, dropout):
    "Portions that are computed again on the way back give the gradient of portions that are kept, bit for bit; without dropout, portions change nothing but the rounding."
    encoder, gradients, batch = tiny(folder), [], BatchSampler(pairs, "cross", batch_size=24, seed=1).next_batch()
    training.set_dropout(encoder, dropout)
    tokens = TokenBatch.from_rows(batch, TokenStream(encoder, pairs, training_options()), pairs)
    for portions, kept in ((5, False), (5, True), (None, False)):
        with monkeypatch.context() as patches:
            if kept:
                patches.setattr(training, "checkpoint", lambda module, *inputs, use_reentrant: module(*inputs))
            torch.manual_seed(0)
            encoder.zero_grad()
            batch_loss(Towers(encoder).train(), tokens, training_options(mini_batch_size=portions)).backward()
            gradients.append(torch.cat([parameter.grad.flatten() for parameter in encoder.parameters() if parameter.grad is not None]))
    assert torch.equal(gradients[0], gradients[1]) and gradients[0].norm() > 1e-3
    assert torch.allclose(gradients[0], gradients[2], atol=1e-5) == (dropout == 0)


def test_gradient_caching_keeps_the_memory_of_a_portion(folder, pairs):
    "A batch of 64 pairs in portions of 4 keeps less for the way back than a batch of 8."
    encoder, kept = tiny(folder), {}
    for size, portions in ((8, None), (64, 4)):
        tokens = TokenBatch.from_rows(BatchSampler(pairs, "mono", batch_size=size).next_batch(), TokenStream(encoder, pairs, training_options()), pairs)
        found, own = {}, {parameter.untyped_storage().data_ptr() for parameter in encoder.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: found.setdefault(tensor.untyped_storage().data_ptr(), tensor) is None or tensor, lambda tensor: tensor):
            batch_loss(Towers(encoder).train(), tokens, training_options(mini_batch_size=portions))
        kept[size] = sum(tensor.untyped_storage().nbytes() for place, tensor in found.items() if place not in own)
    assert 0 < kept[64] < kept[8] / 4


def test_training_with_gradient_caching_gives_the_same_weights(folder, pairs):
    "As near as AdamW allows, which takes a whole step even where a gradient is as small as its rounding."
    start, changes = torch.cat([parameter.flatten() for parameter in tiny(folder).parameters()]).detach(), []
    for portions in (None, 3):
        encoder = tiny(folder)
        train(encoder, pairs, progress=False, mini_batch_size=portions, **OPTIONS | dict(steps=6, dropout=0.0))
        changes.append(torch.cat([parameter.flatten() for parameter in encoder.parameters()]).detach() - start)
    plain, cached = changes
    assert plain.abs().max() > 1e-3 and (cached - plain).norm() < 0.01 * plain.norm()


def test_tokens_in_advance_or_batch_by_batch(folder, pairs, monkeypatch, tmp_path):
    "Pairs with many rows are tokenised while the network computes; the weights are the same, and so they are after a restart."
    weights, options = [], OPTIONS | dict(dropout=0.0, steps=12, checkpoint_every=4, heldout=0)
    for rows in (10**9, 1):
        monkeypatch.setattr(training, "TABLE_ROWS", rows)
        encoder = tiny(folder)
        train(encoder, pairs, progress=False, **options)
        weights.append(torch.cat([parameter.flatten() for parameter in encoder.parameters()]))
    assert torch.allclose(*weights, atol=1e-4)
    stopped = Trainer(tiny(folder), pairs, training_options(**options), tmp_path, progress=False)
    for _ in range(4):
        stopped.step()
    training.write_checkpoint(stopped.accelerator, stopped.folder, 4)
    resumed = tiny(folder)
    train(resumed, pairs, folder=tmp_path, progress=False, **options)
    assert torch.equal(torch.cat([parameter.flatten() for parameter in resumed.parameters()]), weights[1])


def test_options_of_hub_defaults_survive_a_round_trip():
    options = training_options(languages=["de", "en"], steps=7)
    assert options.languages == ("de", "en") and options.steps == 7


def test_repeated_ids_are_masked_only_if_ids_are_unique(folder, pairs):
    "unique_ids=False is the plain loss: an id that stands twice in the batch is a wrong answer of itself."
    encoder = tiny(folder)
    batch = pairs.query_rows[[0, 0, 1, 2]][:, [0, 1, 0, 0]].diagonal()  # the first id in two languages, two other ids in one
    batch = np.stack([batch, batch], axis=1)
    assert len(set(pairs.id_of_row[batch[:, 0]])) == 3
    losses = {}
    with torch.no_grad():
        for unique_ids in (True, False):
            options = training_options(unique_ids=unique_ids, temperature=0.5)
            tokens = TokenStream(encoder, pairs, options)
            losses[unique_ids] = batch_loss(Towers(encoder), TokenBatch.from_rows(batch, tokens, pairs), options).item()
            losses[unique_ids, "no repeat"] = batch_loss(Towers(encoder), TokenBatch.from_rows(batch[1:], tokens, pairs), options).item()
        vectors = encoder.embed_tokens(tokens.take("query", batch[:, 0]) + tokens.take("passage", batch[:, 1]))
        scores = vectors[:4] @ vectors[4:].T / 0.5
        plain = torch.nn.functional.cross_entropy(scores, torch.arange(4)).item()
        scores[0, 1] = scores[1, 0] = float("-inf")
        masked = torch.nn.functional.cross_entropy(scores, torch.arange(4)).item()
    assert losses[False] == pytest.approx(plain, abs=1e-5) and losses[True] == pytest.approx(masked, abs=1e-5) and plain > masked + 0.05
    assert losses[True, "no repeat"] == pytest.approx(losses[False, "no repeat"], abs=1e-6)


@pytest.mark.parametrize("sampler", ["mono", "cross", "hybrid"])
def test_repeated_ids_are_for_training_batches_only(folder, pairs, sampler):
    batches = {}
    for unique_ids in (True, False):
        trainer = Trainer(tiny(folder), pairs, training_options(**OPTIONS | dict(unique_ids=unique_ids, sampler=sampler, batch_size=20, heldout=0.3)), None, progress=False)
        training_part, heldout = pairs.split(0.3, seed=OPTIONS["seed"])
        ids = training_part.id_of_row
        drawn = [ids[trainer.sampler.next_batch()[:, 0]] for _ in range(20)]
        assert all(len(set(batch)) == 20 for batch in drawn) == unique_ids
        batches[unique_ids] = trainer.validation
        for batch in trainer.validation:
            assert len(set(batch.groups)) == len(batch) > 1 and set(batch.groups) <= set(heldout.groups), "validation batches never repeat an id or a passage"
    for first, second in zip(*batches.values(), strict=True):
        assert all(np.array_equal(*texts) for texts in zip(first.texts, second.texts, strict=True)), "so validation losses of both can be compared"


def test_repeated_ids_train_and_resume(folder, pairs, tmp_path):
    options = OPTIONS | dict(unique_ids=False, heldout=0, steps=6, checkpoint_every=3)
    expected, other = tiny(folder), tiny(folder)
    log = train(expected, pairs, folder=tmp_path / "a", progress=False, **options).log
    train(other, pairs, progress=False, **options | dict(unique_ids=True))
    assert len(log) == 6 and weights_hash(expected) != weights_hash(other)
    with pytest.raises(ValueError, match="another training run .*unique_ids"):
        train(tiny(folder), pairs, folder=tmp_path / "a", progress=False, **options | dict(unique_ids=True))
    stopped = Trainer(tiny(folder), pairs, training_options(**options), tmp_path / "b", progress=False)
    for _ in range(3):
        stopped.step()
    training.write_checkpoint(stopped.accelerator, stopped.folder, 3)
    resumed = tiny(folder)
    train(resumed, pairs, folder=tmp_path / "b", progress=False, **options)
    assert weights_hash(resumed) == weights_hash(expected)


def test_training_lengths_cut_in_training_only(folder, pairs):
    "The encoder reads as much as before once training is over, and never more in training than it reads."
    encoder = tiny(folder)
    everything = range(len(pairs))
    longest = lambda table, name: max(len(tokens) for tokens in table.take(name, everything))  # noqa: E731
    whole = TokenTable(encoder, pairs, training_options(), progress=False)
    cut = TokenTable(encoder, pairs, training_options(query_length=6, passage_length=9), progress=False)
    beyond = TokenTable(encoder, pairs, training_options(query_length=500, passage_length=500), progress=False)
    assert longest(cut, "query") == 6 and longest(cut, "passage") == 9 and longest(whole, "query") > 6 and longest(whole, "passage") > 9
    for name, length in (("query", 6), ("passage", 9)):
        for short, full, same in zip(*(table.take(name, everything) for table in (cut, whole, beyond)), strict=True):
            assert np.array_equal(short[:-1], full[: min(length, len(full)) - 1]) and short[-1] == full[-1] and np.array_equal(full, same)
    before, text = encoder.config, ["a question that is far longer than the six tokens of training " * 3]
    train(encoder, pairs, progress=False, **OPTIONS | dict(steps=2, query_length=6, passage_length=9))
    assert encoder.config == before and [len(encoder.tokenize(text, kind)[0]) for kind in ("query", "passage")] == [32, 64]


def test_a_hard_negative_that_answers_another_question_is_no_negative_of_it(folder):
    "One question's hard negative is another's right answer, in another language: with it, only the first question has a harder task."
    records = [{"id": f"{n}", "query": {"de": f"Frage {n}"}, "passage": {"de": f"Antwort {n}", "en": f"answer {n}"}} for n in range(4)]
    encoder, losses = tiny(folder), {}
    for name, wrong in {"none": [], "translation": ["answer 1"], "other": ["answer 9"]}.items():
        pairs = ParallelPairs.from_records([records[0] | {"negatives": {"de": wrong}} if wrong else records[0], *records[1:]])
        column = pairs.languages.index("de")
        rows, options = np.stack([pairs.query_rows[:, column], pairs.passage_rows[:, column]], axis=1), training_options(hard_negatives=1)
        batch = TokenBatch.from_rows(rows, TokenStream(encoder, pairs, options), pairs)
        with torch.no_grad():
            vectors = encoder.embed_tokens(batch.texts)
            losses[name] = batch_loss(Towers(encoder), batch, options).item()
        scores = (vectors[:4] @ vectors[4:].T / options.temperature).double()
        if name == "translation":
            scores[1, 4] = -torch.inf
        assert losses[name] == pytest.approx(torch.nn.functional.cross_entropy(scores, torch.arange(4)).item(), abs=1e-5)
        assert batch.negative_groups.tolist() == {"none": [], "translation": [pairs.groups[1]], "other": [-1]}[name]
    assert losses["none"] < losses["translation"] and losses["none"] < losses["other"]


def test_training_lengths_cut_hard_negatives_and_the_heldout_pairs(folder):
    long = "word " * 40
    records = [{"id": f"{n}", "query": {"de": f"Frage {n} {long}"}, "passage": {"de": f"Antwort {n} {long}"}, "negatives": {"de": [f"falsch {n} {long}"] * 2}} for n in range(40)]
    pairs = ParallelPairs.from_records(records)
    options = training_options(**OPTIONS | dict(sampler="mono", batch_size=4, hard_negatives=1, query_length=5, passage_length=7, heldout=0.2))
    trainer = Trainer(tiny(folder), pairs, options, None, progress=False)
    for batch in (trainer.feed.next(more=False), *trainer.validation):
        assert [len(tokens) for tokens in batch.texts] == [5] * len(batch) + [7] * 2 * len(batch), "questions, passages, one negative each"
    assert not TokenTable(tiny(folder), pairs, training_options(), progress=False).negatives


@pytest.mark.parametrize("name", ["query_length", "passage_length"])
def test_training_lengths_must_hold_a_token(folder, pairs, name):
    for wrong in (2, 0, -1, 6.5, "6", True):
        with pytest.raises(ValueError, match=f"{name} must be a whole number of at least 3, not"):
            train(tiny(folder), pairs, progress=False, **OPTIONS | {name: wrong})
    assert getattr(training_options(**{name: 3}), name) == 3 and getattr(training_options(), name) is None


def test_what_is_given_to_training(tmp_path):
    encoder, pairs = load_encoder(str(save_tiny(tmp_path)), device="cpu"), load_pairs("sample", ["de", "en"])
    with pytest.raises(TypeError, match="`load_encoder.name.` gives, not 'me5-small-q4'"):
        train("me5-small-q4", pairs)
    with pytest.raises(TypeError, match="`load_pairs.name.` gives, not 'sample'"):
        train(encoder, "sample")
    with pytest.raises(ValueError, match="hard_negatives is 2, and the pairs of 'sample' have no negatives"):
        train(encoder, pairs, hard_negatives=2, batch_size=8, steps=1)
