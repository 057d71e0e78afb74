"""A Hub on loopback: the part of the Hugging Face Hub's HTTP API that huggingface_hub 2.x speaks to push and to load.

Repositories live in memory. Large files go through the LFS protocol (a batch request, a PUT, a verification) and come
back by a redirect to another host name, as the Hub's come from its CDN. `HubServer.fail` makes requests go wrong.
"""

import base64
import contextlib
import hashlib
import json
import re
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

from card_rules import find_faults

TOKEN, USER = "hf_aTokenThatNobodyMaySee", "me"
ROUTES: list[tuple[str, re.Pattern, Callable]] = []

# Kinds of fault besides an answer (status, message).
CUT = "cut"  # the connection ends in the middle of the request's or the answer's body
LOST = "lost"  # the request is carried out, and its answer never arrives


def route(method: str, pattern: str):
    """Register a handler for requests whose whole path matches; the groups become its arguments."""

    def register(handler):
        ROUTES.append((method, re.compile(pattern), handler))
        return handler

    return register


class Refusal(Exception):
    """An answer that is no success."""

    def __init__(self, status: int, message: str, code: str | None = None):
        super().__init__(message)
        self.status, self.code = status, code


@dataclass
class Repo:
    """A repository: files of every commit, and the commit of every branch."""

    kind: str  # models or spaces
    name: str  # owner/name
    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, branch: str, files: dict[str, bytes], message: str) -> str:
        oid = hashlib.sha1(f"{self.name} {len(self.commits)} {message}".encode()).hexdigest()
        self.commits[oid], self.branches[branch] = files, oid
        self.messages.append(message)
        return oid

    def resolve(self, revision: str) -> str:
        oid = self.branches.get(revision, revision)
        if oid not in self.commits:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return oid


def is_large(path: str) -> bool:
    """What .gitattributes of a new model repository gives to LFS."""
    return path.endswith((".safetensors", ".bin", ".onnx"))


