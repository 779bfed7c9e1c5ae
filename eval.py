"""The one sampler-and-grader: for collecting errors, step values, rectification and the final score alike.

    problems --sample--> completions --extract_answer--> answers --is_equivalent--> verdicts --summarize--> accuracy

    GRADING        what is the answer in this text, and is it the right one? (text in, verdict out)
    READERS        problem files, in the layouts of the public sets
    SAMPLING       from the project's own model or from a server; every sample on disk as it is finished
    SUMMARY        the table of accuracies
    COMMAND LINE   python eval.py --help

A problem may carry a `prefix`, the reasoning so far: it is continued from there, and prefix + completion is graded.
Answers, problem files and servers are untrusted: nothing of them is ever executed.
"""
import argparse
import glob
import hashlib
import itertools
import json
import math
import os
import random
import re
import sys
import time
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from datetime import timedelta
from fractions import Fraction
from pathlib import Path
from string import ascii_uppercase
from typing import Callable, Sequence

import torch
import torch.distributed as dist
from tqdm import tqdm

from data import (BOXED, PROMPT_STYLES, STEP_STYLES, DataError, Endpoint, RequestRefused, Tokenizer, complain,
                  first_error_from_values, next_prefix, read_rows, render_prompt, same_step, split_steps, text_field,
                  write_rows)
from model import CheckpointError, Llama, generate, keep_freed_memory, read_json, resolve, stable_key


# ---------------------------------------------------------------------------------------------------------------------------------
# GRADING: the answer in a text, and whether it is the right one
# ---------------------------------------------------------------------------------------------------------------------------------

END_TOKENS = re.compile(r"<\|(?:im_end|eot_id|endoftext|end_of_text|im_start|start_header_id|end|eom_id)\|>|</s>|<｜end▁of▁sentence｜>|<end_of_turn>")
ANSWER_IS = re.compile(r"(?:answer|result)s?\*{0,2}(?:\s{1,3}to\s{1,3}(?:the|this)\s{1,3}\w{1,20})?(?:\s{0,3}(?:is|are)\b(?:\s{1,3}(?:therefore|thus|simply|equal to))?\s{0,3}:?|\s{0,3}:)\s{0,3}|(?<=final )answer\s{1,3}(?=[-$\\\d(])", re.I)
NUMBER = re.compile(r"(?<![\w.])(-\s?)?(?:\\?[$€£]\s?)?(-)?((?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:\s?/\s?\d+)?")
LONGEST = 100_000       # characters of a completion that are looked at, from its end


def extract_answer(completion: str) -> str | None:
    """The final answer of a completion, or None. The first rule that finds something decides, and of several places the last:

     1. \\boxed{...} or \\fbox{...}, braces matched (cut at the end of its line where one is missing); "\\boxed 7" too
     2. "#### 7"
     3. "the answer is 7", "Final answer: 7"
     4. the last number
    Thinking (up to </think>) and whatever follows a chat end token does not count. Rules 2 to 4 drop money signs and thousands separators."""
    text = completion[-LONGEST:].replace("\u2212", "-")
    if (after := text.rpartition("</think>")[2]).strip():
        text = after
    if (cut := END_TOKENS.search(text)) and text[:cut.start()].strip():
        text = text[:cut.start()]
    else:
        text = END_TOKENS.sub(" ", text)
    if (boxed := last_boxed(text)) is not None:
        return boxed
    if "####" in text:
        found = text.rpartition("####")[2].strip().split("\n")[0]
        if (found := tidy(found)):
            return found
    places = list(ANSWER_IS.finditer(text))
    for place in reversed(places):
        if re.search(r"\bno\s+(?:final\s+)?$", text[max(0, place.start() - 12):place.start()], re.I):
            continue
        if found := stated(text[place.end():place.end() + 500]):
            return found
    numbers = list(NUMBER.finditer(text))
    return tidy(numbers[-1][0]) if numbers else None


def last_boxed(text: str) -> str | None:
    """The content of the last \\boxed{...} that has one."""
    for at in sorted((m.end() for m in re.finditer(r"\\(?:boxed|fbox)\b\s?|\\framebox\b", text)), reverse=True)[:50]:
        if text[at:at + 1] != "{":
            found = re.match(r"[^\s$\\.,{}]+", text[at:at + 100])
            if found:
                return found[0]
            continue
        depth = 0
        for i in range(at, len(text)):
            if text[i] in "{}" and (i == 0 or text[i - 1] != "\\"):
                depth += 1 if text[i] == "{" else -1
                if depth == 0:
                    if text[at + 1:i].strip():
                        return text[at + 1:i].strip()
                    break
        else:
            found = re.split(r"\n|\$", text[at + 1:], maxsplit=1)[0].strip().rstrip(".")
            if found:
                return found
    return None


def stated(text: str) -> str | None:
    """The answer at the beginning of what follows "the answer is"."""
    text = text.lstrip(" \n*:")
    if m := re.match(r"\$\$?([^$\n]{1,300})\$|\\\((.{1,300}?)\\\)|\\\[(.{1,300}?)\\\]", text, re.S):
        inside = next(g for g in m.groups() if g is not None).strip()
        if inside and not (text.startswith("$") and re.match(r"[\d,.]+\s+\w+.*\s$", m[1] or "")):
            return tidy(inside)
    if m := re.match(r"\(?([A-J])\)?(?=[).:,*]|\s*(?:\n|$))", text):                  # a choice; not the first word of a sentence
        return m[1]
    line = re.split(r"\n|\*\*|(?<=[^.\d])\.(?=\s|$)|(?<=\d)\.(?=\s|$)|[;!?]", text, maxsplit=1)[0].strip()
    line = tidy(line)
    if not line:
        return None
    if m := re.search(r".*\b(?:is|are|equals?|=)\s(.*)$", line):
        line = tidy(m[1]) or line
    if len(line.split()) > 4 and (numbers := list(NUMBER.finditer(line))):
        return tidy(numbers[-1][0])
    if m := re.match(r"(?:approximately|about|exactly|indeed|equal to)\s+(.*)", line, re.I):
        line = m[1]
    return line


def tidy(text: str) -> str:
    """Without what surrounds an answer: quotes, dollar signs, a full stop, money, thousands separators of a plain number."""
    text = text.strip().strip("*`\"' ").rstrip(" .,;:").strip("*` ").strip()
    if text.startswith("$") and text.endswith("$") and len(text) > 1:
        text = text.strip("$").strip()
    text = re.sub(r"^(-?)\s?\\?[$€£]\s?(?=[\d.])", r"\1", text)
    text = re.sub(r"^-\s+(?=\d)", "-", text)
    if re.fullmatch(r"-?\d{1,3}(,\d{3})+(\.\d+)?(\s.*)?", text):
        text = re.sub(r"(?<=\d),(?=\d{3})", "", text)
    return text.rstrip(".") if re.fullmatch(r".*\d\.", text) else text


# One spelling

TOO_LONG = 2000
SYMBOLS = {"−": "-", "–": "-", "—": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "∙": r"\cdot ", "÷": "/", "π": r"\pi ", "√": r"\sqrt ", "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ",
           "≠": r"\ne ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "±": r"\pm ", "∓": r"\mp ", "°": "", "θ": r"\theta ", "α": r"\alpha ", "β": r"\beta ", "∅": r"\emptyset ", "′": "'",
           "²": "^2", "³": "^3", "¹": "^1", "⁰": "^0", "⁴": "^4", "⁵": "^5", "⁶": "^6", "⁷": "^7", "⁸": "^8", "⁹": "^9", "½": r"\frac{1}{2}", "⅓": r"\frac{1}{3}", "⅔": r"\frac{2}{3}",
           "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}", "\u00a0": " ", "€": "", "£": "", "¥": "", "，": ",", "（": "(", "）": ")", "：": ":", "％": "%"}
SYMBOL = re.compile("|".join(map(re.escape, SYMBOLS)))
SPACES = re.compile(r"(?<!\\)\\[!,;:> ]|\\q?quad\b|\\thinspace\b|~|\\(?:displaystyle|textstyle|limits|nolimits|left|right|[bB]igg?[lrm]?|hfill|rm|bf|it)(?![a-zA-Z])|\\(?=\n)")
TEXT = re.compile(r"\\(?:text|textnormal|mbox|textrm|mathrm|textbf|mathbf|textit|mathit|operatorname|mathbb|mathcal|hbox|textsf|emph|boldsymbol|bm)\b\*?\s*\{([^{}]*)\}")


MULTIPLES = {"thousand": "1000", "million": "1000000", "billion": "1000000000", "trillion": "1000000000000"}


