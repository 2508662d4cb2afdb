# Thin on purpose: each target says what it runs. `make demo` and `make test` need nothing typed before.

PYTHON ?= python3
VENV := .venv

# What Debian's minimal system lacks: venv, a real systemd with its user bus, ss for the oracles.
PACKAGES := python3-venv systemd dbus dbus-user-session iproute2

# What boots containers of Debian, for the tests in them; a second witness of what a manager kills.
TEST_PACKAGES := systemd-container mmdebstrap debian-archive-keyring strace

# A peer of the benchmarks, and what tells the peak memory of a command.
BENCH_PACKAGES := lsof time

.PHONY: help packages test-packages bench-packages setup demo test matrix bench pictures clean

help:
	@echo "make demo      set everything up and show the main job on a real systemd"
	@echo "make test      every check and every tier of tests"
	@echo "make matrix    the tests in every suite, and docs/matrix.md from their reports"
	@echo "make bench     ratios against systemctl, ss, lsof and psutil"
	@echo "make pictures  draw docs/*.svg anew from real output"

test-packages: PACKAGES += $(TEST_PACKAGES)
bench-packages: PACKAGES += $(BENCH_PACKAGES)
test-packages bench-packages packages:
	@command -v dpkg-query >/dev/null || exit 0; \
	missing=; \
	for package in $(PACKAGES); do \
	  dpkg-query -W -f='$${Status}' $$package 2>/dev/null | grep -q 'ok installed' \
	    || missing="$$missing $$package"; \
	done; \
	if [ -z "$$missing" ]; then exit 0; fi; \
	if [ "$$(id -u)" != 0 ]; then echo "Missing packages; as root: apt install$$missing" >&2; exit 1; fi; \
	echo "Installing$$missing"; \
	apt-get -qq update && DEBIAN_FRONTEND=noninteractive \
	  apt-get -qq install --no-install-recommends $$missing >/dev/null

$(VENV)/bin/python: | packages
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "sdtool needs Python 3.11 or newer: make PYTHON=python3.11 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.run: pyproject.toml | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --editable .
	@touch $@

$(VENV)/.dev: pyproject.toml | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@ $(VENV)/.run

setup: packages $(VENV)/.run

demo: setup
	$(VENV)/bin/sdtool sandbox --demo

test: test-packages $(VENV)/.dev
	$(VENV)/bin/python -m pytest

matrix: export SUITES := bookworm trixie sid
matrix: test-packages $(VENV)/.dev
	rm -rf build/reports
	-$(VENV)/bin/python -m pytest tests/system --junit-xml=build/reports/host.xml
	-$(VENV)/bin/python -m pytest tests/container --junit-xml=build/reports/containers.xml
	$(VENV)/bin/python docs/matrix.py

bench: bench-packages $(VENV)/.dev
	$(VENV)/bin/python tests/bench/commands.py
	$(VENV)/bin/python tests/bench/ports.py
	$(VENV)/bin/python tests/bench/stops.py

pictures: packages $(VENV)/.dev
	$(VENV)/bin/python docs/pictures.py

clean:
	rm -rf $(VENV) build dist
