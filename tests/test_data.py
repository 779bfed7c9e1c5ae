"""data.py, first half: rows in, tokens and batches out. Real tokenizers and real rows where ../shared/assets has
them."""
import json
import re
import sys
import unicodedata
from datetime import datetime
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from tokenizers import AddedToken, Tokenizer as Backend, decoders, models, pre_tokenizers, processors, trainers

import data
from model import common_length
from data import (DataError, Example, Tokenizer, collate, encode_dataset, epoch_plan, read_rows, render_prompt,
                  response_start)

ASSETS = Path(__file__).resolve().parents[2] / "shared" / "assets"
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")
REAL = ("tinyllama", "llama3", "qwen2.5", "minimind")
CHATML = ("{%- for m in messages %}\n    {{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}\n"
          "{%- endfor %}\n"
          "{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\\n' }}\n{%- endif %}")
PAIR = {
    "prompt": "What is 2 + 3?", "initial_reason_steps": "Let's think step by step.\nStep 1: We add.\nStep 2:",
    "chosen": " 2 + 3 = 5.", "rejected": " 2 + 3 = 6.", "full_chosen": " 2 + 3 = 5.\nThe answer is: 5",
    "full_rejected": " 2 + 3 = 6.\nThe answer is: 6"
}


def write_tokenizer(folder: Path, *, template=CHATML, truncate=False, **config) -> Path:
    """A small byte-level BPE tokenizer in Hugging Face's layout."""
    folder.mkdir(exist_ok=True)
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = [AddedToken(token, special=True) for token in ("<s>", "</s>", "<|im_start|>", "<|im_end|>")]
    text = [" ".join(PAIR.values())] * 3 + ["User: question\n\nAssistant: answer.\n\nStep"]
    backend.train_from_iterator(text, trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False,
                                                          initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    if truncate:
        backend.enable_truncation(4)
        backend.enable_padding(length=64)
    backend.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": template} | config
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return Tokenizer.from_pretrained(write_tokenizer(tmp_path_factory.mktemp("tiny") / "m"))


@pytest.fixture(scope="module")
def real():
    if not (ASSETS / "tokenizers").is_dir():
        pytest.skip("real tokenizers: ../shared/assets is not here")
    return {name: Tokenizer.from_pretrained(ASSETS / "tokenizers" / name) for name in REAL}


def encode(tokenizer, *rows, method="stepdpo", style="alpaca", max_length=1024):
    return encode_dataset([(f"f.jsonl:{i}", row) for i, row in enumerate(rows, 1)], tokenizer, method, style,
                          max_length)


# ---------------------------------------------------------------------------------------------------------------- rows

def test_reads_what_windows_and_web_tools_write(tmp_path):
    """BOM, CRLF, blank lines and Unicode line separators inside a text change nothing; `where` counts the file's own
    lines."""
    file = tmp_path / "a.jsonl"
    file.write_bytes('\ufeff{"a": "x\u2028y"}\r\n\r\n{"a": "z"}'.encode())
    assert list(read_rows(file)) == [(f"{file}:1", {"a": "x\u2028y"}), (f"{file}:3", {"a": "z"})]
    for text in ('[{"a": 1},\n {"a": 2}]', '{"a": 1}\n{"a": 2}\n'):
        (tmp_path / "b.json").write_text(text)
        assert [row for _, row in read_rows(tmp_path / "b.json")] == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize("line, found", [(b'{"a": 1', "malformed"), (b'{"a": 1, "a": 2}', "'a' stands there twice"),
                                         (b'[1]', "a list"), (b'"text"', "text"), (b"\xff{}", "UTF-8"),
                                         (b"[" * 100_000, "malformed"),
                                         (b'{"a": ' + b"9" * 5000 + b"}", "malformed"), (b"{} {}", "malformed"),
                                         (b"version https://git-lfs.github.com/spec/v1", "malformed")])
def test_a_bad_line_is_named(tmp_path, line, found):
    """One sentence with file, line and finding; and with `bad` given, the good rows still come."""
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'{"a": "1"}\n' + line + b'\n{"a": "3"}\n')
    with pytest.raises(DataError, match="rows.jsonl:2: ") as error:
        list(read_rows(file))
    assert found in str(error.value) and "\n" not in str(error.value)
    bad = []
    assert [row["a"] for _, row in read_rows(file, bad)] == ["1", "3"] and len(bad) == 1


@pytest.mark.parametrize("name, content, found", [("a.jsonl", b"", "no rows"), ("a.json", b"[]", "no rows"),
                                                  ("a.jsonl", b"\xff\xfe{\0}\0", "UTF-8"),
                                                  ("a.csv", b"a,b", "a.csv: cannot be read"),
                                                  ("a.parquet", b"PAR1", "pyarrow|parquet"),
                                                  ("a.json", b"[{]", "malformed")])
def test_a_file_that_cannot_be_read(tmp_path, name, content, found):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=found):
        list(read_rows(tmp_path / name))


def test_missing_file_and_missing_pyarrow(tmp_path, monkeypatch):
    """A typing error in a path is not taken for a hub id; parquet without pyarrow says what to install."""
    with pytest.raises(DataError, match="no such file"):
        list(read_rows("missing/pairs.jsonl"))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match="pip install pyarrow"):
        list(read_rows(tmp_path / "a.parquet"))


def test_parquet(tmp_path):
    """Math-Step-DPO-10K comes as parquet: the same rows, named by their number."""
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    import pyarrow
    parquet.write_table(pyarrow.Table.from_pylist([PAIR, PAIR | {"chosen": "x"}]), tmp_path / "a.parquet")
    assert list(read_rows(tmp_path / "a.parquet"))[1] == (f"{tmp_path / 'a.parquet'}:row 2", PAIR | {"chosen": "x"})


def test_one_row_or_a_list_of_rows_in_an_object(tmp_path):
    """What json.dump(..., indent=2) makes of one row, and of {"data": rows}, on one line or on many."""
    for rows, written in [([PAIR], PAIR), ([PAIR, PAIR | {"a": 1}], {"data": [PAIR, PAIR | {"a": 1}], "version": "1"})]:
        for indent in (None, 2):
            (tmp_path / "a.json").write_text(json.dumps(written, indent=indent))
            assert [row for _, row in read_rows(tmp_path / "a.json")] == rows


def test_a_nan_is_refused_only_where_it_is_used(tiny):
    """pandas writes NaN into the empty cells of every column."""
    assert len(encode(tiny, PAIR | {"score": float("nan")})[0]) == 1
    with pytest.raises(DataError, match="f.jsonl:1: field 'chosen': found a number 'NaN'"):
        encode(tiny, PAIR | {"chosen": float("nan")})


GSM8K = [f"{config}/{split}-00000-of-00001.parquet" for config in ("main", "socratic") for split in ("test", "train")]


@pytest.mark.parametrize("dataset, split, files, taken", [
    # the split by its whole word, shards together, one format
    ("o/n", "train", ["README.md", "data/test.jsonl", "data/train.jsonl", "constraints/constrained.jsonl"], ["data/train.jsonl"]),
    ("o/n", "train", ["strain/x.jsonl", "latest/train.jsonl"], ["latest/train.jsonl"]),
    ("o/n", "train", ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet", "test-00000-of-00001.parquet",
                      "train.jsonl"], ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"]),
    ("o/n", "test", ["default/test/0000.parquet", "default/train/0000.parquet"], ["default/test/0000.parquet"]),
    ("o/n", "train", ["Train.json", "dataset_infos.json", ".cache.json", "images/metadata.jsonl"], ["Train.json"]),
    # the only file there is, if it does not say that it is of another split
    ("o/n", "test", ["aime_2024.jsonl"], ["aime_2024.jsonl"]),
    ("o/n", "train", ["test.jsonl"], None), ("o/n", "test", ["data/train.jsonl"], None),
    ("o/n", "test", ["aime_2024.jsonl", "aime_2025.jsonl"], None),
    ("o/n:data/train", "test", ["data/train.jsonl"], ["data/train.jsonl"]),
    ("o/n:main/test-00000-of-00001.parquet", "train", GSM8K, GSM8K[:1]), ("o/n:a.json", "train", ["a.json", "b.json"], ["a.json"]),
    # of several configurations one is named
    ("o/n", "test", GSM8K, None), ("o/n:main", "test", GSM8K, GSM8K[:1]), ("o/n:main", "train", GSM8K, GSM8K[1:2]),
    ("o/n:test", "test", GSM8K, None), ("o/n:socratic/train", "train", GSM8K, GSM8K[3:]), ("o/n:sci", "test", GSM8K, None),
    ("o/n:main", "train", GSM8K[:1], None),
    ("o/n", "train", ["algebra/test.parquet", "all/auxiliary_train.parquet"], None),
    ("o/n", "train", ["gsm8k_train.jsonl", "math_train.jsonl"], None)])
