"""From the core's outputs to users' outputs, in every output kind."""

from __future__ import annotations

import asyncio

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minivllm.engine.output_processor import OutputProcessor, RequestOutputCollector
from minivllm.engine.parallel_sampling import ParentRequest
from minivllm.exceptions import EngineDeadError, EngineGenerateError, RequestError
from minivllm.messages.engine import EngineCoreOutput, EngineCoreRequest, FinishReason, LogprobsLists
from minivllm.messages.stats import IterationStats
from minivllm.sampling_params import RequestOutputKind, SamplingParams
from tests.engine.tokenizers import byte_level, sentencepiece, word_pieces

CUMULATIVE, DELTA, FINAL_ONLY = RequestOutputKind


class Front:
    """An OutputProcessor and requests in it, without collectors: outputs come back from `feed`."""

    def __init__(self, *, stream_interval: int = 1) -> None:
        self.tokenizer = byte_level()
        self.processor = OutputProcessor(self.tokenizer, stream_interval=stream_interval)
        self.stats = IterationStats(
            time_to_first_tokens_s=[], inter_token_latencies_s=[], finished_requests=[]
        )
        self.to_abort: list[str] = []

    def add(self, request_id: str = "a", collector=None, **params) -> list[str]:
        request = EngineCoreRequest(
            request_id, self.tokenizer.encode("the"), SamplingParams(**params), seed=0
        )
        if request.sampling_params.n == 1:
            self.processor.add_request(request, external_id=request_id, prompt="the", collector=collector)
            return [request_id]
        parent = ParentRequest(request)
        for i, child in enumerate(parent.child_requests()):
            self.processor.add_request(
                child, external_id=request_id, prompt="the", parent=parent, index=i, collector=collector
            )
        return parent.child_ids

    def feed(self, text: str = "", request_id: str = "a", *, now: float = 1.0, **output):
        made = EngineCoreOutput(request_id, self.tokenizer.encode(text), **output)
        done = self.processor.process_outputs([made], now, self.stats)
        self.to_abort += done.requests_to_abort
        return done.request_outputs


def texts(outputs) -> list[str]:
    return [output.outputs[0].text for output in outputs]


def test_each_kind_shows_what_it_should():
    shown = {}
    for kind in RequestOutputKind:
        front = Front()
        front.add(output_kind=kind)
        outputs = front.feed("ab") + front.feed("cd") + front.feed("ef", finish_reason=FinishReason.LENGTH)
        shown[kind] = texts(outputs)
        assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
        assert outputs[-1].outputs[0].finish_reason == "length"
    assert shown == {CUMULATIVE: ["ab", "abcd", "abcdef"], DELTA: ["ab", "cd", "ef"], FINAL_ONLY: ["abcdef"]}


def test_a_stop_string_ends_the_request_here_and_in_the_core():
    front = Front()
    front.add(stop=["END"], output_kind=DELTA)
    outputs = front.feed("one E") + front.feed("ND two")
    assert "".join(texts(outputs)) == "one "
    answer = outputs[-1].outputs[0]
    assert (answer.finish_reason, answer.stop_reason) == ("stop", "END")
    assert front.to_abort == ["a"]
    assert front.feed("late") == []


def test_a_request_the_core_has_ended_is_not_aborted_again():
    front = Front()
    front.add(stop=["END"])
    [output] = front.feed("END", finish_reason=FinishReason.LENGTH)
    assert output.outputs[0].finish_reason == "stop"
    assert front.to_abort == []


def test_a_stop_token_is_reported_by_its_id():
    front = Front()
    front.add()
    [output] = front.feed("x", finish_reason=FinishReason.STOP, stop_reason=7)
    answer = output.outputs[0]
    assert (answer.text, answer.finish_reason, answer.stop_reason, len(answer.token_ids)) == (
        "",
        "stop",
        7,
        1,
    )


@pytest.mark.parametrize("where", ["engine", "request"])
def test_a_stream_interval_sends_the_first_every_nth_and_the_last(where):
    front = Front(stream_interval=3 if where == "engine" else 1)
    front.add(output_kind=DELTA, stream_interval=3 if where == "request" else None, max_tokens=8)
    outputs = [o for c in "abcdefg" for o in front.feed(c)] + front.feed(
        "h", finish_reason=FinishReason.LENGTH
    )
    assert texts(outputs) == ["a", "bcd", "efg", "h"]
    assert sum((o.outputs[0].token_ids for o in outputs), []) == front.tokenizer.encode("abcdefgh")


