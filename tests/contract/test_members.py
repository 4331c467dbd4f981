# SPDX-License-Identifier: MIT
"""Conformance of attention and MLP members: a new one is covered by existing, with no line added here.

Each runs on top of the default model at test sizes, with what it depends on.  Tests of behaviour run at a point away
from init, where a mechanism that starts as the identity shows.  fp64 on one thread: what can be equal is equal.
"""

import copy
import itertools
from dataclasses import dataclass
from functools import cache, partial
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from ablab import config, kconf, plugin
from ablab.attention import Attention
from ablab.model import fingerprint
from ablab.tensor.stage import Coupling, Gate, Part, Past
from tests.blocks import SIZES, assemble, block_members, perturbed, tokens, values

T = SIZES["MODEL_GPT_BLOCK"]
CUTS = (1, 7, 16, T - 1)
MEMBERS = block_members()
SWITCHES = [s for s in MEMBERS if kconf.load().symbols[s].choice is None]
CHOICES = [s for s in MEMBERS if s not in SWITCHES]
PLANTED = {"ATTN_PLANTED": True, "ATTN_PLANTED_WIDTH": 3}
# torch 2.13 warns at itself when it compiles an autograd Function
COMPILE = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


@cache
def typed(*symbols):
    """Values of the default model with members on, and what they need; None where they exclude one another.

    A case may be several words, and a word SYMBOL=n.
    """
    tree, asked = kconf.load(), {}
    for word in (w for case in symbols for w in case.split() if w not in PLANTED):
        symbol, _, off = word.partition("=")
        base = [kconf.parse("test", enumerate(lines(asked), 1), "test")]
        needs = kconf.remedy(tree, base, kconf.Request(symbol, off or "y", "test"))
        if needs is None:
            return None
        asked |= {r.name: r.text == "y" for r in needs} | {symbol: not off}
    try:
        return values(**asked) | (PLANTED if set(symbols) & set(PLANTED) else {})
    except kconf.ConfigError:  # what one needs excludes another
        return None


def lines(asked):
    return [f"CONFIG_{s}={'y' if on else 'n'}" for s, on in asked.items()]


def make(*symbols, seed=1, probe=True, **changes):
    net = assemble({**typed(*symbols), **changes}, seed).double()
    return perturbed(net) if probe else net


def parts(net):
    return [m for m in net.modules() if isinstance(m, Part)]


def gradients(net, *batch):
    return torch.autograd.grad(net(*batch).loss, list(net.parameters()))


def assert_close(got, want, tolerance=1e-10):
    for a, b in zip(got, want, strict=True):
        assert (a - b).abs().max() <= tolerance


def subsets():
    """Every subset of the switches on every choice; beyond seven switches, each pair, none and all."""
    sizes = range(len(SWITCHES) + 1) if len(SWITCHES) <= 7 else (0, 1, 2, len(SWITCHES))
    chosen = [c for n in sizes for c in itertools.combinations(SWITCHES, n)]
    cases = [(choice, *c) for choice in CHOICES for c in chosen]
    return [c for c in cases if typed(*c) is not None and all(typed(*c).get(s) is True for s in c)]


def variants(symbol):
    """The member with one choice or bool of its own changed: each alternative that builds."""
    infos, found = kconf.load().symbols, []
    for name, value in typed(symbol).items():
        if name.startswith(f"{symbol}_") and isinstance(value, bool) and not (value and infos[name].choice):
            case = f"{symbol} {name}{'=n' * value}"
            try:
                assemble(typed(case))
            except ValueError:
                continue  # the member refuses it, by a rule of its own
            found.append(case)
    return found


every = pytest.mark.parametrize("symbol", MEMBERS)
every_variant = pytest.mark.parametrize("symbol", MEMBERS + [v for s in MEMBERS for v in variants(s)])


@every_variant
def test_a_changed_suffix_leaves_earlier_logits_equal(symbol):
    net, x = make(symbol), tokens(2, T)
    full = net(x).logits
    for cut in CUTS:
        other = torch.cat([x[:, :cut], tokens(2, T - cut, seed=cut)], 1)
        got = net(other).logits
        assert torch.equal(got[:, :cut], full[:, :cut]), cut
        assert not torch.equal(got[:, cut:], full[:, cut:])


@every_variant
def test_a_prefix_alone_gives_the_logits_of_the_full_run(symbol):
    net, x = make(symbol), tokens(2, T)
    full = net(x).logits
    for t in (1, 2, 5, 6, 7, 23):
        assert_close([net(x[:, :t]).logits], [full[:, :t]])


