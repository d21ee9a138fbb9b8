# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Formulas become MathML while the site is built: browsers show it without a script, and the site loads nothing from elsewhere."""

from __future__ import annotations

import html
import re

from latex2mathml.converter import convert


# What pymdownx.arithmatex makes of `$...$` and of `$$...$$`.
FORMULA = re.compile(
    r'<(span|div) class="arithmatex">\s*\\[(\[](.*?)\\[)\]]\s*</\1>',
    re.DOTALL,
)


def on_page_content(content: str, **kwargs: object) -> str:
    def mathml(found: re.Match[str]) -> str:
        display = "block" if found[1] == "div" else "inline"
        return f'<{found[1]} class="formula">{convert(html.unescape(found[2]).strip(), display=display)}</{found[1]}>'

    return FORMULA.sub(mathml, content)
