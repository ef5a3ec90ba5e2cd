"""The study: settings are chosen once, the matrix can be stopped and continued, verdicts follow from intervals, reports from run folders."""

import json
import re
import subprocess
import sys
from dataclasses import replace

import nbformat
import numpy as np
import pandas as pd
import papermill
import pytest
from conftest import ROOT
from tiny import save_tiny

from hybrid_ir import study, study_figures
from hybrid_ir.experiment import is_complete, run
from hybrid_ir.study import CLAIMS, GAP_CLAIMS, PLANS, Plan, choose_settings, judge, judge_all, load_comparison, study_runs, verdict

REPORTS = ROOT / "reports"
CORE = "sample:de+el+en+th"


@pytest.fixture(scope="module")
def small_study(tmp_path_factory):
    "A whole study with a tiny encoder on the sample: (name of the encoder, folder of reports)."
    folder = tmp_path_factory.mktemp("study")
    encoder = str(save_tiny(folder / "tiny-bert"))
    plan = Plan(
        encoder, ("de", "en", "th"), ("mono", "cross", "hybrid"), (0, 1), learning_rates=(1e-3, 3e-3), temperatures=(0.05, 0.1), steps=4, selection_steps=2, selection_ids=6,
        core=(CORE,), large=("sample:de+en",), alphas=(0.25,), train="sample", batch_size=6, validate_every=2, query_length=16, passage_length=32)  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HYBRID_IR_CACHE", str(folder / "cache"))
        patch.setitem(PLANS, encoder, plan)
        settings = choose_settings(plan, folder, progress=False)
        for config in study_runs(plan, settings):
            run(config, folder, progress=False)
        yield encoder, folder


def test_settings_are_chosen_once_and_trial_by_trial(small_study, monkeypatch, tmp_path):
    encoder, folder = small_study
    found = json.loads(study.selection_file(encoder, folder).read_text())
    means = {(trial["learning_rate"], trial["temperature"]): trial["mean"] for trial in found["trials"]}
    assert len(means) == len(found["trials"]) >= 3, "two learning rates at the middle temperature, and one more temperature at least"
    assert means[found["chosen"]["learning_rate"], found["chosen"]["temperature"]] == max(means.values())
    assert all(trial["mean"] == pytest.approx(np.mean([trial[task] for task in ("mono", "cross", "multi")]), abs=1e-4) for trial in found["trials"])
    monkeypatch.setattr(study, "try_settings", lambda *arguments: pytest.fail("tried again"))
    assert choose_settings(PLANS[encoder], folder) == found["chosen"] and not study.at_edge(found["chosen"], found["trials"])
    calls = []

    def stop_at_second(plan, rate, temperature, progress):
        calls.append((rate, temperature))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return {"learning_rate": rate, "temperature": temperature, "steps": plan.selection_steps, "mean": -abs(rate - 3e-3) - abs(temperature - 0.1)}

    monkeypatch.setattr(study, "try_settings", stop_at_second)
    with pytest.raises(KeyboardInterrupt):
        choose_settings(PLANS[encoder], tmp_path)
    assert choose_settings(PLANS[encoder], tmp_path) == {"learning_rate": 3e-3, "temperature": 0.1}
    assert calls == [(1e-3, 0.1), (3e-3, 0.1), (3e-3, 0.1), (1e-2, 0.1), (3e-3, 0.05), (3e-3, 0.2)], "the first trial was not repeated, and both searches went on outwards"


@pytest.fixture
def trials(monkeypatch):
    "Trials that nothing is trained for: a function that sets where the best values lie and returns the list of what was tried."

    def best_at(learning_rate, temperature=0.05):
        def measured(plan, rate, other, progress):
            tried.append((rate, other))
            mean = -abs(np.log(rate / learning_rate)) - abs(np.log(other / temperature))
            return {"learning_rate": rate, "temperature": other, "steps": plan.selection_steps, "mean": mean}

        tried = []
        monkeypatch.setattr(study, "try_settings", measured)
        return tried

    return best_at


@pytest.mark.parametrize("best", [1e-5, 1e-4, 3e-4, 3e-3, 1e-1])
def test_the_search_goes_outwards_until_the_best_lies_inside(best, trials, tmp_path):
    plan, tried = PLANS["me5-small-q4"], trials(best)
    assert choose_settings(plan, tmp_path) == {"learning_rate": best, "temperature": 0.05}
    rates = {rate for rate, _ in tried}
    assert min(rates) < best < max(rates) and len(tried) == len(set(tried))
    saved = study.selection_file(plan.encoder, tmp_path).read_text()
    assert choose_settings(plan, tmp_path)["learning_rate"] == best and study.selection_file(plan.encoder, tmp_path).read_text() == saved, "a choice inside is left alone"


