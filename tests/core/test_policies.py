"""Who comes first, and how much of a step a prompt may have: policies, flags and fairness, told as scenarios."""

from __future__ import annotations

import pytest

from minivllm.core.request import Request
from minivllm.core.sched.chunks import ChunkSizes
from minivllm.core.sched.step import Step
from tests.core.requests import make_request, make_scheduler
from tests.fakes import Driver, answer_alone


def prompt(name: str, length: int) -> list[int]:
    """Tokens that share no prefix with another name's."""
    return [ord(name) % 64] * length


def request(name: str, length: int = 4, **fields):
    return make_request(name, prompt(name, length), **fields)


def driver_of(*requests, **changes) -> Driver:
    driver = Driver(make_scheduler(**changes))
    for each in requests:
        driver.add(each)
    return driver


# Priority


def test_the_lower_priority_value_is_served_first_and_then_the_earlier_arrival():
    driver = driver_of(
        request("a", priority=1, arrival_time=1.0, max_tokens=1),
        request("b", priority=0, arrival_time=3.0, max_tokens=1),
        request("c", priority=0, arrival_time=2.0, max_tokens=1),
        request("d", priority=-1, arrival_time=9.0, max_tokens=1),
        policy="priority",
        max_num_seqs=1,
    )
    assert [list(driver.step().num_scheduled_tokens) for _ in range(4)] == [["d"], ["c"], ["b"], ["a"]]


def test_first_come_first_served_ignores_priorities():
    driver = driver_of(request("a", priority=5), request("b", priority=-5), max_num_seqs=1)
    assert list(driver.step().num_scheduled_tokens) == ["a"]


def test_equal_priorities_and_times_are_served_in_order_of_acceptance():
    driver = driver_of(*(request(name, max_tokens=1) for name in "cab"), policy="priority", max_num_seqs=1)
    assert [list(driver.step().num_scheduled_tokens) for _ in range(3)] == [["c"], ["a"], ["b"]]


def tight(*requests, **changes) -> Driver:
    """Room for 8 blocks of 4."""
    return driver_of(*requests, **{"num_blocks": 8, "max_model_len": 32, **changes})


def test_the_lowest_priority_is_preempted_first_whenever_it_arrived():
    driver = tight(
        request("a", 8, priority=3, max_tokens=20),
        request("b", 8, priority=1, max_tokens=20),
        request("c", 8, priority=2, max_tokens=20),
        request("d", 8, priority=0, max_tokens=20),
        policy="priority",
    )
    driver.step()
    assert driver.step().preempted_req_ids == ["a", "c"]  # each holds 2 full blocks and wants a third


def test_a_preempted_request_returns_before_lower_priorities_that_came_meanwhile():
    driver = tight(*(request(name, 8, priority=1, max_tokens=4) for name in "abcd"), policy="priority")
    driver.step()
    driver.add(request("e", 8, priority=2, max_tokens=4))
    driver.add(request("f", 8, priority=0, max_tokens=4))
    driver.step()
    assert [waiting.request_id for waiting in driver.scheduler.waiting] == ["f", "c", "d", "e"]
    driver.run()


def test_preemption_by_priority_changes_no_answer():
    requests = [request(name, 8, priority=ord(name) % 3, max_tokens=20, seed=ord(name)) for name in "abcdef"]
    driver = tight(*requests, policy="priority")
    driver.run()
    for each in requests:
        assert driver.answers[each.request_id].token_ids == answer_alone(each, max_model_len=32).token_ids


# Fairness


def test_while_others_wait_a_long_prompt_takes_at_most_half_a_step():
    driver = driver_of(request("L", 60), request("s", 8), max_num_batched_tokens=16)
    assert driver.step().num_scheduled_tokens == {"L": 8, "s": 8}


def test_alone_a_long_prompt_takes_the_whole_step():
    assert driver_of(request("L", 60), max_num_batched_tokens=16).step().num_scheduled_tokens == {"L": 16}


