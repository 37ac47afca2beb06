"""Files read, hashed and looked into by processes of their own, for a decoder that is quicker than Python's threads.

A GPU decodes ten thousand JPEGs a second. To open, read and hash a file gives the interpreter's lock away and takes it
back ten times, and of sixteen threads that do so each waits for the others; so that is done elsewhere, and what comes
back is one block of bytes for many files.

    python -m cots.data.file_readers     # such a process: requests on its standard input, answers on its output
"""

import contextlib
import hashlib
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import IO, Any

from cots.data.jpeg_header import BaselineJpeg, read_baseline
from cots.data.samples import Sample
from cots.errors import MediaError

PROCESSES = 4
MOST_LOST = 16  # processes, before no more are started
JOBS_BEFORE = 4  # which are done before a process would have started
_SIZE_BYTES = 8


@dataclass(frozen=True, slots=True)
class JpegFile:
    """Attributes:
    content: the encoded bytes.
    digest: their BLAKE2b, as 32 hexadecimal digits.
    header: None if it is no plain JPEG.
    """

    content: bytes | memoryview
    digest: str
    header: BaselineJpeg | None


def digest_of(content: bytes) -> str:
    """BLAKE2b, as 32 hexadecimal digits."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def read_jpegs(samples: Sequence[Sample]) -> list[JpegFile | MediaError]:
    """What lies behind each sample, or why it cannot be read."""
    return [_read(sample) for sample in samples]


def _read(sample: Sample) -> JpegFile | MediaError:
    try:
        content = sample.read_bytes()
    except MediaError as error:
        return error
    return JpegFile(content, digest_of(content), read_baseline(content))


class FileReaders:
    """`read_jpegs` by several processes; any number of threads may ask, and each waits for a process that is free.

    The first jobs are the caller's own, and so is what a process leaves undone because it has been killed; where none
    can be started, all are.

    Args:
        processes: how many; 0 reads in the calling thread.
    """

    def __init__(self, processes: int) -> None:
        self._free: SimpleQueue[subprocess.Popen[bytes] | None] = SimpleQueue()
        self._started: list[subprocess.Popen[bytes]] = []
        self._processes = processes
        self._jobs = self._lost = 0
        for _ in range(processes):
            self._free.put(None)

    def read(self, samples: Sequence[Sample]) -> list[JpegFile | MediaError]:
        """See `read_jpegs`."""
        self._jobs += 1
        if not self._processes or self._jobs <= JOBS_BEFORE:
            return read_jpegs(samples)
        process = self._free.get()
        try:
            if process is None or process.poll() is not None:
                process = self._start()
            return _ask(process, samples)
        except (OSError, EOFError, pickle.UnpicklingError):
            self._lost += 1
            if self._lost > MOST_LOST:
                self._processes = 0
            if process is not None:
                process.kill()
            return read_jpegs(samples)
        finally:
            self._free.put(process)

    def _start(self) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        self._started.append(process)
        return process

    def close(self) -> None:
        """End the processes; nobody may be reading."""
        with contextlib.suppress(Empty):
            while True:
                self._free.get_nowait()
        for process in self._started:
            for pipe in (process.stdin, process.stdout):
                with contextlib.suppress(OSError):
                    _open(pipe).close()  # without its input it ends
            process.wait()


def _ask(process: "subprocess.Popen[bytes]", samples: Sequence[Sample]) -> list[JpegFile | MediaError]:
    requests, answers = _open(process.stdin), _open(process.stdout)
    _send(requests, [(sample.path, sample.offset, sample.size) for sample in samples])
    described = _receive(answers)
    block = memoryview(bytearray(sum(size for size, *_ in described)))
    _fill(answers, block)
    files: list[JpegFile | MediaError] = []
    start = 0
    for sample, (size, digest, header, problem) in zip(samples, described, strict=True):
        if problem is not None:
            files.append(MediaError(sample.path, problem))
        else:
            files.append(JpegFile(block[start : start + size], digest, header))
            start += size
    return files


def _serve(requests: IO[bytes], answers: IO[bytes]) -> None:
    """Answer until the requests end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for whoever asks
    while True:
        try:
            asked = _receive(requests)
        except EOFError:
            return
        files = read_jpegs([Sample(path, "image", size=size, offset=offset) for path, offset, size in asked])
        _send(answers, [_described(file) for file in files])
        for file in files:
            if isinstance(file, JpegFile):
                answers.write(file.content)
        answers.flush()


def _described(file: JpegFile | MediaError) -> tuple[int, str, BaselineJpeg | None, str | None]:
    if isinstance(file, MediaError):
        return 0, "", None, file.reason
    return len(file.content), file.digest, file.header, None


def _send(pipe: IO[bytes], value: Any) -> None:
    document = pickle.dumps(value)
    pipe.write(len(document).to_bytes(_SIZE_BYTES, "little") + document)
    pipe.flush()


def _receive(pipe: IO[bytes]) -> Any:
    size = memoryview(bytearray(_SIZE_BYTES))
    _fill(pipe, size)
    document = memoryview(bytearray(int.from_bytes(size, "little")))
    _fill(pipe, document)
    return pickle.loads(document)


def _fill(pipe: IO[bytes], target: memoryview) -> None:
    """Read as many bytes as the target has.

    Raises:
        EOFError: there are fewer.
    """
    done = 0
    while done < len(target):
        count: int = pipe.readinto(target[done:])  # type: ignore[attr-defined]
        if not count:
            raise EOFError
        done += count


def _open(pipe: IO[bytes] | None) -> IO[bytes]:
    assert pipe is not None
    return pipe


if __name__ == "__main__":
    _serve(sys.stdin.buffer, sys.stdout.buffer)
