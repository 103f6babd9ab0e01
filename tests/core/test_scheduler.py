"""What the scheduler plans, told as scenarios on SchedulerOutput, and what it makes of results."""

from __future__ import annotations

import pytest

from minivllm.exceptions import ConfigError, RequestError
from minivllm.messages.engine import FinishReason
from minivllm.messages.stats import BLOCK_HELD
from tests.core.requests import EOS, make_request, make_scheduler
from tests.fakes import Driver, answer_alone, drive


def same_answer(request, answer, *, max_model_len: int = 64) -> bool:
    alone = answer_alone(request, max_model_len=max_model_len)
    return (alone.token_ids, alone.finish_reason, alone.stop_reason, alone.prompt_logprobs, alone.logprobs) == (
        answer.token_ids, answer.finish_reason, answer.stop_reason, answer.prompt_logprobs, answer.logprobs
    )  # fmt: skip


def a_first_token(**fields) -> int:
    """The token that this request would be given first."""
    return answer_alone(make_request(**fields), max_model_len=64).token_ids[0]


# The token budget


def test_a_long_prompt_is_chunked_to_the_token_budget():
    driver = Driver(make_scheduler(max_num_batched_tokens=16))
    driver.add(make_request(prompt=40))
    assert [driver.step().num_scheduled_tokens["a"] for _ in range(4)] == [16, 16, 8, 1]
    assert len(driver.answers["a"].token_ids) == 2  # only the last chunk and the decode sampled


def test_running_requests_come_before_waiting_ones():
    driver = Driver(make_scheduler(max_num_batched_tokens=16))
    driver.add(make_request("a", prompt=4))
    driver.step()
    driver.add(make_request("b", prompt=[1] * 30))
    assert driver.step().num_scheduled_tokens == {"a": 1, "b": 15}
    assert driver.step().num_scheduled_tokens == {"a": 1, "b": 15}


def test_a_decode_does_not_wait_for_another_requests_long_prompt():
    driver = Driver(make_scheduler(max_num_batched_tokens=16))
    driver.add(make_request("decode", prompt=4, max_tokens=20))
    driver.step()
    driver.add(make_request("long", prompt=60))
    assert all(driver.step().num_scheduled_tokens["decode"] == 1 for _ in range(6))


def test_several_prompts_share_one_step_in_order_of_arrival():
    driver = Driver(make_scheduler(max_num_batched_tokens=16))
    for name in "abc":
        driver.add(make_request(name, prompt=[ord(name)] * 7))
    plan = driver.step()
    assert list(plan.num_scheduled_tokens.items()) == [("a", 7), ("b", 7), ("c", 2)]
    assert plan.total_num_scheduled_tokens == 16


def test_without_chunked_prefill_a_prompt_waits_until_it_fits():
    driver = Driver(make_scheduler(max_num_batched_tokens=20, max_model_len=20, enable_chunked_prefill=False))
    driver.add(make_request("a", prompt=12))
    driver.add(make_request("b", prompt=[1] * 12))
    driver.add(make_request("c", prompt=[2] * 2))  # would fit, but nobody overtakes
    assert driver.step().num_scheduled_tokens == {"a": 12}
    assert driver.step().num_scheduled_tokens == {"a": 1, "b": 12, "c": 2}


def test_no_more_than_max_num_seqs_run():
    driver = Driver(make_scheduler(max_num_seqs=2))
    for name in "abc":
        driver.add(make_request(name, max_tokens=2))
    assert list(driver.step().num_scheduled_tokens) == ["a", "b"]
    assert list(driver.step().num_scheduled_tokens) == ["a", "b"]
    assert list(driver.step().num_scheduled_tokens) == ["c"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_blocks": 4}, "lower --max-model-len to 16"),
        ({"enable_chunked_prefill": False, "max_num_batched_tokens": 63}, "--max-num-batched-tokens 63"),
        ({"max_num_seqs": 65}, "--max-num-seqs 65"),
        ({"max_num_seqs": 0}, "--max-num-seqs 0"),
    ],
)
def test_limits_that_contradict_each_other_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        make_scheduler(**changes)