@every
def test_forward_is_pure(symbol):
    net, x = make(symbol), tokens(3, T)
    buffers, state = {n: b.clone() for n, b in net.named_buffers()}, torch.get_rng_state()
    first = net(x).logits
    assert_close([net(x[:1]).logits], [first[:1]], 1e-12)  # another batch size; rows do not see each other
    assert torch.equal(net(x).logits, first)
    assert all(torch.equal(b, buffers[n]) for n, b in net.named_buffers())
    assert torch.equal(torch.get_rng_state(), state)


@every_variant
def test_every_parameter_lives_within_two_steps(symbol):
    net, x = make(symbol, probe=False), tokens(4, T)
    seen = dict.fromkeys((n for n, _ in net.named_parameters()), False)
    for step in range(2):
        net.zero_grad()
        net(x, tokens(4, T, seed=step + 1)).loss.backward()
        for name, p in net.named_parameters():
            assert p.grad is not None and torch.isfinite(p.grad).all(), name
            seen[name] |= bool((p.grad != 0).any())
        with torch.no_grad():
            for p in net.parameters():
                p.sub_(0.1 * p.grad)
    assert [n for n, alive in seen.items() if not alive] == []


@every
def test_micro_batches_accumulate_to_the_large_batch(symbol):
    one, two = make(symbol), make(symbol)
    x, y = tokens(4, T), tokens(4, T, seed=1)
    for _ in range(2):
        one(x, y).loss.backward()
        for half in (slice(2), slice(2, 4)):
            (two(x[half], y[half]).loss / 2).backward()
        for net in (one, two):
            with torch.no_grad():
                for p in net.parameters():
                    p.sub_(0.1 * p.grad)
            net.zero_grad()
    assert_close(two.parameters(), one.parameters())


@every
def test_recomputed_blocks_give_equal_gradients(symbol):
    net, x = make(symbol, MODEL_GPT_DROPOUT=0.2), tokens(2, T)
    torch.manual_seed(0)
    want = gradients(net, x, x)
    for block in net.blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    torch.manual_seed(0)
    assert_close(gradients(net, x, x), want)


@COMPILE
@every
def test_compiled_equals_eager(symbol):
    net, x = make(symbol), tokens(2, T)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    assert_close(gradients(compiled, x, x), gradients(net, x, x))
    torch._dynamo.reset()


@COMPILE
@every
def test_compiled_and_recomputed_equals_eager(symbol):
    net, x = make(symbol), tokens(2, T)
    want = gradients(net, x, x)
    for block in net.blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    assert_close(gradients(compiled, x, x), want)
    torch._dynamo.reset()


@every_variant
def test_cached_decode_equals_the_full_forward(symbol):
    net, x = make(symbol).eval(), tokens(2, T)
    past = Past(T)
    with torch.no_grad():
        full = net(x).logits
        got = [net(x[:, :9], past=past).logits]
        got += [net(x[:, t : t + 1], past=past).logits for t in range(9, T)]
    assert_close([torch.cat(got, 1)], [full[:, 8:]])
    assert past.length == T
    for layer, block in enumerate(net.blocks):
        declared = {name for m in block.modules() if isinstance(m, Part) for name in m.caches}
        assert {name for where, name in past.fields if where == layer} == declared


@every
def test_save_and_load_into_another_seed_continue_equally(symbol, tmp_path):
    net, other, x = make(symbol), make(symbol, seed=2), tokens(2, T)
    save_file(net.state_dict(), tmp_path / "model.safetensors")
    other.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=True)
    assert list(other.state_dict()) == list(net.state_dict())
    for n in (net, other):
        n(x, x).loss.backward()
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(p - 0.1 * p.grad, q - 0.1 * q.grad)


@every
def test_a_copy_shares_nothing(symbol):
    net, x = make(symbol), tokens(2, T)
    twin, before = copy.deepcopy(net), net(x).logits
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    assert torch.equal(net(x).logits, before) and not twin(x).logits.any()


@every
def test_meta_build_has_the_same_tensors(symbol):
    with torch.device("meta"):
        light = assemble(typed(symbol))
    real = make(symbol)
    assert [(n, p.shape) for n, p in light.named_parameters()] == [(n, p.shape) for n, p in real.named_parameters()]
    assert light.facts() == real.facts()


@every
def test_shared_tensors_start_equal_to_the_host(symbol):
    host, net = assemble(values()).state_dict(), assemble(typed(symbol)).state_dict()
    shared = [n for n in host if n in net and host[n].shape == net[n].shape]
    assert len(shared) >= 20 and all(torch.equal(host[n], net[n]) for n in shared)


