# SPDX-License-Identifier: MIT
"""`make style`: black, ruff, whitespace and the form of defconfigs and studies; any finding fails."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
CODE = ("ablab", "tests", "scripts", "benchmarks")


def main() -> int:
    """Run every check, so that all findings show at once; 0 if none finds anything, else 1."""
    checks = (
        ("black", "-m", "black", "--quiet", "--check", "--diff", *CODE),
        ("ruff", "-m", "ruff", "check", "--no-cache", "--quiet", *CODE),
        ("whitespace", "scripts/fix_whitespace_issues.py", "--check"),
        ("defconfigs", "scripts/check_defconfigs.py"),
    )
    failed = [name for name, *rest in checks if subprocess.run([sys.executable, *rest], cwd=ROOT).returncode]
    print(f"style: {'failed: ' + ' '.join(failed) if failed else 'clean'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
