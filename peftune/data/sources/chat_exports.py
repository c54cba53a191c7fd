"""The chat templates for other programs: Jinja for Transformers and llama.cpp, Go's for Ollama.

They write what `chat_template` writes. A special token that a message spells out is text here and a token there.
"""

from __future__ import annotations

from peftune.data.sources.chat_template import BETWEEN, EOS_TURNS, NAMES, STOPS

_LINE_ENDS = r"replace('\r\n', '\n') | replace('\r', '\n')"


def jinja_template(chat: str, begin: str) -> str:
    """For `tokenizer.apply_chat_template`; `begin` is `bos_token` or `eos_token`, whichever begins texts."""
    content = f"message['content'] | {_LINE_ENDS} | trim"
    loop = "for message in messages if message['content'] or not message['tool_calls']"  # calls are not written
    if chat == EOS_TURNS:
        return f"{{% {loop} %}}{{{{ {content} }}}}{{{{ eos_token }}}}{{% endfor %}}"
    between = repr(BETWEEN)
    disarmed = [f" | replace({stop!r}, {BETWEEN + ' ' + stop[len(BETWEEN) :]!r})" for stop in STOPS]
    return (
        f"{{% set names = {NAMES!r} %}}{{{{ {begin} }}}}{{% {loop} %}}"
        "{% if message['role'] not in names %}{{ raise_exception('unknown role: ' ~ message['role']) }}{% endif %}"
        f"{{% set content = {content}{''.join(disarmed)} %}}{{% if not loop.first %}}{{{{ {between} }}}}{{% endif %}}"
        "{{ names[message['role']] }}:{% if content %} {{ content }}{% endif %}{% endfor %}"
        f"{{% if add_generation_prompt %}}{{{{ {BETWEEN + NAMES['assistant'] + ':'!r} }}}}{{% endif %}}"
    )


def ollama_lines(chat: str, end: str) -> list[str]:
    """The lines of a Modelfile that say how it asks; `end` is the text of the end-of-text token."""
    if chat == EOS_TURNS:
        return [f'TEMPLATE """{{{{ range .Messages }}}}{{{{ .Content }}}}{end}{{{{ end }}}}"""']
    tests = [f'if eq $m.Role "{role}" }}}}{name}' for role, name in NAMES.items()]
    name = f"{{{{ {'{{ else '.join(tests)}{{{{ end }}}}"
    turn = f"{{{{ if $i }}}}{BETWEEN}{{{{ end }}}}{name}:{{{{ if $m.Content }}}} {{{{ $m.Content }}}}{{{{ end }}}}"
    text = f"{{{{ range $i, $m := .Messages }}}}{turn}{{{{ end }}}}{BETWEEN}{NAMES['assistant']}:"
    return [f'TEMPLATE """{text}"""', *(f'PARAMETER stop """{stop}"""' for stop in STOPS)]
