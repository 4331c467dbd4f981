# SPDX-License-Identifier: MIT
"""As much of a W&B server as its client needs, on this machine: runs with their history, kept in memory.

`refuse` is how many posts of rows are answered with 429, the service's word for later.
"""

import gzip
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Server(ThreadingHTTPServer):
    """Runs by id: {config, history, summary}; all that was sent is in `seen`."""

    daemon_threads = True

    def __init__(self, refuse: int = 0) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.runs, self.refuse, self.seen, self.unknown = {}, refuse, [], []
        self.mutex = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()

    def bucket(self, name):
        run = self.runs[name]
        history = run["history"]
        return {
            "id": name,
            "name": name,
            "displayName": run["display"],
            "state": run["state"],
            "description": "",
            "notes": "",
            "tags": [],
            "config": json.dumps(run["config"]),
            "summaryMetrics": json.dumps(history[-1] if history else {}),
            "historyLineCount": len(history),
            "logLineCount": 0,
            "eventsLineCount": 0,
            "historyTail": json.dumps([json.dumps(row) for row in history[-1:]]),
            "eventsTail": "[]",
            "wandbConfig": '{"t": 1}',
            "sweepName": None,
            "group": None,
            "jobType": None,
            "commit": None,
            "readOnly": False,
            "createdAt": "2026-01-01T00:00:00",
            "heartbeatAt": "2026-01-01T00:00:00",
            "systemMetrics": "{}",
            "user": {"name": "me", "username": "me"},
            "historyKeys": {"lastStep": history[-1]["_step"] if history else -1, "keys": {}},
            "projectId": 1,
            "project": PROJECT,
        }

    def answer(self, operation, v):
        name = v.get("name") or v.get("run") or v.get("run_name") or v.get("runName")
        if operation == "UpsertBucket":
            run = self.runs.setdefault(name, {"history": [], "config": {}, "display": name, "state": "running"})
            run["display"] = v.get("displayName") or run["display"]
            run["config"] |= json.loads(v.get("config") or "{}")
            return {"upsertBucket": {"bucket": self.bucket(name), "inserted": not run["history"]}}
        if operation == "CreateRunFiles":
            files = [{"name": f, "uploadUrl": f"{self.url}/put/{f}"} for f in v["files"]]
            return {"createRunFiles": {"runID": "1", "uploadHeaders": [], "files": files}}
        if operation == "RunResumeStatus":
            return {"model": {**PROJECT, "bucket": self.bucket(name) if name in self.runs else None}}
        if operation == "Viewer" or "viewer" in operation.lower() or operation == "GetDefaultEntity":
            return {
                "viewer": {
                    "id": "1",
                    "entity": "me",
                    "username": "me",
                    "name": "me",
                    "flags": "{}",
                    "teams": {"edges": []},
                }
            }
        if name in self.runs:
            samples = [json.dumps(row) for row in self.runs[name]["history"]]
            low, high = v.get("minStep") or 0, v.get("maxStep") or 1 << 40
            page = [row for row in samples if low <= json.loads(row)["_step"] < high]
            return {"project": {**PROJECT, "run": {**self.bucket(name), "history": page, "sampledHistory": [samples]}}}
        self.unknown.append((operation, v))
        return {}


PROJECT = {"id": "1", "name": "ablab", "internalId": "1", "entity": {"id": "1", "name": "me"}, "entityName": "me"}


class _Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_POST(self):
        server, body = self.server, self.rfile.read(int(self.headers.get("content-length") or 0))
        if self.headers.get("content-encoding") == "gzip":
            body = gzip.decompress(body)
        with server.mutex:
            server.seen.append(body)
            if self.path.endswith("/graphql"):
                asked = json.loads(body)
                operation = asked.get("operationName") or asked["query"].split("(")[0].split("{")[0].split()[-1]
                return self.say(200, {"data": server.answer(operation, asked.get("variables") or {})})
            if not self.path.endswith("/file_stream"):
                return self.say(200, {})
            if server.refuse > 0:
                server.refuse -= 1
                return self.say(429, {"error": "slow down"})
            name, sent = self.path.split("/")[-2], json.loads(body)
            part = (sent.get("files") or {}).get("wandb-history.jsonl")
            if part:
                history = server.runs[name]["history"]
                history[part["offset"] :] = [json.loads(line) for line in part["content"]]
            if sent.get("complete"):
                server.runs[name]["state"] = "finished" if sent.get("exitcode") == 0 else "failed"
            return self.say(200, {"limits": {}})

    def do_PUT(self):
        self.rfile.read(int(self.headers.get("content-length") or 0))
        self.say(200, {})

    def do_GET(self):
        self.say(404, {})

    def say(self, code, content):
        data = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
