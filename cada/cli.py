"""
The command `cada`: from data to a searched gallery. Each command parses its arguments, calls the library and prints.

Training is `train_cada.py`. Whatever goes wrong ends with one line that begins with `error:`, and exit status 1.
"""

import json
import shlex
import sys
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from accelerate import PartialState
from transformers import set_seed
from transformers.utils import logging
from typer import Argument, Option

from cada.data.check import check_dataset
from cada.data.images import open_file
from cada.data.loading import load_pairs_dataset
from cada.data.pedes import PEDES_SETS
from cada.drawing import check_picture, draw_explanation, draw_results, save_picture
from cada.evaluation.calibration import save_calibration
from cada.evaluation.matching import calibrate
from cada.explain import attribute_predictions, word_attention
from cada.export import PACKAGES, export_model
from cada.files import CADAError, counted, make_new_folder, make_output_folder, printable, run_command, written_whole
from cada.gallery.index import build_index, open_index
from cada.gallery.search import Ranking
from cada.gallery.store import parse_conditions, shard_files
from cada.hub.convert import (
    SOURCES,
    convert,
    default_image_size,
    load_model_and_processor,
    merge_adapter,
    save_converted,
)
from cada.hub.loading import check_config, find_adapter
from cada.hub.publish import evaluations_of_others, publish, release_files, write_card