def normalize(text: str) -> str:
    """LaTeX of many hands to one spelling; words of \\text{...} are kept, in place."""
    if "\\boxed" in text or "\\fbox" in text:
        text = last_boxed(text) or text
    text = SYMBOL.sub(lambda m: SYMBOLS[m[0]], text).strip()
    text = re.sub(r"(?<=\d),\s*\\!\s*(?=\d{3})", ",", text)
    text = text.replace("\\!", "").replace("{,}", ",").replace("\\$", "").replace("$", "")
    text = re.sub(r"\\\(|\\\)|\\\[(?!\d)|\\\](?!\d)", " ", text)
    text = re.sub(r"\\[dtc]frac(?![a-zA-Z])", r"\\frac", text)
    text = re.sub(r"\\(?:leqslant|leq|le)(?![a-zA-Z])|<=", r"\\le ", text)
    text = re.sub(r"\\(?:geqslant|geq|ge)(?![a-zA-Z])|>=", r"\\ge ", text)
    text = re.sub(r"\\(?:neq|ne)(?![a-zA-Z])|!=", r"\\ne ", text)
    text = re.sub(r"\\lt(?![a-zA-Z])", "<", text)
    text = re.sub(r"\\gt(?![a-zA-Z])", ">", text)
    text = re.sub(r"\\(?:lbrace|\{)", r"\\{", text)
    text = re.sub(r"\\(?:rbrace|\})", r"\\}", text)
    text = re.sub(r"\\[lr]?vert(?![a-zA-Z])|\\mid(?![a-zA-Z])", "|", text)
    text = re.sub(r"\^\s*\{?\s*\\(?:circ|degree)\s*\}?|\\degree(?![a-zA-Z])|\\circ(?![a-zA-Z])", " ", text)
    text = re.sub(r"(?<=\d)\s*degrees?\b", "", text)
    text = re.sub(r"\\?%|\bper\s?cent(?:age)?\b", " ", text)
    text = SPACES.sub(" ", text)
    text = text.replace("\\mathbb{R}", "(-\\infty,\\infty)")
    for _ in range(3):
        text = TEXT.sub(r" \1 ", text)
    text = re.sub(r"(?<=\d) ?(thousand|million|billion|trillion)\b", lambda m: "*" + MULTIPLES[m[1]], text)
    text = re.sub(r"\\(?:pmod|bmod|mod)(?![a-zA-Z])", r"\\mod ", text)
    text = re.sub(r"^\s*\\approx(?![a-zA-Z])", "", re.sub(r"\s+", " ", text)).strip()
    while text[:1] == "{" and matching(text, 0) == len(text) - 1:
        text = text[1:-1].strip()
    return text.rstrip(".").strip() if not re.search(r"\.\.\.$", text) else text


def matching(text: str, at: int) -> int:
    """Index of the bracket that closes the one at `at`; -1 if none does. Kinds may mix, as in half-open intervals."""
    depth = 0
    for i in range(at, len(text)):
        if text[i] in "([{":
            depth += 1
        elif text[i] in ")]}":
            depth -= 1
            if depth == 0:
                return i
    return -1


def split_top(text: str, separator: str) -> list[str]:
    """Split at a regex, outside all brackets."""
    parts, depth, begin, i = [], 0, 0, 0
    pattern = re.compile(separator)
    while i < len(text):
        if text[i] in "([{":
            depth += 1
        elif text[i] in ")]}":
            depth -= 1
        elif depth == 0 and (m := pattern.match(text, i)):
            parts.append(text[begin:i])
            begin = i = max(m.end(), i + 1)
            continue
        i += 1
    return [p.strip() for p in parts + [text[begin:]]]


# Equivalence: a ladder from texts to structures to values

def is_equivalent(prediction: str, reference: str) -> bool:
    """Whether two answers are the same. LaTeX or plain text; never raises, never executes anything, and ends soon whatever it is given.

    After `normalize`: equal texts; choice letters; words; units that agree or stand on one side only; equations (p = c r for a constant c) and inequalities;
    matrices, unions, sets, lists and tuples, part by part; and values. A value is parsed by a small grammar (`Parser`) and computed with fractions, or, where
    roots, functions or letters occur, with 40 digits at five points: two expressions that agree there are equal for all purposes of grading, and nothing
    has to be simplified, which no bound on time could promise. A percent sign is a unit: 50\\% is 50. A decimal equals what it rounds only from 6 figures on."""
    try:
        if len(prediction) > TOO_LONG or len(reference) > TOO_LONG:
            return prediction.strip() == reference.strip()
        p, r = normalize(prediction), normalize(reference)
        if not p or not r:
            return False
        return same(p, r, 0)
    except (RecursionError, OverflowError, ValueError, ZeroDivisionError, Hard):
        return False


class Hard(Exception):
    """An expression outside the grammar or beyond the bounds."""


def words(text: str) -> str:
    """Letters and digits only, lower case: how texts are compared."""
    return re.sub(r"[^a-z0-9+*/^=<>|.,()\[\]\\-]", "", re.sub(r"[{}\s]", "", text.lower()))


def same(p: str, r: str, depth: int) -> bool:
    if depth > 8:
        return False
    p, r = p.strip(), r.strip()
    if re.sub(r"(?<!\d)\s|\s(?!\d)", "", p) == re.sub(r"(?<!\d)\s|\s(?!\d)", "", r):       # "3 1/2" keeps its space: it is not 31/2
        return True
    if choice(r) or choice(strip_name(r)):
        p, r = strip_name(p), strip_name(r)
        return choice(p) == choice(r) or bool(m := re.match(r"\(?([A-J])\)?\s*[.:)]\s", p + " ")) and m[1] == choice(r)
    if re.fullmatch(r"[A-Za-z][A-Za-z ,.'-]*[A-Za-z]", r) and len(re.sub(r"[^a-zA-Z]", "", r)) > 2 and "=" not in p:
        strip = lambda t: re.sub(r"[^a-z0-9]", "", re.sub(r"^(?:the|a|an)\s", "", t.lower()))
        if strip(p) == strip(r):
            return True
        if not all(w in NAMES for w in re.findall(r"[A-Za-z]+", r)) and not re.search(r"\band\b|\bor\b", r):
            return False
    p0, r0 = p, r
    (p, pu), (r, ru) = cut_units(p), cut_units(r)
    if pu and ru and not units_agree(pu, ru):
        return False
    # equations, memberships and inequalities
    kp, kr = relation(p), relation(r)
    if kp or kr:
        return same_relation(p, kp, r, kr, depth)
    # collections
    if "\\begin" in p or "\\begin" in r:
        mp, mr = matrix(p), matrix(r)
        if mp is None or mr is None:
            return False
        return len(mp) == len(mr) and all(len(a) == len(b) and all(same(x, y, depth + 1) for x, y in zip(a, b)) for a, b in zip(mp, mr))
    if re.search(r"\\cup(?![a-zA-Z])|\\bigcup", p + r):
        return same_items(split_top(p, r"\\(?:big)?cup(?![a-zA-Z])"), split_top(r, r"\\(?:big)?cup(?![a-zA-Z])"), depth)
    if re.search(r"\\setminus|\\backslash", p + r):
        a, b = (split_top(t, r"\\setminus(?![a-zA-Z])|\\backslash(?![a-zA-Z])") for t in (p, r))
        return len(a) == len(b) and all(same(x, y, depth + 1) for x, y in zip(a, b))
    np, nr = thousands(p), thousands(r)
    sp, sr = braced(np), braced(nr)
    ip, ir = items(np) if sp is None else sp, items(nr) if sr is None else sr
    if len(ip) > 1 or len(ir) > 1 or sp is not None or sr is not None:
        if (sp is None and len(ip) == 1 and enclosed(np)) or (sr is None and len(ir) == 1 and enclosed(nr)):
            return False                                       # (3, 1) is a pair, {1, 3} is not
        return same_items(expand(ip), expand(ir), depth)
    tp, tr = enclosed(np), enclosed(nr)
    if tp and tr and (len(tp[1]) > 1 or len(tr[1]) > 1):
        return tp[0] == tr[0] and len(tp[1]) == len(tr[1]) and all(same(x, y, depth + 1) for x, y in zip(tp[1], tr[1]))
    if (tp and len(tp[1]) > 1) or (tr and len(tr[1]) > 1):
        return False
    if "\\pm" in np + nr or "\\mp" in np + nr:
        return same_items(expand([np]), expand([nr]), depth)
    if ":" in np or ":" in nr:
        a, b = split_top(np, ":"), split_top(nr, ":")
        return len(a) == len(b) > 1 and all(same(x, y, depth + 1) for x, y in zip(a, b))
    return same_value(np, nr)


def choice(text: str) -> str | None:
    m = re.fullmatch(r"\(?\s*([A-J])\s*\)?[.:]?", text)
    return m[1] if m else None


UNIT = re.compile(r"^(.*?[\d)}\]])\s*(?:\\?\s)?((?:(?:square|cubic|sq|cu)\.?\s*)?[A-Za-zµ][A-Za-zµ.\s/()-]*(?:\^\{?-?\d\}?)?[A-Za-z\s./]*)$", re.S)


def cut_units(text: str) -> tuple[str, str]:
    """("5", "cm") of "5 cm": words behind a number are its unit, unless they could be mathematics."""
    m = UNIT.match(text)
    if m:
        unit = m[2].strip()
        word = re.sub(r"\^\{?-?\d\}?", "", unit).strip()
        longest = max((len(w) for w in re.findall(r"[A-Za-zµ]+", word)), default=0)
        known = word.lower().rstrip(".") in UNITS
        if (longest >= 3 and not any(w in NAMES or w in ("and", "or") for w in re.findall(r"[A-Za-z]+", word))) or (known and text[m.end(1):m.end(1) + 1] == " "):
            return m[1].strip(), unit
    return text, ""


UNITS = {"cm", "m", "km", "mm", "in", "ft", "mi", "kg", "g", "mg", "lb", "oz", "s", "h", "hr", "min", "mph", "l", "ml", "am", "pm", "a.m", "p.m", "km/h", "m/s", "yd", "mi/h", "cm/s", "ft/s"}


def units_agree(a: str, b: str) -> bool:
    a, b = (re.sub(r"[^a-z0-9]", "", re.sub(r"\bsq(?:uare)?\b\.?", "2", u.lower().replace("^", ""))) for u in (a, b))
    strip = lambda u: re.sub(r"(?:es|s)$", "", u)
    short, long = sorted((strip(a), strip(b)), key=len)
    if sorted(short) == sorted(long):
        return True
    it = iter(long)                                            # an abbreviation: its letters in order, the first one first
    return len(short) <= 4 and bool(short) and short[0] == long[0] and all(c in it for c in short)


def thousands(text: str) -> str:
    t = re.sub(r"(?<=\d),\s?\\! ?(?=\d{3})", ",", text)
    return re.sub(r",", "", t) if re.fullmatch(r"-?\s?\d{1,3}(,\d{3})+(\.\d+)?", t) else text


def items(text: str) -> list[str]:
    """Of "1, 2 and 3": its parts; one part otherwise."""
    parts = split_top(text, r",(?:\s*(?:and|or)\b)?|;|\b(?:and|or)\b")
    return [x for x in parts if x] if len(parts) > 1 else [text]