# What the worker is told


def test_a_request_is_described_whole_once_and_then_by_changes():
    driver = Driver(make_scheduler())
    driver.add(make_request(prompt=6, prior=(50,)))
    first, second, third = driver.step(), driver.step(), driver.step()
    (new,) = first.scheduled_new_reqs
    assert (new.prompt_token_ids, new.prior_output_token_ids, new.num_computed_tokens) == (
        [10, 11, 12, 13, 14, 15], [50], 0,
    )  # fmt: skip
    assert not second.scheduled_new_reqs
    assert second.scheduled_cached_reqs.num_computed_tokens == [7]
    assert second.scheduled_cached_reqs.new_block_ids == [[]]
    assert len(third.scheduled_cached_reqs.new_block_ids[0]) == 1  # token 9 opens a block
    assert third.scheduled_cached_reqs.resumed == [False]


def test_the_worker_hears_of_a_finished_request_in_one_empty_step():
    driver = Driver(make_scheduler())
    driver.add(make_request(max_tokens=1))
    driver.step()
    assert not driver.scheduler.has_unfinished_requests() and driver.scheduler.has_requests()
    plan = driver.step()
    assert plan.finished_req_ids == ["a"] and plan.total_num_scheduled_tokens == 0
    assert not driver.scheduler.has_requests()


def test_the_first_output_carries_when_it_was_first_scheduled():
    driver = Driver(make_scheduler(max_num_batched_tokens=16))
    driver.add(make_request(prompt=20, max_tokens=2))
    driver.step(now=5.0)
    driver.step(now=6.0)
    assert driver.answers["a"].scheduled_time == 5.0
    driver.run()  # Answer asserts that it comes once


# Preemption


def tight_driver(num_in_flight: int = 1, **changes) -> Driver:
    """Room for 8 blocks of 4."""
    scheduler = make_scheduler(**{"num_blocks": 8, "max_model_len": 32, **changes})
    return Driver(scheduler, num_in_flight=num_in_flight)


def test_the_last_arrived_is_preempted_first():
    driver = tight_driver()
    for name in "abcd":
        driver.add(make_request(name, prompt=[ord(name)] * 8, max_tokens=20))
    driver.step()
    plan = driver.step()  # a to d each hold 2 full blocks and want a third
    assert plan.preempted_req_ids == ["d", "c"]
    assert list(plan.num_scheduled_tokens) == ["a", "b"]


def test_the_preempted_return_in_order_of_arrival_and_before_newcomers():
    driver = tight_driver(enable_prefix_caching=False)
    for name in "abcd":
        driver.add(make_request(name, prompt=[ord(name)] * 8, max_tokens=4))
    driver.step()
    driver.add(make_request("e", prompt=[1] * 8, max_tokens=4))
    driver.step()
    assert [request.request_id for request in driver.scheduler.waiting] == ["c", "d", "e"]
    plans = [driver.step() for _ in range(3)]
    assert plans[-1].scheduled_cached_reqs.request_ids[:2] == ["c", "d"]
    assert plans[-1].scheduled_cached_reqs.resumed == [True, True]
    driver.run()


def test_a_step_that_preempted_admits_nobody():
    driver = tight_driver()
    for name in "abcd":
        driver.add(make_request(name, prompt=[ord(name)] * 8, max_tokens=20))
    driver.step()
    driver.add(make_request("e", prompt=1))
    plan = driver.step()
    assert plan.preempted_req_ids and "e" not in plan.num_scheduled_tokens


