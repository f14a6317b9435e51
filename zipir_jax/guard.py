"""What stands between a browser and gradio's server: who may ask for what, and how long their files stay.

Gradio serves more routes than the page needs, accepts a file's path from whoever names it, and shows an upload to
everyone who knows its path. Here a request passes only if it comes from the page itself, asks for what the page needs,
and names no file but those in the folder of the same browser.
"""

import asyncio
import collections
import contextlib
import dataclasses
import hashlib
import ipaddress
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from urllib.parse import parse_qs, urlencode

from fastapi.requests import Request
from fastapi.responses import JSONResponse, PlainTextResponse
from gradio.route_utils import MultiPartException, upload_fn
from gradio.routes import file_upload_statuses
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

# Gradio's routes that the page's scripts call, beside what looks the same to everyone.
OPEN = re.compile(r"/|/theme\.css|/favicon\.ico|/manifest\.json|/(assets|static)/.*")
ROUTES = {
    "GET": re.compile(r"/gradio_api/(file=.+|queue/data|upload_progress|heartbeat/\w+|app_id)"),
    "HEAD": re.compile(r"/gradio_api/file=.+"),
    "POST": re.compile(r"/gradio_api/(upload|queue/join|cancel|reset)"),
}
FILE = "/gradio_api/file="
HEARTBEAT = "/gradio_api/heartbeat/"
LARGEST_MESSAGE = 2**20  # bytes of a request that is no upload
GRACE = 300.0  # seconds from the last request to the end of a page's files: a network may be away, or a laptop asleep
COOKIE = re.compile(r"[\w-]{43}", re.ASCII)
SESSION = re.compile(r"\w{1,32}", re.ASCII)
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
    """Browsers, each known by a cookie, and their open pages, which gradio calls sessions.

    A visitor has a folder, named by a digest of the cookie, with a folder of each page and of each upload in it. GRACE
    after the last request that concerns it, a visitor's folder goes, and so does a page's. Files that are made after it
    have nowhere to be. But for `owns` and `check_room` everything here belongs to the event loop's thread.
    """

    folder: Path  # of all their files
    largest_folder: int  # bytes; half of it is for one visitor at most
    sessions: dict[str, str] = dataclasses.field(default_factory=dict)  # session: visitor
    # By folder: requests that are under way, and without any the timer that deletes it.
    requests: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    timers: dict[Path, asyncio.TimerHandle] = dataclasses.field(default_factory=dict)
    # (visitor, bytes) that are on their way.
    uploading: list[tuple[str, int]] = dataclasses.field(default_factory=list)

    def owns(self, path: str, visitor: str) -> bool:
        """Whether the path, as it is written, is that of a file of the visitor's."""
        return (
            path.startswith(f"{self.folder / visitor}/")
            and os.path.normpath(path) == path
            and os.path.isfile(path)
        )

    def folder_of(self, session: str) -> Path:
        return self.folder / self.sessions[session] / session

    @contextlib.contextmanager
    def attended(self, visitor: str, sessions: Iterable[str]) -> Iterator[None]:
        """A request, while which the folders of a visitor and of some of the visitor's pages are there."""
        self.sessions.update(dict.fromkeys(sessions, visitor))
        folders = [self.folder / visitor, *map(self.folder_of, sessions)]
        for folder in folders:
            folder.mkdir(exist_ok=True)
            self.requests[folder] += 1
            if folder in self.timers:
                self.timers.pop(folder).cancel()
        try:
            yield
        finally:
            for folder in folders:
                self.requests[folder] -= 1
                if not self.requests[folder]:
                    del self.requests[folder]
                    loop = asyncio.get_running_loop()
                    self.timers[folder] = loop.call_later(GRACE, self._forget, folder)

    def _forget(self, folder):
        del self.timers[folder]
        self.sessions.pop(folder.name, None)
        # At once out of reach of a restoration that goes on, then deleted.
        doomed = self.folder / f"doomed-{secrets.token_hex(8)}"
        with contextlib.suppress(FileNotFoundError):  # gone with the visitor's
            folder.rename(doomed)
        asyncio.get_running_loop().run_in_executor(None, self._delete, doomed)

    def _delete(self, doomed):
        shutil.rmtree(doomed, ignore_errors=True)
        for path in self.folder.iterdir():
            if path.is_file():  # gradio leaves an empty one whenever it passes an upload's path on
                path.unlink(missing_ok=True)

    def check_room(self, visitor: str, more: int = 0) -> None:
        """Raises ValueError where so many bytes more of a visitor's would be too many. Not for the event loop."""
        uploading = self.uploading.copy()
        mine = sum(size for uploader, size in uploading if uploader == visitor)
        if more + mine + size_of(self.folder / visitor) > self.largest_folder // 2:
            raise ValueError(
                "There is no room for more of your photographs; close this page, and open it again in "
                f"{GRACE / 60:.0f} minutes."
            )
        if more + sum(size for _, size in uploading) + size_of(self.folder) > self.largest_folder:
            raise ValueError("There is no room for more photographs; try again later.")


def size_of(folder: Path) -> int:
    """Bytes of all files in a folder and below."""
    size = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # deleted meanwhile
            size += path.stat().st_size * path.is_file()
    return size