def test_what_the_others_leave_goes_to_the_long_prompt():
    driver = driver_of(request("L", 60), request("s", 3), max_num_batched_tokens=16)
    assert driver.step().num_scheduled_tokens == {"L": 13, "s": 3}
    assert driver.step().num_scheduled_tokens == {"L": 15, "s": 1}


def test_a_full_batch_costs_a_long_prompt_nothing():
    driver = driver_of(request("L", 60), request("s", 3), max_num_batched_tokens=16, max_num_seqs=1)
    assert driver.step().num_scheduled_tokens == {"L": 16}


def test_a_prompt_of_half_a_step_is_not_cut():
    driver = driver_of(request("a", 8), request("b", 8), request("c", 8), max_num_batched_tokens=16)
    assert driver.step().num_scheduled_tokens == {"a": 8, "b": 8}


def test_long_prompts_share_one_half_in_order_and_the_short_ones_have_the_other():
    driver = driver_of(request("L", 60), request("M", 60), max_num_batched_tokens=16)
    driver.step()
    driver.add(request("s", 4, max_tokens=1))
    driver.add(request("t", 4, max_tokens=1))
    assert driver.step().num_scheduled_tokens == {"L": 8, "s": 4, "t": 4}


def test_decodes_behind_a_long_prompt_get_their_token():
    names = "abcdefghijkl"
    driver = driver_of(
        request("L", 60), *(request(name, 1, max_tokens=30) for name in names), max_num_batched_tokens=16
    )
    plans = [driver.step() for _ in range(4)]
    assert set(plans[-1].num_scheduled_tokens) == {"L", *names}  # 8 of them entered with the first chunk
    assert [plan.num_scheduled_tokens["L"] for plan in plans] == [8, 4, 4, 4]


def test_who_waits_for_a_prefix_lets_others_pass():
    driver = driver_of(request("a", 40), max_num_batched_tokens=16)
    driver.add(make_request("b", [*prompt("a", 40), 1]))
    driver.add(request("c", 4))
    assert driver.step().num_scheduled_tokens == {"a": 12, "c": 4}
    driver.run()
    assert driver.worker.num_computed_tokens < 70  # the prefix was computed once


def test_a_prefix_that_a_resting_prompt_will_compute_is_not_computed_twice():
    driver = driver_of(request("L", 60), max_num_batched_tokens=16)
    for name in "MN":
        driver.add(make_request(name, prompt("M", 60), max_tokens=1))
    for name in "abcdefgh":
        driver.add(request(name, 4, max_tokens=1))
    driver.run()
    assert driver.answers["N"].num_cached_tokens == 56


@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_short_requests_do_not_starve_behind_a_32k_prompt_nor_it_behind_them(policy: str):
    length, budget = 32_768, 2048
    sizes = {"max_num_batched_tokens": budget, "max_model_len": length + 64, "num_blocks": 600, "block_size": 128}
    driver = driver_of(make_request("long", [1] * length, max_tokens=2), policy=policy, max_num_seqs=128, **sizes)
    waits: dict[str, int] = {}
    first_token_of_long = None
    for step in range(60):
        for index in range(8):  # of 100 to 240 tokens: a few more than fit beside the long one
            name = f"s{step}.{index}"
            driver.add(make_request(name, [2 + step, index] * (50 + 10 * index), max_tokens=2))
            waits[name] = step
        driver.step()
        for name, since in list(waits.items()):
            if driver.answers[name].token_ids:
                assert step - since <= 8, f"{name} waited {step - since} steps for its first token"
                del waits[name]
        if first_token_of_long is None and driver.answers["long"].token_ids:
            first_token_of_long = step
    assert first_token_of_long is not None and first_token_of_long <= 2 * length // budget
    assert len(waits) < 8 * 8


# Flags