def test_which_files_of_a_hub_dataset(monkeypatch, capsys, dataset, split, files, taken):
    """One split of one configuration, said on stderr; or a refusal that lists what may be given."""
    import huggingface_hub
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda self, name, repo_type: files)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda name, file, repo_type: file)
    if taken:
        assert [path.as_posix() for path in data._hub_files(dataset, split)] == taken
        assert f"o/n: reading {', '.join(taken)}" in capsys.readouterr().err
        return
    with pytest.raises(DataError, match=f"o/n: which of its files hold the {split} rows .* Give one of: o/n:") as error:
        data._hub_files(dataset, split)
    listed = re.findall(r"o/n:([^ ,]+)", str(error.value))
    assert all(len(data._hub_files(f"o/n:{one}", split)) == 1 for one in listed), "what it lists can be given"


def test_the_reported_hub_datasets(cases, monkeypatch):
    """Lists of files after public bug reports: train's alone, or a refusal that names what there is."""
    import huggingface_hub
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda name, file, repo_type: file)
    taken = {}
    for _, case in read_rows(cases / "hub.jsonl"):
        monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda self, name, repo_type: case["files"])
        try:
            taken[case["id"]] = [path.as_posix() for path in data._hub_files("owner/name")]
        except DataError as error:
            taken[case["id"]] = str(error)
    assert taken["H03"] == ["data/train.jsonl"] and "found: data/x.csv" in taken["H05"]
    assert "owner/name:socratic/test" in taken["H01"] and "owner/name:all/auxiliary_train" in taken["H07"]


@pytest.mark.parametrize("files, found", [(["README.md", "dataset_infos.json", "data/x.csv"], "found: .*data/x.csv"),
                                          (["train.jsonl.gz"], "found: train.jsonl.gz"), ([], "found: nothing")])
def test_a_hub_dataset_without_rows(monkeypatch, files, found):
    """What is there instead is named; a description of a data set is no data."""
    import huggingface_hub
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda self, name, repo_type: files)
    with pytest.raises(DataError, match=f"o/n: no .parquet, .jsonl or .json file of rows in it .{found}.*convert it"):
        list(read_rows("o/n"))


def test_a_hub_dataset_is_read_from_the_cache(tmp_path, monkeypatch):
    """Without the hub, as models are; where nothing is cached, one line."""
    import huggingface_hub
    from huggingface_hub import constants
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda *_, **__: 1 / 0)
    with pytest.raises(DataError, match="owner/name: neither a file here nor a dataset of the hub"):
        list(read_rows("owner/name"))
    cache, commit = tmp_path / "datasets--owner--name", "0" * 40
    for name, row in (("data/train.jsonl", {"a": 1}), ("data/test.jsonl", {"a": 2})):
        file = cache / "snapshots" / commit / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(row))
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(commit)
    assert [row for _, row in read_rows("owner/name")] == [{"a": 1}]
    assert [row for _, row in read_rows("owner/name:data/test")] == [{"a": 2}]


@pytest.mark.parametrize("value, found", [(5, "a number 5|a number '5'"), (None, "null"), (["a"], "text"), ([], "a list"),
                                          ("a\0b", "U.0000 at position 1"), ("ab\ud83d", r"U.D83D at position 2"),
                                          (b"\x89PNG", "bytes .*PNG"), (datetime(2024, 5, 1), "datetime .*2024-05-01"),
                                          (Decimal("1.5"), "Decimal .*1.5"), ([b"a"], "bytes")])
def test_a_field_that_is_no_text(tiny, value, found):
    with pytest.raises(DataError, match=rf"f.jsonl:1: field 'chosen'.*: .*({found})"):
        encode(tiny, PAIR | {"chosen": value})


def test_what_the_next_file_can_hold():
    """Values that JSON has no form for are left out, at whatever depth; broken text is named with its field."""
    row = PAIR | {"level": 3, "tags": ["a", None], "more": {"x": 1.5}}
    odd = {"at": datetime(2024, 5, 1), "image": b"\x89", "price": Decimal(1), "score": float("nan"), "deep": [{"at": datetime(2024, 5, 1)}]}
    assert data.writable(row | odd, "f:1") == row
    for broken in ({"x": "\ud83d"}, {"x": ["a\ud83d"]}):
        with pytest.raises(DataError, match="f:1: half a surrogate pair in it.*field 'x'"):
            data.writable(odd | broken, "f:1")
    with pytest.raises(DataError, match=r"f:1: half a surrogate pair in it.*field '\\ud83d'"):
        data.writable({"\ud83d": 1}, "f:1")


@pytest.mark.parametrize("method, missing", [("stepdpo", "initial_reason_steps, chosen, rejected"),
                                             ("dpo", "chosen, rejected"), ("sft", "chosen")])
def test_wrong_columns_are_listed(tiny, method, missing):
    with pytest.raises(DataError, match=f"needs the columns prompt, .*found question, prompt; missing {missing}"):
        encode(tiny, {"question": "?", "prompt": "?"}, method=method)


# ----------------------------------------------------------------------------------------------------------- tokenizer

