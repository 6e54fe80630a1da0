"""The lengths of a source's examples: read once, by several processes if there are many, and stored."""

import collections
import concurrent.futures
import contextlib
import hashlib
import multiprocessing
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32, Shaped
from tqdm import tqdm

from pisces_jax.data.arrays import read_arrays, write_arrays
from pisces_jax.data.example import TRANSIENT, Text, reason_of
from pisces_jax.data.packing.layout import Layout, Source, lay_out
from pisces_jax.data.tokenizers import Tokenizer
from pisces_jax.utils.errors import UserError

WORTH_PROCESSES = 200_000  # examples
SPAN = 4096  # examples per task of a process
THREADS = 32  # per process, to wait for remote storage
KEPT_MESSAGES = 100


class Lengths(NamedTuple):
    """What packing needs to know of every example. `tokens` is -1 if the example cannot be used.

    `reasons` counts these examples by reason, and `messages` says what was found in the first of them.
    """

    tokens: Int32[np.ndarray, "N"]
    reads: Shaped[np.ndarray, "N"]  # uint16
    draws: Shaped[np.ndarray, "N"]  # uint16
    reasons: dict[str, int]
    messages: Sequence[str]


def scan_lengths(
    source: Source,
    tokenizer: Tokenizer,
    layout: Layout,
    name: str = "source",
    folder: str | os.PathLike | None = None,
    workers: int | None = None,
) -> Lengths:
    """Reads every example's text once, and decodes no picture.

    With `folder`, the result is kept there, in a file whose name has a hash of all that it depends on. The arrays are
    views of that file, which later runs, other stages and worker processes share. If the storage fails during a scan,
    the result is not kept. Large sources are read by `workers` processes (by default one per core), remote ones by many
    threads in each.
    """
    path = None
    if folder is not None:
        path = Path(folder) / f"{name}-{_fingerprint(source, tokenizer, layout)}.lengths"
        if (found := _load(path, len(source))) is not None:
            return found
    workers = 1 if len(source) < WORTH_PROCESSES else workers or os.cpu_count() or 1
    work = source, tokenizer, layout
    spans = [(start, min(start + SPAN, len(source))) for start in range(0, len(source), SPAN)]
    parts = []
    bar = tqdm(total=len(source), desc=f"lengths of {name}", unit="example", delay=3.0, mininterval=1.0)
    with bar, contextlib.ExitStack() as stack:
        if workers == 1:
            scanned: Iterable[Lengths] = (_scan(*work, *span) for span in spans)
        else:
            context = multiprocessing.get_context("spawn")
            pool = concurrent.futures.ProcessPoolExecutor(workers, context, initializer=_start, initargs=work)
            scanned = stack.enter_context(pool).map(_scan_span, spans)
        for part in scanned:
            parts.append(part)
            bar.update(len(part.tokens))
    reasons = sum((collections.Counter(part.reasons) for part in parts), collections.Counter[str]())
    lengths = Lengths(
        tokens=np.concatenate([part.tokens for part in parts]),
        reads=np.concatenate([part.reads for part in parts]),
        draws=np.concatenate([part.draws for part in parts]),
        reasons=dict(reasons),
        messages=[message for part in parts for message in part.messages][:KEPT_MESSAGES],
    )
    if path is None or TRANSIENT & reasons.keys():
        return lengths
    about = {"reasons": lengths.reasons, "messages": list(lengths.messages)}
    write_arrays(path, about, {"tokens": lengths.tokens, "reads": lengths.reads, "draws": lengths.draws})
    return _load(path, len(source)) or lengths


def digest(lengths: Sequence[Lengths]) -> str:
    """A hash of all that packing takes from its sources. If it differs, so do the batches."""
    made = hashlib.blake2b(digest_size=8)
    for each in lengths:
        for array in each[:3]:
            made.update(np.ascontiguousarray(array).data)
    return made.hexdigest()


def _load(path: Path, length: int) -> Lengths | None:
    found = read_arrays(path)
    if found is None or len(found[1]["tokens"]) != length or TRANSIENT & found[0]["reasons"].keys():
        return None
    about, arrays = found
    return Lengths(**arrays, reasons=about["reasons"], messages=about["messages"])


def _scan(source: Source, tokenizer: Tokenizer, layout: Layout, start: int, stop: int) -> Lengths:
    tokens = np.zeros(stop - start, np.int32)
    reads, draws = np.zeros(stop - start, np.uint16), np.zeros(stop - start, np.uint16)
    reasons, messages = collections.Counter[str](), list[str]()

    def measure(i: int) -> tuple[int, int, int] | UserError:
        try:
            laid_out = lay_out(source[i], tokenizer, layout)
        except UserError as error:
            return error
        read = sum(placed.role == "read" for placed in laid_out.pictures)
        return len(laid_out.tokens), read, len(laid_out.pictures) - read

    with contextlib.ExitStack() as stack:
        # Remote examples are waited for, many at once.
        at_once = stack.enter_context(concurrent.futures.ThreadPoolExecutor(THREADS)).map if source.remote else map
        for i, found in enumerate(at_once(measure, range(start, stop))):
            if isinstance(found, UserError):
                tokens[i] = -1
                reasons[reason_of(found)] += 1
                if len(messages) < KEPT_MESSAGES:
                    messages.append(str(found))
            else:
                tokens[i], reads[i], draws[i] = found
    return Lengths(tokens, reads, draws, dict(reasons), messages)


# Set once in each worker process, so that the source is sent to it only once.
_work: tuple[Source, Tokenizer, Layout] | None = None


def _start(*work: object) -> None:
    global _work
    _work = work  # type: ignore[assignment]


def _scan_span(span: tuple[int, int]) -> Lengths:
    assert _work is not None
    return _scan(*_work, *span)


def _fingerprint(source: Source, tokenizer: Tokenizer, layout: Layout) -> str:
    """Changes with all that can change a length."""
    words = ["2", tokenizer.fingerprint, layout.read_vectors, layout.draw_vectors, layout.length]
    words += fingerprint_words(source)
    return hashlib.blake2b("\0".join(map(str, words)).encode(errors="surrogatepass"), digest_size=8).hexdigest()


def fingerprint_words(source: Source) -> list[str]:
    """What tells a source from others: its `fingerprint` and some of its examples."""
    words = [str(len(source)), type(source).__qualname__, source.fingerprint]
    for i in np.linspace(0, len(source) - 1, num=min(len(source), 32)).astype(int):
        try:
            example = source[int(i)]
        except UserError as error:
            words += [] if reason_of(error) in TRANSIENT else ["unreadable"]
            continue
        words.append(example.key)
        for part in example.parts:
            words += [part.turn] if part.turn else []
            words.append(part.text if isinstance(part, Text) else part.role)
    return words
