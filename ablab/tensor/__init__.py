# SPDX-License-Identifier: MIT
"""What two families share on tensors: stages and contexts of a block, and the one softmax."""
