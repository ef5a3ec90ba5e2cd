"""Finding and downloading files, against a server on this machine: nothing half-written, and messages that help."""

import hashlib
import http.server
import os
import shutil
import socket
import subprocess
import sys
import threading
from contextlib import ExitStack
from pathlib import Path

import pytest

import hybrid_ir

from hybrid_ir.sources import DownloadError, cache_dir, choose, choose_all, download, explicit_file, file_sha256, find_file, whole_file

BODY = bytes(range(256)) * 4096  # 1 MiB
BODY_SHA256 = hashlib.sha256(BODY).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.requests.append(self.path)
        if self.path.startswith("/missing"):
            self.send_error(404)
            return
        if self.path.startswith("/moved"):
            self.send_response(302)
            self.send_header("Location", "/good/file.bin")
            self.end_headers()
            return
        if self.path.startswith("/silent"):
            self.server.released.wait(10)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(BODY)))
        self.end_headers()
        body = BODY[: len(BODY) // 2] if self.path.startswith("/cut") else BODY
        try:
            self.wfile.write(body)
        except OSError:
            pass

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.requests, server.released = [], threading.Event()
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.released.set()
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def places(tmp_path, monkeypatch):
    "An empty cache, no data folder, no proxy."
    monkeypatch.setenv("HYBRID_IR_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HYBRID_IR_DATA", raising=False)
    monkeypatch.setenv("NO_PROXY", "*")
    return tmp_path


def files_below(folder: Path) -> list:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_download_writes_the_file_and_nothing_else(server, tmp_path, capsys):
    target = download(f"{server.url}/good/file.bin", tmp_path / "new" / "file.bin", sha256=BODY_SHA256)
    assert target.read_bytes() == BODY
    assert files_below(tmp_path / "new") == ["file.bin"]
    assert "file.bin" in capsys.readouterr().err  # the progress bar
    download(f"{server.url}/good/file.bin", tmp_path / "quiet" / "file.bin", progress=False)
    assert capsys.readouterr().err == ""


def test_download_keeps_a_right_file_and_replaces_a_wrong_one(server, tmp_path):
    target = tmp_path / "file.bin"
    target.write_bytes(b"something else")
    download(f"{server.url}/good/file.bin", target, sha256=BODY_SHA256, progress=False)
    assert target.read_bytes() == BODY
    asked = len(server.requests)
    download(f"{server.url}/good/file.bin", target, sha256=BODY_SHA256, progress=False)
    assert len(server.requests) == asked


def test_download_follows_redirects(server, tmp_path):
    assert download(f"{server.url}/moved", tmp_path / "file.bin", progress=False).read_bytes() == BODY


@pytest.mark.parametrize(
    "path, checksum, expected",
    [
        ("/cut/file.bin", BODY_SHA256, "broke off"),
        ("/cut/file.bin", None, "broke off"),
        ("/missing/file.bin", BODY_SHA256, "404"),
        ("/good/file.bin", "0" * 64, "wrong checksum"),
    ],
)
def test_a_failed_download_leaves_nothing_and_says_why(server, tmp_path, path, checksum, expected):
    with pytest.raises(DownloadError, match=expected) as caught:
        download(server.url + path, tmp_path / "new" / "file.bin", sha256=checksum, progress=False)
    assert server.url + path in str(caught.value)
    assert files_below(tmp_path / "new") == []


def test_a_failed_download_keeps_what_was_there(server, tmp_path):
    target = tmp_path / "file.bin"
    target.write_bytes(b"older version")
    with pytest.raises(DownloadError):
        download(f"{server.url}/cut/file.bin", target, sha256=BODY_SHA256, progress=False)
    assert target.read_bytes() == b"older version"


def test_no_network(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{probe.getsockname()[1]}/file.bin"
    for url in (closed, "http://nowhere.invalid/file.bin"):
        with pytest.raises(DownloadError, match="no connection"):
            download(url, tmp_path / "file.bin", progress=False, timeout=5)
    with pytest.raises(DownloadError, match="not-an-address"):
        download("not-an-address", tmp_path / "file.bin", progress=False)
    assert not (tmp_path / "file.bin").exists()


def test_a_server_that_says_nothing(server, tmp_path):
    with pytest.raises(DownloadError, match="no answer in 0.3 seconds"):
        download(f"{server.url}/silent", tmp_path / "file.bin", progress=False, timeout=0.3)


def test_order_of_the_places(server, tmp_path, monkeypatch):
    name, url = "folder/file.bin", f"{server.url}/good/file.bin"
    downloaded = find_file(name, url=url, sha256=BODY_SHA256, progress=False)
    assert downloaded == cache_dir() / name and len(server.requests) == 1
    assert find_file(name, url=url, sha256=BODY_SHA256) == downloaded and len(server.requests) == 1

    data = tmp_path / "data"
    (data / "folder").mkdir(parents=True)
    monkeypatch.setenv("HYBRID_IR_DATA", str(data))
    assert find_file(name, url=url) == downloaded  # not in the data folder: the cache serves
    (data / name).write_bytes(b"from the data folder")
    assert find_file(name, url=url) == data / name

    given = tmp_path / "given"
    given.mkdir()
    (given / "file.bin").write_bytes(b"given")
    assert find_file(name, path=given) == given / "file.bin"
    assert find_file(name, path=given / "file.bin") == given / "file.bin"
    assert find_file(name, path=data) == data / name


def test_a_given_path_is_never_replaced_by_another_place(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "file.bin").write_bytes(b"x")
    monkeypatch.setenv("HYBRID_IR_DATA", str(tmp_path / "data"))
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", tmp_path / "nowhere.bin"):
        with pytest.raises(FileNotFoundError, match="file.bin") as caught:
            find_file("file.bin", path=path)
        assert str(path) in str(caught.value)
    with pytest.raises(FileNotFoundError):
        explicit_file("file.bin", tmp_path / "empty")


@pytest.mark.parametrize("path, expected", [("/cut/x", "broke off"), ("/missing/x", "404"), (None, "no public address")])
def test_not_found_names_file_places_and_variable(server, tmp_path, monkeypatch, path, expected):
    url = path and server.url + path
    with pytest.raises(FileNotFoundError, match=expected) as caught:
        find_file("folder/file.bin", url=url, hint="It is on the shelf.", progress=False)
    message = str(caught.value)
    for part in ("folder/file.bin", "not set", str(tmp_path / "cache"), "Set HYBRID_IR_DATA", "It is on the shelf."):
        assert part in message
    assert files_below(tmp_path / "cache") == []

    monkeypatch.setenv("HYBRID_IR_DATA", str(tmp_path / "data"))
    with pytest.raises(FileNotFoundError) as caught:
        find_file("folder/file.bin", url=url, progress=False)
    assert str(tmp_path / "data" / "folder" / "file.bin") in str(caught.value)


def test_cache_dir(tmp_path, monkeypatch):
    assert cache_dir() == tmp_path / "cache" and cache_dir().is_dir()
    monkeypatch.delenv("HYBRID_IR_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert "hybrid_ir" in cache_dir().parts


def test_file_sha256(tmp_path):
    (tmp_path / "file.bin").write_bytes(BODY)
    assert file_sha256(tmp_path / "file.bin") == BODY_SHA256


def test_choose():
    assert choose("sampler", "mono", ["mono", "cross"]) == "mono"
    with pytest.raises(ValueError, match="unknown sampler 'momo'; valid: mono, cross"):
        choose("sampler", "momo", ["mono", "cross"])
    with pytest.raises(ValueError, match=r"unknown sampler \['mono'\]"):
        choose("sampler", ["mono"], ["mono", "cross"])
    assert choose_all("language", ("zh", "ar"), ["ar", "de", "zh"]) == ["ar", "zh"]
    assert choose_all("language", None, {"ar": 1, "de": 2}) == ["ar", "de"]
    with pytest.raises(ValueError, match="no language chosen; valid: ar, de"):
        choose_all("language", [], ["ar", "de"])
    with pytest.raises(ValueError, match="unknown language 'fr'; valid: ar, de"):
        choose_all("language", ["de", "fr"], ["ar", "de"])


def test_environment_is_read_at_each_call(tmp_path, monkeypatch):
    monkeypatch.setenv("HYBRID_IR_CACHE", str(tmp_path / "other"))
    assert cache_dir() == tmp_path / "other"
    assert os.environ["HYBRID_IR_CACHE"]


def test_processes_write_one_file_at_once(tmp_path, monkeypatch):
    target, contents = tmp_path / "shared.json", {}
    (tmp_path / "shared.json.partial").write_text("left behind by a killed process")
    with ExitStack() as both:
        for rank in ("0", "1"):
            monkeypatch.setenv("RANK", rank)
            contents[rank] = both.enter_context(whole_file(target))
            contents[rank].write_text(f"whole {rank}")
    assert contents["0"] != contents["1"] and target.read_text().startswith("whole") and list(tmp_path.iterdir()) == [target]


def test_the_package_without_a_place_for_compiled_loops(tmp_path):
    "As in a container: the package and the home of the user are closed to writing."
    package = tmp_path / "closed" / "hybrid_ir"
    shutil.copytree(Path(hybrid_ir.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    (package / "__pycache__").touch()  # a file where Numba and Python would make a folder: root may write anywhere
    code = "import numpy as np; from hybrid_ir import processor, retrieval; print(processor.__file__); print(retrieval.top_passages(np.eye(3), np.eye(3), 1)[0].ravel())"
    env = {name: value for name, value in os.environ.items() if not name.startswith(("NUMBA", "XDG"))} | {"HOME": "/dev/null", "PYTHONPATH": str(package.parent)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert str(package) in done.stdout and "[0 1 2]" in done.stdout