def oid_of(path: str, content: bytes) -> str:
    """How the Hub names a file's content: sha256 for LFS, git's blob hash for the rest."""
    if is_large(path):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class HubServer(ThreadingHTTPServer):
    """The server and what it holds; `requests` are "METHOD path" in order, `strangers` the CDN's with a token."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.cdn = f"http://localhost:{self.server_port}"
        self.repos: dict[tuple[str, str], Repo] = {}
        self.blobs: dict[str, bytes] = {}
        # Of xet_server: packs of chunks, what files are made of, and the names there of files by sha256.
        self.xorbs: dict[str, bytes] = {}
        self.terms: dict[str, list] = {}
        self.xet_names: dict[str, str] = {}
        self.requests: list[str] = []
        self.strangers: list[str] = []
        self._faults: list[list] = []

    def fail(self, pattern: str, fault: str | tuple[int, str], times: int = 1) -> None:
        """Let the next `times` requests whose "METHOD path" matches go wrong: CUT, LOST or (status, message)."""
        self._faults.append([re.compile(pattern), fault, times])

    def next_fault(self, request: str) -> str | tuple[int, str] | None:
        for plan in self._faults:
            if plan[2] and plan[0].search(request):
                plan[2] -= 1
                return plan[1]
        return None

    def make_repo(self, kind: str, name: str, private: bool = False, files: dict[str, bytes] | None = None) -> Repo:
        repo = self.repos[kind, name] = Repo(kind, name, private)
        repo.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n", **(files or {})}, "initial commit")
        return repo

    def handle_error(self, request, client_address):
        """Connections that a test cut are no news."""


class HubHandler(BaseHTTPRequestHandler):
    """One connection of a client."""

    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, *words):
        """Tests read `HubServer.requests` instead."""

    def dispatch(self):
        path, self.answered = unquote(urlsplit(self.path).path), False
        request = f"{self.command} {path}"
        self.server.requests.append(request)
        self.fault = self.server.next_fault(request)
        try:
            if self.fault == CUT and self.command not in ("GET", "HEAD"):
                self.rfile.read(int(self.headers.get("Content-Length", 0)) // 2)
                return self.hang_up()
            self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if isinstance(self.fault, tuple):
                raise Refusal(*self.fault)
            for method, pattern, handler in ROUTES:
                if method in (self.command, {"HEAD": "GET"}.get(self.command)) and (found := pattern.fullmatch(path)):
                    return handler(self, **found.groupdict())
            raise Refusal(404, f"no such page: {request}")
        except Refusal as refusal:
            headers = {"X-Error-Message": str(refusal)} | ({"X-Error-Code": refusal.code} if refusal.code else {})
            self.answer({"error": str(refusal)}, refusal.status, headers)

    do_GET = do_HEAD = do_POST = do_PUT = dispatch

    def hang_up(self):
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def answer(self, content, status: int = 200, headers: dict[str, str] | None = None):
        """Send bytes, or anything else as JSON."""
        if self.fault == LOST:
            return self.hang_up()
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(data))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return None
        self.wfile.write(data[: len(data) // 2] if self.fault == CUT else data)
        return self.hang_up() if self.fault == CUT else None

    def is_owner(self) -> bool:
        given = self.headers.get("Authorization")
        if given not in (None, f"Bearer {TOKEN}"):
            raise Refusal(401, "Invalid credentials in Authorization header")
        return given is not None

    def need_owner(self, name: str) -> None:
        if not self.is_owner():
            raise Refusal(401, "Invalid username or password.")
        if name.split("/")[0] != USER:
            raise Refusal(403, f'You don\'t have the rights to write under the namespace "{name.split("/")[0]}"')

    def open_repo(self, kind: str, name: str) -> Repo:
        repo = self.server.repos.get((kind.rstrip("/") or "models", name))
        if repo is None or (repo.private and not self.is_owner()):
            raise Refusal(404 if self.is_owner() else 401, "Repository not found", "RepoNotFound")
        return repo


@route("GET", "/api/whoami-v2")
def who_am_i(hub: HubHandler):
    if not hub.is_owner():
        raise Refusal(401, "Invalid username or password.")
    hub.answer({"type": "user", "name": USER, "orgs": [], "auth": {"type": "access_token"}})


@route("POST", "/api/repos/create")
def create_repo(hub: HubHandler):
    asked = json.loads(hub.body)
    kind, name = f"{asked.get('type', 'model')}s", f"{asked.get('organization') or USER}/{asked['name']}"
    hub.need_owner(name)
    url = f"{hub.server.url}/{'spaces/' if kind == 'spaces' else ''}{name}"
    if (kind, name) in hub.server.repos:
        return hub.answer({"error": "You already created this repo", "url": url}, 409)
    hub.server.make_repo(kind, name, asked.get("visibility") == "private")
    return hub.answer({"url": url, "name": name})


REPO = r"/api/(?P<kind>models|spaces)/(?P<name>[^/]+/[^/]+)"


@route("GET", REPO + r"(/revision/(?P<revision>.+))?")
def describe_repo(hub: HubHandler, kind: str, name: str, revision: str | None):
    repo = hub.open_repo(kind, name)
    oid = repo.resolve(revision or "main")
    siblings = [{"rfilename": path} for path in repo.commits[oid]]
    facts = {"id": name, "private": repo.private, "sha": oid, "siblings": siblings, "tags": [], "downloads": 0}
    hub.answer(facts | {"pipeline_tag": "image-classification", "likes": 0})


@route("GET", REPO + r"/tree/(?P<revision>[^/]+)(?P<folder>/.*)?")
def list_files(hub: HubHandler, kind: str, name: str, revision: str, folder: str | None):
    repo = hub.open_repo(kind, name)
    if folder:
        raise Refusal(404, f"{folder} does not exist on {revision}", "EntryNotFound")
    entries = []
    for path, content in repo.commits[repo.resolve(revision)].items():
        entry = {"type": "file", "path": path, "size": len(content), "oid": oid_of(path, content)}
        lfs = {"lfs": {"oid": entry["oid"], "size": len(content), "pointerSize": 134}} if is_large(path) else {}
        if entry["oid"] in hub.server.xet_names:
            lfs["xetHash"] = hub.server.xet_names[entry["oid"]]
        entries.append(entry | lfs)
    hub.answer(entries)


@route("POST", REPO + r"/branch/(?P<branch>.+)")
def create_branch(hub: HubHandler, kind: str, name: str, branch: str):
    hub.need_owner(name)
    repo = hub.open_repo(kind, name)
    if branch in repo.branches:
        raise Refusal(409, "Reference already exists")
    repo.branches[branch] = repo.branches["main"]
    hub.answer({})


@route("POST", "/api/validate-yaml")
def validate_card(hub: HubHandler):
    card = json.loads(hub.body)
    faults = [{"message": fault} for fault in find_faults(card["content"], card["repoType"])]
    hub.answer({"errors": faults, "warnings": []}, 400 if faults else 200)


@route("POST", REPO + r"/preupload/(?P<revision>.+)")
def choose_upload(hub: HubHandler, kind: str, name: str, revision: str):
    hub.need_owner(name)
    repo = hub.open_repo(kind, name)
    there = repo.commits[repo.resolve(revision)]
    files = []
    for file in json.loads(hub.body)["files"]:
        path = file["path"]
        known = {"oid": oid_of(path, there[path])} if path in there else {}
        mode = "lfs" if is_large(path) else "regular"
        files.append({"path": path, "uploadMode": mode, "shouldIgnore": False} | known)
    hub.answer({"files": files})


@route("POST", r"/(?P<kind>spaces/)?(?P<name>[^/]+/[^/]+)\.git/info/lfs/objects/batch")
def plan_large_files(hub: HubHandler, kind: str | None, name: str):
    hub.need_owner(name)
    objects = []
    for wanted in json.loads(hub.body)["objects"]:
        url = f"{hub.server.url}/lfs/{wanted['oid']}"
        actions = {"upload": {"href": url}, "verify": {"href": f"{url}/verify"}}
        objects.append(wanted if wanted["oid"] in hub.server.blobs else wanted | {"actions": actions})
    hub.answer({"transfer": "basic", "objects": objects})


@route("PUT", "/lfs/(?P<oid>[0-9a-f]{64})")
def take_large_file(hub: HubHandler, oid: str):
    if hashlib.sha256(hub.body).hexdigest() != oid:
        raise Refusal(400, "the content is not what its name says")
    hub.server.blobs[oid] = hub.body
    hub.answer(b"")


@route("POST", "/lfs/(?P<oid>[0-9a-f]{64})/verify")
def verify_large_file(hub: HubHandler, oid: str):
    if oid not in hub.server.blobs:
        raise Refusal(404, "not uploaded")
    hub.answer({})


@route("POST", REPO + r"/commit/(?P<revision>.+)")
def commit(hub: HubHandler, kind: str, name: str, revision: str):
    hub.need_owner(name)
    repo = hub.open_repo(kind, name)
    files = dict(repo.commits[repo.resolve(revision)])
    header, *operations = map(json.loads, hub.body.splitlines())
    if header["value"].get("parentCommit") not in (None, repo.resolve(revision)):
        raise Refusal(412, "A commit has happened since. Please refresh and try again.")
    for operation in operations:
        value = operation["value"]
        if operation["key"] == "deletedFile":
            del files[value["path"]]
        elif operation["key"] == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        else:
            files[value["path"]] = hub.server.blobs[value["oid"]]
    oid = repo.commit(revision, files, header["value"]["summary"])
    hub.answer({"success": True, "commitOid": oid, "commitUrl": f"{hub.server.url}/{name}/commit/{oid}"})


@route("GET", r"/(?P<kind>spaces/)?(?P<name>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
def send_file(hub: HubHandler, kind: str | None, name: str, revision: str, path: str):
    repo = hub.open_repo(kind or "", name)
    oid = repo.resolve(revision)
    if path not in repo.commits[oid]:
        raise Refusal(404, "Entry not found", "EntryNotFound")
    content = repo.commits[oid][path]
    headers = {"X-Repo-Commit": oid, "ETag": f'"{oid_of(path, content)}"'}
    if not is_large(path):
        return hub.answer(content, headers=headers)
    linked = {"X-Linked-Etag": headers["ETag"], "X-Linked-Size": str(len(content))}
    place = {"Location": f"{hub.server.cdn}/cdn/{oid_of(path, content)}"}
    if oid_of(path, content) in hub.server.xet_names:
        refresh = f"{hub.server.url}/api/{kind or 'models/'}{name}/xet-read-token/{oid}"
        place |= {"X-Xet-Hash": hub.server.xet_names[oid_of(path, content)], "X-Xet-Refresh-Route": refresh}
    return hub.answer(b"", 302, headers | linked | place)


@route("GET", "/cdn/(?P<oid>[0-9a-f]{64})")
def send_large_file(hub: HubHandler, oid: str):
    if "Authorization" in hub.headers:
        hub.server.strangers.append(hub.path)
    content = hub.server.blobs[oid]
    start = int(re.fullmatch(r"bytes=(\d+)-", hub.headers.get("Range", "bytes=0-"))[1])
    if not start:
        return hub.answer(content)
    return hub.answer(content[start:], 206, {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"})


@contextlib.contextmanager
def running_hub() -> Iterator[HubServer]:
    """A server that answers while the context lasts."""
    server = HubServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