def test_a_request_is_not_admitted_for_a_chunk_when_the_rest_has_no_blocks():
    driver = tight_driver(max_num_batched_tokens=16)
    driver.add(make_request("a", prompt=[1] * 16, max_tokens=4))
    driver.add(make_request("b", prompt=[2] * 20, max_tokens=4))  # 5 blocks, 4 are left
    driver.step()
    assert list(driver.step().num_scheduled_tokens) == ["a"]
    driver.run()


def test_a_preempted_request_continues_with_the_same_tokens():
    requests = [make_request(name, prompt=[ord(name)] * 8, max_tokens=20) for name in "abcd"]
    calm, tight = make_scheduler(), tight_driver().scheduler
    calm_answers, tight_answers = drive(calm, requests), drive(tight, requests)
    assert tight.make_stats().num_preemptions > 0 and calm.make_stats().num_preemptions == 0
    assert {name: answer.token_ids for name, answer in calm_answers.items()} == {
        name: answer.token_ids for name, answer in tight_answers.items()
    }


def test_a_preempted_request_finds_its_own_blocks_again():
    driver = tight_driver()
    driver.add(make_request("a", prompt=[1] * 16, max_tokens=2))
    driver.add(make_request("b", prompt=[2] * 16, max_tokens=8))
    driver.step()
    assert driver.step().preempted_req_ids == ["b"]
    plan = driver.step()  # a has ended
    assert plan.scheduled_cached_reqs.resumed == [True]
    assert plan.scheduled_cached_reqs.num_computed_tokens[0] >= 8
    driver.run()
    assert driver.answers["b"].num_cached_tokens == 0  # a recompute is not a cache hit of the client's


def test_one_request_of_full_length_fits_alone():
    request = make_request(prompt=8, max_tokens=None)
    answers = drive(tight_driver().scheduler, [request])
    assert len(answers["a"].token_ids) == 24 and answers["a"].finish_reason is FinishReason.LENGTH


def test_many_long_requests_in_a_pool_for_one_all_finish_without_thrashing():
    scheduler = make_scheduler(num_blocks=10, max_model_len=32)
    requests = [make_request(f"r{i}", prompt=[i] * 4, max_tokens=28) for i in range(24)]
    driver = Driver(scheduler)
    for request in requests:
        driver.add(request)
    driver.run()
    assert all(len(answer.token_ids) == 28 for answer in driver.answers.values())
    assert driver.worker.num_computed_tokens < 2 * 24 * 32


# The prefix cache


def test_a_second_request_with_the_same_prefix_computes_only_the_rest():
    driver = Driver(make_scheduler())
    driver.add(make_request("a", prompt=10, max_tokens=1))
    driver.step()
    driver.add(make_request("b", prompt=10, max_tokens=1))
    plan = driver.step()
    assert plan.num_scheduled_tokens == {"b": 2} and plan.scheduled_new_reqs[0].num_computed_tokens == 8
    assert driver.answers["b"].num_cached_tokens == 8
    assert driver.scheduler.make_stats().prefix_cache.hits == 8


def test_a_snapshot_counts_from_the_start_and_changes_nothing():
    driver = Driver(make_scheduler(num_blocks=17, max_num_seqs=2))
    for name in "abcd":
        driver.add(make_request(name, prompt=10, max_tokens=2))
    for _ in range(3):  # "a" alone, then two side by side, each a step behind the one before
        driver.step()
    driver.scheduler.make_stats()  # what it resets, a snapshot keeps
    snapshot = driver.scheduler.snapshot()
    assert (snapshot.num_running_reqs, snapshot.num_waiting_reqs) == (1, 1)
    assert (snapshot.num_prompt_tokens, snapshot.num_cached_tokens) == (30, 16)
    assert snapshot.num_generation_tokens == 1 + 2 + 2
    assert (snapshot.num_blocks, snapshot.block_stride, len(snapshot.blocks)) == (17, 1, 17)
    assert snapshot.kv_cache_usage == 3 / 17 and snapshot.blocks.count(BLOCK_HELD) == 3
    assert driver.scheduler.snapshot() == snapshot


