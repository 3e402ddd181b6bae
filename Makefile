# make demo    the main job on this machine: two nodes, real changes, damage, repair, proof (under two minutes)
# make test    format, lint, types, all tests (large counts sampled); under 30 minutes on two cores
# make unit    the tests that run in seconds
# make soak    the tests with the large counts in full: hours
# make host    the tests that need no guests
# make lab     the tests on real OpenZFS 2.1 and 2.3 in guests (root; the first time builds them, some 10 min)
# make bench   every subject beside its peers; the tables, and JSON in benchmarks/results/
# make clean   remove what was built

SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
PYTHON := $(BIN)/python
SOURCES := replicator backends scheduler transport tests benchmarks
C_FILES := $(wildcard transport/*.c transport/*.h)

LAB_TESTS = $(PYTHON) -m pytest -q --durations=10 --lab tests/lab
SOAK =

.PHONY: demo test unit soak host host-ceph host-rest lab guests-2.1 guests-2.3 bench lint install clean
.DEFAULT_GOAL := demo

# From the distribution's Python, and seeing its packages: rados, rbd and pyzfs come only from there.
$(VENV)/installed: pyproject.toml $(C_FILES)
	.ci/packages build
	[ -x $(PYTHON) ] || /usr/bin/python3 -m venv --system-site-packages $(VENV)
	$(PYTHON) -m pip install --quiet --disable-pip-version-check --editable .
	touch $@

$(VENV)/installed-test: $(VENV)/installed
	.ci/packages test
	$(PYTHON) -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	touch $@

install: $(VENV)/installed

demo: install
	$(BIN)/replicator demo $(IMAGE)

lint: $(VENV)/installed-test
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/mypy

unit: $(VENV)/installed-test
	$(PYTHON) -m pytest -q tests/unit

# All at once, as guests wait a lot; what is said of the guests comes at the end.
test: lint
	.ci/packages lab
	@rm -f build/*.txt
	@$(MAKE) --no-print-directory -j4 host guests-2.1 guests-2.3; status=$$?; .ci/summary; exit $$status

soak: lint
	.ci/packages lab
	@rm -f build/*.txt
	@$(MAKE) --no-print-directory -j4 SOAK=--soak host guests-2.1 guests-2.3; status=$$?; .ci/summary; exit $$status

host: host-ceph host-rest

HOST_TESTS = $(PYTHON) -m pytest -q --durations=10 $(if $(SOAK),--soak --timeout=3600)

# Those on real Ceph clusters wait a lot too.
host-ceph: $(VENV)/installed-test
	@mkdir -p build
	@.ci/with-ceph $(HOST_TESTS) > build/$@.txt 2>&1; status=$$?; echo "In $@:"; cat build/$@.txt; exit $$status

host-rest: $(VENV)/installed-test
	@mkdir -p build
	set -o pipefail; $(HOST_TESTS) --ignore-glob='*/integration/test_rbd_*.py' | tee build/$@.txt

lab: $(VENV)/installed-test
	.ci/packages lab
	$(LAB_TESTS)

# OpenZFS 2.1 is in Debian bookworm, 2.3 in trixie.
guests-2.1: CHOICE = not trixie
guests-2.3: CHOICE = trixie
guests-2.1 guests-2.3: $(VENV)/installed-test
	@mkdir -p build
	@$(LAB_TESTS) $(SOAK) -k "$(CHOICE)" > build/$@.txt 2>&1; status=$$?; echo "In $@:"; cat build/$@.txt; exit $$status

bench: $(VENV)/installed-test
	$(PYTHON) -m benchmarks

clean:
	rm -rf $(VENV) build dist *.egg-info transport/*.so .mypy_cache .ruff_cache .pytest_cache .hypothesis
