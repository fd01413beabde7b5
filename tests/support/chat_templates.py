"""Hold small chat templates of our own that do what real families of models do, and tokenizers that go with them."""

import json
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, Tokenizer

from fuselm.models.locating import Model
from fuselm.models.vocabulary import Vocabulary


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """Describe a template: its text, its special tokens, and which quirks of a conversation it has.

    `special` are added to a tokenizer; those in `swallowing` take the white space behind them; those in `plain` are
    added tokens that are not special. `ends` are what generation_config.json says.
    """

    text: str
    special: tuple[str, ...] = ()
    plain: tuple[str, ...] = ()
    swallowing: tuple[str, ...] = ()
    bos: str | None = None
    eos: str = "</s>"
    ends: tuple[str, ...] = ()
    knows_system: bool = True
    alternates: bool = False
    end: str | None = None  # what ends every turn; None if there is none behind the content


def chatml(before: str = "", *, inner: str = "m.content") -> str:
    """Return ChatML with something `before` the messages."""
    return (
        before
        + "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + "
        + inner
        + " + '<|im_end|>\n' }}{% endfor %}"
    )


IM = ("<|im_start|>", "<|im_end|>")
ALTERNATE = (
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
)
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
TAKE_SYSTEM = (
    "{% if messages[0].role == 'system' %}{% set rest = messages[1:] %}{% set sys = messages[0].content %}"
    "{% else %}{% set rest = messages %}{% set sys = '' %}{% endif %}"
)

