# LadaBERT's hybrid (Mao et al., 2020): some layers as products of thin ones, others with most weights gone, then trained
# twice against the original: first block by block on hidden states and attention, where the compressed weights start near,
# then on its answers.
#
#     make -f recipes/ladabert.mk MODEL=cache/smollm2 OUT=out/ladabert
MODEL ?= cache/smollm2
TEXT ?= benchmarks/data/heldout.txt
OUT ?= out/ladabert
TERSOR ?= tersor
STEPS ?= 200
FACTORISED ?= self_attn
PRUNED ?= mlp
EVALUATE = $(TERSOR) evaluate - --text $(TEXT) --seq-len 512 --max-windows 40 --record

.PHONY: ladabert
ladabert:
	$(TERSOR) prune $(MODEL) -o $(OUT)/1-pruned --force --include $(PRUNED) --sparsity 0.5 --samples 32 | $(EVALUATE) \
	  | $(TERSOR) prune - -o $(OUT)/2-factorised --force --remove ranks --include $(FACTORISED) --sparsity 0.25 --samples 32 | $(EVALUATE) \
	  | $(TERSOR) distill - --teacher $(MODEL) -o $(OUT)/3-layerwise --force --steps $(STEPS) --loss hidden=1,attention=0.1 | $(EVALUATE) \
	  | $(TERSOR) distill - --teacher $(MODEL) -o $(OUT)/4-tuned --force --steps $(STEPS) --loss kl=1,next=0.1 | $(EVALUATE)
	@echo "report: $(OUT)/4-tuned/report.html"
