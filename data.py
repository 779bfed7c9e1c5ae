"""Preference data: from rows of text to the flat batches that the loss sees, and the files in between.

One row, as Math-Step-DPO-10K has it (`python data.py show --data F --model M` prints one and its tokens):

    prompt                   "What is 7 * 8 + 5?"                  x             \\  context: read by the
    initial_reason_steps     "Let's think step by step.\\nStep 1:" s_1..s_{k-1}  /   model, no loss
    chosen                   " 7 * 8 = 56."                        s_win         \\  response: loss on
    rejected                 " 7 * 8 = 54."                        s_lose        /   every token
    full_chosen, full_rejected: the step and everything after it;  answer, dataset: not used in training

Which text is the response depends on the method, and so does its end:

    sft       the whole chosen answer, given the prompt               ends with the end-of-turn token
    dpo       the whole chosen / rejected answer, given the prompt    ends with the end-of-turn token
    stepdpo   the chosen / rejected step, given prompt and steps      no end token: the solution goes on, and
                                                                      a model that learned to stop after a
                                                                      step would never finish

The sides of a row are encoded once each, as whole texts; what they have in common is in a batch once.

Part 2 turns graded attempts (eval.py) into such rows: it cuts solutions into steps, has the first wrong step
located (`localize`) and pairs it with the steps that led to the right answer (`pairs`).

Legend: B rows of a micro-batch, R responses in it, N tokens of its flat row, P places that predict, M
response tokens that they predict.
"""
from __future__ import annotations      # the method stands first, what it is made of behind it

import argparse
import bisect
import functools
import glob
import hashlib
import http.client
import importlib
import itertools
import json
import math
import os
import random
import re
import signal
import socket
import ssl
import sys
import threading
import time
import unicodedata
import urllib.error
import urllib.request
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from fractions import Fraction
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Callable, Iterable, Iterator, NamedTuple, Sequence

import numpy as np
import tokenizers
import torch
import torch.distributed as dist
from jinja2 import Template, TemplateError, meta, nodes
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tqdm import tqdm

if __name__ == "__main__":      # python -P does not search a script's own folder
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from model import (CheckpointError, common_length, home_of, join_processes, lay_out, locked, read_json,
                   resolve, strict_json, writing, written)


class DataError(ValueError):
    """The user's data cannot be used. One line: file and line, field, what was found, what to do."""


# ==========================================================================================================
# PART 1. Rows -> tokens -> batches: the method.
# ==========================================================================================================

# ----------------------------------------------------------------------------------------------------------
# Rows to tokens
# ----------------------------------------------------------------------------------------------------------

METHODS = ("sft", "dpo", "stepdpo")
LONGEST_TOKEN = 1_000                               # characters: more than a token of any vocabulary has


@dataclass(slots=True)
class Example:
    """One row as tokens: K >= 1 whole sequences from BOS on (2 of a pair, 1 in SFT), alike in their first
    `start` tokens."""
    where: str                                  # "file:line"
    sides: list[np.ndarray]                     # K of them, int32 ids: context + response; chosen, rejected
    start: int                                  # index of the first response token, on every side
    steps: list[np.ndarray]                     # of each side's response tokens: the step that they belong to
    problem: str | None = None                  # the prompt x: rows of one problem begin alike, stay together
    row: dict | None = None                     # the row it was made of, for a variant's own columns
    reference: bool = False                     # whether its loss asks for log-probs under the reference
    units: int = 1                              # its weight in the mean: 1 for a pair, its tokens in SFT
    asked: list | None = None                   # of each side (places, tokens): asked instead of the response

    @property
    def chosen(self) -> np.ndarray:
        return self.sides[0]

    @property
    def rejected(self) -> np.ndarray | None:
        return self.sides[1] if len(self.sides) > 1 else None

    @property
    def predicted(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Of each side: the places (in the side) whose hidden states predict, and the tokens that they
        predict."""
        if self.asked is not None:
            return self.asked
        return [(np.arange(self.start - 1, len(side) - 1), side[self.start:]) for side in self.sides]

    @property
    def length(self) -> int:
        """Tokens that the row takes in a batch, its sides' common beginning once."""
        return tokens_in_tree(self.sides)


def encode_dataset(source: str | Path | Iterable[tuple[str, dict]], tokenizer: Tokenizer, method: str,
                   style: str, max_length: int | None = None,
                   of_row: Callable | None = None) -> tuple[list[Example], Report]:
    """Read, render and tokenise a file of rows: those that can be trained on, in order, and a Report.

    source: what `read_rows` takes, or (where, row) pairs. max_length: tokens of a side as the model sees it,
    BOS and end token included; a longer row is dropped, never cut. of_row: what takes the place of `texts_of`
    for rows of another kind, of any number of responses. DataError where a row is malformed, or none is left.
    """
    if method not in METHODS:
        raise DataError(f"method {method!r} is not known; choose one of {', '.join(METHODS)}")
    from_file = isinstance(source, (str, Path))
    rows = read_rows(source) if from_file else iter(source)
    report = Report(str(source) if from_file else "rows")
    end = None if method == "stepdpo" else tokenizer.end_of_turn_id(style)
    examples = []
    while chunk := list(itertools.islice(rows, 512)):   # tokenizers encodes a list on all cores
        report.rows += len(chunk)
        texts = []
        for where, row in chunk:
            try:
                found = (of_row or texts_of)(row, method, where)
                texts.append(_render(where, row, *found, tokenizer, method, style, max_length, report))
            except Unfit as reason:
                report.drop(str(reason), where)
        examples += to_examples(texts, tokenizer, end, max_length, report, bos=style != "chat")
    for example in examples:
        example.reference = method != "sft"
        if method == "sft":                             # the mean over all answer tokens, not over answers
            example.units = len(example.chosen) - example.start
    report.kept = len(examples)
    if not examples:
        reasons = "; ".join(f"{len(where)} {reason}" for reason, where in report.dropped.items())
        raise DataError(f"{report.source}: no row is left to use ({reasons})")
    return examples, report


def texts_of(row: dict, method: str, where: str) -> tuple[str | list[dict], str, list[str]]:
    """(prompt x, the steps that are context, the one or two responses) of a row, as `method` trains it.

    A whole answer is initial_reason_steps + full_*, or full_* alone where it begins with those steps. A file
    without these columns has whole answers in chosen and rejected, or in `response` for SFT; what other
    trainers call them, and when x is a conversation: `question_and_answers`.

    Raises DataError where a row is malformed, Unfit where a well-formed one cannot be used.
    """
    of_steps = method == "stepdpo" or any(
        name in row for name in ("initial_reason_steps", "full_chosen", "full_rejected"))
    sides = ["full_chosen", "full_rejected"] if of_steps and method != "stepdpo" else ["chosen", "rejected"]
    if method == "sft":
        known = ("response", sides[0], *ANSWERS)
        sides = [next((name for name in known if name in row), sides[0])]
        of_steps = sides == ["full_chosen"]
    needed = ["initial_reason_steps", *sides] if of_steps else sides
    asked = next((name for name in PROMPTS if name in row and name not in sides), None)
    missing = [name for name in needed if name not in row]
    if asked is None and not isinstance(row.get(sides[0]), list):
        missing.insert(0, "prompt")
    if missing or asked == "question":                  # so the pipeline's other files call it
        expect(row, where, "pairs", "problems")
    if missing:
        raise DataError(f"{where}: {method} needs the columns {', '.join(['prompt', *needed])}; found "
                        f"{', '.join(row) or 'none'}; missing {', '.join(missing)}: rename them or change "
                        "method")

    question, responses = question_and_answers(row, asked, sides, where)
    steps = text_field(row, "initial_reason_steps", where) if of_steps else ""
    if not of_steps or method == "stepdpo":
        return question, steps, responses
    whole = lambda full: full.startswith(steps) or not full.strip()     # an empty one is dropped as such
    return question, "", [full if whole(full) else steps + full for full in responses]


class Texts(NamedTuple):
    """A row before it becomes tokens. context = prompt + steps is read; the K responses are judged."""
    where: str                                          # "file:line"
    row: dict
    problem: str                                        # the question x, as it stands in the row
    prompt: str                                         # x, rendered
    steps: str                                          # s_1..s_{k-1}, "" where whole answers are judged
    responses: list[str]


def _render(where: str, row: dict, question: str | list[dict], steps: str, responses: list[str],
            tokenizer: Tokenizer, method: str, style: str, max_length: int | None, report: Report) -> Texts:
    """A row's texts as they are trained. Unfit with the reason where it cannot be trained on."""
    if method != "stepdpo":                             # the end token is put there by us, once
        responses = [tokenizer.without_end(response, style) for response in responses]
    turns = [question] if isinstance(question, str) else [turn["content"] for turn in question]
    solutions = [steps + response for response in responses]

    names = ("chosen", "rejected") if len(responses) == 2 else ("response",) * len(responses)
    for name, text in zip(("prompt", *names), (turns[-1], *responses)):
        if not text.strip():
            raise Unfit(f"empty {name}")
    if len(responses) == 2 and responses[0].strip() == responses[1].strip():
        raise Unfit("chosen and rejected are the same")
    if max_length is not None and max(map(len, (*turns, *solutions))) > LONGEST_TOKEN * max_length:
        raise Unfit(f"longer than {max_length} tokens")         # known without waiting for its tokens
    for text in solutions if style == "raw" else (*turns, *solutions):  # a raw prompt is rendered already
        if remark := tokenizer.check(text):
            report.note(remark, where)

    if style == "chat" and method != "stepdpo":
        prompt, responses, remarks = tokenizer.render_answers(question, responses)
        for remark, detail in remarks.items():
            report.note(remark, where + detail)
    else:
        prompt = render_prompt(style, question, tokenizer, solutions[0])
    return Texts(where, row, "\n\n".join(turns), prompt, steps, responses)


def to_examples(rows: Sequence[Texts], tokenizer: Tokenizer, end: int | None, max_length: int | None,
                report: Report, bos: bool = True) -> list[Example]:
    """Tokenise rows of any number of responses; `end`, if any, follows each response. What is dropped goes to
    `report`. bos: False for prompts that a chat template has made."""
    texts = [row.prompt + row.steps + response for row in rows for response in row.responses]
    encoded = iter(tokenizer.encode_batch(texts, bos))
    examples = []
    for row in rows:
        sides = [next(encoded) for _ in row.responses]
        try:
            examples.append(_example(row, sides, end, max_length))
        except Unfit as reason:
            report.drop(str(reason), row.where)
    return examples


def _example(row: Texts, encoded: list[Encoded], end: int | None, max_length: int | None) -> Example:
    """Tokens of a row. encoded: of prompt + steps + each response, in one piece."""
    boundary = len(row.prompt) + len(row.steps)         # the character at which every side's response begins
    start = min(response_start(side.offsets, boundary) for side in encoded)
    sides = [np.array(side.ids + ([] if end is None else [end]), dtype=np.int32) for side in encoded]
    if max_length is not None and max(map(len, sides)) > max_length:
        raise Unfit(f"longer than {max_length} tokens")
    if start == 0:
        raise Unfit("no token of context before the response")
    if min(map(len, sides)) <= start:
        raise Unfit("a response without a token of its own")
    if any(not np.array_equal(side[:start], sides[0][:start]) for side in sides):
        raise Unfit("the context is not tokenised alike on both sides")
    if len({side.tobytes() for side in sides}) < len(sides):
        raise Unfit("chosen and rejected are the same")
    steps = []
    for side, ids, response in zip(encoded, sides, row.responses):
        of_token = step_of_tokens(side.offsets[start:], row.steps + response, len(row.prompt))
        of_token = np.r_[of_token, of_token[-1:]]       # the end token, if there is one, is of the last step
        steps.append(of_token[:len(ids) - start])
    return Example(row.where, sides, start, steps, row.problem, row.row)


def response_start(offsets: Sequence[tuple[int, int]], boundary: int) -> int:
    """Index of the first token that holds a character of the response, one at `boundary` or after it.

    A token across the boundary ("\\n\\n", half of it context) is response: the model makes it in one piece.
    """
    start = next((i for i, (_, after) in enumerate(offsets) if after > boundary), len(offsets))
    # A normaliser may melt the response's first character into the token before (NFC: "e" + a combining
    # accent). That token's offsets then end at the boundary, and no other token begins with the character.
    if 0 < start < len(offsets) and offsets[start][0] > boundary:
        start -= 1
    return start


def step_of_tokens(offsets: Sequence[tuple[int, int]], solution: str, begin: int) -> np.ndarray:
    """(tokens,) int32: the step (0 = the first) of the solution that each token's last character is of. The
    solution begins at character `begin` of the text; what stands before it counts as step 0."""
    starts = [begin + start for start, _ in step_starts(solution)][1:]
    ends = np.array([end for _, end in offsets])
    return np.searchsorted(starts, ends - 1, side="right").astype(np.int32)


class Unfit(DataError):
    """A row that is well formed and cannot be trained on: it is dropped, under this reason."""


@dataclass
class Report:
    """What became of a file's rows. str(report) is a few lines to print."""
    source: str
    rows: int = 0
    kept: int = 0
    dropped: dict[str, list[str]] = field(default_factory=dict)     # reason -> "file:line" of each row
    notes: dict[str, list[str]] = field(default_factory=dict)       # what to know of kept rows -> the same

    def drop(self, reason: str, where: str) -> None:
        self.dropped.setdefault(reason, []).append(where)

    def note(self, remark: str, where: str) -> None:
        self.notes.setdefault(f"note: {remark}", []).append(where)

    def __str__(self) -> str:
        lines = [f"{self.source}: {self.rows:,} rows, {self.kept:,} kept, {self.rows - self.kept:,} dropped"]
        for found in (self.dropped, self.notes):
            for reason, rows in sorted(found.items(), key=lambda item: -len(item[1])):
                lines.append(f"  {len(rows):>7,}  {reason}  (first: {rows[0]})")
        return "\n".join(lines)


# ----------------------------------------------------------------------------------------------------------
# Batches
# ----------------------------------------------------------------------------------------------------------

@dataclass
class Batch:
    """A micro-batch of B rows as one radix tree, laid out in a flat row of N tokens: no padding, and what
    begins alike is there once, whether in the sides of a pair or in several pairs of one problem.

        one pair                            two pairs of a problem, cut at steps 2 and 3
        [ x s_1..s_{k-1} | s_win | s_lose ] [ x s_1 | s_2 | s_win' | s_lose' | s_win | s_lose ]       segments
          parent -1        0       0          -1      0     1        1         0       0              parents

    A segment sees its parents whole and itself causally; siblings never see each other. Positions go on from
    the parent's end, so all branches of a fork begin at the same one.

    A hidden state predicts the token after it: `predict_at` are the P places where one is wanted, each once,
    and `source[m]` says which of them predicts targets[m]. The token before a fork predicts the first token
    of every branch, so P < M: it meets the vocabulary once. """
    input_ids: torch.Tensor             # (N,) int64
    position_ids: torch.Tensor          # (N,) int64
    lengths: list[int]                  # tokens of each segment, in order; they add up to N
    parents: list[int]                  # the segment that each one continues; -1 = none
    predict_at: torch.Tensor            # (P,) int64, ascending: places in the flat row
    source: torch.Tensor                # (M,) int64: the hidden state, of the P, that predicts targets[m]
    targets: torch.Tensor               # (M,) int64: response tokens, row by row and side by side
    response: torch.Tensor              # (M,) int64: pair i has responses 2i (chosen) and 2i + 1 (rejected)
    step: torch.Tensor                  # (M,) int64: the step of its solution that targets[m] is of
    rows: torch.Tensor                  # (B,) int64: indices into the dataset
    examples: list[Example]             # the B rows themselves
    responses: int                      # R: how many there are

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
    """Put texts into `tree`, a sorted list, and return how many tokens they add to it: of each text those
    that it does not have in common with a neighbour in that order."""
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
               order: Sequence[int] | None = None, group_by_prompt: bool = False) -> list:
    """plan[step][rank] = that rank's micro-batches, each a list of row indices. A pure function; every row
    once.

    Which rows make a step depends on (seed, epoch, batch_size) alone, or on `order`, not on how the work is
    spread: runs on 1 and on 8 processes take the same steps. Within a step the rows of one problem stay
    together, since they share their beginning; such families are dealt, largest first, to the rank with the
    fewest tokens so far, and packed in that order into micro-batches of at most `micro_batch_size` rows and
    `micro_batch_tokens` tokens, as counted in the tree (a longer row travels alone). A family larger than
    that, or than a rank's share, is cut. The last step of an epoch may be short, and a rank may then have
    nothing to do in it. """
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
            total = sum(tokens_in_tree(sides_of(rows)) for rows in families.values())
            most = min(most, math.ceil(total / world_size))
        pieces = []
        for rows in families.values():
            pieces += _cut(rows, examples, micro_batch_size, most)
        ranks, loads = [[] for _ in range(world_size)], [0] * world_size
        for tokens, rows in sorted(pieces, key=lambda piece: -piece[0]):
            rank = loads.index(min(loads))
            ranks[rank].append((tokens, rows))
            loads[rank] += tokens
        plan.append([_pack(mine, micro_batch_size, micro_batch_tokens) for mine in ranks])
    return plan


