"""The store of responses: what a plain list would hold, shared fairly among tenants, and the same from another process."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import random
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("prometheus_client", reason="the extra serve is not installed")

from serve.client import Client

from pyengine import Engine
from pyengine.serve.app import App
from pyengine.serve.errors import HTTPError
from pyengine.serve.models import Models, ServedModel
from pyengine.serve.settings import Settings
from pyengine.serve.shared_store import Links, SharedStore, shared
from pyengine.serve.siblings import Siblings
from pyengine.serve.store import AWAY, OVERHEAD, Owner, ResponseStore, Store, Stored, owner_of

ANNA, BERT, CARL = ((bytes([i]) * 32, None) for i in range(3))  # owners, each with a key


class Clock:
    """Stands still until it is moved."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def response(owner: Owner, n_bytes: int = OVERHEAD) -> Stored:
    """One that counts as so many bytes."""
    return Stored(owner, b"x" * (n_bytes - OVERHEAD), b"", ())


@contextlib.asynccontextmanager
async def asked_for(store: ResponseStore) -> AsyncIterator[SharedStore]:
    """The same store, as another process sees it."""
    keeps, asks = socket.socketpair()
    other = SharedStore(store.keeps_any)
    async with shared(store, [keeps]), shared(other, [asks]):
        yield other


@contextlib.asynccontextmanager
async def itself(store: ResponseStore) -> AsyncIterator[ResponseStore]:
    yield store


def test_an_owner_is_short_whatever_a_caller_says() -> None:
    assert owner_of(None, None) == (None, None)
    assert len({owner_of(key, salt) for key in (None, b"k") for salt in (None, "a", "b" * 1000, "\ud800")}) == 8
    assert [len(one or b"") for one in owner_of(b"k", "x" * (1 << 20))] == [1, 32]


# -------------------------------------------------------------------- bounds and shares


class PlainList:
    """The store as a list in the order of use. `tenant`: of an owner."""

    def __init__(self, max_responses: int, max_bytes: int, tenant: Callable[[Owner], Any], clock: Clock) -> None:
        self.entries: list[tuple[str, Stored]] = []
        self.used: dict[Any, float] = {}  # by tenant
        self._bounds = max_responses, max_bytes
        self._tenant = tenant
        self._clock = clock

    def _shares(self) -> collections.Counter[Any]:
        """Of each tenant, times both bounds: the larger of its shares."""
        count: collections.Counter[Any] = collections.Counter()
        size: collections.Counter[Any] = collections.Counter()
        for _, stored in self.entries:
            count[self._tenant(stored.owner)] += 1
            size[self._tenant(stored.owner)] += stored.n_bytes
        max_responses, max_bytes = self._bounds
        return collections.Counter({one: max(count[one] * max_bytes, size[one] * max_responses) for one in count})

    def put(self, id_: str, stored: Stored) -> bool:
        before = list(self.entries)
        self.entries.append((id_, stored))
        while len(self.entries) > self._bounds[0] or sum(one.n_bytes for _, one in self.entries) > self._bounds[1]:
            shares, own = self._shares(), self._tenant(stored.owner)
            away = {one for one in shares if one != own and self.used[one] < self._clock.now - AWAY}
            if away:
                goes = min(away, key=self.used.__getitem__)
            else:
                goes = max(shares, key=lambda tenant: (shares[tenant], tenant == own))
            self.entries.remove(next(one for one in self.entries if self._tenant(one[1].owner) == goes))
        if (id_, stored) not in self.entries:
            self.entries = before
            return False
        self.use(stored)
        return True

    def use(self, stored: Stored) -> None:
        self.used[self._tenant(stored.owner)] = self._clock.now


