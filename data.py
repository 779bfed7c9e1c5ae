"""Preference data: from rows of text to the flat, prefix-shared batches that the loss sees; and the pipeline's file-to-file steps.

One row, as Math-Step-DPO-10K has it, and what becomes of it (`python data.py show --data F --model M` prints a real one):

    prompt                   "What is 7 * 8 + 5?"                       x             \\  context: read by the model,
    initial_reason_steps     "Let's think step by step.\\nStep 1:"      s_1..s_{k-1}  /   no loss
    chosen                   " 7 * 8 = 56."                             s_win         \\  response: loss on every token
    rejected                 " 7 * 8 = 54."                             s_lose        /
    full_chosen, full_rejected: the step and everything after it;  answer, dataset: not used in training

Which text is the response depends on the method, and so does its end:

    sft       whole chosen answer given the prompt                      ends with the end-of-turn token
    dpo       whole chosen / rejected answer given the prompt           ends with the end-of-turn token
    stepdpo   chosen / rejected step given prompt + earlier steps       no end token: the solution goes on, and a model that
                                                                        learned to stop after every step would never finish one

The two sides of a pair are encoded once each, as whole texts. Their common beginning goes into the batch once (see `Batch`).

Legend: B rows of a micro-batch, N tokens laid end to end in it, M predicted (response) tokens among them.
"""
import argparse
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
from pathlib import Path
from typing import Callable, Iterable, Iterator, NamedTuple, Sequence

import numpy as np
import tokenizers
import torch
from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tqdm import tqdm

from model import CheckpointError, resolve


class DataError(ValueError):
    """Something in the user's data cannot be used. The message is one line: file and line, field, what was found, what to do."""


# ---------------------------------------------------------------------------------------------------------------------------------
# Rows: files of strangers, read strictly
# ---------------------------------------------------------------------------------------------------------------------------------

def read_rows(source: str | Path, bad: list[DataError] | None = None) -> Iterator[tuple[str, dict]]:
    """Yield (where, row) for every object of a .jsonl, .json (an array, or one object a line) or .parquet file, or of a hub dataset.

    `where` ("file:line") goes in front of every later complaint about the row. UTF-8, with or without BOM; LF or CRLF; blank lines
    are skipped. A row that cannot be read raises DataError, or, where a list `bad` is given, is appended to it and the rest goes on.
    """
    path = Path(source)
    if path.is_file():
        files = [path]
    elif path.exists():
        raise DataError(f"{path}: is a folder; give one .jsonl, .json or .parquet file of it")
    elif path.suffix in _READERS or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        raise DataError(f"{path}: no such file; give a .jsonl, .json or .parquet file, or a hub dataset id (owner/name)")
    else:
        files = _hub_files(str(source))
    count = 0
    for file in files:
        if file.suffix not in _READERS:
            raise DataError(f"{file}: cannot read {file.suffix or 'a file without suffix'}; expected .jsonl, .json or .parquet")
        for where, row in _READERS[file.suffix](file):
            count += 1
            if isinstance(row, dict):
                yield where, row
                continue
            error = row if isinstance(row, DataError) else DataError(
                f"{where}: found {_kind(row)} where an object (a row with named fields) belongs; write one {{...}} a line")
            if bad is None:
                raise error
            bad.append(error)
    if not count:
        raise DataError(f"{source}: holds no rows; expected one JSON object a line")


def _read_lines(path: Path) -> Iterator[tuple[str, object]]:
    with path.open("rb") as lines:                           # bytes: only \n ends a line, not the other separators of Unicode
        for number, line in enumerate(lines, 1):
            where = f"{path}:{number}"
            if number == 1 and line[:2] in (b"\xff\xfe", b"\xfe\xff"):
                raise DataError(f"{where}: is UTF-16; save the file as UTF-8")
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
        number = 0
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
            for row in batch.to_pylist():
                number += 1
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
            of_suffix = [name for name in names if name.endswith(suffix)]
            if of_suffix:
                chosen = [name for name in of_suffix if "train" in name] or of_suffix
                return [Path(hf_hub_download(dataset, name, repo_type="dataset")) for name in chosen]
    except Exception as error:                               # offline, no such dataset, no permission: the hub raises many kinds
        raise DataError(f"{dataset}: neither a file here nor a dataset that the hub gives ({_one_line(error)})") from None
    raise DataError(f"{dataset}: the dataset has no .parquet, .jsonl or .json file (found: {', '.join(names[:8]) or 'nothing'})")


