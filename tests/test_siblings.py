"""Numbers of released code, and of closed forms, that the siblings must reproduce: every case of every file.

The files are data alone: each says what goes in, what comes out and how exactly. They lie in ../shared/methods; SIBLING_CASES names another folder of them.
A case of kind K in file NAME.json is run by the function NAME_K below. Where released code slips, its file says what was intended, and that is what ours gives."""
import json
import os
import re
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, tiny_model
from safetensors.torch import load_file

import data
import stepdpo
from data import Example
from eval import grade
from model import average_checkpoints
from variants import full_step_dpo, prm, sacpo, scdpo, sdpo, spo, stepco

NOT_WRITTEN = ("alphallm_cpl", "longdpo")         # siblings that are still to come; any other file must be there
FOLDER = Path(os.environ.get("SIBLING_CASES") or ROOT.parent / "shared" / "methods")


def cases():
    """(name, case, tolerances) of every case there is; one that says why where there is none."""
    files = sorted(FOLDER.glob("*.json"))
    if not files:
        yield pytest.param(None, None, None, marks=pytest.mark.skip(reason=f"numbers of released code are not here ({FOLDER})"))
    for file in files:
        table = json.loads(file.read_text())
        here = file.stem not in NOT_WRITTEN or (ROOT / "variants" / f"{file.stem}.py").exists()
        missing = pytest.mark.skip(reason=f"variants/{file.stem}.py is not written yet")
        for case in table["cases"]:
            yield pytest.param(file.stem, case, table["tolerance"], id=f"{file.stem}-{case['id']}", marks=() if here else missing)


@pytest.mark.parametrize("name, case, tolerance", list(cases()))
def test_numbers_of_released_code(name, case, tolerance):
    """Each case's output is what ours gives for its input, to the file's own tolerance."""
    check = globals().get(f"{name}_{case['kind']}")
    assert check is not None, f"no function runs {case['kind']!r} of {name}.json"
    check(case["input"], case["output"], tolerance)


# ---------------------------------------------------------------------------------------------------------- sDPO

def close(found, wanted, within: float):
    torch.testing.assert_close(torch.as_tensor(found, dtype=torch.float64), torch.tensor(wanted, dtype=torch.float64), atol=within, rtol=0)


def gamma_of(logits: torch.Tensor, pairs: list) -> torch.Tensor:
    """log pi(chosen | question) - log pi(rejected | question) of [question, chosen, rejected]s under a table of logits."""
    x, w, l = torch.tensor(pairs).unbind(1)
    logps = logits.log_softmax(-1)
    return logps[x, w] - logps[x, l]


def descend(start: torch.Tensor, reference: torch.Tensor, pairs: list, beta: float, lr: float, updates: int):
    """(logits after full-batch gradient descent on stepdpo.dpo_loss, the losses on the way)."""
    logits, losses = start.clone().requires_grad_(), []
    x, w, l = torch.tensor(pairs).unbind(1)
    ref = reference.log_softmax(-1)
    for _ in range(updates):
        logps = logits.log_softmax(-1)
        loss = stepdpo.dpo_loss(logps[x, w], logps[x, l], ref[x, w], ref[x, l], beta)[0].mean()
        losses.append(loss.item())
        gradient, = torch.autograd.grad(loss, logits)
        logits = (logits - lr * gradient).detach().requires_grad_()
    logps = logits.log_softmax(-1)
    losses.append(stepdpo.dpo_loss(logps[x, w], logps[x, l], ref[x, w], ref[x, l], beta)[0].mean().item())
    return logits.detach(), losses


def mean_kl(logits: torch.Tensor, start: torch.Tensor) -> float:
    p, q = logits.log_softmax(-1), start.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean().item()


