# SPDX-License-Identifier: MIT
"""Form of defconfigs, fragments and study bodies: the lexer of kconf, and a header with purpose and numbers.

    python scripts/check_defconfigs.py [FILE ..]      default: defconfigs/* and studies/*.study

Prints file:line: error: .. for each finding, exits 1 if there is one.  Whether a file settles and is minimal
the tests say; this looks at lines alone.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

from ablab import kconf, study

HEADER = ("Hardware:", "Time:", "Result:")


def body(path: Path) -> Iterator[str]:
    """Errors of the lines that set symbols."""
    if path.suffix == ".study":
        try:
            steps = study.read(path).steps
        except study.StudyError as error:
            yield str(error)
            return
        layers = [kconf.parse(f"step {s.id}", s.lines, kconf.place(path)) for s in steps]
    else:
        try:
            layers = [kconf.lex(path)]
        except kconf.ConfigError as error:
            yield str(error)
            return
    yield from (r.fault for layer in layers for r in layer.requests if r.fault)


def header(path: Path) -> Iterator[str]:
    """Errors of the comment at the head of a defconfig; that of a study is free."""
    lines = path.read_text("utf-8", "replace").splitlines()
    if not lines or lines[0] != "# SPDX-License-Identifier: MIT":
        yield f"{kconf.place(path)}:1: error: no SPDX line; write # SPDX-License-Identifier: MIT"
    comment = [line for line in lines[1:] if line.startswith("# ") and not kconf.UNSET.fullmatch(line)]
    if path.suffix != ".study":
        missing = [word for word in HEADER if not any(word in line for line in comment)]
        if missing or not comment:
            lacks = " ".join(missing) or "a purpose"
            yield f"{kconf.place(path)}:2: error: header lacks {lacks}; say purpose, Hardware: Time: Result:"


def main(arguments: list[str]) -> int:
    """Print the findings; 1 if there is one."""
    folders = (kconf.ROOT / "defconfigs").glob("*"), (kconf.ROOT / "studies").glob("*.study")
    paths = [Path(a).resolve() for a in arguments] or sorted(
        p for found in folders for p in found if p.is_file()
    )
    findings = [f for path in paths for check in (header, body) for f in check(path)]
    print("\n".join(findings), end="\n" if findings else "")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
