"""The web page: `python -m zipir_jax.app [--host 127.0.0.1] [--port 7860]`, then open the address that it prints."""

import importlib.util
import ipaddress
import math
import os
import socket
import sys
import tempfile
from pathlib import Path

import tyro

from zipir_jax.command_line import cache_compiled_programs, parse, run
from zipir_jax.signals import delayed_signals

FOLDER_GIB = (
    8  # of uploads and results of all visitors, half of it for one at most; what would be more is refused
)


def serve(
    host: str = "127.0.0.1",
    port: int = 7860,
    weights: str = "default",
    max_file_mb: float = 64.0,
    max_megapixels: float = 64.0,
    allowed_host: tyro.conf.UseAppendAction[tuple[str, ...]] = (),
) -> int:
    """Serve the page until Ctrl-C.

    Args:
        host: address to listen at; 127.0.0.1 is this machine alone
        port: to listen at
        weights: folder of weights
        max_file_mb: largest file that is taken, million bytes
        max_megapixels: largest photograph, and largest result, million pixels; what the memory does not allow is
            refused in any case
        allowed_host: another name that browsers may call this server by, as that of a proxy; may be given several times
    """
    for name, value in (("max_file_mb", max_file_mb), ("max_megapixels", max_megapixels)):
        if not 0 < value < math.inf:
            raise ValueError(f"{name} {value:g} is not a positive number")
    if importlib.util.find_spec("gradio") is None:
        raise ValueError(
            'the page needs gradio, which this Python lacks; pip install -e ".[app]" installs it'
        )
    listening = listen(host, port)
    if not is_loopback(host):
        print(
            f"warning: whoever can reach {host}:{port} can use this page; there is no password, and what is sent is "
            "not encrypted",
            file=sys.stderr,
        )
    cache_compiled_programs()
    from zipir_jax.restorer import Restorer

    restorer = Restorer.load(weights)
    # uvicorn ends on a signal and sends it on once it has: then it would end this program with its files still there.
    with tempfile.TemporaryDirectory(prefix="zipir_jax_") as folder, delayed_signals() as stopped:
        limits = int(max_file_mb * 1e6), int(max_megapixels * 1e6)
        port = listening.getsockname()[1]  # where 0 was asked for, any that was free
        server = make_server(restorer, weights, Path(folder), host, port, *limits, allowed_host)
        print(f"http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)
        server.run(sockets=[listening])
    return 128 + stopped[0] if stopped else 0


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens, so that a port in use is an error before the weights are read; ValueError for it."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        raise ValueError(f"cannot listen at {host}:{port} ({error})") from None


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def make_server(
    restorer,
    weights,
    folder: Path,
    host: str,
    port: int,
    largest_file: int,
    largest_pixels: int,
    allowed_hosts: tuple[str, ...] = (),
):
    """A uvicorn server of the page, yet to be run.

    weights: those of the restorer, by name or folder. folder: of all files of its visitors. largest_file in bytes.
    allowed_hosts: names that browsers may call it by, beside its address and those of this machine.
    """
    # Read as gradio is imported, and as the page is made.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # no word to its makers, and no look for newer versions
    os.environ["GRADIO_TEMP_DIR"] = str(folder)
    import fastapi
    import gradio as gr
    import uvicorn

    from zipir_jax.guard import Visitors, guarded
    from zipir_jax.page import CSS, Desk, build_page
    from zipir_jax.weights import load_text, weights_digest, weights_folder

    text = load_text(weights, restorer.config)
    visitors = Visitors(folder, FOLDER_GIB * 2**30)
    desk = Desk(
        restorer,
        weights={"name": weights_folder(weights).name, "sha256": weights_digest(weights)},
        prompts=() if text is None else (text.positive, text.negative),
        visitors=visitors,
        largest_pixels=largest_pixels,
    )
    page = build_page(desk)
    app = gr.mount_gradio_app(
        fastapi.FastAPI(openapi_url=None),
        page,
        path="/",
        footer_links=[],
        run_history=False,
        show_error=False,
        max_file_size=largest_file,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        # System fonts: gradio's own would come from a font server.
        theme=gr.themes.Default(
            primary_hue="blue", font=("system-ui", "sans-serif"), font_mono=("ui-monospace", "monospace")
        ).set(block_info_text_color="*neutral_500", body_text_color_subdued="*neutral_500"),
        css=CSS,
    )
    names = {"localhost", host, socket.gethostname(), socket.getfqdn(), *allowed_hosts}
    app = guarded(app, visitors, {name.lower() for name in names}, f"zipir_jax_{port}", largest_file)
    # Without a limit on its end, the server would wait for pages that are open.
    return uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=3, ws="none"))


def main(arguments: list[str]) -> int:
    return parse(serve, arguments, prog="python -m zipir_jax.app", description=__doc__)()


if __name__ == "__main__":
    run(main)
