# SPDX-License-Identifier: MIT
"""Starts the mirror process of a campaign, waits for it at the end, and says what it could not deliver.

The process is `ablab.track`: no tracker is loaded here, and none can reach the runner or a trial.
"""

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ablab import kconf, plugin
from ablab.kconf import ROOT
from ablab.report.table import Table
from ablab.rundir import Campaign, Mirror, RunError, checked

MODULE = "ablab.track"
PASSED = re.compile(
    r"PATH|HOME|LANG|LC_\w+|TZ|TMPDIR|PYTHON(PATH|HASHSEED|WARNINGS)|XDG_\w+|SSL_CERT_(FILE|DIR)|REQUESTS_CA_BUNDLE"
    r"|CURL_CA_BUNDLE|(HTTPS?|ALL|NO)_PROXY|(https?|all|no)_proxy"
    r"|NETRC|WANDB_(API_KEY|BASE_URL)|HF_(TOKEN|HOME|ENDPOINT)|HUGGING_FACE_HUB_TOKEN|TRACKIO_DIR"
)
"""Variables that the mirror gets; TRACKIO_SPACE_ID would publish what was meant to stay here."""
ON = re.compile("^CONFIG_TRACK_[A-Z0-9]+=y$", re.MULTILINE)
QUIET = ("online", "offline", "disabled")  # modes of W&B, each quieter than the one before
BUSY = 4  # exit code of a mirror that found another one at work
KILL_S = 5.0  # for the mirror to write down how far it is
TICK_S = 0.1
READY_S = 60.0


def environment(variables: Mapping[str, str]) -> dict[str, str]:
    """What the mirror process gets of the variables of a shell."""
    path = os.pathsep.join([str(ROOT), *filter(None, [variables.get("PYTHONPATH")])])
    kept = {k: v for k, v in variables.items() if PASSED.fullmatch(k)}
    return {**kept, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "ROCR_VISIBLE_DEVICES": ""}


def selected(text: str, variables: Mapping[str, str]) -> tuple[str, ...]:
    """Trackers that a configuration switches on, W&B with its mode; WANDB_MODE can only make it quieter."""
    if not ON.search(text):
        return ()
    values = _values(text)
    names = [s.removeprefix("TRACK_").lower() for s in plugin.selected("TRACK", values)]
    if "wandb" in names:
        chosen = "offline" if values["TRACK_WANDB_MODE_OFFLINE"] else "online"
        mode = max(chosen, variables.get("WANDB_MODE", chosen), key=lambda m: QUIET.index(m) if m in QUIET else 0)
        if mode != chosen:
            print(f"WANDB_MODE={mode} in the environment: W&B is {mode}", flush=True)
        names[names.index("wandb") : names.index("wandb") + 1] = {"online": ["wandb"], "disabled": []}.get(
            mode, ["wandb:offline"]
        )
    return tuple(names)


def _values(text: str) -> dict[str, Any]:
    return kconf.settle(kconf.load(), [kconf.lex(Path("config"), text)]).values


def ensure(names: Sequence[str], text: str, module: str = MODULE) -> None:
    """Raises RunError when a tracker is not installed or nobody is logged in."""
    if not names:
        return
    with tempfile.NamedTemporaryFile("w", suffix=".config") as file:
        file.write(text)
        file.flush()
        command = [sys.executable, "-m", module, "ready", file.name, *names]
        options = {"cwd": ROOT, "env": environment(os.environ), "capture_output": True, "text": True}
        try:
            done = subprocess.run(command, timeout=READY_S, **options)
        except subprocess.TimeoutExpired:
            raise RunError(
                f"TRACKER={','.join(names)}: not ready after {READY_S:.0f} s; TRACKER=none runs without"
            ) from None
    if done.returncode:
        said = (done.stdout if done.returncode == 2 else done.stderr).strip().splitlines() or ["no text"]
        raise RunError(f"{said[-1]}\nnothing was started; TRACKER=none runs without, ablab tracker sync mirrors later")


