# SPDX-License-Identifier: MIT
"""native.cpp: built with the system's compiler on first use, kept for the user, and used where its bits are torch's.

A library is named by what it was made from and by its own content, and appears by a rename: processes that build at
once do not disturb each other, and a file that is not what its name says is built anew.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ablab.machine import COMPILERS

SOURCE = Path(__file__).with_suffix(".cpp")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-fPIC")
EXACT = "-ffp-contract=off"  # what native.cpp fuses it says; see there
LIMIT_S = 120  # of the compiler: it takes about 1 s
WAYS = 4  # rows of bins for each thread
ROW = 4096  # gradients in a row of `norms`


class NativeError(ValueError):
    """Why the compiled kernels cannot be used, and what to do."""


class Keep(NamedTuple):
    """A mask over part of a flat buffer."""

    held: Tensor
    """int8, 0 and -1, or uint8 with one bit an element."""
    start: int
    """Where it begins in the buffer."""
    size: int
    bits: bool


class Ranked(NamedTuple):
    """Scores, and what ranks them."""

    scores: Tensor
    """fp32, contiguous."""
    start: int
    """Where they begin in the buffer that the mask is over."""
    keep: Keep | None
    """What has a rank."""
    absolute: bool = False
    """Their sign does not count."""


class InForce:
    """The kernels of this process; `settle` changes them before a trial starts."""

    lib: ClassVar["Native | None"] = None
    name: ClassVar[str] = "torch"
    """`native`, or `torch` and why."""


def settle(allowed: bool, needed: bool = False) -> None:
    """Choose between native kernels and torch's.  Raises NativeError if they are needed and cannot be had."""
    InForce.lib, InForce.name = None, "torch"
    if not allowed:
        return
    try:
        InForce.lib = ready()
        InForce.name = "native"
    except NativeError as error:
        if needed:
            raise
        InForce.name = f"torch: {error}"
        print(f"no native kernels: {error}; results are the same, steps slower", flush=True)


def on(flat: Tensor) -> "Native | None":
    """The kernels for a tensor, None where torch's serve."""
    return InForce.lib if flat.dtype in (torch.float32, torch.int32) and flat.device.type == "cpu" else None


def folder() -> Path:
    """Where this user's libraries are kept."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if not os.path.isabs(base):  # no home
        base = f"{tempfile.gettempdir()}/cache-{os.getuid()}"
    return Path(base, "ablab", "native")


def ready(compilers: Sequence[str] = COMPILERS, where: Path | None = None, source: Path = SOURCE) -> "Native":
    """The kernels, built if they are not there yet, with bits compared.  Raises NativeError."""
    path = next((p for c in compilers if (p := shutil.which(c))), None)
    if path is None:
        raise NativeError(f"no C++ compiler among {' '.join(compilers)}; install one, or set CONFIG_SYS_NATIVE_OFF=y")
    try:
        found = Native(ctypes.CDLL(str(_library(path, where or folder(), source))))
        odd = found.odd()
    except (OSError, AttributeError) as error:
        raise NativeError(f"the library of {source.name} does not load: {error}") from None
    if odd:
        raise NativeError(f"not bit-equal to torch {torch.__version__} on this CPU: {' '.join(odd)}")
    return found


def _library(compiler: str, where: Path, source: Path) -> Path:
    """The library made by a compiler from a source for this CPU."""
    real, text = Path(compiler).resolve(), source.read_bytes()
    flags = (*FLAGS, EXACT)
    made_from = [text, str(real), real.stat().st_size, real.stat().st_mtime_ns, flags, platform.machine(), _cpu()]
    key = hashlib.sha256(repr(made_from).encode()).hexdigest()[:16]
    where.mkdir(parents=True, exist_ok=True, mode=0o700)
    if where.stat().st_uid != os.getuid() or where.stat().st_mode & 0o022:
        raise NativeError(f"{where} can be written by other users; remove it, or set XDG_CACHE_HOME")
    for path in where.glob(f"{key}-*.so"):
        if path.stem.endswith(_hash(path)):
            return path
        path.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(dir=where) as name:
        out, object_ = Path(name, "native.so"), Path(name, "native.o")
        # linked without OpenMP: its functions are those of the library that torch has loaded
        for command in ([compiler, *flags, "-c", str(source), "-o", str(object_)],
                        [compiler, "-shared", str(object_), "-o", str(out)]):  # fmt: skip
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)
            except (OSError, subprocess.TimeoutExpired) as error:
                raise NativeError(f"{compiler}: {error}; or set CONFIG_SYS_NATIVE_OFF=y") from None
            if done.returncode or not Path(command[-1]).exists():
                text = next((line for line in done.stderr.splitlines() if "error" in line), "no output")
                raise NativeError(f"{compiler} failed ({done.returncode}): {text}; or set CONFIG_SYS_NATIVE_OFF=y")
        path = where / f"{key}-{_hash(out)}.so"
        os.replace(out, path)
    return path


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _cpu() -> str:
    """What -march=native looks at."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


