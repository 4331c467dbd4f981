# SPDX-License-Identifier: MIT
"""Scenario 2: `1e-4`, `-5`, `0x10`, `"a # b"`, `y` are typed right in bound config, `config.py`, manifest, report."""

import importlib.util
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from ablab import configure, kconf, report
from ablab.bind import BindError, bind
from ablab.config import create
from tests import trial as tiny

FIXTURE = Path(__file__).parents[1] / "fixtures" / "kconfig"
LINES = """CONFIG_OPT_LR="1e-4"
CONFIG_OPT_SHIFT=-5
CONFIG_OPT_NOTE="a # b"
CONFIG_ATTN_LENS=y
CONFIG_ATTN_LENS_MASK=0x10
"""
WANTED = {"OPT_LR": 0.0001, "OPT_SHIFT": -5, "OPT_NOTE": "a # b", "ATTN_LENS": True, "ATTN_LENS_MASK": 16}


@dataclass(frozen=True, slots=True, kw_only=True)
class Optim:
    lr: float
    shift: int
    note: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Lens:
    name: bool
    mask: int
    dims: tuple
    rates: tuple


def same(got, want):
    return got == want and type(got) is type(want)


@pytest.fixture
def settled():
    return kconf.settle(kconf.load(FIXTURE), [kconf.lex(Path("F"), LINES)])


def test_bound_config_is_typed(settled):
    optim, lens = bind(Optim, "OPT", settled.values), bind(Lens, "ATTN_LENS", settled.values)
    got = {"OPT_LR": optim.lr, "OPT_SHIFT": optim.shift, "OPT_NOTE": optim.note}
    got |= {"ATTN_LENS": lens.name, "ATTN_LENS_MASK": lens.mask}
    assert all(same(got[name], WANTED[name]) for name in WANTED)
    assert lens.dims == (8, 16) and lens.rates == (0.5,)


def test_the_typed_value_of_the_projects_own_rate_reaches_its_member():
    values = kconf.settle(kconf.load(), [kconf.lex(Path("F"), 'CONFIG_OPT_LR="1e-4"\n')]).values
    (optim,) = create("OPT", values)
    assert same(optim.section.lr, 0.0001)


def test_a_bool_or_a_string_never_passes_for_a_number(settled):
    for wrong in (True, "0.0001", 1):
        with pytest.raises(BindError, match="CONFIG_OPT_LR"):
            bind(Optim, "OPT", settled.values | {"OPT_LR": wrong})


def test_config_py_is_typed(tmp_path):
    shutil.copytree(FIXTURE, tmp_path, dirs_exist_ok=True)
    (tmp_path / "defconfigs").mkdir()
    (tmp_path / "defconfigs" / "a").write_text(LINES)
    configure.defconfig(tmp_path, "a")
    spec = importlib.util.spec_from_file_location("config", tmp_path / "config.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert all(same(getattr(module.config, name), value) for name, value in WANTED.items())
    with pytest.raises(AttributeError):
        assert module.config.NOPE


def test_manifest_and_report_keep_type_and_text(tmp_path):
    place = tmp_path / "a # b"
    place.mkdir()
    (place / "text.txt").write_text("To be, or not to be, that is the question.\n" * 400)
    lines = ["DATA_TEXT=y", f'DATA_TEXT_PATH="{place}"', 'OPT_LR="1e-4"', "MODEL_GPT_BIAS=y"]
    trial = tiny.campaign(tmp_path, "".join(f"CONFIG_{line}\n" for line in lines))
    attempt = tiny.claim(trial)
    assert tiny.forked(attempt) == 0, attempt.log.read_text()
    assert tiny.ended(trial, attempt) == "done"
    config = trial.manifest()["config"]
    assert same(config["OPT_LR"]["value"], 0.0001) and config["OPT_LR"]["text"] == '"1e-4"'
    assert same(config["MODEL_GPT_BIAS"]["value"], True)
    assert config["DATA_TEXT_PATH"]["value"] == str(place)
    page = report.build(trial.campaign)
    base = (page.parent / "base.config").read_text()
    assert 'CONFIG_OPT_LR="1e-4"\n' in base and f'CONFIG_DATA_TEXT_PATH="{place}"\n' in base
