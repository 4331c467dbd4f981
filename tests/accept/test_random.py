# SPDX-License-Identifier: MIT
"""Two hundred random configurations: each plans and passes the dry run, or is refused with a reason."""

import json
import os
import re
import traceback
from pathlib import Path

import pytest

from ablab import check, configure, kconf, machine, plan
from ablab.run import chance

HERE = machine.Machine(cores=(0,), memory_bytes=1 << 34, cpu="test", devices=(), host="test", boot_id="test")
PLACE = re.compile(r"^[\w. /-]+(:\d+)?: (error: )?\w+|CONFIG_")


def checked(todo: plan.Plan, folder: Path) -> tuple[int, str]:
    """Dry-run a plan in a forked process; its exit code and what it printed."""
    folder.mkdir()
    (folder / "plan.json").write_text(json.dumps({**plan.as_json(todo), "mode": "check"}))
    out = os.open(folder / "out", os.O_WRONLY | os.O_CREAT)
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            os.dup2(out, 1)
            os.dup2(out, 2)
            # pytest's stdout would swallow it
            check.print = lambda *a, sep=" ", end="\n": os.write(1, (sep.join(map(str, a)) + end).encode())
            code = check.main(str(folder))
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(out)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return code, (folder / "out").read_text()


@pytest.mark.slow
def test_random_configurations_run_or_are_refused_with_a_reason(tmp_path):
    tree = kconf.load()
    ran, refused = 0, 0
    for seed in range(200):
        try:
            if seed % 2:  # keeps the rules across symbols, which chance rarely meets
                made, why = chance.plans(1, seed, HERE, tmp_path / "data")
                if why:
                    raise ValueError(why[seed])
                todo = made[0]
            else:
                text = configure.fill(tree, "randconfig", str(seed)).config()
                text = re.sub(r'(CONFIG_DATA_DIR)=".*"', rf'\1="{tmp_path}/data"', text)
                text = re.sub(r"(CONFIG_DATA_SYNTH_TOKENS)=.*", r"\1=40000", text)
                todo = plan.expand([kconf.lex(Path(".config"), text, ".config")], {}, HERE, name=f"random-{seed}")
        except ValueError as error:
            assert all(PLACE.search(line) for line in str(error).splitlines()), f"seed {seed}: {error}"
            refused += 1
            continue
        code, out = checked(todo, tmp_path / str(seed))
        assert code in (0, 1, 2), f"seed {seed}: {out}"
        if code:
            # data that has to be fetched, a text that has no path, a rule across symbols: said in words
            assert "failed in stage" in out and "Traceback" not in out, f"seed {seed}: {out}"
            refused += 1
        else:
            assert "pass" in out
            ran += 1
    assert ran >= 20 and refused >= 30, (ran, refused)
