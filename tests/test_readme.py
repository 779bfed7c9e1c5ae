"""What the README says is run as it says it."""
import re
import subprocess
import sys

from conftest import ROOT, pair_rows, tiny_checkpoint, write_rows

README = (ROOT / "README.md").read_text()


def test_the_variant_of_the_readme_trains(tmp_path):
    """The Python block, saved as variants/ipo.py in a copy's place, trains: its first loss is (0 - 1 / (2 beta))^2 = 1.5625 at beta 0.4."""
    source, = re.findall(r"```python\n(.*?)```", README, re.S)
    (tmp_path / "variants").mkdir()
    (tmp_path / "variants" / "ipo.py").write_text(source)
    tiny_checkpoint(tmp_path / "model")
    write_rows(tmp_path / "pairs.jsonl", pair_rows(4))
    command = [sys.executable, "-m", "variants.ipo", "stepdpo", "--model", "model", "--data", "pairs.jsonl", "--out", "out", "--prompt", "alpaca", "--max_steps", "2"]
    done = subprocess.run(command, cwd=tmp_path, env={"PYTHONPATH": str(ROOT), "PATH": "", "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0 and "1.5625" in done.stdout, done.stdout + done.stderr


def test_file_names_functions_and_tests_of_the_readme_exist():
    """A reader who follows a name finds it."""
    code = "".join(path.read_text() for path in [*ROOT.glob("*.py"), *ROOT.glob("tests/*.py"), *ROOT.glob("examples/*.py")])
    for name in re.findall(r"`(?:\w+\.)?(test_\w+|[a-z]+_[a-z_]+|[A-Z]\w+)`", README):
        assert re.search(rf"\b{name}\b", code), name
    for link in re.findall(r"\]\((?!http)([\w./-]+)\)", README):
        assert (ROOT / link).exists(), link


def test_line_counts_of_the_readme(tmp_path):
    """To the nearest ten."""
    for name, lines in re.findall(r"\| \[`(\w+\.py)`\]\(\w+\.py\) \| ([\d,]+) \|", README):
        assert abs(len((ROOT / name).read_text().splitlines()) - int(lines.replace(",", ""))) <= 10, name
