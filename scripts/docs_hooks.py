"""What mkdocs does not do by itself: links into the source, numbers in tables that stay in one line, and a check that
pages load nothing from the network.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError

ROOT = Path(__file__).resolve().parents[1]
_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)#\s:]+)(?:#[^)\s]*)?\)")
_NUMBER = re.compile(r"<td>([\d.,±%/()¹ –-]{1,24})</td>")
_LOADED = re.compile(
    r"""<(?:script|img|iframe|source|video|audio|embed)\b[^>]*\bsrc=["']?((?:https?:)?//[^"'\s>]+)"""
    r"""|<link\b(?=[^>]*\brel=["']?(?:stylesheet|preload|preconnect|icon|modulepreload))"""
    r"""[^>]*\bhref=["']?((?:https?:)?//[^"'\s>]+)"""
)
_IN_STYLE = re.compile(r"""@import\s+(?:url\()?["']?(?:https?:)?//|url\(["']?(?:https?:)?//""")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turns links to files outside of docs/, which the site does not hold, into their paths."""
    folder = posixpath.dirname(page.file.src_uri)

    def path_of(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join("docs", folder, link[2]))
        if target.startswith("docs/"):
            return link[0]
        if target.startswith("../") or not (ROOT / target).exists():
            raise PluginError(f"docs/{page.file.src_uri} links to {link[2]}, and there is no {target}.")
        return f"{link[1]} (`{target}`)" if link[1].strip("`") not in (target, Path(target).name) else f"`{target}`"

    return _LINK.sub(path_of, markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Marks the cells of tables that hold numbers, for docs/site.css."""
    return _NUMBER.sub(r'<td class="number">\1</td>', html)


def on_post_build(config: Any, **_: Any) -> None:
    """Refuses a site whose pages or styles load scripts, styles, fonts or pictures from elsewhere."""
    site = Path(config.site_dir)
    found = [
        f"{path.relative_to(site)}: {match[0][:200]}"
        for pattern, expression in (("*.html", _LOADED), ("*.css", _IN_STYLE))
        for path in sorted(site.rglob(pattern))
        for match in expression.finditer(path.read_text(encoding="utf-8"))
    ]
    if found:
        raise PluginError("Pages load from the network:\n" + "\n".join(found[:20]))
