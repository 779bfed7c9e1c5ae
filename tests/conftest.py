"""What the tests share: the folder of real checkpoints and data (not part of the project; tests that need it skip where it is absent) and tiny models."""
import json
import os
import select
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
ASSETS = ROOT.parent / "shared" / "assets"
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)      # the models here are too small to share out; a second thread would only wait


@pytest.fixture(scope="session")
def assets() -> Path:
    if not ASSETS.is_dir():
        pytest.skip(f"real material is not here ({ASSETS})")
    return ASSETS


@pytest.fixture(scope="session")
def cases() -> Path:
    """Inputs after public bug reports."""
    folder = ASSETS.parent / "cases" / "shown"
    if not folder.is_dir():
        pytest.skip(f"cases of public bug reports are not here ({folder})")
    return folder


TINY = dict(vocab_size=97, hidden_size=32, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            max_position_embeddings=128, rms_norm_eps=1e-6, bos_token_id=1, eos_token_id=2)


def tiny_config(family: str = "llama", **changes) -> dict:
    return {"model_type": family, "architectures": [{"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "mistral": "Mistral"}[family] + "ForCausalLM"],
            **TINY, **changes}


def tiny_model(seed: int = 0, **changes):
    from model import Config, Llama
    return Llama(Config.from_dict(tiny_config(**changes))).init_weights(seed)


def write_json(path: Path, value) -> Path:
    path.write_text(json.dumps(value))
    return path


def byte_tokenizer(folder: Path):
    """A tokenizer.json of single bytes with <s> = 1 in front and </s> = 2: small, exact on any text, needs no download."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2, **{c: i + 3 for i, c in enumerate(alphabet)}}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.add_special_tokens(["<pad>", "<s>", "</s>"])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True})


def tiny_checkpoint(folder: Path, seed: int = 0, **changes) -> Path:
    """A random tiny Llama with the byte tokenizer, as a checkpoint folder."""
    byte_tokenizer(folder)
    tiny_model(seed, **{"vocab_size": 259, "max_position_embeddings": 512, **changes}).save_pretrained(folder)
    return folder


def pair_rows(n: int, seed: int = 0) -> list[dict]:
    """Rows with the columns of Math-Step-DPO-10K, of uneven lengths."""
    import random
    rng = random.Random(seed)
    rows = []
    for _ in range(n):
        a, b, c = rng.randint(2, 99), rng.randint(2, 99), rng.randint(2, 9)
        prefix = f"Let's think step by step.\nStep 1: Add the two, {a} + {b} = {a + b}.\nStep 2:" if rng.random() < 0.7 else "Let's think step by step.\nStep 1:"
        good = f" Then {a + b} * {c} = {(a + b) * c}{'.' * rng.randint(1, 9)}"
        bad = f" Then {a + b} * {c} = {(a + b) * c + rng.randint(1, 9)}, I think."
        rows.append(dict(dataset="made up", prompt=f"What is ({a} + {b}) * {c}?", initial_reason_steps=prefix, chosen=good, rejected=bad,
                         full_chosen=good + f"\nThe answer is: {(a + b) * c}", full_rejected=bad + "\nThe answer is: no idea", answer=str((a + b) * c)))
    return rows


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with a tiny checkpoint `model`, 27 training pairs (so the last batch of 8 is short by 5) and 10 held-out ones."""
    folder = tmp_path_factory.mktemp("work")
    tiny_checkpoint(folder / "model")
    write_rows(folder / "pairs.jsonl", pair_rows(27))
    write_rows(folder / "held.jsonl", pair_rows(10, seed=1))
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# processes

SERVER = """
import json, os, runpy, signal, sys
sys.path[:0] = sys.argv[1:]
import data, eval, stepdpo

def watch(out, kill, log):
    count = 0
    def hook(event, args):
        nonlocal count
        if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"):
            if str(args[0]).startswith(out) or event in ("os.remove", "os.rmdir") and args[-1] != -1:
                count += 1
                if kill is None:
                    os.write(log, b".")
                elif count == kill["before"]:
                    (os.killpg if kill["all"] else os.kill)(0 if kill["all"] else os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)

def child(job, rank):
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0), os.dup2(log, 1), os.dup2(log, 2)
    if job["world"] > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(job["world"]), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(job["port"]))
    if job["count"]:
        watch(job["out"], None, os.open(f"{job['count']}-{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC))
    if job["kill"] and job["kill"]["rank"] == rank:
        watch(job["out"], job["kill"], None)
    sys.argv = job["argv"]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        return end.code or 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 1
    return 0

for line in sys.stdin:
    job, pids = json.loads(line), []
    for rank in range(job["world"]):
        pid = os.fork()
        if pid == 0:
            status = child(job, rank)
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(status)
        pids.append(pid)
        os.setpgid(pid, pids[0])
    print(json.dumps(pids), flush=True)
    for _ in pids:
        pid, status = os.wait()
        print(json.dumps([pids.index(pid), os.waitstatus_to_exitcode(status)]), flush=True)
"""


class Processes:
    """Runs programs of the project in real processes, several as torchrun would, forked from one that has imported torch and done nothing else: that saves
    the seconds that the import takes. A file operation is what an audit hook sees: open, mkdir, rename, remove."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.server = subprocess.Popen([sys.executable, "-c", SERVER, str(ROOT), str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0,
                                       env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"})

    def start(self, argv: list[str], world: int, watched=None, kill=None, count=None):
        """kill: {"before": n, "rank": r, "all": bool}: SIGKILL before process r's n-th file operation in the folder `watched`. count: a file, into which
        (with -0 for process 0, and so on) a byte is written for each."""
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        self.log = self.folder / "log"
        self.log.write_text("")
        job = dict(argv=argv, out=str(watched), world=world, kill=kill, count=count and str(count), log=str(self.log), port=port)
        self.server.stdin.write(json.dumps(job).encode() + b"\n")
        self.pids = json.loads(self.server.stdout.readline())

    def wait(self) -> list[int]:
        """The exit status of each process. When one has died, the others get the SIGTERM that torchrun would send, and must then end by
        themselves within two minutes."""
        status, hangs = {}, False
        while len(status) < len(self.pids):
            if not select.select([self.server.stdout], [], [], 120)[0]:
                hangs = True
                os.killpg(self.pids[0], signal.SIGKILL)
            rank, code = json.loads(self.server.stdout.readline())
            status[rank] = code
            for other in set(range(len(self.pids))) - set(status) if code else ():
                with suppress(ProcessLookupError):
                    os.kill(self.pids[other], signal.SIGTERM)
        assert not hangs, f"a process did not end; all said:\n{self.log.read_text()}"
        return [status[rank] for rank in sorted(status)]

    def run(self, *argv, world: int = 1) -> str:
        """Run it to its end, which must be a good one; what all processes said."""
        self.start([str(a) for a in argv], world)
        assert self.wait() == [0] * world, self.log.read_text()
        return self.log.read_text()


@pytest.fixture(scope="session")
def processes(tmp_path_factory):
    if not hasattr(os, "fork"):
        pytest.skip("this system cannot fork")
    processes = Processes(tmp_path_factory.mktemp("processes"))
    yield processes
    processes.server.stdin.close()
    processes.server.wait(30)
