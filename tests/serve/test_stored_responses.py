"""Responses that are kept: what goes on from one is what the whole conversation gives, for its owner alone, within bounds."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("prometheus_client", reason="the extra serve is not installed")

from serve.client import Answer, Client, serving
from serve.scripted import scripted
from serve.test_responses import CALLED, ONE, WEATHER, events
from serve.test_server import server

PATH = "/v1/responses"
HELLO: dict[str, Any] = {"input": "Hello", "seed": 3, "max_output_tokens": 6}


def text_of(answer: Answer) -> str:
    assert answer.status == 200, answer.body
    text: str = answer.json["output"][0]["content"][0]["text"]
    return text


# -------------------------------------------------------------------- conversations


def test_a_turn_that_goes_on_is_the_whole_conversation(chat_model: Path) -> None:
    async def test(client: Client) -> None:
        said: list[Any] = []
        previous = None
        for text in ("Hello", "And then?", "So."):
            said.append({"role": "user", "content": text})
            body = {**HELLO, "instructions": f"Say {text}"}  # of this turn alone
            whole = await client.post(PATH, {**body, "input": said, "store": False})
            gone_on = await client.post(PATH, {**body, "input": text, "previous_response_id": previous})
            assert text_of(gone_on) == text_of(whole)
            assert gone_on.json["usage"]["input_tokens"] == whole.json["usage"]["input_tokens"]
            assert (gone_on.json["previous_response_id"], gone_on.json["store"]) == (previous, True)
            assert (whole.json["previous_response_id"], whole.json["store"]) == (None, False)
            said += gone_on.json["output"]
            previous = gone_on.json["id"]
        unkept = await client.get(f"{PATH}/{whole.json['id']}")
        assert unkept.status == 404 and unkept.error["code"] == "response_not_found"

    serving(chat_model, test)


def test_two_turns_may_go_on_from_one(chat_model: Path) -> None:
    async def test(client: Client) -> None:
        first = (await client.post(PATH, HELLO)).json
        bodies = [{**HELLO, "input": text, "previous_response_id": first["id"]} for text in ("a", "bc")]
        answers = [await client.post(PATH, body) for body in bodies]
        assert [text_of(await client.post(PATH, body)) for body in bodies] == [text_of(one) for one in answers]
        items = [(await client.get(f"{PATH}/{one.json['id']}/input_items?order=asc")).json["data"] for one in answers]
        assert items[0][:2] == items[1][:2] and items[0][2]["content"] != items[1][2]["content"]

    serving(chat_model, test)


def test_a_response_is_given_back_as_it_was_answered(chat_model: Path) -> None:
    async def test(client: Client) -> None:
        whole = await client.post(PATH, {**HELLO, "metadata": {"a": "b"}})
        streamed = events(await client.post(PATH, {**HELLO, "stream": True}))[-1]["response"]
        for answered in (whole.json, streamed):
            for path in (PATH, "/responses"):
                again = await client.get(f"{path}/{answered['id']}?include=reasoning.encrypted_content&stream=false")
                assert again.status == 200 and again.json == answered
        assert again.headers["content-type"] == "application/json"
        head = await client.call("HEAD", f"{PATH}/{streamed['id']}")
        assert head.status == 200 and head.body == b""

    serving(chat_model, test)


def test_a_deleted_response_is_gone_and_those_after_it_stay(chat_model: Path) -> None:
    async def test(client: Client) -> None:
        first = (await client.post(PATH, HELLO)).json
        second = (await client.post(PATH, {**HELLO, "previous_response_id": first["id"]})).json
        third = {**HELLO, "input": "So.", "previous_response_id": second["id"]}
        wanted = text_of(await client.post(PATH, third))
        gone = await client.call("DELETE", f"{PATH}/{first['id']}")
        assert gone.status == 200 and gone.json == {"id": first["id"], "object": "response", "deleted": True}
        for method, path in (("GET", ""), ("DELETE", ""), ("GET", "/input_items")):
            answer = await client.call(method, f"{PATH}/{first['id']}{path}")
            assert (answer.status, answer.error["code"]) == (404, "response_not_found")
        answer = await client.post(PATH, {**HELLO, "previous_response_id": first["id"]})
        assert (answer.status, answer.error["param"]) == (400, "previous_response_id")
        assert answer.error["code"] == "previous_response_not_found"
        assert text_of(await client.post(PATH, third)) == wanted

    serving(chat_model, test)


def test_input_items_are_listed_by_pages(chat_model: Path) -> None:
    said = [{"role": "user", "content": str(i)} for i in range(7)]
    said.insert(3, {"role": "assistant", "content": [{"type": "output_text", "text": "Yes"}]})

    async def test(client: Client) -> None:
        first = (await client.post(PATH, {**HELLO, "input": said, "instructions": "Be brief"})).json
        second = (await client.post(PATH, {**HELLO, "previous_response_id": first["id"]})).json

        async def page(query: str) -> Any:
            answer = await client.get(f"{PATH}/{second['id']}/input_items{query}")
            assert answer.status == 200, answer.body
            return answer.json

        everything = await page("?order=asc&limit=100")
        texts = [item["content"][0]["text"] for item in everything["data"]]
        assert texts == ["0", "1", "2", "Yes", "3", "4", "5", "6", first["output"][0]["content"][0]["text"], "Hello"]
        assert everything["object"] == "list" and not everything["has_more"]
        assert len({item["id"] for item in everything["data"]}) == 10
        assert everything["data"][8] == first["output"][0]
        backwards = await page("")
        assert backwards["data"] == everything["data"][::-1]
        found: list[Any] = []
        query = "?order=asc&limit=4"
        while True:
            one = await page(query)
            found += one["data"]
            assert (one["first_id"], one["last_id"]) == (one["data"][0]["id"], one["data"][-1]["id"])
            if not one["has_more"]:
                break
            query = f"?order=asc&limit=4&after={one['last_id']}"
        assert found == everything["data"]
        ids = [item["id"] for item in found]
        assert (await page(f"?order=asc&before={ids[2]}"))["data"] == found[:2]
        assert await page(f"?after={ids[0]}") == {
            "object": "list", "data": [], "first_id": None, "last_id": None, "has_more": False
        }  # fmt: skip

    serving(chat_model, test)


def test_what_is_wrong_in_a_query_is_refused_by_its_name(chat_model: Path) -> None:
    async def test(client: Client) -> None:
        path = f"{PATH}/{(await client.post(PATH, HELLO)).json['id']}"
        wrong = [
            ("", "stream=true", "stream"), ("", "starting_after=3", "starting_after"), ("", "include=x", "include[0]"),
            ("", "cache_salt=", "cache_salt"), ("", "cache_salt=a&cache_salt=b", "cache_salt"),
            ("/input_items", "limit=0", "limit"), ("/input_items", "limit=101", "limit"), ("/input_items", "limit=x", "limit"),
            ("/input_items", "limit=" + "9" * 5000, "limit"), ("/input_items", "order=up", "order"),
            ("/input_items", "after=msg_1", "after"), ("/input_items", "before=", "before"),
            ("/input_items", "nonsense=1", "nonsense"),
        ]  # fmt: skip
        for more, query, param in wrong:
            answer = await client.get(f"{path}{more}?{query}")
            assert (answer.status, answer.error["param"]) == (400, param), (query, answer.body)
        assert (await client.call("DELETE", f"{path}?limit=1")).error["param"] == "limit"
        for elsewhere in (f"{path}/", f"{path}/cancel", f"{PATH}/", f"{path}/input_items/x"):
            assert (await client.get(elsewhere)).status == 404
        assert (await client.post(path, {})).status == 405

    serving(chat_model, test)


# -------------------------------------------------------------------- calls


def test_calls_are_gone_on_from_and_referred_to(
    tool_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The prompt is that of the items themselves, however they are said to be meant."""
    scripted(monkeypatch, ONE)
    body = {**HELLO, "tools": [WEATHER], "max_output_tokens": 300}
    user = {"role": "user", "content": "Hello"}

    async def test(client: Client) -> None:
        first = (await client.post(PATH, body)).json
        (call,) = first["output"]
        result = {"type": "function_call_output", "call_id": call["call_id"], "output": "wet"}
        ways = [
            {"input": [user, call, result], "store": False},
            {"input": [user, {"type": "item_reference", "id": call["id"]}, result]},
            {"input": [result], "previous_response_id": first["id"]},
        ]
        answers = [await client.post(PATH, {**body, **way}) for way in ways]
        assert [answer.status for answer in answers] == [200] * 3, [answer.body for answer in answers]
        assert len({answer.json["usage"]["input_tokens"] for answer in answers}) == 1
        listed = [
            (await client.get(f"{PATH}/{answer.json['id']}/input_items?order=asc")).json["data"]
            for answer in answers[1:]
        ]
        for items in listed:
            assert [item["type"] for item in items] == ["message", "function_call", "function_call_output"]
            assert items[1] == call and items[2] == {**result, "id": items[2]["id"], "status": "completed"}
        wrong = {"input": [{**result, "call_id": "other"}], "previous_response_id": first["id"]}
        answer = await client.post(PATH, {**body, **wrong})
        assert (answer.status, answer.error["param"]) == (400, "input[0].call_id")

    serving(tool_model("qwen", ()), test)


