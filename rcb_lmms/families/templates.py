"""The prompts of the original code base, as chat templates; the paper's numbers are of models asked under these."""

# The system prompt of the original code base, which the public checkpoint's own template leaves out.
VICUNA = (
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the human's questions."
    "{% for message in messages %}{{ ' USER: ' if message.role == 'user' else ' ASSISTANT: ' }}"
    "{% for item in message.content %}{{ '<image>\n' if item.type == 'image' else item.text }}{% endfor %}"
    "{% if message.role == 'assistant' %}{{ '</s>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}"
)

# The system prompt of the original code base, in the Llama-3 format.
LLAMA_3 = (
    "{{ bos_token }}<|start_header_id|>system<|end_header_id|>\n\n"
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language.<|eot_id|>"
    "{% for message in messages %}<|start_header_id|>{{ message.role }}<|end_header_id|>\n\n"
    "{% set content %}{% for item in message.content %}"
    "{{ '<image>\n' if item.type == 'image' else item.text }}"
    "{% endfor %}{% endset %}{{ content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)

# The prompt of the original code base (`qwen_1_5`); the public checkpoint's own template has no system prompt.
CHATML = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
    "{% for item in message.content %}"
    "{{ item.text if item.type == 'text' else '<' + item.type + '>\n' }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# By the names they have in the argument `template`.
TEMPLATES = {"vicuna": VICUNA, "llama_3": LLAMA_3, "qwen": CHATML}
