# Everything here runs in one virtual environment made from requirements/*.lock. `make` alone lists the targets.
# Any variable can be set on the command line: make serve RATIO=0.2 PORT=9000

VENV   = .venv
PYTHON = python3
MODEL  = .models/SmolLM2-135M-Instruct
NAME   = SmolLM2-135M
RATIO  = 0.3
HOST   = 127.0.0.1
PORT   = 8000
TESTS  = tests
ARGS   =
# Extra options for pip, such as -q.
PIP_FLAGS =
# Empty serves stock vLLM, for a comparison.
ORTHORANK = --orthorank-ratio $(RATIO)
# Test files that run at the same time: much of their time is vLLM's start, which keeps one core busy.
JOBS   = 2
# One thread per core: a second thread on the same core only gets in the way of the first.
THREADS = $(shell { nproc; lscpu -p=CORE,SOCKET | grep '^[0-9]' | sort -u | wc -l; } | sort -n | awk '$$1 > 0' | head -n 1)

# So many for each of the tests' jobs, at least one.
JOB_THREADS = $(shell echo $$(( $(THREADS) > $(JOBS) ? $(THREADS) / $(JOBS) : 1 )))

BIN     = $(VENV)/bin
# Serving needs the first lock file alone, and starts the faster for it; the others add what evaluation, tests and checks need.
SERVE_STAMP = $(VENV)/.serves
STAMP   = $(VENV)/.installed
MORE_LOCKS = requirements/evaluate.lock requirements/dev.lock
# There while an installation is under way. Found at the start of one, it means that the last did not finish.
PARTIAL = $(VENV)/.installing
FETCHED = .models/SmolLM2-135M-Instruct

# The first two keep vLLM from sizing its KV cache by the memory that happens to be free and from dropping to one thread; the
# last three keep it from looking outside.
CPU_ENV = VLLM_CPU_KVCACHE_SPACE=2 VLLM_CPU_OMP_THREADS_BIND=nobind OMP_NUM_THREADS=$(THREADS) \
	VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1 HF_HUB_OFFLINE=1

# vLLM 0.32 cannot load on a CPU what it compiled ahead of time, and would compile anew at each start; torch's own cache is found.
SERVE_ENV = $(CPU_ENV) VLLM_USE_AOT_COMPILE=0 LD_PRELOAD=$$(ls $(TCMALLOC) $(abspath $(VENV))/lib/libiomp5.so 2>/dev/null | paste -sd:)

# What vLLM's documentation preloads on a CPU: Intel's OpenMP, which is among its dependencies, and tcmalloc, from Debian's package
# where apt can fetch it, which takes no root. Without, vLLM says so and serves a little slower.
TCMALLOC = $(abspath $(VENV))/lib/libtcmalloc_minimal.so.4

# What deployment is checked with: PyPI's tools in an environment of their own, and Debian's packages.
DEPLOY_VENV  = .venv-deploy
DEPLOY_STAMP = $(DEPLOY_VENV)/.installed
DEPLOY_CHECKS = prometheus prometheus-alertmanager
DEPLOY_RUNS   = $(DEPLOY_CHECKS) buildah podman runc catatonit mmdebstrap nginx-light

.PHONY: help venv model browser serve test lint bench gpu-check deploy-lint deploy-test deploy-clean clean distclean

help:
	@echo "make venv       the virtual environment $(VENV) (PYTHON=$(PYTHON), 4.1 GB)"
	@echo "make model      SmolLM2-135M-Instruct in $(FETCHED) (93 MB to download)"
	@echo "make browser    Debian's chromium, for the test of the report; as root"
	@echo "make serve      the server on $(HOST):$(PORT) (MODEL= NAME= RATIO=$(RATIO) HOST= PORT= ARGS=; ORTHORANK= is stock vLLM)"
	@echo "make test       the tests (TESTS=$(TESTS) ARGS= JOBS=$(JOBS))"
	@echo "make lint       ruff and mypy"
	@echo "make bench      the speed against stock vLLM (MODEL= RATIO=$(RATIO) ARGS=)"
	@echo "make gpu-check  what needs an NVIDIA GPU (80 GB): tests/gpu, then the speed on it (PYTHON=$(PYTHON), with vLLM for CUDA)"
	@echo "make deploy-lint   the chart, images, dashboard and alerts, as far as files tell; Prometheus's package, as root"
	@echo "make deploy-test   that, and all of it run for real: containers, alerts, replicas; as root (10 GB)"
	@echo "make deploy-clean  removes the images that deploy-test keeps for its next run"
	@echo "make clean      removes caches and build output"
	@echo "make distclean  removes $(VENV), $(DEPLOY_VENV) and $(FETCHED) as well"

