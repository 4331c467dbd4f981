# SPDX-License-Identifier: MIT
"""kconf: what a line may say, what a symbol may be, and that what was asked is what is set."""

import gc
import hashlib
import itertools
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ablab import configure, kconf, plan
from ablab.kconf import ConfigError, Layer, Request
from ablab.machine import Machine

FIXTURE = Path(__file__).parent / "fixtures" / "kconfig"
GOLDEN = Path(__file__).parent / "golden" / "errors.txt"
BAD = """CONFIG_OPT_LR="1e-4"
CONFIG_OPT_ADAMW=y
CONFIG_OPT_LR = "1e-4"
CONFIG_EVAL_INTERVAL=100 # often
CONFIG_TRAIN_BATCH_MICR=8
CONFIG_TRAIN_STEPS=1e4
CONFIG_ATTN_MLA_LATENT=4096
CONFIG_PRUNE_STATE=y
CONFIG_OPT_SGD=y
CONFIG_OPT_LR="2e-4"
CONFIG_OPT_HAS_MOMENTS=y
export CONFIG_A=5
CONFIG_ATTN_MLA=y
"""


@pytest.fixture
def tree():
    return kconf.load(FIXTURE)


def layer(*lines, name="defconfig", file="F"):
    return kconf.parse(name, enumerate(lines, 1), file)


def settled(*layers):
    return kconf.settle(kconf.load(FIXTURE), layers)


def errors(*lines, name="defconfig"):
    with pytest.raises(ConfigError) as caught:
        settled(layer(*lines, name=name))
    return caught.value.errors


def small(tmp_path, text):
    (tmp_path / "Kconfig").write_text(text)
    return kconf.load(tmp_path)


# error texts


