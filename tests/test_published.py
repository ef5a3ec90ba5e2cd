"""The published numbers that reports are compared with: complete, consistent with the means of the paper, and shipped."""

import json
import re
import subprocess
import sys
from importlib.resources import files

import numpy as np
import pandas as pd
import pytest

from hybrid_ir.benchmarks import BENCHMARKS, MIRACL_FILES
from hybrid_ir.metrics import parse_measure

SETTINGS = ["mono", "cross", "hybrid"]
# the mean rows of the paper: encoder, benchmark -> mono, cross, hybrid for each of the columns below
COLUMNS = {
    "map": [("mono", "map"), ("cross", "map"), ("multi", "map")],
    "recall": [("mono", "recall@1"), ("cross", "recall@1"), ("multi", "recall@10")],
    "miracl": [("mono", "ndcg@10"), ("mono", "recall@100")],
}
MEANS = [
    ("XLM-R", "xquad_r", COLUMNS["map"], [0.7918, 0.7554, 0.7977, 0.6737, 0.6997, 0.7053, 0.5479, 0.5934, 0.5927]),  # table 3
    ("XLM-R", "xquad_r", COLUMNS["recall"], [0.7035, 0.6554, 0.7086, 0.5623, 0.5898, 0.5976, 0.4785, 0.5155, 0.5169]),
    ("XLM-R", "mlqa_r", COLUMNS["map"], [0.6475, 0.6256, 0.6481, 0.5843, 0.62, 0.6234, 0.4731, 0.5076, 0.5121]),  # table 4
    ("XLM-R", "mlqa_r", COLUMNS["recall"], [0.5463, 0.5221, 0.5476, 0.468, 0.5042, 0.5105, 0.5873, 0.6274, 0.6282]),
    ("LaBSE", "xquad_r", COLUMNS["map"], [0.8083, 0.8008, 0.8167, 0.7519, 0.7618, 0.7672, 0.6517, 0.6791, 0.6817]),  # table 5
    ("LaBSE", "xquad_r", COLUMNS["recall"], [0.7226, 0.7124, 0.7335, 0.6536, 0.6654, 0.6728, 0.5673, 0.5948, 0.5972]),
    ("LaBSE", "mlqa_r", COLUMNS["map"], [0.6807, 0.671, 0.6864, 0.6561, 0.6767, 0.6811, 0.5504, 0.5755, 0.5785]),  # table 6
    ("LaBSE", "mlqa_r", COLUMNS["recall"], [0.5813, 0.5668, 0.588, 0.5459, 0.5661, 0.5754, 0.6708, 0.6951, 0.6941]),
    ("XLM-R", "xquad_r", [("multi", "rank_distance")], [410.2, 295.4, 286.6]),  # table 7
    ("LaBSE", "xquad_r", [("multi", "rank_distance")], [261.5, 225.2, 221.1]),
    ("XLM-R", "mlqa_r", [("multi", "rank_distance")], [287.5, 226.7, 227.1]),  # table 8
    ("LaBSE", "mlqa_r", [("multi", "rank_distance")], [225.3, 198.3, 195]),
    ("XLM-R", "miracl", COLUMNS["miracl"], [0.4148, 0.3993, 0.4054, 0.7683, 0.7487, 0.7628]),  # table 12
    ("LaBSE", "miracl", COLUMNS["miracl"], [0.4551, 0.4184, 0.4411, 0.812, 0.7768, 0.7954]),  # table 13
]


@pytest.fixture(scope="module")
def text() -> str:
    return files("hybrid_ir").joinpath("published.json").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def published(text) -> dict:
    return json.loads(text)


@pytest.fixture(scope="module")
def rows(published) -> pd.DataFrame:
    return pd.DataFrame(published["rows"], columns=published["columns"])


@pytest.mark.parametrize("encoder, benchmark, columns, means", MEANS, ids=[f"{encoder}-{benchmark}-{columns[0][1]}" for encoder, benchmark, columns, _ in MEANS])
def test_averages_are_the_mean_rows_of_the_paper(rows, encoder, benchmark, columns, means):
    half_digit = 0.05 if columns[0][1] == "rank_distance" else 0.00005
    for number, (task, measure) in enumerate(columns):
        of_column = rows[(rows["encoder"] == encoder) & (rows["benchmark"] == benchmark) & (rows["task"] == task) & (rows["measure"] == measure)]
        expected = means[3 * number : 3 * number + 3]
        assert np.abs(of_column[SETTINGS].mean().to_numpy() - expected).max() <= half_digit + 1e-9, (task, measure)