def test_a_call_that_was_cut_cannot_be_gone_on_from(
    tool_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, ONE)

    async def test(client: Client) -> None:
        n_tokens = (await client.post(PATH, {**HELLO, "tools": [WEATHER], "max_output_tokens": 300})).json["usage"]
        for limit in range(1, n_tokens["output_tokens"]):
            cut = (await client.post(PATH, {**HELLO, "tools": [WEATHER], "max_output_tokens": limit})).json
            last = cut["output"][-1]
            if last["type"] == "function_call" and last["arguments"] != CALLED["arguments"]:
                break
        answer = await client.post(PATH, {**HELLO, "previous_response_id": cut["id"]})
        assert (answer.status, answer.error["param"]) == (400, "previous_response_id[1].arguments")

    serving(tool_model("qwen", ()), test)


# -------------------------------------------------------------------- whose


def test_nobody_finds_what_is_another_s(chat_model: Path) -> None:
    callers: list[tuple[str, str | None]] = [("one", None), ("one", "a"), ("one", "b"), ("two", None), ("two", "a")]

    async def test(client: Client) -> None:
        kept = {}
        for key, salt in callers:
            headers = {"authorization": f"Bearer {key}"}
            body = {**HELLO, "cache_salt": salt}
            kept[key, salt] = (await client.post(PATH, body, headers=headers)).json
        for key, salt in callers:
            headers = {"authorization": f"Bearer {key}"}
            query = "" if salt is None else f"?cache_salt={salt}"
            for owner, response in kept.items():
                id_, item_id = response["id"], response["output"][0]["id"]
                is_own = owner == (key, salt)
                right = 200 if is_own else 404
                for path in (f"{PATH}/{id_}{query}", f"{PATH}/{id_}/input_items{query}"):
                    assert (await client.get(path, headers=headers)).status == right
                reference = [{"type": "item_reference", "id": item_id}]
                for more in ({"previous_response_id": id_}, {"input": reference}):
                    body = {**HELLO, **more, "cache_salt": salt, "store": False}
                    answer = await client.post(PATH, body, headers=headers)
                    assert answer.status == (200 if is_own else 400), answer.body
                if not is_own:
                    answer = await client.call("DELETE", f"{PATH}/{id_}{query}", headers=headers)
                    assert answer.status == 404
                    assert text_of_nobody(answer) == text_of_nobody(await client.get(f"{PATH}/resp_0", headers=headers))
        assert len(client.app.store) == len(callers)
        assert (await client.get(f"{PATH}/{kept['one', None]['id']}")).status == 401

    def text_of_nobody(answer: Answer) -> str:
        message: str = answer.error["message"]
        return message.split("'")[0] + message.split("'")[2]

    serving(chat_model, test, api_keys=("one", "two"))