def sdpo_chain(given, wanted, tolerance):
    """Each stage from and against what the last one left; the same data at once, and at beta / T."""
    within, T = tolerance["all"], len(given["stages"])
    how = dict(beta=given["beta"], lr=given["learning_rate"], updates=given["updates_per_stage"])
    S = torch.tensor(given["logits_S"], dtype=torch.float64)
    chain, first, last = [S], [], []
    for pairs in given["stages"]:
        after, losses = descend(chain[-1], chain[-1], pairs, **how)
        chain.append(after)
        first.append(losses[0])
        last.append(losses[-1])
    final = given["stages"][-1]
    close(first, wanted["first_loss_of_each_stage"], within)
    close(torch.stack(chain[1:]), wanted["logits_after_each_stage"], within)
    close(last, wanted["last_loss_of_each_stage"], within)
    close([gamma_of(M, final).mean() for M in chain], wanted["mean_gamma_on_last_chunk_of_S_M1_.._MT"], within)
    close([sdpo.reward_accuracy(gamma_of(M, final)) for M in chain], wanted["reward_accuracy_on_last_chunk"], within)
    _, from_S = descend(S, chain[-2], final, **how)
    close(from_S[0], wanted["first_loss_of_last_stage_if_target_begins_at_S"], within)
    pool = [pair for pairs in given["stages"] for pair in pairs]
    how["updates"] *= T
    at_once, _ = descend(S, S, pool, **how)
    close(at_once, wanted["logits_dpo_at_once"], within)
    weaker, _ = descend(S, S, pool, **how | {"beta": given["beta"] / T})
    found = {"sdpo": mean_kl(chain[-1], S), "dpo_at_once": mean_kl(at_once, S), "dpo_at_once_beta_over_T": mean_kl(weaker, S)}
    for name, value in wanted["kl_to_S"].items():
        close(found[name], value, within)


def optimum(logps: torch.Tensor, reward: list, beta: float) -> torch.Tensor:
    """log of pi* ~ pi exp(r / beta): what a stage ends in that reaches its optimum."""
    return (logps + torch.tensor(reward, dtype=torch.float64) / beta).log_softmax(-1)


def sdpo_telescope(given, wanted, tolerance):
    """Chained optima multiply: two stages are one, at the betas' harmonic sum."""
    S, within = torch.tensor(given["logits_S"], dtype=torch.float64).log_softmax(-1), tolerance["all"]
    rewards, betas = (given["rewards"], given["betas"]) if "rewards" in given else ([given["reward"]] * 2, [given["beta"]] * 2)
    stages = [S]
    for reward, beta in zip(rewards, betas):
        stages.append(optimum(stages[-1], reward, beta))
    if "pi_after_each_stage" in wanted:
        close(torch.stack(stages[1:]).exp(), wanted["pi_after_each_stage"], within)
        joint = sum(torch.tensor(reward, dtype=torch.float64) / beta for reward, beta in zip(rewards, betas))
        close((S + joint).softmax(-1), wanted["pi_joint"], within)
    else:
        close(stages[-1].exp(), wanted["pi_two_stages"], within)
        close(optimum(S, rewards[0], betas[0] / 2).exp(), wanted["pi_half_beta"], within)


def sdpo_easy_to_hard(given, wanted, tolerance):
    """Sources by their reward accuracy under S, descending."""
    S, names = torch.tensor(given["logits_S"], dtype=torch.float64), list(given["sources"])
    accuracy = {name: sdpo.reward_accuracy(gamma_of(S, pairs)) for name, pairs in given["sources"].items()}
    for name, value in wanted["reward_accuracy"].items():
        close(accuracy[name], value, tolerance["all"])
    assert [names[i] for i in sdpo.easy_first(list(accuracy.values()))] == wanted["order"]


# --------------------------------------------------------------------------------------------------------- SACPO

def sacpo_dpo(given, wanted, tolerance):
    """A stage's loss is stepdpo.dpo_loss, at beta or beta / lambda."""
    policy = [torch.tensor(given[f"policy_{side}"], dtype=torch.float64, requires_grad=True) for side in ("chosen", "rejected")]
    ref = [torch.tensor(given[f"ref_{side}"], dtype=torch.float64) for side in ("chosen", "rejected")]
    losses, chosen_rewards, rejected_rewards = stepdpo.dpo_loss(*policy, *ref, given["beta"])
    gradients = torch.autograd.grad(losses.mean(), policy)
    for found, name in zip((losses, chosen_rewards, rejected_rewards, *gradients), ("losses", "chosen_rewards", "rejected_rewards", "grad_policy_chosen",
                                                                                    "grad_policy_rejected")):
        close(found, wanted[name], tolerance["dpo"])


