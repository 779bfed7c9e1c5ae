"""OpenAI-compatible servers: the client (data.Endpoint), a judge model behind one (data.py localize), sampling from one
(eval.Remote and the command). Servers of this machine play scripts; nothing else is reached."""
import functools
import json
import re
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import ROOT, tiny_checkpoint, write_json, write_rows

import data
import eval as ev
from data import DataError, Endpoint, EndpointError

CASES = ROOT.parent / "shared" / "cases"
ASKED = {"messages": [{"role": "user", "content": "?"}]}


class Server:
    """An OpenAI-like server that plays a script: (status, body) pairs, or functions of a request that return one; one
    entry a request, the last one for all that follow. A body is JSON, or bytes as they are."""

    def __init__(self, *script, headers=()):
        self.script, self.requests, lock = list(script), [], threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    outer.requests.append((self.path, dict(self.headers), body))
                    step = outer.script.pop(0) if len(outer.script) > 1 else outer.script[0]
                status, answer = step(body) if callable(step) else step
                if status == "hang up":
                    self.connection.close()
                    return
                answer = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                self.send_response(status)
                for name, value in {"Content-Length": str(len(answer)), **dict(headers)}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *_):
                pass
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def bodies(self):
        return [body for _, _, body in self.requests]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.http.shutdown()
        self.http.server_close()


def says(content, finish="stop", **more):
    return 200, {"choices": [{"message": {"role": "assistant", "content": content} | more, "finish_reason": finish}],
                 "usage": {"completion_tokens": 5}}


def echo(body):
    """A server that answers with the question's first word in a box, and the seed that it was given."""
    text = body["prompt"] if "prompt" in body else body["messages"][-1]["content"]
    answer = f"\\boxed{{{text.split()[0]}}} {body.get('seed')}"
    message = {"text": answer} if "prompt" in body else {"message": {"content": answer}}
    return 200, {"choices": [message | {"finish_reason": "stop"}], "usage": {"completion_tokens": 5}}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Pauses of milliseconds, in the commands too; no key and no proxy of whoever runs the tests."""
    for name in ("OPENAI_API_KEY", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for module in (data, ev):
        monkeypatch.setattr(module, "Endpoint", functools.partial(Endpoint, timeout=20, pause=0.001))


def client(server, **more):
    return Endpoint(server.url, "m", **{"pause": 0.001, "timeout": 20} | more)


# ------------------------------------------------------------------------------------------------------- the client

def test_busy_servers_and_broken_connections_are_tried_again(monkeypatch):
    """429, 500, a connection closed without a word, and half an answer: the fifth try succeeds, with the key in the
    header each time."""
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    with Server((429, {}), (503, b"oops"), ("hang up", b""), (200, b'{"choices": ['), says("hello")) as server:
        assert client(server, attempts=10).ask(ASKED | {"temperature": 0.5}) == ("hello", 5, "eos")
        assert server.bodies() == [ASKED | {"model": "m", "temperature": 0.5}] * 5
        assert {(path, headers["Authorization"]) for path, headers, _ in server.requests} == {
            ("/v1/chat/completions", "Bearer secret")}


@pytest.mark.parametrize("status, error, tries", [(400, DataError, 1), (403, DataError, 1),
                                                  (424, DataError, 1), (401, EndpointError, 1),
                                                  (404, EndpointError, 1), (302, EndpointError, 1),
                                                  (500, DataError, 2), (503, DataError, 4)])
def test_what_is_final_and_what_is_not(status, error, tries):
    """A refused request concerns that request; a wrong key, a wrong address and a redirect (the key would go along)
    concern all of them; some faults may pass. The server's words are shown, on one line."""
    with Server((status, {"error": {"message": "no such\nmodel"}}), headers={"Location": "http://else.invalid/"}) as server:
        with pytest.raises(error, match=f"HTTP {status}.*no such") as raised:
            client(server, attempts=4).ask(ASKED)
        assert type(raised.value) is error and len(server.requests) == tries and "\n" not in str(raised.value)
        assert "else.invalid" in str(raised.value) or status != 302


def test_no_server_at_all():
    with pytest.raises(EndpointError, match="attempt 2: .*refused; is the server up"):
        Endpoint("http://127.0.0.1:9/v1", "m", attempts=2, pause=0.001).ask(ASKED)


