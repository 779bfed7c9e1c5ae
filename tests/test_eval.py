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


def test_the_real_sets_are_read_whole(assets):
    sizes = {"gsm8k/test.jsonl": 1319, "gsm8k/stepdpo_GSM8K_test_data.jsonl": 1319,
             "math/tora_math_test_5000.jsonl": 5000, "math/openr_test500.jsonl": 500,
             "aqua/test.json": 254, "aime/qwen25math_aime24_test.jsonl": 30, "aime/qwen25math_amc23_test.jsonl": 40,
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
