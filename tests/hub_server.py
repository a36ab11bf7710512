"""A small Hub on 127.0.0.1 for real `huggingface_hub` calls: repositories, tokens, LFS, commits, revisions, faults.

Tests use the fixture `hub`. Repositories are kept in memory; commits never change and are named by their content.
"""

import base64
import hashlib
import json
import re
import socket
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TYPES = {"model": "", "dataset": "datasets/", "space": "spaces/"}  # prefixes of a repository's pages
LFS_SIZE = 10_000_000


@dataclass(frozen=True)
class Blob:
    """A file in a commit: regular files are named by their git hash, large and binary ones (LFS) by their SHA-256."""

    data: bytes
    lfs: bool

    @property
    def oid(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.data) + self.data).hexdigest()

    @property
    def etag(self) -> str:
        return hashlib.sha256(self.data).hexdigest() if self.lfs else self.oid

    def entry(self, path: str) -> dict:
        entry = {"type": "file", "path": path, "oid": self.oid, "size": len(self.data)}
        return entry | {"lfs": {"oid": self.etag, "size": len(self.data), "pointerSize": 130}} if self.lfs else entry


@dataclass
class Repo:
    id: str
    type: str
    private: bool
    gated: bool = False
    sdk: str | None = None
    variables: dict[str, dict] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    commits: dict[str, tuple[str, dict[str, Blob]]] = field(default_factory=dict)  # title and files

    def commit(self, ref: str, title: str, files: dict[str, Blob]) -> str:
        content = json.dumps([self.refs.get(ref), title, {path: blob.etag for path, blob in files.items()}])
        self.refs[ref] = hashlib.sha1(content.encode()).hexdigest()
        self.commits[self.refs[ref]] = (title, files)
        return self.refs[ref]

    def files(self, revision: str = "main") -> dict[str, Blob]:
        return self.commits[self.refs.get(revision, revision)][1]


class HubError(Exception):
    def __init__(self, status: int, message: str, code: str | None = None, **body: str):
        super().__init__(message)
        self.status, self.body = status, body | {"error": message}
        self.headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})


