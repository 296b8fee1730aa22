"""Shows recorded results again: ``python benchmarks/report.py FILE.jsonl… [--markdown|--ratios] [--plot FILE.png]``."""

import argparse
from pathlib import Path

from rich.console import Console

from fusedcomm.cli.bench.benchmarks import BENCHMARKS
from fusedcomm.cli.bench.gpu.markdown import collectives_tables, decode_tables
from fusedcomm.cli.bench.report import print_report, read_records, save_plot
from fusedcomm.cli.bench.single.ratios import ratio_tables
from fusedcomm.cli.bench.single.tables import markdown_tables, records_of


def main() -> None:
    """Prints the report of all files together, as the benchmark that wrote them would."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE.jsonl")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--markdown", action="store_true", help="the README's tables")
    form.add_argument("--ratios", action="store_true", help="ours over each peer, a line an op (markdown)")
    parser.add_argument("--plot", type=Path, metavar="FILE.png")
    arguments = parser.parse_args()
    records = [record for file in arguments.files for record in read_records(file)]
    if arguments.markdown:
        tables = [collectives_tables(records), decode_tables(records)]
        tables += [markdown_tables(records_of(name, records)) for name in BENCHMARKS]
        print("\n\n".join(filter(None, tables)))
    elif arguments.ratios:
        print("\n\n".join(filter(None, (ratio_tables(records_of(name, records)) for name in BENCHMARKS))))
    else:
        print_report(records, Console(width=200))
    if arguments.plot:
        save_plot(records, arguments.plot)


if __name__ == "__main__":
    main()
