"""The benchmark of the attention ops; fusedcomm.cli.bench.single has what it shares with others.

catalogue    which ops there are; they are in qk_norm_rope, kv_materialize, indexer, logits, sparse_mla, mla_prepare,
             dual_stream
rope         rotary embeddings in plain torch; so are indexer_cache and sparse_cache, the layouts of the caches
flashinfer   FlashInfer's forms, where it has them
targets      what the figures are held against
"""