class HubServer:
    """Serves from a thread until the process ends.

    Attributes:
        url: For HF_ENDPOINT; it stays the same over `stop` and `start`.
        repos: By type and id, `repos["model", "user/repo"]`.
        tokens: User name and role ("read" or "write") of each.
        requests: Method and path of each request so far.
    """

    def __init__(self) -> None:
        self.port = 0
        self.start()
        self.url = f"http://127.0.0.1:{self.port}"
        self.reset()

    def reset(self) -> None:
        self.repos: dict[tuple[str, str], Repo] = {}
        self.tokens = {"hf_user": ("user", "write"), "hf_reader": ("reader", "read"), "hf_other": ("other", "write")}
        self.lfs: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.fault: re.Pattern | None = None
        self.lock = threading.Lock()

    def start(self) -> None:
        self.connections: set[socket.socket] = set()
        handler = type("BoundHandler", (Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", self.port), handler)
        self.server.daemon_threads = True
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def stop(self) -> None:
        """Connections are closed, new ones refused."""
        self.server.shutdown()
        self.server.server_close()
        for connection in list(self.connections):
            close(connection)

    @contextmanager
    def stopped(self) -> Iterator[None]:
        self.stop()
        try:
            yield
        finally:
            self.start()

    @contextmanager
    def dropping(self, pattern: str) -> Iterator[None]:
        """Breaks off connections whose "METHOD /path" matches, downloads half-way through the body."""
        self.fault = re.compile(pattern)
        try:
            yield
        finally:
            self.fault = None

    # -- what a Hub does ------------------------------------------------------------------------------------------

    def user(self, token: str | None) -> tuple[str | None, str]:
        if token is None:
            return None, "read"
        if token not in self.tokens:
            raise HubError(401, "Invalid credentials in Authorization header")
        return self.tokens[token]

    def repo(self, type: str, id: str, token: str | None, write: bool = False, content: bool = False) -> Repo:
        name, role = self.user(token)
        repo = self.repos.get((type, id))
        if repo is None or (repo.private and name != id.split("/")[0]):  # a private one is not given away
            raise HubError(401 if name is None else 404, "Repository not found", "RepoNotFound")
        if write:
            self.check_write(id, token)
        if content and repo.gated and name != id.split("/")[0]:
            raise HubError(401 if name is None else 403, "Access to this repository is restricted", "GatedRepo")
        return repo

    def check_write(self, id: str, token: str | None) -> None:
        name, role = self.user(token)
        if name is None:
            raise HubError(401, "Invalid username or password.")
        if role != "write" or name != id.split("/")[0]:
            raise HubError(403, f"You don't have the rights to write under {id.split('/')[0]}")

    def create(self, payload: dict, token: str | None) -> dict:
        name, _ = self.user(token)
        type = payload.get("type") or "model"
        id = f"{payload.get('organization') or name}/{payload['name']}"
        self.check_write(id, token)
        if (type, id) in self.repos:
            raise HubError(409, "You already created this repo", url=f"{self.url}/{TYPES[type]}{id}")
        private = payload.get("visibility") == "private" or bool(payload.get("private"))
        repo = self.repos[type, id] = Repo(id, type, private, sdk=payload.get("sdk"))
        repo.variables = {item["key"]: item for item in payload.get("variables") or []}
        repo.commit("main", "initial commit", {".gitattributes": Blob(b"*.safetensors filter=lfs\n", lfs=False)})
        return {"url": f"{self.url}/{TYPES[type]}{id}", "name": id}

    def resolve(self, repo: Repo, revision: str) -> str:
        sha = repo.refs.get(revision, revision)
        if sha not in repo.commits:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha

    def info(self, repo: Repo, sha: str) -> dict:
        siblings = [{"rfilename": path} for path in repo.files(sha)]
        common = {"id": repo.id, "sha": sha, "private": repo.private, "gated": "auto" if repo.gated else False}
        readme = repo.files(sha).get("README.md")
        card = front_matter(readme.data.decode()) if readme else None
        return common | {"siblings": siblings, "tags": [], "cardData": card, "downloads": 0, "likes": 0}

    def preupload(self, repo: Repo, sha: str, payload: dict) -> dict:
        """Binary and large files go to LFS; the hash of a file that is there already lets the client skip it."""
        files = []
        for file in payload["files"]:
            lfs = file["size"] > LFS_SIZE or b"\0" in base64.b64decode(file["sample"])
            present = repo.files(sha).get(file["path"])
            oid = {} if present is None else {"oid": present.etag}
            mode = "lfs" if lfs else "regular"
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False} | oid)
        return {"files": files}

    def lfs_batch(self, payload: dict) -> dict:
        objects = []
        for item in payload["objects"]:
            url = f"{self.url}/lfs/{item['oid']}"
            actions = {"upload": {"href": url}, "verify": {"href": f"{url}/verify"}}
            objects.append(item | ({} if item["oid"] in self.lfs else {"actions": actions}))
        return {"transfer": "basic", "objects": objects}

    def commit(self, repo: Repo, revision: str, lines: list[dict], create_pr: bool) -> dict:
        """All or nothing: a line that cannot be followed leaves the repository as it was."""
        header = lines[0]["value"]
        files = dict(repo.files(self.resolve(repo, revision)))
        if header.get("parentCommit") not in (None, repo.refs.get(revision)):
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        for line in lines[1:]:
            path, value = line["value"]["path"], line["value"]
            if line["key"] == "file":
                files[path] = Blob(base64.b64decode(value["content"]), lfs=False)
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.lfs:
                    raise HubError(400, f"Your push was rejected because an LFS pointer is unknown: {path}")
                files[path] = Blob(self.lfs[value["oid"]], lfs=True)
            elif line["key"] == "deletedFile":
                if path not in files:
                    raise HubError(404, "A file with this name doesn't exist", "EntryNotFound")
                del files[path]
            else:
                files = {name: blob for name, blob in files.items() if not name.startswith(path.rstrip("/") + "/")}
        number = sum(ref.startswith("refs/pr/") for ref in repo.refs) + 1
        oid = repo.commit(f"refs/pr/{number}" if create_pr else revision, header["summary"], files)
        page = f"{self.url}/{TYPES[repo.type]}{repo.id}"
        pull_request = {"pullRequestUrl": f"{page}/discussions/{number}"} if create_pr else {}
        return {"success": True, "commitOid": oid, "commitUrl": f"{page}/commit/{oid}"} | pull_request

    def tree(self, repo: Repo, sha: str, folder: str, recursive: bool) -> list[dict]:
        prefix, entries = folder + "/" if folder else "", {}
        for path, blob in sorted(repo.files(sha).items()):
            parts = path.removeprefix(prefix).split("/")
            if not path.startswith(prefix):
                continue
            for depth in range(1, len(parts) if recursive else min(len(parts), 2)):
                name = prefix + "/".join(parts[:depth])
                oid = hashlib.sha1(f"{sha} {name}".encode()).hexdigest()
                entries[name] = {"type": "directory", "path": name, "oid": oid, "size": 0}
            if recursive or len(parts) == 1:
                entries[path] = blob.entry(path)
        if folder and not entries:
            raise HubError(404, f"{folder} does not exist", "EntryNotFound")
        return list(entries.values())


