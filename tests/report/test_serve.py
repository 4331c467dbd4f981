# SPDX-License-Identifier: MIT
"""The dashboard is read-only and answers nobody whom another site sent; views tell what runs, what is left and what
is wrong, and leave the campaign alone."""

import http.client
import io
import json
import os
import pty
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from ablab.journal import Journal, TrialState
from ablab.report import live, serve, watch
from ablab.rundir import Campaign, Rows
from tests import browser
from tests.report import campaign
from tests.report.test_web import CONTRAST, IMG, SHELL, hostile

ROOT = Path(__file__).parents[2]


def finals(arm, seed):
    return 2.4 + 0.01 * seed - {"R0": 0.0, "R1": 0.05, "R2": 0.03}[arm[0]]


def running(folder, **options) -> Campaign:
    """One trial that runs, one that waits, one that diverged, the others done; lines as a live trial writes them."""
    fates = {"r1-s2": "running", "r2-s2": "queued", "r2-s1": "diverged"}
    made = campaign.write(folder, finals, seeds=(1, 2), fates=fates, **options)
    t = trial(made, "r1-s2")
    lease = t.lease()
    facts = {k: lease[k] for k in ("attempt", "lease", "pid", "proc_start", "boot_id", "host")}
    status = {
        "state": "running",
        "phase": "train",
        "beat": 1,
        "progress": 1,
        "step": 100,
        "tokens": 76800,
        "train_s": 10.0,
    }
    t.write("status", {**facts, **status, "eta_s": None, "loss": 3.0, "devices": ["GPU-1"]})
    return made


def trial(made, name):
    return next(t for t in made.trials() if t.record["id"] == name)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    running(folder)
    hostile(folder, name="hostile")
    (folder / "secret.md").write_text("secret")
    (folder / "hostile/report/link.md").symlink_to(folder / "secret.md")
    (folder / "hostile/report/report.md").write_text("fine")
    return folder


@pytest.fixture
def opened(results):
    """Starts dashboards; what they were given back is ended."""
    started = []

    def start(**options):
        found = serve.server(results, port=0, **options)
        threading.Thread(target=found.serve_forever, daemon=True).start()
        started.append(found)
        return found

    yield start
    for found in started:
        found.shutdown()
        found.server_close()


def ask(found, path="/", method="GET", host=None, **headers):
    """(status, headers, body) of one request."""
    port = found.server_address[1]
    line = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    line.putrequest(method, path, skip_host=True)
    for name, value in {"Host": host or f"127.0.0.1:{port}", **headers}.items():
        line.putheader(name.replace("_", "-"), value)
    line.endheaders()
    answer = line.getresponse()
    body = answer.read() if "event-stream" not in answer.getheader("Content-Type", "") else answer.fp.readline()
    line.close()
    return answer.status, dict(answer.getheaders()), body


def test_pages_answer_with_a_strict_policy_and_no_cors(opened):
    found = opened()
    for path in ("/", "/c/hostile/", "/c/hostile/report.html", "/c/hostile/trials/r2-s3.html", "/c/hostile/report.md"):
        status, headers, body = ask(found, path)
        assert status == 200 and body and headers["X-Content-Type-Options"] == "nosniff", path
        assert headers["Content-Security-Policy"].startswith("default-src 'none'")
        assert not any(name.startswith("Access-Control") for name in headers)
    status, headers, body = ask(found, "/c/hostile/", "HEAD")
    assert (status, body) == (200, b"") and int(headers["Content-Length"]) > 1000


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT", "NOSUCH"])
def test_anything_but_get_and_head_is_refused(opened, method):
    status, headers, _ = ask(opened(), "/", method)
    assert status == 405 and headers["Allow"] == "GET, HEAD"


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Sec_Fetch_Site": "same-origin"}, 200),
        ({"host": "evil.example"}, 403),
        ({"host": "127.0.0.1:1"}, 403),
        ({"host": "127.0.0.1"}, 403),
        ({"host": "localhost.evil.example:{port}"}, 403),
        ({"host": "LOCALHOST:{port}", "Origin": "http://localhost:{port}"}, 200),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://localhost:1"}, 403),
        ({"Sec_Fetch_Site": "cross-site"}, 403),
        ({"Sec_Fetch_Site": "same-site"}, 403),
        ({"host": "lab.example"}, 200),
    ],
)
def test_foreign_hosts_and_origins_are_refused(opened, headers, status):
    found = opened(allowed="lab.example")
    sent = {k: v.format(port=found.server_address[1]) for k, v in headers.items()}
    got, _, body = ask(found, "/c/hostile/", **sent)
    assert got == status and (status == 200 or b"R0" not in body)


