#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Draw the figures of docs/mechanisms.md from the code that they are about: draw_mechanisms.py [FOLDER]."""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.colors import ListedColormap

from ablab.tensor import rowstat
from ablab.tensor.attend import attend, sees
from ablab.tensor.stage import CAUSAL, Ctx, Field, Heads, Piece, Region

T, K, HEADS, TOP = 256, 16, 64, 8
COLORS = ("#f2f2f2", "#4477aa", "#ee8866")


def heads() -> Heads:
    """Rows with independent normal logits of unit variance: no row means more than another."""
    q, k, v = (torch.randn(1, HEADS, T, K, generator=torch.Generator().manual_seed(i)) for i in range(3))
    return Heads(q, k, v, K**-0.5, (Piece(q, (Field("k", k),), CAUSAL),), Field("v", v))


def statistics(path: Path) -> None:
    """Mean over heads of each statistic against the number of visible keys, raw and position-normalised."""
    h, ctx = heads(), Ctx()
    m, _ = attend(h, ctx, lse=True)
    raw = {
        f"top-{TOP} mass": rowstat.mass(m, h, ctx, TOP),
        "entropy / nats": rowstat.entropy(m, h, ctx),
        "L2 norm": rowstat.power(m, h, ctx, 2).sqrt(),
    }
    shares = {
        f"top {TOP}": rowstat.mass_share(m, h, ctx, TOP),
        "entropy": rowstat.entropy_share(m, h, ctx),
        "RMS": rowstat.rms_share(m, h, ctx),
    }
    figure, axes = plt.subplots(1, 2, figsize=(7, 2.6), layout="constrained")
    for axis, found, title in zip(axes, (raw, shares), ("raw", "normalised by visible keys: t"), strict=True):
        for name, value in found.items():
            axis.plot(range(1, T + 1), value.mean((0, 1)), label=name, lw=1.2)
        axis.set(title=title, xlabel="visible keys n", xscale="log")
        axis.legend(fontsize=7, frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
    axes[1].set_ylim(0, 1.02)
    figure.savefig(path, dpi=150)


def regions(path: Path) -> None:
    """Which keys a query sees in one causal piece, and in the two of a window."""
    size, window = 20, 5
    gap = torch.arange(size)[:, None] - torch.arange(size)
    band, far = Region("band", window), Region("far", window)
    pictures = {
        "causal": sees(CAUSAL, gap).int(),
        f"band and far, W = {window}": sees(band, gap).int() + 2 * sees(far, gap).int(),
    }
    figure, axes = plt.subplots(1, 2, figsize=(5.4, 3), layout="constrained")
    for axis, (title, picture) in zip(axes, pictures.items(), strict=True):
        axis.pcolormesh(picture.flip(0), cmap=ListedColormap(COLORS), vmin=0, vmax=2, edgecolors="white", lw=0.5)
        axis.set(title=title, xlabel="key j", ylabel="query i", xticks=[], yticks=[], aspect="equal")
    figure.savefig(path, dpi=150)


def main(folder: str = "docs") -> None:
    statistics(Path(folder) / "mechanisms-statistics.png")
    regions(Path(folder) / "mechanisms-regions.png")


if __name__ == "__main__":
    main(*sys.argv[1:])