def braced(text: str) -> list[str] | None:
    if text.startswith("\\{") and text.endswith("\\}"):
        inner = text[2:-2].strip()
        return [x for x in split_top(inner, r",|;") if x]
    if re.fullmatch(r"\\(?:emptyset|varnothing)", text):
        return []
    return None


def enclosed(text: str) -> tuple[str, list[str]] | None:
    """(brackets, parts) of "(1, 2]" and the like."""
    if text[:1] in ("(", "[") and text[-1:] in (")", "]") and matching(text, 0) == len(text) - 1:
        return text[0] + text[-1], split_top(text[1:-1], r",|;")
    if m := re.fullmatch(r"(?:\\langle|<)(.*)(?:\\rangle|>)", text):
        return "()", split_top(m[1], ",")
    return None


def expand(parts: list[str]) -> list[str]:
    out = []
    for part in parts:
        if "\\pm" in part or "\\mp" in part:
            out += [part.replace("\\pm", " + ").replace("\\mp", " - "), part.replace("\\pm", " - ").replace("\\mp", " + ")]
        else:
            out.append(part)
    if len(out) > 64:
        raise Hard
    return out


def same_items(a: list[str], b: list[str], depth: int) -> bool:
    """The same things in any order. A name shared by "x = 1, 2" counts for all."""
    if len(a) != len(b) or len(a) > 40:
        return False
    if len({bool(relation(x)) for x in a[1:]} | {bool(relation(x)) for x in b[1:]}) <= 1:
        a, b = ([strip_name(x) for x in t] for t in (a, b)) if not all(relation(x) for x in a + b) else (a, b)
    left = list(b)
    for x in a:
        found = next((i for i, y in enumerate(left) if same(x, y, depth + 1)), None)
        if found is None:
            return False
        del left[found]
    return True


# Equations, inequalities, memberships

RELATION = re.compile(r"\\(?:le|ge|ne|in|approx|to|equiv|sim)(?![a-zA-Z])|<|>|=")
FLIP = {"<": ">", ">": "<", "\\le": "\\ge", "\\ge": "\\le"}


def relation(text: str) -> list[str]:
    """The relation signs of a text, outside brackets."""
    if text.startswith("\\{") or enclosed(text):
        return []
    found, depth, i = [], 0, 0
    while i < len(text):
        if text[i] in "([{":
            depth += 1
        elif text[i] in ")]}":
            depth -= 1
        elif depth == 0 and (m := RELATION.match(text, i)):
            found.append(m[0])
            i = m.end()
            continue
        i += 1
    return found


NAME = re.compile(r"(?:\\?[A-Za-z]+'*(?:_\{?\w+\}?)?'*(?:\s?\(\s?\\?[a-zA-Z0-9](?:\s?,\s?\\?[a-zA-Z0-9])*\s?\)|\s?\^\{?-1\}?\s?\(\s?[a-z]\s?\))?|\|\s?[A-Z]{1,3}\s?\||\(\s?[a-zA-Z](?:_\w)?(?:\s?,\s?[a-zA-Z](?:_\w)?)+\s?\)|\\frac\{[A-Z]{2}\}\{[A-Z]{2}\}|\\angle\s?[A-Z]+|[A-Z]{2}\s?[:/]\s?[A-Z]{2})")


def strip_name(text: str) -> str:
    """"5" of "x = 5", "f(x) = 5", "(p, q) = ...", "x \\in ...": a left-hand side that only names the answer."""
    if (signs := relation(text)) in (["="], ["\\in"], ["\\approx"]):
        left, right = split_top(text, r"\\in(?![a-zA-Z])|=|\\approx(?![a-zA-Z])")
        if NAME.fullmatch(left) and right:
            return right
        if NAME.fullmatch(right) and left and signs == ["="]:
            return left
    return text


def same_relation(p, kp, r, kr, depth) -> bool:
    parts = lambda t: split_top(t, RELATION.pattern)
    if len(items(p)) > 1 or len(items(r)) > 1:
        return same_items(expand(items(p)), expand(items(r)), depth)
    if kp == kr == ["="]:
        (a, b), (c, d) = parts(p), parts(r)
        if NAME.fullmatch(a) and NAME.fullmatch(c) and same(a, c, depth + 1):
            return same(b, d, depth + 1)
        if same(a, c, depth + 1) and same(b, d, depth + 1):
            return True
        if enclosed(b) or enclosed(d):
            return False
        return proportional(f"({a})-({b})", f"({c})-({d})", signed=False)
    if not kp or not kr:                                       # "x = 5" and "5"; "x \in [1, 2]" and "[1, 2]"
        with_sign, plain, k = (p, r, kp) if kp else (r, p, kr)
        stripped = strip_name(with_sign)
        if stripped != with_sign:
            return same(stripped, plain, depth + 1)
        if (found := interval(with_sign, k)) is not None and enclosed(plain):
            return same(found, plain, depth + 1)
        return False
    ip, ir = interval(p, kp), interval(r, kr)
    if "\\in" in kp or "\\in" in kr:
        a = strip_name(p) if kp == ["\\in"] else ip
        b = strip_name(r) if kr == ["\\in"] else ir
        return a is not None and b is not None and same(a, b, depth + 1)
    a, b = parts(p), parts(r)
    if len(kp) != len(kr):
        return False
    if len(kp) == 1:
        (x, y), (u, v), s, t = a, b, kp[0], kr[0]
        if s in (">", "\\ge"):
            s, x, y = FLIP[s], y, x
        if t in (">", "\\ge"):
            t, u, v = FLIP[t], v, u
        return s == t and proportional(f"({x})-({y})", f"({u})-({v})", signed=s != "\\ne")
    if all(s in (">", "\\ge") for s in kp):
        kp, a = [FLIP[s] for s in reversed(kp)], a[::-1]
    if all(s in (">", "\\ge") for s in kr):
        kr, b = [FLIP[s] for s in reversed(kr)], b[::-1]
    return kp == kr and all(same(x, y, depth + 1) for x, y in zip(a, b))


def interval(text: str, signs: list[str]) -> str | None:
    """"[-2, 7)" of "-2 \\le x < 7", "[5, \\infty)" of "x \\ge 5"."""
    parts = split_top(text, RELATION.pattern)
    if len(signs) == 2 and NAME.fullmatch(parts[1]) and all(s in FLIP for s in signs):
        if all(s in (">", "\\ge") for s in signs):
            parts, signs = parts[::-1], [FLIP[s] for s in reversed(signs)]
        if all(s in ("<", "\\le") for s in signs):
            return ("[" if signs[0] == "\\le" else "(") + parts[0] + "," + parts[2] + ("]" if signs[1] == "\\le" else ")")
    if len(signs) == 1 and signs[0] in FLIP:
        (a, b), s = parts, signs[0]
        if NAME.fullmatch(b) and not NAME.fullmatch(a):
            a, b, s = b, a, FLIP[s]
        if NAME.fullmatch(a) and not NAME.fullmatch(b):
            return {"<": f"(-\\infty,{b})", "\\le": f"(-\\infty,{b}]", ">": f"({b},\\infty)", "\\ge": f"[{b},\\infty)"}[s]
    return None


def matrix(text: str) -> list[list[str]] | None:
    m = re.fullmatch(r"[\[(]?\s?\\begin\s?\{([pbvBV]?matrix|smallmatrix|array)\}\s?(?:\{[clr|\s]*\})?(.*?)\\end\s?\{\1\}\s?[\])]?", text, re.S)
    if not m or m[1] in ("vmatrix", "Vmatrix"):
        return None
    rows = [row.strip() for row in re.split(r"\\\\|\\cr", m[2])]
    return [[cell.strip() for cell in row.split("&")] for row in rows if row]


# Values: a grammar of our own, evaluated exactly where possible

FUNCTIONS = {"sin", "cos", "tan", "cot", "sec", "csc", "arcsin", "arccos", "arctan", "sinh", "cosh", "tanh", "ln", "log", "lg", "exp", "sqrt", "abs"}
NAMES = FUNCTIONS | {"pi", "frac", "infty", "cdot"}            # words that are mathematics, not units
GREEK = {"alpha", "beta", "gamma", "delta", "epsilon", "varepsilon", "zeta", "eta", "theta", "vartheta", "iota", "kappa", "lambda", "mu", "nu", "xi", "rho", "sigma", "tau", "phi", "varphi", "chi", "psi",
         "omega", "Gamma", "Delta", "Theta", "Lambda", "Sigma", "Phi", "Psi", "Omega", "ell"}
TOKEN = re.compile(r"\s*(?:(\d+\.?\d*(?:[eE][+-]?\d{1,4}(?![\w.]))?|\.\d+)|\\([a-zA-Z]+)|([a-zA-Z]+)|(\*\*|[-+*/^_(){}\[\]|!,'=]))")


def tokens_of(text: str) -> list[tuple[str, str]]:
    text = re.sub(r"(?<=\d)\s(?=\d{3}\b)", "", text) if re.fullmatch(r"-?\d{1,3}(\s\d{3})+", text) else text
    out, at = [], 0
    while at < len(text):
        m = TOKEN.match(text, at)
        if not m:
            if not text[at:].strip():
                break
            raise Hard(text[at:at + 10])
        at = m.end()
        if m[1]:
            out.append(("number", m[1]))
        elif m[2]:
            out.append(("command", m[2]))
        elif m[3]:
            out += letters(m[3])
        else:
            out.append(("sign", "^" if m[4] == "**" else m[4]))
        if len(out) > 400:
            raise Hard
    return out


def letters(run: str) -> list[tuple[str, str]]:
    """A run of letters: a function's name, a word (one symbol), or a product of single letters."""
    out = []
    while run:
        name = next((f for f in sorted(FUNCTIONS | {"pi"}, key=len, reverse=True) if run.startswith(f) and len(f) > 1), None)
        if name:
            out.append(("command", name))
            run = run[len(name):]
        elif len(run) > 3 or (len(run) == 3 and run.islower() and not set(run) & set("xyzabcnkpqrt")):
            return out + [("word", run)]
        else:
            out.append(("letter", run[0]))
            run = run[1:]
    return out


