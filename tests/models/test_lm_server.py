"""The server backend against the dummy server, over real sockets on loopback."""

from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from models.lm.dialects import GarbledReplyError, read_reply, share_out, write_body
from models.lm.dummy_server import DummyOptions, DummyServer
from models.lm.server import DIALECTS, GONE_AFTER, ServerLanguageModel
from models.prompts import load_prompt
from models.protocols import GenerationRequest, LanguageModel, Message, Sampling
from schemas.errors import FatalStepError, ModelError
from schemas.fingerprint import derive_seed

PROMPT = load_prompt("detox-rewrite-v1")
SAMPLING = Sampling(temperatures=(0.6, 1.2), per_temperature=2, max_new_tokens=48)
ONE = Sampling(temperatures=(1.0,), per_temperature=1, max_new_tokens=48)
PATIENT = {"wait_initial": 0.01, "wait_max": 0.05}


def request(number=0, text="What a stupid rule, Ben."):
    messages, prefill, stop = PROMPT.render(text=f"{text} It is number {number}.")
    return GenerationRequest(messages, number, prefill, stop)


def requests(count):
    return [request(number) for number in range(count)]


def connect(server, **options):
    return ServerLanguageModel(server.url, server.options.model, **{**PATIENT, **options})


def generate(options, count=1, sampling=ONE, **client):
    with DummyServer(options) as server:
        lm = connect(server, **client)
        out = lm.generate(requests(count), sampling)
        lm.close()
        return out, server.stats


class TestGenerate:
    def test_candidates_of_every_temperature(self):
        with DummyServer() as server:
            lm = connect(server)
            assert isinstance(lm, LanguageModel)
            (generation,) = lm.generate([request()], SAMPLING)
            bodies = server.bodies
        assert [(c.temperature, c.index) for c in generation.candidates] == [
            (0.6, 0),
            (0.6, 1),
            (1.2, 0),
            (1.2, 1),
        ]
        answers = [PROMPT.parse(candidate) for candidate in generation.candidates]
        assert all("stupid" not in answer and answer.endswith("It is number 0.") for answer in answers)
        assert all(c.finish == "stop" and c.tokens > 0 and c.logprob is None for c in generation.candidates)
        assert generation.prompt_tokens > 0 and generation.error is None
        assert sorted(body["temperature"] for body in bodies) == [0.6, 1.2] and {b["n"] for b in bodies} == {
            2
        }
        assert {body["seed"] for body in bodies} == {
            derive_seed(0, t, 0) & 0x7FFFFFFF for t in ("0.6", "1.2")
        }

    def test_the_same_request_gives_the_same_candidates(self):
        first, second = generate(None, 5, SAMPLING)[0], generate(None, 5, SAMPLING, concurrency=1)[0]
        assert first == second

    def test_order_and_callback(self):
        calls = []
        with DummyServer() as server:
            lm = connect(server)
            here = threading.get_ident()
            out = lm.generate(requests(20), ONE, lambda i, g: calls.append((i, g, threading.get_ident())))
        assert sorted(i for i, _, _ in calls) == list(range(20))
        assert all(out[i] == g and thread == here for i, g, thread in calls)
        assert all(f"number {i}." in g.candidates[0].text for i, g in enumerate(out))

    def test_no_requests(self):
        assert generate(None, 0)[0] == []

    def test_concurrency_is_bounded_over_threads(self):
        with DummyServer(DummyOptions(latency=0.02)) as server:
            lm = connect(server, concurrency=3)
            with ThreadPoolExecutor(4) as pool:
                results = list(pool.map(lambda _: lm.generate(requests(6), ONE), range(4)))
            assert 1 < server.stats.most_at_once <= 3
            assert all(r == results[0] for r in results)

    def test_inside_a_running_event_loop(self):
        async def notebook(lm):
            return lm.generate([request()], ONE)

        with DummyServer() as server:
            assert asyncio.run(notebook(connect(server)))[0].error is None

    def test_a_server_that_answers_once_whatever_n_says(self):
        (generation,), stats = generate(DummyOptions(largest_n=1), 1, Sampling((1.0,), 3, max_new_tokens=48))
        assert [c.index for c in generation.candidates] == [0, 1, 2] and stats.requests == 3
        assert len({c.seed for c in generation.candidates}) == 3

    def test_a_callback_that_raises_stops_the_rest(self):
        def fail(index, generation):
            raise KeyError("disk full")

        with DummyServer(DummyOptions(latency=0.02)) as server:
            lm = connect(server, concurrency=2)
            with pytest.raises(KeyError):
                lm.generate(requests(60), ONE, fail)
            time.sleep(0.2)
            assert server.stats.requests < 30
            assert lm.generate([request()], ONE)[0].error is None  # and can be used again

    def test_closed_and_used_again(self):
        with DummyServer() as server:
            lm = connect(server)
            first = lm.generate([request()], ONE)
            lm.close()
            assert lm.generate([request()], ONE) == first

    def test_an_answer_cut_by_length_is_not_closed(self):
        (generation,), _ = generate(None, 1, Sampling((1.0,), 1, max_new_tokens=2))
        (candidate,) = generation.candidates
        assert (candidate.finish, candidate.tokens) == ("length", 2) and PROMPT.parse(candidate) is None

    def test_scoring_is_refused(self):
        with DummyServer() as server, pytest.raises(ModelError, match="cannot score tokens"):
            connect(server).score_tokens(["x"])