def shuffled(examples: Sequence[Example], seed: int, epoch: int, group_by_prompt: bool) -> list[int]:
    """The rows in random order; or the problems in random order, the rows of each side by side."""
    # raw bits of PCG64, sorted: unlike permutation(), the stream is promised to stay the same in every
    # version of numpy
    draws = np.random.PCG64([seed, epoch]).random_raw(len(examples))
    if group_by_prompt:
        number: dict = {}                               # family -> its place of first appearance
        families = [number.setdefault(family_of(e, row), len(number)) for row, e in enumerate(examples)]
        draws = draws[families]                         # one draw for all rows of a problem
    return np.argsort(draws, kind="stable").tolist()


def _cut(family: list[int], examples: Sequence[Example], most_rows: int | None, most_tokens: float) -> list:
    """[(tokens in the tree, rows)] of a family: one piece if it fits, else several of neighbours, which share
    the most."""
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


def _pack(pieces: list[tuple[int, list]], max_rows: int | None, max_tokens: int | None) -> list[list[int]]:
    batches, tokens = [], 0
    for more, rows in pieces:
        tokens += more
        full = batches and max_rows is not None and len(batches[-1]) + len(rows) > max_rows
        if not batches or full or (max_tokens is not None and tokens > max_tokens):
            batches.append([])
            tokens = more
        batches[-1] += rows
    return batches


# ----------------------------------------------------------------------------------------------------------
# Prompts
# ----------------------------------------------------------------------------------------------------------

BOXED = "\nPlease reason step by step, and put your final answer within \\boxed{}."
# What stands before and behind the question, as the authors' code has it; for raw the question is the prompt.
_AROUND = {
    "qwen2-boxed": ("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n",
                    f"{BOXED}<|im_end|>\n<|im_start|>assistant\n"),
    "alpaca": ("Below is an instruction that describes a task. Write a response that appropriately "
               "completes the request.\n\n### Instruction:\n", "\n\n### Response:\n"),
    "deepseek-math": ("User: ", f"{BOXED}\n\nAssistant: "),
    "raw": ("", ""),
}
PROMPT_STYLES = (*_AROUND, "chat")                      # chat: the checkpoint's own template


def render_prompt(style: str, question: str | list[dict], tokenizer: Tokenizer, begun: str = "") -> str:
    """The text up to the first character of the reasoning.

    question: a text; for `chat` also the conversation up to the answer, [{"role": ..., "content": ...}, ...].
    begun: the reasoning, as far as it is there already: a thought is opened once (`Tokenizer.chat_prompt`).
    """
    if style == "chat":
        return tokenizer.chat_prompt(question, begun)
    if style not in _AROUND:
        raise DataError(f"prompt style {style!r} is not known; choose one of {', '.join(PROMPT_STYLES)}")
    told = tokenizer is not None and (tokenizer.system or tokenizer.template_args)
    if told or not isinstance(question, str):
        raise Unfit(f"--prompt {style} has no place for --system, --template_args, a system prompt or "
                    "earlier turns; choose --prompt chat")
    if style == "qwen2-boxed" and tokenizer is not None and "<|im_start|>" not in tokenizer.added_ids:
        raise DataError(f"{tokenizer.source}: --prompt qwen2-boxed is written with <|im_start|>, which is "
                        "no control token of this checkpoint; choose --prompt chat, alpaca or raw")
    before, behind = _AROUND[style]
    return before + question + behind


# ----------------------------------------------------------------------------------------------------------
# The tokenizer and the chat template
# ----------------------------------------------------------------------------------------------------------

# What marks turns and ends in the chats of the common families. As a token it would forge a turn; where a
# tokenizer lacks it (a row made for another model), it would be trained letter by letter. Inside a text, <s>
# may be HTML's.
_MARKS = re.compile(r"<[|｜](im_(start|end|sep)|eo[stm](_id)?|(start|end)_header_id|end|return|user|assistant|"
                    r"system|(begin|start|end)[_▁]?of[_▁]?(text|turn|turn_token|sentence|utterance))[|｜]>|"
                    r"<(start|end)_of_turn>|<[be]os>|\[/?INST\]|\A\s*<s>|</s>\s*\Z", re.IGNORECASE)
# Special tokens of this kind are words that a model writes, whether or not its template mentions them.
_WORDS = re.compile(r"think|thought|reason|step|solution|answer", re.IGNORECASE)
# What may open a thought: <think>, [THINK], ◁think▷
_TAG = r"(?:<(?!/)[^<>|\s]{1,30}>|\[(?!/)[A-Z_]{1,30}\]|◁(?!/)\w{1,30}▷)"


class Encoded(NamedTuple):
    ids: list[int]
    offsets: list[tuple[int, int]]                      # (begin, end) of each token, in characters


class Joints(NamedTuple):
    """What a chat template writes around an answer. Vicuna's: "USER: 3 + 4? ASSISTANT: It is 7.</s>"."""
    opening: str                                        # the generation prompt: "ASSISTANT:"
    lead: str                                           # between it and the answer: " "
    closing: str                                        # all that follows the answer: "</s>"
    gap: str                                            # the part of it before the end token: ""
    end_id: int | None                                  # the end token; None if there is none

    @property
    def opens_thought(self) -> bool:
        return re.search(_TAG + r"\s*\Z", self.opening) is not None


