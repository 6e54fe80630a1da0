"""Measures the speed of the input. Each part prints a line or a small table; docs/data.md has results.

    python benchmarks/input.py pictures [--torch_python=OTHER_ENV/bin/python]    decoding and resizing to 384
    python benchmarks/input.py cpu                                               the same in CPU time, one thread
    python benchmarks/input.py packing [--examples=100000000]                    the index of an epoch
    python benchmarks/input.py rows                                              packed rows, pictures included
    python benchmarks/input.py step                                              input against one constant batch

`pictures` compares with a torch `DataLoader` on the same files and cores; torch may live in another environment.
"""

import argparse
import io
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

SIZE = 384
SIDES = ((640, 480), (1024, 768), (1600, 1200))

# Run by a Python that has torch. Decodes with PIL and resizes as `images.fit` does; normalises as SigLIP's processor
# does, or leaves that to the device, as we do.
TORCH = """
import sys, time
import numpy as np, torch
from PIL import Image

SIZE, NORMALISE = int(sys.argv[1]), sys.argv[2] == "normalised"

class Pictures(torch.utils.data.Dataset):
    def __init__(self, paths): self.paths = paths
    def __len__(self): return len(self.paths)
    def __getitem__(self, i):
        image = Image.open(self.paths[i]).convert("RGB")
        scale = SIZE / min(image.size)
        image = image.resize([max(SIZE, round(side * scale)) for side in image.size], Image.Resampling.BICUBIC)
        left, top = (image.width - SIZE) // 2, (image.height - SIZE) // 2
        image = image.crop((left, top, left + SIZE, top + SIZE))
        pixels = torch.from_numpy(np.array(image))
        return pixels.permute(2, 0, 1).float().div_(127.5).sub_(1) if NORMALISE else pixels

if __name__ == "__main__":
    workers, repeats = map(int, sys.argv[3:5])
    torch.set_num_threads(1)
    data = Pictures(sys.argv[5:] * repeats)
    loader = torch.utils.data.DataLoader(data, 16, num_workers=workers, persistent_workers=workers > 0)
    for _ in loader: pass  # workers start, files are in memory
    began, n = time.perf_counter(), 0
    for batch in loader: n += len(batch)
    print(n / (time.perf_counter() - began))
"""