def sacpo_kto(given, wanted, tolerance):
    """KTO's losses and gradients; the KL estimate is of the mismatched answers, clamped at 0."""
    tensor = lambda name: torch.tensor(given[name], dtype=torch.float64)
    assert given["desirable_weight"] == 1
    kl = sacpo.kl_estimate(tensor("policy_mismatched"), tensor("ref_mismatched"))
    close(kl, wanted["kl_estimate"], tolerance["kto"])
    good, bad = tensor("policy_desirable").requires_grad_(), tensor("policy_undesirable").requires_grad_()
    desirable = torch.tensor([True] * len(good) + [False] * len(bad))
    losses, _ = sacpo.kto_loss(torch.cat([good, bad]), torch.cat([tensor("ref_desirable"), tensor("ref_undesirable")]), desirable, kl, given["beta"],
                               given["undesirable_weight"])
    gradients = torch.autograd.grad(losses.mean(), (good, bad))
    close(losses, wanted["losses_desirable_then_undesirable"], tolerance["kto"])
    close(gradients[0], wanted["grad_desirable"], tolerance["kto"])
    close(gradients[1], wanted["grad_undesirable"], tolerance["kto"])


def sacpo_kl_pairs(given, wanted, tolerance):
    """Rotation by one (what was intended), not the reversed batch of the release, which may give an answer to its own prompt."""
    examples = [Example(f"row {i}", [np.array([10 + i, 50 + i])], 1, [np.zeros(1)]) for i in range(given["batch"])]
    found = [int(example.sides[0][1]) - 50 for example in sacpo.mismatch(examples, None)]
    assert found == wanted["rotation_by_one"]


def sacpo_data(given, wanted, tolerance):
    """PKU-SafeRLHF's columns as pairs and as single answers, for both metrics."""
    for metric, name in (("helpful", "helpful"), ("safe", "safety")):
        pairs = [sacpo.pair_of(row, metric, "row") for row in given["rows"]]
        assert [[row["chosen"], row["rejected"]] for row in pairs] == wanted[f"dpo_{name}"]
        single = [[answer["completion"], answer["label"]] for row in given["rows"] for answer in sacpo.labelled(row, metric, "row")]
        if not single:
            single = [[row[side], side == "chosen"] for row in pairs for side in ("chosen", "rejected")]
        assert sorted(single) == sorted(wanted[f"kto_{name}"])


def sacpo_merge(given, wanted, tolerance):
    """theta(q) = q theta_2 + (1 - q) theta_1, in a corner of real checkpoints' embeddings; q = 0 and 1 to the bit."""
    dtype = getattr(torch, given["dtype"])
    with tempfile.TemporaryDirectory() as folder:
        folders = [Path(folder) / name for name in ("stage2", "stage1", "merged")]
        for path, name in zip(folders, ("theta_r_lambda_g", "theta_r")):
            model = tiny_model().to(dtype)
            corner = torch.tensor(given[name], dtype=dtype)
            with torch.no_grad():
                model.model.embed_tokens.weight[:corner.shape[0], :corner.shape[1]] = corner
            model.save_pretrained(path)
        average_checkpoints(folders[:2], [given["q"], 1 - given["q"]], folders[2])
        merged = load_file(folders[2] / "model.safetensors")["model.embed_tokens.weight"][:corner.shape[0], :corner.shape[1]]
    if dtype == torch.bfloat16 or given["q"] in (0, 1):
        assert torch.equal(merged, torch.tensor(wanted["merged"], dtype=dtype))
    else:
        close(merged, wanted["merged"], tolerance["merge"])


sacpo_merge_bf16 = sacpo_merge


def sacpo_tabular_optimum(given, wanted, tolerance):
    """Theorem 1: the second stage from and against the first ends where both rewards at once do, in either order."""
    within, beta, lam = tolerance["tabular_optimum"], given["beta"], given["lambda"]
    ref, r, g = (torch.tensor(given[name], dtype=torch.float64) for name in ("pi_ref", "reward", "safety"))
    after = lambda logps, reward, beta: optimum(logps, reward.tolist(), beta)
    pi_r = after(ref.log(), r, beta)
    final, other = after(pi_r, g, beta / lam), after(after(ref.log(), g, beta / lam), r, beta)
    close(pi_r.exp(), wanted["pi_r"], within)
    close(final.exp(), wanted["pi_after_stage_2"], within)
    close(after(ref.log(), r + lam * g, beta).exp(), wanted["joint"], within)
    close(other.exp(), wanted["other_order"], within)
    close((final.exp() * r).sum(-1), wanted["expected_reward"], within)
    close((final.exp() * g).sum(-1), wanted["expected_safety"], within)
    close((final.exp() * (final - ref.log())).sum(-1), wanted["kl_to_ref"], within)


# --------------------------------------------------------------------------------------------------------- SCDPO