def _parse(raw: bytes, where: str) -> object:
    """One JSON value, or the DataError that says why not."""
    try:
        return json.loads(raw.decode("utf-8-sig"), object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        return DataError(f"{where}: byte {error.start} is not UTF-8 (found 0x{raw[error.start]:02x}); save the file as UTF-8")
    except RecursionError:
        return DataError(f"{where}: JSON nested too deeply; a row is a flat object of text fields")
    except ValueError as error:
        return DataError(f"{where}: malformed JSON ({_one_line(error)}; begins {_quote(raw[:60].decode('utf-8', 'replace'))}); "
                         "correct or remove it")


def _unique(pairs: list[tuple[str, object]]) -> dict:
    row = dict(pairs)
    if len(row) < len(pairs):
        key = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {key!r} stands there twice: which one is meant?")
    return row


def _refuse_constant(name: str):
    raise ValueError(f"{name} is not JSON")


def text_field(row: dict, name: str, where: str) -> str:
    """row[name], if it is text that a tokenizer and a file can carry; DataError otherwise."""
    value = row.get(name)
    if not isinstance(value, str):
        found = f"found {_kind(value)} {_quote(json.dumps(value))}" if name in row else f"not there (found: {', '.join(row) or 'nothing'})"
        raise DataError(f"{where}: field {name!r}: {found}; expected text")
    if "\0" in value:
        raise DataError(f"{where}: field {name!r}: a NUL character at position {value.index(chr(0))}; remove it")
    lone = re.search("[\ud800-\udfff]", value)
    if lone:
        raise DataError(f"{where}: field {name!r}: half a surrogate pair (\\u{ord(lone[0]):x}) at position {lone.start()}, which is no "
                        "character; the text was cut or decoded wrongly: make the row again or remove it")
    return value


def _kind(value) -> str:
    kinds = {dict: "an object", list: "a list", str: "text", bool: "true/false", int: "a number", float: "a number", type(None): "null"}
    return kinds.get(type(value), type(value).__name__)


def _quote(text: str, width: int = 60) -> str:
    return repr(text if len(text) <= width else text[:width] + "...")


def _one_line(error) -> str:
    return " ".join(str(error).split())[:300]


# ---------------------------------------------------------------------------------------------------------------------------------
# The tokenizer and the chat template
# ---------------------------------------------------------------------------------------------------------------------------------

class Encoded(NamedTuple):
    ids: list[int]
    offsets: list[tuple[int, int]]                           # (begin, end) of each token, in characters of the text


class Tokenizer:
    """A checkpoint's tokenizer: tokenizer.json run by `tokenizers`, and the few conventions that stand in the files around it.

    bos_id           put once in front of every text that does not begin with it; None where the checkpoint wants none (Qwen2)
    eos_id, eos_ids  the tokenizer's own end token (or None); every id that ends a generation according to the folder's files
    control_tokens   the strings of all special tokens: they are recognised anywhere in a text, so a row must not contain them
    chat_template    Jinja source, or None
    """

    def __init__(self, backend: tokenizers.Tokenizer, *, bos_id: int | None = None, eos_ids: tuple[int, ...] = (),
                 chat_template: str | None = None, names: dict[str, str] | None = None, source: str = "tokenizer"):
        backend.no_truncation()                              # a tokenizer.json may ask for both, and would then cut texts in silence
        backend.no_padding()
        backend.post_processor = None                        # BOS is added in `encode`; and offsets must not be trimmed of white space
        self.backend, self.bos_id, self.eos_ids, self.chat_template, self.source = backend, bos_id, eos_ids, chat_template, source
        self.names = names or {}                             # {"eos_token": "</s>", ...}, for the template
        self.eos_id = backend.token_to_id(self.names["eos_token"]) if "eos_token" in self.names else (eos_ids or (None,))[0]
        self.control_ids = {token: id for id, added in backend.get_added_tokens_decoder().items() if added.special
                            for token in [added.content] if token}
        self.control_tokens = set(self.control_ids)
        longest_first = sorted(self.control_tokens, key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self._template = None

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "Tokenizer":
        """Read tokenizer.json, tokenizer_config.json, special_tokens_map.json, chat_template.jinja, config.json, generation_config.json.

        Only the first must be there. DataError where a file is damaged, or disagrees with another.
        """
        folder = Path(folder)
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise DataError(f"{path}: not there; a checkpoint that has only tokenizer.model is converted by transformers: "
                            "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)")
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
            opening = backend.encode("").ids                 # what the post-processor puts in front (and behind)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:                       # the Rust side may panic, and its panic is no Exception
            raise DataError(f"{path}: damaged or not a tokenizer ({_one_line(error)}); fetch the file again") from None
        config, generation = _settings(folder / "config.json"), _settings(folder / "generation_config.json")
        own = _settings(folder / "special_tokens_map.json") | _settings(folder / "tokenizer_config.json")
        names = {key: token for key, value in own.items() if key.endswith("_token")
                 for token in [value.get("content") if isinstance(value, dict) else value] if isinstance(token, str)}
        declared = own.get("added_tokens_decoder")
        for id, added in (declared if isinstance(declared, dict) else {}).items():
            content = added.get("content") if isinstance(added, dict) else None
            if isinstance(content, str) and backend.token_to_id(content) != int(id):
                raise DataError(f"{folder / 'tokenizer_config.json'}: added token {content!r} has id {id}, but tokenizer.json gives it "
                                f"{backend.token_to_id(content)}; the two files are not of one checkpoint: fetch both again")

        bos = names.get("bos_token")
        bos_id = backend.token_to_id(bos) if bos is not None else config.get("bos_token_id")
        wants_bos = own.get("add_bos_token")
        if not isinstance(wants_bos, bool):
            wants_bos = bos_id is not None and opening[:1] == [bos_id]
        if wants_bos and not isinstance(bos_id, int):
            raise DataError(f"{folder / 'tokenizer_config.json'}: add_bos_token is true, but bos_token ({bos!r}) is not in tokenizer.json")
        eos_ids = []
        for value in (names.get("eos_token"), generation.get("eos_token_id"), config.get("eos_token_id")):
            value = backend.token_to_id(value) if isinstance(value, str) else value
            eos_ids += [id for id in (value if isinstance(value, list) else [value]) if isinstance(id, int)]
        return cls(backend, bos_id=bos_id if wants_bos else None, eos_ids=tuple(dict.fromkeys(eos_ids)),
                   chat_template=_chat_template(folder, own), names=names, source=str(folder))

    def __len__(self) -> int:
        return self.backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str) -> Encoded:
        """Token ids and character offsets of a whole text; special tokens in it are recognised, BOS is there once where one is wanted."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[Encoded]:
        encoded = [Encoded(e.ids, e.offsets) for e in self.backend.encode_batch(texts, add_special_tokens=False)]
        if self.bos_id is None:
            return encoded
        return [e if e.ids[:1] == [self.bos_id] else Encoded([self.bos_id] + e.ids, [(0, 0)] + e.offsets) for e in encoded]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the tokens, special ones included."""
        return self.backend.decode(list(ids), skip_special_tokens=False)

    def continuation(self, prompt_ids: Sequence[int], new_ids: Sequence[int]) -> str:
        """Exactly the text that `new_ids` add after `prompt_ids`.

        Not decode(new_ids): a SentencePiece tokenizer drops the space before a text's first word, and one character may be spread over
        several tokens. So both are decoded with the last tokens of the prompt in front, and the prompt's part is taken off.
        """
        context = list(prompt_ids[-16:])
        before = self.decode(context).rstrip("\ufffd")       # an unfinished character at the prompt's end, completed by new_ids
        return self.decode(context + list(new_ids))[len(before):]

    def control_token_in(self, text: str) -> str | None:
        """The first control token's string in `text`, if any."""
        found = self._control.search(text)
        return found and found[0]

    def render_chat(self, messages: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The checkpoint's chat template, run on messages [{"role": ..., "content": ...}] as transformers runs it."""
        if self.chat_template is None:
            raise DataError(f"{self.source}: the checkpoint has no chat template; choose --prompt alpaca or --prompt raw")
        try:
            if self._template is None:
                self._template = _Sandbox().from_string(self.chat_template)
            room = 1_000_000 + 4 * sum(len(message["content"]) for message in messages)
            pieces = []
            for piece in self._template.generate(messages=messages, add_generation_prompt=add_generation_prompt, tools=None, documents=None,
                                                 range=_bounded_range(100_000), **self.names):
                pieces.append(piece)
                room -= len(piece)
                if room < 0:
                    raise SecurityError("it writes more than a million characters")
            return "".join(pieces)
        except (TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError, RecursionError, MemoryError) as error:
            raise DataError(f"{self.source}: the chat template fails ({type(error).__name__}: {_one_line(error)}); "
                            "choose --prompt alpaca or --prompt raw") from None

    def end_of_turn_id(self, style: str) -> int:
        """The token that ends a whole answer: <|im_end|> in ChatML, for `chat` what the template puts after an answer, else EOS."""
        token = None
        if style == "qwen2-boxed":
            token = "<|im_end|>"
        elif style == "chat":
            marker = "The answer is 42."
            text = self.render_chat([{"role": "user", "content": "?"}, {"role": "assistant", "content": marker}], add_generation_prompt=False)
            after = self._control.match(text.rpartition(marker)[2].lstrip())
            token = after and after[0]
        id = self.control_ids.get(token, self.eos_id)
        if id is None:
            raise DataError(f"{self.source}: no end-of-text token in tokenizer_config.json or config.json; whole answers need one: "
                            "set eos_token there")
        return id

    def stop_ids(self, style: str) -> tuple[int, ...]:
        """Every id that ends a generated answer."""
        return tuple(dict.fromkeys((self.end_of_turn_id(style),) + self.eos_ids))


def _settings(path: Path) -> dict:
    """A small JSON file beside the tokenizer; {} where there is none."""
    if not path.is_file():
        return {}
    settings = _parse(path.read_bytes(), str(path))
    if isinstance(settings, DataError):
        raise settings
    if not isinstance(settings, dict):
        raise DataError(f"{path}: found {_kind(settings)} where an object belongs; fetch the file again")
    return settings


def _chat_template(folder: Path, own: dict) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{file}: is not UTF-8 ({_one_line(error)})") from None
    template = own.get("chat_template")
    if isinstance(template, list):                           # several named ones
        template = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}.get("default")
    return template if isinstance(template, str) else None


class _GenerationTag(Extension):
    """{% generation %} ... {% endgeneration %}, with which some templates mark the assistant's words: its body, as it stands."""
    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class _Sandbox(ImmutableSandboxedEnvironment):
    """Where chat templates run, with the settings and helpers of transformers, without which real templates render differently.

    A template comes with a stranger's checkpoint. The sandbox keeps it from Python's internals; bounds on `range` and on repetition keep
    it from filling the memory.
    """
    intercepted_binops = frozenset({"*", "**"})

    def __init__(self):
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _GenerationTag])
        self.filters["tojson"] = lambda value, **options: json.dumps(value, **{"ensure_ascii": False} | options)
        self.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
        self.globals["raise_exception"] = self._raise

    @staticmethod
    def _raise(message):
        raise TemplateError(message)

    def call_binop(self, context, operator, left, right):
        if operator == "**" or any(abs(x) > 10**6 if isinstance(x, (int, float)) else len(x) > 10**4 for x in (left, right)):
            raise SecurityError(f"{operator} on values of this size is not allowed in a template")
        return super().call_binop(context, operator, left, right)


def _bounded_range(budget: int):
    def bounded(*limits):
        nonlocal budget
        numbers = range(*limits)
        budget -= len(numbers)
        if budget < 0:
            raise SecurityError("its loops over range() take too many turns")
        return numbers
    return bounded


# ---------------------------------------------------------------------------------------------------------------------------------
# Prompts
# ---------------------------------------------------------------------------------------------------------------------------------

BOXED = "\nPlease reason step by step, and put your final answer within \\boxed{}."
PROMPT_STYLES = ("qwen2-boxed", "alpaca", "deepseek-math", "chat", "raw")