def test_logprobs_name_the_token_first_and_sum_up():
    front = Front()
    front.add(logprobs=2, prompt_logprobs=0, output_kind=DELTA)
    a, b = front.tokenizer.encode("a") + front.tokenizer.encode("b")
    front.feed(new_prompt_logprobs=LogprobsLists([[5]], [[-3.0]], [9]))
    rows = LogprobsLists([[b, a, b]], [[-1.5, -0.5, -1.5]], [2])
    [output] = front.feed("b", new_logprobs=rows)
    [row] = output.outputs[0].logprobs
    assert [(id, p.logprob, p.rank, p.decoded_token) for id, p in row.items()] == [
        (b, -1.5, 2, "b"),
        (a, -0.5, 1, "a"),
    ]
    assert output.prompt_logprobs[0] is None and output.prompt_logprobs[1][5].rank == 9
    [output] = front.feed("b", new_logprobs=rows, finish_reason=FinishReason.LENGTH)
    assert (output.outputs[0].cumulative_logprob, len(output.outputs[0].logprobs)) == (-3.0, 1)
    assert output.prompt_logprobs is None


@pytest.mark.parametrize("kind", list(RequestOutputKind))
def test_n_answers_make_one_output_that_finishes_once(kind):
    front = Front()
    ids = front.add(n=2, output_kind=kind)
    outputs = [o for id in ids for o in front.feed("x", id)]
    outputs += front.feed("y", ids[1], finish_reason=FinishReason.LENGTH)
    outputs += front.feed("z", ids[0], finish_reason=FinishReason.LENGTH)
    assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
    assert {output.request_id for output in outputs} == {"a"}
    if kind is DELTA:
        assert [(o.outputs[0].index, o.outputs[0].text) for o in outputs] == [
            (0, "x"),
            (1, "x"),
            (1, "y"),
            (0, "z"),
        ]
    else:
        assert [(a.index, a.text) for a in outputs[-1].outputs] == [(0, "xz"), (1, "xy")]


def test_a_slow_consumer_gets_deltas_merged():
    async def consume():
        front, collector = Front(), RequestOutputCollector(DELTA)
        front.add(output_kind=DELTA, collector=collector)
        for text in ("ab", "cd"):
            front.feed(text)
        front.feed("ef", finish_reason=FinishReason.LENGTH)
        output = await collector.get()
        assert (output.outputs[0].text, output.finished) == ("abcdef", True)
        assert output.outputs[0].token_ids == sum(map(front.tokenizer.encode, ("ab", "cd", "ef")), [])

    asyncio.run(consume())


def test_an_abort_is_the_last_output():
    async def consume():
        front, collector = Front(), RequestOutputCollector(DELTA)
        front.add(output_kind=DELTA, collector=collector)
        front.feed("ab")
        assert front.processor.abort_requests(["a", "unknown"]) == ["a"]
        output = await collector.get()
        assert (output.outputs[0].text, output.outputs[0].finish_reason, output.finished) == (
            "ab",
            "abort",
            True,
        )
        assert front.processor.abort_requests(["a"]) == []
        front.feed("x")
        assert [request.finish_reason for request in front.stats.finished_requests] == ["abort"]

    asyncio.run(consume())


def test_an_abort_by_the_users_id_ends_all_n_answers():
    front = Front()
    ids = front.add(n=3)
    assert front.processor.abort_requests(["a"]) == ids
    assert not front.processor.has_unfinished_requests()


def test_the_error_of_one_of_n_answers_reaches_the_last_output():
    front = Front()
    first, second = front.add(n=2, output_kind=FINAL_ONLY)
    assert front.feed("", first, finish_reason=FinishReason.ERROR, error="non-finite logits") == []
    [output] = front.feed("ab", second, finish_reason=FinishReason.LENGTH)
    assert (output.error, output.outputs[0].finish_reason) == ("non-finite logits", "error")


def test_what_only_running_a_request_shows_of_its_own_fault_is_a_request_error():
    async def consume():
        front, collector = Front(), RequestOutputCollector(CUMULATIVE)
        front.add("a", collector)
        front.feed("", "a", finish_reason=FinishReason.ERROR, error="torn", error_param="min_tokens")
        with pytest.raises(RequestError, match="torn") as raised:
            await collector.get()
        assert (raised.value.param, raised.value.status) == ("min_tokens", 400)

    asyncio.run(consume())


