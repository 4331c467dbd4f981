# SPDX-License-Identifier: MIT
"""Stages of a transformer block: the parts that members add to it and the values that flow between them.

B batch, T tokens of this call, S keys (cached and new), D model, H heads, K key dim, V value dim, C channels,
F MLP hidden, L latent.

A block is two hosts (`ablab/model/_block.py`) that run the stages in this order:
attention `project score (attend) rows gate`, MLP `up pre act enrich emit down`.  A member (`BlockMember`)
returns the parts it adds to one block; a part sees tensors and the context `Ctx`, stores nothing between
calls and is causal.  Frozen values are NamedTuples: checkpoint, DDP and compile see the tensors inside.
"""

import hashlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from ablab.plugin import Clause, Plugin

C = TypeVar("C")


# Contexts: values keyed by their type.  A mechanism that needs another type defines it in its own file.
class Coupling(NamedTuple):
    """Strength of all couplings at this step, put once per forward, reaches every block."""

    lam: Tensor
    """0-d, 1 unless the coupling schedule says otherwise."""


class Attended(NamedTuple):
    """What attention adds to the residual of this block; published when a part of the block wants it."""

    y_BTD: Tensor


class Latent(NamedTuple):
    """Key latent of this block."""

    c_BTL: Tensor


class LatentDelta(NamedTuple):
    """Carried to the next block: what its key latent is amended by."""

    d_BTL: Tensor


