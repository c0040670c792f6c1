import hashlib
import json
import os
import re
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from datasets import Dataset

from smlib.problems.downloads import FILES, DatasetError, Pinned, read_pinned

PATH = "coin_flip/coin_flip.json"
CONTENT = b"".join(b"line %d\n" % number for number in range(30_000))


class Server(ThreadingHTTPServer):
    """A publisher on this machine: it serves `content`, breaks off after `limit` bytes, and notes what was asked."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.limit, self.status, self.asked = CONTENT, None, None, []


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        asked = self.headers.get("Range")
        self.server.asked.append(asked)
        start = int(asked[6:-1]) if asked else 0
        body = self.server.content[start:]
        refused = 416 if asked and not body else self.server.status
        self.send_response(refused or (206 if asked else 200))
        self.send_header("Content-Length", "0" if refused else str(len(body)))
        self.end_headers()
        if not refused:
            self.wfile.write(body[: self.server.limit])

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A server that publishes CONTENT under PATH, an empty cache, and no local copy."""
    server = Server()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/{PATH}"
    monkeypatch.setitem(FILES, PATH, Pinned(hashlib.sha256(CONTENT).hexdigest(), url))
    monkeypatch.delenv("SML_DATA_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield server
    server.shutdown()
    server.server_close()


def cached(tmp_path):
    """The files of the cache, without the locks."""
    folder = tmp_path / "cache" / "smlib"
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"}


def test_a_local_copy_comes_first(server, tmp_path, monkeypatch):
    local = tmp_path / "here" / PATH
    local.parent.mkdir(parents=True)
    local.write_bytes(CONTENT)
    monkeypatch.setenv("SML_DATA_DIR", str(tmp_path / "here"))
    assert read_pinned(PATH) == CONTENT
    assert server.asked == []


@pytest.mark.parametrize("content", [CONTENT[:-1], CONTENT.replace(b"1", b"2", 1), b""])
def test_a_truncated_or_altered_copy_is_refused_with_both_hashes(server, tmp_path, monkeypatch, content):
    local = tmp_path / PATH
    local.parent.mkdir(parents=True)
    local.write_bytes(content)
    monkeypatch.setenv("SML_DATA_DIR", str(tmp_path))
    with pytest.raises(DatasetError, match=re.escape(str(local))) as refused:
        read_pinned(PATH)
    assert FILES[PATH].sha256 in str(refused.value)
    assert hashlib.sha256(content).hexdigest() in str(refused.value)


def test_a_missing_file_is_named_with_the_way_out(server, tmp_path, monkeypatch):
    monkeypatch.setenv("SML_DATA_DIR", str(tmp_path))
    with pytest.raises(DatasetError, match=r"coin_flip\.json does not exist; SML_DATA_DIR must hold"):
        read_pinned(PATH)


def test_a_download_is_kept_and_not_fetched_twice(server, tmp_path):
    assert read_pinned(PATH) == read_pinned(PATH) == CONTENT
    assert server.asked == [None]
    assert cached(tmp_path) == {PATH}


def test_a_download_that_breaks_off_goes_on_where_it_stopped(server, tmp_path):
    server.limit = 100_000
    with pytest.raises(DatasetError, match=r"coin_flip\.json: download from http.* failed .*the download resumes"):
        read_pinned(PATH)
    assert cached(tmp_path) == {f"{PATH}.part"}
    server.limit = None
    assert read_pinned(PATH) == CONTENT
    assert server.asked[0] is None and re.fullmatch(r"bytes=[1-9]\d*-", server.asked[1])
    assert cached(tmp_path) == {PATH}


def test_a_download_stopped_before_the_check_is_not_fetched_again(server, tmp_path):
    partial = tmp_path / "cache" / "smlib" / f"{PATH}.part"
    partial.parent.mkdir(parents=True)
    partial.write_bytes(CONTENT)
    assert read_pinned(PATH) == CONTENT
    assert server.asked == [f"bytes={len(CONTENT)}-"]


@pytest.mark.parametrize("left_behind", [b"", b"line 0\nline X\n"])
def test_a_wrong_download_is_refused_and_not_kept(server, tmp_path, left_behind):
    partial = tmp_path / "cache" / "smlib" / f"{PATH}.part"
    partial.parent.mkdir(parents=True)
    partial.write_bytes(left_behind)
    if not left_behind:
        server.content = b"<html>sign in</html>"
    with pytest.raises(DatasetError, match=FILES[PATH].sha256):
        read_pinned(PATH)
    assert cached(tmp_path) == set()
    server.content = CONTENT
    assert read_pinned(PATH) == CONTENT


def test_two_that_fetch_at_once_get_the_whole_file(server):
    found = []
    threads = [threading.Thread(target=lambda: found.append(read_pinned(PATH))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [CONTENT] * 4 and server.asked == [None]


def test_without_publisher_and_hub_the_error_says_what_to_set(server):
    server.status = 503
    with pytest.raises(DatasetError, match=r"failed \(HTTP Error 503.*set SML_DATA_DIR to a local copy"):
        read_pinned(PATH)


# ------------------------------------------------------------------------------------------------- the Hub


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """path -> parquet rows; what huggingface_hub would fetch."""
    holds = {}

    def fetch(repository, file, repo_type, revision):
        if repository not in holds:
            raise OSError("the Hub is out of reach")
        assert repo_type == "dataset" and re.fullmatch("[0-9a-f]{40}", revision)
        path = tmp_path / "hub.parquet"
        Dataset.from_list(holds[repository]).to_parquet(path)
        return str(path)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fetch)
    return holds


def raw_lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


GSM8K = [{"question": "How many \u2019s?", "answer": "4\n#### 4"}, {"question": "And?", "answer": "#### 5"}]


def test_where_the_publisher_fails_the_hub_s_rows_make_the_same_file(server, hub, monkeypatch):
    server.status, pinned = 404, FILES["gsm8k/test.jsonl"]
    monkeypatch.setitem(FILES, PATH, Pinned(hashlib.sha256(raw_lines(GSM8K)).hexdigest(), FILES[PATH].url, pinned.hub))
    with pytest.raises(DatasetError, match=r"404.*and so did openai/gsm8k on the Hub \(the Hub is out of reach\)"):
        read_pinned(PATH)
    hub["openai/gsm8k"] = GSM8K
    assert read_pinned(PATH) == raw_lines(GSM8K)


def test_other_rows_on_the_hub_are_refused(server, hub, monkeypatch, tmp_path):
    server.status, pinned = 404, FILES["gsm8k/test.jsonl"]
    monkeypatch.setitem(FILES, PATH, Pinned(hashlib.sha256(raw_lines(GSM8K)).hexdigest(), FILES[PATH].url, pinned.hub))
    hub["openai/gsm8k"] = GSM8K[:1]
    with pytest.raises(DatasetError, match="openai/gsm8k on the Hub has SHA-256"):
        read_pinned(PATH)
    assert cached(tmp_path) == set()


def _hub_form(path, row):
    """A raw row as the Hub's parquet file holds it."""
    if not path.startswith("CommonsenseQA"):
        return dict(reversed(row.items()))
    asked = row["question"]
    choices = {key: [choice[key] for choice in asked["choices"]] for key in ("label", "text")}
    flat = {"id": row["id"], "question": asked["stem"], "question_concept": asked["question_concept"]}
    return flat | {"choices": choices, "answerKey": row["answerKey"]}


@pytest.mark.parametrize("path", [path for path, pinned in FILES.items() if pinned.hub])
def test_every_published_file_is_made_again_from_the_hub_s_columns(path, monkeypatch, hub, tmp_path):
    if not os.environ.get("SML_DATA_DIR"):
        pytest.skip("needs the published questions: set SML_DATA_DIR to a local copy of the datasets")
    local = Path(os.environ["SML_DATA_DIR"]) / path
    if not local.is_file():
        pytest.skip(f"{path} is not in SML_DATA_DIR")
    raw = local.read_bytes()
    hub[FILES[path].hub[0]] = [_hub_form(path, json.loads(line)) for line in raw.decode().split("\n") if line]
    monkeypatch.setitem(FILES, path, replace(FILES[path], url=(tmp_path / "nowhere").as_uri()))
    monkeypatch.delenv("SML_DATA_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert read_pinned(path) == raw
