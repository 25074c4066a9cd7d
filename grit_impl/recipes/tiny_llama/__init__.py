"""The embedded base model: its corpus, its tokenizer and its pretraining."""
