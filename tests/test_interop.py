"The sampler inside SentenceTransformerTrainer, and encoders as folders of sentence-transformers."

import json
import re
import subprocess
import sys
from functools import partial

import datasets
import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from tiny import bert_tokenizer, save_tiny

from hybrid_ir.benchmarks import load_benchmark
from hybrid_ir.encoders import Encoder, EncoderConfig, UseConfig, UseModel, load_encoder
from hybrid_ir.evaluation import evaluate
from hybrid_ir.interop import HybridBatchSampler, from_sentence_transformer, language_pairs, model_card, save_sentence_transformer, to_sentence_transformer
from hybrid_ir.pairs import ParallelPairs, load_pairs
from hybrid_ir.samplers import batch_kind


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny"), "bert")


@pytest.fixture(scope="module")
def dataset() -> datasets.Dataset:
    "The sample in the form that a user has: shuffled rows, one passage missing, one passage text shared by two ids."
    table = load_pairs("sample").table.rename_columns({"lang": "language"}).select_columns(["id", "language", "query", "passage"]).to_pandas()
    table.loc[3, "passage"] = None
    table.loc[table["id"] == table["id"].iloc[-1], "passage"] = table.loc[table["id"] == table["id"].iloc[0], "passage"].to_numpy()
    return datasets.Dataset.from_pandas(table.sample(frac=1, random_state=0), preserve_index=False)


def trainer(tiny_folder, train_set, out, seen=None, steps=6, **options):
    torch.manual_seed(0)
    model = SentenceTransformer(modules=[(first := Transformer(str(tiny_folder), max_seq_length=32)), Pooling(first.get_embedding_dimension()), Normalize()], device="cpu")
    args = SentenceTransformerTrainingArguments(str(out), **{
        "max_steps": steps, "per_device_train_batch_size": 16, "batch_sampler": HybridBatchSampler, "report_to": "none", "use_cpu": True, "disable_tqdm": True,
        "save_strategy": "no", "prompts": {"anchor": "query: ", "positive": "passage: "}, "learning_rate": 1e-3, **options})
    made = SentenceTransformerTrainer(model, args, train_dataset=train_set, loss=MultipleNegativesRankingLoss(model))
    if seen is not None:  # what reaches the loss, after the data loader, its workers and accelerate
        collate = type(made.data_collator).__call__
        record = lambda self, features: seen.append([(row["anchor"], row["positive"]) for row in features]) or collate(self, features)
        made.data_collator.__class__ = type("Recorder", (type(made.data_collator),), {"__call__": record})
    return made


def check_batches(seen, dataset):
    "Every batch is full, monolingual or cross-lingual, and has no id and no passage group twice; returns the kinds."
    rows = dataset.to_pandas()
    of_query = {row.query: row for row in rows.itertuples()}
    languages_of_passage = rows.dropna(subset="passage").groupby("passage")["language"].agg(set).to_dict()
    shared = {rows["passage"].value_counts().index[0]}
    kinds = []
    for batch in seen:
        asked = [of_query[anchor] for anchor, _ in batch]
        assert len(batch) == 16 and len({row.id for row in asked}) == 16
        assert len({positive for _, positive in batch}) == 16
        for row, (_, positive) in zip(asked, batch):
            assert positive in set(rows.loc[rows["id"] == row.id, "passage"])
        names = {name: number for number, name in enumerate(sorted(set(rows["language"])))}
        passages = np.array([names[min(languages_of_passage[positive])] for _, positive in batch])
        kinds.append(batch_kind(np.array([names[row.language] for row in asked]), passages))
        assert sum(positive in shared for _, positive in batch) <= 1
    return kinds


def test_the_trainer_trains_on_hybrid_batches(tiny_folder, dataset, tmp_path):
    seen = []
    made = trainer(tiny_folder, language_pairs(dataset), tmp_path, seen, steps=12)
    result = made.train()
    kinds = check_batches(seen, dataset)
    assert set(kinds) == {"mono", "cross"} and np.isfinite(result.training_loss)
    assert seen[:6] != seen[6:12]  # the second epoch draws anew
    made.model.save_pretrained(str(tmp_path / "saved"))  # with the card that sentence-transformers writes from the dataset
    assert "anchor" in (tmp_path / "saved" / "README.md").read_text()


