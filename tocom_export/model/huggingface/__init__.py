"""Models as Hugging Face's transformers saves them, read without it and without torch."""