class Parser:
    """Recursive descent over a whitelist: sums, products (written or not), powers, fractions, roots, functions, |x|, n!, subscripts."""

    def __init__(self, text: str):
        self.tokens, self.at, self.depth, self.bars = tokens_of(text), 0, 0, 0

    def peek(self, n=0):
        return self.tokens[self.at + n] if self.at + n < len(self.tokens) else ("end", "")

    def take(self, value=None):
        token = self.peek()
        if value is not None and token != ("sign", value):
            raise Hard
        self.at += 1
        return token

    def parse(self):
        tree = self.sum()
        if self.peek()[0] != "end":
            raise Hard
        return tree

    def sum(self):
        self.depth += 1
        if self.depth > 40:
            raise Hard
        terms = [self.product()]
        while self.peek() in (("sign", "+"), ("sign", "-")):
            terms.append(self.product() if self.take()[1] == "+" else ("neg", self.product()))
        self.depth -= 1
        return ("+", *terms) if len(terms) > 1 else terms[0]

    def product(self):
        sign = 1
        while self.peek() in (("sign", "+"), ("sign", "-")):
            sign *= -1 if self.take()[1] == "-" else 1
        tree = self.factor()
        while True:
            kind, value = self.peek()
            if (kind, value) in (("sign", "*"), ("command", "cdot"), ("command", "times")):
                self.take()
                tree = ("*", tree, self.signed())
            elif (kind, value) in (("sign", "/"), ("command", "div")):
                self.take()
                tree = ("/", tree, self.signed())
            elif kind == "number" and self.at and self.peek(-1)[0] == "number":
                # "1 1/2": a mixed number; two numbers side by side are nothing else
                if self.peek(1) == ("sign", "/") and self.peek(2)[0] == "number" and tree[0] == "number" and "." not in value:
                    self.take(), self.take()
                    tree = ("+", tree, ("/", ("number", value), ("number", self.take()[1])))
                else:
                    raise Hard
            elif kind in ("number", "letter", "word") or (kind == "command" and value not in ("cdot", "times", "div")) or (kind == "sign" and value in "({[" and value) \
                    or (value == "|" and kind == "sign" and not self.bars):
                right = self.factor()
                if tree[0] == "number" and "." not in tree[1] and right[0] == "/" and right[1][0] == right[2][0] == "number" and (kind, value) == ("command", "frac"):
                    tree = ("+", tree, right)                  # 1\frac{1}{2}
                else:
                    tree = ("*", tree, right)
            else:
                break
        return ("neg", tree) if sign < 0 else tree

    def signed(self):
        if self.peek() in (("sign", "-"), ("sign", "+")):
            return ("neg", self.signed()) if self.take()[1] == "-" else self.signed()
        return self.factor()

    def factor(self):
        tree = self.atom()
        while True:
            if self.peek() == ("sign", "!"):
                self.take()
                tree = ("!", tree)
            elif self.peek() == ("sign", "^"):
                self.take()
                power = self.argument(signed=True)
                return self.after_power(("^", tree, power))
            else:
                return tree

    def after_power(self, tree):
        while self.peek() == ("sign", "!"):
            self.take()
            tree = ("!", tree)
        return tree

    def argument(self, signed=False):
        """{...}, or what LaTeX takes without braces: one digit, one letter, one command."""
        self.depth += 1                                        # 40 braces, roots or signs within each other are enough
        if self.depth > 40:
            raise Hard
        tree = self.bare_argument(signed)
        self.depth -= 1
        return tree

    def bare_argument(self, signed):
        kind, value = self.peek()
        if (kind, value) == ("sign", "{"):
            return self.group("}")
        if signed and kind == "sign" and value in "+-":
            self.take()
            inner = self.argument(True)
            return ("neg", inner) if value == "-" else inner
        if (kind, value) == ("sign", "("):
            return self.group(")")
        if kind == "number" and not signed and len(value) > 1 and value.isdigit():
            self.tokens[self.at] = ("number", value[1:])       # \frac12: one digit each
            return ("number", value[0])
        if kind in ("number", "letter", "command"):
            return self.atom()
        raise Hard

    def group(self, close):
        self.take()
        bars, self.bars = self.bars, 0
        tree = self.sum()
        self.bars = bars
        self.take(close)
        return tree

    def atom(self):
        kind, value = self.take()
        if kind == "number":
            if self.peek() in (("command", "overline"), ("command", "dot"), ("command", "bar")) and "." in value:      # 0.1\overline{6}
                self.take()
                period = self.argument()
                if period[0] != "number" or not period[1].isdigit() or len(period[1]) > 50:
                    raise Hard
                shift = len(value.partition(".")[2])
                return ("+", ("number", value), ("/", ("number", period[1]), ("number", "9" * len(period[1]) + "0" * shift)))
            if self.peek() == ("sign", "_"):                   # 204_5: a numeral in base 5, which is not the number 204
                self.take()
                base = self.argument()
                if base[0] != "number":
                    raise Hard
                return ("symbol", f"{value} in base {base[1]}")
            return ("number", value)
        if kind in ("letter", "word"):
            name = self.subscript(value)
            while self.peek() == ("sign", "'"):
                self.take()
                name += "'"
            return ("symbol", name)
        if kind == "sign":
            self.at -= 1
            if value in ("(", "[", "{"):
                return self.group({"(": ")", "[": "]", "{": "}"}[value])
            if value == "|":
                self.take()
                self.bars += 1
                tree = self.sum()
                self.bars -= 1
                self.take("|")
                return ("call", "abs", tree)
            raise Hard
        if kind != "command":
            raise Hard
        if value == "frac":
            top = self.argument()
            return ("/", top, self.argument())
        if value == "sqrt":
            if self.peek() == ("sign", "["):
                index = self.group("]")
                return ("^", self.argument(), ("/", ("number", "1"), index))
            return ("^", self.argument(signed=True) if self.peek()[0] != "number" else self.atom(), ("/", ("number", "1"), ("number", "2")))
        if value in ("binom", "tbinom", "dbinom"):
            n = self.argument()
            return ("call", "binom", n, self.argument())
        if value in ("lfloor", "lceil"):
            tree = self.sum()
            if self.take() != ("command", "rfloor" if value == "lfloor" else "rceil"):
                raise Hard
            return ("call", "floor" if value == "lfloor" else "ceil", tree)
        if value in FUNCTIONS:
            base = power = None
            while self.peek() in (("sign", "_"), ("sign", "^")):
                if self.take()[1] == "_":
                    base = self.argument()
                else:
                    power = self.argument(signed=True)
            if self.peek() == ("sign", "("):
                inner = self.group(")")
            elif self.peek() == ("sign", "{"):
                inner = self.group("}")
            else:                                              # \sin 2x: a product without written signs
                inner = self.factor()
                while self.peek()[0] in ("letter", "number") or self.peek() in (("command", "pi"), ("command", "theta")):
                    inner = ("*", inner, self.factor())
            if power == ("neg", ("number", "1")) and value in ("sin", "cos", "tan"):
                return ("call", "arc" + value, inner)
            tree = ("call", value, inner, base) if base is not None else ("call", value, inner)
            return ("^", tree, power) if power is not None else tree
        if value == "pi" or value == "infty":
            return (value,)
        if value in GREEK or value in ("overline", "bar", "vec", "hat", "angle", "triangle", "emptyset"):
            if value in ("overline", "bar", "vec", "hat"):
                return ("symbol", f"{value} {self.argument()!r}")
            return ("symbol", self.subscript(value))
        raise Hard(value)

    def subscript(self, name):
        if self.peek() == ("sign", "_"):
            self.take()
            if self.peek() == ("sign", "{"):
                begin, depth = self.at, 0
                while True:
                    token = self.take()
                    depth += (token == ("sign", "{")) - (token == ("sign", "}"))
                    if token[0] == "end":
                        raise Hard
                    if depth == 0:
                        break
                return name + "_" + "".join(v for _, v in self.tokens[begin + 1:self.at - 1])
            return name + "_" + self.take()[1]
        return name


BITS = 200_000          # no exact number larger than this


