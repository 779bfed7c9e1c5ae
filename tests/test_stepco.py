"""variants/stepco.py: verify, keep what stands before the first doubtful step, write the rest anew; every token counted; revisions become Step-DPO pairs.

(The released loop's own numbers: tests/test_siblings.py.)"""
import json
import signal
import sys
from types import SimpleNamespace

import pytest
from conftest import ROOT, tiny_checkpoint, write_rows
from hypothesis import given
from hypothesis import strategies as st

import data
import eval as ev
from variants import prm, stepco
from variants.stepco import History, Revision, Verdict, Written

CHECKER = """
def check(question, steps, answer):
    return None if sum(map(len, steps)) % 3 == 0 else len(steps) - 1

def last(question, steps, answer):
    return next((i for i, step in enumerate(steps) if "bad" in step), None)
"""
PREFIX = "Let's think step by step.\nStep 1: One.\nStep 2:"


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stepco")
    tiny_checkpoint(folder / "model")
    tiny_checkpoint(folder / "prm", seed=5)
    write_rows(folder / "problems.jsonl", [{"id": f"p{i}", "question": f"{i} + 1?\n", "answer": str(i + 1), "prefix": PREFIX, "level": i % 2} for i in range(9)])
    (folder / "rough.py").write_text(CHECKER)
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))


def command(work, out, *more, verifier=("--checker", "rough:check")) -> list[str]:
    return ["--model", str(work / "model"), "--problems", str(work / "problems.jsonl"), "--out", str(out), *verifier, "--prompt", "raw",
            "--max_new_tokens", "10", "--batch_size", "4", "--device", "cpu", *more]


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def loop(scripts: list[list[tuple]], **how):
    """Histories, and what was asked. scripts: of each problem its paths as (step scores, text)."""
    paths = [[Written(text, 10 + t, "eos") for t, (_, text) in enumerate(script)] for script in scripts]
    asked_for = []

    def verify(asked):
        return [Verdict(dict(zip(paths[b], (scores for scores, _ in scripts[b])))[path], 0.0) for b, path in asked]

    def revise(asked, turn):
        asked_for.append([(b, k, p) for b, _, k, p in asked])
        return [paths[b][turn] for b, *_ in asked]
    return stepco.correct_stepwise([of[0] for of in paths], revise, verify, **how), asked_for


# ---------------------------------------------------------------------------------------------------------------- the loop

def test_many_problems_abreast():
    """Each is revised from its own doubtful step until nothing is doubted; who is done is not asked again."""
    histories, asked = loop([[([0.9, 0.8], "a0")], [([0.9, 0.4, 0.1], "b0"), ([0.9, 0.7, 0.6], "b1")], [([0.2], "c0"), ([0.3], "c1"), ([0.5], "c2")]])
    assert asked == [[(1, 1, 0.4), (2, 0, 0.2)], [(2, 0, 0.3)]]
    assert [[path.text for path in history.paths] for history in histories] == [["a0"], ["b0", "b1"], ["c0", "c1", "c2"]]
    assert [history.reads for history in histories] == [1, 2, 3]
    assert histories[2].revisions == [Revision(0, 0.2), Revision(0, 0.3)]


def test_later_rounds_do_not_cut_before_an_earlier_one():
    """k_t >= k_(t-1): a kept step that is doubted now stays."""
    (history,), asked = loop([[([0.9, 0.9, 0.1], "0"), ([0.2, 0.9, 0.9, 0.3], "1"), ([0.1, 0.1, 0.9, 0.9], "2")]])
    assert asked == [[(0, 2, 0.1)], [(0, 3, 0.3)]] and history.paths[-1].text == "2"


def test_at_most_so_many_rounds():
    """The last path is taken unread."""
    (history,), asked = loop([[([0.1], str(t)) for t in range(9)]], rounds=3)
    assert len(asked) == 3 and history.paths[-1].text == "3" and history.reads == 3


@given(st.lists(st.floats(0, 1), max_size=8), st.floats(0, 1), st.integers(0, 8))
def test_the_first_step_below_theta(scores, theta, start):
    k = stepco.first_below(scores, theta, start)
    assert all(score >= theta for score in scores[start:k]) and (k is None or k >= start and scores[k] < theta)


