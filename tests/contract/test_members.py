# SPDX-License-Identifier: MIT
"""Conformance of attention and MLP members: a new one is covered by existing, with no line added here.

Each runs on top of the default model at test sizes, with what it depends on.  Tests of behaviour run at a point away
from init, where a mechanism that starts as the identity shows.  fp64 on one thread: what can be equal is equal.
"""

import copy
import itertools
import math
from dataclasses import dataclass
from functools import cache, partial
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from ablab import config, kconf, metrics, plugin
from ablab.attention import Attention
from ablab.tensor.stage import Coupling, Ctx, Emit, Gate, Part, Past
from tests.blocks import SIZES, assemble, block_members, perturbed, tokens, values

T = SIZES["MODEL_GPT_BLOCK"]
LONG = 257  # above every width of the test model
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

    A case may be several words, and a word SYMBOL=value.
    """
    tree, asked, planted = kconf.load(), {}, {}
    for word in (w for case in symbols for w in case.split()):
        symbol, _, value = word.partition("=")
        if symbol in PLANTED:
            planted = PLANTED | planted | ({symbol: int(value)} if value else {})
            continue
        lines = [f"CONFIG_{name}={text}" for name, text in asked.items()]
        base = [kconf.parse("test", enumerate(lines, 1), "test")]
        needs = kconf.remedy(tree, base, kconf.Request(symbol, value or "y", "test"))
        if needs is None:
            return None
        asked |= {r.name: r.text for r in needs} | {symbol: value or "y"}
    try:
        return values(**asked) | planted
    except kconf.ConfigError:  # what one needs excludes another
        return None


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


def goes(*case):
    """Whether all members of a case are on in one model."""
    return typed(*case) is not None and all(typed(*case).get(s) is True for s in case)


def most(choice):
    """A choice and all switches that go with it and with those before them."""
    case = (choice,)
    for switch in SWITCHES:
        case += (switch,) * goes(*case, switch)
    return case


def subsets():
    """Every subset of the switches on every choice; beyond seven switches none, one, each pair and all: each set of
    members once."""
    sizes = range(len(SWITCHES) + 1) if len(SWITCHES) <= 7 else range(3)
    chosen = [c for n in sizes for c in itertools.combinations(SWITCHES, n)]
    found = {}
    for case in [(choice, *c) for choice in CHOICES for c in chosen] + [most(choice) for choice in CHOICES]:
        if goes(*case):
            found.setdefault(frozenset(s for s in MEMBERS if typed(*case).get(s) is True), case)
    return list(found.values())


def builds(case):
    try:
        return typed(case) is not None and bool(assemble(typed(case)))
    except ValueError:
        return False  # the member refuses it, by a rule of its own


def name(case):
    """The member that a case is about."""
    return case.split()[0]


def mine(case):
    """Visible symbols of the member that a case is about, and their values."""
    return {n: v for n, v in typed(case).items() if n.startswith(f"{name(case)}_")}


def texts(value):
    """Other values to try, as they are written."""
    if isinstance(value, bool):
        return ["n" if value else "y"]
    if isinstance(value, float):
        return [f'"{v}"' for v in (value / 2 or 0.3, 2 * value)]
    return [str(n) for n in (value // 2 or 7, value - 4, value + 4, value + 1)]  # heads may have to share it


def variants(symbol):
    """The member with one choice or bool of its own changed, and those that this shows; where the member refuses one,
    with a number beside it."""
    infos, cases, known = kconf.load().symbols, [symbol], set()
    for case in cases:
        values = mine(case)
        numbers = [f"{n}={t}" for n, v in values.items() if not isinstance(v, bool) for t in texts(v)]
        for n, v in values.items():
            if n not in known and isinstance(v, bool) and not (v and infos[n].choice):
                tries = (f"{case} {number} {n}={texts(v)[0]}" for number in ("", *numbers))
                cases += itertools.islice(filter(builds, tries), 1)
        known |= values.keys()
    return [" ".join(case.split()) for case in cases[1:]]


def turned(symbol):
    """(case, cases with one number of the member changed), each number once."""
    found = {}
    for case in [symbol, *variants(symbol)]:
        for n, v in mine(case).items():
            if not isinstance(v, bool):
                found.setdefault(n, (case, [c for c in (f"{case} {n}={t}" for t in texts(v)) if builds(c)]))
    return list(found.values())


ALL = list(dict.fromkeys(c for c in subsets() if len(c) > 3))
CASES = MEMBERS + [v for s in MEMBERS for v in variants(s)] + [" ".join(case) for case in ALL]
short = lambda case: case if len(case.split()) < 5 else f"all on {name(case)}"
every = pytest.mark.parametrize("symbol", MEMBERS)
every_switch = pytest.mark.parametrize("symbol", SWITCHES)
every_case = pytest.mark.parametrize("symbol", CASES, ids=short)
everything = pytest.mark.parametrize("case", ALL, ids=lambda case: f"all on {case[0]}")


@every_case
def test_a_changed_suffix_leaves_earlier_logits_equal(symbol):
    net, x = make(symbol), tokens(2, T)
    full = net(x).logits
    for cut in CUTS:
        other = torch.cat([x[:, :cut], tokens(2, T - cut, seed=cut)], 1)
        got = net(other).logits
        assert torch.equal(got[:, :cut], full[:, :cut]), cut
        assert not torch.equal(got[:, cut:], full[:, cut:])


@every_case
def test_a_prefix_alone_gives_the_logits_of_the_full_run(symbol):
    net, x = make(symbol), tokens(2, T)
    full = net(x).logits
    for t in (1, 2, 5, 6, 7, 23):
        assert_close([net(x[:, :t]).logits], [full[:, :t]])


@every_case
def test_forward_is_pure(symbol):
    net, x = make(symbol), tokens(3, T)
    buffers, state = {n: b.clone() for n, b in net.named_buffers()}, torch.get_rng_state()
    first = net(x).logits
    assert_close([net(x[:1]).logits], [first[:1]], 1e-12)  # another batch size; rows do not see each other
    assert torch.equal(net(x).logits, first)
    assert all(torch.equal(b, buffers[n]) for n, b in net.named_buffers())
    assert torch.equal(torch.get_rng_state(), state)


@every_case
@pytest.mark.parametrize("layers", [2, 3])
def test_every_parameter_lives_within_two_steps(symbol, layers):
    net, x = make(symbol, probe=False, MODEL_GPT_LAYERS=layers), tokens(4, T)
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


@every_case
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


@every_case
def test_recomputed_blocks_give_equal_gradients(symbol):
    net, x = make(symbol, MODEL_GPT_DROPOUT=0.2), tokens(2, T)
    torch.manual_seed(0)
    want = gradients(net, x, x)
    for block in net.blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    torch.manual_seed(0)
    assert_close(gradients(net, x, x), want)


def compiled(net, x):
    """Gradients of a model compiled as one graph."""
    got = gradients(torch.compile(net, fullgraph=True, backend="aot_eager"), x, x)
    torch._dynamo.reset()
    return got


@COMPILE
@pytest.mark.parametrize(("case", "again"), [(ALL[0], False), (ALL[-1], True)], ids=["plain", "recomputed"])
def test_all_together_compile(case, again):
    net, x = make(*case, MODEL_GPT_LAYERS=2), tokens(2, T)
    want = gradients(net, x, x)
    for block in net.blocks if again else ():
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    assert_close(compiled(net, x), want)


@pytest.mark.slow
@COMPILE
@every_case
def test_compiled_and_recomputed_equals_eager(symbol):
    net, x = make(symbol), tokens(2, T)
    want = gradients(net, x, x)
    assert_close(compiled(net, x), want)
    for block in net.blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    assert_close(compiled(net, x), want)


def decoded(net, x, prefill=9):
    """Logits from the last token of the prefill on, and the cache."""
    past, n = Past(x.shape[1]), x.shape[1]
    with torch.no_grad():
        got = [net(x[:, :prefill], past=past).logits]
        got += [net(x[:, t : t + 1], past=past).logits for t in range(prefill, n)]
    assert past.length == n
    return torch.cat(got, 1), past


@every_case
def test_cached_decode_equals_the_full_forward(symbol):
    net, x = make(symbol).eval(), tokens(2, T)
    got, past = decoded(net, x)
    assert_close([got], [net(x).logits[:, 8:]])
    for layer, block in enumerate(net.blocks):
        declared = {name for m in block.modules() if isinstance(m, Part) for name in m.caches}
        assert {name for where, name in past.fields if where == layer} == declared


@every_case
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


@every_case
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


def member(case):
    return next(m for f in ("ATTN", "MLP") for m in config.create(f, typed(case)) if m.symbol == name(case))


def without(case, net):
    """The host: the same model and tensors, the member switched off."""
    host = assemble({**typed(case), name(case): False}).double()
    host.load_state_dict(net.state_dict(), strict=False)
    return host


@every_case
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_identity_members_start_as_their_host(symbol, dtype):
    net, x = make(symbol, probe=False).to(dtype), tokens(2, T)
    assert any(p.symbol == name(symbol) for p in parts(net))
    if member(symbol).identity:
        host = assemble({**typed(symbol), name(symbol): False}).to(dtype)
        assert torch.equal(net(x).logits, host(x).logits)


@every_case
def test_without_coupling_a_coupled_member_is_its_host(symbol):
    net, x, me = make(symbol), tokens(2, T), member(symbol)
    mine = [p for p in parts(net) if p.symbol == name(symbol)]
    assert mine and all(p.couples == me.couples for p in mine)
    assert me.couples == any(Coupling in p.reads + p.takes for p in mine)
    assert me.couples == any(c.name == f"moved/{me.symbol}" for c in me.contracts())
    if me.couples:
        host = without(symbol, net)(x).logits
        assert not torch.equal(net(x).logits, host)
        net.lam.fill_(0.0)
        assert_close([net(x).logits], [host], 1e-12)


def states(net, x_BT):
    """The residual stream after each block."""
    ctx, x_BTD, out = Ctx().put(Coupling(net.lam)), net.wte(x_BT) + net.wpe.weight[: x_BT.shape[1]], []
    for block in net.blocks:
        x_BTD, ctx = block(x_BTD, ctx)
        out.append(x_BTD)
    return out


EMITTING = [c for c in CASES if any(isinstance(p, Emit) for p in parts(make(c)))]


@pytest.mark.parametrize("symbol", EMITTING, ids=short)
def test_what_a_block_emits_changes_later_blocks_only(symbol):
    net, x = make(symbol, MODEL_GPT_LAYERS=4), tokens(2, 20)
    before = states(net, x)
    for layer in range(3):
        emits = [p for p in net.blocks[layer].modules() if isinstance(p, Emit)]
        hooks = [p.register_forward_hook(lambda m, args, out: type(out)(*(t + 0.5 for t in out))) for p in emits]
        after = states(net, x)
        assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [n <= layer for n in range(4)]
        for hook in hooks:
            hook.remove()


@every_case
def test_gauges_are_reported_as_declared_and_have_a_unit(symbol):
    net = make(symbol)
    got = net.gauges(tokens(2, 20))  # raises where the two sets differ
    assert len(got) == sum(len(p.gauges) for p in parts(net))
    for gauge, value in got.items():
        assert metrics.get(gauge) and math.isfinite(value), gauge


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


def assert_no_square(net):
    n = net.dims.block_size  # to be above every width and the vocabulary
    x = tokens(1, n)
    with Squares(n) as seen:
        net(x, x).loss.backward()
    assert seen.found == set()


@every_case
def test_no_op_forms_a_square_of_the_sequence(symbol):
    assert_no_square(make(symbol, MODEL_GPT_BLOCK=LONG))


def assert_conforms(net, n=20):
    """What a combination could break: causality, gradients, decode from the cache."""
    x = tokens(2, n)
    full = net(x).logits
    assert all(torch.isfinite(g).all() and (g != 0).any() for g in gradients(net, x, x))
    other = torch.cat([x[:, :11], tokens(2, n - 11, seed=3)], 1)
    got = net(other).logits
    assert torch.equal(got[:, :11], full[:, :11]) and not torch.equal(got[:, 11:], full[:, 11:])
    for t in (1, 6):
        assert_close([net(x[:, :t]).logits], [full[:, :t]])
    assert_close([decoded(net.eval(), x)[0]], [full[:, 8:]])


@pytest.mark.parametrize("case", subsets(), ids="+".join)
def test_every_subset_is_causal_alive_and_decodes(case):
    assert_conforms(make(*case))


@everything
def test_without_coupling_all_together_are_their_host(case):
    net, x = make(*case), tokens(2, T)
    coupled = [m.symbol for m in net.members if m.couples]
    host = assemble({**typed(*case), **dict.fromkeys(coupled, False)}).double()
    host.load_state_dict(net.state_dict(), strict=False)
    assert coupled and not torch.equal(net(x).logits, host(x).logits)
    net.lam.fill_(0.0)
    assert_close([net(x).logits], [host(x).logits], 1e-12)


@every_case
def test_bf16_follows_fp32(symbol):
    net, x = make(symbol).float().eval(), tokens(2, 20)
    want = net(x).logits
    with torch.autocast("cpu", torch.bfloat16):
        out = net(x, x, keep_logits=True)
        got, _ = decoded(net, x)
    assert out.loss.dtype == torch.float32 and (out.logits - want).abs().max() < 0.03 * want.abs().max()
    assert (got - want[:, 8:]).abs().max() < 0.03 * want.abs().max()
    grads = torch.autograd.grad(out.loss, list(net.parameters()))
    assert all(torch.isfinite(g).all() and (g != 0).any() for g in grads)


def differ(one, two):
    """Whether two models have other tensors, or give other logits or gradients where rows of P are not uniform."""
    a, b = ({n: p.shape for n, p in net.named_parameters()} for net in (one, two))
    if a != b:
        return True
    x = tokens(2, 20)
    one, two = (perturbed(copy.deepcopy(net), 0.3) for net in (one, two))
    pairs = zip((one(x).logits, *gradients(one, x, x)), (two(x).logits, *gradients(two, x, x)), strict=True)
    return any((p - q).abs().max() > 1e-9 for p, q in pairs)


@every_switch
def test_a_member_makes_another_model(symbol):
    assert differ(make(symbol), make(**{**typed(symbol), symbol: False}))


@every
def test_each_knob_of_a_member_makes_another_model(symbol):
    for case, others in [*((symbol, [v]) for v in variants(symbol)), *turned(symbol)]:
        assert any(differ(make(case), make(other)) for other in others), f"{case}: {others}"


def test_no_two_subsets_are_the_same_model():
    seen = {}
    for case in subsets():
        with torch.device("meta"):
            shapes = frozenset((n, p.shape) for n, p in assemble(typed(*case)).named_parameters())
        seen.setdefault(shapes, []).append(case)
    for cases in seen.values():
        assert all(differ(make(*a), make(*b)) for a, b in itertools.combinations(cases, 2))


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


class Inverted(Fault):
    """Attends to what its mask should hide."""

    def change(self, y_BHTV, h):
        s = h.q_BHTK @ h.k_BHTK.mT
        hidden = torch.ones(s.shape[-2:]).tril(-1).bool()  # True would keep, here it is taken to drop
        return y_BHTV + self.g * s.masked_fill(hidden, -torch.inf).softmax(-1) @ h.v_BHTV


class Frozen(Fault):
    """A gate that no gradient leaves from where it starts."""

    def change(self, y_BHTV, h):
        return y_BHTV * (1 + self.g.clamp(min=1))


class Inert(Gate):
    """Does nothing: a step with it is the step without."""

    def __init__(self, dims):
        super().__init__()

    def forward(self, m, h, ctx):
        return m, ctx


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


MORE = {
    test_every_parameter_lives_within_two_steps: {"layers": 2},
    test_identity_members_start_as_their_host: {"dtype": torch.float64},
}


@pytest.mark.parametrize(
    ("fault", "check"),
    [
        (Pooled, test_a_changed_suffix_leaves_earlier_logits_equal),
        (Pooled, test_a_prefix_alone_gives_the_logits_of_the_full_run),
        (Inverted, test_a_changed_suffix_leaves_earlier_logits_equal),
        (Inverted, test_a_prefix_alone_gives_the_logits_of_the_full_run),
        (Inert, test_a_member_makes_another_model),
        (Crowd, test_forward_is_pure),
        (Memory, test_forward_is_pure),
        (Noise, test_forward_is_pure),
        (Dead, test_every_parameter_lives_within_two_steps),
        (Frozen, test_every_parameter_lives_within_two_steps),
        (Shift, test_cached_decode_equals_the_full_forward),
        (Dense, test_no_op_forms_a_square_of_the_sequence),
        (Pooled, test_every_field_is_read),
        (Pooled, test_each_knob_of_a_member_makes_another_model),
        (Shift, test_identity_members_start_as_their_host),
        (Deaf, test_without_coupling_a_coupled_member_is_its_host),
        (Mute, test_without_coupling_a_coupled_member_is_its_host),
        (Sound, test_a_changed_suffix_leaves_earlier_logits_equal),
        (Sound, test_forward_is_pure),
        (Sound, test_a_member_makes_another_model),
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
        tried = partial(check, "ATTN_PLANTED", **MORE.get(check, {}))
        if fault in (Sound, Coupled):
            tried()
            return
        with pytest.raises(AssertionError):
            tried()
    finally:
        plugin.forget("ATTN_PLANTED")
        typed.cache_clear()
