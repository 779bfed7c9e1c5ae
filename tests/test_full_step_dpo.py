"""variants/full_step_dpo.py: groups of K responses, a score for every step, the released surrogate and the weights inside DPO's log-sigmoid.

(The released code's own numbers: tests/test_siblings.py.)"""
import json
import math

import pytest
import torch
from conftest import ROOT, tiny_checkpoint, write_rows

import data
import stepdpo
from model import Llama
from variants import full_step_dpo as full

COMMON = ["--prompt", "alpaca", "--device", "cpu", "--batch_size", "4", "--lr", "1e-3"]


def answer(a: int, b: int, *slips: int) -> str:
    """Two steps and a last line; each may be off."""
    first, second = a + b + slips[0], 2 * (a + b) + slips[1]
    return f"Let's think step by step.\nStep 1: {a} + {b} = {first}.\nStep 2: Twice that is {second}.{' Yes.' * slips[1]}\nThe answer is: {second}"


def group_rows(n: int) -> list[dict]:
    """Groups of 3 and 4 responses of uneven lengths, some with equal rewards among them; a score of exactly 0 among the scores."""
    rows = []
    for i in range(n):
        slips = [(0, 0), (0, 1), (1, 2), (2, 3)][:3 + i % 2]
        rows.append({"prompt": f"Twice {i} + 3?", "responses": [answer(i, 3, *s) for s in slips], "rewards": [1.0, 0.5, 0.0, 0.0][:len(slips)],
                     "rewards_list": [[0.9, 0.8], [0.9, 0.2], [0.4, 0.0], [0.3, 0.1]][:len(slips)], "answer": str(2 * (i + 3))})
    return rows


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("full")
    tiny_checkpoint(folder / "model")
    write_rows(folder / "groups.jsonl", group_rows(10))
    return folder


def training(work, out, *more, file="groups.jsonl") -> list[str]:
    return ["dpo", "--model", str(work / "model"), "--data", str(work / file), "--out", str(out), *COMMON, *more]


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def flat(*responses):
    """Which response each token is of, for responses of so many tokens."""
    return torch.repeat_interleave(torch.arange(len(responses)), torch.tensor(responses))


# --------------------------------------------------------------------------------------------------------------- the losses

def test_without_kappa_and_tau_it_is_an_averaged_dpo_gradient():
    """kappa = tau = 0: -0.5 G / n on each of a winner's n tokens, +0.5 G / n on a loser's; at step 0 G = 1/2. In DPO it would be -beta G on each."""
    torch.manual_seed(0)
    policy, reference, response = torch.randn(9).double().requires_grad_(), torch.randn(9).double(), flat(4, 5)
    above = torch.tensor([[False, True], [False, False]])
    for ref, G in ((policy.detach(), 0.5), (reference, None)):
        policy.grad = None
        full.surrogate_loss(policy, ref, response, torch.rand(9).double(), above, 0.3, 0.0, 0.0).sum().backward()
        rho = 0.3 * torch.stack([(policy - ref)[:4].sum(), (policy - ref)[4:].sum()]).detach()
        G = G or torch.sigmoid(rho[1] - rho[0]).item()
        torch.testing.assert_close(policy.grad, torch.tensor([-0.5 * G / 4] * 4 + [0.5 * G / 5] * 5).double())


def test_scores_share_the_gradient_out():
    """At step 0 a winner's tokens get exp(tau w) of it, a loser's exp(-tau w), and all of a response together half of G."""
    scores, response = torch.tensor([0.9, 0.9, 0.2, 0.1, 0.8, 0.8]), flat(3, 3)
    policy = torch.zeros(6, requires_grad=True)
    full.surrogate_loss(policy, policy.detach(), response, scores, torch.tensor([[False, True], [False, False]]), 0.05, 1.0, 2.0).sum().backward()
    g = policy.grad
    assert g[:3].sum().item() == pytest.approx(-0.25) and g[3:].sum().item() == pytest.approx(0.25)
    assert (g[0] / g[2]).item() == pytest.approx(math.exp(2 * 0.7)) and (g[3] / g[4]).item() == pytest.approx(math.exp(2 * 0.7))


