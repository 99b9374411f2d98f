"""A Hub on loopback: as much of the protocol as the `huggingface_hub` client speaks when it pushes and pulls a model.

Not spoken: Xet, whose chunk protocol is proprietary (tests set HF_HUB_DISABLE_XET, and the client falls back to LFS).
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import re
from typing import Any

import yaml

from tests.hf.hub.faulty_server import FaultyHandler, FaultyServer

WRITER, READER = "hf_writer", "hf_reader"
"""Tokens: of the owner, and of one who may only read."""


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


class LocalHub(FaultyServer):
    """The server; `with LocalHub() as hub` starts and stops it."""

    def __init__(self, multipart_above: int = 1 << 40, part: int = 1 << 14) -> None:
        super().__init__(Handler)
        # As large files of the Hub lie on another host: redirects to the same one are followed for their headers.
        self.elsewhere = f"http://localhost:{self.server_address[1]}"
        self.multipart_above, self.part = multipart_above, part
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.parts: dict[tuple[str, int], bytes] = {}

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """Return what a revision holds."""
        sha = self.repos[repo].find(revision)
        assert sha is not None
        return self.repos[repo].commits[sha]


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


class Handler(FaultyHandler):
    """One connection."""

    server: LocalHub
    routes = ROUTES

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


def git_oid(data: bytes) -> str:
    """Return the name that git gives a blob."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
