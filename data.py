"""Preference data: from rows of text to the flat, prefix-shared batches that the loss sees; and the files in between.

One row, as Math-Step-DPO-10K has it (`python data.py show --data F --model M` prints a real one and its tokens):

    prompt                   "What is 7 * 8 + 5?"                     x             \\  context: read by the model,
    initial_reason_steps     "Let's think step by step.\\nStep 1:"    s_1..s_{k-1}  /   no loss
    chosen                   " 7 * 8 = 56."                           s_win         \\  response: loss on every token
    rejected                 " 7 * 8 = 54."                           s_lose        /
    full_chosen, full_rejected: the step and everything after it;  answer, dataset: not used in training

Which text is the response depends on the method, and so does its end:

    sft       the whole chosen answer, given the prompt               ends with the end-of-turn token
    dpo       the whole chosen / rejected answer, given the prompt    ends with the end-of-turn token
    stepdpo   the chosen / rejected step, given prompt and steps      no end token: the solution goes on. A model that
                                                                      learned to stop after a step would never finish.

The two sides of a pair are encoded once each, as whole texts. Their common beginning is in the batch once (`Batch`).

The second half of the file turns graded attempts (eval.py) into such rows: it cuts solutions into steps, has the first
wrong step located (`localize`) and pairs it with the steps that led to the right answer (`pairs`).

Legend: B rows of a micro-batch, N tokens laid end to end in it, M predicted (response) tokens among them.
"""
from __future__ import annotations      # the method stands first, what it is made of behind it

import argparse
import bisect
import functools
import hashlib
import http.client
import importlib
import json
import math
import os
import random
import re
import sys
import time
import unicodedata
import urllib.error
import urllib.parse
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from datetime import datetime
from fractions import Fraction
from pathlib import Path
from typing import Callable, Iterable, Iterator, MappingView, NamedTuple, Sequence

import numpy as np
import tokenizers
import torch
from jinja2 import TemplateError, nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer
from tqdm import tqdm

from model import CheckpointError, common_length, lay_out, locked, read_json, resolve, strict_json, writing, written


class DataError(ValueError):
    """The user's data cannot be used. One line: file and line, field, what was found, what to do."""


# ======================================================================================================================
# PART 1. Rows -> tokens -> batches: the method.
# ======================================================================================================================

# ----------------------------------------------------------------------------------------------------------------------
# Rows to tokens
# ----------------------------------------------------------------------------------------------------------------------

METHODS = ("sft", "dpo", "stepdpo")
LONGEST_TOKEN = 1_000                                   # characters: more than a token of any vocabulary has


