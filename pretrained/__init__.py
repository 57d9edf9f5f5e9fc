"""Memory for pretrained Hugging Face causal language models: attach, fine-tune, store, inspect.

Needs the extra `recollect[transformers]`; nothing here is imported before it is used.
"""
