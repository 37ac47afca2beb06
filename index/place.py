"""Where a gallery's table lies: in the gallery's folder, in another folder, or in an object store.

What an object store cannot do as files do is said here once: who may write, and what its errors mean. Credentials,
endpoint and region come from the environment, as LanceDB reads them, and are never written anywhere.
"""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from cots.errors import GalleryError, MissingDependency

if TYPE_CHECKING:
    from lancedb.table import Table

TABLE = "vectors"
SCHEMES = ("s3", "gs", "az")  # stores that put an object only if there is none, which Lance's commits rest on
IDENTITY = b"cots.table"  # in the schema's metadata: which table this is, whatever lies at the same address later
OWNER = "cots.owner"  # in the metadata of the column `id`: the gallery folder that may write
OF_A_STORE = (
    r'Generic (?!LocalFileSystem)[\w/]+ error|store: "(?!LocalFileSystem)[\w/]+"|Error performing \w+ http|'
    r"Unable to find object store"
)
MEANINGS = (  # of what a store or the way to it says, the first that fits
    (r"NoSuchBucket|ContainerNotFound|Bucket '.*' not found", "there is no such bucket"),
    (r"BadScheme", "its endpoint is http; set ALLOW_HTTP=true if that is meant"),
    (r"credential|TokenRequest|no storage account|InvalidAccessKeyId|SignatureDoesNotMatch", "its credentials are "
     "missing or wrong; set them in the environment"),
    (r"AccessDenied|Forbidden|status(?: code)?: 40[13]|PermissionDenied|Unauthenticated", "access is denied"),
)  # fmt: skip
OF_A_FOLDER = r"LanceError\(IO\)|Not found: |[Cc]orrupt|os error \d+"  # what LanceDB says of damaged files
OF_A_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)
OUTAGE = r"error sending request|HttpError|timed? ?out|status(?: code)?: (5\d\d|429)|[Cc]onnection"


@dataclass(frozen=True)
class TablePlace:
    """The folder or the address that holds `vectors.lance`.

    Attributes:
        address: an absolute folder, or a URI of one of `SCHEMES`.
    """

    address: str

    @classmethod
    def parse(cls, given: str | Path) -> "TablePlace":
        """What a user names as the place of a table.

        Raises:
            GalleryError: it is empty, the address of no store that COTS knows, or holds credentials, which the
                manifest would then hold too.
        """
        given = str(given)
        if given and "://" not in given:
            return cls(str(Path(given).expanduser().absolute()))
        scheme, _, rest = given.partition("://")
        place, *options = re.split(r"[?#]", rest, maxsplit=1)
        bucket, _, prefix = place.partition("/")
        scheme = scheme.lower()
        if options or re.search("[:@]", bucket):  # a secret may hold a slash, so that its @ is not in the bucket
            raise GalleryError(
                f"The {scheme}:// address was given with more than a bucket and a prefix; give only these, and set "
                "credentials and options in the environment, such as AWS_ACCESS_KEY_ID."
            )
        if scheme not in SCHEMES or not re.fullmatch(r"[\w.-]+", bucket):
            known = ", ".join(f"{scheme}://bucket/prefix" for scheme in SCHEMES)
            raise GalleryError(f"A table cannot be kept at {given!r}; give a folder or one of {known}.")
        return cls(f"{scheme}://{bucket}/{prefix}".rstrip("/"))

    def is_that_of(self, other: "TablePlace") -> bool:
        """Whether both are the same place, whatever name it was given."""
        if self.folder is None or other.folder is None:
            return self == other
        return os.path.realpath(self.address) == os.path.realpath(other.address)

    @property
    def folder(self) -> Path | None:
        """The table's own folder; None in an object store."""
        return None if "://" in self.address else Path(self.address) / f"{TABLE}.lance"

    def create(self, schema: pa.Schema, identity: str = "", owner: str = "") -> "Table | None":
        """Make the table; None if there is one already.

        Of several that try at once LanceDB may let two through, of which the later one's table stays.

        Args:
            schema: of its rows.
            identity, owner: what to mark it with if it lies outside of its gallery's folder.

        Raises:
            GalleryError: the place cannot be reached, or the folder not be made or written to.
        """
        if identity:
            fields = [field.with_metadata({OWNER: owner}) if field.name == "id" else field for field in schema]
            schema = pa.schema(fields, {IDENTITY: identity.encode()})
        with self.faults_told():
            try:
                return self._connect().create_table(TABLE, schema=schema)
            except (ValueError, RuntimeError) as error:
                if "already exists" in str(error) or "commit conflict" in str(error):
                    return None
                raise
            except OSError as error:
                if self.folder is None:
                    raise
                reason = (error.strerror or str(error)).lower()
                raise GalleryError(
                    f"No table can be made in {self.address} ({reason}); choose another place."
                ) from error

    def open(self) -> "Table | None":
        """The table; None if there is none.

        Raises:
            GalleryError: the place cannot be reached.
        """
        with self.faults_told():
            try:
                return self._connect().open_table(TABLE)
            except ValueError as error:
                if "was not found" in str(error):
                    return None
                raise

    @contextmanager
    def faults_told(self) -> Iterator[None]:
        """Turn what LanceDB says of faults of the disk, of the table's files or of a store into a sentence.

        Other errors pass as they are.

        Raises:
            GalleryError: the disk, the store or the way to it failed, or the table is damaged.
        """
        try:
            yield
        except (RuntimeError, ValueError, OSError) as error:
            fault = self.fault(error)
            if fault is None:
                raise
            raise fault from error

    def fault(self, error: Exception) -> GalleryError | None:
        """A fault of the disk, of the table's files or of the store as a sentence; None for any other error."""
        if is_of_a_disk(error):
            reason = os.strerror(_number_of(error)).lower()
        elif self.folder is None:
            if not is_store_fault(error):
                return None
            reason = meaning(str(error))
        elif not isinstance(error, OSError) and re.search(OF_A_FOLDER, str(error)):
            return GalleryError(
                f"The table {self.folder} is damaged ({meaning(str(error))}); put it back from a copy, or build "
                "another gallery."
            )
        else:
            return None
        return GalleryError(
            f"The table at {self.address} cannot be used ({reason}); nothing that it holds is lost, "
            "mend that and run the same command again."
        )

    def _connect(self) -> Any:
        try:
            os.environ.setdefault("LANCEDB_LOG", "error")  # what it warns of is met here, and told in a sentence
            import lancedb
        except ImportError as error:
            raise MissingDependency("lancedb", "pip install 'cots[gallery]'") from error
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
        # LanceDB reads it from the environment itself, except before it refuses a bucket whose name has dots.
        options = {"region": region} if region and self.address.startswith("s3://") else None
        return lancedb.connect(self.address, storage_options=options)