def test_tokens_that_have_moved_are_damped():
    """kappa: a winner's token that is already likelier than under the reference gets sigmoid(-kappa D) of its share."""
    policy, reference = torch.tensor([1.0, 0.0, -0.5], requires_grad=True), torch.zeros(3)
    full.surrogate_loss(policy, reference, flat(2, 1), torch.zeros(3), torch.tensor([[False, True], [False, False]]), 0.05, 3.0, 0.5).sum().backward()
    assert (policy.grad[0] / policy.grad[1]).item() == pytest.approx((1 / (1 + math.exp(3.0))) / 0.5)


def test_a_score_of_0_and_the_end_token_are_trained_unless_as_released():
    scores, response = torch.tensor([0.7, 0.7, 0.0, 0.0, 0.5, 0.5]), flat(4, 2)
    above = torch.tensor([[False, True], [False, False]])
    for trained, zero in ((None, []), (full.as_released(scores, response), [2, 3, 5])):
        policy = torch.zeros(6, requires_grad=True)
        full.surrogate_loss(policy, policy.detach(), response, scores, above, 0.05, 1.0, 0.5, trained).sum().backward()
        assert (policy.grad == 0).nonzero()[:, 0].tolist() == zero


def test_large_scores_do_not_overflow():
    """tau * w of a thousand: the softmax stays a softmax."""
    u = full.softmax_within(torch.tensor([1000.0, 999.0, -1000.0, 5.0]), flat(3, 1), 2)
    torch.testing.assert_close(u, torch.tensor([1 / (1 + math.exp(-1)), 1 / (1 + math.e), 0.0, 1.0]))


def test_weights_inside_the_log_sigmoid_by_hand():
    """n softmax(tau w) over the steps of the winner, n softmax(-tau w) over those of the loser; with tau = 0 plain DPO."""
    policy, reference = torch.tensor([0.1, 0.3, -0.2, 0.5, 0.4]).double(), torch.zeros(5).double()
    response, step = flat(3, 2), torch.tensor([0, 0, 1, 0, 1])
    scores, above = torch.tensor([0.9, 0.9, 0.1, 0.6, 0.2]).double(), torch.tensor([[False, True], [False, False]])
    got = full.weighted_dpo_loss(policy, reference, response, scores, step, above, 0.5, 2.0)
    a, c = 2 / (1 + math.exp(2 * (0.1 - 0.9))), 2 / (1 + math.exp(-2 * (0.2 - 0.6)))       # n = 2: of step 0
    win, lose = 0.5 * (a * 0.4 + (2 - a) * -0.2), 0.5 * (c * 0.5 + (2 - c) * 0.4)
    assert got[0, 1].item() == pytest.approx(math.log(1 + math.exp(lose - win))) and got.sum() == got[0, 1]
    plain = full.weighted_dpo_loss(policy, reference, response, scores, step, above, 0.5, 0.0)[0, 1]
    zero = torch.zeros(1).double()
    dpo, _, _ = stepdpo.dpo_loss(policy[:3].sum()[None], policy[3:].sum()[None], zero, zero, 0.5)
    assert plain.item() == pytest.approx(dpo.item(), abs=1e-12)


