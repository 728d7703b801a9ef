"""
A stand-in for the Hugging Face Hub on the loopback address, for tests with the real client.

    with HubStandIn() as hub:
        subprocess.run([sys.executable, "script.py"], env=hub.environment(tmp_path / "home"), check=True)
        assert "model.safetensors" in hub.files("tester/model", revision="v1.0")
        assert hub.unknown == []

The client reads `HF_ENDPOINT` when it is imported, so it has to run in a subprocess. `environment` also makes the
stand-in the proxy of that process: a request to any other host arrives here too, is refused, and stands in `unknown`.

Covered: model repositories; branches, tags, commits; files inside a commit and through LFS; file lists; downloads, in
parts too; checks of model cards; data sets, to read. Not covered: Spaces, pull requests, Xet, the protocol of Git.
"""

import base64
import hashlib
import json
import os
import re
import secrets
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qs, unquote

import yaml


# At any size; the Hub writes them into `.gitattributes` of a new repository.
LFS_SUFFIXES = (".bin", ".npz", ".onnx", ".parquet", ".pt", ".pth", ".safetensors", ".tar", ".zip")
LFS_SIZE = 10 * 1024**2

DATASET_TYPE = re.compile(r"(?:[\w-]+/)?[\w.-]+")
FRONT_MATTER = re.compile(r"\s*---\r?\n(.*?)\r?\n---(\r?\n|$)", re.DOTALL)


class Call(NamedTuple):
    """What a handler reads of a request, besides the parts of its path."""

    method: str
    query: dict[str, list[str]]
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> dict:
        return json.loads(self.body)


class Reply(NamedTuple):
    """An answer. A body that is not bytes is sent as JSON; `cut` drops the connection after so many bytes."""

    body: bytes | dict | list = b""
    status: int = 200
    headers: dict[str, str] = {}
    cut: int | None = None


class Refused(Exception):
    """An answer with an error, in the form that the client turns into its own exceptions."""

    def __init__(self, status: int, message: str, code: str | None = None, headers: dict | None = None, **fields):
        super().__init__(message)
        headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **(headers or {})}
        self.reply = Reply({"error": message, **fields}, status, headers)


