"""Every command's --help is a short manual, and none of them is a traceback."""
import argparse
import importlib
import json
import subprocess
import sys

import pytest
from conftest import ROOT

MODULES = [f"{path.parent.name}.{path.stem}" for folder in ("examples", "variants")
           for path in sorted((ROOT / folder).glob("*.py")) if path.stem != "__init__"] + ["examples.siblings"]
SCRIPTS = ["stepdpo.py", "stepdpo.py sft", "stepdpo.py dpo", "stepdpo.py stepdpo", "eval.py", "model.py merge", "data.py", "data.py show",
           "data.py localize", "data.py pairs", *(f"benchmarks/{path.name}" for path in sorted((ROOT / "benchmarks").glob("*.py"))
                                                  if path.name != "common.py")]

ALL_OF_THEM = """
import contextlib, io, json, os, runpy, sys, traceback
sys.path.insert(0, os.getcwd())
said = {}
for command in json.load(sys.stdin):
    program, *more = command.split()
    sys.argv, text = [program, *more, "--help"], io.StringIO()
    sys.path.insert(0, os.path.join(os.getcwd(), os.path.dirname(program)))
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        try:
            runpy.run_path(program, run_name="__main__") if program.endswith(".py") else \\
                runpy.run_module(program, run_name="__main__", alter_sys=True)
        except SystemExit as end:
            status = end.code or 0
        except BaseException:
            traceback.print_exc()
            status = 1
    del sys.path[0]
    said[command] = status, text.getvalue()
json.dump(said, sys.stdout)
"""


def test_help_explains_every_command():
    """Status 0, a usage line and some lines of explanation. (All in one process, which imports torch once.)"""
    done = subprocess.run([sys.executable, "-c", ALL_OF_THEM], input=json.dumps(SCRIPTS + MODULES), cwd=ROOT,
                          capture_output=True, text=True, check=True)
    for command, (status, said) in json.loads(done.stdout).items():
        assert status == 0 and said.startswith("usage:") and len(said.splitlines()) > 8, f"{command}:\n{said}"


def parsers(parser: argparse.ArgumentParser):
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                yield from parsers(inner)


@pytest.mark.parametrize("module, make", [("stepdpo", "parser"), ("data", "arguments"), ("eval", "arguments"), ("model", "arguments")])
def test_every_help_text_can_be_formatted(module, make):
    """Python 3.14 formats a help text when the option is defined: a lone percent sign would then end every command."""
    for parser in parsers(getattr(importlib.import_module(module), make)()):
        for action in parser._actions:
            if not isinstance(action, argparse._SubParsersAction):
                assert action.help, f"{parser.prog}: {action.dest} is not explained"
                parser._get_formatter()._expand_help(action)


@pytest.mark.parametrize("program", ["stepdpo.py", "data.py", "eval.py"])
def test_a_command_starts_under_python_P(program):
    """python -P, or PYTHONSAFEPATH in the environment, keeps a script's own folder from being searched."""
    done = subprocess.run([sys.executable, "-P", str(ROOT / program), "--help"], cwd=ROOT.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
