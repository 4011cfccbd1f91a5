"""Fetching LaMP, from a server of our own that breaks off, moves and changes its files."""

import hashlib
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from infra.errors import InputError
from pipelines.ingest.sources.download import fetch

QUESTIONS = json.dumps(
    [{"id": f"{n}", "input": "description: x " + "y" * 3000, "profile": []} for n in range(40)]
).encode()  # 120 kB
OUTPUTS = json.dumps({"task": "LaMP_2", "golds": [{"id": f"{n}", "output": "comedy"} for n in range(40)]}).encode()


class Site:
    """A site with files by path; `breaks` connections are cut in the middle first."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.breaks, self.asked, self.pause = 0, [], 0.0
        site = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                site.asked.append((self.path, self.headers.get("Range")))
                time.sleep(site.pause)
                data = site.files.get(self.path)
                if data is None:
                    self.send_error(404)
                    return
                tag = f'"{hashlib.md5(data).hexdigest()}"'
                start, wanted = 0, self.headers.get("Range")
                if wanted and self.headers.get("If-Range") == tag:
                    start = int(wanted.removeprefix("bytes=").rstrip("-"))
                if start >= len(data):
                    self.send_error(416)
                    return
                self.send_response(206 if start else 200)
                self.send_header("Content-Length", str(len(data) - start))
                self.send_header("ETag", tag)
                self.end_headers()
                if site.breaks:
                    site.breaks -= 1
                    self.wfile.write(data[start : start + 50_000])
                    self.wfile.flush()
                    self.connection.close()
                    return
                self.wfile.write(data[start:])

            def log_message(self, *words):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}/LaMP"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def put(self, below: str, part: str) -> None:
        self.files[f"/LaMP/{below}/{part}/{part}_questions.json"] = QUESTIONS
        if part != "test":
            self.files[f"/LaMP/{below}/{part}/{part}_outputs.json"] = OUTPUTS


@pytest.fixture
def site():
    found = Site()
    yield found
    found.server.shutdown()
    found.server.server_close()


@pytest.mark.parametrize(
    ("task", "split", "below", "part"),
    [
        ("LaMP_1", "time", "time/LaMP_1", "train"),
        ("LaMP_2", "time", "time/LaMP_2/new", "train"),
        ("LaMP_2", "time/dev", "time/LaMP_2/new", "dev"),
        ("LaMP_2N", "user", "LaMP_2", "train"),
        ("LaMP_2N", "time/test", "time/LaMP_2", "test"),
        ("LaMP_7", "dev", "LaMP_7", "dev"),
    ],
)
def test_every_split_lies_where_the_site_has_it(site, tmp_path, task, split, below, part):
    site.put(below, part)
    folder, found = fetch(task, split, site.address, str(tmp_path), budget_s=0)
    assert found == part
    files = {path.name: path.read_bytes() for path in (tmp_path / folder).iterdir()}
    assert files.pop(f"{part}_questions.json") == QUESTIONS
    if part != "test":
        assert files.pop(f"{part}_outputs.json") == OUTPUTS
    assert list(files) == ["SHA256SUMS"]
    assert f"{hashlib.sha256(QUESTIONS).hexdigest()}  {part}_questions.json" in files["SHA256SUMS"].decode()


def test_a_broken_connection_goes_on_where_it_broke_in_one_run_or_the_next(site, tmp_path):
    site.put("LaMP_3", "train")
    site.breaks = 1
    folder, _ = fetch("LaMP_3", "user", site.address, str(tmp_path), budget_s=30)
    assert [wanted for path, wanted in site.asked if "questions" in path] == [None, "bytes=50000-"]
    site.asked.clear()
    site.put("LaMP_4", "train")
    site.breaks = 1
    with pytest.raises(InputError, match="breaks off|connection closed after 50000 of .*a rerun goes on from there"):
        fetch("LaMP_4", "user", site.address, str(tmp_path), budget_s=0)
    folder, _ = fetch("LaMP_4", "user", site.address, str(tmp_path), budget_s=0)
    assert site.asked[1][1] == "bytes=50000-"
    assert (tmp_path / folder / "train_questions.json").read_bytes() == QUESTIONS


def test_two_that_fetch_at_once_fetch_each_file_once(site, tmp_path):
    site.put("LaMP_3", "train")
    site.pause = 0.3  # the others begin before the first has a file
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: fetch("LaMP_3", "user", site.address, str(tmp_path), budget_s=0), range(4)))
    assert len(set(found)) == 1 and len(site.asked) == 2
    folder = tmp_path / found[0][0]
    assert (folder / "train_questions.json").read_bytes() == QUESTIONS
    assert {path.name for path in folder.iterdir()} == {"train_questions.json", "train_outputs.json", "SHA256SUMS"}


def test_a_file_that_was_whole_when_a_kill_came_is_fetched_anew(site, tmp_path):
    site.put("LaMP_3", "train")
    folder, _ = fetch("LaMP_3", "user", site.address, str(tmp_path), budget_s=0)
    done = tmp_path / folder / "train_questions.json"
    part, tag = (done.with_name(f"{done.name}{end}") for end in (".part", ".part.etag"))
    done.rename(part)  # as right before it gets its name
    tag.write_text(f'"{hashlib.md5(QUESTIONS).hexdigest()}"')
    fetch("LaMP_3", "user", site.address, str(tmp_path), budget_s=30)
    assert done.read_bytes() == QUESTIONS and not part.exists() and not tag.exists()


def test_the_rest_of_another_file_is_not_put_behind_an_old_beginning(site, tmp_path):
    site.put("LaMP_3", "train")
    site.breaks = 1
    with pytest.raises(InputError):
        fetch("LaMP_3", "user", site.address, str(tmp_path), budget_s=0)
    site.files["/LaMP/LaMP_3/train/train_questions.json"] = changed = QUESTIONS.replace(b"y", b"z")
    folder, _ = fetch("LaMP_3", "user", site.address, str(tmp_path), budget_s=0)
    assert (tmp_path / folder / "train_questions.json").read_bytes() == changed


def test_what_is_there_is_not_fetched_again_but_checked(site, tmp_path):
    site.put("LaMP_3", "train")
    folder, _ = fetch("LaMP_3", "user", site.address, str(tmp_path), budget_s=0)
    site.asked.clear()
    fetch("LaMP_3", "user", site.address, str(tmp_path), budget_s=0)
    assert site.asked == []
    (tmp_path / folder / "train_questions.json").write_bytes(QUESTIONS[:-9])
    with pytest.raises(InputError, match="SHA-256 is .* but .*SHA256SUMS says .*Remove it to fetch"):
        fetch("LaMP_3", "user", site.address, str(tmp_path), budget_s=0)


@pytest.mark.parametrize(
    ("task", "split", "message"),
    [
        ("LaMP_6", "time", "its mails are not public"),
        ("LaMP_9", "time", "no such task; known: LaMP_1, LaMP_2"),
        ("LaMP_2", "later", "split=later: with download, expected one of user, time"),
        ("LaMP_2", "time", "the site answers 404 .*--address"),
    ],
)
def test_what_is_not_there_is_said(site, tmp_path, task, split, message):
    with pytest.raises(InputError, match=message):
        fetch(task, split, site.address, str(tmp_path), budget_s=0)


def test_without_a_network_the_message_says_what_to_do(tmp_path):
    with pytest.raises(InputError, match="cannot be fetched .*put it into .*--source instead of --download"):
        fetch("LaMP_2", "time", "http://127.0.0.1:9/LaMP", str(tmp_path), budget_s=0)