@pytest.fixture
def swept(tmp_path):
    """The project's own tree beside a study that sweeps the learning rate, and a request for that study."""
    for path in [kconf.ROOT / "Kconfig", *(kconf.ROOT / "ablab").rglob("Kconfig*")]:
        copy = tmp_path / path.relative_to(kconf.ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(path.read_text())
    for name, text in {"defconfigs/a": "", "studies/lr.study": "base a\nsweep OPT_LR = 1e-4 3e-4\n"}.items():
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(text)
    return kconf.load(tmp_path), [layer('CONFIG_STUDY="lr"')]


def test_error_texts_golden(tree, swept):
    on = Machine(cores=(0,), memory_bytes=2**30, cpu="cpu", devices=(), host="host", boot_id="boot")
    said = []
    for call in (
        lambda: kconf.settle(tree, [kconf.lex(Path("F"), BAD)]),
        lambda: configure.check_variables({"BATCH": "4", "TIME": "1h"}, ["TIME", "JOBS"], tree=tree),
        lambda: plan.expand(swept[1], {"CONFIG_OPT_LR": "2e-4"}, on, swept[0]),
        lambda: configure.check_environment({"CONFIG_OPT_LR": "1", "PATH": ""}, []),
    ):
        with pytest.raises(ValueError) as caught:
            call()
        said += str(caught.value).splitlines()
    if os.environ.get("ABLAB_GOLDEN") == "write":
        GOLDEN.write_text("\n".join(said) + "\n")
    assert said == GOLDEN.read_text().splitlines()


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("CONFIG_TRAIN_STEPS= 5", "blank beside '='; write CONFIG_TRAIN_STEPS=5"),
        ("CONFIG_TRAIN_STEPS =5", "blank beside '='; write CONFIG_TRAIN_STEPS=5"),
        ("CONFIG_TRAIN_STEPS=5 ", "blank after the value; write CONFIG_TRAIN_STEPS=5"),
        ("CONFIG_TRAIN_STEPS=\t5", "blank beside '='"),
        ("CONFIG_OPT_NOTE='a' # b", "text after the value"),
        ('CONFIG_OPT_NOTE="a" # b', "text after the value"),
        ('CONFIG_OPT_NOTE="a"b', "text after the value"),
        ("CONFIG_TRAIN_TRACE=y # why", "text after the value"),
        ("CONFIG_TRAIN_TRACE=y#why", "text after the value"),
        ('CONFIG_OPT_NOTE="a', "string without its end"),
        ('CONFIG_OPT_NOTE="a\\n"', "string without its end, or an escape"),
        ("CONFIG_TRAIN_STEPS=", "no value"),
        (" CONFIG_TRAIN_STEPS=5", "expected CONFIG_NAME=value"),
        (" # a comment", "expected CONFIG_NAME=value"),
        ("TRAIN_STEPS=5", "expected CONFIG_NAME=value"),
        ("#CONFIG_TRAIN_TRACE is not set", "expected CONFIG_NAME=value"),
        ("# CONFIG_TRAIN_TRACE is  not set", "expected CONFIG_NAME=value"),
        ("# CONFIG_TRAIN_TRACE is not set # x", "expected CONFIG_NAME=value"),
        ("CONFIG_TRAIN_TRACE=yes", "not y or n"),
        ("CONFIG_TRAIN_TRACE=m", "not y or n"),
        ('CONFIG_TRAIN_TRACE="y"', "not y or n"),
        ("CONFIG_TRAIN_STEPS=007", "not an int"),
        ("CONFIG_TRAIN_STEPS=+7", "not an int"),
        ("CONFIG_TRAIN_STEPS=0x7", "not an int"),
        ('CONFIG_TRAIN_STEPS="7"', "not an int"),
        ("# CONFIG_TRAIN_STEPS is not set", "not an int"),
        ("CONFIG_ATTN_LENS_MASK=16", "not a hex number"),
        ("CONFIG_OPT_LR=1e-4", 'not a string; write CONFIG_OPT_LR="1e-4"'),
        ('CONFIG_OPT_LR="nan"', "not a float"),
        ('CONFIG_OPT_LR="1e999"', "not a float"),
        ('CONFIG_OPT_LR="1_0"', "not a float"),
        ('CONFIG_OPT_LR="+1"', "not a float"),
        ('CONFIG_OPT_LR=" 1"', "not a float"),
        ('CONFIG_OPT_LR=""', "not a float"),
        ('CONFIG_OPT_LR="0"', "outside (0, 10]"),
        ('CONFIG_OPT_LR="10.1"', "outside (0, 10]"),
        ('CONFIG_OPT_NAME="../x"', "not a name"),
        ('CONFIG_OPT_NAME="a..b"', "not a name"),
        ('CONFIG_OPT_NAME="A"', "not a name"),
        ("CONFIG_TRAIN_STEPS=0", "outside 1..1000000"),
        ("CONFIG_TRAIN_DERIVED=7", "has no prompt; its default decides"),
        ("CONFIG_PRUNE_NONE=n", 'stayed y; choice "Pruning" is PRUNE_NONE (default)'),
    ],
)
def test_a_bad_line_is_one_error_with_its_place(line, says):
    (text,) = errors(line)
    assert text.startswith("F:1: error: ") and says in text


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        (
            ["CONFIG_ATTN_MLA_LATENT=64"],
            "stayed unset; needs ATTN_MLA, which is n (ablab/attention/Kconfig:20)",
        ),
        (["CONFIG_TRAIN_SMALL=y", "CONFIG_EVAL_INTERVAL=5"], "needs !TRAIN_SMALL (TRAIN_SMALL is y)"),
        (
            ["CONFIG_ATTN_DEEP=y"],
            "needs ATTN_LENS, which is n and ATTN_MLA || OPT_SGD (ATTN_MLA is n, OPT_SGD is n)",
        ),
        (
            ["CONFIG_OPT_SGD=y", "CONFIG_TRAIN_SMALL=y", "# CONFIG_TRAIN_TRACE is not set"],
            "CONFIG_TRAIN_TRACE=n: stayed y; selected by TRAIN_SMALL",
        ),
        (["CONFIG_TRAIN_SMALL=y", "CONFIG_ATTN_MLA=y", "CONFIG_ATTN_MLA_LATENT=65"], "outside 16..64"),
        (["CONFIG_PRUNE_MAGNITUDE=y", 'CONFIG_PRUNE_SPARSITY="1"'], "outside [0, 1)"),
        (["CONFIG_TRAIN_AUTO=y"], "stayed y; needs TRAIN_SMALL, which is n"),
    ],
)
def test_a_request_that_did_not_take_says_why(lines, says):
    (text,) = errors(*lines)
    assert text.startswith(f"F:{len(lines)}: ") and says in text


def test_a_line_of_bad_form_does_not_put_the_blame_on_others():
    (text,) = errors("CONFIG_ATTN_MLA = y", "CONFIG_ATTN_MLA_LATENT=32")
    assert text.startswith("F:1: ")


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"\xef\xbb\xbfCONFIG_TRAIN_TRACE=y\n", ":1: error: byte order mark"),
        (b"# x\nCONFIG_TRAIN_TRACE=y\r\n", ":2: error: carriage return"),
        (b"# \xff\n", "byte 2 is not UTF-8"),
    ],
)
def test_a_file_that_is_no_plain_text_is_refused(tmp_path, data, says):
    (tmp_path / "F").write_bytes(data)
    with pytest.raises(ConfigError, match=says):
        kconf.lex(tmp_path / "F")