class TestFailures:
    @pytest.mark.parametrize("kind", ["429", "500", "503", "close", "truncated", "garbled", "empty", "hang"])
    def test_one_failure_is_asked_again_and_paid_once(self, kind):
        options = DummyOptions(faults={0: kind}, hang=1.0, retry_after=0.05)
        (generation,), stats = generate(options, timeout=0.3)
        assert generation.error is None and len(generation.candidates) == 1
        assert (stats.requests, stats.answered, stats.repeated) == (2, 1, 0) and stats.faults == {kind: 1}

    @pytest.mark.parametrize("kind", ["429", "500", "close", "truncated", "garbled", "empty", "hang"])
    def test_what_fails_for_good_is_that_requests_error(self, kind):
        faults = dict.fromkeys(range(3), kind)
        with DummyServer(DummyOptions(faults=faults, hang=1.0, retry_after=0.01)) as server:
            lm = connect(server, attempts=3, concurrency=1, timeout=0.2)
            bad, good = (lm.generate([r], ONE)[0] for r in requests(2))
            assert bad.candidates == () and bad.error and "\n" not in bad.error and len(bad.error) < 300
            assert good.error is None
            assert server.stats.requests == 4

    def test_others_are_not_touched_by_one_that_fails(self):
        with DummyServer() as server:
            lm = connect(server)
            long = request(0, "word " * 5000)
            out = lm.generate([request(1), long, request(2)], ONE)
            assert [g.error is None for g in out] == [True, False, True]
            assert "HTTP 400" in out[1].error and "context" in out[1].error
            assert server.stats.refused == 1  # and not asked again

    def test_a_refused_text_fails_at_every_temperature_whenever_it_comes(self):
        with DummyServer(DummyOptions(refused="number 1")) as server:
            out = connect(server).generate(requests(3), SAMPLING)
            assert [g.error is None for g in out] == [True, False, True]
            server.options = DummyOptions()
            assert connect(server).generate([request(1)], SAMPLING)[0].error is None
            assert server.stats.repeated == 0

    def test_retry_after_is_honoured(self):
        started = time.monotonic()
        (generation,), _ = generate(DummyOptions(faults={0: "429"}, retry_after=0.6))
        assert generation.error is None and 0.6 <= time.monotonic() - started < 3

    def test_a_flaky_server_loses_and_repeats_nothing(self):
        options = DummyOptions(
            fail_rate=0.3, fail_kinds=("429", "500", "close", "truncated", "garbled", "empty")
        )
        out, stats = generate(options, 60, SAMPLING, attempts=12)
        assert all(g.error is None for g in out) and out == generate(None, 60, SAMPLING)[0]
        assert (stats.answered, stats.repeated) == (120, 0) and sum(stats.faults.values()) > 20

    def test_a_server_that_has_gone_stops_the_run(self):
        with DummyServer() as server:
            lm = connect(server, attempts=1)
        with pytest.raises(FatalStepError, match="no longer answers"):
            lm.generate(requests(GONE_AFTER + 5), ONE)

    def test_a_few_unanswered_requests_do_not(self):
        with DummyServer() as server:
            lm = connect(server, attempts=1)
        out = lm.generate(requests(3), ONE)
        assert all("connection failed" in g.error for g in out)

    def test_failures_of_the_server_itself_do_not(self):
        out, _ = generate(DummyOptions(fail_rate=1.0, fail_kinds=("500",)), GONE_AFTER + 5, attempts=1)
        assert all("HTTP 500" in g.error for g in out)


