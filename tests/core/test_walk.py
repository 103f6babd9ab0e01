"""Random walks: whatever is added, aborted or fails in whatever order, nothing leaks and every answer is right.

With one plan in flight, as a synchronous engine has it, with two, and with a pipeline's three. `--walk-steps` sets the
length of each walk.
"""

from __future__ import annotations

import random

import pytest

from minivllm.messages.engine import EngineCoreRequest, FinishReason
from minivllm.messages.kv_cache import KVCacheGroup, blocks_of_request
from minivllm.messages.kv_events import AllBlocksCleared, BlockRemoved, BlockStored
from tests.core.requests import drawn_rules, make_request, make_scheduler
from tests.fakes import Answer, Driver, answer_alone

pytestmark = pytest.mark.timeout(0)  # as long as --walk-steps asks for

VOCAB = 12  # small: prefixes collide, stop tokens come up
EOS = 0


def groups(*windows: int | None) -> tuple[KVCacheGroup, ...]:
    return tuple(KVCacheGroup((layer,), window) for layer, window in enumerate(windows))


# num_spare_blocks: beyond what one request of full length needs.
SHAPES = {
    "roomy": {"num_blocks": 200, "max_num_batched_tokens": 64},
    "tight": {"num_blocks": 12, "max_num_batched_tokens": 24},
    "one request fills the cache": {"num_blocks": 10, "max_num_batched_tokens": 16, "max_num_seqs": 8},
    "tiny chunks": {"num_blocks": 14, "max_num_batched_tokens": 3, "max_num_seqs": 3},
    "blocks of one token": {"num_blocks": 44, "block_size": 1, "max_num_batched_tokens": 20},
    "whole prompts": {"num_blocks": 12, "max_num_batched_tokens": 40, "enable_chunked_prefill": False},
    "no prefix cache": {"num_blocks": 12, "max_num_batched_tokens": 24, "enable_prefix_caching": False},
    "one window": {"num_spare_blocks": 0, "max_num_batched_tokens": 12, "kv_cache_groups": groups(18)},
    "full and a window": {"num_spare_blocks": 5, "max_num_batched_tokens": 12, "kv_cache_groups": groups(None, 6)},
    "many groups, roomy": {
        "num_blocks": 300, "max_num_batched_tokens": 24, "kv_cache_groups": groups(None, 6, 6, None, 11, 1),
    },
    "many groups, tight": {
        "num_spare_blocks": 8, "max_num_batched_tokens": 8, "kv_cache_groups": groups(None, 6, 6, None, 11, 1),
    },
    "windows, blocks of one token": {
        "num_spare_blocks": 12, "block_size": 1, "max_num_batched_tokens": 20, "kv_cache_groups": groups(15, None),
    },
    "windows, whole prompts": {
        "num_spare_blocks": 2, "max_num_batched_tokens": 40, "enable_chunked_prefill": False,
        "kv_cache_groups": groups(None, 5),
    },
    "windows, no prefix cache": {
        "num_spare_blocks": 3, "max_num_batched_tokens": 12, "enable_prefix_caching": False,
        "kv_cache_groups": groups(9, None),
    },
}  # fmt: skip

PREEMPTING = (
    "tight", "one request fills the cache", "blocks of one token",
    "one window", "full and a window", "many groups, tight", "windows, blocks of one token", "windows, whole prompts",
    "windows, no prefix cache",
)  # fmt: skip