def test_the_long_prefill_threshold_cuts_prompts_unless_they_are_alone():
    driver = driver_of(request("a", 30), max_num_batched_tokens=32, long_prefill_token_threshold=5)
    assert driver.step().num_scheduled_tokens == {"a": 30}
    driver.add(request("b", 12))
    driver.add(request("c", 3))
    assert driver.step().num_scheduled_tokens == {"a": 1, "b": 5, "c": 3}
    assert driver.step().num_scheduled_tokens == {"a": 1, "b": 5, "c": 1}  # what is left over stays unused
    assert driver.step().num_scheduled_tokens == {"a": 1, "b": 2, "c": 1}


def test_prompts_get_little_of_a_step_in_which_others_decode():
    decoding = [request(name, 4, max_tokens=20) for name in "abc"]
    driver = driver_of(*decoding, max_num_batched_tokens=64, max_num_mixed_prefill_tokens=8)
    assert driver.step().num_scheduled_tokens == {"a": 4, "b": 4, "c": 4}
    driver.add(request("d", 21))
    driver.add(request("e", 5))
    shares = [{"d": 8}, {"d": 8}, {"d": 5, "e": 3}, {"d": 1, "e": 2}]
    for share in shares:
        tokens = driver.step().num_scheduled_tokens
        assert {name: tokens.pop(name, 0) for name in "abc"} == {"a": 1, "b": 1, "c": 1}
        assert tokens == share


def test_prompts_get_a_whole_step_when_nobody_decodes():
    driver = driver_of(request("a", 20), request("b", 30), max_num_batched_tokens=64, max_num_mixed_prefill_tokens=8)
    assert driver.step().num_scheduled_tokens == {"a": 20, "b": 30}


def test_of_a_backlog_of_prompts_a_sixteenth_is_computed_beside_decodes():
    sizes = {"max_num_batched_tokens": 64, "max_num_mixed_prefill_tokens": 2, "max_num_seqs": 5}
    driver = driver_of(request("a", 4, max_tokens=20), **sizes)
    driver.step()
    for name in "bcdefg":  # four of them can start
        driver.add(request(name, 40))
    plan = driver.step()
    assert plan.total_num_scheduled_tokens == 1 + 4 * 40 // 16


def test_a_prompt_gets_nothing_of_a_step_smaller_than_those_behind_it():
    running = [Request.from_message(request(name, 4)) for name in "abcdef"]
    chunks = ChunkSizes(
        running, [], token_budget=64, prompt_share=0.5, long_prefill_token_threshold=0, enable_chunked_prefill=True,
        max_num_running=8, max_num_mixed_prefill_tokens=1,
    )  # fmt: skip
    assert chunks.of_running(0, 4, Step(0, 2, 16, 0.0, long_budget=1)) == 0


def test_no_more_than_max_num_active_seqs_run():
    driver = driver_of(*(request(name, max_tokens=2) for name in "abc"), max_num_seqs=8, max_num_active_seqs=2)
    assert list(driver.step().num_scheduled_tokens) == ["a", "b"]


def test_the_watermark_keeps_blocks_free_for_those_that_run():
    for watermark, admitted in ((0.0, ["a", "b"]), (0.25, ["a"])):
        driver = tight(request("a", 16, max_tokens=8), request("b", 16), watermark=watermark)
        assert list(driver.step().num_scheduled_tokens) == admitted
        driver.run()
    assert not any(plan.preempted_req_ids for plan in driver.plans)


def test_the_watermark_keeps_nobody_out_of_an_empty_engine():
    driver = tight(request("a", 31), watermark=0.9)
    assert list(driver.step().num_scheduled_tokens) == ["a"]


def test_without_the_full_reservation_the_first_chunks_blocks_are_enough():
    for reserve_full_isl, admitted in ((True, ["a"]), (False, ["a", "b"])):
        driver = tight(
            request("a", 16, max_tokens=4),
            request("b", 20, max_tokens=4),  # 5 blocks, 4 are left
            max_num_batched_tokens=20,
            reserve_full_isl=reserve_full_isl,
        )
        driver.step()
        assert [running.request_id for running in driver.scheduler.running] == admitted
        driver.run()