@pytest.mark.parametrize(
    "path",
    [
        "/c/hostile/../../secret.md",
        "/c/hostile/..%2f..%2fsecret.md",
        "/c/..%2fsecret.md",
        "/c/%2e%2e/secret.md",
        "/c/hostile/link.md",
        "/c/hostile/campaign.json",
        "/c/hostile//etc/passwd",
        "/c/hostile/trials/nosuch.html",
        "/c/nosuch/",
        "/c/nosuch/events",
        "/secret.md",
        "/c/hostile/%00.md",
        "/c/HOSTILE",
    ],
)
def test_paths_outside_of_a_report_do_not_exist(opened, path):
    status, _, body = ask(opened(), path)
    assert status == 404 and b"secret" not in body


def test_a_token_is_asked_for_kept_in_a_cookie_and_taken_out_of_the_address(opened):
    found = opened(token=True)
    assert len(found.token) == 64 and found.token in serve.address(found)
    assert ask(found)[0] == 403 and ask(found, "/?token=" + "0" * 64)[0] == 403
    assert ask(found, Cookie="ablab-token=" + "0" * 64)[0] == ask(found, Cookie="a=b; \xff;")[0] == 403
    status, headers, body = ask(found, f"/c/hostile/?token={found.token}")
    assert (status, headers["Location"], body) == (303, "/c/hostile/", b"")
    cookie = headers["Set-Cookie"]
    assert "HttpOnly" in cookie and "SameSite=Strict" in cookie
    assert ask(found, "/c/hostile/", Cookie=cookie.partition(";")[0])[0] == 200
    assert ask(found, f"//evil.example/?token={found.token}")[1]["Location"] == "/evil.example/"


def test_any_other_bind_has_a_token(opened):
    found = opened(bind="0.0.0.0")
    assert found.token and ask(found)[0] == 403


def test_events_tell_the_state(opened):
    status, headers, first = ask(opened(), "/c/ra-20260101-abcdef/events")
    state = json.loads(first.removeprefix(b"data: "))
    assert status == 200 and headers["Content-Type"] == "text/event-stream"
    assert state["counts"] == {"queued": 1, "running": 1, "done": 3, "diverged": 1} and state["total"] == 6


@browser.needed
def test_the_live_page_draws_itself_and_asks_its_own_server_only(opened, tmp_path):
    found = opened()
    base = serve.address(found)
    tab = browser.Browser(tmp_path / "profile")
    try:
        for dark in (False, True):
            tab.size(375, 800, dark=dark, phone=True)
            for page in ("c/ra-20260101-abcdef/", "c/hostile/"):
                tab.open(base + page)
                tab.wait("/updated/.test(document.body.innerText) && !/connecting/.test(document.body.innerText)")
                assert tab.requests == [base + page, base + page + "events"] and tab.errors + tab.dialogs == []
                assert tab.run("document.documentElement.scrollWidth") == 375 and tab.run(CONTRAST) == []
        assert tab.run("document.images.length") == 0 and "! diverged" in tab.run("document.body.innerText")
        tab.open(base + "c/hostile/trials/r2-s3.html")
        assert IMG in tab.run("document.body.innerText") and tab.errors == []
    finally:
        tab.close()


# The state


def alerts(made, **options):
    return {(a["kind"], a["trial"]): a["text"] for a in live.Live(made, **options).state()["alerts"]}


def row(made, name):
    found = live.Live(made).state()
    return dict(zip(live.COLUMNS, next(r for r in found["rows"] if r[0] == name), strict=True))


def test_a_running_trial_shows_its_step_and_its_loss_against_the_parent_at_the_same_step(tmp_path):
    made = running(tmp_path)
    found = row(made, "r1-s2")
    mine, parent = (campaign.loss(finals((step, {}), 2), 100) for step in ("R1", "R0"))
    assert (found["state"], found["step"], found["share"]) == ("running", 100, 0.5)
    assert found["vs parent"] == pytest.approx(mine - parent) and found["device"] == "GPU-1"
    assert row(made, "r2-s2")["state"] == "queued"


def test_alerts_name_what_is_wrong(tmp_path):
    made = running(tmp_path)
    t = trial(made, "r1-s2")
    place = t.attempt(1)
    written = place.metrics.stat().st_mtime
    assert set(alerts(made, now=lambda: written + 1)) == {("diverged", "r2-s1")}
    late = alerts(made, now=lambda: written + 11)  # rows came each second; below the least of 2 s x 5 nothing is late
    assert late["stalled", "r1-s2"] == "no row for 11 s; they came every 2 s"
    rows = Rows(place.contracts, "contracts", {"trial": t.name, "attempt": 1})
    rows.line({"step": 4, "name": "prune/mask", "ok": False, "expected": 1, "measured": 0})
    rows = Rows(place.telemetry, "telemetry", {"trial": t.name, "attempt": 1, "period_ms": 1000})
    for i in range(10):
        rows.line({"t": i, "devices": {"GPU-1": {"busy_pct": 10.0, "throttle": ["thermal"]}}, "host": {}})
    (made.mirror / "wandb.json").write_text('{"state": "behind", "left": 7, "error": "429"}')
    (trial(made, "r0-s1").checkpoints / "step-00000200-a1").mkdir()
    saved = trial(made, "r0-s1").checkpoint(200, 1)
    saved.model.write_bytes(bytes(5000))
    saved.seal()
    found = alerts(made, now=lambda: written, free=lambda: 4000)
    assert found["contract breach", "r1-s2"] == "prune/mask at step 4"
    assert found["idle device", "r1-s2"] == "GPU-1: busy 10 % at most"
    assert found["throttled device", "r1-s2"] == "GPU-1: thermal"
    assert found["mirror", ""] == "wandb is behind, 7 rows to send: 429" and ("disk", "") in found
    assert ("disk", "") not in alerts(made, free=lambda: 6000)
    status = t.status()
    t.write("status", status | {"proc_start": status["proc_start"] + 1})
    assert ("heartbeat lost", "r1-s2") in alerts(made)