@pytest.mark.parametrize("address, path", [
    ("", "/v1/chat/completions"), ("/", "/v1/chat/completions"), ("/v1/", "/v1/chat/completions"),
    ("/v1/chat/completions", "/v1/chat/completions"), ("/api/v3/completions/ ", "/api/v3/chat/completions"),
    ("/openai/deployments/d/chat/completions?api-version=2024-10-21",
     "/openai/deployments/d/chat/completions?api-version=2024-10-21")])
def test_the_address_may_be_the_base_or_the_whole(address, path, monkeypatch):
    """Also a whole URL as it is copied from a manual; where it carries Azure's api-version, the key goes its way."""
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    with Server(says("hello")) as server:
        Endpoint(server.url + address, "m").ask(ASKED)
        found, headers, _ = server.requests[0]
        assert found == path and "Python" not in headers["User-Agent"]
        sent = {name.lower(): value for name, value in headers.items() if "secret" in value}
        assert sent == ({"api-key": "secret"} if "?" in path else {"authorization": "Bearer secret"})


@pytest.mark.parametrize("url", ["", "localhost:8000", "file:///etc/passwd", "http://", "http://a b", "http://h:1234567",
                                 "http://user:hunter2hunter2@host/v1"])
def test_an_address_that_is_none(url):
    """A password in an address is refused too, and not printed: addresses stand in messages and in the results."""
    with pytest.raises(DataError, match="expected an address such as http://") as raised:
        Endpoint(url, "m")
    assert "hunter2" not in str(raised.value)


def test_the_key_is_never_shown(monkeypatch, capsys):
    """A line end behind the key is none of it; another stray character is named, not quoted; a server that quotes the
    key, or the query in which it came, is not quoted with it."""
    key = "sk-abcdef0123456789"
    monkeypatch.setenv("OPENAI_API_KEY", f" {key}\r\n")
    for status in (400, 401, 503, 200):
        with Server((status, {"error": f"Incorrect API key {key} in ?sig={key[::-1]}"})) as server:
            with pytest.raises((DataError, EndpointError), match="Incorrect") as raised:
                Endpoint(f"{server.url}/v1?sig={key[::-1]}", "m", pause=0.001, attempts=2).ask(ASKED)
            assert server.requests[0][1]["Authorization"] == f"Bearer {key}"
            said = str(raised.value) + capsys.readouterr().err
            assert key not in said and key[::-1] not in said
    monkeypatch.setenv("OPENAI_API_KEY", f"{key}\n{key}")
    with pytest.raises(DataError, match="OPENAI_API_KEY: holds ") as raised:
        Endpoint("http://h", "m")
    assert key not in str(raised.value)


def test_a_proxy_is_not_asked_for_this_machine_and_else_is_named(monkeypatch):
    """http_proxy is set for the internet, in many a shell where the server is on the same machine."""
    monkeypatch.setenv("http_proxy", "http://me:hunter2@127.0.0.1:9")
    with Server(says("hello")) as server:
        assert client(server).ask(ASKED)[0] == "hello"
    with pytest.raises(EndpointError, match="through the proxy 127.0.0.1:9; no_proxy=else.invalid") as raised:
        Endpoint("http://else.invalid", "m", attempts=1).ask(ASKED)
    assert "hunter2" not in str(raised.value)


OPENAI = {"error": {"message": "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."}}
REFUSALS = {
    "max_tokens": (400, OPENAI),
    "temperature": (400, {"error": {"message": "temperature does not support 0 with this model", "param": "temperature"}}),
    "top_p": (422, {"error": "Input validation error: `top_p` must be > 0.0 and < 1.0", "error_type": "validation"}),
    "seed": (422, {"detail": [{"type": "extra_forbidden", "loc": ["body", "seed"], "msg": "Extra inputs are not allowed"}]}),
    "stop": (500, b"TypeError: create() got an unexpected keyword argument 'stop'"),
}


