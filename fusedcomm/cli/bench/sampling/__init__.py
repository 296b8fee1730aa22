"""The benchmark of sampling and speculative verification; fusedcomm.cli.bench.single has what it shares with others.

catalogue    which ops there are; they are in filters, softmax, draws, chain, tree, greedy
rows         the sizes, probabilities of them, and peers over them
checks       what results are held against: sorts and sums in fp64
torch_forms  filters and draws in plain torch, as engines write them
targets      what the figures are held against
"""