# The terminal


def test_without_a_terminal_there_is_a_line_every_30_s_until_it_is_over(tmp_path):
    made, said, waits = running(tmp_path), [], []

    def wait(seconds):
        waits.append(seconds)
        journal, folders = Journal.of(made), [trial(made, n).name for n in ("r1-s2", "r2-s2")]
        journal.append(folders[0], TrialState.FAILED, reason="x")
        journal.append(folders[1], TrialState.REFUSED, reason="x")

    assert watch.plain(live.Live(made), said.append, wait) == 0
    assert waits == [30.0] and len(said) == 2 and not any("\x1b" in line or "\n" in line for line in said)
    assert said[0].startswith("ra-20260101-abcdef: 1 queued 1 running 3 done 1 diverged of 6")


def test_the_view_fits_80_by_24_and_hostile_text_drives_no_terminal(tmp_path):
    from rich.console import Console

    made = running(tmp_path)
    Journal.of(made).append(trial(made, "r1-s2").name, TrialState.FAILED, reason=SHELL + "[bold]x[/bold]" + "y" * 300)
    console = Console(width=80, height=24, force_terminal=True, color_system=None, record=True, file=io.StringIO())
    console.print(watch.render(live.Live(made).state(), 80, 24))
    text = console.export_text()
    assert len(text.splitlines()) <= 24 and max(map(len, text.splitlines())) <= 80
    assert "\x1b" not in text and "[bold]x[/bold]" in text and "! failed r1-s2" in text


@pytest.mark.parametrize("color", [True, False])
def test_q_leaves_the_view_and_nothing_else(tmp_path, color):
    made = running(tmp_path)
    before = {p: p.stat().st_mtime_ns for p in made.path.rglob("*")}
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "80", "LINES": "24", "PYTHONPATH": str(ROOT)}
    environment.pop("NO_COLOR", None)
    environment |= {} if color else {"NO_COLOR": "1"}
    code = "import sys, pathlib; from ablab import rundir; from ablab.report import watch"
    code += "; watch.main(rundir.Campaign.open(pathlib.Path(sys.argv[1])))"
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(made.path)], stdin=theirs, stdout=theirs, stderr=theirs, env=environment
    )
    os.close(theirs)
    seen = b""
    while b"q leaves the view" not in seen:
        seen += os.read(ours, 65536)
    os.write(ours, b"q")
    while True:
        try:
            seen += os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
    assert child.wait(60) == 0 and (b"\x1b[36m" in seen) is color
    assert {p: p.stat().st_mtime_ns for p in made.path.rglob("*")} == before
    os.close(ours)


def test_an_edited_file_costs_its_own_page_alone(opened, tmp_path, capfd):
    made, broken = running(tmp_path), campaign.write(tmp_path, finals, name="broken", seeds=(1,))
    broken.journal.unlink()
    broken.journal.mkdir()
    found = serve.server(tmp_path, port=0)
    threading.Thread(target=found.serve_forever, daemon=True).start()
    try:
        status, _, body = ask(found)
        assert status == 200 and made.name.encode() in body and b"cannot be read" in body
        assert ask(found, "/c/broken/")[0] in (404, 500) and ask(found, f"/c/{made.name}/")[0] == 200
        assert "Traceback" not in capfd.readouterr().err
    finally:
        found.shutdown()
        found.server_close()


def test_more_watchers_than_there_are_threads_for_are_refused(opened, monkeypatch):
    monkeypatch.setattr(serve, "WATCHERS", 1)
    found = opened()
    first = http.client.HTTPConnection("127.0.0.1", found.server_address[1], timeout=60)
    first.request("GET", "/c/hostile/events", headers={"Host": f"127.0.0.1:{found.server_address[1]}"})
    assert first.getresponse().status == 200
    assert ask(found, "/c/hostile/events")[0] == 503 and ask(found, "/c/hostile/")[0] == 200
    first.close()


def test_a_connection_that_says_nothing_is_closed(opened, monkeypatch):
    monkeypatch.setattr(serve.Handler, "timeout", 0.2)
    with socket.create_connection(opened().server_address) as line:
        line.settimeout(60)
        line.sendall(b"GET / HTTP/1.1\r\n")
        assert line.recv(1) == b""
