# SPDX-License-Identifier: MIT
"""Certificates: what may be published of a campaign, and what a stranger needs to check it."""
