"""What stands between a browser and gradio's server: who may ask for what.

Gradio serves more routes than the page needs, accepts a file's path from whoever names it, and shows an upload to
everyone who knows its path. Here a request passes only if it comes from the page itself, asks for what the page needs,
and names no file but what the same browser has uploaded or was given.
"""

import contextlib
import dataclasses
import ipaddress
import json
import re
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from urllib.parse import parse_qs

from fastapi.requests import HTTPConnection
from fastapi.responses import PlainTextResponse

# Gradio's routes that the page's scripts call, beside what looks the same to everyone.
OPEN = re.compile(r"/|/theme\.css|/favicon\.ico|/manifest\.json|/(assets|static)/.*")
ROUTES = {
    "GET": re.compile(r"/gradio_api/(file=.+|queue/data|upload_progress|heartbeat/\w+)"),
    "HEAD": re.compile(r"/gradio_api/file=.+"),
    "POST": re.compile(r"/gradio_api/(upload|queue/join|cancel|reset)"),
}
FILE = "/gradio_api/file="
HEARTBEAT = "/gradio_api/heartbeat/"
LARGEST_MESSAGE = 2**20  # bytes of a request that is no upload
# The page's scripts are inline and compile templates. Nothing comes from, or goes to, another server, and no other page
# may show this one in a frame.
HEADERS = (
    (
        b"content-security-policy",
        b"default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
        b"img-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; object-src 'none'; "
        b"base-uri 'self'; form-action 'none'; frame-ancestors 'none'",
    ),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
)


@dataclasses.dataclass(eq=False)
class Visitors:
    """Browsers, each known by a cookie, and what they have: open tabs (gradio's sessions) and files."""

    folder: Path  # of all their files
    largest_folder: int  # bytes
    known: set[str] = dataclasses.field(default_factory=set)
    sessions: dict[str, str] = dataclasses.field(default_factory=dict)  # session: visitor
    uploads: dict[str, str] = dataclasses.field(default_factory=dict)  # upload, as the page names it: visitor
    # File: visitors. Gradio names uploads by their content, so that two may have uploaded the same file.
    owners: dict[str, set[str]] = dataclasses.field(default_factory=dict)

    def own(self, path: Path, visitor: str) -> None:
        """From now on the visitor may read the file, and send its path."""
        self.owners.setdefault(str(path), set()).add(visitor)

    def owns(self, path: str, visitor: str) -> bool:
        return visitor in self.owners.get(path, ())

    def remove(self, folder: Path) -> None:
        """Delete a folder of files that the page has made."""
        for path in [path for path in self.owners.copy() if Path(path).parent == folder]:
            self.owners.pop(path, None)
        shutil.rmtree(folder, ignore_errors=True)

    def leave(self, session: str) -> None:
        """A tab was closed. With a visitor's last one, what the visitor has uploaded is deleted."""
        visitor = self.sessions.pop(session, None)
        if visitor is None or visitor in self.sessions.values():
            return
        for path, owners in self.owners.copy().items():
            owners.discard(visitor)
            if not owners:
                self.owners.pop(path, None)
                Path(path).unlink(missing_ok=True)
                # Gradio's folders are named by content: another visitor's copy, under another name, may lie beside it.
                with contextlib.suppress(OSError):
                    Path(path).parent.rmdir()

    def is_full(self, more: int) -> bool:
        """Whether so many bytes more would be too many."""
        for path in self.folder.rglob("*"):
            with contextlib.suppress(OSError):  # deleted meanwhile
                more += path.stat().st_size
        return more > self.largest_folder


def guarded(app: Callable, visitors: Visitors, names: set[str], cookie: str) -> Callable:
    """An ASGI application that hands on to gradio's what the page itself may ask for, and refuses the rest.

    names: that a browser may call this server by, in small letters. cookie: its name; browsers share cookies between
    the ports of a machine, so that servers on two ports need two names.
    """

    async def application(scope, receive, send):
        if scope["type"] == "lifespan":
            return await app(scope, receive, send)
        if scope["type"] != "http":
            return None  # a websocket: none is open
        request = HTTPConnection(scope)
        visitor = request.cookies.get(cookie)
        visitor = visitor if visitor in visitors.known else None
        send = _with_headers(send, HEADERS)
        refusal = _refusal(scope, request, visitors, visitor, names)
        if refusal is None and scope["path"] == "/" and visitor is None:
            visitor = secrets.token_urlsafe(32)
            visitors.known.add(visitor)
            value = f"{cookie}={visitor}; HttpOnly; SameSite=Strict; Path=/"
            send = _with_headers(send, ((b"set-cookie", value.encode()),))
        elif refusal is None and scope["path"] == "/gradio_api/upload":
            send = _noting_uploads(send, visitors, visitor)
        elif refusal is None and scope["method"] == "POST":
            body = await _body(receive)
            refusal = _refusal_of_message(body, visitors, visitor)
            receive = _once_more(body, receive)
        if refusal is not None:
            return await PlainTextResponse(refusal[1], refusal[0])(scope, receive, send)
        return await app(scope, receive, send)

    return application