def test_every_mean_row_and_every_language_is_there(rows):
    checked = {(encoder, benchmark, task, measure) for encoder, benchmark, columns, _ in MEANS for task, measure in columns}
    groups = rows.groupby(["encoder", "benchmark", "task", "measure"])["language"]
    assert set(groups.groups) == checked and len(checked) == 32
    for (_, benchmark, _, _), languages in groups:
        known = set(MIRACL_FILES) - {"de", "en", "yo"} if benchmark == "miracl" else set(BENCHMARKS[benchmark].languages)
        assert set(languages) == known, "the languages of the benchmark; the paper leaves three of MIRACL out"
    assert rows.groupby("benchmark").size().to_dict() == {"xquad_r": 2 * 7 * 11, "mlqa_r": 2 * 7 * 7, "miracl": 2 * 2 * 15}


def test_both_tables_are_well_formed(published, rows):
    systems = pd.DataFrame(published["systems"]["rows"], columns=published["systems"]["columns"])
    assert published["columns"] == ["source", "encoder", "benchmark", "task", "measure", "language", *SETTINGS]
    for table, values in ((rows, SETTINGS), (systems, ["value"])):
        keys = [column for column in table.columns if column not in values]
        assert not table.duplicated(keys).any() and table.notna().all(axis=None)
        assert set(table["source"]) <= set(published["sources"]) and set(table["task"]) <= {"mono", "cross", "multi"}
        for benchmark, language in table[["benchmark", "language"]].drop_duplicates().itertuples(index=False):
            assert language in BENCHMARKS[benchmark].languages, (benchmark, language)
        for name in set(table["measure"]) - {"rank_distance"}:
            parse_measure(name)
        shares = table[table["measure"] != "rank_distance"][values]
        assert ((shares > 0) & (shares < 1)).all(axis=None)
    assert (rows[rows["measure"] == "rank_distance"][SETTINGS] > 100).all(axis=None)
    assert set(published["sources"]) == set(rows["source"]) | set(systems["source"]), "every source is quoted"
    assert len(systems) == 6 and set(systems["language"]) == {"yo"}
    assert dict(systems[systems["measure"] == "ndcg@10"][["system", "value"]].itertuples(index=False)) == {"BM25": 0.4059, "mDPR": 0.4439, "mContriever": 0.415}
    assert dict(systems[systems["measure"] == "recall@100"][["system", "value"]].itertuples(index=False)) == {"BM25": 0.7325, "mDPR": 0.8403, "mContriever": 0.7703}


def test_the_notes_follow_from_the_rows(published, rows):
    "Every number that a note gives for XLM-R on XQuAD-R is an average of the rows, of the setting that the note says."
    of = rows[(rows["encoder"] == "XLM-R") & (rows["benchmark"] == "xquad_r") & (rows["task"] == "multi")]
    distance, precision = (of[of["measure"] == measure][SETTINGS].mean() for measure in ("rank_distance", "map"))
    slip = next(note for note in published["notes"] if "295.4" in note)
    assert round(distance["mono"], 1) == 410.2 and "has 410.2 there" in slip
    assert round(distance["cross"], 1) == 295.4 and "295.4 is the average of X-Y" in slip
    rounding = next(note for note in published["notes"] if "Table 1" in note)
    assert f"{precision['cross']:.4f} for X-Y and {precision['hybrid']:.4f} for hybrid" in rounding and precision["cross"] > precision["hybrid"]
    assert f"{precision['cross']:.3f}" == f"{precision['hybrid']:.3f}" == "0.593" and "0.593 for" in rounding
    assert "yo" not in set(rows["language"]), "the last note: the paper leaves Yoruba out"


def test_one_row_stands_on_one_line_and_no_path_in_it(text, published):
    lines = [line.strip().rstrip(",") for line in text.splitlines()]
    for row in published["rows"] + published["systems"]["rows"]:
        assert lines.count(json.dumps(row)) == 1, row
    assert max(map(len, lines)) < 400 and not re.search(r'"(/|~|[A-Za-z]:\\)|/home/|\.\./', text)


def test_it_is_shipped(root, tmp_path):
    code = "import setuptools; kept = {}; setuptools.setup = lambda **options: kept.update(options); exec(open('setup.py').read()); print(kept['package_data'])"
    found = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True).stdout
    assert "'published.json'" in found
    assert "include hybrid_ir/published.json" in (root / "MANIFEST.in").read_text().splitlines()