def test_fields_that_a_server_refuses_are_left_out_or_renamed_and_named_once(capsys):
    """Each server refuses other fields, in other words. Five refusals, then all goes through, and from then on at once."""
    def server_of_everything(body):
        return next((refusal for name, refusal in REFUSALS.items() if name in body), says("hello"))

    body = ASKED | {"max_tokens": 9, "temperature": 0, "top_p": 1, "seed": 1, "stop": ["x"]}
    with Server(server_of_everything) as server:
        endpoint = client(server)
        assert [endpoint.ask(body)[0] for _ in range(3)] == ["hello"] * 3
        assert server.bodies()[5:] == [ASKED | {"model": "m", "max_completion_tokens": 9}] * 3
    said = capsys.readouterr().err
    for name in REFUSALS:
        assert said.count(f"the server refuses {name}; ") == 1
    assert said.count("\n") == 5 and "max_tokens; it is sent as max_completion_tokens" in said


@pytest.mark.parametrize("words", ["'max_tokens' or 'max_completion_tokens' is too large: 9",
                                   "temperature, seed, stop: I do not like this row"])
def test_a_refusal_that_only_names_a_field_changes_nothing(words, capsys):
    """A row that is too long, or quotes a field's name, is refused without the field too: the next row keeps it."""
    body = ASKED | {"max_tokens": 9, "temperature": 0.5, "seed": 1, "stop": ["x"]}
    refuse = lambda body: says("hello") if body["messages"] == ASKED["messages"] else (400, {"message": words})
    with Server(refuse) as server:
        endpoint = client(server)
        with pytest.raises(DataError, match="HTTP 400"):
            endpoint.ask(body | {"messages": [{"role": "user", "content": "long"}]})
        endpoint.ask(body)
        assert server.bodies()[-1] == body | {"model": "m"} and capsys.readouterr().err == ""


@pytest.mark.parametrize("inside, error", [
    ({"error": {"message": "Rate limit exceeded", "code": 429}}, None),
    ({"error": {"message": "The engine is overloaded", "type": "x"}, "choices": None}, None),
    ({"base_resp": {"status_code": 1002, "status_msg": "rate limit"}, "choices": []}, None),
    ({"choices": [{"error": {"code": 502, "message": "upstream"}, "message": {"content": ""}}]}, None),
    ({"choices": [{"finish_reason": "error", "message": {"content": "The answ"}}]}, None),
    ({"error": {"message": "bad prompt", "code": "400"}}, DataError), ({"detail": "no"}, DataError),
    ({"choices": []}, DataError), ({"choices": [{}]}, DataError), ({"choices": {"a": 1}}, DataError),
    ({"choices": ["7"]}, DataError),
    ({"code": 401, "msg": "no such token", "success": False}, EndpointError)])
def test_an_error_inside_a_200_is_that_error(inside, error):
    """Gateways say 200 and put the error into the reply: what may pass is asked again, what is refused is no answer."""
    with Server((200, inside), says("hello")) as server:
        if error is None:
            assert client(server).ask(ASKED)[0] == "hello" and len(server.requests) == 2
        else:
            with pytest.raises(error):
                client(server).ask(ASKED)
            assert len(server.requests) == 1


@pytest.mark.parametrize("finish, more, reason", [
    ("stop", {}, "eos"), (None, {}, "eos"), ("eos_token", {}, "eos"), ("stop", {"stop_reason": "Q"}, "stop"),
    ("stop", {"stop_reason": 128009}, "eos"), ("stop", {"matched_stop": "Q"}, "stop"), ("stop_sequence", {}, "stop"),
    ("length", {}, "length"), ("max_tokens", {}, "length"), ("MAX_TOKENS", {}, "length"), ("model_length", {}, "length"),
    ("content_filter", {}, None), ("SAFETY", {}, None), ("abort", {}, None), ("tool_calls", {}, None)])
def test_why_a_text_ends(finish, more, reason):
    """One word each for an end, a stop string and the length; what ended for any other reason is no answer, and says so."""
    choice = {"message": {"content": "The answer is 7."}, "finish_reason": finish} | more
    with Server((200, {"choices": [choice]})) as server:
        if reason:
            assert client(server).ask(ASKED) == ("The answer is 7.", None, reason)
        else:
            with pytest.raises(DataError, match=f"finish_reason {finish.lower()}"):
                client(server).ask(ASKED)