@pytest.mark.parametrize("name, golden", [("qwen2.5", "qwen2"), ("llama3", "llama-bpe"), ("tinyllama", "llama-spm")])
def test_ids_equal_llama_cpp(real, name, golden):
    """47 awkward texts a vocabulary: our ids, BOS aside, are those that llama.cpp checks itself against."""
    stem = ASSETS / "tokenizers" / "golden_llamacpp" / f"ggml-vocab-{golden}.gguf"
    texts = stem.with_suffix(".gguf.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    wanted = [[int(id) for id in line.split()] for line in stem.with_suffix(".gguf.out").read_text().split("\n")]
    bos = [real[name].bos_id] if real[name].bos_id is not None else []
    assert [real[name].encode(text).ids for text in texts] == [bos + ids for ids in wanted[:len(texts)]]


def test_chats_equal_transformers(real):
    """Rendered text and ids of six chats a model, byte for byte; qwen2-boxed is Qwen2's own template with the paper's
    suffix."""
    golden = json.loads((ASSETS / "tokenizers" / "golden_chat_transformers5.23.json").read_text())
    for name in ("qwen2.5", "llama3", "minimind"):
        for row in golden[name]["rows"]:
            text = real[name].render_chat(row["messages"], row["add_generation_prompt"])
            assert (text, real[name].encode(text).ids) == (row["text"], row["ids"])
    for row in golden["qwen2"]["rows"][:3]:
        question = row["messages"][0]["content"].removesuffix(data.BOXED)
        assert render_prompt("qwen2-boxed", question, real["qwen2.5"]) == row["text"]


@pytest.mark.parametrize("file", ["Qwen-Qwen2.5-7B-Instruct", "meta-llama-Llama-3.1-8B-Instruct",
                                  "meta-llama-Llama-3.2-3B-Instruct", "mistralai-Mistral-Nemo-Instruct-2407"])
def test_real_templates_render_as_in_transformers(tmp_path, assets, file):
    """Other people's templates, with white space control and helper functions: character for character, but for today's
    date. A prompt must be the same tomorrow, so the date is always the one that Llama 3's template falls back to."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    template = (assets / "tokenizers" / "templates" / f"{file}.jinja").read_text()
    folder = write_tokenizer(tmp_path / "t", template=template)
    oracle = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), bos_token="<s>",
                                                  eos_token="</s>", chat_template=template)
    ours = Tokenizer.from_pretrained(folder)
    for messages in ([{"role": "user", "content": " What is\n2 + 3? "}],
                     [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]):
        for add in (True, False):
            wanted = oracle.apply_chat_template(messages, tokenize=False, add_generation_prompt=add)
            wanted = re.sub(r"(?<=Today Date: )\d+ \w{3} \d{4}", "26 Jul 2024", wanted)
            assert ours.render_chat(messages, add) == wanted


def test_end_tokens_of_real_checkpoints(real):
    """Llama 3 calls <|end_of_text|> its EOS and ends chat turns with <|eot_id|>: the template is believed. Plain styles
    end with EOS."""
    ends = {
        name: [real[name].decode([real[name].end_of_turn_id(style)])
               for style in ("chat", "alpaca", "qwen2-boxed")]
        for name in REAL
    }
    assert ends == {
        "tinyllama": ["</s>"] * 3, "llama3": ["<|eot_id|>"] + ["<|end_of_text|>"] * 2, "qwen2.5": ["<|im_end|>"] * 3,
        "minimind": ["<|im_end|>"] * 3
    }


def test_exactly_one_bos(real, tmp_path):
    """Added where the checkpoint wants one, never for Qwen2; in a chat it is there if the template writes it (Llama 3's
    does, TinyLlama's does not)."""
    for name, bos, in_chat in (("tinyllama", "<s>", 0), ("llama3", "<|begin_of_text|>", 1)):
        with pytest.raises(DataError, match="no control token of this checkpoint; choose --prompt chat, alpaca or raw"):
            render_prompt("qwen2-boxed", "1+1?", real[name])
        for style in set(data.PROMPT_STYLES) - {"qwen2-boxed"}:
            (example,), _ = encode(real[name], {"prompt": "1+1?", "response": "2"}, method="sft", style=style)
            count = in_chat if style == "chat" else 1
            assert example.chosen.tolist().count(real[name].bos_id) == count
            assert (real[name].decode(example.chosen[:1]) == bos) == (count == 1)
    assert real["qwen2.5"].bos_id is None and real["minimind"].bos_id is None
    off = Tokenizer.from_pretrained(write_tokenizer(tmp_path / "off", add_bos_token=False))
    assert off.bos_id is None and 0 not in off.encode("2 + 3").ids


def test_truncation_in_tokenizer_json_is_not_obeyed(tmp_path):
    """A tokenizer.json may say "cut at 4, pad to 64": training rows are neither cut nor padded in silence."""
    a, b = (Tokenizer.from_pretrained(write_tokenizer(tmp_path / f"{truncate}", truncate=truncate))
            for truncate in (True, False))
    assert a.encode(PAIR["full_chosen"]) == b.encode(PAIR["full_chosen"])


def test_damaged_tokenizers_are_refused_in_one_line(tmp_path):
    folder = write_tokenizer(tmp_path / "t")
    whole = (folder / "tokenizer.json").read_bytes()
    for damage in (b"", b"{}", whole[:-100], b'{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]}}'):
        (folder / "tokenizer.json").write_bytes(damage)
        with pytest.raises(DataError, match="tokenizer.json: damaged") as error:
            Tokenizer.from_pretrained(folder)
        assert "\n" not in str(error.value)
    (folder / "tokenizer.json").write_bytes(whole)
    (folder / "tokenizer_config.json").write_text('{"added_tokens_decoder": {"77": {"content": "</s>"}}}')
    with pytest.raises(DataError, match="'</s>' has id 77, but tokenizer.json gives it 1"):
        Tokenizer.from_pretrained(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(DataError, match="not there"):
        Tokenizer.from_pretrained(folder)


def test_the_real_damaged_file(tmp_path):
    file = ASSETS / "tokenizers" / "llama2_damaged" / "tokenizer.DAMAGED_ort.json"
    if not file.is_file():
        pytest.skip("the damaged tokenizer: ../shared/assets is not here")
    (tmp_path / "tokenizer.json").symlink_to(file)
    with pytest.raises(DataError, match="tokenizer.json: damaged .*line 93391"):
        Tokenizer.from_pretrained(tmp_path)


@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=40),
       cut=st.integers(0, 40))
@settings(max_examples=60)
def test_continuation_is_exactly_the_new_text(real, text, cut):
    """prompt text + continuation = whole text at every token that ends a character, in every vocabulary
    (SentencePiece's spaces, emoji)."""
    text = unicodedata.normalize("NFC", text)
    for tokenizer in real.values():
        ids = tokenizer.encode("a " + text).ids
        cut = 1 + cut % len(ids)
        if "\ufffd" not in tokenizer.decode(ids[:cut]):
            assert tokenizer.decode(ids[:cut]) + tokenizer.continuation(ids[:cut], ids[cut:]) == tokenizer.decode(ids)


# ------------------------------------------------------------------------------------------------------- chat template

def test_template_helpers_of_transformers(tmp_path):
    """raise_exception, tojson without escapes, strftime_now, loop controls, {% generation %}, and blocks trimmed as
    transformers trims."""
    template = ("{% for m in messages %}\n  {% if m.role == 'system' %}{% continue %}{% endif %}\n{{ m | tojson }}"
                "{% generation %}[{{ m.content }}]{% endgeneration %}{% endfor %}"
                "{{ strftime_now('%Y')|length }}{{ bos_token }}{{ eos_token }}")
    tokenizer = Tokenizer.from_pretrained(write_tokenizer(tmp_path / "t", template=template))
    assert render_prompt("chat", "é<", tokenizer) == '{"role": "user", "content": "é<"}[é<]4<s></s>'


def test_no_template_says_what_to_do(tmp_path):
    tokenizer = Tokenizer.from_pretrained(write_tokenizer(tmp_path / "t", template=None))
    with pytest.raises(DataError, match="no chat template .*choose --prompt alpaca"):
        render_prompt("chat", "2 + 3", tokenizer)


def test_template_file_comes_before_the_config(tmp_path):
    folder = write_tokenizer(tmp_path / "t")
    (folder / "chat_template.jinja").write_text("file: {{ messages[0].content }}")
    assert render_prompt("chat", "x", Tokenizer.from_pretrained(folder)) == "file: x"
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    tokenizer = Tokenizer.from_pretrained(write_tokenizer(tmp_path / "u", template=named))
    assert render_prompt("chat", "x", tokenizer) == "yes"


def test_templates_beside_the_config(tmp_path):
    """A template that stands in chat_template.json only is read; one of several that has another purpose is not taken
    for the chat's."""
    folder = write_tokenizer(tmp_path / "t", template=None)
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "json: {{ messages[0].content }}"}))
    assert render_prompt("chat", "x", Tokenizer.from_pretrained(folder)) == "json: x"
    others = [{"name": "rag", "template": "no"}, {"name": "tool_use", "template": "no"}]
    tokenizer = Tokenizer.from_pretrained(write_tokenizer(tmp_path / "u", template=others))
    with pytest.raises(DataError, match="no chat template .of several, the one named default is read; save another as"):
        render_prompt("chat", "x", tokenizer)
    assert render_prompt("raw", "x", tokenizer) == "x"


TURNS = "{% for m in messages %}{% if m.role == 'user' %}USER{% else %}BOT{% endif %}{% endfor %}"
BLANK_BEFORE = TURNS.replace("USER", "[INST] {{ m.content }} [/INST]").replace("BOT", " {{ m.content | trim }} {{ eos_token }}")
HEADED = TURNS.replace("USER", "### Instruction:\n{{ m.content }}\n\n")
IM = TURNS.replace("USER", "<|im_start|>user\n{{ m.content }}<|im_end|>\n")
IM_PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
THINKS = ("{% set parts = m.content.split('</think>') %}<|im_start|>assistant\n<think>\n"
          "{{ parts[0].split('<think>')[-1].strip('\n') if parts | length > 1 }}\n</think>\n\n"
          "{{ parts[-1].lstrip('\n') }}<|im_end|>\n")