def test_what_follows_a_found_prefix_is_cached_too():
    driver = Driver(make_scheduler())
    for name, prompt, num_cached_tokens in (("a", 9, 0), ("b", 17, 8), ("c", 25, 16)):
        driver.add(make_request(name, prompt=prompt, max_tokens=1))
        assert driver.step().scheduled_new_reqs[0].num_computed_tokens == num_cached_tokens


def test_of_requests_that_arrive_together_with_one_prefix_only_the_first_computes_it():
    driver = Driver(make_scheduler())
    for name in "abc":
        driver.add(make_request(name, prompt=10, seed=ord(name)))
    assert driver.step().num_scheduled_tokens == {"a": 10}
    assert driver.step().num_scheduled_tokens == {"a": 1, "b": 2, "c": 2}


def test_a_request_waits_chunk_by_chunk_for_a_long_prefix_that_another_computes():
    driver = Driver(make_scheduler(max_num_batched_tokens=16))
    driver.add(make_request("a", prompt=40))
    driver.add(make_request("b", prompt=[*range(10, 50), 1, 2]))
    computed = [driver.step().num_scheduled_tokens for _ in range(4)]
    assert computed == [{"a": 16}, {"a": 16}, {"a": 8}, {"a": 1, "b": 2}]


@pytest.mark.parametrize("fields", [{"cache_salt": "x"}, {"prompt_logprobs": 1}, {"prompt": [7] * 10}])
def test_nobody_waits_for_a_prefix_it_will_not_use(fields):
    driver = Driver(make_scheduler())
    driver.add(make_request("a", prompt=10))
    driver.add(make_request(**{"request_id": "b", "prompt": 10, **fields}))
    assert driver.step().num_scheduled_tokens == {"a": 10, "b": 10}


def test_without_prefix_caching_nobody_waits_for_a_prefix():
    driver = Driver(make_scheduler(enable_prefix_caching=False))
    for name in "ab":
        driver.add(make_request(name, prompt=10))
    assert driver.step().num_scheduled_tokens == {"a": 10, "b": 10}


def test_another_salt_finds_nothing():
    driver = Driver(make_scheduler())
    driver.add(make_request("a", prompt=10, max_tokens=1, cache_salt="x"))
    driver.step()
    driver.add(make_request("b", prompt=10, max_tokens=1, cache_salt="y"))
    driver.add(make_request("c", prompt=10, max_tokens=1, cache_salt="x"))
    assert driver.step().num_scheduled_tokens == {"b": 10, "c": 2}


def test_output_is_cached_like_prompt():
    driver = Driver(make_scheduler())
    driver.add(make_request("a", prompt=4, max_tokens=9))
    driver.run()
    conversation = driver.answers["a"].token_ids
    driver.add(make_request("b", prompt=[10, 11, 12, 13, *conversation, 7]))
    assert driver.step().scheduled_new_reqs[0].num_computed_tokens == 12


def test_without_prefix_caching_nothing_is_found():
    driver = Driver(make_scheduler(enable_prefix_caching=False))
    for name in "ab":
        driver.add(make_request(name, prompt=10, max_tokens=1))
        assert driver.step().num_scheduled_tokens == {name: 10}


def test_blocks_of_a_failed_step_are_never_found():
    driver = Driver(make_scheduler())
    driver.add(make_request("a", prompt=10))
    driver.worker.failures["a"] = "row 0 is not finite"
    driver.step()
    driver.add(make_request("b", prompt=10))
    assert driver.step().num_scheduled_tokens == {"b": 10}


def test_the_prefix_cache_is_reset_only_when_idle():
    driver = Driver(make_scheduler())
    driver.add(make_request("a", prompt=10, max_tokens=2))
    driver.step()
    assert not driver.scheduler.reset_prefix_cache()
    driver.run()
    assert driver.scheduler.reset_prefix_cache()
    driver.add(make_request("b", prompt=10, max_tokens=1))
    assert driver.step().num_scheduled_tokens == {"b": 10}


