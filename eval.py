"""The one sampler-and-grader: for collecting errors, step values, rectification and the final score alike.

    problems --sample--> completions --extract_answer--> answers --is_equivalent--> verdicts --> accuracy

    READERS        problem files, in the layouts of the public sets
    SAMPLING       from the project's own model or from a server; every sample on disk as it is finished
    SUMMARY        the table of accuracies
    COMMAND LINE   python eval.py --help
    GRADING        what is the answer in this text, and is it the right one? (text in, verdict out)

A problem may carry a `prefix`, the reasoning so far: it is continued, and prefix + completion is graded.
Answers, problem files and servers are untrusted: nothing of them is ever executed.
"""
from __future__ import annotations      # the method stands first, what it is made of behind it

import argparse
import itertools
import json
import math
import os
import random
import re
import sys
import time
import unicodedata
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property, lru_cache
from pathlib import Path
from string import ascii_uppercase
from typing import Callable, Container, Iterable, Iterator, NamedTuple, Sequence

import torch

if __name__ == "__main__":      # python -P does not search a script's own folder
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from data import (BOXED, LONGEST_TOKEN, PROMPT_STYLES, STEP_STYLES, DataError, Endpoint, Journal,
                  Tokenizer, add_chat_options, check_out, complain, digest, expect,
                  first_error_from_values, in_threads, next_prefix, positive, progress, read_rows,
                  render_prompt, run_command, same_step, split_steps, stage, step_starts, summary_path,
                  text_field, writable)
from model import (CheckpointError, Llama, choose_device, fingerprint, join_processes, keep_freed_memory,
                   leave_processes, read_json, resolve, samples, stable_key)


# ----------------------------------------------------------------------------------------------------------
# READERS: problems, in the layouts that the public sets have
# ----------------------------------------------------------------------------------------------------------

# what goes along from a problem to its samples
CARRIED = ("level", "subject", "dataset", "step", "rejected", "full_rejected", "solution")
LATEX_ENDS = re.compile(r"(?:\\end\{problem\}|\\noindent|\\\\|\s)+$")        # what Odyssey's texts end in
# What the public sets call their fields, in order of preference; case, "_", "-" and spaces do not matter.
QUESTIONS = "question problem prompt messages conversations instruction query squestion problemtext ctx input"
CONTEXTS = "context passage body story article paragraph background"        # what a question is about
ANSWERS = ("finalanswer expectedanswer groundtruth groundtruthanswer goldanswer referenceanswer "
           "correctanswer answer gold gt target answers lsolutions rewardmodel")
INDICES = "label answerindex answeridx cop"                                 # of a choice, from 0
CHOSEN = f"correct answerkey answer correctanswer correctoption gold target groundtruth {INDICES}"
OPTIONS = "options choices endings answerchoices"
WORKINGS = "solution rationale reasoning output"
IDS = "id idx uniqueid problemid questionid"


@dataclass
class Problem:
    where: str                                   # "file:line"
    id: str | int
    question: str
    answer: str                                  # gold
    prefix: str                                  # the reasoning so far; generation continues there
    carried: dict                                # what goes along into the rows that come of it


class Fields:
    """The fields of a row by what the public sets call them. Empty ones (null, "", []) are as if absent."""

    def __init__(self, row: dict, where: str):
        self.row, self.where = row, where
        present = [name for name, value in row.items() if value is not None and value != [] and value != ""]
        self.names = {re.sub(r"[\W_]", "", name).lower(): name for name in reversed(present)}

    def first(self, names: str) -> str | None:
        """The row's own name for the first of these that it has."""
        return next((self.names[name] for name in names.split() if name in self.names), None)

    def error(self, name: str, found: str) -> DataError:
        return DataError(f"{self.where}: field {name!r}: {found}")

    def text(self, name: str) -> str:
        """A field's text; of a conversation, what the user asks."""
        value = self.row[name]
        if isinstance(value, list) and all(isinstance(part, str) for part in value):
            value = "\n".join(value)
        if isinstance(value, list):
            turns = [turn if isinstance(turn, dict) else {} for turn in value]
            roles = [turn.get("role", turn.get("from")) for turn in turns]
            asked = [turn for turn, role in zip(turns, roles) if role in ("user", "human")]
            if len(asked) != 1 or not {"user", "human", "assistant", "gpt"}.issuperset(roles):
                raise self.error(name, f"found turns of {roles!r:.80}; expected text, or one turn of the "
                                       "user and no system prompt (--system gives one to all rows)")
            value = asked[0].get("content", asked[0].get("value"))
            if isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict):
                value = value[0].get("text")     # [{"type": "text", "text": ...}]
        return text_field({name: value}, name, self.where)


def read_problem(where: str, row: dict) -> Problem:
    """One row of any of these layouts; DataError where question or answer is missing or not clear.

        the pipeline's own     {id, question, answer, prefix, ...}
        anyone's               {question | problem | prompt | ..., answer | final_answer | ground_truth | ...}
        GSM8K                  {question, answer: "working #### 18"}
        MATH                   {problem, solution: "... \\boxed{18} ...", level, type}
        SVAMP, Alpaca          {Body, Question, Answer}, {instruction, input, answer}
        verl                   {prompt: [{role: "user", content}], reward_model: {ground_truth}}
        multiple choice        {question, options: ["A)18", ...], correct: "A"}, and others: see `choices_of`
        Odyssey                {"Problem_7": {question, answer, label, level}}
    """
    if len(row) == 1 and isinstance(inner := next(iter(row.values())), dict):
        clean = {k: LATEX_ENDS.sub("", v) if isinstance(v, str) else v for k, v in inner.items()}
        row = {"id": next(iter(row))} | clean
    fields = Fields(row, where)
    question, choices = question_of(fields), choices_of(fields)
    kept = writable(row, where)
    carried = {key: kept[key] for key in CARRIED if kept.get(key) is not None}
    for own, public in (("subject", "type" if choices else "type label"), ("solution", WORKINGS)):
        name = fields.first(public)
        if name and isinstance(row[name], str):
            carried.setdefault(own, row[name])

    if choices:
        answer = right_choice(fields, choices, carried.get("solution"))
        if not all(text in question for text in choices.values()):  # some sets write them into the question
            letters = zip(ascii_uppercase, choices.values())
            question += "\nAnswer Choices: " + " ".join(f"({letter}) {text}" for letter, text in letters)
    else:
        answer, working = gold_of(fields, question, carried.get("solution"))
        if working:
            carried.setdefault("solution", working)
    ids = (row[fields.names[name]] for name in IDS.split() if name in fields.names)
    id = next((id for id in ids if type(id) in (str, int)), int(re.search(r"\d+$", where)[0]))
    prefix = text_field(row, "prefix", where) if row.get("prefix") is not None else ""
    return Problem(where, id, question, answer, prefix, carried)


def question_of(fields: Fields) -> str:
    """The text of a problem: what it is about, the instruction and the question, each once."""
    if name := fields.first("system systemprompt history"):
        raise fields.error(name, "not used here: write it into the question, or remove it (--system gives "
                                 "all rows a system prompt)")
    name = fields.first(QUESTIONS)
    if name is None:
        raise DataError(f"{fields.where}: no question (found: {', '.join(fields.row) or 'nothing'}); "
                        "expected a field 'question', 'problem', 'prompt' or 'instruction'")
    names = [fields.first(CONTEXTS), fields.first("instruction"), name]
    if name == fields.names.get("instruction"):
        names.append(fields.first("input"))
    if not fields.text(name).strip():
        raise fields.error(name, "empty; expected the text of a problem")
    parts = [fields.text(part) for part in dict.fromkeys(names) if part]
    repeated = [any(part.strip() in after for after in parts[i + 1:]) for i, part in enumerate(parts)]
    return "\n".join(part for part, again in zip(parts, repeated) if not again)


def gold_of(fields: Fields, question: str, solution: str | None = None) -> tuple[str, str | None]:
    """The right answer as text (of a list, the set of its answers), and the working that came with it."""
    name, working = fields.first(ANSWERS), None
    answer = fields.row[name] if name else None
    if isinstance(answer, dict):                 # verl's reward_model
        answer = answer.get("ground_truth", answer)
    if answer is None and solution:
        name, answer = "solution", solution if "####" in solution else boxed_answer(solution)
    if answer is None:
        raise DataError(f"{fields.where}: no answer (found: {', '.join(fields.row)}); expected a field "
                        "'answer', 'final_answer' or 'ground_truth', or a 'solution' with \\boxed{...} or "
                        "####")
    if isinstance(answer, str) and "####" in answer:
        working, _, answer = answer.rpartition("####")
        working = working.strip()
    if isinstance(answer, str) and answer.startswith('["'):         # Skywork: a list, written as text
        try:
            answer = json.loads(answer)
        except ValueError:
            pass                                 # it only looks like one

    def plain(value) -> str:
        if isinstance(value, bool):              # in the words that the question asks for
            return str(value) if "true" in question.lower() else "Yes" if value else "No"
        if type(value) in (int, float) and abs(value) < math.inf:
            return str(int(value) if value == int(value) else value)
        value = text_field({name: value}, name, fields.where).strip()
        return boxed_answer(value) or value

    answers = [plain(value) for value in (answer if isinstance(answer, list) else [answer])]
    if not all(answers):
        raise fields.error(name, "empty; a problem without an answer cannot be graded")
    return ", ".join(answers), working


def choices_of(fields: Fields) -> dict[str, str]:
    """The choices by their labels; {} where the row has none. They stand

        in a list              options | choices | endings: ["4", "6", ...] or ["A) 4", "B) 6", ...]
        under their labels     {"A": "4", "B": "6", ...};  {text: [...], label: [...]};  [{label, text}, ...]
        in columns             A, B, C, ...;  option_a, option_b, ...;  ending0, ending1, ...
    """
    name = fields.first(OPTIONS)
    found = fields.row[name] if name else columns_of(fields)
    if isinstance(found, dict) and isinstance(found.get("text"), list):
        found = dict(zip(found.get("label") or ascii_uppercase, found["text"]))
    elif isinstance(found, list) and all(isinstance(option, dict) for option in found):
        found = {option.get("label", option.get("key")): option.get("text", option.get("value"))
                 for option in found}
    elif isinstance(found, list) and len(found) <= 26:
        found = dict(zip(ascii_uppercase, found))
    if not isinstance(found, dict) or not all(type(text) in (str, int, float) for text in found.values()):
        raise fields.error(name, "expected a list of up to 26 choices, or an object of them with labels")
    texts = [str(text).strip() for text in found.values()]
    letters = [re.match(rf"[\[(]?{letter}\s*[\]).:]\s*", text, re.IGNORECASE)
               for letter, text in zip(ascii_uppercase, texts)]
    if all(letters):                             # "A) 4", "B) 6", ...
        texts = [text[letter.end():] for text, letter in zip(texts, letters)]
    return dict(zip((str(label).upper() for label in found), texts))


def columns_of(fields: Fields) -> dict:
    """Choices in columns of their own. Columns a and b alone may also be the numbers of a sum."""
    lettered = re.fullmatch(r"\s*[A-Ja-j]\s*", str(fields.row.get(fields.first(CHOSEN))))
    pattern = rf"(?:option|choice|op|ending|sol{'|' if lettered else ''})([a-j]|\d)"
    found = {match[1]: fields.row[name] for key, name in sorted(fields.names.items())
             if (match := re.fullmatch(pattern, key))}
    return found if len(found) > 1 and "".join(found) in "abcdefghij0123456789" else {}


def right_choice(fields: Fields, choices: dict[str, str], solution: str | None = None) -> str:
    """The letter of the right choice, which a row gives by its label, its text or its index from 0."""
    labels, texts = list(choices), list(choices.values())
    name = next((name for name in CHOSEN.split() if name in fields.names), None)
    if name == "correct" and isinstance(fields.row[fields.names[name]], bool):          # a grade
        name = "answer"
    given = fields.row[fields.names[name]] if name in fields.names else gold_of(fields, "", solution)[0]
    if isinstance(given, list) and len(given) == 1:
        given = given[0]
    said = str(given).strip()
    label = re.match(r"[\[(]?(\w+)\s*(?:[\]).:]|$)", said)
    same_text = {i for i, text in enumerate(texts) if text.lower() == said.lower()}
    if isinstance(given, str) and label and label[1].upper() in labels and (len(said) < 4 or not same_text):
        found = {labels.index(label[1].upper())}                    # "C", "(C)", "C. 7"
    elif said.isdecimal() and name in INDICES.split():
        found = {int(said)}
    elif type(given) is int and 0 <= given <= len(texts):
        numbers = fields.row.get(fields.first(OPTIONS))             # 2 of 1, 2, 3: which one?
        are_numbers = isinstance(numbers, list) and all(type(number) is int for number in numbers)
        found = {given} | (same_text if are_numbers else set())
    else:
        found = same_text or {i for i, text in enumerate(texts) if is_equivalent(said, text)}
    if len(found) != 1 or max(found) >= len(texts):
        raise fields.error(fields.names.get(name, "solution"),
                           f"found {said!r:.60}; expected the letter, the text or the index (from 0) of one "
                           f"choice of {texts!r:.200}")
    return ascii_uppercase[found.pop()]


def boxed_answer(solution: str) -> str | None:
    """The gold answer of a worked solution, if it is marked as such."""
    return extract_answer(solution) if "\\boxed" in solution or "\\fbox" in solution else None


def read_attempt(where: str, row: dict) -> tuple[Problem, str]:
    """A graded sample: its problem, with all of the row carried along, and its reasoning, prefix included."""
    problem = read_problem(where, row)
    text = problem.prefix + text_field(row, "completion", where)
    if type(row.get("sample", 0)) is not int:
        raise DataError(f"{where}: field 'sample': found {row['sample']!r:.60}; expected a number, as "
                        "eval.py writes it")
    correct = row["correct"] if type(row.get("correct")) is bool else grade(text, problem.answer)[1]
    return replace(problem, carried=writable(row, where) | {"id": problem.id, "correct": correct}), text


def make_distinct(problems: list[Problem]) -> list[str]:
    """Rename ids that stand in an earlier row: 0, 0 -> 0, "0~2". Returns a line on each.

    The next stages know a sample by (id, sample) and would throw the second problem's away, after it was
    paid for. It happens where sets are merged. (Attempts at one problem share an id, not a sample.)"""
    place, times, lines = {}, Counter(), []
    for problem in problems:
        old, sample = problem.id, problem.carried.get("sample", 0)
        while (str(problem.id), sample) in place:
            times[str(old), sample] += 1
            problem.id = f"{old}~{times[str(old), sample] + 1}"
        place[str(problem.id), sample] = problem.where
        if problem.id != old:
            lines.append(f"{problem.where}: id {old!r} stands in {place[str(old), sample]} already; here it "
                         f"becomes {problem.id!r}")
            if "id" in problem.carried:
                problem.carried["id"] = problem.id
    return lines


def read_file(args: argparse.Namespace, bad: list[DataError]) -> list:
    """The problems of F, or with --rollouts its wrong attempts. Rows that cannot be used go to `bad`."""
    items, notes, read, stages = [], [], read_problem, ("problems", "errors", "pairs")
    if args.rollouts:
        read, stages = read_attempt, ("attempts", "valued attempts", "rectified attempts")
    for where, row in itertools.islice(read_rows(args.problems, bad, split="test"), args.limit):
        if not items and not bad:
            expect(row, where, *stages)
            if {"chosen", "rejected"} <= row.keys():
                notes.append(f"{args.problems}: holds pairs; their prompts and answers are taken as problems")
        try:
            items.append(read(where, row))
        except DataError as error:
            bad.append(error)
    if args.rollouts:
        valued = [item for item in items if args.all or not item[0].carried["correct"]]
        # localize judges no others
        items = [item for item in valued if item[0].carried.get("stop_reason") != "length"]
        if cut := len(valued) - len(items):
            which = "attempts" if args.all else "wrong attempts"
            notes.append(f"{args.problems}: {cut} of {len(valued)} {which} were cut off by the length limit "
                         "and are left out")
    renamed = make_distinct([item[0] for item in items] if args.rollouts else items)
    notes += renamed[:1]
    if renamed[1:]:
        notes.append(f"{args.problems}: {len(renamed) - 1} more rows likewise")
    if notes and os.environ.get("RANK", "0") == "0":
        print(*notes, sep="\n", file=sys.stderr)
    if not items:
        wanted = "problem" if not args.rollouts else "attempt" if args.all else "wrong attempt"
        raise DataError(f"{args.problems}: holds no {wanted} that can be used"
                        + (f" ({len(bad)} bad rows; the first: {bad[0]})" if bad else ""))
    return items


# ------------------------------------------------------------------------------------------------------------
# SAMPLING: from the project's own model or from a server; every sample on disk as it is finished
# ------------------------------------------------------------------------------------------------------------

class Prompt(NamedTuple):
    """What a sampler reads, as its `prepare` gives it."""
    content: object          # token ids, or the request to a server
    text: str                # the reasoning in it: a sample goes on from there
    spaces: bool             # whether spaces at its end were left to the model; they are taken off the sample


class Drawn(NamedTuple):
    """One sample."""
    text: str                # what is new, cut before a stop string
    tokens: int | None       # how many tokens that took; None where a server does not say
    stop_reason: str         # "eos", "stop" (a stop string), "length", or what else a server calls it