def test_the_control_cuts_anywhere_but_only_where_the_verifier_doubts():
    cut = stepco.random_cut(0)
    assert cut([0.9, 0.8, 0.7], 0.5) is None
    found = {cut([0.9, 0.8, 0.1 + i / 1000], 0.5, 2) for i in range(60)}
    assert found == {0, 1, 2} and cut([0.1, 0.9], 0.5) == stepco.random_cut(0)([0.1, 0.9], 0.5)


def test_equal_answers_are_compared_as_mathematics():
    """The released code compares them by eval() of what the model wrote; here 1/2 and 0.5 are equal, and nothing is executed."""
    half, other, nothing = (Written(text, 1, "eos") for text in ("The answer is: 1/2", "The answer is: 0.5", "I stop."))
    assert stepco.same_answer(half, other) and not stepco.same_answer(nothing, nothing)


# ------------------------------------------------------------------------------------------------------------- the command

def test_attempts_with_their_history(work, tmp_path, capsys):
    """Rows are what eval.py writes; tokens are those of all paths; each path keeps what stands before the doubted step of the one before; the verifier is obeyed."""
    from rough import check
    assert stepco.main(command(work, tmp_path / "o.jsonl")) == 0
    said, stuck = capsys.readouterr(), 0
    rows = lines(tmp_path / "o.jsonl")
    assert [row["id"] for row in rows] == [f"p{i}" for i in range(9)] and any(row["revisions"] for row in rows)
    for row in rows:
        texts = [path["text"] for path in row["paths"]]
        assert row["tokens"] == sum(path["tokens"] for path in row["paths"]) and row["prefix"] + row["completion"] == texts[-1]
        assert len(texts) == len(row["revisions"]) + 1 <= 6 and row["reads"] == min(len(texts), 5) and row["level"] in (0, 1)
        for old, new, revision in zip(texts, texts[1:], row["revisions"]):
            steps = data.split_steps(old)
            assert check("", steps, "") == revision["step"] - 1 and new.startswith("".join(steps[:revision["step"] - 1])) and new.startswith(PREFIX)
        stuck += len(texts) < 6 and check("", data.split_steps(texts[-1]), "") is not None
    assert stuck == said.err.count("this path is left as it is")
    summary = json.loads((tmp_path / "o.summary.json").read_text())
    assert summary["tokens_per_problem"] == sum(row["tokens"] for row in rows) / 9 and summary["reads"] == sum(row["reads"] for row in rows)
    assert summary["by_level"].keys() == {"0", "1"} and "wrong to right" in said.out and f"{summary['reads']} solutions" in said.out
    assert sum(row["tokens"] for row in rows) > sum(row["paths"][-1]["tokens"] for row in rows)
    (tmp_path / "again.jsonl").write_text((tmp_path / "o.jsonl").read_text())
    attempts = [row for _, row in data.read_attempts(str(tmp_path / "again.jsonl"), [], "attempts")]
    assert len(attempts) == 9


def test_a_learned_verifier(work, tmp_path):
    """The score beside a revision is what the PRM says of the path at that step; --theta 0 doubts nothing, --theta 1 cuts at the first step."""
    verifier = ("--prm", str(work / "prm"))
    for theta in (0, 1):
        assert stepco.main(command(work, tmp_path / f"{theta}.jsonl", "--theta", str(theta), "--rounds", "2", verifier=verifier)) == 0
    assert not any(row["revisions"] for row in lines(tmp_path / "0.jsonl"))
    judge = prm.PRM(work / "prm", "raw", device="cpu")
    for row in lines(tmp_path / "1.jsonl"):
        assert [revision["step"] for revision in row["revisions"]] == [1, 1]
        for path, revision in zip(row["paths"], row["revisions"]):
            scores, = judge.scores([judge.read("row", row["question"], data.split_steps(path["text"]))])
            assert scores[0] == pytest.approx(revision["score"], abs=1e-5)


