"""
A page to search one's own images: type a sentence and see who fits; click an image and see why.

    cada page INDEX

It is for the person in front of this machine: it listens on the loopback address only, needs no internet, and hands
out small copies of the images in the index, no other file. Where the index is brought up to date meanwhile, the page
goes on with the new one.
"""

import csv
import os
import re
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

from cada.data.images import open_file
from cada.drawing import draw_explanation, draw_frame
from cada.explain import attribute_predictions, word_attention
from cada.export import CADAGraphs
from cada.files import CADAError, one_line
from cada.gallery.index import LiveIndex, open_index
from cada.gallery.search import GalleryIndex, Result


try:
    import gradio as gr
    from fastapi import FastAPI
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.responses import PlainTextResponse
except ImportError:
    gr = None


ADDRESS = "127.0.0.1"
MAX_UPLOAD = 10_000_000  # bytes
MAX_IMAGES = 60
THUMBNAIL, FRAME = (240, 320), (1280, 720)  # largest width and height in pixels
_CLEANING = (600, 3600)  # every ten minutes, copies of images older than an hour are deleted

# Persons are tall, and Gradio's cells are square, with the caption on the feet. The caption has its own place, {high}.
_CSS = """
.grid-wrap {{ max-height: none !important; }}
.thumbnail-item {{ aspect-ratio: 3 / 5 !important; padding-bottom: {high}; }}
.caption-label {{ left: 0; right: 0; max-width: none; max-height: {high}; overflow-y: auto; border: 0;
  white-space: pre-line; overflow-wrap: anywhere; }}
.line {{ border: 0 !important; }}
.line textarea {{ border: 0 !important; padding: 0 !important; background: none !important;
  box-shadow: none !important; resize: none; opacity: 1; -webkit-text-fill-color: currentColor; }}
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


def _conditions(where: str | None) -> list[str]:
    """Conditions between semicolons; one that holds a semicolon itself stands in quotes, as in a CSV file."""
    line = ";".join((where or "").splitlines())
    parts = next(csv.reader([line], delimiter=";", skipinitialspace=True), [])
    return [part.strip() for part in parts if part.strip()]


def _number(top) -> int:
    if top is None or not 1 <= top <= MAX_IMAGES:
        raise CADAError(f"The number of images is {'missing' if top is None else top}. Give 1 to {MAX_IMAGES}.")
    return int(top)


def _metadata(result: Result) -> str:
    return ", ".join(f"{name}={value}" for name, value in result.metadata.items() if value is not None)


def _caption(rank: int, result: Result) -> str:
    chance = "" if result.probability is None else f" ({result.probability:.0%})"
    return f"{rank}.  {result.score:.3f}{chance}  {result.place}\n{_metadata(result)}".strip()


@dataclass(frozen=True)
class _Searched:
    """What was searched for, what is shown for it, and what was said of that."""

    sentence: str | None = None
    upload: str | None = None  # a photo in place of a sentence
    results: tuple[Result, ...] = ()
    chosen: str | None = None  # the image that was clicked last
    like: tuple[str, ...] = ()
    unlike: tuple[str, ...] = ()


def _line(text: str | None) -> dict:
    """A line of text on the page; none where there is nothing to say."""
    return gr.update(value=text, visible=bool(text))


def _hidden() -> dict:
    return gr.update(value=None, visible=False)


class _Answers:
    """What the page shows for what its fields hold: the outputs of its events, the message last."""

    def __init__(self, live: LiveIndex):
        self.live, self.config = live, live.gallery.model.config

    def _attempt(self, question: Callable[[GalleryIndex], tuple], otherwise: list) -> tuple:
        """What the index answers. What is wrong is said in a line, the last output; the others are `otherwise`."""
        try:
            return self.live.ask(question)
        except CADAError as error:
            problem = one_line(error)
        except Exception as error:  # of the disk or the GPU, say
            traceback.print_exc()
            problem = f"This failed: {one_line(error)} More stands where `cada page` was started."
        return *otherwise, _line(problem)

    def _show(self, gallery: GalleryIndex, asked: _Searched, where: str | None, top: int | None) -> tuple:
        """Search, and give small copies of the images, with what is said about them."""
        sentence, conditions = asked.sentence, _conditions(where)
        options = {"where": conditions, "like": asked.like, "unlike": asked.unlike}
        if sentence is None:
            results = gallery.search_image(open_file(asked.upload), _number(top), **options)
        else:
            results = gallery.search([sentence], _number(top), **options)[0]
        gallery.source  # noqa: B018  # where no image is there any more, that is one error
        images, shown = [], []
        missing = dict(results.left_out)  # gone, or changed since they were indexed
        for result in results:
            try:
                image = gallery.image(result.name)
            except CADAError as error:
                missing[result.name] = str(error)
                continue
            image.thumbnail(THUMBNAIL)
            shown.append(result)
            images.append((image, _caption(len(shown), result)))
        said = f"The best {len(images)} of {len(gallery):,} images" if images else "No image"
        said += f" where {' and '.join(conditions)}." if conditions else "."
        if images:
            said += " Click one to see why." if sentence and self.config.use_atp else " Click one to mark it."
        for what, paths in (("Like", asked.like), ("Not like", asked.unlike)):
            said += f" {what} {', '.join(paths)}." if paths else ""
        if results.read_up_to:
            said += f" The sentence is too long: it was read up to “{results.read_up_to}”."
        if missing:
            path, problem = next(iter(missing.items()))
            said += f" Left out: {len(missing)}, such as {path} ({problem}). Bring the index up to date."
        asked = replace(asked, results=tuple(shown), chosen=None)
        return images, asked, None, _line(None), gr.update(visible=False), _line(said)

    def find(self, sentence: str | None, where: str | None, top: int | None) -> tuple:
        """Images for a sentence: what stands in the fields of the page, also where it is wrong."""
        asked = _Searched(sentence=(sentence or "").strip())
        return self._attempt(lambda gallery: self._show(gallery, asked, where, top), [gr.skip()] * 5)

    def find_similar(self, upload: str | None, where: str | None, top: int | None) -> tuple:
        """Images like an uploaded one."""

        def question(gallery):
            if upload is None:
                raise CADAError("Choose an image first.")
            return self._show(gallery, _Searched(upload=upload), where, top)

        return self._attempt(question, [gr.skip()] * 5)

    def mark(self, right: bool, searched: _Searched, where: str | None, top: int | None) -> tuple:
        """The same search once more: the image that was clicked last is `right`, or it is wrong."""

        def question(gallery):
            path = searched.chosen
            if path is None:
                raise CADAError("Click an image first.")
            like, unlike = (
                [other for other in marked if other != path] for marked in (searched.like, searched.unlike)
            )
            (like if right else unlike).append(path)
            return self._show(gallery, replace(searched, like=tuple(like), unlike=tuple(unlike)), where, top)

        return self._attempt(question, [gr.skip()] * 5)

    def explain(self, searched: _Searched, event: "gr.SelectData") -> tuple:
        """Why the image that is clicked was found."""

        def question(gallery):
            if not isinstance(event.index, int) or not 0 <= event.index < len(searched.results):
                raise CADAError("This image is no longer shown. Search again.")
            found, sentence = searched.results[event.index], searched.sentence
            said, picture = [f"{found.place}  {_metadata(found)}".strip()], None
            if self.config.use_atp and sentence is None:
                said.append("It was found by an image. Search by a sentence to see where its words look.")
            elif isinstance(gallery.model, CADAGraphs):
                said.append("The model is an export, whose graphs do not say where words look.")
            elif self.config.use_atp:
                inputs = gallery.model, gallery.processor, gallery.image(found.name), sentence
                attention, predictions = word_attention(*inputs), []
                if self.config.use_ara:
                    predictions = attribute_predictions(*inputs)
                picture = draw_explanation(inputs[2], sentence, attention, predictions)
            return replace(searched, chosen=found.name), picture, gr.update(visible=True), _line("\n".join(said))

        return self._attempt(question, [gr.skip(), None, gr.update(visible=False)])

    def frame(self, searched: _Searched, event: "gr.SelectData") -> dict:
        """The whole image, or frame of a video, that the person who is clicked is in; nothing where it is shown."""

        def question(gallery):
            found, rank = searched.results, event.index
            if not isinstance(rank, int) or not 0 <= rank < len(found) or found[rank].box is None:
                return (_hidden(),)
            image = draw_frame(gallery, found[rank])
            image.thumbnail(FRAME)
            return (gr.update(value=image, label=f"The frame: {found[rank].place}", visible=True),)

        return self._attempt(question, [_hidden()])[0]  # [`explain`] says what is wrong


def build_page(live: LiveIndex) -> "gr.Blocks":
    """The page of an index; a `CADAError` where its model cannot be loaded."""
    answers, gallery = _Answers(live), live.gallery
    # Calls come from this page alone, one at a time, as there is one model.
    event = {"api_visibility": "private", "concurrency_limit": 1, "concurrency_id": "model"}
    line = {"label": "Message", "show_label": False, "container": False, "interactive": False}
    line |= {"max_lines": 6, "elem_classes": "line"}
    with gr.Blocks(title="Find a person", analytics_enabled=False, delete_cache=_CLEANING) as page:
        gr.Markdown("# Find a person\nA ranking is a list of candidates, no identification.")
        searched = gr.State(_Searched())
        with gr.Row():
            sentence = gr.Textbox(label="Sentence", placeholder="a woman in a red coat", autofocus=True, scale=5)
            # A slider's field can be emptied too, and Gradio breaks on it.
            top = gr.Number(value=12, precision=0, label=f"Images (1 to {MAX_IMAGES})", min_width=120)
        columns = ", ".join(f"{name} ({kind})" for name, kind in gallery.columns.items())
        where = gr.Textbox(
            label='Only images where (=, !=, <, <=, >, >=; a semicolon between two; "place=a;b" in quotes)',
            placeholder=columns,
            max_lines=1,
            visible=bool(gallery.columns),
        )
        by_sentence = gr.Button("Search by the sentence", variant="primary")
        with gr.Accordion("Search by an image", open=False):
            upload = gr.File(label="Image of a person", file_types=["image"], height=140)
            by_image = gr.Button("Search by the image")
        message = gr.Textbox(f"{len(gallery):,} images.{f' Known of them: {columns}.' if columns else ''}", **line)
        plain = {"show_label": False, "allow_preview": False, "interactive": False, "buttons": []}
        results = gr.Gallery(columns=6, object_fit="contain", **plain)
        note = gr.Textbox(visible=False, **line)
        with gr.Row(visible=False) as marks:
            more, less = gr.Button("More like this"), gr.Button("Not this")
        why = gr.Image(label="Where each word looks", interactive=False, buttons=[], visible=answers.config.use_atp)
        frame = gr.Image(interactive=False, buttons=[], visible=False)
        shown = [results, searched, why, note, marks, message]
        gr.on([sentence.submit, where.submit, by_sentence.click], answers.find, [sentence, where, top], shown, **event)
        by_image.click(answers.find_similar, [upload, where, top], shown, **event)
        results.select(answers.explain, [searched], [searched, why, marks, note], **event)
        results.select(answers.frame, [searched], [frame], **event)
        results.change(_hidden, None, [frame], **event)
        more.click(partial(answers.mark, True), [searched, where, top], shown, **event)
        less.click(partial(answers.mark, False), [searched, where, top], shown, **event)
    return page


@contextmanager
def _variable(name: str, value: str) -> Iterator[None]:
    """A variable of the environment, for as long as the block runs."""
    before, os.environ[name] = os.environ.get(name), value
    try:
        yield
    finally:
        del os.environ[name]
        os.environ |= {} if before is None else {name: before}


@contextmanager
def _prepared(live: LiveIndex, *middleware: "Middleware") -> Iterator[tuple["gr.Blocks", dict]]:
    """The page, and how Gradio is to run it. Its copies of images are deleted at the end."""
    with tempfile.TemporaryDirectory(prefix="cada_app_") as folder, _variable("GRADIO_TEMP_DIR", folder):
        page = build_page(live).queue(max_size=20)
        page.state_session_capacity = 100
        yield (
            page,
            {
                "app_kwargs": {"middleware": [*middleware, Middleware(_Guard, folder=folder)]},
                "max_file_size": MAX_UPLOAD,
                "css": _CSS.format(high="5.2em" if live.gallery.columns else "2.6em"),
                "footer_links": [],
                **dict.fromkeys(("run_history", "enable_monitoring", "ssr_mode", "mcp_server", "pwa"), False),
            },
        )


@contextmanager
def mounted(app: "FastAPI", live: LiveIndex) -> Iterator[Callable[[], None]]:
    """The page at `/` of another application, behind its routes. Gives what ends the page's open connections."""
    with _prepared(live) as (page, options):
        gr.mount_gradio_app(app, page, "/", **options)
        mount = app.routes[-1]  # of all paths, and so that the others are answered by `app`, of these alone
        mount.path_regex = re.compile(rf"(?=({_ROUTES.pattern}|{_FILE}.*)$){mount.path_regex.pattern}")
        yield mount.app.stop_event.set


