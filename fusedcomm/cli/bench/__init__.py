"""Benchmarks, with the peers they are measured against.

They are part of the package, so that ``fusedcomm bench`` works from an installed wheel; ``benchmarks/`` in a checkout
holds thin entries to them and the recorded results.

    harness      measuring: peers interleaved in one run, poisoned results, the slowest rank's median
    registry     which peers there are
    cases        inputs that differ by rank, and the results to expect
    collectives  the peers of the collectives
    job          what the peers of one run share: MPI, groups made with given settings and tuning
    worker       the entry of a rank process
    report       JSON lines, table, plot
    gpu          the collectives and a decode step on GPUs
    single       what the benchmarks of ops on one device share; benchmarks has their list
    attention    the ops around attention, on one GPU
    sampling     sampling and speculative verification, on one GPU or a CPU
"""
