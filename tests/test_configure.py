# SPDX-License-Identifier: MIT
"""configure: the verbs that write `.config`, where its values came from, and the make line."""

import contextlib
import importlib.util
import json
import os
import pty
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ablab import configure, kconf
from ablab.kconf import ConfigError

FIXTURE = Path(__file__).parent / "fixtures" / "kconfig"
SMALL = """# SPDX-License-Identifier: MIT
# A small run.
# Hardware: none. Time: 1 s. Result: 3.0.
CONFIG_OPT_LR="1e-3"
CONFIG_TRAIN_STEPS=50
"""
FRAGMENT = '# More rate.\nCONFIG_OPT_SGD=y\nCONFIG_OPT_LR="0.5"\n'
STUDY = """# Does it pay?
base  small + fast
seeds 2
[R0] Baseline
[R1] MLA
CONFIG_ATTN_MLA=y
"""


@pytest.fixture
def root(tmp_path):
    """A project: the fixture tree, two defconfigs and a study."""
    shutil.copytree(FIXTURE, tmp_path / "p")
    for name, text in {
        "defconfigs/small": SMALL,
        "defconfigs/fast": FRAGMENT,
        "studies/ra.study": STUDY,
    }.items():
        path = tmp_path / "p" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return tmp_path / "p"


def edit(root, old, new):
    text = (root / ".config").read_text()
    assert old in text
    (root / ".config").write_text(text.replace(old, new))