class Past:
    """Keys and values of earlier tokens, by block and field; reaches every block.  Decoding only, in place.

    A field enters when `attend` meets it (`Field`), so it holds what the parts of a model need and no more.
    """

    single: ClassVar[bool] = False
    """Tokens must come one at a time."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0  # tokens that every block has seen; the model advances it
        self.fields: dict[tuple[int, str], Tensor] = {}

    def hold(self, layer: int, field: "Field", start: int) -> Tensor:
        """What is held of a field, BHSC or its latent, of all tokens so far, after writing the new ones at `start`."""
        new = field.new_BHTC if field.factors is None else field.factors.c_BHTL
        B, H, T, C = new.shape
        key = layer, field.name
        if key not in self.fields:
            self.fields[key] = new.new_zeros(B, H, self.capacity, C)
        self.fields[key][:, :, start : start + T] = new
        return self.fields[key][:, :, : start + T]

    def extend(self, layer: int, field: "Field", start: int) -> Tensor:
        """The channels of all tokens so far, BHSC, after `hold`; those of a latent are expanded at each call."""
        held = self.hold(layer, field, start)
        if start == 0:
            return field.new_BHTC
        return held if field.factors is None else torch.einsum("bhsl,hlc->bhsc", held, field.factors.up_HLC)

    def positions(self, layer: int, start: int, q_BHTK: Tensor) -> Tensor:
        """Positions of the keys that queries at `start` and up meet: S, or B11S where batch rows hold others."""
        return torch.arange(start + q_BHTK.shape[2], device=q_BHTK.device)

    def attended(self, layer: int, p_BHTS: Tensor) -> None:
        """Called with the probabilities of new queries, whenever a block attends."""

    def values_per_token(self) -> int:
        """Numbers held per token and sequence over all blocks, counted on the real cache."""
        return sum(t.shape[1] * t.shape[3] for t in self.fields.values())


class Gauges:
    """What parts report in a forward pass that asks for it; reaches every block.  Never there in a training step.

    A part that declares `gauges` says `for g in ctx.all(Gauges): g.put(ctx, self, t_mean=t.mean())`, so that a pass
    without it computes nothing.
    """

    def __init__(self) -> None:
        self.values: dict[str, Tensor] = {}
        """What parts report, by metric name."""
        self.watched: dict[str, Tensor] = {}
        """What was seen besides."""

    def watch(self, h: "Heads", ctx: "Ctx") -> None:
        """Called by every block with what it attends to; a subclass adds to `watched`."""

    def put(self, ctx: "Ctx", part: "Part", **values: Tensor) -> None:
        """Record 0-d tensors under their metric names."""
        self.values |= {self.name(part, ctx.layer, gauge): value.detach() for gauge, value in values.items()}

    @staticmethod
    def name(part: "Part", layer: int, gauge: str) -> str:
        """The metric name of a gauge, `attn/<layer>/<slug>_<gauge>` or `mlp/..`."""
        family, _, name = part.symbol.partition("_")
        return f"{family.lower()}/{layer}/{name.lower()}_{gauge}"


def share(term: Tensor, target: Tensor) -> Tensor:
    """RMS of a term over that of the target, of equal shape, that it is added to; 0-d, fp32 or better."""
    wide = torch.promote_types(target.dtype, torch.float32)
    return torch.linalg.vector_norm(term, dtype=wide) / torch.linalg.vector_norm(target, dtype=wide)


class Ctx(NamedTuple):
    """Immutable context of one forward pass: values keyed by type, and where the pass stands."""

    values: tuple[Any, ...] = ()
    start: int = 0
    """Position of the first token of this call."""
    layer: int = 0

    def put(self, *values: Any) -> "Ctx":
        """With more values, for later stages of the same block."""
        return Ctx(self.values + values, self.start, self.layer)

    def next(self, *values: Any) -> "Ctx":
        """For the next block: Coupling, Past, Gauges, start and these; the rest ends here."""
        kept = tuple([v for v in self.values if isinstance(v, (Coupling, Past, Gauges))])
        return Ctx(kept + values, self.start, self.layer + 1)

    def all(self, kind: type[C]) -> tuple[C, ...]:
        """Values of a type; loop over it: an empty tuple is a no-op."""
        return tuple([v for v in self.values if isinstance(v, kind)])

    def one(self, kind: type[C]) -> C:
        """The only value of a type.  Raises RuntimeError unless exactly one is present."""
        found = self.all(kind)
        if len(found) != 1:
            raise RuntimeError(f"block {self.layer}: {len(found)} values of {kind.__name__}, 1 is needed")
        return found[0]


# Attention values.
class Region(NamedTuple):
    """Keys j that query i sees: `causal` j <= i, `band` i - width <= j <= i, `far` j < i - width."""

    kind: str
    width: int = 0


CAUSAL = Region("causal")


class Factors(NamedTuple):
    """A field as the product c @ up, of which the cache holds c; either H may be 1: shared by all heads."""

    c_BHTL: Tensor
    up_HLC: Tensor


class Field(NamedTuple):
    """A tensor over the tokens of this call, under the name by which the cache keeps it in decode."""

    name: str
    new_BHTC: Tensor
    """H may be 1: shared by all heads."""
    factors: Factors | None = None
    """Decode absorbs `up` into what the field meets, and never expands the past."""


class Piece(NamedTuple):
    """Logits scale * q.k on a region; the regions of a tuple of pieces partition j <= i."""

    q_BHTK: Tensor
    k: tuple[Field, ...]
    """Parts of the key, joined along channels."""
    region: Region


class Heads(NamedTuple):
    """What attend works on.  q, k and v are those of the tokens of this call, in every mode."""

    q_BHTK: Tensor
    k_BHTK: Tensor
    v_BHTV: Tensor
    scale: float
    """1 / sqrt(head dim) whatever K is: mechanisms widen q and k, never the temperature."""
    pieces: tuple[Piece, ...]
    value: Field
    """What rows of P mix."""
    side: Mapping[type, Field] = {}
    """Extra value channels that ride along, by the type of context they come from."""
    mixed: Mapping[type, Tensor] = {}
    """What a pass of its own has mixed: it joins the side of `Mixed`, where parts that scale rows of P reach it."""


class Mixed(NamedTuple):
    """What attend returns."""

    y_BHTV: Tensor
    side: Mapping[type, Tensor]
    lse_BHT: Tensor | None
    """Log-sum-exp of each row's logits, fp32 or better, differentiable; None unless a part wants it."""
    n_T: Tensor | None
    """Keys that each row sees; None when lse is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Dims:
    """Sizes of one block; `layer` is its index."""

    n_embd: int
    n_head: int
    head_dim: int
    mlp_hidden: int
    block_size: int
    bias: bool
    dropout: float
    n_layer: int
    latent: int = 0
    """Channels of the key latent; 0 without one."""
    dearer: int = 0
    """FLOPs per token by which a pass of Q K^T over all keys exceeds that of head_dim channels."""
    layer: int = 0

    @property
    def first(self) -> bool:
        """Sees no carried value: build no consumer."""
        return self.layer == 0

    @property
    def last(self) -> bool:
        """Nobody reads what it carries: build no Emit."""
        return self.layer == self.n_layer - 1

    @property
    def residual_std(self) -> float:
        """Init of a matrix that writes to the residual stream, 2 per block (Radford et al. 2019)."""
        return 0.02 / (2 * self.n_layer) ** 0.5

    def at(self, layer: int) -> "Dims":
        return replace(self, layer=layer)


# Modules.
def init_(tensor: Tensor, seed: int, name: str, std: float) -> Tensor:
    """Fill with N(0, std^2) from the tensor's own CPU stream, keyed by seed and name; nothing on meta.

    Two models draw equal values for a tensor they share, whatever else they hold.  Drawn in fp32, then cast.
    """
    if not tensor.is_meta:
        key = hashlib.blake2b(f"{seed}:{name}".encode()).digest()[:7]
        stream = torch.Generator().manual_seed(int.from_bytes(key, "big"))
        drawn = torch.empty(tensor.shape, dtype=torch.float32, device="cpu")
        with torch.no_grad():
            tensor.copy_(drawn.normal_(0.0, std, generator=stream))
    return tensor


class Drawn(nn.Module):
    """A module that says which of its tensors the model draws at init.

    NOTE A stream is keyed by the full name, which only the model knows: its constructor draws, at its end.
    A tensor that `std` does not list keeps what its module gave it, so that must not be `torch.empty`.
    """

    std: Mapping[str, float] = {}
    """Tensor name below this module -> standard deviation."""


class Linear(nn.Linear, Drawn):
    """nn.Linear whose weight is drawn by name and whose bias starts at 0."""

    def __init__(self, n_in: int, n_out: int, bias: bool, std: float = 0.02) -> None:
        super().__init__(n_in, n_out, bias)
        self.std = {"weight": std}

    def reset_parameters(self) -> None:
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class Part(Drawn, ABC):
    """One stage of one member in one block."""

    stage: ClassVar[str]
    symbol: str = ""
    """The member that made it; the model fills it in."""
    reads: ClassVar[tuple[type, ...]] = ()
    """Context types that must be present."""
    takes: ClassVar[tuple[type, ...]] = ()
    """Context types of which it handles zero or more."""
    emits: ClassVar[tuple[type, ...]] = ()
    """Context types it publishes: an Emit part to the next block, others to later stages of this one."""
    wants_lse: ClassVar[bool] = False
    caches: tuple[str, ...] = ()
    """Names of the fields it adds to the cache in decode."""
    gauges: ClassVar[tuple[str, ...]] = ()
    """Names of what it must report whenever a pass holds `Gauges`."""
    couples: bool = False
    """Its parameters rest while the coupling strength is 0; the model fills it in from the member."""


def coupled(model: nn.Module) -> list[nn.Parameter]:
    """Parameters that rest while the coupling strength is 0."""
    parts = [m for m in model.modules() if isinstance(m, Part) and m.couples]
    return list(dict.fromkeys(p for part in parts for p in part.parameters()))


class Project(Part):
    """Exactly one per block."""

    stage = "project"

    @abstractmethod
    def forward(self, x_BTD: Tensor, ctx: Ctx) -> tuple[Heads, Ctx]: ...


class Score(Part):
    """Changes the logits by rewriting pieces, or adds side channels."""

    stage = "score"

    @abstractmethod
    def forward(self, h: Heads, ctx: Ctx) -> Heads: ...


class Rows(Part):
    """Acts on rows of P: on y and side alike."""

    stage = "rows"

    @abstractmethod
    def forward(self, m: Mixed, h: Heads, ctx: Ctx) -> Mixed: ...


class Gate(Part):
    """Acts on y alone; may publish."""

    stage = "gate"

    @abstractmethod
    def forward(self, m: Mixed, h: Heads, ctx: Ctx) -> tuple[Mixed, Ctx]: ...


class Up(Part):
    """Exactly one per block.  Returns pre_BTF."""

    stage = "up"

    @abstractmethod
    def forward(self, x_BTD: Tensor, ctx: Ctx) -> Tensor: ...


class Pre(Part):
    """Changes what the nonlinearity sees.  Returns pre_BTF."""

    stage = "pre"

    @abstractmethod
    def forward(self, pre_BTF: Tensor, ctx: Ctx) -> Tensor: ...


class Act(Part):
    """The nonlinearity, exactly one per block.  Returns h_BTF."""

    stage = "act"

    @abstractmethod
    def forward(self, pre_BTF: Tensor) -> Tensor: ...


class Enrich(Part):
    """Adds a term to the hidden layer; none reads another's.  Returns h_BTF."""

    stage = "enrich"

    @abstractmethod
    def forward(self, h_BTF: Tensor, ctx: Ctx) -> Tensor: ...