def scdpo_temperature(given, wanted, tolerance):
    """Both ramps: what the paper prints, and what its code does."""
    for name, rise in (("printed", 0.05), ("released", 0.1)):
        if name in wanted:
            close([scdpo.temperature(i, rise) for i in given["index"]], wanted[name], tolerance["temperature"])


def scdpo_forks(given, wanted, tolerance):
    """Where a right solution may be forked, from scratch included."""
    assert set(given["solutions_roles"]) == set(wanted["forks_in_order"])
    for name, roles in given["solutions_roles"].items():
        found = [{"start_steps": k, "prefix_roles": roles[:k]} for k in scdpo.fork_points(roles)]
        assert found == wanted["forks_in_order"][name]


def scdpo_pairs(given, wanted, tolerance):
    """The first `limit` wrong solutions of each problem, each cut where it leaves the right one. (The case's names of the questions are not in its input.)"""
    found = [triple for problem in given["problems"]
             for triple in scdpo.pairs_of(problem["right"], [(w["start_steps"], w["blocks"]) for w in problem["wrong"]], given["limit"])]
    assert sorted(found) == sorted(tuple("".join(pair[name]) for name in ("front", "right_tail", "wrong_tail")) for pair in wanted["pairs_sorted"])


def scdpo_filter(given, wanted, tolerance):
    """Garbled or not, of solutions with so many blocks (two of them the system's and the user's), so long a longest one, with or without a stray tag."""
    assert set(given["count_of_blocks"]) == set(wanted["dropped"])
    for name, dropped in wanted["dropped"].items():
        steps = ["a step"] * (given["count_of_blocks"][name] - 2)
        longest, tag = given["longest_block"][name], "<|execution|>" if given["has_execution_tag"][name] else ""
        steps[len(steps) // 2] = tag + "x" * (longest - len(tag))
        assert scdpo.garbled(steps) == dropped, name


# ----------------------------------------------------------------------------------------------------------- SPO

def doubles(value):
    return torch.tensor(value, dtype=torch.float64)


def spo_loss(given, wanted, tolerance):
    """The released loss, its clipped ratios and its gradients. Inside the band it is the paper's loss of the same numbers."""
    names = ("policy_win", "policy_lose", "ref_win", "ref_lose")
    logps = [doubles(given[name]).requires_grad_() for name in names]
    losses, metrics = spo.released_loss(*logps, given["beta"], given["eps"])
    assert losses.mean().item() == pytest.approx(wanted["loss"], abs=tolerance["loss"])
    for side, name in (("win", "chosen_reward"), ("lose", "rejected_reward")):
        ratio = (metrics[name] / given["beta"]).exp()
        torch.testing.assert_close(ratio, doubles(wanted[f"ratio_{side}"]), atol=1e-10, rtol=0)
    inside = metrics["clipped"] == 0
    torch.testing.assert_close(losses[inside], spo.paper_loss(*logps, given["beta"])[0][inside], atol=1e-10, rtol=0)
    losses.mean().backward()
    for name, logp in zip(names[:2], logps):
        torch.testing.assert_close(logp.grad, doubles(wanted[f"grad_{name}"]), atol=tolerance["gradients"], rtol=0)


def spo_ddim_logprob(given, wanted, tolerance):
    """One step's predicted x_0, mean, sigma and log-density, as a sum and as a mean, and the mean's gradient."""
    output = doubles(given["model_output"]).requires_grad_()
    x_0, mean, sigma = spo.ddim_step(doubles(given["x_t"]), output, doubles(given["alpha_bar_t"]), doubles(given["alpha_bar_prev"]),
                                 given["eta"], given["prediction_type"])
    for ours, name in ((x_0, "pred_x0"), (mean, "mean"), (sigma, "sigma")):
        torch.testing.assert_close(ours.detach(), doubles(wanted[name]), atol=1e-8, rtol=0)
    logps = spo.log_density(doubles(given["x_prev"]), mean, sigma)
    torch.testing.assert_close(logps.detach(), doubles(wanted["logprob_sum_over_dims"]), atol=1e-6, rtol=0)
    dimensions = output[0].numel()
    torch.testing.assert_close(logps.detach() / dimensions, doubles(wanted["logprob_mean_over_dims"]), atol=1e-6, rtol=0)
    (logps / dimensions).sum().backward()                           # the file's gradient is that of the means
    torch.testing.assert_close(output.grad, doubles(wanted["grad_model_output_of_the_sum_over_batch"]), atol=1e-8, rtol=0)


def spo_choose_pair(given, wanted, tolerance):
    """Best against worst, and whether their softmax differs by more than the threshold."""
    win, lose, kept = spo.choose_pair(doubles(given["scores_k_by_batch"]), given["threshold"])
    assert (win.tolist(), lose.tolist(), kept.tolist()) == (wanted["win_index"], wanted["lose_index"], wanted["kept"])


def spo_sampling_loop(given, wanted, tolerance):
    """A round of sampling with recorded noise and continuations: which x_0 is scored when and with which t, and the pairs."""
    a, b = map(float, re.fullmatch(r"eps\(x, t\) = (\S+) x \+ (\S+) t / 1000", given["model"]).groups())
    c, d = map(float, re.fullmatch(r"-(\S+) \(x0_hat - (\S+)\)\^2", given["score"]).groups())
    table = torch.full((1000,), torch.nan, dtype=torch.float64)
    for t, alpha_bar in given["alpha_bar"].items():
        table[int(t)] = alpha_bar
    scored = []

    def score(x_0, t):
        scores = -c * (x_0.squeeze(-1) - d)**2
        scored.append((t, scores))
        return scores

    steps = [doubles(z) for z in given["noise_in_order_of_use"]]
    steps = [z if z.ndim == 3 else z[None] for z in steps]
    noise = spo.Noise(doubles(given["x_T"])[:, None], steps, torch.tensor(given["continue_with_candidate"]))
    pairs = spo.sample_pairs(lambda x, t: a * x + b * t / 1000, score, spo.Sampler(table, given["timesteps"], given["eta"]), noise,
                         first_steps=given["normal_steps_first"], threshold=given["threshold"])
    assert [t for t, _ in scored] == [one["t_given_to_scorer"] for one in wanted["scorings"]]
    near = dict(atol=tolerance["sampling_loop"], rtol=0)
    for (_, ours), theirs in zip(scored, wanted["scorings"]):
        torch.testing.assert_close(ours, doubles(theirs["scores"]), **near)
    found = pairs.kept.nonzero().tolist()
    assert [(pairs.t[m].item(), b) for m, b in found] == [(pair["t"], pair["trajectory"]) for pair in wanted["pairs"]]
    for (m, b), pair in zip(found, wanted["pairs"]):
        torch.testing.assert_close(pairs.x_t[m, b].flatten(), doubles([pair["x_t"]]), **near)
        torch.testing.assert_close(pairs.x_prev[m, b].flatten(), doubles([pair["x_win"], pair["x_lose"]]), **near)


# ---------------------------------------------------------------------------------------------------------------- Full-Step-DPO

def full_step_tokens(given):
    """The tokens of a group of padded responses, one after the other: policy, reference, weights, which response; and R_i > R_j."""
    rows = given["policy_logps"]
    lengths = given.get("lengths") or list(map(len, rows))
    flat = lambda name: torch.tensor([x for row, n in zip(given[name], lengths) for x in row[:n]], dtype=torch.float64)
    response = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor(lengths))
    rewards = torch.tensor(given["rewards_R"])
    policy = flat("policy_logps").requires_grad_()
    return policy, flat("ref_logps"), response, flat("weights"), rewards[:, None] > rewards[None, :], lengths


