"""eval.py: problem files, sampling that survives a kill, step values by rollouts, the summary.
(The grader has test_grading.py, servers have test_servers.py.)"""
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import tokenizers
from conftest import ROOT, byte_tokenizer, tiny_model, write_json

import data
import eval as ev
from data import DataError, first_error_from_values, read_rows
from model import locked

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
    ({"problem": "Q", "type": "Algebra", "solution": "\\boxed{1}. No, $\\boxed{\\frac{1}{2}}$."}, "Q", "\\frac{1}{2}"),
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
    ({"question": "Q", "system": "Be brief."}, "field 'system': not used here"), ({"question": "Q", "history": [["a", "b"]]}, "field 'history'"),
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
    out, add, written = tmp_path / "o.jsonl", data.Journal.add, []

    def dies(self, key, value):
        if len(written) == after:
            raise KeyboardInterrupt
        written.append(key)
        add(self, key, value)
    with monkeypatch.context() as patch:
        patch.setattr(data.Journal, "add", dies)
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
        return ev.Prompt((problem.id, text[:cut].count("\nStep")), text[:cut], False)

    def draw(self, prompts, n, seed, temperature, *, done, **_):
        for i, prompt in enumerate(prompts):
            case, steps = prompt.content
            wrong, right = self.cases[case]
            for j in range(n):
                self.drawn += 1
                good = [self.rng.random() < p for p in right]
                text = "".join(f"\nStep {k + 1}: it is {k if good[k] else 90}" for k in range(steps, len(right)))
                answer = int(steps <= wrong and all(good[steps:]))
                yield i, j, ev.Drawn(f"{text}\nThe answer is {answer}", 3, "eos")


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
        policy = Slips(cases)
        args = SimpleNamespace(rollouts=8, every_step=every_step, steps="step", seed=0, temperature=1.0, top_p=1.0,
                               max_new_tokens=99, stop=[])
        with data.Journal(tmp_path / f"v{every_step}.journal", {}) as journal:
            ev.value_steps(attempts, ev.Work(args, policy, [], journal))
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

    add, left = data.Journal.add, [2]

    def dies(self, key, value):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        add(self, key, value)
    with monkeypatch.context() as patch:
        patch.setattr(data.Journal, "add", dies)
        assert ev.main(command(checkpoint, attempts, out, *more)) == 130
    assert ev.main(command(checkpoint, attempts, out, *more)) == 0
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_a_prefix_ends_at_a_token_of_the_attempt(checkpoint):
    """What the model reads when it continues from a step is a beginning of what it would read of the whole attempt."""
    sampler = ev.Sampler(checkpoint, prompt="raw", device="cpu")
    problem, text = ev.Problem("f:1", 1, "1 + 1\n", "2", "", {}), "Step 1: a .\n\nStep 2: b"
    whole = sampler.prepare(problem, text)[0]
    ids, reasoning, _ = sampler.prepare(problem, text, len("Step 1: a ."))
    assert ids == whole[:len(ids)] and text.startswith(reasoning) and reasoning.strip() == "Step 1: a ."


@pytest.mark.parametrize("name", ("qwen2.5", "tinyllama"))
def test_a_prompt_is_sampled_from_as_it_was_trained(checkpoint, assets, name):
    """A prompt that ends in a space ("Assistant: "): what is sampled from is the beginning of the trained tokens, and the space is not in the answer twice."""
    sampler = ev.Sampler(checkpoint, prompt="deepseek-math", device="cpu")
    sampler.tokenizer = data.Tokenizer.from_pretrained(assets / "tokenizers" / name)
    sampler.model.config.vocab_size = 2**20
    sampler.model.config.max_position_embeddings = 2**10
    ids, _, spaces = sampler.prepare(ev.Problem("f:1", 1, "1 + 1", "2", "", {}), "")
    (example,), _ = data.encode_dataset([("f:1", {"prompt": "1 + 1", "response": "Let us add."})], sampler.tokenizer, "sft", "deepseek-math")
    assert spaces and example.chosen[:len(ids)].tolist() == ids
    assert sampler.tokenizer.continuation(ids, example.chosen[len(ids):-1].tolist()) == " Let us add."