def test_options_reach_the_sampler(tiny_folder, dataset, tmp_path):
    seen = []
    trainer(tiny_folder, language_pairs(dataset), tmp_path, seen, batch_sampler=partial(HybridBatchSampler, sampler="mono", languages=["de", "th"])).train()
    languages = {row["query"]: row["language"] for row in dataset}
    assert check_batches(seen, dataset) == ["mono"] * 6
    assert {languages[anchor] for batch in seen for anchor, _ in batch} == {"de", "th"}


def test_ids_that_share_a_passage_never_meet(dataset):
    "In batches of 90 of the 96 ids, two given ids would nearly always meet."
    passages = dataset.to_pandas().groupby("passage")["id"].agg(set)
    one, other = next(ids for ids in passages if len(ids) == 2)
    pairs = language_pairs(dataset)
    ids = {row["query"]: row["id"] for row in dataset}
    for seed in range(4):
        (batch,) = HybridBatchSampler(pairs, 90, seed=seed)
        drawn = [ids[anchor] for anchor in pairs[batch]["anchor"]]
        assert len(set(drawn)) == 90 and not {one, other} <= set(drawn)


def test_a_resumed_training_ends_with_the_same_weights(tiny_folder, dataset, tmp_path):
    whole, rest = [], []
    first = trainer(tiny_folder, language_pairs(dataset), tmp_path / "run", whole, steps=8, save_strategy="steps", save_steps=4, seed=3)
    first.train()
    second = trainer(tiny_folder, language_pairs(dataset), tmp_path / "again", rest, steps=8, seed=3)
    second.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    assert rest[-4:] == whole[-4:]
    for (name, one), other in zip(first.model.state_dict().items(), second.model.state_dict().values()):
        assert torch.equal(one, other), name


def test_several_datasets_and_a_worker_process(tiny_folder, dataset, tmp_path):
    "Each batch comes from one dataset; the dataset's name is added by the trainer, around our transform."
    other = dataset.filter(lambda row: row["language"] in ("de", "en"))
    both = datasets.DatasetDict({"all": language_pairs(dataset), "two": language_pairs(other)})
    prompts = {"all": {"anchor": "query: "}, "two": {"anchor": "Frage: "}}
    seen = []
    trainer(tiny_folder, both, tmp_path, seen, prompts=prompts, dataloader_num_workers=0).train()
    assert len(check_batches(seen, dataset)) >= 6  # accelerate fetches one batch ahead
    loader = trainer(tiny_folder, both, tmp_path, dataloader_num_workers=1).get_train_dataloader()
    assert len(loader) == 12 and next(iter(loader))["anchor_input_ids"].shape[0] == 16


def test_hard_negatives_come_from_the_row_of_the_passage(dataset):
    with_negatives = dataset.filter(lambda row: row["passage"] is not None).map(lambda row: {"wrong": f"{row['language']} wrong {row['id']}"})
    pairs = language_pairs(with_negatives, negatives=["wrong"])
    languages = {row["passage"]: row["language"] for row in with_negatives}
    for row in pairs.select(range(0, 11_000, 997)):
        assert list(row) == ["anchor", "positive", "wrong"] and row["wrong"].startswith(languages[row["positive"]])
    with pytest.raises(ValueError, match="lacks a text in 1 of"):
        language_pairs(dataset.add_column("wrong", [None, *["x"] * (len(dataset) - 1)]), negatives=["wrong"])


