# SPDX-License-Identifier: MIT
"""Children of this machine: forked from a server that has torch loaded, pinned to cores, leased a device.

NOTE the server stays at one thread and opens no device: a process forked from one that ran OpenMP hangs as
soon as it uses a second thread itself.
"""

import faulthandler
import fcntl
import importlib
import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import forkserver, resource_tracker
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

from ablab import machine, plugin
from ablab.kconf import ROOT

# dynamo: the first torch optimizer of a process imports it, one second; here it is paid once
PRELOAD = ("torch", "torch._dynamo", "ablab.train")
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
SERVER_DIED = 255  # what multiprocessing reports for a child when the server that would know is gone
CODE_S = 2.0  # how long the server may take to report the exit code of a process that is gone
VISIBLE = {"cuda": "CUDA_VISIBLE_DEVICES", "rocm": "ROCR_VISIBLE_DEVICES"}


class ChildError(ValueError):
    """The server of the children does not start or died."""


@dataclass(slots=True)
class Child:
    """A process with an attempt to run: started here, or found alive after its runner was killed."""

    pid: int
    start: int | None
    """Start time by the process table, which tells the process from a later one with its pid."""
    process: BaseProcess | None = None

    def alive(self) -> bool:
        return self.start is not None and machine.proc_start(self.pid) == self.start

    def code(self) -> int | None:
        """Exit code, negative for a signal; None while it runs and where nobody knows it."""
        return self.process.exitcode if self.process else None

    def cores(self) -> tuple[int, ...]:
        """Cores that it may use."""
        try:
            return tuple(sorted(os.sched_getaffinity(self.pid)))
        except ProcessLookupError:
            return ()

    def gone(self, wait_s: float = 0.0) -> bool:
        """True once it has ended; `wait_s` is how long to wait for that."""
        if self.process is not None:
            self.process.join(wait_s)
            if self.process.exitcode is None and not self.alive():
                self.process.join(CODE_S)
            if self.process.exitcode not in (None, SERVER_DIED):
                return True
            if self.process.exitcode == SERVER_DIED:
                self.process = None
        return not self.alive()

    def send(self, signum: int, group: bool = False) -> None:
        """Send a signal to the process, or to its whole session; nothing if it is gone."""
        if not self.alive():
            return
        with suppress(ProcessLookupError):  # it ended since, or has no session yet
            if group:
                os.killpg(self.pid, signum)
        with suppress(ProcessLookupError):
            os.kill(self.pid, signum)


