"""Work that ends when its client goes or the server closes, in the task of whoever asked for it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from minivllm.entrypoints.openai.errors import ServerClosingError
from minivllm.entrypoints.openai.lifecycle import Lifecycle
from minivllm.entrypoints.openai.utils import ClientDisconnected, attend


class Client:
    def __init__(self) -> None:
        self.left = asyncio.Event()

    async def receive(self) -> dict:
        await self.left.wait()
        return {"type": "http.disconnect"}


class Work:
    """Waits for ever, and remembers how it ended."""

    def __init__(self) -> None:
        self.begun = asyncio.Event()
        self.ended_by: BaseException | None = None

    async def run(self) -> None:
        self.begun.set()
        try:
            await asyncio.get_running_loop().create_future()
        except BaseException as error:
            self.ended_by = error
            raise


def run(talk: Callable[[Client, Work, Lifecycle], Awaitable[None]]) -> None:
    async def main() -> None:
        await talk(Client(), Work(), Lifecycle())
        await asyncio.sleep(0.01)  # a cancellation left behind would be raised here
        others = asyncio.all_tasks() - {asyncio.current_task()}
        assert not others

    asyncio.run(main())


def test_work_that_ends_by_itself_is_given_back_and_nothing_is_left():
    async def talk(client: Client, work: Work, lifecycle: Lifecycle) -> None:
        assert await attend(asyncio.sleep(0, "done"), client.receive, lifecycle) == "done"
        lifecycle.close()  # concerns nobody any more

    run(talk)


def test_what_work_raises_is_raised():
    async def fail() -> None:
        await asyncio.sleep(0)
        raise ZeroDivisionError

    async def talk(client: Client, work: Work, lifecycle: Lifecycle) -> None:
        with pytest.raises(ZeroDivisionError):
            await attend(fail(), client.receive, lifecycle)

    run(talk)


@pytest.mark.parametrize("reason", [ClientDisconnected, ServerClosingError])
def test_work_is_cancelled_and_who_asked_goes_on(reason: type[Exception]):
    async def talk(client: Client, work: Work, lifecycle: Lifecycle) -> None:
        end = client.left.set if reason is ClientDisconnected else lifecycle.close
        asyncio.get_running_loop().call_later(0.001, end)
        with pytest.raises(reason):
            await attend(work.run(), client.receive, lifecycle)
        assert isinstance(work.ended_by, asyncio.CancelledError)
        task = asyncio.current_task()
        assert not hasattr(task, "cancelling") or task.cancelling() == 0

    run(talk)


def test_a_connection_that_cannot_be_read_counts_as_gone():
    async def receive() -> dict:
        raise OSError

    async def talk(client: Client, work: Work, lifecycle: Lifecycle) -> None:
        with pytest.raises(ClientDisconnected):
            await attend(work.run(), receive, lifecycle)

    run(talk)


def test_a_server_that_is_closing_begins_nothing_that_takes_time():
    async def talk(client: Client, work: Work, lifecycle: Lifecycle) -> None:
        lifecycle.close()
        with pytest.raises(ServerClosingError):
            await attend(work.run(), client.receive, lifecycle)

    run(talk)


def test_who_is_cancelled_by_others_is_cancelled():
    async def talk(client: Client, work: Work, lifecycle: Lifecycle) -> None:
        asking = asyncio.ensure_future(attend(work.run(), client.receive, lifecycle))
        await work.begun.wait()
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        assert isinstance(work.ended_by, asyncio.CancelledError)

    run(talk)


@pytest.mark.skipif(not hasattr(asyncio.Task, "uncancel"), reason="a task counts this from Python 3.11 on")
def test_who_is_cancelled_by_others_as_the_client_goes_is_cancelled():
    async def talk(client: Client, work: Work, lifecycle: Lifecycle) -> None:
        asking = asyncio.ensure_future(attend(work.run(), client.receive, lifecycle))
        await work.begun.wait()
        lifecycle.close()
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking

    run(talk)


def test_both_ends_at_once_are_one():
    async def talk(client: Client, work: Work, lifecycle: Lifecycle) -> None:
        asking = asyncio.ensure_future(attend(work.run(), client.receive, lifecycle))
        await work.begun.wait()
        client.left.set()
        lifecycle.close()
        with pytest.raises(ServerClosingError):
            await asking

    run(talk)