def test_a_choice_at_the_edge_is_made_again(trials, tmp_path):
    plan, path, tried = PLANS["me5-small-q4"], study.selection_file("me5-small-q4", tmp_path), trials(1e-3, 0.01)
    path.parent.mkdir()
    old = {"learning_rate": 3e-4, "temperature": 0.05}
    path.write_text(json.dumps({"trials": [old | {"mean": 9.0}, old | {"temperature": 0.1, "mean": 8.0}], "chosen": old}))
    assert choose_settings(plan, tmp_path) == {"learning_rate": 1e-3, "temperature": 0.01}
    assert (3e-4, 0.05) in tried and (3e-3, 0.05) in tried and (1e-3, 0.005) in tried, "a trial of another plan does not count"
    assert {trial.get("steps") for trial in json.loads(path.read_text())["trials"]} == {None, plan.selection_steps}


def test_the_matrix():
    for plan in (PLANS["use-multilingual-v3"], PLANS["me5-small-q4"]):
        runs = study_runs(plan, {"learning_rate": 1e-4, "temperature": 0.05})
        assert {(config.batch_size, config.train, config.heldout, config.languages) for config in runs} == {(100, "parallel_docs", 0.1, plan.languages)}
        assert not {"el", "vi"} & set(plan.languages) and len(plan.seeds) >= 1
        usual = {(config.sampler, config.seed) for config in runs if config.unique_ids and config.alpha == 0.5}
        assert usual == {(sampler, seed) for sampler in plan.samplers for seed in plan.seeds}
        assert {(config.sampler, config.seed) for config in runs if not config.unique_ids} == {("hybrid", seed) for seed in plan.seeds}
    runs = study_runs(PLANS["use-multilingual-v3"], {})
    assert {config.alpha for config in runs if config.sampler == "hybrid"} == {0.25, 0.5, 0.75}
    wide = {config.sampler: set(config.benchmarks) for config in runs if "xm3600" in config.benchmarks}
    assert set(wide) == {"mono", "cross", "hybrid"} and wide["hybrid"] > wide["mono"] >= {"miracl:yo", "miracl_pool:known"}


def test_a_small_study_from_end_to_end(small_study):
    encoder, folder = small_study
    plan = PLANS[encoder]
    assert all(is_complete(config, folder) for config in study_runs(plan, json.loads(study.selection_file(encoder, folder).read_text())["chosen"]))
    assert study.report_benchmarks(encoder, folder) == [CORE, "sample:de+en"]
    comparison = load_comparison(encoder, CORE, folder)
    assert {name: len(seeds) for name, seeds in comparison.scores.items()} == {"untouched": 1, "mono": 2, "cross": 2, "hybrid": 2, "hybrid, alpha 0.25": 1, "hybrid, ids may repeat": 2}
    rows = judge_all(comparison)
    assert [row["claim"] for row in rows] == [claim.key for claim in (*CLAIMS, *GAP_CLAIMS, *CLAIMS)]
    assert [row["languages"] for row in rows] == ["all"] * 8 + [["el"]] * 5
    for row in rows:
        assert row["low"] <= row["effect"] <= row["high"] and row["verdict"] == verdict(row["low"], row["high"], row["bound"]) and row["seeds"] == 2
        assert len(row["runs"]) == (2 if row["against"] == "untouched" else 4)
        if row["claim"].startswith("gap"):
            assert row["across"] - row["within"] == pytest.approx(row["effect"], abs=1e-6), "a gap narrows by the change across minus the change within"
    difference = comparison.scores["hybrid"][0].summary().loc["multi", "map"] + comparison.scores["hybrid"][1].summary().loc["multi", "map"]
    difference -= comparison.scores["mono"][0].summary().loc["multi", "map"] + comparison.scores["mono"][1].summary().loc["multi", "map"]
    assert next(row["effect"] for row in rows if row["claim"] == "multi") == pytest.approx(difference / 2, abs=1e-3)
    curve = study.alpha_curve(comparison)
    assert list(curve) == [0.0, 0.25, 0.5, 1.0] and {len(seeds) for seeds in curve.values()} == {1}, "only the seed that all values of alpha have"
    assert "repeated ids in 8 batches of 6" in study.ablation_answer([comparison]) and "2 seeds" in study.ablation_answer([comparison])
    assert list(load_comparison(encoder, "sample:de+en", folder).samplers) == ["untouched", "mono", "cross", "hybrid"]
    with pytest.raises(FileNotFoundError, match="no run of the study"):
        load_comparison(encoder, "xquad_r", folder)