P, N, I, D = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_double  # noqa: E741
KEEP = (P, N, N, I)
RANKED = (N, P, I, *KEEP)
FUNCTIONS = {  # (arguments, result)
    "adam": ((N, P, P, P, P, P, *KEEP, P, P, P, D, D, D, D, D, I, I), None),
    "norms": ((N, N, P, *KEEP, P, I), None),
    "clip": ((N, P, P, *KEEP, D, D, I, I), N),
    "mask": ((N, P, *KEEP, I), None),
    "keys": ((*RANKED, P, I), None),
    "near": ((*RANKED, I, I, P, P, I), None),
    "count": ((N, P, N, P, I), None),
    "put": ((*RANKED, I, N, P, N, I), N),
    "zeros": ((N, P, I), N),
    "gone": ((*KEEP, I), N),
}


class Native:
    """The functions of the library over tensors, which must be contiguous."""

    def __init__(self, lib: ctypes.CDLL) -> None:
        self.call = {name: getattr(lib, f"ablab_{name}") for name in FUNCTIONS}
        for name, (arguments, result) in FUNCTIONS.items():
            self.call[name].argtypes, self.call[name].restype = arguments, result

    def adam(
        self,
        flats: Sequence[Tensor],
        at: int,
        keep: Keep | None,
        scalars: Sequence[Tensor | None],
        rate: Mapping[str, float],
        rule: Mapping[str, Any],
        original: bool,
    ) -> None:
        """torch's fused Adam(W) over (w, g, m, v[, x]) that begin at `at` of the arena; gradients are not written.

        `scalars` are the divisor of the gradients, the gate and the count, fp32.
        """
        pointers = [t.data_ptr() for t in flats] + [None] * (5 - len(flats))
        constants = rate["lr"], rate["weight_decay"], rule["beta1"], rule["beta2"], rule["eps"]
        rest = *map(_pointer, scalars), *constants, original, torch.get_num_threads()
        self.call["adam"](len(flats[0]), *pointers, *_keep(keep, at), *rest)

    def norms(self, grads: Tensor, keep: Keep | None) -> Tensor:
        """The norm of each row of ROW gradients under a mask."""
        out = grads.new_empty(len(grads) // ROW)
        self.call["norms"](len(out), ROW, grads.data_ptr(), *_keep(keep, 0), out.data_ptr(), torch.get_num_threads())
        return out

    def clip(self, g: Tensor, v: Tensor, at: int, keep: Keep | None, theta: float, margin: float, lab: bool) -> int:
        """SPAM's clip in place; how many gradients were clipped."""
        rest = theta, margin, lab, torch.get_num_threads()
        return self.call["clip"](len(g), g.data_ptr(), v.data_ptr(), *_keep(keep, at), *rest)

    def mask(self, flat: Tensor, at: int, keep: Keep) -> None:
        """Zero what goes."""
        self.call["mask"](len(flat), flat.data_ptr(), *_keep(keep, at), torch.get_num_threads())

    def keys(self, ranked: Ranked) -> Tensor:
        """int32 keys as in prune/_threshold.py."""
        out = torch.empty(ranked.scores.shape, dtype=torch.int32)
        self.call["keys"](*_ranked(ranked), out.data_ptr(), torch.get_num_threads())
        return out

    def near(self, ranked: Ranked, low: int, high: int) -> tuple[Tensor, int, int, int]:
        """Keys from `low` to `high`, and how many are below, have no rank, are of scores that are not finite."""
        out, found = torch.empty(ranked.scores.shape, dtype=torch.int32), (N * 4)()
        self.call["near"](*_ranked(ranked), low, high, out.data_ptr(), found, torch.get_num_threads())
        return out[: found[3]].clone(), *found[:3]

    def count(self, keys: Tensor, bins: Tensor, inside: int | None = None) -> None:
        """Add upper halves of keys to `bins`, WAYS rows of 2^16 int32 a thread, or lower ones inside an upper."""
        bin = -(1 << 16) if inside is None else inside
        self.call["count"](keys.numel(), keys.data_ptr(), bin, bins.data_ptr(), len(bins) // WAYS)

    def put(self, ranked: Ranked, key: int, ties: int, keep: Keep) -> int:
        """Set a mask: keys above `key` stay, and equal ones but for the first `ties`; how many are equal."""
        held, first, _, bits = _keep(keep, ranked.start)
        return self.call["put"](*_ranked(ranked), key, ties, held, first, bits)

    def zeros(self, flat: Tensor) -> int:
        """Zeros of either sign."""
        return self.call["zeros"](flat.numel(), flat.data_ptr(), torch.get_num_threads())

    def gone(self, keep: Keep) -> int:
        """Elements that a mask drops."""
        return self.call["gone"](*_keep(keep, keep.start), torch.get_num_threads())

    def odd(self) -> list[str]:
        """Functions whose bits are not those of torch here."""
        stream, n = torch.Generator().manual_seed(0), 2 * ROW
        draw = lambda size: torch.randn(n, generator=stream) * size * torch.randn(n, generator=stream).exp()
        w, g, m, v = draw(0.02), draw(1e-3), draw(1e-4), draw(1e-4).square()
        g[:64], m[:64], v[:64], v[64:128] = 0, 1e-41, 1e-41, 0
        held = torch.where(torch.arange(n) % 3 == 0, 0, -1).to(torch.int8)
        keep, masked = Keep(held, 0, n, False), (g.view(torch.int32) & held.int()).view(torch.float32)
        found, count, scale = torch.zeros(()), torch.tensor(3.0), torch.tensor(1.7)
        rate, rule = {"lr": 1e-3, "weight_decay": 0.1}, {"beta1": 0.9, "beta2": 0.95, "eps": 1e-8}
        same = {"norms": torch.equal(self.norms(g, keep), torch.linalg.vector_norm(masked.view(-1, ROW), dim=1))}
        for name, step in (("adam", torch._fused_adam_), ("adamw", torch._fused_adamw_)):
            for x, by in (([v * 1.01], scale), ([], None)):
                ours, theirs = ([t.clone() for t in (w, masked, m, v, *x)] for _ in range(2))
                lists = [[t] for t in theirs] + [[]] * (not x)
                flags = {"amsgrad": bool(x), "maximize": False, "grad_scale": by, "found_inf": found}
                step(*lists, [count], **rate, **rule, **flags)
                ours[1] = g
                self.adam(ours, 0, keep, (by, found, count), rate, rule, name == "adam")
                pairs = zip(ours[:1] + ours[2:], theirs[:1] + theirs[2:], strict=True)
                same[name] = same.get(name, True) and all(_equal(a, b) for a, b in pairs)
        return [name for name, is_same in same.items() if not is_same]


def _equal(a: Tensor, b: Tensor) -> bool:
    """The same bits."""
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


def _pointer(t: Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()


def _keep(keep: Keep | None, at: int) -> tuple[int | None, int, int, int]:
    """A mask as the library takes it, for a buffer that begins at `at` of the one that the mask is over."""
    return (None, 0, 0, 0) if keep is None else (keep.held.data_ptr(), at - keep.start, keep.size, int(keep.bits))


def _ranked(ranked: Ranked) -> tuple[int | None, ...]:
    scores, start, keep, absolute = ranked
    return len(scores), scores.data_ptr(), absolute, *_keep(keep, start)