@dataclass(eq=False)
class Tokenizer:
    """A checkpoint's tokenizer: tokenizer.json run by `tokenizers`, and what the files around it say."""
    backend: tokenizers.Tokenizer
    bos_id: int | None = None           # in front of every text, once; in a chat where the template puts it
    eos_ids: tuple[int, ...] = ()       # every id that ends a generation, by the files
    names: dict[str, str] = field(default_factory=dict)     # {"eos_token": "</s>", ...}, for the template
    chat_template: str | None = None    # Jinja source
    source: str = "tokenizer"           # its folder
    system: str | None = None           # system prompt of the chats that bring none
    template_args: dict | None = None   # further arguments of the template, as {"enable_thinking": False}

    def __post_init__(self):
        """control_ids: text -> id of the tokens that begin or end texts and turns. They are recognised
        anywhere, so a row must not contain them; other special tokens (<step>) are words to train."""
        self.backend.no_truncation()            # a tokenizer.json may ask for both: it would cut rows
        self.backend.no_padding()
        self.backend.post_processor = None      # `encode` adds BOS; no offsets trimmed of white space
        self.template_args = self.template_args or {}
        self.eos_id = self.eos_ids[0] if self.eos_ids else None
        if "eos_token" in self.names:
            self.eos_id = self.backend.token_to_id(self.names["eos_token"])

        added = self.backend.get_added_tokens_decoder()
        special = {token.content for token in added.values() if token.special}
        ends = {self.backend.id_to_token(id): id for id in (self.bos_id, *self.eos_ids) if id is not None}
        self.added_ids = {token.content: id for id, token in added.items()} | ends
        control = set(ends) | special & set(self.names.values()) | set(filter(_MARKS.search, self.added_ids))
        template = self.chat_template or ""
        control |= {token for token in special if token in template and not _WORDS.search(token)}
        self.control_ids = {token: self.added_ids[token] for token in control}
        self._added, self._control, self._words = map(_any_of, (self.added_ids, control, special - control))

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, system: str | None = None,
                        template_args: dict | None = None, base: str | Path | None = None) -> "Tokenizer":
        """Read tokenizer.json and what is there of tokenizer_config.json, special_tokens_map.json,
        config.json, generation_config.json and the chat template. DataError or CheckpointError where a
        file is damaged or disagrees with another. What the folder of a LoRA adapter lacks is its base
        model's (`base`, or the one that it names)."""
        folder = Path(folder)
        home = home_of(folder, base)
        if not (folder / "tokenizer.json").is_file():
            folder = home
        path, settings_path = folder / "tokenizer.json", folder / "tokenizer_config.json"
        if not path.is_file():
            raise DataError(f"{folder}: tokenizer.json is not there; transformers makes it from a "
                            "tokenizer.model: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)")
        with _damage(path):
            backend = tokenizers.Tokenizer.from_file(str(path))
            opening = backend.encode("").ids            # what the post-processor puts around a text
        config, generation = _settings(home / "config.json"), _settings(folder / "generation_config.json")
        generation = generation or _settings(home / "generation_config.json")
        own = _settings(folder / "special_tokens_map.json") | _settings(settings_path)
        with _damage(settings_path):
            named = {key: value["content"] if isinstance(value, dict) else value
                     for key, value in own.items() if key.endswith("_token")}
            for id, token in (own.get("added_tokens_decoder") or {}).items():
                there = backend.token_to_id(token["content"])
                if str(there) != id:
                    raise DataError(f"{settings_path}: added token {token['content']!r} has id {id}, but "
                                    f"tokenizer.json gives it {there}; fetch both again, of one checkpoint")
            template = _chat_template(folder, own)
        names = {key: token for key, token in named.items() if isinstance(token, str)}

        known = lambda id: type(id) is int and 0 <= id < 2**31 and backend.id_to_token(id) is not None
        bos_id = config.get("bos_token_id")
        if "bos_token" in names:
            bos_id = backend.token_to_id(names["bos_token"])
        wants_bos = own.get("add_bos_token")
        if wants_bos is None:
            wants_bos = bos_id is not None and opening[:1] == [bos_id]
        if wants_bos and not known(bos_id):
            raise DataError(f"{settings_path}: add_bos_token is true, but bos_token "
                            f"{names.get('bos_token')!r} is not in tokenizer.json; correct one of them")
        eos_ids = [backend.token_to_id(names["eos_token"])] if "eos_token" in names else []
        for value in (generation.get("eos_token_id"), config.get("eos_token_id")):
            eos_ids += value if isinstance(value, list) else [value]
        for id in eos_ids:
            if id is not None and not known(id) and os.environ.get("LOCAL_RANK", "0") == "0":
                print(f"{folder}: eos_token_id {id!r:.60} is no token of tokenizer.json; it is ignored",
                      file=sys.stderr)
        eos_ids = tuple(dict.fromkeys(filter(known, eos_ids)))
        return cls(backend, bos_id if wants_bos else None, eos_ids, names, template, str(folder), system,
                   template_args)

    def __len__(self) -> int:
        return self.backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, bos: bool = True) -> Encoded:
        """Ids and character offsets of a whole text; special tokens in it are recognised. BOS is put in
        front, once; bos=False for the text of a chat: there it is the template's affair."""
        return self.encode_batch([text], bos)[0]

    def encode_batch(self, texts: Sequence[str], bos: bool = True) -> list[Encoded]:
        with _damage(self.source):
            encoded = self.backend.encode_batch(texts, add_special_tokens=False)
        encoded = [Encoded(e.ids, e.offsets) for e in encoded]
        if not bos or self.bos_id is None:
            return encoded
        return [e if e.ids[:1] == [self.bos_id] else Encoded([self.bos_id, *e.ids], [(0, 0), *e.offsets])
                for e in encoded]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the tokens, special ones included."""
        with _damage(self.source):
            return self.backend.decode(list(ids), skip_special_tokens=False)

    def continuation(self, prompt_ids: Sequence[int], new_ids: Sequence[int]) -> str:
        """Exactly the text that `new_ids` add after `prompt_ids`.

        Not decode(new_ids): a SentencePiece tokenizer drops the space before a text's first word, and one
        character may be spread over several tokens. So both are decoded after the prompt's last tokens, whose
        part is taken off.
        """
        context = list(prompt_ids[-16:])
        before = self.decode(context).rstrip("\ufffd")  # a character that new_ids complete
        return self.decode(context + list(new_ids))[len(before):]

    def control_token_in(self, text: str) -> str | None:
        """The first control token's string in `text`, if any."""
        found = self._control.search(text)
        return found and found[0]

    def check(self, text: str) -> str | None:
        """A remark on a text to train, if there is one to make; Unfit where its marks would forge a turn."""
        if token := self.control_token_in(text):
            raise Unfit(f"the text contains the control token {token}")
        template = self.chat_template or ""             # Llama 2's has [INST], which is no token
        for mark in (found[0].strip() for found in _MARKS.finditer(text)):
            if mark not in self.added_ids and mark not in template:
                raise Unfit(f"the text contains {mark}, which another model's chats are marked with and "
                            "this tokenizer spells in letters: take it out")
        word = self._words.search(text)
        return word and f"the special token {word[0]} in the text is trained as that token"

    def without_end(self, answer: str, style: str) -> str:
        """A whole answer without the end tokens at its end."""
        ends = "|".join(re.escape(self.backend.id_to_token(id)) for id in self.stop_ids(style))
        bare = re.sub(rf"(({ends})\s*)+\Z", "", answer)
        return answer if bare == answer else bare.rstrip()

    # ---- the chat template

    def render_chat(self, messages: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The chat template, run on messages, [{"role": ..., "content": ...}, ...], as transformers does."""
        values = {"messages": messages, "add_generation_prompt": add_generation_prompt, "tools": None,
                  "documents": None} | self.names | self.template_args
        try:
            return self._template.render(values)
        except DataError:
            raise
        except Exception as error:                      # a stranger's program: it may fail in any way
            raise Unfit(f"{self.source}: the chat template fails ({type(error).__name__}: "
                        f"{_one_line(error)}); choose --prompt alpaca or raw") from None

    @functools.cached_property
    def _template(self) -> Template:
        """The chat template, ready to run, with the settings and helpers of transformers. It is a stranger's
        program: jinja2's sandbox keeps it from Python's internals. How long it takes is not bounded."""
        if self.chat_template is None:
            raise DataError(f"{self.source}: no chat template (of several, the one named default is read; "
                            "save another as chat_template.jinja); choose --prompt alpaca or raw")
        jinja = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                              extensions=["jinja2.ext.loopcontrols", _GenerationTag])
        jinja.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)     # jinja2's is for HTML
        # a fixed day, the one that Llama 3's templates fall back to: a prompt must not change overnight
        jinja.globals |= {"strftime_now": datetime(2024, 7, 26).strftime, "raise_exception": _raise}
        known = meta.find_undeclared_variables(jinja.parse(self.chat_template))
        for name in self.template_args.keys() - known:
            raise DataError(f"{self.source}: the chat template has no argument {name!r} (it reads "
                            f"{', '.join(sorted(known))}); correct --template_args")
        return jinja.from_string(self.chat_template)

    def conversation(self, question: str | list[dict]) -> list[dict]:
        """The messages up to an answer; `system` in front, if they bring no system prompt."""
        messages = [{"role": "user", "content": question}] if isinstance(question, str) else question
        if self.system and messages[0]["role"] != "system":
            return [{"role": "system", "content": self.system}, *messages]
        return messages

    @functools.cached_property
    def joints(self) -> Joints:
        """Found by rendering a conversation with a known answer."""
        asked, words = self.conversation("?"), "The answer is 42."
        answered = [*asked, {"role": "assistant", "content": words}]
        prompt, bare = self.render_chat(asked), self.render_chat(asked, add_generation_prompt=False)
        opening = prompt[_alike(prompt, bare):]
        before, found, closing = self.render_chat(answered, add_generation_prompt=False).rpartition(words)
        if not found:                                   # each answer is then found to be altered
            return Joints(opening, "", "", "", None)
        lead = before[len(prompt):] if before.startswith(prompt) else ""
        end, gap = self._added.search(closing), ""
        if end:
            gap = closing[:end.start()]
        elif not closing.strip():
            # the end may come with a next turn: the mark that ends this one, or begins that one (GLM-4)
            longer = self.render_chat([*answered, {"role": "user", "content": "?"}])
            end = self._added.match(longer.rpartition(words)[2].lstrip())
            ends = re.compile("end|eo[stm]|</s>")
            if end and self.added_ids[end[0]] not in self.eos_ids and not ends.search(end[0]):
                end = None
        return Joints(opening, lead, closing, gap, end and self.added_ids[end[0]])

    def chat_prompt(self, question: str | list[dict], begun: str = "") -> str:
        """The template's text up to an answer, of which the beginning may be known: `begun`.

        That is the generation prompt and the white space that the template has between it and an answer. A
        template without generation prompt writes the assistant's heading together with the answer: then that.
        """
        messages, joints = self.conversation(question), self.joints
        prompt = self.render_chat(messages)
        if messages[0]["role"] == "system" and messages[0]["content"].strip() not in prompt:
            raise Unfit(f"{self.source}: the chat template leaves out the system prompt; put it into the "
                        "question")
        tag = re.match(_TAG, begun.lstrip())
        if tag and tag[0] in joints.opening:            # the answer brings the thought that this would open
            return prompt[:prompt.rindex(tag[0])]
        if joints.opening and joints.lead.strip():
            # Qwen3's: an empty thought before an answer without one; sampling leaves it to the model
            if not begun or joints.opens_thought or (tag and tag[0] in joints.lead):
                return prompt
        return prompt + joints.lead

    def render_answers(self, question: str | list[dict],
                       answers: list[str]) -> tuple[str, list[str], dict[str, str]]:
        """Conversations with whole answers: (the prompt that answers are sampled from, as far as they all
        begin with it; the rest of each up to its end token; remarks -> details).

        Each is the template's own text. But templates are written for a chat that goes on. Where one takes
        something out (DeepSeek-R1's the thought, Mistral-Nemo's the system prompt), the answer is trained as
        it would be sampled: whole, right behind the generation prompt. Only where this opens a thought that
        the answer does not have, the template is believed.
        """
        messages, prompt, joints = self.conversation(question), self.chat_prompt(question), self.joints
        texts, remarks = [], {}
        if joints.end_id is None and joints.closing.strip():
            remarks["what ends an answer in the chat template is no token of this tokenizer; the "
                    "end-of-text token stands there"] = f": {joints.closing!r}"
        for answer in answers:
            whole = self.render_chat([*messages, {"role": "assistant", "content": answer}], False)
            text = whole.removesuffix(joints.closing)
            squeezed, words = ("".join(words.split()) for words in (text, answer))
            intact = whole.endswith(joints.closing) and squeezed.endswith(words)
            if not (intact and (text.startswith(prompt) or joints.opens_thought)):
                text = self.chat_prompt(question, answer) + answer
            if text + joints.closing != whole:
                remarks["the chat template alters this conversation; trained are the prompt that answers are "
                        "sampled from and the whole answer"] = _difference(whole, text + joints.closing)
            if not text.startswith(prompt):
                remarks["this answer is trained behind another prompt than answers are sampled from "
                        "(--template_args may help)"] = _difference(text, prompt)
            texts.append(text + joints.gap)
        start = min(_alike(prompt, text) for text in texts)
        return prompt[:start], [text[start:] for text in texts], remarks

    def end_of_turn_id(self, style: str) -> int:
        """What ends a whole answer: <|im_end|> in ChatML, in a chat what its template has, else EOS."""
        id = self.joints.end_id if style == "chat" else None
        if style == "qwen2-boxed":
            id = self.backend.token_to_id("<|im_end|>")
        id = self.eos_id if id is None else id
        if id is None:
            raise DataError(f"{self.source}: no end-of-text token in tokenizer_config.json or config.json; "
                            "whole answers need one: set eos_token there")
        return id

    def stop_ids(self, style: str) -> tuple[int, ...]:
        """Every id that ends a generated answer."""
        return tuple(dict.fromkeys((self.end_of_turn_id(style), *self.eos_ids)))


class _GenerationTag(Extension):
    """{% generation %}...{% endgeneration %}, in some templates around the assistant's words: they stay."""
    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _raise(message: str):
    raise TemplateError(message)


def _any_of(words: Iterable[str]) -> re.Pattern:
    """Finds any of the words; of several that begin at one place the longest."""
    longest_first = sorted(words, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def _alike(a: str, b: str) -> int:
    """How many characters two texts begin alike with."""
    return len(a) if b.startswith(a) else len(os.path.commonprefix([a, b]))


def _difference(text: str, other: str) -> str:
    at = _alike(text, other)
    behind, this, that = text[max(0, at - 20):at], text[at:at + 20], other[at:at + 20]
    return f": behind {behind!r} stands {this!r} instead of {that!r}"


@contextmanager
def _damage(file: str | Path) -> Iterator[None]:
    """Errors within name the file. `tokenizers` may panic, which is no Exception."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, DataError):
        raise
    except BaseException as error:
        raise DataError(f"{file}: damaged ({_one_line(error)}); fetch the file again") from None


def _settings(path: Path) -> dict:
    """A small JSON file beside the tokenizer; {} where there is none."""
    return read_json(path) if path.exists() else {}


def _chat_template(folder: Path, own: dict) -> str | None:
    """chat_template.jinja, or the entry in tokenizer_config.json (`own`) or chat_template.json."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        with _damage(file):
            return file.read_text(encoding="utf-8")
    template = own.get("chat_template") or _settings(folder / "chat_template.json").get("chat_template")
    if isinstance(template, list):                      # several named ones
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return template if isinstance(template, str) else None


# ----------------------------------------------------------------------------------------------------------
# Rows of other trainers
# ----------------------------------------------------------------------------------------------------------

# What TRL, LLaMA-Factory (Alpaca) and ShareGPT call things. A column is a text or messages, [{"role": ...,
# "content": ...}, ...]; the last message of an answer's column is the answer.
PROMPTS = ("prompt", "instruction", "question", "messages", "conversations")
ANSWERS = ("completion", "output", "messages", "conversations")
_SYSTEM = ("system", "system_prompt", "system_message")
_PARTS = ("context", "passage", "input")                # of the question; input stands behind it
_NO_PLACE = ("history", "tools", "images", "videos", "audios", "chat_template_kwargs")
_KEYS = {"from": "role", "value": "content", "reasoning_content": "thought", "reasoning": "thought",
         "thinking": "thought"}
_ROLES = {"human": "user", "gpt": "assistant"}


def question_and_answers(row: dict, asked: str | None, sides: list[str],
                         where: str) -> tuple[str | list[dict], list[str]]:
    """(question, the answer in each of the columns `sides`) of a row. asked: its prompt's column, if any.

    The question is a text; with a system prompt or earlier turns, the messages up to the answer. Turns that
    the prompt and a side both have count once.
    """
    before = _turns_before(row, asked, where)
    questions, answers = [], []
    for name in sides:
        *turns, last = _turns(row, name, "assistant", where)
        if last["role"] != "assistant":
            raise Unfit(f"the last turn of {name} is not the assistant's")
        told = [turn["content"].strip() for turn in turns]
        questions.append([turn for turn in before if turn["content"].strip() not in told] + turns)
        answers.append(last["content"])
    question = questions[0]
    if any(other != question for other in questions):
        raise Unfit("chosen and rejected differ before their last turn, and only that is trained")
    roles = [turn["role"] for turn in question]
    spoken = roles[1:] if roles[:1] == ["system"] else roles
    if spoken != ["user", "assistant"] * (len(spoken) // 2) + ["user"]:
        raise Unfit("before the answer stand other turns than a system prompt or none, then user and "
                    "assistant in turn, the user last")
    return question if len(question) > 1 else question[0]["content"], answers


def _turns_before(row: dict, asked: str | None, where: str) -> list[dict]:
    """The turns that have columns of their own: system prompt, the prompt in its parts."""
    for name in _NO_PLACE:
        if row.get(name):
            raise Unfit(f"the column {name} has no place in the prompt: make it a part of it")
    turns = []
    for name in _SYSTEM:
        if row.get(name):
            turns += _turns(row, name, "system", where)
    if asked is None:
        return turns
    turns += _turns(row, asked, "user", where)
    for name in _PARTS if isinstance(row[asked], str) else ():
        part, text = row.get(name) or "", turns[-1]["content"]
        if not isinstance(part, str):
            raise Unfit(f"{name}, which belongs to the question, is no text")
        if part.strip() not in text:
            turns[-1]["content"] = f"{text}\n{part}" if name == "input" else f"{part}\n{text}"
    return turns


def _turns(row: dict, name: str, role: str, where: str) -> list[dict]:
    """row[name] as messages of two keys, role and content: a text is one message of `role`; a thought beside
    a content stands in <think> before it. DataError where the column is anything else."""
    value = row[name]
    if not isinstance(value, (list, dict)) or not value:
        return [{"role": role, "content": text_field(row, name, where)}]
    turns = []
    for number, message in enumerate(value if isinstance(value, list) else [value], 1):
        here = f"{where}: field {name!r}, message {number}"
        if not isinstance(message, dict):
            found = f"found {_kind(message)} {_shown(message)}"
            raise DataError(f'{here}: {found}; expected {{"role": ..., "content": ...}}')
        if message.get("tool_calls"):
            raise Unfit(f"a call of a tool in {name}")
        message = {_KEYS.get(key, key): value for key, value in message.items() if value is not None}
        role = text_field(message, "role", here)
        if isinstance(message.get("content"), list):    # [{"type": "text", "text": ...}]
            pieces = [piece if isinstance(piece, dict) else {} for piece in message["content"]]
            message["content"] = "".join(text_field(piece, "text", here) for piece in pieces)
        content = text_field(message, "content", here)
        if message.get("thought"):
            content = f"<think>\n{text_field(message, 'thought', here)}\n</think>\n\n{content}"
        turns.append({"role": _ROLES.get(role, role), "content": content})
    return turns


# ----------------------------------------------------------------------------------------------------------
# Rows: files of strangers, read strictly
# ----------------------------------------------------------------------------------------------------------

_READERS = (".parquet", ".jsonl", ".json")


def read_rows(source: str | Path, bad: list[DataError] | None = None,
              split: str = "train") -> Iterator[tuple[str, dict]]:
    """Yield (where, row) for every object of a .jsonl or .json file (one a line, or an array of them), of a
    .parquet file, or of the `split` of a hub dataset: owner/name, or owner/name:PATH where paths begin so.

    `where` ("file:line") goes in front of every later complaint about the row. UTF-8, with or without BOM; LF
    or CRLF; blank lines are skipped. A row that cannot be read raises DataError, or, where a list `bad` is
    given, is appended to it and the rest goes on.
    """
    path, hub = Path(source), re.fullmatch(r"[\w.-]+/[\w.-]+(:.+)?", str(source))
    if path.exists():
        files = [path]
    elif hub and (hub[1] or path.suffix not in (*_READERS, ".csv", ".gz")):
        files = _hub_files(str(source), split)
    else:
        raise DataError(f"{path}: no such file; give a .jsonl, .json or .parquet file, or a hub dataset "
                        "(owner/name)")
    count = 0
    for file in files:
        if not file.is_file() or file.suffix not in _READERS:
            raise DataError(f"{file}: cannot be read; expected a .jsonl, .json or .parquet file: unpack or "
                            "convert it")
        for where, row in _read_parquet(file) if file.suffix == ".parquet" else _read_json(file):
            count += 1
            if isinstance(row, dict):
                yield where, row
                continue
            error = row if isinstance(row, DataError) else DataError(
                f"{where}: found {_kind(row)} where an object (a row with named fields) belongs")
            if bad is None:
                raise error
            bad.append(error)
    if not count:
        raise DataError(f"{source}: holds no rows; expected one JSON object a line")


def _read_json(path: Path) -> Iterator[tuple[str, object]]:
    """Values with their places: one a line, or those of the one array or object that the whole file is."""
    with path.open("rb") as file:                       # bytes: of Unicode's many line ends only \n is one
        lines = ((f"{path}:{number}", line) for number, line in enumerate(file, 1) if line.strip())
        where, line = next(lines, (None, None))
        if where is None:
            return
        value, second = _parse(line, where), next(lines, None)
        if second and isinstance(value, DataError):     # begun here, it may end many lines later
            whole = _parse(path.read_bytes(), where)
            if line.lstrip().startswith(b"[") or not isinstance(whole, DataError):
                value, second = whole, None
        if second:
            yield where, value
            yield from ((where, _parse(line, where)) for where, line in itertools.chain([second], lines))
            return
    lists = [name for name in ("data", "rows", "examples", "instances", "train", "validation", "test")
             if isinstance(value, dict) and isinstance(value.get(name), list)]
    if len(lists) > 1:
        raise DataError(f"{path}: holds several lists of rows ({', '.join(lists)}); write the one that is "
                        "meant into a file of its own")
    rows = value[lists[0]] if lists else value
    if isinstance(rows, list):
        yield from ((f"{path}:item {number}", row) for number, row in enumerate(rows, 1))
    else:
        yield where, rows


def _parse(raw: bytes, where: str) -> object:
    """One JSON value, or the DataError that says why not. NaN, which pandas writes, is a number here."""
    try:
        return strict_json(raw, constant=float)
    except (ValueError, RecursionError) as error:
        begins = _quote(raw[:60].decode("utf-8", "replace"))
        return DataError(f"{where}: malformed JSON ({_one_line(error)}; begins {begins}); correct or remove "
                         "it, or save the file as UTF-8")


def _read_parquet(path: Path) -> Iterator[tuple[str, object]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError(f"{path}: parquet files need pyarrow: pip install pyarrow") from None
    try:
        batches = pyarrow.parquet.ParquetFile(path).iter_batches()
        for number, row in enumerate((row for batch in batches for row in batch.to_pylist()), 1):
            yield f"{path}:row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable parquet file ({_one_line(error)})") from None


_NO_ROWS = re.compile(r"(^|/)([._]|(dataset_infos?|dataset_dict|state|config)\.json$)|metadata|croissant")
# what may stand behind a split's name: the number of a shard (four digits are a year, unless alone), a digest
_SHARD = re.compile(r"(/\d+|[-_](\d{1,3}|\d{5,})([-_]of[-_]\d+)?)?(-[0-9a-f]{16})?\.\w+$")
_SPLITS = dict(train="train", training="train", test="test", testing="test",
               dev="dev", val="dev", valid="dev", validation="dev", eval="dev")


def _hub_files(dataset: str, split: str = "train") -> list[Path]:
    """The files of one split of a hub dataset, downloaded, or from the cache. DataError where it is not clear
    which are meant: there are several configurations, or no file says that it is of this split."""
    from huggingface_hub import hf_hub_download
    dataset, _, wanted = dataset.partition(":")
    files = _of_split(dataset, _hub_names(dataset), wanted, split)
    if os.environ.get("RANK", "0") == "0":
        print(f"{dataset}: reading {', '.join(files)}", file=sys.stderr)
    try:
        return [Path(hf_hub_download(dataset, name, repo_type="dataset")) for name in files]
    except Exception as error:                          # no connection, no permission: the hub raises many
        raise DataError(f"{dataset}: cannot be fetched from the hub ({_one_line(error)})") from None


def _hub_names(dataset: str) -> list[str]:
    from huggingface_hub import HfApi, snapshot_download
    try:
        return sorted(HfApi().list_repo_files(dataset, repo_type="dataset"))
    except Exception as error:                          # offline, no such dataset, no permission: many kinds
        try:
            folder = Path(snapshot_download(dataset, repo_type="dataset", local_files_only=True))
        except Exception:
            raise DataError(f"{dataset}: neither a file here nor a dataset of the hub ({_one_line(error)})"
                            ) from None
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _of_split(dataset: str, names: list[str], wanted: str, split: str) -> list[str]:
    """Of a dataset's files those of one split, of one configuration, in one format."""
    groups: dict[str, list[str]] = {}                   # "main/train" -> its shards
    for name in names:
        if name.endswith(_READERS) and not _NO_ROWS.search(name.lower()):
            groups.setdefault(_SHARD.sub("", name), []).append(name)
    if not groups:
        raise DataError(f"{dataset}: no .parquet, .jsonl or .json file of rows in it (found: "
                        f"{', '.join(names[:8]) or 'nothing'}); convert it to one of these")
    wanted = _SHARD.sub("", wanted)                     # a file's name stands for its group
    # the words of a path, one of which may be its split; the others are its configuration
    words = {path: re.findall("[a-z]+", path.lower()) for path in (wanted, *groups)}
    splits = {path: next((_SPLITS[word] for word in reversed(words[path]) if word in _SPLITS), None)
              for path in words}
    begins = re.compile(rf"(^|/){re.escape(wanted)}(?![a-z])" if wanted else "", re.IGNORECASE)
    meant = [wanted] if wanted in groups else [group for group in groups if begins.search(group)]
    split = splits[wanted] or split
    of_split = [group for group in meant if splits[group] == split]
    configurations = {tuple(word for word in words[group] if word not in _SPLITS)
                      for group in meant if splits[group]}
    if len(of_split) == len(configurations) == 1:
        meant = of_split
    if len(meant) != 1 or splits[meant[0]] not in (split, None):
        listed = [f"{dataset}:{group}" for group in meant or groups]
        more = " ..." if len(listed) > 12 else ""
        raise DataError(f"{dataset}: which of its files hold the {split} rows that are wanted? Give one of: "
                        + ", ".join(listed[:12]) + more)
    shards = groups[meant[0]]
    return [name for name in shards if Path(name).suffix == Path(shards[0]).suffix]


def text_field(row: dict, name: str, where: str) -> str:
    """row[name], if it is text that a tokenizer and a file can carry; DataError otherwise."""
    value = row.get(name)
    if not isinstance(value, str):
        found = f"found {_kind(value)} {_shown(value)}"
        if name not in row:
            found = f"not there (found: {', '.join(row) or 'nothing'})"
        raise DataError(f"{where}: field {name!r}: {found}; expected text")
    if broken := re.search("[\0\ud800-\udfff]", value):            # NUL, or half a surrogate pair
        raise DataError(f"{where}: field {name!r}: U+{ord(broken[0]):04X} at position {broken.start()} is no "
                        "character: the text was cut or decoded wrongly; remove it")
    return value


# The files of the pipeline, by the columns that tell them, and what is done with them.
_STAGES = {"pairs": ({"prompt", "chosen", "rejected"}, "stepdpo.py --data F"),
           "rectified attempts": ({"completion", "full_rejected"}, "data.py pairs F"),
           "valued attempts": ({"completion", "values"}, "data.py localize F --judge values"),
           "attempts": ({"completion", "correct"},
                        "eval.py --problems F --rollouts 8, or data.py localize F"),
           "errors": ({"prefix", "full_rejected"}, "eval.py --problems F --samples 20"),
           "problems": ({"question", "answer"}, "eval.py --problems F")}


def expect(row: dict, where: str, *wanted: str) -> None:
    """DataError where a row is known to be of another stage of the pipeline than the `wanted` ones."""
    for name, (columns, command) in _STAGES.items():
        if columns <= row.keys():
            if name in wanted:
                return
            raise DataError(f"{where}: the file holds {name}, and {wanted[0]} belong here; what goes on with "
                            f"{name} is {command}")


def writable(row: dict, where: str) -> dict:
    """The fields of a row that the next stage's file can hold: not the dates, bytes, decimals and NaNs of
    parquet files. DataError where text is broken, whatever the field."""
    kept = {}
    for name, value in row.items():
        try:
            json.dumps({name: value}, ensure_ascii=False, allow_nan=False).encode()
            kept[name] = value
        except (UnicodeEncodeError, RecursionError):
            raise DataError(f"{where}: half a surrogate pair in it, or too deep an object (field {name!r}); "
                            "make the row again") from None
        except (TypeError, ValueError):
            pass
    return kept


def _kind(value) -> str:
    kinds = {dict: "an object", list: "a list", str: "text", bool: "true/false", int: "a number",
             float: "a number", type(None): "null"}
    return kinds.get(type(value), type(value).__name__)


def _quote(text: str, width: int = 60) -> str:
    return repr(text if len(text) <= width else text[:width] + "...")


def _shown(value) -> str:
    return _quote(json.dumps(value, default=str))       # of a parquet, values that are not JSON's


def _one_line(error) -> str:
    return " ".join(str(error).split())[:300]


# ==========================================================================================================
# PART 2. Making pairs (section 3.2 of the paper): solutions -> steps -> first wrong step -> pairs.
# ==========================================================================================================

# ----------------------------------------------------------------------------------------------------------
# Steps of a solution
# ----------------------------------------------------------------------------------------------------------

STEP_STYLES = ("auto", "step", "heading", "number", "paragraph", "line")

# A label begins a line: dress, a word, a running number and what closes them, as in "**Step 1:**", "(1)",
# "\textbf{Step one.}", "Étape 1 :", "第一步：", "1단계:". Any word of any language will do, if it counts 1, 2, ...
_NUMERALS = ("one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen",
             "first second third fourth fifth sixth seventh eighth ninth tenth",
             "i ii iii iv v vi vii viii ix x", "① ② ③ ④ ⑤ ⑥ ⑦ ⑧ ⑨ ⑩",
             "一 二 三 四 五 六 七 八 九 十 十一 十二 十三 十四 十五")
_COUNT = {name: number for names in _NUMERALS for number, name in enumerate(names.split(), 1)}
_NAMES = "|".join(sorted(_COUNT, key=len, reverse=True))
_ORDINAL = r"(?:st|nd|rd|th|[eè](?:re|me)?|[ºª°]|\ufe0f?\u20e3)"      # the last draws a key around a digit
_NUMERAL = rf"(?:\d{{1,4}}(?!\d){_ORDINAL}?|(?<![a-z])(?:{_NAMES})(?![a-z]))"
_EOL = r"(?:\r?\n|\r(?!\n))"
_DRESS = r"(?:\$?\\(?:text|emph|under|bold|math|sub|sect|para)[a-z]*\*?\{|<[a-z]+>|[^\w\r\n=+|$]|_){0,12}"
_LETTER = r"[^\r\n\d.,:;!?=+*/()\[\]{}<>|$\\\"'。，：；！？、．（）【】]"         # \w lacks the vowel signs of Hindi
_CJK = r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]"     # kana, Chinese characters, Hangul: they need no space
_CLOSER = (
    rf"(?:[ \t]*(?:[:：)）\]】}}、．]|\.(?!\d)|\*\*|__|</[a-z]+>)|(?<=[①-⑩\u20e3])|(?<={_CJK})[,， \t]"
    r"|[ \t]+[-–—]|[-–—](?=[ \t])|[ \t]*(?=[(（\r\n]|\Z))(?:[:：.)）\]】}*_$]|</[a-z]+>)*")
_AFTER = rf"(?(before)(?:[ \t](?=步))?{_CJK}{{1,4}}?|(?<![①-⑩\u20e3])[ \t]?[^\W\d_]{{1,12}})(?={_CLOSER})"
_INSIDE = r"(?P<inside>(?<=[.!?;:][ \t])|(?<=[。！？；：，）]))"         # in a line: "Step 1: ... Step 2: ..."
_LABEL = re.compile(
    rf"(?:^|{_EOL}|{_INSIDE}){_DRESS}(?P<before>{_LETTER}{{1,24}}?(?:n[or]\.[ \t]*|[ \t][(（])?)??"
    rf"(?P<number>{_NUMERAL})(?(before)(?:[ \t]*(?:/|of)[ \t]*\d{{1,4}})?)(?P<after>{_AFTER})?"
    rf"(?P<closer>{_CLOSER})?",
    re.IGNORECASE)
# "Step" in the languages that people train in, and "1." or "2)". Other labels, as "Case 1:" or "(1)", often
# number a part of a solution only.
_SURE = re.compile(
    r"(?<![^\W\d_])(?:step|[ée]tape|schritt|paso|passo|pas|stap|steg|trin|vaihe|krok|korak|lépés|adım|bước"
    r"|langkah|hakbang|hatua|шаг|крок|βήμα|चरण|ধাপ|(?:ال)?خطوة|مرحله|گام|שלב|ขั้นตอนที่)(?![^\W\d_])"
    r"|步|ステップ|手順|단계|^[^\w([（]*\d+[.)]", re.IGNORECASE)
_THOUGHT = re.compile(r"</(?:think|thinking|thought|reasoning)>|\[/THINK\]|<\|end_of_thought\|>|◁/think▷")


def step_starts(text: str, style: str = "auto") -> list[tuple[int, int]]:
    """(begin, begin of its own words) of each step of a solution; between the two stands its label.

    What comes before the first label belongs to the first step; so does a thought that ends in </think>.
    `auto` is the first style that finds two steps, or one behind the word "Step"; lines are its last resort.
    """
    return _find_steps(text, style)[1]


def split_steps(text: str, style: str = "auto") -> list[str]:
    """The steps of a solution, verbatim: "".join(steps) == text."""
    begins = [begin for begin, _ in step_starts(text, style)] + [len(text)]
    return [text[a:b] for a, b in zip(begins, begins[1:])]


def step_style(text: str, style: str = "auto") -> str:
    """What tells the steps of a solution apart: "'Step 1:' labels", "paragraphs", "lines" or "one step"."""
    return _find_steps(text, style)[0]


def tell_styles(styles: Counter) -> None:
    """Say how many solutions are of which style; and, loudly, where most of them are one step."""
    if styles:
        most = [f"{count:,} {style}" for style, count in styles.most_common(5)]
        print("steps: " + ", ".join(most) + (" and others" if len(styles) > 5 else ""))
    if 2 * styles["one step"] > styles.total():
        print(f"WARNING: {styles['one step']:,} of {styles.total():,} solutions are ONE step each: the first "
              "wrong step is then always the first, and a pair two whole answers without an end. Look at "
              "some (data.py show), and say with --steps how steps are told apart: "
              f"{', '.join(STEP_STYLES[1:])}", file=sys.stderr)


def _find_steps(text: str, style: str) -> tuple[str, list[tuple[int, int]]]:
    """How the steps are told apart, in words ("'Step 1:' labels", "paragraphs"), and their `step_starts`."""
    thought = max((end.end() for end in _THOUGHT.finditer(text)), default=0)
    if not thought and re.match(r"\s*<think(?:ing)?>", text):
        return "one step", [(0, 0)]                     # it never came to an end
    own = text[thought:]
    if style == "auto":
        style = _auto(own)
    places = _places(own, style)
    if not places:
        return "one step", [(0, 0)]
    (begin, end), *others = places
    label = own[begin:end].strip(" *_#>\r\n")
    name = f"{style}s" if style in ("paragraph", "line") else f"{label!r} labels"
    starts = [(0, thought + end), *((thought + begin, thought + end) for begin, end in others)]
    return name if others else "one step", starts


def _auto(text: str) -> str:
    """The style that tells the steps of this text."""
    counts = {style: len(_places(text, style)) for style in ("number", "heading", "paragraph")}
    for style, least in (("heading", 1), ("number", 2)):
        if counts[style] >= least and _SURE.search(text[slice(*_places(text, style)[0])]):
            return style
    lines = len(_lines(text)) if counts["paragraph"] == 1 else 0
    for style in ("number", "heading"):
        # no more is without a label than an end, or, among lines, than a beginning and an end
        if counts[style] > 1 and counts["paragraph"] <= counts[style] + 1 and lines <= counts[style] + 2:
            return style
    return "paragraph" if counts["paragraph"] > 1 else "line"


def _places(text: str, style: str) -> list[tuple[int, int]]:
    """Begin and end of the label, or of the gap, in front of each step."""
    if style == "line":
        return _lines(text)
    if style == "paragraph":
        first = len(text) - len(text.lstrip())
        gaps = [gap.span() for gap in re.finditer(rf"{_EOL}[ \t]*{_EOL}\s*", text)]
        inner = [(begin, end) for begin, end in gaps if begin > first and end < len(text)]
        return [(0, first if text.strip() else 0), *inner]
    if style == "step":
        labels = re.finditer(rf"(?:^|{_EOL})Step \d+:", text)
    elif style == "number":
        labels = _counted(text).get("", [])
    else:
        counted = {word: labels for word, labels in _counted(text).items()
                   if word and labels and (word == "step" or len(labels) > 1)}
        labels = next((counted[word] for word in counted if _SURE.search(word)), None)
        labels = labels or next(iter(counted.values()), [])
    return [label.span() for label in labels]


@functools.lru_cache(maxsize=1)                         # `auto` asks more than once
def _counted(text: str) -> dict[str, list[re.Match]]:
    """The labels of each word, those that count 1, 2, 3, ...; "" are numbers without a word."""
    counted, one_line, end = {}, "\n" not in text.strip(), 0
    for label in _LABEL.finditer(text):
        if label["inside"] is not None and not text[end:label.start()].strip():
            continue                                    # "1. Step 1:" is one label
        end = label.end()
        word = re.sub(r"[\s#№_-]", "", (label["before"] or "") + (label["after"] or "")).casefold()
        labels, number, closer = counted.setdefault(word, []), label["number"].casefold(), label["closer"]
        follows = (_COUNT.get(number) or int(re.match(r"\d+", number)[0])) == len(labels) + 1
        if word:
            closed = closer is not None or word == "step" and follows
            # a count that begins anew goes on; the word "Step" is never a chance
            follows = follows or label["inside"] is None and (bool(labels) or word == "step")
        else:                                           # "12 eggs" and "3 - x" are no labels
            closed = number[-1] in "①②③④⑤⑥⑦⑧⑨⑩\u20e3" or re.match(r"\s*[^\s–—-]", closer or "")
            follows = follows and (one_line or label["inside"] is None)
        if closed and follows:
            labels.append(label)
    return counted


# What lines lie inside of: formulas on display, environments, code, drawings.
_BLOCK = re.compile(r"(?s)\\\[.*?(?:\\\]|\Z)|\$\$.*?(?:\$\$|\Z)|\\begin\{(\w+\*?)\}.*?(?:\\end\{\1\}|\Z)"
                    r"|```.*?(?:```|\Z)|\[asy\].*?(?:\[/asy\]|\Z)")
_GOES_ON = re.compile(r"[=<>≤≥≈≠+×÷/|&)}]|\\\[|\$\$|\\begin|```|\[asy\]")
_LEAD_IN = re.compile(r"(?i)(?:[:：,，、=+]|\\\\|\A.{,60}step by step[.!]?)\Z")


def _lines(text: str) -> list[tuple[int, int]]:
    """A step a line, but for lines that go on with the one above: in or at the head of a formula on display,
    of code or a table; behind a colon or comma; set in; in lower case behind an unfinished sentence."""
    places, above, end, margin = [], "", 0, False
    text = _BLOCK.sub(lambda block: re.sub(r"[\r\n]", " ", block[0]), text)
    for line in re.finditer(r"[^\r\n]+", text):
        words, indented = line[0].strip(), line[0].startswith(("  ", "\t"))
        if not words:
            continue
        wrapped = words[0].islower() and words[1:2].isalpha() and above[-1:] not in ".!?;。！？；"
        goes_on = _LEAD_IN.search(above) or wrapped or _GOES_ON.match(words) or indented and not margin
        if not places or not goes_on:
            margin = indented if not places else margin
            bullet = re.match(r"\s*(?:[-*•‣◦·–—]\s+)?", line[0])
            places.append((end, line.start() + bullet.end()))
        above, end = words, line.end()
    return places or [(0, 0)]


# A value: a number, fraction, root or power, or several of them without a gap, as "1:2", "2\sqrt{3}", "3x^2".
_NUMBER, _BRACES = r"\d+(?:[.,]\d+)*", r"\{[^{}]*(?:\{[^{}]*\}[^{}]*)*\}"
_ATOM = (rf"(?:{_NUMBER}|\\[dt]?frac\s*{_BRACES}\s*{_BRACES}|\\sqrt\s*{_BRACES}"
         rf"|[A-Za-z]?\^(?:{_BRACES}|{_NUMBER}))")
_VALUE = re.compile(rf"([-−–](\s*)\\?\$?)?({_ATOM}(?:(?:\s*/\s*|:)?{_ATOM})*)")


def last_value(text: str) -> Fraction | str | None:
    """The last value in a text with its sign: "so x = -\\frac{1}{2}." -> Fraction(-1, 2). Text where it is no
    plain number; None where there is none."""
    text = re.sub(r"\{,\}|,?\\[!,]", ",", text)        # LaTeX's ways to write 10,000
    found = [match for match in _VALUE.finditer(text) if re.search(r"\d", match[3])]
    if not found:
        return None
    minus, gap, value = found[-1].groups()
    value = re.sub(r"\s|,(?=\d{3}(?!\d))", "", value)
    value = re.sub(r"^\\[dt]?frac\{([^{}]*)\}\{([^{}]*)\}$", r"\1/\2", value)
    if minus:            # "= - 5" and "is -5" have a sign, not "10 - 5" and "x-5"
        before = text[:found[-1].start()]
        if before.rstrip()[-1:] in tuple("=<>≤≥≈([{:") or not gap and not re.match(r"[\w)\]}%]", before[-1:]):
            value = "-" + value
    try:
        return Fraction(value)
    except (ValueError, ZeroDivisionError):             # "2^{10}", "1.2.3", "1/0", or thousands of digits
        return value


def same_step(a: str, b: str, style: str = "auto") -> bool:
    """Whether two steps, labels aside, come to the same: to the same last value, or, without values, in the
    same words."""
    def result(step):
        # one step alone is no sequence: its label may have any number
        labels = [] if style in ("paragraph", "line") else _LABEL.finditer(step)
        label = next((label for label in labels if label["inside"] is None), None)
        if label and (label["closer"] is not None or _SURE.search(label[0])) and step[label.end():].strip():
            step = step[label.end():]
        value = last_value(step)
        return " ".join(step.lower().split()) if value is None else value
    return result(a) == result(b)


# ----------------------------------------------------------------------------------------------------------
# The first wrong step, from rollouts
# ----------------------------------------------------------------------------------------------------------

Counts = Sequence[Sequence[int] | None]                 # one entry a step
# Beta priors: rate of success before the first error, and from it on
RIGHT, WRONG = (1.0, 1.0), (0.3, 10.0)
# share of the successes that take the same step, where it is right, and where it is wrong
SAME, OTHER = (2.0, 0.5), (0.5, 5.0)


def error_posterior(values: Counts, agreement: Counts | None = None) -> list[float]:
    """P(step k is the first wrong one | rollouts), for every step of a solution whose final answer is wrong.

    values[i]     [successes, tries] of continuations from the prefix that ends after step i, or None
    agreement[i]  [same, successes, tries] of continuations from the prefix before step i (i = 0: the question
                  alone), or None: how many of the successful ones begin with the same step (`same_step`)

    If k is the first wrong step, the prefixes that end before it lead to the right answer at some rate p,
    those that hold it at a much smaller rate q; successful continuations from before a right step mostly take
    that step, those from before the wrong one avoid it. All four rates are unknown and integrated out under
    Beta priors, so each factor is a ratio of Beta functions of pooled counts. Without any rollout the
    posterior is uniform.

    Why not "the first step after which none of 8 succeeds"? On a hard problem none succeeds after right steps
    either, and now and then one does after a wrong one. The agreement looks at successes only, however hard
    the rest is. On the embedded task (198 errors of a 50 % policy) that rule finds 88 % of the errors with 8
    rollouts a step, this posterior 93 % with the same ones, and 95 % with 6 a step where `next_prefix` puts
    them.
    """
    def evidence(rates, prior):             # log of the integral of p^s (1-p)^(n-s) over Beta(a, b)
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
    """Index of the first wrong step; None where the rollouts leave it open."""
    posterior = error_posterior(values, agreement)
    return posterior.index(max(posterior)) if max(posterior) > 0.7 else None


def next_prefix(values: Counts, agreement: Counts, most: int) -> int | None:
    """Before which step more rollouts help most: the one most suspected. A success there clears the steps
    before it and, by its own first step, clears or convicts this one. None when the place is found (19 to 1),
    or `most` rollouts have been spent before every suspect."""
    posterior = error_posterior(values, agreement)
    if len(posterior) == 1 or max(posterior) > 0.95:
        return None
    open_ones = [k for k in range(len(posterior)) if not agreement[k] or agreement[k][2] < most]
    return max(open_ones, key=posterior.__getitem__, default=None)


# ----------------------------------------------------------------------------------------------------------
# Judges: which step is the first wrong one?
# ----------------------------------------------------------------------------------------------------------

class Unclear(Exception):
    """A judge gives no verdict on a solution; the message says why, and is what is counted."""


class Stop(Exception):
    """The person at the terminal goes home."""


Judge = Callable[[dict], int | None]  # row with question, answer, steps -> index of the first wrong step


def rollout_counts(row: dict, name: str, width: int) -> list[list[int] | None]:
    """row["values"] (width 2) or row["agreement"] (width 3): for each step null or counts, from small to
    large."""
    counts, steps = row.get(name), len(row["steps"])
    if not isinstance(counts, list) or len(counts) != steps:
        raise DataError(f"field {name!r}: expected an entry for each of {steps} steps, as eval.py --rollouts "
                        "writes it")
    for entry in counts:
        usable = isinstance(entry, list) and len(entry) == width and all(type(n) is int for n in entry)
        if entry is not None and not (usable and [0, *entry] == sorted([0, *entry])):
            raise DataError(f"field {name!r}: found {_shown(entry)}; expected null or {width} counts, as "
                            "eval.py --rollouts writes them")
    return counts


def judge_by_values(row: dict) -> int | None:
    """From the rollouts of `eval.py --rollouts`: the policy is its own judge. `agreement` may be missing."""
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
        count = len(row["steps"])
        steps = "\n".join(f"[Step {i}] {step.strip()}" for i, step in enumerate(row["steps"], 1))
        prompt = JUDGE_PROMPT.format(question=row["question"], solution=_right_solution(row), count=count,
                                     steps=steps)
        asked = {"messages": [{"role": "user", "content": prompt}], "temperature": 0.0}
        reply, _, end = endpoint.ask(asked | {"max_tokens": 1024 + 16 * count})
        if end == "length":                         # it was enough for the verdicts, not for thinking first
            reply, _, _ = endpoint.ask(asked)
        return parse_verdicts(reply, count)
    return judge


# How models end a thought, and begin one: what stands in it is not what they say.
THOUGHT_ENDS = re.compile(r"(?i)</(?:seed:)?(?:think|thinking|thought|reasoning)>|\[/think\]|◁/think▷")
THOUGHT_BEGINS = re.compile(r"(?i)\s*(<(seed:)?(think|thinking|thought|reasoning)>|\[think\]|◁think▷)")


def parse_verdicts(reply: str, count: int) -> int | None:
    """Index of the first of `count` steps that is called incorrect; None if all are correct or neutral.
    DataError if the reply, behind its thought, says neither."""
    said = THOUGHT_ENDS.split(reply)[-1]
    line = r"^\W*(?:step\W*)?(\d{1,4})\W+(correct|incorrect|neutral)\b"
    lines = [] if THOUGHT_BEGINS.match(said) else re.findall(line, said, flags=re.IGNORECASE | re.MULTILINE)
    for i, (number, verdict) in enumerate(lines):
        if int(number) != i + 1 or i >= count:
            break
        if verdict.lower() == "incorrect":
            return i
        if i + 1 == count:
            return None
    raise DataError(f"the judge's reply could not be read: {_quote(said.strip(), 200)}")


def ask(row: dict) -> int | None:
    """A person at the terminal, one step at a time."""
    print("\n" + _block(f"problem {row['id']}", row["question"]))
    print(_block("right answer", _right_solution(row)))
    for i, step in enumerate(row["steps"]):
        print(_block(f"step {i + 1} of {len(row['steps'])}", step.strip("\n")))
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
    """MODULE:FUNCTION gets (question, steps, answer), all texts; it returns the first wrong step's index, or
    None."""
    module, _, function = name.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        checker = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise DataError(f"--judge {name}: {_one_line(error)}; expected values, endpoint, ask, or a "
                        "MODULE:FUNCTION that can be imported from here") from None
    finally:
        sys.path.pop(0)

    def judge(row: dict) -> int | None:
        steps = row["steps"]
        try:
            first = checker(row["question"], list(steps), row["answer"])
        except Exception as error:                  # somebody's own code: the row is named, the others go on
            raise DataError(f"--judge {name} raised {type(error).__name__}: {_one_line(error)}") from error
        if first is not None and (type(first) is not int or not 0 <= first < len(steps)):
            raise DataError(f"--judge {name} returned {_quote(repr(first))} for {len(steps)} steps; expected "
                            "the index of one (from 0), or None")
        return first
    return judge


def judge_identity(name: str, args: argparse.Namespace) -> dict[str, str]:
    """What a verdict belongs to besides its solution: no other judge's verdict is taken for it."""
    if name != "endpoint":
        return {"judge": name}
    url = Endpoint(args.endpoint, args.api_model).url
    return {"judge": name, "endpoint": url, "api_model": args.api_model}


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


# ------------------------------------------------------------------------------------------------------------
# File to file
# ------------------------------------------------------------------------------------------------------------

def write_rows(path: str | Path, rows: Iterable) -> int:
    """Write JSONL: the file is there whole or not at all. Returns the number of rows."""
    count = 0
    with written(Path(path)) as aside, aside.open("w", encoding="utf-8", newline="\n") as file:
        for count, row in enumerate(rows, 1):
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return count


class Journal:
    """What is finished, on disk the moment it is: a line of settings, then [key, value] lines.

    done      {key (a tuple): value}, which need not be made again; of a key that stands twice the last value
    failed    errors of what could not be made, and is to be tried again by the same command

    A journal that was begun with other settings raises DataError, which names them. `others`, the journals of
    other processes, are read along. Used as `with journal:`, it can be added to.
    """

    def __init__(self, path: Path, settings: dict, restart: bool = False, others: Iterable[Path] = ()):
        self.path, self.settings = path, json.loads(json.dumps(settings))
        self.done: dict[tuple, object] = {}
        self.failed: list[DataError] = []
        for file in [] if restart else dict.fromkeys([*others, path]):
            if file.exists():
                self._read(file)
        if restart:
            path.unlink(missing_ok=True)

    def _read(self, file: Path) -> None:
        whole_lines = file.read_bytes().split(b"\n")[:-1]               # behind the last \n: a torn line
        for number, line in enumerate(whole_lines):
            try:
                entry = json.loads(line)
                if number > 0:
                    self.done[tuple(entry[0])] = entry[1]
            except (ValueError, TypeError, LookupError):
                entry = None                            # damaged: that one is made again
            if number == 0:
                refuse_other(entry, self.settings, file)

    def __enter__(self) -> "Journal":
        """Begin to write; under torchrun once all processes have read."""
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab+") as file:
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)             # a torn line goes away
            self.file = self.path.open("a", encoding="utf-8", newline="\n")
        if self.file.tell() == 0:
            self.write(self.settings)
        return self

    def __exit__(self, *_) -> None:
        with writing(self.path):
            self.file.close()

    def add(self, key: tuple, value) -> None:
        if key not in self.done or self.done[key] != value:
            self.done[key] = value
            self.write([key, value])

    def write(self, entry) -> None:
        with writing(self.path):
            self.file.write(json.dumps(entry, ensure_ascii=False) + "\n")
            self.file.flush()


def refuse_other(old, new: dict, path: Path) -> None:
    """DataError naming what differs between the settings of what lies at `path` and the present ones."""
    old = old if isinstance(old, dict) else {}
    changed = [key for key in new | old if old.get(key) != new.get(key)]
    if changed:
        how = "; ".join(f"{key} was {old.get(key)!r}, is {new.get(key)!r}" for key in changed)
        raise DataError(f"{path}: was made otherwise: {how}; choose another --out, or begin anew with "
                        "--restart")


def summary_path(out: Path) -> Path:
    """score.jsonl -> score.summary.json. Any other name is kept whole: "qwen2.5-0.5B" has no suffix."""
    return out.with_name(out.name.removesuffix(".jsonl") + ".summary.json")


def stage(out: str | Path, settings: dict, work: Callable[[Journal, int, int], None],
          collect: Callable[[dict], tuple[list[dict], dict]], restart: bool = False) -> bool:
    """Make the file `out`, shared by torchrun's processes. Killed at any moment, the same call goes on.

        work(journal, rank, world)        in every process: journal.add for its share of what is not done
        collect(done) -> (rows, summary)  in process 0, from what all have done: the rows of `out`, and a dict

    settings: all that decides what the rows are. `out` is written whole, then its summary, with the settings
    in it, and the journals (OUT.journal-RANK) go. Where journal.failed holds an error they stay, and the same
    call tries that again. Processes meet in these files; otherwise they only wait for each other.

    Returns False where `out` was complete already. Raises DataError where what is there was made with other
    settings, or where no row came of the work, which leaves no `out`; OSError where another command has it.
    """
    out, settings = Path(out), json.loads(json.dumps(settings))
    twin = out.with_suffix("") if out.suffix == ".jsonl" else Path(f"{out}.jsonl")
    if twin.is_file() and not out.exists() and summary_path(out).exists():
        raise DataError(f"{out}: its summary would replace that of {twin.name}; choose another --out")
    rank, world = join_processes()
    with locked(out):
        if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":     # torchrun started us again: go on
            restart = False
        if restart and rank == 0:
            for path in _journals(out):
                path.unlink()
        meet()
        found = _journals(out)
        if out.exists() and not found and not restart:
            refuse_other(_summary(out).get("settings"), settings, out)
            return False
        journal = Journal(Path(f"{out}.journal-{rank}"), settings, others=found)
        meet()                                          # until all have read what there is
        begun = time.monotonic()
        try:
            with journal:
                work(journal, rank, world)
        except (DataError, CheckpointError):
            if not journal.done:                        # nothing is finished: leave nothing
                journal.path.unlink()
            raise
        seconds = round(time.monotonic() - begun, 1)
        failed = meet(len(journal.failed))
        if rank == 0:
            done = Journal(journal.path, settings, others=_journals(out)).done
            rows, summary = collect(done)
            if not rows:
                if not done:
                    for path in _journals(out):
                        path.unlink()
                why = f"; the first of {failed} that failed: {journal.failed[0]}" if journal.failed else ""
                raise DataError(f"{out}: no row came of it, so it is not written{why}")
            write_rows(out, rows)
            summary |= {"seconds": seconds, "failed": failed, "settings": settings}
            write_rows(summary_path(out), [summary])
            for path in _journals(out) if not failed else []:
                path.unlink()
        meet()                                          # until `out` is there
    return True


def meet(number: int = 0) -> int:
    """Wait until all processes are here; the sum of their numbers."""
    total = torch.tensor(number)
    if dist.is_initialized():
        dist.all_reduce(total, group=_patient_group(dist.group.WORLD))
    return int(total)


@functools.cache
def _patient_group(world: dist.ProcessGroup) -> dist.ProcessGroup:
    """Sampling is uneven: the processes may wait for each other longer than between updates of a model."""
    return dist.new_group(backend="gloo", timeout=timedelta(days=7))


def _journals(out: Path) -> list[Path]:
    found = out.parent.glob(f"{glob.escape(out.name)}.journal-*")
    return sorted(path for path in found if path.suffix.removeprefix(".journal-").isdecimal())


def _summary(out: Path) -> dict:
    path = summary_path(out)
    if not path.is_file():
        raise DataError(f"{out}: exists, without {path.name} that would say how it was made; "
                        "choose another --out, or begin anew with --restart")
    return read_json(path)


def check_out(out: str | Path, source: str | Path) -> None:
    """DataError where `out` is no name for a new file, before any work is done for it."""
    if Path(out).resolve() == Path(source).resolve():
        raise DataError(f"--out {out}: is the input; give another name")
    if Path(out).is_dir():
        raise DataError(f"--out {out}: is a folder; name a file in it, such as {Path(out) / 'out.jsonl'}")


def progress(total: int, done: int, unit: str, quiet: bool = False) -> tqdm:
    """A bar with rate and time left; in a log file a line every half minute."""
    return tqdm(total=total, initial=done, unit=f" {unit}", disable=quiet, dynamic_ncols=True,
                mininterval=0.5 if sys.stderr.isatty() else 30)


def digest(value) -> str:
    """12 hex digits that tell this JSON value from others."""
    return hashlib.blake2b(json.dumps(value, ensure_ascii=False).encode(), digest_size=6).hexdigest()


COSTLY = ("endpoint", "ask")                            # judges whose verdicts are kept for good


def judge_all(rows: dict[tuple, dict], name: str, args: argparse.Namespace,
              bad: list[DataError]) -> tuple[dict[tuple, int | str | None], bool]:
    """(a verdict for every row, whether the same command had been here and left some out).

    A verdict is the index of the first wrong step, None (nothing wrong), or the text of Unclear. Rows on
    which the judge fails are left out and named in `bad`. What is decided is in OUT.verdicts, from which the
    same command goes on, also where the person at the terminal stopped (Stop is passed on).
    """
    judge, path, out = make_judge(name, args), Path(f"{args.out}.verdicts"), Path(args.out)
    begun = path.exists() and not args.restart
    if name in COSTLY and out.exists() and not begun and not args.restart:
        raise DataError(f"{out}: exists, without {path.name} that would say how it was made; choose another "
                        "--out, or begin anew with --restart")
    solutions = digest([[*key, row["question"], row["answer"], row["steps"]] for key, row in rows.items()])
    journal = Journal(path, judge_identity(name, args) | {"solutions": solutions}, args.restart)
    todo = [key for key in rows if key not in journal.done]

    def verdict(key: tuple) -> int | str | None | DataError:
        try:
            return judge(rows[key])
        except Unclear as reason:
            return str(reason)
        except EndpointError:
            raise
        except DataError as error:
            return DataError(f"{rows[key]['where']}: {error}")

    decide = lambda key: (key, verdict(key))
    decided = in_threads(decide, todo, args.concurrency) if name == "endpoint" else map(decide, todo)
    quiet = name in ("ask", "values")
    try:
        with journal, progress(len(rows), len(rows) - len(todo), "verdicts", quiet) as bar:
            for key, found in decided:
                if isinstance(found, DataError):
                    bad.append(found)
                else:
                    journal.add(key, found)
                bar.update()
    finally:
        if name == "values" or not rows or name not in COSTLY and len(journal.done) == len(rows):
            path.unlink(missing_ok=True)                # what can be had again at no cost
    return {key: journal.done[key] for key in rows if key in journal.done}, begun and bool(todo)


def write_out(args: argparse.Namespace, rows: list[dict], bad: list[DataError], continued: bool) -> int:
    """Write OUT and return the exit status. An OUT with other rows in it is not overwritten, unless by
    --restart or where it is `continued`: the same command had left it incomplete."""
    out, made = Path(args.out), "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    if out.exists() and not (args.restart or continued or out.read_bytes() == made):
        remedy = "begin anew with --restart"
        if Path(f"{out}.verdicts").exists():
            remedy = "delete it, and the same command makes it again from the verdicts"
        raise DataError(f"{out}: exists and holds other rows; choose another --out, or {remedy}")
    write_rows(out, rows)
    return 1 if bad else 0


def read_attempts(file: str, bad: list[DataError], *stages: str) -> Iterator[tuple[tuple[str, int], dict]]:
    """((id, sample), row) of the graded samples that eval.py wrote; rows that are none go to `bad`. DataError
    where the first row is of none of the pipeline's `stages`.

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
            names = ("question", "answer", "completion")
            _, answer, completion = (text_field(row, name, where) for name in names)
            prefix = text_field(row, "prefix", where) if "prefix" in row else ""
            if not answer.strip():
                raise DataError(f"{where}: field 'answer': empty; a problem needs its right answer")
            if not isinstance(row.get("correct"), bool):
                raise DataError(f"{where}: field 'correct': found {_kind(row.get('correct'))}; expected true "
                                "or false, as eval.py grades it")
            if key in seen:
                raise DataError(f"{where}: id {key[0]!r}, sample {sample} stands in {seen[key]} already; "
                                "remove one")
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


# The other fields of an attempt are its problem's, and are passed on.
OF_AN_ATTEMPT = ("id", "sample", "prefix", "completion", "extracted", "correct", "tokens", "stop_reason",
                 "steps", "values", "agreement", "where", "text")


def localize(args: argparse.Namespace) -> int:
    """attempts -> errors: of a wrong attempt the prefix up to its first wrong step, that step, the rest."""
    bad, wrong, stages, styles, problems = [], {}, Counter(), Counter(), set()
    valued = () if args.judge == "values" else ("attempts",)
    for key, row in read_attempts(args.file, bad, *valued, "valued attempts", "rectified attempts"):
        stages["attempts"] += 1
        problems.add(key[0])
        stages["wrong"] += not row["correct"]
        if row["correct"]:
            continue
        if row.get("stop_reason") == "length":          # it is wrong because it has no end
            stages["cut off"] += 1
            continue
        steps = split_steps(row["text"], args.steps)
        styles[step_style(row["text"], args.steps)] += 1
        if row.get("steps", steps) != steps:
            bad.append(DataError(f"{row['where']}: field 'steps': not the text cut by --steps {args.steps}; "
                                 "give the style that eval.py --rollouts was given"))
            continue
        wrong[key] = row | {"steps": steps}
    tell_styles(styles)
    verdicts, continued = judge_all(wrong, args.judge, args, bad)
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
                "prefix": text[:begin], "rejected": text[begin:end], "full_rejected": text[begin:],
                "step": first + 1}
    complain(bad)
    left_out = [(f"    {reason}", count) for reason, count in reasons.most_common()]
    print(funnel([("problems", len(problems)), ("attempts", stages["attempts"]), ("wrong", stages["wrong"]),
                  ("    cut off by the length limit, not judged", stages["cut off"]), *left_out,
                  ("located", len(errors))]))
    if not errors:
        raise DataError(f"{args.file}: no first wrong step was located, nothing to write to {args.out}")
    return write_out(args, list(errors.values()), bad, continued)


def pairs(args: argparse.Namespace) -> int:
    """rectified attempts -> pairs in the columns of Math-Step-DPO-10K."""
    bad, stages, continued = [], Counter(), False
    if args.whole and args.verify:
        raise DataError("--verify judges a chosen step; --whole answers are right by their final answer")
    of_any_attempts = ("attempts", "valued attempts") if args.whole else ()
    rows = list(read_attempts(args.file, bad, *of_any_attempts, "rectified attempts"))
    candidates = whole_pairs(rows, stages) if args.whole else step_pairs(rows, args.steps, stages, bad)
    if args.verify:
        solutions = {}
        for key, pair in candidates.items():
            steps = split_steps(pair["initial_reason_steps"] + pair["full_chosen"], args.steps)
            solutions[key] = {"id": key[0], "where": key[0], "question": pair["prompt"],
                              "answer": pair["answer"], "steps": steps}
        verdicts, continued = judge_all(solutions, args.verify, args, bad)
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
    return write_out(args, kept, bad, continued)


def step_pairs(rows: list[tuple[tuple, dict]], style: str, stages: Counter,
               bad: list[DataError]) -> dict[tuple, dict]:
    """Distinct first steps of the continuations that reach the right answer, against the wrong step that they
    replace."""
    stages.update({"located errors": 0, "continuations": 0, "right": 0})
    candidates, errors, rectified = {}, set(), set()
    for (id, _), row in rows:
        try:
            prefix, rejected, rest = (text_field(row, name, row["where"])
                                      for name in ("prefix", "rejected", "full_rejected"))
            if not rest.startswith(rejected):
                raise DataError(f"{row['where']}: field 'rejected': is not the beginning of 'full_rejected'; "
                                "both are the wrong attempt from the wrong step on, as localize writes them")
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
            candidates[key] = pair_of(row, prefix, chosen, rejected, row["completion"], rest)
    stages["located errors"], stages["rectified errors"] = len(errors), len(rectified)
    return candidates


def whole_pairs(rows: list[tuple[tuple, dict]], stages: Counter) -> dict[tuple, dict]:
    """Plain DPO's pairs: independently sampled right and wrong whole answers of a problem, the i-th right one
    with the i-th wrong one."""
    stages.update({"problems": 0, "attempts": len(rows)})
    sides: dict[str, tuple[dict, dict]] = {}            # problem -> its distinct right and wrong answers
    for (id, _), row in rows:
        side = sides.setdefault(id, ({}, {}))[not row["correct"]]
        if row.get("stop_reason") == "length":          # training would put an end token where no end is
            stages["    cut off by the length limit"] += 1
        elif row["text"].strip() in side:
            stages["    the same answer again"] += 1
        else:
            side[row["text"].strip()] = row
    stages["problems"] = len(sides)
    both = [right and wrong for right, wrong in sides.values()]
    stages["problems with right and wrong answers"] = sum(map(bool, both))
    pairs = {}
    for id, (right, wrong) in sides.items():
        for i, (good, bad) in enumerate(zip(right.values(), wrong.values())):
            pairs[id, i] = pair_of(good, "", good["text"], bad["text"], good["text"], bad["text"])
    return pairs


def pair_of(row: dict, steps: str, chosen: str, rejected: str, full_chosen: str, full_rejected: str) -> dict:
    """A training row in the columns of Math-Step-DPO-10K."""
    return {"dataset": row.get("dataset", ""), "prompt": row["question"], "initial_reason_steps": steps,
            "chosen": chosen, "rejected": rejected, "full_chosen": full_chosen,
            "full_rejected": full_rejected, "answer": row["answer"]}


# ------------------------------------------------------------------------------------------------------------
# An OpenAI-compatible server
# ------------------------------------------------------------------------------------------------------------

class EndpointError(OSError):
    """No request can succeed. (A DataError is of one request; others may go through.)"""


# What a status says of a request. With any other it is "refused": this one cannot succeed, others may.
KINDS = {"final": (*range(300, 400), 401, 402, 404, 405, 407, 410, 501),        # none can
         "busy": (408, 409, 425, 429, 502, 503, 504, 529),                      # it may, later
         "failed": range(500, 600)}                                             # it may, if tried again
# The status that words stand for, where a reply has none that says it: the first that is found.
WORDS = {429: r"rate.?limit|too many|overload|capacity|throttl|(try|retry) (again|in|after)|retry.?delay"
              r"|per.minute|busy|unavailable|timed? ?out|稍后|繁忙",
         402: r"insufficient[ _](quota|balance|credit|fund)|credit balance|current[ _]quota"
              r"|your plan and billing|billing[ _](hard[ _])?limit|arrearage|余额不足|欠费",
         500: r"^finish_reason .*(error|abort|cancel|resource|time)"}
# Why a text ends. For any other reason ("content_filter") it is no answer of the model.
ENDS = {"stop_sequence": "stop"}
ENDS |= dict.fromkeys(("stop", "eos", "eos_token", "end_turn", "complete", "completed", "finished"), "eos")
ENDS |= dict.fromkeys(("length", "max_tokens", "max_output_tokens", "model_length"), "length")
# Fields that some servers refuse, the least missed first: their other name, or None to leave them out.
SPARED = {"seed": None, "stop": None, "top_p": None, "temperature": None,
          "max_tokens": "max_completion_tokens"}
LOST_IN_A_ROW = 32                  # so many failed requests without a good one between: the server is down
# Addresses of this machine and of private networks, to which no proxy leads.
NEAR = re.compile(r"localhost$|127\.|10\.|192\.168\.|172\.(1[6-9]|2\d|3[01])\.|::1$|f[cd].*:")


class Endpoint:
    """A server that speaks OpenAI's protocol (vLLM, llama.cpp, transformers serve). Threads may share it.

    url: "http://host:8000", ".../v1" or all of ".../v1/chat/completions", with a query as Azure has it.
    The key is OPENAI_API_KEY of the environment; no message shows it.
    """

    def __init__(self, url: str, model: str, timeout: float = 600, attempts: int = 8, pause: float = 1.0):
        self.model, self.timeout, self.pause = model, timeout, pause
        self.tries = {"busy": attempts, "away": attempts, "failed": attempts // 2}
        parts = r"(https?://(\[[\da-f:]+\]|[\w.-]+)(?::\d{1,5})?)(/[!-~]*?)??(\?[!-~]*)?"
        if not (found := re.fullmatch(parts, url.strip())):
            raise DataError("--endpoint: expected an address such as http://localhost:8000/v1, without a "
                            "password: the key is read from OPENAI_API_KEY")
        server, host, path, self.query = found.groups(default="")
        host = host.strip("[]")
        self.url = server + (re.sub(r"(/(chat/)?completions)?/*$", "", path) if path.strip("/") else "/v1")
        key = os.environ.get("OPENAI_API_KEY", "").strip()
        if not re.fullmatch("[!-~]*", key):
            raise DataError("OPENAI_API_KEY: holds a space, a line end or another character that no key has")
        self.secrets = [secret for secret in (key, self.query) if secret]
        azure = host.endswith(".azure.com") or "api-version=" in self.query
        self.headers = {"api-key": key} if azure else {"Authorization": f"Bearer {key}"} if key else {}
        self.headers |= {"Content-Type": "application/json", "User-Agent": "step-dpo"}
        near = NEAR.match(host) or urllib.request.proxy_bypass(host)
        proxies = {} if near else urllib.request.getproxies()
        proxy = proxies.get(server.partition(":")[0], "").rpartition("@")[2]            # without its password
        self.via = f" (through the proxy {proxy}; no_proxy={host} goes without)" if proxy else ""
        self.opener = urllib.request.build_opener(_EveryStatus, urllib.request.ProxyHandler(proxies))
        self.changes: dict[str, str | None] = {}        # of SPARED: what the server has refused
        self.failed, self.told, self.lock = 0, set(), threading.Lock()

    def ask(self, body: dict) -> tuple[str, int | None, str]:
        """(text, number of tokens or None, "eos", "stop" (a stop string) or "length") of the reply to
        {"messages": ...} by chat/completions, to {"prompt": ...} by completions. A thought that the server
        keeps apart stands before the text, as models write it: <think>...</think>.

        What may pass is tried again after 1, 2, 4, ... seconds, at most a minute. A field that a refusal
        names is left out, or renamed, where that helps. DataError: this request is refused or fails;
        EndpointError: all do.
        """
        path = "chat/completions" if "messages" in body else "completions"
        where, attempt, changes = f"{self.url}/{path}{self.via}", 1, dict(self.changes)
        while True:
            sent = {changes.get(name, name): value for name, value in body.items()}
            sent.pop(None, None)
            kind, found = self._send(path, sent)
            if kind == "ok":
                for refused, name in changes.items():
                    how = f"sent as {name}" if name else "left out"
                    self._tell(refused, f"{where}: the server refuses {refused}; it is {how} from here on")
                self.failed = 0
                self.changes |= changes
                return found
            named = lambda field: re.search(rf"(?i)\b{field.replace('_', '[_ -]?')}\b", found)
            field = next((field for field in SPARED if field in sent and named(field)), None)
            if field and kind in ("refused", "failed"):
                changes[field] = SPARED[field]
            elif attempt < self.tries.get(kind, 1):
                self._tell(kind, f"{where}: {found}; trying again, {self.tries[kind]} times at most")
                time.sleep(min(self.pause * 2 ** (attempt - 1), 60) * random.uniform(0.5, 1.0))
                attempt += 1
            else:
                found = f"{where}, attempt {attempt}: {found}"
                self.failed += kind in ("busy", "failed")
                if kind not in ("away", "final") and self.failed < LOST_IN_A_ROW:
                    raise DataError(found)
                raise EndpointError(f"{found}; is the server up, and are --endpoint, --api_model and "
                                    "OPENAI_API_KEY right? What is finished is kept: run the command again")

    def _tell(self, what: str, message: str) -> None:
        with self.lock:                                 # once, whichever thread comes first
            if what not in self.told:
                print(message, file=sys.stderr)
            self.told.add(what)

    def _send(self, path: str, body: dict) -> tuple[str, tuple | str]:
        """What read_reply says, or ("away", why) where nobody answers."""
        content = json.dumps({"model": self.model} | body).encode()
        request = urllib.request.Request(f"{self.url}/{path}{self.query}", content, self.headers)
        try:
            with self.opener.open(request, timeout=self.timeout) as response:
                text = response.read(2**26).decode("utf-8-sig", "replace").strip()
            if response.status >= 300:
                text = response.headers.get("Location", "") + " " + text       # where a redirect leads
            kind, found = read_reply(response.status, text)
        except (OSError, OverflowError, http.client.HTTPException) as error:
            reason = error.reason if isinstance(error, urllib.error.URLError) else error
            broken = reason is error or isinstance(reason, (BrokenPipeError, ConnectionResetError))
            nowhere = isinstance(reason, socket.gaierror) and reason.errno != socket.EAI_AGAIN
            nowhere = nowhere or isinstance(reason, ssl.SSLError)
            kind = "final" if nowhere else "failed" if broken else "away"
            found = f"{type(reason).__name__}: {reason}"
        if kind != "ok":
            for secret in self.secrets:                 # the server may have quoted it
                found = found.replace(secret, "***")
            found = " ".join(found.split())[:400]
        if kind == "final" and path == "completions":
            found += ". Prefixes and rollouts need a server that has /completions"
        return kind, found


class _EveryStatus(urllib.request.HTTPErrorProcessor):
    def http_response(self, request, response):     # no exception for an error; and no redirect is followed:
        return response                             # the key would go along to wherever it points
    https_response = http_response


def read_reply(status: int, text: str) -> tuple[str, tuple | str]:
    """("ok", what Endpoint.ask returns) of a server's reply, else (one of KINDS, what is wrong)."""
    error = text
    if status < 300:                                    # in which some servers put their errors
        try:
            reply = json.loads(text)
        except ValueError:
            reply = None
        match reply:
            case {"error": error} | {"choices": [{"error": error}, *_]} if error:
                error = json.dumps(error, ensure_ascii=False)
            case {"choices": [{"message": {}} | {"text": _} as choice, *_]}:
                finish = str(choice.get("finish_reason") or "stop").lower()
                if finish in ENDS:
                    return "ok", _completion(reply, choice, ENDS[finish])
                error = f"finish_reason {finish}"
            case {}:
                error = text
            case _ if re.match(r"\{(?!.*\}\s+\{)|$", text):              # a JSON object a line is a stream
                return "failed", f"a reply cut short: {text}"
            case _:
                return "final", f"a web page, a stream or plain text came, not a JSON object: {text}"
    said = f"HTTP {status}: {error}"
    meant = next((code for code, words in WORDS.items() if re.search(f"(?i){words}", error)), 400)
    if status < 300:
        code = re.search(r'"(?:code|status|status_code)":\s*"?([45]\d\d)\b', error)
        status = int(code[1]) if code else meant
    if meant == 402 and status != 422:                  # a 422 may quote the prompt
        status = 402
    return next((kind for kind, statuses in KINDS.items() if status in statuses), "refused"), said


def _completion(reply: dict, choice: dict, reason: str) -> tuple[str, int | None, str]:
    message = choice.get("message") or choice
    text = _text_of(message.get("content") or message.get("refusal") or message.get("text"))
    thought = message.get("reasoning_content") or message.get("reasoning")
    if thought and "</think>" not in text:
        text = _text_of({"type": "thinking", "thinking": thought}) + text.lstrip()
    if reason == "length":
        text = text.removesuffix("\n</think>\n\n")             # the thought itself was cut off
    # many say "stop" of both ends; vLLM and SGLang add the stop string, if it was one
    if reason == "eos" and isinstance(choice.get("stop_reason") or choice.get("matched_stop"), str):
        reason = "stop"
    return text, (reply.get("usage") or {}).get("completion_tokens"), reason


def _text_of(content) -> str:
    """A message's content: a text, or chunks {"type": ..., "text" or "thinking": ...}."""
    if isinstance(content, list):
        return "".join(map(_text_of, content))
    if isinstance(content, dict):
        text = _text_of(content.get("text") or content.get("thinking") or content.get("reasoning"))
        thought = content.get("type") in ("thinking", "reasoning") and text.strip()
        return f"<think>\n{thought}\n</think>\n\n" if thought else text
    return str(content or "")


def in_threads(work: Callable, items: Sequence, threads: int) -> Iterator:
    """work(item) of each item, as they end. Unlike an executor's, a pool's threads die with the program:
    nobody waits for requests under way, which may take minutes."""
    with ThreadPool(threads) as pool:
        yield from pool.imap_unordered(work, items)


# ==========================================================================================================
# APPENDIX. Looking at data; the command line.
# ==========================================================================================================

# ----------------------------------------------------------------------------------------------------------
# python data.py show: a row, and what becomes of it
# ----------------------------------------------------------------------------------------------------------

def _block(title: str, text: str) -> str:
    """A titled text with a bar at its left. Control characters, which a terminal would obey, are escaped."""
    safe = re.sub(r"[^\n\t\x20-\x7e\xa0-\U0010ffff]", lambda found: f"\\x{ord(found[0]):02x}", text)
    return "\n".join([title, *(f"  | {line}" for line in safe.split("\n"))])


def _width(text: str) -> int:
    """Columns that a terminal needs."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1
               for c in text)


def token_picture(ids: list[int], times: Sequence[int], tokenizer: Tokenizer, before: list[int]) -> str:
    """Tokens in lines, with the loss mask below: . = read only, ^ = predicted (loss), 2 = predicted once for
    each side. `before`: the ids of their context.

    Spaces are drawn as ·, line ends as ⏎; a character that needs several tokens is drawn as �, once for each.
    """
    lines, tokens, mask = [], "", ""
    for i, often in enumerate(times):
        piece = tokenizer.continuation((before + ids[:i])[-16:], [ids[i]]) or "�"
        piece = piece.replace(" ", "·").replace("\n", "⏎").replace("\t", "⇥")
        piece = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in piece)
        if tokens and len(mask) + _width(piece) > 110:
            lines += [tokens.rstrip(), mask.rstrip(), ""]
            tokens, mask = "", ""
        tokens += piece + " "
        mask += ".^2"[often] * _width(piece) + " "
    return "\n".join([*lines, tokens.rstrip(), mask.rstrip()])


def show_row(where: str, row: dict, example: Example | None, tokenizer: Tokenizer, method: str,
             style: str) -> str:
    """The teaching picture: the texts of a row, then the segments of its batch with the loss mask."""
    parts = [f"{where}   method {method}, prompt style {style}"]
    try:
        question, steps, responses = texts_of(row, method, where)
    except Unfit:
        return parts[0]
    begun, kinds = "", {"chosen": "whole answer", "rejected": "whole answer"}
    if method == "stepdpo":
        begun, kinds = steps + responses[0], {"chosen": "s_win", "rejected": "s_lose"}
    parts += ["", _block("prompt x (read, no loss)", render_prompt(style, question, tokenizer, begun))]
    if steps:
        parts.append(_block("correct steps s_1..s_{k-1} (read, no loss)", steps))
    parts += [_block(f"{name}: {kinds[name]} (loss)", text) for name, text in zip(kinds, responses)]
    if example is None:
        return "\n".join(parts)

    layout = lay_out(example.sides, [0] * len(example.sides))
    times = np.zeros(len(layout.tokens), dtype=int)     # how often each token is predicted
    for places in layout.places:
        times[places[example.start:]] += 1
    both = "   2 predicted for both sides: it cancels in the difference" if 2 in times else ""
    parts += ["", f"the same as {len(layout.tokens)} tokens in a batch   (. read only   ^ loss{both})"]
    begin, trunk = 0, {-1: []}                          # of each segment: the tokens up to its end
    for segment, (length, parent) in enumerate(zip(layout.lengths, layout.parents)):
        here = slice(begin, begin + length)
        ids, positions = layout.tokens[here].tolist(), layout.positions[here]
        through = [name for name, places in zip(kinds, layout.places) if begin in places]
        title = f"segment {segment}: {' and '.join(through)}"
        if len(through) > 1:
            title += ", computed once"
        elif parent >= 0:
            title += f", sees segment {parent} and itself"
        title += f"; {length} tokens, positions {positions[0]}..{positions[-1]}"
        parts.append(_block(title, token_picture(ids, times[here], tokenizer, trunk[parent])))
        trunk[segment] = trunk[parent] + ids
        begin += length
    ends = f"the answer ends with {tokenizer.decode([int(example.chosen[-1])])}"
    if method == "stepdpo":
        ends = "no end token follows: the solution goes on"
    return "\n".join([*parts, f"{times.sum()} tokens carry loss; {ends}"])


def show_solution(where: str, row: dict, style: str) -> str:
    """A sampled solution, cut into its steps, with what rollouts say of each where the file has them."""
    prefix = text_field(row, "prefix", where) if "prefix" in row else ""
    text = prefix + text_field(row, "completion", where)
    steps = split_steps(text, style)
    counts = {"values": [None] * len(steps), "agreement": [None] * len(steps)}
    for name, width in (("values", 2), ("agreement", 3)):
        if row.get(name) is not None:
            try:
                counts[name] = rollout_counts(row | {"steps": steps}, name, width)
            except DataError as error:
                raise DataError(f"{where}: {error}") from None
    verdict = {True: "right", False: "wrong"}.get(row.get("correct"), "not graded")
    parts = [f"{where}   {len(steps)} steps (--steps {style}: {step_style(text, style)}), {verdict}", "",
             _block("question", text_field(row, "question", where))]
    for number, (step, after, before) in enumerate(zip(steps, *counts.values()), 1):
        title = f"step {number}"
        if after:
            title += f"; from its end {after[0]} of {after[1]} rollouts succeed"
        if before and before[1]:
            title += f"; {before[0]} of the {before[1]} that succeed from before it take it"
        parts.append(_block(title, step.strip("\n")))
    answers = f"extracted answer {row.get('extracted')!r}, right answer {row.get('answer')!r}"
    return "\n".join([*parts, answers])


def statistics(examples: Sequence[Example], report: Report) -> str:
    """Lengths of a file's rows in tokens, and the work that sharing the common beginning saves."""
    columns = {"context (no loss)": [e.start for e in examples],
               "chosen (loss)": [len(e.chosen) - e.start for e in examples]}
    pairs = [e for e in examples if e.rejected is not None]
    if pairs:
        columns |= {"rejected (loss)": [len(e.rejected) - e.start for e in pairs],
                    "alike on both sides": [common_length(e.chosen, e.rejected) for e in pairs]}
    columns["whole row in a batch"] = [e.length for e in examples]
    heads = "".join(f"{name:>8}" for name in ("min", "5 %", "median", "95 %", "max"))
    lines = [str(report), "", f"{'tokens':<24}{heads}{'sum':>14}"]
    for name, values in columns.items():
        spread = "".join(f"{value:>8,.0f}" for value in np.percentile(values, [0, 5, 50, 95, 100]))
        lines.append(f"  {name:<22}{spread}{sum(values):>14,}")
    families: dict = {}
    for row, example in enumerate(examples):
        families.setdefault(family_of(example, row), []).append(row)
    return "\n".join([*lines, "", tokens_shared(examples, families.values())])


def tokens_shared(examples: Sequence[Example], micro_batches: Iterable[list[int]]) -> str:
    """What the tree saves: tokens of all texts one by one, of rows alone, and of rows together in these
    micro-batches."""
    separate = sum(len(side) for example in examples for side in example.sides)
    alone = sum(example.length for example in examples)
    together = sum(tokens_in_tree([side for row in rows for side in examples[row].sides])
                   for rows in micro_batches)
    if together == separate:
        return f"tokens: {separate:,}, no two texts begin alike"
    saved = lambda tokens: f"{tokens:,} ({1 - tokens / separate:.1%} saved)"
    return (f"tokens: {separate:,} text by text; {saved(alone)} with the common beginning of a row's texts "
            f"once; {saved(together)} with that of a problem's rows once")


def show(args: argparse.Namespace) -> int:
    rows = list(read_rows(args.data))
    columns = rows[0][1]
    if args.row is not None and args.row > len(rows):
        raise DataError(f"{args.data}: --row {args.row}: the file has rows 1 to {len(rows)}")
    solutions = []
    if {"question", "completion"} <= columns.keys():    # with `prompt`, a completion is trained on
        print(show_solution(*rows[(args.row or 1) - 1], args.steps) + "\n")
        solutions = [(row.get("prefix"), row.get("completion")) for _, row in rows]
    else:
        print(show_training(args, rows) + "\n")
        if "initial_reason_steps" in columns:
            solutions = [(row["initial_reason_steps"], row.get("full_chosen") or row.get("chosen"))
                         for _, row in rows]
    tell_styles(Counter(step_style(f"{begun or ''}{rest}", args.steps) for begun, rest in solutions))
    return 0


def show_training(args: argparse.Namespace, rows: list[tuple[str, dict]]) -> str:
    """A row as `method` trains it, and the statistics of the file."""
    if not args.model:
        raise DataError("--model is needed to show the tokens of training rows: a checkpoint, whose "
                        "tokenizer is read")
    columns, folder = rows[0][1], resolve(args.model)
    suggested = "stepdpo" if "initial_reason_steps" in columns else "dpo" if "rejected" in columns else "sft"
    method = args.method or suggested
    tokenizer = Tokenizer.from_pretrained(folder, system=args.system, template_args=args.template_args,
                                          base=args.base)
    limit = _settings(home_of(folder, args.base) / "config.json").get("max_position_embeddings")
    longest = min(args.max_length, limit) if type(limit) is int else args.max_length
    examples, report = encode_dataset(args.data, tokenizer, method, args.prompt, longest)
    kept = {example.where: example for example in examples}
    where, row = rows[args.row - 1] if args.row else next(one for one in rows if one[0] in kept)
    dropped = [f"dropped: {reason}" for reason, places in report.dropped.items() if where in places]
    shown = show_row(where, row, kept.get(where), tokenizer, method, args.prompt)
    return "\n".join([shown, *dropped, "", statistics(examples, report)])


# ------------------------------------------------------------------------------------------------------------
# Command line
# ------------------------------------------------------------------------------------------------------------

def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number from 1 on")
    return int(text)


def _object(text: str) -> dict:
    try:
        value = strict_json(text.encode())
    except ValueError:
        value = None
    if not isinstance(value, dict):
        example = '{"enable_thinking": false}'
        raise argparse.ArgumentTypeError(f"{text!r}: expected a JSON object, such as '{example}'")
    return value


def add_chat_options(command: argparse.ArgumentParser) -> None:
    """--base, --system and --template_args, which `Tokenizer.from_pretrained` takes."""
    command.add_argument("--base", metavar="FOLDER",
                         help="where --model is a LoRA adapter: its base model, if that is not where "
                              "adapter_config.json says")
    command.add_argument("--system", metavar="TEXT",
                         help="system prompt of every chat that brings none (with --prompt chat)")
    command.add_argument("--template_args", type=_object, metavar="JSON",
                         help="further arguments of the chat template, as '{\"enable_thinking\": false}'")


USAGE = """Look at preference data, and make it from graded attempts.

  see what is trained   python data.py show --data pairs.jsonl --model M
  locate the errors     python data.py localize valued.jsonl --judge values --out errors.jsonl
  pair                  python data.py pairs rectified.jsonl --out pairs.jsonl

eval.py makes the attempts, their step values and the rectified continuations (see its --help). Each
command has its own --help: python data.py pairs --help. Exit status: 0; 1 if rows had to be skipped (each is
named) or it is not finished; 2 if the command cannot be carried out."""


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="data.py", description=USAGE,
                                     formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="{show,localize,pairs}")

    command = commands.add_parser(
        "show", help="print a row and what becomes of it: texts, tokens with the loss mask, statistics",
        description="Print a row of a training file and what becomes of it: its texts, its tokens with the "
                    "loss mask, and statistics of the file. Of a file of attempts: a solution cut into its "
                    "steps.")
    command.add_argument("--data", required=True, metavar="F",
                         help=".jsonl, .json or .parquet file, or a hub dataset: owner/name, or, with the "
                              "beginning of a path in it, owner/name:config/split")
    command.add_argument("--model", metavar="M", help="checkpoint folder (or hub id) whose tokenizer is used")
    command.add_argument("--prompt", choices=PROMPT_STYLES, default="chat",
                         help="prompt style; chat is the checkpoint's own template (default: %(default)s)")
    command.add_argument("--method", choices=METHODS,
                         help="what would train on it (default: what the columns suggest)")
    command.add_argument("--row", type=positive, metavar="I",
                         help="1 = the first row (default: the first kept one)")
    command.add_argument("--max_length", type=positive, default=1024, metavar="N",
                         help="longer rows are dropped, in tokens (default: %(default)s)")
    add_chat_options(command)
    command.set_defaults(run=show)

    command = commands.add_parser(
        "localize", help="attempts -> errors: find the first wrong step of every wrong attempt",
        description="Find the first wrong step of every wrong attempt. Writes one row for each: the prefix "
                    "up to that step's label, the step, and the wrong rest; eval.py continues from "
                    "such prefixes.")
    command.add_argument("file", metavar="F",
                         help="attempts that eval.py wrote (for --judge values: with --rollouts)")
    command.add_argument("--judge", required=True, metavar="J",
                         help="values (rollouts of eval.py --rollouts), endpoint (a judge model on a "
                              "server), ask (you, in the terminal), or MODULE:FUNCTION: a function of your "
                              "own that gets (question, steps, answer) and returns the first wrong step's "
                              "index (from 0) or None")
    command.set_defaults(run=localize)

    command = commands.add_parser(
        "pairs", help="rectified attempts -> pairs to train on, in the columns of Math-Step-DPO-10K",
        description="Make preference pairs: the distinct first steps of those continuations whose final "
                    "answer is right, each against the wrong step that it replaces.")
    command.add_argument("file", metavar="F",
                         help="graded continuations of errors, by eval.py (--whole: any attempts)")
    command.add_argument("--per_error", type=positive, metavar="N",
                         help="at most N pairs from one error (with --whole: one problem); default: all")
    command.add_argument("--whole", action="store_true",
                         help="pair independently sampled right and wrong whole answers instead: plain DPO's "
                              "data")
    command.add_argument("--verify", metavar="J",
                         help="keep only steps in which this judge finds no error: endpoint, ask, "
                              "MODULE:FUNCTION")
    command.add_argument("--dataset", metavar="NAME",
                         help="for the column dataset (default: what the rows carry)")
    command.set_defaults(run=pairs)

    for name in ("localize", "pairs"):
        command = commands.choices[name]
        command.add_argument("--out", required=True, metavar="F", help="JSONL file to write")
        command.add_argument("--restart", action="store_true",
                             help="begin anew, whatever an earlier run has left at F")
        command.add_argument("--endpoint", metavar="URL",
                             help="the judge's OpenAI-compatible server, such as http://localhost:8000/v1; "
                                  "the key is read from OPENAI_API_KEY")
        command.add_argument("--api_model", metavar="NAME", help="name of the judge model on that server")
        command.add_argument("--concurrency", type=positive, default=8, metavar="N",
                             help="requests at a time (default: %(default)s)")
    for command in commands.choices.values():
        command.add_argument("--steps", choices=STEP_STYLES, default="auto",
                             help='how steps are told apart: step ("Step 1:", the paper), heading '
                                  '("**Step 1:**", "Schritt 1.", "第一步："), number ("1.", "(1)"), paragraph '
                                  '(blank lines), line; auto, the default: the first of these that finds two')
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def run_command(run: Callable[[], int], debug: bool = False) -> int:
    """The exit status of `run`, a command of this project: its own; 2 behind one line that says what is wrong
    and what to do; 130 where it was interrupted, 143 where it was terminated. debug: the traceback instead.

    Under torchrun one process of a machine speaks. SIGTERM ends a command as Ctrl-C does, but processes under
    torchrun die of it at once: a handler would not run while they wait for one that is not there.
    """
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")        # a terminal that has no "·" shows "?"
    speaks = os.environ.get("LOCAL_RANK", "0") == "0"
    terminated = False

    def terminate(*_):
        nonlocal terminated
        terminated = True
        raise KeyboardInterrupt

    # only the main thread may set handlers
    alone = os.environ.get("WORLD_SIZE", "1") == "1" and threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, terminate) if alone else None
    try:
        status = run()
        sys.stdout.flush()
        return status
    except BrokenPipeError:                             # "... | head" has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        how, status = ("terminated", 143) if terminated else ("interrupted", 130)
        if speaks:
            print(f"{how}; the same command continues", file=sys.stderr)
        return status
    except Exception as error:
        lost = isinstance(error, RuntimeError) and dist.is_initialized() and "onnection" in str(error)
        expected = (DataError, CheckpointError, FloatingPointError, OSError, torch.OutOfMemoryError)
        if debug or not (lost or isinstance(error, expected)):
            raise
        message = str(error)
        if isinstance(error, torch.OutOfMemoryError):
            message = (f"out of GPU memory ({message.splitlines()[0]}); what is finished is kept: go on with "
                       "a lower --batch_size (eval.py), with a lower --micro_batch_tokens or --max_length, "
                       "or with --gradient_checkpointing (stepdpo.py)")
        elif lost:
            message = ("another process of this run has ended; if it failed, it says why. The same command "
                       "continues")
        if speaks or isinstance(error, OSError):        # a disk may be full for one process only
            print(f"error: {message}", file=sys.stderr)
        else:
            time.sleep(2)
        return 2
    finally:
        if alone:
            signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done; 1 rows were skipped (named on stderr), or not finished; 2 an error, nothing
    written; 130 interrupted, 143 terminated."""
    args = arguments().parse_args(argv)

    def run() -> int:
        if args.command == "show":
            return args.run(args)
        check_out(args.out, args.file)
        with locked(args.out):
            try:
                return args.run(args)
            except Stop:
                print(f"stopped; {args.out}.verdicts holds what was decided, and the same command goes on",
                      file=sys.stderr)
                return 1
    return run_command(run, args.debug)


if __name__ == "__main__":
    sys.exit(main())
