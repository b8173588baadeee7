"""Chat templates written after the manner of well-known families."""

# (template, what ends an answer).
TEMPLATES = {
  "chatml": (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}"
    "<|im_start|>assistant\n{% endif %}",
    "<|im_end|>",
  ),
  "smollm": (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}"
    "<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "<|im_end|>",
  ),
  "llama2": (
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}"
    "{% set rest = messages[1:] %}{% else %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% if m.role == 'user' %}"
    "<s>[INST] {% if loop.first and system is defined %}<<SYS>>\n{{ system }}"
    "\n<</SYS>>\n\n{% endif %}{{ m.content.strip() }} [/INST]{% else %}"
    " {{ m.content.strip() }} </s>{% endif %}{% endfor %}",
    " </s>",
  ),
  "llama3": (
    "<|begin|>{% for m in messages %}<|start_header|>{{ m.role }}"
    "<|end_header|>\n\n{{ m.content | trim }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header|>assistant<|end_header|>\n\n{% endif %}",
    "<|eot|>",
  ),
  "mistral": (
    "<s>{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }}"
    "[/INST]{% elif m.role == 'assistant' %} {{ m.content }}</s>{% else %}"
    "[SYS]{{ m.content }}[/SYS]{% endif %}{% endfor %}",
    "</s>",
  ),
  "gemma": (
    "<bos>{% for m in messages %}"
    "{% set role = 'model' if m.role == 'assistant' else m.role %}<start_of_turn>{{ role }}"
    "\n{{ m.content | trim }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}"
    "<start_of_turn>model\n{% endif %}",
    "<end_of_turn>",
  ),
  "phi3": (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}<|endoftext|>{% endif %}",
    "<|end|>",
  ),
  "zephyr": (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content + eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
    "</s>",
  ),
  "vicuna": (
    "{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}"
    " {% elif m.role == 'user' %}USER: {{ m.content }} {% else %}ASSISTANT: {{ m.content }}"
    "</s>{% endif %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}",
    "</s>",
  ),
  "thinking": (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% if '</think>' in m.content %}{% set said = m.content.split('</think>')[-1] %}"
    "{% if loop.last %}{{ m.content }}{% else %}{{ said | trim }}{% endif %}{% else %}"
    "{% if loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}{% endif %}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "<|im_end|>",
  ),
  "deepseek": (
    "<bos>{% for m in messages %}{% if m.role == 'user' %}<User>{{ m.content }}"
    "{% elif m.role == 'assistant' %}<Assistant>{{ m.content }}<eos>{% else %}"
    "{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}"
    "<Assistant>{% endif %}",
    "<eos>",
  ),
  "openchat": (
    "<s>{% for m in messages %}{{ 'GPT4 Correct ' + m.role.title() + ': ' + m.content }}"
    "<|end_of_turn|>{% endfor %}{% if add_generation_prompt %}"
    "GPT4 Correct Assistant:{% endif %}",
    "<|end_of_turn|>",
  ),
  "falcon": (
    "{% for m in messages %}{% if not loop.first %}\n{% endif %}{{ m.role.title() }}"
    ": {{ m.content }}{% endfor %}{% if add_generation_prompt %}\nAssistant:{% endif %}",
    "",
  ),
  "alpaca": (
    "{% for m in messages %}{% if m.role == 'assistant' %}### Response:\n{{ m.content }}"
    "</s>\n\n{% else %}### {{ m.role.title() }}:\n{{ m.content.strip() }}\n\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}### Response:\n{% endif %}",
    "</s>",
  ),
  "command": (
    "<BOS>{% for m in messages %}<|START|>{{ m.role | upper }}"
    "<|TOKEN|>{{ m.content.strip() }}<|END|>{% endfor %}{% if add_generation_prompt %}"
    "<|START|>CHATBOT<|TOKEN|>{% endif %}",
    "<|END|>",
  ),
  "granite": (
    "{% for m in messages %}<|role|>{{ m.role }}<|end_role|>{{ m.content }}"
    "<|end_of_text|>\n{% endfor %}{% if add_generation_prompt %}"
    "<|role|>assistant<|end_role|>{% endif %}",
    "<|end_of_text|>",
  ),
  "glm": (
    "[gMASK]<sop>{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}",
    "",
  ),
  "marked": (
    "{% for m in messages %}[{{ m.role }}] {% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content }}<end>{% endgeneration %}{% else %}{{ m.content }}{% endif %}"
    "\n{% endfor %}",
    "<end>",
  ),
  "upper": (
    "{% for m in messages %}{{ m.role }}> {{ m.content | replace('\n', ' ') }}<end>{% endfor %}",
    "<end>",
  ),
  "nemotron": (
    "<extra_id_0>System\n{% if messages[0].role == 'system' %}{{ messages[0].content }}"
    "{% endif %}\n{% for m in messages if m.role != 'system' %}"
    "<extra_id_1>{{ 'User' if m.role == 'user' else 'Assistant' }}\n{{ m.content.strip() }}"
    "\n{% endfor %}{% if add_generation_prompt %}<extra_id_1>Assistant\n{% endif %}",
    "",
  ),
}