def _refusal(scope, request, visitors, visitor, names):
    """(status, sentence), or None for a request that may pass as far as its head says."""
    path, headers = scope["path"], request.headers
    if not is_name_of_here(headers.get("host", ""), names):
        return 421, "This server does not go by that name; open it by its address."
    origin = headers.get("origin")
    if origin is not None and origin.partition("://")[2] != headers["host"]:
        return 403, "Another page may not use this one."
    # What a browser says of who has made it ask. Older ones say nothing: then the cookie does, which is sent with the
    # page's own requests alone.
    if path != "/" and headers.get("sec-fetch-site", "none") not in ("same-origin", "none"):
        return 403, "Another page may not use this one."
    if scope["method"] in ("GET", "HEAD") and OPEN.fullmatch(path):
        # Gradio restores a page's state from a file that is named in the address.
        return (404, "Not found.") if path == "/" and scope["query_string"].count(b"deep_link") else None
    routes = ROUTES.get(scope["method"])
    if routes is None or not routes.fullmatch(path):
        return 404, "Not found."
    if visitor is None:
        return 403, "Load the page anew."
    if path.startswith(FILE) and not visitors.owns(path.removeprefix(FILE), visitor):
        return 404, "Not found."
    # Who is the first to use the name of a session, or of an upload, has it.
    query = parse_qs(scope["query_string"].decode("latin-1"))
    sessions = query.get("session_hash", [])
    if path.startswith(HEARTBEAT):
        sessions = [path.removeprefix(HEARTBEAT)]
    named = [(visitors.sessions, session) for session in sessions]
    named += [(visitors.uploads, upload) for upload in query.get("upload_id", [])]
    if any(owners.setdefault(name, visitor) != visitor for owners, name in named):
        return 403, "That is another visitor's."
    if path == "/gradio_api/upload":
        length = headers.get("content-length", "")
        if not length.isdecimal():
            return 411, "An upload has to say how long it is."
        if visitors.is_full(int(length)):
            return 507, "There is no room for more photographs; try again later."
    return None


def is_name_of_here(host: str, names: set[str]) -> bool:
    """Whether a request's Host header is an address, or one of the names.

    A page elsewhere can let its own name mean this machine, and would then be the same page to the browser; an address
    it cannot.
    """
    name = re.sub(r":\d+$", "", host.lower())
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return name in names
    return True


def _refusal_of_message(body, visitors, visitor):
    if body is None:
        return 413, f"More than {LARGEST_MESSAGE} bytes."
    try:
        message = json.loads(body)
    except ValueError:
        return 400, "No JSON."
    if not isinstance(message, dict):
        return 400, "No message of the page."
    session = message.get("session_hash")
    if not isinstance(session, str) or visitors.sessions.setdefault(session, visitor) != visitor:
        return 403, "That is another visitor's."
    if not all(isinstance(path, str) and visitors.owns(path, visitor) for path in _paths(message)):
        return 403, "That file is not one that you have uploaded."
    return None


def _paths(message):
    """What a message names as a file, anywhere in it: gradio takes any object with a path for one."""
    if isinstance(message, dict):
        for key, value in message.items():
            if key == "path":
                yield value
            else:
                yield from _paths(value)
    elif isinstance(message, list):
        for value in message:
            yield from _paths(value)


async def _body(receive):
    """Bytes of a request, or None for more than LARGEST_MESSAGE."""
    body = b""
    while True:
        event = await receive()
        body += event.get("body", b"")
        if len(body) > LARGEST_MESSAGE:
            return None
        if not event.get("more_body"):
            return body


def _once_more(body, receive):
    """What receives a body that was received already, and then what comes after it."""
    events = [{"type": "http.request", "body": body or b"", "more_body": False}]

    async def receive_again():
        return events.pop() if events else await receive()

    return receive_again


def _with_headers(send, more):
    async def send_with_headers(event):
        if event["type"] == "http.response.start":
            event = event | {"headers": [*event.get("headers", ()), *more]}
        await send(event)

    return send_with_headers


def _noting_uploads(send, visitors, visitor):
    """`send` that makes the visitor owner of the files that gradio answers to have stored, before the answer leaves."""
    answer = b""

    async def send_and_note(event):
        nonlocal answer
        if event["type"] == "http.response.body":
            answer += event.get("body", b"")
            if not event.get("more_body"):
                try:
                    paths = json.loads(answer)
                except ValueError:  # a refusal
                    paths = []
                for path in paths if isinstance(paths, list) else ():
                    visitors.own(Path(path), visitor)
        await send(event)

    return send_and_note
