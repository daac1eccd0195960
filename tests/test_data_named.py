"""Named corpora: where they are looked for, and a server of our own that sends right and wrong."""

import hashlib
import io
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pooch
import pytest

from tinygrad_llm.data import corpus_path, named

TEXT = b"ham\tSee you at 8\nspam\tYou have won!\n"
FOLDER_OF_THE_USER = "TINYGRAD_LLM_DATA"


def zipped(name, text=TEXT):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, text)
    return content.getvalue()


def damaged(content, place):
    """With the byte there inverted."""
    return content[:place] + bytes([content[place] ^ 255]) + content[place + 1 :]


ANSWERS = {
    "/text.txt": TEXT,
    "/wrong.txt": b"<html>Please log in</html>",
    "/text.zip": zipped("collection"),
    "/other.zip": zipped("readme"),
    "/wrong.zip": zipped("collection", b"another"),
    "/damaged.zip": damaged(zipped("collection"), 30 + len("collection")),  # the first of the data
    "/checksum.zip": damaged(zipped("collection"), 45 + len("collection")),
    "/half.zip": zipped("collection")[:60],
}


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append(self.path)
        content = ANSWERS.get(self.path)
        self.send_response(200 if content is not None else 404)
        self.send_header("Content-Length", str(len(content or b"")))
        self.end_headers()
        self.wfile.write(content or b"")

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked = []
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and no folder of the user's."""
    monkeypatch.setattr(pooch, "os_cache", lambda project: tmp_path / "cache" / project)
    monkeypatch.delenv(FOLDER_OF_THE_USER, raising=False)
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "cache" / "tinygrad_llm"


@pytest.fixture
def corpus(monkeypatch):
    """Makes the-verdict another corpus: corpus(url, member)."""

    def put(url, member=None):
        right = hashlib.sha256(TEXT).hexdigest()
        source = named.Source("a test", "text.txt", right, url, member)
        monkeypatch.setitem(named.SOURCES, "the-verdict", source)

    return put


def files_under(folder):
    return [path for path in Path(folder).rglob("*") if path.is_file()]


@pytest.mark.parametrize("url, member", [("/text.txt", None), ("/text.zip", "collection")])
def test_download_once(server, cache, corpus, capfd, url, member):
    corpus(server.url + url, member)
    server.asked.clear()
    path = corpus_path("the-verdict")
    assert path == cache / "text.txt" and path.read_bytes() == TEXT
    assert corpus_path("the-verdict") == path
    assert server.asked == [url]
    assert files_under(cache) == [path]
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "url, member, wrong",
    [
        ("/wrong.txt", None, "its SHA-256 is"),
        ("/wrong.zip", "collection", "its SHA-256 is"),
        ("/other.zip", "x", "it is a zip archive without x"),
        ("/text.txt", "x", "it is no zip archive"),
        ("/damaged.zip", "collection", "it is no zip archive, or a damaged one"),
        ("/checksum.zip", "collection", "it is no zip archive, or a damaged one"),
        ("/half.zip", "collection", "it is no zip archive, or a damaged one"),
    ],
)
def test_a_wrong_download_is_not_kept(server, cache, corpus, url, member, wrong):
    corpus(server.url + url, member)
    with pytest.raises(ValueError, match=f"was not kept: {wrong}.*; try again later") as error:
        corpus_path("the-verdict")
    assert "\n" not in str(error.value)
    assert files_under(cache) == []


def test_no_such_page_and_no_network(server, cache, corpus):
    for url in (server.url + "/nothing", "http://127.0.0.1:9/text.txt", "http://nowhere.invalid/a"):
        corpus(url)
        with pytest.raises(ConnectionError, match="cannot be downloaded from") as error:
            corpus_path("the-verdict")
        assert f"check the network, or put text.txt into {cache} or a folder" in str(error.value)
        assert "\n" not in str(error.value)
        assert files_under(cache) == []


def test_the_users_folder_comes_first(server, cache, corpus, tmp_path, monkeypatch):
    corpus(server.url + "/text.txt")
    server.asked.clear()
    monkeypatch.setenv(FOLDER_OF_THE_USER, str(tmp_path))
    mine = tmp_path / "text.txt"
    mine.write_bytes(TEXT)
    assert corpus_path("the-verdict") == mine
    assert server.asked == []
    mine.write_bytes(TEXT + b"edited")
    with pytest.raises(ValueError, match=r"text\.txt is not the file expected: .* delete or repl"):
        corpus_path("the-verdict")
    assert mine.read_bytes() == TEXT + b"edited"  # the user's own file stays
    mine.unlink()
    assert corpus_path("the-verdict") == cache / "text.txt"
    mine.write_bytes(TEXT)
    assert corpus_path("the-verdict") == mine


def test_the_users_folder_must_exist(server, cache, corpus, tmp_path, monkeypatch):
    corpus(server.url + "/text.txt")
    corpus_path("the-verdict")  # is in the cache, but that is not where the user looks
    (tmp_path / "file").write_bytes(b"")
    for wrong in (tmp_path / "nowhere", tmp_path / "file"):
        monkeypatch.setenv(FOLDER_OF_THE_USER, str(wrong))
        with pytest.raises(ValueError, match=f"{FOLDER_OF_THE_USER} names no folder: '{wrong}'"):
            corpus_path("the-verdict")
    monkeypatch.setenv(FOLDER_OF_THE_USER, "")  # as good as unset
    assert corpus_path("the-verdict") == cache / "text.txt"


def test_a_broken_cache_is_noticed(server, cache, corpus):
    corpus(server.url + "/text.txt")
    corpus_path("the-verdict").write_bytes(TEXT[:10])
    with pytest.raises(ValueError, match="not the file expected"):
        corpus_path("the-verdict")


def test_unknown_name():
    with pytest.raises(
        ValueError, match="no corpus 'verdict': expected one of the-verdict, tiny-s"
    ):
        corpus_path("verdict")


@pytest.mark.parametrize("name", named.SOURCES)
def test_the_chapters_corpora(name):
    if named.find_corpus(name) is None:
        pytest.skip(f"{FOLDER_OF_THE_USER} does not name the folder with the corpora")
    assert corpus_path(name).name == named.SOURCES[name].file
    assert named.SOURCES[name].url.startswith("https://")