class TestReach:
    def assert_refused(self, says, url, model="dummy", **options):
        for ask in (ServerLanguageModel.describe, ServerLanguageModel):
            with pytest.raises(ModelError, match=says) as caught:
                ask(url, model, **options)
            assert "\n" not in str(caught.value)

    def test_info(self):
        with DummyServer() as server:
            info = ServerLanguageModel.describe(server.url, "dummy", timeout=3)
            lm = connect(server)
        assert info == lm.info and lm.context_limit == 4096
        assert info.name == f"openai:{server.url}#dummy" and info.tag.endswith("@dummy")
        assert info.extra["decoding"] == "vllm/continue"

    def test_no_server(self):
        with DummyServer() as server:
            url = server.url
        self.assert_refused("No server answers", url)
        self.assert_refused("No server answers", "http://nowhere.invalid/v1")

    def test_another_model(self):
        with DummyServer(DummyOptions(model="big")) as server:
            self.assert_refused("it serves big", server.url)

    def test_no_v1(self):
        with DummyServer() as server:
            self.assert_refused("end in /v1", server.url.removesuffix("/v1"))

    def test_the_key(self, monkeypatch):
        for name in ("TAMIS_API_KEY", "OPENAI_API_KEY"):
            monkeypatch.delenv(name, raising=False)
        with DummyServer(DummyOptions(api_key="sesame")) as server:
            self.assert_refused("set TAMIS_API_KEY", server.url)
            monkeypatch.setenv("OPENAI_API_KEY", "wrong")
            self.assert_refused("refuses the key", server.url)
            monkeypatch.setenv("TAMIS_API_KEY", "sesame")
            assert connect(server).generate([request()], ONE)[0].error is None
            assert "sesame" not in repr(ServerLanguageModel.describe(server.url, "dummy"))

    def test_something_else_answers(self):
        with DummyServer() as server:
            other = server.url.removesuffix("/v1") + "/stats?x="
            self.assert_refused("not as an OpenAI-compatible|lists no models", other)

    def test_options_that_mean_nothing(self):
        with DummyServer() as server:
            self.assert_refused("dialect", server.url, dialect="klingon")
            self.assert_refused("prefill", server.url, prefill="maybe")

    def test_secrets_in_the_address_are_not_recorded(self):
        with DummyServer() as server:
            url = server.url.replace("http://", "http://me:secret@")
            assert "secret" not in repr(ServerLanguageModel.describe(url, "dummy"))


