"""The demonstration that launch/demo runs: one model, decoded on many ranks with fusion and without."""
