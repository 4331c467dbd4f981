# SPDX-License-Identifier: MIT
"""Models: what is trained.  A member builds a Network; the loop sees only that."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ablab.plugin import Plugin
from ablab.tensor.stage import BlockMember, Drawn, Gauges, init_


class Output(NamedTuple):
    """Result of one forward pass."""

    loss: Tensor | None
    """Mean cross entropy over the targets, 0-d fp32 (fp64 stays fp64); None when no targets were given."""
    n: int
    """Number of targets behind `loss`."""
    logits: Tensor | None
    """[..., classes]; None when targets were given and `keep_logits` was not."""
    hits: Tensor | None = None
    """Targets that are the likeliest class, 0-d int64; None where a model does not count them."""


class Network(Drawn, ABC):
    """The module that a Model member builds: an ordinary nn.Module that trains alone, on any device."""

    ties: dict[str, str] = {}
    """Uses of a tensor under a second role: role -> name of the parameter."""
    lam: Tensor
    """0-d: strength of the couplings of its mechanisms; filled in place by the coupling schedule."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("lam", torch.ones(()), persistent=False)

    @abstractmethod
    def forward(self, x: Tensor, y: Tensor | None = None, keep_logits: bool = False) -> Output:
        """Loss of targets `y`, or logits without them.  In eval mode padded classes have logit -inf."""

    @abstractmethod
    def flops_per_token(self, length: int) -> int:
        """Matmul FLOPs of forward and backward per target, at this length of a sequence or of an image's side."""

    @abstractmethod
    def example(self) -> Tensor:
        """A small fixed input on the CPU, the same for every build of this shape."""

    def gauges(self, x: Tensor, seen: Gauges | None = None) -> dict[str, float]:
        """What its parts say of themselves on these inputs, and what `seen` watches, by metric name.  Called at each
        evaluation.

        Raises EffectError when a part is silent about a gauge that it declares, or reports another.
        """
        return {}

    def facts(self) -> dict[str, Any]:
        """What built.json holds beside tensors and totals; numbers are measured on the module."""
        return {}

    def _draw(self, seed: int) -> None:
        """Last line of every constructor: fill each tensor that a module lists in `std` by its name."""
        for path, module in self.named_modules():
            if isinstance(module, Drawn):
                for name, std in module.std.items():
                    init_(module.get_parameter(name), seed, f"{path}.{name}".lstrip("."), std)


class Model(Plugin, family="MODEL"):
    """Base of the models."""

    length: int
    """Targets of a sample: the tokens of a sequence, 1 for an image."""
    depth: int
    """Blocks of some ten operations, one after another."""

    @abstractmethod
    def build(
        self,
        attention: Sequence[BlockMember],
        mlp: Sequence[BlockMember],
        seed: int,
        n_vocab: int | None = None,
    ) -> Network:
        """Called once per trial by build.py; under `torch.device("meta")` it costs no memory.

        `attention`, `mlp`: the selected members in Kconfig order (ignored by models without blocks).
        `seed` is TRAIN_SEED.  `n_vocab`: classes that exist, the tokenizer's size for text; columns from there on
        are padding, whose logits eval mode sets to -inf.  None: all exist.  The module is initialised, on
        the CPU, fp32, in train mode.  Raises ValueError when the members do not fit together or n_vocab
        exceeds what the model holds.
        """


def fingerprint(network: nn.Module) -> str:
    """Hash of what the model computes: names, shapes, dropout, and logits of a small fixed batch.

    The logits are taken at a probe point, all tensors moved by 0.05 N(0, 1) from streams of their own, since
    mechanisms that start as the identity cannot be told apart at init.  Called once after build, before the
    move to a device; memory: one more copy of the weights.  Equal configurations and seeds give equal values
    on one machine at one thread count; the bits of a matmul differ elsewhere.
    """
    digest = hashlib.sha256()
    probe = {}
    for name, p in network.named_parameters():
        noise = init_(torch.empty_like(p), 0, f"probe:{name}", 0.05)  # beside weights of 0.02
        probe[name] = p.detach() + noise
        digest.update(f"{name} {tuple(p.shape)} {p.dtype}\n".encode())
    for path, module in network.named_modules():
        digest.update(f"{path} {type(module).__name__} {vars(module).get('dropout', 0.0)}\n".encode())
    training = network.training
    network.eval()
    with torch.no_grad():
        out = torch.func.functional_call(network, probe, (network.example(),))
    network.train(training)
    digest.update(out.logits.double().numpy().tobytes())
    return digest.hexdigest()