class TestDialects:
    @pytest.mark.parametrize("owner", ["vllm", "sglang", "llamacpp", "openai", "somebody"])
    def test_answers_parse_whatever_the_server_is(self, owner):
        (generation,), stats = generate(DummyOptions(owned_by=owner), 1, SAMPLING)
        answers = [PROMPT.parse(candidate) for candidate in generation.candidates]
        assert all(answer and "stupid" not in answer and answer.endswith("number 0.") for answer in answers)
        assert stats.refused == 0

    def body(self, dialect, prefilled=True, **changes):
        sampling = Sampling((1.0,), 1, top_p=0.9, top_k=20, repetition_penalty=1.1, max_new_tokens=9)
        return write_body("m", request(**changes), sampling, 1.0, 1, 2**40 + 5, DIALECTS[dialect], prefilled)

    def test_what_each_is_told(self):
        vllm, llama, openai = self.body("vllm"), self.body("llama.cpp"), self.body("openai", prefilled=False)
        assert vllm["continue_final_message"] is True and vllm["add_generation_prompt"] is False
        assert vllm["messages"][-1] == llama["messages"][-1] == {"role": "assistant", "content": "<answer>"}
        assert (vllm["top_k"], vllm["repetition_penalty"], llama["repeat_penalty"]) == (20, 1.1, 1.1)
        assert set(openai) == {"model", "messages", "temperature", "max_completion_tokens", "seed", "top_p"}
        assert openai["messages"][-1]["role"] == "user"
        assert vllm["seed"] == 5 and vllm["stop"] == ["</answer>"]

    def test_half_an_emoji_is_no_reason_to_fail(self):
        assert "\ufffd" in self.body("vllm", text="\ud83d")["messages"][-2]["content"]

    def reply(self, text, finish="stop", **more):
        return {"choices": [{"message": {"content": text}, "finish_reason": finish, **more}]}

    @pytest.mark.parametrize(
        ("text", "finish", "more", "prefilled", "expected"),
        [
            ("fine", "stop", {"stop_reason": "</answer>"}, True, ("fine", "stop")),
            ("fine", "stop", {"stop_reason": None}, True, ("fine", "eos")),
            ("fine", "stop", {"matched_stop": 2}, True, ("fine", "eos")),
            ("fine", "stop", {}, True, ("fine", "stop")),
            ("fine", "length", {}, True, ("fine", "length")),
            ("fine", "content_filter", {}, True, ("fine", "eos")),
            ("fine</answer> Bye", "length", {}, True, ("fine", "stop")),
            ("<answer>fine", "stop", {}, True, ("fine", "stop")),
            ("a <answer> b", "stop", {}, True, ("a <answer> b", "stop")),
            ("Sure: <answer>fine</answer>", "stop", {}, False, ("fine", "stop")),
            ("I cannot do that.", "stop", {}, False, ("I cannot do that.", "eos")),
            ("<answer>fi", "length", {}, False, ("fi", "length")),
        ],
    )
    def test_replies(self, text, finish, more, prefilled, expected):
        (choice,), _ = read_reply(self.reply(text, finish, **more), request(), prefilled)
        assert (choice.text, choice.finish) == expected

    @pytest.mark.parametrize(
        "reply",
        [None, [], {}, {"choices": None}, {"choices": []}, {"choices": [{}]}, {"choices": [{"message": {"content": None}}]},
         {"choices": [{"message": {"content": 5}}]}, {"choices": [{"message": {"content": "x"}}], "usage": {"prompt_tokens": "x"}}],
    )  # fmt: skip
    def test_what_is_no_completion(self, reply):
        with pytest.raises(GarbledReplyError):
            read_reply(reply, request(), True)

    def test_tokens_are_shared_out_whole(self):
        assert share_out(8, [1, 1, 2]) == [2, 2, 4] and sum(share_out(10, [1, 1, 2])) == 10
        assert sum(share_out(7, [0, 0, 0])) == 7 and share_out(0, [3, 4]) == [0, 0]


class TestCountTokens:
    def test_is_from_above(self):
        transformers = pytest.importorskip("transformers")
        from models import store

        if not store.available("smollm2"):
            pytest.skip("smollm2 is not pulled")
        tokenizer = transformers.AutoTokenizer.from_pretrained(store.path("smollm2"))
        with DummyServer() as server:
            lm = connect(server)
        texts = [
            "The meeting on 14 May 2021 cost 3,450.50 euros, said Ms Oyelaran-Whitcombe.",
            "Ein Gespräch über Geschwindigkeitsbegrenzungen. Да, конечно! 你好,世界。 👍🏽",
            "def f(x):\n    return {k: v**2 for k, v in x.items()}\n\n\n\n# done\t\tnow",
            "https://example.org/a/b?c=d&e=f#g  antidisestablishmentarianism xqzjkvwq",
            "",
        ]
        for text in texts:
            assert lm.count_tokens(text) >= len(tokenizer.encode(text))
        assert lm.count_tokens(texts[0]) < 4 * len(tokenizer.encode(texts[0]))