@dataclass(slots=True)
class Example:
    """One row as tokens: K >= 1 whole sequences from BOS on (2 of a pair, 1 in SFT), alike in their first `start` tokens."""
    where: str                                          # "file:line"
    sides: list[np.ndarray]                             # K of them, int32 ids: context + response; chosen, rejected
    start: int                                          # index of the first response token, on every side
    steps: list[np.ndarray]                             # of each side: of which step of its solution each response token is
    problem: str | None = None                          # the prompt x: rows of one problem begin alike and stay together
    row: dict | None = None                             # the row it was made of, for a variant's own columns
    reference: bool = False                             # whether its loss asks for log-probs under the reference
    units: int = 1                                      # what it counts in the mean: a pair is 1, SFT counts its tokens
    asked: list | None = None                           # of each side (places, tokens): what is predicted, if not the response

    @property
    def chosen(self) -> np.ndarray:
        return self.sides[0]

    @property
    def rejected(self) -> np.ndarray | None:
        return self.sides[1] if len(self.sides) > 1 else None

    @property
    def predicted(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Of each side: the places (in the side) whose hidden states predict, and the tokens that they predict."""
        if self.asked is not None:
            return self.asked
        return [(np.arange(self.start - 1, len(side) - 1), side[self.start:]) for side in self.sides]

    @property
    def length(self) -> int:
        """Tokens that the row takes in a batch, its sides' common beginning once."""
        return tokens_in_tree(self.sides)


@dataclass
class Report:
    """What became of a file's rows. str(report) is a few lines to print."""
    source: str
    rows: int = 0
    kept: int = 0
    dropped: dict[str, list[str]] = field(default_factory=dict)     # reason -> "file:line" of each row dropped for it

    def drop(self, reason: str, where: str) -> None:
        self.dropped.setdefault(reason, []).append(where)

    def __str__(self) -> str:
        lines = [f"{self.source}: {self.rows:,} rows, {self.kept:,} kept, {self.rows - self.kept:,} dropped"]
        for reason, rows in sorted(self.dropped.items(), key=lambda item: -len(item[1])):
            lines.append(f"  {len(rows):>7,}  {reason}  (first: {Path(rows[0]).name})")
        return "\n".join(lines)


def texts_of(row: dict, method: str, where: str) -> tuple[str, str, list[str]]:
    """(question, reasoning that is context, the one or two responses) of a row, as `method` trains it.

    A whole answer is initial_reason_steps + full_*; where full_* already begins with those steps, it is the whole
    answer itself. Rows without initial_reason_steps and full_* (ordinary preference data) hold whole answers in
    chosen/rejected.
    """
    if method == "sft" and "response" in row:
        return text_field(row, "prompt", where), "", [text_field(row, "response", where)]
    sides = ("chosen",) if method == "sft" else ("chosen", "rejected")
    of_steps = any(name in row for name in ("initial_reason_steps", "full_chosen", "full_rejected"))
    plain = method != "stepdpo" and not of_steps
    whole = method != "stepdpo" and of_steps
    responses = [f"full_{side}" if whole else side for side in sides]
    needed = ["prompt", *responses] if plain else ["prompt", "initial_reason_steps", *responses]
    missing = [name for name in needed if name not in row]
    if missing:
        expect(row, where, "pairs", "problems")
        also = " (or prompt, response)" if method == "sft" else ""
        raise DataError(f"{where}: {method} needs the columns {', '.join(needed)}{also}; found "
                        f"{', '.join(row) or 'none'}; missing {', '.join(missing)}: rename them or change method")
    question, *texts = [text_field(row, name, where) for name in needed]
    if plain:
        return question, "", texts
    steps, *texts = texts
    if whole:                                           # an empty answer stays empty, and is counted as such
        return question, "", [text if text.startswith(steps) or not text.strip() else steps + text for text in texts]
    return question, steps, texts


def encode_dataset(source: str | Path | Iterable[tuple[str, dict]], tokenizer: Tokenizer, method: str, style: str,
                   max_length: int | None = None) -> tuple[list[Example], Report]:
    """Read, render and tokenise a file of rows: those that can be trained on, in order, and a Report.

    source: what `read_rows` takes, or (where, row) pairs. max_length: tokens of a side as the model sees it, BOS and
    end token included; a longer row is dropped, never cut. Raises DataError where a row is malformed, or none is left.
    """
    if method not in METHODS:
        raise DataError(f"method {method!r} is not known; choose one of {', '.join(METHODS)}")
    from_file = isinstance(source, (str, Path))
    rows, report = read_rows(source) if from_file else source, Report(str(source) if from_file else "rows")
    end = None if method == "stepdpo" else tokenizer.end_of_turn_id(style)
    examples = []
    for chunk in _chunks(rows, 512):                    # tokenizers encodes a list on all cores
        taken = []
        for where, row in chunk:
            report.rows += 1
            question, steps, responses = texts_of(row, method, where)
            if reason := _unfit(question, steps, responses, tokenizer, style):
                report.drop(reason, where)
            else:
                taken.append(Texts(where, row, question, render_prompt(style, question, tokenizer), steps, responses))
        examples += to_examples(taken, tokenizer, end, max_length, report)
    for example in examples:
        example.reference = method != "sft"
        if method == "sft":                             # the mean over all answer tokens, not over answers
            example.units = len(example.chosen) - example.start
    report.kept = len(examples)
    if not examples:
        reasons = "; ".join(f"{len(where)} {reason}" for reason, where in report.dropped.items())
        raise DataError(f"{report.source}: no row is left to use ({reasons})")
    return examples, report


class Texts(NamedTuple):
    """A row before it becomes tokens. context = prompt + steps is read; the K responses are judged."""
    where: str                                          # "file:line"
    row: dict
    problem: str                                        # the question x, as it stands in the row
    prompt: str                                         # x, rendered
    steps: str                                          # s_1..s_{k-1}, "" where whole answers are judged
    responses: list[str]


def to_examples(rows: Sequence[Texts], tokenizer: Tokenizer, end: int | None, max_length: int | None,
                report: Report) -> list[Example]:
    """Tokenise rows of any number of responses; `end`, if any, follows each response. What is dropped goes to `report`."""
    fitting = []
    for row in rows:
        longest = len(row.prompt) + len(row.steps) + max(map(len, row.responses))
        if max_length is not None and longest > LONGEST_TOKEN * max_length:     # without waiting for its tokens
            report.drop(f"longer than {max_length} tokens", row.where)
        else:
            fitting.append(row)
    texts = [row.prompt + row.steps + response for row in fitting for response in row.responses]
    encoded = iter(tokenizer.encode_batch(texts))
    examples = []
    for row in fitting:
        made = _example(row, [next(encoded) for _ in row.responses], end, max_length)
        if isinstance(made, str):
            report.drop(made, row.where)
        else:
            examples.append(made)
    return examples


def _chunks(items: Iterable, size: int) -> Iterator[list]:
    chunk = []
    for item in items:
        chunk.append(item)
        if len(chunk) == size:
            yield chunk
            chunk = []
    yield chunk


def _unfit(question: str, steps: str, responses: list[str], tokenizer: Tokenizer, style: str) -> str | None:
    """Why the texts of a row cannot be trained on, or None."""
    names = ("chosen", "rejected") if len(responses) == 2 else ("response",)
    for name, text in zip(("prompt", *names), (question, *responses)):
        if not text.strip():
            return f"empty {name}"
    if len(responses) == 2 and responses[0].strip() == responses[1].strip():
        return "chosen and rejected are the same"
    asked = () if style == "raw" else (question,)            # `raw` is for prompts that are rendered already, control tokens and all
    for text in (*asked, *(steps + response for response in responses)):        # a token may be spelled across the seam
        if token := tokenizer.control_token_in(text):
            return f"the text contains the control token {token}"
    return None


def _example(row: Texts, encoded: list[Encoded], end: int | None, max_length: int | None) -> Example | str:
    """Tokens of a row, or the reason to drop it. encoded: of prompt + steps + each response, in one piece."""
    boundary = len(row.prompt) + len(row.steps)         # the character at which every side's response begins
    start = min(response_start(side.offsets, boundary) for side in encoded)
    sides = [np.array(side.ids + ([] if end is None else [end]), dtype=np.int32) for side in encoded]
    if max_length is not None and max(map(len, sides)) > max_length:
        return f"longer than {max_length} tokens"
    if start == 0:
        return "no token of context before the response"
    if min(map(len, sides)) <= start:
        return "a response without a token of its own"
    if any(not np.array_equal(side[:start], sides[0][:start]) for side in sides):
        return "the context is not tokenised alike on both sides"
    if len({side.tobytes() for side in sides}) < len(sides):
        return "chosen and rejected are the same"
    steps = []
    for side, ids, response in zip(encoded, sides, row.responses):
        of_token = step_of_tokens(side.offsets[start:], row.steps + response, len(row.prompt))
        steps.append(np.concatenate([of_token, of_token[-1:]])[:len(ids) - start])      # the end token is of the last step
    return Example(row.where, sides, start, steps, row.problem, row.row)


def step_of_tokens(offsets: Sequence[tuple[int, int]], solution: str, begin: int) -> np.ndarray:
    """(tokens,) int32: of which step (0 = the first) of the solution each token's last character is. The solution
    begins at character `begin` of the text that the offsets are of; what stands before it counts as step 0."""
    starts = [begin + start for start, _ in step_starts(solution)][1:]
    ends = np.array([end for _, end in offsets])
    return np.searchsorted(starts, ends - 1, side="right").astype(np.int32)


def response_start(offsets: Sequence[tuple[int, int]], boundary: int) -> int:
    """Index of the first token that holds a character of the response, i.e. one at `boundary` or after it.

    A token across the boundary ("\\n\\n", half of it context) belongs to the response: the model makes it in one piece.
    """
    start = next((i for i, (_, after) in enumerate(offsets) if after > boundary), len(offsets))
    # A normaliser may melt the response's first character into the token before (NFC: "e" + a combining accent). That
    # token's offsets then end at the boundary although the character is in it; no other token begins with it.
    if 0 < start < len(offsets) and offsets[start][0] > boundary:
        start -= 1
    return start


# ----------------------------------------------------------------------------------------------------------------------
# Batches
# ----------------------------------------------------------------------------------------------------------------------

@dataclass
class Batch:
    """A micro-batch of B rows as one radix tree, laid out in a flat row of N tokens: no padding, and what begins alike
    is there once, whether in the sides of a pair or in several pairs of one problem.

        one pair                                    two pairs of a problem, cut at steps 2 and 3
        [ x s_1..s_{k-1} | s_win ... | s_lose ... ] [ x s_1 | s_2 | s_win' .. | s_lose' .. | s_win .. | s_lose .. ]
          parent -1        parent 0    parent 0       -1      0     1           1            0          0

    A segment sees its parents whole and itself causally; siblings never see each other. Positions go on from the
    parent's end, so all branches of a fork begin at the same one.

    A hidden state predicts the token after it: `predict_at` are the P places where one is wanted, each once, and
    `source[m]` says which of them predicts targets[m]. The token before a fork predicts the first token of every
    branch, so P < M: it meets the vocabulary once.
    """
    input_ids: torch.Tensor                             # (N,) int64
    position_ids: torch.Tensor                          # (N,) int64
    lengths: list[int]                                  # tokens of each segment, in order; they add up to N
    parents: list[int]                                  # the segment that each one continues; -1 = none
    predict_at: torch.Tensor                            # (P,) int64, ascending: places in the flat row
    source: torch.Tensor                                # (M,) int64: the hidden state, of the P, that predicts targets[m]
    targets: torch.Tensor                               # (M,) int64: response tokens, row by row and side by side
    response: torch.Tensor                              # (M,) int64: pair i has responses 2i (chosen), 2i + 1 (rejected)
    step: torch.Tensor                                  # (M,) int64: the step of its solution that targets[m] is of
    rows: torch.Tensor                                  # (B,) int64: indices into the dataset
    examples: list[Example]                             # the B rows themselves
    responses: int                                      # R: how many there are

    def to(self, device) -> "Batch":
        move = lambda value: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
        return Batch(**{name: move(value) for name, value in vars(self).items()})


def collate(examples: Sequence[Example], rows: Sequence[int]) -> Batch:
    """Lay examples[rows[0]], examples[rows[1]], ... into one tree. `examples` is the whole dataset."""
    chosen = [examples[row] for row in rows]
    texts = [side for example in chosen for side in example.sides]
    families = [family_of(example, row) for example, row in zip(chosen, rows) for _ in example.sides]
    layout = lay_out(texts, families)
    predicted = [each for example in chosen for each in example.predicted]
    steps = [step for example in chosen for step in example.steps]
    at = np.concatenate([places[where] for places, (where, _) in zip(layout.places, predicted)])
    predict_at, source = np.unique(at, return_inverse=True)
    tensor = lambda values: torch.from_numpy(np.ascontiguousarray(values, dtype=np.int64))
    return Batch(
        tensor(layout.tokens), tensor(layout.positions), layout.lengths, layout.parents, tensor(predict_at),
        tensor(source), tensor(np.concatenate([tokens for _, tokens in predicted])),
        tensor(np.repeat(np.arange(len(texts)), [len(tokens) for _, tokens in predicted])),
        tensor(np.concatenate(steps)), tensor(rows), chosen, len(texts))


def family_of(example: Example, row: int) -> str | int:
    """Rows of one family begin alike: those of one problem; a row whose problem is not known is its own."""
    return row if example.problem is None else example.problem


def tokens_in_tree(texts: Sequence[np.ndarray]) -> int:
    """Tokens that texts take in a batch, where what begins alike is there once."""
    return add_to_tree([], texts)


def add_to_tree(tree: list[tuple[bytes, np.ndarray]], texts: Iterable[np.ndarray]) -> int:
    """Put texts into `tree`, a sorted list, and return how many tokens they add to it: of each text those that it does
    not have in common with a neighbour in that order."""
    added = 0
    for text in texts:
        key = text.astype(">i4").tobytes()              # big-endian bytes sort as the numbers do
        at = bisect.bisect(tree, key, key=lambda entry: entry[0])
        neighbours = tree[max(0, at - 1):at + 1]
        added += len(text) - max((common_length(text, other) for _, other in neighbours), default=0)
        tree.insert(at, (key, text))
    return added


def epoch_plan(examples: Sequence[Example], *, batch_size: int, micro_batch_size: int | None = None,
               micro_batch_tokens: int | None = None, world_size: int = 1, seed: int = 0, epoch: int = 0,
               order: Sequence[int] | None = None, group_by_prompt: bool = False) -> list[list[list[list[int]]]]:
    """plan[step][rank] = that rank's micro-batches, each a list of row indices. A pure function; every row once.

    Which rows make a step depends on (seed, epoch, batch_size) alone, or on `order`, not on how the work is spread: runs
    on 1 and on 8 processes take the same steps. Within a step the rows of one problem stay together, since they share
    their beginning; such families are dealt, largest first, to the rank with the fewest tokens so far, and packed in
    that order into micro-batches of at most `micro_batch_size` rows and `micro_batch_tokens` tokens, as counted in the
    tree (a longer row travels alone). A family larger than that, or than a rank's share, is cut. The last step of an
    epoch may be short, and a rank may then have nothing to do in it.
    """
    if order is None:
        order = shuffled(examples, seed, epoch, group_by_prompt)
    plan = []
    for begin in range(0, len(order), batch_size):
        families: dict = {}                             # in order of appearance
        for row in order[begin:begin + batch_size]:
            families.setdefault(family_of(examples[row], row), []).append(row)
        most = math.inf if micro_batch_tokens is None else micro_batch_tokens
        if world_size > 1:
            sides_of = lambda rows: [side for row in rows for side in examples[row].sides]
            most = min(most, -(-sum(tokens_in_tree(sides_of(rows)) for rows in families.values()) // world_size))
        pieces = [piece for rows in families.values() for piece in _cut(rows, examples, micro_batch_size, most)]
        ranks, loads = [[] for _ in range(world_size)], [0] * world_size
        for tokens, rows in sorted(pieces, key=lambda piece: -piece[0]):
            rank = loads.index(min(loads))
            ranks[rank].append((tokens, rows))
            loads[rank] += tokens
        plan.append([_pack(mine, micro_batch_size, micro_batch_tokens) for mine in ranks])
    return plan


def shuffled(examples: Sequence[Example], seed: int, epoch: int, group_by_prompt: bool) -> list[int]:
    """The rows in random order; or the problems in random order, the rows of each side by side."""
    # raw bits of PCG64, sorted: unlike permutation(), the stream is promised to stay the same in every version of numpy
    draws = np.random.PCG64([seed, epoch]).random_raw(len(examples))
    if group_by_prompt:
        number: dict = {}                               # family -> its place of first appearance
        families = [number.setdefault(family_of(e, row), len(number)) for row, e in enumerate(examples)]
        draws = draws[families]                         # one draw for all rows of a problem
    return np.argsort(draws, kind="stable").tolist()


def _cut(family: list[int], examples: Sequence[Example], most_rows: int | None, most_tokens: float) -> list:
    """[(tokens in the tree, rows)] of a family: one piece if it fits, else several of neighbours, which share the most."""
    pieces, tree, piece, tokens = [], [], [], 0
    for row in sorted(family, key=lambda row: examples[row].chosen.tolist()) if len(family) > 1 else family:
        more = add_to_tree(tree, examples[row].sides)
        if piece and (len(piece) == most_rows or tokens + more > most_tokens):
            pieces.append((tokens, piece))
            tree, piece, tokens = [], [], 0
            more = add_to_tree(tree, examples[row].sides)
        piece.append(row)
        tokens += more
    return pieces + [(tokens, piece)]


def _pack(pieces: list[tuple[int, list[int]]], max_rows: int | None, max_tokens: int | None) -> list[list[int]]:
    batches, tokens = [], 0
    for more, rows in pieces:
        tokens += more
        full = batches and max_rows is not None and len(batches[-1]) + len(rows) > max_rows
        if not batches or full or (max_tokens is not None and tokens > max_tokens):
            batches.append([])
            tokens = more
        batches[-1] += rows
    return batches


# ----------------------------------------------------------------------------------------------------------------------
# Prompts
# ----------------------------------------------------------------------------------------------------------------------

BOXED = "\nPlease reason step by step, and put your final answer within \\boxed{}."
PROMPT_STYLES = ("qwen2-boxed", "alpaca", "deepseek-math", "chat", "raw")


def render_prompt(style: str, question: str, tokenizer: Tokenizer) -> str:
    """The text up to the first character of the reasoning. The first three are the paper's, for models it trained."""
    if style == "qwen2-boxed":
        if tokenizer is not None and "<|im_start|>" not in tokenizer.control_tokens:
            raise DataError(f"{tokenizer.source}: --prompt qwen2-boxed is written with <|im_start|>, which is no control token "
                            "of this checkpoint; choose --prompt chat, alpaca or raw")
        return ("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
                f"<|im_start|>user\n{question}{BOXED}<|im_end|>\n<|im_start|>assistant\n")
    if style == "alpaca":
        return ("Below is an instruction that describes a task. "
                "Write a response that appropriately completes the request.\n\n"
                f"### Instruction:\n{question}\n\n### Response:\n")
    if style == "deepseek-math":
        return f"User: {question}{BOXED}\n\nAssistant: "
    if style == "chat":
        return tokenizer.render_chat([{"role": "user", "content": question}])
    if style == "raw":
        return question
    raise DataError(f"prompt style {style!r} is not known; choose one of {', '.join(PROMPT_STYLES)}")


# ----------------------------------------------------------------------------------------------------------------------
# The tokenizer and the chat template
# ----------------------------------------------------------------------------------------------------------------------

class Encoded(NamedTuple):
    ids: list[int]
    offsets: list[tuple[int, int]]                      # (begin, end) of each token, in characters of the text


class Tokenizer:
    """A checkpoint's tokenizer: tokenizer.json run by `tokenizers`, and the conventions that stand in the files around.

    bos_id           in front of every text, once; None where the checkpoint wants none (Qwen2)
    eos_id, eos_ids  the tokenizer's own end token (or None); every id that ends a generation, by the folder's files
    control_tokens   the strings of the special tokens: recognised anywhere in a text, so a row must not contain them
    chat_template    Jinja source, or None
    """

    def __init__(self, backend: tokenizers.Tokenizer, *, bos_id: int | None = None, eos_ids: tuple[int, ...] = (),
                 chat_template: str | None = None, names: dict[str, str] | None = None, source: str = "tokenizer"):
        backend.no_truncation()                         # a tokenizer.json may ask for both, and would cut in silence
        backend.no_padding()
        backend.post_processor = None                   # `encode` adds BOS; and no offsets trimmed of white space
        self.backend, self.source, self.chat_template, self._template = backend, source, chat_template, None
        self.names = names or {}                        # {"eos_token": "</s>", ...}, for the template
        self.bos_id, self.eos_ids = bos_id, eos_ids
        self.eos_id = backend.token_to_id(self.names["eos_token"]) if "eos_token" in self.names else (*eos_ids, None)[0]
        added = backend.get_added_tokens_decoder()
        self.control_ids = {token.content: id for id, token in added.items() if token.special}
        self.control_ids |= {backend.id_to_token(id): id for id in (bos_id, *eos_ids) if id is not None}
        self.control_tokens = {token for token in self.control_ids if token}
        longest_first = sorted(self.control_tokens, key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "Tokenizer":
        """Read tokenizer.json and, where they are, tokenizer_config.json, special_tokens_map.json, chat_template.jinja,
        config.json and generation_config.json. DataError or CheckpointError where a file is damaged, or disagrees
        with another. The file is obeyed by Rust code that executes nothing of it, but may be made to take its time."""
        folder = Path(folder)
        path, settings_path = folder / "tokenizer.json", folder / "tokenizer_config.json"
        if not path.is_file():
            if (folder / "tokenizer.model").is_file():
                raise DataError(f"{path}: not there; a checkpoint that has only tokenizer.model is converted by "
                                "transformers: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)")
            holds = ", ".join(sorted(p.name for p in folder.iterdir())[:6]) if folder.is_dir() else ""
            raise DataError(f"{folder}: is no checkpoint folder: tokenizer.json is not there, only {holds or 'nothing'}")
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
            opening = backend.encode("").ids            # what the post-processor puts around a text
            largest = max(backend.get_vocab().values(), default=-1)
        except BaseException as error:
            raise _of_rust(error, str(path)) from None
        if not 0 <= largest < 2**24:
            raise DataError(f"{path}: the largest token id is {largest}; expected one from 0 to {2**24 - 1}: fetch the "
                            "file again")
        config, generation = _settings(folder / "config.json"), _settings(folder / "generation_config.json")
        own = _settings(folder / "special_tokens_map.json") | _settings(settings_path)
        tokens = {key: value.get("content") if isinstance(value, dict) else value for key, value in own.items()}
        names = {key: token for key, token in tokens.items() if key.endswith("_token") and isinstance(token, str)}
        declared = own.get("added_tokens_decoder")
        for id, added in (declared if isinstance(declared, dict) else {}).items():
            token = added.get("content") if isinstance(added, dict) else None
            if isinstance(token, str) and str(backend.token_to_id(token)) != id:
                raise DataError(f"{settings_path}: added token {token!r} has id {id}, but tokenizer.json gives it "
                                f"{backend.token_to_id(token)}; they are not of one checkpoint: fetch both again")

        bos_id = backend.token_to_id(names["bos_token"]) if "bos_token" in names else config.get("bos_token_id")
        wants_bos = own.get("add_bos_token")
        if not isinstance(wants_bos, bool):
            wants_bos = bos_id is not None and opening[:1] == [bos_id]
        if wants_bos and bos_id is None:
            raise DataError(f"{settings_path}: add_bos_token is true, but bos_token {names.get('bos_token')!r} is not "
                            "in tokenizer.json; set one that is, or add_bos_token to false")
        eos_ids = [backend.token_to_id(names["eos_token"])] if "eos_token" in names else []
        for value in (generation.get("eos_token_id"), config.get("eos_token_id")):
            eos_ids += value if isinstance(value, list) else [value]
        for id in (bos_id, *eos_ids):
            if id is not None and (type(id) is not int or not 0 <= id <= largest):
                raise DataError(f"{folder}: bos_token_id or eos_token_id is {id!r:.60}; expected an id of "
                                f"tokenizer.json, 0 to {largest}: config.json or generation_config.json is another's")
        eos_ids = tuple(dict.fromkeys(id for id in eos_ids if id is not None))
        return cls(backend, bos_id=bos_id if wants_bos else None, eos_ids=eos_ids,
                   chat_template=_chat_template(folder, own), names=names, source=str(folder))

    def __len__(self) -> int:
        return self.backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str) -> Encoded:
        """Ids and character offsets of a whole text; special tokens in it are recognised, BOS is there once."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[Encoded]:
        try:
            encoded = [Encoded(e.ids, e.offsets) for e in self.backend.encode_batch(texts, add_special_tokens=False)]
        except BaseException as error:
            raise _of_rust(error, self.source) from None
        bos = [] if self.bos_id is None else [self.bos_id]
        return [e if e.ids[:1] == bos else Encoded(bos + e.ids, [(0, 0)] * len(bos) + e.offsets) for e in encoded]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the tokens, special ones included."""
        try:
            return self.backend.decode(list(ids), skip_special_tokens=False)
        except BaseException as error:
            raise _of_rust(error, self.source) from None

    def continuation(self, prompt_ids: Sequence[int], new_ids: Sequence[int]) -> str:
        """Exactly the text that `new_ids` add after `prompt_ids`.

        Not decode(new_ids): a SentencePiece tokenizer drops the space before a text's first word, and one character may
        be spread over several tokens. So both are decoded after the prompt's last tokens, whose part is taken off.
        """
        context = list(prompt_ids[-16:])
        before = self.decode(context).rstrip("\ufffd")  # a character that new_ids complete
        return self.decode(context + list(new_ids))[len(before):]

    def control_token_in(self, text: str) -> str | None:
        """The first control token's string in `text`, if any."""
        found = self._control.search(text)
        return found and found[0]

    def render_chat(self, messages: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The checkpoint's chat template, run on messages [{"role": ..., "content": ...}] as transformers runs it."""
        if self.chat_template is None:
            raise DataError(f"{self.source}: the checkpoint has no chat template; choose --prompt alpaca or raw")
        try:
            if self._template is None:
                self._template = _Sandbox(self.chat_template)
            return self._template.render(messages, add_generation_prompt=add_generation_prompt, tools=None,
                                         documents=None, **self.names)
        except Exception as error:                      # a stranger's program: it may fail in any way
            file = Path(self.source) / "chat_template.jinja"
            file = file if file.is_file() else file.with_name("tokenizer_config.json")
            raise DataError(f"{file}: the chat template fails ({type(error).__name__}: {_one_line(error)}); choose "
                            "--prompt alpaca or raw") from None

    def end_of_turn_id(self, style: str) -> int:
        """What ends a whole answer: <|im_end|> in ChatML, for `chat` what its template puts there, else EOS."""
        token = None
        if style == "qwen2-boxed":
            token = "<|im_end|>"
        elif style == "chat":
            marker = "The answer is 42."
            text = self.render_chat([{"role": "user", "content": "?"}, {"role": "assistant", "content": marker}],
                                    add_generation_prompt=False)
            after = self._control.match(text.rpartition(marker)[2].lstrip())
            token = after and after[0]
        id = self.control_ids.get(token, self.eos_id)
        if id is None:
            raise DataError(f"{self.source}: no end-of-text token in tokenizer_config.json or config.json; whole "
                            "answers need one: set eos_token there")
        return id

    def stop_ids(self, style: str) -> tuple[int, ...]:
        """Every id that ends a generated answer."""
        return tuple(dict.fromkeys((self.end_of_turn_id(style),) + self.eos_ids))


def _of_rust(error: BaseException, source: str) -> BaseException:
    """What to raise for an error of `tokenizers`. It may panic (a pattern that runs away), which is no Exception."""
    if isinstance(error, (KeyboardInterrupt, SystemExit)):
        return error
    return DataError(f"{source}: damaged or not a tokenizer ({_one_line(error)}); fetch the file again")


def _settings(path: Path) -> dict:
    """A small JSON file beside the tokenizer; {} where there is none."""
    return read_json(path) if path.exists() else {}


def _chat_template(folder: Path, own: dict) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{file}: is not UTF-8 ({_one_line(error)}); fetch the file again") from None
    template = own.get("chat_template")
    if isinstance(template, list):                      # several named ones
        template = next((entry.get("template") for entry in template
                         if isinstance(entry, dict) and entry.get("name") == "default"), None)
    return template if isinstance(template, str) else None


# ----------------------------------------------------------------------------------------------------------------------
# Rows: files of strangers, read strictly
# ----------------------------------------------------------------------------------------------------------------------

def read_rows(source: str | Path, bad: list[DataError] | None = None) -> Iterator[tuple[str, dict]]:
    """Yield (where, row) for every object of a .jsonl, .json (an array, or one object a line) or .parquet file, or of a
    hub dataset.

    `where` ("file:line") goes in front of every later complaint about the row. UTF-8, with or without BOM; LF or CRLF;
    blank lines are skipped. A row that cannot be read raises DataError, or, where a list `bad` is given, is appended to
    it and the rest goes on.
    """
    path = Path(source)
    if path.is_file():
        files = [path]
    elif path.exists():
        raise DataError(f"{path}: is a folder or device; give a .jsonl, .json or .parquet file")
    elif path.suffix in _READERS or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        raise DataError(f"{path}: no such file; give a .jsonl, .json or .parquet file, or a hub dataset (owner/name)")
    else:
        files = _hub_files(str(source))
    count = 0
    for file in files:
        if file.suffix not in _READERS:
            found = file.suffix or "a file without suffix"
            raise DataError(f"{file}: cannot read {found}; expected .jsonl, .json or .parquet")
        for where, row in _READERS[file.suffix](file):
            count += 1
            if isinstance(row, dict):
                yield where, row
                continue
            error = row if isinstance(row, DataError) else DataError(
                f"{where}: found {_kind(row)} where an object (a row with named fields) belongs; one {{...}} a line, "
                "or an array of them in a file that is called .json")
            if bad is None:
                raise error
            bad.append(error)
    if not count:
        raise DataError(f"{source}: holds no rows; expected one JSON object a line")


def _read_lines(path: Path) -> Iterator[tuple[str, object]]:
    with path.open("rb") as lines:                      # bytes: only \n ends a line, no other separator of Unicode
        for number, line in enumerate(lines, 1):
            where = f"{path}:{number}"
            if number == 1 and line[:2] in (b"\xff\xfe", b"\xfe\xff"):
                raise DataError(f"{where}: is UTF-16; save the file as UTF-8")
            if number == 1 and line[:2] == b"\x1f\x8b":
                raise DataError(f"{where}: is compressed by gzip; unpack it")
            if line.removeprefix(b"\xef\xbb\xbf").strip():
                yield where, _parse(line, where)


def _read_json(path: Path) -> Iterator[tuple[str, object]]:
    with path.open("rb") as file:
        head = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    if not head.startswith(b"["):
        yield from _read_lines(path)
        return
    rows = _parse(path.read_bytes(), str(path))
    for number, row in enumerate(rows if isinstance(rows, list) else [rows], 1):
        yield f"{path}:item {number}", row


def _read_parquet(path: Path) -> Iterator[tuple[str, object]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError(f"{path}: parquet files need pyarrow: pip install pyarrow") from None
    try:
        rows = (row for batch in pyarrow.parquet.ParquetFile(path).iter_batches() for row in batch.to_pylist())
        for number, row in enumerate(rows, 1):
            yield f"{path}:row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable parquet file ({_one_line(error)})") from None


_READERS = {".jsonl": _read_lines, ".json": _read_json, ".parquet": _read_parquet}


def _hub_files(dataset: str) -> list[Path]:
    """The training files of a hub dataset, downloaded: those of one format, "train" in the name where any has it."""
    from huggingface_hub import HfApi, hf_hub_download
    try:
        names = sorted(HfApi().list_repo_files(dataset, repo_type="dataset"))
        for suffix in (".parquet", ".jsonl", ".json"):
            files = [name for name in names if name.endswith(suffix)]
            files = [name for name in files if "train" in name] or files
            if files:
                return [Path(hf_hub_download(dataset, name, repo_type="dataset")) for name in files]
    except Exception as error:                          # offline, no such dataset, no permission: the hub raises many
        raise DataError(f"{dataset}: neither a file here nor a dataset of the hub ({_one_line(error)})") from None
    raise DataError(f"{dataset}: no .parquet, .jsonl or .json file in it (found: {', '.join(names[:8]) or 'nothing'})")


def _parse(raw: bytes, where: str) -> object:
    """One JSON value, or the DataError that says why not."""
    try:
        return strict_json(raw)
    except UnicodeDecodeError as error:
        found = f"found 0x{raw[error.start]:02x}"
        return DataError(f"{where}: byte {error.start} is not UTF-8 ({found}); save the file as UTF-8")
    except RecursionError:
        return DataError(f"{where}: JSON nested too deeply; a row is a flat object of text fields")
    except ValueError as error:
        begins = _quote(raw[:60].decode("utf-8", "replace"))
        return DataError(f"{where}: malformed JSON ({_one_line(error)}; begins {begins}); correct or remove it")


def text_field(row: dict, name: str, where: str) -> str:
    """row[name], if it is text that a tokenizer and a file can carry; DataError otherwise."""
    value = row.get(name)
    if name not in row:
        raise DataError(f"{where}: field {name!r}: not there (found: {', '.join(row) or 'nothing'}); expected text")
    if not isinstance(value, str):
        raise DataError(f"{where}: field {name!r}: found {_kind(value)} {_shown(value)}; expected text")
    if "\0" in value:
        raise DataError(f"{where}: field {name!r}: a NUL character at position {value.index(chr(0))}; remove it")
    if lone := re.search("[\ud800-\udfff]", value):
        raise DataError(f"{where}: field {name!r}: half a surrogate pair (\\u{ord(lone[0]):x}) at position "
                        f"{lone.start()}, which is no character: the text was cut or decoded wrongly; remove the row")
    return value


# The files of the pipeline, by the columns that tell them, and what is done with them.
_STAGES = {"pairs": ({"prompt", "chosen", "rejected"}, "stepdpo.py --data F"),
           "rectified attempts": ({"completion", "full_rejected"}, "data.py pairs F"),
           "valued attempts": ({"completion", "values"}, "data.py localize F --judge values"),
           "attempts": ({"completion", "correct"}, "eval.py --problems F --rollouts 8, or data.py localize F"),
           "errors": ({"prefix", "full_rejected"}, "eval.py --problems F --samples 20"),
           "problems": ({"question", "answer"}, "eval.py --problems F")}


def expect(row: dict, where: str, *wanted: str) -> None:
    """DataError where a row is known to be of another stage of the pipeline than the `wanted` ones."""
    found = next((name for name, (columns, _) in _STAGES.items() if columns <= row.keys()), None)
    if found and found not in wanted:
        raise DataError(f"{where}: the file holds {found}, and {wanted[0]} belong here; what goes on with {found} is "
                        f"{_STAGES[found][1]}")


def writable(row: dict, where: str) -> dict:
    """The fields of a row that the next stage's file can hold: not the dates, bytes, decimals and NaNs of parquet files.
    DataError where text is broken, whatever the field."""
    kept = {}
    for name, value in row.items():
        try:
            json.dumps({name: value}, ensure_ascii=False, allow_nan=False).encode()
        except (UnicodeEncodeError, RecursionError):
            raise DataError(f"{where}: half a surrogate pair in it, or too deep an object (field {name!r}); make the row "
                            "again") from None
        except (TypeError, ValueError):
            continue
        kept[name] = value
    return kept


def _kind(value) -> str:
    kinds = {dict: "an object", list: "a list", str: "text", bool: "true/false", int: "a number", float: "a number",
             type(None): "null"}
    return kinds.get(type(value), type(value).__name__)


def _quote(text: str, width: int = 60) -> str:
    return repr(text if len(text) <= width else text[:width] + "...")


def _shown(value) -> str:
    return _quote(json.dumps(value, default=str))       # of a parquet, values that are not JSON's


def _one_line(error) -> str:
    return " ".join(str(error).split())[:300]


# ======================================================================================================================
# PART 2. Making pairs (section 3.2 of the paper): solutions -> steps -> first wrong step -> pairs.
# ======================================================================================================================

# ----------------------------------------------------------------------------------------------------------------------
# Steps of a solution
# ----------------------------------------------------------------------------------------------------------------------

# A label begins a line, and the step's own words follow it. In the order in which "auto" tries them.
_LABELS = {
    "step": r"(?:^|\n)Step \d+:",                                                       # the paper's
    "heading": r"(?:^|\n)[ \t>#*_]*(?:Step|STEP)[ \t]+\d+[ \t]*[:.)\-–]?(?:\*\*|__)?",  # "**Step 1:**", "### Step 1 -"
    "number": r"(?:^|\n)[ \t>#*_]*(\d+)[.)](?:\*\*|__)?(?=\s)",                         # "1. ...", "2) ..."
    "paragraph": r"\n[ \t]*\n\s*",                                                      # blank lines
}
STEP_STYLES = ("auto", *_LABELS)


def step_starts(text: str, style: str = "auto") -> list[tuple[int, int]]:
    """(begin, begin of its own words) of each step of a solution; between the two stands its label.

    What comes before the first label belongs to the first step. Numbers without the word "Step" are labels only in the
    sequence 1, 2, 3: a line of working may begin with "12. " as well. `auto` takes the first style that finds a label
    (of numbers and paragraphs: two).
    """
    if style == "auto":
        for style, least in (("step", 1), ("heading", 1), ("number", 2), ("paragraph", 2)):
            starts = step_starts(text, style)
            if len(starts) >= 2 or least == 1 and starts[0][1] > 0:
                return starts
        return [(0, 0)]
    starts = []
    for label in re.finditer(_LABELS[style], text):
        if style == "number" and int(label[1][:9]) != len(starts) + 1:
            continue
        if style == "paragraph" and (not text[:label.start()].strip() or label.end() == len(text)):
            continue                                    # blank lines at the ends separate nothing
        starts.append((label.start(), label.end()))
    if style == "paragraph":
        return [(0, len(text) - len(text.lstrip()) if text.strip() else 0)] + starts
    return [(0, starts[0][1])] + starts[1:] if starts else [(0, 0)]


def split_steps(text: str, style: str = "auto") -> list[str]:
    """The steps of a solution, verbatim: "".join(steps) == text."""
    begins = [begin for begin, _ in step_starts(text, style)] + [len(text)]
    return [text[a:b] for a, b in zip(begins, begins[1:])]


# A value: a number, fraction, root or power, or several of them without a gap, as "1:2", "2\sqrt{3}", "3x^2".
_NUMBER, _BRACES = r"\d+(?:[.,]\d+)*", r"\{[^{}]*(?:\{[^{}]*\}[^{}]*)*\}"
_ATOM = rf"(?:{_NUMBER}|\\[dt]?frac\s*{_BRACES}\s*{_BRACES}|\\sqrt\s*{_BRACES}|[A-Za-z]?\^(?:{_BRACES}|{_NUMBER}))"
_VALUE = re.compile(rf"([-−–](\s*)\\?\$?)?({_ATOM}(?:(?:\s*/\s*|:)?{_ATOM})*)")


def last_value(text: str) -> Fraction | str | None:
    """The last value in a text with its sign: "so x = -\\frac{1}{2}." -> Fraction(-1, 2). Text where it is no plain
    number; None where there is none."""
    text = re.sub(r"\{,\}|,?\\[!,]", ",", text)        # LaTeX's ways to write 10,000
    found = [match for match in _VALUE.finditer(text) if re.search(r"\d", match[3])]
    if not found:
        return None
    minus, gap, value = found[-1].groups()
    value = re.sub(r"\s|,(?=\d{3}(?!\d))", "", value)
    value = re.sub(r"^\\[dt]?frac\{([^{}]*)\}\{([^{}]*)\}$", r"\1/\2", value)
    if minus:                                           # "= - 5" and "is -5" have a sign, "10 - 5" and "x-5" have none
        before = text[:found[-1].start()]
        if before.rstrip()[-1:] in tuple("=<>≤≥≈([{:") or not gap and not re.match(r"[\w)\]}%]", before[-1:]):
            value = "-" + value
    try:
        return Fraction(value)
    except (ValueError, ZeroDivisionError):             # "2^{10}", "1.2.3", "1/0", or thousands of digits
        return value


def same_step(a: str, b: str, style: str = "auto") -> bool:
    """Whether two steps, labels aside, come to the same: to the same last value, or, without values, in the same words."""
    def result(step):
        begin = step_starts(step, style)[0][1]
        if style in ("auto", "number") and not begin:   # one numbered step alone is no sequence, and may begin at 2
            label = re.match(_LABELS["number"], step)
            begin = label.end() if label else step_starts(step, "number")[0][1]
        own = step[begin:]
        value = last_value(own)
        return " ".join(own.lower().split()) if value is None else value
    return result(a) == result(b)


# ----------------------------------------------------------------------------------------------------------------------
# The first wrong step, from rollouts
# ----------------------------------------------------------------------------------------------------------------------

Counts = Sequence[Sequence[int] | None]                 # one entry a step
RIGHT, WRONG = (1.0, 1.0), (0.3, 10.0)  # Beta priors: rate of success before the first error; from it on
SAME, OTHER = (2.0, 0.5), (0.5, 5.0)                    # share of successes that take the same step, if right; if wrong


def error_posterior(values: Counts, agreement: Counts | None = None) -> list[float]:
    """P(step k is the first wrong one | rollouts), for every step of a solution whose final answer is wrong.

    values[i]     [successes, tries] of continuations from the prefix that ends after step i, or None
    agreement[i]  [same, successes, tries] of continuations from the prefix before step i (i = 0: the question alone),
                  or None: how many of the successful ones begin with the same step (`same_step`)

    If k is the first wrong step, the prefixes that end before it lead to the right answer at some rate p, those that
    hold it at a much smaller rate q; successful continuations from before a right step mostly take that step, those
    from before the wrong one avoid it. All four rates are unknown and integrated out under Beta priors, so each factor
    is a ratio of Beta functions of pooled counts. Without any rollout the posterior is uniform.

    Why not "the first step after which none of 8 succeeds"? On a hard problem none succeeds after right steps either,
    and now and then one does after a wrong one. The agreement looks at successes only, however hard the rest is. On the
    embedded task (198 errors of a 50 % policy) that rule finds 88 % of the errors with 8 rollouts a step, this
    posterior 93 % with the same ones, and 95 % with 6 a step where `next_prefix` puts them.
    """
    def evidence(rates, prior):                         # log of the integral of p^s (1-p)^(n-s) over Beta(a, b)
        (a, b), s, n = prior, sum(r[0] for r in rates), sum(r[1] for r in rates)
        log_beta = lambda a, b: math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
        return log_beta(a + s, b + n - s) - log_beta(a, b)
    before = [counts or (0, 0, 0) for counts in agreement or [None] * len(values)]
    # of the prefix before each step; what follows the whole wrong solution tells nothing
    rates = [before[0][1:]] + [value or (0, 0) for value in values[:-1]]
    scores = [evidence(rates[:k + 1], RIGHT) + evidence(rates[k + 1:], WRONG)
              + sum(evidence([counts], SAME) for counts in before[:k]) + evidence([before[k]], OTHER)
              for k in range(len(values))]
    weights = [math.exp(score - max(scores)) for score in scores]
    return [weight / sum(weights) for weight in weights]


def first_error_from_values(values: Counts, agreement: Counts | None = None) -> int | None:
    """Index of the first wrong step, if the rollouts make it clearly the most probable; None if they leave it open."""
    posterior = error_posterior(values, agreement)
    return posterior.index(max(posterior)) if max(posterior) > 0.7 else None


def next_prefix(values: Counts, agreement: Counts, most: int) -> int | None:
    """Before which step more rollouts help most: the one most suspected. A success there clears the steps before it
    and, by its own first step, clears or convicts this one. None when the place is found (19 to 1), or `most` rollouts
    have been spent before every suspect."""
    posterior = error_posterior(values, agreement)
    if len(posterior) == 1 or max(posterior) > 0.95:
        return None
    open_ones = [k for k in range(len(posterior)) if not agreement[k] or agreement[k][2] < most]
    return max(open_ones, key=posterior.__getitem__, default=None)


# ----------------------------------------------------------------------------------------------------------------------
# Judges: which step is the first wrong one?
# ----------------------------------------------------------------------------------------------------------------------

class Unclear(Exception):
    """A judge gives no verdict on a solution; the message says why, and is what is counted."""


class Stop(Exception):
    """The person at the terminal goes home."""


Judge = Callable[[dict], int | None]  # row with question, answer, steps -> index of the first wrong step


def rollout_counts(row: dict, name: str, width: int) -> list[list[int] | None]:
    """row["values"] (width 2) or row["agreement"] (width 3): for each step null, or counts from small to large."""
    counts, steps = row.get(name), len(row["steps"])
    if not isinstance(counts, list) or len(counts) != steps:
        raise DataError(f"field {name!r}: expected an entry for each of {steps} steps; eval.py --rollouts makes it")
    for entry in counts:
        if entry is not None and not (isinstance(entry, list) and len(entry) == width
                                      and all(type(n) is int for n in entry) and [0, *entry] == sorted([0, *entry])):
            raise DataError(f"field {name!r}: found {_shown(entry)}; expected null or {width} counts, as "
                            "eval.py --rollouts writes them")
    return counts


def judge_by_values(row: dict) -> int | None:
    """From the rollouts of `eval.py --rollouts`: no judge but the policy itself. `agreement` may be missing."""
    agreement = rollout_counts(row, "agreement", 3) if row.get("agreement") is not None else None
    first = first_error_from_values(rollout_counts(row, "values", 2), agreement)
    if first is None:
        raise Unclear("the rollouts leave open where it is")
    return first


JUDGE_PROMPT = """You check a student's solution to a mathematics problem, one step at a time.

Problem:
{question}

Correct solution or final answer, for comparison:
{solution}

The student's solution, cut into {count} steps:
{steps}

For each step in turn, decide:
  correct    the step is true and follows from the problem and the steps before it
  neutral    the step is neither right nor wrong: a plan, a restatement, a detour that does no harm
  incorrect  the step contains an error: a wrong calculation, a false claim, a misreading of the problem
A step may differ from the correct solution and still be correct. Errors of form alone do not count.

Answer with one line for each step, and nothing else:
Step <number>: <correct, neutral or incorrect>
Stop after the first incorrect step. If there is none, give a line for every step."""


def _right_solution(row: dict) -> str:
    return "\n".join(str(row[name]) for name in ("solution", "answer") if row.get(name))


def endpoint_judge(endpoint: Endpoint) -> Judge:
    """A judge model reads problem, right solution and attempt, as the paper asks GPT-4 to."""
    def judge(row: dict) -> int | None:
        steps = "\n".join(f"[Step {i}] {step.strip()}" for i, step in enumerate(row["steps"], 1))
        fields = {"question": row["question"], "solution": _right_solution(row), "count": str(len(row["steps"])),
                  "steps": steps}
        # one pass, so that braces inside the texts stay what they are
        prompt = re.sub(r"\{(\w+)\}", lambda name: fields[name[1]], JUDGE_PROMPT)
        replies = endpoint.chat([{"role": "user", "content": prompt}], temperature=0.0,
                                max_tokens=1024 + 16 * len(row["steps"]))
        return parse_verdicts(replies[0].text if replies else "", len(row["steps"]))
    return judge


def parse_verdicts(reply: str, count: int) -> int | None:
    """Index of the first step called incorrect; None if all are called correct or neutral. Otherwise Unclear."""
    line = r"^\W*(?:step\W*)?(\d{1,4})\W+(correct|incorrect|neutral)\b"
    for i, (number, verdict) in enumerate(re.findall(line, reply, flags=re.IGNORECASE | re.MULTILINE)):
        if int(number) != i + 1 or i >= count:
            break
        if verdict.lower() == "incorrect":
            return i
        if i + 1 == count:
            return None
    raise Unclear("the judge's reply could not be read")


def ask(row: dict) -> int | None:
    """A person at the terminal, one step at a time."""
    print("\n" + _block(f"problem {row['id']}", row["question"], "context"))
    print(_block("right answer", _right_solution(row), "chosen"))
    for i, step in enumerate(row["steps"]):
        print(_block(f"step {i + 1} of {len(row['steps'])}", step.strip("\n"), "title"))
        key = ""
        while key not in ("c", "n"):
            try:
                key = input("[c]orrect  [n]eutral  [i]ncorrect  [s]kip this solution  [q]uit, go on later > ")
            except EOFError:
                raise Stop from None
            key = key.strip().lower()[:1]
            if key == "q":
                raise Stop
            if key == "s":
                raise Unclear("skipped by the person asked")
            if key == "i":
                return i
    return None


def function_judge(name: str) -> Judge:
    """MODULE:FUNCTION: gets (question, steps, answer), all texts, and returns the first wrong step's index, or None."""
    module, _, function = name.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        checker = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise DataError(f"--judge {name}: {_one_line(error)}; expected values, endpoint, ask, or a MODULE:FUNCTION "
                        "that can be imported from here") from None
    finally:
        sys.path.pop(0)

    def judge(row: dict) -> int | None:
        steps = row["steps"]
        try:
            first = checker(row["question"], list(steps), row["answer"])
        except Exception as error:                      # somebody's own code: the row is named, the others go on
            raise DataError(f"--judge {name} raised {type(error).__name__}: {_one_line(error)}") from error
        if first is not None and (type(first) is not int or not 0 <= first < len(steps)):
            raise DataError(f"--judge {name} returned {_quote(repr(first))} for {len(steps)} steps; expected the index "
                            "of one (from 0), or None")
        return first
    return judge


def make_judge(name: str, args: argparse.Namespace) -> Judge:
    if name == "endpoint":
        if not (args.endpoint and args.api_model):
            raise DataError("the judge endpoint needs --endpoint URL and --api_model NAME")
        return endpoint_judge(Endpoint(args.endpoint, args.api_model))
    if name in ("values", "ask"):
        return judge_by_values if name == "values" else ask
    if ":" not in name:
        raise DataError(f"--judge {name}: expected values, endpoint, ask, or MODULE:FUNCTION")
    return function_judge(name)


# ----------------------------------------------------------------------------------------------------------------------
# File to file
# ----------------------------------------------------------------------------------------------------------------------

def write_rows(path: str | Path, rows: Iterable) -> int:
    """Write JSONL: the file is there whole or not at all. Returns the number of rows."""
    count = 0
    with written(Path(path)) as aside, aside.open("w", encoding="utf-8", newline="\n") as file:
        for count, row in enumerate(rows, 1):
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return count


COSTLY = ("endpoint", "ask")                            # judges whose verdicts are kept for good


def write_out(args: argparse.Namespace, rows: list[dict], bad: list[DataError]) -> int:
    """Write OUT and return the exit status. An OUT with other rows in it is not overwritten, unless by --restart or by
    the command that had left it incomplete."""
    out, made = Path(args.out), "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    if out.exists() and not args.restart and not args.completes and out.read_bytes() != made:
        kept = Path(f"{out}.verdicts").exists()
        raise DataError(f"{out}: exists and holds other rows; choose another --out, or " + (
            "delete it, and the same command makes it again from the verdicts" if kept else "begin anew with --restart"))
    write_rows(out, rows)
    return 1 if bad else 0


class Verdicts:
    """Verdicts on disk as they fall, one a line: hours of a judge's work survive a kill, and the same command goes on.

    The first line says what they belong to (a digest of the solutions, the judge); others are refused, not mixed in.
    """

    def __init__(self, path: Path, belongs_to: dict):
        self.path, self.done = path, {}
        # after the last line end stands nothing, or a line cut short by a kill
        lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
        try:
            if lines and json.loads(lines[0]) != belongs_to:
                raise ValueError("begun by a command with other solutions, another judge or other --steps")
            self.done = {tuple(key): verdict for key, verdict in map(json.loads, lines[1:])}
        except (ValueError, TypeError) as error:
            raise DataError(f"{path}: cannot be continued ({_one_line(error)}); finish that command, choose another "
                            "--out, or begin anew with --restart") from None
        write_rows(path, [belongs_to, *([key, verdict] for key, verdict in self.done.items())])
        self.file = path.open("a", encoding="utf-8", newline="\n")

    def add(self, key: tuple, verdict: int | str | None) -> None:
        self.done[key] = verdict
        with writing(self.path):
            self.file.write(json.dumps([key, verdict]) + "\n")
            self.file.flush()


def judge_all(rows: dict[tuple, dict], name: str, args: argparse.Namespace,
              bad: list[DataError]) -> dict[tuple, int | str | None]:
    """A verdict for every row: index of the first wrong step, None (nothing wrong), or the text of Unclear.

    Rows on which the judge fails are left out and named in `bad`; so are those that the person at the terminal did not
    come to (Stop is passed on). What is decided is in OUT.verdicts, from which the same command goes on.
    """
    judge, path = make_judge(name, args), Path(f"{args.out}.verdicts")
    if args.restart:
        path.unlink(missing_ok=True)
    begun = path.exists()
    if name in COSTLY and Path(args.out).exists() and not begun and not args.restart:
        raise DataError(f"{args.out}: exists, without {path.name} that would say how it was made; choose another "
                        "--out, or begin anew with --restart")
    digest = hashlib.sha256(json.dumps([[*key, row["steps"]] for key, row in rows.items()]).encode()).hexdigest()
    verdicts = Verdicts(path, {"solutions": digest, "judge": name})
    todo = [key for key in rows if key not in verdicts.done]
    args.completes = begun and bool(todo)

    def verdict(key: tuple) -> int | str | None | DataError:
        try:
            return judge(rows[key])
        except Unclear as reason:
            return str(reason)
        except EndpointError:
            raise
        except DataError as error:
            return DataError(f"{rows[key]['where']}: {error}")

    def as_they_fall() -> Iterator[tuple[tuple, int | str | None | DataError]]:
        if name != "endpoint":
            yield from ((key, verdict(key)) for key in todo)
            return
        with ThreadPoolExecutor(args.concurrency) as pool:
            futures = {pool.submit(verdict, key): key for key in todo}
            try:
                yield from ((futures[future], future.result()) for future in as_completed(futures))
            finally:
                pool.shutdown(cancel_futures=True)      # after an error: wait for what is under way, begin nothing new

    try:
        for key, found in tqdm(as_they_fall(), f"judge: {name}", len(todo), disable=True if name == "ask" else None):
            if isinstance(found, DataError):
                bad.append(found)
            else:
                verdicts.add(key, found)
    finally:
        with writing(verdicts.path):
            verdicts.file.close()
        if name == "values" or not rows or name not in COSTLY and len(verdicts.done) == len(rows):
            path.unlink()                               # what can be had again at no cost
    return {key: verdicts.done[key] for key in rows if key in verdicts.done}


def read_attempts(file: str, bad: list[DataError], *stages: str) -> Iterator[tuple[tuple[str, int], dict]]:
    """((id, sample), row) of the graded samples that eval.py wrote; rows that are none go to `bad`. DataError where the
    first row is of none of the pipeline's `stages`.

    A row gets `where`, and `text`: the whole solution, prefix + completion.
    """
    seen = {}
    for number, (where, row) in enumerate(read_rows(file, bad)):
        if number == 0:
            expect(row, where, *stages)
        try:
            kept = writable(row, where)
            id, sample = row.get("id"), row.get("sample", 0)
            if not isinstance(id, (str, int)) or type(sample) is not int:
                raise DataError(f"{where}: fields 'id', 'sample': found {_shown([id, sample])}; expected a "
                                "name and a number, as eval.py writes them")
            key = str(id), sample
            _, answer, completion = (text_field(row, name, where) for name in ("question", "answer", "completion"))
            prefix = text_field(row, "prefix", where) if "prefix" in row else ""
            if not answer.strip():
                raise DataError(f"{where}: field 'answer': empty; a problem needs its right answer")
            if not isinstance(row.get("correct"), bool):
                raise DataError(f"{where}: field 'correct': found {_kind(row.get('correct'))}; expected true or false, "
                                "as eval.py grades it")
            if key in seen:
                raise DataError(f"{where}: id {key[0]!r}, sample {sample} stands in {seen[key]} already; remove one")
            seen[key] = where
            yield key, kept | {"where": where, "text": prefix + completion}
        except DataError as error:
            bad.append(error)


def funnel(stages: Iterable[tuple[str, int]]) -> str:
    """How much is left after each stage; indented names are what fell out in between."""
    return "\n".join(f"  {count:>9,}  {name}" for name, count in stages if count or not name.startswith(" "))


def complain(bad: list[DataError], shown: int = 20) -> None:
    """Name the rows that could not be used, on stderr."""
    for error in bad[:shown]:
        print(f"skipped: {error}", file=sys.stderr)
    if len(bad) > shown:
        print(f"skipped: {len(bad) - shown} more rows", file=sys.stderr)


OF_AN_ATTEMPT = ("id", "sample", "prefix", "completion", "extracted", "correct", "tokens", "stop_reason", "steps",
                 "values", "agreement", "where", "text")        # the other fields are the problem's and are passed on


def localize(args: argparse.Namespace) -> int:
    """attempts -> errors: of each wrong attempt the prefix up to its first wrong step, that step, and the rest."""
    bad, wrong, stages, problems = [], {}, Counter(), set()
    valued = () if args.judge == "values" else ("attempts",)
    for key, row in read_attempts(args.file, bad, *valued, "valued attempts", "rectified attempts"):
        stages["attempts"] += 1
        problems.add(key[0])
        stages["wrong"] += not row["correct"]
        if row["correct"]:
            continue
        if row.get("stop_reason") == "length":          # it has no end, so its answer is wrong for another reason
            stages["cut off"] += 1
            continue
        steps = split_steps(row["text"], args.steps)
        if row.get("steps", steps) != steps:
            bad.append(DataError(f"{row['where']}: field 'steps': not the text cut by --steps {args.steps}; give the "
                                 "style that eval.py --rollouts was given"))
            continue
        wrong[key] = row | {"steps": steps}
    try:
        verdicts = judge_all(wrong, args.judge, args, bad)
    except Stop:
        print(f"stopped; {args.out}.verdicts holds what was decided, and the same command goes on", file=sys.stderr)
        return 1
    errors, reasons = {}, Counter()
    for key, first in verdicts.items():
        if not isinstance(first, int):
            reasons[first or "no wrong step was found"] += 1
            continue
        row, text = wrong[key], wrong[key]["text"]
        starts = step_starts(text, args.steps) + [(len(text),) * 2]
        begin, end = starts[first][1], starts[first + 1][0]
        identity = row["question"], text[:begin], text[begin:end]
        if not text[begin:end].strip():
            reasons["the wrong step is empty"] += 1
        elif identity in errors:
            reasons["the same error again"] += 1
        else:
            carried = {name: value for name, value in row.items() if name not in OF_AN_ATTEMPT}
            errors[identity] = {"id": f"{key[0]}#{key[1]}"} | carried | {
                "prefix": text[:begin], "rejected": text[begin:end], "full_rejected": text[begin:], "step": first + 1}
    complain(bad)
    print(funnel([("problems", len(problems)), ("attempts", stages["attempts"]), ("wrong", stages["wrong"]),
                  ("    cut off by the length limit, not judged", stages["cut off"]),
                  *((f"    {reason}", count) for reason, count in reasons.most_common()), ("located", len(errors))]))
    if not errors:
        raise DataError(f"{args.file}: no first wrong step was located, nothing to write to {args.out}")
    return write_out(args, list(errors.values()), bad)


def pairs(args: argparse.Namespace) -> int:
    """rectified attempts -> pairs in the columns of Math-Step-DPO-10K."""
    bad, stages = [], Counter()
    if args.whole and args.verify:
        raise DataError("--verify judges a chosen step; whole answers (--whole) are right by their final answer")
    stages_taken = ("attempts", "valued attempts", "rectified attempts") if args.whole else ("rectified attempts",)
    rows = list(read_attempts(args.file, bad, *stages_taken))
    candidates = whole_pairs(rows, stages) if args.whole else step_pairs(rows, args.steps, stages, bad)
    if args.verify:
        solutions = {key: {"id": key[0], "where": key[0], "question": pair["prompt"], "answer": pair["answer"],
                           "steps": split_steps(pair["initial_reason_steps"] + pair["full_chosen"], args.steps)}
                     for key, pair in candidates.items()}
        verdicts = judge_all(solutions, args.verify, args, bad)
        before = len(candidates)
        for key, pair in list(candidates.items()):      # right, or wrong only after the chosen step
            first = verdicts.get(key, "no verdict")
            steps = split_steps(pair["initial_reason_steps"] + pair["chosen"], args.steps)
            if not (first is None or isinstance(first, int) and first >= len(steps)):
                del candidates[key]
        stages["    not verified by the judge"] = before - len(candidates)
    kept, taken, source = [], Counter(), "problem" if args.whole else "error"
    for (origin, *_), pair in candidates.items():
        taken[origin] += 1
        if args.per_error and taken[origin] > args.per_error:
            stages[f"    more than {args.per_error} from one {source} (--per_error)"] += 1
        else:
            kept.append(pair | {"dataset": args.dataset} if args.dataset else pair)
    complain(bad)
    print(funnel([*stages.items(), ("pairs", len(kept))]))
    if not kept:
        raise DataError(f"{args.file}: no pair came of it, nothing to write to {args.out}")
    return write_out(args, kept, bad)


def step_pairs(rows: list[tuple[tuple, dict]], style: str, stages: Counter, bad: list[DataError]) -> dict[tuple, dict]:
    """Distinct first steps of the continuations that reach the right answer, against the wrong step they replace."""
    stages.update({"located errors": 0, "continuations": 0, "right": 0})
    candidates, errors, rectified = {}, set(), set()
    for (id, _), row in rows:
        try:
            prefix, rejected, rest = (text_field(row, name, row["where"])
                                      for name in ("prefix", "rejected", "full_rejected"))
            if not rest.startswith(rejected):
                raise DataError(f"{row['where']}: field 'rejected': is not the beginning of 'full_rejected'; both are "
                                "the wrong attempt from the wrong step on, as data.py localize writes them")
        except DataError as error:
            bad.append(error)
            continue
        errors.add(id)
        stages["continuations"] += 1
        if not row["correct"]:
            continue
        stages["right"] += 1
        rectified.add(id)
        begins = [begin for begin, _ in step_starts(row["text"], style) if begin >= max(len(prefix), 1)]
        chosen = row["text"][len(prefix):(begins + [None])[0]]          # up to the next label
        key = id, " ".join(chosen.split())
        if row.get("stop_reason") == "length":
            stages["    cut off by the length limit"] += 1
        elif not key[1]:
            stages["    the first step is empty"] += 1
        elif key[1] == " ".join(rejected.split()):
            stages["    the first step is the rejected one"] += 1
        elif key in candidates:
            stages["    the same first step again"] += 1
        else:
            candidates[key] = {
                "dataset": row.get("dataset", ""), "prompt": row["question"], "initial_reason_steps": prefix,
                "chosen": chosen, "rejected": rejected, "full_chosen": row["completion"], "full_rejected": rest,
                "answer": row["answer"]}
    stages["located errors"], stages["rectified errors"] = len(errors), len(rectified)
    return candidates


def whole_pairs(rows: list[tuple[tuple, dict]], stages: Counter) -> dict[tuple, dict]:
    """Plain DPO's pairs: independently sampled right and wrong whole answers of a problem, the i-th right one with the
    i-th wrong one."""
    stages.update({"problems": 0, "attempts": len(rows)})
    sides: dict[str, tuple[dict, dict]] = {}            # problem -> its distinct right, its distinct wrong answers
    for (id, _), row in rows:
        side = sides.setdefault(id, ({}, {}))[not row["correct"]]
        if row.get("stop_reason") == "length":          # training would put an end token where there is no end
            stages["    cut off by the length limit"] += 1
        elif row["text"].strip() in side:
            stages["    the same answer again"] += 1
        else:
            side[row["text"].strip()] = row
    stages["problems"] = len(sides)
    stages["problems with right and wrong answers"] = sum(bool(right and wrong) for right, wrong in sides.values())
    return {(id, i): {"dataset": a.get("dataset", ""), "prompt": a["question"], "initial_reason_steps": "",
                      "chosen": a["text"], "rejected": b["text"], "full_chosen": a["text"], "full_rejected": b["text"],
                      "answer": a["answer"]}
            for id, (right, wrong) in sides.items() for i, (a, b) in enumerate(zip(right.values(), wrong.values()))}


# ----------------------------------------------------------------------------------------------------------------------
# An OpenAI-compatible server
# ----------------------------------------------------------------------------------------------------------------------

class EndpointError(DataError):
    """The server cannot be used: it is not there, or refuses every request. What is finished is kept."""


class RequestRefused(DataError):
    """The server refuses this one request (too long, say); others may go through."""


class Reply(NamedTuple):
    text: str
    finish_reason: str                                  # "stop", "length", ...


class Endpoint:
    """A server that speaks OpenAI's protocol (vLLM, llama.cpp, transformers serve, ...). Safe to use from many threads.

    url: "http://host:8000" or ".../v1"; model: the name that the server knows it by; key: by default OPENAI_API_KEY of
    the environment.
    """
    BUSY = (408, 409, 425, 429)                         # and every 5xx: the same request may succeed a little later

    def __init__(self, url: str, model: str, key: str | None = None, timeout: float = 600, attempts: int = 8,
                 pause: float = 1.0):
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise DataError(f"--endpoint {url}: expected an address such as http://localhost:8000/v1")
        self.url = url.rstrip("/") + ("/v1" if parts.path in ("", "/") else "")
        self.model, self.key = model, key or os.environ.get("OPENAI_API_KEY")
        self.timeout, self.attempts, self.pause, self.warned = timeout, attempts, pause, False
        self.opener = urllib.request.build_opener(_NoRedirect)

    def chat(self, messages: list[dict[str, str]], **settings) -> list[Reply]:
        """POST chat/completions with max_tokens, temperature, n, stop, ... as given; one Reply for each choice."""
        answer = self.post("chat/completions", {"messages": messages} | settings)
        try:
            return [Reply(choice["message"].get("content") or "", choice.get("finish_reason") or "stop")
                    for choice in answer["choices"]]
        except (AttributeError, KeyError, TypeError):
            found = _quote(json.dumps(answer), 200)
            raise RequestRefused(f"{self.url}: an answer that is no chat completion: {found}") from None

    def post(self, path: str, body: dict) -> dict:
        """POST {url}/{path} with {"model": ...} | body; the reply's JSON object.

        A busy server (429, 5xx), a broken or silent connection and a reply cut short are tried again, `attempts` times
        in all, after pauses of 1, 2, 4, ... seconds with jitter, or what Retry-After asks for, at most a minute. Raises
        RequestRefused where the server refuses just this request, EndpointError where none can succeed (wrong key,
        wrong address, gone).
        """
        where = f"{self.url}/{path}"
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        request = urllib.request.Request(where, json.dumps({"model": self.model} | body).encode(), headers)
        for attempt in range(self.attempts):
            wait = self.pause * 2 ** attempt * random.uniform(0.5, 1.0)
            try:
                with self.opener.open(request, timeout=self.timeout) as response:
                    reply = json.loads(response.read(2**26))
                if isinstance(reply, dict):
                    return reply
                trouble = "the reply is not a JSON object"
            except urllib.error.HTTPError as error:
                trouble = f"HTTP {error.code} {error.reason}"
                try:
                    said = _quote(_one_line(error.read(2000).decode("utf-8", "replace")), 200)
                except (OSError, http.client.HTTPException):
                    said = "(the explanation was cut off)"
                if error.code in (400, 413, 422):
                    raise RequestRefused(f"{where}: {trouble}: {said}") from None
                if error.code not in self.BUSY and error.code < 500:
                    check = "check --endpoint, --api_model and the key in OPENAI_API_KEY"
                    raise EndpointError(f"{where}: {trouble}: {said}; {check}") from None
                asked = error.headers.get("Retry-After", "")
                wait = float(asked) if asked.isdecimal() else wait
            except (OSError, http.client.HTTPException, ValueError, RecursionError) as error:
                trouble = f"{type(error).__name__}: {_one_line(error)}"        # refused, reset, timed out, cut short
            if attempt + 1 < self.attempts:
                if not self.warned:
                    self.warned = True
                    print(f"{where}: {trouble}; trying again, up to {self.attempts} times a request", file=sys.stderr)
                time.sleep(min(wait, 60))
        raise EndpointError(f"{where}: no answer after {self.attempts} attempts (last: {trouble}); is the server up? "
                            "What is finished is kept: the same command continues")


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_):                     # it would resend the key to wherever the answer points
        return None


# ======================================================================================================================
# APPENDIX. Looking at data; the command line.
# ======================================================================================================================

# ----------------------------------------------------------------------------------------------------------------------
# python data.py show: a row, and what becomes of it
# ----------------------------------------------------------------------------------------------------------------------

COLOURS = {"context": "2", "chosen": "32", "rejected": "31", "title": "1"}


def _paint(text: str, role: str) -> str:
    plain = not sys.stdout.isatty() or "NO_COLOR" in os.environ
    return text if plain else "\n".join(f"\033[{COLOURS[role]}m{line}\033[0m" for line in text.split("\n"))


def _block(title: str, text: str, role: str) -> str:
    """A titled text with a bar at its left. Control characters are shown as escapes: a terminal would obey them."""
    safe = re.sub(r"[^\n\t\x20-\x7e\xa0-\U0010ffff]", lambda found: f"\\x{ord(found[0]):02x}", text)
    return "\n".join([_paint(title, "title")] + [f"  | {_paint(line, role)}" for line in safe.split("\n")])


def _width(text: str) -> int:
    """Columns that a terminal needs."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def token_picture(ids: Sequence[int], targets: Sequence[int], tokenizer: Tokenizer, context: Sequence[int] = (),
                  columns: int = 110) -> str:
    """Tokens in lines, with the loss mask below: . = read only, ^ = predicted (loss), 2 = predicted once for each side.

    Spaces are drawn as ·, line ends as ⏎; a character that needs several tokens is drawn as �, once for each of them.
    """
    lines, tokens, mask, used = [], [], [], 0
    ids = list(ids)
    for i, times in enumerate(targets):
        piece = tokenizer.continuation((list(context) + ids[:i])[-16:], [ids[i]]) or "�"
        piece = piece.replace(" ", "·").replace("\n", "⏎").replace("\t", "⇥")
        piece = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in piece)
        if used + _width(piece) + 1 > columns and tokens:
            lines += [" ".join(tokens), " ".join(mask), ""]
            tokens, mask, used = [], [], 0
        tokens.append(piece)
        mask.append(".^2"[times] * _width(piece))
        used += _width(piece) + 1
    return "\n".join(lines + [" ".join(tokens), " ".join(mask)])


def show_row(where: str, row: dict, example: Example | None, tokenizer: Tokenizer, method: str, style: str) -> str:
    """The teaching picture: the texts of a row, then the segments of its batch with the loss mask."""
    question, steps, responses = texts_of(row, method, where)
    of = {"chosen": "s_win" if method == "stepdpo" else "whole answer",
          "rejected": "s_lose" if method == "stepdpo" else "whole answer"}
    parts = [_paint(f"{where}   method {method}, prompt style {style}", "title"), "",
             _block("prompt x (read, no loss)", render_prompt(style, question, tokenizer), "context")]
    if steps:
        parts.append(_block("correct steps s_1..s_{k-1} (read, no loss)", steps, "context"))
    parts += [_block(f"{name}: {of[name]} (loss)", text, name) for name, text in zip(of, responses)]
    if example is None:
        return "\n".join(parts)

    layout = lay_out(example.sides, [0] * len(example.sides))
    sides_at = np.zeros((len(example.sides), len(layout.tokens)), dtype=int)     # 1 read, 2 predicted by that side
    for side, places in enumerate(layout.places):
        sides_at[side, places] = 1
        sides_at[side, places[example.start:]] = 2
    times = (sides_at == 2).sum(0)                      # how often each token is predicted
    legend = "(. read only   ^ loss" + ("   2 predicted for both sides: it cancels in the difference)" if 2 in times else ")")
    parts += ["", _paint(f"the same as {len(layout.tokens)} tokens in a batch   {legend}", "title")]
    begin, trunk = 0, {-1: []}                          # of each segment: the tokens up to its end
    for segment, (length, parent) in enumerate(zip(layout.lengths, layout.parents)):
        here = slice(begin, begin + length)
        ids, positions = layout.tokens[here].tolist(), layout.positions[here]
        through = [name for name, side in zip(of, sides_at) if side[begin]]
        title = " and ".join(through) if len(example.sides) > 1 else "the whole row"
        title += ", computed once" if len(through) > 1 else f", sees segment {parent} and itself" if parent >= 0 else ""
        role = "context" if len(through) > 1 or len(example.sides) == 1 else through[0]
        picture = token_picture(ids, times[here].tolist(), tokenizer, trunk[parent])
        parts.append(_block(f"segment {segment}: {title}; {length} tokens, positions {positions[0]}..{positions[-1]}",
                            picture, role))
        trunk[segment] = trunk[parent] + ids
        begin += length
    ends = "no end token follows: the solution goes on" if method == "stepdpo" else \
        f"the answer ends with {tokenizer.decode([int(example.chosen[-1])])}"
    return "\n".join(parts + [f"{sum(len(tokens) for _, tokens in example.predicted)} tokens carry loss; {ends}"])


def show_solution(where: str, row: dict, style: str) -> str:
    """A sampled solution, cut into its steps, with what rollouts say of each where the file has them."""
    prefix = text_field(row, "prefix", where) if "prefix" in row else ""
    steps = split_steps(prefix + text_field(row, "completion", where), style)
    counts = {"values": [None] * len(steps), "agreement": [None] * len(steps)}
    for name, width in (("values", 2), ("agreement", 3)):
        if row.get(name) is not None:
            try:
                counts[name] = rollout_counts(row | {"steps": steps}, name, width)
            except DataError as error:
                raise DataError(f"{where}: {error}") from None
    verdict = {True: "right", False: "wrong"}.get(row.get("correct"), "not graded")
    parts = [_paint(f"{where}   {len(steps)} steps (--steps {style}), {verdict}", "title"), "",
             _block("question", text_field(row, "question", where), "context")]
    for i, (step, after, before) in enumerate(zip(steps, *counts.values()), 1):
        title = f"step {i}" + (f"; from its end {after[0]} of {after[1]} rollouts succeed" if after else "")
        title += f"; {before[0]} of the {before[1]} that succeed from before it take it" if before and before[1] else ""
        parts.append(_block(title, step.strip("\n"), "chosen" if row.get("correct") else "rejected"))
    return "\n".join(parts + [f"extracted answer {row.get('extracted')!r}, right answer {row.get('answer')!r}"])


def statistics(examples: Sequence[Example], report: Report) -> str:
    """Lengths of a file's rows in tokens, and the work that sharing the common beginning saves."""
    columns = {"context (no loss)": [e.start for e in examples],
               "chosen (loss)": [len(e.chosen) - e.start for e in examples]}
    pairs = [e for e in examples if e.rejected is not None]
    if pairs:
        columns |= {"rejected (loss)": [len(e.rejected) - e.start for e in pairs],
                    "alike on both sides": [common_length(e.chosen, e.rejected) for e in pairs]}
    columns["whole row in a batch"] = [e.length for e in examples]
    lines = [str(report), "", f"{'tokens':<24}{'min':>8}{'5 %':>8}{'median':>8}{'95 %':>8}{'max':>8}{'sum':>14}"]
    for name, values in columns.items():
        spread = "".join(f"{value:>8,.0f}" for value in np.percentile(values, [0, 5, 50, 95, 100]))
        lines.append(f"  {name:<22}{spread}{sum(values):>14,}")
    families: dict = {}
    for row, example in enumerate(examples):
        families.setdefault(family_of(example, row), []).append(row)
    return "\n".join(lines + ["", tokens_shared(examples, list(families.values()))])


def tokens_shared(examples: Sequence[Example], micro_batches: Iterable[list[int]]) -> str:
    """What the tree saves: tokens of all texts one by one, of rows alone, and of rows together in these micro-batches."""
    separate = sum(len(side) for example in examples for side in example.sides)
    alone = sum(example.length for example in examples)
    together = sum(tokens_in_tree([side for row in rows for side in examples[row].sides]) for rows in micro_batches)
    saved = lambda tokens: f"{tokens:,} ({1 - tokens / separate:.1%} saved)"
    return (f"tokens: {separate:,} text by text; what begins alike once: {saved(alone)} in each row, "
            f"{saved(together)} in rows of one problem too")


def show(args: argparse.Namespace) -> int:
    rows = list(read_rows(args.data))
    columns = rows[0][1]
    if args.row is not None and args.row > len(rows):
        raise DataError(f"{args.data}: --row {args.row}: the file has rows 1 to {len(rows)}")
    if "completion" in columns:
        print(show_solution(*rows[(args.row or 1) - 1], args.steps))
        return 0
    if not args.model:
        raise DataError("--model is needed to show the tokens of training rows: a checkpoint, whose tokenizer is read")
    suggested = "sft" if "response" in columns else "stepdpo" if "initial_reason_steps" in columns else "dpo"
    method = args.method or suggested
    tokenizer = Tokenizer.from_pretrained(resolve(args.model))
    limit = _settings(resolve(args.model) / "config.json").get("max_position_embeddings")
    if type(limit) is int and limit < args.max_length:
        print(f"--max_length {args.max_length}: the model's positions end at {limit}, so longer rows are dropped\n")
        args.max_length = limit
    examples, report = encode_dataset(args.data, tokenizer, method, args.prompt, args.max_length)
    kept = {example.where: example for example in examples}
    where, row = rows[args.row - 1] if args.row else next((where, row) for where, row in rows if where in kept)
    print(show_row(where, row, kept.get(where), tokenizer, method, args.prompt))
    if where not in kept:
        print(_paint("dropped: " + next(reason for reason, rows in report.dropped.items() if where in rows), "title"))
    print("\n" + statistics(examples, report))
    return 0


# ----------------------------------------------------------------------------------------------------------------------
# The sandbox of chat templates
# ----------------------------------------------------------------------------------------------------------------------

class _GenerationTag(Extension):
    """{% generation %}...{% endgeneration %}: in some templates, around the assistant's words. Its body as it is."""
    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


# What a template may call. Of these only replace, join and indent make more than they are given.
_FILTERS = frozenset("abs capitalize count d default dictsort e escape first float indent int items join last length "
                     "list lower map max min reject rejectattr replace reverse safe select selectattr sort string "
                     "title tojson trim unique upper".split())
_METHODS = frozenset("capitalize count endswith find get index isalnum isalpha isdecimal isdigit islower isnumeric "
                     "isspace istitle isupper items join keys lower lstrip partition removeprefix removesuffix replace "
                     "rfind rindex rpartition rsplit rstrip split splitlines startswith strip swapcase title upper "
                     "values".split())
_SIZED = (str, list, tuple, dict, range)


class _Sandbox(ImmutableSandboxedEnvironment):
    """Where chat templates run, with the settings and helpers of transformers: real templates need them.

    A template is a stranger's program. jinja2's sandbox keeps it from Python's internals. That it ends, in little
    memory, is seen to here: each turn of a loop, each call and each thing that is made is paid for by its size, `fuel`
    is far more than prompts need, and what would be huge is refused beforehand. `deadline` is for what is slow
    otherwise.
    """
    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, source: str):
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _GenerationTag])
        self.filters = {name: self._paid(name, (self.filters | {"tojson": _to_json})[name]) for name in _FILTERS} | {
            "pay": pass_context(lambda _, value: self.pay(value)),
            "turn": pass_context(lambda _, cost: self.pay(True, max(1, cost)))}
        # a fixed day, the one that Llama 3's templates fall back to: a prompt must not change overnight
        self.globals |= {"strftime_now": datetime(2024, 7, 26).strftime, "raise_exception": self._raise,
                         "namespace": _Namespace, "lipsum": None}
        self.fuel, self.deadline = 1_000_000, time.thread_time() + 5
        self.pay(source, 4 * len(source))
        self.template = self.from_string(source)

    def render(self, messages: list[dict[str, str]], **names) -> str:
        self.fuel = 1_000_000 + 100 * sum(len(message["content"]) for message in messages)
        self.deadline = time.thread_time() + 5
        return self.template.render(messages=messages, **names)

    def pay(self, value, cost: int = 1):
        """`value`, after its size is paid for: characters, items, and the items of items."""
        todo = [value]
        while todo:
            item = todo.pop()
            self.fuel -= cost + (len(item) if isinstance(item, _SIZED) else 0)
            if self.fuel < 0 or time.thread_time() > self.deadline:
                raise SecurityError("it takes too many turns, makes too much text, or needs more than 5 seconds")
            if isinstance(item, (list, tuple, dict)):
                todo += [*item, *item.values()] if isinstance(item, dict) else item
        return value

    def _refuse_growth(self, values) -> None:
        """Before replace, join, indent or *: the two largest of the arguments tell how much is made at most."""
        sizes = [len(x) if isinstance(x, _SIZED) else abs(x) if isinstance(x, (int, float)) else 1 for x in values]
        if math.prod(sorted(sizes)[-2:]) > self.fuel:
            raise SecurityError("it makes too much text")

    def _paid(self, name: str, function: Callable) -> Callable:
        @functools.wraps(function)
        def paid(*args, **options):
            self.pay((args, options))
            if name in ("replace", "join", "indent"):
                self._refuse_growth([*args, *options.values()])
            made = function(*args, **options)
            return self.pay(list(made) if isinstance(made, Iterator) else made)
        return paid

    def call(self, context, function, *args, **options):
        name, of = getattr(function, "__name__", ""), getattr(function, "__self__", "")
        if name in ("format", "format_map"):
            raise SecurityError(f"{name} is not allowed in a template")
        self.pay((of, args))
        if name in ("replace", "join"):
            self._refuse_growth((of, *args))
        made = super().call(context, function, *args, **options)
        return self.pay(list(made) if isinstance(made, MappingView) else made)

    def call_binop(self, context, operator, left, right):
        if operator == "**" or operator == "%" and isinstance(left, str):
            raise SecurityError(f"{operator} on such values is not allowed in a template")
        if operator == "*":
            self._refuse_growth((left, right))
        return self.pay(super().call_binop(context, operator, left, right))

    def is_safe_attribute(self, value, name, attribute) -> bool:
        known = name in _METHODS or not isinstance(value, (str, bytes, int, float, list, tuple, dict))
        return known and super().is_safe_attribute(value, name, attribute)

    def _parse(self, source, name, filename):
        return _Meter().visit(super()._parse(source, name, filename)).set_environment(self)

    @staticmethod
    def _raise(message):
        raise TemplateError(message)


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    if (indent or 0) > 16 or len(repr(separators)) > 20:
        raise SecurityError("tojson with such options is not allowed in a template")
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class _Namespace(Namespace):
    __repr__ = lambda self: "<namespace>"               # not what is in it: that may be in it many times over


