# SPDX-License-Identifier: MIT
"""A W&B service on 127.0.0.1: it answers what the client asks for runs that a test has, in the form of the real one.

The queries are those of wandb 0.31: Runs and Run by the package, the rest by its wandb-core.  One that is not known
is refused, and listed in `unknown`.
"""

import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Run:
    """One run of the service."""

    id: str
    name: str
    config: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]
    """History, with _step."""
    events: Sequence[Mapping[str, Any]] = ()
    state: str = "finished"
    step: str = ""


@dataclass
class Service:
    """Its runs, and what was asked."""

    runs: Sequence[Run]
    url: str = ""
    asked: list[tuple[str, Any]] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)

    def node(self, run: Run) -> dict[str, Any]:
        summary = {k: v for row in run.rows for k, v in row.items()}
        last = max((row["_step"] for row in run.rows), default=-1)
        made = {"createdAt": "2026-01-01T00:00:00Z", "heartbeatAt": "2026-01-01T01:00:00Z"}
        return {
            **{"id": f"internal-{run.id}", "projectId": "1", "name": run.id, "displayName": run.name, **made},
            **{"state": run.state, "jobType": run.step or None, "group": "ra", "tags": [], "sweepName": None},
            "config": json.dumps({k: {"value": v, "desc": None} for k, v in run.config.items()}),
            "summaryMetrics": json.dumps(summary),
            "systemMetrics": "{}",
            "historyLineCount": len(run.rows),
            "historyKeys": {"lastStep": last, "sets": [], "keys": {}},
            **{"commit": None, "readOnly": False, "description": "", "notes": ""},
            "user": {"name": "u", "username": "u"},
        }

    def answer(self, query: str, v: Mapping[str, Any]) -> Any:
        """The `data` of a query."""
        name = query.partition("query ")[2].partition("(")[0].split()[0] if "query " in query else query
        self.asked.append((name, v))
        by_id = {r.id: r for r in self.runs}
        run = by_id.get(v.get("name") or v.get("run") or v.get("runName") or "")
        if name == "Runs":
            filters = json.loads(v.get("filters") or "{}")
            wanted = filters.get("config.run_name") or filters.get("config.run_name.value")
            found = [r for r in self.runs if wanted is None or r.config.get("run_name") == wanted]
            start = int(v.get("cursor") or 0)
            page = list(enumerate(found, 1))[start : start + v["perPage"]]
            more = {"hasNextPage": start + len(page) < len(found), "endCursor": str(start + len(page))}
            edges = [{"node": self.node(r), "cursor": str(i)} for i, r in page]
            runs = {"edges": edges, "pageInfo": more}
            return {"project": {"internalId": "1", "runCount": len(found), "readOnly": False, "runs": runs}}
        if name == "Run":
            return {"project": {"run": run and self.node(run)}}
        if name == "RunHistoryKeys" and run:
            return {"project": {"run": {"historyKeys": self.node(run)["historyKeys"]}}}
        if name == "RunParquetHistory":
            return {"project": {"run": {"parquetHistory": {"parquetUrls": [], "liveData": []}}}}
        if name == "HistoryPage" and run:
            rows = [r for r in run.rows if v["minStep"] <= r["_step"] < v["maxStep"]]
            return {"project": {"run": {"history": [json.dumps(r) for r in rows[: v["pageSize"]]]}}}
        if name in ("RunSampledHistory", "SampledHistoryPage") and run:
            specs = [json.loads(s) for s in v.get("specs") or [v["spec"]]]
            inside = lambda r, s: s.get("minStep", 0) <= r["_step"] <= s.get("maxStep", r["_step"])
            wanted = lambda r, s: inside(r, s) and all(k in r for k in s["keys"])
            found = [[r for r in run.rows if wanted(r, s)][: s["samples"]] for s in specs]
            return {"project": {"run": {"sampledHistory": found}}}
        if name == "RunFullHistory" and run:
            node, rows = ("events", run.events) if "events(" in query else ("history", run.rows)
            return {"project": {"run": {node: [json.dumps(r) for r in rows[: v["samples"]]]}}}
        if name == "ServerFeaturesQuery":
            return {"serverInfo": {"features": []}}
        if name in ("Viewer", "GetDefaultEntity"):
            viewer = {"id": "u", "entity": "team", "username": "u", "flags": "{}", "teams": {"edges": []}}
            return {"viewer": {**viewer, "apiKeys": {"edges": []}}}
        self.unknown.append(query)
        return None


@contextmanager
def serve(runs: Sequence[Run]) -> Iterator[Service]:
    """The service, at its `url`."""
    service = Service(runs)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            data = service.answer(body["query"], body.get("variables") or {})
            text = json.dumps({"data": data} if data else {"errors": [{"message": "unknown query"}]}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *_: Any) -> None:
            """Silence."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    service.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield service
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