def render_prompt(style: str, question: str, tokenizer: Tokenizer) -> str:
    """The text up to the first character of the reasoning. The first three are the paper's, for the models it trained."""
    if style == "qwen2-boxed":
        return ("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
                f"<|im_start|>user\n{question}{BOXED}<|im_end|>\n<|im_start|>assistant\n")
    if style == "alpaca":
        return ("Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
                f"### Instruction:\n{question}\n\n### Response:\n")
    if style == "deepseek-math":
        return f"User: {question}{BOXED}\n\nAssistant: "
    if style == "chat":
        return tokenizer.render_chat([{"role": "user", "content": question}])
    if style == "raw":
        return question
    raise DataError(f"prompt style {style!r} is not known; choose one of {', '.join(PROMPT_STYLES)}")


# ---------------------------------------------------------------------------------------------------------------------------------
# Rows to tokens
# ---------------------------------------------------------------------------------------------------------------------------------

METHODS = ("sft", "dpo", "stepdpo")


@dataclass(slots=True)
class Example:
    """One row as tokens. `chosen` and `rejected` are whole sequences from BOS on; they agree up to `start`, and beyond it up to `shared`."""
    where: str                                               # "file:line"
    chosen: np.ndarray                                       # int32 ids: context + response
    rejected: np.ndarray | None                              # the same for the other side; None for sft
    start: int                                               # index of the first response token, on both sides
    shared: int                                              # tokens that the batch holds once; >= start, < the length of either side

    @property
    def sides(self) -> list[np.ndarray]:
        return [self.chosen] if self.rejected is None else [self.chosen, self.rejected]

    @property
    def length(self) -> int:
        """Tokens that the row takes in a batch."""
        return self.shared + sum(len(side) - self.shared for side in self.sides)


@dataclass
class Report:
    """What became of a file's rows. str(report) is a few lines to print."""
    source: str
    rows: int = 0
    kept: int = 0
    dropped: dict[str, list[str]] = field(default_factory=dict)      # reason -> "file:line" of every row dropped for it

    def drop(self, reason: str, where: str) -> None:
        self.dropped.setdefault(reason, []).append(where)

    def __str__(self) -> str:
        lines = [f"{self.source}: {self.rows:,} rows, {self.kept:,} kept, {self.rows - self.kept:,} dropped"]
        for reason, rows in sorted(self.dropped.items(), key=lambda item: -len(item[1])):
            lines.append(f"  {len(rows):>7,}  {reason}  (first: {Path(rows[0]).name})")
        return "\n".join(lines)


def texts_of(row: dict, method: str, where: str) -> tuple[str, str, list[str]]:
    """(question, reasoning that is context, the one or two responses) of a row, as `method` trains it.

    A whole answer is initial_reason_steps + full_*; where full_* already begins with those steps, it is the whole answer itself.
    Rows without initial_reason_steps and full_* (ordinary preference data) hold whole answers in chosen and rejected.
    """
    if method == "sft" and "response" in row:
        return text_field(row, "prompt", where), "", [text_field(row, "response", where)]
    sides = ("chosen",) if method == "sft" else ("chosen", "rejected")
    plain = method != "stepdpo" and not any(name in row for name in ("initial_reason_steps", "full_chosen", "full_rejected"))
    whole = method != "stepdpo" and not plain
    needed = ["prompt"] + ["initial_reason_steps"] * (not plain) + [f"full_{side}" if whole else side for side in sides]
    missing = [name for name in needed if name not in row]
    if missing:
        also = " (or prompt, response)" if method == "sft" else ""
        raise DataError(f"{where}: {method} needs the columns {', '.join(needed)}{also}; found {', '.join(row) or 'none'}; "
                        f"missing {', '.join(missing)}: rename them, or choose another method")
    question = text_field(row, "prompt", where)
    steps = "" if plain else text_field(row, "initial_reason_steps", where)
    responses = [text_field(row, f"full_{side}" if whole else side, where) for side in sides]
    if whole:                                                # an empty answer stays empty, and is counted as such
        return question, "", [text if text.startswith(steps) or not text.strip() else steps + text for text in responses]
    return question, steps, responses


def encode_dataset(source: str | Path | Iterable[tuple[str, dict]], tokenizer: Tokenizer, method: str, style: str,
                   max_length: int | None = None) -> tuple[list[Example], Report]:
    """Read, render and tokenise a file of rows. Returns the rows that can be trained on, in file order, and a Report on the others.

    source: what `read_rows` takes, or (where, row) pairs. max_length: tokens of a side as the model sees it, BOS and end token included;
    a longer row is dropped, never cut. Raises DataError where a row is malformed, or none is left.
    """
    if method not in METHODS:
        raise DataError(f"method {method!r} is not known; choose one of {', '.join(METHODS)}")
    rows = read_rows(source) if isinstance(source, (str, Path)) else source
    report = Report(str(source) if isinstance(source, (str, Path)) else "rows")
    end = None if method == "stepdpo" else tokenizer.end_of_turn_id(style)
    examples = []
    for chunk in _chunks(rows, 512):                         # tokenizers encodes a list on all cores
        taken = []
        for where, row in chunk:
            report.rows += 1
            question, steps, responses = texts_of(row, method, where)
            context = render_prompt(style, question, tokenizer) + steps
            reason = _unfit(question, steps, responses, tokenizer)
            if reason:
                report.drop(reason, where)
            else:
                taken.append((where, len(context), [context + response for response in responses]))
        encoded = iter(tokenizer.encode_batch([text for _, _, texts in taken for text in texts]))
        for where, boundary, texts in taken:
            sides = [next(encoded) for _ in texts]
            example = _example(where, sides, boundary, end, max_length)
            if isinstance(example, str):
                report.drop(example, where)
            else:
                examples.append(example)
    report.kept = len(examples)
    if not examples:
        reasons = "; ".join(f"{len(where)} {reason}" for reason, where in report.dropped.items())
        raise DataError(f"{report.source}: no row is left to train on ({reasons})")
    return examples, report


def _chunks(items: Iterable, size: int) -> Iterator[list]:
    chunk = []
    for item in items:
        chunk.append(item)
        if len(chunk) == size:
            yield chunk
            chunk = []
    yield chunk


def _unfit(question: str, steps: str, responses: list[str], tokenizer: Tokenizer) -> str | None:
    """Why the texts of a row cannot be trained on, or None."""
    names = ("chosen", "rejected") if len(responses) == 2 else ("response",)
    if not question.strip():
        return "empty prompt"
    for name, text in zip(names, responses):
        if not text.strip():
            return f"empty {name}"
    if len(responses) == 2 and responses[0].strip() == responses[1].strip():
        return "chosen and rejected are the same"
    for text in [question] + [steps + response for response in responses]:       # joined: a token may be spelled across the seam
        token = tokenizer.control_token_in(text)
        if token:
            return f"the text contains the control token {token}"
    return None


def _example(where: str, sides: list[Encoded], boundary: int, end: int | None, max_length: int | None) -> Example | str:
    """Tokens of one row, or the reason to drop it. `boundary`: the character at which the response begins, in every side's text."""
    start = min(response_start(side.offsets, boundary) for side in sides)
    ids = [np.array(side.ids + ([] if end is None else [end]), dtype=np.int32) for side in sides]
    if max_length is not None and max(map(len, ids)) > max_length:
        return f"longer than {max_length} tokens"
    if start == 0:
        return "no token of context before the response"
    if min(map(len, ids)) <= start:
        return "a response without a token of its own"
    if len(ids) == 1:
        return Example(where, ids[0], None, start, len(ids[0]))
    chosen, rejected = ids
    if not np.array_equal(chosen[:start], rejected[:start]):
        return "the context is not tokenised alike on both sides"
    if np.array_equal(chosen, rejected):
        return "chosen and rejected are the same"
    shorter = min(map(len, ids))
    differ = np.flatnonzero(chosen[:shorter] != rejected[:shorter])
    common = int(differ[0]) if len(differ) else shorter - 1  # one side is the beginning of the other: it keeps its last token
    return Example(where, chosen, rejected, start, common)


def response_start(offsets: Sequence[tuple[int, int]], boundary: int) -> int:
    """Index of the first token that holds a character of the response, i.e. one at `boundary` or after it.

    A token across the boundary (" We" where the context ends in a space) belongs to the response: the model produces it as one piece.
    """
    start = next((i for i, (_, after) in enumerate(offsets) if after > boundary), len(offsets))
    # A normaliser may melt the response's first character into the token before (NFC: "e" + combining accent), whose offsets then end
    # at the boundary although the character is in it; no other token begins with it.
    if 0 < start < len(offsets) and offsets[start][0] > boundary:
        start -= 1
    return start


