"""Makes the built site light: style rules that cannot match, icons and files nobody loads go.

A rule is kept when every class it asks for occurs somewhere in the site's pages or scripts. A
class that a script puts together from pieces would be missed, so those prefixes are named below.
The icon font is cut down to the icons whose rules are left.
"""

from __future__ import annotations

import logging
import re
import shutil
from pathlib import Path

import tinycss2
from fontTools.subset import Options, Subsetter
from fontTools.ttLib import TTFont
from sphinx.application import Sphinx

BUILT_FROM_PIECES = ("mjx", "sd-sphinx-override")
HEAVY = ("styles/pydata-sphinx-theme.css", "sphinx-design.min.css", "mystnb.*.css", "basic.css")
UNUSED = (
    "scripts/bootstrap.js*",
    "scripts/fontawesome.js*",
    "scripts/*.map",
    "styles/*.map",
    "scripts/*.LICENSE.txt",
    "*webpack-macros.html",
)
WORD = re.compile(r"-?[A-Za-z_][\w-]*")
CLASS = re.compile(r"\.(-?[A-Za-z_][\w-]*)")
INNER = re.compile(r":(?:not|is|where|has)\((?:[^()]|\([^()]*\))*\)")
CONTENT = re.compile(r'content:\s*"(?:\\([0-9a-f]{3,4})|\\?(.))"')
FACE = re.compile(r"@font-face\s*\{[^}]*fa-(solid-900|regular-400|brands-400)[^}]*\}")


def vocabulary(site: Path) -> set[str]:
    """Every word of the pages and scripts: whatever can be a class's name."""
    words: set[str] = set()
    for path in [*site.glob("**/*.html"), *site.glob("_static/**/*.js")]:
        if "mathjax" not in path.parts and path.name not in ("fontawesome.js", "bootstrap.js"):
            words.update(WORD.findall(path.read_text(encoding="utf-8")))
    return words


def can_match(selector: str, words: set[str]) -> bool:
    if "\\" in selector:
        return True
    names = CLASS.findall(INNER.sub("", selector))
    return all(name in words or name.startswith(BUILT_FROM_PIECES) for name in names)


def split_selectors(prelude: str) -> list[str]:
    """At the commas that stand outside brackets."""
    parts, depth, start = [], 0, 0
    for i, char in enumerate(prelude):
        depth += (char in "([") - (char in ")]")
        if char == "," and depth == 0:
            parts.append(prelude[start:i])
            start = i + 1
    return [*parts, prelude[start:]]


def trim_rules(rules: list, words: set[str]) -> str:
    kept = []
    for rule in rules:
        if rule.type == "qualified-rule":
            selectors = split_selectors(tinycss2.serialize(rule.prelude))
            matching = [s for s in selectors if can_match(s, words)]
            if matching:
                kept.append(f"{','.join(matching)}{{{tinycss2.serialize(rule.content)}}}")
        elif rule.type == "at-rule" and rule.lower_at_keyword in {"media", "supports"}:
            inside = tinycss2.parse_rule_list(
                rule.content, skip_comments=True, skip_whitespace=True
            )
            if body := trim_rules(inside, words):
                head = tinycss2.serialize(rule.prelude)
                kept.append(f"@{rule.lower_at_keyword}{head}{{{body}}}")
        elif rule.type == "error":
            raise ValueError(f"style sheet: {rule.message}")
        else:
            kept.append(rule.serialize())
    return "\n".join(kept)


def trim_css(text: str, words: set[str]) -> str:
    rules = tinycss2.parse_stylesheet(text, skip_comments=True, skip_whitespace=True)
    return trim_rules(rules, words)


def cut_icon_font(font: Path, points: set[int], target: Path) -> None:
    options = Options()
    options.flavor = "woff"
    options.layout_features = []
    options.recalc_timestamp = False
    with TTFont(font, recalcTimestamp=False) as face:
        subsetter = Subsetter(options)
        subsetter.populate(unicodes=points)
        subsetter.subset(face)
        face.flavor = "woff"
        face.save(target)


def icon_points(sheets: list[Path]) -> set[int]:
    """Code points that the style sheets write as the content of an element: the icons in use."""
    points: set[int] = set()
    for sheet in sheets:
        for escape, char in CONTENT.findall(sheet.read_text(encoding="utf-8")):
            points.add(int(escape, 16) if escape else ord(char))
    return points


def trim_icons(static: Path, theme: Path) -> None:
    """One small icon font beside the theme's style sheet, which is made to name it."""
    target = static / "styles" / "icons.woff"

    def face(match: re.Match[str]) -> str:
        if match[1] != "solid-900":
            return ""
        return re.sub(r"src:[^;}]*", f'src:url({target.name}) format("woff")', match[0])

    fonts = static / "vendor" / "fontawesome" / "webfonts"
    cut_icon_font(fonts / "fa-solid-900.ttf", icon_points([*static.rglob("*.css")]), target)
    theme.write_text(FACE.sub(face, theme.read_text(encoding="utf-8")), encoding="utf-8")
    shutil.rmtree(static / "vendor")


def trim_site(app: Sphinx, exception: Exception | None) -> None:
    if exception is not None or app.builder.format != "html":
        return
    static = Path(app.outdir) / "_static"
    words = vocabulary(Path(app.outdir))
    for pattern in HEAVY:
        for sheet in static.glob(pattern):
            sheet.write_text(trim_css(sheet.read_text(encoding="utf-8"), words), encoding="utf-8")
    if (static / "vendor").exists():
        trim_icons(static, static / HEAVY[0])
    for pattern in UNUSED:
        for file in static.glob(pattern):
            file.unlink()
    shutil.rmtree(static / "locales", ignore_errors=True)


def setup(app: Sphinx) -> None:
    logging.getLogger("fontTools").setLevel(logging.WARNING)
    app.connect("build-finished", trim_site, priority=700)
