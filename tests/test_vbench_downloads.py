"""Fetching VBench's weights: checksums, what is there, what fails; a server of this process."""

import hashlib
import json
import subprocess
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from vbench_runs import invoke

from eval_vbench import downloads, score
from eval_vbench.preflight import NEEDS, Needs, Weights

CONTENT = b"weights of a model"
SUM = hashlib.sha256(CONTENT).hexdigest()


class Server(ThreadingHTTPServer):
    """Serves the files it is given, as (content, headers)."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = {}

    def address(self, name, content=CONTENT, **headers):
        self.files[f"/{name}"] = (content, {"Content-Length": str(len(content)), **headers})
        return f"http://127.0.0.1:{self.server_port}/{name}"


class Handler(BaseHTTPRequestHandler):
    def do_HEAD(self):
        content, headers = self.server.files.get(self.path, (None, {}))
        self.send_response(404 if content is None else 200)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        return content

    def do_GET(self):
        self.wfile.write(self.do_HEAD() or b"")

    def log_message(self, *words):
        """Nothing."""


@pytest.fixture
def server():
    with Server() as made:
        thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield made
        made.shutdown()
        thread.join()


@pytest.fixture
def fetch(tmp_path, monkeypatch, server):
    """Fetch weights of one dimension, from addresses that count as https here."""
    open_address = downloads.urllib.request.urlopen

    def open_plainly(address, **options):
        return open_address(address.replace("https://", "http://"), **options)

    monkeypatch.setattr(downloads.urllib.request, "urlopen", open_plainly)

    def run(*weights):
        weights = [
            Weights(w.path, w.source.replace("http://", "https://"), w.sha256) for w in weights
        ]
        monkeypatch.setitem(NEEDS, "motion_smoothness", Needs((), tuple(weights)))
        return invoke(
            score.app, "--download", "--dimensions=motion_smoothness", f"--weights={tmp_path}"
        )

    return run


def test_a_file_is_fetched_once_and_its_checksum_kept(fetch, server, tmp_path):
    weights = Weights("a/model.pth", server.address("model.pth"))
    code, _, err = fetch(weights)
    assert (code, err) == (0, f"a/model.pth: fetched, sha256 {SUM} (no checksum published)\n")
    assert (tmp_path / "a/model.pth").read_bytes() == CONTENT
    assert json.loads((tmp_path / "checksums.json").read_text()) == {"a/model.pth": SUM}
    server.files.clear()
    code, _, err = fetch(weights)
    assert (code, err) == (0, f"a/model.pth: is there, sha256 {SUM} as downloaded\n")


def test_a_file_that_changed_since_is_no_longer_trusted(fetch, server, tmp_path):
    weights = Weights("model.pth", server.address("model.pth"))
    assert fetch(weights)[0] == 0
    (tmp_path / "model.pth").write_bytes(b"another")
    code, _, err = fetch(weights)
    assert code == 1
    assert "failed: model.pth: differs from the downloaded file; remove it; from https://" in err
    assert "error: 1 of 1 weights could not be downloaded" in err


def test_a_stated_checksum_is_compared(fetch, server, tmp_path):
    address = server.address("model.pth")
    code, _, err = fetch(Weights("m.pth", address, SUM), Weights("n.pth", address, "0" * 64))
    assert code == 1
    assert f"m.pth: fetched, sha256 {SUM} as published" in err
    assert f"failed: n.pth: has sha256 {SUM}, expected {'0' * 64}; from " in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checksums.json", "m.pth"]


def test_what_is_cut_short_or_not_there_leaves_nothing(fetch, server, tmp_path):
    short = Weights("short.pth", server.address("short.pth", **{"Content-Length": "99"}))
    gone = Weights("gone.pth", server.address("x").replace("/x", "/gone"))
    code, _, err = fetch(short, gone)
    assert code == 1
    assert "failed: short.pth: " in err
    assert "failed: gone.pth: HTTP Error 404" in err
    assert list(tmp_path.iterdir()) == []


def test_a_file_comes_out_of_its_archive(fetch, server, tmp_path):
    with zipfile.ZipFile(tmp_path / "z", "w") as archive:
        archive.writestr("models/raft-things.pth", CONTENT)
    content = (tmp_path / "z").read_bytes()
    weights = Weights("raft/raft-things.pth", f"unzip {server.address('m.zip', content)}")
    code, _, err = fetch(weights)
    assert code == 0, err
    assert (tmp_path / "raft/raft-things.pth").read_bytes() == CONTENT
    assert f"raft/raft-things.pth: fetched, sha256 {SUM}" in err


def test_a_repository_is_cloned_and_its_commit_told(fetch, tmp_path):
    origin = tmp_path / "origin"
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(origin)]
    subprocess.run(["git", "init", "-q", str(origin)], check=True)
    (origin / "hubconf.py").write_text("x")
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-qm", "x"], check=True)
    code, _, err = fetch(Weights("dino/main/hubconf.py", f"git clone file://{origin}"))
    assert code == 0, err
    assert (tmp_path / "dino/main/hubconf.py").read_text() == "x"
    assert "dino/main/hubconf.py: fetched, git commit " in err


def test_the_hub_states_checksums_ahead_of_its_files(server, monkeypatch):
    address = server.address("m.pth", X_Linked_Etag=f'"{SUM}"')
    request = downloads.urllib.request.Request
    monkeypatch.setattr(
        downloads.urllib.request, "Request", lambda url, method: request(address, method=method)
    )
    assert downloads._stated_by_the_hub("https://huggingface.co/m.pth") == SUM
    assert downloads._stated_by_the_hub("https://example.org/m.pth") == ""


def test_every_source_is_one_that_can_be_fetched():
    for needs in NEEDS.values():
        for weights in needs.weights:
            starts = (
                "https://",
                "git clone https://",
                "unzip https://",
                "huggingface-cli download ",
            )
            assert weights.source.startswith(starts)
