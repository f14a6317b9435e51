"""A photograph beside what it became: one picture of both, or a page with a slider between them."""

import base64
import html
import io

import numpy as np
from jaxtyping import Float32
from PIL import Image

from zipir_jax.imageio import resize, to_uint8

ENDINGS = {"side-by-side": ".png", "slider": ".html"}  # of files, by the way to compare
GAP = 8  # pixels between the two
JPEG_QUALITY = 92

# The pictures lie on each other and the photograph's is cut off at the handle. A range input is the control: browsers
# and screen readers know it, and its arrow keys; dragging on the pictures sets it.
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>{title}</title>
<style>
body {{ margin: 0; padding: 1rem; background: #181818; color: #eee; font: 16px system-ui, sans-serif; }}
main {{ max-width: {width}px; margin: auto; }}
h1 {{ font-size: 1.1rem; font-weight: 500; overflow-wrap: anywhere; }}
#pictures {{ --at: 50%; position: relative; overflow: hidden; line-height: 0; cursor: ew-resize;
 touch-action: pan-y pinch-zoom; user-select: none; }}
img {{ width: 100%; height: auto; -webkit-user-drag: none; }}
#before {{ position: absolute; inset: 0; clip-path: inset(0 calc(100% - var(--at)) 0 0); }}
#handle {{ position: absolute; top: 0; bottom: 0; left: var(--at); width: 2px; margin-left: -1px; background: #fff;
 box-shadow: 0 0 4px #000; }}
.label {{ position: absolute; top: 0.5rem; padding: 0.2rem 0.6rem; border-radius: 0.3rem; line-height: 1.4;
 background: rgb(0 0 0 / 60%); }}
input {{ width: 100%; margin: 0.8rem 0 0; }}
</style>
</head>
<body>
<main>
<h1>{title}</h1>
<div id="pictures">
<img id="after" alt="after" width="{width}" height="{height}" draggable="false" src="{after}">
<img id="before" alt="before" width="{width}" height="{height}" draggable="false" src="{before}">
<div id="handle"></div>
<span class="label" style="left: 0.5rem">before</span>
<span class="label" style="right: 0.5rem">after</span>
</div>
<input id="slider" type="range" min="0" max="100" step="0.5" value="50" autofocus
 aria-label="how much of the picture shows the photograph before it was restored, in percent">
</main>
<script>
const pictures = document.getElementById("pictures"), slider = document.getElementById("slider");
const show = () => pictures.style.setProperty("--at", slider.value + "%");
const drag = event => {{
  if (event.type === "pointermove" && !event.buttons) return;
  const box = pictures.getBoundingClientRect();
  slider.value = 100 * (event.clientX - box.left) / box.width;
  show();
}};
slider.addEventListener("input", show);
pictures.addEventListener("pointerdown", event => {{ pictures.setPointerCapture(event.pointerId); drag(event); }});
pictures.addEventListener("pointermove", drag);
show();
</script>
</body>
</html>
"""


def side_by_side(
    before: Float32[np.ndarray, "h w 3"], after: Float32[np.ndarray, "h2 w2 3"]
) -> Float32[np.ndarray, "h2 w3 3"]:
    """Both pictures, in [-1, 1], in one, the first enlarged to the second's size, with a white gap between them."""
    height, width = after.shape[:2]
    gap = np.ones((height, GAP, 3), np.float32)
    return np.concatenate([resize(before, height, width), gap, after], axis=1)


def slider_html(
    before: Float32[np.ndarray, "h w 3"], after: Float32[np.ndarray, "h2 w2 3"], title: str
) -> str:
    """A page of HTML that holds both pictures, in [-1, 1], as JPEG; it asks nothing of any server.

    The slider goes by mouse, touch and arrow keys.
    """
    height, width = after.shape[:2]
    # The names of files need not be Unicode, a page must be.
    title = html.escape(title.encode(errors="replace").decode())
    return PAGE.format(
        title=title,
        width=width,
        height=height,
        before=_data_uri(resize(before, height, width)),
        after=_data_uri(after),
    )


def _data_uri(image):
    encoded = io.BytesIO()
    Image.fromarray(to_uint8(image)).save(encoded, "JPEG", quality=JPEG_QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(encoded.getvalue()).decode()}"
