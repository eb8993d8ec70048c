"""A `Template` as a Jinja chat template, for any program that reads those from a model's folder.

Every part of a message is a line: ``[{"type": "image"}, {"type": "text", "text": "What is this?"}]`` is the turn
``<image>\\nWhat is this?``, as corpora write it.
"""

import json

from deepstack_pl.batch import Role
from deepstack_pl.language.template import IMAGE, Template, UserText


def chat_template(template: Template) -> str:
    """The Jinja that writes what ``template`` does: the same string, with the bos token where there is one.

    ``add_generation_prompt`` ends a question with what an answer follows; ``{% generation %}`` marks what is learned.
    """
    user = ["{%- set ns.said = ns.said.strip() -%}"] if Role.user in template.trimmed else []
    assistant = ["{%- set ns.said = ns.said.strip() -%}"] if Role.assistant in template.trimmed else []
    count = f"ns.said.split('{IMAGE}') | length - 1"
    match template.user_text:
        case UserText.image_first:
            rest = f"ns.said.replace('{IMAGE}', '').strip()"
            user.append(f"{{%- if {count} == 1 -%}}")
            user.append(f"{{%- set ns.said = ('{IMAGE}\\n' + {rest}).strip() -%}}")
            user.append("{%- endif -%}")
        case UserText.images_only:
            user.append(f"{{%- if {count} == 0 -%}}")
            user.append("{{- raise_exception('A question without an image: this template keeps only images.') -}}")
            user.append("{%- endif -%}")
            user.append(f"{{%- set ns.said = '{IMAGE}' * ({count}) -%}}")
        case UserText.as_written:
            pass
    lines = [
        "{{- bos_token -}}" if template.bos else "",
        "{%- set ns = namespace(said='', last='') -%}",
        "{%- for message in messages -%}",
        "{%- if message['content'] is string -%}",
        "{%- set ns.said = message['content'] -%}",
        "{%- else -%}",
        "{%- set ns.said = '' -%}",
        "{%- for part in message['content'] -%}",
        "{%- if not loop.first -%}{%- set ns.said = ns.said + '\\n' -%}{%- endif -%}",
        "{%- if part['type'] == 'text' -%}{%- set ns.said = ns.said + part['text'] -%}",
        f"{{%- elif part['type'] == 'image' -%}}{{%- set ns.said = ns.said + '{IMAGE}' -%}}",
        "{%- else -%}{{- raise_exception('A part is a text or an image.') -}}",
        "{%- endif -%}",
        "{%- endfor -%}",
        "{%- endif -%}",
        "{%- if message['role'] not in ('user', 'assistant') -%}",
        "{{- raise_exception('Roles are user and assistant: the system text belongs to the template.') -}}",
        "{%- elif message['role'] == 'assistant' and loop.first -%}",  # dropped, as `template.render` does
        "{%- elif message['role'] == ns.last or (message['role'] == 'assistant' and not ns.last) -%}",
        "{{- raise_exception('Two turns in a row by the ' + message['role'] + ': join them into one.') -}}",
        "{%- elif message['role'] == 'user' -%}",
        *user,
        f"{{%- if ns.last -%}}{_text(template.between)}{{%- else -%}}{_text(template.system)}{{%- endif -%}}",
        f"{_text(template.user_prefix)}{{{{- ns.said -}}}}{_text(template.user_suffix)}",
        "{%- set ns.last = 'user' -%}",
        "{%- else -%}",
        *assistant,
        _text(template.assistant_prefix),
        f"{{%- generation -%}}{_text(template.answer_lead)}{{{{- ns.said -}}}}{_text(template.assistant_suffix)}"
        "{%- endgeneration -%}",
        "{%- set ns.last = 'assistant' -%}",
        "{%- endif -%}",
        "{%- endfor -%}",
        "{%- if not ns.last -%}{{- raise_exception('The conversation has no question.') -}}{%- endif -%}",
        "{%- if add_generation_prompt -%}",
        "{%- if ns.last == 'assistant' -%}",
        "{{- raise_exception('The conversation ends with an answer: leave it out, or add_generation_prompt.') -}}",
        f"{{%- endif -%}}{_text(template.assistant_prefix)}",
        "{%- endif -%}",
    ]
    return "\n".join(line for line in lines if line) + "\n"


def _text(text: str) -> str:
    """A Jinja tag that writes ``text``."""
    return f"{{{{- {json.dumps(text, ensure_ascii=False)} -}}}}" if text else ""