FORGETS = "<|im_start|>assistant\n{{ m.content.split('</think>')[-1] }}<|im_end|>\n"
OPENED = IM_PROMPT.replace("nt\n", "nt\n<think>\n")
CLOSED = IM_PROMPT.replace("nt\n", "nt\n<think>\n\n</think>\n\n")
THOUGHT, NO_THOUGHT = "<think>\n3 + 4 = 7\n</think>\n\n7", "It is 7."
ASKED = "<|im_start|>user\n3 + 4?<|im_end|>\n<|im_start|>assistant\n"
JOINTS = {      # name: (tokenizer, template, answer, whole text up to its end token, prompt that is sampled from)
    "Llama 2, blanks around": ("tinyllama", "{{ bos_token }}" + BLANK_BEFORE, NO_THOUGHT,
                               "<s>[INST] 3 + 4? [/INST] It is 7. </s>", "<s>[INST] 3 + 4? [/INST] "),
    "Vicuna": ("tinyllama", TURNS.replace("USER", "USER: {{ m.content }} ").replace("BOT", "ASSISTANT: {{ m.content }}"
               "{{ eos_token }}") + "{% if add_generation_prompt %}ASSISTANT:{% endif %}", NO_THOUGHT,
               "USER: 3 + 4? ASSISTANT: It is 7.</s>", "USER: 3 + 4? ASSISTANT: "),
    "no generation prompt": ("tinyllama", HEADED.replace("BOT", "### Response:\n{{ m.content }}{{ eos_token }}"), NO_THOUGHT,
                             "### Instruction:\n3 + 4?\n\n### Response:\nIt is 7.</s>",
                             "### Instruction:\n3 + 4?\n\n### Response:\n"),
    "no end token": ("llama3", HEADED.replace("BOT", "### Response:\n{{ m.content }}\n\n"), NO_THOUGHT,
                     "### Instruction:\n3 + 4?\n\n### Response:\nIt is 7.<|end_of_text|>",
                     "### Instruction:\n3 + 4?\n\n### Response:\n"),
    "Phi-3, a second end": ("qwen2.5", IM.replace("BOT", "<|im_start|>assistant\n{{ m.content }}<|im_end|>\n")
                            + IM_PROMPT.replace("{% endif", "{% else %}<|endoftext|>{% endif"), NO_THOUGHT,
                            ASKED + "It is 7.<|im_end|>", ASKED),
    "content trimmed": ("qwen2.5", IM.replace("BOT", "<|im_start|>assistant\n{{ m.content | trim }}<|im_end|>\n")
                        + IM_PROMPT, " It is 7.\n", ASKED + "It is 7.<|im_end|>", ASKED),
    "Qwen3, no thought": ("qwen2.5", IM.replace("BOT", THINKS) + IM_PROMPT, NO_THOUGHT,
                          ASKED + "<think>\n\n</think>\n\nIt is 7.<|im_end|>", ASKED),
    "Qwen3, a thought": ("qwen2.5", IM.replace("BOT", THINKS) + IM_PROMPT, THOUGHT, ASKED + THOUGHT + "<|im_end|>", ASKED),
    "Qwen3 thinking off, a thought": ("qwen2.5", IM.replace("BOT", THINKS) + CLOSED, THOUGHT,
                                      ASKED + THOUGHT + "<|im_end|>", ASKED + "<think>\n\n</think>\n\n"),
    "thought opened, a thought": ("qwen2.5", IM.replace("BOT", THINKS) + OPENED, THOUGHT, ASKED + THOUGHT + "<|im_end|>",
                                  ASKED + "<think>\n"),
    "thought opened, as sampled": ("qwen2.5", IM.replace("BOT", THINKS) + OPENED, THOUGHT.removeprefix("<think>\n"),
                                   ASKED + THOUGHT + "<|im_end|>", ASKED + "<think>\n"),
    "thought opened, no thought": ("qwen2.5", IM.replace("BOT", THINKS) + OPENED, NO_THOUGHT,
                                   ASKED + "<think>\n\n</think>\n\nIt is 7.<|im_end|>", ASKED + "<think>\n"),
    "R1, thought forgotten": ("qwen2.5", IM.replace("BOT", FORGETS) + OPENED, THOUGHT, ASKED + THOUGHT + "<|im_end|>",
                              ASKED + "<think>\n"),
    "R1, as sampled": ("qwen2.5", IM.replace("BOT", FORGETS) + OPENED, THOUGHT.removeprefix("<think>\n"),
                       ASKED + THOUGHT + "<|im_end|>", ASKED + "<think>\n"),
    "R1, no thought": ("qwen2.5", IM.replace("BOT", FORGETS) + OPENED, NO_THOUGHT, ASKED + "It is 7.<|im_end|>",
                       ASKED + "<think>\n"),
    "forgotten though not opened": ("qwen2.5", IM.replace("BOT", FORGETS) + IM_PROMPT, THOUGHT,
                                    ASKED + THOUGHT + "<|im_end|>", ASKED),
}
PARTED = {"Qwen3 thinking off, a thought", "R1, no thought"}                            # noted: sampling goes elsewhere
ALTERED = {"R1, thought forgotten", "R1, as sampled", "forgotten though not opened"}    # noted: the template differs


def with_template(tokenizer: Tokenizer, template: str, **changes) -> Tokenizer:
    return Tokenizer(tokenizer.backend, chat_template=template, bos_id=tokenizer.bos_id, eos_ids=tokenizer.eos_ids,
                     names=tokenizer.names, **changes)


@pytest.mark.parametrize("name", JOINTS)
def test_what_is_trained_is_the_templates_own_text(real, name):
    """Between prompt and answer, behind the answer, thoughts: the ids of the text that a reader of the template would
    write down. Sampling begins with the same tokens. Where these two cannot both be had, the report says so."""
    vocabulary, template, answer, whole, prompt = JOINTS[name]
    tokenizer = with_template(real[vocabulary], template)
    row = {"prompt": "3 + 4?", "response": answer}
    (example,), report = encode(tokenizer, row, method="sft", style="chat")
    assert example.chosen.tolist() == tokenizer.encode(whole, bos=False).ids
    assert render_prompt("chat", "3 + 4?", tokenizer) == prompt
    assert whole.startswith(prompt) == (name not in PARTED)
    sampled = tokenizer.encode(prompt.rstrip(" "), bos=False).ids       # a last blank comes with the answer's first word
    if name not in PARTED and not whole.startswith(prompt + "\n"):      # "\n\n" is one token
        assert example.chosen[:len(sampled)].tolist() == sampled and example.start == len(sampled)
    said = " ".join(report.notes)
    assert ("behind another prompt" in said, "alters this" in said) == (name in PARTED, name in ALTERED), str(report)


@pytest.mark.parametrize("template, begun, prompt", [
    (IM.replace("BOT", THINKS) + IM_PROMPT, "Step 1:", ASKED + "<think>\n\n</think>\n\n"),
    (IM.replace("BOT", THINKS) + IM_PROMPT, "<think>\nStep 1:", ASKED),
    (IM.replace("BOT", THINKS) + CLOSED, "Step 1:", ASKED + "<think>\n\n</think>\n\n"),
    (IM.replace("BOT", FORGETS) + OPENED, "Step 1:", ASKED + "<think>\n"),
    (IM.replace("BOT", FORGETS) + OPENED, "<think>\nStep 1:", ASKED)])
def test_a_step_stands_where_the_template_would_have_it(real, template, begun, prompt):
    """Steps inside a thought, behind one, or with one of their own: a thought is opened once, and eval.py, which
    continues from a prefix by the same function, reads the same text."""
    tokenizer = with_template(real["qwen2.5"], template)
    row = {"prompt": "3 + 4?", "initial_reason_steps": begun, "chosen": " It is 7.", "rejected": " It is 12."}
    (example,), _ = encode(tokenizer, row, style="chat")
    assert tokenizer.decode(example.chosen) == prompt + begun + " It is 7."
    assert render_prompt("chat", "3 + 4?", tokenizer, begun) == prompt


def test_the_end_token_of_a_template(real, tmp_path):
    """The template's word counts, whether the tokenizer calls its end token special (ChatML added to a base model) or
    not; where nothing stands behind an answer, the mark that begins the next turn ends it, if the files say so (GLM-4);
    where an end mark is no token, the report says what stands there instead."""
    folder = write_tokenizer(tmp_path / "plain")
    file = json.loads((folder / "tokenizer.json").read_text())
    for token in file["added_tokens"]:
        token["special"] = not token["content"].startswith("<|im_")
    (folder / "tokenizer.json").write_text(json.dumps(file))
    plain = Tokenizer.from_pretrained(folder)
    assert plain.decode([plain.end_of_turn_id("chat"), plain.end_of_turn_id("qwen2-boxed")]) == "<|im_end|>" * 2
    with pytest.raises(DataError, match=r"control token <\|im_start\|>"):
        encode(plain, PAIR | {"chosen": " 5<|im_start|>user"})

    bare = TURNS.replace("BOT", "{{ m.content }}")
    for after, end in (("<|reserved_special_token_0|>", "<|end_of_text|>"), ("<|eot_id|>", "<|eot_id|>")):
        tokenizer = with_template(real["llama3"], bare.replace("USER", after + "{{ m.content }}"))
        assert tokenizer.decode([tokenizer.end_of_turn_id("chat")]) == end
    glm = with_template(real["llama3"], bare.replace("USER", "<|reserved_special_token_0|>{{ m.content }}"))
    glm.eos_ids += (glm.added_ids["<|reserved_special_token_0|>"],)
    assert glm.decode([glm.end_of_turn_id("chat")]) == "<|reserved_special_token_0|>"

    letters = with_template(real["tinyllama"], CHATML)
    (example,), report = encode(letters, {"prompt": "3 + 4?", "response": "7"}, method="sft", style="chat")
    assert letters.decode(example.chosen).endswith("assistant\n7</s>")
    assert "no token of this tokenizer" in str(report) and r"'<|im_end|>\n'" in str(report)

    deaf = with_template(real["qwen2.5"], "<|im_start|>{{ messages[0].content }}<|im_start|>")
    (example,), report = encode(deaf, {"prompt": "3 + 4?", "response": "7"}, method="sft", style="chat")
    assert deaf.decode(example.chosen) == "<|im_start|>3 + 4?<|im_start|>7<|im_end|>"
    assert "alters this conversation" in str(report)


