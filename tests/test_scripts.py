# SPDX-License-Identifier: MIT
"""scripts/: whitespace, commit messages and the form of defconfigs, each with findings that must be seen."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
GOOD = """kconf.py: refuse a symbol that is set twice

Both engines take the last value in silence, so a typo in a defconfig
changed a run. Costs nothing measurable.
"""


def script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


whitespace, commits, forms = (
    script(name) for name in ("fix_whitespace_issues", "check_commit_msg", "check_defconfigs")
)


# whitespace


@pytest.mark.parametrize(
    ("data", "want"),
    [
        (b"a\n", b"a\n"),
        (b"", b""),
        (b"a \t\nb", b"a\nb\n"),
        (b"a\n\n\n", b"a\n"),
        (b"  \n", b""),
        (b"a \r\nb\r\n\r\n", b"a\r\nb\r\n"),
        (b"\xff\xfe \n", b"\xff\xfe\n"),
        ("caf\u00e9\u00a0\n".encode(), "caf\u00e9\u00a0\n".encode()),
        (b"\ta\n \tb\n", b"\ta\n \tb\n"),
    ],
)
def test_whitespace_is_mended_and_nothing_else_is_touched(data, want):
    assert whitespace.mended(data) == want == whitespace.mended(want)
    assert bool(whitespace.findings(data)) is (data != want)


def test_check_reports_lines_and_changes_nothing(tmp_path, capsys):
    bad, binary, link = tmp_path / "bad.txt", tmp_path / "x.bin", tmp_path / "link"
    bad.write_bytes(b"a\nb \nc")
    binary.write_bytes(b"\0 \n \n")
    link.symlink_to(bad)
    names = [str(bad), str(binary), str(link)]
    assert whitespace.main(["--check", *names]) == 1
    said = capsys.readouterr().out.splitlines()
    assert said == [f"{bad}:2: blanks at the end of the line", f"{bad}:3: no newline at the end of the file"]
    assert bad.read_bytes() == b"a\nb \nc"
    assert whitespace.main(names) == 0
    assert bad.read_bytes() == b"a\nb\nc\n" and binary.read_bytes() == b"\0 \n \n"
    assert whitespace.main(["--check", *names]) == 0


def test_a_mended_file_keeps_its_mode(tmp_path):
    path = tmp_path / "run"
    path.write_text("x \n")
    path.chmod(0o755)
    whitespace.main([str(path)])
    assert path.stat().st_mode & 0o777 == 0o755


# commit messages


def test_a_good_message_passes():
    assert commits.findings(GOOD) == []
    assert commits.findings(GOOD + "\nSigned-off-by: A B <a@b.c>\n", ("Signed-off-by",)) == []


@pytest.mark.parametrize(
    ("message", "says"),
    [
        ("Fix things\n\nBody.\n", "write 'file.py: what'"),
        ("kconf.py: fix things.\n\nBody.\n", "no period"),
        ("kconf.py: " + "x" * 61 + "\n\nBody.\n", "line 1: 71 columns"),
        ("kconf.py: fix\nBody.\n", "line 2: leave it blank"),
        ("kconf.py: fix\n", "no body"),
        ("kconf.py: fix\n\nSigned-off-by: A <a@b>\n", "no body"),
        ("kconf.py: fix\n\n" + "word " * 15 + "\n", "line 3: 7"),
        (GOOD + "\nCo-authored-by: A <a@b>\n", "refused footer"),
        (GOOD + "\nGenerated with a tool\n", "refused footer"),
        ("kconf.py: fix\n\nA comprehens" + "ive fix.\n", "use a word that says something"),
        ("kconf.py: fix\n\nBody \u2014 dash.\n", "not ASCII"),
    ],
)
def test_a_bad_message_is_named(message, says):
    assert any(says in finding for finding in commits.findings(message))


def test_a_required_trailer_is_missed():
    assert commits.findings(GOOD, ("Signed-off-by",)) == ["no trailer Signed-off-by: add one"]


def test_long_urls_need_no_wrapping():
    assert commits.findings(GOOD + "\nhttps://example.org/" + "x" * 80 + "\n") == []


def git(folder, *arguments):
    command = ["git", "-c", "user.name=A", "-c", "user.email=a@b", *arguments]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


def test_hook_and_range_read_what_git_gives_them(tmp_path, monkeypatch, capsys):
    git(tmp_path, "init", "-q")
    for message in ("start: x\n\nBody.\n", GOOD, "bad"):
        git(tmp_path, "commit", "-q", "--allow-empty", "-m", message)
    monkeypatch.chdir(tmp_path)
    assert commits.main(["--range", "HEAD~2..HEAD~1"]) == 0
    assert commits.main(["--range", "HEAD~2..HEAD"]) == 1
    assert capsys.readouterr().out.startswith(git(tmp_path, "rev-parse", "HEAD")[:12])
    with pytest.raises(SystemExit, match="unknown revision"):
        commits.main(["--range", "nowhere..HEAD"])
    path = tmp_path / "COMMIT_EDITMSG"
    path.write_text(GOOD + "# ------------------------ >8 ------------------------\ndiff --git a b " + "x" * 90)
    assert commits.main([str(path)]) == 0
    git(tmp_path, "config", "ablab.trailer", "Signed-off-by")
    assert commits.main([str(path)]) == 1


# defconfigs


def test_the_projects_own_files_have_the_right_form():
    assert forms.main([]) == 0


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        (
            "a",
            "# SPDX-License-Identifier: MIT\n# x\n# Hardware: y Time: z Result: w\nCONFIG_A = 1\n",
            ":4: error: ",
        ),
        ("a", "# SPDX-License-Identifier: MIT\n# Hardware: y Time: z\nCONFIG_A=1\n", "header lacks Result:"),
        ("a", "# x\n# Hardware: y Time: z Result: w\n", ":1: error: no SPDX line"),
        ("a.study", "# SPDX-License-Identifier: MIT\nbase x\n[R0] T\nCONFIG_A=1 # n\n", ":4: error: "),
        ("a.study", "# SPDX-License-Identifier: MIT\nbass x\n", ":2: error: "),
    ],
)
def test_a_defconfig_or_study_of_bad_form_is_seen(tmp_path, capsys, name, text, says):
    (tmp_path / name).write_text(text)
    assert forms.main([str(tmp_path / name)]) == 1
    assert f"{tmp_path / name}" in (said := capsys.readouterr().out) and says in said


def test_the_figures_of_the_documents_are_drawn_from_the_code(tmp_path):
    script("draw_mechanisms").main(str(tmp_path))
    drawn = sorted(p.name for p in tmp_path.iterdir() if p.read_bytes().startswith(b"\x89PNG"))
    assert drawn == sorted(p.name for p in (ROOT / "docs").glob("mechanisms-*.png"))


# old names


SHIMS = {
    "inspect_wandb_keys.py": '"keys"',
    "query_wandb_gpu.py": '"gpu"',
    "query_wandb_gpu_full.py": '"gpu", "--full"',
    "plot_torch_compile_impact.py": '"plots", "SET=torch_compile"',
    "validate_ablation_steps.sh": "ablab check",
}


@pytest.mark.parametrize("name", SHIMS)
def test_an_old_name_is_a_few_lines_over_a_verb(name):
    path = ROOT / "scripts" / name
    text = path.read_text()
    assert SHIMS[name] in text and len(text.splitlines()) <= 10 and path.stat().st_mode & 0o111


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["inspect_wandb_keys.py", "--run-name", "x"], 2, "SOURCE=wandb: of which project? add PROJECT="),
        (["inspect_wandb_keys.py", "--source", "trackio", "--project", "p", "--run-name", "x"], 1, "no such project"),
        (["inspect_wandb_keys.py", "SOURCE=local", "O=results", "SEL=nope"], 1, "nope: selects no trial"),
        (["validate_ablation_steps.sh", "STEP=nope"], 2, "STEP=nope"),
    ],
)
def test_an_old_name_ends_as_its_verb_does(tmp_path, words, code, said):
    interpreter = [sys.executable] if words[0].endswith(".py") else ["sh"]
    command = [*interpreter, str(ROOT / "scripts" / words[0]), *words[1:]]
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == code and said in done.stderr, done.stdout + done.stderr