def member(symbol):
    return next(m for f in ("ATTN", "MLP") for m in config.create(f, typed(symbol)) if m.symbol == symbol)


def without(symbol, net):
    """The host: the same model and tensors, the member switched off."""
    host = make(**{**typed(symbol), symbol: False})
    host.load_state_dict(net.state_dict(), strict=False)
    return host


@every
def test_identity_members_start_as_their_host(symbol):
    net, x = make(symbol, probe=False), tokens(2, T)
    assert any(p.symbol == symbol for p in parts(net))
    if member(symbol).identity:
        host = assemble({**typed(symbol), symbol: False}).double()
        assert torch.equal(net(x).logits, host(x).logits)


@every
def test_without_coupling_a_coupled_member_is_its_host(symbol):
    net, x = make(symbol), tokens(2, T)
    mine = [p for p in parts(net) if p.symbol == symbol]
    assert mine and all(p.couples == member(symbol).couples for p in mine)
    assert member(symbol).couples == any(Coupling in p.reads + p.takes for p in mine)
    if member(symbol).couples:
        host = without(symbol, net)(x).logits
        assert not torch.equal(net(x).logits, host)
        net.lam.fill_(0.0)
        assert_close([net(x).logits], [host], 1e-12)


@every
@pytest.mark.parametrize("bias", [True, False])
def test_declared_size_is_what_was_built(symbol, bias):
    net = assemble({**typed(symbol), "MODEL_GPT_BIAS": bias})
    clauses = [c for c in member(symbol).contracts() if c.name == f"params/{symbol}"]
    assert all(c.judge(SimpleNamespace(model=net))["ok"] for c in clauses)
    next(p for p in parts(net) if p.symbol == symbol).extra = torch.nn.Parameter(torch.ones(1))
    assert not any(c.judge(SimpleNamespace(model=net))["ok"] for c in clauses)  # one number too many is seen


@every
def test_every_part_that_it_makes_is_in_the_model(symbol):
    got = typed(symbol)
    net = assemble(got)
    (member,) = [m for f in ("ATTN", "MLP") for m in config.create(f, got) if m.symbol == symbol]
    (clause,) = [c for c in member.contracts() if c.name == f"modules/{symbol}"]
    assert clause.judge(SimpleNamespace(model=net))["ok"]
    next(p for p in parts(net) if p.symbol == symbol).symbol = ""
    assert not clause.judge(SimpleNamespace(model=net))["ok"]  # one that is missing is seen


class Reads:
    """A Config that notes which fields are read."""

    def __init__(self, inner):
        self._inner, self._read = inner, set()

    def __getattr__(self, name):
        self._read.add(name)
        return getattr(self._inner, name)


@every
def test_every_field_is_read(symbol):
    got = typed(symbol)
    (model,) = config.create("MODEL", got)
    families = {f: config.create(f, got) for f in ("ATTN", "MLP")}
    (mine,) = [m for ms in families.values() for m in ms if m.symbol == symbol]
    mine.config = Reads(mine.config)
    net = model.build(families["ATTN"], families["MLP"], 1)
    net(tokens(2, 8), tokens(2, 8)).loss.backward()
    assert mine.config._read >= set(type(mine).Config.__dataclass_fields__)


class Squares(TorchDispatchMode):
    """Notes ops with an output that has two axes of `limit` or more."""

    def __init__(self, limit):
        super().__init__()
        self.limit, self.found = limit, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else (out,):
            if isinstance(t, torch.Tensor) and sum(n >= self.limit for n in t.shape) > 1:
                self.found.add(str(func))
        return out


@every_variant
def test_no_op_forms_a_square_of_the_sequence(symbol):
    long = 257  # above every width and the vocabulary of the test model
    net, x = make(symbol, MODEL_GPT_BLOCK=long), tokens(1, long)
    with Squares(long) as seen:
        net(x, x).loss.backward()
    assert seen.found == set()


@pytest.mark.parametrize("case", subsets(), ids="+".join)
def test_every_subset_runs_in_the_same_hosts(case):
    net, x = make(*case), tokens(2, T)
    assert all(torch.isfinite(g).all() and (g != 0).any() for g in gradients(net, x, x))
    other = torch.cat([x[:, :20], tokens(2, 20, seed=3)], 1)
    assert torch.equal(net(other).logits[:, :20], net(x).logits[:, :20])


def test_no_two_subsets_build_the_same_model():
    seen = {}
    for case in subsets():
        on = frozenset(s for s in MEMBERS if typed(*case).get(s) is True)  # a member may be hidden
        seen.setdefault(fingerprint(assemble(typed(*case))), set()).add(on)
    assert all(len(cases) == 1 for cases in seen.values())


