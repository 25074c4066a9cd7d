"""Rank-space statistics, taken wherever a LoRA layer is computed: modules, compiled layers, fused functions."""
