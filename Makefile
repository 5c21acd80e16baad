# make demo: set up, then run the main job on the embedded phantom data.   make test: set up, then lint, types and tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test fast lint browser slurm clean
.DELETE_ON_ERROR:

demo: $(READY)
	$(BIN)/cfssl demo

# Two processes of one thread each: small networks gain nothing by a second one, and two times two threads on two cores
# wait for each other.
test: lint browser slurm
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

fast: lint
	$(BIN)/python -m pytest -m "not slow and not real_data"

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Interactive pages are tested in a real browser.
browser:
	@command -v chromium >/dev/null || \
	  { test "$$(id -u)" = 0 && command -v apt-get >/dev/null && apt-get update -qq && \
	    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium; } || \
	  echo "Chromium is not there and could not be installed, so the tests of interactive pages skip; install it (Debian: apt-get install chromium) and call make test again."

# Jobs are tested on a real SLURM, which the tests bring up and take down.
slurm:
	@PATH=$$PATH:/usr/sbin command -v slurmctld >/dev/null || \
	  { test "$$(id -u)" = 0 && command -v apt-get >/dev/null && apt-get update -qq && \
	    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends slurmctld slurmd slurm-client munge >/dev/null; } || \
	  echo "SLURM is not there and could not be installed, so its test skips; install it (Debian: apt-get install slurmctld slurmd slurm-client munge) and call make test again."

# Set-up is done once; it is done again when what it depends on changes. constraints.txt pins everything, also pip
# itself and what builds packages.
$(READY): setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "cfssl needs Python 3.11 or newer, $(PYTHON) is `$(PYTHON) -V`; call make PYTHON=python3.11"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt --upgrade pip setuptools
	$(BIN)/python -m pip install --quiet -c constraints.txt --build-constraint constraints.txt -e '.[dev]'
	touch $(READY)

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