class Walk:
    """One random walk. What was asked is kept beside the driver, to compare the answers with.

    Seed 0 walks by the default rules, any other by rules drawn at random. Up to `num_in_flight` plans are made before
    the first one's result.
    """

    def __init__(self, shape: str, seed: int, num_in_flight: int) -> None:
        self.random = random.Random(f"{shape} {seed}")
        sizes = {"max_model_len": 40, "max_num_seqs": 6, **SHAPES[shape]}
        self.rules = drawn_rules(self.random, sizes["max_num_seqs"]) if seed else {}
        self.max_model_len = sizes["max_model_len"]
        if "num_spare_blocks" in sizes:
            step_tokens = sizes["max_num_batched_tokens"] * num_in_flight
            least = blocks_of_request(sizes["kv_cache_groups"], 40, step_tokens, sizes.get("block_size", 4)) + 1
            sizes["num_blocks"] = least + sizes.pop("num_spare_blocks")
        scheduler = make_scheduler(
            **sizes, **self.rules, record_kv_events=True, max_plans_in_flight=num_in_flight
        )
        self.driver = Driver(scheduler, vocab_size=VOCAB)
        self.num_in_flight = num_in_flight
        self.told: set[tuple[int | None, bytes]] = set()  # (group, hash) of what can be found, by the events alone
        self.asked: dict[str, EngineCoreRequest] = {}  # by id, the last of that id
        self.num_asked = self.num_checked = 0
        self.stems = [self._tokens(24) for _ in range(3)]

    def _tokens(self, count: int) -> list[int]:
        return [self.random.randrange(VOCAB) for _ in range(count)]

    def _prompt(self) -> list[int]:
        """A shared stem of any length, and a tail of its own."""
        stem = self.random.choice(self.stems)[: self.random.randrange(25)]
        return (stem + self._tokens(self.random.randrange(8)))[: self.max_model_len - 1] or [1]

    def add(self, request_id: str | None = None) -> None:
        pick = self.random
        request = make_request(
            request_id or f"r{self.num_asked}",
            self._prompt(),
            max_tokens=pick.choice([1, 3, 8, 20, None]),
            seed=pick.randrange(3),
            eos=(EOS,),
            client_index=pick.randrange(2),
            cache_salt=pick.choice([None, None, None, "x", "y"]),
            ignore_eos=pick.random() < 0.6,
            stop_token_ids=pick.choice([[], [], [pick.randrange(VOCAB)]]),
            logprobs=pick.choice([None, 1]),
            prompt_logprobs=pick.choice([None, None, None, 1]),
        )
        if pick.random() < 0.2:
            self._give_vectors(request)
        if request.sampling_params.max_tokens != 1:
            request.sampling_params.min_tokens = pick.choice([0, 0, 2])
        request.priority = pick.choice([0, 0, -3, 1, 2])
        request.arrival_time = pick.random()
        if pick.random() < 0.2:
            self._make_it_a_resend(request)
        self.asked[request.request_id] = request
        self.num_asked += 1
        self.driver.add(request)

    @staticmethod
    def _give_vectors(request: EngineCoreRequest) -> None:
        """Vectors in place of its tokens, so that prefixes that were shared still are."""
        vectors = make_request(vectors=request.prompt_token_ids)
        request.prompt_token_ids, request.prompt_embeds = vectors.prompt_token_ids, vectors.prompt_embeds
        request.sampling_params.prompt_logprobs = None

    def _make_it_a_resend(self, request: EngineCoreRequest) -> None:
        """Some of the answer, up to all of it, has been delivered before."""
        known = answer_alone(request, max_model_len=self.max_model_len, vocab_size=VOCAB).token_ids
        request.prior_output_token_ids = known[: self.random.randint(1, len(known))]

    def step(self) -> None:
        alive = list(self.driver.scheduler.requests)
        if len(alive) < 20 and self.random.random() < 0.15:
            for _ in range(self.random.randint(1, 8)):
                self.add()
        if alive and self.random.random() < 0.03:
            self._abort_some(alive)
        alive = list(self.driver.worker.states)
        if alive and self.random.random() < 0.02:
            self._fail(self.random.choice(alive))
        meanwhile = [self.random.choice(alive)] if alive and self.random.random() < 0.03 else []
        self.driver.in_flight.most = self.random.randint(1, self.num_in_flight)
        self.driver.step(abort_meanwhile=meanwhile)
        self.driver.plans.clear()
        self._check_ended()
        if self.random.random() < 0.01:
            self.driver.scheduler.reset_prefix_cache()
        if self.random.random() < 0.005:
            self.driver.scheduler.hold_new()
        elif self.random.random() < 0.3:
            self.driver.scheduler.admit_new()
        self._listen()

    def _abort_some(self, alive: list[str]) -> None:
        """And use the id of one again at once, while plans with the first of that name may be in flight."""
        aborted = self.random.sample(alive, self.random.randint(1, min(3, len(alive))))
        self.driver.abort(*aborted)
        self._check_ended()
        if self.random.random() < 0.5 and aborted[0] not in self.driver.scheduler.requests:
            self.add(aborted[0])

    def _listen(self) -> None:
        """Who follows the events knows the cache's index."""
        for event in self.driver.scheduler.take_kv_events():
            match event:
                case BlockStored():
                    names = {(event.group_idx, block_hash) for block_hash in event.block_hashes}
                    assert not self.told & names
                    assert len(event.token_ids) == len(event.block_hashes) * event.block_size
                    self.told |= names
                case BlockRemoved():
                    names = {(event.group_idx, block_hash) for block_hash in event.block_hashes}
                    assert self.told >= names
                    self.told -= names
                case AllBlocksCleared():
                    self.told.clear()
        kv_cache = self.driver.scheduler.kv_cache
        names = [block.block_hash for block in kv_cache.pool.blocks if block.block_hash is not None]
        if len(kv_cache.groups) > 1:  # the index tells them apart by their last byte
            assert self.told == {(name[-1], name[:-1]) for name in names}
        else:
            assert self.told == {(None, name) for name in names}

    def _fail(self, request_id: str) -> None:
        """Make its next step fail, should it still be alive then."""
        self.driver.worker.failures = {request_id: "made to fail"}

    def finish(self) -> None:
        self.driver.scheduler.admit_new()
        self.driver.run()
        self._check_ended()
        assert self.num_checked == self.num_asked

    def _check_ended(self) -> None:
        for request_id in [name for name, answer in self.driver.answers.items() if answer.num_ends]:
            self._check(self.asked[request_id], self.driver.answers.pop(request_id))
            self.num_checked += 1

    def _check(self, request: EngineCoreRequest, answer: Answer) -> None:
        """It is the answer of the request alone, or the beginning of it when it was cut short."""
        alone = answer_alone(request, max_model_len=self.max_model_len, vocab_size=VOCAB)
        columns = ("token_ids", "logprobs", "prompt_logprobs")
        if answer.finish_reason in (FinishReason.ABORT, FinishReason.ERROR):
            assert (answer.error is not None) == (answer.finish_reason is FinishReason.ERROR)
            for column in columns:
                part = getattr(answer, column)
                assert part == getattr(alone, column)[: len(part)], (request, column)
            return
        if request.prior_output_token_ids and not alone.token_ids:
            columns = ("token_ids", "logprobs")  # nothing was left to compute, the prompt included
        for column in (*columns, "finish_reason", "stop_reason"):
            assert getattr(answer, column) == getattr(alone, column), (request, column)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", range(1, 7))
def test_no_policy_and_no_flag_changes_an_answer(shape: str, seed: int, walk_steps: int):
    walk = Walk(shape, seed, num_in_flight=1 + seed % 3)
    for _ in range(walk_steps // 6):
        walk.step()
        assert len(walk.driver.scheduler.running) <= (walk.rules["max_num_active_seqs"] or 8)
    walk.finish()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("num_in_flight", [1, 2, 3])
def test_every_request_ends_once_with_its_own_answer(shape: str, num_in_flight: int, walk_steps: int):
    walk = Walk(shape, 0, num_in_flight)
    for _ in range(walk_steps // 3):
        walk.step()
    stats = walk.driver.scheduler.make_stats()
    walk.finish()
    if shape in PREEMPTING and walk_steps >= 3000:
        assert stats.num_preemptions > walk_steps // 250  # else this walk would show little
    if "no prefix cache" not in shape and walk_steps >= 3000:
        assert stats.prefix_cache.hits > walk_steps // 50
