# SPDX-License-Identifier: MIT
"""The compiled kernels against torch bit for bit, and what happens where they cannot be had."""

import ctypes
import multiprocessing
import os
import shutil
import stat

import pytest
import torch

from ablab.prune._mask import Mask
from ablab.prune._threshold import LOW, around, cut, kept, keys
from ablab.rig import Rig
from ablab.tensor import native
from tests import trial as tiny_trial
from tests.prune import rig

needs_compiler = pytest.mark.skipif(not any(map(shutil.which, native.COMPILERS)), reason="no C++ compiler")
TINY = 'extern "C" int ablab_answer() { return 42; }\n'
PRUNED = "CONFIG_PRUNE_MAGNITUDE=y\nCONFIG_PRUNE_WARMUP=3\nCONFIG_PRUNE_INTERVAL=2"
STATE = "CONFIG_OPT_ADAMWPRUNE=y\nCONFIG_PRUNE_STATE=y\nCONFIG_PRUNE_WARMUP=3\nCONFIG_PRUNE_INTERVAL=2"
SPAM = "CONFIG_OPT_ADAMWSPAM=y\nCONFIG_OPT_ADAMWSPAM_GRACE=2\nCONFIG_OPT_ADAMWSPAM_INTERVAL=6"
SPAM += '\nCONFIG_OPT_ADAMWSPAM_REWARM=2\nCONFIG_OPT_ADAMWSPAM_THETA="3"'
BITS = "CONFIG_PRUNE_MASK_BITS=y"


@pytest.fixture(scope="module")
def lib():
    return native.ready()


@pytest.fixture(autouse=True)
def restored():
    before = native.InForce.lib, native.InForce.name
    yield
    native.InForce.lib, native.InForce.name = before


def same(a, b):
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


def draws(n, seed):
    """w, g, m, v, x with ordinary, zero, subnormal and huge entries."""
    stream = torch.Generator().manual_seed(seed)
    found = [torch.randn(n, generator=stream) * size for size in (0.1, 1e-3, 1e-4, 1e-8, 1e-8)]
    sizes = torch.tensor([1.0, 0.0, 1e-39, 1e15])
    for t in found:
        t *= sizes[torch.randint(4, (n,), generator=stream)] if seed % 2 else 1.0
    return [*found[:3], found[3].abs(), found[4].abs()]


@needs_compiler
@pytest.mark.parametrize("original", [False, True])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_adam_has_the_bits_of_torch(lib, original, amsgrad):
    step = torch._fused_adam_ if original else torch._fused_adamw_
    for case in range(40):
        n, t = 64 * (0, 1, 7, 16, 65)[case % 5], float(1 + case**2)
        rate = {"lr": (1e-3, 0.0)[case % 7 == 6], "weight_decay": (0.0, 0.1)[case % 3 > 0]}
        rule = {"beta1": (0.9, 0.51)[case % 4 == 3], "beta2": (0.95, 0.999)[case % 2], "eps": (1e-8, 1e-6)[case % 2]}
        count, scale = torch.tensor(t), torch.tensor(1.0 + case / 3) if case % 2 else None
        ours = [x for x in draws(n, case)[: 5 if amsgrad else 4]]
        theirs = [x.clone() for x in ours]
        lists = [[x] for x in theirs] + [[]] * (not amsgrad)
        flags = {"amsgrad": amsgrad, "maximize": False, "grad_scale": scale, "found_inf": torch.zeros(())}
        gradient = ours[1].clone()
        step(*lists, [count], **rate, **rule, **flags)
        lib.adam(ours, 0, None, (scale, torch.zeros(()), count), rate, rule, original)
        assert all(same(a, b) for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if i != 1), case
        assert same(ours[1], gradient)  # read alone


@needs_compiler
def test_a_refused_step_changes_nothing(lib):
    flats = draws(640, 1)
    flats[1][5], flats[1][6] = torch.nan, torch.inf
    before = [t.clone() for t in flats]
    rule = {"beta1": 0.9, "beta2": 0.95, "eps": 1e-8}
    scalars = None, torch.ones(()), torch.ones(())
    lib.adam(flats, 0, None, scalars, {"lr": 1.0, "weight_decay": 0.1}, rule, False)
    assert all(same(a, b) for a, b in zip(flats, before, strict=True))