@contextmanager
def beside(campaign: Campaign, names: Sequence[str], interrupts: Sequence[int], module: str = MODULE) -> Iterator[None]:
    """Mirror a campaign while the body runs, then for TRACK_DEADLINE_S or until one more of `interrupts`."""
    if not names:
        yield
        return
    print(f"mirror      {' '.join(names)}; {campaign.mirror}", flush=True)
    with open(Mirror(campaign, "mirror").log, "ab") as log:
        process = _start(campaign, "follow", names, module, stdin=subprocess.PIPE, stdout=log, stderr=log)
    try:
        yield
    finally:
        process.stdin.close()  # it leaves at its own deadline; should it hang itself, ours is a little later
        deadline_s = _values(campaign.content["base"]["config"])["TRACK_DEADLINE_S"] + KILL_S
        end, before = time.monotonic() + deadline_s, len(interrupts)
        while process.poll() is None and time.monotonic() < end and len(interrupts) == before:
            time.sleep(TICK_S)
        _stop(process)
        for line in behind(campaign, names, process.returncode):
            print(line, flush=True)


def sync(campaign: Campaign, names: Sequence[str], fresh: bool = False, module: str = MODULE) -> int:
    """Deliver what trackers do not have yet, or with `fresh` all of it as further runs; 1 if something is left.

    Without `names` those that mirrored it, or that its configuration names.  Raises RunError for none, or one that is
    not ready.
    """
    config = campaign.content["base"]["config"]
    names = names or _known(campaign) or selected(config, os.environ)
    if not names:
        raise RunError(f"{campaign.name}: mirrored to no tracker; name one with TRACKER=")
    ensure(names, config, module)
    if fresh:
        _start(campaign, "fresh", names, module, stdin=subprocess.DEVNULL).wait()
    code = _start(campaign, "sync", names, module, stdin=subprocess.DEVNULL).wait()
    lines = behind(campaign, names, code)
    print("\n".join(lines) or f"{campaign.name}: {' '.join(names)}: every row is delivered", flush=True)
    return 1 if code or lines else 0


def _known(campaign: Campaign) -> list[str]:
    """Trackers that have files here; those of a mode are NAME-MODE."""
    return [files.name.replace("-", ":") for files in campaign.mirrors()]


def status(campaign: Campaign) -> Table:
    """How far each mirror of a campaign is."""
    columns = ("tracker", "state", "sent", "left", "recomputed", "error")
    rows = [[(files.state() or {}).get(c) for c in columns] for files in campaign.mirrors()]
    return Table(columns, tuple(tuple(row) for row in rows))


def other(do: str, target: str, results: Path, name: str, module: str = MODULE) -> int:
    """`test` a tracker or `import` a run, in a process as the mirror's; returns its exit code."""
    words = ["test", target] if do == "test" else ["import", str(results.resolve()), target, name]
    if do == "test" and symbol_of(target) not in plugin.members("TRACK"):
        known = " ".join(s.removeprefix("TRACK_").lower() for s in plugin.members("TRACK"))
        raise RunError(f"tracker test {target}: no such tracker; trackers: {known} wandb:offline")
    command = [sys.executable, "-m", module, *words]
    return subprocess.run(command, cwd=ROOT, env=environment(os.environ)).returncode


def symbol_of(name: str) -> str:
    return f"TRACK_{name.partition(':')[0].upper()}"


def _start(campaign: Campaign, verb: str, names: Sequence[str], module: str, **streams: Any) -> subprocess.Popen:
    command = [sys.executable, "-m", module, verb, str(campaign.path.resolve()), *names]
    env = environment(os.environ)
    return subprocess.Popen(command, cwd=ROOT, env=env, start_new_session=verb == "follow", **streams)


def _stop(process: subprocess.Popen) -> None:
    with suppress(ProcessLookupError):
        process.send_signal(signal.SIGTERM)
    try:
        process.wait(KILL_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def behind(campaign: Campaign, names: Sequence[str], code: int) -> list[str]:
    """A line for each tracker that lacks rows, and what to do; `code` is that of the mirror."""
    if code == BUSY:
        return [f"warning: another process mirrors {campaign.name}; ablab tracker status shows how far it is"]
    lines = []
    for name in names:
        files = Mirror(campaign, checked(name.replace(":", "-")))
        state = files.state() or {"state": "not begun", "left": "all", "error": None}
        if state["left"] or state["state"] != "synced":
            why = f" ({state['error']})" if state["error"] else ""
            lines.append(f"warning: {name}: {state['state']}, {state['left']} rows not delivered{why}; {files.log}")
    if code and not lines:  # it could not even write down how far it was
        lines.append(f"warning: the mirror ended with {code}; {Mirror(campaign, 'mirror').log}")
    if lines:
        lines.append(f"         ablab tracker sync {campaign.name} delivers them; the trials are not affected")
    return lines
