"""Requests with a grammar, as the scheduler sees them: who waits, who may be masked, what ends them."""

from __future__ import annotations

import pytest

from minivllm.exceptions import RequestError
from minivllm.messages.engine import EngineCoreRequest, FinishReason
from tests.core.requests import make_request, make_scheduler
from tests.fakes import Driver


class FakeState:
    """A grammar of exactly `length` tokens that cannot stand the tokens in `hates`."""

    def __init__(self, prior: list[int], length: int, hates: set[int], is_ready: bool) -> None:
        self.accepted, self.length, self.hates = list(prior), length, hates
        self.is_ready = is_ready
        self.is_constraining = True
        self.error: str | None = None
        self.error_param: str | None = None

    @property
    def is_complete(self) -> bool:
        return len(self.accepted) >= self.length

    def accept(self, token_id: int) -> None:
        self.accepted.append(token_id)
        if token_id in self.hates:
            self.error = f"token {token_id} does not fit"


class FakeGrammars:
    def __init__(self, *, is_ready: bool = True) -> None:
        self.is_ready = is_ready
        self.states: dict[str, FakeState] = {}

    def start(self, request: EngineCoreRequest) -> FakeState:
        length, _, hates = request.grammar.partition(" without ")
        state = FakeState(request.prior_output_token_ids, int(length), set(map(int, hates.split())), self.is_ready)
        self.states[request.request_id] = state
        return state

    def bitmask(self, states: list[FakeState]) -> bytes:
        return b"".join(bytes([len(state.accepted), 0, 0, 0]) for state in states)


def constrained(request_id: str, grammar: str, **params) -> EngineCoreRequest:
    request = make_request(request_id, **params)
    request.grammar = grammar
    return request


def test_a_request_ends_when_its_grammar_is_complete():
    driver = Driver(make_scheduler(grammars=FakeGrammars()))
    driver.add(constrained("a", "5", max_tokens=20))
    driver.add(make_request("b", max_tokens=9))
    answers = driver.run()
    assert (len(answers["a"].token_ids), answers["a"].finish_reason) == (5, FinishReason.STOP)
    assert (len(answers["b"].token_ids), answers["b"].finish_reason) == (9, FinishReason.LENGTH)


def test_a_request_whose_grammar_compiles_waits_and_holds_up_nobody():
    grammars = FakeGrammars(is_ready=False)
    driver = Driver(make_scheduler(grammars=grammars))
    for i in range(40):
        driver.add(constrained(f"slow {i}", "3"))
    driver.add(make_request("quick", max_tokens=2))
    for _ in range(3):
        driver.step()
    assert driver.answers["quick"].num_ends == 1
    assert driver.scheduler.make_stats().num_waiting_reqs == 40
    for state in grammars.states.values():
        state.is_ready = True
    answers = driver.run()
    assert all(len(answers[f"slow {i}"].token_ids) == 3 for i in range(40))


def test_one_that_does_not_compile_ends_with_the_reason():
    grammars = FakeGrammars(is_ready=False)
    driver = Driver(make_scheduler(grammars=grammars))
    driver.add(constrained("a", "3"))
    driver.step()
    state = grammars.states["a"]
    state.error, state.error_param, state.is_ready = "it is too large", "response_format", True
    answer = driver.run()["a"]
    assert (answer.finish_reason, answer.error, answer.token_ids) == (FinishReason.ERROR, "it is too large", [])
    assert answer.error_param == "response_format"


def test_one_can_be_aborted_while_it_compiles():
    driver = Driver(make_scheduler(grammars=FakeGrammars(is_ready=False)))
    driver.add(constrained("a", "3"))
    driver.step()
    driver.abort("a")
    assert driver.run()["a"].finish_reason is FinishReason.ABORT


def test_a_token_that_does_not_fit_ends_its_request_alone():
    driver = Driver(make_scheduler(grammars=FakeGrammars()))
    every_token = " ".join(map(str, range(64)))
    driver.add(constrained("a", f"9 without {every_token}"))
    driver.add(constrained("b", "4"))
    answers = driver.run()
    assert answers["a"].finish_reason is FinishReason.ERROR and "does not fit" in answers["a"].error
    assert (len(answers["b"].token_ids), answers["b"].finish_reason) == (4, FinishReason.STOP)


def test_a_resend_goes_on_in_its_grammar_and_ends_at_once_if_it_was_complete():
    grammars = FakeGrammars()
    driver = Driver(make_scheduler(grammars=grammars))
    driver.add(constrained("half", "5", prior=(1, 2)))
    driver.add(constrained("whole", "2", prior=(1, 2)))
    answers = driver.run()
    assert len(answers["half"].token_ids) == 3
    assert (answers["whole"].token_ids, answers["whole"].finish_reason) == ([], FinishReason.STOP)


def test_masks_are_made_for_those_that_sample_and_for_no_others():
    grammars = FakeGrammars()
    scheduler = make_scheduler(grammars=grammars, max_num_batched_tokens=16, prompt_share=1.0)
    scheduler.add_request(constrained("short", "9", prompt=4))
    scheduler.add_request(constrained("free for now", "9", prompt=3))
    scheduler.add_request(constrained("long", "9", prompt=30))
    scheduler.add_request(make_request("plain", prompt=1))
    grammars.states["free for now"].is_constraining = False
    mask = scheduler.grammar_bitmask(scheduler.schedule())
    assert (mask.request_ids, mask.bitmask) == (["short"], b"\0\0\0\0")


def test_without_such_requests_there_is_no_mask():
    scheduler = make_scheduler(grammars=FakeGrammars())
    scheduler.add_request(make_request("a"))
    assert scheduler.grammar_bitmask(scheduler.schedule()) is None


def test_preemption_leaves_the_grammar_where_it_stands():
    grammars = FakeGrammars()
    driver = Driver(make_scheduler(grammars=grammars, num_blocks=16))
    for name in "abc":
        driver.add(constrained(name, "25", prompt=20, max_tokens=40))
    answers = driver.run()
    assert any(plan.preempted_req_ids for plan in driver.plans)
    assert [len(answers[name].token_ids) for name in "abc"] == [25, 25, 25]
    assert [grammars.states[name].accepted for name in "abc"] == [answers[name].token_ids for name in "abc"]


def test_an_engine_without_a_tokenizer_refuses_them():
    with pytest.raises(RequestError, match="no grammars"):
        make_scheduler().add_request(constrained("a", "3"))
