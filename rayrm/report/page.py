"""One HTML file from a template: every text escaped and made visible, written whole or not at all.

The page carries a policy that lets it load nothing. Texts come from policies, which write anything: control
characters, marks that turn the direction of writing, and halves of surrogate pairs are shown by their number.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from rayrm.errors import writing

_INVISIBLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ud800-\udfff\ufeff\ufffe\uffff]"
)


def visible(text: str) -> str:
    """`text` with its invisible characters written out (`<U+202E>`); newlines and tabs stay."""
    return _INVISIBLE.sub(lambda found: f"<U+{ord(found[0]):04X}>", text.replace("\r\n", "\n"))


def write_page(file: Path, template: str, **values: Any) -> Path:
    """`rayrm/report/<template>` filled with `values`, written to `file`; pictures are `Picture`s.

    Raises RunDirectoryError where the disk takes no file.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    def shown(value: Any) -> Any:
        # Markup is ours: the templates' own, and drawn pictures.
        return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value

    pages = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pages.filters["drawn"] = Markup
    text = pages.get_template(template).render(**values)
    aside = file.with_name(f".{file.name}.{os.getpid()}")
    with writing(file):
        aside.write_text(text, encoding="utf-8")
        aside.replace(file)
    return file
