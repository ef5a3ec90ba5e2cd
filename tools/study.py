"""Compute what is missing of the study, and render its reports. `make study`; see `python tools/study.py --help`."""

import argparse
import os
import re
import sys
import time
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
os.chdir(ROOT)
warnings.filterwarnings("ignore", message="IProgress not found")
os.environ["PYTHONWARNINGS"] = "ignore:IProgress not found"

import nbformat  # noqa: E402
import papermill  # noqa: E402
from tqdm import tqdm  # noqa: E402

from hybrid_ir.command_line import study_command  # noqa: E402
from hybrid_ir.experiment import RunConfig, is_complete, run_folder, slug  # noqa: E402
from hybrid_ir.sources import cache_dir, whole_file  # noqa: E402
from hybrid_ir.study import PLANS, choose_settings, describe, report_benchmarks, short_name, study_runs  # noqa: E402

RUN_PARAMETERS = (
    "encoder", "train", "sampler", "alpha", "batch_size", "steps", "learning_rate", "temperature", "query_length", "passage_length",
    "unique_ids", "dropout", "validate_every", "seed", "device", "precision",
)  # fmt: skip


def execute(notebook: str, output: Path, parameters: dict, show: bool = True, title: str = ""):
    "Run a notebook with papermill; what it prints to the error stream (progress bars) is shown. A title takes the place of the notebook's own."
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = cache_dir() / "study" / "drafts" / f"{output.parent.name}-{output.name}"
    temporary.parent.mkdir(parents=True, exist_ok=True)
    streams = {"stderr_file": sys.stderr} if show else {}
    executed = papermill.execute_notebook(f"nbs/{notebook}", str(temporary), parameters=parameters, progress_bar=False, **streams)
    executed.metadata.papermill.output_path = output.as_posix()
    if title:
        heading = next(cell for cell in executed.cells if cell.source.startswith("# "))
        heading.source = re.sub("^# .*", f"# {title}", heading.source)
    with whole_file(output) as path:
        nbformat.write(executed, path)
    temporary.unlink()


def compute(config: RunConfig):
    "One run through `nbs/run.ipynb`."
    parameters = {name: getattr(config, name) for name in RUN_PARAMETERS}
    parameters |= {"benchmark": ",".join(config.benchmarks), "languages": ",".join(config.languages)}
    execute("run.ipynb", cache_dir() / "study" / slug(config.encoder) / f"{run_folder(config).name}.ipynb", parameters)


def render_reports(encoders: list[str]):
    "Every report that has runs to show, then the summary."
    for encoder in encoders:
        for benchmark in report_benchmarks(encoder):
            print(f"report: {encoder}, {benchmark}", flush=True)
            output, parameters = Path("reports") / slug(encoder) / f"{slug(benchmark)}.ipynb", {"encoder": encoder, "benchmark": benchmark}
            execute("report.ipynb", output, parameters, show=False, title=short_name(encoder, benchmark))
    print("report: summary", flush=True)
    execute("summary.ipynb", Path("reports") / "summary.ipynb", {}, show=False)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--encoder", action="append", choices=list(PLANS), help="only this encoder (may be given several times)")
    parser.add_argument("--only", default="", metavar="PATTERN", help="only runs whose description matches this regular expression, e.g. 'hybrid.*seed 0'")
    parser.add_argument("--list", action="store_true", help="show the matrix and what of it is complete, compute nothing")
    parser.add_argument("--reports", action="store_true", help="render the reports from the runs that are complete, compute nothing")
    options = parser.parse_args()
    encoders = options.encoder or list(PLANS)
    if options.list:
        print(study_command(options)[1])
        return
    if not options.reports:
        runs = [config for encoder in encoders for config in study_runs(PLANS[encoder], choose_settings(PLANS[encoder]))]
        runs = [config for config in runs if re.search(options.only, describe(config))]
        missing = [config for config in runs if not is_complete(config)]
        print(f"{len(runs) - len(missing)} of {len(runs)} runs are complete")
        for config in tqdm(missing, desc="study", unit="run"):
            started = time.time()
            print(f"\n{describe(config)}", flush=True)
            compute(config)
            print(f"\ncomplete after {(time.time() - started) / 60:.1f} minutes", flush=True)
    if options.reports or not options.only:
        render_reports(encoders)


if __name__ == "__main__":
    main()
