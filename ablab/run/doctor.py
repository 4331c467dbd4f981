# SPDX-License-Identifier: MIT
"""`ablab doctor`: is this machine fit to run, and does the results folder keep what campaigns rely on?"""

import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

from ablab import machine, plugin, provenance

Row = tuple[str, bool | None, str]
"""What, whether it is good (None: for information), text."""
FREE_BYTES = 2 << 30  # less is too little for anything but the smallest trials
PROBE_S = 180
PROBE = """
import json, torch
found = {"torch": torch.__version__, "threads": torch.get_num_threads(), "devices": torch.cuda.device_count()}
device = "cuda" if found["devices"] else "cpu"
try:
    x = torch.randn(64, device=device)
    found["compile"] = bool(torch.allclose(torch.compile(lambda x: x.sin() * 2 + 1)(x), x.sin() * 2 + 1))
except Exception as error:
    found["compile"] = f"{type(error).__name__}: {error}".splitlines()[0]
from ablab.tensor import native
try:
    found["native"] = bool(native.ready())
except native.NativeError as error:
    found["native"] = str(error)
print(json.dumps(found))
"""
# the second process of the lock test: it must not get the lock that the first one holds
RIVAL = """
import fcntl, sys
try:
    fcntl.lockf(open(sys.argv[1], "ab"), fcntl.LOCK_EX | fcntl.LOCK_NB)
except OSError:
    sys.exit(7)
"""


def examine(results: Path) -> Iterator[Row]:
    """What is there and what is wrong, as it is found."""
    found = machine.inventory()
    software = provenance.software()
    yield "host", None, f"{found.cpu}, {len(found.cores)} cores, {found.memory_bytes / 2**30:.1f} GiB"
    yield "python", sys.version_info >= (3, 11), f"{software['python']}, kernel {software['kernel']}"
    gpus = [f"{d.name} {d.uuid} {d.memory_bytes / 2**30:.0f} GiB" for d in found.devices]
    yield "devices", None, "; ".join(gpus) or "no GPU: trials run on the CPU"
    for extra, missing in _missing().items():
        text = f"needs {' '.join(missing)}: pip install 'ablab[{extra}]'" if missing else "installed"
        yield f"extra {extra}", None, text
    yield from _folder(results)
    yield from _torch(len(found.devices))


def main(results: Path, form: str = "table") -> int:
    """Print the findings; returns 1 if one is bad."""
    rows = []
    for what, ok, text in examine(results):
        rows.append({"what": what, "ok": ok, "text": text})
        if form != "json":
            mark = {True: "ok", False: "BAD", None: "-"}[ok]
            print(f"{mark:4}{what:18} {text}", flush=True)
    if form == "json":
        print(json.dumps(rows, indent=1))
    return int(any(row["ok"] is False for row in rows))


def _torch(devices: int) -> list[Row]:
    """What a process that loads torch finds; it is never loaded here."""
    try:
        done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, timeout=PROBE_S)
    except subprocess.TimeoutExpired:
        return [("torch", False, f"no answer within {PROBE_S} s")]
    if done.returncode:
        return [("torch", False, (done.stderr.strip().splitlines() or ["does not load"])[-1])]
    found = json.loads(done.stdout.splitlines()[-1])
    rows = [("torch", True, f"{found['torch']}, {found['threads']} threads")]
    rows.append(("torch devices", found["devices"] >= devices, f"{found['devices']} of {devices} usable"))
    compiles = found["compile"] is True
    rows.append(("torch.compile", compiles or None, "works" if compiles else f"off: {found['compile']}"))
    native = found["native"]
    rows.append(("native kernels", native is True or None, "work" if native is True else f"off: {native}"))
    return rows


def _folder(results: Path) -> list[Row]:
    """POSIX locks, exclusive create, atomic rename, space; tried in a folder that is removed again."""
    tests: dict[str, Callable[[Path], bool]] = {
        "POSIX locks": _locks,
        "exclusive create": _exclusive,
        "atomic rename": _rename,
    }
    try:
        results.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=results, prefix=".doctor-") as name:
            rows = []
            for what, test in tests.items():
                ok = test(Path(name))
                rows.append((what, ok, "works" if ok else f"{results} cannot: choose another folder with O="))
    except OSError as error:
        return [("results", False, f"{results}: {error.strerror}; choose another folder with O=")]
    free = shutil.disk_usage(results).free
    return [*rows, ("disk", free >= FREE_BYTES, f"{free / 2**30:.1f} GiB free in {results}")]


def _locks(folder: Path) -> bool:
    path = folder / "lock"
    with open(path, "ab") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        held = subprocess.run([sys.executable, "-c", RIVAL, str(path)], capture_output=True).returncode
    free = subprocess.run([sys.executable, "-c", RIVAL, str(path)], capture_output=True).returncode
    return (held, free) == (7, 0)


def _exclusive(folder: Path) -> bool:
    (folder / "made").touch()
    try:
        os.close(os.open(folder / "made", os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError:
        return True
    return False


def _rename(folder: Path) -> bool:
    """The target never lacks, the open old file keeps its content."""
    (folder / "a").write_text("old")
    (folder / "b").write_text("fresh")
    with open(folder / "a") as before:
        os.replace(folder / "b", folder / "a")
        kept = before.read() == "old"
    return kept and (folder / "a").read_text() == "fresh" and not (folder / "b").exists()


def _missing() -> dict[str, list[str]]:
    """Extra -> its packages that are not installed."""
    found = {}
    for extra, requirements in plugin._extras().items():
        names = [re.split(r"[^A-Za-z0-9._-]", r, maxsplit=1)[0] for r in requirements]
        found[extra] = [n for n in names if not _installed(n)]
    return found


def _installed(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True
