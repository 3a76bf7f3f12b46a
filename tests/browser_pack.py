"""A custom node of the browser tests only: lets a test send events to the page as a node in the middle of
its work would.
"""

from aiohttp import web
from server import PromptServer

NODE_CLASS_MAPPINGS: dict[str, type] = {}


@PromptServer.instance.routes.post("/g2rpo_test/event")
async def send(request: web.Request) -> web.Response:
    """Send {"name", "data"} to every page."""
    event = await request.json()
    PromptServer.instance.send_sync(event["name"], event["data"])
    return web.json_response({})
