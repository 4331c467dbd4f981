# SPDX-License-Identifier: MIT
"""Study files: the grammar of directives, axes and steps, and one line of text for each mistake."""

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ablab import study

SPEC = """\
base   gpt2-124m
seeds  6 paired    metric val_loss final    margin 0.01
[R0] Baseline
# hypothesis: R1 beats R0 at equal tokens
[R1] RA
CONFIG_ATTN_RECIPROCAL=y
[R2 : R1] RA + RA-CT
CONFIG_ATTN_RACT=y
"""


def read(tmp_path, text, name="ra"):
    path = tmp_path / "studies" / f"{name}.study"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return study.read(path)


def errors(tmp_path, text):
    """Error texts as they read from the project root."""
    with pytest.raises(study.StudyError) as caught:
        read(tmp_path, text)
    return str(caught.value).replace(f"{tmp_path}/", "").splitlines()


def test_the_example_of_the_spec_parses(tmp_path):
    s = read(tmp_path, SPEC)
    assert (s.name, s.base, s.seeds, s.paired, s.margin) == ("ra", ("gpt2-124m",), 6, True, 0.01)
    assert s.metric == ("val_loss", "final")
    assert [(x.id, x.parent, x.title, x.line) for x in s.steps] == [
        ("R0", None, "Baseline", 3),
        ("R1", None, "RA", 5),
        ("R2", "R1", "RA + RA-CT", 7),
    ]
    assert s.step("R1").lines == ((6, "CONFIG_ATTN_RECIPROCAL=y"),)
    assert s.step("R1").hypothesis == "R1 beats R0 at equal tokens"
    assert [x.id for x in s.chain("R2")] == ["R1", "R2"]
    assert s.text == SPEC


def test_the_registration_of_the_spec_parses(tmp_path):
    text = (
        "question  Does rank-4 reciprocity lower the loss  seeds or not?\n"
        "metric    val_loss final      budget tokens     margin 0.01     alpha 0.05 two-sided     placebo 1\n"
        "contrast  R1 - R0, R2 - R1    seeds 12 paired   looks 8 12      failures block\n"
        + SPEC.replace("seeds  6 paired    metric val_loss final    margin 0.01\n", "")
    )
    s = read(tmp_path, text)
    assert s.question == "Does rank-4 reciprocity lower the loss  seeds or not?"
    assert (s.budget, s.alpha, s.sides, s.placebo, s.looks, s.failures) == (
        "tokens",
        0.05,
        2,
        1,
        (8, 12),
        "block",
    )
    assert [(c.left, c.right) for c in s.contrasts] == [("R1", "R0"), ("R2", "R1")]
    assert s.seeds == 12


def test_left_out_directives_have_the_documented_values(tmp_path):
    s = read(tmp_path, "base x\n[A] One\n")
    assert (s.metric, s.alpha, s.sides, s.failures) == (("val_loss", "final"), 0.05, 2, "block")
    assert (s.seeds, s.margin, s.budget, s.expect, s.contrasts, s.axes) == (None, None, None, None, (), ())


def test_an_unset_line_belongs_to_the_body_and_a_comment_to_the_next_step(tmp_path):
    text = "base x\n[A] One\n# CONFIG_Y is not set\n# why\n[B] Two\n\n# lost\n\n[C] Three\n"
    s = read(tmp_path, text)
    assert s.step("A").lines == ((3, "# CONFIG_Y is not set"),)
    assert [x.comments for x in s.steps] == [(), ("why",), ()]
    assert [x.hypothesis for x in s.steps] == ["", "why", ""]


@pytest.mark.parametrize(
    ("word", "items"),
    [
        ("1..3", ["1", "2", "3"]),
        ("-1..1", ["-1", "0", "1"]),
        ("0.5..0.9/0.2", ["0.5", "0.7", "0.9"]),
        ("0.0..0.3/0.1", ["0", "0.1", "0.2", "0.3"]),
        ("16..64/16", ["16", "32", "48", "64"]),
        ("1e-4..3e-4/1e-4", ["0.0001", "0.0002", "0.0003"]),
        ("3..1/-1", ["3", "2", "1"]),
        ("7..7", ["7"]),
        ("SGD", ["SGD"]),
        ('"a..b"', ['"a..b"']),
    ],
)
def test_ranges_are_decimal_and_include_both_ends(word, items):
    assert list(study.spread([word])) == items