@pytest.mark.parametrize("raw, found", [(b"<!doctype html><title>Log in</title>", "a web page.* came.*Log in"),
                                        (b'data: {"choices": []}\n\ndata: [DONE]\n', "a stream.* came"),
                                        (b'{"response": "It"}\n{"response": " is"}\n', "a stream.* came"),
                                        (b"Ollama is running", "plain text came.*Ollama is running"),
                                        (b"[]", "plain text came")])
def test_what_is_no_api_ends_at_once(raw, found):
    """No pause, no second try: it will be the same page."""
    with Server((200, raw)) as server:
        with pytest.raises(EndpointError, match=found):
            client(server).ask(ASKED)
        assert len(server.requests) == 1


@pytest.mark.parametrize("status, words, tries", [
    (429, {"error": {"message": "You exceeded your current quota, please check your plan and billing details.",
                     "code": "insufficient_quota"}}, 1),
    (402, {"error": {"message": "Insufficient Balance"}}, 1), (400, {"error": "Your credit balance is too low"}, 1),
    (429, {"error": {"message": "You exceeded your current quota. Please retry in 33s."}}, 4)])
def test_a_spent_quota_ends_at_once_with_the_providers_words(status, words, tries):
    """But a quota of this minute is waited for."""
    with Server((status, words)) as server:
        with pytest.raises(EndpointError if tries == 1 else DataError, match="(?i)quota|balance"):
            client(server, attempts=4).ask(ASKED)
        assert len(server.requests) == tries


@pytest.mark.parametrize("message, text", [
    ({"content": "\n\nIt is 7.", "reasoning_content": "3 + 4\n"}, "<think>\n3 + 4\n</think>\n\nIt is 7."),
    ({"content": "It is 7.", "reasoning": "3 + 4"}, "<think>\n3 + 4\n</think>\n\nIt is 7."),
    ({"content": "<think>3 + 4</think>It is 7.", "reasoning": "3 + 4"}, "<think>3 + 4</think>It is 7."),
    ({"content": [{"type": "thinking", "thinking": [{"type": "text", "text": "3 + 4"}]}, {"type": "text", "text": "It "},
                  {"type": "text", "text": "is 7."}]}, "<think>\n3 + 4\n</think>\n\nIt is 7."),
    ({"content": "It is 7.", "reasoning_content": None}, "It is 7."), ({"content": None}, ""),
    ({"content": None, "refusal": "No."}, "No.")])
def test_thoughts_are_kept_before_the_answer(message, text):
    """Wherever the server puts them; with them goes the text that a step of the attempt may stand in."""
    with Server((200, {"choices": [{"message": message, "finish_reason": "stop"}]})) as server:
        assert client(server).ask(ASKED)[0] == text


def test_a_thought_that_was_cut_off_is_not_closed():
    with Server(says("", "length", reasoning="Let me see. Is it 7")) as server:
        assert client(server).ask(ASKED) == ("<think>\nLet me see. Is it 7", 5, "length")


def test_a_server_that_only_fails_is_given_up():
    """One bad row costs itself; but when so many rows fail and none succeeds, the server is down."""
    with Server((500, {})) as server:
        endpoint, errors = client(server, attempts=2), []
        for _ in range(data.LOST_IN_A_ROW):
            with pytest.raises((DataError, EndpointError)) as raised:
                endpoint.ask(ASKED)
            errors.append(type(raised.value))
        assert errors == [DataError] * (data.LOST_IN_A_ROW - 1) + [EndpointError]


def test_in_threads_all_is_done_once_or_the_error_is_heard():
    """Many threads, no item twice; an error ends it, and what was not begun never is."""
    assert sorted(data.in_threads(lambda n: n * n, range(500), 16)) == [n * n for n in range(500)]
    begun, free = [], threading.Event()

    def work(n):
        begun.append(n)
        return free.wait(60) if n else 1 // n

    with pytest.raises(ZeroDivisionError):
        list(data.in_threads(work, range(500), 1))
    free.set()
    assert len(begun) <= 2 and list(data.in_threads(work, [], 4)) == []


def test_nobody_waits_for_requests_under_way():
    """Whoever stops listening (Ctrl-C) goes on at once: a model may think for minutes."""
    free = threading.Event()
    results = data.in_threads(lambda n: n if n else free.wait(60), [0, 1], 2)
    assert next(results) == 1
    results.close()
    assert not free.is_set()
    free.set()


