"""model.py against transformers, against real trained checkpoints, and against itself by another road."""
import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, tiny_config, tiny_model, write_json
from safetensors.torch import load_file, save_file

from model import (CheckpointError, Config, KVCache, Llama, Tree, average_checkpoints, choose_device, fingerprint, generate, lay_out,
                   pick_tokens, samples)

LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)
VARIETIES = {   # name -> config.json of one tiny model; between them every family and every optional piece
    "llama, grouped-query": tiny_config(),
    "llama, multi-head": tiny_config(num_key_value_heads=4),
    "llama, multi-query": tiny_config(num_key_value_heads=1),
    "llama, head_dim": tiny_config(head_dim=12),
    "llama, biases everywhere": tiny_config(attention_bias=True, mlp_bias=True),
    "llama, tied": tiny_config(tie_word_embeddings=True),
    "llama, linear rope": tiny_config(rope_scaling={"type": "linear", "factor": 4.0}),
    "llama, llama3 rope": tiny_config(rope_theta=500000.0, rope_scaling=LLAMA3),
    "llama, llama3 rope in the new spelling": tiny_config(rope_parameters={"rope_theta": 500000.0, **LLAMA3}),
    "llama, theta in the new spelling": tiny_config(rope_parameters={"rope_theta": 1234.0, "rope_type": "default"}),
    "qwen2": tiny_config("qwen2", rope_theta=1e6),
    "qwen2, tied, window switched off": tiny_config("qwen2", tie_word_embeddings=True, use_sliding_window=False, sliding_window=16),
    "qwen3": tiny_config("qwen3", head_dim=16),
    "qwen3, bias": tiny_config("qwen3", head_dim=16, attention_bias=True),
    "mistral": tiny_config("mistral", sliding_window=None),
}