def value_of(tree, env, mp):
    """The value of a tree: a Fraction as long as it is one, then an mpmath number of 40 digits. Bounded: powers and factorials that would fill the memory raise."""
    kind = tree[0]
    if kind == "number":
        if len(tree[1]) > 5000:
            raise Hard
        exponent = re.search(r"[eE]([+-]?\d+)$", tree[1])
        if exponent and abs(int(exponent[1])) > 3000:
            raise Hard
        return Fraction(tree[1].rstrip(".") if not exponent else tree[1])
    if kind == "symbol":
        return +mp.e if tree[1] == "e" else mp.mpc(0, 1) if tree[1] == "i" else env[tree[1]]
    if kind == "pi":
        return +mp.pi
    if kind == "infty":
        raise Hard
    args = [value_of(t, env, mp) for t in tree[1:] if isinstance(t, tuple)]
    if kind == "neg":
        return -args[0]
    exact = all(isinstance(a, Fraction) for a in args)
    real = [to_mp(a, mp) for a in args] if not exact else args
    if kind == "+":
        return bounded(sum(real[1:], real[0]))
    if kind == "*":
        return bounded(real[0] * real[1])
    if kind == "/":
        return bounded(real[0] / real[1])
    if kind == "^":
        base, power = args
        if isinstance(base, Fraction) and isinstance(power, Fraction) and power.denominator == 1:
            n = abs(power.numerator)
            if base in (0, 1, -1) or n * max(base.numerator.bit_length(), base.denominator.bit_length()) < BITS:
                return base ** (power.numerator if base not in (1, -1) else power.numerator % 2)
        base, power = to_mp(base, mp), to_mp(power, mp)
        if base == 0:
            return base ** power
        if abs(power) * (abs(mp.log(abs(base))) + 4) > 10**7:
            raise Hard
        return base ** power
    if kind == "!":
        n = args[0]
        if isinstance(n, Fraction) and n.denominator == 1 and 0 <= n < 5000:
            return Fraction(math.factorial(n.numerator))
        if isinstance(n, Fraction) or abs(n) > 1000:
            raise Hard
        return mp.gamma(n + 1)
    name, x = tree[1], args[0]
    if name == "abs" and isinstance(x, Fraction):
        return abs(x)
    if name in ("floor", "ceil"):
        x = x if isinstance(x, Fraction) else Fraction(str(mp.nstr(mp.re(x), 30)))
        return Fraction(math.floor(x) if name == "floor" else math.ceil(x))
    if name == "binom":
        if all(isinstance(a, Fraction) and a.denominator == 1 and 0 <= a < 5000 for a in args):
            return Fraction(math.comb(args[0].numerator, args[1].numerator))
        n, k = (to_mp(a, mp) for a in args)
        if max(abs(n), abs(k)) > 1000:
            raise Hard
        return mp.binomial(n, k)
    x = to_mp(x, mp)
    if abs(x) > 10**6 and name not in ("ln", "log", "lg", "abs"):
        raise Hard
    if name == "log":
        return mp.log(x) / (mp.log(to_mp(args[1], mp)) if len(args) > 1 else 1)
    if name == "lg":
        return mp.log(x) / mp.log(10)
    return {"sin": mp.sin, "cos": mp.cos, "tan": mp.tan, "cot": mp.cot, "sec": mp.sec, "csc": mp.csc, "arcsin": mp.asin, "arccos": mp.acos, "arctan": mp.atan,
            "sinh": mp.sinh, "cosh": mp.cosh, "tanh": mp.tanh, "ln": mp.log, "exp": mp.exp, "sqrt": mp.sqrt, "abs": abs}[name](x)


def bounded(x):
    if isinstance(x, Fraction) and max(x.numerator.bit_length(), x.denominator.bit_length()) > 2 * BITS:
        raise Hard
    return x


def to_mp(x, mp):
    return mp.mpf(x.numerator) / x.denominator if isinstance(x, Fraction) else x


def symbols_of(tree) -> set:
    if tree[0] == "symbol":
        return {tree[1]}
    return set().union(*(symbols_of(t) for t in tree[1:] if isinstance(t, tuple)))


def points(names: set, mp):
    """Values for the symbols: the same for both sides, positive and negative, irrational, different for different names."""
    rng, names = random.Random(20240626), sorted(names)
    for low, high in ((0.3, 1.7), (0.4, 2.3), (-1.9, -0.2), (1.1, 3.9), (-2.7, 2.7)):
        yield {name: mp.mpf(rng.uniform(low, high)) + mp.mpf(rng.random()) * mp.mpf(10) ** -17 for name in names}


def trees(p: str, r: str):
    a, b = Parser(p).parse(), Parser(r).parse()
    names = symbols_of(a) | symbols_of(b)
    return a, b, names - {"e", "i"}


PLAIN = re.compile(r"[-+]?\s?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d{1,3})?")


def same_value(p: str, r: str) -> bool:
    """Numbers exactly; other expressions by their values, to 40 digits, at five points."""
    if re.sub(r"\s", "", p.lower()) == re.sub(r"\s", "", r.lower()) and len(re.sub(r"[^A-Za-z]", "", p)) > 2:
        return True
    if PLAIN.fullmatch(p) and PLAIN.fullmatch(r):
        return Fraction(p.replace(" ", "")) == Fraction(r.replace(" ", ""))
    if "\\infty" in p or "\\infty" in r:
        return re.sub(r"[\s+]", "", p) == re.sub(r"[\s+]", "", r)
    try:
        a, b, names = trees(p, r)
    except Hard:
        return words(p) == words(r) and len(words(p)) > 0
    from mpmath import mp
    with mp.workdps(40):
        good = 0
        for env in points(names, mp):
            try:
                x, y = value_of(a, env, mp), value_of(b, env, mp)
            except (ZeroDivisionError, OverflowError, ValueError, KeyError, TypeError):
                if not names:
                    return False
                continue
            if isinstance(x, Fraction) and isinstance(y, Fraction):
                if x == y:
                    good += 1
                elif not names and (rounds_to(p, y, x) or rounds_to(r, x, y)):
                    return True
                else:
                    return False
            else:
                x, y = to_mp(x, mp), to_mp(y, mp)
                if not (mp.isfinite(x) and mp.isfinite(y)):
                    continue
                if abs(x - y) <= mp.mpf(10) ** -28 * (size if (size := max(abs(x), abs(y))) < 1e-6 else max(1, size)):
                    good += 1
                elif not names and (rounds_to(p, y, x) or rounds_to(r, x, y)):
                    return True
                else:
                    return False
            if not names:
                return good > 0
        return good >= 3


def rounds_to(text: str, exact, own) -> bool:
    """Is `text` a decimal of at least 6 figures that `exact` (of the other side) rounds or cuts to?"""
    m = re.fullmatch(r"[-+]?\s?(\d*)\.(\d+)", text)
    if not m or len((m[1] + m[2]).lstrip("0")) < 6 or len(m[2]) < 4:
        return False
    return abs(own - exact) < (Fraction(1, 10 ** len(m[2])) if isinstance(exact, Fraction) and isinstance(own, Fraction) else 10.0 ** -len(m[2]))


def proportional(p: str, r: str, signed: bool) -> bool:
    """Is p = c r for one constant c (positive if signed)? Then p = 0 and r = 0 are the same equation, p < 0 and r < 0 the same inequality."""
    try:
        a, b, names = trees(p, r)
    except Hard:
        return False
    if not names:
        return False
    if symbols_of(a) - {"e", "i"} != symbols_of(b) - {"e", "i"}:
        return False
    from mpmath import mp
    with mp.workdps(40):
        ratios = []
        for env in points(names, mp):
            try:
                x, y = (to_mp(value_of(t, env, mp), mp) for t in (a, b))
                if y != 0 and mp.isfinite(x) and mp.isfinite(y):
                    ratios.append(x / y)
            except (ZeroDivisionError, OverflowError, ValueError, KeyError, TypeError):
                continue
        if len(ratios) < 3 or ratios[0] == 0:
            return False
        return all(abs(q - ratios[0]) < mp.mpf(10) ** -25 * abs(ratios[0]) for q in ratios) and (not signed or mp.re(ratios[0]) > 0)


# ---------------------------------------------------------------------------------------------------------------------
# READERS: problems, in the layouts that the public sets have
# ---------------------------------------------------------------------------------------------------------------------

CARRIED = ("level", "subject", "dataset", "step", "rejected", "full_rejected", "solution")  # from problem to samples
LATEX_ENDS = re.compile(r"(?:\\end\{problem\}|\\noindent|\\\\|\s)+$")        # what Odyssey's texts end in


@dataclass
class Problem:
    where: str                                   # "file:line"
    id: str | int
    question: str
    answer: str                                  # gold
    prefix: str                                  # the reasoning so far; generation continues there
    carried: dict                                # what goes along into the rows that come of it


def read_problem(where: str, row: dict) -> Problem:
    """One row of any of these layouts; DataError where it has no question, no answer, or a prefix that is not text.

        the pipeline's own     {id, question, answer, prefix, ...}
        anyone's               {question | problem | prompt | instruction, answer}; answer: text, number, list of one
        GSM8K                  {question, answer: "working #### 18"}
        MATH                   {problem, solution: "... \\boxed{18} ...", level, type}
        AQuA                   {question, options: ["A)18", ...], correct: "A"}
        Odyssey                {"Problem_7": {question, answer, label, level}}
    """
    if len(row) == 1 and isinstance(inner := next(iter(row.values())), dict):
        clean = {k: LATEX_ENDS.sub("", v) if isinstance(v, str) else v for k, v in inner.items()}
        row = {"id": next(iter(row))} | clean
    name = next((name for name in ("question", "problem", "prompt", "instruction") if name in row), "question")
    question = text_field(row, name, where)
    if not question.strip():
        raise DataError(f"{where}: field {name!r} is empty; expected the text of a problem")
    carried = {key: row[key] for key in CARRIED if row.get(key) is not None}
    for own, public in (("subject", ("type", "label")), ("solution", ("rationale", "reasoning", "output"))):
        found = next((row[key] for key in public if isinstance(row.get(key), str)), None)
        if own not in carried and found is not None:
            carried[own] = found

    answer, solution = row.get("answer"), carried.get("solution")
    if isinstance(row.get("options"), list):
        options = [re.sub(r"^\s*\(?[A-Z]\s*\)\s*", "", str(option)) for option in row["options"]]
        question += "\nAnswer Choices: " + " ".join(f"({letter}) {o}" for letter, o in zip(ascii_uppercase, options))
        answer = row.get("correct", answer)
    if isinstance(answer, list) and len(answer) == 1:
        answer = answer[0]
    if type(answer) in (int, float) and abs(answer) < math.inf:
        answer = str(int(answer) if answer == int(answer) else answer)
    if isinstance(answer, str) and "####" in answer:
        working, _, answer = answer.rpartition("####")
        carried.setdefault("solution", working.strip())
    elif isinstance(answer, str):
        answer = boxed_answer(answer) or answer
    elif answer is None and isinstance(solution, str):
        answer = boxed_answer(solution)
    if answer is None:
        raise DataError(f"{where}: no answer (found: {', '.join(row)}); expected a field 'answer', "
                        "or a 'solution' with \\boxed{...}")
    answer = text_field({"answer": answer}, "answer", where).strip()
    if not answer:
        raise DataError(f"{where}: field 'answer' is empty; a problem without an answer cannot be graded")
    id = next((row[key] for key in ("id", "idx", "unique_id") if type(row.get(key)) in (str, int)), None)
    prefix = text_field(row, "prefix", where) if row.get("prefix") is not None else ""
    return Problem(where, int(re.search(r"\d+$", where)[0]) if id is None else id, question, answer, prefix, carried)