# Prompt logprobs


def test_prompt_logprobs_recompute_a_cached_prompt():
    driver = Driver(make_scheduler())
    driver.add(make_request("a", prompt=10, max_tokens=1))
    driver.step()
    request = make_request("b", prompt=10, max_tokens=3, prompt_logprobs=1)
    driver.add(request)
    assert driver.step().num_scheduled_tokens == {"b": 10}
    driver.run()
    assert same_answer(request, driver.answers["b"])


def test_prompt_logprobs_of_a_chunked_prompt_come_chunk_by_chunk():
    driver = Driver(make_scheduler(max_num_batched_tokens=16))
    driver.add(make_request(prompt=40, prompt_logprobs=1))
    driver.step()
    assert len(driver.answers["a"].prompt_logprobs) == 16 and not driver.answers["a"].token_ids


@pytest.mark.parametrize("enable_prefix_caching", [True, False])
def test_prompt_logprobs_come_once_each_though_the_prompt_is_preempted(enable_prefix_caching):
    driver = tight_driver(
        max_num_batched_tokens=6, max_num_seqs=6, enable_prefix_caching=enable_prefix_caching
    )
    first = make_request("a", prompt=[1] * 7, max_tokens=20, logprobs=1)
    second = make_request("b", prompt=list(range(20)), max_tokens=2, prompt_logprobs=1)
    for request in (first, second):
        driver.add(request)
    sent_before_preemption = None
    while driver.scheduler.has_requests():
        sent = len(driver.answers["b"].prompt_logprobs)
        if driver.step().preempted_req_ids == ["b"]:
            sent_before_preemption = sent
    assert sent_before_preemption is not None
    assert same_answer(first, driver.answers["a"], max_model_len=32)
    assert same_answer(second, driver.answers["b"], max_model_len=32)


def test_a_prompt_preempted_half_way_repeats_no_row():
    driver = tight_driver(max_num_batched_tokens=6, max_num_seqs=6)
    driver.add(make_request("a", prompt=[1] * 4, max_tokens=20))
    driver.step()
    request = make_request("b", prompt=list(range(24)), max_tokens=2, prompt_logprobs=1)
    driver.add(request)
    num_sent = 0
    for _ in range(10):
        if driver.step().preempted_req_ids:
            break
        num_sent = len(driver.answers["b"].prompt_logprobs)
    assert driver.plans[-1].preempted_req_ids == ["b"]
    assert 0 < num_sent < 23  # it lost its blocks in the middle of the prompt
    driver.run()
    assert same_answer(request, driver.answers["b"], max_model_len=32)


# How requests end


def test_end_of_sequence_ends_a_request_without_a_stop_reason():
    eos = a_first_token()
    answer = drive(make_scheduler(), [make_request(eos=(EOS, eos))])["a"]
    assert (answer.token_ids, answer.finish_reason, answer.stop_reason) == ([eos], FinishReason.STOP, None)


def test_a_stop_token_ends_a_request_and_is_its_stop_reason():
    stop = a_first_token()
    answer = drive(make_scheduler(), [make_request(stop_token_ids=[stop])])["a"]
    assert (answer.token_ids, answer.finish_reason, answer.stop_reason) == ([stop], FinishReason.STOP, stop)


def test_end_of_sequence_wins_over_the_same_stop_token_unless_ignored():
    token = a_first_token()
    both = drive(make_scheduler(), [make_request(eos=(token,), stop_token_ids=[token])])["a"]
    assert both.stop_reason is None
    ignored = drive(make_scheduler(), [make_request(eos=(token,), stop_token_ids=[token], ignore_eos=True)])[
        "a"
    ]
    assert ignored.stop_reason == token
    assert len(drive(make_scheduler(), [make_request(eos=(token,), ignore_eos=True)])["a"].token_ids) == 8


