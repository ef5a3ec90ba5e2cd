"""The shipped sample says the same in all 11 languages: by meaning, as a multilingual encoder sees it."""

import numpy as np
import pytest

from hybrid_ir.encoders import load_encoder
from hybrid_ir.pairs import SAMPLE_LANGUAGES, load_pairs, read_paragraphs, sample_file


@pytest.fixture(scope="module")
def encoder():
    return load_encoder("me5-small-q4", device="cpu", precision="fp32")


def paragraphs(language: str) -> list[str]:
    "The text of every paragraph of the sample, training and held out."
    return [paragraph["context"] for split in ("train", "heldout") for paragraph in read_paragraphs(sample_file(language, split))]


def test_each_paragraph_is_nearest_to_its_own_translation(encoder):
    vectors = {language: encoder.encode(paragraphs(language), "passage", progress=False) for language in SAMPLE_LANGUAGES}
    assert all(len(found) == 72 for found in vectors.values())
    for language, found in vectors.items():
        similarity = found @ vectors["en"].T
        assert (similarity.argmax(axis=1) == np.arange(72)).all(), language


def test_each_question_is_nearest_to_its_own_translation(encoder):
    english = load_pairs("sample", languages=["en"])
    reference = encoder.encode(list(english.table["query"]), "query")
    for language in SAMPLE_LANGUAGES:
        pairs = load_pairs("sample", languages=[language])
        assert list(pairs.ids) == list(english.ids)
        nearest = (encoder.encode(list(pairs.table["query"]), "query") @ reference.T).argmax(axis=1)
        assert (nearest == np.arange(len(nearest))).mean() >= 0.85, language  # 0.91 or more has been seen; short questions carry less meaning than paragraphs
