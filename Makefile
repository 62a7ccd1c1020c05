# make demo   the main job on real digits, offline, 6 to 10 minutes on 2 CPU cores
# make test   the tests;  make test-dist  those of several processes or many launches;  make check  format, lint, types, tests
# make test-slurm   jobs on a real SLURM that the tests install (root and apt; else skipped): about 20 minutes
# make test-simcuda   the programs on simulated GPUs (needs g++), about 5 minutes;  make test-gpu   the same on real ones
# make torture   all trials of kill -9 and the other faults (docs/reliability.md), about half an hour
PYTHON ?= python3
PY := .venv/bin/python
IMAGES ?= 76_800
FLOW_IMAGES ?= 121_600
MIN_SVC ?= 0.95
# two processes of one thread each: the tests are too short to benefit from torch's threads. malloc keeps large blocks
# instead of returning them to the system at every layer, to be cleared again: up to half of the time of networks' tests
TEST := OMP_NUM_THREADS=1 MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=1073741824 $(PY) -m pytest -n 2
FEATURES := mf_dist/assets/digits-features
DIST = dist

.PHONY: install demo test test-dist test-dist-ci test-slurm test-slurm-ci test-simcuda test-simcuda-ci test-gpu torture check format clean
install: .venv/installed

.venv/installed: requirements.txt constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "mf_dist needs python 3.11 or newer: make PYTHON=/path/to/python3")'
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt -c constraints.txt -e .
	@touch $@

# flow matching first: tools use the newest run by default, which should be the one-step model
demo: install
	$(PY) tools/demo/write_digits.py --out data/digits --split data/digits-split
	$(PY) tools/encode_latents.py --images data/digits --out data/digits-latents --vae mf_dist/assets/digits-vae --resolution 32
	$(PY) tools/reference_stats.py --images data/digits-split/a --features $(FEATURES) --out data/digits-split/a.npz
	$(PY) tools/fid_eval.py --images data/digits-split/b --features $(FEATURES) --reference data/digits-split/a --out runs/digits_real
	$(PY) -m mf_dist.train configs/digits_flow_cpu.yaml train.total_images=$(FLOW_IMAGES)
	$(PY) tools/fid_eval.py --nfe 50 --save-npz
	$(PY) -m mf_dist.train configs/digits_cpu.yaml train.total_images=$(IMAGES)
	$(PY) tools/fid_eval.py --nfe 1 --reference data/digits-split/a --save-npz
	$(PY) tools/fid_eval.py --nfe 2 --reference data/digits-split/a --save-npz
	$(PY) tools/report.py runs/digits
	$(PY) tools/report.py runs/digits runs/digits_flow
	$(PY) tools/demo/demo_table.py --run runs/digits --flow runs/digits_flow --real runs/digits_real --min-svc $(MIN_SVC)

test: install
	$(TEST)

# tests that start ranks and end them by time limits run alone
test-dist-ci: DIST = dist and not long
test-dist test-dist-ci: install
	$(TEST) -m "$(DIST) and not alone" --durations=10
	$(PY) -m pytest -m "$(DIST) and alone" tests/distributed --durations=10

test-slurm: install
	OMP_NUM_THREADS=1 $(PY) -m pytest -m slurm -rs --durations=0 tests/slurm

# submission, the signal of the time limit, a lost node, and every script as sbatch parses it
test-slurm-ci: install
	OMP_NUM_THREADS=1 $(PY) -m pytest -m slurm_ci -rs --durations=0 tests/slurm

# the programs on simulated GPUs; test-gpu: the same and the kernels on the GPUs of this machine
test-simcuda: install
	$(TEST) -m simcuda -rs --durations=5 tests/simcuda

test-simcuda-ci: install
	$(TEST) -m "simcuda and not long" -rs --durations=5 tests/simcuda

test-gpu: install
	$(PY) -m pytest -m gpu -rs --durations=5 tests/simcuda tests/models

torture: install
	TORTURE=1 $(PY) -m pytest -m dist -s tests/distributed/test_faults.py tests/distributed/test_soak.py

check: install
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy
	$(TEST)

format: install
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

clean:
	rm -rf .venv data/digits data/digits-latents data/digits-split runs/digits runs/digits_flow runs/digits_real