# ------------------------------------------------------------------------------------------------------ a judge model

BAD = "Let's think step by step.\nStep 1: 3 + 4 = 8.\nStep 2: 8 * 2 = 16.\nThe answer is: 16"
LATE = "Let's think step by step.\nStep 1: 3 + 4 = 7.\nStep 2: 7 * 2 = 15.\nThe answer is: 15"


def attempt(completion=BAD, id="p1", **more):
    return {"id": id, "question": "Twice 3 + 4?", "answer": "14", "sample": 0, "prefix": "", "completion": completion,
            "extracted": "x", "correct": False, "tokens": 30, "stop_reason": "eos"} | more


def localize(file, server, out, *more):
    return data.main(["localize", str(file), "--judge", "endpoint", "--endpoint", server.url, "--out", str(out),
                      *(more if "--api_model" in more else ["--api_model", "m", *more])])


def rows_of(path):
    return [row for _, row in data.read_rows(path)]


@pytest.mark.parametrize("reply, verdict", [
    ("Step 1: correct\nStep 2: incorrect", 1), ("1. **Incorrect**", 0), ("Step 1: neutral\nStep 2: correct", None),
    ("**Step 1:** correct\n- Step 2 - INCORRECT, as 7*2=14", 1), ("Step 1: correct", "none"),
    ("I think it is fine.", "none"), ("Step 2: incorrect", "none"), ("", "none"),
    ("step 1: correct\nstep 3: incorrect", "none"),
    ("<think>\nStep 1: incorrect? No.\n</think>\n\nStep 1: correct\nStep 2: incorrect", 1),
    ("Step 1: incorrect? No.\n</think>\nStep 1: correct\nStep 2: correct", None),
    ("[THINK]Step 1: incorrect[/THINK]Step 1: correct\nStep 2: incorrect", 1), ("<think>\nStep 1: incorrect", "none")])
def test_reading_a_judges_reply(reply, verdict):
    """A verdict needs every step up to the first incorrect one; "neutral" is no error; what is thought is not said;
    anything else is no verdict, not a guess."""
    if verdict == "none":
        with pytest.raises(DataError, match="could not be read"):
            data.parse_verdicts(reply, 2)
    else:
        assert data.parse_verdicts(reply, 2) == verdict


def test_localize_with_a_judge_model(tmp_path, capsys):
    """The judge sees problem, right answer and numbered steps; an unreadable reply and a refused request are named, and
    no verdict: the same command asks for these two again, and only for them."""
    def judge(body):
        text = body["messages"][0]["content"]
        assert "Twice 3 + 4?" in text and "14" in text
        if "= 8" in text:
            assert "[Step 1] Let's think step by step.\nStep 1: 3 + 4 = 8." in text
            return says("Step 1: incorrect")
        if "= 99" in text:
            return 400, {"error": "too long"}
        return says("Step 1: correct\nStep 2: incorrect" if "= 15" in text else "Well...")

    rows = [attempt(BAD), attempt(LATE, id="p2"), attempt(LATE.replace("15", "77"), id="p3"),
            attempt(LATE.replace("15", "99"), id="p4")]
    file, out = write_rows(tmp_path / "a.jsonl", rows), tmp_path / "e.jsonl"
    with Server(judge) as server:
        assert localize(file, server, out) == 1
        assert [row["step"] for row in rows_of(out)] == [1, 2]
        said = capsys.readouterr().err
        assert re.search("a.jsonl:3: the judge's reply could not be read: 'Well...'", said)
        assert re.search("a.jsonl:4: .*HTTP 400", said)
        asked = len(server.requests)
        assert localize(file, server, out) == 1 and len(server.requests) == asked + 2


def test_a_judge_that_goes_away_loses_nothing(tmp_path, capsys):
    """Wrong key after two verdicts: the command ends with an error; run again, it asks only for what is missing."""
    rows = [attempt(BAD, id=f"p{i}", question=f"Twice 3 + 4? ({i})") for i in range(4)]
    file, out = write_rows(tmp_path / "a.jsonl", rows), tmp_path / "e.jsonl"
    with Server(says("Step 1: incorrect"), says("Step 1: incorrect"), (401, {})) as server:
        assert localize(file, server, out, "--concurrency", "1") == 2
        assert "HTTP 401" in capsys.readouterr().err and not out.exists()
        server.script, server.requests = [says("Step 1: incorrect")], []
        assert localize(file, server, out, "--concurrency", "1") == 0
        # (a request of the first run may still come in: only what was not judged is asked, by either)
        asked = {re.search(r"Twice 3 \+ 4\? \((\d)\)", json.dumps(body))[1] for body in server.bodies()}
        assert asked == {"2", "3"} and len(rows_of(out)) == 4