def test_system_prompt_and_template_arguments(real, tmp_path):
    """--system and --template_args reach the template, or are refused: never accepted and ignored."""
    template = "{% if calm is defined and calm %}Calmly. {% endif %}" + CHATML
    told = with_template(real["qwen2.5"], template, system="Be brief.", template_args={"calm": True})
    assert render_prompt("chat", "1+1?", told) == ("Calmly. <|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n"
                                                   "1+1?<|im_end|>\n<|im_start|>assistant\n")
    row = {"system": "Be long.", "prompt": "1+1?", "response": "2"}
    (example,), _ = encode(told, row, method="sft", style="chat")
    assert "Be long." in told.decode(example.chosen) and "Be brief." not in told.decode(example.chosen)
    with pytest.raises(DataError, match="--prompt alpaca has no place for --system"):
        render_prompt("alpaca", "1+1?", told)
    with pytest.raises(DataError, match="has no argument 'clam' .it reads .*calm.*correct --template_args"):
        render_prompt("chat", "1+1?", with_template(real["qwen2.5"], template, template_args={"clam": True}))
    with pytest.raises(DataError, match="leaves out the system prompt"):
        render_prompt("chat", "1+1?", with_template(real["qwen2.5"], "{{ messages[-1].content }}", system="Be brief."))
    with pytest.raises(DataError, match="--prompt alpaca has no place for .* a system prompt or earlier turns"):
        encode(real["qwen2.5"], row, method="sft")
    with pytest.raises(SystemExit):
        data.main(["show", "--data", "f", "--template_args", "[1]"])


def test_a_template_that_moves_the_system_prompt(real, assets):
    """Mistral-Nemo's has the system prompt in the last turn if that is the user's, and nowhere in a whole conversation:
    trained is what is sampled from, and the report says so."""
    template = (assets / "tokenizers" / "templates" / "mistralai-Mistral-Nemo-Instruct-2407.jinja").read_text()
    tokenizer = with_template(real["tinyllama"], template, system="Be brief.")
    (example,), report = encode(tokenizer, {"prompt": "1+1?", "response": "2"}, method="sft", style="chat")
    assert example.chosen.tolist() == tokenizer.encode("<s>[INST]Be brief.\n\n1+1?[/INST]2</s>", bos=False).ids
    assert "alters this conversation" in str(report)


def test_reported_templates(tmp_path):
    """The templates of people's reports, if they are here: the ids are those of transformers' whole conversation up to
    the end token, except that a thought is not taken out of the answer that is to be learned."""
    file = ASSETS.parent / "cases" / "shown" / "templates.jsonl"
    if not file.is_file():
        pytest.skip("reported templates: ../shared/cases is not here")
    for case in map(json.loads, file.read_text().splitlines()):
        name = {"qwen2": "qwen2.5"}.get(case["base_model"], case["base_model"])
        tokenizer = with_template(Tokenizer.from_pretrained(ASSETS / "tokenizers" / name), case["template"])
        (example,), report = encode(tokenizer, case["row"], method="sft", style="chat")
        wanted = case["whole_conversation_by_transformers"].rstrip("\n")
        if "<think>" in case["row"]["response"]:
            wanted = wanted.replace("\n\n7", case["row"]["response"])
            assert "alters this conversation" in str(report)
        assert example.chosen.tolist() == tokenizer.encode(wanted, bos=False).ids


def test_prompts_of_the_paper(tiny):
    """Character for character what the authors' code feeds its models, question {braces} included."""
    q = "Is {x} = 2?"
    assert {style: render_prompt(style, q, tiny) for style in data.PROMPT_STYLES} == {
        "qwen2-boxed": "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nIs {x} = 2?\n"
                       "Please reason step by step, and put your final answer within \\boxed{}.<|im_end|>\n"
                       "<|im_start|>assistant\n",
        "alpaca": "Below is an instruction that describes a task. Write a response that appropriately completes the "
                  "request.\n\n### Instruction:\nIs {x} = 2?\n\n### Response:\n",
        "deepseek-math": "User: Is {x} = 2?\nPlease reason step by step, and put your final answer within \\boxed{}."
                         "\n\nAssistant: ",
        "chat": "<|im_start|>user\nIs {x} = 2?<|im_end|>\n<|im_start|>assistant\n", "raw": "Is {x} = 2?"}


# ------------------------------------------------------------------------------------------------------ rows to tokens

def test_what_each_method_trains(tiny):
    """Context and response of the three methods as text; a step gets no end token, a whole answer exactly one, at the
    end."""
    prompt, steps = render_prompt("qwen2-boxed", PAIR["prompt"], tiny), PAIR["initial_reason_steps"]
    whole = steps + PAIR["full_chosen"]
    for method, context, chosen, end in (("stepdpo", prompt + steps, PAIR["chosen"], ""),
                                         ("dpo", prompt, whole, "<|im_end|>"), ("sft", prompt, whole, "<|im_end|>")):
        (example,), _ = encode(tiny, PAIR, method=method, style="qwen2-boxed")
        assert tiny.decode(example.chosen[:example.start]) == "<s>" + context
        assert tiny.decode(example.chosen[example.start:]) == chosen + end
        assert (example.rejected is None) == (method == "sft")


def test_full_answer_that_holds_the_steps_already(tiny):
    """full_* with or without initial_reason_steps in front: the same whole answer, never the steps twice."""
    steps = PAIR["initial_reason_steps"]
    long = PAIR | {side: steps + PAIR[side] for side in ("full_chosen", "full_rejected")}
    (a, b), _ = encode(tiny, PAIR, long, method="dpo")
    assert a.chosen.tolist() == b.chosen.tolist() and a.rejected.tolist() == b.rejected.tolist()


def test_plain_rows(tiny):
    """prompt/response for sft, prompt/chosen/rejected for dpo: the rows of other people's files."""
    (a,), _ = encode(tiny, {"prompt": "2 + 3?", "response": " 5"}, method="sft")
    (b,), _ = encode(tiny, {"prompt": "2 + 3?", "chosen": " 5", "rejected": " 6"}, method="dpo")
    assert tiny.decode(a.chosen[a.start:]) == tiny.decode(b.chosen[b.start:]) == " 5</s>"