def full_step_surrogate(given, trained):
    policy, reference, response, weights, above, lengths = full_step_tokens(given)
    losses = full_step_dpo.surrogate_loss(policy, reference, response, weights, above, given["beta"], given["kappa_token_rate"], given["tau_reward_temp"],
                            trained(weights, response))
    return policy, losses, above, lengths


def full_step_dpo_loss(given, expected, tolerance):
    """The released loss and its gradient, with what the released collator leaves out (weight 0); where the file says what was intended, with every token."""
    trained = (lambda w, response: None) if "intended" in expected else (lambda w, response: w != 0)
    expected = expected.get("intended", expected.get("released", expected))
    policy, losses, above, lengths = full_step_surrogate(given, trained)
    loss = losses.sum() / above.sum()
    loss.backward()
    assert loss.item() == pytest.approx(expected["loss"], abs=tolerance["loss"])
    for mine, row in zip(policy.grad.split(lengths), expected["grad_policy_logps"]):
        assert mine.tolist() == pytest.approx(row[:len(mine)], abs=tolerance["grad_policy_logps"])


def full_step_dpo_hazard(given, expected, tolerance):
    """What makes the released arithmetic NaN is finite in ours: a group that ties has no pair (and is left out by name when it is read), a response without
    scores has a finite loss, also with the released code's mask."""
    for trained in (lambda w, response: None, lambda w, response: w != 0):
        policy, losses, above, _ = full_step_surrogate(given, trained)
        losses.sum().backward()
        assert torch.isfinite(losses).all() and torch.isfinite(policy.grad).all() and not losses[~above].any()


