# SPDX-License-Identifier: MIT
# Every target is one line: the work is done by `python -m ablab VERB`, which has the same name and its help.
# Quiet by default; V=1 shows the commands.

MAKEFLAGS += --no-print-directory --no-builtin-rules
Q := $(if $(filter 1,$(V)),,@)
# expanded where it is used: python3.11 if it runs, else python3
PYTHON ?= $(shell python3.11 -c 'print("python3.11")' 2>/dev/null || echo python3)
PY := .venv/bin/python
ABLAB := $(Q)$(PY) -m ablab

# Names of the variables given on the command line; their values reach the recipe through the environment, so
# blanks and quotes survive.  An unknown one is an error, see `make help`.
export ABLAB_MAKE_VARS := $(filter-out PYTHON,$(foreach v,$(.VARIABLES),$(if $(findstring command,$(origin $v)),$v)))

VERBS := list-defconfigs menuconfig olddefconfig savedefconfig listnewconfig diffconfig allyesconfig \
  allnoconfig alldefconfig randconfig why plan check estimate continue rerun stop status amend data sample \
  tracker telemetry machine doctor report plots plot-check dashboard watch compare ls keys series diff gpu power \
  placebo verify bundle reproduce metrics help

.PHONY: all run $(VERBS) style test test-all golden bench bench-check gpu-check ci clean mrproper setup

all: run

run: .venv/run
	$(ABLAB) run

$(VERBS): .venv/run
	$(ABLAB) $@

DEFCONFIGS := $(addprefix defconfig-,$(notdir $(wildcard defconfigs/*)) $(notdir $(basename $(wildcard studies/*.study))))
.PHONY: $(DEFCONFIGS)
$(sort $(DEFCONFIGS)): .venv/run
	$(ABLAB) $@

defconfig-%: .venv/run
	$(ABLAB) $@

setup: .venv/run

.venv/run: constraints.txt pyproject.toml
	$(Q)$(PYTHON) -m ablab.setup run

.venv/test: .venv/run
	$(Q)$(PYTHON) -m ablab.setup test

style: .venv/test
	$(Q)$(PY) scripts/style.py

test: .venv/test
	$(Q)$(PY) -m pytest -n 2 -m "not slow"

test-all: .venv/test
	$(Q)$(PY) -m pytest -n 2

golden: .venv/test
	$(Q)ABLAB_GOLDEN=write $(PY) -m pytest -q tests -k golden

bench: .venv/test
	$(Q)$(PY) -m benchmarks

bench-check: .venv/test
	$(Q)$(PY) -m benchmarks --check

gpu-check:
	$(Q)$(if $(wildcard $(PY)),$(PY),$(PYTHON)) -m benchmarks.gpu

ci: style test

clean:
	$(Q)rm -rf build *.egg-info .pytest_cache .ruff_cache && find ablab tests scripts benchmarks -name __pycache__ -prune -exec rm -rf {} +

mrproper: clean
	$(Q)rm -rf .venv .config .config.old .config.origin config.py

.DEFAULT:
	$(Q)$(if $(wildcard $(PY)),$(PY),$(PYTHON)) -m ablab --no-such-target $@
