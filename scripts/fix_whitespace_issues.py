# SPDX-License-Identifier: MIT
"""Strip blanks at line ends and give text files one final newline.

    python scripts/fix_whitespace_issues.py [--check] [FILE ..]      default: the files git knows or would add

`--check` changes nothing.  Both print file:line for each finding; exit 1 if --check has one, else 0.
Works on bytes: encodings, carriage returns and modes stay as they are; links and files with a NUL byte are
left alone.
"""

import argparse
import re
import subprocess
import sys
from pathlib import Path

BLANKS = re.compile(rb"[ \t]+(?=\r?(?:\n|\Z))")
END = re.compile(rb"(?:\r?\n)+\Z")


def mended(data: bytes) -> bytes:
    """The content as it should be."""
    data = BLANKS.sub(b"", data)
    newline = b"\r\n" if b"\r\n" in data else b"\n"
    body = END.sub(b"", data)
    return body + newline if body else b""


def findings(data: bytes) -> list[tuple[int, str]]:
    """(line, what is wrong) of a file's content."""
    found = [(data[: m.start()].count(b"\n") + 1, "blanks at the end of the line") for m in BLANKS.finditer(data)]
    stripped = BLANKS.sub(b"", data)
    last = stripped.count(b"\n")
    if stripped and not stripped.endswith(b"\n"):
        found.append((last + 1, "no newline at the end of the file"))
    elif stripped != mended(data):
        found.append((last, "blank lines at the end of the file"))
    return found


def listed() -> list[Path]:
    """Files that git tracks or would add."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, capture_output=True, check=True).stdout.split(b"\0")
    return [Path(name.decode("utf-8", "surrogateescape")) for name in names if name]


def main(arguments: list[str]) -> int:
    """Report, and mend unless --check is given."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing, exit 1 on a finding")
    parser.add_argument("files", nargs="*", type=Path)
    options = parser.parse_args(arguments)
    dirty = False
    for path in options.files or listed():
        if path.is_symlink() or not path.is_file():
            continue
        data = path.read_bytes()
        if b"\0" in data:
            continue
        for line, what in findings(data):
            print(f"{str(path).encode('utf-8', 'replace').decode()}:{line}: {what}")
            dirty = True
        if not options.check and mended(data) != data:
            path.write_bytes(mended(data))
    return 1 if options.check and dirty else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
