"""All tests: every reference notebook through nbdev_test, then pytest. `make test` calls this.

Ends with the line `N passed, N failed` (and `, N skipped`), which counts notebooks and pytest tests alike.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as xml
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
PAPERMILL = ("run", "report", "summary")  # these are run by the tests, with small settings
LIMIT = 900  # seconds for a notebook: one that hangs fails (pytest.ini has the same for a test)


def environment(threads: int) -> dict[str, str]:
    "The environment of a test: data beside the repository if there are any, no hub, a share of the processors."
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "MPLBACKEND": "agg"}
    env["PATH"] = f"{BIN}{os.pathsep}{env.get('PATH', '')}"
    data = ROOT.parent / "shared" / "data"
    if data.is_dir():
        env.setdefault("HYBRID_IR_DATA", str(data))
    env.setdefault("OMP_NUM_THREADS", str(threads))
    return env


def run_notebook(path: Path, threads: int) -> tuple[Path, bool, float, str]:
    "One notebook in a process of its own."
    started = time.perf_counter()
    command = [str(BIN / "nbdev_test"), "--path", str(path), "--n_workers", "0"]
    options = dict(cwd=ROOT, env=environment(threads), text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        done = subprocess.run(command, timeout=LIMIT, **options)
        passed, output = done.returncode == 0, done.stdout
    except subprocess.TimeoutExpired as late:
        passed, output = False, f"{(late.stdout or b'').decode(errors='replace')}\nstopped: it took longer than {LIMIT} s"
    return path, passed, time.perf_counter() - started, output


def run_notebooks() -> dict[str, int]:
    "Every notebook but those for papermill."
    notebooks = sorted(path for path in (ROOT / "nbs").glob("*.ipynb") if path.stem not in PAPERMILL)
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = max(1, min(4, processors, len(notebooks)))
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    with ThreadPoolExecutor(workers) as pool:
        for path, passed, seconds, output in pool.map(lambda p: run_notebook(p, max(1, processors // workers)), notebooks):
            print(f"{'PASSED' if passed else 'FAILED'} {path.relative_to(ROOT)} ({seconds:.0f} s)", flush=True)
            counts["passed" if passed else "failed"] += 1
            if not passed:
                print(output, flush=True)
    return counts


def run_pytest(arguments: list[str]) -> tuple[dict[str, int], list[dict[str, str]]]:
    "All of pytest; the counts, and each skipped test with its reason."
    processors = os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "--durations=15", "--durations-min=1", f"--junitxml={report}", *arguments]
        code = subprocess.run(command, cwd=ROOT, env=environment(processors), stdin=subprocess.DEVNULL).returncode
        counts, skipped = {"passed": 0, "failed": 0, "skipped": 0}, []
        for case in xml.parse(report).getroot().iter("testcase") if report.exists() else []:
            kinds = {child.tag for child in case}
            kind = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
            counts[kind] += 1
            if kind == "skipped":
                skipped.append({"test": f"{case.get('classname')}::{case.get('name')}", "reason": case.find("skipped").get("message", "")})
    if code not in (0, 1) or (code == 1 and not counts["failed"]):  # interrupted, misused, or nothing collected
        print(f"pytest stopped with code {code}")
        counts["failed"] += 1
    return counts, skipped


def main() -> None:
    started = time.perf_counter()
    notebooks = run_notebooks()
    tests, skipped = run_pytest(sys.argv[1:])
    total = {kind: notebooks[kind] + tests[kind] for kind in tests}
    summary = os.environ.get("HYBRID_IR_TEST_SUMMARY")  # .ci/run reads the counts, and which tests were skipped, from here
    if summary:
        Path(summary).write_text(json.dumps({**total, "skips": skipped}), encoding="utf-8")
    print(f"\nnotebooks: {notebooks['passed']} of {sum(notebooks.values())} in order; all tests took {time.perf_counter() - started:.0f} s")
    print(f"{total['passed']} passed, {total['failed']} failed" + (f", {total['skipped']} skipped" if total["skipped"] else ""))
    sys.exit(1 if total["failed"] or not total["passed"] else 0)


if __name__ == "__main__":
    main()