def test_parallel_pairs_of_several_sets_work_as_they_are():
    "Every batch comes from one set, and set_exponent decides how often each is drawn."
    sets = [load_pairs("sample", languages=["de", "en"]), load_pairs("sample", languages=["de", "en"], split="heldout")]
    pairs = ParallelPairs.concat(sets)
    made = language_pairs(pairs)
    assert len(made) == 4 * pairs.n_ids
    rows = made.with_format("numpy")[:]
    batches = [batch for epoch in range(12) for sampler in [HybridBatchSampler(made, 24, seed=epoch, set_exponent=0.0)] for batch in sampler]
    of_batch = [set(pairs.sets[pairs.id_of_row[rows["anchor_row"][batch]]]) for batch in batches]
    assert all(len(numbers) == 1 for numbers in of_batch) and 0.3 < np.mean([numbers == {1} for numbers in of_batch]) < 0.7


def test_wrong_datasets_are_refused(dataset):
    twice = datasets.concatenate_datasets([dataset, dataset.select([0])])
    with pytest.raises(ValueError, match=rf"has two rows in .*, the second is row {len(dataset)}"):
        language_pairs(twice)
    with pytest.raises(ValueError, match="row 0 has no language"):
        language_pairs(dataset.remove_columns("language").add_column("language", [None, *["en"] * (len(dataset) - 1)]))
    pairs = language_pairs(dataset)
    with pytest.raises(ValueError, match="shuffled, split or filtered"):
        HybridBatchSampler(pairs.select(range(100)), 16)
    with pytest.raises(ValueError, match="language_pairs made"):
        HybridBatchSampler(pairs.with_format("numpy"), 16)
    with pytest.raises(ValueError, match="alpha must be a number"):
        HybridBatchSampler(pairs, 16, alpha=2)


def random_use_encoder() -> Encoder:
    "The architecture of use-multilingual-v3, small, with random weights."
    torch.manual_seed(0)
    tokenizer = bert_tokenizer()
    backbone = UseModel(UseConfig(vocab_size=len(tokenizer), hidden_size=32, branch_size=16, dense_size=24, pad_token_id=0))
    return Encoder(backbone.eval(), tokenizer, EncoderConfig("use-multilingual-v3", "pooler", "", "", 16, 64), "fp32")


@pytest.mark.parametrize("kind", ["bert mean", "bert cls", "bert pooler", "xlm-roberta mean", "use"])
def test_an_exported_folder_gives_the_same_vectors(kind, tmp_path, tiny_folder, dataset):
    if kind == "use":
        encoder = random_use_encoder()
    else:
        architecture, pooling = kind.split()
        folder = tiny_folder if architecture == "bert" else save_tiny(tmp_path / "xlmr", architecture)
        encoder = load_encoder(str(folder), device="cpu", precision="fp32", pooling=pooling, query_prefix="query: ", passage_prefix="passage: ", query_length=12, passage_length=40)
    folder = save_sentence_transformer(encoder, tmp_path / "exported")
    model = SentenceTransformer(str(folder), device="cpu")
    texts = [*dataset["query"][:60], " ".join(dataset["query"][:30])]  # the last is longer than any limit
    assert np.abs(model.encode_query(texts) - encoder.encode(texts, "query")).max() < 1e-5
    assert np.abs(model.encode_document(texts) - encoder.encode(texts, "passage")).max() < 1e-5
    assert np.abs(model.encode(texts, prompt_name="passage") - encoder.encode(texts, "passage")).max() < 1e-5
    short = ["Mond", "luna", "ay", "rain"]
    assert max(map(len, encoder.tokenize(short, "query"))) < encoder.config.query_length
    assert np.abs(model.encode(short, prompt_name="query") - encoder.encode(short, "query")).max() < 1e-5
    again = load_encoder(str(folder), device="cpu", precision="fp32")
    assert again.config == encoder.config and np.array_equal(again.encode(texts), encoder.encode(texts))
    (folder / "hybrid_ir.json").unlink()
    back = from_sentence_transformer(str(folder), device="cpu", precision="fp32")
    assert back.config.pooling == encoder.config.pooling and np.abs(back.encode(texts, "passage") - encoder.encode(texts, "passage")).max() < 1e-6