def scramble(model: torch.nn.Module, seed: int = 0):
    """Random everything, norms and biases too: a freshly initialised model has unit norms and zero biases, which hide mistakes."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * (0.3 if p.dim() == 2 else 0.5) + (p.dim() == 1))


@pytest.mark.parametrize("name", VARIETIES)
def test_logits_equal_transformers_and_the_folder_travels_both_ways(name, tmp_path):
    """Ours written, theirs loaded: the same logits to 2e-4. Theirs written (so, in transformers' present spelling), ours loaded: the same again."""
    transformers = pytest.importorskip("transformers", reason="transformers is the oracle of this test")
    ours = Llama(Config.from_dict(VARIETIES[name]))
    scramble(ours)
    ours.save_pretrained(tmp_path / "ours")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32, attn_implementation="eager").eval()
    ids = torch.randint(0, 97, (3, 100), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(ids).logits
        assert (ours(ids) - expected).abs().max() < 2e-4
    theirs.save_pretrained(tmp_path / "theirs")
    again = Llama.from_pretrained(tmp_path / "theirs")
    assert again.state_dict().keys() == ours.state_dict().keys()
    with torch.no_grad():
        assert (again(ids) - expected).abs().max() < 2e-4


@pytest.mark.parametrize("name", ["hf-stories260K", "hf-aidreams260K"])
def test_real_checkpoints_give_their_golden_logprobs_and_texts(assets, name):
    """Two trained models; the goldens were made by transformers in float64 and by an independent C program."""
    from tokenizers import Tokenizer
    folder = assets / "weights" / name
    model, tokenizer = Llama.from_pretrained(folder), Tokenizer.from_file(str(folder / "tokenizer.json"))
    double = Llama.from_pretrained(folder, dtype=torch.float64)
    for case in json.loads((folder.parent / "golden_weights_outputs.json").read_text())[name]:
        ids = case["text_ids_first90"]
        golden = torch.tensor(case["hf_fp64_token_logprobs"])
        for m, tolerance in ((model, 1e-3), (double, 2e-4)):
            with torch.no_grad():
                logps = m(torch.tensor([ids]))[0, :-1].double().log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
            assert (logps[:len(golden)] - golden[:len(logps)]).abs().max() < tolerance
        new = len(ids) - len(case["prompt_ids"])
        sample = generate(model, [case["prompt_ids"]], max_new_tokens=new)[0][0]                         # with the KV cache
        assert sample.token_ids == ids[len(case["prompt_ids"]):]
        assert case["run_c_greedy_text"].startswith(tokenizer.decode(case["prompt_ids"] + sample.token_ids).strip())
        slow = list(case["prompt_ids"])                                                                  # and without
        for _ in range(new):
            slow.append(int(model(torch.tensor([slow]))[0, -1].argmax()))
        assert slow == ids


def test_a_transposed_checkpoint_does_not_pass_as_right(assets):
    """A stranger's copy of a trained model has its matrices transposed inside a file of the right size. Taken at its word it loads; its log-probs must be
    seen to differ from the golden ones, by far."""
    folder = assets / "weights"
    case = json.loads((folder / "golden_weights_outputs.json").read_text())["hf-stories260K"][0]
    model = Llama.from_pretrained(folder / "hf-stories260K")
    raw = (folder / "plctlab_odd" / "stories260K.plctlab.bin").read_bytes()
    C, I, L, H, G, V, _ = torch.frombuffer(bytearray(raw[:28]), dtype=torch.int32).tolist()
    rest, at = torch.frombuffer(bytearray(raw[28:]), dtype=torch.float32), 0

    def take(*shape):
        nonlocal at
        at += (count := torch.Size(shape).numel())
        return rest[at - count:at].view(shape)

    def halves(w, heads):    # llama2.c rotates neighbouring pairs, Hugging Face the two halves of a head
        return w.view(heads, -1, 2, C).transpose(1, 2).reshape(w.shape)

    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(take(V, C))
        for place, shape in (("input_layernorm", (C,)), ("self_attn.q_proj", (C, C)), ("self_attn.k_proj", (C * G // H, C)),
                             ("self_attn.v_proj", (C * G // H, C)), ("self_attn.o_proj", (C, C)), ("post_attention_layernorm", (C,)),
                             ("mlp.gate_proj", (I, C)), ("mlp.down_proj", (C, I)), ("mlp.up_proj", (I, C))):
            for block, w in zip(model.model.layers, take(L, *shape)):
                heads = {"self_attn.q_proj": H, "self_attn.k_proj": G}.get(place)
                block.get_submodule(place).weight.copy_(halves(w, heads) if heads else w)
        model.model.norm.weight.copy_(take(C))
        ids = case["text_ids_first90"]
        logps = model(torch.tensor([ids]))[0, :-1].log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    assert logps.sum() < sum(case["hf_fp64_token_logprobs"][:len(logps)]) - 100


def test_a_tree_equals_its_branches_as_separate_rows():
    """[prefix | a | b] and a deeper branch, in one flat row: hidden states and every parameter's gradient as from separate rows."""
    model = tiny_model()
    g = torch.Generator().manual_seed(0)
    texts = {name: torch.randint(0, 97, (n,), generator=g) for name, n in dict(p=9, a=5, b=3, aa=4, q=6).items()}
    rows = [["p", "a", "aa"], ["p", "b"], ["q"]]
    names, parents, starts = ["p", "a", "b", "aa", "q"], [-1, 0, 0, 1, -1], [0, 9, 9, 14, 0]
    weight = {n: torch.randn(len(texts[n]), 32, generator=g) for n in names}

    flat = torch.cat([texts[n] for n in names])[None]
    positions = torch.cat([torch.arange(s, s + len(texts[n])) for n, s in zip(names, starts)])
    hidden = model.hidden_states(flat, positions, Tree([len(texts[n]) for n in names], parents))[0]
    pieces = dict(zip(names, hidden.split([len(texts[n]) for n in names])))
    sum((pieces[n] * weight[n]).sum() for n in names).backward()
    grads = {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    seen, loss = set(), 0
    for row in rows:
        whole = model.hidden_states(torch.cat([texts[n] for n in row])[None])[0].split([len(texts[n]) for n in row])
        for n, h in zip(row, whole):
            torch.testing.assert_close(pieces[n], h, atol=1e-5, rtol=1e-5)
            loss, seen = loss + (0 if n in seen else (h * weight[n]).sum()), seen | {n}
    loss.backward()
    for k, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(grads[k], p.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("checkpointing", (False, True))
def test_the_last_block_can_leave_out_whom_nobody_asks(checkpointing):
    """`at`: the same hidden states at these positions (in any order, one of them twice) and the same gradients as all positions made and these picked;
    the last block's MLP meets those rows alone, every other MLP all of them."""
    ids, at, results, rows = torch.arange(40).view(2, 20), torch.tensor([11, 3, 3, 19]), [], []
    for early in (False, True):
        model = tiny_model().double()
        model.gradient_checkpointing = checkpointing
        for block in model.model.layers:
            block.mlp.register_forward_hook(lambda module, args, out: rows.append(out.shape[1]))
        hidden = model.hidden_states(ids, at=at) if early else model.hidden_states(ids)[:, at]
        made = rows[-len(model.model.layers):]
        (hidden * torch.arange(hidden.numel()).view(hidden.shape).cos()).sum().backward()
        results.append([hidden, *(p.grad for p in model.parameters() if p.grad is not None)])
    assert made == [20] * (len(made) - 1) + [4]
    for early, late in zip(*results, strict=True):
        torch.testing.assert_close(early, late, atol=1e-13, rtol=1e-12)


def test_under_autocast_what_several_products_read_is_cast_once():
    """q, k and v read one bf16 copy of the norm's output, gate and up another: it is these copies that the gradient keeps."""
    model, kept = tiny_model(), {}
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.setdefault(x.data_ptr(), x), lambda x: x), torch.autocast("cpu", torch.bfloat16):
        model.hidden_states(torch.arange(60)[None])
    inputs = [x for x in kept.values() if x.dtype == torch.bfloat16 and x.shape[-2:] == (60, 32)]
    assert len(inputs) == 2 * len(model.model.layers)                 # what o_proj reads is attention's own output, of another shape


def test_gradient_checkpointing_keeps_the_input_of_a_block_and_nothing_else():
    """What the forward pass leaves allocated grows by 4 N C bytes a block; without it, by many times that."""
    ids, grown = torch.arange(90)[None], {}
    for checkpointing in (True, False):
        kept = []
        for layers in (2, 6):
            model = tiny_model(num_hidden_layers=layers)
            model.gradient_checkpointing = checkpointing
            with torch.profiler.profile(profile_memory=True) as profile:
                hidden = model.hidden_states(ids)
            kept.append(sum(event.self_cpu_memory_usage for event in profile.events()))
            del hidden
        grown[checkpointing] = (kept[1] - kept[0]) / 4
    assert grown[True] == 4 * 90 * 32 and grown[False] > 10 * grown[True], grown


LENGTHS, PARENTS = [5, 3, 4, 2, 6, 1], [-1, 0, 0, 2, -1, 4]


def qkv(device="cpu", dtype=torch.float32) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(1, heads, sum(LENGTHS), 16, generator=g).to(device, dtype).requires_grad_() for heads in (4, 2, 2)]


def test_a_tree_in_one_call_asks_the_kernel_for_the_same(monkeypatch):
    """What GPUs run. The kernel itself has no CPU form, so its documented meaning stands in for it: text i's queries see text i's keys up to the lower
    right diagonal. Output and gradients are then those of the loop over segments."""
    def stand_in(q, k, v, queries_end, keys_end, longest_query, longest_key, window_size, **gqa):
        assert window_size == (-1, 0) and queries_end.dtype == keys_end.dtype == torch.int32
        lengths, counts = queries_end.diff().tolist(), keys_end.diff().tolist()
        assert (longest_query, longest_key) == (max(lengths), max(counts)) and len(q) == queries_end[-1] and len(k) == len(v) == keys_end[-1]
        out = []
        for a, b, c in zip(q.split(lengths), k.split(counts), v.split(counts)):
            seen = torch.ones(len(a), len(b), dtype=torch.bool).tril(len(b) - len(a))
            out.append(torch.nn.functional.scaled_dot_product_attention(*(x.transpose(0, 1)[None] for x in (a, b, c)), attn_mask=seen, enable_gqa=True))
        return torch.cat(out, dim=2)[0].transpose(0, 1)

    monkeypatch.setattr("model.varlen_attn", stand_in)
    tree, results = Tree(LENGTHS, PARENTS), []
    for attend in (tree.__call__, lambda layer, q, k, v: tree.in_one_call(q, k, v)):
        inputs = qkv()
        y = attend(0, *inputs)
        (y * torch.arange(y.numel()).view(y.shape).cos()).sum().backward()
        results.append([y.detach(), *(x.grad for x in inputs)])
    for one, loop in zip(*results):
        torch.testing.assert_close(one, loop, atol=1e-6, rtol=1e-6)


def test_each_process_takes_a_gpu_of_its_own(monkeypatch):
    """--device, or the GPU of torchrun's number; what is not there is refused by name."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert [str(choose_device(wanted)) for wanted in (None, "cuda", "cuda:0", "cpu")] == ["cuda:1", "cuda:1", "cuda:0", "cpu"]
    for wanted, local, named in (("cuda:5", "0", "cuda:5"), ("cuda", "2", "process 2"), ("gpu", "0", "--device gpu")):
        monkeypatch.setenv("LOCAL_RANK", local)
        with pytest.raises(CheckpointError, match=named):
            choose_device(wanted)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device(None).type == "cpu"
    with pytest.raises(CheckpointError, match="no CUDA device"):
        choose_device("cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_a_tree_on_a_gpu():
    """The real kernel in bf16 against the loop over segments in fp32: outputs and gradients to bf16's precision."""
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        inputs = qkv("cuda", dtype)
        y = Tree(LENGTHS, PARENTS)(0, *inputs)
        (y.float() * torch.arange(y.numel(), device="cuda").view(y.shape).cos()).sum().backward()
        results.append([y.float().detach(), *(x.grad.float() for x in inputs)])
    for half, exact in zip(*results):
        assert (half - exact).norm() < 0.02 * exact.norm()


def test_gradient_checkpointing_changes_nothing():
    """Recomputing a block in the backward pass gives bit-identical gradients."""
    grads = []
    for on in (False, True):
        model = tiny_model()
        model.gradient_checkpointing = on
        model(torch.arange(60).view(2, 30)).logsumexp(-1).sum().backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads))


PROMPTS = [[5], [7, 8, 9, 10, 11, 12, 13], [20, 21, 22], [7, 8, 9]]


def test_greedy_generation_equals_recomputing_everything():
    """Batched, ragged, cached, n samples: every row as a plain loop over full forwards would write it; rows that end early leave and disturb nobody."""
    model = tiny_model()
    scramble(model)
    free = [samples[0].token_ids for samples in generate(model, PROMPTS, max_new_tokens=70)]
    eos = next(t for t in free[1][5:] if any(t not in ids for ids in free))         # ends some rows, not all
    got = generate(model, PROMPTS, n=2, max_new_tokens=70, eos_ids=(eos,))
    stopped = 0
    for prompt, samples in zip(PROMPTS, got):
        ids = list(prompt)
        while len(ids) < len(prompt) + 70 and (token := int(model(torch.tensor([ids]))[0, -1].argmax())) != eos:
            ids.append(token)
        for s in samples:
            assert s.token_ids == ids[len(prompt):]
            assert s.stop_reason == ("length" if len(s.token_ids) == 70 else "eos")
            stopped += s.stop_reason == "eos"
    with pytest.raises(ValueError, match="max_new_tokens is 0"):
        generate(model, PROMPTS, max_new_tokens=0)
    assert 0 < stopped < 8, "the test should see both ends"


def test_samples_depend_on_seed_and_prompt_not_on_neighbours():
    """Prompt 1 alone, among others, or asked for fewer samples: the same samples; another seed: others."""
    model = tiny_model()
    scramble(model)
    settings = dict(max_new_tokens=20, temperature=1.0, top_p=0.9, eos_ids=(3, 4, 5))
    together = generate(model, PROMPTS, n=4, seed=1, **settings)
    alone = generate(model, [PROMPTS[1]], n=2, seed=1, **settings)
    assert alone[0] == together[1][:2]
    assert together[1][0] != together[1][1]
    assert generate(model, [PROMPTS[1]], n=2, seed=2, **settings) != alone


def test_what_prompts_have_in_common_is_computed_once():
    """A solution cut behind four of its steps, another one that begins like it, the whole twice, and a stranger: the hidden
    states of prefill and of the next tokens are those of each prompt alone, from less than half of the tokens; so are the
    texts."""
    model = tiny_model().double()
    scramble(model)
    g = torch.Generator().manual_seed(2)
    whole, other = torch.randint(0, 97, (60,), generator=g), torch.randint(0, 97, (30,), generator=g)
    prompts = [whole[:k].tolist() for k in (60, 24, 37, 51, 60)] + [[*whole[:33].tolist(), *other[:9].tolist()], other.tolist()]
    layout = lay_out([np.array(p) for p in prompts])
    cache = KVCache(layout, 2, "cpu")
    assert len(layout.tokens) < 0.5 * sum(map(len, prompts))
    ends = torch.tensor([own[-1] for own in layout.places])
    with torch.no_grad():
        first = model.hidden_states(torch.from_numpy(layout.tokens)[None], torch.from_numpy(layout.positions), cache.prefill, ends)[0]
        new = torch.randint(0, 97, (len(prompts) * 2, 1), generator=g)
        second = model.hidden_states(new, cache.positions, cache)[:, 0]
        for i, p in enumerate(prompts):
            torch.testing.assert_close(first[i], model.hidden_states(torch.tensor([p]))[0, -1], atol=1e-12, rtol=0)
            for row in (2 * i, 2 * i + 1):
                alone = model.hidden_states(torch.tensor([[*p, int(new[row])]]))[0, -1]
                torch.testing.assert_close(second[row], alone, atol=1e-12, rtol=0)
    together = generate(model, prompts, max_new_tokens=40)
    assert together == [generate(model, [p], max_new_tokens=40)[0] for p in prompts]


def test_samples_come_as_they_end_and_only_as_far_as_they_are_asked_for():
    """Each (i, j) once, shorter samples before longer ones; whoever stops asking stops the computation; `generate` has the
    same ones in their places."""
    model = tiny_model()
    scramble(model)
    settings = dict(n=3, max_new_tokens=40, temperature=1.0, eos_ids=(3, 4, 5, 6))
    heard = list(samples(model, PROMPTS, **settings))
    assert sorted((i, j) for i, j, _ in heard) == [(i, j) for i in range(4) for j in range(3)]
    ended = [len(s.token_ids) + (s.stop_reason == "eos") for _, _, s in heard]
    assert ended == sorted(ended) and ended[0] < ended[-1]
    table = generate(model, PROMPTS, **settings)
    assert all(table[i][j] == s for i, j, s in heard)
    calls = []
    model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    next(samples(model, PROMPTS, **settings))
    assert len(calls) == ended[0]
    assert not torch.is_inference_mode_enabled()


def test_the_temperature_may_be_a_function_of_the_new_tokens():
    """Hot for two tokens, then 0: the first two are drawn as at that temperature, the others are the most probable ones. A
    function that is constant draws what the number draws."""
    model = tiny_model()
    scramble(model)
    settings = dict(n=4, max_new_tokens=12, top_p=0.95, seed=3)
    drawn = generate(model, [PROMPTS[1]], temperature=1.5, **settings)[0]
    assert generate(model, [PROMPTS[1]], temperature=lambda new: 1.5, **settings)[0] == drawn
    mixed = generate(model, [PROMPTS[1]], temperature=lambda new: 1.5 if len(new) < 2 else 0.0, **settings)[0]
    assert len({tuple(s.token_ids[:2]) for s in mixed}) > 1, "the test should see different samples"
    for s, hot in zip(mixed, drawn):
        assert s.token_ids[:2] == hot.token_ids[:2]
        greedy = generate(model, [PROMPTS[1] + s.token_ids[:2]], max_new_tokens=10)[0][0]
        assert s.token_ids[2:] == greedy.token_ids


def test_stop_strings_cut_the_text_before_them():
    """A stop string may be spread over tokens; the text ends before it."""
    model = tiny_model()
    scramble(model)
    decode = lambda ids: "".join(f"<{i}>" for i in ids)
    free = generate(model, [[5, 6]], max_new_tokens=12, decode=decode)[0][0]
    assert free.stop_reason == "length" and free.text == decode(free.token_ids)
    stop = f"{free.token_ids[4]}><{free.token_ids[5]}"
    sample = generate(model, [[5, 6]], max_new_tokens=12, decode=decode, stop=(stop,))[0][0]
    assert sample.stop_reason == "stop" and sample.text == free.text[:free.text.find(stop)]


def test_top_p_draws_from_the_nucleus_with_the_right_frequencies():
    """Nucleus 0.85 of (0.5, 0.3, 0.1, 0.08, 0.02) is the first three, renormalised; temperature 2 undoes doubled logits; a tiny top_p is the arg max, by the
    way of the sort that follows when every draw was refused. 40,000 draws each: 4 standard errors are 0.01."""
    uniform = torch.rand(40000, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits = torch.tensor([0.02, 0.5, 0.08, 0.3, 0.1]).log().expand(40000, 5)
    share = lambda *a: torch.bincount(pick_tokens(*a, uniform), minlength=5) / 40000
    torch.testing.assert_close(share(logits, 1.0, 0.85), torch.tensor([0, 5 / 9, 0, 3 / 9, 1 / 9]), atol=0.01, rtol=0)
    torch.testing.assert_close(share(logits * 2, 2.0, 1.0), logits[0].exp(), atol=0.01, rtol=0)
    assert share(logits, 1.0, 0.1).tolist() == [0, 1, 0, 0, 0]
    uniform[:, :] = 0.999999                                   # always the last token in order, whose mass lies outside a nucleus of 0.5
    assert share(logits, 1.0, 0.5).tolist() == [0, 1, 0, 0, 0]


MASSES = [0.0625, 0.25, 0.0625, 0.5, 0.125]      # exact in fp32, and so are their sums


@pytest.mark.parametrize("edge, nucleus, wider", [(0.5, {3}, {3, 1}), (0.75, {3, 1}, {3, 1, 4}), (0.875, {3, 1, 4}, {0, 1, 2, 3, 4})])
def test_the_edge_of_the_nucleus(edge, nucleus, wider):
    """Masses 1/2, 1/4, 1/8, 1/16, 1/16. At a top_p of 1/2, 3/4, 7/8 or just below, the tokens that reach it are all; just above,
    one more is in (of two tied ones both). Every draw that falls on a token inside is kept; a token outside never comes, neither
    from the next draw nor from the sort after the last one."""
    logits = torch.tensor(MASSES).log()[None]
    assert logits.softmax(-1)[0].tolist() == MASSES
    ends = torch.tensor(MASSES, dtype=torch.float64).cumsum(0)
    middle = (ends - torch.tensor(MASSES, dtype=torch.float64) / 2).tolist()           # a uniform number that falls on token i
    pick = lambda top_p, *draws: int(pick_tokens(logits, 1.0, top_p, torch.tensor([draws], dtype=torch.float64)))
    for top_p, inside in ((edge - 0.001, nucleus), (edge, nucleus), (edge + 0.001, wider)):
        by_mass = sorted(inside, key=lambda i: (-MASSES[i], i))
        total = sum(MASSES[i] for i in inside)
        for token in range(5):
            if token in inside:
                assert pick(top_p, *[middle[token]] * 8) == token
                continue
            for other in inside:
                assert pick(top_p, middle[token], *[middle[other]] * 7) == other       # refused once, then drawn
            reached = 0.0                                                               # refused always, then sorted: by hand
            for expected in by_mass:
                reached += MASSES[expected] / total
                if middle[token] < reached:
                    break
            assert pick(top_p, *[middle[token]] * 8) == expected


@pytest.mark.parametrize("changes, named", [
    (dict(model_type="mixtral"), "model_type is 'mixtral'"),
    (dict(hidden_act="gelu"), "hidden_act is 'gelu'"),
    (dict(rope_scaling={"rope_type": "yarn", "factor": 4.0}), "'yarn'"),
    (dict(rope_parameters={"rope_type": "dynamic", "factor": 4.0}), "'dynamic'"),
    (dict(rope_scaling={"type": "linear"}), "factor"),
    (dict(model_type="mistral", sliding_window=-1), "sliding_window is -1"),
    (dict(model_type="llava", text_config={"model_type": "llama"}), "the language model of text_config"),
    (dict(layer_types=["full_attention", "sliding_attention"]), "layer_types"),
    (dict(model_type="qwen3", layer_types=["full_attention", "chunked_attention"]), "layer_types"),
    (dict(rope_parameters={"full_attention": {"rope_theta": 1e6}}), "rope_parameters"),
    (dict(quantization_config={"quant_method": "gptq"}), "quantization_config"),
    (dict(compression_config={"format": "int-quantized"}), "compression_config"),
    (dict(num_hidden_layers=10**9), "num_hidden_layers is 1000000000"),
    (dict(hidden_size="32"), "hidden_size is '32'"),
    (dict(hidden_size=True), "hidden_size is True"),
    (dict(vocab_size=-1), "vocab_size is -1"),
    (dict(num_key_value_heads=3), "num_key_value_heads"),
    (dict(head_dim=7), "head_dim"),
    (dict(rms_norm_eps="tiny"), "rms_norm_eps"),
])
def test_what_is_not_computed_is_refused_by_name(changes, named):
    """Never an approximation of another architecture: the message names field and value."""
    with pytest.raises(CheckpointError) as e:
        Config.from_dict({**tiny_config(), **changes})
    assert named in str(e.value)


@pytest.mark.parametrize("changes, longest", [
    (dict(model_type="mistral", sliding_window=64), 64),
    (dict(model_type="mistral", sliding_window=4096), 128),
    (dict(model_type="mistral", sliding_window=None), 128),
    (dict(model_type="mistral", max_position_embeddings=32768), 4096),                     # the family's default
    (dict(model_type="qwen2", sliding_window=64), 128),
    (dict(model_type="qwen2", use_sliding_window=True, sliding_window=64, max_window_layers=1), 64),
    (dict(model_type="qwen2", use_sliding_window=True, sliding_window=64, max_window_layers=2), 128),
    (dict(model_type="qwen3", head_dim=8, use_sliding_window=True, sliding_window=64, layer_types=["full_attention"] * 2), 128),
    (dict(model_type="qwen3", head_dim=8, use_sliding_window=True, sliding_window=64,
          layer_types=["full_attention", "sliding_attention"]), 64),
    (dict(model_type="llama", sliding_window=64), 128),
])
def test_a_sliding_window_ends_the_positions_where_transformers_would_begin_to_slide(changes, longest):
    """Up to the window's length a text is read as transformers reads it; config.json stays as it is."""
    transformers = pytest.importorskip("transformers", reason="transformers is the oracle of this test")
    raw = tiny_config(**changes)
    ours = Llama(Config.from_dict(raw))
    assert ours.config.max_position_embeddings == longest and ours.config.raw == raw
    scramble(ours)
    kind = {name: value for name, value in raw.items() if name not in ("model_type", "architectures")}
    theirs = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(raw["model_type"], **kind),
                                                           attn_implementation="eager").eval()
    theirs.load_state_dict(ours.state_dict())
    ids = torch.randint(0, 97, (1, min(longest, 128) + 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        apart = (ours(ids) - theirs(ids).logits).abs().amax(-1)[0]
    assert apart[:longest].max() < 2e-4
    assert longest != 64 or apart[longest:].max() > 1e-2, "the test should see the window slide"


def test_real_configs_are_read_or_refused(assets):
    """Parameter counts of real models on the meta device, as published; quantized ones refused."""
    published = {"tt-metal_Llama-3.1-8B-Instruct": 8030261248, "tt-metal_Llama-3.2-1B-Instruct": 1235814400, "tt-metal_Qwen2.5-7B-Instruct": 7615616512,
                 "tt-metal_Qwen3-8B": 8190735360, "tt-metal_Mistral-7B-Instruct-v0.3": 7248023552, "TinyLlama-1.1B-Chat-v1.0": 1100048384,
                 "DeepSeek-R1-Distill-Qwen-32B": 32763876352}
    for name, count in published.items():
        config = Config.from_dict(json.loads((assets / "configs" / f"{name}_config.json").read_text()))
        with torch.device("meta"):
            assert sum(p.numel() for p in Llama(config).parameters()) == count, name
    for path in (assets / "configs").glob("*"):
        if "GPTQ" in path.name or "8bit" in path.name:
            with pytest.raises(CheckpointError, match="quantization_config"):
                Config.from_dict(json.loads(path.read_text()))


def test_loading_is_strict_and_lists_what_is_wrong(tmp_path):
    """Missing, unexpected and mis-shaped tensors, each by name; a pickle is not read; a shard may not lie outside the folder."""
    tiny_model().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    bad = {k: v for k, v in tensors.items() if k != "model.norm.weight"}
    bad["model.layers.0.mlp.up_proj.weight"] = bad["model.layers.0.mlp.up_proj.weight"].T.contiguous()
    bad["model.layers.1.mlp.down_proj.weight"] = bad["model.layers.1.mlp.down_proj.weight"].to(torch.int8)
    bad["model.layers.9.mlp.up_proj.weight"] = torch.zeros(1)
    save_file(bad, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError) as e:
        Llama.from_pretrained(tmp_path)
    assert "is there for" not in str(e.value)
    for part in ("missing: model.norm.weight (32,)", "unexpected: model.layers.9.mlp.up_proj.weight", "wrong dtype: model.layers.1.mlp.down_proj.weight is I8",
                 "wrong shape: model.layers.0.mlp.up_proj.weight is (32, 56), config.json says (56, 32)"):
        assert part in str(e.value)

    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pytorch_model.bin: convert it to safetensors"):
        Llama.from_pretrained(tmp_path)
    for place in ("../elsewhere.safetensors", "/etc/passwd", "sub/x.safetensors", ["x"]):
        write_json(tmp_path / "model.safetensors.index.json", {"weight_map": {"model.norm.weight": place}})
        with pytest.raises(CheckpointError, match="plain file name"):
            Llama.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    (tmp_path / "model.safetensors").write_bytes((1 << 40).to_bytes(8, "little") + b"{}")
    with pytest.raises(CheckpointError, match="cannot be read as safetensors"):
        Llama.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="no such folder"):
        Llama.from_pretrained(tmp_path / "nowhere")


def wrapped(change):
    return lambda tensors: {change(name): t for name, t in tensors.items()}


@pytest.mark.parametrize("change, found", [
    (wrapped(lambda n: "module." + n), "module.lm_head.weight is there for lm_head.weight, and 20 more so"),
    (wrapped(lambda n: "_orig_mod.module." + n), "_orig_mod.module.lm_head.weight is there for lm_head.weight"),
    (wrapped(lambda n: n.replace("layers.0.", "layers.0._checkpoint_wrapped_module.")),
     "model.layers.0._checkpoint_wrapped_module.input_layernorm.weight is there for model.layers.0.input_layernorm.weight"),
    (wrapped(lambda n: "base_model.model." + n), "base_model.model.lm_head.weight is there for lm_head.weight"),
    (wrapped(lambda n: "model." + n), "model.lm_head.weight is there for lm_head.weight"),
    (wrapped(lambda n: "language_model." + n), "language_model.lm_head.weight is there for lm_head.weight"),
    (wrapped(lambda n: n.removeprefix("model.")), "embed_tokens.weight is there for model.embed_tokens.weight"),
    (wrapped(lambda n: n.replace("q_proj.", "q_proj.base_layer.")), "q_proj.base_layer.weight is of a LoRA adapter: merge it"),
    (lambda t: t | {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(2)}, "is of a LoRA adapter: merge it"),
    (wrapped(lambda n: n.replace("q_proj.weight", "q_proj.qweight")), "q_proj.qweight is quantized: use the unquantized weights"),
    (lambda t: {n: w for n, w in t.items() if n != "lm_head.weight"}, "missing: lm_head.weight .*tie_word_embeddings true"),
], ids=lambda value: value if isinstance(value, str) else "")
def test_names_that_do_not_fit_are_told_with_their_cause(tmp_path, change, found):
    """A wrapper's prefix, anywhere in the name, is named before what is missing; so are adapters, quantized weights, a head
    that should be tied."""
    tiny_model().save_pretrained(tmp_path)
    save_file(change(load_file(tmp_path / "model.safetensors")), tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError) as e:
        Llama.from_pretrained(tmp_path)
    first = str(e.value).splitlines()[1]
    assert re.search(found, first) and len(str(e.value).splitlines()) < 25


def test_a_head_beside_a_tied_config_is_used_as_transformers_does(tmp_path, capsys):
    """The same numbers as transformers, a line that says so, and a saved folder that means the same to everyone; a tied pair
    that a file holds twice stays tied."""
    transformers = pytest.importorskip("transformers", reason="transformers is the oracle of this test")
    tiny_model(tie_word_embeddings=True).save_pretrained(tmp_path / "a")
    tensors = load_file(tmp_path / "a" / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "a" / "model.safetensors", metadata={"format": "pt"})
    model = Llama.from_pretrained(tmp_path / "a")
    assert model.lm_head.weight is model.model.embed_tokens.weight and capsys.readouterr().err == ""

    tensors["lm_head.weight"][50] += 1
    save_file(tensors, tmp_path / "a" / "model.safetensors", metadata={"format": "pt"})
    model = Llama.from_pretrained(tmp_path / "a")
    assert "lm_head.weight is there, and not the embedding" in capsys.readouterr().err
    model.save_pretrained(tmp_path / "b")
    ids = torch.arange(90)[None]
    for folder in "ab":
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / folder, attn_implementation="eager")
        with torch.no_grad():
            assert (theirs(ids).logits - model(ids)).abs().max() < 1e-5
    assert json.loads((tmp_path / "b" / "config.json").read_text())["tie_word_embeddings"] is False
    assert torch.equal(Llama.from_pretrained(tmp_path / "b").lm_head.weight, tensors["lm_head.weight"])


@pytest.mark.parametrize("value, dtype, ok", [(float("nan"), torch.float32, False), (float("-inf"), torch.bfloat16, False),
                                              (1e6, torch.float32, True), (1e6, torch.float16, False)])
def test_numbers_that_are_none_are_named_when_weights_are_read(tmp_path, value, dtype, ok):
    """NaN, infinity, and what is infinite in the dtype that is asked for: the file and the tensor, before anything runs."""
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = value
    model.save_pretrained(tmp_path)
    if ok:
        Llama.from_pretrained(tmp_path, dtype)
    else:
        with pytest.raises(CheckpointError, match="model.safetensors: model.layers.1.mlp.up_proj.weight holds NaN or infinite"):
            Llama.from_pretrained(tmp_path, dtype)


def test_a_folder_that_is_no_checkpoint_is_told_what_it_is(tmp_path):
    """An adapter, GGUF, pickle, a maker's own layout, shards without index, a shard that was not fetched, a pointer of Git LFS,
    weights that are there twice: each by name, with the way out."""
    def found(*parts):
        with pytest.raises(CheckpointError) as e:
            Llama.from_pretrained(folder)
        assert all(part in str(e.value) for part in parts), str(e.value)

    folder = tmp_path / "a"
    folder.mkdir()
    found("config.json: no such file", "a checkpoint folder holds")
    (folder / "params.json").write_text("{}")
    found("params.json", "Hugging Face's layout")
    (folder / "x.Q4_K_M.gguf").write_bytes(b"GGUF")
    found("x.Q4_K_M.gguf", "inference only")
    write_json(folder / "config.json", tiny_config())
    (folder / "x.Q4_K_M.gguf").unlink()
    tiny_model().save_pretrained(tmp_path / "b", shard_bytes=20000)
    for path in sorted((tmp_path / "b").glob("model-*"))[1:]:
        shutil.copy(path, folder)
    found("model-00002-of-00006.safetensors", "the shards that an index names")
    shutil.copy(tmp_path / "b" / "model.safetensors.index.json", folder)
    found("model-00001-of-00006.safetensors not there (1 of 6 files that model.safetensors.index.json names)")
    (folder / "model-00001-of-00006.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    found("model-00001-of-00006.safetensors: holds a Git LFS pointer", "git lfs pull")
    folder = tmp_path / "b"
    tiny_model(seed=1).save_pretrained(tmp_path / "c")
    shutil.copy(tmp_path / "c" / "model.safetensors", folder)
    found("the weights twice", "model.safetensors.index.json")
    (folder / "model-00003-of-00006.safetensors").unlink()          # the index is a left-over: as transformers takes it
    assert torch.equal(Llama.from_pretrained(folder).lm_head.weight, tiny_model(seed=1).lm_head.weight)
    folder = tmp_path
    found("config.json: no such file", "found a/config.json")
    folder = tmp_path / "c" / "model.safetensors"
    found("is a file; give the folder")


def test_what_is_saved_can_be_served(tmp_path):
    """OUT names the class that other programs look for, and no code that is not there; end tokens that cannot be are gone once
    it learned to end; the chat template's file comes along and counts in the fingerprint."""
    folder = tmp_path / "a"
    tiny_model().save_pretrained(folder)
    raw = json.loads((folder / "config.json").read_text())
    del raw["architectures"]
    write_json(folder / "config.json", raw | {"auto_map": {"AutoConfig": "configuration_x.X"}, "eos_token_id": [-1, 2, 10**6], "dtype": "float16"})
    write_json(folder / "tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["tokenization_x.X", None]}, "eos_token": "</s>"})
    write_json(folder / "generation_config.json", {"eos_token_id": 2, "temperature": 0.7})
    write_json(folder / "chat_template.json", {"chat_template": "x"})
    model = Llama.from_pretrained(folder)
    model.save_pretrained(tmp_path / "b", torch.bfloat16, eos_ids=(2, 5))
    saved = {path.name: json.loads(path.read_text()) for path in (tmp_path / "b").glob("*.json")}
    assert saved["config.json"]["architectures"] == ["LlamaForCausalLM"] and saved["config.json"]["eos_token_id"] == [2, 5]
    assert saved["config.json"]["dtype"] == saved["config.json"]["torch_dtype"] == "bfloat16"
    assert saved["generation_config.json"] == {"eos_token_id": [2, 5], "temperature": 0.7}
    assert saved["tokenizer_config.json"] == {"eos_token": "</s>"} and saved["chat_template.json"] == {"chat_template": "x"}
    assert not any("auto_map" in value for value in saved.values())
    before = fingerprint(folder)
    write_json(folder / "chat_template.json", {"chat_template": "y"})
    assert fingerprint(folder) != before


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.bfloat16), (torch.float32, torch.bfloat16), (torch.float16, torch.bfloat16)])
def test_averaged_checkpoints(tmp_path, dtypes):
    """At weights 1 and 0 the end points bit for bit, in a dtype that holds both; between them the sum that fp32 gives; beyond
    them too. Config and tokenizer are the first's."""
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<unk>": 0, "a": 1}, "<unk>"))
    folders = [tmp_path / "a", tmp_path / "b"]
    for seed, (folder, dtype) in enumerate(zip(folders, dtypes)):
        model = tiny_model(seed, my_extra=seed)
        scramble(model, seed)
        model.save_pretrained(folder, dtype)
        vocabulary.save(str(folder / "tokenizer.json"))
    a, b = (load_file(folder / "model.safetensors") for folder in folders)
    held = torch.promote_types(*dtypes)
    for weights in ((1, 0), (0, 1), (0.25, 0.75), (1.5, -0.5)):
        average_checkpoints(folders, weights, tmp_path / "out")
        made = load_file(tmp_path / "out" / "model.safetensors")
        assert made.keys() == a.keys()
        for name, t in made.items():
            expected = {(1, 0): a[name], (0, 1): b[name]}.get(weights)
            if expected is None:
                expected = a[name].float() * weights[0] + b[name].float() * weights[1]
            assert t.dtype == held and torch.equal(t, expected.to(held))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["my_extra"] == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]


def test_checkpoints_that_are_not_alike_are_not_averaged(tmp_path):
    """Another shape, another theta behind the same shapes, another vocabulary, weights that do not add up, OUT in the way: said by
    name, and nothing written."""
    tokenizers = pytest.importorskip("tokenizers")
    for name, changes in dict(a={}, wide=dict(intermediate_size=64), theta=dict(rope_theta=5e5), words={}).items():
        tiny_model(**changes).save_pretrained(tmp_path / name)
        words = {"<unk>": 0, "x" if name == "words" else "a": 1}
        tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "<unk>")).save(str(tmp_path / name / "tokenizer.json"))
    for other, weights, out, found in (("wide", (1, 0), "out", "wide: intermediate_size is 64, in .*a 56"),
                                       ("theta", (0.5, 0.5), "out", "theta: rope_theta is 500000.0, in .*a 10000.0"),
                                       ("words", (0.5, 0.5), "out", "words: its tokenizer.json numbers other tokens"),
                                       ("a", (0.33, 0.33), "out", "sum 1"), ("a", (1,), "out", "one for each of 2"),
                                       ("wide", (0.5, 0.5), "a", "a: is one of the checkpoints")):
        with pytest.raises(ValueError, match=found):
            average_checkpoints([tmp_path / "a", tmp_path / other], weights, tmp_path / out)
        assert not (tmp_path / "out").exists()