@pytest.mark.parametrize("loss", ["surrogate", "weighted_dpo"])
def test_the_twin(work, tmp_path, loss):
    """Loss and gradient of every weight for two groups as one tree, against loops over single responses of the plain model, their steps found by hand."""
    args = full.stepdpo.parser(full.options, "", full.DEFAULTS).parse_args(
        training(work, tmp_path, "--loss", loss, "--tau", "1.5", "--beta", "0.7", *(["--kappa", "0.8"] if loss == "surrogate" else [])))
    tokenizer, rows = data.Tokenizer.from_pretrained(work / "model"), group_rows(2)
    examples, _ = full.encode(work / "groups.jsonl", tokenizer, "dpo", "alpaca", 512)
    batch = data.collate(examples, [0, 1])
    model, reference = Llama.from_pretrained(work / "model"), Llama.from_pretrained(work / "model")
    with torch.no_grad():
        for p in reference.parameters():
            p.add_(0.01 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    policy = stepdpo.Policy(model)
    losses, _ = full.full_step_objective(policy(batch), stepdpo.Policy(reference)(batch).detach(), batch, args)
    losses.sum().backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters()}

    def logps(net, row, response):
        prompt = data.render_prompt("alpaca", row["prompt"], tokenizer)
        ids = tokenizer.encode(prompt + response).ids + [tokenizer.eos_id]
        table = net(torch.tensor([ids]))[0, :-1].log_softmax(-1).gather(1, torch.tensor(ids)[1:, None])[:, 0]
        return table[len(tokenizer.encode(prompt).ids) - 1:]

    def plain(row):
        parts, pairs = [], []
        for response, scores in zip(row["responses"], row["rewards_list"]):
            of_token = [scores[i >= response.index("\nStep 2:")] for i in range(len(response))] + [scores[1]]      # bytes; the end token
            parts.append((logps(model, row, response), logps(reference, row, response).detach(), torch.tensor(of_token)))
        for i, j in ((i, j) for i in range(len(parts)) for j in range(len(parts)) if row["rewards"][i] > row["rewards"][j]):
            sides = []
            for (p, r, w), sign in ((parts[i], 1), (parts[j], -1)):
                if loss == "surrogate":
                    d = (p - r).detach()
                    sides.append((0.7 * d.sum(), ((sign * 1.5 * w).softmax(0) * torch.sigmoid(-sign * 0.8 * d) * p).sum()))
                else:
                    first, (x, y) = w == w[0], (sign * 1.5 * torch.stack([w[0], w[-1]])).softmax(0)
                    sides.append(0.7 * 2 * (x * (p - r)[first].sum() + y * (p - r)[~first].sum()))
            if loss == "surrogate":
                (rho_i, win), (rho_j, lose) = sides
                pairs.append(-torch.sigmoid(rho_j - rho_i) * (win - lose))
            else:
                pairs.append(-torch.nn.functional.logsigmoid(sides[0] - sides[1]))
        return torch.stack(pairs).mean()

    model.zero_grad()
    expected = torch.stack([plain(row) for row in rows])
    expected.sum().backward()
    torch.testing.assert_close(losses, expected, atol=1e-5, rtol=1e-5)
    for name, p in model.named_parameters():
        torch.testing.assert_close(ours[name], p.grad, atol=1e-5, rtol=1e-3)


# ------------------------------------------------------------------------------------------------------------- in the loop

def test_the_log_begins_at_dpos_0_6931_and_says_that_loss_is_none(work, tmp_path, capsys):
    """Margin 0 and dpo_loss log 2 at step 0; a header on what `loss` is. After some updates the winners are ahead."""
    assert full.main(training(work, tmp_path / "out", "--epochs", "8", "--beta", "0.3")) == 0
    said = capsys.readouterr().out
    assert said.startswith("`loss` is a surrogate, no log-sigmoid: it may be negative")
    first, *_, last = lines(tmp_path / "out" / "metrics.jsonl")
    assert first["dpo_loss"] == pytest.approx(math.log(2), abs=1e-6) and abs(first["margin"]) < 1e-5
    assert last["margin"] > 0.5 and last["accuracy"] > 0.9 and last["dpo_loss"] < 0.6
    assert full.main(training(work, tmp_path / "w", "--loss", "weighted_dpo", "--tau", "0", "--max_steps", "2")) == 0
    assert "surrogate" not in capsys.readouterr().out
    for line in lines(tmp_path / "w" / "metrics.jsonl"):
        assert line["loss"] == pytest.approx(line["dpo_loss"], abs=1e-5)


@pytest.mark.parametrize("more, world", [(["--micro_batch_size", "1"], 1), ([], 2), (["--shard"], 2)])
def test_however_the_batch_is_cut(processes, work, tmp_path, more, world):
    """One micro-batch or many, one process, two, or a sharded model: the same losses and margins."""
    argv = ["--max_steps", "3", *more]
    assert full.main(training(work, tmp_path / "one", "--max_steps", "3")) == 0
    processes.run(ROOT / "variants" / "full_step_dpo.py", *training(work, tmp_path / "other", *argv), world=world)
    for one, other in zip(lines(tmp_path / "one" / "metrics.jsonl"), lines(tmp_path / "other" / "metrics.jsonl")):
        for name in ("loss", "margin", "dpo_loss", "accuracy", "chosen_reward"):
            assert other[name] == pytest.approx(one[name], abs=2e-5)


