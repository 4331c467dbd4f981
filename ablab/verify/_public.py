# SPDX-License-Identifier: MIT
"""Whether anybody can get a commit: it must be reachable from a branch or tag of the public repository."""

import hashlib
import os
import subprocess
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

PATIENCE_S = 600


class PublicError(ValueError):
    """The public repository cannot be read; the text says why."""


@contextmanager
def cloned(remote: str, schemes: Collection[str] = ("https",), *options: str) -> Iterator[Path]:
    """An anonymous clone in a folder that goes afterwards: no credentials, no prompt, no configuration of the user.

    Raises PublicError.  NOTE a commit that is fetched by its name proves nothing, since hosts serve commits of forks
    under the name of the original; what a clone brings is what branches and tags reach.
    """
    if not remote:
        raise PublicError("CONFIG_SYS_PUBLIC_REMOTE is empty: no public repository is named; set its https:// address")
    if remote.partition("://")[0] not in schemes or "@" in remote.partition("://")[2].partition("/")[0]:
        raise PublicError(
            f"{remote}: not an {' or '.join(schemes)}:// address without a user; give one that anybody can clone"
        )
    with tempfile.TemporaryDirectory(prefix="ablab-") as folder:
        path = Path(folder, "clone")
        git(Path(folder), schemes, "clone", "--quiet", *options, remote, str(path))
        yield path


def git(folder: Path, schemes: Collection[str], *words: str) -> str:
    """Output of git in a folder.  Raises PublicError."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("GIT_", "SSH_"))}
    env |= {"HOME": str(folder), "XDG_CONFIG_HOME": str(folder), "GIT_CONFIG_NOSYSTEM": "1", "GIT_TERMINAL_PROMPT": "0"}
    env |= {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_ASKPASS": "false", "GIT_ALLOW_PROTOCOL": ":".join(schemes)}
    options = ("credential.helper=", f"core.hooksPath={os.devnull}", "http.followRedirects=false")
    command = ["git", *(word for o in options for word in ("-c", o)), *words]
    try:
        done = subprocess.run(
            command, cwd=folder, env=env, capture_output=True, timeout=PATIENCE_S, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise PublicError(f"git {words[0]}: {error}") from error
    if done.returncode:
        text = done.stderr.decode(errors="replace").strip().splitlines()
        raise PublicError(f"git {words[0]}: {text[-1] if text else 'failed'}")
    return done.stdout.decode()


Sources = Mapping[str, Mapping[str, str]]
"""Commit -> module, or path -> SHA-256 of the source that ran."""


def unreachable(remote: str, ran: Sources, schemes: Collection[str] = ("https",)) -> dict[str, str]:
    """Commit -> why it is not public, or not what ran, for those that are not."""
    try:
        # history without trees: a few bytes a commit, and no branch is checked out
        with cloned(remote, schemes, "--bare", "--filter=tree:0") as path:
            known = set(git(path, schemes, "rev-list", "--branches", "--tags").split())
            odd = {c: _other(path, c, modules, schemes) for c, modules in ran.items() if c in known}
    except PublicError as error:
        return dict.fromkeys(ran, str(error))
    gone = {c: f"{c[:12]} is on no branch and under no tag of {remote}" for c in ran if c not in known}
    text = "is not the source that ran"  # git can be told to overlook a change, and a file that it ignores is no change
    return gone | {c: f"{' '.join(names[:4])} of {c[:12]} {text}" for c, names in odd.items() if names}


def _other(bare: Path, commit: str, modules: Mapping[str, str], schemes: Collection[str]) -> list[str]:
    """Modules whose source in a commit is not the one that ran."""
    tree = bare.with_name(commit)
    git(bare, schemes, "worktree", "add", "--quiet", "--detach", str(tree), commit)

    def is_there(module: str, sha: str) -> bool:
        place = tree.joinpath(*module.split("."))
        if "/" in module:
            return (tree / module).is_file() and hashlib.sha256((tree / module).read_bytes()).hexdigest() == sha
        path = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
        return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == sha

    return sorted(m for m, sha in modules.items() if not is_there(m, sha))