@contextmanager
def serve(gallery: GalleryIndex, port: int) -> Iterator[str]:
    """
    The page at work, on the loopback address; gives its address. Its copies of images are deleted at the end. A
    `CADAError` where the port is taken, or the model cannot be loaded.
    """
    hosts = Middleware(TrustedHostMiddleware, allowed_hosts=[ADDRESS, "localhost"])
    with _prepared(LiveIndex(gallery), hosts) as (page, options):
        try:
            _, address, _ = page.launch(
                server_name=ADDRESS,
                server_port=port,
                quiet=True,
                prevent_thread_lock=True,
                state_session_capacity=page.state_session_capacity,
                share=False,
                **options,
            )
        except OSError as error:
            raise CADAError(f"Port {port} cannot be used: {error} Choose another --port.") from error
        try:
            yield address
        finally:
            page.close(verbose=False)


def _wait() -> None:
    while True:
        time.sleep(3600)


def serve_until_interrupted(index: Path, model: str | None, device: str | None, port: int) -> None:
    """The page of an index, until Ctrl+C or SIGTERM; a `CADAError` where Gradio is missing, or as [`serve`]."""
    if gr is None:
        raise CADAError('The page needs Gradio. In a clone of this repository run: pip install -e ".[app]"')
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that also then the copies of images are deleted
    with serve(open_index(index, model, device), port) as address:
        print(f"Open {address} in a browser. Ctrl+C ends the page.", flush=True)
        with suppress(KeyboardInterrupt):  # the way to end it
            _wait()