def photographs(folder: Path, n: int) -> list[Path]:
    """JPEGs that decode like photographs: smooth regions, edges and noise, of quality 90, in three sizes."""
    from PIL import Image

    rng = np.random.default_rng(0)
    paths = []
    for i in range(n):
        width, height = SIDES[i % len(SIDES)]
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8)).resize((width, height), Image.BICUBIC)
        fine = Image.fromarray(rng.integers(0, 256, (height // 4, width // 4, 3), np.uint8)).resize((width, height))
        array = np.asarray(coarse, np.float32) * 0.85 + np.asarray(fine, np.float32) * 0.15
        array += rng.normal(0, 4, array.shape)
        file = io.BytesIO()
        Image.fromarray(np.clip(array, 0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
        paths.append(folder / f"{i:04d}.jpg")
        paths[-1].write_bytes(file.getvalue())
    lines = "".join(json.dumps({"file_name": p.name, "text": "a picture"}) + "\n" for p in paths)
    (folder / "metadata.jsonl").write_text(lines)
    return paths


class Alone:
    """Items with a picture and nothing else (`packing.items.Items`), to compare with the torch `DataLoader`."""

    digest = ""

    def __init__(self, source: Any, scaled: bool):
        self.source, self.scaled = source, scaled

    def empty(self) -> dict[str, np.ndarray]:
        return {}

    def make(self, i: int) -> Any:
        from pisces_jax.data.packing.items import Made

        (picture, *_) = self.source[i % len(self.source)].parts
        return Made({"image": picture.square(SIZE, scaled=self.scaled)}, 1, [])


def plain_pil(path: Path) -> np.ndarray:
    """The picture that the torch data set above makes a tensor of."""
    from PIL import Image

    image = Image.open(path).convert("RGB")
    scale = SIZE / min(image.size)
    image = image.resize([max(SIZE, round(side * scale)) for side in image.size], Image.Resampling.BICUBIC)
    left, top = (image.width - SIZE) // 2, (image.height - SIZE) // 2
    return np.array(image.crop((left, top, left + SIZE, top + SIZE)))


def cpu(flags: argparse.Namespace) -> None:
    """CPU time per picture in one thread, the ways in turns; for machines that do other work meanwhile."""
    from pisces_jax.data.images import fit, open_image

    with tempfile.TemporaryDirectory() as scratch:
        paths = photographs(Path(scratch), 12)
        ways: dict[str, Callable[[Path], np.ndarray]] = {
            "plain PIL": plain_pil,
            "ours, exact": lambda path: fit(open_image(path), SIZE),
            "ours, scaled JPEG": lambda path: fit(open_image(path, at_least=SIZE), SIZE),
        }
        for path in paths:
            np.testing.assert_array_equal(ways["ours, exact"](path), plain_pil(path))
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(flags.rounds):
            for name, way in ways.items():
                began = time.process_time()
                for path in paths:
                    way(path)
                times[name].append(1000 * (time.process_time() - began) / len(paths))
        for name, each in times.items():
            print(f"{name:20s} {statistics.median(each):6.2f} ms of CPU per picture (least {min(each):.2f})")


def pictures(flags: argparse.Namespace) -> None:
    from pisces_jax.data.packing.pipeline import batches
    from pisces_jax.data.sources import make_source

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        paths = photographs(folder, flags.pictures)
        source = make_source(dict(kind="image_folder", path=str(folder), recipe="pair")).source
        exact, scaled = (np.stack([Alone(source, s).make(i).item["image"] for i in range(30)]) for s in (False, True))
        error = np.abs(exact.astype(int) - scaled)
        runs: dict[str, Callable[[], float]] = {}
        for name, how, scale in (
            ("ours, exact, threads", dict(threads=flags.cores, workers=0), False),
            ("ours, exact, processes", dict(threads=0, workers=flags.cores), False),
            ("ours, scaled JPEG, threads", dict(threads=flags.cores, workers=0), True),
            ("ours, scaled JPEG, processes", dict(threads=0, workers=flags.cores), True),
        ):

            def ours(how: dict[str, int] = how, scale: bool = scale) -> float:
                # One pass to warm up and a timed one, like the torch loader.
                n = len(paths) * flags.repeats // 16
                reader = batches(Alone(source, scale), 16, **how)
                for _ in range(n):
                    next(reader)
                began = time.perf_counter()
                for _ in range(n):
                    next(reader)
                rate = 16 * n / (time.perf_counter() - began)
                reader.close()
                return rate

            runs[name] = ours
        if flags.torch_python:
            script = folder / "loader.py"
            script.write_text(TORCH)

            for form in ("normalised", "uint8"):

                def torch(form: str = form) -> float:
                    command = [flags.torch_python, str(script), str(SIZE), form, str(flags.cores), str(flags.repeats)]
                    done = subprocess.run([*command, *map(str, paths)], capture_output=True, text=True, check=True)
                    return float(done.stdout)

                runs[f"torch DataLoader, PIL, {form}"] = torch
        # In turns, so that other work of the machine slows all of them down.
        rates: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(flags.rounds):
            for name, run in runs.items():
                rates[name].append(run())
        for name, each in rates.items():
            rounds = ", ".join(f"{rate:.1f}" for rate in each)
            print(f"{name:34s} {statistics.median(each):8.1f} pictures/s   (of {rounds})")
        far = np.percentile(error, 99)
        print(f"scaled against exact: mean error {error.mean():.2f}, 99th percentile {far:.0f} of 255")


def packing(flags: argparse.Namespace) -> None:
    """Stage-1 lengths at full size: 729 vectors read or 64 drawn, and a text of some 80 tokens, log-normal."""
    from pisces_jax.data.packing.epochs import Epochs
    from pisces_jax.data.packing.layout import Layout
    from pisces_jax.data.packing.lengths import Lengths

    n = flags.examples
    rng = np.random.default_rng(0)
    tokens, reads, draws = np.empty(n, np.int32), np.empty(n, np.uint16), np.empty(n, np.uint16)
    for start in range(0, n, 10**6):
        part = slice(start, min(n, start + 10**6))
        draw = rng.random(part.stop - start) < 0.5
        text = np.clip(rng.lognormal(4.0, 0.9, len(draw)), 5, 3000).astype(np.int32)
        tokens[part], reads[part], draws[part] = text + np.where(draw, 68, 731), ~draw, draw
    layout = Layout(729, 64, 4096, 8, 40, 40, 384, 448)
    before = time.perf_counter(), time.process_time()
    made = Epochs([Lengths(tokens, reads, draws, {}, ())], [n], ["generated"], layout, 0)
    took = time.perf_counter() - before[0], time.process_time() - before[1]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    fill = made.used[0] / (made.per_epoch * layout.rows * layout.length)
    began = time.process_time()
    for i in range(200):
        made.members(1000, i * 7919 % made.per_epoch)
    each = (time.process_time() - began) / 200
    print(
        f"{n} examples: {took[0]:.1f} s ({took[1]:.1f} s of CPU), peak memory {peak:.2f} GiB with the lengths; "
        f"{made.per_epoch} groups per epoch, {fill:.1%} of the tokens in use; group of epoch 1000: {1000 * each:.2f} ms"
    )


def _stage(config: str, workdir: Path) -> tuple[Any, Any, Any]:
    from pisces_jax.training.config_files import load_stages
    from pisces_jax.training.programs import make_program
    from pisces_jax.training.tokenizer import load_tokenizer

    run = list(load_stages(config, {}).values())[-1]
    tokenizer = load_tokenizer(run, workdir)
    return run, tokenizer, make_program(run, tokenizer.vocab_size)


def rows(flags: argparse.Namespace) -> None:
    from pisces_jax.training import input as training_input

    with tempfile.TemporaryDirectory() as scratch:
        reader = training_input.train_iterator(*_stage(flags.config, Path(scratch)), Path(scratch))
        for _ in range(5):
            next(reader)
        began, n, seen = time.perf_counter(), 0, reader.seen
        while time.perf_counter() - began < flags.seconds:
            n += np.prod(next(reader)["tokens"].shape[:2])  # groups, rows
        took = time.perf_counter() - began
        reader.close()
        print(f"{flags.config}: {n / took:.1f} rows/s, {(reader.seen - seen) / took:.1f} examples/s")


def step(flags: argparse.Namespace) -> None:
    """The training step of a config with its input, and with one batch that is always the same, in turns."""
    import jax

    from pisces_jax.sharding import make_mesh
    from pisces_jax.training import input as training_input
    from pisces_jax.training.step import make_trainer

    with tempfile.TemporaryDirectory() as scratch:
        run, tokenizer, program = _stage(flags.config, Path(scratch))
        trainer = make_trainer(program, run, make_mesh(**run.mesh))
        state = trainer.init(jax.random.key(0))
        reader = training_input.train_iterator(run, tokenizer, program, Path(scratch))
        train, constant = trainer.train_step(), next(reader)
        times: dict[str, list[float]] = {"constant": [], "input": []}
        for turn in range(2 * flags.rounds + 2):
            name = ("constant", "input")[turn % 2]
            if name == "constant":
                reader.close()  # its threads must not work meanwhile
            else:
                next(reader)
            state, _ = train(state, trainer.put(constant))
            jax.block_until_ready(state)
            began = time.perf_counter()
            for _ in range(flags.steps):
                batch = constant if name == "constant" else next(reader)
                state, _ = train(state, trainer.put(batch))
            jax.block_until_ready(state)
            if turn > 1:  # the first of each compiles
                times[name].append((time.perf_counter() - began) / flags.steps)
        reader.close()
        without, with_input = (statistics.median(times[name]) for name in ("constant", "input"))
        print(
            f"{flags.config}: {1000 * with_input:.1f} ms per step with input, {1000 * without:.1f} ms with one "
            f"constant batch: {with_input / without - 1:+.1%}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("pictures", "cpu", "packing", "rows", "step"))
    parser.add_argument("--cores", type=int, default=2, help="threads or processes of each loader")
    parser.add_argument("--pictures", type=int, default=240)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--torch_python", help="a Python that has torch and Pillow")
    parser.add_argument("--examples", type=int, default=100_000_000)
    parser.add_argument("--config", default="configs/shapes.py:stage1")
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--steps", type=int, default=20)
    flags = parser.parse_args()
    {"pictures": pictures, "cpu": cpu, "packing": packing, "rows": rows, "step": step}[flags.part](flags)


if __name__ == "__main__":
    sys.exit(main())