def boxed_answer(solution: str) -> str | None:
    """The gold answer of a worked solution, if it is marked as such."""
    return extract_answer(solution) if "\\boxed" in solution or "\\fbox" in solution else None


def read_attempt(where: str, row: dict) -> tuple[Problem, str]:
    """A graded sample: its problem, with all of the row carried along, and its whole reasoning, prefix included."""
    problem = read_problem(where, row)
    text = problem.prefix + text_field(row, "completion", where)
    if type(row.get("correct")) is not bool:
        row = row | {"correct": grade(text, problem.answer)[1]}
    return replace(problem, carried=row), text


def read_file(args: argparse.Namespace, bad: list[DataError]) -> list:
    """The problems of F, or with --rollouts its wrong attempts. Rows that cannot be used go to `bad`."""
    items, read = [], read_attempt if args.rollouts else read_problem
    for where, row in itertools.islice(read_rows(args.problems, bad), args.limit):
        try:
            dumps(row).encode()
            items.append(read(where, row))
        except DataError as error:
            bad.append(error)
        except (UnicodeEncodeError, RecursionError):
            bad.append(DataError(f"{where}: half a surrogate pair in it, or too deep an object; make the row again"))
    if args.rollouts:
        items = [item for item in items if not item[0].carried["correct"]]
    if not items:
        raise DataError(f"{args.problems}: holds no {'wrong attempt' if args.rollouts else 'problem'} that can be used"
                        + (f" ({len(bad)} bad rows; the first: {bad[0]})" if bad else ""))
    return items


# ---------------------------------------------------------------------------------------------------------------------
# SAMPLING: from the project's own model or from a server; every sample on disk as it is finished
# ---------------------------------------------------------------------------------------------------------------------