@given(st.integers(-1000, 1000), st.integers(1, 200), st.integers(0, 6), st.integers(0, 50))
def test_a_range_is_the_exact_arithmetic_progression(low, step, places, count):
    unit = Decimal(1).scaleb(-places)
    first, width = low * unit, step * unit
    word = f"{first:f}..{first + count * width:f}/{width:f}"
    items = study.spread([word])
    assert [Decimal(i) for i in items] == [first + k * width for k in range(count + 1)]
    assert all("E" not in i for i in items)


@pytest.mark.parametrize("word", ["0.5..0.9", "1..2/0.3", "3..1", "1..2/0", "1..1e9", "1..1e999999/1"])
def test_a_range_that_does_not_close_is_refused(word):
    with pytest.raises(ValueError, match=r"range|lead"):
        study.spread([word])


def test_axes_joined_axes_and_arms_of_points(tmp_path):
    s = read(
        tmp_path,
        "base x+y + z\nsweep OPT = SGD  ADAM\nsweep OPT_LR = 1e-4 3e-4\nwith  PRUNE_WARMUP=10 20  expect 8\n"
        "contrast OPT=SGD OPT_LR=.0001 - OPT=ADAM OPT_LR=3e-4\n",
    )
    assert s.base == ("x", "y", "z")
    assert [(a.key, a.items, a.joined) for a in s.axes] == [
        ("OPT", ("SGD", "ADAM"), False),
        ("OPT_LR", ("1e-4", "3e-4"), False),
        ("PRUNE_WARMUP", ("10", "20"), True),
    ]
    assert s.contrasts[0].left == (("OPT", "SGD"), ("OPT_LR", ".0001"))
    assert s.expect == 8 and s.at("expect").endswith("ra.study:4")


def test_sweeps_of_the_make_line():
    axes = study.sweep('OPT_LR=1e-4,3e-4 with SCHED_WARMUP=10,20 TRAIN_SEED=1..3 NAME="a,b",c')
    assert [(a.key, a.items, a.joined, a.where) for a in axes] == [
        ("OPT_LR", ("1e-4", "3e-4"), False, "make line"),
        ("SCHED_WARMUP", ("10", "20"), True, "make line"),
        ("TRAIN_SEED", ("1", "2", "3"), False, "make line"),
        ("NAME", ('"a,b"', "c"), False, "make line"),
    ]


@pytest.mark.parametrize(
    "text", ["", "OPT_LR", "OPT_LR=1 with", "opt=1", "A=1,1.0", "with A=1", "A=1 A=2", "A=1,2 with B=1"]
)
def test_a_bad_sweep_of_the_make_line_is_refused(text):
    with pytest.raises(study.StudyError, match=r"make line: error: SWEEP="):
        study.sweep(text)


