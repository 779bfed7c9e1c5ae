"""What the README says is run as it says it."""
import ast
import re
import subprocess
import sys

import pytest
from conftest import ROOT, pair_rows, tiny_checkpoint, write_rows

README = (ROOT / "README.md").read_text()
VARIANTS = re.findall(r"```python\n(.*?)```", README, re.S)


@pytest.mark.parametrize("number, method, first_loss", [(0, "stepdpo", "1.5625"), (1, "dpo", "0.6931"), (2, "stepdpo", "0.6931")],
                         ids=["a loss", "weights a step", "a curriculum"])
def test_the_variants_of_the_readme_train(tmp_path, number, method, first_loss):
    """Each Python block, saved as a file of variants/, trains as printed. IPO's first loss is (0 - 1 / (2 beta))^2 = 1.5625
    at beta 0.4; the other two begin at log 2."""
    (tmp_path / "variants").mkdir()
    (tmp_path / "variants" / "mine.py").write_text(VARIANTS[number])
    tiny_checkpoint(tmp_path / "model")
    write_rows(tmp_path / "pairs.jsonl", pair_rows(4))
    command = [sys.executable, "-m", "variants.mine", method, "--model", "model", "--data", "pairs.jsonl", "--out", "out",
               "--prompt", "alpaca", "--max_steps", "2"]
    done = subprocess.run(command, cwd=tmp_path, env={"PYTHONPATH": str(ROOT), "PATH": "", "OMP_NUM_THREADS": "1"},
                          capture_output=True, text=True)
    assert done.returncode == 0 and first_loss in done.stdout, done.stdout + done.stderr


def test_file_names_functions_and_tests_of_the_readme_exist():
    """A reader who follows a name finds it."""
    code = "".join(path.read_text() for path in [*ROOT.glob("*.py"), *ROOT.glob("tests/*.py"), *ROOT.glob("examples/*.py")])
    for name in re.findall(r"`(?:\w+\.)?(test_\w+|[a-z]+_[a-z_]+|[A-Z]\w+)`", README):
        assert re.search(rf"\b{name}\b", code), name
    for link in re.findall(r"\]\((?!http)([\w./-]+)\)", README):
        assert (ROOT / link).exists(), link


def lines_of(file: str, name: str) -> int:
    """Lines of a definition of a file; `Class.method` names one inside."""
    body = ast.parse((ROOT / file).read_text()).body
    for part in name.split("."):
        node = next(node for node in body if getattr(node, "name", None) == part)
        body = node.body
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    return node.end_lineno - first + 1


def reading_path() -> list[tuple[int, dict[str, int]]]:
    """Of each row of the table: the lines that it states, and the lines of its places in each file."""
    rows = []
    for places, stated in re.findall(r"^\| \d+ \| (.+?) \| (\d+) \|", README, re.M):
        found: dict[str, int] = {}
        for file, names in re.findall(r"\[`([\w/.]+)`\]\([\w/.]+\): ((?:`[\w.]+`(?:, )?)+)", places):
            found[file] = sum(lines_of(file, name) for name in re.findall(r"`([\w.]+)`", names))
        rows.append((int(stated), found))
    return rows


def test_the_reading_path_is_there_and_as_long_as_it_says():
    """Every place exists, and the lines to read are counted to within five in a hundred."""
    path = reading_path()
    assert len(path) >= 7
    for stated, found in path:
        assert found and abs(sum(found.values()) - stated) <= max(3, 0.05 * stated), (stated, found)


def test_line_counts_of_the_readme():
    """Lines of the four files to the nearest ten; lines to read are those of the reading path."""
    for name, lines, to_read in re.findall(r"\| \[`(\w+\.py)`\]\(\w+\.py\) \| ([\d,]+) \| ([\d,]*) ?\|", README):
        assert abs(len((ROOT / name).read_text().splitlines()) - int(lines.replace(",", ""))) <= 10, name
        counted = sum(found.get(name, 0) for _, found in reading_path())
        assert abs(counted - int(to_read.replace(",", "") or 0)) <= 10, (name, counted)


def test_the_siblings_page_points_where_it_says():
    """Functions of variants/README.md stand at the lines it gives, files and tests that it names exist."""
    page = (ROOT / "variants" / "README.md").read_text()
    places = [(file, name, int(line)) for file, names in re.findall(r"`variants/(\w+\.py)`: ([^|]*)", page)
              for name, line in re.findall(r"`(\w+)` \((\d+)\)", names)]
    assert len(places) > 20
    for file, name, line in places:
        source = (ROOT / "variants" / file).read_text().splitlines()
        assert re.match(rf"(def|class) {name}\b", source[line - 1]), (file, name, line)
    tests = "".join(path.read_text() for path in ROOT.glob("tests/*.py"))
    assert all(f"def {name}(" in tests for name in re.findall(r"`(test_\w+)`", page))
    assert all((ROOT / "variants" / link).exists() for link in re.findall(r"\]\((?!http|#)([\w./-]+)\)", page))