def full_step_dpo_layout(given, expected, tolerance):
    """Which token has which step's score: as released wherever it trains a token. Ours also trains the end token, and the last token of a text without one, with
    the last step's score; the released weights are 0 there."""
    for ids, scores, released in zip(given["responses"], given["step_scores"], expected["weights_float32"]):
        label, texts = 1, []
        for token in ids:
            label += token == given["step_token"]
            texts.append(f"\nStep {label}:" if token == given["step_token"] else f" w{token}")
        ends = np.cumsum([len("Step 1:"), *map(len, texts)])
        offsets = list(zip(ends[:-1].tolist(), ends[1:].tolist()))
        of_token = data.step_of_tokens(offsets, "Step 1:" + "".join(texts), 0)
        ours = [scores[k] for k in of_token]
        for mine, theirs in zip(ours, released):
            assert theirs == 0 and mine == scores[-1] or mine == pytest.approx(theirs, abs=tolerance["layout"])


# ----------------------------------------------------------------------------------------------------------------------- StepCo

class OneMore(Exception):
    """The scripted writer was asked for a path that is not scripted."""


def stepco_run(given, **switches):
    """(answer, paths written, revisions) of the loop with a scripted writer and verifier."""
    script = given["attempts"]
    paths = [stepco.Written(f"The answer is: {attempt['answer']}", 1, str(i)) for i, attempt in enumerate(script)]

    def verify(asked):
        attempt = script[int(asked[0][1].stop_reason)]
        return [stepco.Verdict(attempt["step_scores"], attempt["whole_path_score"])]

    def revise(asked, turn):
        if turn == len(paths):
            raise OneMore(f"would ask for one more path than is scripted, at step {asked[0][2] + 1}")
        return [paths[turn]]

    history, = stepco.correct_stepwise(paths[:1], revise, verify, theta=given["theta"], rounds=given["T"], **switches)
    revisions = [{"from_attempt": t, "step": k + 1, "percent": f"{100 * p:.2f}"} for t, (k, p) in enumerate(history.revisions)]
    return history.paths[-1].text.removeprefix("The answer is: "), len(history.paths), revisions


def stepco_loop(given, expected, tolerance):
    """The paper's reading; and what the released code does, with its two further exits switched on."""
    paper = expected.get("paper_reading")
    if isinstance(paper, str):
        with pytest.raises(OneMore, match=paper):
            stepco_run(given)
    elif paper is not None:
        answer, written, revisions = stepco_run(given)
        assert (answer, written) == (paper["answer"], paper["paths_written"])
        assert [{name: r[name] for name in ("from_attempt", "step")} for r in revisions] == paper["revisions"]
    if released := expected.get("released"):
        got = stepco_run(given, whole_path_exit=True, equal_answers_exit=True)
        assert got == (released["answer"], released["paths_written"], released["revisions"])


def stepco_first_below(given, expected, tolerance):
    for (scores, theta), index in zip(given["scores_theta"], expected["index"]):
        found = stepco.first_below(scores, theta)
        assert (0 if found is None else found + 1) == index


def stepco_step_labels(given, expected, tolerance):
    """The tree's leaves, as solutions that begin alike; each node's label is the share of right leaves below it."""
    parent = {node: above for node, above, _ in given["nodes_parent_text"]}
    text = {node: words for node, _, words in given["nodes_parent_text"]}
    paths = []
    for leaf in set(parent) - set(parent.values()):
        path = [leaf]
        while parent[path[0]] in parent:
            path.insert(0, parent[path[0]])
        paths.append(path)
    # a node's name stands for its step: names hold those of their parents, so they are unlike where the nodes are
    leaves = [([f"{node} " for node in path], grade(text[path[-1]], given["gold"])[1]) for path in paths]
    found = {node: right / tries for path, values in zip(paths, prm.tree_values(leaves)) for node, (right, tries) in zip(path, values)}
    assert found == pytest.approx(expected["label"], abs=tolerance["label"])