def test_another_tau_is_another_run(work, tmp_path, capsys):
    """Its own settings and the rows' scores are in the identity of a run."""
    go = lambda *more, **file: full.main(training(work, tmp_path / "out", "--max_steps", "1", *more, **file))
    assert go() == 0 and go() == 0 and "is complete" in capsys.readouterr().out
    assert go("--tau", "0.7") == 2 and "tau: 0.5 then, 0.7 now" in capsys.readouterr().err
    rows = group_rows(10)
    rows[0]["rewards_list"][0][0] = 0.95
    write_rows(work / "other.jsonl", rows)
    assert go(file="other.jsonl") == 2 and "data: " in capsys.readouterr().err


@pytest.mark.parametrize("method, more, said", [("dpo", ["--loss", "weighted_dpo", "--as_released"], "are of the surrogate loss"),
                                                ("dpo", ["--loss", "weighted_dpo", "--kappa", "2"], "are of the surrogate loss"),
                                                ("stepdpo", [], "run it as dpo, not stepdpo"), ("sft", [], "run it as dpo, not sft")])
def test_what_would_be_ignored_is_refused(work, tmp_path, capsys, method, more, said):
    """A flag of the other loss, and a method that trains another text."""
    argv = training(work, tmp_path / "out", *more)
    assert full.main([method, *argv[1:]]) == 2 and said in capsys.readouterr().err


def test_the_papers_settings_are_the_defaults():
    args = stepdpo.parser(full.options, "", full.DEFAULTS).parse_args(["dpo", "--model", "m", "--data", "d", "--out", "o"])
    stepdpo.settle(args)
    assert (args.beta, args.kappa, args.tau, args.loss) == (0.05, 1.0, 0.5, "surrogate")
    assert (args.lr, args.epochs, args.batch_size, args.schedule) == (5e-7, 1, 8, "constant") and round(args.warmup * 1250) == 50


# ---------------------------------------------------------------------------------------------------------------- the rows

def test_every_token_has_its_steps_score_and_the_end_token_the_last_ones(work):
    tokenizer, row = data.Tokenizer.from_pretrained(work / "model"), group_rows(1)[0]
    examples, _ = full.encode(work / "groups.jsonl", tokenizer, "dpo", "alpaca", 512)
    batch = data.collate(examples, [0])
    got = full.token_scores(batch).split([len(tokens) for _, tokens in examples[0].predicted])
    for mine, response, (first, second) in zip(got, row["responses"], row["rewards_list"]):
        cut = response.index("\nStep 2:")
        assert mine.tolist() == pytest.approx([first] * cut + [second] * (len(response) - cut + 1))


def test_a_chat_template_around_the_responses(work, tmp_path):
    """Rendered by the checkpoint's own template: one prompt, K answers, each ended by the template's end token."""
    tokenizer = data.Tokenizer.from_pretrained(work / "model")
    tokenizer.chat_template = "{% for m in messages %}[{{m.role}}] {{m.content}}{{'</s>' if m.role == 'assistant' else '\n'}}{% endfor %}" \
                              "{% if add_generation_prompt %}[assistant]{% endif %}"
    examples, report = full.encode(work / "groups.jsonl", tokenizer, "dpo", "chat", 512)
    assert report.kept == 10 and all(side[-1] == tokenizer.eos_id for example in examples for side in example.sides)
    assert tokenizer.decode(examples[0].chosen[:examples[0].start]).startswith("[user] Twice 0 + 3?\n[assistant] ")


def attempt(i, sample, text, correct, scores, stop="eos"):
    return {"id": f"p{i}", "question": f"Twice {i} + 3?", "answer": "6", "sample": sample, "prefix": "", "completion": text, "correct": correct,
            "extracted": "6", "stop_reason": stop, "tokens": 5, "scores": scores, "steps": data.split_steps(text)}