class Sampler:
    """Samples from a checkpoint, by model.py.

    folder          checkpoint folder or hub id
    prompt          how a question becomes a prompt: one of data.PROMPT_STYLES
    dtype           "fp32" or "bf16"; by default bf16 on a GPU, fp32 on a CPU
    batch_size      samples that are computed together, all of one prompt at least
    system, template_args  for the chat template, as data.Tokenizer takes them
    base            of a LoRA adapter, its base model, if that is not where the adapter says

    settings: all that decides what it says, for a journal.
    """

    def __init__(self, folder: str | Path, *, prompt: str = "chat", dtype: str | None = None,
                 device: str | None = None, batch_size: int = 64, system: str | None = None,
                 template_args: dict | None = None, base: str | Path | None = None):
        folder, device = resolve(folder), choose_device(device)
        dtype = dtype or ("fp32" if device.type == "cpu" else "bf16")
        self.prompt, self.batch_size = prompt, batch_size
        self.tokenizer = Tokenizer.from_pretrained(folder, system=system, template_args=template_args,
                                                   base=base)
        self.stop_ids = self.tokenizer.stop_ids(prompt)
        weights = torch.float32 if dtype == "fp32" else torch.bfloat16
        self.model = Llama.from_pretrained(folder, weights, device, base)
        self.settings = {"model": f"{folder.resolve().name} {fingerprint(folder, base)[:12]}", "dtype": dtype,
                         "device": device.type, "prompt": prompt, "system": system,
                         "template_args": template_args}

    def prepare(self, problem: Problem, text: str, cut: int | None = None) -> Prompt:
        """The prompt of a problem and the reasoning `text`, or its part before character `cut`.

        Words bring their space along: "Assistant: " and "Let" are trained as ":" and " Let", so a space of
        its own is a token that the model never saw there. With a cut, the prompt ends at a token of the whole
        text, so that the model reads on from the very tokens that it would have written; line ends after the
        step belong to it where they are one token with its full stop.

        Raises DataError where the model cannot take it: too long, or control tokens in the text.
        """
        asked = "" if self.prompt == "raw" else problem.question         # a raw prompt is rendered already
        if found := self.tokenizer.control_token_in(asked) or self.tokenizer.control_token_in(text):
            raise DataError(f"{problem.where}: it contains the control token {found}, which is no text; "
                            "remove it")
        rendered = render_prompt(self.prompt, problem.question, self.tokenizer, text)
        full, most = rendered + text, self.model.config.max_position_embeddings - 1
        if len(full) > LONGEST_TOKEN * most:                            # known without waiting for its tokens
            raise DataError(f"{problem.where}: prompt and prefix have {len(full)} characters; the model "
                            f"takes 1 to {most} tokens")
        spaces = cut is None and full.strip(" ") != "" and full.endswith(" ")
        ids, offsets = self.tokenizer.encode(full.rstrip(" ") if spaces else full, bos=self.prompt != "chat")
        if cut is not None:
            cut = len(rendered) + len(text) - len(text[cut:].lstrip())
            kept = sum(1 for _, end in offsets if end <= cut)
            ids, text = ids[:kept], text[:max(0, offsets[kept - 1][1] - len(rendered))]
        if not 0 < len(ids) <= most:
            raise DataError(f"{problem.where}: prompt and prefix have {len(ids)} tokens; the model takes "
                            f"1 to {most}")
        if max(ids) >= self.model.config.vocab_size:
            size = self.model.config.vocab_size
            raise CheckpointError(f"{self.tokenizer.source}: tokenizer.json gives token {max(ids)}, "
                                  f"config.json says vocab_size {size}: they do not belong together")
        return Prompt(ids, text, spaces)

    def batches(self, prompts: Sequence[Prompt], n: int) -> list[list[int]]:
        """Indices of the prompts that are computed together, about `batch_size` samples: the longest first,
        so that memory runs out at once if at all, and beside each its family, the prompts that share half of
        it or more. What they have in common is then computed once.

        It looks at the prompts alone, not at what is done already: a batch is computed whole, so that each
        sample has the same neighbours, hence the very numbers, whether the run was disturbed or not.
        """
        families: list[list[int]] = []
        before: list[int] = []
        for i in sorted(range(len(prompts)), key=lambda i: prompts[i].content):    # neighbours begin alike
            ids = prompts[i].content
            half = min(len(before), len(ids)) // 2 + 1
            if before[:half] == ids[:half]:
                families[-1].append(i)
            else:
                families.append([i])
            before = ids
        families.sort(key=lambda family: -max(len(prompts[i].content) for i in family))
        order = [i for family in families for i in family]
        size = max(1, self.batch_size // n)
        return [order[at:at + size] for at in range(0, len(order), size)]

    def draw(self, prompts: Sequence[Prompt], n: int, seed: int,
             temperature: float | Callable[[list[int]], float] = 0.0, *, top_p: float = 1.0,
             max_new_tokens: int = 2048, stop: Sequence[str] = (), done: Container = frozenset(),
             ended: Callable[[int, str], bool] | None = None) -> Iterator[tuple[int, int, Drawn]]:
        """(i, j, sample j of prompts[i]) for all j < n, as they end; not those that are `done`, pairs (i, j).

        temperature may also be a function of the token ids sampled so far. A sample ends at an end token,
        before a `stop` string, after max_new_tokens, or where ended(i, its text so far) says so.
        """
        for batch in self.batches(prompts, n):
            if all((i, j) in done for i in batch for j in range(n)):
                continue
            asked = [prompts[i].content for i in batch]
            text_of = lambda b, new: self.tokenizer.continuation(asked[b], new)
            drawn = samples(
                self.model, asked, n=n, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p,
                eos_ids=self.stop_ids, stop=tuple(stop), decode=self.tokenizer.decode, seed=seed,
                ended=ended and (lambda b, new: ended(batch[b], text_of(b, new))))
            for b, j, sample in drawn:
                i, text = batch[b], text_of(b, sample.token_ids)
                if sample.stop_reason == "stop":
                    text = text[:min((at for string in stop if (at := text.find(string)) >= 0), default=None)]
                if prompts[i].spaces:
                    text = text.lstrip(" ")
                if (i, j) not in done:
                    yield i, j, Drawn(printable(text), len(sample.token_ids), sample.stop_reason)


class Remote:
    """Samples from an OpenAI-compatible server: of a chat without a prefix, which it can render itself, by
    /chat/completions; else by /completions, rendered here with the chat template of the checkpoint `model`.
    """

    def __init__(self, endpoint: str, api_model: str, *, model: str | None = None, prompt: str = "chat",
                 concurrency: int = 32, system: str | None = None, template_args: dict | None = None,
                 base: str | Path | None = None):
        if prompt != "chat" and (system or template_args):
            raise DataError("--system and --template_args belong to the chat template; --prompt "
                            f"{prompt} has no place for them: choose --prompt chat")
        self.endpoint, self.prompt, self.concurrency = Endpoint(endpoint, api_model), prompt, concurrency
        of_chat = {"system": system, "template_args": template_args}
        self.settings = {"endpoint": self.endpoint.url, "api_model": api_model, "prompt": prompt} | of_chat
        self.tokenizer = Tokenizer.from_pretrained(resolve(model), base=base, **of_chat) if model else None
        self.alike = 0                           # samples just like the first of their prompt; -inf: not all

    def prepare(self, problem: Problem, text: str, cut: int | None = None) -> Prompt:
        """As Sampler.prepare; the prompt's content is (where, the body of its request)."""
        where, question, boxed = problem.where, problem.question, self.prompt == "qwen2-boxed"
        text = text if cut is None else text[:cut].rstrip()
        rendered = self.prompt == "raw" and self.tokenizer      # without one, its BOS would stand there twice
        checked = text if rendered else question + text
        found = re.search(r"<\|[\w-]{1,40}\|>", checked)
        if mark := found and found[0] or self.tokenizer and self.tokenizer.control_token_in(checked):
            raise DataError(f"{where}: it contains the control token {mark}, which is no text; remove it")
        if not text and (boxed or self.prompt == "chat"):
            system = "You are a helpful assistant." if boxed else self.settings["system"]
            turns = [("system", system), ("user", question + BOXED if boxed else question)]
            body = {"messages": [{"role": role, "content": said} for role, said in turns if said]}
            if arguments := self.settings["template_args"]:
                body["chat_template_kwargs"] = arguments        # vLLM, SGLang and llama.cpp take them
            return Prompt((where, body), text, False)
        if self.prompt == "chat" and self.tokenizer is None:
            raise DataError(f"{where}: a prefix needs the checkpoint's chat template: give --model too")
        whole = render_prompt(self.prompt, question, self.tokenizer, text) + text
        if self.tokenizer and self.tokenizer.bos_id is not None:            # the server adds it
            whole = whole.removeprefix(self.tokenizer.backend.id_to_token(self.tokenizer.bos_id))
        return Prompt((where, {"prompt": whole.rstrip(" ") or whole}), text, whole.endswith(" "))

    def batches(self, prompts: Sequence[Prompt], n: int) -> list[list[int]]:
        return [list(range(len(prompts)))]       # the server makes its own batches: keep it busy to the end

    def draw(self, prompts: Sequence[Prompt], n: int, seed: int, temperature: float = 0.0, *,
             top_p: float = 1.0, max_new_tokens: int = 2048, stop: Sequence[str] = (),
             done: Container = frozenset()) -> Iterator[tuple[int, int, Drawn | DataError]]:
        """As Sampler.draw. A DataError stands for a sample that the server refused or failed to give."""
        how = {"max_tokens": max_new_tokens, "temperature": temperature}
        how |= {"top_p": top_p} if temperature else {}          # some servers refuse a top_p of 1
        how |= {"stop": list(stop)} if stop else {}

        def ask(sample: tuple[int, int]) -> tuple[int, int, Drawn | DataError]:
            (i, j), (where, body) = sample, prompts[sample[0]].content
            own = {"seed": stable_key(seed, body, j) % 2**31} if temperature else {}
            try:
                text, tokens, reason = self.endpoint.ask(body | how | own)
            except DataError as error:
                return i, j, DataError(f"{where}: {error}")
            end = min((at for string in stop if (at := text.find(string)) >= 0), default=None)
            text = text[:end].lstrip(" ") if prompts[i].spaces else text[:end]
            return i, j, Drawn(printable(text), tokens, reason if end is None else "stop")

        first: dict[int, Drawn] = {}             # of each prompt
        wanted = [(i, j) for i in range(len(prompts)) for j in range(n) if (i, j) not in done]
        for i, j, drawn in in_threads(ask, wanted, self.concurrency):
            if temperature and isinstance(drawn, Drawn) and first.setdefault(i, drawn) is not drawn:
                self.alike += 1 if drawn.text == first[i].text else -math.inf
                if self.alike == 3:
                    print(f"{self.endpoint.url}: the samples of a prompt are all the same; does the server "
                          f"heed temperature {temperature}?", file=sys.stderr)
            yield i, j, drawn


def next_steps(sampler: Sampler | Remote, partial_solutions: Sequence[tuple[Problem, str]], n: int,
               temperature: float, *, seed: int = 0, top_p: float = 1.0, max_new_tokens: int = 256,
               steps: str = "auto") -> list[list[tuple[str, bool | None]]]:
    """The next step of each partial solution, n times: result[i][j] is (its text, does it end the solution?).

    A partial solution is (problem, text so far). That may be empty, or end in a whole step, in a label
    ("Step 2:"), or in mid-step, whose rest is then sampled. text + step is the solution so far, as
    data.split_steps would cut it: a label that the model writes belongs to the step behind it. None instead
    of a bool says that max_new_tokens cut the step off. Sampling ends with the step; only a server samples
    on, and what it says behind the step is thrown away. Raises DataError where a prompt cannot be, or a
    server fails.
    """
    prompts = [_prepare_step(sampler, problem, text, steps) for problem, text in partial_solutions]
    begins = [len(text) for _, text in partial_solutions]

    def ended(i: int, new: str) -> bool:
        return step_end(prompts[i].text + new, begins[i], steps, over=False) is not None

    how = {"ended": ended} if isinstance(sampler, Sampler) else {}
    found: list[list] = [[None] * n for _ in prompts]
    for i, j, drawn in sampler.draw(prompts, n, seed, temperature, top_p=top_p,
                                    max_new_tokens=max_new_tokens, **how):
        if isinstance(drawn, DataError):
            raise drawn
        solution, at_end = prompts[i].text + drawn.text, drawn.stop_reason == "eos"
        end = step_end(solution, begins[i], steps, over=at_end)
        if end is not None:
            found[i][j] = solution[begins[i]:end], False
        else:
            found[i][j] = solution[begins[i]:], True if at_end else None
    return found


def _prepare_step(sampler: Sampler | Remote, problem: Problem, text: str, steps: str) -> Prompt:
    """Many tokenizers write a full stop and the line break behind it as one token. Behind a whole step the
    model must read that token, or it would be where it never was: at a full stop without a line break."""
    prompt = sampler.prepare(problem, text)
    words = _behind_label(text, steps)
    breaks = re.findall(r"\n\s*", text[:words])
    if breaks:
        line_break = breaks[-1]                                     # as before the last label
    else:
        line_break = "\n" if words or steps == "line" else "\n\n"    # without any label: of paragraphs
    continued = text.rstrip() + line_break + "Step"
    # what ends in a colon may be a first label, whatever its words
    whole_step = text[words:].strip() and not text.rstrip().endswith((":", "："))
    if isinstance(sampler, Sampler) and whole_step and continued.startswith(text):
        joined = sampler.prepare(problem, continued, len(text))
        if joined.content[:len(prompt.content)] != prompt.content:
            return joined
    return prompt


def _behind_label(text: str, steps: str) -> int:
    """Where the words of the last step begin, behind its label. With `auto` any label is one here: "1." is,
    before there is a "2."."""
    ends = []
    for style in STEP_STYLES[1:] if steps == "auto" else (steps,):
        label, words = step_starts(text + " ", style)[-1]
        if text[label:words].strip():
            ends.append(words)
    return max(ends, default=step_starts(text, steps)[-1][1])


def step_end(text: str, at: int, style: str = "auto", over: bool = True) -> int | None:
    """Where the step ends that has the first words from character `at` on: at the label of the next one.

    None if there is no such label, or, in a text that is not `over` yet, none that is certain: with `auto`,
    blank lines part steps only where no labels do, and one may be about to come.
    """
    starts = step_starts(text, style)
    for (_, words), (label, next_words) in zip(starts, starts[1:]):
        if text[max(at, words):label].strip():
            labelled = text[label:next_words].strip() != ""
            next_line_is_whole = "\n" in text[next_words:]
            return label if over or style != "auto" or labelled or next_line_is_whole else None
    return None


def grade(reasoning: str, answer: str) -> tuple[str | None, bool]:
    """(the extracted answer, whether it is equivalent to the gold one)"""
    extracted = extract_answer(reasoning)
    return extracted, extracted is not None and is_equivalent(extracted, answer)


def printable(text: str) -> str:
    """Without what a UTF-8 file, or the next stage, could not carry: NULs and half surrogate pairs."""
    return text.replace("\0", "\ufffd").encode("utf-8", "replace").decode()


@dataclass
class Work:
    """What sampling needs to know, and how much of it this process has done."""
    args: argparse.Namespace
    sampler: Sampler | Remote
    bad: list[DataError]
    journal: Journal | None = None
    rank: int = 0
    world: int = 1
    tokens: int = 0
    seconds: float = 0.0

    def prepare(self, requests: Iterable[tuple]) -> list[Prompt | None]:
        """sampler.prepare of each; None, and a line in `bad`, where it cannot be. DataError if none can."""
        prompts = []
        for request in requests:
            try:
                prompts.append(self.sampler.prepare(*request))
            except DataError as error:
                self.bad.append(error)
                prompts.append(None)
        if not any(prompts):
            raise DataError(f"no row can be used; the first: {self.bad[-len(prompts)]}")
        return prompts

    def draw(self, keys: list[tuple], prompts: list[Prompt], n: int,
             seed: int) -> Iterator[tuple[int, int, Drawn]]:
        """n samples of each prompt, but for those whose (*key, j) is in the journal. It hears of failures."""
        args = self.args
        done = {(i, j) for i, key in enumerate(keys) for j in range(n) if (*key, j) in self.journal.done}
        for i, j, drawn in self.sampler.draw(prompts, n, seed, args.temperature, top_p=args.top_p,
                                             max_new_tokens=args.max_new_tokens, stop=args.stop, done=done):
            if isinstance(drawn, DataError):
                self.journal.failed.append(drawn)
            else:
                self.tokens += drawn.tokens or 0
                yield i, j, drawn


def sample_problems(problems: list[Problem], work: Work) -> None:
    """Journal n graded samples (i, j) -> row of each problem; this process takes every world-th batch."""
    n, done = work.args.samples, work.journal.done
    prompts = work.prepare((problem, problem.prefix) for problem in problems)
    usable = [i for i, prompt in enumerate(prompts) if prompt]
    batches = work.sampler.batches([prompts[i] for i in usable], n)[work.rank::work.world]
    batches = [[usable[b] for b in batch] for batch in batches]
    mine = [(i, j) for batch in batches for i in batch for j in range(n)]
    # It does not tell the accuracy so far: long problems come first, and they are the harder ones.
    with progress(len(mine), sum(key in done for key in mine), "samples", quiet=work.rank > 0) as bar:
        for batch in batches:
            keys, asked = [(i,) for i in batch], [prompts[i] for i in batch]
            for b, j, drawn in work.draw(keys, asked, n, work.args.seed):
                problem = problems[batch[b]]
                extracted, correct = grade(problem.prefix + drawn.text, problem.answer)
                work.journal.add((batch[b], j), {
                    "id": problem.id, "question": problem.question, "answer": problem.answer, "sample": j,
                    "prefix": problem.prefix, "completion": drawn.text, "extracted": extracted,
                    "correct": correct, "tokens": drawn.tokens, "stop_reason": drawn.stop_reason,
                } | problem.carried)
                bar.update()


def value_steps(attempts: list[tuple[Problem, str]], work: Work) -> None:
    """Journal (a,) -> valued row of each attempt: how often it still comes right from before each step, by
    rollouts (Monte Carlo values, as in Math-Shepherd, arXiv 2312.08935). This process takes every world-th.

    Rounds: in each, every undecided attempt names the step before which more samples tell most about its
    first error (data.next_prefix), half of `--rollouts` are drawn there, and the next round sees the counts;
    three times `--rollouts` at most for one step. With --every_step, one round of them all. The samples are
    journalled as (a, step, round, j) -> [takes the same step, is right], from which a restarted run names the
    same steps again.
    """
    args, done = work.args, work.journal.done
    n = args.rollouts if args.every_step else max(1, args.rollouts // 2)
    steps = [split_steps(text, args.steps) for _, text in attempts]

    def before(a: int, k: int) -> tuple[Problem, str, int]:
        """What `prepare` takes: attempt a, cut before step k."""
        return *attempts[a], sum(map(len, steps[a][:k]))

    fits = work.prepare(before(a, len(steps[a]) - 1) for a in range(len(attempts)))
    mine = [a for a in range(work.rank, len(attempts), work.world) if fits[a]]
    agreement = {a: [None] * len(steps[a]) for a in mine}           # before a step: [same step, right, tries]
    values = {a: [None] * len(steps[a]) for a in mine}              # after it: [right, tries]
    for a in mine:
        right = attempts[a][0].carried.get("correct", False)
        values[a][-1] = [args.rollouts if right else 0, args.rollouts]
    with progress(0, 0, "rollouts", quiet=work.rank > 0) as bar:
        for round in itertools.count():
            if args.every_step:
                jobs = [(a, k, round) for a in agreement for k in range(len(steps[a])) if round == 0]
            else:
                wanted = {a: next_prefix(values[a], agreement[a], 3 * args.rollouts) for a in agreement}
                jobs = [(a, k, round) for a, k in wanted.items() if k is not None]
            if not jobs:
                break
            bar.total += sum((*job, j) not in done for job in jobs for j in range(n))
            bar.set_description(f"round {round + 1}, {len({a for a, _, _ in jobs})} attempts open")
            prompts = [work.sampler.prepare(*before(a, k)) for a, k, _ in jobs]
            for i, j, drawn in work.draw(jobs, prompts, n, 1000 * args.seed + round):
                (a, k, _), text = jobs[i], prompts[i].text + drawn.text
                right = grade(text, attempts[a][0].answer)[1]
                taken = split_steps(text, args.steps)[k:k + 1]
                same = right and bool(taken) and same_step(taken[0], steps[a][k], args.steps)
                work.journal.add((*jobs[i], j), [same, right])
                bar.update()
            for a, k, _ in jobs:
                outcomes = [done[a, k, round, j] for j in range(n) if (a, k, round, j) in done]
                if not outcomes:                 # a server refused them all, which journal.failed says
                    agreement.pop(a, None)
                elif a in agreement:
                    counts = (*map(sum, zip(*outcomes)), len(outcomes))
                    agreement[a][k] = [x + y for x, y in zip(agreement[a][k] or (0, 0, 0), counts)]
                    if k:
                        values[a][k - 1] = agreement[a][k][1:]
    for a in agreement:
        row = {"steps": steps[a], "values": values[a], "agreement": agreement[a]}
        work.journal.add((a,), attempts[a][0].carried | row)


# ------------------------------------------------------------------------------------------------------------
# SUMMARY: the table of accuracies
# ------------------------------------------------------------------------------------------------------------

def wilson(successes: float, n: int, z: float = 1.959964) -> tuple[float, float]:
    """The 95 % score interval of a rate (Wilson 1927): right also near 0 and 1, and for small n."""
    if n == 0:
        return 0.0, 1.0
    p, centre = successes / n, (successes + z * z / 2) / (n + z * z)
    half = z / (n + z * z) * math.sqrt(n * p * (1 - p) + z * z / 4)
    return max(0.0, centre - half), min(1.0, centre + half)


def pass_at_k(n: int, c: int, k: int) -> float:
    """P(one of k samples is right), from n with c right: 1 - C(n-c, k) / C(n, k), unbiased (Chen et al. 2021,
    arXiv 2107.03374, eq. 1)."""
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def majority(rows: list[dict]) -> bool:
    """Whether the most frequent answer is right; equivalent ones count together, the first of equals wins."""
    size: dict[str, int] = {}                    # the first text of a class stands for it
    right: dict[str, bool] = {}
    for text, times in Counter(row["extracted"] for row in rows if row["extracted"] is not None).items():
        name = next((known for known in size if is_equivalent(text, known)), text)
        size[name] = size.get(name, 0) + times
        right.setdefault(name, next(row["correct"] for row in rows if row["extracted"] == text))
    return bool(size) and right[max(size, key=size.get)]


def rate(values: Sequence[float]) -> dict:
    """Mean of values from 0 to 1, one a problem, with its 95 % interval."""
    low, high = wilson(sum(values), len(values))
    return {"n": len(values), "accuracy": sum(values) / max(1, len(values)), "low": low, "high": high}


def accuracy(groups: list[list[dict]]) -> dict:
    """groups: the samples of each problem. n counts problems, and so does the interval: samples of one
    problem are not independent, and more of them must not narrow it."""
    return rate([sum(row["correct"] for row in rows) / len(rows) for rows in groups])


def summarize(groups: list[list[dict]]) -> dict:
    """The summary of graded samples, given as a list of rows for each problem."""
    rows = [row for group in groups for row in group]
    share = lambda condition: sum(map(condition, rows)) / max(1, len(rows))
    summary = accuracy(groups) | {"samples": len(rows),
                                  "no_answer": share(lambda row: row["extracted"] is None),
                                  "cut_off": share(lambda row: row["stop_reason"] == "length")}
    for field in ("level", "subject"):
        parts = defaultdict(list)
        for group in groups:
            if field in group[0]:
                parts[str(group[0][field])].append(group)
        if parts:
            summary[f"by_{field}"] = {name: accuracy(parts[name]) for name in sorted(parts)}
    fewest = min(map(len, groups), default=0)
    if fewest > 1:
        summary["majority"] = rate([majority(group) for group in groups])
        counts = [(len(group), sum(row["correct"] for row in group)) for group in groups]
        powers = {2 ** e for e in range(fewest.bit_length())}                       # 1, 2, 4, ... and all
        summary["pass_at"] = {str(k): sum(pass_at_k(n, c, k) for n, c in counts) / len(counts)
                              for k in sorted(powers | {fewest})}
    return summary


def table(summary: dict) -> str:
    """The summary as a few lines for the screen."""
    lines = [f"{'':<34}{'n':>6}  accuracy   95 % interval"]
    parts = [("all", summary)]
    for field in ("by_level", "by_subject"):
        parts += [(f"  {name}", part) for name, part in summary.get(field, {}).items()]
    if "majority" in summary:
        parts.append((f"majority of {summary['samples'] // summary['n']}", summary["majority"]))
    for name, part in parts:
        interval = f"{part['low']:.1%} .. {part['high']:.1%}"
        lines.append(f"{name[:33]:<34}{part['n']:>6}  {part['accuracy']:>7.1%}   {interval}")
    if "pass_at" in summary:
        lines.append("   ".join(f"pass@{k} {value:.1%}" for k, value in summary["pass_at"].items()))
    lines.append(f"no answer {summary['no_answer']:.1%}   cut off by length {summary['cut_off']:.1%}")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------------
# COMMAND LINE
# ------------------------------------------------------------------------------------------------------------

def evaluate(args: argparse.Namespace) -> int:
    """The whole command, in every process; returns the exit status."""
    rank, world = join_processes()
    bad: list[DataError] = []
    items = read_file(args, bad)
    how = {"prompt": args.prompt, "system": args.system, "template_args": args.template_args}
    if args.endpoint:
        sampler = Remote(args.endpoint, args.api_model, model=args.model, base=args.base,
                         concurrency=args.concurrency, **how)
    else:
        sampler = Sampler(args.model, dtype=args.dtype, device=args.device, batch_size=args.batch_size,
                          base=args.base, **how)
    work = Work(args, sampler, bad, rank=rank, world=world)

    def sample(journal: Journal, rank: int, world: int) -> None:
        work.journal, begun = journal, time.monotonic()
        (value_steps if args.rollouts else sample_problems)(items, work)
        work.seconds = time.monotonic() - begun

    def collected(done: dict) -> tuple[list[dict], dict]:
        rows, summary = collect(args, done, len(items))
        speed = world * work.tokens / max(work.seconds, 1e-9)
        return rows, summary | {"model": args.api_model or args.model, "bad_rows": len(bad),
                                "tokens_per_second": round(speed, 1)}

    made = stage(args.out, sampler.settings | settings_of(args, items), sample, collected, args.restart)
    if rank > 0:
        return 0
    failed = work.journal.failed if made else []
    complain(bad + failed)
    if bad:
        print(f"{len(bad)} rows of {args.problems} were left out", file=sys.stderr)
    if failed:
        print(f"{len(failed)} samples failed; the same command asks for them again", file=sys.stderr)
    summary = read_json(summary_path(args.out))
    print(f"{args.out}: {'' if made else 'already complete; '}{summary['model']}, prompt {args.prompt}, "
          f"temperature {args.temperature}, top-p {args.top_p}, seed {args.seed}, {summary['seconds']} s, "
          f"{summary['tokens_per_second']:.0f} tokens/s")
    if args.rollouts:
        wrong = summary["wrong"]
        print(f"{wrong} wrong attempts{' of ' + str(summary['attempts']) if args.all else ''}, "
              f"{summary['rollouts']} rollouts; the first error is located in "
              f"{summary['located'] / max(1, wrong):.0%}")
    else:
        print(table(summary))
    return 1 if bad or failed else 0


def settings_of(args: argparse.Namespace, items: list) -> dict:
    """What decides what a sample is, besides the sampler: with other settings nothing is continued."""
    problems = [item[0] for item in items] if args.rollouts else items
    content = digest([[p.id, p.question, p.answer, p.prefix, p.carried] for p in problems])
    names = ["temperature", "top_p", "max_new_tokens", "stop", "limit", "seed"]
    names += ["rollouts", "every_step", "all", "steps"] if args.rollouts else ["samples"]
    settings = {name: getattr(args, name) for name in names}
    return {"problems": f"{Path(args.problems).name} {content}"} | settings


def collect(args: argparse.Namespace, done: dict, count: int) -> tuple[list[dict], dict]:
    """(rows in order, summary) of what the journals of all processes hold."""
    if args.rollouts:
        rows = [done[a,] for a in range(count) if (a,) in done]
        wrong = [row for row in rows if not row.get("correct")]
        located = sum(first_error_from_values(row["values"], row["agreement"]) is not None for row in wrong)
        rollouts = sum(counts[2] for row in rows for counts in row["agreement"] if counts)
        return rows, {"attempts": len(rows), "wrong": len(wrong), "rollouts": rollouts, "located": located}
    groups = [[done[i, j] for j in range(args.samples) if (i, j) in done] for i in range(count)]
    groups = [group for group in groups if group]
    return [row for group in groups for row in group], summarize(groups)


USAGE = """Sample solutions, grade them, and print a table of accuracies.

  score a checkpoint   python eval.py --model M --problems test.jsonl --out score.jsonl
  collect errors       python eval.py --model M --problems train.jsonl --out attempts.jsonl \\
                           --samples 2 --temperature 0.8 --top_p 0.95
  value their steps    python eval.py --model M --problems attempts.jsonl --out valued.jsonl --rollouts 8
  rectify              python eval.py --model M --problems errors.jsonl --out rectified.jsonl \\
                           --samples 20 --temperature 0.8 --top_p 0.95

Run by torchrun, the processes share the problems out. After any interruption, run the same command
again. Exit status: 0; 1 if rows of F were left out or a server failed on some (each is named; the same
command asks for those again); 2 if the command cannot be carried out."""


def arguments() -> argparse.ArgumentParser:
    as_it_stands = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="eval.py", description=USAGE, formatter_class=as_it_stands)
    add = parser.add_argument_group("what").add_argument
    add("--model", metavar="M", help="checkpoint folder or hub id")
    add("--problems", metavar="F", required=True,
        help="problems, or graded attempts for --rollouts: .jsonl, .json, .parquet, or a hub dataset "
             "(owner/name, whose test split is read, or owner/name:config/split)")
    add("--out", metavar="OUT", type=Path, required=True,
        help="graded samples, JSONL; beside it the .summary.json")
    add("--limit", metavar="K", type=positive, help="only the first K rows")
    add("--restart", action="store_true", help="begin anew, whatever an earlier run has left at OUT")
    add("--debug", action="store_true", help="show the traceback of an error")
    sampling = parser.add_argument_group("sampling")
    add = sampling.add_argument
    add("--prompt", choices=PROMPT_STYLES, default="chat",
        help="how a question becomes a prompt, as in training (default: %(default)s, the checkpoint's own "
             "template)")
    add_chat_options(sampling)
    add("--samples", metavar="N", type=positive, default=1,
        help="samples a problem (default: 1; the paper: 1 to score, 2 to collect errors, 20 to rectify)")
    add("--temperature", metavar="T", type=float,
        help="0 is greedy (default: 0; with --rollouts the paper's 0.8)")
    add("--top_p", metavar="P", type=float,
        help="mass of the likeliest tokens to sample from (default: 1; with --rollouts the paper's 0.95)")
    add("--max_new_tokens", metavar="N", type=positive, default=2048,
        help="a sample is cut off here (default: 2048, the paper's)")
    add("--stop", metavar="TEXT", nargs="+", default=[], help="a sample also ends before any of these texts")
    add("--seed", type=int, default=0, help="default: 0")
    add("--batch_size", metavar="N", type=positive, default=64,
        help="samples computed together, all of one problem's at least (default: 64)")
    add("--dtype", choices=("fp32", "bf16"), help="default: bf16 on a GPU, fp32 on a CPU")
    add("--device", help="default: cuda where there is one, else cpu")
    add = parser.add_argument_group("step values").add_argument
    add("--rollouts", metavar="N", type=positive,
        help="continue the wrong attempts in F from before their steps, about N times each (8 is good)")
    add("--every_step", action="store_true",
        help="N times before every step, instead of where it tells most about the first error")
    add("--all", action="store_true",
        help="right attempts too, with --every_step: what process reward models and Q-values are made from")
    add("--steps", choices=STEP_STYLES, default="auto", help="how steps are labelled (default: auto)")
    add = parser.add_argument_group("sampling from a server").add_argument
    add("--endpoint", metavar="URL",
        help="OpenAI-compatible server, as http://localhost:8000/v1; its key is read from OPENAI_API_KEY")
    add("--api_model", metavar="NAME", help="the name that the server knows the model by")
    add("--concurrency", metavar="N", type=positive, default=32,
        help="requests under way at a time (default: 32)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    parser = arguments()
    args = parser.parse_args(argv)
    if args.temperature is None:
        args.temperature = 0.8 if args.rollouts else 0.0
    if args.top_p is None:
        args.top_p = 0.95 if args.rollouts else 1.0
    if not 0 <= args.temperature < math.inf:
        parser.error(f"--temperature {args.temperature}: expected 0 or more")
    if not 0 < args.top_p <= 1:
        parser.error(f"--top_p {args.top_p}: expected more than 0, at most 1")
    if args.temperature == 0 and max(args.samples, args.rollouts or 1) > 1:
        parser.error("at temperature 0 all samples of a problem are the same; give --temperature 0.8, say")
    if args.rollouts and args.samples > 1:
        parser.error("--samples is for problems; with --rollouts N, N says how often a step is sampled")
    if args.endpoint and not args.api_model or not (args.endpoint or args.model):
        parser.error("give --model M, or --endpoint URL with --api_model NAME")
    if args.endpoint and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        parser.error("--endpoint needs no torchrun: --concurrency says how many requests are under way")
    if args.all and not (args.rollouts and args.every_step):
        parser.error("--all values right attempts as well, with --rollouts N --every_step")

    def run() -> int:
        check_out(args.out, args.problems)
        return evaluate(args)
    keep_freed_memory()
    return run_command(run, args.debug)


# ------------------------------------------------------------------------------------------------------------
# GRADING: two functions, text in, verdict out; tests/test_grading.py is its specification
# ------------------------------------------------------------------------------------------------------------
# extract_answer finds the answer in a text, is_equivalent says whether it is the right one.
# Both work on text that a model wrote, so both are bounded by construction, not by a clock: every pattern is
# linear in its input, texts are cut to a length, expressions have a largest size, depth and magnitude, and
# the numeric comparison counts its steps. Nothing of the text is ever executed.

LONGEST_COMPLETION = 200_000   # characters, from the end: an answer is given at the end
LONGEST_BOX = 4_000            # characters that a \boxed{} may hold
LAST_MATCHES = 50              # candidates of one kind that are looked at, from the end

END_TOKENS = re.compile(
    r"<\|(?:im_end|im_start|endoftext|eot_id|end_of_text|end|eom_id|start_header_id|user|assistant)\|>"
    r"|</s>|<s>|<eos>|<end_of_turn>|<｜[^｜<>\n]{1,30}｜>|\[/?INST\]|\n#{2,3} Instruction"
    r"|\n\n(?:Question|Q|Human|User):")
BOX = re.compile(r"(?:\\f?box(?:ed)?|\\framebox|\x08oxed|(?<![A-Za-z\\])boxed(?=\{))(?![A-Za-z])\s*")

# Characters by script, for use in [...]: the letters from Cyrillic on, which no formula has; those written
# without spaces between words, where a number has letters right beside it; signs of money.
FOREIGN = r"\u0400-\u1fff\u2c00-\u2dff\u3005-\u3007\u3040-\ud7ff\uf900-\ufdff\ufe70-\ufefc"
UNSPACED = r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u9fff\uac00-\ud7af"
MONEY = r"$¢£¥฿₠-₿﷼"

# Words by language. One of the nouns announces an answer, with a verb, a colon or a number soon behind it.
ANSWER_WORDS = ("antwort|réponse|reponse|respuestas?|respostas?|risposta|antwoord|svaret|svar|vastaus|"
                "odpowiedź|odpowiedz|odpověď|odpoveď|válasz|răspunsul|răspuns|cevap|yanıt|jawaban|"
                "jawabannya|jibu|đáp án|đáp số|câu trả lời|kết quả cuối cùng|ответ|ответы|відповідь|"
                "отговор|одговор|απάντηση|الجواب|جواب|الإجابة|الاجابة|إجابة|پاسخ|התשובה|תשובה|उत्तर|जवाब|"
                "উত্তর|సమాధానం|பதில்|விடை")
ANSWER_VERBS = ("ist|lautet|beträgt|sind|wäre|est|sont|es|son|sería|é|são|è|sono|is|zijn|är|er|blir|on|to|"
                "wynosi|je|jest|este|là|adalah|ialah|ni|هو|هي|است|برابر|היא|הוא|है|हैं|হল|হলো|είναι|это|"
                "равен|равна|равно|дорівнює|е")
BEFORE_LETTER = ("the|option|choice|letter|answer|opción|opcion|alternativa|alternative|letra|lettre|"
                 "réponse|buchstabe|respuesta|la|el|le|die|der|den|a|o|l'|вариант|варіант|буква|под|"
                 "phương án|câu|pilihan|opsi|seçenek|şık|lựa chọn|选项|選項|选|選|選択肢|ตัวเลือก|ข้อ|الخيار|خيار|"
                 "विकल्प|보기|선택지|번호")
ADVERBS = ("also|donc|somit|daher|folglich|por tanto|por lo tanto|entonces|portanto|quindi|dunque|więc|"
           "therefore|thus|hence|equal to|de|igual a|égale à|gleich|genau|exactly|则|就|应|应该|약|约|大约|大約|約")
REASON = "because|since|which|is|porque|weil|denn|da|car|puisque|perché|poiché|потому|так как|vì|karena|çünkü"
AND = "and|und|et|y|e|и|και|dan|ve|và|和|与|與|及|、|と|와|과|และ"
OR = "or|oder|ou|o|или|hoặc|atau|veya|或|或者|または|또는|หรือ"
JOINED = rf"{AND}|{OR}|to|than|plus|minus|times|bis|à|hasta|al|до|到|至|から|で割る|에서"

LETTER = r"[ *\"'“「:：]*\(?(?-i:([A-J])(?![A-Za-z\d]))"
LETTER += r"(?!\W{0,4}(?:(?:is|are|was) )?(?:not|wrong|incorrect|false)\b)"
SMALL_LETTER = r"[ *]*\((?-i:([a-j]))\)|[ *]*(?-i:([a-j]))(?=\)?\*{0,2}(?: is\b|[.,:;)]|\s*$))"
STATEMENT = re.compile("|".join((
    r"(?:(?<!/)\bans(?:wers?)?\b(?! (?:(?:an?|the|all|more|\d+) ){0,2}questions?\b| (?:wrong|right|to part|"
    r"to step)\b)"
    r"|\b(?:final|correct) (?:result|solution|options|choices)\b)[^.\n:=]{0,60}?(?:\b(?:is|are|be|was)\b"
    r"(?! worth)|[:=])",
    r"\bfinal answer\b(?![^\n]{0,60}(?:\bis\b|:))",
    r"(?:答案|正解|最终结果|最終結果)[^。.\n:=\d]{0,12}?(?:[选選][项項择擇][是为為]?|[是为為选選は】:=]|(?=\s?-?\d))",
    r"(?<![回问問作解])答(?:え)?[*\s]*(?:[:=]|は|是)|(?:정답|답)[*\s]*(?:[:=]|[은는이](?=[\s(*\d$\\])|(?=-?\d))",
    r"(?:คำตอบ|ตอบ)[^.\n:=\d]{0,15}?(?:[:=]|คือ|เป็น|(?=\s?-?\d))",
    rf"\b(?:option|choice|choose)\b(?: is\b| answer\b|:)?{LETTER}",
    rf"\b(?:pick|chose|select(?:ed)?|go(?:ing)? with)\b{LETTER}(?=\)?\*{{0,2}}(?:[.,:;]|\s*$|\s(?:{REASON})"
    rf"\b))",
    rf"\b(?:option|choice)\b(?: is\b|:)?(?:{SMALL_LETTER})",
    r"(?<!ngle )\b(?-i:([A-J]))\)?\*{0,2} (?:is|must be|would be) (?:"
    r"(?:correct|right)(?! (?!because|since|as|and|for)[a-z])"
    r"|(?:the |our )?(?:(?:right|correct|best|final) )?(?:answer|option|choice)\b)",
    r"\b(?-i:([b-hj])) is the (?:right|correct|best) (?:answer|option|choice)\b",
    r"\bit(?:'s| is|’s| must be| should be) +\*{0,2}\(?(?-i:([A-J]))(?=\)?\*{0,2}(?:[:.,)]|\s*$))",
    rf"(?<![不没沒])(?:[选選][择擇项項]?|選択肢)(?:的?[是为為はが]|应为)?[ *\"“「(:]*(?-i:([A-J]{{1,6}}))(?![A-Za-z\d])"
    r"(?![)」”\"\s*]*(?:[选選]?[项項])?[是为為]?(?:[不错錯誤误]|有误))",
    r"(?-i:(?<![A-Za-z\d])([A-J]))\)?(?:[选選]?[项項])?(?:[是为為がを이가을를은는]\s?)?(?:正[确確](?!性)|正解|정답|맞|選|선택)",
)), re.I)
FOREIGN_STATEMENT = re.compile(
    rf"(?<!\w)(?:{ANSWER_WORDS})(?!\w)[^.\n:=\d]{{0,40}}?"
    rf"(?:[:=]|(?<!\w)(?:{ANSWER_VERBS})(?!\w)|\s[—–-](?=\s)|(?=\s[($\\-]{{0,3}}\d)|(?=\s\(?(?-i:[A-J])\b)"
    rf")", re.I)
DENIED = re.compile(r"\b(?:no|any|without|that|this|an|your|each|every|to|(?:express|multiply) the) +"
                    r"(?:(?:final|correct|right|wrong|definite|clear) +)?$", re.I)
HASHES = re.compile(r"####[ \t]*([^\n]*)")
TAG = re.compile(r"<(?:final[_ ]?)?ans(?:wer)?>|\[(?:final[_ ]?)?answer\](?=.{0,400}\[/)", re.I)
FIELD = re.compile(r"""["'](?:(?:final|correct|my|the)[ _-]?)*(?:answer|ans|choice|option|result)["']\s*:"""
                   r"""\s*(?:"((?:\\.|[^"\\\n]){1,2000})"|"""
                   r"""'((?:\\.|[^'\\\n]){1,2000})'|\[([^][{}\n]{1,2000})\]"""
                   r"""|(?!null\b)([^][\s"',{}]{1,200}))""", re.I)
SENTENCE_END = re.compile(r"\n|(?<!\bMr)(?<!\bMrs)(?<!\bMs)(?<!\bDr)(?<!\bSt)(?<!\bRs)(?:[.!?;](?=\s|$|\*|"
                          r"[\"']))|,?\s\(?(?:because|since|which|as)\s")
GROUPED = (r"\d{1,3}(?:,\d{3}){1,9}(?!,?\d)|\d{1,2}(?:,\d{2}){1,6},\d{3}(?!,?\d)|\d{1,3}(?:\.\d{3}){2,9}"
           r"(?![.,]?\d)"
           r"|\d{1,3}(?:['’\u2009\u202f\xa0]\d{3}){1,9}(?![\d'’])|\d{1,3}(?: \d{3}){1,9}(?![\d/]| \d)")
NUMBER = re.compile(rf"(?:(?<![\w.)])-?|(?<=[{UNSPACED}])(?<!第)-?|(?<=[\u0590-\u06ff]))"
                    rf"(?:(?:\\?[{MONEY}]|(?:Rs|Fr|kr|Sh)\. ?)-?)?(?:(?:{GROUPED}|\d+)(?:\.\d+)?|\.\d+)"
                    r"(?:e[+-]?\d+)?(?:(?: \d+)?/\d+(?!\w|\.\d))?")
DECIMAL_COMMA = re.compile(r"(?<![\d.,(\[{])(\d{1,3}(?:\.\d{3})+|\d+),(\d{1,2}|\d{4,})(?![\d,])")
WORD = re.compile(r"(?:(?![Α-ω])[^\W\d_])*")   # Greek letters stand for numbers
LEAD_IN = re.compile(rf"(?:(?:{ADVERBS})(?![a-z])\s*)*"
                     rf"(?:(?:(?:{BEFORE_LETTER})(?![a-z])[\s:]*)+(?=[*\"'“(]*(?-i:[A-J](?![A-Za-z\d]))))?",
                     re.I)
MATHS = re.compile(r"\$\$([^$]+)\$\$|\$((?![ \d][^$]* \$)(?:\\\$|[^$\n])+)\$(?!\d)"
                   r"|\\\(((?:[^\\]|\\[^)(])+)\\\)|\\\[((?:[^\\]|\\[^\][])+)\\\]")
CHOICE = re.compile(rf"(?:\(([A-J])\)|([A-J])(?=[).:,]|\s*$|\s(?:{REASON})\b|[*\s)]*[{UNSPACED}]))")
CHOICES = re.compile(rf"\(?[A-J]\)?(?:(?:\s*[,、&]\s*(?:(?:{AND}|{OR})\s)?|\s*(?:{AND}|{OR})\s*)\(?[A-J]\)?"
                     rf"(?![A-Za-z\d]))+(?=\s*$|[.;]|[{UNSPACED}]|\s(?:are|{REASON})\b)")
TUPLE_AT_END = re.compile(r"(?:\b(?:is|are)\b|区间|集合|[是为為は=:])\s*((?:[([]|\\?\{)[^][(){}\n]{1,100},"
                          r"[^][(){}\n]{1,100}(?:[])]|\\?\}))[\s.$]*\Z")
NO_ANSWER = set("given not unknown unclear undetermined determined possible found provided correct wrong "
                "incorrect right none as in a based obtained therefore required".split())


def extract_answer(completion: str) -> str | None:
    """The final answer that a completion gives, or None. Nothing counts that stands behind an
    end-of-turn token or before </think>.

    The first rule that yields something decides:
        1. the last <answer>...</answer>, unless a box follows it: the rules below, on what is in it
        2. the last \\boxed{...} or \\fbox{...} that is not empty: what is in it, verbatim; if its brace is
           never closed, up to the end of the line. Boxes that are parts of one answer ("x = [3] and y = [5]")
           are joined
        3. the last JSON field "answer"
        4. the last explicit statement: "the answer is ...", "answer: ...", "final answer ...", "option B",
           "#### ...", in some thirty languages. Its maths, choice letter ("B", or "(b)" for a small one),
           number (without money sign, thousands commas, unit), or short text
        5. a last line that is nothing but a choice letter; a whole text that is a choice ("B. 12")
        6. the last number, with the formula it stands in. "1.2 (million)": 1.2 where millions are asked for
        7. where there is no digit at all, a number in words in the last sentence
    """
    text = completion[-LONGEST_COMPLETION:].replace("\u2212", "-")
    text = next((part for part in END_TOKENS.split(text) if part.strip()), "")
    text = re.sub(r"\$?\\boxed\s?\{\s?\}\$?", " ", _ascii(text))  # the instruction, echoed
    thoughts, _, text = text.rpartition("</think>")
    if not text.strip():
        text = thoughts

    boxes, tagged = _last(BOX, text), False
    for tag in _last(TAG, text):
        inside = re.split(r"</|\[/", text[tag.end():], maxsplit=1)[0].strip()
        if re.search(r"\w", inside) and not (boxes and boxes[0].start() > tag.end() + len(inside)):
            text, boxes, tagged = inside, _last(BOX, inside), True
            break
    if answer := _boxed(text, boxes):
        return answer
    for field in _last(FIELD, text):
        value = re.sub(r"\\([\\\"'])", r"\1", field[field.lastindex]).strip()
        if answer := re.sub(r"[\"']", "", value) if field.lastindex == 3 else _stated(value) or value:
            return answer
    statements = _last(STATEMENT, text) + _last(FOREIGN_STATEMENT, text) + _last(HASHES, text)
    for match in sorted(statements, key=lambda m: -m.end()):
        answer, tail = None, text[match.end():match.end() + LONGEST_BOX]
        if match.re is HASHES:  # but not "#### 2. Counting", a heading
            line = match[1][:LONGEST_BOX].strip()
            if re.match(r"[\d(\[\\$.+{-](?!.{0,3}[.)]\s+\w)", line) or not text[match.end():].strip():
                answer = _stated(line)
        elif match.re is FOREIGN_STATEMENT:
            answer = _stated(DECIMAL_COMMA.sub(lambda m: m[1].replace(".", "") + "." + m[2], tail))
        elif match.lastindex:
            letter = match[match.lastindex]
            answer = letter if letter.isupper() else f"({letter})"
        elif not DENIED.search(text, max(0, match.start() - 20), match.start()):  # "no answer is given"
            answer = _stated(tail)
        if answer:
            return answer
    if tagged and "\n" not in text and (answer := _stated(text)):
        return answer
    if letter := re.fullmatch(r"[\s*]*\(?([A-J])[).]?[\s*]*", text.strip().rpartition("\n")[2][-20:]):
        return letter[1]
    if re.fullmatch(r"\(?[A-J][).] [^\s=][^\n=]{0,40}", text.strip()):
        return text.strip()
    return _last_value(text) or _last_words(text)


def _last(pattern: re.Pattern, text: str) -> list[re.Match]:
    """The last matches, the very last one first."""
    return list(pattern.finditer(text))[:-LAST_MATCHES - 1:-1]


WIDE = {0xFEE0 + ord(c): c for c in map(chr, range(0x21, 0x7F))} | {ord(c): t for c, t in zip("，、。।۔؟،٫٬￥￡", (
    ", ", "、", ". ", ". ", ". ", "? ", ", ", ".", ",", "¥", "£"))}


def _ascii(text: str) -> str:
    """Digits of every script, full-width letters and signs, as ASCII."""
    return re.sub(r"(?![0-9])\d", lambda m: str(unicodedata.decimal(m[0])), text.translate(WIDE))


# What may stand between two boxes of one answer: "cm, ", "and y =", a new line with "(b)"; nothing that
# corrects.
LABEL = r"(?:[-•]\s*)?(?:part\s)?\(?[a-h1-9]{1,2}[).:]+"
NAMED = r"(?:[-•]\s*)?[^\W\d]\s*[=:]"
JOINT = re.compile(
    rf"\s*(?:[^\W\d]+\s*)?(?:[.;,]?\s*\n\s*(?={LABEL}|{NAMED})|\.\s+(?={NAMED})"
    rf"|[,;、\s]*(?<!\w)(?:{AND}|(?P<or>{OR}))(?![a-z])|[,;、](?:\s*,)?)\s*(?:[-•]\s*)?(?:{LABEL}\s*)?"
    r"(?:(?!(?:so|thus|hence|therefore|then|corrected|correcting|actually|wait|no|not|but|total|sum|final|"
    r"finally|answer|gives|giving|result|instead|again|namely)\b)[^\W\d]+[\s:]*){0,6}=?\s*", re.I)


def _boxed(text: str, boxes: list[re.Match]) -> str | None:
    """What is in the last box that is not empty; before it, what is in the boxes that it is joined to."""
    answer = last = next_start = None
    for box in boxes:
        content = _box_content(text, box.end())
        if not content:
            continue
        if answer is not None:
            between = text[text.find(content, box.end()) + len(content):next_start]
            between = re.sub(r"\\q?quad|\\\\", ",", between[:200])
            between = re.sub(r"\\text|\\[,; ()\[\]]|_\{?\w\}?|[\\${}&*]", " ", between)
            joint = JOINT.fullmatch(between) if len(between) <= 100 else None
            if not joint or joint["or"] and re.fullmatch(r"\(?[A-J]\)?", last):
                break
            if content != last:
                answer = content + (" or " if joint["or"] else ", ") + answer
        answer, last, next_start = answer or content, content, box.start()
    return answer


def _box_content(text: str, start: int) -> str:
    """What follows \\boxed: a group in braces, or what stands there without any."""
    text = text[start:start + LONGEST_BOX]
    if not text.startswith("{"):
        return re.match(r"(?:\\[A-Za-z]+(?:\{[^{}]*\})*|\\.|[^\s$\\{}])*", text)[0].strip(".,;")
    depth = i = 0
    while i < len(text):
        depth += (text[i] == "{") - (text[i] == "}")
        if depth == 0:
            break
        i += 2 if text[i] == "\\" else 1
    inside = text[1:i].strip()
    if depth:
        inside = re.split(r"\n|\$|\\\]|\\\)|[.!?]\s", inside, maxsplit=1)[0].rstrip(" .,")
    return inside[1:-1].strip() if re.fullmatch(r"\$[^$]+\$", inside) else inside


def _plain_number(text: str) -> str:
    """Without money signs and separators of thousands; the space of 2 1/2 stays."""
    text = re.sub(rf"[\\{MONEY},'’]|(?:Rs|Fr|kr|Sh)\. ?", "", text)
    text = re.sub(r"(?<=\d)[ \u2009\u202f\xa0](?=\d{3}(?![\d/]))", "", text)
    return text.replace(".", "") if text.count(".") > 1 else text


def _formula(match: re.Match) -> str:
    """What is between the dollar signs of a match of MATHS."""
    return next(group for group in match.groups() if group).strip()


def _stated(tail: str) -> str | None:
    """The answer at the beginning of what follows "the answer is"."""
    bullet = "-" if re.match(r"[\s*:]*[-*]\s", tail) else ""
    tail = re.sub(r"^(?:is|be|are|of)\b", "", tail.lstrip(" \t\r\n*:_=`>" + bullet)).lstrip(" \t\r\n*:_=`")
    tail = LEAD_IN.sub("", tail, count=1)
    formulas = []
    while maths := MATHS.match(tail):  # "$1$, $2$ and $3$"
        formulas.append(_formula(maths).rstrip(" .,"))
        tail = re.sub(rf"^,?\s*(?:(?:{AND}|{OR}|,)(?![a-z]))?\s*", "", tail[maths.end():])
    if formulas:
        return ", ".join(formulas) or None
    sentence = SENTENCE_END.split(tail, maxsplit=1)[0].strip(" *`\"'“”「」_,")
    if letters := CHOICES.match(sentence):
        separator = " or " if re.search(rf"(?<!\w)(?:{OR})", letters[0]) else ", "
        return separator.join(re.findall(r"[A-J]", letters[0]))
    if letter := CHOICE.match(sentence):
        return letter[1] or letter[2]
    if letter := re.match(r"\(?([a-j])\)?$|\(?([a-j])\)\s(?!.*\([a-j]\))", sentence):
        return f"({letter[1] or letter[2]}) {sentence[letter.end():]}".strip()
    if number := _han_number(sentence) or _worded(sentence):
        compared = re.match(rf"\W*(?:of|more|less|fewer|{JOINED})(?!\w)", sentence[number[1]:])
        if not compared or "/" in number[0]:
            return sentence[:number[1]]
    if number := NUMBER.match(sentence):
        behind = re.sub(rf"^(?:['’]|-(?=[{FOREIGN}]))[^\W\d]+", "", sentence[number.end():])  # 42'dir, 42-й
        rest = behind.strip(" ,")
        word = WORD.match(rest)[0]
        if rest in ("%", "\\%"):
            return _plain_number(number[0]) + "%"
        if word.lower() in SCALES:
            return f"{_plain_number(number[0])} {word.lower()}"
        if re.match(rf"[{UNSPACED}]+-?\d", rest):                                  # 3小时20分钟, 3和5
            return sentence
        clause = re.split(r"[,;(]", rest, maxsplit=1)[0] if re.match(f"[{FOREIGN}]", word) else rest
        counted = (re.match(f"[{FOREIGN}]", word)
                   or len(word) > 1 and (word in UNITS or word not in WORDS_OF_MATHS))
        joined = re.search(rf"^(?:\w+ )?(?:{JOINED}) \S?\d|[=+^\\]", clause)  # 12 apples for 3 people; 30 min
        said = re.findall(rf"(?<!\\)\b[^\W\d_]{{2,}}|[{FOREIGN}]", rest)
        aside = (re.match(rf"\s?[,(](?!\s*[-\d.]+ ?(?:,|{AND}|{OR})(?!\w))", behind)     # 42, 3 more than 39
                 and any(w.lower() not in WORDS_OF_MATHS for w in said))
        if rest in ("", "/-") or aside or counted and not joined:
            return _plain_number(number[0])
    plain = re.sub(r"\\[a-z]*(?:text|rm|box|begin|end)[a-z]*\s*\{[^{}]*\}", "", sentence)
    words = {word.lower() for word in re.findall(rf"(?<![A-Za-z\\])[A-Za-z]{{3,}}|[{FOREIGN}]+", plain)}
    if words <= WORDS_OF_MATHS and re.search(r"\d|[\\=^/*+]|^\w$", sentence):
        return sentence
    if inner := _last_value(sentence):
        return inner
    said = sentence.split()
    return sentence if 1 <= len(said) <= 4 and said[0].lower() not in NO_ANSWER else None


def _last_value(text: str) -> str | None:
    """The last number, as plain digits; if it stands in a formula ($...$), what follows the last equals sign
    there; if it stands in a pair or interval that ends the text ("is (0, 1]."), all of that."""
    number, formula = (next(iter(_last(pattern, text)), None) for pattern in (NUMBER, MATHS))
    if formula and (number is None or formula.start() <= number.start() < formula.end()):
        answer = _formula(formula).rpartition("=")[2].lstrip(" &\n").rstrip(" &.,\\\n")
        if 0 < len(answer) <= 200 and re.search(r"\d", answer):
            return _plain_number(answer) if NUMBER.fullmatch(answer) else answer
    if not number:
        return None
    if pair := TUPLE_AT_END.search(text, max(0, number.start() - 250)):
        return pair[1]
    scale = SCALE.match(text, number.end())
    return _plain_number(number[0]) + (f" ({scale[1].lower()})" if scale else "")


def _last_words(text: str) -> str | None:
    """The last number in words of the last sentence, for a text without digits; "one" may be a pronoun."""
    sentences = [s for s in SENTENCE_END.split(text[-LONGEST_BOX:]) if s and re.search(r"\w", s)]
    if not sentences:
        return None
    if han := re.search(rf"(?:[是为為有共得剩了]|等于)\s*([{HAN}].*)", sentences[-1]):
        return (_han_number(han[1]) or [None])[0]
    found = [m[0] for m in WORDED.finditer(sentences[-1]) if not m["ordinal"] and m[0].lower() != "one"]
    return found[-1] if found else None


# ---- numbers in words, English and Chinese ----

SCALES = {word: value for value, words in {
    100: "hundred", 1_000: "thousand тысяч тысячи mille tausend ribu nghìn พัน", 10_000: "万 萬 만",
    100_000: "lakh lakhs लाख", 10**7: "crore crores करोड़", 10**8: "亿 億 억",
    10**6: "million millions mln millones millón milhões milhão milioni milione millionen миллион миллиона "
           "миллионов млн juta triệu ล้าน",
    10**9: "billion billions bn milliard milliards milliarden miliardi миллиард миллиарда миллиардов млрд "
           "miliar tỷ",
    10**12: "trillion trillions"}.items() for word in words.split()}
SCALE = re.compile(rf"\s?({'|'.join(sorted(SCALES, key=len, reverse=True))})(?![A-Za-z])", re.I)
CARDINALS = {word: n for n, word in enumerate(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen".split())}
TENS = {word: 10 * n for n, word in enumerate(
    "twenty thirty forty fifty sixty seventy eighty ninety".split(), 2)}
ORDINALS = {word: n for n, word in enumerate(
    "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth thirteenth "
    "fourteenth fifteenth sixteenth seventeenth eighteenth nineteenth".split(), 1)}
ORDINALS |= {word[:-1] + "ieth": n for word, n in TENS.items()}
PARTS = {word + s: n for word, n in ORDINALS.items() if n > 2 for s in ("", "s")}
PARTS |= {"half": 2, "halves": 2, "quarter": 4, "quarters": 4, "hundredth": 100, "hundredths": 100}


def _worded_pattern() -> re.Pattern:
    def one_of(words):
        return "(?:" + "|".join(sorted(words, key=len, reverse=True)) + ")"

    tens, small = one_of(TENS), one_of(CARDINALS)
    below_100 = rf"(?:{tens}(?:[- ]{small})?|{small})"
    below_1000 = rf"(?:(?:(?:an?|{small}) )?hundred(?:(?: and)? {below_100})?|{below_100})"
    above = rf" (?:thousand|million|billion|trillion)(?:,?(?: and)? {below_1000})?"
    cardinal = rf"(?:(?:{below_1000}|an?)(?:{above}){{1,4}}|{below_1000})"
    return re.compile(
        rf"\b(?:(?P<minus>minus|negative) )?(?:(?P<ordinal>(?:{tens}[- ])?{one_of(ORDINALS)})"
        rf"|(?:(?P<whole>{cardinal}) and )?(?:(?P<top>an?|{below_100})[ -])?(?P<part>{one_of(PARTS)})"
        rf"|(?P<cardinal>{cardinal})(?: point(?P<digits>(?: {small})+))?)(?![\w-])", re.I)


WORDED = _worded_pattern()


def _sum_of(words: str | None) -> int:
    """The number that is written "two thousand one hundred and five"."""
    total = part = 0
    for word in re.findall("[a-z]+", (words or "").lower()):
        if word in SCALES:
            part = (part or 1) * SCALES[word]
            if part >= 1000:
                total, part = total + part, 0
        elif word != "and":
            part += (CARDINALS | TENS | ORDINALS | {"a": 1, "an": 1})[word]
    return total + part


def _worded(text: str) -> tuple[str, int] | None:
    """The number that a text begins with in English words, and where it ends: "two km" -> ("2", 3)."""
    match = WORDED.match(text)
    if not match:
        return None
    if match["part"]:
        part = Fraction(_sum_of(match["top"]) or 1, PARTS[match["part"].lower()])
        value = str(_sum_of(match["whole"]) + part)
    else:
        value = str(_sum_of(match["ordinal"] or match["cardinal"]))
    if match["digits"]:
        value += "." + "".join(str(CARDINALS[word]) for word in match["digits"].lower().split())
    return ("-" if match["minus"] else "") + value, match.end()


HAN_VALUES = {c: n for n, chars in enumerate("零〇 一 二两兩 三 四 五 六 七 八 九".split()) for c in chars}
HAN_SCALES = {"十": 10, "百": 100, "千": 1000} | {c: n for c, n in SCALES.items() if len(c) == 1}
HAN = "".join([*HAN_VALUES, *HAN_SCALES])
MEASURES = ("个個只隻条條本元円圆人名位天日岁歲块塊张張件头頭辆輛棵支枝页頁分秒时時小米厘公毫克千升年月周星倍斤吨度份杯袋箱瓶台双对颗粒层平立")
_HAN = rf"(?:\d+(?:\.\d+)?|(?!千[克米瓦卡])[{HAN}])(?:(?!千[克米瓦卡])[{HAN}]|(?<=[{HAN}])\d+(?:\.\d+)?)*"
HAN_NUMBER = re.compile(rf"([-负負])?(?:({_HAN})又)?(?:({_HAN})分之)?({_HAN})(?:点([{''.join(HAN_VALUES)}]+))?"
                        rf"(?!元[一二三])(?=\W|$|[{MEASURES}でだ])")


def _han_number(text: str) -> tuple[str, int] | None:
    """The number that a text begins with in Chinese numerals: "四十二个" -> ("42", 3), "1.2万" -> ("12000", 4)."""
    if text.startswith("一半"):
        return "1/2", 2
    match = HAN_NUMBER.match(text[:100])
    if not match or not re.search(f"[{HAN}分]", match[0]):
        return None
    minus, whole, bottom, top, digits = match.groups()
    value = _han_value(top) if not bottom else _han_value(top) / (_han_value(bottom) or 1)
    value += _han_value(whole or "")
    number = str(value) + ("." + "".join(str(HAN_VALUES[c]) for c in digits) if digits else "")
    return ("-" if minus else "") + number, match.end()


def _han_value(text: str) -> Fraction:
    total = section = digit = Fraction(0)
    for token in re.findall(r"\d+(?:\.\d+)?|.", text):
        scale = HAN_SCALES.get(token, 0)
        if scale >= 10_000:                                                       # 三亿五千万; 一万亿
            below = section + digit
            total = total + below * scale if total > scale else (total + below or 1) * scale
            section = digit = Fraction(0)
        elif scale:
            section, digit = section + (digit or 1) * scale, Fraction(0)
        else:
            digit = digit * 10 + HAN_VALUES[token] if token in HAN_VALUES else Fraction(token)
    return total + section + digit


# ---- is_equivalent: texts -> tokens -> tree -> verdict ----

LONGEST_ANSWER = 2_000   # characters; longer ones are compared as text only
MOST_TOKENS = 600        # of one answer
DEEPEST = 20             # brackets, roots, exponents, signs inside each other
MOST_BITS = 20_000       # of the numerator or denominator of an exact number
MOST_WORK = 6_000        # tree nodes visited by the numeric comparisons of one call
DIGITS = 50              # decimal digits of the numeric comparisons

FUNCTIONS = set("sin cos tan cot sec csc arcsin arccos arctan asin acos atan sinh cosh tanh ln log lg exp "
                "sqrt max min gcd lcm".split())
TRIGONOMETRIC = {"sin", "cos", "tan", "cot", "sec", "csc"}
SYMBOLS = set("alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu "
              "xi rho sigma tau upsilon phi varphi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Phi "
              "Psi Omega ell hbar dots ldots cdots angle triangle".split())
WORDS_OF_MATHS = FUNCTIONS | {"pi", "inf", "infty", "infinity", "oo", "and"}
# Units in their spellings: 5 cm is not 5 m. A unit that only one side has, or that is not here, is ignored.
UNITS = {name: spellings.split()[0] for spellings in (
    "mm millimeter millimeters millimetres 毫米, cm centimeter centimeters centimetres 厘米 公分 センチ сантиметров, "
    "m meter meters metre metres metros mètres 米 メートル 미터 метров, km kilometer kilometers kilometres 千米 公里 キロ "
    "километров, in inch inches 英寸, ft foot feet 英尺, yd yard yards, mi mile miles 英里, "
    "s sec second seconds 秒 秒钟 секунд, min mins minute minutes minuten minutos 分钟 分鐘 minuti минут, "
    "h hr hrs hour hours stunden heures horas ore 小时 小時 時間 시간 часов часа, day days tage jours días 天 日 дней, "
    "week weeks 周 星期, month months 月 个月, year years yr yrs 年, mg 毫克, g gram grams gramm 克 グラム 그램, "
    "kg kilogram kilograms 千克 公斤 キログラム, lb lbs pound pounds 磅, oz ounce ounces, ml milliliter milliliters 毫升,"
    " "
    "l liter liters litre litres litros 升, cent cents, dollar dollars usd 美元, yuan 元, yen 円, won 원, euro "
    "euros eur, "
    "rupee rupees rs inr, kr, chf, zł, gbp, am, pm, mph, kph, km/h, m/s, hz, kw, gb, mb, sq, deg degree "
    "degrees 度, "
    "rad radian radians, unit units, th st nd rd").split(",") for name in spellings.split()}
# What a foreign language puts for "and", "or", "approximately" in an answer; whole words only.
SPELLED = [(re.compile(pattern, re.I), spelling) for pattern, spelling in (
    (r"(?<=[\d)}\]$])\s*(?:、|和|与|與|及|と|와|과|และ)\s*(?=[-\d(\[\\{$a-z])", ", "),
    (r"(?<=[\d)}\]$]) (?:und|et|y|e|и|dan|ve|và) (?=[-\d(\[\\{$])", ", "),
    (r"(?<=[\d)}\]$])\s*(?:或者?|または|또는|หรือ| oder | ou | o | или )\s*(?=[-\d(\[\\{$a-z])", " or "),
    (r"^(?:US|CA|AU|HK|NT|NZ|[ACRS])\\?\$ ?(?=-?[\d.])", ""),
    (r"(?<=\d) ?/[-=]$", ""),                                                     # 500/-
    (r"\{ ?(\d+) ?\\over ?(\d+) ?\}", r"\\frac{\1}{\2}"),                          # 2{1\over 2} is mixed
    (r"\\root ?(\{[^{}]*\}|\w) ?\\of(?![a-z])", r"\\sqrt[\1]"),
    (r"\\(?:R|[rR]eals)(?![A-Za-z])", "ℝ"),
    (r"(?<=\d)'(?=\d{3}(?!\d))", ""),                                           # 1'000'000
    (r"^(-?\d{1,3})((?:\.\d{3}){2,})$", lambda m: m[1] + m[2].replace(".", "")),
)]
PRICE = re.compile(r'^"? ?(?:Rs\.?|INR|CHF|USD|EUR|GBP|JPY|CNY|RMB|kr\.?|zł)"? ?(-?[\d.,]+) ?"?$')
LEADING = re.compile(
    r'^"?\s*(?:(?:so|thus|hence|therefore),? )?(?:(?:the |our |my )?(?:final |correct )?(?:answer|ans|result|'
    r'solution|'
    r'total)(?: is| are|:| =)|there (?:are|is|will be)|a total of|it is|(?:答案|答)[是为為:]+|[一总總]?共有?)"?\s*:?\s*'
    r'(?=[\d\\({[$-])', re.I)



def _translations() -> dict[int, str]:
    signs = {"−–—‐‑﹣－": "-", "×✕": r"\times ", "·⋅∙•": r"\cdot ", "÷∕⁄": "/", "π": r"\pi ", "∞": r"\infty ",
             "≤⩽": "<=", "≥⩾": ">=", "≠": "!=", "±": r"\pm ", "∓": r"\mp ", "∪": r"\cup ", "∈": r"\in ",
             "°º˚": r"\circ{}",
             "′’‘": "'", "≈": r"\approx ", "∅": r"\emptyset ", "√": r"\sqrt ", "ℝ": r"\mathbb{R}", "“”": '"',
             "、": ", ", "∣": "|", "∖": r"\setminus ", "∠": r"\angle ", "\0": ""}
    table = dict.fromkeys([*map(ord, "£¥฿﷼"), *range(0x20A0, 0x20D0)], "") | {ord("¢"): " cent "}
    table |= {ord(c): to for chars, to in signs.items() for c in chars}
    table |= {ord(c): "^{%d}" % n for n, c in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")}
    table |= {ord(c): "_{%d}" % n for n, c in enumerate("₀₁₂₃₄₅₆₇₈₉")}
    for c in "¼½¾⅓⅔⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞":
        table[ord(c)] = r"\frac{%s}{%s}" % tuple(unicodedata.normalize("NFKC", c).split("⁄"))
    for c in "αβγδεζηθικλμνξρστυφχψωΓΔΘΛΞΠΣΦΨΩ":
        name = unicodedata.name(c).split()[-1].replace("LAMDA", "LAMBDA")
        table[ord(c)] = "\\" + (name.capitalize() if c.isupper() else name.lower()) + " "
    return table


UNICODE = _translations()
SAME = dict(pair.split("→") for pair in (
    r"\dfrac→\frac \tfrac→\frac \cfrac→\frac \nicefrac→\frac \sfrac→\frac \flatfrac→\frac \dbinom→\binom "
    r"\tbinom→\binom \$→ $→ \leqslant→<= \geqslant→>= \leq→<= \geq→>= \neq→!= \lvert→| \rvert→| \mid→| "
    r"\vert→| \%→% \lbrace→\{ \rbrace→\} \(→ \)→ \[→ \]→ **→^ p.m.→pm a.m.→am P.M.→pm A.M.→am p.m→pm "
    r"a.m→am P.M→pm A.M→am \&→& \_→_ \degree→\circ{} \textdegree→\circ{} \lbrack→[ \rbrack→] \lparen→( "
    r"\rparen→) \langle→( \rangle→) \lor→or \vee→or \land→, \wedge→, \colon→:"
).split(" "))
SAME |= {old: f" {new} " for old, new in SAME.items()
         if new in ("pm", "am", "or") or old[1:] in ("(", ")", "[", "]")}
COLOR = re.compile(r"\\(?:text)?color(?:box)?\s*(?:\[\w+\]\s*)?\{[^{}]*\}|"
                   r"\\fcolorbox\s*\{[^{}]*\}\s*\{[^{}]*\}")
ALIGNED = re.compile(r"\\begin\{(aligned|align\*?|gather(?:ed)?\*?|split|equation\*?|eqnarray\*?)\}(.*?)"
                     r"\\end\{\1\}", re.S)
INTERVAL = re.compile(r"(^|\\cup|\\in(?![a-z])|[=,]) ?"
                      r"([][])([^][]{1,200}[,;][^][]{1,200})([][])(?= ?(?:$|\\cup|\\setminus|,|\)))")
BUILDER = re.compile(r'\\?\{ ?([A-Za-z]) ?(?:\\in ?ℝ ?)?(?:[:|]|,? "(?:such that|s\.t\.?|where|for which)")')
ALL_REALS = re.compile(r'^(?:[a-z] (?:\\in|=|"?(?:is|can be)"?) )?"?(?:the set of |set of )?'
                       r'(?:(?:all|any)(?: the)? )?(?:reals|real (?:numbers?|values)|real"? [a-z]\b)'
                       r'(?: of [a-z])?"?(?! ?(?!except|other|excl|but)\w)', re.I)
STYLE = re.compile(r"\\(text|textbf|textrm|textit|textsf|texttt|textnormal|textup|textsc|mathnormal|mathtt|bm"
                   r"|ensuremath|mbox|hbox|mathrm|mathbf|mathsf|mathit|"
                   r"mathbb|bold|operatorname|boldsymbol|emph|underline|overline|bar|vec|hat|widehat|fbox|rm|"
                   r"bf)\*?\s*\{([^{}]*)\}")
ORNAMENTS = set("bm mathbf boldsymbol bold underline overline bar vec hat widehat fbox mathit".split())
LAYOUT = re.compile(r"(?<!\\)\\(?:(?:left|right|[bB]igg?[lrm]?|displaystyle|textstyle|scriptstyle|limits|quad"
                    r"|qquad|noindent|rm|bf|"
                    r"tiny|small|normalsize|large|Large|LARGE|huge|Huge|boldmath|checkmark|hfill|pounds|yen|"
                    r"euro|enspace|thinspace|therefore|"
                    r"(?:hspace\*?|phantom|tag|label)\{[^{}]*\})(?![A-Za-z])\.?|[!,;: ]|$)|~")
DEGREE = re.compile(r"(?<=\d)\^\s*\{?o\}?(?![A-Za-z])|\^\s*(?:\{\s*\\circ\s*(?:\{\})?\s*\}|\\circ(?![A-Za-z])"
                    r"(?:\{\})?)|\\circ\{\}")
SPEED = re.compile(r"(?<=\d) ?((?:[kcm]?m|ft|mi|miles|k?g|mg|gal)/(?:s|h|hr|hour|sec|min|m?L|day))"
                   r"(?![A-Za-z])")
COMPARED = {"le": "<=", "lt": "<", "ge": ">=", "gt": ">", "ne": "!="}


def _clean(text: str) -> str:
    """The text with one spelling for what only looks different. Words in \\text{} become "quoted"."""
    text = unicodedata.normalize("NFKC", text.translate(UNICODE)).translate(UNICODE)
    text = _ascii(text).replace('"', " ").strip().rstrip("\\").strip()
    if box := BOX.search(text):
        text = _box_content(text, box.end())
    # 10,\!000 and 10{,}000
    text = re.sub(r"(?<=\d)(?:,\s?\\!\s*|\{,\})(?=(?:\d\d\{,\})*\d{3}(?!\d))", "", text)
    text = re.sub(r"(?<=\d)(?:\\[,;! ]|~|\\ )+(?=\d{3}(?!\d))", "", text)         # 10\,000
    text = re.sub(r"(\d{0,30})\.(\d{0,30})\\(?:overline|bar|dot)\s?\{(\d{1,30})\}", _repeating, text)
    text = re.sub(r"\\\\ ?\[[\d.]{1,6} ?(?:pt|em|ex|mm|cm)\]", r"\\\\ ", text)    # row spacing in a matrix
    text = ALIGNED.sub(_one_line, re.sub(r"\{(\{[^{}]*\})\}", r"\1", COLOR.sub("", text)))
    text = re.split(r"\\(?:implies|[Rr]ightarrow|Longrightarrow)(?![A-Za-z])(?=.)", text)[-1]
    for pattern, spelling in SPELLED:
        text = pattern.sub(spelling, text)
    for old, new in SAME.items():
        text = text.replace(old, new)
    text = re.sub(r"\\mathbb ?([A-Z])", r"\\mathbb{\1}", text)
    for _ in range(4):                                                            # \textbf{\text{...}}
        text = STYLE.sub(_unstyle, text)
    text = re.sub(r"(?<=\d) x (?=\d)", r" \\times ", LAYOUT.sub(" ", text))
    text = DEGREE.sub(r"\\deg ", SPEED.sub(r' "\1"', text))
    text = re.sub(r"\\deg +(?:\"?[CF]\"?)(?![A-Za-z])", r"\\deg ", text)
    text = PRICE.sub(r"\1", LEADING.sub("", text.strip()))
    text = re.sub(r"^(?:(?:approximately|about|roughly|around|\\approx|etwa|environ|около)\s|大?[约約])", "",
                  text.strip(), flags=re.I)
    text = re.sub(r"ℝ ?[\^_] ?\{? ?(?:\+|> ?0) ?\}?", r"(0,\\infty)", text)
    text = INTERVAL.sub(_interval_ends, BUILDER.sub(r"\\{ \1 |", text))
    if reals := ALL_REALS.match(text):
        rest = text[reals.end():]
        holes = re.fullmatch(r'[" ,]*(?:except|other than|excluding|but not)(?: for)?[" ]*([^"]+)[" ]*', rest)
        text = "ℝ" + (f" \\setminus \\{{ {holes[1]} \\}}" if holes else rest)
    text = re.sub(r"\\(le|lt|ge|gt|ne)(?![A-Za-z])", lambda m: COMPARED[m[1]], text)
    text = re.sub(r"(?<=[)\]]) ?U ?(?=[(\[])", r"\\cup ", text)
    text = re.sub(r"\s+", " ", text.replace("{}", "")).strip()
    if not re.search(rf" \((?:{'|'.join(SCALES)})\)$", text):
        text = re.sub(r"(?<=\d) ?\([A-Za-z]{3,}[A-Za-z ]*\)$", "", text)          # 18 (dollars)
    while text and (text[-1] in ".,;:" or text.endswith("\\\\")) and not text.endswith("..."):
        text = text[:-1].rstrip("\\ ")
    words = text.strip('" ')
    if number := _han_number(words) or _worded(words):
        rest = words[number[1]:]
        if not rest or re.match(rf"[{FOREIGN}]|(?: of (?:the|a|an))? [a-z]{{3,}}\Z", rest):
            return number[0] + rest.replace(" of", "")
    return text


def _one_line(match: re.Match) -> str:
    """The lines of an alignment as one: "x &= 2 + 3 \\\\ &= 5" is x = 2 + 3 = 5, other lines are items."""
    inside = match[2]
    if "\\begin" in inside:
        return inside
    return re.sub(r"\\\\\s*(?!\s*$)", ", ", re.sub(r"\\\\\s*=", "=", inside.replace("&", "")))


def _interval_ends(match: re.Match) -> str:
    """]0, 1[ as (0, 1)."""
    before, left, inside, right = match.groups()
    return f"{before} {'(' if left == ']' else '['}{inside}{')' if right == '[' else ']'}"


def _repeating(match: re.Match) -> str:
    """0.1\\overline{6} as a fraction."""
    whole, fixed, again = match.groups()
    value = int((whole or "0") + fixed) + Fraction(int(again), 10 ** len(again) - 1)
    return "(%d/%d)" % (value / 10 ** len(fixed)).as_integer_ratio()


def _unstyle(match: re.Match) -> str:
    style, inside = match[1], match[2].replace("~", " ")
    word = inside.strip().rstrip(".")
    if style in ORNAMENTS:
        return "{" + inside + "}" if inside.strip() else " "
    if style == "mathbb":
        return " ℝ " if word == "R" else f" \\Set{word} "
    if word.lower() in ("and", "or"):
        return f" {word.lower()} "
    if re.fullmatch(r"\(?[A-Z]\)?(?:, \(?[A-Z]\)?)*,? (?:and|or) \(?[A-Z]\)?", word):
        return f" {word} "
    if re.fullmatch(r"\([A-Za-z ]{2,}\)", word):
        word = word[1:-1]
    if word in FUNCTIONS:
        return f"\\{word} "
    words = re.fullmatch(r"(?![A-J]\.)[A-Za-z][A-Za-z .^/\d-]*", word)
    return f' "{word}" ' if words and not (style == "mathrm" and word in ("i", "e", "d")) else f" {inside} "


class _Refused(ValueError):
    """Not an expression of the grammar, or larger than the limits."""


class _Undefined(ValueError):
    """No value there: division by zero, or no real number."""


TOKEN = re.compile(r'\s*(?:(\d+(?:\.\d+|\.(?![\d.]))?|\.\d+)|(\\(?:[A-Za-z]+|.))|([A-Za-zÀ-ÖØ-öø-ɏ]+)'
                   rf'|"([^"]*)"|([{FOREIGN}]+)|(<=|>=|!=|.))', re.S)
EXPONENT = re.compile(r"[eE]([+-]?)(\d{1,4})(?![\d.])")


def _tokens(text: str) -> list[tuple[str, str]]:
    """(kind, text) with kind num, name (of a variable), word, or mark (a sign, or a command and its \\)."""
    found: list[tuple[str, str]] = []
    end = 0
    while end < len(text) and (match := TOKEN.match(text, end)):
        start, end = match.start(), match.end()
        number, command, letters, quoted, foreign, sign = match.groups()
        if number:
            power = EXPONENT.match(text, end)  # 1.5e3, 1e-05; but 2e-1 is 2*e - 1
            if power and (power[0][0] == "E" or not power[1] or "." in number or number == "1"
                          or power[2][0] == "0"):
                end, number = power.end(), number + power[0]
            found.append(("num", number))
        elif quoted is not None or foreign:
            found.append(("word", foreign or quoted.strip()))
        elif letters:
            found += _letters(letters, found[-1] if found else ("", ""), spaced=text[start] == " ")
        elif command or sign and not sign.isspace():
            found.append(("mark", command or sign))
        if len(found) > MOST_TOKENS:
            raise _Refused("too long")
    return found


def _letters(run: str, last: tuple[str, str], spaced: bool) -> list[tuple[str, str]]:
    """Letters without a backslash: a function, a word, a unit after a number, or variables multiplied."""
    low = run.lower()
    if run in FUNCTIONS or run == "pi":
        return [("mark", "\\" + run)]
    if low in ("and", "or", "percent"):
        return [("mark", "%" if low == "percent" else low)]
    if low in ("degree", "degrees", "deg") and last[0] == "num":
        return [("mark", "\\deg")]
    if low in ("inf", "infty", "infinity", "oo"):
        return [("mark", "\\infty")]
    if fused := re.fullmatch(r"(sin|cos|tan|ln|log|sqrt|pi)([a-z])", run):
        return [("mark", "\\" + fused[1]), ("name", fused[2])]
    after_value = last[0] in ("num", "word") or last[1] in (")", "}", "/")
    if (last[0] == "word" and spaced or len(run) > 3 and (spaced or last[0] in ("", "mark") or low in UNITS)
            or len(run) > 1 and (low in UNITS or low in SCALES) and after_value):
        return [("word", run)]
    # AB is one name, ab is a times b
    return [("name", run)] if run.isupper() else [("name", letter) for letter in run]


OPENERS = ("(", "[", "{", "\\{")
CLOSERS = (")", "]", "}", "\\}", "\\rfloor", "\\rceil")
STARTERS = {"\\" + name
            for name in FUNCTIONS | SYMBOLS | {"frac", "binom", "pi", "infty", "begin", "lfloor", "lceil"}}
MATRICES = ("pmatrix", "bmatrix", "matrix", "vmatrix", "Bmatrix", "array", "smallmatrix", "cases")
INF, MINUS_INF = ("inf",), ("neg", ("inf",))
REALS = ("tuple", "(", ")", [MINUS_INF, INF])


class _Parser:
    """Recursive descent, loosest first: items, relation, union, ratio, over, sum, product, power, atom.
    Trees are tuples:

        (num, Fraction, text) (name, s) (const, s) (inf,) (text, s) (base, digits, base)
        (add, [x..]) (mul, [x..]) (inv, x) (neg, x) (pow, x, y) (pm, x, sign) (deg, x) (pct, x) (unit, x, s)
        (fn, name, [x..]) (call, name, [x..]) (list, [x..]) (either, [x..]) (set, [x..])
        (tuple, open, close, [x..]) (matrix, kind, rows) (union, [x..]) (diff, x, y) (ratio, [x..])
        (rel, [op..], [x..])
    """

    def __init__(self, tokens: list[tuple[str, str]]):
        self.tokens, self.at, self.depth, self.bars = tokens, 0, 0, 0

    def parse(self) -> tuple:
        node = self.items()
        if self.at < len(self.tokens):
            raise _Refused(f"unexpected {self.tokens[self.at][1]!r}")
        return node

    def peek(self, ahead: int = 0) -> tuple[str, str]:
        return self.tokens[self.at + ahead] if self.at + ahead < len(self.tokens) else ("end", "")

    def mark(self) -> str:
        """The next token's text if it is a mark."""
        kind, text = self.peek()
        return text if kind == "mark" else ""

    def take(self, *marks: str) -> str:
        """The same, and go past it, if it is one of these."""
        text = self.mark()
        self.at += text in marks
        return text if text in marks else ""

    def need(self, mark: str) -> None:
        if not self.take(mark):
            raise _Refused(f"expected {mark!r}")

    def nested(self, rule) -> tuple:
        self.depth += 1
        if self.depth > DEEPEST:
            raise _Refused("too deep")
        node = rule()
        self.depth -= 1
        return node

    def items(self) -> tuple:
        rows, used = [[]], set()
        while True:
            while separator := self.take(",", ";", "and", "or"):
                used.add(separator)
                if separator == ";" and rows[-1]:
                    rows.append([])
            if self.peek()[0] == "end" or self.mark() in CLOSERS or self.bars and self.mark() == "|":
                break
            rows[-1].append(self.relation())
            if self.mark() not in (",", ";", "and", "or"):
                break
        if len(rows) > 1 and len(rows[-1]) > 1:
            return ("matrix", "m", rows)                                          # [1, 2; 3, 4]
        flat = [x for row in rows for x in row]
        if not flat:
            raise _Refused("nothing there")
        return flat[0] if len(flat) == 1 else ("either" if used == {"or"} else "list", flat)

    def relation(self) -> tuple:
        parts, ops = [self.union()], []
        while op := self.take("=", "<", ">", "<=", ">=", "!=", "\\in", "\\approx", "\\sim"):
            if op == "=":
                self.take("=")
            ops.append(op)
            parts.append(self.union())
        return ("rel", ops, parts) if ops else parts[0]

    def union(self) -> tuple:
        parts = [self.ratio()]
        while self.take("\\cup"):
            parts.append(self.ratio())
        if len(parts) == 1 and self.take("\\setminus", "\\backslash"):
            return ("diff", parts[0], self.ratio())
        return ("union", parts) if len(parts) > 1 else parts[0]

    def ratio(self) -> tuple:
        parts = [self.over()]
        while self.take(":"):
            parts.append(self.over())
        if len(parts) > 1 and parts[-1][0] == "unit":                             # 4:30 pm
            return ("unit", ("ratio", parts[:-1] + [parts[-1][1]]), parts[-1][2])
        return ("ratio", parts) if len(parts) > 1 else parts[0]

    def over(self) -> tuple:
        node = self.sum()
        if self.take("\\over"):
            return ("mul", [node, ("inv", self.sum())])
        return ("fn", "binom", [node, self.sum()]) if self.take("\\choose") else node

    def sum(self) -> tuple:
        terms = []
        while True:
            if sign := self.take("\\pm", "\\mp"):
                terms.append(("pm", self.product(), sign))
            elif terms and self.take("-"):
                terms.append(("neg", self.product()))
            elif not terms or self.take("+"):
                terms.append(self.product())
            else:
                return ("add", terms) if len(terms) > 1 else terms[0]

    def product(self) -> tuple:
        if sign := self.take("-", "+"):
            node = self.nested(self.product)
            return ("neg", node) if sign == "-" else node
        factors, scales = [self.power()], 0
        while True:
            kind, text = self.peek()
            if self.take("*", "\\times", "\\cdot", "\\ast"):
                factors.append(self.signed())
            elif self.take("/", "\\div"):
                factors.append(("inv", self.signed()))
            elif kind == "word":
                scales += 1
                if factors[0][0] == "unit" or scales > 2:
                    raise _Refused("a second unit")
                factors = [self.unit(factors[0] if len(factors) == 1 else ("mul", factors))]
            elif mixed := self.mixed(factors):
                factors = [mixed]
            elif kind == "num" and self.tokens[self.at - 1][0] == "num":
                raise _Refused("two numbers side by side")
            elif (kind in ("num", "name") or self.mark() in OPENERS or self.mark() in STARTERS
                  or self.mark() == "|" and not self.bars):
                factors.append(self.power())
            else:
                return ("mul", factors) if len(factors) > 1 else factors[0]

    def signed(self) -> tuple:
        sign = self.take("-", "+")
        node = self.nested(self.signed) if sign else self.power()
        return ("neg", node) if sign == "-" else node

    def mixed(self, factors: list) -> tuple | None:
        """2\\frac{1}{3} and 2 1/3 are two and a third."""
        start = self.at
        if len(factors) == 1 and _is_whole(factors[0]):
            if self.mark() == "\\frac":
                part = self.atom()
            elif self.peek()[0] == "num" and self.peek(1)[1] == "/" and self.peek(2)[0] == "num":
                part = ("mul", [self.atom(), ("inv", (self.take("/"), self.atom())[1])])
            else:
                return None
            top, bottom = part[1][0], part[1][1][1]
            if _is_whole(top) and _is_whole(bottom) and top[1] < bottom[1]:
                return self.postfix(("add", [factors[0], part]))
        self.at = start
        return None

    def unit(self, node: tuple) -> tuple:
        names = []
        while self.peek()[0] == "word" or self.mark() in ("/", "*", "\\cdot") and self.peek(1)[0] == "word":
            word = self.peek()[1].lower()
            self.at += 1
            if word in SCALES and not names:
                node = ("mul", [node, ("num", Fraction(SCALES[word]), word)])
                continue
            names.append(word)
            if self.take("^"):
                self.argument()
        return ("unit", node, " ".join(names)) if names else node

    def power(self) -> tuple:
        return self.postfix(self.nested(self.atom))

    def postfix(self, node: tuple) -> tuple:
        for _ in range(6):
            if self.take("^"):
                if self.take("'", "\\prime"):
                    continue
                sign = self.take("-", "+")
                exponent = self.argument() if self.mark() == "{" else self.nested(self.power)
                node = ("pow", node, ("neg", exponent) if sign == "-" else exponent)
            elif self.take("!"):
                node = ("fn", "!", [node])
            elif self.take("%"):
                node = ("pct", node)
            elif self.take("\\deg"):
                node = ("deg", node)
            else:
                break
        return node

    def argument(self) -> tuple:
        """A LaTeX argument: a group, a command, a letter, or one digit (\\frac12)."""
        kind, text = self.peek()
        if kind == "num" and len(text) > 1 and text.isdigit():
            self.tokens[self.at] = ("num", text[1:])
            return ("num", Fraction(int(text[0])), text[0])
        if self.take("-"):
            return ("neg", self.nested(self.argument))
        return self.nested(self.atom)

    def raw(self) -> str:
        """A subscript, or the name of an environment, as text."""
        text, depth = [], 0
        while self.at < len(self.tokens):
            token = self.tokens[self.at][1]
            self.at += 1
            depth += (token == "{") - (token == "}")
            text.append(token)
            if depth <= 0:
                return "".join(text).strip("{}")
        raise _Refused("a brace is not closed")

    def closed(self, open: str) -> tuple:
        """What stands after an opening bracket, up to its closing one: a group, tuple or interval, a set."""
        if open == "\\{" and self.take("\\}"):
            return ("set", [])
        bars, self.bars = self.bars, int(open == "\\{")
        node = self.items()
        if open == "\\{" and self.take("|"):                                      # {x | x > 3}
            self.bars = 0
            node = self.items()
            open = "condition"
        self.bars = bars
        close = self.take(*{"{": ("}",), "\\{": ("\\}",), "condition": ("\\}", "}")}.get(open, (")", "]")))
        if not close:
            raise _Refused("a bracket is not closed")
        items = node[1] if node[0] in ("list", "either") else [node]
        if open == "\\{" or open == "{" and len(items) > 1:
            return ("set", items)
        if open in ("{", "condition") or len(items) == 1:
            return node
        if open == "[" and all(x[:3] == ("tuple", "[", "]") and len(x[3]) == len(items[0][3]) for x in items):
            return ("matrix", "m", [x[3] for x in items])                         # [[1, 2], [3, 4]]
        return ("tuple", open, close, items)

    def atom(self) -> tuple:
        kind, text = self.peek()
        self.at += 1
        if kind == "num":
            return self.number(text)
        if kind == "name":
            return self.name(text)
        if kind == "word":
            words = [text]
            while self.peek()[0] == "word":
                words.append(self.peek()[1])
                self.at += 1
            return self.name(text) if len(text) == 1 == len(words) else ("text", " ".join(words).lower())
        if kind == "mark" and text in OPENERS:
            return self.closed(text)
        if kind == "mark" and text == "|":
            self.bars += 1
            node = ("fn", "abs", [self.items()])
            self.need("|")
            self.bars -= 1
            return node
        if text == "ℝ":
            return REALS
        if kind == "mark" and text[0] == "\\":
            return self.command(text[1:])
        raise _Refused(f"unexpected {text!r}")

    def number(self, text: str) -> tuple:
        if self.take("_"):
            return ("base", text, self.raw())
        mantissa, _, exponent = text.lower().partition("e")
        if len(text) > MOST_BITS // 8 or abs(int(exponent or 0)) > MOST_BITS // 8:
            raise _Refused("too many digits")
        return ("num", Fraction(mantissa) * Fraction(10) ** int(exponent or 0), text)

    def name(self, text: str) -> tuple:
        if text in "ei" and self.mark() != "_":
            return ("const", text)
        if self.take("_"):
            text += "_" + self.raw()
        while True:
            if self.mark() == "^" and self.peek(1)[1] == "\\prime":
                self.at += 2
            elif not self.take("'"):
                break
            text += "'"
        ahead = [t for _, t in self.tokens[self.at:self.at + 6]]
        if text[0] in "fgh" and ahead == ["^", "{", "-", "1", "}", "("]:
            text, self.at = text + "^-1", self.at + 5
        if (text[0] in "fgh" or text in "PFGH") and self.take("("):
            inside = self.closed("(")
            return ("call", text, inside[3] if inside[0] == "tuple" else [inside])
        return ("name", text)

    def command(self, name: str) -> tuple:
        if name == "frac":
            return ("mul", [self.argument(), ("inv", self.argument())])
        if name == "binom":
            return ("fn", "binom", [self.argument(), self.argument()])
        if name == "sqrt":
            index = [self.closed("[")] if self.take("[") else []
            return ("fn", "sqrt", [self.nested(self.atom)] + index)
        if name == "pi":
            return ("const", "pi")
        if name == "infty":
            return INF
        if name in ("emptyset", "varnothing"):
            return ("set", [])
        if name in ("lfloor", "lceil"):
            node = ("fn", name[1:], [self.items()])
            self.need("\\r" + name[1:])
            return node
        if name == "begin":
            return self.matrix()
        if name in FUNCTIONS:
            return self.function(name)
        if name in SYMBOLS or name.startswith("Set"):
            return self.name("\\" + name)
        raise _Refused(f"unknown command {name!r}")

    def function(self, name: str) -> tuple:
        name = {"asin": "arcsin", "acos": "arccos", "atan": "arctan", "lg": "log10"}.get(name, name)
        base, exponent = [], None
        while self.mark() == "^" or name == "log" and self.mark() == "_":
            if self.take("_"):
                base = [self.argument()]
            else:
                self.take("^")
                exponent = self.argument()
        if name in ("sin", "cos", "tan") and exponent and _exact(exponent) == -1:
            name, exponent = "arc" + name, None
        if self.mark() in ("(", "{", "|"):
            inside = self.nested(self.atom)
        else:                                              # \sin 2x: up to a sign, bracket or function
            factors = [self.signed()]
            while self.peek()[0] in ("num", "name") or self.mark()[1:] in SYMBOLS | {"pi", "frac"}:
                factors.append(self.power())
            inside = ("mul", factors) if len(factors) > 1 else factors[0]
        node = ("fn", name, (inside[3] if inside[0] == "tuple" else [inside]) + base)
        return ("pow", node, exponent) if exponent else node

    def matrix(self) -> tuple:
        kind = self.raw()
        if kind not in MATRICES:
            raise _Refused(f"environment {kind!r}")
        if kind == "array":
            self.raw()
        rows: list[list] = [[]]
        while not self.take("\\end"):
            if self.take("\\\\"):
                rows.append([])
            elif not self.take("&", "\\hline"):
                rows[-1].append(self.relation())
        self.raw()
        rows = [row for row in rows if row]
        lines = len(rows) == 1 or all(row[0][0] == "rel" for row in rows)
        if (kind == "cases" or kind == "array" and lines) and all(len(row) == 1 for row in rows):
            return ("list", [row[0] for row in rows]) if len(rows) > 1 else rows[0][0]
        if not rows or any(len(row) != len(rows[0]) for row in rows):
            raise _Refused("a ragged matrix")
        return ("matrix", "det" if kind == "vmatrix" else "m", rows)


# ---- the value of a tree ----

def _is_whole(node: tuple) -> bool:
    return node[0] == "num" and node[2].isdigit()


def _exact(node: tuple) -> Fraction | None:
    """Its rational value, or None where it has none of a manageable size."""
    kind = node[0]
    if kind == "num":
        return node[1]
    if kind in ("neg", "inv", "unit", "deg", "pct"):
        x = _exact(node[1])
        if kind == "inv" and x == 0:
            raise _Undefined("1/0")
        if x is None or kind in ("unit", "deg"):
            return x
        return -x if kind == "neg" else 1 / x if kind == "inv" else x / 100
    if kind in ("add", "mul"):
        total = Fraction(kind == "mul")
        for part in node[1]:
            if (x := _exact(part)) is None or _bits(total) > MOST_BITS:
                return None
            total = total + x if kind == "add" else total * x
        return total
    if kind == "pow":
        x, y = _exact(node[1]), _exact(node[2])
        if x is None or y is None or y.denominator != 1 or abs(y) * _bits(x) > MOST_BITS:
            return None
        if x == 0 and y <= 0:
            raise _Undefined("0 to a power below 1")
        return x ** int(y)
    if kind == "fn" and node[1] == "!":
        x = _exact(node[2][0])
        small = x is not None and x.denominator == 1 and 0 <= x <= 1000
        return Fraction(math.factorial(int(x))) if small else None
    return None


def _bits(x: Fraction) -> int:
    return x.numerator.bit_length() + x.denominator.bit_length()


def _walk(node):
    """Every tree in a tree."""
    if isinstance(node, tuple):
        yield node
    for part in node:
        if isinstance(part, (tuple, list)):
            yield from _walk(part)


def _names(*nodes: tuple) -> set[str]:
    return {n[1] for n in _walk(nodes) if n and n[0] in ("name", "call", "text", "base")}


class _Numbers:
    """Numeric values of trees, to DIGITS digits, with a bound on the work of one comparison."""

    def __init__(self):
        self.left = MOST_WORK

    @cached_property
    def mp(self):
        """mpmath, sympy's arithmetic, in a context of our own. (sympy evaluates anything, at any cost.)"""
        import mpmath
        context = mpmath.MPContext()
        context.dps = DIGITS
        return context

    def point(self, name: str, trial: int):
        """Where a variable stands in a trial: small, large, of either sign, in turn."""
        low, high = ((0.1, 1), (1, 9), (-4, 4), (4, 40))[trial % 4]
        return self.mp.mpf(random.Random(f"{name} {trial}").uniform(low, high))

    def value(self, node: tuple, trial: int, real: bool, degrees: bool = False):
        """A real or complex number; _Undefined where there is none, or, if `real`, none on the way there."""
        self.left -= 1
        if self.left < 0:
            raise _Refused("too much work")
        x = self.raw_value(node, trial, real, degrees)
        if not self.mp.isfinite(x) or x != 0 and abs(self.mp.mag(x)) > 10**6:
            raise _Undefined("out of range")
        if real and self.mp.im(x) != 0:
            raise _Undefined("not real")
        return x if self.mp.im(x) != 0 else self.mp.re(x)

    def raw_value(self, node: tuple, trial: int, real: bool, degrees: bool):
        mp, kind = self.mp, node[0]

        def sub(x, degrees=degrees):
            return self.value(x, trial, real, degrees)

        if kind == "num":
            return mp.mpf(node[1].numerator) / node[1].denominator
        if kind in ("name", "text", "base"):
            return self.point(" ".join(node[1:]), trial)
        if kind == "const":
            return +{"pi": mp.pi, "e": mp.e, "i": mp.j}[node[1]]
        if kind == "add":
            return mp.fsum(map(sub, node[1]))
        if kind == "mul":
            total = mp.mpf(1)
            for x in node[1]:
                total *= sub(x)
            return total
        if kind == "inv":
            return self.power(sub(node[1]), mp.mpf(-1))
        if kind in ("neg", "unit", "pct", "deg"):
            x = sub(node[1])
            if kind == "deg" and degrees:
                return x * mp.pi / 180
            return -x if kind == "neg" else x / 100 if kind == "pct" else x
        if kind == "pow":
            return self.power(sub(node[1]), sub(node[2]), _exact(node[2]))
        if kind == "call":                                 # an unknown function: any fixed one will do
            start = self.point(node[1], 1)
            return mp.fsum(mp.cos(self.small(sub(x)) * (k + 2) + start) for k, x in enumerate(node[2]))
        if kind == "fn":
            return self.function(node[1], [sub(x, node[1] in TRIGONOMETRIC) for x in node[2]], real)
        raise _Refused(f"{kind} has no value")

    def small(self, x, size: int = 300):
        """x, if it is below 2^size."""
        if x != 0 and self.mp.mag(x) > size:
            raise _Undefined("too large an argument")
        return x

    def power(self, x, y, exact: Fraction | None = None):
        mp = self.mp
        if x == 0 and (mp.im(y) != 0 or y <= 0):
            raise _Undefined("0 to a power below 1")
        if y != 0 and mp.mag(y) + max(1, abs(mp.mag(x)) if x != 0 else 1).bit_length() > 22:
            raise _Undefined("too large a power")
        if exact is not None and exact.denominator % 2 and exact.denominator > 1 and mp.im(x) == 0 and x < 0:
            return abs(x) ** y * (-1) ** (exact.numerator % 2)                    # (-8)^(1/3) = -2
        return x ** y

    def function(self, name: str, args: list, real: bool):
        mp, x = self.mp, args[0]
        if name in TRIGONOMETRIC:
            return getattr(mp, name)(self.small(x))
        if name in ("sinh", "cosh", "tanh", "exp"):
            return getattr(mp, name)(self.small(x, 17))
        if name in ("arcsin", "arccos", "arctan"):
            return getattr(mp, "a" + name[3:])(x)
        if name in ("ln", "log", "log10"):
            base = mp.mpf(10) if name == "log10" else args[1] if len(args) > 1 else +mp.e
            if x == 0 or base in (0, 1) or real and (x < 0 or base < 0):
                raise _Undefined("no logarithm")
            return mp.log(x) / mp.log(base)
        if name == "abs":
            return abs(x)
        whole = [mp.isint(a) and mp.im(a) == 0 for a in args]
        if name == "sqrt" and len(args) == 1 or name == "sqrt" and whole[1] and 1 <= args[1] <= 1000:
            index = int(args[1]) if len(args) > 1 else 2
            return self.power(x, mp.mpf(1) / index, Fraction(1, index))
        if any(mp.im(a) != 0 for a in args):
            raise _Undefined(f"{name} of a complex number")
        if name in ("floor", "ceil"):
            return getattr(mp, name)(self.small(x))
        if name in ("max", "min"):
            return max(args) if name == "max" else min(args)
        if name in ("gcd", "lcm") and all(whole):
            return mp.mpf(getattr(math, name)(*(int(self.small(a)) for a in args)))
        if name == "!" and 0 <= x < 10**5:
            return mp.factorial(x)
        if name == "binom" and all(0 <= a < 10**5 for a in args):
            return mp.binomial(*args)
        raise _Undefined(f"no value of {name}")

    def agree(self, a: tuple, b: tuple) -> bool:
        """Whether two expressions have the same values. Identity is judged at points where both are real, all
        the way; where those are too few, or with an i in them, in the complex plane on principal branches."""
        if not _names(a, b):
            return self.same_value(a, b, 0, False)
        for real in (False,) if ("const", "i") in _walk((a, b)) else (True, False):
            agreed = 0
            for trial in range(16):
                try:
                    if not self.same_value(a, b, trial, real):
                        return False
                except _Undefined:
                    continue
                agreed += 1
                if agreed == 5:
                    return True
        return False

    def same_value(self, a: tuple, b: tuple, trial: int, real: bool) -> bool:
        x, y = self.value(a, trial, real), self.value(b, trial, real)
        gap, slack = abs(x - y), self.mp.mpf(10) ** (10 - DIGITS)
        if gap <= max(abs(x), abs(y)) * slack:
            return True
        if gap > slack * 10**10:
            return False
        try:  # a zero shrinks as the precision grows, a small number (1/2004!) does not
            self.mp.dps = 2 * DIGITS
            return abs(self.value(a, trial, real) - self.value(b, trial, real)) < gap * slack
        finally:
            self.mp.dps = DIGITS

    def proportional(self, a: tuple, b: tuple) -> int:
        """The sign of the constant c with a = c b everywhere; 0 if there is none."""
        ratios = []
        for trial in range(16):
            try:
                x, y = self.value(a, trial, True), self.value(b, trial, True)
            except _Undefined:
                continue
            if abs(x) < 1e-30 or abs(y) < 1e-30:
                return 0
            ratios.append(x / y)
            if abs(ratios[-1] - ratios[0]) > abs(ratios[0]) * self.mp.mpf(10) ** (10 - DIGITS):
                return 0
            if len(ratios) == 5:
                return 1 if ratios[0] > 0 else -1
        return 0


# ---- the verdict ----

def is_equivalent(prediction: str, reference: str) -> bool:
    """Whether an answer means the same as the reference answer. Never raises, takes a millisecond.

    Each rung decides, or hands on to the next:
        1. texts    the same after normalisation (spellings of LaTeX and Unicode, layout, money signs, \\text,
                    final period, numbers in words); words regardless of case; the letter of a choice, with or
                    without the option's text
        2. shapes   lists and sets in any order, tuples in order, intervals with their kinds of end, matrices
                    entry by entry; a \\pm b is two values; "x = " before a value is ignored; other equations
                    and inequalities are compared up to a factor. At the leaves stand numbers and expressions:
        3. numbers  exactly, as fractions: 1/2, 1 1/2, 50% (also 50), 1,234, 1.5e3; a unit that only one side
                    has is ignored; a decimal of at least 6 digits may stand for what rounds to it, so 0.33 is
                    not 1/3
        4. algebra  the same values at random points, to 40 digits
    """
    if not isinstance(prediction, str) or not isinstance(reference, str):
        return False
    if max(len(prediction), len(reference)) > LONGEST_ANSWER:
        return prediction.split() == reference.split() and bool(prediction.strip())
    predicted, expected = _clean(prediction), _clean(reference)
    if not predicted or not expected:
        return False
    if _packed(predicted) == _packed(expected) or _phrase(predicted) == _phrase(expected) is not None:
        return True
    (letter, option), (letter_wanted, option_wanted) = _choice(predicted), _choice(expected)
    if letter and letter_wanted:
        return letter == letter_wanted
    trees = [(a, b) for a in _readings(option or predicted) for b in _readings(option_wanted or expected)]
    comparison = _Comparison() if trees else None
    for a, b in trees:
        try:
            if comparison.same(a, b):
                return True
        except (_Refused, _Undefined):
            pass
    return False


def _packed(text: str) -> str:
    """Without the spaces and quotes that change nothing (1 1/2 is not 11/2)."""
    return re.sub(r"(?<![\dA-Za-z]) | (?![\dA-Za-z])", "", text.replace('"', " ").strip()).strip()


def _phrase(text: str) -> str | None:
    """Plain words in one spelling; None if it is not plain words."""
    text = text.replace('"', " ")
    if not re.fullmatch(r"[A-Za-z ,.'!?-]+", text) or not re.search(r"[A-Za-z]{3}|^\s*no\b", text, re.I):
        return None
    return re.sub(r"^(?:an?|the) ", "", " ".join(re.findall(r"[a-z]+", text.lower())))


def _choice(text: str) -> tuple[str, str]:
    """(letter, the option's text behind it) of "B", "(B)", "B. 12", "(B) 12"; else two empty strings."""
    text = text.replace('"', " ").strip()
    text = re.sub(r"^(?:the )?(?:correct )?(?:option|choice|answer)(?: is)?:? (?=\W*[A-J]\b)", "", text,
                  flags=re.I)
    text = re.sub(r"^\([a-j]\)(?=$| \w)", lambda m: m[0].upper(), text.strip())
    text = re.sub(r"^\{\s*(\([A-Z]\))\s*\}", r"\1", text)
    match = re.fullmatch(r"(?:\(([A-Z])\)|([A-J])[).:]|([A-J])$)\s*("
                         r"(?![(^+\-=_/*'!<>,\[]|\s?(?:and|or)\b).*)", text, re.S)
    return (match[1] or match[2] or match[3], match[4]) if match else ("", "")


@lru_cache(maxsize=512)
def _readings(text: str) -> tuple:
    """The trees that a text may stand for: with commas between thousands, and with commas between items."""
    joined = text
    if not re.search(r"[(\[]|\\\{", text):
        joined = re.sub(r"(?<![\d.,])(?:\d{1,3}(?:,\d{3})+|\d{1,2}(?:,\d{2})+,\d{3})(?!,?\d)",
                        lambda m: m[0].replace(",", ""), text)
    joined = re.sub(r"(?<![\d.,/])\d{1,3}(?: \d{3})+(?! ?[\d/])", lambda m: m[0].replace(" ", ""), joined)
    scaled = re.fullmatch(r"(.*\d) \((\w+)\)", text)  # 1.2 (million): so many, or 1.2
    trees = []
    for candidate in (scaled[1], f'{scaled[1]} "{scaled[2]}"') if scaled else dict.fromkeys((joined, text)):
        try:
            trees.append(_expand(_Parser(_tokens(candidate)).parse()))
        except (_Refused, _Undefined):
            pass
    return tuple(trees)


def _expand(node: tuple) -> tuple:
    """Every a \\pm b becomes two items of the list or set around it; lists in lists are joined; a number
    times a matrix becomes a matrix; relations get one form."""
    kind = node[0]
    if kind in ("list", "set", "either"):
        parts = [_expand(x) for x in node[1]]
        return (kind, [x for part in parts for x in (part[1] if part[0] == "list" else [part])])
    if kind == "union":
        parts = [_expand(x) for x in node[1]]
        return (kind, [x for part in parts for x in (part[1] if part[0] == "union" else [part])])
    if kind == "rel":
        return _relation(node[1], [_expand(x) for x in node[2]])
    if kind == "tuple":
        return (*node[:3], [_expand(x) for x in node[3]])
    if kind == "diff":
        whole, holes = _expand(node[1]), _expand(node[2])
        points = [_exact(x) for x in holes[1]] if holes[0] == "set" else [None]
        return _without(points) if whole == REALS and None not in points else ("diff", whole, holes)
    if kind == "mul":
        matrices = [x for x in node[1] if x[0] == "matrix"]
        if len(matrices) == 1 and len(node[1]) > 1:
            rest = [x for x in node[1] if x is not matrices[0]]
            return ("matrix", matrices[0][1], [[("mul", rest + [x]) for x in row] for row in matrices[0][2]])
    if kind != "matrix" and any(n and n[0] == "pm" for n in _walk(node)):
        return ("list", [_with_sign(node, "\\pm"), _with_sign(node, "\\mp")])
    return node


def _with_sign(node, plus: str):
    """The tree with each \\pm and \\mp read one way."""
    if isinstance(node, list):
        return [_with_sign(x, plus) for x in node]
    if not isinstance(node, tuple):
        return node
    if node[:1] == ("pm",):
        return _with_sign(node[1], plus) if node[2] == plus else ("neg", _with_sign(node[1], plus))
    return tuple(_with_sign(x, plus) for x in node)


def _relation(ops: list[str], parts: list[tuple]) -> tuple:
    """A relation with > turned round to <, \\in as equality, and a \\approx b as the choice it offers."""
    near = [i for i, op in enumerate(ops) if op in ("\\approx", "\\sim")]
    if len(near) > 1:
        raise _Refused("a chain of approximations")
    if near:
        cut = near[0]
        sides = ((ops[:cut], parts[:cut + 1]), (ops[cut + 1:], parts[cut + 1:]))
        return ("approx", *(_relation(o, p) if o else p[0] for o, p in sides))
    if any(x[0] == "list" for x in parts):
        if len(parts) == 2 and ops == ["="] and parts[0][0] != "list":            # x = 1 \pm 2
            return ("list", [("rel", ["="], [parts[0], x]) for x in parts[1][1]])
        raise _Refused("a list in a relation")
    if set(ops) <= {">", ">="}:
        ops, parts = [{">": "<", ">=": "<="}[op] for op in reversed(ops)], parts[::-1]
    return ("rel", ["="] if ops == ["\\in"] else ops, parts)


def _without(points: list[Fraction]) -> tuple:
    """The real line without some points, as a union of open intervals."""
    ends = [MINUS_INF] + [("num", p, str(p)) for p in sorted(set(points))] + [INF]
    return ("union", [("tuple", "(", ")", [a, b]) for a, b in zip(ends, ends[1:])])


def _interval(node: tuple) -> tuple:
    """An inequality with a variable alone on a side, as an interval (two: their intersection); else as is."""
    if node[0] == "list":
        holes = [_exact(x[2][1]) for x in node[1]
                 if x[0] == "rel" and x[1] == ["!="] and x[2][0][0] == "name"]
        if len(holes) == len(node[1]) and None not in holes and len(_names(node)) == 1:
            return _without(holes)                                                # x != 1, x != 2
        parts = sorted(map(_interval, node[1]), key=lambda x: x[0] != "tuple" or x[3][0] == MINUS_INF)
        if [x[0] for x in parts] == ["tuple"] * 2 and parts[0][3][-1] == INF and parts[1][3][0] == MINUS_INF:
            low, high = _exact(parts[0][3][0]), _exact(parts[1][3][1])
            if low is not None and high is not None and low < high:               # x > 1 and x < 2
                return ("tuple", parts[0][1], parts[1][2], [parts[0][3][0], parts[1][3][1]])
        return ("list", parts)
    variables = [x[0] == "name" for x in node[2]] if node[0] == "rel" else []
    if sum(variables) != 1 or _names(*(x for x in node[2] if x[0] != "name")):
        return node
    _, ops, parts = node
    at = variables.index(True)
    if ops == ["!="]:
        hole = _exact(parts[1 - at])
        return node if hole is None else _without([hole])
    if not set(ops) <= {"<", "<="} or (len(parts), at) not in ((2, 0), (2, 1), (3, 1)):
        return node
    low, high = (parts[0] if at else MINUS_INF), (parts[-1] if at < len(parts) - 1 else INF)
    open, close = "[" if at and ops[0] == "<=" else "(", "]" if high is not INF and ops[-1] == "<=" else ")"
    return ("tuple", open, close, [low, high])


def _is_name(node: tuple) -> bool:
    """Whether "node = value" only names the value: x, a_3, f(x), |AB|, NO/BO, angle ABC, (p, q), Area."""
    kind = node[0]
    if kind == "fn":
        return node[1] == "abs" and node[2][0][0] == "name" and len(node[2][0][1]) > 1
    if kind == "tuple":
        return all(x[0] == "name" for x in node[3])
    if kind == "mul":
        parts = [x[1] if x[0] == "inv" else x for x in node[1]]
        quotient = len(parts) == 2 and node[1][1][0] == "inv"
        figure = any(x[1] in ("\\angle", "\\triangle") for x in parts)
        return all(x[0] == "name" for x in parts) and (quotient or figure)
    return kind in ("name", "call", "text")


def _literal(node: tuple) -> tuple[Fraction, int, int] | None:
    """(value, decimals, significant digits) of a decimal as written; None if it is none."""
    sign = 1
    while node[0] in ("neg", "unit", "pct", "deg"):
        sign, node = -sign if node[0] == "neg" else sign, node[1]
    if node[0] != "num" or "." not in node[2] or "e" in node[2].lower():
        return None
    return sign * node[1], len(node[2].partition(".")[2]), len(node[2].replace(".", "").lstrip("0"))


SOLUTIONS = ("tuple", "union", "diff", "set")
COMPOUND = {"list", "set", "union", "tuple", "matrix", "rel", "ratio", "diff", "approx"}


class _Comparison(_Numbers):
    """Trees compared by their shape; at the leaves, by their values."""

    def same(self, a: tuple, b: tuple) -> bool:
        if a == b:
            return True
        for x, y in ((a, b), (b, a)):
            if x[0] == "approx":
                return self.same(x[1], y) or self.same(x[2], y) and self.near(x[1], x[2])
        a, b = self.one_equation(self.one_of(a)), self.one_equation(self.one_of(b))
        (name_a, value_a), (name_b, value_b) = self.named(a), self.named(b)
        if name_a and name_b:
            same = self.same_named(name_a, value_a, name_b, value_b)
            return same or a[0] == b[0] == "rel" and self.relations(a, b)
        if name_a and (b[0] != "rel" or value_a[0] in SOLUTIONS):  # x in [-2, 7] is -2 <= x <= 7
            a = value_a
        elif name_b and (a[0] != "rel" or value_b[0] in SOLUTIONS):
            b = value_b
        if a[0] != b[0]:
            a, b = _interval(a) if b[0] in SOLUTIONS else a, _interval(b) if a[0] in SOLUTIONS else b
            a, b = self.united(a, b), self.united(b, a)
        return self.shapes(a, b)

    def shapes(self, a: tuple, b: tuple) -> bool:
        kinds = {a[0], b[0]}
        if kinds == {"tuple"}:
            brackets = a[1:3] == b[1:3] or len(a[3]) > 2 and {a[1:3], b[1:3]} == {("(", ")"), ("[", "]")}
            return brackets and self.in_order(a[3], b[3])
        if kinds == {"matrix"}:
            return a[1] == b[1] and len(a[2]) == len(b[2]) and all(map(self.in_order, a[2], b[2]))
        for x, y in ((a, b), (b, a)):
            if (x[0], y[0]) == ("matrix", "tuple"):                               # a vector
                return 1 in (len(x[2]), len(x[2][0])) and self.in_order(sum(x[2], []), y[3])
            if (x[0], y[0]) == ("list", "tuple"):
                return y[1:3] == ("(", ")") and self.in_order(x[1], y[3])
        if kinds <= {"list", "set"} or kinds == {"union"}:
            return self.unordered(a[1], b[1], "set" in kinds)
        for x, y in ((a, b), (b, a)):
            if x[0] == "set" and len(x[1]) == 1 and y[0] != "rel":
                return self.same(x[1][0], y)
            if x[0] == "ratio" and len(x[1]) == 2 and y[0] in ("mul", "neg"):     # 1:2 is 1/2
                return self.same(("mul", [x[1][0], ("inv", x[1][1])]), y)
        if kinds == {"rel"}:
            return self.relations(a, b)
        if kinds == {"ratio"}:
            return self.ratios(a[1], b[1])
        if any(x[0] == "unit" and x[1][0] == "ratio" for x in (a, b)):            # times of day
            return self.units(a, b) and self.same(*(x[1] if x[0] == "unit" else x for x in (a, b)))
        if kinds & COMPOUND:
            return False
        return a[1] == b[1] if kinds == {"text"} else self.scalars(a, b)

    def in_order(self, a: list, b: list) -> bool:
        return len(a) == len(b) and all(map(self.same, a, b))

    def unordered(self, a: list, b: list, as_sets: bool) -> bool:
        """The same items in any order; in sets, however often."""
        left = list(b)
        for x in a:
            at = next((i for i, y in enumerate(left) if self.same(x, y)), None)
            if at is not None:
                left.pop(at)
            elif not as_sets or not any(self.same(x, y) for y in b):
                return False
        return not left or as_sets and all(any(self.same(x, y) for x in a) for y in left)

    def united(self, node: tuple, other: tuple) -> tuple:
        """A list of sets as their union, if it is compared with a union."""
        if (node[0] != "list" or other[0] != "union"
                or any(x[0] not in ("tuple", "union", "set") for x in node[1])):
            return node
        return ("union", [x for part in node[1] for x in (part[1] if part[0] == "union" else [part])])

    def one_of(self, node: tuple) -> tuple:
        """ "3/4 or 0.75" is one number, "x = 1 or x = 2" a list."""
        if node[0] != "either":
            return node
        return node[1][0] if all(self.same(node[1][0], x) for x in node[1][1:]) else ("list", node[1])

    def one_equation(self, node: tuple) -> tuple:
        """x = 2 + 3 = 5 without its middle, if all of it is equal; 5 = x as x = 5."""
        if node[0] != "rel" or set(node[1]) != {"="}:
            return node
        parts = node[2]
        if len(parts) == 2 and not _is_name(parts[0]) and _is_name(parts[1]):
            parts = parts[::-1]
        values = parts[1:] if _is_name(parts[0]) else parts
        if len(parts) == 2 and _names(*parts):
            return ("rel", ["="], parts)
        if any(x[0] in COMPOUND for x in values) or not all(self.same(values[0], x) for x in values[1:]):
            return node
        return values[-1] if values is parts else ("rel", ["="], [parts[0], values[-1]])

    def named(self, node: tuple):
        """(name, value) of "x = 5", "n = 2, 3, 4", "x = 1, x = 2"; (names, tuple) of "(p, q) = (3, 2)",
        "x = 1, y = 2"; else (None, node)."""
        if node[0] == "rel" and node[1] == ["="] and _is_name(node[2][0]):
            left, right = node[2]
            if left[0] in ("name", "call") and left[1] in _names(right):
                return None, node
            if left[0] == "tuple" == right[0] and len(left[3]) == len(right[3]):
                return tuple(map(repr, left[3])), right
            return repr(left), right
        if node[0] == "list":
            names, values = zip(*(self.named(x) if x[0] == "rel" else (None, x) for x in node[1]))
            if isinstance(names[0], str):
                if set(names) <= {names[0], None} and not any(v[0] == "rel" for v in values):
                    return names[0], ("list", list(values))
                if all(isinstance(name, str) for name in names) and len(set(names)) == len(names):
                    order = sorted(range(len(names)), key=names.__getitem__)
                    return tuple(names[i] for i in order), ("tuple", "(", ")", [values[i] for i in order])
        return None, node

    def same_named(self, name_a, a: tuple, name_b, b: tuple) -> bool:
        if isinstance(name_a, tuple) and isinstance(name_b, tuple) and sorted(name_a) == sorted(name_b):
            return self.in_order(a[3], [b[3][name_b.index(name)] for name in name_a])
        return name_a == name_b and self.same(a, b)

    def relations(self, a: tuple, b: tuple) -> bool:
        """Equations are the same if left minus right differs by a factor; inequalities, by a positive one."""
        (_, ops_a, parts_a), (_, ops_b, parts_b) = a, b
        if len(ops_a) > 1 or len(ops_b) > 1 or any(x[0] in COMPOUND for x in parts_a + parts_b):
            return ops_a == ops_b and self.in_order(parts_a, parts_b)
        if ops_a != ops_b or not _names(a) or not _names(b):
            return False
        sign = self.proportional(*(("add", [left, ("neg", right)]) for left, right in (parts_a, parts_b)))
        return sign > 0 or sign < 0 and ops_a[0] in ("=", "!=")

    def ratios(self, a: list, b: list) -> bool:
        """1:2 is 2:4, but 1:30 is not 2:60: two digits after the colon may be minutes."""
        if any(x[0] == "num" and len(x[2]) == 2 for x in (a[-1], b[-1])):
            return self.in_order(a, b)
        return len(a) == len(b) and all(self.same(("mul", [a[0], y]), ("mul", [b[0], x]))
                                        for x, y in zip(a[1:], b[1:]))

    def units(self, a: tuple, b: tuple) -> bool:
        """False if both have units that are known to differ."""
        names = [UNITS.get(x[2].split()[-1]) if x[0] == "unit" else None for x in (a, b)]
        return None in names or "unit" in names or names[0] == names[1]

    def near(self, a: tuple, b: tuple) -> bool:
        x, y = self.value(self.named(a)[1], 0, False), self.value(b, 0, False)
        return abs(x - y) <= 0.05 * max(abs(x), abs(y))

    def scalars(self, a: tuple, b: tuple) -> bool:
        if not self.units(a, b):
            return False
        a, b = (x[1] if x[0] == "unit" else x for x in (a, b))
        for x, y in ((a, b), (b, a)):
            if x[0] == "pct" != y[0]:  # 50% is 1/2, and people write 50
                hundredth = ("num", Fraction(1, 100), "")
                return self.scalars(x[1], y) or self.scalars(("mul", [x[1], hundredth]), y)
        if {INF, MINUS_INF} & {x for x in (a, b) if x in (INF, MINUS_INF)}:
            return a == b
        if b[0] == "base":                                 # the question names it: 1011 answers 1011_2
            return a == b or a[0] == "num" and a[2] == b[1]
        x, y = _exact(a), _exact(b)
        if x is not None and x == y or self.rounds(a, b) or self.rounds(b, a):
            return True
        return (x is None or y is None) and self.agree(a, b)

    def rounds(self, decimal: tuple, other: tuple) -> bool:
        """Whether a decimal of at least 6 digits is the other number, cut or rounded: 0.333333 is 1/3."""
        written = _literal(decimal)
        if written is None or written[2] < 6 or _names(other):
            return False
        value, decimals, digits = written
        exact = _exact(other)
        # only floating-point dust is forgiven
        if exact is not None and (_literal(other) or exact.denominator == 1):
            return digits >= 15 and abs(value - exact) <= abs(exact) / 10**15
        if exact is None:
            x = self.value(other, 0, False)
            if self.mp.im(x) != 0 or self.mp.mag(x) > 100:
                return False
            exact = Fraction(int(self.mp.nint(x * 10**40)), 10**40)
        shifted = abs(exact) * 10**decimals
        return (value < 0) == (exact < 0) and abs(value) * 10**decimals in (int(shifted), round(shifted))


if __name__ == "__main__":
    sys.exit(leave_processes(main()))