app = typer.Typer(
    help="Text-to-image person retrieval: a sentence ranks a gallery of person images.",
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
Source = StrEnum("Source", {name: name for name in SOURCES})
Form = StrEnum("Form", {name: name for name in ("parquet", *PACKAGES)})
Index = Annotated[Path, Argument(help="folder of the index")]
Model = Annotated[str, Option(help="folder or Hub name of a CADA checkpoint, or of BLIP")]
OtherModel = Annotated[
    str | None, Option(help="the checkpoint, or its export; by default the one that the index was made with")
]
Revision = Annotated[str | None, Option(help="tag, branch or commit of the checkpoint on the Hub")]
Device = Annotated[str | None, Option(help="of the model, such as cpu or cuda:1")]


@app.command()
def check(
    dataset: Annotated[str, Option(help=f"{', '.join(PEDES_SETS)}, or a folder written by `save_to_disk`")],
    data_dir: Annotated[str | None, Option(help="folder with the authors' annotations and images")] = None,
    quick: Annotated[bool, Option("--quick", help="look for the image files without decoding them")] = False,
) -> None:
    """Find bad images in a data set, and compare it with the official numbers; exit status 1 where they differ."""
    report, passed = check_dataset(dataset, data_dir, quick)
    print(report)
    if not passed:
        raise typer.Exit(1)


@app.command("convert")
def convert_checkpoint(
    source: Annotated[Source, Option(help="blip: of transformers; the others: files of the authors")],
    checkpoint: Annotated[str, Option(help="folder or Hub name (blip), or file (the others)")],
    out: Annotated[Path, Option(help="new folder of the CADA checkpoint")],
    revision: Revision = None,
    vocabulary_head: Annotated[
        str | None, Option(help="BlipForConditionalGeneration whose vocabulary head ARA starts from")
    ] = None,
    image_size: Annotated[tuple[int, int] | None, Option(metavar="HEIGHT WIDTH")] = None,
    num_attention_heads: Annotated[int | None, Option(help="by default the width divided by 64")] = None,
    seed: Annotated[int, Option(help="of weights that the checkpoint does not have")] = 0,
    tokenizer_name: Annotated[str, Option(help="folder or Hub name")] = "bert-base-uncased",
) -> None:
    """
    Turn a checkpoint of BLIP, or of the CADA authors, into one of this package.

    The images are of 224×224, the paper's, for BLIP, and of the checkpoint's own size for CADA.
    """
    make_new_folder(out)  # what keeps from saving shows before the work
    set_seed(seed)
    model, report = convert(
        str(source),
        checkpoint,
        vocabulary_head=vocabulary_head,
        image_size=image_size or default_image_size(source),
        num_attention_heads=num_attention_heads,
        revision=revision,
    )
    save_converted(model, tokenizer_name, str(source), checkpoint, out)
    print(f"{report}\nSaved to {out}.")


@app.command()
def merge(
    adapter: Annotated[str, Argument(help="--output_dir of a training with --lora_rank, or name on the Hub")],
    out: Annotated[Path, Option(help="new folder of the whole checkpoint")],
    revision: Revision = None,
) -> None:
    """Add an adapter (LoRA) to the weights of its base: a checkpoint like any other, which needs no PEFT."""
    merge_adapter(adapter, out, revision)
    print(f"Saved to {out}.")


@app.command("calibrate")
def calibrate_checkpoint(
    model: Annotated[Path, Argument(help="folder of a CADA checkpoint; its configuration is changed")],
    dataset: Annotated[str, Option(help=f"{', '.join(PEDES_SETS)}, a folder written by `save_to_disk`, or a name")],
    data_dir: Annotated[str | None, Option(help="folder with the authors' annotations and images")] = None,
    split: Annotated[str, Option(help="persons that the model was not trained on")] = "val",
) -> None:
    """Find out from a validation set how probable a match is, given its scores. A training does it by itself."""
    if not model.is_dir() or find_adapter(model) is None:
        check_config(model)
    network, processor = load_model_and_processor(model)
    rows = load_pairs_dataset(dataset, data_dir, splits=[split])[split]
    name = f"{Path(dataset).name if Path(dataset).exists() else dataset}, {split}"
    fitted = calibrate(network, processor, rows, name)
    file = save_calibration(model, fitted)
    error = fitted["expected_calibration_error"]
    print(f"{name}: {fitted['pairs']:,} pairs, expected calibration error {error:.4f}. Wrote {file}.")


@app.command()
def index(
    source: Annotated[str, Argument(help="folder of images, CSV or JSONL file, or data set")],
    out: Annotated[Path, Option(help="folder of the index, new or old")],
    model: OtherModel = None,
    revision: Revision = None,
    split: Annotated[str | None, Option(help="of a data set")] = None,
    root: Annotated[Path | None, Option(help="folder that the paths of a list are relative to")] = None,
    boxes: Annotated[Path | None, Option(help="where persons are: COCO JSON, CSV or JSONL")] = None,
    detector: Annotated[str | None, Option(help="object detector of transformers that finds the persons")] = None,
    min_score: Annotated[float | None, Option(help="of a detected person; 0.5 by default")] = None,
    min_height: Annotated[float | None, Option(help="of a detected person in pixels; 32 by default")] = None,
    margin: Annotated[
        float | None, Option(help="around a detected person, as a share of its size; 0 by default")
    ] = None,
    fps: Annotated[float | None, Option(help="frames of a video to take each second; 1 by default")] = None,
    hidden: Annotated[
        bool | None, Option("--hidden", help="take also hidden files, thumbnails and what is in waste bins")
    ] = None,
    uri: Annotated[str | None, Option(help="address of Milvus, to keep the features there")] = None,
    approximate: Annotated[str | None, Option(help="index type of Milvus: FLAT (exact), IVF_FLAT or HNSW")] = None,
    keep_patches: Annotated[
        bool | None, Option("--keep-patches", help="keep patch states for re-ranking without the image files")
    ] = None,
    moved_source: Annotated[
        bool, Option("--moved-source", help="the images have moved: point an old index to SOURCE")
    ] = False,
    check_content: Annotated[
        bool, Option("--check-content", help="read all files; by default size, times and inode tell a change")
    ] = False,
    batch_size: Annotated[int, Option(min=1, help="images encoded at once")] = 64,
    workers: Annotated[int, Option(min=0, help="processes that decode images")] = 0,
    shard_size: Annotated[int, Option(min=1, help="images that an interruption costs at most")] = 1024,
) -> None:
    """Encode images, or the persons in them, into an index, or bring an index up to date."""
    given = dict(locals())  # each is an argument of the library, of the same name
    try:
        changes = build_index(given.pop("source"), given.pop("out"), **given)
    except KeyboardInterrupt:
        kept = counted(len(shard_files(out)), "finished shard")
        print(f"\nInterrupted. {kept} kept; run the same command to go on.", file=sys.stderr)
        raise typer.Exit(130) from None
    is_main_process = PartialState().is_main_process
    PartialState().destroy_process_group()
    if not is_main_process:
        return
    for path, problem in changes.unreadable:
        print(f"unreadable: {printable(path)}: {printable(problem)}", file=sys.stderr)
    images = counted(changes.added + changes.changed + changes.unchanged, changes.kind)
    counts = [f"{getattr(changes, name):,} {name}" for name in ("added", "changed", "removed", "unchanged")]
    print(f"{out}: {images}; {', '.join(counts)}, {len(changes.unreadable):,} unreadable.")
    if changes.hidden:
        print(f"Left out: {counted(changes.hidden, 'hidden image')}. --hidden takes them.")
    if changes.empty:
        print(f"Nobody is in {counted(changes.empty, 'file')}.")


@app.command()
def search(
    index: Index,
    sentences: Annotated[list[str] | None, Argument(help="one or several")] = None,
    file: Annotated[Path | None, Option(help="a text file with one sentence per line")] = None,
    image: Annotated[Path | None, Option(help="a photo to search for, alone or with what a sentence changes")] = None,
    like: Annotated[list[str] | None, Option(help="path of a result that is right, repeatable")] = None,
    unlike: Annotated[list[str] | None, Option(help="path of a result that is wrong, repeatable")] = None,
    top: Annotated[int, Option(min=1, help="images per sentence")] = 10,
    rerank: Annotated[
        int | None, Option(min=0, help="candidates that the decoder reads; by default the model's, 0 for none")
    ] = None,
    where: Annotated[
        list[str] | None, Option(help="condition on metadata such as camera=3 (=, !=, <, <=, >, >=), repeatable")
    ] = None,
    min_probability: Annotated[
        float | None, Option(min=0, max=1, help="show only images that show the person with this probability")
    ] = None,
    picture: Annotated[Path | None, Option(help="draw the results into this file")] = None,
    frames: Annotated[
        bool, Option("--frames", help="with --picture: draw whole frames, with the person's box")
    ] = False,
    as_json: Annotated[bool, Option("--json", help="print JSON: one object per sentence")] = False,
    model: OtherModel = None,
    device: Device = None,
) -> None:
    """Rank the images for a sentence, or for a photo."""
    if picture is not None:
        check_picture(picture)
    if frames and picture is None:
        raise CADAError("--frames draws, but there is no --picture. Give its name.")
    gallery = open_index(index, model, device)
    queries = [*(sentences or []), *(_read_sentences(file) if file is not None else [])]
    photo = None if image is None else open_file(image)
    marked = {"where": where or (), "like": like or (), "unlike": unlike or ()}
    if queries:
        options = {"image": photo, "min_probability": min_probability, **marked}
        rankings = list(zip(queries, gallery.search(queries, top, rerank, **options)))
    elif photo is None:
        raise CADAError("Give sentences, a --file with sentences, or an --image.")
    elif rerank or min_probability is not None:
        name = "rerank" if rerank else "min-probability"
        raise CADAError(f"--{name} is of a sentence, and with --image alone there is none. Leave it out.")
    else:
        rankings = [(str(image), gallery.search_image(photo, top, **marked))]
    for query, ranking in rankings:
        if ranking and ranking.nobody_fits:
            least = f"a probability of {min_probability:g}"
            print(f"Nobody fits {printable(query)!r} with {least}. The best:", file=sys.stderr)
    if as_json:
        _print_json(rankings)
    else:
        asked = dict.fromkeys(condition.column for condition in parse_conditions(where or (), gallery.columns))
        _print_rankings(rankings, asked, where or [])
    if picture is not None and not any(ranking for _, ranking in rankings):
        print(f"There is nothing to draw, so {picture} is not written.", file=sys.stderr)
    elif picture is not None:  # after the results, which are there then even where it cannot be written
        save_picture(draw_results(gallery, dict(rankings), columns=3 if frames else 10, frames=frames), picture)
        if not as_json:
            print(f"Wrote {picture}.")


def _read_sentences(file: Path) -> list[str]:
    try:
        return [line for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise CADAError(f"{file} cannot be read ({error}). Give a text file in UTF-8.") from error


def _print_json(rankings: list[tuple[str, Ranking]]) -> None:
    lists = [
        {
            "query": query,
            "nobody_fits": ranking.nobody_fits,
            "results": [{"rank": rank, **asdict(result)} for rank, result in enumerate(ranking, 1)],
        }
        for query, ranking in rankings
    ]
    print(json.dumps(lists, indent=2, ensure_ascii=False, allow_nan=False))


def _print_rankings(rankings: list[tuple[str, Ranking]], columns: dict, where: list[str]) -> None:
    for query, results in rankings:
        print(printable(query))
        if not results:
            print(f"No image{f' fulfils {shlex.join(where)}' if where and not results.left_out else ''}.")
            continue
        calibrated = any(result.probability is not None for result in results)
        print(f"rank   score  {'probability  ' * calibrated}stage   path")
        for rank, result in enumerate(results, start=1):
            chance = "" if result.probability is None else f"{result.probability:.2f}"
            chance = f"{chance:>11}  " * calibrated
            line = f"{rank:4}  {result.score:6.3f}  {chance}{result.stage:6}  {result.name}"
            print(printable("  ".join([line, *(f"{name}={result.metadata[name]}" for name in columns)])))


@app.command()
def info(index: Index) -> None:
    """Say what an index holds."""
    for name, value in open_index(index).info().items():
        if isinstance(value, dict):
            value = ", ".join(f"{column} ({kind})" for column, kind in value.items()) or "none"
        print(f"{name.replace('_', ' '):17} {f'{value:,}' if type(value) is int else value}")


@app.command()
def verify(index: Index) -> None:
    """Compare every image with what was indexed; exit status 1 where one is gone or has changed."""
    gallery = open_index(index)
    problems = gallery.verify()
    for path, problem in problems:
        print(f"{printable(path)}: {printable(problem)}")
    print(f"{counted(len(gallery), 'image')}; {len(problems):,} with problems.")
    if problems:
        raise typer.Exit(1)


@app.command()
def export(
    source: Annotated[str, Argument(help="folder of an index; of a checkpoint for graphs, or its Hub name")],
    out: Annotated[Path, Argument(help="a Parquet file; a new folder for graphs")],
    form: Annotated[
        Form, Option("--format", help="parquet: of an index; the others: graphs of a checkpoint")
    ] = Form.parquet,
    revision: Revision = None,
    int8: Annotated[bool, Option("--int8", help="with --format openvino: weights of 8 bits")] = False,
) -> None:
    """
    Write paths, metadata and features of an index as Parquet, or a checkpoint as graphs of ONNX or OpenVINO.

    The folder of the graphs takes the place of the checkpoint as --model of index and search, on the CPU.
    """
    if form is not Form.parquet:
        difference = export_model(source, out, str(form), revision, int8)
        print(f"Wrote {out}. Its features and logits differ from PyTorch's by {difference:.1g} at most.")
    elif int8 or revision is not None:
        raise CADAError(
            "--int8 and --revision are for a checkpoint: give --format onnx or openvino, or leave them out."
        )
    elif Path(source, "config.json").is_file():
        raise CADAError(f"{source} is a checkpoint, no index. Give --format {' or '.join(PACKAGES)}.")
    elif out.suffix.lower() != ".parquet":
        raise CADAError(f"{out} should end in .parquet.")
    else:
        print(f"Wrote {open_index(source).export(out):,} rows to {out}.")


@app.command()
def explain(
    model: Model,
    image: Annotated[Path, Option()],
    text: Annotated[str, Option(help="a sentence")],
    out: Annotated[Path, Option(help="the picture, a PNG")],
    arrays: Annotated[Path | None, Option(help="also write words and maps as .npz")] = None,
    revision: Revision = None,
    layer: Annotated[int | None, Option(help="of the decoder; the mean of all by default")] = None,
    head: Annotated[int | None, Option(help="of the layer; the mean of all by default")] = None,
) -> None:
    """Draw where each word of a sentence looks, and what the image suggests for masked attributes."""
    for name, path, ending in (("--out", out, ".png"), ("--arrays", arrays, ".npz")):
        if path is not None and path.suffix.lower() != ending:
            raise CADAError(f"{name} {path} should end in {ending}.")
        if path is not None:
            make_output_folder(path.parent)
    photo = open_file(image)
    network, processor = load_model_and_processor(model, revision)
    attention = word_attention(network, processor, photo, text, layer, head)
    predictions = attribute_predictions(network, processor, photo, text) if network.config.use_ara else []
    with written_whole(out) as path:
        draw_explanation(photo, text, attention, predictions).save(path)
    if arrays is not None:
        with written_whole(arrays) as path:
            np.savez(path, words=np.array(attention.words), maps=attention.maps)
    for prediction in predictions:
        best = " ".join(piece[0][0] for piece in prediction.guesses)
        print(f"{prediction.phrase}: the image suggests {best}")
    print(f"Wrote {out}.")


@app.command()
def page(
    index: Index,
    model: OtherModel = None,
    port: Annotated[int, Option(min=1, max=65_535)] = 7860,
    device: Device = None,
) -> None:
    """Search an index in a browser, on this machine alone."""
    from cada.gallery.page import serve_until_interrupted  # Gradio takes seconds to import

    serve_until_interrupted(index, model, device, port)


@app.command()
def serve(
    index: Index,
    model: OtherModel = None,
    host: Annotated[str, Option(help="address; another than this machine's own needs CADA_API_KEY")] = "127.0.0.1",
    port: Annotated[int, Option(min=1, max=65_535)] = 8000,
    device: Device = None,
) -> None:
    """Answer searches, embeddings and rankings over HTTP, for programs; with the page of `page` for people."""
    try:
        from cada.serve.service import serve_until_stopped  # an extra
    except ImportError as error:
        raise CADAError(
            f'The service needs {error.name}. In a clone of this repository run: pip install -e ".[serve]"'
        ) from error

    serve_until_stopped(index, model, device, host, port)


@app.command("publish")
def publish_checkpoint(
    checkpoint: Annotated[Path, Argument(help="--output_dir of a training run")],
    repo_id: Annotated[str, Argument(help="org/name on the Hub")],
    tag: Annotated[
        str | None, Option(help="name of this state, such as v1.0; by default the card pins the commit")
    ] = None,
    private: Annotated[bool | None, Option("--private", help="make a new repository private")] = None,
    overwrite: Annotated[bool, Option("--overwrite", help="replace weights that are there already")] = False,
    evaluations: Annotated[
        list[Path] | None, Option(help="folder of a further --do_predict run, for the card's table; repeatable")
    ] = None,
    licence_granted: Annotated[
        bool, Option("--licence-granted", help="the authors allow to publish weights that have no licence")
    ] = False,
    card_only: Annotated[bool, Option("--card-only", help="write README.md into the folder, push nothing")] = False,
) -> None:
    """Push a trained checkpoint with its model card to the Hub."""
    further = evaluations_of_others(checkpoint, repo_id, tag, evaluations or [])
    if card_only:
        path = write_card(checkpoint, repo_id, tag or "main", further)
        print(f"Wrote {path}. A push would publish: {', '.join(release_files(checkpoint))}")
        return
    options = {"private": private, "overwrite": overwrite, "licence_granted": licence_granted}
    revision = publish(checkpoint, repo_id, tag, evaluations=further, **options)
    print(f"Published {repo_id}, revision {revision}.")


@app.command()
def demo(
    out: Annotated[Path, Option(help="folder of all results")] = Path("demo"),
    seed: Annotated[int, Option(help="of the drawn persons and of the model")] = 0,
) -> None:
    """Train a small model on drawn persons, evaluate it, and search with three sentences."""
    from cada.demo import run_demo  # it imports the training script, which no other command needs

    run_demo(out, seed)


def _run(arguments: list[str] | None) -> int:
    logging.disable_progress_bar()  # of transformers, for each model that is loaded or saved
    try:
        return typer.main.get_command(app).main(args=arguments, prog_name="cada", standalone_mode=False)
    except Exception as error:
        if not hasattr(error, "format_message"):  # no error of typer, which says in it what is wrong with an argument
            raise
        command = error.ctx.command_path if getattr(error, "ctx", None) else "cada"
        message = error.format_message()
        if message.startswith("Usage:"):  # no command at all: its help
            print(message)
            return 0
        raise CADAError(f"{message} (`{command} --help` lists all arguments.)") from error


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return run_command(lambda: _run(arguments))
