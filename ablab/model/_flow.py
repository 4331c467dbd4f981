# SPDX-License-Identifier: MIT
"""The build-time check that no part reads what nobody puts, and that nothing is carried or built in vain."""

from collections.abc import Sequence

from ablab.tensor.stage import ATTENTION_STAGES, MLP_STAGES, SINGLE, Attended, Coupling, Emit, Part, Past


class FlowError(ValueError):
    """The selected members do not fit together; the text names their symbols."""


def check(symbols: Sequence[str], blocks: Sequence[Sequence[Part]]) -> None:
    """Walk the parts, a list per block, in the order in which the hosts run them.

    Raises FlowError on a missing or second part of a stage that holds exactly one, on a value that is read
    but not there and on a carried value that the next block does not use, ValueError on a member that adds nothing.
    """
    for symbol in symbols:
        if not any(part.symbol == symbol for parts in blocks for part in parts):
            raise ValueError(
                f"CONFIG_{symbol}: adds no part to any of {len(blocks)} blocks: what it carries needs a"
                f" next block; set CONFIG_MODEL_GPT_LAYERS to 2 or more, or CONFIG_{symbol}=n"
            )
    carried: dict[type, str] = {}
    for layer, parts in enumerate(blocks):
        _count(layer, parts)
        carried = _walk(layer, parts, carried)
    for kind, symbol in carried.items():
        raise FlowError(_unused(symbol, kind, len(blocks) - 1))


def _count(layer: int, parts: Sequence[Part]) -> None:
    for stage in SINGLE:
        owners = [part.symbol for part in parts if part.stage == stage]
        if len(owners) != 1:
            got = " and ".join(owners) or "nobody"
            raise FlowError(f"block {layer}: {stage} comes from {got}: exactly one member must bring it; select one")
    seen = [(part.symbol.partition("_")[2], part.stage) for part in parts]
    for name, stage in seen:
        if seen.count((name, stage)) > 1:
            raise FlowError(f"block {layer}: two parts of {name} at {stage}: at most one per stage; merge them")


def _walk(layer: int, parts: Sequence[Part], carried: dict[type, str]) -> dict[type, str]:
    """Run one block on the types alone; returns what it carries to the next: type -> symbol."""
    there = {Coupling, Past, *carried}
    unused, emitted = dict(carried), {}
    for stage in (*ATTENTION_STAGES, *MLP_STAGES):
        if stage is MLP_STAGES[0]:
            there.add(Attended)  # the attention host publishes it when asked
        for part in [p for p in parts if p.stage == stage.stage]:
            symbol = part.symbol
            for kind in part.reads:
                if kind not in there:
                    raise FlowError(
                        f"CONFIG_{symbol}: its {part.stage} in block {layer} reads {kind.__name__}, which no"
                        f" part before it puts there: a member that emits {kind.__name__} must be on; set it,"
                        f" or CONFIG_{symbol}=n"
                    )
            for kind in part.reads + part.takes:
                unused.pop(kind, None)
            if isinstance(part, Emit):
                emitted |= dict.fromkeys(part.emits, symbol)
            else:
                there.update(part.emits)
    for kind, symbol in unused.items():
        raise FlowError(_unused(symbol, kind, layer - 1))
    return emitted


def _unused(symbol: str, kind: type, layer: int) -> str:
    return (
        f"CONFIG_{symbol}: carries {kind.__name__} from block {layer} to {layer + 1}, where no part reads it:"
        f" a carried value needs a reader; set a member that reads {kind.__name__}, or CONFIG_{symbol}=n"
    )
