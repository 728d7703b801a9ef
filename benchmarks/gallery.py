"""
Time and memory of search in 10 thousand, 100 thousand and a million images, global stage.

    python benchmarks/gallery.py

Encoding a million images takes days on two CPU cores, so the features are random: unit vectors of 256 numbers, the
dimension of the paper, for persons with four images each (cosine 0.8 between images of one person, 0.63 between a
sentence and an image of the person that it describes). Every measurement has a process of its own. Writes
`benchmarks/gallery.md`.
"""

import cada  # noqa: F401  # before torch: it makes waiting threads sleep


# isort: split
import argparse
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from report import footer
from tqdm.auto import tqdm

from cada.gallery.images import content_digest
from cada.gallery.store import ArrowStore, feature_column


ROOT = Path(__file__).resolve().parent.parent
DIMENSION, IMAGES_PER_PERSON, TOP = 256, 4, 32
QUERIES, WARM_UP = 50, 3
SHARD = 16_384


def persons(count: int, seed: int) -> np.ndarray:
    """Unit vectors `(count, d)`."""
    vectors = np.random.default_rng(seed).standard_normal((count, DIMENSION), dtype=np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def near(centres: np.ndarray, spread: float, seed: int) -> np.ndarray:
    """Unit vectors around `centres`; `spread` is the length of the noise."""
    vectors = centres + spread * persons(len(centres), seed)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def shard(number: int, count: int) -> pa.Table:
    """The encoded rows of a shard, as encoding leaves them."""
    centres = persons(-(-count // IMAGES_PER_PERSON), 2 * number).repeat(IMAGES_PER_PERSON, axis=0)[:count]
    paths = [f"camera-{row % 8}/{number * SHARD + row:09}.jpg" for row in range(count)]
    return pa.table(
        {
            "path": paths,
            "stamp": [f"20000:{number * SHARD + row}" for row in range(count)],
            "digest": [content_digest(path.encode()) for path in paths],
            "feature": feature_column(near(centres, 0.5, 2 * number + 1)),
        }
    )


def write_shards(folder: Path, count: int) -> None:
    """The shards of `count` images as Arrow files, as an interrupted run leaves them."""
    folder.mkdir()
    for number, start in enumerate(range(0, count, SHARD)):
        table = shard(number, min(SHARD, count - start))
        with pa.ipc.new_stream(folder / f"{number:06}.arrow", table.schema) as writer:
            writer.write_table(table)


def queries(count: int) -> torch.Tensor:
    """Sentences that describe persons of the first shard."""
    centres = persons(-(-min(SHARD, count) // IMAGES_PER_PERSON), 0)
    chosen = np.random.default_rng(1).integers(0, len(centres), QUERIES + WARM_UP)
    return torch.from_numpy(near(centres[chosen], 1.0, 10**6))


RECORD = {"dimension": DIMENSION, "columns": {"camera": "int64"}}  # of `index.json`, what the table needs


def memory() -> float:
    """Peak memory of this process in GB, pages of mapped files among it."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def build(shards: Path, folder: Path) -> tuple[dict, float, float]:
    """The record, seconds and GB that writing the index from its finished shards takes."""
    folder.mkdir()
    tables = [pa.ipc.open_stream(pa.memory_map(str(path))).read_all() for path in sorted(shards.iterdir())]
    encoded = pa.concat_tables(tables)
    listing = encoded.select(["path", "stamp"]).append_column(
        "camera", pa.array([int(path[7]) for path in encoded["path"].to_pylist()], pa.int64())
    )
    start = time.perf_counter()
    entry = RECORD | ArrowStore(folder, RECORD).write(listing, encoded)
    return entry, time.perf_counter() - start, memory()


def search(entry: dict, folder: Path, count: int) -> dict:
    """What searching takes: seconds and GB."""
    before = memory()
    start = time.perf_counter()
    store = ArrowStore(folder, entry)
    asked = queries(count)
    store.search(asked[:1], TOP)
    opened = time.perf_counter() - start
    times = []
    for query in asked[1:].split(1):
        start = time.perf_counter()
        store.search(query, TOP)
        times.append(time.perf_counter() - start)
    start = time.perf_counter()
    store.search(asked, TOP)
    together = (time.perf_counter() - start) / len(asked)
    times = sorted(times[WARM_UP - 1 :])
    return {
        "first": opened,
        "best": times[0],
        "median": statistics.median(times),
        "worst": times[-1],
        "together": together,
        "memory": memory(),
        "imports": before,
    }


def size(folder: Path) -> float:
    """GB of the files of a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e9


def projection(rows: list[tuple]) -> list[str]:
    """Lines on 100 million images, worked out from the largest exact measurement."""
    count, _, build_peak, disk, taken = max(rows, key=lambda row: row[0])
    times = 100_000_000 / count
    return [
        "## 100 million images, on paper",
        "",
        f"From the line of {count:,} images, times {times:.0f}:",
        "",
        f"- **This table, exact:** {times * disk:.0f} GB on disk, {times * taken['best']:.1f} s per query with "
        "these threads, as the scan is bound by memory. Too slow, and the update holds all paths in memory "
        f"({times * (build_peak - taken['imports']):.0f} GB). One index should stay below some 10 million.",
        "- **A Milvus cluster:** vectors in float32 take 102 GB; `HNSW` with M = 16 another 13 GB on top of them. "
        "Paths, digests and metadata: some 25 GB at 250 bytes per image. So 127 GB with `IVF_FLAT` and 140 GB with "
        "`HNSW`, over all nodes; twice that with a copy.",
        "- **A query there:** `IVF_FLAT` visits 64 of 1,024 lists in each of the segments that Milvus makes: 6 % of "
        "the rows. That is the line of a million images times six, shared by the nodes.",
        "- **Encoding:** at 0.18 s an image, two cores at base size ([speed_cpu.md](speed_cpu.md)), it would take 208 "
        "days. At an assumed 1,000 images per second and GPU: 28 hours on one, 3.5 on eight.",
        "- **Commands:** ten indexes of 10 million images (by camera, by month), each with its collection in the "
        "same cluster: `cada index ... --uri http://... --approximate IVF_FLAT`. Local matching reads 32 images per "
        "query, whatever the size.",
        "",
        "None of this was run: there was no cluster of this size.",
        "",
    ]


def alone(function, *arguments):
    """Call a function in a process of its own, so that its peak memory is its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as executor:
        return executor.submit(function, *arguments).result()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    options = parser.parse_args()
    rows, loads = [], []
    (ROOT / "runs").mkdir(exist_ok=True)  # on the disk of the clone, and ignored by git
    for count in tqdm(options.sizes, unit="index"):
        with tempfile.TemporaryDirectory(dir=ROOT / "runs") as place:
            shards, folder = Path(place) / "shards", Path(place) / "index"
            write_shards(shards, count)
            entry, seconds, peak = alone(build, shards, folder)
            rows.append((count, seconds, peak, size(folder), alone(search, entry, folder, count)))
        loads.append(os.getloadavg()[0])
    lines = [
        "# Search in large galleries, global stage",
        "",
        *" ".join(__doc__.split("\n\n")[2].split()).split("\n"),
        "",
        f"Best {TOP} images. Time of a query: the best, median and worst of {QUERIES}, one at a time, files in the "
        f"page cache; *together* is the time per query where {QUERIES + WARM_UP} are asked at once. *First* is "
        "opening the index and the first query. Memory is the peak of the process, with the pages of the mapped file; "
        f"{rows[0][4]['imports']:.2f} GB of it are the imported libraries. Build: writing the index from finished "
        "shards.",
        "",
        "| images | build, s | build, GB | disk, GB | first, s | best, ms | query, ms | worst, ms | together, ms "
        "| GB |",
        "|" + "---:|" * 10,
    ]
    for count, seconds, peak, disk, taken in rows:
        cells = [f"{seconds:.1f}", f"{peak:.2f}", f"{disk:.3f}", f"{taken['first']:.2f}"]
        cells += [f"{1e3 * taken[name]:.1f}" for name in ("best", "median", "worst", "together")]
        lines.append(f"| {count:,} | {' | '.join(cells)} | {taken['memory']:.2f} |")
    lines += [
        "",
        f"While this ran, {statistics.mean(loads):.1f} processes on average wanted the {os.cpu_count()} cores, this "
        "one among them. Where that is more than 1, *best* is nearest to what the code itself takes.",
        "",
        *projection(rows),
        *footer(" ".join(["python benchmarks/gallery.py", *sys.argv[1:]]), ("pyarrow",)),
    ]
    report = ROOT / "benchmarks" / "gallery.md"
    report.write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
