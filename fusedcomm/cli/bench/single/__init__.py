"""Benchmarks of ops on one device, in one process: each op beside its peers. What all of them share.

benchmark    what a benchmark is made of: its ops, its bars, what FlashInfer compiles for it
command      starts the process, shows and keeps what it measured
spec         what to measure
worker       the process
bench        measuring the peers of a workload, and their records
workload     an op at one size: inputs that take turns, peers, what a call has to move
machine      what the device copies and multiplies in a second, and a copy of a call's bytes
device       a CPU in place of a GPU; ranks where there is one
flashinfer   FlashInfer's modules, compiled ahead
bars         what the figures are held against
tables       the figures for a terminal, a README and a plot
ratios       ours over each peer, a line an op
"""