def test_a_missing_file_is_an_error_that_names_it(tmp_path):
    with pytest.raises(ConfigError, match="gone: error: cannot be read: No such file"):
        kconf.lex(Path("gone"), root=tmp_path)


def test_places_are_relative_to_the_project():
    assert kconf.place(kconf.ROOT / "defconfigs" / "demo") == "defconfigs/demo"
    assert kconf.place(Path("/elsewhere/x")) == "/elsewhere/x"


def test_nearest_prefers_a_name_that_holds_all_the_words():
    known = ["CONFIG_TRAIN_BATCH_MICRO", "MATCH", "CONFIG_TRAIN_BATCH_EFFECTIVE"]
    assert kconf.nearest("BATCH", known) == "CONFIG_TRAIN_BATCH_MICRO"
    assert kconf.nearest("CATCH", known) == "MATCH"


# values


@pytest.mark.parametrize(
    ("lines", "name", "value"),
    [
        (['CONFIG_OPT_LR="1e-4"'], "OPT_LR", 0.0001),
        (['CONFIG_OPT_LR=".5"'], "OPT_LR", 0.5),
        (['CONFIG_OPT_LR="1"'], "OPT_LR", 1.0),
        (["CONFIG_OPT_SHIFT=-5"], "OPT_SHIFT", -5),
        (["CONFIG_ATTN_LENS=y", "CONFIG_ATTN_LENS_MASK=0x10"], "ATTN_LENS_MASK", 16),
        (["CONFIG_ATTN_LENS=y", 'CONFIG_ATTN_LENS_DIMS="1,64"'], "ATTN_LENS_DIMS", (1, 64)),
        (["CONFIG_ATTN_LENS=y", 'CONFIG_ATTN_LENS_RATES="1e-1"'], "ATTN_LENS_RATES", (0.1,)),
        (['CONFIG_OPT_NOTE="a # b"'], "OPT_NOTE", "a # b"),
        ([r'CONFIG_OPT_NOTE="say \"x\" \\ y"'], "OPT_NOTE", 'say "x" \\ y'),
        (["# a comment", "", "CONFIG_TRAIN_TRACE=y"], "TRAIN_TRACE", True),
        (["CONFIG_TRAIN_TRACE=n"], "TRAIN_TRACE", False),
    ],
)
def test_literals_bind_once_to_their_type(lines, name, value):
    found = settled(layer(*lines)).values[name]
    assert found == value and type(found) is type(value)


@given(text=st.text(st.characters(exclude_characters="\n\r", exclude_categories=["Cs"])))
@settings(max_examples=60, deadline=None, database=None)
def test_any_text_survives_quoting_and_a_round_trip_through_the_file(text):
    tree = kconf.load(FIXTURE)
    literal = '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
    first = kconf.settle(tree, [layer(f"CONFIG_OPT_NOTE={literal}")])
    again = kconf.settle(tree, [kconf.lex(Path(".config"), first.config())])
    assert first.values["OPT_NOTE"] == again.values["OPT_NOTE"] == text


@given(st.text(max_size=40))
@settings(max_examples=100, deadline=None, database=None)
def test_any_line_is_a_request_a_comment_or_an_error(line):
    try:
        kconf.settle(kconf.load(FIXTURE), [kconf.lex(Path("F"), line)])
    except ConfigError as error:
        assert all(e.startswith("F:") for e in error.errors)
    else:
        assert all(not x.strip() or x.startswith(("#", "CONFIG_")) for x in line.split("\n"))


def test_values_hold_what_stands_in_the_file_and_nothing_invisible():
    found = settled(layer("CONFIG_OPT_SGD=y"))
    lines = [x for x in found.config().splitlines() if "CONFIG_" in x]
    assert len(lines) == len(found.values) == len(found.text) == len(found.where)
    assert "OPT_HAS_MOMENTS" not in found.values and "ATTN_MLA_LATENT" not in found.values
    assert found.values["TRAIN_DERIVED"] == 7 and found.values["TRAIN_AUTO"] is True
    order = [name for name in kconf.load(FIXTURE).symbols if name in found.values]
    assert list(found.values) == order