@needs_compiler
@pytest.mark.parametrize("bits", [False, True])
@pytest.mark.parametrize(("start", "stop"), [(0, 4096 * 3), (64, 4096 * 2 + 13), (4096 + 128, 4096 + 131)])
def test_masks_norms_keys_and_steps_see_the_same_elements(lib, bits, start, stop):
    n = 3 * native.ROW
    w, g, m, v, _ = draws(n, 2)
    mask = Mask(slice(start, stop), bits, w.device)
    mask.put(slice(start, stop), torch.rand(stop - start, generator=torch.Generator().manual_seed(3)) > 0.4)
    wanted = g.clone()
    mask.apply(wanted)  # torch's
    got = g.clone()
    lib.mask(got[mask.span], start, mask.keep)
    assert same(got, wanted)
    assert lib.gone(mask.keep) == int((mask.at(mask.span) == 0).sum()) and lib.zeros(got) == int((got == 0).sum())
    rows = torch.linalg.vector_norm(wanted.view(-1, native.ROW), dim=1)
    assert same(lib.norms(g, mask.keep), rows)
    part = slice(64, n - 64)  # a group of parameters that ends elsewhere
    rule, rate = {"beta1": 0.9, "beta2": 0.95, "eps": 1e-8}, {"lr": 1e-3, "weight_decay": 0.1}
    scalars, found = (None, torch.zeros(()), torch.tensor(2.0)), []
    for gradient, keep in ((g, mask.keep), (wanted, None)):
        flats = [t.clone() for t in (w[part], gradient[part], m[part], v[part])]
        lib.adam(flats, part.start, keep, scalars, rate, rule, False)
        found.append([flats[0], *flats[2:]])
    assert all(same(a, b) for a, b in zip(*found, strict=True))
    inside = slice(start + start % 8, stop)
    for absolute in (False, True):
        ranked, wanted = native.Ranked(w[inside], inside.start, mask.keep, absolute), w[inside]
        wanted = keys(wanted.abs() if absolute else wanted, mask.words(inside))
        assert torch.equal(lib.keys(ranked), wanted)
        near, *counts = lib.near(ranked, 0, 1 << 29)
        assert torch.equal(near.sort().values, wanted[(wanted >= 0) & (wanted <= 1 << 29)].sort().values)
        assert counts == [int((wanted < 0).sum()), int((wanted == LOW).sum()), 0]


@needs_compiler
@pytest.mark.parametrize("bits", [False, True])
@pytest.mark.parametrize("kind", ["normal", "tied", "signed zeros", "subnormal"])
def test_the_cut_and_its_mask_are_those_of_torch(lib, bits, kind):
    for case in range(30):
        stream = torch.Generator().manual_seed(case)
        n = int(torch.randint(1, 5000, (), generator=stream))
        scores = {
            "normal": lambda n: torch.randn(n, generator=stream),
            "tied": lambda n: torch.randint(-2, 3, (n,), generator=stream).float(),
            "signed zeros": lambda n: torch.randint(-1, 2, (n,), generator=stream).float() * 0.0,
            "subnormal": lambda n: torch.randint(-9, 9, (n,), generator=stream).int().abs().view(torch.float32),
        }[kind](n)
        k = (0, n, n - 1, int(torch.randint(0, n + 1, (), generator=stream)))[case % 4]
        pieces = [slice(a, min(a + 1024, n)) for a in range(0, n, 1024)]
        native.InForce.lib = None
        plain = [keys(scores[p]) for p in pieces]
        where, seen, wanted = cut(lambda: iter(plain), k), 0, Mask(slice(0, n), bits, scores.device)
        for p, c in zip(pieces, plain, strict=True):
            stay, seen = kept(c, where, seen)
            wanted.put(p, stay)
        native.InForce.lib = lib
        found = [native.Ranked(scores[p], p.start, None) for p in pieces]
        assert cut(lambda: iter(found), k) == where
        for guess in (around(keys(scores)[::3], k / n), (LOW + 1, -LOW - 1), (5, 5)):
            assert cut(lambda: iter(found), k, guess) == where
        got, seen = Mask(slice(0, n), bits, scores.device), 0
        for c in found:
            seen += lib.put(c, where.key, where.ties - seen, got.keep)
        assert torch.equal(got.held, wanted.held), case


