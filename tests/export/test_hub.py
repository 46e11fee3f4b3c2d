"""Models by their id: huggingface_hub's cache, and downloads from a server here that speaks the Hub's API."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import huggingface_hub.constants
import pytest
from typer.testing import CliRunner

from executorch_moe.export import hub
from executorch_moe.export.cli.app import app
from executorch_moe.export.models.pretrained import resolve

pytestmark = pytest.mark.transformers  # huggingface_hub comes with transformers
NAME = "someone/tiny-moe"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """A server with one repository: the files of the tiny model, and one that no export reads.

    Attributes:
        files: name -> content. requests: paths that were asked for. broken: name of a file that fails.
        gated: every file and listing is refused for lack of a license.
    """

    def __init__(self) -> None:
        self.files = {path.name: path.read_bytes() for path in resolve("tiny").iterdir() if path.is_file()}
        self.files["pytorch_model.bin"] = b"weights in another format"
        self.requests: list[str] = []
        self.broken, self.gated = "", False
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self.answer(False)

            def do_GET(self) -> None:
                self.answer(True)

            def log_message(self, *arguments: Any) -> None:
                pass

            def answer(self, body: bool) -> None:
                path = self.path.split("?")[0]
                owner.requests.append(path)
                status, content, headers = owner.respond(path)
                self.send_response(status)
                for name, value in {"Content-Length": str(len(content)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                if body:
                    self.wfile.write(content)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def respond(self, path: str) -> tuple[int, bytes, dict[str, str]]:
        """Status, content and headers."""
        if self.gated:
            return 403, b"{}", {"X-Error-Code": "GatedRepo"}
        if not path.removeprefix("/api/models").startswith(f"/{NAME}"):
            return 404, b"{}", {"X-Error-Code": "RepoNotFound"}
        if path.startswith("/api/models/") and "/tree/" in path:
            listing = [
                {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for name, content in self.files.items()
            ]
            return 200, json.dumps(listing).encode(), {"Content-Type": "application/json"}
        if path.startswith("/api/models/"):
            if not path.endswith(("/main", COMMIT, NAME)):
                return 404, b"{}", {"X-Error-Code": "RevisionNotFound"}
            about = {"id": NAME, "sha": COMMIT, "siblings": [{"rfilename": name} for name in self.files]}
            return 200, json.dumps(about).encode(), {"Content-Type": "application/json"}
        name = path.rsplit("/", 1)[1]
        if name == self.broken:
            return 500, b"", {}
        content = self.files[name]
        return 200, content, {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": COMMIT}


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A server, and an empty cache for this test."""
    made = Hub()
    for name, value in {"HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": False}.items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    stock = huggingface_hub.snapshot_download

    def from_here(*arguments: Any, **options: Any) -> str:
        return str(stock(*arguments, **options, endpoint=made.address, cache_dir=tmp_path / "cache"))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", from_here)
    yield made
    made.server.shutdown()
    made.server.server_close()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Qwen/Qwen3-30B-A3B", ("Qwen/Qwen3-30B-A3B", None)),
        ("openai/gpt-oss-20b@v1.0", ("openai/gpt-oss-20b", "v1.0")),
        ("a/b@refs/pr/1", ("a/b", "refs/pr/1")),
        ("demo", None),
        ("/models/qwen", None),
        ("./models/qwen", None),
        ("../models", None),
        ("models/qwen/", None),
        ("a/b/c", None),
        ("model.gguf", None),
        ("synthetic:qwen3-30b-a3b", None),
    ],
)
def test_ids_are_told_from_paths(name: str, expected: tuple[str, str | None] | None) -> None:
    assert hub.hub_model(name) == expected


def test_a_folder_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "some" / "folder").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert hub.hub_model("some/folder") is None


def test_what_is_not_in_the_cache_is_named_with_the_command(server: Hub, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as raised:
        resolve(f"{NAME}@v2")
    assert f"it is not in the cache of huggingface_hub ({tmp_path / 'cache'})" in str(raised.value)
    assert f"run `hf download {NAME} --revision v2`, or add --download" in str(raised.value)
    assert not server.requests


def test_a_download_fetches_what_an_export_reads_and_once(server: Hub) -> None:
    folder = hub.download(hub.HubModel(NAME, None))
    assert {path.name for path in folder.iterdir()} == set(server.files) - {"pytorch_model.bin"}
    assert all((folder / name).read_bytes() == server.files[name] for name in ("config.json", "model.safetensors"))
    asked = len(server.requests)
    assert resolve(NAME) == folder  # from the cache
    assert len(server.requests) == asked
    hub.download(hub.HubModel(NAME, None))
    assert not any("/resolve/" in path for path in server.requests[asked:])


def test_an_interrupted_download_is_named_and_continues(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None, raising=False)
    server.broken = "model.safetensors"
    with pytest.raises(RuntimeError, match=f"model='{NAME}' cannot be downloaded \\(.*500.*repeat this command, which"):
        hub.download(hub.HubModel(NAME, None))
    with pytest.raises(FileNotFoundError, match=r"in part only|has no \*\.safetensors"):
        resolve(NAME)
    server.broken = ""
    assert (hub.download(hub.HubModel(NAME, None)) / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("name", "revision", "gated", "message"),
    [
        ("nobody/nothing", None, False, "is not on the Hub, or private: check the spelling, or run `hf auth login`"),
        (NAME, "v9", False, f"model='{NAME}' has no revision 'v9': use a branch, tag or commit"),
        (NAME, None, True, "is for users who accepted its license: accept it on the model's page, run `hf auth login`"),
    ],
)
def test_refusals_say_what_to_do(server: Hub, name: str, revision: str | None, gated: bool, message: str) -> None:
    server.gated = gated
    with pytest.raises(RuntimeError) as raised:
        hub.download(hub.HubModel(name, revision))
    assert message in str(raised.value)


def test_without_a_network(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    server.server.shutdown()
    server.server.server_close()
    with pytest.raises(RuntimeError, match=r"cannot be downloaded .*: check the network and the space in"):
        hub.download(hub.HubModel(NAME, None))


def test_the_command_downloads_and_checks(server: Hub, tmp_path: Path) -> None:
    refused = CliRunner().invoke(app, ["export", NAME, "--check", "--target", "cpu"])
    assert refused.exit_code == 2 and f"hf download {NAME}" in " ".join(refused.stderr.split())
    assert not server.requests
    result = CliRunner().invoke(app, ["export", NAME, "--download", "--check", "--target", "cpu"])
    assert result.exit_code == 0, result.output
    assert f"downloading {NAME} ..." in result.stderr
    report = tmp_path / "model.export.json"
    result = CliRunner().invoke(app, ["export", "demo", "--download", "-o", str(tmp_path / "model.pte")])
    assert result.exit_code == 2 and "model='demo' is none: leave the option out" in " ".join(result.stderr.split())
    assert not report.exists()