def test_a_stop_wins_over_length_at_the_last_token():
    token = a_first_token()
    assert (
        drive(make_scheduler(), [make_request(eos=(token,), max_tokens=1)])["a"].finish_reason
        is FinishReason.STOP
    )


def test_nothing_stops_a_request_before_min_tokens():
    tokens = set(range(64))  # every token is a stop token: only min_tokens keeps it going
    request = make_request(stop_token_ids=sorted(tokens - {63}), min_tokens=5)
    answer = drive(make_scheduler(), [request])["a"]
    assert len(answer.token_ids) >= 6 and answer.token_ids[:5] == [63] * 5


def test_end_of_sequence_in_prior_output_before_min_tokens_ends_nothing():
    request = make_request(prior=(5, EOS), eos=(EOS,), min_tokens=2)
    assert len(drive(make_scheduler(), [request])["a"].token_ids) == 6


def test_length_ends_a_request_at_max_tokens_and_at_max_model_len():
    answers = drive(make_scheduler(), [make_request("a", max_tokens=3), make_request("b", max_tokens=None)])
    assert len(answers["a"].token_ids) == 3 and len(answers["b"].token_ids) == 60
    assert {answer.finish_reason for answer in answers.values()} == {FinishReason.LENGTH}


def test_one_failed_request_does_not_disturb_the_others():
    driver = Driver(make_scheduler())
    requests = [make_request(name, prompt=[ord(name)] * 5) for name in "abc"]
    for request in requests:
        driver.add(request)
    driver.step()
    driver.worker.failures["b"] = "row 1 is not finite"
    driver.run()
    failed = driver.answers["b"]
    assert (failed.finish_reason, failed.error) == (FinishReason.ERROR, "row 1 is not finite")
    assert all(same_answer(request, driver.answers[request.request_id]) for request in requests[::2])


# Prior output: a resend


def test_prior_output_is_never_sent_again_and_the_answer_goes_on_where_it_ended():
    whole = drive(make_scheduler(), [make_request()])["a"].token_ids
    rest = drive(make_scheduler(), [make_request(prior=tuple(whole[:3]))])["a"]
    assert whole[3:] == rest.token_ids and rest.finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize(
    ("fields", "finish_reason", "stop_reason"),
    [
        ({"prior": (5, 6, EOS), "eos": (EOS,)}, FinishReason.STOP, None),
        ({"prior": (5, 6, 7), "stop_token_ids": [7]}, FinishReason.STOP, 7),
        ({"prior": (5, 6, 7), "max_tokens": 3}, FinishReason.LENGTH, None),
        ({"prior": tuple(range(60)), "max_tokens": None}, FinishReason.LENGTH, None),
    ],
)
def test_prior_output_that_is_complete_ends_the_request_at_once(fields, finish_reason, stop_reason):
    driver = Driver(make_scheduler())
    driver.add(make_request(**fields))
    assert driver.scheduler.has_requests()
    plan = driver.step()
    answer = driver.answers["a"]
    assert plan.total_num_scheduled_tokens == 0
    assert (answer.token_ids, answer.finish_reason, answer.stop_reason) == ([], finish_reason, stop_reason)
    driver.run()


def test_aborting_a_request_that_ended_on_arrival_answers_it_once():
    driver = Driver(make_scheduler())
    driver.add(make_request(prior=(1, 2, 3), max_tokens=3))
    driver.abort("a")
    driver.run()
    assert driver.answers["a"].finish_reason is FinishReason.LENGTH


# Aborts


def test_an_aborted_request_frees_its_blocks_at_once():
    driver = Driver(make_scheduler())
    driver.add(make_request(prompt=20, client_index=3))
    driver.step()
    outputs = driver.scheduler.abort_requests(["a", "nobody"])
    assert [(o.request_id, o.finish_reason) for o in outputs[3]] == [("a", FinishReason.ABORT)]
    assert driver.scheduler.make_stats().kv_cache_usage == 0
    assert driver.scheduler.schedule().finished_req_ids == ["a"]