def test_groups_from_scored_attempts(work, tmp_path, capsys):
    """Distinct attempts that ended, of problems with right and wrong ones; the verdict is the reward."""
    right, wrong, other = answer(0, 3, 0, 0), answer(0, 3, 0, 1), answer(0, 3, 1, 2)
    rows = [attempt(0, 0, right, True, [1, 1]), attempt(0, 1, wrong, False, [1, 0]), attempt(0, 2, wrong + " ", False, [1, 0.5]),
            attempt(0, 3, other, False, [0, 0], "length"), attempt(1, 0, right, True, [1, 1]), attempt(1, 1, answer(0, 3, 0, 0) + ".", True, [1, 1])]
    file, out = write_rows(tmp_path / "s.jsonl", rows), tmp_path / "g.jsonl"
    assert full.main(["groups", "--scored", str(file), "--out", str(out)]) == 0
    assert lines(out) == [{"dataset": "", "prompt": "Twice 0 + 3?", "answer": "6", "responses": [right, wrong], "rewards": [1.0, 0.0], "rewards_list": [[1, 1], [1, 0]]}]
    said = capsys.readouterr().out
    assert "cut off by the length limit" in said and "the same answer again" in said and "right answers only, or wrong ones only" in said
    assert full.main(training(work, tmp_path / "out", "--data", str(out))) == 0
    assert full.main(["groups", "--scored", str(file), "--out", str(out), "--most", "1"]) == 2
    assert "no problem has right and wrong answers" in capsys.readouterr().err
    write_rows(file, [{k: v for k, v in rows[0].items() if k != "scores"}])
    assert full.main(["groups", "--scored", str(file), "--out", str(tmp_path / "h.jsonl")]) == 2
    assert "s.jsonl:1: field 'scores'" in (said := capsys.readouterr().err) and "variants.prm score" in said


def test_groups_that_tie_are_left_out_by_name(work, tmp_path, capsys):
    """No NaN: no pair comes of them. A file of nothing else is refused."""
    rows = group_rows(4)
    rows[1]["rewards"] = [0.5] * 4
    write_rows(work / "tie.jsonl", rows)
    assert full.main(training(work, tmp_path / "out", "--max_steps", "1", file="tie.jsonl")) == 0
    assert "the rewards tie: no response beats another  (first: " in (said := capsys.readouterr().out) and "tie.jsonl:2" in said
    write_rows(work / "tie.jsonl", rows[1:2])
    assert full.main(training(work, tmp_path / "none", file="tie.jsonl")) == 2 and "no row is left to use" in capsys.readouterr().err


@pytest.mark.parametrize("change, said", [
    ({"rewards_list": [[0.9], [0.9, 0.2], [0.4, 0.0]]}, "field 'rewards_list': found 1 scores for response 1, which has 2 steps"),
    ({"rewards_list": [[0.9, None], [0.9, 0.2], [0.4, 0.0]]}, "field 'rewards_list': found [0.9, None]; expected numbers"),
    ({"rewards_list": [[], [0.9, 0.2], [0.4, 0.0]]}, "field 'rewards_list': found []; expected numbers"),
    ({"rewards": [1, 0]}, "field 'rewards': found 2 entries for 3 responses"),
    ({"rewards": [1, "a", 0]}, "field 'rewards': found [1, 'a', 0]; expected numbers"),
    ({"responses": ["a", "", "c"]}, "field 'responses': expected texts, none of them empty"),
    ({"prompt": None}, "field 'prompt'")])
def test_a_bad_row_is_named(work, tmp_path, capsys, change, said):
    write_rows(work / "bad.jsonl", [group_rows(1)[0] | change])
    assert full.main(training(work, tmp_path / "out", file="bad.jsonl")) == 2
    error = capsys.readouterr().err
    assert "bad.jsonl:1: " in error and said in error and "Traceback" not in error


def test_files_and_methods_of_others(work, tmp_path, capsys):
    """Pairs, and a run as sft: one line that says what belongs here."""
    write_rows(work / "pairs.jsonl", [{"prompt": "p", "chosen": "a", "rejected": "b"}])
    assert full.main(training(work, tmp_path / "out", file="pairs.jsonl")) == 2 and "the file holds pairs, and groups belong here" in capsys.readouterr().err
    argv = training(work, tmp_path / "out")
    assert full.main(["sft", *argv[1:]]) == 2 and "run it as dpo" in capsys.readouterr().err
