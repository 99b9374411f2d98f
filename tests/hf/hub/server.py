"""A Hub on loopback: as much of the protocol as the `huggingface_hub` client speaks when it pushes and pulls a model.

Not spoken: Xet, whose chunk protocol is proprietary (tests set HF_HUB_DISABLE_XET, and the client falls back to LFS).
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import re
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

WRITER, READER = "hf_writer", "hf_reader"
"""Tokens: of the owner, and of one who may only read."""


@dataclasses.dataclass
class Fault:
    """What goes wrong with the next `times` requests whose "METHOD /path" matches.

    Args:
        status: answer with it; None = drop the connection after `after` bytes of the body.
        block: set an event and hold the request until the client is gone (to kill it in the middle).
    """

    pattern: str
    status: int | None = None
    headers: dict[str, str] = dataclasses.field(default_factory=dict)
    message: str = "injected"
    times: int = 1
    after: int = 0
    block: threading.Event | None = None


@dataclasses.dataclass
class Repo:
    """One model repository: its branches, each a list of commits, and the files of every commit."""

    private: bool = False
    branches: dict[str, list[str]] = dataclasses.field(default_factory=lambda: {"main": []})
    commits: dict[str, dict[str, bytes]] = dataclasses.field(default_factory=dict)
    lfs: dict[str, str] = dataclasses.field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        """Put a new state on a branch."""
        sha = hashlib.sha1(f"{branch}{len(self.commits)}".encode(), usedforsecurity=False).hexdigest()
        self.commits[sha] = files
        self.branches[branch].append(sha)
        return sha

    def find(self, revision: str) -> str | None:
        """Return the commit of a branch or the commit itself."""
        if revision in self.branches:
            return self.branches[revision][-1]
        return revision if revision in self.commits else None


class LocalHub(ThreadingHTTPServer):
    """The server; `with LocalHub() as hub` starts and stops it."""

    daemon_threads = True

    def __init__(self, multipart_above: int = 1 << 40, part: int = 1 << 14) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        # As large files of the Hub lie on another host: redirects to the same one are followed for their headers.
        self.elsewhere = f"http://localhost:{self.server_address[1]}"
        self.multipart_above, self.part = multipart_above, part
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.parts: dict[tuple[str, int], bytes] = {}
        self.faults: list[Fault] = []
        self.seen: list[str] = []
        self.lock = threading.RLock()

    def __enter__(self) -> LocalHub:
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that is gone is what some tests are about."""

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """Return what a revision holds."""
        sha = self.repos[repo].find(revision)
        assert sha is not None
        return self.repos[repo].commits[sha]

    def count(self, pattern: str) -> int:
        """Return how many requests so far match."""
        return sum(bool(re.search(pattern, line)) for line in self.seen)

    def fault(self, line: str) -> Fault | None:
        """Return the fault that is due for a request."""
        with self.lock:
            for fault in self.faults:
                if fault.times and re.search(fault.pattern, line):
                    fault.times -= 1
                    return fault
        return None


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    server: LocalHub

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass

    def _handle(self) -> None:
        split = urlsplit(self.path)
        self.query = parse_qs(split.query)
        path = unquote(split.path)
        line = f"{self.command} {path}"
        self.server.seen.append(line)
        self.broken: Fault | None = self.server.fault(line)
        if self.broken is not None and self.broken.status is None and self.command in ("PUT", "POST"):
            self.rfile.read(self.broken.after)
            self._drop()
            return
        body = self._body()
        if self.broken is not None and self.broken.status is not None:
            self._error(self.broken.status, self.broken.message, headers=self.broken.headers)
            return
        for method, pattern, name in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in method.split("|"):
                with self.server.lock:
                    answer = getattr(self, name)(body, *match.groups())
                if answer is not None:
                    self._json(200, answer)
                return
        self._error(404, "no such route", "EntryNotFound")

    do_GET = do_HEAD = do_POST = do_PUT = _handle  # noqa: N815

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _drop(self) -> None:
        if self.broken is not None and self.broken.block is not None:
            self.broken.block.set()
            self.connection.settimeout(30)
            while self.connection.recv(1 << 16):
                pass
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.broken is not None and self.broken.status is None and status in (200, 206):
            self.wfile.write(body[: self.broken.after])
            self.wfile.flush()
            self._drop()
            return
        self.wfile.write(body)

    def _json(self, status: int, data: Any) -> None:
        self._send(status, json.dumps(data).encode(), {"Content-Type": "application/json"})

    def _error(self, status: int, message: str, code: str = "", headers: dict[str, str] | None = None) -> None:
        extra = {"X-Error-Message": message, "Content-Type": "application/json", **(headers or {})}
        if code:
            extra["X-Error-Code"] = code
        self._send(status, json.dumps({"error": message}).encode(), extra)

    # -- who ---------------------------------------------------------------------------------------------------------

    @property
    def token(self) -> str:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ")

    def may_write(self, name: str = "user/", asks: bool = False) -> bool:
        """Answer 401 or 403 unless the token is the owner's, or that of somebody else who asks (a pull request)."""
        if self.token not in (WRITER, READER):
            self._error(401, "Invalid credentials in Authorization header")
            return False
        if self.token == READER or not (asks or name.startswith("user/")):
            self._error(403, "You have read access but not write access to this repository")
            return False
        return True

    @property
    def asks(self) -> bool:
        """Whether a request is to open a pull request."""
        return bool(self.query.get("create_pr"))

    def readable(self, name: str, revision: str) -> tuple[Repo, str] | None:
        """Return a repository and a commit, or answer 401 or 404."""
        repo = self.server.repos.get(name)
        if repo is None or (repo.private and self.token not in (WRITER, READER)):
            self._error(404 if self.token else 401, "Repository not found", "RepoNotFound")
            return None
        sha = repo.find(revision)
        if sha is None:
            self._error(404, f"Invalid rev id: {revision}", "RevisionNotFound")
            return None
        return repo, sha

    # -- repositories ------------------------------------------------------------------------------------------------

    def whoami(self, body: bytes) -> Any:
        if self.token in (WRITER, READER):
            return {"type": "user", "name": "user", "orgs": [], "auth": {"type": "access_token"}}
        return self._error(401, "Invalid credentials in Authorization header")

    def create(self, body: bytes) -> Any:
        asked = json.loads(body)
        name = f"{asked.get('organization') or 'user'}/{asked['name']}"
        if not self.may_write(name):
            return None
        if name in self.server.repos:
            return self._json(409, {"error": "You already created this model repo", "url": f"{self.server.url}/{name}"})
        repo = self.server.repos[name] = Repo(private=asked.get("visibility") == "private")
        repo.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"})
        return {"url": f"{self.server.url}/{name}", "name": name, "id": name}

    def branch(self, body: bytes, name: str, branch: str) -> Any:
        if not self.may_write(name) or (found := self.readable(name, "main")) is None:
            return None
        repo, sha = found
        if branch in repo.branches:
            return self._error(409, f"Reference already exists: {branch}")
        repo.branches[branch] = [sha]
        return {}

    def info(self, body: bytes, name: str, revision: str | None = None) -> Any:
        if (found := self.readable(name, revision or "main")) is None:
            return None
        repo, sha = found
        files = [{"rfilename": path} for path in repo.commits[sha]]
        return {"id": name, "modelId": name, "sha": sha, "private": repo.private, "siblings": files, "tags": []}

    def tree(self, body: bytes, name: str, revision: str, under: str | None) -> Any:
        if (found := self.readable(name, revision)) is None:
            return None
        repo, sha = found
        prefix = f"{under}/" if under else ""
        files = {path: data for path, data in repo.commits[sha].items() if path.startswith(prefix)}
        if prefix and not files:
            return self._error(404, f"{under} does not exist on {revision}", "EntryNotFound")
        return [{"type": "file", "path": path, "size": len(data), "oid": git_oid(data)} for path, data in files.items()]

    def validate_yaml(self, body: bytes) -> Any:
        content = json.loads(body)["content"]
        head = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
        try:
            data = yaml.safe_load(head[1]) if head else {}
        except yaml.YAMLError as error:
            return self._json(400, {"errors": [{"message": str(error)}], "warnings": []})
        errors = [
            {"message": f'"{key}" must be a {kind.__name__}'}
            for key, kind in (("tags", list), ("license", str), ("library_name", str), ("model-index", list))
            if key in data and not isinstance(data[key], kind)
        ]
        return self._json(400 if errors else 200, {"errors": errors, "warnings": []})

    # -- upload ------------------------------------------------------------------------------------------------------

    def preupload(self, body: bytes, name: str, revision: str) -> Any:
        if not self.may_write(name, self.asks) or (found := self.readable(name, revision)) is None:
            return None
        repo, sha = found
        files = []
        for file in json.loads(body)["files"]:
            path, held = file["path"], repo.commits[sha].get(file["path"])
            lfs = path.endswith((".safetensors", ".bin", ".pt", ".model")) or file["size"] > 10 << 20
            oid = None if held is None else hashlib.sha256(held).hexdigest() if lfs else git_oid(held)
            files.append({"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False, "oid": oid})
        return {"files": files}

    def batch(self, body: bytes, name: str) -> Any:
        if not self.may_write():
            return None
        asked, objects = json.loads(body), []
        for entry in asked["objects"]:
            oid, size = entry["oid"], entry["size"]
            given: dict[str, Any] = {"oid": oid, "size": size}
            if oid not in self.server.objects:
                href, header = f"{self.server.url}/lfs/{oid}", {}
                if size > self.server.multipart_above and "multipart" in asked["transfers"]:
                    count = -(-size // self.server.part)
                    header = {f"{i:05d}": f"{self.server.url}/part/{oid}/{i}" for i in range(1, count + 1)}
                    header["chunk_size"] = str(self.server.part)
                    href = f"{self.server.url}/complete/{oid}"
                verify = {"href": f"{self.server.url}/verify/{name}"}
                given["actions"] = {"upload": {"href": href, "header": header}, "verify": verify}
            objects.append(given)
        return {"transfer": "basic", "objects": objects}

    def put_object(self, body: bytes, oid: str) -> Any:
        self._store(oid, body)

    def put_part(self, body: bytes, oid: str, number: str) -> None:
        self.server.parts[oid, int(number)] = body
        self._send(200, b"", {"ETag": f'"{hashlib.md5(body, usedforsecurity=False).hexdigest()}"'})

    def complete(self, body: bytes, oid: str) -> Any:
        numbers = [part["partNumber"] for part in json.loads(body)["parts"]]
        self._store(oid, b"".join(self.server.parts[oid, number] for number in numbers))

    def _store(self, oid: str, data: bytes) -> None:
        if hashlib.sha256(data).hexdigest() != oid:
            self._error(400, "content does not match its oid")
            return
        self.server.objects[oid] = data
        self._send(200, b"", {})

    def verify(self, body: bytes, name: str) -> Any:
        asked = json.loads(body)
        if len(self.server.objects.get(asked["oid"], b"")) != asked["size"]:
            return self._error(404, "object is not there")
        return {}

    def commit(self, body: bytes, name: str, revision: str) -> Any:
        if not self.may_write(name, self.asks) or (found := self.readable(name, revision)) is None:
            return None
        repo, sha = found
        files = dict(repo.commits[sha])
        for line in body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                if value["oid"] not in self.server.objects:
                    return self._error(400, f"LFS object {value['oid']} was not uploaded")
                files[value["path"]] = self.server.objects[value["oid"]]
                repo.lfs[value["path"]] = value["oid"]
            elif operation["key"] == "deletedFile":
                files.pop(value["path"], None)
        answer: dict[str, Any] = {}
        if self.asks:
            number = sum(branch.startswith("refs/pr/") for branch in repo.branches) + 1
            revision = f"refs/pr/{number}"
            repo.branches[revision] = []
            answer["pullRequestUrl"] = f"{self.server.url}/{name}/discussions/{number}"
        oid = repo.commit(revision, files)
        return {**answer, "success": True, "commitOid": oid, "commitUrl": f"{self.server.url}/{name}/commit/{oid}"}

    # -- download ----------------------------------------------------------------------------------------------------

    def resolve(self, body: bytes, name: str, revision: str, path: str) -> Any:
        if (found := self.readable(name, revision)) is None:
            return None
        repo, sha = found
        data = repo.commits[sha].get(path)
        if data is None:
            return self._error(404, "Entry not found", "EntryNotFound", {"X-Repo-Commit": sha})
        headers = {"X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        if path in repo.lfs:
            oid = hashlib.sha256(data).hexdigest()
            linked = {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(data))}
            return self._send(302, b"", {**headers, **linked, "Location": f"{self.server.elsewhere}/cdn/{oid}"})
        return self._ranged(data, {**headers, "ETag": f'"{git_oid(data)}"'})

    def cdn(self, body: bytes, oid: str) -> Any:
        self._ranged(self.server.objects[oid], {"ETag": f'"{oid}"', "Accept-Ranges": "bytes"})

    def _ranged(self, data: bytes, headers: dict[str, str]) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if asked is None:
            self._send(200, data, headers)
            return
        begin, end = int(asked[1]), int(asked[2] or len(data) - 1) + 1
        span = f"bytes {begin}-{min(end, len(data)) - 1}/{len(data)}"
        self._send(206, data[begin:end], {**headers, "Content-Range": span})


def git_oid(data: bytes) -> str:
    """Return the name that git gives a blob."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


NAME = r"([^/]+/[^/]+)"
ROUTES = [
    ("GET", "/api/whoami-v2", "whoami"),
    ("POST", "/api/repos/create", "create"),
    ("POST", "/api/validate-yaml", "validate_yaml"),
    ("POST", f"/api/models/{NAME}/branch/(.+)", "branch"),
    ("POST", f"/api/models/{NAME}/preupload/(.+)", "preupload"),
    ("POST", f"/api/models/{NAME}/commit/(.+)", "commit"),
    ("GET", f"/api/models/{NAME}/revision/(.+)", "info"),
    ("GET", f"/api/models/{NAME}/tree/((?:refs/pr/)?[^/]+)(?:/(.+))?", "tree"),
    ("GET", f"/api/models/{NAME}", "info"),
    ("POST", rf"/{NAME}\.git/info/lfs/objects/batch", "batch"),
    ("PUT", "/lfs/([0-9a-f]{64})", "put_object"),
    ("PUT", r"/part/([0-9a-f]{64})/(\d+)", "put_part"),
    ("POST", "/complete/([0-9a-f]{64})", "complete"),
    ("POST", f"/verify/{NAME}", "verify"),
    ("GET|HEAD", "/cdn/([0-9a-f]{64})", "cdn"),
    ("GET|HEAD", f"/{NAME}/resolve/((?:refs/pr/)?[^/]+)/(.+)", "resolve"),
]
