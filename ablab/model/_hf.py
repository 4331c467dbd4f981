# SPDX-License-Identifier: MIT
"""Weights to and from the GPT-2 of Hugging Face transformers (GPT2LMHeadModel), by name; it is not imported.

Their Conv1D holds [in, out] where Linear holds [out, in].  Their activation "gelu" is MLP_GELU, "gelu_new"
(the published weights) is MLP_GELU_TANH=y.  Only the baseline has a counterpart: ATTN_MHA, MLP_GELU, biases.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

TO_OURS = {
    "ln_1": "ln1",
    "ln_2": "ln2",
    "attn.c_attn": "attn.project.qkv",
    "attn.c_proj": "attn.out",
    "mlp.c_fc": "mlp.up",
    "mlp.c_proj": "mlp.down",
}
TO_HF = {ours: theirs for theirs, ours in TO_OURS.items()}
HEAD = "lm_head.weight"  # tied to wte
MASKS = (".attn.bias", ".attn.masked_bias")  # buffers that older files hold


def from_hf(theirs: Mapping[str, Tensor], n_column: int) -> dict[str, Tensor]:
    """Our state dict; zero rows fill the vocabulary up to `n_column`.

    Raises ValueError for a tensor that has no counterpart, and when theirs has more than `n_column` rows.
    """
    names = [n for n in theirs if n != HEAD and not n.endswith(MASKS)]
    ours = {_rename(n.removeprefix("transformer."), "h", "blocks", TO_OURS): _turn(n, theirs[n]) for n in names}
    wte = ours["wte.weight"]
    if wte.shape[0] > n_column:
        raise ValueError(
            f"CONFIG_MODEL_GPT_VOCAB = {n_column} : the weights have {wte.shape[0]} rows; set that or more"
        )
    return ours | {"wte.weight": torch.cat([wte, wte.new_zeros(n_column - wte.shape[0], wte.shape[1])])}


def to_hf(ours: Mapping[str, Tensor], n_vocab: int | None = None) -> dict[str, Tensor]:
    """State dict of GPT2LMHeadModel; rows of the vocabulary from `n_vocab` on are padding and left out.

    Raises ValueError for a tensor that has no counterpart.
    """
    theirs = {f"transformer.{_rename(n, 'blocks', 'h', TO_HF)}": _turn(n, t) for n, t in ours.items()}
    theirs["transformer.wte.weight"] = theirs["transformer.wte.weight"][:n_vocab]
    return theirs | {HEAD: theirs["transformer.wte.weight"]}


def _rename(name: str, old: str, new: str, table: Mapping[str, str]) -> str:
    module, _, leaf = name.rpartition(".")
    if module in ("wte", "wpe", "ln_f"):
        return name
    prefix, layer, inner = (*module.split(".", 2), "", "")[:3]
    if prefix != old or inner not in table:
        raise ValueError(f"{name}: no such tensor in the GPT-2 of transformers; give the baseline model")
    return f"{new}.{layer}.{table[inner]}.{leaf}"


def _turn(name: str, t: Tensor) -> Tensor:
    return t.t().contiguous() if t.ndim == 2 and name.split(".")[-2] not in ("wte", "wpe") else t