def test_conditional_defaults_follow_the_condition():
    assert settled().values["OPT_LR"] == 6e-4
    assert settled(layer("CONFIG_OPT_SGD=y")).values["OPT_LR"] == 0.1
    assert settled(layer("CONFIG_OPT_ADAMWPRUNE=y")).values["PRUNE_STATE"] is True
    assert settled(layer("CONFIG_OPT_ADAMWPRUNE=y", "CONFIG_PRUNE_NONE=y")).values["PRUNE_STATE"] is False
    assert settled(layer("CONFIG_ATTN_MLA=y")).values["ATTN_LENS"] is True


# layers


def test_a_later_layer_wins_and_what_it_undoes_is_listed():
    found = settled(
        layer(
            'CONFIG_OPT_LR="1e-3"',
            "CONFIG_OPT_ADAM=y",
            "CONFIG_PRUNE_MOVEMENT=y",
            'CONFIG_PRUNE_SPARSITY="0.7"',
        ),
        layer('CONFIG_OPT_LR="2e-3"', "CONFIG_PRUNE_NONE=y", name="make line", file="M"),
        layer("CONFIG_OPT_SGD=y", "CONFIG_TRAIN_STEPS=5", name="step R1", file="S"),
    )
    assert found.values["OPT_LR"] == 2e-3 and found.values["OPT_SGD"] is True
    assert found.superseded == (
        'CONFIG_OPT_LR="1e-3" (F:1): "2e-3" by M:1',
        "CONFIG_OPT_ADAM=y (F:2): n by S:1",
        "CONFIG_PRUNE_MOVEMENT=y (F:3): needs OPT_HAS_MOMENTS, which is n",
        'CONFIG_PRUNE_SPARSITY="0.7" (F:4): needs !PRUNE_NONE (PRUNE_NONE is y)',
    )
    where = {n: found.where[n] for n in ("OPT_LR", "OPT_SGD", "OPT_ADAM", "PRUNE_NONE", "TRAIN_STEPS", "TRAIN_SEED")}
    assert where == {
        "OPT_LR": "M:1",
        "OPT_SGD": "S:1",
        "OPT_ADAM": "S:1",
        "PRUNE_NONE": "M:2",
        "TRAIN_STEPS": "S:2",
        "TRAIN_SEED": "default",
    }


def test_each_layer_is_settled_in_turn():
    early = layer("CONFIG_ATTN_MLA_LATENT=64")
    late = layer("CONFIG_ATTN_MLA=y", file="G")
    with pytest.raises(ConfigError, match="F:1: error: CONFIG_ATTN_MLA_LATENT=64: stayed unset"):
        settled(early, late)
    assert settled(late, early).values["ATTN_MLA_LATENT"] == 64


def test_an_equal_request_is_not_superseded():
    assert settled(layer("CONFIG_TRAIN_STEPS=5"), layer("CONFIG_TRAIN_STEPS=5", file="G")).superseded == ()


def test_an_out_of_range_value_of_an_earlier_layer_is_superseded_and_not_fatal():
    base = layer("CONFIG_ATTN_MLA=y", "CONFIG_ATTN_MLA_LATENT=300")
    found = settled(base, layer("CONFIG_TRAIN_SMALL=y", file="G"))
    assert found.superseded == ("CONFIG_ATTN_MLA_LATENT=300 (F:2): is 32",)


def test_a_resolved_file_may_hold_symbols_without_a_visible_prompt():
    text = settled(layer("CONFIG_OPT_ADAM=y")).config()
    assert "CONFIG_OPT_HAS_MOMENTS=y" in text and "CONFIG_TRAIN_AUTO=y" in text
    again = settled(kconf.lex(Path(".config"), text))
    assert again.config() == text and again.superseded == ()
    with pytest.raises(ConfigError, match="has no prompt; selected by"):
        settled(kconf.lex(Path("F"), text))
    wrong = text.replace("CONFIG_TRAIN_DERIVED=7", "CONFIG_TRAIN_DERIVED=8")
    with pytest.raises(ConfigError, match="CONFIG_TRAIN_DERIVED=8: stayed 7; it has no prompt"):
        settled(kconf.lex(Path(".config"), wrong))