def test_an_unknown_parent_reads_as_specified(tmp_path):
    text = "#\n" * 9 + "base x\n[R0] a\n[R2 : R9] c\n[R1] b\n"
    assert errors(tmp_path, text) == ["studies/ra.study:12: error: [R2 : R9]: no step R9; steps: R0 R2 R1"]
    assert errors(tmp_path, "base x\n[R0] a\n[R1] b\n[R2 : R9] c\n") == [
        "studies/ra.study:4: error: [R2 : R9]: no step R9; steps: R0 R1 R2"
    ]


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("seeds 0", "'seeds 0': expected seeds N [paired], N of 1 or more"),
        ("seeds 3 unpaired", "'seeds 3 unpaired': expected seeds N [paired], N of 1 or more"),
        ("seds 3", "'seds 3': no such directive; nearest: seeds"),
        ("base y", "base: already given at studies/ra.study:1"),
        ("sweep OPT SGD", "'sweep OPT SGD': expected sweep KEY = item [item ..]"),
        ("sweep A = 0.5 .50", "A: .50 and 0.5 are equal items"),
        ("sweep A = 0.10..0.12", "0.10..0.12: a decimal range needs a step, as in 0.5..0.9/0.1"),
        ("with A = 1", "with A: no sweep above it"),
        ("contrast A0 -A1", "contrast 'A0 -A1': expected ARM - ARM with blanks beside the minus"),
        ("contrast A0 - B1", "contrast: no step B1; steps: A0"),
        ("contrast A0 - OPT=SGD", "contrast: no axis OPT; axes: none"),
        ("contrast A0 - opt=SGD", "contrast: arm 'opt=SGD': expected a step id or KEY=item [KEY=item ..]"),
        ("metric val_los", "'val_los': no such metric; nearest:"),
        ("margin 0", "margin 0: expected margin NUMBER, above 0"),
        ("alpha 1", "alpha 1: expected alpha NUMBER [two-sided|one-sided], in (0, 1)"),
        ("looks 12 8", "looks 12 8: expected looks N [N ..], rising"),
        ("failures ignore", "'failures ignore': expected failures block|worst"),
        ("expect many", "'expect many': expected expect N, the number of trials"),
        ("question", "'question': expected question TEXT"),
        ("seeds 3  sweep TRAIN_SEED = 1 2", "seeds: TRAIN_SEED is swept already; keep one"),
        ("[R0]", "'[R0]': expected [ID] TITLE or [ID : PARENT] TITLE, an ID of 1 to 8 of A-Z 0-9"),
        (
            "[r0] lower",
            "'[r0] lower': expected [ID] TITLE or [ID : PARENT] TITLE, an ID of 1 to 8 of A-Z 0-9",
        ),
        ("[A0 : A0] own parent", "[A0 : A0]: A0 stands below or is itself; move it up"),
    ],
)
def test_each_mistake_has_its_line_and_text(tmp_path, line, text):
    found = errors(tmp_path, f"base x\n{line}\n[A0] Baseline\n")
    assert any(e.startswith(f"studies/ra.study:2: error: {text}") for e in found), found


def test_all_errors_of_a_file_come_in_one_pass(tmp_path):
    found = errors(tmp_path, "seeds 0\nsweeep A = 1\n[A] x\n[A] y\n[B : C] z\n")
    assert [e.split(":")[1] for e in found] == ["1", "1", "2", "4", "5"]
    assert found[3] == "studies/ra.study:4: error: [A]: already a step at studies/ra.study:3"


def test_a_placebo_needs_steps(tmp_path):
    assert errors(tmp_path, "base x\nplacebo 2\n") == [
        "studies/ra.study:2: error: placebo: copies the first step, and there is none"
    ]


@pytest.mark.parametrize("text", [b"base x\r\n", b"\xef\xbb\xbfbase x\n", b"base \xff\n"])
def test_only_plain_utf8_is_read(tmp_path, text):
    assert errors(tmp_path, text)


def test_an_unknown_study_lists_the_known_ones(tmp_path):
    read(tmp_path, SPEC)
    read(tmp_path, SPEC, "lens")
    with pytest.raises(study.StudyError, match=r'CONFIG_STUDY="rb": no such study; nearest first: ra lens'):
        study.find("rb", tmp_path)
    assert study.find("lens", tmp_path).name == "lens"


def test_an_error_of_a_step_body_names_the_step(tmp_path):
    s = read(tmp_path, SPEC)
    line = f"{s.path}:8: error: CONFIG_ATTN_RACT=y: stayed n"
    assert s.explain(line) == f"{s.path}:8: error: [R2]: CONFIG_ATTN_RACT=y: stayed n"
    assert s.explain("make line: error: x") == "make line: error: x"
    assert s.explain(f"{s.path}:2: error: x") == f"{s.path}:2: error: x"


@given(
    st.lists(
        st.sampled_from([*study._USES, "[R0] a", "[R1 : R0] b", "KEY", "=", "1..3", "-", ",", "  ", "\n", "# c", '"'])
    )
)
def test_any_text_is_a_study_or_a_study_error(words):
    try:
        assert study._Reader("x", "studies/x.study", " ".join(words)).study().base
    except study.StudyError as error:
        assert all(e.startswith("studies/x.study:") for e in error.errors)
