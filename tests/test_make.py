"The Makefile: its targets are those that the pages name, and `make lab` starts JupyterLab with the notebooks and a kernel of the project."

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from conftest import ROOT

LIMIT = 120  # seconds to wait for a server that does not answer


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@pytest.fixture
def lab(tmp_path):
    "A function that asks the server which `make lab` starts: `lab(path, method, body)`."
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    pytest.importorskip("jupyterlab")
    port, prefix = free_port(), Path(sys.executable).parents[1]
    arguments = f"--no-browser --port {port} --ServerApp.port_retries=0 --IdentityProvider.token=secret" + " --allow-root" * (os.geteuid() == 0)
    command = ["make", "-s", "-C", str(ROOT), "-o", str(prefix / ".installed"), "lab", f"VENV={prefix}", f"ARGS={arguments}"]  # -o: the environment is there
    folders = {f"JUPYTER_{name}_DIR": str(tmp_path / name.lower()) for name in ("CONFIG", "RUNTIME", "DATA")}
    with open(tmp_path / "log", "w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True, env={**os.environ, **folders})

    def ask(path: str, method: str = "GET", body: dict | None = None) -> str:
        request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", json.dumps(body).encode() if body else None, {"Authorization": "token secret"}, method=method)
        with urllib.request.urlopen(request, timeout=30) as reply:
            return reply.read().decode()

    try:
        for _ in range(LIMIT * 5):
            assert server.poll() is None, (tmp_path / "log").read_text()[-3000:]
            try:
                ask("/api")
                break
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.2)
        else:
            raise AssertionError((tmp_path / "log").read_text()[-3000:])
        yield ask
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)


def test_make_lab_opens_the_notebooks(lab):
    assert "<title>JupyterLab" in lab("/lab")
    listed = {entry["name"] for entry in json.loads(lab("/api/contents"))["content"] if entry["type"] == "notebook"}
    assert listed == {path.name for path in (ROOT / "nbs").glob("*.ipynb")}
    notebook = json.loads(lab("/api/contents/run.ipynb"))["content"]
    kernel = notebook["metadata"]["kernelspec"]["name"]
    assert kernel in json.loads(lab("/api/kernelspecs"))["kernelspecs"]
    started = json.loads(lab("/api/sessions", "POST", {"path": "run.ipynb", "type": "notebook", "name": "", "kernel": {"name": kernel}}))
    assert started["kernel"]["name"] == kernel and json.loads(lab(f"/api/kernels/{started['kernel']['id']}"))["execution_state"] != "dead"
    lab(f"/api/sessions/{started['id']}", "DELETE")


def test_every_target_that_a_page_names_exists():
    targets = set(re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.M)[1].split())
    notebooks = [json.loads(path.read_text(encoding="utf-8")) for path in (ROOT / "nbs").glob("*.ipynb")]
    prose = ["".join(cell["source"]) for notebook in notebooks for cell in notebook["cells"] if cell["cell_type"] == "markdown"]
    texts = prose + [path.read_text(encoding="utf-8") for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / ".ci" / "run", *(ROOT / ".github").rglob("*.yml")]]
    named = {name for text in texts for name in re.findall(r"(?:^|[\"`]| run: ) *make (?:-s )?([a-z]+)\b", text, re.M)}
    assert {"setup", "run", "test", "study", "docs"} <= named
    assert named <= targets, named - targets