def is_store_fault(error: BaseException | None) -> bool:
    """Whether an error of LanceDB's comes from an object store or from the way to it."""
    return bool(re.search(OF_A_STORE, str(error)))


def is_of_a_disk(error: BaseException | None) -> bool:
    """Whether an error says what a disk refuses: to write, to read, for want of room or of permission."""
    return _number_of(error) in OF_A_DISK


def _number_of(error: BaseException | None) -> int:
    """The system's number of what a disk refuses, which LanceDB has in its text; 0 for other errors."""
    if isinstance(error, OSError) and error.errno:
        return error.errno
    told = re.search(r"\b(?:os error|errno) (\d+)", str(error))
    return int(told[1]) if told else 0


def is_outage(error: BaseException | None) -> bool:
    """Whether an error of LanceDB's says that a store did not answer, so that asking again may help."""
    text = str(error)
    refused = any(re.search(sign, text) for sign, _ in MEANINGS)
    return is_store_fault(error) and not refused and bool(re.search(OUTAGE, text))


def identity_of(table: "Table") -> str:
    """What a table was marked with when it was made; "" of one in its gallery's folder."""
    return (table.schema.metadata or {}).get(IDENTITY, b"").decode()


def owner_of(table: "Table") -> str:
    """The mark of the folder that may write."""
    return (table.schema.field("id").metadata or {}).get(OWNER.encode(), b"").decode()


def folder_mark(lock: Path) -> str:
    """What tells a gallery's folder from its copies: of its lock file, which is never replaced, number and time."""
    status = lock.stat()
    return f"{status.st_ino}-{status.st_mtime_ns}"


def meaning(text: str) -> str:
    """An error of LanceDB's in a few words, with no signature that an address holds."""
    for sign, words in MEANINGS:
        if re.search(sign, text):
            return words
    if re.search(OUTAGE, text):
        return "it cannot be reached"
    return plain(text)[-200:]


def plain(text: str) -> str:
    """An error of LanceDB's without its kind, the places in its source, and what an address may hold."""
    text = re.sub(r"\?\S+", "", text)  # of an address, where Azure takes a signature
    text = re.sub(
        r"^.*LanceError\(\w+\): |^lance error: |^Invalid input, |,? ?\S+\.rs(:\d+)+", "", " ".join(text.split())
    )
    return " ".join(text.split()).rstrip(".")