@pytest.mark.parametrize("reached", [itself, asked_for])
@pytest.mark.parametrize("by_key", [False, True])
def test_the_store_holds_what_a_plain_list_would(by_key: bool, reached: Callable[[ResponseStore], Any]) -> None:
    """Put, got and deleted at random, while time goes by."""
    rng = random.Random(5)
    clock = Clock()
    bounds = 6, 12_000
    owners: list[Owner] = [(b"k", None), (b"k", b"s"), (b"l", b"s")]

    async def test(store: Store, kept: ResponseStore) -> None:
        plain = PlainList(*bounds, tenant=lambda owner: owner[0 if by_key else 1], clock=clock)
        refused = 0
        for step in range(1000):
            clock.now += AWAY * rng.choice((0, 0, 0.125, 0.5))
            action, owner = rng.choice(("put", "put", "get", "delete")), rng.choice(owners)
            if action == "put":
                output = [{"id": f"msg_{step}_{i}"} for i in range(rng.randrange(4))]
                stored = Stored.of(
                    owner, {"output": output, "x": "x" * rng.randrange(9000)}, b"y" * rng.randrange(4000)
                )
                refused += not plain.put(f"resp_{step}", stored)
                assert await store.put(f"resp_{step}", stored) is (plain.entries[-1:] == [(f"resp_{step}", stored)])
            elif plain.entries:
                id_, stored = entry = rng.choice(plain.entries)
                mine = stored.owner == owner
                if action == "get":
                    item_ids = stored.output_ids or ("msg_x",)
                    by_item = await store.with_item(owner, rng.choice(item_ids))
                    assert by_item == (stored if mine and stored.output_ids else None)
                    assert await store.get(owner, id_) == (stored if mine else None)
                else:
                    assert await store.delete(owner, id_) is mine
                if mine:
                    plain.use(stored)
                    plain.entries.remove(entry)
                    if action == "get":
                        plain.entries.append(entry)
            assert set(kept) == {id_ for id_, _ in plain.entries}
            assert kept.n_bytes == sum(one.n_bytes for _, one in plain.entries) <= bounds[1]
            assert len(kept._response_of) == sum(len(one.output_ids) for _, one in plain.entries)
            assert sum(len(held.stored) for held in kept._held.values()) == len(kept)
        assert refused > 20

    async def main() -> None:
        kept = ResponseStore(*bounds, by_key=by_key, clock=clock)
        async with reached(kept) as store:
            await test(store, kept)

    asyncio.run(main())


def kept_of(store: ResponseStore, owner: Owner) -> list[str]:
    return [id_ for id_ in store if store._stored[id_].owner == owner]


def test_a_flood_of_one_drives_nobody_else_out() -> None:
    async def main() -> None:
        store = ResponseStore(12, 1 << 20, by_key=True)
        for i in range(40):
            assert await store.put(f"a{i}", response(ANNA))
        assert len(store) == 12  # all the room, while nobody else wants any
        for i in range(2):
            assert await store.put(f"b{i}", response(BERT))
        for i in range(40, 80):
            assert await store.put(f"a{i}", response(ANNA))
        assert kept_of(store, BERT) == ["b0", "b1"] and kept_of(store, ANNA) == [f"a{i}" for i in range(70, 80)]
        for i in range(50):
            for name, owner in (("a", ANNA), ("b", BERT), ("c", CARL)):
                assert await store.put(f"{name}_{i}", response(owner))
        assert [kept_of(store, one) for one in (ANNA, BERT, CARL)] == [
            [f"{name}_{i}" for i in range(46, 50)] for name in "abc"
        ]

    asyncio.run(main())


def test_shares_are_for_whoever_is_there() -> None:
    """Tenants who have been away for an hour make room first, whatever they have; to read is to be there."""

    async def main() -> None:
        clock = Clock()
        store = ResponseStore(6, 1 << 20, clock=clock)
        gone: list[Owner] = [(None, bytes([i])) for i in range(6)]
        for i, owner in enumerate(gone):
            clock.now = float(i)
            assert await store.put(f"g{i}", response(owner))
        new: Owner = (None, b"new")
        assert not await store.put("n", response(new))  # all have as much as it wants
        clock.now = 3.0 + AWAY  # the first three are away
        assert await store.get(gone[1], "g1") is not None
        for i in range(3):
            assert await store.put(f"n{i}", response(new))
        assert list(store) == ["g1", "g3", "g4", "g5", "n1", "n2"]  # g0 and g2 made room, and then it had most itself
        clock.now = 9.0 + AWAY
        for i in range(3, 9):
            assert await store.put(f"n{i}", response(new))
        assert list(store) == ["g1", "n4", "n5", "n6", "n7", "n8"]

    asyncio.run(main())


def test_a_tenant_with_several_keys_is_each_and_one_with_many_salts_is_one() -> None:
    async def main() -> None:
        store = ResponseStore(6, 1 << 20, by_key=True)
        await store.put("b", response(BERT))
        for i in range(20):
            assert await store.put(f"a{i}", response((ANNA[0], bytes([i]))))
        assert "b" in set(store)
        store = ResponseStore(6, 1 << 20)  # one key at most: whoever has it may tell his own callers apart
        await store.put("b", response((None, b"b")))
        for i in range(20):
            assert await store.put(f"a{i}", response((None, b"a")))
        assert "b" in set(store)

    asyncio.run(main())


def test_what_is_too_large_beside_others_changes_nothing() -> None:
    async def main() -> None:
        store = ResponseStore(100, 100_000, by_key=True)
        for i in range(10):
            assert await store.put(f"a{i}", response(ANNA, 4_000))
            assert await store.put(f"b{i}", response(BERT, 2_000))
        before = list(store)
        assert not await store.put("large", response(BERT, 90_000))  # alone it would be the larger share
        assert list(store) == before and store.n_bytes == 60_000
        assert await store.put("fits", response(BERT, 45_000))
        assert kept_of(store, BERT) == [*(f"b{i}" for i in range(3, 10)), "fits"] and len(kept_of(store, ANNA)) == 10
        assert not await store.put("never", response(CARL, 100_001))

    asyncio.run(main())