def test_the_first_path_may_be_greedy(work, tmp_path):
    """--greedy_first: path 0 is eval.py's greedy answer; by default it is sampled."""
    assert ev.main(["--model", str(work / "model"), "--problems", str(work / "problems.jsonl"), "--out", str(tmp_path / "e.jsonl"), "--prompt", "raw",
                    "--max_new_tokens", "10", "--device", "cpu"]) == 0
    greedy = [row["prefix"] + row["completion"] for row in lines(tmp_path / "e.jsonl")]
    for more, same in ((["--greedy_first"], True), ([], False)):
        assert stepco.main(command(work, tmp_path / "o.jsonl", *more, "--restart")) == 0
        assert ([row["paths"][0]["text"] for row in lines(tmp_path / "o.jsonl")] == greedy) == same


def test_a_path_that_the_verifier_cannot_read_is_left_as_it_is(work, tmp_path, capsys, monkeypatch):
    """Too long for the PRM, say: that path is final and named; the others are revised."""
    read = prm.PRM.read

    def of_some(self, where, question, steps):
        self.max_length = 20 if question.startswith("3 ") else 512
        return read(self, where, question, steps)
    monkeypatch.setattr(prm.PRM, "read", of_some)
    assert stepco.main(command(work, tmp_path / "o.jsonl", "--theta", "1", "--rounds", "1", verifier=("--prm", str(work / "prm")))) == 0
    assert "cannot be scored: longer than 20 tokens; this path is left as it is" in capsys.readouterr().err
    assert [len(row["revisions"]) for row in lines(tmp_path / "o.jsonl")] == [1, 1, 1, 0, 1, 1, 1, 1, 1]


def test_a_path_that_cannot_be_read_on_from_is_final(work, tmp_path, capsys, monkeypatch):
    """A model may write what is no text, such as a control token: the path stays, and is named; no token is counted twice."""
    prepare = ev.Sampler.prepare

    def refuse(self, problem, text, cut=None):
        if cut is not None and problem.id == "p2":
            raise data.DataError(f"{problem.where}: it contains the control token <s>")
        return prepare(self, problem, text, cut)
    monkeypatch.setattr(ev.Sampler, "prepare", refuse)
    assert stepco.main(command(work, tmp_path / "o.jsonl", "--theta", "1", "--rounds", "1", verifier=("--prm", str(work / "prm")))) == 0
    assert "control token <s>; this path is left as it is" in capsys.readouterr().err
    row = lines(tmp_path / "o.jsonl")[2]
    assert not row["revisions"] and len(row["paths"]) == 1 and row["tokens"] == row["paths"][0]["tokens"]


@pytest.mark.parametrize("world", [1, 2])
def test_killed_anywhere_it_ends_in_the_same_bytes(processes, work, tmp_path, world):
    (processes.folder / "rough.py").write_text(CHECKER)
    script = ROOT / "variants" / "stepco.py"
    processes.run(script, *command(work, tmp_path / "a" / "o.jsonl"), world=world)
    for before in (3, 4):
        processes.start([str(script), *command(work, tmp_path / "b" / "o.jsonl")], world, tmp_path / "b", kill={"before": before, "rank": 0, "all": True})
        assert -signal.SIGKILL in processes.wait(), processes.log.read_text()
    processes.run(script, *command(work, tmp_path / "b" / "o.jsonl"), world=world)
    found = [{p.name: p.read_bytes() for p in (tmp_path / name).iterdir() if "summary" not in p.name} for name in "ab"]
    assert found[0] == found[1] and sorted(found[0]) == ["o.jsonl", "o.revisions.jsonl"]


def test_another_theta_is_another_run(work, tmp_path, capsys):
    go = lambda *more: stepco.main(command(work, tmp_path / "o.jsonl", "--rounds", "1", *more))
    assert go() == 0 and go() == 0 and "already complete" in capsys.readouterr().out
    assert go("--theta", "0.7") == 2 and "theta was 0.5, is 0.7" in capsys.readouterr().err
    assert go("--cut", "random") == 2 and go("--restart", "--cut", "random") == 0


# -------------------------------------------------------------------------------------------------------------- the bridge

