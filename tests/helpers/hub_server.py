"""A small Hugging Face Hub in this process, for the real huggingface_hub client: repos, commits, LFS, tokens, faults.

Only the routes that saving, pushing and loading adapters need. `hub.faults` breaks connections on purpose.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml
from huggingface_hub.repocard_data import model_index_to_eval_results

LARGE = (".safetensors", ".bin", ".pt", ".pth", ".png")


@dataclass
class Commit:
    files: dict[str, bytes]
    message: str
    parent: str | None

    @property
    def sha(self) -> str:
        content = "".join(f"{path}:{hashlib.sha1(data).hexdigest()};" for path, data in sorted(self.files.items()))
        return hashlib.sha1(f"{self.parent}|{self.message}|{content}".encode()).hexdigest()


@dataclass
class Repo:
    private: bool
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def add(self, branch: str, commit: Commit) -> str:
        self.commits[commit.sha] = commit
        self.branches[branch] = commit.sha
        return commit.sha

    def resolve(self, revision: str) -> Commit | None:
        return self.commits.get(self.branches.get(revision, revision))


@dataclass
class Fault:
    """Break the connection in the middle of the next `times` requests of a method whose path contains `path`."""

    method: str
    path: str
    times: int


class Hub(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, users: dict[str, str]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.users = users  # name by token
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.broken: list[str] = []  # requests that were broken off
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def history(self, name: str, branch: str = "main") -> list[Commit]:
        """Commits of a branch, oldest first, without the empty first one."""
        repo, commits = self.repos[name], []
        sha: str | None = repo.branches[branch]
        while sha is not None:
            commits.append(repo.commits[sha])
            sha = commits[-1].parent
        return commits[::-1][1:]

    def breaks(self, method: str, path: str) -> bool:
        with self.lock:
            for fault in self.faults:
                if fault.method == method and fault.path in path and fault.times > 0:
                    fault.times -= 1
                    self.broken.append(f"{method} {path}")
                    return True
        return False


@contextmanager
def running(users: dict[str, str]) -> Iterator[Hub]:
    hub = Hub(users)
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *args) -> None:
        pass

    # ----- plumbing ----------------------------------------------------------------------------------------------

    def handle_request(self) -> None:
        split = urlsplit(self.path)
        path, self.query = unquote(split.path), parse_qs(split.query)
        if self.server.breaks(self.command, path):
            return self.break_off(path)
        self.body = self.read_body()
        for method, pattern, name in ROUTES:
            if self.command in method and (match := re.fullmatch(pattern, path)):
                return getattr(self, name)(*match.groups())
        self.reply(404, {"error": f"no route {self.command} {path}"})

    do_GET = do_POST = do_PUT = do_HEAD = handle_request

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def break_off(self, path: str) -> None:
        """Read half of an upload, or send half of a download, and hang up."""
        if self.command == "GET" and (match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)):
            data = self.server.repos[match[1]].resolve(match[2]).files[match[3]]
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: len(data) // 2])
        else:
            self.rfile.read(int(self.headers.get("Content-Length", 2)) // 2)
        self.close_connection = True

    def reply(self, status: int, body: object = None, **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    @property
    def user(self) -> str | None:
        return self.server.users.get(self.headers.get("Authorization", "").removeprefix("Bearer "))

    def repo(self, name: str, write: bool = False) -> Repo | None:
        repo = self.server.repos.get(name)
        mine = self.user == name.split("/")[0]
        if repo is None or (repo.private and not mine):
            self.reply(
                401 if self.user is None else 404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound"
            )
            return None
        if write and not mine:
            self.reply(403, {"error": "You don't have the rights"})
            return None
        return repo

    def commit(self, name: str, revision: str) -> tuple[Repo, Commit] | None:
        repo = self.repo(name)
        if repo is None:
            return None
        commit = repo.resolve(revision)
        if commit is None:
            self.reply(404, {"error": "Revision not found"}, X_Error_Code="RevisionNotFound")
            return None
        return repo, commit

    # ----- routes ------------------------------------------------------------------------------------------------

    def whoami(self) -> None:
        if self.user is None:
            return self.reply(401, {"error": "Invalid token"})
        self.reply(200, {"type": "user", "name": self.user, "orgs": [], "auth": {"type": "access_token"}})

    def create(self) -> None:
        if self.user is None:
            return self.reply(401, {"error": "Invalid token"})
        wanted = json.loads(self.body)
        name = f"{wanted.get('organization') or self.user}/{wanted['name']}"
        if name.split("/")[0] != self.user:
            return self.reply(403, {"error": "You don't have the rights"})
        answer = {"url": f"{self.server.url}/{name}", "name": name, "id": name}
        if name in self.server.repos:
            return self.reply(409, {"error": "exists", **answer})
        repo = self.server.repos[name] = Repo(bool(wanted.get("private") or wanted.get("visibility") == "private"))
        repo.add("main", Commit({}, "initial commit", None))
        self.reply(200, answer)

    def branch(self, name: str, branch: str) -> None:
        if repo := self.repo(name, write=True):
            if branch in repo.branches:
                return self.reply(409, {"error": "Reference already exists"})
            repo.branches[branch] = repo.branches["main"]
            self.reply(200, {})

    def info(self, name: str, revision: str = "main") -> None:
        if found := self.commit(name, revision):
            repo, commit = found
            siblings = [{"rfilename": path} for path in commit.files]
            self.reply(200, {"id": name, "sha": commit.sha, "private": repo.private, "siblings": siblings, "tags": []})

    def tree(self, name: str, revision: str) -> None:
        if found := self.commit(name, revision):
            self.reply(200, [self.entry(path, data) for path, data in found[1].files.items()])

    def entry(self, path: str, data: bytes) -> dict:
        entry = {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
        if path.endswith(LARGE):
            entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
        return entry

    def download(self, name: str, revision: str, path: str) -> None:
        if not (found := self.commit(name, revision)):
            return
        data = found[1].files.get(path)
        if data is None:
            return self.reply(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound")
        large = path.endswith(LARGE)
        etag = (hashlib.sha256 if large else hashlib.sha1)(data).hexdigest()
        headers = {"X_Repo_Commit": found[1].sha, "ETag": f'"{etag}"', "Accept_Ranges": "bytes"}
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if wanted:
            start = int(wanted[1])
            headers["Content_Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            return self.reply(206, data[start:], **headers)
        self.reply(200, data, **headers)

    def preupload(self, name: str, revision: str) -> None:
        if self.repo(name, write=True):
            files = json.loads(self.body)["files"]
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                    "shouldIgnore": False,
                    "oid": None,
                }
                for file in files
            ]
            self.reply(200, {"files": modes})

    def lfs_batch(self, name: str) -> None:
        if self.repo(name, write=True):
            objects = []
            for wanted in json.loads(self.body)["objects"]:
                href = f"{self.server.url}/lfs/{wanted['oid']}"
                new = wanted["oid"] not in self.server.blobs
                objects.append({**wanted, **({"actions": {"upload": {"href": href}}} if new else {})})
            self.reply(200, {"transfer": "basic", "objects": objects})

    def lfs_put(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self.reply(400, {"error": "checksum"})
        self.server.blobs[oid] = self.body
        self.reply(200, {})

    def push(self, name: str, branch: str) -> None:
        if not (repo := self.repo(name, write=True)):
            return
        if branch not in repo.branches:
            return self.reply(404, {"error": "Revision not found"}, X_Error_Code="RevisionNotFound")
        lines = [json.loads(line) for line in self.body.splitlines() if line]
        files, message = dict(repo.resolve(branch).files), ""
        for key, value in ((line["key"], line["value"]) for line in lines):
            if key == "header":
                message = value["summary"]
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.server.blobs[value["oid"]]
            elif key == "deletedFile":
                files.pop(value["path"], None)
        sha = repo.add(branch, Commit(files, message, repo.branches[branch]))
        self.reply(200, {"success": True, "commitOid": sha, "commitUrl": f"{self.server.url}/{name}/commit/{sha}"})

    def validate(self) -> None:
        """The Hub's check of a model card: YAML between two rules, and a model-index of its documented form."""
        content = json.loads(self.body)["content"]
        errors = card_errors(content)
        self.reply(400 if errors else 200, {"errors": [{"message": e} for e in errors], "warnings": []})


