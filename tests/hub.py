"""A fake Hugging Face Hub and a fake Google Cloud Storage on loopback, as far as their clients ask while they read.

Nothing here is the service itself: what `huggingface_hub` and `gcsfs` send is real, what answers is not.
"""

import contextlib
import io
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

REPOSITORY = "datasets/me/corpus"


@contextlib.contextmanager
def fake_hub(folder, environment):
    """`folder` as hf://datasets/me/corpus; `environment` (a MonkeyPatch) leads the client to it.

    Yields the ranges that are asked for.
    """
    import huggingface_hub

    asked = []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def answer(self, data, status=200, **headers):
            self.send_response(status)
            for name, value in {"Content-Length": str(len(data)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def facts(self, path):
            facts = {"path": path.relative_to(folder).as_posix(), "oid": "0" * 40, "size": path.stat().st_size}
            return {"type": "file", **facts} if path.is_file() else {**facts, "type": "directory", "size": 0}

        def do_GET(self):
            url = urlsplit(self.path)
            path = unquote(url.path)
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if path == f"/api/{REPOSITORY}":
                self.answer(json.dumps({"id": "me/corpus", "sha": "0" * 40}).encode())
            elif path.startswith(f"/api/{REPOSITORY}/tree/main"):
                inside = folder / path.removeprefix(f"/api/{REPOSITORY}/tree/main").lstrip("/")
                deep = parse_qs(url.query).get("recursive") == ["true"]
                if inside.is_dir():
                    found = sorted(inside.rglob("*") if deep else inside.iterdir())
                    self.answer(json.dumps([self.facts(one) for one in found]).encode())
                else:
                    self.answer(b"{}", 404, X_Error_Code="EntryNotFound")
            elif path == f"/api/{REPOSITORY}/paths-info/main":
                names = parse_qs(body.decode()).get("paths") or json.loads(body)["paths"]
                there = [folder / name for name in names if (folder / name).exists()]
                self.answer(json.dumps([self.facts(one) for one in there]).encode())
            elif path.startswith(f"/{REPOSITORY}/resolve/main/"):
                data = (folder / path.removeprefix(f"/{REPOSITORY}/resolve/main/")).read_bytes()
                if wanted := self.headers.get("Range"):
                    first, last = map(int, wanted.removeprefix("bytes=").split("-"))
                    asked.append((first, last))
                    about = f"bytes {first}-{min(last, len(data) - 1)}/{len(data)}"
                    self.answer(data[first : last + 1], 206, Content_Range=about)
                else:
                    self.answer(data)
            else:
                self.answer(b"{}", 404, X_Error_Code="RepoNotFound")

        do_POST = do_HEAD = do_GET

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    constants, url = huggingface_hub.constants, f"http://127.0.0.1:{server.server_port}"
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, url)  # as HF_ENDPOINT would
    environment.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    environment.setattr(constants, "ENDPOINT", url)
    huggingface_hub.HfFileSystem.clear_instance_cache()
    try:
        yield asked
    finally:
        huggingface_hub.HfFileSystem.clear_instance_cache()
        server.shutdown()
        thread.join()
        server.server_close()


@contextlib.contextmanager
def fake_gcs(environment):
    """A Google Cloud Storage in memory (gcp-storage-emulator) with the bucket gs://corpus, for `gcsfs`."""
    environment.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # read at the import; else it asks Google
    environment.setenv("NO_GCE_CHECK", "true")
    import gcsfs
    from gcp_storage_emulator.server import create_server

    with contextlib.redirect_stderr(io.StringIO()):  # it prints connections that end
        server = create_server("127.0.0.1", 0, in_memory=True, default_bucket="corpus")
        server.start()
        environment.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{server._api._httpd.server_port}")
        gcsfs.GCSFileSystem.clear_instance_cache()
        try:
            yield
        finally:
            gcsfs.GCSFileSystem.clear_instance_cache()
            server.stop()