SAID = [{"role": "user", "content": "2 + 3?"}]
RIGHT, WRONG = {"role": "assistant", "content": "5"}, {"role": "assistant", "content": "6"}
SYSTEM, EARLIER = {"role": "system", "content": "Add."}, [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
PLAIN = {"chosen": "5", "rejected": "6"}
LAYOUTS = {     # name: (row, the turns before the answer)
    "prompt and sides as messages": ({"prompt": SAID, "chosen": [RIGHT], "rejected": [WRONG]}, SAID),
    "the prompt in both sides": ({"chosen": [*SAID, RIGHT], "rejected": [*SAID, WRONG]}, SAID),
    "the prompt in both sides and as text": ({"prompt": "2 + 3?", "chosen": [*SAID, RIGHT], "rejected": [*SAID, WRONG]}, SAID),
    "and as messages": ({"prompt": SAID, "chosen": [*SAID, RIGHT], "rejected": [*SAID, WRONG]}, SAID),
    "several turns": ({"prompt": [SYSTEM, *EARLIER, *SAID], "chosen": [RIGHT], "rejected": [WRONG]}, [SYSTEM, *EARLIER, *SAID]),
    "system column": ({"system": "Add.", "question": "2 + 3?"} | PLAIN, [SYSTEM, *SAID]),
    "no system": ({"system": None, "prompt": "2 + 3?"} | PLAIN, SAID),
    "instruction and input": ({"instruction": "Work it out.", "input": "2 + 3?"} | PLAIN,
                              [{"role": "user", "content": "Work it out.\n2 + 3?"}]),
    "passage": ({"passage": "Ann has 2.", "question": "2 + 3?"} | PLAIN, [{"role": "user", "content": "Ann has 2.\n2 + 3?"}]),
    "empty columns": ({"history": [], "tools": None, "instruction": "2 + 3?", "input": ""} | PLAIN, SAID),
    "ShareGPT": ({"conversations": [{"from": "human", "value": "2 + 3?"}], "chosen": {"from": "gpt", "value": "5"},
                  "rejected": {"from": "gpt", "value": "6"}}, SAID),
    "a thought beside the content": ({"prompt": [*SAID, {"role": "assistant", "content": "5", "reasoning_content": "Add."},
                                                 {"role": "user", "content": "Sure?"}]} | PLAIN,
                                     [*SAID, {"role": "assistant", "content": "<think>\nAdd.\n</think>\n\n5"},
                                      {"role": "user", "content": "Sure?"}]),
    "content in parts": ({"prompt": [{"role": "user", "content": [{"type": "text", "text": "2 + 3?"}]}]} | PLAIN, SAID),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_rows_of_other_trainers(tiny, name):
    """Every column that says something is in the prompt, as the template has it, and only the last turn is trained."""
    row, turns = LAYOUTS[name]
    (example,), _ = encode(tiny, row, method="dpo", style="chat")
    asked = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in turns) + "<|im_start|>assistant\n"
    assert [tiny.decode(side) for side in example.sides] == [asked + "5<|im_end|>", asked + "6<|im_end|>"]
    assert tiny.decode(example.chosen[:example.start]) == asked
    single = len(turns) == 1                            # goes with every style; the others need the template
    assert (data.texts_of(row, "dpo", "f:1")[0] == turns[0]["content"]) == single


@pytest.mark.parametrize("row", [{"prompt": "2 + 3?", "completion": "5"}, {"messages": [*SAID, RIGHT]},
                                 {"instruction": "2 + 3?", "input": "", "output": "5"},
                                 {"prompt": SAID, "completion": [RIGHT]}, {"prompt": SAID, "chosen": [RIGHT]},
                                 {"conversations": [{"from": "human", "value": "2 + 3?"}, {"from": "gpt", "value": "5"}]}])
def test_rows_of_other_trainers_for_sft(tiny, tmp_path, capsys, row):
    """The same answer from each layout; and data.py show knows without --method what such a file is for."""
    (example,), _ = encode(tiny, row, method="sft", style="chat")
    assert tiny.decode(example.chosen) == "<|im_start|>user\n2 + 3?<|im_end|>\n<|im_start|>assistant\n5<|im_end|>"
    (tmp_path / "f.jsonl").write_text(json.dumps(row))
    assert data.main(["show", "--data", str(tmp_path / "f.jsonl"), "--model", tiny.source]) == 0
    assert "method sft" in capsys.readouterr().out


@pytest.mark.parametrize("row, reason", [
    ({"chosen": [*SAID, RIGHT], "rejected": [*EARLIER, *SAID, WRONG]}, "differ before their last turn"),
    ({"prompt": "1 + 1?", "chosen": [*SAID, RIGHT], "rejected": [*SAID, WRONG]}, "other turns than"),
    ({"prompt": [*SAID, RIGHT], "chosen": "5", "rejected": "6"}, "other turns than"),
    ({"prompt": SAID, "chosen": SAID, "rejected": [WRONG]}, "last turn of chosen is not the assistant's"),
    ({"prompt": [SYSTEM, *SAID], "system": "Subtract.", "chosen": "5", "rejected": "6"}, "other turns than"),
    ({"prompt": [*SAID, RIGHT | {"tool_calls": [{}]}, *SAID], "chosen": "5", "rejected": "6"}, "call of a tool"),
    ({"prompt": "2 + 3?", "tools": [{}], "chosen": "5", "rejected": "6"}, "column tools has no place"),
    ({"prompt": "2 + 3?", "history": [["Hi", "Ho"]], "chosen": "5", "rejected": "6"}, "column history has no place"),
    ({"prompt": "2 + 3?", "context": ["Ann has 2."], "chosen": "5", "rejected": "6"}, "context, which belongs to the question, is no text")])
def test_conversations_that_cannot_be_trained_on(tiny, row, reason):
    """Dropped under a reason: the rest of the file goes on."""
    (example,), report = encode(tiny, row, {"prompt": "2 + 3?"} | PLAIN, method="dpo", style="chat")
    assert len(report.dropped) == 1 and re.search(reason, str(report))


@pytest.mark.parametrize("message, found", [({"role": "user"}, "message 1: field 'content': not there"), ("x", "message 1: found text"),
                                            ({"content": "x"}, "message 1: field 'role': not there"),
                                            ({"role": "user", "content": [{"type": "image"}]}, "field 'text': not there")])
def test_malformed_messages_are_named(tiny, message, found):
    with pytest.raises(DataError, match=f"f.jsonl:1: field 'prompt'.*{found}"):
        encode(tiny, {"prompt": [message]} | PLAIN, method="dpo", style="chat")


def test_end_marks_in_the_rows(real):
    """The model's own end token at an answer's end is there once all the same; another family's, which would be trained
    letter by letter, drops the row by name; one in the middle would forge a turn."""
    row = lambda end: {"prompt": "2 + 3?", "chosen": "5" + end, "rejected": "6" + end}
    plain, _ = encode(real["qwen2.5"], row(""), method="dpo", style="chat")
    for end in ("<|im_end|>", "<|im_end|>\n", "\n<|im_end|><|im_end|>"):
        examples, _ = encode(real["qwen2.5"], row(end), method="dpo", style="chat")
        assert examples[0].chosen.tolist() == plain[0].chosen.tolist()
    for end in ("</s>", "<|eot_id|>", "<end_of_turn>", "<｜end▁of▁sentence｜>", "<|END_OF_TURN_TOKEN|>", "<|end|>\n"):
        with pytest.raises(DataError, match=f"{re.escape(end.strip())}, which another model's chats"):
            encode(real["qwen2.5"], row(end), method="dpo", style="chat")
    with pytest.raises(DataError, match=r"\[INST\], which another"):
        encode(real["qwen2.5"], row("") | {"prompt": "[INST] 2 + 3? [/INST]"}, method="dpo", style="chat")
    with pytest.raises(DataError, match="control token"):
        encode(real["qwen2.5"], row("<|im_end|>\nuser"), method="dpo", style="chat")


def test_special_tokens_that_are_words(tmp_path):
    """A step mark or a thought's mark that is a special token is trained as that token, and the report says so: it forges
    nothing."""
    folder = write_tokenizer(tmp_path / "t", template="{# [THINK] #}" + CHATML)
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    backend.add_special_tokens(["<step>", "[THINK]"])
    backend.save(str(folder / "tokenizer.json"))
    tokenizer = Tokenizer.from_pretrained(folder)
    for mark in ("<step>", "[THINK]"):
        row = {"prompt": f"2 + 3? Use {mark}.", "chosen": f"{mark}5", "rejected": f"{mark}6"}
        (example,), report = encode(tokenizer, row, method="dpo", style="chat")
        assert example.chosen[example.start] == backend.token_to_id(mark)
        assert f"special token {mark} in the text is trained as that token" in str(report)


@pytest.mark.parametrize(
    "change, reason", [({"rejected": ""}, "empty rejected"), ({"chosen": " \n"}, "empty chosen"),
                       ({"prompt": " "}, "empty prompt"), ({"rejected": PAIR["chosen"] + " "}, "the same"),
                       ({"chosen": " 5<|im_end|>"}, r"control token <\|im_end\|>"),
                       ({"prompt": "</s>?"}, "control token </s>"),
                       ({"initial_reason_steps": "Step 1: <|im_", "chosen": "end|> 5"}, r"control token <\|im_end\|>"),
                       ({"prompt": "why " * 900}, "longer than 1024")])
def test_unfit_rows_are_dropped_and_counted(tiny, change, reason):
    """Never cut, never passed on in silence: counted under a reason, with file and line of the first; a file of only
    such rows is an error."""
    examples, report = encode(tiny, PAIR, PAIR | change, PAIR | change)
    assert (report.rows, report.kept, len(examples)) == (3, 1, 1)
    assert "2  " in str(report)
    with pytest.raises(DataError, match=f"no row is left.*{reason}"):
        encode(tiny, PAIR | change)
    assert next(iter(report.dropped.values())) == ["f.jsonl:2", "f.jsonl:3"]


def test_raw_takes_a_prompt_that_is_rendered_already(tiny):
    """Control tokens in a raw prompt are what `raw` is for; in an answer they are as unwelcome as ever."""
    rows = [PAIR | {"prompt": "<|im_start|>user 2 + 3?<|im_end|>"}, PAIR | {"chosen": " 5<|im_end|>"}]
    (example,), report = encode(tiny, *rows, style="raw")
    assert tiny.control_ids["<|im_end|>"] in example.chosen[:example.start] and report.kept == 1


def test_length_limit_counts_what_the_model_sees(tiny):
    """BOS and end token count; a row of exactly the limit stays."""
    (example,), _ = encode(tiny, PAIR, method="dpo")
    longest = max(len(example.chosen), len(example.rejected))
    assert encode(tiny, PAIR, method="dpo", max_length=longest)[1].kept == 1
    with pytest.raises(DataError, match=f"longer than {longest - 1} tokens"):
        encode(tiny, PAIR, method="dpo", max_length=longest - 1)


TEXT = st.text(st.sampled_from("aé é\n\n  .5{🦙日本ﬁ\u0301\u00a0x=")
               | st.characters(exclude_categories=["Cs"], exclude_characters="\0"),
               min_size=1,
               max_size=12)


@given(context=TEXT, chosen=TEXT, rejected=TEXT)
@settings(max_examples=80)
def test_the_boundary_falls_between_context_and_response(real, context, chosen, rejected):
    """Four real vocabularies, awkward characters: sides are tokenised as whole texts, and no character of a response is
    left in the context.

    Checked without offsets: the tokens before `start` spell a beginning of the context; one token more on one of the
    sides goes beyond it.
    """
    row = {"prompt": "Q", "initial_reason_steps": context, "chosen": chosen, "rejected": rejected}
    for name, tokenizer in real.items():
        before = render_prompt("alpaca", "Q", tokenizer) + context
        try:
            (example,), _ = encode(tokenizer, row)
        except DataError as error:
            assert any(word in str(error) for word in ("empty", "the same", "without a token", "not tokenised alike",
                                                       "control token")), error
            continue
        assert example.chosen.tolist() == tokenizer.encode(before + chosen).ids
        assert example.rejected.tolist() == tokenizer.encode(before + rejected).ids
        assert example.chosen[:example.start].tolist() == example.rejected[:example.start].tolist()
        if name == "qwen2.5":                                # NFC: compare with normalised text
            before = unicodedata.normalize("NFC", before)
        bos = 0 if tokenizer.bos_id is None else 1
        spelled = lambda ids: tokenizer.decode(ids[bos:]).rstrip("\ufffd")
        assert before.startswith(spelled(example.chosen[:example.start].tolist()))
        one_more = [side[:example.start + 1].tolist() for side in (example.chosen, example.rejected)]
        assert any("\ufffd" in tokenizer.decode(ids) or not before.startswith(spelled(ids)) for ids in one_more)


def test_a_token_across_the_boundary_belongs_to_the_response(real):
    r"""Context ends in "\n", response begins with one: the vocabulary has "\n\n" as one token, which the response must
    answer for."""
    (example,), _ = encode(real["llama3"],
                            PAIR | {"initial_reason_steps": "Step 1: x.\n", "chosen": "\nSo 5.", "rejected": "So 6."})
    assert real["llama3"].decode(example.chosen[example.start:example.start + 1]) == ".\n\n"
    assert real["llama3"].decode(example.rejected[example.start:example.start + 1]) == ".\n"
    assert response_start([(0, 2), (2, 3), (3, 5), (5, 6)], 4) == 2


def test_a_normaliser_that_melts_the_boundary(real):
    """NFC joins "e" (context) and a combining accent (response) into one token: it counts as response, though its
    offsets end before."""
    row = PAIR | {"initial_reason_steps": "caf e", "chosen": "\u0301 x", "rejected": " y"}
    (example,), _ = encode(real["qwen2.5"], row)
    assert real["qwen2.5"].decode(example.chosen[example.start:]) == " é x"
    assert response_start([(0, 2), (2, 3), (4, 5)], 3) == 1 and response_start([(0, 2), (2, 3), (3, 5)], 3) == 2


def test_offsets_trimmed_of_white_space():
    """A tokenizer.json may ask for offsets without white space (trim_offsets). Then a token ". " across the boundary
    would seem to be all context, and one that begins the response, " 5", to leave a gap; ours are seen whole."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE({token: i for i, token in enumerate([*alphabet, ".Ġ", "Ġ5"])}, [(".", "Ġ"), ("Ġ", "5")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.post_processor, backend.decoder = processors.ByteLevel(trim_offsets=True), decoders.ByteLevel()
    tokenizer = Tokenizer(backend)
    for steps, response in (("So.", ". 5"), ("So:", " 5")):
        (example,), _ = encode(tokenizer, PAIR | {"initial_reason_steps": steps, "chosen": " 5", "rejected": " 5 + 1"})
        assert tokenizer.decode(example.chosen[example.start:]) == response


def test_whole_answers_share_their_beginning(tiny):
    """dpo on answers that begin alike: the common beginning is computed once, yet every token of it keeps its loss on
    both sides."""
    (example,), _ = encode(tiny, PAIR, method="dpo")
    assert example.start < common_length(example.chosen, example.rejected)
    batch = collate([example], [0])
    assert (batch.response == 0).sum() == len(example.chosen) - example.start
    assert (batch.response == 1).sum() == len(example.rejected) - example.start


def test_one_side_is_the_beginning_of_the_other(tiny):
    """The shorter side ends inside the longer one's tokens: nothing is computed twice, and both are predicted whole."""
    (example,), _ = encode(tiny, PAIR | {"chosen": " We add. We add.", "rejected": " We add."})
    batch = collate([example], [0])
    assert len(batch.input_ids) == example.length == len(example.chosen) > len(example.rejected)
    assert torch.bincount(batch.response).tolist() == [len(side) - example.start for side in example.sides]


def test_every_response_token_knows_its_step(real):
    """In a whole answer, counted from the first step; in a pair of steps, the step that is judged; the end token
    belongs to the last step."""
    row = {"prompt": "Ann has 3 apples.", "initial_reason_steps": "Step 1: 3 + 4 = 7.\nStep 2:", "chosen": " 7 * 2 = 14.",
           "rejected": " 7 + 2 = 9.", "full_chosen": " 7 * 2 = 14.\nStep 3: 14 - 5 = 9.", "full_rejected": " 7 + 2 = 9."}
    for tokenizer in real.values():
        (example,), _ = encode(tokenizer, row)
        assert {int(step) for steps in example.steps for step in steps} == {1}
        (example,), _ = encode(tokenizer, row, method="dpo")
        for side, steps in zip(example.sides, example.steps):
            assert len(steps) == len(side) - example.start and (np.diff(steps) >= 0).all()
        texts = [tokenizer.decode(example.chosen[example.start:][example.steps[0] == k]) for k in range(3)]
        assert ["3 + 4" in texts[0], "7 * 2" in texts[1], "14 - 5" in texts[2]] == [True] * 3
        batch = collate([example], [0])
        assert batch.step.tolist() == [int(step) for steps in example.steps for step in steps]


# -------------------------------------------------------------------------------------------------------------- batches

@st.composite
def example_lists(draw):
    """Rows of up to three problems, with one to three sides each, which fork anywhere and may end inside one another."""
    prompts = [draw(st.lists(st.integers(0, 3), min_size=1, max_size=30)) for _ in range(3)]
    examples = []
    for i in range(draw(st.integers(1, 6))):
        problem = draw(st.integers(0, 2))
        context = prompts[problem] + draw(st.lists(st.integers(0, 1), max_size=4))
        responses = draw(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=6), min_size=1, max_size=3, unique_by=tuple))
        sides = [np.array(context + response, dtype=np.int32) for response in responses]
        steps = [np.zeros(len(response), dtype=np.int32) for response in responses]
        examples.append(Example(f"f:{i}", sides, len(context), steps, draw(st.sampled_from([None, f"problem {problem}"]))))
    return examples


