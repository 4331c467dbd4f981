# SPDX-License-Identifier: MIT
"""`make dashboard`: a read-only view of running campaigns over HTTP, standard library only.

Nothing that a page of another site makes a browser send is answered: the Host must be ours, a foreign Origin or a
cross-site fetch is refused, there is no CORS, and only GET and HEAD exist.
"""

import hmac
import json
import secrets
import socket
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from http.cookies import CookieError, SimpleCookie
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from ablab import rundir
from ablab.report import blocks, live, load, page, web
from ablab.report.table import line
from ablab.rundir import Campaign, RunError

LOOPBACK = ("127.0.0.1", "localhost", "::1")
COOKIE = "ablab-token"
PERIOD_S = 1.0
SLOW_S = 60.0  # a connection that neither asks nor reads for so long is closed
WATCHERS = 64  # event streams at once, a thread each
REPORT = "report.html"
WIDE = {"trial": 10, "state": 9, "share": 12, "device": 8}  # characters
TYPES = {
    ".png": "image/png",
    ".svg": "image/svg+xml",
    ".csv": "text/csv; charset=utf-8",
    ".json": "application/json",
    ".md": "text/plain; charset=utf-8",
    ".config": "text/plain; charset=utf-8",
}
HTML = "text/html; charset=utf-8"
NOTHING = "default-src 'none'; frame-ancestors 'none'; sandbox"


@dataclass
class Views:
    """What is read of the campaigns below a results folder, once for all visitors."""

    results: Path
    lock: threading.Lock = field(default_factory=threading.Lock)
    states: dict[str, tuple[float, live.Live, dict[str, Any]]] = field(default_factory=dict)
    loaded: dict[str, tuple[Any, load.Loaded]] = field(default_factory=dict)

    def campaign(self, name: str) -> Campaign:
        """Raises RunError for one that is not directly below the results folder."""
        return Campaign.open(rundir.below(self.results.resolve(), name))

    def state(self, campaign: Campaign) -> dict[str, Any]:
        """What a view shows, at most PERIOD_S old."""
        with self.lock:
            at, reader, found = self.states.get(campaign.name) or (0.0, live.Live(campaign), {})
            if not found or time.monotonic() - at >= PERIOD_S / 2:
                found = reader.state()
                self.states[campaign.name] = time.monotonic(), reader, found
            return found

    def load(self, campaign: Campaign) -> load.Loaded:
        """The campaign as a report sees it, read again when a state or a row changed."""
        with self.lock:
            files = [campaign.journal, campaign.certificate, *campaign.path.glob("trials/*/attempts/*/metrics.jsonl")]
            files += campaign.path.glob("trials/*/DONE")
            stamp = tuple((p.stat().st_size, p.stat().st_mtime_ns) for p in files if p.exists())
            if self.loaded.get(campaign.name, (None,))[0] != stamp:
                self.loaded[campaign.name] = stamp, load.read(campaign)
            return self.loaded[campaign.name][1]

    def page(self, path: str) -> str:
        """HTML of /, /c/NAME/, /c/NAME/report.html or /c/NAME/trials/ID.html.  Raises RunError where there is none."""
        match path.strip("/").split("/"):
            case [""]:
                return blocks.document("ablab", self._index())
            case ["c", name]:
                return blocks.document(f"{name}: live", self._live(self.campaign(name)), live=True)
            case ["c", name, file] if file == REPORT:
                c = self.load(self.campaign(name))
                return blocks.document(f"{name}: report", web.campaign_model(c, page.judge(c), []))
            case ["c", name, "trials", file]:
                c = self.load(self.campaign(name))
                found = [t for t in c.trials if f"{t.id}.html" == file]
                if found:
                    return blocks.document(found[0].id, web.trial_model(c, found[0], web.base_values(c)))
        raise RunError(f"{path}: no such page")

    def file(self, path: str) -> Path:
        """A file below report/ of a campaign.  Raises RunError for any other."""
        match path.strip("/").split("/"):
            case ["c", name, file] if Path(file).suffix in TYPES:
                found = rundir.below(self.campaign(name).report, file)
                if found.is_file():
                    return found
        raise RunError(f"{path}: no such file")

    def _index(self) -> blocks.Model:
        rows = []
        for c in rundir.campaigns(self.results):
            try:
                found = self.state(c)
            except (OSError, ValueError, LookupError, TypeError) as error:  # the others can be seen all the same
                found = {"done": None, "total": None, "eta": line(f"cannot be read: {error}")}
            rows.append([f"c/{c.name}/", c.content["created"], found["done"], found["total"], found["eta"]])
        links = {"type": "links", "links": [[row[0].split("/")[1], row[0]] for row in rows[::-1]]}
        columns = [{"name": n} for n in ("campaign", "created", "done", "trials", "time left")]
        block = {"type": "table", "columns": columns, "rows": [[r[0].split("/")[1], *r[1:]] for r in rows[::-1]]}
        sections = [blocks.section("Campaigns", links, block)]
        return {"title": "ablab", "banners": [], "lead": f"{len(rows)} campaigns", "facts": [], "sections": sections}

    def _live(self, c: Campaign) -> blocks.Model:
        columns = [
            {"name": n, "format": f, "num": bool(f) or n == "step", "wide": WIDE.get(n, 6)}
            for n, f in live.COLUMNS.items()
        ]
        first = self.state(c)
        rows = {"columns": columns, "rows": first["rows"], "name": "trials", "link": "trials/"}
        block = {"type": "live", "events": "events", "first": first, "table": rows}
        question = c.content["registration"]["question"]
        return {
            "title": c.name,
            "up": "../../",
            "back": "all campaigns",
            "banners": page.banners(self.load(c), []),
            "lead": line(question) if question else "No question was registered.",
            "facts": [
                f"value: {live.unit(c)}; vs parent: at the same step and seed",
                f"Started: {c.content['created']}",
            ],
            "sections": [
                blocks.section("Now", block, {"type": "links", "links": [["the report so far", "report.html"]]})
            ],
        }


