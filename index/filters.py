"""SQL conditions on a gallery's columns, as users write them."""

import re

from cots.errors import GalleryError
from index.place import plain

_QUOTED = re.compile(r"'(?:[^']|'')*'|\"(?:[^\"]|\"\")*\"|`[^`]*`|--[^\n]*|/\*.*?\*/", re.DOTALL)


def as_one(where: str) -> str:
    """A condition in a form of which LanceDB reads all or nothing.

    Of a statement it reads as much as makes sense: "id = 3 AN kind = 'image'" would be "id = 3". Within parentheses an
    end before the last one is a fault, if the condition has no such parenthesis itself.

    Raises:
        ValueError: its parentheses do not match.
    """
    depth = 0
    for character in _QUOTED.sub("", where):
        depth += (character == "(") - (character == ")")
        if depth < 0:
            break
    if depth:
        raise ValueError("its parentheses do not match")
    return f"({where}\n)"


def bad_filter(where: str, error: Exception, columns: list[str]) -> GalleryError:
    """What LanceDB says of a condition as a sentence, which lists the columns that there are."""
    text = " ".join(str(error).split())
    parsed = re.search(r"sql parser error: (.*)\)$", text)
    reason = parsed[1] if parsed else plain(text)
    reason = re.sub(r"^Schema error: |^Error resolving .*Invalid user input: | Valid fields are .*", "", reason)[:200]
    if ")" not in where:  # the one that was found is of `as_one`
        reason = reason.replace("found: )", "found: its end")
    return GalleryError(
        f"The filter {where!r} cannot be used ({reason.rstrip('.')}); the columns are: {', '.join(columns)}."
    )