@given(examples=example_lists(), data_=st.data())
@settings(max_examples=200)
def test_a_batch_holds_every_side_of_every_row(examples, data_):
    """Walking up the parents gives back each side's ids and positions 0, 1, 2..; each target is what follows its
    predictor on that side; nothing is there twice that one family has in common."""
    rows = data_.draw(st.permutations(range(len(examples))))
    batch = collate(examples, rows)
    assert batch.rows.tolist() == list(rows) and batch.input_ids.dtype == batch.targets.dtype == torch.int64
    assert batch.examples == [examples[row] for row in rows]
    assert len(batch.input_ids) == sum(batch.lengths) and (batch.predict_at.diff() > 0).all()
    segment_of = np.repeat(np.arange(len(batch.lengths)), batch.lengths)
    ends = np.cumsum(batch.lengths)

    def text_up_to(place):
        """The flat places of the text that ends at this one."""
        segment = segment_of[place]
        places = list(range(ends[segment] - batch.lengths[segment], place + 1))
        while (segment := batch.parents[segment]) >= 0:
            places = list(range(ends[segment] - batch.lengths[segment], ends[segment])) + places
        return places

    sides = [(examples[row], side) for row in rows for side in examples[row].sides]
    assert batch.responses == len(sides)
    for number, (example, side) in enumerate(sides):
        mine = batch.response == number
        assert batch.targets[mine].tolist() == side[example.start:].tolist()
        for at, place in zip(range(example.start - 1, len(side) - 1), batch.predict_at[batch.source[mine]].tolist()):
            places = text_up_to(place)
            assert batch.input_ids[places].tolist() == side[:at + 1].tolist()
            assert batch.position_ids[places].tolist() == list(range(at + 1))
    families = {}
    for row in rows:
        families.setdefault(data.family_of(examples[row], row), []).extend(examples[row].sides)
    assert len(batch.input_ids) <= sum(map(data.tokens_in_tree, families.values()))


