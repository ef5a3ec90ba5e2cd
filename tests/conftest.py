"""What the tests share: where the data lie, and no network."""

import json
import os
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# nothing here may ask a hub for anything: the weights and data that tests need are shipped, made, or in the data folder
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "agg")


def find_data_folder() -> Path | None:
    "The folder that HYBRID_IR_DATA names, else ../shared/data beside the repository, else None."
    for candidate in (os.environ.get("HYBRID_IR_DATA"), ROOT.parent / "shared" / "data"):
        if candidate and (Path(candidate) / "xquad_r").is_dir():
            return Path(candidate).resolve()
    return None


@pytest.fixture(scope="session")
def root() -> Path:
    "The root of the repository."
    return ROOT


@pytest.fixture(scope="session")
def data_folder() -> Path:
    "The folder with the large data files; the test is skipped where there is none."
    folder = find_data_folder()
    if folder is None:
        pytest.skip("no data folder: set HYBRID_IR_DATA to a folder that holds xquad_r/ and the other data sets")
    return folder


@pytest.fixture
def data_env(data_folder, monkeypatch) -> Path:
    "The data folder, with HYBRID_IR_DATA set to it."
    monkeypatch.setenv("HYBRID_IR_DATA", str(data_folder))
    return data_folder


# --- what the tests of faults saw: a table for the site. HYBRID_IR_FAULTS names the file to write, else nothing is written
FAULT_ROWS: dict[str, dict] = {}
FAILED: set[str] = set()
COLLECTED: set[str] = set()


@pytest.fixture
def fault_row(request):
    "Record a row of the table: `fault_row(promise, fault, outcome)`, called at the end of a test, with what it observed."

    def add(promise: str, fault: str, outcome: str) -> None:
        from hybrid_ir.experiment import code_hash

        name = f"{request.node.path.relative_to(ROOT).as_posix()}::{request.node.name}"
        FAULT_ROWS[name] = {"test": name, "promise": promise, "fault": fault, "outcome": outcome, "date": time.strftime("%Y-%m-%d", time.gmtime()), "code": code_hash()}

    return add


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    "All tests of the files that are run, also those that are then left out."
    COLLECTED.update(item.nodeid for item in items)


def pytest_runtest_logreport(report):
    "A test that failed has no row, and loses the one of an earlier run."
    if report.failed:
        FAILED.add(report.nodeid)


def pytest_sessionfinish(session):
    "Write the rows, beside those of tests that did not run this time and are still there."
    target = os.environ.get("HYBRID_IR_FAULTS")
    if target and (FAULT_ROWS or FAILED):
        path = ROOT / target
        known = {row["test"]: row for row in json.loads(path.read_text(encoding="utf-8"))["rows"]} if path.exists() else {}
        files = {name.partition("::")[0] for name in COLLECTED}
        gone = {name for name in known if name not in COLLECTED and name.partition("::")[0] in files}
        rows = sorted((row for name, row in {**known, **FAULT_ROWS}.items() if name not in FAILED | gone), key=lambda row: (row["promise"], row["test"]))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"rows": rows}, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
