"""data.py, second half: the pipeline's file-to-file steps, from graded attempts to pairs. No network beyond this
machine, no model."""
import json
import os
import random
import re
import time
from datetime import datetime
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

import data
import eval as ev
from data import DataError, error_posterior, first_error_from_values, split_steps, step_starts
from model import locked

GOOD = "Let's think step by step.\nStep 1: 3 + 4 = 7.\nStep 2: 7 * 2 = 14.\nThe answer is: 14"
BAD = "Let's think step by step.\nStep 1: 3 + 4 = 8.\nStep 2: 8 * 2 = 16.\nThe answer is: 16"
LATE = "Let's think step by step.\nStep 1: 3 + 4 = 7.\nStep 2: 7 * 2 = 15.\nThe answer is: 15"


def attempt(completion=GOOD, id="p1", sample=0, **more):
    correct = "14" in completion
    return {
        "id": id, "question": "Twice 3 + 4?", "answer": "14", "sample": sample, "prefix": "", "completion": completion,
        "extracted": "14" if correct else "x", "correct": correct, "tokens": 30, "stop_reason": "eos", "level": 2
    } | more


def write(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def run(*arguments):
    return data.main([str(argument) for argument in arguments])


def read(path):
    return [row for _, row in data.read_rows(path)]


# -------------------------------------------------------------------------------------------------------------- steps

@pytest.mark.parametrize(
    "style, text, steps",
    [("step", GOOD, ["Let's think step by step.\nStep 1: 3 + 4 = 7.", "\nStep 2: 7 * 2 = 14.\nThe answer is: 14"]),
     ("heading", "Plan.\n**Step 1:** a\n\n### Step 2: b\nStep 3. c\nStep 4 - d",
      ["Plan.\n**Step 1:** a\n", "\n### Step 2: b", "\nStep 3. c", "\nStep 4 - d"]),
     ("number", "1. a\n12. of them\n2. b\n**3.** c", ["1. a\n12. of them", "\n2. b", "\n**3.** c"]),
     ("paragraph", "\n\na\nb\n\n\nc\n  \nd\n\n", ["\n\na\nb", "\n\n\nc", "\n  \nd\n\n"]),
     ("auto", "a\n\nb", ["a", "\n\nb"]), ("auto", "1. a\n2. b\n\nc", ["1. a", "\n2. b\n\nc"]),
     ("auto", "one line", ["one line"]), ("auto", "", [""])])
def test_real_ways_of_numbering_steps(style, text, steps):
    assert split_steps(text, style) == steps


@given(st.text(st.sampled_from("Step123:.* \n#a)")), st.sampled_from(data.STEP_STYLES))
def test_steps_are_verbatim(text, style):
    """Nothing of a solution is lost or changed by cutting it, whatever it looks like; a step's own words begin inside
    it."""
    starts = step_starts(text, style)
    assert "".join(split_steps(text, style)) == text and starts[0][0] == 0
    assert all(begin <= own <= end for (begin, own), (end, _) in zip(starts, starts[1:] + [(len(text), 0)]))


LABELS = ["Step {}:", "step {}:", "STEP {}.", "Step{}:", "Step #{}:", "Step {}/2:", "Step ({}):", "**Step {}:**", "### Step {}", "__Step {}__",
          "\\textbf{{Step {}:}}", "$\\textbf{{Step {}}}$:", "<b>Step {}:</b>", "[Step {}]", "> Step {} -", "\U0001f4cc Step {}:",
          "({})", "[{}]", "{})", "{}.", "**{}.**", "{}\ufe0f\u20e3", "（{}）", "{}、", "Étape {} :", "Schritt {}:", "Paso {}:",
          "Passo nº {}:", "{}º passo:", "Шаг {}:", "Bước {}:", "Adım {}:", "Krok {}:", "चरण {}:", "الخطوة {}:", "ขั้นตอนที่ {}:", "Hatua ya {}:",
          "第{}步：", "第 {} 步：", "第{}步，", "步骤{}：", "ステップ{}：", "手順{}：", "단계 {}:", "{}단계:"]
WORDS = [("Step one:", "Step two:"), ("First step:", "Second step:"), ("1st step:", "2nd step:"), ("1ère étape :", "2ème étape :"),
         ("STEP I.", "STEP II."), ("第一步：", "第二步："), ("步骤一：", "步骤二："), ("一、", "二、"), ("①", "②"), ("الخطوة ١:", "الخطوة ٢:")]


@pytest.mark.parametrize("first, second", [(label.format(1), label.format(2)) for label in LABELS] + WORDS)
def test_any_label_that_counts(first, second):
    """Whatever the language, the numerals and the dress: two steps, what precedes the first label and follows the second
    included, and the label belongs to neither step's words."""
    steps = ["We begin.\n" + first + " Ann has 3\nand Bob 4.", "\n" + second + " So 3 + 4 = 7.\nThe answer is 7."]
    text = "".join(steps)
    assert split_steps(text) == steps
    assert data.step_style(text) == f"{first.strip('*_#> ')!r} labels"
    (_, own), (_, other) = step_starts(text)
    assert text[own:].strip(" ：").startswith("Ann") and text[other:].strip(" ：").startswith("So")
    assert data.same_step(f"\n{first} It is even.", f"\n{second} It is even.")
    assert not data.same_step(f"\n{first} It is even.", f"\n{second} It is odd.")
    assert len(split_steps(text.replace("\n", "\r\n"))) == 2


@pytest.mark.parametrize("text, count", [
    ("Step 1: Ann has 3. Step 2: 3 * 4 = 12. Step 3: So 12.", 3), ("1) Ann has 3. 2) So 12.", 2), ("Étape 1 : a. Étape 2 : b.", 2),
    ("第一步：小明有3个苹果。第二步：3*4=12。", 2), ("Why? Step 1: 3.\nStep 2: 4 = 4. Step 3: 7.", 3), ("We see 1) that it is even.", 1), ("From (1) and (2) it is even.", 1)])
def test_labels_on_one_line(text, count):
    assert len(split_steps(text)) == count


@pytest.mark.parametrize("text, steps", [
    ("Ann has 3.\nShe buys 4.\n#### 7", ["Ann has 3.", "\nShe buys 4.", "\n#### 7"]),
    ("- Ann has 3.\n- She buys 4.\n  That is 7.\n- So 7.", ["- Ann has 3.", "\n- She buys 4.\n  That is 7.", "\n- So 7."]),
    ("Ann has 3.\r\nShe buys 4.\r\n", ["Ann has 3.", "\r\nShe buys 4.\r\n"]),
    ("Let's think step by step.\nAnn has 3.\nSo 7.", ["Let's think step by step.\nAnn has 3.", "\nSo 7."]),
    ("We have:\n\\[\nx = 3\n\\]\nSo\n$$x + 1\n= 4.$$\nDone.", ["We have:\n\\[\nx = 3\n\\]", "\nSo\n$$x + 1\n= 4.$$", "\nDone."]),
    ("In all\n\\begin{cases}\na\nb\n\\end{cases}\nNow 3.", ["In all\n\\begin{cases}\na\nb\n\\end{cases}", "\nNow 3."]),
    ("It is\n| a | b |\n|---|---|\nNow 3.", ["It is\n| a | b |\n|---|---|", "\nNow 3."]),
    ("```\nx = 1\nprint(x)\n```", ["```\nx = 1\nprint(x)\n```"]), ("x + 3 = 4 + 5\n= 9", ["x + 3 = 4 + 5\n= 9"]),
    ("The train leaves at five and reaches the\nstation at six.", ["The train leaves at five and reaches the\nstation at six."])])
def test_lines_are_the_last_resort(text, steps):
    """GSM8K's own layout, and lists: a step a line, but not where a line only goes on with the one above."""
    assert split_steps(text) == split_steps(text, "line") == steps
    assert data.step_style(text) == ("lines" if len(steps) > 1 else "one step")


@pytest.mark.parametrize("end", ["</think>", "[/THINK]"])
def test_a_thought_is_no_step(end):
    """Its labels and paragraphs do not count: it belongs to the first step. One that has no end is all there is."""
    thought = f"<think>\nStep 1: maybe 12\n\nStep 2: no\nStep 3: yes{end}"
    assert split_steps(thought + "\n" + GOOD) == [thought + "\n" + split_steps(GOOD)[0], split_steps(GOOD)[1]]
    assert split_steps(thought + "\n\na\n\nb")[1:] == ["\n\nb"] and len(split_steps("<think>\nStep 1: a\nStep 2: b")) == 1


@pytest.mark.parametrize("text, style", [
    ("12 eggs.\n\n1 egg more.\n\n2 eggs.", "paragraphs"), ("We see\n\nCase 1: a\n\nb\n\nCase 2: c\n\nd\n\ne", "paragraphs"),
    ("1. a\n\nb\n\nc\n\n2. d", "'1.' labels"), ("1. **Step 1: a**\n2. **Step 2: b**", "'1.' labels"), ("Step 2: a\nStep 3: b", "'Step 2:' labels"), ("Step 1: a\n\nb", "one step")])
def test_what_is_no_label_and_what_is_one(text, style):
    """Numbers count from 1; "Case 1:" and its like only where they tell the whole solution; the word "Step" always."""
    assert data.step_style(text) == style


def test_the_style_is_told_and_one_step_is_warned_of(tmp_path, capsys):
    """`show` and `localize` say how the solutions were cut; where most are one step, that Step-DPO on them is DPO."""
    right = [attempt(id=f"p{i}", completion=BAD) for i in range(3)]
    file = write(tmp_path / "a.jsonl", *right, attempt("3 + 4 = 8.\n\nSo 15.", id="q"))
    assert run("localize", file, "--judge", f"{__name__}:first_step", "--out", tmp_path / "e.jsonl") == 0
    told = capsys.readouterr()
    assert "steps: 3 'Step 1:' labels, 1 paragraphs" in told.out and "WARNING" not in told.err
    file = write(tmp_path / "b.jsonl", *right[:1], *(attempt(f"It is {i}.", id=f"r{i}") for i in range(3)))
    assert run("show", "--data", file) == 0
    told = capsys.readouterr()
    assert "2 steps (--steps auto: 'Step 1:' labels)" in told.out and "steps: 3 one step, 1 'Step 1:' labels" in told.out
    assert re.search("WARNING: 3 of 4 solutions are ONE step each.*--steps .*line", told.err)


@pytest.mark.parametrize("unit", ["1:\n", "a 1:\n", "\nStep 1:", "\r", "\n\n", "\\[", "*", "(", "\\text{", "\n- ", "1 ", "\n1 (", "</think>",
                                  "一", "\nab ab ab"])
def test_steps_of_hostile_text_take_linear_time(unit):
    """100,000 characters in every style: one that looks back at each label for all the text took minutes."""
    text, start = unit * (100_000 // len(unit)), time.process_time()
    for style in data.STEP_STYLES:
        split_steps(text, style)
    assert time.process_time() - start < 10


def first_step(question, steps, answer):
    return 0


def test_the_reported_solutions(cases):
    """The steps that people expected of solutions in public bug reports."""
    for row in read(cases / "steps.jsonl"):
        assert len(split_steps(row["text"])) == row["expected_steps"], row["id"]


def test_real_worked_solutions_are_cut_at_their_lines(assets):
    """GSM8K's training set has its steps on lines: 7,473 solutions, none of which is one step."""
    styles = data.Counter(data.step_style(row["answer"]) for row in read(assets / "gsm8k" / "train.jsonl"))
    assert styles["lines"] > 0.99 * styles.total() and not styles["one step"]


def test_real_solutions_are_cut_into_their_steps(assets):
    """Abel's GSM8K answers number their lines "1.", "2.", ...: nearly all are cut at every number."""
    texts = [value for row in read(assets / "answers" / "abel_gsm8k_7b.jsonl")[:200] for value in row.values()
             if isinstance(value, str) and value.lstrip().startswith("1.")]
    assert len(texts) > 50 and sum(len(split_steps(text)) > 1 for text in texts) / len(texts) > 0.95


# ------------------------------------------------------------------------------------------------------------- values

@pytest.mark.parametrize("values", [None, [], [[1, 2]], [[3, 2], None], [[1.0, 2], None], [[True, 2], None],
                                    ["ab", None], [[-1, 2], None], 5])
def test_values_that_are_none(tmp_path, capsys, values):
    """Counts of another length or kind are named with the row, in `localize` as in `show`."""
    file = write(tmp_path / "v.jsonl", attempt(BAD) | {"values": values})
    assert run("localize", file, "--judge", "values", "--out", tmp_path / "e.jsonl") == 2
    assert "v.jsonl:1: field 'values': " in capsys.readouterr().err
    assert run("show", "--data", file) == (0 if values is None else 2)
    assert values is None or "v.jsonl:1: field 'values': " in capsys.readouterr().err


def test_one_lucky_success_does_not_hide_an_error():
    """After the error one of eight still arrives at the answer: the plain rule ("none succeeds") would look past it; so
    would it see an error where a hard problem fails eight times although the next prefix succeeds."""
    assert first_error_from_values([[8, 8], [7, 8], [1, 8], [0, 8], [0, 8]]) == 2
    assert first_error_from_values([[3, 8], [0, 8], [7, 8], [0, 8], [0, 8]]) == 3
    assert first_error_from_values([[8, 8], [8, 8], [0, 8]]) == 2 and first_error_from_values([None]) == 0
    assert first_error_from_values([None, None, [0, 8]]) is None


def test_agreement_decides_where_values_cannot():
    """A hard problem: 2 of 16 succeed from every sound prefix. Both took the attempt's first step and avoided its
    second: that is the error, whatever comes after; the values alone leave it open."""
    agreement = [[2, 2, 16], [0, 2, 16], None, None]
    assert first_error_from_values([[2, 16], None, None, None]) is None
    assert first_error_from_values([[2, 16], None, None, None], agreement) == 1
    assert first_error_from_values([[0, 16], None, None, None], [[0, 2, 16], None, None, None]) == 0


def test_the_posterior_is_a_distribution_and_grows_with_evidence():
    assert error_posterior([None] * 4) == [0.25] * 4
    assert sum(error_posterior([[3, 8], None, [0, 8], None])) == pytest.approx(1)
    few, many = error_posterior([[2, 2], [0, 2], [0, 2], None]), error_posterior([[8, 8], [0, 8], [0, 8], None])
    assert few.index(max(few)) == many.index(max(many)) == 1 and max(many) > max(few)


@pytest.mark.parametrize("a, b, same", [("\nStep 2: 3 + 4 = 7.", "\nStep 2: So we get 7 apples", True),
                                        (" 3 + 4 = 8.", " 3 + 4 = 7.", False), (" 1,200", "1,200.", True),
                                        ("\nStep 2: We  add.", "\nStep 3: we add.", True),
                                        ("\nStep 2: We add.", "\nStep 2: We multiply.", False),
                                        ("\nSo x is\n12.", "\nSo x is\n13.", False)])
def test_steps_that_come_to_the_same(a, b, same):
    assert data.same_step(a, b) == same


@pytest.mark.parametrize("a, b, same", [
    (r"\frac{1}{2}", r"\frac{3}{2}", False), (r"\frac{1}{2}", r"-\dfrac{1}{2}", False), ("1/2", "3/2", False),
    (r"\frac{3\pi}{2}", r"\frac{\pi}{2}", False), (r"\frac{1}{2}", "1 / 2", True), (r"\dfrac{-1}{2}", "-0.5", True),
    ("-5", "5", False), ("−5", "- 5", True), (r"\boxed{-5}", "$-5$", True), (r"-\$5", "$5", False),
    ("10 - 5", "5", True), ("y-5", "10 - 5", True), ("it is:\nThus\n- 5 apples", "5", True), ("3-5", "5", True),
    ("1,000", "1000.0", True), (r"10,\!000", "10{,}000", True), ("2{,}000", "1{,}000", False), ("(1,2)", "(3,2)", False),
    (r"2\sqrt{3}", r"\sqrt{3}", False), ("2^3", "4^3", False), ("3:2", "1:2", False), ("1/0", "2/0", False),
    ("9" * 5000, "8" * 5000, False), (r"5 \sqrt{a}", r"5 \sqrt{b}", True)])
def test_a_value_is_compared_whole(a, b, same):
    """With numerator, sign, thousands and root; a minus between two values is no sign."""
    for style in data.STEP_STYLES:
        assert data.same_step(f"\nStep 2: So x = {a}.", f"\nStep 2: So x = {b}.", style) == same


@pytest.mark.parametrize("label", ["\n2. ", "\n**12.** ", "\n> 3) ", "1. ", "We argue.\n1. "])
@pytest.mark.parametrize("style", ["number", "auto"])
def test_the_number_of_a_step_is_not_its_value(style, label):
    assert not data.same_step(f"{label}So it is even.", f"{label}So it is odd.", style)
    assert data.same_step(f"{label}So it  is even.", "\n7. So it is even.", style)
    assert data.same_step(f"{label}So it is 5.", f"\n7. It is 5.", style)


def test_a_wrong_numerator_is_the_first_error():
    """Six of eight continuations from before the third step reach the answer, all with another fraction: that step is
    convicted, not the next one."""
    wrong, right = "\nStep 3: The ratio is \\frac{3}{2}.", "\nStep 3: The ratio is \\frac{1}{2}."
    same = 6 * data.same_step(right, wrong)
    agreement = [[6, 6, 8], [6, 6, 8], [same, 6, 8], None, None]
    assert first_error_from_values([[6, 8], [6, 8], [2, 8], [0, 8], [0, 8]], agreement) == 2


@pytest.mark.parametrize("unit", ["1/", "1 /", "- ", "1,", " ", "\\frac{", "\\frac{1}{", "\\sqrt{{}", "^{", "1{", "{,}", "9"])
def test_values_of_hostile_text_take_linear_time(unit):
    text, start = unit * (100_000 // len(unit)), time.process_time()
    for whole in (text, "\\frac{" + text, "\\sqrt{ " + text):
        data.last_value(whole)
    assert time.process_time() - start < 5


def simulated_rollouts(rng):
    """A solver that takes each step right with its own probability (on average 0.65 to 0.97, by problem), and an
    attempt of its that went wrong at `error`: rollouts(k, n) samples n continuations from before step k -> [same,
    successes, n]."""
    count, skill = rng.randint(3, 8), rng.uniform(0.65, 0.97)
    right = [min(0.99, rng.betavariate(6 * skill, 6 * (1 - skill))) for _ in range(count)]
    error, luck = rng.choices(range(count), [1 - p for p in right])[0], rng.choice([0.0, 0.02, 0.05])

    def rollouts(k, n):
        same = successes = 0
        for _ in range(n):
            sound = k <= error
            success = all(rng.random() < p for p in right[k:]) if sound else rng.random() < luck
            successes += success
            same += success and (k < error and rng.random() < 0.97 or k > error and rng.random() < 0.5)
        return [same, successes, n]
    return count, error, rollouts


def test_agreement_on_simulated_rollouts():
    """A solver's errors, located with rollouts only where they tell most: more of them than by the plain rule with 8
    rollouts a step (77 %), at fewer rollouts; and of those that count as decided (five in six), 19 in 20."""
    rng, n = random.Random(0), 400
    plain = decided = hits = spent = uniform = 0
    for _ in range(n):
        count, error, rollouts = simulated_rollouts(rng)
        everywhere = [rollouts(k, 8) for k in range(1, count)]
        plain += error == next((i for i, counts in enumerate(everywhere) if counts[1] == 0), count - 1)
        uniform += 8 * (count - 1)
        values, agreement = [None] * count, [None] * count
        while (k := data.next_prefix(values, agreement, 8)) is not None:
            agreement[k] = [a + b for a, b in zip(agreement[k] or (0, 0, 0), rollouts(k, 4))]
            if k:
                values[k - 1] = agreement[k][1:]
        spent += sum(counts[2] for counts in agreement if counts)
        first = first_error_from_values(values, agreement)
        decided += first is not None
        hits += first == error
    assert hits / decided > 0.95 and hits > plain and spent < uniform and decided > 0.83 * n


# ----------------------------------------------------------------------------------------------------------- localize

def exact_judge(question, steps, answer):
    """The checker that the tests hand to --judge: the first step whose equation is false."""
    import re
    for i, step in enumerate(steps):
        for a, op, b, c in re.findall(r"(\d+) ([+*]) (\d+) = (\d+)", step):
            if int(c) != (int(a) + int(b) if op == "+" else int(a) * int(b)):
                return i
    return None


JUDGE = f"{__name__}:exact_judge"


def test_localize_cuts_at_the_label_of_the_wrong_step(tmp_path, capsys):
    """prefix + rejected begin the attempt verbatim; prefix ends "Step k:"; fields of the problem are carried along; the
    funnel is printed."""
    file = write(tmp_path / "a.jsonl", attempt(), attempt(BAD, sample=1), attempt(LATE, sample=2),
                 attempt(BAD, id="p2"), attempt(LATE, id="p3", stop_reason="length"))
    assert run("localize", file, "--judge", JUDGE, "--out", tmp_path / "e.jsonl") == 0
    first, second = read(tmp_path / "e.jsonl")
    assert first == {
        "id": "p1#1", "question": "Twice 3 + 4?", "answer": "14", "level": 2,
        "prefix": "Let's think step by step.\nStep 1:", "rejected": " 3 + 4 = 8.",
        "full_rejected": " 3 + 4 = 8.\nStep 2: 8 * 2 = 16.\nThe answer is: 16", "step": 1
    }
    assert second["prefix"].endswith("7.\nStep 2:") and second["step"] == 2
    assert second["rejected"] == " 7 * 2 = 15.\nThe answer is: 15"
    out = capsys.readouterr().out.split("\n")
    for line in ("3  problems", "5  attempts", "4  wrong", "1      cut off", "1      the same error again",
                 "2  located"):
        assert any(line in printed for printed in out), line
    assert not list(tmp_path.glob("*.verdicts")) and not list(tmp_path.glob("*.tmp"))


def test_localize_by_values(tmp_path):
    rows = [
        attempt(LATE) | {"steps": split_steps(LATE), "values": [[7, 8], [0, 8]]},
        attempt(BAD, id="p2") | {"steps": split_steps(BAD), "values": [[0, 8], [0, 8]], "agreement": [[0, 3, 8], None]}
    ]
    assert run("localize", write(tmp_path / "v.jsonl", *rows), "--judge", "values", "--out", tmp_path / "e.jsonl") == 0
    assert [row["step"] for row in read(tmp_path / "e.jsonl")] == [2, 1]


def test_bad_rows_are_named_and_the_rest_goes_on(tmp_path, capsys):
    """A broken line, a missing field, no answer, a row twice, steps that are not the text: each named with its line;
    exit status 1."""
    no_question = {key: value for key, value in attempt(BAD).items() if key != "question"}
    file = write(tmp_path / "a.jsonl", "{broken", no_question, attempt(BAD, answer=" "), attempt(BAD), attempt(BAD),
                 attempt(BAD, id="p2", steps=["x"]), attempt(BAD, id=None), attempt(BAD, id="p3", correct="no"),
                 attempt(LATE, id="p4", prefix=5))
    assert run("localize", file, "--judge", JUDGE, "--out", tmp_path / "e.jsonl") == 1
    errors = capsys.readouterr().err
    for line, found in ((1, "malformed"), (2, "'question'"), (3, "'answer': empty"), (5, "stands in"), (6, "'steps'"),
                        (7, "'id'"), (8, "'correct'"), (9, "'prefix'")):
        assert any(f"a.jsonl:{line}: " in text and found in text for text in errors.split("\n")), (line, found)
    assert len(read(tmp_path / "e.jsonl")) == 1


class Dice:
    """In place of a checkpoint: a model of which every second sample is right."""
    settings: dict = {}

    def __init__(self, folder, **_):
        pass

    def prepare(self, problem, text, cut=None):
        return ev.Prompt(problem.question, text, False)

    def batches(self, prompts, n):
        return [list(range(len(prompts)))]

    def draw(self, prompts, n, seed, temperature, **_):
        yield from ((i, j, ev.Drawn(BAD if j % 2 else GOOD, 3, "eos")) for i in range(len(prompts)) for j in range(n))


def sample(file, out, *more):
    return ev.main(["--model", "dice", "--problems", str(file), "--out", str(out), "--temperature", "1", *more])


@pytest.mark.parametrize("name, ids, made", [
    ("idx", [0, 1, 0, 1, 0], ["0", "1", "0~2", "1~2", "0~3"]), ("id", ["a", "a~2", "a"], ["a", "a~2", "a~3"]),
    ("id", ["a", "a", "a~2"], ["a", "a~2", "a~2~2"]), ("id", ["2", None, "1"], ["2", "2~2", "1"])])
def test_ids_that_repeat_are_told_before_anything_is_sampled(tmp_path, monkeypatch, capsys, name, ids, made):
    """Two sets in one file, both numbered from 0: every sample of both can be used; and the same command continues."""
    monkeypatch.setattr(ev, "Sampler", Dice)
    rows = [{name: id, "question": f"Twice 3 + 4? {i}", "answer": "14"} for i, id in enumerate(ids)]
    file = write(tmp_path / "q.jsonl", *rows)
    assert sample(file, tmp_path / "a.jsonl", "--samples", "4") == 0
    told = capsys.readouterr().err
    place = next(i for i, (id, new) in enumerate(zip(ids, made), 1) if new != str(id))
    assert f"q.jsonl:{place}: id " in told and "stands in " in told and f"here it becomes {made[place - 1]!r}" in told
    assert [str(row["id"]) for row in read(tmp_path / "a.jsonl")[::4]] == made
    assert run("localize", tmp_path / "a.jsonl", "--judge", JUDGE, "--out", tmp_path / "e.jsonl") == 0
    assert f"{len(ids)}  problems" in (out := capsys.readouterr().out) and f"{4 * len(ids)}  attempts" in out
    assert [row["id"] for row in read(tmp_path / "e.jsonl")] == [f"{id}#1" for id in made]
    assert sample(file, tmp_path / "a.jsonl", "--samples", "4") == 0 and "already complete" in capsys.readouterr().out


def test_shards_of_a_hub_set_do_not_share_ids():
    shards = [ev.read_problem(f"s-0000{i}.parquet:row 1", {"question": "?", "answer": "1"}) for i in range(3)]
    assert len(ev.make_distinct(shards)) == 2 and [shard.id for shard in shards] == [1, "1~2", "1~3"]


def rollout_attempts(file):
    items = ev.read_file(ev.arguments().parse_args(["--problems", file, "--out", "o", "--rollouts", "8"]), bad := [])
    return [problem for problem, _ in items], bad


def test_attempts_at_a_problem_share_its_id(tmp_path, capsys):
    """Samples of one id are left as they are; attempts of two merged runs, which share the samples as well, and attempts
    with an id that localize does not read, get ids of their own, which are written."""
    file = write(tmp_path / "a.jsonl", *(attempt(BAD, sample=i) for i in range(3)))
    assert [problem.id for problem in rollout_attempts(file)[0]] == ["p1"] * 3 and not capsys.readouterr().err
    file = write(tmp_path / "b.jsonl", *2 * [attempt(BAD), attempt(LATE, sample=1)], attempt(BAD, id=None), attempt(BAD, sample="x"))
    problems, bad = rollout_attempts(file)
    told = capsys.readouterr().err.splitlines()
    assert [problem.carried["id"] for problem in problems] == [problem.id for problem in problems] == ["p1", "p1", "p1~2", "p1~2", 5]
    assert f"{file}:3: id 'p1' stands in {file}:1 already" in told[0] and "1 more rows likewise" in told[1] and len(told) == 2
    assert [f"{file}:6: field 'sample': found 'x'" in str(error) for error in bad] == [True]


def test_attempts_without_an_end_cost_no_rollouts(tmp_path, capsys):
    """What localize does not judge is not sampled from; how many, is said."""
    rows = [attempt(BAD), attempt(BAD, sample=1, stop_reason="length"), attempt(GOOD, sample=2, stop_reason="length")]
    file = write(tmp_path / "a.jsonl", *rows)
    assert [problem.carried["sample"] for problem in rollout_attempts(file)[0]] == [0]
    assert f"{file}: 1 of 2 wrong attempts were cut off by the length limit" in capsys.readouterr().err
    with pytest.raises(DataError, match="holds no wrong attempt that can be used"):
        rollout_attempts(write(tmp_path / "b.jsonl", rows[1]))
    assert "1 of 1 wrong attempts were cut off" in capsys.readouterr().err


# what a parquet file can hold and JSON cannot
ODD = {"created": datetime(2024, 1, 1), "image": b"\x89PNG", "price": Decimal("1.5"), "level": float("nan"), "all": [{"day": datetime(2024, 1, 1)}]}


def test_columns_of_a_parquet_that_nobody_uses(tmp_path, monkeypatch, capsys):
    """Dates, bytes, decimals and NaNs beside the used columns stop neither sampling nor localizing; in a used column each
    is a named error."""
    rows = [attempt(BAD) | ODD, attempt(BAD, sample=1) | {"question": b"?"}, attempt(BAD, id=datetime(2024, 1, 1))]
    monkeypatch.setattr(data, "_read_parquet", lambda path: ((f"{path}:row {i}", row) for i, row in enumerate(rows, 1)))
    monkeypatch.setattr(ev, "Sampler", Dice)
    (file := tmp_path / "a.parquet").write_bytes(b"")
    assert run("localize", file, "--judge", JUDGE, "--out", tmp_path / "e.jsonl") == 1
    assert not ODD.keys() & read(tmp_path / "e.jsonl")[0].keys()
    told = capsys.readouterr().err
    assert "row 2: field 'question': found bytes " in told and "row 3: fields 'id', 'sample': found " in told
    assert sample(file, tmp_path / "v.jsonl", "--rollouts", "2", "--every_step") == 1
    valued = read(tmp_path / "v.jsonl")
    assert not ODD.keys() & valued[0].keys() and [row["id"] for row in valued] == ["p1", 3]
    rows[:] = [{"question": "?", "answer": "14"} | ODD, {"question": "?", "answer": Decimal(14)}, {"question": datetime(2024, 1, 1), "answer": "1"}]
    capsys.readouterr()
    assert sample(file, tmp_path / "s.jsonl") == 1
    told = capsys.readouterr().err
    assert "row 2: field 'answer': found Decimal " in told and "row 3: field 'question': found datetime " in told
    assert not ODD.keys() & read(tmp_path / "s.jsonl")[0].keys()


@pytest.mark.parametrize("arguments, found",
                         [(["--judge", "nonsense"], "expected values, endpoint"),
                          (["--judge", "no_such_module:f"], "no_such_module"),
                          (["--judge", f"{__name__}:nothing"], "nothing"), (["--judge", "endpoint"], "--api_model"),
                          (["--judge", "endpoint", "--endpoint", "file:///etc/passwd", "--api_model", "m"], "http://")])
def test_a_judge_that_is_none(tmp_path, capsys, arguments, found):
    file = write(tmp_path / "a.jsonl", attempt(BAD))
    assert run("localize", file, *arguments, "--out", tmp_path / "e.jsonl") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and found in error and error.count("\n") == 1
    assert not (tmp_path / "e.jsonl").exists()


def failing_judge(question, steps, answer):
    if "8" in steps[0]:
        raise RuntimeError("boom")
    return exact_judge(question, steps, answer)


def wrong_judge(question, steps, answer):
    return 99


def test_a_checker_that_fails_is_named(tmp_path, capsys):
    """The user's own function raises, or answers nonsense: the row is named, the others go on, nothing half-finished is
    passed on as whole."""
    file = write(tmp_path / "a.jsonl", attempt(BAD), attempt(LATE, id="p2"))
    assert run("localize", file, "--judge", f"{__name__}:failing_judge", "--out", tmp_path / "e.jsonl") == 1
    assert "a.jsonl:1: " in (error := capsys.readouterr().err) and "RuntimeError: boom" in error
    assert [row["id"] for row in read(tmp_path / "e.jsonl")] == ["p2#0"]
    assert run("localize", file, "--judge", f"{__name__}:wrong_judge", "--out", tmp_path / "f.jsonl") == 2
    assert "returned '99' for 2 steps" in capsys.readouterr().err


def test_a_person_can_stop_and_go_on(tmp_path, monkeypatch, capsys):
    """`ask`: what was decided before quitting is not asked again, and the final file is as if decided in one go."""
    file = write(tmp_path / "a.jsonl", attempt(BAD), attempt(LATE, id="p2"), attempt(BAD, id="p3"))
    def answer(keys):
        keys = iter(keys)
        monkeypatch.setattr("builtins.input", lambda prompt: next(keys))
        return run("localize", file, "--judge", "ask", "--out", tmp_path / "e.jsonl")
    assert answer(["x", "i", "c", "q"]) == 1 and not (tmp_path / "e.jsonl").exists()
    assert answer(["c", "i", "s"]) == 0
    assert [(row["id"], row["step"]) for row in read(tmp_path / "e.jsonl")] == [("p1#0", 1), ("p2#0", 2)]
    assert "1      skipped by the person asked" in capsys.readouterr().out


def test_a_journal_of_another_command_is_not_continued(tmp_path, capsys):
    """Verdicts are kept with the input and judge that they belong to; a torn last line (a kill while writing) is
    forgotten, not fatal."""
    file, out = write(tmp_path / "a.jsonl", attempt(BAD)), str(tmp_path / "e.jsonl")
    (tmp_path / "e.jsonl.verdicts").write_text('{"input": "other"}\n')
    assert run("localize", file, "--judge", JUDGE, "--out", out) == 2
    assert "e.jsonl.verdicts" in capsys.readouterr().err
    with data.Journal(tmp_path / "j", {"a": (1, 2)}) as journal:
        journal.add(("p", 0), 3)
        journal.file.write('[["p", 1], ')
    with data.Journal(tmp_path / "j", {"a": (1, 2)}) as again:
        assert again.done == {("p", 0): 3}
        again.add(("p", 1), None)
    assert data.Journal(tmp_path / "j", {"a": (1, 2)}).done == {("p", 0): 3, ("p", 1): None}


# -------------------------------------------------------------------------------------------------- a stage of one's own

def squares(out, upto=6, *, restart=False, killed_after=99, fails=(), drop=()):
    """A data-making command of a few lines: the squares below `upto`, shared by all processes. Returns what was worked on."""
    worked = []

    def work(journal, rank, world):
        for i in range(rank, upto, world):
            if (i,) in journal.done:
                continue
            if len(worked) == killed_after:
                raise KeyboardInterrupt
            worked.append(i)
            if i in fails:
                journal.failed.append(DataError(f"row {i}: no"))
            else:
                journal.add((i,), i * i)

    def collect(done):
        rows = [{"i": i, "square": done[i,]} for i in range(upto) if (i,) in done and i not in drop]
        return rows, {"sum": sum(row["square"] for row in rows)}
    made = data.stage(out, {"upto": upto, "range": (0, upto)}, work, collect, restart)
    return worked if made else None


@pytest.mark.parametrize("after", range(7))
def test_a_stage_killed_and_continued(tmp_path, after):
    """Nothing is done twice, and the bytes are those of an undisturbed run; complete, it does nothing more."""
    squares(tmp_path / "whole.jsonl")
    out = tmp_path / "o.jsonl"
    try:
        begun = squares(out, killed_after=after) or []
        assert after == 6
    except KeyboardInterrupt:
        begun = list(range(after))
        with (tmp_path / "o.jsonl.journal-0").open("ab") as journal:
            journal.write(b'[[5], 2')                   # the line that was being written
        assert not out.exists() and squares(out) == [i for i in range(6) if i not in begun]
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes() and squares(out) is None
    assert json.loads((tmp_path / "o.summary.json").read_text())["sum"] == 55
    assert sorted(path.name for path in tmp_path.glob("o.*")) == ["o.jsonl", "o.summary.json"]


def test_a_stage_of_other_settings(tmp_path):
    """Refused by name, whether it was finished or not; begun anew on request."""
    out = tmp_path / "o.jsonl"
    with pytest.raises(KeyboardInterrupt):
        squares(out, killed_after=2)
    for _ in range(2):
        with pytest.raises(DataError, match="upto was 6, is 5; .*--restart"):
            squares(out, 5)
        if not out.exists():
            squares(out)
    assert squares(out, 5, restart=True) == [0, 1, 2, 3, 4] and len(read(out)) == 5
    (tmp_path / "o.summary.json").unlink()
    with pytest.raises(DataError, match="without o.summary.json that would say how it was made"):
        squares(out, 5)


def test_what_failed_is_tried_again(tmp_path):
    """The rows that there are, are written, but the stage is not complete: the same call makes the missing ones."""
    out = tmp_path / "o.jsonl"
    assert squares(out, fails=[1, 4]) == list(range(6)) and [row["i"] for row in read(out)] == [0, 2, 3, 5]
    assert json.loads((tmp_path / "o.summary.json").read_text())["failed"] == 2
    assert squares(out, fails=[4]) == [1, 4] and squares(out) == [4] and squares(out) is None
    assert [row["square"] for row in read(out)] == [0, 1, 4, 9, 16, 25]


def test_a_stage_without_rows_leaves_no_out(tmp_path):
    with pytest.raises(DataError, match="no row came of it, so it is not written; the first of 6 that failed: row 0"):
        squares(tmp_path / "o.jsonl", fails=range(6))
    assert not list(tmp_path.iterdir())
    for _ in range(2):                                  # what was paid for is kept, and is not done again
        with pytest.raises(DataError, match="no row came of it"):
            squares(tmp_path / "o.jsonl", drop=range(6))
        assert [path.name for path in tmp_path.iterdir()] == ["o.jsonl.journal-0"]


def test_two_processes_share_a_stage(processes, tmp_path):
    """Each does its share, process 0 writes, and both go on only when the file is there."""
    (script := tmp_path / "program.py").write_text(
        "import sys\nsys.path.insert(0, sys.argv[2])\nimport os\nfrom test_pipeline import squares\n"
        "from model import leave_processes\n"
        "for name in 'ab':\n"
        "    worked = squares(sys.argv[1] + '/' + name + '.jsonl')\n"
        "    assert worked == list(range(int(os.environ['RANK']), 6, 2)) and os.path.exists(sys.argv[1] + '/' + name + '.jsonl')\n"
        "    assert squares(sys.argv[1] + '/' + name + '.jsonl') is None\n"
        "leave_processes(0)\n")
    processes.run(script, tmp_path, Path(__file__).parent, world=2)
    squares(tmp_path / "one.jsonl")
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes() == (tmp_path / "one.jsonl").read_bytes()


def test_two_localize_into_one_out(tmp_path, capsys):
    """The second says who holds it, and writes nothing."""
    file, out = write(tmp_path / "a.jsonl", attempt(BAD)), tmp_path / "e.jsonl"
    with locked(out):
        assert run("localize", file, "--judge", JUDGE, "--out", out) == 2
    assert f"is being written by process {os.getpid()} on " in capsys.readouterr().err and not out.exists()
    assert run("localize", file, "--judge", JUDGE, "--out", tmp_path) == 2 and "is a folder" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------------------- pairs

ERROR = {
    "prefix": "Let's think step by step.\nStep 1:", "rejected": " 3 + 4 = 8.",
    "full_rejected": " 3 + 4 = 8.\nStep 2: 8 * 2 = 16.\nThe answer is: 16", "step": 1
}


def rectified(first, sample, id="p1#1", rest="\nStep 2: 7 * 2 = 14.\nThe answer is: 14", **more):
    return attempt(first + rest, id=id, sample=sample) | ERROR | more


def test_pairs_are_the_distinct_first_steps_that_lead_to_the_answer(tmp_path, capsys):
    rows = [
        rectified(" 3 + 4 = 7.", 0),
        rectified(" 4 + 3 = 7.", 1),
        rectified("  3 + 4 =  7.", 2),
        rectified(" 3 + 4 = 9.", 3, rest="\nStep 2: 18"),
        rectified(" 3 + 4 = 8.", 4),
        rectified(" 7.", 5, stop_reason="length"),
        rectified("", 6),
        rectified(" 3 + 4 = 7.", 0, id="p2#0")
    ]
    assert run("pairs", write(tmp_path / "r.jsonl", *rows), "--out", tmp_path / "p.jsonl") == 0
    first, second, third = read(tmp_path / "p.jsonl")
    assert first == {
        "dataset": "", "prompt": "Twice 3 + 4?", "initial_reason_steps": ERROR["prefix"], "chosen": " 3 + 4 = 7.",
        "rejected": " 3 + 4 = 8.", "full_chosen": " 3 + 4 = 7.\nStep 2: 7 * 2 = 14.\nThe answer is: 14",
        "full_rejected": ERROR["full_rejected"], "answer": "14"
    }
    assert (second["chosen"], third["chosen"]) == (" 4 + 3 = 7.", " 3 + 4 = 7.")
    out = capsys.readouterr().out
    for line in ("2  located errors", "8  continuations", "7  right", "1      the same first step again",
                 "1      the first step is the rejected one", "1      cut off", "1      the first step is empty",
                 "3  pairs"):
        assert line in out
    assert run("pairs", tmp_path / "r.jsonl", "--out", tmp_path / "q.jsonl", "--per_error", "1", "--dataset",
               "toy") == 0
    assert [(row["chosen"], row["dataset"]) for row in read(tmp_path / "q.jsonl")] == [(" 3 + 4 = 7.", "toy")] * 2


def test_verify_drops_steps_that_only_seem_right(tmp_path, capsys):
    """The right answer can be reached through a wrong step (two errors that cancel): the paper's last filter, by any
    judge. An error that only comes after the chosen step is no reason."""
    rows = [rectified(" 3 + 4 = 7.", 0, rest="\nStep 2: 7 * 2 = 15.\nStep 3: So 14.\nThe answer is: 14"),
            rectified(" 3 + 4 = 10.", 1, rest="\nStep 2: 10 + 4 = 14.\nThe answer is: 14")]
    file = write(tmp_path / "r.jsonl", *rows)
    assert run("pairs", file, "--verify", JUDGE, "--out", tmp_path / "p.jsonl") == 0
    assert [row["chosen"] for row in read(tmp_path / "p.jsonl")] == [" 3 + 4 = 7."]
    assert "1      not verified by the judge" in capsys.readouterr().out


def test_a_person_who_verifies_may_go_home(tmp_path, monkeypatch, capsys):
    """[q]uit in `pairs --verify ask`: what was decided is kept, nothing is written, and it is no traceback."""
    file = write(tmp_path / "r.jsonl", {
        "id": "p#0", "sample": 0, "question": "Twice 3 + 4?", "answer": "14", "prefix": "Step 1:", "correct": True,
        "rejected": " 3 + 4 = 8.", "full_rejected": " 3 + 4 = 8.", "stop_reason": "eos",
        "completion": " 3 + 4 = 7.\nStep 2: 2 * 7 = 14.\nThe answer is: 14"})
    monkeypatch.setattr("builtins.input", lambda prompt: "q")
    assert run("pairs", file, "--verify", "ask", "--out", tmp_path / "p.jsonl") == 1
    assert "the same command goes on" in capsys.readouterr().err and not (tmp_path / "p.jsonl").exists()


def test_whole_pairs_are_independent_answers(tmp_path, capsys):
    """--whole: the i-th distinct right answer against the i-th distinct wrong one, of one problem; cut-off ones, whose
    end is no end, left out."""
    other = GOOD.replace("3 + 4", "4 + 3")
    rows = [
        attempt(GOOD, sample=0),
        attempt(BAD, sample=1),
        attempt(LATE, sample=2),
        attempt(other, sample=3),
        attempt(GOOD, sample=4),
        attempt(BAD, id="p2"),
        attempt(GOOD, id="p3"),
        attempt(BAD[:-9], id="p3", sample=1, stop_reason="length")
    ]
    file = write(tmp_path / "a.jsonl", *rows)
    assert run("pairs", file, "--whole", "--out", tmp_path / "p.jsonl") == 0
    assert [(row["full_chosen"], row["full_rejected"], row["initial_reason_steps"])
            for row in read(tmp_path / "p.jsonl")] == [(GOOD, BAD, ""), (other, LATE, "")]
    assert run("pairs", file, "--whole", "--per_error", "1", "--out", tmp_path / "q.jsonl") == 0
    assert len(read(tmp_path / "q.jsonl")) == 1
    assert "1  problems with right and wrong answers" in capsys.readouterr().out


def test_pairs_from_the_wrong_file(tmp_path, capsys):
    """Plain attempts given where rectified ones belong, and a step that is not the beginning of what follows it: named,
    nothing written."""
    file = write(tmp_path / "r.jsonl", rectified(" 7.", 1, rejected=" something else"), attempt())
    assert run("pairs", file, "--out", tmp_path / "p.jsonl") == 2
    error = capsys.readouterr().err
    for found in ("r.jsonl:1: field 'rejected': is not the beginning", "r.jsonl:2: field 'rejected': not there",
                  "error: "):
        assert found in error
    assert not (tmp_path / "p.jsonl").exists()


def test_from_attempts_to_tokens(tmp_path):
    """The stages fit together: localize -> (continuations) -> pairs -> encode_dataset gives trainable rows for all
    three methods."""
    import test_data
    tokenizer = data.Tokenizer.from_pretrained(test_data.write_tokenizer(tmp_path / "m"))
    assert run("localize", write(tmp_path / "a.jsonl", attempt(LATE)), "--judge", JUDGE, "--out",
               tmp_path / "e.jsonl") == 0
    error, = read(tmp_path / "e.jsonl")
    write(tmp_path / "r.jsonl",
          error | attempt(" 7 * 2 = 14.\nThe answer is: 14", id=error["id"]) | {"prefix": error["prefix"]})
    assert run("pairs", tmp_path / "r.jsonl", "--out", tmp_path / "p.jsonl") == 0
    for method in data.METHODS:
        (example,), _ = data.encode_dataset(tmp_path / "p.jsonl", tokenizer, method, "alpaca", 1024)
        text = tokenizer.decode(example.chosen[example.start:].tolist())
        assert text == (" 7 * 2 = 14.\nThe answer is: 14" if method == "stepdpo" else GOOD + "</s>")


def test_show_prints_a_solution_with_its_steps(tmp_path, capsys):
    counts = {"values": [[3, 8], None], "agreement": [None, [2, 3, 8]]}
    file = write(tmp_path / "v.jsonl", attempt(), attempt(BAD, id="p2") | counts)
    assert run("show", "--data", file, "--row", "2") == 0
    out = capsys.readouterr().out
    for part in ("2 steps", "step 1; from its end 3 of 8 rollouts", "2 of the 3 that succeed from before it take it",
                 "Step 2: 8 * 2 = 16.", "right answer '14'"):
        assert part in out