TRIALS = [
    PRUNED,
    f"{PRUNED}\n{BITS}",
    f"{PRUNED}\nCONFIG_PRUNE_SCOPE_WEIGHTS=y",
    f"{PRUNED}\nCONFIG_PRUNE_PATTERN_2OF4=y",
    PRUNED.replace("MAGNITUDE", "MOVEMENT"),
    STATE,
    f"{STATE}\n{BITS}\nCONFIG_PRUNE_STATE_SCORE_BITTER5=y",
    f"CONFIG_OPT_ADAM=y\n{PRUNED}",
    f"CONFIG_OPT_ADAMWADV=y\n{PRUNED}",
    f"CONFIG_OPT_SGD=y\n{PRUNED}",
    f"CONFIG_OPT_SINKGD=y\n{PRUNED}",
    f"{SPAM}\n{PRUNED}",
    f"{SPAM}\nCONFIG_OPT_ADAMWSPAM_PROFILE_LAB=y\n{PRUNED}\n{BITS}",
    "CONFIG_OPT_ADAMW=y\nCONFIG_OPT_IMPL_FOREACH=y",
]


@needs_compiler
@pytest.mark.parametrize("extra", TRIALS)
def test_a_trial_has_the_same_bits_with_kernels_that_change_from_step_to_step(lib, extra):
    """So a trial may go on where there are none."""

    def run(choose):
        _, built, pruner = rig.made(extra, 12)
        for t in range(1, 13):
            native.InForce.lib = choose(t)
            rig.train(built, pruner, t, t, 12)
        tally = {"spikes": getattr(built.optimizer, "tally", torch.zeros(1))}
        return {**dict(built.model.named_parameters()), **built.optimizer.flats, **pruner.state(), **tally}

    wanted = run(lambda t: None)
    for choose in (lambda t: lib, lambda t: lib if t % 2 else None):
        found = run(choose)
        odd = [name for name, t in wanted.items() if not torch.equal(t, found[name])]
        assert not odd
    assert "spike" not in extra.lower() or wanted["spikes"][0] > 0


@needs_compiler
def test_clipped_spikes_are_those_of_torch_and_nan_is_seen(lib):
    _, built, _ = rig.made(SPAM, 12)
    optimizer, size = built.optimizer, len(built.optimizer.arena.grads)
    optimizer.flats["exp_avg_sq"].copy_(torch.rand(len(optimizer.arena.weights)) * 1e-6)
    draw = torch.randn(size) * 2e-3
    draw[7], draw[8] = torch.nan, torch.inf
    found = []
    for kernels in (None, lib):
        native.InForce.lib = kernels
        optimizer.arena.grads.copy_(draw)
        optimizer.number = 4
        optimizer.limit()
        found.append((optimizer.arena.grads.clone(), int(optimizer.spikes)))
    (a, n), (b, k) = found
    assert n == k > 100 and same(a.nan_to_num(), b.nan_to_num()) and torch.equal(a.isnan(), b.isnan())
    assert a[7].isnan() and a[8].isnan()


