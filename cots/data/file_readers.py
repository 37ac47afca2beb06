"""Files read, hashed and looked into by processes of their own, for a decoder that is quicker than Python's threads.

A GPU decodes 14,000 JPEGs a second that lie in memory (H100), and 5,500 that sixteen threads of this process open, read
and hash, whose every call gives the interpreter's lock away and takes it back; so that is done elsewhere, in memory
that both sides see.

    python -m cots.data.file_readers DESCRIPTOR BYTES     # such a process: requests on its standard input
"""

import hashlib
import mmap
import os
import pickle
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from queue import LifoQueue
from typing import IO, Any

from cots.data.jpeg_header import BaselineJpeg, read_baseline
from cots.data.samples import Sample
from cots.errors import MediaError

PROCESSES = 8
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
        room: bytes that a process holds for its caller, in memory that both see; a job of more is the caller's own.
        pin: is told of such memory, and returns what is called before it goes away.
    """

    def __init__(self, processes: int, room: int, pin: Callable[[memoryview], Callable[[], object]] | None = None):
        self._room = room
        self._pin = pin
        self._processes = processes
        self._usable = processes > 0 and os.name == "posix" and bool(sys.executable)
        self._jobs = self._lost = 0
        # The one that worked last is next, so that there are never more processes than threads that ask at once.
        self._free: LifoQueue[_Reader | None] = LifoQueue()
        for _ in range(processes):
            self._free.put(None)

    @contextmanager
    def read(self, samples: Sequence[Sample]) -> Iterator[list[JpegFile | MediaError]]:
        """See `read_jpegs`. The contents are valid until the end of the `with` block."""
        self._jobs += 1
        if not self._usable or self._jobs <= JOBS_BEFORE:
            yield read_jpegs(samples)
            return
        reader, sound = self._free.get(), None
        try:
            try:
                reader = reader or _Reader(self._room, self._pin)
                files = reader.read(samples)
                sound = reader
            except (OSError, EOFError, pickle.UnpicklingError):
                self._lost += 1
                if self._lost > MOST_LOST:
                    self._usable = False
                files = read_jpegs(samples)
            yield files
        finally:
            if reader is not None and sound is None:  # it has ended, or its answer may still be on its way
                reader.close()
            self._free.put(sound)

    def close(self) -> None:
        """End the processes, once nobody reads."""
        for reader in [self._free.get() for _ in range(self._processes)]:
            if reader is not None:
                reader.close()
            self._free.put(None)


class _Reader:
    """A process that reads files into memory which this one sees too, as long as it runs."""

    def __init__(self, room: int, pin: Callable[[memoryview], Callable[[], object]] | None) -> None:
        with tempfile.TemporaryFile() if not hasattr(os, "memfd_create") else _memory_file() as file:
            file.truncate(room)
            self._memory = memoryview(mmap.mmap(file.fileno(), room))
            self.process = subprocess.Popen(
                # -P: what lies in the working directory is no module of ours
                [sys.executable, "-P", "-m", __name__, str(file.fileno()), str(room)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                pass_fds=[file.fileno()],
                env=os.environ | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},
            )
            self._unpin = pin(self._memory) if pin is not None else None

    def read(self, samples: Sequence[Sample]) -> list[JpegFile | MediaError]:
        """See `read_jpegs`; the contents are overwritten by the next job.

        Raises:
            OSError, EOFError, UnpicklingError: the process has ended.
        """
        _send(_open(self.process.stdin), [(sample.path, sample.offset, sample.size) for sample in samples])
        described = _receive(_open(self.process.stdout))
        if described is None:  # more than there is room for
            return read_jpegs(samples)
        files: list[JpegFile | MediaError] = []
        start = 0
        for sample, (size, digest, header, problem) in zip(samples, described, strict=True):
            if problem is not None:
                files.append(MediaError(sample.path, problem))
            else:
                files.append(JpegFile(self._memory[start : start + size], digest, header))
                start += size
        return files

    def close(self) -> None:
        self.process.kill()  # a process that was forked from this one may hold its input open, so that it does not end
        for pipe in (self.process.stdin, self.process.stdout):
            with suppress(OSError):
                _open(pipe).close()
        self.process.wait()
        if self._unpin is not None:
            self._unpin()
        self._memory = memoryview(b"")  # a mapping has a descriptor of its own


def _memory_file() -> IO[bytes]:
    return os.fdopen(os.memfd_create("cots"), "r+b")


def _serve(requests: IO[bytes], answers: IO[bytes], memory: memoryview) -> None:
    """Answer until the requests end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for whoever asks
    while True:
        try:
            asked = _receive(requests)
        except EOFError:
            return
        files = read_jpegs([Sample(path, "image", size=size, offset=offset) for path, offset, size in asked])
        described = [_described(file) for file in files]
        if sum(size for size, *_ in described) > len(memory):
            _send(answers, None)
            continue
        start = 0
        for file in files:
            if isinstance(file, JpegFile):
                memory[start : start + len(file.content)] = file.content
                start += len(file.content)
        _send(answers, described)


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
    shared, length = int(sys.argv[1]), int(sys.argv[2])
    _serve(sys.stdin.buffer, sys.stdout.buffer, memoryview(mmap.mmap(shared, length)))