@pytest.mark.parametrize("name", ["use-multilingual-v3", "me5-small-q4"])
def test_the_example_of_the_card_gives_the_same_vectors(name, tmp_path, dataset):
    "A bundled encoder as a folder; the lines of its own card, in a fresh process."
    encoder = load_encoder(name, device="cpu", precision="fp32")
    folder = tmp_path / "exported"
    save_sentence_transformer(encoder, folder, model_card(encoder, place=str(folder)))
    texts = {"queries": dataset["query"][:8], "passages": [text for text in dataset["passage"][:12] if text]}
    (tmp_path / "texts.json").write_text(json.dumps(texts))
    (example,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)
    for kind in texts:
        example = re.sub(rf'({kind} = .*)\["\.\.\."\]', rf'\1json.load(open("texts.json"))["{kind}"]', example)
    assert example.count("json.load") == 2
    done = subprocess.run([sys.executable, "-c", f"import json\nimport numpy\n{example}\nnumpy.savez('vectors.npz', queries=queries, passages=passages, scores=scores)"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = np.load(tmp_path / "vectors.npz")
    queries, passages = encoder.encode(texts["queries"], "query"), encoder.encode(texts["passages"], "passage")
    assert np.abs(found["queries"] - queries).max() < 1e-5 and np.abs(found["passages"] - passages).max() < 1e-5
    assert np.abs(found["scores"] - queries @ passages.T).max() < 1e-5


@pytest.mark.parametrize("kinds, options, found", [
    ("pool", {"similarity_fn_name": "dot"}, "Transformer, Pooling, pooled by mean, similarity dot"), ("norm pool", {}, "Transformer, Normalize, Pooling, pooled by mean"),
    ("pool norm", {"truncate_dim": 16}, "truncate_dim 16"), ("pool norm norm", {}, "Normalize, Normalize"), ("norm", {}, "pooled by nothing known"),
])  # fmt: skip
def test_models_that_an_encoder_does_not_equal_are_refused(tiny_folder, kinds, options, found):
    modules = [Pooling(32, "mean") if kind == "pool" else Normalize() for kind in kinds.split()]
    model = SentenceTransformer(modules=[Transformer(str(tiny_folder)), *modules], device="cpu", **options)
    with pytest.raises(ValueError, match=f"Normalize, in this order, with truncate_dim None; .*this model is .*{found}"):
        from_sentence_transformer(model)


def test_cosine_needs_no_normalize(tiny_folder):
    model = SentenceTransformer(modules=[Transformer(str(tiny_folder)), Pooling(32, "mean")], device="cpu")
    texts = ["Where is the river?", "A bridge."]
    vectors = from_sentence_transformer(model, device="cpu", precision="fp32").encode(texts)
    assert np.abs(vectors @ vectors.T - model.similarity(model.encode(texts), model.encode(texts)).numpy()).max() < 1e-5


def test_evaluate_gives_both_forms_the_same_scores(tiny_folder):
    encoder = load_encoder(str(tiny_folder), device="cpu", precision="fp32", query_length=20, passage_length=64)
    benchmark = load_benchmark("sample", languages=["de", "en"])
    one, other = (evaluate(each, benchmark, progress=False).summary().to_numpy() for each in (encoder, to_sentence_transformer(encoder)))
    np.testing.assert_allclose(one, other, atol=1e-6)


def test_the_card_says_what_the_hub_reads(tiny_folder):
    encoder = load_encoder(str(tiny_folder), device="cpu", precision="fp32")
    scores = evaluate(encoder, load_benchmark("sample", languages=["de", "en"]), measures=["map"], progress=False)
    pairs = load_pairs("sample")
    with pytest.raises(ValueError, match="licence of .* is not known"):
        model_card(encoder, scores=scores)
    text = model_card(encoder, scores=scores, data=pairs.info, training={"sampler": "cross"}, languages=pairs.languages, license="apache-2.0")
    head = ModelCard(text).data
    assert head.license == "apache-2.0" and head.language == pairs.languages and head.library_name == "sentence-transformers"
    found = {result.dataset_config.removesuffix(", 2 languages"): result.metric_value for result in head.eval_results}
    assert found == scores.summary()["map"].round(5).to_dict()
    assert "CC0-1.0" in text and "sampler `cross`" in text and f"{scores.gap().value:.3f}" in text
