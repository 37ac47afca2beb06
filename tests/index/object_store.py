"""An object store in this process: it speaks S3, honours conditional puts, keeps everything in memory, and can fail."""

import threading
from collections.abc import Callable, Iterable
from http import HTTPStatus
from pathlib import Path
from typing import Any

import boto3
import numpy as np
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

from cots.model.retrieval_model import RetrievalModel
from index.build import build
from index.check import check
from index.gallery import open_gallery

BUCKET = "pictures"
TABLE = f"s3://{BUCKET}/galleries/one"


class _Silent(WSGIRequestHandler):
    def log(self, type: str, message: str, *args: Any) -> None:
        pass


class ObjectStore:
    """Moto's S3 behind an HTTP server.

    Attributes:
        environment: the variables by which LanceDB finds the store and signs its requests.
        puts: keys that were put, in their order.
        failing: called with the method and path of each request; gives the status of the error to answer it with, or 0.
        after_put: called with the path of each object that was put, before the answer is given; gives the status of an
            error to answer with instead, or 0.
    """

    def __init__(self) -> None:
        self._moto = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True, request_handler=_Silent)
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        self.puts: list[str] = []
        self.failing: Callable[[str, str], int] = lambda method, path: 0
        self.after_put: Callable[[str], int] = lambda path: 0
        self.environment = {
            "AWS_ENDPOINT": f"http://127.0.0.1:{self._server.server_port}",
            "AWS_ACCESS_KEY_ID": "the-key-of-the-test",
            "AWS_SECRET_ACCESS_KEY": "the-secret-of-the-test",
            "AWS_REGION": "us-east-1",
            "ALLOW_HTTP": "true",
            "OBJECT_STORE_CLIENT_MAX_RETRIES": "0",
        }
        self.client = boto3.client(
            "s3",
            endpoint_url=self.environment["AWS_ENDPOINT"],
            region_name="us-east-1",
            aws_access_key_id=self.environment["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=self.environment["AWS_SECRET_ACCESS_KEY"],
        )

    def stop(self) -> None:
        """Let go of the port."""
        self._server.shutdown()
        self._server.server_close()

    def reset(self) -> None:
        """Forget everything and be well; there is one empty bucket."""
        self.failing, self.after_put = lambda method, path: 0, lambda path: 0
        for bucket in self.client.list_buckets()["Buckets"]:
            for key in self.listed(bucket["Name"]):
                self.client.delete_object(Bucket=bucket["Name"], Key=key)
            self.client.delete_bucket(Bucket=bucket["Name"])
        self.client.create_bucket(Bucket=BUCKET)
        self.puts.clear()

    def listed(self, bucket: str = BUCKET) -> list[str]:
        """What the bucket holds."""
        return [entry["Key"] for entry in self.client.list_objects_v2(Bucket=bucket).get("Contents", [])]

    def _answer(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        status, head, answer = self.failing(method, path), [], [b""]
        if status:
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))  # else the answer may be lost
        else:
            answer = self._moto(environ, lambda *arguments: head.append(arguments))
            if method == "PUT":
                self.puts.append(path)
                status = self.after_put(path)
        if status:
            start_response(f"{status} {HTTPStatus(status).phrase}", [("Content-Type", "text/plain")])
            return [b""]
        start_response(*head[0])
        return answer


def rows_by_path(gallery: Path) -> dict[str, np.ndarray]:
    """The vectors of each file; as many as the table has rows for it."""
    snapshot = open_gallery(gallery).snapshot
    paths = np.array(snapshot.rows["path"].to_pylist())
    return {path: snapshot.vectors[paths == path] for path in set(paths.tolist())}


def assert_holds_each_file_once(gallery: Path, photos: Path, tmp_path: Path, model: RetrievalModel) -> None:
    """As a gallery that nothing disturbed."""
    build([photos], tmp_path / "undisturbed", model)
    found, expected = rows_by_path(gallery), rows_by_path(tmp_path / "undisturbed")
    assert check(gallery) == []
    assert found.keys() == expected.keys()
    for path in expected:
        np.testing.assert_allclose(found[path], expected[path], atol=2e-3)