# -------------------------------------------------------------------- by the package of OpenAI


def test_the_openai_package_keeps_a_conversation(chat_model: Path) -> None:
    openai: Any = pytest.importorskip("openai", reason="the package openai is not installed")
    options = {"model": "mine", "max_output_tokens": 6, "extra_body": {"seed": 3}}
    with (
        server("-m", f"mine={chat_model}", "--log-format", "none") as (_, port),
        openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none") as client,
    ):
        first = client.responses.create(input="Hello", **options)
        *_, last = client.responses.create(input="And then?", previous_response_id=first.id, stream=True, **options)
        second = last.response
        assert second.previous_response_id == first.id and second.status == "incomplete"
        assert client.responses.retrieve(second.id).output_text == second.output_text
        items = list(client.responses.input_items.list(second.id, order="asc", limit=2))  # pages follow each other
        assert [item.type for item in items] == ["message"] * 3
        assert [item.content[0].text for item in items] == ["Hello", first.output_text, "And then?"]
        client.responses.delete(first.id)
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(first.id)
        with pytest.raises(openai.BadRequestError) as caught:
            client.responses.create(input="So.", previous_response_id=first.id, **options)
        assert caught.value.param == "previous_response_id"
        third = client.responses.create(input="So.", previous_response_id=second.id, **options)
        assert third.usage.input_tokens > second.usage.input_tokens