def test_a_waiting_request_that_is_aborted_never_reaches_the_worker():
    driver = Driver(make_scheduler(max_num_seqs=1))
    driver.add(make_request("a"))
    driver.add(make_request("b"))
    driver.step()
    driver.abort("b")
    assert driver.answers["b"].finish_reason is FinishReason.ABORT
    assert driver.run()["a"].finish_reason is FinishReason.LENGTH


def test_while_new_requests_are_held_the_preempted_come_back():
    driver = tight_driver(enable_prefix_caching=False)
    for name in "abcd":
        driver.add(make_request(name, prompt=[ord(name)] * 8, max_tokens=4))
    driver.step()
    driver.add(make_request("e", prompt=[1] * 8, max_tokens=4))
    assert driver.step().preempted_req_ids == ["d", "c"]
    driver.scheduler.hold_new()
    driver.add(make_request("f", prompt=[1] * 8, max_tokens=4))
    while driver.scheduler.has_requests():
        driver.step()
    assert sorted(name for name, answer in driver.answers.items() if answer.num_ends) == ["a", "b", "c", "d"]
    assert driver.scheduler.make_stats().num_waiting_reqs == 2
    driver.scheduler.check_integrity()
    driver.scheduler.admit_new()
    assert list(driver.step().num_scheduled_tokens) == ["e", "f"]
    driver.run()


def test_a_preempted_request_that_is_aborted_is_forgotten_by_the_worker():
    driver = tight_driver()
    for name in "ab":
        driver.add(make_request(name, prompt=[ord(name)] * 16, max_tokens=8))
    driver.step()
    assert driver.step().preempted_req_ids == ["b"]
    driver.abort("b")
    assert driver.step().finished_req_ids == ["b"]
    driver.run()


def test_the_result_of_a_request_aborted_in_mid_step_is_ignored():
    driver = Driver(make_scheduler())
    driver.add(make_request("a"))
    driver.add(make_request("b"))
    driver.step()
    driver.step(abort_meanwhile=["a"])
    assert len(driver.answers["a"].token_ids) == 1 and driver.answers["a"].num_ends == 1
    driver.run()


def test_an_id_may_be_used_again_after_an_abort_even_in_mid_step():
    driver = Driver(make_scheduler())
    driver.add(make_request("a", prompt=5))
    plan = driver.scheduler.schedule()
    result = driver.worker.run(plan)
    driver.abort("a")
    again = make_request("a", prompt=[7] * 5, seed=9)
    driver.add(again)
    assert driver.scheduler.update_from_output(plan, result) == {}
    driver.run()
    assert same_answer(again, driver.answers["a"])


# Plans in flight


def plans_ahead(request, count: int, **changes) -> list[dict[str, int]]:
    """The tokens of so many plans, made before any result."""
    scheduler = make_scheduler(**changes)
    scheduler.add_request(request)
    return [scheduler.schedule().num_scheduled_tokens for _ in range(count)]


def test_the_next_token_is_planned_while_this_one_is_sampled():
    assert plans_ahead(make_request(prompt=6), 4, max_num_batched_tokens=4, max_num_seqs=4) == [
        {"a": 4}, {"a": 2}, {"a": 1}, {"a": 1}
    ]  # fmt: skip


def test_nothing_is_planned_beyond_the_last_token_a_request_may_have():
    assert plans_ahead(make_request(max_tokens=1), 2) == [{"a": 4}, {}]
    assert plans_ahead(make_request(max_tokens=3), 4) == [{"a": 4}, {"a": 1}, {"a": 1}, {}]
    assert plans_ahead(make_request(max_tokens=None, prompt=61), 4) == [{"a": 61}, {"a": 1}, {"a": 1}, {}]
    assert plans_ahead(make_request(max_tokens=3, prior=(1, 2)), 2) == [{"a": 6}, {}]