def test_settling_leaves_no_trace_in_the_next_one():
    a, b = layer("CONFIG_OPT_SGD=y", "CONFIG_TRAIN_SMALL=y"), layer("CONFIG_ATTN_MLA=y")
    plain, first, second = settled().text, settled(a).text, settled(b).text
    errors("CONFIG_OPT_SGD=y", "CONFIG_TRAIN_STEPS=x")
    assert [settled(b).text, settled().text, settled(a).text] == [second, plain, first]
    assert len({str(x) for x in (plain, first, second)}) == 3


@pytest.mark.parametrize("seed", range(20))
def test_the_minimal_form_settles_to_the_same(tree, seed):
    full = configure.fill(tree, "randconfig", str(seed))
    configure.fill(tree, "alldefconfig")  # another state in between
    minimal = full.minimal()
    assert kconf.settle(tree, [kconf.lex(Path("F"), minimal)]).text == full.text
    for line in minimal.splitlines():
        rest = minimal.replace(line + "\n", "")
        try:
            assert kconf.settle(tree, [kconf.lex(Path("F"), rest)]).text != full.text, line
        except ConfigError:
            continue  # another line needs this one


# the tree


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("config A\n\tbool 'x'\n\tdepends on NOWHERE\n", "undefined symbol NOWHERE"),
        (
            "config A\n\tstring 'x'\n\tdefault 'y'\n\thelp\n\t  words\n",
            "Kconfig:1: error: A: the help of a string",
        ),
        ("config A\n\tbool 'x'\n\tfrobnicate\n", "error: .*Kconfig:3: error: couldn't parse"),
        ("config A\n\tint 'x'\n\tdefault y\n", "has a non-int default"),
        ("source 'nowhere'\n", "nowhere"),
    ],
)
@pytest.mark.filterwarnings("ignore:unclosed file")
def test_a_faulty_tree_does_not_load(tmp_path, text, says):
    with pytest.raises(ConfigError, match=says):
        small(tmp_path, text)
    gc.collect()  # kconfiglib leaves the file open; the warning belongs to this test


def test_a_default_outside_its_range_is_an_error_each_time_it_is_evaluated(tmp_path):
    tree = small(tmp_path, "config A\n\tint 'x'\n\tdefault 9\n\trange 0 5 if B\n\nconfig B\n\tbool 'b'\n")
    for _ in range(2):  # kconfiglib warns once and caches the value
        with pytest.raises(ConfigError, match=r"defconfig: error: default value 9 on A .* clamped"):
            kconf.settle(tree, [layer("CONFIG_B=y")])
    assert kconf.settle(tree, [layer("CONFIG_B=y", "CONFIG_A=3")]).values["A"] == 3
    (tmp_path / "always").mkdir()
    always = small(tmp_path / "always", "config A\n\tint 'x'\n\tdefault 9\n\trange 0 5\n")
    for layers in ([], [layer("CONFIG_A=3")]):
        with pytest.raises(ConfigError, match="default: error: default value 9 on A"):
            kconf.settle(always, layers)


def test_a_select_against_a_dependency_is_an_error(tmp_path):
    text = "config A\n\tbool 'a'\n\tselect C\n\nconfig B\n\tbool 'b'\n\nconfig C\n\tbool 'c'\n\tdepends on B\n"
    tree = small(tmp_path, text)
    with pytest.raises(ConfigError, match="direct dependencies"):
        kconf.settle(tree, [layer("CONFIG_A=y")])
    assert kconf.settle(tree, [layer("CONFIG_B=y", "CONFIG_A=y")]).values["C"] is True


def test_a_default_that_breaks_its_type_line_is_an_error(tmp_path):
    tree = small(tmp_path, "config A\n\tstring 'x'\n\tdefault 'y'\n\thelp\n\t  type: float [0, 1]\n")
    with pytest.raises(ConfigError, match='Kconfig:1: error: A: default "y": not a float'):
        kconf.settle(tree, [])


def test_the_environment_cannot_change_the_tree(tmp_path, monkeypatch):
    for name, value in {
        "CONFIG_": "X_",
        "srctree": "/nowhere",
        "KCONFIG_CONFIG_HEADER": "CONFIG_TRAIN_STEPS=3",
    }.items():
        monkeypatch.setenv(name, value)
    tree = small(tmp_path, "config A\n\tbool 'a'\n")
    found = kconf.settle(tree, [layer("CONFIG_A=y")])
    assert found.minimal() == "CONFIG_A=y\n"
    assert os.environ["srctree"] == "/nowhere"  # noqa: SIM112


