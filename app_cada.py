"""
A page to search one's own images: type a sentence and see who fits; click an image and see why.

    python app_cada.py --index INDEX

It is for the person in front of this machine: it listens on the loopback address only, needs no internet, and hands
out small copies of the images in the index, no other file.
"""

import argparse
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from PIL import Image

from data_cada import open_image
from explain_cada import attribute_predictions, draw_explanation, word_attention
from files_cada import Parser, run_command
from gallery_cada import GalleryIndex, Result, open_index
from processing_cada import clean_caption
from source_cada import GalleryError


try:
    import gradio as gr
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.responses import PlainTextResponse
except ImportError:
    gr = None


ADDRESS = "127.0.0.1"
MAX_SENTENCE = 500  # characters
MAX_UPLOAD = 10_000_000  # bytes
MAX_PIXELS = 50_000_000  # a small file can hold a huge image
MAX_IMAGES = 60
THUMBNAIL = (240, 320)  # largest width and height in pixels
_CLEANING = (600, 3600)  # every ten minutes, copies of images older than an hour are deleted

# Persons are tall, and Gradio's cells are square, with the caption on the feet.
_CSS = """
.grid-wrap { max-height: none !important; }
.thumbnail-item { aspect-ratio: 3 / 5 !important; padding-bottom: 2.6em; }
.caption-label { left: 0; right: 0; max-width: none; border: 0; white-space: normal; overflow-wrap: anywhere; }
"""

# What the page consists of. Gradio has more routes: some fetch addresses, run code or hand out other files.
_ROUTES = re.compile(
    r"/|/favicon\.ico|/theme\.css|/(assets|static)/.+"
    r"|/gradio_api/(queue/join|queue/data|upload|upload_progress|heartbeat/\w+|startup-events|reset|cancel)"
)
_FILE = "/gradio_api/file="
_HEADERS = {
    # Whatever the page asks for, the browser fetches it from here or not at all.
    "content-security-policy": "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; frame-ancestors 'none'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


class _Guard:
    """Answers 404 to other pages, and to all but this page's parts and the files in `folder`; sets `_HEADERS`."""

    def __init__(self, app, folder: str):
        self.app, self.folder = app, os.path.realpath(folder)

    def _allowed(self, path: str, headers: dict[bytes, bytes]) -> bool:
        origin = headers.get(b"origin")  # of a page in the browser that asks, where it is not this one
        if origin is not None and urlsplit(origin).netloc != headers.get(b"host"):
            return False
        if path.startswith(_FILE):
            return Path(os.path.realpath(path.removeprefix(_FILE))).is_relative_to(self.folder)
        return _ROUTES.fullmatch(path) is not None

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)

        async def send_with_headers(message):
            if message["type"] == "http.response.start":
                added = [(name.encode(), value.encode()) for name, value in _HEADERS.items()]
                message["headers"] = [*message["headers"], *added]
            await send(message)

        allowed = self._allowed(scope["path"], dict(scope["headers"]))
        app = self.app if allowed else PlainTextResponse("Not found", 404)
        await app(scope, receive, send_with_headers)


@contextmanager
def _told() -> Iterator[None]:
    """What is wrong appears on the page as a message."""
    try:
        yield
    except (GalleryError, ValueError, LookupError) as error:  # LookupError: NLTK's tagger data are missing
        raise gr.Error(str(error), print_exception=False) from error


def _checked(sentence: str | None) -> str:
    sentence = (sentence or "").strip()
    if len(sentence) > MAX_SENTENCE:
        raise ValueError(f"The sentence has {len(sentence)} characters. Use {MAX_SENTENCE} at most.")
    return sentence


def _number(top) -> int:
    return min(max(int(top), 1), MAX_IMAGES)


def open_upload(path: str | os.PathLike) -> Image.Image:
    """
    An uploaded image, upright. Its size in pixels is read from its header first.

    Raises:
        ValueError: for more than `MAX_PIXELS`, or a file that is no image.
    """
    try:
        with Image.open(path) as image:
            pixels = image.width * image.height
        if pixels <= MAX_PIXELS:
            return open_image({"bytes": Path(path).read_bytes(), "path": None})
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"This file is no image that can be read: {error}.") from error
    raise ValueError(f"The image has {pixels:,} pixels. Use {MAX_PIXELS:,} at most.")