def test_revisions_of_wrong_paths_become_pairs(tmp_path):
    """prefix up to the doubted step's label, that step, what was written instead: data.py pairs takes those that came right, against a wrong path only."""
    good = "Let's think step by step.\nStep 1: It is 2.\nStep 2: So 4.\nThe answer is: 4"
    bad = "Let's think step by step.\nStep 1: It is 2.\nStep 2: So 5.\nThe answer is: 5"
    problem = SimpleNamespace(id="p", question="2 + 2?", answer="4", prefix="", carried={"dataset": "mine"})
    histories = [History([Written(bad, 9, "eos"), Written(good, 4, "eos")], [Revision(1, 0.25)], 2),              # the pair
                 History([Written(good, 9, "eos"), Written(good + ".", 4, "eos")], [Revision(1, 0.25)], 2),       # it was right
                 History([Written(bad, 9, "eos"), Written(bad, 4, "eos")], [Revision(1, 0.25)], 2),               # it stays wrong
                 History([Written(bad, 9, "eos"), Written("Let's think step by step.\nStep 1: It is 2.\nThe answer is: 4", 4, "eos")], [Revision(1, 0.2)], 2)]
    rows = [stepco.row_of(problem, history) | {"id": f"p{i}"} for i, history in enumerate(histories)]
    made = [revision for row in rows for revision in stepco.bridge(row, "auto")]
    assert [row["id"] for row in made] == ["p0#0", "p2#0"] and [row["correct"] for row in made] == [True, False]
    assert data.main(["pairs", str(write_rows(tmp_path / "r.jsonl", made)), "--out", str(tmp_path / "pairs.jsonl")]) == 0
    pair, = lines(tmp_path / "pairs.jsonl")
    assert pair == {"dataset": "mine", "prompt": "2 + 2?", "initial_reason_steps": "Let's think step by step.\nStep 1: It is 2.\nStep 2:",
                    "chosen": " So 4.\nThe answer is: 4", "rejected": " So 5.\nThe answer is: 5", "full_chosen": " So 4.\nThe answer is: 4",
                    "full_rejected": " So 5.\nThe answer is: 5", "answer": "4"}
    found = stepco.flips(rows)
    assert (found["wrong_to_right"], found["right_to_wrong"], found["revised"], found["revisions"]) == (2, 0, 4, 4)
    assert found["tokens_per_problem"] == 13 and found["first_correct"] == 0.25


# --------------------------------------------------------------------------------------------------------------- a server

def served(monkeypatch, answer):
    """Requests to a server that says answer(body)."""
    asked = []

    def ask(self, body):
        asked.append(body)
        return answer(body)
    monkeypatch.setattr(data.Endpoint, "ask", ask)
    return asked


def remote(work, tmp_path, *more) -> list[str]:
    rows = [{"id": "a", "question": "2 + 2?", "answer": "4"}]
    return ["--endpoint", "http://localhost:9/v1", "--api_model", "m", "--problems", str(write_rows(tmp_path / "p.jsonl", rows)), "--out", str(tmp_path / "o.jsonl"),
            "--checker", "rough:last", "--instruct", *more]


FIRST = "Step 1: It is 2.\nStep 2: So bad 5.\nThe answer is: 5"


@pytest.mark.parametrize("reply", ["Step 2: So 4.\nThe answer is: 4", "<think>Step 2 was\n wrong.</think>\n\nStep 2: So 4.\nThe answer is: 4",
                                   "Step 1: It is 2.\nStep 2: So 4.\nThe answer is: 4"])
def test_a_served_model_is_asked_to_revise(work, tmp_path, monkeypatch, reply):
    """It reads the whole solution, which step is doubted and how much; its words, thought aside and kept steps not twice, follow the kept steps."""
    asked = served(monkeypatch, lambda body: (reply if "verifier" in body["messages"][0]["content"] else FIRST, 7, "stop"))
    assert stepco.main(remote(work, tmp_path)) == 0
    row, = lines(tmp_path / "o.jsonl")
    assert row["paths"][-1]["text"] == "Step 1: It is 2.\nStep 2: So 4.\nThe answer is: 4" and row["correct"] and row["tokens"] == 14
    said = asked[1]["messages"][0]["content"]
    assert FIRST in said and "doubts step 2" in said and "a chance of 0 %" in said and asked[1]["temperature"] == 0.7
    assert stepco.bridge(row, "auto")[0]["prefix"] == "Step 1: It is 2.\nStep 2:"