def test_what_was_planned_behind_a_stop_token_is_discarded_and_never_cached():
    stop = a_first_token(prompt=7)
    request = make_request(prompt=7, stop_token_ids=[stop])
    driver = Driver(make_scheduler(), num_in_flight=3)
    driver.add(request)
    driver.run()
    assert [plan.num_scheduled_tokens for plan in driver.plans[:3]] == [{"a": 7}, {"a": 1}, {"a": 1}]
    assert driver.answers["a"].token_ids == [stop]
    again = make_request("b", prompt=[*request.prompt_token_ids, stop, 1, 1, 1, 1])
    driver.add(again)
    assert driver.run()["b"].num_cached_tokens == 4  # of 8 that were computed, 7 count


def test_a_preempted_request_keeps_the_token_that_was_being_sampled():
    driver = tight_driver(num_in_flight=2)
    requests = [make_request(name, prompt=[ord(name)] * 14, max_tokens=8) for name in "ab"]
    for request in requests:
        driver.add(request)
    while not driver.scheduler.requests["b"].num_preemptions:
        num_tokens = len(driver.answers["b"].token_ids)
        driver.step()  # plans, which may preempt, and then takes in the result of the plan before
    assert len(driver.answers["b"].token_ids) == num_tokens + 1 < 8
    driver.run()
    assert all(same_answer(request, driver.answers[request.request_id]) for request in requests)


def test_a_prefix_that_a_plan_in_flight_computes_is_not_computed_twice():
    driver = Driver(make_scheduler(), num_in_flight=3)
    for name in "abc":
        driver.add(make_request(name, prompt=40, max_tokens=1))
    driver.run()
    assert driver.worker.num_computed_tokens == 40 + 4 + 4


def test_results_are_accounted_for_in_the_order_of_their_plans():
    driver = Driver(make_scheduler())
    driver.add(make_request())
    first, second = driver.scheduler.schedule(), driver.scheduler.schedule()
    driver.worker.run(first)
    with pytest.raises(AssertionError, match="step 1 came, that of 0 is due"):
        driver.scheduler.update_from_output(second, driver.worker.run(second))


def test_outputs_go_to_the_client_that_asked():
    driver = Driver(make_scheduler())
    for index, name in enumerate("ab"):
        driver.add(make_request(name, client_index=index))
    driver.run()
    assert [driver.answers[name].client_index for name in "ab"] == [0, 1]


# What is refused


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": 64}, "prompt"),
        ({"prompt": [1, 2, 3, -1]}, "prompt"),
        ({"prompt": [1, 2, 3, 2**32]}, "prompt"),
        ({"request_id": "taken"}, "request_id"),
    ],
)
def test_a_request_that_cannot_be_served_is_refused_by_name(fields, param):
    scheduler = make_scheduler()
    scheduler.add_request(make_request("taken"))
    with pytest.raises(RequestError) as caught:
        scheduler.add_request(make_request(**fields))
    assert caught.value.param == param
    scheduler.check_integrity()
    assert list(scheduler.requests) == ["taken"]


def test_the_longest_prompt_that_leaves_room_is_served():
    assert len(drive(make_scheduler(), [make_request(prompt=63, max_tokens=None)])["a"].token_ids) == 1


# Stats


def test_stats_count_since_the_last_report():
    driver = Driver(make_scheduler(max_num_seqs=1))
    driver.add(make_request("a", prompt=8))
    driver.add(make_request("b", prompt=8))
    driver.step()
    stats = driver.scheduler.make_stats()
    assert (stats.num_running_reqs, stats.num_waiting_reqs, stats.num_scheduled_tokens) == (1, 1, 8)
    assert stats.kv_cache_usage == 2 / 256 and stats.prefix_cache.queries == 8
    driver.step()
    stats = driver.scheduler.make_stats()
    assert (stats.num_scheduled_tokens, stats.prefix_cache.queries) == (1, 0)