def test_facts_of_a_symbol(tree):
    info = tree.symbols["ATTN_MLA_LATENT"]
    assert (info.kind, info.prompt, info.file, info.line) == (
        "int",
        "Latent width",
        "ablab/attention/Kconfig",
        20,
    )
    assert info.depends == "ATTN_MLA" and info.default == "32 if TRAIN_SMALL, 128 if OPT_SGD, 64"
    assert tree.symbols["OPT_LR"].type == "float (0, 10]" and tree.symbols["OPT_SGD"].choice == "Optimizer"
    assert tree.symbols["PRUNE_STATE"].depends == "OPT_CARRIES_PRUNER"


# identity


def test_identity_is_the_hash_of_the_parsed_values_that_can_change_weights():
    known = hashlib.sha256(b'{"A_B":[1,2],"OPT_LR":0.0001,"X":true}').hexdigest()
    assert kconf.identity({"X": True, "OPT_LR": 1e-4, "A_B": (1, 2), "STUDY": "a", "TRACK_X": 1, "TELEM_Y": 2}) == known
    a, b = (settled(layer(f'CONFIG_OPT_LR="{t}"')) for t in ("1e-4", "0.0001"))
    assert a.text != b.text and kconf.identity(a.values) == kconf.identity(b.values)


@pytest.mark.parametrize(
    ("line", "same_identity", "same_group"),
    [
        ('CONFIG_STUDY="x"', True, True),
        ("CONFIG_TRAIN_SEED=7", False, True),
        ("CONFIG_TRAIN_STEPS=7", False, False),
        ("CONFIG_OPT_SGD=y", False, False),
    ],
)
def test_identity_and_group_tell_apart_what_they_must(line, same_identity, same_group):
    a, b = settled().values, settled(layer(line)).values
    assert (kconf.identity(a) == kconf.identity(b)) is same_identity
    assert (kconf.group(a) == kconf.group(b)) is same_group


# questions


@pytest.mark.parametrize("seed", range(8))
def test_diff_is_the_smallest_fragment_that_turns_one_into_the_other(tree, seed):
    a = [kconf.lex(Path("A"), configure.fill(tree, "randconfig", f"a{seed}").minimal())]
    b = configure.fill(tree, "randconfig", f"b{seed}")
    found = kconf.diff(tree, a, b)
    assert kconf.settle(tree, [*a, Layer("diff", found)]).text == b.text
    for r in found:
        try:
            rest = tuple(x for x in found if x is not r)
            assert kconf.settle(tree, [*a, Layer("diff", rest)]).text != b.text, r
        except ConfigError:
            continue


def takes(tree, requests):
    try:
        kconf.settle(tree, [Layer("try", tuple(requests))])
    except ConfigError:
        return False
    return True


@pytest.mark.parametrize(
    ("want", "size"),
    [
        (("TRAIN_STEPS", "7"), 0),
        (("ATTN_MLA_LATENT", "64"), 1),
        (("PRUNE_STATE", "y"), 1),
        (("PRUNE_SPARSITY", '"0.3"'), 1),
        (("ATTN_DEEP", "y"), 1),  # MLA switches LENS on by its default
        (("TRAIN_AUTO", "n"), 1),
    ],
)
def test_remedy_is_the_smallest_set_of_changes(tree, want, size):
    request = Request(*want, "why")
    found = kconf.remedy(tree, [], request)
    assert len(found) == size and takes(tree, [*found, request])
    bools = [n for n, i in tree.symbols.items() if i.kind == "bool" and i.prompt and n != want[0]]
    singles = [Request(n, v, "why") for n in bools for v in "yn"]
    for changes in itertools.combinations(singles, size - 1) if size else ():
        assert not takes(tree, [*changes, request]), changes


def test_remedy_needs_two_changes_and_a_number(tree):
    base = [layer("CONFIG_TRAIN_STEPS=5", "# CONFIG_ATTN_LENS is not set")]
    want = Request("ATTN_DEEP", "y", "why")
    found = kconf.remedy(tree, base, want)
    assert {(r.name, r.text) for r in found} >= {("TRAIN_STEPS", "11"), ("ATTN_LENS", "y")} and len(found) == 3
    assert kconf.remedy(tree, base, want, limit=2) is None


@pytest.mark.parametrize("want", [("TRAIN_STEPS", "0"), ("OPT_HAS_MOMENTS", "y"), ("PRUNE_NONE", "n")])
def test_remedy_knows_what_is_impossible(tree, want):
    assert kconf.remedy(tree, [], Request(*want, "why")) is None