def test_a_server_that_does_not_count(work, tmp_path, monkeypatch, capsys):
    """No number is made up."""
    served(monkeypatch, lambda body: (FIRST.replace("bad ", ""), None, "stop"))
    assert stepco.main(remote(work, tmp_path)) == 0
    assert lines(tmp_path / "o.jsonl")[0]["tokens"] is None and "does not say how many tokens" in capsys.readouterr().out


def test_a_server_that_fails_on_a_revision(work, tmp_path, monkeypatch, capsys):
    """The problem is left out and asked for again by the same command; nothing half-corrected is kept."""
    working = [False]

    def answer(body):
        if "verifier" in body["messages"][0]["content"]:
            if not working[0]:
                raise data.DataError("the server answered 400")
            return "Step 2: So 4.\nThe answer is: 4", 7, "stop"
        return (FIRST if "2 + 2" in body["messages"][0]["content"] else FIRST.replace("bad ", "")), 7, "stop"
    served(monkeypatch, answer)
    argv = remote(work, tmp_path)
    write_rows(tmp_path / "p.jsonl", [{"id": "a", "question": "2 + 2?", "answer": "4"}, {"id": "b", "question": "2 + 3?", "answer": "5"}])
    assert stepco.main(argv) == 1 and "1 problems failed" in capsys.readouterr().err
    assert [row["id"] for row in lines(tmp_path / "o.jsonl")] == ["b"]
    working[0] = True
    assert stepco.main(argv) == 0 and [row["correct"] for row in lines(tmp_path / "o.jsonl")] == [True, True]


@pytest.mark.parametrize("more, said", [(["--theta", "1.5"], "expected a number from 0 to 1"), (["--instruct"], "give --endpoint"),
                                        (["--temperature", "0"], "a revision must differ")])
def test_what_cannot_be_meant(work, tmp_path, capsys, more, said):
    with pytest.raises(SystemExit):
        stepco.main(command(work, tmp_path / "o.jsonl", *more))
    assert said in capsys.readouterr().err


def test_problems_that_are_none(work, tmp_path, capsys):
    file = write_rows(tmp_path / "p.jsonl", [{"text": "hello"}])
    assert stepco.main(command(work, tmp_path / "o.jsonl", "--problems", str(file))) == 2
    error = capsys.readouterr().err
    assert "p.jsonl" in error and "Traceback" not in error and not (tmp_path / "o.jsonl").exists()


# --------------------------------------------------------------------------------------------------------- the experiment

def test_pairs_that_equal_tokens_buy(tmp_path):
    """Attempts and continuations of whole problems, in order, as long as the tokens last."""
    from examples.siblings.stepco import bought_for
    attempts = [{"question": q, "dataset": "train", "tokens": 10} for q in "aabbcc"] + [{"question": "h", "dataset": "held-out", "tokens": 10}]
    rectified = [{"question": q, "tokens": 5} for q in "aacch"]
    write_rows(tmp_path / "attempts.jsonl", attempts)
    write_rows(tmp_path / "rectified.jsonl", rectified)
    write_rows(tmp_path / "all_pairs.jsonl", [{"prompt": q} for q in "abch"])
    bench = SimpleNamespace(pool=tmp_path)                              # a costs 30, b 20, c 30
    for tokens, bought in ((29, ""), (30, "a"), (49, "a"), (50, "ab"), (1000, "abc")):
        assert "".join(row["prompt"] for row in bought_for(bench, tokens)) == bought


def test_fewer_rollouts_are_drawn_from_those_there_were():
    """As if each step had had so many only: exact at the ends, right on average."""
    from examples.siblings.prm import fewer
    rows = [{"values": [[0, 32], [32, 32], [8, 32]]} for _ in range(400)]
    drawn = [row["values"] for row in fewer(rows, 4, 0)]
    assert all(values[:2] == [[0, 4], [4, 4]] and values[2][1] == 4 for values in drawn)
    assert sum(values[2][0] for values in drawn) / 1600 == pytest.approx(0.25, abs=0.03)
