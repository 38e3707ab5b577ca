"""Text to token ids and back: chat templates, tokenizers, stop strings, grammars."""