def test_right_attempts_are_valued_too(checkpoint, tmp_path, capsys):
    """--all: of right attempts every step has its rollouts, and after the last one all of them are right by definition.
    Without --every_step, which asks where an error is, it means nothing."""
    texts = {"right": "Step 1: 1 + 1 = 2.\nStep 2: 2\nThe answer is 2", "wrong": "Step 1: 3.\nStep 2: 3"}
    rows = [{"id": name, "question": "1 + 1\n", "answer": "2", "completion": text, "correct": name == "right"}
            for name, text in texts.items()]
    (file := tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    more = ("--rollouts", 3, "--temperature", 1, "--max_new_tokens", 4)
    assert ev.main(command(checkpoint, file, tmp_path / "v.jsonl", *more, "--every_step", "--all")) == 0
    valued = {row["id"]: row for row in rows_of(tmp_path / "v.jsonl")}
    assert set(valued) == set(texts) and [valued[name]["values"][-1] for name in texts] == [[3, 3], [0, 3]]
    assert all(counts[2] == 3 for row in valued.values() for counts in row["agreement"])
    assert "1 wrong attempts of 2" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        ev.main(command(checkpoint, file, tmp_path / "w.jsonl", *more, "--all"))


# ---------------------------------------------------------------------------------------------------------------------
# the sampler as a program uses it

def prompts_of(*lengths_and_ids) -> list:
    return [ev.Prompt(list(ids), "", False) for ids in lengths_and_ids]


def test_prompts_that_begin_alike_are_computed_together(checkpoint):
    """Prefixes of two attempts, given in turns: each batch of four holds those of one attempt, the longer one's first.
    Whatever the order in which they are given, the same prompts stand together."""
    sampler = ev.Sampler(checkpoint, prompt="raw", device="cpu", batch_size=8)
    long, short = [[first, *range(10, 10 + 5 * k)] for first in (1,) for k in (4, 5, 6, 7)], [[2, *range(k)] for k in (9, 3, 5, 7)]
    prompts = prompts_of(*(ids for pair in zip(short, long) for ids in pair))
    batches = sampler.batches(prompts, 2)
    assert [{prompts[i].content[0] for i in batch} for batch in batches] == [{1}, {2}]
    turned = prompts[::-1]
    as_texts = lambda prompts, batches: [sorted(prompts[i].content for i in batch) for batch in batches]
    assert as_texts(turned, sampler.batches(turned, 2)) == as_texts(prompts, batches)
    assert sorted(i for batch in sampler.batches(prompts, 3) for i in batch) == list(range(8))
    assert [len(batch) for batch in sampler.batches(prompts, 99)] == [1] * 8         # a prompt's samples stay together


def test_draw_gives_what_is_not_done_and_the_same_with_less_asked(checkpoint):
    """A sample does not depend on which others are asked for along with it."""
    sampler = ev.Sampler(checkpoint, prompt="raw", device="cpu", batch_size=4)
    prompts = [sampler.prepare(ev.Problem("f:1", 1, f"{i} + 1\n", "2", "", {}), "") for i in range(3)]
    how = dict(n=2, seed=5, temperature=1.0, max_new_tokens=8)
    whole = {(i, j): drawn for i, j, drawn in sampler.draw(prompts, **how)}
    assert set(whole) == {(i, j) for i in range(3) for j in range(2)}
    rest = {(i, j): drawn for i, j, drawn in sampler.draw(prompts, **how, done={(0, 0), (1, 1)})}
    assert rest == {key: drawn for key, drawn in whole.items() if key not in {(0, 0), (1, 1)}}
    hot = {(i, j): drawn for i, j, drawn in sampler.draw(prompts, **how | {"temperature": lambda new: 1.0})}
    assert hot == whole                                                 # a temperature may be a function


SOLUTIONS = {
    "step": "Let's think step by step.\nStep 1: 3 + 4 = 7.\nStep 2: 7 * 2 = 14.\nStep 3: So it is 14.\nThe answer is: 14",
    "heading": "I will add first.\n\n**Step 1:** 3 + 4 = 7.\nThat is a sum.\n\n**Step 2:** 7 * 2 = 14.",
    "number": "We go on like this:\n1. Add 3 and 4.\n2. Double it.\n3. So 14.",
    "paragraph": "First we add, which gives 7.\n\nThen we double it.\n\nSo the answer is 14.",
    "line": "Ann has 3 apples.\nShe buys 4, so 3 + 4 = 7.\nTwice that is 14.",
    "Chinese": "第一步：3 + 4 = 7。\n\n第二步：7 * 2 = 14。\n\n第三步：所以 答案是 14。",
    "dressed": "(1) Add 3 and 4.\n(2) Double it.\n(3) So 14."}


class Knows:
    """In place of model.samples: a policy that writes one solution, token by token, from wherever a prompt is in it. It
    knows nothing else: a prompt that is not made of the solution's own tokens is an error."""

    def __init__(self, tokens: list[int], eos: int):
        self.tokens, self.eos, self.written = tokens, eos, 0

    def __call__(self, model, prompts, *, n, max_new_tokens, eos_ids, ended, **_):
        for i, ids in enumerate(prompts):
            assert ids == self.tokens[:len(ids)], "the model never was here"
            for j in range(n):
                new, reason = [], "length"
                for token in self.tokens[len(ids):len(ids) + max_new_tokens]:
                    new.append(token)
                    if ended and ended(i, new):
                        reason = "stop"
                        break
                self.written += len(new)
                ends = len(ids) + len(new) == len(self.tokens) and reason == "length"
                yield i, j, SimpleNamespace(token_ids=new, stop_reason="eos" if ends else reason)


@pytest.mark.parametrize("style", SOLUTIONS)
@pytest.mark.parametrize("name", ("bytes", "qwen2.5", "tinyllama"))
def test_next_steps_write_a_solution_step_by_step(request, checkpoint, monkeypatch, name, style):
    """From nothing, from a label, and from a whole step whose full stop is one token with the line break behind it: the
    step is the one that data.split_steps finds, and little is sampled beyond it."""
    sampler = ev.Sampler(checkpoint, prompt="raw", device="cpu")
    if name == "bytes":
        folder = request.getfixturevalue("tmp_path")
        byte_tokenizer(folder)
    else:
        folder = request.getfixturevalue("assets") / "tokenizers" / name
    sampler.tokenizer = data.Tokenizer.from_pretrained(folder)
    sampler.model.config.vocab_size, sampler.model.config.max_position_embeddings = 2**20, 2**10
    problem, solution = ev.Problem("f:1", 1, "What is (3 + 4) * 2?\n", "14", "", {}), SOLUTIONS[style]
    policy = Knows(sampler.prepare(problem, solution).content, 2)
    monkeypatch.setattr(ev, "samples", policy)
    how = "line" if style == "line" else "auto"                         # one line alone might be a paragraph
    steps, so_far = data.split_steps(solution, how), ""
    next_step = lambda text, n=1, **more: ev.next_steps(sampler, [(problem, text)], n, 0.0, steps=how, **more)[0]
    for k, step in enumerate(steps):
        last = k + 1 == len(steps)
        assert next_step(so_far) == [(step, last)]
        words = data.step_starts(solution, how)[k][1]
        rest = step[words - len(so_far):]
        assert next_step(solution[:words], 2) == [(rest, last)] * 2                    # from the label
        middle = solution.index(" ", words + 1)                            # behind its first word
        assert next_step(solution[:middle]) == [(step[middle - len(so_far):], last)]
        so_far += step
    assert so_far == solution
    (cut,) = next_step("", max_new_tokens=3)
    assert cut[1] is None and solution.startswith(cut[0].rstrip("\ufffd"))
    policy.written = 0
    next_step("")
    beyond = 12 if style != "paragraph" else len(steps[1])              # labels outrank blank lines, so those wait
    assert policy.written <= len(sampler.tokenizer.encode(steps[0]).ids) + beyond


def test_a_condition_ends_samples_early(assets):
    """stories260K: what is drawn up to the first full stop is the beginning of what is drawn without the condition."""
    sampler = ev.Sampler(assets / "weights" / "hf-stories260K", prompt="raw", device="cpu", batch_size=4)
    prompts = [sampler.prepare(ev.Problem("f:1", 1, "Once upon a time", "", "", {}), text) for text in ("", ", a dog ran")]
    how = dict(n=3, seed=3, temperature=1.0, max_new_tokens=100)
    whole = {(i, j): drawn.text for i, j, drawn in sampler.draw(prompts, **how)}
    asked = []

    def ended(i, text):
        asked.append(i)
        return "." in text
    for i, j, drawn in sampler.draw(prompts, **how, ended=ended):
        assert whole[i, j].startswith(drawn.text) and drawn.text == whole[i, j].partition(".")[0] + "."
        assert drawn.stop_reason == "stop" and drawn.tokens < 100
    assert set(asked) == {0, 1} and len(asked) < 3 * 100


# ---------------------------------------------------------------------------------------------------------------------
# OUT: one command at a time, names, signals

def test_two_commands_into_one_out(checkpoint, tmp_path, capsys):
    """The second one says who holds it, and touches nothing."""
    file, out = problems(tmp_path / "p.jsonl"), tmp_path / "o.jsonl"
    with locked(out):
        assert ev.main(command(checkpoint, file, out)) == 2
        assert f"is being written by process {os.getpid()} on " in capsys.readouterr().err
    assert not out.exists() and ev.main(command(checkpoint, file, out)) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["o.jsonl", "o.summary.json", "p.jsonl"]


@pytest.mark.parametrize("names", [("qwen2.5-0.5B", "qwen2.5-0.6B"), ("a.jsonl", "a.json"), ("a.1.jsonl", "a.2.jsonl"),
                                   ("a.jsonl", "a.txt"), ("a", "a.b")])
def test_two_outs_have_two_summaries(checkpoint, tmp_path, capsys, names):
    """Names with points in them: each result keeps its own summary, and both are complete afterwards."""
    file = problems(tmp_path / "p.jsonl", 3)
    for turn in range(2):
        for name in names:
            assert ev.main(command(checkpoint, file, tmp_path / name)) == 0
            assert ("already complete" in capsys.readouterr().out) == (turn == 1)
    summaries = {data.summary_path(tmp_path / name).name for name in names}
    assert len(summaries) == 2 and summaries <= {path.name for path in tmp_path.iterdir()}


def test_an_out_that_cannot_be_is_refused_before_any_work(checkpoint, tmp_path, capsys):
    file = problems(tmp_path / "p.jsonl", 3)
    assert ev.main(command(checkpoint, file, tmp_path)) == 2 and "is a folder; name a file" in capsys.readouterr().err
    assert ev.main(command(checkpoint, file, file)) == 2 and "is the input" in capsys.readouterr().err
    assert ev.main(command(checkpoint, file, tmp_path / "a")) == 0
    assert ev.main(command(checkpoint, file, tmp_path / "a.jsonl")) == 2      # a.summary.json would be both's
    assert "would replace that of a;" in capsys.readouterr().err


def test_sigterm_ends_in_a_line_and_the_same_command_continues(checkpoint, tmp_path, monkeypatch, capsys):
    """What a scheduler sends before it kills: exit status 143, what is finished is kept, and the handler goes again."""
    file, out, add = problems(tmp_path / "p.jsonl"), tmp_path / "o.jsonl", data.Journal.add
    before = signal.getsignal(signal.SIGTERM)

    def ended_by_scheduler(self, key, value):
        add(self, key, value)
        if len(self.done) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(data.Journal, "add", ended_by_scheduler)
        assert ev.main(command(checkpoint, file, out, *SAMPLED)) == 143
    assert "terminated; the same command continues" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["o.jsonl.journal-0", "p.jsonl"]
    assert (tmp_path / "o.jsonl.journal-0").read_text().count("\n") == 1 + 5
    assert ev.main(command(checkpoint, file, out, *SAMPLED)) == 0 and len(rows_of(out)) == 21


def test_bars_have_a_total_and_do_not_flood_a_log(checkpoint, tmp_path, capsys):
    """Where stderr is no terminal: the bar's first and last line, also of rollouts, whose total grows by rounds."""
    ev.main(command(checkpoint, problems(tmp_path / "p.jsonl"), tmp_path / "o.jsonl", *SAMPLED))
    said = capsys.readouterr().err
    assert "21/21" in said and said.count("\r") <= 3 and "accuracy" not in said
    rows = [{"id": i, "question": "1 + 1\n", "answer": "2", "correct": False, "completion": "Step 1: a\nStep 2: b\nStep 3: c"}
            for i in range(3)]
    (file := tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    ev.main(command(checkpoint, file, tmp_path / "v.jsonl", "--rollouts", 4))
    said = capsys.readouterr().err
    summary = json.loads((tmp_path / "v.summary.json").read_text())
    assert f"{summary['rollouts']}/{summary['rollouts']}" in said and "attempts open" in said


PROGRAM = """
import sys
import eval as ev, stepdpo
from model import leave_processes

folder, model = sys.argv[1], sys.argv[2]

def score(model, name):
    return ev.main(["--model", model, "--problems", f"{folder}/p.jsonl", "--out", f"{folder}/{name}.jsonl", "--prompt", "raw",
                    "--max_new_tokens", "6", "--device", "cpu", "--batch_size", "2"])

status = score(model, "before") or stepdpo.main(
    ["stepdpo", "--model", model, "--data", f"{folder}/pairs.jsonl", "--out", f"{folder}/trained", "--prompt", "raw",
     "--epochs", "1", "--batch_size", "8", "--device", "cpu"]) or score(f"{folder}/trained", "after")
sys.exit(leave_processes(status))
"""


def test_programs_in_one_process(processes, work, tmp_path):
    """eval.main, stepdpo.main, eval.main under one torchrun: two processes give what one gives."""
    (script := tmp_path / "program.py").write_text(PROGRAM)
    for world in (1, 2):
        (folder := tmp_path / str(world)).mkdir()
        problems(folder / "p.jsonl", 9)
        (folder / "pairs.jsonl").write_bytes((work / "pairs.jsonl").read_bytes())
        processes.run(script, folder, work / "model", world=world)
    for name in ("before.jsonl", "after.jsonl", "trained/config.json"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()
