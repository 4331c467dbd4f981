# SPDX-License-Identifier: MIT
"""Defconfigs load without a complaint, hold nothing but changes, say what they are for, and bind."""

from pathlib import Path

import pytest

from ablab import config, kconf, machine, plan

ROOT = Path(__file__).parents[2]
FILES = sorted(p for p in (ROOT / "defconfigs").iterdir())
LAPTOP = machine.Machine(cores=(0, 1), memory_bytes=1 << 34, cpu="cpu", devices=(), host="h", boot_id="b")


def findings(text, name="planted"):
    """What is wrong with the text of a defconfig."""
    lines = text.splitlines()
    head = [line for line in lines if line.startswith("# ") and "is not set" not in line]
    found = []
    if lines[:1] != ["# SPDX-License-Identifier: MIT"]:
        found.append("no SPDX line")
    if not lines[1:2] or not lines[1].startswith("# ") or lines[1] not in head:
        found.append("no purpose")
    found += [f"no {word}" for word in ("Hardware:", "Time:", "Result:") if word not in " ".join(head)]
    if any(len(line) > 120 or line != line.rstrip() for line in lines) or not text.endswith("\n"):
        found.append("bad form")
    try:
        settled = kconf.settle(kconf.load(), [kconf.lex(Path(name), text)])
    except kconf.ConfigError as error:
        return [*found, *error.errors]
    if settled.superseded:
        found.append("superseded requests")
    body = [line for line in lines if line not in head]
    if body != settled.minimal().splitlines():
        found.append("not minimal; make savedefconfig writes:\n" + settled.minimal())
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_a_defconfig_is_minimal_and_says_what_it_is_for(path):
    assert findings(path.read_text(), path.name) == []
    assert kconf.NAME.fullmatch(path.name)


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_a_defconfig_plans_and_binds(path):
    p = plan.expand([kconf.lex(path)], {}, LAPTOP)
    v = p.trials[0].values
    assert config.load(v).values == v
    assert p.base.superseded == () and p.name == (v["STUDY"] or path.name)
    if v["MODEL_GPT"]:
        assert v["MODEL_GPT_VOCAB"] >= (256 if v["DATA_TOKENIZER_BYTE"] else 50257)
        assert v["MODEL_GPT_EMBED"] % v["MODEL_GPT_HEADS"] == 0


@pytest.mark.parametrize(
    ("change", "finding"),
    [
        (("Hardware:", "On:"), "no Hardware:"),
        (("Result:", "Got:"), "no Result:"),
        (("# SPDX", "# DPSX"), "no SPDX line"),
        (("CONFIG_TRAIN_STEPS=50\n", "CONFIG_TRAIN_STEPS=50 \n"), "bad form"),
        (("CONFIG_TRAIN_STEPS=50\n", "CONFIG_TRAIN_SEED=1337\nCONFIG_TRAIN_STEPS=50\n"), "not minimal"),
        (
            ("CONFIG_TRAIN_STEPS=50\n", "CONFIG_TRAIN_EPOCHS=50\n"),
            "planted:14: error: CONFIG_TRAIN_EPOCHS=50: stayed",
        ),
    ],
)
def test_a_planted_finding_is_seen(change, finding):
    text = (ROOT / "defconfigs/tiny").read_text()
    assert change[0] in text
    assert any(f.startswith(finding) for f in findings(text.replace(*change)))