def test_verdicts_are_of_one_judge(tmp_path, capsys):
    """What one model said is not passed off as another's, nor as the same name's on another server."""
    rows = [attempt(BAD), attempt(LATE, id="p2")]
    file, out = write_rows(tmp_path / "a.jsonl", rows), tmp_path / "e.jsonl"
    with Server(says("Step 1: incorrect"), (401, {})) as server, Server(says("Step 1: incorrect")) as other:
        assert localize(file, server, out, "--concurrency", "1") == 2
        assert localize(file, server, out, "--api_model", "another") == 2 == localize(file, other, out)
        assert "--restart" in capsys.readouterr().err and len(server.requests) == 2 and not other.requests


def test_a_judge_that_thinks_is_given_the_room(tmp_path):
    """Verdicts are short; where the limit for them was used up by a thought, the judge is asked without one."""
    def judge(body):
        return says("", "length", reasoning="Step 1: incorrect?") if "max_tokens" in body else says("Step 1: incorrect")
    with Server(judge) as server:
        assert localize(write_rows(tmp_path / "a.jsonl", [attempt(BAD)]), server, tmp_path / "e.jsonl") == 0
        assert ["max_tokens" in body for body in server.bodies()] == [True, False]


# ---------------------------------------------------------------------------------------------------- sampling from one

def problem(question="1 + 1", where="f:1"):
    return ev.Problem(where, 1, question, "2", "", {})


def draw(remote, *questions, n=1, seed=0, temperature=0.0, **how):
    prompts = [remote.prepare(problem(question, f"f:{i}"), "") for i, question in enumerate(questions, 1)]
    return {(i, j): outcome for i, j, outcome in remote.draw(prompts, n, seed, temperature, **how)}


def test_samples_come_one_by_one_each_with_its_seed():
    """What is done is not asked for; the same seed asks for the same; greedy decoding needs neither seed nor top_p."""
    with Server(echo) as server:
        remote = ev.Remote(server.url, "m", concurrency=2)
        drawn = draw(remote, "1 a", "2 b", n=3, temperature=0.8, top_p=0.95, max_new_tokens=9, done={(1, 2)})
        assert drawn.keys() == {(i, j) for i in range(2) for j in range(3)} - {(1, 2)}
        assert len({outcome.text for outcome in drawn.values()}) == 5
        assert all(outcome[1:] == (5, "eos") for outcome in drawn.values())
        fields = {"temperature": 0.8, "top_p": 0.95, "max_tokens": 9}
        assert all(fields.items() <= body.items() and "stop" not in body for body in server.bodies())
        assert draw(remote, "1 a", "2 b", n=3, temperature=0.8, done={(1, 2)}) == drawn
        draw(remote, "1 a")
        assert server.bodies()[-1].keys() == {"model", "messages", "max_tokens", "temperature"}


def test_one_bad_row_costs_only_itself():
    """Refused (400, 403, 424), failing (500) or filtered: that row says why, the other rows are there."""
    bad = {"400": (400, {}), "403": (403, {}), "424": (424, {}), "500": (500, {}), "filtered": says("", "content_filter")}
    with Server(lambda body: bad.get(body["messages"][-1]["content"]) or echo(body)) as server:
        drawn = draw(ev.Remote(server.url, "m", concurrency=1), *bad, "7")
        assert drawn.pop((5, 0)).text == "\\boxed{7} None"
        for (i, _), outcome in drawn.items():
            assert isinstance(outcome, DataError) and str(outcome).startswith(f"f:{i + 1}: ")


def test_a_server_that_keeps_the_stop_string_is_cut():
    with Server(says("The answer is 7.Q And R")) as server:
        drawn = draw(ev.Remote(server.url, "m"), "a", stop=["R", "Q"])
        assert drawn[0, 0] == ev.Drawn("The answer is 7.", 5, "stop")