@needs_compiler
def test_threads_do_not_change_bits(lib):
    found, before = [], torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        w, g, m, v, _ = draws(1 << 17, 4)
        lib.adam((w, g, m, v), 0, None, (None, None, torch.ones(())), {"lr": 1e-3, "weight_decay": 0.0},
                 {"beta1": 0.9, "beta2": 0.95, "eps": 1e-8}, False)  # fmt: skip
        bins = torch.zeros(native.WAYS * threads, 1 << 16, dtype=torch.int32)
        lib.count(lib.keys(native.Ranked(w, 0, None)), bins)
        found.append((w, m, v, lib.norms(g, None), bins.sum(0).float()))
    torch.set_num_threads(before)
    assert all(same(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def _forked(queue):
    """One core and two threads in a process forked from one that has not run two yet."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(2)
    w = torch.ones(1 << 16)
    queue.put(native.ready().zeros(w))


@needs_compiler
def test_a_forked_process_with_fewer_cores_than_threads_does_not_hang():
    context = multiprocessing.get_context("forkserver")
    queue = context.Queue()
    child = context.Process(target=_forked, args=(queue,))
    child.start()
    assert queue.get(timeout=300) == 0
    child.join(60)
    assert child.exitcode == 0


def _built(where, source, queue):
    queue.put(native._library(shutil.which("g++") or shutil.which("c++"), where, source))


@pytest.fixture
def tiny(tmp_path):
    source = tmp_path / "tiny.cpp"
    source.write_text(TINY)
    return source


@needs_compiler
def test_processes_that_build_at_once_all_get_a_library(tmp_path, tiny):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    children = [context.Process(target=_built, args=(tmp_path / "cache", tiny, queue)) for _ in range(4)]
    for child in children:
        child.start()
    paths = [queue.get(timeout=120) for _ in children]
    for child in children:
        child.join()
    assert all(ctypes.CDLL(str(p)).ablab_answer() == 42 for p in paths)
    assert {p.suffix for p in (tmp_path / "cache").iterdir()} == {".so"}  # nothing half done is left


@needs_compiler
def test_a_library_that_is_not_what_its_name_says_is_built_anew(tmp_path, tiny):
    compiler = shutil.which("g++") or shutil.which("c++")
    path = native._library(compiler, tmp_path / "cache", tiny)
    stamp = path.stat().st_mtime_ns
    assert native._library(compiler, tmp_path / "cache", tiny) == path and path.stat().st_mtime_ns == stamp
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    again = native._library(compiler, tmp_path / "cache", tiny)
    assert again.stem.endswith(native._hash(again)) and ctypes.CDLL(str(again)).ablab_answer() == 42
    tiny.write_text(TINY.replace("42", "43"))
    assert native._library(compiler, tmp_path / "cache", tiny) != again  # another source, another name


@needs_compiler
def test_a_folder_that_others_can_write_is_refused(tmp_path, tiny):
    place = tmp_path / "cache"
    place.mkdir(mode=0o777)
    place.chmod(0o777)
    with pytest.raises(native.NativeError, match="written by other users"):
        native._library(shutil.which("g++") or shutil.which("c++"), place, tiny)


def fake(folder, text):
    """A g++ alone on the path."""
    folder.mkdir(exist_ok=True)
    (folder / "g++").write_text(f"#!/bin/sh\n{text}\n")
    (folder / "g++").chmod(stat.S_IRWXU)
    return str(folder)


@pytest.mark.parametrize(
    ("script", "text"),
    [
        ("echo 'native.cpp:1: error: no such thing' >&2; exit 1", "no such thing"),
        ("exit 0", "no output"),
        (None, "no C\\+\\+ compiler among g\\+\\+"),
    ],
)
def test_a_compiler_that_fails_means_torch_said_aloud_or_a_refusal(monkeypatch, tmp_path, capsys, script, text):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", fake(tmp_path / "bin", script) if script else str(tmp_path))
    native.settle(True)
    assert native.InForce.lib is None and native.InForce.name.startswith("torch: ")
    assert "no native kernels: " in capsys.readouterr().out
    with pytest.raises(native.NativeError, match=f"{text}.*CONFIG_SYS_NATIVE_OFF=y"):
        native.settle(True, needed=True)
    asked = tiny_trial.settled(tmp_path, "CONFIG_SYS_NATIVE_ON=y")
    with pytest.raises(native.NativeError, match=text):  # in a stage of the dry run whose refusal is exit 2
        Rig(asked.values, asked.where, tmp_path).bind()
    native.settle(False)
    assert native.InForce.name == "torch" and not capsys.readouterr().out


@needs_compiler
def test_kernels_with_other_bits_are_refused(tmp_path):
    source = tmp_path / "other.cpp"
    text = native.SOURCE.read_text()
    fused = "__builtin_fmaf(c.rest2 * grad, grad, v[i] * c.beta2)"
    assert fused in text
    source.write_text(text.replace(fused, "c.rest2 * grad * grad + v[i] * c.beta2"))
    with pytest.raises(native.NativeError, match="not bit-equal to torch .*: adam adamw"):
        native.ready(where=tmp_path / "cache", source=source)