venv: $(STAMP)
	@echo "venv: $(VENV) is ready"

# pip takes a half-unpacked package for an installed one, so an interrupted installation starts over.
ifneq ($(wildcard $(PARTIAL)),)
.PHONY: $(SERVE_STAMP)
endif

# Python compiles what is imported, once, which is a fraction of what pip would compile. It must be let to keep it.
export PYTHONDONTWRITEBYTECODE =
PIP_INSTALL = $(BIN)/python -m pip install $(PIP_FLAGS) --no-compile --no-deps

$(SERVE_STAMP): requirements/cpu.lock pyproject.toml tools/vllm-metadata/pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("venv: $(PYTHON) is too old, 3.11 is needed" if sys.version_info < (3, 11) else 0)'
	@echo "venv: installing vLLM for CPUs into $(VENV) (2.1 GB, about a minute)"
	@if [ -e $(PARTIAL) ]; then rm -rf $(VENV); fi
	@mkdir -p $(VENV) && touch $(PARTIAL)
	@$(PYTHON) -m venv $(VENV)
	@$(PIP_INSTALL) -r requirements/cpu.lock || { \
		echo "venv: pip failed; if it found no torch for the CPU, see the top of requirements/cpu.lock" >&2; exit 1; }
	@$(PIP_INSTALL) --no-build-isolation ./tools/vllm-metadata -e .
	@cd $(VENV)/lib && { apt-get download -q libtcmalloc-minimal4 && dpkg-deb --fsys-tarfile libtcmalloc-minimal4_*.deb \
		| tar -x --wildcards --strip-components=4 './usr/lib/*/libtcmalloc_minimal.so.*'; rm -f libtcmalloc-minimal4_*.deb; } \
		>/dev/null 2>&1 || echo "venv: without tcmalloc, which apt does not have here"
	@rm $(PARTIAL) && touch $@

$(STAMP): $(SERVE_STAMP) $(MORE_LOCKS)
	@echo "venv: adding what evaluation, tests and checks need (1.9 GB)"
	@touch $(PARTIAL)
	@$(PIP_INSTALL) $(MORE_LOCKS:%=-r %)
	@rm $(PARTIAL) && touch $@

# Only the default model can be fetched; any other is the user's own and is left to vLLM.
model: $(SERVE_STAMP)
ifeq ($(MODEL),$(FETCHED))
	@$(BIN)/python tools/fetch_model.py $(MODEL)
else
	@echo "model: using $(MODEL) as it is"
endif

# Without one that test is skipped, except in CI.
browser:
	@if command -v chromium >/dev/null; then echo "browser: $$(command -v chromium) is there"; else \
		echo "browser: installing chromium" && apt-get update -qq && \
		DEBIAN_FRONTEND=noninteractive apt-get install -qqy --no-install-recommends chromium >/dev/null; fi

# exec, here and below: signals reach the program itself and no shell stays in between.
serve: $(SERVE_STAMP) model
	@echo "serve: $(MODEL) as $(NAME) on http://$(HOST):$(PORT), $(THREADS) threads, $(or $(ORTHORANK),stock vLLM); Ctrl-C stops it"
	@exec env $(SERVE_ENV) $(BIN)/vllm serve $(MODEL) --served-model-name $(NAME) --dtype float32 --max-model-len 8192 \
		$(ORTHORANK) --host $(HOST) --port $(PORT) $(ARGS)

