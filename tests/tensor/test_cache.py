# SPDX-License-Identifier: MIT
"""The pruned cache: every decision and every logit against a policy in plain python, and what it may look at."""

import pytest
import torch

from ablab.model.gpt import GptNetwork
from ablab.tensor.attend import attend
from ablab.tensor.cache import Pruned, _Book
from ablab.tensor.stage import CAUSAL, Ctx, Field, Heads, Linear, Past, Piece, Project, Region
from tests.blocks import SIZES, network, perturbed, tokens
from tests.contract.test_members import MEMBERS, make

B, H, T, K = 3, 2, 40, 4
KEEP, RECENT = 9, 4
SCALE = 0.5


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pieces(t, regions):
    """Logits of its own for each region; the last key is joined of two fields."""
    names = [("q", ("k",)), ("q2", ("k2", "k3"))]
    return [(t[q], ks, r) for (q, ks), r in zip(names, regions, strict=False)]


def inputs():
    widths = {"q": K, "k": K, "q2": 2 * K, "k2": K, "k3": K, "v": K, "z": 3, "y": K}
    return {n: 2 * random(B, 1 if n == "k3" else H, T, width, seed=i) for i, (n, width) in enumerate(widths.items())}


class Zee:
    """A type of side channel."""


def stepwise(t, regions, past, until=T):
    """Outputs of all steps, each a main call and one more with another value, as a Rows part makes it."""
    outs = []
    for i in range(until):
        at = {n: x[:, :, i : i + 1] for n, x in t.items()}
        made = tuple(Piece(q, tuple(Field(k, at[k]) for k in ks), r) for q, ks, r in pieces(at, regions))
        h = Heads(at["q"], at["k"], at["v"], SCALE, made, Field("v", at["v"]), {Zee: Field("z", at["z"])})
        m, _ = attend(h, Ctx(start=i).put(past), lse=True)
        again, _ = attend(h._replace(value=Field("y", at["y"]), side={}), Ctx(start=i).put(past))
        outs.append(torch.cat([m.y_BHTV, m.side[Zee], again.y_BHTV, m.lse_BHT[..., None]], -1))
        past.length = i + 1
        assert m.n_T.tolist() == [min(i, KEEP) + 1] if isinstance(past, Pruned) and past.keep == KEEP else [i + 1]
    return torch.cat(outs, 2)


def policy(t, regions, keep, recent):
    """The same by definition: for each batch row a list of the positions that are held, no tensors kept."""
    outs = torch.zeros(B, H, T, 2 * K + 4, dtype=torch.float64)
    for b in range(B):
        held, score = [], {}
        for i in range(T):
            held, score[i] = [*held, i], 0.0
            rows = []
            for h in range(H):
                logits = []
                for j in held:
                    for q, ks, r in pieces(t, regions):
                        far = i - j > r.width
                        if r.kind == "causal" or (r.kind == "far") == far:
                            key = torch.cat([t[k][b, h % t[k].shape[1], j] for k in ks])
                            logits.append(SCALE * q[b, h, i] @ key)
                lse = torch.stack(logits).logsumexp(0)
                rows.append((torch.stack(logits) - lse).exp())
                mixed = [sum(p * t[n][b, h, j] for p, j in zip(rows[h], held, strict=True)) for n in ("v", "z", "y")]
                outs[b, h, i] = torch.cat([*mixed, lse[None]])
            for place, j in enumerate(held):
                score[j] += float(sum(row[place] for row in rows)) / H * len(held)
            if len(held) > keep:
                able = [j for j in held if j != 0 and j <= i - recent]
                held.remove(min(able, key=lambda j: (score[j] / (i - j + 1), j)))
    return outs


CASES = [(CAUSAL,), (Region("band", 5), Region("far", 5)), (Region("band", 15), Region("far", 15))]
by_regions = pytest.mark.parametrize("regions", CASES, ids=["causal", "band5", "band15"])


@by_regions
@pytest.mark.parametrize(("keep", "recent"), [(KEEP, RECENT), (4, 1), (30, 28)])
def test_the_cache_follows_the_policy(regions, keep, recent):
    t = inputs()
    got = stepwise(t, regions, Pruned(keep, recent))
    assert (got - policy(t, regions, keep, recent)).abs().max() < 1e-10
    assert (got - stepwise(t, regions, Past(T))).abs().max() > 1e-3  # and it is no plain decode


@by_regions
def test_keeping_all_is_plain_decode(regions):
    t = inputs()
    assert (stepwise(t, regions, Pruned(T, 5)) - stepwise(t, regions, Past(T))).abs().max() < 1e-10


def test_ties_go_to_the_oldest_and_the_first_and_the_recent_stay():
    past, pos_BS = Pruned(6, 3), torch.tensor([[0, 9, 5, 7, 8, 2, 4], [2, 9, 5, 7, 8, 0, 4]])
    age_BS = 9 - pos_BS
    book = _Book(
        9, 7, pos_BS, (age_BS + 1).double(), pos_BS[:, :1], pos_BS[:, :1]
    )  # uniform attention: every rate is 1
    freed = [pos_BS[b, slot].item() for b, slot in enumerate(past.lowest(book).flatten())]
    assert freed == [2, 2]
    book.score_BS = torch.where((pos_BS >= 7) | (pos_BS == 0), 0, book.score_BS - (pos_BS == 5) * 1e-9)
    assert pos_BS[0, past.lowest(book)[0]] == 5  # what must stay is lower