# -------------------------------------------------------------------- from another process


def test_who_does_not_wait_for_an_answer_gets_nobody_else_s() -> None:
    class Slow(ResponseStore):
        may_answer = asyncio.Event()

        async def get(self, owner: Owner, id_: str) -> Stored | None:
            await self.may_answer.wait()
            return await super().get(owner, id_)

    async def main() -> None:
        store = Slow(10, 1 << 20)
        first, second = response(ANNA, 5000), response(ANNA, 6000)
        assert await store.put("1", first) and await store.put("2", second)
        async with asked_for(store) as other:
            asking = [asyncio.ensure_future(other.get(ANNA, id_)) for id_ in ("1", "2", "3")]
            while len(other._asked) < 3:
                await asyncio.sleep(0)
            asking[0].cancel()
            store.may_answer.set()
            assert await asking[1] == second and await asking[2] is None
            assert asking[0].cancelled() and not other._asked

    asyncio.run(main())


def test_one_whose_keeper_has_ended_keeps_nothing() -> None:
    class Silent(ResponseStore):
        asked = asyncio.Event()

        async def get(self, owner: Owner, id_: str) -> Stored | None:
            self.asked.set()
            await asyncio.Event().wait()
            return None

    async def main() -> None:
        store, other = Silent(10, 1 << 20), SharedStore(True)
        keeps, asks = socket.socketpair()
        async with shared(other, [asks]):
            async with shared(store, [keeps]):
                assert await other.put("1", response(ANNA))
                asking = asyncio.ensure_future(other.get(ANNA, "1"))
                await store.asked.wait()
            calls: list[Callable[[], Awaitable[Any]]] = [
                lambda: asking,
                lambda: other.get(ANNA, "1"),
                lambda: other.with_item(ANNA, "1"),
                lambda: other.delete(ANNA, "1"),
            ]
            for call in calls:
                with pytest.raises(HTTPError) as caught:
                    await call()
                assert (caught.value.status, caught.value.code) == (503, "shutting_down")
            assert not await other.put("2", response(ANNA))

    asyncio.run(main())


def test_the_ends_of_each_process_are_its_own() -> None:
    links = [Links(3) for _ in range(3)]  # as three processes have them
    ends = [one.of(number) for number, one in enumerate(links)]
    assert [len(one) for one in ends] == [2, 1, 1]
    for one, own in zip(links, ends, strict=True):
        is_open = [end for pair in one._pairs for end in pair if end.fileno() >= 0]
        assert sorted(map(id, is_open)) == sorted(map(id, own))
        one.close()
        assert all(end.fileno() < 0 for end in own)


def test_what_one_process_answered_another_one_has(chat_model: Path) -> None:
    path, body = "/v1/responses", {"input": "Hello", "seed": 3, "max_output_tokens": 6}

    async def test(clients: list[Client]) -> None:
        first, second = clients
        answers = [(await one.post(path, body)).json for one in clients]
        for one, other, answer in ((first, second, answers[1]), (second, first, answers[0])):
            assert answer["store"] is True
            assert (await one.get(f"{path}/{answer['id']}")).json == answer
            assert (await one.get(f"{path}/{answer['id']}?cache_salt=x")).status == 404
            more = {"previous_response_id": answer["id"]}
            gone_on = [await client.post(path, {**body, **more}) for client in clients]
            assert gone_on[0].json["output"][0]["content"] == gone_on[1].json["output"][0]["content"]
            reference = [{"type": "item_reference", "id": answer["output"][0]["id"]}]
            assert (await one.post(path, {**body, "input": reference})).status == 200
            assert (await one.call("DELETE", f"{path}/{answer['id']}")).json["deleted"] is True
            assert (await other.get(f"{path}/{answer['id']}")).status == 404
        large = (await second.post(path, {**body, "metadata": {"a": "x" * 20_000}})).json
        assert large["store"] is False and (await first.get(f"{path}/{large['id']}")).status == 404

    async def main(engine: Engine) -> None:
        ends = socket.socketpair()
        models = Models([ServedModel("tiny", engine)])
        settings = Settings(log_format="none", max_stored_bytes=20_000)
        apps = [App(settings, Siblings("", number, 2, [end])) for number, end in enumerate(ends)]
        async with shared(apps[0].store, ends[:1]), shared(apps[1].store, ends[1:]):
            for app in apps:
                app.start(models)
            await test([Client(app) for app in apps])

    with Engine(chat_model, max_sequences=8) as engine:
        asyncio.run(main(engine))