def build_page(gallery: GalleryIndex) -> "gr.Blocks":
    """
    The page for an open index.

    Raises:
        GalleryError: where the model of the index cannot be loaded.
    """
    config = gallery.model.config

    def show(results: list[Result]) -> tuple:
        images, shown = [], []
        for rank, result in enumerate(results, start=1):
            try:
                image = gallery.image(result.path)
            except GalleryError as error:  # it is gone, or has changed
                gr.Warning(str(error))
                continue
            image.thumbnail(THUMBNAIL)
            images.append((image, f"{rank}.  {result.score:.3f}  {result.path}"))
            shown.append(result.path)
        return images, shown, None

    def find(sentence: str, top: int) -> tuple:
        with _told():
            results = gallery.search([_checked(sentence)], _number(top))[0]
            for path, problem in gallery.left_out.items():
                gr.Warning(f"The image {path} is left out: {problem}. Bring the index up to date.")
            return show(results)

    def find_similar(upload: str | None, top: int) -> tuple:
        with _told():
            if upload is None:
                raise ValueError("Choose an image first.")
            return show(gallery.search_image(open_upload(upload), _number(top)))

    def explain(found: list[str], sentence: str, event: gr.SelectData) -> Image.Image:
        with _told():
            sentence, rank = _checked(sentence), event.index
            if not clean_caption(sentence):
                raise ValueError("Type a sentence to see where its words look.")
            if not isinstance(rank, int) or not 0 <= rank < len(found):
                raise ValueError("This image is no longer shown. Search again.")
            inputs = gallery.model, gallery.processor, gallery.image(found[rank]), sentence
            attention = word_attention(*inputs)
            predictions = attribute_predictions(*inputs) if config.use_ara else []
            return draw_explanation(inputs[2], sentence, attention, predictions)

    # Calls come from this page alone, one at a time, as there is one model.
    event = {"api_visibility": "private", "concurrency_limit": 1, "concurrency_id": "model"}
    with gr.Blocks(title="Find a person", analytics_enabled=False, delete_cache=_CLEANING) as page:
        gr.Markdown(f"# Find a person\n{len(gallery):,} images. A ranking is a list of candidates, no identification.")
        found = gr.State([])
        sentence = gr.Textbox(
            label="Sentence", placeholder="a woman in a red coat", max_length=MAX_SENTENCE, autofocus=True
        )
        with gr.Row():
            by_sentence = gr.Button("Search by the sentence", variant="primary")
            top = gr.Slider(1, MAX_IMAGES, value=12, step=1, label="Number of images")
        with gr.Accordion("Search by an image", open=False):
            upload = gr.File(label="Image of a person", file_types=["image"], height=140)
            by_image = gr.Button("Search by the image")
        gr.Markdown(f"Best first: rank, score, file.{' Click an image to see why.' if config.use_atp else ''}")
        results = gr.Gallery(
            show_label=False,
            columns=6,
            object_fit="contain",
            allow_preview=False,
            interactive=False,
            buttons=[],
        )
        why = gr.Image(label="Where each word looks", interactive=False, buttons=[], visible=config.use_atp)
        shown = [results, found, why]
        gr.on([sentence.submit, by_sentence.click], find, [sentence, top], shown, **event)
        by_image.click(find_similar, [upload, top], shown, **event)
        if config.use_atp:
            results.select(explain, [found, sentence], why, **event)
    return page


@contextmanager
def serve(gallery: GalleryIndex, port: int) -> Iterator[str]:
    """
    The page at work, on the loopback address; gives its address. Its copies of images are deleted at the end.

    Raises:
        GalleryError: where the port is taken, or the model cannot be loaded.
    """
    with tempfile.TemporaryDirectory(prefix="cada_app_") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        page = build_page(gallery)
        guards = [
            Middleware(TrustedHostMiddleware, allowed_hosts=[ADDRESS, "localhost"]),
            Middleware(_Guard, folder=folder),
        ]
        try:
            _, address, _ = page.queue(max_size=20).launch(
                server_name=ADDRESS,
                server_port=port,
                share=False,
                quiet=True,
                prevent_thread_lock=True,
                max_file_size=MAX_UPLOAD,
                state_session_capacity=100,
                app_kwargs={"middleware": guards},
                css=_CSS,
                footer_links=[],
                run_history=False,
                enable_monitoring=False,
                ssr_mode=False,
                mcp_server=False,
                pwa=False,
            )
        except OSError as error:
            raise GalleryError(f"Port {port} cannot be used: {error} Choose another --port.") from error
        try:
            yield address
        finally:
            page.close(verbose=False)


def _wait() -> None:
    while True:
        time.sleep(3600)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--index", required=True, type=Path, help="folder of an index, written by gallery_cada.py")
    parser.add_argument("--model", help="the checkpoint, where it is no longer where the index was made")
    parser.add_argument("--port", type=int, default=7860)
    parser.add_argument("--device", help="of the model; the GPU where there is one")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that also then the copies of images are deleted
    try:
        return run_command(lambda: _run(options))
    except KeyboardInterrupt:
        return 0


def _run(options: argparse.Namespace) -> None:
    if gr is None:
        raise GalleryError('The page needs Gradio. Run: pip install "cada-transformers[app]"')
    with serve(open_index(options.index, options.model, options.device), options.port) as address:
        print(f"Open {address} in a browser. Ctrl+C ends the page.", flush=True)
        _wait()


if __name__ == "__main__":
    sys.exit(main())