def test_how_runs_ended_and_what_computed_them(small_study):
    encoder, folder = small_study
    comparisons = study.all_comparisons(folder)
    runs = study.runs_behind([found for found in comparisons if found.encoder == encoder])
    assert len(runs) == len({config.key for config in study_runs(PLANS[encoder], study.chosen_settings(encoder, folder))}), "each run once"
    table = study.endings(runs)[encoder]
    assert table["runs"] == len(runs) and table["steps at most"] == 4
    assert table["stopped early"] == sum(run.metrics["training"]["stopped_early"] for run in runs)
    losses = runs[0].log["validation_loss"].dropna().tolist()
    assert study.last_fall(runs[0]) == pytest.approx((losses[-2] - losses[-1]) / losses[-2])
    assert f"{len(runs)} by code `{study.code_hash()}`" in study.computed_by(runs) and study.computed_by([]).startswith("0 runs")


@pytest.mark.parametrize("within, across, words", [
    (-0.03, -0.01, "narrower because retrieval within a language fell"), (-0.03, 0.02, "narrower because retrieval within a language fell"),
    (-0.02, 0.03, "narrower because retrieval across languages rose"), (0.01, 0.03, "narrower because retrieval across languages rose"),
    (0.03, 0.01, "wider because retrieval within a language rose"), (-0.01, -0.03, "wider because retrieval across languages fell"),
])  # fmt: skip
def test_a_gap_that_narrows_by_a_loss_says_so(within, across, words):
    row = {"claim": "gap-untouched", "encoder": "an encoder", "benchmark": "xm3600", "against": "untouched", "within": within, "across": across, "effect": across - within}
    row |= {"low": row["effect"] - 0.001, "high": row["effect"] + 0.001, "hybrid": 0.1, "other": 0.1 + row["effect"], "verdict": verdict(row["effect"] - 0.001, row["effect"] + 0.001, 0)}
    assert study.reason_of_gap(row) == words
    answer = study.gap_answer([row | {"claim": claim.key} for claim in GAP_CLAIMS])
    assert ("Yes, but narrower because" in answer) == (words.startswith("narrower") and "fell" in words)
    assert f"within a language {100 * within:+.1f}, across languages {100 * across:+.1f}" in answer


def test_every_figure_of_a_report(small_study):
    comparison = load_comparison(small_study[0], CORE, small_study[1])
    scores = comparison.samplers
    for figure in (
        study_figures.comparison_plot(scores), study_figures.language_difference_map(scores), study_figures.comparison_maps(scores), study_figures.comparison_bias_plot(scores),
        study_figures.published_plot(scores, study.published().query("benchmark == 'xquad_r'"), "ours"), study_figures.validation_plot(comparison.runs), study_figures.gap_plot({"x": scores}),
        study_figures.alpha_plot(study.alpha_curve(comparison)), study_figures.claims_plot(judge_all(comparison)),
    ):  # fmt: skip
        figure.canvas.draw()
    assert list(study_figures.comparison_table(scores).index) == ["untouched", "mono", "cross", "hybrid"]
    assert len(study_figures.seeds_table(scores)) == 15 and len(study_figures.runs_table(comparison.runs)) == 9
    table = study_figures.language_group_table(scores, {"trained": ("de", "en", "th"), "not trained": ("el",)})
    expected = comparison.scores["untouched"][0].by_language("map").loc["el", "el"]
    value, low, high = map(float, re.findall(r"[\d.]+", table.loc[("not trained", "untouched"), "mono"]))
    assert value == pytest.approx(expected, abs=2e-3) and low < value < high
    assert study_figures.comparison_table(scores, study_figures.panel_estimates(scores)).equals(study_figures.comparison_table(scores))
    claims = study_figures.claims_table(judge_all(comparison), evidence=True)
    assert claims["runs"].str.contains(r"\[(?:2|4)\]").all() and claims["verdict"].str.contains("narrower because|wider because").sum() == len(GAP_CLAIMS)


def test_unseen_languages_are_judged_by_their_queries_only(small_study):
    comparison = load_comparison(small_study[0], CORE, small_study[1])
    row = judge(CLAIMS[0], comparison, ("el",))
    means = {name: np.mean([scores.by_language("map").loc["el", "el"] for scores in seeds]) for name, seeds in comparison.samplers.items()}
    assert row["hybrid"] == pytest.approx(means["hybrid"], abs=2e-3) and row["other"] == pytest.approx(max(means["mono"], means["cross"]), abs=2e-3)
    assert study.unseen_languages("me5-small-q4", ["de", "el", "en", "vi"]) == ("el", "vi")
    assert study.unseen_languages("use-multilingual-v3", ["de", "el", "fr", "hi"]) == ("fr",)