class Emit(Part):
    """Returns the one value, of type emits[0], that the next block sees."""

    stage = "emit"

    @abstractmethod
    def forward(self, h_BTF: Tensor, ctx: Ctx) -> object: ...


class Down(Part):
    """Exactly one per block.  Returns what the MLP adds to the residual, before dropout."""

    stage = "down"

    @abstractmethod
    def forward(self, h_BTF: Tensor) -> Tensor: ...


ATTENTION_STAGES: tuple[type[Part], ...] = (Project, Score, Rows, Gate)
MLP_STAGES: tuple[type[Part], ...] = (Up, Pre, Act, Enrich, Emit, Down)
SINGLE = ("project", "up", "act", "down")


class BlockMember(Plugin):
    """Base of the families whose members add parts to a block: Attention and Mlp."""

    couples: ClassVar[bool] = False
    """All that it does is multiplied by the coupling strength lam: at lam = 0 a model is its host."""
    identity: bool = False
    """At init a model has the logits of its host, but for the rounding of an attention kernel whose heads it widens or
    that it splits; a property where the configuration decides."""
    scales: ClassVar[Mapping[str, str]] = {}
    """Integer fields that shrink with the model of the dry run: `width` as its embedding, `context` as its length,
    `keys` to half of that at most."""

    @abstractmethod
    def parts(self, dims: Dims) -> tuple[Part, ...]:
        """New parts for block `dims.layer`, at most one per stage.  Called once per block, in layer order.

        Builds consumers of carried values unless `dims.first`, Emit parts unless `dims.last`.
        """

    def made(self, dims: Dims) -> tuple[Part, ...]:
        """`parts`, each with the symbol that it comes from."""
        parts = self.parts(dims)
        for part in parts:
            part.symbol, part.couples = self.symbol, self.couples
        return parts

    def hidden(self) -> int | None:
        """Width of the MLP hidden layer, from the one member that sets it; None from all others."""
        return None

    def latent(self) -> int | None:
        """Width of the key latent, from a projector that has one; None from all others."""
        return None

    def flops(self, dims: Dims, length: int) -> int:
        """Forward FLOPs per token in block `dims.layer` beyond two per parameter, attention over `length` keys.

        The model takes them three times: a third of what has no backward pass counts.
        """
        return 0

    def widens(self, dims: Dims, length: int) -> int:
        """FLOPs per token that it adds to each pass of Q K^T over `length` keys, by widening queries and keys."""
        return 0

    def size(self, dims: Dims) -> int:
        """Parameters of its parts in block `dims.layer`, by formula.  A member without one is not checked."""
        raise NotImplementedError

    def contracts(self) -> tuple[Clause, ...]:
        """What was built is there and has the declared size, and what couples has learned.

        A member that adds clauses keeps these.  One at the end may read gauges: `loop.latest` holds the newest value
        of every metric by name (`Gauges.name`).
        """
        clauses = [Clause(f"modules/{self.symbol}", "build", self._modules)]
        if type(self).size is not BlockMember.size:
            clauses.append(Clause(f"params/{self.symbol}", "build", self._sizes))
        if self.couples:
            clauses.append(Clause(f"moved/{self.symbol}", "end", lambda loop: ([], loop.still(self.symbol))))
        return tuple(clauses)

    def _modules(self, built: Any) -> tuple[dict[str, int], dict[str, int]]:
        """Parts by stage, as many as it makes: one for each block, or for all but one."""
        dims = built.model.dims
        with torch.device("meta"):
            made = Counter(p.stage for layer in range(dims.n_layer) for p in self.made(dims.at(layer)))
        there = Counter(m.stage for m in built.model.modules() if isinstance(m, Part) and m.symbol == self.symbol)
        return {stage: max(n, dims.n_layer - 1) for stage, n in made.items()}, dict(there)

    def _sizes(self, built: Any) -> tuple[int, int]:
        dims = built.model.dims
        mine = [m for m in built.model.modules() if isinstance(m, Part) and m.symbol == self.symbol]
        declared = sum(self.size(dims.at(layer)) for layer in range(dims.n_layer))
        return declared, sum(p.numel() for m in mine for p in m.parameters())
