"""Read conversations as each model does, in its own chat template, and find what the assistant says.

- What is read: `messages` (conversations, and the bytes of what the assistant says), `message_forms`,
  `templates` (a model's template and the names that it may use).
- Rendering: `rendering` asks `template_worker`, a process of its own that can open no file and has limits.
- Finding: `contents` (where a template put the assistants' contents), `control_tokens` (a template's special tokens,
  and those only), `turns` (which tokens are contents and which end a turn).
- `chat_vocabulary` puts it together: messages in, token ids and the rows that count out.
"""