class TestDummyServer:
    def post(self, server, **body):
        base = {"model": "dummy", "messages": [{"role": "user", "content": "What a stupid rule."}]}
        return httpx.post(server.url + "/chat/completions", json={**base, **body}, trust_env=False)

    def test_modes(self):
        contents = {}
        for mode in ("soften", "echo", "garbage"):
            with DummyServer(DummyOptions(mode=mode)) as server:
                contents[mode] = self.post(server).json()["choices"][0]["message"]["content"]
        assert contents["echo"] == "What a stupid rule."
        assert "stupid" not in contents["soften"] and contents["soften"].startswith("What a ")
        assert "rule" not in contents["garbage"] and len(contents["garbage"].split()) >= 3

    def test_is_deterministic_and_varies_with_the_seed(self):
        def answers(seed):
            with DummyServer() as server:
                reply = self.post(server, n=6, seed=seed).json()
                return [choice["message"]["content"] for choice in reply["choices"]]

        assert answers(1) == answers(1) != answers(2)
        assert len(set(answers(1))) > 1

    def test_stop_and_length_and_usage(self):
        with DummyServer(DummyOptions(mode="echo")) as server:
            stopped = self.post(server, stop=" stupid").json()
            cut = self.post(server, max_tokens=2).json()
        assert stopped["choices"][0]["message"]["content"] == "What a"
        assert stopped["choices"][0]["stop_reason"] == " stupid"
        assert (cut["choices"][0]["message"]["content"], cut["choices"][0]["finish_reason"]) == (
            "What a",
            "length",
        )
        assert cut["usage"] == {"prompt_tokens": 4, "completion_tokens": 2, "total_tokens": 6}

    def test_counts_and_shows_what_is_paid_twice(self):
        with DummyServer(DummyOptions(faults={1: "500"})) as server:
            statuses = [self.post(server, seed=seed).status_code for seed in (1, 1, 1, 2)]
            shown = httpx.get(server.url.removesuffix("/v1") + "/stats", trust_env=False).json()
            stats = server.stats
        assert statuses == [200, 500, 200, 200]
        assert (stats.requests, stats.answered, stats.repeated, stats.candidates) == (4, 3, 1, 3)
        assert shown["repeated"] == 1 and shown["faults"] == {"500": 1}

    def test_failures_are_the_same_every_time(self):
        def statuses():
            with DummyServer(DummyOptions(fail_rate=0.5, fail_kinds=("500", "503"), seed=3)) as server:
                return [self.post(server).status_code for _ in range(20)]

        first = statuses()
        assert first == statuses() and 3 < sum(status != 200 for status in first) < 17

    def test_bad_requests_are_refused(self):
        with DummyServer() as server:
            assert self.post(server, model="other").status_code == 404
            assert self.post(server, messages=[]).status_code == 400
            assert self.post(server, messages=[{"role": "user"}]).status_code == 400
            assert self.post(server, stream=True).status_code == 400
            assert self.post(server, max_tokens=10**6).status_code == 400
            raw = httpx.post(server.url + "/chat/completions", content=b"{", trust_env=False)
            assert raw.status_code == 400
            assert server.stats.answered == 0

    def test_options_are_checked(self):
        for wrong in ({"mode": "rude"}, {"fail_kinds": ("418",)}, {"faults": {0: "418"}}, {"fail_rate": 2.0}):
            with pytest.raises(ModelError):
                DummyServer(DummyOptions(**wrong))
        with DummyServer() as server, pytest.raises(ModelError, match="choose another port"):
            DummyServer(port=int(server.url.rsplit(":", 1)[1].removesuffix("/v1")))


def test_the_verb_serves_until_it_is_interrupted(tmp_path):
    import os
    import re
    import signal
    import subprocess
    import sys

    code = "from pipelines.serve_dummy import run; run(port=0, mode='echo', notify=lambda line: print(line, flush=True))"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline()
        url = re.search(r"http://127\.0\.0\.1:\d+/v1", line).group()
        assert f"openai:{url}#dummy" in line
        lm = ServerLanguageModel(url, "dummy")
        generation = lm.generate([GenerationRequest((Message("user", "Be nice."),), 1)], ONE)[0]
        assert generation.candidates[0].text == "Be nice."
        os.kill(process.pid, signal.SIGINT)
        assert "1 requests: 1 answered" in process.communicate(timeout=20)[0]
        assert process.returncode == 0
    finally:
        process.kill()