def test_no_more_than_keep_are_held_and_rows_decide_alone():
    t, past = inputs(), Pruned(KEEP, RECENT)
    whole = stepwise(t, (CAUSAL,), past)
    assert {f.shape[2] for f in past.fields.values()} == {KEEP + 1}  # one is free between steps
    held = past.books[0].pos_BS.sort(1).values
    assert not torch.equal(held[0], held[1])
    alone = stepwise({n: x[1:2] for n, x in t.items()}, (CAUSAL,), Pruned(KEEP, RECENT))
    assert (alone - whole[1:2]).abs().max() < 1e-12


class Clairvoyant(Pruned):
    """Frees what the whole sequence will look at least: it knows the queries to come."""

    def __init__(self, q, k):
        super().__init__(KEEP, RECENT)
        s = (SCALE * q @ k.mT).masked_fill(torch.ones(q.shape[2], q.shape[2]).triu(1).bool(), -torch.inf)
        self.total_BT = s.softmax(-1).mean(1).sum(1)

    def lowest(self, book):
        book.score_BS = self.total_BT.gather(1, book.pos_BS)
        return super().lowest(book)


def test_a_prefix_decides_as_the_whole_and_a_policy_that_sees_the_future_does_not():
    t = inputs()
    cut = {n: x[:, :, :25] for n, x in t.items()}
    whole = stepwise(t, (CAUSAL,), Pruned(KEEP, RECENT))[:, :, :25]
    assert torch.equal(stepwise(cut, (CAUSAL,), Pruned(KEEP, RECENT), 25), whole)
    future = stepwise(t, (CAUSAL,), Clairvoyant(t["q"], t["k"]))[:, :, :25]
    assert not torch.equal(stepwise(cut, (CAUSAL,), Clairvoyant(cut["q"], cut["k"]), 25), future)


@pytest.mark.parametrize(("keep", "recent"), [(4, 3), (65, 64)])
def test_a_cache_in_which_nothing_could_go_is_refused(keep, recent):
    with pytest.raises(ValueError, match=f"keep = {keep}"):
        Pruned(keep, recent)


def test_several_tokens_at_once_are_refused():
    net = network().double().eval()
    with pytest.raises(ValueError, match="one at a time"), torch.no_grad():
        net(tokens(2, 5), past=Pruned(KEEP, RECENT))


class Doubled(Project):
    """A projector that caches more than keys and values, at its own widths, shared and not."""

    caches = ("a", "b", "w")

    def __init__(self, dims):
        super().__init__()
        self.n_head, self.head_dim = dims.n_head, dims.head_dim
        self.mix = Linear(dims.n_embd, 3 * dims.n_embd, bias=False)
        torch.nn.init.zeros_(self.mix.weight)

    def forward(self, x_BTD, ctx):
        q, a, w = (y.unflatten(-1, (self.n_head, -1)).transpose(1, 2) for y in self.mix(x_BTD).chunk(3, -1))
        b = x_BTD[:, None, :, :6]
        wide = torch.cat([q, b.expand(-1, self.n_head, -1, -1)], -1)
        keys = (Field("a", a), Field("b", b))
        return Heads(q, a, w, self.head_dim**-0.5, (Piece(wide, keys, CAUSAL),), Field("w", w)), ctx


def decode(net: GptNetwork, x, past):
    with torch.no_grad():
        return torch.cat([net(part, past=past).logits for part in x.split(1, 1)], 1)


@pytest.fixture(params=["mha", "doubled"])
def net(request):
    made = network().double()
    if request.param == "doubled":
        for block in made.blocks:
            block.attn.project = Doubled(made.dims).double()
    return perturbed(made, 0.2).eval()


def test_models_decode_under_it_with_all_their_fields(net):
    x = tokens(B, SIZES["MODEL_GPT_BLOCK"])
    plain, full = decode(net, x, Past(T)), net(x).logits
    assert (plain - full).abs().max() < 1e-10
    assert (decode(net, x, Pruned(T, 3)) - plain).abs().max() < 1e-10
    past = Pruned(KEEP, RECENT)
    pruned = decode(net, x, past)
    assert torch.equal(pruned[:, : KEEP + 1], decode(net, x[:, : KEEP + 1], Pruned(KEEP, RECENT)))
    assert (pruned - plain)[:, : KEEP + 1].abs().max() < 1e-10 < 1e-4 < (pruned - plain).abs().max()
    caches = net.blocks[0].attn.project.caches
    assert set(past.fields) == {(layer, name) for layer in range(net.dims.n_layer) for name in caches}
    for cut in (11, 23):
        assert (decode(net, x[:, :cut], Pruned(KEEP, RECENT)) - pruned[:, :cut]).abs().max() < 1e-12
    assert (decode(net, x[1:2], Pruned(KEEP, RECENT)) - pruned[1:2]).abs().max() < 1e-12


@pytest.mark.parametrize("symbol", MEMBERS)
def test_every_member_decodes_under_it(symbol):
    net, x = make(symbol).eval(), tokens(2, T)
    plain, pruned = decode(net, x, Past(T)), decode(net, x, Pruned(KEEP, RECENT))
    assert (decode(net, x, Pruned(T, 3)) - plain).abs().max() < 1e-10
    assert (pruned - plain)[:, : KEEP + 1].abs().max() < 1e-10 < 1e-6 < (pruned - plain).abs().max()
    assert (decode(net, x[:1, :23], Pruned(KEEP, RECENT)) - pruned[:1, :23]).abs().max() < 1e-10