# ---------------------------------------------------------------------------------------------------------------------------------
# Batches
# ---------------------------------------------------------------------------------------------------------------------------------

@dataclass
class Batch:
    """A micro-batch of B rows, end to end in one line of N tokens: nothing is padded, and what two sides share is there once.

        row 0                                       row 1
        [ x s_1..s_{k-1} | s_win ... | s_lose ... ] [ x s_1.. | s_win ... | s_lose ... ]       segments
          parent -1        parent 0    parent 0       parent -1 parent 3    parent 3

    A segment sees its parent whole, and itself causally; s_win and s_lose never see each other. Positions go on from the parent's end, so
    both branches begin at the same position. The last token of the shared part predicts the first token of BOTH branches. A response
    token inside the shared part (whole answers that begin alike) is predicted once for each side, from the one copy.
    """
    input_ids: torch.Tensor                                  # (N,) int64
    position_ids: torch.Tensor                               # (N,) int64
    lengths: list[int]                                       # tokens of each segment, in order; they add up to N
    parents: list[int]                                       # the segment that each one continues; -1 = none
    predict_at: torch.Tensor                                 # (M,) int64: where in the line the hidden state is that predicts targets[m]
    targets: torch.Tensor                                    # (M,) int64: response tokens
    response: torch.Tensor                                   # (M,) int64: whose: chosen of row i -> i, rejected of row i -> B + i
    rows: torch.Tensor                                       # (B,) int64: indices into the dataset

    def to(self, device) -> "Batch":
        moved = {name: value.to(device, non_blocking=True) for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        return Batch(**vars(self) | moved)


def collate(examples: Sequence[Example], rows: Sequence[int]) -> Batch:
    """Lay examples[rows[0]], examples[rows[1]], ... end to end. `examples` is the whole dataset, `rows` what a micro-batch takes of it."""
    ids, positions, lengths, parents, predict_at, targets, response = [], [], [], [], [], [], []
    offset = 0                                               # where in the line the next segment begins
    for i, row in enumerate(rows):
        example = examples[row]
        trunk, trunk_at = len(lengths), offset
        ids.append(example.chosen[:example.shared])
        positions.append(np.arange(example.shared))
        lengths.append(example.shared)
        parents.append(-1)
        offset += example.shared
        for side, tokens in enumerate(example.sides):
            predictor = np.arange(example.start - 1, len(tokens) - 1)        # token t is predicted at t - 1, counted within the side
            predict_at.append(np.where(predictor < example.shared, trunk_at + predictor, offset + predictor - example.shared))
            targets.append(tokens[example.start:])
            response.append(np.full(len(predictor), side * len(rows) + i))
            own = len(tokens) - example.shared
            if own:                                          # sft: everything is trunk
                ids.append(tokens[example.shared:])
                positions.append(np.arange(example.shared, len(tokens)))
                lengths.append(own)
                parents.append(trunk)
                offset += own
    flat = lambda parts: torch.from_numpy(np.concatenate(parts).astype(np.int64))
    return Batch(flat(ids), flat(positions), lengths, parents, flat(predict_at), flat(targets), flat(response),
                 torch.tensor(list(rows), dtype=torch.int64))


def epoch_plan(lengths: Sequence[int], *, batch_size: int, micro_batch_size: int | None = None, micro_batch_tokens: int | None = None,
               world_size: int = 1, seed: int = 0, epoch: int = 0) -> list[list[list[list[int]]]]:
    """plan[step][rank] = that rank's micro-batches, each a list of row indices. Every row once; a pure function of its arguments.

    Which rows make a step depends on (seed, epoch, batch_size) alone, not on how the work is spread, so runs on 1 and on 8 processes take
    the same steps. Within a step the rows are sorted by length and dealt, longest first, to the rank that has the fewest tokens so far;
    each rank packs its rows in that order into micro-batches of at most `micro_batch_size` rows and `micro_batch_tokens` tokens (a longer
    row travels alone). The last step of an epoch may be short, and a rank may then have nothing to do in it.
    """
    # raw bits of PCG64, sorted: unlike permutation(), the stream is promised to stay the same in every version of numpy
    order = np.argsort(np.random.PCG64([seed, epoch]).random_raw(len(lengths)), kind="stable")
    plan = []
    for begin in range(0, len(order), batch_size):
        step = sorted(order[begin:begin + batch_size].tolist(), key=lambda row: -lengths[row])
        ranks, loads = [[] for _ in range(world_size)], [0] * world_size
        for row in step:
            rank = loads.index(min(loads))
            ranks[rank].append(row)
            loads[rank] += lengths[row]
        plan.append([_pack(rows, lengths, micro_batch_size, micro_batch_tokens) for rows in ranks])
    return plan


def _pack(rows: list[int], lengths: Sequence[int], max_rows: int | None, max_tokens: int | None) -> list[list[int]]:
    batches, tokens = [], 0
    for row in rows:
        tokens += lengths[row]
        if not batches or len(batches[-1]) == max_rows or (max_tokens is not None and tokens > max_tokens):
            batches.append([])
            tokens = lengths[row]
        batches[-1].append(row)
    return batches


# ---------------------------------------------------------------------------------------------------------------------------------
# Steps of a solution
# ---------------------------------------------------------------------------------------------------------------------------------

# A label stands at the beginning of a line; the step's own words follow it. In order of preference for "auto".
_LABELS = {
    "step": r"(?:^|\n)Step \d+:",                                                            # the paper's
    "heading": r"(?:^|\n)[ \t>#*_]*(?:Step|STEP)[ \t]+\d+[ \t]*[:.)\-–]?(?:\*\*|__)?",       # "**Step 1:**", "### Step 1 -", "Step 1."
    "number": r"(?:^|\n)[ \t>#*_]*(\d+)[.)](?:\*\*|__)?(?=\s)",                              # "1. ...", "2) ..."
    "paragraph": r"\n[ \t]*\n\s*",                                                           # blank lines
}
STEP_STYLES = ("auto", *_LABELS)


def step_starts(text: str, style: str = "auto") -> list[tuple[int, int]]:
    """(begin, begin of its own words) of each step of a solution; between the two stands its label.

    What comes before the first label belongs to the first step. Numbers without the word "Step" count as labels only in sequence 1, 2, 3:
    a line of working may begin with "12. " as well. `auto` takes the first style that finds a label (a numbered list or paragraphs: two).
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
            continue                                         # blank lines at the ends separate nothing
        starts.append((label.start(), label.end()))
    if style == "paragraph":
        return [(0, len(text) - len(text.lstrip()) if text.strip() else 0)] + starts
    return [(0, starts[0][1])] + starts[1:] if starts else [(0, 0)]


def split_steps(text: str, style: str = "auto") -> list[str]:
    """The steps of a solution, verbatim: "".join(steps) == text."""
    begins = [begin for begin, _ in step_starts(text, style)] + [len(text)]
    return [text[a:b] for a, b in zip(begins, begins[1:])]


# ---------------------------------------------------------------------------------------------------------------------------------
# The first wrong step, from rollouts
# ---------------------------------------------------------------------------------------------------------------------------------

Values = Sequence[Sequence[int] | None]                      # per step: [successes, tries] of rollouts from the prefix that ends after it
RIGHT, WRONG = (1.0, 1.0), (0.5, 10.0)                       # Beta priors of the rate of success before the first error, and from it on


def error_posterior(values: Values) -> list[float]:
    """P(step k is the first wrong one | rollouts) for every step k of a solution whose final answer is wrong; uniform before any rollout.

    Before the first error every prefix leads to the right answer at some rate p, from it on at a much lower rate q. Both are unknown and
    are integrated out (p ~ Beta(1, 1), q ~ Beta(0.5, 10)), so the likelihood of k is a product of two Beta functions of the pooled counts.
    The plain rule, "the first step after which none succeeds", is misled by a lucky success after the error and by a run of failures
    before it on a hard problem; here a later success speaks against an early error, and what counts as few is relative to this problem.
    """
    def evidence(counts, a, b):                              # log of the integral of p^s (1-p)^f over Beta(a, b)
        s, f = sum(c[0] for c in counts), sum(c[1] - c[0] for c in counts)
        return sum(map(math.lgamma, (a + s, b + f, a + b))) - sum(map(math.lgamma, (a, b, a + b + s + f)))
    known = [value or (0, 0) for value in values]
    # the last prefix is the whole solution: its rollouts fail whatever k is, and tell nothing
    scores = [evidence(known[:k], *RIGHT) + evidence(known[k:-1], *WRONG) for k in range(len(known))]
    weights = [math.exp(score - max(scores)) for score in scores]
    return [weight / sum(weights) for weight in weights]


def first_error_from_values(values: Values) -> int | None:
    """Index of the step that is most probably the first wrong one; None without a single rollout (of a solution of several steps)."""
    if len(values) > 1 and not any(value and value[1] for value in values[:-1]):
        return None
    posterior = error_posterior(values)
    return posterior.index(max(posterior)) if posterior else None


# ---------------------------------------------------------------------------------------------------------------------------------
# An OpenAI-compatible server
# ---------------------------------------------------------------------------------------------------------------------------------

class EndpointError(DataError):
    """The server cannot be used: it is not there, or refuses every request. What is finished is kept."""


class RequestRefused(DataError):
    """The server refuses this one request (too long, say); others may go through."""


class Reply(NamedTuple):
    text: str
    finish_reason: str                                       # "stop", "length", ...


class Endpoint:
    """A server that speaks OpenAI's protocol (vLLM, llama.cpp, transformers serve, ...). Safe to use from several threads.

    url: "http://host:8000" or ".../v1"; model: the name that the server knows it by; key: by default OPENAI_API_KEY of the environment.
    """
    BUSY = (408, 409, 425, 429)                              # and every 5xx: the same request may succeed a little later

    def __init__(self, url: str, model: str, key: str | None = None, timeout: float = 600, attempts: int = 8, pause: float = 1.0):
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise DataError(f"--endpoint {url}: expected an address such as http://localhost:8000/v1")
        self.url = url.rstrip("/") + ("/v1" if parts.path in ("", "/") else "")
        self.model, self.key = model, key or os.environ.get("OPENAI_API_KEY")
        self.timeout, self.attempts, self.pause = timeout, attempts, pause
        self.opener = urllib.request.build_opener(_NoRedirect)

    def chat(self, messages: list[dict[str, str]], **settings) -> list[Reply]:
        """POST chat/completions with max_tokens, temperature, top_p, n, stop, ... as given; one Reply for each choice."""
        answer = self.post("chat/completions", {"messages": messages} | settings)
        try:
            return [Reply(choice["message"].get("content") or "", choice.get("finish_reason") or "stop") for choice in answer["choices"]]
        except (AttributeError, KeyError, TypeError):
            raise RequestRefused(f"{self.url}: an answer that is no chat completion: {_quote(json.dumps(answer), 200)}") from None

    def post(self, path: str, body: dict) -> dict:
        """POST {url}/{path} with {"model": ...} | body; the reply's JSON object.

        A busy server (429, 5xx), a broken or silent connection and a reply cut short are tried again, `attempts` times in all, after
        pauses of 1, 2, 4, ... seconds with jitter, or what Retry-After asks for, at most a minute. Raises RequestRefused where the server
        refuses just this request, EndpointError where none can succeed (wrong key, wrong address, gone).
        """
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        request = urllib.request.Request(f"{self.url}/{path}", json.dumps({"model": self.model} | body).encode(), headers)
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
                    raise RequestRefused(f"{self.url}/{path}: {trouble}: {said}") from None
                if error.code not in self.BUSY and error.code < 500:
                    raise EndpointError(f"{self.url}/{path}: {trouble}: {said}; check --endpoint, --api_model and the key in OPENAI_API_KEY") from None
                asked = error.headers.get("Retry-After", "")
                wait = float(asked) if asked.isdecimal() else wait
            except (OSError, http.client.HTTPException, ValueError, RecursionError) as error:    # refused, reset, timed out, cut short
                trouble = f"{type(error).__name__}: {_one_line(error)}"
            if attempt + 1 < self.attempts:
                time.sleep(min(wait, 60))
        raise EndpointError(f"{self.url}/{path}: no answer after {self.attempts} attempts (last: {trouble}); is the server up? What is finished "
                            "is kept: the same command continues")


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_):                          # it would resend the key to wherever the answer points
        return None


# ---------------------------------------------------------------------------------------------------------------------------------
# Judges: which step is the first wrong one?
# ---------------------------------------------------------------------------------------------------------------------------------

class Unclear(Exception):
    """A judge gives no verdict on a solution; the message says why, and is what is counted."""


class Stop(Exception):
    """The person at the terminal goes home."""


Judge = Callable[[dict], int | None]                         # row with question, answer, steps -> index of the first wrong step, or None


def judge_by_values(row: dict) -> int | None:
    """From the rollouts of `eval.py --rollouts`: no judge but the policy itself."""
    values = row.get("values")
    if not isinstance(values, list) or len(values) != len(row["steps"]):
        raise DataError("field 'values': expected one [successes, tries] or null for each step; make them with eval.py --rollouts")
    for value in values:
        if value is not None and not (isinstance(value, list) and len(value) == 2 and all(type(n) is int for n in value) and 0 <= value[0] <= value[1]):
            raise DataError(f"field 'values': found {_quote(json.dumps(value))}; expected [successes, tries] or null for each step")
    first = first_error_from_values(values)
    if first is None:
        raise Unclear("no rollouts")
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


def endpoint_judge(endpoint: Endpoint) -> Judge:
    """A judge model reads problem, right solution and attempt, as the paper asks GPT-4 to."""
    def judge(row: dict) -> int | None:
        steps = "\n".join(f"[Step {i}] {step.strip()}" for i, step in enumerate(row["steps"], 1))
        solution = "\n".join(str(row[name]) for name in ("solution", "answer") if row.get(name))
        fields = {"question": row["question"], "solution": solution, "count": str(len(row["steps"])), "steps": steps}
        prompt = re.sub(r"\{(\w+)\}", lambda name: fields[name[1]], JUDGE_PROMPT)            # one pass: braces inside the texts stay
        replies = endpoint.chat([{"role": "user", "content": prompt}], temperature=0.0, max_tokens=1024 + 16 * len(row["steps"]))
        return parse_verdicts(replies[0].text if replies else "", len(row["steps"]))
    return judge


def parse_verdicts(reply: str, count: int) -> int | None:
    """Index of the first step called incorrect, None if all `count` steps are called correct or neutral; Unclear for any other reply."""
    lines = re.findall(r"^\W*(?:step\W*)?(\d{1,4})\W+(correct|incorrect|neutral)\b", reply, flags=re.IGNORECASE | re.MULTILINE)
    for i, (number, verdict) in enumerate(lines):
        if int(number) != i + 1 or i >= count:
            break
        if verdict.lower() == "incorrect":
            return i
        if i + 1 == count:
            return None
    raise Unclear("the judge's reply could not be read")


def ask(row: dict) -> int | None:
    """A person at the terminal, one step at a time."""
    print("\n" + _block(f"problem {row['id']}, sample {row.get('sample', 0)}", row["question"], "context"))
    print(_block("right answer", "\n".join(str(row[name]) for name in ("solution", "answer") if row.get(name)), "chosen"))
    for i, step in enumerate(row["steps"]):
        print(_block(f"step {i + 1} of {len(row['steps'])}", step.strip("\n"), "title"))
        while True:
            try:
                key = input("[c]orrect  [n]eutral  [i]ncorrect  [s]kip this solution  [q]uit, go on later > ").strip().lower()[:1]
            except EOFError:
                raise Stop from None
            if key == "q":
                raise Stop
            if key == "s":
                raise Unclear("skipped by the person asked")
            if key == "i":
                return i
            if key in ("c", "n"):
                break
    return None


def function_judge(name: str) -> Judge:
    """MODULE:FUNCTION -> judge. The function gets (question, steps, answer), texts all, and returns the index of the first wrong step or None."""
    module, _, function = name.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        checker = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise DataError(f"--judge {name}: {_one_line(error)}; expected values, endpoint, ask, or MODULE:FUNCTION importable from here") from None
    finally:
        sys.path.pop(0)

    def judge(row: dict) -> int | None:
        try:
            first = checker(row["question"], list(row["steps"]), row["answer"])
        except Exception as error:                           # somebody's own code: the row is named, the others go on
            raise DataError(f"--judge {name} raised {type(error).__name__}: {_one_line(error)}") from error
        if first is not None and (type(first) is not int or not 0 <= first < len(row["steps"])):
            raise DataError(f"--judge {name} returned {_quote(repr(first))} for {len(row['steps'])} steps; expected the index of one (from 0), or None")
        return first
    return judge


def make_judge(name: str, args: argparse.Namespace) -> Judge:
    if name == "endpoint":
        if not (args.endpoint and args.api_model):
            raise DataError("--judge endpoint needs --endpoint URL and --api_model NAME")
        return endpoint_judge(Endpoint(args.endpoint, args.api_model))
    judges = {"values": judge_by_values, "ask": ask}
    if name not in judges and ":" not in name:
        raise DataError(f"--judge {name}: expected values, endpoint, ask, or MODULE:FUNCTION")
    return judges.get(name) or function_judge(name)


# ---------------------------------------------------------------------------------------------------------------------------------
# File to file
# ---------------------------------------------------------------------------------------------------------------------------------

def write_rows(path: str | Path, rows: Iterable[dict]) -> int:
    """Write JSONL aside and rename it: the file is there whole or not at all. Returns the number of rows."""
    path, count = Path(path), 0
    aside = path.with_name(path.name + ".tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    with aside.open("w", encoding="utf-8", newline="\n") as file:
        for count, row in enumerate(rows, 1):
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
    return count


class Journal:
    """Verdicts as they fall, one a line, so that hours of a judge's work survive a kill: the same command goes on where it stopped.

    The first line says what the verdicts belong to (input, judge, step style); a journal of something else is refused, not mixed in.
    """

    def __init__(self, path: Path, belongs_to: dict):
        self.path, self.verdicts = path, {}
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []     # after the last \n: nothing, or a line cut short by a kill
        try:
            if lines and json.loads(lines[0]) != belongs_to:
                raise ValueError("it was begun by a command with another input, judge or --steps")
            self.verdicts = {tuple(key): verdict for key, verdict in map(json.loads, lines[1:])}
        except (ValueError, TypeError) as error:
            raise DataError(f"{path}: cannot be continued ({_one_line(error)}); finish that command, or delete the file to begin anew") from None
        write_rows(path, [belongs_to, *([key, verdict] for key, verdict in self.verdicts.items())])
        self.file = path.open("a", encoding="utf-8", newline="\n")

    def add(self, key: tuple, verdict) -> None:
        self.verdicts[key] = verdict
        self.file.write(json.dumps([key, verdict]) + "\n")
        self.file.flush()

    def close(self, finished: bool) -> None:
        self.file.close()
        if finished:
            self.path.unlink()


def judge_all(rows: dict[tuple, dict], judge: Judge, name: str, args: argparse.Namespace, bad: list[DataError]) -> dict[tuple, int | str | None]:
    """A verdict for every row: index of the first wrong step, None (nothing wrong), or the text of Unclear. Rows that fail are left out, in `bad`."""
    digest = hashlib.sha256(Path(args.file).read_bytes()).hexdigest()
    journal = Journal(Path(f"{args.out}.journal"), {"input": digest, "judge": name, "steps": args.steps})
    todo = [key for key in rows if key not in journal.verdicts]
    workers = args.concurrency if name == "endpoint" else 1
    finished = False

    def verdict(key):
        try:
            return judge(rows[key])
        except Unclear as reason:
            return str(reason)
    try:
        if workers == 1:
            results = ((key, lambda key=key: verdict(key)) for key in todo)
            pool = None
        else:
            pool = ThreadPoolExecutor(workers)
            futures = {pool.submit(verdict, key): key for key in todo}
            results = ((futures[future], future.result) for future in as_completed(futures))
        for key, result in tqdm(results, total=len(todo), desc=f"judge: {name}", disable=None if name != "ask" else True, file=sys.stderr):
            try:
                journal.add(key, result())
            except EndpointError:
                raise
            except DataError as error:
                bad.append(DataError(f"{rows[key]['where']}: {error}"))
        finished = len(journal.verdicts) >= len(rows)
    finally:
        if workers > 1 and pool:
            pool.shutdown(wait=True, cancel_futures=True)
        journal.close(finished)
    return {key: journal.verdicts[key] for key in rows if key in journal.verdicts}


def _key(row: dict, where: str) -> tuple:
    """(id, sample) of an attempt."""
    id, sample = row.get("id"), row.get("sample", 0)
    if not isinstance(id, (str, int)) or type(sample) is not int:
        raise DataError(f"{where}: fields 'id', 'sample': found {_quote(json.dumps([id, sample]))}; expected a name and a number, as eval.py writes them")
    return str(id), sample


def read_attempts(file: str, bad: list[DataError]) -> Iterator[tuple[tuple, dict]]:
    """((id, sample), row) of the graded samples that eval.py wrote. Rows that are none go to `bad`. A row gets `where` and `text`, the
    whole solution: prefix + completion."""
    seen = {}
    for where, row in read_rows(file, bad):
        try:
            key = _key(row, where)
            for name in ("question", "answer", "completion"):
                text_field(row, name, where)
            if not row["answer"].strip():
                raise DataError(f"{where}: field 'answer': empty; a problem needs its right answer")
            if not isinstance(row.get("correct"), bool):
                raise DataError(f"{where}: field 'correct': found {_kind(row.get('correct'))}; expected true or false, as eval.py grades it")
            if key in seen:
                raise DataError(f"{where}: id {key[0]!r}, sample {key[1]} stands in {seen[key]} already; remove one of the two")
            seen[key] = where
            prefix = text_field(row, "prefix", where) if "prefix" in row else ""
            yield key, row | {"where": where, "text": prefix + row["completion"]}
        except DataError as error:
            bad.append(error)


def funnel(stages: list[tuple[str, int]]) -> str:
    """How much is left after each stage; names that begin with a space are what fell out in between."""
    return "\n".join(f"  {count:>9,}  {name}" for name, count in stages if count or not name.startswith(" "))


def complain(bad: list[DataError], shown: int = 20) -> None:
    for error in bad[:shown]:
        print(f"skipped: {error}", file=sys.stderr)
    if len(bad) > shown:
        print(f"skipped: {len(bad) - shown} more rows", file=sys.stderr)


OF_AN_ATTEMPT = ("id", "sample", "prefix", "completion", "extracted", "correct", "tokens", "stop_reason", "steps", "values", "where", "text")


def localize(args: argparse.Namespace) -> int:
    """attempts (or valued) -> errors: for each wrong attempt the prefix up to the label of its first wrong step, that step, and all after it."""
    judge, bad, wrong, stages = make_judge(args.judge, args), [], {}, Counter()
    problems = set()
    for key, row in read_attempts(args.file, bad):
        stages["attempts"] += 1
        problems.add(key[0])
        if row["correct"]:
            continue
        stages["wrong"] += 1
        if row.get("stop_reason") == "length":
            stages["cut off"] += 1
            continue
        steps = split_steps(row["text"], args.steps)
        if "steps" in row and row["steps"] != steps:
            bad.append(DataError(f"{row['where']}: field 'steps': not the text cut by --steps {args.steps}; give the style that eval.py --rollouts was given"))
            continue
        wrong[key] = row | {"steps": steps}

    try:
        verdicts = judge_all(wrong, judge, args.judge, args, bad)
    except Stop:
        print(f"stopped; what was decided is in {args.out}.journal, and the same command goes on from there", file=sys.stderr)
        return 1
    errors, reasons = {}, Counter()
    for key, first in ((key, verdicts[key]) for key in wrong if key in verdicts):
        row = wrong[key]
        if not isinstance(first, int):
            reasons[first or "no wrong step was found"] += 1
            continue
        starts = step_starts(row["text"], args.steps) + [(len(row["text"]),) * 2]
        begin, end = starts[first][1], starts[first + 1][0]
        error = {"id": f"{key[0]}#{key[1]}"} | {name: value for name, value in row.items() if name not in OF_AN_ATTEMPT} | {
            "prefix": row["text"][:begin], "rejected": row["text"][begin:end], "full_rejected": row["text"][begin:], "step": first + 1}
        if not error["rejected"].strip():
            reasons["the wrong step is empty"] += 1
        elif (twin := (row["question"], error["prefix"], error["rejected"])) in errors:
            reasons["the same error again"] += 1
        else:
            errors[twin] = error
    complain(bad)
    print(funnel([("problems", len(problems)), ("attempts", stages["attempts"]), ("wrong", stages["wrong"]),
                  ("    cut off by the length limit, not judged", stages["cut off"]),
                  *((f"    {reason}", count) for reason, count in reasons.most_common()), ("located", len(errors))]))
    if not errors:
        raise DataError(f"{args.file}: no first wrong step was located, nothing to write to {args.out}")
    write_rows(args.out, errors.values())
    return 1 if bad else 0


def first_step(text: str, prefix: str, style: str) -> str:
    """The step that follows `prefix` in `text`, up to the next label."""
    ends = [begin for begin, _ in step_starts(text, style) if begin >= max(len(prefix), 1)]
    return text[len(prefix):ends[0] if ends else len(text)]


def pairs(args: argparse.Namespace) -> int:
    """rectified attempts -> pairs in the columns of Math-Step-DPO-10K."""
    bad, stages = [], Counter()
    rows = list(read_attempts(args.file, bad))
    candidates = whole_pairs(rows, stages) if args.whole else step_pairs(rows, args.steps, stages, bad)
    if args.verify:
        if args.whole:
            raise DataError("--verify judges a chosen step; whole answers (--whole) are right by their final answer")
        judged = {key: {"id": key[0], "where": key[0], "question": pair["prompt"], "answer": pair["answer"],
                        "steps": split_steps(pair["initial_reason_steps"] + pair["chosen"], args.steps)} for key, pair in candidates.items()}
        verdicts = judge_all(judged, make_judge(args.verify, args), args.verify, args, bad)
        stages["    not verified by the judge"] = sum(verdicts.get(key, "") is not None for key in candidates)
        candidates = {key: pair for key, pair in candidates.items() if verdicts.get(key, "") is None}
    kept, taken = [], Counter()
    for (source, *_), pair in candidates.items():
        taken[source] += 1
        if args.per_error and taken[source] > args.per_error:
            stages[f"    more than {args.per_error} from one {'problem' if args.whole else 'error'} (--per_error)"] += 1
        else:
            kept.append(pair | {"dataset": args.dataset} if args.dataset else pair)
    complain(bad)
    print(funnel([*stages.items(), ("pairs", len(kept))]))
    if not kept:
        raise DataError(f"{args.file}: no pair came of it, nothing to write to {args.out}")
    write_rows(args.out, kept)
    return 1 if bad else 0


def step_pairs(rows: list[tuple[tuple, dict]], style: str, stages: Counter, bad: list[DataError]) -> dict[tuple, dict]:
    """Distinct first steps of the continuations that reach the right answer, against the wrong step that they replace."""
    stages.update({name: 0 for name in ("located errors", "continuations", "right")})
    candidates, errors, rectified = {}, set(), set()
    for key, row in rows:
        try:
            for name in ("prefix", "rejected", "full_rejected"):
                text_field(row, name, row["where"])
            if not row["full_rejected"].startswith(row["rejected"]):
                raise DataError(f"{row['where']}: field 'rejected': is not the beginning of 'full_rejected'; both are the wrong attempt from the wrong "
                                "step on, as data.py localize writes them")
        except DataError as error:
            bad.append(error)
            continue
        errors.add(key[0])
        stages["continuations"] += 1
        if not row["correct"]:
            continue
        stages["right"] += 1
        rectified.add(key[0])
        chosen = first_step(row["text"], row["prefix"], style)
        candidate = key[0], " ".join(chosen.split())
        if row.get("stop_reason") == "length":
            stages["    cut off by the length limit"] += 1
        elif not candidate[1]:
            stages["    the first step is empty"] += 1
        elif candidate[1] == " ".join(row["rejected"].split()):
            stages["    the first step is the rejected one"] += 1
        elif candidate in candidates:
            stages["    the same first step again"] += 1
        else:
            candidates[candidate] = {
                "dataset": row.get("dataset", ""), "prompt": row["question"], "initial_reason_steps": row["prefix"], "chosen": chosen, "rejected": row["rejected"],
                "full_chosen": row["completion"], "full_rejected": row["full_rejected"], "answer": row["answer"]}
    stages["located errors"], stages["rectified errors"] = len(errors), len(rectified)
    return candidates


def whole_pairs(rows: list[tuple[tuple, dict]], stages: Counter) -> dict[tuple, dict]:
    """Independently sampled right and wrong whole answers of one problem, the first right with the first wrong, and so on: plain DPO's pairs."""
    stages.update({name: 0 for name in ("problems", "attempts")})
    sides: dict[str, tuple[dict, dict]] = {}                 # problem -> distinct right, distinct wrong answers
    for key, row in rows:
        stages["attempts"] += 1
        right, wrong = sides.setdefault(key[0], ({}, {}))
        if row.get("stop_reason") == "length":
            stages["    cut off by the length limit"] += 1
        elif row["text"].strip() in (right if row["correct"] else wrong):
            stages["    the same answer again"] += 1
        else:
            (right if row["correct"] else wrong)[row["text"].strip()] = row
    stages["problems"] = len(sides)
    stages["problems with right and wrong answers"] = sum(bool(right and wrong) for right, wrong in sides.values())
    return {(id, i): {"dataset": a.get("dataset", ""), "prompt": a["question"], "initial_reason_steps": "", "chosen": a["text"], "rejected": b["text"],
                      "full_chosen": a["text"], "full_rejected": b["text"], "answer": a["answer"]}
            for id, (right, wrong) in sides.items() for i, (a, b) in enumerate(zip(right.values(), wrong.values()))}


# ---------------------------------------------------------------------------------------------------------------------------------
# python data.py show: a row, and what becomes of it
# ---------------------------------------------------------------------------------------------------------------------------------

COLOURS = {"context": "2", "chosen": "32", "rejected": "31", "title": "1"}


def _paint(text: str, role: str) -> str:
    plain = not sys.stdout.isatty() or "NO_COLOR" in os.environ
    return text if plain else "\n".join(f"\033[{COLOURS[role]}m{line}\033[0m" for line in text.split("\n"))


def _block(title: str, text: str, role: str) -> str:
    """A titled text with a bar at its left. Control characters of the text are shown as escapes: a terminal would obey them."""
    safe = re.sub(r"[^\n\t\x20-\x7e\xa0-\U0010ffff]", lambda found: f"\\x{ord(found[0]):02x}", text)
    return "\n".join([_paint(title, "title")] + [f"  | {_paint(line, role)}" for line in safe.split("\n")])


def _width(text: str) -> int:
    """Columns that a terminal needs."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def token_picture(ids: Sequence[int], targets: Sequence[int], tokenizer: Tokenizer, context: Sequence[int] = (), columns: int = 110) -> str:
    """Tokens in lines, with the loss mask below: . = read only, ^ = predicted (loss), 2 = predicted once for each side.

    Spaces are drawn as ·, line ends as ⏎; a character that needs several tokens is drawn as �, once for each.
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
    """The teaching picture: the four texts of a row, then the segments of its batch with the loss mask."""
    question, steps, responses = texts_of(row, method, where)
    names = ["chosen", "rejected"] if len(responses) == 2 else ["chosen"]
    notes = {"chosen": "s_win" if method == "stepdpo" else "whole answer", "rejected": "s_lose" if method == "stepdpo" else "whole answer"}
    parts = [_paint(f"{where}   method {method}, prompt style {style}", "title"), "",
             _block("prompt x (read, no loss)", render_prompt(style, question, tokenizer), "context")]
    if steps:
        parts.append(_block("correct steps s_1..s_{k-1} (read, no loss)", steps, "context"))
    parts += [_block(f"{name} {notes[name]} (loss)", text, name) for name, text in zip(names, responses)]
    if example is None:
        return "\n".join(parts)

    batch = collate([example], [0])
    own = [len(side) - example.shared for side in example.sides]
    times = [0] * example.start + [len(own)] * (example.shared - example.start) + [1] * sum(own)     # predictions of each token
    titles = [f"segment 0: what both sides share, computed once" if len(names) == 2 else "segment 0: the whole row",
              "segment 1: chosen, sees segment 0 and itself", "segment 2: rejected, sees segment 0 and itself"]
    parts += ["", _paint(f"the same as {len(batch.input_ids)} tokens in a batch   (. read only   ^ loss"
                         + ("   2 loss, once for each side)" if 2 in times else ")"), "title")]
    offset = 0
    for segment, length in enumerate(batch.lengths):
        ids, here = batch.input_ids[offset:offset + length].tolist(), slice(offset, offset + length)
        positions = batch.position_ids[here]
        parts.append(_block(f"{titles[segment]}; {length} tokens, positions {positions[0]}..{positions[-1]}",
                            token_picture(ids, times[here], tokenizer, example.chosen[:example.shared].tolist() if segment else ()),
                            ("context", "chosen", "rejected")[segment]))
        offset += length
    ends = "no end token follows: the solution goes on" if method == "stepdpo" else \
        f"the answer ends with {tokenizer.decode([int(example.chosen[-1])])}"
    parts.append(f"{len(batch.targets)} tokens carry loss; {ends}")
    return "\n".join(parts)


def statistics(examples: Sequence[Example], report: Report) -> str:
    """Lengths of a file's rows in tokens, and the work that sharing the common beginning saves."""
    columns = {"context (no loss)": [e.start for e in examples], "chosen (loss)": [len(e.chosen) - e.start for e in examples]}
    pairs = [e for e in examples if e.rejected is not None]
    if pairs:
        columns |= {"rejected (loss)": [len(e.rejected) - e.start for e in pairs], "shared by both sides": [e.shared for e in pairs]}
    columns["whole row in a batch"] = [e.length for e in examples]
    lines = [str(report), "", f"{'tokens':<24}{'min':>8}{'5 %':>8}{'median':>8}{'95 %':>8}{'max':>8}{'sum':>14}"]
    for name, values in columns.items():
        lines.append(f"  {name:<22}" + "".join(f"{value:>8,.0f}" for value in np.percentile(values, [0, 5, 50, 95, 100])) + f"{sum(values):>14,}")
    if pairs:
        separate, shared = sum(len(side) for e in pairs for side in e.sides), sum(e.length for e in pairs)
        lines += ["", f"work saved by sharing the prefix: {1 - shared / separate:.1%}   "
                      f"(P + S_win + S_lose = {shared:,} tokens instead of 2 P + S_win + S_lose = {separate:,})"]
    return "\n".join(lines)


def show_solution(where: str, row: dict, style: str) -> str:
    """A sampled solution, cut into its steps, with the rollouts from the end of each where the file has them."""
    prefix = text_field(row, "prefix", where) if "prefix" in row else ""
    steps = split_steps(prefix + text_field(row, "completion", where), style)
    values = row["values"] if isinstance(row.get("values"), list) and len(row["values"]) == len(steps) else [None] * len(steps)
    verdict = {True: "right", False: "wrong"}.get(row.get("correct"), "not graded")
    parts = [_paint(f"{where}   {len(steps)} steps (--steps {style}), {verdict}", "title"), "", _block("question", text_field(row, "question", where), "context")]
    for i, (step, value) in enumerate(zip(steps, values), 1):
        parts.append(_block(f"step {i}" + (f": {value[0]} of {value[1]} rollouts from its end succeed" if value else ""), step.strip("\n"),
                            "chosen" if row.get("correct") else "rejected"))
    return "\n".join(parts + [f"extracted answer {row.get('extracted')!r}, right answer {row.get('answer')!r}"])


def show(args: argparse.Namespace) -> int:
    rows = list(read_rows(args.data))
    columns = rows[0][1]
    if args.row is not None and not 1 <= args.row <= len(rows):
        raise DataError(f"{args.data}: --row {args.row}: the file has rows 1 to {len(rows)}")
    if "completion" in columns:
        print(show_solution(*rows[(args.row or 1) - 1], args.steps))
        return 0
    if not args.model:
        raise DataError("--model is needed to show the tokens of training rows: a checkpoint folder, of which only the tokenizer is read")
    method = args.method or ("sft" if "response" in columns else "stepdpo" if "initial_reason_steps" in columns else "dpo")
    tokenizer = Tokenizer.from_pretrained(resolve(args.model))
    examples, report = encode_dataset(args.data, tokenizer, method, args.prompt, args.max_length)
    kept = {example.where: example for example in examples}
    where, row = rows[args.row - 1] if args.row else next((where, row) for where, row in rows if where in kept)
    print(show_row(where, row, kept.get(where), tokenizer, method, args.prompt))
    if where not in kept:
        print(_paint("dropped: " + next(reason for reason, dropped in report.dropped.items() if where in dropped), "title"))
    print("\n" + statistics(examples, report))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="data.py", description="Look at preference data, and make it from graded attempts.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="{show,localize,pairs}")

    command = commands.add_parser("show", help="print a row and what becomes of it: texts, tokens with the loss mask, statistics",
                                  description="Print a row of a training file and what becomes of it: its texts, its tokens with the loss "
                                              "mask, and statistics of the file. Of a file of attempts: a solution cut into its steps.")
    command.add_argument("--data", required=True, metavar="F", help=".jsonl, .json or .parquet file, or a hub dataset id")
    command.add_argument("--model", metavar="M", help="checkpoint folder (or hub id) whose tokenizer is used")
    command.add_argument("--prompt", choices=PROMPT_STYLES, default="qwen2-boxed", help="prompt style (default: %(default)s)")
    command.add_argument("--method", choices=METHODS, help="what would train on the row (default: what its columns suggest)")
    command.add_argument("--row", type=int, metavar="I", help="which row, 1 = the first (default: the first that is kept)")
    command.add_argument("--max_length", type=int, default=1024, help="longer rows are dropped, in tokens (default: %(default)s)")
    command.set_defaults(run=show)

    judges = "values (rollouts of eval.py --rollouts), endpoint (a judge model on a server), ask (you, in the terminal), or MODULE:FUNCTION, a " \
             "function of your own that gets (question, steps, answer) and returns the index of the first wrong step, from 0, or None"
    command = commands.add_parser("localize", help="attempts -> errors: find the first wrong step of every wrong attempt",
                                  description="Find the first wrong step of every wrong attempt. Writes one row for each: the prefix up to that "
                                              "step's label, the step, and the wrong rest; eval.py continues from such prefixes.")
    command.add_argument("file", metavar="F", help="attempts that eval.py wrote (for --judge values: with --rollouts)")
    command.add_argument("--judge", required=True, metavar="J", help=judges)
    command.set_defaults(run=localize)

    command = commands.add_parser("pairs", help="rectified attempts -> pairs to train on, in the columns of Math-Step-DPO-10K",
                                  description="Make preference pairs: the distinct first steps of those continuations whose final answer is right, "
                                              "each against the wrong step that it replaces.")
    command.add_argument("file", metavar="F", help="graded continuations of errors.jsonl, as eval.py wrote them (with --whole: any attempts)")
    command.add_argument("--per_error", type=int, metavar="N", help="at most N pairs from one error (with --whole: one problem); default: all")
    command.add_argument("--whole", action="store_true", help="pair independently sampled right and wrong whole answers instead: plain DPO's data")
    command.add_argument("--verify", metavar="J", help="keep only chosen steps in which this judge finds no error: endpoint, ask, or MODULE:FUNCTION")
    command.add_argument("--dataset", metavar="NAME", help="what to write in the column dataset (default: what the rows carry)")
    command.set_defaults(run=pairs)
    for name in ("localize", "pairs"):
        command = commands.choices[name]
        command.add_argument("--out", required=True, metavar="F", help="JSONL file to write")
        command.add_argument("--endpoint", metavar="URL", help="OpenAI-compatible server of the judge, e.g. http://localhost:8000/v1; "
                                                               "its key is read from OPENAI_API_KEY")
        command.add_argument("--api_model", metavar="NAME", help="name of the judge model on that server")
        command.add_argument("--concurrency", type=int, default=8, metavar="N", help="requests at a time (default: %(default)s)")
    for name in ("show", "localize", "pairs"):
        commands.choices[name].add_argument("--steps", choices=STEP_STYLES, default="auto",
                                            help='how steps are told apart: step ("Step 1:", the paper), heading ("**Step 1:**", "Step 1."), number ("1."), '
                                                 "paragraph (blank lines), auto: the first of these that is found (default)")

    for command in commands.choices.values():
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(argv)
    try:
        return args.run(args)
    except (DataError, CheckpointError) as error:
        if args.debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
