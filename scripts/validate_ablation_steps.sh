#!/bin/sh
# SPDX-License-Identifier: MIT
# Dry-run every step of a study: make check.
cd "$(dirname "$0")/.." && exec .venv/bin/python -m ablab check "$@"