def test_shards_unknown_keys_and_tokenizer_files_survive_a_save(tmp_path):
    """Saved in shards and loaded again: equal weights; config.json's own extras and the tokenizer's files come along; old layouts do not stay behind."""
    model = tiny_model(my_extra={"kept": [1, 2]}, torch_dtype="bfloat16")
    model.save_pretrained(tmp_path / "a")
    (tmp_path / "a" / "tokenizer.json").write_text("{}")
    model = Llama.from_pretrained(tmp_path / "a")
    model.save_pretrained(tmp_path / "b", shard_bytes=20000)
    files = sorted(p.name for p in (tmp_path / "b").iterdir())
    assert "model.safetensors.index.json" in files and "tokenizer.json" in files and len(files) >= 6 and "model.safetensors" not in files
    again = Llama.from_pretrained(tmp_path / "b")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    assert config["my_extra"] == {"kept": [1, 2]} and config["torch_dtype"] == "float32"
    again.save_pretrained(tmp_path / "b", dtype=torch.bfloat16)
    assert sorted(p.name for p in (tmp_path / "b").iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert load_file(tmp_path / "b" / "model.safetensors")["lm_head.weight"].dtype == torch.bfloat16


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of resident memory from /proc")
def test_loading_peaks_at_the_models_own_size(tmp_path):
    """At most 1.2 x: built on the meta device, filled tensor by tensor, the file's pages let go. Measured in a process of its own."""
    model = tiny_model(vocab_size=8000, hidden_size=512, intermediate_size=1536, num_hidden_layers=24)
    size = sum(p.numel() * 4 for p in model.parameters())
    model.save_pretrained(tmp_path / "large")
    tiny_model().save_pretrained(tmp_path / "small")         # loaded first, so that what the libraries take for themselves is not counted
    del model
    code = ("import sys, re; from model import Llama\n"
            "read = lambda key: int(re.search(key + r':\\s+(\\d+)', open('/proc/self/status').read())[1]) * 1024\n"
            "Llama.from_pretrained(sys.argv[1] + '/small'); before = read('VmRSS')\n"
            "m = Llama.from_pretrained(sys.argv[1] + '/large'); print(read('VmHWM') - before)")
    out = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, cwd=ROOT, check=True, env=os.environ)
    shutil.rmtree(tmp_path)
    assert size < int(out.stdout) <= 1.2 * size, f"{int(out.stdout) / size:.2f} x"