@given(texts=st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=8), min_size=1, max_size=8))
def test_tokens_in_a_tree(texts):
    """As many as there are different beginnings."""
    beginnings = {tuple(text[:n]) for text in texts for n in range(1, len(text) + 1)}
    assert data.tokens_in_tree([np.array(text, dtype=np.int32) for text in texts]) == len(beginnings)


def of_length(*lengths, problems=None):
    """Rows of so many tokens; those of one problem share all but the last."""
    problems = problems or [None] * len(lengths)
    return [Example(f"f:{i}", [np.r_[np.zeros(length - 1), i + 1].astype(np.int32)], 1, [np.zeros(length - 1, dtype=np.int32)], problem)
            for i, (length, problem) in enumerate(zip(lengths, problems))]


@given(lengths=st.lists(st.integers(2, 300), min_size=1, max_size=70),
       batch=st.integers(1, 20),
       size=st.none() | st.integers(1, 5),
       budget=st.none() | st.integers(50, 500),
       world=st.integers(1, 4),
       seed=st.integers(0, 9),
       epoch=st.integers(0, 3))
@settings(max_examples=100)
def test_the_plan_takes_every_row_once_and_the_same_steps_everywhere(lengths, batch, size, budget, world, seed, epoch):
    """Limits kept; the rows of a step do not depend on processes or micro-batches; another epoch takes another order of
    the same rows."""
    examples = of_length(*lengths)
    plan = epoch_plan(examples, batch_size=batch, micro_batch_size=size, micro_batch_tokens=budget, world_size=world,
                      seed=seed, epoch=epoch)
    steps = [sorted(row for rank in step for micro in rank for row in micro) for step in plan]
    assert sorted(row for step in steps for row in step) == list(range(len(lengths)))
    assert all(len(step) == batch for step in steps[:-1]) and 1 <= len(steps[-1]) <= batch
    plain = epoch_plan(examples, batch_size=batch, seed=seed, epoch=epoch)
    assert steps == [sorted(step[0][0]) for step in plain]
    for step in plan:
        assert len(step) == world
        for micro in (micro for rank in step for micro in rank):
            assert micro and (size is None or len(micro) <= size)
            assert budget is None or len(micro) == 1 or sum(lengths[row] for row in micro) <= budget
        loads = [sum(lengths[row] for micro in rank for row in micro) for rank in step]
        assert max(loads) - min(loads) <= max(lengths)


def test_the_order_is_fixed_for_all_time():
    """Resuming with another numpy must not reorder an epoch: the order itself is pinned."""
    order = lambda epoch: [row for step in epoch_plan(of_length(*[2] * 8), batch_size=1, seed=0, epoch=epoch) for row in step[0][0]]
    assert order(1) == [7, 4, 5, 1, 6, 2, 0, 3] and order(1) != order(2)


def test_rows_of_one_problem_stay_together():
    """Sixteen rows of four problems on two processes: a problem's rows are one micro-batch of one process, and the loads
    are equal as they are counted in the tree."""
    examples = of_length(*[30] * 16, problems=[f"problem {i % 4}" for i in range(16)])
    (step,) = epoch_plan(examples, batch_size=16, world_size=2)
    problems = [[{row % 4 for row in micro_batch} for micro_batch in rank] for rank in step]
    assert sorted(len(ids) for rank in problems for ids in rank) == [2, 2]
    assert not set.union(*problems[0]) & set.union(*problems[1])
    (step,) = epoch_plan(examples, batch_size=16, micro_batch_size=4)
    assert [{row % 4 for row in micro_batch} for micro_batch in step[0]] == [{0}, {1}, {2}, {3}] or len(step[0]) == 4
    assert all(len({row % 4 for row in micro_batch}) == 1 for micro_batch in step[0])


def test_one_problem_is_cut_for_many_processes():
    """All rows of a step are of one problem: every process gets its share of them, and no micro-batch is over the budget."""
    examples = of_length(*[50] * 24, problems=["x"] * 24)
    (step,) = epoch_plan(examples, batch_size=24, world_size=4, micro_batch_tokens=54)
    assert all(rank for rank in step) and sorted(row for rank in step for rows in rank for row in rows) == list(range(24))
    for rows in (rows for rank in step for rows in rank):
        assert data.tokens_in_tree([examples[row].chosen for row in rows]) <= 54


def test_group_by_prompt_shuffles_problems():
    """Each problem's rows follow each other, problems are in random order; without it rows are."""
    examples = of_length(*[9] * 30, problems=[f"problem {i % 10}" for i in range(30)])
    order = data.shuffled(examples, 0, 0, True)
    problems = [examples[row].problem for row in order]
    assert sorted(order) == list(range(30)) and all(len(set(problems[i:i + 3])) == 1 for i in range(0, 30, 3))
    assert problems[::3] != sorted(set(problems)) and data.shuffled(examples, 0, 1, True) != order
    assert data.shuffled(examples, 0, 0, False) != order


def test_an_order_of_ones_own():
    """A curriculum gives the rows' order; steps are cut from it."""
    plan = epoch_plan(of_length(*[9] * 6), batch_size=2, order=[5, 0, 4, 1, 3, 2])
    assert [sorted(step[0][0]) for step in plan] == [[0, 5], [1, 4], [2, 3]]


# ---------------------------------------------------------------------------------------------------- real rows, show

def test_real_rows_through_every_tokenizer_and_style(real):
    """55 rows of real model text in the Math-Step-DPO-10K fields: all are kept at 2048 tokens, whatever the vocabulary
    and style."""
    for file, methods in (("prm800k_derived_step_pairs", ["stepdpo"]),
                          ("qwen25math_derived_step_pairs", ["stepdpo", "dpo"])):
        rows = list(read_rows(ASSETS / "prefs" / f"{file}.jsonl"))
        for tokenizer in real.values():
            for method in methods:
                for style in data.PROMPT_STYLES:
                    if style == "qwen2-boxed" and "<|im_start|>" not in tokenizer.control_ids:
                        continue
                    examples, report = encode_dataset(rows, tokenizer, method, style, 2048)
                    assert report.kept + sum(map(len, report.dropped.values())) == len(rows)
                    assert report.kept >= len(rows) - 1
                    batch = collate(examples, range(len(examples)))
                    assert batch.targets.max() < len(tokenizer)


def test_show_prints_the_row_its_mask_and_the_saving(tmp_path, capsys):
    folder = write_tokenizer(tmp_path / "m")
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(
        json.dumps(row) + "\n" for row in (PAIR | {"rejected": ""}, PAIR, PAIR | {"chosen": "\x1b[31m 5"})))
    assert data.main(["show", "--data", str(file), "--model", str(folder), "--prompt", "alpaca"]) == 0
    out = capsys.readouterr().out
    for part in ("pairs.jsonl:2", "### Response:", "s_win", "2 + 3 = 6.", "^", "no end token follows",
                 "3 rows, 2 kept, 1 dropped", "empty rejected", "text by text"):
        assert part in out
    assert data.main(["show", "--data", str(file), "--model", str(folder), "--row", "3"]) == 0
    assert "\x1b" not in capsys.readouterr().out             # a row must not be able to command the terminal
    assert data.main(["show", "--data", str(file), "--model", str(folder), "--row", "1"]) == 0
    assert "dropped: empty rejected" in capsys.readouterr().out


def test_errors_are_one_line_and_status_2(tmp_path, capsys):
    folder = write_tokenizer(tmp_path / "m")
    (tmp_path / "bad.jsonl").write_text('{"prompt": 5}\n')
    bad = str(tmp_path / "bad.jsonl")
    for arguments in (["--data", "no.jsonl", "--model", str(folder)], ["--data", bad, "--model", str(folder)],
                      ["--data", bad, "--model", str(tmp_path / "none")]):
        assert data.main(["show", *arguments]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1