def front_matter(text: str) -> dict | None:
    match = re.match(r"---\n(.*?\n)---\n", text, re.DOTALL)
    return yaml.safe_load(match[1]) if match else None


def validate_card(payload: dict) -> dict:
    try:
        data = front_matter(payload["content"])
    except yaml.YAMLError as error:
        raise HubError(400, f"YAML metadata is damaged: {error}") from error
    if not isinstance(data, dict):
        return {"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]}
    errors = []
    if payload["repoType"] == "space":  # the rules of the Hub's page "Spaces Configuration Reference"
        colors = ("red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray")
        allowed = {"colorFrom": colors, "colorTo": colors, "sdk": ("gradio", "docker", "static")}
        for key, values in allowed.items():
            if data.get(key) not in values:
                errors.append(f'"{key}" must be one of {", ".join(values)}')
        if len(data.get("short_description", "")) > 60:
            errors.append('"short_description" must have at most 60 characters')
    if errors:
        raise HubError(400, "; ".join(errors))
    return {"errors": [], "warnings": []}


def close(connection: socket.socket) -> None:
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass  # the other side was faster


class Handler(BaseHTTPRequestHandler):
    """Routes a request to the hub's methods."""

    hub: HubServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def setup(self) -> None:
        super().setup()
        self.hub.connections.add(self.connection)

    def finish(self) -> None:
        self.hub.connections.discard(self.connection)
        try:
            super().finish()
        except OSError:
            pass  # broken off

    def log_message(self, *args: object) -> None:
        pass

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except OSError:
            self.close_connection = True  # the client has gone

    def answer(self) -> None:
        hub = self.hub
        url = urlsplit(self.path)
        hub.requests.append((self.command, unquote(url.path)))
        self.dropped = hub.fault is not None and hub.fault.search(f"{self.command} {url.path}") is not None
        if self.dropped and self.command != "GET":
            self.close_connection = True
            return close(self.connection)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        try:
            with hub.lock:
                answer = self.route(url.path, {k: v[-1] for k, v in parse_qs(url.query).items()}, body)
        except HubError as error:
            return self.send(json.dumps(error.body).encode(), error.status, error.headers)
        if isinstance(answer, dict | list):
            self.send(json.dumps(answer).encode(), headers={"Content-Type": "application/json"})
        else:
            self.send(*answer)

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def send(self, data: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(data))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if self.dropped else data)
        if self.dropped:
            self.close_connection = True
            close(self.connection)

    def file(self, blob: Blob, headers: dict[str, str]) -> tuple:
        requested = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if requested is None:
            return blob.data, 200, headers
        start, end = int(requested[1]), min(int(requested[2] or len(blob.data)), len(blob.data) - 1)
        span = {"Content-Range": f"bytes {start}-{end}/{len(blob.data)}"}
        return blob.data[start : end + 1], 206, headers | span

    def route(self, path: str, query: dict[str, str], body: bytes) -> dict | list | tuple:
        hub, command = self.hub, self.command
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None

        # Storage of large files: no token is wanted here, the addresses are given out above
        if match := re.fullmatch(r"/(cdn|lfs)/([0-9a-f]{64})(/verify)?", path):
            if match[1] == "cdn" and token is not None:
                raise HubError(400, "Only one auth mechanism allowed")
            if command == "PUT":
                if hashlib.sha256(body).hexdigest() != match[2]:
                    raise HubError(400, "Content does not match its SHA-256")
                hub.lfs[match[2]] = body
                return {}
            if match[2] not in hub.lfs:
                raise HubError(404, "Not found")
            return {} if match[3] else self.file(Blob(hub.lfs[match[2]], lfs=True), {"ETag": f'"{match[2]}"'})

        if path == "/api/whoami-v2":
            name, role = hub.user(token)
            if name is None:
                raise HubError(401, "Invalid username or password.")
            return {"name": name, "type": "user", "orgs": [], "auth": {"accessToken": {"role": role}}}
        if path == "/api/repos/create":
            return hub.create(json.loads(body), token)
        if path == "/api/validate-yaml":
            return validate_card(json.loads(body))
        if match := re.fullmatch(r"/(datasets/|spaces/|)([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            type = {prefix: type for type, prefix in TYPES.items()}[match[1]]
            hub.repo(type, match[2], token, write=True)
            return hub.lfs_batch(json.loads(body))
        if match := re.fullmatch(r"/(datasets/|spaces/|)([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            type = {prefix: type for type, prefix in TYPES.items()}[match[1]]
            return self.resolve(hub.repo(type, match[2], token, content=True), unquote(match[3]), unquote(match[4]))
        if match := re.fullmatch(
            r"/api/(model|dataset|space)s/([^/]+/[^/]+)(?:/([^/]+)(?:/([^/]+)(?:/(.+))?)?)?", path
        ):
            type, id, action, *rest = match.groups()
            rest = [unquote(part or "") for part in rest]
            repo = hub.repo(type, id, token, write=command != "GET" and action != "paths-info")
            return self.api(repo, action or "revision", *rest, query, body)
        raise HubError(404, f"There is no {command} {path}")

    def resolve(self, repo: Repo, revision: str, path: str) -> tuple:
        sha = self.hub.resolve(repo, revision)
        blob = repo.files(sha).get(path)
        if blob is None:
            raise HubError(404, "Entry not found", "EntryNotFound")
        headers = {"X-Repo-Commit": sha, "ETag": f'"{blob.etag}"'}
        if not blob.lfs:
            return self.file(blob, headers)
        linked = {"X-Linked-ETag": f'"{blob.etag}"', "X-Linked-Size": str(len(blob.data))}
        # Another host than the Hub's, which must not be sent the token
        return b"", 302, headers | linked | {"Location": f"http://localhost:{self.hub.port}/cdn/{blob.etag}"}

    def api(self, repo: Repo, action: str, revision: str, path: str, query: dict, body: bytes) -> dict | list | tuple:
        hub = self.hub
        if action == "variables":
            if self.command == "POST":
                item = json.loads(body)
                repo.variables[item["key"]] = item
            return repo.variables
        if action == "refs":
            branches = [{"name": r, "ref": f"refs/heads/{r}", "targetCommit": sha} for r, sha in repo.refs.items()]
            return {"branches": branches, "converts": [], "tags": [], "pullRequests": []}
        if action == "branch":
            repo.refs[revision] = hub.resolve(repo, json.loads(body).get("startingPoint") or "main")
            return {}
        if action == "commit":
            return hub.commit(repo, revision, [json.loads(line) for line in body.splitlines()], "create_pr" in query)
        sha = hub.resolve(repo, revision or "main")
        if action == "tag":
            repo.refs[json.loads(body)["tag"]] = sha
            return {}
        if action == "revision":
            return hub.info(repo, sha)
        if action == "tree":
            return hub.tree(repo, sha, path, query.get("recursive", "").lower() == "true")
        if action == "preupload":
            return hub.preupload(repo, sha, json.loads(body))
        if action == "paths-info":
            form = self.headers.get("Content-Type", "").startswith("application/x-www-form-urlencoded")
            paths = parse_qs(body.decode())["paths"] if form else json.loads(body)["paths"]
            entries = {entry["path"]: entry for entry in hub.tree(repo, sha, "", recursive=True)}
            return [entries[name] for name in paths if name in entries]
        raise HubError(404, f"There is no {action}")


HUB = HubServer()
HOME = tempfile.TemporaryDirectory(prefix="hf-home-")  # of the libraries' caches and tokens; goes with the process
