# Cut a quarter of the layers out, let the rest learn from the whole model, store it in 8 bits. The report at the end holds
# the perplexity after each step, in its history.
#
#     make recipe-recover                                   # SmolLM2, from the project's folder
#     make -f recipes/recover.mk MODEL=my-model TEXT=unseen.txt OUT=out/my-model TERSOR=tersor
MODEL ?= cache/smollm2
TEXT ?= benchmarks/data/heldout.txt
OUT ?= out/recover
TERSOR ?= tersor
STEPS ?= 200
EVALUATE = $(TERSOR) evaluate - --text $(TEXT) --seq-len 512 --max-windows 40 --record

.PHONY: recover
recover:
	$(TERSOR) prune $(MODEL) -o $(OUT)/1-pruned --force --remove layers --sparsity 0.25 --samples 32 | $(EVALUATE) \
	  | $(TERSOR) distill - --teacher $(MODEL) -o $(OUT)/2-distilled --force --steps $(STEPS) --batch 4 --seq-len 256 | $(EVALUATE) \
	  | $(TERSOR) quantize - -o $(OUT)/3-quantized --force --scheme w8a16 | $(EVALUATE)
	@echo "report: $(OUT)/3-quantized/report.html"