def view(root):
    spec = importlib.util.spec_from_file_location("config", root / "config.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.config


def files(root):
    return {p.name: p.read_text() for p in root.iterdir() if p.is_file()}


def asked(layers):
    return {r.name: (r.text, r.where) for layer in layers for r in layer.requests}


# loading


def test_defconfig_writes_the_files_and_their_origins(root):
    assert configure.defconfig(root, "small") == ".config is small"
    content = json.loads((root / ".config.origin").read_text())
    assert content["defconfig"] == "small"
    assert content["symbols"] == {
        "OPT_LR": {"layer": "defconfig", "file": "defconfigs/small", "line": 4, "text": '"1e-3"'},
        "TRAIN_STEPS": {"layer": "defconfig", "file": "defconfigs/small", "line": 5, "text": "50"},
    }
    assert not (root / ".config.old").exists()
    before = (root / ".config").read_text()
    configure.defconfig(root, "fast")
    assert (root / ".config.old").read_text() == before != (root / ".config").read_text()
    assert f"sha256 {configure.origin(root)['sha256']}" in (root / "config.py").read_text()


def test_fragments_act_left_to_right_and_say_what_they_undo(root):
    said = configure.defconfig(root, "small+fast")
    assert 'superseded: CONFIG_OPT_LR="1e-3" (defconfigs/small:4): "0.5" by defconfigs/fast:3' in said
    assert asked(configure.read(root)) == {
        "OPT_SGD": ("y", "defconfigs/fast:2"),
        "OPT_LR": ('"0.5"', "defconfigs/fast:3"),
        "TRAIN_STEPS": ("50", "defconfigs/small:5"),
    }
    configure.defconfig(root, "fast+small")
    assert asked(configure.read(root))["OPT_LR"] == ('"1e-3"', "defconfigs/small:4")


def test_a_study_loads_its_base_and_sets_study(root):
    configure.defconfig(root, "ra")
    found = asked(configure.read(root))
    assert found["STUDY"] == ('"ra"', "studies/ra.study") and found["OPT_LR"][0] == '"0.5"'
    assert "ATTN_MLA" not in found  # a step is no part of the base


def test_the_make_line_acts_on_a_loaded_defconfig(root):
    tree = kconf.load(root)
    configure.defconfig(root, "small", [configure.make_layer({"CONFIG_OPT_LR": "2e-3"}, tree)])
    assert asked(configure.read(root))["OPT_LR"] == ('"2e-3"', "make line")


@pytest.mark.parametrize("names", ["smal", "small+fats", "small+ra", "../p/defconfigs/small", "", "small+"])
def test_an_unknown_defconfig_lists_what_exists_and_writes_nothing(root, names):
    before = files(root)
    with pytest.raises(ConfigError, match=r"error: .*no such defconfig; nearest first: .*small"):
        configure.defconfig(root, names)
    assert files(root) == before


def test_a_defconfig_with_errors_writes_nothing(root):
    (root / "defconfigs" / "bad").write_text("CONFIG_OPT_LR = 1\nCONFIG_NOPE=y\n")
    before = files(root)
    with pytest.raises(ConfigError) as caught:
        configure.defconfig(root, "bad")
    assert [e.split(": error: ")[0] for e in caught.value.errors] == ["defconfigs/bad:1", "defconfigs/bad:2"]
    assert files(root) == before


def test_list_defconfigs_shows_the_comment_at_the_head(root):
    (root / "defconfigs" / "x~").write_text("")  # an editor's backup
    assert configure.list_defconfigs(root).splitlines() == [
        "fast   More rate.",
        "small  A small run.",
        "       Hardware: none. Time: 1 s. Result: 3.0.",
        "ra     Does it pay?",
    ]


# .config by hand


def test_edits_show_as_config(root):
    configure.defconfig(root, "small")
    edit(root, "CONFIG_TRAIN_STEPS=50", "CONFIG_TRAIN_STEPS=60")
    edit(root, "# CONFIG_TRAIN_TRACE is not set", "CONFIG_TRAIN_TRACE=y")
    found = asked(configure.read(root))
    lines = (root / ".config").read_text().splitlines()
    assert found == {
        "OPT_LR": ('"1e-3"', "defconfigs/small:4"),
        "TRAIN_STEPS": ("60", f".config:{lines.index('CONFIG_TRAIN_STEPS=60') + 1}"),
        "TRAIN_TRACE": ("y", f".config:{lines.index('CONFIG_TRAIN_TRACE=y') + 1}"),
    }


def test_read_gives_what_settles_to_the_same(root):
    configure.randconfig(root, "3")
    full = kconf.settle(kconf.load(root), [kconf.lex(Path(".config"), root=root)])
    assert kconf.settle(kconf.load(root), configure.read(root)).text == full.text


def test_no_config_says_how_to_make_one(root):
    with pytest.raises(ConfigError, match="make defconfig-NAME, NAME one of: fast small ra"):
        configure.read(root)


def test_a_damaged_origin_is_an_error_that_says_what_to_do(root):
    configure.defconfig(root, "small")
    (root / ".config.origin").write_text("{")
    with pytest.raises(ConfigError, match=r"\.config\.origin: error: not JSON as ablab writes it; delete it"):
        configure.read(root)


@pytest.mark.parametrize("text", ["{}", "[]", '{"defconfig": "", "symbols": []}'])
def test_an_origin_of_another_shape_is_an_error_too(root, text):
    configure.defconfig(root, "small")
    (root / ".config.origin").write_text(text)
    with pytest.raises(ConfigError, match="delete it"):
        configure.read(root)


def test_menuconfig_without_a_terminal_is_an_error(root):
    with pytest.raises(ConfigError, match="needs a terminal"):
        configure.menuconfig(root)


def test_menuconfig_edits_and_keeps_the_origins(root):
    configure.defconfig(root, "small")
    code = f"import pathlib, ablab.configure as c; print(c.menuconfig(pathlib.Path({str(root)!r})))"
    ours, theirs = pty.openpty()
    env = {**os.environ, "TERM": "xterm", "LINES": "40", "COLUMNS": "100", "PYTHONPATH": str(kconf.ROOT)}
    ends = {"stdin": theirs, "stdout": theirs, "stderr": theirs}
    with subprocess.Popen([sys.executable, "-c", code], env=env, start_new_session=True, **ends) as child:
        os.close(theirs)
        said = b""
        while b"(Top)" not in said:
            said += os.read(ours, 4096)
        os.write(ours, b"/TRAIN_SEED\n\n\x7f\x7f\x7f\x7f7\nqy")  # jump, open, erase 1337, 7, quit, save
        with contextlib.suppress(OSError):  # the terminal is gone when the child is
            while data := os.read(ours, 4096):
                said += data
        os.close(ours)
    assert child.returncode == 0 and b".config is changed" in said
    found = asked(configure.read(root))
    assert found["TRAIN_SEED"][0] == "7" and found["TRAIN_SEED"][1].startswith(".config:")
    assert found["OPT_LR"] == ('"1e-3"', "defconfigs/small:4")
    assert "CONFIG_TRAIN_SEED=1337" in (root / ".config.old").read_text()


# old, new, save, diff


def test_olddefconfig_gives_new_symbols_their_defaults_and_keeps_origins(root):
    configure.defconfig(root, "small")
    edit(root, "CONFIG_TRAIN_SEED=1337\n", "")
    assert configure.listnewconfig(root) == "CONFIG_TRAIN_SEED=1337"
    assert configure.olddefconfig(root) == "new: CONFIG_TRAIN_SEED=1337"
    assert configure.olddefconfig(root) == ".config is up to date" and configure.listnewconfig(root) == ""
    assert asked(configure.read(root))["OPT_LR"] == ('"1e-3"', "defconfigs/small:4")
    assert configure.origin(root)["defconfig"] == "small"


def test_olddefconfig_drops_only_when_told_to(root):
    configure.defconfig(root, "small+fast")
    edit(root, "CONFIG_OPT_SGD=y", "CONFIG_OPT_SGD=n\nCONFIG_OPT_GONE=y")
    edit(root, "# CONFIG_OPT_ADAMW is not set", "CONFIG_OPT_ADAMW=y\nCONFIG_ATTN_MLA_LATENT=64")
    before = files(root)
    with pytest.raises(ConfigError) as caught:
        configure.olddefconfig(root)
    assert len(caught.value.errors) == 3 and "DROP=1" in caught.value.errors[-1] and files(root) == before
    said = configure.olddefconfig(root, drop=True)
    dropped = {line.split()[1] for line in said.splitlines() if line.startswith("dropped")}
    assert dropped == {"CONFIG_OPT_GONE=y", "CONFIG_ATTN_MLA_LATENT=64"}
    assert set(asked(configure.read(root))) == {"OPT_LR", "TRAIN_STEPS"}


def test_olddefconfig_never_drops_a_line_of_bad_form(root):
    configure.defconfig(root, "small")
    edit(root, "CONFIG_TRAIN_STEPS=50", "CONFIG_TRAIN_STEPS= 50\nCONFIG_OPT_GONE=y")
    with pytest.raises(ConfigError, match="blank beside"):
        configure.olddefconfig(root, drop=True)


def test_savedefconfig_writes_the_minimal_form_below_a_header(root):
    configure.defconfig(root, "small")
    edit(root, "CONFIG_TRAIN_STEPS=50", "CONFIG_TRAIN_STEPS=60")
    make = configure.make_layer({"CONFIG_OPT_SHIFT": "-3", "MAX_ITERS_": "1"}, kconf.load(root))
    configure.savedefconfig(root, "mine", [make])
    head, body = (root / "defconfigs" / "mine").read_text().split("yet.\n")
    assert head.startswith("# SPDX-License-Identifier: MIT\n# mine: ") and "Hardware:" in head
    assert body == 'CONFIG_OPT_LR="1e-3"\nCONFIG_OPT_SHIFT=-3\nCONFIG_TRAIN_STEPS=60\n'


def test_savedefconfig_keeps_the_comment_and_is_stable(root):
    configure.defconfig(root, "small")
    configure.savedefconfig(root, "small")
    assert (root / "defconfigs" / "small").read_text() == SMALL


@pytest.mark.parametrize("name", ["", "../x", "A", "a/b", "a..b"])
def test_savedefconfig_refuses_a_name_that_could_leave_the_folder(root, name):
    configure.defconfig(root, "small")
    with pytest.raises(ConfigError, match="not a name"):
        configure.savedefconfig(root, name)


def test_savedefconfig_refuses_the_name_of_a_folder(root):
    configure.defconfig(root, "small")
    (root / "defconfigs" / "old").mkdir()
    with pytest.raises(ConfigError, match="is a folder; choose another name"):
        configure.savedefconfig(root, "old")


def test_diffconfig_is_the_fragment_from_the_loaded_defconfig(root):
    configure.defconfig(root, "small")
    assert configure.diffconfig(root) == ""
    edit(root, "CONFIG_TRAIN_STEPS=50", "CONFIG_TRAIN_STEPS=60")
    assert configure.diffconfig(root) == "CONFIG_TRAIN_STEPS=60"
    assert configure.diffconfig(root, "small", "small+fast") == 'CONFIG_OPT_SGD=y\nCONFIG_OPT_LR="0.5"'
    shutil.copy(root / ".config", root / "defconfigs" / "full")
    text = configure.diffconfig(root, "./.config", "small")
    assert text == "CONFIG_TRAIN_STEPS=50"


# all, random, why


def test_all_configs_set_every_bool_that_can_be_set(root):
    tree = kconf.load(root)
    for how, value in (("yes", "y"), ("no", "n")):
        configure.allconfig(root, how)
        text = kconf.settle(tree, configure.read(root)).text
        free = [n for n, i in tree.symbols.items() if i.kind == "bool" and i.prompt and not i.choice and n in text]
        assert {n for n in free if text[n] != value} <= {"TRAIN_AUTO"}  # its prompt hides under n
    configure.allconfig(root, "def")
    assert configure.read(root)[0].requests == ()


def test_randconfig_repeats_a_seed_and_prints_it(root):
    assert configure.randconfig(root, "7") == ".config is random: KCONFIG_SEED=7"
    first = (root / ".config").read_text()
    said = configure.randconfig(root)
    assert said.startswith(".config is random: KCONFIG_SEED=") and (root / ".config").read_text() != first
    configure.randconfig(root, "7")
    assert (root / ".config").read_text() == first


def test_random_configurations_settle_and_reach_every_symbol(root):
    tree = kconf.load(root)
    seen = {name: set() for name, info in tree.symbols.items() if info.prompt}
    for seed in range(120):
        text = configure.fill(tree, "randconfig", str(seed)).text
        for name in seen:
            seen[name].add(text.get(name))
    fixed = {n for n in seen if tree.symbols[n].type in ("text", "name") or tree.symbols[n].type.startswith("floats")}
    fixed |= {n for n in seen if tree.symbols[n].type.startswith("ints")}
    assert {n for n in seen if len(seen[n] - {None}) < 2} == fixed
    assert {"1", "1000000", "100"} < seen["TRAIN_STEPS"] and len(seen["TRAIN_STEPS"]) > 20
    assert '"0"' not in seen["OPT_LR"] and '"10"' not in seen["OPT_LR"]  # open end; 1 caps what has no scale


def test_why_explains_value_origin_and_dependencies(root):
    configure.defconfig(root, "small")
    assert configure.why(root, "OPT_LR") == (
        0,
        'CONFIG_OPT_LR="1e-3"  (defconfigs/small:4)\n  Peak learning rate, ablab/optim/Kconfig:43',
    )
    code, text = configure.why(root, "CONFIG_OPT_HAS_MOMENTS")
    assert code == 0 and "selected by OPT_ADAM (n), OPT_ADAMW (y)" in text


def test_why_names_the_changes_that_make_a_value_settable(root):
    code, text = configure.why(root, "PRUNE_STATE=y")
    assert code == 0
    assert text.splitlines() == [
        "CONFIG_PRUNE_STATE is not visible",
        "  state, ablab/prune/Kconfig:31",
        "  depends on OPT_CARRIES_PRUNER",
        "    OPT_CARRIES_PRUNER is n",
        "  PRUNE_STATE=y: stayed n; needs OPT_CARRIES_PRUNER, which is n (ablab/prune/Kconfig:31)",
        "  takes after:",
        "    CONFIG_OPT_ADAMWPRUNE=y",
    ]
    assert configure.why(root, "OPT_LR=1e-2")[1].endswith("OPT_LR=1e-2: can be set as it is")


def test_why_exits_1_if_nothing_helps_and_2_for_an_unknown_symbol(root):
    code, text = configure.why(root, "TRAIN_STEPS=0")
    assert code == 1 and "outside 1..1000000" in text
    with pytest.raises(ConfigError, match="no such symbol; nearest: CONFIG_OPT_LR"):
        configure.why(root, "OPT_LRR")


# config.py


def test_config_py_is_typed_and_read_only(root):
    configure.defconfig(root, "small")
    config = view(root)
    assert config.OPT_LR == 1e-3 and type(config.OPT_LR) is float
    assert config.TRAIN_STEPS == 50 and config.OPT_ADAMW is True and "OPT_LR" in dir(config)
    with pytest.raises(AttributeError, match="CONFIG_OPT_LRR does not stand"):
        assert config.OPT_LRR
    with pytest.raises(AttributeError, match="read-only"):
        config.OPT_LR = 1.0


def test_config_py_is_made_again_only_after_a_change(root):
    configure.defconfig(root, "small")
    assert not configure.refresh(root)
    edit(root, "CONFIG_TRAIN_STEPS=50", "CONFIG_TRAIN_STEPS=60")
    assert view(root).TRAIN_STEPS == 50
    assert configure.refresh(root) and view(root).TRAIN_STEPS == 60 and not configure.refresh(root)


def test_a_torn_config_py_is_made_again(root):
    configure.defconfig(root, "small")
    (root / "config.py").write_bytes(b"\xff\xfe")
    assert configure.refresh(root) and view(root).TRAIN_STEPS == 50


# the make line, the environment, precedence


@pytest.mark.parametrize(
    ("variables", "requests"),
    [
        ({"TIME": "90"}, {"TRAIN_BUDGET_TIME": "y", "TRAIN_TIME": "90"}),
        ({"TIME": "90s"}, {"TRAIN_BUDGET_TIME": "y", "TRAIN_TIME": "90"}),
        ({"TIME": "5m"}, {"TRAIN_BUDGET_TIME": "y", "TRAIN_TIME": "300"}),
        ({"TIME": "2h"}, {"TRAIN_BUDGET_TIME": "y", "TRAIN_TIME": "7200"}),
        ({"MAX_ITERS": "7"}, {"TRAIN_BUDGET_STEPS": "y", "TRAIN_STEPS": "7"}),
        ({"MAX_TOKENS": "7"}, {"TRAIN_BUDGET_TOKENS": "y", "TRAIN_TOKENS": "7"}),
        ({"EPOCHS": "7"}, {"TRAIN_BUDGET_EPOCHS": "y", "TRAIN_EPOCHS": "7"}),
        ({"TRACKER": "none"}, {"TRACK_WANDB": "n", "TRACK_TRACKIO": "n", "TRACK_TENSORBOARD": "n"}),
        ({"TRACKER": "wandb,trackio"}, {"TRACK_WANDB": "y", "TRACK_TRACKIO": "y", "TRACK_TENSORBOARD": "n"}),
        (
            {"TRACKER": "wandb:offline"},
            {
                "TRACK_WANDB": "y",
                "TRACK_WANDB_MODE_OFFLINE": "y",
                "TRACK_TRACKIO": "n",
                "TRACK_TENSORBOARD": "n",
            },
        ),
        ({"JOBS": "auto", "O": "/x y"}, {"STUDY_JOBS": "0", "STUDY_RESULTS": '"/x y"'}),
        ({"STEPS": "R0,R1", "KEEP_GOING": "n"}, {"STUDY_STEPS": '"R0,R1"', "STUDY_KEEP_GOING": "n"}),
        ({"CONFIG_OPT_LR": "1e-4"}, {"OPT_LR": '"1e-4"'}),
        ({"CONFIG_OPT_LR": '"1e-4"'}, {"OPT_LR": '"1e-4"'}),
        ({"CONFIG_TRAIN_LOG_STEPS": "5", "SEEDS": "3"}, {"TRAIN_LOG_STEPS": "5"}),
    ],
)
def test_make_variables_become_requests_that_settle(variables, requests):
    made = configure.make_layer(variables)
    assert {r.name: r.text for r in made.requests} == requests and {r.where for r in made.requests} == {"make line"}
    text = kconf.settle(kconf.load(), [made]).text
    assert {n: text[n] for n in requests} == requests


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"TIME": "2d"}, "TIME=2d: not a whole number of seconds"),
        ({"TIME": "0"}, "TIME=0: not a whole"),
        ({"TIME": "1h", "MAX_ITERS": "5"}, 'stayed n; choice "Budget" is TRAIN_BUDGET_TIME (make line)'),
        ({"MAX_ITERS": "1e3"}, "CONFIG_TRAIN_STEPS=1e3: not an int"),
        ({"EPOCHS": "0"}, "CONFIG_TRAIN_EPOCHS=0: outside 1..1000000"),
        ({"CONFIG_TRAIN_STEPS": "5 "}, "blank after the value"),
        ({"CONFIG_TRAIN_STEPS": "5 # x"}, "text after the value"),
        ({"CONFIG_TRAIN_STEPS": "5\nCONFIG_OPT_LR=1"}, "text after the value"),
        ({"CONFIG_NOPE": "1"}, "CONFIG_NOPE: no such symbol"),
        ({"MAX_ITERS": "5", "CONFIG_TRAIN_STEPS": "6"}, "CONFIG_TRAIN_STEPS: already set at make line"),
        ({"TRACKER": "nope"}, "TRACKER=nope: no tracker nope; trackers: none"),
    ],
)
def test_a_bad_make_variable_is_an_error(variables, says):
    with pytest.raises(ConfigError) as caught:
        kconf.settle(kconf.load(), [configure.make_layer(variables)])
    assert all(e.startswith("make line: error: ") for e in caught.value.errors) and says in str(caught.value)


def test_variables_of_a_target_are_checked_by_name():
    configure.check_variables({"TIME": "5", "CONFIG_OPT_LR": "1"}, ["TIME"])
    with pytest.raises(ConfigError) as caught:
        configure.check_variables({"MAXITERS": "5", "CONFIG_OPT_LR": "1"}, ["MAX_ITERS", "TIME"], symbols=False)
    assert caught.value.errors == (
        "make line: error: MAXITERS=5: no such variable; nearest: MAX_ITERS",
        "make line: error: CONFIG_OPT_LR=1: not for this target; it takes: MAX_ITERS TIME",
    )


def test_a_symbol_in_the_environment_is_an_error_unless_make_put_it_there():
    configure.check_environment({"CONFIG_OPT_LR": "1", "HOME": "/"}, {"CONFIG_OPT_LR": "1"})
    with pytest.raises(ConfigError) as caught:
        configure.check_environment({"CONFIG_B": "", "CONFIG_A": "1"}, [])
    assert [e.split()[2] for e in caught.value.errors] == ["CONFIG_A", "CONFIG_B"]
