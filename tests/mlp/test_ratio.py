# SPDX-License-Identifier: MIT
"""Exact sizes at full width of models that spend one MLP budget on units, head gates and routing."""

import pytest
import torch

from tests.blocks import network

FULL = {"LAYERS": 12, "HEADS": 12, "EMBED": 768, "BLOCK": 1024, "VOCAB": 50304}
GATES = {"MLP_GELU_WIDTH": 3264, "MLP_HEADGATE": True, "MLP_HEADGATE_DIM": 296}
BOTH = {"MLP_GELU_WIDTH": 3072, "MLP_HEADGATE": True, "MLP_HEADGATE_DIM": 224, "MLP_CROSS": True}


@pytest.mark.parametrize(
    ("symbols", "parameters", "ratio", "cache"),
    [
        ({"MLP_GELU_WIDTH": 3072}, 124_475_904, 2.0, 36_864),
        ({"MLP_GELU_WIDTH": 3840}, 138_640_896, 2.5, 36_864),
        (GATES, 138_683_940, 2.5018, 36_864),
        (BOTH, 138_563_076, 2.4976, 38_976),
    ],
    ids=["baseline", "width", "gates", "gates-cross"],
)
def test_parameters_ratio_and_cache_are_exact(symbols, parameters, ratio, cache):
    with torch.device("meta"):
        net = network(**{f"MODEL_GPT_{k}": v for k, v in FULL.items()}, **symbols)
    assert sum(p.numel() for p in net.parameters()) == parameters
    facts = net.facts()
    assert round(facts["mlp_to_attention"], 4) == ratio and facts["kv_bytes_per_token"] == cache
