"""A VAE from the hub: a local server in its place, its cache, and what stands between: proxies, no network."""

import hashlib
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import ROOT, VAE

from mf_dist.vae import CONFIG, WEIGHTS

COMMIT = "a" * 40
PROGRAM = """
import sys
from mf_dist.runtime.errors import UserError
from mf_dist.vae import _vae_folder
for source in sys.argv[1:]:
    try: print(_vae_folder(source))
    except UserError as error: print("error:", error)
"""


class Hub(BaseHTTPRequestHandler):
    """Serves the digits' VAE as any owner's, or what the owner's name says."""

    def do_HEAD(self):
        self.server.requests.append(self.path)
        owner, name = self.path.split("/")[1], self.path.split("/")[-1]
        raw = b"<html>" if owner == "portal" else (VAE / name).read_bytes()
        if owner == "closes":
            self.connection.close()
            return
        self.send_response(int(owner[1:]) if owner[1:].isdecimal() else 200)
        if owner not in ("portal", "no-etag"):
            self.send_header("ETag", hashlib.sha256(raw).hexdigest())
        if owner != "portal":
            self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(raw)

    do_GET = do_HEAD  # noqa: N815  the library's name

    def log_message(self, *_):
        pass


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.requests = []
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def ask(home, cwd, *sources, **env):
    """What each source gives, in one new process: a folder, or an error, in one line; nothing else is printed."""
    clean = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}
    clean |= {"HF_HOME": str(home), "PYTHONPATH": str(ROOT), **env}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *sources], cwd=cwd, env=clean, capture_output=True, text=True, timeout=120
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and len(lines) == len(sources) and "error" not in done.stderr.lower(), done.stderr
    return lines


def test_what_the_hub_answers_is_a_folder_or_a_line(hub, tmp_path):
    answers = {
        "portal/vae": "missing the 'X-Repo-Commit' header",
        "no-etag/vae": "does not have an ETag",
        "closes/vae": "Server disconnected without sending a response",
        **{f"s{status}/vae": f"Client error '{status} " for status in (401, 403, 404, 407)},
    }
    first, *others = ask(tmp_path, tmp_path, "someone/vae", *answers, HF_ENDPOINT=f"http://127.0.0.1:{hub.server_port}")
    assert first.endswith(f"models--someone--vae/snapshots/{COMMIT}")
    for name in (CONFIG, WEIGHTS):
        assert (tmp_path / "hub/models--someone--vae/snapshots" / COMMIT / name).read_bytes() == (
            VAE / name
        ).read_bytes()
    for source, line in zip(answers, others, strict=True):
        assert (
            line.startswith(f"error: no VAE folder at '{source}', and none from the hub: ") and answers[source] in line
        )
        assert f"`hf download {source} config.json {WEIGHTS} --local-dir FOLDER`" in line


@pytest.mark.parametrize(
    ("env", "reason"),
    [
        ({"ALL_PROXY": "socks5://127.0.0.1:9"}, "Using SOCKS proxy, but the 'socksio' package is not installed"),
        ({"HF_ENDPOINT": "https://hub.invalid"}, "[Errno -"),
        ({"HF_HUB_OFFLINE": "1"}, "offline mode is enabled"),
    ],
    ids=["a proxy of another kind", "no names", "offline"],
)
@pytest.mark.dist
def test_a_cached_vae_needs_no_network_and_another_is_a_line(tmp_path, env, reason):
    cached = tmp_path / "hub/models--cached--vae"
    shutil.copytree(VAE, cached / "snapshots" / COMMIT)
    (cached / "refs").mkdir()
    (cached / "refs/main").write_text(COMMIT)
    found, error = ask(tmp_path, tmp_path, "cached/vae", "someone/vae", **env)
    assert found == str(cached / "snapshots" / COMMIT)
    assert error.startswith("error: no VAE folder at 'someone/vae', and none from the hub: ") and reason in error


def test_a_path_is_a_missing_folder_and_no_network_is_asked(hub, tmp_path):
    """Not in the hub's letters, not two parts, below a folder that is here, or below a usual name of one."""
    (tmp_path / "nets").mkdir()
    paths = [
        "nets/d",
        "models/d",
        "Checkpoints/d",
        "digits",
        "a/b/c",
        "./d",
        "/tmp/nowhere/d",
        "größe/d",
        "a b/d",
        "a/d/",
    ]
    for path, line in zip(
        paths, ask(tmp_path, tmp_path, *paths, HF_ENDPOINT=f"http://127.0.0.1:{hub.server_port}"), strict=True
    ):
        assert line.startswith(
            f"error: no VAE folder at {path!r}; working directory: {tmp_path} (a hub id has the form"
        )
    assert hub.requests == []
