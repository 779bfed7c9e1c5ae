"""A Llama-architecture language model, from config.json to logits to text, in one file.

    tokens -> embedding -> [ norm -> attention -> + -> norm -> SwiGLU -> + ] x layers -> norm -> lm_head -> logits

Llama 2/3, Qwen 1.5/2/2.5/3 (dense) and Mistral differ only in numbers and in a few optional pieces, so they are one class with different data in
`Config`, not a class each. Modules carry Hugging Face's names: `state_dict()` keys equal the checkpoint's, and loading is strict, without a converter.

What a token may look at is not the model's business but an argument, `attend(layer, q, k, v)`:

    causal     every token sees the tokens before it: ordinary rows, (B, T)
    Tree       many texts in one flat row, where a text may branch: a Step-DPO pair is prompt + steps, then s_win | s_lose
    KVCache    generation: prompts are kept once, however many samples grow from each

Shapes: B batch, T tokens of a row, N tokens of a flat row, C hidden size, H query heads, G key/value heads, D head size, V vocabulary.
"""
import ctypes
import hashlib
import inspect
import json
import math
import os
import platform
import re
import shutil
import sys
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, NamedTuple, Sequence

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from torch.nn.attention.varlen import varlen_attn
from torch.utils.checkpoint import checkpoint

try:
    import fcntl
except ImportError:              # Windows
    fcntl = None


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file or field, what was found and what to do."""


# ---------------------------------------------------------------------------------------------------------------------
# config.json

FAMILIES = ("llama", "qwen2", "qwen3", "mistral")


@dataclass
class Config:
    """The fields of config.json that decide the arithmetic, in Hugging Face's spelling; `raw` keeps the whole file."""
    vocab_size: int
    hidden_size: int                  # C
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int          # H
    num_key_value_heads: int          # G: H for multi-head, 1 for multi-query, between for grouped-query attention
    head_dim: int                     # D
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # None, or {"rope_type": "linear", ...} or {"rope_type": "llama3", ...}
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False             # Qwen3: RMSNorm on every head's q and k, before the rotation
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    raw: dict | None = None

    @classmethod
    def from_dict(cls, raw: dict, source: str = "config.json") -> "Config":
        """Read a parsed config.json, in the older spelling (`rope_theta`, `rope_scaling`, `torch_dtype`) or transformers 5's
        (`rope_parameters`, `dtype`). Raises CheckpointError naming the field when the model is of a kind that this file does not compute."""

        def refuse(field, why):
            raise CheckpointError(f"{source}: {field} is {raw.get(field)!r:.200}: {why}")

        def integer(field, default=None, most=2**24):
            value = default if raw.get(field) is None else raw[field]
            if type(value) is not int or not 1 <= value <= most:
                refuse(field, f"expected a whole number from 1 to {most}")
            return value

        def boolean(field):
            if raw.get(field) is not None and type(raw[field]) is not bool:
                refuse(field, "expected true or false")
            return bool(raw.get(field))

        def number(field, default, where=raw):
            value = default if where.get(field) is None else where[field]
            if type(value) not in (int, float) or not 1e-12 <= value <= 1e12:
                raise CheckpointError(f"{source}: {field} is {value!r:.200}: expected a number from 1e-12 to 1e12")
            return float(value)

        def token_ids(field):
            value = raw.get(field)
            ids = tuple(value) if isinstance(value, list) else () if value is None else (value,)
            if any(type(i) is not int or not 0 <= i < 2**24 for i in ids):
                refuse(field, "expected a token id or a list of them")
            return ids

        if not isinstance(raw, dict):
            raise CheckpointError(f"{source}: expected a JSON object, found {type(raw).__name__}")
        family = raw.get("model_type")
        if family not in FAMILIES:
            refuse("model_type", f"this model.py computes {', '.join(FAMILIES)} (dense Llama-architecture models) and nothing else")
        if raw.get("quantization_config"):
            refuse("quantization_config", "quantized weights cannot be trained; use the unquantized checkpoint")
        if (act := raw.get("hidden_act", raw.get("hidden_activation", "silu"))) not in ("silu", "swish"):
            refuse("hidden_act" if "hidden_act" in raw else "hidden_activation", f"the MLP here is SwiGLU (silu), not {act}")
        if raw.get("partial_rotary_factor") not in (None, 1, 1.0):
            refuse("partial_rotary_factor", "only rotation of the whole head is computed")

        longest = integer("max_position_embeddings", 2048, 2**31)
        window = raw.get("sliding_window")
        # Qwen files carry a window that `use_sliding_window: false` switches off; Mistral's is in force whenever it is shorter than the context.
        in_force = raw.get("use_sliding_window", family == "mistral")
        if window is not None and in_force and (type(window) is not int or window < longest):
            refuse("sliding_window", "attention here has no sliding window; use a checkpoint where it is null or switched off")
        if (kinds := raw.get("layer_types")) and (type(kinds) is not list or any(kind != "full_attention" for kind in kinds)):
            refuse("layer_types", "only full_attention layers are computed")

        # transformers 5 moved theta and the scaling into one object
        rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
        field = "rope_parameters" if raw.get("rope_parameters") else "rope_scaling"
        if not isinstance(rope, dict):
            refuse(field, "expected an object")
        kind = rope.get("rope_type", rope.get("type", None if "factor" in rope else "default"))
        needs = {"default": (), "linear": ("factor",),
                 "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")}
        if not isinstance(kind, str) or kind not in needs:
            refuse(field, f"rope type {kind!r} is not computed; {', '.join(needs)} are")
        scaling = {"rope_type": kind, **{key: number(key, None, rope) for key in needs[kind]}} if kind != "default" else None
        if kind == "llama3" and scaling["high_freq_factor"] <= scaling["low_freq_factor"]:
            refuse(field, "high_freq_factor must be above low_freq_factor")

        heads = integer("num_attention_heads", most=2**16)
        kv_heads = integer("num_key_value_heads", heads, most=2**16)
        hidden = integer("hidden_size")
        head_dim = integer("head_dim", hidden // heads)
        if heads * head_dim > 2**24:      # and with it every matrix has less than 2^48 elements
            refuse("head_dim", f"{heads} heads of {head_dim} are more than the {2**24} dimensions that are possible")
        if heads % kv_heads:
            refuse("num_key_value_heads", f"must divide num_attention_heads = {heads}")
        if head_dim % 2:
            refuse("head_dim", "must be even: the rotation turns pairs")

        bias = boolean("attention_bias")
        return cls(
            vocab_size=integer("vocab_size"), hidden_size=hidden, intermediate_size=integer("intermediate_size"),
            num_hidden_layers=integer("num_hidden_layers", most=1024), num_attention_heads=heads, num_key_value_heads=kv_heads,
            head_dim=head_dim, rms_norm_eps=number("rms_norm_eps", 1e-6), rope_theta=number("rope_theta", number("rope_theta", 10000.0), rope),
            rope_scaling=scaling, max_position_embeddings=longest, tie_word_embeddings=boolean("tie_word_embeddings"),
            qkv_bias=family == "qwen2" or (bias and family != "mistral"), o_bias=bias and family in ("llama", "qwen3"),
            mlp_bias=boolean("mlp_bias") and family == "llama", qk_norm=family == "qwen3",
            initializer_range=number("initializer_range", 0.02), bos_token_id=(*token_ids("bos_token_id"), None)[0], eos_token_ids=token_ids("eos_token_id"), raw=dict(raw))


# ---------------------------------------------------------------------------------------------------------------------
# who sees whom: attention for ordinary rows and for flat rows of branching texts

Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]   # (layer, q (B,H,T,D), k and v (B,G,T,D)) -> (B,H,T,D)


