"""The addresses of the service, and their description in OpenAPI, made from the forms that check requests."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic.json_schema import models_json_schema

from comfy_g2rpo import __version__
from comfy_g2rpo.files.spool import NAME

from .job_schema import Form, GraphRequest, JobRequest

ID, PICTURE, AFTER = NAME.pattern, r"[a-z_]{1,40}\.png", r"\d{1,9}"
STEP, FILE = r"\d{1,12}", r"\d{3}(?:-start\.png|\.png|\.webp)"
PARTS = {"id": ID, "name": PICTURE, "step": STEP, "file": FILE}
"""What may stand in an address, by name."""
Status = Literal["waiting", "running", "done", "failed", "cancelled"]
Whole = Annotated[int, Field(ge=0)]


class ErrorForm(Form):
    """Why a request is not served."""

    error: str


class HealthForm(Form):
    """That the service is there: jobs that wait or run, and how many may."""

    ok: bool
    open: Whole
    queue: Whole


class TakenForm(Form):
    """A job that was taken; `new` is false for one that was there already."""

    id: str
    status: Status
    new: bool


class CancelForm(Form):
    """How a job stands once its end was asked for."""

    id: str
    status: Status


class ShortForm(Form):
    """How a job stands."""

    id: str
    status: Status
    submitted: str
    source: str
    step: Whole | None
    seconds: float | None


class JobsForm(Form):
    """Jobs, the newest first."""

    jobs: list[ShortForm]


class FileForm(Form):
    """A file that can be fetched."""

    name: str
    bytes: Whole
    sha256: str


class LoraForm(Form):
    """The LoRA that a job has so far."""

    step: Whole
    bytes: Whole
    sha256: str | None


class RowsForm(Form):
    """Some rows of metrics, and the line of the last of them; none where there are no more for now."""

    rows: list[dict[str, Any]]
    line: Whole


class SampleForm(Form):
    """A picture of a held-out prompt; `files` are its file, and those that belong to it."""

    prompt: str
    seed: int
    scores: dict[str, float | None]
    frames: int
    files: list[FileForm]


class SamplesForm(Form):
    """The pictures of a step."""

    step: Whole
    samples: list[SampleForm]


class JobForm(ShortForm):
    """All of a job; `ended` names its end, `samples` the steps that have pictures."""

    recipe: dict[str, Any]
    settings: list[str]
    steps: Whole | None
    error: str | None
    ended: str | None
    lora: LoraForm | None
    samples: list[Whole]
    pictures: list[str]
    report: bool


@dataclass(frozen=True)
class Route:
    """One address with one method: who answers, with what, and in a sentence what for."""

    method: str
    address: str
    handler: str
    sentence: str
    form: type[Form] | None = None
    kind: str = "application/json"
    refusals: tuple[int, ...] = ()
    after: bool = False

    @property
    def pattern(self) -> re.Pattern[str]:
        """Return what its path looks like."""
        pattern = re.escape(self.address)
        for name, form in PARTS.items():
            pattern = pattern.replace(rf"\{{{name}\}}", f"({form})")
        return re.compile(pattern, re.ASCII)

    @property
    def query(self) -> re.Pattern[str] | None:
        """Return what its query looks like, if it takes one."""
        return re.compile(f"after=({AFTER})", re.ASCII) if self.after else None


JOB = "/jobs/{id}"
SUBMIT = "Submit a job, by a recipe or of a graph; sent again with its id and content, it is the same job."
ROUTES = (
    Route("GET", "/health", "health", "See that the service is there.", HealthForm),
    Route("GET", "/openapi.json", "openapi", "Get this document."),
    Route("GET", "/jobs", "jobs", "List jobs, the newest first.", JobsForm),
    Route("POST", "/jobs", "submit", SUBMIT, TakenForm, refusals=(400, 408, 409, 411, 413, 415, 429)),
    Route("GET", JOB, "job", "Get all of a job.", JobForm, refusals=(404,)),
    Route("DELETE", JOB, "cancel", "End a job that waits or runs.", CancelForm, refusals=(404, 409)),
    Route(
        *("GET", f"{JOB}/events", "events"),
        "Watch a job: events metrics (a row, its id is the line), state and end; after=N leaves out N lines.",
        kind="text/event-stream",
        refusals=(404, 429),
        after=True,
    ),
    Route(
        *("GET", f"{JOB}/metrics", "metrics", "Get rows of metrics; after=N leaves out N lines.", RowsForm),
        refusals=(404,),
        after=True,
    ),
    Route(
        *("GET", f"{JOB}/samples/{{step}}", "samples", "List the pictures of a step.", SamplesForm),
        refusals=(404,),
    ),
    Route(
        *("GET", f"{JOB}/samples/{{step}}/{{file}}", "sample", "Get a picture of a step."),
        kind="application/octet-stream",
        refusals=(404,),
    ),
    Route(
        *("GET", f"{JOB}/lora", "lora", "Get the LoRA: the result, or the newest so far."),
        kind="application/octet-stream",
        refusals=(404,),
    ),
    Route(
        *("GET", f"{JOB}/pictures/{{name}}", "picture", "Get curves.png or before_after.png."),
        kind="image/png",
        refusals=(404,),
    ),
    Route("GET", f"{JOB}/report", "report", "Get the summary of a finished run.", refusals=(404,)),
)
EVERYWHERE = (400, 401, 403, 421)
SAID = {
    400: "A mistake in the request.",
    401: "No token, or a wrong one.",
    403: "A browser.",
    404: "Not there, or not yet.",
    408: "The body did not come in time.",
    409: "Another job has that id, or the job has ended.",
    411: "No Content-Length.",
    413: "More than 256 KiB.",
    415: "Not application/json.",
    421: "Another name than the service has.",
    429: "No room for now.",
}


@cache
def document() -> dict[str, Any]:
    """Return the description of all addresses."""
    forms = [JobRequest, GraphRequest, ErrorForm, *(route.form for route in ROUTES if route.form)]
    pairs = [(form, "validation") for form in dict.fromkeys(forms)]
    named, whole = models_json_schema(pairs, ref_template="#/components/schemas/{model}")
    paths: dict[str, dict[str, Any]] = {}
    for route in ROUTES:
        paths.setdefault(route.address, {})[route.method.lower()] = _operation(route, named)
    bearer = {"type": "http", "scheme": "bearer", "description": "The token of the service's token file."}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "g2rpo serve",
            "version": __version__,
            "description": "Training runs on this machine.",
        },
        "security": [{"token": []}],
        "paths": paths,
        "components": {"schemas": whole["$defs"], "securitySchemes": {"token": bearer}},
    }


def _operation(route: Route, named: Any) -> dict[str, Any]:
    """Describe one address with one method."""
    good = {"schema": named[(route.form, "validation")]} if route.form else {}
    if route.kind == "application/json" and not good:
        good = {"schema": {"type": "object"}}
    error = {"application/json": {"schema": named[(ErrorForm, "validation")]}}
    answers: dict[str, Any] = {"200": {"description": route.sentence, "content": {route.kind: good}}}
    for status in sorted({*EVERYWHERE, *route.refusals}):
        answers[str(status)] = {"description": SAID[status], "content": error}
    operation = {"operationId": route.handler, "summary": route.sentence, "responses": answers}
    wanted = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string", "pattern": f"^{form}$"}}
        for name, form in PARTS.items()
        if f"{{{name}}}" in route.address
    ]
    if route.after:
        whole = {"type": "integer", "minimum": 0, "maximum": 999_999_999, "default": 0}
        wanted.append({"name": "after", "in": "query", "required": False, "schema": whole})
    if route.method == "POST":
        either = [named[(form, "validation")] for form in (JobRequest, GraphRequest)]
        body = {"application/json": {"schema": {"oneOf": either}}}
        operation["requestBody"] = {"required": True, "content": body}
    return operation | ({"parameters": wanted} if wanted else {})