class Local:
    """Samples from a checkpoint, by model.py."""

    def __init__(self, args: argparse.Namespace):
        folder = resolve(args.model)
        device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
        if device.startswith("cuda") and not torch.cuda.is_available():
            raise DataError(f"--device {device}: PyTorch finds no GPU here; use --device cpu")
        if device == "cuda":
            device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        kind = device.partition(":")[0]
        dtype = args.dtype or ("fp32" if kind == "cpu" else "bf16")
        self.args, self.tokenizer = args, Tokenizer.from_pretrained(folder)
        self.stop_ids = self.tokenizer.stop_ids(args.prompt)
        self.model = Llama.from_pretrained(folder, {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype], device)
        self.settings = {"model": f"{folder.resolve().name} {fingerprint(folder)}", "dtype": dtype, "device": kind}

    def prepare(self, problem: Problem, text: str, cut: int | None = None) -> tuple[list[int], str]:
        """What `run` wants of a prompt, and the reasoning that is in it: `text`, or its steps before character `cut`.

        With a cut, the prompt ends at a token of the whole text, so that the model reads on from the very tokens that
        it would have written; line ends after the step belong to it where they are one token with its full stop."""
        found = self.tokenizer.control_token_in(problem.question) or self.tokenizer.control_token_in(text)
        if found:
            raise DataError(f"{problem.where}: it contains the control token {found}, which is no text; remove it")
        rendered = render_prompt(self.args.prompt, problem.question, self.tokenizer)
        ids, offsets = self.tokenizer.encode(rendered + text)
        if cut is not None:
            cut = len(rendered) + len(text) - len(text[cut:].lstrip())
            kept = sum(1 for _, end in offsets if end <= cut)
            ids, text = ids[:kept], text[:max(0, offsets[kept - 1][1] - len(rendered))]
        most = self.model.config.max_position_embeddings - 1
        if not 0 < len(ids) <= most:
            raise DataError(f"{problem.where}: prompt and prefix have {len(ids)} tokens; the model takes 1 to {most}")
        return ids, text

    def batches(self, prompts: list[list[int]], n: int) -> list[list[int]]:
        """Indices of the prompts that are computed together: alike in length, about `batch_size` samples. It looks at
        the prompts alone, not at what is done already: a batch is computed whole, so that each sample has the same
        neighbours, hence the very numbers, whether the run was disturbed or not."""
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        size = max(1, self.args.batch_size // n)
        return [order[at:at + size] for at in range(0, len(order), size)]

    def run(self, prompts: list[list[int]], n: int, seed: int, done: set, on_finish: Callable) -> None:
        """n continuations of each prompt; on_finish(i, j, text, tokens, stop_reason) hears of each."""
        def finished(i, j, sample):
            text = self.tokenizer.continuation(prompts[i], sample.token_ids)
            if sample.stop_reason == "stop":
                text = text[:min((at for stop in a.stop if (at := text.find(stop)) >= 0), default=len(text))]
            on_finish(i, j, text, len(sample.token_ids), sample.stop_reason)
        a = self.args
        generate(self.model, prompts, n=n, max_new_tokens=a.max_new_tokens, temperature=a.temperature, top_p=a.top_p,
                 eos_ids=self.stop_ids, stop=tuple(a.stop), decode=self.tokenizer.decode, seed=seed, on_finish=finished)


class Remote:
    """Samples from an OpenAI-compatible server: /chat/completions where it can render the prompt itself, that is
    for a chat without a prefix, else /completions with the rendered text."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.refused = args, []
        self.endpoint = Endpoint(args.endpoint, args.api_model)
        self.tokenizer = Tokenizer.from_pretrained(resolve(args.model)) if args.model else None
        self.settings = {"endpoint": args.endpoint, "api_model": args.api_model}

    def prepare(self, problem: Problem, text: str, cut: int | None = None) -> tuple[tuple, str]:
        where, question, style = problem.where, problem.question, self.args.prompt
        text = text if cut is None else text[:cut].rstrip()
        if found := re.search(r"<\|[\w-]{1,40}\|>", question + text):
            raise DataError(f"{where}: it contains the control token {found[0]}, which is no text; remove it")
        if style in ("chat", "qwen2-boxed") and not text:
            messages = [{"role": "user", "content": question}]
            if style == "qwen2-boxed":
                messages = [{"role": "system", "content": "You are a helpful assistant."},
                            {"role": "user", "content": question + BOXED}]
            return (where, "chat/completions", {"messages": messages}), text
        if style == "chat" and self.tokenizer is None:
            raise DataError(f"{where}: --prompt chat needs the checkpoint's template for a prefix: give --model")
        return (where, "completions", {"prompt": render_prompt(style, question, self.tokenizer) + text}), text

    def batches(self, prompts: list, n: int) -> list[list[int]]:
        return [list(range(len(prompts)))]       # the server makes its own batches: keep it busy to the end

    def run(self, prompts: list, n: int, seed: int, done: set, on_finish: Callable) -> None:
        """As Local.run, but what is `done`, pairs (i, j), is not asked for. What is refused lands in `refused`."""
        a = self.args

        def ask(i, j):
            where, path, body = prompts[i]
            body = body | {"max_tokens": a.max_new_tokens, "temperature": a.temperature, "top_p": a.top_p,
                           "seed": stable_key(seed, body, j) % 2**31} | ({"stop": a.stop} if a.stop else {})
            try:
                reply = self.endpoint.post(path, body)
                choice, usage = reply["choices"][0], reply.get("usage")
                text = choice["message"]["content"] if path.startswith("chat") else choice["text"]
                if not isinstance(text, str | None):
                    raise TypeError
            except RequestRefused as error:
                return i, j, DataError(f"{where}: {error}")
            except (LookupError, TypeError):
                return i, j, DataError(f"{where}: the server's reply has no completion in it ({str(reply)[:200]!r})")
            tokens = usage.get("completion_tokens") if isinstance(usage, dict) else None
            reason = choice.get("finish_reason")
            if reason == "stop":                 # says both; vLLM gives the stop string, if it was one, in stop_reason
                reason = "stop" if isinstance(choice.get("stop_reason"), str) else "eos"
            return i, j, (text or "", tokens if type(tokens) is int else None, str(reason))

        with ThreadPoolExecutor(a.concurrency) as pool:
            try:
                wanted = [(i, j) for i in range(len(prompts)) for j in range(n) if (i, j) not in done]
                for future in as_completed([pool.submit(ask, i, j) for i, j in wanted]):
                    i, j, outcome = future.result()
                    if isinstance(outcome, DataError):
                        self.refused.append(outcome)
                    else:
                        on_finish(i, j, *outcome)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise


def fingerprint(folder: Path) -> str:
    """Tells checkpoints apart without reading all of them: the small files whole, of each weight file its size and 16
    places."""
    digest = hashlib.blake2b(digest_size=6)
    patterns = ("*.safetensors", "config.json", "generation_config.json", "tokenizer*.json", "special*.json", "*.jinja")
    for path in sorted(path for pattern in patterns for path in folder.glob(pattern)):
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode())
        with path.open("rb") as file:
            for k in range(16 if size > 2**20 else 1):
                file.seek(k * size // 16)
                digest.update(file.read(2**16 if size > 2**20 else size))
    return digest.hexdigest()


class Journal:
    """What is finished, on disk the moment it is: OUT.journal-R of rank R, a line of settings, then [key, value] lines.

    What is in `done` when a run begins need not be computed again. A journal of other settings is refused."""

    def __init__(self, out: Path, settings: dict, rank: int, restart: bool = False):
        self.out, self.settings, self.path, self.done = out, settings, Path(f"{out}.journal-{rank}"), {}
        self.files = self.find()
        for path in [] if restart else self.files:
            for number, line in enumerate(path.read_bytes().split(b"\n")[:-1]):  # behind the last \n: a torn line
                try:
                    entry = json.loads(line)
                    if number:
                        self.done[tuple(entry[0])] = entry[1]
                except (ValueError, TypeError, LookupError):
                    entry = None                 # damaged: that sample is computed again
                if not number:
                    refuse_other(entry, settings, path)

    def find(self) -> list[Path]:
        found = self.out.parent.glob(f"{glob.escape(self.out.name)}.journal-*")
        return sorted(path for path in found if path.suffix.removeprefix(".journal-").isdecimal())

    def remove(self) -> None:
        for path in self.find():
            path.unlink()

    def open(self) -> None:
        """Begin to write. Under torchrun: once all ranks have read."""
        with self.path.open("ab+") as file:      # a torn line goes away
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
        self.file = self.path.open("a", encoding="utf-8", newline="\n")
        if self.file.tell() == 0:
            self.write(self.settings)

    def add(self, key: tuple, value) -> None:
        if key not in self.done:
            self.done[key] = value
            self.write([key, value])

    def write(self, entry) -> None:
        self.file.write(dumps(entry) + "\n")
        self.file.flush()


def refuse_other(old, new: dict, path: Path) -> None:
    """DataError naming what differs between the settings of what lies at `path` and the present ones."""
    old = old if isinstance(old, dict) else {}
    changed = [f"{key} was {old.get(key)!r}, is {new.get(key)!r}" for key in new | old if old.get(key) != new.get(key)]
    if changed:
        raise DataError(f"{path}: was made otherwise: {'; '.join(changed)}; "
                        "choose another --out, or begin anew with --restart")


def dumps(value) -> str:
    return json.dumps(value, ensure_ascii=False)


def grade(reasoning: str, answer: str) -> tuple[str | None, bool]:
    """(the extracted answer, whether it is equivalent to the gold one)"""
    extracted = extract_answer(reasoning)
    return extracted, extracted is not None and is_equivalent(extracted, answer)


def printable(text: str) -> str:
    """Without what a UTF-8 file, or the next stage, could not carry: NULs and half surrogate pairs."""
    return text.replace("\0", "\ufffd").encode("utf-8", "replace").decode()


@dataclass
class Work:
    """What sampling needs to know, and how much of it one rank has done."""
    args: argparse.Namespace
    sampler: Local | Remote
    journal: Journal
    bad: list[DataError]
    rank: int = 0
    world: int = 1
    samples: int = 0
    tokens: int = 0

    def prepare(self, requests: list[tuple]) -> list[tuple | None]:
        """sampler.prepare of each; None, and a line in `bad`, where it cannot be. DataError where none can be."""
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

    def run(self, keys: list[tuple], prompts: list, n: int, seed: int, on_finish: Callable) -> None:
        """Draw n samples of each prompt, but for those whose keys (*key, j) are all in the journal."""
        done = {(i, j) for i, key in enumerate(keys) for j in range(n) if (*key, j) in self.journal.done}

        def count(i, j, text, tokens, reason):
            self.samples, self.tokens = self.samples + 1, self.tokens + (tokens or 0)
            on_finish(i, j, printable(text), tokens, reason)
        if len(done) < n * len(keys):
            self.sampler.run(prompts, n, seed, done, count)

    def progress(self, total: int | None, done: int, unit: str) -> tqdm:
        return tqdm(total=total, initial=done, unit=f" {unit}", disable=self.rank > 0, dynamic_ncols=True,
                    mininterval=0.5 if sys.stderr.isatty() else 30)


def sample_problems(problems: list[Problem], work: Work) -> None:
    """Journal n graded samples (i, j) -> row of each problem; this rank takes every world-th batch."""
    n, done = work.args.samples, work.journal.done
    prompts = work.prepare([(problem, problem.prefix) for problem in problems])
    kept = [i for i, prompt in enumerate(prompts) if prompt]
    batches = work.sampler.batches([prompts[i][0] for i in kept], n)[work.rank::work.world]
    batches = [[kept[b] for b in batch] for batch in batches]
    mine = [(i, j) for batch in batches for i in batch for j in range(n)]
    right, finished = sum(done[key]["correct"] for key in mine if key in done), sum(key in done for key in mine)
    with work.progress(len(mine), finished, "samples") as bar:
        for batch in batches:
            def finish(b, j, completion, tokens, reason):
                nonlocal right, finished
                if (batch[b], j) in done:
                    return
                problem = problems[batch[b]]
                extracted, correct = grade(problem.prefix + completion, problem.answer)
                work.journal.add((batch[b], j), {
                    "id": problem.id, "question": problem.question, "answer": problem.answer, "sample": j,
                    "prefix": problem.prefix, "completion": completion, "extracted": extracted, "correct": correct,
                    "tokens": tokens, "stop_reason": reason} | problem.carried)
                right, finished = right + correct, finished + 1
                bar.set_postfix_str(f"accuracy {right / finished:.1%}", refresh=False)
                bar.update()
            work.run([(i,) for i in batch], [prompts[i][0] for i in batch], n, work.args.seed, finish)


def value_steps(attempts: list[tuple[Problem, str]], work: Work) -> None:
    """Journal (a,) -> valued row of each wrong attempt: how often it still comes right from before each step, by
    rollouts (Monte Carlo values, as in Math-Shepherd, arXiv 2312.08935). This rank takes every world-th attempt.

    Rounds: in each, every undecided attempt names the step before which more samples tell most about its first error
    (data.next_prefix), half of `--rollouts` are drawn there, and the next round sees the counts; three times
    `--rollouts` at most for one step. With --every_step, one round of them all. The samples are journalled as
    (a, step, round, j) -> [takes the same step, is right], from which a restarted run names the same steps again."""
    args, done = work.args, work.journal.done
    n = args.rollouts if args.every_step else max(1, args.rollouts // 2)
    steps = [split_steps(text, args.steps) for _, text in attempts]
    before = lambda a, k: (*attempts[a], sum(map(len, steps[a][:k])))      # a request: attempt a, cut before step k
    fits = work.prepare([before(a, len(steps[a]) - 1) for a in range(len(attempts))])
    mine = [a for a in range(work.rank, len(attempts), work.world) if fits[a]]
    agreement = {a: [None] * len(steps[a]) for a in mine}                  # before a step: [same step, right, tries]
    values = {a: [None] * (len(steps[a]) - 1) + [[0, args.rollouts]] for a in mine}      # after it: [right, tries]
    with work.progress(n * sum(len(steps[a]) for a in mine) if args.every_step else None, 0, "rollouts") as bar:
        for round in itertools.count():
            if args.every_step:
                jobs = [(a, k, round) for a in agreement for k in range(len(steps[a])) if round == 0]
            else:
                wanted = {a: next_prefix(values[a], agreement[a], 3 * args.rollouts) for a in agreement}
                jobs = [(a, k, round) for a, k in wanted.items() if k is not None]
            if not jobs:
                break
            prompts = [work.sampler.prepare(*before(a, k)) for a, k, _ in jobs]
            for batch in work.sampler.batches([prompt for prompt, _ in prompts], n):
                def finish(b, j, completion, tokens, reason):
                    (a, k, _), text = jobs[batch[b]], prompts[batch[b]][1] + completion
                    right = grade(text, attempts[a][0].answer)[1]
                    taken = split_steps(text, args.steps)[k:k + 1]
                    same = right and bool(taken) and same_step(taken[0], steps[a][k], args.steps)
                    work.journal.add((*jobs[batch[b]], j), [same, right])
                    bar.update()
                work.run([jobs[i] for i in batch], [prompts[i][0] for i in batch], n, 1000 * args.seed + round, finish)
            for a, k, _ in jobs:
                outcomes = [done[a, k, round, j] for j in range(n) if (a, k, round, j) in done]
                if not outcomes:                 # a server refused them, which `bad` says
                    agreement.pop(a, None)
                elif a in agreement:
                    counts = (*map(sum, zip(*outcomes)), len(outcomes))
                    agreement[a][k] = [x + y for x, y in zip(agreement[a][k] or (0, 0, 0), counts)]
                    if k:
                        values[a][k - 1] = agreement[a][k][1:]
    for a in agreement:
        row = attempts[a][0].carried | {"steps": steps[a], "values": values[a], "agreement": agreement[a]}
        work.journal.add((a,), row)


# ---------------------------------------------------------------------------------------------------------------------
# SUMMARY: the table of accuracies
# ---------------------------------------------------------------------------------------------------------------------

def wilson(successes: float, n: int, z: float = 1.959964) -> tuple[float, float]:
    """The 95 % score interval of a rate (Wilson 1927): right also near 0 and 1, and for small n."""
    if n == 0:
        return 0.0, 1.0
    p, centre = successes / n, (successes + z * z / 2) / (n + z * z)
    half = z / (n + z * z) * math.sqrt(n * p * (1 - p) + z * z / 4)
    return max(0.0, centre - half), min(1.0, centre + half)


def pass_at_k(n: int, c: int, k: int) -> float:
    """P(one of k samples is right), from n with c right: 1 - C(n-c, k) / C(n, k), unbiased (Chen et al. 2021)."""
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def majority(rows: list[dict]) -> bool:
    """Whether the most frequent answer is right, equivalent answers counted together; the first of equals wins."""
    size: dict[str, int] = {}                    # the first text of a class stands for it
    right: dict[str, bool] = {}
    for text, times in Counter(row["extracted"] for row in rows if row["extracted"] is not None).items():
        name = next((known for known in size if is_equivalent(text, known)), text)
        size[name] = size.get(name, 0) + times
        right.setdefault(name, next(row["correct"] for row in rows if row["extracted"] == text))
    return bool(size) and right[max(size, key=size.get)]


def accuracy(groups: list[list[dict]]) -> dict:
    """groups: the samples of each problem. n counts problems, and so does the interval: samples of one problem are not
    independent, and more of them must not narrow it."""
    right, n = sum(sum(row["correct"] for row in rows) / len(rows) for rows in groups), len(groups)
    return {"n": n, "accuracy": right / n if n else 0.0} | dict(zip(("low", "high"), wilson(right, n)))


def summarize(groups: list[list[dict]]) -> dict:
    """The summary of graded samples, given as a list of rows for each problem."""
    rows = [row for group in groups for row in group]
    share = lambda condition: sum(map(condition, rows)) / max(1, len(rows))
    summary = accuracy(groups) | {"samples": len(rows), "no_answer": share(lambda row: row["extracted"] is None),
                                  "cut_off": share(lambda row: row["stop_reason"] == "length")}
    for field in ("level", "subject"):
        parts = defaultdict(list)
        for group in groups:
            if field in group[0]:
                parts[str(group[0][field])].append(group)
        if parts:
            summary[f"by_{field}"] = {name: accuracy(parts[name]) for name in sorted(parts)}
    most = min(map(len, groups), default=0)
    if most > 1:
        right, n = sum(map(majority, groups)), len(groups)
        summary["majority"] = {"n": n, "accuracy": right / n} | dict(zip(("low", "high"), wilson(right, n)))
        passed = lambda k: sum(pass_at_k(len(group), sum(row["correct"] for row in group), k) for group in groups) / n
        summary["pass_at"] = {str(k): passed(k) for k in sorted({2 ** e for e in range(most.bit_length())} | {most})}
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
    return "\n".join(lines + [f"no answer {summary['no_answer']:.1%}   cut off by length {summary['cut_off']:.1%}"])


# ---------------------------------------------------------------------------------------------------------------------
# COMMAND LINE
# ---------------------------------------------------------------------------------------------------------------------

def evaluate(args: argparse.Namespace) -> int:
    """The whole command, on every rank; returns the exit status. Ranks meet in files; they only wait for each other."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    started_here = world > 1 and not dist.is_initialized()
    if started_here:                             # the work may be uneven: wait long
        dist.init_process_group("gloo", timeout=timedelta(days=7))
    wait = dist.barrier if world > 1 else lambda: None
    try:
        bad: list[DataError] = []
        items = read_file(args, bad)
        sampler = (Remote if args.endpoint else Local)(args)
        settings = settings_of(args, sampler, items)
        out, summary_path = args.out, args.out.with_suffix(".summary.json")
        out.parent.mkdir(parents=True, exist_ok=True)
        journal = Journal(out, settings, rank, args.restart)
        complete = out.exists() and not journal.files and not args.restart
        if complete:
            if not summary_path.is_file():
                raise DataError(f"{out}: exists, without {summary_path.name} that would say how it was made; "
                                "choose another --out, or begin anew with --restart")
            refuse_other(read_json(summary_path).get("settings"), settings, out)
        wait()                                   # until all have read what there is
        if args.restart and rank == 0:
            journal.remove()
        wait()
        if not complete:
            work = Work(args, sampler, journal, bad, rank, world)
            journal.open()
            started = time.monotonic()
            (value_steps if args.rollouts else sample_problems)(items, work)
            seconds = time.monotonic() - started
            journal.file.close()
            bad += getattr(sampler, "refused", [])
            wait()
            if rank == 0:
                rows, summary = collect(args, Journal(out, settings, rank).done, len(items))
                speed = world * work.tokens / max(seconds, 1e-9)
                summary |= {"model": args.api_model or args.model, "settings": settings, "bad_rows": len(bad),
                            "seconds": round(seconds, 1), "tokens_per_second": round(speed, 1)}
                write_rows(out, rows)
                write_rows(summary_path, [summary])
                journal.remove()
    finally:
        if started_here:
            dist.destroy_process_group()
    if rank:
        return 0
    complain(bad)
    if bad:
        print(f"{len(bad)} rows of {args.problems} were left out", file=sys.stderr)
    summary = read_json(summary_path)
    print(f"{out}: {'already complete; ' if complete else ''}{summary['model']}, prompt {args.prompt}, "
          f"temperature {args.temperature}, top-p {args.top_p}, seed {args.seed}, {summary['seconds']} s, "
          f"{summary['tokens_per_second']:.0f} tokens/s")
    if args.rollouts:
        print(f"{summary['attempts']} wrong attempts, {summary['rollouts']} rollouts; "
              f"the first error is located in {summary['located'] / max(1, summary['attempts']):.0%}")
    else:
        print(table(summary))
    return 1 if bad else 0


def settings_of(args: argparse.Namespace, sampler: Local | Remote, items: list) -> dict:
    """All that decides what a sample is: what was made with other settings is not continued."""
    problems = [item[0] for item in items] if args.rollouts else items
    content = dumps([[p.id, p.question, p.answer, p.prefix, p.carried] for p in problems])
    names = ("prompt", "temperature", "top_p", "max_new_tokens", "stop", "limit", "seed")
    names += ("rollouts", "every_step", "steps") if args.rollouts else ("samples",)
    digest = hashlib.blake2b(content.encode(), digest_size=6).hexdigest()
    problems = {"problems": f"{Path(args.problems).name} {digest}"}
    return sampler.settings | problems | {name: getattr(args, name) for name in names}


def collect(args: argparse.Namespace, done: dict, count: int) -> tuple[list[dict], dict]:
    """(rows in order, summary) of what the journals of all ranks hold."""
    if args.rollouts:
        rows = [done[a,] for a in range(count) if (a,) in done]
        located = sum(first_error_from_values(row["values"], row["agreement"]) is not None for row in rows)
        rollouts = sum(counts[2] for row in rows for counts in row["agreement"] if counts)
        return rows, {"attempts": len(rows), "rollouts": rollouts, "located": located}
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

Run by torchrun, the processes share the problems out. Stopped or killed, the same command
continues. Exit status: 0; 1 if rows of F had to be left out (each is named); 2 if the command
cannot be carried out."""


def arguments() -> argparse.ArgumentParser:
    as_it_stands = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="eval.py", description=USAGE, formatter_class=as_it_stands)
    add = parser.add_argument_group("what").add_argument
    add("--model", metavar="M", help="checkpoint folder or hub id")
    add("--problems", metavar="F", required=True,
        help="problems, or graded attempts for --rollouts (.jsonl, .json, .parquet, hub id)")
    add("--out", metavar="OUT", type=Path, required=True, help="graded samples, JSONL; beside it the .summary.json")
    add("--limit", metavar="K", type=whole, help="only the first K rows")
    add("--restart", action="store_true", help="begin anew, whatever an earlier run has left at OUT")
    add("--debug", action="store_true", help="show the traceback of an error")
    add = parser.add_argument_group("sampling").add_argument
    add("--prompt", choices=PROMPT_STYLES, default="qwen2-boxed", help="prompt style (default: %(default)s)")
    add("--samples", metavar="N", type=whole, default=1,
        help="samples a problem (default: 1; the paper: 1 to score, 2 to collect errors, 20 to rectify)")
    add("--temperature", metavar="T", type=float, help="0 is greedy (default: 0; with --rollouts the paper's 0.8)")
    add("--top_p", metavar="P", type=float,
        help="mass of the likeliest tokens to sample from (default: 1; with --rollouts the paper's 0.95)")
    add("--max_new_tokens", metavar="N", type=whole, default=2048,
        help="a sample is cut off here (default: 2048, the paper's)")
    add("--stop", metavar="TEXT", nargs="+", default=[], help="a sample also ends before any of these texts")
    add("--seed", type=int, default=0, help="default: 0")
    add("--batch_size", metavar="N", type=whole, default=64,
        help="samples computed together, all of one problem's at least (default: 64)")
    add("--dtype", choices=("fp32", "bf16"), help="default: bf16 on a GPU, fp32 on a CPU")
    add("--device", help="default: cuda where there is one, else cpu")
    add = parser.add_argument_group("step values").add_argument
    add("--rollouts", metavar="N", type=whole,
        help="continue the wrong attempts in F from before their steps, about N times each (8 is good)")
    add("--every_step", action="store_true",
        help="N times before every step, instead of where it tells most about the first error")
    add("--steps", choices=STEP_STYLES, default="auto", help="how steps are labelled (default: auto)")
    add = parser.add_argument_group("sampling from a server").add_argument
    add("--endpoint", metavar="URL",
        help="OpenAI-compatible server, as http://localhost:8000/v1; its key is read from OPENAI_API_KEY")
    add("--api_model", metavar="NAME", help="the name that the server knows the model by")
    add("--concurrency", metavar="N", type=whole, default=32, help="requests under way at a time (default: 32)")
    return parser


def whole(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def main(argv: Sequence[str] | None = None) -> int:
    parser = arguments()
    args = parser.parse_args(argv)
    if args.temperature is None:
        args.temperature = 0.8 if args.rollouts else 0.0
    if args.top_p is None:
        args.top_p = 0.95 if args.rollouts else 1.0
    if not 0 <= args.temperature < math.inf or not 0 < args.top_p <= 1:
        parser.error(f"--temperature {args.temperature} --top_p {args.top_p}: expected 0 or more; above 0, at most 1")
    if args.temperature == 0 and max(args.samples, args.rollouts or 1) > 1:
        parser.error("at temperature 0 all samples of a problem are the same; give --temperature, such as 0.8")
    if args.rollouts and args.samples > 1:
        parser.error("--samples is for problems; with --rollouts N, N says how often a step is sampled")
    if args.endpoint and not args.api_model or not (args.endpoint or args.model):
        parser.error("give --model M, or --endpoint URL with --api_model NAME")
    if args.endpoint and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        parser.error("--endpoint needs no torchrun: --concurrency says how many requests are under way")
    if Path(args.problems).resolve() == args.out.resolve():
        parser.error(f"--out {args.out} is the file of --problems")
    keep_freed_memory()
    try:
        return evaluate(args)
    except (DataError, CheckpointError, OSError) as error:
        if args.debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    except torch.OutOfMemoryError:
        if args.debug:
            raise
        print(f"error: out of GPU memory; what is finished is kept: go on with a --batch_size below {args.batch_size}",
              file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command continues", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
