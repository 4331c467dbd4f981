# SPDX-License-Identifier: MIT
"""Imports point down only: core, tensor, families, training side, runner and report, verbs."""

import ast
from pathlib import Path

import pytest

from ablab.plugin import FAMILIES

ROOT = Path(__file__).parents[2]
L0 = {
    "kconf",
    "configure",
    "bind",
    "plugin",
    "study",
    "plan",
    "journal",
    "rundir",
    "provenance",
    "machine",
    "metrics",
}
L2 = {
    "config",
    "auto",
    "build",
    "train",
    "attempt",
    "record",
    "window",
    "evaluate",
    "checkpoint",
    "check",
    "rig",
    "dist",
    "forecast",
    "infer",
    "sampler",
    "peaks",
}
L3 = {"run", "report", "verify"}
OUTSIDE = {"torch", "numpy", "safetensors", "kconfiglib", "menuconfig", "matplotlib", "tiktoken", "datasets"}
TRACKERS = {"trackio", "wandb", "tensorboard"}


def layer(module: str) -> str:
    """`ablab.attention.mha` -> `family`; the name of the layer a module belongs to."""
    parts = module.split(".")
    if len(parts) < 2:
        return "L0"
    head = parts[1]
    if head in L0 or head == "setup":
        return "L0"
    if head == "tensor":
        return "tensor"
    if head in FAMILIES.values():
        return "family"
    if head in L2:
        return "L2"
    if head in L3:
        return "L3"
    return {"__main__": "L4"}[head]


def imports(tree: ast.AST, module: str) -> set[str]:
    """Absolute names that a module imports anywhere, functions included."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return found


def breaches(module: str, source: str) -> list[str]:
    """What a module imports and must not."""
    mine, found = layer(module), []
    for name in sorted(imports(ast.parse(source), module)):
        head = name.split(".")[0]
        if head == "ablab":
            theirs = layer(name)
            allowed = {
                "L0": {"L0"},
                "tensor": {"tensor"} | ({"L0"} if name.startswith(("ablab.plugin", "ablab.machine")) else set()),
                "family": {"L0", "tensor"},
                "L2": {"L0", "tensor", "family", "L2"},
                "L3": {"L0", "L3"},
                "L4": {"L0", "tensor", "family", "L2", "L3", "L4"},
            }[mine]
            family = module.split(".")[1] if mine == "family" else ""
            if theirs not in allowed and not (mine == theirs == "family" and name.split(".")[1] == family):
                found.append(f"{module} ({mine}) imports {name} ({theirs})")
            if mine == "L2" and theirs == "family" and len(name.split(".")) > 2:
                member = ROOT / (name.replace(".", "/") + ".py")
                if member.exists() and not member.name.startswith("_"):
                    found.append(f"{module} imports the member {name}; go through plugin.find")
        elif head in TRACKERS:
            if module not in (f"ablab.track.{head}", f"ablab.report._{head}"):  # both are processes of their own
                found.append(f"{module} imports {name}; only the member of a tracker does")
        elif head in OUTSIDE:
            allowed = {
                "L0": {"kconfiglib", "menuconfig"} if module in ("ablab.kconf", "ablab.configure") else set(),
                "L3": {"numpy", "matplotlib"} if module.startswith("ablab.report") else set(),
                "L4": set(),
            }
            if mine in allowed and head not in allowed[mine]:
                found.append(f"{module} ({mine}) imports {name}")
    return found


def modules() -> dict[str, str]:
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path.read_text()
        for path in sorted((ROOT / "ablab").rglob("*.py"))
    }


def test_imports_point_down():
    assert [b for module, source in modules().items() for b in breaches(module, source)] == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("ablab.kconf", "import torch"),
        ("ablab.plan", "def f():\n    from ablab.train import main"),
        ("ablab.attention.mha", "from ablab.mlp import Mlp"),
        ("ablab.run.local", "import torch"),
        ("ablab.report.table", "from ablab import evaluate"),
        ("ablab.tensor.stage", "from ablab import kconf"),
        ("ablab.train", "from ablab.optim.adamw import Adamw"),
        ("ablab.track._mirror", "def f():\n    import wandb"),
        ("ablab.run.mirror", "from ablab.track import Track"),
    ],
)
def test_a_breach_is_seen(module, source):
    assert breaches(module, source)


def test_no_import_cycle():
    known = modules()
    edges = {}
    for module, source in known.items():
        names = imports(ast.parse(source), module)
        edges[module] = {n for n in names if n in known and n != module and n != "ablab"}
    done, path = set(), []

    def visit(module: str) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module in done:
            return
        path.append(module)
        for name in sorted(edges[module]):
            # a package and its own files may know each other: the base class lives in __init__
            if not (module.startswith(name + ".") or name.startswith(module + ".")):
                visit(name)
        path.pop()
        done.add(module)

    for module in known:
        visit(module)
    assert len(done) == len(known)