def causal(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """softmax(q k^T / sqrt(D)) v over the tokens up to one's own. Padding on the right needs no mask: no real token looks that way."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])


class Tree:
    """Attention for texts laid end to end in one flat row of N tokens, without padding and without a mask of N x N.

    The row is a list of segments. A segment sees itself causally, and the whole of its parent, its parent's parent, and so on; `parents[j]` is the
    index of an earlier segment, or -1. Independent texts are segments without parents. A preference pair is three segments,

        lengths [P, S_win, S_lose]      parents [-1, 0, 0]      positions 0..P-1 | P..P+S_win-1 | P..P+S_lose-1

    so the shared prefix runs through the network once: P + 2S tokens of work instead of 2(P + S), for the same numbers (Wang & Hegde
    2024, arXiv 2410.20305, do the same with a block mask).
    """

    def __init__(self, lengths: list[int], parents: list[int]):
        self.lengths = lengths
        self.ancestors: list[list[int]] = []                # of each segment, oldest first
        for j, parent in enumerate(parents):
            if not -1 <= parent < j:
                raise ValueError(f"segment {j}: its parent must be an earlier segment or -1, found {parent}")
            self.ancestors.append([] if parent < 0 else self.ancestors[parent] + [parent])
        self.masks: dict = {}
        self.table: tuple | None = None                     # of `in_one_call`

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if v.is_cuda and v.dtype in (torch.bfloat16, torch.float16) and v.shape[-1] % 8 == 0 and v.shape[-1] <= 256 \
                and torch.cuda.get_device_capability(v.device) >= (8, 0):                    # what FlashAttention takes
            return self.in_one_call(q, k, v)
        q, k, v = (x.split(self.lengths, dim=2) for x in (q, k, v))
        out = []
        for j, ancestors in enumerate(self.ancestors):
            if not ancestors:
                out.append(causal(layer, q[j], k[j], v[j]))
                continue
            keys = torch.cat([k[a] for a in ancestors] + [k[j]], dim=2)
            values = torch.cat([v[a] for a in ancestors] + [v[j]], dim=2)
            own = self.lengths[j]
            mask = self.lower_right(own, keys.shape[2] - own, keys.device)
            out.append(F.scaled_dot_product_attention(q[j], keys, values, attn_mask=mask, enable_gqa=q[j].shape[1] != keys.shape[1]))
        return torch.cat(out, dim=2)

    def lower_right(self, own: int, before: int, device) -> torch.Tensor:
        """(own, before + own), True where seen: everything before, and oneself causally."""
        key = own, before, device
        if key not in self.masks:
            self.masks[key] = torch.ones(own, before + own, dtype=torch.bool, device=device).tril(before)
        return self.masks[key]

    def in_one_call(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """The same on a GPU in half precision, where a launch for each segment would cost more than its arithmetic: FlashAttention for texts of unequal lengths.
        Segment j is a text that asks with its own tokens and is answered by its ancestors' and its own; the kernel aligns the causal mask to the lower right."""
        if self.table is None:
            ends = np.cumsum(self.lengths)
            places = [np.concatenate([np.arange(ends[i] - self.lengths[i], ends[i]) for i in (*ancestors, j)]) for j, ancestors in enumerate(self.ancestors)]
            limits = lambda lengths: torch.from_numpy(np.cumsum([0, *lengths], dtype=np.int32)).to(v.device)
            self.table = (torch.from_numpy(np.concatenate(places)).to(v.device), limits(self.lengths), limits(map(len, places)),
                          max(self.lengths), max(map(len, places)))
        places, queries_end, keys_end, longest_query, longest_key = self.table
        q, k, v = (x[0].transpose(0, 1).to(v.dtype) for x in (q, k, v))                                              # (N, H or G, D)
        y = varlen_attn(q, k[places], v[places], queries_end, keys_end, longest_query, longest_key, window_size=(-1, 0), **VARLEN_GQA)
        return y.transpose(0, 1)[None]


LEAST_SHARED = 16     # tokens that texts of different rows must have in common: for less, one segment more costs what it saves


class Layout(NamedTuple):
    """Texts as one flat row of N tokens, in the form that a `Tree` takes."""
    tokens: np.ndarray            # (N,) int64
    positions: np.ndarray         # (N,) int64: the place of each token in its text
    lengths: list[int]            # tokens of each segment
    parents: list[int]            # the segment that each one continues; -1 for none
    places: list[np.ndarray]      # of each text: where its tokens are in the flat row


def lay_out(texts: Sequence[np.ndarray], rows: Sequence[int] | None = None) -> Layout:
    """Lay texts (token ids, none empty) into a radix tree: whatever begins alike is one segment, and is computed once.

    Texts of one row (rows[i]: the row of text i; by default each is its own) share all they have in common, those of different rows from
    LEAST_SHARED tokens on. Segments stand in the order of first appearance, branches behind their trunk: a pair gives trunk, chosen, rejected."""
    tokens: list[np.ndarray] = []                        # of each segment
    branches: list[dict[int, int]] = []                  # of each segment: first token of a continuation -> its segment
    roots: dict = {}                                     # name of a beginning -> its segment

    def new_segment(part: np.ndarray) -> int:
        tokens.append(part)
        branches.append({})
        return len(tokens) - 1

    def names_of(i: int) -> list:
        own_row = (i if rows is None else rows[i], int(texts[i][0]))
        return [own_row, texts[i][:LEAST_SHARED].tobytes()] if len(texts[i]) >= LEAST_SHARED else [own_row]

    for i, rest in enumerate(texts):
        names = names_of(i)
        at = next((roots[name] for name in names if name in roots), None)
        if at is None:
            at, rest = new_segment(rest), rest[:0]
        for name in names:
            roots.setdefault(name, at)
        while len(rest):
            common = common_length(tokens[at], rest)
            rest = rest[common:]
            if common < len(tokens[at]) and len(rest):   # the text leaves in the middle: what was one segment is a trunk and a branch
                behind = new_segment(tokens[at][common:])
                branches[behind] = branches[at]
                tokens[at], branches[at] = tokens[at][:common], {int(tokens[behind][0]): behind}
            if len(rest) and int(rest[0]) not in branches[at]:
                branches[at][int(rest[0])] = new_segment(rest)
                break
            at = branches[at][int(rest[0])] if len(rest) else at

    order, parents, first, begin, end = [], [], {}, {}, 0
    todo = [(root, -1, 0) for root in reversed(dict.fromkeys(roots[names_of(i)[0]] for i in range(len(texts))))]
    while todo:                                          # trunk before branches, the first met first
        at, parent, first[at] = todo.pop()
        begin[at], end = end, end + len(tokens[at])
        todo += [(branch, len(order), first[at] + len(tokens[at])) for branch in reversed(branches[at].values())]
        order.append(at)
        parents.append(parent)

    def places_of(i: int) -> np.ndarray:
        at, left, found = roots[names_of(i)[0]], texts[i], []
        while True:
            own = min(len(left), len(tokens[at]))
            found.append(np.arange(begin[at], begin[at] + own))
            left = left[own:]
            if not len(left):
                return np.concatenate(found)
            at = branches[at][int(left[0])]

    positions = [np.arange(first[at], first[at] + len(tokens[at])) for at in order]
    return Layout(np.concatenate([tokens[at] for at in order]).astype(np.int64), np.concatenate(positions), [len(tokens[at]) for at in order],
                  parents, [places_of(i) for i in range(len(texts))])


def common_length(a: np.ndarray, b: np.ndarray) -> int:
    """How many tokens two texts have in common at their beginning."""
    shorter = min(len(a), len(b))
    differ = np.flatnonzero(a[:shorter] != b[:shorter])
    return int(differ[0]) if len(differ) else shorter


# torch 2.11's varlen_attn takes grouped heads as they come, later ones want it said
VARLEN_GQA = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


# ---------------------------------------------------------------------------------------------------------------------
# the network, small to large

class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):   # x / sqrt(mean(x^2) + eps) * weight; F.rms_norm takes the mean in fp32 whatever x is
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


