"""eval.py: problem files, sampling that survives a kill, step values by rollouts, servers that misbehave, the summary.
(The grader has test_grading.py.)"""
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import tokenizers
from conftest import ROOT, tiny_model, write_json

import data
import eval as ev
from data import DataError, first_error_from_values, read_rows

WORDS = ["<s>", "</s>", "\n", " ", "Step", ":", ".", "+", "=", "The answer is", *"0123456789abc"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A random tiny model and a tokenizer of whole words, as a checkpoint folder."""
    folder = tmp_path_factory.mktemp("checkpoint")
    model = tiny_model(seed=3, vocab_size=len(WORDS), bos_token_id=0, eos_token_id=1, initializer_range=0.3)
    model.save_pretrained(folder)
    vocabulary = {word: i for i, word in enumerate(WORDS)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token=" "))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"The answer is|Step|.|\n"), "isolated")
    backend.decoder = tokenizers.decoders.Fuse()
    backend.add_special_tokens(["<s>", "</s>"])
    backend.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True})
    return folder


def problems(path: Path, count: int = 7) -> Path:
    texts = [f"{i} + {i % 3}" + " a" * (i % 4) + "\n" for i in range(count)]
    rows = [{"question": text, "answer": str(i), "level": i % 2} for i, text in enumerate(texts)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def command(checkpoint, file, out, *more) -> list[str]:
    return ["--model", str(checkpoint), "--problems", str(file), "--out", str(out), "--prompt", "raw",
            "--max_new_tokens", "12", "--device", "cpu", "--batch_size", "6", *map(str, more)]


SAMPLED = ("--samples", 3, "--temperature", 1.0, "--top_p", 0.9)


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---------------------------------------------------------------------------------------------------------------------
# readers

@pytest.mark.parametrize("row, question, answer", [
    # GSM8K, and the authors' file of it
    ({"question": "Q", "answer": "16 - 3 = <<16-3=13>>13\n#### 1,013"}, "Q", "1,013"),
    ({"idx": "GSM8K_0", "instruction": "Q", "output": "w", "answer": ["18"]}, "Q", "18"),
    # MATH, MATH-500
    ({"problem": "Q", "type": "Algebra", "solution": "\\boxed{1}, or $\\boxed{\\frac{1}{2}}$."}, "Q", "\\frac{1}{2}"),
    ({"problem": "Q", "solution": "$\\boxed{9}$", "answer": "3"}, "Q", "3"),
    # AQuA, AMC, Odyssey, anyone's
    ({"question": "Q", "options": ["A)7 (m)", "B)(8)"], "correct": "B"}, "Q\nAnswer Choices: (A) 7 (m) (B) (8)", "B"),
    ({"id": 4, "problem": "Q", "answer": 27.0}, "Q", "27"),
    ({"Problem_1": {"question": "Q\n\n\\end{problem}\n\\noindent", "answer": "$8$\\\\\n\\noindent"}}, "Q", "$8$"),
    ({"prompt": "Q", "answer": 0.5}, "Q", "0.5"),
])
def test_every_layout_gives_question_and_gold_answer(row, question, answer):
    problem = ev.read_problem("f.jsonl:3", row)
    assert (problem.question, problem.answer) == (question, answer)
    assert problem.id == row.get("id", row.get("idx", "Problem_1" if "Problem_1" in row else 3))


ASKED = "Which is prime?"
FOUR = "Which is prime?\nAnswer Choices: (A) 4 (B) 6 (C) 7 (D) 9"
TEXTS = ["4", "6", "7", "9"]


@pytest.mark.parametrize("row", [
    {"choices": TEXTS, "answer": 2}, {"choices": TEXTS, "label": "2"}, {"choices": TEXTS, "answer": "7"}, {"choices": TEXTS, "answer": 7},
    {"choices": TEXTS, "answer": "C"}, {"choices": TEXTS, "answer": "(c)"}, {"Options": TEXTS, "Correct Answer": "C. 7"},
    {"choices": TEXTS, "answer_index": 2, "type": "x"}, {"choices": TEXTS, "solution": "It is \\boxed{C}."}, {"choices": TEXTS, "answer": ["C"]},
    {"options": ["A. 4", "B. 6", "C. 7", "D. 9"], "answer": "c"}, {"options": ["(a) 4", "(b) 6", "(c) 7", "(d) 9"], "answer": "(c) 7"},
    {"options": dict(zip("ABCD", TEXTS)), "answer": "C"}, {"options": dict(zip("abcd", TEXTS)), "correct": "c", "answer": "x"},
    {"choices": {"text": TEXTS, "label": list("ABCD")}, "answerKey": "C"}, {"choices": {"text": TEXTS, "label": list("1234")}, "answerKey": "3"},
    {"choices": [{"label": label, "text": text} for label, text in zip("ABCD", TEXTS)], "answerKey": "C"},
    dict(zip("ABCD", TEXTS)) | {"answer": "C"}, {f"option_{label}": text for label, text in zip("abcd", TEXTS)} | {"correct_option": "C"},
    {f"op{label}": text for label, text in zip("abcd", TEXTS)} | {"cop": 2}, {f"ending{i}": TEXTS[i] for i in range(4)} | {"label": 2},
    {f"option{i + 1}": TEXTS[i] for i in range(4)} | {"answer": "3"}, {"endings": TEXTS, "label": "2"}], ids=str)
def test_multiple_choice_in_its_layouts(row):
    """Choices once, with the letters of the prompt; the right one by letter, label, text, or index from 0."""
    problem = ev.read_problem("f.jsonl:1", {"question": ASKED} | row)
    assert (problem.question, problem.answer) == (FOUR, "C")
    assert ev.grade("So the answer is (C).", problem.answer)[1] and not ev.grade("So the answer is (B).", problem.answer)[1]


@pytest.mark.parametrize("row, found", [
    ({"choices": TEXTS, "answer": 4}, "field 'answer': found '4'"), ({"choices": TEXTS, "answer": "2"}, "field 'answer': found '2'"),
    ({"choices": [1, 2, 3], "answer": 2}, "field 'answer': found '2'"), ({"choices": TEXTS, "answer": "E"}, "letter, the text or the index .from 0."),
    ({"options": "A. 4 B. 6", "answer": "A"}, "field 'options': expected a list"), ({"choices": [["4"], ["6"]], "answer": 0}, "field 'choices'"),
    ({"choices": TEXTS}, "no answer"), ({"choices": TEXTS, "answer": ["A", "C"]}, "field 'answer'"), ({"label": 1}, "no answer .found: question, label")])
def test_a_choice_that_is_not_clear_is_refused_by_name(row, found):
    """1 to 4 or 0 to 3, the number or its place: never guessed."""
    with pytest.raises(DataError, match=f"f.jsonl:1: .*{found}"):
        ev.read_problem("f.jsonl:1", {"question": ASKED} | row)


@pytest.mark.parametrize("row, question, answer", [
    # other names, in any case
    ({"ID": "x-1", "Problem": "Q", "Solution": "3 + 4 = 7", "Answer": 7}, "Q", "7"), ({"Question": "Q", "Final Answer": "7"}, "Q", "7"),
    *(({"problem": "Q", name: "7"}, "Q", "7") for name in ("expected_answer", "ground_truth", "gold", "target", "gt", "referenceAnswer")),
    ({"query": "Q", "target": 7}, "Q", "7"), ({"question": "Q", "answer": "so 3 + 4 = 7", "final_answer": "7"}, "Q", "7"),
    ({"question": "Q", "answer": None, "solution": "3 + 4\n#### 7"}, "Q", "7"),
    # both halves of a question, each once
    ({"instruction": "Work it.", "input": "3 + 4?", "answer": "7"}, "Work it.\n3 + 4?", "7"), ({"instruction": "Q", "input": "", "answer": "7"}, "Q", "7"),
    ({"ID": "chal-1", "Body": "Ann has 3.", "Question": "How many?", "Equation": "( 3.0 )", "Answer": 3.0, "Type": "x"}, "Ann has 3.\nHow many?", "3"),
    ({"Body": "Ann has 3.", "Question": "Ann has 3. How many?", "Answer": 3}, "Ann has 3. How many?", "3"),
    ({"iIndex": 1, "sQuestion": "Q", "lEquations": ["X=7"], "lSolutions": [7.0]}, "Q", "7"),
    ({"passage": "P", "question": "Q", "answer": "7"}, "P\nQ", "7"), ({"context": ["P", "R"], "question": "Q", "answer": "7"}, "P\nR\nQ", "7"),
    # conversations of one question
    ({"prompt": [{"role": "user", "content": "Q"}], "reward_model": {"style": "rule", "ground_truth": "7"}, "ability": "math"}, "Q", "7"),
    ({"prompt": [{"role": "user", "content": "Q"}], "reward_model": {"ground_truth": '["7"]'}}, "Q", "7"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "Q"}]}, {"role": "assistant", "content": "A"}], "answer": 7}, "Q", "7"),
    ({"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}], "answer": 7}, "Q", "7"),
    # answers that are no text
    ({"question": "Q", "answer": ["2", "-2"]}, "Q", "2, -2"), ({"question": "Is 7 prime?", "answer": True}, "Is 7 prime?", "Yes"),
    ({"question": "True or false?", "answer": False}, "True or false?", "False"),
    # columns that decide nothing
    ({"question": "Q", "answer": "7", "label": 1, "a": 3, "b": 4, "options": None, "choices": [], "system": "", "history": [], "x": float("nan")}, "Q", "7")])
def test_what_people_call_question_and_answer(row, question, answer):
    problem = ev.read_problem("f.jsonl:1", row)
    assert (problem.question, problem.answer) == (question, answer)


@pytest.mark.parametrize("row, found", [
    ({"question": "Q", "system": "Be brief."}, "field 'system' is not used here"), ({"question": "Q", "history": [["a", "b"]]}, "field 'history'"),
    ({"messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}]}, "field 'messages': found turns of .'system', 'user'."),
    ({"messages": [{"role": "user", "content": "Q"}] * 2}, "field 'messages': .*one turn of the user"), ({"question": "Q", "context": {"a": 1}}, "field 'context'"),
    ({"question": float("nan")}, "field 'question': found a number 'NaN'"), ({"question": "Q", "answer": float("nan")}, "field 'answer': found a number 'NaN'"),
    ({"question": "Q", "answer": {"value": 7}}, "field 'answer': found an object"), ({"text": "Q"}, "no question .found: text, answer")])
def test_half_a_question_is_refused_by_name(row, found):
    """What would change the question is used or named, never dropped."""
    with pytest.raises(DataError, match=f"f.jsonl:1: .*{found}"):
        ev.read_problem("f.jsonl:1", row | {"answer": row.get("answer", "7")})


def test_the_reported_layouts(cases):
    """Rows after public bug reports: the problem that people wanted of each."""
    four = "Which number is prime?\nAnswer Choices: (A) 4 (B) 6 (C) 7 (D) 9"
    wanted = {"L01": (four, "C"), "L02": (four, "C"), "L05": (four, "C"), "L07": (four, "C"), "L10": ("Work the sum below.\nWhat is 3 + 4?", "7"),
              "L11": ("Ann has 3 apples. She buys 4.\nHow many has she now?", "7"), "L28": ("Solve x^2 = 4.", "2, -2"), "L29": ("Is 7 prime?", "Yes")}
    for _, case in read_rows(cases / "layouts.jsonl"):
        problem = ev.read_problem("f.jsonl:1", case["row"])
        assert (problem.question, problem.answer) == wanted.get(case["id"], ("What is 3 + 4?", "7")), case["id"]


def test_pairs_are_taken_as_problems_and_it_is_said(checkpoint, tmp_path, capsys):
    """The questions of a training file may be asked, but not by an oversight."""
    file = tmp_path / "pairs.jsonl"
    file.write_text(json.dumps({"prompt": "1 + 1", "chosen": "2", "rejected": "3", "answer": "2"}) + "\n")
    assert ev.main(command(checkpoint, file, tmp_path / "o.jsonl")) == 0
    assert "pairs.jsonl: holds pairs; their prompts and answers are taken as problems" in capsys.readouterr().err


def test_the_real_sets_are_read_whole(assets):
    sizes = {"gsm8k/test.jsonl": 1319, "gsm8k/stepdpo_GSM8K_test_data.jsonl": 1319,
             "math/tora_math_test_5000.jsonl": 5000, "math/openr_test500.jsonl": 500,
             "aqua/test.json": 254, "aime/qwen25math_aime24_test.jsonl": 30, "aime/qwen25math_amc23_test.jsonl": 40,
             "word_problems/SVAMP.json": 1000, "word_problems/MultiArith.json": 600,
             "odyssey/final-odyssey-math-with-levels.jsonl": 387}
    for name, size in sizes.items():
        found = [ev.read_problem(where, row) for where, row in read_rows(assets / name)]
        assert len(found) == size and all(problem.answer and "noindent" not in problem.answer for problem in found)
        assert len({problem.id for problem in found}) == size
    assert found[0].carried["level"] == "high school competition" and found[0].carried["subject"] == "Algebra"


def test_bad_rows_are_named_and_the_rest_goes_on(checkpoint, tmp_path, capsys):
    file = tmp_path / "p.jsonl"
    good = {"question": "1 + 1", "answer": "2"}
    rows = [good, {"question": "1"}, {"answer": "1"}, good | {"prefix": 3}, good | {"prefix": "a </s> b"},
            good | {"answer": " "}, good | {"question": "1 " * 200}]
    file.write_text("\n".join(map(json.dumps, rows)) + "\n{broken\n")
    assert ev.main(command(checkpoint, file, tmp_path / "o.jsonl")) == 1
    said = capsys.readouterr().err
    for line, word in enumerate(("answer", "question", "prefix", "</s>", "empty", "tokens", "JSON"), 2):
        assert any(f"p.jsonl:{line}:" in one and word in one for one in said.splitlines()), (line, said)
    assert len(rows_of(tmp_path / "o.jsonl")) == 1
    file.write_text('{"question": "no answer"}\n')
    assert ev.main(command(checkpoint, file, tmp_path / "o2.jsonl")) == 2
    assert "no answer" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# sampling

def test_rows_hold_everything_and_are_ordered(checkpoint, tmp_path, capsys):
    out = tmp_path / "o.jsonl"
    assert ev.main(command(checkpoint, problems(tmp_path / "p.jsonl"), out, *SAMPLED)) == 0
    rows = rows_of(out)
    assert [(row["id"], row["sample"]) for row in rows] == [(i, j) for i in range(1, 8) for j in range(3)]
    assert list(rows[0]) == ["id", "question", "answer", "sample", "prefix", "completion", "extracted", "correct",
                             "tokens", "stop_reason", "level"]
    for row in rows:
        assert (row["extracted"], row["correct"]) == ev.grade(row["completion"], row["answer"])
        assert row["stop_reason"] in ("eos", "length")
    summary = json.loads((tmp_path / "o.summary.json").read_text())
    assert summary["n"] == 7 and set(summary["by_level"]) == {"0", "1"} and set(summary["pass_at"]) == {"1", "2", "3"}
    assert "pass@3" in capsys.readouterr().out and not list(tmp_path.glob("*.journal*"))


def test_a_prefix_is_continued_exactly(checkpoint, tmp_path):
    """Greedy from one's own greedy beginning writes the rest of it; and the whole, prefix included, is graded."""
    file = problems(tmp_path / "p.jsonl", 40)
    ev.main(command(checkpoint, file, tmp_path / "whole.jsonl"))
    rows = rows_of(tmp_path / "whole.jsonl")
    whole = next(row for row in rows if row["tokens"] == 12 and "<" not in row["completion"])
    tokenizer = data.Tokenizer.from_pretrained(checkpoint)
    asked = tokenizer.encode(whole["question"]).ids
    beginning = tokenizer.decode(tokenizer.encode(whole["question"] + whole["completion"]).ids[len(asked):-5])
    file.write_text(json.dumps({"question": whole["question"], "answer": "1", "prefix": beginning}) + "\n")
    ev.main(command(checkpoint, file, tmp_path / "rest.jsonl", "--max_new_tokens", 5))
    row = rows_of(tmp_path / "rest.jsonl")[0]
    assert row["prefix"] == beginning and beginning + row["completion"] == whole["completion"] and row["tokens"] == 5
    assert row["extracted"] == ev.extract_answer(whole["completion"])


@pytest.mark.parametrize("after", [0, 1, 8, 20])
def test_killed_and_started_again_gives_the_same_bytes(checkpoint, tmp_path, monkeypatch, after):
    file = problems(tmp_path / "p.jsonl")
    ev.main(command(checkpoint, file, tmp_path / "whole.jsonl", *SAMPLED))
    out, add, written = tmp_path / "o.jsonl", ev.Journal.add, []

    def dies(self, key, value):
        if len(written) == after:
            raise KeyboardInterrupt
        written.append(key)
        add(self, key, value)
    with monkeypatch.context() as patch:
        patch.setattr(ev.Journal, "add", dies)
        assert ev.main(command(checkpoint, file, out, *SAMPLED)) == 130
    assert not out.exists()
    with (tmp_path / "o.jsonl.journal-0").open("ab") as journal:
        journal.write(b'[[6, 2], {"id": 7, "quest')                     # the line that was being written
    assert ev.main(command(checkpoint, file, out, *SAMPLED)) == 0
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert not (tmp_path / "o.jsonl.journal-0").exists()


def test_two_processes_write_what_one_writes_even_after_sigkill(checkpoint, tmp_path):
    file, port = problems(tmp_path / "p.jsonl", 60), 29500 + os.getpid() % 500

    def two() -> list[subprocess.Popen]:                                # what torchrun does
        env = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        line = [sys.executable, str(ROOT / "eval.py"), *command(checkpoint, file, tmp_path / "two.jsonl", *SAMPLED)]
        return [subprocess.Popen(line, env=env | {"WORLD_SIZE": "2", "RANK": str(rank)},
                                 stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for rank in range(2)]
    running, deadline = two(), time.time() + 60
    while time.time() < deadline and all(process.poll() is None for process in running):
        if sum(path.read_bytes().count(b"\n") for path in tmp_path.glob("two.jsonl.journal-*")) > 6:
            break
        time.sleep(0.01)
    for process in running:
        process.send_signal(signal.SIGKILL)
    assert [process.wait() for process in running] == [-signal.SIGKILL] * 2 and not (tmp_path / "two.jsonl").exists()
    port += 500
    running = two()
    assert ev.main(command(checkpoint, file, tmp_path / "one.jsonl", *SAMPLED)) == 0
    assert [process.wait(60) for process in running] == [0, 0]
    assert (tmp_path / "one.jsonl").read_bytes() == (tmp_path / "two.jsonl").read_bytes()
    assert not list(tmp_path.glob("*.journal-*"))


def test_a_journal_or_result_of_other_settings_is_refused_by_name(checkpoint, tmp_path, capsys):
    file, out = problems(tmp_path / "p.jsonl"), tmp_path / "o.jsonl"
    assert ev.main(command(checkpoint, file, out, *SAMPLED)) == 0
    before = out.read_bytes()
    assert ev.main(command(checkpoint, file, out, *SAMPLED)) == 0 and "already complete" in capsys.readouterr().out
    assert ev.main(command(checkpoint, file, out, *SAMPLED, "--seed", 5)) == 2
    assert "seed was 0, is 5" in capsys.readouterr().err and out.read_bytes() == before
    problems(file, 6)
    assert ev.main(command(checkpoint, file, out, *SAMPLED)) == 2 and "problems was" in capsys.readouterr().err
    assert ev.main(command(checkpoint, file, out, *SAMPLED, "--restart")) == 0 and len(rows_of(out)) == 18


def test_unusable_arguments_end_in_one_line_and_status_2(checkpoint, tmp_path, capsys):
    file, out = problems(tmp_path / "p.jsonl"), tmp_path / "o.jsonl"
    for more in (["--samples", 4], ["--temperature", "nan"], ["--top_p", 0], ["--samples", 0],
                 ["--rollouts", 2, "--temperature", 0]):
        with pytest.raises(SystemExit) as end:
            ev.main(command(checkpoint, file, out, *more))
        assert end.value.code == 2
    assert ev.main(command(tmp_path / "nowhere", file, out)) == 2
    assert ev.main(command(checkpoint, tmp_path / "nowhere.jsonl", out)) == 2
    assert "nowhere.jsonl: no such file" in capsys.readouterr().err.splitlines()[-1]


# ---------------------------------------------------------------------------------------------------------------------
# the summary

def test_wilson_interval_against_published_values():
    """The examples of Newcombe 1998, method 3: the score interval without continuity correction."""
    for (x, n), (low, high) in {(81, 263): (0.2553, 0.3662), (15, 148): (0.0624, 0.1605), (0, 20): (0.0, 0.1611),
                                (1, 29): (0.0061, 0.1718)}.items():
        assert ev.wilson(x, n) == pytest.approx((low, high), abs=1e-4)


def test_pass_at_k_is_the_mean_over_all_choices_of_k():
    for n, c, k in [(5, 2, 1), (5, 2, 3), (6, 0, 2), (6, 6, 4), (7, 3, 7)]:
        choices = list(itertools.combinations([True] * c + [False] * (n - c), k))
        assert ev.pass_at_k(n, c, k) == pytest.approx(sum(map(any, choices)) / len(choices))


def test_majority_counts_equivalent_answers_together():
    rows = [{"extracted": text, "correct": text in ("1/2", "0.5")} for text in ("3", "1/2", "3", "0.5", "0.5")]
    silent = {"extracted": None, "correct": False}
    assert ev.majority(rows + [silent] * 4)
    assert not ev.majority(rows[:3]) and not ev.majority([silent])


def test_samples_of_one_problem_do_not_narrow_the_interval():
    group = [{"correct": True}, {"correct": False}]
    assert ev.accuracy([group] * 10)["low"] == pytest.approx(ev.wilson(5, 10)[0])


# ---------------------------------------------------------------------------------------------------------------------
# step values

class Slips:
    """A policy of which everything is known: each step goes wrong with a probability of its own, and an error stays."""

    def __init__(self, cases):                   # per attempt: (first wrong step, P(step goes right) of each step)
        self.cases, self.rng, self.drawn = cases, random.Random(1), 0

    def prepare(self, problem, text, cut=None):
        return (problem.id, text[:cut].count("\nStep")), text[:cut]

    def batches(self, prompts, n):
        return [list(range(len(prompts)))]

    def run(self, prompts, n, seed, done, on_finish):
        for i, (case, steps) in enumerate(prompts):
            wrong, right = self.cases[case]
            for j in range(n):
                self.drawn += 1
                good = [self.rng.random() < p for p in right]
                text = "".join(f"\nStep {k + 1}: it is {k if good[k] else 90}" for k in range(steps, len(right)))
                on_finish(i, j, text + f"\nThe answer is {int(steps <= wrong and all(good[steps:]))}", 3, "eos")


def test_rollouts_locate_the_first_error_better_than_the_plain_rule(tmp_path, monkeypatch):
    """Chains of 4 to 9 steps that slip in up to 60 % of cases: of the errors that the rollouts call located, at least
    nine in ten are, where 'the first step after which none of 8 succeeds' finds fewer of all."""
    monkeypatch.setattr(ev, "grade", lambda text, answer: (text, text.endswith("The answer is 1")))
    rng, cases, attempts = random.Random(0), [], []
    while len(cases) < 150:
        right = [rng.choice((1, 1, 0.95, 0.8, 0.4)) for _ in range(rng.randint(4, 9))]
        wrong = next((k for k, p in enumerate(right) if rng.random() > p), None)
        if wrong is not None:
            text = "".join(f"\nStep {k + 1}: it is {k if k < wrong else 90}" for k in range(len(right)))
            text += "\nThe answer is 0"
            attempts.append((ev.Problem("f:1", len(cases), "Q", "1", "", {}), text))
            cases.append((wrong, right))
    rows, drawn = {}, {}
    for every_step in (False, True):
        journal = ev.Journal(tmp_path / f"v{every_step}.jsonl", {}, 0)
        journal.open()
        policy = Slips(cases)
        args = SimpleNamespace(rollouts=8, every_step=every_step, steps="step", seed=0)
        ev.value_steps(attempts, ev.Work(args, policy, journal, []))
        rows[every_step], drawn[every_step] = [journal.done[a,] for a in range(len(cases))], policy.drawn
    for row, (_, right) in zip(rows[True], cases):
        assert len(row["values"]) == len(right) and row["values"][-1] == [0, 8]
        assert [value[1] for value in row["values"]] == [counts[2] for counts in row["agreement"]] == [8] * len(right)
        assert row["values"][:-1] == [counts[1:] for counts in row["agreement"][1:]]
    truth = [wrong for wrong, _ in cases]
    first_zero = [next(i for i, value in enumerate(row["values"]) if value[0] == 0) for row in rows[True]]
    plain = sum(map(int.__eq__, first_zero, truth))
    guesses = [first_error_from_values(row["values"], row["agreement"]) for row in rows[False]]
    found = list(zip(guesses, truth))
    decided = [(guess, wrong) for guess, wrong in found if guess is not None]
    hits = sum(guess == wrong for guess, wrong in decided)
    assert hits >= 0.9 * len(decided) and len(decided) > 0.7 * len(found) and hits > plain, (hits, len(decided), plain)
    assert drawn[False] < 1.5 * drawn[True]


def test_valued_rows_hold_the_attempt_and_survive_a_kill(checkpoint, tmp_path, monkeypatch):
    attempts, out = tmp_path / "a.jsonl", tmp_path / "v.jsonl"
    texts = ["a\nStep 1: 1 + 1 = 3.\nStep 2: 3 + 1 = 4.\nStep 3", "Step 1: b", "Step 1: c\nStep 2: 7\nThe answer is 7"]
    rows = [{"id": i, "question": "1 + 1\n", "answer": "2", "sample": 0, "prefix": "", "completion": text,
             "correct": False, "stop_reason": "eos", "mine": i} for i, text in enumerate(texts)]
    rows.append({"id": 9, "question": "1", "answer": "2", "completion": "2", "correct": True})
    attempts.write_text("\n".join(map(json.dumps, rows)))
    more = ("--rollouts", 4, "--temperature", 1.0, "--max_new_tokens", 8)
    assert ev.main(command(checkpoint, attempts, tmp_path / "whole.jsonl", *more)) == 0
    valued = rows_of(tmp_path / "whole.jsonl")
    assert [row["id"] for row in valued] == [0, 1, 2]
    for row, original in zip(valued, rows):
        assert "".join(row["steps"]) == original["completion"] and row["values"][-1] == [0, 4]
        assert len(row["values"]) == len(row["agreement"]) == len(row["steps"])
        assert {key: row[key] for key in original} == original
    assert any(counts is not None for counts in valued[0]["agreement"])
    assert ev.main(command(checkpoint, attempts, tmp_path / "every.jsonl", *more, "--every_step")) == 0
    assert all(value and value[1] == 4 for row in rows_of(tmp_path / "every.jsonl") for value in row["values"])

    add, left = ev.Journal.add, [2]

    def dies(self, key, value):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        add(self, key, value)
    with monkeypatch.context() as patch:
        patch.setattr(ev.Journal, "add", dies)
        assert ev.main(command(checkpoint, attempts, out, *more)) == 130
    assert ev.main(command(checkpoint, attempts, out, *more)) == 0
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_a_prefix_ends_at_a_token_of_the_attempt(checkpoint):
    """What the model reads when it continues from a step is a beginning of what it would read of the whole attempt."""
    args = ev.arguments().parse_args(command(checkpoint, "p", "o"))
    sampler = ev.Local(args)
    problem, text = ev.Problem("f:1", 1, "1 + 1\n", "2", "", {}), "Step 1: a .\n\nStep 2: b"
    whole = sampler.prepare(problem, text)[0]
    ids, reasoning, _ = sampler.prepare(problem, text, len("Step 1: a ."))
    assert ids == whole[:len(ids)] and text.startswith(reasoning) and reasoning.strip() == "Step 1: a ."


@pytest.mark.parametrize("name", ("qwen2.5", "tinyllama"))
def test_a_prompt_is_sampled_from_as_it_was_trained(checkpoint, assets, name):
    """A prompt that ends in a space ("Assistant: "): what is sampled from is the beginning of the trained tokens, and the space is not in the answer twice."""
    sampler = ev.Local(ev.arguments().parse_args(command(checkpoint, "p", "o") + ["--prompt", "deepseek-math"]))
    sampler.tokenizer = data.Tokenizer.from_pretrained(assets / "tokenizers" / name)
    sampler.model.config.vocab_size = 2**20
    sampler.model.config.max_position_embeddings = 2**10
    ids, _, spaces = sampler.prepare(ev.Problem("f:1", 1, "1 + 1", "2", "", {}), "")
    (example,), _ = data.encode_dataset([("f:1", {"prompt": "1 + 1", "response": "Let us add."})], sampler.tokenizer, "sft", "deepseek-math")
    assert spaces and example.chosen[:len(ids)].tolist() == ids
    assert sampler.tokenizer.continuation(ids, example.chosen[len(ids):-1].tolist()) == " Let us add."


# ---------------------------------------------------------------------------------------------------------------------
# servers

class Server(BaseHTTPRequestHandler):
    """An OpenAI-compatible server that is busy, broken, hangs up or is cut short by turns, and refuses "refuse me"."""
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_POST(self):
        state = self.server.state
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with state.lock:
            state.requests.append((self.path, body, self.headers.get("Authorization")))
            trouble = state.troubles.pop(0) if state.troubles else None
            if isinstance(state.down_after, int) and len(state.requests) > state.down_after:
                trouble = 401
        prompt = body.get("prompt") or body["messages"][-1]["content"]
        if trouble is None and "refuse me" in prompt:
            trouble = 400
        if isinstance(trouble, int):
            return self.answer(trouble, b'{"error": "no"}')
        if trouble == "hang up":
            self.close_connection = True
            return self.connection.close()
        text = f"\\boxed{{{prompt.split()[0]}}} \0 {body['seed']}"
        choice = ({"text": text} if "prompt" in body else {"message": {"content": text}}) | {"finish_reason": "stop"}
        reply = json.dumps({"choices": [choice], "usage": {"completion_tokens": 5}}).encode()
        self.answer(200, reply[:20] if trouble == "cut" else reply, len(reply))

    def answer(self, code, content, length=None):
        self.send_response(code)
        self.send_header("Content-Length", str(length or len(content)))
        if code == 429:
            self.send_header("Retry-After", "0")
        self.end_headers()
        self.wfile.write(content)
        self.close_connection = True


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(ev, "Endpoint", lambda *args: data.Endpoint(*args, timeout=10, pause=0.01))
    http = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    http.state = SimpleNamespace(requests=[], troubles=[], down_after=None, lock=threading.Lock())
    threading.Thread(target=http.serve_forever, daemon=True).start()
    http.state.url = f"http://127.0.0.1:{http.server_address[1]}"
    yield http.state
    http.shutdown()


def remote(server, file, out, *more) -> list[str]:
    return ["--endpoint", server.url, "--api_model", "m", "--problems", str(file), "--out", str(out),
            "--concurrency", "4", *map(str, more)]


def test_a_flaky_server_loses_nothing(server, tmp_path):
    server.troubles = [429, 500, "hang up", "cut", 503, "cut", 429, "hang up", 502]
    out = tmp_path / "o.jsonl"
    assert ev.main(remote(server, problems(tmp_path / "p.jsonl"), out, *SAMPLED, "--prompt", "qwen2-boxed")) == 0
    rows = rows_of(out)
    assert [(row["id"], row["sample"]) for row in rows] == [(i, j) for i in range(1, 8) for j in range(3)]
    assert all(row["correct"] and row["tokens"] == 5 and row["stop_reason"] == "eos" for row in rows)
    assert not any("\0" in row["completion"] for row in rows)
    assert len({row["completion"] for row in rows}) == 21                # every sample has a seed of its own
    assert len(server.requests) == 21 + 9
    path, body, key = server.requests[-1]
    assert path == "/v1/chat/completions" and key == "Bearer secret"
    assert body["messages"][0]["role"] == "system" and body["top_p"] == 0.9


def test_a_prefix_goes_to_completions_with_the_rendered_text(server, tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_text(json.dumps({"question": "Q", "answer": "1", "prefix": "Step 1:"}) + "\n")
    for style in ("qwen2-boxed", "alpaca", "raw"):
        assert ev.main(remote(server, file, tmp_path / f"{style}.jsonl", "--prompt", style)) == 0
        path, body, _ = server.requests[-1]
        assert path == "/v1/completions" and body["prompt"] == data.render_prompt(style, "Q", None) + "Step 1:"
    assert ev.main(remote(server, file, tmp_path / "chat.jsonl", "--prompt", "chat")) == 2


def test_one_refused_problem_is_named_and_the_rest_goes_on(server, tmp_path, capsys):
    file, out = tmp_path / "p.jsonl", tmp_path / "o.jsonl"
    file.write_text("".join(json.dumps({"question": q, "answer": "1"}) + "\n" for q in ("1 a", "refuse me", "1 b")))
    assert ev.main(remote(server, file, out)) == 1
    assert [row["id"] for row in rows_of(out)] == [1, 3] and "p.jsonl:2: " in capsys.readouterr().err


def test_a_server_that_goes_away_costs_only_what_it_had_not_answered(server, tmp_path, capsys):
    server.down_after, file, out = 8, problems(tmp_path / "p.jsonl"), tmp_path / "o.jsonl"
    assert ev.main(remote(server, file, out, *SAMPLED)) == 2 and "401" in capsys.readouterr().err
    kept = (tmp_path / "o.jsonl.journal-0").read_bytes().count(b"\n") - 1
    assert 0 < kept <= 8
    server.down_after, server.requests = None, []
    assert ev.main(remote(server, file, out, *SAMPLED)) == 0
    assert len(rows_of(out)) == 21 and len(server.requests) == 21 - kept
