"""Numbers of released code, and of closed forms, that the siblings must reproduce: every case of every file.

The files are data alone: each says what goes in, what comes out and how exactly. They lie in ../shared/methods; SIBLING_CASES names another folder of them.
A case of kind K in file NAME.json is run by the function NAME_K below. Where released code slips, its file says what was intended, and that is what ours gives."""
import json
import os
from pathlib import Path

import pytest
from conftest import ROOT

FOLDER = Path(os.environ.get("SIBLING_CASES") or ROOT.parent / "shared" / "methods")


def cases():
    """(name, case, tolerances) of every case there is; one that says why where there is none."""
    files = sorted(FOLDER.glob("*.json"))
    if not files:
        yield pytest.param(None, None, None, marks=pytest.mark.skip(reason=f"numbers of released code are not here ({FOLDER})"))
    for file in files:
        table = json.loads(file.read_text())
        here = (ROOT / "variants" / f"{file.stem}.py").exists()
        missing = pytest.mark.skip(reason=f"variants/{file.stem}.py is not written yet")
        for case in table["cases"]:
            yield pytest.param(file.stem, case, table["tolerance"], id=f"{file.stem}-{case['id']}", marks=() if here else missing)


@pytest.mark.parametrize("name, case, tolerance", list(cases()))
def test_numbers_of_released_code(name, case, tolerance):
    """Each case's output is what ours gives for its input, to the file's own tolerance."""
    check = globals().get(f"{name}_{case['kind']}")
    assert check is not None, f"no function runs {case['kind']!r} of {name}.json"
    check(case["input"], case["output"], tolerance)