class Server:
    """The forkserver, which loads `preload` first; for other modules another one is started."""

    loaded: ClassVar[list[str]] = []
    """Modules of the one server of this process."""

    def __init__(self, preload: Sequence[str] = PRELOAD) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._preload = [*preload, __name__, "ablab.run._warm"]

    def start(self) -> None:
        """Start the server unless it runs; does not wait until torch is loaded."""
        if Server.loaded not in ([], self._preload):
            _forget()
        Server.loaded = self._preload
        self._context.set_forkserver_preload(self._preload)
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        env = {"PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "1"}  # numpy would start threads as it loads
        with _environment(env), _silent():
            resource_tracker.ensure_running()  # first: it unblocks signals when it starts its process
            with _blocked(), _no_main():
                forkserver.ensure_running()

    def launch(
        self,
        target: str,
        argument: str,
        *,
        log: Path,
        stacks: Path | None = None,
        cores: Sequence[int] = (),
        env: Mapping[str, str] | None = None,
    ) -> Child:
        """Call `target`, "module:function", with one argument in a child; its return value is the exit code.

        The child has its own session, writes to `log`, dumps stacks to `stacks` on SIGUSR2, runs on `cores` and
        has the variables `env`.  It outlives us.  Raises ChildError when the server does not come up.
        """
        self.start()
        arguments = (target, argument, str(log), str(stacks or ""), tuple(cores), dict(env or {}))
        process = self._context.Process(target=_child, args=arguments, daemon=False)
        try:
            with _no_main():
                process.start()
        except (EOFError, ConnectionError) as error:
            raise ChildError(
                f"the process that starts trials died ({error!r}); see what is wrong with: "
                f"{sys.executable} -c 'import torch, ablab.train'"
            ) from error
        # we never join at exit: a child must be able to outlive its runner
        multiprocessing.process._children.discard(process)
        pid = process.pid or 0
        return Child(pid, machine.proc_start(pid), process)


def _child(target: str, argument: str, log: str, stacks: str, cores: tuple[int, ...], env: dict[str, str]) -> None:
    """First code of a child: session, streams, cores and devices are set before anything else runs."""
    os.setsid()
    fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    sys.stdout.reconfigure(line_buffering=True)
    if cores:
        os.sched_setaffinity(0, cores)
    os.environ.update(env)
    if stacks:
        file = os.open(stacks, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        faulthandler.register(signal.SIGUSR2, file=file, all_threads=True)
    for signum in STOPS:  # until the target has its own handlers there is nothing to save
        signal.signal(signum, _leave)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
    module, _, name = target.partition(":")
    code = getattr(importlib.import_module(module), name)(argument)
    sys.exit(code)


def _forget() -> None:
    """Leave the server to its children: it ends with the last of them, and the next launch starts another."""
    server = forkserver._forkserver
    os.close(server._forkserver_alive_fd)
    server._forkserver_pid = server._forkserver_address = server._forkserver_alive_fd = None


def _leave(signum: int, frame: Any) -> None:
    sys.exit(75)


def modules(configs: Iterable[str]) -> tuple[str, ...]:
    """Modules of the members that any of these texts switches on: children find them loaded."""
    on = {line[7:-2] for text in configs for line in text.splitlines() if line.endswith("=y")}
    found = ((family, symbol) for family in plugin.FAMILIES for symbol in plugin.members(family))
    names = (f"ablab.{plugin.FAMILIES[f]}.{s.removeprefix(f + '_').lower()}" for f, s in found if s in on)
    return tuple(names)


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def _silent() -> Iterator[None]:
    """Point our streams at nothing: a server that held our pipes would keep `make | tee` waiting for it."""
    kept = [(fd, os.dup(fd)) for fd in (1, 2)]
    null = os.open(os.devnull, os.O_WRONLY)
    try:
        for fd, _ in kept:
            os.dup2(null, fd)
        yield
    finally:
        for fd, copy in kept:
            os.dup2(copy, fd)
            os.close(copy)
        os.close(null)


@contextmanager
def _no_main() -> Iterator[None]:
    """Hide our main module: multiprocessing would run it again in every child."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


@contextmanager
def _blocked() -> Iterator[None]:
    """Block the stop signals: the server inherits the mask, so that a ^C for the runner does not end it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def core_sets(cores: Sequence[int], jobs: int) -> tuple[tuple[int, ...], ...]:
    """`jobs` disjoint sets of neighbouring cores of equal size; with more jobs than cores they take turns."""
    each = max(1, len(cores) // jobs)
    return tuple(tuple(cores[(job * each + i) % len(cores)] for i in range(each)) for job in range(jobs))


def lock_folder() -> Path:
    """Where device leases lie: one folder for each user, the same for all campaigns of the host.

    Raises ChildError if somebody else owns it or could write to it.
    """
    # not $TMPDIR nor $XDG_RUNTIME_DIR: two logins, or a batch job and a shell, would not see each other
    folder = Path("/tmp") / f"ablab-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    facts = folder.lstat()
    if facts.st_uid != os.getuid() or facts.st_mode & 0o077 or folder.is_symlink():
        raise ChildError(f"{folder}: must be a folder of yours with mode 700; move it away")
    return folder


class DeviceLease:
    """One device, ours until released: a locked file that names the child which uses the device.

    The lock ends with the runner, the name outlives it: a device is free when both say so.
    """

    def __init__(self, device: machine.Device, fd: int) -> None:
        self.device, self._fd = device, fd

    @property
    def env(self) -> dict[str, str]:
        return {VISIBLE[self.device.kind]: self.device.uuid}

    def name(self, child: Child, text: str) -> None:
        """Write down who uses the device."""
        record = {"pid": child.pid, "start": child.start, "text": text}
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, json.dumps(record).encode(), 0)

    def release(self) -> None:
        os.ftruncate(self._fd, 0)
        os.close(self._fd)


def lease(devices: Sequence[machine.Device], folder: Path, need_bytes: int = 0) -> tuple[DeviceLease | None, list[str]]:
    """The first device that nobody leases and that has `need_bytes` free, and why the others are not it."""
    reasons = []
    for device in devices:
        fd = os.open(folder / f"{device.uuid}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        why = _holder(fd)
        if why is None and need_bytes and (free := free_bytes(device)) is not None and free < need_bytes:
            why = f"{free >> 20} MiB free, {need_bytes >> 20} needed"
        if why is None:
            return DeviceLease(device, fd), reasons
        reasons.append(f"{device.name} {device.uuid}: {why}")
        os.close(fd)
    return None, reasons


def _holder(fd: int) -> str | None:
    """Who holds a lock file that is open here; None if we do now."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        locked = True
    except BlockingIOError:
        locked = False
    text = os.pread(fd, 4096, 0).decode()
    record = json.loads(text) if text.endswith("}") else None
    if locked and not (record and Child(record["pid"], record["start"]).alive()):
        return None
    return record["text"] if record else "being leased"


def free_bytes(device: machine.Device) -> int | None:
    """Free memory of a device, whoever uses the rest; None where no tool tells."""
    if device.kind != "cuda":
        return None
    query = ["nvidia-smi", f"--id={device.uuid}", "--query-gpu=memory.free", "--format=csv,noheader,nounits"]
    text = machine.command(query).strip()
    return int(text) << 20 if text.isdecimal() else None


def oom_kills() -> int:
    """Processes of our control group that the kernel killed for memory so far; 0 where nobody counts."""
    groups = [line[3:] for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::")]
    for group in (*groups, "/"):
        path = Path("/sys/fs/cgroup") / group.lstrip("/") / "memory.events"
        if path.exists():
            return int(dict(row.split() for row in path.read_text().splitlines())["oom_kill"])
    return 0