def test_verdicts():
    assert [verdict(*case) for case in ((0.1, 0.2, 0.0), (-0.2, -0.1, 0.0), (-0.1, 0.1, 0.0), (float("nan"), 1.0, 0.0))] == ["reproduced", "not reproduced", "not decidable", "not decidable"]
    row = pd.Series({"second": 400.0, "difference": -100.0, "low": -120.0, "high": -80.0})
    assert study.effect_of(CLAIMS[-1], row) == (0.25, 0.2, 0.3)
    assert study.effect_of(GAP_CLAIMS[0], row * [1, 0.001, 0.001, 0.001]) == pytest.approx((0.1, 0.08, 0.12))
    assert study.effect_of(replace(CLAIMS[0]), row) == (-100.0, -120.0, -80.0)


# ---------------------------------------------------------------- the study in the repository


def study_comparisons():
    return [(encoder, benchmark) for encoder in PLANS for benchmark in study.report_benchmarks(encoder, REPORTS)]


def test_summary_and_reports_are_there_and_follow_from_the_runs():
    rows = json.loads((REPORTS / "summary.json").read_text())["claims"]
    assert (REPORTS / "summary.ipynb").exists() and {row["encoder"] for row in rows} <= set(PLANS)
    assert {"claim", "encoder", "benchmark", "effect", "low", "high", "verdict", "runs"} <= set(rows[0])
    for row in rows:
        assert row["verdict"] == verdict(row["low"], row["high"], row["bound"])
        assert all((REPORTS / folder / "metrics.json").exists() for folder in row["runs"])
    encoder, benchmark = "use-multilingual-v3", "mlqa_r:known"
    again = judge_all(load_comparison(encoder, benchmark, REPORTS))
    saved = [row for row in rows if (row["encoder"], row["benchmark"]) == (encoder, benchmark)]
    assert [(row["claim"], row["verdict"], row["runs"]) for row in again] == [(row["claim"], row["verdict"], row["runs"]) for row in saved]
    assert [row["effect"] for row in again] == pytest.approx([row["effect"] for row in saved], abs=1e-6)
    for encoder, benchmark in study_comparisons():
        assert (REPORTS / study.slug(encoder) / f"{study.slug(benchmark)}.ipynb").exists(), f"no report of {encoder} on {benchmark}: make reports"


def test_reports_name_no_path_of_the_machine_that_made_them():
    for path in REPORTS.rglob("*.ipynb"):
        text = path.read_text()
        assert str(ROOT) not in text and "site-packages" not in text, path
        made = json.loads(text)["metadata"]["papermill"]
        assert not made["input_path"].startswith("/") and not made["output_path"].startswith("/"), path


def test_run_folders_are_small_and_without_weights():
    files = [path for path in REPORTS.rglob("*") if path.is_file() and path.suffix not in (".ipynb", ".lock")]  # a run of your own leaves a lock, which git ignores
    assert sum(path.stat().st_size for path in files) < 20e6
    assert not [path for path in files if path.suffix not in (".json", ".jsonl", ".parquet")]


def test_the_report_notebook(tmp_path, monkeypatch):
    monkeypatch.delenv("MPLBACKEND", raising=False)  # the kernel chooses the one that shows figures
    papermill.execute_notebook(str(ROOT / "nbs" / "report.ipynb"), str(tmp_path / "out.ipynb"), parameters={"benchmark": "mlqa_r:known", "reports": str(REPORTS)}, progress_bar=False)
    outputs = [output for cell in nbformat.read(tmp_path / "out.ipynb", as_version=4).cells if cell.cell_type == "code" for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 6


def test_the_study_command_lists_the_matrix():
    done = subprocess.run([sys.executable, str(ROOT / "tools" / "study.py"), "--list", "--encoder", "use-multilingual-v3"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "hybrid, alpha 0.25, seed 0" in done.stdout and "hybrid, ids may repeat" in done.stdout and done.stdout.splitlines()[-1].endswith("complete")
    wrong = subprocess.run([sys.executable, str(ROOT / "tools" / "study.py"), "--encoder", "me5"], capture_output=True, text=True)
    assert wrong.returncode == 2 and "use-multilingual-v3" in wrong.stderr