FAMILIES = {
    "chatml": Family(text=chatml(), special=IM, eos="<|im_end|>", end="<|im_end|>"),
    "chatml-not-special": Family(text=chatml(), plain=IM, eos="<|im_end|>", end="<|im_end|>"),
    "smollm2": Family(
        text=chatml(
            "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{% endif %}"
        ),
        special=IM,
        bos="<|im_start|>",
        eos="<|im_end|>",
        end="<|im_end|>",
    ),
    "qwen2.5": Family(
        text="{%- if tools %}{{- '<|im_start|>system\nTools:' }}{%- for t in tools %}{{- '\n' }}{{- t | tojson }}"
        "{%- endfor %}{{- '<|im_end|>\n' }}{%- endif %}{%- for m in messages %}"
        "{%- if m.role == 'tool' %}"
        "{{- '<|im_start|>user\n<tool_response>\n' + m.content + '\n</tool_response><|im_end|>\n' }}"
        "{%- elif m.role == 'assistant' and m.tool_calls %}{{- '<|im_start|>assistant' }}"
        "{%- if m.content %}{{- '\n' + m.content }}{%- endif %}{%- for c in m.tool_calls %}{%- set c = c.function %}"
        '{{- \'\n<tool_call>\n{"name": "\' + c.name + \'", "arguments": \' }}{{- c.arguments | tojson }}'
        "{{- '}\n</tool_call>' }}"
        "{%- endfor %}{{- '<|im_end|>\n' }}{%- else %}"
        "{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
        "{%- endif %}{%- endfor %}",
        special=("<|endoftext|>", *IM),
        plain=("<tool_call>", "</tool_call>"),
        eos="<|im_end|>",
        ends=("<|im_end|>", "<|endoftext|>"),
        end="<|im_end|>",
    ),
    "qwen3": Family(
        text="{%- set ns = namespace(last=-1) %}{%- for m in messages %}{%- if m.role == 'user' %}"
        "{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}{%- for m in messages %}"
        "{%- if m.role != 'assistant' %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
        "{%- else %}{%- set content = m.content %}{%- set thought = '' %}{%- if '</think>' in content %}"
        "{%- set thought = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
        "{%- set content = content.split('</think>')[-1].lstrip('\n') %}{%- endif %}"
        "{%- if loop.index0 > ns.last and (loop.last or thought) %}"
        "{{- '<|im_start|>assistant\n<think>\n' + thought.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}"
        "{%- else %}{{- '<|im_start|>assistant\n' + content }}{%- endif %}{{- '<|im_end|>\n' }}{%- endif %}"
        "{%- endfor %}",
        special=("<|endoftext|>", *IM),
        plain=("<think>", "</think>"),
        eos="<|im_end|>",
        ends=("<|im_end|>", "<|endoftext|>"),
        end="<|im_end|>",
    ),
    "smollm3": Family(
        text="{%- set today = strftime_now('%d %B %Y') -%}{{- '<|im_start|>system\nToday Date: ' + today + '\n' -}}"
        "{%- if messages[0].role == 'system' %}{{- messages[0].content }}{%- endif %}{{- '<|im_end|>\n' }}"
        "{%- for m in messages %}{%- if m.role == 'user' %}{{- '<|im_start|>user\n' + m.content + '<|im_end|>\n' }}"
        "{%- elif m.role == 'assistant' %}{% generation %}{{- '<|im_start|>assistant\n' + m.content.lstrip('\n') + "
        "'<|im_end|>\n' }}{% endgeneration %}{%- endif %}{%- endfor %}",
        special=IM,
        eos="<|im_end|>",
        end="<|im_end|>",
    ),
    "trl": Family(
        text="{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m.content + '<|im_end|>' }}"
        "{% endif %}{{ '\n' }}{% endfor %}",
        special=IM,
        eos="<|im_end|>",
        end="<|im_end|>",
    ),
    "llama2": Family(
        text=TAKE_SYSTEM + "{% for m in rest %}" + ALTERNATE + "{% if loop.first and sys %}"
        "{% set content = '<<SYS>>\n' + sys + '\n<</SYS>>\n\n' + m.content %}{% else %}"
        "{% set content = m.content %}{% endif %}"
        "{% if m.role == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
        "{% else %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}",
        special=("<s>", "</s>"),
        bos="<s>",
        alternates=True,
        end="</s>",
    ),
    "llama3": Family(
        text="{% for m in messages %}"
        "{% set c = '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim "
        "+ '<|eot_id|>' %}{% if loop.first %}{% set c = bos_token + c %}{% endif %}{{ c }}{% endfor %}",
        special=("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        bos="<|begin_of_text|>",
        eos="<|eot_id|>",
        ends=("<|end_of_text|>", "<|eot_id|>"),
        end="<|eot_id|>",
    ),
    "llama3.1": Family(
        text="{{- bos_token }}{%- if strftime_now is defined %}{%- set date = strftime_now('%d %b %Y') %}{%- else %}"
        "{%- set date = '26 Jul 2024' %}{%- endif %}"
        + TAKE_SYSTEM
        + "{{- '<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\nToday"
        " Date: ' + date"
        " + '\n\n' + sys | trim + '<|eot_id|>' }}{%- for m in rest %}{%- if m.tool_calls %}"
        "{%- if m.tool_calls | length != 1 %}{{- raise_exception('one tool call at once') }}{%- endif %}"
        '{{- \'<|start_header_id|>assistant<|end_header_id|>\n\n{"name": "\' + m.tool_calls[0].function.name + '
        "'\", \"parameters\": ' }}{{- m.tool_calls[0].function.arguments | tojson }}{{- '}<|eot_id|>' }}"
        "{%- elif m.role == 'tool' %}"
        "{{- '<|start_header_id|>ipython<|end_header_id|>\n\n' + m.content + '<|eot_id|>' }}"
        "{%- else %}{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}"
        "{%- endif %}{%- endfor %}",
        special=("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>"),
        bos="<|begin_of_text|>",
        eos="<|eot_id|>",
        ends=("<|eom_id|>", "<|eot_id|>"),
        end="<|eot_id|>",
    ),
    "mistral-v1": Family(
        text="{{ bos_token }}{% for m in messages %}"
        + ALTERNATE
        + "{% if m.role == 'user' %}{{ ' [INST] ' + m.content + ' [/INST]' }}"
        "{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}",
        special=("<s>", "</s>"),
        bos="<s>",
        knows_system=False,
        alternates=True,
        end="</s>",
    ),
    "mistral-v3": Family(
        text=TAKE_SYSTEM + "{{ bos_token }}{% for m in rest %}" + ALTERNATE + "{% if m.role == 'user' %}"
        "{% if loop.last or loop.length - loop.index0 == 2 %}"
        "{{ '[INST] ' + (sys + '\n\n' if sys else '') + m.content + '[/INST]' }}"
        "{% else %}{{ '[INST] ' + m.content + '[/INST]' }}{% endif %}{% else %}{{ ' ' + m.content | trim + eos_token }}"
        "{% endif %}{% endfor %}",
        special=("<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]"),
        bos="<s>",
        alternates=True,
        end="</s>",
    ),
    "mistral-tekken": Family(
        text=TAKE_SYSTEM + "{{ bos_token }}{{ '[SYSTEM_PROMPT]' + sys + '[/SYSTEM_PROMPT]' if sys }}{% for m in rest %}"
        "{% if m.role == 'user' %}{{ '[INST]' + m.content + '[/INST]' }}{% else %}{{ m.content + eos_token }}"
        "{% endif %}"
        "{% endfor %}",
        special=("<s>", "</s>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"),
        bos="<s>",
        end="</s>",
    ),
    "phi3": Family(
        text="{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}{{ eos_token }}",
        special=("<|endoftext|>",),
        swallowing=("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        eos="<|endoftext|>",
        ends=("<|endoftext|>", "<|end|>"),
        end="<|end|>",
    ),
    "phi4": Family(
        text="{% for m in messages %}{{ '<|im_start|>' + m.role + '<|im_sep|>' + m.content + '<|im_end|>' }}"
        "{% endfor %}",
        special=(*IM, "<|im_sep|>"),
        eos="<|im_end|>",
        end="<|im_end|>",
    ),
    "gemma2": Family(
        text="{{ bos_token }}"
        + NO_SYSTEM
        + "{% for m in messages %}"
        + ALTERNATE
        + "{% set role = 'model' if m.role == 'assistant' else m.role %}"
        "{{ '<start_of_turn>' + role + '\n' + m.content | trim + '<end_of_turn>\n' }}{% endfor %}",
        special=("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
        bos="<bos>",
        eos="<eos>",
        ends=("<eos>", "<end_of_turn>"),
        knows_system=False,
        alternates=True,
        end="<end_of_turn>",
    ),
    "gemma3": Family(
        text="{{ bos_token }}"
        + TAKE_SYSTEM
        + "{% for m in rest %}"
        + ALTERNATE
        + "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + (sys + '\n\n' if"
        " loop.first and sys else '') }}"
        "{% if m.content is string %}{{ m.content | trim }}{% else %}{% for part in m.content %}{{ part.text | trim }}"
        "{% endfor %}{% endif %}{{ '<end_of_turn>\n' }}{% endfor %}",
        special=("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
        bos="<bos>",
        eos="<eos>",
        ends=("<eos>", "<end_of_turn>"),
        alternates=True,
        end="<end_of_turn>",
    ),
    "parts": Family(
        text="{% for m in messages %}{{ '<|' + m.role + '|>' }}{% for part in m.content %}{% if part.type == 'text' %}"
        "{{ part.text }}{% endif %}{% endfor %}{{ '</s>' }}{% endfor %}",
        special=("</s>",),
        end="</s>",
    ),
    "deepseek-v2": Family(
        text="{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ 'User: ' + m.content + '\n\n' }}"
        "{% elif m.role == 'assistant' %}{{ 'Assistant: ' + m.content + eos_token }}{% else %}{{ m.content + '\n\n' }}"
        "{% endif %}{% endfor %}",
        special=("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
        bos="<｜begin▁of▁sentence｜>",
        eos="<｜end▁of▁sentence｜>",
        end="<｜end▁of▁sentence｜>",
    ),
    "deepseek-v3": Family(
        text=TAKE_SYSTEM
        + "{{ bos_token + sys }}{% for m in rest %}{% if m.role == 'user' %}{{ '<｜User｜>' + m.content }}"
        "{% elif m.role == 'assistant' %}{{ '<｜Assistant｜>' + m.content + eos_token }}{% endif %}{% endfor %}",
        special=("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"),
        bos="<｜begin▁of▁sentence｜>",
        eos="<｜end▁of▁sentence｜>",
        end="<｜end▁of▁sentence｜>",
    ),
    "deepseek-r1": Family(
        text=TAKE_SYSTEM
        + "{{ bos_token + sys }}{% for m in rest %}{% if m.role == 'user' %}{{ '<｜User｜>' + m.content }}"
        "{% else %}{% set content = m.content %}{% if '</think>' in content %}"
        "{% set content = content.split('</think>')[-1] %}"
        "{% endif %}{{ '<｜Assistant｜>' + content + eos_token }}{% endif %}{% endfor %}",
        special=("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
        plain=("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"),
        bos="<｜begin▁of▁sentence｜>",
        eos="<｜end▁of▁sentence｜>",
        end="<｜end▁of▁sentence｜>",
    ),
    "zephyr": Family(
        text="{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token }}\n{% endfor %}",
        special=("<s>", "</s>"),
        bos="<s>",
        end="</s>",
    ),
    "openchat": Family(
        text="{{ bos_token }}{% for m in messages %}"
        "{{ 'GPT4 Correct ' + m.role.title() + ': ' + m.content + '<|end_of_turn|>' }}"
        "{% endfor %}",
        special=("<s>", "</s>", "<|end_of_turn|>"),
        bos="<s>",
        eos="<|end_of_turn|>",
        end="<|end_of_turn|>",
    ),
    "internlm2": Family(
        text=chatml("{{ bos_token }}"),
        special=("<s>", "</s>", *IM),
        bos="<s>",
        ends=("</s>", "<|im_end|>"),
        end="<|im_end|>",
    ),
    "yi": Family(
        text="{% for m in messages %}{% if m.role == 'user' %}{{ '<|im_start|>user\n' + m.content + "
        "'<|im_end|>\n<|im_start|>assistant\n' }}{% elif m.role == 'assistant' %}{{ m.content + '<|im_end|>' + '\n' }}"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}",
        special=("<|startoftext|>", "<|endoftext|>", *IM),
        eos="<|endoftext|>",
        end="<|im_end|>",
    ),
    "vicuna": Family(
        text=TAKE_SYSTEM + "{{ bos_token + (sys or 'A chat.') }}{% for m in rest %}{% if m.role == 'user' %}"
        "{{ ' USER: ' + m.content | trim }}{% else %}{{ ' ASSISTANT: ' + m.content | trim + eos_token }}"
        "{% endif %}{% endfor %}",
        special=("<s>", "</s>"),
        bos="<s>",
        end="</s>",
    ),
    "falcon": Family(
        text="{% for m in messages %}{% if not loop.first %}{{ '\n' }}{% endif %}{{ m.role.title() + ': ' + "
        "m.content.strip().replace('\r\n', '\n').replace('\n\n', '\n') }}{% if not loop.last %}{{ '\n' }}"
        "{% endif %}{% endfor %}",
        special=("<|endoftext|>",),
        eos="<|endoftext|>",
    ),
    "falcon3": Family(
        text="{% for m in messages %}{% if m.role != 'assistant' %}{{ '<|' + m.role + '|>\n' + m.content + '\n' }}"
        "{% elif not loop.last %}{{ '<|assistant|>\n' + m.content + '\n' }}{% else %}"
        "{{ '<|assistant|>\n' + m.content + eos_token }}{% endif %}{% endfor %}",
        special=("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>"),
        eos="<|endoftext|>",
    ),
    "command-r": Family(
        text="{{ bos_token }}{% for m in messages %}{{ '<|START_OF_TURN_TOKEN|>' + {'user': '<|USER_TOKEN|>', "
        "'assistant': '<|CHATBOT_TOKEN|>', 'system': '<|SYSTEM_TOKEN|>'}[m.role] + m.content.strip() +"
        " '<|END_OF_TURN_TOKEN|>' }}"
        "{% endfor %}",
        special=(
            "<BOS_TOKEN>",
            "<|START_OF_TURN_TOKEN|>",
            "<|END_OF_TURN_TOKEN|>",
            "<|USER_TOKEN|>",
            "<|CHATBOT_TOKEN|>",
            "<|SYSTEM_TOKEN|>",
        ),
        bos="<BOS_TOKEN>",
        eos="<|END_OF_TURN_TOKEN|>",
        end="<|END_OF_TURN_TOKEN|>",
    ),
    "granite": Family(
        text="{%- if messages[0].role != 'system' %}"
        "{{- '<|start_of_role|>system<|end_of_role|>You are Granite. Today is ' + "
        "strftime_now('%B %d, %Y') + '.<|end_of_text|>\n' }}{%- endif %}{%- for m in messages %}"
        "{{- '<|start_of_role|>' + m.role + '<|end_of_role|>' + m.content + '<|end_of_text|>\n' }}{%- endfor %}",
        special=("<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>"),
        bos="<|end_of_text|>",
        eos="<|end_of_text|>",
        end="<|end_of_text|>",
    ),
    "olmo2": Family(
        text="{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}"
        "{{ '<|assistant|>\n' + m.content + eos_token }}"
        "{% if not loop.last %}{{ '\n' }}{% endif %}{% else %}{{ '<|' + m.role + '|>\n' + m.content + '\n' }}"
        "{% endif %}{% endfor %}",
        special=("<|endoftext|>",),
        bos="<|endoftext|>",
        eos="<|endoftext|>",
        end="<|endoftext|>",
    ),
    "starchat": Family(
        text="{% if messages[0].role != 'system' %}{{ '<|system|>\n<|end|>\n' }}{% endif %}{% for m in messages %}"
        "{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}",
        special=("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        eos="<|endoftext|>",
        end="<|end|>",
    ),
    "alpaca": Family(
        text=TAKE_SYSTEM
        + "{{ sys + '\n\n' if sys }}{% for m in rest %}{% if m.role == 'user' %}{{ '### Instruction:\n' + m.content + "
        "'\n\n' }}{% else %}{{ '### Response:\n' + m.content + '\n\n' }}{% endif %}{% endfor %}",
        special=("</s>",),
    ),
    "solar": Family(
        text="{% for m in messages %}{{ '### ' + m.role.title() + ':\n' + m.content }}{% if not loop.last %}"
        "{{ '\n\n' }}"
        "{% endif %}{% endfor %}",
        special=("</s>",),
    ),
    "glm4": Family(
        text="{{ '[gMASK]<sop>' }}{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content }}{% endfor %}",
        special=("<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
        eos="<|endoftext|>",
        ends=("<|endoftext|>", "<|user|>", "<|observation|>"),
    ),
    "gpt-oss": Family(
        text="{% for m in messages %}{% if m.role == 'assistant' %}"
        "{{ '<|start|>assistant<|channel|>final<|message|>' + m.content }}"
        "{{ '<|return|>' if loop.last else '<|end|>' }}{% else %}"
        "{{ '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}"
        "{% endif %}{% endfor %}",
        special=("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>"),
        eos="<|return|>",
    ),
    "exaone": Family(
        text="{% for m in messages %}{% if m.role == 'user' %}{{ '[|user|]' + m.content + '\n' }}{% else %}"
        "{{ '[|' + m.role + '|]' + m.content + '[|endofturn|]\n' }}{% endif %}{% endfor %}",
        special=("[BOS]",),
        plain=("[|system|]", "[|user|]", "[|assistant|]", "[|endofturn|]"),
        eos="[|endofturn|]",
        end="[|endofturn|]",
    ),
    "nemotron": Family(
        text="{% for m in messages %}{{ '<extra_id_1>' + m.role.title() + '\n' + m.content.strip() + '\n' }}"
        "{% endfor %}",
        special=("<s>", "</s>", "<extra_id_1>"),
        bos="<s>",
    ),
}
STRINGS = sorted({s for f in FAMILIES.values() for s in (*f.special, *f.plain, *f.swallowing)})


def build_model(family: Family, base: str, folder: Path) -> tuple[Model, Vocabulary]:
    """Write a model's folder without weights: the tokenizer `base`, in JSON, with the family's tokens and template."""
    tokenizer = Tokenizer.from_str(base)
    special = (*family.special, family.eos)
    tokenizer.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in special])
    tokenizer.add_special_tokens(
        [AddedToken(s, special=True, normalized=False, rstrip=True) for s in family.swallowing]
    )
    tokenizer.add_tokens([AddedToken(s, special=False, normalized=False) for s in family.plain])
    ids = tokenizer.get_vocab()
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"chat_template": family.text, "eos_token": family.eos, "tokenizer_class": "PreTrainedTokenizerFast"}
    settings |= {"bos_token": family.bos} if family.bos else {}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    ends = [ids[end] for end in family.ends or (family.eos,)]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}), encoding="utf-8")
    model = Model(
        name=folder.name,
        folder=folder,
        fingerprint="",
        tokenizer_fingerprint="",
        output_size=1 + max(ids.values()),
        context_length=1 << 20,
        context_token=ids[family.bos or family.eos],
        parameters_bytes=0,
    )
    return model, Vocabulary(tokenizer, model.output_size)
