#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Form of commit messages: subject `file.py: what` in 70 columns, a blank line, a body, no refused footer.

    check_commit_msg.py FILE                 as .git/hooks/commit-msg
    check_commit_msg.py --range A..B         every commit of a range, merges left out

A trailer is required only if asked for: `--trailer NAME` or `git config --add ablab.trailer NAME`.
Prints each finding; exit 1 if there is one.
"""

import argparse
import re
import subprocess
import sys
from pathlib import Path

WIDTH = 70
SUBJECT = re.compile(r"[\w./{},*+-]+: \S.*")
# footers that advertise a tool or name somebody else, and the word that says nothing
REFUSED = re.compile(r"(?m)^\W*((?i:co-authored-by|change-id):|Generated (with|by)\b).*")
TRAILER = re.compile(r"[A-Z][a-z]+(-[a-z]+)+: .*")
BANNED = re.compile(r"(?i)\bcomprehens\w*")
SCISSORS = re.compile(r"(?ms)^# -+ >8 -+$.*")


def findings(message: str, trailers: tuple[str, ...] = ()) -> list[str]:
    """What is wrong with a message; comment lines are already gone."""
    lines = message.strip("\n").split("\n")
    subject, body = lines[0], [line for line in lines[2:] if line.strip()]
    found = []
    if not SUBJECT.fullmatch(subject):
        found.append(f"subject '{subject}': write 'file.py: what', the file or area first")
    if subject.endswith("."):
        found.append("subject: no period at the end")
    if len(lines) > 1 and lines[1].strip():
        found.append("line 2: leave it blank, the body starts at line 3")
    if not [line for line in body if not TRAILER.fullmatch(line)]:
        found.append("no body: say what changed, why, and what it costs or gains")
    for number, line in enumerate(lines, 1):
        if len(line) > WIDTH and (number == 1 or " " in line.strip()):  # a URL cannot be wrapped
            found.append(f"line {number}: {len(line)} columns, at most {WIDTH}")
    for name in trailers:
        if not any(line.startswith(f"{name}: ") for line in body):
            found.append(f"no trailer {name}: add one")
    found += [f"refused footer '{m[0].strip()}': delete it" for m in REFUSED.finditer(message)]
    found += [f"'{m[0]}': use a word that says something" for m in BANNED.finditer(message)]
    if not message.isascii():
        found.append("not ASCII: no emoji, plain quotes and dashes")
    return found


def git(*arguments: str) -> str:
    """What git prints.  Raises SystemExit with its error text."""
    done = subprocess.run(["git", *arguments], capture_output=True, text=True)
    if done.stderr:
        raise SystemExit(f"error: git {arguments[0]}: {done.stderr.strip()}")
    return done.stdout


def main(arguments: list[str]) -> int:
    """Print the findings of a file or of a range; 1 if there is one."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("file", nargs="?", type=Path)
    parser.add_argument("--range", help="commits A..B instead of a file")
    parser.add_argument("--trailer", action="append", help="each message must have it; may be repeated")
    options = parser.parse_args(arguments)
    if (options.file is None) == (options.range is None):
        parser.error("give a file or --range")
    trailers = tuple(options.trailer or git("config", "--get-all", "ablab.trailer").split())
    if options.file:
        text = SCISSORS.sub("", options.file.read_text("utf-8"))
        texts = {options.file.name: "\n".join(line for line in text.split("\n") if not line.startswith("#"))}
    else:
        hashes = git("rev-list", "--no-merges", "--reverse", options.range).split()
        texts = {h[:12]: git("log", "-1", "--format=%B", h) for h in hashes}
    lines = [f"{name}: {finding}" for name, text in texts.items() for finding in findings(text, trailers)]
    print("\n".join(lines), end="\n" if lines else "")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
