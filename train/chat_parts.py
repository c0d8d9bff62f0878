"""Chat templates between two forms of a message: text with `<image>` in it, and a list of parts.

Language models' own templates take text. Processors of transformers, and so vLLM and lmms-eval, hand over
`[{"type": "image"}, {"type": "text", "text": "..."}]`, which such a template would print or drop.
"""

from __future__ import annotations

from typing import Any

# Written before a template of text. A turn's only picture goes before its words, as in training.
FROM_PARTS = """\
{%- set given = namespace(messages=[]) -%}
{%- for message in messages -%}
{%- if message.content is string -%}{%- set text = message.content -%}
{%- else -%}
{%- set text -%}
{%- for part in message.content -%}
{%- if part.type == 'image' -%}{{- '<image>\\n' -}}
{%- elif part.type == 'text' -%}{{- part.text -}}{%- endif -%}
{%- endfor -%}
{%- endset -%}
{%- endif -%}
{%- if text.count('<image>') == 1 -%}
{%- set text = ('<image>\\n' + text.replace('<image>', '') | trim) | trim -%}
{%- endif -%}
{%- set given.messages = given.messages + [dict(message, content=text)] -%}
{%- endfor -%}
{%- set messages = given.messages -%}
"""
# Written before a template of parts, which reads nothing of a text.
FROM_TEXT = """\
{%- set given = namespace(messages=[]) -%}
{%- for message in messages -%}
{%- set parts = namespace(all=message.content) -%}
{%- if message.content is string -%}
{%- set parts.all = [] -%}
{%- for piece in message.content.split('<image>') -%}
{%- if not loop.first -%}{%- set parts.all = parts.all + [{'type': 'image'}] -%}{%- endif -%}
{%- if piece | trim -%}
{%- set parts.all = parts.all + [{'type': 'text', 'text': piece.lstrip('\\n')}] -%}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- set given.messages = given.messages + [dict(message, content=parts.all)] -%}
{%- endfor -%}
{%- set messages = given.messages -%}
"""


def taking_parts(template: str) -> str:
    """A template of text as one that takes both forms; one that came from parts as it was."""
    if template.startswith(FROM_TEXT):
        return template.removeprefix(FROM_TEXT)
    return FROM_PARTS + template.removeprefix(FROM_PARTS)


def taking_text(tokenizer: Any) -> str | None:
    """The chat template of a tokenizer as one that takes text; None where there is none.

    Which form it takes is told by what becomes of a question: a template of parts drops it, or fails.
    """
    template: str | None = tokenizer.chat_template
    if template is None or template.startswith((FROM_PARTS, FROM_TEXT)):
        return None if template is None else template.removeprefix(FROM_PARTS)
    probe = "question"
    try:
        text = tokenizer.apply_chat_template([{"role": "user", "content": probe}], tokenize=False)
    except Exception:  # a template may raise anything
        text = ""
    return template if probe in text else FROM_TEXT + template
