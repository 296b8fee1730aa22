"""The program of the README runs as pasted."""

import re
import subprocess
import sysconfig
from pathlib import Path

from fusedcomm.env import Settings

README = Path(__file__).parents[2] / "README.md"


def test_two_rank_program_prints_the_same_sum_on_both_ranks(tmp_path: Path) -> None:
    (script,) = re.findall(r"```bash\n(.*?)```", README.read_text(), re.S)
    script = script.replace(".venv/bin/", f"{sysconfig.get_path('scripts')}/")
    done = subprocess.run(["bash", "-euc", script], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = dict(re.findall(r"rank (\d): (.*?sum -?[\d.]+)", done.stdout))
    assert lines.keys() == {"0", "1"}
    assert lines["0"] == lines["1"]
    assert "allreduce_rmsnorm_quant: fused" in done.stdout


def test_settings_table_has_every_setting_with_its_default() -> None:
    text = README.read_text()
    for setting in Settings().describe({}):
        row = next((line for line in text.splitlines() if line.startswith("|") and f"`{setting.variable}`" in line), "")
        assert row, f"{setting.variable} is not in the settings table"
        default = setting.default
        shown = "" if default is None else str(int(default) if isinstance(default, (bool, float)) else default)
        assert row.split("|")[2].strip() == shown, row
