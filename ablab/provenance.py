# SPDX-License-Identifier: MIT
"""Where a result comes from: commit and patch, software versions, the variables that were set."""

import hashlib
import os
import platform
import re
import subprocess
import sys
from difflib import unified_diff
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("ablab", "Kconfig", "defconfigs", "studies")
"""What a trial is made of; an untracked file elsewhere does not make the tree dirty."""
PACKAGES = ("torch", "numpy", "safetensors", "kconfiglib")
SECRET = re.compile("KEY|TOKEN|SECRET|PASSW|CREDENTIAL|AUTH", re.IGNORECASE)
ALLOWED = re.compile(
    "(OMP|MKL|KMP|OPENBLAS|BLIS|NUMEXPR|GOMP)_.*|MALLOC_.*|(CUDA|ROCR|HIP|HSA|GPU|AMD)_.*"
    "|PYTORCH_.*|TORCH(INDUCTOR|DYNAMO)?_.*|TRITON_.*|(NCCL|RCCL|GLOO)_.*|CUBLAS_WORKSPACE_CONFIG|CUDNN_.*|NVIDIA_.*|PYTHONHASHSEED|KCONFIG_SEED"
    "|(WANDB|TRACKIO|TENSORBOARD)_MODE|(HF|TRANSFORMERS)_(HUB_)?OFFLINE|SLURM_(JOB_ID|ARRAY_.*|NNODES|NTASKS)"
    "|LD_PRELOAD|LANG|LC_ALL|TZ|ABLAB_.*"
)
EMPTY_TREE = "4b825dc642cb6eb9a060e54bf8d69288fbee4904"  # git's name for a tree without files


def code(root: Path | None = None) -> dict[str, Any]:
    """{commit, dirty, patch, tree}: the commit, whether anything differs from it, hashes of patch, sources.

    Without git, commit and patch are None and dirty is true: nothing shows the opposite.
    """
    root = root or ROOT
    commit, changed = _status(root)
    text = _patch(root, commit) if changed else b""
    return {
        "commit": commit,
        "dirty": changed or commit is None,
        "patch": hashlib.sha256(text).hexdigest() if text else None,
        "tree": tree(root),
    }


def tree(root: Path | None = None) -> str:
    """SHA-256 over name and content of Kconfig, ablab/**/*.py and ablab/**/Kconfig*, in sorted order."""
    root = root or ROOT
    found = [root / "Kconfig"]
    for folder, folders, names in os.walk(root / "ablab"):
        folders[:] = [f for f in folders if f != "__pycache__"]
        found += [Path(folder, n) for n in names if n.endswith(".py") or n.startswith("Kconfig")]
    digest = hashlib.sha256()
    for name, path in sorted((p.relative_to(root).as_posix(), p) for p in found if p.is_file()):
        digest.update(f"{name}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


def modules() -> dict[str, str]:
    """SHA-256 of the source of every ablab module that this process has loaded."""
    loaded = {name: getattr(m, "__file__", None) for name, m in sys.modules.items() if name.split(".")[0] == "ablab"}
    sources = {name: Path(file) for name, file in loaded.items() if file and name != "ablab.__main__"}
    return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in sorted(sources.items())}


def patch(root: Path | None = None) -> bytes:
    """What `git apply` needs to make this tree of the commit, untracked sources included; b'' without git."""
    root = root or ROOT
    return _patch(root, _status(root)[0])


def _patch(root: Path, commit: str | None) -> bytes:
    base = commit or EMPTY_TREE
    text = _git(
        root,
        "diff",
        "--binary",
        "--no-ext-diff",
        "--no-textconv",
        "--no-color",
        "--relative",
        base,
        "--",
        ".",
    )
    for name in _git(root, "ls-files", "-z", "--others", "--exclude-standard", "--", *SOURCES).split(b"\0"):
        if (root / name.decode()).is_file():
            text += _added(name.decode(), (root / name.decode()).read_bytes())
    return text


def _status(root: Path) -> tuple[str | None, bool]:
    """(commit, changed) in one call of git."""
    text = _git(root, "status", "--porcelain=v2", "--branch", "-z", "--untracked-files=all", "--", ".")
    commit, changed = None, False
    for line in text.decode(errors="replace").split("\0"):
        if line.startswith("# branch.oid ") and "(initial)" not in line:
            commit = line.split()[2]
        elif line.startswith("? "):
            changed |= line[2:].partition("/")[0] in SOURCES
        else:
            changed |= bool(line) and not line.startswith("#")
    return commit, changed


def _git(root: Path, *argv: str) -> bytes:
    """Output of git, b'' if it fails or `root` is no checkout; variables of a surrounding git are dropped."""
    if not (root / ".git").exists():
        return b""
    env = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
    options = ("-c", "core.fsmonitor=false", "-c", "core.quotepath=false")
    try:
        done = subprocess.run(
            ["git", *options, *argv],
            cwd=root,
            env={**env, "GIT_OPTIONAL_LOCKS": "0"},
            capture_output=True,
            check=True,
            timeout=60,
        )
    except (OSError, subprocess.SubprocessError):
        return b""
    return done.stdout


def _added(name: str, data: bytes) -> bytes:
    lines = data.decode(errors="surrogateescape").splitlines(keepends=True)
    body = "".join(unified_diff([], lines, "/dev/null", f"b/{name}"))
    if lines and not lines[-1].endswith("\n"):
        body += "\n\\ No newline at end of file\n"
    return f"diff --git a/{name} b/{name}\nnew file mode 100644\n{body}".encode(errors="surrogateescape")


def software() -> dict[str, Any]:
    """Versions of what a trial runs on, not imported: python torch cuda hip driver kernel packages lock.

    `lock` is the hash of everything installed.  A child replaces torch, cuda and hip by what it reads back.
    """
    found = {name: _version(name) for name in PACKAGES}
    return {
        "python": platform.python_version(),
        "torch": found["torch"] or "",
        "cuda": _torch_build("cuda"),
        "hip": _torch_build("hip"),
        "driver": _driver(),
        "kernel": platform.release(),
        "packages": {name: version for name, version in found.items() if version},
        "lock": _lock(),
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _torch_build(what: str) -> str | None:
    """CUDA or HIP version that torch was built for, from the text of its version.py."""
    for folder in sys.path:
        path = Path(folder, "torch", "version.py")
        if path.is_file():
            match = re.search(rf"^{what}\b.*?= *'([^']+)'", path.read_text(), re.MULTILINE)
            return match[1] if match else None
    return None


def _driver() -> str | None:
    nvidia, amd = Path("/proc/driver/nvidia/version"), Path("/sys/module/amdgpu/version")
    if nvidia.exists():
        match = re.search(r"\b\d{3,}\.\d+(?:\.\d+)?\b", nvidia.read_text())
        return match[0] if match else None
    return amd.read_text().strip() if amd.exists() else None


def _lock() -> str:
    """Hash of the names and versions of all installed packages, by the names of their metadata folders."""
    names = {p.name for folder in sys.path if folder for p in Path(folder).glob("*.dist-info")}
    return hashlib.sha256("\n".join(sorted(names)).encode()).hexdigest()


def environment(env: dict[str, str] | None = None) -> dict[str, str]:
    """Variables that can matter for a result, from an allow-list; none whose name looks like a secret."""
    source = dict(os.environ) if env is None else env
    return {k: v for k, v in sorted(source.items()) if ALLOWED.fullmatch(k) and not SECRET.search(k)}
