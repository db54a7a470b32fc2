"""Secrets in URLs are never printed, logged or written, whichever command is given one."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from engine.config import load_study, study_toml
from engine.run import main
from store import StoreError
from store.redaction import redacted
from store.storage import StoreUrl, location_of

SECRETS = ("hunter2", "AKIAEXAMPLE", "c0ffee")
URLS = [
    f"{scheme}://{rest}"
    for scheme in ("s3", "https", "tcp")
    for rest in (
        "AKIAEXAMPLE:hunter2@localhost:1/run.zarr",
        "AKIAEXAMPLE:hun/c0ffee+hunter2@localhost:1/run.zarr",
        "localhost:1/run.zarr?X-Amz-Credential=AKIAEXAMPLE&X-Amz-Signature=hunter2",
        "localhost:1/run.zarr#hunter2",
        "AKIAEXAMPLE@localhost:1/run.zarr?sig=hunter2",
    )
]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("s3://bucket/run.zarr", "s3://bucket/run.zarr"),
        ("http://localhost:9000/bucket/a@b.zarr", "http://localhost:9000/bucket/a@b.zarr"),
        ("abfs://container@account/run.zarr", "abfs://container@account/run.zarr"),
        ("C:/photos/x@y.jpg, see c:/a?b", "C:/photos/x@y.jpg, see c:/a?b"),
        ("s3://key:p@ss/word@bucket/x", "s3://***@bucket/x"),
        ("https://token@host/x", "https://***@host/x"),
        ("'https://u:p@h/x?s=1', (https://h/y?t=2), done.", "'https://***@h/x?***', (https://h/y?***), done."),
        ("https:/user:pw@host/x does not exist", "https:/***@host/x does not exist"),
    ],
)
def test_what_is_taken_out(text: str, shown: str) -> None:
    assert redacted(text) == shown
    assert redacted(shown) == shown


def test_a_url_of_a_store_shows_no_secret_and_keeps_it() -> None:
    url = location_of("https://user:hunter2@host/a/run.zarr/")
    assert isinstance(url, StoreUrl)
    for text in (str(url), f"{url}", f"{url!r}", "{}".format(url), "%s" % url):  # noqa: UP031, UP032
        assert "hunter2" not in text
        assert "***@host/a/run.zarr" in text
    assert url == "https://user:hunter2@host/a/run.zarr"
    assert copy.deepcopy(url) == url
    assert url.name == "run.zarr"
    with pytest.raises(StoreError, match=r"^s3://\*\*\*@bucket/a holds a user or a password, which no object store"):
        location_of("s3://key:hunter2@bucket/a")
    with pytest.raises(StoreError, match=r"^https://host/a\.zarr\?\*\*\* has a query; expected the URL of a store"):
        location_of("https://host/a.zarr?sig=hunter2")


class Refusing(BaseHTTPRequestHandler):
    """A server that answers with what it was asked, as an error."""

    def answer(self) -> None:
        self.send_response(403)
        self.end_headers()

    do_GET = do_HEAD = do_PUT = do_DELETE = do_PROPFIND = answer

    def log_message(self, *_: object) -> None: ...


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    server = HTTPServer(("127.0.0.1", 0), Refusing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port
    server.shutdown()


COMMANDS = {
    "info": ["info", "{url}"],
    "verify": ["verify", "{url}"],
    "measure": ["measure", "--store", "{url}"],
    "against": ["measure", "--store", "none.zarr", "--against", "{url}"],
    "scheduler": ["measure", "--store", "none.zarr", "--scheduler", "{url}"],
    "capture": ["capture", "--store", "{url}", "--model.name", "test_vit", "--data.root", "."],
    "capture from": ["capture", "--store", "a.zarr", "--model.name", "test_vit", "--data.root", "{url}"],
    "weights": [
        "capture",
        "--store",
        "a.zarr",
        "--model.name",
        "test_vit",
        "--data.root",
        ".",
        "--model.weights",
        "{url}",
    ],
    "adapter": [
        "capture",
        "--store",
        "a.zarr",
        "--model.name",
        "test_vit",
        "--data.root",
        ".",
        "--model.adapter",
        "{url}",
    ],
    "name": ["capture", "--store", "a.zarr", "--model.name", "{url}", "--data.root", "."],
    "export": ["export", "--store", "{url}", "--hdf5", "a.h5"],
    "export to": ["export", "--store", "a.zarr", "--hdf5", "{url}"],
    "import": ["import", "--hdf5", "a.h5", "--store", "{url}"],
    "import from": ["import", "--hdf5", "{url}", "--store", "a.zarr"],
    "compare": [
        "compare",
        "--baseline",
        "{url}",
        "--finetuned",
        "{url}",
        "--model.name",
        "test_vit",
        "--data.root",
        ".",
    ],
    "classes": [
        "compare",
        "--baseline",
        "a",
        "--finetuned",
        "b",
        "--model.name",
        "test_vit",
        "--data.root",
        ".",
        "--classes",
        "{url}",
    ],
    "study": ["study", "--data.kind", "folder", "--data.root", "{url}"],
    "config": ["study", "--config", "{url}"],
    "sweep": ["sweep", "--data.root", "{url}"],
    "another flag": ["report", "--measure.store", "{url}"],
    "no flag": ["stats", "{url}"],
    "no command": ["{url}"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_shows_or_writes_a_secret(
    command: str, tmp_path: Path, port: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("store.objects._PATIENCE", timedelta(seconds=0.2))
    for url in URLS[list(COMMANDS).index(command) % 3 :: 3]:
        given = url.replace("localhost:1", f"127.0.0.1:{port}").replace("https", "http")
        try:
            code = main([part.replace("{url}", given) for part in COMMANDS[command]])
        except SystemExit as left:
            code = int(left.code or 0)
        printed = "".join(capfd.readouterr())
        assert code in (1, 2), (given, printed)
        assert not [secret for secret in SECRETS if secret in printed], printed
        assert "Traceback" not in printed
    for file in tmp_path.rglob("*"):
        assert not [secret for secret in SECRETS if secret in str(file)]
        if file.is_file():
            assert not [secret for secret in SECRETS if secret.encode() in file.read_bytes()]


def test_a_study_toml_holds_no_secret() -> None:
    keys = {"measure.store": "https://user:hunter2@host/a.zarr", "model.weights": "https://host/w.pth?sig=hunter2"}
    written = study_toml(load_study(None, keys))
    assert "hunter2" not in written
    assert "https://***@host/a.zarr" in written
