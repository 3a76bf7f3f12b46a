"""Two pages and a script at one ComfyUI: each hears of its own graph, and nobody of another's; what a script
reads in /history.
"""

import asyncio
import json
import struct
from typing import Any

import aiohttp
import pytest
from comfy_host import Server
from test_nodes_continuing import SHORT
from test_nodes_training import TRAIN

pytestmark = [pytest.mark.comfyui, pytest.mark.long, pytest.mark.xdist_group("served")]

WIRES = {"model": ["load", 0], "clip": ["load", 1], "vae": ["load", 2]}


def graph(run: str, seed: int) -> dict[str, Any]:
    """Build a graph whose nodes have ids of their own: a short run, and scores of an image."""
    wire = {"reward": [f"reward-{run}", 0]}
    color = {"width": 64, "height": 64, "batch_size": 1, "color": seed}
    return {
        "load": {"class_type": "G2RPO_TinyDemoLoader", "inputs": {}},
        f"reward-{run}": {"class_type": "G2RPO_LoadReward", "inputs": {"reward": "agreement"}},
        f"train-{run}": {
            "class_type": "G2RPO_TrainLoRA",
            "inputs": {**WIRES, **wire, **TRAIN, **SHORT, "run": run, "seed": seed},
        },
        "image": {"class_type": "EmptyImage", "inputs": color},
        f"score-{run}": {
            "class_type": "G2RPO_ScoreImages",
            "inputs": {"images": ["image", 0], **wire, "prompt": f"a red circle of {run}"},
        },
    }


async def hear(socket: aiohttp.ClientWebSocketResponse, heard: list[tuple[str, str]]) -> None:
    """Note what a page hears: the kind of a message and its content."""
    async for message in socket:
        if message.type == aiohttp.WSMsgType.BINARY:
            (kind,) = struct.unpack(">I", message.data[:4])
            heard.append((f"binary {kind}", message.data[4:].decode("utf-8", "replace")))
        elif message.type == aiohttp.WSMsgType.TEXT:
            heard.append((json.loads(message.data)["type"], message.data))


async def talk(url: str, askers: dict[str, str | None]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Queue a run for every asker, by its client id; return what each page heard, and all histories."""
    heard: dict[str, list[tuple[str, str]]] = {client: [] for client in askers.values() if client}
    async with aiohttp.ClientSession(url) as session:
        sockets = {client: await session.ws_connect(f"/ws?clientId={client}") for client in heard}
        tasks = [asyncio.create_task(hear(sockets[client], heard[client])) for client in heard]
        prompts = {}
        for seed, (run, client) in enumerate(askers.items()):
            body = {"prompt": graph(run, seed), **({"client_id": client} if client else {})}
            async with session.post("/prompt", json=body) as answer:
                prompts[run] = (await answer.json())["prompt_id"]
        ended: dict[str, Any] = {}
        while len(ended) < len(askers):
            await asyncio.sleep(0.1)
            for run, prompt in prompts.items():
                async with session.get(f"/history/{prompt}") as answer:
                    if (history := await answer.json()).get(prompt):
                        ended[run] = history[prompt]
        await asyncio.sleep(0.3)
        for socket in sockets.values():
            await socket.close()
        await asyncio.gather(*tasks)
    return heard, ended


@pytest.fixture(scope="module")
def talked(served: Server) -> tuple[dict[str, Any], dict[str, Any]]:
    """Let two pages and a script without a client id ask, one after the other, twice."""
    askers = {"of-one": "one", "of-script": None, "of-other": "other", "of-script-again": None}
    return asyncio.run(talk(served.url, askers))


def ours(heard: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Pick our events, and texts on nodes."""
    assert "binary 3" not in dict(heard)  # core's progress text, which enlarges a node
    return [(kind, text) for kind, text in heard if kind in ("g2rpo.text", "g2rpo.progress")]


@pytest.mark.parametrize(("client", "run"), [("one", "of-one"), ("other", "of-other")])
def test_a_page_hears_of_its_own_graph_alone(talked: Any, client: str, run: str) -> None:
    heard, ended = talked
    assert [entry["status"]["status_str"] for entry in ended.values()] == ["success"] * 4
    mine = ours(heard[client])
    texts = [text for kind, text in mine if kind != "g2rpo.progress"]
    events = [json.loads(text)["data"] for kind, text in mine if kind == "g2rpo.progress"]
    assert any(f"train-{run}" in text and "1 step costs" in text for text in texts)
    assert any(f"score-{run}" in text for text in texts)
    assert all(f"-{run}" in text and f"-{run}-" not in text for text in texts), texts
    assert events and {(event["node"], event["run"]) for event in events} == {(f"train-{run}", run)}
    assert events[-1]["phase"] == "done"


def test_no_output_of_ours_reaches_another_page(talked: Any) -> None:
    heard, _ = talked
    for client, run in (("one", "of-one"), ("other", "of-other")):
        outputs = [json.loads(text)["data"] for kind, text in heard[client] if kind == "executed"]
        nodes = {data["node"] for data in outputs}
        assert (
            {f"train-{run}", f"score-{run}"}
            <= nodes
            <= {f"{node}-{run}" for node in ("train", "score", "reward")}
        )


def test_history_tells_a_script_what_came_out(talked: Any, served: Server) -> None:
    _, ended = talked
    output = ended["of-script"]["outputs"]["train-of-script"]
    (result,) = output["g2rpo_result"]
    assert (result["run"], result["steps"], output["g2rpo_run"]) == ("of-script", 1, ["of-script"])
    loader = served.get("/object_info/LoraLoaderModelOnly")["LoraLoaderModelOnly"]
    assert result["lora"] in json.dumps(loader["input"]["required"]["lora_name"])
    for name in ("reward_after", "heldout_after"):
        assert set(result[name]) == {"agreement"}