class Dashboard(ThreadingHTTPServer):
    """The server; `token` is None where every local visitor may look."""

    daemon_threads = True

    def __init__(self, results: Path, bind: str, port: int, token: str | None, allowed: tuple[str, ...]) -> None:
        self.address_family = socket.AF_INET6 if ":" in bind else socket.AF_INET
        self.views, self.token, self.stopping = Views(results), token, threading.Event()
        self.watchers = threading.BoundedSemaphore(WATCHERS)
        super().__init__((bind, port), Handler)
        own = self.server_address[1]
        self.hosts = {f"{'[::1]' if h == '::1' else h}:{own}" for h in LOOPBACK}
        self.hosts |= {h for name in allowed for h in (name.lower(), f"{name.lower()}:{own}")}

    def shutdown(self) -> None:
        self.stopping.set()
        super().shutdown()


class Handler(BaseHTTPRequestHandler):
    """One request.  Refusals come before anything is read."""

    server: Dashboard
    server_version, sys_version, protocol_version = "ablab", "", "HTTP/1.1"
    timeout = SLOW_S

    def do_GET(self) -> None:
        try:
            if (refusal := self._refusal()) is not None:
                self._send(*refusal)
            elif not self._let_in():
                self._answer(unquote(urlsplit(self.path).path))
        except (ConnectionError, TimeoutError):
            self.close_connection = True  # the visitor left, or does not read

    do_HEAD = do_GET

    def __getattr__(self, name: str) -> Any:
        if name.startswith("do_"):  # any other method, known or not
            return lambda: self._send(HTTPStatus.METHOD_NOT_ALLOWED, "GET and HEAD only", {"Allow": "GET, HEAD"})
        raise AttributeError(name)

    def log_message(self, *_: Any) -> None:
        pass  # an address may hold the token

    def _refusal(self) -> tuple[HTTPStatus, str] | None:
        """Why this request is not ours to answer."""
        host, origin = self.headers.get("Host", "").lower(), self.headers.get("Origin")
        if host not in self.server.hosts:
            return HTTPStatus.FORBIDDEN, "Host is not this dashboard; ALLOW_HOST=name lets a name in"
        if origin is not None and origin.lower() not in (f"http://{host}", f"https://{host}"):
            return HTTPStatus.FORBIDDEN, "Origin is another site"
        if self.headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin"):
            return HTTPStatus.FORBIDDEN, "asked for by another site"
        return None

    def _let_in(self) -> bool:
        """Whether the request is answered already: without the token refused, with it in the address sent on."""
        if self.server.token is None:
            return False
        address = urlsplit(self.path)
        given = parse_qs(address.query).get("token", [""])[0]
        if given and self._is_token(given):
            cookie = f"{COOKIE}={self.server.token}; HttpOnly; SameSite=Strict; Path=/"
            where = "/" + address.path.lstrip("/\\")  # never an address of another host
            self._send(HTTPStatus.SEE_OTHER, "", {"Location": where, "Set-Cookie": cookie})
            return True
        try:
            kept = SimpleCookie(self.headers.get("Cookie", "")).get(COOKIE)
        except CookieError:
            kept = None
        if kept is not None and self._is_token(kept.value):
            return False
        self._send(HTTPStatus.FORBIDDEN, "the address that make dashboard printed has a token")
        return True

    def _is_token(self, given: str) -> bool:
        return hmac.compare_digest(given.encode(), (self.server.token or "").encode())

    def _answer(self, path: str) -> None:
        views = self.server.views
        try:
            if path.endswith("/events") and path.count("/") == 3 and path.startswith("/c/"):
                return self._events(views.campaign(path.split("/")[2]))
            if path.startswith("/c/") and path.count("/") == 2:
                return self._send(HTTPStatus.MOVED_PERMANENTLY, "", {"Location": f"/c/{rundir.checked(path[3:])}/"})
            if Path(path).suffix in TYPES:
                found = views.file(path)
                return self._send(HTTPStatus.OK, found.read_bytes(), {"Content-Type": TYPES[found.suffix]})
            policy = blocks.policy(live=True) + "; frame-ancestors 'none'"
            self._send(HTTPStatus.OK, views.page(path), {"Content-Type": HTML, "Content-Security-Policy": policy})
        except (RunError, FileNotFoundError, IsADirectoryError):
            self._send(HTTPStatus.NOT_FOUND, "no such page")
        except (ConnectionError, TimeoutError):
            raise
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:  # of files that somebody edited
            print(f"{line(path)}: {type(error).__name__}: {line(str(error))}", file=sys.stderr)
            self._send(
                HTTPStatus.INTERNAL_SERVER_ERROR, "a file of this campaign cannot be read; ablab report names it"
            )

    def _events(self, campaign: Campaign) -> None:
        """The state of a campaign whenever it changes, until the visitor leaves."""
        if not self.server.watchers.acquire(blocking=False):
            return self._send(HTTPStatus.SERVICE_UNAVAILABLE, f"{WATCHERS} pages are open; close one")
        try:
            self._stream(campaign)
        finally:
            self.server.watchers.release()

    def _stream(self, campaign: Campaign) -> None:
        self._head(HTTPStatus.OK, {"Content-Type": "text/event-stream", "Connection": "close"})
        self.close_connection = True
        before = None
        while self.command == "GET" and not self.server.stopping.is_set():
            found = self.server.views.state(campaign)
            same = before is not None and {**found, "at": ""} == {**before, "at": ""}
            data = ": nothing new" if same else f"data: {json.dumps(found, allow_nan=False)}"
            self.wfile.write(f"{data}\n\n".encode())
            self.wfile.flush()
            before = found
            self.server.stopping.wait(PERIOD_S)

    def _send(self, status: HTTPStatus, body: str | bytes, headers: Mapping[str, str] | None = None) -> None:
        data = body.encode() if isinstance(body, str) else body
        self._head(
            status, {"Content-Type": "text/plain; charset=utf-8", **(headers or {}), "Content-Length": str(len(data))}
        )
        if status >= HTTPStatus.BAD_REQUEST:
            self.close_connection = True  # a body that came with it was not read
        if self.command != "HEAD":
            self.wfile.write(data)

    def _head(self, status: HTTPStatus, headers: Mapping[str, str]) -> None:
        always = {
            "Content-Security-Policy": NOTHING,
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Cross-Origin-Opener-Policy": "same-origin",
            "Cache-Control": "no-store",
        }
        self.send_response(status)
        for name, value in {**always, **headers}.items():
            self.send_header(name, value)
        self.end_headers()


def server(
    results: Path, bind: str = LOOPBACK[0], port: int = 8642, token: bool = False, allowed: str = ""
) -> Dashboard:
    """A dashboard that listens; any bind but loopback has a token of 256 bits."""
    is_open = bind in LOOPBACK and not token
    return Dashboard(results, bind, port, None if is_open else secrets.token_hex(32), tuple(allowed.split()))


def address(found: Dashboard) -> str:
    """What a person opens."""
    host, port = found.server_address[:2]
    name = "127.0.0.1" if host not in LOOPBACK else f"[{host}]" if ":" in host else host
    return f"http://{name}:{port}/" + (f"?token={found.token}" if found.token else "")


def main(results: Path, **options: Any) -> int:
    """Serve until Ctrl-C."""
    with server(results, **options) as found:
        print(f"dashboard: {address(found)}  (read-only; Ctrl-C ends it and nothing else)", flush=True)
        try:
            found.serve_forever()
        except KeyboardInterrupt:
            print("dashboard ended", file=sys.stderr)
    return 0