# -------------------------------------------------------------------- bounds


def test_the_least_recently_used_make_room(chat_model: Path) -> None:
    async def test(client: Client) -> None:
        ids = [(await client.post(PATH, HELLO)).json["id"] for _ in range(3)]
        assert (await client.get(f"{PATH}/{ids[0]}")).status == 200
        ids.append((await client.post(PATH, HELLO)).json["id"])
        assert [(await client.get(f"{PATH}/{one}")).status for one in ids] == [200, 404, 200, 200]
        metrics = (await client.get("/metrics")).body.decode()
        assert "pyengine:stored_responses 3.0" in metrics
        assert f"pyengine:stored_responses_bytes {float(client.app.store.n_bytes)}" in metrics

    serving(chat_model, test, max_stored_responses=3)


def test_what_there_is_no_room_for_says_that_it_is_not_kept(chat_model: Path) -> None:
    async def test(client: Client) -> None:
        small = (await client.post(PATH, {**HELLO, "max_output_tokens": 1})).json
        assert small["store"] is True
        body = {**HELLO, "metadata": {"a": "x" * 5000}}
        large = (await client.post(PATH, body)).json
        streamed = events(await client.post(PATH, {**body, "stream": True}))[-1]["response"]
        for one in (large, streamed):
            assert one["store"] is False
            assert (await client.get(f"{PATH}/{one['id']}")).status == 404
        assert (await client.get(f"{PATH}/{small['id']}")).status == 200  # made no room for what does not fit

    serving(chat_model, test, max_stored_bytes=5000)


def test_few_words_cannot_name_more_than_a_body_may_hold(chat_model: Path) -> None:
    """Ids and such are in no prompt, so a conversation may be longer than the model's context."""
    items = [{"role": "user", "content": "Hello", "id": "x" * 3000}]

    async def test(client: Client) -> None:
        first = (await client.post(PATH, {**HELLO, "input": items})).json
        second = (await client.post(PATH, {**HELLO, "input": items, "previous_response_id": first["id"]})).json
        answer = await client.post(PATH, {**HELLO, "previous_response_id": second["id"]})
        assert (answer.status, answer.error["param"]) == (413, "previous_response_id"), answer.body
        references = [{"type": "item_reference", "id": one["output"][0]["id"]} for one in (first, second)]
        assert (await client.post(PATH, {**HELLO, "input": references[:1]})).status == 200
        answer = await client.post(PATH, {**HELLO, "input": references})
        assert (answer.status, answer.error["param"]) == (413, "input"), answer.body

    serving(chat_model, test, max_body_bytes=8000)


def test_an_item_is_referred_to_once(chat_model: Path) -> None:
    async def test(client: Client) -> None:
        first = (await client.post(PATH, HELLO)).json
        reference = {"type": "item_reference", "id": first["output"][0]["id"]}
        answer = await client.post(PATH, {**HELLO, "input": [reference, {"role": "user", "content": "a"}, reference]})
        assert (answer.status, answer.error["param"]) == (400, "input[2].id") and "twice" in answer.error["message"]

    serving(chat_model, test)


def test_a_server_that_keeps_nothing_says_so(chat_model: Path) -> None:
    async def test(client: Client) -> None:
        answer = await client.post(PATH, {**HELLO, "store": True})
        assert (answer.status, answer.error["param"]) == (400, "store")
        assert "--max-stored-responses 0" in answer.error["message"]
        response = (await client.post(PATH, HELLO)).json
        assert response["store"] is False and (await client.get(f"{PATH}/{response['id']}")).status == 404

    serving(chat_model, test, max_stored_responses=0)


def test_a_response_that_nobody_waited_for_is_not_kept(chat_model: Path) -> None:
    async def test(client: Client) -> None:
        may_end = threading.Event()
        model = client.app.models.get(None)
        step = model.engine.scheduler.step

        def held_step() -> bool:
            if any(job.requests[0].output.pieces for job in client.app.queue.jobs()):  # type: ignore[attr-defined]
                may_end.wait()
            return step()

        model.engine.scheduler.step = held_step  # type: ignore[method-assign]
        call = client.begin("POST", PATH, {**HELLO, "max_output_tokens": 300, "ignore_eos": True, "stream": True})
        try:
            await call.until(lambda answer: bool(answer.writes))
            call.hang_up()
            await call.task
        finally:
            may_end.set()
        assert len(client.app.store) == 0 and not call.answer.is_complete

    serving(chat_model, test)
