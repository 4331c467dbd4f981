# SPDX-License-Identifier: MIT
"""Our settling and the C Kconfig of Debian's kconfig-frontends resolve every configuration alike."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from ablab import configure, kconf

ROOT = Path(__file__).parents[2]
FIXTURE = ROOT / "tests" / "fixtures" / "kconfig"
TREES = pytest.mark.parametrize(("root", "count"), [(ROOT, 200), (FIXTURE, 60)], ids=["project", "fixture"])
CONF = shutil.which("kconfig-conf")
pytestmark = pytest.mark.skipif(CONF is None, reason="no kconfig-conf: apt install kconfig-frontends")


class Conf:
    """The C tool on one tree; a call starts from a `.config` text and gives the CONFIG_ lines it made."""

    def __init__(self, root, folder):
        self.root, self.config, self.minimal = root, folder / ".config", folder / "minimal"

    def __call__(self, option, text="", seed=""):
        self.config.write_text(text)
        self.minimal.write_text("")
        command = [CONF, option.replace("MINIMAL", str(self.minimal)), "Kconfig"]
        given = {"srctree": str(self.root), "KCONFIG_CONFIG": str(self.config), "KCONFIG_SEED": seed}
        env = {k: v for k, v in {**os.environ, **given}.items() if v}
        done = subprocess.run(command, cwd=self.root, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return lines((self.minimal if "MINIMAL" in option else self.config).read_text())


def lines(text):
    return [line for line in text.splitlines() if "CONFIG_" in line]


@pytest.fixture
def conf(root, tmp_path):
    return Conf(root, tmp_path)


def agree(conf, settled):
    """Whether C reads our full and our minimal form as we do, and has the same minimal form."""
    full, minimal = settled.config(), settled.minimal()
    assert conf("--olddefconfig", full) == lines(full)
    assert conf("--olddefconfig", minimal) == lines(full)
    assert conf("--savedefconfig=MINIMAL", full) == lines(minimal)


@TREES
def test_all_no_yes_and_default_agree(root, count, conf):
    assert count
    for option in ("allyesconfig", "allnoconfig", "alldefconfig"):
        assert conf(f"--{option}") == lines(configure.fill(kconf.load(root), option).config())


@pytest.mark.parametrize("root", [ROOT])
def test_defconfigs_agree(root, conf):
    paths = [p for p in sorted((ROOT / "defconfigs").glob("*")) if p.is_file()]
    assert paths
    for path in paths:
        settled = kconf.settle(kconf.load(), [kconf.lex(path)])
        assert conf("--olddefconfig", path.read_text()) == lines(settled.config()), path.name
        agree(conf, settled)


@TREES
def test_own_random_configurations_agree(root, count, conf):
    tree, seen = kconf.load(root), set()
    for seed in range(count):
        settled = configure.fill(tree, "randconfig", str(seed))
        seen.add(settled.config())
        agree(conf, settled)
    assert len(seen) > count * 0.9


@TREES
def test_random_configurations_of_the_c_tool_agree(root, count, conf):
    tree, seen = kconf.load(root), set()
    for seed in range(1, count + 1):
        text = "\n".join(conf("--randconfig", seed=str(seed))) + "\n"
        seen.add(text)
        settled = kconf.settle(tree, [kconf.lex(Path(".config"), text)])
        full = conf("--olddefconfig", text)
        assert full == lines(settled.config())
        assert conf("--savedefconfig=MINIMAL", text) == lines(settled.minimal())
    assert len(seen) > count * 0.9


@pytest.mark.parametrize("root", [FIXTURE])
def test_a_difference_is_seen(root, conf):
    settled = kconf.settle(kconf.load(root), [])
    text = settled.config().replace("CONFIG_TRAIN_STEPS=100", "CONFIG_TRAIN_STEPS=101")
    assert conf("--olddefconfig", text) != lines(settled.config())