def test_equal_samples_at_a_temperature_are_warned_of_once(capsys):
    """A server that ignores the temperature gives one sample n times: pass@k and pairs would be worth nothing."""
    with Server(says("The answer is 7.")) as server:
        remote = ev.Remote(server.url, "m")
        draw(remote, "a", "b", "c", n=4, temperature=0.8), draw(remote, "d", n=9, temperature=0.8)
        assert capsys.readouterr().err.count("samples of a prompt are all the same") == 1
        draw(ev.Remote(server.url, "m"), "a", "b", "c", "d")
    with Server(echo) as server:
        draw(ev.Remote(server.url, "m"), "a", "b", "c", n=4, temperature=0.8)
    assert capsys.readouterr().err == ""


def test_a_prefix_goes_to_completions_as_the_tokens_that_a_local_run_reads(tmp_path):
    """The server's tokenizer puts BOS in front, as ours does: a template that writes it too must not double it."""
    tiny_checkpoint(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    template = "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant] "
    write_json(tmp_path / "tokenizer_config.json", settings | {"chat_template": template})
    tokenizer = data.Tokenizer.from_pretrained(tmp_path)
    local = lambda style: ev.Sampler(tmp_path, prompt=style, device="cpu")
    with Server(echo) as server:
        for style in ("chat", "alpaca", "raw"):
            remote = ev.Remote(server.url, "m", model=str(tmp_path), prompt=style)
            prompt = remote.prepare(problem(), "Step 1:")
            sent = tokenizer.backend.encode(prompt.content[1]["prompt"], add_special_tokens=False).ids
            assert [tokenizer.bos_id] + sent == local(style).prepare(problem(), "Step 1:").content
            list(remote.draw([prompt], 1, 0))
            assert server.requests[-1][0] == "/v1/completions"
    with pytest.raises(DataError, match="give --model"):
        ev.Remote("http://h", "m").prepare(problem(), "Step 1:")


def test_a_server_without_completions_says_what_needs_it():
    """Many hosted models have only a chat, which cannot be made to go on from a prefix."""
    with Server((404, {"detail": "Not Found"})) as server:
        remote = ev.Remote(server.url, "m", prompt="alpaca")
        with pytest.raises(EndpointError, match="Prefixes and rollouts need a server that has /completions"):
            list(remote.draw([remote.prepare(problem(), "Step 1:")], 1, 0))


def test_a_system_prompt_and_template_arguments_go_along():
    remote = ev.Remote("http://h", "m", system="Be brief.", template_args={"enable_thinking": False})
    _, body = remote.prepare(problem(), "").content
    assert body == {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 + 1"}],
                    "chat_template_kwargs": {"enable_thinking": False}}
    assert {"system": "Be brief.", "template_args": {"enable_thinking": False}}.items() <= remote.settings.items()
    with pytest.raises(DataError, match="--prompt alpaca has no place for them"):
        ev.Remote("http://h", "m", prompt="alpaca", system="Be brief.")


# ----------------------------------------------------------------------------------------------------- the whole command

def evaluate(server, file, out, *more) -> int:
    return ev.main(["--endpoint", server.url, "--api_model", "m", "--problems", str(file), "--out", str(out),
                    "--concurrency", "4", *map(str, more)])


def problems(path, *questions):
    return write_rows(path, [{"question": q, "answer": q.split()[0]} for q in questions])


SAMPLED = ("--samples", 3, "--temperature", 1.0, "--top_p", 0.9)


def test_a_flaky_server_loses_nothing(tmp_path):
    """Every sample is there once, whatever went wrong at first."""
    troubles = [(429, {}), (502, {}), ("hang up", b""), (200, b'{"choi'), (503, {}), ("hang up", b""), (500, {})]
    left, seen = iter(troubles), set()

    def flaky(body):
        trouble = None if body["seed"] in seen else next(left, None)
        seen.add(body["seed"])
        return trouble or echo(body)

    file = problems(tmp_path / "p.jsonl", *(f"{i} a" for i in range(7)))
    with Server(flaky) as server:
        assert evaluate(server, file, tmp_path / "o.jsonl", *SAMPLED, "--prompt", "qwen2-boxed") == 0
        rows = rows_of(tmp_path / "o.jsonl")
        assert [(row["id"], row["sample"]) for row in rows] == [(i, j) for i in range(1, 8) for j in range(3)]
        assert all(row["correct"] and row["tokens"] == 5 and row["stop_reason"] == "eos" for row in rows)
        assert len({row["completion"] for row in rows}) == 21 and len(server.requests) == 21 + len(troubles)
        assert server.bodies()[-1]["messages"][0]["role"] == "system"


def test_a_row_that_failed_is_asked_again_by_the_same_command(tmp_path, capsys):
    """Left out and named, with status 1: not a wrong answer, and not "already complete" the next time."""
    file, out = problems(tmp_path / "p.jsonl", "1 a", "2 poison", "3 b"), tmp_path / "o.jsonl"
    poison = lambda body: (500, {}) if "poison" in body["messages"][-1]["content"] else echo(body)
    with Server(poison) as server:
        assert evaluate(server, file, out) == 1
        assert [row["id"] for row in rows_of(out)] == [1, 3] and "p.jsonl:2: " in capsys.readouterr().err
        server.script, asked = [echo], len(server.requests)
        assert evaluate(server, file, out) == 0
        assert [row["id"] for row in rows_of(out)] == [1, 2, 3] and len(server.requests) == asked + 1


def test_a_server_that_goes_away_costs_only_what_it_had_not_answered(tmp_path, capsys):
    file, out = problems(tmp_path / "p.jsonl", *(f"{i} a" for i in range(7))), tmp_path / "o.jsonl"
    with Server(*[echo] * 8, (401, {})) as server:
        assert evaluate(server, file, out, *SAMPLED) == 2 and "401" in capsys.readouterr().err and not out.exists()
        server.script, server.requests = [echo], []
        assert evaluate(server, file, out, *SAMPLED) == 0
        assert len(rows_of(out)) == 21 and 21 - 8 <= len(server.requests) < 21


# What the commands make of the servers in ../shared/cases: status, right rows, words on the screen.
MODES = {
    "gpt5": (0, 3, "sent as max_completion_tokens"), "tgi": (0, 3, ""), "noseed": (0, 3, ""),
    "limit200": (0, 3, "Rate limit exceeded"), "lostprovider": (None, 0, "finish_reason error"),
    "poison500": (1, 2, "problems3_poison.jsonl:2: .*HTTP 500"), "reasoning": (0, 3, ""), "stopkept": (0, 3, ""),
    "chatonly": (2, 0, "need a server that has /completions"), "login": (2, 0, "a web page.* came"),
    "quota": (2, 0, "You exceeded your current quota"), "thinkjudge": (0, 1, ""), "chunkjudge": (0, 1, "")}


@pytest.mark.parametrize("mode", MODES)
def test_the_servers_that_people_met(mode, tmp_path, capfd):
    if not CASES.is_dir():
        pytest.skip(f"the fault cases are not here ({CASES})")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    player = subprocess.Popen([sys.executable, CASES / "server.py", CASES / "shown" / "servers.jsonl", mode, str(port)],
                              stdout=subprocess.DEVNULL)
    try:
        for _ in range(6000):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.01)
        server, out = type("", (), {"url": f"http://127.0.0.1:{port}/v1/chat/completions"}), tmp_path / "o.jsonl"
        expected, right, words = MODES[mode]
        if mode.endswith("judge"):
            status = localize(CASES / "attempt.jsonl", server, out)
            assert rows_of(out)[0]["step"] == 2
        else:
            file = {"poison500": "problems3_poison.jsonl", "chatonly": "error.jsonl"}.get(mode, "problems3.jsonl")
            more = {"stopkept": ["--stop", "Q"], "chatonly": ["--prompt", "alpaca"]}.get(mode, [])
            status = evaluate(server, CASES / file, out, *more)
            rows = rows_of(out) if out.exists() and out.stat().st_size else []
            assert Counter(row["correct"] for row in rows) == Counter([True] * right)
            assert mode != "reasoning" or all("Step 2: 3 + 4 = 7.\n</think>" in row["completion"] for row in rows)
        assert status == expected or expected is None and status != 0
        assert re.search(words, capfd.readouterr().err)
    finally:
        player.kill()
        player.wait()
