# SPDX-License-Identifier: MIT
"""The DATA_* section of a text set, and of an image set, for tests that make members by hand."""

from ablab.data import Data, Tokenizer


def text(folder, tokenizer=Tokenizer.BYTE, val_fraction=0.1):
    none = dict.fromkeys(("split_seed", "augment_crop", "augment_flip", "augment_resize"))
    return Data.Section(dir=folder, tokenizer=tokenizer, val_fraction=val_fraction, **none)


def images(folder, split_seed=0, crop=0, flip=False, resize=0):
    augment = {"augment_crop": crop, "augment_flip": flip, "augment_resize": resize}
    return Data.Section(dir=folder, tokenizer=None, val_fraction=None, split_seed=split_seed, **augment)
