"""The benchmarks on GPUs: graph-replayed collectives beside their peers, and a decode step.

harness     measuring: cases captured in graphs, replayed in turn, the slowest rank's median
device      streams, events and graphs of one GPU
job         what the cases of one run share: groups, NCCL, votes of the ranks
peers       torch's ways: NCCL, with eager or compiled steps behind it, symmetric memory
compiling   torch.compile as all benchmarks use it
flashinfer  FlashInfer's all-reduce and its fused form, where it is installed
ours        this library by stage and algorithm
load        a memory-bound kernel that runs on a second stream meanwhile
collectives the entry of a rank process of ``bench collectives``
decode      the entry of a rank process of ``bench decode``; decode_stack is what it runs
targets     what the figures are held against
command     starts the ranks
"""