def card_errors(content: str) -> list[str]:
    """What the Hub would refuse in a model card (https://huggingface.co/docs/hub/model-cards, model-index)."""
    match = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
    if match is None:
        return ["no metadata"]
    data = yaml.safe_load(match[1])
    errors = []
    kinds = {"tags": list, "datasets": list, "license": str, "library_name": str, "pipeline_tag": str}
    for name, kind in kinds.items():
        if name in data and not isinstance(data[name], kind):
            errors.append(f"{name} must be {kind}")
    for model in data.get("model-index", []):
        if not model.get("name"):
            errors.append("model-index[0].name is required")
        for result in model["results"]:
            if not result["task"].get("type"):
                errors.append("task.type is required")
            if not (result["dataset"].get("type") and result["dataset"].get("name")):
                errors.append("dataset.type and dataset.name are required")
            for metric in result["metrics"]:
                if not metric.get("type") or not isinstance(metric.get("value"), (int, float)):
                    errors.append("metrics need a type and a number")
                elif metric["value"] != metric["value"] or abs(metric["value"]) == float("inf"):
                    errors.append("metrics must be finite")
    if "model-index" in data:
        model_index_to_eval_results(data["model-index"])
    return errors


_REPO = r"([^/]+/[^/]+)"
ROUTES = [
    (("GET",), r"/api/whoami-v2", "whoami"),
    (("POST",), r"/api/repos/create", "create"),
    (("POST",), r"/api/validate-yaml", "validate"),
    (("POST",), rf"/api/models/{_REPO}/branch/(.+)", "branch"),
    (("POST",), rf"/api/models/{_REPO}/preupload/(.+)", "preupload"),
    (("POST",), rf"/api/models/{_REPO}/commit/(.+)", "push"),
    (("GET",), rf"/api/models/{_REPO}/revision/(.+)", "info"),
    (("GET",), rf"/api/models/{_REPO}/tree/(.+)", "tree"),
    (("GET",), rf"/api/models/{_REPO}", "info"),
    (("POST",), rf"/{_REPO}\.git/info/lfs/objects/batch", "lfs_batch"),
    (("PUT",), r"/lfs/(.+)", "lfs_put"),
    (("GET", "HEAD"), rf"/{_REPO}/resolve/([^/]+)/(.+)", "download"),
]
