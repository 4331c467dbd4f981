# SPDX-License-Identifier: MIT
"""Commit, patch, hashes of the sources, versions and the environment that is recorded."""

import hashlib
import os
import platform
import subprocess
import sys
from importlib import metadata

import pytest

from ablab import provenance
from ablab.provenance import code, environment, patch, software, tree

FILES = {
    "Kconfig": "mainmenu\n",
    "ablab/__init__.py": "# one\n",
    "ablab/model/gpt.py": "x = 1\ny = 2\n",
    "ablab/model/Kconfig": "menu\n",
    "studies/ra.study": "base tiny\n",
    "README.md": "text\n",
}


def git(root, *argv):
    names = ("-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "init.defaultBranch=main")
    env = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
    return subprocess.run(["git", *names, *argv], cwd=root, env=env, capture_output=True, check=True).stdout


@pytest.fixture
def root(tmp_path):
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


@pytest.fixture
def repo(root):
    git(root, "init", "-q")
    (root / ".gitignore").write_text("results/\n")
    git(root, "add", "-A")
    git(root, "commit", "-qm", "one")
    return root


def test_a_clean_checkout_is_its_commit(repo):
    head = git(repo, "rev-parse", "HEAD").decode().strip()
    (repo / "results").mkdir()
    (repo / "results" / "x").write_text("ignored")
    (repo / "notes.txt").write_text("untracked, but no source")
    assert code(repo) == {"commit": head, "dirty": False, "patch": None, "tree": tree(repo)}


def change(repo, what):
    if what == "edited":
        (repo / "ablab/model/gpt.py").write_text("x = 1\ny = 3")
    elif what == "staged":
        (repo / "README.md").write_text("other\n")
        git(repo, "add", "README.md")
    elif what == "deleted":
        (repo / "studies/ra.study").unlink()
    elif what == "untracked":
        (repo / "ablab/model/caf\u00e9 x.py").write_text("z = 'caf\u00e9'\n\nw = 1")
        (repo / "ablab/model/empty.py").write_text("")
    elif what == "binary":
        (repo / "README.md").write_bytes(bytes(range(256)))


@pytest.mark.parametrize("what", ["edited", "staged", "deleted", "untracked", "binary"])
def test_the_patch_turns_the_commit_into_the_tree_that_ran(repo, tmp_path_factory, what):
    change(repo, what)
    found, text = code(repo), patch(repo)
    assert found["dirty"] and found["patch"] == hashlib.sha256(text).hexdigest()
    clone = tmp_path_factory.mktemp("clone")
    git(clone, "clone", "-q", str(repo), ".")
    (clone.parent / "code.patch").write_bytes(text)
    git(clone, "apply", str(clone.parent / "code.patch"))
    assert tree(clone) == found["tree"]
    names = [p for p in repo.rglob("*") if p.is_file() and ".git" not in p.parts]
    assert {p.relative_to(repo): p.read_bytes() for p in names} == {
        p.relative_to(clone): p.read_bytes() for p in clone.rglob("*") if p.is_file() and ".git" not in p.parts
    }


def test_a_checkout_without_a_commit_has_a_patch_of_everything(root):
    git(root, "init", "-q")
    found = code(root)
    assert found["commit"] is None and found["dirty"]
    assert found["patch"] == hashlib.sha256(patch(root)).hexdigest() and b"+x = 1" in patch(root)


def test_without_git_nothing_is_claimed(root):
    assert code(root) == {"commit": None, "dirty": True, "patch": None, "tree": tree(root)}


def test_the_variables_of_a_hook_do_not_lead_to_another_repository(repo, tmp_path_factory, monkeypatch):
    other = tmp_path_factory.mktemp("other")
    git(other, "init", "-q")
    monkeypatch.setenv("GIT_DIR", str(other / ".git"))
    monkeypatch.setenv("GIT_WORK_TREE", str(other))
    assert code(repo)["commit"] == git(repo, "rev-parse", "HEAD").decode().strip()


def test_recording_changes_nothing_in_the_repository(repo):
    change(repo, "edited")
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in repo.rglob("*") if p.is_file()}
    assert code(repo)["dirty"]
    assert {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in repo.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("ablab/model/gpt.py", True),
        ("ablab/model/Kconfig", True),
        ("ablab/Kconfig.train", True),
        ("Kconfig", True),
        ("ablab/model/__pycache__/gpt.py", False),
        ("ablab/notes.txt", False),
        ("README.md", False),
        ("tests/x.py", False),
    ],
)
def test_the_tree_hash_covers_code_and_kconfig_and_nothing_else(root, name, counts):
    before = tree(root)
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text("something else\n")
    assert (tree(root) != before) is counts


def test_the_tree_hash_is_the_documented_one_and_sees_a_renamed_file(root):
    names = ["Kconfig", "ablab/__init__.py", "ablab/model/Kconfig", "ablab/model/gpt.py"]
    lines = [f"{n}\0{hashlib.sha256(FILES[n].encode()).hexdigest()}\n" for n in names]
    assert tree(root) == hashlib.sha256("".join(lines).encode()).hexdigest()
    (root / "ablab/model/gpt.py").rename(root / "ablab/model/gpt2.py")
    assert tree(root) != hashlib.sha256("".join(lines).encode()).hexdigest()


def test_software_is_what_is_installed_and_torch_is_not_imported():
    found = software()
    assert found["python"] == platform.python_version() and found["torch"] == metadata.version("torch")
    assert found["kernel"] == platform.release() and found["packages"]["kconfiglib"] == "14.1.0"
    assert len(found["lock"]) == 64 and found == software()
    run = "import sys; from ablab import provenance as p; p.software(); p.code(); print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", run], capture_output=True, text=True, check=True, cwd=provenance.ROOT)
    assert out.stdout == "False\n"


def test_the_cuda_version_is_read_from_the_text_of_torch(tmp_path, monkeypatch):
    text = "cuda: Optional[str] = '12.8'\nhip: Optional[str] = None\nxpu: Optional[str] = None\n"
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "version.py").write_text(text)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    assert (software()["cuda"], software()["hip"]) == ("12.8", None)


def test_only_listed_variables_are_recorded_and_no_secret():
    kept = {
        "OMP_NUM_THREADS": "2",
        "CUDA_VISIBLE_DEVICES": "0",
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "WANDB_MODE": "offline",
        "SLURM_JOB_ID": "7",
    }
    dropped = {
        "WANDB_API_KEY": "1",
        "HF_TOKEN": "1",
        "HOME": "/root",
        "AWS_SECRET_ACCESS_KEY": "1",
        "CUDA_TOKEN": "1",
        "TORCH_PASSWD": "1",
        "NCCL_secret": "1",
        "HTTP_PROXY": "http://user:pw@host",
        "MY_OMP_NUM_THREADS": "1",
    }
    assert environment({**kept, **dropped}) == dict(sorted(kept.items()))