class _Meter(NodeTransformer):
    """Has a template pay for the turns of its loops, and for what it makes other than by calls, filters and sums."""

    def paid(self, node, *_):
        return nodes.Filter(self.generic_visit(node), "pay", [], [], None, None, lineno=node.lineno)

    visit_Concat = visit_List = visit_Dict = visit_Compare = paid

    def visit_Tuple(self, node):
        return self.paid(node) if node.ctx == "load" else node

    def visit_Getitem(self, node):
        return self.paid(node) if isinstance(node.arg, nodes.Slice) else self.generic_visit(node)

    def visit_Output(self, node):
        node.nodes = [x if isinstance(x, nodes.TemplateData) else self.paid(x) for x in node.nodes]
        return node

    def visit_For(self, node):
        text = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
        turn = nodes.Filter(nodes.Const(1 + text), "turn", [], [], None, None, lineno=node.lineno)
        self.generic_visit(node)
        node.test = nodes.And(turn, node.test) if node.test else turn
        return node


# ----------------------------------------------------------------------------------------------------------------------
# Command line
# ----------------------------------------------------------------------------------------------------------------------

def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number from 1 on")
    return int(text)


USAGE = """Look at preference data, and make it from graded attempts.

  see what is trained   python data.py show --data pairs.jsonl --model M
  locate the errors     python data.py localize valued.jsonl --judge values --out errors.jsonl
  pair                  python data.py pairs rectified.jsonl --out pairs.jsonl

eval.py makes the attempts, their step values and the rectified continuations (see its --help). Each command has its
own --help: python data.py pairs --help. Exit status: 0; 1 if rows had to be skipped (each is named) or it is not
finished; 2 if the command cannot be carried out."""


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="data.py", description=USAGE, formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="{show,localize,pairs}")

    command = commands.add_parser(
        "show", help="print a row and what becomes of it: texts, tokens with the loss mask, statistics",
        description="Print a row of a training file and what becomes of it: its texts, its tokens with the loss mask, "
                    "and statistics of the file. Of a file of attempts: a solution cut into its steps.")
    command.add_argument("--data", required=True, metavar="F", help=".jsonl, .json or .parquet file, or a hub dataset")
    command.add_argument("--model", metavar="M", help="checkpoint folder (or hub id) whose tokenizer is used")
    command.add_argument("--prompt", choices=PROMPT_STYLES, default="chat",
                         help="prompt style; chat is the checkpoint's own template (default: %(default)s)")
    command.add_argument("--method", choices=METHODS, help="what would train on it (default: what the columns suggest)")
    command.add_argument("--row", type=_positive, metavar="I", help="1 = the first row (default: the first kept one)")
    command.add_argument("--max_length", type=_positive, default=1024, metavar="N",
                         help="longer rows are dropped, in tokens (default: %(default)s)")
    command.set_defaults(run=show)

    command = commands.add_parser(
        "localize", help="attempts -> errors: find the first wrong step of every wrong attempt",
        description="Find the first wrong step of every wrong attempt. Writes one row for each: the prefix up to that "
                    "step's label, the step, and the wrong rest; eval.py continues from such prefixes.")
    command.add_argument("file", metavar="F", help="attempts that eval.py wrote (for --judge values: with --rollouts)")
    command.add_argument("--judge", required=True, metavar="J",
                         help="values (rollouts of eval.py --rollouts), endpoint (a judge model on a server), ask "
                              "(you, in the terminal), or MODULE:FUNCTION: a function of your own that gets "
                              "(question, steps, answer) and returns the first wrong step's index (from 0) or None")
    command.set_defaults(run=localize)

    command = commands.add_parser(
        "pairs", help="rectified attempts -> pairs to train on, in the columns of Math-Step-DPO-10K",
        description="Make preference pairs: the distinct first steps of those continuations whose final answer is "
                    "right, each against the wrong step that it replaces.")
    command.add_argument("file", metavar="F", help="graded continuations of errors, by eval.py (--whole: any attempts)")
    command.add_argument("--per_error", type=_positive, metavar="N",
                         help="at most N pairs from one error (with --whole: one problem); default: all")
    command.add_argument("--whole", action="store_true",
                         help="pair independently sampled right and wrong whole answers instead: plain DPO's data")
    command.add_argument("--verify", metavar="J",
                         help="keep only steps in which this judge finds no error: endpoint, ask, MODULE:FUNCTION")
    command.add_argument("--dataset", metavar="NAME", help="for the column dataset (default: what the rows carry)")
    command.set_defaults(run=pairs)

    for name in ("localize", "pairs"):
        command = commands.choices[name]
        command.add_argument("--out", required=True, metavar="F", help="JSONL file to write")
        command.add_argument("--restart", action="store_true", help="begin anew, whatever an earlier run has left at F")
        command.set_defaults(completes=False)
        command.add_argument("--endpoint", metavar="URL", help="the judge's OpenAI-compatible server, such as "
                             "http://localhost:8000/v1; the key is read from OPENAI_API_KEY")
        command.add_argument("--api_model", metavar="NAME", help="name of the judge model on that server")
        command.add_argument("--concurrency", type=_positive, default=8, metavar="N",
                             help="requests at a time (default: %(default)s)")
    for command in commands.choices.values():
        command.add_argument("--steps", choices=STEP_STYLES, default="auto",
                             help='how steps are told apart: step ("Step 1:", the paper), heading ("**Step 1:**", '
                                  '"Step 1."), number ("1."), paragraph (blank lines); auto, the default: the first of '
                                  'these that is found')
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def run_command(run: Callable[[], int], debug: bool = False) -> int:
    """The exit status of `run`, a command of this project: its own, or 2 behind one line that says what is wrong and what to do; 130 where it was
    interrupted. debug: the traceback instead. Under torchrun one process of a machine speaks."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")        # a terminal that has no "·" shows "?"
    try:
        status = run()
        sys.stdout.flush()
        return status
    except BrokenPipeError:                             # "... | head" has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("interrupted; the same command continues", file=sys.stderr)
        return 130
    except Exception as error:
        lost = isinstance(error, RuntimeError) and torch.distributed.is_initialized() and "onnection" in str(error)
        expected = (DataError, CheckpointError, FloatingPointError, OSError, torch.OutOfMemoryError)
        if debug or not (lost or isinstance(error, expected)):
            raise
        message = str(error)
        if isinstance(error, torch.OutOfMemoryError):
            message = (f"out of GPU memory ({message.splitlines()[0]}); what is finished is kept: go on with a lower --micro_batch_tokens or "
                       "--max_length, or with --gradient_checkpointing (stepdpo.py); with a lower --batch_size (eval.py)")
        elif lost:
            message = "another process of this run has ended; if it failed, it says why. The same command continues"
        if os.environ.get("LOCAL_RANK", "0") == "0" or isinstance(error, OSError):      # a disk may be full for one only
            print(f"error: {message}", file=sys.stderr)
        else:
            time.sleep(2)                               # torchrun ends the others as soon as one has ended: the first speaks
        return 2


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done; 1 rows were skipped (named on stderr), or not finished; 2 an error, nothing written."""
    args = arguments().parse_args(argv)

    def run() -> int:
        if args.command == "show":
            return args.run(args)
        if Path(args.out).resolve() == Path(args.file).resolve():
            raise DataError(f"--out {args.out}: is the input; give another name")
        with locked(args.out):
            return args.run(args)
    return run_command(run, args.debug)


if __name__ == "__main__":
    sys.exit(main())
