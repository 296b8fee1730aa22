"""The benchmark of the attention ops: one device, one process, each op beside its peers.

command       starts the process, shows and keeps what it measured
spec          what to measure
worker        the entry of the process
bench         measuring the peers of a workload, and their records
workload      an op at one size: inputs that take turns, peers, what a call has to move
catalogue     which workloads there are; they are in qk_norm_rope, kv_materialize, indexer, logits, sparse_mla,
              mla_prepare, dual_stream
rope          rotary embeddings in plain torch; so are indexer_cache and sparse_cache, the layouts of the caches
flashinfer    FlashInfer's forms, where it has them
machine       what the device copies and multiplies in a second, and a copy of a call's bytes
device        the wall clock of a CPU; ranks where there is one
targets       what the figures are held against
tables        the figures for a terminal, a README and a plot
"""