def rope_frequencies(config: Config, device) -> torch.Tensor:
    """(D/2,) radians per position: pair i turns by theta^(-2i/D), slowed for long contexts as `rope_scaling` says."""
    freq = config.rope_theta ** -(torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device) / config.head_dim)
    scaling = config.rope_scaling
    if scaling is None:
        return freq
    if scaling["rope_type"] == "linear":
        return freq / scaling["factor"]
    # llama3: slow waves (few turns within the original context) are slowed by `factor`, fast ones are kept, with a linear blend between
    turns = scaling["original_max_position_embeddings"] * freq / (2 * math.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return freq * keep + freq / scaling["factor"] * (1 - keep)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x (B, heads, T, D), cos and sin (..., T, D/2). Hugging Face's layout pairs x[i] with x[i + D/2], the two halves of a head;

        [ a0 a1 a2 a3 | b0 b1 b2 b3 ]     (a_i, b_i) turns by position * freq_i

    Meta's original release pairs neighbours (x[2i], x[2i+1]); its q and k weights are a permutation of these, and mixing the two fails in silence."""
    a, b = x.chunk(2, dim=-1)
    turned = torch.empty_like(x)
    first, second = turned.chunk(2, dim=-1)
    torch.mul(a, cos, out=first).addcmul_(b, sin, value=-1)
    torch.mul(b, cos, out=second).addcmul_(a, sin)
    return turned


class Rotate(torch.autograd.Function):
    """`rotate` with its gradient, which is the rotation back: half the passes over memory that autograd would make."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return rotate(x, cos, sin)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        return rotate(grad, cos, -sin), None, None


class Attention(nn.Module):
    def __init__(self, config: Config, layer: int):
        super().__init__()
        c, self.layer, self.head_dim = config, layer, config.head_dim
        self.q_proj = nn.Linear(c.hidden_size, c.num_attention_heads * c.head_dim, bias=c.qkv_bias)
        self.k_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=c.qkv_bias)
        self.v_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=c.qkv_bias)
        self.o_proj = nn.Linear(c.num_attention_heads * c.head_dim, c.hidden_size, bias=c.o_bias)
        self.q_norm = RMSNorm(c.head_dim, c.rms_norm_eps) if c.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(c.head_dim, c.rms_norm_eps) if c.qk_norm else nn.Identity()

    def forward(self, x, cos, sin, attend: Attend, at=None):
        B, T, _ = x.shape
        q = self.q_norm(self.q_proj(x).view(B, T, -1, self.head_dim)).transpose(1, 2)       # (B, H, T, D)
        k = self.k_norm(self.k_proj(x).view(B, T, -1, self.head_dim)).transpose(1, 2)       # (B, G, T, D)
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)                    # (B, G, T, D)
        cos, sin = cos.to(q.dtype), sin.to(q.dtype)
        y = attend(self.layer, Rotate.apply(q, cos, sin), Rotate.apply(k, cos, sin), v)     # (B, H, T, D)
        y = y.transpose(1, 2).reshape(B, T, -1)
        return self.o_proj(y if at is None else y.index_select(1, at))


class SwiGLU(torch.autograd.Function):
    """silu(gate) * up. silu(gate) is made again for the gradient instead of kept: a quarter less of the MLP's activations, which are the most of a block's."""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)


class MLP(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x):
        return self.down_proj(SwiGLU.apply(self.gate_proj(x), self.up_proj(x)))


class Block(nn.Module):
    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, cos, sin, attend: Attend, at=None):
        """x (B, T, C) -> (B, T, C), or (B, M, C) for the positions `at` (M,) alone: all positions give keys and values, but only those the rest."""
        y = self.self_attn(for_products(self.input_layernorm(x)), cos, sin, attend, at)
        x = y + (x if at is None else x.index_select(1, at))
        return x + self.mlp(for_products(self.post_attention_layernorm(x)))


def for_products(x: torch.Tensor) -> torch.Tensor:
    """Under autocast x in its dtype, once: otherwise every product that reads x makes a copy of its own, and keeps it for the gradient."""
    return x.to(torch.get_autocast_dtype(x.device.type)) if torch.is_autocast_enabled(x.device.type) else x


class Decoder(nn.Module):
    """Everything below the vocabulary; Hugging Face's keys call it `model.`"""

    def __init__(self, config: Config):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Llama(nn.Module):
    """`Llama(config)` has uninitialised weights: call `init_weights(seed)`, or build with `Llama.from_pretrained(folder_or_hub_id)`."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.source: Path | None = None          # the folder it was loaded from, whose tokenizer files `save_pretrained` copies along
        self.gradient_checkpointing = False      # recompute each block in the backward pass instead of keeping its activations
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie_weights()

    def tie_weights(self):
        if self.config.tie_word_embeddings:      # one parameter under two names: it is counted, trained and saved once
            self.lm_head.weight = self.model.embed_tokens.weight

    def hidden_states(self, input_ids: torch.Tensor, position_ids: torch.Tensor | None = None, attend: Attend = causal,
                      at: torch.Tensor | None = None) -> torch.Tensor:
        """(B, T) token ids -> (B, T, C), what lm_head reads. position_ids: (T,) or (B, T), 0..T-1 by default; a `Tree` wants (1, N) ids and its own positions.

        at (M,): these positions alone are wanted, (B, M, C). Nobody looks at the others once the last block has their keys and values, so its output
        projection and MLP, most of its work, leave them out; of a preference pair that is the whole prefix."""
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)
        angles = position_ids[..., None].float() * rope_frequencies(self.config, input_ids.device)     # ((B,) T, D/2)
        if angles.dim() == 3:
            angles = angles[:, None]                                                                    # (B, 1, T, D/2): the same for all heads
        cos, sin = angles.cos(), angles.sin()
        x = self.model.embed_tokens(input_ids)
        for block in self.model.layers:
            wanted = at if block is self.model.layers[-1] else None
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, cos, sin, attend, wanted, use_reentrant=False, preserve_rng_state=False)      # nothing here draws
            else:
                x = block(x, cos, sin, attend, wanted)
        return self.model.norm(x)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """(B, T) token ids, padded on the right if at all -> (B, T, V) logits; logits at t score token t + 1."""
        return self.lm_head(self.hidden_states(input_ids))

    @torch.no_grad()
    def init_weights(self, seed: int) -> "Llama":
        """Normal(0, initializer_range) matrices, unit norms, zero biases: what transformers does for these families."""
        generator = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                p.copy_(torch.empty(p.shape).normal_(0, self.config.initializer_range, generator=generator))
            else:
                p.fill_(0.0 if name.endswith("bias") else 1.0)
        return self

    @classmethod
    def from_pretrained(cls, folder_or_hub_id: str | os.PathLike, dtype: torch.dtype = torch.float32, device="cpu") -> "Llama":
        """Load a Hugging Face checkpoint: a folder, or a hub id when no such folder exists. Safetensors only, one file or a sharded index.

        Built on the meta device and filled tensor by tensor, so memory peaks at the model's own size and one tensor more.
        Raises CheckpointError listing every missing, unexpected or mis-shaped tensor by name, before any weight is read."""
        return cls.skeleton(folder_or_hub_id).read_weights(dtype, device)

    @classmethod
    def skeleton(cls, folder_or_hub_id: str | os.PathLike) -> "Llama":
        """The first half of `from_pretrained`: the checked model on the meta device, without weights. What is sharded now is read in shards."""
        folder = resolve(folder_or_hub_id)
        config = Config.from_dict(read_json(folder / "config.json"), str(folder / "config.json"))
        with torch.device("meta"):
            model = cls(config)
        files = weight_files(folder)                                     # tensor name -> file
        wanted = dict(model.named_parameters())                          # a tied lm_head is not in here
        optional = {name for name in files if name.endswith("rotary_emb.inv_freq")} | ({"lm_head.weight"} - set(wanted))
        complaints = [f"missing: {name} {tuple(p.shape)}" for name, p in wanted.items() if name not in files]
        complaints += [f"unexpected: {name}" for name in files if name not in wanted and name not in optional]
        for name, (path, shape, kind) in files.items():
            if name in wanted and tuple(shape) != tuple(wanted[name].shape):
                complaints.append(f"wrong shape: {name} is {tuple(shape)}, config.json says {tuple(wanted[name].shape)}")
            elif name in wanted and kind not in ("F64", "F32", "F16", "BF16"):
                complaints.append(f"wrong dtype: {name} is {kind}, expected F64, F32, F16 or BF16")
        if complaints:
            more = f"\n  ... and {len(complaints) - 20} more" if len(complaints) > 20 else ""
            raise CheckpointError(f"{folder}: the weights do not fit config.json:\n  " + "\n  ".join(complaints[:20]) + more)
        model.source = folder
        return model

    def read_weights(self, dtype: torch.dtype = torch.float32, device="cpu") -> "Llama":
        """The second half of `from_pretrained`: of a parameter that FSDP has cut by rows over the processes, this process reads its own rows only."""
        files = weight_files(self.source)
        for name, p in dict(self.named_parameters()).items():
            # The file is opened anew for each tensor: the mapping, and with it the memory of pages already read, goes away in between.
            with safe_open(files[name][0], framework="pt") as f:
                first, last = own_rows(p)
                tensor = f.get_slice(name)[first:last].to(device=device, dtype=dtype, copy=True)
            if isinstance(p, DTensor):
                tensor = DTensor.from_local(tensor, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride())
            owner, _, leaf = name.rpartition(".")
            setattr(self.get_submodule(owner), leaf, nn.Parameter(tensor))
        self.tie_weights()
        return self

    def save_pretrained(self, folder: str | os.PathLike, dtype: torch.dtype | None = None, shard_bytes: int = 5 * 10**9, eos_ids: tuple[int, ...] = ()):
        """Write config.json, model.safetensors (an index and shards above 5 GB) and the tokenizer files of the folder this model came from.

        config.json keeps every key it had; `eos_ids`, with which the model learned to end, join its eos_token_id, so that others stop there too.
        All files are first written aside (`.saving/`), then renamed into place, config.json last.
        A model that FSDP has spread over processes is saved by all of them together: rank 0 writes, and holds one of the files at a time."""
        folder = Path(folder)
        aside = folder / ".saving"
        params = {name: p.detach() for name, p in self.named_parameters()}
        dtype = dtype or next(iter(params.values())).dtype
        shards, room = [{}], shard_bytes
        for name, p in params.items():
            size = p.numel() * dtype.itemsize
            if size > room and shards[-1]:
                shards.append({})
                room = shard_bytes
            shards[-1][name] = p
            room -= size
        names = ["model.safetensors"] if len(shards) == 1 else \
            [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        writer = all(p.device_mesh.get_rank() == 0 for p in params.values() if isinstance(p, DTensor))
        if writer:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
        for filename, shard in zip(names, shards):
            tensors = {}
            for k, p in shard.items():
                p = whole(p.to(dtype))
                if writer:
                    tensors[k] = p.cpu().contiguous()
            if writer:
                save_file(tensors, aside / filename, metadata={"format": "pt"})
                (aside / filename).chmod(0o666 & ~current_umask())         # save_file makes files that only their owner can read
        if not writer:
            return
        if len(shards) > 1:
            index = {"metadata": {"total_size": sum(p.numel() for p in params.values()) * dtype.itemsize},
                     "weight_map": {k: filename for filename, shard in zip(names, shards) for k in shard}}
            (aside / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
        if self.source is not None and self.source.resolve() != folder.resolve():
            for filename in TOKENIZER_FILES:
                if (self.source / filename).is_file():
                    shutil.copyfile(self.source / filename, aside / filename)
        raw = dict(self.config.raw or {})
        raw["dtype" if "dtype" in raw else "torch_dtype"] = str(dtype).removeprefix("torch.")
        settings = {"config.json": raw}
        if (aside / "generation_config.json").is_file():
            settings["generation_config.json"] = read_json(aside / "generation_config.json")
        for filename, values in settings.items():
            known = values.get("eos_token_id")
            known = known if isinstance(known, list) else [] if known is None else [known]
            if new := [id for id in eos_ids if id not in known]:
                values["eos_token_id"] = known + new
            (aside / filename).write_text(json.dumps(values, indent=2) + "\n")

        files = sorted(aside.iterdir(), key=lambda p: p.name == "config.json")
        for stale in [*folder.glob("model*.safetensors"), *folder.glob("model.safetensors.index.json")]:
            if stale.name not in {p.name for p in files}:
                stale.unlink()
        for path in files:
            sync(path)
            os.replace(path, folder / path.name)
        aside.rmdir()


# ---------------------------------------------------------------------------------------------------------------------
# checkpoint files

def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def own_rows(p: torch.Tensor) -> tuple[int, int]:
    """First and last (exclusive) row of p on this process: all of them, or of a DTensor cut along dim 0 the chunk that torch.chunk gives this rank."""
    rows = len(p)
    each = -(-rows // p.device_mesh.size()) if isinstance(p, DTensor) else rows
    first = min(rows, each * p.device_mesh.get_local_rank()) if isinstance(p, DTensor) else 0
    return first, min(rows, first + each)


def whole(p: torch.Tensor) -> torch.Tensor:
    """A plain tensor from a plain one or a DTensor; for the latter all processes must call."""
    return p.full_tensor() if isinstance(p, DTensor) else p


TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json", "vocab.json",
                   "merges.txt", "chat_template.jinja", "generation_config.json")


def resolve(folder_or_hub_id: str | os.PathLike) -> Path:
    """The folder itself, or, when there is none of that name and it looks like `owner/name`, the hub's copy of it (downloaded once)."""
    folder = Path(folder_or_hub_id)
    if folder.is_dir():
        return folder
    parts = str(folder_or_hub_id).split("/")
    if folder.exists() or len(parts) != 2 or not all(parts) or parts[0] in (".", "..", "~"):
        raise CheckpointError(f"{folder}: no such folder (and not a hub id of the form owner/name)")
    from huggingface_hub import snapshot_download
    try:
        return Path(snapshot_download(str(folder_or_hub_id), allow_patterns=["*.safetensors", "*.safetensors.index.json", "config.json", *TOKENIZER_FILES]))
    except Exception as e:
        raise CheckpointError(f"{folder}: no such folder, and the hub did not give it either ({type(e).__name__}: {str(e).splitlines()[0]})") from None


def fingerprint(folder: Path) -> str:
    """sha256 of everything in a checkpoint's folder that decides what it computes: weights, config, tokenizer and templates, names included."""
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*.safetensors"), *(folder / name for name in ("config.json", *TOKENIZER_FILES))]):
        if path.is_file():
            with open(path, "rb") as f:
                digest.update(path.name.encode() + b"\0" + hashlib.file_digest(f, "sha256").digest())
    return digest.hexdigest()


def strict_json(raw: bytes, constant: Callable | None = None):
    """The value of a UTF-8 JSON text, with or without BOM. ValueError or RecursionError where it is none, names a
    key twice or holds a NaN or Infinity, unless `constant` makes a value of its name."""
    def unique(pairs):
        if len(value := dict(pairs)) < len(pairs):
            (twice, _), = Counter(key for key, _ in pairs).most_common(1)
            raise ValueError(f"the key {twice!r} stands there twice: which one is meant?")
        return value

    def refuse(name):
        raise ValueError(f"{name} is not JSON")

    return json.loads(raw.decode("utf-8-sig"), object_pairs_hook=unique, parse_constant=constant or refuse)


def read_json(path: Path) -> dict:
    """A JSON object from a checkpoint's folder; CheckpointError names the file."""
    try:
        value = strict_json(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; a checkpoint folder holds config.json, *.safetensors and tokenizer.json") from None
    except OSError as e:
        raise CheckpointError(f"{path}: cannot be read ({e.strerror})") from None
    except (ValueError, RecursionError) as e:
        raise CheckpointError(f"{path}: not valid JSON ({e}); fetch the file again") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(value).__name__}; fetch the file again")
    return value


@contextmanager
def writing(path: Path):
    """What cannot be written (a full disk, a read-only folder) ends in one error that names the file."""
    try:
        yield
    except (OSError, SafetensorError) as e:
        file, why = getattr(e, "filename", None) or path, getattr(e, "strerror", None) or e
        raise OSError(f"{file}: cannot be written ({why}); make room or repair its permissions, then the same command continues") from e


@contextmanager
def written(path: Path):
    """Yields a name to write to. The file then goes to the disk and is renamed to `path`, which is therefore whole or not there."""
    aside = path.with_name(path.name + ".tmp")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        yield aside
        sync(aside)
        os.replace(aside, path)


def sync(path: Path):
    """The file's bytes are on the disk afterwards. (Opened for writing, since Windows syncs nothing else.)"""
    with open(path, "rb+") as f:
        os.fsync(f.fileno())


@contextmanager
def locked(out: Path):
    """One command at a time writes `out`; a second one ends with a line that says who holds it.

    The lock is the operating system's, on the file OUT.lock: it ends with the process, however that ends, and a file that a killed one left behind
    holds nothing. Under torchrun rank 0 takes it for all. Where the file system knows no locks, there is none."""
    path, held = Path(f"{out}.lock"), None
    while fcntl is not None and os.environ.get("RANK", "0") == "0":
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            held = open(path, "a+")
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            held.seek(0)
            holder = held.read().strip() or "another process"
            held.close()
            raise OSError(f"{out}: is being written by {holder}; wait for it, end it, or choose another --out") from None
        except OSError:
            pass
        if path.exists() and os.path.samestat(os.fstat(held.fileno()), path.stat()):
            break                                        # else its last holder removed it between our open and our lock
        held.close()
    if held is not None:
        held.truncate(0)
        held.write(f"process {os.getpid()} on {platform.node()} ({' '.join([Path(sys.argv[0]).name, *sys.argv[1:]])[:200]})\n")
        held.flush()
    try:
        yield
    finally:
        if held is not None:
            path.unlink(missing_ok=True)                 # while the lock is held: nobody else's is taken away
            held.close()


def weight_files(folder: Path) -> dict[str, tuple[Path, list[int], str]]:
    """Tensor name -> (file, shape, dtype), read from the safetensors headers alone. Raises CheckpointError.

    A shard is a plain name: an index cannot point out of the folder. The file of that name may be a symbolic link, as all are in the hub's cache."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        placed = {folder / "model.safetensors": None}
    elif index.is_file():
        placed = {}
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise CheckpointError(f"{index}: weight_map is not an object of tensor names and files; fetch the file again")
        for name, filename in weight_map.items():
            if not isinstance(filename, str) or not re.fullmatch(r"[\w.-]+\.safetensors", filename, re.ASCII):
                raise CheckpointError(f"{index}: {name} is said to lie in {filename!r}; a shard must be a plain file name in this folder, *.safetensors")
            placed.setdefault(folder / filename, set()).add(name)
    else:
        other = [p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.gguf") for p in folder.glob(pattern)]
        hint = f" (found {other[0]}: convert it to safetensors first, pickle is never read here)" if other else ""
        raise CheckpointError(f"{folder}: neither model.safetensors nor model.safetensors.index.json{hint}")
    found = {}
    for path, names in placed.items():
        try:
            with safe_open(path, framework="pt") as f:
                here = {name: (path, list(s.get_shape()), s.get_dtype()) for name in f.keys() for s in [f.get_slice(name)]}
            with open(path, "rb") as f:                    # once more, for a tensor that is described twice: safetensors takes the last
                strict_json(f.read(int.from_bytes(f.read(8), "little")))
        except (SafetensorError, OSError, ValueError) as e:
            raise CheckpointError(f"{path}: cannot be read as safetensors ({e}); download it again") from None
        if names is not None and set(here) != names:
            odd = sorted(set(here) ^ names)[0]
            raise CheckpointError(f"{path}: {odd} is {'in the index but not in the file' if odd in names else 'in the file, where the index does not place it'}")
        found.update(here)
    return found


# ---------------------------------------------------------------------------------------------------------------------
# generation

@dataclass
class Sample:
    token_ids: list[int]      # the new tokens, without the EOS that ended them
    text: str | None          # their text, cut before the stop string; None when no `decode` was given
    stop_reason: str          # "eos", "stop" (a stop string) or "length"


class KVCache:
    """Keys and values of P prompts and of the grid of P x n samples that grow from them. A prompt's are stored once and read by its n samples
    together, as one matrix product instead of n. As an `attend`, it first takes the prompts (`prefill`), then one token a call for every row."""

    def __init__(self, lengths: list[int], n: int):
        self.lengths, self.n, self.t = lengths, n, 0                     # t: new tokens that every row has
        self.tree = Tree(lengths, [-1] * len(lengths))
        self.prompt: list = []                                           # per layer: k, v (P, G, longest prompt, D), zeros behind the shorter ones
        self.grown: list = []                                            # per layer: k, v (P*n, G, room for tokens, D)

    def prefill(self, layer, q, k, v):
        self.prompt.append(tuple(torch.nn.utils.rnn.pad_sequence([s[0].transpose(0, 1) for s in x.split(self.lengths, dim=2)], batch_first=True)
                                 .transpose(1, 2).contiguous() for x in (k, v)))
        self.grown.append(tuple(x.new_empty(len(self.lengths) * self.n, x.shape[1], 64, x.shape[3]) for x in (k, v)))
        return self.tree(layer, q, k, v)

    def __call__(self, layer, q, k, v):
        R, H, _, D = q.shape                                             # R = P * n rows, one token each
        (pk, pv), (P, G, Tp, _) = self.prompt[layer], self.prompt[layer][0].shape
        if self.t == self.grown[layer][0].shape[2]:                      # full: double the room
            self.grown[layer] = tuple(torch.cat((x, torch.empty_like(x)), dim=2) for x in self.grown[layer])
        gk, gv = self.grown[layer]
        gk[:, :, self.t], gv[:, :, self.t] = k[:, :, 0], v[:, :, 0]
        gk, gv = gk[:, :, :self.t + 1], gv[:, :, :self.t + 1]            # (R, G, t+1, D)

        q = q.reshape(R, G, H // G, D) * D ** -0.5
        shared = q.view(P, self.n, G, H // G, D).transpose(1, 2).reshape(P, G, -1, D)            # the n samples of a prompt side by side
        scores_prompt = (shared @ pk.transpose(-1, -2)).masked_fill_(self.padding[:, None, None], -math.inf)   # (P, G, n*H/G, Tp)
        scores_grown = q @ gk.transpose(-1, -2)                                                                 # (R, G, H/G, t+1)
        scores_prompt = scores_prompt.view(P, G, self.n, -1, Tp).transpose(1, 2).reshape(R, G, -1, Tp)
        weights = torch.cat((scores_prompt, scores_grown), dim=-1).float().softmax(-1).to(q.dtype)
        w_prompt, w_grown = weights.split([Tp, self.t + 1], dim=-1)
        y = w_prompt.reshape(P, self.n, G, -1, Tp).transpose(1, 2).reshape(P, G, -1, Tp) @ pv                 # (P, G, n*H/G, D)
        y = y.view(P, G, self.n, -1, D).transpose(1, 2).reshape(R, G, -1, D) + w_grown @ gv
        return y.reshape(R, H, 1, D)

    def start(self, device):
        """After the prefill: which places of the padded prompts are padding, (P, Tp); and every row's next position, (R, 1)."""
        lengths = torch.tensor(self.lengths, device=device)
        self.padding = torch.arange(max(self.lengths), device=device) >= lengths[:, None]
        self.positions = lengths.repeat_interleave(self.n)[:, None]

    def keep(self, prompts: torch.Tensor, rows: torch.Tensor):
        """Shrink the grid to these prompts (P',) and rows (P', n'), indices into the present ones."""
        self.n = rows.shape[1]
        rows = rows.flatten()
        self.padding, self.positions = self.padding[prompts], self.positions[rows]
        self.prompt = [(k[prompts], v[prompts]) for k, v in self.prompt]
        self.grown = [(k[rows], v[rows]) for k, v in self.grown]


DRAWS = 8     # uniform numbers that a token may use up


def pick_tokens(logits: torch.Tensor, temperature: float, top_p: float, uniform: torch.Tensor) -> torch.Tensor:
    """(R, V) logits, uniform (R, DRAWS) float64 in [0, 1) -> (R,) token ids: the arg max at temperature 0; else a draw from softmax(logits / temperature) within
    the nucleus, the smallest set of most probable tokens whose mass reaches top_p (Holtzman et al. 2019; tokens tied at its edge are all in).

    Without sorting the vocabulary: draw from the whole distribution by inverting its cumulative sum, and keep the token if those more probable than it
    have less than top_p together, that is, if it is in the nucleus. A row refused DRAWS times (0.05^8 of them at top_p 0.95) is sorted after all."""
    if temperature == 0:
        return logits.argmax(-1)
    probs = (logits.float() / temperature).softmax(-1)
    cumulative = probs.double().cumsum(-1)
    chosen = torch.empty(len(probs), dtype=torch.long, device=probs.device)
    rows = torch.arange(len(probs), device=probs.device)                      # those still without a token
    for draw in range(DRAWS):
        whole, part = (cumulative, probs) if len(rows) == len(probs) else (cumulative[rows], probs[rows])
        ids = torch.searchsorted(whole, uniform[rows, draw, None] * whole[:, -1:], right=True).clamp_(max=probs.shape[1] - 1)
        chosen[rows] = ids[:, 0]
        if top_p >= 1:
            return chosen
        refused = torch.where(part > part.gather(1, ids), part, 0).sum(-1) >= top_p
        rows = rows[refused]
        if not len(rows):
            return chosen
    top, ids = probs[rows].sort(dim=-1, descending=True)
    nucleus = top.double().masked_fill(top.double().cumsum(-1) - top >= top_p, 0.0).cumsum(-1)
    pick = torch.searchsorted(nucleus, uniform[rows, 0, None] * nucleus[:, -1:], right=True).clamp_(max=probs.shape[1] - 1)
    chosen[rows] = ids.gather(1, pick)[:, 0]
    return chosen


@torch.inference_mode()
def generate(model: Llama, prompts: list[list[int]], *, n: int = 1, max_new_tokens: int, temperature: float = 0.0, top_p: float = 1.0,
             eos_ids: tuple[int, ...] = (), stop: tuple[str, ...] = (), decode: Callable[[list[int]], str] | None = None, seed: int = 0,
             on_finish: Callable[[int, int, Sample], None] | None = None) -> list[list[Sample]]:
    """Continue every prompt (a list of token ids, of any lengths) n times; result[i][j] is sample j of prompt i.

    Greedy at temperature 0, otherwise temperature and top-p. A sample ends at any of `eos_ids`, at any of the `stop` strings in its decoded text, or after
    `max_new_tokens` (at the model's max_position_embeddings at the latest); `on_finish(i, j, sample)` hears of each as it ends, and the finished rows leave
    the batch. Randomness comes from (seed, prompt ids, j) alone: what a prompt yields does not depend on its neighbours, but for the rounding of
    matrix products of another shape."""
    if stop and decode is None:
        raise ValueError("stop strings need decode, a function from new token ids to text")
    device, limit, eos_ids = model.lm_head.weight.device, model.config.max_position_embeddings, frozenset(eos_ids)
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}: expected 1 or more")
    for i, ids in enumerate(prompts):
        if not 0 < len(ids) < limit:
            raise ValueError(f"prompt {i} has {len(ids)} tokens; expected 1 to {limit - 1} (max_position_embeddings is {limit})")
    result: list[list] = [[None] * n for _ in prompts]
    if not prompts or n == 0:
        return result
    was_training = model.training
    model.eval()

    rows = torch.arange(len(prompts) * n).view(len(prompts), n)          # the grid: which (prompt, sample) each row of the batch is
    new = [[] for _ in range(len(prompts) * n)]
    room = [min(max_new_tokens, limit - len(p)) for p in prompts for _ in range(n)]
    noise = [np.random.Generator(np.random.Philox(key=stable_key(seed, p, j))).random((r, DRAWS)) if temperature else None
             for i, p in enumerate(prompts) for j, r in enumerate(room[i * n:(i + 1) * n])]
    tail = 4 * max(map(len, stop), default=0) + 8                        # that many last tokens hold any stop string just completed: at most 4 a character (its bytes)

    cache = KVCache([len(p) for p in prompts], n)
    flat = torch.tensor([t for p in prompts for t in p], device=device)[None]
    ends = torch.tensor([len(p) for p in prompts], device=device).cumsum(0) - 1
    hidden = model.hidden_states(flat, torch.cat([torch.arange(len(p), device=device) for p in prompts]), cache.prefill, ends)
    cache.start(device)
    hidden = hidden[0].repeat_interleave(n, dim=0)                       # (R, C): the last token of its prompt, for every sample

    while True:
        live = rows.flatten().tolist()
        uniform = torch.from_numpy(np.stack([noise[r][min(len(new[r]), room[r] - 1)] for r in live])).to(device) if temperature else None
        tokens = pick_tokens(model.lm_head(hidden), temperature, top_p, uniform)
        for r, token in zip(live, tokens.tolist()):
            i, j = divmod(r, n)
            if result[i][j] is not None:
                continue                                                 # finished, but still in the batch until it shrinks
            text, reason = None, None
            if token in eos_ids:
                reason = "eos"
            else:
                new[r].append(token)
                if stop and any(s in decode(new[r][-tail:]) for s in stop):
                    reason, text = "stop", decode(new[r])
                    text = text[:min(at for s in stop if (at := text.find(s)) >= 0)]
                elif len(new[r]) == room[r]:
                    reason = "length"
            if reason:
                result[i][j] = Sample(new[r], text if text is not None else decode(new[r]) if decode else None, reason)
                if on_finish:
                    on_finish(i, j, result[i][j])

        alive = torch.tensor([[result[r // n][r % n] is None for r in row] for row in rows.tolist()])
        width = int(alive.sum(1).max())
        if width == 0:
            break
        if int(alive.any(1).sum()) * width <= 0.75 * alive.numel():      # shrink: prompts with a live row, their live rows first
            keep = alive.any(1).nonzero()[:, 0]
            order = (~alive[keep]).int().argsort(dim=1, stable=True)[:, :width]
            index = (keep[:, None] * rows.shape[1] + order)
            tokens, rows = tokens[index.flatten().to(device)], rows.flatten()[index]
            cache.keep(keep.to(device), index.to(device))
        hidden = model.hidden_states(tokens[:, None], cache.positions, cache)[:, 0]
        cache.t += 1
        cache.positions = cache.positions + 1
    model.train(was_training)
    return result


def stable_key(seed: int, prompt: list[int], sample: int) -> int:
    """128 bits from (seed, prompt, sample), the same on every machine: Python's own hash() is neither stable nor wide."""
    return int.from_bytes(hashlib.blake2b(json.dumps([seed, sample, prompt]).encode(), digest_size=16).digest(), "little")


def choose_device(wanted: str | None) -> torch.device:
    """--device, or where nothing is wanted a GPU if there is one; of several, each of torchrun's processes takes its own."""
    local, device = int(os.environ.get("LOCAL_RANK", 0)), wanted or ("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise CheckpointError(f"--device {device}: expected cpu, cuda or cuda:N")
    if device == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise CheckpointError(f"--device {device}: no CUDA device is visible to torch; use --device cpu, or install a CUDA build of torch")
    chosen = torch.device(f"cuda:{local}" if device == "cuda" else device)
    if chosen.index >= torch.cuda.device_count():
        raise CheckpointError(f"--device {device}: process {local} of this machine wants {chosen}, and {torch.cuda.device_count()} GPUs are visible: lower "
                              "--nproc_per_node, or name another")
    return chosen


def keep_freed_memory():
    """Tell glibc's malloc to reuse freed memory instead of returning it to the system, where it is glibc (elsewhere nothing happens).

    By default every tensor above 128 KB is mapped afresh and its pages are zeroed by the kernel on first touch, for every activation of every step; on a CPU
    that costs more than the element-wise arithmetic itself. Tensors above 32 MB still go back: kept, they would leave holes that nothing else fits into.
    GPUs are not concerned: their allocator caches already."""
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 32 * 2**20)     # M_MMAP_THRESHOLD: smaller allocations get no mapping of their own (and this is the largest that glibc takes)
        libc.mallopt(-1, 2**31 - 1)      # M_TRIM_THRESHOLD: the heap's top is not given back
    except (OSError, AttributeError, TypeError):
        pass