class Fault(Gate):
    """A part with a fault that one test must see."""

    def __init__(self, dims):
        super().__init__()
        self.g = torch.nn.Parameter(torch.zeros(()))
        self.last = 0.0

    def forward(self, m, h, ctx):
        return m._replace(y_BHTV=self.change(m.y_BHTV, h)), ctx


class Sound(Fault):
    """Without one."""

    def change(self, y_BHTV, h):
        return y_BHTV * (1 + self.g)


class Pooled(Fault):
    """Averages over the whole sequence."""

    def change(self, y_BHTV, h):
        return y_BHTV * (1 + self.g * y_BHTV.mean(2, keepdim=True))


class Crowd(Fault):
    """Averages over the batch."""

    def change(self, y_BHTV, h):
        return y_BHTV + self.g * y_BHTV.mean(0, keepdim=True)


class Memory(Fault):
    """Keeps a value for the next call."""

    def change(self, y_BHTV, h):
        before, self.last = self.last, y_BHTV.detach().mean()
        return y_BHTV * (1 + self.g + before)


class Dead(Fault):
    """Has a parameter that nothing uses."""

    def change(self, y_BHTV, h):
        return y_BHTV


class Shift(Fault):
    """Reads the token before it and does not cache it."""

    def change(self, y_BHTV, h):
        return y_BHTV + (1 + self.g) * torch.nn.functional.pad(y_BHTV, (0, 0, 1, 0))[:, :, :-1]


class Dense(Fault):
    """Forms the T x T matrix."""

    def change(self, y_BHTV, h):
        return y_BHTV + self.g * (h.q_BHTK @ h.k_BHTK.mT).tril() @ h.v_BHTV


class Noise(Fault):
    """Draws at random in a forward pass."""

    def change(self, y_BHTV, h):
        return y_BHTV * (1 + self.g + 0.1 * torch.rand(()))


class Coupled(Fault):
    """Without a fault, and at rest while the coupling strength is 0."""

    couples = True
    reads = (Coupling,)

    def forward(self, m, h, ctx):
        return m._replace(y_BHTV=m.y_BHTV * (1 + ctx.one(Coupling).lam * self.g)), ctx


class Deaf(Coupled):
    """Reads the coupling strength and does not heed it."""

    forward = Sound.forward
    change = Sound.change


class Mute(Sound):
    """Says that it couples and reads no strength."""

    couples = True


@pytest.mark.parametrize(
    ("fault", "check"),
    [
        (Pooled, test_a_changed_suffix_leaves_earlier_logits_equal),
        (Pooled, test_a_prefix_alone_gives_the_logits_of_the_full_run),
        (Crowd, test_forward_is_pure),
        (Memory, test_forward_is_pure),
        (Noise, test_forward_is_pure),
        (Dead, test_every_parameter_lives_within_two_steps),
        (Shift, test_cached_decode_equals_the_full_forward),
        (Dense, test_no_op_forms_a_square_of_the_sequence),
        (Pooled, test_every_field_is_read),
        (Shift, test_identity_members_start_as_their_host),
        (Deaf, test_without_coupling_a_coupled_member_is_its_host),
        (Mute, test_without_coupling_a_coupled_member_is_its_host),
        (Sound, test_a_changed_suffix_leaves_earlier_logits_equal),
        (Sound, test_forward_is_pure),
        (Sound, test_every_parameter_lives_within_two_steps),
        (Sound, test_cached_decode_equals_the_full_forward),
        (Sound, test_no_op_forms_a_square_of_the_sequence),
        (Sound, test_identity_members_start_as_their_host),
        (Coupled, test_identity_members_start_as_their_host),
        (Coupled, test_without_coupling_a_coupled_member_is_its_host),
    ],
    ids=lambda x: x.__name__,
)
def test_a_planted_fault_is_seen_and_a_sound_part_passes(fault, check):
    class Planted(Attention, symbol="ATTN_PLANTED"):
        couples = fault.couples
        identity = True  # which Shift belies

        @dataclass(frozen=True, slots=True, kw_only=True)
        class Config:
            width: int  # which nobody reads

        def parts(self, dims):
            return (fault(dims),)

    try:
        if fault in (Sound, Coupled):
            check("ATTN_PLANTED")
            return
        with pytest.raises(AssertionError):
            check("ATTN_PLANTED")
    finally:
        plugin.forget("ATTN_PLANTED")
        typed.cache_clear()