@dataclass(frozen=True)
class Blob:
    """A file. Its id is the one that the client computes to find files that have not changed."""

    content: bytes
    lfs: bool = False

    @cached_property
    def oid(self) -> str:
        if self.lfs:
            return hashlib.sha256(self.content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()

    @property
    def lfs_info(self) -> dict:
        info = {"oid": self.oid, "sha256": self.oid, "size": len(self.content), "pointerSize": 134}
        return {"lfs": info} if self.lfs else {}


@dataclass(frozen=True)
class Commit:
    """All files at one point of a repository's history."""

    oid: str
    title: str
    message: str
    files: dict[str, Blob]
    parent: "Commit | None"
    date: str = field(default_factory=lambda: datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z"))

    def history(self) -> list["Commit"]:
        return [self, *(self.parent.history() if self.parent else [])]

    def below(self, path: str) -> dict[str, Blob]:
        """The file `path`, or the files in the folder `path`."""
        return {name: blob for name, blob in self.files.items() if f"{name}/".startswith(f"{path}/")}


class Repository:
    """Branches, tags and commits. A new one holds `.gitattributes`, as on the Hub."""

    def __init__(self, repo_id: str, private: bool = False):
        self.repo_id, self.private = repo_id, private
        self.commits: dict[str, Commit] = {}
        self.branches: dict[str, str] = {}
        self.tags: dict[str, str] = {}
        self.objects: dict[str, bytes] = {}  # LFS files by SHA-256, uploaded but not necessarily committed
        rules = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES)
        self.commit("main", {".gitattributes": Blob(rules.encode())}, "initial commit")

    def at(self, revision: str) -> Commit:
        """The commit that a branch, a tag or a full commit hash names."""
        oid = self.branches.get(revision) or self.tags.get(revision) or revision
        if oid not in self.commits:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[oid]

    def commit(self, branch: str, files: dict[str, Blob], title: str, message: str = "") -> Commit:
        content = [(name, blob.oid) for name, blob in sorted(files.items())]
        oid = hashlib.sha1(repr((len(self.commits), title, content)).encode()).hexdigest()
        self.commits[oid] = Commit(oid, title, message, files, self.commits.get(self.branches.get(branch, "")))
        self.branches[branch] = oid
        return self.commits[oid]


ROUTES: list[tuple[str, re.Pattern, Callable, bool]] = []


def route(methods: str, pattern: str, write: bool = False):
    """
    Let the decorated method answer these requests. It gets the parts of the path that stand in `<>`, `<repo>` as the
    repository itself. With `write` the right token is needed.
    """
    pattern = pattern.replace("<repo>", "(?P<repo>[^/]+(?:/[^/]+)?)").replace("<path>", "(?P<path>.+)")
    compiled = re.compile(re.sub(r"(?<!P)<(\w+)>", r"(?P<\1>[^/]+)", pattern))

    def register(handler):
        ROUTES.extend((method, compiled, handler, write) for method in methods.split())
        return handler

    return register


class HubStandIn:
    """
    The server and its state, kept in memory. A context manager.

    Attributes:
        endpoint: its address, for `HF_ENDPOINT`.
        token: the one token it accepts; the user is `user`.
        requests: method, path and status of every request so far.
        unknown: requests that the stand-in has no answer for, and requests to other hosts. Assert that it is empty.
        cut_next_download: set it to drop the next download after so many bytes; the client then has to resume.
    """

    def __init__(self, user: str = "tester"):
        self.user, self.token = user, f"hf_{secrets.token_hex(16)}"
        self.requests: list[tuple[str, str, int]] = []
        self.unknown: list[str] = []
        self.cut_next_download: int | None = None
        self._repositories: dict[str, Repository] = {}
        self._signature = secrets.token_hex(8)  # upload addresses are signed, the client sends no token to them
        self._lock = threading.RLock()

    def __enter__(self) -> "HubStandIn":
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.hub = self
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})
        self._thread.start()
        return self

    def __exit__(self, *exception) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def environment(self, home: str | os.PathLike, token: str | None = None, **more: str) -> dict[str, str]:
        """
        Variables of a subprocess that talks to this server alone.

        Args:
            home: folder of its caches (files, modules, data sets); an empty one makes a first-time user.
            token: another token than the right one; `""` for none.
            more: further variables.
        """
        dropped = re.compile("HF_|HUGGINGFACE|TRANSFORMERS_|PYTHONPATH$|(https?|all|no)_proxy$", re.IGNORECASE)
        return {
            **{name: value for name, value in os.environ.items() if not dropped.match(name)},
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(Path(home).absolute()),
            "HF_TOKEN": self.token if token is None else token,
            **dict.fromkeys(("HF_HUB_DISABLE_XET", "HF_HUB_DISABLE_TELEMETRY", "HF_HUB_DISABLE_UPDATE_CHECK"), "1"),
            **dict.fromkeys(("HF_HUB_DOWNLOAD_TIMEOUT", "HF_HUB_ETAG_TIMEOUT"), "600"),  # for a busy machine
            **{"http_proxy": self.endpoint, "https_proxy": self.endpoint, "no_proxy": "127.0.0.1,localhost"},
            **more,
        }

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """Content of all files, by path."""
        return {path: blob.content for path, blob in sorted(self._find(repo_id).at(revision).files.items())}

    def titles(self, repo_id: str, revision: str = "main") -> list[str]:
        """Messages of the commits, newest first."""
        return [commit.title for commit in self._find(repo_id).at(revision).history()]

    def tags(self, repo_id: str) -> dict[str, str]:
        """Commit hashes of the tags, by name."""
        return dict(self._find(repo_id).tags)

    def add(self, repo_id: str, files: dict[str, bytes], title: str = "Add files") -> str:
        """Commit to `main` without the client; makes the repository where it is missing. Returns the commit hash."""
        with self._lock:
            repo = self._repositories.setdefault(repo_id, Repository(repo_id))
            blobs = {path: Blob(content, is_lfs(path, len(content))) for path, content in files.items()}
            return repo.commit("main", {**repo.at("main").files, **blobs}, title).oid

    def answer(self, method: str, target: str, headers: dict[str, str], body: bytes) -> Reply:
        """Answer one request and record it."""
        path, _, query = target.partition("?")
        with self._lock:
            try:
                reply = self._dispatch(path, Call(method, parse_qs(query), headers, body))
            except Refused as refusal:
                reply = refusal.reply
            except Exception as error:  # not 500, which makes the client try again
                self.unknown.append(f"{method} {target}: {error!r}")
                reply = Refused(501, f"Not in the stand-in: {error!a}").reply
            self.requests.append((method, path, reply.status))
        return reply

    def _dispatch(self, path: str, call: Call) -> Reply:
        token = call.headers.get("authorization", "").removeprefix("Bearer ")
        if token and token != self.token:
            raise Refused(401, "Invalid credentials in Authorization header")
        for method, pattern, handler, write in ROUTES:
            match = pattern.fullmatch(path)
            if match and method == call.method:
                if write and not token:
                    raise Refused(401, "Invalid username or password.")
                # Unquoted part by part: the slash of a branch `a/b` is not one of the path.
                parts = {name: unquote(value) for name, value in match.groupdict().items() if value is not None}
                repo = {"repo": self._find(parts.pop("repo"))} if "repo" in parts else {}
                return handler(self, call, **repo, **parts)
        self.unknown.append(f"{call.method} {path}")
        raise Refused(404, f"The stand-in of the Hub does not know {call.method} {path}")

    def _find(self, repo_id: str) -> Repository:
        if repo_id not in self._repositories:
            raise Refused(404, f"Repository not found: {repo_id}", "RepoNotFound")
        return self._repositories[repo_id]

    @route("GET", "/api/whoami-v2", write=True)
    def _whoami(self, call: Call) -> Reply:
        access = {"accessToken": {"displayName": "tests", "role": "write"}}
        return Reply({"type": "user", "name": self.user, "fullname": self.user, "orgs": [], "auth": access})

    @route("GET", "/api/agent-harnesses")
    def _agents(self, call: Call) -> Reply:
        return Reply({"standardEnvVars": [], "harnesses": {}})

    @route("POST", "/api/validate-yaml")
    def _validate_card(self, call: Call) -> Reply:
        match = FRONT_MATTER.match(call.json["content"])
        if not match:
            return Reply({"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]})
        problems = card_problems(match.group(1))
        reply = {"errors": [{"message": problem} for problem in problems], "warnings": []}
        return Reply({**reply, "error": "; ".join(problems)}, 400) if problems else Reply(reply)

    @route("POST DELETE", "/api/repos/(?:create|delete)", write=True)
    def _create_or_delete(self, call: Call) -> Reply:
        repo_id = f"{call.json.get('organization') or self.user}/{call.json['name']}"
        if call.json.get("type", "model") != "model":
            raise ValueError(f"a {call.json['type']} repository")
        if call.method == "DELETE":
            del self._repositories[self._find(repo_id).repo_id]
            return Reply({})
        url = f"{self.endpoint}/{repo_id}"
        if repo_id in self._repositories:  # the client reads `url` from this answer too, with `exist_ok=True`
            raise Refused(409, "You already created this model repo", url=url)
        self._repositories[repo_id] = Repository(repo_id, call.json.get("visibility") == "private")
        return Reply({"url": url, "name": repo_id})

    @route("POST", "/api/models/<repo>/preupload/<revision>", write=True)
    def _preupload(self, call: Call, repo: Repository, revision: str) -> Reply:
        stored, answers = repo.at(revision).files, []
        for asked in call.json["files"]:
            mode = "lfs" if is_lfs(asked["path"], asked["size"]) else "regular"
            answers.append({"path": asked["path"], "uploadMode": mode, "shouldIgnore": False})
            if asked["path"] in stored:  # with this id the client leaves out what has not changed
                answers[-1]["oid"] = stored[asked["path"]].oid
        return Reply({"files": answers})

    @route("POST", "/<repo>.git/info/lfs/objects/batch", write=True)
    def _lfs_batch(self, call: Call, repo: Repository) -> Reply:
        base, objects = f"{self.endpoint}/{repo.repo_id}.git/info/lfs/objects", []
        for asked in call.json["objects"]:
            upload = {"href": f"{base}/{asked['oid']}?signature={self._signature}"}
            actions = {"actions": {"upload": upload, "verify": {"href": f"{base}/verify"}}}
            objects.append({**asked, **({} if asked["oid"] in repo.objects else actions)})
        return Reply({"transfer": "basic", "objects": objects})

    @route("PUT", "/<repo>.git/info/lfs/objects/<oid>")
    def _lfs_upload(self, call: Call, repo: Repository, oid: str) -> Reply:
        if call.query.get("signature") != [self._signature]:
            raise Refused(403, "The address is not signed")
        if hashlib.sha256(call.body).hexdigest() != oid:
            raise Refused(400, "The content does not have the announced SHA-256")
        repo.objects[oid] = call.body
        return Reply()

    @route("POST", "/<repo>.git/info/lfs/objects/verify", write=True)
    def _lfs_verify(self, call: Call, repo: Repository) -> Reply:
        if len(repo.objects.get(call.json["oid"], b"")) != call.json["size"]:
            raise Refused(404, "The object was not uploaded")
        return Reply({})

    @route("POST", "/api/models/<repo>/commit/<branch>", write=True)
    def _commit(self, call: Call, repo: Repository, branch: str) -> Reply:
        if "create_pr" in call.query:
            raise ValueError("a pull request")
        if branch not in repo.branches:
            raise Refused(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        (_, header), *operations = [json.loads(line).values() for line in call.body.splitlines()]
        if header.get("parentCommit") not in (None, repo.branches[branch]):
            raise Refused(412, "A commit has happened since. Please refresh and try again.")
        files = dict(repo.at(branch).files)
        for key, value in operations:
            path = value["path"].rstrip("/")
            if key == "file":
                files[path] = Blob(base64.b64decode(value["content"]))
            elif key == "lfsFile":
                if value["oid"] not in repo.objects:
                    raise Refused(400, f"The LFS object of {path} was not uploaded")
                files[path] = Blob(repo.objects[value["oid"]], lfs=True)
            else:  # deletedFile, deletedFolder
                gone = [name for name in files if name == path or name.startswith(f"{path}/")]
                if not gone:
                    raise Refused(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
                files = {name: blob for name, blob in files.items() if name not in gone}
        commit = repo.commit(branch, files, header["summary"], header.get("description", ""))
        url = f"{self.endpoint}/{repo.repo_id}/commit/{commit.oid}"
        return Reply({"success": True, "commitOid": commit.oid, "commitUrl": url})

    @route("POST DELETE", "/api/models/<repo>/(?P<kind>tag|branch)/<name>", write=True)
    def _reference(self, call: Call, repo: Repository, kind: str, name: str) -> Reply:
        references = repo.tags if kind == "tag" else repo.branches
        if call.method == "DELETE":
            if name not in references:
                raise Refused(404, f"Invalid rev id: {name}", "RevisionNotFound")
            del references[name]
            return Reply({})
        # The address of a new tag names what is tagged, that of a new branch its own name.
        target = repo.at(name if kind == "tag" else call.json.get("startingPoint", "main"))
        name = call.json["tag"] if kind == "tag" else name
        if name in references:
            raise Refused(409, f"The {kind} {name} exists already")
        references[name] = target.oid
        return Reply({})

    @route("GET", "/api/(?:models|datasets)/<repo>/refs")
    def _references(self, call: Call, repo: Repository) -> Reply:
        def listed(folder: str, references: dict[str, str]) -> list[dict]:
            return [{"name": n, "ref": f"refs/{folder}/{n}", "targetCommit": oid} for n, oid in references.items()]

        return Reply({"branches": listed("heads", repo.branches), "tags": listed("tags", repo.tags), "converts": []})

    @route("GET", "/api/models/<repo>/commits/<revision>")
    def _commits(self, call: Call, repo: Repository, revision: str) -> Reply:
        who, history = {"authors": [{"user": self.user}]}, repo.at(revision).history()
        return Reply([{"id": c.oid, "title": c.title, "message": c.message, "date": c.date, **who} for c in history])

    @route("GET", "/api/(?:models|datasets)/<repo>/tree/<revision>(?:/<path>)?")
    def _tree(self, call: Call, repo: Repository, revision: str, path: str = "") -> Reply:
        commit, prefix = repo.at(revision), f"{path.strip('/')}/".lstrip("/")
        inside = [name.removeprefix(prefix).split("/") for name in sorted(commit.files) if name.startswith(prefix)]
        if not inside:
            raise Refused(404, f"{path} does not exist on {commit.oid}", "EntryNotFound")
        found: dict[str, None] = {}
        for names in inside:
            depths = range(1, len(names) + 1) if call.query.get("recursive") == ["true"] else [1]
            found.update(dict.fromkeys(prefix + "/".join(names[:depth]) for depth in depths))
        return Reply([self._entry(commit, name, call.query) for name in found])

    @route("POST", "/api/(?:models|datasets)/<repo>/paths-info/<revision>")
    def _paths_info(self, call: Call, repo: Repository, revision: str) -> Reply:
        commit, form = repo.at(revision), parse_qs(call.body.decode())
        paths = [path.rstrip("/") for path in form.get("paths", [])]
        return Reply([self._entry(commit, path, form) for path in paths if commit.below(path)])

    def _entry(self, commit: Commit, path: str, query: dict[str, list[str]]) -> dict:
        blob = commit.files.get(path)
        if blob:
            entry = {"type": "file", "path": path, "size": len(blob.content), "oid": blob.oid, **blob.lfs_info}
        else:
            oid = hashlib.sha1("".join(blob.oid for blob in commit.below(path).values()).encode()).hexdigest()
            entry = {"type": "directory", "path": path, "size": 0, "oid": oid}
        if query.get("expand") == ["true"]:
            last = commit
            while last.parent and last.parent.below(path) == commit.below(path):
                last = last.parent
            entry["lastCommit"] = {"id": last.oid, "title": last.title, "date": last.date}
        return entry

    @route("GET HEAD", "/(?:datasets/)?<repo>/resolve/<revision>/<path>")
    def _resolve(self, call: Call, repo: Repository, revision: str, path: str) -> Reply:
        commit = repo.at(revision)
        headers = {"X-Repo-Commit": commit.oid, "Accept-Ranges": "bytes"}
        blob = commit.files.get(path)
        if blob is None:  # with the commit, so that the client remembers that there is no such file
            raise Refused(404, "Entry not found", "EntryNotFound", headers)
        content, size = blob.content, len(blob.content)
        headers |= {"ETag": f'"{blob.oid}"', "Content-Type": "application/octet-stream"}
        if blob.lfs:
            headers |= {"X-Linked-Etag": f'"{blob.oid}"', "X-Linked-Size": str(size)}
        cut = None
        if call.method == "GET":
            cut, self.cut_next_download = self.cut_next_download, None
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", call.headers.get("range", ""))
        if not span:
            return Reply(content, 200, headers, cut)
        first, last = int(span[1]), min(int(span[2] or size), size - 1)
        if first > last:
            raise Refused(416, "Range not satisfiable", headers={"Content-Range": f"bytes */{size}"})
        headers["Content-Range"] = f"bytes {first}-{last}/{size}"
        return Reply(content[first : last + 1], 206, headers, cut)

    @route("GET", "/api/(?:models|datasets)/<repo>/revision/<revision>")
    @route("GET", "/api/(?:models|datasets)/<repo>")
    def _info(self, call: Call, repo: Repository, revision: str = "main") -> Reply:
        commit, siblings = repo.at(revision), []
        for path, blob in sorted(commit.files.items()):
            details = {"size": len(blob.content), "blobId": blob.oid, **blob.lfs_info} if "blobs" in call.query else {}
            siblings.append({"rfilename": path, **details})
        match = FRONT_MATTER.match(commit.files.get("README.md", Blob(b"")).content.decode())
        card = (yaml.safe_load(match.group(1)) if match else None) or {}
        reply = {"id": repo.repo_id, "sha": commit.oid, "private": repo.private, "siblings": siblings}
        tags = [*(card.get("tags") or []), *([f"license:{card['license']}"] if "license" in card else [])]
        reply |= {"lastModified": commit.date, "cardData": card, "tags": tags}
        reply |= {name: card[name] for name in ("library_name", "pipeline_tag") if name in card}
        return Reply({**reply, "downloads": 0, "likes": 0, "gated": False, "disabled": False})


def is_lfs(path: str, size: int) -> bool:
    """Whether the Hub stores a file through LFS."""
    return path.endswith(LFS_SUFFIXES) or size > LFS_SIZE


def card_problems(text: str) -> list[str]:
    """Why the Hub refuses the metadata of a card: no mapping, or results without a field or with a bad data set."""
    try:
        metadata = yaml.safe_load(text)
    except yaml.YAMLError as error:
        return [f"bad YAML: {error}"]
    if not isinstance(metadata, dict):
        return ["the metadata are not a mapping"]
    required, problems = {}, []
    link = str(metadata.get("license_link") or "LICENSE")  # the Hub's specification of cards
    if link not in ("LICENSE", "LICENSE.md") and not link.startswith("https://"):
        problems.append(f'"license_link" with value "{link}" is neither LICENSE, LICENSE.md nor an address')
    for i, model in enumerate(metadata.get("model-index") or []):
        required[f"model-index[{i}].name"] = model.get("name")
        for j, result in enumerate(model.get("results") or []):
            place = f"model-index[{i}].results[{j}]"
            for part, key in (("task", "type"), ("dataset", "type"), ("dataset", "name")):
                required[f"{place}.{part}.{key}"] = (result.get(part) or {}).get(key)
            name = required[f"{place}.dataset.type"]
            if name and not DATASET_TYPE.fullmatch(str(name)):
                problems.append(f'"{place}.dataset.type" with value "{name}" fails to match {DATASET_TYPE.pattern}')
            for k, metric in enumerate(result.get("metrics") or [{}]):
                required.update({f"{place}.metrics[{k}].{key}": metric.get(key) for key in ("type", "value")})
    return problems + [f'"{name}" is required' for name, value in required.items() if value in (None, "")]


class _Handler(BaseHTTPRequestHandler):
    """Reads requests and writes answers over connections that stay open."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or each answer waits 40 ms for an acknowledgement

    def handle(self) -> None:
        with suppress(ConnectionError):  # a client that has finished drops its connections
            super().handle()

    def _answer(self) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        body = self.rfile.read(int(headers.get("content-length", 0)))
        reply = self.server.hub.answer(self.command, self.path, headers, body)
        is_bytes = isinstance(reply.body, bytes)
        content = reply.body if is_bytes else json.dumps(reply.body, default=str).encode()
        self.send_response(reply.status)
        for name, value in {**({} if is_bytes else {"Content-Type": "application/json"}), **reply.headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: reply.cut])
        self.close_connection = self.close_connection or reply.cut is not None

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = do_CONNECT = _answer

    def log_message(self, *arguments) -> None:
        """Say nothing: what was asked stands in `HubStandIn.requests`."""
