"""A model hub on 127.0.0.1: folders served as huggingface_hub, transformers and datasets ask for them."""

import hashlib
import json
import re
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import parse_qs

COMMIT = "0123456789abcdef0123456789abcdef01234567"
API = re.compile(
    r"/api/(models|datasets)/([\w.-]+/[\w.-]+?)(?:/(revision|tree|paths-info|auth-check)(/.*)?)?"
)
FILE = re.compile(r"/(datasets/)?([\w.-]+/[\w.-]+)/resolve/[^/]+/(.+)")


@contextmanager
def serve(root: Path, gated: tuple[str, ...] = ()):
    """Serve root/models/OWNER/NAME and root/datasets/OWNER/NAME; yield the address and the requests so far.

    `gated` are names that show themselves and refuse their files; OWNER/broken answers 503 to everything.
    Nothing listens after the block.
    """
    requests = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append(f"{self.command} {self.path}")
            path = self.path.split("?")[0]
            length = int(self.headers.get("Content-Length", 0))
            body = self.rfile.read(length)
            if match := API.fullmatch(path):
                self.answer_api(*match.groups(), body)
            elif match := FILE.fullmatch(path):
                self.answer_file(*match.groups())
            else:
                self.answer(404, {"error": "Not Found"})

        do_HEAD = do_POST = do_GET

        def answer_api(self, kind, name, what, below, body):
            folder = root / kind / name
            if name.endswith("/broken"):
                return self.answer(503, {"error": "Service Unavailable"})
            if not folder.is_dir():
                return self.answer(401, {"error": "Repository not found"}, "RepoNotFound")
            files = sorted(
                path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()
            )
            if what == "auth-check":
                return self.refuse() if name in gated else self.answer(200, {})
            if what == "paths-info":
                asked = parse_qs(body.decode()).get("paths") or json.loads(body)["paths"]
                return self.answer(200, [entry(folder, path) for path in asked if (folder / path).exists()])
            if what == "tree":
                start = folder / below.lstrip("/").partition("/")[2]
                if not start.is_dir():
                    return self.answer(404, {"error": "Entry not found"}, "EntryNotFound")
                deep = "recursive=true" in self.path.lower()
                found = sorted(start.rglob("*") if deep else start.iterdir())
                return self.answer(
                    200, [entry(folder, path.relative_to(folder).as_posix()) for path in found]
                )
            siblings = [{"rfilename": file} for file in files]
            about = {
                "id": name,
                "sha": COMMIT,
                "private": False,
                "gated": "manual" if name in gated else False,
            }
            return self.answer(200, {**about, "siblings": siblings, "tags": []})

        def answer_file(self, is_set, name, file):
            folder = root / ("datasets" if is_set else "models") / name
            if not folder.is_dir():
                return self.answer(401, {"error": "Repository not found"}, "RepoNotFound")
            if name in gated:
                return self.refuse()
            if not (folder / file).is_file():
                return self.answer(404, {"error": "Entry not found"}, "EntryNotFound")
            return self.answer(200, (folder / file).read_bytes())

        def refuse(self):
            self.answer(401, {"error": "Access to it is restricted"}, "GatedRepo")

        def answer(self, status, content, error=None):
            content = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            if error:
                self.send_header("X-Error-Code", error)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", requests
    finally:
        server.shutdown()
        server.server_close()


def entry(folder: Path, file: str) -> dict:
    """Return what the hub's listings say about a file or a folder."""
    if (folder / file).is_dir():
        return {"type": "directory", "path": file, "size": 0, "oid": COMMIT}
    content = (folder / file).read_bytes()
    digest = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    return {"type": "file", "path": file, "size": len(content), "oid": digest}