def guarded(app: Callable, visitors: Visitors, names: set[str], cookie: str, largest_file: int) -> Callable:
    """An ASGI application that hands on to gradio's what the page itself may ask for, and refuses the rest.

    names: that a browser may call this server by, in small letters. cookie: its name; browsers share cookies between
    the ports of a machine, so that servers on two ports need two names. largest_file: bytes of one that is uploaded.
    """

    async def application(scope, receive, send):
        if scope["type"] == "lifespan":
            return await app(scope, receive, send)
        if scope["type"] != "http":
            return None  # a websocket: none is open
        send = _with_headers(send, HEADERS)
        request = Request(scope, receive)
        path, secret = scope["path"], request.cookies.get(cookie, "")
        try:
            _check_origin(request, names)
            if request.method in ("GET", "HEAD") and OPEN.fullmatch(path):
                # Gradio restores a page's state from a file that is named in the address.
                if path == "/" and b"deep_link" in scope["query_string"]:
                    raise HTTPException(404, "Not found.")
                if path == "/" and not COOKIE.fullmatch(secret):
                    value = f"{cookie}={secrets.token_urlsafe(32)}; HttpOnly; SameSite=Lax; Path=/"
                    send = _with_headers(send, ((b"set-cookie", value.encode()),))
                return await app(scope, receive, send)
            if request.method not in ROUTES or not ROUTES[request.method].fullmatch(path):
                raise HTTPException(404, "Not found.")
            if not COOKIE.fullmatch(secret):
                raise HTTPException(403, "Load the page anew.")
            visitor = hashlib.sha256(secret.encode()).hexdigest()
            query = parse_qs(scope["query_string"].decode("latin-1"))
            sessions = query.get("session_hash", [])
            if path.startswith(HEARTBEAT):
                sessions = [path.removeprefix(HEARTBEAT)]
            if path.startswith(FILE) and not visitors.owns(path.removeprefix(FILE), visitor):
                raise HTTPException(404, "Not found.")
            # By this name gradio keeps how far an upload is, for whoever asks.
            upload = "".join(visitor + name for name in query.get("upload_id", [])) or None
            if path == "/gradio_api/upload_progress":
                scope = scope | {"query_string": urlencode({"upload_id": upload}).encode()}
            elif request.method == "POST" and path != "/gradio_api/upload":
                body = await _body(receive)
                sessions = [_session_of_message(body, visitors, visitor)]
                receive = _once_more(body, receive)
            # Who is the first to use the name of a session has it.
            if not all(
                SESSION.fullmatch(name) and visitors.sessions.get(name, visitor) == visitor
                for name in sessions
            ):
                raise HTTPException(403, "That is another visitor's.")
            with visitors.attended(visitor, sessions):
                if path == "/gradio_api/upload":
                    answer = await _upload(request, visitors, visitor, upload, largest_file)
                    return await answer(scope, receive, send)
                return await app(scope, receive, send)
        except HTTPException as refusal:
            return await PlainTextResponse(refusal.detail, refusal.status_code)(scope, receive, send)
        except ClientDisconnect:  # in the middle of an upload: nobody is there to be told
            return None

    return application


def _check_origin(request, names):
    """Raises HTTPException for what a page elsewhere has made the browser ask."""
    headers = request.headers
    if not is_name_of_here(headers.get("host", ""), names):
        raise HTTPException(421, "This server does not go by that name; open it by its address.")
    origin = headers.get("origin")
    # What a browser says of who has made it ask; a link to the page itself may stand anywhere. Older ones say nothing:
    # then the cookie does, which is sent along with links, and else with the page's own requests alone.
    site = headers.get("sec-fetch-site", "none")
    if (origin is not None and origin.partition("://")[2] != headers["host"]) or (
        request.scope["path"] != "/" and site not in ("same-origin", "none")
    ):
        raise HTTPException(403, "Another page may not use this one.")


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


def _session_of_message(body, visitors, visitor):
    """The session that a message of the page is of; raises HTTPException for a message that the page would not send."""
    if body is None:
        raise HTTPException(413, f"More than {LARGEST_MESSAGE} bytes.")
    try:
        message = json.loads(body)
        paths = list(_paths(message))
    except (ValueError, RecursionError):
        raise HTTPException(400, "No JSON.") from None
    if not isinstance(message, dict) or not isinstance(message.get("session_hash"), str):
        raise HTTPException(400, "No message of the page.")
    if not all(isinstance(path, str) and visitors.owns(path, visitor) for path in paths):
        raise HTTPException(403, "That file is not one that you have uploaded.")
    return message["session_hash"]


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


async def _upload(request, visitors, visitor, name, largest_file):
    """The answer to an upload. It has a folder of its own, and what does not arrive whole leaves none."""
    length = request.headers.get("content-length", "")
    if not length.isdecimal():
        raise HTTPException(411, "An upload has to say how long it is.")
    folder = visitors.folder / visitor / f"upload-{secrets.token_hex(8)}"
    coming, paths = (visitor, int(length)), []
    visitors.uploading.append(coming)
    try:
        try:
            await asyncio.to_thread(visitors.check_room, visitor)
        except ValueError as error:
            raise HTTPException(507, str(error)) from None
        paths, *_ = await upload_fn(
            request, folder, largest_file, name, upload_progress=name and file_upload_statuses
        )
    except MultiPartException as error:
        raise HTTPException(413 if "maximum allowed size" in error.message else 400, error.message) from None
    except TypeError:  # gradio's, of what has no name
        raise HTTPException(400, "An upload has to be a file with a name.") from None
    finally:
        visitors.uploading.remove(coming)
        if not paths:
            shutil.rmtree(folder, ignore_errors=True)
    return JSONResponse(paths)


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