def test_a_failed_request_raises_and_a_dead_engine_fails_all():
    async def consume():
        front = Front()
        collectors = {id: RequestOutputCollector(CUMULATIVE) for id in "ab"}
        for id, collector in collectors.items():
            front.add(id, collector)
        front.feed("", "a", finish_reason=FinishReason.ERROR, error="non-finite logits")
        front.processor.fail_all(EngineDeadError("gone"))
        with pytest.raises(EngineGenerateError, match="non-finite"):
            await collectors["a"].get()
        with pytest.raises(EngineDeadError, match="gone"):
            await collectors["b"].get()

    asyncio.run(consume())


def test_times_and_tokens_are_counted():
    front = Front()
    front.add()
    front.feed("ab", now=2.0, scheduled_time=0.5, num_cached_tokens=1)
    front.feed("c", now=3.0)
    front.feed("d", now=5.0, finish_reason=FinishReason.LENGTH)
    stats, [ended] = front.stats, front.stats.finished_requests
    num_tokens = sum(len(front.tokenizer.encode(text)) for text in ("ab", "c", "d"))
    assert (stats.num_prompt_tokens, stats.num_cached_tokens) == (len(front.tokenizer.encode("the")), 1)
    assert stats.num_generation_tokens == ended.num_generation_tokens == num_tokens
    assert (stats.time_to_first_tokens_s, stats.inter_token_latencies_s) == ([2.0], [1.0, 2.0])
    assert (ended.queue_s, ended.prefill_s, ended.decode_s, ended.e2e_latency_s) == (0.5, 1.5, 3.0, 5.0)


# Resends -------------------------------------------------------------------------------------------------------


def deltas_of(tokenizer, request: EngineCoreRequest, ids: list[int]) -> list[tuple]:
    """What a fresh front end shows of a request whose core sends these tokens, one by one, up to its end."""
    processor = OutputProcessor(tokenizer)
    processor.add_request(request, external_id="a", prompt=None)
    shown = []
    for i, token in enumerate(ids or [None]):
        ends = FinishReason.LENGTH if i >= len(ids) - 1 else None
        output = EngineCoreOutput("a", [] if token is None else [token], finish_reason=ends)
        for made in processor.process_outputs([output], 1.0).request_outputs:
            answer = made.outputs[0]
            shown.append((answer.text, answer.token_ids, answer.finish_reason, answer.stop_reason))
    return shown


@pytest.mark.parametrize("kind", [byte_level, sentencepiece, word_pieces])
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_fresh_front_end_goes_on_from_any_cut(kind, data):
    tokenizer = kind()
    # Few different tokens, those of divided characters among them: stop strings and characters come to be.
    some = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), min_size=1, max_size=5))
    if kind is byte_level:
        some += tokenizer.encode("🙂é")
    prompt, ids = (data.draw(st.lists(st.sampled_from(some), min_size=1, max_size=n)) for n in (4, 16))
    text = tokenizer.decode(ids)
    stops = data.draw(st.lists(st.sampled_from(text), max_size=2) if text else st.just([]))
    if len(text) > 4:
        at = data.draw(st.integers(0, len(text) - 4))
        stops = [*stops[:1], text[at : at + 4]]
    params = SamplingParams(
        stop=stops,
        include_stop_str_in_output=data.draw(st.booleans()),
        skip_special_tokens=data.draw(st.booleans()),
        min_tokens=data.draw(st.integers(0, 6)),
        output_kind=DELTA,
    )
    request = EngineCoreRequest("a", prompt, params, seed=0)
    whole = deltas_of(tokenizer, request, ids)
    for cut in range(len(ids)):
        rest = deltas_of(
            tokenizer, msgspec.structs.replace(request, prior_output_token_ids=ids[:cut]), ids[cut:]
        )
        if cut < len(whole):
            assert rest == whole[cut:]
        else:  # a stop string stands in what had been sent: nothing is added to it
            assert [(ids, *ends) for _, ids, *ends in rest] == [([], "stop", whole[-1][3])]


def test_n_answers_go_on_each_from_its_own_place():
    front = Front()
    tokenizer = front.tokenizer
    parent = ParentRequest(EngineCoreRequest("a", [1], SamplingParams(n=2), seed=0))
    for i, (child, prior) in enumerate(zip(parent.child_requests(), ("one ", ""))):
        child = msgspec.structs.replace(child, prior_output_token_ids=tokenizer.encode(prior))
        front.processor.add_request(child, external_id="a", prompt=None, parent=parent, index=i)
    front.feed("more", "0_a", finish_reason=FinishReason.LENGTH)
    [output] = front.feed("two", "1_a", finish_reason=FinishReason.LENGTH)
    assert [answer.text for answer in output.outputs] == ["one more", "two"]
    assert output.outputs[0].token_ids == tokenizer.encode("one ") + tokenizer.encode("more")
    assert output.finished
