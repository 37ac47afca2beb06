"""The HTML of a result. What comes from a gallery (captions, paths, sources, licences) is text, and is escaped here."""

import mimetypes
from collections.abc import Iterable
from html import escape
from pathlib import PurePath
from string import Template
from urllib.parse import quote

from cots.data.shards import split_member
from index.search import Hit

_CARD = Template(
    '<li class="card" $data>'
    '<button type="button" class="tile" aria-label="$verb: $name">'
    '<img class="still" src="$still" alt="$name" loading="lazy" decoding="async" width="440" height="440">'
    "$clip</button>"
    '<button type="button" class="like" aria-label="More like this: $name">'
    '<svg viewBox="0 0 20 20" aria-hidden="true"><circle cx="7" cy="10" r="5"/><circle cx="13" cy="10" r="5"/></svg>'
    "<span>More like this</span></button>"
    '<p class="caption">$name</p>'
    '<p class="meta">$score<button type="button" class="path" title="Copy $path" aria-label="Copy the path $path">'
    "$short_path</button></p></li>"
)
_SCORE = Template('<span class="score" title="Similarity (cosine)">$score</span>')
# Nothing of a clip is fetched before it is asked to play.
_VIDEO = Template(
    '<video data-src="$media$fragment" muted playsinline preload="none" tabindex="-1" aria-hidden="true"></video>'
)
_ANIMATION = Template('<img class="moving" data-src="$media" alt="" aria-hidden="true">')
_BADGE = Template(
    '<span class="moment"><svg viewBox="0 0 9 10" aria-hidden="true"><path d="M0.5 0.6v8.8l8-4.4z"/></svg>'
    "$moment</span>"
)


def cards(hits: Iterable[Hit], mark: str, scored: bool = True) -> str:
    """The list items of the grid.

    Args:
        hits: the results, in their order.
        mark: of the gallery's version; in the media's addresses, so that a browser's cache answers for no other one.
        scored: whether the hits have scores worth showing (results of a search) or not (a sampling).
    """
    return "".join(_card(hit, mark, scored) for hit in hits)


def clock(seconds: float) -> str:
    """Seconds as a player shows them: 0:07, 1:23:45."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def short_path(path: str) -> str:
    """The last folder and the name: what tells two results apart in little space. A shard's member keeps its shard."""
    shard, member = split_member(path)
    return f"{PurePath(shard).name}/{PurePath(member).name}" if member else "/".join(PurePath(path).parts[-2:])


def short_folder(path: str) -> str:
    """The last two folders of a path, or the shard of a member: for cards that bear the file's name already."""
    shard, member = split_member(path)
    if member:
        return PurePath(shard).name
    folder = PurePath(path).parent
    return "/".join(folder.relative_to(folder.anchor).parts[-2:]) or folder.anchor


def _card(hit: Hit, mark: str, scored: bool) -> str:
    caption, _, others = hit.caption.partition("\n")
    name = caption or PurePath(hit.path).name
    media = f"media/{hit.id}?v={quote(mark)}"
    moment = fragment = ""
    if hit.start is not None and hit.end is not None:
        moment = f"{clock(hit.start)}\N{EN DASH}{clock(max(hit.end, hit.start + 1))}"
        fragment = f"#t={hit.start:.2f},{hit.end:.2f}"
    # Animated GIF, WebP and PNG count as videos, but a browser shows them as pictures.
    player = hit.kind == "video" and not (mimetypes.guess_type(hit.path, strict=False)[0] or "").startswith("image/")
    data = {
        "id": hit.id,
        "kind": hit.kind,
        "caption": name,
        "others": others,
        "path": hit.path,
        "source": hit.source,
        "licence": hit.licence,
        "score": f"{hit.score:.3f}" if scored else "",
        "moment": moment,
        "start": "" if hit.start is None else f"{hit.start:.2f}",
        "end": "" if hit.end is None else f"{hit.end:.2f}",
        "media": media,
        "large": f"thumb/{hit.id}?size=large&v={quote(mark)}" if hit.kind == "image" or player else media,
        "player": "1" if player else "",
    }
    clip = ""
    if hit.kind == "video":
        template = _VIDEO if player else _ANIMATION
        clip = template.substitute(media=media, fragment=fragment) + _BADGE.substitute(moment=moment or "Clip")
    return _CARD.substitute(
        data=" ".join(f'data-{key}="{escape(str(value))}"' for key, value in data.items()),
        verb="Play" if hit.kind == "video" else "Enlarge",
        name=escape(name),
        still=f"thumb/{hit.id}?v={quote(mark)}",
        clip=clip,
        score=_SCORE.substitute(score=data["score"]) if scored else "",
        path=escape(hit.path),
        short_path=escape(short_path(hit.path) if caption else short_folder(hit.path)),
    )
