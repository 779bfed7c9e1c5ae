"""The embedded task of examples/arithmetic.py: its problems, its checker, its tokenizer, its statistics; and the whole way once, small."""
import json
import random
from dataclasses import replace

import pytest

import data
from examples import arithmetic
from examples.arithmetic import (EARLY, QUICK, Size, belongs_to, compare, demonstration, first_wrong_step, make_model, make_problem, problems_of, read_problem,
                                 reword, sign_test, solve, write_solution)


def problems(count: int, seed: int = 0):
    rng = random.Random(seed)
    return [make_problem(rng, EARLY, Size.tail) for _ in range(count)], rng


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    folder = tmp_path_factory.mktemp("arithmetic") / "start"
    make_model(folder, seed=0)
    return folder


def test_a_question_says_all_about_its_problem():
    """The checker reads the words alone, so words and problem must determine each other."""
    for problem in problems(300)[0]:
        assert read_problem(problem.question()) == problem


def test_sets_share_no_problem_under_any_seed():
    """Nothing that is trained or chosen on is ever scored, also not by another seed's run, nor under other names."""
    which: dict = {}
    for name in ("train", "held-out", "dev", "test"):
        for seed in (0, 1):
            for p in problems_of(name, 300, Size(), seed):
                which.setdefault((p.start, tuple(e[:3] for e in p.events)), set()).add(name)
                assert belongs_to(replace(p, name="Zoe", items="books")) == name
    assert all(len(names) == 1 for names in which.values())


def test_the_checker_accepts_every_right_solution_in_any_wording():
    """It judges equations, not words: also a re-worded step is right."""
    some, rng = problems(200)
    for problem in some:
        steps = data.split_steps(write_solution(problem, solve(problem), rng))
        assert first_wrong_step(problem.question(), steps, "") is None
        label, _, text = (steps[-1].partition(":"))
        assert first_wrong_step(problem.question(), [*steps[:-1], f"{label}:{reword(problem.question(), text, rng)}"], "") is None


def test_the_checker_finds_a_planted_error_exactly():
    """One changed number in one step, and that step's index comes back: sums, operands, and the last line."""
    some, rng = problems(200)
    for problem in some:
        steps = solve(problem)
        k = rng.randrange(len(steps))
        wording, left, sign, right, result = steps[k]
        wrong = rng.choice([(wording, left, sign, right, result + 1), (wording, left + 1, sign, right, result), (wording, left, sign, right + 1, result)])
        text = write_solution(problem, [*steps[:k], wrong, *steps[k + 1:]], rng)
        assert first_wrong_step(problem.question(), data.split_steps(text), "") == k
    text = write_solution(problem, steps, rng)
    assert first_wrong_step(problem.question(), data.split_steps(text + "7"), "") == len(steps) - 1
    assert first_wrong_step(problem.question(), data.split_steps(text)[:-1], "") is None, "an unfinished solution has no wrong step"


def test_the_pupil_adds_where_one_must_multiply_and_nowhere_else():
    """The only planted bias is the one that is documented; after it the pupil calculates correctly."""
    some, rng = problems(300)
    slips = 0
    for problem in some:
        text = demonstration(problem, rng)
        wrong = first_wrong_step(problem.question(), data.split_steps(text), "")
        equations = [(int(a), sign, int(b), int(c)) for a, sign, b, c in arithmetic.EQUATION.findall(text)]
        assert all({"+": a + b, "-": a - b, "*": a * b}[sign] == c for a, sign, b, c in equations)
        if wrong is not None:
            slips += 1
            assert solve(problem)[wrong][2] == "*" and equations[wrong][1] == "+"
    assert slips > 50


def test_tokens_round_trip_and_never_reach_over_the_seam(start):
    """decode(encode(text)) is the text, without unknown words; and a prefix ending in "Step k:" is a prefix in tokens too."""
    tokenizer = data.Tokenizer.from_pretrained(start)
    some, rng = problems(100)
    for problem in some:
        question, text = problem.question(), demonstration(problem, rng)
        steps = data.split_steps(text)
        label, _, step = steps[-1].partition(":")
        for whole in (question + text, question + "".join(steps[:-1]) + label + ":" + reword(question, step, rng)):
            ids = tokenizer.encode(whole).ids
            assert tokenizer.decode(ids) == whole and tokenizer.backend.token_to_id("<unk>") not in ids
        prefix = question + "".join(steps[:-1]) + label + ":"
        assert tokenizer.encode(question + text).ids[:len(tokenizer.encode(prefix).ids)] == tokenizer.encode(prefix).ids


def test_sign_test_by_hand():
    """5 against 1: 2 * (C(6,0) + C(6,1)) / 2^6 = 14/64. And a comparison within one run counts problems, not rates."""
    assert sign_test(5, 1) == sign_test(1, 5) == 14 / 64
    assert sign_test(0, 0) == sign_test(3, 3) == 1.0
    run = {"arms": {"a": {"verdicts": [True, True, False, True]}, "b": {"verdicts": [False, True, True, False]}}}
    found = compare([run], "a", "b")
    assert (found["only_a_right"], found["only_b_right"], found["difference"], found["holds"]) == (2, 1, 0.25, False)


def test_the_whole_way_small_and_again(tmp_path, monkeypatch, capsys):
    """Every stage, every arm, results.json with its promised fields; the same command again computes nothing anew and says the same."""
    tiny = replace(QUICK, sft=6000, collect=80, held_out=60, pairs=16, epochs=1, test=20)
    monkeypatch.setattr(arithmetic, "QUICK", tiny)
    argv = ["--out", str(tmp_path), "--quick", "--seed", "3", "--lora", "4"]
    assert arithmetic.main(argv) == 0
    assert "Weights, gradients and AdamW's moments: full" in capsys.readouterr().out
    first = json.loads((tmp_path / "results.json").read_text())
    for arm in ("sft", "sft_chosen", "dpo", "dpo_rectified", "stepdpo", "stepdpo_ood"):
        assert {"accuracy", "correct", "problems", "low", "high"} <= first["arms"][arm].keys()
        assert (tmp_path / "seed3" / arm / "model.safetensors").is_file()
    for arm in ("stepdpo_lora", "stepdpo_lora_1x"):
        assert (tmp_path / "seed3" / arm / "adapter_model.safetensors").is_file() and first["arms"][arm]["seconds"] > 0
    assert {"margin", "preference_accuracy"} <= first["arms"]["stepdpo"].keys()
    trained = (tmp_path / "seed3" / "stepdpo" / "model.safetensors").stat().st_mtime_ns
    capsys.readouterr()
    assert arithmetic.main(argv) == 0
    assert "already complete" in capsys.readouterr().out
    assert (tmp_path / "seed3" / "stepdpo" / "model.safetensors").stat().st_mtime_ns == trained
    again = json.loads((tmp_path / "results.json").read_text())
    assert again["arms"] == first["arms"]
