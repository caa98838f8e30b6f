"""One PEFT adapter: its files, keys, configuration and tensors."""
