"""Numbers of released code, and of closed forms, that the siblings must reproduce: every case of every file.

The files are data alone: each says what goes in, what comes out and how exactly. They lie in ../shared/methods; SIBLING_CASES names another folder of them.
A case of kind K in file NAME.json is run by the function NAME_K below. Where released code slips, its file says what was intended, and that is what ours gives."""
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT

import data

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
    from variants.full_step_dpo import surrogate_loss
    policy, reference, response, weights, above, lengths = full_step_tokens(given)
    losses = surrogate_loss(policy, reference, response, weights, above, given["beta"], given["kappa_token_rate"], given["tau_reward_temp"],
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
