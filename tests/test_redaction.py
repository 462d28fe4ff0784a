"""Secrets stay in the process: what hides them, and a run folder searched for them."""

import base64
import http.server
import threading

import pytest
from conftest import tiny_config, tiny_values

from raytrain.config import check_config, load_config
from raytrain.console import Console
from raytrain.errors import ConfigError
from raytrain.redaction import holds_credentials, is_secret, redacted, with_credentials, without_credentials
from raytrain.report.page import write_report
from raytrain.stages.pipeline import run_pipeline
from raytrain.tracking.runs import tracking_uri

SECRET = "fake/secret+0123456789"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://ann:pw@host/x", "https://***@host/x"),
        ("https://ann:p@w@host:80/x", "https://***@host:80/x"),
        ("http://token@host", "http://***@host"),
        (
            "postgresql://ann:pw@host/db?sslmode=require&password=pw",
            "postgresql://***@host/db?sslmode=require&password=***",
        ),
        ("s3://key:secret@bucket/a", "s3://***@bucket/a"),
        ("s3://key:se/cr+et@bucket/a", "s3://***@bucket/a"),
        ("s3://bucket/a?access_key=k&secret_key=s&region=r", "s3://bucket/a?access_key=***&secret_key=***&region=r"),
        (
            "https://h/a?X-Amz-Credential=k%2Fx&X-Amz-Signature=s",
            "https://h/a?X-Amz-Credential=***&X-Amz-Signature=***",
        ),
        ("at https://ann:pw@host, then https://bob:pw@host.", "at https://***@host, then https://***@host."),
        ("{'Authorization': 'Bearer abc.def'}", "{'Authorization': 'Bearer ***'}"),
    ],
)
def test_credentials_are_hidden(text, shown):
    assert redacted(text) == shown
    assert redacted(shown) == shown


@pytest.mark.parametrize(
    "text",
    [
        "hdfs://user@node/x",
        "http://host:9000/a@b",
        "http://[::1]:80/a@b",
        "sqlite:////a:b/c@d.db",
        "s3://b/x:y/z@w",
        "x?tokenizer=a&max_tokens=3",
        "a@b.example",
        "/data/{0..7}.jsonl",
    ],
)
def test_what_is_no_credential_stays(text):
    assert redacted(text) == text and not holds_credentials(text)


def test_values_of_secret_variables_are_hidden(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("SHORT_TOKEN", "en")
    nested = {"a": [f"x {SECRET} y", 1, None], "b": ("fake%2Fsecret%2B0123456789", "en")}
    assert redacted(nested) == {"a": ["x *** y", 1, None], "b": ("***", "en")}


def test_names_of_secrets():
    for name in (
        "AWS_SECRET_ACCESS_KEY",
        "AWS_SESSION_TOKEN",
        "HF_TOKEN",
        "WANDB_API_KEY",
        "MLFLOW_TRACKING_PASSWORD",
        "RAY_AUTH_TOKEN",
        "MYSQL_PWD",
    ):
        assert is_secret(name, "x"), name
    for name in (
        "PWD",
        "OLDPWD",
        "TOKENIZERS_PARALLELISM",
        "RAY_AUTH_TOKEN_PATH",
        "AWS_REGION",
        "KEYBOARD",
        "GOOGLE_APPLICATION_CREDENTIALS",
        "AWS_WEB_IDENTITY_TOKEN_FILE",
    ):
        assert not is_secret(name, "x"), name
    assert is_secret("MLFLOW_TRACKING_URI", "https://ann:pw@host")


@pytest.mark.parametrize(
    "sections",
    [
        {"data": {"train": ["s3://key:pw12345678@bucket/train.jsonl"]}},
        {"data": {"root": "s3://key:pw12345678@bucket"}},
        {"train": {"storage_path": "s3://bucket/x?secret_key=pw12345678"}},
        {"tokenizer": {"path": "https://ann:pw12345678@host/t"}},
    ],
)
def test_credentials_in_paths_are_refused(corpus, tmp_path, sections):
    with pytest.raises(ConfigError, match="holds credentials.*AWS_SECRET_ACCESS_KEY") as caught:
        tiny_config(corpus, tmp_path, **sections)
    assert "pw12345678" not in str(caught.value)


def test_credentials_in_the_data_root_variable_are_refused(corpus, tmp_path, monkeypatch):
    monkeypatch.setenv("RAYTRAIN_DATA_ROOT", "s3://key:pw12345678@bucket")
    config = tiny_config(corpus, tmp_path, data={"root": None})
    with pytest.raises(ConfigError, match="RAYTRAIN_DATA_ROOT holds credentials"):
        config.data.corpora("train")


def test_no_setting_holds_the_tracking_servers_password(corpus, tmp_path, monkeypatch):
    monkeypatch.setenv("RAYTRAIN_TRACKING_URI", "")
    full, shown = "https://ann:pw12345678@host/m", "https://***@host/m"
    config = tiny_config(corpus, tmp_path, tracking={"uri": full})
    assert "pw12345678" not in config.model_dump_json() and config.tracking.uri == shown
    assert tracking_uri(config, config.run_dir) == shown
    assert with_credentials(shown) == full
    monkeypatch.setenv("RAYTRAIN_TRACKING_URI", "https://ann:other@elsewhere")
    assert with_credentials(shown) == "https://host/m"
    assert check_config(config.model_dump()).tracking.uri == shown  # what was written can be read


def test_mlflows_variable_stands_in_for_the_setting(corpus, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://ann:pw@host")
    config = tiny_config(corpus, tmp_path)
    assert tracking_uri(config, config.run_dir) == "https://***@host"
    assert with_credentials("https://***@host") == "https://ann:pw@host"
    assert without_credentials("https://***@host") == "https://***@host"


def test_the_tracking_server_gets_the_password(corpus, tmp_path, monkeypatch):
    from raytrain.tracking.mlflow import MlflowTracker

    monkeypatch.setenv("RAYTRAIN_TRACKING_URI", "")
    monkeypatch.setattr("raytrain.tracking.mlflow._LAST_TRIES_SECONDS", 0.5)
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.headers.get("Authorization"))
            self.send_response(401)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    uri = f"http://ann:pw12345678@127.0.0.1:{server.server_port}"
    config = tiny_config(corpus, tmp_path, tracking={"uri": uri})
    MlflowTracker.open(tracking_uri(config, config.run_dir), "raytrain", "a").close()
    server.shutdown()
    server.server_close()
    assert asked and set(asked) == {"Basic " + base64.b64encode(b"ann:pw12345678").decode()}


def test_no_file_of_a_run_holds_a_secret(corpus, tmp_path, local_ray, monkeypatch):
    monkeypatch.setenv("FAKE_API_KEY", SECRET)
    values = tiny_values(corpus, tmp_path, train={"storage_path": f"/nowhere/{SECRET}"})
    config = check_config(values)
    run_pipeline(config, Console(quiet=True), ("statistics", "buckets", "assign"))
    write_report(config.run_dir, config.run_dir / "report.html", title=f"a run with {SECRET}")
    files = [path for path in (tmp_path / "tiny").rglob("*") if path.is_file()]
    names = {path.name for path in files}
    assert {"config.yaml", "mlflow.db", "report.html", "mlflow_run.json", "statistics.json"} <= names
    assert [path for path in files if SECRET.encode() in path.read_bytes()] == []
    assert "storage_path: /nowhere/***" in (tmp_path / "tiny" / "config.yaml").read_text()
    assert load_config(tmp_path / "tiny" / "config.yaml").data == config.data