# tests/conftest.py sets the rest of the environment itself, so that plain pytest works too.
test: $(STAMP) model
	@echo "test: pytest $(TESTS) $(ARGS)"
	@exec env OMP_NUM_THREADS=$(JOB_THREADS) ORTHORANK_TEST_MODEL=$(abspath $(MODEL)) \
		$(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile $(TESTS) $(ARGS)

lint: $(STAMP)
	@echo "lint: ruff check, ruff format --check, mypy"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

bench: $(STAMP) model
	@echo "bench: the speed of $(MODEL) at ratio $(RATIO), $(THREADS) threads"
	@exec env $(CPU_ENV) $(BIN)/orthorank bench $(MODEL) --ratios $(RATIO) $(ARGS)

# By the user's own Python: the virtual environment here is for CPUs.
gpu-check:
	@echo "gpu-check: pytest -m gpu tests/gpu, then the steps of Llama 3 8B's shapes, by $(PYTHON)"
	@$(PYTHON) -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "gpu-check: torch has no GPU here")'
	@$(PYTHON) -m pytest -m gpu tests/gpu $(ARGS)
	@for ratio in 0.3 0.5; do echo "gpu-check: ratio $$ratio"; $(PYTHON) benchmarks/steps.py --shapes llama-3-8b \
		--ratio $$ratio --lengths 512,2048,8192,32768 --tokens 32768 --attention gather,triton --pairs 5 || exit 1; done

$(DEPLOY_STAMP): requirements/deploy.lock
	@echo "deploy: installing into $(DEPLOY_VENV) (750 MB)"
	@if [ -e $(DEPLOY_VENV)/pyvenv.cfg ]; then rm -rf $(DEPLOY_VENV); fi
	@$(PYTHON) -m venv $(DEPLOY_VENV)
	@$(DEPLOY_VENV)/bin/python -m pip install $(PIP_FLAGS) --no-deps -r requirements/deploy.lock
	@touch $@

# Debian's packages start no services where no init system runs; where one does, Prometheus's service is the user's to stop.
define debian_packages
	@missing=$$(dpkg-query -Wf '$${Package} $${db:Status-Status}\n' $(1) 2>/dev/null | awk '$$2 == "installed" {print $$1}' \
		| grep -vxFf - <(printf '%s\n' $(1)) || true); \
	if [ -n "$$missing" ]; then echo "deploy: installing $$missing"; apt-get update -qq && \
		DEBIAN_FRONTEND=noninteractive apt-get install -qqy --no-install-recommends $$missing >/dev/null; fi
endef

deploy-lint: SHELL = bash
deploy-lint: $(DEPLOY_STAMP)
	$(call debian_packages,$(DEPLOY_CHECKS))
	@echo "deploy-lint: pytest tests/deploy, without what runs containers"
	@exec $(DEPLOY_VENV)/bin/python -m pytest tests/deploy --ignore tests/deploy/live $(ARGS)

deploy-test: SHELL = bash
deploy-test: $(STAMP) model $(DEPLOY_STAMP)
	$(call debian_packages,$(DEPLOY_RUNS))
	@echo "deploy-test: pytest tests/deploy"
	@exec env ORTHORANK_TEST_VENV=$(abspath $(VENV)) ORTHORANK_TEST_MODEL=$(abspath $(MODEL)) \
		$(DEPLOY_VENV)/bin/python -m pytest tests/deploy -v $(ARGS)

deploy-clean:
	@echo "deploy-clean: removing the tests' images"
	@STORAGE_DRIVER=overlay podman rmi --force localhost/orthorank-vllm:test localhost/vllm-cpu:test localhost/debian:bookworm

clean:
	@echo "clean: removing caches and build output"
	@rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist *.egg-info tools/*/build tools/*/*.egg-info
	@find orthorank_vllm tests benchmarks tools -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	@echo "distclean: removing $(VENV), $(DEPLOY_VENV) and $(FETCHED)"
	@if [ -e $(VENV)/pyvenv.cfg ] || [ -e $(PARTIAL) ]; then rm -rf $(VENV); fi
	@if [ -e $(DEPLOY_VENV)/pyvenv.cfg ]; then rm -rf $(DEPLOY_VENV); fi
	@rm -rf $(FETCHED)
