"""The application as programs and the shell meet it: the API endpoint, the port, the start and the end."""

import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import httpx
import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError

from cots.errors import CotsError
from demo.app import listen


@pytest.fixture(scope="module")
def api(address: str) -> Client:
    return Client(address, verbose=False)


def test_the_api_answers_with_the_document_of_the_command_line(api: Client) -> None:
    document = api.predict("a dog", None, "people", "", "", 3, api_name="/search")
    assert {"query", "model", "took_ms", "hits"} <= document.keys()
    assert document["query"] == "a dog"
    assert document["took_ms"].keys() == {"encode", "search", "fetch"}
    assert [hit["rank"] for hit in document["hits"]] == [1, 2, 3]
    assert {"rank", "score", "path", "kind", "caption", "start", "end"} <= document["hits"][0].keys()


def test_the_api_has_names_and_defaults(api: Client) -> None:
    assert len(api.predict(text="a dog", api_name="/search")["hits"]) == 10
    videos = api.predict(text="a dog", kind="video", source="clips", k=5, api_name="/search")["hits"]
    assert {hit["kind"] for hit in videos} == {"video"}


def test_the_api_searches_captions(api: Client) -> None:
    hits = api.predict(text="red", mode="text", api_name="/search_captions")["hits"]
    assert [Path(hit["path"]).name for hit in hits] == ["flicker.gif"]
    assert len(api.predict(text="red", api_name="/search_captions")["hits"]) == 10
    with pytest.raises(AppError, match="no mode 'sound'"):
        api.predict(text="red", mode="sound", api_name="/search_captions")


def test_the_api_searches_by_picture(api: Client, media_folder: Path) -> None:
    picture = handle_file(str(media_folder / "green.png"))
    for text in ("", "a green square"):
        hits = api.predict(text=text, image=picture, k=2, api_name="/search")["hits"]
        assert len(hits) == 2
    by_picture = api.predict(text="", image=picture, k=1, api_name="/search")["hits"]
    assert by_picture[0]["path"] == str(media_folder / "green.png")


def test_the_api_answers_mistakes_with_sentences(api: Client, media_folder: Path) -> None:
    with pytest.raises(AppError, match="Type a few words"):
        api.predict(text="", api_name="/search")
    with pytest.raises(AppError, match="not an image"):
        api.predict(text="", image=handle_file(str(media_folder / "secret.txt")), api_name="/search")
    with pytest.raises(AppError, match="k is 0"):
        api.predict(text="a dog", k=0, api_name="/search")
    with pytest.raises(AppError, match="no kind 'painting'"):
        api.predict(text="a dog", kind="painting", api_name="/search")


def test_the_api_reads_no_file_of_the_server(address: str, media_folder: Path) -> None:
    """A raw request may name any path or address as "uploaded"; only what was uploaded is read."""
    outside = (str(media_folder / "left_out.png"), "/etc/passwd", f"{address}/page/favicon.png")
    for path, stream in itertools.product(outside, (False, True)):
        image = {"path": path, "is_stream": stream, "meta": {"_type": "gradio.FileData"}}
        call = httpx.post(f"{address}/gradio_api/call/search", json={"data": ["", image, "", "", "", 3]})
        events = httpx.get(f"{address}/gradio_api/call/search/{call.json()['event_id']}").text
        assert "event: error" in events
        assert "hits" not in events


def test_the_page_has_no_footer_reports_nothing_and_forbids_other_hosts(address: str) -> None:
    reply = httpx.get(address)
    assert reply.status_code == 200
    policy = reply.headers["content-security-policy"]
    assert "default-src 'self'" in policy
    assert "http" not in policy
    config = httpx.get(f"{address}/config").json()
    assert config["analytics_enabled"] is False
    assert config["footer_links"] == []
    assert httpx.get(f"{address}/page/page.css").headers["content-type"].startswith("text/css")


def test_a_port_in_use_is_a_sentence_that_names_it() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(CotsError, match=f"Port {port} on 127.0.0.1 is in use; choose another, for example: --port"):
            listen("127.0.0.1", port)


def test_the_port_that_is_advised_is_one() -> None:
    try:
        taken = socket.create_server(("127.0.0.1", 65535))
    except OSError:
        taken = socket.socket()  # another program's is as good
    with taken, pytest.raises(CotsError, match=r"Port 65535 on 127\.0\.0\.1 is in use.*: --port 65534$"):
        listen("127.0.0.1", 65535)


def test_a_host_of_another_machine_is_a_sentence() -> None:
    with pytest.raises(CotsError, match=r"192\.0\.2\.1 is not an address of this machine; try --host 127\.0\.0\.1\.$"):
        listen("192.0.2.1", 0)


def test_launch_prints_its_address_serves_and_ends_quietly_on_ctrl_c(gallery: Path, tiny_model_dir: Path) -> None:
    code = "import sys; from demo.app import launch; launch(sys.argv[1], port=0, model=sys.argv[2])"
    command = [sys.executable, "-c", code, str(gallery), str(tiny_model_dir)]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )
    try:
        ready = process.stdout.readline()
        assert ready.startswith("10 items and the model ")
        line = process.stdout.readline()
        address = line.split()[3]
        assert address.startswith("http://127.0.0.1:")
        assert json.load(urllib.request.urlopen(f"{address}/config"))["title"].startswith("COTS")
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert errors == ""
    assert process.returncode == 0
