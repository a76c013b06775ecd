"""`hub:owner/name@split` through the library datasets, from a server on this machine.

The library reads the address of the Hub from its environment on import, so it runs in a separate
process.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMMIT = "c" * 40
FILES = {
    "train.jsonl": b'{"prompt": "1 + 1 =", "label": "2"}\n{"prompt": "2 + 1 =", "label": "3"}\n',
    "test.jsonl": b'{"prompt": "5 + 5 =", "label": "10"}\n',
}


def blob(name: str) -> str:
    """The digest by which the library stores the content of a file."""
    return hashlib.sha1(FILES[name]).hexdigest()


class Hub(BaseHTTPRequestHandler):
    """Answers the few requests to the Hub that load_dataset makes; holds one data set, o/sums."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        name = path.rsplit("/", 1)[1]
        if path.startswith("/datasets/o/sums/resolve/") and name in FILES:
            self._answer(200, FILES[name], {"ETag": f'"{blob(name)}"', "X-Repo-Commit": COMMIT})
        elif path.startswith("/api/datasets/o/sums") and "/tree/" in path:
            files = [
                {"type": "file", "path": name, "size": len(content), "oid": blob(name)}
                for name, content in FILES.items()
            ]
            self._answer(200, json.dumps(files).encode())
        elif path.startswith("/api/datasets/o/sums"):
            siblings = [{"rfilename": name} for name in FILES]
            info = {"id": "o/sums", "sha": COMMIT, "siblings": siblings, "private": False}
            self._answer(200, json.dumps(info | {"tags": [], "downloads": 0, "likes": 0}).encode())
        else:
            missing = "EntryNotFound" if "/o/sums/" in path else "RepoNotFound"
            self._answer(404, b"", {"X-Error-Code": missing})

    do_HEAD = do_GET

    def _answer(self, code: int, body: bytes, headers: dict[str, str] = {}) -> None:
        self.send_response(code)
        for header in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(*header)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *arguments) -> None:
        pass


@pytest.fixture
def hub():
    """The address of the server."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


_READ = """
import sys
from megatron_rpp.data.examples import open_examples
for source in sys.argv[1:]:
    try:
        examples = open_examples(source, "prompt", "label")
        print([(example.prompt, example.label) for example in examples])
    except ValueError as error:
        print(error)
"""


def test_splits_of_a_hub_data_set(hub, tmp_path):
    places = {n: value for n, value in os.environ.items() if not n.lower().endswith("_proxy")}
    places |= {"HF_ENDPOINT": hub, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_TELEMETRY": "1"}
    places |= {"HF_HUB_OFFLINE": "0", "HF_DATASETS_OFFLINE": "0"}
    sources = ["hub:o/sums", "hub:o/sums@test", "hub:o/products"]
    done = subprocess.run(
        [sys.executable, "-c", _READ, *sources], cwd=ROOT, env=places, capture_output=True,
        text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    train, test, missing = done.stdout.splitlines()
    assert train == "[('1 + 1 =', '2'), ('2 + 1 =', '3')]"
    assert test == "[('5 + 5 =', '10')]"
    assert missing.startswith("data set hub:o/products cannot be opened (DatasetNotFoundError")
