"""The loop over plans: each is made, executed, sampled from and accounted for, several on their way at once.

Owns their order. EngineCore turns it with an executor; tests turn the same loop with workers of their own.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

from minivllm.core.sched.scheduler import OutputsByClient, Scheduler
from minivllm.messages.worker import GrammarOutput, ModelRunnerOutput, SchedulerOutput


class Runner(Protocol):
    """What runs plans, in the order in which they come: an Executor, or less."""

    def execute_model(self, plan: SchedulerOutput) -> Future[None]:
        """Begin with a plan; returns at once."""

    def sample_tokens(self, grammar: GrammarOutput | None) -> Future[ModelRunnerOutput]:
        """Sample from the plan that follows the last one sampled from."""


@dataclass
class _InFlight:
    """A plan that the runner has and whose result is not accounted for."""

    plan: SchedulerOutput
    forward: Future[None]
    sampled: Future[ModelRunnerOutput] | None = None  # not asked for while a mask lacks tokens of the plan before


class PlansInFlight:
    def __init__(self, scheduler: Scheduler, runner: Runner, most: int = 1) -> None:
        """most: plans at once. It may change between calls."""
        self.most = most
        self._scheduler, self._runner = scheduler, runner
        self._plans: deque[_InFlight] = deque()  # in the order of execution

    def __len__(self) -> int:
        return len(self._plans)

    def fill(self, now: float = 0.0) -> None:
        """Make plans and have them run, until so many are in flight or nothing more can be planned. now: in seconds."""
        while self._scheduler.has_requests() and self._takes_another():
            plan = self._scheduler.schedule(now)
            self._plans.append(_InFlight(plan, self._runner.execute_model(plan)))
            if not self._scheduler.lacks_tokens(plan):
                self._sample(self._plans[-1])
            if not plan.num_scheduled_tokens:  # only news for the worker, or all wait for what is in flight
                break

    def account_for_oldest(
        self, apply_late_aborts: Callable[[], None] = lambda: None
    ) -> tuple[SchedulerOutput, OutputsByClient]:
        """Wait for the oldest plan's result; the plan, and what the clients must hear.

        apply_late_aborts: called once it has run and before it is accounted for.
        """
        oldest = self._plans.popleft()
        oldest.forward.result()
        result = oldest.sampled.result()
        apply_late_aborts()
        outputs = self._scheduler.update_from_output(oldest.plan, result)
        if self._plans and self._plans[0].sampled is None:
            self._sample(self._plans[0])  # the tokens that its masks lacked are known now
        return oldest.plan, outputs

    def _takes_another(self) -> bool:
        """There is room, and the last plan is not one whose masks still have to be made."""
        if self._plans and self._plans[-1].sampled is None:
            return False
        return len(self._plans) < self.most

    def _sample(self, planned: _InFlight) -> None:
        grammar = self._scheduler.grammar_bitmask(planned.plan)  # made while the forward pass runs
        planned.sampled = self._runner.sample_tokens(grammar)
